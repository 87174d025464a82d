"""What messages are made of: counts, lists, times, and guesses at mistyped words."""

import pytest

from rwkv_peft.common.formatting import did_you_mean, first_line, format_duration, join_names, plural, printable


@pytest.mark.parametrize(("n", "words"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1234, "1,234 rows")])
def test_one_is_a_row_and_others_are_rows(n, words):
    assert plural(n, "row") == words


def test_a_list_is_in_the_order_that_people_count_in_and_its_end_is_counted():
    assert join_names(["run-10", "run-9", "a", "run-2"]) == "a, run-2, run-9, run-10"
    assert join_names(map(str, range(20)), most=3) == "0, 1, 2 and 17 more"
    assert join_names(["10", "9", "x", "1x"]) == "1x, 9, 10, x"
    assert join_names([]) == "nothing"


def test_a_near_word_is_offered_and_a_far_one_is_not():
    assert did_you_mean("smaple.jsonl", ["pretrain.jsonl", "sample.jsonl"]) == "; did you mean sample.jsonl?"
    assert did_you_mean("lora_R", ["lora_r", "lora_alpha"]) == "; did you mean lora_r?"
    assert did_you_mean("zzz", ["sample"]) == ""
    assert did_you_mean("nothing.jsonl", ["x.jsonl", "long.jsonl"]) == ""


def test_times_are_minutes_and_hours():
    assert (format_duration(5), format_duration(65), format_duration(3661.9)) == ("0:05", "1:05", "1:01:01")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("a tensor \x1b[2Jx\r\x9b", "a tensor \\x1b[2Jx\\r\\x9b"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("line one\n\ttwo\u3000三，\xa0é", "line one\n\ttwo\u3000三，\xa0é"),
        ("x" * 2500 + "\nnext", "x" * 2000 + " ... (500 characters more)\nnext"),
    ],
)
def test_words_that_quote_foreign_names_cannot_steer_a_terminal_or_flood_it(words, shown):
    assert printable(words) == shown


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("a\nb"), "a"), (OSError(""), "OSError"), (KeyError(), "KeyError")]
)
def test_an_error_without_words_is_called_by_its_kind(error, line):
    assert first_line(error) == line
