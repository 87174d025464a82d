"""Texts with marks of another tool: its headings of turns, its end tokens, line breaks that were escaped twice.

`look_at_text` and `look_at_turn` find them, `convert_text` and `convert_dialogue` (CONVERT_HEADINGS=1) rewrite them
where they can be read in one way only. `Suspects` finds from the tokens which rows are worth a closer look, at next to
no cost.

A heading counts where a line begins with it, and where a text has one of each side: a text that mentions "Q:" once has none.
Sources of the formats: the chat templates of Qwen (ChatML), Llama 2 and 3, Gemma, DeepSeek, Zephyr, Vicuna, OpenChat;
Stanford
Alpaca; BlinkDL/RWKV-LM RWKV7-G1x-templates.txt (Bot).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Dialogue, Message, split_thought
from rwkv_peft.text.turns import WORLD


class Kind(NamedTuple):
    """Something that another tool left in a row.

    Attributes:
        name: Of a row that has it.
        effect: What comes of it.
        instead: What to do where it is not rewritten.
        rewritten: CONVERT_HEADINGS=1 may rewrite it.
    """

    name: str
    effect: str
    instead: str
    rewritten: bool = True


KINDS = {
    "headings": Kind(
        "with headings of another format",
        "they are not read as turns, and their answers are not found",
        'Write such rows as "messages", or with "User:" and "Assistant:" behind empty lines',
    ),
    "inside": Kind(
        "with turns inside a question or an answer",
        "they are learnt as part of what is said",
        "Make each turn a message of its own, or name the speakers otherwise",
    ),
    "escaped": Kind(
        "with line breaks or characters written as letters",
        "the model learns a backslash and a letter",
        "Undo one level of escapes in the file",
    ),
    "markers": Kind(
        "with tokens of another model written as letters",
        "the model learns the letters; EOT ends rows by itself",
        "Take them out of the file",
    ),
    "html": Kind(
        "with tags that are escaped as in HTML",
        "they are no tags to the kit, and the model learns &lt; and &gt;",
        "Write < and > in their place",
        rewritten=False,
    ),
    "json": Kind(
        "with messages written as JSON inside a text",
        "the model learns brackets and keys",
        "Put the messages themselves in its place, without quotes around them",
        rewritten=False,
    ),
}
USER, ANSWER, SYSTEM, MATERIAL, OTHER = "user", "answer", "system", "material", "other"

# words before a colon, at the start of a line: kind of format -> side -> words
WORDS = {
    "chat": {
        USER: ["User", "Human", "用户", "用戶", "使用者", "人类", "人類", "ユーザー", "사용자", "Пользователь", "Usuario",
               "Utilisateur", "Benutzer", "Nutzer"],
        ANSWER: ["Assistant", "AI", "AI Assistant", "Bot", "Chatbot", "GPT", "ChatGPT", "助手", "助理", "AI助手",
                 "AI助理", "小助手", "智能助手", "机器人", "機器人", "模型", "アシスタント", "어시스턴트",
                 "Ассистент", "Asistente"],
    },
    "question": {
        USER: ["Q", "Question", "问", "問", "提问", "提問", "问题", "問題", "質問", "질문", "Вопрос", "Pregunta", "Frage"],
        ANSWER: ["A", "Answer", "答", "回答", "答案", "解答", "답변", "Ответ", "Respuesta", "Antwort", "Réponse"],
    },
    "instruction": {
        USER: ["Instruction", "Prompt", "指令", "指示"],
        MATERIAL: ["Input", "输入", "輸入"],
        ANSWER: ["Response", "Output", "输出", "輸出", "回复", "回應"],
    },
}  # fmt: skip
SYSTEMS = ["System", "系统", "系統", "システム"]
ANY_CASE = (
    "User",
    "Human",
    "Assistant",
    "AI Assistant",
    "System",
)  # a lower-case "model:" may stand in any list of settings
# what a turn may begin with by mistake, alone: more words would find sentences ("AI: a short history")
LEADING = {
    USER: {"user", "human", "用户", "用戶", "使用者"},
    ANSWER: {"assistant", "ai assistant", "助手", "ai助手", "助理", "答", "回答"},
}

SIDES: dict[str, tuple[str, str]] = {
    word.casefold(): (kind, side) for kind, sides in WORDS.items() for side, words in sides.items() for word in words
} | {word.casefold(): ("", SYSTEM) for word in SYSTEMS}
ALL_WORDS = sorted(
    [w for sides in WORDS.values() for words in sides.values() for w in words] + SYSTEMS, key=len, reverse=True
)
BARE = (
    "Instruction",
    "Input",
    "Response",
    "Human",
    "Assistant",
    "User",
    "指令",
    "输入",
    "输出",
    "回答",
    "用户",
    "助手",
)


def any_of(words: Sequence[str]) -> str:
    """Return a pattern for any of these words."""
    forms = [
        f"(?i:{re.escape(w)})"
        if w in ANY_CASE
        else "|".join(map(re.escape, dict.fromkeys((w, w.capitalize(), w.upper()))))
        for w in words
    ]
    return "|".join(forms)


# User:  用户：  **User**:  [User]:  <human>:  Q1:  【问】  "### Response" alone on its line, "### Human:" anywhere
COLON = re.compile(
    rf"^[ \t\u3000]*(?:\#{{1,4}}[ ]*)?\**[\[【<(（]?\**(?P<word>{any_of(ALL_WORDS)})[ ]?\d{{0,3}}"
    rf"\**(?:[\]】>)）]?\**[ ]?[:：]\**|】)"
    rf"|^\#{{2,4}}[ ]*(?P<bare>{any_of(BARE)})[ \t]*$"
    rf"|\#{{3}}[ ]*(?P<hash>{any_of(BARE)})[ ]?[:：]",
    re.M,
)
OPTIONS = re.compile(r"(?:^|[\s(（])[AB][.．:：、)）]", re.M)  # of a question whose answer may be a letter
OPTION_B = re.compile(r"^[ \t]*B[ ]?[.:：、)]", re.M)  # "A: ..." above "B: ..." is a choice, no answer

ROLE_WORDS = {
    "user": USER, "human": USER, "prompter": USER, "assistant": ANSWER, "model": ANSWER, "bot": ANSWER, "gpt": ANSWER,
    "moss": ANSWER, "system": SYSTEM, "developer": SYSTEM,
}  # fmt: skip
TAG = re.compile(
    r"<\|im_start\|>[ ]?(?P<chatml>\w+)[ \t]*\n?"
    r"|<\|start_header_id\|>\s*(?P<llama3>\w+)\s*<\|end_header_id\|>\s*"
    r"|<\|start\|>(?P<harmony>\w+)(?P<channel><\|channel\|>\w+)?<\|message\|>"
    r"|<[|｜](?P<role>(?i:user|assistant|system|prompter|human|bot|moss|model|observation|tool))[|｜]>:?\s*"
    r"|<start_of_turn>[ ]?(?P<gemma>\w+)[ \t]*\n?"
    r"|(?:GPT4(?:[ ]Correct)?)[ ](?P<openchat>User|Assistant):"
    r"|<(?P<together>human|bot)>:\s*"
    r"|(?P<flower>System|User|Bot)✿"
    r"|(?P<inst>\[INST\])\s*|(?P<endinst>\[/INST\])\s*"
)
NEAR = 16  # characters that are looked at before a place: whole texts would be copied for each
HEAD = 40  # characters in which a heading has its colon
TAG_SIGNS = ("<|", "<｜", "<start_of_turn>", "<human>", "<bot>", "[INST]", "✿", "GPT4 ")  # none of these: no TAG
VICUNA = re.compile(r"(?:^|(?<=\s)|(?<=</s>))(?P<word>USER|ASSISTANT):(?=\s|$)", re.M)
LLAMA_SYSTEM = re.compile(r"\A<<SYS>>(.*?)<</SYS>>\s*", re.S)
ALPACA = re.compile(r"\ABelow is an instruction that describes a task[^\n]*\n*\Z")
VICUNA_SYSTEM = re.compile(r"\AA chat between [^\n]*\Z")

END = (
    r"<\|(?:im_end|eot_id|eom_id|end_of_turn|end|endoftext|end_of_text|return|EOT|eos)\|>|<end_of_turn>|</s>|<eo[shm]>|\[EOS\]"
    r"|<[|｜]end▁of▁sentence[|｜]>"
)
BEGIN = r"<s>|<\|(?:begin_of_text|startoftext|bos)\|>|<bos>|\[BOS\]|<[|｜]begin▁of▁sentence[|｜]>|\[gMASK\](?:<sop>)?"
DOCUMENT_END = re.compile(r"<\|(?:endoftext|end_of_text)\|>|</s>|<eo[sm]>|\[EOS\]|<[|｜]end▁of▁sentence[|｜]>")
MARKER = re.compile(f"{END}|{BEGIN}")
MARKER_SIGNS = ("<|", "<｜", "s>", "<eo", "turn>", "[EOS]", "[BOS]", "[gMASK]")  # none of these: no MARKER
HTML = re.compile(r"&lt;(?:/?(?:think|thinking|tool_call|tool_response)|[|｜][\w▁ ]{1,40}[|｜])&gt;")
JSON = re.compile(
    r"\s*(?:\[\s*)?\{\s*([\"'])role\1\s*:\s*([\"'])(?:system|user|human|assistant|gpt)\2.*[}\]]\s*\Z", re.S
)
LAST = re.compile(rf"(?:{END}|{BEGIN}|✿|\#\#\# End)\Z")
LONGEST = 40  # characters of such a token
BEGINS_WITH = re.compile(rf"\A(?:\s*(?:{BEGIN}))+\s*")

STRING = re.compile(r'"(?:[^"\\\n]|\\.){0,300}"|(?<!\w)\'(?:[^\'\\\n]|\\.){0,300}\'|`[^`\n]{0,300}`')
# commands of LaTeX that begin with n, without it
LATEX_N = (
    "abla|atural|cong|e|earrow|eg|eq|equiv|ewblock|ewcommand|ewcounter|ewenvironment|ewlength|ewline|ewpage|ewtheorem|exists|geq|"
    "leq|less|gtr|mid|obreak|ocite|ode|oindent|olimits|oncommand|onumber|opagebreak|orm|ormalfont|ormalsize|ot|otag|otin|parallel|"
    "prec|sim|subset|subseteq|succ|u|ull|warrow"
)
# LaTeX, paths and patterns of grep have other letters behind backslashes, or a \\n among brackets
OTHER_COMMAND = re.compile(
    r'\[\^?\\[nrt]|\\[nrt][?+*\]]|\\(?!n|r|t|"|\\|/|u[0-9a-fA-F]{4})[A-Za-z]|\\[rt](?=[a-z]{2,}\b[^.]{0,80}[\\$])'
    rf"|\\n(?=(?:{LATEX_N})\b)|\b[C-Hc-h]:\\[a-z]"
)
TWO_BREAKS = re.compile(r"(?<=\S)(?<![`'\"(])(?:\\r)?\\n(?:\\r)?\\n(?=[^\s`'\")])")
ONE_BREAK = re.compile(
    r"(?<=\S)(?<![`'\"(])(?:\\r)?\\n(?:(?=[A-Z0-9\u00c0-\U0010ffff#*>|(\[“-])|(?<=[.,;:!?。！？，；：]\\n)(?=[a-z]))"
)
SENTENCE_BREAK = re.compile(r"(?<=[.!?。！？])\\n(?=[A-Z][a-z]+[ ,]|[\u3400-\u9fff])")  # one is enough
PLAIN_BREAK = re.compile(rf"(?<=[a-z0-9])\\n(?!(?:{LATEX_N})(?![a-z]))(?=[a-z])")
BREAK_AND_HEADING = re.compile(rf"\\n(?:{any_of(ALL_WORDS)})[ ]?[:：]")
BREAK_AT_LINE_END = re.compile(r"[^\s`'\"\\]\\n[ \t]*$", re.M)
CODE_POINTS = re.compile(r"\\u[0-9a-f]{4}\\u[0-9a-f]{4}", re.I)


class Finding(NamedTuple):
    """What a text holds. kind: one of KINDS. note: as it is written there. at: where, in characters."""

    kind: str
    note: str
    at: int


class Turn(NamedTuple):
    """A heading and what follows it. kind: of format. word: the heading as written."""

    kind: str
    side: str
    word: str
    start: int
    content: str
    gap: bool = False  # whether an empty line is before it


class Parsed(NamedTuple):
    """A text taken apart by headings. before: what is before the first one."""

    before: str
    turns: tuple[Turn, ...]

    def sides(self, kind: str = "") -> set[str]:
        """Return the sides that speak, in headings of one kind or of all."""
        return {turn.side for turn in self.turns if not kind or turn.kind == kind}


def parse(text: str) -> Parsed:
    """The turns of a text by tags if it has any, else by Vicuna's words, else by words before colons."""
    headings = []
    if any(sign in text for sign in TAG_SIGNS):
        headings = [(m.start(), m.end(), *tag_of(m)) for m in TAG.finditer(text)]
        if len({side for _, _, kind, side, _ in headings if kind == "inst"}) == 1:  # a text about [INST]
            headings = [one for one in headings if one[2] != "inst"]
    if not any(side in (USER, ANSWER) for *_, side, _ in headings):
        inline = list(VICUNA.finditer(text)) if "ASSISTANT:" in text else []
        if {m["word"] for m in inline} == {"USER", "ASSISTANT"} and any(
            not begins_line(text, m.start()) for m in inline
        ):
            headings = [(m.start(), m.end(), "vicuna", USER if m["word"] == "USER" else ANSWER, m[0]) for m in inline]
        else:
            headings = []
            for m in colon_headings(text):
                kind, side = SIDES[(m["word"] or m["bare"] or m["hash"]).casefold()]
                headings.append((m.start(), m.end(), kind, side, m[0].strip()))
            if {w for *_, w in headings} & {"A:", "A："} and OPTION_B.search(text):
                headings = [one for one in headings if one[2] != "question"]
    turns = tuple(
        Turn(kind, side, word, start, text[end : headings[i + 1][0] if i + 1 < len(headings) else len(text)],
             text[max(0, start - NEAR) : start].rstrip(" \t").endswith("\n\n"))
        for i, (start, end, kind, side, word) in enumerate(headings)
    )  # fmt: skip
    return Parsed(text[: turns[0].start] if turns else text, turns)


