# SPDX-License-Identifier: Apache-2.0
"""`examples/torchrun_fsdp2.py` on several processes: the samples, numbers and weights of one."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import minigold as mg
from minigold.config import option_name
from minigold.demo import one_thread
from minigold.train import Step, distill
from tiny_folders import edit_json, tiny_folder
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

ROOT = Path(__file__).parent.parent
LIMIT = 120  # seconds; ranks that wait for one another wait longer
VARYING = {"seconds", "seconds_sample", "seconds_teacher", "seconds_train", "peak_memory_gib"}
EXACT = ("step", "line", "completion", "on_policy", "student_ids", "chunks", "trained")
BASE: dict[str, Any] = {
    "steps": 4, "micro_batch": 1, "max_new_tokens": 6, "lr": 1e-3, "warmup": 1, "lmbda": 0.6,
    "weight_decay": 0.1, "clip": 0.05, "student_plain": True, "teacher_plain": True,
}  # fmt: skip
FEW = {"student": "gemma", "batch_size": 5, "where": "reject", "threshold": 0.002}
RUNS: dict[str, dict[str, Any]] = {
    "few": {**FEW, "seed": 9, "steps": 5},
    "none": {**FEW, "seed": 5, "steps": 3},
    "rollouts": {"student": "llama", "batch_size": 3, "rollouts": 2, "seed": 5, "steps": 3,
                 "gradient_checkpointing": True},
}  # fmt: skip
REFUSED = {
    "too-few": {**FEW, "batch_size": 1},
    "picks": {**FEW, "where": "soft-or", "threshold": 0.5},
}
# all runs in one launch, whose imports take longer than they do
DRIVER = """
import json, sys
import torch.distributed as dist
from torchrun_fsdp2 import main

begin, end = dist.init_process_group, dist.destroy_process_group  # a second beginning would hang
dist.init_process_group = lambda *given: dist.is_initialized() or begin(*given)
dist.destroy_process_group = lambda: None
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except ValueError as error:
        print("refused:", error, flush=True)
end()
"""


def torchrun(script: Path, *args: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """All its processes end with it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={ranks}", str(script), *args]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    ) as run:  # fmt: skip
        try:
            said, _ = run.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            run.terminate()  # it ends its ranks
            pytest.fail(f"ranks hang: {run.communicate(timeout=LIMIT)[0]}")
    return subprocess.CompletedProcess(command, run.returncode, said)


def words_of(work: Path, out: Path, student: str, **settings: Any) -> list[str]:
    """The command line of a run."""
    teacher = {"gemma": "llama", "llama": "gemma"}[student]
    words = [f"--student={work / student}", f"--teacher={work / teacher}", f"--out={out}",
             f"--prompts={work / 'prompts.jsonl'}", "--device=cpu"]  # fmt: skip
    for key, value in {**BASE, **settings}.items():
        words.append(option_name(key) + ("" if value is True else f"={value}"))
    return words


