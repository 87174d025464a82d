"""Inputs that are right by construction: what the harnesses call sound holds for them, and nothing is refused."""

from __future__ import annotations

import json
import random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers.token_files import write
from hypothesis import HealthCheck, given, settings

from fuzz import mutate
from fuzz.harnesses.binidx_reader import joined
from fuzz.harnesses.pth_reader import of_pickle
from fuzz.worker import load
from rwkv_peft.checkpoint import pth
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.preprocess.keys import MAPPABLE, ROLE_NAMES, columns
from rwkv_peft.text import template_file

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
words = st.text(st.characters(min_codepoint=0x41, max_codepoint=0x5A), min_size=1, max_size=8)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | texts, lambda inside: (
    st.lists(inside, max_size=4) | st.dictionaries(texts, inside, max_size=4)), max_leaves=12)  # fmt: skip


@pytest.fixture(scope="module")
def ready():
    """Harnesses by their names, ready to read."""
    result = {}

    def get(name):
        if name not in result:
            result[name] = load(name)
            result[name].warm_up()
        return result[name]

    return get


@few
@given(text=texts)
def test_any_text_survives_the_tokens(ready, text):
    assert ready("token_decoder").text(text) == "text"


@few
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=4), other=json_values)
def test_any_conversation_is_read_whatever_is_beside_it(ready, tmp_path, turns, other):
    messages = [
        {"role": r, "content": c} for q, a in turns for r, c in (("user", f"{q}?"), ("assistant", f"So it is {a}."))
    ]
    row = {"messages": messages, "meta": other}
    data = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    assert ready("rows_jsonl").read(data, tmp_path)


@few
@given(tensors=st.dictionaries(words, st.tuples(dtypes, st.lists(st.integers(0, 4), max_size=3)), max_size=5))
def test_any_tensors_come_back_from_a_checkpoint(ready, tmp_path, tensors):
    made = {name: (torch.rand(shape) * 9).to(dtype) for name, (dtype, shape) in tensors.items()}
    pth.save(tmp_path / "made.pth", made)
    assert ready("pth_reader").read((tmp_path / "made.pth").read_bytes(), tmp_path) == f"{len(made)} tensors"
    back = pth.load(tmp_path / "made.pth")
    assert all(torch.equal(back[name], tensor) for name, tensor in made.items())


@few
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_any_rows_of_tokens_are_sound(ready, tmp_path, sizes):
    if sum(sizes) < 2:
        return
    write(tmp_path / "made", [np.full(size, 33) for size in sizes])
    parts = [(tmp_path / f"made.{kind}").read_bytes() for kind in ("idx", "bin")]
    assert ready("binidx_reader").read(joined([*parts, b"", b""]), tmp_path) == "sound"


@few
@given(
    keys=st.dictionaries(st.sampled_from(MAPPABLE), texts).filter(lambda keys: len({*keys.values()}) == len(keys)),
    roles=st.dictionaries(texts, st.sampled_from(sorted(ROLE_NAMES))),
)
def test_any_known_parts_and_roles_are_taken(keys, roles):
    result = columns(json.dumps(keys), json.dumps(roles))
    assert result.given == keys and len(result.roles) <= len(roles)


@few
@given(keys=st.dictionaries(texts, json_values, min_size=1))
def test_any_other_parts_are_refused_with_the_name_of_the_setting(keys):
    if {*keys} <= {*MAPPABLE} and all(isinstance(value, str) for value in keys.values()):
        return
    with pytest.raises(SettingErrors, match="MAP_KEYS"):
        columns(json.dumps(keys))


@few
@given(user=texts, answer=texts, between=texts)
def test_any_patterns_write_what_they_say(ready, tmp_path, user, answer, between):
    clean = [text.replace("{", "(").replace("}", ")") for text in (user, answer, between)]
    patterns = {"format_user": f"{clean[0]}{{{{content}}}}", "format_assistant": f"{clean[1]}{{{{content}}}}"}
    path = tmp_path / "any.json"
    path.write_text(json.dumps({**patterns, "format_separator": clean[2]}), encoding="utf-8")
    form = template_file.load(path)
    assert form.format_user == patterns["format_user"]
    assert ready("template_file").read(path.read_bytes(), tmp_path).startswith("template")


@pytest.mark.parametrize("change", [mutate.of_bytes, mutate.of_lines, mutate.of_json, mutate.of_json_lines])
@few
@given(data=st.binary(max_size=60), seed=st.integers(0, 2**32))
def test_a_change_is_the_same_for_the_same_random_numbers(change, data, seed):
    assert change(data, random.Random(seed), data[::-1]) == change(data, random.Random(seed), data[::-1])


def test_a_changed_zip_file_and_a_changed_pickle_are_most_often_still_one():
    seed = next(path for path in load("pth_reader").seeds() if path.name == "plain.pth").read_bytes()
    zips = [load("pth_reader").mutate(seed, random.Random(n), seed) for n in range(200)]
    assert sum(mutate.members(data) is not None for data in zips) > 100
    content = next(content for name, content, _ in mutate.members(seed) if name.endswith("data.pkl"))
    assert len({of_pickle(content, random.Random(n)) for n in range(50)}) > 40
