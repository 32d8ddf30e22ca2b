# SPDX-License-Identifier: Apache-2.0
"""What each set of events sees between two real models, and where `strict` sees what is not there.

    python examples/experiments/event_sets.py
    python examples/experiments/event_sets.py --rollouts 1 --tokens 32 --seed 7

SmolLM2-135M-Instruct answers six prompts (Python classes, tables, prose) and Gemma-3-270M reads
them, as in `examples/real_pair.py`, which fetches both (350 MB, once). At each start of a chunk
both predictions are compared, `events.match` saying over what. First comes the comparison of the
predictions alone, conditioned on having an event; `full` is what the library trains by default: the
observed chunk is an event, and longer tokens over a boundary count. Then follow the places where
`strict` sees much more than `prefix` (indentation), those where `prefix` sees much more than with
longest prefixes alone (long runs of spaces), and what first pieces change on the whole. The last
line is JSON. It simplifies: means over chunks, no intervals; run other seeds for those.
"""

from __future__ import annotations

import argparse
import json
import math
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

    `single`: one token on each side. `<events> <column>`: see `_compared` and `_masses`. `prob_S`,
    `prob_T`: of the chunk that follows, 0 where it is not scorable. `before`, `after`: the text
    around the start.
    """
    found: dict[str, list[Any]] = {}
    for rollout in rollouts:
        chunks, text = rollout.chunks, rollout.answer.text.encode()
        spans = list(zip(chunks.start.tolist(), chunks.end.tolist(), strict=True))
        student_SV, teacher_CW = _predictions(pair, rollout)
        probs = student_SV[torch.as_tensor(chunks.s0)], teacher_CW
        new: dict[str, Any] = {
            "single": (chunks.s1 - chunks.s0 == 1) & (chunks.t1 - chunks.t0 == 1),
            "before": [text[max(0, a - 24) : a].decode(errors="replace") for a, _ in spans],
            "after": [text[a : b + 16].decode(errors="replace") for a, b in spans],
            "prob_S": np.exp(np.nan_to_num(rollout.student_logp_C, nan=-np.inf)),
            "prob_T": np.exp(np.nan_to_num(rollout.teacher_logp_C, nan=-np.inf)),
        }
        laws = {"full": full_laws(student_SV, teacher_CW, rollout, sets["prefix"])}
        for kind, events in sets.items():
            ours, theirs = zip(_sides(events), probs, strict=True)
            laws[kind] = ours[0].project(ours[1]), theirs[0].project(theirs[1])
            for which, (side, prob), first in zip(
                "ST", (ours, theirs), _sides(sets["prefix"]), strict=True
            ):
                masses = _masses(prob, side, first)
                new |= {f"{kind} {name}_{which}": mass_C for name, mass_C in masses.items()}
        for kind, both in laws.items():
            new |= {f"{kind} {name}": value_C for name, value_C in _compared(*both).items()}
        for key, value in new.items():
            found.setdefault(key, []).extend(np.asarray(value))
    return {key: np.array(value) for key, value in found.items()}


def _sides(events: Events) -> tuple[Side, Side]:
    return events.student, events.teacher


def _predictions(pair: Pair, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Probabilities: the student's at each of its tokens, the teacher's at each chunk."""
    answer, decoder = rollout.answer, pair.student.decoder
    hidden_SD = decoder(torch.tensor([[*answer.prompt_ids, *answer.ids]]))[0]
    student_SD = completion_states(hidden_SD, len(answer.prompt_ids), len(answer.ids))
    teacher_CD = rollout.score.hidden_MD[torch.as_tensor(rollout.chunks.t0)]
    student_SV = decoder.head.logits(student_SD).softmax(-1)
    return student_SV, pair.teacher.decoder.head.logits(teacher_CD).softmax(-1)


def _compared(student_CX: Tensor, teacher_CX: Tensor) -> dict[str, Tensor]:
    """Of both laws, conditioned on having an event: nats, nats, and 0 to 1."""
    s_CK, t_CK = (
        law[:, :-1] / law[:, :-1].sum(-1, keepdim=True) for law in (student_CX, teacher_CX)
    )
    return {
        "KL(S‖T)": divergence(s_CK, t_CK, beta=1.0),
        "KL(T‖S)": divergence(s_CK, t_CK, beta=0.0),
        "TV": (s_CK - t_CK).abs().sum(-1) / 2,
    }


def _masses(prob_CV: Tensor, side: Side, prefix: Side) -> dict[str, Tensor]:
    """0 to 1, in tokens that are text events by themselves, in the end of turn, in no event.

    `differ`: in tokens whose event is another one than with `prefix`.
    """
    end_V = side.event_V == side.n_events - 1
    parts = {
        "shared": side.shared_V & ~end_V,
        "end": end_V,
        "other": side.event_V == side.n_events,
        "differ": side.event_V != prefix.event_V,
    }
    return {name: prob_CV[:, some_V].sum(-1) for name, some_V in parts.items()}


