# SPDX-License-Identifier: Apache-2.0
"""Texts and token ids to try tokenizers on, written for this project, the same for a given seed.

`corpus_texts(n, seed)` gives sentences in some thirty scripts, code, mathematics, emoji, text in
two directions, stacks of marks, control characters, long words, runs of white space, what looks
like special tokens, characters of all planes, and mixtures of these cut anywhere. `random_ids`
gives what a student may sample, broken UTF-8 included.
"""

import unicodedata
from collections.abc import Callable, Sequence
from random import Random

__all__ = ["CATEGORIES", "SENTENCES", "corpus_texts", "random_ids"]

SENTENCES: dict[str, tuple[str, ...]] = {
    "Latin": (
        "The baker's oven isn't hot yet, so we'll wait; they've promised bread at 7:30.",
        "Ünlü şair İstanbul'da ağaç altında öğle çayı içti.",
        "Žluťoučký kůň pil příliš mnoho vody, řekla babička.",
        "Người bán phở ở góc đường mở cửa rất sớm.",
        "Où est l’élève qui a rangé les œufs près du cœur de la forêt ?",
        "Größere Straßen führen über süße Äpfel: „Ärger“, sagt Jürgen.",
        "Łódka płynęła powoli, aż zgubiła wiosło źle związane.",
    ),
    "Cyrillic": (
        "Старый мост скрипит, когда по нему едет поезд.",
        "Їжак з'їв яблуко й ґав ліг спати.",
        "Ђак је ћутао, а њушка љутог пса њихала се.",
    ),
    "Greek": ("Το πλοίο φεύγει το πρωί, είπε ο ψαράς.", "Ἐν τῷ οἴκῳ ᾄδει ἡ ᾠδὴ τοῦ ἥλιου."),
    "CJK": (
        "小猫在窗台上睡着了，外面下着雨。",
        "圖書館裡的鐘慢了五分鐘，沒有人發現。",
        "𠮷野家的𡈽地很貴。",
    ),
    "Hiragana": ("あさごはんに、おにぎりを二つ食べました。", "きょうは ゆきが ふるでしょう。"),
    "Katakana": ("コーヒーとケーキをテーブルへ。",),
    "Halfwidth Katakana": ("ｺｰﾋｰ ﾊﾞｽ ﾊﾟﾝ ｶﾞｷﾞｸﾞ",),
    "Hangul": ("우리 할머니는 매일 아침 시장에 가신다.",),
    "Hangul in parts": (unicodedata.normalize("NFD", "한글 자모로 쓴 글이다."),),
    "Arabic": ("يقرأ الولد كتابًا قديمًا تحت الشجرة.", "اِشْتَرَى التَّاجِرُ خُبْزًا وَ٣ تُفَّاحَات", "او به خانه می‌رود."),
    "Hebrew": ("הילדה שתתה מים קרים ליד הים.", "בַּבֹּקֶר הַצִּפּוֹר שָׁרָה שִׁיר."),
    "Syriac": ("ܫܠܡܐ ܠܟܘܢ ܟܠܗܘܢ",),
    "Thaana": ("އައްޑޫގެ މަސްވެރިޔާ ދިޔައީ",),
    "Devanagari": ("किसान सुबह खेत में काम करता है।", "क्षत्रिय ज्ञान श्रृंखला १२३"),
    "Bengali": ("নদীর ধারে একটি ছোট্ট নৌকা আছে।",),
    "Gurmukhi": ("ਬੱਚੇ ਬਾਗ਼ ਵਿੱਚ ਖੇਡਦੇ ਹਨ।",),
    "Gujarati": ("દુકાન સવારે નવ વાગ્યે ખૂલે છે.",),
    "Oriya": ("ଗଛରେ ପକ୍ଷୀ ବସିଛି।",),
    "Tamil": ("மழை பெய்ததால் பள்ளி மூடப்பட்டது.",),
    "Telugu": ("చెరువులో చేపలు ఈదుతున్నాయి.",),
    "Kannada": ("ಅಜ್ಜಿ ಬಿಸಿ ಹಾಲು ಕುಡಿದಳು.",),
    "Malayalam": ("കുട്ടികൾ പുഴയിൽ നീന്തുന്നു.",),
    "Sinhala": ("ගමේ මිනිස්සු කුඹුරේ වැඩ කරති. ශ්‍රී",),
    "Thai": ("แม่ค้าขายมะม่วงสุกอยู่ริมถนน", "น้ำแข็งใส่ในแก้วที่ ๕"),
    "Lao": ("ເດັກນ້ອຍຫຼິ້ນຢູ່ໃກ້ແມ່ນ້ຳ",),
    "Khmer": ("ក្មេងៗលេងបាល់នៅក្រោមដើមឈើ។",),
    "Myanmar": ("ကလေးတွေ မြစ်နားမှာ ကစားနေကြတယ်။",),
    "Tibetan": ("ཁྱི་ཆུང་དེ་སྒོ་དྲུང་དུ་ཉལ་འདུག",),
    "Georgian": ("ძაღლი კართან წევს და ელოდება.", "ᲛᲗᲐ ᲛᲐᲦᲐᲚᲘᲐ"),
    "Armenian": ("Երեխան ջուր է խմում և ժպտում։",),
    "Ethiopic": ("ልጁ ወደ ትምህርት ቤት ሄደ።",),
    "Cherokee": ("ᎣᏏᏲ, ᏙᎯᏧ? ꮳꮃꭹ",),
    "Mongolian": ("ᠮᠣᠷᠢ ᠤᠰᠤ ᠤᠤᠭᠤᠪᠠ᠃",),
    "Runic": ("ᚠᛁᛋᚴ ᛁ ᚢᛅᛏᚾᛁ᛫",),
    "Tifinagh": ("ⴰⵣⵓⵍ ⴼⵍⵍⴰⵡⵏ",),
    "Braille": ("⠓⠑⠇⠇⠕ ⠺⠕⠗⠇⠙",),
    "Gothic": ("𐌲𐌰𐌲𐌲𐌹𐌸 𐌹𐌽 𐌲𐌰𐍂𐌳",),
}  # fmt: skip

