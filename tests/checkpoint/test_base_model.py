"""What people give as a base: what is read, and what is reported of everything else."""

import json
import struct
import zipfile

import pytest
import torch
from helpers import tiny
from helpers.training import config, run
from safetensors.torch import save_file

from rwkv_peft.chat.load import build_model
from rwkv_peft.checkpoint import base_model, pth, pth_rewrite
from rwkv_peft.cli import train
from rwkv_peft.common import paths
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.model import arch

SMALL = {"vocab": 64}
LFS = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 382000000\n"
)


def shape_of(version: str = "x070"):
    return tiny.geometry(version=version, **SMALL)


def zipped(names):
    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, "x")

    return write


def cut(size):
    def write(path):
        tiny.save_model(path, shape=shape_of())
        path.write_bytes(path.read_bytes()[:size])

    return write


def cut_safetensors(size):
    def write(path):
        save_file(tiny.tensors(0, shape_of()), path)
        path.write_bytes(path.read_bytes()[:size])

    return write


def state_of_ai00(path):
    save_file({f"blocks.{i}.att.time_state": torch.ones(2, 16, 16, dtype=torch.float16) for i in (0, 1)}, path)


def saved(tensors):
    return lambda path: torch.save(tensors, path)


def block(**tensors):
    """The first block of a model without a version: tensors by name in it, "__" for a dot."""
    common = {"emb.weight": torch.zeros(8, 4), "head.weight": torch.zeros(8, 4), "blocks.0.ln1.weight": torch.zeros(4)}
    return common | {f"blocks.0.{name.replace('__', '.')}": torch.zeros(shape) for name, shape in tensors.items()}


