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

from minigold.data import own_file, read_object, short
from minigold.families import flat, model_config
from minigold.model import Decoder, ModelConfig

__all__ = [
    "check_fit",
    "copy_tokenizer",
    "load_decoder",
    "own_name",
    "read_config",
    "read_json",
    "read_tensors",
    "save_decoder",
]

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "tokenizer.model",
)  # fmt: skip
HEADER = 2**24  # bytes of a safetensors header; those of real shards have less than 2**20
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
    raw, shape = read_config(folder)
    with torch.device("meta"):
        decoder = Decoder(shape)
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for stored, tensor in read_tensors(path, device=device, dtype=dtype):
            name = own_name(stored, nested=raw["model_type"] == "gemma3")
            if name in found:
                raise ValueError(
                    f"expected each tensor once, got {stored[:200]} again in {path}; "
                    "keep only the shards of one model"
                )
            if name:
                found[name] = tensor
    if decoder.config.tied:
        _drop_repeated_head(found, folder)
    check_fit(found, decoder.state_dict(), folder)
    decoder.load_state_dict(found, assign=True)
    return decoder.eval()


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """What config.json says, and the shape of the decoder that it means.

    Raises:
        FileNotFoundError, ValueError: as `load_decoder`.
    """
    raw = read_json(folder, "config.json")
    try:
        return raw, model_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a file of a model folder, after a look at where all files lie that a save would copy."""
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a model folder, found no folder {folder}")
    path, *_ = [own_file(folder, one) for one in (name, *COPIED)]
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {name} in {folder}, found none; give a Hugging Face model folder"
        )
    return read_object(path)


def _weight_files(folder: Path) -> list[Path]:
    single = own_file(folder, "model.safetensors")
    index = own_file(folder, "model.safetensors.index.json")
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"expected model.safetensors or {index.name} in {folder}, found neither; "
            "save the model again with save_pretrained of transformers"
        )
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise ValueError(
            f"expected an object weight_map of file names in {index}, got {short(shards)}; "
            "download it again"
        )
    files = []
    for shard in sorted(set(shards.values())):
        plain = Path(shard).name == shard and "\\" not in shard and len(shard) < 200
        if not plain or not shard.endswith(".safetensors"):
            raise ValueError(
                f"expected shards that lie beside {index} as .safetensors, got {short(shard)}; "
                "do not use an index that points out of its folder"
            )
        if not own_file(folder, shard).is_file():
            raise FileNotFoundError(
                f"expected shard {shard[:200]} in {folder}, as the index says, found none; download it"
            )
        files.append(folder / shard)
    return files


def read_tensors(
    path: Path, *, device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file; on the device `meta` nothing but shapes is read."""
    shapes_only = torch.device(device).type == "meta"
    with path.open("rb") as start:
        size = int.from_bytes(start.read(8), "little")
    if size > HEADER:
        raise ValueError(
            f"expected a whole safetensors file {path} with a header of at most {HEADER:,} bytes, "
            f"got {size:,}; download it again"
        )
    try:
        with safe_open(path, framework="pt", device="cpu" if shapes_only else str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (a file is no dict)
                part = file.get_slice(name)
                kind = part.get_dtype()
                if kind not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"expected float tensors, got {name[:200]} of type {kind} in {path}; "
                        "dequantize the weights first"
                    )
                if shapes_only:
                    yield name, torch.empty(part.get_shape(), dtype=dtype, device="meta")
                else:
                    yield name, file.get_tensor(name).to(dtype)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError) as error:  # the latter is torch's: sizes past 2**63
        raise ValueError(
            f"expected a whole safetensors file {path}, got {str(error)[:200]}; download it again"
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
            listed = ", ".join(name[:200] for name in sorted(names)[:3]) + (
                ", …" if len(names) > 3 else ""
            )
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
    raw = read_json(base or source, "config.json")
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
    for name in COPIED:
        path = source / name
        if path.is_file() and (path.suffix != ".model" or _is_sentencepiece(path)):
            shutil.copyfile(path, folder / name)


def _is_sentencepiece(path: Path) -> bool:
    """Its first field is a list of pieces; no pickle begins with that byte."""
    with path.open("rb") as file:
        return file.read(1) == b"\n"
