# SPDX-License-Identifier: Apache-2.0
"""What spans, chunks, longer tokens and the matching of two vocabularies cost, and their share of a step.

One process; run it with one thread (`OMP_NUM_THREADS=1`). Runs take turns, and medians are compared.
`--trl` measures TRL's alignment of the same tokens in the same turns (`pip install trl` first).
The last line is JSON.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_step import PROMPTS  # noqa: E402

import minigold as mg  # noqa: E402
from corpus import corpus_texts  # noqa: E402
from minigold import rollout  # noqa: E402
from minigold.align import align  # noqa: E402
from minigold.carry import Longer  # noqa: E402
from minigold.offsets import encode_continuation, spans_of_ids, text_of_ids, vocabulary  # noqa: E402
from minigold.pair import make_pair, matched  # noqa: E402
from minigold.train import take_step  # noqa: E402
from real_models import real_folder  # noqa: E402
from real_tokenizers import real_tokenizer  # noqa: E402

Figures = dict[str, float]
STUDENT, TEACHER, LARGEST = "qwen3", "deepseek_v3", "gemma3"  # TRL takes byte-level teachers only
SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)


def in_turns(n: int, times: int, **runs: Callable[[], object]) -> Figures:
    """Median seconds of one call of each; a turn calls each `times` times, the first is left out."""

    def seconds(run: Callable[[], object]) -> float:
        started = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - started) / times

    turns = [{name: seconds(run) for name, run in runs.items()} for _ in range(n + 1)]
    return {name: median(turn[name] for turn in turns[1:]) for name in runs}


def trl_runs(ids: list[int], text: str, spans: list[Any]) -> dict[str, Callable[[], object]]:
    """TRL's own functions for the same three jobs."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gold.gold_trainer import ULDLoss
    from trl.experimental.utils import encode_with_byte_offsets, piece_byte_len

    student, teacher = real_tokenizer(STUDENT), real_tokenizer(TEACHER)
    ends = [[row[:2] for row in side.tolist()] for side in spans]

    def of_ids() -> None:  # as `_maybe_add_completion_byte_offsets` does it
        at = 0
        for i in ids:
            at += piece_byte_len(student.id_to_token(i))

    return {
        "trl spans of ids": of_ids,
        "trl ids and spans of the text": lambda: encode_with_byte_offsets(
            teacher, [text], add_special_tokens=False
        ),
        "trl align": lambda: ULDLoss._align_by_byte_offsets(*ends),
    }


