# SPDX-License-Identifier: Apache-2.0
"""A student that learns from its own rollouts: Compute as Teacher (2509.14234), as distillation.

    python examples/compute_as_teacher.py --arms synthesis          start, and CaT
    python examples/compute_as_teacher.py --seeds 3                 all arms, see docs/self-teachers.md

The task is the demo's, without the demo's teacher. For each prompt the student answers `G` times;
the frozen starting model, the anchor, reads these rollouts above the prompt and writes a reference.
Then the student is distilled from the anchor that has read the reference (`teacher_prompt`), and
after half of the steps its new rollouts make new references. No right answer of a prompt that is
trained, or held out, is read except to measure.

A model as small as this reads no rollouts by itself, so the start is prepared: on the right answers
to 150 *other* prompts, and on reading, with answers that are made up. Rollouts of a prompt ask each
of its sums beside a sum of another prompt; in `alone` they ask the prompt itself. `vote`,
`likeliest` and `single` choose one rollout in place of the synthesis; `sharpened` has no reference
and the anchor at half the temperature. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import minigold
from minigold.carry import Reading
from minigold.chat import prompt_ids
from minigold.config import Config
from minigold.data import Prompt
from minigold.demo import DEMO, demo_models, one_thread
from minigold.demo_task import held_out, number_word, prompts
from minigold.evaluate import bootstrap, exact_matches
from minigold.generate import text_of
from minigold.load import LanguageModel
from minigold.offsets import encode_continuation
from minigold.pair import make_pair
from minigold.sample import sample
from minigold.teacher import score
from minigold.train import distill

sys.path.insert(0, str(Path(__file__).parent))
from train_demo_models import drawn, fine_tune

ARMS = ("synthesis", "alone", "vote", "likeliest", "single", "sharpened")
G = 4  # rollouts a prompt
ROUNDS = 2  # times that references are made
N_LABELLED = 150  # prompts whose answers the start is prepared on; none of them is trained later
CONFIG = Config(  # beta as in the figures of docs/self-teachers.md
    batch_size=64, micro_batch=64, max_new_tokens=DEMO.max_new_tokens, lr=1e-3, beta=0.5,
    student_plain=True, teacher_plain=True,
)  # fmt: skip


def shown(answers: Sequence[str], prompt: str) -> str:
    """A prompt below answers to it."""
    return "".join(f"{answer}\n" for answer in answers) + prompt


# ------------------------------------------------------------------- the start
def reading(rows: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Endless batches of made-up answers below copies: one that is right, or `G` spoiled ones."""
    rng = np.random.default_rng([seed, 1])
    for some in drawn(rows, size, seed):
        batch = []
        for row in some:
            truth_2, n = rng.integers(0, 100, 2), int(rng.choice([1, G]))
            kept_N2 = rng.random((n, 2)) < (1 if n == 1 else rng.uniform(0.2, 1))
            copies_N2 = np.where(kept_N2, truth_2, rng.integers(0, 100, (n, 2)))
            truth, *copies = (
                ", ".join(map(number_word, two)) for two in [truth_2.tolist(), *copies_N2.tolist()]
            )
            batch.append(Prompt(shown(copies, str(row.prompt)), answer=truth))
        yield batch


def prepared(labelled: Sequence[Prompt], *, steps: int, seed: int) -> LanguageModel:
    """The demo's student after half of each batch on right answers, half on reading."""
    student, _ = demo_models()
    batches = zip(drawn(labelled, 32, seed), reading(labelled, 32, seed), strict=True)
    joined = ([*known, *read] for known, read in batches)
    fine_tune(student, joined, steps=steps, lr=2e-3, plain=True, say=lambda _text: None)
    return student


# ------------------------------------------------------------------- references
def answered(
    model: LanguageModel, told: Sequence[str], *, temperature: float, seed: int = 0
) -> list[str]:
    found = sample(
        model.decoder, [prompt_ids(model, one, plain=True) for one in told], seed=seed,
        max_new_tokens=CONFIG.max_new_tokens, eos_ids=model.eos_ids, temperature=temperature,
    )  # fmt: skip
    return [text_of(model.tokenizer, one) for one in found]


def rollouts(
    student: LanguageModel, told: Sequence[str], *, beside: bool, seed: int
) -> list[list[str]]:
    """`G` answers to each prompt.

    With `beside`, its sums are asked beside those of other prompts, in both orders. What differs is
    then the neighbour, and the answers are greedy; else they are samples.
    """
    rng, sums = np.random.default_rng([seed, 2]), [one.strip().split(", ") for one in told]
    halves: list[tuple[list[str], list[str]]] = [([], []) for _ in told]
    for k in range(G):
        partner = rng.permutation(len(told)).tolist() if beside else list(range(len(told)))
        turned = -1 if beside and k % 2 else 1
        asked = [[sums[i][0], sums[j][1]][::turned] for i, j in enumerate(partner)]
        texts = answered(
            student,
            [", ".join(two) + "\n" for two in asked],
            temperature=0 if beside else 1,
            seed=seed + k,
        )
        for i, (j, text) in enumerate(zip(partner, texts, strict=True)):
            first, second = [*text.split(", "), ""][:2][::turned]
            halves[i][0].append(first)
            halves[j][1].append(second)
    return [list(map(", ".join, zip(*two, strict=True))) for two in halves]


def likeliest(anchor: LanguageModel, told: Sequence[str], groups: Sequence[list[str]]) -> list[str]:
    """Of each group the answer to which the anchor gives the highest probability."""
    readings = [
        Reading(
            prompt_ids(anchor, one, plain=True),
            [*encode_continuation(anchor.tokenizer, answer)[0], anchor.end_id],
        )
        for one, group in zip(told, groups, strict=True)
        for answer in group
    ]
    side = make_pair(anchor, anchor).events.student
    scores = score(anchor.decoder, readings, end_ids=[anchor.end_id], side=side, micro_batch=64)
    best = torch.tensor([float(one.logp_T.sum()) for one in scores]).view(-1, G).argmax(1).tolist()
    return [group[i] for group, i in zip(groups, best, strict=True)]


