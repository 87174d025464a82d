"""python -m json2binidx.inspect: sound pairs are shown, every fault is reported with its place, nothing ends in a traceback."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.kit import EVERYTHING, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.cli import inspect
from rwkv_peft.data import check_index
from rwkv_peft.data.binidx import Writer
from rwkv_peft.text import tokenizer

DTYPE = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "d", 8: "H"}
TEXTS = ["User: Sea?\n\nAssistant: Salt, wind.", "User: 海？\n\nAssistant: 盐、风和海鸥。", "plain"]
ROWS = [[*tokenizer.encode(text), 0] for text in TEXTS]
SIZES = [len(row) for row in ROWS]
AT_POINTERS, AT_DOCUMENTS = 34 + 4 * 3, 34 + 12 * 3  # in the .idx of three rows


def by_description(prefix, rows, code=8, documents=None) -> None:
    """A pair written by the words of the format's description alone."""
    item = struct.calcsize("<" + DTYPE[code])
    documents = list(range(len(rows) + 1)) if documents is None else documents
    index, at = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + bytes([code]) + struct.pack("<QQ", len(rows), len(documents)), 0
    for row in rows:
        index += struct.pack("<i", len(row))
    for row in rows:
        index += struct.pack("<q", at)
        at += item * len(row)
    for bound in documents:
        index += struct.pack("<q", bound)
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(b"".join(struct.pack("<" + DTYPE[code], token) for row in rows for token in row))


