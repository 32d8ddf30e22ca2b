# SPDX-License-Identifier: Apache-2.0
"""`kill -9` at any moment, in the middle of a save too: the run ends as one that nobody killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_resume import arguments, assert_same, outcome, work

__all__ = ["work"]  # a fixture


def killed(work: Path, tmp_path: Path, seed: int, kills: int) -> None:
    script = Path(__file__).parent / "killed_run.py"
    words = arguments(work, steps=4, eval_prompts=work / "prompts.jsonl", eval_every=2)
    done = subprocess.run(
        [sys.executable, script, str(seed), str(kills), tmp_path, *words],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = done.stdout.splitlines()[-1].split()
    assert names[0] == "whole" and len(names) > 1
    for name in names[1:]:
        assert_same(tmp_path / name, outcome(tmp_path / "whole"))


def test_a_run_killed_at_three_moments_ends_as_if_it_had_not_been(
    work: Path, tmp_path: Path
) -> None:
    killed(work, tmp_path, seed=1, kills=3)


@pytest.mark.slow
def test_a_run_killed_at_fifty_moments_ends_as_if_it_had_not_been(
    work: Path, tmp_path: Path
) -> None:
    killed(work, tmp_path, seed=2, kills=50)