def colon_headings(text: str) -> Iterator[re.Match[str]]:
    """What COLON finds. It is tried where a line begins; only a text with ### is gone through character by character."""
    if "###" in text:
        yield from COLON.finditer(text)
        return
    at = 0
    for line in text.split("\n"):
        head = line[:HEAD]
        if (":" in head or "：" in head or "】" in head or "#" in head) and (m := COLON.match(text, at)):
            yield m
        at += len(line) + 1


def tag_of(m: re.Match[str]) -> tuple[str, str, str]:
    """kind, side and word of a tag."""
    if m["inst"] or m["endinst"]:
        return "inst", USER if m["inst"] else ANSWER, m[0].strip()
    group = m.lastgroup or ""
    kind = group if group != "channel" else "harmony"
    if m["channel"]:
        return kind, OTHER, m[0].strip()
    return kind, ROLE_WORDS.get(m[kind].casefold(), OTHER), m[0].strip()


def begins_line(text: str, at: int) -> bool:
    """Return whether a place is the first of its line."""
    return not text[text.rfind("\n", 0, at) + 1 : at].strip()


def is_tagged(parsed: Parsed) -> bool:
    """Return whether a text has the special tokens of a chat format."""
    return any(turn.kind not in ("", *WORDS, "vicuna") for turn in parsed.turns)


