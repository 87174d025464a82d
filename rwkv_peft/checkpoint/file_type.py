"""Detect by its first bytes what a file is that is not a checkpoint, and say what to do instead. Floor 0."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

from rwkv_peft.common import json_reader
from rwkv_peft.common.formatting import plural

HEAD = 4096  # bytes of a file that are examined
MOST_HEADER = 16 << 20  # bytes of a safetensors header: a tensor needs about 120 (its library allows 100 MB)
AGAIN = "Download it again"
ORIGINAL = "Use the .pth that it was made from, or download it (model/README.md says where)"

# first bytes -> what such a file is
ARCHIVES = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}  # fmt: skip
FORMATS = {
    b"GGUF": "a GGUF file, which is for llama.cpp",
    b"fmgg": "a model of rwkv.cpp (ggml)", b"tjgg": "a ggml file, which is for llama.cpp",
    b"lmgg": "a ggml file, which is for llama.cpp", b"MMIDIDX\0\0": "the .idx of tokenized data",
    b"\x93NUMPY": "a NumPy array", b"\x89HDF": "an HDF5 file (Keras, TensorFlow)",
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"%PDF": "a PDF document", b"SQLite format 3": "a database",
    b"\x7fELF": "a program", b"MZ": "a program of Windows", b"PAR1": "a Parquet table: data, no model",
    b"MLModel": "a Core ML model",
}  # fmt: skip
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch before 1.6 began its files with
UNFINISHED = (".aria2", ".crdownload", ".part", ".incomplete", ".tmp", ".downloading", ".!qB")


def is_safetensors(head: bytes, size: int) -> bool:
    """Return whether the first bytes `head` of a file of `size` bytes are those of a safetensors file."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    length = int.from_bytes(head[:8], "little")
    return length >= 2 and (length + 8 <= size or b'"dtype"' in head or b'"__metadata__"' in head)


