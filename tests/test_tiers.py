# SPDX-License-Identifier: Apache-2.0
"""Teachers that say less: what the loss makes of listed tokens, of chunks alone, and what is refused."""

import dataclasses
import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigold import loss
from minigold.batch import Rollout, pack
from minigold.carry import Reading
from minigold.config import Config
from minigold.events import CHUNK, match
from minigold.load import LanguageModel
from minigold.loss import FIRST, REST, Carry, ChunkRows, Rows, chunk_losses, divergence, gold_loss
from minigold.masked import train_pass, what_was_said
from minigold.offsets import BROKEN, Vocabulary
from minigold.pair import Pair, make_pair
from minigold.rollout import collect, sample_answers
from minigold.sample import completion_states
from minigold.teacher import Listed, Told, score_of
from minigold.tiers import check_tier, described, limited
from minigold.train import distill
from test_train import CONFIG, PROMPTS, all_chosen, cross_pair, gradient_of
from tiny_models import tiny_model
from tokenizers_for_tests import byte_bpe

EXAMPLES = min(50, settings().max_examples)  # each is a whole step
KS = st.integers(1, 400)
THREE = Vocabulary((b"a", b"b", b""), ("text", "text", "end"), {})
SMALL = match(THREE, THREE)
BETAS = st.sampled_from([0.0, 0.3, 0.5, 1.0])


@lru_cache(maxsize=4)
def pair_of(kind: str) -> Pair:
    """Two tokenizers, or one; `same` is one model on both sides."""
    if kind == "cross":
        return cross_pair()
    teacher = tiny_model("llama", byte_bpe(), end="<|im_end|>", seed=2)
    student = tiny_model("qwen3", byte_bpe(), end="<|im_end|>", seed=1)
    return make_pair(teacher if kind == "same" else student, teacher)


@lru_cache(maxsize=32)
def told_pair(kind: str, k: int | None, events: str) -> Pair:
    """With a teacher that lists `k` tokens; None: the dense one."""
    pair = pair_of(kind)
    assert isinstance(pair.teacher, LanguageModel)
    teacher = pair.teacher if k is None else limited(pair.teacher, k)
    return make_pair(pair.student, teacher, events=events)


@lru_cache(maxsize=4)
def sampled(kind: str) -> Any:
    return sample_answers(pair_of(kind), PROMPTS, CONFIG, number=3)


def rollouts_of(pair: Pair, config: Config) -> list[Rollout]:
    """The same answers for all teachers of a student; measures of the events' own kind."""
    kind = "same" if pair.student is pair_of("same").student else "cross"
    kind = "identical" if pair.student is pair_of("identical").student else kind
    if pair.events.kind != "prefix":
        return collect(pair, *sample_answers(pair, PROMPTS, CONFIG, number=3), config)
    return collect(pair, *sampled(kind), config)


def comparable(rollouts: list[Rollout], pair: Pair) -> list[np.ndarray]:
    return [r.comparable_C(pair.events, 1.0) for r in rollouts]


# ------------------------------------------------------------------------ listed, with a tail
@settings(max_examples=EXAMPLES)
@given(KS, st.sampled_from(["cross", "identical"]), st.sampled_from(["prefix", "strict"]))
def test_listed_masses_are_not_negative_and_sum_to_one_with_the_tail(
    k: int, kind: str, events: str
) -> None:
    for r in rollouts_of(told_pair(kind, k, events), CONFIG):
        listed = r.score.listed
        assert listed is not None
        assert (listed.prob_MK >= 0).all()
        assert (listed.tail_M >= 0).all()
        total_M = listed.prob_MK.double().sum(1) + listed.tail_M
        torch.testing.assert_close(total_M, torch.ones_like(total_M), atol=1e-5, rtol=0)
        known = ~torch.from_numpy(r.teacher_measures_T5).isnan()
        assert known.all()
        shown_T = torch.from_numpy(r.teacher_measures_T5)[:, 2:].sum(1) + listed.tail_M[:-1]
        torch.testing.assert_close(shown_T, torch.ones_like(shown_T), atol=1e-4, rtol=0)


