# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: every layout that is read, every one that is refused, and writing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigold.families import DEFAULTS, model_config
from minigold.model import Decoder
from minigold.weights import load_decoder, save_decoder
from tiny_models import FAMILIES, SCALED, SCALINGS, hugging_face_model, new_decoder, raw_config

EXACT = 2e-5  # float32, on logits of up to 10
FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
IDS_BS = torch.randint(1, 41, (3, 17), generator=torch.Generator().manual_seed(0))

Tensors = dict[str, Tensor]


def write(folder: Path, raw: dict[str, Any], tensors: Tensors | None = None) -> Path:
    """A folder with these tensors, or with random ones that fit."""
    if tensors is None:
        tensors = new_decoder(raw["model_type"]).state_dict()
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(raw), "utf-8")
    save_file(tensors, folder / FILE)
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def shard(folder: Path, **files: list[str]) -> None:
    """Moves the tensors to shards, each with those whose names start with one of its prefixes."""
    tensors, places = load_file(folder / FILE), dict[str, str]()
    for name, prefixes in files.items():
        part = {key: x for key, x in tensors.items() if key.startswith(tuple(prefixes))}
        save_file(part, folder / f"{name}.safetensors")
        places |= dict.fromkeys(part, f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": places}), "utf-8")
    (folder / FILE).unlink()


def index(folder: Path, content: Any) -> None:
    (folder / INDEX).write_text(json.dumps(content), "utf-8")
    (folder / FILE).unlink()


def assert_same_weights(one: Decoder, other: Decoder) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# -------------------------------------------------------------------------- config.json
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(family: str) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 41, "hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 8,
             "num_attention_heads": 32}  # fmt: skip
    whole = transformers.CONFIG_MAPPING[family](**sizes).to_dict()
    assert model_config({"model_type": family, **sizes}) == model_config(whole)
    kept = {key: whole[key] for key in DEFAULTS[family] if key in whole and key not in sizes}
    if "use_sliding_window" in whole:  # a window that is off is written as null
        kept = {key: x for key, x in kept.items() if key != "sliding_window"}
    assert kept.items() <= DEFAULTS[family].items()


