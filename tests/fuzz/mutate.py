"""Changes to inputs that know the format: bytes, lines, JSON, zip. Every function gives the same for the same random
numbers."""

from __future__ import annotations

import copy
import io
import json
import random as randoms
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

EDGES = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
TEXTS = (
    "", " ", "\n", "\r\n", "\0", "\t", "\ufeff", "\ufffd", "\u2028", "\x1b[2J", "\x7f", "\x85", "NaN", "null", "true",
    "-1", "1e999", "{{content}}", "User: a\n\nAssistant: b", "<think>\n</think>", "\\n", "../../x", "/etc/passwd",
    "<|im_end|>", "\u4f60\u597d", "\ud800", "\U0001f600", "e\u0301", "{}", "[]", "[[", '{"a": 1}', "a" * 300, "`id`",
    "$(id)", "%s", "\x17",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63) - 1, 10**40, float("nan"), float("inf"))
DEEP = "\x01DEEP"  # a text that becomes brackets within brackets
MOST_NODES = 3000


def of_bytes(data: bytes, random: randoms.Random, other: bytes = b"", words: Sequence[bytes] = ()) -> bytes:
    """One to five small changes that know nothing of the format."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3, 5))):
        at = random.randrange(len(made) + 1)
        end = min(len(made), at + random.choice((1, 1, 2, 4, 8, 30, 300)))
        what = random.randrange(11)
        if what == 0 and at < len(made):
            made[at] ^= 1 << random.randrange(8)
        elif what == 1 and at < len(made):
            made[at] = random.choice(
                (0, 1, 9, 10, 13, 32, 34, 39, 44, 58, 91, 92, 93, 123, 125, 127, 128, 255, random.randrange(256))
            )
        elif what == 2:
            del made[at:end]
        elif what == 3:
            made[at:at] = made[at:end]
        elif what == 4 and other:
            begin = random.randrange(len(other))
            made[at:end] = other[begin : begin + random.choice((1, 4, 16, 64, 400))]
        elif what == 5:
            form = random.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
            number = random.choice(EDGES) & ((1 << (8 * struct.calcsize(form))) - 1)
            made[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif what in (6, 7) and words:
            word = random.choice(words)
            made[at : at + random.choice((0, 0, len(word)))] = word
        elif what == 8:
            made[at:at] = random.choice(TEXTS).encode("utf-8", "surrogatepass")
        elif what == 9:
            made[at:at] = bytes(random.randrange(256) for _ in range(random.choice((1, 2, 5))))
        elif random.random() < 0.2:
            del made[at:]
        else:  # two parts change places
            a, b = sorted((at, random.randrange(len(made) + 1)))
            step = (b - a) // 2
            made[a : a + 2 * step] = made[a + step : a + 2 * step] + made[a : a + step]
    return bytes(made)


def of_lines(data: bytes, random: randoms.Random, other: bytes = b"", words: Sequence[bytes] = ()) -> bytes:
    """Lines that go, come twice, change places, are joined, or come from another input; else bytes."""
    if random.random() < 0.5:
        return of_bytes(data, random, other, words)
    lines = data.split(b"\n")
    at, to = random.randrange(len(lines)), random.randrange(len(lines))
    what = random.randrange(6)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(to, lines[at])
    elif what == 2:
        lines[at], lines[to] = lines[to], lines[at]
    elif what == 3:
        lines[at] += lines.pop(to) if at < to else b""
    elif what == 4 and other:
        lines[at] = random.choice(other.split(b"\n"))
    else:
        lines[at] = of_bytes(lines[at], random, other, words)
    return b"\n".join(lines)


def nodes_of(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value: its container and key."""
    result, waiting = [], [value]
    while waiting and len(result) < MOST_NODES:
        one = waiting.pop()
        inside = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, child in inside:
            result.append((one, key))
            if isinstance(child, (dict, list)):
                waiting.append(child)
    return result


def of_value(value: Any, random: randoms.Random, other: Any = None, names: Sequence[str] = ()) -> Any:
    """A JSON value with one to four places changed. other: another value, to take parts of. names: keys that mean
    something."""
    holder = [copy.deepcopy(value)]
    for _ in range(random.choice((1, 1, 2, 4))):
        where = nodes_of(holder)
        box, key = random.choice(where)
        old = box[key]
        what = random.randrange(14)
        if what == 0:
            box[key] = random.choice(TEXTS)
        elif what == 1:
            box[key] = random.choice(NUMBERS)
        elif what == 2:
            box[key] = random.choice((None, True, False, [], {}, [None], [[]], {"": ""}, [{}]))
        elif what == 3 and box is not holder:
            del box[key]
        elif what == 4 and isinstance(box, dict):
            fresh = random.choice(names) if names and random.random() < 0.8 else random.choice(TEXTS)
            box[fresh] = box.pop(key)
        elif what == 5 and isinstance(box, dict):
            box[random.choice(names) if names else "x"] = copy.deepcopy(old)
        elif what == 6 and isinstance(box, list):
            box.insert(random.randrange(len(box) + 1), copy.deepcopy(old))
        elif what == 7:
            box[key] = random.choice(([old], {"a": old}, [old, old], {random.choice(names) if names else "b": old}))
        elif what == 8:
            box[key] = DEEP * (random.random() < 0.3) or json.dumps(old, default=str)
        elif what == 9 and other is not None:
            there = nodes_of([other])
            container, name = random.choice(there)
            box[key] = copy.deepcopy(container[name])
        elif what == 10 and isinstance(old, str):
            box[key] = of_bytes(old.encode("utf-8", "replace"), random).decode(
                "utf-8", random.choice(("replace", "surrogateescape"))
            )
        elif what == 11 and isinstance(old, (int, float)) and abs(old) < 1e15:
            box[key] = random.choice((old + 1, old - 1, -old, old * 2, float(old), str(old), bool(old)))
        elif what == 12 and isinstance(old, str):
            at = random.randrange(len(old) + 1)
            box[key] = old[:at] + random.choice((*TEXTS, *names)) + old[at:]
        else:
            elsewhere, name = random.choice(where)
            if name in elsewhere if isinstance(elsewhere, dict) else name < len(elsewhere):
                box[key] = copy.deepcopy(elsewhere[name])
        if not isinstance(holder, list) or len(holder) != 1:
            return None
    return holder[0]


