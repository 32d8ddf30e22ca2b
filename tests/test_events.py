# SPDX-License-Identifier: Apache-2.0
"""Which events two vocabularies share, and what becomes of the rest."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigold.events import match, measure, project
from minigold.offsets import Vocabulary
from reference_losses import overhang_of, project_of

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
    assert project(prob_NW, events.teacher, events.n_events).tolist() == [
        [0.75, 0.125, 0.125, 0.0, 0.0]
    ]


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
    theirs = measure(logp_NW, torch.tensor([1]), events.teacher, events.n_events)
    assert theirs.overhang_N.item() == pytest.approx(0.9)
    ours = measure(
        torch.tensor([[1.0, 1e-30, 1e-30, 1e-30]]).log(),
        torch.tensor([0]),
        events.student,
        events.n_events,
    )
    assert ours.overhang_N.item() == 0.0


def two_vocabularies() -> st.SearchStrategy[tuple[Vocabulary, Vocabulary]]:
    return st.tuples(TEXTS, TEXTS, TEXTS).map(
        lambda three: (words(*three[0], *three[2]), words(*three[1], *three[2]))
    )


@given(two_vocabularies(), st.integers(0, 2**32 - 1))
def test_projection_and_measures_equal_the_slow_versions(
    pair: tuple[Vocabulary, Vocabulary], seed: int
) -> None:
    events = match(*pair)
    if events.identical:
        return
    for vocabulary, side in zip(pair, (events.student, events.teacher), strict=True):
        v = len(vocabulary.token_bytes)
        logits_NV = 2 * torch.randn(3, v, generator=torch.Generator().manual_seed(seed))
        prob_NV = logits_NV.double().softmax(-1)
        event_of = dict(enumerate(side.event_V.tolist()))
        got_NX = project(prob_NV, side, events.n_events)
        want = [project_of(row, event_of, events.n_events) for row in prob_NV.tolist()]
        torch.testing.assert_close(got_NX, torch.tensor(want, dtype=torch.float64))
        torch.testing.assert_close(got_NX.sum(1), torch.ones(3, dtype=torch.float64))
        ids_N = torch.arange(3) % v
        measured = measure(prob_NV.log(), ids_N, side, events.n_events)
        shared = side.shared_V.tolist()
        for n, token in enumerate(ids_N.tolist()):
            row = prob_NV[n].tolist()
            if vocabulary.roles[token] == "text":
                expected = overhang_of(row, vocabulary.token_bytes, shared, token)
                assert measured.overhang_N[n].item() == pytest.approx(expected, abs=1e-12)
            own = sum(p for p, one in zip(row, shared, strict=True) if one)
            assert measured.shared_N[n].item() == pytest.approx(own)
            total = measured.shared_N[n] + measured.projected_N[n] + measured.other_N[n]
            assert total.item() == pytest.approx(1)


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
