"""How a model is asked and where its answers stop: what was trained, as its sidecar tells, for chat, samples and exports."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_peft.common.atomic_io import write_json
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.text import tokenizer
from rwkv_peft.text.preset_names import recorded, recorded_name
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import ENDINGS, Ending, Message, Template

from .base_template import known_by

BLANK_LINE = 261  # "\n\n"
SUFFIX = ".prompt.json"  # behind the name of an export
EXAMPLE = (Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "How are you?"))


@dataclass(frozen=True)
class Prompting:
    """template, eot: PROMPT_TYPE and EOT of the data. name: PROMPT_TYPE as it was written. bos: texts begin with token 0.
    blank_lines: answers of the data are known to hold blank lines, which the template does not tell (ready texts are taken as
    they are). assumed: why this is a guess, "" where the sidecar tells."""

    template: Template
    eot: str = "doc"
    bos: bool = False
    name: str = ""
    blank_lines: bool = False
    assumed: str = ""

    @property
    def ending(self) -> Ending:
        return ENDINGS[self.eot]

    @property
    def label(self) -> str:
        return f"PROMPT_TYPE={self.name or self.template.name}, EOT={self.eot}, BOS={int(self.bos)}"

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that begins a document."""
        return [tokenizer.END_OF_DOC] * self.bos + tokenizer.encode(text)

    @functools.cached_property
    def token_texts(self) -> dict[int, str]:
        """Tokens that end an answer wherever they come, and their texts: token 0, which has none, first."""
        words = [self.ending.answer, *self.template.stop_words]
        found = {tokenizer.END_OF_DOC: ""}
        found |= {ids[0]: word for word in words if word and len(ids := tokenizer.encode(word)) == 1}
        return found | ({BLANK_LINE: "\n\n"} if self.stops_at_blank_lines else {})

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return tuple(self.token_texts)

    @property
    def stops_at_blank_lines(self) -> bool:
        """Whether a blank line ends a turn: EOT=blank says so, or turns are parted by it and no answer holds one."""
        form = self.template
        parted = form.format_separator == "\n\n" and not form.answer_in_user and not form.patterns[Role.ASSISTANT].tail
        return self.eot == "blank" or (parted and Role.ASSISTANT in form.clean and not self.blank_lines)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer: the template's stop words, what EOT puts behind answers, and headings of a next turn."""
        unused = {end.answer for end in ENDINGS.values()} - {self.ending.answer}
        return tuple(text for text in self.template.stops() if text not in unused)

    @property
    def stop_strings_beside_tokens(self) -> tuple[str, ...]:
        """Those that a client must be given which knows the tokens: stop words of several tokens, and the user's next turn."""
        user = self.template.patterns[Role.USER].heading
        wanted = [
            text for text in self.stop_strings if text in self.template.stop_words or (user and text.endswith(user))
        ]
        return tuple(text for text in wanted if text not in self.token_texts.values())

    def describe(self) -> dict[str, Any]:
        """What <export>.prompt.json holds."""
        form = self.template
        return {
            "prompt_type": self.name or form.name,
            "eot": self.eot,
            "bos": int(self.bos),
            "example_prompt": form.prompt(EXAMPLE, ending=self.ending),
            "example_tokens": self.encode(form.prompt(EXAMPLE, ending=self.ending)),
            "stop_token_ids": list(self.stop_tokens),
            "stop": list(self.stop_strings),
            "sampling": {"temperature": form.temperature, "top_p": form.top_p, "top_k": form.top_k},
            "template": form.to_dict(),
            **({"assumed": self.assumed} if self.assumed else {}),
        }

    def write(self, target: Path) -> None:
        """The description beside an export, or in the folder that it is."""
        write_json(target / f"rwkv{SUFFIX}" if target.is_dir() else beside(target), self.describe())

    def metadata(self) -> dict[str, str]:
        """The same for the metadata of a safetensors file, whose values are texts."""
        return {"rwkv_prompt": json.dumps(self.describe(), ensure_ascii=False)}


def beside(target: Path) -> Path:
    return target.with_name(target.name + SUFFIX)


def of_sidecar(sidecar: Mapping[str, Any], where: str, base: Path) -> Prompting:
    """What a sidecar tells, {} for a model without one; what it does not tell is assumed. UserError for a template that cannot
    be used.

    where: how to call the sidecar. base: the file of the model or its base, which need not be there, for the assumption.
    """
    try:
        form = recorded(sidecar, where)
    except SettingErrors as problems:
        words = "; ".join(problem.message for problem in problems.problems)
        raise UserError(f"{where}: its prompt_type {recorded_name(sidecar)!r}: {words}") from None
    assumed = ""
    if form is None:
        form = known_by(base).template
        told = "nothing tells" if not sidecar else "the data were of different or unknown templates, so nothing tells"
        assumed = f"{told} which template the model was trained with: {form.name} is a guess by the name of {base.name}"
    return Prompting(
        form,
        sidecar.get("eot") if sidecar.get("eot") in ENDINGS else "doc",
        bool(sidecar.get("bos")),
        recorded_name(sidecar) or form.name,
        bool(sidecar.get("blank_lines")),
        assumed,
    )


def shell_text(text: str) -> str:
    """A text as bash reads it, on one line."""
    plain = shlex.quote(text)
    if text.isprintable():
        return plain
    escaped = (
        text.replace("\\", "\\\\")
        .replace("'", "\\'")
        .replace("\n", "\\n")
        .replace("\t", "\\t")
        .replace("\x17", "\\x17")
    )
    return f"$'{escaped}'"
