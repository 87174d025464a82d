"""./chat.sh --diagnose: what is wrong with a run, in words, with the numbers behind them."""

import json

import numpy as np
import pytest
from helpers import tiny
from helpers.chats import ASKING
from helpers.kit import few
from helpers.training import run, tokenize

from rwkv_peft.chat import diagnose, load
from rwkv_peft.chat.verdict import RowLosses, RunFacts, judge
from rwkv_peft.checkpoint import pth, sidecars
from rwkv_peft.cli import chat
from rwkv_peft.common import hashing
from rwkv_peft.common.errors import UserError
from rwkv_peft.text import tokenizer

OTHERS = [
    json.dumps({"text": f"User: {question}\n\nAssistant: {answer}"})
    for question, answer in (("河有多长", "九百里"), ("Wind?", "From the north."), ("Moon?", "Half, and late."), ("谁", "没人"))
]  # fmt: skip


def rows(base: float, tuned: float, count: int = 40, spread: float = 0.1) -> RowLosses:
    """Rows of 10 tokens with about these losses per token."""
    rng = np.random.default_rng(0)
    targets = np.full(count, 10)
    return RowLosses(targets, *(np.abs(loss * 10 + rng.normal(0, spread * 10, count)) for loss in (base, tuned)))


def course(*points: float, steps: int = 400, noise: float = 0.05) -> np.ndarray:
    """Losses that go through these points, with noise."""
    places = np.linspace(0, steps - 1, len(points))
    return np.interp(np.arange(steps), places, points) + np.random.default_rng(1).normal(0, noise, steps)


def made(
    trained=(2.0, 0.8),
    held_out=(2.0, 0.9),
    losses=(2.0, 1.0, 0.9, 0.9, 0.9),
    validations=(),
    skipped=0,
    noise=0.05,
    sources=(),
    **more,
):
    pair = [rows(*numbers) if numbers else None for numbers in (trained, held_out)]
    return RunFacts(*pair, sources, course(*losses, noise=noise), skipped, validations, 1e-4, **more)


@pytest.mark.parametrize(
    ("made_of", "expected", "words"),
    [
        ({}, ["fits"], "held-out rows have gained 1.0"),
        ({"held_out": None}, ["unknown"], "VALID_PERCENT in make_tokenize.sh"),
        ({"skipped": 30}, ["too high"], "30 of its 430 steps came to no number"),
        ({"skipped": 1}, ["fits"], ""),
        ({"losses": (2.0, 1.0, 2.5, 3.0, 3.0)}, ["too high"], "and never came back"),
        ({"trained": (2.0, float("nan"))}, ["too high"], "loss nan instead of 1.9"),
        ({"trained": None, "held_out": (2.0, 2.5)}, ["too high"], "held-out rows are worse than before"),
        ({"trained": None, "held_out": (2.0, 2.0)}, ["too low"], "of held-out rows the loss is"),
        ({"losses": (2.0, 1.0, 1.6, 1.0, 1.7, 1.0, 1.6, 0.9)}, ["too high"], "it oscillates"),
        ({"trained": (2.0, 2.6), "held_out": None, "losses": (2.0, 2.0)}, ["too high"], "worse than before: loss 2.6"),
        # noise alone is no rise
        ({"losses": (2.0, 1.0, 0.9, 0.9, 0.9), "noise": 0.6}, ["fits"], ""),
        ({"trained": (2.0, 1.99), "held_out": (2.0, 1.99), "losses": (2.0, 1.99)}, ["too low"], "take ten times LR_INIT=0.0001"),
        ({"losses": (2.0, 1.6, 1.2, 0.8, 0.4)}, ["underfit"], "a larger EPOCH_COUNT"),
        # all have gained, and next to nothing is known
        ({"trained": (11.2, 7.8), "held_out": (11.2, 8.1)}, ["underfit"], "guessed among 2,"),
        ({"held_out": (2.0, 1.8)}, ["overfit"], "it has gained 0.1"),
        ({"held_out": (2.0, 2.4)}, ["overfit"], "held-out rows are worse than before"),
        # what is learnt by heart would go on falling for ever
        ({"held_out": (2.0, 2.4), "losses": (2.0, 1.6, 1.2, 0.8, 0.4)}, ["overfit"], ""),
        ({"validations": [(10, 1.0), (20, 0.9), (30, 1.2)]}, ["overfit"], "best, 0.900, at step 20, and is 1.200 at the end"),
        ({"trained": (2.0, 0.02), "held_out": (2.0, 1.9)}, ["overfit"], "22 of 40 rows that were looked at are known by heart"),
        ({"trained": None, "held_out": (2.0, 1.0)}, ["fits"], ""),
        # what is not finished has not had its chance; but a rate that is too high is one already
        ({"losses": (2.0, 1.6, 1.2, 0.8, 0.4), "left": 70}, ["unfinished"], "70 of its 470 steps are left; ./training.sh"),
        ({"losses": (2.0, 1.0, 2.5, 3.0, 3.0), "left": 70}, ["unfinished", "too high"], ""),
        ({"trained": (11.2, 7.8), "held_out": (11.2, 8.1), "patience": True}, ["underfit"], "--find-lr"),
    ],
)  # fmt: skip
def test_numbers_become_words(made_of, expected, words):
    result = judge(made(**made_of))
    assert [one.what for one in result] == expected and words in result[0].words


