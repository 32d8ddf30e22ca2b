# SPDX-License-Identifier: Apache-2.0
"""What the property tests draw: texts of many scripts, token ids, segmentations of a text."""

from hypothesis import strategies as st

__all__ = ["SNIPPETS", "bytes_pieces", "id_lists", "segmentations", "texts"]

SNIPPETS = [
    "hello", " hello", "help", "hel", "The quick", " fox", ".", ", ", "Paris", "INTERNAL", "It's",
    "café", "cafe\u0301", "A\u030a", "a\u0327\u0301", "\u0301", "naïve", "Ångström", "ﬁne", "oﬃce",
    "½", "Ｔhe", "ｶﾞ", "\ufb01", "²",
    "Привет", " мир", "Ελλάς", "你好", "世界。", "東京", "カタカナ", "ひら", "한국", "\u1112\u1161\u11ab",
    "مرحبا", "שלום", "नमस्ते", "สวัสดี", "தமிழ்", "ქართული", "አማርኛ",
    "🙂", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "❤️", "𝒳", "\U0010fffd",
    "def f(x):\n    return x\n", "\n\n", "\n        ", "\t", " ", "  ", "     ", "\r\n", "\u00a0",
    "1234", "3.14", "x == 1", "▁", "▁▁", "Ġ", "##a", "<0x41>",
    "\x00", "\x1b", "\ufffd", "\u200b", "\ufeff", "\u2028",
    "<think>", "<|im_end|>", "</s>", "<s>", "<unk>", "[UNK]", "[SEP]",
]  # fmt: skip


def texts(max_parts: int = 12) -> st.SearchStrategy[str]:
    """Texts of known snippets in between any characters UTF-8 can write."""
    character = st.characters(exclude_categories=("Cs",))
    part = st.one_of(st.sampled_from(SNIPPETS), st.sampled_from(SNIPPETS), character)
    return st.lists(part, max_size=max_parts).map("".join)


def id_lists(n_ids: int, max_size: int = 16) -> st.SearchStrategy[list[int]]:
    """Sampled ids: any that the tokenizer has."""
    return st.lists(st.integers(0, n_ids - 1), max_size=max_size)


def bytes_pieces() -> st.SearchStrategy[list[bytes]]:
    """Token bytes that cut characters anywhere, whole or broken."""
    good = st.sampled_from(["a", "é", "你", "🙂", "\ufffd"]).map(str.encode)
    bad = st.sampled_from([b"\x80", b"\xc3", b"\xe4\xbd", b"\xf0\x9f\x99", b"\xff", b"\xed\xa0"])

    @st.composite
    def cut(draw: st.DrawFn) -> list[bytes]:
        data = b"".join(draw(st.lists(st.one_of(good, bad), max_size=8)))
        at = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
        return [data[i:j] for i, j in zip([0, *at], [*at, len(data)], strict=True)]

    return cut()


@st.composite
def segmentations(draw: st.DrawFn, size: int) -> list[tuple[int, int, int]]:
    """Spans over `size` bytes: mostly a tiling, with zero-width tokens, overlaps, gaps, flaws."""
    at = sorted(draw(st.lists(st.integers(0, size), max_size=10)))
    spans = []
    for start, end in zip([0, *at], [*at, size], strict=True):
        kind = draw(st.sampled_from(["plain"] * 8 + ["gap", "share", "flaw"]))
        if kind == "gap" and draw(st.booleans()):
            continue
        flaw = draw(st.integers(1, 5)) if kind == "flaw" else 0
        spans.append((start, end, flaw))
        if kind == "share":
            spans.append((start, draw(st.integers(start, end)), flaw))
    return spans
