"""What another tool has left in the rows is result and named, and rewritten where it can be read in one way only."""

import json

import numpy as np
import pytest
from helpers.training import tokenize

from rwkv_peft.preprocess import foreign_headings
from rwkv_peft.preprocess.pipeline import EncodeConfig, RowEncoder
from rwkv_peft.preprocess.reader import Block
from rwkv_peft.preprocess.report import foreign_lines
from rwkv_peft.preprocess.row_stream import RowStream
from rwkv_peft.preprocess.truncate import Limits
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role

TWO_TURNS = "User: Hi\n\nAssistant: Yo"
FOUR_TURNS = "User: Hi\n\nAssistant: Yo\n\nUser: More\n\nAssistant: Ok"
WITH_SYSTEM = "System: Be.\n\nUser: Hi\n\nAssistant: Yo"
PREFACE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

# ready texts in other formats, and what they are in rwkv-world
HEADINGS = {
    "chinese": ("用户：Hi\n助手：Yo\n用户：More\n助手：Ok", FOUR_TURNS),
    "chinese, half-width": ("用户:Hi\n\n助手:Yo", TWO_TURNS),
    "traditional": ("使用者：Hi\n助理：Yo", TWO_TURNS),
    "japanese": ("ユーザー：Hi\nアシスタント：Yo", TWO_TURNS),
    "question in chinese": ("问：Hi\n答：Yo", TWO_TURNS),
    "question in words": ("问题：Hi\n\n回答：Yo", TWO_TURNS),
    "brackets": ("【问】Hi\n【答】Yo", TWO_TURNS),
    "brackets and colons": ("【用户】：Hi\n【助手】：Yo", TWO_TURNS),
    "Q and A": ("Q: Hi\n\nA: Yo", TWO_TURNS),
    "Q and A in one block": ("Q: Hi\nA: Yo\nQ: More\nA: Ok", FOUR_TURNS),
    "numbered": ("Q1: Hi\nA1: Yo\nQ2: More\nA2: Ok", FOUR_TURNS),
    "question and answer": ("Question: Hi\nAnswer: Yo", TWO_TURNS),
    "human and assistant": ("Human: Hi\n\nAssistant: Yo\n\nHuman: More\n\nAssistant: Ok", FOUR_TURNS),
    "human and AI": ("Human: Hi\nAI: Yo", TWO_TURNS),
    "user and bot": ("User: Hi\nBot: Yo", TWO_TURNS),
    "bold": ("**User:** Hi\n\n**Assistant:** Yo", TWO_TURNS),
    "chatml": (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n", WITH_SYSTEM),
    "alpaca": ("### Instruction:\nHi\n\n### Response:\nYo", TWO_TURNS),
    "alpaca with its preface": (f"{PREFACE}\n\n### Instruction:\nHi\n\n### Response:\nYo", f"System: {PREFACE}\n\n{TWO_TURNS}"),
    "alpaca with input": ("### Instruction:\nHi\n\n### Input:\nthere\n\n### Response:\nYo", "User: Hi\nthere\n\nAssistant: Yo"),
    "alpaca without colons": ("### Instruction\nHi\n\n### Response\nYo", TWO_TURNS),
    "guanaco": ("### Human: Hi### Assistant: Yo### Human: More### Assistant: Ok", FOUR_TURNS),
    "llama 2": ("<s>[INST] <<SYS>>\nBe.\n<</SYS>>\n\nHi [/INST] Yo </s>", WITH_SYSTEM),
    "llama 2, several": ("<s>[INST] Hi [/INST] Yo </s><s>[INST] More [/INST] Ok </s>", FOUR_TURNS),
    "llama 3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>", TWO_TURNS),
    "gemma": ("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>", TWO_TURNS),
    "deepseek": ("<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Yo<｜end▁of▁sentence｜>", TWO_TURNS),
    "zephyr": ("<|system|>\nBe.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo</s>", WITH_SYSTEM),
    "oasst": ("<|prompter|>Hi<|endoftext|><|assistant|>Yo<|endoftext|>", TWO_TURNS),
    "harmony": ("<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>Yo<|return|>", TWO_TURNS),
    "openchat": ("GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant: Yo<|end_of_turn|>", TWO_TURNS),
    "together": ("<human>: Hi\n<bot>: Yo", TWO_TURNS),
    "vicuna": ("USER: Hi ASSISTANT: Yo</s>USER: More ASSISTANT: Ok</s>", FOUR_TURNS),
    "moss": ("<|Human|>: Hi<eoh>\n<|MOSS|>: Yo<eom>", TWO_TURNS),
    "dolly": ("### Instruction:\nHi\n\n### Response:\nYo\n\n### End", TWO_TURNS),
    "pairs apart": ("问：Hi\n答：Yo\n\n问：More\n答：Ok", FOUR_TURNS),
    "bot format": ("System✿Be.✿\nUser✿Hi✿\nBot✿Yo✿", WITH_SYSTEM),
}  # fmt: skip