def describe_file(path: Path) -> str:
    """Say what a file is that is neither a zip nor a safetensors file, and what to do. The text follows its name."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEAD)
        file.seek(257)
        tar = file.read(5) == b"ustar"
    if unfinished := [
        ending for ending in UNFINISHED if path.name.endswith(ending) or Path(f"{path}{ending}").exists()
    ]:
        return f"is a download that has not finished ({unfinished[0]}): let it finish, then use the whole file."
    if not size:
        return f"is empty (0 bytes). {AGAIN}."
    if not head.strip(b"\0"):
        return f"holds nothing but zeros: a download that reserved its {size:,} bytes and did not fill them. {AGAIN}."
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return describe_lfs_pointer(head, size)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return (
            "is a web page, not the file that the page is about. Download the file itself: on Hugging Face the link with "
            "/resolve/ in place of /blob/."
        )
    if name := next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), "tar" if tar else ""):
        return f"is a {name} archive. Unpack it, and use the .pth inside."
    if head[4:8] == b"TFL3":
        return f"is a TensorFlow Lite model, and cannot be trained. {ORIGINAL}."
    if head[:1] == b"\x08" and (b"onnx" in head[:200].lower() or b"pytorch" in head[:64] or path.suffix == ".onnx"):
        return f"is an ONNX model, and cannot be trained. {ORIGINAL}."
    if name := next((name for magic, name in FORMATS.items() if head.startswith(magic)), ""):
        return f"is {name}. {ORIGINAL}."
    if head.startswith(LEGACY):
        new = path.with_name(f"{path.stem}-new.pth").name
        return (
            f'is a checkpoint in the form of torch before 1.6. Convert it, in its folder: python -c "import torch; '
            f"torch.save(torch.load('{path.name}', map_location='cpu', weights_only=True), '{new}')\", and use {new}."
        )
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return (
            "is no .pth checkpoint: it is a bare Python pickle, which may hold code. It was not loaded, and nothing in it was "
            "run. Get the model as .pth or .safetensors."
        )
    if text[:1] in (b"{", b"["):
        return describe_json(path, head)
    if is_utf8(head):
        first = " ".join(head.decode("utf-8", "replace").split())[:60]
        return (
            f'is no .pth checkpoint: it is a text file that begins "{first}". {AGAIN}, or name the model\'s own file.'
        )
    return f"is no .pth checkpoint and no .safetensors file, or it was cut off at its beginning. {AGAIN}."


def describe_lfs_pointer(head: bytes, size: int) -> str:
    """Return the message for a Git LFS pointer."""
    match = re.search(rb"^size (\d+)", head, re.MULTILINE)
    large = f" of {int(match[1]):,} bytes" if match else ""
    return (
        f"is a Git LFS pointer: a note of {size:,} bytes in place of the file itself{large}. Run git lfs pull in the folder that "
        "git cloned, or download the file from the page of the model."
    )


def describe_json(path: Path, head: bytes) -> str:
    """Return the message for a JSON file."""
    if b'"weight_map"' in head or path.name.endswith(".index.json"):
        return (
            "is the index of a model in several .safetensors files. This version reads one file: join them, in their folder: "
            + join_command("*.safetensors")
        )
    if b'"architectures"' in head or b'"model_type"' in head:
        return "is a model's config.json, not its weights. Name the .pth or .safetensors beside it."
    return "is a JSON file, not a model. Name the .pth or .safetensors of the model."


def join_command(pattern: str) -> str:
    """Return a command that joins the safetensors files which match a glob pattern into one file."""
    return (
        'python -c "import glob; from safetensors.torch import load_file, save_file; '
        f"save_file({{k: v for f in sorted(glob.glob('{pattern}')) for k, v in load_file(f).items()}}, 'joined.safetensors')\""
    )


def describe_zip(names: Iterable[str]) -> str:
    """Say what a zip file is that holds no torch checkpoint. The text follows its name.

    Args:
        names: the names of its members.
    """
    names = list(names)
    inside = [name for name in names if name.lower().endswith((".pth", ".pt", ".safetensors", ".bin", ".ckpt"))]
    if inside:
        return f"is a zip archive that holds {inside[0]}. Unpack it, and use that file."
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        return f"is a TorchScript program, not a checkpoint of tensors. {ORIGINAL}."
    if names and all(name.endswith(".npy") for name in names):
        return f"is a NumPy archive (.npz). {ORIGINAL}."
    if "[Content_Types].xml" in names:
        return "is an Office document, not a model."
    return f"is a zip file, but no torch checkpoint (no data.pkl in it). {AGAIN}, or name the model's own file."


def is_utf8(head: bytes) -> bool:
    """Return whether the first bytes of a file are UTF-8 text; the last character may be incomplete."""
    try:
        codecs.utf_8_decode(head, "strict", False)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def describe_incomplete(size: int, wanted: int | None, at_least: bool = False) -> str:
    """Return the message for an incomplete download.

    Args:
        size: bytes of the file.
        wanted: bytes that it should have, None if unknown.
        at_least: `wanted` is a lower bound.
    """
    words = "is not complete"
    if wanted and wanted > size:
        words += f": it has {size:,} bytes and should have {'at least ' if at_least else ''}{wanted:,}"
    elif wanted:
        words += f": its {size:,} bytes have no end that belongs to them, so a part was not downloaded or not written"
    else:
        words += f": it was cut off after {plural(size, 'byte')}"
    return f"{words}. {AGAIN}."


def read_safetensors_header(path: Path) -> tuple[dict, int]:
    """Read the header of a safetensors file, and where the bytes after it begin.

    Raises:
        ValueError: the header is damaged; the message is for the user, without the name of the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length + 8 > size:
            raise ValueError(describe_incomplete(size, length + 8, True))
        if length > MOST_HEADER:
            raise ValueError(f"is a .safetensors file with a header of {length:,} bytes, which no model has. {AGAIN}.")
        try:
            header = json_reader.parse_json(file.read(length), MOST_HEADER)
        except ValueError as error:
            raise ValueError(f"is a .safetensors file whose header is damaged: it {error}. {AGAIN}.") from None
    if not isinstance(header, dict):
        raise ValueError(f"is a .safetensors file whose header is damaged (no object). {AGAIN}.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(
            f"is a .safetensors file whose header is damaged (__metadata__ holds more than texts). {AGAIN}."
        )
    return header, length + 8
