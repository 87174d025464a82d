"""How the rows of a block become tokens: read, rendered, encoded, limited in length; and what is counted on the way.

An EncodeConfig is all that decides it, so it can be sent to other processes and hashed. One block in, one EncodedBlock out;
blocks do not depend on one another, so any number of workers gives the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import orjson

from rwkv_peft.common.paths import is_utf8
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import ENDINGS, Dialogue, Ending, Template
from rwkv_peft.text.turns import overlooked_heading, spans_of_text

from . import foreign_headings, json_keys
from .encode import NO_ROWS, Pieces, Tokens, encode_row, encode_rows, with_bos
from .fast_path import FastPath
from .json_repair import repair_json
from .keys import HARMLESS_NAMES, MATERIALS, MESSAGES, PROMPTS, RESPONSES, TEXTS, squashed
from .mapped_columns import occurs
from .message_order import are_pairs
from .reader import LINE_LIMIT, Block, Note, not_utf8, too_long
from .schemas import INFILLING, Columns, Reader, Row, RowError, kind
from .truncate import Cut, Limits, TooLong, cut_row, cut_turns, within_turns
from .values import TableRow

NOTHING_TO_LEARN = "nothing to learn"  # all answers have weight 0, or were cut away
COMMENT = "comment"  # a line of .jsonl that is none of the rows; reported, not rejected
RAW_LIMIT = 2000  # characters of a rejected row that are kept
# what pandas writes for an empty cell. Where a row needs a text, None may be one: it stays, and is reported
MISSING = frozenset(("nan", "NaN", "NAN", "-nan", "NULL", "null", "<NA>", "NaT", "None", "#N/A"))
MAY_BE_TEXT = frozenset(("None", "null"))


@dataclass(frozen=True)
class EncodeConfig:
    """The settings of make_tokenize.sh that decide what a row becomes."""

    template: Template
    eot: str = "doc"
    end_of_doc: bool = True  # False: no token 0 behind rows, whatever EOT says
    handler: str = "auto"
    columns: Columns = Columns()
    repair: bool = True
    expand: bool = False
    mask_history: bool = False
    limits: Limits = Limits()
    convert: bool = False  # CONVERT_HEADINGS: texts with another tool's headings become dialogues of the template
    bos: bool = False  # token 0 before every row

    @property
    def ending(self) -> Ending:
        """The end of a row's text."""
        ending = ENDINGS[self.eot]
        return dataclasses.replace(ending, token=ending.token and self.end_of_doc)


class Reject(NamedTuple):
    """A row that cannot be used: its place, why (counted), the sentence, and its beginning."""

    file: str
    line: int
    reason: str
    message: str
    row: str


class Place(NamedTuple):
    """A row that something is to be said about."""

    file: str
    line: int
    note: str


@dataclass
class EncodedBlock:
    """A block as tokens.

    Attributes:
        ids: uint16 [n].
        roles: uint8 [n].
        sizes: int32, tokens of each row that is written.
        hashes: uint64, of each row that is written.
        documents: uint64, a hash of all that was made of the same row.
        lines: int64, the line that each row comes from.
        counts: Rows by what happened to them ("read", "kept", "dropped: ...", ...).
    """

    ids: np.ndarray
    roles: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    documents: np.ndarray
    lines: np.ndarray
    counts: Counter[str]
    scripts: np.ndarray  # see encode.scripts
    file: str = ""
    read: int = 0
    rejects: list[Reject] = field(default_factory=list)
    places: dict[str, list[Place]] = field(default_factory=dict)  # "dropped", "overlooked", "repaired", ...
    seen: frozenset[str] = frozenset()  # columns of MAP_KEYS that were met
    unused: Counter[tuple[str, str]] = field(default_factory=Counter)  # (level, key) -> rows in which it is not used
    held_out: bool = False  # all rows of the block belong to NAME.valid
    notes: tuple[Note, ...] = ()  # what is to be said of the file


