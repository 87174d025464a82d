"""What to say of a row whose columns or roles are not known.

That is the MAP_KEYS or ROLE_MAP line that makes it usable, or which columns are in question where none is clear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rwkv_peft.text.roles import Role

from .choices import columns_of_choices
from .keys import CALLS, HARMLESS_IN_MESSAGES, HARMLESS_NAMES, ROLE_NAMES, Parts, parts_of, squashed
from .values import RowError, TableRow

# who the unknown names of data sets most likely are: only for the ROLE_MAP line that a refusal proposes
LIKELY_ROLES = {
    "user": "buyer customer client caller patient student asker questioner player interviewer visitor guest speaker1 seeker "
            "questioner ask instruction input query "
            "客户 顾客 买家 买方 求助者 咨询者 来访者 应聘者 面试者 患者 学生 访客 玩家 甲",
    "assistant": "seller agent support doctor therapist teacher tutor operator advisor counselor expert answerer npc character "
                 "speaker2 response output answer staff "
                 "客服 医生 老师 专家 顾问 卖家 卖方 商家 店主 咨询师 心理咨询师 律师 面试官 坐席 角色 乙",
    "tool": "environment env executor terminal result results api search browser interpreter 环境 结果",
    "system": "narrator context scenario setting instructions background 旁白 背景 设定",
}  # fmt: skip
LIKELY = {word: role for role, words in LIKELY_ROLES.items() for word in words.split()}

# what a text of turns begins a line with, in rows that hold a whole talk as one text
TALK = re.compile(r"^\s*(?:USER|User|Human|HUMAN|用户|###\s*(?:Human|User))\s*[:：]", re.M)
# of several answers, words in the names of the better one, and of the worse ones
BETTER = frozenset(("chosen", "preferred", "accepted", "winner", "winning", "better"))
WORSE = frozenset(
    ("rejected", "reject", "wrong", "dispreferred", "nonpreferred", "loser", "losing", "worse", "worst", "incorrect")
)
# words in the names of columns that say something about a row, and are neither asked nor answered
ABOUT_A_ROW = (
    "label labels class title topic subtopic department name names intent sentiment emotion keyword keywords role id"
)
ABOUT = frozenset(ABOUT_A_ROW.split())
SAYS = frozenset(("message", "msg", "utterance", "turn"))  # message_1, message_2 are a question and its answer
NUMBERED = re.compile(r"(.*?)[_\- ]?([a-d]|[0-9]|j|k|w|l|x|y)\Z")
DIGITS = tuple("012345678")  # that may be the number of a choice
HEADER = "write a line with the names of the columns above it, like prompt,response"
SENTENCE = re.compile(r"[?!。？！…；，]|[.,;:] |\.\Z|\n|.{41}")


def seems_data(name: str) -> bool:
    """Whether the name of a column is more likely a cell of a first row that is data: a sentence, words, a number."""
    return bool(SENTENCE.search(name)) or len(name.split()) > 2 or not any(sign.isalpha() for sign in name)


def advice(row: Mapping[str, Any], parts: Parts) -> str:
    """What to do with a row of unknown columns, as a sentence, or ""."""
    texts = [name for name, value in row.items() if name and isinstance(value, str) and value.strip()]
    if any(SENTENCE.search(name) for name in row) and not any(isinstance(value, list | dict) for value in row.values()):
        return f"Its first line seems to be data: {HEADER}"
    if "mes" in row and "name" in row:
        return (
            "It is one message of a chat of SillyTavern: write one row for each chat, "
            '{"messages": [{"role": "user", "content": "Hi"}, ...]}'
        )
    if (choices := columns_of_choices(tuple(row))) and parts.prompts and not {*parts.responses} - {*choices}:
        others = [n for n in row if n not in choices and squashed(n) not in HARMLESS_NAMES]
        numbers = [n for n in others if str(row[n]).strip() in DIGITS]
        which = f" (nothing tells whether {named(numbers)} counts them from 0 or from 1)" if numbers else ""
        return (
            f"Its choices are in {', '.join(map(repr, choices))}: write the words of the right one into a column answer{which}, "
            "or them and the choices into messages"
        )
    usable = [n for n in row if n and squashed(n) not in HARMLESS_NAMES and not WORSE & set(words_of(n))]
    tip = (
        of_preferences(row, parts, usable)
        or of_objects(row, parts, usable)
        or of_texts(row, parts, [n for n in texts if n in usable])
    )
    line = f"Say which is which, for example {tip}" if tip.startswith("--") else tip
    if line and isinstance(row, TableRow) and not any(parts) and all(map(is_unknown, row)):
        line += f". But if that is data of the first line: {HEADER}"
    return line


def is_unknown(name: str) -> bool:
    """Whether a column has a name that says nothing."""
    return squashed(name) not in HARMLESS_NAMES and squashed(name) not in LIKELY and not ABOUT & set(words_of(name))


def better_answer(row: Mapping[str, Any]) -> str:
    """The column of the better one of several answers, by its name; or ""."""
    return next(
        (name for name in row if BETTER & (words := set(words_of(name))) and not WORSE & words and row[name]), ""
    )


def of_preferences(row: Mapping[str, Any], parts: Parts, usable: Sequence[str]) -> str:
    """The line for a row of several answers, one of which is the better one."""
    talks = alternatives([name for name in usable if isinstance(row[name], list)])
    if talks:
        return f"It has several conversations: name the one to be learnt as messages in MAP_KEYS, {named(talks)}"
    better = better_answer({name: row[name] for name in usable})
    if not better:
        return ""
    value = row[better]
    if isinstance(value, str) and TALK.search(value):
        return f"--convert-headings --map-keys {quoted({'text': better})}"
    has_question = isinstance(value, list) and any(is_of(one, Role.USER) for one in value)
    prompts = question_columns(row, parts)
    if has_question:
        return f"--map-keys {quoted({'messages': better})}"
    if prompts or any(isinstance(row[name], list) for name in parts.messages):
        return f"--map-keys {quoted({'response': better})}"
    if inner := talk_inside(row, usable):
        return f"--map-keys {quoted({'messages': inner, 'response': better})}"
    others = [n for n in said_columns(row, parts, usable) if n != better]
    if len(others) == 1:
        return f"--map-keys {quoted({'prompt': others[0], 'response': better})}"
    return (
        f'Its answer seems to be "{better}"; its question is {named(others)}'
        if others
        else f'"{better}" has no question'
    )


def of_objects(row: Mapping[str, Any], parts: Parts, usable: Sequence[str]) -> str:
    """The line for a row whose messages have a column of another name, or are inside an object."""
    talks = {n: row[n] for n in usable if isinstance(row[n], list) and row[n] and isinstance(row[n][0], dict)}
    for name, value in talks.items():
        if not is_talk(value[0]):
            continue
        if name in parts.prompts and all(is_of(one, Role.USER) for one in value):
            return f'"{name}" is a question, and there is no answer'
        return f"--map-keys {quoted({'messages': name})}"
    if inner := talk_inside(row, usable):
        return f"--map-keys {quoted({'messages': inner})}"
    if any(isinstance(row[n], list | dict) and row[n] for n in usable):
        return " "  # a shape of its own, which no names of columns make usable
    return ""


def talk_inside(row: Mapping[str, Any], usable: Sequence[str]) -> str:
    """Where an object of a row has messages, as MAP_KEYS names it; or ""."""
    for name in usable:
        for inner, value in row[name].items() if isinstance(row[name], dict) else ():
            if isinstance(value, list) and value and isinstance(value[0], dict) and is_talk(value[0]):
                return f"{name}.{inner}"
    return ""


def of_texts(row: Mapping[str, Any], parts: Parts, texts: Sequence[str]) -> str:
    """The line for a row of texts."""
    if talk := next((n for n in texts if TALK.search(row[n])), ""):
        return f"--convert-headings --map-keys {quoted({'text': talk})}"
    prompts, responses = question_columns(row, parts), [n for n in parts.responses if n in texts]
    others = [n for n in said_columns(row, parts, texts) if n not in (*prompts, *responses)]
    alike = alternatives(others)
    if alike and SAYS & set(words_of(alike[0])):
        return f"--map-keys {quoted({'prompt': alike[0], 'response': alike[1]})}"
    if alike:
        return f"It has several answers: name the one to be learnt as response in MAP_KEYS, {named(alike)}"
    if prompts and not responses:
        return one_of(others, "response", "answer", f'"{prompts[0]}" is a question, and there is no answer')
    if responses and not prompts:
        return one_of(others, "prompt", "question", f'"{responses[0]}" is an answer, and there is no question')
    by_role = {LIKELY.get(squashed(n), ""): n for n in reversed(others)}
    if "user" in by_role and "assistant" in by_role:
        return f"--map-keys {quoted({'prompt': by_role['user'], 'response': by_role['assistant']})}"
    if len(others) > 1:  # of many texts the two longest are what is asked and what is said
        longest = sorted(others, key=lambda name: -len(row[name]))[:2]
        asked, said = [n for n in others if n in longest]
        return f"--map-keys {quoted({'prompt': asked, 'response': said})}"
    if others and len(others) == len(texts) and not any(ABOUT & set(words_of(name)) for name in row):
        return f"--map-keys {quoted({'text': others[0]})}"
    return f"Say in MAP_KEYS what is text, or prompt and response: {named(texts)}" if others else ""


def one_of(names: Sequence[str], part: str, what: str, none: str) -> str:
    """The line for the only part that is missing."""
    role = "user" if part == "prompt" else "assistant"
    likely = [name for name in names if LIKELY.get(squashed(name)) == role] or names
    if len(likely) == 1:
        return f"--map-keys {quoted({part: likely[0]})}"
    return f"Say in MAP_KEYS which one is its {what} ({part}): {named(names)}" if names else none


def question_columns(row: Mapping[str, Any], parts: Parts) -> list[str]:
    """Return the columns that may be asked."""
    return [name for name in parts.prompts if row[name] and isinstance(row[name], str | list)]


def said_columns(row: Mapping[str, Any], parts: Parts, names: Sequence[str]) -> list[str]:
    """Return the columns of text that may be asked or answered, as far as their names show."""
    known = {*parts.system, *parts.think, *parts.tools, *parts.calls, *parts.flags, *parts.history, *parts.media}
    return [
        n for n in names
        if isinstance(row[n], str) and row[n].strip() and n not in known and not ABOUT & set(words_of(n))
    ]  # fmt: skip


def alternatives(names: Sequence[str]) -> list[str]:
    """Columns that differ in their last letter or number: response_a, response_b."""
    stems: dict[str, list[str]] = {}
    for name in names:
        if (numbered := NUMBERED.match(name.lower())) and numbered[1]:
            stems.setdefault(numbered[1], []).append(name)
    return next((some for some in stems.values() if len(some) > 1), [])


def is_of(one: Any, role: Role) -> bool:
    """Whether an object is a message of this role."""
    speaker = parts_of(tuple(one)).speaker if isinstance(one, dict) else ()
    return any(isinstance(one[key], str) and ROLE_NAMES.get(one[key].strip().lower()) is role for key in speaker)


def named(names: Sequence[str]) -> str:
    """Return column names for a message."""
    return " or ".join(f'"{name}"' for name in names[:6])


def words_of(name: str) -> list[str]:
    """Return the words of a name."""
    return re.findall(r"[a-z]+", name.lower())


def is_talk(one: Mapping[str, Any]) -> bool:
    """Whether an object of a list may be a message."""
    parts = parts_of(tuple(one))
    return bool(parts.speaker or parts.said) and "label" not in one  # (of pieces of a text with labels)


def proposed_message_keys(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the MAP_KEYS line for messages in which no known key has the speaker, or the text; "" if none is clear."""
    texts = {}
    for name in messages[0] if messages else ():
        values = [value for one in messages if isinstance(value := one.get(name), str)]
        if len(values) == len(messages):
            texts[name] = values
    said = [name for name in parts_of(tuple(texts)).said] or sorted(texts, key=lambda name: -sum(map(len, texts[name])))
    who = [name for name in texts if said and name != said[0] and len(set(texts[name])) < max(len(messages), 3)]
    if not who or squashed(who[0]) in HARMLESS_IN_MESSAGES:
        return ""
    keys = {"role": who[0]} | ({} if parts_of((said[0],)).said else {"content": said[0]})
    return f"--map-keys {quoted(keys)} {proposed_roles(texts[who[0]])}".rstrip()


def proposed_roles(names: Iterable[str]) -> str:
    """Return the ROLE_MAP line for the roles among these that are not known, as far as their names show who they are."""
    words = {name: name.strip().lower() for name in names}
    unknown = [name for name, word in words.items() if word not in ROLE_NAMES and word not in CALLS]
    there = {ROLE_NAMES[word].name.lower() for word in words.values() if word in ROLE_NAMES}
    guesses: dict[str, str] = {}
    for name in unknown:
        guesses[name] = LIKELY.get(squashed(name), "")
    rest = [role for role in ("user", "assistant") if role not in guesses.values() and role not in there]
    for name, role in guesses.items():
        if not role:
            guesses[name] = rest.pop(0) if rest else "user"
    return f"--role-map {quoted(guesses)}" if guesses else ""


def unknown_role(i: int, name: Any, rows: Sequence[Any]) -> RowError:
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


def known_roles() -> str:
    """Return the names of roles, for a message."""
    return ", ".join(name for name in ROLE_NAMES if name.isascii())


def quoted(value: Mapping[str, str]) -> str:
    """Return a mapping as JSON between single quotes, for bash."""
    text = json.dumps(value, ensure_ascii=False)
    return "'" + text.replace("'", "'\\''") + "'"
