# SPDX-License-Identifier: Apache-2.0
"""Prompts in, the student's own answers with their log-probabilities out.

Batched decoding with a KV cache. Equal prompts are read once; rows that end leave the batch. Every
row has its own random stream: what is beside it changes its products' rounding and nothing else.
The log-probabilities are the policy's own, before temperature, top-p and top-k.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CausalLM", "Completion", "completion_states", "logp_of", "pad", "sample", "warp"]

Watch = Callable[[Tensor, Tensor], Tensor]
LOOK = defaultdict(lambda: 16, cpu=1)  # steps from look to look at ended rows; it waits for them
ALIKE = 0.8  # prompts are read together if none is shorter than this part of the longest
AT_ONCE = 2**14  # tokens of prompts that are read together
BLOCK = 512  # tokens whose probabilities a draw sums up at once
COLDEST = torch.finfo(torch.float32).tiny  # a temperature below is as good as 0


class CausalLM(Protocol):
    """All that minigold asks of a model; `model.Decoder` is one."""

    @property
    def device(self) -> torch.device: ...
    @property
    def head(self) -> Any: ...
    def empty_cache(self, batch: int, length: int) -> Any: ...
    def decoding(self, cache: Any, n_steps: int) -> Any: ...
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
    if temperature != 1:  # the likeliest at 0, so that nothing overflows however cold it is
        logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(temperature, COLDEST)
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
    """Inverse of the cumulative sum, first by blocks of tokens; rows need not be normalized."""
    exact = torch.float32 if prob_BV.device.type == "mps" else torch.float64
    filled = torch.nn.functional.pad(prob_BV, (0, -prob_BV.shape[-1] % BLOCK))
    block_BXK = filled.unflatten(-1, (-1, BLOCK))
    mass_BX = block_BXK.sum(-1, dtype=exact)
    upto_BX = mass_BX.cumsum(-1)
    point_B1 = uniform_B.to(exact)[:, None] * upto_BX[:, -1:]
    found_B1 = torch.searchsorted(upto_BX, point_B1, right=True).clamp(max=upto_BX.shape[1] - 1)
    inside_B1 = (point_B1 - upto_BX.gather(1, found_B1)) / mass_BX.gather(1, found_B1) + 1
    within_BK = block_BXK.take_along_dim(found_B1[:, :, None], 1)[:, 0].to(exact).cumsum(-1)
    inside_B1 = within_BK[:, -1:] * inside_B1.clamp(0, 1 - 4 * torch.finfo(exact).eps)
    ids_B1 = found_B1 * BLOCK + torch.searchsorted(within_BK, inside_B1, right=True)
    return ids_B1[:, 0].clamp(max=prob_BV.shape[-1] - 1)  # for what is not a number


def _uniforms(seeds: Sequence[int], length: int) -> Tensor:
    g = torch.Generator()
    rows = [torch.rand(length, generator=g.manual_seed(s), dtype=torch.float64) for s in seeds]
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
        watch: `(logits_NV, ids_N) -> values_NK`, called with the unwarped logits of some tokens
            and the ids taken there; its values come back per token.

    Raises:
        ValueError: no prompts, an empty prompt, seeds for other prompts, or numbers out of range.
    """
    _check(prompts, max_new_tokens, temperature, top_p, top_k)
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"expected one seed, or one per prompt ({len(prompts)}), got {len(seeds)}")
    device, shape = model.device, (len(prompts), max_new_tokens)
    look, warped = LOOK[device.type], (temperature, top_p, top_k) != (1, 1, 0)
    stops = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
    uniform_RL = _uniforms(seeds, max_new_tokens).to(device)
    ids_RL = torch.zeros(shape, dtype=torch.int64, device=device)
    logp_RL = torch.zeros(shape, device=device)
    place_RL = torch.arange(ids_RL.numel(), device=device).view(shape)
    unwatched: list[tuple[Tensor, Tensor]] = []  # places, and the logits (or states) there
    watched: list[tuple[Tensor, Tensor]] = []  # places, and the values there
    cache, state = _prefill(model, prompts, max_new_tokens)
    rows = torch.arange(len(prompts), device=device)  # the rows still in the batch
    ended = torch.zeros_like(rows, dtype=torch.bool)
    with model.decoding(cache, max_new_tokens) as advance:
        for step in range(max_new_tokens):
            logits = model.head.logits(state)
            own = prob = logits.softmax(-1)
            if warped:
                prob = warp(logits, temperature=temperature, top_p=top_p, top_k=top_k)
            ids = _draw(prob, uniform_RL[rows, step])
            ids_RL[rows, step], logp_RL[rows, step] = ids, logp_of(logits, own, ids)
            ended = ended | torch.isin(ids, stops)
            unwatched.append((place_RL[rows, step], logits if look == 1 else state))
            if (step + 1) % look == 0 or step + 1 == max_new_tokens:
                if watch is not None:
                    place, seen = (torch.cat(x) for x in zip(*unwatched, strict=True))
                    logits = seen if look == 1 else model.head.logits(seen)
                    watched.append((place, watch(logits, ids_RL.flatten()[place])))
                unwatched.clear()
                left = (~ended).nonzero()[:, 0]
                if not len(left) or step + 1 == max_new_tokens:
                    break
                if len(left) < len(rows):
                    cache.keep(left)
                    rows, ids, ended = (x[left] for x in (rows, ids, ended))
            state = advance(ids[:, None])
    return _completions(ids_RL.cpu(), logp_RL.cpu(), stops.cpu(), watched)