def of_alignment(sizes: tuple[int, ...], turns: int, *, trl: bool) -> Figures:
    """Tokens of the student a second, for texts of each size."""
    student, teacher, largest = map(real_tokenizer, (STUDENT, TEACHER, LARGEST))
    base = " ".join(corpus_texts(3_000, seed=1))
    per_token = len(base) / len(encode_continuation(student, base)[0])
    figures = {}
    for size in sizes:
        want = int(size * per_token) + 50
        text = (base * (want // len(base) + 1))[:want]
        ids = encode_continuation(student, text)[0][:size]
        text = text_of_ids(student, ids)
        spans = [spans_of_ids(student, ids), encode_continuation(teacher, text)[1]]
        runs: dict[str, Callable[[], object]] = {
            "spans of ids": lambda ids=ids: spans_of_ids(student, ids),
            "ids and spans of the text": lambda text=text: encode_continuation(teacher, text),
            "ids and spans of the text, Gemma": lambda text=text: encode_continuation(
                largest, text
            ),
            "align": lambda spans=spans: align(*spans),
        }
        runs |= trl_runs(ids, text, spans) if trl else {}
        seconds = in_turns(turns, max(1, 10_000 // size), **runs)
        figures |= {f"{name}, {size} tokens: tokens/s": size / s for name, s in seconds.items()}
    return figures


def of_matching() -> Figures:
    """Seconds for both vocabularies with first pieces, made anew and read again."""
    tokenizers = real_tokenizer(LARGEST), real_tokenizer(STUDENT)
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINIGOLD_CACHE"] = folder
        sides = tuple((t, [1], max(t.get_vocab().values()) + 1) for t in tokenizers)
        for name in ("anew", "from the cache"):
            mg.offsets._table_of.cache_clear()
            started = time.perf_counter()
            events = mg.events.match(*matched(*sides))
            figures[f"match {sides[0][2]} and {sides[1][2]} ids {name}: s"] = (
                time.perf_counter() - started
            )
    del os.environ["MINIGOLD_CACHE"]
    return figures | {"events": events.n_events}


def of_a_step(steps: int) -> Figures:
    """Shares of a training step: ids, spans and chunks of its completions; what longer tokens say.

    SmolLM2-135M learns from Gemma-3-270M, both on their own, 8 prompts, 48 new tokens each.
    """
    student, teacher = mg.load(real_folder("smollm2")), mg.load(real_folder("gemma"))
    pair = make_pair(student, teacher)
    config = mg.Config(steps=steps, batch_size=8, max_new_tokens=48, teacher_plain=True)
    optimizer = torch.optim.AdamW(student.decoder.parameters(), lr=1e-6)
    prompts = mg.data.read_prompts(PROMPTS)
    spent = {"ids, spans and chunks": 0.0, "longer tokens": 0.0}

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **fields: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **fields)
            spent[part] += time.perf_counter() - started
            return result

        return timed

    looked_up = {
        name: clocked("longer tokens", getattr(Longer, name))
        for name in ("__init__", "add", "branches", "follow", "carried")
    }
    rows = []
    with (
        patch.object(rollout, "answer_of", clocked("ids, spans and chunks", rollout.answer_of)),
        patch.multiple(Longer, **looked_up),
    ):
        for number in range(1, steps + 2):
            spent.update(dict.fromkeys(spent, 0.0))
            batch = [prompts[(8 * number + k) % len(prompts)] for k in range(8)]
            metrics = take_step(pair, optimizer, batch, config, number=number).metrics
            shares = {f"share of {part} in the step": s for part, s in spent.items()}
            rows.append(
                {
                    "step of the real pair: s": metrics["seconds"],
                    "step: completion tokens": metrics["completion_tokens"],
                    **{name: s / metrics["seconds"] for name, s in shares.items()},
                }
            )
    return {name: median(row[name] for row in rows[1:]) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times spans, chunks and matching.")
    parser.add_argument("--turns", type=int, default=7, help="of each run")
    parser.add_argument("--steps", type=int, default=3, help="of the real pair; 0 for none")
    parser.add_argument("--trl", action="store_true", help="TRL's alignment in the same turns")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    figures = of_alignment(SIZES, args.turns, trl=args.trl)
    if args.trl:
        for job in ("spans of ids", "ids and spans of the text", "align"):
            ratios = [
                figures[f"{job}, {n} tokens: tokens/s"]
                / figures[f"trl {job}, {n} tokens: tokens/s"]
                for n in SIZES
            ]
            figures[f"{job}: times as fast as TRL, least"] = min(ratios)
            figures[f"{job}: times as fast as TRL, median"] = median(ratios)
    speeds = [figures[f"align, {n} tokens: tokens/s"] for n in SIZES]
    figures["align: slowest size, tokens/s"] = min(speeds)
    figures |= of_matching()
    if args.steps:
        figures |= of_a_step(args.steps)
    print("\n".join(f"{name:60} {value:14.6g}" for name, value in figures.items()))
    cpu = Path("/proc/cpuinfo").read_text("utf-8").partition("model name\t: ")[2].split("\n")[0]
    packages = ["minigold", "numpy", "tokenizers", "torch", *(["trl"] if args.trl else [])]
    machine = {"cores": os.cpu_count(), "processor": cpu or platform.processor()}
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    ids = {n: len(vocabulary(real_tokenizer(n)).roles) for n in (STUDENT, TEACHER, LARGEST)}
    print(json.dumps({"machine": machine, "versions": versions, "ids": ids, **figures}))


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
