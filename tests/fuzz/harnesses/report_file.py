"""NAME.report.json beside tokenized data, which says how they were made. Input: its JSON. Sound: what it shows is of
the right kind, or it counts as not there."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from fuzz import mutate
from fuzz.harness import Harness, sound
from rwkv_peft.common.errors import UserError
from rwkv_peft.data import tokenized_files, vocabulary_check
from rwkv_peft.data.binidx import Reader, Writer
from rwkv_peft.preprocess import cache
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS

NAMES = (
    "settings", "PROMPT_TYPE", "EOT", "BOS", "template", "places", "blank lines", "vocabulary", "files", "data.bin",
    "bytes", "changed", "key", *PRESETS, "format_user", "format_assistant", "stop_words", "clean", "0", "1", "doc",
    "rwkv_vocab_v20230424",
)  # fmt: skip


class It(Harness):
    places = ("data.report.json", "data.bin")

    def warm_up(self) -> None:
        tokenizer.token_bytes()
        tokenizer.encode("a")

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        return mutate.of_json(data, random, other, NAMES)

    def read(self, data: bytes, folder: Path) -> str:
        prefix = folder / "data"
        if not Path(f"{prefix}.idx").is_file():
            with Writer(prefix, {"": np.uint16}) as writer:
                writer.add({"": np.array([*tokenizer.encode("User: Hi\n\nAssistant: Hello."), 0])})
                writer.commit()
        report = Path(f"{prefix}.report.json")
        report.write_bytes(data)
        bos, words = tokenized_files.detect_bos(prefix)
        sound(bos == 0 and isinstance(words, str), "another BOS than the rows have", bos, words)
        sound(isinstance(tokenized_files.has_blank_lines(prefix), bool), "neither true nor false")
        wrong = vocabulary_check.describe_vocabulary_problem(prefix, Reader(prefix))
        sound(not wrong or "data.report.json" in wrong, "text that is none", wrong)
        result = cache.fresh(report, "k")
        sound(result is None or isinstance(result, dict), "a report that is none", result)
        try:
            form = tokenized_files.read_form(prefix)
        except UserError as error:
            sound("data.report.json" in str(error) or ".json" in str(error), "a message without a place", error)
            return "refused"
        if form is None:
            return "nothing"
        sound(isinstance(form.prompt_type, str) and isinstance(form.eot, str), "a form that is none", form)
        if form.template is not None:
            json.dumps(form.template.to_dict())
            sound(form.template.headings is not None, "no headings", form)
        return f"form {form.template is not None}"
