"""A file is what its content says; what holds no rows is answered by what it is."""

import gzip
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.row_files import rows_in

from rwkv_peft.common.errors import UserError
from rwkv_peft.preprocess import files
from rwkv_peft.preprocess.files import blocks

ROWS = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def zipped(*names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", LFS, "Git LFS pointer"),
        ("x.parquet", LFS, "Git LFS pointer"),
        ("x.txt", LFS, "Git LFS pointer"),
        ("x.jsonl", b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "web page"),
        ("x.csv", b"\n <HTML><head></head>", "web page"),
        ("x.parquet", b"<!doctype html><html>404</html>", "web page"),
        ("x.json", b"<?xml version='1.0'?><rows/>", "is XML"),
        ("x.jsonl", b"%PDF-1.7\n\x00", "is a PDF"),
        ("x.txt", b"%PDF-1.7\n\x00", "is a PDF"),
        ("x.txt", b"{\\rtf1\\ansi hi}", "RTF"),
        ("x.jsonl", zipped("a.jsonl"), "zip archive: unpack it"),
        ("x.txt", zipped("word/document.xml"), "Word document"),
        ("x.csv", zipped("META-INF/container.xml"), "EPUB"),
        ("x.jsonl", zipped("a")[:20], "zip archive that was cut off"),
        ("x.jsonl", b"BZh91AY&SY", "bzip2"),
        ("x.jsonl", b"\xfd7zXZ\0\0", "xz"),
        ("x.csv", b"SQLite format 3\0", "SQLite"),
        ("x.jsonl", b"GGUF\3\0\0\0", "GGUF"),
        ("x.jsonl", b"\x80\x04\x95", "pickle"),
        ("x.jsonl.gz", LINES, "cannot be unpacked: it is not gzip"),
        ("x.jsonl.zst", gzip.compress(LINES), "cannot be unpacked: it is not zstd"),
        ("x.jsonl", gzip.compress(b"x" * 257 + b"ustar" + b"\0" * 300), "tar archive"),
    ],
)
def test_what_holds_no_rows_is_answered_by_what_it_is(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        rows_in(tmp_path / name)


def parquet() -> bytes:
    made = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), made)
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", parquet()),
        ("x.csv", parquet()),
        ("x.data", parquet()),
        ("x.jsonl", gzip.compress(LINES)),
        ("x.jsonl", zstandard.compress(LINES)),
        ("x.jsonl", b"question,answer\na,b\nc,d\n"),
        ("x.json", b"question;answer\na;b\nc;d\n"),
        ("x.xlsx", b"question\tanswer\na\tb\nc\td\n"),
        ("x.parquet", LINES),
        ("x.xlsx", json.dumps(ROWS).encode()),
    ],
)
def test_rows_are_read_whatever_the_name_says(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in rows_in(tmp_path / name)] == ROWS


def test_a_name_that_says_something_else_is_reported(tmp_path):
    (tmp_path / "x.txt").write_bytes(LINES)
    [note] = [note for block in blocks(tmp_path / "x.txt") for note in block.notes]
    assert note.level == "note" and "is JSON lines by its content" in note.words
    (tmp_path / "x.ndjson").write_bytes(LINES)
    assert not [note for block in blocks(tmp_path / "x.ndjson") for note in block.notes]


@pytest.mark.parametrize("content", [b"hello\n", b"\0\1\2", b""])
def test_an_unknown_ending_without_rows_lists_the_endings(tmp_path, content):
    (tmp_path / "x.foo").write_bytes(content)
    with pytest.raises(UserError, match=r"must end in one of \.jsonl, \.json, .*\.xlsx, .*\.ndjson"):
        files.named(str(tmp_path / "x.foo"))


def test_a_web_page_may_be_a_document(tmp_path):
    (tmp_path / "x.txt").write_text("<html>a text about pages</html>")
    assert rows_in(tmp_path / "x.txt") == [(1, {"text": "<html>a text about pages</html>"})]