class Rows(NamedTuple):
    """Rows to write.

    Attributes:
        ids: uint16 [n].
        roles: uint8 [n].
        first: [rows + 1], where each row begins.
        lines: int64 [rows].
        rows: int64, the row of the block that each was made of.
        scripts: As in EncodedBlock.
    """

    ids: np.ndarray
    roles: np.ndarray
    first: np.ndarray
    lines: np.ndarray
    rows: np.ndarray
    scripts: np.ndarray


class PendingRow(NamedTuple):
    """A row that is not encoded yet: its number in the block, its line in the file, and its text in pieces.

    Several rows may be on one line. What the text was rendered from is a dialogue, the unread row where that is a plain
    conversation (a parsed one would take memory for nothing), or None for a ready text.
    """

    row: int
    line: int
    pieces: Pieces
    source: Dialogue | bytes | Row | RowError | None


def items(block: Block) -> Iterator[tuple[int, bytes | Row | RowError]]:
    """The rows of a block with their numbers; blank lines are none."""
    if not isinstance(block.data, bytes):
        yield from block.data
        return
    for number, line in enumerate(block.data.split(b"\n"), block.first):
        if line and not line.isspace():
            yield number, (line if len(line) <= LINE_LIMIT else too_long("Every line must be one JSON object"))


def with_keys(block: Block) -> Iterator[tuple[int, bytes | Row | RowError, int | None]]:
    """The rows of a block with their numbers, and how many keys their bytes hold; None where they are parsed already."""
    keyed = list(items(block))
    keys = iter(json_keys.counts([item for _, item in keyed if type(item) is bytes]))
    return ((line, item, next(keys) if type(item) is bytes else None) for line, item in keyed)


def parse(item: bytes | Row | RowError, faults: set[str] | None = None, keys: int | None = None) -> Row:
    """Return the row itself; a list of messages is a conversation.

    Args:
        item: Bytes, or a row that was parsed already.
        faults: Gets the kind of fault of JSON that is not quite JSON (json_repair.FAULTS).
        keys: How many keys its bytes have (json_keys.counts); None: a key that is there twice is not looked for.

    Raises:
        RowError: it is no row.
    """
    if isinstance(item, RowError):
        raise item
    if not isinstance(item, bytes):  # of a table, whose packed cells may be far larger than its file
        if any(type(cell) is str and len(cell) > LINE_LIMIT for cell in item.values()):
            raise too_long("Every row is one document or conversation")
        return item
    try:
        row = orjson.loads(item)
    except orjson.JSONDecodeError:
        if not is_utf8(item.decode("utf-8", "surrogateescape")):
            raise not_utf8(item) from None
        if item.lstrip()[:2].startswith((b"//", b"#", b"/*")):
            raise RowError(COMMENT, "is a comment") from None
        try:
            row, kind_of_fault = repair_json(item.decode("utf-8"))
        except ValueError as fault:
            raise RowError("not JSON", str(fault)) from None
        if faults is not None:
            faults.add(kind_of_fault)
    else:
        if keys is not None and not 0 <= keys == keys_of(row):
            one_value_each(item)
    if isinstance(row, str) and row.lstrip()[:1] == "{":  # JSON that was made JSON once more
        with contextlib.suppress(orjson.JSONDecodeError):
            row = orjson.loads(row)
            if faults is not None:
                faults.add("twice")
    if (
        isinstance(row, list)
        and row
        and (isinstance(row[0], dict) or all(isinstance(one, str) for one in row) or are_pairs(row))
    ):
        return {"messages": row}
    if not isinstance(row, dict):
        raise RowError("wrong type", f'must be a JSON object like {{"text": "..."}}, not {kind(row)}')
    return row


def keys_of(row: Any) -> int:
    """The keys of a row and of the messages in it, which are all that most rows have; -1 where these are no messages."""
    values = row.values() if type(row) is dict else (row,) if type(row) is list else ()
    keys = len(row) if type(row) is dict else 0
    for value in values:
        if type(value) is list and value and type(value[0]) is dict:
            try:
                keys += sum(map(len, value))
            except TypeError:
                return -1
    return keys


