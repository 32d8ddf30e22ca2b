# SPDX-License-Identifier: Apache-2.0
"""Small random models of each family, alone or with one of the test tokenizers."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from minigold.load import LanguageModel
from minigold.model import Decoder, ModelConfig

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


def tiny_config(family: str, vocab_size: int) -> ModelConfig:
    raw = {"model_type": family, "vocab_size": vocab_size, **SHARED}
    if family == "gemma3_text":
        raw |= {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 6,
        }
    return ModelConfig.from_json(raw)


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
