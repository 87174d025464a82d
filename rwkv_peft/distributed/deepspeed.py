"""STRATEGY=deepspeed_stage_1 to 3: DeepSpeed's ZeRO through Lightning, with or without a GPU.

Trained parameters are float32 and the model casts by itself, so DeepSpeed is configured for float32.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import cpp_extension

from rwkv_peft.checkpoint.lazy_tensors import LazyTensor
from rwkv_peft.config.strategies import Strategy
from rwkv_peft.model.rwkv import Block
from rwkv_peft.quantize import codes_as_parameters

from .sharding import Parameters, Sharding, broadcast_params, clip_grads, grad_norm, lazy_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter
BUCKET = 50_000_000  # values that are sent at once


def config_of(strategy: Strategy, grad_clip: float) -> dict[str, Any]:
    """Return DeepSpeed's configuration. grad_clip: only where DeepSpeed has to clip."""
    # (threshold: of values, below which weights would stay whole; a block's come and go at once, whatever their size)
    zero: dict[str, Any] = {
        "stage": strategy.stage, "stage3_param_persistence_threshold": 0, "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(), "allgather_bucket_size": BUCKET, "reduce_bucket_size": BUCKET,
    }  # fmt: skip
    if strategy.offload:
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": host} | ({"offload_param": host} if strategy.stage == 3 else {})
    return {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own log of speeds, which is off
        "zero_allow_untested_optimizer": True, "zero_optimization": zero, "gradient_clipping": grad_clip,
    }  # fmt: skip


class KeepDtypes(DeepSpeedPrecision):
    """Lightning's would make every weight float32, those too that are frozen in bf16."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Leave the dtypes of the module as they are."""
        return module