@settings(max_examples=EXAMPLES)
@given(KS, BETAS, st.sampled_from(["cross", "identical"]), st.sampled_from(["prefix", "strict"]))
def test_the_loss_of_listed_tokens_is_not_negative_and_its_gradient_finite(
    k: int, beta: float, kind: str, events: str
) -> None:
    pair = told_pair(kind, k, events)
    config = dataclasses.replace(CONFIG, beta=beta, events=events)
    rollouts = rollouts_of(pair, config)
    assert torch.isfinite(gradient_of(pair, rollouts, comparable(rollouts, pair), config)).all()
    losses_C = chunk_losses_of(pair, rollouts, beta)
    assert torch.isfinite(losses_C).all()
    assert (losses_C > -1e-6).all()


@settings(max_examples=EXAMPLES)
@given(KS, st.sampled_from(["cross", "identical"]))
def test_both_laws_sum_to_one_with_the_tail(k: int, kind: str) -> None:
    """What is carried over a boundary takes its share of the tail, too."""
    pair = told_pair(kind, k, "prefix")
    laws: list[tuple[Tensor, Tensor]] = []
    compare = loss._compare

    def noted(student_CX: Tensor, teacher_CX: Tensor, *rest: Any) -> Tensor:
        laws.append((student_CX, teacher_CX))
        return compare(student_CX, teacher_CX, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_compare", noted)
        rollouts = rollouts_of(pair, CONFIG)
        chunk_losses_of(pair, rollouts, 0.5)
    assert kind == "identical" or k < 60 or any(r.score.carried for r in rollouts)
    for law_CX in laws[0]:
        assert (law_CX >= 0).all()
        torch.testing.assert_close(law_CX.sum(1), torch.ones(len(law_CX)), atol=2e-5, rtol=0)
    n_tail = laws[0][0].shape[1] - pair.events.n_events
    assert n_tail == 3  # the observed chunk, the tail, other


def chunk_losses_of(pair: Pair, rollouts: list[Rollout], beta: float) -> Tensor:
    """Of all chunks that are compared, from the student's logits."""
    states, starts, t_starts = [], [], []
    decoder = pair.student.decoder
    with torch.no_grad():
        for r in rollouts:
            a = r.answer
            hidden_SD = decoder(torch.tensor([a.prompt_ids + a.ids]))[0]
            starts.append(sum(map(len, states)))
            t_starts.append(sum(len(x.score.hidden_MD) for x in rollouts[: len(starts) - 1]))
            states.append(completion_states(hidden_SD, len(a.prompt_ids), len(a.ids)))
        rows = pack(
            rollouts, comparable(rollouts, pair), student_starts=starts, teacher_starts=t_starts,
            teacher_end_id=pair.teacher.end_id,
        )  # fmt: skip
        said = what_was_said([r.score for r in rollouts], pair.events)
        if isinstance(said, Tensor):
            assert isinstance(pair.teacher, LanguageModel)
            said = pair.teacher.decoder.head.logits(said)
        logits_SV = decoder.head.logits(torch.cat(states))
        return chunk_losses(logits_SV, said, rows=rows, events=pair.events, beta=beta)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("events", ["prefix", "strict"])
@pytest.mark.parametrize("kind", ["cross", "identical"])
def test_with_all_of_the_vocabulary_listed_the_loss_is_that_of_a_dense_teacher(
    kind: str, events: str, beta: float
) -> None:
    dense = told_pair(kind, None, events)
    listing = told_pair(kind, dense.teacher.n_tokens, events)
    config = dataclasses.replace(CONFIG, beta=beta, events=events)
    ours, theirs = rollouts_of(listing, config), rollouts_of(dense, config)
    for one, other in zip(ours, theirs, strict=True):
        assert one.score.listed is not None
        assert not one.score.listed.tail_M.any()
        np.testing.assert_allclose(one.teacher_logp_C, other.teacher_logp_C, atol=1e-4)
        np.testing.assert_allclose(one.overhang_C, other.overhang_C, atol=1e-5)
        np.testing.assert_allclose(one.teacher_measures_T5, other.teacher_measures_T5, atol=1e-4)
        assert one.score.best_id_M.tolist() == other.score.best_id_M.tolist()
        assert one.score.carried.keys() == other.score.carried.keys()
        assert one.score.end_logp == pytest.approx(other.score.end_logp, abs=1e-4)
    torch.testing.assert_close(
        chunk_losses_of(listing, ours, beta), chunk_losses_of(dense, theirs, beta),
        atol=2e-4, rtol=1e-4,
    )  # fmt: skip
    gradients = [
        gradient_of(pair, rollouts, comparable(rollouts, pair), config)
        for pair, rollouts in ((listing, ours), (dense, theirs))
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("events", ["prefix", CHUNK])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_a_student_that_is_its_teacher_has_no_loss_whatever_is_listed(k: int, events: str) -> None:
    pair = told_pair("same", k, events)
    for beta in (0.0, 0.5, 1.0):
        losses_C = chunk_losses_of(pair, rollouts_of(pair, CONFIG), beta)
        assert len(losses_C) > 20
        assert losses_C.abs().max() < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_is_listed_less_never_raises_the_loss_where_tokens_are_events(beta: float) -> None:
    """Events are the ids: a tail is a coarser partition of them."""
    dense = chunk_losses_of(
        pair := told_pair("identical", None, "prefix"), rollouts_of(pair, CONFIG), beta
    )
    before = torch.zeros_like(dense)
    for k in (1, 5, 40, 200):
        losses_C = chunk_losses_of(
            pair := told_pair("identical", k, "prefix"), rollouts_of(pair, CONFIG), beta
        )
        assert (losses_C <= dense + 1e-5).all()
        assert losses_C.sum() > before.sum()
        before = losses_C


def test_tail_by_hand() -> None:
    """Teacher: token 0 with .6, the rest unnamed. Student: .5, .3, .2."""
    student_SV = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    teacher = Listed(torch.tensor([[0]]), torch.tensor([[0.6]]), torch.tensor([0.4]))
    loss_C = chunk_losses(student_SV, teacher, rows=one_row([0], [FIRST]), events=SMALL, beta=0.0)
    expected = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    assert loss_C.item() == pytest.approx(expected, abs=1e-6)
    loss_C.sum().backward()
    # of tokens 1 and 2 only the sum is told: their log-probabilities move alike
    assert student_SV.grad is not None
    expected_V = torch.tensor([0.5 - 0.6, 0.3 - 0.4 * 0.6, 0.2 - 0.4 * 0.4])
    torch.testing.assert_close(student_SV.grad[0], expected_V, atol=1e-6, rtol=0)


def one_row(
    ids: list[int], kinds: list[int], *, logp: float = -1.0, observed: bool = False
) -> ChunkRows:
    n = len(ids)
    rows = Rows(torch.arange(n), torch.zeros(n).long(), torch.tensor(ids), torch.tensor(kinds))
    nothing = Carry(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0))
    return ChunkRows(
        rows, torch.tensor([0]), torch.tensor([ids[0]]), torch.tensor([logp]), nothing,
        torch.tensor([observed]),
    )  # fmt: skip


def test_ids_beyond_the_tokenizer_are_in_no_event() -> None:
    told = Told(
        torch.tensor([-1.0, -1.0]).double(),
        torch.tensor([[0, 5], [2, 0]]),
        torch.tensor([[0.5, 0.3], [0.4, 0.2]]).double().log(),
    )
    score = score_of(told, Reading([0], [0]), end_ids=[2], side=SMALL.teacher)
    assert score.listed is not None
    assert score.listed.column_MK.tolist() == [[0, SMALL.n_events + 1], [2, 0]]
    torch.testing.assert_close(score.listed.tail_M, torch.tensor([0.2, 0.4]))
    assert score.end_logp == pytest.approx(math.log(0.4))


def test_lists_of_different_lengths_are_joined_without_naming_more() -> None:
    short = Listed(torch.tensor([[3]]), torch.tensor([[0.5]]), torch.tensor([0.5]))
    long = Listed(torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.1]]), torch.tensor([0.4]))
    both = Listed.join([short, long])
    assert both.column_MK.tolist() == [[3, 3], [1, 2]]
    assert both.prob_MK[0].tolist() == [0.5, 0.0]
    assert both.tail_M.tolist() == pytest.approx([0.5, 0.4])


