# SPDX-License-Identifier: Apache-2.0
"""The two tasks of the confirmation, on real models: a skill, and a behaviour.

    python examples/experiments/real_tasks.py --task skill --out runs/skill
    python examples/experiments/real_tasks.py --task behaviour --out runs/behaviour

**skill**: Gemma-3-270M learns the operator of the screening with labels, and SmolLM2-135M-Instruct is
to learn it from there. Answers are code or a small table around two numbers in words, and an accented
name. The student has read a few answers of the teacher, so that it knows how one looks.

**behaviour**: SmolLM2-135M-Instruct answers short requests, and stops; Gemma-3-270M, a base model, is
to learn that from it.

A folder gets `student`, `teacher`, and what the teacher wrote, `train.jsonl` and `held_out.jsonl`, as
`task.make` writes them, so that `screen.py --task` runs arms on it. `real_pair.py` says where the
weights come from. One thread took 15 minutes for the skill, on a processor that multiplies in bfloat16
(40 on another), and 5 for the behaviour. It simplifies: both read the skill's prompt without a template, and all seeds
start from one student.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import torch

from minigold.config import Config
from minigold.data import Prompt
from minigold.evaluate import exact_matches
from minigold.load import LanguageModel, load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import task
from real_pair import real_folder
from train_demo_models import drawn, fine_tune

__all__ = ["BEHAVIOUR", "SKILL", "make_behaviour", "make_skill", "requests", "skill_rows"]

SKILL = Config(steps=120, batch_size=16, micro_batch=16, max_new_tokens=48, lr=2e-4, warmup=20,
               student_plain=True, teacher_plain=True)  # fmt: skip
BEHAVIOUR = Config(steps=60, batch_size=16, micro_batch=16, max_new_tokens=64, lr=1e-4, warmup=10,
                   student_plain=True)  # fmt: skip
N_TEXTS, N_HELD_OUT = 1000, 100
TAUGHT, UNTAUGHT = 0.8, 0.1  # exact match that the teacher must reach, and the student may not have
TABLE = "| {name} | glim |\n|---|---|\n| {a} | {b} |"

# ------------------------------------------------------------------- requests
ASKED = ("coffee", "the sea", "a violin", "the moon", "rain", "a bicycle", "bread", "a library",
         "a café", "winter", "a river", "an owl", "chess", "the piñata", "a lighthouse", "honey",
         "a smörgåsbord", "sleep", "a volcano", "paper", "a jalapeño", "music", "a bridge", "tea",
         "an apple", "a train", "Málaga", "a forest", "the sun", "salt", "a crème brûlée", "a horse",
         "glass", "a garden", "Zürich", "a clock", "snow", "a map", "soup", "a spider")  # fmt: skip
REQUESTS = (
    "What is {x}? Answer in one sentence.",
    "Describe {x} in five words.",
    "Name three things that go well with {x}.",
    "Write one short line of a poem about {x}.",
    "Give one fact about {x}.",
    "Is {x} something that one can eat? Say yes or no, and why, in one sentence.",
    "Write a Python function of two lines that prints the words: {x}.",
    "Make a Markdown table with two rows about {x}.",
    "Where would a child see {x}? Answer briefly.",
    "Translate into French: I like {x}.",
    "Write a title for a story about {x}.",
    "Ask me one question about {x}.",
)


def requests() -> tuple[list[Prompt], list[Prompt]]:
    """Prompts that are trained on, and the held-out ones, whose subjects and forms are in others."""
    rows = [Prompt(form.format(x=x)) for form, x in product(REQUESTS, ASKED)]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows)).tolist()]
    return rows[N_HELD_OUT:], rows[:N_HELD_OUT]


def skill_rows() -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of the screening, with a fourth shape of answer, a table."""
    shapes = (*task.SHAPES, TABLE)
    return task.prompts(shapes)[:N_TEXTS], task.held_out(shapes)[:N_HELD_OUT]


# ------------------------------------------------------------------- models
@contextmanager
def in_bfloat16() -> Iterator[None]:
    """Products of float32 matrices are in bfloat16, on processors that have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@in_bfloat16()
def make_skill(out: Path, *, say: Callable[[str], None] = print) -> None:
    """Writes what is not there yet.

    Raises:
        ValueError: the teacher has not learned it, or the student knows too much, by their exact
            match on the held-out prompts.
    """
    train, held_out = skill_rows()
    if not task.is_made(out / "teacher"):
        teacher = load(real_folder("gemma"))
        both = [*train, *task.damaged(train, seed=6)]
        for rows, steps in ((train, 80), (both, 40)):
            fine_tune(teacher, drawn(rows, 16, seed=5), steps=steps, lr=5e-5, plain=True, say=say)
        if (share := _right(teacher, held_out)) < TAUGHT:
            raise ValueError(
                f"expected a teacher that has at least {TAUGHT} of the answers right, got {share}; "
                "train it for more steps"
            )
        task.save(teacher, out / "teacher")
    for name, rows in (("train", train), ("held_out", held_out)):
        task.write_texts(out, name, rows, SKILL.max_new_tokens, plain=True)
    if not task.is_made(out / "student"):
        student = load(real_folder("smollm2"))
        written = [
            Prompt(p.prompt, answer=p.completion) for p in task.read_texts(out, "train")[:48]
        ]
        fine_tune(student, drawn(written, 8, seed=3), steps=24, lr=5e-5, plain=True, say=say)
        if (share := _right(student, held_out)) > UNTAUGHT:
            raise ValueError(
                f"expected a student that has at most {UNTAUGHT} of the answers right, got {share}; "
                "shorten its warm start"
            )
        task.save(student, out / "student")


def make_behaviour(out: Path, *, say: Callable[[str], None] = print) -> None:
    """Writes what is not there yet; no model is trained."""
    train, held_out = requests()
    for name, source in (("student", "gemma"), ("teacher", "smollm2")):
        if not task.is_made(out / name):
            task.save(load(real_folder(source)), out / name)
    for name, rows in (("train", train), ("held_out", held_out)):
        task.write_texts(out, name, rows, BEHAVIOUR.max_new_tokens)
    rows = task.read_texts(out, "held_out")
    say(f"the teacher ends {sum(p.finished for p in rows)} of {len(rows)} answers")


def _right(model: LanguageModel, rows: Sequence[Prompt]) -> float:
    marks = exact_matches(model, rows, plain=True, max_new_tokens=SKILL.max_new_tokens)
    return sum(marks) / len(marks)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the models of a task, and says how often each is right."""
    parser = argparse.ArgumentParser(description="Makes the models of the confirmation.")
    parser.add_argument("--task", choices=["skill", "behaviour"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="gets the folders and files")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    torch.set_num_threads(1)
    if args.task == "behaviour":
        make_behaviour(args.out)
    else:
        make_skill(args.out)
        for name in ("teacher", "student"):
            print(f"{name:9} {_right(load(args.out / name), skill_rows()[1]):.3f} exact match")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
