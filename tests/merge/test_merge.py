"""Law 8 and the merge door: streaming = naive, names and formats of the base, and refusal of what does not belong."""

import dataclasses
import json
import shutil
import threading

import pytest
import torch
from helpers import tiny
from helpers.adapters import OPTIONS
from helpers.logits import IDS, judged
from helpers.merging import PARTS, SHAPE, X, make_run, merge, result, write_sidecar

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.base import Adapter
from rwkv_peft.adapters.inject import AdapterConfig
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import pth, pth_rewrite, run_dir, sidecars
from rwkv_peft.common import atomic_io, hashing, paths
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.export import EXPORTS
from rwkv_peft.merge import fold
from rwkv_peft.merge.by_rows import by_rows
from rwkv_peft.merge.output_check import OutputCheck
from rwkv_peft.merge.verify import ROUNDINGS, check_changed
from rwkv_peft.model import arch
from rwkv_peft.model.rwkv import build
from rwkv_peft.ops import dispatch, lowrank_merge
from rwkv_peft.ops.cpu import fused


@pytest.fixture
def run(project_folder):
    return make_run(project_folder)


def logits(path, version="x070"):
    shape = tiny.geometry(2, 32, 64, 16, version)
    return build(shape, pth.load(path), tiny.ops(shape))(X)[0]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("version", "dtype"), [("x070", torch.bfloat16), ("x060", torch.float32), ("x052", torch.bfloat16)]
)
@pytest.mark.parametrize("method", METHODS)
def test_the_merged_file_answers_like_the_run_and_is_the_bases_else(project_folder, method, dtype, version, capsys):
    folder, base, model = make_run(project_folder, method=method, version=version, dtype=dtype)
    merge()
    merged, before = pth.load(result("base-r-3.pth")), pth.load(base)
    states = [n for n in pth.load(folder / "rwkv-3.pth") if arch.STATE_NAME.fullmatch(n)]
    assert list(merged) == [*before, *states]
    assert all(merged[n].dtype == t.dtype and merged[n].shape == t.shape for n, t in before.items())
    assert torch.equal(merged["note"], before["note"]) and torch.equal(
        merged["blocks.0.att.v0"], before["blocks.0.att.v0"]
    )
    tuned, _ = model(X)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    ours = logits(result("base-r-3.pth"), version)
    assert (ours - tuned).abs().max() <= limit * tuned.abs().max()
    assert (logits(base, version) - tuned).abs().max() > 2 * limit * tuned.abs().max()
    said = capsys.readouterr().out
    assert "same content" in said and "read back" in said
    assert ("answers as base + adapter" in said) == METHODS[method].wraps
    assert ("ignore a state inside a .pth" in said) == (method == "state" and version == "x070")


@pytest.mark.smoke(4)
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("method", ADAPTERS)
def test_the_streamed_merge_is_the_naive_merge_bit_for_bit(project_folder, method, kernel, monkeypatch):
    """The C++ kernel adds in an order of its own, which is torch's on some processors only: one step of bf16 at most."""
    if not kernel:
        monkeypatch.setattr(fused, "fold", lowrank_merge.fold)
    folder, base, _ = make_run(project_folder, method=method, dtype=torch.bfloat16)
    merge()
    merged, before = pth.load(result("base-r-3.pth")), pth.load(base)
    trained = pth.load(folder / "rwkv-3.pth")
    init = run_dir.init_file(folder, method)
    both = {**trained, **(pth.load(init) if init.exists() else {})}
    wrapped = {f"{layer}.weight" for layer in arch.linear_layers(SHAPE, PARTS)}
    for name, old in before.items():
        tensors = {n.rpartition(".")[2]: t for n, t in both.items() if n.rpartition(".")[0] + ".weight" == name}
        naive = ADAPTERS[method].merge(old, tensors, OPTIONS[method]) if name in wrapped else trained.get(name, old)
        if kernel:
            torch.testing.assert_close(merged[name], naive.to(old.dtype), rtol=2**-7, atol=1e-6)
        else:
            assert torch.equal(merged[name], naive.to(old.dtype)), name


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "miss", "bat"])
def test_a_run_on_a_compressed_base_goes_into_the_original_weights_or_the_compressed_ones(
    project_folder, method, capsys
):
    folder, base, model = make_run(project_folder, method=method, quant="nf4", parts=("att", "ffn"))
    merge(MERGE_BASE="quantised")
    said = capsys.readouterr().out
    assert "base      model/base.pth, compressed to nf4 as the run had it (MERGE_BASE=quantised)" in said
    name = "base-r-3.pth"
    tuned = model(X)[0]
    assert (logits(result("base-r-3-quantised.pth")) - tuned).abs().max() < 2e-5 * tuned.abs().max()
    merge()
    init = run_dir.init_file(folder, method)
    plain = build(SHAPE, pth.load(base), tiny.ops(SHAPE))
    begun = pth.load(init) if init.exists() else None
    inject.attach_checkpoint(
        plain, pth.load(folder / "rwkv-3.pth"), AdapterConfig(method, OPTIONS[method]), "x", start=begun
    )
    exact = plain.eval()(X)[0]
    assert (logits(result(name)) - exact).abs().max() < 2e-5 * exact.abs().max()
    assert (tuned - exact).abs().max() > 1e-3 * exact.abs().max()


