# SPDX-License-Identifier: Apache-2.0
"""Complete Hugging Face folders of a few kilobytes, and edits that spoil or vary one file."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer

from tiny_models import SHARED, new_decoder

__all__ = ["CHATML", "TURNS", "edit_json", "tiny_folder"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 6,
}
LLAMA = {"architectures": ["LlamaForCausalLM"]}


def tiny_folder(
    folder: Path,
    family: str,
    tokenizer: Tokenizer,
    *,
    end: str,
    begin: str | None = None,
    template: str | None = None,
    rows: int | None = None,
    seed: int = 0,
) -> Path:
    """Random weights; `rows` of the embedding, by default three more than the tokenizer has ids.

    The family `gemma3` nests the text model, as the models that read images do.
    """
    folder.mkdir(parents=True)
    nested = family == "gemma3"
    family = "gemma3_text" if nested else family
    rows = rows or tokenizer.get_vocab_size() + 3
    config = {"model_type": family, "vocab_size": rows, **SHARED}
    config |= GEMMA if family == "gemma3_text" else LLAMA
    weights = new_decoder(family, rows, seed).state_dict()
    if nested:
        config = {"model_type": "gemma3", "text_config": config}
        weights = {f"language_model.{name}": tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": begin, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, value in (
        ("config", config),
        ("tokenizer_config", tokens),
        ("generation_config", {"eos_token_id": tokenizer.token_to_id(end)}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of an object in a file; `...` takes a key away. The file may be missing."""
    old = json.loads(path.read_text("utf-8")) if path.exists() else {}
    new = {key: value for key, value in {**old, **changes}.items() if value is not ...}
    path.write_text(json.dumps(new), "utf-8")
