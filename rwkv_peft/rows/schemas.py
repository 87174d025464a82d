"""A row of any data set of the field -> a dialogue, or a text that is ready.

What a row is shows in its columns (keys.py); roles are read from their names, never from their places. A row that cannot be
used raises RowError with a reason (counted) and a sentence (shown); the caller knows the file and the line. Every key is used,
is harmless metadata, or is counted in `Reader.unused`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..roles import Role
from ..templates.template import Dialogue, Message
from . import exports, tool_texts, turns
from .advice import advice, better_answer, proposed_message_keys, proposed_roles, quoted
from .choices import columns_of_choices, refuse_choice
from .encodings import one_line_end
from .flags import flag_word, flags_in, liked, list_of_flags
from .keys import (
    ANSWERS_TO_TEXTS,
    CALLS,
    CERTAIN_MESSAGES,
    CERTAIN_TEXTS,
    HARMLESS_IN_MESSAGES,
    HARMLESS_NAMES,
    QUESTION_NAMES,
    ROLE_NAMES,
    SUMMARIES,
    THINK,
    Columns,
    Parts,
    chosen,
    columns,
    left_over,
    names_a_file,
    parts_of,
    squashed,
)
from .literals import parse_list
from .mojibake import doctor
from .tools import agreed_call, agreed_tools, call_text
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
    wants_a_look,
)

__all__ = ["HANDLERS", "INFILLING", "Columns", "Reader", "Row", "RowError", "columns", "kind"]

Row = Mapping[str, Any]

# HANDLER: short names, and those of the field; what each reads
HANDLERS = {
    "auto": "auto",
    "text": "text", "GeneralPretrainHandler": "text",
    "alpaca": "pair", "AlpacaStyleInstructionHandler": "pair",
    "prompt-completion": "pair", "PromptCompletionHandler": "pair",
    "sharegpt": "messages", "ShareGPTStyleHandler": "messages",
    "openai": "messages", "OpenAIMessagesHandler": "messages",
}  # fmt: skip
# what a refusal says that rows may have
KNOWN = {
    "messages": ("messages", "conversations"),
    "pair": ("instruction with output", "prompt with completion", "question with answer"),
    "text": ("text",),
}
NO_ANSWER = "has a thought, and no answer behind it (it was cut off)"
INFILLING = "prefix/middle"  # what rows of prefix, suffix and middle are called
PLAIN_ROLES = {name: role for name, role in ROLE_NAMES.items() if role in (Role.USER, Role.ASSISTANT)}
THINK_NAMES = frozenset(map(squashed, THINK))


@dataclass
class Reader:
    """Reads rows. infill: they are to be written as prefix, suffix and middle. verdicts: what the mojibake doctor said of the
    strings of the last row. seen: named columns met. unused: (level, key) -> 1 for every key of the last row that was not used.
    padded: rows are Arrow's, which puts null where an object lacks a field that others have."""

    columns: Columns = field(default_factory=Columns)
    handler: str = "auto"
    repair: bool = True
    infill: bool = False
    padded: bool = False
    verdicts: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    unused: dict[tuple[str, str], int] = field(default_factory=Counter)
    layouts: dict[tuple[str, ...], Parts] = field(default_factory=dict)
    pairs: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)  # see columns_of_plain_pair

    def read(self, row: Row) -> tuple[str, Dialogue | str]:
        """The schema's name, and a dialogue or a ready text. RowError if the row is none that can be used."""
        if self.verdicts:
            self.verdicts.clear()
        if self.unused:
            self.unused = Counter()
        cut: Any = ()
        if "row_idx" in row and isinstance(row.get("row"), dict):  # as the viewer of Hugging Face exports rows
            row, cut = row["row"], row.get("truncated_cells") or ()
        if "chat" in row or "mapping" in row:
            row = exports.row_of(row)
        if self.columns.named:
            row = lifted(row, self.columns.of_rows)
            self.seen.update(name for name in self.columns.of_rows if name in row)
        keys = tuple(row)
        parts = self.layout(keys)
        if not cut and (plain := self.plain_pair(row, keys, parts)) is not None:
            return plain
        form, names = self.recognise(row, parts)
        for name in parts.media:
            if is_medium(row[name], names_a_file(name)):
                raise RowError(
                    "not text",
                    f'has something in "{name}": {NOT_TEXT}. (To train the text alone: --map-keys \'{{"images": ""}}\')',
                )
        if form == "text":
            found: Dialogue | str = self.text(row[names[0]], names[0])
            check_text_only(found, f'its "{names[0]}"')
            schema, used = "text", names
        elif form == "pair":
            schema, found, used = self.pair(row, parts, *names)
        else:
            schema, found, used = self.conversation(row, parts, names[0])
        if short_ones := [name for name in used if name in cut]:
            raise RowError(
                "cut off", f'its "{short_ones[0]}" was cut off by the viewer that saved it: download the data'
            )
        for key in left_over(keys, used):
            if not is_nothing(row[key]):
                self.unused["column", key] = 1
        return schema, found

    def plain_pair(self, row: Row, keys: tuple[str, ...], parts: Parts) -> tuple[str, Dialogue] | None:
        """A row of nothing but a question, perhaps its second text, and an answer, which most pairs are: what the long way
        would give, sooner. Or None."""
        pair = self.pairs.get(keys)
        if pair is None:
            pair = self.pairs[keys] = self.columns_of_plain_pair(keys, parts)
        if not pair:
            return None
        prompt, query, response = pair
        question, answer, material = row[prompt], row[response], row[query] if query else ""
        if type(question) is not str or type(answer) is not str or type(material) is not str:
            return None
        for text in pair:
            text = row[text] if text else ""
            if wants_a_look(text) or "\r" in text or text.isspace() or (self.repair and not text.isascii()):
                return None
        if not question or not answer:
            return None
        for key in left_over(keys, pair):
            if not is_nothing(row[key]):
                self.unused["column", key] = 1
        messages = (Message(Role.USER, question, material=material), Message(Role.ASSISTANT, answer))
        return self.name_of_pair(prompt, response), Dialogue(messages)

    def columns_of_plain_pair(self, keys: tuple[str, ...], parts: Parts) -> tuple[str, ...]:
        """Question, second text and answer of rows with these keys; () where other columns may have a say, whatever they hold."""
        if len(self.pairs) > 4096:
            self.pairs.clear()
        others = (
            parts.messages,
            parts.texts,
            parts.system,
            parts.think,
            parts.tools,
            parts.calls,
            parts.flags,
            parts.history,
        )
        prompts = [name for name in parts.prompts if name not in parts.materials]
        one_of_each = len(prompts) == len(parts.responses) == 1 and len(parts.materials) < 2
        if HANDLERS[self.handler] not in ("auto", "pair") or any(others) or parts.media or not one_of_each:
            return ()
        if squashed(parts.responses[0]) == "answers" or columns_of_choices(keys) or liked(keys):
            return ()
        return prompts[0], parts.materials[0] if parts.materials else "", parts.responses[0]

    def name_of_pair(self, prompt: str, response: str) -> str:
        return "alpaca" if (prompt, response) == ("instruction", "output") else f"{prompt}/{response}"

    def layout(self, keys: tuple[str, ...]) -> Parts:
        """The parts that the columns of a row play, MAP_KEYS considered."""
        found = self.layouts.get(keys)
        if found is None:
            if len(self.layouts) > 4096:  # rows with keys of their own each
                self.layouts.clear()
            found = self.layouts[keys] = chosen(parts_of(keys), self.columns.given, keys)
        return found

    def recognise(self, row: Row, parts: Parts) -> tuple[str, tuple[str, ...]]:
        """messages, pair or text, and the columns that tell it. Exports of several kinds have all the columns, and null in
        those that are not used."""
        wanted, given = HANDLERS[self.handler], self.columns.given
        certain = {given["messages"]} if "messages" in given else set()
        empty: tuple[str, tuple[str, ...]] | None = None
        if wanted in ("auto", "messages"):
            for name in parts.messages:
                sure = name in certain or squashed(name) in CERTAIN_MESSAGES
                if row[name] is not None and (sure or turns.looks_like_turns(row[name])):
                    return "messages", (name,)
                if sure:
                    empty = empty or ("messages", (name,))
            for name in parts.prompts:
                if isinstance(row[name], dict) and isinstance(row[name].get("replies"), list):
                    return "messages", (name,)
        if wanted in ("auto", "pair") and (pair := self.pair_of(row, parts)):
            if row[pair[0]] is not None:
                return "pair", pair
            empty = empty or ("pair", pair)
        if wanted in ("auto", "text"):
            for name in parts.texts:
                sure = name == given.get("text") or squashed(name) in CERTAIN_TEXTS
                if row[name] is not None and (sure or wanted == "text" or isinstance(row[name], str)):
                    self.refuse_single_message(row, parts)
                    if wanted == "auto" and "text" not in given and (answer := answer_to_text(row, name, sure)):
                        return "pair", (name, "", answer)
                    return "text", (name,)
                if sure:
                    empty = empty or ("text", (name,))
        if empty:
            return empty
        if any(isinstance(row[key], str) for key in parts.said):
            self.refuse_single_message(row, parts)
        has = ", ".join(map(repr, list(row)[:6])) or "nothing"
        known = ", ".join(name for part in KNOWN if wanted in ("auto", part) for name in KNOWN[part])
        hint = advice(row, parts).strip() if wanted == "auto" else ""
        raise RowError("unknown columns", f"has none of the keys {known}; it has {has}{'. ' if hint else ''}{hint}")

    def pair_of(self, row: Row, parts: Parts) -> tuple[str, ...] | None:
        """The columns of question, second text ("" for none) and answer; None if the row has no pair."""
        given = self.columns.given
        if "prefix" in row and "middle" in row:  # code to be filled in
            return "prefix", "suffix" if "suffix" in row else "", "middle"
        calls = [name for name in parts.calls if not is_nothing(row[name])]
        best = None
        for prompt in parts.prompts:
            answers = [name for name in (*parts.responses, *calls) if name != prompt]
            if not answers:
                continue
            said_something = [name for name in answers if not is_nothing(row[name])]
            response = (said_something or [name for name in answers if row[name] is not None] or answers)[0]
            complete = row[prompt] is not None and row[response] is not None
            if best is None or complete:
                best = prompt, response
            if complete:
                break
        if best is None:
            return None
        prompt, response = best
        materials = [name for name in parts.materials if name not in best]
        if (
            "prompt" not in given
            and squashed(prompt) not in QUESTION_NAMES
            and squashed(prompt) not in ("user", "human")
        ):
            # an instruction beside a question: both are needed
            materials += [p for p in parts.prompts if squashed(p) in QUESTION_NAMES and p not in best]
        if "query" in given:
            materials = [name for name in parts.materials if name == given["query"]]
        material = next((name for name in materials if not is_nothing(row[name])), "")
        return prompt, material, response

    def refuse_single_message(self, row: Row, parts: Parts) -> None:
        """RowError if a text is one message of a dialogue whose other messages are other rows."""
        for key in parts.speaker:
            if isinstance(row[key], str) and row[key].strip().lower() in ROLE_NAMES and squashed(key) != "author":
                raise RowError(
                    "single message",
                    f'is one message ("{key}" is {row[key]!r}). Rows of one conversation are put together by a column '
                    "conversation_id, or message_id and parent_id",
                )

    # ---- values ----

    def string(self, value: str) -> str:
        if "\r" in value:
            value = one_line_end(value)
        if self.repair and not value.isascii():
            value, verdict = doctor(value)
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

    def optional(self, row: Row, name: str) -> str:
        """A column that may be absent, null or empty."""
        value = row.get(name) if name else None
        return "" if is_nothing(value) else self.text(value, name)

    def agreed(self, row: Row, names: Sequence[str], where: str = "its", structured: bool = False) -> str:
        """The text of a part that may have several names. RowError where two of them disagree."""
        found = [(name, self.text(said(row[name]), name, structured)) for name in names if not is_nothing(row[name])]
        for name, text in found[1:]:
            if text.strip() != found[0][1].strip():
                first = found[0]
                raise RowError(
                    "two values", f'{where} "{first[0]}" and "{name}" disagree: {short(first[1])} and {short(text)}'
                )
        return found[0][1] if found else ""

    def flag(self, one: Row, names: Sequence[str], where: str) -> bool | None:
        """Whether an answer is to be learnt, as the flags of a row or message say; None where they say nothing."""
        found: dict[str, bool] = {}
        for name in names:
            value = one[name]
            if is_nothing(value) or isinstance(value, list):
                continue
            learn = flag_word(value)
            if learn is None:
                raise RowError("wrong type", f"{where} has the {name} {value!r}; it must be 0 or 1")
            found[name] = learn != (squashed(name) == "masked")
        if len(set(found.values())) > 1:
            says = " and ".join(f"{name}={one[name]!r}" for name in found)
            raise RowError("two values", f"{where} has flags that disagree: {says}")
        return next(iter(found.values()), None)

    def flags_of_row(self, row: Row, names: tuple[str, ...]) -> tuple[bool | None, str, list[Any] | None]:
        """The flag of a whole row; the name of the column that has one flag for each message, and its list."""
        lists = {name: found for name in names if (found := list_of_flags(row[name], name))}
        first = next(iter(lists), "")
        for name, found in lists.items():
            if found != lists[first]:
                raise RowError("two values", f'its "{first}" and "{name}" disagree')
        return self.flag(row, [name for name in names if name not in lists], "it"), first, lists.get(first)

    # ---- rows of a question and an answer ----

    def pair(
        self, row: Row, parts: Parts, prompt: str, query: str, response: str
    ) -> tuple[str, Dialogue, tuple[str, ...]]:
        """A question with its second text, what came before (history), and the answer."""
        system_names = tuple(name for name in parts.system if name not in (prompt, query, response))
        think_names = tuple(name for name in thoughts_in(row, parts.think) if name not in (prompt, query, response))
        flag_names = flags_in(row, parts)
        found_names = (*system_names, *think_names, *parts.tools, *flag_names, *parts.history)
        used = (prompt, query, response, *found_names)
        schema = self.name_of_pair(prompt, response)
        row = {**row, response: self.one_answer(row[response], response)}
        if turns.have_roles(row[prompt]) or turns.have_roles(row[response]):  # messages on one side or both
            asked = row[prompt] if isinstance(row[prompt], list) else [{"role": "user", "content": row[prompt]}]
            said = (
                row[response] if isinstance(row[response], list) else [{"role": "assistant", "content": row[response]}]
            )
            dialogue = self.messages([*asked, *said], row, parts._replace(beside_messages=()))
            return schema, dialogue, tuple(name for name in used if name not in (query, *think_names, *parts.history))
        system, listed = tool_texts.tools_of_text(self.agreed(row, system_names))
        found = [Message(Role.SYSTEM, system)] if system else []
        for name in parts.history:
            if not is_nothing(row[name]):
                found += self.history(row[name], name)
        question, material = self.asked(row, prompt), self.asked(row, query, structured=True)
        if not question and not material:
            raise RowError("empty", f'its "{prompt}" is empty')
        if not question and not self.infill:
            question, material = material, ""
        for text, name in ((question, prompt), (material, query), (system, "system")):
            check_text_only(text, f'its "{name}"')
        found.append(Message(Role.USER, question, material=material))
        think, words, call = "", "", ""
        answer = row[response]
        if response in parts.calls or parts.tools and turns.is_call(answer):
            call = call_text("its call", answer, self.padded, self.unused)
        elif is_nothing(row[response]):
            raise RowError("empty", f'its "{response}" is empty')
        else:
            think, words = split_reasoning(self.text(answer, response, structured=True))
            if "<tool_call>" in words or "<functioncall>" in words:
                words, calls = tool_texts.calls_of_text(words)
                call = call_text("its call", calls, self.padded, self.unused) if calls else ""
            check_text_only(words, f'its "{response}"')
            if not words.strip() and not call:
                raise RowError("empty", NO_ANSWER if think else f'its "{response}" is empty')
        if response not in columns_of_choices(tuple(row)):
            refuse_choice(row, f"{question}\n{material}", words, f'its "{prompt}"')
        think = self.one_thought(think, bare_thought(self.agreed(row, think_names)), "its answer")
        if think and not call and not words.strip():
            raise RowError("empty", NO_ANSWER)
        tools = [(name, row[name]) for name in parts.tools] + [("system", listed)] * bool(listed)
        learn, list_name, flags = self.flags_of_row(row, flag_names)
        if flags is not None:
            if len(flags) not in (1, 2):
                raise RowError("wrong type", f'its "{list_name}" has {len(flags)} flags for a question and an answer')
            learn = flag_word(flags[-1])
            if learn is None:
                raise RowError("wrong type", f'its "{list_name}" has {short(flags[-1])}; it must be 0 or 1')
            learn = learn != (squashed(list_name) == "masked")
        found.append(Message(Role.ASSISTANT, words, think=think, learn=learn is not False, call=call))
        return (
            schema,
            Dialogue(tuple(found), agreed_tools(tools, self.padded, self.unused)),
            used,
        )

    def asked(self, row: Row, name: str, structured: bool = False) -> str:
        """A question or its second text. In rows for infilling blanks are words as well: a suffix may be a line break."""
        value = row.get(name) if name else None
        if self.infill and isinstance(value, str):
            return self.string(value)
        return "" if is_nothing(value) else self.text(value, name, structured)

    def one_answer(self, value: Any, name: str) -> Any:
        """An answer that is a message or a content in parts; of a list of texts, the only one; of a column "answers", which holds
        several that are right, the best (SQuAD: its first text; Nectar: that of rank 1)."""
        if isinstance(value, dict) and turns.have_roles([value]):
            return [value]
        if isinstance(value, list) and value and all(is_text_part(one) for one in value):
            return said(value)
        several = squashed(name) == "answers"
        if several and isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # in a cell of a table
            with contextlib.suppress(ValueError):
                words = self.one_answer(parse_list(value), name)
                return words if isinstance(words, str) else value
        texts = value["text"] if several and isinstance(value, dict) and "text" in value else value
        if texts == []:
            return ""
        if turns.is_messages(texts) and all(answer_key(one, several) for one in texts):
            if several:
                texts = sorted(texts, key=turns.rank_of)
            for one in texts:
                self.unused |= {
                    ("key of an answer", key): 1 for key in left_over(tuple(one), (answer_key(one, several), "rank"))
                }
            texts = [one[answer_key(one, several)] for one in texts]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return value
        if len(set(texts)) > 1 and not several:
            raise RowError(
                "several answers",
                f'its "{name}" is a list of {len(texts)} texts, and nothing tells the right one: leave one of them. (If the list '
                "itself is the answer, write it as one text)",
            )
        if len(set(texts)) > 1:
            self.unused["further text of the column", name] = 1
        return texts[0]

    def one_thought(self, inside: str, beside: str, where: str) -> str:
        if inside and beside and inside.strip() != beside.strip():
            raise RowError("two values", f"{where} has two thoughts that disagree: {short(inside)} and {short(beside)}")
        return inside or beside

    def history(self, value: Any, name: str) -> list[Message]:
        """What was said before: [question, answer] pairs, or messages."""
        rows = turns.parsed(value) if isinstance(value, str) else value
        if not isinstance(rows, list):
            raise RowError("wrong type", f'its "{name}" must be a list of [question, answer] pairs')
        if turns.is_messages(rows) or turns.are_role_pairs(rows, self.columns.roles):
            found = turns.normal(rows, self.columns.roles)
            return [m for i, one in enumerate(found, 1) if (m := self.message(i, one, found))]
        found = []
        for i, turn in enumerate(rows, 1):
            if not isinstance(turn, list) or len(turn) != 2:
                raise RowError("wrong type", f'turn {i} of its "{name}" must be a [question, answer] pair')
            found.append(Message(Role.USER, self.text(turn[0], f"{name}, question {i}")))
            think, words = split_reasoning(self.text(turn[1], f"{name}, answer {i}", structured=True))
            found.append(Message(Role.ASSISTANT, words, think))
        return found

    # ---- conversations ----

    def conversation(self, row: Row, parts: Parts, name: str) -> tuple[str, Dialogue, tuple[str, ...]]:
        value = turns.parsed(row[name]) if isinstance(row[name], str) else row[name]
        if isinstance(value, dict) and turns.has_branches(value if "replies" in value else value.get("prompt")):
            self.unused["part of the tree", "replies that are not the best"] = 1
        rows = turns.normal(self.renamed(value), self.columns.roles)
        answer = [key for key in parts.responses if key not in (name, *parts.said) and not is_nothing(row[key])]
        if answer:  # the columns of a pair beside the messages: an instruction among them is no system text
            parts = parts._replace(beside_messages=())
        roles = [self.role_of(one) for one in rows]
        if answer and Role.ASSISTANT not in roles and None not in roles:  # the answer has a column of its own
            value = self.one_answer(row[answer[0]], answer[0])
            rows = [*rows, *(value if turns.have_roles(value) else [{"role": "assistant", "content": value}])]
            answer = answer[:1]
        else:
            answer = []
        asked = next((one for one in rows if self.role_of(one) is Role.USER), {})
        words = [value.strip() for value in asked.values() if isinstance(value, str)]
        same = [key for key in parts.beside_messages if str(row[key]).strip() in words]  # the first question again
        parts = parts._replace(beside_messages=tuple(key for key in parts.beside_messages if key not in same))
        dialogue = self.messages(rows, row, parts)
        used = [
            name,
            *parts.system,
            *parts.tools,
            *flags_in(row, parts),
            *parts.beside_messages,
            *same,
            *answer,
        ]
        if thoughts := [key for key in thoughts_in(row, parts.think) if not is_nothing(row[key])]:
            answers = [i for i, m in enumerate(dialogue.messages) if m.role is Role.ASSISTANT]
            if (
                len(answers) == 1
            ):  # of several answers, nothing tells which one it belongs to: it is reported as not used
                used += thoughts
                last = dialogue.messages[answers[0]]
                think = self.one_thought(last.think, bare_thought(self.agreed(row, thoughts)), "its answer")
                changed = list(dialogue.messages)
                changed[answers[0]] = last._replace(think=think)
                dialogue = Dialogue(tuple(changed), dialogue.tools)
        return ("sharegpt" if "from" in rows[0] else name), dialogue, tuple(used)

    def renamed(self, value: Any) -> Any:
        """A conversation whose keys MAP_KEYS names (role, content), with the usual ones."""
        given = self.columns.of_messages
        if not given:
            return value
        if isinstance(value, dict) and turns.is_struct_of_lists(renamed_keys(value, given)):
            self.seen.update(name for name in given if name in value)
            return renamed_keys(value, given)
        if not turns.is_messages(value):
            return value
        value = [lifted(one, given) for one in value]
        self.seen.update(name for one in value for name in given if name in one)
        return [renamed_keys(one, given) for one in value]

    def messages(self, rows: Any, row: Row, parts: Parts) -> Dialogue:
        """A conversation from [{"role": ..., "content": ...}, ...], or "from" and "value"."""
        found: list[Message] = []
        answers = 0
        tools = [(name, row[name]) for name in parts.tools]
        learn, list_name, flags = self.flags_of_row(row, flags_in(row, parts))
        if flags is not None:
            rows = self.with_flags(rows, list_name, flags)
        if any(map(tool_texts.may_hold_tools, rows)):
            rows = [part for one in rows for part in tool_texts.apart(one, self.role_of(one))]
        system, listed = tool_texts.tools_of_text(self.agreed(row, (*parts.system, *parts.beside_messages)))
        tools += [("system", listed)] * bool(listed)
        if system:
            found.append(Message(Role.SYSTEM, system))
        unknown, pending = [] if self.columns.roles else None, ""
        for i, one in enumerate(rows, 1):
            if thought := self.lone_thought(one):  # belongs to the answer that follows
                pending = thought
                continue
            message = self.plain_message(one) or self.message(i, one, rows, unknown)
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
                if system and len(found) == 1:  # said in a column of its own and in the conversation
                    if system.strip() != message.content.strip():
                        says = f"{short(system)} and {short(message.content)}"
                        raise RowError("two values", f"has two system texts, in a column and as a message: {says}")
                    continue
            found.append(message)
        if pending:
            raise RowError("reasoning", "the last message is a thought, and no answer follows it")
        if not answers:
            raise RowError("no answer", f"the conversation has no assistant message{self.who_answers(rows, row)}")
        if columns_of_choices(tuple(row)):
            question = "\n".join(message.content for message in found if message.role is not Role.ASSISTANT)
            for message in found:
                if message.role is Role.ASSISTANT:
                    refuse_choice(row, question, message.content, "its question")
        return Dialogue(tuple(found), agreed_tools(tools, self.padded, self.unused))

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
        ) or turns.speaker_elsewhere(one)
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

    def message(self, i: int, one: Any, rows: Sequence[Any] = (), unknown: Any = None) -> Message | None:
        """Message i (from 1) of a conversation; None for a system message that says nothing, and for a role that ROLE_MAP
        leaves out."""
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
                raise self.unknown_role(i, name, rows)
        text_key = next((key for key in parts.said if one[key] is not None and key != speaker), None)
        content = one[text_key] if text_key else None
        if isinstance(content, dict) and isinstance(content.get("parts"), list):  # ChatGPT's export
            content = content["parts"]
        used = [key for key in (speaker, text_key) if key]
        for key in parts.media:
            if is_medium(one[key], names_a_file(key)):
                raise RowError("not text", f'message {i} ({name}) has something in "{key}": {NOT_TEXT}')
        think, call, think_names = "", "", ()
        structured = role in (Role.ASSISTANT, Role.TOOL) and isinstance(content, list) and not turns.are_parts(content)
        if isinstance(content, list) and not structured or turns.is_part(content):
            content, think = self.joined_parts(i, content if isinstance(content, list) else [content])
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
            return Message(role, content)
        try:
            inside, content = split_reasoning(content)
        except RowError as error:
            raise RowError(error.reason, f"{where} {error.message}") from None
        thoughts = bare_thought(self.agreed(one, think_names, f"{where}:")) if think_names else ""
        think = self.one_thought(self.one_thought(inside, think, where), thoughts, where)
        if not call and (not content or content.isspace()):
            raise RowError("empty", f"{where} {NO_ANSWER if think else 'is empty'}")
        learn = self.flag(one, parts.flags, where) if parts.flags else None
        if any(isinstance(one[key], list) for key in parts.flags):
            raise RowError("wrong type", f"{where} has a list of flags; a message has one, 0 or 1")
        return Message(role, content, think, learn=learn is not False, call=call)

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

    def unknown_role(self, i: int, name: Any, rows: Sequence[Any]) -> RowError:
        """What to say of a role that is not known, with the line that makes it known."""
        if not isinstance(name, str):
            line = proposed_message_keys([one for one in rows if isinstance(one, dict)])
            paste = (
                f"Say which of its keys is which: {line}"
                if line
                else 'If they are in turn, write texts alone: ["Hi", "Hello!"]'
            )
            return RowError(
                "unknown role", f"message {i} has {'no role' if name is None else f'the role {name!r}'}. {paste}"
            )
        others = [
            value
            for one in rows
            if isinstance(one, dict)
            for value in [next((one[key] for key in parts_of(tuple(one)).speaker if isinstance(one[key], str)), None)]
            if value
        ]
        paste = proposed_roles(others or [name])
        return RowError(
            "unknown role", f"message {i} has the role {name!r}; known are {known_roles()}. For others: {paste}"
        )

    def joined_parts(self, i: int, parts: Iterable[Any]) -> tuple[str, str]:
        """OpenAI's list of parts as text, and the thought in it; only text can be trained."""
        found, thoughts = [], []
        for part in parts:
            if isinstance(part, str):
                found.append(part)
                continue
            if not isinstance(part, dict):
                raise RowError("not text", f"message {i} has a part of type {kind(part)}; only text can be trained")
            named = parts_of(tuple(part))
            of_type = squashed(str(part.get("type", "")))
            is_thought = of_type in THINK_NAMES or of_type == "summarytext" or part.get("thought") is True
            held = next(
                (key for key in ("text", *named.think, "content", "summary") if isinstance(said(part.get(key)), str)),
                "",
            )
            if held and is_thought:
                thoughts.append(said(part[held]))
                used = ("type", "signature", "thought", held)
            elif held == "text":
                found.append(said(part["text"]))
                used = ("text", "type")
            elif held in named.think and not of_type:
                thoughts.append(said(part[held]))
                used = (held,)
            else:
                raise RowError(
                    "not text", f"message {i} has a part of type {part.get('type')}; only text can be trained"
                )
            if any(not is_nothing(part[key]) for key in named.media):
                raise RowError("not text", f"message {i} has a part with {named.media[0]}; {NOT_TEXT}")
            for key in left_over(tuple(part), used):
                if not is_nothing(part[key]):
                    self.unused["key of a content part", key] = 1
        return "\n".join(found), "\n".join(thoughts)


