# SPDX-License-Identifier: Apache-2.0
"""Lines of metrics.jsonl in, signs that a run goes wrong out: numbers that fail, a student that collapses.

Nothing is kept between calls: the same lines give the same signs, after a resume too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

__all__ = ["WINDOW", "collapses", "failed_in_a_row", "finite"]

WINDOW = 10  # steps at the start of a run, and its last ones, whose means are compared


def finite(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether no weight is NaN or infinite: one pass over them, without a copy."""
    ends = [end for p in parameters for end in torch.aminmax(p.detach())]
    return bool(torch.stack(ends).isfinite().all())


def failed_in_a_row(history: Sequence[dict[str, Any]]) -> int:
    """How many steps at the end of `history` had a loss or gradient that was not finite.

    >>> row = {"loss": 0.1, "grad_norm": 1.0}
    >>> failed_in_a_row([row, row | {"grad_norm": None}, row | {"loss": None}])
    2
    """
    count = 0
    for row in reversed(history):
        if row["loss"] is not None and row["grad_norm"] is not None:
            break
        count += 1
    return count


def collapses(history: Sequence[dict[str, Any]], *, answers: int) -> dict[str, str]:
    """What of the last steps looks like a collapse, in words: sign -> sentence.

    The means of the last `WINDOW` steps are held against those of the first `WINDOW`: what was so
    from the start is a property of the task. Empty before twice that many steps.

    Args:
        answers: of a step.
    """
    if len(history) < 2 * WINDOW:
        return {}
    first, last = history[:WINDOW], history[-WINDOW:]
    found = {}
    was, now = _mean(first, "repetition"), _mean(last, "repetition")
    if now > 0.3 and now > was + 0.2:
        found["repetition"] = (
            f"the student repeats itself: {now:.0%} of its runs of four tokens stood in the same "
            f"answer before ({was:.0%} in the first {WINDOW} steps); lower --lr"
        )
    was, now = _mean(first, "eos_rate", 1.0), _mean(last, "eos_rate", 1.0)
    if now < 0.02 and was > 0.1:
        found["endless"] = (
            f"the student no longer ends its answers: all are cut at the limit ({was:.0%} ended by "
            f"themselves in the first {WINDOW} steps); lower --lr, or raise --max-new-tokens"
        )
    was, now = (_mean(rows, "completion_tokens") / answers for rows in (first, last))
    if now <= 1.5 and was >= 2 * now:
        found["empty"] = (
            f"the student hardly says anything: {now:.1f} tokens an answer, the stop included "
            f"({was:.1f} in the first {WINDOW} steps); lower --lr"
        )
    was, now = (_mean(rows, "shared_mass_student", 1.0) for rows in (first, last))
    if now < 0.8 * was:
        found["mass"] = (
            f"the student drifts to tokens that the teacher does not have: {now:.0%} of its mass is "
            f"in shared tokens ({was:.0%} in the first {WINDOW} steps); lower --lr"
        )
    was, now = _mean(first, "noncanonical_share"), _mean(last, "noncanonical_share")
    if now > 0.05 and now > 2 * was:
        found["spelling"] = (
            f"the student spells in pieces that its tokenizer would not make: {now:.0%} of its tokens "
            f"({was:.0%} in the first {WINDOW} steps); read samples.jsonl: the words may be none; "
            "--beta 0.1, or lower --lr"
        )
    return found


def _mean(rows: Sequence[dict[str, Any]], key: str, absent: float = 0.0) -> float:
    known = [row[key] for row in rows if row[key] is not None]
    return sum(known) / len(known) if known else absent
