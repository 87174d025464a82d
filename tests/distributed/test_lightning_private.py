"""Fails where a version of Lightning changes what distributed/lightning_private.py uses."""

import ast
import inspect
import subprocess
import sys
import threading

import pytest
import pytorch_lightning as pl
import torch
from helpers.kit import ROOT
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
from pytorch_lightning.strategies.launchers import subprocess_script
from torch.utils.data import DataLoader, TensorDataset

from rwkv_peft.distributed import lightning_private

LIBRARIES = ("pytorch_lightning", "lightning_fabric", "deepspeed")
PRIVATE_FILES = {
    "distributed/lightning_private.py": ("pytorch_lightning", "lightning_fabric"),
    "distributed/deepspeed_private.py": ("deepspeed",),
}
# of the objects of these libraries, whatever a variable is called
PRIVATE_NAMES = {
    "fit_loop", "epoch_loop", "epoch_progress", "batch_progress", "optim_progress", "max_batches", "subprocess_script",
    "_launch_process_observer", "_setup_model_and_optimizer", "_init_deepspeed_distributed",
    "partition_parameters", "is_zero_param", "convert_to_zero_parameters", "zero.Init", "ds_shape", "ds_tensor", "ds_numel",
    "_broadcast_model", "_get_norm_groups", "_global_grad_norm", "overflow", "averaged_gradients", "scaled_global_norm",
    "unscale_and_clip_grads", "fp16_groups", "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups",
    "_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state", "__compatible_ops__",
}  # fmt: skip
HOLDERS = {"trainer", "strategy", "engine", "deepspeed_engine", "optimizer", "precision_plugin", "deepspeed", "pl"}


def private_uses(source: str, libraries: tuple[str, ...] = LIBRARIES) -> list[str]:
    """Uses of private parts in a source text: by import, by name, or by an underscore on what is called as their objects are."""
    uses = []
    imported = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in libraries:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in libraries:
                    names += alias.name.split(".")
                    imported.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.FunctionDef):
            uses += [node.name] if node.name in PRIVATE_NAMES else []
        uses += [name for name in names if name.startswith("_") or name in PRIVATE_NAMES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            dunder = node.attr.startswith("__")
            private = node.attr.startswith("_") and not dunder and owner in imported | HOLDERS
            if private or node.attr in PRIVATE_NAMES or f"{owner}.{node.attr}" in PRIVATE_NAMES:
                uses.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Constant) and node.value in PRIVATE_NAMES:
            uses.append(str(node.value))
    return uses


def test_private_uses_are_recognized():
    assert private_uses("import deepspeed\ndeepspeed.zero.Init(x)") == ["zero.Init"]
    assert private_uses("trainer.strategy._launcher") == ["strategy._launcher"]
    assert private_uses("from pytorch_lightning.loops import _TrainingEpochLoop") == ["_TrainingEpochLoop"]
    assert private_uses("import pytorch_lightning as pl\npl._x") == ["pl._x"]
    assert private_uses("def f(trainer):\n    trainer.fit_loop.max_batches = 1") == [
        "fit_loop.max_batches",
        "trainer.fit_loop",
    ]
    assert private_uses("patch.object(x, '_broadcast_model')") == ["_broadcast_model"]
    assert private_uses("trainer.strategy.root_device; self._mine; torch._foreach_mul_(x)") == []


def test_only_one_file_of_each_library_uses_its_private_parts():
    package = ROOT / "rwkv_peft"
    elsewhere = {
        path.relative_to(package).as_posix(): uses
        for path in package.rglob("*.py")
        if path.relative_to(package).as_posix() not in PRIVATE_FILES
        and (uses := private_uses(path.read_text(encoding="utf-8")))
    }
    assert not elsewhere
    for name in PRIVATE_FILES:
        assert private_uses((package / name).read_text(encoding="utf-8"))


def test_lightning_is_the_version_that_was_checked():
    """Where it is not, run this file and test_strategy.py with the new one, and then set CHECKED_VERSION to it."""
    assert pl.__version__ == lightning_private.CHECKED_VERSION