def test_several_runs_are_folded_in_turn(project_folder):
    """What two LoRA change adds up, whichever comes first; norms that both have trained, too."""
    _, base, _ = make_run(project_folder, "a", seed=1)
    make_run(project_folder, "b", seed=2)
    make_run(project_folder, "s", "state")
    merge("--stack", "a", "b/rwkv-3.pth")
    first = pth.load(result("base-a-3+b-3.pth"))
    start = pth.load(base)
    merge("a"), merge("b")
    a, b = (pth.load(result(f"base-{name}-3.pth")) for name in "ab")
    for name, old in start.items():
        expected = a[name].double() + b[name].double() - old.double()
        torch.testing.assert_close(first[name].double(), expected, rtol=1e-5, atol=1e-5)
    merge("--stack", "a", "s")
    assert "blocks.1.att.time_state" in pth.load(result("base-a-3+s-3.pth"))
    with pytest.raises(UserError, match="a text begins with one state, and .* has one too"):
        merge("--stack", "s", "s/rwkv-3.pth")


def test_an_average_is_the_weighted_mean_of_the_merged_models(project_folder):
    _, base, _ = make_run(project_folder, "a", seed=1)
    make_run(project_folder, "b", "pissa", seed=2)
    merge("--average", "a:1", "b/rwkv-3.pth:3")
    mean = pth.load(result("base-average-a-3+b-3.pth"))
    merge("a"), merge("b")
    a, b = (pth.load(result(f"base-{name}-3.pth")) for name in "ab")
    for name in pth.load(base):
        expected = a[name].double() * 0.25 + b[name].double() * 0.75
        torch.testing.assert_close(mean[name].double(), expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    # whole models, too
    merge("--average", result("base-a-3.pth"), result("base-b-3.pth"))
    half = pth.load(result("average-base-a-3+base-b-3.pth"))
    torch.testing.assert_close(half["ln_out.weight"], (a["ln_out.weight"] + b["ln_out.weight"]) / 2)


def test_whole_weights_and_adapters_go_together(project_folder):
    """A LISA run changes matrices whole that a LoRA run adapts: in turn their changes add up, and averages are means."""
    _, base, _ = make_run(project_folder, "a", seed=1)
    make_run(project_folder, "b", "lisa", seed=2)
    merge("--stack", "a", "b"), merge("--average", "a:1", "b:3"), merge("a"), merge("b")
    start, both, mean = (pth.load(p) for p in (base, result("base-a-3+b-3.pth"), result("base-average-a-3+b-3.pth")))
    a, b = (pth.load(result(f"base-{name}-3.pth")) for name in "ab")
    for name, old in start.items():
        close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(both[name].double(), a[name].double() + b[name].double() - old.double(), **close)
        torch.testing.assert_close(mean[name].double(), a[name].double() * 0.25 + b[name].double() * 0.75, **close)


def test_an_export_of_another_run_of_the_same_name_gets_a_number(project_folder, capsys):
    make_run(project_folder, "a", "state", seed=1)
    merge("a", "--export", "state")
    first = result("base-a-3-alone.pth").read_bytes()
    merge("a", "--export", "state")
    assert "which is the same" in capsys.readouterr().out
    shutil.rmtree(project_folder / "output" / "a")
    make_run(project_folder, "a", "state", seed=2)
    merge("a", "--export", "state")
    assert "this export is called base-a-3-alone-v2.pth" in capsys.readouterr().out
    assert result("base-a-3-alone.pth").read_bytes() == first != result("base-a-3-alone-v2.pth").read_bytes()
    make_run(project_folder, "c", seed=3, parts=("att", "ffn"))
    merge("c", "--export", "peft"), merge("c", "--export", "peft")
    folder = result("base-c-3-peft")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "rwkv.prompt.json",
    ]
    assert "replaces  merge/base-c-3-peft, which is the same" in capsys.readouterr().out


@pytest.fixture
def plain_exports(monkeypatch):
    """Exports of a model that are copies of it: which files go where is what is looked at."""
    for kind in ("gguf", "gguf-bf16", "safetensors"):

        def write(source, target, _geometry, _prompting):
            shutil.copy(source, target)
            yield "a copy"

        monkeypatch.setitem(EXPORTS, kind, dataclasses.replace(EXPORTS[kind], write=write))


def test_every_kind_of_export_that_is_asked_for_is_written_once(run, plain_exports, capsys):
    merge("--export", "gguf", "--export=safetensors", "--export", "gguf")
    assert {p.name for p in result().parent.iterdir() if not p.name.endswith(".prompt.json")} == {
        f"base-r-3.{e}" for e in ("pth", "json", "gguf", "st")
    }
    assert capsys.readouterr().out.count("wrote ") == 3
    merge("--export", "gguf", "--export", "gguf-bf16", result())
    assert result("base-r-3.bf16.gguf").is_file()
    make_run(paths.ROOT, "plain", parts=("att", "ffn"), seed=6)
    merge("plain", "--export", "gguf", "--export", "peft")
    assert result("base-plain-3-peft").is_dir()
    other = result("base-plain-3.pth").read_bytes()
    assert (
        result("base-r-3.gguf").read_bytes()
        == result().read_bytes()
        != other
        == result("base-plain-3.gguf").read_bytes()
    )


def test_what_can_be_exported_is_and_all_refusals_are_reported(run, plain_exports, capsys):
    with pytest.raises(UserError, match=r"(?s)has trained .* whole.*\n.*holds a run of LoRA, and no state"):
        merge("--export", "peft", "--export", "state", "--export", "gguf")
    assert {p.name for p in result().parent.iterdir() if not p.name.endswith(".prompt.json")} == {
        f"base-r-3.{e}" for e in ("pth", "json", "gguf")
    }
    with pytest.raises(UserError, match="holds no learnt state"):
        merge("--export", "state", "--export", "safetensors", result())
    assert result("base-r-3.st").is_file()


def kept():
    return {
        path.name: path.read_bytes() for path in result().parent.iterdir() if not path.name.endswith(".prompt.json")
    }


