"""Roles of tokens from spans of bytes, and which targets each LOSS_MASK trains."""

import numpy as np
import pytest

from rwkv_peft.data.masking import roles_of_tokens, target_weights
from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role
from rwkv_peft.text.turns import spans_of_text


def encode(text: str):
    """ids and roles of a ready text, as training finds them in files without roles."""
    ids = np.array([*tokenizer.encode(text), 0], dtype=np.uint16)
    return ids, roles_of_tokens(tokenizer.token_lengths()[ids], spans_of_text(text.encode()), end_of_doc=True)


def trained_text(ids, roles, mask: str) -> str:
    weights = target_weights(roles, mask)
    return tokenizer.decode(ids[1:][weights > 0])


def test_answers_are_trained_from_their_space_to_their_blank_line():
    text = "User: 在吗？\n\nAssistant: 在的。\n\nUser: 再见\n\nAssistant: 再见。"
    ids, roles = encode(text)
    assert trained_text(ids, roles, "qa") == " 在的。\n\n 再见。"
    assert target_weights(roles, "qa")[-1] == 1  # and the end of the document
    assert trained_text(ids, roles, "last") == " 再见。"
    assert target_weights(roles, "last")[-1] == 1
    assert target_weights(roles, "pad").all() and target_weights(roles, "none").all()


def test_a_colon_that_joins_the_answer_does_not_lose_it():
    text = 'User: say it\n\nAssistant:"It"'  # one token holds the colon and the quote
    ids, roles = encode(text)
    assert trained_text(ids, roles, "qa").endswith('"It"')


def test_a_conversation_that_ends_with_the_user_does_not_train_its_end():
    text = "User: a\n\nAssistant: b\n\nUser: c"
    _, roles = encode(text)
    assert roles[-1] == Role.USER and target_weights(roles, "qa")[-1] == 0


def test_documents_of_a_window_keep_their_own_last_answer():
    A, U = Role.ASSISTANT, Role.USER
    roles = np.array([U, A, U, A, U, A, A, U, A], dtype=np.uint8)
    first = np.zeros(9, dtype=bool)
    first[[0, 4, 7]] = True
    assert target_weights(roles, "last", first).tolist() == [0, 0, 1, 0, 1, 1, 0, 1]
    assert target_weights(roles, "qa", first).tolist() == [1, 0, 1, 0, 1, 1, 0, 1]
    # pad: a document's first token is no one's target; none: everything is
    assert target_weights(roles, "pad", first).tolist() == [1, 1, 1, 0, 1, 1, 0, 1]
    assert target_weights(roles, "none", first).all()


@pytest.mark.parametrize("mask", ["none", "pad", "qa", "last"])
def test_weights_have_one_place_per_target(mask):
    assert target_weights(np.zeros(5, dtype=np.uint8), mask).shape == (4,)
    assert target_weights(np.zeros(1, dtype=np.uint8), mask).shape == (0,)
