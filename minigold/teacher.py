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
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigold.events import Side, measure
from minigold.sample import CausalLM, completion_states, logp_of, pad

__all__ = [
    "CARRY_FROM",
    "Carried",
    "Listed",
    "Reading",
    "Score",
    "Told",
    "read_states",
    "score",
    "score_of",
]

CARRY_FROM = 1e-3  # an overhang under this is left out
BLOCK = 16  # positions at a time
BRANCH_FROM = 0.05  # other tokens under this are not followed
ROUNDING = 1e-7  # of float32 sums: what is not listed counts as this at least


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
        listed: what is known of the distributions, where there are no states.
    """

    hidden_MD: Tensor
    logp_T: Tensor
    end_logp: float
    measures_T5: Tensor
    best_id_M: Tensor
    best_prob_M: Tensor
    carried: dict[int, Carried]
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
            them, a row each: see `_begins`.
        block: positions whose logits exist at a time.
    """
    head = model.head if temperature == 1 else model.head._replace(temperature=temperature)
    order = sorted(
        range(len(readings)), key=lambda i: -len(readings[i].prompt_ids) - len(readings[i].ids)
    )
    scores: dict[int, Score] = {}

    def read_on(rows: Sequence[Sequence[int]]) -> Tensor:
        parts = (rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch))
        states = [
            hidden_SD[len(row) - 1]
            for some in parts
            for hidden_SD, row in zip(model(pad(some, model.device)), some, strict=True)
        ]
        return torch.stack(states)

    for start in range(0, len(order), micro_batch):
        chosen = order[start : start + micro_batch]
        rows = [[*readings[i].prompt_ids, *readings[i].ids] for i in chosen]
        for hidden_SD, i in zip(model(pad(rows, model.device)), chosen, strict=True):
            one = readings[i]
            states_MD = completion_states(hidden_SD, len(one.prompt_ids), len(one.ids)).clone()
            scores[i] = read_states(
                head, states_MD, one, end_ids=end_ids, side=side, block=block,
                read_on=read_on if other_paths else None,
            )  # fmt: skip
    return [scores[i] for i in range(len(readings))]


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
        read_on: the state after the last id of each row, for `score`'s `other_paths`.
    """
    ids_T = torch.tensor(reading.ids, dtype=torch.int64, device=hidden_MD.device)
    logps = [hidden_MD.new_zeros(0)]
    best: list[tuple[Tensor, Tensor]] = []
    noted = _Notes(reading, side, other_paths=read_on is not None)
    end_logp = float("-inf")
    for start in range(0, len(hidden_MD), block):
        logits_NV = head.logits(hidden_MD[start : start + block])
        if start + block >= len(hidden_MD):
            end_logp = float(logits_NV[-1].log_softmax(-1)[list(end_ids)].logsumexp(0))
        prob_NV = logits_NV.softmax(-1)
        best.append(tuple(prob_NV.max(-1)))
        ids_N = ids_T[start : start + block]
        logits_NV, prob_NV = logits_NV[: len(ids_N)], prob_NV[: len(ids_N)]
        logp_N = logp_of(logits_NV, prob_NV, ids_N)
        logps.append(logp_N)
        noted.add(prob_NV, logp_N, ids_N)
    logp_T = torch.cat(logps).cpu()
    best_prob_M, best_id_M = (torch.cat(part).cpu() for part in zip(*best, strict=True))
    branches = noted.branches(logp_T.tolist())
    if branches and read_on is not None:
        noted.follow(branches, head.logits(read_on([one.row for one in branches])).softmax(-1))
    carried = noted.carried(logp_T)
    return Score(hidden_MD, logp_T, end_logp, noted.measures_T5, best_id_M, best_prob_M, carried)


def score_of(
    told: Told, reading: Reading, *, end_ids: Sequence[int], side: Side, block: int = BLOCK
) -> Score:
    """The score of a completion from what was told of it; arguments as in `score`.

    Of tokens that are not listed nothing is guessed: they are no part of what is carried over a
    boundary, of the end of turn or of the masses, and they make up `Listed.tail_M`.
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
    noted, ids_T = _Notes(reading, side), torch.tensor(reading.ids, dtype=torch.int64)
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        prob_NV = torch.zeros(rows.stop - start, n_ids).scatter_add_(1, id_MK[rows], own_MK[rows])
        noted.add(*(x.to(side.event_V.device) for x in (prob_NV, logp_T[rows], ids_T[rows])))
    measures_T5 = noted.measures_T5
    measures_T5[:, 3] = (measures_T5[:, 3] - tail_M[:n]).clamp(min=0)  # it is not known where
    ends_J = told.logp_MK[n][torch.isin(told.id_MK[n], torch.tensor(end_ids))]
    best_prob_M, best_M = own_MK.max(1)
    return Score(
        nothing_MD, logp_T, float(ends_J.logsumexp(0)), measures_T5,
        id_MK.gather(1, best_M[:, None])[:, 0], best_prob_M, noted.carried(logp_T),
        Listed(column_MK, prob_MK.float(), tail_M),
    )  # fmt: skip


