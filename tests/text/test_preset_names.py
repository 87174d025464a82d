"""What a run was trained in is what it is served in: a template's content is kept beside its name."""

import dataclasses
import json

import pytest

from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.data.tokenized_files import Form, common_form, read_form
from rwkv_peft.text import presets
from rwkv_peft.text.preset_names import recorded_template
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.template import Template


@pytest.mark.parametrize("name", PRESETS)
def test_a_template_comes_back_from_json_as_it_was(name):
    content = json.loads(json.dumps(PRESETS[name].to_dict()))
    assert Template.from_dict(content) == PRESETS[name]
    assert set(content) == {field.name for field in dataclasses.fields(Template)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop_words": "x"}, "stop_words must be a list of texts, not 'x'"),
        ({"clean": ["user", "nobody"]}, "clean holds 'nobody', which is no role"),
        ({"strip": "yes"}, "strip cannot be 'yes'"),
        ({"opening": 7}, "opening cannot be 7"),
        ({"of_tomorrow": 1}, "has the field 'of_tomorrow', which this version of the kit does not know"),
    ],
)
def test_a_recorded_template_that_cannot_be_read_is_named(change, words):
    with pytest.raises(UserError) as error:
        recorded_template({"template": PRESETS["rwkv-g1"].to_dict() | change}, "rwkv-0.json")
    assert words in str(error.value) and "rwkv-0.json" in str(error.value)


@pytest.mark.parametrize("content", [{}, {"name": "x"}, [], 7])
def test_what_is_no_template_is_refused_in_words(content):
    with pytest.raises(UserError, match="its template"):
        recorded_template({"template": content}, "rwkv-0.json")


def test_the_content_counts_more_than_the_name():
    written = dataclasses.replace(PRESETS["rwkv-g1"], format_user="Q: {{content}}")
    assert recorded_template({"template": written.to_dict(), "prompt_type": "rwkv-world"}, "x") == written
    assert recorded_template({"prompt_type": "rwkv-world"}, "x") == PRESETS["rwkv-world"]
    assert recorded_template({"prompt_type": None}, "x") is None
    with pytest.raises(SettingErrors):
        recorded_template({"prompt_type": "gone.json"}, "x")


def test_a_name_in_a_file_of_an_older_version_means_what_it_meant_then(monkeypatch):
    monkeypatch.setitem(presets.BEFORE, "rwkv-g1", "rwkv-qa")
    assert recorded_template({"prompt_type": "rwkv-g1"}, "x") == PRESETS["rwkv-qa"]
    reported = {"prompt_type": "rwkv-g1", "template": PRESETS["rwkv-g1"].to_dict()}
    assert recorded_template(reported, "x") == PRESETS["rwkv-g1"]


def test_the_report_of_tokenized_data_holds_their_template(tmp_path):
    from helpers.training import tokenize

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Q", "answer": "A"}\n', encoding="utf-8")
    tokenize(rows, PROMPT_TYPE="rwkv-g1-think")
    form = read_form(tmp_path / "rows")
    assert form == Form("rwkv-g1-think", "doc", PRESETS["rwkv-g1-think"])
    assert (
        common_form([form, form]) == form
        and common_form([form, form._replace(eot="x17")]) is None
        and common_form([]) is None
    )
    report = tmp_path / "rows.report.json"
    content = json.loads(report.read_text())
    del content["template"]  # as an older version wrote it
    report.write_text(json.dumps(content))
    assert read_form(tmp_path / "rows") == form
    content["settings"]["PROMPT_TYPE"] = "rwkv-g1-fakethink"  # which meant another form then
    report.write_text(json.dumps(content))
    old = "rwkv-g1-emptythink-2025"
    assert read_form(tmp_path / "rows") == Form(old, "doc", PRESETS[old]) and PRESETS[old].opening == "<think>\n</think"
    content["settings"]["PROMPT_TYPE"] = "gone.json"
    report.write_text(json.dumps(content))
    assert read_form(tmp_path / "rows") == Form("gone.json", "doc", None)
