"""samples.md: what the model answers to the same questions while it learns, before the first step and every so often."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytorch_lightning as pl
from torch import nn

from ..atomic import writing

FILE = "samples.md"  # in the run's folder
HEADING = re.compile(r"^## step (\d+)\n", re.M)


def cut(folder: Path, last: int) -> None:
    """Take from the file what came after an optimizer step."""
    path = folder / FILE
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        later = next((m.start() for m in HEADING.finditer(text) if int(m[1]) > last), len(text))
        with writing(path) as file:
            file.write(text[:later].encode())


class Samples(pl.Callback):
    """questions: answered one by one, each by a model that has heard nothing before; answer: from a model and a question to what
    it says. every: optimizer steps between two rounds, 0 for the ends of epochs. say: is told what goes wrong, which never
    stops the training."""

    def __init__(
        self,
        path: Path,
        questions: Sequence[str],
        answer: Callable[[nn.Module, str], str],
        every: int,
        say: Callable[[str], None],
    ):
        self.path, self.questions, self.answer, self.every, self.say = path, questions, answer, every, say

    def on_train_start(self, trainer, module) -> None:
        self.step = trainer.global_step
        if not self.step:
            self.ask(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        moved, self.step = trainer.global_step != self.step, trainer.global_step
        if moved and self.every and self.step % self.every == 0:
            self.ask(trainer, module)

    def on_train_epoch_end(self, trainer, module) -> None:
        if not self.every:
            self.ask(trainer, module)

    def ask(self, trainer, module) -> None:
        if not trainer.is_global_zero:
            return
        learning = module.training
        module.eval()
        lines = [f"## step {trainer.global_step}\n"]
        try:
            for question in self.questions:
                answer = self.answer(module.model, question).strip()
                lines += [
                    f"**{question}**\n",
                    "\n".join(f"> {line}" for line in answer.splitlines()) or "> (nothing)",
                    "",
                ]
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except Exception as error:  # an answer is no reason to end a training
            self.say(f"{FILE} could not be written ({type(error).__name__}: {error}); training goes on.")
        module.train(learning)
