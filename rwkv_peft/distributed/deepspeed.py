"""STRATEGY=deepspeed_stage_1 to 3: DeepSpeed's ZeRO through Lightning, on GPUs and also without one.

Trained weights are float32 and the model casts by itself, so DeepSpeed's configuration names no other dtype.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import cpp_extension

from rwkv_peft.checkpoint.lazy_tensors import LazyTensor
from rwkv_peft.config.strategies import Strategy
from rwkv_peft.model.rwkv import Block
from rwkv_peft.quantize import codes_as_parameters

from . import deepspeed_private
from .lightning_private import DeepSpeedOnAnyDevice
from .sharding import (
    Parameters,
    ShardableModule,
    Sharding,
    as_shardable,
    broadcast_params,
    clip_grads,
    grad_norm,
    lazy_tensor,
)

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's optimizer state of a parameter
BUCKET = 50_000_000  # values that are sent at once
STALE_LOCK = 300.0  # seconds; the build that the lock is for takes half a minute
LOCK_POLL = 0.5  # seconds


def make_config(strategy: Strategy, grad_clip: float) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        strategy: one of STRATEGIES with a stage.
        grad_clip: largest gradient norm, 0 where DeepSpeed does not clip by its own rules.
    """
    zero: dict[str, Any] = {
        # of values, below which weights stay whole; those of a block are gathered together, whatever their size
        "stage3_param_persistence_threshold": 0,
        "stage": strategy.stage, "contiguous_gradients": True, "overlap_comm": torch.cuda.is_available(),
        "allgather_bucket_size": BUCKET, "reduce_bucket_size": BUCKET,
    }  # fmt: skip
    if strategy.offload:
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": host} | ({"offload_param": host} if strategy.stage == 3 else {})
    return {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own log of speeds, which is off
        "zero_allow_untested_optimizer": True, "zero_optimization": zero, "gradient_clipping": grad_clip,
    }  # fmt: skip


class KeepDtypes(DeepSpeedPrecision):
    """Precision plugin that keeps dtypes. Lightning's makes every weight float32, also those that are frozen in bf16."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return the module as it is."""
        return module


