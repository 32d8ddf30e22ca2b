# SPDX-License-Identifier: Apache-2.0
"""The object of a config.json in, a `ModelConfig` out: how each family writes down its shape.

What a file may leave out is filled in as `transformers` does it; what the decoder does not do is
refused by its name. Nothing that changes a result is passed over.
Not here: files (`weights.py`), RoPE frequencies (`rope.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from minigold import rope
from minigold.data import short
from minigold.model import ModelConfig

__all__ = ["FAMILIES", "flat", "model_config"]

FAMILIES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma3_text", "gemma3")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
DEFAULTS: dict[str, dict[str, Any]] = {  # what a config.json may leave out, as `transformers` has it
    "llama": {"max_position_embeddings": 2048, "hidden_act": "silu"},
    "mistral": {"max_position_embeddings": 131072, "hidden_act": "silu", "num_key_value_heads": 8,
                "sliding_window": 4096},
    "smollm3": {"max_position_embeddings": 32768, "hidden_act": "silu", "num_key_value_heads": 4,
                "tie_word_embeddings": True, "no_rope_layer_interval": 4, "rope_theta": 2e6},
    "qwen2": {"max_position_embeddings": 32768, "hidden_act": "silu", "num_key_value_heads": 32,
              "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "hidden_act": "silu", "num_key_value_heads": 32,
              "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "gemma3_text": {"max_position_embeddings": 131072, "hidden_activation": "gelu_pytorch_tanh",
                    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                    "vocab_size": 262208, "tie_word_embeddings": True, "sliding_window": 4096,
                    "query_pre_attn_scalar": 256, "rope_theta": 1e6},
}  # fmt: skip
LARGEST = {  # sizes that take up memory or time before any weight is looked at
    "num_hidden_layers": 2**10, "num_attention_heads": 2**14, "num_key_value_heads": 2**14,
    "head_dim": 2**14, "hidden_size": 2**24, "intermediate_size": 2**24, "vocab_size": 2**24,
}  # fmt: skip
REFUSED = {  # what only works when it is off, and what to do where it is on
    "quantization_config": "dequantize the weights to a float type first",
    "attn_logit_softcapping": "soft-capped attention is not built in: use another model",
    "use_bidirectional_attention": "only causal attention is built in: use another model",
    "per_layer_config": "layers of different shapes are not built in: use another model",
    "attention_dropout": "dropout is not built in: set it to 0",
}
ORIGINAL = "original_max_position_embeddings"
SCALES = ("attention_factor", "mscale", "mscale_all_dim")
ROPE_KEYS: dict[str, tuple[str, ...]] = {  # what each type of RoPE reads beside its base
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL, "beta_fast", "beta_slow", "truncate", *SCALES),
}
REQUIRED = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)
ROPE_TYPES: dict[str, Callable[..., Tensor]] = {
    "default": rope.plain, "linear": rope.linear, "llama3": rope.llama3, "yarn": rope.yarn,
}  # fmt: skip
OUTER = ("quantization_config", "tie_word_embeddings", "eos_token_id")  # nested Gemma 3: win

Number = TypeVar("Number", int, float)


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads the object of a config.json.

    Raises:
        ValueError: an unknown family, a key that is missing or out of range, or something that
            the decoder does not do (other types of RoPE than in `ROPE_KEYS` or on a part of each
            head, soft-capped or bidirectional attention, dropout, quantized weights).
    """
    config = flat(raw)
    for key, remedy in REFUSED.items():
        if config.get(key):
            raise ValueError(
                f"expected {key} off in config.json, got {short(config[key])}; {remedy}"
            )
    if config.get("is_causal", True) is not True:
        raise ValueError(
            f"expected is_causal true in config.json, got {short(config['is_causal'])}; "
            + REFUSED["use_bidirectional_attention"]
        )
    family = config["model_type"]
    gemma = family == "gemma3_text"
    width, heads = (_positive(config, key, int) for key in ("hidden_size", "num_attention_heads"))
    kv_heads = _positive(config, "num_key_value_heads", int, heads)
    head_width = _positive(config, "head_dim", int, width // heads)
    if heads % kv_heads or head_width % 2:
        raise ValueError(
            "expected num_attention_heads to be a multiple of num_key_value_heads, and head_dim "
            f"even, in config.json, got {heads}, {kv_heads} and {head_width}; download it again"
        )
    rotary = _rotary(config)
    sliding = _sliding(config, rotary)
    capped = gemma and config.get("final_logit_softcapping") is not None
    scale = _positive(config, "query_pre_attn_scalar", float) if gemma else head_width
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=_positive(config, "vocab_size", int),
        width=width,
        mlp_width=_positive(config, "intermediate_size", int),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_width=head_width,
        context=_positive(config, "max_position_embeddings", int),
        norm_eps=_positive(config, "rms_norm_eps", float, 1e-6),
        activation=_activation(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope=_rope(config, "full_attention", head_width),
        rope_local=_rope(config, "sliding_attention", head_width),
        rotary=rotary,
        sliding=sliding,
        window=_positive(config, "sliding_window", int) if any(sliding) else 0,
        attention_scale=scale**-0.5,
        softcap=_positive(config, "final_logit_softcapping", float) if capped else None,
        qkv_bias=family == "qwen2" or (bias and family != "mistral"),
        output_bias=bias and family not in ("qwen2", "mistral"),
        mlp_bias=family in ("llama", "smollm3") and bool(config.get("mlp_bias", False)),
    )


def flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's own keys, with the defaults of its family filled in."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"expected model_type to be one of {', '.join(FAMILIES)}, got {short(family)}; "
            "this architecture is not built in: use a model of one of these families"
        )
    if family == "gemma3":
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise ValueError(
                f"expected an object text_config in a gemma3 config.json, got {short(text)}; "
                "download it again"
            )
        outer = {key: raw[key] for key in OUTER if raw.get(key) is not None}
        raw, family = {**text, **outer, "model_type": "gemma3_text"}, "gemma3_text"
    return {**DEFAULTS[family], **raw}


