r"""A model as llama.cpp loads it: GGUF with the World vocabulary. RWKV-7 and RWKV-6; llama.cpp has no RWKV-5.

Names are those of the gguf library (MODEL_ARCH.RWKV7, MODEL_ARCH.RWKV6); what llama.cpp wants beyond names was read from its
loaders (src/models/rwkv7.cpp, rwkv6.cpp) and its converter for HF folders (conversion/rwkv.py):

- the low-rank matrices, which the .pth has as [in, out], are [out, in]; vectors and r_k are flat;
- the token-shift mixes of a block are one tensor [number, 1, 1, C], in the order r w k v a g (RWKV-7) or w k v r g (RWKV-6);
- v0, v1, v2 must exist in layer 0, where the model does not use them, with the shapes of a0, a1, a2: they are a0, a1, a2;
- flat tensors, norms, mixes and some low-rank matrices are float32 whatever the file's format is;
- a RWKV-6 of float16 halves its activations after every 6th layer, so that float16 cannot overflow on a GPU: att.output and
  ffn.value of layer i are divided by 2 ** (i // 6) for that, as in the rwkv package;
- layer norms have eps 1e-5; the 64e-5 of ln_x is in llama.cpp's code;
- tokens are written as Python writes bytes (\\n, \\xe4); token 0 begins and ends documents;
- its tokenizer for this vocabulary never adds a token 0 in front (src/llama-vocab.cpp, LLAMA_VOCAB_TYPE_RWKV), whatever
  add_bos_token says, which only takes it from the chat template (common/chat.cpp): so it is false, and BOS=1 is the
  template's own first token;
- an answer ends at the tokens eos (0), eot and eom; there is no place for a stop of several tokens, like <|im_end|>.

The library writes the head of the file. The tensors follow in pieces of a few MB, so memory does not grow with the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.checkpoint.prompt_format import PromptFormat, quote_for_bash
from rwkv_peft.checkpoint.pth import PthReader
from rwkv_peft.common.atomic_io import atomic_write, check_disk_space
from rwkv_peft.common.errors import UserError, pip_command
from rwkv_peft.common.formatting import join_names, plural
from rwkv_peft.common.paths import display_path
from rwkv_peft.model import arch
from rwkv_peft.model.arch import Geometry
from rwkv_peft.text import tokenizer
from rwkv_peft.text.chat_template import to_jinja

from .cast import fitted, numbers
from .inputs import must_be_model

# of the official converter: RWKV has no limit, and llama.cpp wants a number
CONTEXT_LENGTH = 1048576
RESCALE = 6  # layers of a RWKV-6 of float16 between two halvings

# dtype -> its name in llama.cpp's list of file types, and in its list of number formats
FORMATS = {
    torch.float16: ("MOSTLY_F16", "F16"),
    torch.bfloat16: ("MOSTLY_BF16", "BF16"),
    torch.float32: ("ALL_F32", "F32"),
}

# official name within a block (or of the whole model) -> name in the file, {} for the number of the layer
NORMS = {
    "blocks.0.ln0": "token_embd_norm",
    "ln_out": "output_norm",
    "ln1": "blk.{}.attn_norm",
    "ln2": "blk.{}.attn_norm_2",
    "att.ln_x": "blk.{}.time_mix_ln",
}
SHARED = {
    "emb.weight": "token_embd.weight",
    "head.weight": "output.weight",
    **{f"{norm}.{x}": f"{new}.{x}" for norm, new in NORMS.items() for x in ("weight", "bias")},
    **{f"att.{x}.weight": f"blk.{{}}.time_mix_{x}.weight" for x in ("receptance", "key", "value", "gate", "output")},
    **{f"ffn.{x}.weight": f"blk.{{}}.channel_mix_{x}.weight" for x in ("key", "receptance", "value")},
}
NAMES = {
    "x070": {
        **SHARED,
        **{f"att.{x}": f"blk.{{}}.time_mix_{x}.weight" for x in ("w0", "w1", "w2", "a0", "a1", "a2", "v0", "v1", "v2")},
        **{f"att.{x}": f"blk.{{}}.time_mix_{x}.weight" for x in ("g1", "g2", "k_k", "k_a", "r_k")},
        "ffn.x_k": "blk.{}.channel_mix_lerp_k.weight",
    },
    "x060": {
        **SHARED,
        "att.time_maa_x": "blk.{}.time_mix_lerp_x.weight",
        "att.time_maa_w1": "blk.{}.time_mix_w1.weight",
        "att.time_maa_w2": "blk.{}.time_mix_w2.weight",
        "att.time_faaaa": "blk.{}.time_mix_first.weight",
        "att.time_decay": "blk.{}.time_mix_decay.weight",
        "att.time_decay_w1": "blk.{}.time_mix_decay_w1.weight",
        "att.time_decay_w2": "blk.{}.time_mix_decay_w2.weight",
        **{f"ffn.time_maa_{x}": f"blk.{{}}.channel_mix_lerp_{x}.weight" for x in "kr"},
    },
}
# the mixes that become one tensor, in its order
FUSED = {
    "x070": tuple(f"att.x_{x}" for x in "rwkvag"),
    "x060": tuple(f"att.time_maa_{x}" for x in "wkvrg"),
}
TRANSPOSED = {
    *(f"att.{x}{n}" for x in "wavg" for n in "12"),
    *("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"),
}
# matrices that are float32 in every file, by the end of their new name
FLOAT32 = (
    "_norm.weight",
    "lerp_fused.weight",
    "mix_first.weight",
    "mix_w1.weight",
    "mix_w2.weight",
    "decay_w1.weight",
    "decay_w2.weight",
)


@dataclass(frozen=True)
class Entry:
    """A tensor of the new file. pieces: its numbers in their order, in dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(source: Path, target: Path, geometry: Geometry, prompting: PromptFormat, number: str) -> Iterator[str]:
    """Write a model's .gguf file with matrices of these numbers, by torch's name of them. Yields sentences about it.

    UserError if the source is no model, is an RWKV-5, has not the World vocabulary, or does not fit them.
    """
    where, dtype = display_path(source), getattr(torch, number)
    with PthReader(source) as archive:
        must_be_model(archive, geometry)
        if geometry.version not in NAMES:
            raise UserError(f"{where}: is {arch.arch_of(geometry).name}; llama.cpp knows RWKV-7 and RWKV-6 only.")
        if geometry.vocab_size < tokenizer.VOCAB_SIZE:
            raise UserError(
                f"{where}: has {geometry.vocab_size:,} tokens; the World vocabulary, which goes into the file, has "
                f"{tokenizer.VOCAB_SIZE:,}. Models with a vocabulary of their own cannot become a .gguf file."
            )
        entries, used = plan(archive, geometry, dtype)
        write_file(target, entries, geometry, dtype, source.stem, prompting)
        rest = [name for name in archive.described if name not in used]
    if rest:
        yield f"{plural(len(rest), 'tensor')} had to be left out, for which llama.cpp has no place: {join_names(rest, 4)}."
    made = f"{plural(len(entries), 'tensor')}: matrices are {FORMATS[dtype][1]}, vectors and mixes F32"
    yield f"{made}. The World vocabulary is inside."
    yield from prompt_notes(prompting)