def test_no_merge_changes_what_an_earlier_name_means(project_folder, plain_exports):
    make_run(project_folder, "a", seed=1)
    make_run(project_folder, "b", seed=2)
    merge("a", "--export", "gguf", "--export", "gguf-bf16")
    first = kept()
    assert first.keys() == {f"base-a-3.{ending}" for ending in ("pth", "json", "gguf", "bf16.gguf")}
    merge("b", "--export", "gguf"), merge("--stack", "a", "b"), merge("--average", "a", "b"), merge("b")
    assert first.items() <= kept().items()
    assert sidecars.read_sidecar(result("base-b-3.pth"), ())["merged"][0]["run"] == "b"


def log_of(folder, seconds: float):
    record = {"step": 1, "loss": 2.0, "seconds": seconds}
    (folder / "loss.jsonl").write_text(json.dumps(record) + "\n")


def test_the_same_run_merged_again_replaces_its_own_file_and_reports_of_old_exports(
    project_folder, plain_exports, capsys
):
    folder, _, _ = make_run(project_folder)
    log_of(folder, 1.5)
    merge("--export", "gguf")
    first = kept()
    merge("r", "last")
    assert kept() == first and "replaces  merge/base-r-3.pth, which is the same" in capsys.readouterr().out
    # the run was trained further
    pth.save(folder / "rwkv-3.pth", {n: t * 2 for n, t in pth.load(folder / "rwkv-3.pth").items()})
    merge()
    said = capsys.readouterr().out
    assert "replaces  merge/base-r-3.pth, an earlier result of the same run" in said
    assert "warning: merge/base-r-3.gguf: still the earlier result" in said
    assert kept().keys() == first.keys() and kept()["base-r-3.pth"] != first["base-r-3.pth"]
    merge("--export", "gguf")
    assert "replaces  merge/base-r-3.gguf, an earlier export of this model" in capsys.readouterr().out
    assert result("base-r-3.gguf").read_bytes() == result().read_bytes()


@pytest.mark.smoke(1)
@pytest.mark.parametrize("left", ["all", "no .pth", "only an export", "a damaged sidecar"])
@pytest.mark.parametrize("logged", [True, False])
def test_another_run_of_the_same_name_gets_a_number(project_folder, plain_exports, capsys, logged, left):
    folder, _, _ = make_run(project_folder, seed=1)
    log_of(folder, 1.5)
    merge("--export", "gguf")
    if left == "a damaged sidecar":
        result().with_suffix(".json").write_text("[")
    if left in ("no .pth", "only an export"):
        result().unlink()
    if left == "only an export":
        result().with_suffix(".json").unlink()
    first = kept()
    shutil.rmtree(folder)
    make_run(project_folder, seed=2)
    if logged:
        log_of(folder, 1.6)
    for _ in range(2):
        merge("--export", "gguf")
    assert first.items() <= kept().items()
    assert kept().keys() - first.keys() == {f"base-r-3-v2.{ending}" for ending in ("pth", "json", "gguf")}
    assert "note: base-r-3 in merge/ was made of something else and stays; this result is called base-r-3-v2" in (
        capsys.readouterr().out
    )


def test_an_average_with_other_weights_gets_a_number(project_folder):
    make_run(project_folder, "a", seed=1)
    make_run(project_folder, "b", seed=2)
    for weights in ("a:1 b:1", "a:1 b:3", "a:2 b:2"):
        merge("--average", *weights.split())
    assert kept().keys() == {f"base-average-a-3+b-3{n}.{ending}" for n in ("", "-v2") for ending in ("pth", "json")}


def test_a_name_that_is_too_long_for_a_file_is_shortened(project_folder):
    long = "运" * 80
    make_run(project_folder, long)
    merge()
    [model] = result().parent.glob("*.pth")
    assert model.name.startswith("base-运运") and len(model.name.encode()) < 220


def test_a_run_that_trained_whole_tensors_is_reported_how_to_become_a_peft_adapter(run):
    with pytest.raises(UserError, match='has trained blocks.* whole, .*lora_parts="att,ffn" and EMB_FINETUNE=0'):
        merge("--export", "peft")


@pytest.mark.parametrize("lacking", ["blocks.1.att.key.weight", "blocks.1."], ids=["a tensor", "a layer"])
def test_a_model_that_lacks_something_is_not_averaged_with_one_that_has_it(run, lacking):
    other = paths.ROOT / "model" / "other.pth"
    pth.save(other, {n: t for n, t in pth.load(run[1]).items() if not n.startswith(lacking)})
    with pytest.raises(UserError, match=r"other.pth: does not fit the base: lacks blocks.1.*another model, or damaged"):
        merge("--average", "base.pth", "other.pth")
    assert not list((paths.ROOT / "merge").glob("*"))


@pytest.mark.parametrize(("version", "ignored"), [("x070", True), ("x060", False)])
def test_a_merged_model_says_which_programs_do_not_know_the_state_in_it(project_folder, capsys, version, ignored):
    folder, base, _ = make_run(project_folder, "s", "state", version)
    merge("s")
    said = capsys.readouterr().out
    assert ("ignore a state inside a .pth" in said) == ignored
    assert ("token shifts (state_shifts) are read by ./chat.sh" in said) == OPTIONS["state"]["shifts"]
    # a run on a base that holds one, which its own checkpoint does not
    shutil.copy(result("base-s-3.pth"), base)
    make_run(project_folder, "l", version=version)
    merge("l")
    said = capsys.readouterr().out
    assert ("ignore a state inside a .pth" in said) == ignored
    merge("--export", "state", result("base-l-3.pth"))
    alone = pth.load(result("base-l-3-alone.pth"))
    learnt = pth.load(folder / "rwkv-3.pth")
    assert len(alone) == 2 and all(torch.equal(tensor, learnt[name]) for name, tensor in alone.items())


