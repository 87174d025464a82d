"""Messages of a conversation -> a dialogue; and the values of rows -> text, flags and thoughts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Dialogue, Message

from . import message_order, tool_texts
from .choices import columns_of_choices, refuse_choice
from .contents import THINK_NAMES, joined_parts, parts_of_json, said
from .encodings import one_line_end
from .keys import CALLS, HARMLESS_IN_MESSAGES, ROLE_NAMES, Columns, Parts, left_over, names_a_file, parts_of, squashed
from .loss_flags import LABEL, flag_word, flags_in, list_of_flags
from .mapped_columns import lifted, renamed_keys
from .mojibake import repair_text
from .row_advice import better_answer, quoted, unknown_role
from .tools import agreed_call, agreed_tools
from .values import (
    NOT_TEXT,
    RowError,
    as_text,
    bare_thought,
    check_text_only,
    is_medium,
    is_nothing,
    kind,
    short,
    split_reasoning,
    thoughts_in,
    unwrapped,
    wants_a_look,
)

Row = Mapping[str, Any]
NO_ANSWER = "has a thought, and no answer behind it (it was cut off)"
PLAIN_ROLES = {name: role for name, role in ROLE_NAMES.items() if role in (Role.USER, Role.ASSISTANT)}


@dataclass
class Talks:
    """Reads conversations.

    Attributes:
        verdicts: What mojibake.repair_text found in the strings of the last row.
        seen: Columns of MAP_KEYS that occurred.
        unused: (level, key) -> 1 for every key of the last row that was not used.
        padded: Rows are Arrow's, which puts null where an object lacks a field that others have.
    """

    columns: Columns = field(default_factory=Columns)
    repair: bool = True
    padded: bool = False
    verdicts: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    unused: dict[tuple[str, str], int] = field(default_factory=Counter)

    def string(self, value: str) -> str:
        r"""Return a text with \n as line ends, and mojibake repaired."""
        if "\r" in value:
            value = one_line_end(value)
        if self.repair and not value.isascii():
            value, verdict = repair_text(value)
            if verdict != "clean":
                self.verdicts.add(verdict)
        return value

    def text(self, value: Any, name: str, structured: bool = False) -> str:
        """A text that must be there. structured: an object or a list is written as JSON."""
        if isinstance(value, dict | list) and not structured or value is None:
            raise RowError("wrong type", f'its "{name}" must be a string, not {kind(value)}')
        words = "" if isinstance(value, float) and is_nothing(value) else as_text(value)
        if not words or words.isspace():
            raise RowError("empty", f'its "{name}" is empty')
        return self.string(words)

    def agreed(self, row: Row, names: Sequence[str], where: str = "its", structured: bool = False) -> str:
        """The text of a part that may have several names. RowError where two of them disagree."""
        values = [(name, self.text(said(row[name]), name, structured)) for name in names if not is_nothing(row[name])]
        for name, text in values[1:]:
            if text.strip() != values[0][1].strip():
                first = values[0]
                raise RowError(
                    "two values", f'{where} "{first[0]}" and "{name}" disagree: {short(first[1])} and {short(text)}'
                )
        return values[0][1] if values else ""

    def flag(self, one: Row, names: Sequence[str], where: str) -> bool | None:
        """Whether an answer is to be learnt, as the flags of a row or message say; None where they say nothing."""
        by_column: dict[str, bool] = {}
        for name in names:
            value = one[name]
            if is_nothing(value) or isinstance(value, list):
                continue
            learn = flag_word(value)
            if learn is None:
                raise RowError("wrong type", f"{where} has the {name} {value!r}; it must be 0 or 1")
            by_column[name] = learn != (squashed(name) == "masked")
        if len(set(by_column.values())) > 1:
            says = " and ".join(f"{name}={one[name]!r}" for name in by_column)
            raise RowError("two values", f"{where} has flags that disagree: {says}")
        return next(iter(by_column.values()), None)

    def flags_of_row(self, row: Row, names: tuple[str, ...]) -> tuple[bool | None, str, list[Any] | None]:
        """The flag of a whole row; the name of the column that has one flag for each message, and its list."""
        for name in names:
            if (
                squashed(name) == LABEL and row[name] is False and "completion" not in row
            ):  # it may mean something else: say so
                self.unused["answer that is false by the column", name] = 1
        lists = {name: flags for name in names if (flags := list_of_flags(row[name], name))}
        first = next(iter(lists), "")
        for name, flags in lists.items():
            if flags != lists[first]:
                raise RowError("two values", f'its "{first}" and "{name}" disagree')
        return self.flag(row, [name for name in names if name not in lists], "it"), first, lists.get(first)

    def one_thought(self, inside: str, beside: str, where: str) -> str:
        """Return the thought inside or beside a message. Raises RowError if there are two that differ."""
        if inside and beside and inside.strip() != beside.strip():
            raise RowError("two values", f"{where} has two thoughts that disagree: {short(inside)} and {short(beside)}")
        return inside or beside

    def renamed(self, value: Any) -> Any:
        """A conversation whose keys MAP_KEYS names (role, content), with the usual ones."""
        given = self.columns.of_messages
        if not given:
            return value
        if isinstance(value, dict) and message_order.is_struct_of_lists(renamed_keys(value, given)):
            self.seen.update(name for name in given if name in value)
            return renamed_keys(value, given)
        if not message_order.is_messages(value):
            return value
        value = [lifted(one, given) for one in value]
        self.seen.update(name for one in value for name in given if name in one)
        return [renamed_keys(one, given) for one in value]

    def messages(self, rows: Any, row: Row, parts: Parts) -> Dialogue:
        """A kept from [{"role": ..., "content": ...}, ...], or "from" and "value"."""
        kept: list[Message] = []
        answers = 0
        tools = [(name, row[name]) for name in parts.tools]
        learn, list_name, flags = self.flags_of_row(row, flags_in(row, parts))
        if flags is not None:
            rows = self.with_flags(rows, list_name, flags)
        plain = [self.plain_message(one) for one in rows]
        if None in plain and any(map(tool_texts.may_hold_tools, rows)):
            rows = [part for one in rows for part in tool_texts.apart(one, self.role_of(one))]
            plain = [self.plain_message(one) for one in rows]
        if system := self.agreed(row, (*parts.system, *parts.beside_messages)):
            system, listed = tool_texts.tools_of_text(system)
            tools += [("system", listed)] * bool(listed)
        if system:
            kept.append(Message(Role.SYSTEM, system))
        pending = ""
        for i, one in enumerate(rows, 1):
            message = plain[i - 1]
            if message is None:
                if thought := self.lone_thought(one):  # belongs to the answer that follows
                    pending = thought
                    continue
                message = self.message(i, one, rows)
            if pending and message is not None:
                if message.role is not Role.ASSISTANT:
                    raise RowError("reasoning", f"message {i - 1} is a thought, and no answer follows it")
                message = message._replace(think=self.one_thought(message.think, pending, f"message {i}"))
                pending = ""
            if message is None:
                if isinstance(one, dict):
                    tools += tools_of_system(one)
                continue
            role = message.role
            if role is Role.ASSISTANT:
                answers += 1
                if learn is False:
                    message = message._replace(learn=False)
            elif role is Role.SYSTEM:
                tools += tools_of_system(one)
                if system and len(kept) == 1:  # said in a column of its own and in the conversation
                    if system.strip() != message.content.strip():
                        says = f"{short(system)} and {short(message.content)}"
                        raise RowError("two values", f"has two system texts, in a column and as a message: {says}")
                    continue
            kept.append(message)
        if pending:
            raise RowError("reasoning", "the last message is a thought, and no answer follows it")
        if not answers:
            raise RowError("no answer", f"the conversation has no assistant message{self.who_answers(rows, row)}")
        if columns_of_choices(tuple(row)):
            question = "\n".join(message.content for message in kept if message.role is not Role.ASSISTANT)
            for message in kept:
                if message.role is Role.ASSISTANT:
                    refuse_choice(row, question, message.content, "its question")
        return Dialogue(tuple(kept), agreed_tools(tools, self.padded, self.unused))

    def who_answers(self, rows: Sequence[Any], row: Row) -> str:
        """What to say of a conversation without an answer: who may answer in it (MultiWOZ's SYSTEM), or which column may."""
        roles = [self.role_of(one) for one in rows]
        behind = roles[roles.index(Role.USER) :] if Role.USER in roles else []
        if Role.SYSTEM in behind:
            name = self.speaker_of(rows[len(roles) - len(behind) + behind.index(Role.SYSTEM)])[1]
            return f". If {name} answers: --role-map {quoted({name: 'assistant'})}"
        better = better_answer(row)
        return f". If {better} is its answer: --map-keys {quoted({'response': better})}" if better else ""

    def lone_thought(self, one: Any) -> str:
        """The text of a message that is a thought by its role, "" for any other."""
        if type(one) is not dict:
            return ""
        role = one.get("role", one.get("from", "user"))
        if type(role) is str and role in PLAIN_ROLES:
            return ""
        parts = parts_of(tuple(one))
        name = next((one[key] for key in parts.speaker if isinstance(one[key], str)), "")
        if squashed(name) not in THINK_NAMES or name.strip().lower() in self.columns.roles:
            return ""
        return bare_thought(self.text(said(one[parts.said[0]]) if parts.said else None, name))

    def with_flags(self, rows: list[Any], name: str, flags: list[Any]) -> list[Any]:
        """The messages with the flags of a list beside them: one for each message, or one for each answer."""
        answers = [i for i, one in enumerate(rows) if self.role_of(one) is Role.ASSISTANT]
        if len(flags) not in (len(rows), len(answers)):
            raise RowError(
                "wrong type", f'its "{name}" has {len(flags)} flags for {len(rows)} messages ({len(answers)} answers)'
            )
        which = range(len(rows)) if len(flags) == len(rows) else answers
        changed = list(rows)
        for i, value in zip(which, flags, strict=True):
            if not is_nothing(value) and flag_word(value) is None:
                raise RowError("wrong type", f'its "{name}" has {short(value)} for message {i + 1}; it must be 0 or 1')
            learn = self.flag({name: value}, (name,), f"message {i + 1}")
            own = (
                self.flag(rows[i], parts_of(tuple(rows[i])).flags, f"message {i + 1}")
                if isinstance(rows[i], dict)
                else None
            )
            if own is not None and learn is not None and own != learn:
                raise RowError(
                    "two values", f'message {i + 1} and its place in "{name}" disagree on whether it is learnt'
                )
            if i in answers and learn is False:
                changed[i] = {**rows[i], "weight": 0}
            elif i not in answers and learn:
                self.unused["flag", f"{name} of a message that is no answer"] = 1
        return changed

    def role_of(self, one: Any) -> Role | None:
        """The role of a message, None where it has none that is known."""
        if not isinstance(one, dict):
            return None
        word = str(self.speaker_of(one)[1]).strip().lower()
        if word in self.columns.roles:
            return self.columns.roles[word]
        return Role.ASSISTANT if word in CALLS else ROLE_NAMES.get(word)

    def speaker_of(self, one: Row) -> tuple[str, Any]:
        """The key that says who speaks, and what it says; ("", None) where there is none."""
        key = next(
            (key for key in parts_of(tuple(one)).speaker if not is_nothing(one[key])), ""
        ) or message_order.speaker_elsewhere(one)
        name = one.get(key)
        return key, name.get("role") if isinstance(name, dict) else name  # ChatGPT's {"author": {"role": ...}}

    def plain_message(self, one: Any) -> Message | None:
        """A message of nothing but a role and its words, which most are: what `message` would give, sooner. Or None."""
        if type(one) is not dict or len(one) != 2:
            return None
        try:
            role, content = one["role"], one["content"]
        except KeyError:
            role, content = one.get("from"), one.get("value")
        role = PLAIN_ROLES.get(role) if type(role) is str and not self.columns.roles else None
        if role is None or type(content) is not str or not content or content.isspace() or wants_a_look(content):
            return None
        return Message(role, content if content.isascii() and "\r" not in content else self.string(content))

    def message(self, i: int, one: Any, rows: Sequence[Any] = ()) -> Message | None:
        """Return message i (from 1) of a conversation.

        None for an empty system message, and for a role that ROLE_MAP leaves out.
        """
        if not isinstance(one, dict):
            raise RowError("wrong type", f"message {i} must be an object with role and content")
        keys = tuple(one)
        parts = parts_of(keys)
        speaker, name = self.speaker_of(one)
        word = name.strip().lower() if isinstance(name, str) else ""
        if word in self.columns.roles:
            role = self.columns.roles[word]
            if role is None:
                return None
        else:
            role = Role.ASSISTANT if word in CALLS else ROLE_NAMES.get(word)
            if role is None:
                raise unknown_role(i, name, rows)
        text_key = next((key for key in parts.said if one[key] is not None and key != speaker), None)
        content = one[text_key] if text_key else None
        if isinstance(content, dict) and isinstance(content.get("parts"), list):  # ChatGPT's export
            content = content["parts"]
        if isinstance(content, str) and content.startswith("[{"):
            content = parts_of_json(content)
        used = [key for key in (speaker, text_key) if key]
        for key in parts.media:
            if is_medium(one[key], names_a_file(key)):
                raise RowError("not text", f'message {i} ({name}) has something in "{key}": {NOT_TEXT}')
        think, call = "", ""
        think_names: tuple[str, ...] = ()
        structured = (
            role in (Role.ASSISTANT, Role.TOOL) and isinstance(content, list) and not message_order.are_parts(content)
        )
        if isinstance(content, list) and not structured or message_order.is_part(content):
            content, think = joined_parts(i, content if isinstance(content, list) else [content], self.unused)
        if role is Role.ASSISTANT:
            think_names = thoughts_in(one, parts.think)
            used += [*parts.calls, *parts.flags, *think_names]
            calls = [(key, one[key]) for key in parts.calls if not is_nothing(one[key])]
            if word in CALLS:
                calls, content = [(word, content), *calls], ""
            if calls:
                call = agreed_call(f"message {i}", calls, self.padded, self.unused)
                content = "" if content is None else content
        elif role is Role.SYSTEM:
            used += parts.tools
        where = f"message {i} ({name})"
        thought_elsewhere = think or role is Role.ASSISTANT and any(not is_nothing(one[key]) for key in think_names)
        if content is None and (role in (Role.SYSTEM, Role.TOOL) or thought_elsewhere):
            content = ""
        elif isinstance(content, dict | list) and role in (Role.USER, Role.SYSTEM) or content is None:
            raise RowError("wrong type", f"{where} has no text in content")
        content = "" if isinstance(content, float) and is_nothing(content) else as_text(content)
        content = self.string(content)
        check_text_only(content, where)
        self.count_unused(one, left_over(keys, tuple(used), HARMLESS_IN_MESSAGES), parts, role)
        empty = not content or content.isspace()
        if role is not Role.ASSISTANT:
            if empty and role is Role.SYSTEM:
                return None
            if empty and role is Role.USER:
                raise RowError("empty", f"{where} is empty")
            self.look_for_tools(content, role)
            return Message(role, content)
        try:
            inside, content = split_reasoning(content)
        except RowError as error:
            raise RowError(error.reason, f"{where} {error.message}") from None
        thoughts = bare_thought(self.agreed(one, think_names, f"{where}:")) if think_names else ""
        if thoughts := self.one_thought(think, thoughts, where):  # it is beside the words
            content = unwrapped(content)
        think = self.one_thought(inside, thoughts, where)
        if not call and (not content or content.isspace()):
            raise RowError("empty", f"{where} {NO_ANSWER if think else 'is empty'}")
        self.look_for_tools(content, role)
        learn = self.flag(one, parts.flags, where) if parts.flags else None
        if any(isinstance(one[key], list) for key in parts.flags):
            raise RowError("wrong type", f"{where} has a list of flags; a message has one, 0 or 1")
        return Message(role, content, think, learn=learn is not False, call=call)

    def look_for_tools(self, words: str, role: Role) -> None:
        """Note tags of tool calls that stay text."""
        if "<" in words and tool_texts.stay_text(words, role):
            self.verdicts.add("fault: tags")

    def count_unused(self, one: Row, keys: Iterable[str], parts: Parts, role: Role) -> None:
        """Keys of a message that are not used. A flag that only says what happens anyway counts as used."""
        for key in keys:
            if is_nothing(one[key]):
                continue
            if key in parts.flags and self.flag(one, (key,), "a message") is False:
                continue
            of = (
                f" of {role.name.lower()} messages"
                if role is not Role.ASSISTANT
                and key in (*parts.flags, *parts.calls, *parts.think)
                or key in parts.tools
                else ""
            )
            self.unused["message key", key + of] = 1


def tools_of_system(one: Row) -> list[tuple[str, Any]]:
    """The tools that a system message brings, by their keys."""
    return [(f"{name} of the system message", one[name]) for name in parts_of(tuple(one)).tools]
