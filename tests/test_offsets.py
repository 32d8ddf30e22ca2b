# SPDX-License-Identifier: Apache-2.0
"""Bytes of tokens in text: properties over all pairs of tokenizer families, and named cases."""

import itertools
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import minigold.offsets
from minigold import offsets
from minigold.align import align
from minigold.offsets import (
    BROKEN,
    CHANGED,
    EXACT,
    FLAWS,
    LOST,
    SPECIAL,
    UNKNOWN,
    encode_continuation,
    first_pieces,
    spans_of_ids,
    spans_of_text,
    text_of_ids,
    vocabulary,
)
from reference import align_slow, replace_slow
from strategies import bytes_pieces, texts
from tokenizers_for_tests import (
    FAMILIES,
    LOSSY_BYTES,
    byte_bpe,
    byte_bpe_lossy,
    byte_bpe_nfc,
    char_bpe_lossy,
    sentencepiece_bpe,
    t5,
    unigram,
    wordpiece,
)

PAIRS = list(itertools.product(FAMILIES, repeat=2))


def pieces_of(tokenizer: Tokenizer, text: str) -> list[tuple[str | None, int, int, int]]:
    """Vocabulary string, start, end, flaw of each token of a text."""
    ids, spans = encode_continuation(tokenizer, text)
    return [(tokenizer.id_to_token(i), *row) for i, row in zip(ids, spans.tolist(), strict=True)]


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    ids = [tokenizer.token_to_id(piece) for piece in pieces]
    assert None not in ids, (pieces, ids)
    return [i for i in ids if i is not None]


def check_spans(spans: NDArray[np.int64], data: bytes) -> None:
    start, end, flaw = spans.T
    assert (start >= 0).all()
    assert (start <= end).all()
    assert (end <= len(data)).all()
    assert (np.diff(start) >= 0).all()
    assert ((flaw >= 0) & (flaw < len(FLAWS))).all()


@lru_cache(maxsize=16)
def bytes_of(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    return vocabulary(tokenizer).token_bytes


def bytes_in(
    tokenizer: Tokenizer, ids: list[int], spans: NDArray[np.int64], data: bytes
) -> list[bytes]:
    """Each token's bytes; of a word without a space before it, those without its implied space."""
    table = bytes_of(tokenizer)
    found = []
    for i, (start, _end, _flaw) in zip(ids, spans.tolist(), strict=True):
        own = table[i]
        implied = tokenizer is wordpiece() and own[:1] == b" " and data[start : start + 1] != b" "
        found.append(own[1:] if implied else own)
    return found


# -- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@given(text=texts())
def test_exact_tokens_are_the_bytes_of_their_span(name: str, text: str) -> None:
    tokenizer, data = FAMILIES[name](), text.encode()
    ids, spans = encode_continuation(tokenizer, text)
    assert len(ids) == len(spans)
    check_spans(spans, data)
    own = bytes_in(tokenizer, ids, spans, data)
    for piece, (start, end, flaw) in zip(own, spans.tolist(), strict=True):
        if flaw == EXACT:
            assert data[start:end] == piece
        if flaw == LOST:
            assert len(piece) < end - start
    if name in ("byte_bpe", "sentencepiece_bpe") and "▁" not in text:
        assert not spans[:, 2].any()
        assert b"".join(own) == data


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_spans_of_ids_are_the_bytes_of_their_text(name: str, data: st.DataObject) -> None:
    tokenizer = FAMILIES[name]()
    table = vocabulary(tokenizer)
    ids = data.draw(st.lists(st.integers(0, len(table.roles) - 1), max_size=12))
    text, spans = text_of_ids(tokenizer, ids), spans_of_ids(tokenizer, ids)
    raw = b"".join(table.token_bytes[i] for i in ids)
    assert text == raw.decode("utf-8", errors="replace")
    check_spans(spans, text.encode())
    for i, (start, end, flaw) in zip(ids, spans.tolist(), strict=True):
        role = table.roles[i]
        if role == "text":
            assert flaw in (EXACT, BROKEN)
            assert (flaw == EXACT) <= (text.encode()[start:end] == table.token_bytes[i])
        else:
            assert (start, flaw) == (end, SPECIAL if role == "special" else UNKNOWN)
    broken = {b for s, e, f in spans.tolist() for b in range(s, e) if f == BROKEN}
    assert bool(broken) == (raw.decode("utf-8", "ignore") != text)


@given(bytes_pieces())
def test_broken_bytes_equal_the_slow_reference(pieces: list[bytes]) -> None:
    tokenizer = byte_bpe()
    ids = [offsets._table(tokenizer).token_bytes.index(bytes([b])) for p in pieces for b in p]
    spans = spans_of_ids(tokenizer, ids)
    slow = replace_slow([bytes([b]) for piece in pieces for b in piece])
    assert [(s, e, f == BROKEN) for s, e, f in spans.tolist()] == slow


@given(bytes_pieces(), st.integers(1, 9))
def test_broken_bytes_are_found_in_windows_of_any_size(pieces: list[bytes], size: int) -> None:
    data, whole = b"".join(pieces) * 3, offsets._replaced(b"".join(pieces) * 3).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offsets, "_WINDOW", size + 3)  # a character fits
        assert offsets._replaced(data).tolist() == whole


