"""What of a model is made only when the turn of its block comes: where weights will lie in pieces, no process holds them all."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

# by the name of a parameter or of a layer: the function that makes what it becomes
Later = dict[str, Callable[[], Tensor | nn.Module]]


def materialize(model: nn.Module, later: Later, prefix: str = "") -> None:
    """Make what was deferred, for all names that begin with prefix.

    Parameters stay the same objects: an optimizer may have them. Layers are frozen, and no optimizer has theirs.
    """
    for name in [name for name in later if name.startswith(prefix)]:
        made = later.pop(name)()
        if isinstance(made, nn.Module):
            model.set_submodule(name, made)
        else:
            model.get_parameter(name).data = made
