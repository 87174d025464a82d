"""What ./chat.sh loads: every method's checkpoint on its base, whole models, and states from anywhere."""

import pytest
import torch
from helpers import tiny
from helpers.adapters import OPTIONS
from helpers.chats import load
from helpers.kit import ROOT
from helpers.merging import X, make_run, merge, result, write_sidecar
from helpers.scripts import shell_values

from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import pth
from rwkv_peft.cli import chat
from rwkv_peft.common.errors import UserError
from rwkv_peft.config.shell import Script
from rwkv_peft.export import EXPORTS


@pytest.mark.smoke
@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_any_method_talks_as_it_was_trained(project_folder, method, version):
    _, _, model = make_run(project_folder, method=method, version=version)
    loaded, name, sidecar = load(ADAPTER="latest")
    torch.testing.assert_close(loaded(X)[0], model(X)[0], rtol=1e-5, atol=1e-5)
    assert sidecar["method"] == method and ("+" in name) != METHODS[method].saves_model


def test_a_state_from_anywhere_needs_its_base_and_nothing_else(project_folder, monkeypatch):
    monkeypatch.setitem(OPTIONS, "state", {"shifts": False})
    folder, _, model = make_run(project_folder, method="state")
    merge("r", "--export", "state")
    loaded, name, _ = load(ADAPTER=str(result("base-r-3-alone.pth")), MODEL_PATH="base.pth")
    torch.testing.assert_close(loaded(X)[0], model(X)[0], rtol=1e-5, atol=1e-5)
    assert "alone" in name
    tensors = pth.load(folder / "rwkv-3.pth")
    pth.save(project_folder / "wide.pth", {n: torch.zeros(2, 8, 8) for n in tensors})
    with pytest.raises(UserError, match="does not fit"):
        load(ADAPTER=str(project_folder / "wide.pth"), MODEL_PATH="base.pth")


def test_a_merged_state_is_begun_from(project_folder):
    _, base, model = make_run(project_folder, method="state")
    merge("r")
    loaded, _, _ = load(MODEL_PATH=str(result("base-r-3.pth")))
    torch.testing.assert_close(loaded(X)[0], model(X)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(load(MODEL_PATH=str(base))[0](X)[0], model(X)[0], rtol=1e-3, atol=1e-3)


def test_typed_bytes_that_are_no_text_become_question_marks():
    config = Script(ROOT / "chat.sh", shell_values(ROOT / "chat.sh")).read(chat.ChatConfig)
    assert chat.command_line(["--system", "a\udcff"], config).config.system == "a?"


def test_an_adapter_on_another_base_is_refused(project_folder):
    folder, base, _ = make_run(project_folder)
    other = tiny.save_model(project_folder / "model" / "other.pth", 1, tiny.geometry(2, 32, 64, 16))
    with pytest.raises(
        UserError, match="is not the file that .* was trained on.* with ./chat.sh --model FILE --adapter"
    ):
        load(True, ADAPTER=str(folder), MODEL_PATH=other.name)
    with pytest.raises(UserError, match="is a whole model, not an adapter"):
        load(ADAPTER=str(base))


def test_a_base_that_has_moved_is_asked_for_by_the_options_and_detected_in_merge_too(project_folder):
    folder, base, model = make_run(project_folder)
    base.rename(project_folder / "merge" / "moved.pth")
    with pytest.raises(
        UserError, match="base.pth: there is no such file.* or name it with ./chat.sh --model FILE --adapter"
    ):
        load(ADAPTER=str(folder))
    torch.testing.assert_close(load(True, ADAPTER=str(folder), MODEL_PATH="moved")[0](X)[0], model(X)[0])


def test_the_scripts_adapter_is_left_out_aloud_where_another_model_is_asked_for(capsys):
    config = Script(ROOT / "chat.sh", shell_values(ROOT / "chat.sh") | {"ADAPTER": "latest"}).read(chat.ChatConfig)
    words = "ADAPTER=latest of the script is left out"
    assert chat.command_line(["--model", "x"], config)[0].adapter == "" and words in capsys.readouterr().err
    for typed in (["--model", "x", "--adapter", "y"], ["--model", "x", "--adapter", ""], ["--seed", "1"], []):
        chat.command_line(typed, config)
        assert not capsys.readouterr().err


@pytest.mark.parametrize("setting", ["MODEL_PATH", "ADAPTER"])
@pytest.mark.parametrize(
    ("ending", "program"),
    [(".st", "Ai00"), (".bf16.gguf", "llama.cpp"), (".state", "Ai00"), (".rwkvcpp.bin", "rwkv.cpp")],
)
def test_a_file_for_another_program_is_reported_from_a_model(setting, ending, program):
    with pytest.raises(UserError, match=f"reads .pth, and this file is for {program}.* Use merge/x-run-1.pth"):
        load(**{setting: f"merge/x-run-1{ending}"})


def test_every_export_that_chat_cannot_read_says_which_program_reads_it():
    assert all(one.ending in (".pth", "") or one.program for one in EXPORTS.values())


def test_a_file_of_the_run_that_is_missing_is_named(project_folder):
    folder, base, _ = make_run(project_folder, method="pissa")
    write_sidecar(folder, base, method="pissa", start_sha256="0" * 64, **OPTIONS["pissa"])
    (folder / "init_pissa.pth").unlink()
    with pytest.raises(UserError, match="output/r/init_pissa.pth: is missing. .* copy init_pissa.pth from the run"):
        load(ADAPTER=str(folder))
    (folder / "rwkv-3.json").unlink()
    with pytest.raises(UserError, match="output/r/rwkv-3.json: is missing, .* Copy rwkv-3.json from the run"):
        load(ADAPTER=str(folder))
