# SPDX-License-Identifier: Apache-2.0
"""Which chunks a step trains, and that the rest costs nothing and changes nothing."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minigold.batch import Rollout, head_rows
from minigold.carry import Reading
from minigold.config import Config
from minigold.disagree import LEAST, WHERE, budget, choose, soft_or
from minigold.evaluate import forward_kl
from minigold.loss import look
from minigold.masked import (
    acceptance_of,
    choose_chunks,
    chunk_weight,
    chunk_weights,
    kept_of,
    micro_batches,
    n_inputs,
    starts_of,
    train_pass,
)
from minigold.model import Decoder, Head
from minigold.pair import Pair, make_pair
from minigold.rollout import collect, sample_answers
from minigold.teacher import score
from minigold.train import take_step
from reference_losses import gkd
from test_train import (
    CONFIG,
    PROMPTS,
    all_chosen,
    cross_pair,
    dense_gradient,
    gradient_of,
    rollouts_of,
    same_pair,
)

BASE = dataclasses.replace(CONFIG, batch_size=6, micro_batch=2)


def settings(where: str, **changes: Any) -> Config:
    return dataclasses.replace(BASE, where=where, **changes)


def chosen_of(pair: Pair, rollouts: list[Rollout], config: Config, seed: int = 3) -> list[Any]:
    return choose_chunks(rollouts, pair.events, config, seed=seed)


def count(masks: list[Any]) -> int:
    return sum(int(mask.sum()) for mask in masks)


def test_sampled_and_reject_are_the_tests_of_disagree() -> None:
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    g = torch.Generator().manual_seed(3)
    for where, options in (("sampled", {"generator": g}), ("reject", {"threshold": 0.2})):
        fields = {"threshold": 0.2} if where == "reject" else {}
        got = chosen_of(pair, rollouts, settings(where, **fields))
        for mask, r in zip(got, rollouts, strict=True):
            want = choose(acceptance_of(r), where=where, **options).numpy() & r.starts_C
            assert mask.tolist() == want.tolist()


@pytest.mark.parametrize("replay", [name for name in WHERE if name != "random"])
def test_random_replays_the_number_of_another_mask(replay: str) -> None:
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    own = settings(replay)
    chosen = chosen_of(pair, rollouts, own)
    other = train_pass(pair, rollouts, chosen, own).trained
    config = settings("random", replay=replay)
    drawn = [chosen_of(pair, rollouts, config, seed) for seed in (3, 3, 4)]
    assert [len(mask) for mask in drawn[0]] == [len(r.chunks.s0) for r in rollouts]
    assert count(drawn[0]) == count(other)
    same = [np.array_equal(np.concatenate(drawn[0]), np.concatenate(d)) for d in drawn[1:]]
    assert same == [True, count(other) in (0, sum(int(r.starts_C.sum()) for r in rollouts))]
    result = train_pass(pair, rollouts, drawn[0], config)
    assert all(np.array_equal(a, b) for a, b in zip(result.trained, drawn[0], strict=True))
    mean = train_pass(pair, rollouts, drawn[0], settings("all")).loss  # of the same chunks
    assert result.loss == pytest.approx(mean, abs=1e-6) and count(drawn[0]) > 0


def test_a_chunk_of_which_nothing_is_known_is_not_left_out() -> None:
    """An overhang that is no number: its loss is none either, and the step fails by it."""
    pair = cross_pair()
    rollout = rollouts_of(pair)[0]
    unknown = dataclasses.replace(rollout, overhang_C=np.full_like(rollout.overhang_C, np.nan))
    assert rollout.starts_C.any()
    assert (unknown.comparable_C(pair.events, 0.5) == rollout.starts_C).all()


@pytest.mark.parametrize("where", ["all", "divergence"])
def test_the_teachers_logits_are_in_its_own_precision(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the student is under autocast; here the CPU's stands for it."""
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    lower: dict[bool, set[bool]] = {True: set(), False: set()}
    own, logits = pair.student.decoder.head.weight_VD, Head.logits

    def noted(head: Head, hidden: Tensor) -> Tensor:
        lower[head.weight_VD.data_ptr() == own.data_ptr()].add(torch.is_autocast_enabled("cpu"))
        return logits(head, hidden)

    monkeypatch.setattr(Head, "logits", noted)
    for name in ("masked", "evaluate"):
        monkeypatch.setattr(
            f"minigold.{name}.precision", lambda _model: torch.autocast("cpu", torch.bfloat16)
        )
    config = settings(where)
    train_pass(pair, rollouts, chosen_of(pair, rollouts, config), config)
    assert lower[False] == {False}, "the teacher's"
    forward_kl(pair, rollouts, config)
    assert lower == {True: {True}, False: {False}}


