# SPDX-License-Identifier: Apache-2.0
"""The folder of a run in, what is known of the run out: settings, metrics, some answers.

It reads config.json, metrics.jsonl, samples.jsonl and, where it is there, eval.jsonl; `report.py`
draws what it found. A run that is still going, or was cut, can be read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

from minigold.compare import Chunk
from minigold.data import COLUMNS, RESERVED, own_file, parse_object, read_object
from minigold.offsets import FLAWS

__all__ = ["PROMPTS", "Run", "Sample", "read_run"]

SHOWN = ("teacher_prompt", "answer")  # of the prompt's columns, beside those not minigold's own
PROMPTS = 6  # kept, each with its first and its last answer


class _Line(NamedTuple):
    """A line of a file: of which step, its number from 1, its place in bytes."""

    step: int
    number: int
    place: int


class Sample(NamedTuple):
    """An answer of samples.jsonl; C chunks."""

    step: int
    prompt: Any
    text: bytes
    finished: bool
    on_policy: bool
    ids: list[int]
    teacher_ids: list[int]
    spans: list[tuple[int, int]]
    chunks: list[Chunk]
    acceptance: list[float]
    trained: list[bool]
    best: list[tuple[str, float] | None]
    extra: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Args:
        config: the object of config.json.
        steps, rows: the numbers of the steps, increasing, and their metrics.
        evals: objects of eval.jsonl, by step.
        cases: for each prompt that is shown its answers, the first and the last of the run or one.
        n_samples: all answers in samples.jsonl.
    """

    config: dict[str, Any]
    steps: list[int]
    rows: list[dict[str, Any]]
    evals: dict[int, dict[str, Any]]
    cases: list[list[Sample]]
    n_samples: int


def read_run(run: Path) -> Run:
    """Reads the files of a run, finished or not.

    Raises:
        ValueError: no such folder, a folder that is no run, a file in it that cannot be read.
    """
    path = own_file(run, "config.json")
    if not path.is_file():
        what = "no config.json in it" if run.is_dir() else "no such folder"
        raise ValueError(
            f"expected the folder of a run, got {run}: {what}; give the --out of `minigold train`"
        )
    config = read_object(path, remedy="restore the file")
    needed = {"student": str, "teacher": str, "steps": int}
    if any(type(config.get(k)) is not v for k, v in needed.items()):
        raise ValueError(
            f"expected the config.json of a run, with student, teacher and steps, got {path} without "
            "them; give the --out of `minigold train`, not a model"
        )
    rows = {row["step"]: row for _, row in _objects(own_file(run, "metrics.jsonl"))}
    evals = {row["step"]: row for _, row in _objects(own_file(run, "eval.jsonl"))}
    cases, n_samples = _cases(own_file(run, "samples.jsonl"))
    steps = sorted(rows)
    evals = {step: evals[step] for step in sorted(evals)}
    return Run(config, steps, [rows[step] for step in steps], evals, cases, n_samples)


def _objects(path: Path) -> Iterator[tuple[_Line, dict[str, Any]]]:
    """Objects with a step; none if there is no file.

    A last line that was cut off while it was written is left out.
    """
    if not path.is_file():
        return
    place = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                row = parse_object(raw, like='{"step": 1}')
            except ValueError as error:
                if not raw.endswith(b"\n"):
                    return
                raise ValueError(f"line {number} of {path}: {error}; restore the file") from error
            if type(row.get("step")) is not int or not 0 <= row["step"] < 2**53:
                raise ValueError(
                    f"expected an object with a step in line {number} of {path}, got "
                    f"{raw[:40].decode('utf-8', 'replace')}; restore the file"
                )
            yield _Line(row["step"], number, place), row
            place += len(raw)


def _cases(path: Path) -> tuple[list[list[Sample]], int]:
    """Prompts that came back, those furthest apart first; else answers of the first and last step."""
    seen: dict[str, list[_Line]] = {}  # the first and the last answer to each prompt
    n = 0
    for line, row in _objects(path):
        n += 1
        met = seen.setdefault(json.dumps([row.get("line"), row.get("prompt")]), [])
        if not met or line.step > met[-1].step:
            met[1:] = [line]
    back = sorted(
        (met for met in seen.values() if len(met) > 1), key=lambda met: met[0].step - met[1].step
    )
    once = sorted(seen.values())
    half = PROMPTS // 2
    chosen = back[:PROMPTS] or (once if len(once) <= PROMPTS else once[:half] + once[-half:])
    return [[_sample(path, line) for line in met] for met in chosen], n


def _likeliest(text: Any, prob: Any) -> tuple[str, float]:
    return str(text), _share(prob)


def _share(value: Any) -> float:
    """0 for what was no number, in a step that failed."""
    return 0.0 if value is None else float(value)


def _sample(path: Path, line: _Line) -> Sample:
    with path.open("rb") as file:
        file.seek(line.place)
        row = json.loads(file.readline())
    unlike = f"expected an answer as docs/metrics.md says in line {line.number} of {path}, got "
    remedy = "; restore the file, or run again with this version"
    try:
        sample = Sample(
            line.step,
            row["prompt"],
            row["completion"].encode("utf-8", "replace"),
            row["finished"],
            row["on_policy"],
            [index(i) for i in row["student_ids"]],
            [index(i) for i in row["teacher_ids"]],
            [(index(a), index(b)) for a, b in row["student_spans"]],
            [Chunk(*map(index, chunk)) for chunk in row["chunks"]],
            [_share(a) for a in row["acceptance"]],
            [bool(x) for x in row["trained"]],
            [one if one is None else _likeliest(*one) for one in row["teacher_best"]],
            {k: v for k, v in row.items() if k in SHOWN or k not in (*COLUMNS, *RESERVED)},
        )
    except KeyError as error:
        raise ValueError(f"{unlike}no {error}{remedy}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{unlike}{str(error)[:200]}{remedy}") from error
    columns = sample.chunks, sample.acceptance, sample.trained, sample.best
    strange = [chunk.flaw for chunk in sample.chunks if not 0 <= chunk.flaw < len(FLAWS)]
    if strange:
        raise ValueError(f"{unlike}a chunk with the flaw {strange[0]}{remedy}")
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{unlike}columns of {[len(c) for c in columns]} chunks{remedy}")
    shares = (*sample.acceptance, *(one[1] for one in sample.best if one))
    if not all(0 <= share <= 1.01 for share in shares) or not _fits(sample):
        raise ValueError(f"{unlike}shares, spans or chunks out of range{remedy}")
    return sample


def _fits(sample: Sample) -> bool:
    """Whether all ranges lie in the ids and in the text."""
    ids, teacher_ids = len(sample.ids) + 1, len(sample.teacher_ids) + 1  # an end may have no id
    size = len(sample.text)
    ranges = [(start, end, size) for start, end in sample.spans]
    for s0, s1, t0, t1, start, end, _ in sample.chunks:
        ranges += [(s0, s1, ids), (t0, t1, teacher_ids), (start, end, size)]
    return len(sample.spans) < ids and all(0 <= a <= b <= n for a, b, n in ranges)
