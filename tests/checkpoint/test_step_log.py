"""loss.jsonl, whatever has become of it: every record that is one stays, and what is missing is known."""

import json
import os

import pytest

from rwkv_peft.checkpoint import step_log
from rwkv_peft.common.errors import UserError
from rwkv_peft.train import loss_plot
from rwkv_peft.train.callbacks import samples, validation


def line(step: int, /, **more) -> str:
    record = {
        "step": step,
        "epoch": 0,
        "loss": 2.0,
        "lr": 1e-3,
        "tokens_per_s": 9.0,
        "seconds": 1.0 * step,
        "targets": 3,
    }
    return json.dumps(record | more) + "\n"


def log(folder, *lines: str | bytes):
    path = folder / step_log.FILE
    path.write_bytes(b"".join(text if isinstance(text, bytes) else text.encode() for text in lines))
    return path


FIVE = [line(step) for step in range(1, 6)]
NESTED = '{"step": 3, "loss": ' + "[" * 100_000 + "\n"
DAMAGED = {
    "torn": '{"step": 3, "lo\n',
    "nested": NESTED,
    "nested objects": NESTED.replace("[", '{"a":'),
    "of 10 MB": line(3, more="x" * 10_000_000),
    "NaN": line(3, loss=float("nan")),
    "infinite": line(3, loss=float("inf")),
    "overflowing": line(3).replace("2.0", "1e999"),
    "negative": line(3, loss=-1.0),
    "no number": line(3, seconds="x"),
    "a huge step": line(3, step=10**400),
    "a step of true": line(1, step=True),
    "a list": "[1, 2, 3]\n",
    "zeros": b"\0" * 4096 + b"\n",
    "other bytes": b"\xff\xfe\xfd\n",
    "empty": "\n",
    "blank": " \t \n",
    "of 5,000 digits": line(3).replace("2.0", "9" * 5000),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_behind_a_line_that_is_no_record_stays(tmp_path, what):
    log(tmp_path, *FIVE[:2], DAMAGED[what], *FIVE[3:])
    assert [r["step"] for r in step_log.read_log(tmp_path)] == [1, 2, 4, 5]
    for _ in range(2):
        records, repaired = step_log.truncate_log(tmp_path, 5)
        assert [r["step"] for r in records] == [1, 2, 4, 5]
    assert not repaired
    assert (tmp_path / step_log.FILE).read_text() == "".join([*FIVE[:2], *FIVE[3:]])
    assert (tmp_path / step_log.DAMAGED).stat().st_size


@pytest.mark.parametrize(
    "lines",
    [
        [FIVE[0], FIVE[0], *FIVE[1:]],
        [*FIVE[3:], *FIVE[:3]],
        [text.replace("\n", "\r\n") for text in FIVE],
        ["".join(FIVE).encode("utf-16")],
        ["".join(FIVE).encode("utf-8-sig")],
        [*FIVE[:4], "\n", FIVE[4].strip()],
        [line(2, loss=9.0), *FIVE],
    ],
    ids=["twice", "out of order", "CRLF", "UTF-16", "with a mark", "without its last line end", "two of one step"],
)
def test_records_are_kept_once_and_in_order(tmp_path, lines):
    log(tmp_path, *lines)
    assert step_log.truncate_log(tmp_path, 5)[1]
    assert (tmp_path / step_log.FILE).read_text() == "".join(FIVE)


@pytest.mark.parametrize("end", ["", '{"step": 4, "lo', FIVE[3], "".join(FIVE[3:]), "x\n" + FIVE[4]])
def test_what_came_after_a_step_is_cut_off_and_nothing_else_is_written(tmp_path, end):
    path = log(tmp_path, *FIVE[:3], end)
    inode = path.stat().st_ino
    records, repaired = step_log.truncate_log(tmp_path, 3)
    assert len(records) == 3 and not repaired
    assert path.read_text() == "".join(FIVE[:3]) and path.stat().st_ino == inode
    assert [p.name for p in tmp_path.iterdir()] == [step_log.FILE]


def test_the_lock_stays_with_a_log_that_is_repaired(tmp_path):
    path = log(tmp_path, "x\n", *FIVE)
    inode = path.stat().st_ino
    assert step_log.truncate_log(tmp_path, 5)[1] and path.stat().st_ino == inode


def test_an_empty_log_or_none_has_no_records(tmp_path):
    assert step_log.read_log(tmp_path) == [] and step_log.truncate_log(tmp_path, 7) == ([], False)
    assert step_log.find_gaps([], 7) == [[1, 7]] and step_log.find_gaps([], 0) == []


@pytest.mark.parametrize(
    ("steps", "last", "result", "words"),
    [
        ([1, 2, 3], 3, [], ""),
        ([1, 2, 3, 14], 14, [[4, 13]], "steps 4 to 13"),
        ([2, 4], 5, [[1, 1], [3, 3], [5, 5]], "step 1, step 3, step 5"),
        ([2, 4, 6], 8, [[1, 1], [3, 3], [5, 5], [7, 8]], "step 1, step 3, step 5 and 1 more gaps"),
    ],
)
def test_gaps_are_detected_and_named(steps, last, result, words):
    assert step_log.find_gaps(steps, last) == result
    assert step_log.describe_gaps(result) == words


@pytest.mark.parametrize(
    ("known", "new"),
    [
        ([[4, 13]], []), ([[1, 20]], []), ([[4, 12]], [[4, 13]]), (None, [[4, 13]]), ("abc", [[4, 13]]), ([5, [4]], [[4, 13]]),
        ([["a", "b"]], [[4, 13]]), ([[0, 10**400]], [[4, 13]]), ({"4": 13}, [[4, 13]]),
    ],
)  # fmt: skip
def test_a_gap_that_was_reported_of_is_not_new_whatever_a_manifest_says(known, new):
    assert step_log.find_new_gaps([[4, 13]], known) == new


@pytest.mark.pictures
@pytest.mark.parametrize("missing", [(), (3,), (3, 4), (1,)])
def test_the_picture_is_broken_and_grey_where_records_are_missing(tmp_path, monkeypatch, missing):
    from matplotlib.axes import Axes

    log(tmp_path, *(text for step, text in enumerate(FIVE, 1) if step not in missing))
    spans, drawn = [], {}
    monkeypatch.setattr(Axes, "broken_barh", lambda self, places, **_: spans.extend(places))
    real = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **more: drawn.update({more.get("label"): y}) or real(self, x, y, **more)
    )
    loss_plot.draw_loss(tmp_path)
    assert spans == ([(missing[0] - 0.5, len(missing))] if missing else [])
    assert int((drawn["each step"] != drawn["each step"]).sum()) == bool(missing and missing[0] > 1)


