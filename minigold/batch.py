# SPDX-License-Identifier: Apache-2.0
"""Rollouts of both sides in, the chunks to train and the rows that carry them out.

A `Rollout` is one answer as both models see it. `rollout_of` aligns it and adds up chunk
log-probabilities; `pack` picks the states that the loss needs, so that the student's training
pass runs no further than the last chosen chunk of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minigold.align import Chunks, align
from minigold.data import Prompt
from minigold.events import Events
from minigold.loss import ChunkRows
from minigold.offsets import CUT, SPECIAL, encode_continuation, spans_of_ids, spans_of_text, text_of_ids
from minigold.teacher import Score

__all__ = ["Answer", "Rollout", "answer_of", "needed_states", "pack", "rollout_of"]

Array = npt.NDArray[Any]
TEXTLESS = Chunks(*(np.zeros(0, dtype=np.int64) for _ in Chunks._fields))


@dataclass(frozen=True)
class Answer:
    """A completion before the teacher has read it.

    Args:
        prompt_ids: of the student.
        ids: of the student; the last one is a stop id if `finished`.
        text: what the ids without the stop id say.
        spans, teacher_spans: [n, 3] as in `offsets`, of the text's tokens.
        teacher_prompt_ids, teacher_ids: what the teacher reads.
        noncanonical: sampled tokens whose span is not in the encoding of their own text.
    """

    prompt: Prompt
    prompt_ids: list[int]
    ids: list[int]
    finished: bool
    on_policy: bool
    text: str
    spans: Array
    teacher_prompt_ids: list[int]
    teacher_ids: list[int]
    teacher_spans: Array
    noncanonical: int


@dataclass(frozen=True)
class Rollout:
    """One answer as both models see it; C chunks, the end of turn included.

    Args:
        student_logp_C, teacher_logp_C: float64, nats; -inf..0, NaN where not scorable.
        scorable_C: bool, the chunk has a log-probability on both sides.
        observed_C: bool, its probability becomes an event of its own.
        overhang_C: float64, the larger of the two sides' overhang at the chunk's start.
        student_measures_S4, teacher_measures_T4: `events.measure` of each token.
    """

    answer: Answer
    score: Score
    chunks: Chunks
    student_logp_C: Array
    teacher_logp_C: Array
    scorable_C: Array
    observed_C: Array
    overhang_C: Array
    student_measures_S4: Array
    teacher_measures_T4: Array


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
    identical: bool,
) -> Answer:
    """Reads the student's ids as text and gives the text to the teacher's tokenizer.

    With identical tokenizers the teacher reads the student's own ids, as GKD does.
    """
    said = ids[:-1] if finished else ids
    text = text_of_ids(student_tokenizer, said)
    spans = spans_of_ids(student_tokenizer, said)
    own = {(a, b) for a, b, _ in spans_of_text(student_tokenizer, text).tolist()}
    noncanonical = sum((a, b) not in own for a, b, _ in spans.tolist())
    if identical:
        teacher_ids, teacher_spans = list(ids), spans
    else:
        teacher_ids, teacher_spans = encode_continuation(teacher_tokenizer, text)
    return Answer(
        prompt, prompt_ids, ids, finished, on_policy, text, spans,
        teacher_prompt_ids, teacher_ids, teacher_spans, noncanonical,
    )  # fmt: skip


def chunks_of(answer: Answer, *, end_id: int, identical: bool) -> Chunks:
    """The chunks of an answer: its text, then the end of turn if it finished.

    With identical tokenizers every token is a chunk. A stop id that is not the student's own
    end of turn is `SPECIAL`; the last chunk of an answer that was cut off is `CUT`, since the
    teacher expected the word to go on.
    """
    n, m = len(answer.spans), len(answer.teacher_ids)
    size = len(answer.text.encode("utf-8"))
    if identical:
        return _one_per_token(answer.spans, len(answer.ids), size)
    chunks = align(answer.spans, answer.teacher_spans) if n and m else TEXTLESS
    if answer.finished:
        flaw = 0 if answer.ids[-1] == end_id else SPECIAL
        end = (n, n + 1, m, m + 1, size, size, flaw)
        return Chunks(*(np.append(column, x) for column, x in zip(chunks, end, strict=True)))
    if len(chunks.flaw) and chunks.flaw[-1] == 0:
        return chunks._replace(flaw=np.append(chunks.flaw[:-1], CUT))
    return chunks


def _one_per_token(spans: Array, n: int, size: int) -> Chunks:
    starts = np.append(spans[:, 0], size)[:n]
    ends = np.append(spans[:, 1], size)[:n]
    token = np.arange(n, dtype=np.int64)
    return Chunks(token, token + 1, token, token + 1, starts, ends, np.zeros(n, dtype=np.int64))


def rollout_of(
    answer: Answer,
    score: Score,
    *,
    student_logp_S: Array,
    student_measures_S4: Array,
    events: Events,
    end_id: int,
) -> Rollout:
    """Aligns an answer and adds its tokens' log-probabilities up by chunk."""
    chunks = chunks_of(answer, end_id=end_id, identical=events.identical)
    teacher_logp = np.append(score.logp_T.double().numpy(), score.end_logp)
    scorable_C = chunks.flaw == 0
    if len(scorable_C) == 0:
        student_logp_C = teacher_logp_C = np.zeros(0)
    else:
        student_logp_C = np.add.reduceat(student_logp_S.astype(np.float64), chunks.s0)
        teacher_logp_C = np.add.reduceat(teacher_logp[: chunks.t1[-1]], chunks.t0)
    teacher_measures_T4 = score.measures_T4.double().numpy()
    return Rollout(
        answer,
        score,
        chunks,
        np.where(scorable_C, student_logp_C, np.nan),
        np.where(scorable_C, teacher_logp_C, np.nan),
        scorable_C,
        scorable_C & ~_is_one_event(answer, chunks, events, end_id),
        np.maximum(
            _before(student_measures_S4[:, 0], chunks.s0), _before(teacher_measures_T4[:, 0], chunks.t0)
        ),
        student_measures_S4,
        teacher_measures_T4,
    )