def encode_block_of(*rows, template="rwkv-world", **options):
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return RowEncoder(EncodeConfig(PRESETS[template], **options)).block(Block("x.jsonl", 1, data, 0))


def texts(made) -> list[str]:
    ends = np.cumsum(made.sizes)
    return [
        tokenizer.decode([i for i in made.ids[e - n : e].tolist() if i]) for e, n in zip(ends, made.sizes, strict=True)
    ]


def chat(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


def result(made) -> set[str]:
    return {name.removeprefix("found: ") for name, n in made.counts.items() if name.startswith("found: ") and n}


@pytest.mark.parametrize("kind", HEADINGS)
def test_headings_of_another_format_are_detected(kind):
    made = encode_block_of({"text": "A plain text."}, {"text": HEADINGS[kind][0]})
    assert result(made) == {"headings"} and made.counts["found: headings"] == 1
    assert made.places["headings"][0].line == 2


@pytest.mark.parametrize("kind", HEADINGS)
def test_headings_of_another_format_become_turns(kind):
    text, wanted = HEADINGS[kind]
    made = encode_block_of({"text": text}, convert=True)
    assert texts(made) == [wanted] and not result(made)
    assert made.counts["converted: headings"] == 1 and made.counts["with an answer"] == 1
    assert tokenizer.decode(made.ids[made.roles == Role.ASSISTANT]).rstrip("\0").endswith(("Yo", "Ok"))


@pytest.mark.parametrize(
    "text",
    ["user: Hi\nassistant: Yo", "USER: Hi\nASSISTANT: Yo", "User：Hi\n\nAssistant：Yo", "User: Hi\nAssistant: Yo"],
)
def test_our_own_headings_spelled_otherwise_become_turns(text):
    assert encode_block_of({"text": text}).places["overlooked"]
    made = encode_block_of({"text": text}, convert=True)
    assert texts(made) == [TWO_TURNS] and not made.places


@pytest.mark.parametrize(
    "text",
    [
        TWO_TURNS,
        WITH_SYSTEM + "\nAnswer: 5",
        "In the FAQ, Q: stands for question.",
        "Q: is the letter for questions.\nIt is often used.",
        "Q: What?\nA: one\nB: two\nC: three",
        "user: admin\npassword: x\nmodel: y\nbot: z",
        "### Instruction set\nIt is large.\n### Response time\nIt is short.",
        "他问：“你去哪儿？”\n她答：“回家。”",
        "Input: 5\nOutput: 7",
        'print("a\\n")\nprint("b\\n\\n")',
        'printf("a\\n"); printf("b\\n\\n");',
        "text.split('\\n').join('\\n\\n')",
        "Write \\n for a line break and \\n\\n for a paragraph.",
        "Let $\\nabla f \\neq 0$ and $\\nu \\notin N$.",
        "Open C:\\new\\notes\\names.txt now.",
        "<p>The price is <s>10</s> 5.</p>",
        "GPT-2 writes <|endoftext|> between documents.",
        'tokenizer.add({"eos_token": "<|endoftext|>", "pad": "</s>"})',
        "ChatML writes `<|im_start|>user` and then `<|im_end|>`.",
        "let f = g <| h x\n|> printf",
        "Use [^\\n]+\\n and \\r?\\n for lines.",
        "The token </s> ends a text in Llama; </s> again.",
        "[INST] marks instructions in Llama 2 prompts.",
        "[/INST] ends an instruction; then the answer begins.",
        "So x = 1\\neq 2, y = 3\\neq 4 and 5\\ne 6.",
        "2\\nu and 3\\nabla f, a\\neq b, c\\notin d",
        'print("1\\n2\\nline3\\nline4")',
    ],
)  # fmt: skip
@pytest.mark.parametrize("convert", [False, True])
def test_texts_that_only_mention_such_things_are_left_alone(text, convert):
    made = encode_block_of(
        {"text": text},
        chat("Hm?", text) if not text.startswith(("User", "System")) else {"text": text},
        convert=convert,
    )
    assert not result(made) and not any(n for name, n in made.counts.items() if name.startswith("converted"))
    assert texts(made)[0] == text


@pytest.mark.parametrize(
    "text",
    [
        "Q: Hi\n\nA: Yo\nQ: More",  # ends with a question; some headings behind an empty line, some not
        "Human: Hi\n\nAssistant:",
        "A preface.\n\nHuman: Hi\n\nAssistant: Yo",
        "Human: Hi\nUser: Ho\nAssistant: Yo",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>tool\nx<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>",
    ],
)
def test_what_may_be_read_in_several_ways_is_left_and_counted(text):
    made = encode_block_of({"text": text}, convert=True)
    assert texts(made) == [text] and result(made) == {"headings"} and not made.counts["converted: headings"]


ESCAPED = {
    "User: Hi\\n\\nAssistant: Yo": TWO_TURNS,
    "User: Hi\\r\\n\\r\\nAssistant: Yo": TWO_TURNS,
    'User: say \\"Hi\\"\\n\\nAssistant: Yo': 'User: say "Hi"\n\nAssistant: Yo',
    "用户：Hi\\n助手：Yo": TWO_TURNS,
    "One line.\\nTwo lines.\\nThree lines.": "One line.\nTwo lines.\nThree lines.",
    "第一行。\\n第二行。\\n第三行": "第一行。\n第二行。\n第三行",
    "\\u4f60\\u597d": "你好",
}


@pytest.mark.parametrize("text", ESCAPED)
def test_line_breaks_that_were_escaped_twice_are_detected_and_undone(text):
    assert "escaped" in result(encode_block_of({"text": text}))
    made = encode_block_of({"text": text}, convert=True)
    assert texts(made) == [ESCAPED[text]] and not result(made) and made.counts["converted: escaped"] == 1


def test_escapes_among_real_line_breaks_are_detected_and_left():
    text = "Person 1: message\\n\nPerson 2: message\\n\nPerson 3: hi\\n"
    made = encode_block_of({"text": text}, convert=True)
    assert result(made) == {"escaped"} and texts(made) == [text]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The lamp.<|endoftext|>", ["The lamp."]),
        ("The lamp.\n<|endoftext|>\nThe ferry.\n<|endoftext|>\n", ["The lamp.", "The ferry."]),
        ("The lamp.</s>", ["The lamp."]),
        ("<s>The lamp.</s>", ["The lamp."]),
        ("The lamp.<eos>", ["The lamp."]),
        ("The lamp.<|im_end|>", ["The lamp."]),
        (f"{TWO_TURNS}<|endoftext|>", [TWO_TURNS]),
        ("Human: Hi\n\nAssistant: Yo<|endoftext|>Human: More\n\nAssistant: Ok<|endoftext|>",
         [TWO_TURNS, "User: More\n\nAssistant: Ok"]),
    ],
)  # fmt: skip
def test_end_tokens_of_other_models_are_detected_and_end_documents(text, wanted):
    assert "markers" in result(encode_block_of({"text": text}))
    made = encode_block_of({"text": text}, convert=True)
    assert texts(made) == wanted and not result(made) and made.counts["kept"] == 1


