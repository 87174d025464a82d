"""samples.md: the model's answers to the same questions, before the first step and every so often."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rwkv_peft.common.atomic_io import atomic_write, open_append, open_regular
from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.train.context import RunContext

from .periodic import PeriodicCallback

FILE = "samples.md"  # in the run's folder
HEADING = re.compile(r"^## step ([0-9]{1,15})\n", re.MULTILINE)


def last_step(path: Path) -> int:
    """Return the step of the last answers in a file, -1 for none."""
    steps = HEADING.findall(_read(path))
    return int(steps[-1]) if steps else -1


def _read(path: Path) -> str:
    """Return the content of the file, "" where there is none. Bytes that are not UTF-8 are kept as they are."""
    if not path.exists():
        return ""
    with open_regular(path, "r", encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def truncate(folder: Path, last: int) -> None:
    """Remove the answers after an optimizer step from the file."""
    path = folder / FILE
    if path.exists():
        text = _read(path)
        end = next((m.start() for m in HEADING.finditer(text) if int(m[1]) > last), len(text))
        with atomic_write(path) as file:
            file.write(text[:end].encode(errors="surrogateescape"))


class Samples(PeriodicCallback):
    """Write the model's answers to questions. What fails is logged and never stops the training.

    Args:
        context: of the run.
        questions: each is answered by itself.
        answer: from a model and a question to its answer.
        every: optimizer steps between two rounds, 0 for the ends of epochs.
        epoch_steps: optimizer steps of an epoch.
    """

    def __init__(
        self,
        context: RunContext,
        questions: Sequence[str],
        answer: Callable[[RWKV, str], str],
        every: int,
        epoch_steps: int,
    ):
        self.path = context.run_dir / FILE
        super().__init__(context, every, epoch_steps, last_step(self.path))
        self.questions, self.answer = questions, answer

    def round(self, trainer, module) -> bool:
        """Answer all questions once."""
        is_sharded, stop = module.spread.are_weights_sharded, self.context.stop
        if not (trainer.is_global_zero or is_sharded):
            return True  # (with sharded weights, no rank can answer alone: all do, and give the same answer)
        lines = [f"## step {trainer.global_step}\n"]
        try:
            for question in self.questions:
                if stop.agree(trainer) if is_sharded else stop.received:
                    return False
                answer = self.answer(module.model, question).strip()
                quoted = "\n".join(f"> {line}" for line in answer.splitlines()) or "> (nothing)"
                lines += [f"**{question}**\n", quoted, ""]
            if trainer.is_global_zero and self.context.owns_run_dir():
                with open_append(self.path, encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
        except Exception as error:  # an answer is no reason to end a training
            self.context.log(f"{FILE} could not be written ({type(error).__name__}: {error}); training goes on.")
        return True
