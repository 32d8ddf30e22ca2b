# SPDX-License-Identifier: Apache-2.0
"""What a model says of a completion: each token, the end, and longer tokens over chunk starts."""

import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minigold.carry import Reading
from minigold.events import Events, match
from minigold.model import Head
from minigold.offsets import Vocabulary
from minigold.pair import make_pair
from minigold.teacher import Score, _read_on, score
from reference_losses import SlowSide
from test_events import words
from tiny_models import FAMILIES, tiny_decoder, tiny_model
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

PROMPT = [0, 0]


class TableModel:
    """A model whose prediction depends on the position alone: row i predicts completion token i."""

    device = torch.device("cpu")

    def __init__(self, prob_SV: Tensor) -> None:
        self.head = Head(prob_SV.clamp(min=1e-30).log().T.contiguous(), None)
        self.n_rows = len(prob_SV)

    def __call__(self, ids_BS: Tensor, cache: Any = None) -> Tensor:
        assert cache is None
        at_S = (torch.arange(ids_BS.shape[1]) - len(PROMPT) + 1).clamp(min=0)
        one_hot_SN = torch.nn.functional.one_hot(at_S, self.n_rows)
        return one_hot_SN.to(self.head.weight_VD.dtype).expand(len(ids_BS), -1, -1)

    def decoding(self, cache: Any, n_steps: int) -> Any:
        raise AssertionError(f"scoring decodes nothing, asked for {n_steps} steps with {cache}")

    def empty_cache(self, batch: int, length: int) -> Any:
        raise AssertionError(f"scoring needs no cache, asked for {batch} x {length}")


def read(
    prob_SV: Tensor, events: Events, ids: Sequence[int], starts: Sequence[int], block: int = 64
) -> Score:
    end = prob_SV.shape[1] - 1
    reading = Reading(PROMPT, ids, starts)
    model = TableModel(prob_SV)
    return score(model, [reading], end_ids=[end], side=events.teacher, block=block)[0]


def carried_at(result: Score, events: Events, start: int) -> dict[bytes, float]:
    carried = result.carried[start]
    names = [*events.event_bytes, b"OTHER"]
    return {
        names[event]: mass
        for event, mass in zip(carried.event_K.tolist(), carried.mass_K.tolist(), strict=True)
    }


def test_a_longer_token_speaks_for_the_text_after_each_boundary_that_it_covers() -> None:
    """The teacher is sure of `sixty-four`; the text is spelled six, ty, -: each time it has a say."""
    student = words("six", "ty", "-", "four", "five")
    teacher = words("six", "ty", "-", "four", "five", "sixty-four", pieces={})
    events = match(student, teacher)
    row = torch.tensor([0.01, 0.0, 0.0, 0.0, 0.0, 0.99, 0.0])
    weird = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.0, 0.0])  # what follows a text it never wrote
    result = read(torch.stack([row, weird, weird, weird]), events, [0, 1, 2], [1, 2, 3])
    for start, rest in ((1, b"ty"), (2, b"-"), (3, b"four")):
        path = 0.01 * (0.1 if start > 1 else 1) * (0.2 if start > 2 else 1)
        assert carried_at(result, events, start) == {rest: pytest.approx(0.99 / (0.99 + path))}


def test_tokens_that_were_another_event_where_they_begin_have_no_say() -> None:
    student = words("six", "sixty", "ty")
    teacher = words("six", "sixty", "ty")
    teacher = Vocabulary((*teacher.token_bytes, b"x"), (*teacher.roles, "text"))
    events = match(student, teacher)
    row = torch.tensor([0.1, 0.8, 0.1, 0.0, 0.0])
    assert read(torch.stack([row, row]), events, [0], [1]).carried == {}


def test_a_token_that_was_told_apart_on_the_way_has_no_further_say() -> None:
    """After six, sixty-four says `ty-`; the text took `ty`, another event."""
    student, teacher = words("six", "ty", "ty-", "x"), words("six", "ty", "ty-", "sixty-four", "x")
    events = match(student, teacher)
    row = torch.tensor([0.1, 0.0, 0.0, 0.9, 0.0, 0.0])
    after = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    last = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    result = read(torch.stack([row, after, last]), events, [0, 1], [1, 2])
    assert carried_at(result, events, 1) == {b"ty-": pytest.approx(0.9)}
    assert 2 not in result.carried