INSIDE = {
    "turns in a question": (["Human: Hi\nAssistant: Yo\nHuman: More\nAssistant:", "Ok"], FOUR_TURNS),
    "turns that end in a question": (["User: Hi\nAssistant: Yo\nUser: More", "Ok"], FOUR_TURNS),
    "one turn, as for GPT-3": (["Q: Hi\nA:", "Yo"], TWO_TURNS),
    "headings on both sides": (["Q: Hi", "A: Yo"], TWO_TURNS),
    "leading headings": (["User: Hi", "Assistant: Yo"], TWO_TURNS),
    "leading in chinese": (["Hi", "助手：Yo"], TWO_TURNS),
    "chatml": (["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo<|im_end|>"], TWO_TURNS),
    "alpaca": (["### Instruction:\nHi\n\n### Response:", "Yo"], TWO_TURNS),
    "llama 2": (["[INST] Hi [/INST]", "Yo"], TWO_TURNS),
}  # fmt: skip


@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("schema", ["messages", "alpaca"])
def test_turns_inside_a_question_are_detected_and_become_turns(kind, schema):
    (question, answer), wanted = INSIDE[kind]
    row = chat(question, answer) if schema == "messages" else {"instruction": question, "input": "", "output": answer}
    assert "inside" in result(encode_block_of(row))
    made = encode_block_of(row, convert=True)
    assert texts(made) == [wanted] and not result(made) and made.counts["converted: inside"] == 1


