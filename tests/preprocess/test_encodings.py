"""Text files in any encoding are read rightly or refused with the candidates, never read wrongly; line ends of every kind.

bench/encodings.py measures the same on many more files.
"""

import codecs
import gzip
import io
import json
import os
import random
import threading

import numpy as np
import pytest
import zstandard
from helpers.kit import ROOT
from helpers.row_files import rows_in
from helpers.training import tokenize

from bench import encodings as bench
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.preprocess import encodings, reader
from rwkv_peft.preprocess.encodings import AsUtf8, Binary, Encoding, Unsure, decide
from rwkv_peft.preprocess.pipeline import EncodeConfig, RowEncoder
from rwkv_peft.preprocess.row_stream import RowStream
from rwkv_peft.preprocess.schemas import RowError
from rwkv_peft.text.presets import PRESETS

CHINESE = "你好，今天天气怎么样？我想去公园里走走。"
GERMAN = "Für größere Städte wären äußerst günstige Züge möglich, hätten wir genügend Schüler."


@pytest.fixture(autouse=True)
def forget():
    yield
    reader._settled.clear()


def read(data: bytes, result: Encoding) -> bytes:
    file = io.BufferedReader(io.BytesIO(data))
    file.read(result.skip)
    return AsUtf8(file, result).read()


PAIRS = [(language, codec) for language, (known, _) in bench.LANGUAGES.items() for codec in known]


@pytest.mark.smoke(10)
@pytest.mark.parametrize(("language", "codec"), PAIRS)
def test_no_file_is_ever_read_as_another_text(language, codec):
    for rows in (1, 3, 20):
        for form in bench.FORMS:
            text = bench.file_text(language, rows, form, random.Random(f"{rows} {form}"), codec)
            file = bench.File(codec, rows, text, text.encode(codec))
            assert bench.verdict(bench.ours, file) in ("right", "refused"), (rows, form)


@pytest.mark.parametrize(
    ("language", "codec"), [p for p in PAIRS if p[1] not in ("cp850", "iso8859_2", "mac_roman", "latin_1")]
)
def test_files_of_twenty_rows_are_read(language, codec):
    text = bench.file_text(language, 20, "csv", random.Random(5), codec)
    assert bench.verdict(bench.ours, bench.File(codec, 20, text, text.encode(codec))) == "right"


@pytest.mark.parametrize("codec", bench.WIDE)
@pytest.mark.parametrize(
    "text", ['{"text": "Hi"}\n', f'{{"text": "{CHINESE}"}}\n', f"{CHINESE}\n{CHINESE}\n", "a,b\n1,ü\n"]
)
def test_utf_16_and_utf_32_are_read_with_and_without_a_mark(text, codec):
    data = bench.as_encoded(text, codec)
    assert read(data, decide(io.BytesIO(data))).decode() == text


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.txt", "x.jsonl.gz", "x.csv.zst"])
@pytest.mark.parametrize(("codec", "text"), [("gbk", CHINESE), ("utf-16", CHINESE), ("cp1252", GERMAN)])
def test_every_format_of_text_is_decoded_packed_ones_too(tmp_path, name, codec, text):
    text = text.replace(",", "")  # no cell of a table ends in it
    whole = f"{text}\n" if ".txt" in name else json.dumps({"text": text}, ensure_ascii=False) + "\n"
    if ".csv" in name or ".tsv" in name:
        whole = f"text\n{text}\n"
    data = whole.encode(codec)
    data = gzip.compress(data) if name.endswith(".gz") else zstandard.compress(data) if name.endswith(".zst") else data
    (tmp_path / name).write_bytes(data)
    [(_, row)] = rows_in(tmp_path / name)
    assert row["text"].strip() == text


def test_a_table_of_chinese_excel_loads_whole_when_its_first_rows_are_ascii(tmp_path):
    rows = [f"question {i},answer {i}" for i in range(30_000)] + [f"问题{i}怎么样,这是第{i}个回答" for i in range(9)]
    (tmp_path / "x.csv").write_bytes("\r\n".join(["question,answer", *rows, ""]).encode("gbk"))
    result = rows_in(tmp_path / "x.csv")
    assert len(result) == len(rows) and result[-1][1] == {"question": "问题8怎么样", "answer": "这是第8个回答"}