def one_value_each(item: bytes) -> None:
    """Raise RowError if an object of the row has a key with two values, of which a parser keeps the last one only.

    Keys of harmless metadata may.
    """
    twice: dict[int, str] = {}  # the objects with such a key, by identity, and the key
    kept: list[Row] = []  # all objects, so that no identity is given again

    def pairs(pairs_of_row: list[tuple[str, Any]]) -> Row:
        values: dict[str, Any] = {}
        kept.append(values)
        for key, value in pairs_of_row:
            if key in values and values[key] != value and squashed(key) not in HARMLESS_NAMES:
                twice.setdefault(id(values), key)
            values[key] = value
        return values

    def objects(value: Any, where: str) -> Iterator[tuple[str, Row]]:
        if isinstance(value, dict):
            yield where, value
            for key, one in value.items():
                if squashed(key) not in HARMLESS_NAMES:
                    yield from objects(one, f"{where}.{key}" if where else key)
        elif isinstance(value, list):
            for n, one in enumerate(value):
                yield from objects(one, f"{where}[{n}]")

    try:
        row = json.loads(item, object_pairs_hook=pairs)
        for where, one in objects(row, "") if twice else ():
            if id(one) in twice:
                subject = f"{where} " if where else ""
                raise RowError(
                    "two values", f'{subject}has "{twice[id(one)]}" twice, with different values: leave one of them'
                )
    except (ValueError, RecursionError):  # numbers of thousands of digits, a thousand brackets: orjson has read them
        return