class DeepSpeedZero(DeepSpeedOnAnyDevice):
    """DeepSpeed's ZeRO as a strategy of Lightning's trainer.

    Args:
        strategy: one of STRATEGIES with a stage.
        grad_clip: largest gradient norm, 0 for no limit.
    """

    def __init__(self, strategy: Strategy, grad_clip: float):
        super().__init__(config=make_config(strategy, grad_clip if strategy.offload else 0.0))
        self.strategy, self.grad_clip = strategy, grad_clip
        deepspeed_private.disable_shm_comm()
        # torch passes this folder to the compiler without quotes; the kit may be in one with a space
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)

    def make_engine(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: object
    ) -> tuple[nn.Module, Optimizer]:
        """Partition the weights (stage 3) and return DeepSpeed's engine with its optimizer."""
        module = as_shardable(model)
        if self.strategy.stage == 3:
            # the weights of a block are gathered together: its fused operations take weights of other modules than their own
            deepspeed.utils.set_z3_leaf_modules(module, [Block])
            self.partition(module)

        def broadcast() -> None:
            broadcast_params(module.model.named_parameters(), module.given, self.root_device)

        with deepspeed_private.broadcast_by(broadcast):
            engine, zero_optimizer, *_ = deepspeed.initialize(
                config=self.config,
                model=module,
                model_parameters=[p for p in module.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )
        if self.strategy.stage == 3:
            # the loss takes it past its module
            for weight in module.model.head.parameters():
                deepspeed.zero.register_external_parameter(module, weight)
            # DeepSpeed releases a block's weights once the gradient of the block's input exists: something has to ask for one
            module.model.emb.register_forward_hook(
                lambda _m, _i, x: x.requires_grad_() if torch.is_grad_enabled() else x
            )
        if not self.strategy.offload:
            clip_as_other_strategies(zero_optimizer, self.grad_clip)
        return engine, zero_optimizer

    def partition(self, module: ShardableModule) -> None:
        """Partition the weights block by block, so that no process holds more than one block whole.

        DeepSpeed itself would begin when all weights exist.
        """
        model = module.model
        parts: dict[str, nn.Module] = {f"blocks.{number}.": block for number, block in enumerate(model.blocks)}
        partition: Callable[[list[nn.Parameter]], None] | None = None
        for prefix, part in (parts | {"": model}).items():
            module.settle(prefix)
            codes_as_parameters(part)
            whole = [
                (name, parameter)
                for name, parameter in part.named_parameters(prefix[:-1])
                if not deepspeed_private.is_partitioned(parameter)
            ]
            broadcast_params(whole, module.given, self.root_device)
            if partition:
                partition([parameter for _, parameter in whole])
            else:
                partition = deepspeed_private.partition_module(part, self.config)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass without DeepSpeed's division by the number of accumulated micro-batches.

        Lightning has divided already. Gradients would be so much smaller, which Adam hides and clipping does not.
        """
        return super().backward(closure_loss, optimizer, *args, **kwargs, scale_wrt_gas=False)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Take a step; after the last micro-batch, give the module the gradient norm and whether the step was skipped."""
        engine = self.deepspeed_engine
        is_last = engine.is_gradient_accumulation_boundary()  # micro-batch of the step
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if is_last:
            module = as_shardable(self.lightning_module)
            module.grad_norm = torch.as_tensor(engine.get_global_grad_norm()).float().cpu()
            module.skipped = not engine.was_step_applied()
        return result


def clip_as_other_strategies(optimizer: Optimizer, limit: float) -> None:
    """Let DeepSpeed's optimizer measure and clip gradients as the other strategies do, to the last bit.

    Its own sums are float32 and end in other factors. A norm that is not finite makes it skip the step, as they do.
    """

    def norm(gradients: list[Tensor]) -> Tensor:
        total = grad_norm(gradients, True)
        return total if torch.isfinite(total) else torch.tensor(float("inf"), device=total.device)

    deepspeed_private.replace_clipping(optimizer, norm, lambda gradients, total: clip_grads(gradients, total, limit))


def remove_stale_lock(folder: Path) -> None:
    """Remove the lock of a build of torch's extensions whose process was killed: torch would wait for ever for its removal.

    The process that builds holds the file open, so a lock that no process of this machine holds is stale, unless another machine
    or container builds in the same folder. Such a lock is removed when it is STALE_LOCK seconds old; until then this waits. The
    processes of a machine check one after another (`flock`), so that none removes the new lock of another.

    Args:
        folder: where torch builds the extension; it need not exist.
    """
    lock = folder / "lock"
    if not lock.exists():
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        announced = False
        while lock.exists() and not is_open(lock):
            left = STALE_LOCK - (time.time() - lock.stat().st_mtime)
            if left <= 0:
                lock.unlink(missing_ok=True)
                print(f"removed {lock}: a build that was killed had left it", file=sys.stderr, flush=True)
            elif not announced:
                print(
                    f"{lock} was left by a build that was killed, or another machine builds there: waiting {left:.0f} s at most. "
                    "If no other machine uses this folder, remove the file, and training goes on at once.",
                    file=sys.stderr,
                    flush=True,
                )
                announced = True
            time.sleep(min(LOCK_POLL, max(left, 0.0)))
    except FileNotFoundError:  # the other machine has finished
        pass
    finally:
        os.close(descriptor)


def is_open(path: Path) -> bool:
    """Return whether a process of this machine that this user may inspect has a file open."""
    target = path.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            status = descriptor.stat()
        except OSError:  # of another user, or closed by now
            continue
        if (status.st_dev, status.st_ino) == (target.st_dev, target.st_ino):
            return True
    return False


class ZeroSharding(Sharding):
    """Sharding where DeepSpeed partitions the optimizer state, and from stage 3 on the weights."""

    def own_optimizer(self, groups: list[dict], betas: tuple[float, float], eps: float) -> Optimizer | None:
        """Return DeepSpeed's optimizer for the host where it is offloaded; building it can take half a minute, once."""
        if not self.strategy.offload:
            return None
        remove_stale_lock(deepspeed_private.cpu_adam_build_directory())
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=1.0, betas=betas, eps=eps, adamw_mode=True)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> None:
        """Do nothing: DeepSpeed clips within its step."""

    def weights(self, parameters: Parameters) -> dict[str, LazyTensor]:
        """Return whole weights, by the names of `parameters`."""
        if not self.are_weights_sharded:
            return super().weights(parameters)
        return {
            name: LazyTensor(deepspeed_private.full_shape(p), torch.float32, partial(safe_get_full_fp32_param, p))
            for name, p in parameters.items()
        }

    def optimizer_state(self, optimizer: Any, parameters: Parameters) -> tuple[dict[str, LazyTensor], dict[str, dict]]:
        """Return the optimizer state as the base class does. optimizer: DeepSpeed's."""
        flat = deepspeed_private.flat_parameters(optimizer)[0]
        if flat not in optimizer.optimizer.state:
            return {}, {}
        deepspeed_private.link_moments(optimizer)
        count = torch.tensor(float(optimizer.optimizer.state[flat]["step"]))
        tensors = {}
        for name, p in parameters.items():
            tensors[f"{name}/step"] = lazy_tensor(count)
            for key in MOMENTS:
                tensors[f"{name}/{key}"] = LazyTensor(
                    deepspeed_private.full_shape(p), torch.float32, partial(safe_get_full_optimizer_state, p, key)
                )
        return tensors, {}

    def load_optimizer_state(
        self, optimizer: Any, parameters: Parameters, tensors: Mapping[str, Tensor], others: Mapping[str, dict]
    ) -> None:
        """Load an optimizer state as the base class does. optimizer: DeepSpeed's."""
        if not tensors:
            return
        count = next(tensor for name, tensor in tensors.items() if name.endswith("/step"))
        flats = deepspeed_private.flat_parameters(optimizer)
        for flat in flats:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            optimizer.optimizer.state[flat] = {
                "step": int(count) if self.strategy.offload else count.clone(),
                **moments,
            }
        deepspeed_private.link_moments(optimizer)
        for name, p in parameters.items():
            for key in MOMENTS:
                value = tensors[f"{name}/{key}"].to(flats[-1].device)
                if self.are_weights_sharded:
                    safe_set_local_optimizer_state(p, deepspeed_private.local_shard(p, value), key)
                else:
                    safe_set_full_optimizer_state(p, value, key)
