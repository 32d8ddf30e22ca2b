# SPDX-License-Identifier: Apache-2.0
"""Sets of events on two real models: SmolLM2-135M-Instruct as the student, Gemma-3-270M reading.

The functions are those of `examples/experiments/event_sets.py`. Numbers called measured come from 8
seeds of its six prompts with three answers each, on one machine. The weights were quantized to 4 to
8 bits, so none of them says how far these two models are apart in truth.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import minigold as mg
from minigold.batch import Array, Rollout, pack
from minigold.config import Config
from minigold.data import Prompt
from minigold.events import Side
from minigold.loss import look
from minigold.pair import Pair
from minigold.sample import completion_states
from real_models import example, real_folder

pytestmark = [pytest.mark.real, pytest.mark.slow]  # minutes of two models on many answers

event_sets = example("experiments/event_sets")

CODE = """```python
class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount

    def __repr__(self):
        return f"Account({self.owner}, {self.balance})"
```"""
ASKED = "Write a Python class Account with the methods deposit and withdraw."
CELLS = (("Country", "Capital"), ("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome"))
TABLE = "".join("|" + "|".join(f" {cell:40}" for cell in row) + "|\n" for row in CELLS)


@pytest.fixture(scope="module")
def sets() -> dict[str, Any]:
    student, teacher = mg.load(real_folder("smollm2")), mg.load(real_folder("gemma"))
    return {"pair": (student, teacher), "events": event_sets.event_sets(student, teacher)}


@pytest.fixture(scope="module")
def pair(sets: dict[str, Any]) -> Pair:
    return Pair(*sets["pair"], sets["events"]["prefix"])


@pytest.fixture(scope="module")
def sampled(sets: dict[str, Any], pair: Pair) -> tuple[list[Rollout], dict[str, Array]]:
    config = Config(rollouts=2, max_new_tokens=64, seed=0, teacher_plain=True)
    rollouts = event_sets.read(pair, [Prompt(text) for text in event_sets.PROMPTS], config)
    return rollouts, event_sets.figures(pair, sets["events"], rollouts)


def read_fixed(
    sets: dict[str, Any], pair: Pair, prompt: str, text: str
) -> tuple[list[Rollout], dict[str, Array]]:
    config = Config(lmbda=0.0, teacher_plain=True)
    rollouts = event_sets.read(pair, [Prompt(prompt, completion=text)], config)
    return rollouts, event_sets.figures(pair, sets["events"], rollouts)


@pytest.fixture(scope="module")
def code(sets: dict[str, Any], pair: Pair) -> tuple[list[Rollout], dict[str, Array]]:
    return read_fixed(sets, pair, ASKED, CODE)


# --------------------------------------------------------------------------------- the table
class Known(NamedTuple):
    """A mean over chunk starts: in the field's table, measured here, and how far it spreads.

    `field`: methods.md, "Two-sided prefix projection", 18 answers to 6 prompts, 980 and 81 chunks.
    `here`: mean over the seeds. `seeds`: deviation from seed to seed of such means over two answers
    to each prompt, as below. `prompts`: deviation of the means of single prompts. Those of the
    table are not known, and what is asked decides more than the dice.
    """

    field: float
    here: float
    seeds: float
    prompts: float

    @property
    def noise(self) -> float:
        """Of the difference between two sets of six prompts; 2.57 is Student's for 95 % and 5."""
        return float(2.57 * np.sqrt(self.seeds**2 + 2 * self.prompts**2 / 6))


KNOWN = {
    ("one-to-one", "prefix"): {
        "KL(S‖T)": Known(1.123, 1.140, 0.042, 0.254),
        "KL(T‖S)": Known(1.329, 1.441, 0.055, 0.235),
        "TV": Known(0.448, 0.387, 0.016, 0.093),
        "shared_S": Known(0.991, 0.994, 0.0024, 0.0028),
        "shared_T": Known(0.970, 0.976, 0.0054, 0.0142),
    },
    ("one-to-one", "strict"): {
        "KL(S‖T)": Known(1.157, 1.184, 0.048, 0.266),
        "KL(T‖S)": Known(1.301, 1.480, 0.069, 0.225),
        "TV": Known(0.446, 0.389, 0.017, 0.092),
    },
    ("many-to-many", "prefix"): {
        "KL(S‖T)": Known(1.872, 1.210, 0.222, 0.784),
        "KL(T‖S)": Known(1.959, 1.392, 0.240, 0.805),
        "TV": Known(0.563, 0.400, 0.048, 0.193),
        "shared_S": Known(0.802, 0.563, 0.075, 0.383),
        "shared_T": Known(0.869, 0.929, 0.034, 0.074),
    },
    ("many-to-many", "strict"): {
        "KL(S‖T)": Known(2.452, 2.921, 0.233, 0.963),
        "KL(T‖S)": Known(2.140, 2.532, 0.195, 0.577),
        "TV": Known(0.634, 0.652, 0.023, 0.060),
    },
}


