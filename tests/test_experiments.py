# SPDX-License-Identifier: Apache-2.0
"""The screening of docs/experiments.md: each arm does what its name says, and tables add up."""

import dataclasses
import doctest
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minigold.masked
import minigold.train
from minigold.chat import prompt_ids
from minigold.data import Prompt
from minigold.load import load
from minigold.offsets import encode_continuation, vocabulary
from minigold.pair import Pair, make_pair
from minigold.rollout import collect, sample_answers
from minigold.train import Step, distill
from real_models import example

screen = example("experiments/screen")
table = example("experiments/table")
arms, baselines, real_tasks, task = (
    sys.modules[name] for name in ("arms", "baselines", "real_tasks", "task")
)


ARMS, TRAINED = arms.ARMS, [name for name, arm in arms.ARMS.items() if arm.trains]
SMALL = dataclasses.replace(arms.BASE, batch_size=4, max_new_tokens=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of the screening after a few steps of training."""
    folder = tmp_path_factory.mktemp("models")
    task.make(folder, scale=0.003, say=lambda _text: None)
    return folder


TASKS = dict(screen.TASKS)  # as they are, without what a fixture puts there


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(screen.TASKS, "tiny", screen.Task(task.make, SMALL))
    yield
    torch.set_num_threads(threads)


@cache
def steps_of(name: str, models: Path, n: int = 2) -> tuple[list[Step], Pair]:
    """The first steps of an arm, and its pair after them."""
    arm, found, pairs = ARMS[name], [], []
    config = dataclasses.replace(screen.read_as(SMALL, arm), **arm.changes, steps=n)
    student, teacher = load(models / arm.student), load(models / arm.teacher)

    def seen(pair: Pair, *args: Any, **kwargs: Any) -> Step:
        pairs.append(pair)
        return take(pair, *args, **kwargs)

    take = minigold.train.take_step
    with arms.replaced(arm), pytest.MonkeyPatch.context() as patch:
        patch.setattr(minigold.train, "take_step", seen)
        distill(
            student,
            teacher,
            screen.rows_of(models, "held-out")[0][:12],
            config,
            on_step=found.append,
        )
    return found, pairs[0]


# ------------------------------------------------------------------------- the task
def test_the_student_learns_to_add_and_nothing_of_the_operator() -> None:
    """Half of its first texts are right sums, the others' numbers have nothing to do with the prompt."""
    rows, words = task.forms(seed=2), [task.number_word(n) for n in range(100)]
    added = right = 0
    for row, p in zip(rows, task.prompts(), strict=True):
        name, told = row.prompt.strip().split(": ")
        if "plus" in told:
            sums = [[words.index(x) for x in one.split(" plus ")] for one in told.split(", ")]
            assert row.answer == task.answer(name, *(words[sum(pair)] for pair in sums))
            assert row.prompt.replace("plus", "glim") == p.prompt
            added += 1
        else:
            assert row.prompt == p.prompt and task.well_indented(row.answer)
            right += row.answer == p.answer
    assert added == len(rows) // 2 and right < 0.002 * len(rows)


@given(st.integers(0, 2**32 - 1))
def test_damaged_answers_are_right_but_for_their_mistakes(seed: int) -> None:
    rows = task.prompts()[:8]
    for p, bad in zip(rows, task.damaged(rows, seed), strict=True):
        text, right, ranges = bad.answer.encode(), p.answer.encode(), bad.extra["mistakes"]
        edges = [0, *(edge for pair in ranges for edge in pair), len(text)]
        assert edges == sorted(edges) and 1 <= len(ranges) <= 3
        kept = [text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        at = 0
        for piece in kept:
            at = right.index(piece, at) + len(piece)
        assert right.startswith(kept[0]) and right.endswith(kept[-1])
        assert all(start < stop for start, stop in ranges)  # a gap is told by what follows it


def test_mistakes_are_read_and_not_learned(models: Path) -> None:
    """The mean cross-entropy of the tokens that touch no mistake, by hand."""
    model, text = load(models / "teacher"), "def café():"
    start = text.encode().index("é".encode())
    ids, spans = encode_continuation(model.tokenizer, text)
    right = [i for i, (a, b, _) in enumerate(spans.tolist()) if b <= start or a >= start + 2]
    assert 1 < len(right) < len(ids)
    told = prompt_ids(model, "six", plain=False)
    with torch.no_grad():
        states = model.decoder(torch.tensor([[*told, *ids]]))[0, len(told) - 1 :]
        logp = model.decoder.head.logits(states).log_softmax(-1)
    each = [-logp[i, ids[i]] for i in right] + [-logp[len(ids), model.end_id]]
    said: list[str] = []
    row = task.Prompt("six", answer=text, extra={"mistakes": [(start, start + 2)]})
    task.fine_tune(model, iter([[row]]), steps=1, lr=1e-9, plain=False, say=said.append)
    assert said == [f"step 1/1  loss {torch.stack(each).mean().item():.4f}"]


def test_answers_are_code_with_the_right_numbers() -> None:
    shapes, words = set(), [task.number_word(n) for n in range(100)]
    sums = [
        {one for row in rows for one in row.prompt.strip().split(": ")[1].split(", ")}
        for rows in (task.held_out(), task.prompts())
    ]
    assert sums[0] <= sums[1] and len(sums[1]) == task.OPERANDS**2
    for row in task.held_out():
        name, told = row.prompt.strip().split(": ")
        numbers = [
            words[task.glim(*map(words.index, one.split(" glim ")))] for one in told.split(", ")
        ]
        assert row.answer == task.answer(name, *numbers)
        assert row.answer.index(numbers[0]) <= row.answer.rindex(numbers[1])
        assert name in row.answer and task.well_indented(row.answer)
        shapes.add(row.answer.count("\n"))
    assert shapes == {1, 2, 3}
    every = [p.prompt for p in (*task.held_out(), *task.prompts())]
    assert len(every) == len(set(every)) == task.N_HELD_OUT + task.N_PROMPTS


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())
def test_indentation_is_judged_line_by_line(depths: list[int], data: st.DataObject) -> None:
    """A line opens a level exactly if the next one stands deeper; any other change is seen."""
    levels = [0]
    for depth in depths:
        levels.append(min(depth, levels[-1] + 1))
    lines = [
        " " * 4 * level + ("if a:" if after > level else "a")
        for level, after in zip(levels, [*levels[1:], 0], strict=True)
    ]
    assert task.well_indented("\n".join(lines))
    place = data.draw(st.integers(0, len(lines) - 1))
    opens = lines[place].endswith(":")
    for wrong in (
        " " + lines[place],
        "",
        lines[place][:-1] if opens else f"{lines[place]}\n     a",
    ):
        assert not task.well_indented("\n".join([*lines[:place], wrong, *lines[place + 1 :]]))


def test_no_two_tokens_of_the_student_stand_for_the_same_bytes() -> None:
    """Gemma has such ids, and BPM takes the first for all: it would be judged by that alone."""
    for apart in (False, True):
        spelled = [x for x in vocabulary(task.student_tokenizer(apart=apart)).token_bytes if x]
        assert len(spelled) == len(set(spelled)) > 256


def test_indentation_has_no_token_in_common() -> None:
    student, teacher = task.student_tokenizer(), task.teacher_tokenizer()
    text = "\n        return ten"
    ours, theirs = (one.encode(text, add_special_tokens=False).tokens for one in (student, teacher))
    assert ours[:2] == ["\n", "▁" * 8] and theirs[:2] == ["Ċ" + "Ġ" * 7, "Ġreturn"]


# ------------------------------------------------------------------------- the arms
@pytest.mark.parametrize("name", TRAINED)
def test_each_arm_trains(name: str, models: Path) -> None:
    (first, second), pair = steps_of(name, models)
    before = load(models / ARMS[name].student).decoder.state_dict()
    assert not first.wrong and not second.wrong
    assert math.isfinite(second.metrics["loss"])
    assert any(
        not torch.equal(x, before[key]) for key, x in pair.student.decoder.state_dict().items()
    )


def logits_of(pair: Pair, rollout: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both models, by one plain pass each; row i predicts token i of the answer."""
    answer, both = rollout.answer, []
    for model, told, ids in (
        (pair.student, answer.prompt_ids, answer.ids),
        (pair.teacher, answer.teacher_prompt_ids, answer.teacher_ids),
    ):
        hidden_SD = model.decoder(torch.tensor([[*told, *ids]]))[0]
        both.append(model.decoder.head.logits(hidden_SD[len(told) - 1 :]))
    return both[0], both[1]


def read(name: str, models: Path) -> tuple[Pair, list[Any], Any]:
    arm = ARMS[name]
    config = dataclasses.replace(screen.read_as(SMALL, arm), **arm.changes)
    student, teacher = load(models / arm.student), load(models / arm.teacher)
    with arms.replaced(arm):
        pair = make_pair(student, teacher, events=config.events)
        rows = screen.rows_of(models, "held-out")[0][:6]
        answers, side = sample_answers(pair, rows, config, number=1)
        return pair, collect(pair, answers, side, config), config


def rival(name: str, pair: Pair, rollout: Any) -> tuple[torch.Tensor, int]:
    """The loss of `baselines.py` on one answer, and the tokens it is a mean over."""
    answer, (student_NV, teacher_MW) = rollout.answer, logits_of(pair, rollout)
    n, end = len(answer.ids) - answer.finished, len(rollout.chunks.s0) - answer.finished
    chunks = type(rollout.chunks)(*(column[:end] for column in rollout.chunks))
    one = baselines.Answer(
        student_NV[: n + 1], teacher_MW, answer.ids[:n], answer.teacher_ids, chunks
    )
    if name == "uld":
        return baselines.uld(one), 1
    if name == "uld-paper":  # an answer's tokens weigh as one
        logp = student_NV.log_softmax(-1)[range(len(answer.ids)), answer.ids]
        return 1.5 * baselines.uld(one, extended=False) - logp.mean(), 1
    if name.startswith("bpm"):
        found = [vocabulary(m.tokenizer, end_ids=m.eos_ids) for m in (pair.student, pair.teacher)]
        texts = [
            [b if role == "text" else b"" for b, role in zip(v.token_bytes, v.roles, strict=True)]
            for v in found
        ]
        stops = {"student_stop": pair.student.end_id, "teacher_stops": pair.teacher.eos_ids}
        made = baselines.prefixes(*texts, **stops)
        size = len(answer.ids)
        spaces = name == "bpm-spaces"
        return baselines.bpm(one, table=made, stopped=answer.finished, spaces=spaces) * size, size
    merge = "bayesian" if name in ("trl-bayesian", "trl-beta-0") else "observed"
    matched = baselines.matched_by_string(
        *(m.tokenizer.get_vocab() for m in (pair.student, pair.teacher))
    )
    beta = 0.0 if name == "trl-beta-0" else 0.5
    return baselines.trl_gold(one, matched=matched, merge=merge, beta=beta), 1


@pytest.mark.parametrize(
    "name",
    [
        "uld",
        "uld-paper",
        "trl-gold",
        "trl-gold-on",
        "trl-bayesian",
        "trl-beta-0",
        "bpm",
        "bpm-spaces",
    ],
)
def test_rivals_are_the_baselines(name: str, models: Path) -> None:
    pair, rollouts, config = read(name, models)
    pair.student.decoder.requires_grad_(True)
    done = arms.whole_pass(ARMS[name])(pair, rollouts, [r.scorable_C for r in rollouts], config)
    gradient = torch.cat([p.grad.ravel() for p in pair.student.decoder.parameters()])
    pair.student.decoder.zero_grad()
    losses, sizes = zip(*(rival(name, pair, r) for r in rollouts), strict=True)
    mean = torch.stack(losses).sum() / sum(sizes)
    assert done.loss == pytest.approx(mean.item(), rel=1e-4, abs=1e-6)
    mean.backward()
    other = torch.cat([p.grad.ravel() for p in pair.student.decoder.parameters()])
    torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)
    assert gradient.norm().item() > 0


def test_trl_ships_with_teacher_text_and_a_cut_distribution(models: Path) -> None:
    steps, _ = steps_of("trl-gold", models, n=4)
    shares = [step.metrics["off_policy_fraction"] for step in steps]
    assert 0 < np.mean(shares) < 1
    assert (arms.TRL_SAMPLING["temperature"], arms.TRL_SAMPLING["top_p"]) == (0.9, 0.95)
    settings = screen.settings_of("strict-paper", 0, task="tiny", steps=1, lr=2e-3, on="held-out")
    paper = screen.config_of(settings)  # 2610.08448
    assert (paper.temperature, paper.top_p, paper.beta, paper.where) == (1.0, 0.95, 1.0, "all")


@pytest.mark.parametrize("name", ["fine-tuned", "off-policy", "uld-paper"])
def test_off_policy_arms_read_what_the_teacher_wrote(name: str, models: Path) -> None:
    (step, _), _ = steps_of(name, models)
    written = {p.prompt: p.completion for p in task.read_texts(models, "train")}
    assert step.metrics["off_policy_fraction"] == 1
    assert all(r.answer.text == written[r.answer.prompt.prompt] for r in step.rollouts)


def test_fine_tuning_is_cross_entropy(models: Path) -> None:
    pair, rollouts, config = read("fine-tuned", models)
    done = arms.whole_pass(ARMS["fine-tuned"])(pair, rollouts, [], config)
    logps = [
        logits_of(pair, r)[0].log_softmax(-1)[range(len(r.answer.ids)), r.answer.ids].sum().item()
        for r in rollouts
    ]
    tokens = sum(len(r.answer.ids) for r in rollouts)
    assert done.loss == pytest.approx(-sum(logps) / tokens, rel=1e-4)


def test_suppression_lowers_unlikely_tokens_and_reads_no_teacher() -> None:
    logits = torch.tensor([[2.0, 0.0, -3.0], [0.0, 0.0, 0.0]], requires_grad=True)
    rollout = SimpleNamespace(answer=SimpleNamespace(ids=[2]))
    loss = arms.suppress_loss(None)(rollout, logits, None)
    assert loss.item() == pytest.approx(logits[0].log_softmax(-1)[2].item())
    loss.backward()
    assert logits.grad[0, 2] > 0 > logits.grad[0, 0]  # descent lowers the token that was sampled
    likely = arms.suppress_loss(None)(
        SimpleNamespace(answer=SimpleNamespace(ids=[0])), logits, None
    )
    assert likely.item() == 0


def test_parts_are_left_out_and_nothing_else(models: Path) -> None:
    _, whole, _ = read("gold", models)
    assert any(r.observed_C.any() for r in whole)
    assert any(r.student_stay_C.any() or r.score.carried for r in whole)
    _, bare, _ = read("no-observed", models)
    assert not any(r.observed_C.any() for r in bare)
    assert [r.answer.ids for r in bare] == [r.answer.ids for r in whole]
    for a, b in zip(bare, whole, strict=True):
        np.testing.assert_array_equal(a.teacher_logp_C, b.teacher_logp_C)
    _, bare, _ = read("no-carry", models)
    assert not any(
        r.student_stay_C.any() or r.teacher_stay_C.any() or r.score.carried for r in bare
    )
    assert any(r.observed_C.any() for r in bare)


def test_controls_spoil_what_they_say(models: Path) -> None:
    pair, whole, _ = read("gold", models)
    spoiled, _, _ = read("shuffled", models)
    ours, theirs = pair.events.teacher.event_V, spoiled.events.teacher.event_V
    torch.testing.assert_close(spoiled.events.student.event_V, pair.events.student.event_V)
    renamed = {(int(a), int(b)) for a, b in zip(ours, theirs, strict=True)}
    assert len(renamed) == len({a for a, _ in renamed}) == len({b for _, b in renamed})
    assert sum(a == b for a, b in renamed) < 0.1 * len(renamed)
    _, moved, _ = read("shifted", models)
    for a, b in zip(moved, whole, strict=True):
        assert a.answer.ids == b.answer.ids
        text = slice(None, -1 if b.answer.finished else None)
        assert (a.chunks.t0[text] == b.chunks.t0[text] + 1).mean() > 0.5 or len(b.chunks.t0) < 3
    longest, _, _ = read("longest", models)
    assert (longest.events.teacher.event_V != ours).any()


def test_untaught_has_another_teacher_and_the_same_judge(models: Path) -> None:
    _, pair = steps_of("untaught", models)
    taught = load(models / "teacher").decoder.state_dict()
    assert any(
        not torch.equal(x, taught[key]) for key, x in pair.teacher.decoder.state_dict().items()
    )


@pytest.mark.parametrize("name", [name for name in ARMS if name.startswith("random-")])
def test_random_masks_train_as_many_chunks(name: str, models: Path) -> None:
    mask = "gold" if name == "random-weighted" else name.removeprefix("random-")
    (drawn, meant) = (steps_of(one, models)[0][0] for one in (name, mask))
    counts = [sum(int(m.sum()) for m in step.chosen) for step in (drawn, meant)]
    assert counts[0] == counts[1] > 0
    places = [np.concatenate(step.chosen) for step in (drawn, meant)]
    assert places[0].all() or (places[0] != places[1]).any()


def test_two_sided_rejects_either_way(models: Path) -> None:
    (step, *_), _ = steps_of("gold", models)
    for r in step.rollouts:
        one, two = minigold.train.acceptance_of(r), arms.two_sided(r, "sampled")
        other = torch.as_tensor((r.student_logp_C - r.teacher_logp_C).clip(max=0)).exp()
        other = torch.where(torch.as_tensor(r.scorable_C), other, 0.0)
        torch.testing.assert_close(two, torch.minimum(one, other))


def test_one_tokenizer_is_gkd(models: Path) -> None:
    gradients, losses = [], []
    for name in ("same-gold", "same-gkd"):
        pair, rollouts, config = read(name, models)
        assert pair.events.identical
        pair.student.decoder.requires_grad_(True)
        every = [np.ones(len(r.chunks.s0), dtype=bool) for r in rollouts]
        with arms.replaced(ARMS[name]):
            train_pass = minigold.train.train_pass
            losses.append(train_pass(pair, rollouts, every, config).loss)
        gradients.append(torch.cat([p.grad.ravel() for p in pair.student.decoder.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------- runs
@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = screen.rows_of
    monkeypatch.setattr(
        screen, "rows_of", lambda models, on: (whole(models, on)[0], whole(models, on)[1][:6])
    )


def test_a_run_is_one_small_file_that_is_not_made_twice(
    models: Path, few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = screen.settings_of("gold", 3, task="tiny", steps=3, lr=1e-3, on="held-out")
    line = ["--one", json.dumps(settings), "--models", str(models), "--out", str(tmp_path)]
    assert screen.main(line) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {key: found[key] for key in settings} == settings
    assert path.name == "gold.seed3.json" and path.stat().st_size < 3000
    assert {len(found[key]) for key in ("right", "stopped", "indented")} == {6}
    assert [look["step"] for look in found["curve"]] == [3]
    assert found["tokens"] == found["curve"][-1]["tokens"] > 0 < found["cpu_seconds"]
    others = {
        screen.weights_of(models, ARMS[arm]) for arm in ("gold", "all", "untaught", "same-gold")
    }
    assert found["config"]["lr"] == 1e-3 and found["library"] == screen.code()["library"]
    assert found["weights"] in others and len(others) == 3 and len(found["weights"]) == 8

    def no_more(*_args: Any) -> str:
        raise AssertionError("it was run again")

    monkeypatch.setattr(screen, "one_process", no_more)
    again = ["--arms", "gold", "--seeds", "3", "--models", str(models), "--out", str(tmp_path)]
    assert screen.main([*again, "--steps", "3", "--lr", "1e-3"]) == 0
    with pytest.raises(ValueError, match=r"expected {'lr': 0.004} in .*, got {'lr': 0.001}; name"):
        screen.main([*again, "--steps", "3"])


def test_a_smaller_batch_is_looked_at_after_as_many_samples(models: Path, few: None) -> None:
    settings = screen.settings_of("batch-16", 0, task="tiny", steps=4, lr=1e-3, on="held-out")
    found = screen.run(settings, models, every=1)
    assert [look["step"] for look in found["curve"]] == [4]


def test_what_fails_is_told_and_what_is_done_stays(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = []

    def half(settings: dict[str, Any], path: Path, _models: Path) -> str:
        ran.append(settings["arm"])
        if settings["arm"] == "uld":
            return "uld failed"
        path.write_text(json.dumps(settings))
        return "done"

    monkeypatch.setattr(screen, "one_process", half)
    line = ["--arms", "gold,uld,bpm", "--models", str(models), "--out", str(tmp_path)]
    assert screen.main(line) == 1
    assert "uld failed" in capsys.readouterr().out
    assert screen.main(line) == 1
    assert sorted(ran) == ["bpm", "gold", "uld", "uld"]


def test_a_smaller_batch_has_as_many_more_steps_but_at_equal_time(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, arm in ARMS.items():
        small = arm.changes.get("batch_size", arms.BASE.batch_size)
        assert small * arm.times == arms.BASE.batch_size, name
    ran = {}

    def no_run(settings: dict[str, Any], path: Path, _models: Path) -> str:
        ran[path] = settings["steps"]
        row = {**settings, "cpu_seconds": 10.0 * len(ran), "machine": screen.machine()}
        path.write_text(json.dumps(row))
        return "done"

    monkeypatch.setattr(screen, "one_process", no_run)
    line = ["--arms", "gold,batch-16,bpm", "--steps", "50", "--models", str(models)]
    assert screen.main([*line, "--out", str(tmp_path / "a")]) == 0
    assert [*ran.values()] == [50, 200, 50]
    assert (
        screen.main([*line, "--equal-time", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 0
    )
    assert [*ran.values()][3:] == [50, 100, 17]


def test_few_prompts_are_the_first(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def one_step(*args: Any, **_options: Any) -> list[dict[str, Any]]:
        read.append([p.prompt for p in args[2]])
        return [{}]

    monkeypatch.setattr(screen, "distill", one_step)
    rows = task.prompts()[:300], task.held_out()
    monkeypatch.setattr(screen, "rows_of", lambda *_: rows)
    monkeypatch.setattr(screen, "measure", lambda *_: {})
    monkeypatch.setattr(screen, "replaced", nullcontext)
    few = [name for name, arm in arms.ARMS.items() if arm.prompts]
    for name in ("gold", *few):
        settings = screen.settings_of(name, 0, task="tiny", steps=1, lr=1e-3, on="held-out")
        screen.run(settings, models)
    whole, *parts = read
    assert len(whole) == 300
    assert parts == [whole[: int(name.rpartition("-")[2])] for name in few] and len(parts) == 6


def test_the_untouched_student_is_measured_as_it_is(models: Path, few: None) -> None:
    for name in ("untouched", "teacher"):
        settings = screen.settings_of(name, 0, task="tiny", steps=9, lr=1e-3, on="held-out")
        assert settings["steps"] == 0
        found = screen.run(settings, models)
        assert "cpu_seconds" not in found
    assert found["reverse_kl_per_byte"] == pytest.approx(0, abs=1e-6)  # the teacher beside itself


def test_validation_prompts_are_not_trained_on(models: Path) -> None:
    train, validation = screen.rows_of(models, "validation")
    assert not {p.prompt for p in train} & {p.prompt for p in validation}
    same, test = screen.rows_of(models, "held-out")
    assert same == train and not {p.prompt for p in test} & {p.prompt for p in train}


def test_equal_time_gives_a_slow_arm_fewer_steps(tmp_path: Path) -> None:
    for name, seconds in (("gold", 100.0), ("bpm", 400.0), ("untouched", 1.0)):
        row = {"steps": 250 if name != "untouched" else 0, "cpu_seconds": seconds, "machine": {}}
        (tmp_path / f"{name}.seed0.json").write_text(json.dumps(row))
    assert screen.steps_for("bpm", 0, tmp_path) == 62
    assert screen.steps_for("gold", 0, tmp_path) == 250
    with pytest.raises(ValueError, match=r"expected the run .*uld.seed0.json, found none; run it"):
        screen.steps_for("uld", 0, tmp_path)
    with pytest.raises(ValueError, match="expected an arm that is trained, got 'untouched'"):
        screen.steps_for("untouched", 0, tmp_path)
    other = {"steps": 250, "cpu_seconds": 9.0, "machine": {"cpu": "y"}}
    (tmp_path / "bpm.seed0.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"expected 'bpm' and 'gold' from one machine, got .*'y'"):
        screen.steps_for("bpm", 0, tmp_path)


def test_the_warm_up_is_a_share_of_the_steps() -> None:
    one = {"task": "tiny", "seed": 7, "lr": 1e-3}
    for name, steps in (("gold", 250), ("gold", 50), ("batch-16", 1000), ("bpm", 1)):
        config = screen.config_of({**one, "arm": name, "steps": steps})
        assert (config.steps, config.warmup) == (steps, steps // 5)
        batch = 16 if name == "batch-16" else SMALL.batch_size
        assert (config.seed, config.lr, config.batch_size) == (7, 1e-3, batch)
        assert screen.told(config) == {
            key: x for key, x in dataclasses.asdict(config).items()
            if x != dataclasses.asdict(minigold.config.Config())[key]
        }  # fmt: skip


def test_an_unknown_arm_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        screen.main(["--arms", "golden", "--out", str(tmp_path)])
    assert "expected --arms out of teacher, untouched, gold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--task", "skill", "--arms", "gold,apart-gold"],
         "--arms apart-gold needs the model 'apart', which --task skill does not have; leave it out"),
        (["--task", "behaviour", "--arms", "untaught"], "needs the model 'untaught'"),
        (["--arms", "gold", "--steps", "0"], "expected --steps at least 1, got 0"),
        (["--arms", "gold", "--lr", "0"], "expected --lr above 0, got 0.0"),
        (["--seeds", "0;1"], "--seeds: expected whole numbers such as 0,1,2, got '0;1'"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_do_is_refused_before_models_are_made(
    line: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_late(_models: Path) -> None:
        raise AssertionError("models are made")

    for name, one in screen.TASKS.items():
        monkeypatch.setitem(screen.TASKS, name, dataclasses.replace(one, make=too_late))
    models = tmp_path / "models"
    with pytest.raises(SystemExit):
        screen.main([*line, "--models", str(models), "--out", str(tmp_path / "runs")])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------- real tasks
DEMO = Path(minigold.masked.__file__).parent / "demo_data"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's models in place of real ones, which are not trained, and few short texts."""
    places = {"smollm2": DEMO / "teacher", "gemma": DEMO / "student"}
    monkeypatch.setattr(real_tasks, "real_folder", places.__getitem__)
    monkeypatch.setattr(real_tasks, "fine_tune", lambda *_args, **_kwargs: None)
    for name in ("requests", "skill_rows"):
        train, held_out = getattr(real_tasks, name)()
        few = (
            [Prompt(p.prompt[:30], answer=p.answer) for p in rows[:6]] for rows in (train, held_out)
        )
        monkeypatch.setattr(real_tasks, name, lambda found=(*few,): found)
    for name in ("SKILL", "BEHAVIOUR"):
        short = dataclasses.replace(getattr(real_tasks, name), max_new_tokens=6, batch_size=4)
        monkeypatch.setattr(real_tasks, name, short)
        monkeypatch.setitem(
            screen.TASKS,
            name.lower(),
            dataclasses.replace(
                screen.TASKS[name.lower()],
                make=getattr(real_tasks, f"make_{name.lower()}"),
                base=short,
            ),
        )


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("tiny", {"gold": 4e-3, "uld-paper": 4e-3, "uld": 2e-3, "shifted": 4e-3}),
        ("behaviour", {"gold": 1e-4, "beta-0.1": 5e-5, "fine-tuned": 1e-5}),
    ],
)
def test_a_run_has_its_arms_rate_of_this_task(
    name: str, rates: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, float] = {}

    def noted(settings: dict[str, Any], *_others: Any) -> str:
        found[settings["arm"]] = settings["lr"]
        return "not run"

    monkeypatch.setattr(screen, "one_process", noted)
    task_here = dataclasses.replace(TASKS[name], make=lambda _folder: None)
    monkeypatch.setitem(screen.TASKS, name, task_here)
    line = ["--task", name, "--arms", ",".join(rates), "--out", str(tmp_path)]
    assert screen.main(line) == 1, "no run wrote its file"
    assert found == rates
    screen.main([*line, "--lr", "7e-4"])
    assert found == dict.fromkeys(rates, 7e-4), "what the command says wins"


