# SPDX-License-Identifier: Apache-2.0
"""Small random models of each family, alone or with one of the test tokenizers."""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from minigold.families import model_config
from minigold.load import LanguageModel
from minigold.model import Decoder, ModelConfig

FAMILIES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma3_text")
# RoPE for texts of more than 12 tokens: `raw_config("llama yarn")`. With heads of 16 and a base of
# 50 each type has pairs that it keeps, that it slows down, and that lie between.
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 1.5,
               "original_max_position_embeddings": 12},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12,
             "beta_fast": 1.5, "beta_slow": 0.3},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 12,
                    "mscale": 1.3, "mscale_all_dim": 0.6, "beta_fast": 2, "beta_slow": 0.1},
    "yarn-attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7,
                              "original_max_position_embeddings": 12},
}  # fmt: skip
SCALED = ("llama llama3", "smollm3 yarn", "mistral yarn-mscale", "gemma3_text linear")  # some
SHARED: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 200,
    "tie_word_embeddings": True,
}


def raw_config(family: str, vocab_size: int = 41, **changes: Any) -> dict[str, Any]:
    """The object of a config.json; `gemma3` is the text model nested beside one for images.

    A word behind the family is one of `SCALINGS`.
    """
    family, _, scaling = family.partition(" ")
    if scaling:
        changes = {"head_dim": 16, "rope_theta": 50.0, "rope_scaling": SCALINGS[scaling], **changes}
    if family == "gemma3":
        return {
            "model_type": family,
            "text_config": raw_config("gemma3_text", vocab_size, **changes),
            "vision_config": {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
                              "num_attention_heads": 2, "image_size": 4, "patch_size": 2,
                              "vision_use_head": False, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        }  # fmt: skip
    raw = {"model_type": family, "vocab_size": vocab_size, **SHARED}
    if family == "gemma3_text":
        raw |= {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 6,
        }
    if family == "mistral":
        raw |= {"sliding_window": 4}
    if family == "smollm3":  # the layer without RoPE slides
        raw |= {"sliding_window": 4, "use_sliding_window": True, "no_rope_layers": [1, 0],
                "pad_token_id": 0}  # fmt: skip
    return {**raw, **changes}


def tiny_config(family: str, vocab_size: int) -> ModelConfig:
    return model_config(raw_config(family, vocab_size))


def hugging_face_model(raw: dict[str, Any], seed: int = 0) -> Any:
    """What `transformers` makes of a config.json, with random weights in every tensor."""
    import transformers

    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(deepcopy(raw))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@lru_cache(maxsize=16)
def tiny_decoder(family: str, vocab_size: int = 41, seed: int = 0) -> Decoder:
    """Random weights large enough that the predictions differ from uniform; do not train it."""
    return new_decoder(family, vocab_size, seed)


def new_decoder(family: str, vocab_size: int = 41, seed: int = 0) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = Decoder(tiny_config(family, vocab_size))
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.3)
    return decoder


def tiny_model(
    family: str, tokenizer: Tokenizer, *, end: str, seed: int = 0, extra_ends: tuple[str, ...] = ()
) -> LanguageModel:
    """A random model around a tokenizer, without a template; the head is padded by three rows."""
    n = tokenizer.get_vocab_size()
    decoder = new_decoder(family, n + 3, seed)
    decoder.n_tokens = n
    ends = [tokenizer.token_to_id(name) for name in (end, *extra_ends)]
    return LanguageModel(
        name=f"tiny-{family}",
        folder=Path("nowhere"),
        decoder=decoder,
        tokenizer=tokenizer,
        template=None,
        bos_token="",
        eos_token=end,
        eos_ids=tuple(ends),
        end_id=ends[0],
        context=200,
        n_tokens=n,
    )