def look_at_text(text: str, own: Mapping[str, Role] = WORLD) -> list[Finding]:
    """What a ready text holds. own: the words that begin a turn there, with which nothing is wrong."""
    parsed, findings = parse(text), []
    headings = [turn for turn in parsed.turns if turn.side in (USER, ANSWER)]
    if is_tagged(parsed):
        foreign = headings if {USER, ANSWER} <= parsed.sides() or not parsed.before.strip() else []
    elif parsed.turns and parsed.turns[0].kind == "vicuna":
        foreign = headings
    else:
        kinds = [kind for kind in WORDS if {USER, ANSWER} <= parsed.sides(kind)]
        names = {word.casefold() for word in own}
        foreign = [t for t in headings if t.kind in kinds and bare(t.word).casefold() not in names]
        foreign += [t for t in headings if t.kind in kinds and t.word[:1] in "#*[【<(（" and t not in foreign]
    if foreign:
        findings.append(Finding("headings", names_of(foreign), foreign[0].start))
    return findings + look_at_letters(
        text, is_tagged(parsed) or bool(parsed.turns) and parsed.turns[0].kind == "vicuna"
    )


def look_at_letters(text: str, tagged: bool) -> list[Finding]:
    """Find line breaks that are written as letters, tokens of other tools, and escaped tags.

    tagged: the tokens belong to the text's format.
    """
    findings = []
    if (at := where_escaped(text)) >= 0:
        findings.append(Finding("escaped", "\\n" if "\\n" in text else text[at : at + 6], at))
    if not tagged and (marker := first_marker(text)):
        findings.append(Finding("markers", marker[0], marker.start()))
    if tag := HTML.search(text):
        findings.append(Finding("html", tag[0], tag.start()))
    if message := JSON.match(text):
        findings.append(Finding("json", " ".join(message[0][:20].split()), 0))
    return findings


