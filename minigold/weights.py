# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder in, a `Decoder` out, and back.

config.json becomes a `ModelConfig`; what the decoder does not do is refused there by its name.
Tensors keep their names, so that loading and saving are plain copies.
Not here: the decoder (`model.py`), tokenizers and templates (`load.py`), quantized weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigold.model import Decoder, ModelConfig

__all__ = ["FAMILIES", "load_decoder", "model_config", "save_decoder"]

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
REFUSED = {  # what only works when it is off, and what to do where it is on
    "quantization_config": "dequantize the weights to a float type first",
    "attn_logit_softcapping": "soft-capped attention is not built in: use another model",
    "use_bidirectional_attention": "only causal attention is built in: use another model",
    "use_sliding_window": "sliding windows are built in for Gemma 3 only: use another model",
    "attention_dropout": "dropout is not built in: set it to 0",
}
COPIED = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
OUTER = ("quantization_config", "tie_word_embeddings", "eos_token_id")  # nested Gemma 3: win
OUTSIDE = ("vision_tower.", "multi_modal_projector.")  # parts of nested Gemma 3 that read images

Number = TypeVar("Number", int, float)


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads the object of a config.json.

    Raises:
        ValueError: an unknown family, a key that is missing or out of range, or something that
            the decoder does not do (RoPE scaling, sliding windows outside Gemma, soft-capped or
            bidirectional attention, dropout, quantized weights).
    """
    config = _flat(raw)
    for key, remedy in REFUSED.items():
        if config.get(key):
            raise ValueError(f"expected {key} off in config.json, got {config[key]!r}; {remedy}")
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
    sliding = _sliding(config)
    capped = gemma and config.get("final_logit_softcapping") is not None
    scale = _positive(config, "query_pre_attn_scalar", float) if gemma else head_width
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=_positive(config, "vocab_size", int),
        width=width,
        mlp_width=_positive(config, "intermediate_size", int),
        n_layers=len(sliding),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_width=head_width,
        context=_positive(config, "max_position_embeddings", int),
        norm_eps=_positive(config, "rms_norm_eps", float, 1e-6),
        activation=_activation(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=_rope_theta(config, "full_attention"),
        rope_theta_local=_rope_theta(config, "sliding_attention"),
        sliding=sliding,
        window=_positive(config, "sliding_window", int) if any(sliding) else 0,
        attention_scale=scale**-0.5,
        softcap=_positive(config, "final_logit_softcapping", float) if capped else None,
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
                f"expected an object text_config in a gemma3 config.json, got {text!r}; "
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
    if isinstance(value, bool) or not isinstance(value, allowed) or not value > 0:
        raise ValueError(
            f"expected a positive {'whole number' if kind is int else 'number'} {key} in "
            f"config.json, got {value!r}; download the model again, or add the key"
        )
    return kind(value)


def _activation(config: Mapping[str, Any]) -> str:
    key = "hidden_activation" if config["model_type"] == "gemma3_text" else "hidden_act"
    if config[key] not in ACTIVATIONS:
        raise ValueError(
            f"expected {key} in config.json to be one of {', '.join(ACTIVATIONS)}, "
            f"got {config[key]!r}; use another model"
        )
    return str(config[key])


def _rope_theta(config: Mapping[str, Any], kind: str) -> float:
    """The RoPE base of a kind of layer, from `rope_parameters` or the older keys."""
    gemma, rope = config["model_type"] == "gemma3_text", config.get("rope_parameters") or {}
    if rope and gemma != (kind in rope):
        raise ValueError(
            f"expected rope_parameters {f'for {kind}' if gemma else 'of all layers'} in config.json, "
            f"got {rope!r}; download it again"
        )
    rope = (rope.get(kind) or {}) if gemma else rope
    if kind == "full_attention":
        rope = {**rope, **(config.get("rope_scaling") or {})}
    types = {rope.get("rope_type", "default"), rope.get("type", "default")}  # new and old key
    if types != {"default"} or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"expected rope_type 'default' on whole heads in config.json, got {rope!r}; "
            "scaled positions are not built in: use a model without RoPE scaling"
        )
    old = "rope_local_base_freq" if gemma and kind == "sliding_attention" else "rope_theta"
    return _positive(rope, "rope_theta", float, _positive(config, old, float, 10000.0))


def _sliding(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Per layer, whether it sees only the last tokens."""
    gemma, kinds = config["model_type"] == "gemma3_text", config.get("layer_types")
    layers = _positive(config, "num_hidden_layers", int)
    if kinds is None:
        every = _positive(config, "sliding_window_pattern", int, 6)
        return tuple(gemma and (i + 1) % every != 0 for i in range(layers))
    allowed = ["full_attention", "sliding_attention"] if gemma else ["full_attention"]
    if len(kinds) != layers or not all(kind in allowed for kind in kinds):
        raise ValueError(
            f"expected {layers} layer_types out of {', '.join(allowed)} in config.json, "
            f"got {kinds!r}; use another model"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def load_decoder(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """Reads config.json and model.safetensors, or the shards that its index names.

    On the device `meta` names, shapes and types are checked alike, but no weight is read.

    Raises:
        FileNotFoundError: the folder, config.json, the weights or a shard are missing.
        ValueError: a file that cannot be read, an architecture that is not built in, or tensors
            that do not fit it by name, shape or type.
    """
    folder = Path(folder)
    raw = _read_json(folder / "config.json")
    with torch.device("meta"):
        decoder = Decoder(model_config(raw))
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for stored, tensor in _tensors(path, device=device, dtype=dtype):
            name = _own_name(stored, nested=raw["model_type"] == "gemma3")
            if name in found:
                raise ValueError(
                    f"expected each tensor once, got {stored} again in {path}; "
                    "keep only the shards of one model"
                )
            if name:
                found[name] = tensor
    if decoder.config.tied:
        _drop_repeated_head(found, folder)
    _check_fit(found, decoder.state_dict(), folder)
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
        raise ValueError(
            f"expected an object weight_map of file names in {index}, got {shards!r}; "
            "download it again"
        )
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
    shapes_only = torch.device(device).type == "meta"
    try:
        with safe_open(path, framework="pt", device="cpu" if shapes_only else str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (a file is no dict)
                part = file.get_slice(name)
                kind = part.get_dtype()
                if kind not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"expected float tensors, got {name} of type {kind} in {path}; "
                        "dequantize the weights first"
                    )
                if shapes_only:
                    yield name, torch.empty(part.get_shape(), dtype=dtype, device="meta")
                else:
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


def _drop_repeated_head(found: dict[str, Tensor], folder: Path) -> None:
    """A tied head may be stored all the same; then it must repeat the embedding."""
    head = found.pop("lm_head.weight", None)
    embedding = found.get("model.embed_tokens.weight")
    if head is not None and head.is_meta:
        return
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise ValueError(
            f"expected lm_head.weight in {folder} to equal the embedding, as tie_word_embeddings "
            "says, got another; set tie_word_embeddings to false in config.json"
        )


def _check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], folder: Path) -> None:
    """Refuses tensors that are missing, unexpected, or of another shape than config.json says."""
    shapes = {
        f"{name} {list(found[name].shape)} for {list(wanted[name].shape)}"
        for name in found.keys() & wanted.keys()
        if found[name].shape != wanted[name].shape
    }
    wrong = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": shapes,
    }
    for what, names in wrong.items():
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(
                f"expected the tensors of config.json in {folder}, got {len(names)} {what}: "
                f"{listed}; the weights and config.json are not of the same model"
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
