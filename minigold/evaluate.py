# SPDX-License-Identifier: Apache-2.0
"""A pair and prompts in, how near the student is to its teacher out, with intervals.

Where it stands: beside a training step, with the same samples and scores and no gradient. Every
figure is a ratio of two sums over prompts, so that one bootstrap serves all of them. Each key is
explained in docs/metrics.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from minigold.batch import Array, Rollout, pack
from minigold.carry import Reading
from minigold.chat import prompt_ids
from minigold.config import BEST_BY, Config
from minigold.data import Message, Prompt
from minigold.events import CHUNK, Side
from minigold.generate import said
from minigold.load import LanguageModel
from minigold.loss import look
from minigold.masked import critic, starts_of
from minigold.metrics import gap_and_bytes, plain
from minigold.offsets import EXACT, encode_continuation, text_of_ids
from minigold.pair import Pair
from minigold.rollout import EVAL, collect, precision, sample_answers, seeds_of
from minigold.sample import sample
from minigold.teacher import score
from minigold.tiers import Teacher

__all__ = [
    "FIGURES",
    "best_of",
    "bootstrap",
    "evaluate",
    "exact_matches",
    "forward_kl",
    "repetition",
    "told",
]

log = logging.getLogger("minigold")
FIGURES = {  # key: what it is, and its unit
    "reverse_kl_per_byte": ("reverse KL(student||teacher), samples", "nats per byte"),
    "forward_kl": ("forward KL(teacher||student), next event", "nats per chunk"),
    "bits_per_byte_student": ("student on the given completions", "bits per byte"),
    "bits_per_byte_teacher": ("teacher on the given completions", "bits per byte"),
    "exact_match": ("greedy answers that are right", "share"),
    "eos_rate": ("samples that end by themselves", "share"),
    "mean_tokens": ("length of a sample", "tokens"),
    "mean_bytes": ("length of a sample", "bytes"),
    "repetition": ("repeated 4-grams of a sample", "share"),
}
RESAMPLES = 1000
GRAM = 4

Ratio = tuple[float, float]
Row = dict[str, Ratio]


def evaluate(
    pair: Pair,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float | None]:
    """The keys of `FIGURES`, each with its 95 % interval (`_low`, `_high`), and counts.

    The student answers every prompt once at temperature 1, and greedily where there is an `answer`.
    None stands where nothing was there to measure. The same seed draws the same answers whatever
    the batch size is (but for rounding, which in bfloat16 changes some), and none that a training step
    draws. Nothing is trained, and the student comes back in the mode (train or eval) that it was in.

    Args:
        prompts: they and their completions fit both models' context, see `train.check_prompts`.
        config: `seed`, `max_new_tokens`, `batch_size`, `micro_batch`, `max_overhang`,
            `student_plain` and `teacher_plain` are used; the rest is for training.
        on_batch: is told how many prompts are done.

    Raises:
        ValueError: no prompts, or one that a side cannot read.
    """
    if not prompts:
        raise ValueError("expected at least one prompt to evaluate on, got none")
    settings = replace(
        config, rollouts=1, lmbda=1.0, temperature=1.0, top_p=1.0, top_k=0,
        student_temperature=1.0, teacher_temperature=1.0,
    )  # fmt: skip
    seeds = seeds_of(config.seed, 0, EVAL, len(prompts))
    rows: list[Row] = []
    with _resting(pair.student.decoder), torch.no_grad():
        for start in range(0, len(prompts), config.batch_size):
            some = slice(start, start + config.batch_size)
            rows += _rows(pair, prompts[some], settings, seeds[some])
            if on_batch is not None:
                on_batch(len(rows))
    _warn_of_lost_text(pair, prompts)
    figures: dict[str, float | None] = {
        "prompts": len(prompts),
        "completions": sum(bool(p.completion) for p in prompts),
        "answers": sum(p.answer is not None for p in prompts),
    }
    for key in FIGURES:
        parts = np.array([row[key] for row in rows if key in row]).reshape(-1, 2)
        value, low, high = bootstrap(parts[:, 0], parts[:, 1], seed=config.seed)
        figures |= {key: value, f"{key}_low": low, f"{key}_high": high}
    strange = [key for key, x in figures.items() if x is not None and not math.isfinite(x)]
    if strange:
        log.warning(
            "expected numbers, got NaN or infinity for %s, which stand as null; look for such weights "
            "on both sides", ", ".join(strange),
        )  # fmt: skip
    return plain(figures)


def best_of(evals: Sequence[dict[str, Any]], best_by: str) -> dict[str, Any] | None:
    """The first evaluation that none beats in `best_by` (a key of `BEST_BY`); None without any.

    >>> best_of([{"step": 0, "exact_match": 0.5}, {"step": 9, "exact_match": None}], "exact_match")
    {'step': 0, 'exact_match': 0.5}
    """
    measured = [row for row in evals if row[best_by] is not None]
    sign = -1 if BEST_BY[best_by] else 1
    return min(measured, key=lambda row: sign * row[best_by], default=None)


@contextmanager
def _resting(decoder: torch.nn.Module) -> Iterator[None]:
    """In eval mode for a while."""
    was = decoder.training
    decoder.eval()
    try:
        yield
    finally:
        decoder.train(was)


def bootstrap(
    top_P: Array, bottom_P: Array, *, seed: int, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float | None, float | None, float | None]:
    """Sum of `top_P` over sum of `bottom_P`, and the percentile bootstrap interval of that ratio.

    Whole prompts are drawn again, with replacement; a mean is the ratio whose bottoms are 1.

    Args:
        top_P, bottom_P: float64, one of each a prompt; bottoms >= 0. Prompts whose bottom is 0 are
            left out.
        level: 0 to 1, of the interval.

    Returns:
        None for all three without any prompt, None for the interval with one.

    Source: Efron, Bootstrap methods: another look at the jackknife (1979).

    >>> value, low, high = bootstrap(np.array([0.0, 1.0, 1.0, 1.0]), np.ones(4), seed=0)
    >>> value, low <= value <= high
    (0.75, True)
    """
    counted = bottom_P > 0
    top_P, bottom_P = top_P[counted], bottom_P[counted]
    n = len(top_P)
    if n == 0:
        return None, None, None
    value = float(top_P.sum() / bottom_P.sum())
    if n == 1:
        return value, None, None
    rng, ratios = np.random.default_rng([seed, EVAL]), np.zeros(resamples)
    for i in range(resamples):
        drawn = rng.integers(n, size=n)
        ratios[i] = top_P[drawn].sum() / bottom_P[drawn].sum()
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)


# -- one batch -----------------------------------------------------------------------------------


def _rows(pair: Pair, prompts: Sequence[Prompt], config: Config, seeds: Sequence[int]) -> list[Row]:
    """Of each prompt, top and bottom of each figure that it counts for."""
    answers, student_side = sample_answers(pair, list(prompts), config, number=0, seeds=seeds)
    rollouts = collect(pair, answers, student_side, config)
    losses = forward_kl(pair, rollouts, config)
    rows = [_row(r, loss_C) for r, loss_C in zip(rollouts, losses, strict=True)]
    given = [i for i, p in enumerate(prompts) if p.completion]
    if given:
        student, teacher = _bits(pair, [prompts[i] for i in given], config)
        for i, ours, theirs in zip(given, student, teacher, strict=True):
            rows[i] |= {"bits_per_byte_student": ours, "bits_per_byte_teacher": theirs}
    known = [i for i, p in enumerate(prompts) if p.answer is not None]
    if known:
        with precision(pair.student):
            right = exact_matches(
                pair.student,
                [prompts[i] for i in known],
                plain=config.student_plain,
                max_new_tokens=config.max_new_tokens,
            )
        for i, yes in zip(known, right, strict=True):
            rows[i]["exact_match"] = float(yes), 1.0
    return rows


def _row(rollout: Rollout, loss_C: Array) -> Row:
    answer = rollout.answer
    repeated = repetition(answer.ids[:-1] if answer.finished else answer.ids)
    return {
        "reverse_kl_per_byte": gap_and_bytes(rollout),
        "forward_kl": (float(loss_C.sum()), len(loss_C)),
        "eos_rate": (float(answer.finished), 1.0),
        "mean_tokens": (len(answer.ids), 1.0),
        "mean_bytes": (len(answer.text.encode("utf-8")), 1.0),
        **({} if repeated is None else {"repetition": (repeated, 1.0)}),
    }


def forward_kl(pair: Pair, rollouts: Sequence[Rollout], config: Config) -> list[Array]:
    """KL(teacher||student) of the next event at each chunk's start that is compared, in nats.

    The teacher's distribution is conditioned on having an event, the student's is not (`loss.py`
    at beta 0): what the student gives to tokens without an event counts against it. Nothing of a
    teacher that does not say all of its distribution, or where chunks are all that is compared.
    """
    masks = [r.comparable_C(pair.events, config.max_overhang) for r in rollouts]
    counts = [int(mask.sum()) for mask in masks]
    dense = isinstance(pair.teacher, LanguageModel) and pair.events.kind != CHUNK
    if not any(counts) or not dense:
        return [np.zeros(0)] * len(rollouts)
    student, theirs = pair.student, [r.score.hidden_MD for r in rollouts]
    with precision(student):
        own = score(
            student.decoder,
            [Reading(r.answer.prompt_ids, r.answer.ids) for r in rollouts],
            end_ids=[student.end_id],
            side=pair.events.student,
            micro_batch=config.micro_batch,
        )
        ours = [one.hidden_MD for one in own]
        rows = pack(
            rollouts,
            masks,
            student_starts=starts_of(ours),
            teacher_starts=starts_of(theirs),
            teacher_end_id=pair.teacher.end_id,
            device=student.decoder.device,
            starts_only=True,
        )
        loss_C, _ = look(
            torch.cat(ours),
            torch.cat(theirs),
            student_head=student.decoder.head,
            teacher_head=critic(pair.teacher, 1.0),
            rows=rows,
            events=pair.events,
            beta=0.0,
        )
    return np.split(loss_C.double().cpu().numpy(), np.cumsum(counts)[:-1])


def _bits(pair: Pair, prompts: Sequence[Prompt], config: Config) -> tuple[list[Ratio], list[Ratio]]:
    """Bits and bytes of each given completion, under the student and under the teacher."""
    read = [p.prompt if p.teacher_prompt is None else p.teacher_prompt for p in prompts]
    texts = [p.completion or "" for p in prompts]

    def of(
        model: Teacher, side: Side, told: Sequence[str | list[Message]], *, plain: bool
    ) -> list[Ratio]:
        readings = [
            Reading(prompt_ids(model, one, plain=plain), encode_continuation(model.tokenizer, text)[0])
            for one, text in zip(told, texts, strict=True)
        ]  # fmt: skip
        scores = model.read(readings, side=side, micro_batch=config.micro_batch, temperature=1.0)
        return [
            (-float(one.logp_T.double().sum()) / math.log(2), len(text.encode("utf-8")))
            for one, text in zip(scores, texts, strict=True)
        ]

    with precision(pair.student):
        own = [p.prompt for p in prompts]
        student = of(pair.student, pair.events.student, own, plain=config.student_plain)
    return student, of(pair.teacher, pair.events.teacher, read, plain=config.teacher_plain)


def _warn_of_lost_text(pair: Pair, prompts: Sequence[Prompt]) -> None:
    texts = [p.completion for p in prompts if p.completion]
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        lost = 0
        for text in texts:
            start, end, flaw = encode_continuation(model.tokenizer, text)[1].T
            lost += int((end - start)[flaw == EXACT].sum()) < len(text.encode("utf-8"))
        if lost:
            log.warning(
                "%s: %d of %d completions have text that its tokenizer does not read exactly; what "
                "is lost costs it nothing, so its bits per byte are too low", name, lost, len(texts),
            )  # fmt: skip


def exact_matches(
    model: LanguageModel, prompts: Sequence[Prompt], *, plain: bool, max_new_tokens: int
) -> list[bool]:
    """Whether each greedy answer is the prompt's `answer`, white space around both aside."""
    found = sample(
        model.decoder,
        [prompt_ids(model, p.prompt, plain=plain) for p in prompts],
        max_new_tokens=max_new_tokens,
        eos_ids=model.eos_ids,
        temperature=0,
    )
    return [
        text_of_ids(model.tokenizer, said(one)).strip() == (p.answer or "").strip()
        for one, p in zip(found, prompts, strict=True)
    ]


def repetition(ids: Sequence[int]) -> float | None:
    """Share of a text's 4-grams of tokens that stood in it before; None if it has no 4-gram.

    Source: seq-rep-4 of 1908.04319.

    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])  # 1 of 5 comes back
    0.2
    """
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else None


# -- for a person --------------------------------------------------------------------------------


def told(figures: dict[str, float | None]) -> str:
    """What `evaluate` found, as lines for a person."""
    n, completions, answers = (figures[key] for key in ("prompts", "completions", "answers"))
    lines = [f"{n} prompts, {completions} with a completion, {answers} with an answer"]
    lines.append(f"{'':42}{'value':>9}  {'95 % interval':24}unit")
    for key, (label, unit) in FIGURES.items():
        value, low, high = (figures[name] for name in (key, f"{key}_low", f"{key}_high"))
        number = "-" if value is None else f"{value:.4g}"
        span = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        lines.append(f"{label:42}{number:>9}  {span:24}{unit}")
    return "\n".join(lines)