def look_at_turn(text: str, role: Role, hard: bool) -> list[Finding]:
    """What the words of one turn hold. hard: whether an empty line in it, and a heading, ends it for those who chat."""
    findings, parsed = [], parse(text)
    if role in (Role.USER, Role.ASSISTANT, Role.UNTRAINED) and parsed.turns:
        side = USER if role is Role.USER else ANSWER
        first = parsed.turns[0]
        chat = {USER, ANSWER} <= parsed.sides("chat") or {USER, ANSWER} <= parsed.sides("instruction")
        led = not parsed.before.strip()
        closed = led and side == USER and parsed.turns[-1].side == ANSWER and not parsed.turns[-1].content.strip()
        leads = led and first.side == side and bare(first.word).casefold() in LEADING[side]
        tags = is_tagged(parsed) and (led or {USER, ANSWER} <= parsed.sides())
        vicuna = first.kind == "vicuna"
        ends = (
            hard
            and side == ANSWER
            and any(t.gap and t.word in ("User:", "Assistant:", "System:") for t in parsed.turns)
        )
        if chat or closed or leads or tags or vicuna or ends:
            findings.append(Finding("inside", names_of(parsed.turns), first.start))
    return findings + look_at_letters(text, bool(findings) and is_tagged(parsed))


def look_at_dialogue(messages: Sequence[tuple[Role, str]], hard: bool) -> list[Finding]:
    """What the turns of a dialogue hold, each kind once; the note of those inside a turn says whose it is."""
    findings: dict[str, Finding] = {}
    for i, (role, content) in enumerate(messages):
        if role in (Role.HEADING, Role.TOOL):
            continue
        alike = []
        if role is Role.USER and COLON.match(content):
            alike = answered_alike([Message(*m) for m in messages[i : i + 2]], 0)
        elif role is Role.ASSISTANT:
            alike = labelled(content, messages[i - 1][1] if i else "")
        for one in look_at_turn(content, role, hard) + alike:
            whose = "question" if role is Role.USER else "answer"
            note = f"{one.note} in {'an' if whose == 'answer' else 'a'} {whose}" if one.kind == "inside" else one.note
            findings.setdefault(one.kind, one._replace(note=note))
    return list(findings.values())


