# SPDX-License-Identifier: Apache-2.0
"""A model as its own teacher through `teacher_prompt`, and the example that is made of it."""

import copy
import dataclasses
import json
from functools import lru_cache
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigold.chat import prompt_ids
from minigold.config import Config
from minigold.data import Prompt
from minigold.demo import demo_models
from minigold.demo_task import glim, held_out, number_word, prompts
from minigold.load import LanguageModel
from minigold.offsets import encode_continuation
from minigold.pair import Pair, make_pair
from minigold.sample import logp_of
from minigold.train import distill, take_step
from real_models import example
from tiny_models import tiny_model
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

cat = example("compute_as_teacher")

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
    assert abs(row["loss"]) < 1e-7  # float32 has 1.2e-7 at 1; processors round differently
    assert row["grad_norm"] < 1e-4
    assert row["trained_fraction"] == 1


@lru_cache(maxsize=1)
def same_pair() -> Pair:
    return make_pair(*self_pair("gemma3_text", seed=5))


@settings(max_examples=settings().max_examples // 4)  # each is a step of training
@given(
    beta=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    where=st.sampled_from(("all", "divergence", "soft-or")),
    texts=st.lists(st.text(max_size=6), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_what_the_student_has_read_too_teaches_nothing(
    beta: float, where: str, texts: list[str], seed: int
) -> None:
    pair = same_pair()  # Gemma 3 has a BOS, so no prompt is empty
    prompts = [Prompt(text, teacher_prompt=text) for text in texts]
    config = dataclasses.replace(CONFIG, beta=beta, where=where, seed=seed, max_new_tokens=4)
    still = torch.optim.SGD(pair.student.decoder.parameters(), lr=0.0)
    row = take_step(pair, still, prompts, config, number=2).metrics
    assert abs(row["loss"]) < 1e-6
    assert row["grad_norm"] < 1e-4


def test_what_only_the_teacher_has_read_does() -> None:
    student, teacher = self_pair("llama", seed=5)
    prompts = [Prompt(text, teacher_prompt=f"the answer is dog. {text}") for text in TEXTS]
    (row,) = distill(student, teacher, prompts, CONFIG)
    assert row["loss"] > 1e-3
    assert row["grad_norm"] > 1e-3


@torch.no_grad()
def logp_of_answer(model: LanguageModel, prompt: str, answer: str, *, plain: bool) -> float:
    """In nats, the end of turn included."""
    told = prompt_ids(model, prompt, plain=plain)
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
    before = logp_of_answer(student, "?\n", row.answer, plain=False)
    config = Config(steps=25, batch_size=16, micro_batch=16, max_new_tokens=24, lr=1e-3, warmup=0,
                    where="all", beta=beta)  # fmt: skip
    distill(student, teacher, [Prompt("?\n", teacher_prompt=row.prompt)], config)
    after = logp_of_answer(student, "?\n", row.answer, plain=False)
    assert before < -5
    assert after > -0.5


# ------------------------------------------------------------------------------- the example
NUMBERS = {number_word(n): n for n in range(100)}


def right_answer(prompt: str) -> str:
    """To the last line of a prompt, by the task's own operator."""
    sums = [one.split(" glim ") for one in prompt.strip().split("\n")[-1].split(", ")]
    return ", ".join(number_word(glim(NUMBERS[a], NUMBERS[b])) for a, b in sums)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every model answers rightly, and what it was asked is kept."""
    kept: list[str] = []

    def answered(_model: object, told: list[str], **_settings: object) -> list[str]:
        kept.extend(told)
        return [right_answer(one) for one in told]

    monkeypatch.setattr(cat, "answered", answered)
    return kept


def test_reading_is_practised_on_answers_that_are_made_up() -> None:
    rows = [row for batch in islice(cat.reading(prompts(), 50, seed=1), 20) for row in batch]
    spoiled = []
    for row in rows:
        *copies, _ = row.prompt.strip().split("\n")
        assert len(copies) in (1, cat.G)
        assert {word for text in (*copies, row.answer) for word in text.split(", ")} <= set(NUMBERS)
        spoiled += [copy != row.answer for copy in copies if len(copies) > 1]
        assert len(copies) > 1 or copies == [row.answer]
    assert 0.4 < sum(spoiled) / len(spoiled) < 0.8
    assert sum(row.answer == right_answer(row.prompt) for row in rows) < 5  # 1 in 10,000 by chance


@pytest.mark.parametrize("beside", [True, False])
def test_rollouts_of_a_prompt_answer_its_sums(asked: list[str], *, beside: bool) -> None:
    told = [row.prompt for row in prompts()[:30]]
    groups = cat.rollouts(None, told, beside=beside, seed=3)
    assert groups == [[right_answer(one)] * cat.G for one in told]
    own = sum(one in told for one in asked)
    assert len(asked) == cat.G * len(told)
    assert own < 10 if beside else own == len(asked)


def test_each_arm_makes_its_own_reference(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _ = demo_models()
    told = [row.prompt for row in prompts()[:3]]
    group = ["two, one", "six, six", "ten, two", "six, six"]
    monkeypatch.setattr(cat, "rollouts", lambda *_a, **_k: [group] * 3)

    def made(arm: str) -> list[str]:
        return cat.references(arm, student, student, told, seed=0)

    assert made("vote") == ["six, six"] * 3
    assert made("single") == ["two, one"] * 3
    assert asked == []
    for one, best in zip(told, made("likeliest"), strict=True):
        logps = [logp_of_answer(student, one, answer, plain=True) for answer in group]
        assert best == group[int(np.argmax(logps))]
    made("synthesis")
    assert asked == ["two, one\nsix, six\nten, two\nsix, six\n" + one for one in told]


@pytest.mark.parametrize("arm", ["synthesis", "sharpened"])
def test_no_right_answer_reaches_training(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    anchor, _ = demo_models()
    rows, calls = prompts()[:4], []
    references = iter([["one, two"] * 4, ["two, three"] * 4])
    monkeypatch.setattr(cat, "references", lambda *_a, **_k: next(references))
    monkeypatch.setattr(cat, "distill", lambda *args: calls.append(args))
    student, shares = cat.taught(arm, anchor, rows, steps=8, seed=1)
    read = ["", ""] if arm == "sharpened" else ["one, two\n", "two, three\n"]
    assert shares == ([] if arm == "sharpened" else [0.0, 0.0])
    for (learner, teacher, given_rows, config), said in zip(calls, read, strict=True):
        assert (learner, teacher, config.steps) == (student, anchor, 4)
        assert learner is not anchor
        expected = [Prompt(row.prompt, teacher_prompt=said + row.prompt) for row in rows]
        assert given_rows == expected
        assert config.teacher_temperature == (0.5 if arm == "sharpened" else 1.0)
    assert len({config.seed for *_, config in calls}) == 2


def test_the_example_runs_and_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--arms synthesis,likeliest --prepare 3 --steps 2 --prompts 12 --tests 5"
    assert cat.main(small.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["start", "synthesis", "likeliest"]
    result = json.loads(lines[-1])
    assert list(result["accuracy"]) == ["start", "synthesis", "likeliest"]
    assert [len(shares) for shares in result["references"]["synthesis"]] == [cat.ROUNDS]
    with pytest.raises(SystemExit):
        cat.main(["--arms", "magic"])
    assert "expected --arms out of synthesis, " in capsys.readouterr().err


def test_gains_are_paired_by_prompt() -> None:
    start = [np.array([[0.0, 0.0], [1.0, 0.5]]), np.array([[0.0, 0.0], [0.0, 0.5]])]
    after = [run + np.array([0.5, 0.25]) for run in start]
    greedy, sampled = cat._figures(after, start)
    assert greedy == pytest.approx((0.75, 0.5, 0.5, 0.5))
    assert sampled == pytest.approx((0.5, 0.25, 0.25, 0.25))


@pytest.mark.slow
def test_rollouts_beside_other_sums_teach_and_those_of_the_prompt_alone_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cat.main(["--arms", "synthesis,alone"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (start,), (synthesis,), (alone,) = result["accuracy"].values()
    assert all(after > before + 0.06 for before, after in zip(start, synthesis, strict=True))
    assert all(after < before + 0.02 for before, after in zip(start, alone, strict=True))
    first, second = result["references"]["synthesis"][0]
    assert second > first + 0.05
