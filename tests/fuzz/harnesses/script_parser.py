"""Scripts of settings. Input: the text of a training.sh, make_tokenize.sh, merge.sh or chat.sh (the first byte
chooses), whose values are what a bash would set. Sound: settings within their bounds; or a table of problems, each
with a setting of the script or of the kit and the line where it is."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

from fuzz import mutate
from fuzz.harness import CASES, Harness, sound
from rwkv_peft.cli.chat import ChatConfig
from rwkv_peft.cli.merge import MergeConfig
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.config.shell import Script, parse_assignments, take_options
from rwkv_peft.config.train import RETIRED, TrainConfig
from rwkv_peft.data import mixture
from rwkv_peft.preprocess.config import TokenizeConfig

ROOT = CASES.parent.parent
KINDS = {b"1": (TrainConfig, "training.sh"), b"2": (TokenizeConfig, "make_tokenize.sh"), b"3": (MergeConfig, "merge.sh"),
         b"4": (ChatConfig, "chat.sh")}  # fmt: skip
WORDS = (
    b"=", b'="', b"'", b'"', b"export ", b"declare -x ", b"readonly ", b"+=", b"$(", b"${A:-b}", b"#", b" # ",
    b"\\\n", b"auto", b"0", b"-1", b"1e-4", b"1e999", b"nan", b"9" * 19, b"\xd9\xa3", b"lora", b"pissa", b";",
    b" && ", b"\r\n", b"data:0.5 b:0.5", b"a:0", b"(1 2)", b"if true; then\n", b"\xff", b"  ",
)  # fmt: skip


class It(Harness):
    longest = 1 << 13
    places = ("script.sh", *{f.metadata["var"] for kind, _ in KINDS.values() for f in dataclasses.fields(kind)})
    words = WORDS

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        lines = data.split(b"\n")
        if random.random() < 0.5 and len(lines) > 1:  # another value
            at = random.randrange(1, len(lines))
            name, equals, value = lines[at].partition(b"=")
            fresh = random.choice((*WORDS, mutate.of_bytes(value, random, other, WORDS), value))
            lines[at] = name + equals + fresh
            return b"\n".join(lines)
        return mutate.of_lines(data, random, other, (*WORDS, *(n.encode() + b"=" for n in self.places)))

    def read(self, data: bytes, folder: Path) -> str:
        kind, _ = KINDS.get(data[:1], KINDS[b"1"])
        path = folder / "script.sh"
        path.write_bytes(data[1:])
        try:
            values = parse_assignments(path)
        except UnicodeDecodeError:
            values = {f.metadata["var"]: data[:40].decode("latin-1") for f in dataclasses.fields(kind)}
        script = Script(path, values)
        words = [f"--{re.sub('_', '-', name.lower())}={value}" for name, value in values.items()]
        result, rest = take_options(list(words), kind)
        sound(len(result) + len(rest) <= len(words), "words out of nothing", result, rest)
        script.ignored_shell_vars(kind)
        try:
            settings = script.read(kind, RETIRED)
        except SettingErrors as problems:
            table = script.report(problems)
            sound(table.startswith("script.sh has "), "a table without a head", table)
            known = {f.metadata["var"] for f in dataclasses.fields(kind)} | {*script.lines}
            strange = [p.name for p in problems.problems if p.name not in known]
            sound(not strange, "a problem of what is no setting", strange)
            for p in problems.problems:
                sound(p.message.strip(), "a problem without words", p)
                if p.name in script.lines:
                    line = script.text.splitlines()[script.lines[p.name] - 1]
                    sound(p.name in line, "another line", p, line)
            return "problems " + " ".join(sorted({re.sub(r"\W.*", "", p.message) for p in problems.problems}))[:60]
        for field in dataclasses.fields(settings):
            value, bounds = getattr(settings, field.name), field.metadata
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                sound(bounds["ge"] is None or value >= bounds["ge"], "below its bound", field.name, value)
                sound(bounds["le"] is None or value <= bounds["le"], "above its bound", field.name, value)
        if kind is TrainConfig:
            try:
                shares = mixture.parse_mixture(settings.data_path)
                sound(all(weight > 0 for _, weight in shares), "a share of nothing", shares)
            except ValueError as error:
                sound(str(error), "no words", error)
        return "settings"
