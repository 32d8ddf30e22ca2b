# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers and a text in, how their tokens line up out: `minigold align` as plain data.

Where it stands: beside the loop, for eyes and for other programs. What enters: two `Lexicon`s and a
text, or the student's ids. What leaves: an `Alignment`, as JSON and as figures; `picture.py` draws
it for a terminal and `page.py` for a browser. What it does not do: read files, print.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from minigold.align import align
from minigold.data import parse_object
from minigold.offsets import (
    EXACT,
    FLAWS,
    Vocabulary,
    encode_continuation,
    spans_of_ids,
    text_of_ids,
    vocabulary,
)

if TYPE_CHECKING:
    from minigold.load import LanguageModel

__all__ = [
    "SIDES",
    "Alignment",
    "Chunk",
    "Lexicon",
    "Token",
    "aligned",
    "as_json",
    "asked",
    "figures",
    "kind",
    "lexicon",
    "shared_mass",
]

SIDES = "student", "teacher"


class Token(NamedTuple):
    """One token: its span in bytes of the text, its own bytes, its name in the vocabulary."""

    id: int
    start: int
    end: int
    flaw: int
    data: bytes
    name: str


class Chunk(NamedTuple):
    """A row of `align.Chunks`: ranges of student and teacher tokens, bytes, flaw code."""

    s0: int
    s1: int
    t0: int
    t1: int
    start: int
    end: int
    flaw: int


