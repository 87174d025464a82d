"""The model of a run as it is before its first step, and the module that Lightning trains."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.deferred import Later, materialize
from rwkv_peft.checkpoint import base_model, pth, run_dir, train_state
from rwkv_peft.common import hardware, paths
from rwkv_peft.model import arch
from rwkv_peft.model.rwkv import RWKV, build
from rwkv_peft.train.callbacks.lisa import Lisa

from .cuda_graphs import Graphs
from .module import TrainingModule
from .optim import parameter_groups
from .setup import RunSetup

# GRAD_CP -> what the model recomputes
RECOMPUTE = {"0": "nothing", "1": "blocks", "selective": "cheap"}


@dataclass(frozen=True)
class TrainModel:
    """The model and what belongs to it.

    Attributes:
        model: with adapters, and the state of a resumed run.
        initial_tensors: of the adapters, where they cannot be computed again.
        lisa: the blocks that LISA trains, None for other methods.
        base_file: the base, kept open where checkpoints are changed copies of it: it stays what it is even if another file
            takes its name.
        groups: returns the optimizer's parameter groups.
        deferred: parts of the model that are made when its weights are sharded: a process never has all of them.
    """

    model: RWKV
    initial_tensors: Mapping[str, Tensor]
    lisa: Lisa | None
    base_file: pth.PthReader | None
    groups: Callable[[], list[dict]]
    deferred: Later

    def trained(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters that checkpoints hold, by their names there."""
        return self.lisa.saved() if self.lisa else inject.trainable_params(self.model)


def make_train_model(run: RunSetup, cleanup: contextlib.ExitStack, log: Callable[[str], None]) -> TrainModel:
    """Load the base model, inject the adapters, and load what the run continues.

    Args:
        run: what is trained.
        cleanup: closes files at the end of the run.
        log: prints a message.

    Raises:
        UserError: a file does not fit the run.
    """
    config, base, state, dtype = run.config, run.base, run.state, hardware.DTYPES[run.compute.precision]
    base_model.check_model(base.path, base.geometry)
    init = run.resume.init
    if init.path:
        base_model.check_finite(init.path, pth.read_header(init.path))
    torch.manual_seed(config.seed)
    base_file = cleanup.enter_context(pth.PthReader(base.path)) if run.method.saves_model else None
    model = build(base.geometry, pth.load(base.path), run.compute.ops, dtype, RECOMPUTE[config.grad_cp])
    start_file = run_dir.init_file(run.run_dir, config.method) if state else init.start
    start = pth.load(start_file) if start_file and start_file.is_file() else None
    deferred: Later | None = {} if run.compute.sharding.are_weights_sharded else None
    device = hardware.local_device(run.process.local)
    initial_tensors = inject.inject_adapters(model, base.adapter, dtype, start, device, deferred)
    lisa = None
    if config.method == "lisa":
        lisa = Lisa(model, config.parts, config.lisa_r, config.lisa_k, config.seed, dtype)
        lisa.follow(0)
    if init.path:
        shown = paths.display_path(init.path)
        inject.load_trained(model, pth.load(init.path), shown, deferred)
        log(f"starts from {shown} (what it has learnt; the optimizer starts anew)")
        folder = init.path.resolve().parent
        if folder.parent == paths.OUTPUT and train_state.states_newest_first(folder):
            more = f"RUN_NAME={shlex.quote(folder.name)} and a larger EPOCH_COUNT"
            log(f"          {more} would go on with that run itself, optimizer, data and all, as if it had never ended")

    def groups() -> list[dict]:
        lr_scale = functools.partial(arch.lr_scale, base.geometry)
        named = inject.trainable_params(model).items()
        return parameter_groups(named, config.weight_decay, arch.decays, lr_scale, config.loraplus_lr_ratio)

    model.emb.on_host = run.settings.emb_on_host
    if config.cuda_graphs and run.compute.ops.name == "cuda":
        model.replay = Graphs(model, log)
    elif config.cuda_graphs:
        log(f"CUDA graphs are not used: they are for OP=cuda, and this run computes with {run.compute.ops.name}")
    on_cpu = {name: tensor.cpu() for name, tensor in initial_tensors.items()}
    train_model = TrainModel(model, on_cpu, lisa, base_file, groups, deferred or {})
    if state:
        with train_state.explain_mismatch(state):
            weights = state.tensors("weights")
            if lisa:
                lisa.resume(state.facts["blocks"], weights)
            inject.load_into(train_model.trained(), weights, paths.display_path(state.folder), deferred)
    torch.manual_seed(config.seed + run.process.rank)  # dropout differs between ranks, the weights do not
    return train_model


def make_module(run: RunSetup, model: TrainModel) -> TrainingModule:
    """Return the module that Lightning trains."""
    config = run.config
    module = TrainingModule(
        model.model,
        model.groups,
        run.data.steps,
        run.compute.sharding,
        config.lr_schedule,
        config.lr_init,
        config.lr_final,
        config.warmup_steps,
        (config.beta1, config.beta2),
        config.adam_eps,
        config.grad_clip,
        config.chunk_ctx if config.train_type == "infctx" else None,
        config.infctx_grad,
        config.optim,
        functools.partial(materialize, model.model, model.deferred),
        inject.given(model.model, run.base.adapter),
    )
    # DistributedDataParallel does not broadcast these at the start: every rank has read them from the base's file
    ignored = [f"model.{name}" for name, _ in model.model.named_parameters() if module.given(name)]
    # (torch's stub allows tensors and modules only)
    module._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
    return module
