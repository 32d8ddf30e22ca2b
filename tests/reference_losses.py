# SPDX-License-Identifier: Apache-2.0
"""Slow, obvious versions of projection, divergence and loss: loops over dictionaries in float64."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p||q) of the last axis; 0 ln 0 is 0."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum(-1)


def gkd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """GKD (2306.13649, eq. 2) over whole vocabularies, divided by beta (1 - beta), in float64."""
    s, t = student_logits.double().softmax(-1), teacher_logits.double().softmax(-1)
    if beta == 0:
        return kl(t, s)
    if beta == 1:
        return kl(s, t)
    m = beta * t + (1 - beta) * s
    return (beta * kl(t, m) + (1 - beta) * kl(s, m)) / (beta * (1 - beta))


def divergence_of(student: Sequence[float], teacher: Sequence[float], beta: float) -> float:
    """The same on two lists of probabilities, in plain Python."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        m = beta * t + (1 - beta) * s
        if beta in (0, 1):
            pairs = [(t, s, 1.0)] if beta == 0 else [(s, t, 1.0)]
        else:
            pairs = [(t, m, 1 / (1 - beta)), (s, m, 1 / beta)]
        total += sum(w * p * math.log(p / q) for p, q, w in pairs if p > 0)
    return total


def project_of(prob: Sequence[float], event_of: Mapping[int, int], n_events: int) -> list[float]:
    """Events, an empty place for the observed chunk, and other."""
    out = [0.0] * (n_events + 2)
    for token, p in enumerate(prob):
        event = event_of[token]
        out[n_events + 1 if event == n_events else event] += p
    return out


class SlowSide:
    """One side's map to events, by trying everything."""

    def __init__(
        self, texts: Sequence[bytes], roles: Sequence[str], names: Sequence[bytes],
        pieces: Mapping[bytes, bytes],
    ) -> None:  # fmt: skip
        """`names`: the spellings of the text events; the end of turn comes after them."""
        self.texts = [t if role == "text" else b"" for t, role in zip(texts, roles, strict=True)]
        self.names, self.pieces, self.n_events = list(names), pieces, len(names) + 1
        self.events = [
            len(names) if role == "end" else self.event_of(t)
            for t, role in zip(self.texts, roles, strict=True)
        ]

    def event_of(self, text: bytes) -> int:
        """Itself, else the other side's first piece, else the longest prefix, else other.

        Texts are the same whatever the number of spaces (or line breaks) at their end, if there are any.
        """
        prefixes = [text[:k] for k in range(len(text), 0, -1)]
        candidates = [text, self.pieces.get(text, b""), *prefixes]
        for one in candidates:
            for event, name in enumerate(self.names):
                blanks = (x for x in (b" ", b"\n") if one.endswith(x) and name.endswith(x))
                if one == name or any(one.rstrip(x) == name.rstrip(x) for x in blanks):
                    return event
        return self.n_events

    def event_on(self, rest: bytes, more: bytes) -> int:
        """Of the events that `rest + more` begins with the longest, if `rest` ends in a space."""
        for k in () if not rest.endswith(b" ") else range(len(rest + more), len(rest), -1):
            if (found := self.event_of((rest + more)[:k])) != self.event_of((rest + more)[: k - 1]):
                return found
        return self.event_of(rest)

    def carry(self, prob: Sequence[float], over: bytes, event: int | None) -> dict[int, float]:
        """Mass of tokens that strictly extend `over`, by the event of what they add.

        With an `event` only tokens of this event count.
        """
        found: dict[int, float] = {}
        for text, own, p in zip(self.texts, self.events, prob, strict=True):
            if text.startswith(over) and len(text) > len(over) and event in (None, own):
                rest = self.event_of(text[len(over) :])
                found[rest] = found.get(rest, 0.0) + p
        return found


def law_of(
    prob: Sequence[float], side: SlowSide, carried: Mapping[int, float], stay: float
) -> list[float]:
    """Events, the empty place, other: `stay` of the prediction, and what is carried over."""
    plain = project_of(prob, dict(enumerate(side.events)), side.n_events)
    law = [stay * p for p in plain]
    for event, mass in carried.items():
        law[side.n_events + 1 if event == side.n_events else event] += mass
    return law


def loss_of(
    student: Sequence[float], teacher: Sequence[float], source: tuple[int, int] | None,
    moved: tuple[float, float], beta: float,
) -> float:  # fmt: skip
    """One chunk's loss from two laws; `moved` leaves the events `source` for the observed one."""
    laws = [list(student), list(teacher)]
    if source is not None:
        for law, event, mass in zip(laws, source, moved, strict=True):
            place = len(law) - 1 if event == len(law) - 2 else event
            most = min(mass, 0.999 * law[place])
            law[place] -= most
            law[-2] += most
    inside = [[max(p / sum(law[:-1]), 1e-18) for p in law[:-1]] for law in laws]
    return divergence_of(inside[0], inside[1], beta) - math.log(1 - laws[0][-1])
