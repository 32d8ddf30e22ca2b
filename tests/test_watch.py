# SPDX-License-Identifier: Apache-2.0
"""Numbers that go wrong change no weight and end a run in time; a collapse is told in words."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import minigold as mg
from minigold import train as training
from minigold.checkpoint import checkpoints_of
from minigold.config import Config
from minigold.masked import Pass
from minigold.metrics import _repetition, plain
from minigold.report import write_report
from minigold.train import Step, adamw, distill
from minigold.watch import WINDOW, collapses, failed_in_a_row, finite
from tiny_folders import tiny_folder
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

CONFIG = Config(
    steps=6, batch_size=2, max_new_tokens=6, lr=0.01, warmup=0, where="all", save_every=2,
    student_plain=True, teacher_plain=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    tiny_folder(work / "student", "gemma3_text", sentencepiece_bpe(), begin="<s>", end="</s>")
    tiny_folder(work / "teacher", "llama", byte_bpe(), end="<|im_end|>", seed=2)
    return work


class Spoiler:
    """In place of `train_pass`: some passes give a loss or gradient that is not finite."""

    def __init__(self, losses: dict[int, float], gradients: dict[int, float]) -> None:
        self.count, self.losses, self.gradients = 0, losses, gradients
        self.train_pass = training.train_pass

    def __call__(self, pair: Any, *args: Any) -> Pass:
        done = self.train_pass(pair, *args)
        self.count += 1
        if self.count in self.gradients:
            p = next(pair.student.decoder.parameters())
            p.grad[3, 1] = self.gradients[self.count]
        return dataclasses.replace(done, loss=self.losses.get(self.count, done.loss))


def run(
    work: Path, config: Config = CONFIG, **more: Any
) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """Metrics, and the weights after each step that did not fail."""
    student, teacher = mg.load(work / "student"), mg.load(work / "teacher")
    prompts = [mg.data.Prompt(text, line=i) for i, text in enumerate(("hello", "the fox"), start=1)]
    seen = [{k: v.clone() for k, v in student.decoder.state_dict().items()}]

    def look(_step: Step) -> None:
        seen.append({k: v.clone() for k, v in student.decoder.state_dict().items()})

    try:
        history = distill(student, teacher, prompts, config, on_step=look, **more)
    finally:
        seen.append(student.decoder.state_dict())
    return history, seen


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------- numbers that fail
@pytest.mark.parametrize(
    ("losses", "gradients"),
    [({2: math.nan}, {}), ({2: math.inf}, {}), ({}, {2: math.nan}), ({}, {2: -math.inf})],
)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_failed_step_changes_nothing_and_the_run_goes_on(
    work: Path, tmp_path: Path, losses: dict[int, float], gradients: dict[int, float], clip: float,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(training, "train_pass", Spoiler(losses, gradients))
    out = tmp_path / "run"
    config = dataclasses.replace(CONFIG, steps=3, clip=clip)
    history, seen = run(work, config, out=out)
    assert [failed_in_a_row([row]) for row in history] == [0, 1, 0]
    assert len(seen) == 4  # at the start, after both steps that did not fail, at the end
    assert not same(seen[1], seen[2])
    stored = mg.load(out / "checkpoints" / "step-2").decoder.state_dict()
    assert same(stored, seen[1])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert rows == history
    bad = "loss" if losses else "grad_norm"
    assert [row[bad] is None for row in rows] == [False, True, False]
    (warning,) = [r.getMessage() for r in caplog.records if "failed" in r.getMessage()]
    assert warning.startswith("step 2 failed: a loss of ")
    assert warning.endswith("; no optimizer step is taken; 1 of --patience 3 in a row")
    kept = json.loads((out / "failed" / "step-2.json").read_text("utf-8"))
    assert kept["metrics"] == rows[1] and kept["wrong"] in warning
    assert sorted(answer["line"] for answer in kept["answers"]) == [1, 2]
    for answer in kept["answers"]:
        assert {answer["prompt"]} <= {"hello", "the fox"}
        assert answer["prompt_ids"] and answer["teacher_prompt_ids"] and answer["student_ids"]
        n = len(answer["chunks"])
        assert len(answer["student_logp"]) == len(answer["teacher_logp"]) == n
    assert [p.name for p in (out / "failed").iterdir()] == ["step-2.json"]


@pytest.mark.parametrize(
    ("patience", "bad", "end"),
    [(1, {3}, 3), (2, {1, 3, 4}, 4), (3, {1, 2, 4, 5, 6}, 6), (3, {2, 3, 5, 6}, None)],
)
def test_a_run_ends_after_some_failed_steps_in_a_row(
    work: Path, tmp_path: Path, patience: int, bad: set[int], end: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(training, "train_pass", Spoiler(dict.fromkeys(bad, math.nan), {}))
    config = dataclasses.replace(CONFIG, patience=patience)
    if end is None:
        assert len(run(work, config, out=tmp_path)[0]) == 6
        return
    kept = rf"the last checkpoint is .*step-{(end - 1) // 2 * 2}"
    message = (
        rf"step {end}: expected a finite loss and gradient within {patience} steps \(--patience\), "
        rf"got a loss of nan and a .*; the weights are those before; {kept}; begin a new run with a l"
        ".* from a checkpoint"
    )
    with pytest.raises(FloatingPointError, match=message):
        run(work, config, out=tmp_path)
    rows = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert len(rows) == end
    assert {p.name for p in (tmp_path / "failed").iterdir()} == {f"step-{n}.json" for n in bad}


def test_failed_steps_count_on_after_a_resume(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = dict.fromkeys((2, 3, 4), math.nan)
    monkeypatch.setattr(training, "train_pass", Spoiler(bad, {}))
    asked: list[bool] = []
    history, _ = run(work, out=tmp_path, stop=lambda: asked.append(True) or len(asked) == 3)
    assert failed_in_a_row(history) == 2
    assert [p.name for p in checkpoints_of(tmp_path)] == ["step-3", "step-2"]
    with pytest.raises(FloatingPointError, match=r"step 4: .*the last checkpoint is .*step-3"):
        run(work, out=tmp_path, resume=True)
    lenient = dataclasses.replace(CONFIG, patience=4)
    training.train_pass.count = 3
    history, _ = run(work, lenient, out=tmp_path, resume=True)
    assert [failed_in_a_row([row]) for row in history] == [0, 1, 1, 1, 0, 0]
    assert len(list((tmp_path / "failed").iterdir())) == 3


def test_a_teacher_of_nan_is_caught(work: Path, tmp_path: Path) -> None:
    """Not a number anywhere in the files, though both models' numbers are not finite."""
    student, teacher = mg.load(work / "student"), mg.load(work / "teacher")
    with torch.no_grad():
        teacher.decoder.model.norm.weight.fill_(math.nan)
    before = {k: v.clone() for k, v in student.decoder.state_dict().items()}
    with pytest.raises(FloatingPointError, match="step 3: expected a finite loss and gradient"):
        distill(student, teacher, [mg.data.Prompt("hello")], CONFIG, out=tmp_path)
    assert same(before, student.decoder.state_dict())
    assert len(list((tmp_path / "failed").iterdir())) == 3
    for path in (p for p in tmp_path.rglob("*.json*") if p.is_file()):
        for line in path.read_text("utf-8").splitlines():
            assert "NaN" not in line and "Infinity" not in line, path


