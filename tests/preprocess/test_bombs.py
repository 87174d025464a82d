"""Files of data that are small and unpack to far more, or have more columns than anybody reads: refused, or read in linear time
and little memory."""

import gzip
import json
import subprocess
import sys
import time
import zipfile

import pytest
from helpers.kit import ROOT

from rwkv_peft.common.errors import UserError
from rwkv_peft.preprocess import files, json_keys, pipeline, workbooks
from rwkv_peft.preprocess.schemas import RowError

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PARTS = "http://schemas.openxmlformats.org/package/2006/relationships"


def rows_of(path):
    return [
        row for block in files.blocks(path) for row in (block.data if isinstance(block.data, list) else [block.data])
    ]


def write_csv(path, columns):
    names = ["prompt", "response", *(f"c{i}" for i in range(columns))]
    path.write_text("\n".join([",".join(names), *[",".join(["x"] * len(names))] * 2]) + "\n")


def write_json_row(path, columns):
    path.write_text(json.dumps({"prompt": "a", "response": "b", **{f"c{i}": "x" for i in range(columns)}}) + "\n")


def write_messages(path, columns):
    one = {"role": "user", "content": "a", **{f"c{i}": "x" for i in range(columns)}}
    path.write_text(json.dumps({"messages": [one, {"role": "assistant", "content": "b"}]}) + "\n")


def write_parquet(path, columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"], **{f"c{i}": ["x"] for i in range(columns)}}), path)


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    "write, ending, columns",
    [
        (write_csv, "csv", 80_000),
        (write_json_row, "jsonl", 40_000),
        (write_messages, "jsonl", 40_000),
        (write_parquet, "parquet", 15_000),
    ],
    ids=["csv", "json", "messages", "parquet"],
)
def test_a_row_of_very_many_columns_is_read_in_some_seconds(tmp_path, write, ending, columns):
    path = tmp_path / f"x.{ending}"
    write(path, columns)
    began = time.process_time()  # of this process: what others do on the machine does not count
    for row in rows_of(path):
        pipeline.parse(row) if isinstance(row, bytes) else row
    assert time.process_time() - began < 30  # 70 and more where each name is looked for among all others


def test_names_of_columns_that_are_there_twice_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,b,c,response,c,b\n" + "1,2,3,4,5,6\n")
    with pytest.raises(UserError, match="names 'b' twice"):
        rows_of(tmp_path / "x.csv")


def test_a_key_that_is_there_twice_among_many_is_still_detected():
    keys = "".join(f', "c{i}": 1' for i in range(600))
    row = f'{{"prompt": "a", "response": "b"{keys}, "response": "c"}}'.encode()
    with pytest.raises(RowError, match='"response" twice'):
        pipeline.parse(row, keys=json_keys.counts([row])[0])


def in_little_memory(path, most=400_000):
    """The words that are said of a file, read by another process in at most so many kB."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from rwkv_peft.common.errors import UserError\nfrom rwkv_peft.preprocess import files\n"
        "try: print(sum(len(block.data) for block in files.blocks(Path(sys.argv[1]))))\n"
        "except UserError as error: print(error)\n"
        "used = int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
        f"assert used < {most}, used"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_text_that_a_parquet_file_holds_once_and_means_often_costs_little_memory(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * (1 << 20)]))
    pq.write_table(pa.table({"prompt": ["a"] * 2000, "response": texts}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 1 << 20
    assert in_little_memory(tmp_path / "x.parquet").strip() == "2000"


@pytest.mark.smoke(1)
@pytest.mark.parametrize("packed", ["gz", "zst"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
def test_a_packed_row_of_300_mb_costs_little_memory(tmp_path, packed, ending):
    path, piece = tmp_path / f"x.{ending}.{packed}", b"x" * (1 << 20)
    begin = {"jsonl": b'{"text": "', "json": b'[{"text": "', "csv": b'prompt,response\n"', "txt": b""}[ending]
    if packed == "gz":
        with gzip.open(path, "wb", 1) as file:
            file.write(begin)
            for _ in range(300):
                file.write(piece)
    else:
        zstandard = pytest.importorskip("zstandard")
        with open(path, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            file.write(begin)
            for _ in range(300):
                file.write(piece)
    in_little_memory(path)  # (the names of columns are the only line that cannot be left out)


def workbook(path, cells, shared=()):
    """An .xlsx of one sheet. cells: XML of its rows, in pieces."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(
            "xl/workbook.xml",
            f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets><sheet name="S" sheetId="1" r:id="r"/></sheets></workbook>',
        )
        archive.writestr(
            "xl/_rels/workbook.xml.rels",
            f'<Relationships xmlns="{PARTS}"><Relationship Id="r" Type="{OFFICE}/worksheet" Target="worksheets/sheet1.xml"/>'
            "</Relationships>",
        )
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{PARTS}"><Relationship Id="r" Type="{OFFICE}/officeDocument" Target="xl/workbook.xml"/>'
            "</Relationships>",
        )
        with archive.open("xl/worksheets/sheet1.xml", "w") as file:
            for piece in (f'<worksheet xmlns="{MAIN}"><sheetData>', *cells, "</sheetData></worksheet>"):
                file.write(piece.encode())


def cell(place, text):
    return f'<c r="{place}" t="inlineStr"><is><t>{text}</t></is></c>'


TABLE = f'<row r="1">{cell("A1", "prompt")}{cell("B1", "response")}</row><row r="2">{cell("A2", "a")}{cell("B2", "b")}</row>'


def test_a_workbook_whose_last_cell_is_far_outside_is_refused_and_not_tried(tmp_path):
    pytest.importorskip("python_calamine")
    workbook(tmp_path / "x.xlsx", [TABLE, f'<row r="1048576">{cell("XFD1048576", "x")}</row>'])
    assert "more empty cells than can be read" in in_little_memory(tmp_path / "x.xlsx")


def test_a_workbook_that_unpacks_to_more_than_memory_holds_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("python_calamine")
    monkeypatch.setattr(workbooks, "PROBE", workbooks.PROBE.replace(str(4 << 30), str(1 << 29)))
    workbook(
        tmp_path / "x.xlsx",
        [TABLE, '<row r="3"><c r="A3" t="inlineStr"><is><t>', *["x" * (1 << 20)] * 600, "</t></is></c></row>"],
    )
    with pytest.raises(UserError, match="cannot be read as a workbook: it needs more than"):
        rows_of(tmp_path / "x.xlsx")


def test_a_sound_workbook_is_read(tmp_path):
    pytest.importorskip("python_calamine")
    workbook(tmp_path / "x.xlsx", [TABLE])
    assert rows_of(tmp_path / "x.xlsx") == [(2, {"prompt": "a", "response": "b"})]
