"""Values of rows -> text, and the reasoning in an answer apart from the answer itself."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_peft.text.template import END_OF_THINK, THINK, tidy_answer


class RowError(Exception):
    """Why a row cannot be used. reason: a few words that are counted; the message: a sentence about this row."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both, so that it survives the way between processes
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


class TableRow(dict):
    """A row of a table whose cells are text: an empty cell may hold a word for it, like nan."""


def is_nothing(value: Any) -> bool:
    """Whether a value says nothing: null, NaN (an empty cell of a table), "", blanks, an empty list or object."""
    if value is None or value == "" or value == [] or value == {}:
        return True
    return value.isspace() if isinstance(value, str) else isinstance(value, float) and math.isnan(value)


def as_text(value: Any) -> str:
    """Return a value as text.

    A string is itself; a number, true, false, an object or a list is what JSON writes for it (a date: its ISO form;
    bytes: their
    UTF-8 text).
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise RowError("not UTF-8", "holds bytes that are no UTF-8 text") from None
    return json.dumps(value, ensure_ascii=False, default=str)


def without_padding(value: Any) -> Any:
    """A value without the nulls that Arrow puts where an object lacks a field that others have."""
    if isinstance(value, dict):
        return {key: without_padding(v) for key, v in value.items() if v is not None}
    return [without_padding(v) for v in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    """Return what a value is, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null",
             bytes: "bytes that are no UTF-8 text"}  # fmt: skip
    return names.get(type(value), "a number")


def short(value: Any, most: int = 40) -> str:
    """A value for a message."""
    text = as_text(value) if not isinstance(value, bytes) else repr(value)
    return repr(text if len(text) <= most else text[: most - 3] + "...")


# tags that data sets put around a thought: what opens and what closes it. The last group are words of other markup too; they
# count at the start of an answer, and where one closes that was never opened
OTHER_TAGS = "thinking|thought|reasoning|reason|scratch_?pad|inner_?(?:thoughts?|monologue)|思考|思考过程"
OPENING = re.compile(
    r"<\s*think\s*>|<seed:think>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\s*(" + OTHER_TAGS + r")\s*>",
    re.I,
)
CLOSING = re.compile(
    r"<\s*/\s*think\s*>|</seed:think>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\s*/\s*(" + OTHER_TAGS + r")\s*>",
    re.I,
)
SOLUTION = re.compile(r"\s*<\|begin_of_solution\|>(?P<words>.*?)(?:<\|end_of_solution\|>)?\s*\Z", re.DOTALL)
# all of an answer behind a thought between two tags
WRAPPED = re.compile(
    r"\s*<(?P<tag>output|answer|response|final_?answer|回答|答案)>(?P<words>(?:(?!</?(?P=tag)>).)*)</(?P=tag)>\s*\Z",
    re.DOTALL | re.I,
)
CHANNEL = re.compile(r"<\|channel\|>\s*(?:analysis|final|commentary)")
MOST_TAGS = 50  # in an answer; one that writes about tags quotes a few
TICKS = re.compile(r"`+")
MARKS = re.compile(r"`+|^[ \t>]*~{3,}", re.M)  # of code
MOST_MARKS = 32  # in a row; more are an ornament
CLOSING_MARKS = [
    re.compile(rf"(?<!`)`{{{size}}}(?!`)|$", re.M) for size in range(MOST_MARKS + 1)
]  # in this line, or ""
INFO = re.compile(r"\w")  # a word right behind a fence


