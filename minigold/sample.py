# SPDX-License-Identifier: Apache-2.0
"""Prompts in, the student's own answers with their log-probabilities out.

Batched decoding with a KV cache over prompts of different lengths. Rows that end leave the batch.
Every row has its own random stream, so its draw does not depend on the rows beside it.
The log-probabilities are the policy's own, before temperature, top-p and top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
    device, lengths = model.device, [len(prompt) for prompt in prompts]
    stop = torch.tensor(sorted(eos_ids), device=device, dtype=torch.int64)
    uniform_BK = _uniforms(seeds, max_new_tokens).to(device)
    cache = model.empty_cache(len(prompts), max(lengths) + max_new_tokens)
    hidden_BSD = model(pad(prompts, device), cache)
    cache.start_B = torch.tensor(lengths, device=device)
    state_BD = hidden_BSD[torch.arange(len(prompts), device=device), cache.start_B - 1]

    rows = list(range(len(prompts)))  # the prompt of each row still in the batch
    ids: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    watched: list[list[Tensor]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for step in range(max_new_tokens):
        logits_BV = model.head.logits(state_BD)
        prob_BV = warp(logits_BV, temperature=temperature, top_p=top_p, top_k=top_k)
        ids_B = _draw(prob_BV, uniform_BK[:, step])
        logp_BV = logits_BV.log_softmax(-1)
        values_BK = None if watch is None else watch(logp_BV, ids_B).cpu()
        taken = logp_BV.gather(1, ids_B[:, None])[:, 0].tolist()
        for i, (row, token) in enumerate(zip(rows, ids_B.tolist(), strict=True)):
            ids[row].append(token)
            logps[row].append(taken[i])
            if values_BK is not None:
                watched[row].append(values_BK[i])
        ended_B = torch.isin(ids_B, stop)
        for i in ended_B.nonzero()[:, 0].tolist():
            finished[rows[i]] = True
        if bool(ended_B.any()):
            left_B = (~ended_B).nonzero()[:, 0]
            rows = [rows[i] for i in left_B.tolist()]
            cache, ids_B, uniform_BK = cache.rows(left_B), ids_B[left_B], uniform_BK[left_B]
        if not rows or step == max_new_tokens - 1:
            break
        state_BD = model(ids_B[:, None], cache)[:, 0]
        cache.start_B = cache.start_B + 1
    return [
        Completion(
            ids[row],
            torch.tensor(logps[row]),
            finished[row],
            torch.stack(watched[row]) if watch is not None else None,
        )
        for row in range(len(prompts))
    ]


def _check(
    prompts: Sequence[Sequence[int]], limit: int, temperature: float, top_p: float, top_k: int
) -> None:
    if not prompts or not all(prompts):
        raise ValueError("expected prompts of at least one token, got an empty one; add BOS or text")
    if limit < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= 0, "
            f"got {limit}, {temperature}, {top_p} and {top_k}"
        )