def labelled(answer: str, question: str) -> list[Finding]:
    """Find "Answer: ..." in an answer. "A: ..." does not count where the question has choices."""
    if not COLON.match(answer):
        return []
    parsed = parse(answer)
    if parsed.before.strip() or len(parsed.turns) != 1 or not parsed.turns[0].content.strip():
        return []
    [turn] = parsed.turns
    is_choice = bare(turn.word) in ("A", "a") and OPTIONS.search(question) is not None
    if turn.kind != "question" or turn.side != ANSWER or is_choice:
        return []
    return [Finding("inside", turn.word, turn.start)]


def why_left(text: str) -> str:
    """Why a text with headings of another format was not rewritten, where that is known."""
    parsed = parse(BEGINS_WITH.sub("", text))
    if not parsed.turns:
        return ""
    if stripped(parsed.before):
        return "text before its first heading"
    if any(not stripped(turn.content) for turn in parsed.turns if turn.side != OTHER):
        return "a turn without words"
    return "" if parsed.turns[-1].side == ANSWER else "no answer at its end"


def bare(word: str) -> str:
    """A heading without its colon, number and ornaments."""
    return word.strip("#*[]【】<>()（） :：\t\u3000").rstrip("0123456789 ")


def names_of(turns: Sequence[Turn]) -> str:
    """Return the headings of turns, for messages."""
    return " ".join(dict.fromkeys(turn.word for turn in turns[:8]))


