"""Which encoding a text file is in, and its content as a stream of UTF-8.

UTF-8 is recognised by its own structure and passes through unchanged. UTF-16 and UTF-32 are recognised by a byte order mark or
by where their zero bytes are. For anything else chardet ranks the encodings, and the first one is taken only if its text is
plausible and clearly better than what the next plausible encoding would give; otherwise the file is refused with the
candidates. Thresholds and figures: bench/encodings.py.
"""

from __future__ import annotations

import codecs
import functools
import io
import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from rwkv_peft.common.formatting import did_you_mean

CHUNK = 1 << 18  # bytes that are looked at together
WINDOW = 1 << 14  # bytes of lines that are judged together
LISTED = 6  # candidates that are compared
WINDOWS = 6  # of them, spread over the file
ENOUGH = 256  # weight of UTF-8 characters after which a file with next to nothing else is UTF-8
SHARE = 8  # so many times the weight of what is not UTF-8
PARTIAL = 1 << 20  # bytes of one line that are decoded before its end is known
PIECE = 1 << 16  # bytes that are decoded together

# codec -> the name in messages
SHOWN = {
    "utf_16_le": "UTF-16", "utf_16_be": "UTF-16 (big endian)", "utf_32_le": "UTF-32", "utf_32_be": "UTF-32 (big endian)",
    "gb18030": "GB18030", "cp950": "Big5", "big5hkscs": "Big5-HKSCS", "cp932": "Shift-JIS", "euc_jp": "EUC-JP",
    "iso2022_jp": "ISO-2022-JP", "cp949": "EUC-KR (cp949)", "koi8_r": "KOI8-R", "koi8_u": "KOI8-U",
}  # fmt: skip
MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf_32_le"),
    (codecs.BOM_UTF32_BE, "utf_32_be"),
    (codecs.BOM_UTF8, ""),
    (codecs.BOM_UTF16_LE, "utf_16_le"),
    (codecs.BOM_UTF16_BE, "utf_16_be"),
)
# supersets, as today's programs write them, for the names that chardet gives
SUPERSETS = {
    "gb2312": ["gb18030"], "gbk": ["gb18030"], "gb18030": ["gb18030"], "big5": ["cp950", "big5hkscs"],
    "cp950": ["cp950", "big5hkscs"], "big5hkscs": ["cp950", "big5hkscs"], "euc_kr": ["cp949"], "cp949": ["cp949"],
    "shift_jis": ["cp932"], "cp932": ["cp932"], "shift_jis_2004": ["cp932"], "shift_jisx0213": ["cp932"],
    "euc_jp": ["euc_jp"], "euc_jis_2004": ["euc_jp"], "euc_jisx0213": ["euc_jp"],
    "iso8859_1": ["cp1252", "iso8859_1"], "iso8859_15": ["cp1252", "iso8859_15"], "iso8859_9": ["cp1254", "iso8859_9"],
    "iso8859_8": ["cp1255", "iso8859_8"], "iso8859_7": ["cp1253", "iso8859_7"], "iso8859_13": ["cp1257", "iso8859_13"],
    "iso8859_11": ["cp874"], "tis_620": ["cp874"], "iso2022_jp_2": ["iso2022_jp"],
}  # fmt: skip
DOUBLE = ("gb18030", "cp950", "big5hkscs", "cp932", "euc_jp", "cp949")  # two bytes a character
SINGLE = (
    "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874", "cp866",
    "koi8_r", "koi8_u", "iso8859_2", "iso8859_5", "iso8859_7", "iso8859_13", "iso8859_15", "mac_roman", "cp850", "cp852",
)  # fmt: skip
# these are never taken here, but a file that may be one of them is not taken for another one either
RIVALS = (
    "mac_latin2", "mac_cyrillic", "mac_greek", "mac_turkish", "cp437", "cp855", "cp857", "cp862", "cp737", "cp775", "cp864",
    "iso8859_1", "iso8859_6", "iso8859_8", "iso8859_9",
)  # fmt: skip
# an older encoding with the same letters in the same places. Its other characters would be odd ones in the newer encoding, so a
# text without odd ones is in the newer encoding
OLDER = {
    "cp1251": ("mac_cyrillic",), "cp1252": ("iso8859_15", "iso8859_1"), "cp1253": ("iso8859_7", "mac_greek"),
    "cp1254": ("iso8859_9", "mac_turkish"), "cp1255": ("iso8859_8",), "cp1257": ("iso8859_13",), "koi8_r": ("koi8_u",),
}  # fmt: skip
NAMES = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gbk", "gb18030", "gb2312", "big5", "cp950", "big5hkscs",
         "shift_jis", "cp932", "euc_jp", "iso2022_jp", "euc_kr", "cp949", "latin_1", "ascii",
         *SINGLE, "cp437")  # fmt: skip
