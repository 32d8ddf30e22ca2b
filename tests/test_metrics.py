# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step on answers made by hand, the samples file, the audit, and their page."""

import dataclasses
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from minigold.align import Chunks
from minigold.batch import Answer, Rollout
from minigold.config import Config
from minigold.data import COLUMNS, RESERVED, Prompt
from minigold.events import Measures, match
from minigold.metrics import audit, sample_rows, step_metrics
from minigold.offsets import CUT, EXACT, FLAWS, UNKNOWN, vocabulary
from minigold.teacher import Score
from tokenizers_for_tests import byte_bpe

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"


class Chunk(NamedTuple):
    """Bytes, tokens of both sides, log-probabilities (none where there is a flaw), overhang."""

    n_bytes: int
    n_student: int = 1
    n_teacher: int = 1
    student_logp: float = np.nan
    teacher_logp: float = np.nan
    flaw: int = EXACT
    student_overhang: float = 0.0
    teacher_overhang: float = 0.0


def measures(n: int, shared: float, other: float) -> np.ndarray:
    """The same of `n` tokens, in the order of `Measures`."""
    known = {"shared_N": shared, "other_N": other}
    return np.tile([known.get(name, 0.0) for name in Measures._fields], (n, 1))


def made(kind: Any, **known: Any) -> Any:
    """A `kind` of which no other fields are looked at here."""
    return kind(**{f.name: None for f in dataclasses.fields(kind)} | known)


def rollout(
    text: str, table: list[Chunk], *, sampled: bool = True, noncanonical: int = 0, line: int = 1,
    shared: float = 0.9, other: float = 0.0, **extra: Any,
) -> Rollout:  # fmt: skip
    """An answer that has finished if its last chunk is empty, as the end of turn is."""
    columns = [np.array(column) for column in zip(*table, strict=True)]
    n_bytes, n_student, n_teacher, student_logp_C, teacher_logp_C, flaw, ours_C, theirs_C = columns
    s1, t1, end = (np.cumsum(column) for column in (n_student, n_teacher, n_bytes))
    finished = not n_bytes[-1]
    s, t = int(s1[-1]), int(t1[-1]) - finished
    assert end[-1] == len(text.encode())
    return made(
        Rollout,
        answer=made(
            Answer, prompt=Prompt("question", extra=extra, line=line), text=text, finished=finished,
            ids=list(range(s)), teacher_ids=list(range(t)), on_policy=sampled, noncanonical=noncanonical,
            chunks=Chunks(s1 - n_student, s1, t1 - n_teacher, t1, end - n_bytes, end, flaw),
            spans=[(i, i + 2) for i in range(s - finished)],
        ),
        score=made(
            Score, best_id_M=torch.arange(t + 1), best_prob_M=1 - torch.arange(t + 1) / 7.0,
        ),
        student_logp_C=student_logp_C,
        teacher_logp_C=teacher_logp_C,
        scorable_C=flaw == EXACT,
        student_stay_C=np.log1p(-ours_C),
        teacher_stay_C=np.log1p(-theirs_C),
        overhang_C=np.maximum(ours_C, theirs_C),
        student_measures_S5=measures(s, shared, other),
        teacher_measures_T5=measures(t, shared - 0.1, other / 2),
    )  # fmt: skip


ENDED = rollout(
    "hello wörld!",
    [
        Chunk(5, 1, 1, -1.0, -2.0),
        Chunk(5, 2, 1, -3.0, -0.5, teacher_overhang=0.3),
        Chunk(3, 1, 2, flaw=UNKNOWN, student_overhang=0.2),
        Chunk(0, 1, 1, -0.1, -4.0),
    ],
    noncanonical=1,
    other=0.05,
    tag="kept",
)  # fmt: skip
CLIPPED = rollout("ab", [Chunk(1, 1, 1, -1.0, -1.0), Chunk(1, flaw=CUT)], line=2)
FIXED = rollout(
    "xyz",
    [Chunk(3, 1, 1, -2.0, -1.0), Chunk(0, 1, 1, -1.0, -1.0)],
    sampled=False,
    noncanonical=2,
    line=3,
)
ALL = [ENDED, CLIPPED, FIXED]
CHOSEN = [np.array(mask, dtype=bool) for mask in ([1, 0, 0, 1], [0, 0], [1, 0])]