def test_a_state_that_takes_anothers_place_is_counted_as_changed(project_folder, monkeypatch, capsys):
    monkeypatch.setitem(OPTIONS, "state", {"shifts": False})
    _, base, _ = make_run(project_folder, "a", "state")
    merge("a")
    assert "0 changed" in capsys.readouterr().out
    shutil.copy(result("base-a-3.pth"), base)
    shutil.rmtree(project_folder / "output" / "a")
    make_run(project_folder, "a", "state", seed=7)
    merge("a")
    said = capsys.readouterr().out
    assert "2 changed" in said and "added" not in said


def test_states_are_averaged_as_well(project_folder):
    make_run(project_folder, "a", "state", seed=1)
    make_run(project_folder, "b", "state", seed=2)
    merge("--average", "a", "b")
    a, b = (pth.load(project_folder / "output" / n / "rwkv-3.pth") for n in "ab")
    mean = pth.load(result("base-average-a-3+b-3.pth"))
    for name in a:
        torch.testing.assert_close(mean[name], (a[name] + b[name]) / 2)


@pytest.mark.slow
def test_the_rwkv_package_loads_a_rewritten_file_and_reads_the_same_logits(tmp_path):
    """The file that we write record by record, in the hands of a real client."""
    shape = tiny.geometry(2, 128, 512, 64)
    pth.save(tmp_path / "base.pth", tiny.tensors(0, shape))
    change = lambda name: (lambda t: t * 1.5) if "att.key" in name else None  # noqa: E731
    pth_rewrite.rewrite(tmp_path / "base.pth", tmp_path / "merged.pth", change, {"more": torch.randn(3)})
    whole, _ = judged(tmp_path / "merged.pth")
    ours, _ = build(shape, pth.load(tmp_path / "merged.pth"), tiny.ops(shape))(torch.tensor([IDS]))
    base, _ = build(shape, pth.load(tmp_path / "base.pth"), tiny.ops(shape))(torch.tensor([IDS]))
    assert (ours[0] - whole).abs().max() < 2e-5 * whole.abs().max() < (base[0] - whole).abs().max()


@pytest.mark.slow
def test_the_rwkv_package_begins_a_v6_from_the_state_inside_the_merged_file(project_folder):
    shape = tiny.geometry(2, 128, 512, 64, "x060")
    base = project_folder / "model" / "base.pth"
    pth.save(base, tiny.tensors(0, shape))
    folder = project_folder / "output" / "r"
    folder.mkdir()
    state = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(2)}
    pth.save(folder / "rwkv-3.pth", state)
    write_sidecar(folder, base, method="state", shifts=False)
    merge("r")
    whole, _ = judged(result("base-r-3.pth"), version="x060")
    ours, _ = build(shape, pth.load(result("base-r-3.pth")), tiny.ops(shape))(torch.tensor([IDS]))
    assert (ours[0] - whole).abs().max() < 2e-5 * whole.abs().max()


def refusals():
    def other_base(folder, base):
        pth.save(base, {n: t + 1 for n, t in pth.load(base).items()})

    def wrong_rank(folder, base):
        write_sidecar(folder, base, rank=8)

    def unknown_method(folder, base):
        write_sidecar(folder, base, method="glue")

    def not_an_adapter(folder, base):
        shutil.copy(base, folder / "rwkv-3.pth")

    def missing_half(folder, base):
        tensors = dict(pth.load(folder / "rwkv-3.pth"))
        tensors.pop("blocks.0.att.key.lora_B")
        pth.save(folder / "rwkv-3.pth", tensors)

    def extra_layer(folder, base):
        tensors = pth.load(folder / "rwkv-3.pth")
        pth.save(folder / "rwkv-3.pth", tensors | {"blocks.7.ln1.weight": torch.ones(32)})

    def not_a_number(folder, base):
        tensors = pth.load(folder / "rwkv-3.pth")
        pth.save(folder / "rwkv-3.pth", tensors | {"ln_out.bias": torch.full((32,), float("nan"))})

    def called_full(folder, base):
        write_sidecar(folder, base, method="full")

    def rank_in_quotes(folder, base):
        write_sidecar(folder, base, rank="4")

    def no_alpha(folder, base):
        write_sidecar(folder, base, alpha=None)

    def epoch_that_is_a_path(folder, base):
        write_sidecar(folder, base, epoch="../../x")

    def base_that_is_a_path(folder, base):
        write_sidecar(folder, base, base="../model/base.pth")

    def huge_alpha(folder, base):
        write_sidecar(folder, base, alpha=1e300)

    def no_sidecar(folder, base):
        (folder / "rwkv-3.json").unlink()

    def no_base(folder, base):
        base.unlink()

    return {
        other_base: r"is not the file that .*rwkv-3.pth was trained on",
        wrong_rank: r"does not fit the base: blocks.0.att.receptance.lora_. .*instead of",
        unknown_method: "holds a glue run, which this version does not know",
        not_an_adapter: "holds no adapter on any layer",
        missing_half: "does not fit the base: blocks.0.att.key",
        extra_layer: "does not fit the base: blocks.7.ln1.weight",
        not_a_number: "ln_out.bias holds NaN or infinity",
        called_full: "does not fit the base: blocks.0.att.receptance",
        rank_in_quotes: 'rank cannot be "4". Was the file edited',
        no_alpha: "alpha cannot be null",
        epoch_that_is_a_path: 'epoch cannot be "../../x"',
        base_that_is_a_path: 'base cannot be "../model/base.pth"',
        huge_alpha: "alpha cannot be 1e\\+300",
        no_sidecar: "rwkv-3.json: is missing, .* Copy rwkv-3.json from the run",
        no_base: "there is no such file. .*put it into model/, or name it with MODEL_PATH in merge.sh",
    }


