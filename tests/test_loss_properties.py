# SPDX-License-Identifier: Apache-2.0
"""What must hold of the losses and masks for any distributions, any beta and any block size."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck

from minigold.disagree import acceptance, budget, choose, largest, replayed, soft_or
from minigold.events import EVENTS, Events, Side, match
from minigold.loss import (
    FLOOR,
    Carry,
    ChunkRows,
    Rows,
    _laws,
    chunk_losses,
    divergence,
    gold_loss,
    look,
)
from minigold.model import Head
from minigold.offsets import Vocabulary
from reference_losses import divergence_of, kl
from test_events import two_vocabularies, words
from test_loss import SELF, STUDENT, TEACHER, one_token_rows, random_rows

FAST = {"fast_mode": True, "check_undefined_grad": False}
V, W, C = len(STUDENT.roles), len(TEACHER.roles), 4
OF_KIND = {kind: match(STUDENT, TEACHER, kind=kind) for kind in EVENTS}
KINDS = st.sampled_from(EVENTS)
SEEDS = st.integers(0, 2**32 - 1)
SMALL = (0.0, 1e-40, 1e-30, 1.1e-30, 1e-20, 1e-17, 1e-16, 1e-9, 1e-3, 0.3)
BETAS = st.one_of(
    st.sampled_from(SMALL), st.sampled_from([1 - beta for beta in SMALL]), st.floats(0, 1)
)


@st.composite
def law_pairs(draw: st.DrawFn, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two rows that sum to 1, float64: any, one-hot, with tiny entries, equal, nearly equal."""
    n = draw(st.integers(2, 6))
    tiny = [x for x in (0.0, 1e-30, 1e-18, 1e-17, 1e-12, 1e-8, 1e-4) if x >= least]
    entry = st.one_of(st.sampled_from(tiny), st.floats(max(least, 1e-3), 1.0))

    def law() -> Tensor:
        one = torch.tensor([draw(st.lists(entry, min_size=n, max_size=n))], dtype=torch.float64)
        one[0, draw(st.integers(0, n - 1))] += 1
        return one / one.sum()

    student_1X = law()
    kind = draw(st.sampled_from(["any", "any", "equal", "near"]))
    if kind == "any":
        return student_1X, law()
    if kind == "equal":
        return student_1X, student_1X.clone()
    near_1X = student_1X * (1 + draw(st.sampled_from([1e-9, 1e-4, 0.1])) * law())
    return student_1X, near_1X / near_1X.sum()


def random_logits(
    *shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)


def mixed_rows(events: Events, seed: int, n_chunks: int = C) -> ChunkRows:
    """Rows of all kinds, in any order; some share their place, as those of two chunks do."""
    rows = random_rows(n_chunks, V, W, events.n_events, seed)
    places = len(rows.student.place_N)
    g = torch.Generator().manual_seed(seed)
    shared_N = torch.randint(0, places, (places,), generator=g)
    teacher_C = torch.randint(0, 2 * n_chunks, (n_chunks,), generator=g)
    student = replace(rows.student, place_N=shared_N)
    return replace(rows, student=student, teacher_place_C=teacher_C)


