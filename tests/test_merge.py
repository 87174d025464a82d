"""Law 8 and the merge door: streaming = naive, names and formats of the base, and refusal of what does not belong."""

import json
import shutil

import pytest
import tiny
import torch
from test_versions import IDS, judged

from merge.__main__ import merge
from merge.fold import fold
from merge.verify import ROUNDINGS, compare
from rwkv_peft import atomic, checkpoint, hashing, project, runs
from rwkv_peft.adapters import attach
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.errors import UserError
from rwkv_peft.model.rwkv import build

SHAPE = tiny.geometry(2, 32, 64, 16)
PARTS = ("att", "ffn", "ln")


@pytest.fixture
def run(project_folder, request):
    """A base with extra tensors, and a run on it whose adapter is not fresh."""
    dtype = getattr(request, "param", torch.float32)
    base = project_folder / "model" / "base.pth"
    extra = {"blocks.0.att.v0": torch.randn(1, 1, 32), "note": torch.arange(3)}
    tensors = {n: t.to(dtype) for n, t in tiny.tensors(0, SHAPE).items()} | extra
    checkpoint.save(base, tensors)
    model = build(SHAPE, checkpoint.load(base), tiny.wkv(SHAPE))
    attach.adapt(model, "lora", PARTS, 4, 8.0, 0.0)
    for p in attach.trained(model).values():
        torch.nn.init.normal_(p, std=0.2)
    folder = project_folder / "output" / "r"
    folder.mkdir()
    checkpoint.save(folder / "rwkv-3.pth", attach.trained(model))
    write_sidecar(folder, base)
    (folder / "run.json").write_text("{}")
    runs.point_latest(folder)
    return folder, base, model


def write_sidecar(folder, file, /, **changes):
    content = {
        "method": "lora", "rank": 4, "alpha": 8.0, "base": "base.pth",
        "base_sha256": hashing.sha256(file), "geometry": SHAPE.as_dict(), "epoch": 3, "step": 9, "versions": {},
    }  # fmt: skip
    atomic.write_json(folder / "rwkv-3.json", content | changes)


@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16], indirect=True, ids=["fp32", "bf16"])
def test_the_merged_file_is_the_naive_merge_bit_for_bit_and_answers_like_the_adapter(run, capsys):
    folder, base, model = run
    merge(folder / "rwkv-3.pth", "")
    target = project.ROOT / "merge" / "base-LORA-3.pth"
    merged, before = checkpoint.load(target), checkpoint.load(base)
    assert list(merged) == list(before)
    adapter = checkpoint.load(folder / "rwkv-3.pth")
    for name, old in before.items():
        layer = name.removesuffix(".weight")
        if layer + ".lora_A" in adapter:
            tensors = {t: adapter[f"{layer}.{t}"] for t in ADAPTERS["lora"].tensors}
            naive = ADAPTERS["lora"].merge(old, tensors, {"rank": 4, "alpha": 8.0}).to(old.dtype)
        else:
            naive = adapter.get(name, old).to(old.dtype)
        assert torch.equal(merged[name], naive) and merged[name].dtype == old.dtype
    x = torch.arange(1, 41)[None]
    ours, _ = build(SHAPE, merged, tiny.wkv(SHAPE))(x)
    tuned, _ = model.eval()(x)
    limit = 1e-5 if before["emb.weight"].dtype == torch.float32 else 0.03
    assert (ours - tuned).abs().max() <= limit * tuned.abs().max()
    said = capsys.readouterr().out
    assert "same content" in said and "read back" in said and "answers as base + adapter" in said


def test_the_rwkv_package_loads_a_rewritten_file_and_reads_the_same_logits(tmp_path):
    """The file that we write record by record, in the hands of a real client."""
    shape = tiny.geometry(2, 128, 512, 64)
    checkpoint.save(tmp_path / "base.pth", tiny.tensors(0, shape))
    change = lambda name: (lambda t: t * 1.5) if "att.key" in name else None  # noqa: E731
    checkpoint.rewrite(tmp_path / "base.pth", tmp_path / "merged.pth", change)
    whole, _ = judged(tmp_path / "merged.pth")
    ours, _ = build(shape, checkpoint.load(tmp_path / "merged.pth"), tiny.wkv(SHAPE))(torch.tensor([IDS]))
    base, _ = build(shape, checkpoint.load(tmp_path / "base.pth"), tiny.wkv(SHAPE))(torch.tensor([IDS]))
    assert (ours[0] - whole).abs().max() < 2e-5 * whole.abs().max() < (base[0] - whole).abs().max()


