# SPDX-License-Identifier: Apache-2.0
"""Rollouts of both sides in, the chunks to train and the rows that carry them out.

A `Rollout` is one answer as both models see it. `answer_of` aligns its two tokenizations,
`rollout_of` adds up chunk log-probabilities, `pack` names the states that the loss needs. The
student's training pass then runs no further than the last chosen chunk of a row.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from minigold.align import Chunks, align
from minigold.carry import CARRY_FROM, Carried, Inside, Reading
from minigold.data import Prompt
from minigold.events import CHUNK, Events
from minigold.loss import BEFORE, FIRST, INSIDE, REST, Carry, ChunkRows, Rows
from minigold.offsets import (
    BROKEN,
    CUT,
    EXACT,
    SPECIAL,
    encode_continuation,
    spans_of_ids,
    spans_of_text,
    text_of_ids,
)
from minigold.teacher import Score

__all__ = ["Answer", "Rollout", "answer_of", "head_rows", "needed_states", "pack", "rollout_of"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Answer:
    """A completion before the teacher has read it.

    Args:
        prompt_ids: of the student.
        ids: of the student; the last one is a stop id if `finished`.
        text: what the ids without the stop id say.
        spans: bytes of the text that each of these ids stands for, half-open.
        teacher_prompt_ids, teacher_ids: what the teacher reads.
        noncanonical: sampled tokens whose span is not in the encoding of their own text.
        chunks: C chunks, the end of turn included.
    """

    prompt: Prompt
    prompt_ids: list[int]
    ids: list[int]
    finished: bool
    on_policy: bool
    text: str
    teacher_prompt_ids: list[int]
    teacher_ids: list[int]
    noncanonical: int
    spans: list[tuple[int, int]]
    chunks: Chunks

    def reading(self, events: Events) -> Reading:
        """What the teacher reads, and, where events carry, where its longer tokens are asked."""
        if not events.carries:
            return Reading(self.teacher_prompt_ids, self.teacher_ids)
        c, event_S = self.chunks, events.student.event_V[self.ids].tolist()
        starts = zip(c.t0.tolist(), c.s0.tolist(), strict=True)
        flawed = zip(c.t0[c.flaw != EXACT], c.t1[c.flaw != EXACT], strict=True)
        return Reading(
            self.teacher_prompt_ids,
            self.teacher_ids,
            starts=sorted({int(t) for t in c.t0 if t}),
            opaque=frozenset(t for first, stop in flawed for t in range(first, stop)),
            taken={t: event_S[s] for t, s in starts},
            inside=_inside(self, events, event_S),
        )


@dataclass(frozen=True)
class Rollout:
    """One answer as both models see it; C chunks, the end of turn included.

    Args:
        student_logp_C, teacher_logp_C: float64, nats; NaN where not scorable. That the text goes on
            with the chunk's bytes, given the bytes before it: the sum of its tokens', with the
            longer tokens over its end added and those over its start left behind (overhang; of the
            student those that begin with its last token, which sampling measures). All chunks of a
            text still add up to the sum of all tokens.
        scorable_C: bool, the chunk has a log-probability on both sides.
        observed_C: bool, its probability becomes an event of its own. So does that of a chunk with
            broken bytes; the teacher reads text, and would never write them: its probability is 0.
        last_C: int64, the last student token that a comparison reads: the chunk's first one; where
            it is observed its last one, or the token after it if that is what broke the bytes.
        student_stay_C, teacher_stay_C: float64, nats, ln(1 - overhang) at the chunk's start, as far
            as it is carried over: 0 where the events carry nothing.
        overhang_C: float64, 0 to 1, at the chunk's start: the larger of the two sides.
        reach_C: int64, how many tokens before the chunk a longer token of the student's can stand for,
            which says how the text goes on.
        starts_C: bool, both models have read the same bytes before the chunk. Not where the student's
            token before it only began a character: the teacher has read U+FFFD, and what the
            student gives the chunk is what broke the character, which is compared already.
        student_measures_S5, teacher_measures_T5: `events.measure` of each token.
    """

    answer: Answer
    score: Score
    student_logp_C: Array
    teacher_logp_C: Array
    scorable_C: Array
    observed_C: Array
    last_C: Array
    student_stay_C: Array
    teacher_stay_C: Array
    overhang_C: Array
    reach_C: Array
    starts_C: Array
    student_measures_S5: Array
    teacher_measures_T5: Array

    @property
    def chunks(self) -> Chunks:
        return self.answer.chunks

    def comparable_C(self, events: Events, max_overhang: float) -> Array:
        """bool [C], chunks whose start is compared.

        With `strict` those of one token each, with `chunk` those that can be scored.
        """
        c, found_C = self.chunks, self.starts_C & ~(self.overhang_C > max_overhang)
        if events.kind == CHUNK:
            return found_C & self.observed_C & self.scorable_C
        if events.kind == "strict" and not events.identical:
            found_C = found_C & (c.s1 - c.s0 == 1) & (c.t1 - c.t0 == 1)
        return found_C


def answer_of(
    prompt: Prompt,
    prompt_ids: list[int],
    ids: list[int],
    *,
    finished: bool,
    on_policy: bool,
    teacher_prompt_ids: list[int],
    student_tokenizer: Tokenizer,
    teacher_tokenizer: Tokenizer,
    end_id: int,
    identical: bool,
) -> Answer:
    """Reads the student's ids as text, gives the text to the teacher's tokenizer, and aligns both.

    With identical tokenizers the teacher reads the student's own ids, as GKD does, and every token
    is a chunk. A stop id that is not the student's own `end_id` is `SPECIAL`; the last chunk of an
    answer that was cut off is `CUT` (of one tokenizer it is whole), since the teacher expected the
    word to go on.
    """
    said = ids[:-1] if finished else ids
    text = text_of_ids(student_tokenizer, said)
    spans = spans_of_ids(student_tokenizer, said)
    own = {(a, b) for a, b, _ in spans_of_text(student_tokenizer, text).tolist()}
    places = [(a, b) for a, b, _ in spans.tolist()]
    noncanonical = sum(place not in own for place in places)
    if identical:
        teacher_ids, chunks = list(said), _one_per_token(spans)
    else:
        teacher_ids, teacher_spans = encode_continuation(teacher_tokenizer, text)
        chunks = align(spans, teacher_spans)
    if finished:
        flaw = EXACT if ids[-1] == end_id else SPECIAL
        chunks = _with_end(chunks, len(spans), len(teacher_ids), len(text.encode("utf-8")), flaw)
    elif not identical and len(chunks.flaw) and chunks.flaw[-1] == EXACT:
        chunks = chunks._replace(flaw=np.append(chunks.flaw[:-1], CUT))
    return Answer(
        prompt, prompt_ids, ids, finished, on_policy, text, teacher_prompt_ids, teacher_ids,
        noncanonical, places, chunks,
    )  # fmt: skip


def _with_end(chunks: Chunks, n_student: int, n_teacher: int, size: int, flaw: int) -> Chunks:
    """The chunks, and one for the end of turn."""
    end = (n_student, n_student + 1, n_teacher, n_teacher + 1, size, size, flaw)
    return Chunks(*(np.append(column, x) for column, x in zip(chunks, end, strict=True)))


def _one_per_token(spans: Array) -> Chunks:
    """With identical tokenizers: flaws do not matter, since both sides have the same ids."""
    token = np.arange(len(spans), dtype=np.int64)
    start, end = spans[:, 0], spans[:, 1]
    return Chunks(token, token + 1, token, token + 1, start, end, np.zeros_like(token))


def rollout_of(
    answer: Answer,
    score: Score,
    *,
    student_logp_S: Array,
    student_measures_S5: Array,
    events: Events,
) -> Rollout:
    """Adds the tokens' log-probabilities of both sides up by chunk."""
    chunks = answer.chunks
    scorable_C = chunks.flaw == 0
    teacher_logp = np.append(score.logp_T.double().numpy(), score.end_logp)
    teacher_measures_T5 = score.measures_T5.double().numpy()
    student_stay_C = _stays(student_measures_S5, chunks.s0, chunks.s1, chunks.flaw)
    if events.carries:
        carried = score.carried
        teacher_stay_C = np.array([carried[t].stay if t in carried else 0.0 for t in chunks.t0])
    else:
        teacher_stay_C = _stays(teacher_measures_T5, chunks.t0, chunks.t1, chunks.flaw)
    overhang_C = -np.expm1(np.minimum(student_stay_C, teacher_stay_C))
    if not events.carries:
        student_stay_C = teacher_stay_C = np.zeros(len(overhang_C))
    student_logp_C = _chunk_logps(
        student_logp_S.astype(np.float64), chunks.s0, chunks.s1, student_stay_C
    )
    teacher_logp_C = _chunk_logps(teacher_logp, chunks.t0, chunks.t1, teacher_stay_C)
    breaks_C = _breaks_after(answer, events)
    observed_C = (scorable_C | _is_broken(answer)) & _is_observed(answer, chunks, events)
    return Rollout(
        answer,
        score,
        np.where(scorable_C, student_logp_C, np.nan),
        np.where(scorable_C, teacher_logp_C, np.nan),
        scorable_C,
        observed_C,
        np.where(observed_C, chunks.s1 - 1 + breaks_C, chunks.s0),
        student_stay_C,
        teacher_stay_C,
        overhang_C,
        _reach(answer, events, student_stay_C),
        np.append(True, breaks_C == 0)[: len(breaks_C)],
        student_measures_S5,
        teacher_measures_T5,
    )


