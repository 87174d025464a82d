"""Messages report the cause: of names, links, settings that are nothing in float32, and steps that come to no number."""

import errno
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import tiny
from helpers.kit import ROOT
from helpers.settings import problems
from helpers.training import config, run
from safetensors.torch import save_file

from rwkv_peft.checkpoint import pth, train_state
from rwkv_peft.cli import train
from rwkv_peft.cli.tokenize import find as find_data
from rwkv_peft.common import formatting, names, paths
from rwkv_peft.common.errors import SettingErrors, UserError, exit_with
from rwkv_peft.common.formatting import plural
from rwkv_peft.merge.write import merged_place
from rwkv_peft.preprocess import files
from rwkv_peft.text import preset_names

BAD = {
    "a\nb": "holds a line break",
    "a\rb": "holds a line break",
    "a\u2028b": "holds a line break",
    "a\u0085b": "holds a line break",
    "a\x1b[31mb": r"holds a control character (\x1b)",
    "a\x00b": r"holds a control character (\x00)",
    "a\x7f": r"holds a control character (\x7f)",
    "a\tb": r"holds a control character (\t)",
    "a\u202eb": "holds RIGHT-TO-LEFT OVERRIDE (U+202E), which is not seen",
    "a\u2066b": "holds LEFT-TO-RIGHT ISOLATE (U+2066)",
    "a\u200b": "holds ZERO WIDTH SPACE (U+200B)",
    "\ufeffa": "holds ZERO WIDTH NO-BREAK SPACE (U+FEFF)",
    "a\u200d": "holds ZERO WIDTH JOINER (U+200D)",
    "a\u00adb": "holds SOFT HYPHEN (U+00AD)",
    "a\U000e0041b": "holds TAG LATIN CAPITAL LETTER A (U+E0041)",
    "a\udce9": "is not UTF-8",
    " a": "begins or ends with a blank",
    "a ": "begins or ends with a blank",
    "a\u3000": "begins or ends with a blank",
    "a\u00a0": "begins or ends with a blank",
    "-a": 'begins with "-", like an option',
}
GOOD = [
    "a",
    "a b",
    "数据",
    "caf\u00e9",
    "cafe\u0301",
    "`a`",
    "a*",
    "$(x)",
    "🦜",
    "👩\u200d🚀",
    "می\u200cخواهم",
    "a.b",
    "_",
    "a;b",
    "'",
    '"',
    "a-",
    "%s",
    "é" * 40,
]


@pytest.mark.parametrize(("name", "why"), BAD.items(), ids=map(ascii, BAD))
@pytest.mark.parametrize("setting", ["RUN_NAME", "WANDB", "SWANLAB", "TRACKIO"])
def test_a_name_that_others_cannot_list_or_type_is_refused(setting, name, why):
    assert problems(**{setting: name})[setting].startswith(why)


@pytest.mark.parametrize("name", GOOD)
def test_an_unusual_name_is_a_name(name):
    assert not names.describe_fault(name) and names.escape_invisible(name) == name
    assert config(RUN_NAME=name, WANDB=name).run_name == name


@pytest.mark.parametrize("name", ["a\nb.pth", "a\x1b[2Jb.pth", "a\u202egpj.pth"])
def test_a_base_of_such_a_name_is_refused(name):
    assert problems(MODEL_PATH=name)["MODEL_PATH"].startswith("holds ")


@pytest.mark.parametrize("name", [n for n in BAD if "\x00" not in n and "\udce9" not in n], ids=ascii)
def test_data_of_such_a_name_are_refused_before_they_are_read(project_folder, monkeypatch, name):
    tiny.write_jsonl(project_folder / "data" / f"{name}.jsonl", tiny.CHATS[:1])
    monkeypatch.setattr(files, "blocks", None)
    with pytest.raises(UserError, match="this name (holds|begins)"):
        find_data(str(project_folder / "data" / f"{name}.jsonl"))


