# SPDX-License-Identifier: Apache-2.0
"""Sampling: the cache changes nothing, rows stand alone, filters and stops do what they say."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minigold import model as decoder
from minigold import packed
from minigold import sample as sampling
from minigold.model import Decoder
from minigold.packed import PACKS, product
from minigold.sample import completion_states, logp_of, pad, sample, warp
from reference import sample_slowly
from tiny_models import tiny_decoder

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [3, 1], [2, 7, 1, 8, 2]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_cached_batched_sampling_equals_the_slow_one(family: str) -> None:
    model = tiny_decoder(family)
    got = sample(model, PROMPTS, max_new_tokens=7, eos_ids=[], seed=5)
    for i, (prompt, one) in enumerate(zip(PROMPTS, got, strict=True)):
        g = torch.Generator().manual_seed(5 + i)
        uniform = torch.rand(7, generator=g, dtype=torch.float64).tolist()
        with torch.no_grad():
            assert one.ids == sample_slowly(model, prompt, uniform, 7)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_logp_is_that_of_the_unwarped_policy(family: str) -> None:
    model = tiny_decoder(family)
    got = sample(model, PROMPTS, max_new_tokens=6, eos_ids=[], temperature=0.5, top_k=3, top_p=0.8)
    for prompt, one in zip(PROMPTS, got, strict=True):
        hidden_SD = model(torch.tensor([prompt + one.ids]))[0]
        states_SD = completion_states(hidden_SD, len(prompt), len(one.ids))
        logp_SV = model.head.logits(states_SD).log_softmax(-1)
        want_S = logp_SV[torch.arange(6), torch.tensor(one.ids)].detach()
        torch.testing.assert_close(one.logp_S, want_S, atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    model = tiny_decoder("llama")
    together = sample(model, PROMPTS, max_new_tokens=9, eos_ids=[11, 12], seed=[7, 8, 9, 10, 11])
    for i, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], max_new_tokens=9, eos_ids=[11, 12], seed=[7 + i])[0]
        assert alone.ids == together[i].ids
        torch.testing.assert_close(alone.logp_S, together[i].logp_S, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not PACKS, reason="torch has no packed products on this machine")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
def test_packed_products_change_nothing_but_rounding(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long answers are decoded with packed weights, and without a copy left when they end."""
    model, used = tiny_decoder(family), Counter[bool]()

    def counted(*args: Any) -> Tensor:
        used[args[3] is not None] += 1
        return product(*args)

    monkeypatch.setattr(packed, "product", counted)
    monkeypatch.setattr(decoder, "product", counted)
    got = sample(model, PROMPTS, max_new_tokens=40, eos_ids=[11, 12], seed=3)
    n_linear = sum(isinstance(one, packed.Linear) for one in model.modules())
    longest = max(len(one.ids) for one in got)
    assert (
        used[True] == (n_linear + 1) * (longest - 1) + 1
    )  # the first state comes from the prompts
    for i, (prompt, one) in enumerate(zip(PROMPTS, got, strict=True)):
        g = torch.Generator().manual_seed(3 + i)
        uniform = torch.rand(40, generator=g, dtype=torch.float64).tolist()
        with torch.no_grad():
            assert one.ids == sample_slowly(model, prompt, uniform, len(one.ids))
        hidden_SD = model(torch.tensor([prompt + one.ids]))[0]
        states_SD = completion_states(hidden_SD, len(prompt), len(one.ids))
        logp_SV = model.head.logits(states_SD).log_softmax(-1)
        want_S = logp_SV[torch.arange(len(one.ids)), torch.tensor(one.ids)].detach()
        torch.testing.assert_close(one.logp_S, want_S, atol=1e-5, rtol=1e-5)
    used.clear()
    sample(model, PROMPTS, max_new_tokens=31, eos_ids=[], seed=3)
    assert not used[True]

    def fails() -> None:
        with torch.no_grad(), model.decoding(model.empty_cache(1, 4), 40):
            assert model.head.packed is not None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert model.head.packed is None
    assert all(one.packed is None for one in model.modules() if isinstance(one, packed.Linear))


def test_every_stop_id_ends_a_row_and_stays_in_it() -> None:
    model = tiny_decoder("llama")
    stops = list(range(0, 40, 2))
    for one in sample(model, PROMPTS * 8, max_new_tokens=30, eos_ids=stops):
        assert one.finished == (one.ids[-1] in stops)
        assert not set(one.ids[:-1]) & set(stops)
        assert one.finished or len(one.ids) == 30
        assert len(one.ids) == len(one.logp_S)


