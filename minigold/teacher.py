# SPDX-License-Identifier: Apache-2.0
"""Completions in, a model's view of them out: the critic never generates.

The teacher reads the student's text in its own tokens after its own prompt. What it says of each
token is kept as a number; its distributions are kept as hidden states, from which `loss.py` makes
logits again where they are needed. The same reading serves the student on fixed answers, for
which there is no sampling to take log-probabilities from.

A teacher elsewhere says less: the log-probability of each token and, with luck, the likeliest tokens
in its place (`Told`). `score_of` makes the same `Score` of that, as far as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minigold.carry import Carried, Longer, Reading
from minigold.events import Side, measure
from minigold.sample import CausalLM, completion_states, logp_of, pad

__all__ = ["Listed", "Score", "Told", "read_states", "score", "score_of"]

BLOCK = 16  # positions at a time
ROUNDING = 1e-7  # of float32 sums: what is not listed counts as this at least


@dataclass(frozen=True)
class Told:
    """What a teacher that keeps its states to itself says of a completion of T tokens. On the CPU.

    Args:
        logp_M: float64, nats, of each token, and of the end of turn after the last one.
        id_MK: int64, the listed tokens in the place of each, the token itself among them; K is 0 if
            none are. Short rows are filled up at their end, with a log-probability of -inf.
        logp_MK: float64, nats, of these.
    """

    logp_M: Tensor
    id_MK: Tensor
    logp_MK: Tensor


@dataclass(frozen=True)
class Listed:
    """Predictions of which the likeliest tokens are known, in the columns of `Side.project`.

    Args:
        column_MK: int64; a column may come more than once.
        prob_MK: float32, >= 0.
        tail_M: float32, >= 0, all that is not listed. It makes each row sum to 1.
    """

    column_MK: Tensor
    prob_MK: Tensor
    tail_M: Tensor

    def to(self, device: torch.device | str) -> Listed:
        return Listed(*(x.to(device) for x in (self.column_MK, self.prob_MK, self.tail_M)))

    @staticmethod
    def join(parts: Sequence[Listed]) -> Listed:
        """End to end; shorter lists are filled up with their first column again, without mass."""
        most = max(one.column_MK.shape[1] for one in parts)

        def filled(one: Listed) -> tuple[Tensor, Tensor]:
            column_MK, short = one.column_MK, most - one.column_MK.shape[1]
            again_MJ = column_MK[:, :1].expand(-1, short)
            return torch.cat([column_MK, again_MJ], 1), torch.nn.functional.pad(
                one.prob_MK, (0, short)
            )

        columns, probs = zip(*map(filled, parts), strict=True)
        return Listed(
            torch.cat(columns), torch.cat(probs), torch.cat([one.tail_M for one in parts])
        )


@dataclass(frozen=True)
class Score:
    """One completion under one model; T tokens.

    Args:
        hidden_MD: T + 1 states; state i predicts token i, the last one what follows the completion.
            Without columns (D is 0) if the teacher keeps them to itself. All else is on the CPU.
        logp_T: float32 on the CPU, nats, of each token.
        end_logp: nats, of any of `end_ids` after the completion.
        measures_T5: `events.measure` of each token, as far as is known: where nothing is listed, an
            overhang of 0 and masses of NaN.
        best_id_M, best_prob_M: int64 and float32, the most likely token in the place of each token,
            and after the last one; its probability (0-1). -1 and NaN where it is not known.
        carried: for chunk starts (token index) where there is some.
        inside: how the text goes on at a student's boundary inside a chunk (`Inside.at`), where
            nearly all of that is known: all of the law is carried there.
        listed: what is known of the distributions, where there are no states.
    """

    hidden_MD: Tensor
    logp_T: Tensor
    end_logp: float
    measures_T5: Tensor
    best_id_M: Tensor
    best_prob_M: Tensor
    carried: dict[int, Carried]
    inside: dict[int, Carried] = field(default_factory=dict)
    listed: Listed | None = None

    def to(self, device: torch.device | str) -> Score:
        """With its states, or what stands for them, on another device: off the GPU while others are read, say."""
        listed = None if self.listed is None else self.listed.to(device)
        return replace(self, hidden_MD=self.hidden_MD.to(device), listed=listed)


@torch.no_grad()
def score(
    model: CausalLM,
    readings: Sequence[Reading],
    *,
    end_ids: Sequence[int],
    side: Side,
    micro_batch: int = 8,
    temperature: float = 1.0,
    other_paths: bool = False,
    block: int = BLOCK,
) -> list[Score]:
    """Reads completions, in their order. Without gradients; states are kept, logits only by block.

    Args:
        readings: prompts have at least one token; completions may be empty.
        end_ids: ids whose probabilities add up to the end of the turn.
        side: this model's side of the events, for the audit.
        micro_batch: rows a forward pass, longest first so that padding is small.
        temperature: of all distributions that are read here.
        other_paths: read on from other tokens than those of the completion, where much speaks for
            them, a token each: see `Longer.branches`. Such a completion is read once more, into a cache.
        block: positions whose logits exist at a time.
    """
    head = model.head if temperature == 1 else model.head._replace(temperature=temperature)
    order = sorted(
        range(len(readings)), key=lambda i: -len(readings[i].prompt_ids) - len(readings[i].ids)
    )
    scores: dict[int, Score] = {}

    read_on = partial(_read_on, model, micro_batch=micro_batch) if other_paths else None
    for start in range(0, len(order), micro_batch):
        chosen = order[start : start + micro_batch]
        rows = [[*readings[i].prompt_ids, *readings[i].ids] for i in chosen]
        for hidden_SD, i in zip(model(pad(rows, model.device)), chosen, strict=True):
            one = readings[i]
            states_MD = completion_states(hidden_SD, len(one.prompt_ids), len(one.ids)).clone()
            scores[i] = read_states(
                head, states_MD, one, end_ids=end_ids, side=side, block=block, read_on=read_on
            )  # fmt: skip
    return [scores[i] for i in range(len(readings))]


def _read_on(model: CausalLM, rows: Sequence[Sequence[int]], *, micro_batch: int) -> Tensor:
    """state_BD after the last id of each row; all but that is read once, as the longest row has it."""
    device, longest = model.device, max(rows, key=len)
    read = model.empty_cache(1, len(longest) - 1)
    model(torch.tensor([longest[:-1]], device=device), read)
    states = []
    for start in range(0, len(rows), micro_batch):
        some = rows[start : start + micro_batch]
        copies = model.empty_cache(len(some), len(longest))
        into = torch.arange(len(some), device=device)
        copies.fill(into, read, torch.zeros_like(into))
        copies.cut(torch.tensor([len(row) - 1 for row in some], device=device))
        states.append(model(torch.tensor([row[-1:] for row in some], device=device), copies)[:, 0])
    return torch.cat(states)


@torch.no_grad()
def read_states(
    head: Any,
    hidden_MD: Tensor,
    reading: Reading,
    *,
    end_ids: Sequence[int],
    side: Side,
    block: int = BLOCK,
    read_on: Callable[[Sequence[Sequence[int]]], Tensor] | None = None,
) -> Score:
    """The score of a completion whose states are known; arguments as in `Score` and `score`.

    Args:
        read_on: the state after the last id of each row, for `score`'s `other_paths`. All but these
            ids are the beginning of one row.
    """
    ids_T = torch.tensor(reading.ids, dtype=torch.int64, device=hidden_MD.device)
    logps = [hidden_MD.new_zeros(0)]
    best: list[tuple[Tensor, Tensor]] = []
    measures = [torch.zeros(0, 5)]
    longer = Longer(reading, side, other_paths=read_on is not None)
    end_logp = float("-inf")
    for start in range(0, len(hidden_MD), block):
        logits_NV = head.logits(hidden_MD[start : start + block])
        if start + block >= len(hidden_MD):
            end_logp = float(logits_NV[-1].log_softmax(-1)[list(end_ids)].logsumexp(0))
        prob_NV = logits_NV.softmax(-1)
        best.append(tuple(prob_NV.max(-1)))
        longer.add(prob_NV)
        ids_N = ids_T[start : start + block]
        logits_NV, prob_NV = logits_NV[: len(ids_N)], prob_NV[: len(ids_N)]
        logp_N = logp_of(logits_NV, prob_NV, ids_N)
        logps.append(logp_N)
        measures.append(_measured(prob_NV, logp_N, ids_N, side))
    logp_T = torch.cat(logps).cpu()
    best_prob_M, best_id_M = (torch.cat(part).cpu() for part in zip(*best, strict=True))
    branches = longer.branches(logp_T.tolist())
    if branches and read_on is not None:
        longer.follow(branches, head.logits(read_on([one.row for one in branches])).softmax(-1))
    carried, inside = longer.carried(logp_T.tolist())
    return Score(
        hidden_MD, logp_T, end_logp, torch.cat(measures), best_id_M, best_prob_M, carried, inside
    )


def _measured(prob_NV: Tensor, logp_N: Tensor, ids_N: Tensor, side: Side) -> Tensor:
    return torch.stack(measure(prob_NV, logp_N, ids_N, side), dim=1).cpu()


def score_of(
    told: Told, reading: Reading, *, end_ids: Sequence[int], side: Side, block: int = BLOCK
) -> Score:
    """The score of a completion from what was told of it; arguments as in `score`.

    Of tokens that are not listed nothing is guessed: they are no part of what is carried over a
    boundary, of the end of turn or of the masses, and they make up `Listed.tail_M`. Inside chunks
    nothing is looked up.
    """
    n, n_ids = len(reading.ids), len(side.spelling)
    logp_T, logp_end = told.logp_M[:n].float(), float(told.logp_M[n])
    nothing_MD = torch.zeros(n + 1, 0)
    if told.id_MK.shape[1] == 0:
        measures_T5 = torch.tensor([[0.0, 0.0, math.nan, math.nan, math.nan]]).expand(n, 5)
        unknown_M = torch.full((n + 1,), -1), torch.full((n + 1,), math.nan)
        return Score(nothing_MD, logp_T, logp_end, measures_T5, *unknown_M, carried={})
    inside_MK = told.id_MK < n_ids  # rows of padding beyond them are in no event
    id_MK = told.id_MK.where(inside_MK, 0)
    prob_MK = told.logp_MK.exp()
    own_MK = prob_MK.where(inside_MK, 0.0).float()
    column_MK = side.column_V.cpu()[id_MK].where(inside_MK, side.n_events + 1)
    is_listed_MK = told.logp_MK > -math.inf
    column_MK = column_MK.where(is_listed_MK, column_MK[:, :1])
    n_listed_M = (is_listed_MK & inside_MK).sum(1)
    rest_M = (1 - prob_MK.sum(1)).clamp(min=ROUNDING)
    tail_M = torch.where(n_listed_M < n_ids, rest_M, 0.0).float()
    longer, measures = Longer(replace(reading, inside=()), side), [torch.zeros(0, 5)]
    ids_T, device = torch.tensor(reading.ids, dtype=torch.int64), side.event_V.device
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        prob_NV = torch.zeros(rows.stop - start, n_ids).scatter_add_(1, id_MK[rows], own_MK[rows])
        prob_NV = prob_NV.to(device)
        measures.append(_measured(prob_NV, logp_T[rows].to(device), ids_T[rows].to(device), side))
        longer.add(prob_NV)
    measures_T5 = torch.cat(measures)
    measures_T5[:, 3] = (measures_T5[:, 3] - tail_M[:n]).clamp(min=0)  # it is not known where
    ends_J = told.logp_MK[n][torch.isin(told.id_MK[n], torch.tensor(end_ids))]
    best_prob_M, best_M = own_MK.max(1)
    return Score(
        nothing_MD, logp_T, float(ends_J.logsumexp(0)), measures_T5,
        id_MK.gather(1, best_M[:, None])[:, 0], best_prob_M, longer.carried(logp_T.tolist())[0], {},
        Listed(column_MK, prob_MK.float(), tail_M),
    )  # fmt: skip
