"""Token files of another vocabulary are refused, and files of World's never."""

import json
import random

import numpy as np
import pytest
from helpers import tiny
from helpers.training import config, tokenize

from rwkv_peft.cli import inspect, train
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.data import binidx, vocabulary_check
from rwkv_peft.data.vocabulary_check import describe_vocabulary_problem
from rwkv_peft.text import tokenizer

# "The quick brown fox jumps over the lazy dog, ..." by GPT-NeoX's 20B tokenizer
IDS_20B = [510, 3158, 4541, 253, 6749, 275, 253, 5728, 13, 285, 253, 2030, 637, 10923, 352, 715, 253, 13416, 15]
# "The quick brown fox jumps over the lazy dog. It is a good day, isn't it?" by GPT-2's and by Llama 2's
IDS_GPT2 = [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13, 632, 318, 257, 922, 1110, 11, 2125, 470, 340, 30]
IDS_LLAMA = [
    450,
    4996,
    17354,
    1701,
    29916,
    432,
    17204,
    975,
    278,
    17366,
    11203,
    29889,
    739,
    338,
    263,
    1781,
    2462,
    29892,
    3508,
]
# "[CLS] the quick brown fox ... [SEP]" by BERT's
IDS_BERT = [
    101,
    1996,
    4248,
    2829,
    4419,
    14523,
    2058,
    1996,
    13971,
    3899,
    1012,
    2009,
    2003,
    1037,
    2204,
    2154,
    1010,
    3475,
    102,
]

TEXTS = {
    "English": "User: What is red?\n\nAssistant: A colour, like a ripe tomato; isn't it?\n\n" * 20,
    "Chinese": "User: 你好！请介绍一下自己。\n\nAssistant: 你好，我是一个语言模型，可以用GPU训练。\n\n" * 20,
    "code": "def f(x):\n\treturn {'a': [x ** 2 for _ in range(3)]}  # \x1b[0m\r\n#include <stdio.h>\n" * 20,
    "Japanese": "これは、とても良い天気です。カタカナ・ｶﾅと漢字のAPI。\n" * 30,
    "Korean": "API를 사용하여 모델을 훈련합니다. 漢字도 있습니다.\n" * 30,
    "Russian": "Это очень хороший день, не правда ли? OK.\n" * 30,
    "Thai": "วันนี้อากาศดีมากใช่ไหม ฉันไปตลาด\n" * 30,
    "classical Chinese": "龘，龍行龘龘也。䶮䶮，雲龍之狀。彧彧猗猗，鬱鬱蔥蔥，齉齾齟齬。\n" * 30,
    "words of others in Russian": "В этом PDFе описан APIшный метод; IT-компания, iPhone. " + "Это обычный русский текст. " * 9,
    "Thai and Latin": "ใช้APIของGPUได้ \u0627\u0644API \u05d4API 为α的值\n" * 30,
    "five languages": "apple 苹果 яблоко りんご 사과 μήλο\nbook 书 книга 本 책 βιβλίο\n" * 30,
    "emoji and mathematics": "😀🎉 👍🏽 ❤️ naïve café Ω≈ç√∫ µm αx + βy = γ, Δt → ∞\n" * 30,
    "mojibake": "ä½ å¥½ï¼Œ Ã©tÃ© â€œquoteâ€ \ufffd\ufffd\n" * 30,
    "EOT=x17": "User: What is red?\n\nAssistant: A colour.\x17\x17User: 你好\n\nAssistant: 好。\x17" * 20,
    "pages": "a page\n\f" * 60,
    "Cyrillic beside Han, kana and hangul": "книга书дом家 これはкнигаです。 книга는 дом에서\n" * 30,
    "Latin with endings of others": "WhatsAppपर Googleमें VPNом APIшный PDFы Facebookএর PDFში WhatsAppல்\n" * 30,
    "Russian endings": "VPNом PDFы JSONе\n" * 30,
    "Thai and Chinese": "สวัสดี你好ครับ谢谢คุณ再见ไป\n" * 30,
    "Indic, Arabic and Hebrew beside Chinese": "नमस्ते你好 مرحبا谢谢 שלום你好 функцияα\n" * 30,
    "rare characters in English": "\n".join(
        f"{chr(0x9F98 - 7 * n)} {chr(0x8800 + 5 * n)} is a character with a meaning" for n in range(100)
    ),
    "rare characters and their sounds": "\n".join(f"{chr(0x8D00 + n)}: zhen, name" for n in range(200)),
    "base64": "TWFuIGlzIGRpc3Rpbmd1aXNoZWQsIG5vdCBvbmx5IGJ5IGhpcyByZWFzb24sIGJ1dCBieSB0aGlz" * 10,
}  # fmt: skip


def write(prefix, rows):
    with binidx.Writer(prefix, {"": np.uint16}) as writer:
        for row in rows:
            writer.add({"": np.array(row, np.uint16)})
        writer.commit()
    return prefix


def rows_of(text: str, how: str) -> list[list[int]]:
    """A text's tokens, as other tools put them into rows."""
    ids = tokenizer.encode(text)
    if how == "cut":
        return [ids[i : i + 16] for i in range(0, len(ids), 16)]
    if how == "packed":
        return [[*ids, 0] * 3]
    if how == "by lines":
        return [[i for line in text.splitlines(keepends=True) for i in tokenizer.encode(line)]]
    if how == "by words":
        return [[i for word in text.split(" ") for i in (*tokenizer.encode(word), *tokenizer.encode(" "))]]
    if how == "by characters":
        return [[i for character in text for i in tokenizer.encode(character)]]
    return [[*ids, 0]]


