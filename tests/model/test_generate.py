"""Decoding: whole characters, stops that never show, the same seed the same words, and talks that go on exactly."""

import builtins

import pytest
import torch
from helpers import tiny

from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.cli import chat
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.model.generate import advance, choose, generate
from rwkv_peft.model.rwkv import build, for_generating
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Message


def follow(text: str, end: bool = True):
    """A model that says text, byte by byte, whatever it is asked."""
    ids = [tokenizer.token_bytes().index(bytes([b])) for b in text.encode()] + ([0] if end else [])

    class Model:
        ln_out, geometry = torch.nn.LayerNorm(1), tiny.geometry()
        at = 0

        def features(self, x, state=None):
            self.at += 1
            return torch.zeros(1, x.shape[1], 1), state

        def head(self, x):
            return torch.nn.functional.one_hot(torch.tensor(ids[min(self.at, len(ids) - 1)]), 65536).float()

    model = Model()
    return model, torch.nn.functional.one_hot(torch.tensor(ids[0]), 65536).float()


def say(text, stops=(), max_tokens=200, **options):
    model, logits = follow(text, **options)
    return list(generate(model, logits, None, max_tokens, 0, 1.0, 0, stops))


def test_characters_arrive_whole():
    pieces = say("海鸥🕊 fly")
    assert "".join(pieces) == "海鸥🕊 fly" and pieces[0] == "海"
    assert not any("\ufffd" in p for p in pieces)


def test_an_answer_stops_before_the_stop_string_and_shows_nothing_of_it():
    assert "".join(say("Blue.\n\nUser: next", PRESETS["rwkv-world"].stops())) == "Blue."
    assert "".join(say("a\n\nUse it", PRESETS["rwkv-world"].stops())) == "a\n\nUse it"
    assert "".join(say("ends with\n\nUs", PRESETS["rwkv-world"].stops())) == "ends with\n\nUs"


def test_max_tokens_is_the_most():
    assert "".join(say("abcdef", max_tokens=3)) == "abc"
    assert "".join(say("海海", max_tokens=4)) == "海"  # and half a character is not shown


def test_sampling_takes_only_the_share_it_may_and_the_seed_decides():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(1)
    seen = [choose(logits, 1.0, 0.75, generator) for _ in range(300)]
    assert set(seen) == {0, 1} and 100 < seen.count(0) < 260
    again = torch.Generator().manual_seed(1)
    assert [choose(logits, 1.0, 0.75, again) for _ in range(300)] == seen
    assert choose(logits, 0, 1.0, generator) == 0
    assert choose(logits, 1.0, 1e-9, generator) == 0


def test_a_prompt_in_pieces_is_the_prompt_at_once(monkeypatch):
    model, ids = tiny.model(shape=tiny.geometry(2, 32, 64, 16)), list(range(1, 60))
    whole, _ = advance(model, ids)
    monkeypatch.setattr("rwkv_peft.model.generate.PREFILL", 7)
    torch.testing.assert_close(advance(model, ids)[0], whole, rtol=1e-4, atol=1e-4)


def test_a_talk_resumes_from_exactly_what_the_whole_conversation_would_give(monkeypatch, capsys):
    """Each turn continues the state of the last prompt; the ids are those of the conversation encoded as one."""
    model, fed = tiny.model(), []
    questions = iter(["你好。", "And?", "/reset", "Again", ""])
    monkeypatch.setattr(builtins, "input", lambda _="": next(questions))
    monkeypatch.setattr(chat, "answer", lambda *a, **k: "好的。")
    original = advance

    def watch(m, ids, state=None):
        fed.append((list(ids), state is None))
        return original(m, ids, state)

    monkeypatch.setattr("rwkv_peft.model.generate.advance", watch)
    config = chat.ChatConfig("", "", "rwkv-world", "auto", "Be brief.", 5, 0.0, 1.0, 0, 0, "fp32")
    chat.talk(model, config, PromptFormat(PRESETS["rwkv-world"]), "tiny", FileWatch("it was opened", ""))
    turn = [Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "你好。"), Message(Role.ASSISTANT, "好的。")]
    second = PRESETS["rwkv-world"].prompt([*turn, Message(Role.USER, "And?")])
    assert fed[0][0] + fed[1][0] == tokenizer.encode(second)
    assert [fresh for _, fresh in fed] == [True, False, True]
    assert "The talk is forgotten" in capsys.readouterr().out


