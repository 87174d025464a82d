"""Which key of a row, of a message or of a part plays which role: the names that data sets use, in one place.

Names are compared without case, blanks, hyphens and underscores: "System Prompt", "system_prompt" and "systemPrompt" are one.
A key that has no part and is no harmless metadata is counted as not used (`Parts.other`), so nothing is dropped silently.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rwkv_peft.common import json_reader
from rwkv_peft.common.errors import SettingError, SettingErrors
from rwkv_peft.common.formatting import did_you_mean
from rwkv_peft.text.roles import Role

# names of those who speak, in messages
ROLE_NAMES = {
    "system": Role.SYSTEM, "developer": Role.SYSTEM, "系统": Role.SYSTEM, "系统提示": Role.SYSTEM, "系統": Role.SYSTEM,
    "user": Role.USER, "human": Role.USER, "prompter": Role.USER,
    "用户": Role.USER, "用戶": Role.USER, "使用者": Role.USER, "人类": Role.USER, "提问者": Role.USER, "问": Role.USER,
    "assistant": Role.ASSISTANT, "gpt": Role.ASSISTANT, "bot": Role.ASSISTANT, "model": Role.ASSISTANT,
    "chatgpt": Role.ASSISTANT, "ai": Role.ASSISTANT, "moss": Role.ASSISTANT, "chatbot": Role.ASSISTANT,
    "助手": Role.ASSISTANT, "助理": Role.ASSISTANT, "模型": Role.ASSISTANT, "机器人": Role.ASSISTANT, "答": Role.ASSISTANT,
    "ai助手": Role.ASSISTANT, "智能助手": Role.ASSISTANT, "回答者": Role.ASSISTANT, "人工智能": Role.ASSISTANT,
    "tool": Role.TOOL, "observation": Role.TOOL, "function": Role.TOOL, "function_response": Role.TOOL,
    "ipython": Role.TOOL, "tool_response": Role.TOOL, "tool_result": Role.TOOL, "工具": Role.TOOL, "函数": Role.TOOL,
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # roles of a message that is a tool call of the assistant
MESSAGES = ("messages", "conversations", "conversation")  # columns that hold a conversation
MORE_MESSAGES = (
    "dialogue",
    "dialog",
    "chat",
    "data",
    "contents",
    "items",
    "turns",
    "utterances",
    "对话",
    "對話",
    "会话",
    "消息",
)  # the same, where they hold a list
TEXTS = ("text", "文本", "正文")
MORE_TEXTS = ("content", "document", "内容", "內容")  # the same, where no other column says what a row is

PROMPTS = ("instruction", "prompt", "question", "query", "problem", "user", "human", "q", "input", "inputs", "questions",
           "指令", "问题", "問題", "提问", "提示", "用户", "输入", "问", "题目",
           "trans_instruction", "instruction_zh")  # fmt: skip
# columns that have a second text beside the prompt; the last ones are prompts themselves where there is no instruction
MATERIALS = ("input", "context", "输入", "上下文", "背景", "资料", "参考资料", "trans_input", "input_zh")
QUESTIONS = ("question", "query", "problem", "问题", "問題", "提问")
# (a solution leads to the short answer that may stand beside it)
RESPONSES = ("output", "completion", "response", "solution", "generated_solution", "answer", "assistant", "reply", "target",
             "targets", "bot", "gpt", "a", "answers", "content", "输出", "回答", "答案", "回复", "助手", "答", "回覆",
             "trans_output", "output_zh")  # fmt: skip

# the answer to a text that is no question: beside any text, and where the two are all that a row has
ANSWERS_TO_TEXTS = (
    "answer",
    "output",
    "response",
    "completion",
    "target",
    "reply",
    "code",
    "回答",
    "答案",
    "输出",
    "回复",
)
SUMMARIES = ("summary", "摘要", "总结")

SYSTEM = ("system", "system_prompt", "system_message", "system_text", "system_instruction", "sys_prompt",
          "meta_instruction", "系统", "系统提示", "系统提示词", "系统消息", "系统指令", "系統提示")  # fmt: skip
SYSTEM_BESIDE_MESSAGES = ("instruction", "指令")
THINK = ("think", "thinking", "thought", "reasoning", "reasoning_content", "cot", "chain_of_thought", "complex_cot",
         "rationale", "reasoning_text", "thinking_content", "think_content", "思考", "思考过程", "思维链", "推理",
         "推理过程")  # fmt: skip
TOOLS = ("tools", "functions", "available_tools", "工具", "工具列表", "函数")
TOOL_CALLS = ("tool_calls", "tool_call", "function_call", "function_calls")
FLAGS = (
    "weight",
    "loss",
    "train",
    "trainable",
    "masked",
    "loss_mask",
    "loss_masks",
    "train_mask",
    "loss_weight",
    "output_with_loss",
    "training",
)  # is an answer to be learnt?
HISTORY = ("history", "chat_history", "历史", "历史对话")
MEDIA = ("image", "images", "img", "imgs", "picture", "pictures", "audio", "audios", "video", "videos",
         "photo", "photos", "pixel_values", "frames", "media", "图片", "图像", "音频", "视频")  # fmt: skip
SPEAKER = ("role", "from", "speaker", "author", "sender", "角色", "说话人")
SAID = ("content", "value", "text", "message", "utterance", "parts", "内容", "文本")

# keys that say nothing a model could learn: they are left out without a word (docs/data.md lists them)
HARMLESS = (
    "id", "_id", "idx", "index", "uid", "uuid", "guid", "row_id", "row_index", "sample_id", "example_id", "prompt_id",
    "question_id", "task_id", "conversation_id", "conv_id", "dialog_id", "dialogue_id", "chat_id", "session_id", "thread_id",
    "message_id", "msg_id", "parent_id", "message_tree_id", "tool_call_id", "call_id", "user_id", "unnamed", "__index_level_0__",
    "source", "sources", "src", "dataset", "data_source", "dataset_name", "origin", "subset", "split", "file", "filename", "path",
    "url", "urls", "link", "lang", "language", "locale", "lang_code", "category", "categories", "topic", "topics", "subject",
    "domain", "type", "kind", "task", "task_type", "task_name", "tag", "tags", "author", "license", "copyright",
    "date", "time", "timestamp", "created", "created_at", "created_date", "create_time", "updated_at", "update_time", "model",
    "model_name", "generator", "engine", "teacher", "score", "scores", "quality", "rating", "difficulty", "rank", "upvotes",
    "num_turns", "turn_id", "n_turns", "length", "len", "tokens", "num_tokens", "n_tokens", "token_count", "word_count", "hash",
    "md5", "sha1", "sha256", "version", "metadata", "meta", "meta_data", "info", "annotations", "human_verified", "answer_from",
    "partition", "data_split", "dataset_split",
    "编号", "序号", "来源", "类别", "类型", "语言", "日期", "时间", "标签",
)  # fmt: skip


@functools.lru_cache(65536)
def squashed(name: str) -> str:
    """A name as the tables are compared: without case, blanks, hyphens, underscores and byte-order marks."""
    return re.sub(r"[\s\-_\ufeff\u200b]+", "", name).lower()


def table(names: Iterable[str]) -> dict[str, int]:
    """Squashed name -> its place in the list."""
    return {squashed(name): i for i, name in reversed(list(enumerate(names)))}


TABLES = {
    "messages": table((*MESSAGES, *MORE_MESSAGES)),
    "texts": table((*TEXTS, *MORE_TEXTS)),
    "prompts": table(PROMPTS),
    "materials": table(MATERIALS),
    "responses": table(RESPONSES),
    "system": table(SYSTEM),
    "think": table(THINK),
    "tools": table(TOOLS),
    "calls": table(TOOL_CALLS),
    "flags": table(FLAGS),
    "history": table(HISTORY),
    "media": table(MEDIA),
    "speaker": table(SPEAKER),
    "said": table(SAID),
}
HARMLESS_NAMES = frozenset(map(squashed, HARMLESS))
HARMLESS_IN_MESSAGES = HARMLESS_NAMES | {"name", "type"}
QUESTION_NAMES = frozenset(map(squashed, QUESTIONS))
BESIDE_MESSAGES = frozenset(map(squashed, SYSTEM_BESIDE_MESSAGES))
CERTAIN_MESSAGES = frozenset(map(squashed, MESSAGES))
CERTAIN_TEXTS = frozenset(map(squashed, TEXTS))


# ... and these words with what says where or how it is kept: image_path, audio_file, img_base64
MEDIUM = re.compile(
    r"(images?|imgs?|pictures?|photos?|audios?|videos?)(path|file|url|uri|bytes|base64|b64|data|filename|name)s?\Z"
)


def names_a_file(name: str) -> bool:
    """Whether a column is called a picture's, a sound's or a film's file."""
    return MEDIUM.match(squashed(name)) is not None


