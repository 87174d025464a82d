"""JSON that somebody else wrote: refused in words, whichever file it is in."""

import json
import os

import pytest
from helpers.training import config, run

from rwkv_peft.adapters.hf_peft import read_config
from rwkv_peft.chat import diagnose
from rwkv_peft.checkpoint import sidecars, step_log, train_state
from rwkv_peft.cli import train
from rwkv_peft.common import json_reader
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.data import report_file
from rwkv_peft.data.tokenized_files import detect_bos, read_form
from rwkv_peft.data.vocabulary_check import describe_vocabulary_problem
from rwkv_peft.preprocess.keys import columns
from rwkv_peft.text import template_file
from rwkv_peft.train.callbacks import validation

# text of a file -> what is said of it
HOSTILE = {
    "deep": (b"[" * 100_000, "nested deeper than 64 levels"),
    "deep and closed": (b'{"a":' * 900 + b"1" + b"}" * 900, "nested deeper than 64 levels"),
    "no end": (b'{"a": [1,', "is no JSON in line 1, column 10"),
    "a key twice": (b'{"rank": 4, "rank": 800}', 'has the key "rank" twice'),
    "NaN": (b'{"a": NaN}', "holds NaN"),
    "infinity": (b'{"a": -Infinity}', "holds -Infinity"),
    "a large fraction": (b'{"a": 1e999}', "holds 1e999, which is too large"),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "a whole number of 5,000 digits"),
    "30 digits": (b'{"a": ' + b"9" * 30 + b"}", "a whole number of 30 digits"),
    "not UTF-8": (b'{\n"a": "\xff"}', "is not UTF-8 in line 2"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
    "half of a pair": (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
    "half of a pair in a key": (b'{"\\ude00": 1}', "half of a surrogate pair"),
    "NUL": (b"\0" * 40, "is no JSON in line 1"),
    "empty": (b"", "is no JSON in line 1"),
    "two values": (b"{}{}", "Extra data"),
}
hostile = pytest.mark.parametrize("text, words", HOSTILE.values(), ids=HOSTILE)


@hostile
def test_text_that_is_no_plain_value_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        json_reader.parse_json(text)


@pytest.mark.parametrize(
    "text, value",
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('\ufeff{"a": 1}', {"a": 1}),
        (b'{"a": "' + b"[" * 500 + b'\\"' + b'"}', {"a": "[" * 500 + '"'}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b"[18446744073709551615, -9223372036854775808, 1e-400]", [2**64 - 1, -(2**63), 0.0]),
        (b"[" * 64 + b"]" * 64, None),
    ],
)
def test_sound_text_is_read_as_it_is(text, value):
    result = json_reader.parse_json(text)
    assert result == value or value is None


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="is longer than 1 MB"):
        json_reader.load_json(path, 1 << 20)


def test_a_pipe_and_a_folder_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="is a FIFO"):
        json_reader.read_json(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="cannot be read"):
        json_reader.read_json(tmp_path)


def sidecar(path, tmp_path):
    sidecars.read_sidecar(path.with_suffix(".pth"), ())


def template(path, tmp_path):
    template_file.load(path)


def peft_config(path, tmp_path):
    read_config(path)


def manifest(path, tmp_path):
    folder = tmp_path / "run/state/step-000003"
    folder.mkdir(parents=True)
    path.rename(folder / "manifest.json")
    train_state.read_manifest(folder)


def report(path, tmp_path):
    path.rename(tmp_path / "x.report.json")
    report_file.read(tmp_path / "x")


def form(path, tmp_path):
    path.rename(tmp_path / "x.report.json")
    read_form(tmp_path / "x")


@hostile
@pytest.mark.parametrize("read", [sidecar, template, peft_config, manifest, report, form])
def test_every_reader_of_a_file_names_it_and_what_is_wrong(tmp_path, read, text, words):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"{'manifest' if read is manifest else 'x'}.*json: .*{words}"):
        read(path, tmp_path)


@pytest.mark.parametrize("variable", ["MAP_KEYS", "ROLE_MAP"])
@pytest.mark.parametrize("name", [n for n in HOSTILE if n not in ("not UTF-8", "UTF-16", "empty")])
def test_settings_of_json_are_refused_by_their_name(variable, name):
    text, words = HOSTILE[name]
    with pytest.raises(SettingErrors, match=f"{variable}.*{words}"):
        columns(*([text.decode()] if variable == "MAP_KEYS" else ["", text.decode()]))


@hostile
def test_a_line_of_a_log_that_cannot_be_read_costs_no_other(tmp_path, text, words):
    whole = {"step": 1, "loss": 2.0, "seconds": 1.0, "targets": 3, "data": "x"}
    line = text.replace(b"\n", b" ") + b"\n"
    for name in ("loss.jsonl", "valid.jsonl"):
        lines = [json.dumps(whole).encode() + b"\n", line, json.dumps(whole | {"step": 3}).encode() + b"\n"]
        (tmp_path / name).write_bytes(b"".join(lines))
    for records in (step_log.read_log(tmp_path), validation.read(tmp_path), step_log.truncate_log(tmp_path, 9)[0]):
        assert [record["step"] for record in records] == [1, 3]


