# SPDX-License-Identifier: Apache-2.0
"""Predictions of both models at the chosen chunks in, one loss per chunk out.

`divergence` compares two distributions over one set of events. `chunk_losses` makes those
distributions from logits. `gold_loss` does the same from hidden states in blocks, so that the
logits of a whole batch are never held. All are pure functions: no tokenizer, no configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

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
]

FLOOR = 1e-18  # probabilities below count as this; its square is still a normal float32
END = 1e-3  # within this of 0 or 1, beta is the end itself
RARE = 1e-8  # what was less likely than this is not conditioned on: bounds the gradient
MOST = 1 - 1e-3  # of an event that its observed chunk takes at most: what is left is no rounding


class Head(Protocol):
    """The output layer: `logits(hidden_ND)` gives float32 logits_NV."""

    @property
    def weight_VD(self) -> Tensor: ...
    def logits(self, hidden_ND: Tensor) -> Tensor: ...
    def cap(self, raw_NV: Tensor) -> Tensor: ...


class Side(Protocol):
    """One side's map to events, as `events.match` makes it."""

    @property
    def event_V(self) -> Tensor: ...
    def project(self, prob_NV: Tensor) -> Tensor: ...
    def carry(self, prob_NV: Tensor, ids_N: Tensor, inside_N: Tensor) -> Tensor: ...
    def column(self, event_K: Tensor) -> Tensor: ...


class Events(Protocol):
    """As `events.match` makes them."""

    @property
    def student(self) -> Any: ...
    @property
    def teacher(self) -> Any: ...


FIRST, REST, BEFORE, INSIDE = range(4)  # kinds of rows


@dataclass(frozen=True)
class Rows:
    """The student's predictions, row by row, in the order of their chunks.

    Args:
        chunk_N: int64, the chunk of each row, non-decreasing.
        ids_N: int64, the token that was taken at each row.
        kind_N: int64. `FIRST`, one a chunk: predicts what starts at the chunk. `REST`, of
            observed chunks: predict the rest of the chunk's tokens. `BEFORE`, at most one
            a chunk: predicts the last token before the chunk, and is `INSIDE` instead where that
            token does not start at a shared boundary.
    """

    chunk_N: Tensor
    ids_N: Tensor
    kind_N: Tensor


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

    Args:
        student: N rows.
        teacher_id_C: int64, the first teacher token of each chunk.
        teacher_logp_C: nats, the teacher's log-probability that the text goes on with the chunk.
        teacher_carry: what is mixed into the teacher's predictions.
        observed_C: bool, the chunk is made an event of its own.
    """

    student: Rows
    teacher_id_C: Tensor
    teacher_logp_C: Tensor
    teacher_carry: Carry
    observed_C: Tensor

    def block(self, start: int, stop: int) -> tuple[slice, ChunkRows]:
        """Chunks `start` to `stop`, and the student rows that they own."""
        carry, chunks = self.teacher_carry, slice(start, stop)
        rows, some = _between(self.student.chunk_N, chunks), _between(carry.chunk_K, chunks)
        student = Rows(
            self.student.chunk_N[rows] - start, self.student.ids_N[rows], self.student.kind_N[rows]
        )
        return rows, ChunkRows(
            student,
            self.teacher_id_C[chunks],
            self.teacher_logp_C[chunks],
            Carry(carry.chunk_K[some] - start, carry.event_K[some], carry.mass_K[some]),
            self.observed_C[chunks],
        )


def _between(chunk_N: Tensor, chunks: slice) -> slice:
    bounds = torch.tensor([chunks.start, chunks.stop], device=chunk_N.device)
    return slice(*torch.searchsorted(chunk_N, bounds).tolist())


class Losses(NamedTuple):
    """`total` = sum of `weight * loss_C`, differentiable; `loss_C` in nats, detached."""

    total: Tensor
    loss_C: Tensor


def divergence(student_prob_NX: Tensor, teacher_prob_NX: Tensor, *, beta: float) -> Tensor:
    r"""Generalized JSD divided by beta (1 - beta), in nats, one value per row.

    With M = beta T + (1 - beta) S the generalized JSD is beta KL(T||M) + (1 - beta) KL(S||M).
    Divided by beta (1 - beta) it is continuous in beta: beta -> 0 is KL(teacher||student),
    beta -> 1 is KL(student||teacher), and 0.5 is four times the usual JSD.

    Summed from terms p (x - 1 - ln x) >= 0, x = m / p, so that rounding cannot turn it negative.

    Args:
        student_prob_NX, teacher_prob_NX: rows that sum to 1; values under `FLOOR` count as it.
        beta: 0 to 1; within 1e-3 of an end the value is that end's KL.

    Raises:
        ValueError: beta outside 0 to 1.

    Source: GKD (2306.13649), eq. 2. Differs: divided by beta (1 - beta).

    >>> s, t = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> divergence(s, t, beta=1.0)  # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)
    tensor([0.1438])
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"expected beta between 0 (forward KL) and 1 (reverse KL), got {beta}")
    student_NX = student_prob_NX.clamp(min=FLOOR)
    teacher_NX = teacher_prob_NX.clamp(min=FLOOR)
    if beta < END:
        return _terms(teacher_NX, student_NX, 1.0).sum(-1)
    if beta > 1 - END:
        return _terms(student_NX, teacher_NX, 1.0).sum(-1)
    forward_NX = _terms(teacher_NX, student_NX, 1 - beta)
    return (forward_NX + _terms(student_NX, teacher_NX, beta)).sum(-1)