def test_a_fixed_answer_is_tested_by_the_student() -> None:
    """It was not sampled by the student: what the teacher finds likely and the student does not is trained."""
    pair = cross_pair()
    fixed = [dataclasses.replace(p, completion=" the quick brown fox") for p in PROMPTS]
    for lmbda, sign in ((1.0, 1), (0.0, -1)):
        config = dataclasses.replace(CONFIG, lmbda=lmbda)
        rollouts = collect(pair, *sample_answers(pair, fixed, config, number=1), config)
        for r in rollouts:
            gain_C = torch.as_tensor(sign * (r.teacher_logp_C - r.student_logp_C)[r.scorable_C])
            kept_C = kept_of(r, "sampled")
            torch.testing.assert_close(kept_C[r.scorable_C], gain_C.clamp(max=0).exp())
            assert (kept_C[~r.scorable_C] == 0).all() and r.answer.on_policy == (sign > 0)
            shown_C = acceptance_of(r)  # what samples and the report say
            torch.testing.assert_close(
                shown_C[r.scorable_C], (sign * gain_C).clamp(max=0).exp(), atol=1e-9, rtol=1e-6
            )


def test_weighted_losses_add_up_to_those_of_every_chunk() -> None:
    """The mean over all draws is the gradient of `all`: by hand, chunk by chunk."""
    pair = cross_pair()
    rollouts = rollouts_of(pair)[:3]
    every = all_chosen(rollouts)
    wanted = gradient_of(pair, rollouts, every, settings("all")) * sum(map(len, every))
    expected = torch.zeros_like(wanted)
    config, probs = settings("weighted"), []
    for k, r in enumerate(rollouts):
        gain_C = np.where(r.scorable_C, r.teacher_logp_C - r.student_logp_C, np.inf)
        for c, kept in enumerate(np.exp(-abs(gain_C)).tolist()):
            chosen = [np.zeros_like(mask) for mask in every]
            chosen[k][c] = True
            prob = max(1 - kept, LEAST)  # of being drawn
            probs.append(prob)
            assert chunk_weights(rollouts, chosen, config)[k] == pytest.approx([1 / prob])
            pair.student.decoder.zero_grad(set_to_none=True)
            train_pass(pair, rollouts, chosen, config, weight=1.0)
            one = [
                p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                for p in pair.student.decoder.parameters()
            ]
            expected += prob * torch.cat(one)
    assert LEAST <= min(probs) < 0.3 and max(probs) > 0.9
    pair.student.decoder.zero_grad(set_to_none=True)
    torch.testing.assert_close(expected, wanted, rtol=1e-3, atol=1e-4)


def test_a_weighted_step_is_a_mean() -> None:
    """The sum of the weights is the denominator, over all rows of the step and their micro-batches."""
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    config = settings("weighted")
    chosen = chosen_of(pair, rollouts, config)
    weights = np.concatenate(chunk_weights(rollouts, chosen, config))
    assert len(weights) == count(chosen) and weights.max() > weights.min() >= 1
    losses = torch.cat([values_of(pair, r)[0] for r in rollouts])
    losses = losses[torch.as_tensor(np.concatenate(chosen))].double().numpy()
    loss = train_pass(pair, rollouts, chosen, config).loss
    pair.student.decoder.zero_grad(set_to_none=True)
    assert loss == pytest.approx((losses * weights).sum() / weights.sum(), rel=1e-5)
    assert chunk_weights(rollouts, chosen, settings("sampled")) is None


