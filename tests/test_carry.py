# SPDX-License-Identifier: Apache-2.0
"""The student's boundaries inside chunks: what the teacher's longer tokens say there, and what it costs."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigold.batch import Rollout, pack
from minigold.carry import Carried, Inside, Longer, Reading
from minigold.config import Config
from minigold.evaluate import forward_kl
from minigold.events import Events, match
from minigold.loss import FIRST, ChunkRows, chunk_losses, gold_loss
from minigold.masked import choose_chunks, chunk_weights, train_pass
from minigold.offsets import BROKEN, Vocabulary
from minigold.pair import Pair, make_pair, matched
from minigold.teacher import score
from reference_losses import SlowSide
from test_events import TEXTS, words
from test_pair import side
from test_teacher import PROMPT, LastTokenModel, drawn_text, following_of, slow_carried
from test_train import (
    CONFIG,
    broken_rollout,
    cross_pair,
    dense_gradient,
    gradient_of,
    rollouts_of,
    same_pair,
)


@pytest.fixture
def everything_counts() -> Iterator[None]:
    """Random teachers know little of any text; for the loss that makes no difference."""
    with patch("minigold.carry.INSIDE_FROM", 0.0), patch("minigold.carry.MOSTLY", 0.0):
        yield


def laws(
    prob: Sequence[Sequence[float]], events: Events, reading: Reading
) -> dict[int, dict[bytes, float]]:
    """By student token, what the teacher says inside chunks."""
    longer, logp = Longer(reading, events.teacher), []
    for row, i in zip(prob, reading.ids, strict=False):
        longer.add(torch.tensor([row]))
        logp.append(math.log(row[i]) if row[i] else -math.inf)
    names = [*events.event_bytes, b"OTHER"]
    return {
        at: {names[e]: m for e, m in zip(x.event_K.tolist(), x.mass_K.tolist(), strict=True)}
        for at, x in longer.carried(logp)[1].items()
    }


# ------------------------------------------------------------------------- what is said there
SIX = words("six", "ty", "teen", "-", "x", "s")
NUMBERS = words("six", "ty", "teen", "-", "x", "s", "sixty-", "sixteen", "sixx")


def inside(events: Events, *taken: str, at: int = 1, start: int = 0) -> Inside:
    names = [(one.encode(), events.student.event_of(one.encode())) for one in taken]
    return Inside(at, start, names)


def test_a_teacher_in_one_token_says_how_a_student_in_pieces_goes_on() -> None:
    """The student wrote `six` and `x`; the teacher reads one token, `sixx`, and meant others."""
    events = match(SIX, NUMBERS)
    row = [0.001, 0.0, 0.0, 0.0, 0.0, 0.0, 0.6, 0.3, 0.099, 0.0]
    reading = Reading(PROMPT, [8], inside=[inside(events, "six")])
    assert laws([row], events, reading) == {
        1: {b"ty": pytest.approx(0.6, abs=2e-3), b"teen": pytest.approx(0.3, abs=2e-3),
            b"x": pytest.approx(0.099, abs=2e-3)}
    }  # fmt: skip


def test_nothing_is_said_where_too_much_is_unknown_or_the_text_is_rare() -> None:
    events = match(SIX, NUMBERS)
    reading = Reading(PROMPT, [8], inside=[inside(events, "six")])
    # `six` by itself: what would follow was not asked
    assert laws([[0.2, 0, 0, 0, 0, 0, 0.5, 0.2, 0.1, 0.0]], events, reading) == {}
    assert laws([[0.0, 0.97, 0, 0, 0, 0, 0.01, 0.01, 0.01, 0.0]], events, reading) == {}
    assert laws([[math.nan] * 10], events, reading) == {}


def test_text_is_rare_beside_all_that_is_known_where_the_chunk_starts() -> None:
    """After a space the teacher is sure of `six`; it had meant ` x`, and says so over the boundary."""
    events = match(words(" ", "six", "ty", "x"), words(" ", "six", "ty", "x", " x", "sixty"))
    six = Inside(2, 1, [(b"six", events.student.event_of(b"six"))])
    reading = Reading(PROMPT, [0, 5], starts=[1], inside=[six])
    after = [0, 0, 0, 0, 0, 1.0, 0.0]
    assert laws([[0.01, 0, 0, 0, 0.99, 0, 0.0], after], events, reading) == {}
    assert laws([[0.5, 0, 0, 0, 0.5, 0, 0.0], after], events, reading) == {2: {b"ty": 1.0}}


def test_tokens_that_were_another_event_at_a_boundary_on_the_way_have_no_say() -> None:
    student = words("six", "sixt", "t", "teen", "ty", "y")
    teacher = words("six", "sixt", "t", "teen", "ty", "y", "sixty", "sixteen")
    student = Vocabulary(
        student.token_bytes, student.roles, {b"sixty": b"sixt", b"sixteen": b"six"}
    )
    events = match(student, teacher)
    row = [0.0, 0.0, 0, 0, 0, 0, 0.5, 0.5, 0.0]
    for taken, law in (("six", {b"teen": 1.0}), ("sixt", {b"y": 1.0})):
        reading = Reading(PROMPT, [6], inside=[inside(events, taken)])
        assert laws([row], events, reading) == {1: law}
    two = inside(events, "six", "t", at=2)  # after six, sixteen says `teen`: another event than `t`
    assert laws([row], events, Reading(PROMPT, [6], inside=[two])) == {}


def test_tokens_that_begin_behind_the_start_count_as_much_as_the_way_there() -> None:
    """The student wrote `six`, `t`; the teacher reads `si`, `xty`, and meant `sixteen` as often."""
    student = words("six", "t", "y", "een")
    events = match(student, words("six", "t", "y", "een", "si", "xty", "sixteen"))
    rows = [[0, 0, 0, 0, 0.5, 0, 0.5, 0.0], [0, 0, 0, 0, 0, 1.0, 0, 0.0]]
    reading = Reading(PROMPT, [4, 5], inside=[inside(events, "six", "t", at=2)])
    assert laws(rows, events, reading) == {
        2: {b"y": pytest.approx(0.5), b"een": pytest.approx(0.5)}
    }


def test_tokens_that_begin_before_the_chunk_speak_inside_it() -> None:
    """The student wrote a space and the first byte of an \u00e9 that it then broke."""
    student = words(" ", b"\xc3", b"\xa9", "x")
    teacher = words(" ", b"\xc3", b"\xa9", "x", " \u00e9")
    events = match(student, teacher)
    row, weird = [0.01, 0.0, 0.0, 0.0, 0.99, 0.0], [0.0, 0.2, 0.0, 0.8, 0.0, 0.0]
    one = Inside(2, 1, [(b"\xc3", events.student.event_of(b"\xc3"))])
    reading = Reading(PROMPT, [0, 3], starts=[1, 2], opaque={1}, inside=[one])
    assert laws([row, weird], events, reading) == {2: {b"\xa9": pytest.approx(1.0)}}


def test_the_students_token_tells_longer_ones_apart_not_the_teachers() -> None:
    """The student took `sm`; the teacher reads `s`, `m`, and had meant `sm\u00f6` all along."""
    student, teacher = words("s", "m", "sm", "\u00f6"), words("s", "m", "sm", "\u00f6", "sm\u00f6")
    student = Vocabulary(student.token_bytes, student.roles, {"sm\u00f6".encode(): b"sm"})
    events = match(student, teacher)
    row = [0.01, 0.0, 0.0, 0.0, 0.99, 0.0]
    after = [0.0, 0.5, 0.0, 0.0, 0.0, 0.5]
    for taken, starts in (({0: int(events.student.event_V[2])}, {2}), ({}, set())):
        longer = Longer(Reading(PROMPT, [0, 1], [2], taken=taken), events.teacher)
        longer.add(torch.tensor([row, after]))
        assert set(longer.carried([math.log(0.01), math.log(0.5)])[0]) == starts


LINE = b"\n   "  # the student writes the last space with the word


def lines(more: float = 0.0) -> tuple[Events, LastTokenModel]:
    """The teacher writes four spaces, `return` or `if`; the student three, ` return` or ` if`.

    With probability `more` the teacher goes on with three more spaces.
    """
    student = words(LINE, "\n", " return", " if", " ", "   ", "x", "return", pieces={b"\n": LINE})
    teacher = words(
        "\n", "    ", "return", "if", "      ", "x", "   ", " ", " return", " if",
        pieces={LINE: b"\n"},
    )  # fmt: skip
    rows = torch.full((11, 11), 1e-9)
    rows[PROMPT[-1], 0] = rows[4, 2] = rows[2, 5] = rows[5, 5] = rows[6, 2] = 1.0
    rows[0, 1], rows[0, 4], rows[0, 6] = 0.94, 0.05, 0.01
    rows[1, 2], rows[1, 3], rows[1, 6] = 0.7 * (1 - more), 0.3 * (1 - more), more
    return match(student, teacher), LastTokenModel(rows)


def events_of(law: Carried, events: Events) -> dict[bytes, float]:
    names = [events.event_bytes[e] for e in law.event_K.tolist()]
    return dict(zip(names, law.mass_K.tolist(), strict=True))


@pytest.mark.parametrize("branch", [False, True])
def test_the_rest_of_a_token_goes_on_with_what_follows_it(branch: bool) -> None:
    """They write the same texts, and that the teacher's token ends in the space says nothing against.

    It is the one that the teacher read, or another one that the chunk begins with.
    """
    events, model = lines()
    one = Inside(1, 0, [(LINE, events.student.event_of(LINE))])
    reading = Reading(PROMPT, [0, 4 if branch else 1, 2], [3], inside=[one])
    (got,) = score(model, [reading], end_ids=[10], side=events.teacher, other_paths=True)
    want = {b" return": 0.94 * 0.7 / 0.99, b" if": 0.94 * 0.3 / 0.99, b" ": 0.05 / 0.99}
    assert events_of(got.inside[1], events) == pytest.approx(want, abs=1e-6)


def test_spaces_that_the_student_has_one_token_for_have_no_say() -> None:
    """After its `\n···` more than one space would have been another token, whoever adds them."""
    events, model = lines(more=0.2)
    taken = [(LINE, events.student.event_of(LINE))]
    reading = Reading(PROMPT, [0, 1, 2], [3], inside=[Inside(1, 0, taken, spaces=1)])
    (got,) = score(model, [reading], end_ids=[10], side=events.teacher)
    want = {b" return": 0.7, b" if": 0.3}
    assert events_of(got.inside[1], events) == pytest.approx(want, abs=1e-6)


def test_the_rest_of_a_token_over_a_chunks_start_goes_on_too() -> None:
    """The student forgot the last space; the teacher reads three, and had meant four and a word."""
    events, model = lines()
    reading = Reading(PROMPT, [0, 6, 2], [2])
    (got,) = score(model, [reading], end_ids=[10], side=events.teacher, other_paths=True)
    want = {b" return": 0.94 * 0.7, b" if": 0.94 * 0.3, b" ": 0.05}
    assert events_of(got.carried[2], events) == pytest.approx(want, abs=1e-6)
    assert model.n_read == len(PROMPT) + 3 + len(PROMPT) + 1 + 1  # `      ` has too little
    (plain,) = score(model, [reading], end_ids=[10], side=events.teacher)
    assert events_of(plain.carried[2], events) == pytest.approx({b" ": 0.99}, abs=1e-6)


def test_the_students_own_token_says_how_it_cuts_the_text() -> None:
    """It wrote `rem` and `edy`; the teacher `re`, `med` and `y`, and `ed` is a token of both."""
    student = words("rem", "edy", "ed", "y", "re", "e", pieces={b"med": b"e"})
    teacher = words("re", "med", "y", "ed", "e", "edx", pieces={b"rem": b"re", b"edy": b"e"})
    events = match(student, teacher)
    rows = torch.full((7, 7), 1e-9)
    rows[PROMPT[-1], 0] = rows[0, 1] = rows[2, 6] = 1.0
    rows[1, 2], rows[1, 3] = 0.8, 0.2
    follows = b"edy", events.student.event_of(b"edy")
    one = Inside(1, 0, [(b"rem", events.student.event_of(b"rem"))], follows)
    reading = Reading(PROMPT, [0, 1, 2], inside=[one])
    (got,) = score(LastTokenModel(rows), [reading], end_ids=[6], side=events.teacher)
    assert events_of(got.inside[1], events) == pytest.approx({b"e": 0.8, b"ed": 0.2}, abs=1e-6)


def known_after(
    prob: list[list[float]], side: SlowSide, reading: Reading, after: list[list[float]] | None,
    at: int, i: int,
) -> dict[bytes, float]:  # fmt: skip
    """What follows a token in place of the one at `at`, as far as it is read; else nothing more."""
    starts, text = [0, *reading.starts], side.texts[i]
    if i == reading.ids[at]:
        return following_of(prob[at + 1], side)
    begin = max(k for k in starts if k <= at)
    end = min([k for k in starts if k > at], default=None)
    for over in (k for k in reading.starts if k > at and after):  # over a chunk's start
        lead = b"".join(side.texts[k] for k in reading.ids[at:over])
        on_the_way = [
            (
                len(b"".join(side.texts[x] for x in reading.ids[at:k])),
                reading.taken.get(k, side.events[reading.ids[k]]),
            )
            for k in starts
            if at <= k < over
        ]
        if (
            text.startswith(lead)
            and text != lead
            and text.endswith(b" ")
            and all(side.event_of(text[n:]) == event for n, event in on_the_way)
        ):
            return following_of(after[i], side)
    if after and end is not None:  # the chunk begins with it
        rest = b"".join(side.texts[k] for k in reading.ids[at:end])
        event = reading.taken.get(at, side.events[reading.ids[at]])
        told_apart = at == begin and side.event_of(text) != event
        if text and rest.startswith(text) and rest != text and text != side.texts[reading.ids[at]]:
            return {b"": 1.0} if told_apart else following_of(after[i], side)
    return {b"": 1.0}


def slow_event(side: SlowSide, one: Inside, rest: bytes, more: bytes, whole: bytes) -> int:
    """Of a rest and what follows it; -1 if the student would have taken a longer token before it."""
    n_spaces = len(rest + more) - len((rest + more).lstrip(b" "))
    if n_spaces > one.spaces > 0:
        return -1
    if not more or not whole.startswith(rest + more):
        return side.event_on(rest, more)
    spelled, event = one.follows
    return event if len(spelled) > len(rest) else side.event_on(rest, whole[len(rest) :])


def slow_inside(
    prob: list[list[float]], side: SlowSide, reading: Reading, one: Inside,
    after: list[list[float]] | None,
) -> tuple[dict[int, float], float]:  # fmt: skip
    """Every token that reaches over the boundary, from every position; and the mass that is unknown.

    What is known to follow it is what its rest goes on with.
    """
    starts, text = (0, *reading.starts), b"".join(spelled for spelled, _ in one.taken)
    edges = [len(b"".join(x for x, _ in one.taken[:k])) for k in range(len(one.taken))]
    spelled = [side.texts[i] for i in reading.ids]
    masses: dict[int, float] = {}
    unknown = 0.0
    for at in range(len(reading.ids)):
        if at <= one.start:
            lead, left = b"".join(spelled[at : one.start]), text
            path = 1 / math.prod(prob[k][reading.ids[k]] for k in range(at, one.start))
        else:
            gone = b"".join(spelled[one.start : at])
            if (
                not text.startswith(gone)
                or len(gone) >= len(text)
                or not all(spelled[one.start : at])
            ):
                break
            lead, left = b"", text[len(gone) :]
            path = math.prod(prob[k][reading.ids[k]] for k in range(one.start, at))
        offset = len(lead) - (len(text) - len(left))  # where the chunk starts, from the token
        told = [
            (len(b"".join(spelled[at:k])), reading.taken.get(k, side.events[reading.ids[k]]))
            for k in starts
            if at <= k < one.start
        ]
        told += [
            (offset + edge, event)
            for edge, (_, event) in zip(edges, one.taken, strict=True)
            if offset + edge > 0 or (at <= one.start and offset + edge == 0)
        ]
        for i, (own, p) in enumerate(zip(side.texts, prob[at], strict=True)):
            if own.startswith(lead + left) and len(own) > len(lead + left):
                if all(side.event_of(own[n:]) == event for n, event in told):
                    more = known_after(prob, side, reading, after, at, i)
                    rest, whole = own[len(lead + left) :], b"".join(spelled[at:])
                    for text_on, share in more.items():
                        event = slow_event(side, one, rest, text_on, whole[len(lead + left) :])
                        masses[event] = masses.get(event, 0.0) + p * path * share
            elif at >= one.start and own and left.startswith(own):
                goes_on = own == spelled[at] and left.startswith(spelled[at])
                if not goes_on and (at > one.start or side.event_of(own) == one.taken[0][1]):
                    unknown += p * path
    masses.pop(-1, None)
    return masses, unknown


@given(TEXTS, TEXTS, st.integers(0, 2**32 - 1), st.booleans(), st.integers(0, 2))
def test_laws_inside_equal_the_slow_version(
    ours: list[bytes], theirs: list[bytes], seed: int, other_paths: bool, spaces: int
) -> None:
    student, teacher = words(*ours, "a"), words(*theirs, "a")
    events = match(student, teacher)
    if events.identical:
        return
    g, ids, starts = drawn_text(5, len(theirs), seed)
    start = [0, *starts][int(torch.randint(0, len(starts) + 1, (1,), generator=g))] % 5
    start = start if start in (0, *starts) else 0
    drawn = torch.randint(0, len(ours), (2,), generator=g).tolist()
    n_taken = int(torch.randint(1, 3, (1,), generator=g))
    names = events.student
    taken = [(names.spelling[i], int(names.event_V[i])) for i in drawn[:n_taken]]
    follows = names.spelling[drawn[-1]], int(names.event_V[drawn[-1]])
    one = Inside(9, start, taken, follows, spaces)
    reading = Reading(PROMPT, ids, starts, taken={start: taken[0][1]}, inside=[one])
    after = torch.randn(len(theirs) + 2, len(theirs) + 2, generator=g).double().softmax(-1)
    prob = [after[PROMPT[-1]].tolist(), *(after[i].tolist() for i in ids)]
    side = SlowSide(teacher.token_bytes, teacher.roles, events.event_bytes[:-1], {})
    rows = after.tolist() if other_paths else None
    want, unknown = slow_inside(prob, side, reading, one, rows)
    beside = slow_carried(prob, side, ids, starts, rows)[start] if start else {}
    known = sum(want.values())
    for least, mostly in ((0.0, 0.0), (0.05, 0.9)):
        with (
            patch("minigold.carry.INSIDE_FROM", least), patch("minigold.carry.MOSTLY", mostly),
            patch("minigold.carry.BRANCH_FROM", 0.0),
        ):  # fmt: skip
            (result,) = score(
                LastTokenModel(after), [reading], end_ids=[len(theirs) + 1], side=events.teacher,
                other_paths=other_paths,
            )  # fmt: skip
        got = result.inside.get(9)
        share = known * (1 - sum(beside.values()))
        edge = (
            share / 0.05 if least else 1e9,
            known / (known + unknown) / 0.9 if known and mostly else 1e9,
        )
        if any(0.99 < x < 1.01 for x in edge):
            continue  # whether it counts is a matter of rounding
        if not known or min(edge) < 1:
            assert got is None
            continue
        assert got is not None and got.stay == -math.inf
        masses = dict(zip(got.event_K.tolist(), got.mass_K.tolist(), strict=True))
        for event in want.keys() | masses.keys():
            assert masses.get(event, 0.0) == pytest.approx(want.get(event, 0.0) / known, abs=1e-3)


# ------------------------------------------------------------------------- where, and what it costs
def test_what_was_looked_up_once_does_not_ask_for_every_token_again() -> None:
    """Tens of thousands of Gemma's go on with a word and a space, or a space: not each, every time."""
    student = words("a", " ", "b", "c")
    teacher = words("a", " ", *(f"{lead} {n}" for lead in ("", "a") for n in range(250)), "b")
    events, asked = match(student, teacher), []
    event_of = events.teacher.event_of
    side = dataclasses.replace(
        events.teacher, event_of=lambda text: asked.append(text) or event_of(text)
    )
    space = student.token_bytes[1], int(events.student.event_V[1])
    counts = []
    for _ in range(2):
        one = Inside(2, 1, [space], (b"b", int(events.student.event_V[2])), spaces=1)
        longer = Longer(Reading(PROMPT, [0, 1, 502], [1], inside=[one]), side)
        longer.add(torch.full((3, 504), 1 / 504))
        longer.carried([math.log(1 / 504)] * 3)
        counts.append(len(asked))
        asked.clear()
    assert counts[0] > 500 and counts[1] < 50


