# SPDX-License-Identifier: Apache-2.0
"""Two vocabularies in, the events that both can express out.

At a boundary that both tokenizations share, both models predict what comes next after the same
bytes, over different vocabularies. A divergence needs one set of events: each side maps every
token to one event and adds up the probabilities.

Here stand the maps (`match`), their use on a distribution (`project`), and what they leave out
(`measure`). This file does not compare the two sides; `loss.py` does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Events", "Measures", "Side", "Vocabulary", "match", "measure", "project"]


class Vocabulary(Protocol):
    """Plain data, as `offsets.vocabulary` makes it; the index is the token id."""

    @property
    def token_bytes(self) -> Sequence[bytes]: ...
    @property
    def roles(self) -> Sequence[str]: ...
    @property
    def first_pieces(self) -> Mapping[bytes, bytes]: ...


@dataclass(frozen=True)
class Side:
    """One side's map from token ids to events.

    Args:
        event_V: int64, the event of each id; `n_events` stands for *other*, that is no event.
        shared_V: bool, ids that stand for their event by themselves (the end of turn included).
        extender_U: int64, ids of the unshared text tokens, sorted by their bytes.
        low_V, high_V: int64, the range in `extender_U` that strictly extends the bytes of an id.
    """

    event_V: Tensor
    shared_V: Tensor
    extender_U: Tensor
    low_V: Tensor
    high_V: Tensor

    def to(self, device: torch.device) -> Side:
        moved = {name: value.to(device) for name, value in vars(self).items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class Events:
    """The common events: `event_bytes[e]` is the spelling of event e (b"" for the end of turn)."""

    event_bytes: tuple[bytes, ...]
    student: Side
    teacher: Side
    identical: bool

    @property
    def n_events(self) -> int:
        return len(self.event_bytes)

    def to(self, device: torch.device) -> Events:
        return replace(self, student=self.student.to(device), teacher=self.teacher.to(device))


class Measures(NamedTuple):
    """What the events leave out, one number per position; each in 0 to 1.

    `overhang_N`: see `measure`. `shared_N`, `projected_N`, `other_N`: probability mass in tokens
    that are events by themselves, in tokens that were sent to another event, and in no event.
    """

    overhang_N: Tensor
    shared_N: Tensor
    projected_N: Tensor
    other_N: Tensor


def match(student: Vocabulary, teacher: Vocabulary) -> Events:
    """The `prefix` events of two vocabularies.

    Events are the byte strings that are a text token in both, and the end of turn. Ids with the
    same bytes add up. A token that only one side has goes to the first piece that the other
    tokenizer gives for its bytes (`first_pieces` of the *other* vocabulary) if that is an event,
    else to its longest prefix that is one, else to *other*. With the same table of bytes on both
    sides the events are the ids themselves, so that the loss is exactly GKD's.

    Raises:
        ValueError: a side has no end-of-turn id, or the vocabularies share no text token.

    Source: longest-prefix projection is BPM's (2607.22334). Differs: both sides are projected,
    first pieces come before longest prefixes, and ids with equal bytes are summed.
    """
    for name, side in (("student", student), ("teacher", teacher)):
        if "end" not in side.roles:
            raise ValueError(
                f"expected an end-of-turn id in the {name}'s vocabulary, got none; "
                "pass `end_ids` to offsets.vocabulary"
            )
    if _same_table(student, teacher):
        spelled = tuple(student.token_bytes)
        one = _side(student, {}, len(spelled), {}, identity=True)
        return Events(spelled, one, one, identical=True)
    shared = sorted(_texts(student) & _texts(teacher))
    if not shared:
        raise ValueError(
            "expected vocabularies that share text tokens, got none in common; "
            "check that both tokenizers were read with the right decoder"
        )
    index = {text: event for event, text in enumerate(shared)}
    n = len(shared) + 1
    return Events(
        event_bytes=(*shared, b""),
        student=_side(student, index, n, teacher.first_pieces),
        teacher=_side(teacher, index, n, student.first_pieces),
        identical=False,
    )


def project(prob_NV: Tensor, side: Side, n_events: int) -> Tensor:
    """Adds up token probabilities by event.

    Args:
        prob_NV: float, rows that sum to 1; differentiable.

    Returns:
        prob_NX: `n_events + 2` columns: the events, an empty column for the observed chunk, and
        *other*; rows sum to 1.
    """
    n, v = prob_NV.shape
    if v == n_events:  # identical vocabularies: the ids are the events
        return torch.nn.functional.pad(prob_NV, (0, 2))
    column_V = torch.where(side.event_V == n_events, n_events + 1, side.event_V)
    empty_NX = prob_NV.new_zeros(n, n_events + 2)
    return empty_NX.scatter_add(1, column_V.expand(n, v), prob_NV)


def measure(logp_NV: Tensor, ids_N: Tensor, side: Side, n_events: int) -> Measures:
    """Mass audit of predictions, and the overhang of the boundary after each taken token.

    A boundary after token c says that no longer token was taken there. If much mass was on
    unshared tokens that strictly extend c, the prediction after c leaves out what those would
    have covered, and the other model's prediction there is about something else.
    `overhang = m / (m + p(c))` with m that mass. One range sum over the sorted vocabulary.

    Args:
        logp_NV: log-probabilities in nats.
        ids_N: int64, the token taken at each position.
    """
    prob_NV = logp_NV.exp()
    size_N = side.high_V[ids_N] - side.low_V[ids_N]
    row_K = torch.repeat_interleave(torch.arange(len(ids_N), device=ids_N.device), size_N)
    first_N = size_N.cumsum(0) - size_N
    place_K = torch.arange(len(row_K), device=ids_N.device) - first_N[row_K]
    column_K = side.extender_U[side.low_V[ids_N][row_K] + place_K]
    longer_N = prob_NV.new_zeros(len(ids_N)).index_add(0, row_K, prob_NV[row_K, column_K])
    taken_N = prob_NV.gather(1, ids_N[:, None])[:, 0]
    other_V = side.event_V == n_events
    kinds_V2 = torch.stack([side.shared_V, other_V], dim=1).to(prob_NV.dtype)
    shared_N, other_N = (prob_NV @ kinds_V2).unbind(1)
    projected_N = (1 - shared_N - other_N).clamp(min=0)
    overhang_N = longer_N / (longer_N + taken_N).clamp(min=torch.finfo(prob_NV.dtype).tiny)
    return Measures(overhang_N, shared_N, projected_N, other_N)


def _same_table(student: Vocabulary, teacher: Vocabulary) -> bool:
    return tuple(student.token_bytes) == tuple(teacher.token_bytes) and all(
        a == b or {a, b} == {"end", "special"}
        for a, b in zip(student.roles, teacher.roles, strict=True)
    )


def _texts(vocabulary: Vocabulary) -> set[bytes]:
    pairs = zip(vocabulary.token_bytes, vocabulary.roles, strict=True)
    return {text for text, role in pairs if role == "text" and text}


def _side(
    vocabulary: Vocabulary,
    index: Mapping[bytes, int],
    n_events: int,
    pieces: Mapping[bytes, bytes],
    *,
    identity: bool = False,
) -> Side:
    texts, roles = vocabulary.token_bytes, vocabulary.roles
    event, unshared = list(range(len(texts))), []
    if not identity:
        for i, (text, role) in enumerate(zip(texts, roles, strict=True)):
            event[i] = _event(text, role, index, n_events, pieces)
            if role == "text" and text and text not in index:
                unshared.append((text, i))
    unshared.sort()
    keys = [text for text, _ in unshared]
    ranges = [_extensions(text, keys) if role == "text" else (0, 0)
              for text, role in zip(texts, roles, strict=True)]  # fmt: skip
    shared = [identity or role == "end" or (role == "text" and text in index)
              for text, role in zip(texts, roles, strict=True)]  # fmt: skip
    low_high_V2 = torch.tensor(ranges, dtype=torch.int64)
    return Side(
        event_V=torch.tensor(event, dtype=torch.int64),
        shared_V=torch.tensor(shared),
        extender_U=torch.tensor([i for _, i in unshared], dtype=torch.int64),
        low_V=low_high_V2[:, 0].contiguous(),
        high_V=low_high_V2[:, 1].contiguous(),
    )


def _event(
    text: bytes, role: str, index: Mapping[bytes, int], n_events: int, pieces: Mapping[bytes, bytes]
) -> int:
    if role == "end":
        return n_events - 1
    if role != "text":
        return n_events
    if text in index:
        return index[text]
    if pieces.get(text) in index:
        return index[pieces[text]]
    prefixes = (text[:k] for k in range(len(text) - 1, 0, -1))
    return next((index[prefix] for prefix in prefixes if prefix in index), n_events)


def _extensions(text: bytes, keys: list[bytes]) -> tuple[int, int]:
    """The range of the sorted `keys` that start with `text` and are longer."""
    low = bisect_right(keys, text)
    stem = text.rstrip(b"\xff")
    if not stem:
        return (low, len(keys)) if text else (0, 0)
    return low, bisect_left(keys, stem[:-1] + bytes([stem[-1] + 1]), lo=low)
