# SPDX-License-Identifier: Apache-2.0
"""RoPE: equal to `transformers` to the last bit, and to examples worked out by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minigold import rope

THETA = st.floats(1.5, 1e7)
HEAD_WIDTH = st.integers(1, 64).map(lambda n: 2 * n)
FACTOR = st.floats(0.5, 64)
CONTEXT = st.integers(1, 100_000)


def of_transformers(kind: str, head_width: int, **settings: Any) -> tuple[Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    functions = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters}
    settings["rope_theta"] = settings.pop("theta")
    config = SimpleNamespace(
        head_dim=head_width, hidden_size=0, num_attention_heads=1, rope_parameters=settings,
        standardize_rope_params=lambda: None,
    )  # fmt: skip
    frequency_P, scale = {**ROPE_INIT_FUNCTIONS, **functions}[kind](config)
    return frequency_P, scale


@given(THETA, HEAD_WIDTH, FACTOR)
def test_plain_and_linear_equal_transformers(theta: float, head_width: int, factor: float) -> None:
    sizes: dict[str, Any] = {"theta": theta, "head_width": head_width}
    assert torch.equal(rope.plain(**sizes), of_transformers("default", **sizes)[0])
    scaled_P = of_transformers("linear", **sizes, factor=factor)[0]
    assert torch.equal(rope.linear(**sizes, factor=factor), scaled_P)


@given(THETA, HEAD_WIDTH, FACTOR, CONTEXT, st.floats(0.1, 50), st.floats(0.1, 50))
def test_llama3_equals_transformers(
    theta: float, head_width: int, factor: float, context: int, low: float, more: float
) -> None:
    settings: dict[str, Any] = {
        "theta": theta, "head_width": head_width, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": low + more, "original_max_position_embeddings": context,
    }  # fmt: skip
    assert torch.equal(rope.llama3(**settings), of_transformers("llama3", **settings)[0])


@given(THETA, HEAD_WIDTH, FACTOR, CONTEXT, st.floats(0.1, 50), st.floats(0, 50), st.booleans())
def test_yarn_equals_transformers(
    theta: float,
    head_width: int,
    factor: float,
    context: int,
    slow: float,
    more: float,
    whole: bool,
) -> None:
    settings: dict[str, Any] = {
        "theta": theta, "head_width": head_width, "factor": factor, "beta_slow": slow,
        "beta_fast": slow + more, "original_max_position_embeddings": context, "truncate": whole,
    }  # fmt: skip
    assert torch.equal(rope.yarn(**settings), of_transformers("yarn", **settings)[0])


@given(THETA, HEAD_WIDTH, FACTOR, CONTEXT)
def test_yarn_has_the_defaults_of_transformers(
    theta: float, head_width: int, factor: float, context: int
) -> None:
    settings: dict[str, Any] = {"theta": theta, "head_width": head_width, "factor": factor,
                "original_max_position_embeddings": context}  # fmt: skip
    frequency_P, scale = of_transformers("yarn", **settings)
    assert torch.equal(rope.yarn(**settings), frequency_P)
    assert rope.yarn_scale(factor) == scale


@given(FACTOR, st.floats(0.1, 3), st.floats(0.1, 3))
def test_yarn_scale_equals_transformers(factor: float, one: float, other: float) -> None:
    mscales = {"mscale": one, "mscale_all_dim": other}
    scale = of_transformers(
        "yarn", 2, theta=10.0, factor=factor, original_max_position_embeddings=9, **mscales
    )[1]
    assert rope.yarn_scale(factor, **mscales) == pytest.approx(scale, rel=1e-14)


def test_llama3_by_hand() -> None:
    # wavelengths 2 pi, 20 pi, 200 pi: 100 / 2 pi = 15.9 turns, 1.59 and 0.159 of a text of 100
    got = rope.llama3(
        theta=1000.0, head_width=6, factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0,
        original_max_position_embeddings=100,
    ).tolist()  # fmt: skip
    kept = 10 / (2 * math.pi) - 1
    assert got == pytest.approx([1.0, 0.1 * (kept + (1 - kept) / 4), 0.01 / 4])


def test_yarn_by_hand() -> None:
    # pair i makes 100 * 10^-i / 2 pi turns: 1 at i = log10(100 / 2 pi) = 1.2, a tenth at i = 2.2
    settings: dict[str, Any] = {"theta": 1e5, "head_width": 10, "factor": 4.0, "beta_fast": 1.0,
                "beta_slow": 0.1, "original_max_position_embeddings": 100}  # fmt: skip
    kept = [1, 1, math.log10(100 / (2 * math.pi)) - 1, 0, 0]
    expected = [10**-i * (share + (1 - share) / 4) for i, share in enumerate(kept)]
    assert rope.yarn(**settings, truncate=False).tolist() == pytest.approx(expected, rel=1e-4)
    expected[2] = 0.01 * (1 / 2 + 1 / 2 / 4)  # bounds 1 and 3
    assert rope.yarn(**settings).tolist() == pytest.approx(expected)


def test_results_are_on_the_cpu_whatever_the_default() -> None:
    with torch.device("meta"):
        found = [
            rope.linear(theta=50.0, head_width=6, factor=2.0),
            rope.llama3(theta=50.0, head_width=6, factor=2.0, low_freq_factor=1.0,
                        high_freq_factor=2.0, original_max_position_embeddings=9),
            rope.yarn(theta=50.0, head_width=6, factor=2.0, original_max_position_embeddings=9),
        ]  # fmt: skip
    assert {(x.device.type, x.dtype) for x in found} == {("cpu", torch.float32)}


@pytest.mark.parametrize("high", [2.0, 1.5])
def test_llama3_refuses_bounds_in_the_wrong_order(high: float) -> None:
    with pytest.raises(ValueError, match=f"high_freq_factor above low_.*got {high} and 2.0; down"):
        rope.llama3(theta=50.0, head_width=6, factor=2.0, low_freq_factor=2.0,
                    high_freq_factor=high, original_max_position_embeddings=9)  # fmt: skip


@pytest.mark.parametrize(("theta", "fast"), [(50.0, 0.5), (1.0, 32.0)])
def test_yarn_refuses_what_has_no_bounds(theta: float, fast: float) -> None:
    with pytest.raises(ValueError, match=f"at least beta_slow, .*got {fast}, 1.0 and {theta}; "):
        rope.yarn(theta=theta, head_width=6, factor=2.0, beta_fast=fast,
                  original_max_position_embeddings=9)  # fmt: skip


@pytest.mark.parametrize("given", ["mscale", "mscale_all_dim"])
def test_yarn_refuses_half_of_a_quotient(given: str) -> None:
    with pytest.raises(ValueError, match=r"both mscale and mscale_all_dim or neither, .*write att"):
        rope.yarn_scale(4.0, **{given: 1.0})
