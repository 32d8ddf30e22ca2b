# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of many families, made in the test process in under a second each.

Every run makes the same: the byte-pair trainer is deterministic here, and the two that are not
(Unigram, WordPiece) have their pieces counted by hand.

`FAMILIES` maps a name to a function without arguments; each result is made once. Together they
hold what real tokenizers do: byte-level alphabets with and without all 256 bytes, byte fallback,
prefix spaces, NFC, NFKC and lowercasing, `##`, unknown, special and added tokens. `MORE_FAMILIES`
holds the rarer kinds, apart because tests take the pairs of a dict: T5's and ALBERT's normalizers,
cased BERT, single characters, single bytes, every prefix of Metaspace, GPT-4's pattern, Gemma's
spaces, and added tokens with every flag.
"""

import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import log
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

__all__ = [
    "FAMILIES",
    "LOSSY_BYTES",
    "MORE_FAMILIES",
    "byte_bpe",
    "byte_bpe_lossy",
    "byte_bpe_nfc",
    "char_bpe_lossy",
    "sentencepiece_bpe",
    "unigram",
    "wordpiece",
]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog was not amused, and the fox knew it.",
    "hello help helping helped hello internals internal Paris Berlin Germany is the capital of",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n        print(i * 2)\n",
    "if x == 1:\n    y = {'key': [1, 2, 3]}\n    while True:\n        break  # done\n",
    "café naïve façade élève déjà vu São Paulo Zürich straße œuvre",
    "Привет, мир! Как дела? Это проверка. Ελληνικά γράμματα και λέξεις.",
    "你好，世界。今天天气很好。東京都に住んでいます。カタカナとひらがな。한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك اليوم؟ שלום עולם नमस्ते दुनिया สวัสดีชาวโลก தமிழ்",
    "🙂🙃👍 🎉🎉 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️",
    "1234567890 3.14 2,718 2024-01-31 50% ½ ﬁne oﬃce",
    "What is 12 + 30? 12 + 30 = 42. The answer is 42. Question: Answer: Yes. No.",
] * 2

# Bytes without a token in `byte_bpe_lossy`: NUL, a control byte, two lead bytes of common letters
# (é and its like; every emoji) and one continuation byte.
LOSSY_BYTES = bytes([0x00, 0x1B, 0xC3, 0xF0, 0x99])


# Characters that the character-based vocabularies do not have.
RARE = frozenset("ï½日تम🎉")


def _words(tokenizer: Tokenizer) -> list[str]:
    """The pre-tokenized words of the normalized corpus, in order."""
    assert tokenizer.normalizer is not None
    assert tokenizer.pre_tokenizer is not None
    lines = [tokenizer.normalizer.normalize_str(line) for line in CORPUS]
    return [word for line in lines for word, _at in tokenizer.pre_tokenizer.pre_tokenize_str(line)]


def _edited(tokenizer: Tokenizer, edit: Callable[[dict[str, Any]], None]) -> Tokenizer:
    config = json.loads(tokenizer.to_str())
    edit(config)
    return Tokenizer.from_str(json.dumps(config))


def _byte_level(normalizer: normalizers.Normalizer | None, size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


@lru_cache(maxsize=1)
def byte_bpe() -> Tokenizer:
    """GPT-2's kind: all bytes, digits split, special `<|im_end|>`, plain added `<think>`."""
    return _byte_level(None, 500)


@lru_cache(maxsize=1)
def byte_bpe_nfc() -> Tokenizer:
    """Qwen's kind: all bytes, NFC normalizer."""
    return _byte_level(normalizers.NFC(), 700)


