"""Tables as people have them: joined, with empty columns, odd names, other quotes, words for empty cells, bytes."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.row_files import rows_in
from helpers.workbooks import workbook

from rwkv_peft.common.errors import UserError
from rwkv_peft.preprocess import reader
from rwkv_peft.preprocess.files import blocks
from rwkv_peft.preprocess.keys import parts_of
from rwkv_peft.preprocess.pipeline import EncodeConfig, RowEncoder
from rwkv_peft.preprocess.schemas import RowError, columns
from rwkv_peft.preprocess.table_header import cell_text, header_row, trimmed
from rwkv_peft.text.presets import PRESETS

QA = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]


def table(tmp_path, text: str, name: str = "x.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def read(path) -> list:
    return [row for _, row in rows_in(path)]


def notes_of(path) -> list[tuple[str, str]]:
    return [(n.level, n.words) for block in blocks(path) for n in block.notes]


def encode_block_of(path, **options):
    made = [RowEncoder(EncodeConfig(PRESETS["rwkv-world"], **options)).block(block) for block in blocks(path)]
    return next(one for one in made if one.counts["read"])


@pytest.mark.parametrize(
    "text",
    [
        "question, answer\na,b\nc,d\n",
        "\ufeff question ,\u200banswer\u00a0\na,b\nc,d\n",
        '"question"," answer "\na,b\nc,d\n',
        "'question','answer'\na,b\nc,d\n",
        "question,answer,,,\na,b,,,\nc,d,,,\n",
        "question,answer\na,b,,\nc,d\n",
        "question,answer\n,\na,b\n , \n".replace(" , ", ",") + "c,d\n,\n",
        "\ufeffquestion,answer\na,b\n\ufeffquestion,answer\nc,d\n",
        "\ufeffquestion,answer\na,b\n\ufeffc,d\n",
        "question,answer\na,b\nanswer,question\nd,c\n",
        "question|answer\na|b\nc|d\n",
        "question\tanswer\na\tb\nc\td\n",
        "sep=;\nquestion;answer\na;b\nc;d\n",
        "My questions,,\n\nquestion,answer,\na,b,\nc,d,\n",
        "My questions\nquestion;answer\na;b\nc;d\n",
        ",question,answer\n0,a,b\n1,c,d\n",
        "|question|answer|\n|:---|---|\n|a|b|\n|c|d|\n",
    ],
)
def test_tables_as_programs_write_them(tmp_path, text):
    assert read(table(tmp_path, text)) == QA


def test_decimal_commas_do_not_part_cells(tmp_path):
    path = table(tmp_path, "question;answer\nHalf, or more?;0,5\n")
    assert read(path) == [{"question": "Half, or more?", "answer": "0,5"}]


def test_a_tsv_with_commas_is_read_and_reported(tmp_path):
    path = table(tmp_path, "question,answer\na,b\nc,d\n", "x.tsv")
    assert read(path) == QA and "not tabs" in notes_of(path)[0][1]


def test_headers_that_come_again_are_reported_with_their_lines(tmp_path):
    path = table(tmp_path, "question,answer\na,b\nquestion,answer\nc,d\n question ,answer\n")
    [(level, words)] = notes_of(path)
    assert level == "warning" and "2 lines" in words and words.endswith("line 3, 5")
    assert [n for n, _ in rows_in(path)] == [2, 4]


def test_columns_without_a_name_are_ignored_if_empty_and_named_if_not(tmp_path):
    path = table(tmp_path, "question,answer,,\na,b,,x\nc,d,,\n")
    assert notes_of(path) == [
        ("note", "1 column without a name and without content ignored"),
        ("warning", "column 4 has no name and is not used (1 row)"),
    ]


def test_lines_above_the_header_are_reported(tmp_path):
    path = table(tmp_path, "My questions,,\nof 2026,,\nquestion,answer,\na,b,\n")
    assert ("warning", "2 lines above the names of the columns not used ('My questions')") in notes_of(path)
    assert [n for n, _ in rows_in(path)] == [4]


@pytest.mark.parametrize("text", ["question,question\na,b\n", "question, question \na,b\n"])
def test_two_columns_of_one_name_are_refused(tmp_path, text):
    with pytest.raises(UserError, match="names 'question' twice"):
        read(table(tmp_path, text))


def test_a_row_with_more_cells_than_names_says_why(tmp_path):
    [_, error] = read(table(tmp_path, "question,answer\na,b\nYes, or no?,d\n"))
    assert isinstance(error, RowError) and "has 3 cells" in error.message and "must stand in quotes" in error.message


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('"He said \\"hi\\" to me","Say \\"hello\\" back"\n"b","d"\n', ['He said "hi" to me', "b"]),
        ('"ends with \\\\","say \\"x\\""\n', ["ends with \\"]),
        ('"\\alpha \\"b\\"","x"\n', ['\\alpha "b"']),
        ('"a line\nand \\"more\\", here","x"\n', ['a line\nand "more", here']),
    ],
)
def test_quotes_that_are_written_with_a_backslash(tmp_path, text, rows):
    path = table(tmp_path, "question,answer\n" + text)
    assert [row["question"] for row in read(path)] == rows
    assert 'written \\" in it' in notes_of(path)[-1][1]


def test_a_backslash_before_the_closing_quote_is_a_letter_where_that_reads_the_file(tmp_path):
    path = table(tmp_path, 'question,answer\n"C:\\","a ""b"""\n')
    assert read(path) == [{"question": "C:\\", "answer": 'a "b"'}] and not notes_of(path)


