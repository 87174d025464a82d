"""make_tokenize.sh from file to file: the same bytes on any number of workers and the second time for nothing, numbers that
add up, rows that are held out for good, and pictures and previews that show what was made."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny
from helpers.kit import ROOT
from helpers.row_files import KINDS, TEXTS, many, write
from helpers.rows import CHAT, SAME
from helpers.training import tokenize

import rwkv_peft.preprocess.tokenize as door
from rwkv_peft.data.binidx import Reader
from rwkv_peft.preprocess import reader as reading
from rwkv_peft.preprocess import worker_pool
from rwkv_peft.text import tokenizer

ENDINGS = (".bin", ".idx", ".roles.bin", ".roles.idx")


def contents(prefix) -> dict[str, str]:
    return {e: hashlib.sha256((prefix.parent / (prefix.name + e)).read_bytes()).hexdigest() for e in ENDINGS}


def rows_of(prefix) -> list[list[int]]:
    reader = Reader(prefix)
    return [reader.row(i).tolist() for i in range(len(reader))]


@pytest.fixture
def data(project_folder):
    return project_folder / "data"


def test_what_is_wrong_with_many_rows_is_said_once_and_that_many_are_missing(data, capsys):
    good, bad = '{"text": "User: 早上好\\n\\nAssistant: b"}\n'.encode(), '{"text": "你好"}\n'.encode("gb18030")
    (data / "x.jsonl").write_bytes((good + bad) * 4)
    tokenize(data / "x.jsonl")
    said = capsys.readouterr().out
    assert said.count("is not valid UTF-8") == 1 and "data/x.jsonl:2: is not" in said and "(and lines 4, 6, 8)" in said
    assert "warning   50% of all rows are missing from what follows" in said


def test_a_folder_of_every_format_gives_the_rows_of_each(data):
    folder = data / "all"
    folder.mkdir()
    paths = {write(folder, kind) for kind in KINDS}
    (folder / "y.txt").write_text(TEXTS[0]["text"])
    made = tokenize(folder)
    alone = tokenize(write(data, ".jsonl"))
    assert made["rows"]["kept"] == len(paths) * alone["rows"]["kept"] + 1 and not made["rows"]["rejected"]
    rows = rows_of(data / "all")
    for row in rows_of(data / "x"):
        assert rows.count(row) == len(paths)
    assert tokenizer.encode(TEXTS[0]["text"]) + [0] in rows


@pytest.mark.smoke(1)
@pytest.mark.parametrize("number", ["3", "1", "2"])
def test_any_number_of_workers_writes_the_same_bytes(data, monkeypatch, number):
    monkeypatch.setattr(reading, "BLOCK", 2000)
    rows = [*many(200), {"oops": 1}, {"text": "User: a\nAssistant: b"}]
    made = tokenize(tiny.write_jsonl(data / "x.jsonl", rows), 2, WORKERS=number)
    expected = tokenize(tiny.write_jsonl(data / "y.jsonl", rows), 2)
    assert contents(data / "x") == contents(data / "y")
    for part in ("rows", "tokens", "lengths", "scripts", "content"):
        assert made[part] == expected[part]
    assert (data / "x.rejects.jsonl").read_text().replace("x.jsonl", "y.jsonl") == (
        data / "y.rejects.jsonl"
    ).read_text()


def test_auto_takes_every_core_where_there_is_work_for_it():
    assert worker_pool.number_of_workers("auto", 1000) == 1
    assert worker_pool.number_of_workers("auto", 1 << 40) == len(os.sched_getaffinity(0))
    assert worker_pool.number_of_workers(3, 1000) == 3


def test_the_files_are_what_the_format_description_gives_for_the_same_tokens(data):
    tokenize(tiny.write_jsonl(data / "x.jsonl", many(5)))
    rows = rows_of(data / "x")
    sizes = [len(row) for row in rows]
    offsets = [2 * sum(sizes[:i]) for i in range(len(rows))]
    index = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08" + len(rows).to_bytes(8, "little")
    index += (len(rows) + 1).to_bytes(8, "little") + b"".join(n.to_bytes(4, "little") for n in sizes)
    index += b"".join(n.to_bytes(8, "little") for n in [*offsets, *range(len(rows) + 1)])
    assert (data / "x.idx").read_bytes() == index
    assert (data / "x.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for row in rows for i in row)
    expected = sorted(
        tokenizer.encode(f"User: Row {i}?\n\nAssistant: " + f"{i}。" * (i % 7 + 1)) + [0] for i in range(5)
    )
    assert sorted(rows) == expected


def test_repeats_hold_every_row_once_each_and_encode_nothing_again(data, monkeypatch):
    calls = []
    original = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: calls.append(1) or original(text))
    tokenize(tiny.write_jsonl(data / "x.jsonl", many(7)), 10)
    rows = rows_of(data / "x")
    assert len(calls) == 1 and len(rows) == 70
    for begin in range(0, 70, 7):  # no row comes again before all have come
        assert sorted(rows[begin : begin + 7]) == sorted(rows[:7])


def counted(monkeypatch) -> list:
    calls = []
    original = door.encoded_blocks
    monkeypatch.setattr(door, "encoded_blocks", lambda *a: calls.append(1) or original(*a))
    return calls


def test_the_same_call_twice_encodes_once_and_says_the_same(data, monkeypatch, capsys):
    calls = counted(monkeypatch)
    path = tiny.write_jsonl(data / "x.jsonl", many(5))
    first = tokenize(path)
    said, before = capsys.readouterr().out, contents(data / "x")
    assert tokenize(path) == first and contents(data / "x") == before and len(calls) == 1
    again = capsys.readouterr().out
    assert again.startswith("unchanged data/x: made from the same data with the same settings; nothing to encode\n")
    assert again.partition("\n")[2] == said.replace("\nwrote     ", "\nthere is  ")


def test_tokens_of_another_file_are_not_replaced_in_silence(data, capsys):
    tokenize(write(data, ".jsonl"))
    assert "replaced" not in capsys.readouterr().out
    tokenize(write(data, ".csv"))
    assert "replaced  data/x.bin/.idx, which had been made from data/x.jsonl\n" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["content", "setting", "vocabulary", "template", "code", "result", "epochs", "forced"])
def test_whatever_changes_makes_it_encode_again(data, monkeypatch, tmp_path, what):
    template = tmp_path / "t.json"
    template.write_text('{"format_user": "Q {{content}}", "format_assistant": "A {{content}}"}')
    path = tiny.write_jsonl(data / "x.jsonl", many(5))
    tokenize(path, PROMPT_TYPE=str(template))
    calls = counted(monkeypatch)
    options, epochs = {"PROMPT_TYPE": str(template)}, 1
    if what == "content":
        path.write_bytes(path.read_bytes().replace(b"Row 3", b"Row 4"))
    elif what == "setting":
        options["EOT"] = "both"
    elif what == "vocabulary":
        other = tmp_path / "vocabulary.txt"
        other.write_bytes(tokenizer.vocabulary_file().read_bytes() + b"\n")
        monkeypatch.setattr(tokenizer, "vocabulary_file", lambda: other)
    elif what == "template":
        template.write_text(template.read_text().replace("Q ", "Question "))
    elif what == "code":
        monkeypatch.setattr("rwkv_peft.preprocess.cache.CODE", ("data",))
    elif what == "result":
        content = bytearray((data / "x.bin").read_bytes())
        content[3] ^= 1
        (data / "x.bin").write_bytes(content)
    elif what == "epochs":
        epochs = 2
    else:
        options["OVERWRITE_CACHE"] = "1"
    tokenize(path, epochs, **options)
    assert calls == [1]


def test_the_numbers_of_the_report_add_up_to_the_rows_that_were_read(data):
    rows = [*many(30), {"x": 1}, {"text": ""}, {"messages": CHAT[:1]}, {"messages": [{**m, "weight": 0} for m in CHAT]}]
    path = tiny.write_jsonl(data / "x.jsonl", rows)
    path.write_bytes(path.read_bytes() + b"\n\n{broken\n")
    for options in (
        {},
        {"MAX_TOKENS": "14"},
        {"MAX_TOKENS": "14", "OVERLONG": "split"},
        {"TARGET_LENGTH": "5"},
        {"EXPAND": "1"},
    ):
        made = tokenize(path, 3, **options)["rows"]
        gone = sum(made["rejected"].values()) + sum(made["dropped"].values())
        assert made["read"] == 35 == made["kept"] + gone
        assert made["written"] == 3 * made["made"] == len(Reader(data / "x"))
        assert made["rejected"] == {"empty": 1, "no answer": 1, "not JSON": 1, "unknown columns": 1}


def test_strict_stops_at_the_first_bad_row_even_if_the_cache_has_the_rest(data):
    path = tiny.write_jsonl(data / "x.jsonl", [*many(3), {"oops": 1}, {"oops": 2}])
    tokenize(path)
    before = contents(data / "x")
    with pytest.raises(door.UserError, match=r"data/x.jsonl:4: has none of the keys.*\nSTRICT=1 stops at the first"):
        tokenize(path, STRICT="1")
    assert contents(data / "x") == before


def test_rejects_of_an_earlier_call_do_not_stay(data):
    path = tiny.write_jsonl(data / "x.jsonl", [*many(3), {"oops": 1}])
    tokenize(path)
    assert (data / "x.rejects.jsonl").exists()
    tokenize(tiny.write_jsonl(path, many(3)))
    assert not (data / "x.rejects.jsonl").exists()


@pytest.mark.parametrize("percent", [1, 20, 50])
def test_held_out_rows_are_never_trained_on_whatever_the_repeats(data, percent):
    rows = [row for row in many(40) for _ in range(2)]  # every row is there twice
    made = tokenize(tiny.write_jsonl(data / "x.jsonl", rows), 3, VALID_PERCENT=str(percent))
    train, valid = ({tuple(r) for r in rows_of(data / name)} for name in ("x", "x.valid"))
    assert not train & valid and len(train | valid) == 40
    assert len(valid) == max(1, round(40 * percent / 100)) and made["rows"]["held_out"] == 2 * len(valid)
    assert len(Reader(data / "x")) == 3 * (80 - 2 * len(valid)) == made["rows"]["written"]
    assert np.array_equal(Reader(data / "x.valid").sizes, Reader(data / "x.valid.roles").sizes)
    tokenize(data / "x.jsonl", 3, VALID_PERCENT=str(percent), OVERWRITE_CACHE="1", SEED="43")
    assert {tuple(r) for r in rows_of(data / "x.valid")} != valid  # the seed decides
    tokenize(data / "x.jsonl")
    assert not list(data.glob("x.valid.*"))  # what would now be trained on must not be called held out


@pytest.mark.parametrize("options", [{"EXPAND": "1"}, {"MAX_TOKENS": "12", "OVERLONG": "split"}])
def test_all_that_is_made_of_a_row_is_held_out_with_it(data, options):
    def chat(i):
        return {
            "messages": [{"role": r, "content": f"{w} {i} " * 3} for w in ("one", "two") for r in ("user", "assistant")]
        }

    tokenize(tiny.write_jsonl(data / "x.jsonl", [chat(i) for i in range(100, 130)]), VALID_PERCENT="20", **options)
    parts = {name: " ".join(tokenizer.decode(row) for row in rows_of(data / name)) for name in ("x", "x.valid")}
    numbers = {name: {i for i in range(100, 130) if str(i) in text} for name, text in parts.items()}
    assert len(numbers["x.valid"]) == 6 and not numbers["x"] & numbers["x.valid"]


def test_a_prefix_of_many_rows_is_copied_from_the_disk_as_from_memory(data, monkeypatch):
    path = tiny.write_jsonl(data / "x.jsonl", many(50))
    tokenize(path, 2)
    expected = contents(data / "x")
    monkeypatch.setattr(door, "IN_MEMORY", 100)
    monkeypatch.setattr(door, "ROWS", 7)
    tokenize(path, 2, OVERWRITE_CACHE="1")
    assert contents(data / "x") == expected


@pytest.mark.pictures
def test_the_report_reports_duplicates_turns_scripts_lengths_and_filling(data):
    rows = [*many(20), *many(5), SAME["messages"], {"text": "System: s\n\nUser: u\n\nAssistant: a"}]
    made = tokenize(tiny.write_jsonl(data / "x.jsonl", rows))
    assert made["content"] == {"turns": 28, "system": 1, "duplicates": 5}
    assert set(made["scripts"]) >= {"Latin", "digits"} and sum(made["scripts"].values()) == pytest.approx(1, abs=1e-3)
    sizes = Reader(data / "x").sizes
    assert (made["lengths"]["longest"], made["lengths"]["median"]) == (sizes.max(), round(float(np.median(sizes))))
    assert sum(made["lengths"]["histogram"]["rows"]) == len(sizes) == made["rows"]["made"]
    assert made["filling"]["only"] == 0 < made["filling"]["pad (MICRO_BSZ=4)"] < 1
    assert json.loads((data / "x.report.json").read_text()) == made
    assert (data / "x.lengths.png").read_bytes().startswith(b"\x89PNG")


def test_mojibake_is_reported_with_its_lines(data, capsys):
    good = "Ça coûte 25 € à l'hôtel, déjà payé."
    bad, lossy = good.encode().decode("latin-1"), good.encode().decode("cp1252", "ignore") + "Ã©tÃ© dÃ©jÃ\ufffd"
    made = tokenize(tiny.write_jsonl(data / "x.jsonl", [{"text": t} for t in (good, bad, lossy)]))
    said = capsys.readouterr().out
    assert made["mojibake"] == {"repaired": 1, "lossy": 1}
    assert "repaired  1 row of mojibake" in said and "saved again): line 2\n" in said
    assert "warning   1 row of mojibake that cannot be undone, taken as they are: line 3\n" in said
    assert sorted(map(len, rows_of(data / "x")))[0] == len(tokenizer.encode(good)) + 1
    assert made["content"]["duplicates"] == 1


def run(root, *arguments, ok=True):
    done = subprocess.run([sys.executable, "-m", "json2binidx", *arguments], capture_output=True, text=True, cwd=root)
    assert (done.returncode == 0) == ok and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_it_works_alone_as_a_module_with_the_values_of_the_script(tmp_path):
    path = tiny.write_jsonl(tmp_path / "my data.jsonl", tiny.CHATS)
    assert "usage: ./make_tokenize.sh FILE" in run(ROOT, "--help")
    assert "8 rows" in run(ROOT, str(path), "2", "--prompt-type=rwkv-g1", "--eot", "both")
    report = json.loads((tmp_path / "my data.report.json").read_text())
    settings = report["settings"]
    assert (settings["EPOCHS"], settings["PROMPT_TYPE"], settings["EOT"], settings["SEED"]) == (
        2,
        "rwkv-g1",
        "both",
        42,
    )


def test_a_preview_shows_tokens_and_what_is_learnt_and_writes_nothing(tmp_path):
    path = tiny.write_jsonl(
        tmp_path / "x.jsonl", [tiny.CHATS[0], {"oops": "\x1b[31m"}, tiny.CHATS[1], {"text": "\x1b[31mred"}]
    )
    said = run(ROOT, str(path), "--preview", "3")
    assert (
        "x.jsonl:1: 19 tokens, 9 of them learnt\nUser|:| What| is| red|?|\\n\\n|Ass|istant|:|[[ A| colour|,| like|"
        in said
    )
    assert "<end>]]\n" in said and "x.jsonl:2: cannot be used: has none of the keys" in said
    assert "\x1b" not in said and "\\x1b" in said  # text cannot steer the terminal
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_colours_are_for_terminals_only(monkeypatch, capsys, data):
    from rwkv_peft.cli import preview

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    ids = np.array([*tokenizer.encode("a b"), 0], np.uint16)
    preview.show("x", 1, ids, np.array([3, 4, 4], np.uint8), preview.COLOURS)
    assert "a\033[2m|\033[22m\033[32m b\033[2m|\033[22m<end>\033[0m" in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "said"), [({}, True), ({"VALID_PERCENT": "20"}, False)])
def test_held_out_rows_of_an_earlier_call_do_not_vanish_in_silence(data, capsys, changes, said):
    path = tiny.write_jsonl(data / "x.jsonl", many(40))
    tokenize(path, VALID_PERCENT="10")
    assert "removed" not in capsys.readouterr().out
    tokenize(path, **changes)
    assert ("removed   data/x.valid.bin/.idx, the held-out rows of an earlier call" in capsys.readouterr().out) == said


@pytest.mark.parametrize("rows", [1, 2, 300, 3000])
@pytest.mark.parametrize(
    ("words", "script"),
    [
        ("你好吗", "Chinese characters"),
        ("Как дела", "Cyrillic"),
        ("안녕하세요", "Korean"),
        ("こんにちは", "Japanese kana"),
    ],
)
def test_data_of_any_size_are_reported_in_their_script_without_the_layout(data, rows, words, script):
    made = tokenize(tiny.write_jsonl(data / "x.jsonl", [{"prompt": words, "response": words}] * rows))
    assert made["scripts"] == {script: 1.0}