NO_TEXT_CODECS = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape", "utf_7")
MARK = re.compile(b"\xff<([^<>]*)>\xff")  # what takes the place of bytes that the encoding of their file does not have


@dataclass(frozen=True)
class Encoding:
    """What a file is in. codec: Python's name, "" for UTF-8 as it is. skip: bytes of a byte order mark."""

    codec: str = ""
    skip: int = 0

    @property
    def shown(self) -> str:
        """The encoding's name for the user."""
        return SHOWN.get(self.codec, self.codec) or "UTF-8"


@dataclass(frozen=True)
class Unsure:
    """The encoding is not clear. candidates: (codec, a piece of the text in it), the likeliest first."""

    candidates: tuple[tuple[str, str], ...]
    lines: int  # that are not UTF-8


@dataclass(frozen=True)
class Binary:
    """No text at all. what: words for it, or ""."""

    what: str = ""


def check(name: str) -> str:
    """What is wrong with a name for ENCODING, or ""."""
    if name == "auto":
        return ""
    try:
        codec = codecs.lookup(name)
    except (LookupError, ValueError):
        ansi = name.lower() in ("ansi", "mbcs", "oem")
        meant = "; ANSI is cp1252 in the west, gbk in China." if ansi else did_you_mean(name, NAMES)
        return (
            f"is no encoding that Python knows{meant or '.'} Known are gb18030, big5, cp932, cp949, cp1252 and others"
        )
    # (the flag says whether a codec turns text into bytes; base64 and the like do not)
    if not getattr(codec, "_is_text_encoding", True) or codec.name.replace("-", "_") in NO_TEXT_CODECS:
        return "is not an encoding of text files; take one such as gb18030, big5, cp932, cp949, cp1252"
    return ""


def of_name(name: str, head: bytes) -> Encoding:
    """The encoding that the user has named, for a file that begins with `head`."""
    codec = codecs.lookup(name).name.replace("-", "_")
    if codec in ("utf_8", "utf_8_sig", "ascii"):
        return Encoding("", 3 if head.startswith(codecs.BOM_UTF8) else 0)
    if codec in ("utf_16", "utf_32"):
        wide = len(codec) - 2
        marked = next((m for m in MARKS if head.startswith(m[0]) and m[1].startswith(codec)), None)
        return Encoding(marked[1], len(marked[0])) if marked else Encoding(f"{codec[: wide + 2]}_le", 0)
    mark = next((m[0] for m in MARKS if m[1] == codec and head.startswith(m[0])), b"")
    return Encoding(codec, len(mark))


def decide(file: io.BufferedIOBase, whole: bool = True) -> Encoding | Unsure | Binary:
    """The encoding of a file. file: at its beginning; it is read as far as that takes, the longest for ASCII alone.

    whole: False where only the beginning is given.
    """
    chunk = file.read(CHUNK)
    for mark, codec in MARKS:
        if chunk.startswith(mark):
            return Encoding(codec, len(mark))
    if what := magic(chunk):
        return Binary(what)
    if codec := wide(chunk[:4096]):
        return Encoding(codec)
    counts, before = Counts(), b""  # the end of the last chunk, if what follows may belong to it
    while chunk:
        if chunk.isascii() and b"\x1b" not in chunk:
            counts.size += len(chunk)
            before = chunk
            chunk = file.read(CHUNK)
            continue
        if before:
            counts.size -= len(before) - cut(before)
            chunk = before[cut(before) :] + chunk
        following = file.read(CHUNK)
        end = cut(chunk) if following or not whole else len(chunk)
        counts.add(chunk[:end])
        if counts.is_utf8:
            return Encoding()
        before, chunk = chunk[end:], following
    return counts.verdict()


