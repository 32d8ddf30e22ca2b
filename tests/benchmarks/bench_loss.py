# SPDX-License-Identifier: Apache-2.0
"""Our loss beside TRL's hybrid GOLD loss: same logits, text and tokenizers, value and gradient.

SmolLM2 is the student's tokenizer, Qwen 3 the teacher's. Each run is a process of its own; sides
take turns, and the second run in a process counts. What is timed starts with the logits and the ids
of both sides and ends with the gradient at the student's logits. For ours that is all of it: spans,
chunks, log-probabilities of both sides, what longer tokens carry, the mask, events, divergence. TRL
is given its byte offsets. `gold` trains the chunks that `--where sampled`
picks; `gold, all chunks` trains every one, as TRL does. Memory is the resident set's peak less what
was there before (Linux). Without `--trl` only our side runs. The last line is JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]

import torch  # noqa: E402
from bench_step import peak_mib  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor  # noqa: E402

from minigold.batch import Answer, answer_of, pack, rollout_of  # noqa: E402
from minigold.carry import Reading  # noqa: E402
from minigold.config import Config  # noqa: E402
from minigold.data import Prompt  # noqa: E402
from minigold.events import Events, match  # noqa: E402
from minigold.loss import gold_loss  # noqa: E402
from minigold.masked import choose_chunks  # noqa: E402
from minigold.offsets import encode_continuation, spans_of_ids  # noqa: E402
from minigold.pair import matched  # noqa: E402
from minigold.teacher import read_states  # noqa: E402
from real_models import real_folder  # noqa: E402
from real_tokenizers import real_tokenizer  # noqa: E402

STUDENT_END, TEACHER_END = "<|im_end|>", "<|im_end|>"
V, W = 49_152, 151_936  # rows of both heads
SIZES = ((4, 160), (8, 512))  # answers, student tokens in each


class Inputs(NamedTuple):
    """B finished answers after a prompt of one token, padded; row i predicts token i + 1."""

    student: Tokenizer
    teacher: Tokenizer
    answers: list[Answer]
    student_logits_BSV: Tensor
    teacher_logits_BTW: Tensor


def inputs_of(n_rows: int, n_tokens: int) -> Inputs:
    """English prose and code (this project's pages); random logits that favour what was written."""
    student = Tokenizer.from_file(str(real_folder("smollm2") / "tokenizer.json"))
    teacher = real_tokenizer("qwen3")
    pages = sorted((TESTS.parent / "docs").glob("*.md"))
    ids = encode_continuation(student, "\n".join(p.read_text("utf-8") for p in pages))[0]
    end = student.token_to_id(STUDENT_END)
    answers = [
        answer_of(
            Prompt("", line=1), [0], [*ids[i * n_tokens : (i + 1) * n_tokens], end], finished=True,
            on_policy=True, teacher_prompt_ids=[0], student_tokenizer=student,
            teacher_tokenizer=teacher, end_id=end, identical=False,
        )
        for i in range(n_rows)
    ]  # fmt: skip
    g = torch.Generator().manual_seed(0)
    ended = teacher.token_to_id(TEACHER_END)
    ours = _logits([a.ids for a in answers], V, g).requires_grad_()
    theirs = _logits([[*a.teacher_ids, ended] for a in answers], W, g)
    return Inputs(student, teacher, answers, ours, theirs)


def _logits(rows: list[list[int]], size: int, generator: torch.Generator) -> Tensor:
    made_BSV = torch.empty(len(rows), 1 + max(map(len, rows)), size)
    for logits_SV, ids in zip(made_BSV, rows, strict=True):
        torch.randn(logits_SV.shape, generator=generator, out=logits_SV).mul_(2)
        logits_SV[torch.arange(len(ids)), ids] += 13
    return made_BSV


class Given:
    """The head of states that are logits already."""

    @staticmethod
    def logits(states: Tensor) -> Tensor:
        return states


def gold_events(x: Inputs) -> Events:
    ends = x.student.token_to_id(STUDENT_END), x.teacher.token_to_id(TEACHER_END)
    return match(*matched((x.student, [ends[0]], V), (x.teacher, [ends[1]], W)))


def gold(x: Inputs, events: Events, where: str) -> Tensor:
    """Mean over the chunks that are trained."""
    rollouts = []
    ends = x.student.token_to_id(STUDENT_END), x.teacher.token_to_id(TEACHER_END)
    rows = zip(x.answers, x.student_logits_BSV.detach(), x.teacher_logits_BTW, strict=True)
    for old, ours_SV, theirs_TW in rows:
        a = answer_of(
            old.prompt, old.prompt_ids, old.ids, finished=True, on_policy=True,
            teacher_prompt_ids=old.teacher_prompt_ids, student_tokenizer=x.student,
            teacher_tokenizer=x.teacher, end_id=ends[0], identical=False,
        )  # fmt: skip
        own = read_states(
            Given,
            ours_SV[: len(a.ids) + 1],
            Reading([0], a.ids),
            end_ids=[ends[0]],
            side=events.student,
        )
        critic = read_states(
            Given,
            theirs_TW[: len(a.teacher_ids) + 1],
            a.reading(events),
            end_ids=[ends[1]],
            side=events.teacher,
        )
        logps = {
            "student_logp_S": own.logp_T.numpy(),
            "student_measures_S5": own.measures_T5.numpy(),
        }
        rollouts.append(rollout_of(a, critic, **logps, events=events))
    config = Config(where=where)
    masks = choose_chunks(rollouts, events, config, seed=0)
    lengths = x.student_logits_BSV.shape[1], x.teacher_logits_BTW.shape[1]
    starts = [[i * n for i in range(len(rollouts))] for n in lengths]
    rows = pack(
        rollouts, masks, student_starts=starts[0], teacher_starts=starts[1], teacher_end_id=ends[1]
    )
    total = gold_loss(
        x.student_logits_BSV.flatten(0, 1), x.teacher_logits_BTW.flatten(0, 1), student_head=None,
        teacher_head=None, rows=rows, events=events, beta=config.beta,
        weight=1 / max(1, sum(int(mask.sum()) for mask in masks)),
    ).total  # fmt: skip
    total.backward()
    return total.detach()


def trl_run(x: Inputs) -> Callable[[], Tensor]:
    """TRL's hybrid loss with its other defaults; it is given ids, labels and byte offsets."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=True, uld_skip_teacher_eos=True,
        use_extended_uld=True, uld_token_merge_strategy="observed", uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=None, uld_hybrid_unmatched_weight=None, beta=0.5,
    )  # fmt: skip
    names = [SimpleNamespace(get_vocab=t.get_vocab) for t in (x.student, x.teacher)]
    loss = ULDLoss(config, *names, device=torch.device("cpu"))
    rows = [
        [(a.ids, spans_of_ids(x.student, a.ids[:-1])[:, :2].tolist()) for a in x.answers],
        [
            ([*a.teacher_ids, x.teacher.token_to_id(TEACHER_END)],
             encode_continuation(x.teacher, a.text)[1][:, :2].tolist())
            for a in x.answers
        ],
    ]  # fmt: skip
    logits = [x.student_logits_BSV, x.teacher_logits_BTW]
    ids = [_padded([r[0] for r in side], z, 0) for side, z in zip(rows, logits, strict=True)]
    labels = [_padded([r[0] for r in side], z, -100) for side, z in zip(rows, logits, strict=True)]
    spans = [
        torch.stack([_padded([[s[i] for s in r[1]] for r in side], z, 0) for i in range(2)], dim=-1)
        for side, z in zip(rows, logits, strict=True)
    ]

    def run() -> Tensor:
        total = loss(*logits, *labels, *ids, *spans)
        total.backward()
        return total.detach()

    return run


def _padded(rows: list[list[int]], logits_BSV: Tensor, fill: int) -> Tensor:
    """[B, S]: each row after the one token of its prompt."""
    made_BS = torch.full(logits_BSV.shape[:2], fill)
    for made_S, row in zip(made_BS, rows, strict=True):
        made_S[1 : len(row) + 1] = torch.tensor(row)
    return made_BS


def one_run(side: str, n_rows: int, n_tokens: int) -> dict[str, float]:
    """Seconds and MiB of the second run; the first one does not count."""
    x = inputs_of(n_rows, n_tokens)
    if side == "trl":
        run = trl_run(x)
    else:
        events, where = gold_events(x), "sampled" if side == "gold" else "all"
        run: Callable[[], Tensor] = lambda: gold(x, events, where)  # noqa: E731
    found: dict[str, float] = {}

    def timed() -> None:
        started = time.perf_counter()
        found["loss"] = run().item()
        found["seconds"] = time.perf_counter() - started

    for _ in range(2):
        x.student_logits_BSV.grad = None
        found["peak_mib"] = peak_mib(timed)
    assert x.student_logits_BSV.grad is not None
    found["gradient"] = x.student_logits_BSV.grad.norm().item()
    return found


def in_process(side: str, n_rows: int, n_tokens: int) -> dict[str, float]:
    line = [sys.executable, __file__, "--one", side, str(n_rows), str(n_tokens)]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    print(f"{side}, {n_rows} x {n_tokens}: {done.stdout.splitlines()[-1]}", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Times our loss, beside TRL's.")
    parser.add_argument("--trl", action="store_true", help="beside TRL's, which must be installed")
    parser.add_argument("--turns", type=int, nargs=2, default=(3, 1), help="runs of each size")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_run(args.one[0], *map(int, args.one[1:]))))
        return
    figures: dict[str, float] = {}
    worst: dict[str, float] = {}
    sides = ["gold", "gold, all chunks", *["trl"] * args.trl]
    for size, n_turns in zip(SIZES, args.turns, strict=True):
        if n_turns == 0:
            continue
        turns = [{side: in_process(side, *size) for side in sides} for _ in range(n_turns)]
        name = f"{size[0]} x {size[1]}"
        for side in sides:
            for key in ("seconds", "peak_mib"):
                figures[f"{name} {side} {key}"] = median(turn[side][key] for turn in turns)
                if args.trl and side != "trl":
                    ratio = median(turn["trl"][key] / turn[side][key] for turn in turns)
                    figures[f"{name} trl / {side} {key}"] = ratio
                    worst[side + key] = min(ratio, worst.get(side + key, ratio))
    if args.trl:
        figures["time_ratio_trl_over_gold"] = worst["goldseconds"]
        figures["memory_ratio_gold_over_trl"] = 1 / worst["goldpeak_mib"]
        figures["time_ratio_trl_over_gold_all_chunks"] = worst["gold, all chunksseconds"]
        figures["memory_ratio_gold_all_chunks_over_trl"] = 1 / worst["gold, all chunkspeak_mib"]
    print("\n".join(f"{name:45} {value:12.4g}" for name, value in figures.items()))
    cpu = Path("/proc/cpuinfo").read_text("utf-8").partition("model name\t: ")[2].split("\n")[0]
    packages = ("minigold", "torch", "tokenizers", *["trl"] * args.trl)
    machine = {"threads": torch.get_num_threads(), "processor": cpu or platform.processor()}
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    print(json.dumps({"machine": machine, "versions": versions, **figures}))


if __name__ == "__main__":
    main()