def test_noise_is_hardly_ever_called_a_rate_that_is_too_high():
    called = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        losses = 0.8 + 1.2 * np.exp(-np.arange(150) / 40) + rng.normal(0, 0.4, 150)
        called += judge(made()._replace(losses=losses))[0].what == "too high"
    assert called <= 4


def test_the_file_that_was_learnt_by_heart_is_named():
    sources = [("good", rows(2.0, 1.0), rows(2.0, 1.1)), ("bad", rows(2.0, 0.1), rows(2.0, 2.0))]
    [result] = judge(made(trained=(2.0, 0.5), held_out=(2.0, 1.6), sources=sources))
    assert "Most of it in bad, whose own rows gained 1." in result.words


def test_a_gain_has_the_error_of_a_sample_of_such_rows():
    gain, error = rows(2.0, 1.0, 4000, 0.3).gain
    assert gain == pytest.approx(1.0, abs=4 * error) and error == pytest.approx(0.3 * np.sqrt(2 / 4000), rel=0.1)


@pytest.fixture
def with_others(ready):
    (ready / "data" / "others.jsonl").write_text("\n".join(OTHERS) + "\n")
    tokenize(ready / "data" / "others.jsonl")
    return ready


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"LR_INIT": "1e-7", "LR_FINAL": "1e-7", "EPOCH_COUNT": "8"}, "the learning rate is too low"),
        ({"FINETUNE_MODE": "full", "LR_INIT": "0.9", "LR_FINAL": "0.9", "EPOCH_COUNT": "1"}, "the learning rate is too high"),
        pytest.param(
            {"FINETUNE_MODE": "full", "EPOCH_COUNT": "30", "EMB_FINETUNE": "0", "LR_INIT": "1e-2", "LR_FINAL": "1e-2"},
            "overfit", marks=pytest.mark.slow,
        ),
        pytest.param(
            {"VAL_DATA": "chat", "EPOCH_COUNT": "20", "LR_INIT": "1e-3", "LR_FINAL": "1e-3", "lora_r": "16"},
            "underfit", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_runs_that_went_wrong_are_reported_apart(with_others, capsys, settings, expected):
    run(with_others, "one", **{"VAL_DATA": "others", "MICRO_BSZ": "1", "DATALOAD": "only", **settings})
    capsys.readouterr()
    chat.command(ASKING, ["--diagnose", "one"])
    said = capsys.readouterr().out
    assert f"\nverdict   {expected}" in said and "trained rows" in said and "held-out rows" in said, said
    assert "expected" in said and "tuned" in said


@pytest.mark.parametrize(
    "settings", few([{}, {"FINETUNE_MODE": "state_tuning"}, {"FINETUNE_MODE": "full"}, {"QUANT": "nf4"}], [{}])
)
def test_the_losses_are_those_of_the_training(ready, settings):
    """Of one row that is all there is: the run's first step has the base's loss, one more its last."""
    (ready / "data" / "one.jsonl").write_text(json.dumps(tiny.CHATS[0]) + "\n")
    tokenize(ready / "data" / "one.jsonl")
    _, records = run(ready, "one", DATA_PATH="one", EPOCH_COUNT="4", MICRO_BSZ="1", **settings)
    _, more = run(ready, "more", DATA_PATH="one", EPOCH_COUNT="5", MICRO_BSZ="1", **settings)
    adapter = load.find_adapter("one")
    chosen = load.choose_checkpoint(adapter, "")
    original = load.find_base(adapter, chosen.sidecar, "")
    (result, _), _, _ = diagnose.load_rows(json.loads((ready / "output/one/run.json").read_text()), 65536)
    [row] = result["data/one"]
    if not settings.get("QUANT"):
        base = diagnose.row_loss(load.prepare_model(load.build_model(original, "fp32")), row)
        assert base / row.weights.sum() == pytest.approx(records[0]["loss"], rel=1e-5)
    model = load.build_model(chosen.model, "fp32")
    load.attach_adapter(model, chosen)
    tuned = diagnose.row_loss(load.prepare_model(model), row) / row.weights.sum()
    assert tuned == pytest.approx(more[4]["loss"], rel=1e-5 if not settings.get("QUANT") else 0.1)


def test_one_row_that_is_known_is_not_called_too_little():
    one = RowLosses(np.array([10]), np.array([100.0]), np.array([0.1]))
    assert judge(made()._replace(trained=one, held_out=None))[0].what == "unknown"


def test_a_model_whose_answers_are_no_numbers_gets_its_verdict(ready, capsys):
    run(ready, "one", FINETUNE_MODE="full", LR_INIT="1e-5")
    file = ready / "output/one/rwkv-0.pth"
    tensors = pth.load(file)
    tensors["head.weight"] = tensors["head.weight"].double().mul(3e38).clamp(-3e38, 3e38).float()
    tensors["ln_out.weight"] = tensors["ln_out.weight"] * 1e30
    pth.save(file, {name: tensor.clone() for name, tensor in tensors.items()})
    about = json.loads(file.with_suffix(".json").read_text())
    sidecars.write_sidecar(file.with_suffix(".json"), {**about, "checkpoint_sha256": hashing.sha256(file)})
    chat.command(ASKING, ["--diagnose", "one"])
    said = capsys.readouterr().out
    assert "(no number)" in said and "verdict   the learning rate is too high" in said


@pytest.mark.slow
def test_a_run_that_has_not_seen_all_its_rows_says_so(ready, capsys):
    run(ready, "one", EPOCH_STEPS="1", MICRO_BSZ="1", DATALOAD="only")
    chat.command(ASKING, ["--diagnose", "one"])
    assert "it had not gone through all its rows by then" in capsys.readouterr().out


@pytest.mark.slow
def test_files_of_one_name_and_windows_of_one_document_are_all_looked_at(ready, capsys):
    for folder, count in (("a", 3), ("b", 4)):
        (ready / "data" / folder).mkdir()
        (ready / "data" / folder / "same.jsonl").write_text("\n".join(map(json.dumps, tiny.CHATS[:count])) + "\n")
        tokenize(ready / "data" / folder / "same.jsonl")
    run(ready, "one", DATA_PATH="a/same:1 b/same:1", DATALOAD="get", CTX_LEN="16", LOSS_MASK="pad")
    chat.command(ASKING, ["--diagnose", "one"])
    said = capsys.readouterr().out
    assert "of data/a/same" in said and "of data/b/same" in said


def test_settings_of_another_version_are_answered_in_words(ready):
    run(ready, "one")
    file = ready / "output/one/run.json"
    settings = json.loads(file.read_text())
    del settings["STREAMING"]
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="run.json: does not say STREAMING"):
        chat.command(ASKING, ["--diagnose", "one"])


