# SPDX-License-Identifier: Apache-2.0
"""The main job on models small enough for a laptop: `minigold demo`.

A teacher that knows a made-up operator on number words distils it, across tokenizers and
families, into a student that was warmed up on a few answers. The student sees prompts only. The
shipped models, data and licence are described in demo_data/README.md.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from minigold.batch import Rollout
from minigold.config import Config
from minigold.data import Prompt
from minigold.demo_task import held_out, prompts
from minigold.evaluate import exact_matches
from minigold.load import LanguageModel, load
from minigold.masked import acceptance_of
from minigold.pair import Pair, make_pair
from minigold.rollout import collect, sample_answers
from minigold.train import Step, distill

__all__ = ["DEMO", "accuracy", "demo_models", "marked", "one_thread", "run_demo"]

FOLDER = Path(__file__).parent / "demo_data"
DEMO = Config(
    steps=600,
    batch_size=64,
    micro_batch=64,
    max_new_tokens=24,
    lr=2e-3,
    warmup=10,
    student_plain=True,
)


def demo_models() -> tuple[LanguageModel, LanguageModel]:
    """The shipped student and teacher, in float32 on the CPU."""
    return load(FOLDER / "student"), load(FOLDER / "teacher")


@contextmanager
def one_thread() -> Iterator[None]:
    """On models this small a second one waits, or spins beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run_demo(
    *,
    out: Path | None = None,
    seed: int = 0,
    steps: int = DEMO.steps,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    bar: bool = True,
) -> dict[str, Any]:
    """Distils, shows what happened, and returns accuracies (0-1), seconds and trained share.

    Args:
        out: folder of the run, as in `distill`.
        say, bar: where lines go, and whether a progress bar is drawn on standard error.
    """
    began = time.perf_counter()
    student, teacher = demo_models()
    tests = held_out()
    config = dataclasses.replace(DEMO, seed=seed, steps=steps)
    pair = make_pair(student, teacher)
    teacher_accuracy = accuracy(teacher, tests, plain=config.teacher_plain)
    before = accuracy(student, tests, plain=config.student_plain)
    say(f"teacher {teacher_accuracy:.3f}, student {before:.3f} exact match on held-out prompts")
    _show("before (the teacher disagrees inside the brackets):", pair, tests, config, say)

    trained: list[float] = []
    progress: list[_Bar] = []

    def on_step(step: Step) -> None:
        if not progress:  # only now, so that the audit stands above it
            progress.append(_bar(steps, shown=bar))
        trained.append(step.metrics["trained_fraction"] or 0.0)
        loss = f"{step.metrics['loss']:.3f}"
        progress[0].set_postfix(loss=loss, trained=f"{trained[-1]:.2f}", refresh=False)
        progress[0].update(1)

    distill(student, teacher, prompts(), config, out=out, on_step=on_step)
    progress[0].close()
    _show("after:", pair, tests, config, say)
    return {
        "teacher_accuracy": teacher_accuracy,
        "student_before": before,
        "student_after": accuracy(student, tests, plain=config.student_plain),
        "seconds": round(time.perf_counter() - began, 1),
        "trained_fraction": sum(trained) / len(trained),
    }


def accuracy(model: LanguageModel, rows: Sequence[Prompt], *, plain: bool) -> float:
    """Exact match (0-1) of greedy answers."""
    right = exact_matches(model, rows, plain=plain, max_new_tokens=DEMO.max_new_tokens)
    return sum(right) / len(right)


def marked(rollout: Rollout, threshold: float = 0.5) -> str:
    """The answer with brackets around the chunks that the teacher would rather not accept."""
    accepted_C = acceptance_of(rollout)
    text = rollout.answer.text.encode()
    parts = []
    for start, end, a in zip(
        rollout.chunks.start, rollout.chunks.end, accepted_C.tolist(), strict=True
    ):
        piece = text[start:end].decode("utf-8", errors="replace") or "<end>"
        parts.append(f"[{piece}]" if a < threshold else piece.replace("<end>", ""))
    return "".join(parts)


def _show(
    title: str, pair: Pair, prompts: Sequence[Prompt], config: Config, say: Callable[[str], None]
) -> None:
    answers, student_side = sample_answers(pair, list(prompts[:4]), config, number=0)
    lines = [
        f"  {r.answer.prompt.prompt}{marked(r)}   (right: {r.answer.prompt.answer})"
        for r in collect(pair, answers, student_side, config)
    ]
    say("\n".join([title, *lines]))


class _Bar(Protocol):
    def update(self, n: int) -> Any: ...
    def set_postfix(self, *, refresh: bool, loss: str, trained: str) -> Any: ...
    def close(self) -> Any: ...


class _Lines:
    """In place of a progress bar where tqdm is absent: a line every tenth of the way."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self.total, self.shown, self.done, self.note = total, shown, 0, ""

    def update(self, n: int) -> None:
        self.done += n
        if self.shown and self.done % max(1, self.total // 10) == 0:
            print(f"{self.done}/{self.total} {self.note}", file=sys.stderr)

    def set_postfix(self, *, refresh: bool, loss: str, trained: str) -> None:
        self.note = f"loss {loss} trained {trained}" if not refresh else self.note

    def close(self) -> None:
        pass


def _bar(total: int, *, shown: bool) -> _Bar:
    try:
        from tqdm import tqdm
    except ImportError:
        return _Lines(total, shown=shown)
    bar: _Bar = tqdm(total=total, file=sys.stderr, unit="step", disable=not shown)
    return bar
