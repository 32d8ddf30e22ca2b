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

__all__ = ["FLOOR", "ChunkRows", "chunk_losses", "divergence", "gold_loss"]

FLOOR = 1e-18  # probabilities below count as this; its square is still a normal float32
END = 1e-3  # within this of 0 or 1, beta is the end itself


class Head(Protocol):
    """The output layer: `logits(hidden_ND)` gives float32 logits_NV."""

    @property
    def weight_VD(self) -> Tensor: ...
    def logits(self, hidden_ND: Tensor) -> Tensor: ...
    def cap(self, raw_NV: Tensor) -> Tensor: ...


class Events(Protocol):
    """As `events.match` makes them."""

    @property
    def student(self) -> Any: ...
    @property
    def teacher(self) -> Any: ...
    @property
    def n_events(self) -> int: ...


Project = Callable[[Tensor, Any, int], Tensor]


@dataclass(frozen=True)
class ChunkRows:
    """Which predictions belong to which chunk. C chunks, N >= C student rows, in chunk order.

    The first student row of a chunk predicts what starts at the chunk; further rows, present
    only where `observed_C`, predict the rest of its student tokens.

    Args:
        chunk_N: int64, the chunk of each student row, non-decreasing, every chunk present.
        ids_N: int64, the student token that was taken at each row.
        teacher_id_C: int64, the first teacher token of each chunk.
        teacher_logp_C: nats, the teacher's log-probability of the whole chunk.
        observed_C: bool, the chunk is made an event of its own.
    """

    chunk_N: Tensor
    ids_N: Tensor
    teacher_id_C: Tensor
    teacher_logp_C: Tensor
    observed_C: Tensor

    def first_rows(self) -> Tensor:
        """int64 [C], the first student row of each chunk."""
        counts_C = torch.bincount(self.chunk_N, minlength=len(self.teacher_id_C))
        return counts_C.cumsum(0) - counts_C

    def block(self, start: int, stop: int) -> tuple[slice, ChunkRows]:
        """Chunks `start` to `stop`, and the student rows that they own."""
        low, high = torch.searchsorted(
            self.chunk_N, torch.tensor([start, stop], device=self.chunk_N.device)
        ).tolist()
        rows = slice(low, high)
        return rows, ChunkRows(
            self.chunk_N[rows] - start,
            self.ids_N[rows],
            self.teacher_id_C[start:stop],
            self.teacher_logp_C[start:stop],
            self.observed_C[start:stop],
        )


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
    project: Project,
    beta: float,
) -> Tensor:
    """Loss of each chunk in nats: divergence over the events, plus -ln(1 - P_S(other)).

    The divergence is of both distributions conditioned on having an event. Where `observed_C`,
    the chunk's own probability leaves the event of its first token and becomes one more event:
    nothing can then be hidden behind a shared prefix.

    Args:
        student_logits_NV: differentiable.
        teacher_logits_CW: no gradient flows into them.
        project: `events.project`.
    """
    logp_NV = student_logits_NV.float().log_softmax(-1)
    taken_N = logp_NV.gather(1, rows.ids_N[:, None])[:, 0]
    n_chunks = len(rows.teacher_id_C)
    student_logp_C = taken_N.new_zeros(n_chunks).index_add(0, rows.chunk_N, taken_N)
    first_C = rows.first_rows()
    student_CX = _with_observed(
        project(logp_NV[first_C].exp(), events.student, events.n_events),
        student_logp_C,
        events.student.event_V[rows.ids_N[first_C]],
        rows.observed_C,
    )
    with torch.no_grad():
        teacher_prob_CW = teacher_logits_CW.float().log_softmax(-1).exp()  # rounded as above
        teacher_CX = _with_observed(
            project(teacher_prob_CW, events.teacher, events.n_events),
            rows.teacher_logp_C,
            events.teacher.event_V[rows.teacher_id_C],
            rows.observed_C,
        )
        teacher_CX = _conditioned(teacher_CX)
    return divergence(_conditioned(student_CX), teacher_CX, beta=beta) + _hidden_mass(student_CX)


def _with_observed(prob_CX: Tensor, logp_C: Tensor, event_C: Tensor, observed_C: Tensor) -> Tensor:
    """Moves the observed chunk's probability from its first token's event to a column of its own.

    Columns of `prob_CX` are those of `events.project`: events, observed, other.
    """
    last = prob_CX.shape[1] - 2
    source_C = torch.where(event_C == last, last + 1, event_C)
    held_C = prob_CX.gather(1, source_C[:, None])[:, 0]
    moved_C = torch.where(observed_C, torch.minimum(logp_C.exp(), held_C), 0.0)
    where_C2 = torch.stack([source_C, torch.full_like(source_C, last)], dim=1)
    return prob_CX.scatter_add(1, where_C2, torch.stack([-moved_C, moved_C], dim=1))


def _conditioned(prob_CX: Tensor) -> Tensor:
    inside_CX = prob_CX[:, :-1]
    return inside_CX / inside_CX.sum(-1, keepdim=True).clamp(min=FLOOR)


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
    project: Project,
    beta: float,
    weight: float,
    block: int = 32,
) -> Losses:
    """`weight * sum of chunk_losses`, from hidden states, `block` chunks at a time.

    The gradient is made together with the value, block by block, so that only one block of
    logits exists at a time. Equal to `chunk_losses` on the dense logits.

    Args:
        student_hidden_ND: differentiable, one row per `rows.chunk_N`.
        teacher_hidden_CK: one row per chunk; K is the teacher's width.
        weight: 1 / (trained chunks of the whole optimizer step).
        block: chunks at a time.
    """

    def losses_of(start: int, stop: int, raw_NV: Tensor) -> Tensor:
        return chunk_losses(
            student_head.cap(raw_NV.float()),
            teacher_head.logits(teacher_hidden_CK[start:stop]),
            rows=rows.block(start, stop)[1],
            events=events,
            project=project,
            beta=beta,
        )

    bounds = [(i, min(i + block, len(teacher_hidden_CK)))
              for i in range(0, len(teacher_hidden_CK), block)]  # fmt: skip
    blocks = [(rows.block(*bound)[0], bound) for bound in bounds]
    total, loss_C = _Blockwise.apply(
        student_hidden_ND, student_head.weight_VD, losses_of, blocks, weight
    )
    return Losses(total, loss_C)


class _Blockwise(torch.autograd.Function):
    """Head, loss and their gradient for a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        losses_of: Callable[[int, int, Tensor], Tensor],
        blocks: list[tuple[slice, tuple[int, int]]],
        weight: float,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD)
        losses = []
        for rows, (start, stop) in blocks:
            raw_NV = (hidden_ND[rows] @ weight_VD.T).requires_grad_()
            with torch.enable_grad():
                loss_C = losses_of(start, stop, raw_NV)
                (grad_NV,) = torch.autograd.grad(loss_C.sum() * weight, raw_NV)
            grad_hidden_ND[rows] = grad_NV @ weight_VD
            grad_weight_VD.addmm_(grad_NV.T.to(hidden_ND.dtype), hidden_ND[rows])
            losses.append(loss_C.detach())
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        loss_C = torch.cat(losses)
        ctx.mark_non_differentiable(loss_C)
        return loss_C.sum() * weight, loss_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grads[0], grad_weight_VD * grads[0], None, None, None
