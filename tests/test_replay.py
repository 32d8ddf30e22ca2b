# SPDX-License-Identifier: Apache-2.0
"""Recorded steps of decoding: the same tokens, with shapes and addresses that stay.

A stand-in plays the part of a CUDA graph: it keeps all that the step reads and writes at its
address, and runs it again. `tests/gpu` has the real one.
"""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minigold import replay
from minigold.model import Decoder
from minigold.sample import Completion, sample
from tiny_models import tiny_decoder

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [3, 1], [2, 7, 1, 8, 2], [4]]


def recorder(model: Decoder, made: list[Tensor]) -> Callable[..., object]:
    """As `replay.record`: it runs nothing, and what it plays writes to one place."""

    def record(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        rows = step.__closure__[0].cell_contents.ids_B1.shape[0]  # type: ignore[index]
        state_BD = torch.full((rows, model.config.width), torch.nan)
        made.append(state_BD)

        def play() -> None:
            state_BD.copy_(step())

        return play, state_BD

    return record


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("columns", [4, 16, 1024])
def test_recorded_steps_change_no_token(
    family: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of different lengths that leave, and columns that are full: both record anew."""
    model, made = tiny_decoder(family), list[Tensor]()
    settings = {"max_new_tokens": 30, "eos_ids": range(0, 40, 9), "seed": 3}
    want = sample(model, PROMPTS, **settings)
    monkeypatch.setattr(replay, "COLUMNS", columns)
    monkeypatch.setattr(replay, "record", recorder(model, made))
    monkeypatch.setattr(model, "cuda_graphs", True)
    got = sample(model, PROMPTS, **settings)
    assert [one.ids for one in got] == [one.ids for one in want]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.logp_S, theirs.logp_S, atol=1e-5, rtol=1e-5)
    assert len({len(one.ids) for one in want}) > 2
    assert len({len(state_BD) for state_BD in made}) > 1
    assert columns > 4 or len(made) > 5


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_recorded_steps_run_under_autocast(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `precision` has it on CUDA: float32 weights, products in bfloat16."""
    model, made = tiny_decoder(family), list[Tensor]()
    settings = {"max_new_tokens": 12, "eos_ids": [], "seed": 3}
    with torch.autocast("cpu", torch.bfloat16):
        want = sample(model, PROMPTS, **settings)
        monkeypatch.setattr(replay, "COLUMNS", 16)
        monkeypatch.setattr(replay, "record", recorder(model, made))
        monkeypatch.setattr(model, "cuda_graphs", True)
        got = sample(model, PROMPTS, **settings)
    assert made
    check_alike(got, want)


def check_alike(got: list[Completion], want: list[Completion]) -> None:
    """Up to where rounding in bfloat16 draws another token, which few rows meet."""
    parted = 0
    for one, other in zip(got, want, strict=True):
        pairs = zip(one.ids, other.ids, strict=False)
        n = next((i for i, (a, b) in enumerate(pairs) if a != b), len(one.ids))
        torch.testing.assert_close(one.logp_S[:n], other.logp_S[:n], atol=0.1, rtol=0.05)
        parted += one.ids != other.ids
    assert parted <= len(want) // 2


@torch.no_grad()
def test_shapes_and_addresses_stay_between_steps() -> None:
    """All that a recorded step touches in the cache is where it was."""
    model = tiny_decoder("llama")
    cache = model.empty_cache(2, 40)
    model(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache)
    assert cache.fix(16) == 16
    model(torch.tensor([[7], [8]]), cache)

    def seen() -> list[object]:
        parts = [cache.position_BJ, cache.next_B, cache.column_1, *cache.store(0), *cache.store(1)]
        return [(part.data_ptr(), part.shape) for part in parts if part is not None]

    before = seen()
    for _ in range(12):
        assert cache.fix(16) == 16
        model(torch.tensor([[7], [8]]), cache)
        assert seen() == before
    assert cache.fix(16) == 32
    assert cache.next_B.tolist() == [16, 16]


@torch.no_grad()
def test_a_cache_with_fixed_columns_has_an_end() -> None:
    model = tiny_decoder("llama")
    cache = model.empty_cache(1, 5)
    model(torch.tensor([[1, 2, 3, 4]]), cache)
    assert cache.fix(16) == 5
    model(torch.tensor([[1]]), cache)
    with pytest.raises(ValueError, match=r"expected at most 5 tokens a row, .* got 6"):
        cache.fix(16)


def test_what_cannot_be_recorded_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_decoder("llama")
    want = sample(model, PROMPTS, max_new_tokens=20, eos_ids=[])

    def refuses(step: Callable[[], Tensor]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "record", refuses)
    monkeypatch.setattr(model, "cuda_graphs", True)
    with caplog.at_level(logging.WARNING, "minigold"):
        got = sample(model, PROMPTS, max_new_tokens=20, eos_ids=[])
    assert [one.ids for one in got] == [one.ids for one in want]
    assert [one.getMessage() for one in caplog.records] == [
        "decoding goes on without CUDA graphs: operation not permitted when stream is capturing"
    ]
