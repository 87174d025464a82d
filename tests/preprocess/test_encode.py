"""A row of any kind becomes the same tokens, every token has a speaker, and every limit is kept to the token."""

import json

import numpy as np
import pytest
from helpers.rows import CHAT, DIALOGUES, LONG, SAME, TEXT, WORLD, A, U, dialogue, encode_block_of, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.preprocess import json_keys
from rwkv_peft.preprocess.encode import Pieces, encode_row, encode_rows
from rwkv_peft.preprocess.fast_path import FastPath
from rwkv_peft.preprocess.keys import columns
from rwkv_peft.preprocess.pipeline import NOTHING_TO_LEARN, EncodeConfig, RowEncoder, parse
from rwkv_peft.preprocess.reader import Block
from rwkv_peft.preprocess.schemas import HANDLERS, Reader
from rwkv_peft.preprocess.truncate import Limits
from rwkv_peft.preprocess.values import RowError
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import ENDINGS, to_spans


def learnt(encoded) -> list[str]:
    return [tokenizer.decode(ids[roles == A]) + ("<end>" if roles[-1] == A and ids[-1] == 0 else "")
            for ids, roles in rows_of(encoded)]  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_the_same_dialogue_gives_the_same_bytes_in_every_schema(kind):
    expected, result = encode_block_of(SAME["messages"]), encode_block_of(SAME[kind])
    assert not result.rejects
    assert result.ids.tobytes() == expected.ids.tobytes() and result.roles.tobytes() == expected.roles.tobytes()


def test_schemas_are_named():
    names = {
        kind: next(n for n in encode_block_of(row).counts if n.startswith("schema: ")) for kind, row in SAME.items()
    }
    assert set(names.values()) == {
        "schema: messages", "schema: conversations", "schema: sharegpt", "schema: alpaca", "schema: prompt/completion",
        "schema: text",
    }  # fmt: skip


def test_renamed_columns_are_detected_with_map_keys_and_parts_can_be_left_out():
    row = {"frage": "Q", "zusatz": "X", "antwort": "A", "rolle": "Be.", "gedanke": "Hm"}
    keys = '{"prompt": "frage", "query": "", "response": "antwort", "system": "rolle", "think": "gedanke"}'
    made = encode_block_of(row, columns=columns(keys))
    assert tokenizer.decode(made.ids[:-1]) == "System: Be.\n\nUser: Q\n\nAssistant: <think>\nHm\n</think>\nA"
    assert encode_block_of({"content": "text"}, columns=columns('{"text": "content"}')).ids.tolist()[
        :-1
    ] == tokenizer.encode("text")
    chat = encode_block_of({"dialog": CHAT}, columns=columns('{"messages": "dialog"}'))
    assert chat.ids.tobytes() == encode_block_of(SAME["messages"]).ids.tobytes() and chat.seen == {"dialog"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("{", "is not readable as JSON"),
        ("[]", "must be an object"),
        ('{"text": 7}', "must be an object of texts"),
        ('{"promt": "x"}', "has the key 'promt'; did you mean prompt?"),
    ],
)
def test_map_keys_that_cannot_be_used_say_why(keys, words):
    with pytest.raises(SettingErrors, match="MAP_KEYS") as error:
        columns(keys)
    assert words in str(error.value)


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_handler_reads_its_own_kind_and_refuses_the_others(handler):
    kinds = {"text": "text", "pair": "alpaca", "messages": "messages"}
    for kind, row in kinds.items():
        made = encode_block_of(SAME[row], handler=handler)
        fits = HANDLERS[handler] in ("auto", kind)
        assert (made.counts["kept"] == 1) == fits
        assert fits or "has none of the keys" in made.rejects[0].message


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"messages": []}, "wrong type", "at least one"),
        ({"messages": "hello"}, "wrong type", "must be a list"),
        ({"messages": {"rolle": "user"}}, "wrong type", "must be a list"),
        ({"messages": ["user"]}, "no answer", "a question without an answer"),
        ({"messages": [CHAT[0], "hi"]}, "wrong type", "message 2 must be an object"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role", "the role 'wizard'; known are system"),
        ({"messages": [{"role": 7, "content": "x"}]}, "unknown role", "the role 7"),
        ({"messages": [{"contents": "x"}]}, "unknown role", "message 1 has no role"),
        ({"messages": [{"role": "user", "content": None}]}, "wrong type", "no text in content"),
        ({"messages": [{"role": "user", "content": " \n "}]}, "empty", "message 1 (user) is empty"),
        ({"messages": [*CHAT[:1], {"role": "assistant", "content": ""}]}, "empty", "message 2 (assistant) is empty"),
        ({"messages": CHAT[:1]}, "no answer", "no assistant message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text", "of type image_url"),
        ({"messages": [{**CHAT[1], "weight": 0.5}]}, "wrong type", "weight 0.5; it must be 0 or 1"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "tool call", "without a name"),
        ({"messages": [{"role": "function_call", "content": "add"}]}, "tool call", "as JSON"),
        ({"instruction": "", "output": "x"}, "empty", 'its "instruction" is empty'),
        ({"instruction": "x", "output": ""}, "empty", 'its "output" is empty'),
        ({"instruction": [7], "output": "x"}, "wrong type", 'its "instruction" must be a string, not a list'),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "wrong type", "turn 1 of its"),
        ({"text": None}, "wrong type", "not null"),
        ({"text": ["a"]}, "wrong type", "not a list"),
        ({"text": " "}, "empty", "is empty"),
        (
            {"txt": "x"},
            "unknown columns",
            "has none of the keys messages, conversations, instruction with output, prompt with completion, question with "
            "answer, text; it has 'txt'. Say which is which, for example --map-keys '{\"text\": \"txt\"}'",
        ),
        ([1], "wrong type", "must be a JSON object"),
    ],
)
def test_a_row_that_cannot_be_used_says_why_and_is_counted(row, reason, words):
    made = encode_block_of(SAME["text"], row, SAME["messages"])
    [reject] = made.rejects
    assert (reject.file, reject.line, reject.reason) == ("x.jsonl", 2, reason)
    assert words in reject.message
    assert made.counts[f"rejected: {reason}"] == 1 and made.counts["kept"] == 2 and made.counts["read"] == 3