@pytest.mark.smoke(3)
@pytest.mark.parametrize(
    "content, words",
    [
        ([], "holds no JSON object"),
        ({"settings": 5}, "settings cannot be 5"),
        ({"settings": {"PROMPT_TYPE": 5, "EOT": "doc"}}, "PROMPT_TYPE cannot be 5"),
        ({"settings": {"PROMPT_TYPE": "qa", "EOT": "soon"}}, "EOT cannot be 'soon'"),
        ({"settings": {"BOS": "1"}}, 'BOS cannot be "1"'),
        ({"template": 5, "settings": {"PROMPT_TYPE": "qa", "EOT": "doc"}}, "template cannot be 5"),
        ({"template": {"format_user": 5}, "settings": {"PROMPT_TYPE": "qa", "EOT": "doc"}}, "its template"),
        ({"places": 5}, "places cannot be 5"),
        ({"files": {"x.bin": 5}}, "files cannot be"),
        ({"vocabulary": ["\x1b[2J"]}, "vocabulary cannot be"),
    ],
)
def test_a_report_of_wrong_types_is_refused_with_its_field(ready, content, words):
    prefix = ready / "data/chat"
    (ready / "data/chat.report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"chat.report.json: .*{words}"):
        read_form(prefix), detect_bos(prefix), describe_vocabulary_problem(prefix)


WRONG = {
    "tokens": ("abc", -1, None, True, 1e30, 1.5), "step": ("3", True), "steps": ("9", None, -1), "finished": (1, "no"),
    "world": (0, "1"), "settings": ([], 5), "became": ([], None), "plan": ([], {"rows": "x"}, {"world": -1}),
    "base": ({}, {"name": 5, "sha256": "0" * 64}, 5), "data": ({}, {"files": 5}, {"files": [5]}, []), "options": ([], 5),
    "start_sha256": (5, "x"), "optimizer": ([], {"a": 5}), "scaler": (5, {"scale": "x"}), "blocks": (5, ["a"], [-1]),
    "wandb": (5, []), "trackers": (5, {"wandb": 5}), "quant_kept": (5, [5]), "in_a_row": ("x", -1),
    "files": ([], {}, {"../../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def facts():
    """A manifest of a run."""
    return {
        "format": 1, "step": 3, "steps": 9, "finished": False, "world": 1, "settings": {}, "became": {}, "plan": {"rows": 2},
        "base": {"name": "x.pth", "sha256": "0" * 64, "mark": None}, "data": {"files": [{"name": "x", "sample": None}]},
        "options": {}, "start_sha256": None, "optimizer": {}, "scaler": None, "tokens": 7, "blocks": None, "wandb": None,
        "files": {f"{part}.safetensors": {"bytes": 1, "sha256": "0" * 64} for part in train_state.PARTS},
    }  # fmt: skip


@pytest.mark.parametrize("field, value", [(field, value) for field in WRONG for value in WRONG[field]])
def test_a_manifest_of_wrong_types_and_a_right_checksum_is_refused(tmp_path, facts, field, value):
    folder = tmp_path / "run/state/step-000003"
    folder.mkdir(parents=True)
    content = {**facts, field: value}
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": train_state.manifest_checksum(content)}))
    with pytest.raises(UserError, match="manifest.json: "):
        train_state.read_manifest(folder)


def test_a_manifest_as_a_run_writes_it_is_read(tmp_path, facts):
    folder = tmp_path / "run/state/step-000003"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({**facts, "sha256": train_state.manifest_checksum(facts)}))
    assert train_state.read_manifest(folder).step == 3


def reseal(folder):
    """Give a state that was changed the checksums of what it holds."""
    from rwkv_peft.common import hashing

    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        manifest["files"][name]["sha256"] = hashing.sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": train_state.manifest_checksum(manifest)}))


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    "part, how",
    [
        ("weights", "another name"),
        ("weights", "no safetensors"),
        ("optimizer", "another name"),
        ("optimizer", "another shape"),
        ("optimizer", "one is missing"),
        ("random", "another format"),
        ("random", "another shape"),
    ],
)
def test_a_state_of_other_tensors_with_right_checksums_is_refused_in_words(ready, part, how):
    from safetensors.torch import load_file, save_file

    run(ready, KEEP_LAST="1", EPOCH_COUNT="1")
    folder = next((ready / "output/run/state").glob("step-*"))
    path = folder / f"{part}.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = next(name for name in tensors if not name.endswith("/step"))
    if how == "another name":
        tensors[f"x{name}"] = tensors.pop(name)
    elif how == "another shape":
        tensors[name] = tensors[name].flatten()[:-1].clone()
    elif how == "one is missing":
        tensors = {n: t for n, t in tensors.items() if n not in (name, f"{name.rpartition('/')[0]}/step")}
    else:
        tensors[name] = tensors[name].bool()
    save_file(tensors, path)
    if how == "no safetensors":
        path.write_bytes(b"\xff" * 64)
    reseal(folder)
    with pytest.raises(UserError, match=r"step-\d+.*: does not fit"):
        train.command(config(KEEP_LAST="1", EPOCH_COUNT="2"), [])


def test_settings_of_a_run_of_wrong_types_are_refused_by_the_diagnosis(ready):
    run(ready)
    file = ready / "output/run/run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "EPOCH_COUNT": "many"}))
    with pytest.raises(UserError, match='run.json: EPOCH_COUNT cannot be "many"'):
        diagnose.read_run(file.parent)