def test_a_tsv_with_stray_quotes_takes_them_as_letters(tmp_path):
    path = table(tmp_path, 'question\tanswer\n5" pipe\tyes\n"half\tno\n', "x.tsv")
    assert [row["question"] for row in read(path)] == ['5" pipe', '"half']
    assert "read as letters" in notes_of(path)[0][1]


def test_words_of_pandas_for_an_empty_cell_are_empty_and_counted(tmp_path):
    path = table(tmp_path, "instruction,input,output\na,nan,b\na,NaN,b\na,None,b\na,NULL,b\na,<NA>,b\na,nano,b\n")
    made = encode_block_of(path)
    plain = encode_block_of(table(tmp_path, "instruction,input,output\na,,b\n", "y.csv"))
    assert made.counts["kept"] == 6 and made.counts["fault: empty"] == 5
    assert made.sizes[:5].tolist() == plain.sizes.tolist() * 5 and made.sizes[5] > made.sizes[0]
    assert made.places["fault: empty"][0].note == "input: nan"


@pytest.mark.parametrize(
    ("word", "kept"), [("None", True), ("null", True), ("nan", False), ("NaN", False), ("<NA>", False)]
)
def test_an_answer_may_be_none_but_not_nan(tmp_path, word, kept):
    made = encode_block_of(table(tmp_path, f"question,answer\na,{word}\nb,c\n"))
    assert made.counts["kept"] == 1 + kept and made.counts["fault: None" if kept else "fault: empty"] == 1
    assert kept or word in made.rejects[0].message


def test_map_keys_reports_which_columns_a_row_needs(tmp_path):
    path = table(tmp_path, "ask,context,reply\na,None,None\n")
    made = encode_block_of(path, columns=columns('{"prompt": "ask", "query": "context", "response": "reply"}'))
    assert made.counts["kept"] == made.counts["fault: None"] == made.counts["fault: empty"] == 1


def test_words_in_json_stay(tmp_path):
    made = encode_block_of(table(tmp_path, '{"question": "a", "answer": "nan"}\n', "x.jsonl"))
    assert made.counts["kept"] == 1


@pytest.mark.parametrize("separator", [", ", "\n "])
def test_a_cell_may_hold_a_list_as_python_or_numpy_prints_it(tmp_path, separator):
    chat = [{"role": "user", "content": 'It\'s, "so"'}, {"role": "assistant", "content": "Hello"}]
    cell = "[" + separator.join(map(str, chat)) + "]"
    path = table(tmp_path, 'messages\n"' + cell.replace('"', '""') + '"\n')
    same = table(tmp_path, json.dumps({"messages": chat}), "y.jsonl")
    assert encode_block_of(path).ids.tolist() == encode_block_of(same).ids.tolist()


def parquet(tmp_path, **given):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(given), path)
    return path


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(3), pa.large_string(), pa.string()])
def test_text_in_arrow_columns_of_any_kind(tmp_path, kind):
    words = [b"abc", "中".encode()] if "string" not in str(kind) else ["abc", "中"]
    assert read(parquet(tmp_path, text=pa.array(words, kind))) == [{"text": "abc"}, {"text": "中"}]