def test_random_is_drawn_from_what_is_compared() -> None:
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    config = settings("random", replay="all", max_overhang=0.05)
    drawn = chosen_of(pair, rollouts, config)
    can = [r.starts_C & (r.overhang_C <= 0.05) for r in rollouts]
    assert 0 < count(can) < sum(map(len, can))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, can, strict=True))


@pytest.mark.parametrize("where", ["divergence", "soft-or"])
@pytest.mark.parametrize("fraction", [0.1, 0.35, 1.0])
def test_the_largest_of_each_micro_batch_are_trained(where: str, fraction: float) -> None:
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    config = settings(where, fraction=fraction)
    everything = chosen_of(pair, rollouts, config)
    assert count(everything) == sum(int(r.starts_C.sum()) for r in rollouts)
    done = train_pass(pair, rollouts, everything, config)
    for some in micro_batches(rollouts, everything, config.micro_batch):
        scores = []
        for i in some:
            values_C, entropy_C = values_of(pair, rollouts[i])
            scores.append(torch.stack([values_C, entropy_C], dim=1)[rollouts[i].starts_C])
        values_C, entropy_C = torch.cat(scores).unbind(1)
        if where == "soft-or":
            values_C = soft_or(entropy_C, values_C)
        trained_C = np.concatenate([done.trained[i][rollouts[i].starts_C] for i in some])
        assert trained_C.sum() == budget(len(trained_C), fraction)
        least = values_C[torch.as_tensor(trained_C)].min()
        left = values_C[torch.as_tensor(~trained_C)]
        assert not len(left) or left.max() <= least + 1e-5
    pair.student.decoder.zero_grad(set_to_none=True)