def answer_to_text(row: Row, text: str, sure: bool) -> str:
    """The column of an answer to a text that is no question (MBPP: code; AdGen: a summary); or "". sure: the text has the name of
    one. An answer that the text holds is a part of it, and one word of no letters is a label."""
    if not isinstance(row[text], str):
        return ""
    others = [name for name in left_over(tuple(row), (text,)) if not is_nothing(row[name])]
    for name in others:
        value, word = row[name], squashed(name)
        summary = not sure and len(others) == 1 and word in SUMMARIES
        if not isinstance(value, str) or not (summary or word in ANSWERS_TO_TEXTS):
            continue
        is_words = any(map(str.isalpha, value)) and value.strip() not in row[text]
        if is_words and (word != "code" or "\n" in value.strip() or "(" in value):
            return name
    return ""


def is_text_part(one: Any) -> bool:
    """Whether an object is a text of a content in parts."""
    return (
        isinstance(one, dict)
        and set(one) <= {"type", "text"}
        and isinstance(one.get("text"), str)
        and one.get("type", "text") in ("text", "output_text")
    )


# the keys of an object of a list of answers that hold its words; of a column "answers" others may as well
ANSWER_KEYS = ("content", "answer", "response", "output", "completion", "回答", "答案")
MORE_ANSWER_KEYS = ("answer_text", "text", "value", "body", "generated_text")