def test_the_outer_keys_of_nested_gemma_win() -> None:
    raw = raw_config("gemma3")
    assert model_config(raw) == model_config(raw["text_config"])
    assert not model_config({**raw, "tie_word_embeddings": False}).tied


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_window_that_the_config_leaves_out_is_that_of_transformers(family: str) -> None:
    import transformers

    raw = raw_config(family, use_sliding_window=True, max_window_layers=1)
    raw.pop("sliding_window", None)
    window = transformers.CONFIG_MAPPING[family].from_dict(raw).sliding_window
    assert model_config(raw).window == window == 4096


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}
PLAIN = {"rope_type": "default", "rope_theta": 300.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12}
LLAMA3 = SCALINGS["llama3"]
HALF = {"partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type to be one of llama, .*got 'gpt2'; "),
        ("llama", {"model_type": None}, "expected model_type to be one of llama, .*got None; "),
        ("gemma3", {"text_config": None}, "expected an object text_config .*, got None; "),
        ("gemma3", {"text_config": [1]}, r"expected an object text_config .*, got \[1\]; "),
        ("gemma3", {"quantization_config": {"bits": 4}}, "quantization_config off .*'bits': 4"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config off .*dequantize"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping off .*got 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention off"),
        ("llama", {"is_causal": False}, "expected is_causal true .*got False; only causal"),
        ("llama", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config off .*different"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout off .*got 0.1; .*set it to 0"),
        ("llama", {"vocab_size": None}, "positive whole number vocab_size .*got None; "),
        ("llama", {"hidden_size": 0}, "positive whole number hidden_size .*got 0; "),
        ("llama", {"num_hidden_layers": True}, "whole number num_hidden_layers .*got True; "),
        ("llama", {"intermediate_size": 24.0}, "whole number intermediate_size .*got 24.0; "),
        ("llama", {"head_dim": "6"}, "positive whole number head_dim .*got '6'; "),
        ("llama", {"rms_norm_eps": -1e-6}, "positive number rms_norm_eps .*got -1e-06; "),
        ("llama", {"rope_theta": float("nan")}, "positive number rope_theta .*got nan; "),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, "positive number rope_theta .*got 0; "),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "number query_pre_attn_scalar .*got 0; "),
        ("gemma3_text", {"final_logit_softcapping": 0}, "final_logit_softcapping .*got 0; "),
        ("gemma3_text", {"sliding_window": None}, "whole number sliding_window .*got None; "),
        ("llama", {"num_key_value_heads": 3}, "a multiple of .*, got 4, 3 and 6; "),
        ("llama", {"head_dim": 5}, "head_dim even.*, got 4, 2 and 5; "),
        ("llama", {"hidden_act": "relu"}, "hidden_act .* one of silu, .*got 'relu'; "),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation .*got 'gelu'; "),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "one rope_type out of default, .*dynamic"),
        ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, "one rope_type .*other ways to"),
        ("smollm3", {"rope_scaling": {"rope_type": ["yarn"]}}, r"one rope_type .*\['yarn'\]"),
        ("qwen3", {"rope_scaling": {**LINEAR, "type": "yarn"}}, "one rope_type .*'type': 'yarn'"),
        (
            "llama",
            {"rope_parameters": PLAIN, "rope_scaling": LINEAR},
            "one object rope_param.*keep",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN},
                "rope_scaling": LINEAR,
            },
            "one object rope_parameters or rope_scaling in",
        ),
        ("llama", {"rope_scaling": "linear"}, "one object .*got {} and 'linear'; keep the one"),
        ("llama", {"rope_parameters": [1]}, r"one object .*got \[1\] and {}; keep the one"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "name it rope_type"),
        ("gemma3_text", {"rope_scaling": {"full_attention": LINEAR}}, "rope_parameters for full_"),
        ("llama", {"rope_parameters": HALF}, "partial_rotary_factor 1 in .*got 0.5; only whole"),
        ("qwen2", HALF, "partial_rotary_factor 1 in config.json, got 0.5; only whole heads"),
        (
            "llama",
            {"rope_scaling": {**PLAIN, "factor": 2.0}},
            "no settings .*'default' .*got factor",
        ),
        (
            "llama",
            {"rope_scaling": {**YARN, "a": 1, "b": 2}},
            "no settings of .*got a, b; take out",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "a positive number factor .*got None; "),
        ("llama", {"rope_scaling": {**LINEAR, "factor": 0}}, "a positive number factor .*got 0; "),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "number low_freq_factor "),
        ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 0.4}}, "high_freq_factor above"),
        (
            "llama",
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 0},
            "whole .*got 0; ",
        ),
        ("llama", {"rope_scaling": {**YARN, "original_max_position_embeddings": 1.5}}, "got 1.5; "),
        (
            "llama",
            {"rope_scaling": {**YARN, "attention_factor": -1}},
            "number attention_factor .*-1",
        ),
        (
            "llama",
            {"rope_scaling": {**YARN, "beta_fast": 0.5}},
            "beta_fast to be at least beta_slow",
        ),
        ("llama", {"rope_scaling": {**YARN, "mscale": 1.0}}, "both mscale and mscale_all_dim or"),
        (
            "llama",
            {"rope_scaling": {**YARN, "truncate": None}},
            "truncate true or false .*got None",
        ),
        (
            "gemma3_text",
            {"rope_scaling": {**YARN, "truncate": False}},
            "truncate true in .*got False",
        ),
        ("gemma3_text", {"rope_parameters": PLAIN}, "rope_parameters for full_attention in"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": PLAIN}},
            "expected rope_parameters for sliding_attention in",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": {"type": "su"}}},
            "expected one rope_type out of .*'type': 'su'",
        ),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": PLAIN}},
            "expected rope_parameters of all layers in config.json, got {'full_attention'",
        ),
        ("llama", {"layer_types": ["full_attention"]}, "expected 2 layer_types out of full_att"),
        ("llama", {"layer_types": 2}, "expected 2 layer_types out of full_attention in .*got 2; "),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "2 layer_types out of sliding_attent"),
        ("mistral", {"sliding_window": 0}, "positive whole number sliding_window .*got 0; "),
        (
            "smollm3",
            {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False},
            "2 layer_types out of full_attention in .*as its sliding_window and use_sliding_window",
        ),
        ("smollm3", {"no_rope_layers": [1]}, r"for each of 2 layers, got \[1\]; download"),
        ("smollm3", {"no_rope_layers": [1, 2]}, r"no_rope_layers in .*got \[1, 2\]; "),
        ("smollm3", {"no_rope_layers": 1}, "no_rope_layers in .*got 1; "),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "interval .*got 0; "),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "0 or above, .*got -1; "),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": None}, "above, .*got None; "),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "expected 2 layer_types out of full_attention in .*'sliding_attention'",
        ),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types out of full_attention, sliding_attention in .*chunked",
        ),
        (
            "gemma3_text",
            {"layer_types": None, "sliding_window_pattern": 0},
            "positive whole number sliding_window_pattern .*got 0; ",
        ),
    ],
)
def test_a_config_that_the_decoder_does_not_do_is_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_config({**raw_config(family), **changes})


