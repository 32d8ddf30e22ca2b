# SPDX-License-Identifier: Apache-2.0
"""A model as its own teacher through `teacher_prompt`, and the example that is made of it."""

import copy
import dataclasses
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigold.chat import prompt_ids
from minigold.config import Config
from minigold.data import Prompt
from minigold.demo import demo_models
from minigold.demo_task import held_out
from minigold.load import LanguageModel
from minigold.offsets import encode_continuation
from minigold.pair import Pair, make_pair
from minigold.sample import logp_of
from minigold.train import distill, take_step
from tiny_models import tiny_model
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

TEXTS = ("hello", "the fox", "def add", "Paris is", "x")
CONFIG = Config(
    steps=1, batch_size=4, micro_batch=3, max_new_tokens=8, lr=1e-2, warmup=0, where="all",
    student_plain=True, teacher_plain=True,
)  # fmt: skip


def self_pair(family: str, seed: int) -> tuple[LanguageModel, LanguageModel]:
    if family == "gemma3_text":
        student = tiny_model(family, sentencepiece_bpe(), end="</s>", seed=seed)
    else:
        student = tiny_model(family, byte_bpe(), end="<|im_end|>", seed=seed)
    return student, copy.deepcopy(student)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_model_is_its_own_teacher_without_loss_or_gradient(family: str) -> None:
    student, teacher = self_pair(family, seed=5)
    prompts = [Prompt(text, teacher_prompt=text) for text in TEXTS]
    (row,) = distill(student, teacher, prompts, CONFIG)
    assert abs(row["loss"]) < 1e-8
    assert row["grad_norm"] < 1e-6
    assert row["trained_fraction"] == 1


@lru_cache(maxsize=1)
def same_pair() -> Pair:
    return make_pair(*self_pair("gemma3_text", seed=5))


@given(
    beta=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    where=st.sampled_from(("all", "divergence", "soft-or")),
    texts=st.lists(st.text(max_size=12), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_what_the_student_has_read_too_teaches_nothing(
    beta: float, where: str, texts: list[str], seed: int
) -> None:
    pair = same_pair()  # Gemma 3 has a BOS, so no prompt is empty
    prompts = [Prompt(text, teacher_prompt=text) for text in texts]
    config = dataclasses.replace(CONFIG, beta=beta, where=where, seed=seed)
    still = torch.optim.SGD(pair.student.decoder.parameters(), lr=0.0)
    row = take_step(pair, still, prompts, config, number=1).metrics
    assert abs(row["loss"]) < 1e-6
    assert row["grad_norm"] < 1e-4


def test_what_only_the_teacher_has_read_does() -> None:
    student, teacher = self_pair("llama", seed=5)
    prompts = [Prompt(text, teacher_prompt=f"the answer is dog. {text}") for text in TEXTS]
    (row,) = distill(student, teacher, prompts, CONFIG)
    assert row["loss"] > 1e-3
    assert row["grad_norm"] > 1e-3


@torch.no_grad()
def logp_of_answer(model: LanguageModel, prompt: str, answer: str) -> float:
    """In nats, the end of turn included."""
    told = prompt_ids(model, prompt, plain=False)
    ids = [*encode_continuation(model.tokenizer, answer)[0], model.end_id]
    hidden_SD = model.decoder(torch.tensor([told + ids]))[0, len(told) - 1 : -1]
    logits_SV = model.decoder.head.logits(hidden_SD)
    return float(logp_of(logits_SV, logits_SV.softmax(-1), torch.tensor(ids)).sum())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_student_takes_over_what_the_teacher_read(beta: float) -> None:
    """The demo's teacher knows the answer to the sums; of the student's prompt nobody could."""
    _, teacher = demo_models()
    student, row = copy.deepcopy(teacher), held_out()[0]
    assert row.answer is not None
    before = logp_of_answer(student, "?\n", row.answer)
    config = Config(steps=25, batch_size=16, micro_batch=16, max_new_tokens=24, lr=1e-3, warmup=0,
                    where="all", beta=beta)  # fmt: skip
    distill(student, teacher, [Prompt("?\n", teacher_prompt=row.prompt)], config)
    after = logp_of_answer(student, "?\n", row.answer)
    assert before < -5
    assert after > -0.5
