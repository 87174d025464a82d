"""JSON in the shapes that people have it in, and JSON that is not quite JSON."""

import json
import time

import pytest
from helpers.row_files import rows_in

from rwkv_peft.common.errors import UserError
from rwkv_peft.preprocess import reader
from rwkv_peft.preprocess.files import blocks
from rwkv_peft.preprocess.json_repair import parse_list, repair_json
from rwkv_peft.preprocess.pipeline import EncodeConfig, RowEncoder
from rwkv_peft.preprocess.reader import Block
from rwkv_peft.preprocess.schemas import RowError
from rwkv_peft.text.presets import PRESETS

A, B = {"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
BYE = [{"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Farewell"}]
J = json.dumps


def read(tmp_path, name: str, text: str | bytes) -> list:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [row for _, row in rows_in(path)]


def notes_of(path, **options) -> list[tuple[str, str]]:
    return [(n.level, n.words) for block in blocks(path, **options) for n in block.notes]


def encode_block_of(path):
    return [RowEncoder(EncodeConfig(PRESETS["rwkv-world"])).block(block) for block in blocks(path)]


LINES = f"{J(A)}\n{J(B)}\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.ndjson", LINES),
        ("x.jsonlines", LINES),
        ("x.ldjson", LINES),
        ("x.NDJSON", LINES),
        ("x.json", LINES),
        ("x.txt", LINES),
        ("x.csv", LINES),
        ("x.log", LINES),
        ("x", LINES),
        ("x.jsonl", J([A, B])),
        ("x.jsonl", J([A, B], indent=2)),
        ("x.txt", J([A, B], indent=2)),
        ("x.jsonl", f"{J(A, indent=2)}\n{J(B, indent=2)}"),
        ("x.jsonl", '{"instruction": "a",\n "output": "b"}\n{"instruction": "c",\n "output": "d"}\n'),
        ("x.jsonl", f"[{J(A)}]\n[{J(B)}]\n"),
        ("x.jsonl", f"[\n{J(A)},\n{J(B)}\n]"),
        ("x.json", f"// my data\n[\n{J(A)},\n{J(B)}\n]\n"),
        ("x.json", f'/* one {{ "brace */ # and\n[{J(A)}, // "a quote\n# {{\n{J(B)},\n]\n// end'),
        ("x.json", b"\xef\xbb\xbf \n[" + J(A).encode() + b"]\n\xef\xbb\xbf[" + J(B).encode() + b"]"),
        ("x.jsonl", J(A).encode() + b"\r\n\xef\xbb\xbf" + J(B).encode() + b"\r\n"),
        ("x.jsonl", f"{J(A)},\n{J(B)},\n"),
        ("x.json", str([A, B])),
        ("x.jsonl", f"{A}\n{B}\n"),
        ("x.json", J({"instruction": ["a", "c"], "output": ["b", "d"]})),
        ("x.jsonl", J({"instruction": ["a", "c"], "output": ["b", "d"]})),
        ("x.json", J({"instruction": {"0": "a", "1": "c"}, "output": {"0": "b", "1": "d"}})),
        ("x.json", J({"columns": ["instruction", "output"], "index": [0, 1], "data": [["a", "b"], ["c", "d"]]})),
        ("x.json", J({"first": A, "second": B})),
        ("x.json", J({"info": {"made": [{"by": "me"}]}, "rows": [A, B]})),
        ("x.json", J({"data": {"rows": [A, B]}})),
        ("x.jsonl", J({"data": [A, B]})),
        ("x.jsonl", f"{J(J(A))}\n{J(J(B))}\n"),
        ("x.json", J({"data": {"0": A, "1": B}})),
    ],
)
def test_rows_are_detected_in_every_shape_and_under_every_name(tmp_path, name, text):
    assert read(tmp_path, name, text) == [A, B]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", J([HI, BYE])),
        ("x.json", J([HI, BYE], indent=1)),
        ("x.jsonl", J([HI, BYE])),
        ("x.jsonl", f"{J(HI)}\n{J(BYE)}\n"),
        ("x.json", f"{J(HI)}\n{J(BYE)}\n"),
        ("x.txt", J([HI, BYE], indent=1)),
        ("x.json", J({"first": HI, "second": BYE})),
        ("x.json", J({"train": [HI, BYE]})),
        ("x.json", str([HI, BYE])),
    ],
)
def test_lists_of_messages_are_conversations(tmp_path, name, text):
    assert read(tmp_path, name, text) == [{"messages": HI}, {"messages": BYE}]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_bare_conversation_is_one_row(tmp_path, indent):
    assert read(tmp_path, "x.json", J(HI, indent=indent)) == [{"messages": HI}]


