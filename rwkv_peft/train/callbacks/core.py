"""What happens between optimizer steps: the record of each step, the files of the run, and Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
import torch
from torch import nn
from tqdm import tqdm

from rwkv_peft.checkpoint import run_dir, step_log
from rwkv_peft.common import paths
from rwkv_peft.common.atomic_io import appending
from rwkv_peft.common.errors import EXIT_USER, UserError, ignore_closed_pipe, in_words
from rwkv_peft.common.file_watch import FileChanged
from rwkv_peft.common.formatting import format_duration
from rwkv_peft.distributed.sharding import gather_to_main
from rwkv_peft.text import tokenizer
from rwkv_peft.train.loss_plot import draw_loss, looks_back
from rwkv_peft.train.run_files import RunFiles

TOO_HIGH = (
    "LR_INIT is too high (take a third of it, and GRAD_CLIP=1; ./training.sh --find-lr tells what the settings bear), or "
    "another setting is extreme (lora_alpha, ADAM_EPS, WEIGHT_DECAY). What was saved before is whole."
)
# where no step has been taken, no learning rate can be the cause
NOT_BEGUN = "No step has been taken yet, so LR_INIT is not the cause: {}. What was saved before is whole."

STOPPING = b"\nStopping after this batch and saving. Ctrl-C again leaves at once, without saving.\n"
LEFT_WITH = b"\nLeft at once. Checkpoints that were saved before are whole.\n"
LEFT_WITHOUT = b"\nLeft at once. Nothing had been saved yet: ./training.sh begins anew.\n"
NAMED = 3  # micro-batches of a step that came to nothing
DRAWING = 0.01  # of the time goes into loss.png at most
SPEED_STEPS = 10  # the last ones, for tokens/s


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. loss: mean over its trained targets. tokens: inputs without filling; targets: trained ones. skipped:
    its loss or gradient was no number, and it changed nothing.
    """

    step: int  # from 1
    epoch: int  # from 0, as in file names
    loss: float | None  # None for a step without a trained token (DATALOAD=get), or where it is no number
    lr: float
    grad_norm: float | None
    tokens: int
    targets: int
    tokens_per_s: float
    targets_per_s: float
    seconds: float  # since training began
    skipped: bool = False


class MetricsCallback(pl.Callback):
    """Makes a Record of every optimizer step on rank 0 and hands it to the sinks.

    limit: so many skipped steps in a row end the training. say: is told of each. seconds, seen, in_a_row: of training, tokens,
    and skipped steps before the first one, where a run goes on.
    """

    def __init__(
        self,
        sinks: list[Callable[[StepMetrics], None]],
        limit: int,
        say: Callable[[str], None],
        seconds: float = 0.0,
        seen: int = 0,
        in_a_row: int = 0,
    ):
        self.sinks, self.limit, self.say = sinks, limit, say
        self.seconds, self.seen, self.in_a_row = seconds, seen, in_a_row
        self.beginnings: list[tuple[int, ...]] = []  # of the step's micro-batches

    def on_train_start(self, trainer, module) -> None:
        self.last = time.monotonic()
        self.begin = self.last - self.seconds
        self.step, self.tokens = trainer.global_step, 0
        self.lately: deque[tuple[float, int, int]] = deque(maxlen=SPEED_STEPS)  # seconds, tokens, targets
        self.slow = True  # the first step makes ready what the others find

    def leave_out(self, seconds: float) -> None:
        """Something else was done since the last step: it is not counted to the next one's time."""
        self.last += seconds

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.tokens += batch.tokens
        self.beginnings.append(batch.beginning)
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        shares, beginnings = [float(share) for share in module.shares], self.beginnings
        module.shares, self.beginnings = [], []
        sums = torch.tensor([sum(shares), float(self.tokens)], dtype=torch.float64)
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum").cpu()
        loss, tokens = float(sums[0]), int(sums[1])
        self.tokens, self.seen = 0, self.seen + tokens
        self.in_a_row = self.in_a_row + 1 if module.skipped or not math.isfinite(loss) else 0
        now = time.monotonic()
        taken, self.last = max(now - self.last, 1e-9), now
        self.lately.append((taken, tokens, batch.step_targets))
        if self.slow and len(self.lately) == 2:
            self.lately.popleft()
            self.slow = False
        seconds, inputs, trained = (sum(numbers) for numbers in zip(*self.lately, strict=True))
        if not trainer.is_global_zero:
            if self.in_a_row >= self.limit:
                raise SystemExit(EXIT_USER)  # the first process says why
            return
        # the scheduler has moved on already: its previous value is what this step used
        rate = module.rate_of(self.step - 1)
        shown = loss if batch.step_targets and math.isfinite(loss) else None
        norm = float(module.grad_norm)
        record = StepMetrics(
            self.step, trainer.current_epoch, shown, rate, norm if math.isfinite(norm) else None, tokens, batch.step_targets,
            inputs / seconds, trained / seconds, now - self.begin, bool(self.in_a_row),
        )  # fmt: skip
        for sink in self.sinks:
            sink(record)
        if self.in_a_row:
            too_many = self.in_a_row >= self.limit
            why = why_no_number(module, self.step, self.in_a_row, trainer.world_size == 1) if too_many else ""
            self.tell(loss, norm, shares, beginnings, batch_idx, why)

    def tell(
        self, loss: float, norm: float, shares: list[float], beginnings: list[tuple[int, ...]], last: int, why: str
    ) -> None:
        """Say that a step was left out, and of which data; UserError where there have been too many. last: the number of the
        step's last micro-batch in its epoch. why: what to say then of the cause.
        """
        what = f"its loss is {loss}" if not math.isfinite(loss) else f"the length of its gradient is {norm}"
        bad, first = [i for i, share in enumerate(shares) if not math.isfinite(share)], last - len(shares) + 1
        elsewhere = not bad and not math.isfinite(loss)
        bad = bad or [*range(len(shares))]
        where = ", ".join(f"micro-batch {first + i}: {tokenizer.decode(beginnings[i])!r} ..." for i in bad[:NAMED])
        where = "in another process" if elsewhere else where + (", and others" if len(bad) > NAMED else "")
        words = f"step {self.step}: {what} ({where})"
        if why:
            steps = "step was" if self.limit == 1 else "steps in a row were"
            raise UserError(f"\nTraining stops: NAN_LIMIT={self.limit} {steps} left out. The last, {words}. {why}")
        self.say(f"warning   {words}: left out, {self.in_a_row} of NAN_LIMIT={self.limit} in a row")