def metrics_of(
    rollouts: list[Rollout], chosen: list[np.ndarray], **settings: Any
) -> dict[str, Any]:
    return step_metrics(
        rollouts,
        chosen,
        Config(**settings),
        loss=0.25,
        work_saved=0.75,
        clock=[10.0, 11.5, 14.0, 14.25],
        device=torch.device("cpu"),
    )


def test_every_number_is_that_of_the_hand() -> None:
    got = metrics_of(ALL, CHOSEN, max_overhang=0.2)
    assert got.pop("peak_memory_gib") > 0.01
    assert got.pop("unscorable") == {"unknown token": 1, "cut": 1}
    assert got == pytest.approx(
        {
            "loss": 0.25,
            "chunks": 8,
            "trained_fraction": 3 / 8,
            "disagreement_share": (1 + 3.9 + 1) / (1 + 2.5 + 3.9 + 0 + 1 + 0),
            "work_saved": 0.75,
            "one_to_one_fraction": 6 / 8,
            "shared_mass_student": 0.9,
            "shared_mass_teacher": 0.8,
            "other_mass_student": 5 * 0.05 / 9,  # five of nine tokens
            "other_mass_teacher": 4 * 0.025 / 7,  # ends of turn are no tokens of the teacher
            "tail_mass_teacher": None,
            "overhang_fraction": 1 / 8,
            "noncanonical_share": 1 / 7,  # of sampled tokens
            "repetition": 0.0,
            "reverse_kl_per_byte": ((-1 + 2) + (-3 + 0.5) + 0) / (5 + 5 + 1),
            "completion_tokens": 5 + 2 + 2,
            "completion_bytes": 13 + 2 + 3,
            "eos_rate": 1 / 2,
            "clipped_rate": 1 / 2,
            "off_policy_fraction": 1 / 3,
            "seconds": 4.25,
            "seconds_sample": 1.5,
            "seconds_teacher": 2.5,
            "seconds_train": 0.25,
        }
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, -1.5 / 11),
        ({"temperature": 0.7}, None),
        ({"top_p": 0.9}, None),
        ({"top_k": 5}, None),
    ],
)
def test_reverse_kl_is_of_samples_of_the_policy_itself(
    settings: dict[str, float], expected: float | None
) -> None:
    assert metrics_of(ALL, CHOSEN, **settings)["reverse_kl_per_byte"] == pytest.approx(expected)


def test_overhang_is_the_larger_of_both_sides() -> None:
    assert metrics_of(ALL, CHOSEN)["overhang_fraction"] == 1 / 8


def test_chunks_without_a_logp_hold_no_disagreement() -> None:
    chosen = [np.array(mask, dtype=bool) for mask in ([0, 0, 1, 0], [0, 1], [0, 0])]
    got = metrics_of(ALL, chosen)
    assert (got["trained_fraction"], got["disagreement_share"]) == (2 / 8, 0)