def values_of(pair: Pair, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Loss and entropy of every chunk, from whole rows."""
    from minigold.batch import pack

    a, decoder = rollout.answer, pair.student.decoder
    every = np.ones(len(rollout.chunks.s0), dtype=bool)
    at = len(a.prompt_ids) - 1
    with torch.no_grad():
        hidden_SD = decoder(torch.tensor([a.prompt_ids + a.ids]))[0]
    rows = pack(
        [rollout], [every], student_starts=[at], teacher_starts=[0],
        teacher_end_id=pair.teacher.end_id, starts_only=True,
    )  # fmt: skip
    return look(
        hidden_SD, rollout.score.hidden_MD, student_head=decoder.head,
        teacher_head=pair.teacher.decoder.head, rows=rows, events=pair.events, beta=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("where", [where for where in WHERE if where != "weighted"])
def test_the_gradient_is_that_of_the_masked_full_computation(where: str) -> None:
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    config = settings(where)
    chosen = chosen_of(pair, rollouts, config)
    got = gradient_of(pair, rollouts, chosen, config)
    trained = train_pass(pair, rollouts, chosen, config).trained
    n_chunks = sum(len(mask) for mask in trained)
    assert 0 < count(trained) <= n_chunks
    want = dense_gradient(pair, rollouts, trained, 0.5) / max(count(trained), 0.05 * n_chunks)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)


def test_what_is_not_chosen_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end with their last chosen chunk, rows without one are left out, the head sees the rest."""
    pair = cross_pair()
    rollouts = [r for r in rollouts_of(pair) if len(r.chunks.s0) >= 3]
    assert len(rollouts) >= 3
    chosen = [np.zeros(len(r.chunks.s0), dtype=bool) for r in rollouts]
    for mask in chosen[1:]:
        mask[1] = True
    read, seen = [], 0
    decoder = pair.student.decoder
    forward, linear = type(decoder).forward, torch.nn.functional.linear

    def watched(self: Any, ids_BS: Tensor, cache: Any = None) -> Tensor:
        read.append(tuple(ids_BS.shape))
        return forward(self, ids_BS, cache)

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal seen
        if (
            weight is decoder.head.weight_VD
            or weight.data_ptr() == decoder.head.weight_VD.data_ptr()
        ):
            seen += x.shape[0]
        return linear(x, weight, bias)

    monkeypatch.setattr(type(decoder), "forward", watched)
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    train_pass(pair, rollouts, chosen, settings("all", micro_batch=100))
    decoder.zero_grad(set_to_none=True)
    assert n_inputs(rollouts[0], chosen[0]) == 0
    longest = max(  # the state after a token predicts the next one: the last one is not read
        len(r.answer.prompt_ids) + int(r.last_C[1]) for r in rollouts[1:]
    )
    assert read == [(len(rollouts) - 1, longest)]
    rows = [r.last_C[1] + 1 - r.chunks.s0[1] + (r.student_stay_C[1] < -1e-3) for r in rollouts[1:]]
    assert seen == sum(rows)


def test_work_saved_falls_with_the_share_and_counts_the_look() -> None:
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    shares = []
    for fraction in (0.05, 0.5, 1.0):
        config = settings("divergence", fraction=fraction)
        chosen = chosen_of(pair, rollouts, config)
        shares.append(train_pass(pair, rollouts, chosen, config).work_saved)
    everything = settings("all")
    chosen = chosen_of(pair, rollouts, everything)
    whole = train_pass(pair, rollouts, chosen, everything).work_saved  # some cannot be compared
    pair.student.decoder.zero_grad(set_to_none=True)
    head = pair.student.decoder.head.weight_VD.numel()
    body = sum(p.numel() for p in pair.student.decoder.parameters()) - head
    assert shares[0] > shares[1] > shares[2] == whole < 0.05
    assert shares[0] < head / (head + body)


@pytest.mark.parametrize("tied", [True, False])
def test_work_saved_counts_products_and_no_lookup(tied: bool) -> None:
    one = cross_pair()
    config = dataclasses.replace(one.student.decoder.config, tied=tied)
    decoder = Decoder(config)
    decoder.n_tokens = one.student.n_tokens
    pair = make_pair(dataclasses.replace(one.student, decoder=decoder), one.teacher)
    rollouts = rollouts_of(pair)
    last = [np.arange(len(r.chunks.s0)) == len(r.chunks.s0) - 1 for r in rollouts]  # whole rows
    outer = ("embed_tokens", "lm_head")
    layers = {k: p for k, p in decoder.named_parameters() if not any(x in k for x in outer)}
    body, head = sum(p.numel() for p in layers.values()), decoder.head.weight_VD.numel()
    inputs = sum(n_inputs(r, np.ones(len(r.chunks.s0), dtype=bool)) for r in rollouts)
    rows = [head_rows(r) for r in rollouts]
    some = sum(int(n[mask].sum()) for n, mask in zip(rows, last, strict=True))
    every = sum(int(n.sum()) for n in rows)
    want = 1 - (body * inputs + head * some) / (body * inputs + head * every)
    assert train_pass(pair, rollouts, last, settings("all")).work_saved == pytest.approx(want)


@pytest.mark.parametrize("where", ["divergence", "soft-or"])
def test_a_loss_that_is_no_number_is_the_steps_to_fail_by(where: str) -> None:
    pair = cross_pair()
    config = settings(where, fraction=0.1)
    rollouts = rollouts_of(pair)
    c = int(rollouts[2].comparable_C(pair.events, 1.0).nonzero()[0][0])  # of one chunk alone
    rollouts[2].score.hidden_MD[rollouts[2].chunks.t0[c]] = torch.nan
    loss = train_pass(pair, rollouts, chosen_of(pair, rollouts, config), config).loss
    pair.student.decoder.zero_grad(set_to_none=True)
    assert np.isnan(loss)


@pytest.mark.parametrize("kind", ["strict", "byte"])
def test_other_events_train_end_to_end(kind: str) -> None:
    one = cross_pair()
    pair = make_pair(one.student, one.teacher, events=kind)
    config = settings("all", events=kind)
    rollouts = rollouts_of(pair, config)
    chosen = chosen_of(pair, rollouts, config)
    for r, mask in zip(rollouts, chosen, strict=True):
        c = r.chunks
        single = (c.s1 - c.s0 == 1) & (c.t1 - c.t0 == 1)
        assert np.array_equal(mask, r.starts_C & (single if kind == "strict" else True))
        assert not r.observed_C.any() and not r.score.carried and not r.score.inside
        assert (r.student_stay_C == 0).all() and (r.teacher_stay_C == 0).all()
    assert count(chosen) > 0
    assert any((r.overhang_C > 0.01).any() for r in rollouts)
    got = gradient_of(pair, rollouts, chosen, config)
    want = dense_gradient(pair, rollouts, chosen, 0.5) / count(chosen)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)
    assert got.abs().max() > 1e-4