def check_chunks(
    student: tuple[Tokenizer, list[int], NDArray[np.int64]],
    teacher: tuple[Tokenizer, list[int], NDArray[np.int64]],
    text: str,
) -> None:
    """Invariants 1 to 3 and 5 of the alignment on real spans of one text."""
    data, chunks = text.encode(), align(student[2], teacher[2])
    rows = list(zip(*(column.tolist() for column in chunks), strict=True))
    assert rows == align_slow(student[2].tolist(), teacher[2].tolist())
    mirrored = list(zip(*(c.tolist() for c in align(teacher[2], student[2])), strict=True))
    assert mirrored == [(t0, t1, s0, s1, *rest) for s0, s1, t0, t1, *rest in rows]
    if data and (student[1] or teacher[1]):
        assert sum(row[1] - row[0] for row in rows) == len(student[2])
        assert sum(row[3] - row[2] for row in rows) == len(teacher[2])
        assert rows[0][4] == 0
    for s0, s1, t0, t1, start, end, flaw in rows:
        if flaw == EXACT:
            for (tokenizer, ids, spans), i, j in ((student, s0, s1), (teacher, t0, t1)):
                own = bytes_in(tokenizer, ids[i:j], spans[i:j], data)
                assert b"".join(own) == data[start:end]


@pytest.mark.parametrize(("left", "right"), PAIRS)
@given(data=st.data())
def test_pairs_align_on_texts_and_on_sampled_ids(
    left: str, right: str, data: st.DataObject
) -> None:
    student, teacher = FAMILIES[left](), FAMILIES[right]()
    text = data.draw(texts(6))
    ids, spans = encode_continuation(student, text)
    check_chunks((student, ids, spans), (teacher, *encode_continuation(teacher, text)), text)
    n_ids = len(vocabulary(student).roles)
    ids = data.draw(st.lists(st.integers(0, n_ids - 1), max_size=8))
    text, spans = text_of_ids(student, ids), spans_of_ids(student, ids)
    check_chunks((student, ids, spans), (teacher, *encode_continuation(teacher, text)), text)


@pytest.mark.parametrize("name", ["byte_bpe", "sentencepiece_bpe"])
@given(text=texts().filter(lambda text: "▁" not in text))
def test_ids_of_a_text_and_the_text_give_the_same_spans(name: str, text: str) -> None:
    tokenizer = FAMILIES[name]()
    ids, spans = encode_continuation(tokenizer, text)
    assert text_of_ids(tokenizer, ids) == text
    assert spans_of_ids(tokenizer, ids).tolist() == spans.tolist()
    chunks = align(spans, spans)
    assert chunks.s0.tolist() == chunks.t0.tolist() == list(range(len(ids)))


