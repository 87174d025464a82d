"""Mojibake: UTF-8 that was read as cp1252 (or latin-1) and saved again, "é" as "Ã©", "你好" as "ä½ å¥½".

The damage is reversible as long as every byte still has its character. Five bytes (81 8D 8F 90 9D) have none in cp1252:
browsers (WHATWG) make them C1 controls, which can be reversed; other programs drop them or write U+FFFD, which cannot.

Why a repair is safe. Two things must hold together, and clean text has neither by itself:

1. The whole string fits. Every character that is not ASCII must stand for a byte, all under one reading, and all bytes
   together must be UTF-8. A single "é" before a space, an opening quote, a Chinese or Polish character refuse the repair.
   So nothing is ever repaired in part: an article that shows "Ã©" beside a proper "é" stays as it is.
2. The fit is no coincidence. Clean text does fit at times: "weiß…", "ROMÃ”", "CAFÉ»", "è…”", "KNÍŽKA", "Úžas", "2×œufs",
   "à ½" are all UTF-8 by accident: a letter that ends a word, then what may follow a word; a letter before š or ž.
   Such pairs count for nothing, however many there are. One sequence must be conclusive: a character that follows no letter
   in any language (ƒ ˆ ‰ ˜ ¤ ¦ ¨ ¸, a C1 control), or a Ã or Â where no writing has one ("fÃ¼r", "25Â°", "2Ã—3"); or
   several sequences follow one another directly, without one ASCII character between them (has_chain).

What this cannot know: an English text that quotes "fÃ¼r" as an example of mojibake, and has nothing else outside ASCII.
And it leaves what is too short to decide: "Ã©" alone, "CAFÃ‘A" in capitals.
"""

from __future__ import annotations

import codecs
import re

CLEAN, REPAIRED, LOSSY = "clean", "repaired", "lossy"

LAYERS = 3  # mojibake of mojibake of mojibake; a fourth was never seen
ENOUGH = 2  # different such sequences before a text that cannot be repaired is reported
SHARE = 0.75  # and so much of what could be mojibake must be: a text about mojibake shows the proper letters as well

UNDEFINED = (0x81, 0x8D, 0x8F, 0x90, 0x9D)
# the 256 characters of cp1252 as browsers read it; for the bytes that cp1252 leaves out, the C1 controls
WHATWG = "".join(chr(b) if b in UNDEFINED else bytes([b]).decode("cp1252") for b in range(256))
TO_WHATWG = codecs.charmap_build(WHATWG)
# what a character may have been, under either reading
BYTE = {chr(b): b for b in range(0x80, 0x100)} | {c: b for b, c in enumerate(WHATWG) if b >= 0x80}

# continuation bytes 80..BF. The pattern begins with one class of characters: the search for it is a tight loop in C
C = "[\x80-\xbf" + "".join(re.escape(c) for c in WHATWG[0x80:0xA0] if c > "\xff") + "]"
# ß is left out ("weiß…" is daily German): as a lead it could only mean N'Ko
SEQUENCE = re.compile(f"[Â-ô]{C}(?:(?<=[Â-Þ].)|(?<=[à-ï].){C}|(?<=[ð-ô].){C}{C})", re.DOTALL)
# what is left of a sequence that has lost a byte, or has U+FFFD or ? for it
BROKEN = re.compile(f"[Â-ô]{C}{{0,2}}[\ufffd?]+{C}{{0,2}}|[à-ô]{C}{{1,2}}")
CUT_QUOTE = re.compile(f"â€(?!{C})")
SUSPECT = re.compile(f"[Â-ô\ufffd]|{C}")


def repair_text(text: str) -> tuple[str, str]:
    """Return the text, repaired if it was reversible mojibake, and CLEAN, REPAIRED or LOSSY.

    CLEAN and LOSSY (mojibake that lost bytes, or is mixed with proper text) are returned unchanged, the same object.
    A repair gives the bytes before the damage exactly, and a repaired text is CLEAN. Never raises.
    """
    if text.isascii() or SEQUENCE.search(text) is None:
        return text, CLEAN
    healed = text
    for _ in range(LAYERS):
        verdict, healed = peel(healed)
        if verdict == LOSSY:
            return text, LOSSY
        if verdict == CLEAN:
            return (text, CLEAN) if healed is text else (healed, REPAIRED)
    return (healed, REPAIRED) if peel(healed)[0] == CLEAN else (text, LOSSY)


