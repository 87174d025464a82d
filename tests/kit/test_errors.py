"""Law 10: bad input never ends in a traceback. The words say where, what and what to do; the code is not 0; files stay."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from helpers import tiny
from helpers.training import config

from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors, exit_with

GOOD = json.dumps(tiny.CHATS[0], ensure_ascii=False).encode()
LINES_57 = b"\n".join([GOOD] * 56)


def bad_rows():
    return {
        "broken json": (
            LINES_57 + b'\n{"text": "x"',
            r"data/bad.jsonl:57: is not valid JSON: a bracket is missing",
        ),
        "no text": (
            b'{"txt": "x"}',
            "data/bad.jsonl:1: has none of the keys messages, conversations, instruction with output, prompt with completion, "
            "question with answer, text; it has 'txt'",
        ),
        "not utf-8": (GOOD + b'\n{"text": "\xff\xfe"}', "data/bad.jsonl:2: is not valid UTF-8, the encoding of"),
        "encoding unsure": (
            '{"text": "na\xefve"}'.encode("cp1252"),
            "data/bad.jsonl: is not UTF-8 (1 line at least), and its encoding cannot be told for sure",
        ),
        "no text at all": (
            b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
            "data/bad.jsonl: is a picture (PNG)",
        ),
        "a list": (b"[1, 2]", "data/bad.jsonl:1: must be a JSON object"),
        "a number": (b"7", "data/bad.jsonl:1: must be a JSON object like"),
        "text is null": (b'{"text": null}', 'data/bad.jsonl:1: its "text" must be a string, not null'),
        "both columns, both null": (b'{"messages": null, "text": null}', "data/bad.jsonl:1: its conversation must be"),
        "text is a list": (b'{"text": ["a"]}', 'its "text" must be a string, not a list'),
        "text is empty": (b'{"text": " "}', 'data/bad.jsonl:1: its "text" is empty'),
        "half a surrogate": (b'{"text": "\\ud800"}', "data/bad.jsonl:1: is not valid JSON"),
        "nan": (
            b'{"text": NaN}',
            "(the row holds NaN, or a number that is too large, which JSON does not have: it counts as null)",
        ),
        "deep": (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "data/bad.jsonl:1: "),
        "role": (b'{"messages": [{"role": "x", "content": "y"}]}', "data/bad.jsonl:1: message 1 has the role 'x'"),
        "no file content": (b"", "data/bad.jsonl: it has no rows; nothing was written"),
        "blank lines": (b"\n\n\n", "data/bad.jsonl: it has no rows; nothing was written"),
        "a very long line": (b'{"text": "' + b"a" * (50 << 20) + b'"}', "data/bad.jsonl:1: is longer than 32 MB"),
    }


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    from helpers.kit import Kit

    return Kit(tmp_path_factory.mktemp("errors") / "my kit")


@pytest.mark.smoke(4)
@pytest.mark.parametrize(("content", "words"), bad_rows().values(), ids=bad_rows())
def test_a_bad_row_is_named_with_its_line_and_earlier_files_stay(kit, content, words):
    data = kit.root / "data"
    for ending in ("bin", "idx", "roles.bin", "roles.idx"):
        (data / f"bad.{ending}").write_text("earlier")
    (data / "bad.jsonl").write_bytes(content)
    done = kit.run("make_tokenize.sh", "bad.jsonl", "--strict", "1", ok=False)
    assert words in done.stderr
    assert done.returncode == 2
    assert len(done.stderr) < 3000
    assert sorted(p.name for p in data.iterdir() if p.read_bytes() == b"earlier") == [
        "bad.bin", "bad.idx", "bad.roles.bin", "bad.roles.idx",
    ]  # fmt: skip
    assert len(list(data.iterdir())) == 5


def test_bad_rows_are_left_out_counted_and_reported_with_their_lines(kit):
    (kit.root / "data/many.jsonl").write_bytes(b"\n".join([GOOD, b"{", GOOD, b"[]", b"7"]))
    said = kit.run("make_tokenize.sh", "many.jsonl").stdout
    assert "read      data/many.jsonl: 5 rows (2 text), 2 kept" in said
    assert "rejected  3 rows (2 wrong type, 1 not JSON), all of them in data/many.rejects.jsonl:" in said
    assert [word for word in said.split() if word.startswith("data/many.jsonl:")][1:] == [
        f"data/many.jsonl:{n}:" for n in (2, 4, 5)
    ]
    result = [json.loads(line) for line in (kit.root / "data/many.rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"], r["row"]) for r in result] == [
        ("data/many.jsonl", 2, "not JSON", "{"), ("data/many.jsonl", 4, "wrong type", "[]"),
        ("data/many.jsonl", 5, "wrong type", "7"),
    ]  # fmt: skip


def test_a_file_without_a_good_row_reports_what_is_wrong_once_and_writes_nothing(kit):
    (kit.root / "data/all.jsonl").write_bytes(b"\n".join([b"{", b"[]", *[b"{"] * 10]))
    said = kit.run("make_tokenize.sh", "all.jsonl", ok=False).stderr.splitlines()
    assert [line.partition(": ")[0] for line in said[:2]] == ["data/all.jsonl:1", "data/all.jsonl:2"]
    assert (
        "(and lines 3, 4, 5, " in said[0]
        and said[2] == "... and 2 more"
        and "has no row that can be used; nothing was written" in said[3]
    )
    assert [p.name for p in (kit.root / "data").glob("all.*")] == ["all.jsonl"]


@pytest.mark.slow
def test_a_forgotten_empty_line_before_a_turn_is_reported_with_its_line(kit):
    kit.data("joined.jsonl", tiny.CHATS[0], {"text": "User: Hi\nAssistant: Hello"})
    said = kit.run("make_tokenize.sh", "joined.jsonl").stdout
    assert "1 row with what looks like a turn but is not written as the models know it: line 2 (Assistant:)" in said
    kit.data("joined.jsonl", {"text": "User: Hi\nAssistant: Hello"})
    assert (
        "LOSS_MASK=qa" in kit.run("make_tokenize.sh", "joined.jsonl").stdout
    )  # the data are to be fixed, not the mask


@pytest.mark.slow
def test_rows_above_max_tokens_are_dropped_with_their_lines_and_dropping_all_is_an_error(kit):
    kit.data("long.jsonl", *tiny.CHATS)
    said = kit.run("make_tokenize.sh", "long.jsonl", "1", "40").stdout
    assert "dropped   1 row (1 longer than MAX_TOKENS): line 5 (" in said
    before = (kit.root / "data/long.bin").read_bytes()
    done = kit.run("make_tokenize.sh", "long.jsonl", "1", "2", ok=False)
    assert (
        "every row was dropped (longer than MAX_TOKENS); nothing was written, earlier files are untouched"
        in done.stderr
    )
    assert (kit.root / "data/long.bin").read_bytes() == before


@pytest.mark.slow
def test_no_eof_leaves_the_end_of_documents_out(kit):
    from rwkv_peft.data.binidx import Reader

    kit.data("eof.jsonl", *tiny.CHATS)
    assert "### append_eof = False" in kit.run("make_tokenize.sh", "eof.jsonl", "--no-eof").stdout
    assert 0 not in Reader(kit.root / "data/eof").tokens
    kit.run("make_tokenize.sh", "eof.jsonl")
    assert (Reader(kit.root / "data/eof").tokens == 0).sum() == len(tiny.CHATS)


@pytest.mark.smoke(5)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.jsonl"], "data/nothing.jsonl: there is no such file. In data/ there is:"),
        (["xx.jsonl"], "data/xx.jsonl: there is no such file; did you mean x.jsonl? In data/ there is:"),
        (["x.jsonl", "0"], "EPOCHS=0: must be 1 or more"),
        (["x.jsonl", "1", "4096k"], "MAX_TOKENS=4096k: must be a whole number"),
        (["x.jsonl", "--noeof"], "--noeof: is not an option; did you mean --no-eof? There are --no-eof, --preview"),
        (["../output"], "holds no file that can be read (.jsonl, .json, .csv"),
        (["x.md"], "must end in one of .jsonl, .json, .csv"),
        (["x.jsonl", "--prompt-type", "rwkv-wrld"], "PROMPT_TYPE=rwkv-wrld  must be one of rwkv-world, "),
        (["x.jsonl", "--prompt-type"], "--prompt-type wants a value behind it"),
        (["x.jsonl", "--eot", "none"], "EOT=none  must be one of doc, blank, both, x17"),
        (["x.jsonl", "--map-keys", '{"promt": "x"}'], "has the key 'promt'; did you mean prompt?"),
        (
            ["x.jsonl", "--map-keys", '{"text": "body"}'],
            "MAP_KEYS names the column 'body', but no row of data/x.jsonl has it",
        ),
        (["x.jsonl", "--overlong", "split", "--target-length", "9"], "limits single turns, which cannot be split"),
        (["x.jsonl", "--valid-percent", "50"], "would hold out all of 1 different rows"),
        (["x.jsonl", "--workers", "0"], "WORKERS=0  must be 1 or more, or auto"),
        (["x.jsonl", "--handler", "Alpaca"], "did you mean alpaca?"),
        (["x.jsonl", "9" * 5000], "EPOCHS=99999999999999999999: is too large"),
        (["x.roles.jsonl"], "would write over what belongs to x; take a name"),
        (
            ["x.jsonl", "1", "2", "3"],
            "4 words where at most 3 belong (FILE EPOCHS MAX_TOKENS). Put quotes around a name",
        ),
        (["my", "x.jsonl", "3"], "x.jsonl: is no number, where EPOCHS and MAX_TOKENS belong. Put quotes around a name"),
    ],
)
def test_wrong_arguments_of_make_tokenize_are_named(kit, arguments, words):
    (kit.root / "data/x.md").write_text("x")
    (kit.root / "data/x.roles.jsonl").write_bytes(GOOD)
    (kit.root / "data/x.jsonl").write_bytes(GOOD)
    assert words in kit.run("make_tokenize.sh", *arguments, ok=False).stderr


def test_a_name_that_is_not_utf8_is_refused(kit):
    said = kit.run("make_tokenize.sh", "caf\udce9.jsonl", ok=False).stderr
    assert "caf?.jsonl: this name is not UTF-8; rename the file" in said


def test_tokenizing_asks_for_the_room_it_needs_before_it_writes(kit):
    kit.data("x.jsonl", *tiny.CHATS)
    said = kit.run("make_tokenize.sh", "x.jsonl", "999999999", ok=False).stderr
    assert "GB are needed. Nothing was written" in said
    assert not (kit.root / "data/x.bin").exists()


def training(shared_kit, name="wrong.sh", **settings):
    return shared_kit.run(shared_kit.set(to=name, **settings), ok=False).stderr


def test_typos_and_wrong_values_are_reported_together_with_their_lines(shared_kit):
    script = shared_kit.root / shared_kit.set(to="typo.sh", MICRO_BSZ="0", LR_FINAL="2e5x", QUANT="nf8")
    script.write_text(script.read_text().replace("\nSEED=", "\nSEDE=1\nSEED="))
    said = shared_kit.run("typo.sh", ok=False).stderr.splitlines()
    lines = {line.split("=")[0]: n for n, line in enumerate(script.read_text().splitlines(), 1) if "=" in line}
    assert said[0] == "typo.sh has 4 problems:"
    for name, words in (
        ("SEDE", "is not a setting; did you mean SEED?"),
        ("MICRO_BSZ", "must be 1 or more, or auto"),
        ("LR_FINAL", "must be a number, like 2e-5"),
        ("QUANT", "did you mean nf4?"),
    ):
        [row] = [row for row in said if f" {name}=" in row]
        assert row.startswith(f"  line {lines[name]:>3}  {name}=") and row.endswith(words)


def test_a_retired_name_says_what_became_of_it(shared_kit):
    script = shared_kit.root / shared_kit.set(to="old.sh")
    script.write_text(script.read_text().replace("\nSEED=", "\nDEEPSPEED_STRATEGY=deepspeed_stage_1\nSEED="))
    assert "is called STRATEGY here" in shared_kit.run("old.sh", ok=False).stderr


@pytest.mark.slow
def test_what_only_the_files_can_report_comes_in_the_same_form(shared_kit):
    said = training(shared_kit, N_LAYER="24", EMBD_SIZE="2048", DATA_PATH="nothing", lora_load="x.pth")
    assert "N_LAYER=24" in said and "but model/tiny.pth has 2; use auto" in said
    assert "but model/tiny.pth has 32; use auto" in said
    assert "data/nothing.bin and .idx: there is no such file. Tokenized data in data/: chat" in said
    assert "x.pth: there is no such run or checkpoint" in said
    assert "wrong.sh has 4 problems:" in said


class Evil:
    def __reduce__(self):
        return os.system, ("touch '" + os.environ["CANARY"] + "'",)


def models(folder):
    """Files that are no RWKV-7 -> the words."""
    torch.save({"blocks.0.att.time_maa_x": torch.zeros(1)}, folder / "v6.pth")
    torch.save({"x": torch.zeros(1)}, folder / "other.pth")
    torch.save({"emb.weight": torch.zeros(1), "x": Evil()}, folder / "evil.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps(Evil()))
    (folder / "half.pth").write_bytes((folder / "tiny.pth").read_bytes()[:5000])
    (folder / "empty.pth").write_bytes(b"")
    return {
        "v6.pth": "looks like RWKV-6 (x060), but a tensor that gives its size is missing",
        "other.pth": "is not an RWKV model",
        "evil.pth": "holds more than plain tensors",
        "pickle.pth": "is no .pth checkpoint",
        "half.pth": "is not complete: it was cut off after 5,000 bytes",
        "empty.pth": "is empty (0 bytes). Download it again",
        "missing.pth": "there is no such file. In model/ there is:",
    }


@pytest.mark.parametrize("name", ["v6.pth", "other.pth", "half.pth", "empty.pth", "missing.pth"])
def test_a_base_that_is_none_is_refused(ready, tmp_path, monkeypatch, name):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    words = models(ready / "model")[name]
    with pytest.raises(SettingErrors) as result:
        train.command(config(MODEL_PATH=name), [])
    [problem] = result.value.problems
    assert problem.name == "MODEL_PATH" and words in problem.message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evil.pth", "pickle.pth"])
def test_a_base_that_would_run_something_is_refused_and_runs_nothing(shared_kit, tmp_path, monkeypatch, name):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    words = models(shared_kit.root / "model")[name]
    done = shared_kit.run(
        shared_kit.set(to="wrong.sh", MODEL_PATH=name), ok=False, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"
    )
    assert f"MODEL_PATH={name}" in done.stderr and words in done.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
def test_torn_and_foreign_data_are_refused(shared_kit):
    data = shared_kit.root / "data"
    for ending in ("bin", "idx", "roles.bin", "roles.idx"):
        (data / f"torn.{ending}").write_bytes((data / f"chat.{ending}").read_bytes())
    (data / "torn.bin").write_bytes((data / "chat.bin").read_bytes()[:-100])
    assert "data/torn.bin: has" in (said := training(shared_kit, DATA_PATH="torn")) and "cut off" in said
    (data / "torn.bin").write_bytes((data / "chat.bin").read_bytes())
    import numpy

    from rwkv_peft.data.binidx import index_chunks

    (data / "torn.roles.bin").write_bytes(b"12345")
    (data / "torn.roles.idx").write_bytes(b"".join(index_chunks(numpy.array([2, 3]), "uint8")))
    assert "describes other rows than" in training(shared_kit, DATA_PATH="torn")


@pytest.mark.slow
def test_a_foreign_file_without_roles_trains_by_its_headings_and_says_so(shared_kit):
    data = shared_kit.root / "data"
    for ending in ("bin", "idx"):
        (data / f"foreign.{ending}").write_bytes((data / f"chat.{ending}").read_bytes())
    ours = shared_kit.run("training.sh", "--dry-run").stdout
    theirs = shared_kit.run(shared_kit.set(to="foreign.sh", DATA_PATH="foreign"), "--dry-run").stdout
    assert "foreign has no .roles file: who said what is found by the headings" in theirs
    pick = lambda text: text.split("one pass trains ")[1].split()[0]  # noqa: E731
    assert pick(ours) == pick(theirs)
    assert ours.split("--- sample 1")[1] == theirs.split("--- sample 1")[1]


@pytest.mark.slow
def test_a_token_outside_the_vocabulary_is_named(shared_kit):
    tiny.save_model(shared_kit.root / "model" / "small.pth", shape=tiny.geometry(vocab=512))
    said = training(shared_kit, MODEL_PATH="small.pth")
    assert "data/chat.bin: row 0 holds token" in said and "vocabulary ends at 511" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"DATA_PATH": "."}, "there is no such file"),
        ({"DATA_PATH": "chat/nothing/"}, "there is no such file"),
        ({"MODEL_PATH": "~nosuch.pth"}, "there is no such file"),
        ({"MODEL_PATH": "../model"}, "is a folder, not a .pth or .safetensors file"),
        ({"DATA_PATH": "chaat"}, "there is no such file; did you mean chat?"),
    ],
)
def test_odd_paths_are_answered(ready, settings, words):
    with pytest.raises(SettingErrors) as result:
        train.command(config(**settings), [])
    [problem] = result.value.problems
    assert problem.name in settings and words in problem.message


def test_chat_with_a_vocabulary_that_is_too_small_for_the_text_says_so(shared_kit):
    tiny.save_model(shared_kit.root / "model" / "small.pth", shape=tiny.geometry(vocab=512))
    said = shared_kit.run("chat.sh", "--model", "small.pth", "--prompt", "hello", ok=False).stderr
    assert "The model's vocabulary ends at 511" in said


def test_an_unknown_option_is_refused(shared_kit):
    said = shared_kit.run("training.sh", "--dry", ok=False).stderr
    assert (
        "--dry: is not an option; did you mean --dry-run? There are --dry-run, --new, --accept-edited, --find-lr, "
        in said
    )


def is_running(pid: str) -> bool:
    """Whether the process is there and more than a name that its parent has not asked about."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.smoke(2)
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_whatever_stops_tokenizing_leaves_nothing_and_no_one(tmp_path, number, code, workers):
    """The signal comes while rows are read, and some have been rejected."""
    from helpers.kit import ROOT

    script = ROOT / "make_tokenize.sh"
    program = (
        "import multiprocessing, os, sys\nsys.path.insert(0, sys.argv[1])\n"
        "import rwkv_peft.preprocess.tokenize as t, rwkv_peft.cli.tokenize as m\n"
        "from pathlib import Path\nfrom rwkv_peft.config.shell import parse_assignments\n"
        "original = t.Rejects.add\n"
        "def add(*a):\n    original(*a)\n    print(*[c.pid for c in multiprocessing.active_children()])\n"
        "    sys.stdout.flush()\n    os.kill(os.getpid(), int(sys.argv[3]))\n"
        "t.Rejects.add = add\n"
        "m.main([sys.argv[2], sys.argv[4], '--workers', sys.argv[5]], parse_assignments(Path(sys.argv[2])))\n"
    )
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [*tiny.CHATS, {"oops": 1}])
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), str(script), str(int(number)), str(path), workers],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    children = done.stdout.split()
    assert len(children) == (2 if workers == "2" else 0)
    assert not any(is_running(pid) for pid in children)


def test_a_missing_package_is_named_with_the_fix():
    from helpers.kit import ROOT

    code = (
        "import sys\nsys.modules['orjson'] = None\nsys.path.insert(0, sys.argv[1])\n"
        "import rwkv_peft.cli.tokenize as m\nm.main([sys.argv[1] + '/make_tokenize.sh', 'sample.jsonl'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, env=os.environ | {"SEED": "1"}
    )
    assert (
        done.returncode == 2 and "The Python package orjson is missing. Run ./test.sh or ./quickstart.sh" in done.stderr
    )


def test_a_message_that_quotes_a_foreign_name_cannot_steer_the_terminal(capsys):
    with pytest.raises(SystemExit):
        exit_with("model.pth: emb\x1b[2J\r is damaged\nGet it again.", 2)
    assert capsys.readouterr().err == "model.pth: emb\\x1b[2J\\r is damaged\nGet it again.\n"