def _drop_bytes(config: dict[str, Any]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    hidden = [c for c in alphabet if ord(c) > 255]
    shown = {ord(c): c for c in alphabet if ord(c) < 256}
    hidden_bytes = [byte for byte in range(256) if byte not in shown]
    char_of = shown | dict(zip(hidden_bytes, hidden, strict=True))
    gone = {char_of[byte] for byte in LOSSY_BYTES}
    model = config["model"]
    kept = [piece for piece in model["vocab"] if not gone & set(piece)]
    model["vocab"] = {piece: i for i, piece in enumerate(kept)}
    model["merges"] = [pair for pair in model["merges"] if not gone & set("".join(pair))]
    for token in config["added_tokens"]:
        token["id"] = model["vocab"].get(token["content"], len(kept))


@lru_cache(maxsize=1)
def byte_bpe_lossy() -> Tokenizer:
    """SmolLM2's kind: byte-level without a token for some bytes, which vanish without a trace."""
    return _edited(_byte_level(None, 600), _drop_bytes)


@lru_cache(maxsize=1)
def sentencepiece_bpe() -> Tokenizer:
    """Llama 2's kind: `▁`, byte fallback, a space before every text, BOS, `.` twice (`<0x2E>`)."""
    tokenizer = Tokenizer(models.BPE())
    spaces = pre_tokenizers.Split(Regex(r"(?<=[^▁])(?=▁)|\n"), "isolated")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = spaces
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=560, show_progress=False))

    def with_bytes(config: dict[str, Any]) -> None:
        model = config["model"]
        kept = [p for p in sorted(model["vocab"], key=model["vocab"].get) if not RARE & set(p)]
        first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        model["vocab"] = {piece: i for i, piece in enumerate([*first, *kept])}
        model["merges"] = [pair for pair in model["merges"] if not RARE & set("".join(pair))]
        model.update(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        config["pre_tokenizer"] = None

    tokenizer = _edited(tokenizer, with_bytes)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@lru_cache(maxsize=1)
def char_bpe_lossy() -> Tokenizer:
    """BPE over characters, no byte fallback and no unknown token: rare characters vanish."""

    def edit(config: dict[str, Any]) -> None:
        model = config["model"]
        kept = [p for p in model["vocab"] if not (p.startswith("<0x") or p == "<unk>")]
        model["vocab"] = {piece: i for i, piece in enumerate(kept)}
        model.update(unk_token=None, byte_fallback=False)
        config["added_tokens"] = []
        config["post_processor"] = None

    return _edited(sentencepiece_bpe(), edit)


@lru_cache(maxsize=1)
def unigram() -> Tokenizer:
    """Unigram with Metaspace, NFKC and an unknown token; `</s>` is an ordinary Viterbi piece."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    counts = Counter(
        word[i:j]
        for word in _words(tokenizer)
        for i in range(len(word))
        for j in range(i + 1, i + 7)
    )
    kept = {p: n for p, n in sorted(counts.items()) if (n > 5 or len(p) == 1) and not RARE & set(p)}
    scores = [(piece, log(n / sum(kept.values()))) for piece, n in kept.items()]
    specials = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    tokenizer.model = models.Unigram([*specials, *scores], unk_id=0)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


@lru_cache(maxsize=1)
def wordpiece() -> Tokenizer:
    """BERT's kind: lowercase, accents stripped, `##` inside words, spaces implied."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    words = Counter(_words(tokenizer))
    endings = Counter("##" + w[i:] for w in words for i in range(1, len(w)))
    pieces = {
        *(word for word, n in words.items() if n > 2),
        *(ending for ending, n in endings.items() if n > 2 and len(ending) < 6),
        *(mark + c for word in words for c in word for mark in ("", "##")),
    }
    kept = sorted(piece for piece in pieces if not RARE & set(piece))
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {piece: i for i, piece in enumerate([*specials, *kept])}
    tokenizer.model = models.WordPiece(vocab, unk_token="[UNK]")
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


# -- rarer kinds ---------------------------------------------------------------------------------

GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def precompiled(changes: Mapping[str, str]) -> normalizers.Normalizer:
    """SentencePiece's own normalizer: a double-array trie of what to replace, and by what.

    A node's children stand in a block of 256 cells of its own, which wastes space and is simple.
    """
    cells, blocks, texts = {}, {b"": 256}, b""
    for key in sorted(key.encode() for key in changes):
        for i in range(1, len(key) + 1):
            blocks.setdefault(key[:i], 256 * (len(blocks) + 1))
    ends = {key.encode(): text.encode() for key, text in changes.items()}
    for node, block in blocks.items():
        at = blocks[node[:-1]] ^ node[-1] if node else 0
        cells[at] = (at ^ block) << 10 | (node in ends) << 8 | (node[-1] if node else 0)
        if node in ends:
            cells[block] = 1 << 31 | len(texts)
            texts += ends[node] + b"\0"
    trie = [cells.get(i, 0) for i in range(256 * (len(blocks) + 1))]
    return normalizers.Precompiled(struct.pack(f"<I{len(trie)}I", 4 * len(trie), *trie) + texts)


def _with_normalizer(
    tokenizer: Tokenizer, normalizer: normalizers.Normalizer, edit: Any = None
) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str()) if edit is None else _edited(tokenizer, edit)
    copy.normalizer = normalizer
    return copy


