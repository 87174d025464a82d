"""What ./chat.sh loads: every method's checkpoint on its base, whole models, and states from anywhere."""

import pytest
import tiny
import torch
from test_adapters import OPTIONS
from test_merge import X, make_run, merge, result
from test_scripts import ROOT, shell_values

from rwkv_peft import chat, checkpoint
from rwkv_peft.errors import UserError
from rwkv_peft.methods import METHODS
from rwkv_peft.shell_vars import Script


def load(base_was_named=False, **changes):
    values = shell_values(ROOT / "chat.sh") | {"PRECISION": "fp32", "MODEL_PATH": ""} | changes
    return chat.load(Script(ROOT / "chat.sh", values).read(chat.ChatConfig), base_was_named)


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
    loaded, name, _ = load(ADAPTER=str(result("base-STATE-3-alone.pth")), MODEL_PATH="base.pth")
    assert torch.equal(loaded(X)[0], model(X)[0]) and "alone" in name
    tensors = checkpoint.load(folder / "rwkv-3.pth")
    checkpoint.save(project_folder / "wide.pth", {n: torch.zeros(2, 8, 8) for n in tensors})
    with pytest.raises(UserError, match="does not fit"):
        load(ADAPTER=str(project_folder / "wide.pth"), MODEL_PATH="base.pth")


def test_a_merged_state_is_begun_from(project_folder):
    _, base, model = make_run(project_folder, method="state")
    merge("r")
    loaded, _, _ = load(MODEL_PATH=str(result("base-STATE-3.pth")))
    assert torch.equal(loaded(X)[0], model(X)[0])
    assert not torch.equal(load(MODEL_PATH=str(base))[0](X)[0], model(X)[0])


def test_an_adapter_on_another_base_is_refused(project_folder):
    folder, base, _ = make_run(project_folder)
    other = tiny.save_model(project_folder / "model" / "other.pth", 1, tiny.geometry(2, 32, 64, 16))
    with pytest.raises(UserError, match="is not the file that .* was trained on"):
        load(True, ADAPTER=str(folder), MODEL_PATH=other.name)
    with pytest.raises(UserError, match="is a whole model, not an adapter"):
        load(ADAPTER=str(base))
