# SPDX-License-Identifier: Apache-2.0
"""Two models and prompts in, a trained student out: the loop, to be read from top to bottom.

A step samples answers, lets the teacher read them, aligns both sides, chooses the chunks where
the teacher disagrees, and trains the student there. Numbers go to `metrics.py`.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import minigold
from minigold import metrics as measured
from minigold.batch import (
    Answer,
    Array,
    Rollout,
    answer_of,
    head_rows,
    needed_states,
    pack,
    rollout_of,
)
from minigold.chat import prompt_ids
from minigold.config import Config
from minigold.data import Prompt
from minigold.disagree import acceptance, choose
from minigold.events import Events, match, measure
from minigold.load import LanguageModel
from minigold.loss import gold_loss
from minigold.offsets import encode_continuation, vocabulary
from minigold.sample import completion_states, pad, sample
from minigold.teacher import Reading, score
from minigold.weights import save_decoder

__all__ = ["Config", "Pair", "Step", "collect", "distill", "make_pair", "train_pass"]

log = logging.getLogger("minigold")
FLOOR_SHARE = 0.05  # a step's denominator is at least this share of its chunks
DATA, COIN, DRAW, MASK = range(4)  # random streams


@dataclass(frozen=True)
class Pair:
    """Both models, and the events between their vocabularies (on their device)."""

    student: LanguageModel
    teacher: LanguageModel
    events: Events


@dataclass(frozen=True)
class Step:
    """What one step did: rollouts, the acceptance of each chunk, and the chunks trained."""

    metrics: dict[str, Any]
    rollouts: list[Rollout]
    acceptance: list[Array]
    chosen: list[Array]


def make_pair(student: LanguageModel, teacher: LanguageModel) -> Pair:
    """Matches the two vocabularies, first pieces in both directions included."""
    tokenizers = student.tokenizer, teacher.tokenizer
    ours = vocabulary(tokenizers[0], end_ids=[student.end_id], size=student.n_tokens)
    theirs = vocabulary(tokenizers[1], end_ids=teacher.eos_ids, size=teacher.n_tokens)
    only_theirs = set(theirs.token_bytes) - set(ours.token_bytes)
    only_ours = set(ours.token_bytes) - set(theirs.token_bytes)
    if only_theirs or only_ours:
        ours = vocabulary(
            tokenizers[0], end_ids=[student.end_id], size=student.n_tokens, pieces_for=only_theirs
        )
        theirs = vocabulary(
            tokenizers[1], end_ids=teacher.eos_ids, size=teacher.n_tokens, pieces_for=only_ours
        )
    return Pair(student, teacher, match(ours, theirs).to(student.decoder.device))


def distill(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Sequence[Prompt],
    config: Config | None = None,
    *,
    out: Path | None = None,
    on_step: Callable[[Step], None] | None = None,
    events: Events | None = None,
) -> list[dict[str, Any]]:
    """Trains `student` in place; returns the metrics of each step (see docs/metrics.md).

    Args:
        out: new or empty folder for config.json, metrics.jsonl, samples.jsonl and final/.
        on_step: called after each step, for progress and for looking at samples.
        events: instead of `match`, for experiments.

    Raises:
        ValueError: prompts that do not fit the models or the settings, a folder that is not empty.
        FloatingPointError: the loss or gradient is not finite; the weights are those before.
    """
    config = config or Config()
    pair = make_pair(student, teacher)
    if events is not None:
        pair = Pair(student, teacher, events.to(student.decoder.device))
    _check_prompts(prompts, pair, config)
    if out is not None:
        _open_run(out, pair, config)
    student.decoder.train()
    student.decoder.requires_grad_(True)
    teacher.decoder.eval()
    optimizer = torch.optim.AdamW(
        student.decoder.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    history = []
    batches = batches_of(prompts, config)
    for number in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, config)
        step = take_step(pair, optimizer, next(batches), config, number=number)
        if number == 1:
            measured.audit(step.rollouts, pair.events)
        history.append(step.metrics)
        if out is not None:
            _append(out / "metrics.jsonl", [step.metrics])
            _append(out / "samples.jsonl", measured.sample_rows(number, step))
        if on_step is not None:
            on_step(step)
    if out is not None:
        save_decoder(student.decoder, out / "final", source=student.folder)
    return history


def learning_rate(number: int, config: Config) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to a tenth. `number` counts from 1."""
    if number <= config.warmup:
        return config.lr * number / config.warmup
    done = (number - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def batches_of(prompts: Sequence[Prompt], config: Config) -> Iterator[list[Prompt]]:
    """Endless batches; every prompt once an epoch, each epoch in its own order."""
    queue: list[Prompt] = []
    epoch = 0
    while True:
        while len(queue) < config.batch_size:
            order = np.random.default_rng([config.seed, DATA, epoch]).permutation(len(prompts))
            queue.extend(prompts[int(i)] for i in order)
            epoch += 1
        yield queue[: config.batch_size]
        del queue[: config.batch_size]


def take_step(
    pair: Pair, optimizer: torch.optim.Optimizer, batch: list[Prompt], config: Config, *, number: int
) -> Step:
    """Sample, read, align, choose, train. Without any chosen chunk no optimizer step is taken."""
    clock = [time.perf_counter()]
    answers, student_side = sample_answers(pair, batch, config, number=number)
    clock.append(time.perf_counter())
    rollouts = collect(pair, answers, student_side, config)
    generator = torch.Generator().manual_seed(_seeds(config.seed, number, MASK, 1)[0])
    kept = [
        acceptance(*map(torch.as_tensor, (r.student_logp_C, r.teacher_logp_C, r.scorable_C)))
        for r in rollouts
    ]
    chosen = [
        choose(a, where=config.where, threshold=config.threshold, generator=generator).numpy()
        & (r.overhang_C <= config.max_overhang)
        for a, r in zip(kept, rollouts, strict=True)
    ]
    clock.append(time.perf_counter())
    optimizer.zero_grad(set_to_none=True)
    result = train_pass(pair, rollouts, chosen, config)
    norm = 0.0
    if any(mask.any() for mask in chosen):
        parameters = list(pair.student.decoder.parameters())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf))
        if not (math.isfinite(norm) and math.isfinite(result.loss)):
            raise FloatingPointError(
                f"step {number}: expected a finite loss and gradient, got {result.loss} and {norm}; "
                "the weights are those before this step; lower --lr or raise the precision"
            )
        optimizer.step()
    else:
        log.warning("step %d: the teacher accepts every chunk; no optimizer step is taken", number)
    clock.append(time.perf_counter())
    accepted = [a.numpy() for a in kept]
    numbers = measured.step_metrics(
        rollouts, chosen, config, loss=result.loss, work_saved=result.work_saved, clock=clock
    )
    extra = {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
    return Step({"step": number, **numbers, **extra}, rollouts, accepted, chosen)


def sample_answers(
    pair: Pair, batch: list[Prompt], config: Config, *, number: int
) -> tuple[list[Answer], list[tuple[Array, Array] | None]]:
    """Answers of one step, and the student's log-probabilities and measures of those it sampled."""
    student, events = pair.student, pair.events
    rows = [prompt for prompt in batch for _ in range(config.rollouts)]
    coins = np.random.default_rng([config.seed, COIN, number]).random(len(rows))
    fixed = [p.completion is not None and c >= config.lmbda for p, c in zip(rows, coins, strict=True)]
    ids = [prompt_ids(student, p.prompt, plain=config.student_plain) for p in rows]
    live = [i for i, is_fixed in enumerate(fixed) if not is_fixed]
    seeds = _seeds(config.seed, number, DRAW, len(rows))

    def watch(logp_BV: Tensor, ids_B: Tensor) -> Tensor:
        return torch.stack(measure(logp_BV, ids_B, events.student), dim=1)

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
        fixed_ids = [] if one else encode_continuation(student.tokenizer, prompt.completion or "")[0]
        told = prompt.teacher_prompt if prompt.teacher_prompt is not None else prompt.prompt
        answers.append(
            answer_of(
                prompt,
                ids[i],
                one.ids if one else [*fixed_ids, student.end_id],
                finished=one.finished if one else True,
                on_policy=one is not None,
                teacher_prompt_ids=prompt_ids(pair.teacher, told, plain=config.teacher_plain),
                student_tokenizer=student.tokenizer,
                teacher_tokenizer=pair.teacher.tokenizer,
                end_id=student.end_id,
                identical=events.identical,
            )
        )
        watched = one.watched_SK if one else None
        side.append((one.logp_S.numpy(), watched.numpy()) if one and watched is not None else None)
    return answers, side


def collect(
    pair: Pair,
    answers: Sequence[Answer],
    student_side: Sequence[tuple[Array, Array] | None],
    config: Config,
) -> list[Rollout]:
    """Lets the teacher read all answers (and the student those that it did not sample)."""
    events, student = pair.events, pair.student
    scores = score(
        pair.teacher.decoder,
        [
            Reading(a.teacher_prompt_ids, a.teacher_ids, [t for t in a.chunks.t0.tolist() if t])
            for a in answers
        ],
        end_ids=pair.teacher.eos_ids,
        side=events.teacher,
        micro_batch=config.micro_batch,
    )
    unread = [i for i, known in enumerate(student_side) if known is None]
    with precision(student):
        own = score(
            student.decoder,
            [Reading(answers[i].prompt_ids, answers[i].ids) for i in unread],
            end_ids=[student.end_id],
            side=events.student,
                micro_batch=config.micro_batch,
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


@dataclass(frozen=True)
class Pass:
    """`loss` in nats per trained chunk (of at least 5 % of all); `work_saved` in 0 to 1."""

    loss: float
    work_saved: float


def train_pass(
    pair: Pair, rollouts: Sequence[Rollout], chosen: Sequence[Array], config: Config
) -> Pass:
    """Adds the gradient of the mean loss over the chosen chunks to the student's parameters.

    Rows run to the last state that a chosen chunk needs; rows without one are left out; the head
    runs on the needed states alone. One denominator for the whole step.
    """
    n_chunks = sum(len(mask) for mask in chosen)
    n_chosen = sum(int(mask.sum()) for mask in chosen)
    weight = 1 / max(n_chosen, FLOOR_SHARE * n_chunks, 1)
    needs = [needed_states(r, mask) for r, mask in zip(rollouts, chosen, strict=True)]
    lengths = [len(r.answer.prompt_ids) + n - 1 for r, n in zip(rollouts, needs, strict=True)]
    order = sorted((i for i, n in enumerate(needs) if n), key=lambda i: -lengths[i])
    device, total = pair.student.decoder.device, 0.0
    for start in range(0, len(order), config.micro_batch):
        some = order[start : start + config.micro_batch]
        inputs = [[*rollouts[i].answer.prompt_ids, *rollouts[i].answer.ids][: lengths[i]] for i in some]
        with precision(pair.student):
            hidden_BSD = pair.student.decoder(pad(inputs, device))
            states = [
                completion_states(hidden_SD, len(rollouts[i].answer.prompt_ids), needs[i] - 1)
                for hidden_SD, i in zip(hidden_BSD, some, strict=True)
            ]
            student_ND, teacher_CK, rows = pack(
                [rollouts[i] for i in some],
                [chosen[i] for i in some],
                states,
                teacher_end_id=pair.teacher.end_id,
            )
            loss = gold_loss(
                student_ND,
                teacher_CK,
                student_head=pair.student.decoder.head,
                teacher_head=pair.teacher.decoder.head,
                rows=rows,
                events=pair.events,
                beta=config.beta,
                weight=weight,
            ).total
        loss.backward()
        total += float(loss.detach())
    return Pass(total, work_saved(pair.student, rollouts, chosen, lengths, needs))


def work_saved(
    student: LanguageModel,
    rollouts: Sequence[Rollout],
    chosen: Sequence[Array],
    lengths: Sequence[int],
    needs: Sequence[int],
) -> float:
    """Share of the training pass's matrix products that the mask leaves out (attention aside)."""
    head = student.decoder.head.weight_VD.numel()
    body = sum(p.numel() for p in student.decoder.parameters()) - head
    spent = full = 0
    for r, mask, length, need in zip(rollouts, chosen, lengths, needs, strict=True):
        heads = head_rows(r)
        spent += (body * length if need else 0) + head * int(heads[mask].sum())
        every = needed_states(r, np.ones(len(mask), dtype=bool))
        full += body * (len(r.answer.prompt_ids) + every - 1) + head * int(heads.sum())
    return 1 - spent / full if full else 0.0


def precision(model: LanguageModel) -> AbstractContextManager[Any]:
    """bfloat16 products on a CUDA device, with the student's weights kept in float32."""
    device = model.decoder.device
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def _seeds(seed: int, number: int, stream: int, n: int) -> list[int]:
    drawn = np.random.SeedSequence([seed, number, stream]).generate_state(n, np.uint64)
    return [int(x) >> 1 for x in drawn]


def _check_prompts(prompts: Sequence[Prompt], pair: Pair, config: Config) -> None:
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    if config.lmbda < 1 and not any(p.completion is not None for p in prompts):
        raise ValueError(
            f"expected prompts with `completion` for --lmbda {config.lmbda}, got none; "
            "add completions or use --lmbda 1"
        )
    for prompt in prompts:
        told = prompt.teacher_prompt if prompt.teacher_prompt is not None else prompt.prompt
        sides = (
            ("student", pair.student, prompt.prompt, config.student_plain),
            ("teacher", pair.teacher, told, config.teacher_plain),
        )
        for name, model, text, plain in sides:
            try:
                n = len(prompt_ids(model, text, plain=plain))
            except ValueError as error:
                raise ValueError(f"prompt of line {prompt.line}, {name}: {error}") from error
            if n == 0 or n + config.max_new_tokens > model.context:
                raise ValueError(
                    f"prompt of line {prompt.line}: expected 1 to "
                    f"{model.context - config.max_new_tokens} tokens for the {name} (its context of "
                    f"{model.context} less --max-new-tokens), got {n}; shorten the prompt"
                )


def _open_run(out: Path, pair: Pair, config: Config) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"expected --out to be a new or empty folder, got {out}, which is not empty")
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        **asdict(config),
        "student": pair.student.name,
        "teacher": pair.teacher.name,
        "device": str(pair.student.decoder.device),
        "versions": {
            "minigold": minigold.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