@pytest.mark.parametrize("language", ["chinese", "german", "russian", "korean"])
def test_damaged_utf_8_stays_utf_8_and_only_broken_rows_are_rejected(tmp_path, language):
    data = bench.damaged(bench.file_text(language, 40, "jsonl", random.Random(2)), random.Random(3))
    (tmp_path / "x.jsonl").write_bytes(data)
    result = rows_in(tmp_path / "x.jsonl")
    broken = [i for i, line in enumerate(data.splitlines(), 1) if "\ufffd" in line.decode("utf-8", "replace")]
    assert broken and [n for n, row in result if isinstance(row, RowError)] == broken and len(result) == 40


def test_lines_of_another_encoding_in_a_utf_8_file_are_rejected_with_their_numbers(tmp_path):
    good, other = (json.dumps({"text": CHINESE}, ensure_ascii=False) + "\n").encode(), f'{{"text": "{CHINESE}"}}\n'
    (tmp_path / "x.jsonl").write_bytes(good * 5 + other.encode("gbk") + good * 5)
    wrong = [(n, row) for n, row in rows_in(tmp_path / "x.jsonl") if isinstance(row, RowError)]
    assert [n for n, _ in wrong] == [6] and "is not valid UTF-8, the encoding of the file" in wrong[0][1].message


def test_lines_in_utf_8_of_a_file_in_another_encoding_are_rejected_and_never_made_garbage(tmp_path):
    line = f'{{"text": "{CHINESE}"}}\n'
    (tmp_path / "x.jsonl").write_bytes(line.encode("gbk") * 20 + line.encode() + line.encode("gbk"))
    result = rows_in(tmp_path / "x.jsonl")
    assert [n for n, row in result if isinstance(row, RowError)] == [21]
    assert "is UTF-8, but the file was read as GB18030" in result[20][1].message
    assert all(row == {"text": CHINESE} for n, row in result if n != 21)


def test_two_encodings_of_one_byte_a_character_in_one_file_are_refused():
    data = (f"{GERMAN}\n".encode("cp1252") * 5) + "größer\n".encode()
    assert isinstance(decide(io.BytesIO(data)), Unsure)


def test_what_does_not_decode_later_is_a_rejected_row(tmp_path):
    line = f'{{"text": "{CHINESE}"}}\n'.encode("gbk")
    (tmp_path / "x.jsonl").write_bytes(line * 30 + line[:12] + b"\xff" + line[12:] + line)
    result = rows_in(tmp_path / "x.jsonl")
    [(number, error)] = [(n, row) for n, row in result if isinstance(row, RowError)]
    assert number == 31 and error.message.startswith("holds bytes that are not GB18030") and len(result) == 32


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("codec", ["gb18030", "utf-16", "utf-32-be", "cp1252", "utf-8", "iso2022_jp"])
def test_where_reads_end_changes_nothing(codec, size):
    class Slow(io.BytesIO):
        def read1(self, _=-1):
            return self.read(size)

    text = {"cp1252": GERMAN, "iso2022_jp": "これは日本語です。"}.get(codec, CHINESE)
    data = f"{text}\r\n{text}\r\r\n\n{text}\r".encode(codec)
    result = encodings.of_name(codec, data[:4])
    file = Slow(data)
    file.seek(result.skip)
    assert io.BufferedReader(AsUtf8(file, result)).read().decode() == f"{text}\n{text}\n\n{text}\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (random.Random(1).randbytes(5000), "holds bytes that no text has"),
        (b"PK\x03\x04" + bytes(50), "is a zip archive that was cut off or damaged"),
        (b"%PDF-1.7\n\xe2\xe3\xcf\xd3\n", "is a PDF"),
        (b"abc\0def\xff\0\0\1\2\3", "holds bytes that no text has"),
    ],
)
def test_binary_files_are_refused(tmp_path, data, words):
    (tmp_path / "x.csv").write_bytes(data)
    assert isinstance(decide(io.BytesIO(data)), Binary)
    with pytest.raises(UserError, match=words):
        rows_in(tmp_path / "x.csv")


