# SPDX-License-Identifier: Apache-2.0
"""Completions in, a model's view of them out: the critic never generates.

The teacher reads the student's text in its own tokens after its own prompt. What it says of each
token is kept as a number; its distributions are kept as hidden states, from which `loss.py` makes
logits again where they are needed. The same reading serves the student on fixed answers, for
which there is no sampling to take log-probabilities from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigold.events import Side, measure
from minigold.sample import CausalLM, completion_states, pad

__all__ = ["Score", "score"]


@dataclass(frozen=True)
class Score:
    """One completion under one model; T tokens.

    Args:
        hidden_TD: T + 1 states on the model's device; state i predicts token i, the last one what
            follows the completion.
        logp_T: float32 on the CPU, nats, of each token.
        end_logp: nats, of any of `end_ids` after the completion.
        measures_T4: `events.measure` of each token: overhang, shared, projected, other.
    """

    hidden_TD: Tensor
    logp_T: Tensor
    end_logp: float
    measures_T4: Tensor


@torch.no_grad()
def score(
    model: CausalLM,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    end_ids: Sequence[int],
    side: Side,
    n_events: int,
    micro_batch: int = 8,
    block: int = 64,
) -> list[Score]:
    """Reads pairs of (prompt ids, completion ids), in their order.

    Args:
        rows: prompts have at least one token; completions may be empty.
        end_ids: ids whose probabilities add up to the end of the turn.
        side: this model's side of the events, for the audit.
        micro_batch: rows a forward pass, longest first so that padding is small.
        block: positions whose logits exist at a time.
    """
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))
    scores: dict[int, Score] = {}
    for start in range(0, len(order), micro_batch):
        chosen = order[start : start + micro_batch]
        hidden_BSD = model(pad([[*rows[i][0], *rows[i][1]] for i in chosen], model.device))
        for hidden_SD, i in zip(hidden_BSD, chosen, strict=True):
            prompt, completion = rows[i]
            states_TD = completion_states(hidden_SD, len(prompt), len(completion)).clone()
            scores[i] = _read(model, states_TD, completion, end_ids, side, n_events, block)
    return [scores[i] for i in range(len(rows))]


def _read(
    model: CausalLM,
    hidden_TD: Tensor,
    completion: Sequence[int],
    end_ids: Sequence[int],
    side: Side,
    n_events: int,
    block: int,
) -> Score:
    ids_T = torch.tensor(completion, dtype=torch.int64, device=hidden_TD.device)
    logps, measures = [hidden_TD.new_zeros(0)], [hidden_TD.new_zeros(0, 4)]
    end_logp = float("-inf")
    for start in range(0, len(hidden_TD), block):
        logp_NV = model.head.logits(hidden_TD[start : start + block]).log_softmax(-1)
        if start + block >= len(hidden_TD):
            end_logp = float(logp_NV[-1, list(end_ids)].logsumexp(0))
        ids_N = ids_T[start : start + block]
        logp_NV = logp_NV[: len(ids_N)]
        logps.append(logp_NV.gather(1, ids_N[:, None])[:, 0])
        measures.append(torch.stack(measure(logp_NV, ids_N, side, n_events), dim=1))
    return Score(hidden_TD, torch.cat(logps).cpu(), end_logp, torch.cat(measures).cpu())