def test_tokens_of_such_a_name_are_refused(ready):
    for ending in ("bin", "idx"):
        (ready / "data" / f"chat.{ending}").rename(ready / "data" / f"-chat.{ending}")
    with pytest.raises(SettingErrors, match='DATA_PATH: this name begins with "-", like an option; rename the files'):
        train.command(config(DATA_PATH="-chat"), ["--dry-run"])


@pytest.mark.parametrize("name", ["a\nb", "tiny-run-0 ", "-x"])
def test_no_result_of_a_merge_gets_such_a_name(name):
    with pytest.raises(UserError, match="this name .*; rename the base or the folder of the run") as reported:
        merged_place(name, ".gguf")
    assert "\n" not in str(reported.value)


@pytest.mark.parametrize("name", ["a\nb.json", "my.json ", "my.json:x\u202e", "-my.json"])
def test_no_template_has_such_a_name(name):
    with pytest.raises(SettingErrors, match="PROMPT_TYPE: (holds|begins)"):
        preset_names.find_template(name)


def test_a_message_never_reports_the_terminal_what_to_do(capsys):
    with pytest.raises(SystemExit):
        exit_with("x\x1b]0;title\x07: one\nline \u202e", 2)
    assert capsys.readouterr().err == "x\\x1b]0;title\\x07: one\nline \\u202e\n"
    assert formatting.join_names(["a\nb", "c\x1b[31m"]) == "a\\nb, c\\x1b[31m"


@pytest.fixture
def links(project_folder):
    """Links of several kinds, by the name that a setting would give them."""
    (project_folder / "data" / "self.jsonl").symlink_to("self.jsonl")
    (project_folder / "data" / "gone.jsonl").symlink_to("nothing.jsonl")
    (project_folder / "data" / "one.idx").symlink_to("one.idx")
    (project_folder / "data" / "my.json").symlink_to("my.json")
    (project_folder / "model" / "self.pth").symlink_to("self.pth")
    (project_folder / "model" / "gone.pth").symlink_to("elsewhere.pth")
    return project_folder


def test_a_link_that_leads_nowhere_is_called_that(links):
    loop = "is a link that leads to itself"
    for name, reported in (("self.jsonl", loop), ("gone.jsonl", "is a link to nothing.jsonl, which is not there")):
        with pytest.raises(UserError, match=f"data/{name}: {reported}.$"):
            files.named(name)
    for name, reported in (("self.pth", loop), ("gone.pth", "is a link to elsewhere.pth, which is not there")):
        with pytest.raises(UserError, match=f"model/{name}: {reported}"):
            pth.read_header(paths.resolve_model(name))
    with pytest.raises(SettingErrors, match=f"my.json: {loop}"):
        preset_names.find_template("my.json")
    with pytest.raises(SettingErrors) as result:
        train.command(config(MODEL_PATH="self.pth", DATA_PATH="one"), ["--dry-run"])
    assert all(loop in problem.message and "did you mean" not in problem.message for problem in result.value.problems)


@pytest.mark.parametrize(
    ("setting", "value", "reported"),
    [
        ("SEED", "-999999999999999999", "must be 0 or more"),
        ("SEED", "-" + "9" * 400, "must be 0 or more"),
        ("SEED", "9" * 400, "is too large"),
        ("CTX_LEN", "-" + "9" * 40, "must be 1 or more"),
        ("ADAM_EPS", "1e-300", "is 0 in float32"),
        ("ADAM_EPS", "5e-46", "is 0 in float32"),
        ("ADAM_EPS", "1e39", "is infinite in float32"),
    ],
)
def test_a_number_out_of_bounds_is_reported_by_the_bound_that_it_breaks(setting, value, reported):
    assert problems(**{setting: value})[setting].startswith(reported)


def test_the_smallest_number_of_float32_is_one():
    assert config(ADAM_EPS="1e-45").adam_eps == 1e-45


def test_one_is_not_many(ready):
    assert plural(1, "token") == "1 token"
    with pytest.raises(SettingErrors, match="is too short: 1 token ends before any answer begins"):
        train.command(config(CTX_LEN="1"), ["--dry-run"])


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1 byte"), (999, "999 bytes"), (1000, "1 kB"), (1.5e6, "1.5 MB"), (2.5e9, "2.50 GB")]
)
def test_a_size_has_the_unit_that_shows_it(number, text):
    assert formatting.format_size(number) == text