class RowEncoder:
    """Turns blocks into tokens by a recipe."""

    def __init__(self, recipe: EncodeConfig):
        if recipe.template.infill:  # cut, they would not be a text with a gap any more
            recipe = dataclasses.replace(recipe, limits=dataclasses.replace(recipe.limits, policy="drop"))
        self.recipe, self.template, self.ending = recipe, recipe.template, recipe.ending
        self.reader = Reader(recipe.columns, recipe.repair, handler=recipe.handler, infill=recipe.template.infill)
        self.words = self.template.headings
        self.tails = {role: pattern.tail.strip() for role, pattern in self.template.patterns.items()}
        given = recipe.columns.given
        # columns that a row needs
        self.needed = {*map(squashed, (*MESSAGES, *PROMPTS, *RESPONSES, *TEXTS))} - {*map(squashed, MATERIALS)}
        self.needed |= {squashed(given[part]) for part in ("prompt", "response", "messages", "text") if given.get(part)}
        self.quick = FastPath(self.template, self.ending, recipe.columns, recipe.handler)
        if recipe.expand or recipe.mask_history or recipe.convert:  # these look at single turns
            self.quick.columns = ()

    def block(self, block: Block) -> EncodedBlock:
        """Encode a block."""
        counts: Counter[str] = Counter()
        rejects: list[Reject] = []
        places: dict[str, list[Place]] = {}
        drafts: list[PendingRow] = []
        repair = self.recipe.repair

        def note(what: str, line: int, words: str = "") -> None:
            places.setdefault(what, []).append(Place(block.file, line, words))

        quick, schemas, row = self.quick.conversation, [], -1
        self.reader.padded = block.file.endswith((".parquet", ".arrow", ".feather"))
        unused: Counter[tuple[str, str]] = Counter()
        faults: set[str] = set()
        for row, (line, item, keys) in enumerate(with_keys(block)):
            hint, content = "", item
            try:
                content = parse(item, faults, keys)
                if faults:
                    fault = faults.pop()
                    counts[f"fault: {fault}"] += 1
                    note(f"fault: {fault}", line)
                    hint = (
                        " (the row holds NaN, or a number that is too large, which JSON does not have: it counts as null)"
                        * (fault == "nan")
                    )
                if type(content) is TableRow:
                    hint = self.empty_cells(content, line, counts, note)
                # what was read as cp1252 holds letters from À to ÿ, which are C3 and another byte: rows without one need no
                # repair. (A row in ASCII may hold them as \u00e9; no writer does both.)
                look_closely = repair and (type(item) is not bytes or item.isascii() or b"\xc3" in item)
                if plain := quick(content, look_closely):
                    schemas.append(plain[0])
                    drafts.append(PendingRow(row, line, plain[1], item))
                else:
                    self.reader.repair = look_closely
                    drafts += self.drafts(row, line, content, counts, note)
                    unused.update(self.reader.unused)
            except RowError as error:
                if error.reason == COMMENT:
                    counts[f"dropped: {COMMENT}"] += 1
                    note("dropped", line, COMMENT)
                    continue
                counts[f"rejected: {error.reason}"] += 1
                rejects.append(Reject(block.file, line, error.reason, error.message + hint, beginning(item)))
                names = set(self.recipe.columns.named) - self.reader.seen
                self.reader.seen.update(name for name in names if occurs(content, name))
        counts["read"] = row + 1
        for schema, rows in Counter(schemas).items():
            counts[f"schema: {schema}"] += rows
        made = self.encoded(drafts, block, counts, rejects, note)
        sizes = np.diff(made.first).astype(np.int32)
        hashes = hashes_of(made.ids, sizes)
        return EncodedBlock(
            made.ids, made.roles, sizes, hashes, documents_of(hashes, made.rows), made.lines, counts, made.scripts,
            block.file, block.read, rejects, places, frozenset(self.reader.seen), unused, block.held_out, block.notes,
        )  # fmt: skip

    def empty_cells(self, row: dict[str, Any], line: int, counts: Counter[str], note) -> str:
        """Make cells empty in which pandas wrote that they are.

        Texts in a column that a row needs stay (an answer may be None). Returns what to add to an error of a row that
        needs such a cell.
        """
        hint = ""
        for name, cell in row.items():
            if type(cell) is str and cell in MISSING:
                if cell in MAY_BE_TEXT and squashed(name) in self.needed:
                    counts["fault: None"] += 1
                    note("fault: None", line, f"{name}: {cell}")
                else:
                    row[name] = None
                    counts["fault: empty"] += 1
                    note("fault: empty", line, f"{name}: {cell}")
                    if squashed(name) in self.needed:
                        hint = f" (the cell holds {cell}, which counts as empty)"
        return hint

    def drafts(self, number: int, line: int, row: Row, counts: Counter[str], note) -> list[PendingRow]:
        """The texts that a row gives: one, or one for every answer with EXPAND."""
        schema, dialogue = self.reader.read(row)
        for verdict in self.reader.verdicts:
            counts[verdict] += 1
            note(verdict, line)
        counts[f"schema: {schema}"] += 1
        if self.recipe.convert:
            texts, changed = (
                foreign_headings.convert_text(dialogue, self.words)
                if isinstance(dialogue, str)
                else foreign_headings.convert_dialogue(dialogue)
            )
            for what in changed:
                counts[f"converted: {what}"] += 1
            dialogue = texts if isinstance(texts, Dialogue) else texts[0]
            if isinstance(texts, list) and len(texts) > 1:
                counts["documents made of others"] += len(texts) - 1
                return [draft for one in texts for draft in self.drafts_of(number, line, schema, one, counts, note)]
        return self.drafts_of(number, line, schema, dialogue, counts, note)

    def drafts_of(
        self, number: int, line: int, schema: str, dialogue: Dialogue | str, counts: Counter[str], note
    ) -> list[PendingRow]:
        """The same for what a row was read as, or one of several documents in it."""
        if isinstance(dialogue, str):
            return self.text_drafts(number, line, dialogue, note)
        self.check_writable(schema, dialogue)
        messages = dialogue.messages
        counts["tools"] += bool(dialogue.tools)
        if not (self.recipe.expand or self.recipe.mask_history):
            return [PendingRow(number, line, Pieces(*self.template.render(dialogue, self.ending)), dialogue)]
        answers = [i for i, m in enumerate(messages) if m.role is Role.ASSISTANT]
        if self.recipe.expand:
            # the same question many times, with one answer more to learn each time
            whole = dialogue
            several = [
                dataclasses.replace(whole, messages=learn_only(messages[: i + 1], i))
                for i in answers
                if messages[i].learn
            ]
        else:
            several = [dataclasses.replace(dialogue, messages=learn_only(messages, answers[-1]))]
        if not several:
            counts[f"dropped: {NOTHING_TO_LEARN}"] += 1
            note("dropped", line, NOTHING_TO_LEARN)
        return [PendingRow(number, line, Pieces(*self.template.render(d, self.ending)), d) for d in several]

    def check_writable(self, schema: str, dialogue: Dialogue) -> None:
        """RowError for a dialogue that this template cannot write."""
        template = self.template
        if word := template.find_reserved(dialogue):
            raise RowError(
                f"holds {word}",
                f"holds {word}, which is a border in PROMPT_TYPE={template.name}: write another sign, or take another template",
            )
        if template.infill and ([m.role for m in dialogue.messages] != [Role.USER, Role.ASSISTANT] or dialogue.tools):
            raise RowError(
                "not for infilling",
                f"is a conversation, and PROMPT_TYPE={template.name} writes a prefix, a suffix and the middle between them",
            )
        if schema == INFILLING and not template.infill:
            raise RowError(
                "for infilling",
                f"has prefix, suffix and middle, which PROMPT_TYPE={template.name} cannot write; take rwkv-g1-fim",
            )

    def text_drafts(self, number: int, line: int, text: str, note) -> list[PendingRow]:
        """A ready text is taken as it is; only its end is made, and which of its answers are to be learnt."""
        data = text.encode("utf-8")
        spans = spans_of_text(data, self.words)
        heading = overlooked_heading(data, spans, self.words)
        if heading and not any(one.kind == "headings" for one in foreign_headings.look_at_text(text, self.words)):
            note("overlooked", line, heading)
        if text.isascii():
            texts = [text[span.start : span.end] for span in spans]
        else:
            texts = [data[span.start : span.end].decode("utf-8") for span in spans]
        end = self.ending.answer + self.ending.last
        roles = [span.role for span in spans]
        answers = [i for i, role in enumerate(roles) if role is Role.ASSISTANT]
        if any("\n\n" in texts[i].strip() for i in answers):  # no client may stop at a blank line then
            note("blank lines", line)
        if not answers or not (self.recipe.expand or self.recipe.mask_history):
            several = [(texts, roles)]
        else:
            ends = [i + 1 for i in answers] if self.recipe.expand else [len(texts)]
            several = [(texts[:e], [Role.UNTRAINED if i in answers and i < answers[-1] and i < e - 1 else role
                                    for i, role in enumerate(roles[:e])]) for e in ends]  # fmt: skip
        drafts = []
        for some, said in several:
            some = list(some)
            separator = "\n\n" if some[-1].endswith("\n\n") else self.template.format_separator
            some[-1] = some[-1].removesuffix(separator if len(some) < len(texts) else end) + end
            drafts.append(PendingRow(number, line, Pieces(some, said), None))
        return drafts

    def encoded(self, drafts: list[PendingRow], block: Block, counts, rejects, note) -> Rows:
        """The rows to write, within all limits; counts and notes what is left out."""
        token, limits, bos = self.ending.token, self.recipe.limits, self.recipe.bos
        try:
            encoded_rows = encode_rows([d.pieces for d in drafts], token, bos) if drafts else NO_ROWS
        except RowError:  # one of them cannot be encoded: find it, and do without
            bad = set()
            for draft in drafts:
                try:
                    if draft.row not in bad:
                        encode_row(draft.pieces, token)
                except RowError as error:
                    bad.add(draft.row)
                    counts[f"rejected: {error.reason}"] += 1
                    rejects.append(Reject(block.file, draft.line, error.reason, error.message, ""))
            drafts = [d for d in drafts if d.row not in bad]
            encoded_rows = encode_rows([d.pieces for d in drafts], token, bos) if drafts else NO_ROWS
        looked: set[tuple[int, str]] = set()
        for i in encoded_rows.suspects.tolist():
            self.look(drafts[i], block.file, counts, note, looked)
        # with EXPAND a row is there several times, each with one answer to learn, and its system text every time
        counts["turns"] = encoded_rows.turns - encoded_rows.untrained if self.recipe.expand else encoded_rows.turns
        counts["system"] = (
            len({d.row for d in drafts if Role.SYSTEM in d.pieces.roles})
            if self.recipe.expand
            else encoded_rows.systems
        )
        lines = np.array([d.line for d in drafts], dtype=np.int64)
        rows = np.array([d.row for d in drafts], dtype=np.int64)
        trouble = ~encoded_rows.answered & np.array([d.source is not None for d in drafts], dtype=bool)
        if limits.max_tokens:
            trouble |= np.diff(encoded_rows.first) > limits.max_tokens
        long_turns = self.long_turns(drafts, encoded_rows.pieces)
        trouble[list(long_turns)] = True
        # rows without trouble are taken over in runs, the others one by one
        ids, roles, sizes, places, kept, learnt, begin = [], [], [], [], [], [], 0
        lost: dict[int, tuple[int, str, str]] = {}  # row -> its line, why, and how long it is
        for i in [*np.flatnonzero(trouble).tolist(), len(drafts)]:
            a, b = encoded_rows.first[begin], encoded_rows.first[i]
            ids.append(encoded_rows.ids[a:b])
            roles.append(encoded_rows.roles[a:b])
            sizes.append(np.diff(encoded_rows.first[begin : i + 1]))
            places.append(lines[begin:i])
            kept.append(rows[begin:i])
            learnt.append(rows[begin:i][encoded_rows.answered[begin:i]])
            begin = i + 1
            if i == len(drafts):
                break
            tokens = Tokens(
                encoded_rows.ids[b : encoded_rows.first[i + 1]], encoded_rows.roles[b : encoded_rows.first[i + 1]]
            )
            for cut in self.within_limits(drafts[i], tokens, i in long_turns, counts, lost, note):
                ids.append(cut.ids)
                roles.append(cut.roles)
                sizes.append(np.array([len(cut.ids)]))
                places.append(lines[i : i + 1])
                kept.append(rows[i : i + 1])
                if (cut.roles == Role.ASSISTANT).any():
                    learnt.append(rows[i : i + 1])
        made = Rows(
            np.concatenate(ids), np.concatenate(roles), np.append(0, np.cumsum(np.concatenate(sizes))),
            np.concatenate(places), np.concatenate(kept), encoded_rows.scripts,
        )  # fmt: skip
        # with EXPAND every answer of a row may go its own way: a row counts once, as kept if anything of it was
        written = set(made.rows.tolist())
        counts["kept"] += len(written)
        counts["with an answer"] += len(np.unique(np.concatenate(learnt)))
        left = set(lost) & written
        counts["rows that lost some of their answers"] += len(left)
        for row in sorted(set(lost) - left):
            line, reason, words = lost[row]
            counts[f"dropped: {reason}"] += 1
            note("dropped", line, words)
        return made

    def look(self, draft: PendingRow, file: str, counts, note, looked: set[tuple[int, str]]) -> None:
        """Note what a row holds that another tool has left in it; every kind once. looked: rows and kinds noted before."""
        texts, roles = draft.pieces
        if draft.source is None:
            findings = foreign_headings.look_at_text("".join(texts), self.words)
        else:
            said = [
                (role, text.strip(" \n\x17").removesuffix(self.tails.get(role, "")))
                for text, role in zip(texts, roles, strict=True)
                if role is not Role.HEADING
            ]
            keeps = self.template.format_separator == "\n\n" and Role.ASSISTANT not in self.template.clean
            findings = foreign_headings.look_at_dialogue(said, keeps)
        for what, words, at in findings:
            if (draft.row, what) not in looked:
                looked.add((draft.row, what))
                counts[f"found: {what}"] += 1
                if self.recipe.convert and what == "headings" and draft.source is None:
                    why = foreign_headings.why_left("".join(texts).removesuffix(self.ending.answer + self.ending.last))
                    counts[f"left: {why}"] += 1
                # a text of its own is read from a file as it is there; elsewhere a row is a line
                inside = "".join(texts).count("\n", 0, at) if ".txt" in file and draft.source is None else 0
                note(what, draft.line + inside, words)

    def long_turns(self, drafts: list[PendingRow], counts: np.ndarray) -> set[int]:
        """Which drafts have a turn above its limit. counts: tokens that begin in each piece of all drafts."""
        limits = self.recipe.limits
        if not (limits.source or limits.target):
            return set()
        ends = np.cumsum([len(d.pieces.texts) for d in drafts]).tolist()
        return {
            i
            for i, (d, end) in enumerate(zip(drafts, ends, strict=True))
            if d.source is not None
            and not within_turns(d.pieces, counts[end - len(d.pieces.texts) : end].tolist(), self.ending.token, limits)
        }

    def dialogue_of(self, draft: PendingRow) -> Dialogue:
        """Return the dialogue that a row was rendered from; parse the row again if it was not kept."""
        if isinstance(draft.source, Dialogue):
            return draft.source
        assert draft.source is not None, "a ready text has no turns"
        dialogue = self.reader.read(parse(draft.source))[1]
        assert isinstance(dialogue, Dialogue)
        return dialogue

    def within_limits(self, draft: PendingRow, tokens: Tokens, long_turn: bool, counts, lost, note) -> list[Tokens]:
        """A row that breaks a limit, or has nothing to learn, as the policy wants it; none if it is to be left out."""
        limits = self.recipe.limits
        try:
            first = Cut(tokens)
            if long_turn:
                first = cut_turns(self.template, self.dialogue_of(draft), self.ending, limits)
                first = first._replace(tokens=with_bos(first.tokens)) if self.recipe.bos else first
            cuts = self.cut_row(first.tokens) if limits.max_tokens else [first]
            cuts[-1] = cuts[-1]._replace(end=cuts[-1].end or first.end)
        except TooLong as why:
            lost.setdefault(draft.row, (draft.line, f"longer than {why}", f"{len(tokens.ids):,} tokens"))
            return []
        if draft.source is not None:
            learnt = [cut for cut in cuts if (cut.tokens.roles == Role.ASSISTANT).any()]
            if not learnt:
                lost.setdefault(draft.row, (draft.line, NOTHING_TO_LEARN, NOTHING_TO_LEARN))
            else:
                counts["pieces without an answer"] += len(cuts) - len(learnt)
            cuts = learnt
        if cuts and (long_turn or len(tokens.ids) > limits.max_tokens > 0):
            counts["cut rows"] += 1
            counts["turns cut off"] += first.turns
            # what is learnt last: of a row that ends in a question, the answers are whole
            if cuts[-1].end and cuts[-1].tokens.roles[-1] in (Role.ASSISTANT, Role.TEXT):
                counts["cut off"] += 1
                note("cut off", draft.line)
        return [cut.tokens for cut in cuts]

    def cut_row(self, tokens: Tokens) -> list[Cut]:
        """limits.cut_row, where the token 0 before a row stays before everything that the row becomes."""
        limits = self.recipe.limits
        if not self.recipe.bos or len(tokens.ids) <= limits.max_tokens:
            return cut_row(tokens, limits)
        if limits.max_tokens == 1:  # nothing would be left beside it
            raise TooLong("MAX_TOKENS")
        body, rest = Tokens(tokens.ids[1:], tokens.roles[1:]), limits.max_tokens - 1
        cuts = cut_row(body, dataclasses.replace(limits, max_tokens=rest))
        return [cut._replace(tokens=with_bos(cut.tokens)) for cut in cuts]


def learn_only(messages, which: int):
    """The messages with only answer `which` to be learnt, if it was at all."""
    return tuple(
        m._replace(learn=m.learn and i == which) if m.role is Role.ASSISTANT else m for i, m in enumerate(messages)
    )


def beginning(item: Any) -> str:
    """The first characters of a row that cannot be used, for the file of rejects."""
    if isinstance(item, RowError):
        return ""
    text = item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
    return text[:RAW_LIMIT]


def documents_of(hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One hash for all that was made of the same row, uint64 [written]: equal rows have equal ones."""
    if not len(rows):
        return hashes
    begins = np.flatnonzero(np.append(True, rows[1:] != rows[:-1]))
    return np.repeat(np.add.reduceat(hashes, begins), np.diff(np.append(begins, len(rows))))


def hashes_of(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every row's tokens, uint64 [rows]: equal rows have equal ones, in every process."""
    data, hashes, at = ids.astype("<u2", copy=False).tobytes(), [], 0
    for size in sizes.tolist():
        hashes.append(hashlib.blake2b(data[2 * at : 2 * (at + size)], digest_size=8).digest())
        at += size
    return np.frombuffer(b"".join(hashes), "<u8")