def test_nothing_is_carried_over_or_out_of_an_unscorable_chunk() -> None:
    events = match(words("six", "ty", "-"), words("six", "ty", "-", "sixty-"))
    row = torch.tensor([0.1, 0.0, 0.0, 0.9, 0.0])
    after = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    model = TableModel(torch.stack([row, after, after]))
    for opaque, starts in (((), {1, 2}), ((1,), {1}), ((0,), set())):
        reading = Reading(PROMPT, [0, 1], [1, 2], opaque)
        result = score(model, [reading], end_ids=[4], side=events.teacher)[0]
        assert set(result.carried) == starts


def test_shares_keep_their_digits_for_an_improbable_token() -> None:
    events = match(words("six", "ty"), words("six", "ty", "sixty"))
    row = torch.tensor([1e-20, 0.0, 1.0, 0.0]).double()
    carried = read(torch.stack([row, row]), events, [0], [1]).carried[1]
    assert carried.stay == pytest.approx(math.log(1e-20))


def test_inside_a_chunk_all_longer_tokens_count() -> None:
    """The chunk starts at 0 and 2; token 1 begins where the student has no boundary."""
    student = words("hello", "lo", "low", "w", "hel")
    teacher = words("hel", "lo", "low", "w")
    events = match(student, teacher)
    first = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    second = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])
    result = read(torch.stack([first, second, second]), events, [0, 1], [2])
    assert carried_at(result, events, 2) == {b"w": pytest.approx(0.5)}


class LastTokenModel(TableModel):
    """A model whose prediction depends on the last token alone: row v follows token v."""

    def __call__(self, ids_BS: Tensor, cache: Any = None) -> Tensor:
        assert cache is None or isinstance(cache, NoCache)
        self.n_read = getattr(self, "n_read", 0) + ids_BS.numel()
        one_hot_BSN = torch.nn.functional.one_hot(ids_BS, self.n_rows)
        return one_hot_BSN.to(self.head.weight_VD.dtype)

    def empty_cache(self, batch: int, length: int) -> Any:
        assert batch * length > 0
        return NoCache()


class NoCache:
    """What was read before changes nothing."""

    def fill(self, *_rows: Any) -> None:
        pass

    def cut(self, _length_B: Tensor) -> None:
        pass


SPACES = b"\n    "


def spaces(wanted: float) -> tuple[Events, LastTokenModel]:
    """The teacher would write three spaces and ` if`, the student four spaces and `if`."""
    pieces = {SPACES: b"\n", SPACES[:-1]: b"\n", b" if": b" "}
    student = words("\n", "    ", "if", "twenty", " ", pieces=pieces)
    teacher = words("\n", SPACES[:-1], SPACES, " if", "if", "twenty")
    rows = torch.full((7, 7), 1e-12)
    rows[0, 1], rows[0, 2], rows[0, 5] = wanted, 0.01, 0.99 - wanted
    rows[1, 3], rows[1, 5] = 0.8, 0.2
    rows[2, 5] = 1.0
    return match(student, teacher), LastTokenModel(rows)


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_the_right_bytes_in_other_tokens_are_not_a_mistake(micro_batch: int) -> None:
    """After the four spaces the student wrote a word, so that they are a token for the teacher too.

    It would have made another cut there, and gives that token little. What it meant is on the
    other path: the four spaces, and then `if`.
    """
    events, model = spaces(0.9)
    readings = [Reading(PROMPT, [2, 5], [1]), Reading(PROMPT, [2, 5], [1], opaque={0})]
    results = [
        score(model, readings, end_ids=[6], side=events.teacher, other_paths=other_paths,
              micro_batch=micro_batch)
        for other_paths in (False, True)
    ]  # fmt: skip
    assert [one.carried for one in (*results[0], results[1][1])] == [{}, {}, {}]
    found = results[1][0]
    assert carried_at(found, events, 1) == {b"if": pytest.approx(72 / 73)}
    assert found.logp_T.exp().tolist() == pytest.approx([0.01, 1.0])
    # with its longer tokens over the end the chunk is as likely as these bytes are
    assert math.exp(float(found.logp_T[0]) - found.carried[1].stay) == pytest.approx(0.01 + 0.72)