def _stays(measures_N5: Array, first_C: Array, stop_C: Array, flaw_C: Array) -> Array:
    """ln(1 - overhang) at each chunk's start, by the last token before it, if that is the text's."""
    if len(first_C) == 0:
        return np.zeros(0)
    inside = (stop_C - first_C > 1)[:-1].astype(np.int64)
    after, exact = np.zeros(len(inside)), flaw_C[:-1] == EXACT
    after[exact] = measures_N5[stop_C[:-1][exact] - 1, inside[exact]]
    return np.concatenate(([0.0], after))


def _chunk_logps(logp: Array, first_C: Array, stop_C: Array, stay_C: Array) -> Array:
    """Sum of each chunk's tokens, longer tokens over its end added, those over its start left."""
    if len(first_C) == 0:
        return np.zeros(0)
    sums_C = np.add.reduceat(np.append(logp, 0.0), np.stack((first_C, stop_C), axis=1).ravel())[::2]
    return np.where(first_C < stop_C, sums_C, 0.0) + stay_C - np.append(stay_C[1:], 0.0)


def _is_observed(answer: Answer, chunks: Chunks, events: Events) -> Array:
    """bool [C]: the chunk is made an event of its own, if its probability is known."""
    if events.kind == "prefix":
        return ~_is_one_event(answer, chunks, events)
    return np.full(len(chunks.s0), events.kind == CHUNK)