@pytest.mark.parametrize(("spoil", "words"), refusals().items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_does_not_belong_together_is_refused_and_nothing_is_written(run, spoil, words):
    folder, base, _ = run
    spoil(folder, base)
    with pytest.raises((UserError, SettingErrors), match=words):
        merge()
    assert not list((paths.ROOT / "merge").glob("*"))


def test_a_result_that_does_not_read_back_is_removed(run, monkeypatch):
    folder, _, _ = run
    original = pth_rewrite.rewrite

    def flip_a_bit(source, target, change, added, **how):
        original(source, target, change, added, **how)
        raw = bytearray(target.read_bytes())
        at = raw.find(pth.load(source)["blocks.0.att.w1"].numpy().tobytes())
        raw[at] ^= 1
        target.write_bytes(bytes(raw))

    monkeypatch.setattr(pth_rewrite, "rewrite", flip_a_bit)
    with pytest.raises(
        UserError,
        match="blocks.0.att.w1 is not as written when the result is read back",
    ):
        merge()
    assert not list((paths.ROOT / "merge").glob("*"))


def test_a_merge_that_answers_otherwise_than_the_adapter_is_removed(run, monkeypatch):
    """A wrong formula would write what it computes; the check asks the adapter itself."""
    folder, _, _ = run
    right = ADAPTERS["lora"].merge
    wrong = staticmethod(lambda w, tensors, sidecar: right(w, tensors, sidecar | {"alpha": 2 * sidecar["alpha"]}))
    monkeypatch.setattr(ADAPTERS["lora"], "merge", wrong)
    monkeypatch.setattr(ADAPTERS["lora"], "product", Adapter.product)
    words = r"receptance.weight with output/r/rwkv-3.pth \(\+100.00 % of what .* and 11 others do not answer as base"
    with pytest.raises(UserError, match=words):
        merge()
    assert not list((paths.ROOT / "merge").glob("*"))


def test_an_earlier_result_stays_whole_when_a_merge_fails(run):
    folder, _, _ = run
    merge()
    target = result()
    before = target.read_bytes()
    pth.save(folder / "rwkv-3.pth", {"strange": torch.zeros(1)})
    with pytest.raises(UserError):
        merge()
    assert target.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("undone", [False, True], ids=["a change", "a change that undoes the base"])
def test_a_right_merge_passes_its_check_at_real_widths(tmp_path, dtype, undone):
    before = (torch.randn(1536, 768) / 30).to(dtype)
    layer = {"lora_A": torch.randn(64, 768) / 30, "lora_B": torch.randn(1536, 64) / 30}
    if undone:
        left, values, right = torch.linalg.svd(torch.randn(1536, 64) @ torch.randn(64, 768) / 300, full_matrices=False)
        layer = {"lora_A": -right[:64], "lora_B": (left * values)[:, :64] / 2}
        before = (2 * layer["lora_B"] @ -layer["lora_A"]).to(dtype)
    options = {"rank": 64, "alpha": 128.0}
    tensors = {f"blocks.0.att.key.{leaf}": tensor for leaf, tensor in layer.items()}
    part = fold.MergeInput("x", AdapterConfig("lora", options), tensors, leaves={"blocks.0.att.key": list(layer)})
    name, base, made = "blocks.0.att.key.weight", tmp_path / "base.pth", tmp_path / "made.pth"
    pth.save(base, {name: before})
    answers = OutputCheck(
        by_rows(fold.in_turn([part], SHAPE), [part], None, SHAPE), pth.read_header(base), [part], None, SHAPE
    )
    pth_rewrite.rewrite(base, made, answers)
    with pth.PthReader(base) as old, pth.PthReader(made) as new:
        result = check_changed(name, old, new, answers, threading.Lock())
    assert result.sound and result.changed and result.difference < ROUNDINGS / 2 * torch.finfo(dtype).eps


def too_much(right, w, tensors, options):
    made = right(w, tensors, options)
    return made + 0.01 * (made - w)


def left_out(right, w, tensors, options):
    return w.clone()


def one_row_off(right, w, tensors, options):
    made = right(w, tensors, options).clone()
    made[-1] = w[-1]
    return made


@pytest.mark.smoke
@pytest.mark.parametrize("fault", [too_much, left_out, one_row_off])
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "miss", "bat"])
@pytest.mark.parametrize("turn", ["alone", "before another run"])
def test_a_wrong_formula_is_seen_though_rounding_to_bf16_is_larger(project_folder, monkeypatch, method, fault, turn):
    """A short run moves weights by less than the check of a rounded file could see."""
    folder, _, _ = make_run(project_folder, "r", method, dtype=torch.bfloat16, step=1e-3)
    make_run(project_folder, "later", "lora", dtype=torch.bfloat16, step=1e-3)
    others = [project_folder / "output" / "later"] if turn != "alone" else []
    words = [*(["--stack"] if others else []), folder / "rwkv-3.pth", *others]
    merge(*words)
    right = ADAPTERS[method].merge
    wrong = lambda w, tensors, options: fault(right, w, tensors, options)  # noqa: E731
    monkeypatch.setattr(ADAPTERS[method], "merge", staticmethod(wrong))
    monkeypatch.setattr(ADAPTERS[method], "product", Adapter.product)  # none, so that the formula is asked
    with pytest.raises(UserError, match="do not answer as base . adapter would"):
        merge(*words)