def split_reasoning(answer: str) -> tuple[str, str]:
    """The thought of an answer, and the answer: <think>...</think> at its start, or the tags of other models.

    A closing tag without an opening one is repaired (DeepSeek's template gives the opening tag to the model, so its answers
    lack it). RowError where a thought never ends, or tags can be read in more than one way.
    """
    if not wants_a_look(answer):
        return "", answer
    if CHANNEL.search(answer):
        raise RowError(
            "reasoning", "has the channels of gpt-oss (<|channel|>) in its text; put thought and answer into keys"
        )
    if solution := SOLUTION.match(answer):
        answer = solution["words"].strip()
    starts = OPENING.match(answer.lstrip())
    begin = len(answer) - len(answer.lstrip()) + starts.end() if starts else 0
    tags = [list(itertools.islice(pattern.finditer(answer, begin), MOST_TAGS + 1)) for pattern in (OPENING, CLOSING)]
    if max(map(len, tags)) > MOST_TAGS:
        raise RowError("reasoning", f"has more than {MOST_TAGS} tags of thoughts in one answer")
    code = code_of(answer, begin) if any(tags) else ()
    opened, closed = ([tag for tag in some if not in_code(code, tag.start())] for some in tags)
    lone = tags[1][0] if not closed and len(tags[1]) == 1 else None
    if lone and (starts or alone_on_its_line(answer, lone)) and fence_stays_open(answer, begin, lone, bool(starts)):
        closed = [lone]
    if not starts:
        # words that other markup has too count where one closes that was never opened
        names = {(match[1] or "").lower() for match in opened}
        closed = [match for match in closed if not (match[1] and match[1].lower() in names)]
        opened = [match for match in opened if not match[1]]
    elif starts[1]:
        closed = [match for match in closed if (match[1] or "").lower() == starts[1].lower()]
        opened = [match for match in opened if (match[1] or "").lower() == starts[1].lower()]
    else:
        opened, closed = [f for f in opened if not f[1]], [f for f in closed if not f[1]]
    many = bool(starts) + len(opened)
    if not many and not closed:
        return "", answer
    if many > 1 or len(closed) > 1:
        raise RowError(
            "reasoning", f"has {many} {THINK} and {len(closed)} {END_OF_THINK} in one answer; one of each can be used"
        )
    if not closed:
        raise RowError("reasoning", f"has a thought that never ends: there is {THINK}, but no {END_OF_THINK}")
    if opened:
        raise RowError(
            "reasoning",
            f"has {THINK} in the middle of an answer; a thought must come first. (A tag that is only spoken of belongs "
            "between `backticks`)",
        )
    words = unwrapped(answer[closed[0].end() :])
    thought = answer[begin : closed[0].start()].strip()
    # (what follows a prompt that ends with "<think")
    return thought.removeprefix(">").lstrip() if not starts else thought, tidy_answer(words)


def alone_on_its_line(text: str, tag: re.Match) -> bool:
    """Return whether a tag is alone on its line."""
    before, behind = text[: tag.start()].rpartition("\n")[2], text[tag.end() :].partition("\n")[0]
    return not before.strip() and not behind.strip()


FENCE = re.compile(r"(?:`{3,}|^[ \t>]*~{3,})(?P<word>[ ]?\w)?", re.M)


def fence_stays_open(text: str, begin: int, tag: re.Match, starts: bool) -> bool:
    """Return whether the code fence before a closing tag was never closed: none follows, or one that opens another.

    starts: a thought was opened, so the tag ends it where some fence is open at the end.

    Raises:
        RowError: neither is clear.
    """
    behind = FENCE.search(text, tag.end())
    if not behind or behind["word"]:
        return True
    if len(FENCE.findall(text, begin)) % 2 == 0:
        return False
    if not starts:
        raise RowError(
            "reasoning",
            f"has {END_OF_THINK} among fences of code (```), one of which is never closed: nothing tells its place",
        )
    return True


def code_of(text: str, begin: int = 0) -> list[tuple[int, int]]:
    """Return where a text quotes code, from `begin` on.

    That is between two equal runs of backticks in one line, and inside fences: of three backticks or more (to the end where
    nothing closes them), or of three tildes or more that are closed.
    """
    spans: list[tuple[int, int]] = []
    fences: list[str] = []  # that are open: one with a word behind it opens another
    start, past, never_closed = 0, begin, MOST_MARKS + 1
    for run in (MARKS if "~~~" in text else TICKS).finditer(text, begin):
        mark = run[0].lstrip(" \t>")
        size = len(mark)
        if run.start() < past or size > MOST_MARKS:
            continue
        if fences:
            if mark.startswith(fences[-1]):
                fences.append(mark) if INFO.match(text, run.end()) else fences.pop()
                if not fences:
                    spans.append((start, run.end()))
            continue
        start = run.end()
        if mark[0] == "~":
            if size < never_closed and re.compile(rf"^[ \t>]*~{{{size},}}[ \t]*$", re.M).search(text, start):
                fences.append(mark)
            else:
                never_closed = min(size, never_closed)
        elif (closing := CLOSING_MARKS[size].search(text, start)) and closing[0]:
            past = closing.end()
            spans.append((start, past))
        elif size > 2:
            fences.append(mark)
    return [*spans, (start, len(text))] if fences else spans


def in_code(code: Sequence[tuple[int, int]], at: int) -> bool:
    """Whether a place is in one of these parts of a text."""
    before = bisect.bisect(code, (at + 1,))
    return before > 0 and at < code[before - 1][1]


# what a key of reasoning says where it is a switch, and no thought
SWITCH_WORDS = (
    "on off yes no true false none null n/a 0 1 minimal low medium high xhigh max auto default enabled disabled enable disable "
    "think no_think /think /no_think nothink "
    "是 否 开 关 无 开启 关闭 低 中 高"
)
SWITCH_PHRASES = ("detailed thinking on", "detailed thinking off", "thinking on", "thinking off")
SWITCHES = frozenset((*SWITCH_WORDS.split(), *SWITCH_PHRASES))