@pytest.mark.parametrize("template", ["rwkv-world", "rwkv-g1"])
@pytest.mark.parametrize("answer", ["Here:\n\nUser: salut\n\nAssistant: yo", "Yo\n\nHuman: x\n\nAssistant: y"])
def test_turns_inside_an_answer_are_detected_and_left(template, answer):
    row = chat("Write a chat in French.", answer)
    made = encode_block_of(row, template=template, convert=True)
    assert result(made) == {"inside"} and texts(made) == texts(encode_block_of(row, template=template))


def test_a_heading_that_ends_an_answer_for_those_who_chat_is_detected_alone():
    row = chat("Write.", "Here:\n\nUser: salut")
    assert result(encode_block_of(row, template="rwkv-g1")) == {"inside"} and not result(encode_block_of(row))


@pytest.mark.parametrize("contents", [
    ["Write an FAQ.", "Here:\nQ: a\nA: b\nQ: c\nA: d"], ["Print it.", 'printf("a\\n");'],
    ["A title?", "AI: a short history"], ["The config?", "User: admin\nPassword: x"], ["Q: what is Q: for?", "questions"],
])  # fmt: skip
def test_answers_that_look_alike_are_left_alone(contents):
    assert not result(encode_block_of(chat(*contents))) and not result(
        encode_block_of(chat(*contents), template="rwkv-g1")
    )


def test_end_tokens_and_escapes_in_messages_are_detected_and_undone():
    row = chat("Hi\\n\\nthere.", "Yo.</s>")
    assert result(encode_block_of(row)) == {"escaped", "markers"}
    assert texts(encode_block_of(row, template="rwkv-g1", convert=True)) == ["User: Hi\nthere.\n\nAssistant: Yo."]


def test_each_row_is_counted_once_per_kind_and_the_first_has_its_line():
    rows = [
        {"text": "plain"},
        {"text": "Q: a\nA: b"},
        chat("User: a", "b"),
        chat("c", "d"),
        chat("c", "User: e\nAssistant: f"),
    ]
    made = encode_block_of(*rows, expand=True)
    assert made.counts["found: headings"] == 1 and made.counts["found: inside"] == 2
    assert made.places["headings"][0].line == 2 and [p.line for p in made.places["inside"]] == [3, 5]


def test_the_templates_own_marks_are_not_taken_for_another_tools():
    for name in PRESETS:
        if name != "empty":
            assert not result(encode_block_of(chat("Hi", "Yo", "More", "Ok"), template=name)), name


def test_headings_of_the_template_are_no_foreign_ones():
    assert not result(encode_block_of({"text": "Question: a\n\nAnswer: b"}, template="rwkv-qa"))


