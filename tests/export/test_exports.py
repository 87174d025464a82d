"""Exports: every file is the naive conversion of its source, its readers and clients agree, and nothing else gets a name."""

import hashlib
import os
import re
import sys

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.exports import DTYPES, IDS, V7_V6, judged, small, states_of, write
from safetensors.torch import load_file

from rwkv_peft.checkpoint import pth as checkpoint
from rwkv_peft.checkpoint import safetensors_io
from rwkv_peft.common import hashing
from rwkv_peft.common.errors import UserError
from rwkv_peft.export import EXPORTS, cast, web_rwkv
from rwkv_peft.model.rwkv import build
from rwkv_peft.model.state import BlockState
from rwkv_peft.text import tokenizer

gguf = pytest.importorskip("gguf")

MODELS = [kind for kind, export in EXPORTS.items() if export.source == "model"]
STATES = [kind for kind, export in EXPORTS.items() if export.source == "state"]


@pytest.fixture
def few_tokens(monkeypatch):
    """A vocabulary of 64 tokens in place of the World's: a .gguf file then takes no time to write and to read."""
    tokens = tokenizer.token_bytes()[:64]
    monkeypatch.setattr(tokenizer, "VOCAB_SIZE", 64)
    monkeypatch.setattr(tokenizer, "token_bytes", lambda: tokens)


@pytest.fixture
def model(tmp_path, request):
    """A base of the version with a learnt state and something unknown in it; path and geometry."""
    shape = small(getattr(request, "param", "x070"))
    tensors = {n: t.bfloat16() for n, t in tiny.tensors(3, shape).items()}
    tensors |= states_of(shape) | {"note": torch.arange(3.0)}
    if shape.version == "x070":
        tensors |= {f"blocks.0.att.v{n}": torch.randn(s) for n, s in ((0, (1, 1, 32)), (1, (32, 8)), (2, (8, 32)))}
    checkpoint.save(tmp_path / "base.pth", tensors)
    return tmp_path / "base.pth", shape


# --- .st ---


def naive_st(path):
    """The converter's rules, applied to the whole file at once."""
    out = {}
    for name, tensor in checkpoint.load(path).items():
        new = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix").lower()
        swap = re.search(r"(\.[wavg]|_w)[12]$|\.time_state$", name)
        out[new] = (tensor.transpose(-1, -2) if swap else tensor).half().contiguous()
    return out


