"""Files of every format are read as a stream, whatever is in them; what is no row is reported with its file and line."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.row_files import KINDS, ROWS, rows_in, write
from helpers.rows import ALPACA, CHAT

from rwkv_peft.common.errors import UserError
from rwkv_peft.preprocess import files, reader
from rwkv_peft.preprocess.files import blocks
from rwkv_peft.preprocess.pipeline import EncodeConfig, RowEncoder
from rwkv_peft.preprocess.schemas import RowError
from rwkv_peft.preprocess.truncate import Limits
from rwkv_peft.text.presets import PRESETS


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(tmp_path, kind):
    result = [{k: v or "" for k, v in row.items()} for _, row in rows_in(write(tmp_path, kind))]
    assert result == ROWS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_where_blocks_end_changes_nothing(tmp_path, monkeypatch, kind, size):
    path = write(tmp_path, kind)
    whole = rows_in(path)
    monkeypatch.setattr(reader, "BLOCK", size)
    monkeypatch.setattr(reader, "ROWS", 2)
    assert rows_in(path) == whole


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_conversations_may_stand_in_any_format(tmp_path, kind):
    row = {"messages": json.dumps(CHAT) if kind == ".csv" else CHAT}
    [block] = [b for b in blocks(write(tmp_path, kind, [row])) if b.data]
    made, expected = (
        RowEncoder(EncodeConfig(PRESETS["rwkv-world"])).block(b)
        for b in (block, reader.Block("x", 1, [(1, ALPACA)], 0))
    )
    assert made.ids.tolist() == expected.ids.tolist() and not made.rejects


def test_a_text_file_is_one_document_or_one_for_every_line_or_paragraph(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("\ufeffOne.\r\nTwo.\r\n\r\n  \r\n三。\n", encoding="utf-8", newline="")
    assert rows_in(path) == [(1, {"text": "One.\nTwo.\n\n  \n三。\n"})]
    assert rows_in(path, "line") == [(1, {"text": "One."}), (2, {"text": "Two."}), (5, {"text": "三。"})]
    assert rows_in(path, "paragraph") == [(1, {"text": "One.\nTwo."}), (5, {"text": "三。"})]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n{"text": "b"}\n', 3),
        ("x.json", b'[\n{"text": "a"},\n\n{"text" "b"},\n{"text": "c"}]', 4),
        ("x.json", b'[{"text": "a"},\n"b",\n{"text": "c"}]', 3),
        ("x.csv", b"text,other\na,b\nc\nd,e\n", 3),
        ("x.csv", b'text,other\n"a\nb",c\n"d"e,f\ng,h\n', 4),
        ("x.csv", b"text,other\na,b\n\xff,c\nd,e\n", 3),
        ("x.tsv", b'text\tother\n"a"\tb\n"c\td\n', 3),
    ],
)
def test_one_bad_row_is_reported_with_its_line_and_spoils_only_itself(tmp_path, name, content, place):
    path = tmp_path / name
    path.write_bytes(content)
    result = rows_in(path)
    [(line, error)] = [(n, row) for n, row in result if isinstance(row, RowError)]
    assert line == place and error.reason in ("not JSON", "not CSV", "not UTF-8", "wrong type")
    assert any(isinstance(row, dict) for _, row in result)


@pytest.mark.parametrize("quote", ['"bad,foo', '"bad', 'x,"y'])
def test_a_quote_that_is_never_closed_spoils_one_line_of_a_table(tmp_path, quote):
    good = [f'"row {i}, with a comma","answer {i}"' for i in range(300)]
    path = tmp_path / "x.csv"
    path.write_text("\n".join(["question,answer", *good[:100], quote, *good[100:]]) + "\n")
    result = rows_in(path)
    wrong = [(n, row) for n, row in result if isinstance(row, RowError)]
    rows = [row for _, row in result if isinstance(row, dict)]
    assert [n for n, _ in wrong] == [102] and wrong[0][1].reason == "not CSV"
    assert rows == [{"question": f"row {i}, with a comma", "answer": f"answer {i}"} for i in range(300)]
    assert [n for n, row in result if isinstance(row, dict)] == [*range(2, 102), *range(103, 303)]


def test_an_object_that_never_ends_stops_a_json_file_because_nothing_behind_it_can_be_reported_apart(tmp_path):
    for content in (b'[{"text": "a"},\n{"text": "b},\n{"text": "c"}]', b'[{"text": "a"},\n{"text": "b"'):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match="x.json:2: the object that begins here never ends"):
            rows_in(tmp_path / "x.json")


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"])
def test_a_file_that_was_cut_off_is_refused_with_its_reason(tmp_path, kind):
    many = [{"text": f"{i} {random.Random(i).random()}"} for i in range(5000)]
    path = write(tmp_path, kind, many)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="cannot be (unpacked|read as)"):
        rows_in(path)
    path.write_bytes(b"no such thing " * 100)
    with pytest.raises(UserError, match="cannot be (unpacked|read as)"):
        rows_in(path)


def test_a_damaged_arrow_file_is_refused_and_never_ends_the_process(tmp_path):
    whole = write(tmp_path, ".arrow stream", [{"messages": CHAT, "n": str(i)} for i in range(200)]).read_bytes()
    random_, paths = random.Random(3), []
    for i in range(40):
        broken = bytearray(whole)
        for _ in range(random_.randint(1, 6)):
            broken[random_.randrange(len(broken))] = random_.randrange(256)
        paths.append(tmp_path / f"{i}.arrow")
        paths[-1].write_bytes(broken)
    program = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\n"
        "from rwkv_peft.common.errors import UserError\nfrom rwkv_peft.preprocess.files import blocks\n"
        "for path in sys.argv[2:]:\n    try:\n        list(blocks(Path(path)))\n    except UserError:\n        print('refused')\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", program, root, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") > 10


@pytest.mark.parametrize("first", ["[1]", "[INFO] begun", '["a", "b"],', "a\0b"])
def test_a_first_line_that_is_no_row_costs_no_other(tmp_path, first):
    (tmp_path / "x.jsonl").write_text(first + '\n{"text": "a"}\n')
    assert len(rows_in(tmp_path / "x.jsonl")) == 2


def test_a_line_above_the_limit_is_rejected_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "LINE_LIMIT", 5000)
    monkeypatch.setattr(reader, "BLOCK", 1000)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' + "b" * 20000 + '\n{"text": "c"}\n')
    result = rows_in(path)
    assert [n for n, _ in result] == [1, 2, 3] and result[1][1].reason == "too long" and result[2][1] == {"text": "c"}
    with pytest.raises(UserError, match=r"x.json:2: what begins here is longer"):
        (tmp_path / "x.json").write_text('[{"text": "a"},\n{"text": "' + "b" * 20000 + '"}]')
        rows_in(tmp_path / "x.json")
    (tmp_path / "x.txt").write_text("short\n\n" + "long " * 3000 + "\n\nend")
    for mode, numbers in (("file", [1]), ("line", [1, 3, 5]), ("paragraph", [1, 3, 5])):
        result = rows_in(tmp_path / "x.txt", mode)
        assert [n for n, _ in result] == numbers and sum(isinstance(r, RowError) for _, r in result) == 1


def test_a_folder_is_read_sorted_and_mixed_and_what_cannot_be_read_is_reported(tmp_path):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.jsonl", "a.CSV", "sub/c.json.gz", ".hidden.jsonl", "x.rejects.jsonl", "x.report.json", "note.md"):
        (folder / name).write_bytes(b"")
    result, other = files.find(folder)
    assert [p.name for p in result] == ["a.CSV", "b.jsonl", "c.json.gz"] and [p.name for p in other] == ["note.md"]
    assert [files.format_of(p) for p in result] == [".csv", ".jsonl", ".json"]
    assert files.stem_of(folder / "my.data.jsonl.gz").name == "my.data"


def mutated(line: bytes, random: random.Random) -> bytes:
    """A row with something done to it that happens to data."""
    kind, at = random.randrange(9), random.randrange(len(line))
    if kind == 0:
        return line[:at]
    if kind == 1:
        return line[:at] + bytes([random.randrange(256)]) + line[at + 1 :]
    if kind == 2:
        return line[:at] + line[at + random.randrange(1, 9) :]
    if kind == 3:
        return (
            line[:at]
            + random.choice([b'"', b"{", b"]", b"\\", b"\x00", b"\xff", b"\\ud800", b"NaN", b"null"])
            + line[at:]
        )
    if kind == 4:
        row = json.loads(line)
        row[random.choice(list(row))] = random.choice([None, 7, [], {}, "", " ", [[]], [{}], True, [None], {"a": {}}])
        return json.dumps(row).encode()
    if kind == 5:
        row = json.loads(line)
        row.pop(random.choice(list(row)))
        return json.dumps(row).encode()
    if kind == 6:
        row = json.loads(line)
        for messages in (v for v in row.values() if isinstance(v, list) and v and isinstance(v[0], dict)):
            one = random.choice(messages)
            one[random.choice([*one, "weight", "tool_calls", "name"])] = random.choice(
                [None, 7, [], {}, "x", [{}], "tool", 0]
            )
        return json.dumps(row).encode()
    if kind == 7:
        return b"[" * random.randrange(1, 3000) + line
    return line * 2


@pytest.mark.slow
def test_ten_thousand_mutated_rows_end_in_no_traceback_and_every_rejection_names_file_and_line():
    random_ = random.Random(7)
    good = [json.dumps(row, ensure_ascii=False).encode() for row in (
        {"messages": CHAT}, ALPACA, {"text": "User: a\n\nAssistant: b"}, {"prompt": "p", "completion": "c"},
        {"tools": [{"name": "f"}], "conversations": [
            {"from": "human", "value": "x"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"}, {"from": "gpt", "value": "<think>\nso\n</think>\ny", "weight": 1}]},
    )]  # fmt: skip
    rows = [mutated(random_.choice(good), random_).replace(b"\n", b" ") for _ in range(10_000)]
    for limits, options in (
        (Limits(), {}),
        (Limits(max_tokens=20, policy="truncate"), {"expand": True}),
        (Limits(20, 9, 9, "truncate-left"), {"mask_history": True}),
    ):
        encoder = RowEncoder(EncodeConfig(PRESETS["rwkv-g1"], limits=limits, **options))
        some = rows if not options else rows[::4]
        for begin in range(0, len(some), 500):
            part = some[begin : begin + 500]
            made = encoder.block(reader.Block("x.jsonl", begin + 1, b"\n".join(part), 0))
            assert all(r.file == "x.jsonl" and begin < r.line <= begin + 500 and r.message for r in made.rejects)
            counts = made.counts
            gone = sum(n for what, n in counts.items() if what.startswith(("rejected", "dropped")))
            assert counts["read"] == sum(bool(line.strip()) for line in part) == counts["kept"] + gone
            assert len(made.rejects) == sum(n for what, n in counts.items() if what.startswith("rejected"))
