"""The shapes that conversations have in data sets -> one list of messages with a role and a content each.

[{"role": "user", "content": "Hi"}, ...]                 as it is; other names of the keys are read by schemas.py
[{"human": "Hi", "assistant": "Hello"}, ...]             an object for each turn
[{"user": "Hi"}, {"assistant": "Hello"}]                 the role is the key
["Hi", "Hello", ...]                                     texts in turn, the user first (UltraChat)
[["Hi", "Hello"], ...]                                   pairs
{"role": ["user", "assistant"], "content": ["Hi", ...]}  one list for each key (Hugging Face's Sequence)
{"turn_1": {"Human": "Hi", "MOSS": "Hello"}, ...}        turns by number (MOSS)
{"prompt": {"text": ..., "replies": [...]}}              a tree (OASST): the path of the best replies
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import orjson

from rwkv_peft.text.roles import Role

from .json_repair import parse_list
from .keys import CALLS, ROLE_NAMES, parts_of, squashed
from .row_advice import LIKELY, proposed_roles
from .values import RowError, is_nothing, short

SHAPE = "its conversation must be a list of messages with at least one in it"
MOSS_TAGS = re.compile(r"\A\s*<\|[\w ]+\|>:?\s*|\s*<eo[a-z]>\s*\Z")
NUMBERED = re.compile(r"\D*(\d+)\Z")


def parsed(text: str) -> Any:
    """Return a list that is written in a text, as columns of tables have it."""
    try:
        return parse_list(text)
    except ValueError as error:
        words = f"its conversation must be a list of messages, or text of one, but the text {error}"
        raise RowError("wrong type", words) from None


def is_conversation_column(value: Any) -> bool:
    """Return whether a column has a conversation, where its name alone does not show it."""
    if isinstance(value, str):
        return value.lstrip()[:1] in ("[", "{")
    if isinstance(value, dict):
        return bool(value) and (is_struct_of_lists(value) or all(isinstance(v, dict) for v in value.values()))
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict | str | list) for one in value)


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def have_roles(value: Any) -> bool:
    """Whether a value is a list of messages that say who speaks."""
    return is_messages(value) and all(parts_of(tuple(one)).speaker and parts_of(tuple(one)).said for one in value)


def is_part(value: Any) -> bool:
    """Whether an object is one part of a content, like {"type": "text", "text": "Hi"}."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("type"), str)
        and "type" in value
        and len(value) > 1
        and (
            isinstance(value.get("text"), str)
            or value["type"] in value
            or value["type"] in ("image", "audio", "video", "file")
        )
    )


def is_call(value: Any) -> bool:
    """Whether an answer is a list of calls, {"name": ..., "arguments": ...}, or JSON text of one (xlam)."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return False
    return is_messages(value) and all(isinstance(one.get("name"), str) and "arguments" in one for one in value)


def are_parts(content: list[Any]) -> bool:
    """Whether a list is a content in parts, not a value of its own (what a tool gave back, say)."""
    return all(
        isinstance(one, str) or isinstance(one, dict) and ("type" in one or isinstance(one.get("text"), str))
        for one in content
    )


def is_struct_of_lists(value: Mapping[str, Any]) -> bool:
    """Return whether an object has lists of speakers and of texts."""
    lists = [key for key, one in value.items() if isinstance(one, list)]
    parts = parts_of(tuple(lists))
    return bool(parts.speaker and parts.said)


def are_pairs(rows: Any) -> bool:
    """Whether a list is of lists of two texts each."""
    return isinstance(rows, list) and all(
        isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], str) for one in rows
    )


def are_role_pairs(rows: Any, roles: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Return whether a list is of [role, text] pairs: some of the roles are known, by themselves or by ROLE_MAP.

    Raises:
        RowError: they may be roles that are not known, or some pairs begin with a role and others with something else.
    """
    if not isinstance(rows, list) or not all(
        isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) for one in rows
    ):
        return False
    names = [one[0].strip() for one in rows]
    known = [name.lower() in ROLE_NAMES or name.lower() in roles for name in names]
    if known[:1] == [True] or 2 * sum(known) > len(known):
        return True
    if any(known):
        role = names[known.index(True)]
        words = f"some pairs of its conversation begin with a role ({role!r}), others with a text ({short(names[0])})"
        raise RowError("unknown role", f'{words}. Write messages: {{"role": "user", "content": "Hi"}}')
    if may_be_speakers(names):
        words = f"its conversation is of pairs, which may be [speaker, text] of {' and '.join(map(short, dict.fromkeys(names)))}"
        raise RowError(
            "unknown role",
            f'{words}: {proposed_roles(names)}. (Pairs of question and answer are read as objects: {{"user": "Hi", '
            '"assistant": "Hello!"})',
        )
    return False


