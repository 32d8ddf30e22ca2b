# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation beside slow computations of them, and their intervals."""

import dataclasses
import io
import json
import logging
import math
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from minigold import evaluate as evaluation
from minigold.chat import prompt_ids
from minigold.cli import main
from minigold.config import Config
from minigold.data import Prompt
from minigold.demo import accuracy, demo_models
from minigold.demo_task import held_out
from minigold.evaluate import (
    FIGURES,
    bootstrap,
    evaluate,
    exact_matches,
    forward_kl,
    repetition,
    told,
)
from minigold.load import LanguageModel, load
from minigold.masked import train_pass
from minigold.metrics import gap_and_bytes
from minigold.offsets import encode_continuation, text_of_ids, vocabulary
from minigold.pair import Pair, make_pair
from minigold.rollout import EVAL, collect, sample_answers, seeds_of
from minigold.sample import sample
from reference_losses import gkd
from tiny_folders import CHATML, tiny_folder
from tiny_models import tiny_model
from tokenizers_for_tests import byte_bpe, byte_bpe_lossy, sentencepiece_bpe

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
CONFIG = Config(
    batch_size=4, micro_batch=3, max_new_tokens=12, student_plain=True, teacher_plain=True
)
SAID = [" the fox", None, " Paris is 🙂", "", " def add", None, " hello"]
PROMPTS = [
    Prompt(text, completion=completion, line=i + 1)
    for i, (text, completion) in enumerate(
        zip(("hello", "fox", "def add", "Paris", "x", "naïve", "The"), SAID, strict=True)
    )
]


def ending(model: LanguageModel, every: int) -> LanguageModel:
    """Every so many ids end an answer."""
    stops = tuple(range(3, model.n_tokens, every))
    return dataclasses.replace(model, eos_ids=stops, end_id=stops[0])


@lru_cache(maxsize=1)
def cross_pair() -> Pair:
    student = tiny_model("gemma3_text", sentencepiece_bpe(), end="</s>", seed=1)
    return make_pair(ending(student, 19), tiny_model("llama", byte_bpe(), end="<|im_end|>", seed=2))


@lru_cache(maxsize=1)
def same_pair() -> Pair:
    """One tokenizer, two models."""
    student, teacher = (
        tiny_model(family, byte_bpe(), end="<|im_end|>", seed=seed)
        for family, seed in (("llama", 3), ("qwen3", 4))
    )
    return make_pair(student, teacher)


@lru_cache(maxsize=1)
def cross_figures() -> dict[str, Any]:
    return evaluate(cross_pair(), PROMPTS, CONFIG)


def near(figures: dict[str, Any], want: dict[str, Any]) -> bool:
    assert figures.keys() == want.keys()
    return all(
        x == want[key] if want[key] is None else x == pytest.approx(want[key], rel=1e-4, abs=1e-6)
        for key, x in figures.items()
    )


