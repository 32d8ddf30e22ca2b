# SPDX-License-Identifier: Apache-2.0
"""The same on an accelerator as on the CPU.

    MINIGOLD_DEVICE=cuda python -m pytest tests/gpu

Without the variable the device is the CPU: the same tests, and a check of themselves.
"""

import copy
import dataclasses
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from minigold import replay
from minigold import sample as sampling
from minigold.masked import choose_chunks, train_pass
from minigold.pair import Pair, make_pair
from minigold.rollout import collect, sample_answers
from minigold.sample import sample
from minigold.train import take_step
from reference import sample_slowly
from test_replay import check_alike
from test_train import CONFIG, PROMPTS, cross_pair
from tiny_models import tiny_decoder

DEVICE = torch.device(os.environ.get("MINIGOLD_DEVICE", "cpu"))
FIXED = [
    dataclasses.replace(p, completion=f"{p.prompt} and so on, naïve 日本 🎉.") for p in PROMPTS
]
OFF_POLICY = dataclasses.replace(CONFIG, lmbda=0.0)


@lru_cache(maxsize=2)
def pair_on(device: torch.device) -> Pair:
    sides = []
    for model in (cross_pair().student, cross_pair().teacher):
        decoder = copy.deepcopy(model.decoder).to(device)
        sides.append(dataclasses.replace(model, decoder=decoder))
    return make_pair(*sides)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_sampling_equals_the_slow_version_on_the_cpu(family: str) -> None:
    """In float32; between looks no token waits for the device."""
    prompts, slow = (
        [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 7, 1, 8, 2], [4]],
        tiny_decoder(family),
    )
    model = copy.deepcopy(slow).to(DEVICE)
    got = sample(model, prompts, max_new_tokens=20, eos_ids=[], seed=5)
    for i, (prompt, one) in enumerate(zip(prompts, got, strict=True)):
        g = torch.Generator().manual_seed(5 + i)
        uniform = torch.rand(20, generator=g, dtype=torch.float64).tolist()
        assert one.ids == sample_slowly(slow, prompt, uniform, 20)
        assert one.logp_S.device.type == "cpu"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_recorded_steps_change_no_token(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On CUDA as a graph; elsewhere it cannot be recorded, which is said, and changes nothing."""
    monkeypatch.setattr(replay, "COLUMNS", 16)
    model = copy.deepcopy(tiny_decoder(family)).to(DEVICE)
    settings = {"max_new_tokens": 40, "eos_ids": range(0, 40, 9), "seed": 4}
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 7, 1, 8, 2], [4]]
    for lower in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=lower):
            model.cuda_graphs = False
            want = sample(model, prompts, **settings)
            model.cuda_graphs = True
            got = sample(model, prompts, **settings)
        check_alike(got, want)
        assert lower or [one.ids for one in got] == [one.ids for one in want]
    warned = "without CUDA graphs" in caplog.text
    assert warned == (DEVICE.type != "cuda")


def test_stops_end_rows_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sampling.LOOK, DEVICE.type, 16)
    model = copy.deepcopy(tiny_decoder("llama")).to(DEVICE)
    settings = {"max_new_tokens": 30, "eos_ids": range(0, 40, 7)}
    got = sample(model, [[4, 5]] * 8, **settings)
    want = sample(tiny_decoder("llama"), [[4, 5]] * 8, **settings)
    assert [one.ids for one in got] == [one.ids for one in want]
    assert len({len(one.ids) for one in want}) > 3


@pytest.mark.parametrize("where", ["all", "sampled", "divergence"])
def test_scores_masks_and_gradient_are_those_of_the_cpu(where: str) -> None:
    """On a GPU the student's products are bfloat16 under autocast: 2 % of the gradient's norm."""
    config = dataclasses.replace(OFF_POLICY, where=where)
    found = []
    for device in (DEVICE, torch.device("cpu")):
        pair = pair_on(device)
        rollouts = collect(pair, *sample_answers(pair, FIXED, config, number=1), config)
        chosen = choose_chunks(rollouts, pair.events, config, seed=3)
        pair.student.decoder.zero_grad(set_to_none=True)
        if found:  # what is chosen may turn on the last digit
            chosen = found[0][2]
        done = train_pass(pair, rollouts, chosen, config)
        grads = [p.grad.flatten().cpu() for p in pair.student.decoder.parameters()]
        found.append((rollouts, done, chosen, torch.cat(grads)))
    (ours, done, _, grad), (theirs, expected, _, expected_grad) = found
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.teacher_logp_C, b.teacher_logp_C, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(a.student_logp_C, b.student_logp_C, atol=0.05, rtol=0.02)
    assert done.loss == pytest.approx(expected.loss, rel=0.02)
    assert (grad - expected_grad).norm() < 0.02 * expected_grad.norm()


def test_scores_can_wait_beside_the_device() -> None:
    pair = pair_on(DEVICE)
    rollouts = collect(pair, *sample_answers(pair, FIXED, OFF_POLICY, number=1), OFF_POLICY)
    away = [dataclasses.replace(r, score=r.score.to("cpu")) for r in rollouts]
    every, losses = [np.ones(len(r.chunks.s0), dtype=bool) for r in rollouts], []
    for some in (rollouts, away):
        losses.append(train_pass(pair, some, every, OFF_POLICY).loss)
        pair.student.decoder.zero_grad(set_to_none=True)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_step_trains() -> None:
    pair = Pair(*(copy.deepcopy(x) for x in (pair_on(DEVICE).student, pair_on(DEVICE).teacher)),
                pair_on(DEVICE).events)  # fmt: skip
    optimizer = torch.optim.AdamW(pair.student.decoder.parameters(), lr=1e-3)
    losses = [
        take_step(pair, optimizer, FIXED, OFF_POLICY, number=n + 1).metrics["loss"]
        for n in range(12)
    ]
    assert losses[-1] < 0.9 * losses[0]
