# SPDX-License-Identifier: Apache-2.0
"""A completion and its predictions in, what the tokens not taken say of the text after a boundary out.

A boundary is information: it says that no longer token was taken there. Where the teacher would have
written `hello` and the text has `hel`, `hello` still says `lo`. This is looked up for the start of each
chunk, where the teacher has a boundary and a prediction of its own, and for the student's boundaries
inside chunks, where it has none and its longer tokens say all that it thinks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minigold.events import Ids, Side

__all__ = ["CARRY_FROM", "Carried", "Inside", "Longer", "Reading"]

CARRY_FROM = 1e-3  # an overhang under this is left out
BRANCH_FROM = 0.05  # other tokens under this are not followed
FOLLOW_FROM = 1e-4  # of what follows a token, tokens under this are left out,
MOST_FOLLOW = 256  # ... and all but so many
INSIDE_FROM = 0.05  # text that the teacher found less likely than this is not looked into
MOSTLY = 0.9  # of what the teacher says inside a chunk has to be known

Masses = npt.NDArray[np.float64]  # of tokens, or of events


class Inside(NamedTuple):
    """A boundary of the student's inside a chunk, where the teacher has none.

    Args:
        at: the student token that follows.
        start: the teacher token at the chunk's start.
        taken: the student's tokens from the chunk's start to here, at least one: the bytes and the
            event of each.
        follows: bytes and event of the student's token after it.
        spaces: the fewest that the student has one token for together with the last of these; 0 for none.
            If more were to come, it would have taken that or a longer one: tokens that say so have
            no say here.
    """

    at: int
    start: int
    taken: Sequence[tuple[bytes, int]]
    follows: tuple[bytes, int] = (b"", 0)
    spaces: int = 0


@dataclass(frozen=True)
class Reading:
    """What a model reads: its prompt and a completion.

    Args:
        starts: the token before which each chunk starts, 0 left out.
        opaque: tokens of unscorable chunks; nothing is carried over them or out of them, since
            their own spellings are not the text.
        taken: at chunk starts, the event that the student took there: it tells longer tokens apart.
            Where there is none, that of the completion's own token.
        inside: boundaries inside chunks, of the student's alone.
    """

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    starts: Sequence[int] = ()
    opaque: Collection[int] = ()
    taken: Mapping[int, int] = field(default_factory=dict)
    inside: Sequence[Inside] = ()


@dataclass(frozen=True)
class Carried:
    """What longer tokens, over a boundary, say of the text that follows. On the CPU.

    Args:
        event_K: int64, the event of what such a token adds.
        mass_K: float64, its share of all that is known of the text there; their sum is the
            overhang, and the rest is the prediction after the token that was taken.
        stay: nats, ln(1 - overhang).
    """

    event_K: Tensor
    mass_K: Tensor
    stay: float


class Longer:
    """The tokens that reach over boundaries, and their probabilities, noted block by block.

    Args:
        other_paths: notes as well the other tokens that a chunk begins with, see `branches`.
    """

    def __init__(self, reading: Reading, side: Side, *, other_paths: bool = False) -> None:
        self.reading, self.side, self.other_paths = reading, side, other_paths
        text = _Text(reading, side)
        self.covers = _covers(text) if side.carries else []
        self.begins = _begins(text) if side.carries and other_paths else []
        self.masses: list[Masses] = []
        self.begun: list[Masses] = []
        self.followed: list[tuple[int, tuple[Ids, Masses]]] = []
        self.after: dict[int, dict[int, _Next]] = {}  # by place and token
        self.wanted = {one.at for one in self.covers if one.reached_by(text.spelled[one.at])}
        self.n_done = 0

    def add(self, prob_NV: Tensor) -> None:
        """The predictions in the place of the next tokens."""
        for wanted, found in ((self.covers, self.masses), (self.begins, self.begun)):
            stop = bisect_left(wanted, self.n_done + len(prob_NV), key=attrgetter("at"))
            found.extend(_masses(prob_NV, self.n_done, wanted[len(found) : stop]))
        before = range(self.n_done - 1, self.n_done - 1 + len(prob_NV))
        places = [at for at in before if at in self.wanted]
        for at, one in zip(places, _nexts(prob_NV[[at - before[0] for at in places]]), strict=True):
            self.after[at] = {self.reading.ids[at]: one}
        self.n_done += len(prob_NV)

    def branches(self, logp: Sequence[float]) -> list[_Branch]:
        """Other tokens that much speaks for, which are read on from.

        Those that begin like the rest of their chunk; and those over a chunk's start that end in a
        space, since the student may have one token for it and the word that follows.
        """
        found: dict[tuple[int, int], _Branch] = {}
        for one, mass_K in zip(self.begins, self.begun, strict=True):
            path = math.exp(min(-sum(logp[one.at : one.end]), 600.0))
            before = math.exp(sum(logp[one.start : one.at]))
            for i, mass in zip(one.ids.tolist(), mass_K.tolist(), strict=True):
                left = one.text[len(self.side.spelling[i]) :]
                if left and before * mass > BRANCH_FROM:
                    row = self._row(one.at, i)
                    found[one.at, i] = _Branch(row, one.at, one.end, left, mass * path)
        for cover, mass_K in zip(self.covers, self.masses, strict=True):
            if cover.inside is None and self.other_paths:
                for i in cover.ids[mass_K > BRANCH_FROM].tolist():
                    if self.side.spelling[i].endswith(b" "):
                        row = self._row(cover.at, i)
                        found[cover.at, i] = _Branch(row, cover.at, cover.start, b"", 0.0)
        return list(found.values())

    def _row(self, at: int, i: int) -> list[int]:
        return [*self.reading.prompt_ids, *self.reading.ids[:at], i]

    def follow(self, branches: Sequence[_Branch], prob_BV: Tensor) -> None:
        """Of the branches: the predictions after them. Their tokens over the end are covers, too."""
        for one, prob_V, after in zip(branches, prob_BV, _nexts(prob_BV), strict=True):
            self.after.setdefault(one.at, {})[one.row[-1]] = after
            if one.left:
                ids, rests = self.side.longer(one.left, None)
                prob_K = prob_V[torch.from_numpy(ids).to(prob_V.device)]
                self.followed.append((one.end, (rests, one.mass * prob_K.cpu().double().numpy())))

    def carried(self, logp: Sequence[float]) -> tuple[dict[int, Carried], dict[int, Carried]]:
        """By chunk start (token), and by `Inside.at`: the longer tokens from every token before.

        Inside a chunk they have to be nearly all that is known of the text, and then are the law.
        Where it is known what follows such a token, that is what its rest goes on with.

        Source: 2410.09303, the next bytes from the tokens that cover them. Differs: tokens that were
        another event at a boundary on the way are left out, as the comparison there has told them
        apart already; events take the place of bytes.
        """
        starts: dict[int, list[tuple[Ids, Masses]]] = {}
        inside: dict[tuple[int, int], list[tuple[Ids, Masses]]] = {}
        for cover, mass_K in zip(self.covers, self.masses, strict=True):
            # beside the path over the tokens between, or at its end
            path = sum(logp[cover.start : cover.at]) - sum(logp[cover.at : cover.start])
            part = self._going_on(cover, mass_K * math.exp(min(path, 600.0)))
            if cover.inside is not None:
                inside.setdefault((cover.inside.at, cover.start), []).append(part)
            elif part[1].sum() > 0.1 * CARRY_FROM:
                starts.setdefault(cover.start, []).append(part)
        for start, part in self.followed:
            starts.setdefault(start, []).append(part)
        beside = {start: _beside(*_summed(parts)) for start, parts in starts.items()}
        beside = {start: one for start, one in beside.items() if len(one.event_K)}
        laws = {}
        for (at, start), parts in inside.items():
            known = math.exp(-beside[start].stay) if start in beside else 1.0
            if law := _alone(*_summed(parts), INSIDE_FROM * known):
                laws[at] = law
        return beside, laws

    def _going_on(self, cover: _Cover, mass_K: Masses) -> tuple[Ids, Masses]:
        """The events of a cover, and the mass of each."""
        events, masses = [cover.rests], [mass_K]
        for i, after in self.after.get(cover.at, {}).items():
            of_it_K = (cover.ids == i) & (cover.rests >= 0)
            if of_it_K.any():
                found, shares = self._rests_on(cover, i, after)
                events.append(found)
                masses.append(mass_K[of_it_K] * shares)
                masses[0] = np.where(of_it_K, 0.0, masses[0])
        return np.concatenate(events), np.concatenate(masses)

    def _rests_on(self, cover: _Cover, i: int, after: _Next) -> tuple[Ids, Masses]:
        """Of a token whose next ones are known: the events of its rest and them, and their shares.

        Where that is the text itself, the student's own token says how it cuts the text.
        """
        rest, whole = self.side.spelling[i][len(cover.text) :], self._behind(cover)
        own = cover.next_event(rest, self.side.event_on(rest, whole[len(rest) :]))
        more = [self.side.spelling[j] for j in after.ids]  # nothing, where the turn ends
        events_J = [
            own if one and whole.startswith(rest + one) else self.side.event_on(rest, one)
            for one in more
        ]
        apart_J = [cover.tells_apart(rest + one) for one in more]
        return np.array(events_J, dtype=np.int64), np.where(apart_J, 0.0, after.share_J)

    def _behind(self, cover: _Cover) -> bytes:
        """The text itself behind the boundary, as far as two tokens can reach."""
        reach = 2 * self.side.longest
        ids = self.reading.ids[cover.at : cover.at + len(cover.text) + reach]
        text = b"".join(self.side.spelling[i] for i in ids)
        return text[len(cover.text) :][:reach]


class _Branch(NamedTuple):
    """A token other than the completion's, at `at` after all before it: `Longer.branches`.

    Its chunk ends before token `end`, `left` is what is missing of its text (nothing if it reaches
    over the end), `mass` its probability beside that of the path that was taken, 1.
    """

    row: list[int]
    at: int
    end: int
    left: bytes
    mass: float


class _Begin(NamedTuple):
    """Tokens that `text` begins with, other than the one at `at`; `text` ends the chunk.

    The chunk is that of the tokens from `start` to `end`.
    """

    start: int
    at: int
    end: int
    text: bytes
    ids: Ids


def _begins(text: _Text) -> list[_Begin]:
    """All of them, by `at`.

    A tokenizer cuts a text by what follows: if a student writes eight spaces and a word where the
    teacher would have written seven and then ` if`, its eight spaces are a token that the teacher
    gives nothing, although it wanted these very bytes. What it wanted there shows on the other path.
    """
    found, opaque = [], text.reading.opaque
    for start, end in pairwise(text.taken):
        spelled = text.spelled[start:end]
        if not all(spelled) or any(t in opaque for t in range(start, end)):
            continue
        for at in range(start, end):
            left = b"".join(text.spelled[at:end])
            event = text.taken[at] if at == start else None
            others = text.shorter(left, event, but=text.spelled[at])
            if others:
                found.append(_Begin(start, at, end, left, np.array(others, dtype=np.int64)))
    return found


class _Next(NamedTuple):
    """What follows a token: the likeliest ids, and the share of each."""

    ids: list[int]
    share_J: Masses


def _nexts(prob_NV: Tensor) -> list[_Next]:
    """Of each row; all but the likeliest tokens are left out, and these scaled up."""
    near_NV = prob_NV >= prob_NV.amax(1, keepdim=True).clamp(max=FOLLOW_FROM)
    row_J, id_J = near_NV.nonzero(as_tuple=True)
    mass_J, stop_N = prob_NV[row_J, id_J].cpu().double().numpy(), near_NV.sum(1).cumsum(0).tolist()
    ids, found = id_J.cpu().numpy(), []
    for start, stop in pairwise([0, *stop_N]):
        best_F = start + np.argsort(-mass_J[start:stop])[:MOST_FOLLOW]
        found.append(_Next(ids[best_F].tolist(), mass_J[best_F] / mass_J[best_F].sum()))
    return found


class _Cover(NamedTuple):
    """Tokens that begin at token `at` and reach over a boundary, and the events of their rests.

    `text` is what they begin with, up to the boundary. That is the start of the chunk at token `start`,
    or stands inside it before the student's token `inside`. There tokens that end at the boundary or
    before are among them, with a rest of -1: what they say of the text after it is not known.
    """

    start: int
    inside: Inside | None
    at: int
    text: bytes
    ids: Ids
    rests: Ids

    def reached_by(self, spelled: bytes) -> bool:
        """Whether a token is one of those that reach over the boundary."""
        return spelled.startswith(self.text) and len(spelled) > len(self.text)

    def next_event(self, rest: bytes, other: int) -> int:
        """Of the text itself after the boundary: what the student took there, if it is longer than the `rest`."""
        spelled, event = (b"", other) if self.inside is None else self.inside.follows
        return event if len(spelled) > len(rest) else other

    def tells_apart(self, rest: bytes) -> bool:
        """Whether the student would not have made this boundary, see `Inside.spaces`."""
        fewest = 0 if self.inside is None else self.inside.spaces
        return fewest > 0 and rest.startswith(b" " * (fewest + 1))


def _covers(text: _Text) -> list[_Cover]:
    """All of them, by `at`."""
    starts = text.reading.starts
    found = [_Cover(start, None, *one) for start in starts for one in text.before(start)]
    for one in text.reading.inside:
        left = b"".join(spelled for spelled, _ in one.taken)
        told, size = [], len(left)
        for spelled, event in one.taken:
            told.append((size, event))
            size -= len(spelled)
        for parts in (text.before, text.behind):
            found += [
                _Cover(one.start, one, *part) for part in parts(one.start, left, told, one.spaces)
            ]
    return sorted(found, key=attrgetter("at"))


Passed = Sequence[tuple[int, int]]  # boundaries on the way: bytes from there, and the event taken
Part = tuple[int, bytes, Ids, Ids]  # `at`, `text`, `ids` and `rests` of a `_Cover`


class _Text:
    """A reading, and what in it longer tokens are looked up by.

    `spelled`: the bytes of each token. `taken`: the event at 0 and at each chunk's start, in order.
    `reached`: by token, those before it at which a longer one can begin, the nearest first; it begins
    with all that is between.
    """

    def __init__(self, reading: Reading, side: Side) -> None:
        self.reading, self.side = reading, side
        self.spelled = [side.spelling[i] for i in reading.ids]
        own = [side.event_of(spelled) for spelled in (*self.spelled, b"")]  # the end is none
        self.taken = {at: reading.taken.get(at, own[at]) for at in (0, *reading.starts)}
        self.reached: dict[int, list[int]] = {}
        for at in range(len(self.spelled) - 1, -1, -1):
            text = b""
            for stop in range(at, len(self.spelled)):
                text += self.spelled[stop]
                if stop in reading.opaque or not self.spelled[stop] or not side.goes_on(text):
                    break
                self.reached.setdefault(stop + 1, []).append(at)

    def before(
        self, start: int, text: bytes = b"", told: Passed = (), spaces: int = 0
    ) -> Iterator[Part]:
        """Tokens that begin before `start` and reach over the `text` there."""
        for at in self.reached.get(start, ()):
            whole, passed = text, list(told)
            for k in range(start - 1, at, -1):
                whole = self.spelled[k] + whole
                if k in self.taken:
                    passed.append((len(whole), self.taken[k]))
            whole = self.spelled[at] + whole
            ids, rests = self.side.longer(whole, self.taken.get(at), passed, spaces)
            if len(ids):
                yield at, whole, ids, rests

    def behind(self, start: int, text: bytes, told: Passed, spaces: int) -> Iterator[Part]:
        """Tokens that begin at `start`, or behind it, and reach over the `text` there, or end in it."""
        for at in range(start, len(self.spelled)):
            taken = self.spelled[at]
            goes_on = bool(taken) and text.startswith(taken)
            event = told[0][1] if at == start else None
            apart = [one for one in told if one[0] < len(text)]
            ids, rests = self.side.longer(text, event, apart, spaces)
            ends = self.shorter(text, event, but=taken if goes_on else b"")
            of_ends = np.array(ends, dtype=np.int64)
            yield at, text, np.append(ids, of_ends), np.append(rests, np.full_like(of_ends, -1))
            if not goes_on:
                break
            text = text[len(taken) :]

    def shorter(self, text: bytes, event: int | None, *, but: bytes) -> list[int]:
        """Tokens that the text begins with, itself among them; with an `event` those of this event."""
        spelling, of_id = self.side.spelling, self.side.event_of_id
        found = self.side.begins(text)
        return [i for i in found if spelling[i] != but and event in (None, of_id[i])]


def _masses(prob_NV: Tensor, start: int, wanted: Sequence[_Cover | _Begin]) -> list[Masses]:
    """Probability of each of the tokens, from rows that start at token `start`."""
    if not wanted:
        return []
    sizes = [len(one.ids) for one in wanted]
    row_J = np.repeat([one.at - start for one in wanted], sizes)
    id_J = np.concatenate([one.ids for one in wanted])
    place_2J = torch.from_numpy(np.stack([row_J, id_J])).to(prob_NV.device)
    mass_J = prob_NV[place_2J[0], place_2J[1]].cpu().double().numpy()
    return np.split(mass_J, np.cumsum(sizes)[:-1])


def _summed(parts: Sequence[tuple[Ids, Masses]]) -> tuple[Ids, Masses]:
    """Events, and the mass of each."""
    events, place = np.unique(np.concatenate([event for event, _ in parts]), return_inverse=True)
    mass = np.zeros(len(events))
    np.add.at(mass, place, np.concatenate([mass for _, mass in parts]))
    return events, mass


def _beside(events: Ids, mass: Masses) -> Carried:
    """Masses beside 1, the prediction after the taken token, as shares of the sum."""
    mass = mass * (mass > 0.01 * CARRY_FROM * (1 + mass.sum()))
    if mass.sum() <= CARRY_FROM:
        mass = mass * 0
    known = 1 + float(mass.sum())
    return _carried(events, mass / known, -math.log(known))


def _alone(events: Ids, mass: Masses, least: float) -> Carried | None:
    """Masses as shares of the known ones, if these are nearly all; -1 is not known."""
    is_known = events >= 0
    known = mass[is_known].sum()
    if not (known > least and known >= MOSTLY * mass.sum()):  # NaN is no law
        return None
    kept = np.where(is_known & (mass > 0.01 * CARRY_FROM * known), mass, 0.0)
    return _carried(events, kept / kept.sum(), -math.inf)


def _carried(events: Ids, mass: Masses, stay: float) -> Carried:
    kept = mass > 0
    return Carried(torch.from_numpy(events[kept]), torch.from_numpy(mass[kept]), stay)
