"""A user's template file. Sound: it writes any dialogue in pieces without gaps, whose roles cover the answers; it
survives being kept in a sidecar; its Jinja form is one, and writes the same prompt."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fuzz import mutate
from fuzz.harness import Harness, sound
from rwkv_peft.checkpoint.prompt_format import PromptFormat, quote_for_bash
from rwkv_peft.text import template_file
from rwkv_peft.text.chat_template import to_jinja
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import ENDINGS, Dialogue, Message, Template
from rwkv_peft.text.turns import overlooked_heading, spans_of_text

TOOLS = '[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]'
USER, ANSWER, TOOL = Role.USER, Role.ASSISTANT, Role.TOOL
CALL = '{"name": "f", "arguments": {"a": 1}}'
TURNS = (
    ((USER, "Hi"), (ANSWER, "Hello.")),
    ((Role.SYSTEM, "Be\n\nbrief."), (USER, "a", "", "b"), (ANSWER, "x", "why"), (USER, "c {{content}}"),
     (ANSWER, "{{content}}", "", "", False)),
    ((USER, "w"), (ANSWER, "", "", "", True, CALL), (TOOL, '{"t": 7}'), (TOOL, "x"), (ANSWER, "Seven.")),
)  # fmt: skip
DIALOGUES = [
    Dialogue(tuple(Message(*one) for one in turns), TOOLS * any(one[0] is TOOL for one in turns)) for turns in TURNS
]
NAMES = (
    *template_file.FIELDS, *template_file.RETIRED, "name", "system", "user", "assistant", "observation", "keep", "always", "fake",
    "compact", "indent", "{{content}}", "{{name}}", "{{arguments}}", "{{input}}", "{{description}}", "{{parameters}}",
    "User: {{content}}", "\n\n",
)  # fmt: skip


class It(Harness):
    longest = 1 << 12
    places = ("form.json",)

    def warm_up(self) -> None:
        self.environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        PromptFormat(Template("x", "User: {{content}}", "Assistant: {{content}}")).describe()

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        return mutate.of_json(data, random, other, NAMES)

    def read(self, data: bytes, folder: Path) -> str:
        path = folder / "form.json"
        path.write_bytes(data)
        form = template_file.load(path)
        again = Template.from_dict(json.loads(json.dumps(form.to_dict())))
        sound(again == form, "another template from the sidecar", form, again)
        for dialogue in DIALOGUES:
            for ending in ENDINGS.values():
                for is_open in (False, True):
                    texts, roles = form.render(dialogue, ending, is_open)
                    sound(len(texts) == len(roles) and all(texts), "empty pieces", texts, roles)
                learnt = "".join(t for t, r in zip(*form.render(dialogue, ending), strict=True) if r is Role.ASSISTANT)
                words = [m.content for m in dialogue.messages if m.role is Role.ASSISTANT and m.learn and not m.call]
                sound(all(w in learnt for w in words), "an answer that is not learnt", learnt, words)
            data = form.prompt(dialogue.messages, dialogue.tools).encode()
            spans = spans_of_text(data, form.headings)
            overlooked_heading(data, spans, form.headings)
        for eot in ENDINGS:
            asked = PromptFormat(form, eot, form.bos)
            reported = asked.describe()
            json.dumps(reported)
            quote_for_bash(reported["example_prompt"])
            sound(
                all(reported["stop"]) and all(0 <= i < 65536 for i in reported["stop_token_ids"]),
                "stops that are none",
                reported,
            )
        source = to_jinja(form, ENDINGS["doc"], False)
        try:
            made = self.environment.from_string(source).render(
                messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True, bos_token="", tools=None
            )
        except jinja2.TemplateSyntaxError as error:
            sound(False, "Jinja that is none", error, source[:300])
        wanted = form.prompt((Message(Role.USER, "Hi"),))
        sound(made == wanted, "Jinja that writes another prompt", made, wanted)
        return f"template {form.think} {form.json_style} {form.answer_in_user} {bool(form.format_tool)}"
