# SPDX-License-Identifier: Apache-2.0
"""What each set of events sees between two real models, and where `strict` sees what is not there.

    python examples/experiments/event_sets.py
    python examples/experiments/event_sets.py --rollouts 1 --tokens 32 --seed 7

SmolLM2-135M-Instruct answers six prompts (Python classes, tables, prose) and Gemma-3-270M reads
them, as in `examples/real_pair.py`, which fetches both (350 MB, once). At each start of a chunk
both predictions are compared, `events.match` saying over what. First comes the comparison of the
predictions alone, conditioned on having an event; `full` is what the library trains by default: the
observed chunk is an event, and longer tokens over a boundary count. Then follow the places where
`strict` sees much more than `prefix`, and what first pieces change against longest prefixes alone.
The last line is JSON. It simplifies: means over chunks, no intervals; run other seeds for those.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import minigold as mg
from minigold.batch import Array, Rollout
from minigold.config import Config
from minigold.data import Prompt
from minigold.events import EVENTS, Events, Side, match
from minigold.load import LanguageModel
from minigold.loss import MOST, divergence
from minigold.pair import Pair, matched
from minigold.rollout import collect, sample_answers
from minigold.sample import completion_states
from minigold.teacher import CARRY_FROM

__all__ = ["PROMPTS", "apart", "event_sets", "figures", "first_pieces", "read", "table"]

PROMPTS = (
    "Write a Python class Stack with the methods push, pop and peek.",
    "Write a Python class Matrix with addition and multiplication, and a subclass SquareMatrix.",
    "Write a Python context manager, as a class, that measures how long a block of code takes.",
    "Make a Markdown table of five countries with their capitals and populations.",
    "Write a CSV table of four employees with name, age, city and salary.",
    "Tell a short story about the keeper of an old lighthouse.",
)
FAR = 3.0  # nats that strict sees above prefix, to be listed
SOME = 0.01  # mass in tokens that the two ways of projection send to different events
HEADS = "chunks events n KL(S‖T) KL(T‖S) TV shared_S shared_T end_S end_T other_S other_T"


# ------------------------------------------------------------------- models to figures
def event_sets(student: LanguageModel, teacher: LanguageModel) -> dict[str, Events]:
    """The three kinds of `EVENTS`, and `longest`: as `prefix`, but without first pieces."""
    ours, theirs = matched(
        (student.tokenizer, [student.end_id], student.n_tokens),
        (teacher.tokenizer, teacher.eos_ids, teacher.n_tokens),
    )
    bare = [replace(one, first_pieces={}) for one in (ours, theirs)]
    return {kind: match(ours, theirs, kind=kind) for kind in EVENTS} | {"longest": match(*bare)}


def read(pair: Pair, prompts: Sequence[Prompt], config: Config) -> list[Rollout]:
    """Answers of the student, or the prompts' own completions with `lmbda` 0, read by both."""
    answers, student_side = sample_answers(pair, list(prompts), config, number=0)
    return collect(pair, answers, student_side, config)


@torch.no_grad()
def figures(
    pair: Pair, sets: Mapping[str, Events], rollouts: Sequence[Rollout]
) -> dict[str, Array]:
    """One number or text a chunk start, all rollouts' end to end.

    `single`: one token on each side. `<events> <column of HEADS>`: see `_compared` and `_masses`.
    `differ_S`, `differ_T`: mass in tokens that `prefix` and `longest` send to different events.
    `prob_S`, `prob_T`: of the chunk that follows. `before`, `after`: the text around the start.
    """
    found: dict[str, list[Any]] = {}
    for rollout in rollouts:
        chunks, answer = rollout.chunks, rollout.answer
        ids_BS = torch.tensor([[*answer.prompt_ids, *answer.ids]])
        states_SD = completion_states(
            pair.student.decoder(ids_BS)[0], len(answer.prompt_ids), len(answer.ids)
        )
        states_CD = rollout.score.hidden_MD[torch.as_tensor(chunks.t0)]
        student_SV = pair.student.decoder.head.logits(states_SD).softmax(-1)
        student_CV = student_SV[torch.as_tensor(chunks.s0)]
        teacher_CW = pair.teacher.decoder.head.logits(states_CD).softmax(-1)
        text = answer.text.encode()
        spans = list(zip(chunks.start.tolist(), chunks.end.tolist(), strict=True))
        new: dict[str, Any] = {
            "single": (chunks.s1 - chunks.s0 == 1) & (chunks.t1 - chunks.t0 == 1),
            "before": [text[max(0, a - 24) : a].decode(errors="replace") for a, _ in spans],
            "after": [text[a : b + 16].decode(errors="replace") for a, b in spans],
            "prob_S": np.exp(rollout.student_logp_C),
            "prob_T": np.exp(rollout.teacher_logp_C),
        }
        for kind, events in sets.items():
            new |= _named(kind, _compared(*_projected(student_CV, teacher_CW, events)))
            for side, prob, which in _sides(student_CV, teacher_CW, events):
                new |= _named(kind, _masses(prob, side), which)
        law_CX, teacher_law_CX = full_laws(student_SV, teacher_CW, rollout, sets["prefix"])
        new |= _named("full", _compared(law_CX, teacher_law_CX))
        for side, prob, which in _sides(student_CV, teacher_CW, sets["prefix"]):
            other = sets["longest"].student if which == "_S" else sets["longest"].teacher
            new["differ" + which] = (prob[:, side.event_V != other.event_V]).sum(-1).numpy()
        for key, value in new.items():
            found.setdefault(key, []).extend(value)
    return {key: np.array(value) for key, value in found.items()}


