"""The model of a run, as it is when its first step begins."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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

# GRAD_CP -> what the model computes again
RECOMPUTE = {"0": "nothing", "1": "blocks", "selective": "cheap"}


@dataclass
class TrainModel:
    """begun: what the adapters began with, where it cannot be computed anew. held: the base, held open, where checkpoints are
    changed copies of it: it stays what it is even if another file takes its name. later: what of the model is not made yet, where
    its weights will lie in pieces: a process never holds all of them.
    """

    model: RWKV
    begun: Mapping[str, Tensor]
    lisa: Lisa | None
    held: Any
    groups: Callable[[], list[dict]]
    later: Later

    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters that checkpoints hold, by their names there."""
        return self.lisa.saved() if self.lisa else inject.trainable_params(self.model)


def make_train_model(run: RunSetup, cleanup: contextlib.ExitStack, say: Callable[[str], None]) -> TrainModel:
    config, setup, dtype = run.config, run.setup, hardware.DTYPES[run.precision]
    base_model.check_model(run.base, run.geometry)
    if run.begins_with:
        base_model.check_finite(run.begins_with, pth.read_header(run.begins_with))
    torch.manual_seed(config.seed)
    held = cleanup.enter_context(pth.PthReader(run.base)) if run.method.saves_model else None
    model = build(run.geometry, pth.load(run.base), run.ops, dtype, RECOMPUTE[config.grad_cp])
    start_file = run_dir.init_file(run.folder, config.method) if run.found else run.earlier and run.earlier.start
    start = pth.load(start_file) if start_file and start_file.is_file() else None
    later: Later | None = {} if run.spread.weights_in_pieces else None
    begun = inject.inject_adapters(model, setup, dtype, start, hardware.device(run.place.local), later)
    lisa = None
    if config.method == "lisa":
        lisa = Lisa(model, config.parts, config.lisa_r, config.lisa_k, config.seed, dtype)
        lisa.follow(0)
    if run.begins_with:
        shown = paths.display_path(run.begins_with)
        inject.load_trained(model, pth.load(run.begins_with), shown, later)
        say(f"starts from {shown} (what it has learnt; the optimizer starts anew)")
        folder = run.begins_with.resolve().parent
        if folder.parent == paths.OUTPUT and train_state.states_newest_first(folder):
            more = f"RUN_NAME={shlex.quote(folder.name)} and a larger EPOCH_COUNT"
            say(f"          {more} would go on with that run itself, optimizer, data and all, as if it had never ended")

    def groups() -> list[dict]:
        rate = functools.partial(arch.lr_scale, run.geometry)
        named = inject.trainable_params(model).items()
        return parameter_groups(named, config.weight_decay, arch.decays, rate, config.loraplus_lr_ratio)

    begun = {name: tensor.cpu() for name, tensor in begun.items()}
    model.emb.on_host = run.settings["EMB_ON_CPU"] == "1"
    if config.cuda_graphs and run.ops.name == "cuda":
        model.replay = Graphs(model, say)
    elif config.cuda_graphs:
        say(f"CUDA graphs are not used: they are for OP=cuda, and this run computes with {run.ops.name}")
    learner = TrainModel(model, begun, lisa, held, groups, later or {})
    if run.found:
        with train_state.explain_mismatch(run.found):
            weights = run.found.tensors("weights")
            if lisa:
                lisa.go_on(run.found.facts["blocks"], weights)
            inject.load_into(learner.trained(), weights, paths.display_path(run.found.folder), later)
    torch.manual_seed(config.seed + run.place.rank)  # dropout differs between ranks, the weights do not
    return learner


def make_module(run: RunSetup, learner: TrainModel) -> TrainingModule:
    """What Lightning trains."""
    config = run.config
    module = TrainingModule(
        learner.model,
        learner.groups,
        run.steps,
        run.spread,
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
    )
    module.settle = functools.partial(materialize, learner.model, learner.later)
    module.given = inject.given(learner.model, run.setup)
    # what DistributedDataParallel is not to send around at the start
    module._ddp_params_and_buffers_to_ignore = [
        f"model.{name}" for name, _ in learner.model.named_parameters() if module.given(name)
    ]
    return module