@pytest.mark.parametrize(("wanted", "others"), [(0.9, 1), (0.06, 1), (0.04, 0)])
def test_other_paths_are_read_only_where_it_matters(wanted: float, others: int) -> None:
    """The prompt again, and a token."""
    events, model = spaces(wanted)
    score(model, [Reading(PROMPT, [2, 5], [1])], end_ids=[6], side=events.teacher, other_paths=True)
    assert model.n_read == len(PROMPT) + 2 + others * (len(PROMPT) + 1)


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reading_on_is_reading_each_row(family: str, micro_batch: int) -> None:
    """Past the window too; one row is read, and a token for each."""
    model, rng = tiny_decoder(family), np.random.default_rng(0)
    row = rng.integers(0, 41, 30).tolist()
    rows = [
        [*row[:n], i] for n, i in ((1, 4), (29, 5), (12, 40), (29, 6), (3, 0), (20, 7), (12, 1))
    ]
    want = [model(torch.tensor([one]))[0, -1] for one in rows]
    n_read = list[int]()
    hook = model.register_forward_hook(lambda _m, args, _out: n_read.append(args[0].numel()))
    got_BD = _read_on(model, rows, micro_batch=micro_batch)
    hook.remove()
    torch.testing.assert_close(got_BD, torch.stack(want), atol=2e-6, rtol=2e-6)
    assert sum(n_read) == 29 + len(rows)


def test_a_teacher_in_process_is_asked_for_other_paths() -> None:
    model = tiny_model("llama", byte_bpe(), end="<|im_end|>")
    side = make_pair(tiny_model("llama", sentencepiece_bpe(), end="</s>"), model).events.teacher
    rows: list[int] = []
    hook = model.decoder.register_forward_hook(lambda _m, args, _out: rows.append(len(args[0])))
    ids = model.tokenizer.encode("the quick brown fox", add_special_tokens=False).ids
    with patch("minigold.carry.BRANCH_FROM", 0.0):
        model.read([Reading([1], ids, [len(ids)])], side=side, micro_batch=4, temperature=1.0)
    hook.remove()
    assert rows[0] == 1 and sum(rows) > 1


TEXTS = st.sampled_from(["ab", "ab "]).flatmap(
    lambda alphabet: st.lists(
        st.text(alphabet=alphabet, min_size=1, max_size=4).map(str.encode),
        min_size=2,
        max_size=9,
        unique=True,
    )
)


def slow_carried(
    prob: list[list[float]], side: SlowSide, ids: Sequence[int], starts: Sequence[int],
    after: list[list[float]] | None = None,
) -> dict[int, dict[int, float]]:  # fmt: skip
    """Every token from every earlier position, weighed by the path that it leaves out.

    It has to have gone along with the event that was taken at every shared boundary on the way.

    Args:
        after: what follows each token: then other tokens that a chunk begins with are followed, too,
            and those over its start that end in a space.
    """
    found = {}
    for start in starts:
        masses: dict[int, float] = {}
        for at in range(start):
            between = b"".join(side.texts[i] for i in ids[at:start])
            path = math.prod(prob[n][ids[n]] for n in range(at, start))
            for text, p in zip(side.texts, prob[at], strict=True):
                if not (text.startswith(between) and len(text) > len(between)):
                    continue
                on_the_way = [
                    (len(b"".join(side.texts[i] for i in ids[at:k])), ids[k])
                    for k in range(at, start)
                    if k in (0, *starts)
                ]
                if all(side.event_of(text[n:]) == side.events[i] for n, i in on_the_way):
                    rest, following = text[len(between) :], {b"": 1.0}
                    if after and text.endswith(b" "):
                        following = following_of(after[side.texts.index(text)], side)
                    for more, share in following.items():
                        behind = b"".join(side.texts[i] for i in ids[start:])
                        goes_on = rest + more
                        goes_on = behind if more and behind.startswith(goes_on) else goes_on
                        event = side.event_on(rest, goes_on[len(rest) :])
                        masses[event] = masses.get(event, 0.0) + p / path * share
        for event, mass in slow_other_paths(prob, side, ids, starts, start, after):
            masses[event] = masses.get(event, 0.0) + mass
        known = 1 + sum(masses.values())
        found[start] = {event: mass / known for event, mass in masses.items()}
    return found


def following_of(row: list[float], side: SlowSide) -> dict[bytes, float]:
    """What is said next, without the rarest tokens; ids without a text, too, say nothing more."""
    least, found = 1e-4, {}  # more than one has more, and there are few
    for text, p in zip(side.texts, row, strict=True):
        if p > least:
            found[text] = found.get(text, 0.0) + p / sum(x for x in row if x > least)
    return found