@pytest.mark.parametrize("name", ["byte_bpe", "byte_bpe_nfc", "sentencepiece_bpe", "wordpiece"])
@given(text=texts())
def test_text_of_ids_equals_decode(name: str, text: str) -> None:
    tokenizer = FAMILIES[name]()
    ids = tokenizer.encode("x " + text, add_special_tokens=True).ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    ours = text_of_ids(tokenizer, ids)
    implied = name in ("sentencepiece_bpe", "wordpiece")
    assert ours == (" " if implied else "") + decoded


# -- named cases: ids ----------------------------------------------------------------------------


def test_an_emoji_over_tokens_has_spans_inside_the_character() -> None:
    tokenizer = byte_bpe()
    ids = ids_of(tokenizer, "a", "ð", "Ł", "Ļ", "Ĥ")
    assert text_of_ids(tokenizer, ids) == "a🙂"
    expected = [[0, 1, 0], [1, 2, 0], [2, 3, 0], [3, 4, 0], [4, 5, 0]]
    assert spans_of_ids(tokenizer, ids).tolist() == expected


@pytest.mark.parametrize(
    ("pieces", "text", "spans"),
    [
        (["Ļ", "a"], "\ufffda", [[0, 3, BROKEN], [3, 4, EXACT]]),
        (["a", "Ļ", "b"], "a\ufffdb", [[0, 1, EXACT], [1, 4, BROKEN], [4, 5, EXACT]]),
        (["a", "Ã"], "a\ufffd", [[0, 1, EXACT], [1, 4, BROKEN]]),
        (["ð", "Ł", "Ļ"], "\ufffd", [[0, 3, BROKEN]] * 3),
        (["ðŁĻ", "a"], "\ufffda", [[0, 3, BROKEN], [3, 4, EXACT]]),
        (["Ļ", "Ļ"], "\ufffd\ufffd", [[0, 3, BROKEN], [3, 6, BROKEN]]),
        (["aÃ", "b"], "a\ufffdb", [[0, 4, BROKEN], [4, 5, EXACT]]),
        (["aÃ", "©"], "aé", [[0, 2, EXACT], [2, 3, EXACT]]),
        (["Ã", "<|im_end|>", "©"], "é", [[0, 1, EXACT], [1, 1, SPECIAL], [1, 2, EXACT]]),
        (["ð", "<|im_end|>", "Ł"], "\ufffd", [[0, 3, BROKEN], [0, 0, SPECIAL], [0, 3, BROKEN]]),
        (["ï", "¿", "½"], "\ufffd", [[0, 1, EXACT], [1, 2, EXACT], [2, 3, EXACT]]),
        (["<think>", "a"], "<think>a", [[0, 7, EXACT], [7, 8, EXACT]]),
        (["Ġ", "a", "<|endoftext|>"], " a", [[0, 1, 0], [1, 2, 0], [2, 2, SPECIAL]]),
        ([], "", []),
    ],
)
def test_bytes_of_byte_level_ids(pieces: list[str], text: str, spans: list[list[int]]) -> None:
    ids = ids_of(byte_bpe(), *pieces)
    assert text_of_ids(byte_bpe(), ids) == text
    assert spans_of_ids(byte_bpe(), ids).tolist() == spans
    assert spans_of_ids(byte_bpe(), ids).dtype == np.int64


@pytest.mark.parametrize(
    ("make", "pieces", "text", "spans"),
    [
        (sentencepiece_bpe, ["▁ca", "f", "<0xC3>", "<0xA9>"], " café", [3, 4, 5, 6]),
        (sentencepiece_bpe, ["<s>", "▁", "<unk>", "a"], " a", [0, 1, 1, 2]),
        (sentencepiece_bpe, ["<0x2E>", "."], "..", [1, 2]),
        (unigram, ["▁", "café", "</s>"], " café", [1, 6, 6]),
        (wordpiece, ["hello", "w", "##o", "[SEP]"], " hello wo", [6, 8, 9, 9]),
    ],
)
def test_bytes_of_other_ids(make: Any, pieces: list[str], text: str, spans: list[int]) -> None:
    ids = ids_of(make(), *pieces)
    assert text_of_ids(make(), ids) == text
    assert spans_of_ids(make(), ids)[:, 1].tolist() == spans


