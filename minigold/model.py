# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder in, a decoder that runs and trains out.

Llama (SmolLM), Qwen2, Qwen3 and Gemma 3 are one decoder with a few switches. Parameters bear the
names of the files, so that loading and saving are plain copies. The decoder gives hidden states;
logits are made by `Head` where they are needed, never for a whole batch here.

Letters beside the common ones: S tokens of this call, J key positions, G key-value heads.
Not here: tokenizers (`load.py`), sampling (`sample.py`), RoPE scaling, quantized weights, dropout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["FAMILIES", "Cache", "Decoder", "Head", "ModelConfig", "load_decoder", "save_decoder"]

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "gemma3")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
DEFAULTS: dict[str, dict[str, Any]] = {  # what a config.json may leave out, as `transformers` has it
    "llama": {"max_position_embeddings": 2048, "hidden_act": "silu"},
    "qwen2": {"max_position_embeddings": 32768, "hidden_act": "silu", "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "hidden_act": "silu", "num_key_value_heads": 32,
              "head_dim": 128},
    "gemma3_text": {"max_position_embeddings": 131072, "hidden_activation": "gelu_pytorch_tanh",
                    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                    "vocab_size": 262208, "tie_word_embeddings": True, "sliding_window": 4096,
                    "query_pre_attn_scalar": 256, "rope_theta": 1e6},
}  # fmt: skip
COPIED = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
OUTSIDE = ("vision_tower.", "multi_modal_projector.")  # parts of nested Gemma 3 that read images


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder, and the switches of its family.

    Args:
        rope_theta, rope_theta_local: RoPE bases of full and of sliding layers.
        sliding: per layer, attention is limited to the last `window` tokens.
        attention_scale: factor on queries times keys.
        softcap: logits are squeezed into (-softcap, softcap), or None.
    """

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    context: int
    norm_eps: float
    activation: str
    tied: bool
    rope_theta: float
    rope_theta_local: float
    sliding: tuple[bool, ...]
    window: int
    attention_scale: float
    softcap: float | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @property
    def is_gemma(self) -> bool:
        return self.family == "gemma3_text"

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads the object of a config.json.

        Raises:
            ValueError: an unknown family, a key that is missing, or something that this decoder
                does not do (RoPE scaling, sliding windows outside Gemma, soft-capped or
                bidirectional attention, dropout, quantized weights).
        """
        config = _flat(raw)
        _refuse_unsupported(config)
        family, layers = config["model_type"], _number(config, "num_hidden_layers")
        heads, width = _number(config, "num_attention_heads"), _number(config, "hidden_size")
        head_width = _number(config, "head_dim", width // heads)
        bias = bool(config.get("attention_bias", False))
        scalar = config.get("query_pre_attn_scalar", head_width)
        return cls(
            family=family,
            vocab_size=_number(config, "vocab_size"),
            width=width,
            mlp_width=_number(config, "intermediate_size"),
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=_number(config, "num_key_value_heads", heads),
            head_width=head_width,
            context=_number(config, "max_position_embeddings"),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            activation=_activation(config),
            tied=bool(config.get("tie_word_embeddings", False)),
            rope_theta=_theta(config, "full_attention"),
            rope_theta_local=_theta(config, "sliding_attention"),
            sliding=_sliding(config, layers),
            window=_number(config, "sliding_window", 0) if family == "gemma3_text" else 0,
            attention_scale=float((scalar if family == "gemma3_text" else head_width) ** -0.5),
            softcap=config.get("final_logit_softcapping") if family == "gemma3_text" else None,
            qkv_bias=bias or family == "qwen2",
            output_bias=bias and family != "qwen2",
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        )


def _flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's own keys, with the defaults of its family filled in."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"expected model_type to be one of {', '.join(FAMILIES)}, got {family!r}; "
            "this architecture is not built in: use a model of one of these families"
        )
    if family == "gemma3":
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise ValueError(
                f"expected an object text_config in a gemma3 config.json, got {text!r}"
            )
        raw, family = {**text, "model_type": "gemma3_text"}, "gemma3_text"
    given = {key: value for key, value in raw.items() if value is not None}
    return {**DEFAULTS[family], **given}


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != default):
        raise ValueError(
            f"expected a positive whole number {key} in config.json, got {value!r}; "
            "download the model again, or add the key"
        )
    return value


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act")
    if name not in ACTIVATIONS:
        raise ValueError(f"expected hidden_act to be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return str(name)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    refused = {
        "quantization_config": "dequantize the weights to a float type first",
        "attn_logit_softcapping": "soft-capped attention is not built in: use another model",
        "use_bidirectional_attention": "only causal attention is built in: use another model",
        "use_sliding_window": "sliding windows are built in for Gemma 3 only: use another model",
        "attention_dropout": "dropout is not built in: set it to 0",
    }
    for key, remedy in refused.items():
        if config.get(key):
            raise ValueError(f"expected {key} off in config.json, got {config[key]!r}; {remedy}")


