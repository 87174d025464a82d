"""A tensor in another number format, a few MB at a time: memory does not grow with the tensor, and nothing is lost in silence.

float16 ends at 65504. Larger numbers would become infinite, and one of them is enough to make every answer of the model
NaN, so a file that holds one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rwkv_peft.checkpoint.pth import COPY_BYTES, PthReader
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.paths import display_path


def numbers(archive: PthReader, name: str, dtype: torch.dtype, factor: float = 1.0) -> Iterator[Tensor]:
    """The numbers of a tensor times factor, in their order, in pieces [n]. UserError if one does not fit into dtype."""
    stored = archive.described[name]
    if stored.whole:
        # what comes out must stay when the next piece is read, so it may not be what was read
        kept = bytearray if stored.dtype == dtype else memoryview
        raw = (torch.frombuffer(kept(piece), dtype=stored.dtype) for piece in archive.pieces(name))
    else:  # a view into a record that others use as well
        raw = iter(archive.tensor(name).reshape(-1).split(COPY_BYTES // stored.dtype.itemsize))
    for piece in raw:
        yield fitted(piece if factor == 1.0 else piece.float() * factor, dtype, f"{display_path(archive.path)}: {name}")


def fitted(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """The tensor in dtype. where: file and tensor, for the UserError about a number that has no place in dtype."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    low, high = (float(end) for end in torch.aminmax(wide)) if wide.numel() else (0.0, 0.0)
    limit = torch.finfo(dtype).max
    if not (abs(low) < torch.inf and abs(high) < torch.inf):
        raise UserError(f"{where} holds NaN or infinity. No client can use this file; take an earlier epoch.")
    if max(-low, high) > limit:
        raise UserError(
            f"{where} holds {low if -low > high else high:g}, but {str(dtype).removeprefix('torch.')} ends at {limit:g}. "
            "Nothing was written. Use the .pth file itself, or a format with a larger range (gguf-bf16)."
        )
    return wide.to(dtype)  # over float32: torch takes three times as long from bfloat16 to float16
