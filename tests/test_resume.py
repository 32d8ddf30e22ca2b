# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped, whenever and however, ends as one that was not."""

import dataclasses
import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minigold as mg
from minigold import checkpoint, data
from minigold.checkpoint import check_whole, checkpoints_of, moments, open_run, set_moments
from minigold.cli import main
from minigold.config import BEST_BY, Config, option_name
from minigold.evaluate import evaluate
from minigold.pair import make_pair
from minigold.stop import asked_to_stop
from minigold.train import Step, adamw, distill
from tiny_folders import tiny_folder
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

VARYING = {"seconds", "seconds_sample", "seconds_teacher", "seconds_train", "peak_memory_gib"}
SETTINGS: dict[str, Any] = {
    "steps": 5, "batch_size": 2, "rollouts": 2, "max_new_tokens": 8, "lr": 0.01, "warmup": 1,
    "lmbda": 0.7, "weight_decay": 0.1, "save_every": 1, "seed": 3,
}  # fmt: skip
CONFIG = Config(**SETTINGS, student_plain=True, teacher_plain=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    tiny_folder(work / "student", "gemma3_text", sentencepiece_bpe(), begin="<s>", end="</s>")
    tiny_folder(work / "teacher", "llama", byte_bpe(), end="<|im_end|>", seed=2)
    texts = ("hello", "the fox 🙂", "def add")
    rows = [{"prompt": text, "completion": " dog", "id": i} for i, text in enumerate(texts)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (work / "prompts.jsonl").write_text(text, "utf-8")
    return work


def train(work: Path, out: Path, config: Config = CONFIG, **more: Any) -> list[dict[str, Any]]:
    """What a process does: models are read anew."""
    student, teacher = mg.load(work / "student"), mg.load(work / "teacher")
    prompts = mg.data.read_prompts(work / "prompts.jsonl")
    return distill(student, teacher, prompts, config, out=out, **more)


def arguments(work: Path, **changes: Any) -> list[str]:
    """Of `minigold train`, without --out."""
    given = {"teacher": work / "teacher", "student": work / "student",
             "prompts": work / "prompts.jsonl", **SETTINGS, **changes}  # fmt: skip
    words = [(option_name(key), str(value)) for key, value in given.items()]
    return ["train", "--plain-prompt", *(word for pair in words for word in pair)]


def outcome(out: Path) -> dict[str, Any]:
    """All that a finished run leaves, but for times, memory, and what is of no consequence."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    files.pop("report.html", None)  # it draws times
    for name in {"metrics.jsonl", "eval.jsonl"} & set(files):
        rows = [json.loads(line) for line in files[name].splitlines()]
        files[name] = [{k: v for k, v in row.items() if k not in VARYING} for row in rows]
    assert all(("." + "part") not in name for name in files), sorted(files)
    return {k: v for k, v in files.items() if k != "config.json" and "checkpoint.json" not in k}


def assert_same(out: Path, expected: dict[str, Any]) -> None:
    found = outcome(out)
    assert set(found) == set(expected)
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def whole(work: Path) -> dict[str, Any]:
    """What a run leaves that nobody stops."""
    train(work, work / "whole")
    found = outcome(work / "whole")
    assert {"samples.jsonl", "final/model.safetensors", "checkpoints/step-5/optimizer.safetensors",
            "checkpoints/step-4/model.safetensors"} < set(found)  # fmt: skip
    first, last = (
        load_file(work / place / "model.safetensors") for place in ("student", "whole/final")
    )
    assert any(not torch.equal(first[name], last[name]) for name in first)
    on_policy = [json.loads(row)["on_policy"] for row in found["samples.jsonl"].splitlines()]
    assert set(on_policy) == {True, False}
    return found


def stopped(work: Path, out: Path, after: int, config: Config = CONFIG) -> None:
    """A run that stops after some steps."""
    seen: list[Step] = []
    history = train(work, out, config, on_step=seen.append, stop=lambda: len(seen) == after)
    assert len(history) == len(seen) == after
    assert not (out / "final").exists()


# ------------------------------------------------------------------------------ being asked to
def test_a_run_stopped_after_each_of_its_steps_is_the_same(
    work: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    config = dataclasses.replace(CONFIG, save_every=0)
    for done in range(1, 5):
        seen: list[Step] = []
        history = train(work, tmp_path, config, resume=True, on_step=seen.append, stop=lambda: True)
        assert [row["step"] for row in history] == list(range(1, done + 1))
        assert [step.metrics["step"] for step in seen] == [done]
    history = train(
        work, tmp_path, config, resume=True, stop=lambda: True
    )  # nothing is left to stop
    rows = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    assert history == rows
    expected = {k: v for k, v in whole.items() if "step-5" not in k}
    found = {k: v for k, v in outcome(tmp_path).items() if "step-3" not in k}
    assert found == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(
    work: Path, tmp_path: Path, whole: dict[str, Any], number: int, code: int,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def line(metrics: dict[str, Any], _steps: int) -> str:
        if metrics["step"] == 2:
            signal.raise_signal(number)
        return f"line of {metrics['step']}"

    monkeypatch.setattr("minigold.cli.step_line", line)
    args = [*arguments(work), "--out", str(tmp_path / "run")]
    assert main(args) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert "stopping after this step; once more to end at once\n" in err
    assert re.search(
        r"stopped after step 2 of 5, with a checkpoint; .* the same command .*--res", err
    )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [p.name for p in checkpoints_of(tmp_path / "run")] == ["step-2", "step-1"]
    monkeypatch.undo()
    assert main([*args, "--resume"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["step"] == 5
    assert "goes on after step 2 of 5\n" in err and "step 3/5" in err and "step 2/5" not in err
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(
    work: Path, tmp_path: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def line(_metrics: dict[str, Any], _steps: int) -> str:
        signal.raise_signal(number)
        signal.raise_signal(number)
        raise AssertionError("went on")

    monkeypatch.setattr("minigold.cli.step_line", line)
    args = [*arguments(work), "--save-every", "0", "--out", str(tmp_path / "run")]
    assert main(args) == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert checkpoints_of(tmp_path / "run") == []


def test_a_process_told_to_end_does_so_after_its_step(work: Path, tmp_path: Path) -> None:
    args = [*arguments(work, steps=100_000, save_every=0), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "minigold", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("step 1/"))
        process.terminate()
        rest = process.stderr.read()
        assert process.wait() == 143
    assert rest.endswith("to go on, give the same command with --resume\n")
    assert len(checkpoints_of(tmp_path / "run")) == 1
    check_whole(checkpoints_of(tmp_path / "run")[0])


def test_a_second_process_leaves_a_run_alone(work: Path, tmp_path: Path) -> None:
    """A job that was queued again while the old one still writes."""
    out = tmp_path / "run"
    args = [*arguments(work, steps=100_000, save_every=1), "--out", str(out), "--resume"]
    command = [sys.executable, "-m", "minigold", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("step 1/"))
        process.send_signal(signal.SIGSTOP)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        try:
            second = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=60
            )
            assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        finally:  # also where the second one goes on for ever
            process.send_signal(signal.SIGCONT)
            process.terminate()
        process.stderr.read()
        assert process.wait() == 143
    message = f"expected that no other process writes to {out}, got one that does; wait for it"
    assert second.returncode == 2 and message in second.stderr
    assert len(train(work, out, dataclasses.replace(CONFIG, steps=100_000, save_every=1), resume=True,
                     stop=lambda: True)) >= 2  # fmt: skip


def test_a_disk_without_locks_is_warned_of(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(data.fcntl, "flock", refuse)
    train(work, tmp_path / "run", dataclasses.replace(CONFIG, steps=1))
    assert "cannot be locked" in caplog.text


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    found: list[Any] = []

    def look() -> None:
        with asked_to_stop() as stop:
            found.append((signal.getsignal(signal.SIGINT), stop()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGINT), False)]


def test_a_library_call_leaves_signals_alone(work: Path, tmp_path: Path) -> None:
    before, seen = signal.getsignal(signal.SIGINT), []
    config = dataclasses.replace(CONFIG, steps=1)
    train(work, tmp_path, config, on_step=lambda _: seen.append(signal.getsignal(signal.SIGINT)))
    assert seen == [before]


def test_without_a_folder_a_run_stops_all_the_same(work: Path) -> None:
    student, teacher = mg.load(work / "student"), mg.load(work / "teacher")
    prompts = mg.data.read_prompts(work / "prompts.jsonl")
    assert len(distill(student, teacher, prompts, CONFIG, stop=lambda: True)) == 1
    with pytest.raises(ValueError, match="expected `out` with `resume`, got none"):
        distill(student, teacher, prompts, CONFIG, resume=True)


def test_an_adapter_comes_back_bit_for_bit(work: Path, tmp_path: Path) -> None:
    """Stopped after each step; killed where a checkpoint is torn; and from an adapter as student."""
    config = dataclasses.replace(CONFIG, lora_rank=3, lora_targets="q_proj,down_proj")
    train(work, tmp_path / "whole", config)
    expected = outcome(tmp_path / "whole")
    names = {name for name in expected if name.startswith("checkpoints/step-5/")}
    assert {name.rpartition("/")[2] for name in names} == {
        "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
        "optimizer.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for _ in range(4):
        train(work, tmp_path / "parts", config, resume=True, stop=lambda: True)
    newest = checkpoints_of(tmp_path / "parts")[0]
    flip(newest / "adapter_model.safetensors")
    train(work, tmp_path / "parts", config, resume=True)
    assert_same(tmp_path / "parts", expected)
    student, teacher = mg.load(work / "student"), mg.load(work / "teacher")
    prompts = mg.data.read_prompts(work / "prompts.jsonl")
    distill(student, teacher, prompts, config, out=tmp_path / "whole", resume=True)
    final = load_file(tmp_path / "whole" / "final" / "adapter_model.safetensors")
    tensors = {f"base_model.model.{n}": x for n, x in student.decoder.state_dict().items()}
    assert final and all(torch.equal(tensors[name], x) for name, x in final.items())
    for rank, name in ((4, "lora-rank"), (0, "lora-rank")):
        other = dataclasses.replace(
            config, lora_rank=rank, lora_targets="q_proj" if rank else "all"
        )
        with pytest.raises(ValueError, match=rf"got another --{name} \(3 then, {rank} now\)"):
            train(work, tmp_path / "whole", other, resume=True)


def test_training_on_from_an_adapter_comes_back_too(work: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lora_rank=3, steps=2)
    train(work, tmp_path / "first", config)
    teacher, prompts = mg.load(work / "teacher"), mg.data.read_prompts(work / "prompts.jsonl")
    for lora_rank in (3, 0):  # with the adapter, and merged
        again = dataclasses.replace(config, lora_rank=lora_rank)
        for out, stops in ((f"whole {lora_rank}", 0), (f"parts {lora_rank}", 1)):
            for resume in (False, True)[: 1 + stops]:
                student = mg.load(tmp_path / "first" / "final")
                stop = lambda stops=stops, resume=resume: bool(stops and not resume)  # noqa: E731
                distill(
                    student, teacher, prompts, again, out=tmp_path / out, resume=resume, stop=stop
                )
        assert_same(tmp_path / f"parts {lora_rank}", outcome(tmp_path / f"whole {lora_rank}"))
        base = json.loads((tmp_path / "first" / "final" / "adapter_config.json").read_text("utf-8"))
        found = tmp_path / f"whole {lora_rank}" / "final" / "adapter_config.json"
        assert (found.exists() and json.loads(found.read_text("utf-8")) == base) == bool(lora_rank)


# ------------------------------------------------------------------------------- a full disk
def no_space(path: Path, tensors: int = 1) -> Callable[..., None]:
    """In place of `save_file`: room for some files of tensors, then for half of one."""
    from safetensors.torch import save_file

    left = [tensors]

    def save(values: Any, target: Path, **more: Any) -> None:
        save_file(values, target, **more)
        if path in target.parents or path == target.parent:
            left[0] -= 1
            if left[0] < 0:
                target.write_bytes(target.read_bytes()[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    return save


@pytest.mark.parametrize(
    ("module", "room", "last"),
    [("weights", 0, 0), ("weights", 1, 1), ("weights", 4, 4), ("weights", 5, 5),
     ("checkpoint", 0, 0), ("checkpoint", 1, 1), ("checkpoint", 4, 4)],
)  # fmt: skip
def test_a_full_disk_keeps_the_checkpoint_before(
    work: Path, tmp_path: Path, whole: dict[str, Any], module: str, room: int, last: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = dataclasses.replace(CONFIG, keep=1)
    monkeypatch.setattr(f"minigold.{module}.save_file", no_space(tmp_path, room))
    kept = rf"the last checkpoint is .*step-{last}" if last else "there is no checkpoint yet"
    message = rf"expected to write to .*No space left.*; {kept}; make room, then give the same comm"
    with pytest.raises(OSError, match=message):
        train(work, tmp_path, config)
    assert [p.name for p in checkpoints_of(tmp_path)] == [f"step-{last}"] * (last > 0)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part")]
    assert not (tmp_path / "final").exists()
    monkeypatch.undo()
    train(work, tmp_path, config, resume=True)
    assert_same(tmp_path, {k: v for k, v in whole.items() if "step-4" not in k})


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """The system refuses to write more, in the middle of a file, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_log_or_a_file_of_tensors_that_the_system_cuts(
    work: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    logs, tensors = tmp_path / "logs", tmp_path / "tensors"
    size = len("".join(json.dumps(row) + "\n" for row in train(work, tmp_path / "x")[:3]))
    config = dataclasses.replace(CONFIG, save_every=2)
    train(work, logs, config, stop=lambda: True)
    shutil.copytree(logs, tensors)
    samples = (logs / "samples.jsonl").stat().st_size
    optimizer = logs / "checkpoints" / "step-1" / "optimizer.safetensors"
    assert size + samples < optimizer.stat().st_size
    for out, most, last in (
        (logs, 2 * samples + 100, 1), (tensors, optimizer.stat().st_size - 1, 1),
    ):  # fmt: skip
        # what the limit meets first: the line of a log, or a file of tensors
        with largest_file(most), pytest.raises(OSError, match="expected to write to") as caught:
            train(work, out, config, resume=True)
        assert f"step-{last}; make room" in str(caught.value)
        assert (out / "samples.jsonl").stat().st_size == most or out is tensors
        assert not [p for p in out.rglob("*") if p.name.endswith(".part")]
        train(work, out, CONFIG, resume=True)
        assert_same(out, whole)


# ------------------------------------------------------------------------------- torn files
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(**changes: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        old = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({**old, **changes}), "utf-8")

    return change


TEARS: list[tuple[str, Callable[[Path], object], str]] = [
    *(("model.safetensors", tear, "model.safetensors is not what") for tear in (cut, flip)),
    *(("optimizer.safetensors", tear, "optimizer.safetensors is not") for tear in (cut, flip)),
    ("tokenizer.json", cut, "tokenizer.json is not what was written"),
    ("config.json", Path.unlink, "config.json is missing"),
    ("checkpoint.json", Path.unlink, "checkpoint.json is missing"),
    ("checkpoint.json", lambda path: path.write_bytes(b""), "checkpoint.json: expected one JSON obj"),
    ("checkpoint.json", lambda path: cut(path) or cut(path), "checkpoint.json: expected one JSON"),
    ("checkpoint.json", lambda path: path.write_text("{}"), "a checkpoint's checkpoint.json, got"),
    ("checkpoint.json", edit(files=3), "a checkpoint's checkpoint.json, got another object"),
    ("checkpoint.json", edit(step=2), "expected format 1 of step-3 in checkpoint.json, got another"),
    ("checkpoint.json", edit(format=2), "expected format 1 of step-3 in checkpoint.json, got another"),
    ("../../metrics.jsonl", cut, "metrics.jsonl ends before this step"),
    ("../../samples.jsonl", cut, "samples.jsonl ends before this step"),
]  # fmt: skip


@pytest.fixture(scope="module")
def half_done(work: Path) -> Path:
    stopped(work, work / "half", after=3)
    return work / "half"


@pytest.mark.parametrize(
    ("name", "tear", "message"), TEARS, ids=[f"{t[0]} {t[2][-9:]}" for t in TEARS]
)
def test_a_torn_checkpoint_is_passed_over(
    work: Path, half_done: Path, tmp_path: Path, whole: dict[str, Any], name: str,
    tear: Callable[[Path], object], message: str, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger="minigold")
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    tear(out / "checkpoints" / "step-3" / name)
    train(work, out, resume=True)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and re.search(rf"step-3 is passed over: .*{message}", warnings[0])
    assert f"{out} goes on after step 2 of 5" in caplog.messages
    assert_same(out, whole)


def test_a_whole_checkpoint_is_not_passed_over(
    work: Path, half_done: Path, tmp_path: Path, whole: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger="minigold")
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    (out / "checkpoints" / ".step-4.part").mkdir()
    (out / ".final.part").mkdir()
    (out / ".config.json.part").write_text("{", "utf-8")
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4}\n{"st')
    with (out / "samples.jsonl").open("ab") as file:
        file.write(b'{"ste')
    (out / "failed").mkdir()
    (out / "failed" / "step-4.json").write_text("{}", "utf-8")
    train(work, out, resume=True)
    assert f"{out} goes on after step 3 of 5" in caplog.messages
    assert not any(r.levelno == logging.WARNING for r in caplog.records)
    assert_same(out, whole)


def test_a_torn_checkpoint_does_not_count_among_those_kept(
    work: Path, half_done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    cut(out / "checkpoints" / "step-3" / "model.safetensors")
    train(work, out, dataclasses.replace(CONFIG, save_every=4), resume=True)
    assert [p.name for p in checkpoints_of(out)] == ["step-4", "step-2"]


def test_torn_checkpoints_alone_are_refused_and_left_as_they_are(
    work: Path, half_done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    (out / "metrics.jsonl").unlink()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match=r"expected a whole checkpoint in .*, got torn ones alone; put"
    ):
        train(work, out, resume=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_lines_of_other_steps_are_refused(work: Path, half_done: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    text = (out / "metrics.jsonl").read_text("utf-8")
    (out / "metrics.jsonl").write_text(text.replace('"step": 2', '"step": 7'), "utf-8")
    with pytest.raises(
        ValueError, match=r"expected the lines of steps 1 to 3 in .*, got 3 others; put"
    ):
        train(work, out, resume=True)
    (out / "metrics.jsonl").write_text(text.replace('"step": 2', '"step": x'), "utf-8")
    with pytest.raises(ValueError, match=r"metrics.jsonl: expected one JSON object"):
        train(work, out, resume=True)


# ------------------------------------------------------------------------------ what is there
def test_a_checkpoint_is_a_model_and_what_adamw_has(work: Path, half_done: Path) -> None:
    folder = half_done / "checkpoints" / "step-3"
    student = mg.load(folder)
    assert student.folder == folder
    stored = load_file(folder / "optimizer.safetensors")
    names = [name for name, _ in student.decoder.named_parameters()]
    assert set(stored) == {f"{k}.{n}" for n in names for k in ("step", "exp_avg", "exp_avg_sq")}
    assert {float(stored[f"step.{name}"]) for name in names} == {3.0}
    assert not [p for p in half_done.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pickle")]


def test_weights_of_sixteen_bits_come_back_as_they_were(work: Path, tmp_path: Path) -> None:
    """The checkpoint holds what is trained, whatever the type."""
    runs = []
    for out, stops in ((tmp_path / "whole", False), (tmp_path / "parts", True)):
        for resume in (False, True)[: 1 + stops]:
            student = mg.load(work / "student", dtype=torch.bfloat16)
            teacher, prompts = (
                mg.load(work / "teacher"),
                mg.data.read_prompts(work / "prompts.jsonl"),
            )
            distill(student, teacher, prompts, dataclasses.replace(CONFIG, steps=2), out=out,
                    resume=resume, stop=lambda stops=stops, resume=resume: stops and not resume)  # fmt: skip
        runs.append(outcome(out))
    assert runs[0] == runs[1]
    stored = load_file(tmp_path / "parts" / "checkpoints" / "step-1" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}


def test_moments_come_back_for_those_parameters_that_have_them(work: Path) -> None:
    decoder = mg.load(work / "student").decoder
    decoder.requires_grad_(True)
    optimizer, other = adamw(decoder, CONFIG), adamw(decoder, CONFIG)
    some = list(decoder.parameters())[::2]
    for count in range(2):
        for p in some[count:]:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    stored = moments(decoder, optimizer)
    assert len(stored) == 3 * len(some)
    set_moments(decoder, other, stored)
    assert {float(state["step"]) for state in other.state.values()} == {1.0, 2.0}
    for p in decoder.parameters():
        assert set(optimizer.state.get(p, ())) == set(other.state.get(p, ()))
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(other.state[p][key], value)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["step-5", "step-4"]),
        ({"keep": 1}, ["step-5"]),
        ({"keep": 3, "save_every": 2}, ["step-4", "step-2"]),
        ({"keep": 9}, ["step-5", "step-4", "step-3", "step-2", "step-1"]),
        ({"save_every": 0}, []),
    ],
)
def test_the_newest_checkpoints_stay(
    work: Path, tmp_path: Path, changes: dict[str, int], names: list[str]
) -> None:
    train(work, tmp_path, dataclasses.replace(CONFIG, **changes))
    assert [p.name for p in checkpoints_of(tmp_path)] == names
    for folder in checkpoints_of(tmp_path):
        check_whole(folder)


def test_a_checkpoint_that_should_have_gone_goes_on_resume(
    work: Path, half_done: Path, tmp_path: Path
) -> None:
    """The process was killed when the new one was whole and the oldest not yet removed."""
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    assert [p.name for p in checkpoints_of(out)] == ["step-3", "step-2"]
    config = dataclasses.replace(CONFIG, keep=1, save_every=0)
    train(work, out, config, resume=True)
    assert [p.name for p in checkpoints_of(out)] == ["step-3"]


def test_what_has_its_name_is_whole_while_the_next_is_written(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    save_decoder = checkpoint.save_decoder

    def look(*args: Any, **more: Any) -> None:
        save_decoder(*args, **more)
        there = checkpoints_of(tmp_path)
        for folder in there:
            check_whole(folder)
        seen.append([p.name for p in (*there, *tmp_path.glob("final"))])

    monkeypatch.setattr(checkpoint, "save_decoder", look)
    train(work, tmp_path, dataclasses.replace(CONFIG, steps=2))
    assert seen == [[], ["step-1"], ["step-2", "step-1"]]


def test_nothing_goes_before_the_new_checkpoint_is_whole(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = []
    remove = checkpoint._remove

    def look(path: Path) -> None:
        there.append([check_whole(p)["step"] for p in checkpoints_of(tmp_path)])
        remove(path)

    monkeypatch.setattr(checkpoint, "_remove", look)
    train(work, tmp_path, dataclasses.replace(CONFIG, keep=1))
    assert there == [[2, 1], [3, 2], [4, 3], [5, 4]]


# ---------------------------------------------------------------------------------- evaluations
EVALUATED = dataclasses.replace(CONFIG, eval_every=2, save_every=0, keep=1)


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float | None], key: str) -> None:
    """Evaluations that give these values, in place of real ones."""
    left = iter(values)
    monkeypatch.setattr(
        mg.train, "evaluate", lambda *_: {**dict.fromkeys(BEST_BY), key: next(left)}
    )


def test_evaluations_are_those_of_the_weights_at_their_step_and_change_no_training(
    work: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    prompts = mg.data.read_prompts(work / "prompts.jsonl")
    seen: list[dict[str, Any]] = []
    config = dataclasses.replace(EVALUATED, save_every=1, keep=9)
    train(work, tmp_path, config, eval_prompts=prompts, on_eval=seen.append)
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text("utf-8").splitlines()]
    assert rows == seen
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    teacher = mg.load(work / "teacher")
    for row in rows:
        assert row.pop("seconds") > 0
        saved = tmp_path / "checkpoints" / f"step-{row['step']}"
        pair = make_pair(mg.load(saved if row["step"] else work / "student"), teacher)
        assert row == {"step": row["step"], **evaluate(pair, prompts, EVALUATED)}
    assert len({row["forward_kl"] for row in rows}) == 4
    found = outcome(tmp_path)
    assert {name: found[name] for name in whole} == whole


@pytest.mark.parametrize(
    ("best_by", "values", "kept"),
    [
        ("reverse_kl_per_byte", [0.5, 0.3, 0.4, 0.6], ["step-2"]),
        ("reverse_kl_per_byte", [0.5, 0.4, 0.3, 0.3], ["step-4"]),
        ("reverse_kl_per_byte", [0.2, 0.3, 0.4, 0.6], []),
        ("forward_kl", [None, 0.4, None, 0.3], ["step-5"]),
        ("forward_kl", [None, None, None, None], []),
        ("bits_per_byte_student", [3.0, 2.0, 2.5, 2.5], ["step-2"]),
        ("exact_match", [0.0, 0.3, 0.4, 0.2], ["step-4"]),
        ("exact_match", [0.0, 0.3, 0.3, 0.3], ["step-2"]),
    ],
)
def test_the_checkpoint_of_the_best_evaluation_stays(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    best_by: str, values: list[float | None], kept: list[str],
) -> None:  # fmt: skip
    scripted(monkeypatch, values, best_by)
    config = dataclasses.replace(EVALUATED, best_by=best_by)
    prompts = [mg.data.Prompt("hello", completion=" dog", answer="dog")]
    train(work, tmp_path, config, eval_prompts=prompts)
    assert [p.name for p in checkpoints_of(tmp_path)] == kept


def test_the_best_checkpoint_stays_beside_the_newest(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.5, 0.3, 0.4, 0.6], "reverse_kl_per_byte")
    config = dataclasses.replace(EVALUATED, save_every=1)
    train(work, tmp_path, config, eval_prompts=[mg.data.Prompt("hello")])
    assert [p.name for p in checkpoints_of(tmp_path)] == ["step-5", "step-2"]


def test_a_run_with_evaluations_that_is_stopped_after_each_step_is_the_same(
    work: Path, tmp_path: Path
) -> None:
    prompts = mg.data.read_prompts(work / "prompts.jsonl")
    config = dataclasses.replace(EVALUATED, save_every=1, best_by="forward_kl")
    train(work, tmp_path / "whole", config, eval_prompts=prompts)
    expected = outcome(tmp_path / "whole")
    assert [row["step"] for row in expected["eval.jsonl"]] == [0, 2, 4, 5]
    out = tmp_path / "stopped"
    for _ in range(3):
        train(work, out, config, resume=True, stop=lambda: True, eval_prompts=prompts)
    with (out / "eval.jsonl").open("a", encoding="utf-8") as file:  # killed before its checkpoint
        file.write('{"step": 4, "forward_kl": 0.0}\n')
    train(work, out, config, resume=True, eval_prompts=prompts)
    assert_same(out, expected)


def test_without_a_folder_there_are_evaluations_too(work: Path) -> None:
    student, teacher = mg.load(work / "student"), mg.load(work / "teacher")
    prompts = [mg.data.Prompt("hello")]
    seen: list[dict[str, Any]] = []
    config = dataclasses.replace(CONFIG, steps=1, lmbda=1.0, eval_every=0)
    distill(student, teacher, prompts, config, eval_prompts=prompts, on_eval=seen.append)
    assert [row["step"] for row in seen] == [0, 1]


def test_the_command_line_tells_each_evaluation_and_the_best_one(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, held_out = tmp_path / "run", tmp_path / "held-out.jsonl"
    held_out.write_text('{"prompt": "hello", "answer": "a"}\n', "utf-8")
    words = arguments(work, eval_prompts=held_out, best_by="forward_kl", steps=2, lmbda=1.0)
    assert main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in (out / "eval.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [0, 2]
    for row in rows:
        told = f"evaluation after step {row['step']}  reverse_kl_per_byte {row['reverse_kl_per_byte']:.4f}"
        assert told in printed.err
    best = 2 if rows[1]["forward_kl"] < rows[0]["forward_kl"] else 0
    assert json.loads(printed.out.splitlines()[-1])["best_step"] == best
    assert f"best by forward_kl: step {best} of 2" in printed.err
    assert "in evaluation" in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("changes", "prompts", "message"),
    [
        ({"eval_every": 3}, [], r"expected --eval-every with --eval-prompts only"),
        ({"best_by": "exact_match"}, [], r"expected --best-by with --eval-prompts only"),
        ({"best_by": "exact_match"}, ["hello"], r"`answer` for --best-by exact_match, got none"),
        ({"best_by": "bits_per_byte_student"}, ["hello"], r"`completion` for --best-by"),
        ({}, ["hello " * 500], r"--eval-prompts: prompt of line 0, student: expected at most"),
    ],
)
def test_evaluation_prompts_that_cannot_serve_are_refused_before_anything_is_written(
    work: Path, tmp_path: Path, changes: dict[str, Any], prompts: list[str], message: str
) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    held_out = [mg.data.Prompt(text) for text in prompts]
    with pytest.raises(ValueError, match=message):
        train(work, tmp_path / "run", config, eval_prompts=held_out)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------- which folder, which run
def test_a_new_or_empty_folder_begins_a_run(
    work: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".config.json.part").write_text("{", "utf-8")
    for name in ("new", "empty", "begun"):
        train(work, tmp_path / name, resume=True)
        assert_same(tmp_path / name, whole)


def test_a_run_without_a_checkpoint_begins_again(
    work: Path, half_done: Path, tmp_path: Path, whole: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger="minigold")
    shutil.copytree(half_done, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(work, tmp_path / "run", resume=True)
    assert f"{tmp_path / 'run'} goes on after step 0 of 5" in caplog.messages
    assert_same(tmp_path / "run", whole)


def test_another_folder_is_refused(work: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(
        ValueError, match=r"to be a run's folder, or a new or empty one, got .* no config"
    ):
        train(work, tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_the_folder_of_a_model_is_refused(work: Path) -> None:
    before = {p: p.read_bytes() for p in (work / "student").iterdir()}
    with pytest.raises(
        ValueError, match=r"whose config.json is not that of a run which can go on; n"
    ):
        train(work, work / "student", resume=True)
    assert {p: p.read_bytes() for p in (work / "student").iterdir()} == before


def test_without_resume_a_run_is_left_alone_and_the_way_on_is_told(
    work: Path, half_done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in half_done.rglob("*") if p.is_file()}
    assert main([*arguments(work), "--out", str(half_done)]) == 2
    assert "which is not empty; add --resume to go on with the run in it" in capsys.readouterr().err
    assert main([*arguments(work), "--out", str(work)]) == 2
    assert "which is not empty; name another" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in half_done.rglob("*") if p.is_file()} == before


def test_a_finished_run_says_so_and_stays_as_it_is(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    args = [*arguments(work), "--out", str(tmp_path)]
    assert main(args) == 0
    first = capsys.readouterr().out
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main([*args, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert out == first
    assert err.splitlines()[1:] == [f"{tmp_path} is finished after 5 steps; nothing is left to do"]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_finished_run_gives_back_its_student(work: Path) -> None:
    train(work, work / "done")
    student, teacher = mg.load(work / "student"), mg.load(work / "teacher")
    prompts = mg.data.read_prompts(work / "prompts.jsonl")
    distill(student, teacher, prompts, CONFIG, out=work / "done", resume=True)
    for name, value in load_file(work / "done" / "final" / "model.safetensors").items():
        assert torch.equal(student.decoder.state_dict()[name], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, r"got another --lr \(0.01 then, 0.02 now\); give the old ones, or start a new"),
        ({"steps": 6}, r"--steps \(5 then, 6 now\)"),
        ({"seed": 4, "where": "all"}, r"--where \(weighted then, all now\), --seed \(3 then, 4 now\)"),
        ({"student_plain": False}, r"--student-plain \(True then, False now\)"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(
    work: Path, half_done: Path, changes: dict[str, Any], message: str
) -> None:
    before = {p: p.read_bytes() for p in half_done.rglob("*") if p.is_file()}
    pair = make_pair(mg.load(work / "student"), mg.load(work / "teacher"))
    prompts = mg.data.read_prompts(work / "prompts.jsonl")
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        open_run(half_done, pair, adamw(pair.student.decoder, config), prompts, config, resume=True)
    assert {p: p.read_bytes() for p in half_done.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("student", "s", r"--student \(s then, .*student now\)"),
        ("teacher", "t", r"--teacher \(t then, .*teacher now\)"),
        ("device", "cuda:1", r"--device \(cuda then, cpu now\)"),
        ("student_dtype", "bfloat16", r"student_dtype \(bfloat16 then, float32 now\)"),
        ("teacher_dtype", "bfloat16", r"teacher_dtype \(bfloat16 then, float32 now\)"),
        ("teacher_weights_sha256", "0", r"teacher_weights_sha256 \(0 then, \w{64} now\)"),
        ("prompts_sha256", "0", r"--prompts \(0 then, \w{64} now\)"),
        ("eval_prompts_sha256", "0", r"--eval-prompts \(0 then, None now\)"),
        ("later", 1, r"later \(1 then, None now\)"),
        ("versions", {"torch": "1.0"}, r"torch \(1.0 then, .* now\)"),
        ("versions", {"minigold": "9"}, r"minigold \(9 then, "),
        ("versions", {"python": "2.7"}, None),
        ("device", "cpu:0", None),
        ("log_every", 7, None),
        ("save_every", 7, None),
        ("keep", 7, None),
        ("patience", 7, None),
    ],
)
def test_other_models_prompts_and_versions_are_refused_and_what_changes_no_number_is_not(
    work: Path, half_done: Path, tmp_path: Path, key: str, value: Any, message: str | None
) -> None:
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    old = json.loads((out / "config.json").read_text("utf-8"))
    new = {**old, key: {**old[key], **value} if isinstance(value, dict) else value}
    (out / "config.json").write_text(json.dumps(new), "utf-8")
    pair = make_pair(mg.load(work / "student"), mg.load(work / "teacher"))
    prompts = mg.data.read_prompts(work / "prompts.jsonl")
    optimizer = adamw(pair.student.decoder, CONFIG)
    if message is None:
        with open_run(out, pair, optimizer, prompts, CONFIG, resume=True) as opened:
            assert len(opened.history) == 3
        assert json.loads((out / "config.json").read_text("utf-8")) == old
    else:
        with pytest.raises(ValueError, match=message):
            open_run(out, pair, optimizer, prompts, CONFIG, resume=True)


@pytest.mark.parametrize("line", ['{"prompt": "hello!"}', '{"prompt": "hello", "id": 8}'])
def test_other_prompts_are_told_apart(
    work: Path, half_done: Path, line: str, tmp_path: Path
) -> None:
    lines = (work / "prompts.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "p.jsonl").write_text("".join([f"{line}\n", *lines[1:]]), "utf-8")
    student, teacher = mg.load(work / "student"), mg.load(work / "teacher")
    prompts = mg.data.read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=r"got another --prompts \(\w{64} then, "):
        distill(student, teacher, prompts, CONFIG, out=half_done, resume=True)


def test_a_spoilt_config_is_named(work: Path, half_done: Path, tmp_path: Path) -> None:
    shutil.copytree(half_done, tmp_path / "run")
    cut(tmp_path / "run" / "config.json")
    cut(tmp_path / "run" / "config.json")
    with pytest.raises(ValueError, match=r"run.config.json: expected one JSON object"):
        train(work, tmp_path / "run", resume=True)
