"""Workbooks: sheets, headers, cells, and what is said of the sheets that are not read."""

import re
import zipfile
from xml.sax.saxutils import escape

import pytest
from test_files import rows_in

from rwkv_peft.common.errors import UserError
from rwkv_peft.preprocess import workbooks
from rwkv_peft.preprocess.files import blocks

pytest.importorskip("python_calamine")

MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
LINK = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
HEADER = ["question", "answer"]


def cell(place: str, value) -> str:
    if isinstance(value, bool):
        return f'<c r="{place}" t="b"><v>{int(value)}</v></c>'
    if isinstance(value, int | float):
        return f'<c r="{place}"><v>{value}</v></c>'
    if value.startswith("#"):
        return f'<c r="{place}" t="e"><v>{value}</v></c>'
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>'


def workbook(path, **sheets):
    """A workbook of the rows of each sheet; None is an empty cell."""
    names = list(sheets)
    with zipfile.ZipFile(path, "w") as archive:
        parts = "".join(
            f'<Override PartName="/xl/worksheets/sheet{i}.xml" '
            'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/>'
            for i in range(len(names))
        )
        archive.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" '
            'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
            f'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>{parts}</Types>',
        )
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r" Type="{LINK}/officeDocument" '
            'Target="xl/workbook.xml"/></Relationships>',
        )
        listed = "".join(f'<sheet name="{n}" sheetId="{i + 1}" r:id="r{i}"/>' for i, n in enumerate(names))
        archive.writestr("xl/workbook.xml", f'<workbook {MAIN} xmlns:r="{LINK}"><sheets>{listed}</sheets></workbook>')
        links = "".join(
            f'<Relationship Id="r{i}" Type="{LINK}/worksheet" Target="worksheets/sheet{i}.xml"/>'
            for i in range(len(names))
        )
        archive.writestr(
            "xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{PACKAGE}/relationships">{links}</Relationships>'
        )
        for i, name in enumerate(names):
            rows = "".join(
                f'<row r="{r}">'
                + "".join(cell(f"{chr(65 + c)}{r}", v) for c, v in enumerate(row) if v is not None)
                + "</row>"
                for r, row in enumerate(sheets[name], 1)
            )
            archive.writestr(
                f"xl/worksheets/sheet{i}.xml", f"<worksheet {MAIN}><sheetData>{rows}</sheetData></worksheet>"
            )
    return path


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


def test_a_workbook_under_another_name_is_read_and_told(tmp_path):
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
def test_a_stray_cell_is_found_before_room_is_made_for_it(tmp_path, place):
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