def full_laws(
    student_SV: Tensor, teacher_CW: Tensor, rollout: Rollout, events: Events
) -> tuple[Tensor, Tensor]:
    """What `loss.look` compares, told once more in a plain loop over chunks."""
    chunks, ids, (student, teacher) = rollout.chunks, rollout.answer.ids, _sides(events)
    student_CX = student.project(student_SV[torch.as_tensor(chunks.s0)])
    teacher_CX = teacher.project(teacher_CW)
    for c, (s, t) in enumerate(zip(chunks.s0.tolist(), chunks.t0.tolist(), strict=True)):
        path = [(ids[k], k not in chunks.s0) for k in range(s - int(rollout.reach_C[c]), s)]
        taken = [student_SV[s - len(path) + k, i] for k, (i, _) in enumerate(path)]
        longer = []
        for k in range(len(path)):
            _, id_J, event_J = student.over([path[k:]])
            mass_J = student_SV[s - len(path) + k, id_J] * math.prod(taken[:k])
            longer.append((student.column(event_J), mass_J))
        if longer:
            column_J, mass_J = (torch.cat(parts) for parts in zip(*longer, strict=True))
            _mix(student_CX[c], column_J, mass_J / (math.prod(taken) + mass_J.sum()))
        if t in rollout.score.carried:
            one = rollout.score.carried[t]
            _mix(teacher_CX[c], teacher.column(one.event_K), one.mass_K.float())
        if rollout.observed_C[c]:  # never the end of turn
            first = student.column_V[ids[s]], teacher.column_V[rollout.answer.teacher_ids[t]]
            _set_apart(student_CX[c], first[0], rollout.student_logp_C[c])
            _set_apart(teacher_CX[c], first[1], rollout.teacher_logp_C[c])
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


def apart(found: Mapping[str, Array], more: str, less: str) -> list[dict[str, Any]]:
    """Chunk starts where `more` sees over `FAR` nats more than `less`, KL(S‖T), largest first."""
    over_C = found[f"{more} KL(S‖T)"] - found[f"{less} KL(S‖T)"]
    columns = ("before", "after", f"{more} KL(S‖T)", f"{less} KL(S‖T)", "prob_S", "prob_T")
    order = np.argsort(-over_C)[: int((over_C > FAR).sum())]
    return [{column: found[column][c].item() for column in columns} for c in order]


def first_pieces(found: Mapping[str, Array], sets: Mapping[str, Events]) -> dict[str, Any]:
    """First pieces (`prefix`) against longest prefixes alone: which tokens differ, what it changes.

    `unshared_*`: mean mass in tokens of text that only this side has. `differ_*_by_mass`: the share
    of it that the two send to different events; `_by_count`: the share of such tokens.
    """
    result: dict[str, Any] = {}
    for which, side, longest in zip(
        "ST", _sides(sets["prefix"]), _sides(sets["longest"]), strict=True
    ):
        text_V = torch.tensor([bool(text) for text in side.spelling]) & ~side.shared_V
        differ_V = side.event_V != longest.event_V
        named = sum(found[f"prefix {part}_{which}"] for part in ("shared", "end", "other"))
        unshared = float((1 - named).mean())
        result |= {
            f"unshared_{which}": unshared,
            f"differ_{which}_by_mass": float(found[f"longest differ_{which}"].mean()) / unshared,
            f"differ_{which}_by_count": float(differ_V[text_V].float().mean()),
        }
    single = found["single"]
    touched = (found["longest differ_S"] > SOME) | (found["longest differ_T"] > SOME)
    groups = {"all": single | True, "one-to-one": single, "many-to-many": ~single}
    for name, some in (groups | {f"over {SOME:.0%} of mass differs": touched}).items():
        keys = [
            f"{kind} {x}" for x in ("KL(S‖T)", "KL(T‖S)", "TV") for kind in ("prefix", "longest")
        ]
        result[name] = {"n": int(some.sum())} | {
            key: float(found[key][some].mean()) for key in keys
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
    rows, pieces = table(found), first_pieces(found, sets)
    far = {names: apart(found, *names) for names in (("strict", "prefix"), ("prefix", "longest"))}
    print(f"{len(rollouts)} rollouts, {sets['prefix'].n_events} events\n")
    print(*(f"{head:>12}" for head in HEADS.split()))
    for row in rows:
        print(*(f"{x:12.4f}" if isinstance(x, float) else f"{x:>12}" for x in row.values()))
    for (more, less), starts in far.items():
        print(f"\n{more} sees over {FAR} nats more than {less}, KL(S‖T), at {len(starts)} starts:")
        for one in starts:
            values = f"{one[f'{more} KL(S‖T)']:6.2f} against {one[f'{less} KL(S‖T)']:.3f}"
            print(f"{values}  {one['before']!r} | {one['after']!r}")
    print("\nfirst pieces (prefix) against longest prefixes alone (longest):")
    for key, value in pieces.items():
        shown = value.items() if isinstance(value, dict) else [("", value)]
        print(f"{key:28}", *(f"{name} {x:.4f}" if name != "n" else f"n {x}" for name, x in shown))
    named = {f"{more} over {less}": starts for (more, less), starts in far.items()}
    result = {"table": rows, **named, "first_pieces": pieces, **vars(args)}
    print(json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
