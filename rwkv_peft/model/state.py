"""What a sequence carries from one token to the next: state in, state out.

Zero is plain training; infctx continues a long text from its last chunk's state; one token at a time is chat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BlockState:
    """The memory of one block, for S sequences.

    att_x, ffn_x: the last input of the time mix and the channel mix, after their layer norms, [S, C].
    wkv: the matrices, float32 [S, H, N, N], rows are values, columns are keys.
    """

    att_x: Tensor
    wkv: Tensor
    ffn_x: Tensor

    @classmethod
    def zeros(cls, sequences: int, heads: int, size: int, like: Tensor) -> BlockState:
        """Return zeros for `sequences` sequences, on the device of `like`."""
        shift = like.new_zeros(sequences, heads * size)
        wkv_dtype = torch.promote_types(like.dtype, torch.float32)
        return cls(shift, like.new_zeros(sequences, heads, size, size, dtype=wkv_dtype), shift.clone())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors in the order of the model's arguments."""
        return self.att_x, self.wkv, self.ffn_x


class SeqBounds:
    """Where sequences lie among T tokens behind one another.

    cu_seqlens: [S + 1] integers on the host, from 0 to T; host: the same as a tensor, int64. first, last: first and last
    token of each, int64 [S] on the device of the model (made once per forward pass, used by every layer).
    """

    def __init__(self, cu_seqlens: tuple[int, ...], device):
        self.cu_seqlens = tuple(int(c) for c in cu_seqlens)
        self.host = torch.tensor(self.cu_seqlens, dtype=torch.long)
        self.first = self.host[:-1].to(device)
        self.last = (self.host[1:] - 1).to(device)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1