@pytest.mark.slow
def test_a_streamed_run_is_judged_by_its_held_out_rows(ready, capsys):
    run(ready, "one", STREAMING="1", MAX_STEPS="12", CTX_LEN="64", DATA_PATH="chat.jsonl", VAL_DATA="chat")
    chat.command(ASKING, ["--diagnose", "output/one/rwkv-0.pth"])
    said = capsys.readouterr().out
    assert "its rows were streamed" in said and "held-out rows" in said and "\ntrained rows" not in said


@pytest.mark.parametrize("words", [["--prompt", "x"], ["--raw"], ["--system", "x"], ["--adapter", "y"]])
def test_what_has_no_place_beside_it_is_refused(words):
    with pytest.raises(UserError, match=f"^{words[0]} has no place beside --diagnose"):
        chat.command(ASKING, ["--diagnose", "one", *words])


@pytest.mark.slow
def test_data_that_were_made_again_since_the_run_are_reported(ready, capsys):
    run(ready, "one")
    capsys.readouterr()
    chat.command(ASKING, ["--diagnose", "one"])
    assert "not what the run learnt from" not in capsys.readouterr().out
    (ready / "data" / "chat.jsonl").write_text("\n".join(OTHERS) + "\n")
    tokenize(ready / "data" / "chat.jsonl", OVERWRITE_CACHE="1")
    chat.command(ASKING, ["--diagnose", "one"])
    said = capsys.readouterr().out
    assert (
        "warning   data/chat.bin, data/chat.idx: not what the run learnt from" in said and "rows of its files" in said
    )