def refusals():
    def other_base(folder, base):
        checkpoint.save(base, {n: t + 1 for n, t in checkpoint.load(base).items()})

    def wrong_rank(folder, base):
        write_sidecar(folder, base, rank=8)

    def unknown_method(folder, base):
        write_sidecar(folder, base, method="pissa")

    def not_an_adapter(folder, base):
        shutil.copy(base, folder / "rwkv-3.pth")

    def missing_half(folder, base):
        tensors = dict(checkpoint.load(folder / "rwkv-3.pth"))
        tensors.pop("blocks.0.att.key.lora_B")
        checkpoint.save(folder / "rwkv-3.pth", tensors)

    def extra_layer(folder, base):
        tensors = checkpoint.load(folder / "rwkv-3.pth")
        checkpoint.save(folder / "rwkv-3.pth", tensors | {"blocks.7.ln1.weight": torch.ones(32)})

    def not_a_number(folder, base):
        tensors = checkpoint.load(folder / "rwkv-3.pth")
        checkpoint.save(folder / "rwkv-3.pth", tensors | {"ln_out.bias": torch.full((32,), float("nan"))})

    def called_full(folder, base):
        write_sidecar(folder, base, method="full", rank=None, alpha=None)

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
        wrong_rank: r"has rank \[4\] inside, but its sidecar says 8",
        unknown_method: "holds a pissa run, which this version cannot merge",
        not_an_adapter: "holds no lora_A, lora_B",
        missing_half: "does not fit the base: blocks.0.att.key",
        extra_layer: "does not fit the base: blocks.7.ln1.weight",
        not_a_number: "ln_out.bias holds NaN or infinity",
        called_full: "is no full run of this base: blocks.0.att.receptance.lora_A",
        rank_in_quotes: "rank cannot be '4'. Was the file edited",
        no_alpha: "alpha cannot be None",
        epoch_that_is_a_path: "epoch cannot be '../../x'",
        base_that_is_a_path: "base cannot be '../model/base.pth'",
        huge_alpha: "alpha cannot be 1e\\+300",
        no_sidecar: "rwkv-3.json: is missing",
        no_base: "there is no such file",
    }