def _positive(
    config: Mapping[str, Any], key: str, kind: type[Number], default: Number | None = None
) -> Number:
    """The number at `key`; `default` stands for one that is missing or null."""
    value = default if config.get(key) is None else config[key]
    allowed = int if kind is int else int | float
    least, most = (1, LARGEST.get(key, 2**62)) if kind is int else (1e-30, 1e30)
    if isinstance(value, bool) or not isinstance(value, allowed) or not least <= value <= most:
        raise ValueError(
            f"expected a positive {'whole number' if kind is int else 'number'} {key} in "
            f"config.json, at most {most:,}, got {short(value)}; download the model again, or add the "
            "key"
        )
    return kind(value)


def _activation(config: Mapping[str, Any]) -> str:
    key = "hidden_activation" if config["model_type"] == "gemma3_text" else "hidden_act"
    if config[key] not in ACTIVATIONS:
        raise ValueError(
            f"expected {key} in config.json to be one of {', '.join(ACTIVATIONS)}, "
            f"got {short(config[key])}; use another model"
        )
    return str(config[key])


def _rope(
    config: Mapping[str, Any], layers: str, head_width: int
) -> tuple[tuple[float, ...], float]:
    """Radians per token of each pair, and the scale, of the layers of a kind."""
    settings = _rope_settings(config, layers)
    for parts in (config, settings):
        if parts.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(
                "expected partial_rotary_factor 1 in config.json, got "
                f"{short(parts['partial_rotary_factor'])}; only whole heads are turned: use another model"
            )
    local = config["model_type"] == "gemma3_text" and layers == "sliding_attention"
    old = _positive(config, "rope_local_base_freq" if local else "rope_theta", float, 10000.0)
    theta, kind = _positive(settings, "rope_theta", float, old), _rope_type(settings)
    speeds = _rope_numbers(config, settings, kind)
    scales = {key: speeds.pop(key) for key in SCALES if key in speeds}
    scale = scales.pop("attention_factor", None)  # takes the place of the other two
    if kind == "yarn" and scale is None:
        scale = rope.yarn_scale(speeds["factor"], **scales)
    try:
        frequency_P = ROPE_TYPES[kind](theta=theta, head_width=head_width, **speeds)
    except (ArithmeticError, RuntimeError) as error:  # rope_theta within 1e-12 of 1
        raise ValueError(
            f"expected settings of RoPE that give finite angles in config.json, got {error}; "
            "download it again"
        ) from error
    return tuple(frequency_P.tolist()), 1.0 if scale is None else scale


