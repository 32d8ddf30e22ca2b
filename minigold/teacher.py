# SPDX-License-Identifier: Apache-2.0
"""Completions in, a model's view of them out: the critic never generates.

The teacher reads the student's text in its own tokens after its own prompt. What it says of each
token is kept as a number; its distributions are kept as hidden states, from which `loss.py` makes
logits again where they are needed. The same reading serves the student on fixed answers, for
which there is no sampling to take log-probabilities from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minigold.events import Side, measure
from minigold.sample import CausalLM, completion_states, pad

__all__ = ["CARRY_FROM", "Carried", "Reading", "Score", "score"]

CARRY_FROM = 1e-3  # an overhang under this is left out


@dataclass(frozen=True)
class Reading:
    """What a model reads: its prompt and a completion.

    Args:
        starts: the token before which each chunk starts, 0 left out.
        opaque: tokens of unscorable chunks; nothing is carried over them or out of them, since
            their own spellings are not the text.
    """

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    starts: Sequence[int] = ()
    opaque: Collection[int] = ()


@dataclass(frozen=True)
class Carried:
    """What longer tokens, over a chunk's start, say of the text that follows. On the CPU.

    Args:
        event_K: int64, the event of what such a token adds.
        mass_K: float64, its share of all that is known of the text there; their sum is the
            overhang, and the rest is the prediction after the token that was taken.
        stay: nats, ln(1 - overhang).
    """

    event_K: Tensor
    mass_K: Tensor
    stay: float


@dataclass(frozen=True)
class Score:
    """One completion under one model; T tokens.

    Args:
        hidden_MD: T + 1 states on the model's device; state i predicts token i, the last one what
            follows the completion.
        logp_T: float32 on the CPU, nats, of each token.
        end_logp: nats, of any of `end_ids` after the completion.
        measures_T5: `events.measure` of each token.
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
        told: list[tuple[int, int]] = []  # shared boundaries: bytes to the start, the event taken
        for at in range(start - 1, -1, -1):
            spelled = side.spelling[reading.ids[at]]
            text = spelled + text
            if at in reading.opaque or not spelled or len(text) >= side.longest:
                break
            log_path += logp[at]
            event = side.event_of(spelled) if at in shared else None
            most = math.log1p(-min(math.exp(logp[at]), 1 - 1e-15)) - log_path
            if most > math.log(CARRY_FROM):
                ids, rests = _told_apart(side, text, event, told)
                if len(ids):
                    found.append(_Cover(start, at, ids, rests, math.exp(min(-log_path, 600.0))))
            if event is not None:
                told.append((len(text), event))
    return found


def _told_apart(
    side: Side, text: bytes, event: int | None, told: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """The longer tokens that took the same event as the text at every shared boundary so far."""
    ids, rests = side.longer(text, event)
    if not (told and len(ids)):
        return ids, rests
    same = [
        all(side.event_of(side.spelling[i][len(text) - n :]) == one for n, one in told)
        for i in ids.tolist()
    ]
    return ids[same], rests[same]


def _carried(
    model: CausalLM, hidden_MD: Tensor, covers: Sequence[_Cover], block: int
) -> dict[int, Carried]:
    """The longer tokens over each chunk's start, from every token before it that they begin at.

    Source: 2410.09303, the next bytes from the tokens that cover them. Differs: tokens that were
    another event at a shared boundary are left out, as the comparison there has told them apart
    already; events take the place of bytes.
    """
    masses: dict[int, list[tuple[Tensor, Tensor]]] = {}
    places = sorted({cover.at for cover in covers})
    for i in range(0, len(places), block):
        row = {at: n for n, at in enumerate(places[i : i + block])}
        some = [cover for cover in covers if cover.at in row]
        prob_NV = model.head.logits(hidden_MD[places[i : i + block]]).softmax(-1)
        sizes = [len(cover.ids) for cover in some]
        rows = torch.tensor([row[cover.at] for cover in some]).repeat_interleave(
            torch.tensor(sizes)
        )
        ids = torch.cat([cover.ids for cover in some])
        mass = prob_NV[rows.to(ids.device), ids].cpu().double().split(sizes)
        rests = torch.cat([cover.rests for cover in some]).cpu().split(sizes)
        for cover, event_K, mass_K in zip(some, rests, mass, strict=True):
            masses.setdefault(cover.start, []).append((event_K, mass_K * cover.weight))
    summed = {start: _summed(parts) for start, parts in masses.items()}
    return {start: one for start, one in summed.items() if len(one.event_K)}


def _summed(parts: Sequence[tuple[Tensor, Tensor]]) -> Carried:
    """Masses beside 1, the prediction after the taken token, as shares of the sum."""
    events, place = torch.cat([event for event, _ in parts]).unique(return_inverse=True)
    mass = torch.cat([mass for _, mass in parts])
    by_event = mass.new_zeros(len(events)).index_add(0, place, mass)
    by_event = by_event * (by_event > 0.01 * CARRY_FROM * (1 + by_event.sum()))
    if by_event.sum() <= CARRY_FROM:
        by_event = by_event * 0
    kept = by_event > 0
    known = 1 + by_event.sum()
    return Carried(events[kept], by_event[kept] / known, -math.log(known))