def dumped(value: Any, random: randoms.Random, **how: Any) -> bytes:
    """A value as JSON; what stands for brackets within brackets becomes that."""
    try:
        text = json.dumps(value, ensure_ascii=random.random() < 0.3, **how)
    except (RecursionError, ValueError):
        return b"[]"
    if (mark := json.dumps(DEEP)) in text:
        depth = random.choice((50, 200, 1500, 5000))
        begin, end = random.choice((("[", "]"), ('{"a":', "}"), ('[{"content":', "}]")))
        text = text.replace(mark, begin * depth + "1" + end * depth, 1)
    return text.encode("utf-8", "surrogatepass")


def of_json(data: bytes, random: randoms.Random, other: bytes = b"", names: Sequence[str] = (), **how: Any) -> bytes:
    """A JSON text with its structure changed, or its bytes."""
    if random.random() < 0.75:
        try:
            value = json.loads(data)
            try:
                second = json.loads(other)
            except (ValueError, RecursionError):
                second = None
            return dumped(of_value(value, random, second, names), random, **how)
        except (ValueError, RecursionError):
            pass
    return of_bytes(data, random, other, [json.dumps(name, ensure_ascii=False).encode() for name in names])


def of_json_lines(data: bytes, random: randoms.Random, other: bytes = b"", names: Sequence[str] = ()) -> bytes:
    """The same for one of the lines, or the lines."""
    if random.random() < 0.25:
        return of_lines(data, random, other)
    lines, others = data.split(b"\n"), other.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = of_json(lines[at], random, random.choice(others), names)
    return b"\n".join(lines)


Inner = Callable[[str, bytes, randoms.Random], bytes]


def members(data: bytes, most: int = 1 << 20) -> list[tuple[str, bytes, int]] | None:
    """Names, contents and methods of a zip file; None if it is none, or larger than `most`."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if sum(info.file_size for info in infos) > most:
                return None
            return [(info.filename, archive.read(info), info.compress_type) for info in infos]
    except Exception:  # whatever a broken zip file raises
        return None


def zipped(result: list[tuple[str, bytes, int]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content, method in result:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, content)
    return out.getvalue()


def of_zip(data: bytes, random: randoms.Random, other: bytes, inner: Inner) -> bytes:
    """A zip file with members changed by `inner`, renamed, taken away, put in twice or packed; or numbers of its
    directory."""
    result = members(data)
    if not result or random.random() < 0.1:
        return of_bytes(data, random, other)
    what, at = random.randrange(12), random.randrange(len(result))
    name, content, method = result[at]
    if what < 6:
        result[at] = name, inner(name, content, random), method
    elif what == 6:
        del result[at]
    elif what == 7:
        result.append((name, inner(name, content, random), method))
    elif what == 8:
        result[at] = (
            random.choice((result[random.randrange(len(result))][0], name + random.choice(TEXTS), "../" + name)),
            content,
            method,
        )
    elif what == 9:
        result[at] = (
            name,
            content,
            random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
        )
    elif what == 10 and (extra := members(other)):
        result[at] = name, random.choice(extra)[1], method
    try:
        made = bytearray(zipped(result))
    except (ValueError, UnicodeError, struct.error):
        return data
    if what == 11:  # a number in the directory, in the head of a member, or at the end
        mark, places = random.choice(((b"PK\1\2", range(4, 46)), (b"PK\3\4", range(4, 30)), (b"PK\5\6", range(4, 22))))
        starts = [i for i in range(len(made)) if made.startswith(mark, i)]
        begin = random.choice(starts) if starts else 0
        place = begin + random.choice(places)
        size = random.choice((1, 2, 4))
        made[place : place + size] = (random.choice(EDGES) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(made)


def grown(data: bytes, random: randoms.Random, size: int) -> bytes:
    """A part of an input many times."""
    if not data:
        return b""
    begin = random.randrange(len(data))
    if random.random() < 0.5:  # from a bound of words on
        begin = max(data.rfind(mark, 0, begin) for mark in (b"\n", b" ", b",", b'"', b"{")) + 1
    part = data[begin : begin + random.choice((1, 2, 5, 20, 80, 300))] or b"a"
    return data[:begin] + part * max(1, (size - len(data)) // len(part)) + data[begin:]
