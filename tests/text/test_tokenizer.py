"""World tokens: golden ids, the two encoders agree, decoding gives the text back, half characters wait."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.text import tokenizer
from rwkv_peft.text.tokenizer import PythonEncoder, Utf8Stream, decode, encode, token_bytes

SLOW = PythonEncoder()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("User:", [24281, 59]),
        ("Assistant:", [5585, 41693, 59]),
        ("System:", [40812, 59]),
        ("\n\n", [261]),
        ("\x17", [24]),
        ("。\n\nUser", [28329, 11, 24281]),
        ("", []),
    ],
)
def test_golden_ids(text, ids):
    assert encode(text) == ids
    assert SLOW.encode(text) == ids


def test_the_vocabulary_is_whole():
    assert len(token_bytes()) == 65536
    assert sum(1 for b in token_bytes() if b) == 65529
    assert token_bytes()[0] == b"" and token_bytes()[65530] == b""


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300))
def test_both_encoders_agree_and_decoding_gives_the_text_back(text):
    ids = encode(text)
    assert SLOW.encode(text) == ids
    assert decode(ids) == text


def test_random_mixtures_of_vocabulary_entries_agree():
    words, pick = [b for b in token_bytes() if b], random.Random(0)
    for _ in range(300):
        text = b"".join(pick.choices(words, k=20)).decode("utf-8", "ignore")
        assert encode(text) == SLOW.encode(text)


def test_half_surrogates_are_refused():
    with pytest.raises(UnicodeEncodeError):
        encode("a\ud800b")
    with pytest.raises(UnicodeEncodeError):
        SLOW.encode("a\ud800b")


def test_a_stream_of_tokens_never_shows_half_a_character():
    text = "海鸥🕊️ flies; 茶。"
    stream = Utf8Stream()
    # byte tokens are the worst case: every character comes in pieces
    pieces = [stream.push(token_bytes().index(bytes([b]))) for b in text.encode()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_without_the_fast_library_the_python_encoder_serves():
    code = (
        "import sys; sys.modules['pyrwkv_tokenizer'] = None\n"
        "from rwkv_peft.text import tokenizer\n"
        "assert isinstance(tokenizer.encoder(), tokenizer.PythonEncoder)\n"
        "print(tokenizer.encode('你好。\\n\\nUser'))"
    )
    root = Path(tokenizer.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == str(encode("你好。\n\nUser"))
