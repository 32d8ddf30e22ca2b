# SPDX-License-Identifier: Apache-2.0
"""The decoder: `transformers`' logits and gradients, with a cache and without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigold.model import Decoder, Head
from minigold.weights import load_decoder
from tiny_models import (
    FAMILIES,
    SCALED,
    SCALINGS,
    hugging_face_model,
    new_decoder,
    raw_config,
    tiny_config,
    tiny_decoder,
)

EXACT = 2e-5  # float32, on logits of up to 10
LOCAL, FULL = "sliding_attention", "full_attention"
LENGTHS = torch.tensor([3, 1, 7, 5])  # of the prompts; windows are 4 tokens

CASES: dict[str, dict[str, Any]] = {
    "llama": raw_config("llama"),
    "llama untied": raw_config("llama", tie_word_embeddings=False),
    "llama with all heads": raw_config("llama", num_key_value_heads=4),
    "llama with null for the defaults": raw_config(
        "llama", hidden_size=24, head_dim=None, num_key_value_heads=None, rope_scaling=None
    ),
    "llama biases": raw_config("llama", attention_bias=True, mlp_bias=True),
    "llama rope_theta": raw_config("llama", rope_theta=300.0, rms_norm_eps=1e-2),
    "llama rope_parameters": raw_config(
        "llama", rope_parameters={"rope_type": "default", "rope_theta": 300.0}
    ),
    "llama rope_scaling that does not scale": raw_config(
        "llama", rope_theta=300.0, rope_scaling={"type": "default"}
    ),
    "mistral": raw_config("mistral"),
    "mistral untied": raw_config("mistral", tie_word_embeddings=False, rope_theta=300.0),
    "mistral without a window": raw_config(
        "mistral", sliding_window=None, hidden_size=24, head_dim=None
    ),
    "mistral with layer_types": raw_config("mistral", layer_types=[LOCAL] * 2),
    "mistral without biases": raw_config("mistral", attention_bias=True, mlp_bias=True),
    "smollm3": raw_config("smollm3"),
    "smollm3 untied": raw_config("smollm3", tie_word_embeddings=False, rope_theta=300.0),
    "smollm3 biases": raw_config("smollm3", attention_bias=True, mlp_bias=True),
    "smollm3 no_rope_layer_interval": raw_config(
        "smollm3", no_rope_layers=None, no_rope_layer_interval=2, num_hidden_layers=3
    ),
    "smollm3 with the default interval": raw_config(
        "smollm3", no_rope_layers=None, num_hidden_layers=4
    ),
    "smollm3 with more no_rope_layers": raw_config("smollm3", no_rope_layers=[0, 1, 1]),
    "smollm3 layer_types": raw_config("smollm3", layer_types=[LOCAL, FULL]),
    "smollm3 without a window": raw_config("smollm3", use_sliding_window=False),
    "qwen2": raw_config("qwen2", use_sliding_window=False, sliding_window=4),
    "qwen2 max_window_layers": raw_config(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen2 with one window for all": raw_config(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0
    ),
    "qwen2 with null for the window": raw_config(
        "qwen2", use_sliding_window=True, sliding_window=None, max_window_layers=0
    ),
    "qwen2 untied": raw_config("qwen2", tie_word_embeddings=False, rope_theta=300.0),
    "qwen2 with all heads": raw_config("qwen2", num_key_value_heads=None),
    "qwen3": raw_config("qwen3"),
    "qwen3 untied": raw_config("qwen3", tie_word_embeddings=False, layer_types=[FULL] * 2),
    "qwen3 layer_types": raw_config(
        "qwen3", use_sliding_window=True, sliding_window=4, layer_types=[LOCAL, FULL]
    ),
    "qwen3 biases": raw_config("qwen3", attention_bias=True, hidden_act="gelu_pytorch_tanh"),
    "gemma3": raw_config("gemma3_text", query_pre_attn_scalar=11),
    "gemma3 untied, biases": raw_config(
        "gemma3_text", tie_word_embeddings=False, attention_bias=True
    ),
    "gemma3 softcap": raw_config("gemma3_text", final_logit_softcapping=2.0),
    "gemma3 rope_theta": raw_config("gemma3_text", rope_theta=300.0, rope_local_base_freq=20.0),
    "gemma3 rope_parameters": raw_config(
        "gemma3_text",
        rope_parameters={
            FULL: {"rope_type": "default", "rope_theta": 300.0},
            LOCAL: {"rope_type": "default", "rope_theta": 20.0},
        },
    ),
    "gemma3 sliding_window_pattern": raw_config(
        "gemma3_text", layer_types=None, num_hidden_layers=3, sliding_window_pattern=2
    ),
    "gemma3 without sliding layers": raw_config(
        "gemma3_text", layer_types=[FULL] * 2, rope_parameters=None
    ),
    "gemma3 nested": raw_config("gemma3", query_pre_attn_scalar=11),
}


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    """Never 0: `transformers` trains no embedding for its padding id."""
    return torch.randint(1, 41, shape, generator=torch.Generator().manual_seed(seed))


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


# ------------------------------------------------------------------------- transformers
@pytest.mark.parametrize("written", ["by transformers", "as given"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(case: str, written: str, tmp_path: Path) -> None:
    model = hugging_face_model(CASES[case])
    model.save_pretrained(tmp_path)
    if written == "as given":  # as older versions wrote it, with fewer keys
        (tmp_path / "config.json").write_text(json.dumps(CASES[case]), "utf-8")
    decoder = load_decoder(tmp_path)
    ids_BS = some_ids(3, 17)
    error = largest(decoder.head.logits(decoder(ids_BS)) - model(ids_BS).logits)
    assert error <= EXACT


def spellings(family: str, scaling: str) -> list[dict[str, Any]]:
    """RoPE settings as newer and as older versions of `transformers` write them."""
    old = raw_config(f"{family} {scaling}")
    settings, theta = old["rope_scaling"], old["rope_theta"]
    older = {"type" if key == "rope_type" else key: x for key, x in settings.items()}
    new: dict[str, Any] = {**settings, "rope_theta": theta}
    if family == "gemma3_text":
        new = {FULL: new, LOCAL: {"rope_type": "default", "rope_theta": 10000.0}}
    rest = {key: x for key, x in old.items() if not key.startswith("rope")}
    both = {**settings, "type": settings["rope_type"], "partial_rotary_factor": 1.0}
    found = [{**rest, "rope_parameters": new}, old, {**old, "rope_scaling": both}]
    if family != "gemma3_text":  # there `transformers` 5 overlooks `type`, and we refuse it
        found.append({**old, "rope_scaling": older})
    return found


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scaled_positions_equal_those_of_transformers(
    family: str, scaling: str, tmp_path: Path
) -> None:
    ids_BS = some_ids(3, 31)
    raw, *others = spellings(family, scaling)
    model = hugging_face_model(raw)
    model.save_pretrained(tmp_path)
    truth_BSV = model(ids_BS).logits
    for config in (None, raw, *others):
        if config is not None:
            assert largest(hugging_face_model(config)(ids_BS).logits - truth_BSV) == 0
            (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
        decoder = load_decoder(tmp_path)
        assert largest(decoder.head.logits(decoder(ids_BS)) - truth_BSV) <= EXACT


@pytest.mark.parametrize("changes", [
    {"rope_scaling": {**SCALINGS["yarn"], "truncate": False}},
    {"rope_scaling": {**SCALINGS["yarn"], "truncate": True, "attention_factor": None}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 12},
    {"rope_scaling": SCALINGS["yarn"], "original_max_position_embeddings": 7},
    {"rope_scaling": SCALINGS["llama3"], "original_max_position_embeddings": 7},
    {"rope_scaling": {**SCALINGS["linear"], "rope_theta": 300.0}},
])  # fmt: skip
@torch.no_grad()
def test_rare_settings_of_positions_are_read_as_transformers_reads_them(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    ids_BS, raw = some_ids(3, 31), raw_config("llama yarn", **changes)
    model, plain = hugging_face_model(raw), hugging_face_model(raw_config("llama yarn"))
    model.save_pretrained(tmp_path)
    truth_BSV = model(ids_BS).logits
    assert (
        changes["rope_scaling"].get("truncate") or largest(plain(ids_BS).logits - truth_BSV) > 0.01
    )
    for config in (None, raw):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
        decoder = load_decoder(tmp_path)
        assert largest(decoder.head.logits(decoder(ids_BS)) - truth_BSV) <= EXACT


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
@torch.no_grad()
def test_bfloat16_is_as_near_to_the_truth_as_transformers(family: str, tmp_path: Path) -> None:
    ids_BS, squares, reference_squares = some_ids(3, 17), 0.0, 0.0
    for seed in range(4):
        model = hugging_face_model(raw_config(family), seed)
        model.save_pretrained(tmp_path)
        decoder = load_decoder(tmp_path, dtype=torch.bfloat16)
        truth = model(ids_BS).logits
        squares += float((decoder.head.logits(decoder(ids_BS)) - truth).square().mean())
        reference_squares += float((model.bfloat16()(ids_BS).logits - truth).square().mean())
    assert (squares / 4) ** 0.5 <= 0.05  # logits of up to 7
    assert squares <= 1.5 * reference_squares


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_gradients_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = hugging_face_model(raw_config(family))
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    ids_BS = some_ids(3, 17)
    for logits in (model(ids_BS).logits, decoder.head.logits(decoder(ids_BS))):
        logits.log_softmax(-1)[..., 5].mean().backward()
    got = {name: x.grad for name, x in decoder.named_parameters()}
    assert got.keys() == {name for name, _ in model.named_parameters()}
    for name, x in model.named_parameters():
        error = largest(got[name] - x.grad)
        assert error <= EXACT * largest(x.grad), name


# ---------------------------------------------------------------------------- positions
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it(family: str) -> None:
    model, ids_BS = tiny_decoder(family), some_ids(4, 7)
    hidden_BSD = model(ids_BS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone_1SD = model(ids_BS[row : row + 1, :length])
        error = largest(hidden_BSD[row, :length] - alone_1SD[0])
        assert error <= EXACT


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
@torch.no_grad()
def test_a_cache_changes_nothing(family: str, step: int) -> None:
    """Prompts of different lengths, several tokens a pass, rows that leave, rows that are copied."""
    model, ids_BS = tiny_decoder(family), some_ids(4, 19)
    whole_BSD = model(ids_BS)
    cache, length_B, rows = model.empty_cache(4, 22), LENGTHS, torch.arange(4)
    prompt_BSD = model(ids_BS[:, :7], cache)
    for row, length in enumerate(LENGTHS.tolist()):
        error = largest(prompt_BSD[row, :length] - whole_BSD[row, :length])
        assert error <= EXACT
    cache.cut(LENGTHS)
    while int(length_B.max()) + step <= 19:
        place = rows[:, None], length_B[:, None] + torch.arange(step)
        error = largest(model(ids_BS[place], cache) - whole_BSD[place])
        assert error <= EXACT
        length_B = length_B + step
        if len(rows) == 4 and int(length_B.max()) >= 12:  # past the window
            kept = torch.tensor([0, 2])
            cache.keep(kept)
            rows, length_B = rows[kept], length_B[kept]
        elif len(rows) == 2:
            copies, order = model.empty_cache(3, 22), torch.tensor([1, 0, 1])
            copies.fill(torch.tensor([2, 0, 1]), cache, order)
            back = order[torch.tensor([1, 2, 0])]
            cache, rows, length_B = copies, rows[back], length_B[back]
    assert len(rows) == 3


def test_rows_of_a_cache_are_copied() -> None:
    cache, copies = (tiny_decoder("llama").empty_cache(n, 5) for n in (3, 2))
    cache.used = 2
    copies.fill(torch.tensor([0, 1]), cache, torch.tensor([1, 1]))
    copies.keys[0].fill_(1.0)
    assert float(cache.keys[0].sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_cache_is_made_for_its_model(dtype: torch.dtype) -> None:
    cache = new_decoder("qwen3").to(dtype).empty_cache(3, 5)
    assert [x.shape for x in (*cache.keys, *cache.values)] == [(3, 2, 5, 6)] * 4
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {dtype}
    assert cache.next_B.tolist() == [0, 0, 0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_under_autocast_a_cache_is_narrow_and_changes_nothing(family: str) -> None:
    """Attention takes bfloat16 then, whatever the projections and rotations gave."""
    model, ids_BS = tiny_decoder(family), some_ids(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.empty_cache(2, 12)
        parts_BSD = [model(part_BS, cache) for part_BS in ids_BS.split([7, 1, 1, 3], 1)]
        whole_BSD = model(ids_BS)
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {torch.bfloat16}
    error = largest(torch.cat(parts_BSD, 1) - whole_BSD)
    assert error <= 0.03 * largest(whole_BSD)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_mask_stands_beside_heads_in_groups(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the kernels without a table of scores do not take both; the first tokens need none."""
    monkeypatch.setattr("minigold.model.UNGROUPED", ("cpu",))
    attend, seen = torch.nn.functional.scaled_dot_product_attention, list[tuple[bool, bool]]()

    def watched(*args: Any, **named: Any) -> torch.Tensor:
        seen.append((named["attn_mask"] is not None, named["enable_gqa"]))
        return attend(*args, **named)

    model, ids_BS = tiny_decoder(family), some_ids(4, 19)
    want_BSD = model(ids_BS)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    got_BSD = model(ids_BS)
    cache = model.empty_cache(4, 20)
    parts_BSD = [model(part_BS, cache) for part_BS in ids_BS.split([4, 1, 14], 1)]
    n = len(model.model.layers)
    assert (True, True) not in seen
    assert seen[n : 2 * n] == [(False, True)] * n, "four tokens are within any window"
    assert any(masked for masked, _ in seen[2 * n :])
    for found_BSD in (got_BSD, torch.cat(parts_BSD, 1)):
        assert largest(found_BSD - want_BSD) <= EXACT