class Parts(NamedTuple):
    """The keys of an object by the part that each may play, in the order of the tables. A key may stand in several."""

    messages: tuple[str, ...]
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    materials: tuple[str, ...]
    responses: tuple[str, ...]
    system: tuple[str, ...]
    think: tuple[str, ...]
    tools: tuple[str, ...]
    calls: tuple[str, ...]
    flags: tuple[str, ...]
    history: tuple[str, ...]
    media: tuple[str, ...]
    speaker: tuple[str, ...]
    said: tuple[str, ...]
    beside_messages: tuple[str, ...]


@functools.lru_cache(4096)
def parts_of(keys: tuple[str, ...]) -> Parts:
    """The parts that these keys play."""
    by_part = {
        part: tuple(key for _, key in sorted((names[squashed(key)], key) for key in keys if squashed(key) in names))
        for part, names in TABLES.items()
    }
    by_part["media"] += tuple(key for key in keys if key not in by_part["media"] and MEDIUM.match(squashed(key)))
    return Parts(**by_part, beside_messages=tuple(key for key in keys if squashed(key) in BESIDE_MESSAGES))


@functools.lru_cache(4096)
def left_over(
    keys: tuple[str, ...], used: tuple[str, ...], harmless: frozenset[str] = HARMLESS_NAMES
) -> tuple[str, ...]:
    """The keys that are neither used nor harmless."""
    return tuple(key for key in keys if key not in used and squashed(key) not in harmless)