@pytest.mark.smoke(2)
@pytest.mark.parametrize("width", [32, 64], ids=["without a kernel", "with a kernel"])
@pytest.mark.parametrize("fault", ["too much", "left out", "one row off", "rounded otherwise"])
def test_a_wrong_product_is_seen_though_rounding_to_bf16_is_larger(project_folder, monkeypatch, width, fault):
    folder, _, _ = make_run(project_folder, dtype=torch.bfloat16, step=1e-3, width=width)
    merge(folder / "rwkv-3.pth")
    right = dispatch.Ops.fold

    def wrong(self, weight, B, A, x):
        B = B.clone()
        B *= {"too much": 1.01, "left out": 0}.get(fault, 1)
        B[-1] *= fault != "one row off"
        result = right(self, weight, B, A, x)
        if fault != "rounded otherwise":
            return result
        made = (result.made.float() * 1.1).bfloat16()
        return result._replace(made=made, rounded=x @ made.float().T)

    monkeypatch.setattr(dispatch.Ops, "fold", wrong)
    with pytest.raises(UserError, match="do not answer as base|not as written"):
        merge(folder / "rwkv-3.pth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learnt", [0, 1e-30, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("turn", ["alone", "twice"])
def test_a_merge_of_what_is_nothing_or_next_to_nothing_is_right(tmp_path, dtype, learnt, turn):
    """A layer that never got a gradient; a run that ended in its warm-up."""
    before = (torch.randn(192, 768) / 30).to(dtype)
    layer = {"lora_A": torch.randn(32, 768) / 30, "lora_B": torch.randn(192, 32).sign() * learnt}
    tensors = {f"blocks.0.att.key.{leaf}": tensor for leaf, tensor in layer.items()}
    part = fold.MergeInput(
        "x", AdapterConfig("lora", {"rank": 32, "alpha": 32.0}), tensors, leaves={"blocks.0.att.key": list(layer)}
    )
    parts = [part] * (2 if turn == "twice" else 1)
    base, made = tmp_path / "base.pth", tmp_path / "made.pth"
    pth.save(base, {"blocks.0.att.key.weight": before})
    change = by_rows(fold.in_turn(parts, SHAPE), parts, None, SHAPE)
    answers = OutputCheck(change, pth.read_header(base), parts, None, SHAPE)
    pth_rewrite.rewrite(base, made, answers)
    assert not list(answers.wrong())


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "miss", "bat"])
def test_a_product_is_what_merging_adds(method):
    """Where a method says that its merged weight is W + B A."""
    weight, options = torch.randn(32, 64), OPTIONS[method]
    layer = {leaf: torch.randn(shape) for leaf, shape in ADAPTERS[method].shapes(32, 64, **options).items()}
    product = ADAPTERS[method].product(layer, options)
    assert (product is not None) == (method == "lora")
    if product:
        torch.testing.assert_close(weight + product[0] @ product[1], ADAPTERS[method].merge(weight, layer, options))


def test_a_base_is_detected_where_it_lay_even_if_model_holds_another_of_its_name(run, tmp_path):
    folder, base, _ = run
    elsewhere = tmp_path / "base.pth"
    shutil.copy(base, elsewhere)
    write_sidecar(folder, base, base_path=str(elsewhere))
    pth.save(base, {n: t + 1 for n, t in pth.load(base).items()})
    merge()
    assert result().is_file()


def test_a_full_run_is_merged_into_a_whole_model(run):
    folder, base, _ = run
    trained = {n: t + 0.5 if t.is_floating_point() else t for n, t in pth.load(base).items()}
    pth.save(folder / "rwkv-3.pth", trained)
    write_sidecar(folder, base, method="full")
    merge()
    merged = pth.load(paths.ROOT / "merge" / "base-r-3.pth")
    assert all(torch.equal(merged[n], trained[n]) for n in trained)


def test_merging_reads_only_the_tensors_that_change_and_each_once(run, monkeypatch):
    """So memory holds one of them, however large the model is."""
    folder, base, _ = run
    adapter, read = pth.load(folder / "rwkv-3.pth"), []
    part = fold.opened(
        fold.MergeInput("x", AdapterConfig("lora", OPTIONS["lora"]), adapter), pth.read_header(base), SHAPE
    )
    original = pth.PthReader.tensor
    monkeypatch.setattr(pth.PthReader, "tensor", lambda self, name: read.append(name) or original(self, name))
    pth_rewrite.rewrite(base, folder / "out.pth", fold.in_turn([part], SHAPE))
    touched = {n.removesuffix(".lora_A") + ".weight" for n in adapter if n.endswith("lora_A")}
    touched |= {n for n in adapter if "lora" not in n}
    assert sorted(read) == sorted(touched)


def foreign_file(folder, method, prefix="", **renamed):
    """A run of the kit as RWKV-PEFT would have saved it: other names, no sidecar."""
    tensors = {}
    for name, tensor in pth.load(folder / "rwkv-3.pth").items():
        layer, _, leaf = name.rpartition(".")
        tensors[f"{prefix}{layer}.{renamed.get(leaf, leaf)}"] = tensor
    path = folder.parent / f"{method}-7.pth"
    pth.save(path, tensors)
    return path


@pytest.mark.smoke
@pytest.mark.parametrize("prefix", ["", "model."], ids=["2024", "2025"])
@pytest.mark.parametrize(
    ("method", "given", "renamed"),
    [
        ("lora", {"METHOD": "lora", "LORA_ALPHA": "8"}, {}),
        ("pissa", {"METHOD": "pissa"}, {}),
        ("miss", {}, {"disha": "bone"}),
        ("miss", {"METHOD": "disha"}, {}),
        ("bat", {}, {"disha": "bone"}),
        ("state", {}, {}),
    ],
)
def test_a_file_of_rwkv_peft_merges_into_what_our_own_does(project_folder, monkeypatch, method, given, renamed, prefix):
    monkeypatch.setitem(OPTIONS, "lora", {"rank": 4, "alpha": 8.0})
    monkeypatch.setitem(OPTIONS, "state", {"shifts": False})
    folder, base, _ = make_run(project_folder, method=method)
    merge("r")
    ours = pth.load(result("base-r-3.pth"))
    path = foreign_file(folder, method, prefix, **renamed)
    init = run_dir.init_file(folder, "pissa")
    if method == "pissa":
        begun = {f"{prefix}{n}": t for n, t in pth.load(init).items()}
        pth.save(folder.parent / "elsewhere.pth", begun)
        with pytest.raises(SettingErrors, match="must name the init_pissa.pth"):
            merge(path, MODEL_PATH="base.pth", **given)
        given = {**given, "PISSA_INIT": "elsewhere.pth"}
    merge(path, MODEL_PATH="base.pth", **given)
    theirs = pth.load(result(f"base-{method}-7.pth"))
    assert all(torch.equal(theirs[n], t) for n, t in ours.items())