# words that questions begin with, and no name
FIRST_WORDS = (
    "hi hello hey yo thanks thank please yes no yeah yep nope ok okay sure fine great good nice cool wow sorry why what who "
    "how when where which continue more again next go stop help start begin bye goodbye welcome test really explain "
    "summarize translate elaborate done "
    "继续 接着 然后 还有 再来 换一个 下一个 更多 你好 您好 谢谢 再见 好 好的 嗯 对 是 是的 不 不是 可以 为什么"
)
GREETINGS = frozenset(FIRST_WORDS.split())
NAME = re.compile(r"[A-Z]\Z|[A-Z][a-z]+(?:[ _](?:[A-Z][a-z]*|\d{1,2}))?\Z")


def may_be_speakers(names: Sequence[str]) -> bool:
    """Whether the first texts of pairs may be who speaks: words that roles have, names of people, or a few that take turns."""
    words = [squashed(name) for name in names]
    if any(word in LIKELY for word in words):
        return True
    if any(name and name.lower().split()[0] in GREETINGS for name in names):
        return False
    if len(names) < 2 or any(len(name) > 24 or re.search(r"[.?!,;。？！，；…\n]", name) or not name for name in names):
        return False
    taking_turns = any(word in words[i + 2 :] for i, word in enumerate(words)) and len(set(words)) > 1
    return taking_turns or all(map(NAME.match, names))