def first_marker(text: str) -> re.Match[str] | None:
    """Return the first token of another tool that a text has as letters, but not where the text is about it."""
    if not any(sign in text for sign in MARKER_SIGNS):
        return None
    # HTML strikes words out with <s> and </s>
    strikes = text.count("</s>") <= text.count("<s>") and not (
        text.lstrip().startswith("<s>") and text.rstrip().endswith("</s>")
    )
    for m in MARKER.finditer(text):
        before, behind = text[max(0, m.start() - 2) : m.start()], text[m.end() : m.end() + 2]
        if m[0] in ("</s>", "<s>") and strikes:
            continue
        if before[-1:] in tuple("`'\"“「") or behind[:1] in tuple("`'\"”」"):
            continue
        if re.search(r"[a-z,;:(] \Z", before) and re.match(r" [a-z(]", behind):
            continue  # "GPT-2 writes <|endoftext|> between documents"
        return m
    return None


def where_escaped(text: str) -> int:
    r"""Return where a line break, or a character, begins that was escaped twice, as \n or \u4f60; -1 where there is none."""
    if "\\" not in text:
        return -1
    outside = STRING.sub(lambda m: "\0" * len(m[0]), text)
    if "\\n" in outside:
        heading = BREAK_AND_HEADING.search(outside)
        if heading:
            return heading.start()
        if "\n" not in text.strip():
            two, one = TWO_BREAKS.search(outside), ONE_BREAK.findall(outside)
            if not OTHER_COMMAND.search(outside):
                one += PLAIN_BREAK.findall(outside)
            if two or len(one) >= 2:
                return outside.index("\\n")
            if sentence := SENTENCE_BREAK.search(outside):
                return sentence.start()
        elif len(lines := list(BREAK_AT_LINE_END.finditer(outside))) >= 2 and 2 * len(lines) >= text.strip().count(
            "\n"
        ):
            return lines[0].start() + 1
    points = CODE_POINTS.search(outside)
    return points.start() if points else -1


# ------------------------------------------------------------------------------------------------------- conversion


def unescaped(text: str) -> str | None:
    """The text with one level of escapes undone, or None where that can be read in several ways, or is half a character."""
    if "\n" in text.strip() or OTHER_COMMAND.search(text):
        return None
    signs = {"\\r\\n": "\n", "\\n": "\n", "\\r": "\n", "\\t": "\t", '\\"': '"', "\\/": "/", "\\\\": "\\"}

    def plain(match: re.Match[str]) -> str:
        sign = signs.get(match[0])
        return sign or match[0].encode().decode("unicode_escape").encode("utf-16", "surrogatepass").decode("utf-16")

    try:
        return re.sub(r"(?:\\u[0-9a-fA-F]{4})+|\\r\\n|\\[nrt\"/\\]", plain, text)
    except UnicodeDecodeError:  # half of a surrogate pair
        return None


def dialogue_of(text: str) -> Dialogue | None:
    """A text whose turns have other headings, as a dialogue; None where it is none, or may be read otherwise."""
    parsed = parse(BEGINS_WITH.sub("", text))
    messages = messages_of(parsed)
    if not messages or messages[-1].role is not Role.ASSISTANT:
        return None
    return Dialogue(tuple(messages))


def messages_of(parsed: Parsed, open_end: bool = False) -> list[Message] | None:
    """The messages of a text that is nothing but turns: one kind of heading for each side, the sides in turn, none empty.

    open_end: an empty answer at the end is left out.
    """
    turns = list(parsed.turns)
    kinds = {turn.kind for turn in turns if turn.kind}
    if len(kinds) != 1:
        return None
    if open_end and len(turns) > 1 and turns[-1].side == ANSWER and not stripped(turns[-1].content):
        turns.pop()
    kind, before = kinds.pop(), stripped(parsed.before)
    result: list[Message] = []
    if before:
        if not (ALPACA.match(before) and kind == "instruction" or VICUNA_SYSTEM.match(before) and kind == "vicuna"):
            return None
        result.append(Message(Role.SYSTEM, before))
    by_side: dict[str, set[str]] = {}
    for turn in turns:
        by_side.setdefault(turn.side, set()).add(turn.word.rstrip(":：* ").rstrip("0123456789 "))
    if any(len(words) > 1 for side, words in by_side.items() if kind in WORDS):
        return None
    for side in by_side if kind in WORDS else ():
        if len({turn.gap for turn in turns[1:] if turn.side == side}) > 1:
            return None  # some after an empty line and some not: those may be part of what is said
    for turn in turns:
        content, last = stripped(turn.content), result[-1].role if result else None
        if kind == "inst" and turn.side == USER and (system := LLAMA_SYSTEM.match(content)):
            if result:
                return None
            result.append(Message(Role.SYSTEM, system[1].strip()))
            content, last = content[system.end() :], Role.SYSTEM
        if not content or MARKER.search(content):
            return None
        if turn.side == SYSTEM and not result:
            result.append(Message(Role.SYSTEM, content))
        elif turn.side == USER and last is not Role.USER:
            result.append(Message(Role.USER, content))
        elif turn.side == MATERIAL and last is Role.USER and not result[-1].material:
            result[-1] = result[-1]._replace(material=content)
        elif turn.side == ANSWER and last is Role.USER:
            think, words = split_thought(content)
            result.append(Message(Role.ASSISTANT, words, think))
        else:
            return None
    return result