def peel(text: str) -> tuple[str, str]:
    """The verdict, and the text without its outermost layer of mojibake."""
    sequences = list(SEQUENCE.finditer(text))
    if not any(telling(text, m.start(), m.end()) for m in sequences) and not has_chain(sequences):
        return CLEAN, text
    inner = reread(text)
    if inner is not None:
        return REPAIRED, inner
    return (LOSSY if is_mostly_mojibake(text) else CLEAN), text


def has_chain(matches: list[re.Match]) -> bool:
    """Return whether sequences follow one another as no clean text has it.

    That is three with three different continuations (a list of letters, "Ä…Ö…Ü…", has one), or four that are longer than two.
    For words whose sequences are all harmless: "ê°‚ê°‘".
    """
    run: list[re.Match] = []
    for match in matches:
        run = [*run[-3:], match] if run and run[-1].end() == match.start() else [match]
        if len(run) >= 3 and len({c for m in run for c in m[0][1:]}) >= 3:
            return True
        if len(run) == 4 and all(len(m[0]) > 2 for m in run):
            return True
    return False


def reread(text: str) -> str | None:
    """The text whose UTF-8 was read as latin-1 or as cp1252 to give this one; None if there is none."""
    for to_bytes in (latin_1, whatwg):
        try:
            return to_bytes(text).decode("utf-8")
        except UnicodeError:
            continue
    return None


def latin_1(text: str) -> bytes:
    """Encode as latin-1."""
    return text.encode("latin-1")


def whatwg(text: str) -> bytes:
    """Encode as cp1252 with C1 controls."""
    return codecs.charmap_encode(text, "strict", TO_WHATWG)[0]


def is_mostly_mojibake(text: str) -> bool:
    """Whether there is evidence enough in a text that does not fit as a whole, and little beside it."""
    sequences = list(SEQUENCE.finditer(text))
    odd = {m[0] for m in sequences if telling(text, m.start(), m.end())}
    # the end of a quotation in English: ” is E2 80 9D, and cp1252 has no 9D
    if len(odd) + (CUT_QUOTE.search(text) is not None) < ENOUGH and not has_chain(sequences):
        return False
    rest, whole = SEQUENCE.sub("", text), len(SUSPECT.findall(text))
    broken = sum(len(m) for m in BROKEN.findall(rest))
    return len(SUSPECT.findall(rest)) - broken <= (1 - SHARE) * whole


NO_LETTER_BEFORE = frozenset(UNDEFINED) | {BYTE[c] for c in "ƒˆ‰˜¤¦¨¸"}
LIGATURES = {BYTE[c] for c in "ŒœŸ"}  # real letters, but none of them follows an accented letter
CARONS = {BYTE[c] for c in "ŠŽšž"}  # these do, in Czech, Slovak and Estonian: "KNÍŽKA", "Úžasný", "též…"
AMOUNTS = {BYTE[c] for c in "µ¼½¾"}  # behind letters of some alphabets only: "Ø½" is a diameter, "Åµm" a length
MONEY = {BYTE[c] for c in "¢£¥"}  # the same, and not before a number: "MAÑ£2"
PRICES = MONEY | {BYTE["€"]}
ODD_IN_THREE = NO_LETTER_BEFORE | LIGATURES | AMOUNTS | PRICES
# behind these a new word begins: "à\xa0½", "été–œuvre"
OPENERS = {BYTE[c] for c in "\xa0\xad…‘’“•–—‹«¡¿‚„·±"}
BEFORE_WORDS = OPENERS | {BYTE["”"]}

LOWER = frozenset("abcdefghijklmnopqrstuvwxyz")
UPPER = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
DIGIT = frozenset("0123456789")
WORDS_AROUND = {BYTE[c] for c in "…‘“”–—"}  # "FÃ–clube", "LÃ…mas": these stand between words without a space