@pytest.mark.pictures
def test_steps_without_a_loss_are_no_gap(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    log(tmp_path, FIVE[0], line(2, loss=None), *FIVE[2:])
    monkeypatch.setattr(Axes, "broken_barh", lambda *_, **__: pytest.fail("there is no gap"))
    loss_plot.draw_loss(tmp_path)


@pytest.mark.pictures
def test_a_log_of_gaps_only_takes_linear_time(tmp_path):
    """Which squares of its lines would make hours of."""
    log(tmp_path, *(line(step) for step in range(2, 20_000, 2)))
    records, _ = step_log.truncate_log(tmp_path, 10**6)
    gaps = step_log.find_gaps([r["step"] for r in records], 20_000)
    assert (
        len(gaps) == 10_000
        and step_log.find_new_gaps(gaps, gaps) == []
        and step_log.find_new_gaps(gaps, gaps[1:]) == gaps[:1]
    )
    loss_plot.draw_loss(tmp_path)


@pytest.mark.parametrize("what", DAMAGED)
def test_validations_behind_a_damaged_line_stay(tmp_path, what):
    look = json.dumps({"step": 2, "loss": 1.0, "data": "d"})
    damaged = DAMAGED[what] if isinstance(DAMAGED[what], bytes) else DAMAGED[what].encode()
    if what == "no number":
        damaged = b'{"step": 2, "loss": "x"}\n'
    (tmp_path / validation.FILE).write_bytes(damaged + look.encode() + b"\n")
    assert validation.read(tmp_path) == [json.loads(look)]
    validation.truncate(tmp_path, 2)
    assert (tmp_path / validation.FILE).read_text() == look + "\n"


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"## step " + b"9" * 5000 + b"\n", b"\0" * 100])
def test_samples_of_any_bytes_are_cut(tmp_path, damage):
    path = tmp_path / samples.FILE
    path.write_bytes(b"## step 2\n" + damage + b"\n## step 4\nlater\n")
    assert samples.last_step(path) == 4
    samples.truncate(tmp_path, 2)
    assert path.read_bytes() == b"## step 2\n" + damage + b"\n"


def test_a_log_of_several_names_gets_a_copy_before_it_is_cut(tmp_path):
    path, other = log(tmp_path, *FIVE), tmp_path / "other"
    os.link(path, other)
    step_log.truncate_log(tmp_path, 3)
    assert path.read_text() == "".join(FIVE[:3]) and other.read_text() == "".join(FIVE)


def test_a_log_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "diary").write_text("dear")
    (tmp_path / step_log.FILE).symlink_to("diary")
    with pytest.raises(UserError, match=r"loss.jsonl: is a symbolic link to diary, and lines are added only to"):
        step_log.truncate_log(tmp_path, 3)
    assert (tmp_path / "diary").read_text() == "dear"
