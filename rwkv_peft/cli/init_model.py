"""A new base with the official initialisation, in the official format.

usage: python -m rwkv_peft.cli.init_model --out model/my.pth [--version v7|v6|v5] [--layers 12] [--width 768] [--vocab 65536]
                                [--head-size 64] [--dtype bf16|fp32] [--seed 42]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rwkv_peft.common.errors import UserError, handle_errors
from rwkv_peft.model.arch import ARCHS, NUMBERS


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_peft.cli.init_model",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        default=argparse.SUPPRESS,
        help="the .pth to write; an existing file is not overwritten",
    )
    parser.add_argument("--version", choices=tuple(NUMBERS.values()), default="v7", help="of RWKV")
    parser.add_argument("--layers", type=positive, default=12, help="blocks")
    parser.add_argument("--width", type=positive, default=768, help="channels")
    parser.add_argument(
        "--vocab", type=positive, default=65536, help="rows of emb and head; 65536 is the World vocabulary"
    )
    parser.add_argument("--head-size", type=positive, default=64, help="channels of a head")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="format of the weights")
    parser.add_argument("--seed", type=positive, default=42, help="of the random numbers")
    given = parser.parse_args(arguments)
    with handle_errors():
        import torch

        from rwkv_peft.checkpoint import pth
        from rwkv_peft.common import paths
        from rwkv_peft.model.init_weights import initial_tensors, new_geometry

        if given.out.exists():
            raise UserError(f"{given.out}: exists already and is not overwritten; choose another name or remove it.")
        version = next(name for name, number in NUMBERS.items() if number == given.version)
        geometry = new_geometry(version, given.layers, given.width, given.vocab, given.head_size)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[given.dtype]
        tensors = {name: t.to(dtype) for name, t in initial_tensors(geometry, given.seed).items()}
        pth.save(given.out, tensors)
        total = sum(t.numel() for t in tensors.values())
        where = paths.display_path(given.out.resolve())
        print(f"wrote {where}: {ARCHS[version].name}, {given.layers} layers, width {given.width}, "
              f"vocabulary {given.vocab}, {total / 1e6:,.1f} M parameters, {given.dtype}, untrained")  # fmt: skip


def positive(text: str) -> int:
    """Return a whole number of 1 or more."""
    number = int(text)
    if not 1 <= number < 2**31:
        raise argparse.ArgumentTypeError("must be 1 or more, and less than 2147483648")
    return number


if __name__ == "__main__":
    main(sys.argv[1:])
