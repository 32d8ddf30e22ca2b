# SPDX-License-Identifier: Apache-2.0
"""The demo beside controls that must stay behind, and what it loses without one of its parts.

    python examples/demo_controls.py                    all arms at the demo's own length
    python examples/demo_controls.py --arms gold,shifted --steps 250

`gold` is the demo. The controls have the same steps and sampled rows: `fine-tuned` (plain
fine-tuning on the warm-up's answers), `shuffled` (the teacher's events in a random order) and
`shifted` (chunks beside their neighbour's teacher tokens). `no-carry` leaves out what longer tokens
over a boundary say, `no-inside` what they say inside chunks; `all` and `sampled` train other chunks,
and `beta-0.5` compares by the JSD. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import minigold
from minigold import batch, carry, demo, pair
from minigold.align import Chunks, align
from minigold.demo import DEMO, accuracy, demo_models, one_thread, run_demo
from minigold.demo_task import held_out, warm_up
from minigold.events import Events, Vocabulary, match

sys.path.insert(0, str(Path(__file__).parent))
from train_demo_models import drawn, fine_tune


def shuffled(student: Vocabulary, other: Vocabulary, **settings: Any) -> Events:
    """The events of both vocabularies, the teacher's renamed at random."""
    events = match(student, other, **settings)
    side, n = events.teacher, events.n_events
    order = torch.cat(
        [torch.randperm(n, generator=torch.Generator().manual_seed(0)), torch.tensor([n])]
    )
    event_V = order[side.event_V]
    renamed = dataclasses.replace(
        side,
        event_V=event_V,
        column_V=event_V + (event_V == n),
        event_of=lambda text: int(order[side.event_of(text)]),
    )
    return dataclasses.replace(events, teacher=renamed)


def shifted(student_spans: Any, teacher_spans: Any) -> Chunks:
    """Chunks with the teacher tokens one further on."""
    chunks = align(student_spans, teacher_spans)
    last = len(teacher_spans)
    return chunks._replace(t0=np.minimum(chunks.t0 + 1, last), t1=np.minimum(chunks.t1 + 1, last))


def spoiled(**changes: dict[str, Any]) -> Callable[[], Any]:
    """A context in which names of modules are replaced."""
    modules = {"batch": batch, "carry": carry, "demo": demo, "pair": pair}

    @contextmanager
    def context() -> Iterator[None]:
        with ExitStack() as stack:
            for module, names in changes.items():
                for name, value in names.items():
                    stack.enter_context(patch.object(modules[module], name, value))
            yield

    return context


def no_overhang(_measures_S5: np.ndarray, first_C: np.ndarray, *_others: np.ndarray) -> np.ndarray:
    return np.zeros(len(first_C))


ARMS = {
    "gold": spoiled(),
    **{
        name: spoiled(demo={"DEMO": dataclasses.replace(DEMO, **changes)})
        for name, changes in (
            ("all", {"where": "all"}),
            ("sampled", {"where": "sampled"}),
            ("beta-0.5", {"beta": 0.5}),
        )
    },
    "shuffled": spoiled(pair={"match": shuffled}),
    "shifted": spoiled(batch={"align": shifted}),
    "no-inside": spoiled(batch={"_inside": lambda *_args: ()}),
    "no-carry": spoiled(carry={"_covers": lambda *_args: []}, batch={"_stays": no_overhang}),
}


@one_thread()
def fine_tuned(steps: int, seed: int) -> float:
    """Accuracy after plain fine-tuning on the warm-up's answers, with the demo's rows a step."""
    student, _ = demo_models()
    batches = drawn(warm_up(), DEMO.batch_size, seed=seed)
    fine_tune(student, batches, steps=steps, lr=1e-3, plain=True, say=lambda _text: None)
    return accuracy(student, held_out(), plain=True)


def run_arm(name: str, *, steps: int, seed: int) -> float:
    """Exact match (0-1) on the demo's held-out prompts."""
    if name == "fine-tuned":
        return fine_tuned(steps, seed)
    with ARMS[name]():
        result = run_demo(steps=steps, seed=seed, say=lambda _text: None, bar=False)
    return float(result["student_after"])


def main(argv: Sequence[str] | None = None) -> int:
    names = ["gold", "fine-tuned", *(name for name in ARMS if name != "gold")]
    parser = argparse.ArgumentParser(description="The demo beside its controls.")
    parser.add_argument("--arms", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--steps", type=int, default=DEMO.steps)
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to this one less one")
    args = parser.parse_args(argv)
    table: dict[str, list[float]] = {}
    for name in args.arms.split(","):
        if name not in names:
            parser.error(f"expected --arms out of {', '.join(names)}, got {name!r}")
        start = time.perf_counter()
        table[name] = [run_arm(name, steps=args.steps, seed=seed) for seed in range(args.seeds)]
        scores = "  ".join(f"{score:.3f}" for score in table[name])
        print(f"{name:11} {scores}  ({time.perf_counter() - start:.0f} s)", flush=True)
    versions = {"minigold": minigold.__version__, "torch": torch.__version__,
                "python": platform.python_version()}  # fmt: skip
    print(json.dumps({"steps": args.steps, "accuracy": table, "versions": versions}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
