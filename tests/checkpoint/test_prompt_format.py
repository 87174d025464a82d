"""What was trained is what is exported: template, stop tokens, token 0 in front, in every file and message."""

import json

import pytest
from helpers import tiny
from helpers.exports import small, states_of, write
from helpers.training import run, tokenize
from safetensors import safe_open

from rwkv_peft.checkpoint import prompt_format, pth, sidecars
from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.cli import chat, merge
from rwkv_peft.common import paths as project
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import ENDINGS, Message, Template

gguf = pytest.importorskip("gguf")

# PROMPT_TYPE, EOT -> stop tokens
STOPS = {
    ("rwkv-world", "doc"): (0, 261),
    ("rwkv-world", "x17"): (0, 24, 261),
    ("rwkv-qa", "both"): (0, 261),
    ("rwkv-g1", "doc"): (0,),  # answers hold blank lines
    ("rwkv-g1", "both"): (0,),
    ("rwkv-g1", "blank"): (0, 261),  # which is what EOT=blank asks for
    ("rwkv-g1-think", "x17"): (0, 24),
    ("rwkv-g1-bot", "doc"): (0, 10060),
    ("chatml", "doc"): (0,),
    ("default", "doc"): (0,),
    ("empty", "doc"): (0,),
}


@pytest.mark.parametrize(("name", "eot"), STOPS)
def test_stop_tokens_are_those_that_can_only_be_an_end(name, eot):
    asked = PromptFormat(PRESETS[name], eot)
    assert asked.stop_tokens == STOPS[name, eot]
    assert ("\x17" in asked.stop_strings) == (eot == "x17")


def test_a_stop_word_of_ones_own_is_a_stop_token_only_where_it_is_one_token():
    own = Template("own", "Q: {{content}}", "A: {{content}}", stop_words=("✿", "<|im_end|>"))
    assert PromptFormat(own).stop_tokens == (0, 10060)
    assert PromptFormat(own).stop_strings_beside_tokens == ("<|im_end|>", "\n\nQ:")


def test_blank_lines_in_answers_of_ready_texts_keep_a_blank_line_from_being_an_end(project_folder):
    for name, answer in (("plain", "One."), ("lines", "One.\n\nTwo.")):
        path = tiny.write_jsonl(
            project_folder / "data" / f"{name}.jsonl", [{"text": f"User: Hi\n\nAssistant: {answer}"}] * 4
        )
        tokenize(path)
    tiny.save_model(project_folder / "model" / "tiny.pth")
    for name, stops in (("plain", (0, 261)), ("lines", (0,)), ("plain:1 lines:1", (0,))):
        run_name = name[:5] + str(len(name))
        run(project_folder, run_name, DATA_PATH=name)
        path = project_folder / "output" / run_name / "rwkv-0.pth"
        assert prompt_format.read_prompt_format(sidecars.read_sidecar(path, ()), "x", path).stop_tokens == stops


FACTS = {"prompt_type": "chatml", "eot": "x17", "bos": 1}


def fields(path) -> dict:
    said = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "tokens" not in name}
    return {name.removeprefix("tokenizer."): value for name, value in said.items()}


@pytest.mark.smoke(1)
@pytest.mark.parametrize(("name", "eot", "bos"), [
    ("rwkv-world", "doc", False), ("rwkv-world", "x17", True), ("rwkv-g1", "doc", False), ("rwkv-g1", "blank", True),
    ("rwkv-g1-bot", "doc", True), ("chatml", "both", False), ("chatml", "x17", False),
])  # fmt: skip
def test_a_gguf_holds_the_template_and_the_stop_tokens_that_were_trained(tmp_path, name, eot, bos):
    jinja2 = pytest.importorskip("jinja2")
    shape, asked = small(layers=1, vocab=65536), PromptFormat(PRESETS[name], eot, bos)
    tiny.save_model(tmp_path / "m.pth", 0, shape)
    reported = write("gguf", tmp_path / "m.pth", tmp_path / "m.gguf", shape, asked)
    said = fields(tmp_path / "m.gguf")
    inside = {said[f"ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom") if f"ggml.{kind}_token_id" in said}
    assert inside == set(asked.stop_tokens) and said["ggml.bos_token_id"] == 0
    assert said["ggml.add_bos_token"] is False  # the template writes it: llama.cpp's tokenizer never would
    turns = [{"role": "user", "content": "Hi"}]
    text = jinja2.Template(said["chat_template"]).render(messages=turns, add_generation_prompt=True, bos_token="<s>")
    assert text == "<s>" * bos + PRESETS[name].prompt([Message(Role.USER, "Hi")], ending=ENDINGS[eot])
    assert json.loads(said["rwkv_peft.prompt"])["bos"] == bos
    assert f"PROMPT_TYPE={name}, EOT={eot}, BOS={int(bos)}" in reported
    assert ("<|im_end|>" in reported and "--reverse-prompt" in reported) == (name == "chatml")