def test_what_is_carried_grows_to_that_of_a_dense_teacher() -> None:
    masses = []
    for k in (1, 10, 100, None):
        rollouts = rollouts_of(told_pair("cross", k, "prefix"), CONFIG)
        masses.append(
            [sum(float(x.mass_K.sum()) for x in r.score.carried.values()) for r in rollouts]
        )
    for fewer, more in pairwise(masses):
        assert all(a <= b + 1e-6 for a, b in zip(fewer, more, strict=True))
    assert sum(masses[0]) < 0.8 * sum(masses[-1])


# ---------------------------------------------------------------------------- chunks alone
@given(
    st.lists(st.floats(-8, 8), min_size=3, max_size=3),
    st.lists(st.floats(-8, 8), min_size=3, max_size=3),
    st.floats(-30, -1e-6),
    BETAS,
)
def test_a_chunk_is_compared_with_all_else(
    first: list[float], second: list[float], logp: float, beta: float
) -> None:
    logits_SV = torch.tensor([first, second], dtype=torch.float64)
    prob = float(logits_SV.softmax(-1)[0, 1] * logits_SV.softmax(-1)[1, 2])
    rows = one_row([1, 2], [FIRST, REST], logp=logp, observed=True)
    found = chunk_losses(logits_SV, None, rows=rows, events=SMALL, beta=beta)
    student, teacher = (
        torch.tensor([[p, 1 - p]], dtype=torch.float64)
        for p in (prob, math.exp(torch.tensor(logp)))
    )
    expected = divergence(student, teacher, beta=beta)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teacher_that_is_sure_of_a_chunk_may_be_rounded_above_one(beta: float) -> None:
    """Two ends of turn, added up in float32."""
    rows = one_row([1], [FIRST], logp=4.1e-8, observed=True)
    sure = dataclasses.replace(rows, teacher_logp_C=torch.zeros_like(rows.teacher_logp_C))
    found, want = (
        chunk_losses(torch.tensor([[0.0, 1.0, 0.0]]), None, rows=one, events=SMALL, beta=beta)
        for one in (rows, sure)
    )
    assert torch.equal(found, want) and found.isfinite().all()


