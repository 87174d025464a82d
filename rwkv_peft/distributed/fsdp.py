"""STRATEGY=fsdp: sharded weights, gradients and optimizer state by torch's fully_shard (FSDP2).

Lightning's own FSDP strategy needs a GPU.
"""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from rwkv_peft.quantize import codes_as_parameters

from .sharding import broadcast_params


class FullyShard(DDPStrategy):
    """One block's weights are whole at a time, on their way through it; those of embedding and head all the time of a step."""

    def model_to_device(self) -> None:
        """Block after block, when it is cut: a device holds no more than one of them whole."""

    def configure_ddp(self) -> None:
        """Shard the model, block by block."""
        module: Any = self.lightning_module  # a TrainingModule, which is on a higher floor
        model = module.model
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))

        def along(parameter: nn.Parameter) -> Shard:
            """Return the axis to shard along: vectors are [1, 1, C] in some versions.

            Along other axes than the first, torch shards only into equal parts.
            """
            longest = max(range(parameter.dim()), key=lambda dim: parameter.shape[dim])
            return Shard(longest if parameter.shape[longest] % self.world_size == 0 else 0)

        for number, block in enumerate(model.blocks):
            module.settle(f"blocks.{number}.")
            codes_as_parameters(block)
            named = block.named_parameters(f"blocks.{number}")
            broadcast_params(named, module.given, self.root_device)
            fully_shard(block, mesh=mesh, shard_placement_fn=along)
        module.settle("")
        codes_as_parameters(model)
        for name in ("emb", "ln_out", "head"):
            named = model.get_submodule(name).named_parameters(name)
            broadcast_params(named, module.given, self.root_device)
        fully_shard(model, mesh=mesh, shard_placement_fn=along)
        register_fsdp_forward_method(model, "features")
