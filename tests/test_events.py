# SPDX-License-Identifier: Apache-2.0
"""Which events two vocabularies share, and what becomes of the rest."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minigold.events import Measures, Side, match, measure
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


def test_a_first_piece_that_is_no_event_counts_for_what_it_is_on_its_own_side() -> None:
    """The other model starts `hello` with `he`, and its own `he` is the event `h`."""
    student = words("hel", "h", "hello")
    teacher = words("hel", "h", "he", pieces={b"hello": b"he"})
    events = match(student, teacher)
    assert events.event_bytes[events.student.event_V[2]] == b"h"
    assert events.event_bytes[events.teacher.event_V[2]] == b"h"


def test_without_a_first_piece_it_is_the_longest_prefix() -> None:
    events = match(words("hel", "h", "hello"), words("hel", "h", "he"))
    assert events.event_bytes[events.student.event_V[2]] == b"hel"


@pytest.mark.parametrize("kind", ["prefix", "chunk"])
def test_the_number_of_spaces_at_the_end_is_no_event(kind: str) -> None:
    """Four spaces and `return` for one tokenizer, three and ` return` for the other."""
    student = words(" ", "    ", "\n  ", "x", "x ", "return", " if")
    teacher = words("   ", "    ", " ", "\n  ", "\n ", "x", "x  ", " return", "return", " if")
    events = match(student, teacher, kind=kind)
    names = [*events.event_bytes]
    assert names == [b"\n  ", b" ", b" if", b"return", b"x", b""]
    assert event_names(student, events.student.event_V, names) == [
        b" ", b" ", b"\n  ", b"x", b"x", b"return", b" if", b"",
    ]  # fmt: skip
    assert event_names(teacher, events.teacher.event_V, names) == [
        b" ", b" ", b" ", b"\n  ", b"\n  ", b"x", b"x", b" ", b"return", b" if", b"",
    ]  # fmt: skip
    assert {events.teacher.event_of(b" " * n) for n in range(1, 9)} == {names.index(b" ")}
    strict = match(student, teacher, kind="strict").event_bytes
    assert strict == (b"\n  ", b" ", b"    ", b" if", b"return", b"x", b"")


def test_equal_bytes_add_up() -> None:
    student, teacher = words(".", "a"), words(".", ".", "a")
    events = match(student, teacher)
    prob_NW = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    assert events.teacher.project(prob_NW).tolist() == [[0.75, 0.125, 0.125, 0.0, 0.0]]


@pytest.mark.parametrize("more", [-1, 1, 64])
@pytest.mark.parametrize("teacher", [("a", "b"), ("a", "c")])
def test_predictions_over_other_ids_are_refused(more: int, teacher: tuple[str, ...]) -> None:
    """Models of `transformers` give logits for the embedding's rows of padding, too."""
    side = match(words("a", "b"), words(*teacher)).student
    with pytest.raises(ValueError, match=rf"over 3 ids, got {3 + more}; .* logits\[..., :3\]"):
        side.project(torch.ones(2, 3 + more))


def test_the_same_table_makes_ids_the_events() -> None:
    student = Vocabulary((b".", b".", b"", b"", b""), ("text", "text", "special", "end", "unknown"))
    teacher = Vocabulary((b".", b".", b"", b"", b""), ("text", "text", "end", "special", "unknown"))
    events = match(student, teacher)
    assert events.identical
    assert events.student.event_V.tolist() == [0, 1, 2, 3, 4]
    assert events.student.shared_V.all()