class _Notes:
    """What is noted of predictions, block by block in their order."""

    def __init__(self, reading: Reading, side: Side, *, other_paths: bool = False) -> None:
        self.reading, self.side = reading, side
        self.covers = _covers(reading, side) if side.carries else []
        self.begins = _begins(reading, side) if side.carries and other_paths else []
        self.masses: list[Tensor] = []
        self.begun: list[Tensor] = []
        self.followed: list[tuple[int, tuple[Tensor, Tensor]]] = []
        self.measures = [torch.zeros(0, 5)]
        self.n_done = 0

    def add(self, prob_NV: Tensor, logp_N: Tensor, ids_N: Tensor) -> None:
        """Of the next tokens: the predictions in their place, their log-probabilities, their ids."""
        self.measures.append(torch.stack(measure(prob_NV, logp_N, ids_N, self.side), dim=1).cpu())
        for wanted, found in ((self.covers, self.masses), (self.begins, self.begun)):
            stop = bisect_left(wanted, self.n_done + len(ids_N), key=attrgetter("at"))
            found.extend(_masses(prob_NV, self.n_done, wanted[len(found) : stop]))
        self.n_done += len(ids_N)

    @property
    def measures_T5(self) -> Tensor:
        return torch.cat(self.measures)

    def branches(self, logp: Sequence[float]) -> list[_Branch]:
        """Other tokens that much speaks for: as such, and beside those of the completion."""
        found = []
        for one, mass_K in zip(self.begins, self.begun, strict=True):
            path = math.exp(min(-sum(logp[one.at : one.end]), 600.0))
            before = math.exp(sum(logp[one.start : one.at]))
            for i, mass in zip(one.ids.tolist(), mass_K.tolist(), strict=True):
                left = one.text[len(self.side.spelling[i]) :]
                if left and before * mass > BRANCH_FROM and mass * path > BRANCH_FROM:
                    row = [*self.reading.prompt_ids, *self.reading.ids[: one.at], i]
                    found.append(_Branch(row, one.end, left, mass * path))
        return found

    def follow(self, branches: Sequence[_Branch], prob_BV: Tensor) -> None:
        """Of the branches: the predictions after them. Their tokens over the end are covers, too."""
        for one, prob_V in zip(branches, prob_BV, strict=True):
            ids, rests = self.side.longer(one.left, None)
            weighed = one.mass * prob_V[ids].double().cpu()
            self.followed.append((one.end, (rests.cpu(), weighed)))

    def carried(self, logp_T: Tensor) -> dict[int, Carried]:
        return _carried(self.covers, self.masses, logp_T.tolist(), self.followed)


class _Begin(NamedTuple):
    """Tokens that `text` begins with, other than the one at `at`; `text` ends the chunk.

    The chunk is that of the tokens from `start` to `end`.
    """

    start: int
    at: int
    end: int
    text: bytes
    ids: Tensor