def test_a_foreign_adapter_without_one_kind_of_layers_is_looked_at_twice(run, capsys, monkeypatch):
    monkeypatch.setitem(OPTIONS, "lora", {"rank": 4, "alpha": 8.0})
    path = foreign_file(run[0], "lora")
    pth.save(path, {n: t for n, t in pth.load(path).items() if "att.key" not in n})
    merge(path, MODEL_PATH="base.pth", METHOD="lora", LORA_ALPHA="8")
    assert "it has no adapter on att.key (2 layers): was it trained so?" in capsys.readouterr().out


def test_a_foreign_pissa_on_another_base_is_refused(project_folder):
    folder, _, _ = make_run(project_folder, method="pissa")
    path = foreign_file(folder, "pissa")
    shutil.copy(run_dir.init_file(folder, "pissa"), path.parent)
    tiny.save_model(project_folder / "model" / "other.pth", 7, SHAPE)
    merge(path, MODEL_PATH="base.pth", METHOD="pissa")
    with pytest.raises(UserError, match="was not taken out of this base"):
        merge(path, MODEL_PATH="other.pth", METHOD="pissa")


def test_a_run_of_ours_and_a_foreign_one_are_folded_in_turn(project_folder, monkeypatch):
    monkeypatch.setitem(OPTIONS, "lora", {"rank": 4, "alpha": 8.0})
    folder, _, _ = make_run(project_folder, "a", seed=1)
    make_run(project_folder, "b", seed=2)
    path = foreign_file(project_folder / "output" / "b", "lora")
    merge("--stack", "a", "b")
    both = pth.load(result("base-a-3+b-3.pth"))
    merge("--stack", "a", path, METHOD="lora", LORA_ALPHA="8")
    ours = pth.load(result("base-a-3+lora-7.pth"))
    assert all(torch.equal(ours[n], t) for n, t in both.items())
    merge("--stack", "a", path, METHOD="lora", LORA_ALPHA="16")
    other = pth.load(result("base-a-3+lora-7-v2.pth"))
    assert not torch.equal(other["blocks.0.att.key.weight"], ours["blocks.0.att.key.weight"])
    # what no file needs is not passed over
    pth.save(paths.ROOT / "model" / "other.pth", pth.load(paths.ROOT / "model" / "base.pth"))
    with pytest.raises(SettingErrors, match="LORA_ALPHA: but .* was trained with alpha 8"):
        merge("--average", "a", "other.pth", LORA_ALPHA="16")


def test_a_lora_that_may_be_a_pissa_is_reported(run, monkeypatch, capsys):
    monkeypatch.setitem(OPTIONS, "lora", {"rank": 4, "alpha": 8.0})
    path = foreign_file(run[0], "lora")
    given = {"MODEL_PATH": "base.pth", "METHOD": "lora", "LORA_ALPHA": "8"}
    merge(path, **given)
    assert "PiSSA" not in capsys.readouterr().out
    pth.save(path.parent / "init_pissa.pth", {"x": torch.zeros(1)})
    merge(path, **given)
    assert "init_pissa.pth lies beside it: if it is a PiSSA, this result is wrong" in capsys.readouterr().out


def test_numbers_that_do_not_fit_the_bases_format_are_not_blamed_on_the_disk(project_folder):
    folder, base, _ = make_run(project_folder, dtype=torch.float16)
    tensors = pth.load(folder / "rwkv-3.pth")
    pth.save(folder / "rwkv-3.pth", tensors | {"blocks.0.ln1.weight": torch.full((32,), 1e6)})
    with pytest.raises(UserError, match="blocks.0.ln1.weight would hold NaN or infinity"):
        merge()