def test_ctrl_c_while_a_question_is_read_forgets_it_and_the_talk_resumes(monkeypatch, capsys):
    model, fed, original = tiny.model(), [], advance
    questions = iter(["Hi", "A very long one", "/help", "And?", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _="": next(questions))
    monkeypatch.setattr(chat, "answer", lambda *a, **k: "Yes.")

    def interrupted(m, ids, state=None):
        fed.append(list(ids))
        if len(fed) == 2:
            raise KeyboardInterrupt
        return original(m, ids, state)

    monkeypatch.setattr("rwkv_peft.model.generate.advance", interrupted)
    chat.talk(
        model,
        chat.ChatConfig("", "", "rwkv-world", "auto", "", 5, 0.0, 1.0, 0, 0, "fp32"),
        PromptFormat(PRESETS["rwkv-world"]),
        "tiny",
        FileWatch("it was opened", ""),
    )
    turn = [Message(Role.USER, "Hi"), Message(Role.ASSISTANT, "Yes."), Message(Role.USER, "And?")]
    assert fed[0] + fed[2] == tokenizer.encode(PRESETS["rwkv-world"].prompt(turn))
    said = capsys.readouterr().out
    assert "this question is forgotten" in said and said.count(chat.COMMANDS) == 2


def test_a_prompt_may_begin_with_a_minus():
    config = chat.ChatConfig("m", "", "rwkv-world", "auto", "", 5, 0.0, 1.0, 0, 0, "fp32")
    assert chat.command_line(["--prompt", "-5+3?", "--seed", "7"], config)[1] == "-5+3?"
    with pytest.raises(chat.UserError, match="--prompt: expected one argument"):
        chat.command_line(["--prompt", "--raw"], config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "hot"], "--temperature hot: must be a number"),
        (["--top-p", "0"], "--top-p 0: must be more than 0"),
        (["--max-tokens", "0"], "--max-tokens 0: must be 1 or more"),
        (["--prompt", " "], "--prompt is empty"),
        (["--raw"], "--raw needs --prompt"),
        (["--modle", "x"], "unrecognized arguments: --modle x"),
    ],
)
def test_a_wrong_option_is_named(arguments, words):
    config = chat.ChatConfig("m", "", "rwkv-world", "auto", "", 5, 0.0, 1.0, 0, 0, "fp32")
    with pytest.raises(chat.UserError, match=words):
        chat.command_line(arguments, config)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_for_generating_says_what_the_model_says(backend, stored):
    """Whatever its file holds; the C++ products read large matrices as they are stored."""
    shape = tiny.geometry(2, 64, 128, 16)
    tensors = {n: t.to(stored) for n, t in tiny.tensors(0, shape).items()}
    plain = build(shape, tensors, tiny.ops(shape, "torch"), keep=torch.float32)
    ready = for_generating(build(shape, tensors, tiny.ops(shape, backend)))
    narrow = stored if backend == "cpu" and stored != torch.float16 else torch.float32
    assert ready.blocks[0].att.key.weight.dtype == narrow and ready.blocks[0].ln1.weight.dtype == torch.float32
    with torch.inference_mode():
        theirs, state = plain(torch.tensor([[5, 6, 7]]))
        ours, mine = ready(torch.tensor([[5, 6, 7]]))
        for token in (8, 9):
            theirs, state = plain(torch.tensor([[token]]), state)
            ours, mine = ready(torch.tensor([[token]]), mine)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_top_k_leaves_only_the_likeliest_and_comes_before_top_p():
    from rwkv_peft.model.generate import choose

    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    draw = lambda **how: {choose(logits, 1.0, generator=torch.Generator().manual_seed(i), **how) for i in range(200)}  # noqa: E731
    assert draw(top_p=1.0) == {0, 1, 2, 3} and draw(top_p=1.0, top_k=2) == {0, 1} and draw(top_p=1.0, top_k=1) == {0}
    assert draw(top_p=1.0, top_k=99) == {0, 1, 2, 3}
    # of all, the first has 0.4 of the share: too little for 0.5; of two it has 0.57
    assert draw(top_p=0.5) == {0, 1} and draw(top_p=0.5, top_k=2) == {0}


def test_a_stop_token_ends_an_answer_without_its_text():
    model = tiny.model()
    logits, state = advance(model, [5, 6, 7])
    first = int(logits.argmax())
    assert "".join(generate(model, logits, state, 5, 0.0, 1.0, 0, (), (0, first))) == ""
