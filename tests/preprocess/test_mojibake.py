"""Mojibake: every reversible damage is undone byte-exactly, what lost bytes is reported, clean text is never touched."""

import random
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rwkv_peft.preprocess.mojibake import CLEAN, LOSSY, REPAIRED, UNDEFINED, WHATWG, repair_text, reread


def as_whatwg(data: bytes) -> str:
    return "".join(WHATWG[b] for b in data)


def as_latin_1(data: bytes) -> str:
    return data.decode("latin-1")


def damaged(text: str, reading, times: int = 1) -> str:
    for _ in range(times):
        text = reading(text.encode("utf-8"))
    return text


READINGS = [as_whatwg, as_latin_1]

SENTENCES = """
海鸥在天空中飞翔，茶叶的香气弥漫在空气里。“你好”，他说——然后离开了……
他問：「你吃飯了嗎？」她答：『還沒有。』①②③ ￥100
カモメが空を飛んでいる。「お茶をどうぞ」と言った。ｶﾀｶﾅ
갈매기가 하늘을 난다. “안녕하세요” 하고 말했다.
Чайка летит над морем, и чай пахнет — «привет», сказал он. № 5
Ο γλάρος πετά πάνω από τη θάλασσα· «γεια σου», είπε. 25 µm
שלום עולם, מה שלומך? ₪100
مرحبا بالعالم، كيف حالك؟
हिन्दी में नमस्ते। ภาษาไทย สวัสดี ქართული Հայերեն བོད་ཡིག
Tiếng Việt rất đẹp. ĐÃ ĂN CƠM CHƯA… TÔI ĐÃ “ĐI”. Ấy là “Ã” và “Ô”.
L’été dernier, à l’école\xa0: « très élevée », créée\xa0; «\xa0déjà\xa0» – voilà\xa0!
LE CAFÉ «\xa0L’ÉTÉ À L’ÎLE\xa0» EST FERMÉ… À BIENTÔT ! CŒUR, SŒUR, ŒUVRE, NAÏF
Die Möwe weiß… „größer“ als »Öl«, „Ä“ und ‚Ü‘. GRÜSSE AUS KÖLN – STRASSE ODER STRAẞE? Maß™ Fuß¬ball
«¿Qué?», dijo el niño. «¡Año nuevo!» ESPAÑA, CAMPEÓN… El 1.º y la 2.ª — 25 °C
NÃO É A MANHÃ… IRMÃ, ROMÃ” e “AVÔ”. A canção «coração» está à venda: R$ 5,00. MAÇÃ®, LÃ™
Perché è così? È vero… «Città» e “virtù”. PERCHÉ” IL CAFFÈ” È BUONO
Så gick han på ön… ”Nå…” sa hon. SMÖRGÅSBORD Å…, ÄR DET SÅ? »Ja, sådan er det«, sagde han på øen.
Já, það er gott. „Góðan dag“, sagði hún. ÞAÐ ER ÍS Í SKÁLINNI
Příliš žluťoučký kůň úpěl ďábelské ódy. KNÍŽKA MÔŽE VÝŠKA. Úžasné! „Též…“ řekl. Níž… muž
Zażółć gęślą jaźń. „Dzień dobry” — ŁÓDŹ, KSIĄŻĘ… İstanbul’da çay içtim, ağaç. ĞÜŞİÖÇ
Õhtu jõuab. “Ööbik”, ÜŠ? Õun – Tšehhi žanr. Na hÉireann, na hÉ\xadireann. L·L, col·lecció
It’s a “quoted” text — with dashes… and ‘single’ ones. Naïve café, rôle. CAFÉ’S, CAFÉ® 50% £5 €6 ¥100 ©2020 25°C
2×3 = 6, 3×½ cup, 2×œufs, 2×šunka, 3×£5, Ø½ inch, Ø¾, 5±0.1 Å, mÅ², x² + y³ ≤ ∞ ∑∫√ ∀x∈ℝ Â² = Â·Â
😀 👨‍👩‍👧 🇨🇳 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 “😂”… 海鸥🕊️
if (x != "é") { return 'ñ'; } // «été» – λ → μ ¬a ¦ b § 5 ¶ † ‡ • ™ ¯\\_(ツ)_/¯
The letters Ã, Â and Å: “Ã” is a nasal a; Â… and Ã…; “Ã\xa0” is a letter. [À-ÖØ-öø-ÿ] ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖ×ØÙÚÛÜÝÞß
é becomes Ã© and ü becomes Ã¼ when “UTF-8” is read as cp1252; the article shows Ã¨ for è, Ã¶ for ö and â€™ for ’
broken by others: caf\ufffd, \ufffd\ufffd, C1 \x85 and \x94 alone, half \ud83d
""".strip().split("\n")