def test_an_unsure_file_is_refused_with_the_candidates_as_they_would_read(tmp_path):
    (tmp_path / "x.txt").write_bytes("Le café".encode("cp1252"))
    with pytest.raises(UserError) as caught:
        rows_in(tmp_path / "x.txt")
    assert "--encoding cp1252" in str(caught.value) and "Le café" in str(caught.value)
    assert "--encoding utf-8" in str(caught.value)


def test_all_unsure_files_of_a_folder_are_named_together(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes("Le café".encode("cp1252" if i else "utf-8"))
    with pytest.raises(UserError) as caught:
        reader.settle(paths)
    assert "1.txt" in str(caught.value) and "2.txt" in str(caught.value) and "0.txt" not in str(caught.value)


@pytest.mark.parametrize("name", ["cp1252", "CP1252", "windows-1252", "latin-1"])
def test_a_named_encoding_is_taken_without_looking(tmp_path, name):
    (tmp_path / "x.txt").write_bytes("Le café".encode("cp1252"))
    assert reader.settle([tmp_path / "x.txt"], name)
    assert rows_in(tmp_path / "x.txt") == [(1, {"text": "Le café"})]


def test_rows_that_the_named_encoding_does_not_have_are_rejected(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    reader.settle([tmp_path / "x.jsonl"], "gb18030")
    [(_, good), (number, error)] = rows_in(tmp_path / "x.jsonl")
    assert good == {"text": "a"} and number == 2 and "not GB18030" in error.message
    reader.settle([tmp_path / "x.jsonl"], "utf-8")
    assert "not valid UTF-8" in rows_in(tmp_path / "x.jsonl")[1][1].message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cp12522", "did you mean cp1252"),
        ("ansi", "ANSI is cp1252"),
        ("base64", "is not an encoding of text"),
        ("", "is no"),
    ],
)
def test_an_unknown_name_is_refused_with_suggestions(name, words):
    assert words in encodings.check(name)


@pytest.mark.parametrize("name", [*encodings.NAMES, "UTF8", "GBK", "Shift-JIS"])
def test_every_name_that_is_suggested_is_one(name):
    assert not encodings.check(name) and encodings.of_name(name, b"")


def test_the_setting_is_checked_and_decides_the_cache(project_folder, capsys):
    with pytest.raises(SettingErrors, match="ENCODING: is no encoding"):
        tokenize(project_folder / "data" / "x.jsonl", ENCODING="no-such")
    path = project_folder / "data" / "x.jsonl"
    path.write_bytes('{"text": "Le café crème"}\n'.encode("cp1252"))
    first = tokenize(path, ENCODING="cp1252")
    assert "note      data/x.jsonl is cp1252; it was read as such" in capsys.readouterr().out
    assert tokenize(path, ENCODING="cp1252") == first and "unchanged" in capsys.readouterr().out
    assert tokenize(path, ENCODING="mac_roman")["key"] != first["key"]


def test_a_stream_reads_and_names_the_encoding(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(f'{{"text": "{CHINESE}"}}\n'.encode("gbk"))
    said = []
    recipe = EncodeConfig(PRESETS["rwkv-world"])
    stream = RowStream([tmp_path / "x.jsonl"], recipe, "file", 0, 1, said.append)
    expected = RowEncoder(recipe).block(reader.Block("", 1, [(1, {"text": CHINESE})], 0))
    assert np.array_equal(next(stream.documents()).ids, expected.ids)
    assert any("x.jsonl is GB18030; it was read as such" in line for line in said)


@pytest.mark.parametrize("codec", ["gbk", "utf-16", "utf-8"])
def test_a_pipe_is_decoded_by_what_comes_first(tmp_path, codec):
    os.mkfifo(tmp_path / "x.jsonl")
    data = (json.dumps({"text": CHINESE}, ensure_ascii=False) + "\n").encode(codec)
    writer = threading.Thread(target=(tmp_path / "x.jsonl").write_bytes, args=(data,))
    writer.start()
    assert rows_in(tmp_path / "x.jsonl") == [(1, {"text": CHINESE})]
    writer.join()


def test_utf_8_passes_through_untouched_and_the_look_ends_early():
    class Counting(io.BytesIO):
        asked = 0

        def read(self, size=-1):
            Counting.asked += 1
            return super().read(size)

    assert decide(Counting((CHINESE + "\n").encode() * 100_000)) == Encoding() and Counting.asked <= 2
    assert decide(io.BytesIO(codecs.BOM_UTF8 + b"a")) == Encoding("", 3)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n", "\r\r\n"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt", "x.json"])
