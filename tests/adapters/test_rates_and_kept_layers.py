"""Learning rates of states, and the layer that 4 bits leave as it is."""

import json

import pytest
import torch
from helpers import tiny
from helpers.training import config, run

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.inject import AdapterConfig
from rwkv_peft.checkpoint import pth
from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.merge import fold
from rwkv_peft.quantize import QuantLinear
from rwkv_peft.train import lr_finder, report

FIRST = "blocks.0.att.output"
ALL = "att,ffn,blocks.0.att.output"


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"QUANT": "nf4"}, (FIRST,)),
        ({"QUANT": "fp4"}, (FIRST,)),
        ({"QUANT": "4bit"}, (FIRST,)),
        ({"QUANT": "nf4", "QUANT_PARTS": "att,ffn,emb,head"}, (FIRST,)),
        ({"QUANT": "nf4", "QUANT_PARTS": "ffn"}, ()),
        ({"QUANT": "nf4", "QUANT_PARTS": ALL}, ()),
        ({"QUANT": "int8"}, ()),
        ({"QUANT": "fp8", "QUANT_PARTS": ALL}, ()),
        ({"QUANT": "none", "QUANT_PARTS": ALL}, ()),
    ],
    ids=str,
)
def test_four_bits_leave_the_first_output_as_it_is_unless_quant_parts_names_it(settings, kept):
    made = config(**settings)
    assert made.quant_kept == kept and FIRST not in made.quantised_parts


def test_quant_parts_names_the_first_output_with_att_only():
    with pytest.raises(SettingErrors, match="names blocks.0.att.output without att"):
        config(QUANT="nf4", QUANT_PARTS="ffn,blocks.0.att.output")


def test_a_kept_layer_computes_with_the_bases_weight():
    model = tiny.model(shape=tiny.geometry(vocab=64))
    before = model.blocks[0].att.output.weight.detach().clone()
    inject.inject_adapters(
        model, AdapterConfig("none", parts=("ln",), quant="nf4", quant_parts=("att", "ffn"), quant_kept=(FIRST,))
    )
    assert torch.equal(model.blocks[0].att.output.weight, before)
    assert isinstance(model.blocks[1].att.output, QuantLinear) and isinstance(model.blocks[0].att.key, QuantLinear)


@pytest.mark.smoke(1)
@pytest.mark.parametrize(("parts", "kept"), [("att,ffn", [FIRST]), (ALL, [])])
def test_a_run_says_which_layers_it_left(ready, capsys, parts, kept):
    run(ready, QUANT="nf4", QUANT_PARTS=parts)
    sidecar = json.loads((ready / "output/run/rwkv-0.json").read_text())
    assert sidecar["quant_parts"] == ["att", "ffn"] and sidecar["quant_kept"] == kept
    said = capsys.readouterr().out
    assert ("blocks.0.att.output stays as it is" in said) == bool(kept)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("kept", [[FIRST], [], None], ids=["kept", "compressed", "of an earlier version"])
def test_a_merge_into_the_compressed_base_knows_what_was_left(ready, kept):
    from rwkv_peft.merge.inputs import load_checkpoint

    run(ready, QUANT="nf4", QUANT_PARTS=ALL if kept == [] else "att,ffn")
    path = ready / "output/run/rwkv-0.pth"
    facts = json.loads(path.with_suffix(".json").read_text())
    if kept is None:
        del facts["quant_kept"], facts["fields_sha256"]
        path.with_suffix(".json").write_text(json.dumps(facts))
    one = load_checkpoint(path, "", None, None, True)
    base, shape = pth.load(ready / "model/tiny.pth"), tiny.geometry()
    part = fold.opened(one.part, pth.read_header(ready / "model/tiny.pth"), shape)
    same = torch.equal(part.compressed(f"{FIRST}.weight", base[f"{FIRST}.weight"], shape), base[f"{FIRST}.weight"])
    assert same == bool(kept)
    second = "blocks.1.att.output.weight"
    assert not torch.equal(part.compressed(second, base[second], shape), base[second])


@pytest.mark.smoke(1)
@pytest.mark.parametrize("fact", [[FIRST], [], None], ids=["kept", "compressed", "of an earlier version"])
def test_a_run_resumes_with_what_it_left(ready, monkeypatch, fact):
    from rwkv_peft.train import setup

    run(ready, QUANT="nf4", KEEP_LAST="1", QUANT_PARTS=ALL if fact == [] else "att,ffn")
    [state] = (ready / "output/run/state").glob("step-*")
    manifest = next(p for p in state.glob("*.json") if "quant_kept" in p.read_text())
    facts = json.loads(manifest.read_text())
    assert facts["quant_kept"] == ([FIRST] if fact is None else fact)
    if fact is None:
        from rwkv_peft.checkpoint import train_state

        described = train_state.read_manifest
        monkeypatch.setattr(
            train_state,
            "read_manifest",
            lambda folder: (lambda result: (result.facts.pop("quant_kept"), result)[1])(described(folder)),
        )
    seen, header = [], setup.header
    monkeypatch.setattr(setup, "header", lambda made: (seen.append(made.base.adapter), header(made))[1])
    more = {"QUANT": "nf4", "KEEP_LAST": "1", "EPOCH_COUNT": "2", "QUANT_PARTS": ALL if fact == [] else "att,ffn"}
    train.command(config(RUN_NAME="run", **more), [])
    assert seen[-1].quant_kept == tuple(fact or ())