# clean text that is UTF-8 by accident, read as cp1252: each of these decodes
ACCIDENTS = ["weiß…", "Spaß™", "Fuß¬ball", "ROMÃ”", "MANHÃ…", "IRMÃ’S", "CAFÉ»", "CAFÉ®", "É…", "È”", "CAFÉ•THÉ•", "Ä–Ö–",
             "KNÍŽKA", "MÔŽE VÝŠKA", "Úžas", "Óšov", "též…", "níž…", "café…”", "né\xa0–", "café…»", "à\xa0½", "à\xa0€5",
             "à\xa0œuvre", "Nå…” sa han", "2×½", "2×œufs", "3×£5", "2×šunka", "Ø½", "Ø¾", "10Å±", "mÅ²", "mÅ–scale", "Â²",
             "Â\xa0Ã\xa0", "Ã’s", "Ã©", "MANHÃ—TARDE", "MANHÃ–tarde", "MANHÃ\xa0mas", "CAFÉ£2"]  # fmt: skip


@pytest.mark.parametrize("text", ACCIDENTS)
def test_clean_text_that_is_utf8_by_accident_is_not_touched(text):
    assert reread(text) is not None
    for around in ("{}", "He said: {} and left.", "{0} {0} {0} {0}", "{0}\n\n{0}"):
        whole = around.format(text)
        assert repair_text(whole) == (whole, CLEAN)


def test_thousands_of_clean_lines_in_many_languages_are_neither_touched_nor_reported():
    pick = random.Random(0)
    plain = SENTENCES[:-2]  # the last two show mojibake or damage of another kind: clean only as a whole
    words = [w for line in plain for w in line.split(" ")]
    lines = SENTENCES + [line.upper() for line in plain] + [line.title() for line in plain]
    lines += [pick.choice(plain) + pick.choice(" \n\t") + pick.choice(plain) for _ in range(1000)]
    lines += [" ".join(pick.choices(words, k=pick.randint(1, 12))) for _ in range(5000)]
    for _ in range(5000):
        line = pick.choice(plain)
        start = pick.randrange(len(line))
        lines.append(line[start : start + pick.randint(1, 30)])
    assert len(lines) > 10_000
    assert [(line, repair_text(line)) for line in lines if repair_text(line) != (line, CLEAN)] == []


WORD_LETTERS = {
    "French": "abcdeéèêëàâîïôùûçœæ", "French capitals": "ABCDEÉÈÊËÀÂÎÏÔÙÛÇŒÆ", "German": "abcdeäöüß",
    "German capitals": "ABCDEÄÖÜẞ",
    "Portuguese": "abcdeãõáàâéêíóôúç", "Portuguese capitals": "ABCDEÃÕÁÀÂÉÊÍÓÔÚÇ", "Spanish": "abcdeñáéíóúü",
    "Spanish capitals": "ABCDEÑÁÉÍÓÚÜ", "Nordic": "abcdeåäöæøðþ", "Nordic capitals": "ABCDEÅÄÖÆØÐÞ",
    "Slovak": "abcdeáéíóúýôäšž", "Slovak capitals": "ABCDEÁÉÍÓÚÝÔÄŠŽ", "Estonian": "abcdeõäöüšž",
}  # fmt: skip
ENDS = [
    "",
    "",
    "",
    "…",
    "”",
    "“",
    "’",
    "»",
    "\xa0»",
    "\xa0:",
    "\xa0–",
    "\xa0—\xa0",
    "®",
    "™",
    "†",
    "…”",
    "!",
    "?",
    ",",
    ".",
    "²",
]
BEGINS = ["", "", "", "“", "„", "«\xa0", "«", "‘", "¿", "¡", "(", "— "]


@pytest.mark.smoke(4)
@pytest.mark.parametrize("language", WORD_LETTERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_words_with_the_punctuation_of_their_language_are_clean(language, data):
    word = st.text(WORD_LETTERS[language], min_size=1, max_size=8)
    piece = st.tuples(st.sampled_from(BEGINS), word, st.sampled_from(ENDS)).map("".join)
    text = " ".join(data.draw(st.lists(piece, min_size=1, max_size=8)))
    assume(not re.search("[À-ÿ][Œœ]", text))  # no word has a ligature behind an accent, and "âœ…" is a broken tick
    assert repair_text(text) == (text, CLEAN)


TEXTS = {
    "Chinese": st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=8, max_size=60),
    "Chinese with English": st.text("海鸥飞过天空，你好。“茶”——abc 123\n").filter(lambda t: sum(c > "\xff" for c in t) > 5),
    "Japanese": st.text(st.characters(min_codepoint=0x3041, max_codepoint=0x30FE), min_size=8, max_size=60),
    "Korean": st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), min_size=8, max_size=60),
    "emoji": st.text(st.characters(min_codepoint=0x1F300, max_codepoint=0x1F6FF), min_size=1, max_size=20),
    "Russian": st.text("абвгдеёжзийклмнопрстуфхцчшщъыьэюя АБВ,.", min_size=20, max_size=80).filter(lambda t: len(set(t)) > 9),
    "Latin": st.lists(
        st.sampled_from(["für", "déjà", "café", "niño", "não", "está", "Österreich", "Łódź", "mądry", "ağaç"]), min_size=2
    ).map(" ".join),
    "everything": st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"]), min_size=30, max_size=80),
}  # fmt: skip