def test_null_stands_where_nothing_was_there_to_measure() -> None:
    end_only = rollout("", [Chunk(0, 1, 1, -1.0, -1.0)])
    got = metrics_of([end_only], [np.zeros(1, dtype=bool)])
    assert (
        got["reverse_kl_per_byte"]
        is got["disagreement_share"]
        is got["shared_mass_teacher"]
        is None
    )
    assert got["shared_mass_student"] == 0.9
    assert (got["trained_fraction"], got["eos_rate"], got["completion_bytes"]) == (0, 1, 0)

    got = metrics_of([FIXED], [np.ones(2, dtype=bool)])
    for key in ("reverse_kl_per_byte", "eos_rate", "clipped_rate", "noncanonical_share"):
        assert got[key] is None, key
    assert (got["off_policy_fraction"], got["unscorable"]) == (1, {})

    none = np.zeros(0)
    silent = dataclasses.replace(
        CLIPPED,
        answer=dataclasses.replace(CLIPPED.answer, chunks=Chunks(*[none.astype(int)] * 7)),
        student_logp_C=none,
        teacher_logp_C=none,
        student_stay_C=none,
        teacher_stay_C=none,
        overhang_C=none,
        scorable_C=none.astype(bool),
    )
    got = metrics_of([silent], [np.zeros(0, dtype=bool)])
    assert got["chunks"] == 0
    for key in (
        "trained_fraction",
        "one_to_one_fraction",
        "overhang_fraction",
        "disagreement_share",
    ):
        assert got[key] is None, key


# ------------------------------------------------------------------------------- samples
def test_samples_show_each_answer_and_what_was_trained() -> None:
    acceptance = [np.array([0.3678794411714423, 1.0, 0.0, 0.02]), np.array([1.0, 0.0]), np.ones(2)]
    step = SimpleNamespace(rollouts=ALL, acceptance=acceptance, chosen=CHOSEN)
    named = SimpleNamespace(id_to_token=["", "", "<pad>", "", None].__getitem__)
    pair = SimpleNamespace(
        events=SimpleNamespace(
            teacher=SimpleNamespace(spelling=[b" the", b"\xe4", b"", b"x", b""])
        ),
        teacher=SimpleNamespace(tokenizer=named),
    )
    rows = json.loads(json.dumps(sample_rows(7, step, pair)))
    assert rows[0] == {
        "step": 7,
        "line": 1,
        "prompt": "question",
        "completion": "hello wörld!",
        "finished": True,
        "on_policy": True,
        "student_ids": [0, 1, 2, 3, 4],
        "student_spans": [[0, 2], [1, 3], [2, 4], [3, 5]],
        "teacher_ids": [0, 1, 2, 3],
        "chunks": [
            [0, 1, 0, 1, 0, 5, 0], [1, 3, 1, 2, 5, 10, 0], [3, 4, 2, 4, 10, 13, UNKNOWN],
            [4, 5, 4, 5, 13, 13, 0],
        ],
        "acceptance": [0.367879, 1.0, 0.0, 0.02],
        "trained": [True, False, False, True],
        "teacher_best": [[" the", 1.0], ["\ufffd", 0.8571], ["<pad>", 0.7143], ["#4", 0.4286]],
        "tag": "kept",
    }  # fmt: skip
    assert [(row["line"], row["finished"], row["on_policy"]) for row in rows[1:]] == [
        (2, False, True),
        (3, True, False),
    ]
    own = {"prompt", "completion", "finished"}
    assert set(rows[1]) == {*own, *RESERVED}  # what no extra column can be named
    assert set(rows[1]) <= {*COLUMNS, *RESERVED}


def test_samples_keep_what_the_teacher_was_told_and_the_right_answer() -> None:
    told: dict[str, Any] = {"teacher_prompt": [{"role": "user", "content": "q"}], "answer": "42"}
    prompt = Prompt("question", extra={"tag": 1}, **told)
    answer = dataclasses.replace(CLIPPED.answer, prompt=prompt)
    rollouts = [dataclasses.replace(CLIPPED, answer=answer)]
    step = SimpleNamespace(rollouts=rollouts, acceptance=[np.ones(2)], chosen=[np.ones(2, bool)])
    pair = SimpleNamespace(events=SimpleNamespace(teacher=SimpleNamespace(spelling=[b"x"] * 9)),
                           teacher=SimpleNamespace(tokenizer=None))  # fmt: skip
    (row,) = sample_rows(1, step, pair)
    assert {**told, "tag": 1}.items() <= row.items()