IN_MESSAGES = ("role", "content")  # keys of MAP_KEYS that name keys of messages
NOT_IN_ROWS = (*IN_MESSAGES, "conversation_id")  # the last one puts rows of one message together
MAPPABLE = (
    "prompt",
    "query",
    "response",
    "system",
    "history",
    "messages",
    "text",
    "tools",
    "think",
    "images",
    *NOT_IN_ROWS,
)


@dataclass(frozen=True)
class Columns:
    """What MAP_KEYS says: part -> the column of the data that plays it ("" for none). roles: ROLE_MAP, name -> role."""

    given: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Role | None] = field(default_factory=dict)

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that MAP_KEYS names: each must be somewhere in the data."""
        return (*self.of_rows, *self.of_messages)

    @functools.cached_property
    def of_rows(self) -> tuple[str, ...]:
        """Those of rows."""
        return tuple(name for part, name in self.given.items() if name and part not in NOT_IN_ROWS)

    @functools.cached_property
    def of_messages(self) -> Mapping[str, str]:
        """The keys of messages that MAP_KEYS names -> role or content."""
        return {name: part for part, name in self.given.items() if name and part in IN_MESSAGES}

    def __hash__(self) -> int:
        return hash((tuple(self.given.items()), tuple(self.roles.items())))


def columns(map_keys: str, role_map: str = "") -> Columns:
    """Read MAP_KEYS and ROLE_MAP.

    Args:
        map_keys: Like {"prompt": "question", "response": "reply"}, where "" leaves a part out.
        role_map: Like {"customer": "user"}, where "" leaves the messages of a role out.

    Raises:
        SettingErrors: one is wrong.
    """
    given = texts_of("MAP_KEYS", map_keys, '{"text": "content"}')
    unknown = [key for key in given if key not in MAPPABLE]
    if unknown:
        meant = did_you_mean(unknown[0], MAPPABLE)
        raise SettingErrors(
            SettingError("MAP_KEYS", f"has the key {unknown[0]!r}{meant}; known are {', '.join(MAPPABLE)}")
        )
    for some in ([p for p in given if p not in IN_MESSAGES], [p for p in given if p in IN_MESSAGES]):
        for i, part in enumerate(some):
            if given[part] and (twice := [other for other in some[:i] if given[other] == given[part]]):
                words = f"names {given[part]!r} as {twice[0]} and as {part}; a column can be only one of them"
                raise SettingErrors(SettingError("MAP_KEYS", words))
    roles: dict[str, Role | None] = {}
    for name, role in texts_of("ROLE_MAP", role_map, '{"customer": "user", "agent": "assistant"}').items():
        word = role.strip().lower()
        if word and word not in ROLE_NAMES:
            turned = name.strip().lower() in ROLE_NAMES
            meant = (
                f'; turn it round: {{"{role}": "{name}"}}' if turned else "; known are system, user, assistant, tool"
            )
            raise SettingErrors(SettingError("ROLE_MAP", f"maps {name!r} to {role!r}{meant}"))
        roles[name.strip().lower()] = ROLE_NAMES[word] if word else None
    return Columns(given, roles)


def texts_of(variable: str, value: str, example: str) -> dict[str, str]:
    """A setting that is a JSON object of texts; "" is an empty one. Problems if it is none."""
    if not value.strip():
        return {}
    try:
        given = json_reader.parse_json(value)
    except ValueError as error:
        raise SettingErrors(
            SettingError(variable, f"is not readable as JSON: it {error}; write it like {example}")
        ) from None
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise SettingErrors(SettingError(variable, f"must be an object of texts, like {example}"))
    return given


def chosen(parts: Parts, given: Mapping[str, str], keys: tuple[str, ...]) -> Parts:
    """The parts as MAP_KEYS wants them: a column that it names plays that part and no other."""
    if not given:
        return parts
    named = set(given.values())
    fields = {"prompt": "prompts", "query": "materials", "response": "responses", "text": "texts", "images": "media"}
    columns = {name: tuple(key for key in getattr(parts, name) if key not in named) for name in Parts._fields}
    for part, name in given.items():
        if part in NOT_IN_ROWS:
            continue
        columns[fields.get(part, part)] = (name,) if name in keys else ()
    return Parts(**columns)


def documented() -> str:
    """The lists of names as docs/data.md and docs/data_zh.md have them (Markdown)."""
    rows = {
        "conversation": (*MESSAGES, *MORE_MESSAGES),
        "text": (*TEXTS, *MORE_TEXTS),
        "question": PROMPTS,
        "second text": MATERIALS,
        "answer": RESPONSES,
        "system text": SYSTEM,
        "reasoning": THINK,
        "tools": TOOLS,
        "calls": TOOL_CALLS,
        "learnt or not": FLAGS,
        "history": HISTORY,
        "who speaks": SPEAKER,
        "what is said": SAID,
        "pictures, sound": MEDIA,
        "harmless": HARMLESS,
    }
    roles = {
        role: [name for name, of in ROLE_NAMES.items() if of is role] for role in dict.fromkeys(ROLE_NAMES.values())
    }
    lines = ["| part | names |", "|---|---|"]
    lines += [f"| {part} | {' '.join(f'`{name}`' for name in spellings)} |" for part, spellings in rows.items()]
    lines += [
        f"| role {role.name.lower()} | {' '.join(f'`{name}`' for name in spellings)} |"
        for role, spellings in roles.items()
    ]
    return "\n".join(lines)