# ----------------------------------------------------------------------------- reading
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_shards_are_read_as_transformers_writes_them(family: str, tmp_path: Path) -> None:
    model = hugging_face_model(raw_config(family, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) >= 3
    whole, shards = (load_decoder(tmp_path / name) for name in ("whole", "shards"))
    assert_same_weights(whole, shards)


OTHER_LAYOUTS: dict[str, tuple[str, Callable[[str], str], Tensors]] = {
    "as it is": ("llama", lambda name: name, {}),
    "with RoPE tables": (
        "llama",
        lambda name: name,
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
    ),
    "text model first": (
        "gemma3",
        lambda name: f"language_model.{name}",
        {"vision_tower.x": torch.ones(2), "multi_modal_projector.y": torch.ones(2)},
    ),
    "text model inside": (
        "gemma3",
        lambda name: name.replace("model.", "model.language_model.", 1),
        {"model.vision_tower.x": torch.ones(2), "model.multi_modal_projector.y": torch.ones(2)},
    ),
}


@pytest.mark.parametrize("head", ["tied", "tied, but stored", "untied"])
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_other_layouts_are_read(layout: str, head: str, tmp_path: Path) -> None:
    family, rename, more = OTHER_LAYOUTS[layout]
    raw = raw_config(family, tie_word_embeddings=head != "untied")
    original = Decoder(model_config(raw))
    tensors = dict(original.state_dict())
    if head == "tied, but stored":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    write(tmp_path, raw, {**{rename(name): x for name, x in tensors.items()}, **more})
    assert_same_weights(load_decoder(tmp_path), original)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_types_are_converted(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    original = new_decoder("llama").to(stored)
    decoder = load_decoder(write(tmp_path, raw_config("llama"), original.state_dict()), dtype=dtype)
    assert {x.dtype for x in decoder.parameters()} == {decoder.dtype} == {dtype}
    assert all(x.requires_grad for x in decoder.parameters())
    assert not decoder.training
    assert_same_weights(decoder, original.to(dtype))


def twice(folder: Path) -> None:
    shard(folder, a=["model.embed", "model.norm"], b=["model.layers", "model.norm"])


def without_an_embedding(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))


WHOLE = r"expected the tensors of config\.json in .*"
BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config not JSON": (
        lambda f: (f / CONFIG).write_text("{", "utf-8"),
        r"config\.json: expected one JSON object, got Expecting property name .*; download it again",
    ),
    "config not text": (
        lambda f: (f / CONFIG).write_bytes(b"\xff"),
        r"config\.json: expected UTF-8, got byte 0xff at byte 0",
    ),
    "config a list": (
        lambda f: (f / CONFIG).write_text("[1]", "utf-8"),
        r"config\.json: expected an object such as .*, got a list of 1",
    ),
    "index without a map": (lambda f: index(f, {}), "expected an object weight_map .*, got None"),
    "index of numbers": (
        lambda f: index(f, {"weight_map": {NORM: 1}}),
        "expected an object weight_map of file names in .*, got {'model.norm.weight': 1}; ",
    ),
    "index of other folders": (
        lambda f: index(f, {"weight_map": {NORM: "../other.safetensors"}}),
        r"expected shards that lie beside .*, got '\.\./other\.safetensors'; ",
    ),
    "index of other Windows folders": (
        lambda f: index(f, {"weight_map": {NORM: "..\\other.safetensors"}}),
        "expected shards that lie beside .*; do not use an index that points out of its folder",
    ),
    "index of nothing": (lambda f: index(f, {"weight_map": {}}), WHOLE + "got 24 missing: "),
    "a tensor in two shards": (twice, "each tensor once, got model.norm.weight again in .*b.safet"),
    "torn": (
        lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-1]),
        r"expected a whole safetensors file .*, got .*; download it again",
    ),
    "empty": (
        lambda f: (f / FILE).write_bytes(b""),
        r"expected a whole safetensors file .*, got .*; download it again",
    ),
    "not safetensors": (
        lambda f: (f / FILE).write_text("version https://git-lfs.github.com/spec/v1", "utf-8"),
        r"expected a whole safetensors file .*, got .*; download it again",
    ),
    "int8": (
        lambda f: rewrite(f, lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        r"expected float tensors, got model\.norm\.weight of type I8 in .*; dequantize",
    ),
    "missing": (lambda f: rewrite(f, lambda t: t.pop(NORM)), WHOLE + "got 1 missing: model.norm"),
    "a layer missing": (
        lambda f: shard(f, a=["model.embed", "model.norm", "model.layers.0"]),
        WHOLE + r"got 11 missing: .*, .*, .*, …; the weights and config\.json are not of the same",
    ),
    "unexpected": (
        lambda f: rewrite(f, lambda t: t.update({"score.weight": torch.ones(2)})),
        WHOLE + r"got 1 unexpected: score\.weight; ",
    ),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(21)})),
        WHOLE + r"got 1 of another shape: model\.norm\.weight \[21\] for \[20\]; ",
    ),
    "tied to another": (
        lambda f: rewrite(f, lambda t: t.update({HEAD: t[EMBEDDING] + 1})),
        "expected lm_head.weight in .* to equal the embedding, .*set tie_word_embeddings to false",
    ),
    "tied to nothing": (without_an_embedding, "expected lm_head.weight in .* to equal the embed"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_folder_that_cannot_be_trusted_is_refused(broken: str, tmp_path: Path) -> None:
    change, message = BREAKS[broken]
    change(write(tmp_path, raw_config("qwen3")))
    with pytest.raises(ValueError, match=message):
        load_decoder(tmp_path)


MISSING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "the folder": (
        lambda f: f.rename(f.parent / "away"),
        "a model folder, found no folder .*model",
    ),
    "config.json": (
        lambda f: (f / CONFIG).unlink(),
        r"expected config\.json in .*, found none; give a Hugging Face model folder",
    ),
    "the weights": (
        lambda f: (f / FILE).rename(f / "pytorch_model.bin"),
        r"expected model\.safetensors or model\.safetensors\.index\.json in .*, found neither; ",
    ),
    "a shard": (
        lambda f: index(f, {"weight_map": {NORM: "b.safetensors"}}),
        r"expected shard b\.safetensors in .*, as the index says, found none; download it",
    ),
}