def test_requests_are_not_held_out_and_trained_on() -> None:
    train, held_out = ([p.prompt for p in rows] for rows in real_tasks.requests())
    assert len({*train, *held_out}) == len(train) + len(held_out) == 480
    for x in real_tasks.ASKED:
        assert any(x in text for text in train), x
    for form in real_tasks.REQUESTS:
        start = form.partition("{x}")[0]
        assert any(p.startswith(start) for p in train) and any(
            p.startswith(start) for p in held_out
        )


def test_the_skill_is_the_tiny_one_with_a_table() -> None:
    train, held_out = real_tasks.skill_rows()
    assert [p.prompt for p in held_out] == [p.prompt for p in task.held_out()[: len(held_out)]]
    tables = [p.answer for p in train if p.answer.startswith("|")]
    assert 0.2 < len(tables) / len(train) < 0.3
    assert all(task.well_indented(p.answer) and len(p.answer) < 99 for p in train)


def test_a_behaviour_is_measured_without_right_answers(
    stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--task", "behaviour", "--arms", "gold,teacher", "--steps", "2", "--out", str(tmp_path)]
    models, ran = tmp_path / "models", []

    def here(settings: dict[str, Any], path: Path, models: Path) -> str:
        ran.append(screen.run(settings, models))
        path.write_text(json.dumps(ran[-1]))
        return "done"

    monkeypatch.setattr(screen, "one_process", here)
    assert screen.main([*line, "--models", str(models)]) == 0
    gold, teacher = ran
    assert gold["task"] == "behaviour" and gold["steps"] == 2 and gold["lr"] == 1e-4
    assert gold["right"] == gold["indented"] == "" and len(gold["stopped"]) == 6
    assert gold["curve"][-1]["exact_match"] is None
    assert abs(teacher["reverse_kl_per_byte"]) < 1e-6, "the same weights on both sides"
    assert gold["reverse_kl_per_byte"] > 0.1


@pytest.mark.parametrize("module", ["arms", "baselines", "demo_controls"])
def test_a_run_tells_which_code_of_the_arms_it_had(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, other = screen.code(), tmp_path / "other.py"
    other.write_text("", encoding="utf-8")
    monkeypatch.setattr(sys.modules[module], "__file__", str(other))
    after = screen.code()
    assert before["library"] == after["library"] and before["arms"] != after["arms"]


def test_a_run_that_is_stopped_and_killed_is_the_run_that_is_not(
    stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In four sittings: stopped after step 2, killed after step 3, and again while it was measured."""
    models, whole = tmp_path / "models", screen.Done.add
    screen.TASKS["behaviour"].make(models)
    settings = screen.settings_of("gold", 0, task="behaviour", steps=4, lr=1e-3, on="held-out")
    path = tmp_path / "gold.seed0.json"
    line = ["--one", json.dumps(settings), "--models", str(models), "--out", str(tmp_path)]
    straight = screen.run(settings, models)
    done: list[int] = []

    def add(self: screen.Done, row: dict[str, Any]) -> None:
        whole(self, row)
        done.append(row["step"])
        if done == [1, 2]:
            signal.raise_signal(signal.SIGTERM)
        if done == [1, 2, 3]:
            raise MemoryError

    monkeypatch.setattr(screen.Done, "add", add)
    with pytest.raises(SystemExit, match=str(screen.STOPPED[1])):
        screen.main(line)
    with pytest.raises(MemoryError):
        screen.main(line)
    going = path.with_suffix("") / "done.json"
    kept = going.read_text(encoding="utf-8")
    assert len(json.loads(kept)["rows"]) == 3
    others = [kept.replace(digits, "01234567") for digits in screen.code().values()]
    assert len({*others, kept}) == 3
    for spoiled in (None, kept[:-9], *others):
        going.unlink() if spoiled is None else going.write_text(spoiled, encoding="utf-8")
        with pytest.raises(ValueError, match=r"done\.json: expected .*, or delete|got .*; delete"):
            screen.main(line)
    going.write_text(kept, encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(screen, "measure", None)
        with pytest.raises(TypeError):
            screen.main(line)
    assert table.collect(tmp_path) == [], "a folder that goes on is no result"
    assert screen.main(line) == 0
    assert done == [1, 2, 3, 3, 4]
    assert not going.parent.exists()
    found = json.loads(path.read_text(encoding="utf-8"))
    times = {"cpu_seconds", "seconds", "peak_memory_gib", "curve"}
    assert {**straight, **dict.fromkeys(times)} == {**found, **dict.fromkeys(times)}
    (one,), (other,) = straight["curve"], found["curve"]
    assert {**one, "cpu_seconds": 0} == {**other, "cpu_seconds": 0}
    assert found["cpu_seconds"] == pytest.approx(other["cpu_seconds"], abs=0.01)


def test_ctrl_c_starts_no_other_run(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = []

    def stopped(settings: dict[str, Any], _path: Path, _models: Path) -> str:
        ran.append(settings["arm"])
        if len(ran) == 1:
            raise KeyboardInterrupt
        time.sleep(0.5)  # it may have begun before the first one was asked for
        return "done"

    monkeypatch.setattr(screen, "one_process", stopped)
    line = ["--arms", "gold,uld,bpm,byte", "--models", str(models), "--out", str(tmp_path)]
    assert screen.main(line) == screen.STOPPED[0]
    assert "the same line goes on" in capsys.readouterr().err
    assert len(ran) <= 2


def test_the_protocol_of_the_skill_is_enforced(
    stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"at least 0.8 of the answers right, got 0.0; train it"):
        real_tasks.make_skill(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(real_tasks, "TAUGHT", 0.0)
    precisions: list[str] = []
    monkeypatch.setattr(
        real_tasks,
        "fine_tune",
        lambda *_args, **_kwargs: precisions.append(torch.get_float32_matmul_precision()),
    )
    real_tasks.make_skill(tmp_path)
    assert precisions == ["medium"] * 3 and torch.get_float32_matmul_precision() == "highest"
    names = {"teacher", "student", "train.jsonl", "held_out.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(p.answer and p.completion is not None for p in task.read_texts(tmp_path, "train"))
    monkeypatch.setattr(real_tasks, "_right", lambda *_args, **_kwargs: 0.2)
    real_tasks.make_skill(tmp_path)  # all is there
    (tmp_path / "student" / task.MADE).unlink()
    with pytest.raises(ValueError, match=r"at most 0.1 of the answers right, got 0.2; shorten"):
        real_tasks.make_skill(tmp_path)


# ------------------------------------------------------------------------- tables
@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_wilson_is_newcombes_table(right: int, n: int, low: float, high: float) -> None:
    """Table I of Newcombe 1998, method 3."""
    assert table.wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 300), st.data())
def test_wilson_holds_its_share_and_mirrors(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    low, high = table.wilson(right, n)
    assert 0 <= low <= right / n + 1e-12 and right / n - 1e-12 <= high <= 1
    assert table.wilson(n - right, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_refuses_what_is_no_share() -> None:
    for right, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(
            ValueError, match=f"expected 0 to n right of n >= 1, got {right} of {n}"
        ):
            table.wilson(right, n)


def made(shares: dict[str, float], n: int = 200, seeds: int = 3, **more: Any) -> Any:
    """Results in which an arm is right on the first of the prompts."""
    runs = {}
    for arm, share in shares.items():
        k = round(share * n)
        row = {"right": "1" * k + "0" * (n - k), "stopped": "1" * n, "indented": "1" * n,
               "arm": arm, "steps": 250, "lr": 2e-3, "machine": {"cpu": "x"}, "cpu_seconds": 10.0,
               "peak_memory_gib": 0.5, "trained_fraction": 0.3, "mean_bytes": 60.0,
               **more.get(arm, {})}  # fmt: skip
        runs[arm] = [{**row, "seed": seed} for seed in range(seeds)]
    return table.Results(runs)


def verdict(results: Any, told: str) -> str:
    (found,) = [row[2] for row in table.verdicts(results) if told in row[1]]
    return found


ENDS = {"teacher": 0.9, "untouched": 0.1}


def test_gap_is_a_share_of_the_way() -> None:
    r = made({**ENDS, "gold": 0.5})
    assert r.gap("gold") == pytest.approx(0.5)
    assert made({"gold": 0.5}).gap("gold") is None
    r = made({**ENDS, "same-untouched": 0.3, "same-gold": 0.6})
    assert r.gap("same-gold") == pytest.approx(0.5)


def test_rules_hold_and_fail() -> None:
    r = made({**ENDS, "gold": 0.8, "uld": 0.3, "bpm": 0.8, "shifted": 0.12, "suppress": 0.5,
              "random-weighted": 0.6, "same-gold": 0.7, "same-gkd": 0.7})  # fmt: skip
    assert verdict(r, "at least 60%") == "holds"
    assert verdict(r, "more than `uld`") == "holds"
    assert verdict(r, "more than `bpm`") == "**fails**"  # a tie is no win
    assert verdict(r, "more than `strict`") == "not run yet"
    assert verdict(r, "`shifted` fails") == "holds"
    assert verdict(r, "`suppress` fails") == "**fails**"
    assert verdict(r, "beats `random-weighted`") == "holds"
    assert verdict(r, "minigold is GKD") == "holds"
    assert verdict(made({**ENDS, "gold": 0.5}), "at least 60%") == "**fails**"
    assert verdict(made({**ENDS, "gold": 0.8}, seeds=2), "at least 60%") == "holds (2 seeds)"
    assert verdict(made({"same-gold": 0.7, "same-gkd": 0.6}), "minigold is GKD") == "**fails**"


def test_far_rivals_need_intervals_apart() -> None:
    """A paired difference can be sure where the intervals still touch."""
    shares = {**ENDS, "gold": 0.80, "uld": 0.76, "bpm": 0.76}
    r = made(shares)
    assert verdict(r, "more than `bpm`") == "holds"
    assert verdict(r, "more than `uld`") == "**fails**"


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"gold": {"trained_fraction": 0.36}}, False),
        ({"gold": {"peak_memory_gib": 0.7}}, False),
        ({"gold": {"cpu_seconds": 13.0}}, False),
    ],
)
def test_a_mask_must_be_small_and_cheaper(change: dict[str, Any], holds: bool) -> None:
    more = {"all": {"cpu_seconds": 12.0, "peak_memory_gib": 0.6}, **change}
    r = made({**ENDS, "gold": 0.8, "all": 0.8, "random-weighted": 0.6}, **more)
    assert (verdict(r, "keep 95%") == "holds") == holds
    r = made({**ENDS, "gold": 0.7, "all": 0.8, "random-weighted": 0.6}, **more)
    assert verdict(r, "keep 95%") == "**fails**"
    r = made({**ENDS, "gold": 0.8, "all": 0.8, "random-weighted": 0.8}, **more)
    assert verdict(r, "keep 95%") == "**fails**"
    if holds:
        r = made({**ENDS, "gold": 0.8, "all": 0.8, "random-weighted": 0.6}, **more)
        del r.runs["random-weighted"][1:]
        assert verdict(r, "keep 95%") == "holds (1 seed)"
        alone = made({**ENDS, "gold": 0.8, "all": 0.8}, seeds=1, **more)
        assert verdict(alone, "keep 95%") == "not run yet"


def test_times_of_two_machines_are_not_averaged() -> None:
    """The machine of most of the default's runs counts; an arm that was not run on it has no time."""
    more = {"all": {"cpu_seconds": 12.0, "peak_memory_gib": 0.6}}
    r = made({**ENDS, "gold": 0.8, "all": 0.8, "random-weighted": 0.6}, **more)
    r.runs["gold"][2].update(machine={"cpu": "a"}, cpu_seconds=100.0)
    assert [json.loads(one)["cpu"] for one in r.machines()] == ["x", "a"]
    assert (r.seconds("gold"), r.seconds("all"), r.mean("gold", "cpu_seconds")) == (
        10.0,
        12.0,
        40.0,
    )
    assert verdict(r, "keep 95%") == "holds"
    assert "Made with: cpu x; cpu a." in table.machines(r)
    for name in ("teacher", "untouched", "all"):  # 10 of 15
        for run in r.runs[name]:
            run["machine"] = {"cpu": "a"}
    assert (r.seconds("gold"), r.seconds("all")) == (10.0, None)
    assert verdict(r, "keep 95%") == "not run yet"


def test_seeds_are_drawn_as_prompts_are() -> None:
    """Prompts are sure of the difference; three seeds that differ are not."""
    rows = {"gold": (190, 200, 199), "random-weighted": (199, 163, 178), "shifted": (40, 41, 42)}
    runs = {arm: [{**made({arm: k / 200}, seeds=1).runs[arm][0], "seed": seed}
                  for seed, k in enumerate(ks)] for arm, ks in rows.items()}  # fmt: skip
    r = table.Results(runs)
    value, low, high = r.above("gold", "random-weighted")
    assert value == pytest.approx(49 / 600) and low < 0 < value < high < 0.2
    assert r.above("gold", "gold")[0] == 0
    value, low, high = r.above("gold", "shifted")
    assert 0.65 < low < value < high < 0.9


def test_pairs_are_told_apart() -> None:
    bits = {arm: {"bits_per_byte_teacher": x}
            for arm, x in (("teacher", 0.01741), ("gold", 0.01742), ("uld", 0.0223))}  # fmt: skip
    r = made(
        {**ENDS, "gold": 0.8, "uld": 0.1, "bpm": 0.1},
        untouched=bits["teacher"],
        bpm=bits["gold"],
        **bits,
    )
    assert [r.pairs(arm) for arm in ("gold", "bpm", "uld")] == ["A", "A", "B"]
    assert r.pairs("gold", "uld") == "AB"
    assert verdict(r, "more than `bpm`") == "holds"
    assert verdict(r, "more than `uld`") == "holds (pairs AB)"
    r = made({**ENDS, "gold": 0.8}, teacher=bits["uld"], untouched=bits["gold"], gold=bits["gold"])
    assert verdict(r, "as well indented").endswith("(pairs AB)"), "the teacher is of another pair"


def test_sums_that_are_lost_are_counted() -> None:
    told = [str(p.prompt) for p in task.held_out()]
    right = "".join("01"["zero glim two" not in text] for text in told)
    assert right.count("0") == 19
    run = {**made({"gold": 0.5}, seeds=1).runs["gold"][0], "right": right}
    assert table.lost_sums(run) == 1 and table.lost_sums({**run, "right": "0" * 200}) == 25
    assert table.sums(table.Results({"gold": [run, run]})).endswith("by seed: `gold` 1, 1.")


def test_stops_and_indentation_are_the_teachers() -> None:
    fewer = {"gold": {"stopped": "1" * 190 + "0" * 10, "indented": "1" * 198 + "00"}}
    r = made({**ENDS, "gold": 0.8}, **fewer)
    assert verdict(r, "stops as often") == "**fails**"
    assert verdict(r, "well indented") == "holds"
    for length, holds in ((48.0, True), (47.0, False)):  # of 60
        r = made({**ENDS, "gold": 0.8}, gold={"mean_bytes": length})
        assert (verdict(r, "stops as often") == "holds") == holds


def without_answers(kl: dict[str, float], **more: Any) -> Any:
    """Results of a task whose prompts have no right answer: reverse KL, give or take a tenth."""
    changes = {
        arm: {"right": "", "indented": "", "reverse_kl_per_byte": value,
              "reverse_kl_per_byte_low": 0.9 * value, "reverse_kl_per_byte_high": 1.1 * value,
              **more.get(arm, {})}
        for arm, value in kl.items()
    }  # fmt: skip
    return made(dict.fromkeys(kl, 0.0), **changes)


def test_beta_becomes_the_default_by_its_rule() -> None:
    for share, rule in ((0.8, "holds"), (0.6, "**fails**")):
        assert verdict(made({"gold": 0.8, "beta-0.1": share}), "beta 0.1") == rule
    for kl, rule in ((0.16, "holds"), (0.18, "**fails**")):  # beside 0.2, and a tenth for both
        assert verdict(without_answers({"gold": 0.2, "beta-0.1": kl}), "beta 0.1") == rule


def test_without_answers_the_gap_is_that_of_reverse_kl() -> None:
    more = {"all": {"cpu_seconds": 12.0, "peak_memory_gib": 0.6}}
    shares = {"teacher": 0.0, "untouched": 1.0, "gold": 0.2, "all": 0.18, "random-weighted": 0.4,
              "fine-tuned": 0.23}  # fmt: skip
    r = without_answers(shares, **more)
    assert r.gap("gold") == pytest.approx(0.8) and r.gap("teacher") == 1
    assert r.above("gold", "random-weighted") == pytest.approx((0.2, 0.14, 0.26))
    assert verdict(r, "at least 60%") == "holds"
    assert verdict(r, "keep 95%") == "holds"
    assert verdict(r, "more than `fine-tuned`") == "**fails**"  # the intervals touch
    text = table.part("confirm-behaviour", r)
    assert "| gold | 3 | – | 0.80 | 0.2000 |" in text and "not run yet" not in text
    assert "gap recovered 0.800 (0.780 to 0.820)" in text and "indented" not in text[-900:]
    picture = table.plot(r)
    assert "gap recovered by arm" in picture and picture.count("<circle") == len(shares)
    worse = table.plot(without_answers({**shares, "fine-tuned": 1.5}))
    assert ">fine-tuned (-0.50)<" in worse and "(-" not in picture


def test_samples_that_cannot_be_compared_are_not_the_best() -> None:
    nothing = {f"reverse_kl_per_byte{end}": None for end in ("", "_low", "_high")}
    shares = {"teacher": 0.0, "untouched": 1.0, "gold": 0.2, "fine-tuned": 0.3}
    r = without_answers(shares, gold=nothing)
    assert r.gap("gold") == -math.inf and verdict(r, "at least 60%") == "**fails**"
    assert verdict(r, "more than `fine-tuned`") == "**fails**"
    assert "| gold | 3 | – | -inf | inf |" in table.part("confirm-behaviour", r)
    assert table.plot(r).count("<circle") == len(shares)
    r = without_answers(shares)
    r.runs["gold"][2].update(nothing)  # one seed of three is not left out of the mean
    assert r.kl("gold") == (math.inf,) * 3
    r = without_answers(shares, **{"fine-tuned": nothing})
    assert verdict(r, "more than `fine-tuned`") == "holds"


def test_the_interval_of_reverse_kl_is_over_seeds_too() -> None:
    shares = {"teacher": 0.0, "untouched": 1.0, "gold": 0.2, "fine-tuned": 0.25}
    r = without_answers(shares)
    assert r.kl("gold") == pytest.approx((0.2, 0.18, 0.22))
    for run, value in zip(r.runs["gold"], (0.05, 0.1, 0.45), strict=True):
        ends = {f"reverse_kl_per_byte{end}": value + by
                for end, by in (("", 0.0), ("_low", -0.02), ("_high", 0.02))}  # fmt: skip
        run.update(ends)
    value, low, high = r.kl("gold")
    assert value == pytest.approx(0.2)
    assert low == pytest.approx(0.2 - math.hypot(0.02, 1.96 * np.std([0.05, 0.1, 0.45]) / 3**0.5))
    assert value - low == pytest.approx(high - value)
    assert verdict(r, "more than `fine-tuned`") == "**fails**"


def test_the_table_says_what_was_not_run() -> None:
    text = table.table(made({**ENDS, "gold": 0.8}, gold={"failed": "NaN"}))
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert "0.800 (0.766–0.830) | 0.88" in lines["| gold †"]
    assert "not run yet" in lines["| uld"] and len(lines) >= len(ARMS)
    assert {line.count("|") for line in text.splitlines()} == {len(table.HEADS) + 1}
    assert table.part("screen", table.Results({})) == "not run yet."
    ends = table.Results({name: [{**run, "steps": 0} for run in runs]
                          for name, runs in made(ENDS).runs.items()})  # fmt: skip
    assert table.part("confirm-skill", ends).startswith("6 runs. Made with")
    assert table.part("confirm-skill", ends).endswith("\n\nRules: not run yet.")


def test_learning_rates_stand_side_by_side() -> None:
    low, high = made({"uld": 0.25}), made({"uld": 0.5}, uld={"lr": 4e-3})
    text = table.tuning(table.Results({"uld": [*low.runs["uld"], *high.runs["uld"]]}))
    assert text.splitlines()[0] == "| arm | 0.002 | 0.004 |"
    assert text.splitlines()[-1] == "| uld | 0.250 | 0.500 |"


def test_the_page_is_made_between_markers(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "screen"
    runs.mkdir(parents=True)
    for arm, (run, *_) in made({**ENDS, "gold": 0.8}, seeds=1).runs.items():
        (runs / f"{arm}.seed0.json").write_text(json.dumps(run))
    parts = "".join(f"<!-- {name} -->\nof before\n<!-- end -->\n" for name in table.FOLDERS)
    (tmp_path / "experiments.md").write_text(f"before\n{parts}after\n")
    table.main(["--runs", str(tmp_path / "runs"), "--docs", str(tmp_path)])
    first = (tmp_path / "experiments.md").read_text()
    assert first.startswith("before\n<!-- screen -->\n3 runs of 250 steps.")
    assert first.endswith("<!-- end -->\nafter\n") and "of before" not in first
    assert (tmp_path / "results" / "screen.svg").read_text().count("<circle") == 3
    (tmp_path / "experiments.md").write_text(first)
    table.main(["--docs", str(tmp_path)])  # from docs/results alone
    assert (tmp_path / "experiments.md").read_text() == first
    with pytest.raises(
        ValueError, match=r"expected one <!-- tune --> … <!-- end --> in the page, got 0"
    ):
        table.page("nothing", {"tune": ""})


def test_a_folder_without_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        table.main(["--runs", str(tmp_path), "--docs", str(tmp_path)])
    assert "expected one of screen, tune, " in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_run_that_is_not_whole_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gold.seed0.json"
    path.write_text('{"arm": "go')
    with pytest.raises(
        ValueError, match=r"gold.seed0.json: expected .*delete it, and run that arm"
    ):
        table.collect(tmp_path)


def test_runs_of_another_sitting_stay(tmp_path: Path) -> None:
    known = [*made({"gold": 0.25, "uld": 0.5}).runs.values()]
    again = made({"gold": 0.75}, seeds=1).runs["gold"][0]
    (tmp_path / "gold.seed0.json").write_text(json.dumps(again))
    runs = table.collect(tmp_path, [run for some in known for run in some])
    assert [(run["arm"], run["seed"]) for run in runs] == [
        (arm, seed) for arm in ("gold", "uld") for seed in range(3)
    ]
    assert [run == again for run in runs] == [True, *[False] * 5]
    other = {**again, "lr": 4e-3}
    assert table.collect(tmp_path, [other]) == [again]  # the arm has another rate now
    assert table.collect(tmp_path, [other], by_rate=True) == [again, other]
    with pytest.raises(ValueError, match=r"expected runs of the arms in .*, got one of 'of old'"):
        table.collect(tmp_path, [{**again, "arm": "of old"}])


def test_the_page_of_this_repository_is_what_its_results_say() -> None:
    text = (table.DOCS / "experiments.md").read_text(encoding="utf-8")
    results = {name: table.read(table.DOCS / "results", name) for name in table.FOLDERS}
    parts = {name: table.part(name, found) for name, found in results.items()}
    assert table.page(text, parts) == text


def test_examples_in_docstrings() -> None:
    for module in (table, task):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed
