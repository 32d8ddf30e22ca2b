# SPDX-License-Identifier: Apache-2.0
"""Prompts in, rollouts out: the student answers, the teacher reads.

Where it stands: `train.py` asks for a step's rollouts here, `batch.py` makes one of each answer.
Nothing is trained here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigold.batch import Answer, Array, Rollout, answer_of, rollout_of
from minigold.carry import Reading
from minigold.chat import prompt_ids
from minigold.config import Config
from minigold.data import Prompt
from minigold.events import measure
from minigold.load import LanguageModel
from minigold.offsets import encode_continuation
from minigold.pair import Pair
from minigold.sample import logp_of, sample
from minigold.teacher import score
from minigold.tiers import Teacher

__all__ = ["collect", "precision", "sample_answers", "seeds_of"]

log = logging.getLogger("minigold")
DATA, COIN, DRAW, MASK, EVAL, ADAPTER = range(6)  # random streams of a run


def sample_answers(
    pair: Pair,
    batch: list[Prompt],
    config: Config,
    *,
    number: int,
    seeds: Sequence[int] | None = None,
    part: slice = slice(None),
) -> tuple[list[Answer], list[tuple[Array, Array] | None]]:
    """Answers of one step, and the student's log-probabilities and measures of those it sampled.

    Args:
        number: of the step; it seeds what is drawn.
        seeds: one per row, for the answers, in place of the step's own.
        part: rows that are answered here; what is drawn for a row is the same whatever they are.
    """
    student, events = pair.student, pair.events
    rows = [prompt for prompt in batch for _ in range(config.rollouts)]
    coins = np.random.default_rng([config.seed, COIN, number]).random(len(rows))[part]
    seeds = (seeds or seeds_of(config.seed, number, DRAW, len(rows)))[part]
    rows = rows[part]
    fixed = [
        p.completion is not None and c >= config.lmbda for p, c in zip(rows, coins, strict=True)
    ]
    ids = [prompt_ids(student, p.prompt, plain=config.student_plain) for p in rows]
    live = [i for i, is_fixed in enumerate(fixed) if not is_fixed]

    def watch(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
        if config.student_temperature != 1:
            logits_NV = logits_NV / config.student_temperature
        prob_NV = logits_NV.softmax(-1)
        taken_N = logp_of(logits_NV, prob_NV, ids_N)
        measures = measure(prob_NV, taken_N, ids_N, events.student)
        return torch.stack([*measures, taken_N], dim=1)

    drawn = {}
    if live:
        with precision(student):
            completions = sample(
                student.decoder,
                [ids[i] for i in live],
                max_new_tokens=config.max_new_tokens,
                eos_ids=student.eos_ids,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                seed=[seeds[i] for i in live],
                watch=watch,
            )
        drawn = dict(zip(live, completions, strict=True))
    answers: list[Answer] = []
    side: list[tuple[Array, Array] | None] = []
    for i, prompt in enumerate(rows):
        one = drawn.get(i)
        told = prompt.teacher_prompt if prompt.teacher_prompt is not None else prompt.prompt
        answers.append(
            answer_of(
                prompt,
                ids[i],
                one.ids if one else _fixed_ids(student, prompt),
                finished=one.finished if one else prompt.finished,
                on_policy=one is not None,
                teacher_prompt_ids=prompt_ids(pair.teacher, told, plain=config.teacher_plain),
                student_tokenizer=student.tokenizer,
                teacher_tokenizer=pair.teacher.tokenizer,
                end_id=student.end_id,
                identical=events.identical,
            )
        )
        watched = one.watched_SK if one else None
        side.append(
            (watched[:, 5].numpy(), watched[:, :5].numpy()) if watched is not None else None
        )
    return answers, side


def _fixed_ids(student: LanguageModel, prompt: Prompt) -> list[int]:
    """Of a completion, and of its end if it has one: what was cut off is not taught to end there."""
    ids = encode_continuation(student.tokenizer, prompt.completion or "")[0]
    return [*ids, student.end_id] if prompt.finished else ids


def collect(
    pair: Pair,
    answers: Sequence[Answer],
    student_side: Sequence[tuple[Array, Array] | None],
    config: Config,
) -> list[Rollout]:
    """Lets the teacher read all answers (and the student those that it did not sample)."""
    events, student = pair.events, pair.student
    _warn_of_length(pair.teacher, answers)
    scores = pair.teacher.read(
        [a.reading(events) for a in answers],
        side=events.teacher,
        micro_batch=config.micro_batch,
        temperature=config.teacher_temperature,
    )
    unread = [i for i, known in enumerate(student_side) if known is None]
    with precision(student):
        own = score(
            student.decoder,
            [Reading(answers[i].prompt_ids, answers[i].ids) for i in unread],
            end_ids=[student.end_id],
            side=events.student,
            micro_batch=config.micro_batch,
            temperature=config.student_temperature,
        )
    read = {i: (s.logp_T.numpy(), s.measures_T5.numpy()) for i, s in zip(unread, own, strict=True)}
    rollouts = []
    for i, (answer, teacher_score) in enumerate(zip(answers, scores, strict=True)):
        logp_S, measures_S5 = student_side[i] or read[i]
        rollouts.append(
            rollout_of(
                answer,
                teacher_score,
                student_logp_S=logp_S,
                student_measures_S5=measures_S5,
                events=events,
            )
        )
    return rollouts


def _warn_of_length(teacher: Teacher, answers: Sequence[Answer]) -> None:
    longest = max(len(a.teacher_prompt_ids) + len(a.teacher_ids) for a in answers)
    if longest > teacher.context:
        log.warning(
            "the teacher reads %d tokens, more than its context of %d; lower --max-new-tokens",
            longest, teacher.context,
        )  # fmt: skip


def precision(model: LanguageModel) -> AbstractContextManager[Any]:
    """bfloat16 products on a CUDA device, with the student's weights kept in float32."""
    device = model.decoder.device
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def seeds_of(seed: int, number: int, stream: int, n: int) -> list[int]:
    """`n` seeds of one stream of one step."""
    drawn = np.random.SeedSequence([seed, number, stream]).generate_state(n, np.uint64)
    return [int(x) >> 1 for x in drawn]