def _is_broken(answer: Answer) -> Array:
    """bool [C]: bytes that are not UTF-8, and not for being cut off at the end."""
    broken_C = answer.chunks.flaw == BROKEN
    if len(broken_C) and not answer.finished:
        broken_C[-1] = False
    return np.asarray(broken_C)


def _breaks_after(answer: Answer, events: Events) -> Array:
    """int64 [C], 1 where a broken chunk's last character only lacks bytes: the next token broke it."""
    found_C, spelling = np.zeros_like(answer.chunks.s0), events.student.spelling
    for c in np.flatnonzero(_is_broken(answer)):
        ids = answer.ids[answer.chunks.s0[c] : answer.chunks.s1[c]]
        said = codecs.getincrementaldecoder("utf-8")(errors="replace")
        said.decode(b"".join(spelling[i] for i in ids))
        found_C[c] = bool(said.getstate()[0])
    return found_C


def _inside(answer: Answer, events: Events, event_S: Sequence[int]) -> list[Inside]:
    """The student's boundaries inside chunks, and the one before a token that broke a character."""
    chunks, spelling, found = answer.chunks, events.student.spelling, []
    breaks_C = _breaks_after(answer, events)
    for c in np.flatnonzero((chunks.flaw == EXACT) | (breaks_C > 0)).tolist():
        first, stop = int(chunks.s0[c]), int(chunks.s1[c] + breaks_C[c])
        tokens = [(spelling[answer.ids[s]], event_S[s]) for s in range(first, stop)]
        if all(text for text, _ in tokens[:-1]):
            for n in range(1, len(tokens)):
                spaces = events.student.fewest_spaces(tokens[n - 1][0])
                start = int(chunks.t0[c])
                found.append(Inside(first + n, start, tokens[:n], tokens[n], spaces))
    return found


