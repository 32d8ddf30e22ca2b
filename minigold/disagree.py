# SPDX-License-Identifier: Apache-2.0
"""Chunk log-probabilities of both models in, the chunks to train out.

The test is speculative decoding's (Leviathan et al., 2211.17192): with `l_s` and `l_t` the
log-probabilities of a chunk that the student sampled, the teacher would accept it with
probability `min(1, exp(l_t - l_s))`. Training goes where it would not. Both numbers are known
before the student's training pass, so a chunk that is not chosen costs nothing there.
"""

import torch
from torch import Tensor

__all__ = ["WHERE", "acceptance", "choose"]

WHERE = ("all", "sampled", "reject")


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


def choose(
    acceptance_C: Tensor,
    *,
    where: str,
    threshold: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Bool mask of the chunks to train.

    Args:
        acceptance_C: from `acceptance`.
        where: `all`; `sampled`: uniform u > a, which rejects with probability exactly 1 - a;
            `reject`: a < threshold.
        generator: random stream of `sampled`, on the device of `acceptance_C`.

    Raises:
        ValueError: an unknown `where`.
    """
    if where == "all":
        return torch.ones_like(acceptance_C, dtype=torch.bool)
    if where == "sampled":
        uniform_C = torch.rand(
            acceptance_C.shape, generator=generator, device=acceptance_C.device, dtype=torch.float64
        )
        return uniform_C >= acceptance_C  # u lies in [0, 1): a = 0 always trains, a = 1 never
    if where == "reject":
        return acceptance_C < threshold
    raise ValueError(f"expected --where to be one of {', '.join(WHERE)}, got {where!r}")