def too_large(root, where: str) -> None:
    """A base whose every number is finite, and whose answers are not."""
    tensors = tiny.tensors()
    tensors[where] = torch.full_like(tensors[where], 3e38)
    pth.save(root / "model" / "large.pth", tensors)


@pytest.mark.parametrize("limit", ["2", "99"])
def test_a_base_that_gives_no_number_is_not_blamed_on_the_learning_rate(ready, limit):
    too_large(ready, "head.weight")
    with pytest.raises(UserError, match="LR_INIT is not the cause: the model gives no number") as reported:
        run(ready, MODEL_PATH="large.pth", NAN_LIMIT=limit)
    assert "too high" not in str(reported.value)


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_nan_in_a_state_is_not_blamed_on_the_learning_rate(tmp_path, part):
    save_file({"a": torch.tensor([1.0, math.nan])}, tmp_path / f"{part}.safetensors")
    with pytest.raises(UserError, match=f"a in {part}.safetensors holds NaN.*goes on from an earlier state"):
        train_state.TrainState(tmp_path, {}).tensors(part)


def test_numbers_that_fp16_does_not_hold_are_reported_as_that(ready):
    tensors = tiny.tensors()
    tensors["blocks.0.ffn.key.weight"][0, 0] = 1e5
    pth.save(ready / "model" / "large.pth", tensors)
    with pytest.raises(UserError, match=r"do not fit into PRECISION=fp16, as in blocks.0.ffn.key.*; use bf16 or fp32"):
        run(ready, MODEL_PATH="large.pth", NAN_LIMIT="2", PRECISION="fp16")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/dev/shm") or os.geteuid() != 0, reason="needs a small /dev/shm of its own")
@pytest.mark.parametrize("holds", ["4k", "20k"])
def test_a_full_shared_memory_is_named_where_a_worker_dies_of_it(ready, holds):
    """In a mount namespace of its own, /dev/shm holds so much."""
    code = (
        "import sys\nsys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']\nfrom pathlib import Path\n"
        "from helpers.training import config\nfrom rwkv_peft.cli import train\nfrom rwkv_peft.common import "
        "paths\nfrom rwkv_peft.common.errors import handle_errors\n"
        "paths.ROOT = Path(sys.argv[2])\npaths.OUTPUT = paths.ROOT / 'output'\n"
        "with handle_errors():\n    train.command(config(NUM_WORKERS='1'), [])\n"
    )
    small = f'mount -t tmpfs -o size={holds} tmpfs /dev/shm || exit 77; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", small, "-", sys.executable, "-c", code, str(ROOT), str(ready)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mount namespace may be made here")
    assert done.returncode in (3, 5), done.stderr
    assert "/dev/shm" in done.stderr and "NUM_WORKERS=0 needs none" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("refused", [pytest.param("memory", id="memory"), pytest.param("files", id="files")])
def test_a_sound_table_is_not_called_unreadable_where_memory_or_files_ran_out(tmp_path, monkeypatch, refused):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    from rwkv_peft.preprocess import tables

    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    error = (
        pa.ArrowMemoryError("malloc of size 64 failed")
        if refused == "memory"
        else OSError(errno.EMFILE, "Too many open files")
    )

    def none_left(*_a, **_k):
        raise error

    monkeypatch.setattr(parquet, "ParquetFile", none_left)
    monkeypatch.setattr(tables, "resource_limit", lambda kind: 1 << 30)  # as under ulimit -v
    with pytest.raises(type(error)):
        list(tables.columnar(tmp_path / "x.parquet"))


def test_a_pipe_in_place_of_questions_is_named_and_not_waited_for(tmp_path):
    from rwkv_peft.train.checks import read_questions

    os.mkfifo(tmp_path / "q.txt")
    with pytest.raises(SettingErrors) as reported:
        read_questions(str(tmp_path / "q.txt"))
    assert "SAMPLE_PROMPTS" in str(reported.value) and "is a FIFO" in str(reported.value)