def test_a_dictionary_column_is_its_words(tmp_path):
    path = parquet(tmp_path, text=pa.array(["a", "b", "a"]).dictionary_encode())
    assert read(path) == [{"text": "a"}, {"text": "b"}, {"text": "a"}]


def test_bytes_inside_lists_and_structs_are_text_too(tmp_path):
    path = parquet(tmp_path, messages=pa.array([[{"role": b"user", "content": b"Hi"}]]))
    assert read(path) == [{"messages": [{"role": "user", "content": "Hi"}]}]


def test_bytes_that_are_no_text_are_refused_by_their_name(tmp_path):
    made = encode_block_of(parquet(tmp_path, text=pa.array([b"\xff\xfe\xfd", b"ok"])))
    assert made.counts["kept"] == 1 and "bytes that are no UTF-8 text" in made.rejects[0].message


def test_nan_in_an_arrow_column_is_null_and_reported(tmp_path):
    path = parquet(tmp_path, instruction=["a"], input=[float("nan")], output=["b"])
    assert read(path) == [{"instruction": "a", "input": None, "output": "b"}]
    assert notes_of(path) == [("warning", "1 value NaN in the column 'input' taken as null (empty)")]


def test_dates_and_exact_numbers_of_arrow_are_text(tmp_path):
    path = parquet(tmp_path, a=[datetime.date(2026, 11, 30)], b=[decimal.Decimal("1.50")])
    assert read(path) == [{"a": "2026-11-30", "b": "1.50"}]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (3.0, "3"), (2.5, "2.5"), (0.1, "0.1"), (-4.0, "-4"), (True, "TRUE"), (False, "FALSE"), ("3.0", "3.0"), (7, "7"),
        (datetime.date(2026, 1, 5), "2026-01-05"), (datetime.datetime(2026, 1, 5), "2026-01-05"),
        (datetime.datetime(2026, 1, 5, 6, 7, 8), "2026-01-05 06:07:08"), (datetime.time(1, 2), "01:02:00"),
        (datetime.timedelta(hours=30), "30:00:00"), ("", ""), (None, ""), (float("nan"), ""), (1e20, "1e+20"),
    ],
)  # fmt: skip
def test_cells_become_text_by_one_rule(cell, text):
    assert cell_text(cell) == text


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([["", ""], ["question", "answer"]], 1),
        ([["Title"], ["question", "answer"]], 1),
        ([["ask", "say"], ["text", "answer"]], 0),
        ([["Title"], ["ask", "say"]], 0),
        ([["text"], ["a"]], 0),
        ([["Title"], ["text"], ["a"]], 1),
        ([], 0),
    ],
)
def test_where_the_header_is(rows, place):
    assert header_row(rows) == place


def test_names_are_trimmed_of_what_cannot_be_seen():
    assert trimmed('\ufeff "question" \u200b') == "question" and trimmed("'") == "'" and trimmed(" a b ") == "a b"


def test_block_bounds_change_no_table(tmp_path, monkeypatch):
    path = table(tmp_path, 'question,answer\n"He \\"said\\"",b\n' * 5)
    whole = rows_in(path)
    monkeypatch.setattr(reader, "BLOCK", 3)
    monkeypatch.setattr(reader, "ROWS", 1)
    assert rows_in(path) == whole and len(whole) == 5


@pytest.mark.parametrize(
    "text",
    [
        "question,answer\na,b\ninstruction,output\nc,d\n",
        "question,answer\na,b\ninstruction,input,output\nc,,d\n",
        "question,answer\na,b\nid,prompt,response\n1,c,d\n",
        "question,answer\na,b\ninstruction,output,,\nc,d,,\n",
        "question,answer\na,b\n\ufeff Prompt ,Response\nc,d\n",
        "id,question,answer\n1,a,b\nquestion,answer\nc,d\n",
        "问题,回答\na,b\ninstruction,output\nc,d\n",
    ],
)
def test_a_header_of_other_names_holds_from_there_on_and_is_named(tmp_path, text):
    path = table(tmp_path, text)
    result = [parts_of(tuple(row)) for row in read(path)]
    cells = [(row[of.prompts[0]], row[of.responses[0]]) for row, of in zip(read(path), result, strict=True)]
    assert cells == [("a", "b"), ("c", "d")]
    [(level, words)] = notes_of(path)
    assert level == "warning" and words.startswith("line 3 names other columns")