def test_messages_with_ids_of_their_own_are_put_together_by_their_ids(tmp_path):
    rows = [{"message_id": "1", "parent_id": None, "role": "prompter", "text": "Hi"}]
    assert read(tmp_path, "x.json", J(rows)) == [{"messages": [{"role": "prompter", "text": "Hi"}]}]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_where_blocks_end_changes_no_shape(tmp_path, monkeypatch, size):
    texts = [
        f'// "c" {{\n[{J(A)}, /* [ */\n{J(B)}]',
        str([A, {"output": "it's {"}]),
        J([HI, BYE]),
        J({"test": [A], "train": [B]}),
    ]
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.json"
        path.write_text(text)
        whole = rows_in(path)
        with monkeypatch.context() as patch:
            patch.setattr(reader, "BLOCK", size)
            assert rows_in(path) == whole


def test_columns_of_different_lengths_are_refused_with_their_lengths(tmp_path):
    with pytest.raises(UserError, match='"instruction" has 2, "output" has 1'):
        read(tmp_path, "x.json", J({"instruction": ["a", "b"], "output": ["c"]}))


def test_a_list_of_messages_on_both_sides_is_no_column(tmp_path):
    row = {"prompt": HI[:1], "completion": HI[1:]}
    assert read(tmp_path, "x.json", J(row)) == [row]