@pytest.mark.parametrize(("spoil", "words"), refusals().items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_does_not_belong_together_is_refused_and_nothing_is_written(run, spoil, words):
    folder, base, _ = run
    spoil(folder, base)
    with pytest.raises(UserError, match=words):
        merge(folder / "rwkv-3.pth", "")
    assert not list((project.ROOT / "merge").glob("*"))


def test_a_result_that_does_not_read_back_is_removed(run, monkeypatch):
    folder, _, _ = run
    original = checkpoint.rewrite

    def flip_a_bit(source, target, change):
        original(source, target, change)
        raw = bytearray(target.read_bytes())
        at = raw.find(checkpoint.load(source)["blocks.0.att.w1"].numpy().tobytes())
        raw[at] ^= 1
        target.write_bytes(bytes(raw))

    monkeypatch.setattr(checkpoint, "rewrite", flip_a_bit)
    with pytest.raises(
        UserError,
        match="blocks.0.att.w1 and 0 others are not what they should be when the result is read back",
    ):
        merge(folder / "rwkv-3.pth", "")
    assert not list((project.ROOT / "merge").glob("*"))


def test_a_merge_that_answers_otherwise_than_the_adapter_is_removed(run, monkeypatch):
    """A wrong formula would write what it computes; the check asks the adapter itself."""
    folder, _, _ = run
    right = ADAPTERS["lora"].merge
    wrong = staticmethod(lambda w, tensors, sidecar: right(w, tensors, sidecar | {"alpha": 2 * sidecar["alpha"]}))
    monkeypatch.setattr(ADAPTERS["lora"], "merge", wrong)
    with pytest.raises(UserError, match="blocks.0.att.receptance.weight and 11 others are not what they should be"):
        merge(folder / "rwkv-3.pth", "")
    assert not list((project.ROOT / "merge").glob("*"))


def test_an_earlier_result_stays_whole_when_a_merge_fails(run):
    folder, _, _ = run
    merge(folder / "rwkv-3.pth", "")
    target = project.ROOT / "merge" / "base-LORA-3.pth"
    before = target.read_bytes()
    checkpoint.save(folder / "rwkv-3.pth", {"strange": torch.zeros(1)})
    with pytest.raises(UserError):
        merge(folder / "rwkv-3.pth", "")
    assert target.read_bytes() == before


def test_a_result_of_another_run_is_kept_under_its_name(run, capsys):
    folder, base, _ = run
    merge(folder / "rwkv-3.pth", "")
    first = (project.ROOT / "merge" / "base-LORA-3.pth").read_bytes()
    merge(folder / "rwkv-3.pth", "")
    assert "made from the same checkpoint before" in capsys.readouterr().out
    other = folder.rename(folder.with_name("other"))
    checkpoint.save(other / "rwkv-3.pth", {n: t * 2 for n, t in checkpoint.load(other / "rwkv-3.pth").items()})
    merge(other / "rwkv-3.pth", "")
    assert (project.ROOT / "merge" / "base-LORA-3.r.pth").read_bytes() == first
    assert (second := (project.ROOT / "merge" / "base-LORA-3.pth").read_bytes()) != first
    # a run of the same name that was trained anew is another run, too; and a damaged note is no reason to stop
    checkpoint.save(other / "rwkv-3.pth", {n: t * 3 for n, t in checkpoint.load(other / "rwkv-3.pth").items()})
    merge(other / "rwkv-3.pth", "")
    assert (project.ROOT / "merge" / "base-LORA-3.other.pth").read_bytes() == second
    (project.ROOT / "merge" / "base-LORA-3.json").write_text("[")
    merge(other / "rwkv-3.pth", "")
    assert (project.ROOT / "merge" / "base-LORA-3.earlier.pth").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("undone", [False, True], ids=["a change", "a change that undoes the base"])
def test_a_right_merge_passes_its_check_at_real_widths(dtype, undone):
    before = (torch.randn(1536, 768) / 30).to(dtype)
    layer = {"lora_A": torch.randn(64, 768) / 30, "lora_B": torch.randn(1536, 64) / 30}
    if undone:
        left, values, right = torch.linalg.svd(torch.randn(1536, 64) @ torch.randn(64, 768) / 300, full_matrices=False)
        layer = {"lora_A": -right[:64], "lora_B": (left * values)[:, :64] / 2}
        before = (2 * layer["lora_B"] @ -layer["lora_A"]).to(dtype)
    sidecar = {"method": "lora", "rank": 64, "alpha": 128.0}
    after = ADAPTERS["lora"].merge(before, layer, sidecar).to(dtype)
    assert compare(before, after, layer, sidecar) < ROUNDINGS / 2 * torch.finfo(dtype).eps


def test_a_base_is_found_where_it_lay_even_if_model_holds_another_of_its_name(run, tmp_path):
    folder, base, _ = run
    elsewhere = tmp_path / "base.pth"
    shutil.copy(base, elsewhere)
    write_sidecar(folder, base, base_path=str(elsewhere))
    checkpoint.save(base, {n: t + 1 for n, t in checkpoint.load(base).items()})
    merge(folder / "rwkv-3.pth", "")
    assert (project.ROOT / "merge" / "base-LORA-3.pth").is_file()


def test_a_full_run_is_merged_into_a_whole_model(run):
    folder, base, _ = run
    trained = {n: t + 0.5 if t.is_floating_point() else t for n, t in checkpoint.load(base).items()}
    checkpoint.save(folder / "rwkv-3.pth", trained)
    write_sidecar(folder, base, method="full", rank=None, alpha=None)
    merge(folder / "rwkv-3.pth", "")
    merged = checkpoint.load(project.ROOT / "merge" / "base-FULL-3.pth")
    assert all(torch.equal(merged[n], trained[n]) for n in trained)


def test_merging_reads_only_the_tensors_that_change_and_each_once(run, monkeypatch):
    """So memory holds one of them, however large the model is."""
    folder, base, _ = run
    sidecar = json.loads((folder / "rwkv-3.json").read_text())
    adapter, read = checkpoint.load(folder / "rwkv-3.pth"), []
    original = checkpoint.Archive.tensor
    monkeypatch.setattr(checkpoint.Archive, "tensor", lambda self, name: read.append(name) or original(self, name))
    checkpoint.rewrite(base, folder / "out.pth", fold(adapter, sidecar, checkpoint.describe(base), "x"))
    touched = {n.removesuffix(".lora_A") + ".weight" for n in adapter if n.endswith("lora_A")}
    touched |= {n for n in adapter if "lora" not in n}
    assert sorted(read) == sorted(touched)