def test_strict_takes_every_token_where_the_tokenizers_are_one() -> None:
    one = same_pair()
    config = settings("all", events="strict")
    pair = make_pair(one.student, one.teacher, events="strict")
    rollouts = rollouts_of(pair, config)
    assert all(mask.all() for mask in chosen_of(pair, rollouts, config))


def test_temperatures_are_hintons_with_one_tokenizer() -> None:
    pair = same_pair()
    config = settings("all", student_temperature=2.0, teacher_temperature=3.0, beta=0.0)
    rollouts = rollouts_of(pair, config)
    decoder = pair.student.decoder
    total, n = torch.zeros(()).double(), 0
    decoder.zero_grad(set_to_none=True)
    for r in rollouts:
        a = r.answer
        states = slice(len(a.prompt_ids) - 1, len(a.prompt_ids) - 1 + len(a.ids))
        student_NV = decoder.head.logits(decoder(torch.tensor([a.prompt_ids + a.ids]))[0, states])
        with torch.no_grad():
            hidden = pair.teacher.decoder(torch.tensor([a.teacher_prompt_ids + a.ids]))[0, states]
            teacher_NV = pair.teacher.decoder.head.logits(hidden)
        total = total + gkd(student_NV / 2, teacher_NV / 3, 0.0).sum()
        n += len(a.ids)
        other = set(pair.teacher.eos_ids) - set(pair.student.eos_ids)  # which the student lacks
        ends = sorted({pair.student.end_id} | other)
        for logits_NV, tau, logp in (
            (student_NV, 2, r.student_logp_C),
            (teacher_NV, 3, r.teacher_logp_C),
        ):
            logp_NV = (logits_NV.detach() / tau).log_softmax(-1)
            want_C = logp_NV[torch.arange(len(a.ids)), a.ids]
            if a.finished and logits_NV is teacher_NV:
                want_C[-1] = logp_NV[-1, ends].logsumexp(-1)
            if a.finished and a.ids[-1] != pair.student.end_id:  # a stop that is no end of its turn
                want_C[-1] = torch.nan
            np.testing.assert_allclose(logp, want_C.numpy(), atol=1e-4)
    (total / n).backward()
    want = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    got = gradient_of(pair, rollouts, all_chosen(rollouts), config)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_fixed_answers_are_read_at_the_same_temperature() -> None:
    pair = cross_pair()
    warm = settings("all", student_temperature=2.0)
    answers, side = sample_answers(pair, PROMPTS, warm, number=1)
    sampled = collect(pair, answers, side, warm)
    read = collect(pair, answers, [None] * len(answers), warm)
    for a, b in zip(sampled, read, strict=True):
        np.testing.assert_allclose(a.student_logp_C, b.student_logp_C, atol=1e-4)
        np.testing.assert_allclose(a.student_measures_S5, b.student_measures_S5, atol=1e-4)


def test_samples_count_as_the_policys_own_at_the_compared_temperature() -> None:
    assert Config().pure
    assert not Config(student_temperature=0.5).pure
    assert Config(student_temperature=0.5, temperature=0.5).pure