def test_a_cache_is_refused_where_it_does_not_fit() -> None:
    model = tiny_decoder("llama")
    cache = model.empty_cache(2, 5)
    with pytest.raises(ValueError, match="expected gradients off with a cache, got them on"):
        model(some_ids(2, 3), cache)
    with torch.no_grad():
        model(some_ids(2, 3), cache)
        with pytest.raises(ValueError, match=r"at most 5 tokens a row, .* got 6; make a longer"):
            model(some_ids(2, 3), cache)


# ---------------------------------------------------------------------------- the module
def test_a_head_caps_its_logits_in_float32() -> None:
    weight_VD = torch.tensor([[1.0, 0.0], [0.0, -2.0]], dtype=torch.bfloat16)
    hidden_D = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    plain_V, capped_V = (Head(weight_VD, cap).logits(hidden_D) for cap in (None, 5.0))
    assert plain_V.dtype == capped_V.dtype == torch.float32
    assert plain_V.tolist() == [3.0, -8.0]
    assert capped_V.tolist() == pytest.approx([2.6852, -4.6083], abs=1e-4)  # 5 tanh(x / 5)


@pytest.mark.parametrize("tied", [True, False])
def test_padded_rows_of_the_head_do_not_exist(tied: bool, tmp_path: Path) -> None:
    hugging_face_model(raw_config("llama", tie_word_embeddings=tied)).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    owner = decoder.model.embed_tokens if decoder.lm_head is None else decoder.lm_head
    assert (decoder.lm_head is None) == tied
    decoder.n_tokens = 38
    assert torch.equal(decoder.head.weight_VD, owner.weight[:38])
    assert decoder.head.logits(decoder(some_ids(1, 2))).shape == (1, 2, 38)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_matrices_are_normal_and_norms_do_nothing(family: str) -> None:
    decoder = Decoder(tiny_config(family, 41))
    for name, x in decoder.named_parameters():
        if x.ndim == 2:
            assert float(x.detach().std()) == pytest.approx(0.02, rel=0.2), name
        elif name.endswith("norm.weight"):
            assert set(x.tolist()) == {0.0 if family == "gemma3_text" else 1.0}, name