@pytest.mark.smoke(8)
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("kind", TEXTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_was_damaged_reversibly_is_restored_byte_exactly(kind, reading, times, data):
    text = data.draw(TEXTS[kind])
    assume(not text.isascii() and repair_text(text) == (text, CLEAN))
    result, verdict = repair_text(damaged(text, reading, times))
    assert result.encode("utf-8") == text.encode("utf-8")
    assert verdict == REPAIRED


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("text", [
    "va à la plage", "déjà vu", "tête", "Österreich", "José", "García", "“hello”", "It’s", "a — b", "25°C", "© 2020", "£5 off",
    "2×3", "1920 × 1080", "El Niño", "CAFÉ", "Été", "你好", "世界", "中", "Привет", "Γειά", "שלום", "مرحبا", "😀", "한국어",
    "Tiếng", "mądry", "świat Łódź", "km²", "Ça va", "È vero", "città è bella", "São Paulo", "L’été", "สวัสดี", "नमस्ते", "€5",
    "¿Qué tal?", "FRANÇAIS", "ÜBER", "End.\xa0 Next",
])  # fmt: skip
def test_short_texts_of_everyday_are_restored(text, reading):
    assert repair_text(damaged(text, reading)) == (text, REPAIRED)


LOST = {
    "dropped": lambda data: "".join(WHATWG[b] for b in data if b not in UNDEFINED),
    "replaced": lambda data: data.decode("cp1252", "replace"),
    "questioned": lambda data: data.decode("cp1252", "replace").replace("\ufffd", "?"),
}


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("kind", ["Chinese", "Korean"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_lost_bytes_is_reported_and_left_alone(how, kind, data):
    raw = (data.draw(TEXTS[kind].filter(lambda t: len(set(t)) >= 8)) + "丁").encode("utf-8")  # E4 B8 81
    assume(sum(b in UNDEFINED for b in raw) <= len(raw) // 12)
    broken = LOST[how](raw)
    assert repair_text(broken) == (broken, LOSSY)


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("text", [
    "海鸥在天空中飞翔，茶叶的香气弥漫在空气里，他说完就离开了。", "Чайка летит над морем, и чай пахнет ясным летом",
    "これは日本語の文章です。海の上をカモメが飛んでいる。", "“Hello”, she said. “It’s me”",
])  # fmt: skip
def test_sentences_that_lost_bytes_are_reported(text, how):
    broken = LOST[how](text.encode("utf-8"))
    assert broken != as_whatwg(text.encode("utf-8"))
    assert repair_text(broken) == (broken, LOSSY)


@pytest.mark.parametrize("good", ["海鸥飞过。", "Ещё одна строка", "été "])
def test_text_that_is_only_partly_mojibake_is_never_repaired_in_part(good):
    mixed = good + as_whatwg("你好，世界，海鸥在天空中飞翔".encode())
    result, verdict = repair_text(mixed)
    assert result is mixed and verdict != REPAIRED


def test_a_fourth_layer_is_reported_not_half_undone():
    four = damaged("你好，世界", as_latin_1, 4)
    assert repair_text(four) == (four, LOSSY)


MIXTURE = st.text(st.characters(max_codepoint=0x2FFF) | st.sampled_from(WHATWG[0x80:]), max_size=40)


@settings(max_examples=300, deadline=None)
@given(text=MIXTURE | TEXTS["everything"].map(lambda t: damaged(t, as_whatwg)))
def test_repairing_twice_is_repairing_once(text):
    result, verdict = repair_text(text)
    again, second = repair_text(result)
    assert again == result
    assert second == (CLEAN if verdict == REPAIRED else verdict)
    assert verdict == REPAIRED or result is text


@settings(max_examples=300, deadline=None)
@given(text=MIXTURE)
def test_a_repair_is_always_the_exact_reverse_of_a_damage(text):
    result, verdict = repair_text(text)
    if verdict == REPAIRED:
        chains = {result}
        for _ in range(3):
            chains |= {damaged(t, reading) for t in chains for reading in READINGS}
        assert text in chains
