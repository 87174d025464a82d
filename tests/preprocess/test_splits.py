"""Splits: what is meant for testing is not trained on, is named, and becomes held-out data with VALID_SPLIT."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.training import tokenize
from helpers.workbooks import workbook

from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.data.binidx import Reader
from rwkv_peft.preprocess import files
from rwkv_peft.preprocess.files import blocks
from rwkv_peft.preprocess.splits import chosen, split_of, split_of_file
from rwkv_peft.text.tokenizer import decode_bytes


def rows(*words: str) -> list[dict]:
    return [{"instruction": word, "output": word} for word in words]


def texts(prefix) -> list[str]:
    reader = Reader(prefix)
    return sorted(decode_bytes([int(t) for t in reader.row(i) if t]).decode().split()[1] for i in range(len(reader)))


def write(path: Path, what) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what))
    return path


def warnings(report) -> str:
    return "\n".join(words for level, _, words in report["notes"] if level == "warning")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Train", "train"), ("train_sft", "train"), ("training", "train"), ("train-00000-of-00002", "train"),
        ("test", "test"), ("test_sft", "test"), ("my-test", "test"), ("validation", "valid"), ("valid", "valid"),
        ("训练集", "train"), ("测试", "test"), ("验证集", "valid"), ("测试数据库的题", ""),
        ("val", "valid"), ("dev", "valid"), ("evaluation", "valid"), ("latest", ""), ("values", ""), ("contest", ""),
    ],
)  # fmt: skip
def test_splits_are_known_by_the_words_of_their_names(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("order", [("train", "test"), ("test", "train"), ("test", "train", "validation")])
@pytest.mark.parametrize("indent", [None, 1])
def test_lists_for_testing_are_passed_over_and_named(project_folder, order, indent):
    path = project_folder / "data" / "x.json"
    path.write_text(json.dumps({name: rows(name, name + "2") for name in order}, indent=indent))
    report = tokenize(path)
    assert texts(path.with_suffix("")) == ["train", "train2"] and report["rows"]["read"] == 2
    said = warnings(report)
    assert all(f'list "{name}" (2 rows) is not used' in said for name in order if name != "train")
    assert "VALID_SPLIT=test" in said


@pytest.mark.parametrize("shape", ["lists", "columns", "nested"])
@pytest.mark.parametrize("wanted", ["test", "Test", "testing"])
def test_valid_split_makes_held_out_data(project_folder, shape, wanted):
    content = {"test": rows("T", "U"), "train": rows("a", "b", "c"), "dev": rows("D")}
    if shape == "columns":
        content = {name: {key: [row[key] for row in some] for key in some[0]} for name, some in content.items()}
    path = write(project_folder / "data" / "x.json", {"data": content} if shape == "nested" else content)
    report = tokenize(path, VALID_SPLIT=wanted)
    assert texts(path.with_suffix("")) == ["a", "b", "c"] and texts(project_folder / "data" / "x.valid") == ["T", "U"]
    assert report["rows"]["held_out"] == 2 and '"dev" (1 row) is not used' in warnings(report)
    assert '"test"' not in warnings(report)


def test_valid_split_is_part_of_the_key(project_folder):
    path = write(project_folder / "data" / "x.json", {"train": rows("a"), "test": rows("T")})
    tokenize(path)
    assert not (project_folder / "data" / "x.valid.idx").exists()
    tokenize(path, VALID_SPLIT="test")
    assert (project_folder / "data" / "x.valid.idx").exists()
    tokenize(path)
    assert not (project_folder / "data" / "x.valid.idx").exists()


@pytest.mark.parametrize(
    ("content", "wanted", "words"),
    [
        ({"train": rows("a"), "test": rows("T")}, "dev", "VALID_SPLIT=dev names no part of it; there is test, train"),
        ({"train": rows("a"), "test": rows("T")}, "train", "would hold out all"),
        (rows("a"), "test", "names no part of it"),
        ({"test": rows("T")}, "test", "would hold out all rows"),
    ],
)
def test_a_split_that_is_not_there_is_refused_and_nothing_is_written(project_folder, content, wanted, words):
    path = write(project_folder / "data" / "x.json", content)
    with pytest.raises(UserError, match=words):
        tokenize(path, VALID_SPLIT=wanted)
    assert not list(path.parent.glob("*.idx"))


def test_valid_split_and_valid_percent_exclude_each_other(project_folder):
    path = write(project_folder / "data" / "x.json", {"train": rows("a"), "test": rows("T")})
    with pytest.raises(SettingErrors, match="VALID_SPLIT: must be empty with VALID_PERCENT=5"):
        tokenize(path, VALID_SPLIT="test", VALID_PERCENT="5")


def test_held_out_rows_that_are_trained_too_are_reported(project_folder):
    path = write(project_folder / "data" / "x.json", {"train": rows("a", "b"), "test": rows("b", "c")})
    assert "1 held-out row" in warnings(tokenize(path, VALID_SPLIT="test"))


def test_a_lone_list_is_read_whatever_its_name_and_reported(project_folder):
    path = write(project_folder / "data" / "x.json", {"validation": rows("a")})
    assert 'its only list is called "validation"' in warnings(tokenize(path))


def test_several_lists_without_a_known_name_are_read_and_named(project_folder):
    path = write(project_folder / "data" / "x.json", {"easy": rows("a"), "hard": rows("b", "c")})
    report = tokenize(path)
    assert report["rows"]["kept"] == 3 and '"easy" (1 row), "hard" (2 rows)' in warnings(report)


@pytest.mark.parametrize(
    ("names", "train", "others"),
    [
        (["train.json", "test.json"], ["train.json"], ["test.json"]),
        (["data/train-00000-of-00001.json", "data/test-00000-of-00001.json"], ["data/train-00000-of-00001.json"],
         ["data/test-00000-of-00001.json"]),
        (["train/0.json", "validation/0.json"], ["train/0.json"], ["validation/0.json"]),
        (["a.json", "test.json"], ["a.json"], ["test.json"]),
        (["train.json", "extra.json", "dev.json"], ["extra.json", "train.json"], ["dev.json"]),
        (["a.json", "b.json"], ["a.json", "b.json"], []),
        (["test.json", "valid.json"], ["test.json", "valid.json"], []),
    ],
)  # fmt: skip
def test_files_of_a_folder_for_testing_are_left_out_where_there_are_others(tmp_path, names, train, others):
    result = sorted(write(tmp_path / name, rows("a")) for name in names)
    used, kept, left, _ = chosen(result, tmp_path, "")
    assert [str(p.relative_to(tmp_path)) for p in used] == train and not kept
    assert [str(p.relative_to(tmp_path)) for p in left] == others


def test_a_folder_with_splits_is_tokenized_without_them_or_with_one_held_out(project_folder):
    folder = project_folder / "data" / "set"
    for split in ("train", "test", "validation"):
        write(folder / f"{split}-00000-of-00001.json", rows(split))
    write(folder / "dataset_info.json", {"splits": {}})
    report = tokenize(folder)
    assert texts(folder) == ["train"] and "test-00000-of-00001.json" in warnings(report)
    assert "data/set/dataset_info.json" in report["left_out_files"]
    report = tokenize(folder, VALID_SPLIT="valid")
    assert texts(folder) == ["train"] and texts(f"{folder}.valid") == ["validation"]
    assert "test-00000" in warnings(report) and "validation" not in warnings(report)
    with pytest.raises(UserError, match="VALID_SPLIT=nothing names no part of it"):
        tokenize(folder, VALID_SPLIT="nothing")


def test_a_folder_that_shares_a_word_with_a_split_is_no_split(tmp_path):
    root = tmp_path / "test data"
    path = write(root / "chats.json", rows("a"))
    assert split_of_file(path, root) == "" and files.chosen(root).train == [path]


def test_blocks_are_of_one_part_only(tmp_path):
    path = write(tmp_path / "x.json", {"train": rows("a"), "test": rows("T"), "train2": rows("b")})
    assert [(block.held_out, len(block.data)) for block in blocks(path, valid_split="test") if block.data] == [
        (False, 1),
        (True, 1),
        (False, 1),
    ]


def test_every_worker_count_holds_out_the_same(project_folder):
    path = write(project_folder / "data" / "x.json", {"train": rows(*"abcdef"), "test": rows("T", "U")})
    tokenize(path, VALID_SPLIT="test")
    one = (project_folder / "data" / "x.valid.bin").read_bytes()
    tokenize(path, VALID_SPLIT="test", WORKERS="2", OVERWRITE_CACHE="1")
    assert np.array_equal(one, (project_folder / "data" / "x.valid.bin").read_bytes())


def by_column(path: Path, splits, suffix: str) -> Path:
    """A file with a column called split; the word of each row is its split and its number."""
    result = [{"instruction": f"{s or 'none'}{i}", "output": "x", "split": s} for i, s in enumerate(splits)]
    path = path.with_suffix(suffix)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(result), path)
    elif suffix == ".csv":
        path.write_text("\n".join(["instruction,output,split", *(",".join(map(str, r.values())) for r in result)]))
    elif suffix == ".json":
        path.write_text(json.dumps(result))
    elif suffix == ".xlsx":
        cells = [list(result[0])] + [[*row.values()] for row in result]
        workbook(path, Sheet1=cells)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in result))
    return path


ENDINGS = [".jsonl", ".json", ".csv", ".parquet", ".xlsx"]


@pytest.mark.parametrize("suffix", ENDINGS)
@pytest.mark.parametrize("splits", [("train", "test", "x"), ("test", "dev", "train", "x"), ("Test", "train_sft", "x")])
def test_rows_for_testing_by_their_column_are_left_out_and_named(project_folder, suffix, splits):
    path = by_column(project_folder / "data" / "x", splits, suffix)
    report = tokenize(path)
    kept = sorted(f"{s}{i}" for i, s in enumerate(splits) if s in ("train", "train_sft", "x"))
    assert texts(path.with_suffix("")) == kept and report["rows"]["read"] == len(kept)
    said, others = warnings(report), [s for s in splits if s not in ("train", "train_sft", "x")]
    assert f"{len(others)} row{'s' * (len(others) > 1)} not used, because a column names their split: " in said
    assert all(f"{s} (1 row)" in said for s in others) and f"VALID_SPLIT={others[0]}" in said


@pytest.mark.parametrize("suffix", ENDINGS)
def test_valid_split_holds_out_rows_by_their_column(project_folder, suffix):
    path = by_column(project_folder / "data" / "x", ("train", "test", "train", "dev"), suffix)
    report = tokenize(path, VALID_SPLIT="test")
    assert texts(path.with_suffix("")) == ["train0", "train2"] and texts(f"{path.with_suffix('')}.valid") == ["test1"]
    assert "dev (1 row)" in warnings(report)


@pytest.mark.parametrize("suffix", ENDINGS)
def test_rows_that_are_all_for_testing_are_used_with_a_warning(project_folder, suffix):
    path = by_column(project_folder / "data" / "x", ("test", "test", "dev"), suffix)
    report = tokenize(path)
    assert texts(path.with_suffix("")) == ["dev2", "test0", "test1"]
    assert "read as training data, because no row is for training" in warnings(report)


@pytest.mark.parametrize("late", [0, 9000])
def test_a_row_for_training_may_come_long_after_those_for_testing(project_folder, late):
    path = by_column(project_folder / "data" / "x", ["test"] * late + ["train"], ".jsonl")
    assert tokenize(path)["rows"]["read"] == 1 and texts(path.with_suffix("")) == [f"train{late}"]


def test_a_column_with_other_words_or_texts_holds_no_split(project_folder):
    path = project_folder / "data" / "x.jsonl"
    long = "we test this sentence, which is a good deal longer than a name"
    path.write_text("".join(json.dumps({"instruction": f"q{i}", "output": "x", "split": s}) + "\n"
                            for i, s in enumerate(["a", 1, None, long])))  # fmt: skip
    report = tokenize(path)
    assert report["rows"]["read"] == 4 and "for training" not in warnings(report)


def test_messages_that_are_rows_of_their_own_have_their_split(project_folder):
    path = project_folder / "data" / "x.jsonl"
    result = [
        {"conversation_id": c, "role": role, "content": f"{s}", "split": s}
        for c, s in ((1, "train"), (2, "test"))
        for role in ("user", "assistant")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in result))
    report = tokenize(path)
    assert texts(path.with_suffix("")) == ["train"] and "test (1 row)" in warnings(report)


SHEET = [["instruction", "output"]]


@pytest.mark.parametrize("first", [True, False])
def test_sheets_for_testing_are_left_out_and_named(project_folder, first):
    path = project_folder / "data" / "x.xlsx"
    sheets = {"Train": [*SHEET, ["a", "x"], ["b", "x"]], "Test": [*SHEET, ["c", "x"]]}
    workbook(path, **(sheets if first else dict(reversed(sheets.items()))))
    report = tokenize(path)
    assert texts(path.with_suffix("")) == ["a", "b"]
    assert 'its sheet "Test" (1 row) is not used' in warnings(report) and "VALID_SPLIT=Test" in warnings(report)


def test_valid_split_names_a_sheet(project_folder):
    path = project_folder / "data" / "x.xlsx"
    workbook(path, Train=[*SHEET, ["a", "x"]], Test=[*SHEET, ["c", "x"]])
    tokenize(path, VALID_SPLIT="test")
    assert texts(path.with_suffix("")) == ["a"] and texts(f"{path.with_suffix('')}.valid") == ["c"]
    with pytest.raises(UserError, match="VALID_SPLIT=dev names no part of it; there is Test, Train"):
        tokenize(path, VALID_SPLIT="dev")


def test_sheets_that_are_all_for_testing_are_used_with_a_warning(project_folder):
    path = project_folder / "data" / "x.xlsx"
    workbook(path, Test=[*SHEET, ["a", "x"]])
    report = tokenize(path)
    assert texts(path.with_suffix("")) == ["a"] and "no sheet is for training by its name: Test" in warnings(report)


def test_sheets_with_the_same_columns_in_another_order_are_read_by_their_names(project_folder):
    path = project_folder / "data" / "x.xlsx"
    workbook(path, One=[*SHEET, ["a", "x"]], Two=[["output", "instruction"], ["x", "b"]])
    report = tokenize(path)
    assert texts(path.with_suffix("")) == ["a", "b"] and not warnings(report)


@pytest.mark.parametrize(
    "name", ["subset", "partition", "data_split", "Partition", "PARTITION", "SUBSET", "Data_Split"]
)
def test_other_columns_name_splits_where_they_hold_nothing_but_such_a_name(project_folder, name):
    path = project_folder / "data" / "x.jsonl"
    values = ["train", "test", "test_of_strength", "Test "]
    result = [{"instruction": f"q{i}", "output": "x", name: value} for i, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in result))
    report = tokenize(path)
    assert report["rows"]["read"] == 2
    assert "2 rows not used, because a column names their split: test" in warnings(report)
    assert not report["unused"]