def references(
    arm: str, student: LanguageModel, anchor: LanguageModel, told: Sequence[str], *, seed: int
) -> list[str]:
    """One for each prompt, from rollouts of the student."""
    groups = rollouts(student, told, beside=arm != "alone", seed=seed)
    if arm == "vote":
        return [Counter(group).most_common(1)[0][0] for group in groups]
    if arm == "likeliest":
        return likeliest(anchor, told, groups)
    if arm == "single":
        return [group[0] for group in groups]
    return answered(anchor, list(map(shown, groups, told)), temperature=0)


# ------------------------------------------------------------------- training
def taught(
    arm: str, anchor: LanguageModel, rows: Sequence[Prompt], *, steps: int, seed: int
) -> tuple[LanguageModel, list[float]]:
    """A copy of the anchor, distilled from the anchor; how many of each round's references are right."""
    student, told, right = copy.deepcopy(anchor), [str(row.prompt) for row in rows], []
    sharp = 0.5 if arm == "sharpened" else 1.0
    config = dataclasses.replace(CONFIG, steps=steps // ROUNDS, teacher_temperature=sharp)
    for number in range(ROUNDS):
        teacher_prompts = told
        if arm != "sharpened":
            found = references(arm, student, anchor, told, seed=1000 * seed + 100 * number)
            right.append(
                float(np.mean([a == row.answer for a, row in zip(found, rows, strict=True)]))
            )
            teacher_prompts = [shown([a], one) for a, one in zip(found, told, strict=True)]
        blank = [  # without the right answers
            Prompt(one, teacher_prompt=read)
            for one, read in zip(told, teacher_prompts, strict=True)
        ]
        distill(student, anchor, blank, dataclasses.replace(config, seed=ROUNDS * seed + number))
        student.decoder.eval()
    return student, right


def measured(model: LanguageModel, rows: Sequence[Prompt]) -> np.ndarray:
    """Of each prompt (rows): is the greedy answer right, and the share of `G` samples that are."""
    greedy = exact_matches(model, rows, plain=True, max_new_tokens=CONFIG.max_new_tokens)
    told = [str(row.prompt) for row in rows for _ in range(G)]
    texts = answered(model, told, temperature=1, seed=10**6)
    right = [text == rows[i // G].answer for i, text in enumerate(texts)]
    return np.stack([greedy, np.array(right).reshape(-1, G).mean(1)], axis=1)


@one_thread()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The demo's student as its own teacher.")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to this one less one")
    parser.add_argument("--prepare", type=int, default=300, help="steps before the start")
    parser.add_argument("--steps", type=int, default=200, help="of distillation")
    parser.add_argument("--prompts", type=int, default=1500, help="to train on, without answers")
    parser.add_argument("--tests", type=int, default=200, help="held-out prompts")
    args = parser.parse_args(argv)
    arms = args.arms.split(",")
    if not set(arms) <= set(ARMS):
        parser.error(f"expected --arms out of {', '.join(ARMS)}, got {args.arms!r}")
    labelled, rest = prompts()[:N_LABELLED], prompts()[N_LABELLED:]
    rows, tests = rest[: args.prompts], held_out()[: args.tests]
    found: dict[str, list[np.ndarray]] = {arm: [] for arm in ("start", *arms)}
    right: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    for seed in range(args.seeds):
        begun = time.perf_counter()
        anchor = prepared(labelled, steps=args.prepare, seed=seed)
        found["start"].append(measured(anchor, tests))
        for arm in arms:
            student, shares = taught(arm, anchor, rows, steps=args.steps, seed=seed)
            found[arm].append(measured(student, tests))
            right[arm].append(shares)
            greedy, sampled = found[arm][-1].mean(0)
            print(f"seed {seed} {arm:10} greedy {greedy:.3f} sampled {sampled:.3f} references "
                  f"{', '.join(f'{share:.3f}' for share in shares) or '-'} "
                  f"({time.perf_counter() - begun:.0f} s)", file=sys.stderr, flush=True)  # fmt: skip
    table = {arm: _figures(runs, found["start"]) for arm, runs in found.items()}
    print(f"{'':11}{'greedy':>7}  {'less the start, 95 %':24}{'sampled':>7}  less the start, 95 %")
    for arm, figures in table.items():
        cells = (f"{v:7.3f}  {d:+.3f} ({low:+.3f} to {high:+.3f})" for v, d, low, high in figures)
        print(f"{arm:11}{'  '.join(cells)}")
    print(json.dumps({
        **vars(args), "references": right,
        "accuracy": {arm: [run.mean(0).tolist() for run in runs] for arm, runs in found.items()},
        "versions": {"minigold": minigold.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
    }))  # fmt: skip
    return 0


def _figures(
    runs: Sequence[np.ndarray], start: Sequence[np.ndarray]
) -> list[tuple[float, float, float, float]]:
    """Greedy and sampled: accuracy, and what it is above the start, with a bootstrap over prompts."""
    value_P2 = np.mean(runs, axis=0)
    gain_P2 = value_P2 - np.mean(start, axis=0)
    figures = []
    for value_P, gain_P in zip(value_P2.T, gain_P2.T, strict=True):
        gain, low, high = bootstrap(gain_P, np.ones(len(gain_P)), seed=0)
        figures.append((float(value_P.mean()), gain or 0.0, low or 0.0, high or 0.0))
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
