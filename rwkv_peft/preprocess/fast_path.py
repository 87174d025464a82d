"""The short way for the rows that most data consist of: conversations of nothing but roles and words.

`schemas.Reader.read` and `Template.render` are the definition; this gives what they give together, or None where a row has
more to it (tools, thoughts, weights, second texts, suspicious letters) and must go the long way. Binding test:
tests/preprocess/test_encode.py.
"""

from __future__ import annotations

from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Ending, Template

from .encode import Pieces
from .keys import MESSAGES, ROLE_NAMES, Columns, left_over
from .schemas import HANDLERS, Row
from .values import is_nothing, wants_a_look

SPEAKERS = (Role.SYSTEM, Role.USER, Role.ASSISTANT)


class FastPath:
    """conversation(row) -> (schema, pieces), or None."""

    def __init__(self, template: Template, ending: Ending, columns: Columns, handler: str):
        self.columns = MESSAGES if HANDLERS[handler] in ("auto", "messages") else ()
        if columns.given or columns.roles or template.answer_in_user or template.opening or template.think != "keep":
            self.columns = ()
        if template.format_prefix or template.default_system or not template.strip:
            self.columns = ()
        self.reserved = template.reserved
        self.speakers = {}
        for name, role in ROLE_NAMES.items():
            if role in SPEAKERS:
                heading, lead, tail = template.patterns[role]
                end = tail + ending.answer if role is Role.ASSISTANT else tail
                pair = [Role.HEADING, role] if heading else [role]
                self.speakers[name] = (
                    role,
                    pair,
                    heading,
                    lead,
                    end + template.format_separator,
                    template.cleaners[role],
                )
        self.separator, self.last = len(template.format_separator), ending.last

    def conversation(self, row: Row, repair: bool) -> tuple[str, Pieces] | None:
        """Return a plain conversation, rendered; None if it needs the full path. repair: letters outside ASCII need it."""
        for column in self.columns:
            messages = row.get(column)
            if messages is not None:
                break
        else:
            return None
        if type(messages) is not list or not messages:
            return None
        if len(row) > 1 and (others := left_over(tuple(row), (column,))):
            for key in others:
                if not is_nothing(row[key]):
                    return None  # there is more than a conversation in the row
        try:
            who, what, schema = ("from", "value", "sharegpt") if "from" in messages[0] else ("role", "content", column)
            texts: list[str] = []
            roles: list[Role] = []
            for one in messages:
                content = one[what]
                role, pair, heading, lead, end, cleaner = self.speakers[one[who]]
                plain = "\n" not in content and "\r" not in content and not content[:1].isspace()
                content = content.rstrip() if plain else cleaner(content)
                if not content or len(one) != 2 or (repair and not content.isascii()):
                    return None
                if wants_a_look(content):
                    return None
                if self.reserved and any(word in content for word in self.reserved):
                    return None
                if heading:
                    texts.append(heading)
                texts.append(f"{lead}{content}{end}")
                roles += pair
        except (KeyError, TypeError, AttributeError):
            return None  # not what it seemed; the long way says why
        if Role.ASSISTANT not in roles:
            return None
        texts[-1] = texts[-1][: len(texts[-1]) - self.separator] + self.last
        if not texts[-1]:
            return None
        return schema, Pieces(texts, roles)