def test_a_student_that_is_sure_of_a_chunk_still_learns_to_doubt_it() -> None:
    """exp of its log-probability is 1 in float32: what is left has its digits all the same."""
    for gap in (10.0, 20.0, 35.0, 60.0):
        logits_SV = torch.tensor([[0.0, gap, 0.0]]).requires_grad_()
        rows = one_row([1], [FIRST], logp=math.log(0.5), observed=True)
        loss_C = chunk_losses(logits_SV, None, rows=rows, events=SMALL, beta=0.0)
        loss_C.sum().backward()
        assert logits_SV.grad is not None
        if gap < 40:  # beyond it the floor on probabilities is met
            torch.testing.assert_close(logits_SV.grad[0, 1].item(), 0.5, atol=1e-2, rtol=0)
        assert logits_SV.grad.abs().max() < 1


@pytest.mark.parametrize("kind", ["cross", "identical"])
def test_chunks_alone_need_no_more_than_the_tokens(kind: str) -> None:
    """A teacher of each tier gives the same loss; the end of turn is one id where there is one."""
    config = dataclasses.replace(CONFIG, events=CHUNK)
    found = []
    for k in (None, 6, 0):
        pair = told_pair(kind, k, CHUNK)
        rollouts = rollouts_of(pair, config)
        if kind == "cross":  # it has two ends; lists of tokens may lack one
            rollouts = [r for r in rollouts if not r.answer.finished]
        masks = comparable(rollouts, pair)
        assert all(
            (mask == (r.observed_C & r.starts_C & r.scorable_C)).all()
            for mask, r in zip(masks, rollouts, strict=True)
        )
        for (
            r
        ) in rollouts:  # broken bytes have a probability as well, none, if they were not cut off
            broken_C = r.chunks.flaw == BROKEN
            broken_C[len(broken_C) - (not r.answer.finished) :] = False
            assert (r.observed_C == (r.scorable_C | broken_C)).all()
        assert not any(r.score.carried for r in rollouts)
        found.append(
            (chunk_losses_of(pair, rollouts, 0.5), gradient_of(pair, rollouts, masks, config))
        )
    for losses_C, gradient in found[1:]:
        torch.testing.assert_close(losses_C, found[0][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-5, rtol=1e-3)


def test_chunks_alone_in_blocks_equal_those_at_once() -> None:
    pair = told_pair("cross", 0, CHUNK)
    rollouts = rollouts_of(pair, CONFIG)
    expected = chunk_losses_of(pair, rollouts, 0.5).mean()
    config = dataclasses.replace(CONFIG, events=CHUNK, micro_batch=100)
    result = train_pass(pair, rollouts, comparable(rollouts, pair), config)
    pair.student.decoder.zero_grad(set_to_none=True)
    assert result.loss == pytest.approx(expected.item(), rel=1e-4)


def test_training_on_chunks_alone_brings_the_student_nearer() -> None:
    teacher = limited(tiny_model("llama", byte_bpe(), end="<|im_end|>", seed=2), 0)
    student = tiny_model("qwen3", byte_bpe(), end="<|im_end|>", seed=1)
    config = dataclasses.replace(CONFIG, events=CHUNK, steps=24, lr=1e-2, beta=0.0)
    history = distill(student, teacher, PROMPTS, config)
    first, last = (np.mean([row["loss"] for row in part]) for part in (history[:6], history[-6:]))
    assert last < 0.7 * first


# ---------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("k", "settings", "message"),
    [
        (
            0,
            {},
            r"tier tokens can serve .* got --events prefix: .* use --events chunk, or a server",
        ),
        (0, {"events": "strict"}, "got --events strict: it compares what the teacher would"),
        (0, {"events": "byte"}, "got --events byte: the next byte adds up all .*; use chunk"),
        (5, {"events": "byte"}, "tier topk can serve .* got --events byte: .*; use prefix"),
        (0, {"events": CHUNK, "max_overhang": 0.5}, "got --max-overhang: the teacher's longer"),
        (0, {"where": "divergence"}, "tier tokens can serve .* got --events prefix"),
        (
            5,
            {"teacher_temperature": 2.0},
            "got --teacher-temperature: another temperature needs all",
        ),
        (0, {"events": CHUNK, "teacher_temperature": 2.0}, "got --teacher-temperature"),
    ],
)
def test_what_a_tier_cannot_serve_is_refused_before_anything_starts(
    k: int, settings: dict[str, Any], message: str
) -> None:
    pair = pair_of("cross")
    assert isinstance(pair.teacher, LanguageModel)
    config = dataclasses.replace(CONFIG, **settings)
    check_tier(pair.teacher, config)
    teacher = limited(pair.teacher, k)
    before = [p.clone() for p in pair.student.decoder.parameters()]
    with pytest.raises(ValueError, match=message):
        distill(pair.student, teacher, PROMPTS, config)
    after = pair.student.decoder.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("where", ["divergence", "soft-or"])
