# SPDX-License-Identifier: Apache-2.0
"""RoPE settings in, out come the angles that each pair of a head turns by per token.

RoPE turns pair i of a head of width E by position * theta^(-2i/E) radians, and so the score of a
query and a key depends on their distance (arXiv:2104.09864). A model that was trained on short
texts meets new angles in long ones. `linear`, `llama3` and `yarn` turn some pairs more slowly, each
in its way; `yarn` also makes cosines and sines larger by `yarn_scale`.

All results are float32 on the CPU, computed in the order of `transformers`, hence equal to its own.
Letter beside the common ones: P pairs of a head, from the fastest to the slowest.
Not here: config.json (`families.py`), the rotation (`model.py`), scalings that depend on the length
of the text at hand (`dynamic`, `longrope`), rotation of a part of each head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["linear", "llama3", "plain", "yarn", "yarn_scale"]


def plain(*, theta: float, head_width: int) -> Tensor:
    """Radians per token [P] without scaling: theta^(-2i/E).

    Source: RoFormer, arXiv:2104.09864, section 3.2.2.

    >>> plain(theta=100.0, head_width=4).tolist()
    [1.0, 0.10000000149011612]
    """
    return 1 / _inverse(theta, head_width)


def linear(*, theta: float, head_width: int, factor: float) -> Tensor:
    """Radians per token [P], all divided by `factor`: a text `factor` times as long has old angles.

    Source: position interpolation, arXiv:2306.15595, equation 4.

    >>> linear(theta=100.0, head_width=4, factor=2.0).tolist()
    [0.5, 0.05000000074505806]
    """
    return plain(theta=theta, head_width=head_width) / factor


def llama3(
    *,
    theta: float,
    head_width: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    """Radians per token [P]: slow pairs are divided by `factor`, fast ones kept, others between.

    A pair makes original_max_position_embeddings / wavelength turns in a text of the old length.
    With fewer than `low_freq_factor` turns it is slow, with more than `high_freq_factor` fast;
    between the two the share that is kept rises in a line with the turns.

    Source: Llama 3.1, `apply_scaling` in github.com/meta-llama/llama-models.

    Raises:
        ValueError: `high_freq_factor` is not above `low_freq_factor`.
    """
    if not low_freq_factor < high_freq_factor:
        raise ValueError(
            "expected high_freq_factor above low_freq_factor, got "
            f"{high_freq_factor} and {low_freq_factor}; download config.json again"
        )
    plain_P = plain(theta=theta, head_width=head_width)
    wavelength_P, context = 2 * math.pi / plain_P, original_max_position_embeddings
    slow_P, fast_P = (
        wavelength_P > context / low_freq_factor,
        wavelength_P < context / high_freq_factor,
    )
    turns_P = context / wavelength_P
    kept_P = (turns_P - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between_P = (1 - kept_P) * plain_P / factor + kept_P * plain_P
    return torch.where(slow_P, plain_P / factor, torch.where(fast_P, plain_P, between_P))


def yarn(
    *,
    theta: float,
    head_width: int,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """Radians per token [P]: slow pairs are divided by `factor`, fast ones kept, others between.

    Pair i makes original_max_position_embeddings * theta^(-2i/E) / (2 pi) turns in a text of the
    old length. It is fast with at least `beta_fast` turns, slow with at most `beta_slow`.
    `truncate` moves both bounds outwards to whole pairs.

    Source: YaRN, arXiv:2309.00071, section 3.2 ("NTK-by-parts").
    Differs: between the bounds the share that is kept falls in a line with the number of the pair,
    not with its turns, as in the authors' code and in `transformers`.

    Raises:
        ValueError: `beta_fast` below `beta_slow`, or `theta` not above 1.
    """
    if beta_fast < beta_slow or theta <= 1:
        raise ValueError(
            "expected beta_fast to be at least beta_slow, and rope_theta above 1, got "
            f"{beta_fast}, {beta_slow} and {theta}; download config.json again"
        )
    first, last = (
        head_width * math.log(original_max_position_embeddings / (turns * 2 * math.pi))
        / (2 * math.log(theta))  # i of the pair with so many turns: the formula above, solved for i
        for turns in (beta_fast, beta_slow)
    )  # fmt: skip
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_width - 1)
    if first == last:
        last += 0.001  # no division by 0
    pair_P = torch.arange(head_width // 2, dtype=torch.float32, device="cpu")
    kept_P = 1 - ((pair_P - first) / (last - first)).clamp(0, 1)
    inverse_P = _inverse(theta, head_width)
    return 1 / (factor * inverse_P) * (1 - kept_P) + 1 / inverse_P * kept_P


def yarn_scale(
    factor: float, *, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Factor on cosines and sines, so that scores grow by its square: 0.1 ln(factor) + 1.

    With both `mscale` and `mscale_all_dim` it is 0.1 mscale ln(factor) + 1, divided by the same of
    `mscale_all_dim`. A `factor` up to 1 changes nothing.

    Source: YaRN, arXiv:2309.00071, section 3.4; the quotient is that of DeepSeek-V2's code.

    Raises:
        ValueError: only one of the two is given.

    >>> round(yarn_scale(4.0), 4), yarn_scale(4.0, mscale=1.0, mscale_all_dim=1.0)
    (1.1386, 1.0)
    """
    if (mscale is None) != (mscale_all_dim is None):
        raise ValueError(
            f"expected both mscale and mscale_all_dim or neither, got {mscale} and "
            f"{mscale_all_dim}; implementations differ here: write attention_factor instead"
        )
    stretch = 0.1 * math.log(max(factor, 1))
    if mscale is None or mscale_all_dim is None:
        return stretch + 1
    return (stretch * mscale + 1) / (stretch * mscale_all_dim + 1)


def _inverse(theta: float, head_width: int) -> Tensor:
    """Tokens per radian [P]: theta^(2i/E)."""
    even_P = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu")
    inverse_P: Tensor = theta ** (even_P / head_width)
    return inverse_P