class DeepSpeedZero(DeepSpeedStrategy):
    """strategy: what of strategies.STRATEGIES it is."""

    def __init__(self, strategy: Strategy, grad_clip: float):
        super().__init__(config=config_of(strategy, grad_clip if strategy.offload else 0.0))
        self.strategy, self.grad_clip = strategy, grad_clip
        # its way for processes of one machine without GPUs to talk would have to be compiled; gloo is there
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # torch names this folder to the compiler as it is; a kit may lie in one with a space
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)

    def setup_environment(self) -> None:
        """Lightning's refuses whatever is no GPU."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Connect the processes."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        if self.strategy.stage == 3:
            # what is in a block comes and goes together: its fused operations take weights of other modules than their own
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
            self.cut(model)

        def broadcast(_engine) -> None:
            """DeepSpeed would send the frozen weights as well."""
            if self.strategy.stage != 3:
                broadcast_params(model.model.named_parameters(), model.given, self.root_device)

        with patch.object(deepspeed.DeepSpeedEngine, "_broadcast_model", broadcast):
            engine, wrapped, *_ = deepspeed.initialize(
                config=self.config,
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )
        if self.strategy.stage == 3:
            # the loss takes it past its module
            for weight in model.model.head.parameters():
                deepspeed.zero.register_external_parameter(model, weight)
            # DeepSpeed takes a block's weights away when the gradient of what came in is there: something has to ask for one
            model.model.emb.register_forward_hook(
                lambda _m, _i, x: x.requires_grad_() if torch.is_grad_enabled() else x
            )
        if not self.strategy.offload:
            clip_as_others_do(wrapped, self.grad_clip)
        return engine, wrapped

    def cut(self, module) -> None:
        """Shard weights, block after block: no process has more than one of them whole.

        DeepSpeed itself would begin when all are there.
        """
        model = module.model
        parts = {f"blocks.{number}.": block for number, block in enumerate(model.blocks)} | {"": model}
        convert: Callable[[list[nn.Parameter]], None] | None = None
        for prefix, part in parts.items():
            module.settle(prefix)
            codes_as_parameters(part)
            named = [(n, p) for n, p in part.named_parameters(prefix[:-1]) if not is_zero_param(p)]
            broadcast_params(named, module.given, self.root_device)
            fresh: list[Any] = [parameter for _, parameter in named]
            if convert:
                convert(fresh)
            else:
                deepspeed.zero.Init(part, config_dict_or_path=self.config, dtype=torch.float32)
                convert = fresh[0].convert_to_zero_parameters

    def backward(self, closure_loss: Tensor, optimizer, *given, **more) -> Tensor:
        """Run the backward pass without DeepSpeed's division by the number of accumulated micro-batches.

        Lightning has divided already, and DeepSpeed would once more: gradients would be too small, which Adam hides,
        and clipping does not.
        """
        return super().backward(closure_loss, optimizer, *given, **more, scale_wrt_gas=False)

    def optimizer_step(self, optimizer, closure, model=None, **more) -> Any:
        """Run an optimizer step."""
        last = self.deepspeed_engine.is_gradient_accumulation_boundary()  # micro-batch of the step
        result = super().optimizer_step(optimizer, closure, model, **more)
        if last:
            done = self.deepspeed_engine.optimizer
            module: Any = self.lightning_module
            module.grad_norm = torch.as_tensor(done._global_grad_norm).float().cpu()
            module.skipped = done.overflow
        return result


def clip_as_others_do(optimizer, limit: float) -> None:
    """Make DeepSpeed's optimizer measure and clip gradients as the other strategies do, to the last bit.

    Its own sums are float32 and give other factors. A norm that is NaN or infinite makes it skip the step, as they do.
    """
    third = hasattr(optimizer, "fp16_groups")

    def norm(*_) -> Tensor:
        mine = [g for gradients in optimizer.averaged_gradients.values() for g in gradients]
        norm_of_all = grad_norm(mine, True)
        return norm_of_all if torch.isfinite(norm_of_all) else torch.tensor(float("inf"), device=norm_of_all.device)

    if third:
        optimizer._get_norm_groups = lambda: [norm()]
        flat = optimizer.fp32_partitioned_groups_flat
        optimizer.unscale_and_clip_grads = lambda group, total: clip_grads([flat[group].grad], total, limit)
    else:
        optimizer.scaled_global_norm = norm
        optimizer.unscale_and_clip_grads = lambda gradients, total: clip_grads(gradients, total, limit)


class ZeroSharding(Sharding):
    """The optimizer's memory, and from stage 3 on the weights, are DeepSpeed's to give and take."""

    def own_optimizer(self, groups: list[dict], betas: tuple[float, float], eps: float) -> Optimizer | None:
        """Return DeepSpeed's optimizer, where it needs its own."""
        if not self.strategy.offload:
            return None
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=1.0, betas=betas, eps=eps, adamw_mode=True)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> None:
        """DeepSpeed does it within its step."""

    def weights(self, parameters: Mapping[str, Any]) -> dict[str, LazyTensor]:
        """Return the trained weights, to be gathered when they are read."""
        if not self.weights_in_pieces:
            return super().weights(parameters)
        return {
            name: LazyTensor(tuple(p.ds_shape), torch.float32, partial(full_weight, p))
            for name, p in parameters.items()
        }

    def memory(self, optimizer, parameters: Mapping[str, Any]) -> tuple[dict[str, LazyTensor], dict[str, dict]]:
        """Return the optimizer's moments and its other state."""
        flat = flat_parameters(optimizer)[0]
        if flat not in optimizer.optimizer.state:
            return {}, {}
        self.link(optimizer)
        count = torch.tensor(float(optimizer.optimizer.state[flat]["step"]))
        tensors = {}
        for name, p in parameters.items():
            tensors[f"{name}/step"] = lazy_tensor(count)
            shape = tuple(p.ds_shape) if self.weights_in_pieces else tuple(p.shape)
            for key in MOMENTS:
                tensors[f"{name}/{key}"] = LazyTensor(shape, torch.float32, partial(full_moment, p, key))
        return tensors, {}

    def link(self, optimizer) -> None:
        """Give parameters the places of their moments.

        DeepSpeed does so after its first step, of the first group of parameters, when those of the others are not there yet.
        """
        if not self.weights_in_pieces:
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def remember(self, optimizer, parameters: Parameters, tensors, others) -> None:
        """Load the optimizer's moments and its other state."""
        if not tensors:
            return
        count = next(tensor for name, tensor in tensors.items() if name.endswith("/step"))
        for flat in flat_parameters(optimizer):
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            optimizer.optimizer.state[flat] = {
                "step": int(count) if self.strategy.offload else count.clone(),
                **moments,
            }
        self.link(optimizer)
        for name, p in parameters.items():
            for key in MOMENTS:
                value = tensors[f"{name}/{key}"].to(flat.device)
                if self.weights_in_pieces:
                    safe_set_local_optimizer_state(p, part_of(p, value), key)
                else:
                    safe_set_full_optimizer_state(p, value, key)


def flat_parameters(optimizer) -> list[Tensor]:
    """What DeepSpeed's optimizer has made of the parameters of this process."""
    third = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return optimizer.fp32_partitioned_groups_flat if third else optimizer.single_partition_of_fp32_groups


def full_weight(parameter: nn.Parameter) -> Tensor:
    """Return a whole weight, gathered."""
    return safe_get_full_fp32_param(parameter)


def full_moment(parameter: nn.Parameter, key: str) -> Tensor:
    """Return a whole moment, gathered."""
    return safe_get_full_optimizer_state(parameter, key)


def part_of(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's share of a whole tensor, as stage 3 shards it: equal parts, the last one padded.

    DeepSpeed's own way to set a whole one fails where there is padding.
    """
    size = parameter.ds_tensor.ds_numel
    mine = value.flatten()[dist.get_rank() * size :][:size]
    return torch.nn.functional.pad(mine, (0, size - mine.numel()))