def _theta(config: Mapping[str, Any], kind: str) -> float:
    """The RoPE base of a kind of layer, from `rope_parameters` or the older keys."""
    gemma = config["model_type"] == "gemma3_text"
    rope = config.get("rope_parameters")
    if rope is None:
        rope = config.get("rope_scaling") if kind == "full_attention" else {}
    elif gemma or kind in rope:
        rope = rope.get(kind, {"rope_type": "of no layer type"} if rope else {})
    rope = rope or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"expected rope_type 'default' on whole heads in config.json, got {dict(rope)!r}; "
            "scaled positions are not built in: use a model without RoPE scaling"
        )
    old = "rope_local_base_freq" if gemma and kind == "sliding_attention" else "rope_theta"
    return float(rope.get("rope_theta", config.get(old, 10000.0)))


def _sliding(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    gemma, kinds = config["model_type"] == "gemma3_text", config.get("layer_types")
    if kinds is None:
        every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
        return tuple(gemma and (i + 1) % every != 0 for i in range(layers))
    allowed = {"full_attention", "sliding_attention"} if gemma else {"full_attention"}
    if len(kinds) != layers or not set(kinds) <= allowed:
        raise ValueError(
            f"expected layer_types with {layers} entries out of {', '.join(sorted(allowed))}, "
            f"got {len(kinds)} of {', '.join(sorted(set(kinds)))}; use another model"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


class Head(NamedTuple):
    """The output layer: `weight_VD` (the embedding itself where tied) and the cap on logits."""

    weight_VD: Tensor
    softcap: float | None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 logits_NV; N may be any number of leading dimensions."""
        return self.cap((hidden_ND @ self.weight_VD.T).float())

    def cap(self, raw_NV: Tensor) -> Tensor:
        return raw_NV if self.softcap is None else torch.tanh(raw_NV / self.softcap) * self.softcap


@dataclass
class Cache:
    """Keys and values of the tokens read so far, one tensor [B, G, J, E] per layer.

    `start_B` (int64) is how many tokens each row holds. The caller moves it on after a forward
    pass; what stands behind it is never seen and gets written over.
    """

    keys: list[Tensor]
    values: list[Tensor]
    start_B: Tensor

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        *,
        batch: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Cache:
        """Room for `batch` rows of `length` tokens."""
        shape = (batch, config.n_kv_heads, length, config.head_width)
        keys, values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
            for _ in range(2)
        )
        return cls(keys, values, torch.zeros(batch, dtype=torch.int64, device=device))

    def rows(self, index_B: Tensor) -> Cache:
        """A copy of the rows at `index_B` (int64, or a bool mask of all rows)."""
        keys, values = ([x[index_B] for x in side] for side in (self.keys, self.values))
        return Cache(keys, values, self.start_B[index_B])


class _Sight(NamedTuple):
    """What the layers of one kind share in one pass: rotations, and which keys are visible.

    `mask` is bool [B or 1, 1, S, J], or None where attention is plainly causal.
    """

    cos_BSE: Tensor
    sin_BSE: Tensor
    mask: Tensor | None


class _Store(NamedTuple):
    """One layer's part of the cache, and where this pass writes."""

    keys_BGJE: Tensor
    values_BGJE: Tensor
    position_BS: Tensor
    length: int

    def put(self, key_BGSE: Tensor, value_BGSE: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens; returns all keys and values up to `length`."""
        row_B1 = torch.arange(len(key_BGSE), device=key_BGSE.device)[:, None]
        for kept, new in ((self.keys_BGJE, key_BGSE), (self.values_BGJE, value_BGSE)):
            kept[row_B1, :, self.position_BS] = new.transpose(1, 2).to(kept.dtype)
        return self.keys_BGJE[:, :, : self.length], self.values_BGJE[:, :, : self.length]


class _Norm(nn.Module):
    """RMS norm over the last dimension; Gemma stores the weight minus one, and works in float32."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.gemma, self.eps = config.is_gemma, config.norm_eps
        self.weight = nn.Parameter(torch.zeros(width) if self.gemma else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if not self.gemma:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        weight = 1 + self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).type_as(x)


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, e = config, config.head_width
        self.q_proj = nn.Linear(config.width, config.n_heads * e, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, config.n_kv_heads * e, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, config.n_kv_heads * e, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_heads * e, config.width, bias=config.output_bias)
        has_norm = config.family in ("qwen3", "gemma3_text")
        self.q_norm = _Norm(e, config) if has_norm else nn.Identity()
        self.k_norm = _Norm(e, config) if has_norm else nn.Identity()

    def forward(self, hidden_BSD: Tensor, sight: _Sight, store: _Store | None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.config.head_width))

        query = self.q_norm(split(self.q_proj(hidden_BSD))).transpose(1, 2)
        key = self.k_norm(split(self.k_proj(hidden_BSD))).transpose(1, 2)
        value = split(self.v_proj(hidden_BSD)).transpose(1, 2)
        query, key = _rotate(query, sight), _rotate(key, sight)
        if store is not None:
            key, value = store.put(key, value)
        mixed_BHSE = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=sight.mask,
            is_causal=sight.mask is None,
            scale=self.config.attention_scale,
            enable_gqa=self.config.n_kv_heads != self.config.n_heads,
        )
        out_BSD: Tensor = self.o_proj(mixed_BHSE.transpose(1, 2).flatten(2))
        return out_BSD


def _rotate(x_BHSE: Tensor, sight: _Sight) -> Tensor:
    """RoPE with the halves of a head as pairs, as Hugging Face lays them out."""
    low, high = x_BHSE.chunk(2, dim=-1)
    turned_BHSE = torch.cat([-high, low], dim=-1)
    return x_BHSE * sight.cos_BSE[:, None] + turned_BHSE * sight.sin_BSE[:, None]


class _MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        gate = self.gate_proj(hidden_BSD)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        out_BSD: Tensor = self.down_proj(gate * self.up_proj(hidden_BSD))
        return out_BSD


class _Layer(nn.Module):
    """Norms before each block; Gemma has norms after each block too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gemma = config.is_gemma
        self.self_attn, self.mlp = _Attention(config), _MLP(config)
        self.input_layernorm = _Norm(config.width, config)
        self.post_attention_layernorm = _Norm(config.width, config)
        if self.gemma:
            self.pre_feedforward_layernorm = _Norm(config.width, config)
            self.post_feedforward_layernorm = _Norm(config.width, config)

    def forward(self, hidden_BSD: Tensor, sight: _Sight, store: _Store | None) -> Tensor:
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
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layers))
        self.norm = _Norm(config.width, config)


class Decoder(nn.Module):
    """A causal language model up to its last hidden states. New weights are normal, std 0.02.

    `n_tokens`: the head gives logits for this many ids; rows of padding behind them do not exist
    for sampling, log-probabilities or loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.n_tokens = config.vocab_size
        self.model = _Trunk(config)
        self.lm_head: nn.Linear | None = None
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def head(self) -> Head:
        owner = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return Head(owner.weight[: self.n_tokens], self.config.softcap)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of `length` tokens, on this model's device and in its dtype."""
        return Cache.empty(
            self.config, batch=batch, length=length, device=self.device, dtype=self.dtype
        )

    def forward(self, ids_BS: Tensor, cache: Cache | None = None) -> Tensor:
        """hidden_BSD after the final norm.

        Without a cache rows are padded on the right and causal, and gradients flow. With a cache
        token i of row b stands at position `start_B[b] + i`; its keys are written there, and it
        sees the keys up to itself. `start_B` is left to the caller.

        Args:
            ids_BS: int64, each below `config.vocab_size`.
            cache: for inference; needs gradients turned off.

        Raises:
            ValueError: a cache that is too short, or used while gradients are on.
        """
        b, s = ids_BS.shape
        position_BS = torch.arange(s, device=ids_BS.device).expand(b, s)
        length = s
        if cache is not None:
            position_BS = position_BS + cache.start_B[:, None]
            length = _checked_length(cache, s)
        hidden_BSD = self.model.embed_tokens(ids_BS)
        if self.config.is_gemma:
            scale = torch.tensor(self.config.width**0.5, dtype=hidden_BSD.dtype)
            hidden_BSD = hidden_BSD * scale.item()  # rounded as the embedding is, as Gemma does it
        sights = {
            sliding: self._sight(position_BS, length, sliding=sliding, cached=cache is not None)
            for sliding in set(self.config.sliding)
        }
        for i, layer in enumerate(self.model.layers):
            store = cache and _Store(cache.keys[i], cache.values[i], position_BS, length)
            hidden_BSD = layer(hidden_BSD, sights[self.config.sliding[i]], store)
        normed_BSD: Tensor = self.model.norm(hidden_BSD)
        return normed_BSD

    def _sight(self, position_BS: Tensor, length: int, *, sliding: bool, cached: bool) -> _Sight:
        base = self.config.rope_theta_local if sliding else self.config.rope_theta
        e, device = self.config.head_width, position_BS.device
        power = torch.arange(0, e, 2, device=device, dtype=torch.float32) / e
        angle = position_BS[..., None].float() * (1 / base**power)  # in the order of the originals
        angle_BSE = torch.cat([angle, angle], dim=-1)
        mask = None
        window = self.config.window if sliding else length
        if cached or window < length:
            query = (position_BS if cached else position_BS[:1])[:, None, :, None]
            key = torch.arange(length, device=device)
            mask = (key <= query) & (key > query - window)
        return _Sight(angle_BSE.cos().to(self.dtype), angle_BSE.sin().to(self.dtype), mask)


def _checked_length(cache: Cache, n_new: int) -> int:
    """Tokens that the fullest row holds after this pass."""
    if torch.is_grad_enabled():
        raise ValueError(
            "expected gradients off with a cache, got them on; "
            "use torch.no_grad(), or leave the cache out to train"
        )
    room = cache.keys[0].shape[2]
    length = int(cache.start_B.max()) + n_new
    if length > room:
        raise ValueError(
            f"expected at most {room} tokens a row, the length of the cache, got {length}; "
            "make a longer one with empty_cache"
        )
    return length


def load_decoder(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """Reads config.json and model.safetensors, or the shards that its index names.

    Raises:
        FileNotFoundError: the folder, config.json, the weights or a shard are missing.
        ValueError: a file that cannot be read, an architecture that is not built in, or tensors
            that do not fit it by name, shape or type.
    """
    folder = Path(folder)
    raw = _read_json(folder / "config.json")
    config = ModelConfig.from_json(raw)
    with torch.device("meta"):
        decoder = Decoder(config)
    wanted = decoder.state_dict()
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _tensors(path, device=device, dtype=dtype):
            name = _own_name(name, nested=raw["model_type"] == "gemma3")
            if not name:
                continue
            if name in found:
                raise ValueError(f"expected each tensor once, got {name} again in {path}")
            if name in wanted and tensor.shape != wanted[name].shape:
                expected, got = tuple(wanted[name].shape), tuple(tensor.shape)
                raise ValueError(
                    f"expected {name} of shape {expected}, as config.json has it, got {got} in "
                    f"{path}; the weights and config.json are not of the same model"
                )
            found[name] = tensor
    _check_tied(found, config, folder)
    _refuse_names("missing", wanted.keys() - found.keys(), folder)
    _refuse_names("unexpected", found.keys() - wanted.keys(), folder)
    decoder.load_state_dict(found, assign=True)
    return decoder.eval()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a model folder, found no folder {path.parent}")
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {path.name} in {path.parent}, found none; give a Hugging Face model folder"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got {error}; download it again") from error
    if type(value) is not dict:
        raise ValueError(f"expected a JSON object in {path}, got {value!r}; download it again")
    return value


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"expected model.safetensors or {index.name} in {folder}, found neither; "
            "save the model again with save_pretrained of transformers"
        )
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise ValueError(f"expected an object weight_map of file names in {index}, got {shards!r}")
    files = []
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or "\\" in shard:
            raise ValueError(
                f"expected shards that lie beside {index}, got {shard!r}; "
                "do not use an index that points out of its folder"
            )
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"expected shard {shard} in {folder}, as the index says, found none; download it"
            )
        files.append(folder / shard)
    return files


