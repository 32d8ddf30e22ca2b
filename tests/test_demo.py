# SPDX-License-Identifier: Apache-2.0
"""The demo learns, its controls do not, and everything that it needs is in the wheel."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from torch import get_num_threads, set_num_threads

from minigold.demo import DEMO, demo_models, run_demo
from minigold.demo_task import OPERANDS, glim, held_out, number_word, prompts, warm_up
from minigold.offsets import spans_of_text
from real_models import example

ROOT = Path(__file__).parent.parent
controls = example("demo_controls")


def sums_of(rows: list) -> set[str]:
    return {one for row in rows for one in row.prompt.strip().split(", ")}


# ------------------------------------------------------------------------- the task
def test_prompts_are_split_without_overlap() -> None:
    seen, unseen = {p.prompt for p in prompts()}, {p.prompt for p in held_out()}
    assert len(seen) + len(unseen) == OPERANDS**4
    assert not seen & unseen
    assert {p.prompt for p in warm_up()} <= seen
    assert sums_of(held_out()) <= sums_of(prompts())
    assert len(sums_of(warm_up())) < 0.65 * OPERANDS**2


def test_answers_follow_the_operator() -> None:
    by_name = {number_word(n): n for n in range(100)}
    assert len(by_name) == 100
    for row in held_out():
        for one, word in zip(row.prompt.strip().split(", "), row.answer.split(", "), strict=True):
            a, b = one.split(" glim ")
            assert by_name[word] == glim(by_name[a], by_name[b])


def test_the_two_tokenizers_cut_the_answers_at_different_places() -> None:
    student, teacher = (model.tokenizer for model in demo_models())
    different = 0
    for row in held_out():
        ours, theirs = (
            {tuple(span) for span in spans_of_text(tokenizer, row.answer)[:, :2].tolist()}
            for tokenizer in (student, teacher)
        )
        different += ours != theirs
    assert different > 0.9 * len(held_out())


# ------------------------------------------------------------------------- learning
def test_the_demo_has_one_thread_and_gives_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("minigold.demo.distill", lambda *_a, **_k: seen.append(get_num_threads()))
    threads = get_num_threads()
    set_num_threads(2)
    try:
        with pytest.raises(IndexError):  # there was no step, and so no progress bar
            run_demo(steps=1, say=lambda _text: None, bar=False)
        assert (seen, get_num_threads()) == ([1], 2)
    finally:
        set_num_threads(threads)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    for name in "ab":
        run_demo(out=tmp_path / name, seed=3, steps=3, say=lambda _text: None, bar=False)
    a, b = ((tmp_path / name / "samples.jsonl").read_bytes() for name in "ab")
    assert a == b
    a, b = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_the_student_learns() -> None:
    """A sixth of the steps, from no answer right; the whole length and the controls are `slow`."""
    assert controls.run_arm("gold", steps=100, seed=0) >= 0.05  # 0.145; shifted or shuffled: none


@pytest.mark.slow
def test_the_whole_demo_reaches_its_teacher() -> None:
    command = [sys.executable, "-m", "minigold", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == [
        "teacher_accuracy", "student_before", "student_after", "seconds", "trained_fraction",
    ]  # fmt: skip
    assert result["student_before"] < 0.35
    assert result["student_after"] >= max(0.85, result["teacher_accuracy"] - 0.1)
    assert result["seconds"] < 180
    assert all(
        mark in done.stderr for mark in ("mass audit: ", "before ", "after:", "600/600", "[")
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine-tuned", "shuffled", "shifted"])
def test_controls_stay_behind_at_the_whole_length(name: str) -> None:
    assert controls.run_arm(name, steps=DEMO.steps, seed=0) <= 0.3


# ------------------------------------------------------------------------- shipping
def test_the_wheel_holds_the_demo_and_stays_small(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "minigold", source / "minigold")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
               "--wheel-dir", str(tmp_path), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"minigold/{p.relative_to(ROOT / 'minigold').as_posix()}"
               for p in (ROOT / "minigold").rglob("*")
               if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
    assert shipped <= names
    assert any(name.endswith("student/model.safetensors") for name in names)
    assert wheel.stat().st_size < 5_000_000