def rows_of(found: dict[str, Array]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["chunks"], row["events"]): row for row in event_sets.table(found)}


@pytest.mark.parametrize("name", KNOWN, ids=" ".join)
def test_the_table_of_the_field_comes_back_within_its_noise(name: Any, sampled: Any) -> None:
    row, known = rows_of(sampled[1])[name], KNOWN[name]
    assert row["n"] > (400 if name[0] == "one-to-one" else 40)  # measured 577-630, and 63-89
    found = {column: row[column] for column in known}
    assert found == {k: pytest.approx(one.field, abs=one.noise) for k, one in known.items()}
    assert found == {k: pytest.approx(one.here, abs=4 * one.seeds) for k, one in known.items()}


def test_next_to_nothing_is_in_other(sampled: Any) -> None:
    """The field has up to .0124, at 81 starts: one certain end of turn. Measured: up to .0033."""
    for chunks in ("one-to-one", "many-to-many"):
        row = rows_of(sampled[1])[chunks, "prefix"]
        assert row["end_S"] + row["other_S"] < 0.015
        assert row["end_T"] + row["other_T"] < 0.0025  # the field: .0004 and .0011
        assert row["other_S"] < 1e-4  # the end of turn is an event: measured up to 2e-5
        assert row["other_T"] < 2e-3  # <unused0> and its kin: measured up to .0008


def test_strict_and_prefix_say_the_same_of_one_to_one_chunks(sampled: Any) -> None:
    """Strict less prefix, measured: KL(S‖T) .034 to .054, KL(T‖S) .021 to .078, TV up to .004."""
    rows = rows_of(sampled[1])
    prefix, strict = rows["one-to-one", "prefix"], rows["one-to-one", "strict"]
    assert abs(strict["KL(S‖T)"] - prefix["KL(S‖T)"]) < 0.1
    assert abs(strict["KL(T‖S)"] - prefix["KL(T‖S)"]) < 0.15
    assert abs(strict["TV"] - prefix["TV"]) < 0.01


def test_strict_sees_more_where_tokens_are_many_to_many(sampled: Any) -> None:
    """Strict less prefix, measured: KL(S‖T) 1.38 to 2.10, TV .18 to .32 (the field: .58, .07).

    By prompts it is .05 (a story) to 4.4 (classes): how much depends on how much is code.
    """
    rows = rows_of(sampled[1])
    prefix, strict = rows["many-to-many", "prefix"], rows["many-to-many", "strict"]
    assert strict["KL(S‖T)"] - prefix["KL(S‖T)"] > 0.58
    assert strict["TV"] - prefix["TV"] > 0.07


# ------------------------------------------------------------------------------- indentation
# Measured on one machine: KL(S‖T) of strict and of prefix, and what the student and the teacher give
# to the chunk that follows. No sampling here: another machine changes the last digits only.
PLACES = (
    "owner, balance=0):",  # 5.59 .017   .55 .93
    "self.owner = owner",  # 6.64 .024   .96 .96
    "withdraw(self, amount):",  # 5.99 .001   1.00 .94
    "amount > self.balance:",  # 6.90 .003   .96 .91
    "__repr__(self):",  # 14.67 .012   .98 .55
)


@pytest.mark.parametrize("place", PLACES)
def test_prefix_sees_no_disagreement_before_an_indentation(place: str, code: Any) -> None:
    found = code[1]
    ends = np.char.endswith(found["before"], place)
    (c,) = np.flatnonzero(ends & np.char.startswith(found["after"], "\n        "))
    assert not found["single"][c]  # spelled differently
    assert min(found["prob_S"][c], found["prob_T"][c]) > 0.4  # both expect this very text
    assert found["byte KL(S‖T)"][c] < 0.05  # and a new line; measured up to .014
    assert found["strict KL(S‖T)"][c] > 3
    assert found["prefix KL(S‖T)"][c] < 0.3


def test_all_indentation_of_the_code_taken_together(code: Any) -> None:
    """Measured means: strict 5.52, prefix .12; 10 of the 13 over 3 nats with prefix under .3."""
    found = code[1]
    some = np.char.startswith(np.char.lstrip(found["after"], "\n"), "    ")
    some &= np.char.startswith(found["after"], "\n")
    strict, prefix = found["strict KL(S‖T)"][some], found["prefix KL(S‖T)"][some]
    assert len(strict) == 13
    assert strict.mean() > 4
    assert prefix.mean() < 0.2
    assert ((strict > 3) & (prefix < 0.3)).sum() >= 9