MIX = {"att__time_mix_k": (1, 1, 4), "att__key__weight": (4, 4)}
NO_BASES = {
    "Git LFS pointer": (lambda p: p.write_text(LFS), "is a Git LFS pointer.*382,000,000 bytes.*git lfs pull"),
    "empty": (lambda p: p.write_bytes(b""), r"is empty \(0 bytes\). Download it again"),
    "zeros": (lambda p: p.write_bytes(bytes(9000)), "holds nothing but zeros"),
    "web page": (lambda p: p.write_text("\n<!DOCTYPE html><html>"), "is a web page.*/resolve/"),
    "web page of one's own": (lambda p: p.write_text("\ufeff<html lang=en>"), "is a web page"),
    "error of a mirror": (lambda p: p.write_text("Entry not found"), 'a text file that begins "Entry not found"'),
    "JSON error": (lambda p: p.write_text('{"error": "Access denied"}'), "is a JSON file"),
    "config.json": (lambda p: p.write_text('{"architectures": ["Rwkv7ForCausalLM"]}'), "config.json, not its weights"),
    "index of shards": (lambda p: p.write_text('{"weight_map": {}}'), "is the index of a model.*join"),
    "GGUF": (lambda p: p.write_bytes(b"GGUF\x03\0\0\0" + bytes(99)), "is a GGUF file, which is for llama.cpp"),
    "rwkv.cpp": (lambda p: p.write_bytes(struct.pack("<II", 0x67676D66, 101)), "is a model of rwkv.cpp"),
    "ONNX": (lambda p: p.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x032.0"), "is an ONNX model"),
    "tflite": (lambda p: p.write_bytes(b"\x1c\0\0\0TFL3" + bytes(50)), "is a TensorFlow Lite model"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08\0" + bytes(50)), "is a gzip archive. Unpack it"),
    "7z": (lambda p: p.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(50)), "is a 7z archive. Unpack it"),
    "zip with a model": (zipped(["rwkv/model.pth"]), "is a zip archive that holds rwkv/model.pth. Unpack it"),
    "zip": (zipped(["a.txt"]), "is a zip file, but no torch checkpoint"),
    "npz": (zipped(["a.npy"]), "is a NumPy archive"),
    "TorchScript": (zipped(["m/data.pkl", "m/code/a.py", "m/constants.pkl"]), "is a TorchScript program"),
    "old torch": (
        lambda p: torch.save({"a": torch.zeros(3)}, p, _use_new_zipfile_serialization=False),
        "in the form of torch before 1.6. Convert it.*torch.load",
    ),
    "cut off": (cut(9000), "is not complete: it has 9,000 bytes and should have at least [0-9,]+. Download it again"),
    "cut off at once": (cut(20), "is not complete: it was cut off after 20 bytes"),
    "cut .safetensors": (cut_safetensors(9000), r"is not complete: it has 9,000 bytes and should have \d+,\d{3}"),
    "cut in its header": (cut_safetensors(300), "is not complete: it has 300 bytes and should have at least"),
    "Ai00 state": (state_of_ai00, "is a learnt state for Ai00 and web-rwkv, whose matrices are transposed"),
    "state": (saved({"blocks.0.att.time_state": torch.ones(2, 16, 16)}), "is an adapter.*a learnt state.*state_load"),
    "LoRA": (saved({"blocks.0.att.key.lora_A": torch.ones(2, 16)}), "is an adapter.*lora_load"),
    "MiSS": (saved({"blocks.0.att.key.disha": torch.ones(2, 16)}), "is an adapter.*disha_load"),
    "peft": (saved({"base_model.model.blocks.0.att.key.lora_A.weight": torch.ones(2)}), "an adapter of the peft package"),
    "trainer's": (saved({"state_dict": {"a": torch.ones(2)}, "epoch": 3}), 'Its "state_dict" is one: take that out'),
    "fla": (saved({"model.embeddings.weight": torch.ones(2), "model.layers.0.attn.r_k": torch.ones(2)}), "fla, Hugging Face"),
    "transformers' RWKV-4": (saved({"rwkv.blocks.0.attention.time_decay": torch.ones(2)}), "is RWKV-4 with the names of"),
    "transformers' RWKV-6": (saved({"rwkv.blocks.0.attention.time_maa_x": torch.ones(2)}), "is RWKV-6 with the names of"),
    "Llama": (saved({"model.layers.0.self_attn.q_proj.weight": torch.ones(2)}), "a model of another architecture"),
    "RWKV-4": (saved(block(**MIX, att__time_first=(4,), att__time_decay=(4,))), "is RWKV-4; this kit works with"),
    "RWKV-5.0": (saved(block(**MIX, att__ln_x__weight=(4,), att__time_decay=(2, 1, 1))), r"is RWKV-5\.0; this kit works"),
    "RWKV-5.1": (saved(block(**MIX, att__time_mix_g=(1, 1, 4), att__time_decay=(2, 1, 1))), r"is RWKV-5\.1; this kit"),
    "RWKV-7a": (saved(block(ffn__s_emb__weight=(8, 4), att__r_k=(1, 4))), "is an RWKV-7 with DeepEmbed .x070a or x070b"),
    "RWKV-7b": (saved(block(qkv__k_emb=(8, 4), att__r_k=(1, 4))), "is an RWKV-7 with DeepEmbedAttention"),
    "RWKV-4, prefixed": (
        lambda p: torch.save({f"model.{n}": t for n, t in block(**MIX, att__time_first=(4,)).items()}, p),
        "is RWKV-4; this kit works with",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_BASES)
def test_what_is_no_base_is_reported_by_what_it_is_and_what_to_do(tmp_path, kind):
    write, words = NO_BASES[kind]
    write(tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        base_model.read_geometry(tmp_path / "x.pth")


def test_a_web_rwkv_model_is_reported_by_its_transposed_matrices(tmp_path):
    low = {"w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"}
    turned = {
        n: (t.T.contiguous() if n.split(".")[-1] in low else t)
        for n, t in tiny.tensors(0, tiny.geometry(width=64, vocab=64)).items()
    }
    save_file(turned, tmp_path / "x.st")
    with pytest.raises(UserError, match=r"in the form of web-rwkv and Ai00 \(.st\)"):
        base_model.read_geometry(tmp_path / "x.st")


def test_a_folder_names_its_model_or_the_command_that_joins_its_files(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        pth.read_header(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="Name the file in it: .*model.safetensors"):
        pth.read_header(tmp_path)
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").touch()
    with pytest.raises(UserError, match="in 2 .safetensors files; this version reads one file: join them"):
        pth.read_header(tmp_path)


def test_a_download_that_resumes_is_reported(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"\x13\x01" * 999)
    (tmp_path / "x.pth.aria2").touch()
    with pytest.raises(UserError, match="has not finished"):
        pth.read_header(tmp_path / "x.pth")


def hugging_face(tensors):
    """The official names behind "model.", the head outside, vectors flattened."""
    flat = {n: t.reshape(-1) if t.shape[:2] == (1, 1) else t for n, t in tensors.items()}
    return {"lm_head.weight" if n == "head.weight" else f"model.{n}": t.contiguous() for n, t in flat.items()}


FORMS = {
    "a.safetensors": save_file,
    "b.safetensors": lambda tensors, path: save_file(hugging_face(tensors), path),
    "c.pth": lambda tensors, path: torch.save(hugging_face(tensors), path),
    "d.pth": lambda tensors, path: torch.save({f"_forward_module.model.{n}": t for n, t in tensors.items()}, path),
    "e.pth": save_file,  # a wrong ending: content decides
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_other_forms_of_a_model_are_read_as_the_official_one(tmp_path, version, name):
    shape = shape_of(version)
    tensors = tiny.tensors(0, shape)
    FORMS[name](tensors, tmp_path / name)
    described, result = base_model.read_geometry(tmp_path / name)
    loaded = pth.load(tmp_path / name)
    assert result == shape and set(described) == set(loaded) == set(tensors)
    for name_, tensor in tensors.items():
        assert loaded[name_].shape == tensor.shape and torch.equal(loaded[name_], tensor)
        assert described[name_].shape == tuple(tensor.shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("added", [{}, {"blocks.0.att.time_state": torch.ones(2, 16, 16)}], ids=["", "added"])
def test_a_rewritten_model_of_another_form_is_the_official_one_bit_for_bit(tmp_path, form, added):
    tensors = tiny.tensors(0, shape_of())
    FORMS[form](tensors, tmp_path / form)
    torch.save(tensors, tmp_path / "official.pth")

    def change(name):
        if "key" in name:
            return lambda tensor: tensor * 1.1
        return pth_rewrite.RowwiseUpdate(lambda rows, _: rows + 1, block=32) if "ffn" in name else None

    for source, target in ((form, "x.pth"), ("official.pth", "y.pth")):
        pth_rewrite.rewrite(tmp_path / source, tmp_path / target, change, added)
        pth.check_checksums(tmp_path / target)
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("x.pth", "y.pth"))
    assert set(ours) == set(theirs) == {*tensors, *added}
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].shape == theirs[name].shape for name in ours)


def test_a_prefix_is_taken_off_whole_models_only(tmp_path):
    torch.save({"model.blocks.0.att.key.lora_A": torch.ones(2)}, tmp_path / "x.pth")
    assert set(pth.read_header(tmp_path / "x.pth")) == {"model.blocks.0.att.key.lora_A"}


@pytest.mark.smoke(1)
@pytest.mark.parametrize("form", ["b.safetensors", "c.pth"])
@pytest.mark.parametrize("more", [{}, {"QUANT": "int8"}, {"FINETUNE_MODE": "full", "lora_alpha": "8"}], ids=str)
def test_another_form_trains_as_the_official_one(ready, form, more):
    FORMS[form](pth.load(ready / "model" / "tiny.pth"), ready / "model" / form)
    ours, records = run(ready, "ours", MODEL_PATH=form.partition(".")[0], **more)
    theirs, expected = run(ready, "theirs", **more)
    assert [r["loss"] for r in records] == [r["loss"] for r in expected]
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("form", ["b.safetensors", "c.pth"])
def test_a_run_on_another_form_merges_into_the_official_one(ready, form, capsys):
    from helpers.merging import merge

    FORMS[form](pth.load(ready / "model" / "tiny.pth"), ready / "model" / form)
    run(ready, "ours", MODEL_PATH=form)
    run(ready, "theirs")
    merge("output/ours/rwkv-0.pth")
    assert "The result is a .pth with the official names" in capsys.readouterr().out
    merge("output/theirs/rwkv-0.pth")
    results = [pth.load(p) for p in sorted((ready / "merge").glob("*.pth"))]
    assert len(results) == 2 and list(results[0])[:1] and set(results[0]) == set(results[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_model_in_safetensors_talks(ready):
    FORMS["b.safetensors"](pth.load(ready / "model" / "tiny.pth"), ready / "model" / "b.safetensors")
    ids = torch.tensor([[1, 2, 3]])
    ours, theirs = (build_model(ready / "model" / name, "fp32")(ids)[0] for name in ("b.safetensors", "tiny.pth"))
    assert torch.equal(ours, theirs)


def test_a_name_without_ending_finds_both_kinds(project_folder):
    (project_folder / "model" / "a.safetensors").touch()
    assert paths.resolve_model("a").name == "a.safetensors"
    (project_folder / "model" / "a.pth").touch()
    assert paths.resolve_model("a").name == "a.pth"
    with pytest.raises(UserError, match=r"there is: a\.pth, a\.safetensors"):
        pth.read_header(project_folder / "model" / "b.pth")


def test_state_load_of_an_ai00_state_says_which_file_to_use(ready):
    state_of_ai00(ready / "output" / "mine.state")
    with pytest.raises(
        SettingErrors, match="state_load.*is a learnt state for Ai00.*the .pth that ./merge.sh --export state"
    ):
        train.command(config(FINETUNE_MODE="state_tuning", state_load="mine.state"), [])


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
    ],
    ids=str,
)
def test_a_damaged_safetensors_header_is_a_sentence(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(UserError, match="x.safetensors: "):
        pth.read_header(tmp_path / "x.safetensors")


def damaged(path, name="blocks.1.ffn.key.weight", value=float("nan"), form=torch.save, dtype=torch.float32):
    tensors = {n: t.to(dtype).contiguous() for n, t in pth.load(path).items()}
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[7] = value
    form(tensors, path.with_name("nan.pth"))


RUNS = [
    {},
    {"FINETUNE_MODE": "full"},
    {"QUANT": "nf4"},
    {"FINETUNE_MODE": "pissa", "pissa_r": "4"},
    {"FINETUNE_MODE": "state_tuning"},
]


@pytest.mark.smoke(1)
@pytest.mark.parametrize("more", RUNS, ids=str)
def test_a_base_with_nan_is_refused_before_anything_is_written(ready, more):
    damaged(ready / "model" / "tiny.pth")
    with pytest.raises(UserError, match="blocks.1.ffn.key.weight holds NaN") as result:
        train.command(config(MODEL_PATH="nan.pth", RUN_NAME="", **more), [])
    assert "LR_INIT" not in str(result.value) and "damaged" in str(result.value)
    with pytest.raises(UserError, match="blocks.1.ffn.key.weight holds NaN"):
        train.command(config(MODEL_PATH="nan.pth", RUN_NAME="", **more), ["--dry-run"])
    assert not any((ready / "output").iterdir())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", [torch.save, save_file], ids=["pth", "safetensors"])
def test_one_number_that_is_none_is_detected_in_every_format(tmp_path, dtype, value, form):
    shape = shape_of()
    tiny.save_model(tmp_path / "x.pth", shape=shape)
    base_model.check_model(tmp_path / "x.pth", shape)
    damaged(tmp_path / "x.pth", "blocks.0.ln1.bias", value, form, dtype)
    with pytest.raises(UserError, match="blocks.0.ln1.bias holds (NaN|infinity)"):
        base_model.check_model(tmp_path / "nan.pth", shape)


def test_sums_that_overflow_are_no_infinity(tmp_path):
    shape = shape_of()
    tensors = {n: t.half() for n, t in tiny.tensors(0, shape).items()} | {
        "ln_out.weight": torch.full((32,), 6e4).half()
    }
    torch.save(tensors, tmp_path / "x.pth")
    base_model.check_model(tmp_path / "x.pth", shape)


def test_what_a_model_does_not_use_may_hold_nan(tmp_path):
    shape = shape_of()
    tensors = tiny.tensors(0, shape) | {"blocks.0.att.v0": torch.full((1, 1, 32), torch.nan)}
    torch.save(tensors, tmp_path / "x.pth")
    base_model.check_model(tmp_path / "x.pth", arch.detect({n: tuple(t.shape) for n, t in tensors.items()}, "x"))


def test_chat_and_merge_report_of_a_base_with_nan(ready):
    from helpers.merging import merge

    run(ready)
    damaged(ready / "model" / "tiny.pth")
    with pytest.raises(UserError, match="blocks.1.ffn.key.weight holds NaN"):
        build_model(ready / "model" / "nan.pth", "fp32")
    sidecar = ready / "output/run/rwkv-0.json"
    facts = json.loads(sidecar.read_text())
    from rwkv_peft.checkpoint import sidecars
    from rwkv_peft.common import hashing

    facts |= {"base": "nan.pth", "base_sha256": hashing.sha256(ready / "model/nan.pth"), "base_mark": None}
    sidecars.write_sidecar(sidecar, facts)
    (ready / "model/tiny.pth").unlink()
    with pytest.raises(UserError, match="nan.pth: blocks.1.ffn.key.weight holds NaN"):
        merge("output/run/rwkv-0.pth")
    assert not any((ready / "merge").iterdir())


def test_an_adapter_with_nan_is_not_gone_on_from(ready):
    run(ready)
    tensors = {n: t.clone() for n, t in pth.load(ready / "output/run/rwkv-0.pth").items()}
    tensors["blocks.0.att.key.lora_B"][0, 0] = float("nan")
    pth.save(ready / "output" / "bad.pth", tensors)
    with pytest.raises(UserError, match="blocks.0.att.key.lora_B holds NaN"):
        train.command(config(lora_load="bad.pth", RUN_NAME="next"), [])
    assert not (ready / "output" / "next").exists()
