"""STRATEGY=fsdp: torch's FSDP2. Weights, gradients and optimizer state are sharded over the processes."""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from rwkv_peft.quantize import codes_as_parameters

from .sharding import as_shardable, broadcast_params


class FullyShard(DDPStrategy):
    """Strategy that gathers the weights of one block at a time, and keeps those of embedding and head whole during a step."""

    def model_to_device(self) -> None:
        """Do nothing: blocks move one by one when they are sharded, so that a device holds no more than one of them whole."""

    def configure_ddp(self) -> None:
        """Shard the model block by block."""
        module = as_shardable(self.lightning_module)
        model = module.model
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))

        def placement(parameter: nn.Parameter) -> Shard:
            """Choose the longest dimension: vectors are [1, 1, C] in some versions.

            Along a dimension other than the first, torch only makes shards of equal size.
            """
            longest = max(range(parameter.dim()), key=lambda dim: parameter.shape[dim])
            return Shard(longest if parameter.shape[longest] % self.world_size == 0 else 0)

        def broadcast(name: str) -> None:
            broadcast_params(model.get_submodule(name).named_parameters(name), module.given, self.root_device)

        for number, block in enumerate(model.blocks):
            module.settle(f"blocks.{number}.")
            codes_as_parameters(block)
            broadcast(f"blocks.{number}")
            fully_shard(block, mesh=mesh, shard_placement_fn=placement)
        module.settle("")
        codes_as_parameters(model)
        for name in ("emb", "ln_out", "head"):
            broadcast(name)
        fully_shard(model, mesh=mesh, shard_placement_fn=placement)
        register_fsdp_forward_method(model, "features")
