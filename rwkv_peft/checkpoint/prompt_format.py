"""The prompt format of a model and where its answers stop, from its sidecar: for chat, samples and exports."""

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
from rwkv_peft.text.preset_names import recorded_name, recorded_template
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import ENDINGS, Ending, Message, Template

from .base_template import find_base_template

BLANK_LINE = 261  # "\n\n"
SUFFIX = ".prompt.json"  # added to the name of an export
EXAMPLE = (Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "How are you?"))


@dataclass(frozen=True)
class PromptFormat:
    """The prompt format of a model.

    Attributes:
        template: PROMPT_TYPE of the data.
        eot: EOT of the data.
        bos: texts begin with token 0.
        name: PROMPT_TYPE as it was written.
        blank_lines: answers of the data are known to hold blank lines, which the template does not show (texts that
            are already formatted are taken as they are).
        assumed: why this is a guess; "" if the sidecar records it.
    """

    template: Template
    eot: str = "doc"
    bos: bool = False
    name: str = ""
    blank_lines: bool = False
    assumed: str = ""

    @property
    def ending(self) -> Ending:
        """What EOT puts after answers and documents."""
        return ENDINGS[self.eot]

    @property
    def label(self) -> str:
        """The format as settings, for messages."""
        return f"PROMPT_TYPE={self.name or self.template.name}, EOT={self.eot}, BOS={int(self.bos)}"

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text that begins a document."""
        return [tokenizer.END_OF_DOC] * self.bos + tokenizer.encode(text)

    @functools.cached_property
    def token_texts(self) -> dict[int, str]:
        """Tokens that end an answer wherever they occur, and their texts. Token 0, which has none, comes first."""
        words = [self.ending.answer, *self.template.stop_words]
        texts = {tokenizer.END_OF_DOC: ""}
        texts |= {ids[0]: word for word in words if word and len(ids := tokenizer.encode(word)) == 1}
        return texts | ({BLANK_LINE: "\n\n"} if self.stops_at_blank_lines else {})

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(self.token_texts)

    @property
    def stops_at_blank_lines(self) -> bool:
        """Whether a blank line ends a turn: EOT=blank, or it separates turns and no answer holds one."""
        form = self.template
        parted = form.format_separator == "\n\n" and not form.answer_in_user and not form.patterns[Role.ASSISTANT].tail
        return self.eot == "blank" or (parted and Role.ASSISTANT in form.clean and not self.blank_lines)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer: the template's stop words, what EOT puts after answers, headings of a next turn."""
        unused = {end.answer for end in ENDINGS.values()} - {self.ending.answer}
        return tuple(text for text in self.template.stops() if text not in unused)

    @property
    def stop_strings_beside_tokens(self) -> tuple[str, ...]:
        """Stop strings for a client that knows the stop tokens: stop words of several tokens, the next user turn."""
        user = self.template.patterns[Role.USER].heading
        wanted = [
            text for text in self.stop_strings if text in self.template.stop_words or (user and text.endswith(user))
        ]
        return tuple(text for text in wanted if text not in self.token_texts.values())

    def describe(self) -> dict[str, Any]:
        """Return the content of <export>.prompt.json."""
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
        """Write the description beside an export, or into the folder if the export is one."""
        write_json(target / f"rwkv{SUFFIX}" if target.is_dir() else prompt_file(target), self.describe())

    def metadata(self) -> dict[str, str]:
        """Return the description as metadata of a safetensors file, whose values are texts."""
        return {"rwkv_prompt": json.dumps(self.describe(), ensure_ascii=False)}


def prompt_file(target: Path) -> Path:
    """Return the path of the description of an export."""
    return target.with_name(target.name + SUFFIX)


def read_prompt_format(sidecar: Mapping[str, Any], where: str, base: Path) -> PromptFormat:
    """Build the prompt format that a sidecar records; what it does not record is assumed.

    Args:
        sidecar: {} for a model without one.
        where: name of the sidecar in messages.
        base: the file of the model or of its base, for the assumption; it need not exist.

    Raises:
        UserError: the template cannot be used.
    """
    try:
        form = recorded_template(sidecar, where)
    except SettingErrors as problems:
        words = "; ".join(problem.message for problem in problems.problems)
        raise UserError(f"{where}: its prompt_type {recorded_name(sidecar)!r}: {words}") from None
    assumed = ""
    if form is None:
        form = find_base_template(base).template
        reason = "nothing tells" if not sidecar else "the data were of different or unknown templates, so nothing tells"
        assumed = (
            f"{reason} which template the model was trained with: {form.name} is a guess by the name of {base.name}"
        )
    eot = sidecar.get("eot", "")
    return PromptFormat(
        form,
        eot if eot in ENDINGS else "doc",
        bool(sidecar.get("bos")),
        recorded_name(sidecar) or form.name,
        bool(sidecar.get("blank_lines")),
        assumed,
    )


def quote_for_bash(text: str) -> str:
    """Quote a text for bash, on one line."""
    plain = shlex.quote(text)
    if text.isprintable():
        return plain
    escapes = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\x17": "\\x17"})
    return f"$'{text.translate(escapes)}'"