def stripped(content: str) -> str:
    """The words of a turn without the tokens that end it."""
    return BEGINS_WITH.sub("", without_end(content)).strip()


def without_end(text: str) -> str:
    """The text without the tokens at its end."""
    text = text.rstrip()
    while m := LAST.search(text, max(0, len(text) - LONGEST)):
        text = text[: m.start()].rstrip()
    return text


def convert_text(text: str, own: Mapping[str, Role] = WORLD) -> tuple[list[str | Dialogue], set[str]]:
    """What a ready text becomes, and which KINDS were rewritten. Several documents where end tokens stood between them."""
    changed: set[str] = set()
    if where_escaped(text) >= 0 and (plain := unescaped(text)) is not None:
        text, changed = plain, {"escaped"}
    converted: list[str | Dialogue] = []
    for document in documents_of(text):
        if document != text:
            changed.add("markers")
        parsed = parse(document)
        own_spelling = all(bare(t.word) in own and t.word[-1:] == ":" and (t.gap or not t.start) for t in parsed.turns)
        if parsed.turns and not own_spelling and (dialogue := dialogue_of(document)):
            changed.add("headings")
            converted.append(dialogue)
        else:
            converted.append(document)
    return converted, changed


def documents_of(text: str) -> Iterator[str]:
    """The documents of a text that holds end tokens: one where these end turns, or where it has none."""
    if (
        not first_marker(text)
        or is_tagged(parsed := parse(text))
        or (parsed.turns and parsed.turns[0].kind == "vicuna")
    ):
        yield text
        return
    parts = [BEGINS_WITH.sub("", part).strip("\n") for part in DOCUMENT_END.split(text)]
    parts = [words for part in parts if (words := without_end(part))]
    yield from parts or [text]


def convert_dialogue(dialogue: Dialogue) -> tuple[Dialogue, set[str]]:
    """The dialogue with turns that stand inside its messages as messages of their own, and which KINDS were rewritten."""
    changed: set[str] = set()
    converted: list[Message] = []
    for i, message in enumerate(dialogue.messages):
        content = message.content
        if message.role not in (Role.SYSTEM, Role.USER, Role.ASSISTANT):
            converted.append(message)
            continue
        if where_escaped(content) >= 0 and (plain := unescaped(content)) is not None:
            content, changed = plain, changed | {"escaped"}
        if first_marker(content) and not is_tagged(parse(content)):
            plain = stripped(content)
            if plain and plain != content:
                content, changed = plain, changed | {"markers"}
        parsed = parse(content)
        if message.role is Role.USER and not message.material and parsed.turns:
            inside = look_at_turn(content, Role.USER, False) or answered_alike(dialogue.messages, i, parsed)
            several = messages_of(parsed, open_end=True) if inside and inside[0].kind == "inside" else None
            if several and several[-1].role is Role.USER and not (several[0].role is Role.SYSTEM and converted):
                changed = changed | {"inside"}
                converted += several
                continue
        if message.role is Role.ASSISTANT and len(parsed.turns) == 1 and not parsed.before.strip():
            [turn] = parsed.turns
            words = stripped(turn.content)
            leads = turn.side == ANSWER and bare(turn.word).casefold() in LEADING[ANSWER]
            if words and (leads or (turn.side == ANSWER and i and answered_alike(dialogue.messages, i - 1))):
                content, changed = words, changed | {"inside"}
        converted.append(message._replace(content=content))
    return (replace(dialogue, messages=tuple(converted)), changed) if changed else (dialogue, changed)


