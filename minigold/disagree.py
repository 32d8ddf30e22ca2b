# SPDX-License-Identifier: Apache-2.0
"""What both models think of each chunk in, the chunks to train out.

The first tests need the chunk's log-probabilities `l_s` and `l_t` alone, which are known before the
student's training pass: a chunk that is not chosen costs nothing there. They are speculative
decoding's (Leviathan et al., 2211.17192): the teacher would accept a chunk that the student sampled
with probability `min(1, exp(l_t - l_s))`, and training goes where it would not. The masks
`divergence` and `soft-or` need both distributions, so they save the head's gradient only.

What a mask leaves out is not only work: a form that both models hold is trained next to never, and
is lost bit by bit to the steps on other chunks. `weighted` goes where either model finds a chunk
likelier than the other does, leaves every chunk a probability, and divides each loss by it: the sum
is that of `all` on average (Horvitz and Thompson, 1952); divided by the sum of the drawn weights it
is a mean with a bias of the order of 1 / chunks. Of the others only `random` is an unbiased sample.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "KNOWN_BEFORE",
    "LEAST",
    "WHERE",
    "acceptance",
    "agreement",
    "budget",
    "choose",
    "largest",
    "replayed",
    "soft_or",
    "weights",
]

KNOWN_BEFORE = ("all", "weighted", "sampled", "reject")  # what `choose` takes
LEAST = 0.1  # probability with which `weighted` trains a chunk that both models find as likely
WHERE = (*KNOWN_BEFORE, "divergence", "soft-or", "random")


def acceptance(student_logp_C: Tensor, teacher_logp_C: Tensor, scorable_C: Tensor) -> Tensor:
    """Probability that speculative decoding keeps each chunk; 0 where a chunk cannot be scored.

    Args:
        student_logp_C, teacher_logp_C: nats; read only where `scorable_C` is true.
        scorable_C: bool.

    >>> acceptance(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), torch.ones(2).bool())
    tensor([0.3679, 1.0000])
    """
    gain_C = torch.where(scorable_C, teacher_logp_C - student_logp_C, -torch.inf)
    return gain_C.clamp(max=0).exp()


def agreement(student_logp_C: Tensor, teacher_logp_C: Tensor, scorable_C: Tensor) -> Tensor:
    """The smaller of both ratios of each chunk's probabilities, exp(-|l_t - l_s|); as `acceptance`.

    >>> agreement(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), torch.ones(2).bool())
    tensor([0.3679, 0.3679])
    """
    gain_C = torch.where(scorable_C, teacher_logp_C - student_logp_C, -torch.inf)
    return gain_C.abs().neg().exp()


def choose(
    acceptance_C: Tensor,
    *,
    where: str,
    threshold: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Bool mask of the chunks to train, from what is known before the training pass.

    What is not a number is trained, so that the step fails by it.

    Args:
        acceptance_C: from `acceptance`; for `weighted` from `agreement`.
        where: `all`; `sampled`: uniform u > a, which rejects with probability exactly 1 - a;
            `weighted`: the same with a at most 1 - `LEAST`, see `weights`; `reject`: a < threshold.
        generator: random stream of `sampled` and `weighted`, on the device of `acceptance_C`.

    Raises:
        ValueError: another `where`.
    """
    if where == "all":
        return torch.ones_like(acceptance_C, dtype=torch.bool)
    if where in ("sampled", "weighted"):
        uniform_C = torch.rand(
            acceptance_C.shape, generator=generator, device=acceptance_C.device, dtype=torch.float64
        )
        most = 1 - LEAST if where == "weighted" else 1.0
        # u lies in [0, 1): a = 0 always trains, a = 1 never with `sampled`
        return ~(uniform_C < acceptance_C.double().clamp(max=most))
    if where == "reject":
        return ~(acceptance_C >= threshold)
    raise ValueError(f"expected one of {', '.join(KNOWN_BEFORE)}, got {where!r}")


def weights(agreement_C: Tensor) -> Tensor:
    """What a chunk's loss counts with `weighted`: 1 / the probability that it is trained.

    >>> weights(torch.tensor([0.0, 0.5, 1.0]))
    tensor([ 1.,  2., 10.])
    """
    return 1 / (1 - agreement_C).clamp(min=LEAST)


def budget(n: int, fraction: float) -> int:
    """Chunks that `fraction` of `n` are, rounded up.

    Raises:
        ValueError: a fraction outside 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected a fraction from 0 to 1, got {fraction}")
    return math.ceil(fraction * n - 1e-9)  # 0.1 * 30 is a little more than 3


def largest(score_C: Tensor, fraction: float) -> Tensor:
    """Bool mask of the largest scores, `budget` many; of equal ones the first.

    Raises:
        ValueError: a fraction outside 0 to 1, or a score that is not a number.

    >>> largest(torch.tensor([0.1, 0.3, 0.2, 0.3]), 0.5)
    tensor([False,  True, False,  True])
    """
    if bool(score_C.isnan().any()):
        raise ValueError("expected scores that are numbers, got NaN; check the losses")
    order_C = score_C.argsort(descending=True, stable=True)
    mask_C = torch.zeros_like(score_C, dtype=torch.bool)
    mask_C[order_C[: budget(len(score_C), fraction)]] = True
    return mask_C


def soft_or(entropy_C: Tensor, divergence_C: Tensor) -> Tensor:
    """h + d - h d, where h and d are the student's entropy and the divergence, scaled to 0 to 1.

    Large where the student is unsure, or sure and wrong.

    Args:
        entropy_C, divergence_C: of the chunks of one micro-batch; each is scaled by its least and
            greatest value there, and counts as 0 where these are equal.

    Source: TIP (2604.14084). Differs: entropy is over the events, divergence is the chunk's loss.

    >>> soft_or(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 3.5, 3.0]))
    tensor([0., 1., 1.])
    """
    h_C, d_C = _scaled(entropy_C), _scaled(divergence_C)
    return h_C + d_C - h_C * d_C


def _scaled(x_C: Tensor) -> Tensor:
    if len(x_C) == 0:
        return x_C
    low, high = x_C.aminmax()
    return torch.where(high > low, (x_C - low) / (high - low), 0.0)


def replayed(count: int, eligible_C: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Bool mask of `count` eligible chunks, drawn at random: the control that a mask must beat.

    Args:
        count: how many another mask chose.
        eligible_C: bool.
        generator: random stream, on the CPU.

    Raises:
        ValueError: fewer eligible chunks than `count`.
    """
    places_K = eligible_C.nonzero()[:, 0]
    if count > len(places_K):
        raise ValueError(f"expected at most {len(places_K)} chunks, the eligible ones, got {count}")
    order_K = torch.randperm(len(places_K), generator=generator).to(places_K.device)
    mask_C = torch.zeros_like(eligible_C)
    mask_C[places_K[order_K[:count]]] = True
    return mask_C
