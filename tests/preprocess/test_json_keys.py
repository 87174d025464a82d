"""preprocess/json_keys.py against the parser."""

import json
import random

import pytest

from rwkv_peft.preprocess import json_keys, split_column
from rwkv_peft.preprocess.pipeline import keys_of
from rwkv_peft.preprocess.reader import Block

TEXTS = ("a", '"', '":', '\\":', "\\", "\\\\", "：", '"：', " :", "：:", "}", "b: c", '{"k": 1}', "")


def row(rng: random.Random) -> bytes:
    words = ["".join(rng.choices(TEXTS, k=rng.randint(0, 4))) for _ in range(8)]
    value = {"messages": [{"role": words[0], words[1]: words[2]}, {"role": 1}], "x": words[3], words[4]: [words[5]]}
    return json.dumps(
        value, ensure_ascii=rng.random() < 0.3, separators=rng.choice([(",", ":"), (", ", " : ")])
    ).encode()


def test_a_key_that_is_there_twice_is_never_overlooked():
    rng = random.Random(5)
    rows = [row(rng) for _ in range(2000)]
    twice = [line.replace(b'{"messages"', b'{"messages" :1, "messages"', 1) for line in rows]
    for line, once, again in zip(rows, json_keys.counts(rows), json_keys.counts(twice), strict=True):
        read = keys_of(json.loads(line))
        assert once == -1 or once >= read, line
        assert again == -1 or again > read, line


def test_most_rows_need_no_second_look():
    rows = [b'{"messages":[{"role":"user","content":"say \\"x\\": 1"},{"role":"a","content":"\xef\xbc\x9a"}]}'] * 3
    assert json_keys.counts(rows) == [5, 5, 5] and keys_of(json.loads(rows[0])) == 5
    assert json_keys.counts([]) == [] and json_keys.counts([b"", b"x", b":"]) == [0, 0, 0]


@pytest.mark.parametrize("between", [b":", b" :", b"\t\r :", b" " * 100 + b":", "：".encode()])
@pytest.mark.parametrize("name", [b'"split"', b"'Subset'", b'"data_split"', b'"PARTITION"'])
def test_a_column_of_splits_is_detected_however_it_is_written(name, between):
    line = b'{"text": "a: b", ' + name + between + b' "test"}'
    assert split_column.has_column(Block("f", 1, line, 0)) and split_column.has_column(Block("f", 1, [(1, line)], 0))


@pytest.mark.parametrize("line", [b"", b":", b'{"text": "split: it\\"s", "content": "subset"}', b'"\x00\xff'])
def test_a_column_of_another_name_is_none(line):
    assert not split_column.has_column(Block("f", 1, line, 0))