def why_no_number(module, step: int, in_a_row: int, whole: bool) -> str:
    """Why the last steps were left out. whole: this process has all weights."""
    if in_a_row < step:
        return TOO_HIGH
    model = module.model
    weights = model.named_parameters() if whole else ()
    bad = next((name for name, weight in weights if not bool(torch.isfinite(weight).all())), "")
    if model.dtype == torch.float16:
        where = f", as in {bad}" if bad else ""
        return NOT_BEGUN.format(f"numbers above 65,504 do not fit into PRECISION=fp16{where}; use bf16 or fp32")
    if bad:
        return NOT_BEGUN.format(
            f"{bad} of the model holds NaN or infinity; take another base, or another file to begin with"
        )
    words = "the model gives no number for these data, so its weights are too large or damaged; take another copy of the base"
    return NOT_BEGUN.format(words)


class Progress:
    """A bar with loss, rate, speed, memory and time left; plain lines, about twenty a run, where there is no terminal.

    The loss is the mean of the last twentieth of the run's steps (at least 5); loss.jsonl has every single one. before: the
    records of a run that goes on; done: its steps so far. memory: () -> bytes that were held at most.
    """

    def __init__(
        self, steps: int, epochs: int, before: Sequence[dict] = (), memory: Callable[[], int] = lambda: 0, done: int = 0
    ):
        self.steps, self.epochs, self.memory = steps, epochs, memory
        # losses; their plain mean is loss.png's smooth line
        self.recent: deque[float] = deque(
            (r["loss"] for r in before if r["loss"] is not None), maxlen=looks_back(steps)
        )
        # the step and the second from which on the time left is reckoned
        self.done, self.spent = done, before[-1]["seconds"] if before else 0.0
        self.first = self.done + 1
        form = "{desc} |{bar:16}| {n_fmt}/{total_fmt}{postfix}"  # (a comma comes by itself)
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=self.done, dynamic_ncols=True, bar_format=form)
        self.every = max(1, -(-steps // 20))

    def __call__(self, record: StepMetrics) -> None:
        with ignore_closed_pipe():
            self.show(record)

    def show(self, record: StepMetrics) -> None:
        if record.loss is not None:
            self.recent.append(record.loss)
        loss = f"{sum(self.recent) / len(self.recent):.3f}" if self.recent else "-"
        # tokens/s: all inputs, and those that are trained
        speed = f"{record.tokens_per_s:,.0f} tokens/s ({record.targets_per_s:,.0f} trained)"
        speed += f"  {self.memory() / 2**30:.1f} GB" if self.memory() else ""
        if (
            record.step == self.first
        ):  # it makes ready what the others find: none is like it, and it says nothing of them
            left, self.done, self.spent = "", record.step, record.seconds
        else:
            left = (
                format_duration((self.steps - record.step) * (record.seconds - self.spent) / (record.step - self.done))
                + " left"
            )
        if self.bar:
            state = f"epoch {record.epoch + 1}/{self.epochs}  loss {loss}  lr {record.lr:.2e}  {speed}"
            self.bar.set_description_str(state, refresh=False)
            self.bar.postfix = left
            self.bar.update(1)
        elif record.step == self.first or record.step % self.every == 0 or record.step == self.steps:
            print(
                f"epoch {record.epoch + 1}/{self.epochs}  step {record.step}/{self.steps}  loss {loss}  "
                f"lr {record.lr:.2e}  {speed}  {left}".rstrip(),
                flush=True,
            )

    def say(self, message: str) -> None:
        with ignore_closed_pipe():
            if self.bar:
                self.bar.write(message)
            else:
                print(message, flush=True)

    def close(self) -> None:
        """Release what was opened."""
        with ignore_closed_pipe():
            if self.bar:
                self.bar.close()


class LossFile:
    """loss.jsonl: one object per optimizer step, readable at any moment. Where an editor, or sed -i, has put another file in its
    place, or somebody has removed it, it goes on in the file of that name, with the records that this one lacks. ours: whether
    its folder is still the run's own. say: is told of that, once.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None] = lambda words: None, ours: Callable[[], bool] = lambda: True
    ):
        self.path, self.say, self.ours, self.told = path, say, ours, set()
        self.file = self.open()

    def open(self, own: Callable[[IO[Any]], object] | None = None) -> IO[Any]:
        """(others may have written bytes into it that are no text)"""
        return appending(self.path, "a+", own, encoding="utf-8", errors="surrogateescape")

    def follow(self) -> None:
        """Take the file that has the name now."""
        if not self.ours() or (not self.path.is_symlink() and run_dir.is_same_file(self.path, self.file.fileno())):
            return
        try:
            with contextlib.ExitStack() as failed:
                fresh = failed.enter_context(self.open(run_dir.lock_file))
                self.file.seek(0)
                fresh.write(step_log.missing_lines(self.path, self.file.read()))
                fresh.flush()
                failed.pop_all()
            self.file.close()
            self.file = fresh
            self.warn("was replaced or removed; it goes on, with the records that it lacked")
        except (OSError, UserError) as error:
            self.warn(f"cannot be gone on with, and training goes on. {in_words(error)}")

    def warn(self, words: str) -> None:
        if words not in self.told:
            self.told.add(words)
            self.say(f"warning   {paths.display_path(self.path)} {words}")

    def __call__(self, record: StepMetrics) -> None:
        self.follow()
        self.file.write(json.dumps(asdict(record)) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Bring it onto the disk: a state of a step is worth nothing without the record of that step."""
        self.follow()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Release what was opened."""
        self.file.close()


class CheckpointCallback(pl.Callback):
    """Writes a checkpoint every `every` epochs, after the last one, and when the run is stopped.

    write: (what is trained, epoch, finished, step, name instead of the epoch's) -> the path it wrote; called on rank 0 only.
    names: () -> the trained parameters, under their names in files. keep: saves what the run can go on from, with the trainer;
    called on all. epoch_steps: optimizer steps of an epoch. say: where to tell the user. most_steps: checkpoints of steps that
    are kept. unchanged: called by all before and after a file is written; raises where a file of the run has changed. ours:
    whether the folder is still the run's own.
    """

    def __init__(
        self,
        every: int,
        epochs: int,
        epoch_steps: int,
        folder: Path,
        write: Callable[..., Path],
        names: Callable[[], Mapping[str, nn.Parameter]],
        keep: Callable[[pl.Trainer], None],
        say: Callable[[str], None],
        most_steps: int,
    ):
        self.epoch_steps, self.most_steps = epoch_steps, most_steps
        self.every, self.epochs, self.folder, self.say = every, epochs, folder, say
        self.write, self.names = write, names
        self.keep = keep
        self.unchanged: Callable[[pl.Trainer], None] = lambda trainer: None
        self.ours: Callable[[], bool] = lambda: True
        self.newest: Path | None = None
        self.draw_again = 0.0  # when

    def on_train_epoch_end(self, trainer, module) -> None:
        epoch, step = trainer.current_epoch, trainer.global_step
        # (a stream may end before its time; what is told to stop in the last step of an epoch has finished it)
        finished = not trainer.should_stop or step >= (epoch + 1) * self.epoch_steps
        due = self.is_due(epoch) or not finished or trainer.should_stop
        if due and step and (path := self.put(trainer, module, epoch, finished, step)):
            self.newest = path
            self.draw(epoch + 1 == self.epochs or trainer.should_stop)
            self.say(f"saved {path} (epoch {epoch + 1} of {self.epochs}{'' if finished else ', not finished'})")
        elif (
            not due
            and trainer.is_global_zero
            and self.ours()
            and (old := run_dir.remove_unfinished(self.folder, epoch))
        ):
            self.say(f"removed {paths.display_path(old)}: of the middle of an epoch that is finished now")
        if trainer.world_size > 1:
            trainer.strategy.barrier()
        if due and trainer.global_step:
            self.keep(trainer)

    def best(self, trainer, module) -> None:
        """Write rwkv-best.pth. To be called by all processes."""
        self.put(trainer, module, trainer.current_epoch, True, trainer.global_step, "best")

    def of_step(self, trainer, module) -> None:
        """Write rwkv-step-N.pth, unless an epoch ends here that has one. To be called by all processes."""
        step = trainer.global_step
        epoch, finished = (step - 1) // self.epoch_steps, step % self.epoch_steps == 0
        if finished and self.is_due(epoch):
            return
        try:
            if path := self.put(trainer, module, epoch, finished, step, f"step-{step}"):
                self.say(f"saved {path}")
                run_dir.remove_old_steps(self.folder, step, self.most_steps)
                self.draw(False)
        except FileChanged:
            raise
        except (OSError, UserError) as error:
            self.say(f"warning   rwkv-step-{step}.pth could not be saved; training goes on. {in_words(error)}")

    def put(self, trainer, module, *what) -> Path | None:
        """Write what is trained, with all processes; returns the first one's path. what: the rest of `write`'s arguments."""
        spread, device, path = module.spread, trainer.strategy.root_device, None
        self.unchanged(trainer)
        spread.settle(module.model)
        trained = {"weights": spread.weights(self.names())}
        with gather_to_main(trained, spread.weights_in_pieces, trainer.is_global_zero, device) as ready:
            if ready:
                with contextlib.suppress(FileChanged):  # in the last moment: told with all the others
                    path = self.write(ready["weights"], *what)
        self.unchanged(trainer)
        return path

    def is_due(self, epoch: int) -> bool:
        return (epoch + 1) % self.every == 0 or epoch + 1 == self.epochs

    def draw(self, ends: bool) -> None:
        """Draw loss.png, if that was not just done: pictures take DRAWING of the time at most. ends: in any case."""
        began = time.monotonic()
        if (not ends and began < self.draw_again) or not self.ours():
            return
        try:
            draw_loss(self.folder)
        except Exception as error:  # a picture is no reason to end a training
            self.say(f"loss.png could not be drawn ({type(error).__name__}: {error}); training goes on.")
        now = time.monotonic()
        self.draw_again = now + (now - began) / DRAWING


class GracefulStop(pl.Callback):
    """Ctrl-C, SIGTERM or a closed terminal: finish the micro-batch, save, leave. A second Ctrl-C leaves at once.

    A signal that whoever started us ignores (nohup) stays ignored. abandon: what to tidy up before leaving at once. speaks: this
    is the process that tells. saved: whether anything was saved. files: those of the run; where one has changed, nothing more is
    saved.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(
        self,
        abandon: Callable[[], None],
        speaks: bool = True,
        saved: Callable[[], bool] = lambda: True,
        files: RunFiles | None = None,
    ):
        self.abandon, self.received, self.speaks, self.saved, self.files = abandon, 0, speaks, saved, files

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """From before the trainer's preparations until its end."""
        before = {n: signal.getsignal(n) for n in self.SIGNALS}
        self.heard = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
        self.listen()
        try:
            yield
        finally:
            for number in self.heard:
                signal.signal(number, before[number])

    def listen(self) -> None:
        for number in self.heard:
            signal.signal(number, self.receive)

    def on_train_start(self, trainer, module) -> None:
        self.listen()  # Lightning has put a handler of its own before ours by now

    def receive(self, number, _frame) -> None:
        if self.received == number == signal.SIGINT:
            self.abandon()
            self.tell(LEFT_WITH if self.saved() else LEFT_WITHOUT)
            os._exit(128 + number)
        already, self.received = self.received, number
        if already:  # a closing terminal says it more than once, by the kernel and by the shell
            return
        self.tell(STOPPING)

    def tell(self, message: bytes) -> None:
        """A signal handler must not wait for locks that the main program may hold: write, do not print."""
        if self.speaks:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, message)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = self.agree(trainer) or trainer.should_stop

    def agree(self, trainer) -> bool:
        """Whether any process has been told to stop; then all have. To be called by all. FileChanged, for all, where a file of
        one of them has changed.
        """
        received, changed = self.received, self.files is not None and self.files.changed
        if trainer.world_size > 1:
            told = torch.tensor([received, int(changed)], device=trainer.strategy.root_device)
            received, changed = trainer.strategy.reduce(told, reduce_op="max").tolist()
            if received and not self.received:  # another one was told
                self.received = received
                self.tell(STOPPING)
            # (a signal that came during the exchange is agreed on next time)
        if changed:
            self.files.end(trainer)
        return bool(received)

    def unchanged(self, trainer) -> None:
        """Look at the files; FileChanged where one has changed. To be called by all."""
        if self.files:
            self.files.look()
        self.agree(trainer)