def test_a_replacement_character_that_was_written_is_text() -> None:
    ids, spans = encode_continuation(byte_bpe(), "a\ufffdb")
    assert spans_of_ids(byte_bpe(), ids).tolist() == spans.tolist()
    assert not spans[:, 2].any()


# -- named cases: text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (byte_bpe, " 🙂", [("ĠðŁ", 0, 3, 0), ("Ļ", 3, 4, 0), ("Ĥ", 4, 5, 0)]),
        (byte_bpe, "a\x00", [("a", 0, 1, 0), ("Ā", 1, 2, 0)]),
        (byte_bpe, "a<think>", [("a", 0, 1, 0), ("<think>", 1, 8, 0)]),
        (byte_bpe, "12", [("1", 0, 1, 0), ("2", 1, 2, 0)]),
        (byte_bpe_nfc, "e\u0301f", [("Ã©", 0, 3, CHANGED), ("f", 3, 4, 0)]),
        (byte_bpe_nfc, "e\u0301🙂", [
            ("Ã©", 0, 3, CHANGED), ("ðŁĻ", 3, 6, 0), ("Ĥ", 6, 7, 0),
        ]),
        (byte_bpe_lossy, "aéb", [("a", 0, 1, 0), ("©", 2, 3, 0), ("b", 3, 4, 0)]),
        (byte_bpe_lossy, "\x00a\x00", [("a", 1, 2, 0)]),
        (byte_bpe_lossy, "h\x1bhel", [("h", 0, 1, 0), ("hel", 2, 5, 0)]),
        (byte_bpe_lossy, "\x00", []),
        (sentencepiece_bpe, "he", [("he", 0, 2, 0)]),
        (sentencepiece_bpe, " ca", [("▁ca", 0, 3, 0)]),
        (sentencepiece_bpe, "ï", [("<0xC3>", 0, 1, 0), ("<0xAF>", 1, 2, 0)]),
        (sentencepiece_bpe, "a▁", [("a", 0, 1, 0), ("▁", 1, 4, CHANGED)]),
        (sentencepiece_bpe, "好你", [("好", 0, 3, 0), ("你", 3, 6, 0)]),
        (unigram, "aﬁne", [("a", 0, 1, 0), ("fine", 1, 6, CHANGED)]),
        (unigram, "ﬃ.", [*[(c, 0, 3, CHANGED) for c in "ffi"], (".", 3, 4, 0)]),
        (unigram, "xｶﾞ", [("x", 0, 1, 0), ("<unk>", 1, 7, UNKNOWN)]),
        (unigram, "he\x00", [("he", 0, 2, 0), ("<unk>", 2, 3, UNKNOWN)]),
        (unigram, " ", [("▁", 0, 1, 0)]),
        (wordpiece, "hello", [("hello", 0, 5, 0)]),
        (wordpiece, " hello", [("hello", 0, 6, 0)]),
        (wordpiece, "  hello", [("hello", 1, 7, 0)]),
        (wordpiece, "Hello\n.", [("hello", 0, 5, CHANGED), (".", 6, 7, 0)]),
        (wordpiece, "E\u0301 \u15ef.", [
            ("e", 0, 3, CHANGED), ("[UNK]", 3, 7, UNKNOWN), (".", 7, 8, 0),
        ]),
        *[(make, "", []) for make in FAMILIES.values()],
    ],
)  # fmt: skip
def test_spans_of_a_text(make: Any, text: str, expected: list[tuple[str, int, int, int]]) -> None:
    assert pieces_of(make(), text) == expected
    assert spans_of_text(make(), text).tolist() == [list(row[1:]) for row in expected]
    assert spans_of_text(make(), text).shape == (len(expected), 3)


