"""CUDA_GRAPHS=1: replays the blocks of a micro-batch, forward and backward, as one launch each, for shapes that repeat.

With a small model on few tokens the GPU waits for the host, which launches some thousand kernels a step. A CUDA graph launches
them all at once, with the same addresses: so it is recorded for one shape (tokens, and where sequences begin), keeps the memory
of its activations from then on, and is used only if it computes what the kernels compute one by one. Shapes repeat with
DATALOAD=pad and bucket, and with PACK=concat; packs of whole texts hardly ever do.

Not yet run on a GPU: the tests have a stand-in for `record`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_peft.checkpoint.train_state import get_rng_state, set_rng_state
from rwkv_peft.common.errors import UserError
from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.model.state import SeqBounds
from rwkv_peft.ops.cuda.workspace import keeping

MIN_OCCURRENCES = 3  # how often a shape has to occur before it is recorded
MAX_RECORDED = 4  # recorded shapes; each keeps the memory of its activations
COUNTED = 64  # shapes whose occurrences are counted
# largest difference between replayed kernels and single ones, relative to the norm of the output and of each gradient
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-7}

Body = Callable[[Tensor], Tensor]


class RecordingFailed(Exception):
    """A recording has failed after it began."""


class Recorded(NamedTuple):
    """A recorded forward and backward pass.

    Attributes:
        x: what `forward` reads, [T, C].
        out: what `forward` writes, [T, C].
        dout: what `backward` reads, the gradient of `out`, [T, C].
        grads: what `backward` writes, of x (if it has a gradient) and each parameter; None where `out` does not depend on it.
        forward: replays the forward pass.
        backward: replays the backward pass.
        keep_alive: what else is at addresses that the graphs read.
    """

    x: Tensor
    out: Tensor
    dout: Tensor
    grads: Sequence[Tensor | None]
    forward: Callable[[], None]
    backward: Callable[[], None]
    keep_alive: Sequence[object] = ()


def record(body: Body, x: Tensor, parameters: Sequence[Tensor]) -> Recorded:
    """Record body(x) and its backward pass on the GPU.

    Not torch.cuda.make_graphed_callables: that returns its own buffers as gradients, and the second micro-batch of a step would
    overwrite those of the first one.

    Args:
        body: computes [T, C] from [T, C].
        x: [T, C]; its gradient is recorded if it requires one.
        parameters: those whose gradients are recorded.

    Raises:
        RecordingFailed: if the recording failed after it began.
    """
    x = x.detach().clone().requires_grad_(x.requires_grad)
    inputs = [*([x] if x.requires_grad else []), *parameters]

    def gradients(out: Tensor, dout: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(out, inputs, dout, allow_unused=True)

    with keeping() as workspaces:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # what is made at first use must not be part of the recording
            for _ in range(2):
                out = body(x)
                gradients(out, torch.zeros_like(out))
                del out  # autograd would keep what belongs to this pass
        current.wait_stream(side)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(forward, stream=side):
                out = body(x)
            dout = torch.zeros_like(out)
            with torch.cuda.graph(backward, pool=forward.pool(), stream=side):
                grads = gradients(out, dout)
        except Exception as error:  # cannot be undone: stream, allocator and RNG state are part of a recording
            raise RecordingFailed(f"{type(error).__name__}: {_first_line(error)}") from error
    return Recorded(x, out.detach(), dout, grads, forward.replay, backward.replay, (body, *workspaces))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


class Replay(torch.autograd.Function):
    """Computes out from x and the parameters by a recording."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, x: Tensor, *parameters: Tensor) -> Tensor:
        """Replay the forward pass."""
        recorded.x.detach().copy_(x)
        recorded.forward()
        ctx.recorded, ctx.x_requires_grad = recorded, x.requires_grad
        return recorded.out.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Replay the backward pass."""
        recorded = ctx.recorded
        recorded.dout.copy_(dout)
        recorded.backward()
        present = [grad for grad in recorded.grads if grad is not None]
        copies = iter(torch._foreach_mul(present, 1) if present else ())  # (all of them in a few launches)
        grads = [None if grad is None else next(copies) for grad in recorded.grads]
        return None, *(grads if ctx.x_requires_grad else [None, *grads])


class Graphs:
    """Computes the blocks of a model that is trained, in RWKV.features: by a recording where there is one.

    Args:
        model: the model.
        say: logs what is recorded.
    """

    def __init__(self, model: RWKV, say: Callable[[str], None]):
        self.model, self.say = model, say
        self.occurrences: OrderedDict[tuple, int] = OrderedDict()  # the latest last
        self.recorded: dict[tuple, Recorded] = {}
        self.off = False

    def __call__(self, x: Tensor, bounds: SeqBounds) -> Tensor:
        """Return the output of the last norm, [T, C].

        Args:
            x: output of the embedding, [T, C].
            bounds: where sequences begin and end.
        """
        key = bounds.cu_seqlens, x.requires_grad, self.model.training
        if key not in self.recorded and self.is_due(key):
            self.try_to_record(key, x, bounds)
        if key in self.recorded:
            return Replay.apply(self.recorded[key], x, *self.parameters())
        return self.model.through(x, None, bounds, False)[0]

    def is_due(self, key: tuple) -> bool:
        """Count a shape, and return whether it has occurred often enough to be recorded."""
        if self.off or len(self.recorded) == MAX_RECORDED:
            return False
        self.occurrences[key] = self.occurrences.pop(key, 0) + 1
        if len(self.occurrences) > COUNTED:
            self.occurrences.popitem(last=False)
        return self.occurrences[key] >= MIN_OCCURRENCES

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the blocks and the last norm."""
        inside = [*self.model.blocks.parameters(), *self.model.ln_out.parameters()]
        return [parameter for parameter in inside if parameter.requires_grad]

    def try_to_record(self, key: tuple, x: Tensor, bounds: SeqBounds) -> None:
        """Record a shape, and compare it with the kernels. Where that fails, CUDA graphs are off from then on.

        Args:
            key: of the shape.
            x: output of the embedding, [T, C].
            bounds: where sequences begin and end.

        Raises:
            UserError: if the recording failed after it began.
        """
        parameters = self.parameters()
        if not parameters and not x.requires_grad:
            return
        rng_state = get_rng_state(x.device)
        # Any because nn.Module does not declare the dropout of adapter layers
        dropping: list[Any] = [module for module in self.model.modules() if getattr(module, "dropout", None)]
        dropouts = [module.dropout for module in dropping]

        def body(x: Tensor) -> Tensor:
            return self.model.through(x, None, bounds, False)[0]

        def restore_dropouts() -> None:
            for module, dropout in zip(dropping, dropouts, strict=True):
                module.dropout = dropout

        try:
            for module in dropping:  # what is random cannot be compared
                module.dropout = 0.0
            recorded = record(body, x, parameters)
            error = difference(recorded, body, x, parameters)
            restore_dropouts()
            if not error <= LIMITS[x.dtype]:
                raise ValueError(f"replayed, the blocks compute something else (by {error:.1e})")
            self.recorded[key] = record(body, x, parameters) if dropping else recorded
            self.say(f"CUDA graph recorded: {len(x)} tokens, {len(bounds)} sequences")
        except RecordingFailed as failed:
            raise UserError(f"CUDA graphs cannot be recorded here ({failed}). Set CUDA_GRAPHS=0") from failed
        except Exception as failed:  # any error of a driver: the kernels can be launched one by one
            self.off = True
            self.say(f"CUDA graphs are not used: {type(failed).__name__}: {_first_line(failed)}")
        finally:
            restore_dropouts()
            set_rng_state(rng_state, x.device)


def difference(recorded: Recorded, body: Body, x: Tensor, parameters: Sequence[Tensor]) -> float:
    """Return the largest difference between replayed and computed output and gradients, relative to the norm of each."""

    def run(work: Body) -> list[Tensor | None]:
        x_copy = x.detach().requires_grad_(x.requires_grad)
        out = work(x_copy)
        inputs = [*([x_copy] if x.requires_grad else []), *parameters]
        dout = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout, allow_unused=True)]

    if all(grad is None for grad in recorded.grads):
        return float("inf")  # no parameter would learn
    worst = 0.0
    for replayed, computed in zip(run(lambda x: Replay.apply(recorded, x, *parameters)), run(body), strict=True):
        if replayed is not None and computed is not None:
            error = float((replayed - computed).float().norm() / computed.float().norm().clamp_min(1e-30))
            worst = error if not error <= worst else worst  # (NaN stays)
        elif replayed is not computed:
            return float("inf")
    return worst
