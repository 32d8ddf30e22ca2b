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


def overhang_of(
    prob: Sequence[float], texts: Sequence[bytes], shared: Sequence[bool], taken: int
) -> float:
    """Mass of unshared tokens that strictly extend the taken one, relative to it."""
    longer = sum(
        p
        for p, text, one in zip(prob, texts, shared, strict=True)
        if not one and text.startswith(texts[taken]) and len(text) > len(texts[taken])
    )
    return longer / (longer + prob[taken])