def answer_key(one: Row, several: bool) -> str:
    """The key of an answer's words in an object with nothing but them and what is said of them; or "". several: of a column
    "answers"."""
    names = (*ANSWER_KEYS, *MORE_ANSWER_KEYS) if several else ANSWER_KEYS
    found = [name for name in names if isinstance(one.get(name), str)]
    known = several or len(one) == 1 or not left_over(tuple(one), (*found, "rank", "index", "finish_reason"))
    return found[0] if found and known else ""


def tools_of_system(one: Row) -> list[tuple[str, Any]]:
    """The tools that a system message brings, by their keys."""
    return [(f"{name} of the system message", one[name]) for name in parts_of(tuple(one)).tools]


def said(value: Any) -> Any:
    """The text of a system text or thought that is an object or a list of parts (Gemini, Anthropic); else the value."""
    if isinstance(value, dict) and len(named := parts_of(tuple(value)).said) and value.get("type", "text") == "text":
        return said(value[named[0]])
    if (
        isinstance(value, list)
        and value
        and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in value)
    ):
        return "\n".join(one["text"] for one in value)
    return value


def renamed_keys(one: Row, given: Mapping[str, str]) -> Row:
    """A message with the keys that MAP_KEYS names under their usual names. What had such a name by itself is not used, and is
    reported as that."""
    there = {part: name for name, part in given.items() if name in one}
    kept = {
        f"{key} (MAP_KEYS takes {there[key]})" if key in there else key: value
        for key, value in one.items()
        if key not in there.values()
    }
    return {part: one[name] for part, name in there.items()} | kept