def answered_alike(messages: Sequence[Message], i: int, parsed: Parsed | None = None) -> list[Finding]:
    """Find "Q: ..." that is answered by "A: ...": each alone may be meant so, both are headings."""
    if i + 1 >= len(messages) or messages[i].role is not Role.USER:
        return []
    asked, answer = parsed or parse(messages[i].content), parse(messages[i + 1].content)
    for one, side in ((asked, USER), (answer, ANSWER)):
        if one.before.strip() or not one.turns or one.turns[0].side != side:
            return []
    if asked.turns[0].kind != answer.turns[0].kind:
        return []
    return [Finding("inside", names_of([asked.turns[0], answer.turns[0]]), 0)]


# ---------------------------------------------------------------------------------------------- which rows to look at

PAIR, NUMBER, TAGS, LETTERS, HASH, ALONE = 1, 2, 4, 8, 16, 128  # bits of the tables below
SEPARATORS = (b":", "：".encode(), b" :", " ：".encode(), b"**", "】".encode(), b"]:", b">:")
NUMBERED = ("Q", "Question", "问", "问题", "提问")
NEEDLES = ("<|", "<｜", "</s>", "<s>", "<eos>", "<eoh>", "<eom>", "<bos>", "[INST", "[/INST", "[EOS", "[BOS", "[gMASK",
           "<start_of_turn",
           "&lt;", '"role', "'role", "<end_of_turn", "<human>", "<bot>", "User✿", "Bot✿")  # fmt: skip


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a token may be a part of.

    Returns:
        What it may be the first part of, and the second, uint8 [65536] each (ALONE: it is all of it); and whether it
        may be the first part of anything, bool [65536].
    """
    first, second = np.zeros(65536, np.uint8), np.zeros(65536, np.uint8)
    table = tokenizer.token_bytes()
    # (a system's heading is worth nothing without another one)
    sides = [word for word in ALL_WORDS if word not in SYSTEMS]
    forms = {form for word in sides for form in (word, word.upper(), word.capitalize())}
    words = {form.encode() for form in forms | {word.lower() for word in ANY_CASE if word not in SYSTEMS}}
    ends: set[bytes] = set()
    nexts: set[bytes] = set()
    starts: set[bytes] = set()
    for needle in NEEDLES:
        ids = tokenizer.encode(needle)
        if len(ids) == 1:
            first[ids[0]] |= ALONE
            continue
        ends.add(table[ids[0]])
        (starts if len(ids) == 2 else nexts).add(table[ids[1]])
    endings, beginnings = tuple(ends), tuple(starts)
    for i, token in enumerate(table):
        # (a word may end a longer token, behind a blank or an ornament, but not be the end of a longer word)
        if token.lstrip(b" \t\n*#[(<") in words:
            first[i] |= PAIR
        if token.startswith(SEPARATORS):
            second[i] |= PAIR
        elif (
            token.endswith((b":", b"\xef\xbc\x9a"))
            and token.rstrip(b":").removesuffix(b"\xef\xbc\x9a").strip() in words
        ):
            first[i] |= ALONE
        if token.endswith(endings):
            first[i] |= TAGS
        if token in nexts or token.startswith(beginnings):
            second[i] |= TAGS
        if token.endswith(b"\\"):
            first[i] |= LETTERS
        elif b"\\n" in token or b"\\u" in token:
            first[i] |= ALONE
        if token.startswith((b"n", b"u", b"r")):
            second[i] |= LETTERS
        elif token[:1].isdigit():
            second[i] |= NUMBER
        if token.rstrip(b" ").endswith(b"##"):
            first[i] |= HASH
    for encoded_word in words:
        first[tokenizer.encode(encoded_word.decode())[-1]] |= PAIR
    for word in BARE:
        for form in (word, f" {word}", word.lower(), f" {word.lower()}"):
            second[tokenizer.encode(form)[0]] |= HASH
    for word in NUMBERED:
        first[tokenizer.encode(word)[-1]] |= NUMBER
    return first, second, first > 0


def suspects(ids: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Where something may begin in the tokens of rows, int64. What a template itself writes does not count.

    ids: intp [n], with a token behind the last row. roles: uint8 [n].
    """
    begins, follows, may_begin = tables()
    at = np.flatnonzero(may_begin.take(ids))
    at = at[at + 1 < len(ids)]
    first = begins[ids[at]]
    alone = first & ALONE > 0
    hit = (first & follows[ids[at + 1]]) > 0
    return at[alone | (hit & (roles[at + 1] != Role.HEADING))]