def is_switch(value: Any) -> bool:
    """Whether the value of a key of reasoning only says that there is some, or how much: true, "off", {"effort": "high"}."""
    if isinstance(value, str):
        return len(value) < 32 and value.strip().lower() in SWITCHES
    if isinstance(value, dict):
        return "effort" in value or is_switch(value.get("type"))
    return isinstance(value, bool | int | float)


def thoughts_in(one: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of reasoning that hold a thought. Those that are a switch are reported as not used."""
    return tuple(name for name in names if not is_switch(one[name])) if names else names


def unwrapped(words: str) -> str:
    """The words of an answer behind a thought, without the tags that are around all of them."""
    whole = SOLUTION.match(words) or WRAPPED.match(words)
    return whole["words"] if whole else words


def bare_thought(thought: str) -> str:
    """Return a thought from a key of its own, without the tags that may be around it."""
    if not wants_a_look(thought):
        return thought
    text = thought.strip()
    if opening := OPENING.match(text):
        text = text[opening.end() :]
    if closing := list(CLOSING.finditer(text)):
        if text[closing[-1].end() :].strip():
            raise RowError("reasoning", f"has {END_OF_THINK} inside the thought that stands in a key of its own")
        text = text[: closing[-1].start()]
    return text.strip()


# a picture, sound or film belongs here in data for models that can see or hear
PLACEHOLDER = re.compile(
    r"<(image|video|audio|img|speech)>(?!.*</\1>)|<\|(?:image|video|audio|vision|img)\w*\|>|<(?:image|img|video|audio)[ _]?\d+>"
    r"|<image>\./</image>"
    r"|<image_(?:placeholder|token|soft_token|pad)>|<im_patch>|<start_of_image>|<ImageHere>|<img>[^<\n]{1,300}</img>"
    r"|\[IMG\](?!.*\[/IMG\])|!\[[^\]\n]{0,300}\]\(data:image/"
    # alone on its line, as chat programs write it
    r"|^[ \t]*[\[【](?:image|photo|picture|video|audio|图片|视频|语音|音频)[\]】][ \t]*$",
    re.DOTALL | re.I | re.M,
)
# how every such tag and placeholder begins
SUSPECT = re.compile(
    r"[<\[(](?:\|?\s*/?\s*(?:thi|tho|rea|思|ima|img|im_|vid|aud|vis|spe|see|sta|beg|end|cha)|data:image|\{\s*\"type)|<\s*/?\s*(?:scratch|inner|tool|functioncall)|[\[【](?:图|视|语|音)",
    re.IGNORECASE,
)
QUOTED = re.compile(r"^[ \t>]*(`{3,32}|~{3,32}).*?^[ \t>]*\1|`[^`]*`|```.*?```", re.DOTALL | re.M)


# what names or holds a picture, sound or film
MEDIUM = re.compile(
    r"\.(?:png|jpe?g|gif|webp|bmp|tiff?|svg|wav|mp3|flac|ogg|m4a|mp4|avi|mov|mkv|webm|npy|pt)\b|^https?://|^data:|[/\\]"
    r"|^[\w+/=\s]{100,}$",
    re.IGNORECASE,
)


def is_medium(value: Any, named: bool = False) -> bool:
    """Return whether a column of pictures, sounds or films has one.

    That is a list, an object, bytes, a path, an address; not a word about it. named: the column is called a path or a file,
    whatever it has.
    """
    if isinstance(value, str):
        empty = is_nothing(value) or value.strip().lower() in ("n/a", "[]", "nan", "none", "null", "no", "false")
        return not empty and (named or MEDIUM.search(value) is not None)
    return isinstance(value, list | dict | bytes) and not is_nothing(value)


NOT_TEXT = "the row needs a picture, sound or film, and only text can be trained"


def wants_a_look(text: str) -> bool:
    """Whether a text may hold reasoning or a placeholder; quick, for texts that have neither."""
    return ("<" in text or "[" in text) and SUSPECT.search(text) is not None or "◁" in text


def check_text_only(text: str, where: str) -> None:
    """RowError if a text has a placeholder for something that is no text, outside quoted code."""
    if wants_a_look(text) and (
        hit := PLACEHOLDER.search(QUOTED.sub("", text) if "`" in text or "~~~" in text else text)
    ):
        raise RowError("not text", f"{where} has the placeholder {hit[0][:20]}: {NOT_TEXT}")