def logits_of(model: LanguageModel, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """What stands before each of the ids, predicted in one plain pass."""
    with torch.no_grad():
        hidden_SD = model.decoder(torch.tensor([prompt + ids]))[0]
        return model.decoder.head.logits(hidden_SD[len(prompt) - 1 : -1])


# ----------------------------------------------------------------------------- figures
def test_every_key_has_a_value_inside_its_interval() -> None:
    figures = cross_figures()
    keys = {name for key in FIGURES for name in (key, f"{key}_low", f"{key}_high")}
    assert set(figures) == {"prompts", "completions", "answers", *keys}
    assert (figures["prompts"], figures["completions"], figures["answers"]) == (7, 4, 0)
    for key in FIGURES:
        value, low, high = (figures[key + end] for end in ("", "_low", "_high"))
        if key == "exact_match":
            assert (value, low, high) == (None, None, None)
        else:
            assert low <= value <= high, key
    assert figures["forward_kl_low"] < figures["forward_kl"] < figures["forward_kl_high"]
    assert json.loads(json.dumps(figures)) == figures


def test_a_student_that_is_its_teacher_is_at_no_distance() -> None:
    model = same_pair().student
    figures = evaluate(make_pair(model, model), PROMPTS, CONFIG)
    for key in ("reverse_kl_per_byte", "forward_kl"):
        for end in ("", "_low", "_high"):
            assert figures[key + end] == pytest.approx(0, abs=1e-5)
    assert figures["bits_per_byte_student"] == figures["bits_per_byte_teacher"]


def test_distances_of_one_tokenizer_are_the_plain_ones() -> None:
    """Token by token over the whole vocabulary, on the same answers; forward is teacher||student."""
    pair = same_pair()
    student, teacher = pair.student, pair.teacher
    gap = forward = n_bytes = n_tokens = 0.0
    seeds, finished = seeds_of(CONFIG.seed, 0, EVAL, len(PROMPTS)), []
    spelled = vocabulary(student.tokenizer).token_bytes
    for prompt, seed in zip(PROMPTS, seeds, strict=True):
        ids = prompt_ids(student, prompt.prompt, plain=True)
        (one,) = sample(
            student.decoder, [ids], max_new_tokens=12, eos_ids=student.eos_ids, seed=[seed]
        )
        ours_NV = logits_of(student, ids, one.ids).log_softmax(-1)
        theirs_NV = logits_of(teacher, ids, one.ids).log_softmax(-1)
        taken_N = torch.tensor(one.ids)[:, None]
        gap_N = (ours_NV - theirs_NV).gather(1, taken_N)[:, 0]
        said = one.ids[: len(one.ids) - one.finished]
        is_text = [bool(spelled[i]) for i in said]
        gap += sum(g for g, yes in zip(gap_N.tolist(), is_text, strict=False) if yes)
        forward += float(gkd(ours_NV, theirs_NV, 0.0).sum())
        n_bytes += len(text_of_ids(student.tokenizer, said).encode())
        n_tokens += len(one.ids)
        finished.append(one.finished)
    figures = evaluate(pair, PROMPTS, CONFIG)
    assert figures["reverse_kl_per_byte"] == pytest.approx(gap / n_bytes, rel=1e-4)
    assert figures["forward_kl"] == pytest.approx(forward / n_tokens, rel=1e-4)
    assert figures["mean_tokens"] == pytest.approx(n_tokens / len(PROMPTS))
    assert figures["mean_bytes"] == pytest.approx(n_bytes / len(PROMPTS))
    assert figures["eos_rate"] == pytest.approx(np.mean(finished))


@pytest.mark.parametrize("max_overhang", [1.0, 0.01])
def test_the_forward_divergence_across_tokenizers_is_the_loss_at_beta_zero(
    max_overhang: float,
) -> None:
    pair = cross_pair()
    config = dataclasses.replace(CONFIG, beta=0.0, where="all", max_overhang=max_overhang)
    rollouts = collect(pair, *sample_answers(pair, PROMPTS, config, number=1), config)
    masks = [r.comparable_C(pair.events, max_overhang) for r in rollouts]
    losses = forward_kl(pair, rollouts, config)
    assert [len(loss_C) for loss_C in losses] == [int(mask.sum()) for mask in masks]
    want = train_pass(pair, rollouts, masks, config).loss
    pair.student.decoder.zero_grad(set_to_none=True)
    assert np.concatenate(losses).mean() == pytest.approx(want, rel=1e-5)
    alone = forward_kl(pair, rollouts[2:3], config)
    np.testing.assert_allclose(alone[0], losses[2], atol=1e-5)


def test_answers_without_a_chunk_are_at_no_distance() -> None:
    pair = same_pair()
    config = dataclasses.replace(CONFIG, lmbda=0.0)
    empty = [Prompt("hello", completion="", finished=False)]
    rollouts = collect(pair, *sample_answers(pair, empty, config, number=1), config)
    assert [len(loss_C) for loss_C in forward_kl(pair, rollouts, config)] == [0]


def test_swapping_the_models_swaps_the_figures() -> None:
    pair = same_pair()
    swapped = make_pair(pair.teacher, pair.student)
    one, other = (evaluate(p, PROMPTS, CONFIG) for p in (pair, swapped))
    for a, b in ((one, other), (other, one)):
        assert a["bits_per_byte_student"] == pytest.approx(b["bits_per_byte_teacher"], rel=1e-5)
        assert a["forward_kl"] > 0.1 and a["reverse_kl_per_byte"] > 0.1
    assert one["bits_per_byte_student"] != pytest.approx(one["bits_per_byte_teacher"], rel=1e-2)
    config = dataclasses.replace(CONFIG, lmbda=0.0)
    fixed = [p for p in PROMPTS if p.completion]
    gaps = [
        [gap_and_bytes(r) for r in collect(p, *sample_answers(p, fixed, config, number=1), config)]
        for p in (pair, swapped)
    ]
    for (gap, n), (back, m) in zip(*gaps, strict=True):
        assert (gap, n) == (pytest.approx(-back, rel=1e-4), m)


def test_bits_per_byte_are_those_of_the_plain_softmax(tmp_path: Path) -> None:
    """By `transformers`, one text at a time; the end of the text is not counted."""
    student = load(tiny_folder(tmp_path / "a", "llama", byte_bpe(), end="<|im_end|>", seed=5))
    teacher = load(
        tiny_folder(tmp_path / "b", "gemma3_text", sentencepiece_bpe(), begin="<s>", end="</s>")
    )
    prompts = [*PROMPTS, Prompt("x", completion=" the fox", teacher_prompt="the answer is dog")]
    figures = evaluate(make_pair(student, teacher), prompts, CONFIG)
    for name, model, begin in (("student", student, []), ("teacher", teacher, [1])):
        theirs = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
        bits = n_bytes = 0.0
        for p in prompts:
            if p.completion:
                asked = p.teacher_prompt if p.teacher_prompt and begin else p.prompt
                told = begin + model.tokenizer.encode(asked, add_special_tokens=False).ids
                said = encode_continuation(model.tokenizer, p.completion)[0]
                with torch.no_grad():
                    logits_SV = theirs(torch.tensor([told + said])).logits[0, :, : model.n_tokens]
                logp_SV = logits_SV.log_softmax(-1)
                logp = [float(logp_SV[len(told) + i - 1, token]) for i, token in enumerate(said)]
                bits -= sum(logp) / math.log(2)
                n_bytes += len(p.completion.encode())
        assert figures[f"bits_per_byte_{name}"] == pytest.approx(bits / n_bytes, rel=1e-4)


def test_text_that_a_tokenizer_loses_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    lossy = tiny_model("llama", byte_bpe_lossy(), end="<|im_end|>")
    pair = make_pair(lossy, same_pair().teacher)
    evaluate(pair, PROMPTS, CONFIG)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    (warning,) = [text for text in warnings if "bits per byte" in text]
    assert warning.startswith(
        "student: 1 of 4 completions have text that its tokenizer does not re"
    )


# --------------------------------------------------------------------- what changes nothing
def test_the_batch_size_and_the_settings_of_training_change_nothing() -> None:
    want = cross_figures()
    changes: tuple[dict[str, Any], ...] = (
        {"batch_size": 1, "micro_batch": 1},
        {"batch_size": 100},
        {"temperature": 0.3, "top_k": 2, "top_p": 0.5, "rollouts": 3, "lmbda": 0.0},
        {"student_temperature": 2.0, "teacher_temperature": 3.0, "beta": 1.0, "where": "reject"},
    )
    for change in changes:
        got = evaluate(cross_pair(), PROMPTS, dataclasses.replace(CONFIG, **change))
        assert near(got, want), change


def test_another_seed_gives_other_answers_and_training_draws_none_of_them() -> None:
    other = evaluate(cross_pair(), PROMPTS, dataclasses.replace(CONFIG, seed=1))
    assert other["reverse_kl_per_byte"] != cross_figures()["reverse_kl_per_byte"]
    drawn = set(seeds_of(0, 0, EVAL, 7))
    assert not any(drawn & set(seeds_of(0, n, k, 7)) for n in range(9) for k in range(EVAL))


def test_the_student_comes_back_as_it_was() -> None:
    pair = cross_pair()
    decoder, seen = pair.student.decoder, []
    decoder.requires_grad_(True)
    try:
        for mode in (True, False):
            decoder.train(mode)
            evaluate(pair, PROMPTS[:2], CONFIG, on_batch=lambda _n: seen.append(decoder.training))
            assert decoder.training == mode
        assert not any(seen)
        assert all(p.requires_grad and p.grad is None for p in decoder.parameters())
    finally:
        decoder.eval()


def test_progress_counts_prompts() -> None:
    seen: list[int] = []
    evaluate(cross_pair(), PROMPTS, CONFIG, on_batch=seen.append)
    assert seen == [4, 7]


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one prompt to evaluate on, got none"):
        evaluate(cross_pair(), [], CONFIG)


# ------------------------------------------------------------------------------- bootstrap
def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """A ratio of two means that hang together, 60 prompts each time; the truth is 2."""
    rng, held = np.random.default_rng(0), []
    for seed in range(300):
        sizes = rng.lognormal(sigma=0.7, size=60)
        top = 2 * sizes + rng.normal(size=60) * sizes
        _value, low, high = bootstrap(top, sizes, seed=seed, resamples=300)
        held.append(low < 2 < high)
    assert 0.90 <= np.mean(held) <= 0.98
    narrow = [
        bootstrap(np.arange(60.0), np.ones(60), seed=0, level=level)[2] for level in (0.5, 0.95)
    ]
    assert narrow[0] < narrow[1]


def test_top_and_bottom_of_a_prompt_are_drawn_together() -> None:
    sizes = np.arange(1.0, 30.0)
    assert bootstrap(3 * sizes, sizes, seed=0) == pytest.approx((3, 3, 3))


def test_prompts_that_do_not_count_are_left_out() -> None:
    top, bottom = np.array([1.0, 5.0, 3.0]), np.array([2.0, 0.0, 2.0])
    kept = bottom > 0
    assert bootstrap(top, bottom, seed=1) == bootstrap(top[kept], bottom[kept], seed=1)
    assert bootstrap(top[:2], bottom[:2], seed=0) == (0.5, None, None)
    assert bootstrap(top[1:2], bottom[1:2], seed=0) == (None, None, None)


def test_the_seed_decides_the_interval() -> None:
    top = np.random.default_rng(3).normal(size=20)
    one, again, other = (bootstrap(top, np.ones(20), seed=seed) for seed in (0, 0, 1))
    assert one == again != other


# ------------------------------------------------------------------------- answers and words
def test_exact_match_is_that_of_greedy_answers() -> None:
    student, teacher = demo_models()
    rows = held_out()[:12]
    assert accuracy(teacher, rows, plain=False) == 1
    spaced = [dataclasses.replace(p, answer=f"  {p.answer}\n") for p in rows]
    wrong = [dataclasses.replace(p, answer="seven") for p in rows[:3]]
    right = exact_matches(teacher, [*spaced, *wrong], plain=False, max_new_tokens=24)
    assert right == [True] * 12 + [False] * 3
    assert not any(exact_matches(teacher, rows, plain=False, max_new_tokens=2))
    pair = make_pair(teacher, student)
    config = dataclasses.replace(CONFIG, student_plain=False, max_new_tokens=24)
    figures = evaluate(pair, [*spaced, *wrong, Prompt("six glim three\n")], config)
    assert (figures["answers"], figures["exact_match"]) == (15, 12 / 15)
    assert figures["exact_match_low"] < 0.8 < figures["exact_match_high"] <= 1


@given(st.lists(st.integers(0, 3), max_size=30))
def test_repetition_counts_what_stood_there_before(ids: list[int]) -> None:
    grams = [ids[i : i + 4] for i in range(len(ids)) if len(ids) - i >= 4]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(ids) == (again / len(grams) if grams else None)


def test_the_stop_is_no_word_of_a_repetition() -> None:
    """One that ends, one that does not: of the latter all tokens count."""
    pair = cross_pair()
    seeds = seeds_of(0, 0, EVAL, len(PROMPTS))
    answers, _ = sample_answers(pair, PROMPTS, CONFIG, number=0, seeds=seeds)
    assert {a.finished for a in answers} == {True, False}
    found = [repetition(a.ids[: len(a.ids) - a.finished]) for a in answers]
    want = np.mean([x for x in found if x is not None])
    assert cross_figures()["repetition"] == pytest.approx(want)


# ------------------------------------------------------------------------------ command line
class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*args: str | Path) -> Result:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main([str(arg) for arg in args])
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("evaluate")
    tiny_folder(work / "student", "gemma3_text", sentencepiece_bpe(), begin="<s>", end="</s>")
    tiny_folder(work / "teacher", "llama", byte_bpe(), end="<|im_end|>", template=CHATML, seed=2)
    (work / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(work / "student", work / "run" / "checkpoints" / "step-5")
    rows = [
        {"prompt": "hello", "completion": " the fox"},
        {"prompt": "Paris", "answer": "x"},
        {"prompt": "def", "completion": " add"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (work / "prompts.jsonl").write_text(text, "utf-8")
    long = {"prompt": "a", "completion": "hello " * 200}
    (work / "long.jsonl").write_text(json.dumps(long), "utf-8")
    return work


def command(work: Path, *more: str | Path) -> Result:
    return run(
        "eval", "--teacher", work / "teacher", "--student", work / "student", "--prompts",
        work / "prompts.jsonl", "--max-new-tokens", "9", *more,
    )  # fmt: skip


def test_a_table_and_a_last_line_of_json(work: Path) -> None:
    done = command(work, "--student-plain")
    assert done.code == 0, done.err
    *table, last = done.out.splitlines()
    figures = json.loads(last)
    pair = make_pair(load(work / "student"), load(work / "teacher"))
    prompts = [Prompt("hello", " the fox"), Prompt("Paris", answer="x"), Prompt("def", " add")]
    want = evaluate(pair, prompts, Config(student_plain=True, max_new_tokens=9))
    assert near(figures, want)
    assert "\n".join(table) == told(figures)
    assert command(work, "--student-plain", "--json").out == last + "\n"
    assert done.err == "3 of 3 prompts\n"


def test_options_are_used(work: Path) -> None:
    seen: list[tuple[Pair, list[Prompt], Config]] = []

    def watched(pair: Pair, prompts: list[Prompt], config: Config, **more: Any) -> dict[str, Any]:
        seen.append((pair, prompts, config))
        return evaluate(pair, prompts, config, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigold.cli_models.evaluate", watched)
        done = command(work, "--plain-prompt", "--limit", "2", "--seed", "5", "--batch-size", "1",
                       "--micro-batch", "2", "--dtype", "bfloat16", "--device", "cpu")  # fmt: skip
        assert done.err == "1 of 2 prompts\n2 of 2 prompts\n"
        done = command(work, "--student", work / "run", "--student-plain", "--teacher-plain")
        assert done.code == 0
        assert re.match(r".*run: the model is checkpoints/step-5\n", done.err)
    (pair, prompts, config), (_, _, plain) = seen
    assert (len(prompts), config.seed, config.batch_size, config.micro_batch) == (2, 5, 1, 2)
    assert config.max_new_tokens == 9
    assert (config.student_plain, config.teacher_plain) == (True, True)
    assert (plain.student_plain, plain.teacher_plain) == (True, True)
    assert pair.student.decoder.dtype == torch.float32
    assert pair.teacher.decoder.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "prompt of line 1, student: expected a chat template for .*student, got none"),
        (["--student-plain", "--limit", "0"], "expected --limit at least 1, got 0"),
        (["--plain-prompt", "--batch-size", "0"], "expected --batch-size at least 1, got 0"),
        (["--plain-prompt", "--max-new-tokens", "199"],
         r"student: expected at most 1 tokens \(the context of 200 less --max-new-tokens\)"),
        (["--plain-prompt", "--prompts", "long.jsonl"],
         "line 1, student: expected at most 200 tokens with the completion and its end"),
        (["--plain-prompt", "--prompts", "absent"], "expected a file of JSON lines, found no absent"),
        (["--student", "./absent"], "expected a model folder, found no folder absent"),
        (["--plain-prompt", "--device", "abacus"], "expected --device auto, cuda, mps or cpu"),
        (["more"], "unrecognized arguments: more"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_told_in_one_line(
    work: Path, more: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    code, out, err = command(work, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err


def test_the_table_has_a_dash_where_nothing_was_measured() -> None:
    lines = told(cross_figures()).splitlines()
    assert lines[0] == "7 prompts, 4 with a completion, 0 with an answer"
    assert len(lines) == 2 + len(FIGURES)
    (dash,) = [line for line in lines if "greedy" in line]
    assert dash.split()[-2:] == ["-", "share"]
    assert all(len(line) <= 100 for line in lines)


def test_the_page_explains_each_figure_and_no_other() -> None:
    section = PAGE.read_text("utf-8").partition("\n## What `minigold eval` says")[2]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| .+ \| .+ \|$", section, re.MULTILINE)
    units = {key: unit for cell, unit in rows for key in re.findall(r"`(\w+)`", cell)}
    assert units == {key: unit for key, (_label, unit) in FIGURES.items()}
    assert (
        int(re.search(r"([\d,]+) resamples", section)[1].replace(",", "")) == evaluation.RESAMPLES
    )