CODE = (
    'def area(r: float) -> float:\n    if r < 0:\n        raise ValueError(f"{r=}")\n    return r**2\n',
    "for (int i = 0; i < n; ++i) {\n\tif (a[i] != '\\0' && !seen[i])\n\t\tsum += a[i] << 2;\n}\n",
    "fn main() {\r\n    let v: Vec<u8> = vec![0x41, 0xFF];\r\n    println!(\"{:?}\", &v[..1]);\r\n}\r\n",
    "SELECT name, COUNT(*) AS n FROM visits\n  WHERE day >= '2031-02-03' GROUP BY 1;\n",
    '{"id": 17, "tags": ["a", null, 1e-9],\n  "path": "..\\\\new\\\\é.txt"}',
    "const f = async (x) => `${await g(x)}…`; // ¿por qué?\n",
    "<p class='n'>5 &lt; 7</p>\n<!-- --><br/>\n\n\n",
    "all: $(OBJ)\n\t@echo \"done\" && rm -rf ./build/*.o || true\n",
    "main = do\n  let xs = [x ^ 2 | x <- [1 ..]]\n  print $ takeWhile (< 50) xs\n",
)  # fmt: skip
MATHS = (
    "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε",
    "$\\sum_{k=1}^{n} k^2 = \\frac{n(n+1)(2n+1)}{6}$",
    "∇·𝐄 = ρ/ε₀, ∮𝑩⋅dℓ = μ₀𝐼; x² + y³ ≠ z⁴ ½ ⅔ ∫₀^∞ e^{−t²}dt = √π/2",
    "𝒜 ⊂ 𝔹 ∈ 𝕂ⁿ, 𝔤𝔩(𝑛) ≅ 𝖬𝗮𝙩, 𝟙𝟚𝟛 ℵ₀ ≤ 2^ℵ₀",
    "1,234,567.89 + 0x1F − 3e−10 ≈ 12345678901234567890 ÷ 7 = ?",
)
EMOJI = (
    "👍🏽", "👩🏿‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "🇫🇷🇯🇵", "🇧", "1️⃣", "❤️‍🔥", "☺︎", "🧑🏻‍🤝‍🧑🏾", "🤷🏼‍♀️", "🙂", "🫠", "🏽", "©️", "⌚",
)  # fmt: skip
LOOKS_SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<|EOT|>",
    "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "[CLS]", "[SEP]", "[UNK]", "[MASK]",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<think>", "</think>", "<tool_call>",
    "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<unused7>", "[multimodal]", "<0x41>", "<0xE2>",
    "<0x0A>", "▁", "▁▁▁", "▁the", "##a", "##", "Ġ", "Ġthe", "Ċ", "â", "ĠĠ", "@@", "</w>", "<extra_id_0>",
    "<m>", "<both>", "<word>", "<norm>", "ÉTÉ", "été", "<shout>", "\U0010ffff1\U0010ffff", "<|reserved_special_token_3|>",
)  # fmt: skip
COMPATIBLE = (
    "ﬁ ﬂ ﬃ ﬅ", "Ｆｕｌｌ　ｗｉｄｔｈ！", "ｱｲｳﾞ", "㌖㍿㊙①Ⅷ", "ǆ ŉ ĳ", "ﷺ ﻻ", "A\u030a \u00c5 \u212b",
    "ſtraſſe", "\u212a \u2126", "``quoted'' ‘so’ “so”", "İ ı ẞ", "\u1e9b\u0323", "\u0958\u09dc",
    "\uac00\u11a8", "\u0344\u0374\u037e", "…‥", "＂／",
)  # fmt: skip
MARKS = ("\u0301\u0308\u0323\u0327\u0334\u0345\u0360\u036f\u0489\u05b0\u064e\u0651\u093c\u094d\u0e49"
         "\u0f71\u0f72\u1ab0\u20d2\u3099\u309a\ufe0e\ufe0f\U0001d165\U000e0100")  # fmt: skip
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROL = "\x00\x00\x00\x01\x04\x06\x07\x08\x0b\x0c\x14\x1a\x1b\x1f\x7f\x80\x85\x9f\u00ad\u200b\u200c\u200d\u2028\u2029\u2060\ufeff\ufffc\ufffd"
SPACES = " \u00a0\u1680\u2003\u2009\u202f\u205f\u3000\t"
RANGES = ((0x20, 0x7F), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000),
          (0x20000, 0x32000), (0xE0000, 0xE0200), (0xF0000, 0x110000))  # fmt: skip


