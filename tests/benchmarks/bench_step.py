# SPDX-License-Identifier: Apache-2.0
"""What a step of the real pair costs, stage by stage, beside the obvious alternatives.

Alternatives run in turns in one process, and medians of the turns are compared. Memory is the
resident set's peak above what was there before (Linux). The last line is JSON.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import minigold as mg
from minigold.batch import Rollout, needed_states, pack
from minigold.load import LanguageModel
from minigold.loss import chunk_losses, gold_loss
from minigold.masked import starts_of
from minigold.offsets import encode_continuation, spans_of_ids
from minigold.pair import Pair, make_pair
from minigold.sample import completion_states, pad, sample
from minigold.train import take_step

TESTS = Path(__file__).parents[1]
PROMPTS = TESTS.parent / "examples" / "prompts.jsonl"
Figures = dict[str, float]


def in_turns(n: int, **runs: Callable[[], object]) -> Figures:
    """Median seconds of each; the first turn does not count."""

    def seconds(run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    turns = [{name: seconds(run) for name, run in runs.items()} for _ in range(n + 1)]
    return {name: median(turn[name] for turn in turns[1:]) for name in runs}


def status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak_mib(run: Callable[[], object]) -> float:
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak so far is forgotten
    before = status_kib("VmRSS")
    run()
    return (status_kib("VmHWM") - before) / 1024


def of_steps(pair: Pair, config: mg.Config) -> tuple[Figures, list[Rollout]]:
    """Medians over the steps, the first left out; the rollouts of the last two."""
    prompts, n = mg.data.read_prompts(PROMPTS), config.batch_size
    optimizer = torch.optim.AdamW(pair.student.decoder.parameters(), lr=1e-6)
    steps = [
        take_step(pair, optimizer, prompts[n * i : n * i + n], config, number=i + 1)
        for i in range(config.steps + 1)
    ]
    keys = ("completion_tokens", "seconds", "seconds_sample", "seconds_teacher", "seconds_train")
    pair.student.decoder.zero_grad(set_to_none=True)
    figures = {f"step {key}": median(step.metrics[key] for step in steps[1:]) for key in keys}
    return figures, steps[-2].rollouts + steps[-1].rollouts


def of_alignment(pair: Pair, rollouts: list[Rollout]) -> Figures:
    """Student's spans, teacher's ids and spans, chunks."""

    def run() -> None:
        for answer in (r.answer for r in rollouts):
            spans = spans_of_ids(pair.student.tokenizer, answer.ids)
            mg.align.align(spans, encode_continuation(pair.teacher.tokenizer, answer.text)[1])

    seconds = in_turns(20, run=run)["run"]
    return {"align us/token": 1e6 * seconds / sum(len(r.answer.ids) for r in rollouts)}


def of_sampling(model: LanguageModel, new: int, turns: int) -> Figures:
    """Tokens a second of eight rows that do not end."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    ids_BS = torch.randint(1000, 40000, (8, 16), generator=torch.Generator().manual_seed(0))
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": new}
    settings |= {"attention_mask": torch.ones_like(ids_BS)}
    seconds = in_turns(
        turns,
        minigold=lambda: sample(model.decoder, ids_BS.tolist(), max_new_tokens=new, eos_ids=()),
        transformers=lambda: theirs.generate(ids_BS, **settings),
    )
    return {
        f"sample {model.folder.name} {name} tokens/s": 8 * new / s for name, s in seconds.items()
    }


def of_loss(pair: Pair, rollouts: list[Rollout], turns: int) -> Figures:
    """Value and gradient of all chunks, in blocks and with all logits held."""
    student, teacher = pair.student.decoder, pair.teacher.decoder
    masks, states, values = [np.ones(len(r.chunks.s0), dtype=bool) for r in rollouts], [], []
    for r, mask in zip(rollouts, masks, strict=True):
        prompt, last = r.answer.prompt_ids, needed_states(r, mask) - 1
        with torch.no_grad():
            hidden_SD = student(pad([[*prompt, *r.answer.ids]], student.device))[0]
        states.append(completion_states(hidden_SD, len(prompt), last))
    critic = [r.score.hidden_MD for r in rollouts]
    starts = {"student_starts": starts_of(states), "teacher_starts": starts_of(critic)}
    rows = pack(rollouts, masks, **starts, teacher_end_id=pair.teacher.end_id)
    hidden_ND, teacher_CK = torch.cat(states).requires_grad_(), torch.cat(critic)
    common: dict[str, Any] = {"rows": rows, "events": pair.events, "beta": 0.5}
    weight, ends = 1 / len(rows.observed_C), (student.head, teacher.head)

    def blockwise() -> torch.Tensor:
        heads = dict(zip(("student_head", "teacher_head"), ends, strict=True))
        return gold_loss(hidden_ND, teacher_CK, **heads, **common, weight=weight).total

    def dense() -> torch.Tensor:
        logits = (head.logits(x) for head, x in zip(ends, (hidden_ND, teacher_CK), strict=True))
        return chunk_losses(*logits, **common).sum() * weight

    def run(loss: Callable[[], torch.Tensor]) -> None:
        total = loss()
        total.backward()
        values.append(total.item())
        student.zero_grad(set_to_none=True)

    runs = {"blockwise": lambda: run(blockwise), "dense": lambda: run(dense)}
    seconds = in_turns(turns, **runs)
    assert np.allclose(values, values[0], rtol=1e-4)
    figures = {"loss chunks": len(rows.observed_C), "loss student rows": len(rows.student.ids_N)}
    figures |= {f"loss {name} s": value for name, value in seconds.items()}
    return figures | {f"loss {name} peak MiB": peak_mib(run) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a step of the real pair.")
    parser.add_argument("--swap", action="store_true", help="Gemma teaches SmolLM2")
    parser.add_argument("--turns", type=int, default=3, help="of each alternative")
    parser.add_argument("--new", type=int, default=24, help="tokens sampled a row")
    args = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from real_models import real_folder

    names = ("smollm2", "gemma") if args.swap else ("gemma", "smollm2")
    student, teacher = (mg.load(real_folder(name)) for name in names)
    started = time.perf_counter()
    pair = make_pair(student, teacher)
    figures = {"match vocabularies s": time.perf_counter() - started}
    for model in (student, teacher):
        figures |= of_sampling(model, args.new, args.turns)
    plain = {"student_plain": not args.swap, "teacher_plain": args.swap}
    config = mg.Config(steps=args.turns, batch_size=8, max_new_tokens=args.new, **plain)
    found, rollouts = of_steps(pair, config)
    figures |= found | of_alignment(pair, rollouts)
    seconds = figures["align us/token"] * figures["step completion_tokens"] / 1e6
    figures["align share of step"] = seconds / figures["step seconds"]
    figures |= of_loss(pair, rollouts, args.turns - 1)
    cpu = Path("/proc/cpuinfo").read_text("utf-8").partition("model name\t: ")[2].split("\n")[0]
    packages = ("minigold", "torch", "transformers", "tokenizers")
    print("\n".join(f"{name:45} {value:12.4g}" for name, value in figures.items()))
    machine = {"cores": os.cpu_count(), "processor": cpu or platform.processor()}
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    print(json.dumps({"machine": machine, "versions": versions, "student": names[0], **figures}))


if __name__ == "__main__":
    main()