def test_chatml_texts_become_dialogues_of_chatml():
    text = HEADINGS["chatml"][0]
    made = encode_block_of({"text": text}, template="chatml", convert=True)
    assert texts(made)[0] == text.strip() and made.counts["with an answer"] == 1


def test_converted_texts_keep_limits_and_masks():
    text = "Q: Hi\nA: one two three four\nQ: More\nA: Ok"
    assert len(encode_block_of({"text": text}, convert=True, expand=True).sizes) == 2
    cut = encode_block_of({"text": text}, convert=True, limits=Limits(target=3, policy="truncate"))
    assert texts(cut) == ["User: Hi\n\nAssistant: one two three"]


@pytest.mark.parametrize(
    ("words", "tag"),
    [
        ("&lt;think&gt;hm&lt;/think&gt;Yo", "&lt;think&gt;"),
        ("Yo (&lt;|im_end|&gt;", "&lt;|im_end|&gt;"),
        ("See: &lt;/tool_call&gt;", "&lt;/tool_call&gt;"),
        ("if a &lt; b or &lt;b&gt;", None),
    ],
)
@pytest.mark.parametrize("convert", [False, True])
def test_tags_that_are_escaped_as_in_html_are_counted_and_what_to_do_is_said(words, tag, convert):
    for row in (chat("Hi", words), {"text": words}, chat(words, "Yo")):
        made = encode_block_of(row, convert=convert)
        assert [place.note for place in made.places.get("html", [])] == [tag] * (tag is not None)
    if tag:
        [said] = foreign_lines({"html": 3}, made.places, convert, {})
        assert "3 rows with tags that are escaped" in said and said.endswith("x.jsonl:1. Write < and > in their place")


@pytest.mark.parametrize(
    "words",
    ['{"role": "assistant", "content": "a"}', '[{"role": "user", "content": "a"}]', "{'role': 'user', 'content': 'a'}"],
)
def test_messages_that_are_json_inside_a_text_are_counted(words):
    for row in (chat("Hi", words), chat(words, "Yo"), {"messages": [words, words]}):
        assert result(encode_block_of(row)) == {"json"}
    for other in (f"Write {words}", f"{words} is right", '{"role": "actor", "of": "Hamlet"}'):
        assert not result(encode_block_of(chat("Hi", other)))


def test_a_line_of_a_txt_file_is_the_line_of_the_finding():
    block = Block("x.txt", 1, [(1, {"text": "The lamp.\nIt is lit.\n<|endoftext|>\nThe ferry."})], 0)
    made = RowEncoder(EncodeConfig(PRESETS["rwkv-world"])).block(block)
    assert made.places["markers"][0].line == 3


@pytest.mark.parametrize("context", ["{}", "x\n{}", "x。\n\n{}", "x.\n  {}"])
def test_tokens_report_the_rows_that_are_worth_a_look(context):
    """The tables of tokens must not miss what the patterns find."""
    for kind, (text, _) in HEADINGS.items():
        text = context.format(text)
        if any(one.kind == "headings" for one in foreign_headings.look_at_text(text)):
            assert result(encode_block_of({"text": text})) >= {"headings"}, (kind, text)


def test_a_stream_says_it_once(tmp_path):
    path, said = tmp_path / "x.jsonl", []
    path.write_text('{"text": "fine"}\n{"text": "Q: a\\nA: b"}\n{"text": "Q: c\\nA: d"}\n')
    stream = RowStream([path], EncodeConfig(PRESETS["rwkv-world"]), "file", 1, 1, said.append).documents()
    for _ in range(9):
        next(stream)
    assert (
        len(said) == 1
        and "x.jsonl:2: a row with headings of another format" in said[0]
        and "CONVERT_HEADINGS" in said[0]
    )