def _sides(
    student_CV: Tensor, teacher_CW: Tensor, events: Events
) -> list[tuple[Side, Tensor, str]]:
    return [(events.student, student_CV, "_S"), (events.teacher, teacher_CW, "_T")]


def _named(kind: str, values: Mapping[str, Tensor], which: str = "") -> dict[str, Array]:
    return {f"{kind} {name}{which}": value.numpy() for name, value in values.items()}


def _projected(student_CV: Tensor, teacher_CW: Tensor, events: Events) -> tuple[Tensor, Tensor]:
    return events.student.project(student_CV), events.teacher.project(teacher_CW)


def _compared(student_CX: Tensor, teacher_CX: Tensor) -> dict[str, Tensor]:
    """Of both laws, conditioned on having an event: nats, nats, and 0 to 1."""
    s_CK, t_CK = (
        law / law.sum(-1, keepdim=True) for law in (student_CX[:, :-1], teacher_CX[:, :-1])
    )
    return {
        "KL(S‖T)": divergence(s_CK, t_CK, beta=1.0),
        "KL(T‖S)": divergence(s_CK, t_CK, beta=0.0),
        "TV": (s_CK - t_CK).abs().sum(-1) / 2,
    }


def _masses(prob_CV: Tensor, side: Side) -> dict[str, Tensor]:
    """In tokens that are text events by themselves, in the end of turn, in no event; 0 to 1."""
    end_V = side.event_V == side.n_events - 1
    parts = {"shared": side.shared_V & ~end_V, "end": end_V, "other": side.event_V == side.n_events}
    return {name: prob_CV[:, some_V].sum(-1) for name, some_V in parts.items()}


def full_laws(
    student_SV: Tensor, teacher_CW: Tensor, rollout: Rollout, events: Events
) -> tuple[Tensor, Tensor]:
    """What `loss.look` compares, told once more in a plain loop over chunks."""
    chunks, ids, student, teacher = (
        rollout.chunks,
        rollout.answer.ids,
        events.student,
        events.teacher,
    )
    student_CV = student_SV[torch.as_tensor(chunks.s0)]
    student_CX, teacher_CX = _projected(student_CV, teacher_CW, events)
    teacher_ids = [
        *rollout.answer.teacher_ids,
        teacher.event_V.eq(teacher.n_events - 1).nonzero()[0],
    ]
    for c, (s, t) in enumerate(zip(chunks.s0.tolist(), chunks.t0.tolist(), strict=True)):
        if -np.expm1(rollout.student_stay_C[c]) > CARRY_FROM:
            inside = torch.tensor([bool(chunks.s0[c - 1] < s - 1)])
            _, id_J, event_J = student.over(torch.tensor(ids[s - 1 : s]), inside)
            known = student_SV[s - 1, ids[s - 1]] + student_SV[s - 1, id_J].sum()
            _mix(student_CX[c], student.column(event_J), student_SV[s - 1, id_J] / known)
        if t in rollout.score.carried:
            one = rollout.score.carried[t]
            _mix(teacher_CX[c], teacher.column(one.event_K), one.mass_K.float())
        if rollout.observed_C[c]:
            first_student, first_teacher = (
                student.column_V[ids[s]],
                teacher.column_V[teacher_ids[t]],
            )
            _set_apart(student_CX[c], first_student, rollout.student_logp_C[c])
            _set_apart(teacher_CX[c], first_teacher, rollout.teacher_logp_C[c])
    return student_CX, teacher_CX


def _mix(law_X: Tensor, column_K: Tensor, mass_K: Tensor) -> None:
    law_X.mul_(1 - mass_K.sum()).index_add_(0, column_K, mass_K)


def _set_apart(law_X: Tensor, column: Tensor, logp: float) -> None:
    moved = min(float(np.exp(logp)), MOST * float(law_X[column]))
    law_X[column] -= moved
    law_X[-2] += moved