def test_masks_that_rank_by_distributions_are_refused_with_chunks_alone(where: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"--where one of all, weighted, .* with --events chunk, which has no distr",
    ):
        Config(events=CHUNK, where=where)


@pytest.mark.parametrize("where", ["divergence", "soft-or", "random", "reject"])
def test_listed_tokens_serve_all_masks(where: str) -> None:
    pair = told_pair("cross", 8, "prefix")
    config = dataclasses.replace(CONFIG, where=where)
    rollouts = rollouts_of(pair, config)
    assert train_pass(pair, rollouts, all_chosen(rollouts), config).loss > 0
    pair.student.decoder.zero_grad(set_to_none=True)


def test_a_teacher_that_says_less_refuses_what_is_too_long_or_of_another_temperature() -> None:
    pair = told_pair("cross", 3, "prefix")
    side = pair.events.teacher
    with pytest.raises(
        ValueError,
        match=r"at most 200 tokens for the teacher tiny-llama, .* got 201 .* begin a new",
    ):
        pair.teacher.read(
            [Reading([1] * 100, [2] * 100)], side=side, micro_batch=1, temperature=1.0
        )
    with pytest.raises(ValueError, match=r"tier dense for a temperature of 0\.5, got .* tier topk"):
        pair.teacher.read([Reading([1], [2])], side=side, micro_batch=1, temperature=0.5)