@pytest.mark.parametrize(
    "row",
    ["question,what it means", "the question,the answer", "problem,", "english,answer", "yes,no"],
)
def test_a_row_that_holds_a_name_of_a_column_is_a_row(tmp_path, row):
    path = table(tmp_path, f"instruction,output\na,b\n{row}\n")
    assert len(read(path)) == 2 and not notes_of(path)


def test_a_table_of_words_has_no_second_header(tmp_path):
    assert len(read(table(tmp_path, "word,antonym\nquestion,answer\ninput,output\n"))) == 2


def test_a_second_header_in_a_workbook_holds_too(tmp_path):
    pytest.importorskip("python_calamine")
    workbook(tmp_path / "x.xlsx", One=[["question", "answer"], ["a", "b"], ["instruction", "output"], ["c", "d"]])
    assert read(tmp_path / "x.xlsx") == [QA[0], {"instruction": "c", "output": "d"}]


@pytest.mark.parametrize(
    "text",
    [
        '"question" , "answer"\n"a" , "b"\n"c" , "d"\n',
        '"question" ,"answer"\na,b\nc,d\n',
        '"question", "answer"\n"a", "b"\n"c", "d"\n',
        ' "question";"answer" \n "a";"b" \n"c"; d\n',
        '"question" | "answer"\n"a" | "b"\n"c" | "d"\n',
    ],
)
def test_blanks_around_quoted_cells_are_left_out(tmp_path, text):
    path = table(tmp_path, text)
    assert [{k: v.strip() for k, v in row.items()} for row in read(path)] == QA
    assert not any('"' in v for row in read(path) for v in row.values())
    assert notes_of(path) == [("note", "blanks stand around the quotes of its cells, and are left out")]


def test_commas_and_quotes_inside_cells_with_blanks_around_their_quotes(tmp_path):
    path = table(tmp_path, '"question" , "answer"\n"a, ""b"" , c" , "1"\n"two\nlines" , "2"\n"3" , "two, \nlines" \n')
    assert read(path) == [
        {"question": 'a, "b" , c', "answer": "1"},
        {"question": "two\nlines", "answer": "2"},
        {"question": "3", "answer": "two, \nlines"},
    ]


def test_a_cell_that_holds_a_blank_and_quotes_stays_as_it_is(tmp_path):
    path = table(tmp_path, 'question,answer\na," ""b"""\n"c , ""x"" , y",d\n')
    assert read(path) == [{"question": "a", "answer": ' "b"'}, {"question": 'c , "x" , y', "answer": "d"}]
    assert not notes_of(path)


@pytest.mark.parametrize("rows", ["q,a\nx,y\n", "output,input\nup,down\n", "Q,A\n"])
def test_rows_that_only_look_like_names_stay_rows(tmp_path, rows):
    path = table(tmp_path, "question,answer\n" + rows)
    assert len(read(path)) == rows.count("\n")


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".xlsx"])
@pytest.mark.parametrize(
    ("header", "hint", "warned"),
    [
        (
            ("What is the capital?", "Paris"),
            "Its first line seems to be data: write a line",
            ["'What is the capital?'"],
        ),
        (
            ("Capital of France", "Paris"),
            "But if that is data of the first line: write a line",
            ["'Capital of France'"],
        ),
        (("Two and two", "4"), "But if that is data of the first line: write a line", ["'4', 'Two and two'"]),
        (("Anfrage", "Antwort"), "But if that is data of the first line: write a line", []),
        (("customer", "Antwort"), "for example --map-keys '{", []),
    ],
)
def test_a_first_line_that_may_be_data_is_not_lost_in_silence(tmp_path, ending, header, hint, warned):
    rows = [header, ("Say hello", "Hello"), ("Name a colour", "Blue")]
    if ending == ".xlsx":
        path = workbook(tmp_path / "x.xlsx", A=rows)
    else:
        path = table(
            tmp_path, "".join(("," if ending == ".csv" else "\t").join(row) + "\n" for row in rows), f"x{ending}"
        )
    message = encode_block_of(path).rejects[0].message
    assert hint in message and ("if that is data" in message) == hint.startswith("But")
    given = columns(json.dumps({"prompt": header[0], "response": header[1]}))
    said = [note.words for block in blocks(path, columns=given) for note in block.notes if note.level == "warning"]
    assert [words.partition(" of its first line, which is not learnt")[0] for words in said] == [
        f"MAP_KEYS names {w}" for w in warned
    ]