def test_watch_sees_each_token_with_its_distribution() -> None:
    model = tiny_decoder("llama")

    def watch(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
        return torch.stack([logp_of(logits_NV, logits_NV.softmax(-1), ids_N), ids_N.float()], dim=1)

    for one in sample(model, PROMPTS, max_new_tokens=12, eos_ids=[3, 5, 7], watch=watch):
        assert one.watched_SK is not None
        assert torch.equal(one.watched_SK[:, 0], one.logp_S)
        assert one.watched_SK[:, 1].tolist() == one.ids


@pytest.mark.parametrize("look", [2, 5, 16])
def test_how_often_one_looks_changes_nothing(look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is waited for, rows that ended go on until the next look."""
    model, seen = tiny_decoder("gemma3_text"), []

    def watch(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
        seen.append(len(ids_N))
        return torch.stack([logp_of(logits_NV, logits_NV.softmax(-1), ids_N), ids_N.float()], dim=1)

    settings: dict[str, Any] = {"max_new_tokens": 19, "eos_ids": range(0, 40, 7), "watch": watch}
    want = sample(model, PROMPTS * 3, **settings)
    assert len(seen) == max(len(one.ids) for one in want)
    assert len({len(one.ids) for one in want}) > 3
    seen.clear()
    monkeypatch.setitem(sampling.LOOK, "cpu", look)
    got = sample(model, PROMPTS * 3, **settings)
    starts = range(0, max(len(one.ids) for one in want), look)
    still = [sum(len(one.ids) > start for one in want) for start in starts]  # ended rows left
    assert seen == [n * min(look, 19 - start) for n, start in zip(still, starts, strict=True)]
    for a, b in zip(want, got, strict=True):
        assert (a.ids, a.finished) == (b.ids, b.finished)
        torch.testing.assert_close(a.logp_S, b.logp_S, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.watched_SK, b.watched_SK, atol=1e-5, rtol=1e-5)


def test_equal_prompts_are_read_once_and_padding_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny_decoder("llama"), []
    prompts = [[n % 40] * n for n in (9, 50, 3, 45, 9, 50, 50, 8)]
    forward = Decoder.forward

    def counted(self: Decoder, ids_BS: Tensor, cache: Any = None) -> Tensor:
        read.append(tuple(ids_BS.shape))
        return forward(self, ids_BS, cache)

    monkeypatch.setattr(Decoder, "forward", counted)
    got = sample(model, prompts, max_new_tokens=4, eos_ids=[], seed=[3] * 8)
    assert read == [(2, 50), (2, 9), (1, 3), *[(8, 1)] * 3]
    monkeypatch.setattr(sampling, "AT_ONCE", 99)
    assert [one.ids for one in got] == [
        one.ids for one in sample(model, prompts, max_new_tokens=4, eos_ids=[], seed=[3] * 8)
    ]
    assert read[6:] == [(1, 50), (1, 45), (2, 9), (1, 3), *[(8, 1)] * 3]
    for prompt, one in zip(prompts, got, strict=True):
        alone = sample(model, [prompt], max_new_tokens=4, eos_ids=[], seed=3)[0]
        assert alone.ids == one.ids


def test_temperature_zero_is_greedy() -> None:
    model = tiny_decoder("llama")
    for seed in (1, 2):
        got = sample(model, [[4, 5]], max_new_tokens=5, eos_ids=[], temperature=0, seed=seed)[0]
        ids = [4, 5]
        for token in got.ids:
            assert token == int(model.head.logits(model(torch.tensor([ids]))[0, -1]).argmax())
            ids.append(token)


@pytest.mark.parametrize("temperature", [1e-3, 1e-39, 5e-324])
def test_next_to_zero_is_greedy_too(temperature: float) -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0], [-2e4, -3e4, -4e4]])
    assert warp(logits_BV, temperature=temperature).tolist() == [[0, 1, 0], [1, 0, 0]]


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 3.0), st.floats(0.05, 1.0), st.integers(0, 12))
def test_filters_keep_the_most_likely_and_their_proportions(
    seed: int, temperature: float, top_p: float, top_k: int
) -> None:
    logits_BV = torch.randn(2, 10, generator=torch.Generator().manual_seed(seed))
    prob_BV = warp(logits_BV, temperature=temperature, top_p=top_p, top_k=top_k)
    plain_BV = (logits_BV / temperature).softmax(-1)
    for prob_V, plain_V in zip(prob_BV, plain_BV, strict=True):
        kept = prob_V > 0
        assert 1 <= int(kept.sum()) <= (top_k if top_k > 0 else 10)
        assert plain_V[kept].min() >= plain_V[~kept].max() if not bool(kept.all()) else True
        ratio = prob_V[kept] / plain_V[kept]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
        limited = plain_V / plain_V.topk(top_k).values.sum() if 0 < top_k < 10 else plain_V
        assert limited[kept].sum() >= top_p - 1e-5 or int(kept.sum()) == (top_k or 10)


def test_draws_follow_the_distribution() -> None:
    model = tiny_decoder("llama")
    first = [one.ids[0] for one in sample(model, [[4]] * 4000, max_new_tokens=1, eos_ids=[])]
    prob_V = model.head.logits(model(torch.tensor([[4]]))[0, -1]).softmax(-1)
    share_V = torch.bincount(torch.tensor(first), minlength=len(prob_V)) / 4000
    assert (share_V - prob_V).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_padding_comes_from_lengths() -> None:
    assert pad([[1], [2, 3]], torch.device("cpu")).tolist() == [[1, 0], [2, 3]]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ([[1]], {"temperature": -1.0}, "temperature >= 0"),
        ([[1]], {"top_p": 0.0}, "0 < top_p <= 1"),
        ([[1]], {"top_k": -2}, "top_k >= 0"),
        ([[1], [2]], {"seed": [3]}, "one per prompt \\(2\\), got 1"),
    ],
)
def test_bad_requests_are_refused(
    prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    model = tiny_decoder("llama")
    settings = {"max_new_tokens": 2, "eos_ids": [], **options}
    with pytest.raises(ValueError, match=message):
        sample(model, prompts, **settings)  # type: ignore[arg-type]