def test_the_boundaries_are_the_students_own() -> None:
    pair, n_found = cross_pair(), 0
    for number in range(1, 12):
        for r in rollouts_of(pair, number=number):
            reading, c = r.answer.reading(pair.events), r.chunks
            starts = set(c.s0.tolist())
            for at, start, taken, follows, spaces in reading.inside:
                k = int(np.searchsorted(c.s0, at, side="right")) - 1
                k -= at in starts  # after a broken character
                assert c.t0[k] == start and (at not in starts or c.flaw[k] == BROKEN)
                ids = r.answer.ids[c.s0[k] : at]
                assert [x for x, _ in taken] == [pair.events.student.spelling[i] for i in ids]
                assert [e for _, e in taken] == pair.events.student.event_V[ids].tolist()
                own = pair.events.student
                assert follows == (own.spelling[r.answer.ids[at]], own.event_V[r.answer.ids[at]])
                more = [n for n in range(1, 99) if taken[-1][0] + b" " * n in own.spelling]
                assert spaces == min(more, default=0)
                n_found += 1
            exact = (c.flaw == 0) & (c.s1 - c.s0 > 1)
            assert len(reading.inside) >= int((c.s1 - c.s0 - 1)[exact].sum())
            for t, event in reading.taken.items():
                (k,) = np.flatnonzero(c.t0 == t)[-1:]
                assert event == int(pair.events.student.event_V[r.answer.ids[c.s0[k]]])
    assert n_found > 50


