"""Workbooks: sheets, headers, cells, and what is said of the sheets that are not read."""

import re
import zipfile

import pytest
from helpers.row_files import rows_in
from helpers.workbooks import workbook

from rwkv_peft.common.errors import UserError
from rwkv_peft.preprocess import workbooks
from rwkv_peft.preprocess.files import blocks

pytest.importorskip("python_calamine")

HEADER = ["question", "answer"]


def notes_of(path) -> list[tuple[str, str]]:
    return [(n.level, n.words) for block in blocks(path) for n in block.notes]


def test_rows_have_the_numbers_that_the_sheet_shows_and_cells_are_text(tmp_path):
    rows = [
        ["My list"],
        [],
        [None, " question ", "answer", None],
        [None, "n", 3.0],
        [],
        [None, "b", True],
        [None, "中", "l1\nl2"],
    ]
    path = workbook(tmp_path / "x.xlsx", A=rows)
    assert rows_in(path) == [
        (4, {"question": "n", "answer": "3"}),
        (6, {"question": "b", "answer": "TRUE"}),
        (7, {"question": "中", "answer": "l1\nl2"}),
    ]
    assert ("warning", "1 line above the names of the columns not used ('My list')") in notes_of(path)


def test_sheets_with_the_same_columns_are_read_and_others_are_named(tmp_path):
    path = workbook(
        tmp_path / "x.xlsx",
        Cover=[["About", "this"]],
        A=[HEADER, ["a", "b"]],
        Empty=[],
        B=[HEADER, ["c", "d"]],
        Other=[["x", "y"]],
    )
    assert [row for _, row in rows_in(path)] == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    assert [block.file.rpartition("/")[2] for block in blocks(path) if block.data] == ["x.xlsx:A", "x.xlsx:B"]
    assert notes_of(path)[0] == ("note", "2 sheets with the same columns are read: A, B")
    assert notes_of(path)[1][0] == "warning" and notes_of(path)[1][1].endswith("Cover, Other")


def test_error_cells_are_empty(tmp_path):
    path = workbook(tmp_path / "x.xlsx", A=[HEADER, ["a", "#N/A"], ["b", "c"]])
    assert [row for _, row in rows_in(path)] == [{"question": "a", "answer": None}, {"question": "b", "answer": "c"}]


def test_a_workbook_under_another_name_is_read_and_reported(tmp_path):
    path = workbook(tmp_path / "x.csv", A=[HEADER, ["a", "b"]])
    assert [row for _, row in rows_in(path)] == [{"question": "a", "answer": "b"}]
    assert "is an Excel workbook by its content" in notes_of(path)[0][1]


@pytest.mark.parametrize("content", [b"PK\x03\x04 cut off", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 old", b"\0\1\2"])
def test_a_damaged_workbook_is_refused(tmp_path, content):
    (tmp_path / "x.xlsx").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a workbook"):
        rows_in(tmp_path / "x.xlsx")


def test_a_sheet_with_a_stray_cell_far_away_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workbooks, "CELLS_LIMIT", -10_000)
    with pytest.raises(UserError, match="has a cell at row 900 or column 26"):
        rows_in(workbook(tmp_path / "x.xlsx", A=[HEADER, *[["a", "b"]] * 8, *[[]] * 890, ["a"]]))


def test_a_workbook_that_lacks_one_of_its_sheets_is_called_damaged(tmp_path):
    path = workbook(tmp_path / "x.xlsx", A=[HEADER, ["a", "b"]])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist() if "worksheets/" not in name}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="is damaged: its sheet A cannot be read"):
        rows_in(path)


@pytest.mark.parametrize("place", ["XFD1048576", "GQ1000000", "AAAA9"])
def test_a_stray_cell_is_detected_before_room_is_made_for_it(tmp_path, place):
    path = workbook(tmp_path / "x.xlsx", A=[HEADER, ["a", "b"]])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    number = re.sub("[A-Z]", "", place).encode()
    far = b'<row r="%b"><c s="1" r="%b"><v>1</v></c></row></sheetData>' % (number, place.encode())
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(b"</sheetData>", far))
    if place == "AAAA9":  # far to the right, and still few cells
        assert workbooks.is_small(path, "x.xlsx")
        return
    with pytest.raises(UserError, match="more empty cells than can be read"):
        rows_in(path)


def test_an_empty_workbook_has_no_rows(tmp_path):
    assert rows_in(workbook(tmp_path / "x.xlsx", A=[])) == rows_in(workbook(tmp_path / "y.xlsx", A=[HEADER])) == []
