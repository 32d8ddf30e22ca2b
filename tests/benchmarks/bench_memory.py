# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the loss from hidden states, beside the same with all logits held (Linux).

By default 4,096 positions, vocabularies of 49,152 and 262,144, width 640 on both sides, float32. A
run is a process of its own; its figure is the resident set's peak less what was there before the
loss: the inputs. The gradients of the parameters and of the states are named apart, for they are
asked for. `--dense` runs `chunk_losses` on all logits too (it needs some 20 GiB at this size). The
last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]

import torch  # noqa: E402
from bench_step import peak_mib  # noqa: E402
from torch import Tensor  # noqa: E402

from minigold.events import Events, match  # noqa: E402
from minigold.loss import FIRST, Carry, ChunkRows, Rows, chunk_losses, gold_loss  # noqa: E402
from minigold.model import Head  # noqa: E402
from minigold.offsets import Vocabulary  # noqa: E402

V, W, D = 49_152, 262_144, 640


def vocabularies() -> Events:
    """Nine tenths of the student's tokens are shared; the teacher has all of its own size."""
    student = [b"%d" % i for i in range(V - 1)]
    teacher = [b"%d" % (i + V // 10) for i in range(W - 1)]
    sides = (
        Vocabulary((*texts, b""), (*["text"] * len(texts), "end"), {})
        for texts in (student, teacher)
    )
    return match(*sides)


def rows_of(n: int) -> ChunkRows:
    """One-to-one chunks, one prediction each."""
    every, zeros = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    own = Rows(every, every, zeros + V // 10, torch.full((n,), FIRST))
    carry = Carry(none, none, torch.zeros(0))
    return ChunkRows(own, every, zeros, torch.zeros(n), carry, torch.zeros(n, dtype=torch.bool))


def one_run(kind: str, n: int, block: int, softcap: float | None) -> dict[str, float]:
    g = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    hidden_SD, weight_VD = made(n, D).requires_grad_(), (made(V, D) / D**0.5).requires_grad_()
    teacher_TK, teacher_WK = made(n, D), made(W, D) / D**0.5
    events, rows = vocabularies(), rows_of(n)
    heads = Head(weight_VD, softcap), Head(teacher_WK, softcap)
    found: dict[str, float] = {}

    def run() -> None:
        started = time.perf_counter()
        if kind == "dense":
            logits = heads[0].logits(hidden_SD), heads[1].logits(teacher_TK)
            total = chunk_losses(*logits, rows=rows, events=events, beta=0.5).sum() / n
        else:
            total = gold_loss(
                hidden_SD, teacher_TK, student_head=heads[0], teacher_head=heads[1], rows=rows,
                events=events, beta=0.5, weight=1 / n, block=block,
            ).total  # fmt: skip
        total.backward()
        found["seconds"], found["loss"] = time.perf_counter() - started, total.item()

    found["peak_mib"] = peak_mib(run)
    found["gradients_mib"] = 4 * (weight_VD.numel() + hidden_SD.numel()) / 2**20
    found["beyond_mib"] = found["peak_mib"] - found["gradients_mib"]
    return found


def in_process(*words: object) -> dict[str, float]:
    line = [sys.executable, __file__, "--one", *map(str, words)]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the loss's peak memory.")
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--softcap", type=float, help="squeeze all logits into (-S, S), as Gemma 2")
    parser.add_argument("--dense", action="store_true", help="with all logits held, too")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, n, block, softcap = args.one
        print(json.dumps(one_run(kind, int(n), int(block), float(softcap) or None)))
        return
    runs = [("blocks", n, block) for n in args.positions for block in args.blocks]
    runs += [("dense", n, 0) for n in args.positions if args.dense]
    figures = {}
    for kind, n, block in runs:
        found = in_process(kind, n, block, args.softcap or 0)
        name = f"{n} positions, " + (f"blocks of {block}" if block else "all logits")
        figures[name] = found
        print(
            f"{name:32} {found['beyond_mib']:8.0f} MiB beyond inputs and gradients "
            f"({found['gradients_mib']:.0f} MiB), {found['seconds']:6.1f} s, loss {found['loss']:.6f}"
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
