# SPDX-License-Identifier: Apache-2.0
"""Two lists of byte spans of one text in, chunks out.

Where it stands: after `offsets.py`, before the log-probabilities and the losses. What enters: the
spans of the student's and of the teacher's tokens over the same text, `[n, 2]` (start, end) or
`[n, 3]` (start, end, flaw code of `offsets.py`), in bytes. What leaves: `Chunks`, the smallest
pairs of token ranges that begin and end at boundaries both sides share. What it does not do: look
at text, ids, tokenizers or probabilities; end-of-text tokens are no text and stay outside.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Chunks", "align"]

Int64 = NDArray[np.int64]

_NONE = np.iinfo(np.int64).max  # no flaw, or no text
_LOST = 4  # the code of offsets.LOST, written here so that this file works when copied alone


class Chunks(NamedTuple):
    """Chunks in the order of the text, one int64 array `[C]` a field.

    `s0, s1` and `t0, t1` are half-open ranges of student and teacher tokens; `start, end` the
    bytes of the text they stand for; `flaw` is 0 where the chunk is scorable, else the flaw code
    that makes it unscorable. Where one side has no token at all for a text, its range is empty.
    """

    s0: Int64
    s1: Int64
    t0: Int64
    t1: Int64
    start: Int64
    end: Int64
    flaw: Int64


def align(student_spans: ArrayLike, teacher_spans: ArrayLike) -> Chunks:
    """Cut two tokenizations of one text at every byte offset where both have a clean boundary.

    A token boundary at byte p is clean when all tokens before it end by p, all after it start at
    p or later, and no byte beside it is left without a token. Zero-width tokens belong to the
    chunk that follows them, those at the very end to the last chunk. 0 and the larger end of the
    two sides are always boundaries.

    Args:
        student_spans: integers `[S, 2]` (start, end) or `[S, 3]` (start, end, flaw), bytes,
            starts not decreasing.
        teacher_spans: the same for the teacher, `[T, 2]` or `[T, 3]`.

    Returns:
        `Chunks`; a chunk's flaw is the smallest non-zero flaw of its tokens, else 4 (lost bytes)
        where one side's tokens do not cover all of it or are none, else 0. No chunks where both
        sides are empty.

    Raises:
        ValueError: for spans that are not such a list.

    >>> chunks = align([(0, 2), (2, 5), (5, 6)], [(0, 1), (1, 2), (2, 6)])
    >>> list(zip(*(column.tolist() for column in chunks[:6])))
    [(0, 1, 0, 2, 0, 2), (1, 3, 2, 3, 2, 6)]
    """
    student, teacher = _checked(student_spans, "student"), _checked(teacher_spans, "teacher")
    end = max(int(side[:, 1].max(initial=0)) for side in (student, teacher))
    if len(student) == len(teacher) == 0:
        return Chunks(*np.zeros((7, 0), dtype=np.int64))
    student_at, student_index = _boundaries(student)
    teacher_at, teacher_index = _boundaries(teacher)
    place = np.searchsorted(teacher_at, student_at)
    place[place == len(teacher_at)] = 0
    in_student = np.flatnonzero(teacher_at[place] == student_at) if len(teacher_at) else place[:0]
    shared, in_teacher = student_at[in_student], place[in_student]
    bounds = np.concatenate(([0], shared, [end]))
    student_cut = np.concatenate(([0], student_index[in_student], [len(student)]))
    teacher_cut = np.concatenate(([0], teacher_index[in_teacher], [len(teacher)]))
    own = np.minimum(_flaws(student, student_cut), _flaws(teacher, teacher_cut))
    lost = _lost(student, student_cut, end) | _lost(teacher, teacher_cut, end)
    lost |= min(len(student), len(teacher)) == 0
    flaw = np.where(own < _NONE, own, _LOST * lost)
    ranges = (student_cut[:-1], student_cut[1:], teacher_cut[:-1], teacher_cut[1:])
    return Chunks(*ranges, bounds[:-1], bounds[1:], flaw)


def _checked(spans: ArrayLike, side: str) -> Int64:
    """The spans as int64 `[n, 3]`, or a ValueError that says what is wrong with them."""
    given = np.asarray(spans)
    if given.ndim > 0 and len(given) == 0:
        return np.zeros((0, 3), dtype=np.int64)
    if given.ndim != 2 or given.shape[1] not in (2, 3) or given.dtype.kind not in "iu":
        raise ValueError(
            f"{side} spans: expected integers of shape [n, 2] or [n, 3] (start, end, flaw code), "
            f"got {given.dtype} of shape {given.shape}; make them with minigold.offsets"
        )
    table = np.zeros((len(given), 3), dtype=np.int64)
    table[:, : given.shape[1]] = given
    bad = (table < 0).any(axis=1) | (table[:, 1] < table[:, 0])
    bad[1:] |= table[1:, 0] < table[:-1, 0]
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{side} spans: expected 0 <= start <= end, starts that do not decrease and flaw codes "
            f">= 0, got {table[row].tolist()} at token {row} after "
            f"{table[row - 1].tolist() if row else 'nothing'}; sort tokens by their place in the "
            "text and give byte offsets"
        )
    return table


def _boundaries(spans: Int64) -> tuple[Int64, Int64]:
    """Clean boundaries inside one side: byte offsets (ascending) and the token each goes before.

    Where zero-width tokens stand at a boundary, the cut goes before the first of them. They close
    and open nothing: the text before it ends there, and the text after it starts there.
    """
    reached, following = np.maximum.accumulate(spans[:, 1]), spans[1:, 0]
    text_start = np.where(spans[:, 0] < spans[:, 1], spans[:, 0], _NONE)
    text_follows = np.minimum.accumulate(text_start[::-1])[::-1][1:] == following
    clean = (reached[:-1] == following) & text_follows & (following > spans[:-1, 0])
    before = clean.nonzero()[0] + 1
    return spans[before, 0], before


def _flaws(spans: Int64, cut: Int64) -> Int64:
    """Smallest flaw `[C]` of the tokens `cut[c] : cut[c + 1]` of each chunk, `_NONE` without."""
    smallest = np.full(len(cut) - 1, _NONE)
    (flawed,) = spans[:, 2].nonzero()
    if len(flawed):
        np.minimum.at(smallest, np.searchsorted(cut[1:-1], flawed, side="right"), spans[flawed, 2])
    return smallest


def _lost(spans: Int64, cut: Int64, end: int) -> NDArray[np.bool_]:
    """Whether `[C]` the tokens of each chunk leave bytes before, between or after them out."""
    reached = np.zeros(len(spans) + 1, dtype=np.int64)
    np.maximum.accumulate(spans[:, 1], out=reached[1:])
    gap_before = np.append(spans[:, 0] > reached[:-1], reached[-1] < end)
    if not gap_before.any():
        return np.zeros(len(cut) - 1, dtype=np.bool_)
    gaps = np.concatenate(([0], np.cumsum(gap_before)))
    until = cut[1:].copy()
    until[-1] = len(spans) + 1  # bytes left over at the end belong to the last chunk
    return np.asarray(gaps[until] > gaps[cut[:-1]])