def normal(rows: Any, roles: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
    """The messages of a conversation of any shape. roles: of ROLE_MAP. RowError if it has none."""
    if isinstance(rows, dict):
        rows = of_object(rows)
    if not isinstance(rows, list) or not rows:
        raise RowError("wrong type", SHAPE)
    if all(isinstance(one, str) for one in rows):
        return of_texts(rows)
    if all(isinstance(one, list) and len(one) == 2 for one in rows):
        if are_role_pairs(rows, roles):
            return [{"role": who, "content": words} for who, words in rows]
        return [m for pair in rows for m in of_texts(pair)]
    if isinstance(rows[0], dict) and ("role" in rows[0] or "from" in rows[0]):  # what most are
        return rows
    flat: list[Any] = []
    for one in rows:
        flat += of_turn(one) if isinstance(one, dict) else [one]
    return flat


def of_texts(texts: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages of texts that user and assistant say in turn. Raises RowError for one text."""
    if len(texts) < 2:
        raise RowError("no answer", "its conversation has one text, a question without an answer")
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def of_object(rows: dict[str, Any]) -> list[Any]:
    """A conversation that is one object."""
    if is_struct_of_lists(rows):
        lists = {key: value for key, value in rows.items() if not is_nothing(value)}
        sizes = {len(value) if isinstance(value, list) else -1 for value in lists.values()}
        if len(sizes) != 1 or -1 in sizes:
            raise RowError("wrong type", "its conversation is an object of lists, which must all be of one length")
        return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    if isinstance(rows.get("replies"), list):
        return of_tree(rows)
    if isinstance(rows.get("prompt"), dict) and isinstance(rows["prompt"].get("replies"), list):
        return of_tree(rows["prompt"])
    if parts_of(tuple(rows)).speaker:
        return [rows]
    numbers = {key: int(match[1]) for key in rows if (match := NUMBERED.match(str(key)))}
    if rows and len(numbers) == len(rows) and all(isinstance(value, dict) for value in rows.values()):
        return [rows[key] for key in sorted(rows, key=numbers.__getitem__)]
    if len(messages := of_turn(rows)) > 1:
        return messages
    raise RowError(
        "wrong type", f"{SHAPE}, not an object with {', '.join(map(repr, list(rows)[:4])) or 'nothing in it'}"
    )


def replies_of(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The replies to a message of a tree, the best first: by their ranks, those without one in their order behind them."""
    children = node.get("replies")
    alive = (
        [one for one in children if isinstance(one, dict) and not one.get("deleted")]
        if isinstance(children, list)
        else []
    )
    return sorted(alive, key=lambda one: rank_of(one))


def rank_of(one: dict[str, Any]) -> float:
    """The rank of a reply, also where it is written as text; infinite where it has none."""
    try:
        rank = float(one["rank"])
    except (KeyError, TypeError, ValueError):
        return math.inf
    return math.inf if math.isnan(rank) else rank


def has_branches(node: Any) -> bool:
    """Whether a tree of replies has more than one path."""
    while isinstance(node, dict):
        replies = replies_of(node)
        if len(replies) > 1:
            return True
        node = replies[0] if replies else None
    return False


def of_tree(node: dict[str, Any]) -> list[Any]:
    """The best path through a tree of replies."""
    messages = []
    while node:
        messages.append({key: value for key, value in node.items() if key != "replies"})
        replies = replies_of(node)
        node = replies[0] if replies else {}
    return messages


def of_turn(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of an object that has what several speakers say: the system first, then the user, then the assistant."""
    parts = parts_of(tuple(one))
    if any(isinstance(one[key], str | dict) for key in parts.speaker) or speaker_elsewhere(one):
        return [one]
    roles = {key: role for key in one if (role := role_of_key(key)) is not None}
    asked = [key for key in parts.prompts if key not in roles]
    answered = [key for key in parts.responses if key not in roles and key not in parts.said and key not in asked[:1]]
    if Role.USER not in roles.values() and asked and (answered or Role.ASSISTANT in roles.values()):
        roles[asked[0]] = Role.USER
    if Role.ASSISTANT not in roles.values() and answered and Role.USER in roles.values():
        roles[answered[0]] = Role.ASSISTANT
    if not roles:
        return [one]
    names = {Role.SYSTEM: "system", Role.USER: "user", Role.ASSISTANT: "assistant", Role.TOOL: "tool"}
    result = []
    rest = {
        key: without_moss_tags(value) for key, value in one.items() if key not in roles and not is_moss_nothing(value)
    }
    for role in (Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL):
        for key in (key for key, of in roles.items() if of is role):
            value = without_moss_tags(one[key])
            if not is_nothing(value) or role is Role.ASSISTANT:
                result.append({"role": names[role], "content": value})
                if role is Role.ASSISTANT:  # thoughts, flags, calls, and what is reported as not used
                    result[-1] |= {squashed_thought(k): v for k, v in rest.items()}
                    rest = {}
    if not result:
        return [one]
    result[-1] |= rest
    return result


def speaker_elsewhere(one: Mapping[str, Any]) -> str:
    """The key that says who speaks where a message has none of the usual ones: LangChain's type, a name; or ""."""
    for key in ("type", "name"):
        if isinstance(one.get(key), str) and one[key].strip().lower() in ROLE_NAMES:
            return key
    return ""


def role_of_key(key: str) -> Role | None:
    """Return the role that a key names, None if it names none."""
    word = key.strip().lower()
    return None if word in CALLS or squashed(word) in ("function", "functions") else ROLE_NAMES.get(word)


def squashed_thought(key: str) -> str:
    """Return the usual key of a thought."""
    return "thinking" if squashed(key) == "innerthoughts" else key


def without_moss_tags(value: Any) -> Any:
    """Remove the tags of MOSS from a text."""
    return MOSS_TAGS.sub("", value) if isinstance(value, str) and "<eo" in value else value


def is_moss_nothing(value: Any) -> bool:
    """Whether a value of MOSS's turns says None in its own words."""
    return isinstance(value, str) and "<eo" in value and without_moss_tags(value).strip() in ("None", "")
