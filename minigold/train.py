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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import minigold
from minigold import metrics as measured
from minigold.batch import Array, Rollout
from minigold.chat import prompt_ids
from minigold.config import Config
from minigold.data import Prompt
from minigold.load import LanguageModel
from minigold.masked import acceptance_of, choose_chunks, train_pass
from minigold.offsets import encode_continuation
from minigold.pair import Pair, make_pair
from minigold.rollout import DATA, MASK, collect, sample_answers, seeds_of
from minigold.weights import save_decoder

__all__ = ["Config", "Step", "check_prompts", "distill"]

log = logging.getLogger("minigold")


@dataclass(frozen=True)
class Step:
    """What one step did: rollouts, the acceptance of each chunk, and the chunks trained."""

    metrics: dict[str, Any]
    rollouts: list[Rollout]
    acceptance: list[Array]
    chosen: list[Array]


def distill(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Sequence[Prompt],
    config: Config | None = None,
    *,
    out: Path | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains `student` in place; returns the metrics of each step (see docs/metrics.md).

    Args:
        out: new or empty folder for config.json, metrics.jsonl, samples.jsonl and final/.
        on_step: called after each step, for progress and for looking at samples.

    Raises:
        ValueError: prompts that do not fit the models or the settings, a folder that is not empty.
        FloatingPointError: the loss or gradient is not finite; the weights are those before.
    """
    config = config or Config()
    pair = make_pair(student, teacher, events=config.events)
    check_prompts(prompts, pair, config)
    if out is not None:
        _open_run(out, pair, config)
    student.decoder.cuda_graphs = config.cuda_graphs
    student.decoder.train()
    student.decoder.requires_grad_(True)
    teacher.decoder.eval()
    optimizer = adamw(student.decoder, config)
    history = []
    batches = batches_of(prompts, config)
    for number in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, config)
        step = take_step(pair, optimizer, next(batches), config, number=number)
        history.append(step.metrics)
        if out is not None:
            _append(out / "metrics.jsonl", [step.metrics])
            _append(out / "samples.jsonl", measured.sample_rows(number, step, pair))
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


def adamw(decoder: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """One pass over weights and moments where the device has a kernel for it."""
    parameters = list(decoder.parameters())
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused
    )


def take_step(
    pair: Pair,
    optimizer: torch.optim.Optimizer,
    batch: list[Prompt],
    config: Config,
    *,
    number: int,
) -> Step:
    """Sample, read, align, choose, train. Without any chosen chunk no optimizer step is taken."""
    clock = [time.perf_counter()]
    answers, student_side = sample_answers(pair, batch, config, number=number)
    clock.append(time.perf_counter())
    rollouts = collect(pair, answers, student_side, config)
    if number == 1:
        measured.audit(rollouts, pair.events)
    kept = [acceptance_of(r) for r in rollouts]
    seed = seeds_of(config.seed, number, MASK, 1)[0]
    chosen = choose_chunks(rollouts, kept, pair.events, config, seed=seed)
    clock.append(time.perf_counter())
    optimizer.zero_grad(set_to_none=True)
    result = train_pass(pair, rollouts, chosen, config)
    norm = 0.0
    if any(mask.any() for mask in result.trained):
        parameters = list(pair.student.decoder.parameters())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf))
        if not (math.isfinite(norm) and math.isfinite(result.loss)):
            raise FloatingPointError(
                f"step {number}: expected a finite loss and gradient, got {result.loss} and {norm}; "
                "the weights are those before this step; lower --lr or raise the precision"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # room for what sampling and the teacher need
    else:
        log.warning("step %d: no chunk was chosen; no optimizer step is taken", number)
    clock.append(time.perf_counter())
    accepted = [a.numpy() for a in kept]
    trained = result.trained
    numbers = measured.step_metrics(
        rollouts, trained, config, loss=result.loss, work_saved=result.work_saved, clock=clock
    )
    extra = {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
    return Step({"step": number, **numbers, **extra}, rollouts, accepted, trained)


def check_prompts(prompts: Sequence[Prompt], pair: Pair, config: Config) -> None:
    """Refuses prompts that a run with these models and settings could not read.

    Raises:
        ValueError: none at all, one that is too long, or that a side cannot read as it is.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    if config.cuda_graphs and pair.student.decoder.device.type != "cuda":
        raise ValueError(
            f"expected --cuda-graphs with --device cuda, got {pair.student.decoder.device}; "
            "leave one of them out"
        )
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
                _check_length(model, text, prompt.completion, config, plain=plain)
            except ValueError as error:
                raise ValueError(f"prompt of line {prompt.line}, {name}: {error}") from error


def _check_length(
    model: LanguageModel, text: Any, completion: str | None, config: Config, *, plain: bool
) -> None:
    n, most = len(prompt_ids(model, text, plain=plain)), model.context - config.max_new_tokens
    if n > most:
        raise ValueError(
            f"expected at most {most} tokens (the context of {model.context} less "
            f"--max-new-tokens), got {n}; shorten the prompt or lower --max-new-tokens"
        )
    if completion is not None and config.lmbda < 1:
        size = n + len(encode_continuation(model.tokenizer, completion)[0]) + 1
        if size > model.context:
            raise ValueError(
                f"expected at most {model.context} tokens with the completion and its end, got "
                f"{size}; shorten the completion"
            )


def _open_run(out: Path, pair: Pair, config: Config) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"expected --out to be a new or empty folder, got {out}, which is not empty"
        )
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
