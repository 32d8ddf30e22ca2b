# SPDX-License-Identifier: Apache-2.0
"""Prompts in, the student's own answers with their log-probabilities out.

Batched decoding with a KV cache over prompts of different lengths. Rows that end leave the batch.
Every row has its own random stream, so its draw does not depend on the rows beside it.
The log-probabilities are the policy's own, before temperature, top-p and top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["CausalLM", "Completion", "completion_states", "pad", "sample", "warp"]

Watch = Callable[[Tensor, Tensor], Tensor]


class CausalLM(Protocol):
    """All that minigold asks of a model; `model.Decoder` is one."""

    @property
    def device(self) -> torch.device: ...
    @property
    def head(self) -> Any: ...
    def empty_cache(self, batch: int, length: int) -> Any: ...
    def __call__(self, ids_BS: Tensor, cache: Any = None) -> Tensor: ...


@dataclass(frozen=True)
class Completion:
    """One answer.

    Args:
        ids: sampled tokens; the last one is a stop id if `finished`.
        logp_S: float32 on the CPU, nats, of each id under the unwarped policy.
        finished: the answer ended by itself, not at the limit.
        watched_SK: what `watch` returned at each token, on the CPU, or None.
    """

    ids: list[int]
    logp_S: Tensor
    finished: bool
    watched_SK: Tensor | None


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 ids_BS, padded on the right with 0; masks come from the lengths, not from the 0."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def completion_states(hidden_SD: Tensor, n_prompt: int, n_completion: int) -> Tensor:
    """The states that predict completion tokens 0 to `n_completion` (the last: what follows it).

    The one place that shifts: the state at a position predicts the token after it.
    """
    return hidden_SD[n_prompt - 1 : n_prompt + n_completion]


def warp(logits_BV: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Probabilities to draw from: temperature, then top-k, then top-p (0 and 1 turn those off).

    Top-p keeps the smallest set of most likely tokens whose mass reaches `top_p`.
    Temperature 0 puts everything on the first most likely token.
    """
    if temperature == 0:
        best_B = logits_BV.argmax(-1)
        return torch.nn.functional.one_hot(best_B, logits_BV.shape[-1]).to(logits_BV.dtype)
    logits_BV = logits_BV / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        limit_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < limit_B1, -torch.inf)
    prob_BV = logits_BV.softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = prob_BV.sort(-1, descending=True)
        mass_before_BV = sorted_BV.cumsum(-1) - sorted_BV
        kept_BV = sorted_BV.masked_fill(mass_before_BV >= top_p, 0)
        prob_BV = torch.zeros_like(prob_BV).scatter(1, order_BV, kept_BV)
    return prob_BV


def _draw(prob_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse of the cumulative distribution, which need not be normalized."""
    exact = torch.float32 if prob_BV.device.type == "mps" else torch.float64
    cumulative_BV = prob_BV.to(exact).cumsum(-1)
    point_B1 = uniform_B.to(exact)[:, None] * cumulative_BV[:, -1:]
    ids_B = torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0]
    return ids_B.clamp(max=prob_BV.shape[-1] - 1)


def _uniforms(seeds: Sequence[int], length: int) -> Tensor:
    rows = [
        torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)


@torch.no_grad()
def sample(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] = 0,
    watch: Watch | None = None,
) -> list[Completion]:
    """One completion per prompt, in the order of the prompts.

    Args:
        prompts: token ids, each at least one.
        max_new_tokens: limit per row, the stop id included.
        eos_ids: every id that ends a row; it is kept as the last id.
        temperature, top_p, top_k: see `warp`.
        seed: one for all (row i then uses seed + i), or one per row.
        watch: `(logp_BV, ids_B) -> values_BK`, called with the unwarped log-probabilities at each
            step and the ids taken; its values come back per token.

    Raises:
        ValueError: no prompts, an empty prompt, or numbers out of range.
    """
    _check(prompts, max_new_tokens, temperature, top_p, top_k)
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    uniform_BN = _uniforms(seeds, max_new_tokens).to(model.device)
    stops = frozenset(eos_ids)
    cache = model.empty_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    state = _prefill(model, prompts, cache)

    rows = list(range(len(prompts)))  # the prompt of each row still in the batch
    drawn: list[list[_Drawn]] = [[] for _ in prompts]
    for step in range(max_new_tokens):
        logits = model.head.logits(state)
        prob = warp(logits, temperature=temperature, top_p=top_p, top_k=top_k)
        taken = _take(logits, _draw(prob, uniform_BN[rows, step]), watch)
        for row, one in zip(rows, taken, strict=True):
            drawn[row].append(one)
        left = [i for i, one in enumerate(taken) if one.token not in stops]
        rows = [rows[i] for i in left]
        if not rows or step == max_new_tokens - 1:
            break
        if len(left) < len(taken):
            cache = cache.rows(torch.tensor(left, device=model.device))
        tokens = torch.tensor([[taken[i].token] for i in left], device=model.device)
        state = model(tokens, cache)[:, 0]
        cache.start_B = cache.start_B + 1
    return [
        Completion(
            [one.token for one in row],
            torch.tensor([one.logp for one in row]),
            row[-1].token in stops,
            torch.stack([one.watched_K for one in row]) if watch is not None else None,
        )
        for row in drawn
    ]


class _Drawn(NamedTuple):
    token: int
    logp: float
    watched_K: Tensor


def _prefill(model: CausalLM, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
    """Reads the prompts into the cache; the states that predict each first token, [B, D]."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    hidden_BSD = model(pad(prompts, model.device), cache)
    cache.start_B = lengths_B
    return hidden_BSD[torch.arange(len(prompts), device=model.device), lengths_B - 1]


def _take(logits_BV: Tensor, ids_B: Tensor, watch: Watch | None) -> list[_Drawn]:
    logp_BV = logits_BV.log_softmax(-1)
    taken_B = logp_BV.gather(1, ids_B[:, None])[:, 0]
    watched_BK = torch.zeros(len(ids_B), 0) if watch is None else watch(logp_BV, ids_B).cpu()
    return [_Drawn(*row) for row in zip(ids_B.tolist(), taken_B.tolist(), watched_BK, strict=True)]


def _check(
    prompts: Sequence[Sequence[int]], limit: int, temperature: float, top_p: float, top_k: int
) -> None:
    if not prompts or not all(prompts):
        raise ValueError(
            "expected prompts of at least one token, got an empty one; add BOS or text"
        )
    if limit < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= 0, "
            f"got {limit}, {temperature}, {top_p} and {top_k}"
        )