@dataclass(frozen=True)
class Alignment:
    """One text as two tokenizers cut it."""

    text: str
    student: tuple[Token, ...]
    teacher: tuple[Token, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Lexicon:
    """A tokenizer, what it is called, and its vocabulary as plain data."""

    name: str
    tokenizer: Tokenizer
    vocabulary: Vocabulary


def lexicon(name: str, tokenizer: Tokenizer) -> Lexicon:
    """Prepares a tokenizer once for any number of texts."""
    return Lexicon(name, tokenizer, vocabulary(tokenizer))


def aligned(student: Lexicon, teacher: Lexicon, given: str | Sequence[int]) -> Alignment:
    """Aligns a text, or the text that the student's ids say, as the continuation of other text.

    Raises:
        ValueError: a text with lone surrogates, ids that the student does not have, or ids of a
            tokenizer that can only read text.
    """
    if isinstance(given, str):
        text = given
        student_ids, student_spans = encode_continuation(student.tokenizer, text)
    else:
        text = text_of_ids(student.tokenizer, given)
        student_ids, student_spans = list(given), spans_of_ids(student.tokenizer, given)
    teacher_ids, teacher_spans = encode_continuation(teacher.tokenizer, text)
    found = align(student_spans, teacher_spans)
    chunks = [Chunk(*map(int, row)) for row in zip(*found, strict=True)]
    return Alignment(
        text,
        _tokens(student, text, student_ids, student_spans.tolist()),
        _tokens(teacher, text, teacher_ids, teacher_spans.tolist()),
        tuple(chunks),
    )


def _tokens(
    side: Lexicon, text: str, ids: Sequence[int], spans: Sequence[Sequence[int]]
) -> tuple[Token, ...]:
    """Tokens with the text's bytes where their spans are exact, else with their own."""
    data, own = text.encode("utf-8"), side.vocabulary.token_bytes
    return tuple(
        Token(i, start, end, flaw, data[start:end] if flaw == EXACT else own[i],
              side.tokenizer.id_to_token(i) or "")
        for i, (start, end, flaw) in zip(ids, spans, strict=True)
    )  # fmt: skip


def asked(raw: bytes) -> str | list[int]:
    """What a line of `--jsonl` gives to align: {"text": …} or {"student_ids": […]}.

    Raises:
        ValueError: it is anything else.

    >>> asked(b'{"text": "hi"}'), asked(b'{"student_ids": [5, 6]}')
    ('hi', [5, 6])
    """
    row = parse_object(raw, like='{"text": "…"}')
    if len(row) != 1 or not row.keys() <= {"text", "student_ids"}:
        raise ValueError(
            f'expected an object with one of "text" and "student_ids" alone, got the keys '
            f"{', '.join(map(repr, row)) or 'none'}; keep one"
        )
    ((key, value),) = row.items()
    if key == "text" and type(value) is str:
        return value
    if key == "student_ids" and type(value) is list and all(type(i) is int for i in value):
        return value
    expected = "text" if key == "text" else "a list of whole numbers"
    raise ValueError(f"expected {key} to be {expected}, got {_kind(value)}; correct it")


def _kind(value: Any) -> str:
    told = json.dumps(value)
    return told if len(told) <= 60 else told[:60] + "…"


def as_json(alignment: Alignment) -> dict[str, Any]:
    """The object of `minigold align --json`; offsets in bytes of the text's UTF-8."""
    return {
        "text": alignment.text,
        "student": [[token.start, token.end] for token in alignment.student],
        "teacher": [[token.start, token.end] for token in alignment.teacher],
        "chunks": [[*chunk[:6], chunk.flaw == EXACT] for chunk in alignment.chunks],
    }


def kind(chunk: Chunk) -> str:
    """`flawed`, `one` token each, or who has more than one: `teacher`, `student` or `both`."""
    if chunk.flaw != EXACT:
        return "flawed"
    many = chunk.s1 - chunk.s0 > 1, chunk.t1 - chunk.t0 > 1
    return {(False, False): "one", (False, True): "teacher", (True, False): "student"}.get(
        many, "both"
    )


def figures(
    alignment: Alignment,
    student: Lexicon,
    teacher: Lexicon,
    *,
    mass: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:
    """What the picture shows, in numbers; shares are 0 to 1, None where there is nothing.

    `shared_ids` are the text ids whose bytes are a text token of the other vocabulary too.

    Args:
        mass: what each model gives to tokens that both have, if it was measured.
    """
    chunks, n_bytes = alignment.chunks, len(alignment.text.encode("utf-8"))
    one = sum(c.s1 - c.s0 == 1 == c.t1 - c.t0 for c in chunks)
    longest = max(chunks, key=lambda c: (c.end - c.start, c.s1 - c.s0 + c.t1 - c.t0), default=None)
    flaws = Counter(FLAWS[c.flaw] for c in chunks if c.flaw != EXACT)
    told: dict[str, Any] = {"bytes": n_bytes}
    for label, tokens, mine, other, shared_mass in (
        ("student", alignment.student, student, teacher, mass[0]),
        ("teacher", alignment.teacher, teacher, student, mass[1]),
    ):
        known = set(_texts(other.vocabulary))
        texts = _texts(mine.vocabulary)
        shared = sum(text in known for text in texts)
        told[label] = {
            "name": mine.name,
            "tokens": len(tokens),
            "bytes_per_token": n_bytes / len(tokens) if tokens else None,
            "ids": len(mine.vocabulary.roles),
            "text_ids": len(texts),
            "shared_ids": shared,
            "shared_id_share": shared / len(texts) if texts else None,
            "shared_mass": shared_mass,
        }
    return {
        **told,
        "chunks": len(chunks),
        "one_to_one": one,
        "one_to_one_share": one / len(chunks) if chunks else None,
        "longest_chunk": longest and {
            "bytes": longest.end - longest.start,
            "student_tokens": longest.s1 - longest.s0,
            "teacher_tokens": longest.t1 - longest.t0,
        },
        "unscorable": dict(flaws),
    }  # fmt: skip


def _texts(words: Vocabulary) -> list[bytes]:
    return [text for text in words.token_bytes if text]


def shared_mass(
    student: LanguageModel, teacher: LanguageModel, alignment: Alignment
) -> tuple[float | None, float | None]:
    """What each model gives to tokens that both have: 0 to 1, mean over its tokens of this text.

    The text follows the tokenizer's own leading tokens (BOS). Without one, nothing predicts the
    first token of the text, and it is left out; None where nothing remains.

    Raises:
        ValueError: no token in common, or a text that a model has no room or no rows for.
    """
    from minigold.carry import Reading
    from minigold.events import Measures
    from minigold.pair import make_pair
    from minigold.teacher import score

    events = make_pair(student, teacher).events
    found: list[float | None] = []
    for model, tokens, side in (
        (student, alignment.student, events.student),
        (teacher, alignment.teacher, events.teacher),
    ):
        ids = [*_leading(model.tokenizer), *(token.id for token in tokens)]
        if len(ids) > model.context or max(ids, default=0) >= model.n_tokens:
            raise ValueError(
                f"expected at most {model.context} tokens with ids below {model.n_tokens} for "
                f"{model.name}, got {len(ids)} up to {max(ids)}; shorten the text"
            )
        n_prompt = max(1, len(ids) - len(tokens))
        reading = Reading(ids[:n_prompt], ids[n_prompt:])
        if not reading.ids:
            found.append(None)
            continue
        (one,) = score(model.decoder, [reading], end_ids=[model.end_id], side=side)
        found.append(float(Measures(*one.measures_T5.unbind(1)).shared_N.mean()))
    return found[0], found[1]


def _leading(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    probe = tokenizer.encode("a")
    special = [*probe.special_tokens_mask, 0]
    return list(probe.ids[: special.index(0)])