def test_plain_text_stays_text(tmp_path):
    for text in ("{not json}\n", "[INFO] begun\n", "Hello\n" + LINES):
        assert read(tmp_path, "x.txt", text) == [{"text": text}]


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("{'a': 'b', 'n': None, 't': True}", {"a": "b", "n": None, "t": True}, "python"),
        ("""{'a': "it's"}""", {"a": "it's"}, "python"),
        ("{'a': nan, 'b': ('x', 'y')}", {"a": None, "b": ["x", "y"]}, "python"),
        ('{"a": NaN, "b": [-Infinity]}', {"a": None, "b": [None]}, "nan"),
        ('{"a": "NaN", "b": [1,],}', {"a": "NaN", "b": [1]}, "comma"),
        ('{"a": "// no", /* yes */ "b": 1} # end', {"a": "// no", "b": 1}, "comment"),
        ('{"a": "x\ty\nz"}', {"a": "x\ty\nz"}, "control"),
        ('{"a": 1e999}', {"a": None}, "nan"),
        ("[{'a': 1}\n {'a': 2}]", [{"a": 1}, {"a": 2}], "python"),
        ("[array(['a', 'b'], dtype=object)]", [["a", "b"]], "python"),
    ],
)
def test_what_has_one_reading_is_read_and_its_fault_named(text, value, kind):
    assert repair_json(text) == (value, kind)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{“a”: “b”}", "“"),
        ('{"a"： "b"}', "："),
        ("{'a': 'it's'}", "single quotes"),
        ('{a: "b"}', "its key a has no quotes"),
        ('{"a": "\\alpha"}', "the escape \\\\a"),
        ('{"a": "b', "quote is opened that never closes"),
        ('{"a": "b"', "a bracket is missing"),
        ('{"a": "b" "c": 1}', "a comma is missing"),
        ('{"a": 1}{"a": 2}', "several objects"),
        ('{"a": 1} and so on', "'and so on' behind its end"),
        ("User: Hi", "begins with 'User: Hi'"),
        ('{"a": "\\ud800"}', "surrogate"),
        ("{'a': {1, 2}}", "single quotes"),
        ("{'a': __import__('os')}", "single quotes"),
        ("[" * 5000, "brackets are open at once"),
        ("{'a':" * 5000, "brackets are open at once"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_name_of_its_fault(text, words):
    with pytest.raises(ValueError, match="is not valid JSON|is nested too deeply") as reported:
        repair_json(text)
    assert words.replace("\\\\", "\\") in str(reported.value)


def test_lists_in_cells_are_json_or_python():
    assert parse_list(J(HI)) == parse_list(str(HI)) == HI
    with pytest.raises(ValueError, match="is not valid JSON"):
        parse_list("[{'role': ")


def test_python_dicts_are_used_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{A}\n{J(B)}\n")
    [made] = encode_block_of(path)
    assert made.counts["kept"] == 2 and made.counts["fault: python"] == 1
    assert [place.line for place in made.places["fault: python"]] == [1]


def test_nan_is_empty_where_a_column_may_be_empty_and_named_where_not(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"instruction": "a", "input": NaN, "output": "b"}\n{"instruction": "a", "output": NaN}\n')
    [made] = encode_block_of(path)
    assert made.counts["kept"] == 1 and made.counts["fault: nan"] == 2
    assert made.rejects[0].line == 2 and "NaN" in made.rejects[0].message


def test_a_comment_line_costs_no_row_and_is_no_rejection(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f"# mine\n{J(A)}\n// and\n{J(B)}\n")
    [made] = encode_block_of(path)
    assert made.counts["kept"] == 2 and made.counts["dropped: comment"] == 2 and not made.rejects
    assert made.counts["read"] == 4


def test_comments_between_rows_are_reported(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(f"// a\n[{J(A)}, # b\n{J(B)}]")
    assert notes_of(path) == [("note", "2 comments between rows skipped")]
    assert [n for n, _ in rows_in(path)] == [2, 3]


def test_a_broken_line_of_lines_costs_no_other(tmp_path):
    result = read(tmp_path, "x.jsonl", f'{{"text": \n{J(A)}\n{J(B)}\n')
    assert isinstance(result[0], RowError) and result[1:] == [A, B]


@pytest.mark.parametrize("unit", [r"it\'s ", r"\'", r'\'a "b" ', r"\'[ ", "/* ", r"it\'s\n", r"5\" "])
@pytest.mark.parametrize("end", ["'}\n", ""])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_many_escaped_quotes_take_no_time_that_grows_with_their_square(tmp_path, unit, end, name):
    """With patterns that try every quote as a beginning, 200 KB take minutes."""
    text = "{'prompt': 'q', 'response': '" + unit * (200_000 // len(unit)) + end
    try:
        result = read(tmp_path, name, text)
    except UserError as error:
        assert not end and "never ends" in str(error)
        return
    assert len(result) == 1
    assert isinstance(result[0], RowError) if not end else len(result[0]["response"]) > 60_000


@pytest.mark.parametrize("text", ['{"a": 1} /* never closed', '{"a": "never closed', "{'a': 'never closed"])
def test_what_never_closes_is_refused(text):
    with pytest.raises(ValueError, match="is not valid JSON"):
        repair_json(text)


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ('{"prompt": "q", "response": "a", "response": "b"}', "response"),
        ('{"response":"b","prompt":"p","prompt":"q"}', "prompt"),
        (r'{"\u95ee": "q", "\u7b54": "a", "\u7b54": "b"}', "答"),
        ('{"text": "a", "text" : null}', "text"),
        (f'{{"messages": {J(HI)}, "messages": {J(HI[::-1])}}}', "messages"),
        ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]', "content"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "text": "x", "text": "y"}]}', "text"),
        ('{"tools": [{"a": {"b": "\\": 1", "b": 2}}], "text": "z"}', "b"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_key_with_two_values_is_refused_with_its_name(tmp_path, row, key, name):
    (tmp_path / name).write_text(f"{J(A)}\n{row}\n")
    [reject] = [reject for made in encode_block_of(tmp_path / name) for reject in made.rejects]
    assert reject.reason == "two values" and f'has "{key}" twice' in reject.message and reject.line == 2


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "q", "response": "b", "response": "b"}',
        '{"id": 1, "prompt": "q", "response": "b", "id": 2}',
        r'{"prompt": "\"prompt\" \"response\"", "response": "b"}',
        '{"prompt": "prompt", "response": "response"}',
        f'{{"id": 1, "messages": {J([{**one, "id": 2, "messages": 3} for one in HI])}}}',
    ],
)
def test_a_key_that_is_there_again_elsewhere_or_with_the_same_value_is_none(tmp_path, row):
    (tmp_path / "x.jsonl").write_text(row)
    assert not any(made.rejects for made in encode_block_of(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (J([A]), "is one JSON list of rows, on one line; it is read as .json"),
        (J([A, B]), "is one JSON list of rows, on one line; it is read as .json"),
        (
            J({"train": [A]}),
            "is one JSON object of lists or objects, which may hold many rows, on one line; it is read as .json",
        ),
        (J(A, indent=1), "is JSON over several lines, not an object on each; it is read as .json"),
        (J([A, B], indent=1), "is JSON over several lines, not an object on each; it is read as .json"),
    ],
)
def test_a_file_of_json_lines_that_is_none_is_reported_as_what_it_is(tmp_path, text, words):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert ("note", words) in notes_of(path)