@lru_cache(maxsize=1)
def t5() -> Tokenizer:
    """T5's and XLM-R's kind: a precompiled normalizer, runs of spaces to one, words by white space."""
    gone = [*map(chr, range(1, 9)), "\x0e", "\x1b", "\x1f", "\x7f", "\x9f", "🏽"]
    changes = dict.fromkeys(gone, "") | dict.fromkeys("\t\n\r\u00a0\u3000\u2028\u200b", " ")
    changes |= {"ﬁ": "fi", "ﬃ": "ffi", "½": "1\u20442", "…": "...", "ﷺ": "صلى الله عليه وسلم"}
    changes |= {"e\u0301": "é", "か\u3099": "が", "ｶﾞ": "ガ", "A\u030a": "Å", "\u212b": "Å"}
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer = _with_normalizer(unigram(), normalizers.Sequence([precompiled(changes), spaces]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    return tokenizer


@lru_cache(maxsize=1)
def nmt_unigram() -> Tokenizer:
    """The same with normalizers by name: control characters to nothing or a space, then NFKC."""
    spaces = normalizers.Replace(Regex(" {2,}"), "▁")
    steps = [normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip(left=False), spaces]
    return _with_normalizer(unigram(), normalizers.Sequence(steps))


@lru_cache(maxsize=1)
def albert() -> Tokenizer:
    """ALBERT's kind: quotes unified, NFKD, accents stripped, lowercase, runs of spaces to one."""
    steps = [
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]
    return _with_normalizer(unigram(), normalizers.Sequence(steps))


@lru_cache(maxsize=1)
def unigram_bytes() -> Tokenizer:
    """Unigram with byte fallback, as models of Llama's architecture have it; no normalizer."""

    def edit(config: dict[str, Any]) -> None:
        model = config["model"]
        model["vocab"][3:3] = [(piece, -30.0) for piece in BYTE_PIECES]
        model["byte_fallback"] = True
        config["normalizer"] = None

    tokenizer = _edited(unigram(), edit)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def _metaspace(scheme: str, *, split: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_str(unigram().to_str())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    return tokenizer


@lru_cache(maxsize=1)
def metaspace_first() -> Tokenizer:
    """A space only before the first word of the text."""
    return _metaspace("first", split=True)


@lru_cache(maxsize=1)
def metaspace_never() -> Tokenizer:
    """No space put in; pieces may reach over spaces."""
    return _metaspace("never", split=False)


@lru_cache(maxsize=1)
def gemma_like() -> Tokenizer:
    """Gemma's kind: spaces are `▁`, words end with theirs, byte fallback, added runs of `▁`."""

    def edit(config: dict[str, Any]) -> None:
        config["model"]["ignore_merges"] = False
        config["normalizer"]["normalizers"] = config["normalizer"]["normalizers"][1:]

    tokenizer = _edited(sentencepiece_bpe(), edit)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    runs = ["▁▁", "▁▁▁", "\n\n", "\t", "<unused7>", "[multimodal]"]
    tokenizer.add_tokens([AddedToken(run, special=False, normalized=False) for run in runs])
    return tokenizer


@lru_cache(maxsize=1)
def gpt4_like() -> Tokenizer:
    """GPT-4's kind: a regular expression that cuts words, then bytes; a word may skip merges."""
    tokenizer = _edited(byte_bpe(), lambda config: config["model"].update(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@lru_cache(maxsize=1)
def byte_bpe_folded() -> Tokenizer:
    """Byte-level behind a normalizer that changes much: NFKD, no accents, lowercase, stripped."""
    steps = [
        normalizers.Strip(),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
    ]
    return _with_normalizer(byte_bpe(), normalizers.Sequence(steps))


@lru_cache(maxsize=1)
def byte_bpe_gaps() -> Tokenizer:
    """Without words or some bytes: a token reaches over a lost byte. A space before every text."""
    tokenizer = Tokenizer.from_str(byte_bpe_lossy().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    return tokenizer


@lru_cache(maxsize=1)
def wordpiece_cased() -> Tokenizer:
    """Cased BERT: no lowercasing, accents kept, Chinese characters apart, control characters gone."""
    cased = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    return _with_normalizer(wordpiece(), cased)


@lru_cache(maxsize=1)
def characters() -> Tokenizer:
    """One token a character, `<unk>` for those it does not have."""
    known = sorted(set("".join(CORPUS)) - RARE)
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<eos>", *known])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    return tokenizer


@lru_cache(maxsize=1)
def byte_level() -> Tokenizer:
    """ByT5's kind: one token a byte, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    return tokenizer


ADDED = [
    AddedToken("<m>", special=False, normalized=False, lstrip=True),
    AddedToken("<both>", special=False, normalized=False, lstrip=True, rstrip=True),
    AddedToken("<word>", special=False, normalized=False, single_word=True),
    AddedToken("if", special=False, normalized=False, single_word=True, rstrip=True),
    AddedToken("<norm>", special=False, normalized=True),
    AddedToken("ÉTÉ", special=False, normalized=True),
    AddedToken("好", special=False, normalized=False),
    AddedToken("  ", special=False, normalized=False),
    AddedToken("<shout>", special=True, normalized=True),
    AddedToken("<mask>", special=True, normalized=False, lstrip=True),
    AddedToken("[SEP]", special=True, normalized=False, rstrip=True, single_word=True),
]


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_tokens(ADDED)
    return copy


@lru_cache(maxsize=1)
def added_bytes() -> Tokenizer:
    """Byte-level, NFC, with added tokens of every flag."""
    return _with_added(byte_bpe_nfc())


@lru_cache(maxsize=1)
def added_lowercase() -> Tokenizer:
    """SentencePiece's kind with lowercasing, which normalized added tokens go through as well."""

    def edit(config: dict[str, Any]) -> None:
        config["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})

    return _with_added(_edited(sentencepiece_bpe(), edit))


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte_bpe": byte_bpe,
    "byte_bpe_lossy": byte_bpe_lossy,
    "byte_bpe_nfc": byte_bpe_nfc,
    "char_bpe_lossy": char_bpe_lossy,
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}

MORE_FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "added_bytes": added_bytes,
    "added_lowercase": added_lowercase,
    "albert": albert,
    "byte_bpe_folded": byte_bpe_folded,
    "byte_bpe_gaps": byte_bpe_gaps,
    "byte_level": byte_level,
    "characters": characters,
    "gemma_like": gemma_like,
    "gpt4_like": gpt4_like,
    "metaspace_first": metaspace_first,
    "metaspace_never": metaspace_never,
    "nmt_unigram": nmt_unigram,
    "t5": t5,
    "unigram_bytes": unigram_bytes,
    "wordpiece_cased": wordpiece_cased,
}