# ------------------------------------------------------------------- figures to results
def table(found: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Means by kind of chunk and set of events; `full` has the masses of `prefix`."""
    rows = []
    for name, some in (("one-to-one", found["single"]), ("many-to-many", ~found["single"])):
        for kind in ("prefix", "strict", "byte", "full"):
            row: dict[str, Any] = {"chunks": name, "events": kind, "n": int(some.sum())}
            for column in HEADS.split()[3:]:
                key = f"{kind} {column}"
                values = found[key] if key in found else found[f"prefix {column}"]
                row[column] = float(values[some].mean())
            rows.append(row)
    return rows


def apart(found: Mapping[str, Array], far: float = FAR) -> list[dict[str, Any]]:
    """Chunk starts where strict sees more than `far` nats above prefix, KL(S‖T), largest first."""
    strict, prefix = found["strict KL(S‖T)"], found["prefix KL(S‖T)"]
    columns = ("before", "after", "strict KL(S‖T)", "prefix KL(S‖T)", "prob_S", "prob_T")
    order = np.argsort(prefix - strict)[: int((strict - prefix > far).sum())]
    return [{column: found[column][c].item() for column in columns} for c in order]


def first_pieces(found: Mapping[str, Array], sets: Mapping[str, Events]) -> dict[str, Any]:
    """First pieces (`prefix`) against longest prefixes alone: which tokens differ, what it changes.

    `unshared_*`: mean mass in tokens of text that only this side has. `differ_*_by_mass`: the share
    of it that the two send to different events; `_by_count`: the share of such tokens.
    """
    result: dict[str, Any] = {}
    for which, side, other in (
        ("S", sets["prefix"].student, sets["longest"].student),
        ("T", sets["prefix"].teacher, sets["longest"].teacher),
    ):
        text_V = torch.tensor([bool(x) for x in side.spelling]) & ~side.shared_V
        differ_V = side.event_V != other.event_V
        masses = [found[f"prefix {part}_{which}"] for part in ("shared", "end", "other")]
        unshared = float((1 - sum(masses)).mean())
        result |= {
            f"unshared_{which}": unshared,
            f"differ_{which}_by_mass": float(found[f"differ_{which}"].mean()) / unshared,
            f"differ_{which}_by_count": float(differ_V[text_V].float().mean()),
        }
    touched = (found["differ_S"] > SOME) | (found["differ_T"] > SOME)
    every = np.ones_like(touched)
    groups = {"all": every, "one-to-one": found["single"], "many-to-many": ~found["single"]}
    for name, some in {**groups, f"over {SOME:.0%} of mass differs": touched}.items():
        result[name] = {"n": int(some.sum())} | {
            f"{kind} {column}": float(found[f"{kind} {column}"][some].mean())
            for column in ("KL(S‖T)", "KL(T‖S)", "TV")
            for kind in ("prefix", "longest")
        }
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Prints everything; 0 if it worked."""
    parser = argparse.ArgumentParser(description="Compares sets of events on two real models.")
    parser.add_argument("--rollouts", type=int, default=3, help="answers a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="at most, of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from real_pair import real_folder

    student, teacher = mg.load(real_folder("smollm2")), mg.load(real_folder("gemma"))
    sets = event_sets(student, teacher)
    pair = Pair(student, teacher, sets["prefix"])
    config = Config(
        rollouts=args.rollouts, max_new_tokens=args.tokens, seed=args.seed, teacher_plain=True
    )
    rollouts = read(pair, [Prompt(text) for text in PROMPTS], config)
    found = figures(pair, sets, rollouts)
    rows, far, pieces = table(found), apart(found), first_pieces(found, sets)
    print(f"{len(rollouts)} rollouts, {sets['prefix'].n_events} events\n")
    print(*(f"{head:>12}" for head in HEADS.split()))
    for row in rows:
        print(*(f"{x:12.4f}" if isinstance(x, float) else f"{x:>12}" for x in row.values()))
    print(f"\nstrict sees over {FAR} nats more than prefix, KL(S‖T): {len(far)} starts")
    for one in far:
        print(
            f"{one['strict KL(S‖T)']:6.2f} against {one['prefix KL(S‖T)']:.3f}  "
            f"{one['before']!r} | {one['after']!r}"
        )
    print("\nfirst pieces (prefix) against longest prefixes alone (longest):")
    for key, value in pieces.items():
        shown = value.items() if isinstance(value, dict) else [("", value)]
        print(f"{key:28}", *(f"{name} {x:.4f}" if name != "n" else f"n {x}" for name, x in shown))
    result = {"table": rows, "apart": far, "first_pieces": pieces, **vars(args)}
    print(json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