@pytest.mark.parametrize("model", tiny.VERSIONS, indirect=True)
def test_a_st_file_is_the_naive_conversion_bit_for_bit(model, tmp_path):
    path, shape = model
    write("safetensors", path, tmp_path / "m.st", shape)
    ours, theirs = load_file(tmp_path / "m.st"), naive_st(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float16 and torch.equal(ours[name], tensor), name


# what web-rwkv's loader looks for to report versions, and the shapes that it takes sizes from
REPORTS = {
    "x070": [
        *(f"att.x_{x}" for x in "rwkvag"),
        *(f"att.{x}{n}" for x in "wa" for n in "012"),
        *("att.g1", "att.g2", "att.r_k", "att.k_k", "att.k_a"),
    ],
    "x060": [
        *(f"att.time_mix_{x}" for x in (*"xwkvrg", "w1", "w2")),
        *("att.time_decay_w1", "att.time_decay_w2", "ffn.time_mix_k", "ffn.time_mix_r"),
    ],
    "x052": ["att.gate.weight", "att.ln_x.weight", "att.ln_x.bias"],
}


@pytest.mark.parametrize("model", tiny.VERSIONS, indirect=True)
def test_web_rwkv_finds_version_heads_and_ranks_in_a_st_file(model, tmp_path):
    path, shape = model
    write("safetensors", path, tmp_path / "m.st", shape)
    result = load_file(tmp_path / "m.st")
    reported = [v for v, names in REPORTS.items() if all(f"blocks.0.{name}" in result for name in names)]
    assert reported[0] == shape.version
    heads = "r_k" if shape.version == "x070" else "time_first"
    assert result[f"blocks.0.att.{heads}"].shape[0] == shape.n_head
    if shape.version == "x070":
        ranks = [result[f"blocks.{i}.att.{x}1"].shape[0] for i, x in ((0, "w"), (0, "a"), (0, "g"), (1, "v"))]
        assert ranks == [shape.rank_w, shape.rank_a, shape.rank_g, shape.rank_v]
    if shape.version == "x060":
        assert result["blocks.0.att.time_mix_w1"].shape[0] == 5 * shape.rank_mix
        assert result["blocks.0.att.time_decay_w1"].shape[0] == shape.rank_w


@pytest.mark.parametrize("digest", [None, hashlib.sha256()])
@pytest.mark.parametrize("rows", [3, 4, 5])
def test_the_bytes_of_a_st_file_begin_at_a_multiple_of_eight_whatever_the_names(tmp_path, rows, digest):
    shapes = {"x" * rows: (rows,), "empty": (0,), "y": (1, 1, rows)}
    data = {name: torch.randn(shape) for name, shape in shapes.items()}
    digest = digest and digest.copy()
    safetensors_io.write_safetensors(tmp_path / "f.st", shapes, torch.float32, lambda name: data[name].split(2), digest)
    if digest:
        assert digest.hexdigest() == hashing.sha256(tmp_path / "f.st")
    assert int.from_bytes((tmp_path / "f.st").read_bytes()[:8], "little") % 8 == 0
    result = load_file(tmp_path / "f.st")
    assert all(torch.equal(result[name], data[name]) for name in shapes)


def test_tensors_that_share_a_record_are_written_each_with_its_own_numbers(tmp_path):
    shape = small()
    tensors = tiny.tensors(0, shape)
    both = torch.stack([tensors["emb.weight"], tensors["head.weight"]])
    torch.save(tensors | {"emb.weight": both[0], "head.weight": both[1]}, tmp_path / "tied.pth")
    write("safetensors", tmp_path / "tied.pth", tmp_path / "m.st", shape)
    result = load_file(tmp_path / "m.st")
    for name in ("emb.weight", "head.weight"):
        assert torch.equal(result[name], tensors[name].half()), name


def test_a_large_tensor_goes_through_memory_in_small_pieces(tmp_path):
    tensor = torch.randn(5 << 20)
    checkpoint.save(tmp_path / "large.pth", {"large": tensor})
    with checkpoint.PthReader(tmp_path / "large.pth") as archive:
        pieces = list(cast.numbers(archive, "large", torch.float16))
    assert max(p.numel() * 4 for p in pieces) <= checkpoint.COPY_BYTES and len(pieces) == 5
    assert torch.equal(torch.cat(pieces), tensor.half())


# --- .gguf ---


@pytest.fixture
def ggufs(tmp_path, few_tokens):
    """(version, kind) -> source's tensors, geometry, reader. Eight layers, so that halving shows."""

    def make(version, kind):
        shape, path, target = small(version, 8), tmp_path / "m.pth", tmp_path / f"{kind}.gguf"
        tiny.save_model(path, 3, shape, torch.bfloat16)
        write(kind, path, target, shape)
        return checkpoint.load(path), shape, gguf.GGUFReader(target)

    return make


def content(tensor):
    """A tensor of a GGUF file as float32 in its own shape (the reader gives bfloat16 as bytes)."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        return torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).float()
    return torch.from_numpy(tensor.data.astype(np.float32))


def expected(source, shape, halved):
    """What a GGUF file of this model holds, by name: the loaders' rules, applied to everything at once."""
    v7 = shape.version == "x070"
    norms = (("blocks.0.ln0", "token_embd_norm"), ("ln_out", "output_norm"))
    out = {f"{new}.{x}": source[f"{old}.{x}"] for old, new in norms for x in ("weight", "bias")}
    out |= {"token_embd.weight": source["emb.weight"], "output.weight": source["head.weight"]}
    for i in range(shape.n_layer):
        att, ffn, new = f"blocks.{i}.att.", f"blocks.{i}.ffn.", f"blk.{i}.time_mix_"
        for old, norm in (("ln1", "attn_norm"), ("ln2", "attn_norm_2"), ("att.ln_x", "time_mix_ln")):
            out |= {f"blk.{i}.{norm}.{x}": source[f"blocks.{i}.{old}.{x}"] for x in ("weight", "bias")}
        for x in ("receptance", "key", "value", "output", *([] if v7 else ["gate"])):
            out[f"{new}{x}.weight"] = source[f"{att}{x}.weight"]
        for x in ("key", "value", *([] if v7 else ["receptance"])):
            out[f"blk.{i}.channel_mix_{x}.weight"] = source[f"{ffn}{x}.weight"]
        mixes = [f"x_{x}" for x in "rwkvag"] if v7 else [f"time_maa_{x}" for x in "wkvrg"]
        out[f"{new}lerp_fused.weight"] = torch.stack([source[att + m] for m in mixes]).view(len(mixes), 1, 1, -1)
        if v7:
            for x in "wavg":
                there = "a" if (x, i) == ("v", 0) else x
                out |= {f"{new}{x}{n}.weight": source[f"{att}{there}{n}"].T for n in "12"}
                if x != "g":
                    out[f"{new}{x}0.weight"] = source[f"{att}{there}0"].flatten()
            out |= {f"{new}{x}.weight": source[att + x].flatten() for x in ("k_k", "k_a", "r_k")}
            out[f"blk.{i}.channel_mix_lerp_k.weight"] = source[ffn + "x_k"].flatten()
        else:
            out |= {f"{new}lerp_x.weight": source[att + "time_maa_x"].flatten()}
            out |= {f"{new}w{n}.weight": source[f"{att}time_maa_w{n}"].transpose(-1, -2) for n in "12"}
            out |= {f"{new}first.weight": source[att + "time_faaaa"]}
            out |= {f"{new}decay.weight": source[att + "time_decay"].flatten()}
            out |= {f"{new}decay_w{n}.weight": source[f"{att}time_decay_w{n}"].T for n in "12"}
            out |= {f"blk.{i}.channel_mix_lerp_{x}.weight": source[f"{ffn}time_maa_{x}"].flatten() for x in "kr"}
            if halved:
                for name in (f"{new}output.weight", f"blk.{i}.channel_mix_value.weight"):
                    out[name] = out[name].float() / (1 if i < 6 else 2)
    return out


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("version", V7_V6)
def test_a_gguf_file_holds_every_tensor_where_llama_cpp_validations_for_it(ggufs, version, kind):
    source, shape, reader = ggufs(version, kind)
    wanted = expected(source, shape, halved=kind == "gguf" and version == "x060")
    assert {t.name for t in reader.tensors} == wanted.keys()
    for tensor in reader.tensors:
        dtype = DTYPES[kind] if tensor.tensor_type != gguf.GGMLQuantizationType.F32 else torch.float32
        assert torch.equal(content(tensor), wanted[tensor.name].to(dtype).float()), tensor.name


@pytest.mark.parametrize("version", V7_V6)
def test_the_gguf_library_knows_every_name_and_none_is_missing(ggufs, version):
    kind = {"x070": gguf.MODEL_ARCH.RWKV7, "x060": gguf.MODEL_ARCH.RWKV6}[version]
    names = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[kind]}
    if version == "x060":  # the old spelling of what is one tensor now
        names -= {f"blk.{{bid}}.time_mix_lerp_{x}" for x in "wkvrg"}
    _, _, reader = ggufs(version, "gguf")
    written = {re.sub(r"blk\.\d+\.", "blk.{bid}.", t.name).rpartition(".")[0] for t in reader.tensors}
    assert written == names