def test_child_process_observer_is_what_the_launcher_calls():
    called = [
        node.func.id
        for node in ast.walk(ast.parse(inspect.getsource(subprocess_script)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    original = subprocess_script._launch_process_observer
    assert "_launch_process_observer" in called
    assert list(inspect.signature(original).parameters) == ["child_processes"]
    observed = []
    with lightning_private.child_process_observer(observed.append):
        process = subprocess.Popen([sys.executable, "-c", ""])
        subprocess_script._launch_process_observer([process])
    assert observed == [[process]] and process.wait(30) == 0
    assert not any(thread.name == "child-process-observer" for thread in threading.enumerate())
    assert subprocess_script._launch_process_observer is original


class Linear(pl.LightningModule):
    """A model of one weight."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, _index):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Begin(pl.Callback):
    """Begins in epoch 1 of 3, at the third micro-batch of 4, after 6 steps."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, module):
        lightning_private.set_progress(trainer, 1, 6)
        self.seen.append((trainer.current_epoch, trainer.global_step))

    def on_train_epoch_start(self, trainer, module):
        lightning_private.set_epoch_batches(trainer, 2 if trainer.current_epoch == 1 else 4)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append((trainer.current_epoch, trainer.global_step))


def test_a_trainer_begins_at_the_progress_that_was_set(tmp_path):
    begin = Begin()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[begin], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Linear(), DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=1))
    assert begin.seen == [(1, 6), (1, 7), (1, 8), (2, 9), (2, 10), (2, 11), (2, 12)]
    assert trainer.global_step == 12


def test_srun_environment_sets_what_the_constructor_of_lightning_sets(monkeypatch):
    names = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID")
    for name, value in dict(zip(names, "83027", strict=True)).items():
        monkeypatch.setenv(name, value)
    for name in ("_validate_srun_used", "_validate_srun_variables"):
        monkeypatch.setattr(SLURMEnvironment, name, lambda *_: None)
    environment = lightning_private.SrunEnvironment(6)
    assert vars(environment).keys() - {"processes"} == vars(SLURMEnvironment()).keys()
    assert environment.creates_processes_externally
    place = environment.global_rank(), environment.local_rank(), environment.node_rank(), environment.world_size()
    assert place == (3, 0, 2, 6)
    environment.validate_settings(1, 1)  # Lightning's refuses these numbers
    assert list(inspect.signature(SLURMEnvironment.validate_settings).parameters) == [
        "self",
        "num_devices",
        "num_nodes",
    ]


@pytest.mark.parametrize(
    ("strategy", "name", "parameters"),
    [
        (DeepSpeedStrategy, "setup_environment", ["self"]),
        (DeepSpeedStrategy, "setup_distributed", ["self"]),
        (DeepSpeedStrategy, "_init_deepspeed_distributed", ["self"]),
        (DeepSpeedStrategy, "_setup_model_and_optimizer", ["self", "model", "optimizer", "lr_scheduler"]),
        (DeepSpeedStrategy, "set_world_ranks", ["self"]),
        (DDPStrategy, "configure_ddp", ["self"]),
        (DDPStrategy, "model_to_device", ["self"]),
    ],
)
def test_methods_that_strategies_replace_or_call_have_these_parameters(strategy, name, parameters):
    assert list(inspect.signature(getattr(strategy, name)).parameters) == parameters


def test_deepspeed_strategy_makes_its_engine_in_one_place_and_sets_up_by_its_base_class():
    engine_of = [name for name, method in inspect.getmembers(DeepSpeedStrategy, inspect.isfunction)
                 if ".initialize(" in inspect.getsource(method)]  # fmt: skip
    assert "_setup_model_and_optimizer" in engine_of
    assert set(engine_of) <= {"_setup_model_and_optimizer", "_initialize_deepspeed_inference"}
    assert "super().setup_environment()" in inspect.getsource(DeepSpeedStrategy.setup_environment)
    assert "setup_distributed()" in inspect.getsource(DDPStrategy.setup_environment)


def callback_classes() -> list[ast.ClassDef]:
    """The package's classes that Lightning calls as callbacks."""
    return [
        node
        for path in sorted((ROOT / "rwkv_peft").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Callback") for base in node.bases)
    ]


def test_no_callback_keeps_what_lightning_puts_under_the_same_name():
    """`trainer.fit` sets `log` and `log_dict` of every callback."""
    assert len(callback_classes()) > 5
    used = {
        (node.name, one.attr)
        for node in callback_classes()
        for one in ast.walk(node)
        if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "self" and one.attr in ("log", "log_dict")
    }
    assert not used
