"""samples.md: what the model answers to the same questions while it learns, before the first step and every so often."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from rwkv_peft.common.atomic_io import appending, atomic_write, reading

from .periodic import PeriodicCallback

FILE = "samples.md"  # in the run's folder
HEADING = re.compile(r"^## step ([0-9]{1,15})\n", re.M)


def last_of(path: Path) -> int:
    """The step of the last round in a file, -1 for none."""
    steps = HEADING.findall(content(path))
    return int(steps[-1]) if steps else -1


def content(path: Path) -> str:
    """What the file holds, "" where there is none; bytes that are no UTF-8 go through as they are."""
    if not path.exists():
        return ""
    with reading(path, "r", encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def cut(folder: Path, last: int) -> None:
    """Take from the file what came after an optimizer step."""
    path = folder / FILE
    if path.exists():
        text = content(path)
        later = next((m.start() for m in HEADING.finditer(text) if int(m[1]) > last), len(text))
        with atomic_write(path) as file:
            file.write(text[:later].encode(errors="surrogateescape"))


class Samples(PeriodicCallback):
    """questions: answered one by one, each by a model that has heard nothing before; answer: from a model and a question to what
    it says. say: is told what goes wrong, which never stops the training. ours: whether the file's folder is still the
    run's own.
    """

    def __init__(
        self,
        path: Path,
        questions: Sequence[str],
        answer: Callable[[nn.Module, str], str],
        every: int,
        epoch_steps: int,
        say: Callable[[str], None],
    ):
        super().__init__(every, epoch_steps, last_of(path))
        self.path, self.questions, self.answer, self.say = path, questions, answer, say
        self.ours: Callable[[], bool] = lambda: True

    def round(self, trainer, module) -> bool:
        if not (trainer.is_global_zero or module.spread.weights_in_pieces):
            return True  # (where they are, no process can answer alone: all do, and say the same)
        lines = [f"## step {trainer.global_step}\n"]
        try:
            for question in self.questions:
                if self.agree(trainer) if module.spread.weights_in_pieces else self.interrupted():
                    return False
                answer = self.answer(module.model, question).strip()
                lines += [
                    f"**{question}**\n",
                    "\n".join(f"> {line}" for line in answer.splitlines()) or "> (nothing)",
                    "",
                ]
            if trainer.is_global_zero and self.ours():
                with appending(self.path, encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
        except Exception as error:  # an answer is no reason to end a training
            self.say(f"{FILE} could not be written ({type(error).__name__}: {error}); training goes on.")
        return True