def _prefill(model: CausalLM, prompts: Sequence[Sequence[int]], n_new: int) -> tuple[Any, Tensor]:
    """A cache with all prompts and room for `n_new`; the states that predict each first token."""
    device, rows = model.device, dict[tuple[int, ...], list[int]]()
    for i, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(i)
    cache = model.empty_cache(len(prompts), max(map(len, prompts)) + n_new)
    found, order = list[Tensor](), list[int]()
    for group in _alike(list(rows)):
        length_G = torch.tensor([len(prompt) for prompt in group], device=device)
        read = model.empty_cache(len(group), len(group[0]))
        hidden_GSD = model(pad(group, device), read)
        read.cut(length_G)
        into = [i for prompt in group for i in rows[prompt]]
        copies_G = torch.tensor([len(rows[prompt]) for prompt in group])
        from_K = torch.arange(len(group)).repeat_interleave(copies_G).to(device)
        cache.fill(torch.tensor(into, device=device), read, from_K)
        found.append(hidden_GSD[from_K, length_G[from_K] - 1])
        order += into
    return cache, torch.cat(found)[torch.tensor(order, device=device).argsort()]


def _alike(prompts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Groups of prompts that little padding makes equally long, the longest first."""
    order, start = sorted(prompts, key=len, reverse=True), 0
    for end in range(1, len(order) + 1):
        longest, many = len(order[start]), len(order[start]) * (end + 1 - start) > AT_ONCE
        if many or end == len(order) or len(order[end]) < ALIKE * longest:
            yield order[start:end]
            start = end


def logp_of(logits_NV: Tensor, prob_NV: Tensor, ids_N: Tensor) -> Tensor:
    """In nats, of one token a row, beside the softmax of the logits; exact for improbable ones."""
    normalizer_N = logits_NV.amax(-1) - prob_NV.amax(-1).log()
    return logits_NV.gather(1, ids_N[:, None])[:, 0] - normalizer_N


def _completions(
    ids_RL: Tensor, logp_RL: Tensor, stops: Tensor, watched: list[tuple[Tensor, Tensor]]
) -> list[Completion]:
    """Each row up to its first stop id."""
    values_RLK = None
    if watched:
        place_M, value_MK = (torch.cat(x).cpu() for x in zip(*watched, strict=True))
        values_RLK = value_MK.new_zeros(ids_RL.numel(), value_MK.shape[1])
        values_RLK = values_RLK.index_copy(0, place_M, value_MK).unflatten(0, ids_RL.shape)
    found = []
    for i, stops_L in enumerate(torch.isin(ids_RL, stops)):
        first = stops_L.nonzero()[:1, 0].tolist()
        n = first[0] + 1 if first else len(stops_L)
        values_SK = None if values_RLK is None else values_RLK[i, :n].clone()
        one = Completion(ids_RL[i, :n].tolist(), logp_RL[i, :n].clone(), bool(first), values_SK)
        found.append(one)
    return found


def _check(
    prompts: Sequence[Sequence[int]], limit: int, temperature: float, top_p: float, top_k: int
) -> None:
    if not prompts or not all(prompts):
        raise ValueError("expected prompts of at least one token, got an empty one; add BOS")
    if limit < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= 0, "
            f"got {limit}, {temperature}, {top_p} and {top_k}"
        )