def _rope_settings(config: Mapping[str, Any], layers: str) -> dict[str, Any]:
    """The object with the RoPE settings of the layers of a kind, under its new or its old name."""
    new, old = (config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if (new and old) or not (isinstance(new, dict) and isinstance(old, dict)):
        raise ValueError(
            "expected one object rope_parameters or rope_scaling in config.json, got "
            f"{short(new)} and {short(old)}; keep the one that the model was trained with"
        )
    gemma = config["model_type"] == "gemma3_text"
    nested = {"full_attention", "sliding_attention"} & {*new, *old}
    mixed = new and gemma and not isinstance(new.get(layers), dict)
    if mixed or (nested and not (new and gemma)):
        raise ValueError(
            f"expected rope_parameters {f'for {layers}' if gemma else 'of all layers'} in "
            f"config.json, got {short(new or old)}; download it again"
        )
    if gemma and "type" in old and "rope_type" not in old:
        raise ValueError(
            f"expected rope_type in rope_scaling of a Gemma 3 config.json, got {short(old)}; some "
            "versions of transformers overlook type alone there: name it rope_type"
        )
    if gemma and (new or layers == "sliding_attention"):  # the old name is for full layers only
        return dict(new.get(layers, {}))
    return {**new, **old}


def _rope_type(settings: Mapping[str, Any]) -> str:
    """The type of RoPE; refuses types, and settings of a type, that are not built in."""
    named = [settings[key] for key in ("rope_type", "type") if settings.get(key) is not None]
    kind = named[0] if named else "default"
    if kind not in tuple(ROPE_KEYS) or any(name != kind for name in named):
        raise ValueError(
            f"expected one rope_type out of {', '.join(ROPE_KEYS)} in config.json, got "
            f"{short(settings)}; other ways to scale positions are not built in: use another model"
        )
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_KEYS[kind])
    other = [key for key, value in settings.items() if key not in known and value is not None]
    if other:
        raise ValueError(
            f"expected no settings of RoPE but {', '.join(known)} with rope_type {kind!r} in "
            f"config.json, got {', '.join(other)[:200]}; take out what the model was not trained with"
        )
    return str(kind)


def _rope_numbers(
    config: Mapping[str, Any], settings: Mapping[str, Any], kind: str
) -> dict[str, Any]:
    """What this type of RoPE reads, by its name, apart from keys that are missing or null."""
    gemma, places = config["model_type"] == "gemma3_text", [settings]
    if not gemma:
        places = [config, settings]  # the outer key wins, as in `transformers`
    given = [place[ORIGINAL] for place in places if place.get(ORIGINAL) is not None]
    settings = {**settings, ORIGINAL: (*given, config["max_position_embeddings"])[0]}
    numbers: dict[str, Any] = {
        key: _positive(settings, key, int if key == ORIGINAL else float)
        for key in ROPE_KEYS[kind]
        if key != "truncate" and (key in REQUIRED or settings.get(key) is not None)
    }
    if kind == "yarn":
        numbers["truncate"] = settings.get("truncate", True)
        if numbers["truncate"] not in ((True,) if gemma else (True, False)):
            raise ValueError(
                f"expected truncate true{'' if gemma else ' or false'} in the RoPE settings of "
                f"config.json, got {short(numbers['truncate'])}; transformers reads no other value here"
            )
    return numbers


def _rotary(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Per layer, whether it has RoPE. In SmolLM3 some layers have none."""
    layers = _positive(config, "num_hidden_layers", int)
    if config["model_type"] != "smollm3":
        return (True,) * layers
    given = config.get("no_rope_layers")
    if given is None:
        every = _positive(config, "no_rope_layer_interval", int)
        return tuple((i + 1) % every != 0 for i in range(layers))
    if not isinstance(given, list) or len(given) < layers or any(x not in (0, 1) for x in given):
        raise ValueError(
            f"expected no_rope_layers in config.json to be 1 (RoPE) or 0 (none) for each of {layers} "
            f"layers, got {short(given)}; download it again"
        )
    return tuple(x == 1 for x in given[:layers])


def _sliding(config: Mapping[str, Any], rotary: tuple[bool, ...]) -> tuple[bool, ...]:
    """Per layer, whether it sees only the last tokens."""
    given, allowed, layers = config.get("layer_types"), _layer_types(config), len(rotary)
    if given is None:
        if len(allowed) == 1:
            return (allowed[0] == "sliding_attention",) * layers
        return tuple(_slides(config, i, rotary=rotary[i]) for i in range(layers))
    if not isinstance(given, list) or len(given) != layers or any(x not in allowed for x in given):
        raise ValueError(
            f"expected {layers} layer_types out of {', '.join(allowed)} in config.json, as its "
            f"sliding_window and use_sliding_window say, got {short(given)}; use another model"
        )
    return tuple(kind == "sliding_attention" for kind in given)


def _layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of layers that a family can have with its settings of the window."""
    family, full, sliding = config["model_type"], "full_attention", "sliding_attention"
    if family == "gemma3_text":
        return full, sliding
    if family == "llama" or config.get("sliding_window") is None:
        return (full,)
    if family == "mistral":
        return (sliding,)
    return (full, sliding) if config.get("use_sliding_window") else (full,)


def _slides(config: Mapping[str, Any], layer: int, *, rotary: bool) -> bool:
    """Whether a layer slides where `layer_types` does not say it: each family has its own rule."""
    if config["model_type"] == "gemma3_text":
        return (layer + 1) % _positive(config, "sliding_window_pattern", int, 6) != 0
    if config["model_type"] == "smollm3":
        return not rotary
    first = config["max_window_layers"]  # Qwen
    if type(first) is not int or first < 0:
        raise ValueError(
            "expected a whole number max_window_layers, 0 or above, in config.json, "
            f"got {short(first)}; download it again"
        )
    return layer >= first
