"""Files of rows in every format."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from rwkv_peft.preprocess.files import blocks
from rwkv_peft.preprocess.pipeline import items, parse
from rwkv_peft.preprocess.schemas import RowError

ROWS = [
    {"instruction": "Name a tree.", "input": "", "output": "Oak."},
    {"instruction": "译成英文", "input": "橡树，\n很老", "output": 'An oak,\n"very" old; \\ yes'},
    {"instruction": "🐱?", "input": "a,b;c\td", "output": '{"brackets": [1]} \u2028 ]}'},
]


TEXTS = [{"text": "One.\nTwo."}, {"text": "三。"}]


def lines_of(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder, kind: str, rows=ROWS):
    """The rows as a file of this kind."""
    path = folder / f"x{kind}"
    if kind == ".jsonl":
        path.write_text(lines_of(rows), encoding="utf-8")
    elif kind == ".jsonl with BOM":
        path = folder / "bom.jsonl"
        path.write_text("\ufeff" + lines_of(rows).replace("\n", "\r\n"), encoding="utf-8", newline="")
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines_of(rows).encode()))
    elif kind == ".jsonl.zst":
        packer = zstandard.ZstdCompressor()
        path.write_bytes(b"".join(packer.compress(line.encode()) for line in lines_of(rows).splitlines(True)))
    elif kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".json pretty":
        path = folder / "pretty.json"
        path.write_text("\ufeff" + json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    elif kind == ".json wrapped":
        path = folder / "wrapped.json"
        path.write_text(json.dumps({"version": 1, "data": rows, "note": "[{"}, indent=1), encoding="utf-8")
    elif kind == ".json of lines":
        path = folder / "lines.json"
        path.write_text(lines_of(rows), encoding="utf-8")
    elif kind in (".csv", ".tsv", ".csv with ;"):
        path = folder / ("semicolon.csv" if " " in kind else path.name)
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter={"tsv": "\t", "csv": ","}.get(kind[1:], ";"))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".csv.gz":
        path.write_bytes(gzip.compress(write(folder, ".csv", rows).read_bytes()))
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, 2)
    elif kind == ".arrow stream":
        path = folder / "stream.arrow"
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, 2)
    return path


KINDS = [
    ".jsonl", ".jsonl with BOM", ".jsonl.gz", ".jsonl.zst", ".json", ".json pretty", ".json wrapped", ".json of lines",
    ".csv", ".tsv", ".csv with ;", ".csv.gz", ".parquet", ".arrow", ".arrow stream",
]  # fmt: skip


def rows_in(path, mode="file"):
    """(number, row or RowError) of everything in a file."""
    result = []
    for block in blocks(path, mode):
        for number, item in items(block):
            try:
                result.append((number, parse(item)))
            except RowError as error:
                result.append((number, error))
    return result


def many(n: int) -> list[dict]:
    return [{"messages": [{"role": "user", "content": f"Row {i}?"}, {"role": "assistant", "content": f"{i}。" * (i % 7 + 1)}]}
            for i in range(n)]  # fmt: skip