@pytest.mark.parametrize("version", V7_V6)
def test_vectors_norms_and_mixes_are_float32_in_every_gguf_and_linears_are_not(ggufs, version):
    _, _, reader = ggufs(version, "gguf")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert all(kinds[t.name] == "F32" for t in reader.tensors if len(t.data.shape) == 1)
    mixes = ["lerp_fused"] if version == "x070" else ["lerp_fused", "first", "w1", "w2", "decay_w1", "decay_w2"]
    if version == "x070":
        mixes += ["w1", "w2"]
        assert kinds["blk.1.time_mix_a1.weight"] == "F16"
    assert all(kinds[f"blk.1.time_mix_{x}.weight"] == "F32" for x in mixes)
    assert kinds["blk.1.time_mix_key.weight"] == kinds["token_embd.weight"] == kinds["output.weight"] == "F16"


@pytest.mark.parametrize("version", V7_V6)
def test_a_gguf_file_says_what_llama_cpp_asks_for(ggufs, version):
    _, shape, reader = ggufs(version, "gguf")
    name = {"x070": "rwkv7", "x060": "rwkv6"}[version]
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.token")}
    assert said["general.architecture"] == name
    sizes = {
        "context_length": 1048576, "embedding_length": 32, "block_count": 8, "feed_forward_length": shape.dim_ffn,
        "wkv.head_size": 16, "attention.head_count": 0,
    }  # fmt: skip
    if version == "x070":
        sizes |= {
            "attention.decay_lora_rank": shape.rank_w, "attention.iclr_lora_rank": shape.rank_a,
            "attention.value_residual_mix_lora_rank": shape.rank_v, "attention.gate_lora_rank": shape.rank_g,
        }  # fmt: skip
    else:
        sizes |= {
            "time_mix_extra_dim": shape.rank_mix,
            "time_decay_extra_dim": shape.rank_w,
            "rescale_every_n_layers": 6,
        }
    for key, value in sizes.items():
        assert said[f"{name}.{key}"] == value, key
    assert said[f"{name}.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    tokens = {x: said[f"tokenizer.ggml.{x}_token_id"] for x in ("bos", "eos", "eot")}
    assert tokens == {"bos": 0, "eos": 0, "eot": 261} and said["tokenizer.ggml.model"] == "rwkv"


def test_only_the_float16_file_of_a_v6_halves_its_activations(ggufs):
    said = {kind: ggufs("x060", kind)[2].fields["rwkv6.rescale_every_n_layers"].contents() for kind in DTYPES}
    assert said == {"gguf": 6, "gguf-bf16": 0, "gguf-f32": 0}


def unescaped(text):
    """As llama.cpp reads a token: \\t, \\n, \\r and \\xHH; a backslash before anything else stands for that."""
    plain = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}
    return re.sub(
        rb"\\(x..|.)",
        lambda m: bytes.fromhex(m[1][1:].decode()) if len(m[1]) == 3 else plain.get(m[1], m[1]),
        text,
        flags=re.DOTALL,
    )