def test_a_token_over_a_lost_byte_is_lost() -> None:
    model = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert pieces_of(tokenizer, "aXb") == [("ab", 0, 3, LOST)]
    tokenizer.normalizer = normalizers.NFC()
    again = Tokenizer.from_str(tokenizer.to_str())
    assert pieces_of(again, "aXXb") == [("ab", 0, 4, LOST)]


def test_lost_bytes_beside_changed_text_stay_in_their_words() -> None:
    lossy = byte_bpe_lossy()
    tokenizer = Tokenizer.from_str(lossy.to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    spans = pieces_of(tokenizer, "a\x1bb éb he C")
    assert spans[:2] == [("a", 0, 1, 0), ("b", 2, 3, 0)]
    assert spans[2:5] == [("Ġ", 3, 4, 0), ("©", 5, 6, 0), ("b", 6, 7, 0)]
    assert spans[-1][1:] == (10, 12, CHANGED)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("text", ["<|im_end|>", "x</s> <s>", "[SEP][CLS] [MASK]", "<|endoftext|>"])
def test_text_never_becomes_a_special_token(name: str, text: str) -> None:
    tokenizer = FAMILIES[name]()
    ids, _spans = encode_continuation(tokenizer, text)
    assert "special" not in {vocabulary(tokenizer).roles[i] for i in ids}


def test_a_whole_word_lookup_does_not_find_a_special_token() -> None:
    vocab = {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}
    model = models.BPE(vocab, [("<", "e"), ("<e", ">")], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<e>"])
    assert [piece for piece, *_span in pieces_of(tokenizer, "<e>")] == ["<e", ">"]


def test_nothing_is_put_before_or_after_a_continuation() -> None:
    tokenizer = Tokenizer.from_str(sentencepiece_bpe().to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    assert tokenizer.encode("hehehe").ids != encode_continuation(tokenizer, "hehehe")[0]
    assert [row[0] for row in pieces_of(tokenizer, "hehehe")] == ["he", "he", "he"]
    gpt2 = Tokenizer.from_str(byte_bpe().to_str())
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert [row[0] for row in pieces_of(gpt2, "hel")] == ["hel"]
    assert gpt2.encode("hel").tokens[0].startswith("Ġ")


def test_dropout_is_off() -> None:
    tokenizer = Tokenizer.from_str(byte_bpe().to_str())
    tokenizer.model.dropout = 1.0
    assert encode_continuation(tokenizer, "hello")[0] == encode_continuation(byte_bpe(), "hello")[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_callers_tokenizer_is_not_changed(name: str) -> None:
    tokenizer = FAMILIES[name]()
    before = tokenizer.to_str()
    encode_continuation(tokenizer, "a b")
    assert tokenizer.to_str() == before
    assert not tokenizer.encode_special_tokens


def test_a_marker_that_takes_spaces_is_changed_text() -> None:
    tokenizer = Tokenizer.from_str(byte_bpe().to_str())
    tokenizer.add_tokens([AddedToken("<m>", lstrip=True, normalized=False)])
    assert pieces_of(tokenizer, "a  <m>b")[1:] == [("<m>", 1, 6, CHANGED), ("b", 6, 7, 0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("he he", [("he", 0, 2, EXACT), ("▁he", 2, 5, EXACT)]),
        (" he", [("▁he", 0, 3, EXACT)]),
        ("he  he", [("he", 0, 2, EXACT), ("▁he", 3, 6, EXACT)]),  # one space has no token
        ("he\nhe ", [("he", 0, 2, EXACT), ("▁he", 2, 5, CHANGED)]),
        (" \n", []),
        (" \t\u3000he", [("▁he", 2, 7, CHANGED)]),
    ],
)
def test_t5_splits_at_white_space_and_puts_no_space_before_the_first_word(
    text: str, expected: list[tuple[str, int, int, int]]
) -> None:
    tokenizer = Tokenizer.from_str(unigram().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    assert pieces_of(tokenizer, text) == expected
    theirs = tokenizer.encode("x " + text, add_special_tokens=False).tokens
    if text[:1] == " ":
        assert [row[0] for row in expected] == theirs[1:] or not text.strip()


def test_a_space_at_the_start_is_kept_and_one_at_the_end_is_lost_where_texts_are_stripped() -> None:
    tokenizer = Tokenizer.from_str(byte_bpe().to_str())
    tokenizer.normalizer = normalizers.Strip()
    assert pieces_of(tokenizer, " a ") == [("Ġa", 0, 2, EXACT)]


def test_an_added_token_that_llama_2_normalizes_has_its_space() -> None:
    tokenizer = Tokenizer.from_str(sentencepiece_bpe().to_str())
    tokenizer.add_tokens(["<tool>"])
    text = "x <tool> he"
    theirs = tokenizer.encode(text, add_special_tokens=False).ids
    ids, spans = encode_continuation(tokenizer, " " + text)
    assert ids == theirs
    assert text_of_ids(tokenizer, ids) == " " + text
    assert spans_of_ids(tokenizer, ids).tolist() == spans.tolist()
    assert not spans[:, 2].any()


def test_what_a_precompiled_normalizer_deletes_after_an_added_token_is_counted() -> None:
    tokenizer = Tokenizer.from_str(t5().to_str())
    tokenizer.add_tokens([AddedToken("{", normalized=False)])
    text = "b{\x01aaa{\x01\x01{h"
    places = {(start, end) for piece, start, end, _ in pieces_of(tokenizer, text) if piece == "a"}
    assert places == {(3, 4), (4, 5), (5, 6)}
    assert pieces_of(tokenizer, text)[-2:] == [("{", 9, 10, EXACT), ("h", 10, 11, EXACT)]
    assert spans_of_text(tokenizer, "\x01\x1f").tolist() == []
    ids, spans = encode_continuation(tokenizer, "a{\x01" * 5000)
    assert len(ids) == 10000
    assert spans[-1].tolist() == [3 * 5000 - 2, 3 * 5000 - 1, EXACT]


def test_words_that_end_in_a_mark_are_read_without_it() -> None:
    """CLIP's kind: byte-level, `</w>` at the end of each word."""
    vocab = {"a": 0, "b": 1, "b</w>": 2, "Ã": 3, "©</w>": 4, "a</w>": 5}
    tokenizer = Tokenizer(models.BPE(vocab, [], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    assert pieces_of(tokenizer, "ab é") == [
        ("a", 0, 1, EXACT), ("b</w>", 1, 2, EXACT), ("Ã", 3, 4, EXACT), ("©</w>", 4, 5, EXACT),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="got words that end in </w>; what a sampled id stands"):
        spans_of_ids(tokenizer, [0])


def test_a_tokenizer_without_its_unknown_token_is_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(
        ValueError, match=r"expected one that encodes any text, got .*UNK.*; repair"
    ):
        encode_continuation(tokenizer, "b")
    with pytest.raises(ValueError, match="expected one that encodes any text"):
        first_pieces(tokenizer, [b"b"])


@pytest.mark.parametrize(
    "steps",
    [
        [decoders.Strip(" ", 1, 0), decoders.Fuse()],
        [decoders.Fuse(), decoders.Strip("x", 1, 0)],
        [decoders.ByteLevel(), decoders.Replace("a", "b")],
    ],
)
def test_steps_of_a_decoder_in_an_order_that_hides_what_a_token_stands_for(
    steps: list[Any],
) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.Sequence(steps)
    with pytest.raises(ValueError, match="decoder: expected one made of"):
        spans_of_ids(tokenizer, [0])


@pytest.mark.parametrize(
    "parts",
    [
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace(prepend_scheme="always")],
    ],
)
def test_a_space_before_every_part_is_refused(parts: list[Any]) -> None:
    tokenizer = Tokenizer.from_str(byte_bpe().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    with pytest.raises(ValueError, match="puts a space before every piece; text cannot"):
        encode_continuation(tokenizer, "a")
    tokenizer = Tokenizer.from_str(byte_bpe().to_str())
    first = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first])
    assert pieces_of(tokenizer, "he")[0][0] == "he"


def test_a_token_added_into_a_hole_is_seen() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    assert vocabulary(tokenizer).roles[1] == "none"
    tokenizer.add_tokens(["zz"])
    hole = tokenizer.token_to_id("zz")
    assert text_of_ids(tokenizer, [hole]) == "zz"


# -- vocabularies --------------------------------------------------------------------------------


def test_vocabulary_roles_and_bytes() -> None:
    tokenizer = byte_bpe()
    end, think = ids_of(tokenizer, "<|im_end|>", "<think>")
    known = vocabulary(tokenizer, end_ids=(end,), size=think + 3)
    assert (known.token_bytes[end], known.roles[end]) == (b"", "end")
    assert (known.token_bytes[think], known.roles[think]) == (b"<think>", "text")
    assert known.roles[0] == "special"
    assert known.roles[-2:] == ("none", "none")
    assert known.token_bytes[-2:] == (b"", b"")
    assert known.first_pieces == {}
    assert len(vocabulary(tokenizer, size=5).roles) == 5
    assert b" a" in known.token_bytes
    assert vocabulary(sentencepiece_bpe()).token_bytes.count(b".") == 2
    assert vocabulary(unigram()).roles[0] == "unknown"
    assert vocabulary(wordpiece()).roles[1] == "unknown"


def test_holes_in_the_id_range_stand_for_nothing() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 3}, []))
    tokenizer.decoder = decoders.Fuse()
    assert vocabulary(tokenizer).roles == ("text", "none", "none", "text")
    assert spans_of_ids(tokenizer, [0, 1, 3]).tolist() == [[0, 1, 0], [1, 1, UNKNOWN], [1, 2, 0]]


def test_added_byte_level_tokens_are_their_content() -> None:
    tokenizer = Tokenizer.from_str(byte_bpe().to_str())
    assert text_of_ids(tokenizer, ids_of(tokenizer, "a")) == "a"
    tokenizer.add_tokens(["é!"])
    assert text_of_ids(tokenizer, ids_of(tokenizer, "é!")) == "é!"
    assert [row[0] for row in pieces_of(tokenizer, "aé!")] == ["a", "é!"]


def test_first_pieces_are_how_a_tokenizer_starts() -> None:
    strings = [b"hello", b" hello", b"help", b"", b"\xc3", "é".encode(), b" cafe", b"\x00a"]
    assert first_pieces(byte_bpe(), strings) == {
        b"hello": b"hel",
        b" hello": b" hel",
        b"help": b"hel",
        "é".encode(): "é".encode(),
        b" cafe": b" ",
        b"\x00a": b"\x00",
    }
    assert first_pieces(byte_bpe_lossy(), [b"\x00a", b"ab"]) == {b"ab": b"a"}
    assert first_pieces(unigram(), [b"\x00", "ﬁ".encode(), b" hea"]) == {b" hea": b" he"}
    assert first_pieces(wordpiece(), [b" hello", b"hello"]) == {b" hello": b" hello"}


@given(data=st.data())
def test_first_pieces_equal_the_continuation(data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from([make() for make in FAMILIES.values()]))
    texts_drawn = data.draw(st.lists(texts(3), max_size=4))
    found = first_pieces(tokenizer, [text.encode() for text in texts_drawn])
    table = vocabulary(tokenizer).token_bytes
    for text in texts_drawn:
        ids, _spans = encode_continuation(tokenizer, text)
        first = table[ids[0]] if ids else b""
        clean = bool(first) and text.encode().startswith(first)
        assert found.get(text.encode()) == (first if clean else None)


def test_test_tokenizers_are_what_they_say() -> None:
    lossy = set(vocabulary(byte_bpe_lossy()).token_bytes)
    assert {b for b in range(256) if bytes([b]) not in lossy} == set(LOSSY_BYTES)
    assert set(FLAWS) == {FLAWS[code] for code in (EXACT, BROKEN, SPECIAL, UNKNOWN, LOST, 5, 6)}
    assert "🤖" not in text_of_ids(
        char_bpe_lossy(), encode_continuation(char_bpe_lossy(), "a🤖")[0]
    )


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0.5], r"ids: expected a flat list of integers, got float64 of shape \(1,\)"),
        ([[1]], r"got int64 of shape \(1, 1\); give one row"),
        ([-1], r"ids: expected ids in 0\.\.500, got -1 to -1"),
        ([3, 501], r"got 3 to 501; is this the tokenizer of the model"),
    ],
)
def test_wrong_ids_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spans_of_ids(byte_bpe(), ids)
    with pytest.raises(ValueError, match=message):
        text_of_ids(byte_bpe(), ids)


