# SPDX-License-Identifier: Apache-2.0
"""Two models and prompts in, a trained student out: the loop, to be read from top to bottom.

A step samples answers, lets the teacher read them, aligns both sides, chooses the chunks where
the teacher disagrees, and trains the student there. Numbers go to `metrics.py`, what outlives the
process to `checkpoint.py`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigold import metrics as measured
from minigold.batch import Array, Rollout
from minigold.chat import prompt_ids
from minigold.checkpoint import Run, open_run
from minigold.config import Config, option_name
from minigold.data import Prompt
from minigold.evaluate import best_of, evaluate
from minigold.hf import HFDecoder
from minigold.load import LanguageModel, Speaker
from minigold.lora import Adapter, adapt, adapter_of, merge, new_tensors
from minigold.masked import acceptance_of, choose_chunks, train_pass
from minigold.offsets import encode_continuation
from minigold.pair import Pair, make_pair
from minigold.rollout import ADAPTER, DATA, MASK, collect, sample_answers, seeds_of
from minigold.score import check_kept
from minigold.tiers import Teacher, check_tier, described
from minigold.watch import collapses, failed_in_a_row, finite

__all__ = ["Config", "Step", "check_eval_prompts", "check_prompts", "distill"]

log = logging.getLogger("minigold")


@dataclass(frozen=True)
class Step:
    """What one step did: rollouts, the teacher's acceptance of each chunk, and the chunks trained.

    Args:
        wrong: what was not finite, in words; "" if all was.
    """

    metrics: dict[str, Any]
    rollouts: list[Rollout]
    acceptance: list[Array]
    chosen: list[Array]
    wrong: str = ""


def distill(
    student: LanguageModel,
    teacher: Teacher,
    prompts: Sequence[Prompt],
    config: Config | None = None,
    *,
    eval_prompts: Sequence[Prompt] = (),
    out: Path | str | None = None,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
    on_eval: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[dict[str, Any]]:
    """Trains `student` in place; returns the metrics of each step (see docs/metrics.md).

    Args:
        eval_prompts: held out; `evaluate` runs on them before the first step, every `eval_every`
            steps and after the last one. The checkpoint of the evaluation that is best by `best_by`
            stays.
        out: new or empty folder for config.json, metrics.jsonl, samples.jsonl, eval.jsonl,
            checkpoints/ and final/.
        resume: go on with the run in `out` from its last checkpoint, or begin it. `student` is
            what it was made from, and ends as if the run had not stopped.
        on_step: called after each step that did not fail, for progress and for looking at samples.
        on_eval: called with each evaluation: its step, the figures, and the seconds it took.
        stop: asked after each step but the last; true ends the run early, with a checkpoint.

    Raises:
        ValueError: prompts that do not fit the models or the settings, a loss that the teacher does not
            say enough for, a folder that is not empty
            or, with `resume`, holds another run, or one that another process writes.
        FloatingPointError: loss or gradient were not finite in `patience` steps in a row (the
            weights are those before), or a weight is not.
        OSError: the disk is full; the last checkpoint stays good.
    """
    config, prompts, eval_prompts = config or Config(), list(prompts), list(eval_prompts)
    if resume and out is None:
        raise ValueError("expected `out` with `resume`, got none; name the folder of the run")
    check_adapter(student, config)
    check_tier(teacher, config)
    pair = make_pair(student, teacher, events=config.events)
    check_prompts(prompts, pair, config)
    check_kept(pair, prompts, config, eval_prompts=eval_prompts)
    check_eval_prompts(eval_prompts, pair, config)
    _prepare(student, teacher, prompts, config)
    optimizer = adamw(student.decoder, config)
    run = None
    if out:
        run = open_run(
            Path(out), pair, optimizer, prompts, config, resume=resume, eval_prompts=eval_prompts
        )
    history = run.history if run else []
    evaluate_now = _evaluator(pair, eval_prompts, config, run, on_eval)
    with run or nullcontext():
        evaluate_now(len(history))
        batches = islice(batches_of(prompts, config), len(history), None)
        for number in range(len(history) + 1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, config)
            step = take_step(pair, optimizer, next(batches), config, number=number)
            history.append(step.metrics)
            if run:
                run.add(step)
            _judge(step, history, config, kept=run.kept() if run else "")
            if on_step and not step.wrong:
                on_step(step)
            best = evaluate_now(number)
            stopping = stop is not None and number < config.steps and stop()
            saving = best or stopping or (config.save_every and number % config.save_every == 0)
            if run and saving:
                run.save(number)
            if stopping:
                return history
        if run:
            run.finish()
    return history


def _prepare(
    student: LanguageModel, teacher: Teacher, prompts: Sequence[Prompt], config: Config
) -> None:
    """Says who teaches, and leaves both as a run needs them."""
    theirs = getattr(getattr(teacher, "model", teacher), "decoder", None)  # None: elsewhere
    fixed = set() if theirs is None else {id(weight) for weight in theirs.parameters()}
    if theirs is student.decoder or any(id(x) in fixed for x in trained_weights(student.decoder)):
        raise ValueError(
            "expected a teacher with weights of its own, got some of the student's, which are trained; "
            "load it twice"
        )
    student.decoder.cuda_graphs = config.cuda_graphs
    student.decoder.checkpointing = config.gradient_checkpointing
    student.decoder.train()
    choose_trained(student, config)
    log.info(described(teacher))
    if isinstance(teacher, LanguageModel):
        teacher.decoder.eval()
    without = sum(p.completion is None for p in prompts)
    if config.lmbda < 1 and without:
        log.warning(
            "%d of %d prompts have no `completion`, and are answered by the student whatever --lmbda %g "
            "says", without, len(prompts), config.lmbda,
        )  # fmt: skip


def _evaluator(
    pair: Pair,
    prompts: Sequence[Prompt],
    config: Config,
    run: Run | None,
    on_eval: Callable[[dict[str, Any]], None] | None,
) -> Callable[[int], bool]:
    """A function of the step that is done: evaluates if that is due, says whether it was the best."""
    evals = run.evals if run else []

    def evaluate_now(number: int) -> bool:
        at_ends = number in (0, config.steps)
        due = at_ends or (config.eval_every and number % config.eval_every == 0)
        if not prompts or not due or (evals and evals[-1]["step"] == number):
            return False
        begun = time.perf_counter()
        row = {"step": number, **evaluate(pair, prompts, config)}
        row["seconds"] = time.perf_counter() - begun
        (run.add_evaluation if run else evals.append)(row)
        if on_eval:
            on_eval(row)
        return best_of(evals, config.best_by) is row

    return evaluate_now


def _judge(step: Step, history: Sequence[dict[str, Any]], config: Config, *, kept: str) -> None:
    """Warns of a failed step or a collapse, once; ends a run that cannot go on."""
    number, in_a_row = step.metrics["step"], failed_in_a_row(history)
    if step.wrong and (in_a_row >= config.patience or not in_a_row):
        expected = f"a finite loss and gradient within {config.patience} steps (--patience)"
        raise FloatingPointError(
            f"step {number}: expected {expected if in_a_row else 'finite weights'}, got {step.wrong}; "
            + ("the weights are those before; " if in_a_row else "the weights are lost; ")
            + (f"{kept}; " if kept else "")
            + "begin a new run with a lower --lr or a higher precision"
            + (", from a checkpoint (its folder as --student) or from the start" if kept else "")
        )
    if step.wrong:
        log.warning(
            "step %d failed: %s; no optimizer step is taken; %d of --patience %d in a row",
            number, step.wrong, in_a_row, config.patience,
        )  # fmt: skip
    answers = config.batch_size * config.rollouts
    before = collapses(history[:-1], answers=answers)
    for sign, sentence in collapses(history, answers=answers).items():
        if sign not in before:
            log.warning("step %d: %s", number, sentence)


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


def choose_trained(student: LanguageModel, config: Config) -> None:
    """Leaves gradients to all weights or, with `--lora-rank`, to an adapter's alone.

    A student that has an adapter goes on with it; where the weights are trained, it is merged first.
    Of a module of `transformers` what needs a gradient is the caller's choice.
    """
    decoder = student.decoder
    if isinstance(decoder, HFDecoder):
        return
    if not config.lora_rank:
        merge(decoder)
        decoder.requires_grad_(True)
    elif adapter_of(decoder) is None:
        seed = seeds_of(config.seed, 0, ADAPTER, 1)[0]
        new = Adapter(config.lora_rank, config.lora_alpha, config.adapted)
        adapt(decoder, new, new_tensors(decoder, new, seed=seed))


def _warn_of_precision(weights: Sequence[torch.nn.Parameter], config: Config) -> None:
    narrow = {str(p.dtype).removeprefix("torch.") for p in weights if p.dtype.itemsize < 4}
    if narrow:
        log.warning(
            "the trained weights are %s, in which most steps of --lr %g are rounded away; load the "
            "student with dtype=torch.float32 (on CUDA its products are bfloat16 all the same)",
            " and ".join(sorted(narrow)), config.lr,
        )  # fmt: skip


def trained_weights(decoder: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in decoder.parameters() if parameter.requires_grad]


def adamw(decoder: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """One pass over weights and moments where the device has a kernel for it."""
    parameters = trained_weights(decoder)
    _warn_of_precision(parameters, config)
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
    seed = seeds_of(config.seed, number, MASK, 1)[0]
    chosen = choose_chunks(rollouts, pair.events, config, seed=seed)
    clock.append(time.perf_counter())
    optimizer.zero_grad(set_to_none=True)
    result = train_pass(pair, rollouts, chosen, config)
    norm, wrong = 0.0, ""
    if any(mask.any() for mask in result.trained):
        parameters = trained_weights(pair.student.decoder)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf))
        if math.isfinite(norm) and math.isfinite(result.loss):
            optimizer.step()
            wrong = "" if finite(parameters) else "NaN or infinite weights after it"
        else:
            wrong = f"a loss of {result.loss} and a gradient norm of {norm}"
        optimizer.zero_grad(set_to_none=True)  # room for what sampling and the teacher need
    else:
        log.warning("step %d: no chunk was chosen; no optimizer step is taken", number)
    clock.append(time.perf_counter())
    accepted = [acceptance_of(r).numpy() for r in rollouts]
    trained = result.trained
    numbers = measured.step_metrics(
        rollouts,
        trained,
        config,
        loss=result.loss,
        work_saved=result.work_saved,
        clock=clock,
        device=pair.student.decoder.device,
    )
    extra = {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
    row = measured.plain({"step": number, **numbers, **extra})
    return Step(row, rollouts, accepted, trained, wrong)


def check_prompts(
    prompts: Sequence[Prompt], pair: Pair, config: Config, *, device: torch.device | None = None
) -> None:
    """Refuses prompts that a run with these models and settings could not read.

    Args:
        device: that of the run, if it is not the student's.

    Raises:
        ValueError: none at all, one that is too long, or that a side cannot read as it is.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    strange = [type(p).__name__ for p in prompts if not isinstance(p, Prompt)]
    if strange:
        raise ValueError(
            f"expected prompts as data.read_prompts gives them, or data.Prompt(text), got {strange[0]}"
        )
    device = device or pair.student.decoder.device
    if config.cuda_graphs and device.type != "cuda":
        raise ValueError(
            f"expected --cuda-graphs with --device cuda, got {device}; leave one of them out"
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


def check_eval_prompts(
    prompts: Sequence[Prompt],
    pair: Pair,
    config: Config,
    *,
    device: torch.device | None = None,
    option: str = "--eval-prompts",
) -> None:
    """Refuses prompts on which an evaluation could not run, or not give the figure `best_by`.

    Args:
        option: which says where they are.

    Raises:
        ValueError: one that does not fit, or settings that need others.
    """
    if not prompts:
        for name in ("eval_every", "best_by"):
            if getattr(config, name) != getattr(Config, name):
                raise ValueError(
                    f"expected {option_name(name)} with --eval-prompts only, got it without; add a "
                    "file of held-out prompts, or leave it out"
                )
        return
    if config.best_by == "forward_kl" and pair.teacher.tier != "dense":
        raise ValueError(
            "expected a teacher of the tier dense for --best-by forward_kl, got one of the tier "
            f"{pair.teacher.tier}, which does not say all of its distribution; name another figure"
        )
    needed = {"exact_match": "answer", "bits_per_byte_student": "completion"}.get(config.best_by)
    if needed and all(getattr(p, needed) is None for p in prompts):
        raise ValueError(
            f"expected evaluation prompts with `{needed}` for --best-by {config.best_by}, got none; "
            "add some, or name another figure"
        )
    reads = any(p.completion is not None for p in prompts)
    try:
        check_prompts(prompts, pair, replace(config, lmbda=0.0 if reads else 1.0), device=device)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def check_adapter(student: LanguageModel, config: Config) -> None:
    """Refuses another adapter than the student has.

    Raises:
        ValueError: of another rank, alpha or layers; a module of `transformers` with `--lora-rank`, or
            without any weight to train.
    """
    if isinstance(student.decoder, HFDecoder):
        if config.lora_rank:
            raise ValueError(
                "expected --lora-rank with a model that minigold loads, got a module of transformers; give "
                "it an adapter with get_peft_model of peft"
            )
        if not trained_weights(student.decoder):
            raise ValueError(
                f"expected weights that require a gradient in {student.name}, got none; an adapter that peft "
                "loads needs is_trainable=True"
            )
        return
    there = adapter_of(student.decoder)
    asked = Adapter(config.lora_rank, config.lora_alpha, config.adapted)
    if there and config.lora_rank and there != asked:
        raise ValueError(
            f"expected --lora-rank {there.rank} --lora-alpha {there.alpha:g} --lora-targets "
            f"{','.join(there.targets)}, as the adapter {student.name} has, got {asked.rank}, "
            f"{asked.alpha:g} and {','.join(asked.targets)}; give these, or the base as --student"
        )


def _check_length(
    model: Speaker | Teacher, text: Any, completion: str | None, config: Config, *, plain: bool
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
