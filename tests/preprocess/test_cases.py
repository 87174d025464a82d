# ruff: noqa: E501 - one line a case
"""Inputs of the kinds that people reported for other tools (tests/cases), and what becomes of each: one line a case."""

from pathlib import Path

import pytest
from helpers.training import tokenize

from rwkv_peft.checkpoint import base_model
from rwkv_peft.common.errors import UserError
from rwkv_peft.data.binidx import Reader
from rwkv_peft.preprocess.files import stem_of
from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role

CASES = Path(__file__).resolve().parents[1] / "cases"
A = Role.ASSISTANT

# file -> settings, what is learnt of every row ("" where nothing is), and words that the report must have
DATA = {
    "k01-message-loss-false.jsonl": ({}, [" It does not sail on holidays.<end>"], []),
    "k01-row-loss_mask-list.jsonl": ({}, [" It does not sail on holidays.<end>"], []),
    "k02-alpaca-cot.jsonl": ({}, [" <think>\nSeven eights are fifty-six.\n</think>\n56<end>"], []),
    "k02-message-thinking.jsonl": ({"PROMPT_TYPE": "rwkv-g1-think"}, [">\nSeven eights are fifty-six.\n</think>\n56<end>"], []),
    "k02-pair-reasoning_content.jsonl": ({}, [" <think>\nSeven eights are fifty-six.\n</think>\n56<end>"], []),
    "k03-pair-system_prompt.jsonl": ({}, [" At sunset, as ever.<end>"], ["1 with a system text"]),
    "k04-functions-in-system.jsonl": ({}, ["It is low.<end>"], ["1 with tools", "1 with a system text"]),
    "k04-functions-top-level.jsonl": ({}, ["It is low.<end>"], ["1 with tools"]),
    "k04-tools-in-empty-system.jsonl": ({}, ["It is low.<end>"], ["1 with tools"]),
    "k07-arrow-null-padding.parquet": ({}, ['"arguments": {"place": "Heron Bay"}}', '"arguments": {"a": 2, "b": 3}}'], ["2 with tools"]),
    "k08-thought-without-opening-tag.jsonl": ({}, [" <think>\nSeven eights are 56.\n</think>\n56<end>"], []),
    "k13-one-message-a-row.jsonl": ({}, [" At sunset.<end>"], []),
    "m02-human-assistant-per-turn.jsonl": ({}, [" 日落时分。\n\n 日出时分。<end>"], []),
    "m02-struct-of-lists.parquet": ({}, [" At sunset.<end>"], []),
    "m03-answer-is-an-object.jsonl": ({}, [' {"name": "Tomas Quill", "age": 61}<end>'], []),
    "m03-number-answer.parquet": ({}, [" 42<end>", " 48<end>"], []),
    "m04-system-null.jsonl": ({}, [" Hello<end>"], []),
    "m04-tool-result-empty.jsonl": ({}, [" Done.<end>"], []),
    "m06-columns-dolly.jsonl": ({}, [" At sunset.<end>"], []),
    "m06-columns-orca.jsonl": ({}, [" At sunset, as ever.<end>"], ["1 with a system text"]),
    # reported and refused
    "k05-images-column-and-placeholder.jsonl": ({}, None, ["only text can be trained"]),
    "m01-roles-of-ones-own.jsonl": ({}, None, ["""--role-map '{"customer": "user", "agent": "assistant"}'"""]),
    # encodings and line ends
    "k06-big5.jsonl": ({}, ["\u71c8"], ["is Big5; it was read as such"]),
    "k06-cp1252-german.jsonl": ({}, [" Nein, früh.<end>", " Um zwölf Uhr, außer sonntags.<end>"], ["is cp1252; it was read as such"]),
    "k06-cp949-korean.jsonl": ({}, [" 해가 질 때 켜집니다.<end>"], ["is EUC-KR (cp949); it was read as such"]),
    "p04-utf16-without-bom.jsonl": ({}, [""], ["is UTF-16; it was read as such"]),
    "k10-text-crlf.jsonl": ({}, ["\n\n"], ["2.0 answers a dialogue"]),
    "k14-indented-completion.jsonl": ({}, ["     return x<end>"], []),
    # formats and tables
    "k11-train-and-test-in-one.json": ({}, [""] * 3, ['its list "test" (2 rows) is not used']),
    "k12-rows.jsonl.txt": ({}, [""] * 2, ["is JSON lines by its content"]),
    "k17-nan-cells.csv": ({}, [""] * 3, ["warning   3 cells with a word that stands for an empty cell"]),
    "k18-two-csv-joined.csv": ({}, [""] * 2, ["names of the columns again", "not used as rows: line 3"]),
    "m02-list-of-conversations.json": ({}, [""] * 2, ["2 sharegpt"]),
    "m06-header-with-blanks.csv": ({}, [" Now.<end>"], ["question/answer"]),
    "p04-comment-first.json": ({}, [""] * 2, ["1 comment between rows skipped"]),
    "p04-lists-per-column.json": ({}, [""] * 2, ["is one object that holds 2 rows"]),
    "p04-nan.jsonl": ({}, [""], ["warning   1 row with NaN"]),
    "p04-objects-over-lines.jsonl": ({}, [""] * 2, ["is JSON over several lines"]),
    "p04-python-dicts.jsonl": ({}, [""] * 2, ["warning   2 rows written as Python prints them"]),
    "p05-backslash-quotes.csv": ({}, [""] * 2, ["note"]),
    "p05-empty-columns.csv": ({}, [""], ["3 columns without a name and without content ignored"]),
    "p05-python-list-cell.csv": ({}, [""], ["1 messages"]),
    "p06-rows.ndjson": ({}, [""], []),
    "p07-binary-text.parquet": ({}, [""], []),
    # made for another tool
    "k16-turns-inside-answer-g1.jsonl": ({"PROMPT_TYPE": "rwkv-g1"}, [""], ["warning   1 row with turns inside a question or an answer"]),
    "k16-turns-inside-instruction.jsonl": ({"CONVERT_HEADINGS": "1"}, [""], ["1 row"]),
    "m07-text-with-other-headings.jsonl": ({}, None, ["warning   2 rows with headings of another format"]),
    "m08-text-escaped-twice.jsonl": ({}, None, ["warning   1 row with line breaks or characters written as letters"]),
    "m09-endoftext-in.txt": ({}, None, ["warning   1 row with tokens of another model written as letters", "m09-endoftext-in.txt:2"]),
    # a template of another format; what its .gguf holds: tests/checkpoint/test_prompt_format.py
    "k09-gguf-template-chatml.jsonl": ({"PROMPT_TYPE": "chatml"}, None, []),
    # cut by a limit: the last thing learnt is no end
    "k15-thought-cut-by-ctx_len.jsonl": ({"PROMPT_TYPE": "rwkv-g1", "MAX_TOKENS": "96", "OVERLONG": "truncate"}, ["Step"] * 6, ["warning"]),
}  # fmt: skip