def test_safetensors_hold_it_in_their_metadata(tmp_path):
    shape, asked = small(), PromptFormat(PRESETS["chatml"], "x17", True)
    tiny.save_model(tmp_path / "m.pth", 0, shape)
    write("safetensors", tmp_path / "m.pth", tmp_path / "m.st", shape, asked)
    with safe_open(tmp_path / "m.st", "np") as file:
        assert json.loads(file.metadata()["rwkv_prompt"]) == json.loads(json.dumps(asked.describe()))


@pytest.fixture
def trained(project_folder):
    """Runs of one step with different formats: name -> its checkpoint."""
    tiny.save_model(project_folder / "model" / "tiny.pth", shape=tiny.geometry(2, 64, 65536, 64))

    def make(name: str, prompt_type: str, **options):
        path = tiny.write_jsonl(project_folder / "data" / f"{name}.jsonl", [{"prompt": "Hi?", "completion": "Ho."}] * 4)
        made = {k: options.pop(k) for k in ("EOT", "BOS") if k in options}
        tokenize(path, PROMPT_TYPE=prompt_type, **made)
        run(project_folder, name, DATA_PATH=name, **options)
        return project_folder / "output" / name / "rwkv-0.pth"

    return make


def exported(project_folder):
    return {path.name: json.loads(path.read_text()) for path in (project_folder / "merge").glob("*.prompt.json")}


def test_what_a_run_was_trained_with_is_beside_every_export_of_it(project_folder, trained, capsys):
    path = trained("a", "chatml", EOT="x17", BOS="1", lora_parts="att,ffn")
    sidecar = sidecars.read_sidecar(path, ())
    assert (sidecar["prompt_type"], sidecar["eot"], sidecar["bos"]) == ("chatml", "x17", 1)
    capsys.readouterr()
    script = merge.MergeConfig("", "", "original", "", "", "")
    merge.command(script, [str(path), "--export", "gguf", "--export", "safetensors", "--export", "peft"])
    said = capsys.readouterr().out
    result = exported(project_folder)
    assert len(result) == 2 and all(name.endswith((".gguf.prompt.json", ".st.prompt.json")) for name in result)
    [folder] = (project.ROOT / "merge").glob("*-peft")
    for content in (*result.values(), json.loads((folder / "rwkv.prompt.json").read_text())):
        assert {key: content[key] for key in FACTS} == FACTS and 24 in content["stop_token_ids"]
        assert content["example_prompt"].endswith("<|im_start|>assistant") and content["example_tokens"][0] == 0
        assert "<|im_end|>" in content["stop"] and "assumed" not in content
    assert "Its prompts begin with token 0" in said and "warning" not in said
    [merged] = [p for p in (project.ROOT / "merge").glob("*.pth")]
    assert {k: sidecars.read_sidecar(merged, ())[k] for k in FACTS} == FACTS


def test_a_model_without_a_sidecar_is_a_guess_and_says_so(project_folder, capsys):
    for name, template in (("tiny.pth", "rwkv-world"), ("rwkv7-g1d-tiny.pth", "rwkv-g1")):
        tiny.save_model(project_folder / "model" / name, shape=tiny.geometry(2, 64, 65536, 64))
        merge.command(merge.MergeConfig("", "", "original", "", "", ""), [f"model/{name}", "--export", "gguf"])
        assert (
            f"warning   nothing tells which template the model was trained with: {template} is a guess"
            in capsys.readouterr().out
        )
        content = json.loads((project_folder / "merge" / f"{name.removesuffix('.pth')}.gguf.prompt.json").read_text())
        assert content["prompt_type"] == template and content["assumed"]


def test_states_carry_it_as_well(project_folder, trained, capsys):
    trained("s", "rwkv-g1-bot", FINETUNE_MODE="state")
    merge.command(merge.MergeConfig("s", "", "original", "", "", ""), ["0", "--export", "state", "--export", "rwkvcpp"])
    result = exported(project_folder)
    assert len(result) == 3 and all(
        content["bos"] == 1 and content["stop_token_ids"] == [0, 10060] for content in result.values()
    )


def test_runs_of_different_formats_that_go_together_are_warned_of(project_folder, trained, capsys):
    paths = [str(trained("a", "chatml")), str(trained("b", "rwkv-world"))]
    capsys.readouterr()
    merge.command(merge.MergeConfig("", "", "original", "", "", ""), ["--average", *paths])
    assert "warning   they were trained with different formats" in capsys.readouterr().out
    merge.command(merge.MergeConfig("", "", "original", "", "", ""), ["--average", paths[0], paths[0]])
    assert "different formats" not in capsys.readouterr().out


