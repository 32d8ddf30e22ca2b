# SPDX-License-Identifier: Apache-2.0
"""Two lists of spans to chunks: against the slow reference, the invariants, the named cases."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import minigold.align
from minigold.align import Chunks, align
from reference import align_slow
from strategies import segmentations

LOST = 4


def rows(chunks: Chunks) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in chunks), strict=True))


@st.composite
def sides(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    size = draw(st.integers(0, 24))
    return draw(segmentations(size)), draw(segmentations(size))


@given(sides())
def test_equals_the_slow_reference(pair: tuple[list[tuple[int, int, int]], ...]) -> None:
    assert rows(align(*pair)) == align_slow(*pair)


@given(sides())
def test_tiles_and_mirrors(pair: tuple[list[tuple[int, int, int]], ...]) -> None:
    student, teacher = pair
    chunks, mirrored = align(student, teacher), align(teacher, student)
    assert rows(mirrored) == [(t0, t1, s0, s1, *rest) for s0, s1, t0, t1, *rest in rows(chunks)]
    if len(chunks.s0):
        assert (chunks.s0[0], chunks.t0[0], chunks.start[0]) == (0, 0, 0)
        assert (chunks.s1[-1], chunks.t1[-1]) == (len(student), len(teacher))
        for first, last in zip(chunks[0:6:2], chunks[1:6:2], strict=True):
            assert first[1:].tolist() == last[:-1].tolist()


@given(sides(), st.integers(0, 2**32 - 1))
def test_chunk_log_probabilities_sum_to_the_sequence(
    pair: tuple[list[tuple[int, int, int]], ...], seed: int
) -> None:
    student, _teacher = pair
    logp = -np.random.default_rng(seed).exponential(size=len(student))
    chunks = align(*pair)
    sums = [logp[s0:s1].sum() for s0, s1 in zip(chunks.s0, chunks.s1, strict=True)]
    if sums:
        assert np.isclose(sum(sums), logp.sum())


@given(sides())
def test_a_shared_boundary_splits_the_work(pair: tuple[list[tuple[int, int, int]], ...]) -> None:
    chunks = align(*pair)
    for k in range(1, len(chunks.s0)):
        before = align(pair[0][: chunks.s0[k]], pair[1][: chunks.t0[k]])
        assert rows(before) == rows(chunks)[:k]


@given(st.lists(st.integers(1, 4), max_size=20))
def test_one_tokenization_gives_one_chunk_per_token(lengths: list[int]) -> None:
    end = np.cumsum(lengths, dtype=np.int64)
    spans = np.stack((end - np.array(lengths, dtype=np.int64), end), axis=1)
    chunks = align(spans, spans)
    tokens = list(range(len(lengths)))
    assert chunks.s0.tolist() == chunks.t0.tolist() == tokens
    assert chunks.start.tolist() == spans[:, 0].tolist()
    assert not chunks.flaw.any()


CASES = {
    "no text": ([], [], []),
    "special only": ([(0, 0, 2)], [], [(0, 1, 0, 0, 0, 0, 2)]),
    "no text and no reason": ([(0, 0), (0, 0)], [], [(0, 2, 0, 0, 0, 0, LOST)]),
    "both without text": ([(0, 0, 2)], [(0, 0, 3)], [(0, 1, 0, 1, 0, 0, 2)]),
    "nothing encoded": ([(0, 1), (1, 3)], [], [(0, 2, 0, 0, 0, 3, LOST)]),
    "many to one": ([(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 3)], [(0, 2, 0, 1), (2, 3, 1, 2)]),
    "crossing": ([(0, 2), (2, 3)], [(0, 1), (1, 3)], [(0, 2, 0, 2, 0, 3, 0)]),
    "zero-width joins what follows": (
        [(0, 2, 0), (2, 2, 2), (2, 3, 0)],
        [(0, 2), (2, 3)],
        [(0, 1, 0, 1, 0, 2, 0), (1, 3, 1, 2, 2, 3, 2)],
    ),
    "zero-width first": ([(0, 0, 2), (0, 1, 0)], [(0, 1)], [(0, 2, 0, 1, 0, 1, 2)]),
    "zero-width last": (
        [(0, 1, 0), (1, 2, 0), (2, 2, 2)],
        [(0, 1), (1, 2)],
        [(0, 1, 0, 1, 0, 1, 0), (1, 3, 1, 2, 1, 2, 2)],
    ),
    "a gap is no boundary": (
        [(0, 1), (1, 2), (2, 3), (3, 4)],
        [(0, 1), (2, 3), (3, 4)],
        [(0, 3, 0, 2, 0, 3, LOST), (3, 4, 2, 3, 3, 4, 0)],
    ),
    "a token without text closes no gap": (
        [(0, 1), (1, 2), (2, 3)],
        [(0, 1, 0), (2, 2, 2), (2, 3, 0)],
        [(0, 3, 0, 3, 0, 3, 2)],
    ),
    "lost at the start": (
        [(0, 1), (1, 2), (2, 3)],
        [(1, 2), (2, 3)],
        [(0, 2, 0, 1, 0, 2, LOST), (2, 3, 1, 2, 2, 3, 0)],
    ),
    "lost at the end": (
        [(0, 1), (1, 2), (2, 3)],
        [(0, 1), (1, 2)],
        [(0, 1, 0, 1, 0, 1, 0), (1, 3, 1, 2, 1, 3, LOST)],
    ),
    "overlap is no boundary": (
        [(0, 3, 5), (0, 3, 5), (3, 4, 0)],
        [(0, 1), (1, 2), (2, 3), (3, 4)],
        [(0, 2, 0, 3, 0, 3, 5), (2, 3, 3, 4, 3, 4, 0)],
    ),
    "smallest flaw of both sides": ([(0, 2, 5)], [(0, 1, 3), (1, 2, 5)], [(0, 1, 0, 2, 0, 2, 3)]),
    "a token's flaw before a gap": ([(0, 3, 5)], [(0, 1), (2, 3)], [(0, 1, 0, 2, 0, 3, 5)]),
}


@pytest.mark.parametrize("case", CASES)
def test_named_case(case: str) -> None:
    student, teacher, expected = CASES[case]
    found = rows(align(student, teacher))
    assert [row[: len(want)] for row, want in zip(found, expected, strict=True)] == expected


def test_fields_are_int64_and_inputs_stay() -> None:
    spans = np.array([[0, 1, 0], [1, 3, 0]], dtype=np.int32)
    kept: NDArray[np.int32] = spans.copy()
    assert all(column.dtype == np.int64 for column in align(spans, spans))
    assert all(column.dtype == np.int64 for column in align([], []))
    assert (spans == kept).all()


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 1.5)], r"student spans: expected integers .* got float64 of shape \(1, 2\)"),
        ([(0, 1, 2, 3)], r"expected integers of shape \[n, 2\] or \[n, 3\].*\(1, 4\)"),
        (np.zeros((5, 0), dtype=np.int64), r"got int64 of shape \(5, 0\)"),
        ([0, 1], r"got int64 of shape \(2,\); make them with minigold.offsets"),
        ([(-1, 2)], r"got \[-1, 2, 0\] at token 0 after nothing"),
        ([(0, 2), (3, 2)], r"expected 0 <= start <= end.* got \[3, 2, 0\] at token 1"),
        ([(2, 3), (0, 2)], r"got \[0, 2, 0\] at token 1 after \[2, 3, 0\]; sort tokens"),
        ([(0, 2, -1)], r"flaw codes >= 0, got \[0, 2, -1\]"),
    ],
)
def test_malformed_spans_are_refused(spans: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align(spans, [(0, 2)])
    with pytest.raises(ValueError, match="teacher spans"):
        align([(0, 2)], spans)


def test_works_when_copied_alone(tmp_path: Path) -> None:
    shutil.copy(minigold.align.__file__, tmp_path)
    code = (
        "import sys, align; print(len(align.align([(0, 1)], [(0, 1)]).s0), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "False"], done.stderr
