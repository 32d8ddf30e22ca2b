# SPDX-License-Identifier: Apache-2.0
"""Which events two vocabularies share, and what becomes of the rest."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigold.events import Side, match, measure
from minigold.offsets import Vocabulary
from reference_losses import SlowSide, project_of

TEXTS = st.lists(
    st.text(alphabet="ab \x00é", min_size=1, max_size=4).map(str.encode), min_size=1, max_size=12
)


def words(*texts: str | bytes, pieces: dict[bytes, bytes] | None = None) -> Vocabulary:
    """Text tokens, then one end-of-turn id."""
    spelled = [t.encode() if isinstance(t, str) else t for t in texts]
    return Vocabulary((*spelled, b""), (*["text"] * len(texts), "end"), pieces or {})


def event_names(
    vocabulary: Vocabulary, event_V: torch.Tensor, names: Sequence[bytes]
) -> list[bytes]:
    return [[*names, b"OTHER"][event] for event in event_V.tolist()]


def test_unshared_tokens_go_to_first_pieces_then_longest_prefixes() -> None:
    student = words("hel", "hello", "help", "xyz", "h", pieces={b"helium": b"h"})
    teacher = words("hel", "lo", "helium", "h", pieces={b"help": b"hel"})
    events = match(student, teacher)
    assert events.event_bytes == (b"h", b"hel", b"")
    names = events.event_bytes
    assert event_names(student, events.student.event_V, names) == [
        b"hel", b"hel", b"hel", b"OTHER", b"h", b"",
    ]  # fmt: skip
    assert event_names(teacher, events.teacher.event_V, names) == [
        b"hel",
        b"OTHER",
        b"h",
        b"h",
        b"",
    ]


def test_first_piece_outside_the_events_falls_back_to_the_longest_prefix() -> None:
    student = words("hel", "h", "hello")
    teacher = words("hel", "h", "he", pieces={b"hello": b"he"})
    events = match(student, teacher)
    assert events.event_bytes[events.student.event_V[2]] == b"hel"


def test_equal_bytes_add_up() -> None:
    student, teacher = words(".", "a"), words(".", ".", "a")
    events = match(student, teacher)
    prob_NW = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    assert events.teacher.project(prob_NW).tolist() == [[0.75, 0.125, 0.125, 0.0, 0.0]]


def test_the_same_table_makes_ids_the_events() -> None:
    student = Vocabulary((b".", b".", b"", b"", b""), ("text", "text", "special", "end", "unknown"))
    teacher = Vocabulary((b".", b".", b"", b"", b""), ("text", "text", "end", "special", "unknown"))
    events = match(student, teacher)
    assert events.identical
    assert events.student.event_V.tolist() == [0, 1, 2, 3, 4]
    assert events.student.shared_V.all()


def test_roles_other_than_text_have_no_event() -> None:
    student = Vocabulary((b"a", b"", b"", b""), ("text", "special", "end", "none"))
    teacher = Vocabulary((b"a", b"<think>", b"", b""), ("text", "text", "end", "end"))
    events = match(student, teacher)
    assert events.student.event_V.tolist() == [0, 2, 1, 2]
    assert events.teacher.event_V.tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_no_end_of_turn_is_refused(side: str) -> None:
    good, bad = words("a"), Vocabulary((b"a",), ("text",))
    pair = (bad, good) if side == "student" else (good, bad)
    with pytest.raises(ValueError, match=f"end-of-turn id in the {side}'s vocabulary"):
        match(*pair)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(ValueError, match="share text tokens, got none"):
        match(words("a"), words("b", "c"))


def test_overhang_of_the_worked_example() -> None:
    """Teacher: hello .9, hel .1. Student without hello: hel. After hel the teacher is not comparable."""
    student, teacher = words("hel", "lo", "p"), words("hello", "hel", "p")
    events = match(student, teacher)
    logp_NW = torch.tensor([[0.9, 0.1, 1e-30, 1e-30]]).log()
    theirs = measure(logp_NW, torch.tensor([1]), events.teacher)
    assert -theirs.stay_N.expm1().item() == pytest.approx(0.9)
    logp_NV = torch.tensor([[1.0, 1e-30, 1e-30, 1e-30]]).log()
    assert measure(logp_NV, torch.tensor([0]), events.student).stay_N.item() == 0.0


def test_tokens_that_were_another_event_are_no_overhang() -> None:
    """`help` is an event of its own, so `hel` was told apart from it where both begin."""
    student, teacher = words("hel", "help", "lo"), words("hel", "help", "hello", "lo")
    events = match(student, teacher)
    prob_NW = torch.tensor([[0.1, 0.5, 0.3, 0.1, 0.0]])
    measured = measure(prob_NW.log(), torch.tensor([0]), events.teacher)
    assert measured.stay_N.item() == pytest.approx(math.log(0.1 / 0.4))
    assert measured.inside_N.item() == pytest.approx(math.log(0.1 / 0.9))
    lo = events.event_bytes.index(b"lo")
    for inside, mass in ((False, 0.3), (True, 0.8)):
        carried_NX = events.teacher.carry(prob_NW, torch.tensor([0]), torch.tensor([inside]))
        assert carried_NX[0, lo].item() == pytest.approx(0.3)
        assert carried_NX.sum().item() == pytest.approx(mass)


def two_vocabularies() -> st.SearchStrategy[tuple[Vocabulary, Vocabulary]]:
    return st.tuples(TEXTS, TEXTS, TEXTS).map(
        lambda three: (words(*three[0], *three[2]), words(*three[1], *three[2]))
    )


def slow_side(vocabulary: Vocabulary, names: Sequence[bytes]) -> SlowSide:
    return SlowSide(vocabulary.token_bytes, vocabulary.roles, names[:-1], {})


def check_side(vocabulary: Vocabulary, side: Side, names: Sequence[bytes], seed: int) -> None:
    slow = slow_side(vocabulary, names)
    assert side.event_V.tolist() == slow.events
    logits_NV = 2 * torch.randn(3, len(slow.texts), generator=torch.Generator().manual_seed(seed))
    prob_NV = logits_NV.double().softmax(-1)
    ids_N = torch.tensor([seed % len(slow.texts), 0, len(slow.texts) // 2])
    inside_N = torch.tensor([True, False, bool(seed % 2)])
    got_NX = side.project(prob_NV)
    want = [
        project_of(row, dict(enumerate(slow.events)), side.n_events) for row in prob_NV.tolist()
    ]
    torch.testing.assert_close(got_NX, torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(got_NX.sum(1), torch.ones(3, dtype=torch.float64))
    carried_NX = side.carry(prob_NV, ids_N, inside_N)
    measured = measure(prob_NV.log(), ids_N, side)
    for n, (i, inside) in enumerate(zip(ids_N.tolist(), inside_N.tolist(), strict=True)):
        masses = slow.carry(prob_NV[n].tolist(), slow.texts[i], None if inside else slow.events[i])
        masses = masses if slow.texts[i] else {}
        row = [0.0] * (side.n_events + 2)
        for event, mass in masses.items():
            row[event + (event == side.n_events)] = mass
        torch.testing.assert_close(carried_NX[n], torch.tensor(row, dtype=torch.float64))
        mass, taken = sum(masses.values()), prob_NV[n, i].item()
        got = (measured.inside_N if inside else measured.stay_N)[n].item()
        assert got == pytest.approx(math.log(taken / (mass + taken)), abs=1e-12)
        own = prob_NV[n][side.shared_V].sum().item()
        assert measured.shared_N[n].item() == pytest.approx(own)
        total = measured.shared_N[n] + measured.projected_N[n] + measured.other_N[n]
        assert total.item() == pytest.approx(1)


@given(two_vocabularies(), st.integers(0, 2**32 - 1))
def test_both_sides_equal_the_slow_versions(pair: tuple[Vocabulary, Vocabulary], seed: int) -> None:
    events = match(*pair)
    if not events.identical:
        for vocabulary, side in zip(pair, (events.student, events.teacher), strict=True):
            check_side(vocabulary, side, events.event_bytes, seed)


@given(two_vocabularies())
def test_swapping_the_sides_swaps_the_maps(pair: tuple[Vocabulary, Vocabulary]) -> None:
    there, back = match(*pair), match(pair[1], pair[0])
    assert there.event_bytes == back.event_bytes or there.identical
    assert torch.equal(there.student.event_V, back.teacher.event_V)


@given(two_vocabularies())
def test_every_event_of_a_text_token_is_a_prefix_of_it(pair: tuple[Vocabulary, Vocabulary]) -> None:
    events = match(*pair)
    for vocabulary, side in zip(pair, (events.student, events.teacher), strict=True):
        for text, event in zip(vocabulary.token_bytes, side.event_V.tolist(), strict=True):
            if event < events.n_events:
                assert text.startswith(events.event_bytes[event])
