# SPDX-License-Identifier: Apache-2.0
"""Completions in, a model's view of them out: the critic never generates.

The teacher reads the student's text in its own tokens after its own prompt. What it says of each
token is kept as a number; its distributions are kept as hidden states, from which `loss.py` makes
logits again where they are needed. The same reading serves the student on fixed answers, for
which there is no sampling to take log-probabilities from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minigold.events import Side, measure
from minigold.sample import CausalLM, completion_states, pad

__all__ = ["Carried", "Reading", "Score", "score"]


CARRY_FROM = 1e-3  # carried mass under this share of what is known is left out


@dataclass(frozen=True)
class Reading:
    """What a model reads: its prompt, a completion, and the token before which each chunk starts."""

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    starts: Sequence[int] = ()


@dataclass(frozen=True)
class Carried:
    """What longer tokens, over a chunk's start, say of the text that follows.

    Args:
        event_K: int64, the event of what such a token adds.
        mass_K: float64, its share of all that is known of the text there; their sum is the
            overhang, and the rest is the prediction after the token that was taken.
    """

    event_K: Tensor
    mass_K: Tensor


@dataclass(frozen=True)
class Score:
    """One completion under one model; T tokens.

    Args:
        hidden_MD: T + 1 states on the model's device; state i predicts token i, the last one what
            follows the completion.
        logp_T: float32 on the CPU, nats, of each token.
        end_logp: nats, of any of `end_ids` after the completion.
        measures_T5: `events.measure` of each token: overhang, inside, shared, projected, other.
        carried: for chunk starts (token index) where there is some.
    """

    hidden_MD: Tensor
    logp_T: Tensor
    end_logp: float
    measures_T5: Tensor
    carried: dict[int, Carried]


@torch.no_grad()
def score(
    model: CausalLM,
    readings: Sequence[Reading],
    *,
    end_ids: Sequence[int],
    side: Side,
    micro_batch: int = 8,
    block: int = 64,
) -> list[Score]:
    """Reads completions, in their order.

    Args:
        readings: prompts have at least one token; completions may be empty.
        end_ids: ids whose probabilities add up to the end of the turn.
        side: this model's side of the events, for the audit.
        micro_batch: rows a forward pass, longest first so that padding is small.
        block: positions whose logits exist at a time.
    """
    order = sorted(
        range(len(readings)), key=lambda i: -len(readings[i].prompt_ids) - len(readings[i].ids)
    )
    scores: dict[int, Score] = {}
    for start in range(0, len(order), micro_batch):
        chosen = order[start : start + micro_batch]
        rows = [[*readings[i].prompt_ids, *readings[i].ids] for i in chosen]
        for hidden_SD, i in zip(model(pad(rows, model.device)), chosen, strict=True):
            one = readings[i]
            states_MD = completion_states(hidden_SD, len(one.prompt_ids), len(one.ids)).clone()
            scores[i] = _read(model, states_MD, one, end_ids, side, block)
    return [scores[i] for i in range(len(readings))]


def _read(
    model: CausalLM,
    hidden_MD: Tensor,
    reading: Reading,
    end_ids: Sequence[int],
    side: Side,
    block: int,
) -> Score:
    ids_T = torch.tensor(reading.ids, dtype=torch.int64, device=hidden_MD.device)
    logps, measures = [hidden_MD.new_zeros(0)], [hidden_MD.new_zeros(0, 5)]
    end_logp = float("-inf")
    for start in range(0, len(hidden_MD), block):
        logp_NV = model.head.logits(hidden_MD[start : start + block]).log_softmax(-1)
        if start + block >= len(hidden_MD):
            end_logp = float(logp_NV[-1, list(end_ids)].logsumexp(0))
        ids_N = ids_T[start : start + block]
        logp_NV = logp_NV[: len(ids_N)]
        logps.append(logp_NV.gather(1, ids_N[:, None])[:, 0])
        measures.append(torch.stack(measure(logp_NV, ids_N, side), dim=1))
    logp_T = torch.cat(logps).cpu()
    covers = _covers(reading, logp_T.tolist(), side)
    carried = _carried(model, hidden_MD, covers, block)
    return Score(hidden_MD, logp_T, end_logp, torch.cat(measures).cpu(), carried)


class _Cover(NamedTuple):
    """Tokens that begin at token `at` and reach over the start of the chunk at token `start`."""

    start: int
    at: int
    ids: Tensor
    rests: Tensor
    weight: float  # 1 / the probability of the tokens between


def _covers(reading: Reading, logp: Sequence[float], side: Side) -> list[_Cover]:
    """All of them that can hold a mass that counts."""
    shared, found = {0, *reading.starts}, []
    for start in reading.starts:
        text, log_path = b"", 0.0
        for at in range(start - 1, -1, -1):
            taken = reading.ids[at]
            text = side.spelling[taken] + text
            if not side.spelling[taken] or len(text) >= side.longest:
                break
            log_path += logp[at]
            most = math.log1p(-min(math.exp(logp[at]), 1 - 1e-15)) - log_path
            if most > math.log(CARRY_FROM):
                event = int(side.event_V[taken]) if at in shared else None
                ids, rests = side.longer(text, event)
                if len(ids):
                    found.append(_Cover(start, at, ids, rests, math.exp(min(-log_path, 600.0))))
    return found


def _carried(
    model: CausalLM, hidden_MD: Tensor, covers: Sequence[_Cover], block: int
) -> dict[int, Carried]:
    """The longer tokens over each chunk's start, from every token before it that they begin at.

    Source: 2410.09303, the next bytes from the tokens that cover them. Differs: tokens that were
    another event at the shared boundary where they begin are left out, as the comparison there has
    told them apart already; events take the place of bytes.
    """
    masses: dict[int, list[tuple[Tensor, Tensor]]] = {}
    places = sorted({cover.at for cover in covers})
    for i in range(0, len(places), block):
        some = places[i : i + block]
        row = {at: n for n, at in enumerate(some)}
        prob_NV = model.head.logits(hidden_MD[some]).softmax(-1)
        for cover in covers:
            if cover.at in row:
                mass = prob_NV[row[cover.at], cover.ids].double() * cover.weight
                masses.setdefault(cover.start, []).append((cover.rests, mass))
    summed = {start: _summed(parts) for start, parts in masses.items()}
    return {start: one for start, one in summed.items() if len(one.event_K)}


def _summed(parts: Sequence[tuple[Tensor, Tensor]]) -> Carried:
    """Masses beside 1, the prediction after the taken token, as shares of the sum."""
    events = torch.cat([event for event, _ in parts])
    raw = torch.cat([mass for _, mass in parts])
    counts = raw > 0.01 * CARRY_FROM * (1 + raw.sum())
    event_K, place = events[counts].unique(return_inverse=True)
    mass_K = raw.new_zeros(len(event_K)).index_add(0, place, raw[counts])
    share_K = mass_K / (1 + mass_K.sum())
    enough = slice(None) if share_K.sum() > CARRY_FROM else slice(0)
    return Carried(event_K[enough], share_K[enough])
