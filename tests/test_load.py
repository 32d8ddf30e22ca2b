# SPDX-License-Identifier: Apache-2.0
"""Folders of all shapes: tokenizer, template, and the ids that end an answer."""

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from minigold.chat import prompt_ids
from minigold.load import LanguageModel, load, resolve
from minigold.weights import read_tensors
from tiny_folders import CHATML, TURNS, edit_json, tiny_folder
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

END_OF_TEXT, START, END = 0, 1, 2  # special ids of byte_bpe
THINK = 500  # its last one, added but not special
GONE = {"eos_token_id": ...}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chat model: Llama with GPT-2's kind of tokenizer and ChatML."""
    return tiny_folder(
        tmp_path / "model",
        "llama",
        byte_bpe(),
        begin="<|endoftext|>",
        end="<|im_end|>",
        template=CHATML,
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model without a template."""
    return tiny_folder(tmp_path / "base", "llama", byte_bpe(), end="<|im_end|>")


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """Gemma 3 that could read images: the text model lies in `text_config`."""
    return tiny_folder(tmp_path / "nested", "gemma3", byte_bpe(), end="<|im_end|>")


def tokenizer_with(*tokens: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(byte_bpe().to_str())
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# -------------------------------------------------------------------------- all in order
def test_a_folder_gives_all_that_is_needed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(folder)
    n = byte_bpe().get_vocab_size()
    assert (model.name, model.folder, model.context) == (str(folder), folder, 200)
    assert (model.bos_token, model.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (model.eos_ids, model.end_id, model.template) == ((END,), END, CHATML)
    assert (model.decoder.device.type, model.decoder.dtype) == ("cpu", torch.float32)
    assert warnings_of(caplog) == []
    assert model.n_tokens == n
    assert len(model.decoder.head.weight_VD) == n  # rows of padding have no logits
    assert model.decoder.config.vocab_size == n + 3


def test_a_name_with_a_dtype_is_loaded_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    model = load("model", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (model.name, model.decoder.dtype) == ("model", torch.bfloat16)


def test_what_the_tokenizer_cuts_and_pads_is_turned_off(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = "one two three four"
    ours, plain = load(folder).tokenizer.encode(text).ids, byte_bpe().encode(text).ids
    assert ours == plain


# ------------------------------------------------------------------------- ends of answers
@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 0}, {}, (0, END)),
        ({"eos_token_id": [1, 0]}, {}, (1, 0, END)),
        ({"eos_token_id": [END, 0, 0]}, {}, (END, 0)),
        ({"eos_token_id": END}, {"eos_token_id": 0}, (END,)),
        ({"eos_token_id": []}, {"eos_token_id": 0}, (END,)),
        (GONE, {"eos_token_id": 0}, (0, END)),
        ({"eos_token_id": None}, {"eos_token_id": [0, 1]}, (0, 1, END)),
        (GONE, {"text_config": {"eos_token_id": [0, 1]}}, (0, 1, END)),
        (GONE, {"eos_token_id": None, "text_config": {"eos_token_id": 0}}, (0, END)),
        (GONE, {"eos_token_id": 1, "text_config": {"eos_token_id": 0}}, (1, END)),
        (GONE, {"text_config": None}, (END,)),
        (GONE, {}, (END,)),
    ],
)
def test_all_ids_that_end_an_answer_are_found(
    base: Path, generation: dict[str, Any], config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    edit_json(base / "generation_config.json", **generation)
    edit_json(base / "config.json", **config)
    model = load(base)
    assert model.eos_ids == expected
    assert model.end_id == END  # the tokenizer's, where no template says otherwise


def test_a_nested_text_model_is_asked_for_its_ends(nested: Path) -> None:
    (nested / "generation_config.json").unlink()
    raw = json.loads((nested / "config.json").read_text("utf-8"))
    text = {**raw["text_config"], "eos_token_id": [START]}
    edit_json(nested / "config.json", text_config=text)
    assert load(nested).eos_ids == (START, END)


@pytest.mark.parametrize("value", ["2", 2.0, True, [2, None], {"id": 2}, [[2]]])
def test_ends_that_are_no_ids_are_refused(base: Path, value: Any) -> None:
    edit_json(base / "generation_config.json", eos_token_id=value)
    with pytest.raises(
        ValueError, match=r"eos_token_id in .* to be a token id or a list of them, got"
    ):
        load(base)


@pytest.mark.parametrize("value", [9999, -1, 501])
def test_ends_that_no_answer_can_have_are_warned_about(
    base: Path, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(base / "generation_config.json", eos_token_id=[value, 0])
    assert load(base).eos_ids == (0, END)
    assert warnings_of(caplog) == [f"{base}: eos_token_id {value} is not below 501; it is not used"]


def test_a_model_without_any_end_is_refused(base: Path) -> None:
    edit_json(base / "generation_config.json", **GONE)
    for eos_token in (None, ..., "", "<|gone|>"):
        edit_json(base / "tokenizer_config.json", eos_token=eos_token)
        with pytest.raises(
            ValueError, match=r"an id that ends an answer in .*; set eos_token_id in"
        ):
            load(base)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "<end_of_turn>"), "<end_of_turn>"),
        (CHATML.replace("<|im_end|>", " <think>"), "<think>"),  # added, though not special
        (CHATML.replace("<|im_end|>", ""), "<|endoftext|>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "<|endoftext|>"),
        (TURNS, "<|endoftext|>"),
        ("{{ messages[-1].content | trim }}{{ '<|im_end|>' }}{{ eos_token }}", "<|im_end|>"),
        ("<|im_end|>{{ messages[-1].content | upper }}<|im_end|>", "<|endoftext|>"),
        ("I am minigold.<think>" + CHATML, "<|im_end|>"),
        ("{{ raise_exception('never') }}", "<|endoftext|>"),
        ("{% if %}", "<|endoftext|>"),
        (None, "<|endoftext|>"),
    ],
)
def test_the_turn_ends_with_what_the_template_writes(
    tmp_path: Path, template: str | None, expected: str
) -> None:
    tokenizer = tokenizer_with("<end_of_turn>")
    folder = tiny_folder(
        tmp_path / "m",
        "qwen2",
        tokenizer,
        end="<|endoftext|>",
        begin="<|im_start|>",
        template=template,
    )
    model = load(folder)
    assert model.end_id == tokenizer.token_to_id(expected)
    assert model.eos_ids == tuple(dict.fromkeys([END_OF_TEXT, model.end_id]))


def test_an_end_of_turn_beyond_the_embedding_is_not_taken(tmp_path: Path) -> None:
    template = CHATML.replace("<|im_end|>", "<think>")
    folder = tiny_folder(
        tmp_path / "m", "llama", byte_bpe(), end="<|endoftext|>", template=template, rows=THINK
    )
    assert load(folder).end_id == END_OF_TEXT


# -------------------------------------------------------------- tokenizer beside embedding
def test_ids_beyond_the_embedding_are_warned_about_and_refused_where_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_folder(
        tmp_path / "m", "llama", byte_bpe(), end="<|im_end|>", template=CHATML, rows=THINK
    )
    model = load(folder)
    assert warnings_of(caplog) == [
        f"{folder}: the tokenizer has 501 ids, the embedding 500 rows; ids from 500 on are not used"
    ]
    assert model.n_tokens == len(model.decoder.head.weight_VD) == THINK
    assert prompt_ids(model, "the fox", plain=True)
    with pytest.raises(
        ValueError, match=r"ids below 500 in a prompt for .*, got 500 \('<think>'\)"
    ):
        prompt_ids(model, "the fox <think>", plain=False)


# -------------------------------------------------------- special tokens and the template
def as_object(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, **flags, "special": True}


def in_config(text: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **as_object(text)}


def of_transformers(folder: Path) -> tuple[str, str, str | None]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return tokenizer.bos_token or "", tokenizer.eos_token or "", template


TOKENS = {
    str(i): as_object(text)
    for i, text in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
}


@pytest.mark.parametrize(
    ("settings", "more", "expected"),
    [
        ({"bos_token": "<|im_start|>"}, {}, ("<|im_start|>", "<|im_end|>")),
        ({"bos_token": in_config("<|im_start|>")}, {}, ("<|im_start|>", "<|im_end|>")),
        ({"eos_token": in_config("<|endoftext|>")}, {}, ("", "<|endoftext|>")),
        (
            {"bos_token": ..., "eos_token": ...},
            {"eos_token": "<|endoftext|>"},
            ("", "<|endoftext|>"),
        ),
        (
            {"eos_token": "<|im_end|>"},
            {"eos_token": as_object("<|endoftext|>")},
            ("", "<|endoftext|>"),
        ),
        ({"added_tokens_decoder": TOKENS}, {"eos_token": "<|endoftext|>"}, ("", "<|im_end|>")),
    ],
)
def test_special_tokens_are_text_or_objects_in_two_files(
    base: Path, settings: dict[str, Any], more: dict[str, Any], expected: tuple[str, str]
) -> None:
    edit_json(base / "tokenizer_config.json", **settings)
    if more:
        edit_json(base / "special_tokens_map.json", **more)
    model = load(base)
    assert (model.bos_token, model.eos_token) == expected
    assert of_transformers(base)[:2] == expected


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": CHATML}]


@pytest.mark.parametrize(
    ("setting", "file", "expected"),
    [
        (CHATML, None, CHATML),
        (NAMED, None, CHATML),
        ([], None, None),
        (None, None, None),
        (None, TURNS, TURNS),
        (CHATML, TURNS, TURNS),
        (NAMED, "ünï 你好\r\n{{ messages }}", "ünï 你好\n{{ messages }}"),
    ],
)
def test_the_template_is_found_in_each_of_its_places(
    base: Path, setting: Any, file: str | None, expected: str | None
) -> None:
    edit_json(base / "tokenizer_config.json", chat_template=setting)
    if file is not None:
        (base / "chat_template.jinja").write_bytes(file.encode())
    assert load(base).template == expected
    assert of_transformers(base)[2] == expected


def test_named_templates_without_a_default_are_none(base: Path) -> None:
    edit_json(base / "tokenizer_config.json", chat_template=NAMED[:1])
    assert load(base).template is None


# --------------------------------------------------------------------------- what is refused
def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (remove("tokenizer.json"), FileNotFoundError,
         r"expected tokenizer\.json in .*, found none; convert the tokenizer once with transformers"),
        (write("tokenizer.json", "{}"), ValueError,
         r"expected a tokenizer in .*tokenizer\.json, got .*; download it again"),
        (write("tokenizer_config.json", "{"), ValueError,
         r"tokenizer_config\.json: expected one JSON object, got Expecting .*; download it again"),
        (write("tokenizer_config.json", b"\xff"), ValueError, r"tokenizer_config\.json: expected UTF-8, got byte 0xff"),
        (write("tokenizer_config.json", "[" * 10**5), ValueError, "expected one JSON object, got deep nesting"),
        (write("tokenizer_config.json", "[]"), ValueError,
         r"tokenizer_config\.json: expected an object such as .*, got a list of 0"),
        (write("generation_config.json", '[["eos_token_id", 2]]'), ValueError,
         r"generation_config\.json: expected an object such as .*, got a list of 1"),
        (write("special_tokens_map.json", "null"), ValueError,
         r"special_tokens_map\.json: expected an object such as .*, got null"),
        (write("chat_template.jinja", b"caf\xe9"), ValueError,
         r"expected UTF-8 in .*chat_template\.jinja, got .*; save it as UTF-8"),
        (remove("config.json"), FileNotFoundError, r"expected config\.json in .*, found none"),
        (remove("model.safetensors"), FileNotFoundError, r"expected model\.safetensors"),
        (lambda f: edit_json(f / "config.json", model_type="mamba"), ValueError,
         "expected model_type to be one of llama, .*, got 'mamba'"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used_are_refused(
    folder: Path, spoil: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    spoil(folder)
    with pytest.raises(error, match=message):
        load(folder)


def test_a_missing_tokenizer_comes_with_the_line_that_makes_it(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(FileNotFoundError) as caught:
        load(folder)
    line = str(caught.value).rpartition("transformers: ")[2]
    eval(line, {"AutoTokenizer": AutoTokenizer})
    text = "hello help, the fox"
    assert load(folder).tokenizer.encode(text).tokens == byte_bpe().encode(text).tokens


@pytest.mark.parametrize(
    "template", [7, {"default": CHATML}, ["x"], [{"name": "default", "template": 1}]]
)
def test_templates_that_are_no_text_are_refused(base: Path, template: Any) -> None:
    edit_json(base / "tokenizer_config.json", chat_template=template)
    with pytest.raises(
        ValueError, match=r"chat_template in .* to be text or a list of named ones, got"
    ):
        load(base)


# ----------------------------------------------------------------------------------- names
def test_folders_are_found_by_any_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in (
        folder,
        str(folder),
        "model",
        "./model",
        "~/model",
        "../" + folder.parent.name + "/model",
    ):
        assert resolve(name).resolve() == folder.resolve()


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent", "a/b/c", "a\\b"])
def test_paths_that_are_not_there_are_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no folder .+; check the path"):
        resolve(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"got the file .*model\.safetensors; give the folder it is in"
    ):
        resolve(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["absent", "owner/absent", "owner/ab sent", "a--b"])
def test_hub_names_that_cannot_be_fetched_say_so_once(name: str) -> None:
    pattern = (
        rf"expected a model folder or hub name, found no folder {re.escape(name)}, and the hub did not "
        r"give it \(.+\); check the name and the network, or download the folder"
    )
    with pytest.raises(FileNotFoundError, match=pattern) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_the_files_that_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: Any) -> str:
        asked.append((name, allow_patterns))
        files = ["model.safetensors", "tokenizer.json", "consolidated.safetensors",
                 "consolidated-00001-of-00002.safetensors", "onnx/config.json"]  # fmt: skip
        wanted = filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert set(wanted) <= {"model.safetensors", "tokenizer.json"}
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("owner/name").name == "owner/name"
    assert asked == [("owner/name", ["*.json", "*.safetensors", "chat_template.jinja"])]
    resolve("owner/name", weights=False)
    assert asked[1:] == [("owner/name", ["*.json", "chat_template.jinja"])]


def test_without_the_hub_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        FileNotFoundError, match=r"no folder owner/name; .* pip install huggingface_hub"
    ):
        resolve("owner/name")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "nowhere"}, r"expected a device of this machine, got nowhere \("),
        ({"device": "cuda:99"}, r"expected a device of this machine, got cuda:99 \("),
        ({"dtype": "bfloat16"}, r"expected dtype torch.float32, .* got 'bfloat16'"),
        ({"dtype": torch.int8}, r"expected dtype torch.float32, .* got torch.int8"),
    ],
)
def test_another_place_is_refused(folder: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, **given)


def test_too_little_memory_is_no_broken_download(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_tensor: torch.Tensor, _dtype: torch.dtype) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        list(read_tensors(folder / "model.safetensors", device="cpu", dtype=torch.bfloat16))


def test_a_teacher_is_known_by_its_weights(folder: Path) -> None:
    one, again, other = (load(folder) for _ in range(3))
    with torch.no_grad():
        other.decoder.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    assert one.facts == again.facts != other.facts


def test_a_model_is_plain_data(folder: Path) -> None:
    model = load(folder)
    assert isinstance(model, LanguageModel)
    with pytest.raises(AttributeError, match="cannot assign"):
        model.end_id = 0  # type: ignore[misc]


def test_sentencepiece_works_as_well(tmp_path: Path) -> None:
    folder = tiny_folder(
        tmp_path / "m", "gemma3_text", sentencepiece_bpe(), begin="<s>", end="</s>", template=TURNS
    )
    model = load(folder)
    assert (model.end_id, model.eos_ids, model.bos_token) == (2, (2,), "<s>")
    assert prompt_ids(model, "Hi", plain=False).count(1) == 1