@pytest.mark.parametrize("row", [A, {"messages": HI}, {"text": "a"}])
def test_json_lines_of_one_row_need_no_note(tmp_path, row):
    path = tmp_path / "x.jsonl"
    path.write_text(J(row))
    assert not notes_of(path)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["one row", "one message"])
def test_the_keys_of_a_row_and_a_message_are_gone_through_once(word):
    """They took minutes: each was looked for in all of the row, and all were sorted for each."""
    many = {f"k{i}": "x" for i in range(40_000 if word == "one row" else 200_000)}
    row = many if word == "one row" else {"messages": [many, {"role": "assistant", "content": "a"}]}
    begun = time.process_time()
    made = RowEncoder(EncodeConfig(PRESETS["rwkv-world"])).block(
        Block("x.jsonl", 1, json.dumps(row).encode() + b"\n", 0)
    )
    assert made.rejects and time.process_time() - begun < 20


def test_a_cell_that_is_packed_into_a_small_file_is_too_long_for_a_row():
    made = RowEncoder(EncodeConfig(PRESETS["rwkv-world"])).block(
        Block("x.parquet", 1, [(7, {"text": "a" * (33 << 20)})], 0)
    )
    assert [(one.line, one.reason) for one in made.rejects] == [(7, "too long")]


@pytest.mark.parametrize("text", ['{"text": "a\\ud800",}', '{"text": "a\\ud800 \x7f\n"}', "{'text': 'a\\ud800'}"])
def test_half_a_character_is_named_in_rows_that_are_repaired_too(text):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        repair_json(text)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": HI, "rejected": [HI[0], {"role": "assistant", "content": "bad"}]},
        {
            "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}],
            "systemInstruction": {"parts": [{"text": "s"}]},
        },
    ],
)
def test_lists_of_messages_of_one_row_are_no_rows_of_their_own(name, many, row, tmp_path):
    assert read(tmp_path, name, "\n".join([J(row)] * many)) == [row] * many


def test_lists_of_messages_under_names_are_conversations(tmp_path):
    result = read(tmp_path, "x.json", J({"first": HI, "second": BYE}))
    assert [one["messages"] if isinstance(one, dict) else one for one in result] == [HI, BYE]
