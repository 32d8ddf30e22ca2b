# SPDX-License-Identifier: Apache-2.0
"""What a step of the real pair costs, stage by stage, beside the obvious alternatives.

    python tests/benchmarks/bench_step.py            (`make bench`)

Alternatives run in turns with ours in one process, and medians of the turns are compared. Memory
is the resident set's peak above what was there before (Linux). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import minigold as mg
from minigold.batch import Rollout, needed_states, pack
from minigold.chat import prompt_ids
from minigold.load import LanguageModel
from minigold.loss import chunk_losses, gold_loss
from minigold.offsets import encode_continuation, spans_of_ids
from minigold.rollout import Pair, make_pair
from minigold.sample import completion_states, pad, sample
from minigold.train import take_step

TESTS = Path(__file__).parents[1]
PROMPTS = TESTS.parent / "examples" / "prompts.jsonl"


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turns(runs: dict[str, Callable[[], Any]], n: int) -> dict[str, float]:
    """Median of each, after one turn that does not count."""
    turns = [{name: seconds(run) for name, run in runs.items()} for _ in range(n + 1)][1:]
    return {name: statistics.median(turn[name] for turn in turns) for name in runs}


def peak_mib(run: Callable[[], object]) -> float:
    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak so far is forgotten
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1024


def steps(pair: Pair, n: int, config: mg.Config) -> tuple[dict[str, Any], list[Rollout]]:
    """Medians of the metrics' seconds over n steps, and the last step's rollouts."""
    prompts = mg.data.read_prompts(PROMPTS)
    optimizer = torch.optim.AdamW(pair.student.decoder.parameters(), lr=1e-6)
    taken = [
        take_step(pair, optimizer, prompts[8 * i : 8 * i + 8], config, number=i + 1)
        for i in range(n + 1)
    ][1:]
    keys = ("seconds", "seconds_sample", "seconds_teacher", "seconds_train", "completion_tokens")
    found = {key: statistics.median(step.metrics[key] for step in taken) for key in keys}
    pair.student.decoder.zero_grad(set_to_none=True)
    return found, taken[-1].rollouts


def align_all(pair: Pair, rollouts: list[Rollout]) -> None:
    for answer in (r.answer for r in rollouts):
        spans = spans_of_ids(pair.student.tokenizer, answer.ids)
        mg.align.align(spans, encode_continuation(pair.teacher.tokenizer, answer.text)[1])


def sampling(model: LanguageModel, *, new: int, turns: int) -> dict[str, float]:
    """Tokens a second of eight rows that do not end; ours against `generate`."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    texts = [p.prompt for p in mg.data.read_prompts(PROMPTS)[:40] if isinstance(p.prompt, str)]
    rows = [ids for t in texts if len(ids := prompt_ids(model, t, plain=True)[:8]) == 8][:8]
    ids_BS = torch.tensor(rows)
    mask_BS, pure = torch.ones_like(ids_BS), {"do_sample": True, "top_k": 0, "top_p": 1.0}

    def hugging_face() -> None:
        out = theirs.generate(ids_BS, attention_mask=mask_BS, max_new_tokens=new, **pure)
        assert out.shape == (8, 8 + new)

    ours = in_turns(
        {
            "minigold": lambda: sample(model.decoder, rows, max_new_tokens=new, eos_ids=()),
            "transformers": hugging_face,
        },
        turns,
    )
    return {name: 8 * new / s for name, s in ours.items()}


def losses(pair: Pair, rollouts: list[Rollout], *, n: int, turns: int) -> dict[str, Any]:
    """Value and gradient of `gold_loss`, and of `chunk_losses` on logits that are all held."""
    student, teacher = pair.student.decoder, pair.teacher.decoder
    masks, left = [], n
    for r in rollouts:
        masks.append(np.arange(len(r.chunks.s0)) < left)
        left -= int(masks[-1].sum())
    states = []
    with torch.no_grad():
        for r, mask in zip(rollouts, masks, strict=True):
            ids_BS = pad([[*r.answer.prompt_ids, *r.answer.ids]], student.device)
            last = max(needed_states(r, mask) - 1, 0)
            states.append(completion_states(student(ids_BS)[0], len(r.answer.prompt_ids), last))
    student_ND, teacher_CK, rows = pack(
        rollouts, masks, states, teacher_end_id=pair.teacher.end_id
    )
    student_ND.requires_grad_()
    common: dict[str, Any] = {"rows": rows, "events": pair.events, "beta": 0.5}
    heads = {"student_head": student.head, "teacher_head": teacher.head}
    values = {}

    def blockwise() -> None:
        found = gold_loss(student_ND, teacher_CK, **heads, **common, weight=1.0)
        found.total.backward()
        values["blockwise"] = found.total.item()
        student.zero_grad(set_to_none=True)

    def dense() -> None:
        logits_NV, logits_CW = student.head.logits(student_ND), teacher.head.logits(teacher_CK)
        total = chunk_losses(logits_NV, logits_CW, **common).sum()
        total.backward()
        values["dense"] = total.item()
        student.zero_grad(set_to_none=True)

    runs = {"blockwise": blockwise, "dense": dense}
    took = in_turns(runs, turns)
    assert abs(values["blockwise"] / values["dense"] - 1) < 1e-4
    mib = {name: peak_mib(run) for name, run in runs.items()}
    return {"chunks": n - max(left, 0), "rows": len(student_ND), "seconds": took, "mib": mib}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a step of the real pair.")
    parser.add_argument("--swap", action="store_true", help="Gemma teaches SmolLM2")
    parser.add_argument("--turns", type=int, default=3, help="of each alternative")
    parser.add_argument("--new", type=int, default=48, help="tokens sampled a row")
    parser.add_argument("--chunks", type=int, default=256, help="of the two losses")
    args = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from real_models import real_folder

    student, teacher = (mg.load(real_folder(n)) for n in ("gemma", "smollm2")[:: 1 - 2 * args.swap])
    started = time.perf_counter()
    pair = make_pair(student, teacher)
    figures: dict[str, Any] = {"matching_seconds": time.perf_counter() - started}
    config = mg.Config(
        max_new_tokens=args.new, student_plain=not args.swap, teacher_plain=args.swap
    )
    figures["sampling"] = {
        Path(m.name).name: sampling(m, new=args.new, turns=args.turns) for m in (student, teacher)
    }
    figures["step"], rollouts = steps(pair, args.turns, config)
    tokens = sum(len(r.answer.ids) for r in rollouts)
    took = in_turns({"align": lambda: align_all(pair, rollouts)}, 20)["align"] / tokens
    figures["align_microseconds_per_token"] = 1e6 * took
    figures["align_share_of_step"] = (
        took * figures["step"]["completion_tokens"] / figures["step"]["seconds"]
    )
    figures["loss"] = losses(pair, rollouts, n=args.chunks, turns=args.turns)
    show(figures)
