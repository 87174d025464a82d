"""Sidecars of checkpoints. Input: its JSON; the checkpoint and the base are always the same. Sound: how the run was
set, and how its model is asked and stops."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import torch

from fuzz import mutate
from fuzz.harness import Harness, quiet, sound
from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.chat import load
from rwkv_peft.checkpoint import base_model, prompt_format, pth, run_dir, sidecars
from rwkv_peft.checkpoint.base_template import describe_mismatch, find_base_template
from rwkv_peft.common import hashing
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.merge import inputs
from rwkv_peft.text.presets import PRESETS

SEALED = sidecars.with_checksums  # with the checksum of its fields
NAMES = (
    *sidecars.SIDECAR, *METHODS, *PRESETS, "checkpoint_sha256", "merged", "format_user", "format_assistant",
    "stop_words", "clean", "think", "name", "parts", "versions", "epoch_finished", "nf4", "doc", "blank",
)  # fmt: skip


class It(Harness):
    places = ("rwkv-0.json", "rwkv-0.pth", "base.pth", "MODEL_PATH", "model/")

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        return mutate.of_json(data, random, other, NAMES)

    def files(self, folder: Path) -> tuple[Path, Path]:
        path, base = folder / "rwkv-0.pth", folder / "base.pth"
        if not path.is_file():
            torch.manual_seed(0)
            pth.save(path, {"blocks.0.att.key.lora_A": torch.randn(2, 8), "blocks.0.att.key.lora_B": torch.randn(8, 2)})
            pth.save(base, {"emb.weight": torch.randn(4, 8)})
        return path, base

    def read(self, data: bytes, folder: Path) -> str:
        path, base = self.files(folder)
        note = sidecars.sidecar_path(path)
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and self.choice(data) % 8:  # as a run would have written it
            content |= {
                "checkpoint_sha256": hashing.sha256(path),
                "base_sha256": hashing.sha256(base),
                "base": content.get("base", "base.pth"),
            }
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                data = json.dumps(SEALED(content)).encode("utf-8", "surrogatepass")
        note.write_bytes(data)
        outcomes = []
        for one in (self.merge, self.chat, self.prompt, self.known):
            try:
                with quiet():
                    outcomes.append(one(path, base))
            except (UserError, SettingErrors) as error:
                sound(any(p in str(error) for p in self.places), "a message without a place", error)
                outcomes.append("refused")
        return " ".join(outcomes)

    def merge(self, path: Path, base: Path) -> str:
        result = inputs.load_checkpoint(path, "", None, None, True)
        sound(result.words and result.label, "no words", result)
        sound(result.part.setup.method in METHODS, "an unknown method", result.part.setup)
        run_dir.checkpoint_steps(path.parent)
        if result.sidecar:
            sound(base_model.find_base_model(result.sidecar, path, str(base)) == base, "another base", result.sidecar)
        return "merge"

    def chat(self, path: Path, base: Path) -> str:
        chosen = load.choose_checkpoint(path, str(base))
        sound(chosen.model.is_file(), "a model that is none", chosen)
        return "chat"

    def prompt(self, path: Path, base: Path) -> str:
        reported = sidecars.read_sidecar(path, ())
        asked = prompt_format.read_prompt_format(reported, str(sidecars.sidecar_path(path)), base)
        again = json.loads(json.dumps(asked.describe()))
        sound(
            all(isinstance(i, int) and 0 <= i < 65536 for i in again["stop_token_ids"]),
            "stop tokens that are none",
            again,
        )
        sound(all(isinstance(text, str) and text for text in again["stop"]), "stop texts that are none", again)
        sound(asked.eot in ("doc", "blank", "both", "x17"), "an unknown EOT", asked)
        return "prompt"

    def known(self, path: Path, base: Path) -> str:
        known = find_base_template(path)
        sound(known.name, "a template without a name", known)
        describe_mismatch(path, PRESETS["rwkv-world"])
        return known.name if known.name in PRESETS else "own"