def test_scores_can_leave_the_device() -> None:
    """States go and come back; nothing else is on the device, nothing needs a gradient."""
    pair = cross_pair()
    parameter = next(pair.teacher.decoder.parameters())
    assert parameter.requires_grad
    (one,) = score(
        pair.teacher.decoder, [Reading([1], [5, 6, 7], starts=(1, 2))], end_ids=[0],
        side=pair.events.teacher,
    )  # fmt: skip
    assert not one.hidden_MD.requires_grad
    assert one.hidden_MD.grad_fn is None
    away = one.to("meta")
    assert away.hidden_MD.device.type == "meta"
    assert away.hidden_MD.shape == one.hidden_MD.shape
    assert (away.logp_T is one.logp_T) and (away.carried is one.carried)
    assert all(x.device.type == "cpu" for x in (one.logp_T, one.measures_T5))


def test_states_come_back_to_the_students_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    want = gradient_of(pair, rollouts, all_chosen(rollouts), BASE)
    asked = []
    to = Tensor.to

    def watched(self: Tensor, *args: Any, **more: Any) -> Tensor:
        asked.append(args)
        return to(self, *args, **more)

    monkeypatch.setattr(Tensor, "to", watched)
    got = gradient_of(pair, rollouts, all_chosen(rollouts), BASE)
    assert (pair.student.decoder.device,) in asked
    assert torch.equal(got, want)


@pytest.mark.parametrize("where", WHERE)
def test_a_step_reports_what_it_trained(where: str) -> None:
    pair = cross_pair()
    optimizer = torch.optim.SGD(pair.student.decoder.parameters(), lr=0.0)
    step = take_step(pair, optimizer, PROMPTS, settings(where), number=1)
    share = count(step.chosen) / step.metrics["chunks"]
    assert step.metrics["trained_fraction"] == pytest.approx(share)
    assert 0 < share <= 1
    if where in ("divergence", "soft-or"):
        assert share == pytest.approx(0.35, abs=0.1)


def test_parts_of_a_step_answer_as_the_whole_step_does() -> None:
    pair, config = cross_pair(), settings("all", rollouts=2, lmbda=0.5)
    prompts = [dataclasses.replace(p, completion=" a dog") for p in PROMPTS]
    parts = [
        sample_answers(pair, prompts, config, number=2, part=slice(a, b))
        for a, b in pairwise((0, 5, 6, 6, 12))
    ]
    answers, sides = ([x for part in parts for x in part[i]] for i in range(2))
    whole, whole_sides = sample_answers(pair, prompts, config, number=2)
    assert {a.on_policy for a in whole} == {True, False}
    assert [(a.prompt, a.ids) for a in answers] == [(a.prompt, a.ids) for a in whole]
    for one, other in zip(sides, whole_sides, strict=True):
        assert (one is None) == (other is None)
        for mine, theirs in zip(one or (), other or (), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("bounds", [range(7), (0, 4, 4, 6)])
def test_parts_of_a_step_add_up_to_its_gradient(few: bool, bounds: Sequence[int]) -> None:
    pair, config = cross_pair(), settings("sampled")
    rollouts = rollouts_of(pair)
    chosen = chosen_of(pair, rollouts, config)
    if few:  # so few that the denominator is a share of all
        chosen = [mask & (np.arange(len(mask)) == i - 4) for i, mask in enumerate(chosen)]
        assert 0 < count(chosen) < 0.05 * sum(map(len, chosen))
    weight, decoder = chunk_weight(rollouts, chosen, config), pair.student.decoder
    want, total = gradient_of(pair, rollouts, chosen, config), 0.0
    for a, b in pairwise(bounds):
        total += train_pass(pair, rollouts[a:b], chosen[a:b], config, weight=weight).loss
    got = torch.cat([p.grad.flatten() for p in decoder.parameters()])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    decoder.zero_grad(set_to_none=True)
    assert total == pytest.approx(train_pass(pair, rollouts, chosen, config).loss, rel=1e-5)
    decoder.zero_grad(set_to_none=True)


def test_starts_of() -> None:
    assert starts_of([torch.zeros(3, 2), torch.zeros(0, 2), torch.zeros(4, 2)]) == [0, 3, 3]