def make_old(path, **changes):
    """A sidecar as an older version wrote it, without the template's content."""
    reported = sidecars.read_sidecar(path, ())
    del reported["template"], reported["bos"], reported["blank_lines"], reported["fields_sha256"]
    sidecars.sidecar_path(path).write_text(json.dumps(reported | changes))


def test_an_older_run_and_one_of_now_of_the_same_preset_go_together(project_folder, trained, capsys):
    paths = [trained("a", "rwkv-world"), trained("b", "rwkv-world")]
    make_old(paths[0])
    capsys.readouterr()
    merge.command(
        merge.MergeConfig("", "", "original", "", "", ""), ["--average", *map(str, paths), "--export", "gguf"]
    )
    said = capsys.readouterr().out
    assert "different formats" not in said and "guess" not in said
    [merged] = (project.ROOT / "merge").glob("*.pth")
    assert sidecars.read_sidecar(merged, ())["prompt_type"] == "rwkv-world"


@pytest.mark.slow
def test_an_older_run_with_the_old_empty_thought_is_called_by_its_name_of_now(project_folder, trained, capsys):
    paths = [trained("a", "rwkv-g1-emptythink-2025"), trained("b", "rwkv-g1-fakethink")]
    make_old(paths[0], prompt_type="rwkv-g1-fakethink")
    capsys.readouterr()
    merge.command(merge.MergeConfig("a", "", "original", "", "", ""), ["0", "--export", "safetensors"])
    assert "It was trained with PROMPT_TYPE=rwkv-g1-emptythink-2025" in capsys.readouterr().out
    [content] = exported(project_folder).values()
    assert content["prompt_type"] == "rwkv-g1-emptythink-2025" and content["example_prompt"].endswith(
        "<think>\n</think"
    )
    [merged] = (project.ROOT / "merge").glob("*.pth")
    assert sidecars.read_sidecar(merged, ())["prompt_type"] == "rwkv-g1-emptythink-2025"
    merge.command(
        merge.MergeConfig("", "", "original", "", "", ""), ["--average", *map(str, paths), "--export", "safetensors"]
    )
    said = capsys.readouterr().out
    assert (
        "PROMPT_TYPE=rwkv-g1-emptythink-2025, EOT=doc, BOS=0" in said and "PROMPT_TYPE=rwkv-g1-fakethink, EOT" in said
    )
    assert said.index("is a guess by the name") < said.index("If the guess is right, its format is PROMPT_TYPE=")
    assert "It was trained with" not in said


# ---- talking ----


@pytest.mark.parametrize(("setting", "reported", "bos"), [
    ("auto", {"prompt_type": "chatml", "bos": 1}, True),
    ("auto", {"prompt_type": "rwkv-g1-bot"}, False),  # an older run had none, whatever the template says now
    ("auto", {}, False),
    ("1", {}, True),
    ("0", {"prompt_type": "chatml", "bos": 1}, False),
])  # fmt: skip
def test_chat_begins_as_the_run_was_trained(setting, reported, bos, capsys):
    config = chat.ChatConfig("m", "", "auto", setting, "", 5, "auto", "auto", "auto", 0, "fp32")
    asked = chat.prompting(config, PRESETS["chatml"], reported, "m")
    assert asked.bos == bos and asked.encode("Hi")[0] == (0 if bos else tokenizer.encode("Hi")[0])
    assert ("warning: BOS=0" in capsys.readouterr().err) == (setting == "0" and bool(reported))


def test_chat_takes_the_sampling_of_the_template_where_it_is_auto():
    config = chat.ChatConfig("m", "", "auto", "auto", "", 5, "auto", 0.9, "auto", 0, "fp32")
    made = chat.with_sampling(config, PRESETS["rwkv-g1"])
    assert (made.temperature, made.top_p, made.top_k) == (1.0, 0.9, 32)
    made = chat.with_sampling(config, PRESETS["rwkv-world"])
    assert (made.temperature, made.top_p, made.top_k) == (0.7, 0.9, 0)


@pytest.mark.parametrize(
    ("text", "shell"), [("\n\nUser:", "$'\\n\\nUser:'"), ("<|im_end|>", "'<|im_end|>'"), ("it's\n", "$'it\\'s\\n'")]
)
def test_a_stop_text_can_be_pasted_into_a_shell(text, shell):
    import subprocess

    assert prompt_format.quote_for_bash(text) == shell
    assert subprocess.run(["bash", "-c", f"printf %s {shell}"], capture_output=True, text=True).stdout == text


def test_a_state_of_others_has_no_sidecar_and_is_a_guess(tmp_path):
    pth.save(tmp_path / "s.pth", states_of(small()))
    assert prompt_format.read_prompt_format({}, "x", tmp_path / "s.pth").assumed