def prompt_notes(prompting: PromptFormat) -> Iterator[str]:
    """What of the training is inside, what is not, and how to load the file."""
    inside, outside = stop_tokens(prompting)
    names = ", ".join(f"{token} ({quote_for_bash(text) if text else 'end of text'})" for token, text in inside.items())
    guess = " (a guess)" if prompting.assumed else ""
    yield f"The chat template of {prompting.label}{guess} is inside, with the stop tokens {names}."
    texts = [*outside.values(), *prompting.stop_strings_beside_tokens]
    command = "llama-cli -m FILE --jinja"
    if texts:
        yield "A .gguf has no place for stop texts. Give the client these:"
        yield f'  llama-server, "stop" of a request: {json.dumps(texts, ensure_ascii=False)}'
        command += "".join(f" --reverse-prompt {quote_for_bash(text)}" for text in texts)
    yield f"Load it with llama.cpp: {command}    or make it smaller first with llama-quantize."


def stop_tokens(prompting: PromptFormat) -> tuple[dict[int, str], dict[int, str]]:
    """Those that the file has a place for (eos, eot, eom), and the others; with their texts."""
    tokens = list(prompting.token_texts.items())
    return dict(tokens[:3]), dict(tokens[3:])


def plan(archive: PthReader, geometry: Geometry, dtype: torch.dtype) -> tuple[list[Entry], set[str]]:
    """What the file holds, in its order, and the names of the source that go into it."""
    names, fused, entries, used = NAMES[geometry.version], FUSED[geometry.version], [], set()
    for name in arch.shapes(geometry):
        layer, within = (name.split(".", 2)[1:]) if name.startswith("blocks.") else ("", name)
        if within == fused[0]:
            parts = [f"blocks.{layer}.{x}" for x in fused]
            entries.append(fused_entry(archive, parts, f"blk.{layer}.time_mix_lerp_fused.weight"))
            used.update(parts)
        elif within not in fused:
            new = (names.get(name) or names[within]).format(layer)
            factor = 1.0
            if rescaled(geometry, dtype) and within in ("att.output.weight", "ffn.value.weight"):
                factor = 0.5 ** (int(layer) // RESCALE)
            entries.append(entry(archive, name, new, within in TRANSPOSED, dtype, factor))
            used.add(name)
            if geometry.version == "x070" and layer == "0" and within in ("att.a0", "att.a1", "att.a2"):
                unused = new.replace("time_mix_a", "time_mix_v")
                entries.append(entry(archive, name, unused, within in TRANSPOSED, dtype, factor))
    if geometry.version == "x070":  # that of layer 0, if the file has it, has no use
        used.update(f"blocks.0.att.v{n}" for n in "012")
    return entries, used


def rescaled(geometry: Geometry, dtype: torch.dtype) -> bool:
    """Return whether llama.cpp halves the activations of such a file."""
    return geometry.version == "x060" and dtype == torch.float16


def entry(archive: PthReader, name: str, new: str, transposed: bool, dtype: torch.dtype, factor: float) -> Entry:
    """Return the entry of a tensor under its name in the file."""
    shape = archive.described[name].shape
    if transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    elif shape[:-1].count(1) == len(shape) - 1 or name.endswith(".r_k"):
        shape = (math.prod(shape),)
    kept = torch.float32 if len(shape) == 1 or new.endswith(FLOAT32) else dtype

    def turned() -> Iterator[Tensor]:
        yield fitted(archive.tensor(name).transpose(-2, -1), kept, f"{display_path(archive.path)}: {name}")

    return Entry(new, shape, kept, turned if transposed else lambda: numbers(archive, name, kept, factor))


def fused_entry(archive: PthReader, names: list[str], new: str) -> Entry:
    """Return the entry of several vectors as one tensor."""
    shape = (len(names), 1, 1, math.prod(archive.described[names[0]].shape))
    return Entry(
        new, shape, torch.float32, lambda: (x for name in names for x in numbers(archive, name, torch.float32))
    )


def write_file(
    target: Path, entries: list[Entry], geometry: Geometry, dtype: torch.dtype, name: str, prompting: PromptFormat
) -> None:
    """Write the head of the file, then the tensors."""
    gguf, writer = head(geometry, dtype, name, prompting)
    for e in entries:
        # the library asks for numpy's dtype and does not look at it where the number format is given
        writer.add_tensor_info(e.name, e.shape, "float16", e.bytes, gguf.GGMLQuantizationType[FORMATS[e.dtype][1]])
    check_disk_space(target.parent, sum(e.bytes for e in entries) + (1 << 22))
    with atomic_write(target) as file:
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY  # our file, opened already
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for e in entries:
            writer.write_padding(file, file.tell())
            begin = file.tell()
            for piece in e.pieces():
                file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
            if file.tell() != begin + e.bytes:
                raise ValueError(f"{e.name} has another size than its shape {e.shape} says")
        writer.write_padding(file, file.tell())


def head(geometry: Geometry, dtype: torch.dtype, name: str, prompting: PromptFormat):
    """The gguf module and its writer, with everything said that is not a tensor."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(f"Writing .gguf files needs a package that is missing: {pip_command('gguf==0.19.0')}") from None
    kind = {"x070": gguf.MODEL_ARCH.RWKV7, "x060": gguf.MODEL_ARCH.RWKV6}[geometry.version]
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FORMATS[dtype][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(geometry.n_embd)
    writer.add_block_count(geometry.n_layer)
    writer.add_feed_forward_length(geometry.dim_ffn)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(geometry.head_size)
    writer.add_head_count(0)  # llama.cpp asks for it and does not use it
    if geometry.version == "x070":
        writer.add_decay_lora_rank(geometry.rank_w)
        writer.add_iclr_lora_rank(geometry.rank_a)
        writer.add_value_residual_mix_lora_rank(geometry.rank_v)
        writer.add_gate_lora_rank(geometry.rank_g)
    else:
        writer.add_time_mix_extra_dim(geometry.rank_mix)
        writer.add_time_decay_extra_dim(geometry.rank_w)
        writer.add_rescale_every_n_layers(RESCALE if rescaled(geometry, dtype) else 0)
    add_vocabulary(gguf, writer, geometry.vocab_size)
    add_prompting(writer, prompting)
    return gguf, writer


def add_prompting(writer, prompting: PromptFormat) -> None:
    """The chat template, and the tokens that begin and end texts. All that was trained is in rwkv_peft.prompt, as JSON."""
    eos, *others = stop_tokens(prompting)[0]
    writer.add_bos_token_id(tokenizer.END_OF_DOC)
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(eos)
    writer.add_eot_token_id(others[0] if others else eos)
    if len(others) > 1:
        writer.add_eom_token_id(others[1])
    writer.add_chat_template(to_jinja(prompting.template, prompting.ending, prompting.bos))
    writer.add_string("rwkv_peft.prompt", json.dumps(prompting.describe(), ensure_ascii=False))


def add_vocabulary(gguf, writer, rows: int) -> None:
    """The World vocabulary as llama.cpp's own tokenizer of that name reads it; reserved ids are called [PADn]."""
    tokens, kinds = [b"<s>"], [gguf.TokenType.CONTROL]
    for i, token in enumerate(tokenizer.token_bytes()[1:], 1):
        tokens.append(repr(token)[2:-1].encode() if token else b"[PAD%d]" % i)
        kinds.append(gguf.TokenType.NORMAL if token else gguf.TokenType.UNUSED)
    for i in range(len(tokens), rows):
        tokens.append(b"[PAD%d]" % i)
        kinds.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