BASES = {
    "p01-lfs-pointer.pth": "Git LFS pointer",
    "p01-model.safetensors": "not an RWKV model",
    "p02-hugging-face-names.pth": "fla",
    "p03-rwkv-5.0.pth": "RWKV-5.0",
}


@pytest.mark.parametrize("name", DATA)
def test_a_reported_input_becomes_what_its_author_meant_or_is_named(name, tmp_path, capsys):
    changes, learnt, words = DATA[name]
    path = tmp_path / name
    path.write_bytes((CASES / name).read_bytes())
    try:
        tokenize(path, **changes)
        said = capsys.readouterr().out
    except UserError as error:
        assert learnt is None, error
        said = str(error)
    for word in words:
        assert word in said, said
    if learnt is not None:
        assert len(result := learnt_of(path)) == len(learnt), result
        for expected in learnt:
            assert any(expected in text for text in result), (expected, result)


def learnt_of(path: Path) -> list[str]:
    """What is learnt of every row: the text of its answers, <end> where token 0 is."""
    prefix = stem_of(path)
    rows, roles = Reader(prefix), Reader(f"{prefix}.roles")
    result = []
    for i in range(len(rows)):
        ids = rows.row(i)[roles.row(i) == A]
        result.append(tokenizer.decode(ids) + ("<end>" if len(ids) and ids[-1] == 0 else ""))
    return result


def test_a_cut_thought_is_not_followed_by_an_end(tmp_path):
    name = "k15-thought-cut-by-ctx_len.jsonl"
    path = tmp_path / name
    path.write_bytes((CASES / name).read_bytes())
    tokenize(path, PROMPT_TYPE="rwkv-g1", MAX_TOKENS="96", OVERLONG="truncate")
    assert not any(text.endswith("<end>") for text in learnt_of(path))


def test_an_answer_that_is_not_to_be_learnt_is_not(tmp_path):
    for name in ("k01-message-loss-false.jsonl", "k01-row-loss_mask-list.jsonl"):
        (path := tmp_path / name).write_bytes((CASES / name).read_bytes())
        tokenize(path)
        assert "never closes" not in learnt_of(path)[0]


@pytest.mark.parametrize("name", BASES)
def test_a_reported_base_is_named_by_what_it_is(name):
    with pytest.raises(UserError, match=BASES[name]):
        base_model.read_geometry(CASES / name)


def test_every_case_has_its_line():
    rest = {"m05-ids-of-20b-vocabulary.bin", "m05-ids-of-20b-vocabulary.idx"}  # tests/data/test_vocabulary_check.py
    assert {path.name for path in CASES.iterdir()} == {*DATA, *BASES, *rest}