# ------------------------------------------------------------------------------ first pieces
def test_first_pieces_and_longest_prefixes_differ_by_mass(sets: Any, sampled: Any) -> None:
    """By count and by mass they tell two stories.

    Of SmolLM2's own tokens .39 differ by count, of their mass next to nothing (measured .004 to
    .006): it is indentation, whose first piece is the longest prefix too. Of Gemma's own .18, and
    of their mass .33 to .61: words such as ` internals`.
    """
    result = event_sets.first_pieces(sampled[1], sets["events"])
    assert result["differ_S_by_count"] == pytest.approx(0.392, abs=0.03)  # of the vocabularies
    assert result["differ_T_by_count"] == pytest.approx(0.183, abs=0.03)
    assert result["differ_S_by_mass"] < 0.03
    assert 0.2 < result["differ_T_by_mass"] < 0.8
    assert 0.02 < result["unshared_S"] < 0.12  # measured .045 to .070
    assert 0.01 < result["unshared_T"] < 0.09  # measured .021 to .045


def test_first_pieces_bring_both_models_nearer_on_one_to_one_chunks(
    sets: Any, sampled: Any
) -> None:
    """Longest less prefix, measured in each of 8 seeds: .009 to .022, .018 to .046, .0013 to .0026.

    At many-to-many starts it is .06, .31, .03, .04, .25, .07, .08 and -.22, hence no claim: see the
    test below for the last.
    """
    one = event_sets.first_pieces(sampled[1], sets["events"])["one-to-one"]
    assert 0.002 < one["longest KL(S‖T)"] - one["prefix KL(S‖T)"] < 0.1
    assert 0.004 < one["longest KL(T‖S)"] - one["prefix KL(T‖S)"] < 0.15
    assert 0.0003 < one["longest TV"] - one["prefix TV"] < 0.01


def test_prefix_sees_no_disagreement_before_a_long_run_of_spaces(sets: Any, pair: Pair) -> None:
    """A column of a table: SmolLM2 has 32 spaces as a token, Gemma 31, both have 24 and 16.

    Gemma's own 31 go to 16, with which SmolLM2 starts them. SmolLM2's own 32, which Gemma starts
    with 31, go where 31 goes. With 24 instead, their longest prefix, it is 5.7 instead of .03.
    """
    _, found = read_fixed(sets, pair, "Make a table of countries and their capitals.", TABLE)
    at = np.char.endswith(found["before"], "\n| Spain") & np.char.startswith(
        found["after"], " " * 9
    )
    (c,) = np.flatnonzero(at)
    assert found["byte KL(S‖T)"][c] < 0.05
    assert found["longest KL(S‖T)"][c] < 1
    assert found["prefix KL(S‖T)"][c] < 1


# --------------------------------------------------------------------------- the script itself
class Free(NamedTuple):
    """Events of which *other* costs nothing: the divergence alone."""

    student: Side
    teacher: Side
    other_costs: bool = False


@torch.no_grad()
def test_the_full_rows_are_what_the_library_compares(pair: Pair, sampled: Any) -> None:
    rollouts = sampled[0][:4]
    events = Free(pair.events.student, pair.events.teacher)
    heads = [model.decoder.head for model in (pair.student, pair.teacher)]
    for beta, name in ((1.0, "full KL(S‖T)"), (0.0, "full KL(T‖S)")):
        values: list[float] = []
        for rollout in rollouts:
            answer = rollout.answer
            hidden_SD = pair.student.decoder(torch.tensor([[*answer.prompt_ids, *answer.ids]]))[0]
            states_SD = completion_states(hidden_SD, len(answer.prompt_ids), len(answer.ids))
            rows = pack(
                [rollout], [np.ones(len(rollout.chunks.s0), dtype=bool)],
                student_starts=[0], teacher_starts=[0], teacher_end_id=pair.teacher.end_id,
            )  # fmt: skip
            loss_C, _ = look(
                states_SD, rollout.score.hidden_MD, student_head=heads[0], teacher_head=heads[1],
                rows=rows, events=events, beta=beta,
            )  # fmt: skip
            values += loss_C.tolist()
        np.testing.assert_allclose(sampled[1][name][: len(values)], values, rtol=1e-3, atol=1e-3)
    plain = sampled[1]["prefix KL(T‖S)"][: len(values)]
    assert np.abs(plain - values).max() > 0.1  # what is observed and carried makes a difference


def test_what_is_apart_comes_largest_first_with_its_text(code: Any) -> None:
    found = code[1]
    starts = event_sets.apart(found, "strict", "prefix")
    over = [one["strict KL(S‖T)"] - one["prefix KL(S‖T)"] for one in starts]
    every = found["strict KL(S‖T)"] - found["prefix KL(S‖T)"]
    assert over == sorted(over, reverse=True)
    assert len(over) == (every > event_sets.FAR).sum() >= 8  # measured 11
    assert starts[0]["before"].endswith("def __repr__(self):")