def test_tools_calls_and_results_of_openai_and_of_sharegpt_give_the_same_bytes():
    function = {"name": "add", "parameters": {}}
    openai = {
        "tools": [{"type": "function", "function": function}],
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "a", "content": "2"},
            {"role": "tool", "tool_call_id": "b", "content": "two"},
            {"role": "assistant", "content": "Two."},
        ],
    }  # fmt: skip
    sharegpt = {
        "tools": json.dumps([function]),
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2\ntwo"},
            {"from": "gpt", "value": "Two."},
        ],
    }
    a, b = (encode_block_of(row, template=PRESETS["rwkv-g1-tools"]) for row in (openai, sharegpt))
    assert a.ids.tobytes() == b.ids.tobytes() and not a.rejects and (a.roles == Role.TOOL).any()
    assert a.counts["tools"] == 1
    assert learnt(a) == ['\n{"name": "add", "arguments": {"a": 1}}\n```\n\n Two.<end>']


def test_thoughts_are_detected_in_their_columns_and_in_the_answer_itself():
    rows = [
        {"messages": [CHAT[0], {"role": "assistant", "content": "A", "reasoning_content": "Hm"}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": "<think>\nHm\n</think>\n\nA"}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": "A", "think": "Hm"}]},
        {"prompt": CHAT[0]["content"], "response": "A", "think": "Hm"},
    ]
    made = [encode_block_of(row, template=PRESETS["rwkv-g1"]) for row in rows]
    assert len({m.ids.tobytes() for m in made}) == 1 and learnt(made[0]) == [" <think>\nHm\n</think>\nA<end>"]
    fake = [encode_block_of(row, template=PRESETS["rwkv-g1-fakethink"]) for row in rows]
    assert {tuple(learnt(m)) for m in fake} == {(">\nA<end>",)}


def test_an_answer_of_weight_0_is_not_learnt_and_a_row_of_nothing_else_is_dropped():
    light = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in CHAT]
    made = encode_block_of({"messages": [CHAT[0], light[1], *CHAT[2:]]}, {"messages": light})
    assert learnt(made) == [" 再见。\nBye!<end>"]
    assert made.counts[f"dropped: {NOTHING_TO_LEARN}"] == 1 and made.counts["kept"] == 1


def test_mask_history_learns_the_last_answer_only_and_expand_every_answer_in_a_row_of_its_own():
    assert learnt(encode_block_of(SAME["messages"])) == [" 在的。\n\n 再见。\nBye!<end>"]
    assert learnt(encode_block_of(SAME["alpaca"], mask_history=True)) == [" 再见。\nBye!<end>"]
    made = encode_block_of(SAME["messages"], expand=True)
    assert learnt(made) == [" 在的。<end>", " 再见。\nBye!<end>"]
    assert made.counts["kept"] == made.counts["read"] == 1 and made.lines.tolist() == [1, 1]


