"""CUDA_GRAPHS=1: the blocks of a micro-batch, forward and backward, as one launch each, where its shape has come before.

A small model on few tokens has its GPU wait for the host, which starts some thousand kernels a step. A CUDA graph starts them
all at once, with the same addresses: so it is recorded for one shape (tokens, and where sequences begin), fills the memory that
its activations take from then on, and is used only if it computes what the kernels compute one by one. Shapes repeat with
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

from rwkv_peft.common.errors import UserError
from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.model.state import SeqBounds
from rwkv_peft.ops.cuda.workspace import keeping

OFTEN = 3  # times that a shape has to come before it is recorded
MOST = 4  # shapes; each holds on to its activations' memory
REMEMBERED = 64  # shapes whose number is kept
# largest difference between replayed and started one by one, of the norm of the output and of each gradient
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-7}

Body = Callable[[Tensor], Tensor]


class Broken(Exception):
    """A recording that has begun has failed."""


class Recorded(NamedTuple):
    """A recorded pair of graphs.

    Attributes:
        x: What `forward` reads, [T, C].
        out: What it writes, [T, C].
        slope: What `backward` reads, the gradient of out.
        grads: What it writes, of each of the tensors that were asked for; None where out does not depend on it.
        keep_alive: What else is at addresses that are read.
    """

    x: Tensor
    out: Tensor
    slope: Tensor
    grads: Sequence[Tensor | None]
    forward: Callable[[], None]
    backward: Callable[[], None]
    keep_alive: Sequence[object] = ()


def record(body: Body, x: Tensor, wanted: Sequence[Tensor]) -> Recorded:
    """Record body(x) and its backward pass on the GPU. wanted: parameters whose gradients are; x's is as well, if x says so.

    Not torch.cuda.make_graphed_callables: that hands its own buffers on as gradients, and the second micro-batch of a step would
    overwrite the first one's.
    """
    x = x.detach().clone().requires_grad_(x.requires_grad)
    inputs = [*([x] if x.requires_grad else []), *wanted]

    def gradients(out: Tensor, slope: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(out, inputs, slope, allow_unused=True)

    with keeping() as kept_tensors:
        begin, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(begin)
        with torch.cuda.stream(side):  # whatever is made at first use is not part of the recording
            for _ in range(2):
                out = body(x)
                gradients(out, torch.zeros_like(out))
                del out  # autograd would hold on to what belongs to this pass
        begin.wait_stream(side)
        there, back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(there, stream=side):
                out = body(x)
            slope = torch.zeros_like(out)
            with torch.cuda.graph(back, pool=there.pool(), stream=side):
                grads = gradients(out, slope)
        except (
            Exception
        ) as error:  # what was begun cannot be taken back: stream, allocator and RNG state are part of it
            raise Broken(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}") from error
    return Recorded(x, out.detach(), slope, grads, there.replay, back.replay, (body, *kept_tensors))


class Replay(torch.autograd.Function):
    """x and the parameters -> out, by a recording."""

    @staticmethod
    def forward(ctx, recorded: Recorded, x: Tensor, *parameters: Tensor) -> Tensor:
        """Compute the outputs and save what the backward pass needs."""
        recorded.x.detach().copy_(x)
        recorded.forward()
        ctx.recorded, ctx.of_x = recorded, x.requires_grad
        return recorded.out.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor):
        """Return the gradients of the inputs."""
        recorded = ctx.recorded
        recorded.slope.copy_(slope)
        recorded.backward()
        there = [grad for grad in recorded.grads if grad is not None]
        copies = iter(torch._foreach_mul(there, 1) if there else ())  # (all of them in a few launches)
        grads = [None if grad is None else next(copies) for grad in recorded.grads]
        return None, *(grads if ctx.of_x else [None, *grads])


class Graphs:
    """Takes the place of the blocks where the model trains: see RWKV.features. say: where it says what it does."""

    def __init__(self, model: RWKV, say: Callable[[str], None]):
        self.model, self.say = model, say
        self.seen: OrderedDict[tuple, int] = OrderedDict()
        self.recorded: dict[tuple, Recorded] = {}
        self.off = False

    def __call__(self, x: Tensor, bounds: SeqBounds) -> Tensor:
        """x: [T, C], of the embedding. What comes out of the last norm, [T, C]."""
        key = bounds.cu_seqlens, x.requires_grad, self.model.training
        if key not in self.recorded and self.due(key):
            self.try_to_record(key, x, bounds)
        if key in self.recorded:
            return Replay.apply(self.recorded[key], x, *self.parameters())
        return self.model.through(x, None, bounds, False)[0]

    def due(self, key: tuple) -> bool:
        """Whether a shape has come often enough."""
        if self.off or len(self.recorded) == MOST:
            return False
        self.seen[key] = self.seen.pop(key, 0) + 1
        if len(self.seen) > REMEMBERED:
            self.seen.popitem(last=False)
        return self.seen[key] >= OFTEN

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that learn."""
        inside = [*self.model.blocks.parameters(), *self.model.ln_out.parameters()]
        return [parameter for parameter in inside if parameter.requires_grad]

    def try_to_record(self, key: tuple, x: Tensor, bounds: SeqBounds) -> None:
        """Record the graphs of a shape; note the reason if that fails."""
        wanted = self.parameters()
        if not wanted and not x.requires_grad:
            return
        rng_state = torch.random.get_rng_state(), torch.cuda.get_rng_state() if x.is_cuda else None
        dropping: dict[Any, Any] = {m: m.dropout for m in self.model.modules() if getattr(m, "dropout", None)}

        def body(x: Tensor) -> Tensor:
            return self.model.through(x, None, bounds, False)[0]

        try:
            for module in dropping:  # what is random cannot be compared
                module.dropout = 0.0
            recorded = record(body, x, wanted)
            error = difference(recorded, body, x, wanted)
            for module, share in dropping.items():
                module.dropout = share
            if not error <= LIMITS[x.dtype]:
                raise ValueError(f"replayed, the blocks compute something else (by {error:.1e})")
            self.recorded[key] = record(body, x, wanted) if dropping else recorded
            self.say(f"CUDA graph recorded: {len(x)} tokens, {len(bounds)} sequences")
        except Broken as failed:
            raise UserError(f"CUDA graphs cannot be recorded here ({failed}). Set CUDA_GRAPHS=0") from failed
        except Exception as failed:  # whatever a driver has against it: the kernels can be started one by one
            words = (str(failed).splitlines() or [""])[0][:200]
            self.off = True
            self.say(f"CUDA graphs are not used: {type(failed).__name__}: {words}")
        finally:
            for module, share in dropping.items():
                module.dropout = share
            torch.random.set_rng_state(rng_state[0])
            if rng_state[1] is not None:
                torch.cuda.set_rng_state(rng_state[1])


def difference(recorded: Recorded, body: Body, x: Tensor, wanted: Sequence[Tensor]) -> float:
    """How far what is replayed is from what is computed, of the norm of each: the largest of the output and all gradients."""

    def all_of(work: Callable) -> list[Tensor | None]:
        given = x.detach().requires_grad_(x.requires_grad)
        out = work(given)
        inputs = [*([given] if x.requires_grad else []), *wanted]
        slope = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs, slope, allow_unused=True)]

    if all(grad is None for grad in recorded.grads):
        return float("inf")  # nothing would learn
    worst = 0.0
    for one, other in zip(all_of(lambda x: Replay.apply(recorded, x, *wanted)), all_of(body), strict=True):
        if (one is None) != (other is None):
            return float("inf")
        if one is not None and other is not None:
            error = float((one - other).float().norm() / other.float().norm().clamp_min(1e-30))
            worst = error if not error <= worst else worst  # (NaN stays)
    return worst
