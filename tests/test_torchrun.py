# SPDX-License-Identifier: Apache-2.0
"""`examples/torchrun_fsdp2.py` on two processes: the samples, numbers and weights of one."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import minigold as mg
from minigold.config import option_name
from minigold.masked import micro_batches
from minigold.train import Step, distill
from tiny_folders import edit_json, tiny_folder
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

EXAMPLE = Path(__file__).parent.parent / "examples" / "torchrun_fsdp2.py"
LIMIT = 200  # seconds; a rank that waits for another one waits longer
CLOSE = {"rel": 2e-5, "abs": 1e-6}  # float32, sums in another order
VARYING = {"seconds", "seconds_sample", "seconds_teacher", "seconds_train", "peak_memory_gib"}
SETTINGS: dict[str, Any] = {
    "steps": 5, "batch_size": 5, "micro_batch": 1, "max_new_tokens": 6, "lr": 1e-3, "warmup": 1,
    "lmbda": 0.6, "weight_decay": 0.1, "clip": 0.05, "seed": 3, "where": "reject", "threshold": 0.05,
}  # fmt: skip


def torchrun(*args: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Of the example; all its processes end with it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={ranks}", EXAMPLE, *args]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parent.parent)}
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment, start_new_session=True,
    ) as run:  # fmt: skip
        try:
            said, _ = run.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            pytest.fail(f"the ranks hang: {run.communicate()[0]}")
    return subprocess.CompletedProcess(command, run.returncode, said)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs; a head of its own where the student is a llama."""
    work = tmp_path_factory.mktemp("work")
    sides = {"gemma": ("gemma3_text", sentencepiece_bpe(), "</s>"), "llama": ("llama", byte_bpe(), "<|im_end|>")}
    for i, (name, (family, tokenizer, end)) in enumerate(sides.items()):
        tiny_folder(work / name, family, tokenizer, end=end, seed=2 * i)
    edit_json(work / "llama" / "config.json", tie_word_embeddings=False)
    path = work / "llama" / "model.safetensors"
    weights = load_file(path)
    table = weights["model.embed_tokens.weight"]
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
    save_file({**weights, "lm_head.weight": 0.3 * noise}, path, metadata={"format": "pt"})
    texts = ("hello", "the fox 🙂", "def add", "a", "is it", "one two", "no")
    rows = [{"prompt": text, "completion": " dog", "id": i} for i, text in enumerate(texts)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return work


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("student", "teacher"), [("gemma", "llama"), ("llama", "gemma")])
def test_two_processes_do_what_one_does(
    work: Path, tmp_path: Path, student: str, teacher: str
) -> None:
    config = mg.Config(**SETTINGS, student_plain=True, teacher_plain=True)
    out, steps = tmp_path / "one", list[Step]()
    models = mg.load(work / student), mg.load(work / teacher)
    prompts = mg.data.read_prompts(work / "prompts.jsonl")
    history = distill(*models, prompts, config, out=out, on_step=steps.append)
    words = [word for key, value in SETTINGS.items() for word in (option_name(key), value)]
    done = torchrun(
        "--student", work / student, "--teacher", work / teacher, "--prompts", work / "prompts.jsonl",
        "--out", tmp_path / "two", "--device", "cpu", "--student-plain", "--teacher-plain", *words,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    print(done.stdout)
    for step in steps:
        print([int(m.sum()) for m in step.chosen], [len(m) for m in step.chosen], step.metrics["loss"], step.metrics["grad_norm"])

    exact = ("step", "line", "completion", "on_policy", "student_ids", "chunks", "trained")
    samples = [[{k: row[k] for k in exact} for row in lines(one / "samples.jsonl")]
               for one in (out, tmp_path / "two")]  # fmt: skip
    assert samples[0] == samples[1]
    found = lines(tmp_path / "two" / "metrics.jsonl")
    assert [row.pop("ranks") for row in found] == [2] * len(history)
    for one, row in zip(history, found, strict=True):
        for key in row.keys() - VARYING:
            exact = not isinstance(one[key], float)
            assert row[key] == (one[key] if exact else pytest.approx(one[key], **CLOSE)), key
    first, one, two = (
        load_file(folder / "model.safetensors")
        for folder in (work / student, out / "final", tmp_path / "two" / "final")
    )
    assert one.keys() == two.keys()
    print({name: float((one[name]-two[name]).abs().max()) for name in one})
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
        assert not torch.equal(one[name], first[name])