@pytest.mark.slow
def test_the_vocabulary_in_a_gguf_file_has_the_bytes_of_every_token(tmp_path):
    shape = small(layers=1, vocab=65536)
    tiny.save_model(tmp_path / "m.pth", 0, shape)
    write("gguf", tmp_path / "m.pth", tmp_path / "m.gguf", shape)
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"]
    tokens = [bytes(field.parts[i]) for i in field.data]
    assert len(tokens) == 65536 and tokens[0] == b"<s>"
    for i, token in enumerate(tokenizer.token_bytes()[1:], 1):
        assert unescaped(tokens[i]) == (token or b"[PAD%d]" % i), i


# --- learnt states ---


def save_states(path, shape, **options):
    checkpoint.save(path, states_of(shape, **options))
    return path


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_a_state_file_holds_one_float32_matrix_per_layer_and_nothing_else(tmp_path, version):
    shape = small(version, 11)
    source = save_states(tmp_path / "rwkv-3.pth", shape)
    write("state", source, tmp_path / "s.pth", shape)
    result, before = torch.load(tmp_path / "s.pth", weights_only=True), states_of(shape)
    assert list(result) == [f"blocks.{i}.att.time_state" for i in range(11)]
    assert all(t.dtype == torch.float32 and torch.equal(t, before[n]) for n, t in result.items())


def test_the_state_of_ai00_is_float16_with_keys_before_values(tmp_path):
    shape = small()
    source = save_states(tmp_path / "rwkv-3.pth", shape)
    write("state-ai00", source, tmp_path / "s.state", shape)
    result, before = load_file(tmp_path / "s.state"), states_of(shape)
    assert result.keys() == before.keys()
    for name, matrix in result.items():
        assert matrix.dtype == torch.float16
        assert matrix[1, 2, 3] == before[name][1, 3, 2]
        assert torch.equal(matrix.transpose(1, 2).float(), before[name])


