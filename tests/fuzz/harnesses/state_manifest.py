"""What a saved state and the log of a run say of themselves. Input: the manifest's JSON, and behind a line "---" lines
of loss.jsonl. Sound: a state whose step and files are what its folder has, and settings that can be compared; a log
that is a beginning of what was there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from pathlib import Path

from fuzz import mutate
from fuzz.harness import CASES, Harness, sound
from rwkv_peft.checkpoint import step_log, train_state
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.config.shell import Script, parse_assignments
from rwkv_peft.config.train import RETIRED, TrainConfig
from rwkv_peft.train import resume

SPLIT = b"\n---\n"
NAMES = (
    *train_state.WANTED, "sha256", "bytes", "weights.safetensors", "optimizer.safetensors", "random.safetensors",
    "STREAMING", "VAL_PATIENCE", "seconds", "loss", "tokens", "name", "files", "MICRO_BSZ", "lr", "norm",
)  # fmt: skip


class It(Harness):
    places = (
        "step-000005",
        "state",
        "RUN_NAME",
        "MODEL_PATH",
        "DATA_PATH",
        "PEFT_CONFIG",
        "EPOCH_COUNT",
        "VAL_PATIENCE",
    )

    def warm_up(self) -> None:
        script = CASES.parent.parent / "training.sh"
        self.config = Script(script, parse_assignments(script)).read(TrainConfig, RETIRED)

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        (manifest, _, log), (theirs, _, lines) = data.partition(SPLIT), other.partition(SPLIT)
        if random.random() < 0.6:
            manifest = mutate.of_json(manifest, random, theirs, NAMES)
        else:
            log = mutate.of_json_lines(log, random, lines, NAMES)
        return manifest + SPLIT + log

    def read(self, data: bytes, folder: Path) -> str:
        manifest, _, log = data.partition(SPLIT)
        there = folder / "run" / "state" / "step-000005"
        if not there.is_dir():
            there.mkdir(parents=True)
            for part in train_state.PARTS:
                (there / f"{part}.safetensors").write_bytes(b"0123456789")
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(manifest)
            if isinstance(content, dict) and self.choice(data) % 8:  # as it was written, by its checksum
                content.pop("sha256", None)
                if isinstance(content.get("files"), dict):
                    for reported in content["files"].values():
                        if isinstance(reported, dict) and "sha256" in reported:
                            reported["sha256"] = hashlib.sha256(b"0123456789").hexdigest()
                manifest = json.dumps({**content, "sha256": train_state.manifest_checksum(content)}).encode()
        (there / train_state.MANIFEST).write_bytes(manifest)
        (folder / "run" / "loss.jsonl").write_bytes(log)
        return f"{self.log(folder / 'run', log)} {self.state(folder / 'run')}"

    def log(self, run: Path, log: bytes) -> str:
        kept, _ = step_log.truncate_log(run, 5)
        left = (run / "loss.jsonl").read_bytes()
        sound(len(kept) <= 5 and all(record["step"] <= 5 for record in kept), "records of later steps", kept)
        sound({*left.split(b"\n")} <= {*log.split(b"\n"), b""}, "lines that were not there", left)
        return f"{len(kept)} kept"

    def state(self, run: Path) -> str:
        said: list[str] = []
        result = train_state.latest_valid(run, said.append)
        facts = result.facts
        sound(result.step == 5 and isinstance(facts["finished"], bool), "another step", facts)
        sound(isinstance(facts["tokens"], int) and facts["tokens"] >= 0, "tokens that are no number", facts["tokens"])
        outcomes = [resume.describe(result), resume.length_setting(result), str(resume.ended_early(result))]
        resume.changed_settings(result, self.config, set())
        content, data = {"sha256": "x"}, {"files": [{"name": "a", "sha256": "b"}], "weights": []}
        given = resume.script_values(self.config)
        plan = {"accumulate": 1, "world": 1, "rows": 2, "micro_batches": 2, "epoch_steps": 2}
        for check in (
            lambda: resume.check_not_finished(result, 5, self.config, None),
            lambda: resume.check_files(result, {}, content, data, run / "init_lora.pth"),
            lambda: resume.check_settings(result, given, given, plan),
        ):
            try:
                check()
            except (SettingErrors, UserError) as error:
                sound(any(p in str(error) for p in self.places) or error.problems, "a message without a place", error)
        return outcomes[1]
