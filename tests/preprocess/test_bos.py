"""BOS: token 0 before the first turn, in rows, files, batches and runs alike; never trained, never lost by cutting."""

import json

import numpy as np
import pytest
from helpers import tiny
from helpers.rows import DIALOGUES, LONG, SAME, dialogue, encode_block_of, rows_of
from helpers.training import tokenize
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data import binidx, tokenized_files
from rwkv_peft.data.dataset import TokenDataset
from rwkv_peft.data.token_source import TokenSource
from rwkv_peft.preprocess.encode import Pieces, encode_row, encode_rows
from rwkv_peft.preprocess.truncate import Limits
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import ENDINGS

KINDS = {**SAME, "plain text": {"text": "天地玄黄。"}, "answer alone": {"text": "Assistant: Hi"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eot", ENDINGS)
def test_bos_puts_one_zero_before_a_row_and_changes_nothing_else(kind, eot):
    [(ids, roles)], [(plain, others)] = (
        rows_of(encode_block_of(KINDS[kind], eot=eot, bos=bos)) for bos in (True, False)
    )
    assert ids.tolist() == [0, *plain.tolist()] and plain[0] != 0
    assert roles.tolist() == [Role.HEADING, *others.tolist()]


@settings(max_examples=60, deadline=None)
@given(st.lists(DIALOGUES, min_size=1, max_size=5), st.sampled_from(sorted(PRESETS)), st.booleans())
def test_many_rows_at_once_begin_as_each_row_alone_does(many, name, end_of_doc):
    pieces = [p for p in (Pieces(*PRESETS[name].render(dialogue(turns))) for turns in many) if p.texts]
    if not pieces:
        return
    result = encode_rows(pieces, end_of_doc, bos=True)
    for i, piece in enumerate(pieces):
        ids, roles = encode_row(piece, end_of_doc, bos=True)
        row = slice(result.first[i], result.first[i + 1])
        assert result.ids[row].tolist() == ids.tolist() and result.roles[row].tolist() == roles.tolist()
        assert ids[0] == 0 and roles[0] == Role.HEADING and result.answered[i] == (roles == Role.ASSISTANT).any()


@pytest.mark.parametrize("policy", ["truncate", "truncate-left", "split"])
@pytest.mark.parametrize("eot", ENDINGS)
@pytest.mark.parametrize("most", [1, 2, 3, 30, 61, 90])
def test_cutting_keeps_the_zero_in_front_and_within_max_tokens(policy, eot, most):
    made = encode_block_of({"messages": LONG}, eot=eot, bos=True, limits=Limits(max_tokens=most, policy=policy))
    plain = (
        encode_block_of({"messages": LONG}, eot=eot, limits=Limits(max_tokens=most - 1, policy=policy))
        if most > 1
        else None
    )
    assert [row[0].tolist()[1:] for row in rows_of(made)] == ([r[0].tolist() for r in rows_of(plain)] if plain else [])
    for ids, roles in rows_of(made):
        assert len(ids) <= most and ids[0] == 0 and roles[0] == Role.HEADING


@pytest.mark.parametrize("limits", [{"source": 9}, {"target": 9}])
@pytest.mark.parametrize("policy", ["truncate", "truncate-left"])
def test_cutting_turns_keeps_the_zero_in_front(limits, policy):
    made = encode_block_of({"messages": LONG}, bos=True, limits=Limits(**limits, policy=policy))
    plain = encode_block_of({"messages": LONG}, limits=Limits(**limits, policy=policy))
    assert made.ids.tolist() == [0, *plain.ids.tolist()]


def first_tokens(prefix) -> list[int]:
    reader = binidx.Reader(prefix)
    return [int(reader.tokens[at]) for at in np.cumsum(reader.sizes) - reader.sizes]


@pytest.mark.parametrize(("setting", "template", "zeros"), [
    ("0", "rwkv-world", False), ("1", "rwkv-world", True), ("auto", "rwkv-world", False), ("1", "chatml", True),
])  # fmt: skip
def test_the_setting_decides_and_the_report_and_the_rows_report_it(project_folder, setting, template, zeros):
    path = tiny.write_jsonl(project_folder / "data" / "a.jsonl", tiny.CHATS)
    report = tokenize(path, BOS=setting, PROMPT_TYPE=template)
    assert report["settings"]["BOS"] == zeros
    prefix = project_folder / "data" / "a"
    assert all((first == 0) == zeros for first in first_tokens(prefix))
    assert tokenized_files.detect_bos(prefix) == (int(zeros), "")
    (project_folder / "data" / "a.report.json").unlink()  # files of others, and of earlier versions
    assert tokenized_files.detect_bos(prefix) == (int(zeros), "")


def test_a_template_of_ones_own_may_begin_with_zero_by_itself(project_folder):
    content = {"format_user": "Q: {{content}}", "format_assistant": "A: {{content}}", "bos": True}
    (project_folder / "data" / "mine.json").write_text(json.dumps(content))
    path = tiny.write_jsonl(project_folder / "data" / "a.jsonl", tiny.CHATS)
    assert tokenize(path, PROMPT_TYPE="mine.json")["settings"]["BOS"] == 1
    assert tokenize(path, PROMPT_TYPE="mine.json", BOS="0")["settings"]["BOS"] == 0


def test_a_report_of_other_tokens_and_rows_of_both_kinds_are_warned_of(project_folder):
    prefix = project_folder / "data" / "a"
    with binidx.Writer(prefix, {"": np.dtype(np.uint16)}) as writer:
        for row in ([0, 5, 6, 0], [0, 7, 0], [8, 9, 0]):
            writer.extend("", np.array(row, np.uint16).tobytes(), [len(row)])
        writer.commit(remove=[])
    bos, warning = tokenized_files.detect_bos(prefix)
    assert bos == 1 and "67% of the rows" in warning
    prefix.with_name("a.report.json").write_text(json.dumps({"settings": {"BOS": 0}}))
    bos, warning = tokenized_files.detect_bos(prefix)
    assert bos == 1 and "belongs to other tokens" in warning


# ---- what is trained ----

ROWS = [[0, 5, 6, 7, 0], [0, 8, 9, 0], [0, 10, 11]]
SAID = [[1, 3, 4, 4, 4], [1, 4, 4, 4], [1, 3, 4]]


def source(rows=ROWS, said=SAID) -> TokenSource:
    class Chunk:
        from pathlib import Path

        path = Path("a")
        sizes = np.array([len(r) for r in rows], np.int32)
        tokens = np.concatenate([np.array(r, np.uint16) for r in rows])

    return TokenSource(Chunk, np.concatenate([np.array(r, np.uint8) for r in said]), 65536)


@pytest.mark.parametrize("mask", ["none", "pad", "qa", "last"])
@pytest.mark.parametrize("mode", ["pack", "pad", "only", "concat", "get"])
def test_the_zero_in_front_is_an_input_and_no_target(mask, mode):
    data = TokenDataset([source()], mode, mask, 16, "cut" if mode == "pack" else "truncate", 1, False)
    total = 0
    for number in range(data.rows):
        for tokens, weights in data.row(number):
            assert tokens[0] == 0 or mode == "concat"
            total += int(weights.sum())
        assert data.count_row(number) == sum(int(w.sum()) for _, w in data.row(number))
    assert data.facts().targets == total
    if mask != "none" and mode in ("pack", "pad", "only"):
        assert total == {"pad": 9, "qa": 7, "last": 7}[mask]


@pytest.mark.parametrize("mode", ["get", "magic"])
@pytest.mark.parametrize("ctx_len", [1, 2, 3, 5])
def test_no_window_trains_the_zero_that_the_next_row_begins_with(mode, ctx_len):
    rows = [[0, 5, 6, 7, 0], [0, 8, 9], [0, 10, 24], [11, 12, 0], [13, 14]] * 6  # rows without BOS train their ends
    data = TokenDataset([source(rows, [[1] * len(row) for row in rows])], mode, "none", ctx_len, "truncate", 1, True)
    text = [token for row in rows for token in row]
    stretches = [data.row(number) for number in range(data.rows)]
    result = [
        (int(a), int(b)) for row in stretches for t, w in row for a, b, on in zip(t, t[1:], w, strict=False) if on
    ]
    assert {(7, 0), (12, 0)} <= set(result) and not {(9, 0), (24, 0), (0, 0), (14, 0)} & set(result)
    assert len(result) == data.facts().targets == sum(map(data.count_row, range(data.rows)))
    if mode == "get":
        begins = {sum(map(len, rows[:n])) for n, row in enumerate(rows) if row[0] == 0}
        assert len(result) == len(text) - 1 - len(begins - {0})


def test_concat_puts_one_zero_between_rows_that_begin_and_end_with_it():
    [(tokens, weights)] = TokenDataset([source()], "concat", "none", 64, "cut", 1, False).row(0)
    assert (
        tokens.tolist() == [5, 6, 7, 0, 8, 9, 0, 10, 11, 0] and weights.sum() == 8
    )  # (the zero that was put there is no target)
    plain = [r[1:] for r in ROWS], [s[1:] for s in SAID]
    [(same, _)] = TokenDataset([source(*plain)], "concat", "none", 64, "cut", 1, False).row(0)
    assert same.tolist() == tokens.tolist()


def test_a_preview_reports_the_zero_in_front_from_the_end():
    ids = [0, *tokenizer.encode("Hi"), 0]
    assert tokenizer.mark_trained(ids, [False] * len(ids)) == "<bos>Hi<end>"
    assert tokenizer.mark_trained([0], [False]) == "<end>"
