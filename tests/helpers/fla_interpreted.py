"""flash-linear-attention under Triton's interpreter, on a CPU, beside the definitions: a few tokens in float32 or float16 (the
interpreter's bfloat16 is wrong). Run by ops/test_fla.py in a process of its own, as TRITON_INTERPRET is read at import:

    TRITON_INTERPRET=1 python tests/helpers/fla_interpreted.py x070 float32 [safe]

The interpreter does not run the package as it is. Three things are put in its way: the autotuner, which asks for a driver, takes
its first configuration; gathers, which the interpreter does not find under the name they have, are said to be missing; and loop
indices, which are Python's integers there, get the method `to`. safe: with safe_gate, which the kit never sets.
"""

import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
from triton.runtime.autotuner import Autotuner

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LENGTHS = (1, 18, 70)  # tokens of the sequences: more than a chunk of RWKV-7 (16), of RWKV-6 (64)


def first_config(self, *args, **kwargs):
    return self.fn.run(*args, **{**kwargs, **self.configs[0].kwargs})


class Index(int):
    def to(self, _dtype):
        return self


def indices(*bounds):
    return map(
        Index, range(*(int(getattr(b, "handle", b).data[0]) if hasattr(b, "handle") else int(b) for b in bounds))
    )


def main(version: str, dtype: str, safe: bool) -> None:
    warnings.simplefilter("ignore")  # float32 is what the interpreter can
    import fla.utils as theirs

    theirs.IS_GATHER_SUPPORTED = False  # (before its modules read it)
    import fla.ops.utils.cache as tuning

    Autotuner.run = tuning.CachedAutotuner.run = first_config
    from rwkv_peft.ops import fla, kernel_check

    function = fla.function

    def shimmed(module, name):
        result = function(module, name)
        for loaded in [m for n, m in list(sys.modules.items()) if n.startswith("fla.ops") and m]:
            loaded.range = indices
        return (lambda *x, **more: result(*x, **{**more, "safe_gate": True})) if safe else result

    recurrence = {"x070": fla.wkv7, "x060": fla.wkv6, "x052": fla.wkv5}[version]
    with (
        mock.patch.multiple(kernel_check, LENGTHS=LENGTHS, HEADS=1),
        mock.patch.object(fla, "fits", lambda r: True),
        mock.patch.object(fla, "function", shimmed),
    ):
        result = kernel_check.check_against_reference(version, recurrence, "cpu", getattr(torch, dtype))
    print(json.dumps(result._asdict()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "safe" in sys.argv[3:])