def launched(work: Path, out: Path, runs: dict[str, dict[str, Any]], ranks: int) -> str:
    """What the ranks say; run by run in a folder of its name."""
    script = work / "driver.py"
    script.write_text(DRIVER, "utf-8")
    lines = [words_of(work, out / name, **run) for name, run in runs.items()]
    done = torchrun(script, json.dumps(lines), ranks=ranks)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma has a tied head, the llama one of its own."""
    work = tmp_path_factory.mktemp("work")
    tiny_folder(work / "gemma", "gemma3_text", sentencepiece_bpe(), end="</s>")
    tiny_folder(work / "llama", "llama", byte_bpe(), end="<|im_end|>", seed=2)
    edit_json(work / "llama" / "config.json", tie_word_embeddings=False)
    path = work / "llama" / "model.safetensors"
    weights = load_file(path)
    noise = torch.randn(
        weights["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(1)
    )
    save_file({**weights, "lm_head.weight": 0.3 * noise}, path, metadata={"format": "pt"})
    texts = ("hello", "the fox 🙂", "def add", "a", "is it", "one two", "no")
    rows = [{"prompt": text, "completion": " dog", "id": i} for i, text in enumerate(texts)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return work


@pytest.fixture(scope="module")
def two(work: Path) -> tuple[Path, str]:
    """The runs of two ranks, and what these say."""
    return work / "two", launched(work, work / "two", {**RUNS, **REFUSED}, ranks=2)


@one_thread()
def single(work: Path, out: Path, student: str, **settings: Any) -> list[Step]:
    """The run in one process, with one thread as each rank: two add up in another order."""
    teacher, steps = {"gemma": "llama", "llama": "gemma"}[student], list[Step]()
    distill(
        mg.load(work / student), mg.load(work / teacher),
        mg.data.read_prompts(work / "prompts.jsonl"), mg.Config(**{**BASE, **settings}), out=out,
        on_step=steps.append,
    )  # fmt: skip
    return steps


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def trained_rows(steps: Sequence[Step], ranks: int) -> list[list[int]]:
    """Of each step, the rows with a chosen chunk that each rank has; they are its micro-batches."""
    found = []
    for step in steps:
        has, n = [bool(mask.any()) for mask in step.chosen], len(step.chosen)
        bounds = [n * rank // ranks for rank in range(ranks + 1)]
        found.append([sum(has[a:b]) for a, b in pairwise(bounds)])
    return found


def assert_same(many: Path, one: Path, steps: Sequence[Step], ranks: int) -> None:
    """Samples and masks exactly, numbers to 2e-5, weights to a hundredth of the learning rate.

    All is float32, with sums in another order; AdamW makes much of the noise in a gradient near 0.
    """
    samples = [[{key: row[key] for key in EXACT} for row in lines(folder / "samples.jsonl")]
               for folder in (many, one)]  # fmt: skip
    assert samples[0] == samples[1]
    found = lines(many / "metrics.jsonl")
    assert [row.pop("ranks") for row in found] == [ranks] * len(steps)
    for step, row in zip(steps, found, strict=True):
        assert row.keys() == step.metrics.keys()
        for key in row.keys() - VARYING:
            expected = step.metrics[key]
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=2e-5, abs=1e-6)
            assert row[key] == expected, key
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (many, one))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=BASE["lr"] / 100)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(
    work: Path, tmp_path: Path, two: tuple[Path, str], name: str
) -> None:
    steps = single(work, tmp_path / "one", **RUNS[name])
    rows = trained_rows(steps, 2)
    if name == "few":  # each has one with nothing to do while the other trains
        assert any(a == 0 < b for a, b in rows) and any(b == 0 < a for a, b in rows)
    elif name == "none":
        assert [0, 0] in rows
    else:
        assert any(a > b > 0 for a, b in rows)
    norms = [step.metrics["grad_norm"] for step, row in zip(steps, rows, strict=True) if any(row)]
    assert min(norms) > BASE["clip"]
    assert_same(two[0] / name, tmp_path / "one", steps, 2)
    start, end = (load_file(folder / "model.safetensors")
                  for folder in (work / RUNS[name]["student"], two[0] / name / "final"))  # fmt: skip
    moved = [float((end[key] - start[key]).abs().max()) for key in start]
    assert min(moved) > BASE["lr"]
    assert len(mg.load(two[0] / name / "final").decoder.state_dict()) == len(start)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_other_numbers_of_processes_do_as_well(work: Path, tmp_path: Path, ranks: int) -> None:
    launched(work, tmp_path, RUNS, ranks=ranks)
    for name, run in RUNS.items():
        steps = single(work, tmp_path / f"one-{name}", **run)
        assert_same(tmp_path / name, tmp_path / f"one-{name}", steps, ranks)


def test_what_would_be_another_run_is_refused(two: tuple[Path, str]) -> None:
    folder, said = two
    for got in (r"got reject and 1 rows;", r"got soft-or and 5 rows;"):
        assert said.count(got) == 2, said  # once a rank
    assert not any((folder / name).exists() for name in REFUSED)
