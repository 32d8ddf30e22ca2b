# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: a decoder in, the same with a few weights to train out; files of `peft`, both ways.

The matrix W of a linear layer is used as W + (alpha / rank) B A, with A [rank, in] and B [out, rank]. B
begins at zero, so that nothing changes at first, and all but A and B is frozen.

Source: Hu et al. 2021, LoRA, arXiv:2106.09685; the scale and the start of A as in `peft`.
Differs: adapters of linear layers alone, one rank for all, no dropout. What else an adapter_config.json
asks for is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minigold.data import own_file, short
from minigold.model import MATRICES, Decoder
from minigold.packed import Linear
from minigold.weights import check_fit, copy_tokenizer, own_name, read_json, read_tensors

__all__ = [
    "SETTINGS",
    "AdaptedLinear",
    "Adapter",
    "adapt",
    "adapter_of",
    "load_adapter",
    "merge",
    "new_tensors",
    "read_settings",
    "save_adapter",
]

SETTINGS, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
VISION = r".*vision_tower.*"  # nested Gemma 3: layers for images, which bear the same names
LARGEST = 2**31  # above any rank or alpha; torch has no shapes for some of what a file can ask
HARMLESS = (  # what changes nothing of an adapter that is only read
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "r", "target_modules",
)  # fmt: skip
ASKED: dict[str, tuple[Any, ...]] = {  # what else may be on
    "peft_type": ("LORA",), "task_type": ("CAUSAL_LM",), "bias": ("none",),
    "init_lora_weights": (True, "gaussian"), "exclude_modules": (VISION,),
}  # fmt: skip


class Adapter(NamedTuple):
    """`targets`: the layers that have one, names out of `MATRICES` in that order."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


class AdaptedLinear(Linear):
    """A linear layer whose matrix W is used as W + (alpha / rank) B A.

    Args:
        first, second: A [rank, in] and B [out, rank].
    """

    def __init__(self, layer: Linear, alpha: float, first: Tensor, second: Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias, self.alpha, self.rank = layer.weight, layer.bias, alpha, len(first)
        self.lora_A = nn.Linear(layer.in_features, self.rank, bias=False, device="meta")
        self.lora_B = nn.Linear(self.rank, layer.out_features, bias=False, device="meta")
        self.lora_A.weight = nn.Parameter(first.to(layer.weight.device))
        self.lora_B.weight = nn.Parameter(second.to(layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, out] of [B, S, in]; A and B work in their own type, as in `peft`."""
        whole = super().forward(x)
        change = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))
        return torch.add(whole, change, alpha=self.alpha / self.rank).to(whole.dtype)

    def merged(self) -> Linear:
        """The same as one matrix."""
        change = self.lora_B.weight @ self.lora_A.weight
        whole = torch.add(self.weight, change, alpha=self.alpha / self.rank)
        layer = Linear(self.in_features, self.out_features, device="meta")
        layer.weight = nn.Parameter(whole.detach().to(self.weight.dtype))
        layer.bias = self.bias
        return layer


def adapter_of(decoder: nn.Module) -> Adapter | None:
    """What a decoder has beside its own weights; an adapter of `peft` is none of these."""
    found = {n: one for n, one in decoder.named_modules() if isinstance(one, AdaptedLinear)}
    if not found:
        return None
    one, names = next(iter(found.values())), {name.rpartition(".")[2] for name in found}
    return Adapter(one.rank, one.alpha, tuple(name for name in MATRICES if name in names))


def _layers(decoder: Decoder, targets: tuple[str, ...]) -> dict[str, Linear]:
    return {
        name: layer
        for name, layer in decoder.named_modules()
        if isinstance(layer, Linear) and name.rpartition(".")[2] in targets
    }


def new_tensors(decoder: Decoder, adapter: Adapter, *, seed: int) -> dict[str, Tensor]:
    """The start of an adapter by names in the decoder, drawn on the CPU, in float32.

    A is uniform within 1 / sqrt(in) of zero; B is zero.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, layer in _layers(decoder, adapter.targets).items():
        first = torch.empty(adapter.rank, layer.in_features)
        found[f"{name}.lora_A.weight"] = nn.init.kaiming_uniform_(
            first, a=math.sqrt(5), generator=generator
        )
        found[f"{name}.lora_B.weight"] = torch.zeros(layer.out_features, adapter.rank)
    return found


def adapt(decoder: Decoder, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Puts an adapter on a decoder that has none, in place, and freezes all the rest."""
    decoder.requires_grad_(False)
    for name, layer in _layers(decoder, adapter.targets).items():
        pair = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        decoder.set_submodule(name, AdaptedLinear(layer, adapter.alpha, *pair))


