# SPDX-License-Identifier: Apache-2.0
"""Predictions of both models at the chosen chunks in, one loss per chunk out.

`divergence` compares two distributions over one set of events. `chunk_losses` makes those
distributions from logits. `gold_loss` does the same in blocks, from hidden states (so that the
logits of a whole batch are never held) or from logits. `look` gives values alone, for masks that
need them. All are pure functions: no tokenizer, no configuration.

A temperature is a property of a model's head, or of logits that were divided by it: all here that
comes from a model (the teacher's `teacher_logp_C` and `teacher_carry` too) is of that temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "BEFORE",
    "FIRST",
    "FLOOR",
    "INSIDE",
    "REST",
    "Carry",
    "ChunkRows",
    "Rows",
    "chunk_losses",
    "divergence",
    "gold_loss",
    "look",
]

FLOOR = 1e-18  # is added to every probability, so that all logarithms and quotients are finite
END = 1e-30  # a beta below counts as 0: far below FLOOR, so that nothing jumps there
RARE = 1e-8  # what was less likely than this is not conditioned on: bounds the gradient
BLOCK = 32  # chunks at a time
MOST = 1 - 1e-3  # of an event that its observed chunk takes at most: what is left is no rounding


class Head(Protocol):
    """The output layer: `logits(hidden_ND)` is `cap` of the product, in float32 [N, V]."""

    @property
    def weight_VD(self) -> Tensor: ...
    @property
    def bias_V(self) -> Tensor | None: ...
    def logits(self, hidden_ND: Tensor) -> Tensor: ...
    def cap(self, raw_NV: Tensor) -> Tensor: ...


class Side(Protocol):
    """One side's map to events, as `events.match` makes it."""

    @property
    def event_V(self) -> Tensor: ...
    def project(self, prob_NV: Tensor, floor: float = 0.0) -> Tensor: ...
    def spread(self, grad_NX: Tensor) -> Tensor: ...
    def over(
        self, paths: Sequence[Sequence[tuple[int, bool]]]
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def column(self, event_K: Tensor) -> Tensor: ...


class Listed(Protocol):
    """What a teacher says that names its likeliest tokens alone, as `teacher.Listed` has it."""

    @property
    def column_MK(self) -> Tensor: ...
    @property
    def prob_MK(self) -> Tensor: ...
    @property
    def tail_M(self) -> Tensor: ...


class Events(Protocol):
    """As `events.match` makes them."""

    @property
    def student(self) -> Any: ...
    @property
    def teacher(self) -> Any: ...
    @property
    def other_costs(self) -> bool: ...


FIRST, REST, BEFORE, INSIDE = range(4)  # kinds of rows


@dataclass(frozen=True)
class Rows:
    """The student's predictions, row by row, in the order of their chunks.

    Args:
        place_N: int64, where the prediction stands among the student's states (or logits).
        chunk_N: int64, the chunk of each row, non-decreasing.
        ids_N: int64, the token that was taken at each row.
        kind_N: int64. `FIRST`, one a chunk: predicts what starts at the chunk. `REST`, of
            observed chunks: predict the rest of the chunk's tokens. `BEFORE`: predict the last tokens
            before the chunk, as many as one longer token can stand for, and are `INSIDE` instead where
            the token does not start at a shared boundary. Those of a kind are in the order of the text.
    """

    place_N: Tensor
    chunk_N: Tensor
    ids_N: Tensor
    kind_N: Tensor

    def part(self, rows: slice, first_chunk: int) -> Rows:
        """Some rows, their chunks counted from `first_chunk`, all `FIRST` rows first."""
        order_N = (self.kind_N[rows] != FIRST).to(torch.uint8).argsort(stable=True)
        columns = self.place_N, self.chunk_N, self.ids_N, self.kind_N
        place_N, chunk_N, ids_N, kind_N = (x[rows][order_N] for x in columns)
        return Rows(place_N, chunk_N - first_chunk, ids_N, kind_N)


@dataclass(frozen=True)
class Carry:
    """What longer tokens of the teacher, over a chunk's start, say of the text that follows.

    Args:
        chunk_K: int64, non-decreasing; chunks without such tokens are absent.
        event_K: int64.
        mass_K: share of what the teacher knows there; the rest is its prediction after the token.
    """

    chunk_K: Tensor
    event_K: Tensor
    mass_K: Tensor


@dataclass(frozen=True)
class ChunkRows:
    """Which predictions belong to which of C chunks. The teacher has one row a chunk.

    A boundary inside a chunk that is compared as well counts as another chunk, of one student row
    and none of the teacher's.

    Args:
        student: N rows.
        teacher_place_C: int64, where its prediction stands among the teacher's states (or logits);
            -1 where it has none, and all that it says is carried (not with `Listed`).
        teacher_id_C: int64, the first teacher token of each chunk.
        teacher_logp_C: nats, the teacher's log-probability that the text goes on with the chunk.
        teacher_carry: what is mixed into the teacher's predictions.
        observed_C: bool, the chunk is made an event of its own.
        weight_C: what each chunk's loss counts in a sum; 1 where there is none.
    """

    student: Rows
    teacher_place_C: Tensor
    teacher_id_C: Tensor
    teacher_logp_C: Tensor
    teacher_carry: Carry
    observed_C: Tensor
    weight_C: Tensor | None = None

    def blocks(self, size: int) -> list[ChunkRows]:
        """`size` chunks at a time, with the student rows that they own, all `FIRST` rows first."""
        n_chunks, own, carry = len(self.observed_C), self.student, self.teacher_carry
        if not n_chunks:
            raise ValueError("expected at least one chunk, got none; leave the step out")
        edges = [*range(0, n_chunks, size), n_chunks]
        edge_E = torch.tensor(edges, device=own.chunk_N.device)
        bounds = [torch.searchsorted(x, edge_E).tolist() for x in (own.chunk_N, carry.chunk_K)]
        found = []
        for i, start in enumerate(edges[:-1]):
            chunks = slice(start, edges[i + 1])
            rows, some = (slice(bound[i], bound[i + 1]) for bound in bounds)
            found.append(ChunkRows(
                own.part(rows, start),
                self.teacher_place_C[chunks],
                self.teacher_id_C[chunks],
                self.teacher_logp_C[chunks],
                Carry(carry.chunk_K[some] - start, carry.event_K[some], carry.mass_K[some]),
                self.observed_C[chunks],
                None if self.weight_C is None else self.weight_C[chunks],
            ))  # fmt: skip
        return found


class Losses(NamedTuple):
    """`total` = sum of `weight * weight_C * loss_C`, differentiable; `loss_C` in nats, detached."""

    total: Tensor
    loss_C: Tensor


def divergence(student_prob_NX: Tensor, teacher_prob_NX: Tensor, *, beta: float) -> Tensor:
    r"""Generalized JSD divided by beta (1 - beta), in nats, one value per row.

    With M = beta T + (1 - beta) S the generalized JSD is beta KL(T||M) + (1 - beta) KL(S||M).
    Divided by beta (1 - beta) it is continuous in beta: beta -> 0 is KL(teacher||student),
    beta -> 1 is KL(student||teacher), and 0.5 is four times the usual JSD.

    Args:
        student_prob_NX, teacher_prob_NX: >= 0; at least in float32 `FLOOR` is added, then rows are
            scaled to sum to 1 (those of less than `RARE` to less). Differentiable, once.
        beta: 0 to 1.

    Raises:
        ValueError: beta outside 0 to 1, or other shapes.

    Source: GKD (2306.13649), eq. 2. Differs: divided by beta (1 - beta).

    >>> s, t = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> divergence(s, t, beta=1.0)  # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)
    tensor([0.1438])
    """
    s_NX, t_NX = _wide(student_prob_NX) + FLOOR, _wide(teacher_prob_NX) + FLOOR
    if s_NX.ndim != 2 or s_NX.shape != t_NX.shape:
        raise ValueError(f"expected tables [N, X], got {s_NX.shape}, {t_NX.shape}; reshape them")
    return _Divergence.apply(s_NX, t_NX, s_NX.shape[1], beta)[0]


class _Divergence(torch.autograd.Function):
    """Of the first `n` columns of positive rows, scaled to sum to 1; the student's two sums.

    With s and t the scaled rows and m = beta t + (1 - beta) s, the divergence is the sum over
    columns of s a + t b, where a = -ln(m/s) / beta and b = -ln(m/t) / (1 - beta); at the ends one
    of the two is its limit, a = 1 - t/s at beta 0, b = 1 - s/t at beta 1. The derivatives by s and
    t are a and b. In as few passes over [N, X] as there can be.
    """

    @staticmethod
    def forward(
        ctx: Any, student_NX: Tensor, teacher_NX: Tensor, n: int, beta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= beta <= 1:
            raise ValueError(f"expected beta between 0 (forward KL) and 1 (reverse KL), got {beta}")
        s_NK, t_NK = student_NX[:, :n], teacher_NX[:, :n]
        s_raw_N1, t_raw_N1 = s_NK.sum(-1, keepdim=True), t_NK.sum(-1, keepdim=True)
        s_sum_N1, t_sum_N1 = s_raw_N1.clamp(min=RARE), t_raw_N1.clamp(min=RARE)
        a_NK = _slope(t_NK / s_NK, s_sum_N1 / t_sum_N1, beta, 1 - beta)
        b_NK = _slope(s_NK / t_NK, t_sum_N1 / s_sum_N1, 1 - beta, beta)
        a_mean_N1 = (s_NK * a_NK).sum(-1, keepdim=True) / s_sum_N1
        b_mean_N1 = (t_NK * b_NK).sum(-1, keepdim=True) / t_sum_N1
        needs_s, needs_t, _, _ = ctx.needs_input_grad
        ctx.n_columns = student_NX.shape[1]
        ctx.save_for_backward(
            *((a_NK, a_mean_N1, s_raw_N1) if needs_s else ()),
            *((b_NK, b_mean_N1, t_raw_N1) if needs_t else ()),
        )
        return (a_mean_N1 + b_mean_N1)[:, 0], s_raw_N1[:, 0], student_NX[:, n:].sum(-1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_N: Tensor, grad_inside_N: Tensor, grad_other_N: Tensor
    ) -> tuple[Any, ...]:
        kept, (needs_s, needs_t, _, _) = ctx.saved_tensors, ctx.needs_input_grad
        by_s, by_t = grad_N, grad_N  # only where asked for
        if needs_s:
            by_s = _unscaled(kept[0], kept[1], kept[2], ctx.n_columns, grad_N, grad_inside_N)
            by_s[:, kept[0].shape[1] :] = grad_other_N[:, None]
        if needs_t:
            by_t = _unscaled(kept[-3], kept[-2], kept[-1], ctx.n_columns, grad_N, 0 * grad_N)
        return by_s if needs_s else None, by_t if needs_t else None, None, None


def _slope(ratio_NX: Tensor, scale_N1: Tensor, share: float, rest: float) -> Tensor:
    """-ln(rest + share x) / share for x = scale ratio, its limit 1 - x for share 0.

    `rest` is 1 - share, with all its digits. `ratio_NX` is used up.
    """
    if share < END:
        return 1 - ratio_NX.mul_(scale_N1)
    scaled_NX = ratio_NX.mul_(share * scale_N1)
    if share <= 0.5:  # then 1 + change is no smaller than that, and keeps the digits of change
        return scaled_NX.sub_(share).log1p_().div_(-share)
    change_NX = scaled_NX - share
    log_NX = torch.where(change_NX > -0.5, change_NX.log1p(), scaled_NX.add_(rest).log_())
    return log_NX.div_(-share)


def _unscaled(
    slope_NK: Tensor, mean_N1: Tensor, sum_N1: Tensor, n_columns: int, grad_N: Tensor,
    grad_sum_N: Tensor,
) -> Tensor:  # fmt: skip
    """The derivative by rows as they were before the scaling; 0 in the columns left out."""
    scaled_N1 = grad_N[:, None] / sum_N1.clamp(min=RARE)
    by_sum_N1 = torch.where(sum_N1 > RARE, -mean_N1 * scaled_N1, 0.0) + grad_sum_N[:, None]
    n_rows, n = slope_NK.shape
    grad_NX = slope_NK.new_empty(n_rows, n_columns)
    torch.addcmul(by_sum_N1, slope_NK, scaled_N1, out=grad_NX[:, :n])
    grad_NX[:, n:] = 0
    return grad_NX


def chunk_losses(
    student_logits_SV: Tensor,
    teacher_logits_TW: Tensor | Listed | None,
    *,
    rows: ChunkRows,
    events: Events,
    beta: float,
) -> Tensor:
    """Loss of each chunk in nats: divergence over the events, plus -ln(1 - P_S(other)).

    The divergence is of both distributions conditioned on having an event. Where `observed_C`,
    the chunk's own probability leaves the event of its first token and becomes one more event:
    nothing can then be hidden behind a shared prefix. Where longer tokens reach over a chunk's
    start, what they say of the rest of the text is mixed in: nothing can be hidden behind a
    boundary that one side would not have made.

    A teacher that says less is compared on less. Of one that lists its likeliest tokens, the events
    of these, and *tail*: all that the teacher did not list, beside all events of the student's
    that it did not list. Nothing is scaled up to fill the tail. Of one that says the probability of
    the chunk alone (`--events chunk`), that chunk and all else.

    Args:
        student_logits_SV: differentiable; `rows` says which predictions are read.
        teacher_logits_TW: no gradient flows into them. In their place `Listed`; or None, where
            `rows.teacher_logp_C` is all that is known (then all chunks are observed).

    Raises:
        ValueError: no chunk, or beta outside 0 to 1.
    """
    (one,) = rows.blocks(len(rows.observed_C))
    student_NV = _wide(student_logits_SV[one.student.place_N])
    return _compare(*_laws(student_NV, teacher_logits_TW, None, one, events), events, beta)


def _compare(student_CX: Tensor, teacher_CX: Tensor, events: Events, beta: float) -> Tensor:
    """Loss of two laws; the columns are those of `Side.project`, the observed chunk filled in."""
    n = student_CX.shape[1] - 1
    loss_C, inside_C, other_C = _Divergence.apply(student_CX, teacher_CX, n, beta)
    if not events.other_costs:
        return loss_C
    small_C = -torch.log1p(-other_C.clamp(max=0.5))  # -ln(1 - other), exact near 0
    return loss_C + torch.where(other_C < 0.5, small_C, -inside_C.log())  # and near 1


def _laws(
    student_NV: Tensor, teacher_TK: Tensor | Listed | None, head: Head | None, rows: ChunkRows,
    events: Events,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How the text goes on at each chunk, by both models: [C, X + 2], *other* last.

    From the student's logits at `rows`, and the teacher's states and head, or what it says. With
    a tail there is one column more, before *other*; of chunks alone there are two in all.
    """
    if teacher_TK is None:  # the sum of several ends can be rounded above 0
        known_C = rows.teacher_logp_C.to(student_NV).clamp(max=0)
        return _chunk_law(student_NV, rows), _one_or_else(known_C)
    student_CX = _student_law(student_NV, rows, events.student)
    with torch.no_grad():
        if isinstance(teacher_TK, Tensor):
            law_CX = _projected(teacher_TK, head, rows.teacher_place_C, events.teacher)
            return student_CX, _with_carried(law_CX, rows, events.teacher)
        law_CX, known_CX, tail_C = _listed_law(teacher_TK, student_CX, rows, events.teacher)
    return _with_tail(student_CX, known_CX), _with_tail(law_CX, known_CX, tail_C)


def _listed_law(
    teacher: Listed, like_CX: Tensor, rows: ChunkRows, side: Side
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's law, which of its columns are known, and what it did not list."""
    place_C, carry = rows.teacher_place_C, rows.teacher_carry
    column_CK, tail_C = teacher.column_MK[place_C], teacher.tail_M[place_C].to(like_CX)
    prob_CK = teacher.prob_MK[place_C].to(like_CX)
    law_CX = torch.full_like(like_CX, FLOOR).scatter_add_(1, column_CK, prob_CK)
    law_CX = _with_carried(law_CX, rows, side)
    over_C = torch.zeros_like(tail_C).index_add(0, carry.chunk_K, carry.mass_K.to(tail_C))
    known_CX = torch.zeros_like(law_CX, dtype=torch.bool).scatter_(1, column_CK, value=True)
    known_CX[carry.chunk_K, side.column(carry.event_K)] = True
    known_CX[:, -2:] = True
    return law_CX, known_CX, tail_C * (1 - over_C)


def _with_tail(law_CX: Tensor, known_CX: Tensor, tail_C: Tensor | None = None) -> Tensor:
    """The known columns, the tail as one more (by default what is in the others), and *other*."""
    if tail_C is None:
        tail_C = law_CX.masked_fill(known_CX, 0).sum(-1)
    kept_CX = law_CX.masked_fill(~known_CX, FLOOR)
    return torch.cat([kept_CX[:, :-1], tail_C[:, None] + FLOOR, kept_CX[:, -1:]], dim=1)


def _chunk_law(logits_NV: Tensor, rows: ChunkRows) -> Tensor:
    """Of each chunk, by the student: its probability, that of all else, and 0, [C, 3].

    All else is added up over the places where the text could have left the chunk, so that it keeps
    its digits, and its gradient, where the student is sure of the chunk.
    """
    own, prob_NV = rows.student, logits_NV.softmax(-1)
    taken_N1 = own.ids_N[:, None]
    taken_N = prob_NV.gather(1, taken_N1)[:, 0]
    left_N = prob_NV.scatter(1, taken_N1, 0.0).sum(-1)
    lead_N, prob_C, chunk_N = _paths(taken_N, _groups(own, rows.observed_C))
    else_C = torch.zeros_like(prob_C).index_add(0, chunk_N, lead_N * left_N)
    return torch.stack([prob_C + FLOOR, else_C + FLOOR, torch.zeros_like(prob_C)], dim=1)


def _one_or_else(logp_C: Tensor) -> Tensor:
    """A chunk's probability, that of all else, and 0, [C, 3]."""
    parts = logp_C.exp() + FLOOR, -logp_C.expm1() + FLOOR, torch.zeros_like(logp_C)
    return torch.stack(parts, dim=1)


def _projected(states_TD: Tensor, head: Head | None, place_C: Tensor, side: Side) -> Tensor:
    if bool((place_C < 0).any()):
        known_BX = _projected(states_TD, head, place_C[place_C >= 0], side)
        law_CX = known_BX.new_full((len(place_C), known_BX.shape[1]), FLOOR)
        return law_CX.index_put_((place_C >= 0,), known_BX)
    if head is None and len(place_C) and bool(place_C.max() - place_C.min() < 1.5 * len(place_C)):
        low = int(place_C.min())  # logits that stand together are not copied
        near_NX = side.project(_wide(states_TD[low : int(place_C.max()) + 1]).softmax(-1), FLOOR)
        return near_NX[place_C - low]
    return side.project(_logits(states_TD[place_C], head).softmax(-1), FLOOR)


def _with_carried(law_CX: Tensor, rows: ChunkRows, side: Side) -> Tensor:
    """The teacher's law, in place: what longer tokens say, and the observed chunk."""
    carry = rows.teacher_carry
    mass_K = carry.mass_K.to(law_CX.dtype)
    chunk_B, row_K = carry.chunk_K.unique_consecutive(return_inverse=True)
    stay_B = mass_K.new_ones(len(chunk_B)).index_add(0, row_K, mass_K, alpha=-1).clamp(min=0)
    prob_C, source_C = rows.teacher_logp_C.to(mass_K).exp(), side.event_V[rows.teacher_id_C]
    into_K = carry.chunk_K, side.column(carry.event_K)
    _revise(law_CX, chunk_B, stay_B, into_K, mass_K, prob_C, source_C, rows.observed_C)
    return law_CX


def _student_law(logits_NV: Tensor, rows: ChunkRows, side: Side) -> Tensor:
    """The same of the student, whose `FIRST` rows stand first.

    With c the tokens before the chunk, p their probability, P the prediction after them, and m the
    mass of single tokens that begin like them and go on, times that of the tokens before, the law is
    `(p P + m) / (p + sum of m)`. An observed chunk's probability holds the longer tokens over its end,
    those that begin before it too.
    """
    own, chunk_N, n_chunks = rows.student, rows.student.chunk_N, len(rows.observed_C)
    groups = _groups(own, rows.observed_C)  # of every chunk, and then of what stands before some
    chunks, observed = chunk_N.tolist(), rows.observed_C.tolist()
    ways = [(group, list[int]()) for group in groups]  # and then from there over the chunk's end
    ways += [(one, groups[c]) for one in groups[n_chunks:] if observed[c := chunks[one[0]]]]
    paths = [(row, way[k:] + more) for way, more in ways for k, row in enumerate(way)]
    ids, inside = own.ids_N.tolist(), ((own.kind_N == INSIDE) | (own.kind_N == REST)).tolist()
    over_J, id_J, event_J = side.over([[(ids[n], inside[n]) for n in path] for _, path in paths])
    row_J = over_J.new_tensor([row for row, _ in paths])[over_J]
    every_N = torch.arange(len(chunk_N), device=chunk_N.device)
    places = torch.cat([every_N, row_J]), torch.cat([own.ids_N, id_J])
    law_CX, prob_P = _Read.apply(logits_NV, side, n_chunks, *places)
    taken_N, longer_J = prob_P.split([len(every_N), len(row_J)])
    lead_N, prob_G, group_N = _paths(taken_N, groups)
    longer_J, group_J = lead_N[row_J] * longer_J, group_N[row_J]
    whole_J = over_J >= sum(map(len, groups))
    known_G = prob_G.index_add(0, group_J, longer_J * ~whole_J)

    before_G = torch.arange(len(groups), device=chunk_N.device) >= n_chunks
    counts_G, safe_G = known_G > RARE, known_G.clamp(min=RARE)
    share_J = torch.where(counts_G, 1 / safe_G, 0.0)[group_J] * longer_J
    chunk_G = chunk_N[[group[0] for group in groups]]
    chunk_B, stay_B = chunk_G[before_G], torch.where(counts_G, prob_G / safe_G, 1.0)[before_G]
    stay_C = torch.ones_like(rows.teacher_logp_C, dtype=stay_B.dtype).index_put((chunk_B,), stay_B)
    prob_C = (known_G[:n_chunks] * stay_C).index_add(0, chunk_G[group_J], share_J * whole_J)
    carried_J = before_G[group_J] & ~whole_J
    into_K = chunk_G[group_J[carried_J]], side.column(event_J[carried_J])
    return _Revise.apply(
        law_CX, chunk_B, stay_B, into_K, share_J[carried_J], prob_C,
        side.event_V[own.ids_N[:n_chunks]], rows.observed_C,
    )  # fmt: skip


def _groups(own: Rows, observed_C: Tensor) -> list[list[int]]:
    """Rows of each chunk (of one that is not observed the first alone), then of what stands before some."""
    groups: dict[tuple[bool, int], list[int]] = {}
    observed, kinds = observed_C.tolist(), own.kind_N.tolist()
    for row, (chunk, kind) in enumerate(zip(own.chunk_N.tolist(), kinds, strict=True)):
        if kind != REST or observed[chunk]:
            groups.setdefault((kind >= BEFORE, chunk), []).append(row)
    return [groups[key] for key in sorted(groups)]


def _paths(taken_N: Tensor, groups: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the probability of those before it in its group, that of each group, and its group."""
    row_R = torch.tensor([row for group in groups for row in group], device=taken_N.device)
    sizes = torch.tensor([len(group) for group in groups], device=taken_N.device)
    group_R = torch.arange(len(groups), device=taken_N.device).repeat_interleave(sizes)
    at_R = torch.arange(len(row_R), device=taken_N.device) - (sizes.cumsum(0) - sizes)[group_R]
    one_GM = taken_N.new_ones(len(groups), max(map(len, groups)) + 1)
    path_GM = one_GM.index_put((group_R, at_R + 1), taken_N[row_R]).cumprod(1)
    lead_N = torch.ones_like(taken_N).index_put((row_R,), path_GM[group_R, at_R])
    group_N = torch.zeros_like(taken_N, dtype=torch.int64).index_put((row_R,), group_R)
    return lead_N, path_GM[:, -1], group_N


class _Read(torch.autograd.Function):
    """Softmax; the law of the first `n_first` rows over events; probabilities of some tokens."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, side: Side, n_first: int, row_P: Tensor, id_P: Tensor
    ) -> tuple[Tensor, Tensor]:
        prob_NV = logits_NV.softmax(-1)
        ctx.save_for_backward(prob_NV, row_P, id_P)
        ctx.side = side
        return side.project(prob_NV[:n_first], FLOOR), prob_NV[row_P, id_P]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CX: Tensor, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        prob_NV, row_P, id_P = ctx.saved_tensors
        n_rows, n_first = len(prob_NV), len(grad_CX)
        grad_NV = ctx.side.spread(grad_CX)
        if n_rows > n_first:
            grad_NV = F.pad(grad_NV, (0, 0, 0, n_rows - n_first))
        grad_NV.index_put_((row_P, id_P), grad_P, accumulate=True)
        grad_NV.mul_(prob_NV).addcmul_(prob_NV, grad_NV.sum(-1, keepdim=True), value=-1)
        return grad_NV, None, None, None, None


def _revise(
    law_CX: Tensor, chunk_B: Tensor, stay_B: Tensor, into_J: tuple[Tensor, Tensor], over_J: Tensor,
    prob_C: Tensor, event_C: Tensor, observed_C: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Makes the law of the text out of a prediction after the last token, in place.

    Args:
        law_CX: in the columns of `Side.project`: events, observed, other.
        chunk_B, stay_B: the share that the prediction keeps at some chunks.
        into_J, over_J: places in `law_CX`, and what longer tokens bring there.
        prob_C, event_C, observed_C: the observed chunk's probability leaves the event of its first
            token and fills the column of its own.

    Returns:
        source_C: the column that it leaves.
        bound_C: bool, it takes all that the event can give.
    """
    law_CX[chunk_B] = law_CX[chunk_B] * stay_B[:, None] + FLOOR
    law_CX.index_put_(into_J, over_J, accumulate=True)
    every_C, last = torch.arange(len(event_C), device=event_C.device), law_CX.shape[1] - 2
    source_C = event_C + (event_C == last)
    most_C = MOST * law_CX[every_C, source_C]
    moved_C = torch.where(observed_C, torch.minimum(prob_C, most_C), 0.0)
    law_CX[every_C, source_C] -= moved_C
    law_CX[:, last] += moved_C
    return source_C, prob_C > most_C


class _Revise(torch.autograd.Function):
    """`_revise` with its derivative; what it changes is read nowhere else."""

    @staticmethod
    def forward(
        ctx: Any, law_CX: Tensor, chunk_B: Tensor, stay_B: Tensor, into_J: tuple[Tensor, Tensor],
        over_J: Tensor, prob_C: Tensor, event_C: Tensor, observed_C: Tensor,
    ) -> Tensor:  # fmt: skip
        before_BX = law_CX[chunk_B]
        source_C, bound_C = _revise(
            law_CX, chunk_B, stay_B, into_J, over_J, prob_C, event_C, observed_C
        )
        ctx.mark_dirty(law_CX)
        ctx.save_for_backward(before_BX, chunk_B, stay_B, *into_J, source_C, bound_C, observed_C)
        return law_CX

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CX: Tensor) -> tuple[Tensor | None, ...]:
        before_BX, chunk_B, stay_B, *into_J, source_C, bound_C, observed_C = ctx.saved_tensors
        every_C, grad_CX = torch.arange(len(source_C), device=source_C.device), grad_CX.clone()
        moved_C = torch.where(observed_C, grad_CX[:, -2] - grad_CX[every_C, source_C], 0.0)
        grad_CX[every_C, source_C] += MOST * torch.where(bound_C, moved_C, 0.0)
        by_prob_C, by_over_J = torch.where(bound_C, 0.0, moved_C), grad_CX[tuple(into_J)]
        by_stay_B = (grad_CX[chunk_B] * before_BX).sum(-1)
        grad_CX[chunk_B] *= stay_B[:, None]
        return grad_CX, None, by_stay_B, None, by_over_J, by_prob_C, None, None


def gold_loss(
    student_SD: Tensor,
    teacher_TK: Tensor | Listed | None,
    *,
    student_head: Head | None,
    teacher_head: Head | None,
    rows: ChunkRows,
    events: Events,
    beta: float,
    weight: float,
    block: int = BLOCK,
) -> Losses:
    """`weight * sum of weight_C * chunk_losses`, `block` chunks at a time.

    The gradient is made together with the value, block by block: beyond the gradients themselves,
    memory grows with the block, not with the chunks. Equal to `chunk_losses` on the dense logits.

    Args:
        student_SD: states whose product with the head gives logits; differentiable. `rows` says
            which of them are read. Without a head these are the logits.
        teacher_TK: the same of the teacher; K is the teacher's width. No gradient flows into them.
            A teacher that says less: see `chunk_losses`.
        weight: 1 / (trained chunks of the whole optimizer step), or 1 / the sum of their weights.
        block: chunks at a time.

    Raises:
        ValueError: no chunk, or beta outside 0 to 1.

    The gradient is made at this `weight`, before a gradient scaler sees the loss: in float16, where
    that is too small for many digits, `chunk_losses` is the one to scale.
    """
    blocks = rows.blocks(block)

    def losses_of(number: int, raw_NV: Tensor) -> Tensor:
        raw_NV = _wide(raw_NV)
        student_NV = raw_NV if student_head is None else student_head.cap(raw_NV)
        laws = _laws(student_NV, teacher_TK, teacher_head, blocks[number], events)
        return _compare(*laws, events, beta)

    places, weights = [one.student.place_N for one in blocks], [one.weight_C for one in blocks]
    affine = (None, None) if student_head is None else (student_head.weight_VD, student_head.bias_V)
    given = student_SD, *affine
    graded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    total, loss_C = _Blockwise.apply(*given, losses_of, places, weights, weight, graded)
    return Losses(total, loss_C)


@torch.no_grad()
def look(
    student_SD: Tensor,
    teacher_TK: Tensor | Listed | None,
    *,
    student_head: Head | None,
    teacher_head: Head | None,
    rows: ChunkRows,
    events: Events,
    beta: float,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Loss of each chunk, and the entropy of the student's law over the events there; nats [C].

    Arguments as in `gold_loss`; without gradients. For masks that need values first.
    """
    losses, entropies = [], []
    for one in rows.blocks(block):
        student_NV = _logits(student_SD[one.student.place_N], student_head)
        student_CX, teacher_CX = _laws(student_NV, teacher_TK, teacher_head, one, events)
        losses.append(_compare(student_CX, teacher_CX, events, beta))
        entropies.append(_entropy(student_CX[:, :-1]))
    return torch.cat(losses), torch.cat(entropies)


def _entropy(weight_CX: Tensor) -> Tensor:
    """In nats, of rows scaled to sum to 1."""
    return torch.special.entr(weight_CX / weight_CX.sum(-1, keepdim=True).clamp(min=RARE)).sum(-1)


def _logits(states: Tensor, head: Head | None) -> Tensor:
    return _wide(states if head is None else head.logits(states))


def _wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _Blockwise(torch.autograd.Function):
    """Head, loss and their gradient for a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None,
        losses_of: Callable[[int, Tensor], Tensor], places: list[Tensor],
        weights: list[Tensor | None], weight: float, graded: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs, needs = (hidden_SD, weight_VD, bias_V), ctx.needs_input_grad[:3]
        sums = [  # of many blocks: not in low precision
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            if graded and need and x is not None else None
            for x, need in zip(inputs, needs, strict=True)
        ]  # fmt: skip
        losses, totals = [], []
        for number, place_N in enumerate(places):
            hidden_ND = hidden_SD[place_N]
            raw_NV = hidden_ND if weight_VD is None else F.linear(hidden_ND, weight_VD, bias_V)
            with torch.set_grad_enabled(graded):
                losses_B = losses_of(number, raw_NV.requires_grad_(graded))
                weight_B = weights[number]
                total = (losses_B if weight_B is None else losses_B * weight_B).sum() * weight
            if graded:
                (grad_NV,) = torch.autograd.grad(total, raw_NV)
                _add_gradients(sums, grad_NV, hidden_ND, weight_VD, place_N)
            losses.append(losses_B.detach())
            totals.append(total.detach())
        pairs = zip(sums, inputs, strict=True)
        ctx.save_for_backward(*(g if g is None or x is None else g.to(x.dtype) for g, x in pairs))
        loss_C = torch.cat(losses)
        ctx.mark_non_differentiable(loss_C)
        return torch.stack(totals).sum(), loss_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, kept = float(grads[0]), ctx.saved_tensors
        if scale != 1:  # else nothing of the head's size is copied
            kept = [None if x is None else x * scale for x in kept]
        return *kept, None, None, None, None, None


def _add_gradients(
    sums: list[Tensor | None], grad_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor | None,
    place_N: Tensor,
) -> None:  # fmt: skip
    """Adds what a block's logits give to the gradients of states, weight and bias."""
    of_hidden, of_weight, of_bias = sums
    if of_hidden is not None:
        grad_ND = grad_NV if weight_VD is None else grad_NV.to(weight_VD.dtype) @ weight_VD
        of_hidden.index_add_(0, place_N, grad_ND.to(of_hidden.dtype))
    if of_weight is not None:
        of_weight.addmm_(grad_NV.T.to(of_weight.dtype), hidden_ND.to(of_weight.dtype))
    if of_bias is not None:
        of_bias += grad_NV.sum(0, dtype=of_bias.dtype)
