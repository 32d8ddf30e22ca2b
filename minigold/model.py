# SPDX-License-Identifier: Apache-2.0
"""Token ids in, hidden states out: one decoder for Llama, Mistral, SmolLM3, Qwen2, Qwen3, Gemma 3.

The families differ by a few switches. Parameters bear the names that Hugging Face files give them.
The decoder ends at its last hidden states; logits are made by `Head` where they are needed, never
for a whole batch here.

Letters beside the common ones: S tokens of this call, J key positions, G key-value heads,
R rows, or 1 where all rows are alike.
Not here: files (`weights.py`), sampling (`sample.py`), RoPE frequencies (`rope.py`), dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigold.cache import Cache, Store
from minigold.packed import PACK_FROM, Linear, pack, packed, product
from minigold.replay import Replay

__all__ = ["MATRICES", "Decoder", "Head", "ModelConfig"]

UNGROUPED = ("cuda",)  # devices whose fast kernels take no mask beside heads in groups
MATRICES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # of a layer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder, and the switches of its family.

    Args:
        rope, rope_local: of full and of sliding layers, radians per token of each pair of a head,
            and a factor on their cosines and sines.
        rotary: per layer, RoPE is applied (else NoPE).
        sliding: per layer, attention is limited to the last `window` tokens.
        attention_scale: factor on queries times keys.
        softcap: logits are squeezed into (-softcap, softcap), or None.
    """

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    context: int
    norm_eps: float
    activation: str
    tied: bool
    rope: tuple[tuple[float, ...], float]
    rope_local: tuple[tuple[float, ...], float]
    rotary: tuple[bool, ...]
    sliding: tuple[bool, ...]
    window: int
    attention_scale: float
    softcap: float | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @property
    def n_layers(self) -> int:
        return len(self.sliding)

    @property
    def is_gemma(self) -> bool:
        return self.family == "gemma3_text"