def test_other_events_and_one_tokenizer_have_none() -> None:
    assert not any(r.answer.reading(same_pair().events).inside for r in rollouts_of(same_pair()))
    one = cross_pair()
    for kind in ("strict", "byte", "chunk"):
        pair = make_pair(one.student, one.teacher, events=kind)
        config = dataclasses.replace(CONFIG, events=kind)
        assert not any(r.answer.reading(pair.events).inside for r in rollouts_of(pair, config))


@pytest.mark.usefixtures("everything_counts")
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_gradient_inside_chunks_is_that_of_the_plain_computation(beta: float) -> None:
    pair = cross_pair()
    rollouts = looked_into(pair)
    config = dataclasses.replace(CONFIG, beta=beta)
    chosen = choose_chunks(rollouts, pair.events, config, seed=0)
    n_trained = sum(int(mask.sum()) for mask in chosen)
    got = gradient_of(pair, rollouts, chosen, config)
    want = dense_gradient(pair, rollouts, chosen, beta) / n_trained
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-3)
    bare = [dataclasses.replace(r, score=dataclasses.replace(r.score, inside={})) for r in rollouts]
    assert (gradient_of(pair, bare, chosen, config) - got).abs().max() > 1e-3


@pytest.mark.usefixtures("everything_counts")
def test_what_is_inside_counts_as_much_as_its_chunk() -> None:
    pair, config = cross_pair(), Config(where="weighted")
    rollouts = looked_into(pair)
    chosen = choose_chunks(rollouts, pair.events, config, seed=0)
    weights = chunk_weights(rollouts, chosen, config)
    assert weights is not None
    rows = packed(pair, rollouts, chosen, weights=weights)
    starts = packed(pair, rollouts, chosen, weights=weights, starts_only=True)
    first_C = rows.teacher_place_C >= 0
    assert first_C.sum() == len(starts.observed_C) < len(first_C)
    assert rows.weight_C is not None and starts.weight_C is not None
    own_C = first_C.cumsum(0) - 1
    assert rows.weight_C.tolist() == starts.weight_C[own_C].tolist()
    assert not rows.observed_C[~first_C].any()
    assert (rows.student.kind_N[~first_C[rows.student.chunk_N]] == FIRST).all()