def test_wrong_arguments_are_refused() -> None:
    no_text: Any = b"a"
    with pytest.raises(TypeError, match="text: expected str, got bytes; decode bytes as UTF-8"):
        encode_continuation(byte_bpe(), no_text)
    with pytest.raises(ValueError, match="lone surrogate at character 1; decode"):
        encode_continuation(byte_bpe(), "a\ud83d")
    with pytest.raises(ValueError, match=r"end_ids: expected ids in 0\.\.9, got 10"):
        vocabulary(byte_bpe(), end_ids=[10], size=10)
    with pytest.raises(ValueError, match="size: expected at least 1 id, got 0"):
        vocabulary(byte_bpe(), size=0)
    wrong: Any = "tokenizer.json"
    with pytest.raises(TypeError, match=r"got str; of a transformers tokenizer give \.backend"):
        spans_of_text(wrong, "a")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Replace(Regex("z+"), "b"), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        None,
    ],
)
def test_with_an_unsupported_decoder_texts_are_read_and_ids_refused(decoder: Any) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    assert pieces_of(tokenizer, "ab a") == [("ab", 0, 2, EXACT), ("a", 3, 4, EXACT)]
    with pytest.raises(ValueError, match=r"decoder: expected one made of .* \(a teacher\) but not"):
        spans_of_ids(tokenizer, [0])
    with pytest.raises(ValueError, match=r"decoder: expected one made of .* \(a teacher\) but not"):
        text_of_ids(tokenizer, [0])


