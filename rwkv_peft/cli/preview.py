"""--preview N: the first rows as they would be written, token by token, with what is learnt marked. Writes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from rwkv_peft.common import paths as project
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import plural
from rwkv_peft.preprocess import files, reader
from rwkv_peft.preprocess.config import TokenizeConfig, recipe, settled
from rwkv_peft.preprocess.pipeline import RowEncoder
from rwkv_peft.preprocess.report import at_places, fault_words, foreign_lines, overlooked_words, unused_words
from rwkv_peft.preprocess.stats import CorpusStats
from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role

MOST = 600  # tokens of a row that are shown, from its beginning and its end
COLOURS = {"begin": "\033[32m", "end": "\033[0m", "separator": "\033[2m|\033[22m"}
MARKS = {"begin": "[[", "end": "]]", "separator": "|"}


def preview(source: Path, config: TokenizeConfig, end_of_doc: bool, most: int) -> None:
    """Print the first `most` rows, and what cannot be used on the way to them."""
    config, template = settled(config)
    if template:
        print(f"template  {template}")
    chosen = files.chosen(source, config.valid_split)
    paths = [*chosen.train, *chosen.held_out]
    encoder = RowEncoder(recipe(config, end_of_doc))
    for name, encoding in reader.settle(paths, config.encoding).items():
        print(f"note: {name} is {encoding}; it was read as such")
    marks = COLOURS if sys.stdout.isatty() else MARKS
    how = "green" if marks is COLOURS else "in [[double brackets]]"
    print(
        f"PROMPT_TYPE={config.prompt_type}, EOT={config.eot}, BOS={int(encoder.recipe.bos)}. Tokens with | between; LOSS_MASK=qa "
        f"trains what is {how}."
    )
    shown, tally = 0, CorpusStats()

    def warn() -> None:
        for name in encoder.recipe.columns.named:
            if name not in tally.seen:
                print(
                    f"\nwarning   MAP_KEYS names the column {name!r}, but none of the rows that were read here has it"
                )
        for fault, number in tally.group("fault: ").items():
            where = at_places(tally.places[f"fault: {fault}"], len(paths) > 1)
            print(f"\nwarning   {fault_words(fault, number, where)}")
        if overlooked := tally.places.get("overlooked"):
            print(f"\nwarning   {overlooked_words(len(overlooked), at_places(overlooked, len(paths) > 1))}")
        kinds = tally.group("found: ")
        for words in foreign_lines(kinds, tally.places, config.convert_headings, tally.group("left: ")):
            print(f"\nwarning   {words}")
        for file, keys in tally.unused_keys().items():
            for words in unused_words(keys):
                print(f"\nwarning   {file}: {words}")

    for note in chosen.notes:
        print(f"{note.level:<9} {note.file}: {note.words}")
    for path in paths:
        wanted = "" if chosen.held_out else config.valid_split
        for block in files.blocks(path, config.txt_mode, wanted, columns=encoder.recipe.columns):
            for note in block.notes:
                print(f"{note.level:<9} {note.file}: {note.words}")
            made = encoder.block(block)
            tally.add(made)
            for reject in made.rejects[: most - shown]:
                print(f"\n--- {reject.file}:{reject.line}: cannot be used: {reject.message}")
            starts = np.concatenate([[0], np.cumsum(made.sizes)])
            for i in range(min(most - shown, len(made.sizes))):
                row = slice(starts[i], starts[i + 1])
                show(block.file, int(made.lines[i]), made.ids[row], made.roles[row], marks)
                shown += 1
            if shown == most:
                warn()
                return
    warn()
    if not shown:
        why = ", ".join(
            f"{n:,} {reason}" for what in ("rejected: ", "dropped: ") for reason, n in tally.group(what).items()
        )
        raise UserError(f"{project.display_path(source)}: holds no row that can be used{f' ({why})' if why else ''}.")


def show(file: str, line: int, ids: np.ndarray, roles: np.ndarray, marks: dict[str, str]) -> None:
    """Print a row, its trained tokens marked."""
    learnt = roles == Role.ASSISTANT
    print(f"\n--- {file}:{line}: {plural(len(ids), 'token')}, {int(learnt.sum())} of them learnt")
    parts = [slice(None)] if len(ids) <= MOST else [slice(MOST // 2), slice(-MOST // 2, None)]
    texts = [tokenizer.mark_trained(ids[part].tolist(), learnt[part].tolist(), **marks) for part in parts]
    print(f"\n... {plural(len(ids) - MOST, 'token')} ...\n".join(texts))