def test_ready_texts_are_masked_and_expanded_like_the_same_dialogue():
    for options in ({"mask_history": True}, {"expand": True}):
        ready, made = encode_block_of(SAME["text"], **options), encode_block_of(SAME["messages"], **options)
        assert ready.ids.tolist() == made.ids.tolist() and ready.roles.tolist() == made.roles.tolist()


def test_a_column_that_is_mapped_to_one_part_does_not_play_its_usual_one_as_well():
    for keys in ('{"prompt": "input", "response": "target"}', '{"prompt": "input", "response": "output"}'):
        made = encode_block_of({"input": "Q", "target": "A", "output": "A"}, columns=columns(keys))
        assert tokenizer.decode(made.ids[:-1]) == "User: Q\n\nAssistant: A"


def test_a_limit_of_a_turn_keeps_what_fits_and_never_leaves_an_empty_turn():
    answer = {"role": "assistant", "content": "hello world", "think": "some long thought of many words"}
    row = {"messages": [CHAT[0], answer]}
    for most in range(1, 24):
        for name, template in (("rwkv-g1", PRESETS["rwkv-g1"]), ("empty", PRESETS["empty"])):
            for policy in ("truncate", "truncate-left"):
                made = encode_block_of(row, template=template, limits=Limits(target=most, policy=policy))
                dropped = sum(n for reason, n in made.counts.items() if reason.startswith("dropped: "))
                assert made.counts["kept"] + dropped == 1 and not made.rejects, name
                if made.counts["kept"]:
                    assert (made.roles == A).sum() <= most
                    said = tokenizer.decode(made.ids[(made.roles == A) | (made.roles == Role.UNTRAINED)])
                    assert said.replace("<think>", "").replace("</think>", "").strip("\0 \n")
    made = encode_block_of(
        {"instruction": "hello world", "input": "x", "output": "ok"}, limits=Limits(source=1, policy="truncate")
    )
    assert made.counts["dropped: longer than SOURCE_LENGTH"] == 1


@pytest.mark.parametrize(("eot", "end"), [("doc", [0]), ("blank", [261]), ("both", [261, 0]), ("x17", [24])])
@pytest.mark.parametrize("row", [{"text": "Hi"}, {"messages": [CHAT[0], {"role": "assistant", "content": "Hi"}]}])
def test_a_row_ends_with_its_terminator_once(eot, end, row):
    ids = encode_block_of(row, eot=eot).ids.tolist()
    assert ids[-len(end) :] == end and ids.count(0) == end.count(0) and ids.count(24) == end.count(24)
    assert 0 not in encode_block_of(row, eot=eot, end_of_doc=False).ids


# ---- one pass, and who said what ----


@settings(max_examples=300, deadline=None)
@given(DIALOGUES, st.sampled_from(sorted(PRESETS)), st.sampled_from(sorted(ENDINGS)))
def test_ids_are_the_encoding_of_the_whole_text_and_a_token_is_learnt_if_its_bytes_touch_an_answer(turns, name, eot):
    pieces = Pieces(*PRESETS[name].render(dialogue(turns), ENDINGS[eot]))
    if not pieces.texts:
        return
    ids, roles = encode_row(pieces, end_of_doc=True)
    whole = "".join(pieces.texts)
    assert ids.tolist() == [*tokenizer.encode(whole), 0]
    spans, at = to_spans(*pieces), 0
    for token, role in zip(ids[:-1].tolist(), roles[:-1].tolist(), strict=True):
        end = at + len(tokenizer.token_bytes()[token])
        touched = any(s.start < end and at < s.end for s in spans if s.role is A)
        assert (role == A) == touched
        at = end
    assert roles[-1] == pieces.roles[-1]


@settings(max_examples=100, deadline=None)
@given(st.lists(DIALOGUES, min_size=1, max_size=6), st.sampled_from(sorted(PRESETS)), st.booleans())
def test_many_rows_at_once_are_each_row_alone(many, name, end_of_doc):
    pieces = [Pieces(*PRESETS[name].render(dialogue(turns))) for turns in many]
    pieces = [p for p in pieces if p.texts]
    if not pieces:
        return
    result = encode_rows(pieces, end_of_doc)
    for i, piece in enumerate(pieces):
        ids, roles = encode_row(piece, end_of_doc)
        row = slice(result.first[i], result.first[i + 1])
        assert result.ids[row].tolist() == ids.tolist() and result.roles[row].tolist() == roles.tolist()
        assert result.answered[i] == (roles == A).any()
    assert result.pieces.sum() + end_of_doc * len(pieces) == len(result.ids)


