"""Texts with the headings of other tools, and CONVERT_HEADINGS. Sound: what a text becomes holds no word that it has
not; findings lie inside the text; looking again at what was converted terminates and converts nothing that is a
dialogue."""

from __future__ import annotations

import re
from pathlib import Path

from fuzz.harness import Harness, sound
from rwkv_peft.preprocess import foreign_headings as heads
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Dialogue, Message
from rwkv_peft.text.turns import WORLD, overlooked_heading, spans_of_text


class It(Harness):
    cases = ("m07*", "m08*", "m09*", "k16*")
    words = (
        b"User: ", b"\n\nAssistant: ", b"\n\nUser: ", b"System: ", b"### Instruction:\n", b"### Response:\n",
        b"### Input:\n", b"<|im_start|>user\n", b"<|im_start|>assistant\n", b"<|im_end|>\n", b"[INST] ", b" [/INST] ",
        b"<<SYS>>\n", b"\n<</SYS>>", b"<s>", b"</s>", b"<|endoftext|>", b"USER: ", b" ASSISTANT: ", b"Q: ", b"\nA: ",
        b"\n\nQ: ", b"\n\n", b"\\n\\n", b"\\r\\n", b"\\u4f60", b"\\ud83d\\ude00", b"\\ud83d", b'\\"', b"<think>\n",
        b"\n</think>\n", b"<|start_header_id|>user<|end_header_id|>\n\n", b"<|eot_id|>",
        "\u7528\u6237\uff1a".encode(), "\n\u52a9\u624b\uff1a".encode(), "\u95ee\uff1a".encode(),
        "\n\u7b54\uff1a".encode(), b"<|user|>", b"<|assistant|>", b"Human: ", b"<start_of_turn>model\n",
        b"<end_of_turn>", b"**User:** ", b"<eos>", b"Option B: ", b"[EOS]", b"Bot\xe2\x9c\xbf", b"### Human: ",
    )  # fmt: skip

    def read(self, data: bytes, folder: Path) -> str:
        text = data.decode("utf-8", "replace")
        for one in heads.look_at_text(text):
            sound(0 <= one.at <= len(text) and one.kind in heads.KINDS, "a finding outside the text", one)
        spans = spans_of_text(text.encode(), WORLD)
        sound([s.start for s in spans[1:]] == [s.end for s in spans[:-1]], "turns with gaps", spans)
        overlooked_heading(text.encode(), spans)
        heads.why_left(text)
        plain = heads.unescaped(text) or text
        there = {*words_of(text), *words_of(plain)}
        made, changed = heads.convert_text(text)
        sound(made and changed <= {*heads.KINDS}, "kinds that are none", changed)
        for one in made:
            if isinstance(one, str):
                sound(one or not text, "an empty document", text)
                sound(one in text or one in plain, "a text that was not there", one)
                continue
            check(one, there)
            again, _ = heads.convert_dialogue(one)
            check(again, None)
        half = len(text) // 2
        talk = Dialogue((Message(Role.USER, text[:half]), Message(Role.ASSISTANT, text[half:])))
        heads.look_at_dialogue([(m.role, m.content) for m in talk.messages], bool(len(text) & 1))
        other, _ = heads.convert_dialogue(talk)
        sound(other.messages, "no messages", other)
        return f"{len(made)} {sorted(changed)}"


def check(one: Dialogue, there: set[str] | None) -> None:
    sound(all(m.content or m.think or m.call for m in one.messages), "an empty message", one)
    if there is None:  # (its messages may have been escaped twice)
        return
    words = {w for m in one.messages for part in (m.content, m.think, m.material) for w in words_of(part)}
    sound(all(any(w in known for known in there) for w in words - there), "words that were not there", words - there)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)