class _Branch(NamedTuple):
    """Such a token after all before it; what is left of the text; its mass beside the path's, 1."""

    row: list[int]
    end: int
    left: bytes
    mass: float


def _begins(reading: Reading, side: Side) -> list[_Begin]:
    """All of them, by `at`.

    A tokenizer cuts a text by what follows: if a student writes eight spaces and a word where the
    teacher would have written seven and then ` if`, its eight spaces are a token that the teacher
    gives nothing, although it wanted these very bytes. What it wanted there shows on the other path.
    """
    found = []
    for start, end in pairwise([0, *reading.starts]):
        spelled = [side.spelling[i] for i in reading.ids[start:end]]
        if not all(spelled) or any(t in reading.opaque for t in range(start, end)):
            continue
        for at in range(start, end):
            text, taken = b"".join(spelled[at - start :]), spelled[at - start]
            event = side.event_of(taken) if at == start else None
            others = [
                i
                for i in side.begins(text)
                if side.spelling[i] != taken
                and (event is None or side.event_of(side.spelling[i]) == event)
            ]
            if others:
                found.append(_Begin(start, at, end, text, side.sorted_U.new_tensor(others)))
    return found


class _Cover(NamedTuple):
    """Tokens that begin at token `at` and reach over the start of the chunk at token `start`."""

    start: int
    at: int
    ids: Tensor
    rests: Tensor


def _covers(reading: Reading, side: Side) -> list[_Cover]:
    """All of them, by `at`."""
    shared, found = {0, *reading.starts}, []
    for start in reading.starts:
        text = b""
        told: list[tuple[int, int]] = []  # shared boundaries: bytes to the start, the event taken
        for at in range(start - 1, -1, -1):
            spelled = side.spelling[reading.ids[at]]
            text = spelled + text
            if at in reading.opaque or not spelled or len(text) >= side.longest:
                break
            event = side.event_of(spelled) if at in shared else None
            ids, rests = _told_apart(side, text, event, told)
            if len(ids):
                found.append(_Cover(start, at, ids, rests))
            if event is not None:
                told.append((len(text), event))
    return sorted(found, key=attrgetter("at"))


def _masses(prob_NV: Tensor, start: int, wanted: Sequence[_Cover | _Begin]) -> list[Tensor]:
    """Probability of each of the tokens, from rows that start at token `start`."""
    if not wanted:
        return []
    sizes = [len(one.ids) for one in wanted]
    row_K = torch.tensor([one.at - start for one in wanted])
    row_J = row_K.repeat_interleave(torch.tensor(sizes)).to(prob_NV.device)
    mass_J = prob_NV[row_J, torch.cat([one.ids for one in wanted])]
    return list(mass_J.cpu().double().split(sizes))


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
    covers: Sequence[_Cover], masses: Sequence[Tensor], logp: Sequence[float],
    followed: Sequence[tuple[int, tuple[Tensor, Tensor]]],
) -> dict[int, Carried]:  # fmt: skip
    """The longer tokens over each chunk's start, from every token before it that they begin at.

    Args:
        followed: of other paths: chunk start, events, and masses beside 1, the path that was taken.

    Source: 2410.09303, the next bytes from the tokens that cover them. Differs: tokens that were
    another event at a shared boundary are left out, as the comparison there has told them apart
    already; events take the place of bytes.
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for cover, mass_K in zip(covers, masses, strict=True):
        # of the tokens between, which the cover stands beside
        log_path = sum(logp[cover.at : cover.start])
        weighed_K = mass_K * math.exp(min(-log_path, 600.0))
        if float(weighed_K.sum()) > 0.1 * CARRY_FROM:
            found.setdefault(cover.start, []).append((cover.rests.cpu(), weighed_K))
    for start, part in followed:
        found.setdefault(start, []).append(part)
    summed = {start: _summed(parts) for start, parts in found.items()}
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