# --------------------------------------------------------------------------------- audit
def side(shared: int, ids: int, repeated: int = 0) -> SimpleNamespace:
    spelling = [b""] + [b"%d" % max(i, repeated) for i in range(ids - 1)]
    return SimpleNamespace(identity=False, shared_V=torch.arange(ids) < shared, spelling=spelling)


EVENTS = SimpleNamespace(
    n_events=30, identical=False, student=side(29, 41), teacher=side(28, 53, repeated=2)
)


def answer(*, other: float = 0.0, noncanonical: int = 0, sampled: bool = True) -> Rollout:
    return rollout(
        "a" * 9,
        [Chunk(1, 1, 1, -1.0, -1.0)] * 9 + [Chunk(0, 1, 1, -1.0, -1.0)],
        other=other, noncanonical=noncanonical, sampled=sampled,
    )  # fmt: skip


def test_the_audit_says_where_the_mass_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="minigold")
    text = audit([answer(other=0.01)], EVENTS)
    assert text == (
        "mass audit: 30 events\n"
        "  student: 29 of 41 ids are events, 0 repeat another's bytes; "
        "mass in shared tokens 0.9000, projected 0.0900, other 0.0100\n"
        "  teacher: 28 of 53 ids are events, 2 repeat another's bytes; "
        "mass in shared tokens 0.8000, projected 0.1950, other 0.0050\n"
        "  chunks: 1.0000 one to one, 0.0000 start under longer tokens of one side"
    )
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", text)]


def test_the_audit_knows_identical_tokenizers() -> None:
    tokens = vocabulary(byte_bpe(), end_ids=[0])
    for kind, said in (
        ("prefix", f"{len(tokens.roles)} events, the ids themselves"),
        ("byte", "257 events"),
    ):
        assert audit([answer()], match(tokens, tokens, kind=kind)).startswith(
            f"mass audit: {said}\n"
        )


@pytest.mark.parametrize(
    ("rollouts", "expected"),
    [
        ([answer(other=0.02)], []),
        (
            [answer(other=0.0201)],
            ["student: 2.0 % of its mass is in tokens without an event; check "],
        ),
        (
            [answer(other=0.05)],
            ["student: 5.0 % of its mass is in", "teacher: 2.5 % of its mass is in"],
        ),
        ([answer(other=0.05), answer()], ["student: 2.5 % of its mass is in"]),
        ([answer(noncanonical=1)], []),
        ([answer(noncanonical=2)], ["20 % of the sampled tokens are unusual spellings"]),
        ([answer(noncanonical=2), answer()], []),
        ([answer(noncanonical=2), answer(sampled=False)], ["20 % of the sampled tokens are"]),
        ([answer(), answer(noncanonical=9, sampled=False)], []),
    ],
)
def test_the_audit_warns_of_lost_mass_and_unusual_spellings(
    rollouts: list[Rollout], expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    audit(rollouts, EVENTS)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == len(expected)
    for warning, start in zip(warnings, expected, strict=True):
        assert warning.startswith(start)


# ------------------------------------------------------------------------------ their page
def explained() -> list[list[str]]:
    """Cells of each row of the first table in docs/metrics.md, `key` and its explanation."""
    text = PAGE.read_text("utf-8").partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_the_page_explains_each_key_once_and_no_other() -> None:
    rows = explained()
    assert all(len(row) == 4 for row in rows)
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row[0])]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {"step", "grad_norm", "lr", *metrics_of(ALL, CHOSEN)}
    for key, _unit, meaning, _healthy in rows:
        assert meaning or key == "`step`", key


def test_the_page_names_each_reason_that_a_chunk_is_unscorable() -> None:
    (meaning,) = [row[2] for row in explained() if row[0] == "`unscorable`"]
    assert re.findall(r"`([^`]+)`", meaning) == list(FLAWS[1:])


def test_the_page_explains_each_key_of_the_samples() -> None:
    table = PAGE.read_text("utf-8").split("\n## ")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    assert sorted(keys) == sorted({"prompt", "completion", "finished", *RESERVED})