def _reach(answer: Answer, events: Events, stay_C: Array) -> Array:
    """int64 [C], tokens before each chunk, see `Rollout.reach_C`; of exact chunks alone."""
    chunks, side = answer.chunks, events.student
    found_C = (-np.expm1(stay_C) > CARRY_FROM).astype(np.int64)  # one: if its mass matters
    if not events.carries:
        return found_C
    chunk_of = {s: c for c, s in enumerate(chunks.s0.tolist())}
    exact_S = np.repeat(chunks.flaw == EXACT, chunks.s1 - chunks.s0)
    for s in np.flatnonzero(exact_S).tolist():
        path, text = [(answer.ids[s], s not in chunk_of)], side.spelling[answer.ids[s]]
        for stop in range(s + 1, len(exact_S)):
            if not side.goes_on(text):
                break
            if stop > s + 1 and stop in chunk_of and side.reaches_over(path):
                found_C[chunk_of[stop]] = max(found_C[chunk_of[stop]], stop - s)
            if not exact_S[stop]:
                break
            path.append((answer.ids[stop], stop not in chunk_of))
            text += side.spelling[answer.ids[stop]]
    return found_C


def _is_one_event(answer: Answer, chunks: Chunks, events: Events) -> Array:
    """bool [C]: one token on each side, and both stand for the same event by themselves.

    Of broken bytes: one token that nothing begins with, and that is an event.
    """
    if events.identical:
        return np.ones(len(chunks.s0), dtype=bool)
    single_C = chunks.s1 - chunks.s0 == 1
    at_end_C = chunks.t0 == len(answer.teacher_ids)
    student_C = torch.tensor(answer.ids, dtype=torch.int64)[torch.as_tensor(chunks.s0)]
    teacher_T = torch.tensor([*answer.teacher_ids, 0], dtype=torch.int64)
    teacher_C = teacher_T[torch.as_tensor(chunks.t0)]
    student, teacher = events.student, events.teacher
    same_C = student.event_V.cpu()[student_C] == teacher.event_V.cpu()[teacher_C]
    own_C = student.shared_V.cpu()[student_C].numpy() & single_C
    theirs_C = (chunks.t1 - chunks.t0 == 1) & (same_C & teacher.shared_V.cpu()[teacher_C]).numpy()
    stray_C = (chunks.flaw == BROKEN) & (_breaks_after(answer, events) == 0)
    return at_end_C | (own_C & (theirs_C | stray_C))


def needed_states(rollout: Rollout, chosen_C: Array) -> int:
    """Number of completion states (from the first) that the chosen chunks need; 0 for none."""
    picked = np.flatnonzero(chosen_C)
    if len(picked) == 0:
        return 0
    return int(rollout.last_C[picked].max()) + 1


def head_rows(rollout: Rollout) -> Array:
    """int64 [C], how often the student's head runs for each chunk if it is chosen."""
    every = range(len(rollout.last_C))
    return np.array([sum(len(rows) for rows, _ in _comparisons(rollout, c)) for c in every], int)


