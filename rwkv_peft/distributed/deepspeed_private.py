"""Every use of DeepSpeed's private parts, and of attributes of its objects that its documentation does not promise.

Checked against the version below. tests/distributed/test_deepspeed_private.py fails where another version changes what is used.
`optimizer` is always DeepSpeed's ZeRO optimizer: of stages 1 and 2 (runtime/zero/stage_1_and_2.py), or of stage 3
(runtime/zero/stage3.py). Where the two differ, each function needs both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from torch import Tensor, nn
from torch.utils import cpp_extension

CHECKED_VERSION = "0.19.8"  # of deepspeed

# DeepSpeedZeroOptimizer or DeepSpeedZeroOptimizer_Stage3, which have no annotations and no common base with these attributes
ZeroOptimizer = Any


def disable_shm_comm() -> None:
    """Let processes of one machine without GPUs use gloo, not DeepSpeed's shared-memory operator, which has to be compiled.

    Needs: `deepspeed.comm.torch` takes the operator only if `deepspeed.ops.__compatible_ops__` says that it can.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def cpu_adam_build_directory() -> Path:
    """Return the folder in which torch builds DeepSpeedCPUAdam's extension, and make it. Its file `lock` exists during a build.

    Needs: DeepSpeed builds the extension `cpu_adam` by torch.utils.cpp_extension.load without a `build_directory`; torch's
    `_get_build_directory(name, verbose)`, and that torch holds `lock` open from its creation until the build has ended.
    """
    return Path(cpp_extension._get_build_directory("cpu_adam", False))


def broadcast_by(broadcast: Callable[[], None]) -> contextlib.AbstractContextManager[object]:
    """Replace the broadcast of all parameters that `deepspeed.initialize` does, which sends frozen weights as well.

    Needs: the engine's constructor calls `DeepSpeedEngine._broadcast_model()` once, and not at all where stage 3 has
    partitioned the parameters.
    """
    return patch.object(deepspeed.DeepSpeedEngine, "_broadcast_model", lambda _engine: broadcast())


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether stage 3 has partitioned a parameter.

    Needs: `is_zero_param` in runtime/zero/partition_parameters.py.
    """
    return is_zero_param(parameter)


def partition_module(module: nn.Module, config: Mapping[str, Any] | None) -> Callable[[list[nn.Parameter]], None]:
    """Partition all parameters of a module as stage 3 does. Return the function that partitions others in the same way.

    Needs: `deepspeed.zero.Init(module)` gives each parameter a `convert_to_zero_parameters` that takes a list.
    """
    deepspeed.zero.Init(module, config_dict_or_path=config, dtype=torch.float32)
    return next(module.parameters()).convert_to_zero_parameters  # type: ignore[attr-defined]  # added by DeepSpeed


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, also of one that stage 3 has partitioned.

    Needs: a partitioned parameter's `ds_shape`.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local_shard(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, as stage 3 partitions `parameter`: equal shards, the last one padded.

    DeepSpeed's own `safe_set_full_optimizer_state` fails where there is padding.

    Needs: a partitioned parameter's `ds_tensor.ds_numel`, the values of a shard; shards are in the order of ranks.
    """
    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]  # added by DeepSpeed
    shard = value.flatten()[dist.get_rank() * size :][:size]
    return torch.nn.functional.pad(shard, (0, size - shard.numel()))


def flat_parameters(optimizer: ZeroOptimizer) -> list[Tensor]:
    """Return the float32 tensors into which an optimizer has flattened the parameters of this process, one per group.

    Needs: `fp32_partitioned_groups_flat` of stage 3, `single_partition_of_fp32_groups` of the others.
    """
    if is_stage_3(optimizer):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def is_stage_3(optimizer: ZeroOptimizer) -> bool:
    """Return whether an optimizer is that of stage 3.

    Needs: only that one has `fp32_partitioned_groups_flat`.
    """
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def link_moments(optimizer: ZeroOptimizer) -> None:
    """Link parameters to their moments again, so that the `safe_get_full_*` functions find them.

    DeepSpeed links them after its first step of the first group of parameters, when those of the others do not exist yet.

    Needs: `_lazy_init_hp_params_optimizer_state()` of stages 1 and 2, which does nothing if `_hp_optimizer_states_linked`.
    Stage 3 needs no links.
    """
    if not is_stage_3(optimizer):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def replace_clipping(
    optimizer: ZeroOptimizer,
    norm: Callable[[list[Tensor]], Tensor],
    clip: Callable[[Iterable[Tensor], Tensor], None],
) -> None:
    """Replace the gradient norm and the clipping of an optimizer. A norm of infinity makes it skip the step.

    Needs: `averaged_gradients`, by group; before its step, stage 3 calls `_get_norm_groups()` and combines the norms of groups
    as the root of the sum of their squares, then calls `unscale_and_clip_grads(group, norm)` of each group, whose gradient is in
    `fp32_partitioned_groups_flat[group].grad`; the others call `scaled_global_norm()` and `unscale_and_clip_grads(gradients,
    norm)`.

    Args:
        optimizer: of stages 1 to 3, without offloading.
        norm: returns the norm over all processes, [] on the device, from this process's gradients.
        clip: scales gradients in place, given their norm.
    """

    def total_norm(*_args: object) -> Tensor:
        return norm([g for gradients in optimizer.averaged_gradients.values() for g in gradients])

    if is_stage_3(optimizer):
        flat = optimizer.fp32_partitioned_groups_flat
        optimizer._get_norm_groups = lambda: [total_norm()]
        optimizer.unscale_and_clip_grads = lambda group, total: clip([flat[group].grad], total)
    else:
        optimizer.scaled_global_norm = total_norm
        optimizer.unscale_and_clip_grads = clip
