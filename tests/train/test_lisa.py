"""LISA: the optimizer follows the blocks that are drawn, and nothing else changes."""

import pytest
import torch
from helpers import tiny
from helpers import training as inprocess

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.inject import AdapterConfig
from rwkv_peft.checkpoint import pth
from rwkv_peft.train.callbacks.lisa import Lisa, LisaResample

SHAPE = tiny.geometry(4, 32, 64, 16)


def lisa(parts=("att", "ffn"), layers=1, every=3, seed=0, keep=torch.float32):
    model = tiny.model(0, SHAPE)
    inject.inject_adapters(model, AdapterConfig("lisa", {"layers": layers, "every": every}, (*parts, "ln")), keep)
    return Lisa(model, parts, layers, every, seed, keep)


def test_blocks_are_drawn_again_every_so_many_steps_and_the_same_for_the_same_seed():
    made = lisa(every=3, layers=2)
    drawn = [made.drawn(step) for step in range(90)]
    assert all(drawn[3 * i] == drawn[3 * i + 1] == drawn[3 * i + 2] for i in range(30))
    assert {block for blocks in drawn for block in blocks} == {0, 1, 2, 3}
    assert all(len(set(blocks)) == 2 for blocks in drawn)
    same, other = lisa(every=3, layers=2), lisa(every=3, layers=2, seed=1)
    assert drawn == [same.drawn(step) for step in range(90)]
    assert drawn != [other.drawn(step) for step in range(90)]


def trained_blocks(model, parts=("att", "ffn")):
    linears = {
        n.split(".")[1]
        for n in inject.trainable_params(model)
        if n.split(".")[2:3] in ([p] for p in parts) and "ln_x" not in n
    }
    return sorted(int(block) for block in linears)


@pytest.mark.parametrize("parts", [("att",), ("ffn",), ("att", "ffn")])
def test_what_is_drawn_is_trained_whole_and_the_others_are_frozen(parts):
    made = lisa(parts)
    for step in range(0, 30, 3):
        made.follow(step)
        assert trained_blocks(made.model, parts) == made.drawn(step)
        names = [n for n in inject.trainable_params(made.model) if ".ln" not in n and "ln_" not in n]
        assert {n.split(".")[2] for n in names} == set(parts)
        assert all(p.dtype == torch.float32 for p in inject.trainable_params(made.model).values())


def test_a_block_that_goes_is_kept_in_the_dtype_of_frozen_weights():
    made = lisa(keep=torch.bfloat16)
    made.follow(0)
    [first] = made.active
    step = next(s for s in range(3, 300, 3) if made.drawn(s) != [first])
    made.follow(step)
    assert made.model.get_parameter(f"blocks.{first}.att.key.weight").dtype == torch.bfloat16
    assert f"blocks.{first}.att.key.weight" in made.saved()


class FakeTrainer:
    accumulate_grad_batches = 1
    global_step = 0


def test_the_optimizer_moves_exactly_the_drawn_blocks_and_forgets_the_others():
    """What RWKV-PEFT's LISA did not: its optimizer kept the first draw for ever."""
    made = lisa()
    made.follow(0)
    groups = lambda: [{"params": list(inject.trainable_params(made.model).values()), "lr": 1e-2, "weight_decay": 0.0}]  # noqa: E731
    trainer, x = FakeTrainer(), torch.arange(1, 20)[None]
    trainer.optimizers = [torch.optim.AdamW(groups())]
    hook = LisaResample(made, groups)
    for step in range(12):
        trainer.global_step = step
        hook.on_train_batch_start(trainer, None, None, 0)
        before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        made.model(x)[0].square().mean().backward()
        trainer.optimizers[0].step()
        trainer.optimizers[0].zero_grad()
        changed = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
        linears = {
            n for n in changed if n.endswith((".key.weight", ".value.weight", ".output.weight", ".receptance.weight"))
        }
        assert {int(n.split(".")[1]) for n in linears} == set(made.drawn(step))
        assert len(trainer.optimizers[0].state) == len(inject.trainable_params(made.model))


def test_a_run_changes_every_block_that_was_drawn_and_no_other(ready):
    tiny.save_model(ready / "model" / "deep.pth", shape=tiny.geometry(4))
    settings = {"FINETUNE_MODE": "lisa", "lisa_r": "1", "lisa_k": "2", "MODEL_PATH": "deep.pth", "EPOCH_COUNT": "2"}
    saved, records = inprocess.run(ready, lora_parts="att,ffn", MICRO_BSZ="1", **settings)
    base = pth.load(ready / "model" / "deep.pth")
    changed = {int(n.split(".")[1]) for n, t in base.items() if not torch.equal(saved[n], t)}
    made = lisa(every=2, seed=42)
    assert changed == {block for step in range(len(records)) for block in made.drawn(step)} and len(changed) > 1
    assert set(saved) == set(base)


def test_a_run_asks_for_no_more_layers_than_there_are(ready):
    from rwkv_peft.common.errors import SettingErrors

    with pytest.raises(SettingErrors, match="lisa_r: must be 2 or less"):
        inprocess.run(ready, FINETUNE_MODE="lisa", lisa_r="3")
