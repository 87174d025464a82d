"""Which encoding a text file is in: how often the kit is right, refuses the file, or is wrong, beside other detectors.

usage: python bench/encodings.py [--peers] [--json FILE]

Makes JSON lines, CSV tables and plain texts of 1 to 40 rows out of the sentences below, in the encodings in which such files
come, and reads each as make_tokenize.sh does. Right: the text that was written. Refused: not read, or every row that is not
plain ASCII rejected. Wrong: another text. --peers: the same files for chardet and charset-normalizer alone, whose first answer
counts. The files are the same every time.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[0]  # the kit, instead of this folder

# ruff: noqa: E402
import argparse
import csv
import io
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_peft.preprocess.encodings import AsUtf8, Encoding, decide

ROWS = (1, 2, 3, 10, 40)
FORMS = ("jsonl", "csv", "txt")

# language -> the encodings its files come in, and sentences
LANGUAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "chinese": (("gb18030", "gbk"), """
        今天早上下了一场大雨，路上的车都开得很慢。|请用一句话介绍一下你的家乡。
        水的沸点在海拔高的地方会更低，因为那里的气压比较小。|我想学做红烧肉，需要准备哪些材料？
        先把猪肉切成小块，用开水焯一下，再放糖炒出颜色。|这个函数返回列表中最大的数，如果列表为空就报错。
        月亮为什么有时圆有时缺？|因为太阳照亮的那一面，我们只能看到一部分。|他昨天没有来上班，听说是感冒了。
        合同一共三份，双方各执一份。|北京到上海坐高铁大约需要四个半小时。|谢谢你的帮助，我明白了！"""),
    "traditional chinese": (("big5", "gb18030"), """
        今天早上下了一場大雨，路上的車都開得很慢。|請用一句話介紹一下你的家鄉。
        水的沸點在海拔高的地方會更低，因為那裡的氣壓比較小。|我想學做滷肉飯，需要準備哪些材料？
        先把豬肉切成小塊，用滾水燙一下，再放糖炒出顏色。|這個函數會傳回清單中最大的數字。|月亮為什麼有時圓有時缺？
        因為太陽照亮的那一面，我們只能看到一部分。|他昨天沒有來上班，聽說是感冒了。|合約一共三份，雙方各執一份。
        臺北到高雄坐高鐵大約需要兩個小時。|謝謝你的幫忙，我明白了！"""),
    "japanese": (("shift_jis", "cp932", "euc_jp", "iso2022_jp"), """
        今朝は大雨で、道がとても混んでいました。|あなたの故郷を一言で紹介してください。
        高い山では気圧が低いので、水は低い温度で沸騰します。|カレーを作りたいのですが、材料は何が必要ですか。
        まず玉ねぎを薄く切って、弱火でゆっくり炒めます。|この関数はリストの最大値を返します。|月はなぜ満ち欠けするのですか。
        太陽に照らされた面の一部だけが見えるからです。|彼は昨日、風邪で会社を休みました。|契約書は二部作成します。
        東京から大阪まで新幹線で約二時間半です。|ありがとうございます、よく分かりました！"""),
    "korean": (("euc_kr", "cp949"), """
        오늘 아침에 비가 많이 와서 길이 막혔어요.|고향을 한 문장으로 소개해 주세요.
        높은 산에서는 기압이 낮아서 물이 더 낮은 온도에서 끓습니다.|김치찌개를 만들려면 어떤 재료가 필요한가요?
        먼저 돼지고기를 볶다가 김치를 넣고 함께 끓이세요.|이 함수는 목록에서 가장 큰 수를 돌려줍니다.
        달은 왜 모양이 바뀌나요?|햇빛을 받는 면의 일부만 보이기 때문입니다.|그는 어제 감기 때문에 출근하지 않았습니다.
        계약서는 두 부를 작성합니다.|서울에서 부산까지 기차로 두 시간 반쯤 걸립니다.|도와주셔서 감사합니다!"""),
    "russian": (("cp1251", "koi8_r", "cp866"), """
        Сегодня утром шёл сильный дождь, и машины ехали медленно.
        Расскажите о своём городе одним предложением.
        На высокой горе вода кипит при более низкой температуре.
        Какие продукты нужны для борща?
        Сначала нарежьте свёклу и обжарьте её с луком.
        Эта функция возвращает наибольшее число из списка.
        Почему Луна меняет форму?
        Потому что мы видим только часть освещённой стороны.
        Вчера он не пришёл на работу: заболел.
        Договор составлен в двух экземплярах.
        Поезд из Москвы в Петербург идёт около четырёх часов.
        Спасибо за помощь, теперь всё понятно!"""),
    "bulgarian": (("cp1251",), """
        Тази сутрин валя силен дъжд и колите се движеха бавно.
        Разкажете за родния си град с едно изречение.
        Високо в планината водата кипи при по-ниска температура.
        Какви продукти са нужни за таратор?
        Първо нарежете краставиците и ги смесете с киселото мляко.
        Тази функция връща най-голямото число от списъка.
        Защо Луната променя формата си?
        Защото виждаме само част от осветената страна.
        Вчера той не дойде на работа, защото беше болен.
        Благодаря за помощта!"""),
    "greek": (("cp1253", "iso8859_7"), """
        Σήμερα το πρωί έβρεχε πολύ και τα αυτοκίνητα πήγαιναν αργά.
        Περιγράψτε την πόλη σας με μία πρόταση.
        Ψηλά στο βουνό το νερό βράζει σε χαμηλότερη θερμοκρασία.
        Τι υλικά χρειάζομαι για μουσακά;
        Πρώτα κόψτε τις μελιτζάνες και τηγανίστε τις.
        Αυτή η συνάρτηση επιστρέφει τον μεγαλύτερο αριθμό της λίστας.
        Γιατί αλλάζει σχήμα το φεγγάρι;
        Επειδή βλέπουμε μόνο ένα μέρος της φωτισμένης πλευράς.
        Χθες δεν ήρθε στη δουλειά γιατί ήταν άρρωστος.
        Ευχαριστώ για τη βοήθεια!"""),
    "german": (("cp1252", "latin_1", "cp850"), """
        Heute früh regnete es so stark, dass die Autos nur langsam fuhren.|Beschreiben Sie Ihre Heimatstadt in einem Satz.
        Auf hohen Bergen kocht Wasser früher, weil der Luftdruck niedriger ist.
        Welche Zutaten brauche ich für Käsespätzle?|Zuerst die Zwiebeln schälen und in Öl goldbraun rösten.
        Diese Funktion gibt die größte Zahl der Liste zurück.|Warum ändert der Mond seine Form?
        Weil wir nur einen Teil der beleuchteten Fläche sehen.|Gestern war er krank und blieb zu Hause.
        Der Vertrag wird in zwei Exemplaren ausgefertigt.|Von München nach Köln fährt man etwa viereinhalb Stunden.
        Vielen Dank für die Hilfe, jetzt verstehe ich es!"""),
    "french": (("cp1252", "latin_1", "mac_roman"), """
        Ce matin, il pleuvait très fort et les voitures roulaient lentement.|Décrivez votre ville natale en une phrase.
        En haute montagne, l’eau bout plus tôt parce que la pression est plus basse.
        Quels ingrédients faut-il pour une ratatouille ?
        Épluchez d’abord les oignons, puis faites-les revenir à feu doux.
        Cette fonction renvoie le plus grand nombre de la liste.|Pourquoi la lune change-t-elle de forme ?
        Parce que nous ne voyons qu’une partie de la face éclairée.|Hier, il était malade et il est resté à la maison.
        Le contrat est établi en deux exemplaires.|De Paris à Bordeaux, le trajet dure à peu près deux heures.
        Merci beaucoup, c’est très clair maintenant !"""),
    "spanish": (("cp1252", "latin_1"), """
        Esta mañana llovía mucho y los coches iban muy despacio.|Describa su ciudad natal en una sola oración.
        En las montañas altas el agua hierve antes porque la presión es más baja.
        ¿Qué ingredientes necesito para una tortilla española?|Primero pele las patatas y córtelas en rodajas finas.
        Esta función devuelve el número más grande de la lista.|¿Por qué cambia de forma la luna?
        Porque sólo vemos una parte de la cara iluminada.|Ayer estaba enfermo y se quedó en casa todo el día.
        El contrato se hará en dos ejemplares.|El viaje de Sevilla a Málaga dura unas dos horas en autobús.
        ¡Muchas gracias por la ayuda, ya lo entendí!"""),
    "portuguese": (("cp1252",), """
        Hoje de manhã choveu muito e os carros andavam devagar.|Descreva a sua cidade natal em uma única frase.
        No alto da montanha a água ferve mais cedo porque a pressão é menor.
        Quais ingredientes são necessários para uma feijoada?|Primeiro corte a cebola e refogue até ficar dourada.
        Esta função devolve o maior número da lista.|Por que a lua muda de forma?
        Porque só vemos uma parte da face iluminada.|Ontem ele não veio trabalhar porque estava doente.
        O contrato será feito em duas vias.|A viagem de ônibus até São Paulo demora três horas.
        Muito obrigado pela ajuda, agora está claro!"""),
    "polish": (("cp1250", "iso8859_2"), """
        Dziś rano padał ulewny deszcz i samochody jechały bardzo wolno.|Proszę opisać swoje miasto jednym zdaniem.
        Wysoko w górach woda wrze wcześniej, ponieważ ciśnienie jest niższe.|Jakie składniki są potrzebne do bigosu?
        Najpierw pokrój cebulę i podsmaż ją na maśle.|Ta funkcja zwraca największą liczbę z listy.
        Dlaczego księżyc zmienia kształt?|Ponieważ widzimy tylko część oświetlonej strony.
        Wczoraj był chory i został w domu.|Umowę sporządzono w dwóch egzemplarzach.
        Podróż z Krakowa do Łodzi trwa około trzech godzin.|Dziękuję za pomoc, teraz już rozumiem!"""),
    "czech": (("cp1250", "iso8859_2"), """
        Dnes ráno hustě pršelo a auta jela velmi pomalu.|Popište své rodné město jednou větou.
        Vysoko v horách se voda vaří dříve, protože tlak je nižší.|Jaké suroviny potřebuji na svíčkovou?
        Nejprve nakrájejte cibuli a osmahněte ji na másle.|Tato funkce vrací největší číslo ze seznamu.
        Proč měsíc mění tvar?|Protože vidíme jen část osvětlené strany.|Včera byl nemocný a zůstal doma.
        Smlouva je vyhotovena ve dvou exemplářích.|Cesta z Prahy do Brna trvá přibližně dvě a půl hodiny.
        Děkuji za pomoc, už tomu rozumím!"""),
    "turkish": (("cp1254", "iso8859_9"), """
        Bu sabah çok yağmur yağdı ve arabalar yavaş gidiyordu.|Doğduğunuz şehri tek cümleyle anlatın.
        Yüksek dağlarda su daha düşük sıcaklıkta kaynar.|Mercimek çorbası için hangi malzemeler gerekli?
        Önce soğanı doğrayın ve yağda kavurun.|Bu işlev listedeki en büyük sayıyı döndürür.
        Ay neden şekil değiştirir?|Çünkü aydınlanan yüzün yalnızca bir kısmını görürüz.
        Dün hastaydı ve işe gelmedi.|Sözleşme iki nüsha olarak düzenlenmiştir.
        İstanbul ile Ankara arası trenle yaklaşık dört saat sürer.|Yardımınız için teşekkürler, şimdi anladım!"""),
    "vietnamese": (("cp1258",), """
        Sáng nay trời mưa rất to nên xe chạy chậm.|Hãy giới thiệu quê hương của bạn bằng một câu.
        Trên núi cao nước sôi ở nhiệt độ thấp hơn.|Nấu phở cần những nguyên liệu gì?
        Trước hết hãy rửa sạch xương bò rồi ninh trong nhiều giờ.|Hàm này trả về số lớn nhất trong danh sách.
        Vì sao mặt trăng thay đổi hình dạng?|Vì chúng ta chỉ thấy một phần của mặt được chiếu sáng.
        Hôm qua anh ấy bị ốm nên nghỉ làm.|Cảm ơn bạn đã giúp đỡ!"""),
}  # fmt: skip
WIDE = (
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "utf-32-le",
    "utf-32-be",
    "utf-16-be with BOM",
    "utf-32-be with BOM",
)
TONES = "\u0300\u0301\u0303\u0309\u0323"


class File(NamedTuple):
    group: str
    rows: int
    text: str
    data: bytes


def sentences(language: str) -> list[str]:
    return [s.strip() for line in LANGUAGES[language][1].split("\n") for s in line.split("|") if s.strip()]


def writable(text: str, codec: str) -> str:
    """The text as programs for this encoding write it: Vietnamese tones apart, no typographic marks where there are none."""
    if codec == "cp1258":
        out = []
        for c in text:
            parts = unicodedata.normalize("NFD", c)
            tones = "".join(p for p in parts if p in TONES)
            try:
                c.encode(codec)
            except UnicodeEncodeError:
                c = unicodedata.normalize("NFC", "".join(p for p in parts if p not in TONES)) + tones
            out.append(c)
        return "".join(out)
    if codec in ("latin_1", "iso8859_2", "iso8859_9", "cp850", "koi8_r"):
        return text.replace("’", "'").replace("«", '"')
    return text


def as_encoded(text: str, codec: str) -> bytes:
    if codec.endswith(" with BOM"):
        codec = codec.removesuffix(" with BOM")
        return ("\ufeff" + text).encode(codec)
    return text.encode(codec)


def file_text(language: str, rows: int, form: str, rng: random.Random, codec: str = "") -> str:
    """A file of so many rows, with characters outside ASCII in at least one."""
    known = [writable(s, codec) for s in sentences(language)]
    some = [rng.choice(known) for _ in range(2 * rows)]
    if "".join(some).isascii():
        some[0] = next(s for s in known if not s.isascii())
    pairs = list(zip(some[::2], some[1::2], strict=True))
    if form == "jsonl":
        return "".join(json.dumps({"instruction": q, "output": a}, ensure_ascii=False) + "\n" for q, a in pairs)
    if form == "csv":
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows(pairs)
        return file.getvalue()
    return "\n".join(f"{q} {a}" for q, a in pairs) + "\n"


def damaged(text: str, rng: random.Random) -> bytes:
    """UTF-8 with some of its bytes changed or lost, as broken disks, cut downloads and careless programs leave it."""
    lines = text.encode().split(b"\n")
    long = [i for i, line in enumerate(lines) if not line.isascii()]
    for i in rng.sample(long, max(1, len(long) // 10)):
        at = rng.choice([k for k, b in enumerate(lines[i]) if b > 127])
        lines[i] = lines[i][:at] + rng.choice([b"", b"\xff", b"\xc3(", b"\x80"]) + lines[i][at + 1 :]
    return b"\n".join(lines)


def files() -> Iterator[File]:
    for language, (codecs, _) in LANGUAGES.items():
        for codec in (*codecs, *WIDE):
            for rows in ROWS if codec not in WIDE else (1, 10):
                for form in FORMS:
                    rng = random.Random(f"{language} {codec} {rows} {form}")
                    text = file_text(language, rows, form, rng, codec)
                    group = "UTF-16 and UTF-32" if codec in WIDE else f"{codec} {language}"
                    yield File(group, rows, text, as_encoded(text, codec))
        for rows in (10, 40):
            for form in FORMS:
                rng = random.Random(f"{language} damaged {rows} {form}")
                text = file_text(language, rows, form, rng)
                yield File("UTF-8, damaged", rows, "", damaged(text, rng))
    rng = random.Random(0)
    for size in (100, 1000, 10_000, 100_000):
        yield File("binary", 1, "", rng.randbytes(size))
        yield File("binary", 1, "", b"\x7fELF\x02\x01\x01" + bytes(9) + rng.randbytes(size))


def ours(data: bytes) -> str | None:
    result = decide(io.BytesIO(data))
    if not isinstance(result, Encoding):
        return None
    file = io.BufferedReader(io.BytesIO(data))
    file.read(result.skip)
    return AsUtf8(file, result).read().decode("utf-8", "replace")


def first_answer(detect: Callable[[bytes], str | None]) -> Callable[[bytes], str | None]:
    def read(data: bytes) -> str | None:
        try:
            return data.decode(detect(data) or "no such").replace("\r\n", "\n").removeprefix("\ufeff")
        except (LookupError, UnicodeDecodeError):
            return None

    return read


def verdict(read: Callable[[bytes], str | None], file: File) -> str:
    result = read(file.data)
    if result is None:
        return "right" if file.group == "binary" else "refused"
    if not file.text:  # damaged UTF-8 must stay UTF-8, with its broken rows left to be rejected
        kept = file.data.decode("utf-8", "replace").replace("\r\n", "\n")
        return "right" if file.group != "binary" and result == kept else "wrong"
    expected = file.text.replace("\r\n", "\n")
    if result == expected:
        return "right"
    return "refused" if "\ufffd" in result and sound(result) <= sound(expected) else "wrong"


def sound(text: str) -> set[str]:
    """The lines that would be trained: those without a broken character."""
    return {line for line in text.split("\n") if "\ufffd" not in line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="the other detectors as well")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    readers = {"kit": ours}
    if given.peers:
        import chardet
        import charset_normalizer

        readers["chardet"] = first_answer(lambda data: chardet.detect(data)["encoding"])
        best = charset_normalizer.from_bytes
        readers["charset-normalizer"] = first_answer(lambda data: (m := best(data).best()) and m.encoding)
    table: dict[str, dict[str, Counter[str]]] = {}
    for file in files():
        for name, read in readers.items():
            result = verdict(read, file)
            for group in (file.group, "all"):
                table.setdefault(group, {}).setdefault(name, Counter())[result] += 1
    names = "".join(f"{name + ': right refused wrong':>42}" for name in readers)
    print(f"{'encoding':30}{'files':>6}{names}")
    for group in [*(g for g in table if g != "all"), "all"]:
        counts = table[group]
        cells = "".join(f"{c['right']:27}{c['refused']:8}{c['wrong']:7}" for c in counts.values())
        print(f"{group:30}{sum(counts['kit'].values()):6}{cells}")
    if given.json:
        given.json.write_text(json.dumps(table, indent=1))
    if table["all"]["kit"]["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
