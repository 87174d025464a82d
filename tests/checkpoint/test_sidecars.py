"""Sidecars that were edited: reported with their fields, refused, and usable where the user says so; fields of wrong types."""

import contextlib
import json

import pytest
from helpers.chats import load
from helpers.merging import make_run, merge, result
from helpers.training import config, run

from rwkv_peft.checkpoint import sidecars
from rwkv_peft.checkpoint.base_template import find_base_template
from rwkv_peft.cli import chat, train
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.text.presets import PRESETS

OUT = object()


def change(path, **fields):
    """Edit a file of JSON as a person would; a field of OUT is taken out."""
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not OUT}, indent=2))


@pytest.fixture
def sealed(project_folder):
    """A run whose sidecar has checksums; returns its sidecar."""
    folder, _, _ = make_run(project_folder, parts=("att", "ffn"))
    path = folder / "rwkv-3.json"
    sidecars.write_sidecar(path, {**json.loads(path.read_text()), "template": None, "eot": None})
    return path


DOORS = {
    "merge": lambda *option: merge("r", "3", *option),
    "peft": lambda *option: merge("r", "3", "--export", "peft", *option),
    "chat": lambda *option: load(ADAPTER="r") if not option else load_accepting(ADAPTER="r"),
    "diagnose": lambda *option: diagnose(*option),
}


def load_accepting(**changes):
    from helpers.kit import ROOT
    from helpers.scripts import shell_values

    from rwkv_peft.chat import load as models
    from rwkv_peft.config.shell import Script

    values = shell_values(ROOT / "chat.sh") | {"PRECISION": "fp32", "MODEL_PATH": ""} | changes
    return models.load_chat_model(Script(ROOT / "chat.sh", values).read(chat.ChatConfig), False, True)


def diagnose(*option):
    from helpers.chats import ASKING

    # a run that was made by hand has no settings: what comes behind the sidecar is reported by another sentence
    with pytest.raises(UserError, match="run.json") if option else contextlib.nullcontext():
        chat.command(ASKING, ["--diagnose", "r", *option])


@pytest.mark.parametrize("door", DOORS)
def test_an_edited_sidecar_is_refused_with_its_fields_unless_it_is_accepted(sealed, door, capsys):
    change(sealed, alpha=800.0, quant_parts=[])
    with pytest.raises(
        UserError, match="r/rwkv-3.json: was edited: alpha, quant_parts are not as written.*--accept-edited"
    ):
        DOORS[door]()
    DOORS[door]("--accept-edited")
    assert "warning: output/r/rwkv-3.json: was edited: alpha, quant_parts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields, reported",
    [
        ({"alpha": 16.0}, "alpha is"),
        ({"rank": 5}, "rank is"),
        ({"rslora": False}, "rslora is"),
        ({"quant": "nf4"}, "quant is"),
        ({"step": OUT}, "does not say step"),
        ({"versions": OUT}, "versions is"),
        ({"geometry": {"version": "x070", "n_layer": 1, "n_embd": 64}}, "geometry is"),
        ({"checkpoint_sha256": "0" * 64}, "checkpoint_sha256 is"),
        ({"eot": "both"}, "eot is"),
        ({"quant_kept": ["x"], "parts": ["att"]}, "parts, quant_kept are"),
        ({sidecars.SEAL: {}}, "alpha, base, base_sha256, eot, epoch, geometry, method, quant and 6 more are"),
    ],
)
def test_every_change_is_noticed(sealed, fields, reported):
    change(sealed, **fields)
    with pytest.raises(UserError, match=f"rwkv-3.json: .*{reported}"):
        merge("r", "3")


def test_a_sidecar_as_it_was_written_and_one_of_an_earlier_version_are_used(sealed, capsys):
    merge("r", "3")
    change(sealed, **{sidecars.SEAL: OUT})
    merge("r", "3")
    said = capsys.readouterr()
    assert "was edited: " not in said.out + said.err and "which is the same" in said.out
    assert said.err.count("rwkv-3.json: has no checksums of its fields") == 1


def test_written_again_in_another_order_it_is_the_same(sealed):
    content = json.loads(sealed.read_text())
    sealed.write_text(json.dumps(dict(reversed(content.items())), indent=None, ensure_ascii=True))
    merge("r", "3")