def foreign_refusals():
    def a_rank_that_does_not_divide(path):
        layers = {n.rpartition(".")[0] for n in pth.load(path) if n.endswith("lora_A")}
        shapes = {layer: pth.load(path)[f"{layer}.lora_A"].shape[1] for layer in layers}
        pth.save(path, {f"{layer}.bone": torch.zeros(n // 24, 24, 24) for layer, n in shapes.items()})
        return [path], {"MODEL_PATH": "base.pth"}

    def two_names_of_one(path):
        tensors = pth.load(path)
        pth.save(path, tensors | {"model.blocks.0.att.key.lora_A": torch.zeros(4, 32)})
        return [path], {"MODEL_PATH": "base.pth", "METHOD": "lora", "LORA_ALPHA": "8"}

    def without_a_base(path):
        return [path], {"METHOD": "lora", "LORA_ALPHA": "8"}

    def without_a_method(path):
        return [path], {"MODEL_PATH": "base.pth"}

    def without_alpha(path):
        return [path], {"MODEL_PATH": "base.pth", "METHOD": "lora"}

    def another_alpha(path):
        return ["r"], {"LORA_ALPHA": "16"}

    def another_method(path):
        return ["r"], {"METHOD": "bone"}

    def too_few_layers(path):
        one = {n: t for n, t in pth.load(path).items() if not n.startswith("blocks.1.")}
        pth.save(path, one)
        return [path], {"MODEL_PATH": "base.pth", "METHOD": "lora", "LORA_ALPHA": "8"}

    def another_width(path):
        pth.save(path, {n: torch.zeros(4, 48) if n.endswith("lora_A") else t for n, t in pth.load(path).items()})
        return [path], {"MODEL_PATH": "base.pth", "METHOD": "lora", "LORA_ALPHA": "8"}

    def no_adapter(path):
        pth.save(path, {"x": torch.zeros(3)})
        return [path], {"MODEL_PATH": "base.pth"}

    def an_unknown_option(path):
        return ["--exprot", "gguf"], {}

    def an_epoch_as_an_option(path):
        return ["--epoch", "1"], {}

    def an_epoch_as_an_option_with_an_equals_sign(path):
        return ["--epoch=2"], {}

    def an_unknown_kind(path):
        return ["--export", "ggf"], {}

    def one_to_average(path):
        return ["--average", "r"], {}

    def nothing_compressed(path):
        return ["r"], {"MERGE_BASE": "quantised"}

    def several_compressed(path):
        return ["--stack", "r", "r"], {"MERGE_BASE": "quantised"}

    def a_whole_model(path):
        return ["base.pth"], {}

    def a_model_as_an_adapter(path):
        return ["base.pth", "--export", "peft"], {}

    def an_init_for_a_lora(path):
        return ["r"], {"PISSA_INIT": "x.pth"}

    def an_empty_word(path):
        return [""], {}

    def a_swapped_checkpoint(path):
        sidecar = sidecars.read_sidecar(path.parent / "r/rwkv-3.pth", ())
        atomic_io.write_json(path.parent / "r/rwkv-3.json", sidecar | {"checkpoint_sha256": "0" * 64})
        return ["r"], {}

    def no_such_file(path):
        return ["nowhere/rwkv-1.pth"], {}

    return {
        a_rank_that_does_not_divide: "does not fit the base: its rank, 24, must divide 32",
        two_names_of_one: "holds blocks.0.att.key.lora_A twice",
        without_a_base: "must name the base: .* has no sidecar",
        without_a_method: "must be lora or pissa: .* has no sidecar",
        without_alpha: "must be the lora_alpha that .* was trained with",
        another_alpha: "was trained with alpha 8; leave it empty",
        another_method: "is a run of lora; leave it empty",
        too_few_layers: "has adapters on 1 of the base's 2 layers",
        another_width: "does not fit the base: blocks.0.att.receptance.lora_A .*instead of",
        no_adapter: "is no adapter: it holds x",
        an_unknown_option: "--exprot: is not an option; did you mean --export",
        an_epoch_as_an_option: "An epoch is a bare word: ./merge.sh 1",
        an_epoch_as_an_option_with_an_equals_sign: "An epoch is a bare word: ./merge.sh 2",
        an_unknown_kind: "--export ggf: must be one of safetensors, .*did you mean gguf",
        one_to_average: "--average needs two checkpoints or more",
        a_whole_model: "is a whole model, no checkpoint of a run",
        a_model_as_an_adapter: "--export peft takes the checkpoint of a run",
        an_init_for_a_lora: "no PiSSA is among the checkpoints",
        an_empty_word: "A word behind ./merge.sh is empty",
        a_swapped_checkpoint: "is not the file that its .json was written with",
        nothing_compressed: "must be original: .* was not trained on a compressed base",
        several_compressed: "must be original where several checkpoints",
        no_such_file: "nowhere/rwkv-1.pth: there is no such run or checkpoint",
    }


@pytest.mark.parametrize(("ask", "words"), foreign_refusals().items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_no_one_can_know_is_asked_for_and_what_contradicts_is_refused(run, monkeypatch, ask, words):
    monkeypatch.setitem(OPTIONS, "lora", {"rank": 4, "alpha": 8.0})
    path = foreign_file(run[0], "lora")
    typed, given = ask(path)
    with pytest.raises((UserError, SettingErrors), match=words):
        merge(*typed, **given)
    assert not list((paths.ROOT / "merge").glob("*"))


def test_what_another_run_began_with_is_not_folded(project_folder):
    folder, base, _ = make_run(project_folder, method="pissa")
    init = run_dir.init_file(folder, "pissa")
    write_sidecar(folder, base, method="pissa", start_sha256=hashing.sha256(init), **OPTIONS["pissa"])
    merge("r")
    pth.save(init, {n: t + 0.1 for n, t in pth.load(init).items()})
    with pytest.raises(UserError, match="init_pissa.pth: is not what output/r/rwkv-3.pth began with"):
        merge("r")
    init.unlink()
    with pytest.raises(UserError, match="output/r/init_pissa.pth: is missing. .* copy init_pissa.pth from the run"):
        merge("r")


def test_runs_on_different_bases_do_not_go_together(project_folder):
    make_run(project_folder, "a")
    base = project_folder / "model" / "base.pth"
    base.rename(base.with_name("other.pth"))
    pth.save(
        base,
        {n: t + 1 if t.is_floating_point() else t for n, t in pth.load(base.with_name("other.pth")).items()},
    )
    folder = project_folder / "output" / "a"
    shutil.copytree(folder, folder.with_name("b"))
    write_sidecar(folder.with_name("b"), base)
    write_sidecar(folder, base.with_name("other.pth"), base="other.pth")
    with pytest.raises(UserError, match="only runs on one base go together"):
        merge("--stack", "a", "b")


def test_a_merge_of_the_last_epoch_names_the_better_one(tmp_path, monkeypatch, capsys):
    from rwkv_peft.merge.inputs import checkpoint_files

    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    for name, step in (("0", 4), ("1", 8), ("best", 4)):
        (tmp_path / "a run").mkdir(exist_ok=True)
        (tmp_path / f"a run/rwkv-{name}.pth").touch()
        (tmp_path / f"a run/rwkv-{name}.json").write_text(json.dumps({"step": step}))
    assert checkpoint_files([], "a run") == [tmp_path / "a run/rwkv-1.pth"]
    assert "./merge.sh 'a run' best takes that checkpoint" in capsys.readouterr().out
    (tmp_path / "a run/rwkv-best.json").write_text(json.dumps({"step": 8}))
    assert checkpoint_files([], "a run") and not capsys.readouterr().out
