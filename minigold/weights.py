# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder in, a `Decoder` out, and back.

Tensors keep their names, so that loading and saving are plain copies.
Not here: config.json (`families.py`), the decoder (`model.py`), tokenizers and templates (`load.py`), quantized weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigold.families import flat, model_config
from minigold.model import Decoder

__all__ = [
    "check_fit",
    "copy_tokenizer",
    "load_decoder",
    "own_name",
    "read_json",
    "read_tensors",
    "save_decoder",
]

COPIED = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
OUTSIDE = ("vision_tower.", "multi_modal_projector.")  # parts of nested Gemma 3 that read images


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
    raw = read_json(folder / "config.json")
    with torch.device("meta"):
        decoder = Decoder(model_config(raw))
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for stored, tensor in read_tensors(path, device=device, dtype=dtype):
            name = own_name(stored, nested=raw["model_type"] == "gemma3")
            if name in found:
                raise ValueError(
                    f"expected each tensor once, got {stored} again in {path}; "
                    "keep only the shards of one model"
                )
            if name:
                found[name] = tensor
    if decoder.config.tied:
        _drop_repeated_head(found, folder)
    check_fit(found, decoder.state_dict(), folder)
    decoder.load_state_dict(found, assign=True)
    return decoder.eval()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a model folder."""
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
    shards = read_json(index).get("weight_map")
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


def read_tensors(
    path: Path, *, device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file; on the device `meta` nothing but shapes is read."""
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


def own_name(name: str, *, nested: bool) -> str:
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


def check_fit(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    folder: Path,
    *,
    of: str = "config.json",
) -> None:
    """Refuses tensors that are missing, unexpected, or of another shape than `of` says."""
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
                f"expected the tensors of {of} in {folder}, got {len(names)} {what}: "
                f"{listed}; the weights and {of} are not of the same model"
            )


def save_decoder(
    decoder: Decoder, folder: str | Path, *, source: str | Path, base: Path | None = None
) -> None:
    """Writes a Hugging Face folder that `transformers` and `load_decoder` read.

    config.json is that of `base`, or of `source`, with the dtype of the weights (of nested Gemma 3
    only the text model); tokenizer, template and generation files are copied from `source`.

    Raises:
        ValueError: `folder` is `source` itself.
    """
    folder, source = Path(folder), Path(source)
    if folder.resolve() == source.resolve():
        raise ValueError(f"expected a folder other than the source {source}; save beside it")
    raw = read_json((base or source) / "config.json")
    if raw["model_type"] == "gemma3":
        raw = {**flat(raw), "architectures": ["Gemma3ForCausalLM"]}
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    raw[key] = str(decoder.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.detach().contiguous() for name, x in decoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    copy_tokenizer(source, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies tokenizer, template and generation files."""
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