def _tensors(
    path: Path, *, device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (a file is no dict)
                kind = file.get_slice(name).get_dtype()
                if kind not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"expected float tensors, got {name} of type {kind} in {path}; "
                        "dequantize the weights first"
                    )
                yield name, file.get_tensor(name).to(dtype)
    except SafetensorError as error:
        raise ValueError(
            f"expected a whole safetensors file {path}, got {error}; download it again"
        ) from error


def _own_name(name: str, *, nested: bool) -> str:
    """The name inside `Decoder`, or "" for a tensor that it does not need."""
    if nested:
        bare = name.removeprefix("model.")
        if bare.startswith(OUTSIDE):
            return ""
        if name.startswith("model.language_model."):
            return "model." + name.removeprefix("model.language_model.")
        name = name.removeprefix("language_model.")
    return "" if name.endswith("rotary_emb.inv_freq") else name


def _check_tied(found: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Drops a stored head that repeats the embedding."""
    if not config.tied or "lm_head.weight" not in found:
        return
    head, embedding = found.pop("lm_head.weight"), found.get("model.embed_tokens.weight")
    if embedding is None or not torch.equal(head, embedding):
        raise ValueError(
            f"expected lm_head.weight in {folder} to equal the embedding, as tie_word_embeddings "
            "says, got another; set tie_word_embeddings to false in config.json"
        )


def _refuse_names(what: str, names: set[str], folder: Path) -> None:
    if names:
        listed = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
        raise ValueError(
            f"expected the tensors of config.json in {folder}, got {len(names)} {what}: {listed}; "
            "the weights and config.json are not of the same model"
        )


def save_decoder(decoder: Decoder, folder: str | Path, *, source: str | Path) -> None:
    """Writes a Hugging Face folder that `transformers` and `load_decoder` read.

    config.json is that of `source` with the dtype of the weights (of nested Gemma 3 only the
    text model); tokenizer, template and generation files are copied from there.

    Raises:
        ValueError: `folder` is `source` itself.
    """
    folder, source = Path(folder), Path(source)
    if folder.resolve() == source.resolve():
        raise ValueError(f"expected a folder other than the source {source}; save beside it")
    raw = _read_json(source / "config.json")
    if raw["model_type"] == "gemma3":
        raw = {**_flat(raw), "architectures": ["Gemma3ForCausalLM"]}
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    raw[key] = str(decoder.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.detach().contiguous() for name, x in decoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
