"""NAME.report.json: what was read, what became of it, how long rows are, and what that means for training. And its words."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_peft import __version__
from rwkv_peft.common import paths
from rwkv_peft.common.formatting import join_names, plural
from rwkv_peft.data import buckets
from rwkv_peft.data.sampling import auto_ctx_len
from rwkv_peft.text.presets import PRESETS

from .advice import factor_table, power_of_two
from .foreign_headings import KINDS
from .json_repair import FAULTS
from .pipeline import Place
from .reader import Note
from .stats import SHOW, CorpusStats, script_shares

CELLS = {
    "empty": "with a word that stands for an empty cell (nan, NaN, None, NULL), taken as empty",
    "None": "with nothing but the word None or null in a column that a row needs, taken as text; if it means that nothing is "
    "there, take these rows out",
}
ROWS = {
    "noinput": "with a second text that says there is none (<noinput>, N/A), taken as empty",
    "tags": "with a tool call, a result or tools between tags that stay text, as their JSON is broken or words follow; the "
    "model learns the tags as letters",
}
WORDS = FAULTS | CELLS | ROWS
UNSAFE = set('"$`\\!\n')  # characters that double quotes do not protect from bash
BATCHES = (4, 8)  # micro-batch sizes for which the padding of DATALOAD=pad is reported
SAMPLE = 20_000  # rows that are looked at for the shares of filling
BINS = 40
NOTES = 3  # ways to write headings that are named
MANY = 0.1  # of the rows: if more cannot be used, that is worth a word of its own
WORLD = frozenset(  # User: and Assistant:
    name
    for name, form in PRESETS.items()
    if (form.format_user, form.format_assistant) == ("User: {{content}}", "Assistant: {{content}}")
)


def make(
    tally: CorpusStats,
    source: Path,
    files: Sequence[Path],
    other: Sequence[Path],
    settings: Mapping[str, Any],
    held_out: np.ndarray,
    notes: Sequence[Note] = (),
) -> dict:
    """held_out: of each row made, bool. notes: what is to be said of the files, besides what their readers say."""
    sizes = np.frombuffer(tally.sizes, np.int32)
    counts = tally.counts
    epochs = settings["EPOCHS"]
    trained = sizes[~held_out]
    train, valid_rows = len(trained), int(held_out.sum())
    # training sees every row `epochs` times; where there are many, that changes nothing of what is worked out here
    seen = np.tile(trained, epochs) if train * epochs <= SAMPLE else trained
    dialogues = {name: counts[name] for name in ("turns", "system", "tools", "thoughts") if counts[name]}
    return {
        "made_by": __version__,
        "source": paths.display_path(source),
        "read_files": [paths.display_path(path) for path in files],
        "left_out_files": [paths.display_path(path) for path in other],
        "settings": dict(settings),
        "notes": [list(note) for note in (*notes, *tally.notes)],
        # kept + rejected + dropped = read
        "rows": {
            "read": counts["read"],
            "kept": counts["kept"],
            "with_answer": counts["with an answer"],
            "rejected": tally.group("rejected: "),
            "dropped": tally.group("dropped: "),
            "schemas": tally.group("schema: "),
            "faults": tally.group("fault: "),
            "made": len(sizes),  # several of a row with EXPAND=1 and OVERLONG=split
            "pieces_without_answer": counts["pieces without an answer"],
            "lost_some_answers": counts["rows that lost some of their answers"],
            "cut": counts["cut rows"],
            "cut_off": counts["cut off"],  # of these, those that lost the end of what is learnt last
            "turns_cut_off": counts["turns cut off"],
            "held_out": valid_rows,
            "written": train * epochs,
        },
        "tokens": {"once": int(sizes.sum(dtype=np.int64)), "learnt_with_qa": tally.learnt},
        "mojibake": {"repaired": counts["repaired"], "lossy": counts["lossy"]},
        "foreign": {
            "found": {kind: counts[f"found: {kind}"] for kind in KINDS if counts[f"found: {kind}"]},
            "left": tally.group("left: "),
            "converted": {kind: counts[f"converted: {kind}"] for kind in KINDS if counts[f"converted: {kind}"]},
        },
        "content": dialogues | {"duplicates": duplicates(np.frombuffer(tally.hashes, np.uint64))},
        "scripts": script_shares(tally.scripts),
        "lengths": lengths(sizes),
        "filling": filling(seen, settings["SEED"]),
        "advice": advice(
            seen, train * epochs, valid_rows > 0, settings["EOF"], tally, bool(settings["CONVERT_HEADINGS"])
        ),
        "places": {
            "rejected": [[r.file, r.line, r.message] for r in tally.rejects],
            **{what: [list(place) for place in kept] for what, kept in tally.places.items()},
        },
        "unused": tally.unused_keys(),
    }


def duplicates(hashes: np.ndarray) -> int:
    """Rows whose content is that of another, but for one of each kind."""
    ordered = np.sort(hashes)
    return int(np.count_nonzero(ordered[1:] == ordered[:-1]))


def lengths(sizes: np.ndarray) -> dict[str, Any]:
    """Tokens of a row, its terminator included."""
    ordered = np.sort(sizes)
    quantiles = [int(ordered[round(q * (len(sizes) - 1))]) for q in (0, 0.5, 0.95, 0.99, 1)]
    histogram, edges = np.histogram(sizes, bins=min(BINS, max(1, quantiles[-1])))
    return {
        **dict(zip(("shortest", "median", "p95", "p99", "longest"), quantiles, strict=True)),
        "mean": round(float(sizes.mean()), 1),
        "histogram": {"edges": [round(e, 1) for e in edges.tolist()], "rows": histogram.tolist()},
    }


def filling(sizes: np.ndarray, seed: int) -> dict[str, float]:
    """The share of computed tokens that is nothing but filling, for each DATALOAD, with CTX_LEN=auto."""
    random = np.random.default_rng([seed, 2])
    some = sizes if len(sizes) <= SAMPLE else sizes[random.integers(len(sizes), size=SAMPLE)]
    some = np.maximum(some.astype(np.int64) - 1, 1)  # inputs
    shares: dict[str, float] = {"pack": 0.0, "only": 0.0, "get": 0.0}  # these fill up nothing
    for batch in BATCHES:
        if len(some) >= batch:
            rows = random.permutation(some)[: len(some) // batch * batch].reshape(-1, batch)
            shares[f"pad (MICRO_BSZ={batch})"] = 1 - rows.sum() / (rows.max(axis=1).sum() * batch)
    edges = np.array(buckets.best_edges(some))
    shares["bucket"] = 1 - some.sum() / edges[np.searchsorted(edges, some)].sum()
    return {name: round(float(share), 4) for name, share in shares.items()}


def advice(
    sizes: np.ndarray, rows: int, held_out: bool, end_of_doc: bool, tally: CorpusStats, converting: bool
) -> dict[str, Any]:
    """Return the values of the lines for training.sh."""
    # (a text whose line breaks are letters may well be a dialogue)
    foreign = tally.counts["found: headings"] + tally.counts["found: escaped"]
    answers = tally.counts["with an answer"] > 0 or "overlooked" in tally.places or foreign > 0
    return {
        "append_eof": end_of_doc,
        "max_length": int(sizes.max()),
        "max_length_power_of_two": power_of_two(int(sizes.max())),
        "data_line_count": rows,
        "CTX_LEN": auto_ctx_len("pack", sizes),
        "TRAIN_LENGTHS": list(buckets.best_edges(np.maximum(sizes.astype(np.int64) - 1, 1))),
        "LOSS_MASK": "qa" if answers else "pad",
        "without_answer": tally.counts["kept"] - tally.counts["with an answer"],
        "held_out": held_out,
        "other_headings": foreign,
        "converting": converting,
        "left": list(tally.group("left: ")),
    }


def foreign_lines(
    counts: Mapping[str, int], places: Mapping[str, Sequence], converting: bool, left: Mapping[str, int]
) -> Iterator[str]:
    """Yield a warning for each thing that another tool left in the rows: how many, the first, and what to do.

    left: why headings were left -> rows.
    """
    for kind, rows in counts.items():
        what, effect, instead, rewritten = KINDS[kind]
        file, number, _ = places[kind][0]
        notes = list(dict.fromkeys(note for *_, note in places[kind]))
        note = ", ".join(notes[:NOTES]) + ", ..." * (len(notes) > NOTES)
        if not rewritten:
            todo = instead
        elif converting and kind == "headings" and any(left):
            why = ", ".join(f"{reason or 'several ways to read it'} ({plural(n, 'row')})" for reason, n in left.items())
            todo = f"CONVERT_HEADINGS=1 left them as they are: {why}. {instead}"
        elif converting:
            todo = f"CONVERT_HEADINGS=1 left them as they are, because they can be read in several ways. {instead}"
        else:
            todo = f"--convert-headings rewrites those that can be read in one way only. Or: {instead[0].lower()}{instead[1:]}"
        yield f"{plural(rows, 'row')} {what} ({note}): {effect}. The first is {file}:{number}. {todo}"


def fault_words(fault: str, number: int, where: str) -> str:
    """The warning for rows or cells that were read though something is wrong with them."""
    return f"{plural(number, 'cell' if fault in CELLS else 'row')} {WORDS[fault]}: {where}{more(number)}"


def overlooked_words(rows: int, where: str) -> str:
    """The warning for ready texts whose turns the models would not know as such."""
    return (
        f"{'at least ' * (rows >= SHOW)}{plural(rows, 'row')} with what looks like a turn but is not written as the models know "
        f'it: {where}. A turn begins with exactly "User:", "Assistant:" or "System:", behind an empty line (\\n\\n in the JSON); '
        "--convert-headings rewrites those that can be read in one way only"
    )


def say(content: Mapping[str, Any], prefix: Path, template: str = "", made: bool = True) -> None:
    """Print the report in words; its last lines are those for training.sh.

    Args:
        content: The report.
        prefix: Of the files.
        template: What PROMPT_TYPE=auto became.
        made: It was made now, not by an earlier call.
    """
    rows, places, tokens = content["rows"], content["places"], content["tokens"]
    several = len(content["read_files"]) > 1
    shown = paths.display_path(prefix)

    def line(head: str, words: str) -> None:
        print(f"{head:<9} {words}")

    def where(what: str) -> str:
        return at_places([Place(*place) for place in places.get(what, [])], several)

    kinds = ", ".join(f"{n:,} {schema}" for schema, n in rows["schemas"].items())
    files = f" in {len(content['read_files'])} files" if several else ""
    line("read", f"{content['source']}: {plural(rows['read'], 'row')}{files} ({kinds}), {rows['kept']:,} kept, "
                 f"{rows['with_answer']:,} with an Assistant turn")  # fmt: skip
    for name, encoding in content.get("encodings", {}).items():
        line("note", f"{name} is {encoding}; it was read as such")
    if template:
        line("template", template)
    if content["left_out_files"]:
        line("", f"not read: {join_names(content['left_out_files'])}")
    for level, words in notes_together(content["notes"]):
        line(level, words)
    for fault, number in rows["faults"].items():
        line("warning", fault_words(fault, number, where(f"fault: {fault}")))
    if rejected := sum(rows["rejected"].values()):
        line(
            "rejected",
            f"{plural(rejected, 'row')} ({reasons(rows['rejected'])}), all of them in {shown}.rejects.jsonl:",
        )
        for words in distinct_rejects(places["rejected"]):
            line("", words)
        if rejected > len(places["rejected"]):
            line("", f"... and {rejected - len(places['rejected']):,} more")
        if rejected > MANY * rows["read"]:
            missing = share(rejected, rows["read"])
            line("warning", f"{missing} of all rows are missing from what follows: mend them, and run this again")
    if dropped := sum(rows["dropped"].values()):
        line("dropped", f"{plural(dropped, 'row')} ({reasons(rows['dropped'])}): {where('dropped')}{more(dropped)}")
    for name, words in (("pieces_without_answer", "piece"), ("lost_some_answers", "row")):
        if rows[name]:
            lost = "without an answer left out" if words == "piece" else "kept without some of their answers"
            line("", f"{plural(rows[name], words)} {lost}")
    if rows["cut"]:
        turns = (
            f", and {plural(rows['turns_cut_off'], 'turn')} behind the cut left out" if rows["turns_cut_off"] else ""
        )
        line("cut", f"{plural(rows['cut'], 'row')} (OVERLONG={content['settings']['OVERLONG']}){turns}")
    if rows["cut_off"]:
        line("warning", f"{plural(rows['cut_off'], 'row')} lost the end of the answer or text: the model does not learn to stop "
                        f"from {'it' if rows['cut_off'] == 1 else 'them'}: {where('cut off')}{more(rows['cut_off'])}. "
                        "OVERLONG=drop leaves such rows out")  # fmt: skip
    mojibake = content["mojibake"]
    if mojibake["repaired"]:
        line("repaired", f"{plural(mojibake['repaired'], 'row')} of mojibake (UTF-8 that was read as cp1252 and saved again): "
                         f"{where('repaired')}{more(mojibake['repaired'])}")  # fmt: skip
    if mojibake["lossy"]:
        line("warning", f"{plural(mojibake['lossy'], 'row')} of mojibake that cannot be undone, taken as they are: "
                        f"{where('lossy')}{more(mojibake['lossy'])}")  # fmt: skip
    for file, keys in content["unused"].items():
        of = f"{file}: " if several else ""
        for words in unused_words(keys):
            line("warning", f"{of}{words}")
    if overlooked := places.get("overlooked"):
        line("warning", overlooked_words(len(overlooked), where("overlooked")))
    foreign = content["foreign"]
    if converted := foreign["converted"]:
        line("rewrote", ", ".join(f"{plural(n, 'row')} {KINDS[kind].name}" for kind, n in converted.items()))
    for words in foreign_lines(
        foreign["found"], places, bool(content["settings"]["CONVERT_HEADINGS"]), foreign.get("left", {})
    ):
        line("warning", words)
    texts, template = rows["schemas"].get("text", 0), content["settings"]["PROMPT_TYPE"]
    if texts and rows["with_answer"] and template not in WORLD:
        line(
            "warning",
            f"{plural(texts, 'row')} with text are taken as they are: PROMPT_TYPE={template} changes dialogues only",
        )
    length, facts = content["lengths"], content["content"]
    line("rows", f"{length['shortest']} to {plural(length['longest'], 'token')}, median {length['median']:,}, "
                 f"mean {length['mean']:,}, 95% up to {length['p95']:,}; "
                 f"{share(tokens['learnt_with_qa'], tokens['once'])} of the tokens are answers")  # fmt: skip
    turns = f"{facts['turns'] / max(rows['with_answer'], 1):.1f} answers a dialogue; " if facts.get("turns") else ""
    others = {"system": "with a system text", "tools": "with tools", "thoughts": "thoughts", "duplicates": "duplicates"}
    others_present = [f"{facts[name]:,} {words}" for name, words in others.items() if facts.get(name)]
    scripts = [f"{name} {part:.0%}" for name, part in content["scripts"].items() if part >= 0.005]
    line("", f"{turns}{'; '.join(others_present) or 'no duplicates'}; {', '.join(scripts[:4])}")
    filled = [f"{part:.0%} with {name}" for name, part in content["filling"].items() if part]
    none = [name for name, part in content["filling"].items() if not part]
    words = ", ".join([*filled, f"none with {', '.join(none[:-1])} and {none[-1]}"])
    line("filling", f"what each DATALOAD would compute for nothing: {words}")
    of = "" if rows["made"] == rows["kept"] else f" (made of {plural(rows['kept'], 'row')})"
    line(
        "wrote" if made else "there is", f"{shown}.bin/.idx and .roles.bin/.idx: {plural(rows['written'], 'row')}{of}, "
                  f"{plural(tokens['once'] * content['settings']['EPOCHS'], 'token')}"
                  if not rows["held_out"] else
                  f"{shown}.bin/.idx and .roles.bin/.idx: {plural(rows['written'], 'row')}{of}")  # fmt: skip
    if rows["held_out"]:
        split = content["settings"]["VALID_SPLIT"]
        how = f"those of VALID_SPLIT={split}" if split else "none of them in the other file"
        line("", f"{shown}.valid.bin/.idx: {plural(rows['held_out'], 'row')} held out, {how}")
    line("", f"{shown}.report.json, {prefix.name}.lengths.png: all of this, and the lengths as a picture")
    print(labels(content["advice"], data_path(prefix)))


def unused_words(keys: Sequence[Sequence]) -> Iterator[str]:
    """(level, key, rows) of what is not used, in words."""
    for level, key, rows in keys[:SHOW]:
        yield (
            f'{level} "{key}" is not used ({plural(rows, "row")})'
            if key
            else f"more of them: {level}s ({plural(rows, 'row')})"
        )
    if len(keys) > SHOW:
        others = ", ".join(f'"{key}"' for _, key, _ in keys[SHOW : 2 * SHOW])
        yield f"{len(keys) - SHOW} more are not used: {others}{' ...' if len(keys) > 2 * SHOW else ''}"


def notes_together(notes: Sequence[Sequence]) -> Iterator[tuple[str, str]]:
    """(level, words) of what is said of files; what is said of many files alike is said once."""
    alike: dict[tuple[str, str], list[str]] = {}
    for level, file, words in notes:
        alike.setdefault((level, words), []).append(file)
    for (level, words), names in alike.items():
        others = f" (and {join_names(names[1:])})" if names[1:] else ""
        yield level, f"{names[0]}: {words}{others}"


def distinct_rejects(rejected: Sequence[Sequence]) -> Iterator[str]:
    """(file, line, message) of rows that cannot be used, in words; those of a file with one message together."""
    alike: dict[tuple[str, str], list[str]] = {}
    for file, number, message in rejected:
        alike.setdefault((file, message), []).append(str(number))
    for (file, message), numbers in alike.items():
        yield f"{file}:{numbers[0]}: {message}" + (f" (and lines {', '.join(numbers[1:])})" if numbers[1:] else "")


def reasons(counts: Mapping[str, int]) -> str:
    """Return reasons and their counts in words."""
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.items())


def share(part: int, whole: int) -> str:
    """Return a share as a percentage."""
    return f"{part / whole:.0%}" if whole else "0%"


def more(total: int) -> str:
    """Return how many more there are than are shown."""
    return f" and {total - SHOW:,} more" if total > SHOW else ""


def at_places(kept: Sequence[Place], several: bool) -> str:
    """Line 5 (its note), line 9 (its note); with the file where there are several."""
    return ", ".join(
        (f"{p.file}:{p.line}" if several else f"line {p.line}") + (f" ({p.note})" if p.note else "") for p in kept
    )


def data_path(prefix: Path) -> str:
    """What to write behind DATA_PATH= for these files."""
    name = prefix.name if prefix.parent == paths.ROOT / "data" else paths.display_path(prefix.resolve())
    return shlex.quote(name) if set(name) & UNSAFE else f'"{name}"'


def labels(facts: Mapping[str, Any], name: str) -> str:
    """The numbers that training.sh wants, with the labels of the field's tool."""
    plain = "   # no row has an Assistant turn: learn all of the text"
    alone = facts["without_answer"]
    counted = ", held-out ones counted" if facts.get("held_out") else ""
    words = f"          # leaves out {plural(alone, 'row')} without an Assistant turn{counted}; pad takes all text"
    left_out = words if alone else ""
    if facts.get("other_headings"):
        rows = plural(facts["other_headings"], "row")
        left_out = f"          # {rows} written for another tool: --convert-headings finds their answers"
        if facts.get("converting"):
            reasons = ", ".join(filter(None, facts["left"])) or "they can be read in several ways"
            left_out = f"          # {rows} written for another tool, whose answers --convert-headings could not find: {reasons}"
    return "\n".join([
        f"### append_eof = {facts['append_eof']}",
        f"### max_length = {facts['max_length']}",
        f"### max_length_power_of_two = {facts['max_length_power_of_two']}",
        f"### data_line_count = {facts['data_line_count']}",
        *factor_table(facts["data_line_count"]),
        "",
        "### Lines for training.sh, in place of those there (auto works everything out; any MICRO_BSZ and EPOCH_STEPS work, "
        "every row is used):",
        f"DATA_PATH={name}",
        f"CTX_LEN=auto          # becomes {facts['CTX_LEN']} with DATALOAD=pack",
        "EPOCH_STEPS=auto",
        "MICRO_BSZ=auto",
        f"LOSS_MASK={facts['LOSS_MASK']}" + (left_out if facts["LOSS_MASK"] == "qa" else plain),
        f"TRAIN_LENGTHS=auto    # becomes {' '.join(map(str, facts['TRAIN_LENGTHS']))} with DATALOAD=bucket",
    ])  # fmt: skip