def test_a_teacher_with_more_ids_has_the_students_table_too() -> None:
    """Gemma 3 at 4 billion has a row for one special id more than at 270 million."""
    student = Vocabulary((b".", b"a", b"", b""), ("text", "text", "special", "end"))
    more = ("text", "text", "end", "end", "special", "none", "end")
    teacher = Vocabulary((b".", b"a", b"", b"", b"", b"", b""), more)
    events = match(student, teacher, stops=[2])
    assert events.identical and events.student.identity and not events.teacher.identity
    assert events.teacher.event_V.tolist() == [0, 1, 2, 3, 4, 4, 3]
    assert events.student.end_ids == [3] and events.teacher.end_ids == [3, 6]
    assert events.teacher.kinds_V2.tolist() == [[1, 0]] * 4 + [[0, 1]] * 2 + [[1, 0]]
    law_NX = events.teacher.project(torch.tensor([[0.1, 0.2, 0.1, 0.05, 0.3, 0.2, 0.05]]))
    torch.testing.assert_close(law_NX, torch.tensor([[0.1, 0.2, 0.1, 0.1, 0.0, 0.5]]))
    assert not match(teacher, student).identical, "the teacher could not read all of the student's"
    text = Vocabulary((*student.token_bytes, b"b"), (*student.roles, "text"))
    assert not match(student, text).identical


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


def test_what_is_left_of_a_token_can_be_one_of_the_other_sides() -> None:
    """`peated`, of the teacher's `repeated`, is the student's token, which begins like `pe`."""
    student = words("re", "peated", "peat", "pe", pieces={b"repeated": b"re"})
    teacher = words("re", "repeated", "peat", "pe", pieces={b"peated": b"pe"})
    events = match(student, teacher)
    pe = events.event_bytes.index(b"pe")
    assert events.student.event_of(b"peated") == events.teacher.event_of(b"peated") == pe


@pytest.mark.parametrize("blank", [" ", "\n"])
def test_runs_of_one_blank_are_one_event(blank: str) -> None:
    both = (blank, 3 * blank, "a" + blank, "a" + 2 * blank, "a", blank + "a", "\t", "\t\t")
    events = match(words(*both), words(*both, "b"))
    names = [events.event_bytes[e] for e in events.student.event_V.tolist()]
    one, after = blank.encode(), b"a" + blank.encode()
    assert names[:4] == [one, one, after, after]
    assert names[4:] == [b"a", one + b"a", b"\t", b"\t\t", b""]


def measured_at(logp_NV: Tensor, ids_N: Tensor, side: Side) -> Measures:
    return measure(logp_NV.exp(), logp_NV.gather(1, ids_N[:, None])[:, 0], ids_N, side)


def test_overhang_of_the_worked_example() -> None:
    """Teacher: hello .9, hel .1. Student without hello: hel. After hel the teacher is not comparable."""
    student, teacher = words("hel", "lo", "p"), words("hello", "hel", "p")
    events = match(student, teacher)
    logp_NW = torch.tensor([[0.9, 0.1, 1e-30, 1e-30]]).log()
    theirs = measured_at(logp_NW, torch.tensor([1]), events.teacher)
    assert -theirs.stay_N.expm1().item() == pytest.approx(0.9)
    logp_NV = torch.tensor([[1.0, 1e-30, 1e-30, 1e-30]]).log()
    assert measured_at(logp_NV, torch.tensor([0]), events.student).stay_N.item() == 0.0


def test_masses_keep_their_digits_under_autocast() -> None:
    """bfloat16 is coarser than what the audit looks for."""
    events = match(words("hel", "lo", "p", "q"), words("hello", "hel", "p", "r"))
    logp_NV = torch.tensor([[0.9971, 0.0007, 0.0009, 0.0013, 1e-9]]).log()
    want = measured_at(logp_NV, torch.tensor([0]), events.student)
    with torch.autocast("cpu", torch.bfloat16):
        got = measured_at(logp_NV, torch.tensor([0]), events.student)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def carried(side: Side, prob_NV: Tensor, ids_N: Tensor, inside_N: Tensor) -> Tensor:
    """Masses of `Side.over`, in the columns of `Side.project`."""
    taken = zip(ids_N.tolist(), inside_N.tolist(), strict=True)
    row_J, id_J, event_J = side.over([[one] for one in taken])
    empty_NX = prob_NV.new_zeros(len(ids_N), side.n_events + 2)
    return empty_NX.index_put((row_J, side.column(event_J)), prob_NV[row_J, id_J], accumulate=True)