class Head(NamedTuple):
    """The output layer: `weight_VD` (the embedding itself where tied), a bias, the cap on logits.

    Logits are divided by `temperature`: a model with a temperature is one with another head.
    `packed` is a copy of the weight, see `packed.py`.
    """

    weight_VD: Tensor
    softcap: float | None = None
    bias_V: Tensor | None = None
    temperature: float = 1.0
    packed: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V], at least float32, of hidden states [..., D]."""
        raw = product(hidden, self.weight_VD, self.bias_V, self.packed)
        return self.cap(raw if raw.dtype == torch.float64 else raw.float())

    def cap(self, raw: Tensor) -> Tensor:
        """Logits of what the matrix gives."""
        capped = raw if self.softcap is None else torch.tanh(raw / self.softcap) * self.softcap
        return capped if self.temperature == 1 else capped / self.temperature


class _Sight(NamedTuple):
    """What the layers of one kind share in one pass: rotations, and which keys are visible.

    `mask_R1SJ` is bool, or None where attention is plainly causal.
    """

    cos_R1SE: Tensor
    sin_R1SE: Tensor
    mask_R1SJ: Tensor | None


class _Norm(nn.Module):
    """RMS norm over the last dimension, in the precision of its weight.

    Gemma stores the weight minus one, and works in float32.
    """

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.gemma, self.eps = config.is_gemma, config.norm_eps
        self.weight = nn.Parameter(torch.zeros(width) if self.gemma else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if not self.gemma:
            return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        weight = 1 + self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).type_as(x)


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig, *, rotary: bool) -> None:
        super().__init__()
        self.config, self.rotary, e = config, rotary, config.head_width
        self.q_proj = Linear(config.width, config.n_heads * e, bias=config.qkv_bias)
        self.k_proj = Linear(config.width, config.n_kv_heads * e, bias=config.qkv_bias)
        self.v_proj = Linear(config.width, config.n_kv_heads * e, bias=config.qkv_bias)
        self.o_proj = Linear(config.n_heads * e, config.width, bias=config.output_bias)
        has_norm = config.family in ("qwen3", "gemma3_text")
        self.q_norm = _Norm(e, config) if has_norm else nn.Identity()
        self.k_norm = _Norm(e, config) if has_norm else nn.Identity()

    def forward(self, hidden_BSD: Tensor, sight: _Sight, store: Store | None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.config.head_width))

        query = self.q_norm(split(self.q_proj(hidden_BSD))).transpose(1, 2)
        key = self.k_norm(split(self.k_proj(hidden_BSD))).transpose(1, 2)
        value = split(self.v_proj(hidden_BSD)).transpose(1, 2)
        if self.rotary:
            query, key = _rotate(query, sight), _rotate(key, sight)
        if store is not None:
            key, value = store.put(key, value)
        shape, grouped = query.shape, self.config.n_kv_heads != self.config.n_heads
        if grouped and shape[2] == 1:  # one token: the heads of a group are queries of one head
            query, grouped = query.reshape(*key.shape[:2], -1, key.shape[3]), False
        elif grouped and sight.mask_R1SJ is not None and query.device.type in UNGROUPED:
            n = self.config.n_heads // self.config.n_kv_heads
            key, value, grouped = key.repeat_interleave(n, 1), value.repeat_interleave(n, 1), False
        mixed_BHSE = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=sight.mask_R1SJ,
            is_causal=sight.mask_R1SJ is None,
            scale=self.config.attention_scale,
            enable_gqa=grouped,
        ).reshape(shape)
        out_BSD: Tensor = self.o_proj(mixed_BHSE.transpose(1, 2).flatten(2))
        return out_BSD


def _rotate(x_BHSE: Tensor, sight: _Sight) -> Tensor:
    """RoPE with the halves of a head as pairs, as Hugging Face lays them out."""
    halves_changed_BHSE = x_BHSE.roll(x_BHSE.shape[-1] // 2, -1)
    return x_BHSE * sight.cos_R1SE + halves_changed_BHSE * sight.sin_R1SE  # rounded as theirs


class _MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up_proj = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down_proj = Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        gate = self.gate_proj(hidden_BSD)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        out_BSD: Tensor = self.down_proj(gate * self.up_proj(hidden_BSD))
        return out_BSD


class _Layer(nn.Module):
    """Norms before each block; Gemma has norms after each block too."""

    def __init__(self, config: ModelConfig, *, rotary: bool) -> None:
        super().__init__()
        self.gemma = config.is_gemma
        self.self_attn, self.mlp = _Attention(config, rotary=rotary), _MLP(config)
        self.input_layernorm = _Norm(config.width, config)
        self.post_attention_layernorm = _Norm(config.width, config)
        if self.gemma:
            self.pre_feedforward_layernorm = _Norm(config.width, config)
            self.post_feedforward_layernorm = _Norm(config.width, config)

    def forward(self, hidden_BSD: Tensor, sight: _Sight, store: Store | None) -> Tensor:
        mixed_BSD = self.self_attn(self.input_layernorm(hidden_BSD), sight, store)
        if not self.gemma:
            hidden_BSD = hidden_BSD + mixed_BSD
            return hidden_BSD + self.mlp(self.post_attention_layernorm(hidden_BSD))
        hidden_BSD = hidden_BSD + self.post_attention_layernorm(mixed_BSD)
        changed_BSD = self.mlp(self.pre_feedforward_layernorm(hidden_BSD))
        return hidden_BSD + self.post_feedforward_layernorm(changed_BSD)


class _Trunk(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Layer(config, rotary=rotary) for rotary in config.rotary)
        self.norm = _Norm(config.width, config)


class Decoder(nn.Module):
    """A causal language model up to its last hidden states. New matrices are normal, std 0.02.

    `n_tokens`: the head gives logits for this many ids; rows of padding behind them do not exist
    for sampling, log-probabilities or loss. `cuda_graphs`: see `replay.py`. `checkpointing`: where
    gradients are wanted a layer keeps its input alone, and runs once more in the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.n_tokens = config.vocab_size
        self.model = _Trunk(config)
        self.lm_head: nn.Linear | None = None
        self.packed_head: Tensor | None = None
        self.cuda_graphs = self.checkpointing = False
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def head(self) -> Head:
        owner = self.model.embed_tokens if self.lm_head is None else self.lm_head
        padded = self.n_tokens < len(owner.weight)  # a slice costs a copy in the backward pass
        weight_VD = owner.weight[: self.n_tokens] if padded else owner.weight
        return Head(weight_VD, self.config.softcap, packed=self.packed_head)

    @contextmanager
    def decoding(self, cache: Cache, n_steps: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """For steps of one token a row, in which no weight changes; many pay for packed copies.

        Gives a function from the next ids_B1 to the states after them, [B, D].
        """
        many = n_steps >= PACK_FROM
        with packed(self.model) if many else nullcontext():
            try:
                self.packed_head = pack(self.head.weight_VD) if many else None
                if self.cuda_graphs:
                    yield Replay(self, cache)
                else:
                    yield lambda ids_B1: self(ids_B1, cache)[:, 0]
            finally:
                self.packed_head = None

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of `length` tokens, on this model's device.

        In its dtype or, under autocast, in that which attention takes then.
        """
        shape = (batch, self.config.n_kv_heads, length, self.config.head_width)
        kind = self.device.type
        lower = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if lower else self.dtype
        return Cache.empty(shape, len(self.model.layers), dtype=dtype, device=self.device)

    def forward(self, ids_BS: Tensor, cache: Cache | None = None) -> Tensor:
        """hidden_BSD after the final norm.

        Without a cache rows are padded on the right and causal, and gradients flow. With a cache
        token i of row b stands at position `next_B[b] + i`, sees what the cache holds and the
        tokens up to itself, and is added to the cache.

        Args:
            ids_BS: int64, each below `config.vocab_size`.
            cache: for inference; needs gradients turned off.

        Raises:
            ValueError: a cache that is too short, or used while gradients are on.
        """
        position_RS = seen_RJ = torch.arange(ids_BS.shape[1], device=ids_BS.device)[None]
        if cache is not None:
            position_RS, seen_RJ = cache.grow(position_RS)
        hidden_BSD = self.model.embed_tokens(ids_BS)
        if self.config.is_gemma:
            scale = torch.tensor(self.config.width**0.5, dtype=hidden_BSD.dtype)
            hidden_BSD = hidden_BSD * scale.item()  # rounded as the embedding is, as Gemma does it
        sights = {
            sliding: self._sight(position_RS, seen_RJ, sliding=sliding)
            for sliding in set(self.config.sliding)
        }
        for i, layer in enumerate(self.model.layers):
            given = hidden_BSD, sights[self.config.sliding[i]], cache and cache.store(i)
            if self.checkpointing and torch.is_grad_enabled():
                hidden_BSD = checkpoint(
                    layer, *given, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_BSD = layer(*given)
        normed_BSD: Tensor = self.model.norm(hidden_BSD)
        return normed_BSD

    def _sight(self, position_RS: Tensor, seen_RJ: Tensor, *, sliding: bool) -> _Sight:
        """For queries at some positions, and keys at others; all from 0 on where both are one."""
        speeds, scale = self.config.rope_local if sliding else self.config.rope
        angle = position_RS[:, None, :, None].float() * _on_device(speeds, position_RS.device)
        cos, sin = (angle.cos() * scale).to(self.dtype), (angle.sin() * scale).to(self.dtype)
        window = self.config.window if sliding else seen_RJ.shape[1]
        mask_R1SJ = None
        if window < seen_RJ.shape[1] or position_RS is not seen_RJ:
            query, key = position_RS[:, None, :, None], seen_RJ[:, None, None, :]
            mask_R1SJ = (key <= query) & (key > query - window)
        return _Sight(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1), mask_R1SJ)


@cache  # a copy to a GPU waits for all of its work
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