@pytest.mark.parametrize("kind", ["state", "state-ai00"])
def test_learnt_token_shifts_are_left_out_aloud(tmp_path, kind):
    shape = small()
    full, plain = save_states(tmp_path / "f.pth", shape, full=True), save_states(tmp_path / "p.pth", shape)
    said = write(kind, full, tmp_path / "full", shape)
    assert "4 learnt token shifts of this full state had to be left out" in said
    assert "left out" not in write(kind, plain, tmp_path / "plain", shape)
    open_file = load_file if kind == "state-ai00" else lambda p: torch.load(p, weights_only=True)
    assert all(name.endswith(".att.time_state") for name in open_file(tmp_path / "full"))


def buffer_parts(path, shape):
    """The buffer of rwkv.cpp by layer: ffn_x [C], att_x [C], heads [H, N, N]."""
    C, N = shape.n_embd, shape.head_size
    layers = torch.from_numpy(np.fromfile(path, "<f4")).view(shape.n_layer, C * (2 + N))
    return [(layer[:C], layer[C : 2 * C], layer[2 * C :].view(C // N, N, N)) for layer in layers]


@pytest.mark.parametrize("full", [False, True], ids=["matrices", "full"])
@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_the_buffer_of_rwkv_cpp_is_ffn_shift_att_shift_heads(tmp_path, version, full):
    shape = small(version)
    source, states = save_states(tmp_path / "s.pth", shape, full=full), states_of(shape, full=full)
    write("rwkvcpp", source, tmp_path / "s.bin", shape)
    for i, (ffn_x, att_x, heads) in enumerate(buffer_parts(tmp_path / "s.bin", shape)):
        zero = torch.zeros(32)
        assert torch.equal(ffn_x, states.get(f"blocks.{i}.ffn.ts_state", zero))
        assert torch.equal(att_x, states.get(f"blocks.{i}.att.ts_state", zero))
        matrix = states[f"blocks.{i}.att.time_state"]
        assert torch.equal(heads, matrix if version == "x070" else matrix.transpose(1, 2))


@pytest.mark.smoke(1)
@pytest.mark.parametrize("version", V7_V6)
def test_the_rwkv_package_started_from_an_exported_state_answers_like_our_model(tmp_path, version):
    shape = tiny.geometry(2, 128, 512, 64, version)
    tensors, states = tiny.tensors(3, shape), states_of(shape)
    source = save_states(tmp_path / "s.pth", shape)
    base = tmp_path / "base.pth"
    # in a v6 file the package takes a merged state by itself: its own loader then judges the layout of our .pth
    checkpoint.save(base, tensors | (states if version == "x060" else {}))
    for kind in STATES:
        write(kind, source, tmp_path / f"out{EXPORTS[kind].ending}", shape)
    ours = build(shape, tensors, tiny.ops(shape))
    begin = [BlockState.zeros(1, 2, 64, torch.empty(0)) for _ in range(2)]
    for i, state in enumerate(begin):
        state.wkv = states[f"blocks.{i}.att.time_state"][None].clone()
    with torch.inference_mode():
        wanted, without = ours(torch.tensor([IDS]), begin)[0][0], ours(torch.tensor([IDS]))[0][0]
    pth = torch.load(tmp_path / "out.pth", weights_only=True)
    ai00 = {name: matrix.float() for name, matrix in load_file(tmp_path / "out.state").items()}
    names = [f"blocks.{i}.att.time_state" for i in range(2)]
    turned = {  # the list of the package's v7 is [head, value, key], that of its v6 [head, key, value]
        "x070": [[pth[n] for n in names], [ai00[n].transpose(1, 2) for n in names]],
        "x060": [[pth[n].transpose(1, 2) for n in names], [ai00[n] for n in names]],
    }[version]
    cpp = [heads for _, _, heads in buffer_parts(tmp_path / "out.rwkvcpp.bin", shape)]
    *right, wrong, nothing = judged(base, version, [*turned, cpp, [h.transpose(1, 2) for h in cpp], []])
    size = wanted.abs().max()
    for answer in (*right, *([nothing] if version == "x060" else [])):
        assert (answer - wanted).abs().max() < 2e-5 * size
    assert (wrong - wanted).abs().max() > 1e-2 * size
    assert (without - wanted).abs().max() > 1e-2 * size


# --- what is refused, and what is left behind ---


@pytest.mark.smoke
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("value", [65504.0, 65520.0, -7e4, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.1.ffn.value.weight", "blocks.0.att.w1"])
def test_a_number_that_does_not_fit_is_refused_by_name_and_nothing_is_left(tmp_path, few_tokens, kind, value, name):
    shape, tensors = small(), tiny.tensors(0, small())
    tensors[name].view(-1)[7] = value
    checkpoint.save(tmp_path / "m.pth", tensors)
    narrow = kind == "safetensors" or (kind == "gguf" and name != "blocks.0.att.w1")  # w1 is F32 in every GGUF file
    if abs(value) < torch.inf and (value == 65504.0 or not narrow):
        write(kind, tmp_path / "m.pth", tmp_path / "out", shape)
        return
    with pytest.raises(UserError, match=f"m.pth: {name} holds"):
        write(kind, tmp_path / "m.pth", tmp_path / "out", shape)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_a_state_that_does_not_fit_float16_is_refused_for_ai00_only(tmp_path):
    shape, states = small(), states_of(small())
    states["blocks.1.att.time_state"][0, 1, 2] = -70000
    checkpoint.save(tmp_path / "s.pth", states)
    with pytest.raises(UserError, match=r"blocks.1.att.time_state holds -70000, but float16 ends at 65504"):
        write("state-ai00", tmp_path / "s.pth", tmp_path / "s.state", shape)
    write("state", tmp_path / "s.pth", tmp_path / "out.pth", shape)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"blocks.0.att.key.lora_A": torch.ones(4, 32)}, "is an adapter"),
        (states_of(small()), "is an adapter"),
        ({"x": torch.ones(2)}, "is not an RWKV model"),
        (
            {n: t for n, t in tiny.tensors(0, small()).items() if n != "blocks.1.ffn.x_k"},
            "is no whole RWKV-7 .* model: blocks.1.ffn.x_k is missing",
        ),
    ],
    ids=["adapter", "state", "something", "damaged"],
)
def test_what_is_no_model_becomes_no_model_file(tmp_path, kind, tensors, message):
    checkpoint.save(tmp_path / "m.pth", tensors)
    with pytest.raises(UserError, match=f"m.pth: {message}"):
        write(kind, tmp_path / "m.pth", tmp_path / "out", small())
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize(
    "tensors, message",
    [
        (tiny.tensors(0, small()), "holds no learnt state"),
        ({"blocks.0.att.key.lora_A": torch.ones(4, 32)}, "holds no learnt state"),
        ({"blocks.0.att.time_state": torch.zeros(2, 16, 16)}, r"is no state .* blocks.1.att.time_state is missing"),
        (states_of(small(layers=3)), "is no state of a model with 2 layers, 2 heads of 16: .* is too much"),
        (states_of(tiny.geometry(2, 64, 64, 16)), "is no state of a model with 2 layers, 2 heads of 16: "),
        (states_of(small()) | {"blocks.0.att.ts_state": torch.zeros(31)}, "31 numbers instead of 32"),
        (states_of(small()) | {"blocks.1.att.time_state": torch.full((2, 16, 16), torch.nan)}, "holds NaN or infinity"),
    ],
    ids=["model", "adapter", "half", "deeper", "wider", "shift", "nan"],
)
def test_what_is_no_state_of_the_base_becomes_no_state_file(tmp_path, kind, tensors, message):
    checkpoint.save(tmp_path / "s.pth", tensors)
    with pytest.raises(UserError, match=f"s.pth: .*{message}"):
        write(kind, tmp_path / "s.pth", tmp_path / "out", small())
    assert [p.name for p in tmp_path.iterdir()] == ["s.pth"]


@pytest.mark.parametrize(
    "kind, shape, message",
    [
        ("gguf", small("x052"), r"is RWKV-5 \(x052\); llama.cpp knows RWKV-7 and RWKV-6 only"),
        ("gguf", small(), "has 64 tokens; the World vocabulary"),
        ("safetensors", small(layers=1), "has one layer only"),
    ],
    ids=["v5 for llama.cpp", "another vocabulary", "one layer for web-rwkv"],
)
def test_what_a_client_could_not_load_is_refused(tmp_path, kind, shape, message):
    tiny.save_model(tmp_path / "m.pth", 0, shape)
    with pytest.raises(UserError, match=f"m.pth: {message}"):
        write(kind, tmp_path / "m.pth", tmp_path / "out", shape)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_two_tensors_that_get_one_name_are_refused(tmp_path):
    shape = small()
    checkpoint.save(tmp_path / "m.pth", tiny.tensors(0, shape) | {"blocks.0.ATT.w1": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"blocks.0.ATT.w1 and blocks.0.att.w1 would both be called blocks.0.att.w1"):
        write("safetensors", tmp_path / "m.pth", tmp_path / "m.st", shape)
    assert not (tmp_path / "m.st").exists()


def test_tensors_that_llama_cpp_has_no_place_for_are_left_out_aloud(tmp_path, few_tokens):
    shape = small()
    checkpoint.save(tmp_path / "m.pth", tiny.tensors(0, shape) | states_of(shape) | {"note": torch.ones(1)})
    said = write("gguf", tmp_path / "m.pth", tmp_path / "m.gguf", shape)
    assert "3 tensors had to be left out" in said and "note" in said and "blocks.0.att.time_state" in said


@pytest.mark.parametrize("kind", ["safetensors", "rwkvcpp"])
def test_an_export_killed_while_it_writes_leaves_nothing_with_its_name(tmp_path, kind):
    """The process ends in the middle, as if by kill -9; the old file stays, and the next export cleans up."""
    shape, what = small(), EXPORTS[kind].source
    source = tmp_path / "m.pth"
    checkpoint.save(source, tiny.tensors(0, shape) if what == "model" else states_of(shape))
    target = tmp_path / ("out" + EXPORTS[kind].ending)
    target.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os._exit(9)  # all is written, but not yet safe
        write(kind, source, target, shape)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 3
    write(kind, source, target, shape)
    assert target.read_bytes() != b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pth", target.name]


def test_a_damaged_byte_in_the_source_is_noticed_and_nothing_is_written(tmp_path):
    path, shape = tiny.save_model(tmp_path / "m.pth", 0, small()), small()
    data = path.read_bytes()
    at = data.find(checkpoint.load(path)["head.weight"].numpy().tobytes())
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(UserError, match="head.weight is damaged"):
        write("safetensors", path, tmp_path / "m.st", shape)
    assert not (tmp_path / "m.st").exists()


def test_the_table_names_its_kinds_and_no_two_files_of_one_kind_of_source_share_an_ending():
    assert all(kind == export.kind and export.source in ("model", "state", "run") for kind, export in EXPORTS.items())
    assert len({export.ending for export in EXPORTS.values()}) == len(EXPORTS)


def test_an_untransposed_low_rank_matrix_would_be_noticed(tmp_path, monkeypatch):
    """That the laws above could fail."""
    monkeypatch.setattr(web_rwkv, "TRANSPOSED", set())
    shape = small()
    tiny.save_model(tmp_path / "m.pth", 0, shape)
    write("safetensors", tmp_path / "m.pth", tmp_path / "m.st", shape)
    result, wanted = load_file(tmp_path / "m.st"), naive_st(tmp_path / "m.pth")
    assert not all(result[n].shape == t.shape and torch.equal(result[n], t) for n, t in wanted.items())


@pytest.mark.parametrize(
    "kind, package", [("safetensors", "safetensors"), ("state-ai00", "safetensors"), ("gguf", "gguf")]
)
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, few_tokens, monkeypatch, kind, package):
    shape = small()
    tensors = tiny.tensors(0, shape) if EXPORTS[kind].source == "model" else states_of(shape)
    checkpoint.save(tmp_path / "m.pth", tensors)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        write(kind, tmp_path / "m.pth", tmp_path / "out", shape)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]