def _terms(p_NX: Tensor, q_NX: Tensor, share: float) -> Tensor:
    """p (x - 1 - ln x) / share with x = 1 + share (q / p - 1); share 1 gives KL(p||q).

    ln x is taken from x - 1 near 1 and from x elsewhere, each where it loses no digits.
    """
    ratio_NX = q_NX / p_NX
    change_NX = share * (ratio_NX - 1)
    near_NX = torch.log1p(change_NX.clamp(min=-0.5, max=0.5))
    far_NX = ((1 - share) + share * ratio_NX).log()
    log_NX = torch.where(change_NX.abs() < 0.5, near_NX, far_NX)
    return p_NX * (change_NX - log_NX) / share


def chunk_losses(
    student_logits_NV: Tensor,
    teacher_logits_CW: Tensor,
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

    Args:
        student_logits_NV: differentiable.
        teacher_logits_CW: no gradient flows into them.
    """
    student_logp_NV = student_logits_NV.float().log_softmax(-1)
    student_CX, student_logp_C = _student_law(student_logp_NV, rows, events.student)
    is_first_N = rows.student.kind_N == FIRST
    event_C = events.student.event_V[rows.student.ids_N[is_first_N]]
    student_CX = _with_observed(student_CX, student_logp_C, event_C, rows.observed_C)
    with torch.no_grad():
        teacher_prob_CW = teacher_logits_CW.float().log_softmax(-1).exp()  # rounded as above
        teacher_CX = _with_observed(
            _teacher_law(teacher_prob_CW, rows.teacher_carry, events.teacher),
            rows.teacher_logp_C,
            events.teacher.event_V[rows.teacher_id_C],
            rows.observed_C,
        )
        teacher_CK = _conditioned(teacher_CX)
    return divergence(_conditioned(student_CX), teacher_CK, beta=beta) + _hidden_mass(student_CX)


def _teacher_law(prob_CW: Tensor, carry: Carry, side: Side) -> Tensor:
    """How the text goes on at each chunk, over events [C, X + 2]."""
    prob_CX = side.project(prob_CW)
    overhang_C = prob_CX.new_zeros(len(prob_CX)).index_add(0, carry.chunk_K, carry.mass_K)
    law_CX = prob_CX * (1 - overhang_C)[:, None]
    return law_CX.index_put(
        (carry.chunk_K, side.column(carry.event_K)), carry.mass_K, accumulate=True
    )


def _student_law(logp_NV: Tensor, rows: ChunkRows, side: Side) -> tuple[Tensor, Tensor]:
    """The same of the student, and ln P(the chunk) [C].

    With c the token before the chunk, p its distribution and m the mass that is carried over c,
    the law is `(p(c) P + carried) / (p(c) + m)`, P being the prediction after c.
    """
    own = rows.student
    prob_CX = side.project(logp_NV[own.kind_N == FIRST].exp())
    logp_C = _chunk_logp(logp_NV, own, side, rows.observed_C)
    before = (own.kind_N >= BEFORE).nonzero()[:, 0]
    if len(before) == 0:
        return prob_CX, logp_C
    prob_KV, ids_K, chunk_K = logp_NV[before].exp(), own.ids_N[before], own.chunk_N[before]
    taken_K = prob_KV.gather(1, ids_K[:, None])[:, 0]
    carried_KX = side.carry(prob_KV, ids_K, own.kind_N[before] == INSIDE)
    known_K = taken_K + carried_KX.sum(-1)
    counts_K = known_K > RARE
    stay_K = torch.where(counts_K, taken_K / known_K.clamp(min=RARE), 1.0)
    over_KX = torch.where(counts_K[:, None], carried_KX / known_K.clamp(min=RARE)[:, None], 0.0)
    stay_C = torch.ones_like(logp_C).index_put((chunk_K,), stay_K)
    law_CX = (prob_CX * stay_C[:, None]).index_add(0, chunk_K, over_KX)
    return law_CX, logp_C + stay_C.clamp(min=FLOOR).log()


def _chunk_logp(logp_NV: Tensor, rows: Rows, side: Side, observed_C: Tensor) -> Tensor:
    """ln P [C] of each chunk's tokens; observed ones with the longer tokens over their end."""
    own_N = rows.kind_N < BEFORE
    taken_N = logp_NV.gather(1, rows.ids_N[:, None])[:, 0]
    if bool(observed_C.any()):
        last_C = own_N.nonzero()[:, 0][rows.chunk_N[own_N].bincount().cumsum(0) - 1]
        last_K = last_C[observed_C]
        prob_KV, ids_K = logp_NV[last_K].exp(), rows.ids_N[last_K]
        longer_K = side.carry(prob_KV, ids_K, rows.kind_N[last_K] == REST).sum(-1)
        ends_K = (taken_N[last_K].exp() + longer_K).clamp(min=FLOOR).log()
        taken_N = taken_N.index_put((last_K,), ends_K)
    empty_C = taken_N.new_zeros(len(observed_C))
    return empty_C.index_add(0, rows.chunk_N[own_N], taken_N[own_N])


def _with_observed(prob_CX: Tensor, logp_C: Tensor, event_C: Tensor, observed_C: Tensor) -> Tensor:
    """Moves the observed chunk's probability from its first token's event to a column of its own.

    Columns of `prob_CX` are those of `Side.project`: events, observed, other.
    """
    last = prob_CX.shape[1] - 2
    source_C = torch.where(event_C == last, last + 1, event_C)
    held_C = prob_CX.gather(1, source_C[:, None])[:, 0]
    moved_C = torch.where(observed_C, torch.minimum(logp_C.exp(), MOST * held_C), 0.0)
    where_C2 = torch.stack([source_C, torch.full_like(source_C, last)], dim=1)
    return prob_CX.scatter_add(1, where_C2, torch.stack([-moved_C, moved_C], dim=1))


def _conditioned(prob_CX: Tensor) -> Tensor:
    inside_CK = prob_CX[:, :-1]
    return inside_CK / inside_CK.sum(-1, keepdim=True).clamp(min=RARE)


def _hidden_mass(prob_CX: Tensor) -> Tensor:
    """-ln(1 - P(other)), exact for an *other* near 0 as well as near 1."""
    other_C = prob_CX[:, -1]
    small_C = -torch.log1p(-other_C.clamp(max=0.5))
    large_C = -prob_CX[:, :-1].sum(-1).clamp(min=FLOOR).log()
    return torch.where(other_C < 0.5, small_C, large_C)


def gold_loss(
    student_hidden_ND: Tensor,
    teacher_hidden_CK: Tensor,
    *,
    student_head: Head,
    teacher_head: Head,
    rows: ChunkRows,
    events: Events,
    beta: float,
    weight: float,
    block: int = 32,
) -> Losses:
    """`weight * sum of chunk_losses`, from hidden states, `block` chunks at a time.

    The gradient is made together with the value, block by block, so that only one block of
    logits exists at a time. Equal to `chunk_losses` on the dense logits.

    Args:
        student_hidden_ND: differentiable, one row per row of `rows.student`.
        teacher_hidden_CK: one row per chunk; K is the teacher's width.
        weight: 1 / (trained chunks of the whole optimizer step).
        block: chunks at a time.
    """
    n_chunks = len(rows.observed_C)
    starts = range(0, n_chunks, block)
    blocks = [rows.block(start, min(start + block, n_chunks)) for start in starts]

    def losses_of(number: int, raw_NV: Tensor) -> Tensor:
        start = starts[number]
        return chunk_losses(
            student_head.cap(raw_NV.float()),
            teacher_head.logits(teacher_hidden_CK[start : start + block]),
            rows=blocks[number][1],
            events=events,
            beta=beta,
        )

    total, loss_C = _Blockwise.apply(
        student_hidden_ND, student_head.weight_VD, losses_of, [b[0] for b in blocks], weight
    )
    return Losses(total, loss_C)


class _Blockwise(torch.autograd.Function):
    """Head, loss and their gradient for a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        losses_of: Callable[[int, Tensor], Tensor],
        blocks: list[slice],
        weight: float,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD)
        losses = []
        for number, rows in enumerate(blocks):
            raw_KV = (hidden_ND[rows] @ weight_VD.T).requires_grad_()
            with torch.enable_grad():
                loss_C = losses_of(number, raw_KV)
                (grad_KV,) = torch.autograd.grad(loss_C.sum() * weight, raw_KV)
            grad_hidden_ND[rows] = grad_KV @ weight_VD
            grad_weight_VD.addmm_(grad_KV.T.to(hidden_ND.dtype), hidden_ND[rows])
            losses.append(loss_C.detach())
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        loss_C = torch.cat(losses)
        ctx.mark_non_differentiable(loss_C)
        return loss_C.sum() * weight, loss_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grads[0], grad_weight_VD * grads[0], None, None, None
