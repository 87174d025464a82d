"""Bash variables become typed values, or every problem at once with its line."""

from dataclasses import dataclass
from typing import Literal

import pytest

from rwkv_peft.common.errors import SettingError, SettingErrors
from rwkv_peft.config.shell import Script, setting

SCRIPT = """#!/usr/bin/env bash
# a comment that says QUANT=not_this
QUANT=nf8
_own=1
MICRO_BSZ=0
LR_FINAL=2e5x
CTX_LEM=608
"""


ALL = "QUANT=\nMICRO_BSZ=\nLR_FINAL=\nCTX_LEN=\n"


@dataclass(frozen=True)
class Settings:
    quant: Literal["none", "nf4", "int8"] = setting("QUANT")
    micro_bsz: int = setting("MICRO_BSZ", ge=1)
    lr_final: float = setting("LR_FINAL")
    ctx_len: Literal["auto"] | int = setting("CTX_LEN", ge=1)


def read(tmp_path, text, **environment):
    path = tmp_path / "training.sh"
    path.write_text(text)
    return Script(path, environment)


def test_every_problem_is_reported_at_once_in_the_order_of_the_script(tmp_path):
    script = read(tmp_path, SCRIPT, QUANT="nf8", MICRO_BSZ="0", LR_FINAL="2e5x", CTX_LEM="608")
    with pytest.raises(SettingErrors) as result:
        script.read(Settings)
    assert script.report(result.value).splitlines() == [
        "training.sh has 5 problems:",
        "            CTX_LEN        is not set in training.sh",
        "  line   3  QUANT=nf8      must be one of none, nf4, int8; did you mean nf4?",
        "  line   5  MICRO_BSZ=0    must be 1 or more",
        "  line   6  LR_FINAL=2e5x  must be a number, like 2e-5",
        "  line   7  CTX_LEM=608    is not a setting; did you mean CTX_LEN?",
    ]


def test_sound_values_arrive_with_their_types(tmp_path):
    script = read(tmp_path, ALL, QUANT="nf4", MICRO_BSZ="4", LR_FINAL="2e-5", CTX_LEN="auto")
    assert script.read(Settings) == Settings("nf4", 4, 2e-5, "auto")
    script = read(tmp_path, ALL, QUANT="nf4", MICRO_BSZ="4", LR_FINAL="0", CTX_LEN="512")
    assert script.read(Settings) == Settings("nf4", 4, 0.0, 512)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1.5", "must be a whole number, or auto"),
        ("-3", "must be 1 or more, or auto"),
        ("", "must be a whole number, or auto"),
        ("１２x", "must be a whole number, or auto"),
    ],
)
def test_a_number_or_a_word_names_both(tmp_path, text, words):
    script = read(tmp_path, ALL, QUANT="none", MICRO_BSZ="1", LR_FINAL="1", CTX_LEN=text)
    with pytest.raises(SettingErrors) as result:
        script.read(Settings)
    assert result.value.problems == [SettingError("CTX_LEN", words)]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "0x10"])
def test_numbers_that_are_none_are_refused(tmp_path, text):
    script = read(tmp_path, ALL, QUANT="none", MICRO_BSZ="1", LR_FINAL=text, CTX_LEN="auto")
    with pytest.raises(SettingErrors, match="number"):
        script.read(Settings)


def test_a_setting_that_is_made_twice_is_named_with_both_lines(tmp_path):
    values = {"QUANT": "none", "MICRO_BSZ": "1", "LR_FINAL": "1", "CTX_LEN": "auto"}
    script = read(tmp_path, ALL + "MICRO_BSZ=4\n", **values)
    with pytest.raises(SettingErrors) as result:
        script.read(Settings)
    assert result.value.problems == [SettingError("MICRO_BSZ", "is set in line 2 as well; keep one of the two")]
    assert "  line   5  MICRO_BSZ=1" in script.report(result.value)
    read(tmp_path, ALL + "if true; then\n  MICRO_BSZ=4\nfi\n", **values).read(Settings)  # a shell's own choice is fine


def test_windows_line_ends_are_named_with_the_fix(tmp_path):
    path = tmp_path / "training.sh"
    path.write_bytes(b"QUANT=none\r\n")
    with pytest.raises(SettingErrors, match="Windows line ends; run: sed"):
        Script(path, {})


def test_a_value_that_only_the_shell_has_is_not_taken(tmp_path):
    script = read(tmp_path, ALL.replace("CTX_LEN=\n", ""), QUANT="none", MICRO_BSZ="1", LR_FINAL="1", CTX_LEN="512")
    with pytest.raises(SettingErrors, match="CTX_LEN: is not set in training.sh"):
        script.read(Settings)


@pytest.mark.parametrize("line", ["QUANT=none CTX_LEN=8", "QUANT=none; CTX_LEN=8", "export QUANT= CTX_LEN=8"])
def test_a_line_with_two_settings_is_refused_with_its_number(tmp_path, line):
    """Bash would take the second one in silence, over what its own line says."""
    values = {"QUANT": "none", "MICRO_BSZ": "1", "LR_FINAL": "1", "CTX_LEN": "8"}
    for lines in (f"MICRO_BSZ=\nLR_FINAL=\nCTX_LEN=4\n{line}\n", f"MICRO_BSZ=\nLR_FINAL=\n\n{line}\n"):
        script = read(tmp_path, lines, **values)
        with pytest.raises(SettingErrors) as result:
            script.read(Settings)
        assert result.value.problems == [
            SettingError("QUANT", "shares its line with CTX_LEN; give each setting a line of its own")
        ]
        assert "  line   4  QUANT=none" in script.report(result.value)


def test_an_equals_sign_in_a_value_or_a_comment_is_no_second_setting(tmp_path):
    lines = "QUANT=none # not CTX_LEN=4, don't\nMICRO_BSZ='1' # x\nLR_FINAL=\"a CTX_LEN=2\"\nCTX_LEN=8\n"
    script = read(tmp_path, lines, QUANT="none", MICRO_BSZ="1", LR_FINAL="1", CTX_LEN="8")
    assert script.read(Settings) == Settings("none", 1, 1.0, 8)