def test_tokens_that_were_another_event_are_no_overhang() -> None:
    """`help` is an event of its own, so `hel` was told apart from it where both begin."""
    student, teacher = words("hel", "help", "lo"), words("hel", "help", "hello", "lo")
    events = match(student, teacher)
    prob_NW = torch.tensor([[0.1, 0.5, 0.3, 0.1, 0.0]])
    measured = measured_at(prob_NW.log(), torch.tensor([0]), events.teacher)
    assert measured.stay_N.item() == pytest.approx(math.log(0.1 / 0.4))
    assert measured.inside_N.item() == pytest.approx(math.log(0.1 / 0.9))
    lo = events.event_bytes.index(b"lo")
    for inside, mass in ((False, 0.3), (True, 0.8)):
        carried_NX = carried(events.teacher, prob_NW, torch.tensor([0]), torch.tensor([inside]))
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
    grad_NX = torch.randn(got_NX.shape, generator=torch.Generator().manual_seed(seed)).double()
    leaf_NV = prob_NV.clone().requires_grad_()
    (spread_NV,) = torch.autograd.grad((side.project(leaf_NV) * grad_NX).sum(), leaf_NV)
    torch.testing.assert_close(side.spread(grad_NX), spread_NV)
    carried_NX = carried(side, prob_NV, ids_N, inside_N)
    measured = measured_at(prob_NV.log(), ids_N, side)
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


def test_tokens_that_add_too_many_spaces_are_left_out() -> None:
    side = match(words("a", "b"), words("a", "a  b", "a b", "a   ", "a ", "ab", "a  ")).teacher
    for spaces, left in ((0, [1, 2, 3, 4, 5, 6]), (1, [2, 4, 5]), (2, [1, 2, 4, 5, 6])):
        assert sorted(side.longer(b"a", None, spaces=spaces)[0].tolist()) == left


@given(two_vocabularies(), st.data())
def test_longer_tokens_by_their_definition(
    pair: tuple[Vocabulary, Vocabulary], data: st.DataObject
) -> None:
    events = match(*pair)
    if events.identical:
        return
    side = data.draw(st.sampled_from([events.student, events.teacher]))
    event_of, spelling = side.event_of, side.spelling
    whole = data.draw(st.sampled_from([x for x in spelling if x]))
    text = whole[: data.draw(st.integers(1, len(whole)))]
    seen = st.one_of(
        st.sampled_from([event_of(x[k:]) for x in spelling for k in range(len(x))]),
        st.integers(0, side.n_events),
    )
    event = data.draw(st.none() | seen)
    told = data.draw(st.lists(st.tuples(st.integers(1, len(text)), seen), max_size=2))
    spaces = data.draw(st.integers(0, 2))
    want = {}
    for i, x in enumerate(spelling):
        rest = x[len(text) :]
        apart = any(event_of(x[len(text) - size :]) != one for size, one in told)
        apart = apart or (event is not None and event_of(x) != event)
        apart = apart or (spaces > 0 and rest.startswith(b" " * (spaces + 1)))
        if x.startswith(text) and rest and not apart:
            want[i] = event_of(rest)
    ids, rests = side.longer(text, event, told, spaces)
    assert dict(zip(ids.tolist(), rests.tolist(), strict=True)) == want and len(ids) == len(want)