def slow_other_paths(
    prob: list[list[float]], side: SlowSide, ids: Sequence[int], starts: Sequence[int], start: int,
    after: list[list[float]] | None,
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """Of the chunk that ends at `start`: any token that it goes on with, and any over its end."""
    begin = max(k for k in (0, *starts) if k < start)
    for at in range(begin, start) if after else ():
        rest = b"".join(side.texts[i] for i in ids[at:start])
        path = math.prod(prob[n][ids[n]] for n in range(at, start))
        for w, text in enumerate(side.texts):
            told_apart = at == begin and side.events[w] != side.events[ids[at]]
            if not text or not rest.startswith(text) or text == side.texts[ids[at]] or told_apart:
                continue
            left = rest[len(text) :]
            for longer, p in zip(side.texts, after[w], strict=True):
                if left and longer.startswith(left) and longer != left:
                    yield side.event_of(longer[len(left) :]), prob[at][w] * p / path


def drawn_text(n: int, n_tokens: int, seed: int) -> tuple[torch.Generator, list[int], list[int]]:
    """Tokens of a completion, and before which of them, or behind the last, chunks start."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, n_tokens, (n,), generator=g).tolist()
    return g, ids, [k for k in range(1, n + 1) if torch.rand(1, generator=g) < 0.5]


@given(TEXTS, TEXTS, st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_carried_masses_equal_the_slow_version(
    ours: list[bytes], theirs: list[bytes], seed: int, block: int
) -> None:
    student, teacher = words(*ours, "a"), words(*theirs, "a")
    events = match(student, teacher)
    if events.identical:
        return
    n = 6
    g, ids, starts = drawn_text(n, len(theirs), seed)
    prob_SV = torch.randn(n + 1, len(theirs) + 2, generator=g).double().softmax(-1)
    result = read(prob_SV, events, ids, starts, block)
    side = SlowSide(teacher.token_bytes, teacher.roles, events.event_bytes[:-1], {})
    for start, want in slow_carried(prob_SV.tolist(), side, ids, starts).items():
        carried = result.carried.get(start)
        got = {} if carried is None else dict(
            zip(carried.event_K.tolist(), carried.mass_K.tolist(), strict=True)
        )  # fmt: skip
        for event in want.keys() | got.keys():
            assert got.get(event, 0.0) == pytest.approx(want.get(event, 0.0), abs=5e-3)


@given(TEXTS, TEXTS, st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_other_paths_equal_the_slow_version(
    ours: list[bytes], theirs: list[bytes], seed: int, block: int
) -> None:
    student, teacher = words(*ours, "a"), words(*theirs, "a")
    events = match(student, teacher)
    if events.identical:
        return
    g, ids, starts = drawn_text(5, len(theirs), seed)
    after = torch.randn(len(theirs) + 2, len(theirs) + 2, generator=g).double().softmax(-1)
    prob = [after[PROMPT[-1]], *(after[i] for i in ids)]
    with patch("minigold.carry.BRANCH_FROM", 0.0):
        (result,) = score(
            LastTokenModel(after), [Reading(PROMPT, ids, starts)], end_ids=[len(theirs) + 1],
            side=events.teacher, other_paths=True, block=block,
        )  # fmt: skip
    side = SlowSide(teacher.token_bytes, teacher.roles, events.event_bytes[:-1], {})
    rows = [row.tolist() for row in prob]
    for start, want in slow_carried(rows, side, ids, starts, after.tolist()).items():
        carried = result.carried.get(start)
        got = {} if carried is None else dict(
            zip(carried.event_K.tolist(), carried.mass_K.tolist(), strict=True)
        )  # fmt: skip
        for event in want.keys() | got.keys():
            assert got.get(event, 0.0) == pytest.approx(want.get(event, 0.0), abs=5e-3)


def test_the_end_sums_over_all_stops_and_padding_changes_nothing() -> None:
    events = match(words("a", "b"), words("a", "b", "c"))
    prob_SV = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    model = TableModel(prob_SV)
    readings = [Reading(PROMPT, [0]), Reading(PROMPT, []), Reading(PROMPT, [2])]
    both = score(model, readings, end_ids=[1, 3], side=events.teacher, micro_batch=2)
    assert both[0].end_logp == pytest.approx(math.log(0.6))
    assert both[1].end_logp == pytest.approx(math.log(0.4))
    assert [one.logp_T.exp().tolist() for one in both] == [
        [pytest.approx(0.4)],
        [],
        [pytest.approx(0.2)],
    ]
    assert [len(one.hidden_MD) for one in both] == [2, 1, 2]


@pytest.mark.parametrize("block", [1, 2, 64])
def test_the_most_likely_token_of_each_place_and_after_the_last(block: int) -> None:
    events = match(words("a", "b"), words("a", "b", "c"))
    prob_SV = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.6, 0.1], [0.1, 0.2, 0.2, 0.5]])
    for ids in ([], [1], [1, 1]):
        result = read(prob_SV, events, ids, [], block)
        assert result.best_id_M.tolist() == [0, 2, 3][: len(ids) + 1]
        assert result.best_prob_M.tolist() == pytest.approx([0.4, 0.6, 0.5][: len(ids) + 1])
