"""Tables of pyarrow (.parquet, .arrow): bytes that are changed, and tables that are written again with other rows and
types."""

from __future__ import annotations

import io
import json
import random

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from fuzz import mutate
from fuzz.rows import NAMES, Rows

MOST = 200  # rows of a table that is written again


def rows_of(data: bytes) -> list | None:
    try:
        if data.startswith(b"PAR1"):
            table = pyarrow.parquet.read_table(io.BytesIO(data))
        else:
            table = pyarrow.ipc.open_file(io.BytesIO(data)).read_all()
        table = table.slice(0, MOST)
        table.validate(full=True)  # the values of a damaged table would be read out of bounds
        return table.to_pylist()
    except Exception:  # whatever pyarrow raises for what is damaged
        return None


def written(rows: list, random: random.Random) -> bytes | None:
    out = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(rows)
        if random.random() < 0.7:
            how = random.choice(("none", "snappy", "gzip", "zstd"))
            pyarrow.parquet.write_table(table, out, compression=how, row_group_size=random.choice((1, 3, 100)))
        else:
            with pyarrow.ipc.new_file(out, table.schema) as writer:
                writer.write_table(table)
    except Exception:  # rows that are no table
        return None
    return out.getvalue()


class It(Rows):
    ending = ".parquet"
    cases = ("*.parquet",)

    def __init__(self):
        self.places = ("rows.parquet", "rows.arrow")

    def name_of(self, data: bytes) -> str:
        return "rows.arrow" if data.startswith(b"ARROW1") else "rows.parquet"

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        if random.random() < 0.5 and (rows := rows_of(data)):
            changed = mutate.of_value(json.loads(json.dumps(rows, default=str)), random, None, NAMES)
            if isinstance(changed, list) and (made := written(changed, random)):
                return made
        return mutate.of_bytes(data, random, other)

    def grown(self, data: bytes, random: random.Random, size: int) -> bytes:
        rows = rows_of(data)
        return (rows and written(rows * max(1, size // 100), random)) or super().grown(data, random, size)