def test_a_marked_end_of_word_is_read_by_its_offsets() -> None:
    """GPT-1's and CLIP's kind: `</w>` says that the word ends, and spaces have no token."""
    vocab = {"h": 0, "i": 1, "i</w>": 2, "hi</w>": 3, "h</w>": 4}
    model = models.BPE(vocab, [("h", "i</w>")], end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    assert pieces_of(tokenizer, "hi hh") == [
        ("hi</w>", 0, 2, EXACT), ("h", 3, 4, EXACT), ("h</w>", 4, 5, EXACT),
    ]  # fmt: skip
    assert vocabulary(tokenizer).token_bytes == (b"h", b"i", b"i", b"hi", b"h")
    rows = align(spans_of_text(byte_bpe(), "hi hh"), spans_of_text(tokenizer, "hi hh"))
    assert rows.flaw[rows.start == 3].tolist() == []  # the space has no token: " hh" is one chunk
    assert LOST in rows.flaw


def test_a_space_before_every_piece_is_refused() -> None:
    tokenizer = Tokenizer.from_str(unigram().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace()]
    )
    with pytest.raises(
        ValueError, match=r"expected Metaspace to come first, .* Whitespace \+ Metaspace"
    ):
        encode_continuation(tokenizer, "a")


def test_works_when_copied_alone(tmp_path: Path) -> None:
    shutil.copy(minigold.offsets.__file__, tmp_path)
    code = (
        "import sys, offsets; from tokenizers import Tokenizer, decoders, models; "
        "t = Tokenizer(models.BPE({'a': 0}, [])); t.decoder = decoders.Fuse(); "
        "print(offsets.spans_of_text(t, 'aa').tolist() == offsets.spans_of_ids(t, [0, 0]).tolist(), "
        "len(offsets.spans_of_ids(t, [0, 0])), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "2", "False"], done.stderr
