# SPDX-License-Identifier: Apache-2.0
"""How the time of the training pass falls with the share of chunks that are trained.

The real pair; answers are sampled once, then masks of several shares take turns, drawn at random
from all chunks (so a row's last chosen chunk lies late: the least that a mask can save). Seconds
are medians of the turns, beside the share of matrix products that `work_saved` predicts. `--plot`
draws both over the share (needs the extra `plot`). The last line is JSON.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_step import PROMPTS  # noqa: E402

import minigold as mg  # noqa: E402
from minigold.batch import Rollout  # noqa: E402
from minigold.masked import train_pass  # noqa: E402
from minigold.pair import Pair, make_pair  # noqa: E402
from minigold.rollout import collect, sample_answers  # noqa: E402
from real_models import real_folder  # noqa: E402

SHARES = (1.0, 0.5, 0.35, 0.2, 0.1, 0.05, 0.02)


def masks_of(rollouts: list[Rollout], share: float, seed: int) -> list[np.ndarray]:
    """`share` of all chunks, at least one."""
    sizes = [len(r.chunks.s0) for r in rollouts]
    n = sum(sizes)
    drawn = np.zeros(n, dtype=bool)
    drawn[np.random.default_rng(seed).permutation(n)[: max(1, round(share * n))]] = True
    return np.split(drawn, np.cumsum(sizes)[:-1])


def measured(pair: Pair, config: mg.Config, turns: int) -> dict[float, tuple[float, float]]:
    """Of each share: median seconds of a training pass, and the work that is left."""
    prompts = mg.data.read_prompts(PROMPTS)[: config.batch_size]
    rollouts = collect(pair, *sample_answers(pair, prompts, config, number=1), config)
    found: dict[float, list[tuple[float, float]]] = {share: [] for share in SHARES}
    for turn in range(turns + 1):
        for share, runs in found.items():
            masks = masks_of(rollouts, share, seed=turn)
            started = time.perf_counter()
            done = train_pass(pair, rollouts, masks, config)
            runs.append((time.perf_counter() - started, 1 - done.work_saved))
            pair.student.decoder.zero_grad(set_to_none=True)
    return {
        share: (median(run[0] for run in runs[1:]), median(run[1] for run in runs[1:]))
        for share, runs in found.items()
    }


def plot(path: Path, tables: dict[str, dict[float, tuple[float, float]]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for color, (name, table) in zip(("C0", "C1"), tables.items(), strict=True):
        whole = table[1.0][0]
        axes.plot(SHARES, [table[x][0] / whole for x in SHARES], "o-", color=color, label=name)
        axes.plot(
            SHARES, [table[x][1] for x in SHARES], ":", color=color, label=f"{name}, products left"
        )
    axes.set_xlabel("share of chunks that are trained")
    axes.set_ylabel("time of the training pass (all chunks: 1)")
    axes.set_ylim(0, 1.1)
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Times training passes over the trained share.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new", type=int, default=48, help="tokens sampled a row")
    parser.add_argument("--plot", type=Path, help="where to draw it: a .svg or .png file")
    args = parser.parse_args()
    tables = {}
    for names in (("gemma", "smollm2"), ("smollm2", "gemma")):
        student, teacher = (mg.load(real_folder(name)) for name in names)
        plain = {"student_plain": names[0] == "gemma", "teacher_plain": names[1] == "gemma"}
        config = mg.Config(batch_size=args.rows, max_new_tokens=args.new, where="all", **plain)
        tables[names[0]] = measured(make_pair(student, teacher), config, args.turns)
        for share, (seconds, left) in tables[names[0]].items():
            whole = tables[names[0]][1.0][0]
            print(
                f"{names[0]:8} trains {share:4.0%} of chunks: {seconds:6.2f} s, {seconds / whole:4.2f} "
                f"of all chunks' time ({left:4.2f} of the matrix products)"
            )
    if args.plot:
        plot(args.plot, tables)
    cpu = Path("/proc/cpuinfo").read_text("utf-8").partition("model name\t: ")[2].split("\n")[0]
    machine = {"threads": torch.get_num_threads(), "processor": cpu or platform.processor()}
    versions = {p: version(p) for p in ("minigold", "torch")}
    versions["python"] = platform.python_version()
    print(
        json.dumps({"machine": machine | {"cores": os.cpu_count()}, "versions": versions, **tables})
    )


if __name__ == "__main__":
    main()