@pytest.mark.usefixtures("everything_counts")
def test_what_ranks_and_measures_chunks_reads_their_starts() -> None:
    pair = cross_pair()
    rollouts = looked_into(pair)
    bare = [dataclasses.replace(r, score=dataclasses.replace(r.score, inside={})) for r in rollouts]
    for got, want in zip(
        *(forward_kl(pair, rows, CONFIG) for rows in (rollouts, bare)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    config = dataclasses.replace(CONFIG, where="divergence", fraction=0.5, micro_batch=100)
    chosen = choose_chunks(rollouts, pair.events, config, seed=0)
    picked = [train_pass(pair, rows, chosen, config).trained for rows in (rollouts, bare)]
    assert all(np.array_equal(a, b) for a, b in zip(*picked, strict=True))
    got = gradient_of(pair, rollouts, chosen, config)
    want = dense_gradient(pair, rollouts, picked[0], 0.5) / sum(int(m.sum()) for m in picked[0])
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-3)


@pytest.mark.usefixtures("everything_counts")
@pytest.mark.parametrize("dense", [False, True])
def test_blocks_without_a_prediction_of_the_teachers(dense: bool) -> None:
    """A block of one comparison inside a chunk reads no state of the teacher at all."""
    pair = cross_pair()
    rollouts = looked_into(pair)
    chosen = choose_chunks(rollouts, pair.events, CONFIG, seed=0)
    rows = packed(pair, rollouts, chosen)
    decoder, theirs = pair.student.decoder, torch.cat([r.score.hidden_MD for r in rollouts])
    with torch.no_grad():
        parts = [
            decoder(torch.tensor([[*r.answer.prompt_ids, *r.answer.ids]]))[0] for r in rollouts
        ]
        student_SD = torch.cat([
            one[len(r.answer.prompt_ids) - 1 : -1] for one, r in zip(parts, rollouts, strict=True)
        ])  # fmt: skip
        head = pair.teacher.decoder.head
        logits_SV, logits_TW = decoder.head.logits(student_SD), head.logits(theirs)
        want_C = chunk_losses(logits_SV, logits_TW, rows=rows, events=pair.events, beta=0.0)
        for block in (1, 3):
            given_ = (logits_SV, logits_TW) if dense else (student_SD, theirs)
            heads = (None, None) if dense else (decoder.head, head)
            got = gold_loss(
                *given_, student_head=heads[0], teacher_head=heads[1], rows=rows,
                events=pair.events, beta=0.0, weight=1.0, block=block,
            )  # fmt: skip
            torch.testing.assert_close(got.loss_C, want_C, atol=1e-4, rtol=1e-4)


def looked_into(pair: Pair) -> list[Rollout]:
    """Some answers in which the teacher says something inside chunks."""
    drawn = [r for n in range(1, 13) for r in rollouts_of(pair, number=n)]
    found = [r for r in drawn if r.score.inside]
    assert sum(len(r.score.inside) for r in found) > 10
    return found


def packed(pair: Pair, rollouts: list[Rollout], chosen: list[np.ndarray], **more: Any) -> ChunkRows:
    lengths = [[len(r.answer.ids) for r in rollouts], [len(r.score.hidden_MD) for r in rollouts]]
    ours, theirs = ([0, *np.cumsum(n)[:-1].tolist()] for n in lengths)
    return pack(
        rollouts, chosen, student_starts=ours, teacher_starts=theirs,
        teacher_end_id=pair.teacher.end_id, **more,
    )  # fmt: skip


def test_a_chunk_after_half_a_character_is_not_compared() -> None:
    """The token that broke it is judged with the character; the teacher has read U+FFFD."""
    r = broken_rollout(["hello", "<0xC3>", " fox"])
    (k,) = np.flatnonzero(r.chunks.flaw == BROKEN)
    assert r.starts_C.tolist() == [c != k + 1 for c in range(len(r.starts_C))]
    assert r.comparable_C(cross_pair().events, 1.0).tolist() == r.starts_C.tolist()
    assert r.last_C[k] == r.chunks.s0[k + 1]
    reading = r.answer.reading(cross_pair().events)
    assert [one.at for one in reading.inside if one.start == r.chunks.t0[k]] == [r.last_C[k]]
    for said in (["hello", "<0xA9>", " fox"], ["<0xC3>", "<0xA9>", " fox"]):
        assert broken_rollout(said).starts_C.all()


# ------------------------------------------------------------------------- pieces of the rest
@pytest.mark.parametrize(
    ("own", "other"), [("sentencepiece_bpe", "byte_bpe"), ("byte_bpe", "unigram")]
)
def test_what_is_left_of_a_token_has_a_first_piece_too(own: str, other: str) -> None:
    """Piece by piece, until what is left is a token itself or no text by itself."""
    ours, theirs = matched(side(own), side(other))
    known, n_rests = set(ours.token_bytes), 0
    for token, role in zip(theirs.token_bytes, theirs.roles, strict=True):
        text = token if role == "text" else b""
        while text and text not in known and text in ours.first_pieces:
            piece = ours.first_pieces[text]
            assert piece in known and text.startswith(piece)
            text = text[len(piece) :]
            decodable = text.decode("utf-8", "ignore").encode() == text
            assert not text or text in known or text in ours.first_pieces or not decodable
            n_rests += bool(text) and text not in theirs.token_bytes
    assert n_rests >= 5
