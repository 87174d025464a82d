"""Names that become files or stand in lines that we print: which ones cannot, and how any is shown. Floor 0."""

from __future__ import annotations

import unicodedata

LINES = "\n\u2028\u2029\r\x0b\x0c\x85"  # begin a new line somewhere
JOINERS = "\u200c\u200d"  # between letters (Persian) and emoji they are a part of the word
# control characters; characters that are not seen, or turn around what follows; ends of lines and paragraphs; half characters
UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Cs")


def fault(name: str, edges: bool = True) -> str:
    """Why a name cannot be that of a file which others read, list and type, as in: holds a line break. "" for one that can.
    edges: whether it is all of that name, so that its ends count, too.
    """
    for i, character in enumerate(name):
        kind = unicodedata.category(character)
        if character in JOINERS and 0 < i < len(name) - 1:
            continue
        if character in LINES:
            return "holds a line break"
        if kind == "Cs":
            return "is not UTF-8"
        if kind == "Cc":
            return f"holds a control character ({visible(character)})"
        if kind in UNSEEN:
            return f"holds {unicodedata.name(character, 'a character')} (U+{ord(character):04X}), which is not seen"
    if edges and name != name.strip():
        return "begins or ends with a blank"
    if edges and name.startswith("-"):
        return 'begins with "-", like an option'
    return ""


def visible(text: str, keep: str = "") -> str:
    """Text with everything that a terminal would obey, or not show, written as \\x1b or \\u202e. keep: what stays as it is."""
    if text.isprintable():
        return text
    keep += JOINERS
    return "".join(
        c if c in keep or unicodedata.category(c) not in UNSEEN else c.encode("unicode_escape").decode() for c in text
    )