@pytest.mark.smoke(20)
@pytest.mark.parametrize("how", ["whole", "cut", "packed", "by lines", "by words", "by characters"])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_file_of_the_world_vocabulary_is_taken(tmp_path, kind, how):
    assert describe_vocabulary_problem(write(tmp_path / "x", rows_of(TEXTS[kind], how))) == ""


@pytest.mark.parametrize("ids", [IDS_20B, IDS_GPT2, IDS_LLAMA, IDS_BERT], ids=["20B", "GPT-2", "Llama 2", "BERT"])
@pytest.mark.parametrize("rows", [1, 5, 400])
def test_a_file_of_another_vocabulary_is_refused(tmp_path, ids, rows):
    reported = describe_vocabulary_problem(write(tmp_path / "x", [ids * 4] * rows))
    assert "x.bin holds no text of the World vocabulary" in reported and "another vocabulary" in reported


def test_a_few_damaged_places_are_no_other_vocabulary(tmp_path):
    ids = tokenizer.encode(TEXTS["English"] * 5)
    ids[100], ids[900] = 200, 8
    assert describe_vocabulary_problem(write(tmp_path / "x", [ids])) == ""


def test_short_files_are_judged_too(tmp_path):
    assert describe_vocabulary_problem(write(tmp_path / "x", [[1, 2]])) == ""
    assert describe_vocabulary_problem(write(tmp_path / "y", [[], [0], []])) == ""


def test_form_feeds_of_old_sources_are_no_other_vocabulary(tmp_path):
    text = ("int main(void)\n{\n\treturn 0;\n}\n" * 20 + "\f\n") * 30
    assert describe_vocabulary_problem(write(tmp_path / "x", [tokenizer.encode(text)])) == ""


def test_a_sample_is_small_and_comes_from_all_over_a_file():
    tokens, sizes = np.arange(1, 3_000_001) % 60_000 + 1, np.full(3000, 1000)
    parts = vocabulary_check.sample(tokens, sizes)
    assert sum(map(len, parts)) == 64 * 1024 and max(map(len, parts)) <= 1000
    assert parts[0][0] == tokens[0] and parts[-1][-1] == tokens[-1]


def test_training_and_the_inspector_give_one_verdict(ready, capsys):
    write(ready / "data" / "foreign", [IDS_20B * 4] * 12)
    with pytest.raises(SettingErrors) as result:
        train.command(config(DATA_PATH="foreign", LOSS_MASK="pad"), ["--dry-run"])
    [problem] = result.value.problems
    verdict = describe_vocabulary_problem(ready / "data" / "foreign")
    assert problem.name == "DATA_PATH" and problem.message.startswith(verdict) and "VOCABULARY=own" in problem.message
    with pytest.raises(SystemExit) as left:
        inspect.main(["foreign"])
    assert left.value.code == 2 and verdict in capsys.readouterr().err
    inspect.main(["foreign", "--own-vocabulary"])
    assert "nothing is wrong with it" in capsys.readouterr().out


def test_a_vocabulary_of_ones_own_stays_usable(ready):
    write(ready / "data" / "notes", [[random.Random(n).randrange(1, 60) for _ in range(40)] for n in range(8)])
    more = {"DATA_PATH": "notes", "LOSS_MASK": "pad"}
    with pytest.raises(SettingErrors, match="no text of the World vocabulary"):
        train.command(config(**more), ["--dry-run"])
    train.command(config(VOCABULARY="own", **more), ["--dry-run"])
    tiny.save_model(ready / "model" / "small.pth", shape=tiny.geometry(vocab=64))
    train.command(config(MODEL_PATH="small.pth", **more), ["--dry-run"])


def test_held_out_data_of_another_vocabulary_are_refused(ready):
    write(ready / "data" / "foreign", [IDS_20B * 4] * 12)
    with pytest.raises(SettingErrors, match="VAL_DATA.*no text of the World vocabulary"):
        train.command(config(VAL_DATA="foreign", LOSS_MASK="pad"), ["--dry-run"])


def test_a_report_that_names_another_vocabulary_is_believed(ready):
    report = ready / "data" / "chat.report.json"
    content = json.loads(report.read_text())
    assert content["vocabulary"] == "rwkv_vocab_v20230424"
    report.write_text(json.dumps(content | {"vocabulary": "20B"}))
    assert "was made with the vocabulary 20B, not World's" in describe_vocabulary_problem(ready / "data" / "chat")


def test_a_replaced_bin_is_detected_beside_a_report_of_ours(ready):
    write(ready / "data" / "chat", [IDS_20B * 4] * 12)
    assert "no text of the World vocabulary" in describe_vocabulary_problem(ready / "data" / "chat")


def test_held_out_rows_are_known_by_the_report_of_their_data(ready):
    path = tiny.write_jsonl(ready / "data" / "held.jsonl", tiny.CHATS)
    tokenize(path, VALID_PERCENT="20", EOT="x17")
    prefix, report = ready / "data" / "held.valid", ready / "data" / "held.report.json"
    content = json.loads(report.read_text())
    assert describe_vocabulary_problem(prefix) == ""
    report.write_text(json.dumps(content | {"vocabulary": "20B"}))
    assert "held.report.json says that held.valid was made with the vocabulary 20B" in describe_vocabulary_problem(
        prefix
    )
    report.unlink()
    assert describe_vocabulary_problem(prefix) == describe_vocabulary_problem(ready / "data" / "held") == ""