def test_weights_that_overflow_end_the_run(work: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lr=3e38, weight_decay=1.0)
    message = (
        "step 1: expected finite weights, got NaN or infinite weights after it; the weights are lost; "
        "there is no checkpoint yet; begin a new run with a lower --lr"
    )
    with pytest.raises(FloatingPointError, match=message):
        run(work, config, out=tmp_path)
    assert (tmp_path / "failed" / "step-1.json").is_file()
    assert checkpoints_of(tmp_path) == []
    with pytest.raises(
        FloatingPointError, match=r"the weights are lost; begin a new run .*precision$"
    ):
        run(work, config)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_weight_is_enough(bad: float) -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.full((7,), -1e38))]
    assert finite(parameters)
    with torch.no_grad():
        parameters[1][2] = bad
    assert not finite(parameters)
    assert not finite(parameters[::-1])


def test_moments_stay_as_they_are_at_a_failed_step(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []

    def remember(*args: Any) -> torch.optim.AdamW:
        made.append(adamw(*args))
        return made[-1]

    monkeypatch.setattr(training, "adamw", remember)
    run(work, dataclasses.replace(CONFIG, steps=2))
    monkeypatch.setattr(training, "train_pass", Spoiler({2: math.nan}, {}))
    run(work, dataclasses.replace(CONFIG, steps=2))
    steps = [{float(state["step"]) for state in one.state.values()} for one in made]
    assert steps == [{2.0}, {1.0}]


@pytest.mark.parametrize("broken", ["student", "teacher"])
@pytest.mark.parametrize("where", ["all", "weighted", "sampled", "reject", "divergence", "soft-or"])
def test_weights_that_are_no_numbers_end_the_run(
    work: Path, tmp_path: Path, where: str, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A mask leaves no chunk out because it knows nothing of it."""
    sides = {name: mg.load(work / name) for name in ("student", "teacher")}
    with torch.no_grad():
        sides[broken].decoder.model.layers[-1].mlp.up_proj.weight[1, 1] = math.nan
    prompts = [mg.data.Prompt("hello", line=1)]
    config = dataclasses.replace(CONFIG, where=where, patience=2)
    with pytest.raises(FloatingPointError, match="step 2: expected a finite loss"):
        distill(**sides, prompts=prompts, config=config, out=tmp_path, eval_prompts=prompts)
    assert "got NaN or infinity for reverse_kl_per_byte" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text("utf-8").splitlines()]
    assert rows[0]["reverse_kl_per_byte"] is None
    assert write_report(tmp_path).is_file()


# ---------------------------------------------------------------------------------- collapses
HEALTHY = {
    "loss": 0.1, "grad_norm": 1.0, "repetition": 0.05, "eos_rate": 0.8, "completion_tokens": 400,
    "shared_mass_student": 0.95, "noncanonical_share": 0.02,
}  # fmt: skip


def history_of(
    first: dict[str, Any], last: dict[str, Any], n: int = WINDOW
) -> list[dict[str, Any]]:
    """Some steps of one kind, then of another, with noise of a tenth."""
    rng = np.random.default_rng(0)
    rows = [{**HEALTHY, **first}] * n + [{**HEALTHY, **last}] * n

    def noisy(key: str, value: Any) -> Any:
        return value if value is None or key == "eos_rate" else value * rng.uniform(0.95, 1.05)

    return [{key: noisy(key, value) for key, value in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("first", "last", "sign"),
    [
        ({}, {"repetition": 0.4}, "repetition"),
        ({"repetition": None}, {"repetition": 0.4}, "repetition"),
        ({}, {"eos_rate": 0.0}, "endless"),
        ({"eos_rate": 0.2}, {"eos_rate": 0.01}, "endless"),
        ({}, {"completion_tokens": 16, "repetition": None}, "empty"),
        ({"completion_tokens": 60}, {"completion_tokens": 20}, "empty"),
        ({}, {"shared_mass_student": 0.7}, "mass"),
        ({}, {"noncanonical_share": 0.07}, "spelling"),
        ({"noncanonical_share": 0.05}, {"noncanonical_share": 0.15}, "spelling"),
    ],
)
def test_each_collapse_is_told(first: dict[str, Any], last: dict[str, Any], sign: str) -> None:
    found = collapses(history_of(first, last), answers=16)
    assert list(found) == [sign]
    assert "lower --lr" in found[sign]


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ({}, {}),
        ({"repetition": 0.25}, {"repetition": 0.4}),  # a task with repetitions
        ({}, {"repetition": 0.28}),
        ({"repetition": 0.6}, {"repetition": 0.6}),
        ({"eos_rate": 0.0}, {"eos_rate": 0.0}),  # all were cut from the start
        ({"eos_rate": 0.05}, {"eos_rate": 0.0}),
        ({}, {"eos_rate": 0.05}),
        ({"eos_rate": None}, {"eos_rate": None}),
        ({"completion_tokens": 30}, {"completion_tokens": 20}),  # answers of one word
        ({}, {"completion_tokens": 40}),
        ({}, {"shared_mass_student": 0.82}),
        ({"shared_mass_student": None}, {"shared_mass_student": None}),
        ({"noncanonical_share": 0.0}, {"noncanonical_share": 0.04}),
        ({"noncanonical_share": 0.4}, {"noncanonical_share": 0.5}),  # a student that knows no words
        ({"noncanonical_share": None}, {"noncanonical_share": None}),  # none was sampled
        ({"eos_rate": 0.1, "repetition": 0.5}, {"eos_rate": 1.0, "repetition": 0.0}),  # it got well
    ],
)
def test_a_healthy_run_is_not_warned_about(first: dict[str, Any], last: dict[str, Any]) -> None:
    assert collapses(history_of(first, last), answers=16) == {}


def test_too_few_steps_say_nothing() -> None:
    history = history_of({}, {"eos_rate": 0.0})
    assert collapses(history[1:], answers=16) == {}
    assert collapses([], answers=16) == {}


def test_a_collapse_is_warned_about_once(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take_step = training.take_step

    def collapsing(*args: Any, number: int) -> Step:
        step = take_step(*args, number=number)
        return dataclasses.replace(step, metrics={**step.metrics, "repetition": 0.9 * (number > 5)})

    monkeypatch.setattr(training, "take_step", collapsing)
    monkeypatch.setattr("minigold.watch.WINDOW", 3)
    config = dataclasses.replace(CONFIG, steps=12, patience=3, save_every=4)
    run(work, config, out=tmp_path, stop=(tmp_path / "checkpoints" / "step-8").exists)
    run(work, config, out=tmp_path, resume=True)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    (warning,) = [text for text in warnings if "repeats itself" in text]
    assert warning.startswith("step 7: the student repeats itself: 60% of its runs of four tokens")


def answer(*ids: int) -> Any:
    return SimpleNamespace(answer=SimpleNamespace(ids=list(ids)))


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ([answer(1, 2, 3)], None),
        ([], None),
        ([answer(1, 2, 3, 4)], 0.0),
        ([answer(7, 7, 7, 7, 7)], 1 / 2),
        ([answer(1, 2, 1, 2, 1, 2, 1)], 2 / 4),
        ([answer(1, 2, 3, 4), answer(1, 2, 3, 4)], 0.0),  # of another answer
        ([answer(7, 7, 7, 7, 7, 7), answer(1, 2, 3, 4)], 2 / 4),
    ],
)
def test_repetition_is_that_of_the_hand(answers: list[Any], share: float | None) -> None:
    assert _repetition(answers) == share


def test_plain_leaves_what_json_has() -> None:
    value = {"a": [1, 0.5, None, True, "NaN"], "b": {"c": math.inf, "d": [[math.nan]]}}
    assert plain(value) == {"a": [1, 0.5, None, True, "NaN"], "b": {"c": None, "d": [[None]]}}


@pytest.mark.parametrize("values", [{"patience": 0}, {"keep": 0}, {"save_every": -1}])
def test_settings_of_checkpoints_have_their_range(values: dict[str, int]) -> None:
    least = 0 if "save_every" in values else 1
    with pytest.raises(ValueError, match=f"at least {least}, got"):
        Config(**values)