def _is_one_event(answer: Answer, chunks: Chunks, events: Events, end_id: int) -> Array:
    """bool [C]: one token on each side, and both stand for the same event by themselves."""
    if events.identical:
        return np.ones(len(chunks.s0), dtype=bool)
    student, teacher = events.student, events.teacher
    single_C = (chunks.s1 - chunks.s0 == 1) & (chunks.t1 - chunks.t0 == 1)
    at_end_C = chunks.t0 == len(answer.teacher_ids)
    student_C = torch.tensor(answer.ids, dtype=torch.int64)[torch.as_tensor(chunks.s0)]
    teacher_T = torch.tensor([*answer.teacher_ids, 0], dtype=torch.int64)
    teacher_C = teacher_T[torch.as_tensor(chunks.t0)]
    same_C = student.event_V.cpu()[student_C] == teacher.event_V.cpu()[teacher_C]
    both_C = student.shared_V.cpu()[student_C] & teacher.shared_V.cpu()[teacher_C]
    return at_end_C | (single_C & (same_C & both_C).numpy())


def _before(overhang_S: Array, first_C: Array) -> Array:
    """The overhang of the token that ends where each chunk starts; 0 at the start."""
    return np.concatenate([[0.0], overhang_S])[first_C]


def needed_states(rollout: Rollout, chosen_C: Array) -> int:
    """Number of completion states (from the first) that the chosen chunks need; 0 for none."""
    picked = np.flatnonzero(chosen_C)
    if len(picked) == 0:
        return 0
    last = np.where(rollout.observed_C, rollout.chunks.s1 - 1, rollout.chunks.s0)
    return int(last[picked].max()) + 1


def pack(
    rollouts: Sequence[Rollout],
    chosen: Sequence[Array],
    states: Sequence[Tensor],
    *,
    teacher_end_id: int,
) -> tuple[Tensor, Tensor, ChunkRows]:
    """Student states, teacher states and chunk rows of the chosen chunks, end to end.

    Args:
        chosen: a bool mask of chunks per rollout, at least one true in all.
        states: the student's completion states of each rollout (`needed_states` of them).
    """
    student, teacher = [], []
    rows: list[int] = []
    ids: list[int] = []
    teacher_ids: list[int] = []
    logps: list[float] = []
    observed: list[bool] = []
    for rollout, chosen_C, hidden_SD in zip(rollouts, chosen, states, strict=True):
        chunks, answer = rollout.chunks, rollout.answer
        picked = np.flatnonzero(chosen_C)
        places: list[int] = []
        for c in picked.tolist():
            last = chunks.s1[c] if rollout.observed_C[c] else chunks.s0[c] + 1
            places.extend(range(int(chunks.s0[c]), int(last)))
            rows.extend([len(observed)] * int(last - chunks.s0[c]))
            observed.append(bool(rollout.observed_C[c]))
        ids.extend(answer.ids[i] for i in places)
        tokens = [*answer.teacher_ids, teacher_end_id]
        teacher_ids.extend(tokens[i] for i in chunks.t0[picked].tolist())
        logps.extend(np.nan_to_num(rollout.teacher_logp_C[picked], nan=0.0).tolist())
        device = hidden_SD.device
        student.append(hidden_SD[torch.tensor(places, dtype=torch.int64, device=device)])
        starts = torch.as_tensor(chunks.t0[picked], device=rollout.score.hidden_TD.device)
        teacher.append(rollout.score.hidden_TD[starts])
    device = student[0].device
    return (
        torch.cat(student),
        torch.cat(teacher),
        ChunkRows(
            torch.tensor(rows, device=device),
            torch.tensor(ids, device=device),
            torch.tensor(teacher_ids, device=device),
            torch.tensor(logps, device=device, dtype=torch.float32),
            torch.tensor(observed, device=device),
        ),
    )