@pytest.mark.parametrize(
    "fields",
    [
        {"geometry": {}},
        {"geometry": []},
        {"geometry": {"version": "x070", "n_layer": "2", "n_embd": 32}},
        {"geometry": {"version": "x070", "n_layer": -2, "n_embd": 32}},
        {"parts": 5},
        {"parts": ["att", 5]},
        {"parts": ["everything"]},
        {"rank": "4"},
        {"rank": 0},
        {"rank": True},
        {"rank": 4.0},
        {"alpha": "8"},
        {"alpha": -8},
        {"alpha": [8]},
        {"alpha": True},
        {"rslora": 1},
        {"rslora": "no"},
        {"quant": "nf5"},
        {"quant": ["nf4"]},
        {"quant": 4},
        {"quant_parts": "att"},
        {"quant_kept": [1]},
        {"method": ["lora"]},
        {"base": "../base.pth"},
        {"base": "a\0b"},
        {"base_path": "a\0b"},
        {"base_path": 5},
        {"base_sha256": "abc"},
        {"base_mark": [1, "2"]},
        {"checkpoint_sha256": 5},
        {"epoch": -1},
        {"step": 1.5},
        {"epoch_finished": 1},
        {"dropout": 2},
        {"data": [["x", 5]]},
        {"bos": 2},
        {"blank_lines": 0},
        {"template": "rwkv-world"},
        {"prompt_type": {}},
        {"versions": []},
        {"merged": [5]},
        {"weights": ["1"]},
        {sidecars.SEAL: 5},
        {sidecars.SEAL: {"alpha": 5}},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
def test_a_field_of_a_wrong_type_is_refused_by_its_name(tmp_path, fields):
    [name] = fields
    (tmp_path / "rwkv-3.json").write_text(json.dumps({"method": "lora", **fields}))
    with pytest.raises(UserError, match=f"rwkv-3.json: {name} cannot be "):
        sidecars.read_sidecar(tmp_path / "rwkv-3.pth", ())


@pytest.mark.parametrize("fields", [{"geometry": {}}, {"parts": 5}])
@pytest.mark.parametrize("door", ["merge", "peft", "chat", "diagnose"])
def test_every_door_validations_at_types(sealed, door, fields):
    change(sealed, **fields)
    with pytest.raises(UserError, match=f"rwkv-3.json: {[*fields][0]} cannot be "):
        DOORS[door]()


def test_training_that_begins_with_an_edited_checkpoint_asks_for_the_option(ready, capsys):
    run(ready, "first")
    note = ready / "output/first/rwkv-0.json"
    assert {*json.loads(note.read_text())[sidecars.SEAL]} == {*json.loads(note.read_text())} - {sidecars.SEAL}
    change(note, step=77)
    begin = config(RUN_NAME="second", lora_load="first")
    with pytest.raises(SettingErrors, match="lora_load.*rwkv-0.json: was edited: step is not as written"):
        train.command(begin, ["--dry-run"])
    train.command(begin, ["--dry-run", "--accept-edited"])
    assert "It is used as it is" in capsys.readouterr().err


def test_a_merged_model_has_checksums_of_its_own(sealed, capsys):
    change(sealed, alpha=16.0)
    merge("r", "3", "--accept-edited")
    note = result().with_suffix(".json")
    assert sidecars.edited_fields(json.loads(note.read_text())) == []
    load(MODEL_PATH=str(result()))
    change(note, prompt_type="rwkv-qa", template=PRESETS["rwkv-qa"].to_dict())
    for use in (
        lambda: load(MODEL_PATH=str(result())),
        lambda: merge(result(), "--export", "safetensors"),
        lambda: merge("--average", result(), result()),
    ):
        with pytest.raises(UserError, match="base-r-3.json: was edited: "):
            use()
    assert find_base_template(result()).trained is False  # make_tokenize.sh goes by its name then
    load_accepting(MODEL_PATH=str(result()))
    merge(result(), "--export", "safetensors", "--accept-edited")


def test_the_option_is_reported_by_every_command():
    import rwkv_peft.cli.merge as door

    assert all(sidecars.ACCEPT in words for words in (door.USAGE, chat.__doc__, train.__doc__))


def test_a_sidecar_that_cannot_be_read_is_no_name_of_a_merged_model(sealed):
    merge("r", "3")
    result().with_suffix(".json").write_bytes(b"[" * 100_000)
    merge("r", "3")  # gets another name: what is there may be somebody's
    assert result("base-r-3-v2.pth").is_file()