def merge(decoder: Decoder) -> None:
    """Puts the adapter into the matrices, in place; a decoder without one stays as it is."""
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, AdaptedLinear):
            decoder.set_submodule(name, layer.merged())


# -- files ---------------------------------------------------------------------------------------


def read_settings(folder: Path) -> tuple[Adapter, str]:
    """The adapter that an adapter_config.json tells of, and the name of its base model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it asks for what is not built in, or has numbers out of range.
    """
    path, raw = folder / SETTINGS, read_json(folder, SETTINGS)
    for key, value in raw.items():
        if value and key not in HARMLESS and value not in ASKED.get(key, ()):
            known = " or ".join(map(repr, ASKED[key])) if key in ASKED else "off"
            raise ValueError(
                f"expected {key} {known} in {path}, got {short(value)}; merge the adapter into its base with "
                "peft, and give that"
            )
    base, rank, alpha = (raw.get(k) for k in ("base_model_name_or_path", "r", "lora_alpha"))
    targets = raw.get("target_modules")
    if type(base) is not str or not base or raw.get("peft_type") != "LORA":
        raise ValueError(
            f"expected peft_type LORA and the name of a model as base_model_name_or_path in {path}, "
            f"got {short(raw.get('peft_type'))} and {short(base)}; name the base there"
        )
    if type(rank) is not int or not 0 < rank < LARGEST:
        raise ValueError(
            f"expected a whole number r above 0 in {path}, got {short(rank)}; download it again"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < LARGEST:
        raise ValueError(
            f"expected a finite number lora_alpha above 0 in {path}, got {short(alpha)}; download it again"
        )
    if not isinstance(targets, list) or not targets or any(x not in MATRICES for x in targets):
        raise ValueError(
            f"expected a list out of {', '.join(MATRICES)} as target_modules in {path}, got "
            f"{short(targets)}; merge the adapter into its base with peft, and give that"
        )
    return Adapter(rank, float(alpha), tuple(name for name in MATRICES if name in targets)), base


def load_adapter(decoder: Decoder, folder: Path) -> None:
    """Puts the adapter in a folder on a decoder, or its numbers into the adapter that is there.

    On a decoder on the device `meta` no tensor is read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: see `read_settings`; tensors that do not fit the decoder by name, shape or type.
    """
    adapter, base = read_settings(folder)
    there, path = adapter_of(decoder), own_file(folder, TENSORS)
    if not path.is_file():
        raise FileNotFoundError(f"expected {TENSORS} in {folder}, found none; download it")
    found: dict[str, Tensor] = {}
    for stored, tensor in read_tensors(path, device=decoder.device, dtype=torch.float32):
        name = own_name(stored.removeprefix(PREFIX), nested=True)
        if name in found:
            raise ValueError(
                f"expected each tensor once, got {stored[:200]} again in {path}; download it again"
            )
        found[name] = tensor
    found.pop("", None)  # of layers that read images
    wanted = {
        f"{name}.{part}.weight": torch.empty(shape, device="meta")
        for name, layer in _layers(decoder, adapter.targets).items()
        for part, shape in (
            ("lora_A", (adapter.rank, layer.in_features)),
            ("lora_B", (layer.out_features, adapter.rank)),
        )
    }
    check_fit(found, wanted, folder, of=f"{SETTINGS} for the base {base}")
    if there is None:
        adapt(decoder, adapter, found)
    elif there != adapter:
        raise ValueError(f"expected {there} in {folder}, got {adapter}; give that adapter's folder")
    else:
        decoder.load_state_dict(found, strict=False)


def save_adapter(
    decoder: Decoder, folder: Path, *, source: Path, base: str, base_folder: Path
) -> None:
    """Writes a decoder's adapter as a folder that `peft` and `load_adapter` read.

    Args:
        source: where tokenizer, template and generation files are copied from.
        base: what adapter_config.json names; made absolute if it is a folder.
        base_folder: where the base's config.json is.
    """
    adapter = adapter_of(decoder)
    assert adapter is not None
    nested = read_json(base_folder, "config.json")["model_type"] == "gemma3"
    place = Path(base).expanduser()
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(place.resolve()) if place.is_dir() else base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "target_modules": list(adapter.targets),
        "exclude_modules": VISION if nested else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }
    inner = f"{PREFIX}model.language_model." if nested else f"{PREFIX}model."
    weights = {
        inner + name.removeprefix("model."): x.detach().contiguous()
        for name, x in decoder.state_dict().items()
        if ".lora_" in name
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    copy_tokenizer(source, folder)
