"""Check names that become files, and make any name fit to print."""

from __future__ import annotations

import unicodedata

_LINE_BREAKS = "\n\u2028\u2029\r\x0b\x0c\x85"  # begin a new line in some program
_JOINERS = "\u200c\u200d"  # between letters (Persian) and emoji they are a part of the word
# control characters; invisible ones and those that reverse what follows; ends of lines and paragraphs; lone surrogates
_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Cs")


def describe_fault(name: str, edges: bool = True) -> str:
    """Return why a name is not fit for a file that others read, list and type: "holds a line break"; "" if it is.

    Args:
        name: the name.
        edges: it is the whole name, so that its beginning and end are checked too.
    """
    for i, character in enumerate(name):
        kind = unicodedata.category(character)
        if character in _JOINERS and 0 < i < len(name) - 1:
            continue
        if character in _LINE_BREAKS:
            return "holds a line break"
        if kind == "Cs":
            return "is not UTF-8"
        if kind == "Cc":
            return f"holds a control character ({escape_invisible(character)})"
        if kind in _INVISIBLE:
            return f"holds {unicodedata.name(character, 'a character')} (U+{ord(character):04X}), which is not seen"
    if edges and name != name.strip():
        return "begins or ends with a blank"
    if edges and name.startswith("-"):
        return 'begins with "-", like an option'
    return ""


def escape_invisible(text: str, keep: str = "") -> str:
    r"""Write characters that a terminal would obey, or not show, as \x1b or \u202e.

    Args:
        text: any text.
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    keep += _JOINERS
    return "".join(
        c if c in keep or unicodedata.category(c) not in _INVISIBLE else c.encode("unicode_escape").decode()
        for c in text
    )
