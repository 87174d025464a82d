"""A row of any data set of the field -> a dialogue, or a text that is ready.

What a row is shows in its columns (keys.py); roles are read from their names, never from their places. A row that cannot be
used raises RowError with a reason (counted) and a sentence (shown); the caller knows the file and the line. Every key is used,
is harmless metadata, or is counted in `Reader.unused`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Dialogue, Message

from . import chat_exports, message_order, tool_texts
from .answers import answer_to_text, one_answer
from .choices import columns_of_choices, refuse_choice
from .conversations import NO_ANSWER, Row, Talks
from .keys import (
    CERTAIN_MESSAGES,
    CERTAIN_TEXTS,
    QUESTION_NAMES,
    ROLE_NAMES,
    Columns,
    Parts,
    chosen,
    columns,
    left_over,
    names_a_file,
    parts_of,
    squashed,
)
from .loss_flags import flag_word, flags_in, liked
from .mapped_columns import lifted
from .row_advice import advice
from .tools import agreed_tools, call_text
from .values import (
    NOT_TEXT,
    RowError,
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

__all__ = ["HANDLERS", "INFILLING", "Columns", "Reader", "Row", "RowError", "columns", "kind"]

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
SOLUTIONS = ("solution", "generatedsolution")  # columns of an answer with its reasons
NO_INPUT = (
    "<noinput>",
    "<no input>",
    "<No input>",
    "noinput",
    "No input",
    "N/A",
    "n/a",
)  # Alpaca's: there is no second text
OF_VIEWER = {"row", "row_idx", "truncated_cells"}  # keys around a row as the viewer of Hugging Face exports it
INFILLING = "prefix/middle"  # what rows of prefix, suffix and middle are called


@dataclass
class Reader(Talks):
    """Reads rows. infill: they are to be written as prefix, suffix and middle."""

    handler: str = "auto"
    infill: bool = False
    layouts: dict[tuple[str, ...], Parts] = field(default_factory=dict)
    pairs: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)  # see columns_of_plain_pair

    def read(self, row: Row) -> tuple[str, Dialogue | str]:
        """The schema's name, and a dialogue or a ready text. RowError if the row is none that can be used."""
        if self.verdicts:
            self.verdicts.clear()
        if self.unused:
            self.unused = Counter()
        cut: Any = ()
        if "row" in row and isinstance(row["row"], dict) and ("row_idx" in row or row.keys() <= OF_VIEWER):
            row, cut = row["row"], row.get("truncated_cells") or ()
        elif isinstance(row.get("truncated_cells"), list):
            cut = row["truncated_cells"]
        if "chat" in row or "mapping" in row:
            row = chat_exports.row_of(row)
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
            text = self.text(row[names[0]], names[0])
            check_text_only(text, f'its "{names[0]}"')
            content: Dialogue | str = text
            schema, used = "text", names
        elif form == "pair":
            schema, content, used = self.pair(row, parts, *names)
        else:
            schema, content, used = self.conversation(row, parts, names[0])
        if short_ones := [name for name in used if name in cut]:
            raise RowError(
                "cut off", f'its "{short_ones[0]}" was cut off by the viewer that saved it: download the data'
            )
        for key in left_over(keys, used):
            if not is_nothing(row[key]):
                self.unused["column", key] = 1
        return schema, content

    def plain_pair(self, row: Row, keys: tuple[str, ...], parts: Parts) -> tuple[str, Dialogue] | None:
        """Return the dialogue of a row of only a question, perhaps its second text, and an answer, as most pairs are; else None.

        It is what the full path would give, faster.
        """
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
        if not question or not answer or material in NO_INPUT:
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
        """Return the name of a pair's schema, for the report."""
        return "alpaca" if (prompt, response) == ("instruction", "output") else f"{prompt}/{response}"

    def layout(self, keys: tuple[str, ...]) -> Parts:
        """The parts that the columns of a row play, MAP_KEYS considered."""
        known = self.layouts.get(keys)
        if known is None:
            if len(self.layouts) > 4096:  # rows with keys of their own each
                self.layouts.clear()
            known = self.layouts[keys] = chosen(parts_of(keys), self.columns.given, keys)
        return known

    def recognise(self, row: Row, parts: Parts) -> tuple[str, tuple[str, ...]]:
        """Return messages, pair or text, and the columns that show it.

        Exports of several kinds have all the columns, and null in those that are not used.
        """
        wanted, given = HANDLERS[self.handler], self.columns.given
        certain = {given["messages"]} if "messages" in given else set()
        empty: tuple[str, tuple[str, ...]] | None = None
        if wanted in ("auto", "messages"):
            for name in parts.messages:
                sure = name in certain or squashed(name) in CERTAIN_MESSAGES
                if row[name] is not None and (sure or message_order.is_conversation_column(row[name])):
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
        if wanted in ("auto", "messages") and not left_over(tuple(row), parts.history):
            for name in parts.history:
                if message_order.is_conversation_column(row[name]):
                    return "messages", (name,)
        if self.columns.of_messages or any(isinstance(row[key], str) for key in parts.said):
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
        choices = columns_of_choices(tuple(row)) if "response" not in given else ()  # column A may be one of them
        best = None
        for prompt in parts.prompts:
            answers = [name for name in (*parts.responses, *calls) if name != prompt and name not in choices]
            if not answers:
                continue
            said_something = [name for name in answers if not is_nothing(row[name])]
            response = (said_something or [name for name in answers if row[name] is not None] or answers)[0]
            if squashed(response) in SOLUTIONS:  # it leads to the short answer beside it, unless it is the shorter one
                both = [name for name in said_something if squashed(name) in (*SOLUTIONS, "answer")]
                response = max(both or [response], key=lambda name: len(str(row[name])))
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
        mapped = [name for name, part in self.columns.of_messages.items() if part == "role" and name in row]
        for key in (*mapped, *parts.speaker):
            known = isinstance(row[key], str) and row[key].strip().lower() in ROLE_NAMES and squashed(key) != "author"
            if known or key in mapped:
                raise RowError(
                    "single message",
                    f'is one message ("{key}" is {row[key]!r}). Rows of one conversation are put together by a column '
                    'conversation_id (another name: --map-keys \'{"conversation_id": "NAME"}\'), or message_id and parent_id',
                )

    # ---- rows of a question and an answer ----

    def pair(
        self, row: Row, parts: Parts, prompt: str, query: str, response: str
    ) -> tuple[str, Dialogue, tuple[str, ...]]:
        """A question with its second text, what came before (history), and the answer."""
        system_names = tuple(name for name in parts.system if name not in (prompt, query, response))
        think_names = tuple(name for name in thoughts_in(row, parts.think) if name not in (prompt, query, response))
        flag_names = flags_in(row, parts)
        names_used = (*system_names, *think_names, *parts.tools, *flag_names, *parts.history)
        used = (prompt, query, response, *names_used)
        schema = self.name_of_pair(prompt, response)
        row = {**row, response: one_answer(row[response], response, self.unused)}
        if message_order.have_roles(row[prompt]) or message_order.have_roles(
            row[response]
        ):  # messages on one side or both
            asked = row[prompt] if isinstance(row[prompt], list) else [{"role": "user", "content": row[prompt]}]
            said = (
                row[response] if isinstance(row[response], list) else [{"role": "assistant", "content": row[response]}]
            )
            dialogue = self.messages([*asked, *said], row, parts._replace(beside_messages=()))
            return schema, dialogue, tuple(name for name in used if name not in (query, *think_names, *parts.history))
        system, listed = tool_texts.tools_of_text(self.agreed(row, system_names))
        messages = [Message(Role.SYSTEM, system)] if system else []
        for name in parts.history:
            if not is_nothing(row[name]):
                messages += self.history(row[name], name)
        question, material = self.asked(row, prompt), self.asked(row, query, structured=True)
        if material in NO_INPUT and not self.infill:
            self.verdicts.add("fault: noinput")
            material = ""
        if not question and not material:
            raise RowError("empty", f'its "{prompt}" is empty')
        if not question and not self.infill:
            question, material = material, ""
        for text, name in ((question, prompt), (material, query), (system, "system")):
            check_text_only(text, f'its "{name}"')
        messages.append(Message(Role.USER, question, material=material))
        think, words, call = "", "", ""
        answer = row[response]
        if response in parts.calls or parts.tools and message_order.is_call(answer):
            call = call_text("its call", answer, self.padded, self.unused)
        elif is_nothing(row[response]):
            raise RowError("empty", f'its "{response}" is empty')
        else:
            think, words = split_reasoning(self.text(answer, response, structured=True))
            if "<tool_call>" in words or "<functioncall>" in words:
                words, calls = tool_texts.calls_of_text(words)
                call = call_text("its call", calls, self.padded, self.unused) if calls else ""
                self.look_for_tools(words, Role.ASSISTANT)
            check_text_only(words, f'its "{response}"')
            if not words.strip() and not call:
                raise RowError("empty", NO_ANSWER if think else f'its "{response}" is empty')
        if response not in columns_of_choices(tuple(row)):
            refuse_choice(row, f"{question}\n{material}", words, f'its "{prompt}"')
        if beside := bare_thought(self.agreed(row, think_names)):
            think, words = self.one_thought(think, beside, "its answer"), unwrapped(words)
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
        messages.append(Message(Role.ASSISTANT, words, think=think, learn=learn is not False, call=call))
        return (
            schema,
            Dialogue(tuple(messages), agreed_tools(tools, self.padded, self.unused)),
            used,
        )

    def asked(self, row: Row, name: str, structured: bool = False) -> str:
        """A question or its second text. In rows for infilling blanks are words as well: a suffix may be a line break."""
        value = row.get(name) if name else None
        if self.infill and isinstance(value, str):
            return self.string(value)
        return "" if is_nothing(value) else self.text(value, name, structured)

    def history(self, value: Any, name: str) -> list[Message]:
        """What was said before: [question, answer] pairs, or messages."""
        rows = message_order.parsed(value) if isinstance(value, str) else value
        if not isinstance(rows, list):
            raise RowError("wrong type", f'its "{name}" must be a list of [question, answer] pairs')
        if message_order.is_messages(rows) or message_order.are_role_pairs(rows, self.columns.roles):
            past = message_order.normal(rows, self.columns.roles)
            return [m for i, one in enumerate(past, 1) if (m := self.message(i, one, past))]
        past = []
        for i, turn in enumerate(rows, 1):
            if not isinstance(turn, list) or len(turn) != 2:
                raise RowError("wrong type", f'turn {i} of its "{name}" must be a [question, answer] pair')
            past.append(Message(Role.USER, self.text(turn[0], f"{name}, question {i}")))
            think, words = split_reasoning(self.text(turn[1], f"{name}, answer {i}", structured=True))
            past.append(Message(Role.ASSISTANT, words, think))
        return past

    # ---- conversations ----

    def conversation(self, row: Row, parts: Parts, name: str) -> tuple[str, Dialogue, tuple[str, ...]]:
        """Return the schema, the dialogue and the used columns of a row with messages."""
        value = message_order.parsed(row[name]) if isinstance(row[name], str) else row[name]
        if isinstance(value, dict) and message_order.has_branches(value if "replies" in value else value.get("prompt")):
            self.unused["part of the tree", "replies that are not the best"] = 1
        rows = message_order.normal(self.renamed(value), self.columns.roles)
        answer = [key for key in parts.responses if key not in (name, *parts.said) and not is_nothing(row[key])]
        if answer:  # the columns of a pair beside the messages: an instruction among them is no system text
            parts = parts._replace(beside_messages=())
        roles = [self.role_of(one) for one in rows] if answer else []
        if answer and Role.ASSISTANT not in roles and None not in roles:  # the answer has a column of its own
            value = one_answer(row[answer[0]], answer[0], self.unused)
            rows = [*rows, *(value if message_order.have_roles(value) else [{"role": "assistant", "content": value}])]
            answer = answer[:1]
        else:
            answer = []
        same: list[str] = []
        if parts.beside_messages:
            asked: Row = next((one for one in rows if self.role_of(one) is Role.USER), {})
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
            ):  # of several answers, nothing shows which one it belongs to: it is reported as not used
                used += thoughts
                last = dialogue.messages[answers[0]]
                think = self.one_thought(last.think, bare_thought(self.agreed(row, thoughts)), "its answer")
                changed = list(dialogue.messages)
                changed[answers[0]] = last._replace(think=think)
                dialogue = Dialogue(tuple(changed), dialogue.tools)
        return ("sharegpt" if "from" in rows[0] else name), dialogue, tuple(used)