def lifted(row: Row, names: Iterable[str]) -> Row:
    """The row with what is inside an object beside the rest, where MAP_KEYS names it as "body.messages". RowError where a key
    inside and one beside the object disagree."""
    paths = {name: name.split(".") for name in names if "." in name and name not in row}
    found = {name: value for name, path in paths.items() if (value := inside(row, path)) is not ABSENT}
    if not found:
        return row
    outers = dict.fromkeys(paths[name][0] for name in found)
    rest = {key: value for key, value in row.items() if key not in outers}
    for outer in outers:
        left = without(row[outer], [paths[name][1:] for name in found if paths[name][0] == outer])
        for key, value in left.items():
            if is_nothing(rest.get(key)):
                rest[key] = value
            elif rest[key] != value and not is_nothing(value) and squashed(key) not in HARMLESS_NAMES:
                says = f"{short(rest[key])} and {short(value)}"
                raise RowError("two values", f'its "{key}" and "{outer}.{key}" disagree: {says}')
    return rest | found


ABSENT = object()


def inside(row: Any, path: Sequence[str]) -> Any:
    """What stands at the end of a path of keys; ABSENT where there is no such thing."""
    for key in path:
        if not isinstance(row, dict) or key not in row:
            return ABSENT
        row = row[key]
    return row


def without(row: Row, paths: Sequence[Sequence[str]]) -> Row:
    """An object without what stands at the ends of these paths."""
    gone = {path[0] for path in paths if len(path) == 1}
    deeper = {key: [path[1:] for path in paths if path[0] == key] for key in {p[0] for p in paths if len(p) > 1} - gone}
    return {
        key: without(value, deeper[key]) if key in deeper else value for key, value in row.items() if key not in gone
    }


def known_roles() -> str:
    return ", ".join(name for name in ROLE_NAMES if name.isascii())