def test_no_token_holds_a_nul_beside_other_bytes():
    """What joining rows by NUL rests on."""
    assert [i for i, token in enumerate(tokenizer.token_bytes()) if b"\0" in token] == [1]
    assert tokenizer.token_bytes()[1] == b"\0"


@pytest.mark.smoke
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("eot", ENDINGS)
@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "human", "system", "gpt", "Bot"]), TEXT), max_size=6)
)
def test_the_short_way_of_plain_conversations_gives_what_the_long_way_gives(name, eot, turns):
    row = {"messages": [{"role": role, "content": content} for role, content in turns], "id": 3}
    template, ending = PRESETS[name], ENDINGS[eot]
    quick = FastPath(template, ending, columns(""), "auto").conversation(row, repair=False)
    if quick is not None:
        schema, result = Reader(repair=False).read(row)
        assert quick == (schema, Pieces(*template.render(result, ending)))


def test_most_conversations_do_go_the_short_way():
    quick = FastPath(WORLD, ENDINGS["doc"], columns(""), "auto")
    assert quick.conversation(SAME["messages"], repair=True) is None  # letters outside ASCII want the repair
    assert quick.conversation(SAME["messages"], repair=False) and quick.conversation(SAME["sharegpt"], repair=False)


# ---- limits ----

WHOLE = encode_block_of({"messages": LONG})
N = len(WHOLE.ids)


def ends_well(made, eot: str) -> bool:
    """The last row ends with the terminator of EOT, which is learnt. ("。" joins with a newline: the text counts.)"""
    words = tokenizer.decode(made.ids)
    text = {"doc": "", "blank": "\n\n", "both": "\n\n", "x17": "\x17"}[eot]
    return words.endswith(text) and (made.ids[-1] == 0) == (eot in ("doc", "both")) and made.roles[-1] == A


@pytest.mark.parametrize("policy", ["drop", "truncate", "truncate-left", "split"])
@pytest.mark.parametrize("eot", ENDINGS)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_row_of_exactly_max_tokens_stays_and_a_longer_one_goes_the_way_of_overlong(policy, eot, extra):
    size = len(encode_block_of({"messages": LONG}, eot=eot).ids)
    made = encode_block_of({"messages": LONG}, eot=eot, limits=Limits(max_tokens=size + extra, policy=policy))
    assert made.counts["read"] == made.counts["kept"] + sum(
        n for k, n in made.counts.items() if k.startswith("dropped")
    )
    if extra >= 0:
        assert made.sizes.tolist() == [size]
    elif policy == "drop":
        assert not len(made.ids) and made.counts["dropped: longer than MAX_TOKENS"] == 1
    else:
        assert made.counts["kept"] == 1 and max(made.sizes) <= size - 1
        assert ends_well(made, eot) == (policy != "truncate")  # a row whose end is cut off has no terminator


@settings(max_examples=60, deadline=None)
@given(st.integers(2, N + 2), st.sampled_from(["truncate", "truncate-left", "split"]), st.sampled_from(sorted(ENDINGS)))
def test_no_row_is_above_max_tokens_or_without_an_answer_and_no_character_is_cut(most, policy, eot):
    made = encode_block_of({"messages": LONG}, eot=eot, limits=Limits(max_tokens=most, policy=policy))
    for ids, roles in rows_of(made):
        assert len(ids) <= most and (roles == A).any()
        text = tokenizer.decode_bytes(ids.tolist()).decode("utf-8")  # raises where a character is cut
        assert [i for i in ids.tolist() if i] == tokenizer.encode(text)
    assert made.counts["kept"] + sum(n for k, n in made.counts.items() if k.startswith("dropped")) == 1


@pytest.mark.parametrize("most", [5, 17, 40])
def test_split_uses_every_token_of_a_text_once(most):
    row = {"text": "日月盈昃，辰宿列张。🐱 And so on. " * 7}
    whole, made = encode_block_of(row), encode_block_of(row, limits=Limits(max_tokens=most, policy="split"))
    assert made.ids.tolist() == whole.ids.tolist() and max(made.sizes) <= most and len(made.sizes) > 3