def test_strict_sends_unshared_tokens_nowhere_and_counts_them_as_overhang() -> None:
    """`hello` is the teacher's alone: what it would have covered is missing after `hel`."""
    student, teacher = words("hel", "help", "lo"), words("hel", "help", "hello", "lo")
    events = match(student, teacher, kind="strict")
    assert events.event_bytes == (b"hel", b"help", b"lo", b"")
    assert events.teacher.event_V.tolist() == [0, 1, 4, 2, 3]
    assert events.teacher.shared_V.tolist() == [True, True, False, True, True]
    assert not events.carries and not events.other_costs
    prob_NW = torch.tensor([[0.1, 0.5, 0.3, 0.1, 0.0]])
    measured = measured_at(prob_NW.log(), torch.tensor([0]), events.teacher)
    assert measured.stay_N.item() == pytest.approx(math.log(0.1 / 0.4))
    assert measured.other_N.item() == pytest.approx(0.3)


@given(two_vocabularies(), st.integers(0, 2**32 - 1))
def test_strict_is_both_sides_on_the_shared_strings(
    pair: tuple[Vocabulary, Vocabulary], seed: int
) -> None:
    events = match(*pair, kind="strict")
    if events.identical:
        return
    shared = sorted(set(pair[0].token_bytes[:-1]) & set(pair[1].token_bytes[:-1]))
    assert events.event_bytes == (*shared, b"")
    for vocabulary, side in zip(pair, (events.student, events.teacher), strict=True):
        n = len(vocabulary.token_bytes)
        g = torch.Generator().manual_seed(seed)
        prob = (2 * torch.randn(1, n, generator=g)).double().softmax(-1)
        want = [0.0] * (len(shared) + 3)
        for text, role, p in zip(
            vocabulary.token_bytes, vocabulary.roles, prob[0].tolist(), strict=True
        ):
            place = shared.index(text) if text in shared else len(shared) + 2
            want[len(shared) if role == "end" else place] += p
        assert side.project(prob)[0].tolist() == pytest.approx(want)


@given(two_vocabularies(), st.integers(0, 2**32 - 1))
def test_byte_is_the_law_of_the_next_byte(pair: tuple[Vocabulary, Vocabulary], seed: int) -> None:
    events = match(*pair, kind="byte")
    assert events.event_bytes == (*(bytes([b]) for b in range(256)), b"")
    assert not events.carries and events.other_costs
    for vocabulary, side in zip(pair, (events.student, events.teacher), strict=True):
        g = torch.Generator().manual_seed(seed)
        prob = (2 * torch.randn(1, len(vocabulary.roles), generator=g)).double().softmax(-1)
        want = [0.0] * 259
        for text, role, p in zip(
            vocabulary.token_bytes, vocabulary.roles, prob[0].tolist(), strict=True
        ):
            want[256 if role == "end" else text[0]] += p
        assert side.project(prob)[0].tolist() == pytest.approx(want)


def test_with_one_tokenizer_byte_has_no_overhang() -> None:
    """Both sides have the same boundaries, so that none says more than the other."""
    vocabulary = words("hel", "hello", "lo")
    for kind, carried_over in (("byte", 0), ("prefix", 0), ("strict", 0)):
        side = match(vocabulary, vocabulary, kind=kind).student
        assert len(side.over([[(0, False)]])[1]) == carried_over
        logp = torch.tensor([[0.5, 0.4, 0.05, 0.05]]).log()
        assert measured_at(logp, torch.tensor([0]), side).stay_N.item() == 0


def test_markers_have_no_event_in_any_set() -> None:
    student = Vocabulary((b"a", b"", b""), ("text", "special", "end"))
    teacher = Vocabulary((b"a", b"b", b"<think>", b""), ("text", "text", "special", "end"))
    for kind, n_events in (("prefix", 2), ("strict", 2), ("byte", 257)):
        events = match(student, teacher, kind=kind)
        assert events.n_events == n_events
        assert events.student.event_V[1] == events.teacher.event_V[2] == n_events
        assert events.student.event_V[2] == events.teacher.event_V[3] == n_events - 1


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="one of prefix, strict, byte, chunk, got 'words'"):
        match(words("a"), words("a", "b"), kind="words")


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
                name = events.event_bytes[event]
                stem = name.rstrip(b" ")  # of spaces at the end there may be any number
                assert text.startswith(stem + b" " * (stem != name))