@pytest.mark.slow
def test_rows_that_stand_there_several_times_are_looked_at_once(ready, capsys):
    tokenize(ready / "data" / "chat.jsonl", epochs=4, OVERWRITE_CACHE="1")
    run(ready, "one", DATALOAD="only")
    capsys.readouterr()
    chat.command(ASKING, ["--diagnose", "one"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained rows")]
    assert 0 < int(line.split()[2]) <= len(tiny.CHATS)


@pytest.mark.parametrize(
    ("right", "words"), [(0, "none had the expected answer"), (3, "3 had the expected answer word for word")]
)
def test_a_verdict_says_what_became_of_the_questions(right, words):
    [result] = judge(made(answers=(right, 3)))
    assert result.what == "fits" and f"of 3 questions of trained rows, {words}" in result.words


def test_a_rate_far_above_the_usual_is_named_where_a_high_loss_is_left():
    [result] = judge(made(trained=(8.0, 6.9), held_out=None)._replace(rate=0.2, usual=0.01))
    assert result.what == "too high" and "LR_INIT=0.2 is far above what is usual (0.01 at most)" in result.words
    [result] = judge(made(trained=(8.0, 6.9), held_out=None)._replace(rate=0.01, usual=0.01))
    assert result.what == "underfit"


def test_an_answer_is_right_if_it_is_what_was_expected_as_far_as_it_may_go():
    long = np.array(tokenizer.encode(" 😀🎉 tea" * 40))
    short = np.array(tokenizer.encode(" Seven.\n\n"))
    cut = tokenizer.decode(long[: diagnose.ANSWER].tolist())
    assert diagnose.is_expected(cut.rstrip("\ufffd"), long) and diagnose.is_expected("Seven.", short)
    assert (
        not diagnose.is_expected(cut[:20], long)
        and not diagnose.is_expected("Seve", short)
        and not diagnose.is_expected("", short[:0])
    )


@pytest.mark.slow
def test_two_files_of_one_name_are_not_taken_for_one_another(ready, capsys):
    for name, rows in (("a", tiny.CHATS), ("b", tiny.CHATS[:3])):
        (ready / "data" / name).mkdir()
        tokenize(tiny.write_jsonl(ready / "data" / name / "chat.jsonl", rows))
    run(ready, "one", DATA_PATH="data/a/chat:1 data/b/chat:1")
    capsys.readouterr()
    chat.command(ASKING, ["--diagnose", "one"])
    assert "not what the run learnt from" not in capsys.readouterr().out


def test_a_run_whose_data_are_gone_says_so(ready, capsys):
    run(ready, "one")
    (ready / "data/chat.bin").unlink()
    capsys.readouterr()
    with pytest.raises(
        UserError, match=r"(?s)DATA_PATH: data/chat.bin: there is no such file.*There is no row to look at"
    ):
        chat.command(ASKING, ["--diagnose", "one"])


def test_a_run_that_its_patience_has_ended_is_not_reported_to_go_on_for_longer():
    [result] = judge(made(trained=(11.2, 7.8), held_out=(11.2, 8.1), patience=True))
    assert "EPOCH_COUNT" not in result.words


def test_the_verdict_names_the_run_whose_best_checkpoint_it_advises(monkeypatch, capsys):
    """In one piece, wherever the line is broken."""
    for width in range(60, 130, 5):
        monkeypatch.setattr(diagnose, "WIDTH", width)
        validations = [(100, 1.0), (200, 1.5), (300, 2.0)]
        diagnose.print_findings(made(held_out=(2.0, 2.4), validations=validations, kept="./merge.sh 'a run' best"))
        assert "./merge.sh 'a run' best takes" in capsys.readouterr().out.replace("\n          takes", " takes")
