# SPDX-License-Identifier: Apache-2.0
"""The obvious, slow versions that the fast code of the package is tested against.

Plain loops, written to be checked by reading. Sections follow the order of the data flow.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

__all__ = ["align_slow", "replace_slow", "sample_slowly"]

# -- alignment -----------------------------------------------------------------------------------

Span = Sequence[int]
Chunk = tuple[int, int, int, int, int, int, int]

LOST = 4


def _clean(spans: Sequence[Span]) -> dict[int, int]:
    """Clean boundaries inside one side: byte -> the smallest number of tokens before it.

    The bytes beside it belong to tokens: one without text, beside a gap, closes or opens nothing.
    """
    found: dict[int, int] = {}
    for n in range(1, len(spans)):
        at = max(span[1] for span in spans[:n])
        ends_there = any(start < end == at for start, end, *_flaw in spans[:n])
        starts_there = any(at == start < end for start, end, *_flaw in spans[n:])
        if ends_there and starts_there and at == min(span[0] for span in spans[n:]):
            found.setdefault(at, n)
    return found


def _covers(spans: Sequence[Span], start: int, end: int) -> bool:
    return {byte for span in spans for byte in range(span[0], span[1])} == set(range(start, end))


def align_slow(student: Sequence[Span], teacher: Sequence[Span]) -> list[Chunk]:
    """Chunks (s0, s1, t0, t1, start, end, flaw) by trying every byte of the text as a boundary."""
    end = max([span[1] for span in [*student, *teacher]], default=0)
    if not (student or teacher):
        return []
    cuts = [(0, 0, 0)]
    clean_student, clean_teacher = _clean(student), _clean(teacher)
    cuts.extend(
        (at, clean_student[at], clean_teacher[at])
        for at in range(1, end)
        if at in clean_student and at in clean_teacher
    )
    cuts.append((end, len(student), len(teacher)))
    chunks = []
    for (start, s0, t0), (stop, s1, t1) in pairwise(cuts):
        mine, theirs = student[s0:s1], teacher[t0:t1]
        flaws = [span[2] for span in [*mine, *theirs] if span[2]]
        covered = _covers(mine, start, stop) and _covers(theirs, start, stop)
        if not flaws and not (covered and mine and theirs):
            flaws = [LOST]
        chunks.append((s0, s1, t0, t1, start, stop, min(flaws, default=0)))
    return chunks


# -- replaced bytes ------------------------------------------------------------------------------


def replace_slow(pieces: Sequence[bytes]) -> list[tuple[int, int, bool]]:
    """Start, end, broken of each token in the text that `decode(errors="replace")` gives.

    One byte at a time: the text of each prefix tells how far the decoder has come, since a byte
    that begins a new character or replacement makes the decoded text of the whole rest separable.
    """
    data = b"".join(pieces)
    units: list[tuple[int, int, bool]] = []  # raw start, raw end, replaced
    at = 0
    while at < len(data):
        for size in (1, 2, 3, 4):
            try:
                data[at : at + size].decode("utf-8")
            except UnicodeDecodeError:
                continue
            units.append((at, at + size, False))
            break
        else:
            whole = data[at:].decode("utf-8", errors="replace")
            size = next(
                n
                for n in (1, 2, 3)
                if "\ufffd" + data[at + n :].decode("utf-8", "replace") == whole
            )
            units.append((at, at + size, True))
        at = units[-1][1]
    owner = [index for index, unit in enumerate(units) for _ in range(unit[0], unit[1])]
    text_start, total = [], 0
    for start, end, bad in units:
        text_start.append(total)
        total += 3 if bad else end - start

    def place(byte: int, edge: int) -> int:
        start, _end, bad = units[owner[byte]]
        return text_start[owner[byte]] + (3 * edge if bad else byte - start + edge)

    spans, done = [], 0
    for piece in pieces:
        if piece:
            last = done + len(piece) - 1
            bad = any(units[owner[byte]][2] for byte in range(done, last + 1))
            spans.append((place(done, 0), place(last, 1), bad))
        else:
            inside = 0 < done < len(data) and owner[done] == owner[done - 1]
            at = place(done - 1, 1) if done else 0
            if inside and units[owner[done]][2]:
                at = text_start[owner[done]]
            spans.append((at, at, False))
        done += len(piece)
    return spans


# -- sampling -------------------------------------------------------------------------------------


@torch.no_grad()
def sample_slowly(model: Any, prompt: list[int], uniform: list[float], n: int) -> list[int]:
    """One row, no cache, no batch: the whole text again for each token."""
    ids = list(prompt)
    for u in uniform[:n]:
        logits_V = model.head.logits(model(torch.tensor([ids]))[0, -1])
        total, target = 0.0, u
        prob = logits_V.double().softmax(-1).tolist()
        for token, p in enumerate(prob):
            total += p
            if total > target:
                ids.append(token)
                break
    return ids[len(prompt) :]
