# SPDX-License-Identifier: Apache-2.0
"""Kills a run again and again (`kill -9`) and goes on with it, each time in a new process.

    python tests/killed_run.py SEED KILLS FOLDER minigold's arguments without --out

The moments are numbered: each rename, flush, cut and removal of a file, each line appended, each file
of tensors (half of it written when the kill comes), each step. One of the first as many as an
undisturbed run has is drawn. When a run ends before all kills are spent, the next one begins.
Prints the kills and the names of the runs in FOLDER: `whole`, which was not disturbed, and the others.

A process is a fork of this one, in which all is imported and nothing was computed.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import minigold.checkpoint
import minigold.train
import minigold.weights
from minigold.cli import main

__all__ = ["campaign"]


class Moments:
    """Counts moments; at number `last` the process dies, and `half` of what it did is on the disk."""

    def __init__(self, last: int) -> None:
        self.count, self.last = 0, last

    def pass_one(self, half: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.last:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        for name in ("replace", "fsync", "truncate", "unlink", "rmdir"):
            setattr(os, name, partial(self._before, getattr(os, name)))
        minigold.train.take_step = partial(self._before, minigold.train.take_step)
        minigold.checkpoint._append = partial(self._appended, minigold.checkpoint._append)
        for module in (minigold.weights, minigold.checkpoint):
            module.save_file = partial(self._saved, module.save_file)

    def _before(self, do: Callable[..., Any], *args: Any, **more: Any) -> Any:
        self.pass_one()
        return do(*args, **more)

    def _saved(self, save: Callable[..., Any], tensors: Any, path: Path, **more: Any) -> None:
        save(tensors, path, **more)
        data = path.read_bytes()
        self.pass_one(lambda: path.write_bytes(data[: len(data) // 2]))

    def _appended(self, append: Callable[..., Any], path: Path, rows: Any) -> None:
        before = path.stat().st_size if path.exists() else 0
        append(path, rows)
        data = path.read_bytes()
        self.pass_one(lambda: path.write_bytes(data[: (before + len(data)) // 2]))


def process(args: list[str], last: int) -> tuple[int, int]:
    """How a process ended (negative: by which signal), and the moments that it passed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        moments = Moments(last)
        moments.watch()
        code = main(args)
        os.write(writing, b"%d" % moments.count)
        os._exit(code)
    os.close(writing)
    told = os.read(reading, 99)
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(told or b"0")


def campaign(seed: int, kills: int, folder: Path, args: list[str]) -> list[str]:
    rng = random.Random(seed)
    code, n = process([*args, "--out", str(folder / "whole")], 0)
    assert code == 0 and n > 10, (code, n)
    names, left = ["whole"], kills
    while left:
        names.append(f"run-{len(names)}")
        out, code = folder / names[-1], -signal.SIGKILL
        while code:
            moment = rng.randint(1, n) if left else 0
            code, _ = process([*args, "--out", str(out), "--resume"], moment)
            assert code in (0, -signal.SIGKILL), code
            left -= code != 0
    return names


if __name__ == "__main__":
    found = campaign(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    print(*found)