@pytest.mark.parametrize(("name", "role"), [("source", U), ("target", A)])
@pytest.mark.parametrize("policy", ["drop", "truncate", "truncate-left"])
@pytest.mark.parametrize("eot", ENDINGS)
def test_a_turn_of_exactly_its_limit_stays_and_a_longer_one_goes_the_way_of_overlong(name, role, policy, eot):
    row = {"messages": LONG[1:]}
    whole = encode_block_of(row, eot=eot)
    size = int((whole.roles == role).sum())
    same = encode_block_of(row, eot=eot, limits=Limits(**{name: size}, policy=policy))
    assert same.ids.tolist() == whole.ids.tolist()
    made = encode_block_of(row, eot=eot, limits=Limits(**{name: size - 1}, policy=policy))
    if policy == "drop":
        assert made.counts[f"dropped: longer than {name.upper()}_LENGTH"] == 1 and not len(made.ids)
        return
    assert 0 < (made.roles == role).sum() <= size - 1
    assert ends_well(made, eot) == (role is U or policy != "truncate")
    kept = "天地" if role is U else "日月"
    assert (kept * 1 in tokenizer.decode(made.ids[made.roles == role])[:4]) == (policy == "truncate")


def test_rows_with_trouble_do_not_disturb_their_neighbours():
    rows = [SAME["messages"], {"messages": LONG}, SAME["text"], {"txt": 1}, SAME["messages"]]
    made = encode_block_of(*rows, limits=Limits(max_tokens=60, policy="drop"))
    short = encode_block_of(SAME["messages"])
    assert made.lines.tolist() == [1, 3, 5]
    assert made.ids.tolist() == short.ids.tolist() * 3 and made.hashes.tolist() == short.hashes.tolist() * 3
    assert made.places["dropped"][0].line == 2 and made.rejects[0].line == 4


def test_half_a_surrogate_rejects_its_own_row_only():
    reader = Reader(repair=False)
    with pytest.raises(RowError, match="surrogate"):
        encode_row(Pieces(*WORLD.render(reader.read({"prompt": "a", "response": "b\ud800"})[1])), True)
    recipe = EncodeConfig(WORLD, repair=False)
    rows = [(1, {"text": "good"}), (2, {"prompt": "a", "response": "b\ud800"}), (3, {"text": "good"})]
    made = RowEncoder(recipe).block(Block("x.parquet", 1, rows, 0))
    assert made.lines.tolist() == [1, 3] and made.rejects[0].reason == "surrogate"


def test_mojibake_is_repaired_before_it_is_encoded_and_counted():
    bad = [{**m, "content": m["content"].encode().decode("latin-1")} for m in CHAT]
    made = encode_block_of({"messages": bad})
    assert made.ids.tolist() == encode_block_of(SAME["messages"]).ids.tolist() and made.counts["repaired"] == 1
    assert encode_block_of({"messages": bad}, repair=False).ids.tolist() != made.ids.tolist()


def test_expanding_learns_the_same_as_learning_all_answers_of_a_row_but_for_their_ends():
    """On a causal model what follows an answer does not change its loss."""
    import torch
    from helpers import tiny

    turns = [("user", "Count"), ("assistant", "One, two"), ("user", "And?"), ("assistant", "Three 四")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    model = tiny.model()

    def loss(made) -> float:
        total = 0.0
        for ids, roles in rows_of(made):
            tokens = torch.from_numpy(ids.astype(np.int64))
            with torch.no_grad():
                logits = model(tokens[None, :-1])[0][0]
            losses = torch.nn.functional.cross_entropy(logits.float(), tokens[1:], reduction="none")
            words = (roles[1:] == A) & (ids[1:] != 0) & (ids[1:] != 261)  # not the end of the row or of the turn
            total += float(losses[torch.from_numpy(words)].double().sum())
        return total

    whole, expanded = encode_block_of(row), encode_block_of(row, expand=True)
    assert len(expanded.sizes) == 2
    assert loss(whole) == pytest.approx(loss(expanded), rel=1e-5)


@pytest.mark.parametrize("again", ['"content":"b"', '"role":"system"'])
def test_a_message_with_a_key_twice_is_rejected_and_named(again):
    row = f'{{"messages":[{{"role":"user","content":"a",{again}}},{{"role":"assistant","content":"c"}}]}}'
    with pytest.raises(RowError, match=r'messages\[0\] has "(content|role)" twice, with different values'):
        parse(row.encode(), keys=json_keys.counts([row.encode()])[0])