def telling(text: str, start: int, end: int) -> bool:
    """Whether no clean text has this sequence (text[start:end], a lead and its continuations) in this place."""
    lead, first = text[start], BYTE[text[start + 1]]
    if end - start == 2:
        return odd_pair(lead, first, text, start, end)
    rest = [BYTE[c] for c in text[start + 2 : end]]
    if end - start == 4:  # emoji; ñ ò ó ô would be planes that are empty
        return lead == "ð" and first in ODD_IN_THREE
    if first in ODD_IN_THREE:
        return lead != "à" or first not in AMOUNTS
    if lead == "á" and first == 0xBA or (lead, first, rest[0]) == ("â", 0x82, 0xAC):  # half of Vietnamese; "â‚¬" is €
        return True
    if lead == "á" and first == 0xBB and text[end : end + 1] in LOWER and rest[0] not in BEFORE_WORDS:  # the other half
        return True
    if text[end : end + 1] in DIGIT and rest[0] in PRICES:  # "né”£5"
        return False
    return rest[0] in ODD_IN_THREE and first not in OPENERS


def odd_pair(lead: str, second: int, text: str, start: int, end: int) -> bool:
    """As `is_conclusive` for two characters: an upper-case letter or ×, and what represents a byte 80..BF."""
    after = text[end : end + 2]
    digit_after = after[:1] in DIGIT
    if second in NO_LETTER_BEFORE:
        return True
    if lead == "Ã" and 0x82 <= second <= 0x86 and after[:1] == "Â" and text[start + 1] != after[1:]:  # two layers
        return True
    if lead == "×":  # an operator: anything may follow it, "3×½", "2×œufs", "3×£5"
        return False
    if second in LIGATURES:
        return True
    if second in AMOUNTS and lead in "ÂÃÄÎÏÐÑÙ":
        return True
    if second in MONEY and lead in "ÂÃÄÅÎÏÐÑØÙ":
        return lead == "Â" or not digit_after
    if second == 0x80:
        return lead in "ÃÎÑ" and not digit_after
    if second in CARONS and lead in "ÂÃÅÎÏÐÑÙ":
        return True
    return lead in "ÂÃÄÅÆÈ" and odd_latin_pair(lead, second, text[max(0, start - 2) : start], after)


def odd_latin_pair(lead: str, second: int, before: str, after: str) -> bool:
    """Return whether a pair of European text is odd, by the letters around it: a capital inside a word of small letters.

    before, after: up to two characters on either side.
    """
    one, two = before[-1:], before[:-1]  # the nearest, the one before it
    small_before = one in LOWER
    if small_before and two in LOWER:  # "cafÃ©", "kmÂ²", "dÃ©jÃ" has it in its second half
        return True
    small_after = after[:1] in LOWER
    if lead == "Â":
        # "25Â°", "end.Â\xa0Next"; but Â is an operator in physics: "2Â²"
        if small_before or one in DIGIT or (one and one in ".,;:!?)"):
            return second not in (0xB1, 0xB2, 0xB3, 0xB7)
        return (not one or one in " \n\t(") and second in (0xA1, 0xA7, 0xA9, 0xAB, 0xBF)  # "Â© 2020", "Â¿QuÃ©"
    if small_before and small_after:  # "tÃªte", "mÄ…dry"
        return lead != "Å" or two.isalpha() or second not in (0x92, 0x96, 0x97, 0xB2, 0xB7)  # a unit: "mÅ–scale"
    if lead != "Ã":
        return False
    if second == 0x87:  # no letter comes directly behind a dagger: "Ã‡a", "FRANÃ‡AIS"
        return after[:1] in LOWER or after[:1] in UPPER
    if second in (0x97, 0xB7):  # × and ÷ between numbers
        left, right = (one if one != " " else two), (after[:1] if after[:1] != " " else after[1:])
        if left in DIGIT and right in DIGIT:
            return True
    if second == 0xA0:  # a lone "à": a space, Ã, a no-break space and a space again
        return one == " " and (two in LOWER or two in (",", ";")) and after[:1] == " " and after[1:] in LOWER
    if small_after and after[1:] in LOWER and second not in (0x92, 0xAD):
        if not one.isalnum():  # "Ã©tÃ©", "Ã–sterreich"
            return True
        return one in UPPER and not two.isalnum() and second not in WORDS_AROUND  # "RÃ©mi", "JÃ¼rgen"
    return False