def test_every_line_end_gives_the_same_rows_and_numbers(tmp_path, name, end):
    lines = {
        "x.jsonl": ['{"text": "a"}', "", '{"text": ', '{"text": "b"}'],
        "x.csv": ["text,n", "a,1", "b", '"b\nc",2', "d,3"],
        "x.txt": ["a", "", "b", "c"],
        "x.json": ["[", '{"text": "a"},', '{"text" "b"},', '{"text": "c"}', "]"],
    }[name]

    def rows(text: str):
        (tmp_path / name).write_bytes(text.encode())
        reader._settled.clear()
        return [(n, row if isinstance(row, dict) else str(row)) for n, row in rows_in(tmp_path / name, "line")]

    assert rows("\n".join(lines).replace("\n", end) + end) == rows("\n".join(lines) + "\n")


@pytest.mark.parametrize("mode", ["file", "line", "paragraph"])
@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_other_separators_do_not_end_lines(tmp_path, mode, mark):
    (tmp_path / "x.txt").write_text(f"one{mark}two", encoding="utf-8")
    (tmp_path / "x.csv").write_text(f"text,n\none{mark}two,1\n", encoding="utf-8")
    (tmp_path / "x.jsonl").write_text(f'{{"text": "one{mark}two"}}\n', encoding="utf-8")
    assert rows_in(tmp_path / "x.txt", mode) == [(1, {"text": f"one{mark}two"})]
    assert rows_in(tmp_path / "x.csv") == [(2, {"text": f"one{mark}two", "n": "1"})]
    if mark > "\x7f":  # JSON does not allow the others as they are
        assert rows_in(tmp_path / "x.jsonl") == [(1, {"text": f"one{mark}two"})]


ROWS = [
    {"text": "User: a@@Assistant: b"},
    {"text": "Über@@uns"},
    {"instruction": "a@@b", "input": "c@@d", "output": "e@@f"},
    {"messages": [{"role": "system", "content": "s@@s"}, {"role": "user", "content": "a@@b"},
                  {"role": "assistant", "content": "<think>t@@t</think>c@@d"}]},
]  # fmt: skip


@pytest.mark.parametrize("preset", ["rwkv-world", "rwkv-g1", "chatml", "empty", "alpaca"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("end", ["\r\n\r\n", "\r\r", "\n\r\n"])
def test_line_ends_inside_texts_become_one_kind_on_every_path(preset, row, end):
    def ids(blank: str):
        text = json.dumps(row, ensure_ascii=False).replace("@@", json.dumps(blank)[1:-1])
        made = RowEncoder(EncodeConfig(PRESETS[preset])).block(reader.Block("x", 1, text.encode(), 0))
        assert not made.rejects
        return made.ids.tolist()

    assert ids(end) == ids("\n\n")


@pytest.mark.parametrize("row", [{"text": "a\0b"}, {"instruction": "q", "output": "a\0"}, {"messages": [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "\0b"}]}])  # fmt: skip
def test_a_row_with_nul_characters_is_rejected(row):
    good = {"text": "good"}
    made = RowEncoder(EncodeConfig(PRESETS["rwkv-world"])).block(
        reader.Block("x", 1, [(1, good), (2, row), (3, good)], 0)
    )
    assert [(r.line, r.reason) for r in made.rejects] == [(2, "not text")] and len(made.sizes) == 2
    assert "NUL (\\u0000)" in made.rejects[0].message


def test_the_script_and_its_documents_name_the_setting():
    assert "\nENCODING=auto\n" in (ROOT / "make_tokenize.sh").read_text(encoding="utf-8")
    for name in ("data.md", "data_zh.md"):
        assert "`ENCODING`" in (ROOT / "docs" / name).read_text(encoding="utf-8")