def pack(
    rollouts: Sequence[Rollout],
    chosen: Sequence[Array],
    *,
    student_starts: Sequence[int],
    teacher_starts: Sequence[int],
    teacher_end_id: int,
    weights: Sequence[Array] | None = None,
    starts_only: bool = False,
    device: torch.device | str = "cpu",
) -> ChunkRows:
    """The rows of the chosen chunks, end to end; of each those of its start, and then those inside.

    Each comparison counts as a chunk of `ChunkRows`.

    Args:
        chosen: a bool mask of chunks per rollout, at least one true in all.
        student_starts, teacher_starts: where each completion's states (state i predicts token i)
            start among those that the loss is given.
        weights: of each rollout's chosen chunks; 1 where there are none.
        starts_only: one comparison a chunk.
    """
    table: list[tuple[int, int, int, int]] = []  # place, chunk, id, kind of each student row
    carry: list[tuple[int, Carried]] = []
    teacher: list[tuple[int, int]] = []  # place, id
    logps: list[float] = []
    observed: list[bool] = []
    counts: list[int] = []
    for rollout, mask, s_start, t_start in zip(
        rollouts, chosen, student_starts, teacher_starts, strict=True
    ):
        ids = rollout.answer.ids
        for c in np.flatnonzero(mask).tolist():
            t, found = int(rollout.chunks.t0[c]), _comparisons(rollout, c)
            found = found[:1] if starts_only else found
            for n, (rows, carried) in enumerate(found):
                here = len(observed)
                table += [(s_start + s, here, ids[s], kind) for s, kind in rows]
                carry += [] if carried is None else [(here, carried)]
                place = t_start + t if n == 0 else -1
                teacher.append((place, [*rollout.answer.teacher_ids, teacher_end_id][t]))
                logps.append(rollout.teacher_logp_C[c] if rollout.scorable_C[c] else -math.inf)
                observed.append(n == 0 and bool(rollout.observed_C[c]))
            counts.append(len(found))
    place_C, id_C = torch.tensor(teacher, device=device).T.contiguous()
    weight_C = None if weights is None else np.repeat(np.concatenate(weights), counts)
    return ChunkRows(
        Rows(*torch.tensor(table, device=device).T.contiguous()),
        place_C,
        id_C,
        torch.tensor(logps, device=device, dtype=torch.float32),
        _joined(carry, torch.device(device)),
        torch.tensor(observed, device=device),
        None if weight_C is None else torch.tensor(weight_C, device=device).float(),
    )


StudentRows = list[tuple[int, int]]  # places among the completion's tokens, and their kinds


def _comparisons(rollout: Rollout, c: int) -> list[tuple[StudentRows, Carried | None]]:
    """Of a chunk: the one at its start, and those at the student's boundaries inside it.

    Inside there is one where nearly all that the teacher says there is known; its longer tokens are
    then the whole of its law. The student's are left out: what it says after the token it took is
    held to the teacher's law, and not what it says together with a longer token that it did not take.
    """
    chunks, score = rollout.chunks, rollout.score
    first, stop = int(chunks.s0[c]), int(rollout.last_C[c]) + 1
    rows = [(first, FIRST), *((place, REST) for place in range(first + 1, stop))]
    before = range(first - int(rollout.reach_C[c]), first)
    rows = [*((s, BEFORE if s in chunks.s0 else INSIDE) for s in before), *rows]
    start = rows, score.carried.get(int(chunks.t0[c]))
    inside = [s for s in range(first + 1, stop) if s in score.inside]
    return [start, *(([(s, FIRST)], score.inside[s]) for s in inside)]


def _joined(carry: Sequence[tuple[int, Carried]], device: torch.device) -> Carry:
    counts = torch.tensor([len(one.event_K) for _, one in carry], dtype=torch.int64)
    chunk_K = torch.tensor([c for c, _ in carry], dtype=torch.int64).repeat_interleave(counts)
    nothing = Carried(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 0.0)
    parts = [one for _, one in carry] or [nothing]
    event_K = torch.cat([one.event_K for one in parts])
    mass_K = torch.cat([one.mass_K for one in parts]).float()
    return Carry(chunk_K.to(device), event_K.to(device), mass_K.to(device))