def look(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call in this process."""
    code = 0
    try:
        inspect.main([str(a) for a in arguments])
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    return code, said.out, said.err


def patch(path: Path, at: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(bytes(raw))


@pytest.fixture
def pair(tmp_path):
    by_description(tmp_path / "x", ROWS)
    return tmp_path / "x"


def with_roles(prefix, rows=ROWS, role: int = 4) -> None:
    by_description(f"{prefix}.roles", [[role] * len(row) for row in rows], code=1)


def test_a_file_by_the_description_is_sound_and_is_our_writers_to_the_byte(pair, tmp_path, capsys):
    with_roles(pair)
    with Writer(tmp_path / "ours", {"": np.uint16, ".roles": np.uint8}) as writer:
        for row in ROWS:
            writer.add({"": np.array(row, np.uint16), ".roles": np.full(len(row), 4, np.uint8)})
        writer.commit()
    for ending in (".bin", ".idx", ".roles.bin", ".roles.idx"):
        assert (tmp_path / f"x{ending}").read_bytes() == (tmp_path / f"ours{ending}").read_bytes()
    code, out, err = look(capsys, pair)
    assert (code, err) == (0, "")
    assert "nothing is wrong" in out and "assistant 100.0 %" in out


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 65529), max_size=9), min_size=1, max_size=9),
    code=st.sampled_from([4, 5, 6, 7, 8]),
)
def test_any_rows_in_any_dtype_are_sound(tmp_path_factory, rows, code):
    prefix = tmp_path_factory.mktemp("any") / "x"
    by_description(prefix, rows, code)
    inspect.inspect(prefix, 2, own=True)  # raises where something is wrong (ids at random are no text)


def test_small_blocks_report_what_large_ones_do(pair, capsys, monkeypatch):
    with_roles(pair)
    patch(
        Path(f"{pair}.bin"), 2 * SIZES[0], struct.pack("<H", tokenizer.token_bytes().index(b"\xe6"))
    )  # half a character
    large = look(capsys, pair)
    for block in (1, 2, 3, 7):
        monkeypatch.setattr(check_index, "BLOCK", block)
        assert look(capsys, pair) == large
    assert f"in 1 of {len(ROWS)} rows, the first is row 1" in large[1]


def test_it_shows_lengths_ends_and_what_qa_trains(pair, capsys):
    code, out, _ = look(capsys, f"{pair}.idx", "--rows", "3")
    assert code == 0
    low, middle, high = sorted(SIZES)
    assert (
        f"tokens    {sum(SIZES)}; per row min {low}, median {middle}, mean {sum(SIZES) / 3:.1f}, 95 % {high}, max {high}"
        in out
    )
    assert "3 of 3 rows with token 0" in out and "valid UTF-8 in every row" in out
    assert (
        "Assistant:[[ Salt, wind.<end>]]" in out and "Assistant:[[ 盐、风和海鸥。<end>]]" in out
    )  # found by the headings
    assert "row 2: " in out and "  plain<end>" in out


def test_the_roles_file_decides_what_is_marked(pair, capsys):
    with_roles(pair, role=3)
    code, out, _ = look(capsys, f"{pair}.bin", "--rows=1")
    assert code == 0 and "[[" not in out.split("row 0")[1] and "row 1" not in out
    assert "roles     user 100.0 %" in out


def test_long_rows_are_cut_and_nothing_in_them_steers_the_terminal(tmp_path, capsys):
    by_description(tmp_path / "x", [[*tokenizer.encode("\x1b[31mred " * 500), 0]])
    _, out, _ = look(capsys, tmp_path / "x")
    assert "\x1b" not in out and "\\x1b[31mred" in out
    assert len(out) < 3000 and ", the first 400" in out


def test_several_rows_may_make_a_document(tmp_path, capsys):
    by_description(tmp_path / "x", ROWS, code=4, documents=[0, 2, 3])
    code, out, _ = look(capsys, tmp_path / "x")
    assert code == 0 and "3 rows, 2 documents (over 3 rows)" in out and "int32" in out


def test_reserved_ids_are_a_warning(tmp_path, capsys):
    by_description(tmp_path / "x", [[5, 65530, 0]])
    code, out, _ = look(capsys, tmp_path / "x")
    assert code == 0 and "byte 2: row 0, token 1 is 65530, a reserved id" in out and "<65530>" in out


def test_ids_of_another_vocabulary_are_reported_and_not_shown_as_text(tmp_path, capsys):
    by_description(tmp_path / "x", [[5, 6], [7, 151643, 8], [-1]], code=4)
    code, out, err = look(capsys, tmp_path / "x")
    assert code == 2 and "do not belong to the World vocabulary" in out and "row 0: " not in out
    assert "x.bin, byte 12: row 1, token 1 is 151643; the World vocabulary ends at 65529." in err
    assert "x.bin, byte 20: row 2, token 0 is -1;" in err


TOTAL = 2 * sum(SIZES)
DAMAGE = {
    "magic": (lambda p: patch(idx(p), 3, b"X"), ["x.idx, byte 3: an .idx file begins with"]),
    "version": (lambda p: patch(idx(p), 9, struct.pack("<Q", 7)), ["x.idx, byte 9: the version is 7"]),
    "dtype": (lambda p: patch(idx(p), 17, b"\x63"), ["x.idx, byte 17: the dtype code is 99"]),
    "no byte at all": (lambda p: idx(p).write_bytes(b""), ["x.idx, byte 0: the file ends inside its header"]),
    "header cut": (lambda p: cut(idx(p), 20), ["x.idx, byte 20: the file ends inside its header"]),
    "another file": (lambda p: idx(p).write_bytes(b"hello" * 20), ["x.idx, byte 0: an .idx file begins with"]),
    "sizes cut": (lambda p: cut(idx(p), 34 + 5), ["x.idx, byte 39: ends before the size of row 1"]),
    "pointers cut": (lambda p: cut(idx(p), AT_POINTERS + 16), ["byte 62: ends before the pointer of row 2"]),
    "documents cut": (lambda p: cut(idx(p), AT_DOCUMENTS + 8), ["byte 78: ends before entry 1 of the document index"]),
    "idx too long": (lambda p: grow(idx(p), b"abc"), ["x.idx, byte 102: its header", "3 bytes follow"]),
    "number of rows": (lambda p: patch(idx(p), 18, struct.pack("<Q", 2**62)), ["(4,611,686,018,427,387,904 rows by byte 18"]),
    "negative size": (lambda p: patch(idx(p), 38, struct.pack("<i", -5)), ["x.idx, byte 38: row 1 has -5 tokens"]),
    "size": (
        lambda p: patch(idx(p), 34, struct.pack("<i", SIZES[0] + 1)),
        [
            f"x.idx, byte {AT_POINTERS + 8}: row 1 points to byte {2 * SIZES[0]} of the .bin, but must begin at "
            f"{2 * SIZES[0] + 2}, where row 0 ends (its size: byte 34).",
            f"x.bin, byte {TOTAL}: ends in row 2, token {SIZES[2] - 1}; x.idx describes {TOTAL + 2} bytes.",
            "has 2 faults",
        ],
    ),
    "pointer": (
        lambda p: patch(idx(p), AT_POINTERS + 8, struct.pack("<q", 4)),
        [f"x.idx, byte {AT_POINTERS + 8}: row 1 points to byte 4 of the .bin", "has 1 fault:"],
    ),
    "first pointer": (
        lambda p: patch(idx(p), AT_POINTERS, struct.pack("<q", -8)),
        [f"x.idx, byte {AT_POINTERS}: row 0 points to byte -8 of the .bin, but must begin at 0", "has 1 fault:"],
    ),
    "document index": (
        lambda p: patch(idx(p), AT_DOCUMENTS + 16, struct.pack("<q", 9)),
        [f"x.idx, byte {AT_DOCUMENTS + 16}: entry 2 of the document index is 9; it must lie between 1", "has 1 fault:"],
    ),
    "first document": (
        lambda p: patch(idx(p), AT_DOCUMENTS, struct.pack("<q", 1)),
        [f"x.idx, byte {AT_DOCUMENTS}: entry 0 of the document index is 1; the first must be 0."],
    ),
    "last document": (
        lambda p: patch(idx(p), AT_DOCUMENTS + 24, struct.pack("<q", 2)),
        [f"x.idx, byte {AT_DOCUMENTS + 24}: entry 3 of the document index is 2; the last must be the number of rows, 3."],
    ),
    "bin cut": (
        lambda p: cut(bin_(p), 2 * SIZES[0] + 3),
        [f"x.bin, byte {2 * SIZES[0] + 3}: ends in row 1, token 1; x.idx describes {TOTAL} bytes."],
    ),
    "bin empty": (lambda p: cut(bin_(p), 0), ["x.bin, byte 0: ends in row 0, token 0"]),
    "bin longer": (lambda p: grow(bin_(p), b"abc"), [f"x.bin, byte {TOTAL}: 3 bytes more than x.idx describes ({TOTAL})."]),
    "no bin": (lambda p: bin_(p).unlink(), ["x.bin: there is no such file; it holds the tokens of x.idx."]),
    "role": (
        lambda p: (with_roles(p), patch(Path(f"{p}.roles.bin"), SIZES[0] + 2, b"\x63")),
        [f"x.roles.bin, byte {SIZES[0] + 2}: row 1, token 2 has the role 99"],
    ),
    "roles of other data": (
        lambda p: with_roles(p, [ROWS[1], ROWS[0], ROWS[2]]),
        [f"x.roles.idx, byte 34: row 0 has {SIZES[1]} roles for {SIZES[0]} tokens", "x.roles.idx, byte 38: row 1 has"],
    ),
    "roles of fewer rows": (lambda p: with_roles(p, ROWS[:2]), ["x.roles.idx, byte 18: describes 2 rows, but x.idx 3 rows"]),
    "roles of another dtype": (lambda p: by_description(f"{p}.roles", ROWS), ["x.roles.idx, byte 17: roles are dtype code 1"]),
    "roles torn": (
        lambda p: (with_roles(p), cut(Path(f"{p}.roles.bin"), 3)),
        ["x.roles.bin, byte 3: ends in row 0, token 3"],
    ),
    "roles without index": (lambda p: Path(f"{p}.roles.bin").write_bytes(b"1"), ["x.roles.idx: there is no such file"]),
    "everything": (
        lambda p: (
            patch(idx(p), 0, b"Q"), patch(idx(p), 38, struct.pack("<i", -5)),
            patch(idx(p), AT_DOCUMENTS, struct.pack("<q", 1)), patch(bin_(p), 0, b"\xff\xff"), with_roles(p, ROWS[:2]),
        ),
        ["byte 0: an .idx file begins", "byte 38: row 1 has -5", f"byte {AT_DOCUMENTS}: entry 0"],
    ),
}  # fmt: skip


def idx(prefix) -> Path:
    return Path(f"{prefix}.idx")


def bin_(prefix) -> Path:
    return Path(f"{prefix}.bin")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def grow(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("block", [1, 2, 1 << 16])
def test_a_torn_file_is_reported_with_its_exact_place(pair, capsys, monkeypatch, kind, block):
    monkeypatch.setattr(check_index, "BLOCK", block)
    damage, sentences = DAMAGE[kind]
    damage(pair)
    code, out, err = look(capsys, pair)
    assert code == 2 and "nothing is wrong" not in out
    for sentence in sentences:
        assert sentence in err


def test_ten_faults_of_a_kind_are_reported_and_the_rest_counted(tmp_path, capsys):
    by_description(tmp_path / "x", [[70000] * 30, [1] * 5], code=4)
    patch(tmp_path / "x.idx", 34 + 8 + 16, struct.pack("<q", 4))
    code, _, err = look(capsys, tmp_path / "x")
    assert code == 2 and err.count("is 70000") == 10 and "... and 20 more of this kind (id)" in err
    assert "has 31 faults" in err and "entry 0 of the document index is 4" in err
    assert "token 0 of the file is 70000" in err  # rows of a damaged index have no numbers


@settings(max_examples=3000 if EVERYTHING else 150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 101), st.integers(0, 255)), min_size=1, max_size=12),
    size=st.none() | st.integers(0, 120),
    which=st.sampled_from(["x.idx", "x.bin", "x.roles.idx", "x.roles.bin"]),
)
def test_no_damage_ends_in_a_traceback(tmp_path_factory, changes, size, which):
    prefix = tmp_path_factory.mktemp("fuzz") / "x"
    by_description(prefix, ROWS)
    with_roles(prefix)
    before = (prefix.parent / which).read_bytes()
    raw = bytearray(before)
    for at, value in changes:
        if at < len(raw):
            raw[at] = value
    (prefix.parent / which).write_bytes(bytes(raw[:size]))
    try:
        inspect.main([str(prefix)])
        code = 0
    except SystemExit as left:
        code = left.code
    assert code in (0, 2)
    if which.endswith(".idx") and bytes(raw[:size]) != before:
        assert code == 2 or documents_only(before, bytes(raw[:size]))


def documents_only(before: bytes, after: bytes) -> bool:
    """Rows may be grouped to documents in another way, and a file may say int16 for uint16; both are sound."""
    return len(before) == len(after) and before[:17] == after[:17] and before[18:AT_DOCUMENTS] == after[18:AT_DOCUMENTS]


def test_a_missing_file_is_answered_with_what_there_is(project_folder, capsys):
    by_description(project_folder / "data" / "sample", ROWS)
    code, _, err = look(capsys, "samples")
    assert (
        code == 2 and "data/samples.idx: there is no such file; did you mean sample? In data/ there is: sample." in err
    )
    assert look(capsys, "sample")[0] == look(capsys, "sample.bin")[0] == look(capsys, "sample.idx")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--row", "3"], "--row: is not an option; did you mean --rows?"),
        (["x", "--rows", "many"], "--rows=many: must be a whole number"),
        (["x", "--rows"], "--rows=: must be a whole number"),
        ([], "usage: python -m json2binidx.inspect NAME"),
        (["x", "y"], "usage: python -m json2binidx.inspect NAME"),
    ],
)
def test_what_cannot_be_understood_is_answered_with_what_can(capsys, arguments, words):
    code, _, err = look(capsys, *arguments)
    assert code == 2 and words in err


def test_the_command_works_alone_and_never_imports_torch(pair):
    call = [sys.executable, "-m", "json2binidx.inspect"]
    shown = subprocess.run([*call, str(pair)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert (shown.returncode, shown.stderr) == (0, "") and "nothing is wrong" in shown.stdout
    assert "usage:" in subprocess.run([*call, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cut(idx(pair), 40)
    torn = subprocess.run([*call, str(pair)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert torn.returncode == 2 and "Traceback" not in torn.stderr
    code = "import sys, rwkv_peft.cli.inspect as i; i.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    by_description(pair, ROWS)
    subprocess.run([sys.executable, "-c", code, str(pair)], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Peak memory on 64 MB of tokens and their roles is that on three rows, to a few blocks."""
    row = np.array(ROWS[0] * 1000, np.uint16)
    rows = (32 << 20) // len(row)
    with Writer(tmp_path / "large", {"": np.uint16}) as writer:
        for _ in range(rows):
            writer.add({"": row})
        writer.commit()
    by_description(tmp_path / "small", ROWS)
    code = (
        "import resource, sys, rwkv_peft.cli.inspect as i; i.main([sys.argv[1], '--rows', '0']); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peak = {}
    for name in ("small", "large"):
        call = [sys.executable, "-c", code, str(tmp_path / name)]
        done = subprocess.run(call, cwd=ROOT, check=True, capture_output=True, text=True)
        peak[name] = int(done.stdout.splitlines()[-1])  # kB
    assert peak["large"] - peak["small"] < 40 << 10