def test_the_estimate_counts_a_kept_layer_at_its_full_size(ready, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        report, "memory_bytes", lambda shapes, *_, **more: asked.append((shapes, more["compressed"])) or 1
    )
    for parts in ("att,ffn", ALL):
        train.command(config(QUANT="nf4", QUANT_PARTS=parts), ["--dry-run"])
    (left, less), (whole, more) = asked
    assert {*left} - {*whole} == {f"{FIRST}.weight"} and less < more


@pytest.mark.parametrize(
    ("values", "rate"),
    [(2e7, "0.001"), (1e8, "0.001"), (1.5e9, "0.004"), (2.9e9, "0.006"), (7.2e9, "0.01"), (13e9, "0.01")],
)
def test_the_usual_rate_of_a_state_grows_with_the_model(values, rate):
    assert report.usual_state(int(values)).endswith(f"about LR_INIT={rate} with LR_FINAL={float(rate) / 10:g}")


@pytest.mark.smoke(2)
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"LR_INIT": "1", "LR_FINAL": "1e-2"},
            "warning   LR_INIT=1 is far above what is usual (0.03 at most): usual are",
        ),
        (
            {"LR_INIT": "1e-3", "LR_FINAL": "0.1"},
            "warning   LR_FINAL=0.1 is far above what is usual (0.03 at most): usual are",
        ),
        ({"LR_INIT": "1e-3", "LR_FINAL": "0.1", "LR_SCHEDULE": "constant"}, ""),
        ({"LR_INIT": "3e-2", "LR_FINAL": "1e-3"}, ""),
        ({"LR_INIT": "1e-5", "LR_FINAL": "1e-6"}, "note      LR_INIT=1e-05 will hardly move a state"),
        ({"LR_INIT": "1e-5", "LR_FINAL": "1e-3"}, ""),
    ],
    ids=str,
)
def test_the_plan_has_a_line_of_its_own_for_the_highest_rate_of_a_state(ready, capsys, settings, line):
    train.command(config(FINETUNE_MODE="state_tuning", **{"LR_SCHEDULE": "cos", **settings}), ["--dry-run"])
    result = [
        text for text in capsys.readouterr().out.splitlines() if "is far above" in text or "hardly move a state" in text
    ]
    assert len(result) == bool(line) and all(text.startswith(line) for text in result)


@pytest.mark.pictures
def test_the_picture_of_find_lr_advises_no_more_than_its_text(tmp_path, monkeypatch):
    import contextlib

    from rwkv_peft.common import plotting

    titles, lines = [], []

    @contextlib.contextmanager
    def watched(*size):
        with plotting.open_figure(*size) as (drawing, axes):
            yield drawing, axes
            titles.append(axes.get_title())
            lines.extend((line.get_color(), line.get_xdata()[0], line.get_label()) for line in axes.get_lines())

    monkeypatch.setattr(lr_finder, "open_figure", watched)
    monkeypatch.setattr(lr_finder, "advise", lambda *_: lr_finder.Advice(10.0, 1.0, False))
    for usual in (0.001, None):
        lr_finder.draw([1e-3, 1e-2, 1e-1], [3.0, 2.0, 1.0], tmp_path / "x.png", usual)
    green = [(at, words) for colour, at, words in lines if colour == "#2e8b57"]
    assert green == [(0.001, "usual for a state of this model: 1e-03"), (1.0, "a tenth of the lowest: 1e+00")]
    assert "a state 0.03 at most" in titles[0] and "a tenth of the last good one" in titles[1]


def test_find_lr_does_not_advise_a_state_rate_that_destroys_models(ready, capsys, monkeypatch):
    monkeypatch.setattr(lr_finder, "STEPS", 6)
    monkeypatch.setattr(lr_finder, "advise", lambda *_: lr_finder.Advice(10.0, 1.0, False))
    train.command(config(FINETUNE_MODE="state_tuning"), ["--find-lr"])
    said = capsys.readouterr().out
    assert "warning: a tenth of that is 1e+00" in said and "1e-3 (0.1B) to 1e-2 (7B)" in said
    assert "Begin with LR_INIT=0.001 and LR_FINAL=0.0001: usual are" in said
    assert "rates from 1e-06" in said
    monkeypatch.setattr(lr_finder, "advise", lambda *_: lr_finder.Advice(0.1, 0.01, False))
    train.command(config(FINETUNE_MODE="state_tuning"), ["--find-lr"])
    said = capsys.readouterr().out
    assert "Begin with LR_INIT=1e-02" in said and "Usual for a state are 1e-3" in said
