"""A weight [out, in] that is kept as codes and scales: what all ways to compress have in common.

It is a module so that .to(device) takes it along, but its buffers are non-persistent: a quantised weight is never saved.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rwkv_peft.common.errors import UserError

# Weights that are worked on at once. On a CPU their float32 values should stay in its caches (4 times slower otherwise);
# a GPU wants few and large launches, and this many still take only 64 MiB there.
PIECE = {"cpu": 2**17, "gpu": 2**24}


class Quantised(nn.Module, abc.ABC):
    """A subclass registers its buffers by `keep` and writes `decode`.

    shape: (out, in). width: in, plus what fills up the last block of a row where a format has blocks.
    """

    def __init__(self, shape: Sequence[int], width: int):
        super().__init__()
        self.shape, self.width = torch.Size(shape), width

    def keep(self, **tensors: Tensor) -> None:
        """Register the tensors that hold the weight; state_dict leaves them out."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @abc.abstractmethod
    def decode(self, rows: slice | Tensor, out: Tensor) -> None:
        """Write the float32 values of these rows, rounded to its dtype, into out [n, width].

        rows: a slice with start and stop, or row numbers [n].
        """

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the codes stand for: computed in float32, rounded to dtype."""
        out = torch.empty(self.shape[0], self.width, dtype=dtype, device=self.device)
        for part in pieces(out):
            self.decode(part, out[part])
        return out[:, : self.shape[1]].contiguous()

    @torch.no_grad()
    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """dense(dtype)[ids], for ids [n], without the other rows."""
        out = torch.empty(len(ids), self.width, dtype=dtype, device=self.device)
        for part in pieces(out):
            self.decode(ids[part], out[part])
        return out[:, : self.shape[1]].contiguous()

    def as_parameters(self) -> None:
        """Keep all as frozen parameters from now on: what cuts a model into pieces cuts nothing else."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(buffer, requires_grad=False))

    def kept(self) -> Iterator[Tensor]:
        """Return the tensors that hold the weight."""
        return itertools.chain(self.buffers(), self.parameters())

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return next(self.kept()).device

    @property
    def bytes(self) -> int:
        """Bytes of the weight."""
        return sum(tensor.nbytes for tensor in self.kept())

    def _apply(self, fn, recurse=True):
        # model.bfloat16() and the like move the codes but must not cast them: the scales would lose 16 of 24 bits
        def uncast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(uncast, recurse)


def pieces(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix [n, width], about PIECE values each; none if it is empty."""
    if not matrix.numel():
        return
    rows, width = matrix.shape
    step = max(1, PIECE["cpu" if matrix.device.type == "cpu" else "gpu"] // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """tensor[rows]; unlike an index, index_select refuses negative row numbers, as an embedding does."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def check_finite(absmax: Tensor) -> None:
    """The largest magnitude of every block is finite if and only if all weights are (amax carries NaN on)."""
    if not torch.isfinite(absmax).all():
        raise UserError("holds NaN or infinity")


def codes_as_parameters(model: nn.Module) -> None:
    """Let all that is compressed in a model be cut into pieces with the rest."""
    for module in model.modules():
        if isinstance(module, Quantised):
            module.as_parameters()