def test_tiers_are_told_in_words() -> None:
    model = pair_of("cross").teacher
    assert isinstance(model, LanguageModel)
    assert described(model).startswith("teacher tiny-llama: tier dense, it is in this process")
    assert "tier topk (5 tokens a position), it says the likeliest" in described(limited(model, 5))
    assert "tier tokens, it says the log-probability of" in described(limited(model, 0))


def test_evaluation_leaves_out_what_a_tier_does_not_say() -> None:
    from minigold.evaluate import evaluate

    prompts = [dataclasses.replace(p, completion="the fox is here") for p in PROMPTS]
    found = {
        k: evaluate(told_pair("cross", k, CHUNK if k == 0 else "prefix"), prompts, CONFIG)
        for k in (None, 5, 0)
    }
    assert found[None]["forward_kl"] is not None
    for k in (5, 0):
        assert found[k]["forward_kl"] is None
        for key in ("bits_per_byte_teacher", "bits_per_byte_student", "eos_rate"):
            assert found[k][key] == pytest.approx(found[None][key], rel=1e-5)
        assert found[k]["reverse_kl_per_byte"] == pytest.approx(
            found[None]["reverse_kl_per_byte"], rel=0.1
        )


def test_gold_loss_takes_what_a_teacher_lists() -> None:
    """In blocks of two chunks, as `chunk_losses` at once."""
    pair = told_pair("cross", 9, "prefix")
    rollouts = rollouts_of(pair, CONFIG)
    expected = chunk_losses_of(pair, rollouts, 0.5)
    decoder, states = pair.student.decoder, []
    for r in rollouts:
        hidden_SD = decoder(torch.tensor([r.answer.prompt_ids + r.answer.ids]))[0]
        states.append(completion_states(hidden_SD, len(r.answer.prompt_ids), len(r.answer.ids)))
    starts = np.cumsum([0, *map(len, states)])[:-1].tolist()
    t_starts = np.cumsum([0, *(len(r.score.hidden_MD) for r in rollouts)])[:-1].tolist()
    rows = pack(rollouts, comparable(rollouts, pair), student_starts=starts, teacher_starts=t_starts,
                teacher_end_id=pair.teacher.end_id)  # fmt: skip
    found = gold_loss(
        torch.cat(states), what_was_said([r.score for r in rollouts], pair.events),
        student_head=decoder.head, teacher_head=None, rows=rows, events=pair.events, beta=0.5,
        weight=0.5, block=2,
    )  # fmt: skip
    torch.testing.assert_close(found.loss_C, expected, atol=1e-4, rtol=1e-4)
    assert found.total.item() == pytest.approx(0.5 * expected.sum().item(), rel=1e-4)