def _some(rng: Random, items: Sequence[str], least: int, most: int) -> str:
    return "".join(rng.choices(items, k=rng.randint(least, most)))


def _sentences(rng: Random) -> str:
    scripts = rng.choices(list(SENTENCES), k=rng.randint(1, 3))
    return "".join(rng.choice(["", " ", "\n"]) + rng.choice(SENTENCES[s]) for s in scripts)


def _any_character(rng: Random) -> str:
    return chr(rng.randrange(*rng.choice(RANGES)))


def _marked(rng: Random) -> str:
    bases = [*"aeoI ", "ا", "ש", "क", "ท", "が", "한", "🙂", "\n"]
    return "".join(rng.choice(bases) + _some(rng, MARKS, 0, 6) for _ in range(rng.randint(2, 8)))


def _directions(rng: Random) -> str:
    parts = [*SENTENCES["Arabic"], *SENTENCES["Hebrew"], "abc 123", "(x) = [y]", " "]
    return "".join(rng.choice(parts) + rng.choice(BIDI) for _ in range(rng.randint(2, 4)))


def _control(rng: Random) -> str:
    return "".join(
        rng.choice(["", "a", " he", "é", "好", ".", "="]) + rng.choice(CONTROL)
        for _ in range(rng.randint(2, 10))
    )