def some_logits(
    rows: ChunkRows, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    n = len(rows.student.place_N)
    return random_logits(n, V, seed=seed, dtype=dtype), random_logits(2 * C, W, seed=~seed & 255)


# Bounds


@given(law_pairs(), BETAS)
def test_divergence_is_finite_and_not_negative_for_any_beta(
    pair: tuple[Tensor, Tensor], beta: float
) -> None:
    value = divergence(pair[0].float(), pair[1].float(), beta=beta).item()
    assert -1e-6 <= value < math.inf


@given(law_pairs(least=1e-4), BETAS, st.floats(1e-4, 1e3), st.floats(1e-4, 1e3))
def test_divergence_does_not_depend_on_the_sums_of_the_rows(
    pair: tuple[Tensor, Tensor], beta: float, by_s: float, by_t: float
) -> None:
    scaled = divergence(by_s * pair[0], by_t * pair[1], beta=beta)
    torch.testing.assert_close(scaled, divergence(*pair, beta=beta), atol=1e-9, rtol=1e-6)


@given(law_pairs(least=1e-4))
def test_a_row_of_almost_no_mass_is_not_scaled_up(pair: tuple[Tensor, Tensor]) -> None:
    """Sums under 1e-8 count as that; of s << t the reverse KL, s ln(s/t) - s + t, is 1."""
    student_1X = (1e-13 * pair[0]).requires_grad_()
    value = divergence(student_1X, pair[1], beta=1.0)
    assert value.item() == pytest.approx(1, abs=1e-3)
    assert grad(value.sum(), student_1X)[0].abs().max() < 1e10


@given(KINDS, SEEDS, BETAS, st.sampled_from([0.1, 1.0, 30.0, 1e4, 1e30]))
def test_losses_and_gradients_are_finite_and_laws_sum_to_1(
    kind: str, seed: int, beta: float, scale: float
) -> None:
    """In float32; one-hot rows, -inf entries and logits up to 1e30 among them."""
    rows, events = mixed_rows(OF_KIND[kind], seed), OF_KIND[kind]
    rows = replace(
        rows, student=replace(rows.student, place_N=torch.arange(len(rows.student.place_N)))
    )
    student_SV, teacher_TW = (x.float() * scale for x in some_logits(rows, seed))
    student_SV[0, 1:] = -torch.inf
    student_SV[1, ::2] = -torch.inf
    teacher_TW[seed % C :: C, :-1] = -torch.inf
    student_SV.requires_grad_()
    loss_C = chunk_losses(student_SV, teacher_TW, rows=rows, events=events, beta=beta)
    (grad_SV,) = grad(loss_C.sum(), student_SV)
    assert loss_C.isfinite().all() and loss_C.min() >= -1e-6
    assert grad_SV.isfinite().all()
    (one,) = rows.blocks(C)
    for law_CX in _laws(student_SV[one.student.place_N], teacher_TW, None, one, events):
        assert law_CX.min() >= 0
        torch.testing.assert_close(law_CX.sum(1), torch.ones(C), atol=1e-6, rtol=0)


@given(SEEDS, BETAS)
def test_a_carry_that_rounding_brought_over_1_is_all_there_is(seed: int, beta: float) -> None:
    """Then nothing is left for the prediction, and no probability is below 0."""
    rows, events = mixed_rows(OF_KIND["prefix"], seed), OF_KIND["prefix"]
    every_C = torch.arange(C)
    over = Carry(every_C, torch.zeros(C, dtype=torch.int64), torch.full((C,), 1 + 1e-6))
    rows = replace(rows, teacher_carry=over)
    student_SV, teacher_TW = (x.float() for x in some_logits(rows, seed))
    (one,) = rows.blocks(C)
    _, law_CX = _laws(student_SV[one.student.place_N], teacher_TW, None, one, events)
    assert law_CX.min() >= 0
    loss_C = chunk_losses(student_SV, teacher_TW, rows=rows, events=events, beta=beta)
    assert loss_C.isfinite().all()


# Continuity in beta


@given(law_pairs(least=1e-4))
def test_near_its_ends_it_is_the_two_kls(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = (x[0].tolist() for x in pair)
    for inner, end in ((1e-9, 0), (1 - 1e-9, 1)):
        near = divergence(*pair, beta=inner).item()
        assert near == pytest.approx(divergence(*pair, beta=end).item(), rel=1e-5, abs=1e-13)
        assert near == pytest.approx(divergence_of(student, teacher, end), rel=1e-5, abs=1e-13)


GRID = [1e-35 * 1.3**k for k in range(305)]  # to 0.44


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beta_never_jumps(dtype: torch.dtype) -> None:
    """From 0 to 0.44, and from 0.56 to the last float before 1; entries from 1 to 1e-40 and 0.

    With KL(T||M) = p and KL(S||M) = q, the derivative by ln beta is
    beta / (1 - beta)^2 p - q / beta. As p <= -ln beta and q <= -ln(1 - beta), each term is
    within 2 ln 2 up to a half, so values differ by 2 ln 2 times the step of ln beta at most.
    Towards 1 the same holds of ln(1 - beta), with the sides swapped.
    """
    g = torch.Generator().manual_seed(0)
    laws_2NX = 10 ** (-40 * torch.rand(2, 1000, 4, generator=g, dtype=torch.float64) ** 2)
    laws_2NX *= torch.rand(2, 1000, 4, generator=g) > 0.2
    laws_2NX[1, :100] = laws_2NX[0, :100] * (1 + 1e-4 * torch.rand(100, 4, generator=g))
    laws_2NX[0, :, 0] += 1e-3
    laws_2NX[1, :, -1] += 1e-3
    student_NX, teacher_NX = (laws_2NX / laws_2NX.sum(-1, keepdim=True)).to(dtype)
    noise = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    downwards = [x for x in GRID if x > 6e-17]
    for betas, distances in (
        ([0.0, *GRID], [GRID[0], *GRID]),
        ([1 - x for x in downwards], [1 - (1 - x) for x in downwards]),
    ):
        values = torch.stack([divergence(student_NX, teacher_NX, beta=beta) for beta in betas])
        steps = torch.tensor(distances, dtype=torch.float64).log().diff().abs()
        excess = values.diff(dim=0).abs() - 2 * math.log(2) * steps[:, None] - noise
        worst = int(excess.amax(1).argmax())
        assert excess[worst].max() <= 0, betas[worst : worst + 2]


# Zero if and only if both agree


@given(law_pairs(), BETAS)
def test_equal_rows_give_exactly_zero(pair: tuple[Tensor, Tensor], beta: float) -> None:
    for dtype in (torch.float32, torch.float64):
        one = pair[0].to(dtype)
        assert divergence(one, one.clone(), beta=beta).item() == 0


@given(law_pairs(), BETAS)
def test_divergence_is_at_least_twice_the_squared_total_variation(
    pair: tuple[Tensor, Tensor], beta: float
) -> None:
    """Pinsker, in nats: KL(T||M) >= 2 (1 - beta)^2 d^2 and KL(S||M) >= 2 beta^2 d^2.

    beta and (1 - beta) of these add up to 2 beta (1 - beta) d^2, which is then divided by
    beta (1 - beta).
    """
    distance = (pair[0] - pair[1]).abs().sum().item() / 2
    assert divergence(*pair, beta=beta).item() >= 2 * distance**2 * (1 - 1e-9) - 1e-12


def with_law(law_X: Tensor, side: Side, seed: int) -> Tensor:
    """Token logits [1, V] whose events have this law, each one's mass shared out at random."""
    share_V = random_logits(len(side.event_V), seed=seed).exp()
    sum_X = torch.zeros_like(law_X).index_add(0, side.event_V, share_V)
    return (share_V / sum_X[side.event_V] * law_X[side.event_V]).log()[None]


@given(two_vocabularies(), KINDS, SEEDS, BETAS)
def test_models_that_agree_on_events_give_nothing(
    pair: tuple[Vocabulary, Vocabulary], kind: str, seed: int, beta: float
) -> None:
    """Whatever the tokens; with `strict` whatever the mass that is in no event, too."""
    events = match(*pair, kind=kind)
    law_X = random_logits(events.n_events + 1, seed=seed).exp()
    for side in (events.student, events.teacher):
        law_X[~torch.isin(torch.arange(len(law_X)), side.event_V)] = 0
    laws = [law_X.clone(), law_X.clone()]
    laws[0][-1] *= not events.other_costs
    laws[1][-1] *= 2
    student_1V, teacher_1W = (
        with_law(law / law.sum(), side, seed + k)
        for k, (law, side) in enumerate(zip(laws, (events.student, events.teacher), strict=True))
    )
    rows = one_token_rows(1, [0])
    loss_C = chunk_losses(student_1V, teacher_1W, rows=rows, events=events, beta=beta)
    assert loss_C.abs().item() < 1e-7


@given(two_vocabularies(), KINDS, SEEDS, BETAS)
def test_models_that_disagree_on_events_pay(
    pair: tuple[Vocabulary, Vocabulary], kind: str, seed: int, beta: float
) -> None:
    events = match(*pair, kind=kind)
    logits = [random_logits(1, len(v.roles), seed=seed + k) for k, v in enumerate(pair)]
    inside = [
        side.project(x.softmax(-1))[:, :-1]
        for x, side in zip(logits, (events.student, events.teacher), strict=True)
    ]
    student_1K, teacher_1K = (x / x.sum() for x in inside)
    distance = (student_1K - teacher_1K).abs().sum().item() / 2
    loss_C = chunk_losses(*logits, rows=one_token_rows(1, [0]), events=events, beta=beta)
    assert loss_C.item() >= 2 * distance**2 * (1 - 1e-9) - 1e-12


# Merging


@given(law_pairs(least=1e10 * FLOOR), BETAS, st.lists(st.integers(0, 5), min_size=6, max_size=6))
def test_merging_any_events_never_raises_it(
    pair: tuple[Tensor, Tensor], beta: float, group: list[int]
) -> None:
    """Of probabilities far above the floor, which is added once to a merged event, not twice."""
    into_X = torch.tensor(group[: pair[0].shape[1]])
    merged = [torch.zeros(1, 6, dtype=torch.float64).index_add(1, into_X, one) for one in pair]
    before = divergence(*pair, beta=beta).item()
    assert divergence(*merged, beta=beta).item() <= before * (1 + 1e-9) + 1e-9


# Order of the vocabularies


def shuffled(vocabulary: Vocabulary, order: Sequence[int]) -> Vocabulary:
    texts, roles = ([x[i] for i in order] for x in (vocabulary.token_bytes, vocabulary.roles))
    return Vocabulary(tuple(texts), tuple(roles), vocabulary.first_pieces)


@given(two_vocabularies(), KINDS, SEEDS, BETAS)
def test_the_order_of_the_vocabularies_does_not_matter(
    pair: tuple[Vocabulary, Vocabulary], kind: str, seed: int, beta: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    sizes = [len(v.roles) for v in pair]
    order_V, order_W = (torch.randperm(n, generator=g) for n in sizes)
    events = match(*pair, kind=kind)
    other = match(shuffled(pair[0], order_V), shuffled(pair[1], order_W), kind=kind)
    assume(not events.identical and not other.identical)  # there nothing is carried over
    rows = random_rows(C, *sizes, events.n_events, seed)
    own = rows.student
    moved = replace(
        rows,
        student=replace(own, ids_N=order_V.argsort()[own.ids_N]),
        teacher_id_C=order_W.argsort()[rows.teacher_id_C],
    )
    student_SV = random_logits(len(own.ids_N), sizes[0], seed=seed).requires_grad_()
    teacher_TW = random_logits(C, sizes[1], seed=~seed & 255)
    loss_C = chunk_losses(student_SV, teacher_TW, rows=rows, events=events, beta=beta)
    (grad_SV,) = grad(loss_C.sum(), student_SV)
    other_SV = student_SV.detach()[:, order_V].requires_grad_()
    other_C = chunk_losses(other_SV, teacher_TW[:, order_W], rows=moved, events=other, beta=beta)
    (other_grad_SV,) = grad(other_C.sum(), other_SV)
    torch.testing.assert_close(other_C, loss_C, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(other_grad_SV, grad_SV[:, order_V], atol=1e-9, rtol=1e-9)


@given(SEEDS, BETAS)
def test_with_one_tokenizer_the_order_of_the_vocabulary_does_not_matter(
    seed: int, beta: float
) -> None:
    order_V = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    logits = [random_logits(3, 5, seed=s) for s in (seed, ~seed & 255)]
    losses = [
        chunk_losses(*both, rows=one_token_rows(3, [0, 2, 3]), events=SELF, beta=beta)
        for both in (logits, [x[:, order_V] for x in logits])
    ]
    torch.testing.assert_close(*losses, atol=1e-9, rtol=1e-9)


@given(KINDS, SEEDS, st.integers(1, 3), st.integers(0, 5))
def test_where_the_predictions_stand_does_not_matter(
    kind: str, seed: int, gap: int, start: int
) -> None:
    events = OF_KIND[kind]
    rows = random_rows(C, V, W, events.n_events, seed)
    g = torch.Generator().manual_seed(seed)
    places = [gap * torch.randperm(n, generator=g) + start for n in (len(rows.student.ids_N), C)]
    moved = replace(
        rows, student=replace(rows.student, place_N=places[0]), teacher_place_C=places[1]
    )
    sizes = [int(place.max()) + 1 for place in places]
    logits = [random_logits(s, n, seed=seed + n) for s, n in zip(sizes, (V, W), strict=True)]
    there = [x[place] for x, place in zip(logits, places, strict=True)]
    losses = [
        chunk_losses(*both, rows=one, events=events, beta=0.5)
        for one, both in ((rows, there), (moved, logits))
    ]
    torch.testing.assert_close(*losses, atol=1e-12, rtol=1e-12)


# Masks


def part(rows: ChunkRows, keep_C: Tensor) -> ChunkRows:
    """The rows of some chunks."""
    own, carry, new_C = rows.student, rows.teacher_carry, keep_C.cumsum(0) - 1
    n, k = keep_C[own.chunk_N], keep_C[carry.chunk_K]
    return ChunkRows(
        Rows(own.place_N[n], new_C[own.chunk_N[n]], own.ids_N[n], own.kind_N[n]),
        rows.teacher_place_C[keep_C],
        rows.teacher_id_C[keep_C],
        rows.teacher_logp_C[keep_C],
        Carry(new_C[carry.chunk_K[k]], carry.event_K[k], carry.mass_K[k]),
        rows.observed_C[keep_C],
    )


@given(KINDS, SEEDS, BETAS, st.integers(1, 2**C - 1), st.integers(1, C))
def test_masked_chunks_count_as_little_as_deleted_ones(
    kind: str, seed: int, beta: float, mask: int, block: int
) -> None:
    events, keep_C = OF_KIND[kind], torch.tensor([bool(mask >> c & 1) for c in range(C)])
    rows = mixed_rows(events, seed)
    fewer = part(rows, keep_C)
    student_SV, teacher_TW = some_logits(rows, seed)
    student_SV.requires_grad_()
    given_all = {"events": events, "beta": beta}
    full_C = chunk_losses(student_SV, teacher_TW, rows=rows, **given_all)
    (want_SV,) = grad((full_C * keep_C).sum(), student_SV)
    dense_C = chunk_losses(student_SV, teacher_TW, rows=fewer, **given_all)
    blocks = gold_loss(
        student_SV, teacher_TW, student_head=None, teacher_head=None,
        rows=fewer, weight=1.0, block=block, **given_all,
    )  # fmt: skip
    for loss_C, total in ((dense_C, dense_C.sum()), (blocks.loss_C, blocks.total)):
        torch.testing.assert_close(loss_C, full_C[keep_C], atol=1e-12, rtol=1e-9)
        (got_SV,) = grad(total, student_SV)
        torch.testing.assert_close(got_SV, want_SV, atol=1e-12, rtol=1e-9)
        unread_S = ~torch.isin(torch.arange(len(got_SV)), fewer.student.place_N)
        assert (got_SV[unread_S] == 0).all()


# Derivatives


@given(law_pairs(least=1e-4), BETAS)
def test_derivatives_of_divergence(pair: tuple[Tensor, Tensor], beta: float) -> None:
    leaves = [(1.5 * x).requires_grad_() for x in pair]
    assert gradcheck(lambda s, t: divergence(s, t, beta=beta), leaves, eps=1e-8, rtol=1e-3, **FAST)


@given(law_pairs(), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_derivatives_of_divergence_are_those_of_the_plain_sum_at_any_extreme(
    pair: tuple[Tensor, Tensor], beta: float
) -> None:
    leaves = [x.clone().requires_grad_() for x in pair]
    s, t = ((x + FLOOR) / (x + FLOOR).sum() for x in leaves)
    m = beta * t + (1 - beta) * s
    if beta in (0, 1):
        plain = kl(s, t) if beta else kl(t, s)
    else:
        plain = (beta * kl(t, m) + (1 - beta) * kl(s, m)) / (beta * (1 - beta))
    ours = divergence(*leaves, beta=beta)
    torch.testing.assert_close(ours, plain, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(grad(ours, leaves), grad(plain, leaves), atol=1e-6, rtol=1e-6)


@given(KINDS, SEEDS, BETAS)
def test_derivatives_of_chunk_losses(kind: str, seed: int, beta: float) -> None:
    rows = mixed_rows(OF_KIND[kind], seed)
    student_SV, teacher_TW = some_logits(rows, seed)

    def losses(student_SV: Tensor) -> Tensor:
        return chunk_losses(student_SV, teacher_TW, rows=rows, events=OF_KIND[kind], beta=beta)

    assert gradcheck(losses, student_SV.requires_grad_(), **FAST)


class Setting(NamedTuple):
    """What `gold_loss` takes: states and head of the student, and all else by name."""

    hidden_SD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    others: dict[str, Any]
    teacher_TK: Tensor
    softcap: float | None
    temperature: float

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self[:3] if x is not None]

    def head(self, weight_VD: Tensor, bias_V: Tensor | None = None) -> Head:
        return Head(weight_VD, self.softcap, bias_V, self.temperature)

    def blocks(self, *leaves: Tensor, block: int = 2) -> Any:
        return gold_loss(
            leaves[0], self.teacher_TK, student_head=self.head(*leaves[1:]),
            block=block, weight=0.25, **self.others,
        )  # fmt: skip

    def dense(self, *leaves: Tensor) -> Tensor:
        others = {k: self.others[k] for k in ("rows", "events", "beta")}
        teacher_TW = self.others["teacher_head"].logits(self.teacher_TK)
        return chunk_losses(self.head(*leaves[1:]).logits(leaves[0]), teacher_TW, **others)


def setting(
    seed: int,
    kind: str = "prefix",
    *,
    bias: bool = True,
    softcap: float | None = 2.0,
    temperature: float = 0.7,
    beta: float = 0.5,
) -> Setting:
    rows = mixed_rows(OF_KIND[kind], seed)
    shapes = [(len(rows.student.place_N), 5), (V, 5), *([(V,)] if bias else [])]
    leaves = [random_logits(*x, seed=seed + k).requires_grad_() for k, x in enumerate(shapes)]
    hidden_SD, weight_VD, bias_V = (*leaves, None)[:3]
    teacher_head = Head(random_logits(W, 3, seed=7), 5.0, random_logits(W, seed=8), 1.3)
    others = {"teacher_head": teacher_head, "rows": rows, "events": OF_KIND[kind], "beta": beta}
    teacher_TK = random_logits(2 * C, 3, seed=9)
    return Setting(hidden_SD, weight_VD, bias_V, others, teacher_TK, softcap, temperature)


@given(KINDS, SEEDS, BETAS, st.sampled_from([2, C]))
def test_derivatives_of_gold_loss(kind: str, seed: int, beta: float, block: int) -> None:
    one = setting(seed, kind, beta=beta)
    assert gradcheck(lambda *x: one.blocks(*x, block=block).total, one.leaves, **FAST)


# Blocks


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_block_size_equals_dense(
    kind: str, bias: bool, softcap: float | None, temperature: float
) -> None:
    one = setting(11, kind, bias=bias, softcap=softcap, temperature=temperature)
    dense_C = one.dense(*one.leaves)
    wanted = grad(0.25 * dense_C.sum(), one.leaves)
    for block in range(1, C + 4):
        ours = one.blocks(*one.leaves, block=block)
        torch.testing.assert_close(ours.loss_C, dense_C.detach())
        torch.testing.assert_close(ours.total, 0.25 * dense_C.sum())
        torch.testing.assert_close(grad(ours.total, one.leaves), wanted)


@given(KINDS, SEEDS, BETAS, st.integers(1, C + 3))
def test_blocks_of_logits_equal_dense(kind: str, seed: int, beta: float, block: int) -> None:
    events = OF_KIND[kind]
    rows = mixed_rows(events, seed)
    student_SV, teacher_TW = some_logits(rows, seed)
    student_SV.requires_grad_()
    dense_C = chunk_losses(student_SV, teacher_TW, rows=rows, events=events, beta=beta)
    ours = gold_loss(
        student_SV, teacher_TW, student_head=None, teacher_head=None,
        rows=rows, events=events, beta=beta, weight=0.25, block=block,
    )  # fmt: skip
    torch.testing.assert_close(ours.total, 0.25 * dense_C.sum())
    torch.testing.assert_close(grad(ours.total, student_SV), grad(0.25 * dense_C.sum(), student_SV))


@given(SEEDS, st.integers(1, C + 3), st.booleans())
def test_a_tied_weight_gets_both_gradients(seed: int, block: int, bias: bool) -> None:
    """The embedding that made the states is the head's weight."""
    one = setting(seed, bias=bias)
    ids_S = torch.arange(len(one.hidden_SD)) % V

    leaves = [one.weight_VD[ids_S].tanh(), *one.leaves[1:]]
    ours = grad(one.blocks(*leaves, block=block).total, one.weight_VD, retain_graph=True)
    dense = grad(0.25 * one.dense(*leaves).sum(), one.weight_VD)
    torch.testing.assert_close(ours, dense)


@given(SEEDS, st.sets(st.sampled_from([0, 1, 2])))
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(seed: int, frozen: set[int]) -> None:
    one = setting(seed)
    wanted = grad(0.25 * one.dense(*one.leaves).sum(), one.leaves)
    for k in frozen:
        one.leaves[k].requires_grad_(False)
    total = one.blocks(*one.leaves).total
    assert total.requires_grad == (len(frozen) < 3)
    if total.requires_grad:
        total.backward()
    for k, (leaf, want) in enumerate(zip(one.leaves, wanted, strict=True)):
        assert (leaf.grad is None) == (k in frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, want)


@given(SEEDS)
def test_backward_scales_and_can_be_repeated(seed: int) -> None:
    one = setting(seed)
    losses = one.blocks(*one.leaves)
    with torch.no_grad():
        plain = one.blocks(*one.leaves)
    assert not plain.total.requires_grad and plain.total == losses.total
    assert torch.equal(plain.loss_C, losses.loss_C)
    wanted = grad(losses.total, one.leaves, retain_graph=True)
    tripled = grad(3 * losses.total, one.leaves, retain_graph=True)
    torch.testing.assert_close(tripled, tuple(3 * x for x in wanted))
    for times in (1, 2):
        losses.total.backward(retain_graph=True)
        for leaf, want in zip(one.leaves, wanted, strict=True):
            torch.testing.assert_close(leaf.grad, times * want)
    for leaf in one.leaves:
        assert leaf.grad is not None
        leaf.grad.zero_()  # in place: must not reach what the graph keeps
    losses.total.backward()
    for leaf, want in zip(one.leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, want)


@given(KINDS, SEEDS, BETAS, st.integers(1, C + 3))
def test_look_gives_the_same_losses_and_the_entropies(
    kind: str, seed: int, beta: float, block: int
) -> None:
    one = setting(seed, kind, beta=beta)
    head = one.head(*one.leaves[1:])

    def both(rows: ChunkRows) -> tuple[Tensor, Tensor]:
        others = one.others | {"rows": rows, "block": block}
        return look(one.hidden_SD, one.teacher_TK, student_head=head, **others)

    loss_C, entropy_C = both(one.others["rows"])
    assert not loss_C.requires_grad and not entropy_C.requires_grad
    torch.testing.assert_close(loss_C, one.blocks(*one.leaves).loss_C)
    _, entropy_C = both(one_token_rows(C, [0] * C))
    law_CX = one.others["events"].student.project(head.logits(one.hidden_SD[:C]).softmax(-1))
    inside_CK = law_CX[:, :-2] / law_CX[:, :-2].sum(1, keepdim=True)
    torch.testing.assert_close(entropy_C, -torch.xlogy(inside_CK, inside_CK).sum(1).detach())


# Low precision

LEFT = words("x", *map(str, range(299)))
RIGHT = words("y", *map(str, range(10)), *map(str, range(104, 499)))
ODD = match(LEFT, RIGHT)
LOW = [torch.bfloat16, torch.float16]


def naive(student_NV: Tensor, teacher_NW: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """One token a chunk, as one would write it: softmax, sums and logarithms in `dtype`."""
    student_NX, teacher_NX = (
        side.project(x.to(dtype).softmax(-1))
        for x, side in ((student_NV, ODD.student), (teacher_NW, ODD.teacher))
    )
    s, t = (x[:, :-2] / x[:, :-2].sum(1, keepdim=True) for x in (student_NX, teacher_NX))
    m = beta * t + (1 - beta) * s

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q.log(), p, reduction="none").sum(1)

    if beta in (0, 1):
        loss_N = kl(s, t) if beta else kl(t, s)
    else:
        loss_N = (beta * kl(t, m) + (1 - beta) * kl(s, m)) / (beta * (1 - beta))
    return loss_N - (1 - student_NX[:, -1]).log()


def values_and_gradients(
    losses_of: Callable[..., Tensor], *leaves: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Losses and the gradient of their sum by each leaf, in float64."""
    own = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    loss_C = losses_of(*own)
    return [x.double() for x in (loss_C.detach(), *grad(loss_C.sum(), own))]


def test_the_odd_vocabularies_have_all_there_is() -> None:
    assert (len(LEFT.roles), len(RIGHT.roles)) == (301, 407)
    for side in (ODD.student, ODD.teacher):
        assert side.event_V.max() == ODD.n_events and not side.shared_V.all()


@given(SEEDS, st.sampled_from(LOW), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_low_precision_logits_are_no_worse_than_the_naive_way(
    seed: int, dtype: torch.dtype, beta: float
) -> None:
    """Source: the three-way test of apple/ml-cross-entropy."""
    n = 3
    student_NV = random_logits(n, 301, seed=seed, scale=2, dtype=dtype)
    teacher_NW = random_logits(n, 407, seed=~seed & 255, scale=2, dtype=dtype)
    rows = one_token_rows(n, [5, 150, 300])

    def ours_of(student_NV: Tensor) -> Tensor:
        return chunk_losses(
            student_NV, teacher_NW.to(student_NV.dtype), rows=rows, events=ODD, beta=beta
        )

    truth = values_and_gradients(
        lambda x: naive(x, teacher_NW, beta, torch.float64), student_NV, dtype=torch.float64
    )
    ours = values_and_gradients(ours_of, student_NV)
    for theirs in (dtype, torch.float32):
        plain = values_and_gradients(
            lambda x, theirs=theirs: naive(x, teacher_NW, beta, theirs), student_NV
        )
        for true, got, other in zip(truth, ours, plain, strict=True):
            error = (true - other).abs().nan_to_num(nan=math.inf, posinf=math.inf)
            assert ((true - got).abs() <= error + 1e-6 * (1 + true.abs())).all()


def low_setting(
    dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], Callable[..., Callable[..., Tensor]], Callable[..., Tensor]]:
    """67 chunks: states, weight and bias; our losses by block size; the naive ones."""
    n = 67
    leaves = [
        random_logits(*shape, seed=seed + k, scale=scale, dtype=dtype)
        for k, (shape, scale) in enumerate((((n, 33), 1.0), ((301, 33), 0.3), ((301,), 1.0)))
    ]
    teacher_NW = random_logits(n, 407, seed=seed + 9, dtype=dtype)
    rows = one_token_rows(n, [i % 301 for i in range(n)])

    def ours_in(block: int) -> Callable[..., Tensor]:
        def total_of(hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
            return gold_loss(
                hidden_SD, teacher_NW.to(hidden_SD.dtype), student_head=Head(weight_VD, None, bias_V),
                teacher_head=None, rows=rows, events=ODD, beta=0.5, weight=1.0, block=block,
            ).total  # fmt: skip

        return total_of

    def naive_of(
        hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor, theirs: torch.dtype
    ) -> Tensor:
        return naive(F.linear(hidden_SD, weight_VD, bias_V), teacher_NW, 0.5, theirs).sum()

    return leaves, ours_in, naive_of


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("block", [1, 16, 67])
def test_low_precision_states_and_heads_are_no_worse_than_the_naive_way(
    dtype: torch.dtype, block: int
) -> None:
    """By norm, since the logits are rounded: single entries differ by luck.

    However many the blocks, the head's gradient has the error of one product, not of many sums.
    """
    for seed, theirs in itertools.product(range(3), (dtype, torch.float32)):
        leaves, ours_in, naive_of = low_setting(dtype, seed)
        truth = values_and_gradients(
            lambda *x, of=naive_of: of(*x, torch.float64), *leaves, dtype=torch.float64
        )
        ours = values_and_gradients(ours_in(block), *leaves)
        plain = values_and_gradients(lambda *x, of=naive_of, by=theirs: of(*x, by), *leaves)
        for name, true, got, other in zip(
            ("value", "states", "weight", "bias"), truth, ours, plain, strict=True
        ):
            errors = [float((true - x).norm() / true.norm()) for x in (got, other)]
            assert errors[0] <= 1.01 * errors[1] + 1e-6, (name, theirs, *errors)


@pytest.mark.parametrize("block", [1, 16, 67])
def test_autocast_is_no_worse_than_dense(block: int) -> None:
    leaves, ours_in, naive_of = low_setting(torch.float32, 0)
    truth = values_and_gradients(
        lambda *x: naive_of(*x, torch.float64), *leaves, dtype=torch.float64
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = values_and_gradients(ours_in(block), *leaves)
        plain = values_and_gradients(lambda *x: naive_of(*x, torch.float32), *leaves)
    for true, got, other in zip(truth, ours, plain, strict=True):
        assert (true - got).norm() <= 1.01 * (true - other).norm() + 1e-6 * true.norm()


# Which chunks to train


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]), max_size=30), st.floats(0, 1))
def test_largest_takes_the_budget_and_the_first_of_equals(
    scores: list[float], fraction: float
) -> None:
    n = budget(len(scores), fraction)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]
    mask_C = largest(torch.tensor(scores), fraction)
    assert mask_C.dtype == torch.bool
    assert mask_C.nonzero()[:, 0].tolist() == sorted(best)


@given(st.integers(0, 1000), st.integers(1, 100))
def test_budget_is_the_fraction_rounded_up(n: int, percent: int) -> None:
    """Also where the product in floats is a little more, as that of 0.1 and 30."""
    assert budget(n, percent / 100) == -(-n * percent // 100)


NATS = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=8)


@given(NATS, NATS, st.floats(0, 10), st.integers(0, 7))
def test_soft_or_is_between_0_and_1_and_grows_with_both(
    entropies: list[float], losses: list[float], more: float, place: int
) -> None:
    """With what a chunk's own share is; those of the others are scaled anew."""
    n = min(len(entropies), len(losses))
    both = [torch.tensor(x[:n], dtype=torch.float64) for x in (entropies, losses)]
    before_C, place = soft_or(*both), place % n
    assert ((before_C >= 0) & (before_C <= 1)).all()
    assert soft_or(torch.full((n,), 3.0), torch.zeros(n)).tolist() == [0.0] * n
    for side in both:
        side[place] += more
        after_C = soft_or(*both)
        side[place] -= more
        assert after_C[place] >= before_C[place] - 1e-12


@given(st.lists(st.booleans(), max_size=40), st.data(), SEEDS)
def test_replayed_takes_so_many_of_the_eligible_and_is_seeded(
    eligible: list[bool], data: st.DataObject, seed: int
) -> None:
    eligible_C = torch.tensor(eligible, dtype=torch.bool)
    count = data.draw(st.integers(0, sum(eligible)))
    masks = [replayed(count, eligible_C, torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert int(masks[0].sum()) == count
    assert not (masks[0] & ~eligible_C).any()
    assert torch.equal(*masks)


def test_replayed_is_uniform_over_all_subsets() -> None:
    """Chi-square of 10 subsets: 9 degrees of freedom, above 27.9 once in 1000."""
    g = torch.Generator().manual_seed(0)
    eligible_C = torch.tensor([True, False, True, True, True, False, True])
    drawn = [tuple(replayed(2, eligible_C, g).nonzero()[:, 0].tolist()) for _ in range(2000)]
    counts = [drawn.count(one) for one in itertools.combinations([0, 2, 3, 4, 6], 2)]
    assert sum(counts) == 2000
    assert sum((n - 200) ** 2 / 200 for n in counts) < 27.9


@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0), st.booleans()), min_size=1))
def test_acceptance_is_the_clipped_ratio(chunks: list[tuple[float, float, bool]]) -> None:
    columns = [torch.tensor(x, dtype=torch.float64) for x in zip(*chunks, strict=True)]
    wanted = [math.exp(min(0.0, t - s)) if can else 0.0 for s, t, can in chunks]
    assert acceptance(columns[0], columns[1], columns[2].bool()).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="a fraction from 0 to 1, got"):
        budget(3, fraction)
    with pytest.raises(ValueError, match="a fraction from 0 to 1, got"):
        largest(torch.ones(3), fraction)


def test_other_mistakes_with_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="scores that are numbers, got NaN"):
        largest(torch.tensor([0.0, math.nan]), 0.5)
    with pytest.raises(ValueError, match="at most 2 chunks, the eligible ones, got 3"):
        replayed(3, torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="one of all, weighted, sampled, reject, got 'worst'"):
        choose(torch.ones(1), where="worst")


# The other events


def slow_loss(
    vocabularies: Sequence[Vocabulary], logits: Sequence[Tensor], kind: str, beta: float
) -> float:
    """`strict` or `byte`, one prediction of each side, with loops over strings and bytes."""
    shared: list[bytes] = [bytes([byte]) for byte in range(256)]
    if kind == "strict":
        shared = sorted(set(vocabularies[0].token_bytes) & set(vocabularies[1].token_bytes) - {b""})
    laws, others = [], []
    for vocabulary, logits_V in zip(vocabularies, logits, strict=True):
        mass = dict.fromkeys([*shared, b""], 0.0)
        other = 0.0
        weights = [math.exp(x) for x in logits_V.tolist()]
        for text, role, p in zip(vocabulary.token_bytes, vocabulary.roles, weights, strict=True):
            event = text[:1] if kind == "byte" else text
            if role == "end":
                mass[b""] += p / sum(weights)
            elif role == "text" and event in mass:
                mass[event] += p / sum(weights)
            else:
                other += p / sum(weights)
        laws.append([(p + FLOOR) / (1 - other) for p in mass.values()])
        others.append(other)
    hidden = -math.log(1 - others[0]) if kind == "byte" else 0.0
    return divergence_of(laws[0], laws[1], beta) + hidden


def with_marker(vocabulary: Vocabulary) -> Vocabulary:
    return Vocabulary(
        (b"<x>", *vocabulary.token_bytes), ("special", *vocabulary.roles), vocabulary.first_pieces
    )


@given(two_vocabularies(), st.sampled_from(["strict", "byte"]), SEEDS, BETAS)
def test_strict_and_byte_losses_equal_the_slow_version(
    pair: tuple[Vocabulary, Vocabulary], kind: str, seed: int, beta: float
) -> None:
    assume(1e-12 < beta < 1 - 1e-12 or beta in (0, 1))  # where the plain sum has digits
    both = [with_marker(v) for v in pair]
    events = match(*both, kind=kind)
    assume(not events.identical or kind == "byte")
    logits = [random_logits(C, len(v.roles), seed=seed + k) for k, v in enumerate(both)]
    got_C = chunk_losses(*logits, rows=one_token_rows(C, [1] * C), events=events, beta=beta)
    want = [slow_loss(both, [x[c] for x in logits], kind, beta) for c in range(C)]
    assert got_C.tolist() == pytest.approx(want, rel=1e-4, abs=1e-6)