def cut(chunk: bytes) -> int:
    """Where to cut a chunk so that lines stay whole, or at least nothing but ASCII is behind the cut."""
    end = max(chunk.rfind(b"\n"), chunk.rfind(b"\r")) + 1
    return end or max(0, len(chunk) - 4)


def magic(head: bytes) -> str:
    """Return what a binary file is, as far as its first bytes show."""
    for begin, what in (
        (b"PK\x03\x04", "a ZIP file; an Excel table (.xlsx) is one: save it as CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0", "an old Office file (.xls, .doc); save it as CSV UTF-8 or as text"),
        (b"%PDF-", "a PDF"),
        (b"\x89PNG", "a picture"),
        (b"\xff\xd8\xff", "a picture"),
        (b"GIF8", "a picture"),
        (b"PAR1", "a parquet file; give it the ending .parquet"),
        (b"ARROW1", "an Arrow file; give it the ending .arrow"),
        (b"\x1f\x8b", "packed with gzip; give it the ending .gz"),
        (b"\x28\xb5\x2f\xfd", "packed with zstd; give it the ending .zst"),
        (b"SQLite format 3", "an SQLite database"),
        (b"\x7fELF", "a program"),
    ):
        if head.startswith(begin):
            return what
    return ""


def wide(head: bytes) -> str:
    """UTF-16 or UTF-32 without a byte order mark, or "". head: the first bytes of a file."""
    for size, codecs_of in ((4, ("utf_32_le", "utf_32_be")), (2, ("utf_16_le", "utf_16_be"))):
        some = head[: len(head) // size * size]
        if len(some) < 2 * size or (len(head) % size and len(head) < 4096):
            continue
        shares = [(read_share(some, codec), codec) for codec in codecs_of]
        best, codec = max(shares)
        zeros = some.count(0)
        # text has either zero bytes (Latin), or bytes that no text of one byte a character has (Chinese: below 20)
        odd = zeros or sum(some.count(b) for b in (*range(1, 9), *range(14, 27), 28, 29, 30, 31, 127))
        if best >= 0.97 and odd >= len(some) / 100 and min(shares)[0] < 0.9:
            return codec
    return ""


def read_share(data: bytes, codec: str) -> float:
    """The share of the characters that text is made of; 0 if the bytes do not decode."""
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        if error.start < len(data) - 4:
            return 0.0
        text = data[: error.start].decode(codec)  # half a surrogate pair at the cut
    usual = sum(
        c in "\t\n\r" or " " <= c <= "~" or "\xa0" <= c <= "\u05ff" or "\u3000" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fa5"
        or "\uac00" <= c <= "\ud7a3" or "\u2010" <= c <= "\u2026" or "\uff01" <= c <= "\uff5e" or "\u0600" <= c <= "\u06ff"
        or "\u0e01" <= c <= "\u0e5b" or "\u1ea0" <= c <= "\u1ef9" or c >= "\U0001f300"
        for c in text
    )  # fmt: skip
    return usual / max(len(text), 1)


@dataclass
class Counts:
    """What the lines of a file show about UTF-8, with samples of those that are not.

    The weight of a character is the number of its bytes after the first.
    """

    good: int = 0
    bad: int = 0
    sound: int = 0  # lines that are UTF-8 as a whole, and more than ASCII; at least
    lines: int = 0  # that are not
    size: int = 0  # bytes of all lines, and of those that are not UTF-8
    size_bad: int = 0
    stray: bool = True  # nothing but bytes that no text has
    escapes: bool = False
    controls: bool = False
    windows: list[bytes] = field(default_factory=list)
    stride: int = 1
    chunks: int = 0

    @property
    def is_utf8(self) -> bool:
        """Return whether the lines so far are UTF-8."""
        return self.good >= ENOUGH and self.good >= SHARE * self.bad

    @property
    def is_legacy(self) -> bool:
        """Return whether the lines so far are in another encoding."""
        return self.bad >= 8 * ENOUGH and self.bad > 3 * self.good

    def add(self, data: bytes) -> None:
        """Count some lines."""
        self.size += len(data)
        if data.isascii():
            if not self.escapes and b"\x1b$" in data:
                self.escapes = True
                self.windows.append(data[max(0, data.index(b"\x1b$") - 1000) :][:WINDOW])
            return
        try:
            self.good += len(data) - len(data.decode("utf-8"))
            self.sound += 1
            return
        except UnicodeDecodeError:
            pass
        self.chunks += 1
        if self.is_legacy and self.chunks % self.stride:
            return  # what is still wanted is a sample of every part of the file
        wrong = []
        for line in re.split(b"[\r\n]+", data):
            if line.isascii():
                continue
            good, bad = utf8_weights(line)
            self.good += good
            self.bad += bad
            if not bad:
                self.sound += is_utf8_line(line, "")
                continue
            self.lines += 1
            self.size_bad += len(line)
            self.stray = self.stray and not line.translate(None, NOT_STRAY) and not IN_WORD.search(line)
            wrong.append(around(line))
        for piece in parts(wrong):
            self.windows.append(piece)
            if len(self.windows) > WINDOWS:
                self.windows, self.stride = self.windows[::2], 2 * self.stride

    def verdict(self) -> Encoding | Unsure | Binary:
        """Return the encoding of all lines."""
        if not self.bad and self.escapes:
            return judged(self.windows, 0, ("iso2022_jp", "iso2022_kr"))
        if self.good >= self.bad:
            return Encoding()
        controls = sum(len(w.translate(None, PRINTED)) for w in self.windows)
        if controls * 100 > sum(map(len, self.windows)):
            return Binary()
        result = judged(self.windows, self.lines)
        damaged = self.lines <= FEW and self.size_bad <= 0.01 * self.size
        if isinstance(result, Unsure) and (damaged or self.stray):
            return Encoding()  # with damaged rows, which are rejected
        if (
            self.sound and isinstance(result, Encoding) and result.codec in SINGLE
        ):  # no accident there: two encodings in one file
            return Unsure(((result.codec, ranking(self.windows[0])[0].sample),), self.lines)
        return result


FEW = 10  # lines that are not UTF-8 among at least a hundred times as much ASCII are damaged, if nothing shows their encoding
STRAY = b"\xfe\xff"  # bytes that damage tests and broken files have, and no UTF-8
IN_WORD = re.compile(b"[A-Za-z][\xfe\xff]|[\xfe\xff][A-Za-z]")  # letters of Turkish and Icelandic, and spaces
NOT_STRAY = bytes(b for b in range(256) if b < 0x80 or b in STRAY)
PRINTED = bytes(b for b in range(256) if b >= 0x20 or b in b"\t\n\r\f\x1b\x1a")


def parts(lines: list[bytes]) -> Iterator[bytes]:
    """Samples from the beginning, the middle and the end; all of the lines if they are few."""
    sizes = list(itertools.accumulate(map(len, lines), initial=0))
    if sizes[-1] <= WINDOW:
        starts, most = [0], WINDOW
    else:
        starts, most = [0, sizes[-1] // 2 - WINDOW // 4, sizes[-1] - WINDOW // 2], WINDOW // 2
    for start in starts:
        some = [line for line, at in zip(lines, sizes, strict=False) if start <= at < start + most]
        if some:
            yield b"\n".join(some)


def around(line: bytes) -> bytes:
    """A line, or of a long one a part that begins and ends at a sign which is no half of a character in any encoding."""
    if len(line) <= WINDOW:
        return line
    first = next(m.start() for m in re.finditer(b"[^\x00-\x7f]", line))
    piece = line[max(0, first - 200) :][:WINDOW]
    begin = next((m.end() for m in re.finditer(rb'[ ",]', piece)), 0)
    return piece[begin : max(piece.rfind(mark) for mark in (b" ", b'"', b",")) + 1 or None]


def utf8_weights(line: bytes) -> tuple[int, int]:
    """The weight of the characters that are UTF-8, and the number of bytes that are not."""
    line, variants = VARIANTS.subn(b"", line)
    text = line.decode("utf-8", "ignore")
    kept = len(text.encode("utf-8"))
    return kept - len(text) + 2 * variants, len(line) - kept


# UTF-8 as Java and some data bases write it: surrogate pairs one by one, NUL in two bytes. It is refused row by row
VARIANTS = re.compile(b"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]|\xc0\x80")


def is_utf8_line(line: bytes, codec: str) -> bool:
    """Whether a line of a file in another encoding is UTF-8, and not by accident."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return len(line) - len(text) >= (6 if codec in DOUBLE else 1)


def judged(windows: list[bytes], lines: int, only: tuple[str, ...] = ()) -> Encoding | Unsure | Binary:
    """The one encoding that all windows are in; Unsure if there is none."""
    candidates = [decodable(window, only) if only else ranking_of_sound(window) for window in windows]
    sure = {codec for ranked in candidates if (codec := winner(ranked))}
    # (pieces of all of them, so that the sample is of the whole file)
    share = 2 * WINDOW // len(windows)
    whole = (
        candidates[0]
        if only or len(candidates) == 1
        else ranking_of_sound(b"\n".join(whole_lines(w, share) for w in windows))
    )
    codec = winner(whole)
    if codec and sure <= {codec} and (not lines or all(r and any(c.codec == codec for c in r) for r in candidates)):
        return Encoding(codec)
    seen: dict[str, str] = {}
    for one in sorted((one for ranked in [whole, *candidates] for one in ranked), key=lambda one: -one.score):
        if one.sample not in seen.values():
            # (most files outside ASCII are in cp1252, where it reads the same)
            same = one.codec in SINGLE and reread(one.sample, one.codec) == one.sample
            seen.setdefault("cp1252" if same else one.codec, one.sample)
    if not seen:  # chardet has no answer; whatever decodes may be it
        for codec in (*DOUBLE, "cp1252", "cp1251"):
            if (text := strict(windows[0], codec)) is not None and text.isprintable() | ("\n" in text):
                seen.setdefault(codec, sample_of(text))
    rows = list(seen.items())[:5]
    if not only and "cp1252" not in dict(rows) and (text := strict(windows[0], "cp1252")) and not CONTROL.search(text):
        rows[4:] = [("cp1252", sample_of(text))]
    return Unsure(tuple(rows), lines)


@dataclass(frozen=True)
class Candidate:
    """An encoding that the text may have."""

    codec: str
    score: float  # of chardet
    letters: int  # characters outside ASCII
    odd: int  # of them in a place where no text has them
    sample: str
    text: str = field(repr=False)


def reread(text: str, codec: str) -> str:
    """The bytes of a text as cp1252 reads them."""
    return text.encode(codec, "replace").decode("cp1252", "replace")


def decodable(data: bytes, names: tuple[str, ...]) -> list[Candidate]:
    """Return the first encoding that decodes the text, as a list; empty if none does."""
    for name in names:
        try:
            text = data.decode(name, "strict")
        except UnicodeDecodeError as error:
            if error.end < len(data) - 4:
                continue
            text = data[: error.start].decode(name)
        if not text.isascii():
            return [Candidate(name, 1.0, 99, 0, sample_of(text), text)]
    return []


def ranking(data: bytes) -> list[Candidate]:
    """The encodings in which these lines are plausible, the likeliest first, one for each way to read them."""
    import chardet

    candidates: list[Candidate] = []
    texts: set[str] = set()
    for one in chardet.detect_all(data, ignore_threshold=True):
        if not one["encoding"]:
            continue
        try:
            name = codecs.lookup(one["encoding"]).name.replace("-", "_")
        except LookupError:
            continue  # one that chardet knows and Python does not
        own = strict(data, name)
        for codec in SUPERSETS.get(name, [name]):
            if codec != name and own and not CONTROL.search(own) and strict(data, codec) != own:
                continue  # no superset of what is there
            if codec not in DOUBLE + SINGLE + RIVALS:
                continue
            text = tolerant(data, codec)
            if text is None:
                continue
            if codec == "cp437" and strict(data, "cp850") == text:
                codec = "cp850"  # the same letters, and the one that Excel's "CSV (MS-DOS)" writes in Europe
            if text in texts:
                break
            letters, odd = oddities(text)
            texts.add(text)
            if odd <= 0.02 * letters + (letters >= 10):
                candidates.append(Candidate(codec, one["confidence"], letters, odd, sample_of(text), text))
                break
        if len(candidates) == LISTED:
            break
    return candidates


def ranking_of_sound(data: bytes) -> list[Candidate]:
    """The ranking; where it has no winner because a few lines are damaged, that of the others."""
    ranked = ranking(data)
    if winner(ranked):
        return ranked
    lines = data.split(b"\n")
    for codec in DOUBLE:
        sound = [line for line in lines if strict(line, codec) is not None]
        if 0.9 * len(lines) <= len(sound) < len(lines) and winner(again := ranking(b"\n".join(sound))) == codec:
            return again
    return ranked


def whole_lines(data: bytes, size: int) -> bytes:
    """The first lines, about so many bytes."""
    return data if len(data) <= size else data[: max(data.find(b"\n", size), 0) or len(data)]


def tolerant(data: bytes, codec: str) -> str | None:
    """The text, if all but a few lines of a sample decode; lines that are damaged are left out."""
    try:
        return data.decode(codec)
    except UnicodeDecodeError:
        lines = data.split(b"\n")
        sound = [text for line in lines if (text := strict(line, codec)) is not None]
        return "\n".join(sound) if len(sound) >= 0.95 * len(lines) and len(lines) > 5 else None


def strict(line: bytes, codec: str) -> str | None:
    """Return a decoded line, None if it cannot be decoded."""
    try:
        return line.decode(codec)
    except UnicodeDecodeError:
        return None


def winner(ranked: list[Candidate]) -> str:
    """The codec of the first candidate if it is sure enough, or ""."""
    if not ranked:
        return ""
    first, n = ranked[0], ranked[0].letters
    if first.codec in ("iso2022_jp", "iso2022_kr"):
        return first.codec
    older = OLDER.get(first.codec, ()) if not first.odd else ()
    rest = [one for one in ranked[1:] if one.codec not in older and one.odd < first.odd + (3 if n >= 20 else 1000)]
    margin = first.score / max(rest[0].score if rest else 0.0, 1e-9)
    if first.codec in DOUBLE:
        return first.codec if n >= 4 and margin >= 1.5 and is_common(first) else ""
    if any(one.codec == "cp1252" and is_typographic(one.text) for one in ranked):
        return "cp1252"
    if first.codec not in SINGLE or first.score < 0.05:
        return ""
    if n < 12 and not first.text.translate(NO_LATIN).isascii():
        return ""  # a word or two of another alphabet
    if n < 20 and first.codec in ("cp850", "cp852", "mac_roman"):
        return ""  # rare, and much alike
    wanted = next((ratio for least, ratio in MARGINS if n >= least), float("inf"))
    return first.codec if margin >= wanted else ""


NO_LATIN = dict.fromkeys((*range(0xA0, 0x250), *range(0x300, 0x370), *range(0x1E00, 0x1F00), *range(0x2010, 0x20D0)))
# characters outside ASCII in the sample -> how much better than the next plausible encoding the first must be
MARGINS = ((200, 1.02), (50, 1.05), (20, 1.08), (10, 1.15), (6, 1.3), (4, 2.0))


def is_typographic(text: str) -> bool:
    """Whether all that is outside ASCII is quotes, apostrophes and dashes where English has them: "don’t", “so”."""
    signs = BEYOND.findall(text)
    proper = re.findall("(?<=[A-Za-z])’(?=[A-Za-z])|(?<![A-Za-z])“(?=[A-Za-z])|(?<=[A-Za-z.,!?])”(?![A-Za-z])", text)
    return set(signs) <= set("‘’“”–—…\xa0") and len(proper) >= max(2, len(signs) / 2)


def is_common(one: Candidate) -> bool:
    """Whether East Asian text consists of characters in daily use: each standard lists these first."""
    usual = {"gb18030": chinese, "cp950": traditional, "big5hkscs": traditional, "cp949": korean}.get(
        one.codec, japanese
    )
    letters = [c for c in one.text if "\u3041" <= c <= "\ud7a3" or "\uff66" <= c <= "\uff9f"]
    if usual is japanese and sum("\u3041" <= c <= "\u3093" for c in letters) >= 0.2 * len(letters):
        letters = [c for c in letters if c < "\uff66"]  # half-width kana beside the usual ones
    return len(letters) >= 2 and sum(map(usual, letters)) >= 0.8 * len(letters)


@functools.lru_cache(1 << 14)
def chinese(c: str) -> bool:
    """In level 1 of GB 2312, or a traditional form that Big5 has among its common ones."""
    code = c.encode("gb2312", "ignore")
    return len(code) == 2 and code[0] < 0xD8 or (not code and traditional(c))


@functools.lru_cache(1 << 14)
def traditional(c: str) -> bool:
    """Return whether a character is a frequent one of Big5."""
    code = c.encode("big5", "ignore")
    return len(code) == 2 and code[0] < 0xC7


@functools.lru_cache(1 << 14)
def korean(c: str) -> bool:
    """Return whether a character is a frequent one of EUC-KR."""
    code = c.encode("euc_kr", "ignore")
    return len(code) == 2 and code[0] < 0xC9


@functools.lru_cache(1 << 14)
def japanese(c: str) -> bool:
    """Return whether a character is a frequent one of EUC-JP."""
    code = c.encode("euc_jp", "ignore")
    return len(code) == 2 and 0xA4 <= code[0] < 0xD0


ESCAPE = re.compile(r'\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt])')
BEYOND = re.compile(r"[^\x00-\x7f]")
CONTROL = re.compile(r"[\x80-\x9f]")
LETTERS = 3000  # characters outside ASCII that are looked at
BETWEEN = frozenset("’ʼ·–—…‘“”„«»‹›\xa0\xad\u200b\u200c\u200d־،。、・ー々〜～")  # may stand between letters
BEHIND = frozenset("°™®©²³¹№")  # may stand directly behind a word or number
ALPHABETS = ("LATIN", "CYRILLIC", "GREEK", "HEBREW", "ARABIC", "ARMENIAN", "GEORGIAN")


@functools.lru_cache(1 << 12)
def script(c: str) -> str:
    """Return the script of a character, by its Unicode name."""
    return "LATIN" if c.isascii() else unicodedata.name(c, "?").partition(" ")[0]


def oddities(text: str) -> tuple[int, int]:
    """Return how many characters are outside ASCII, and how many of them are where no text has them.

    That is control characters, signs inside words, words of two alphabets, capitals inside a word.
    """
    text = f" {ESCAPE.sub(' ', text)} "
    letters = odd = 0
    if CONTROL.search(text):  # where another encoding has quotes and letters
        return len(BEYOND.findall(text)), len(text)
    for hit in itertools.islice(BEYOND.finditer(text), LETTERS):
        at, c = hit.start(), hit[0]
        before, after, kind = text[at - 1], text[at + 1], unicodedata.category(c)
        letters += 1
        if kind in ("Cn", "Co", "Cs") or c == "¤":
            odd += 1
        elif c in "ªº":
            odd += after.isalpha()
        elif kind == "Lm":
            odd += c not in "ー々ゝゞヽヾ〻" and script(c) not in ("THAI", "HALFWIDTH", "FULLWIDTH")
        elif kind[0] == "L":
            mine = script(c)
            beside = [x for x in (before, after) if x.isalpha()]
            if mine in ALPHABETS and any(script(x) != mine and script(x) in ALPHABETS for x in beside):
                odd += 1
            elif kind == "Lu":
                odd += before.islower()
            elif kind == "Ll":
                odd += c != "ß" and before.isupper() and after.isupper()
        elif kind[0] == "M":
            odd += not (before.isalpha() or unicodedata.category(before)[0] == "M")
        elif c not in BETWEEN:
            word = before.isalpha() and script(before) in ALPHABETS
            sign = kind in ("Sm", "So", "Sk", "No", "Nl") or c in "¶§€"
            odd += (word and (after.isalpha() or (sign and c not in BEHIND))) or (
                sign and c not in "©→€" and after.islower() and script(after) in ALPHABETS
            )
    return letters, odd


def sample_of(text: str) -> str:
    """A few words around the first character that is not ASCII."""
    text = ESCAPE.sub(" ", text)
    first = next((m.start() for m in BEYOND.finditer(text)), 0)
    begin = max(0, text.rfind(" ", 0, max(0, first - 12)) + 1, text.rfind("\n", 0, first) + 1, first - 24)
    piece = text[begin : begin + 48].partition("\n")[0]
    return "".join(c if c.isprintable() else "?" for c in piece).strip()


def marked(codec: str, message: str = "") -> str:
    """What stands for bytes that cannot be read: no UTF-8, so that the row is rejected, and with the reason in it."""
    return f"\udcff<{message or SHOWN.get(codec, codec)}>\udcff"


UTF8_INSIDE = "UTF-8 in "


class AsUtf8(io.RawIOBase):
    r"""A file as UTF-8, with \n as its only line end."""

    def __init__(self, file: io.BufferedIOBase, encoding: Encoding):
        self.file, self.codec = file, encoding.codec
        self.left, self.pending, self.ended = b"", b"", False
        if self.codec:
            name = f"rwkv_peft.{self.codec}"
            mark = marked(self.codec)

            def replace(error: UnicodeError) -> tuple[str, int]:
                return mark, error.end if isinstance(error, UnicodeDecodeError) else 0

            codecs.register_error(name, replace)
            self.decoder = codecs.getincrementaldecoder(self.codec)(name)
        # in these the end of a line is known before it is decoded
        self.by_line = self.codec in DOUBLE + SINGLE + RIVALS
        self.line = b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, target) -> int:
        """Fill a buffer; see io.RawIOBase."""
        while not self.left and not self.ended:
            data = self.file.read1(min(len(target), PIECE))
            self.ended = not data
            if self.codec:
                data = self.decoded(data)
            data = self.unified(data)
            if len(data) <= len(target):
                target[: len(data)] = data
                if data:
                    return len(data)
                continue
            self.left = data
        size = min(len(target), len(self.left))
        target[:size], self.left = self.left[:size], self.left[size:]
        return size

    def decoded(self, data: bytes) -> bytes:
        """Decode some bytes; keep an unfinished character for the next ones."""
        if self.by_line:
            data = self.line + data
            end = len(data) if self.ended or len(data) > PARTIAL else cut_line(data)
            data, self.line = data[:end], data[end:]
            text = "".join(self.lines(data))
        else:
            data, self.line = self.line + data, b""
            before = self.decoder.getstate()
            try:
                text = self.decoder.decode(data, self.ended)
            except UnicodeError:  # Python keeps 8 bytes at most of an escape sequence whose end is still to come
                self.decoder.setstate(before)
                if len(data) <= PIECE:
                    self.line = data
                    return b""
                text = self.decoder.decode(data, True)
        return text.encode("utf-8", "surrogateescape") if "\udcff" in text else text.encode("utf-8", "replace")

    def lines(self, data: bytes) -> Iterator[str]:
        """The lines decoded; those that are UTF-8 are marked, because decoding would make garbage of them."""
        if data.isascii():
            yield self.decoder.decode(data, self.ended)
            return
        for line in data.splitlines(keepends=True):  # (of bytes: at \n, \r and \r\n only)
            if not line.isascii() and is_utf8_line(line, self.codec):
                first = next(i for i, b in enumerate(line) if b > 127)
                mark = marked(self.codec, UTF8_INSIDE + SHOWN.get(self.codec, self.codec))
                yield line[:first].decode("ascii") + mark + line[first:].decode("utf-8")
            else:
                yield self.decoder.decode(line)
        if self.ended:
            yield self.decoder.decode(b"", True)

    def unified(self, data: bytes) -> bytes:
        r"""Replace line ends by \n; keep a \r at the end for the next bytes."""
        if not self.pending and b"\r" not in data:
            return data
        data = self.pending + data
        whole = data if self.ended else data.rstrip(b"\r")
        self.pending = data[len(whole) :]
        return whole.replace(b"\r\r\n", b"\n").replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def cut_line(data: bytes) -> int:
    r"""Return the place after the last line end; a \r at the very end may be half of one."""
    return max(data.rfind(b"\n"), data.rfind(b"\r", 0, len(data) - 1)) + 1


def one_line_end(text: str) -> str:
    r"""Replace \r\n and \r by \n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