def test_the_report_counts_names_the_first_line_and_says_what_to_do(project_folder, capsys):
    path = project_folder / "data" / "x.jsonl"
    rows = [{"text": "Q: When?\n\nA: At sunset."}, {"text": "问：几点？\n\n答：日落。"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    tokenize(path)
    said = capsys.readouterr().out
    assert "warning   2 rows with headings of another format (Q: A:, 问： 答：)" in said
    assert "The first is data/x.jsonl:1. --convert-headings rewrites" in said
    assert "LOSS_MASK=qa          # 2 rows written for another tool" in said and "LOSS_MASK=pad" not in said
    tokenize(path)  # what was made before says it again
    assert "warning   2 rows with headings" in capsys.readouterr().out
    tokenize(path, CONVERT_HEADINGS="1")
    said = capsys.readouterr().out
    assert (
        "rewrote   2 rows with headings of another format\n" in said
        and "warning" not in said
        and "LOSS_MASK=qa\n" in said
    )


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--convert-headings"], ["--convert-headings", "1"], ["--convert-headings=1"]])
def test_the_option_is_a_switch(kit, words):
    kit.data("x.jsonl", {"text": "Q: Hi\nA: Yo"})
    assert "1 row with headings" in kit.run("make_tokenize.sh", "x.jsonl").stdout
    said = kit.run("make_tokenize.sh", *words, "x.jsonl", "2").stdout
    assert "rewrote   1 row with headings" in said and "2 rows" in said


def test_rows_that_are_cut_are_counted_in_the_report(project_folder, capsys):
    path = project_folder / "data" / "x.jsonl"
    path.write_text(json.dumps(chat("Count.", "one two three four five six", "More.", "seven")) + "\n")
    tokenize(path, TARGET_LENGTH="4", OVERLONG="truncate")
    said = capsys.readouterr().out
    assert "cut       1 row (OVERLONG=truncate), and 2 turns behind the cut left out\n" in said
    assert (
        "warning   1 row lost the end of the answer or text: the model does not learn to stop from it: line 1." in said
    )


@pytest.mark.parametrize("text", ["line1\\nline2\\nline3", "step 1\\nthen 2\\nnext 3", "1\\na\\nb"])
def test_line_breaks_between_a_digit_and_a_letter_are_detected_and_undone(text):
    assert result(encode_block_of({"text": text})) == {"escaped"}
    made = encode_block_of({"text": text}, convert=True)
    assert not result(made) and text.replace("\\n", "\n") in texts(made)[0]


@pytest.mark.parametrize("word", ["答：", "回答：", "助手：", "答: ", "Assistant: "])
def test_an_answer_that_begins_with_its_own_heading_is_detected_and_loses_it(word):
    row = {"instruction": "q", "output": f"{word}a"}
    assert result(encode_block_of(row)) == {"inside"}
    made = encode_block_of(row, convert=True)
    assert not result(made) and texts(made) == ["User: q\n\nAssistant: a"]


@pytest.mark.parametrize("word", ["A:", "Answer:", "答案："])
def test_an_answer_that_may_be_meant_so_is_detected_and_left(word):
    row = {"instruction": "q", "output": f"{word} a"}
    assert result(encode_block_of(row)) == {"inside"} == result(encode_block_of(row, convert=True))


@pytest.mark.parametrize("question", ["Which? A. one B. two", "Which?\nA) one\nB) two", "(A) one or (B) two?"])
def test_an_answer_that_names_a_choice_is_left_alone(question):
    assert not result(encode_block_of({"instruction": question, "output": "A: one"}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Some words.\nQ: When?\nA: At sunset.", ": text before its first heading"),
        ("Q: When?\nA: At sunset.\nQ: Why?", ": no answer at its end"),
        ("Q: When?\nA:\nQ: Why?\nA: So.", ": a turn without words"),
        ("Q: When?\nA: At sunset.\nUser: Why?\nAssistant: So.", ", because they can be read in several ways"),
    ],
)
def test_the_report_says_why_headings_were_left(project_folder, capsys, text, why):
    path = project_folder / "data" / "x.jsonl"
    path.write_text(json.dumps({"text": text}))
    tokenize(path, CONVERT_HEADINGS="1")
    said = capsys.readouterr().out
    assert f"CONVERT_HEADINGS=1 left them as they are{why}" in said and "--convert-headings finds" not in said
    assert "1 row written for another tool, whose answers --convert-headings could not find: " in said