@pytest.mark.parametrize("missing", MISSING)
def test_what_is_missing_is_named(missing: str, tmp_path: Path) -> None:
    change, message = MISSING[missing]
    change(write(tmp_path / "model", raw_config("qwen3")))
    with pytest.raises(FileNotFoundError, match=message):
        load_decoder(tmp_path / "model")


# ----------------------------------------------------------------------------- writing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, *SCALED, "gemma3", "gemma3 yarn"])
@torch.no_grad()
def test_what_is_saved_loads_again_here_and_in_transformers(
    family: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    import transformers

    source, folder = tmp_path / "source", tmp_path / "run" / "final"
    hugging_face_model(raw_config(family, tie_word_embeddings=tied)).save_pretrained(source)
    decoder = load_decoder(source, dtype=dtype)
    decoder.model.embed_tokens.weight += 1  # trained
    save_decoder(decoder, folder, source=source)
    assert_same_weights(load_decoder(folder, dtype=dtype), decoder)
    assert transformers.AutoConfig.from_pretrained(folder).dtype == dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before, after = (transformers.AutoConfig.from_pretrained(x) for x in (source, folder))
    assert after.rope_parameters == before.get_text_config().rope_parameters
    error = (decoder.float().head.logits(decoder(IDS_BS)) - model(IDS_BS).logits).abs().max()
    assert error <= EXACT


def test_tokenizer_template_and_generation_files_come_along(tmp_path: Path) -> None:
    source, folder = write(tmp_path / "source", raw_config("llama")), tmp_path / "new"
    copied = {"tokenizer.json": "{}", "tokenizer_config.json": '{"é": 1}', "tokenizer.model": "\n",
              "special_tokens_map.json": "{}", "chat_template.jinja": "{{ messages }}",
              "generation_config.json": "{}"}  # fmt: skip
    for name, text in {**copied, "optimizer.pt": "x", INDEX: "{}"}.items():
        (source / name).write_text(text, "utf-8")
    for _ in range(2):  # over an older save
        save_decoder(load_decoder(source), folder, source=source)
    assert {path.name for path in folder.iterdir()} == {*copied, FILE, CONFIG}
    assert all((folder / name).read_text("utf-8") == text for name, text in copied.items())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_saved_config_is_the_source_with_the_new_type(key: str, tmp_path: Path) -> None:
    raw = {**raw_config("llama", architectures=["LlamaForCausalLM"]), key: "float16"}
    source = write(tmp_path / "source", raw)
    save_decoder(load_decoder(source, dtype=torch.bfloat16), tmp_path / "new", source=source)
    saved = json.loads((tmp_path / "new" / CONFIG).read_text("utf-8"))
    assert saved == {**raw, key: "bfloat16"}


def test_nested_gemma_is_saved_as_its_text_model(tmp_path: Path) -> None:
    raw = {**raw_config("gemma3"), "eos_token_id": [1, 106], "torch_dtype": "float16"}
    decoder = Decoder(model_config(raw))
    source = write(tmp_path / "source", raw, dict(decoder.state_dict()))
    save_decoder(decoder, tmp_path / "new", source=source)
    saved = json.loads((tmp_path / "new" / CONFIG).read_text("utf-8"))
    assert saved["model_type"] == "gemma3_text"
    assert saved["architectures"] == ["Gemma3ForCausalLM"]
    assert saved["eos_token_id"] == [1, 106]
    assert not {"text_config", "vision_config"} & saved.keys()
    assert model_config(saved) == model_config(raw)


def test_saving_onto_the_source_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source", raw_config("llama"))
    decoder = load_decoder(source)
    for same in (source, tmp_path / "x" / ".." / "source"):
        with pytest.raises(ValueError, match=r"other than the source .*; save beside it"):
            save_decoder(decoder, same, source=source)