def _long_word(rng: Random) -> str:
    unit = rng.choice(
        ["a", "ab", "Donau", "é", "字", "ก", "🙂", "-", "xyz_", "0", "0123456789", "ß"]
    )
    return unit * rng.randint(20, rng.choice([40, 60, 400]))


def _white_space(rng: Random) -> str:
    runs = [" ", "\n", "\t", "\r\n", rng.choice(SPACES)]
    words = ["", "", "a", "if", ".", "é", "1"]
    size = rng.choice([3, 8, 60])
    return "".join(
        rng.choice(runs) * rng.randint(1, size) + rng.choice(words)
        for _ in range(rng.randint(1, 6))
    )


def _noncharacters(rng: Random) -> str:
    plane = rng.randrange(17) << 16
    points = [plane | 0xFFFE, plane | 0xFFFF, 0xFDD0 + rng.randrange(32)]
    return "".join("x" * rng.randint(0, 1) + chr(p) for p in rng.choices(points, k=5))


def _looks_special(rng: Random) -> str:
    glue = ["", "", " ", "  ", "a", "\n", "é"]
    return "".join(
        rng.choice(glue) + rng.choice(LOOKS_SPECIAL) for _ in range(rng.randint(1, 5))
    ) + rng.choice(glue)


def _mixed(rng: Random) -> str:
    simple = [make for name, make in CATEGORIES.items() if name != "mixed"]
    text = ""
    for _ in range(rng.randint(2, 4)):
        part = rng.choice(simple)(rng)
        start = rng.randint(0, max(len(part) - 1, 0))
        text += part[start : start + rng.randint(1, 40)]
    return text


CATEGORIES: dict[str, Callable[[Random], str]] = {
    "sentences": _sentences,
    "code": lambda rng: rng.choice(CODE),
    "maths": lambda rng: rng.choice(MATHS),
    "emoji": lambda rng: _some(rng, [*EMOJI, " ", "ok", ""], 1, 9),
    "marks": _marked,
    "directions": _directions,
    "compatible": lambda rng: _some(rng, [*COMPATIBLE, " ", "x"], 1, 5),
    "control": _control,
    "long word": _long_word,
    "white space": _white_space,
    "noncharacters": _noncharacters,
    "looks special": _looks_special,
    "any characters": lambda rng: "".join(_any_character(rng) for _ in range(rng.randint(1, 30))),
    "mixed": _mixed,
}


def corpus_texts(n: int, seed: int) -> list[str]:
    """Texts `n`; from 100 on, every script of `SENTENCES` and every category are among them."""
    rng = Random(f"texts {seed}")
    made = ["", " ", *(rng.choice(sentences) for sentences in SENTENCES.values())]
    while len(made) < n:
        made += [make(rng) for make in CATEGORIES.values()]
        made += [_sentences(rng) for _ in range(3)] + [_mixed(rng) for _ in range(3)]
    made = made[:n]
    rng.shuffle(made)
    return made


def random_ids(
    n_ids: int,
    rng: Random,
    *,
    fragments: Sequence[int] = (),
    specials: Sequence[int] = (),
    text_ids: Sequence[int] = (),
) -> list[int]:
    """Ids a student may sample, none to about forty.

    A third are any ids; a third mostly `fragments` (tokens that are no valid UTF-8 alone), with
    `specials` between; a third `text_ids` (those of some text) with ids lost, doubled and put in.
    """
    kind = rng.randrange(3)
    size = rng.choice([0, 1, 2, 3, 5, 8, 12, 20, 40])
    if kind == 0:
        return [rng.randrange(n_ids) for _ in range(size)]
    pools = [p for p in (fragments, fragments, fragments, specials, range(n_ids)) if p]
    if kind == 1:
        return [rng.choice(rng.choice(pools)) for _ in range(size)]
    ids: list[int] = []
    for i in text_ids[:40]:
        ids += rng.choices([[i], [], [i, i], [i, rng.choice(rng.choice(pools))]], [30, 1, 1, 1])[0]
    return ids
