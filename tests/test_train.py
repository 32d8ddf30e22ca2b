# SPDX-License-Identifier: Apache-2.0
"""The whole step on tiny models: both sides read right, masks, denominators, files."""

import dataclasses
import itertools
import json
import math
import re
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minigold import masked
from minigold.batch import Rollout, answer_of, needed_states, pack
from minigold.carry import Carried, Reading
from minigold.config import Config
from minigold.data import Prompt
from minigold.load import LanguageModel, load
from minigold.loss import (
    BEFORE,
    FIRST,
    INSIDE,
    REST,
    Carry,
    ChunkRows,
    Rows,
    chunk_losses,
    divergence,
)
from minigold.masked import train_pass
from minigold.metrics import _warn_of_cut
from minigold.offsets import BROKEN, CUT, SPECIAL, encode_continuation
from minigold.pair import Pair, make_pair
from minigold.rollout import collect, sample_answers
from minigold.teacher import score
from minigold.tiers import limited
from minigold.train import adamw, batches_of, distill, learning_rate, take_step
from reference_losses import gkd
from shape_suffix import ShapeSuffixes
from tiny_folders import tiny_folder
from tiny_models import FAMILIES, new_decoder, tiny_model
from tokenizers_for_tests import byte_bpe, byte_bpe_lossy, sentencepiece_bpe, unigram

CONFIG = Config(
    steps=3, batch_size=6, micro_batch=4, max_new_tokens=14, lr=1e-3, warmup=2,
    student_plain=True, teacher_plain=True, where="all", max_overhang=1.0, beta=0.5,
)  # fmt: skip


def prompt_of(text: str, **fields: Any) -> Prompt:
    defaults = {"completion": None, "teacher_prompt": None, "answer": None, "extra": {}, "line": 1}
    return Prompt(prompt=text, **{**defaults, **fields})


PROMPTS = [prompt_of(t) for t in ("hello", "the fox", "def add", "Paris is", "x", "naïve 日本")]


@lru_cache(maxsize=1)
def cross_pair() -> Pair:
    """Gemma 3 with SentencePiece taught by Llama with byte-level BPE; two stops on each side."""
    student = tiny_model(
        "gemma3_text", sentencepiece_bpe(), end="</s>", extra_ends=("<s>",), seed=1
    )
    teacher = tiny_model(
        "llama", byte_bpe(), end="<|im_end|>", extra_ends=("<|endoftext|>",), seed=2
    )
    return make_pair(student, teacher)


def rollouts_of(pair: Pair, config: Config = CONFIG, number: int = 1) -> list[Rollout]:
    answers, side = sample_answers(pair, PROMPTS, config, number=number)
    return collect(pair, answers, side, config)


def all_chosen(rollouts: list[Rollout]) -> list[np.ndarray]:
    return [np.ones(len(r.chunks.s0), dtype=bool) for r in rollouts]


def gradient_of(pair: Pair, rollouts: list[Rollout], chosen: list[Any], config: Config) -> Tensor:
    decoder = pair.student.decoder
    decoder.zero_grad(set_to_none=True)
    train_pass(pair, rollouts, chosen, config)
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in decoder.parameters()]
    decoder.zero_grad(set_to_none=True)
    return torch.cat([part.flatten() for part in parts])


def token_logps(model: LanguageModel, prompt: list[int], ids: list[int]) -> list[float]:
    """One token at a time, the plain way: what comes after all ids so far."""
    out = []
    with torch.no_grad():
        for i, token in enumerate(ids):
            hidden_1SD = model.decoder(torch.tensor([[*prompt, *ids[:i]]]))
            out.append(float(model.decoder.head.logits(hidden_1SD[0, -1]).log_softmax(-1)[token]))
    return out


def test_both_sides_score_each_token_given_what_stands_before_it() -> None:
    pair = cross_pair()
    for r in rollouts_of(pair):
        a = r.answer
        ours = token_logps(pair.teacher, a.teacher_prompt_ids, a.teacher_ids)
        np.testing.assert_allclose(r.score.logp_T.numpy(), ours, atol=1e-4)
        hidden = pair.teacher.decoder(torch.tensor([a.teacher_prompt_ids + a.teacher_ids]))
        logp_W = pair.teacher.decoder.head.logits(hidden[0, -1]).log_softmax(-1)
        ends = torch.logsumexp(logp_W[list(pair.teacher.eos_ids)], 0)
        assert r.score.end_logp == pytest.approx(ends.item(), abs=1e-4)
        assert len(r.score.hidden_MD) == len(a.teacher_ids) + 1


def test_chunks_cover_all_tokens_and_add_their_logps_up() -> None:
    pair = cross_pair()
    rollouts = [r for n in range(1, 6) for r in rollouts_of(pair, number=n)]
    assert {len(r.answer.ids) == CONFIG.max_new_tokens for r in rollouts} == {True, False}
    for r in rollouts:
        a, c = r.answer, r.chunks
        if not len(c.s0):
            continue
        assert c.s0[0] == c.t0[0] == 0
        assert c.s1[-1] == len(a.ids)
        assert c.t1[-1] == len(a.teacher_ids) + a.finished
        assert (c.s1[:-1] == c.s0[1:]).all()
        assert (c.t1[:-1] == c.t0[1:]).all()
        ours = token_logps(pair.student, a.prompt_ids, a.ids)
        theirs = [*r.score.logp_T.tolist(), r.score.end_logp]
        for k in np.flatnonzero(r.scorable_C):
            for logps, logp_C, stay_C, first, stop in (
                (ours, r.student_logp_C, r.student_stay_C, c.s0[k], c.s1[k]),
                (theirs, r.teacher_logp_C, r.teacher_stay_C, c.t0[k], c.t1[k]),
            ):
                ends = stay_C[k] - (stay_C[k + 1] if k + 1 < len(stay_C) else 0.0)
                assert logp_C[k] == pytest.approx(sum(logps[first:stop]) + ends, abs=1e-3)
        assert np.isnan(r.teacher_logp_C[~r.scorable_C]).all()


def test_a_finished_answer_ends_in_an_eos_chunk_and_a_cut_one_does_not() -> None:
    pair = cross_pair()
    rollouts = [r for n in range(1, 40) for r in rollouts_of(pair, number=n)]
    kinds = set()
    for r in rollouts:
        last = int(r.chunks.flaw[-1]) if len(r.chunks.flaw) else -1
        own_end = r.answer.ids[-1] == pair.student.end_id
        kind = ("end" if own_end else "other") if r.answer.finished else "cut"
        kinds.add(kind)
        if kind == "end":
            assert last == 0
            assert r.chunks.start[-1] == r.chunks.end[-1] == len(r.answer.text.encode())
            assert not r.observed_C[-1]
        elif kind == "other":
            assert last == SPECIAL
        else:
            assert last not in (0, -1) and (last == CUT or r.chunks.flaw[-1] > 0)
    assert kinds == {"end", "other", "cut"}


def test_the_end_of_turn_may_have_the_id_that_fills_padded_rows() -> None:
    """Id 0 ends a turn on both sides, and shorter rows are filled up with 0: lengths tell."""
    student, teacher = (
        tiny_model("llama", make(), end=end, seed=seed)
        for make, end, seed in ((byte_bpe, "<|endoftext|>", 1), (unigram, "<unk>", 2))
    )
    assert student.end_id == teacher.end_id == 0
    pair = make_pair(student, teacher)
    said = ["hello", "", " the quick brown fox.", "a", "def add", " Paris is the capital"]
    prompts = [
        dataclasses.replace(p, completion=text) for p, text in zip(PROMPTS, said, strict=True)
    ]
    config = dataclasses.replace(CONFIG, lmbda=0.0)
    rollouts = collect(pair, *sample_answers(pair, prompts, config, number=1), config)
    for r in rollouts:
        assert r.answer.ids[-1] == 0
        assert r.chunks.flaw[-1] == 0 and r.scorable_C[-1]
        ours = token_logps(student, r.answer.prompt_ids, r.answer.ids)
        theirs = token_logps(teacher, r.answer.teacher_prompt_ids, [*r.answer.teacher_ids, 0])
        np.testing.assert_allclose(r.score.logp_T.numpy(), theirs[:-1], atol=1e-4)
        assert r.student_logp_C[-1] - r.student_stay_C[-1] == pytest.approx(ours[-1], abs=1e-3)
        assert r.teacher_logp_C[-1] - r.teacher_stay_C[-1] == pytest.approx(theirs[-1], abs=1e-3)
    chosen = all_chosen(rollouts)
    want = dense_gradient(pair, rollouts, chosen, config.beta) / sum(map(len, chosen))
    got = gradient_of(pair, rollouts, chosen, config)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)


def test_a_special_token_in_the_middle_makes_its_chunk_unscorable_and_no_other() -> None:
    pair = cross_pair()
    ours, theirs = pair.student.tokenizer, pair.teacher.tokenizer
    before, after = (encode_continuation(ours, text)[0] for text in ("hello", " fox"))
    answer = answer_of(
        PROMPTS[0], [1], [*before, 1, *after, pair.student.end_id], finished=True, on_policy=True,
        teacher_prompt_ids=[0], student_tokenizer=ours, teacher_tokenizer=theirs,
        end_id=pair.student.end_id, identical=False,
    )  # fmt: skip
    plain = answer_of(
        PROMPTS[0], [1], [*before, *after, pair.student.end_id], finished=True, on_policy=True,
        teacher_prompt_ids=[0], student_tokenizer=ours, teacher_tokenizer=theirs,
        end_id=pair.student.end_id, identical=False,
    )  # fmt: skip
    assert answer.text == plain.text == "hello fox"
    for column in ("t0", "t1", "start", "end"):
        assert getattr(answer.chunks, column).tolist() == getattr(plain.chunks, column).tolist()
    flawed = answer.chunks.flaw.nonzero()[0]
    assert answer.chunks.flaw[flawed].tolist() == [SPECIAL] and not plain.chunks.flaw.any()
    assert answer.chunks.s0[flawed] == len(before)  # it belongs to the chunk that follows


def broken_rollout(said: list[str], *, finished: bool = True, events: str = "prefix") -> Rollout:
    """The student's bytes, token by token, as both models of the pair see them."""
    one = cross_pair()
    pair = one if events == "prefix" else make_pair(one.student, one.teacher, events=events)
    ours = pair.student.tokenizer
    ids = [
        i
        for text in said
        for i in (
            [ours.token_to_id(text)] if text[0] == "<" else encode_continuation(ours, text)[0]
        )
    ]
    answer = answer_of(
        PROMPTS[0], [1], [*ids, *[pair.student.end_id] * finished], finished=finished,
        on_policy=True, teacher_prompt_ids=[0], student_tokenizer=ours,
        teacher_tokenizer=pair.teacher.tokenizer, end_id=pair.student.end_id, identical=False,
    )  # fmt: skip
    return collect(pair, [answer], [None], CONFIG)[0]


@pytest.mark.parametrize(
    ("said", "blamed"),
    [
        (["hello", "<0xA9>", " fox"], "<0xA9>"),  # nothing can begin so
        (["hello", "<0xC3>", " fox"], " fox"),  # until here it could have become an é
        (["hello", "<0xC3>", "<0xC3>", "<0xA9>"], "<0xC3>"),
        (["hello", "<0xF0>", "<0x9F>"], "</s>"),
        (["<0xFF>"], "<0xFF>"),
    ],
)
def test_broken_bytes_are_an_event_that_the_teacher_never_takes(
    said: list[str], blamed: str
) -> None:
    """Else nothing would be lost by hiding in them: they have no chunk log-probability."""
    pair, r = cross_pair(), broken_rollout(said)
    ours, a, c = pair.student.tokenizer, r.answer, r.chunks
    k = int(np.flatnonzero(c.flaw == BROKEN)[0])
    assert not r.scorable_C[k] and np.isnan(r.teacher_logp_C[k])
    last = int(r.last_C[k])
    assert a.ids[last] in (ours.token_to_id(blamed), encode_continuation(ours, blamed)[0][0])
    assert r.observed_C[k] == (
        last > c.s0[k]
    )  # a byte that nothing begins with is itself the event
    if not r.observed_C[k]:
        return
    mask = np.arange(len(c.s0)) == k
    rows = pack(
        [r], [mask], student_starts=[len(a.prompt_ids) - 1], teacher_starts=[0],
        teacher_end_id=pair.teacher.end_id,
    )  # fmt: skip
    assert rows.teacher_logp_C.tolist() == [-math.inf]
    decoder, head = pair.student.decoder, pair.teacher.decoder.head
    hidden_SD = decoder(torch.tensor([a.prompt_ids + a.ids]))[0]
    logits_SV = decoder.head.logits(hidden_SD).detach().double().requires_grad_()
    (loss,) = chunk_losses(
        logits_SV, head.logits(r.score.hidden_MD), rows=rows, events=pair.events, beta=0.5
    )
    loss.backward()
    taken = torch.tensor(a.ids[c.s0[k] : last + 1])
    at = len(a.prompt_ids) - 1 + int(c.s0[k])
    moved = (logits_SV.detach() - 0.1 * logits_SV.grad).log_softmax(-1)
    before = logits_SV.detach().log_softmax(-1)
    places = torch.arange(at, at + len(taken))
    change = (moved - before)[places, taken]
    assert len(change) > 1 and (change[1:] < 0).all()  # the first one is in an event that may grow
    bare = dataclasses.replace(rows, observed_C=torch.tensor([False]))
    (hidden,) = chunk_losses(
        logits_SV, head.logits(r.score.hidden_MD), rows=bare, events=pair.events, beta=0.5
    )
    assert loss > hidden


def test_what_is_cut_off_or_whole_is_not_broken() -> None:
    for said, finished in ((["hello", "<0xC3>"], False), (["hello", "<0xC3>", "<0xA9>"], True)):
        r = broken_rollout(said, finished=finished)
        broken = r.chunks.flaw == BROKEN
        assert broken.any() != finished and not r.observed_C[broken].any()
    r = broken_rollout(["<0xC3>", " fox", "<0xF0>"], finished=False)
    broken = r.chunks.flaw == BROKEN
    assert r.observed_C[broken].tolist() == [True, False]
    r = broken_rollout(["hello", "<0xC3>", " fox"], events="strict")
    assert not r.observed_C.any() and (r.last_C == r.chunks.s0).all()


def test_fixed_answers_are_read_by_the_student_too() -> None:
    pair = cross_pair()
    fixed = [prompt_of("hello", completion=" the quick brown fox. héllo")]
    config = dataclasses.replace(CONFIG, lmbda=0.0)
    answers, side = sample_answers(pair, fixed, config, number=1)
    (r,) = collect(pair, answers, side, config)
    assert r.answer.text == fixed[0].completion
    assert not r.answer.on_policy and r.answer.ids[-1] == pair.student.end_id
    ours = token_logps(pair.student, r.answer.prompt_ids, r.answer.ids)
    assert r.student_logp_C.sum() == pytest.approx(sum(ours), abs=1e-3)  # what moves cancels
    theirs = [*r.score.logp_T.tolist(), r.score.end_logp]
    assert r.teacher_logp_C.sum() == pytest.approx(sum(theirs), abs=1e-3)
    assert r.overhang_C.max() > 0.01
    own = score(
        pair.student.decoder,
        [Reading(r.answer.prompt_ids, r.answer.ids)],
        end_ids=[pair.student.end_id],
        side=pair.events.student,
    )
    np.testing.assert_allclose(own[0].logp_T.numpy(), ours, atol=1e-4)


def test_one_side_of_fixed_and_sampled_rows_mixes_by_lmbda() -> None:
    pair = cross_pair()
    prompts = [prompt_of("hello", completion=" dog")] * 60
    config = dataclasses.replace(CONFIG, lmbda=0.5, max_new_tokens=1)
    answers, _ = sample_answers(pair, prompts, config, number=1)
    share = sum(a.on_policy for a in answers) / 60
    assert 0.3 < share < 0.7


def test_the_teacher_reads_its_own_prompt() -> None:
    pair = cross_pair()
    prompts = [prompt_of("hello", teacher_prompt="the answer is dog. hello")]
    answers, _ = sample_answers(pair, prompts, CONFIG, number=1)
    ids = answers[0].teacher_prompt_ids
    assert pair.teacher.tokenizer.decode(ids) == "the answer is dog. hello"
    assert pair.student.tokenizer.decode(answers[0].prompt_ids) == "hello"
    assert answers[0].prompt_ids[0] == pair.student.tokenizer.token_to_id("<s>")


def dense_gradient(pair: Pair, rollouts: list[Rollout], chosen: list[Any], beta: float) -> Tensor:
    """One row, one chunk at a time, no cutting, no blocks: sum over chosen chunks."""
    decoder = pair.student.decoder
    decoder.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for r, mask in zip(rollouts, chosen, strict=True):
        a, c = r.answer, r.chunks
        hidden_SD = decoder(torch.tensor([a.prompt_ids + a.ids]))[0]
        teacher_SD = pair.teacher.decoder(torch.tensor([a.teacher_prompt_ids + a.teacher_ids]))[0]
        for k in np.flatnonzero(mask).tolist():
            first, last = int(c.s0[k]), int(r.last_C[k]) + 1
            kinds = [FIRST] + [REST] * (last - first - 1)
            if -math.expm1(r.student_stay_C[k]) > 0.001:
                kinds.insert(0, BEFORE if c.s1[k - 1] - c.s0[k - 1] == 1 else INSIDE)
                first -= 1
            carried = r.score.carried.get(int(c.t0[k]))
            n_carried = 0 if carried is None else len(carried.event_K)
            nothing = torch.zeros(0, dtype=torch.int64)
            rows = ChunkRows(
                Rows(
                    torch.arange(last - first),
                    torch.zeros(last - first, dtype=torch.int64),
                    torch.tensor(a.ids[first:last]),
                    torch.tensor(kinds),
                ),
                torch.tensor([0]),
                torch.tensor([[*a.teacher_ids, pair.teacher.end_id][c.t0[k]]]),
                torch.tensor(
                    [np.nan_to_num(r.teacher_logp_C[k], nan=-np.inf)], dtype=torch.float32
                ),
                Carry(
                    torch.zeros(n_carried, dtype=torch.int64),
                    nothing if carried is None else carried.event_K,
                    nothing.float() if carried is None else carried.mass_K.float(),
                ),
                torch.tensor([bool(r.observed_C[k])]),
            )
            at = len(a.prompt_ids) - 1
            teacher_at = len(a.teacher_prompt_ids) - 1 + int(c.t0[k])
            loss_C = chunk_losses(
                decoder.head.logits(hidden_SD[at + first : at + last]),
                pair.teacher.decoder.head.logits(teacher_SD[teacher_at][None]),
                rows=rows,
                events=pair.events,
                beta=beta,
            )
            total = total + loss_C.sum()
            for s in range(int(c.s0[k]) + 1, int(r.last_C[k]) + 1):
                if s in r.score.inside:
                    logits_1V = decoder.head.logits(hidden_SD[at + s][None])
                    total = total + loss_inside(pair, logits_1V, r.score.inside[s], beta)
    total.backward()
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in decoder.parameters()]
    decoder.zero_grad(set_to_none=True)
    return torch.cat([part.flatten() for part in parts])


def loss_inside(pair: Pair, logits_1V: Tensor, told: Carried, beta: float) -> Tensor:
    """At a boundary of the student's alone: its law after its own token, and what the teacher carries."""
    n_events = pair.events.n_events
    *inside, _observed, other = pair.events.student.project(logits_1V.softmax(-1))[0]
    student_1X = torch.stack(inside)[None] / (1 - other)
    teacher_X = torch.zeros(n_events + 1).index_add(0, told.event_K, told.mass_K.float())
    teacher_1X = teacher_X[None, :n_events] / teacher_X[:n_events].sum()
    return divergence(student_1X, teacher_1X, beta=beta).sum() - torch.log1p(-other)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("said", ["", "</s>", "</s></s>", "\x00", "a</s>", "\U0001f642", "</s>é"])
def test_every_token_is_in_one_chunk(said: str, finished: bool) -> None:
    """Markers alone, text that the other side has no token for, and nothing at all."""
    ours, theirs = sentencepiece_bpe(), byte_bpe_lossy()
    parts = [part for part in re.split("(</s>)", said) if part]
    ids = [
        i for part in parts for i in ([2] if part == "</s>" else encode_continuation(ours, part)[0])
    ]
    ids += [2] * finished
    answer = answer_of(
        PROMPTS[0], [1], ids, finished=finished, on_policy=True, teacher_prompt_ids=[0],
        student_tokenizer=ours, teacher_tokenizer=theirs, end_id=2, identical=False,
    )  # fmt: skip
    c = answer.chunks
    for first, stop, n in (
        (c.s0, c.s1, len(ids)),
        (c.t0, c.t1, len(answer.teacher_ids) + finished),
    ):
        covered = [i for a, b in zip(first, stop, strict=True) for i in range(a, b)]
        assert covered == list(range(n))


@pytest.mark.parametrize("share", [1.0, 0.3, 0.05])
def test_the_saved_work_changes_no_gradient(share: float) -> None:
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    rng = np.random.default_rng(0)
    chosen = [rng.random(len(r.chunks.s0)) < share for r in rollouts]
    chosen[0][:] = False
    chosen[1][0] = True
    assert any(r.observed_C[m].any() for r, m in zip(rollouts, chosen, strict=True)) or share < 1
    n_chosen = sum(int(m.sum()) for m in chosen)
    n_chunks = sum(len(m) for m in chosen)
    want = dense_gradient(pair, rollouts, chosen, 0.5) / max(n_chosen, 0.05 * n_chunks)
    got = gradient_of(pair, rollouts, chosen, CONFIG)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)


def test_the_names_of_tensors_are_watched_to_the_end_of_a_training_pass() -> None:
    """`ShapeSuffixes` stops looking after so many calls: sampling and training must fit in."""
    pair = cross_pair()
    with ShapeSuffixes("minigold") as watch:
        rollouts = rollouts_of(pair)
        train_pass(pair, rollouts, all_chosen(rollouts), CONFIG)
    assert train_pass.__code__ in watch._names and watch.errors == []


def test_accumulated_equals_one_big_step() -> None:
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    chosen = all_chosen(rollouts)
    big = gradient_of(pair, rollouts, chosen, dataclasses.replace(CONFIG, micro_batch=100))
    assert big.abs().max() > 1e-3
    for size in (1, 2, 4):
        config = dataclasses.replace(CONFIG, micro_batch=size)
        small = gradient_of(pair, rollouts, chosen, config)
        torch.testing.assert_close(small, big, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["all", "divergence"])
def test_gradients_with_checkpointing_are_the_same_to_the_last_bit(family: str, where: str) -> None:
    pair = cross_pair()
    decoder = new_decoder(family, pair.student.decoder.config.vocab_size, seed=1)
    decoder.n_tokens = pair.student.n_tokens
    pair = dataclasses.replace(pair, student=dataclasses.replace(pair.student, decoder=decoder))
    config = dataclasses.replace(CONFIG, where=where)
    rollouts = rollouts_of(pair, config)
    chosen = all_chosen(rollouts)
    want = gradient_of(pair, rollouts, chosen, config)
    decoder.checkpointing = True
    got = gradient_of(pair, rollouts, chosen, config)
    assert want.abs().max() > 1e-3
    assert torch.equal(got, want)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_layers_run_twice_in_the_training_pass_alone(lora_rank: int) -> None:
    """And the numbers of a run are the same."""
    found = []
    for checkpointing in (False, True):
        student = tiny_model("gemma3_text", sentencepiece_bpe(), end="</s>", seed=1)
        config = dataclasses.replace(
            CONFIG, gradient_checkpointing=checkpointing, lora_rank=lora_rank, where="sampled"
        )
        runs: list[bool] = []
        for layer in student.decoder.model.layers:
            layer.mlp.register_forward_pre_hook(
                lambda _layer, _given, runs=runs: runs.append(torch.is_grad_enabled())
            )
        history = distill(student, cross_pair().teacher, PROMPTS, config)
        kept = [(row["loss"], row["grad_norm"], row["chunks"]) for row in history]
        found.append((kept, runs.count(False), runs.count(True), history[0]["work_saved"]))
    (plain, read, trained, saved), (again, read_too, trained_twice, saved_too) = found
    assert plain == again
    assert (read_too, trained_twice) == (read, 2 * trained)
    assert min(read, trained) > 0
    assert saved != saved_too and abs(saved - saved_too) < 0.1


def test_bfloat16_products_give_nearly_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device does by itself, here on the CPU."""
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    full = gradient_of(pair, rollouts, all_chosen(rollouts), CONFIG)
    monkeypatch.setattr(masked, "precision", lambda _model: torch.autocast("cpu", torch.bfloat16))
    half = gradient_of(pair, rollouts, all_chosen(rollouts), CONFIG)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert torch.cosine_similarity(full, half, dim=0) > 0.99
    answers, side = sample_answers(pair, PROMPTS, CONFIG, number=1)
    again = collect(pair, answers, side, CONFIG)
    masks = [np.nan_to_num(r.student_logp_C) for r in again]
    assert all(np.isfinite(mask).all() for mask in masks)


@pytest.mark.parametrize("events", ["prefix", "strict", "byte", "chunk"])
def test_an_answer_without_a_teacher_token_is_read(events: str) -> None:
    """A marker of the student's own, which says no text, and its end."""
    student = tiny_model("llama", byte_bpe(), end="<|im_end|>", seed=1)
    teacher = tiny_model("gemma3_text", sentencepiece_bpe(), end="</s>", seed=2)
    pair = make_pair(student, teacher, events=events)
    marker, end = pair.student.tokenizer.token_to_id("<|im_start|>"), pair.student.end_id
    answer = answer_of(
        PROMPTS[0], [5], [marker, end], finished=True, on_policy=True, teacher_prompt_ids=[5],
        student_tokenizer=pair.student.tokenizer, teacher_tokenizer=pair.teacher.tokenizer,
        end_id=end, identical=False,
    )  # fmt: skip
    config = dataclasses.replace(CONFIG, events=events)
    (r,) = collect(pair, [answer], [None], config)
    assert answer.teacher_ids == [] and r.scorable_C.tolist() == [False, True]
    assert math.isfinite(train_pass(pair, [r], all_chosen([r]), config).loss)
    pair.student.decoder.zero_grad(set_to_none=True)


@lru_cache(maxsize=1)
def same_pair() -> Pair:
    """One tokenizer, two models of different families."""
    student = tiny_model(
        "llama", byte_bpe(), end="<|im_end|>", extra_ends=("<|endoftext|>",), seed=3
    )
    teacher = tiny_model(
        "qwen3", byte_bpe(), end="<|im_end|>", extra_ends=("<|endoftext|>",), seed=4
    )
    return make_pair(student, teacher)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_one_tokenizer_is_gkd_from_end_to_end(beta: float) -> None:
    pair = same_pair()
    assert pair.events.identical
    config = dataclasses.replace(CONFIG, beta=beta)
    rollouts = rollouts_of(pair, config)
    decoder = pair.student.decoder
    decoder.zero_grad(set_to_none=True)
    total, count = torch.zeros(()).double(), 0
    for r in rollouts:
        a = r.answer
        assert a.teacher_ids == a.ids[: len(a.ids) - a.finished]
        states = slice(len(a.prompt_ids) - 1, len(a.prompt_ids) - 1 + len(a.ids))
        student_NV = decoder.head.logits(decoder(torch.tensor([a.prompt_ids + a.ids]))[0, states])
        with torch.no_grad():
            hidden = pair.teacher.decoder(torch.tensor([a.teacher_prompt_ids + a.ids]))
            teacher_NV = pair.teacher.decoder.head.logits(hidden[0, states])
        total = total + gkd(student_NV, teacher_NV, beta).sum()
        count += len(a.ids)
    (total / count).backward()
    want = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    got = gradient_of(pair, rollouts, all_chosen(rollouts), config)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    decoder.zero_grad(set_to_none=True)
    value = train_pass(pair, rollouts, all_chosen(rollouts), config).loss
    decoder.zero_grad(set_to_none=True)
    assert value == pytest.approx((total / count).item(), abs=1e-6)


@pytest.mark.parametrize("also", [(), ("<|endoftext|>",)])
def test_an_end_that_is_none_to_the_student_is_its_own_end(also: tuple[str, ...]) -> None:
    """A base model and its instruction-tuned sibling: one tokenizer, and a turn ends otherwise."""
    student = tiny_model("llama", byte_bpe(), end="<|endoftext|>", seed=3)
    teacher = tiny_model("qwen3", byte_bpe(), end="<|im_end|>", extra_ends=also, seed=4)
    pair = make_pair(student, teacher)
    assert pair.events.identical and student.end_id != teacher.end_id
    finished = [dataclasses.replace(p, completion=" the quick brown fox") for p in PROMPTS]
    config = dataclasses.replace(CONFIG, lmbda=0.0)
    rollouts = collect(pair, *sample_answers(pair, finished, config, number=1), config)
    decoder, total, count = student.decoder, torch.zeros(()).double(), 0
    for r in rollouts:
        a = r.answer
        assert a.finished and a.ids[-1] == student.end_id and teacher.end_id not in a.ids
        states = slice(len(a.prompt_ids) - 1, len(a.prompt_ids) - 1 + len(a.ids))
        student_NV = decoder.head.logits(decoder(torch.tensor([a.prompt_ids + a.ids]))[0, states])
        with torch.no_grad():
            hidden = teacher.decoder(torch.tensor([a.teacher_prompt_ids + a.ids]))[0, states]
            teacher_NV = teacher.decoder.head.logits(hidden)
        ends = [student.end_id, teacher.end_id]
        mean_N = teacher_NV.log_softmax(-1)[:, ends].logsumexp(-1)
        teacher_NV = teacher_NV.log_softmax(-1).index_copy(
            1, torch.tensor(ends), torch.stack([mean_N, torch.full_like(mean_N, -80.0)], 1)
        )
        want = teacher.decoder.head.logits(hidden)[-1].log_softmax(-1)[ends]
        assert r.teacher_logp_C[-1] == pytest.approx(want.logsumexp(-1).item(), abs=1e-5)
        total = total + gkd(student_NV, teacher_NV, 0.0).sum()
        count += len(a.ids)
    value = train_pass(pair, rollouts, all_chosen(rollouts), dataclasses.replace(CONFIG, beta=0.0))
    decoder.zero_grad(set_to_none=True)
    assert value.loss == pytest.approx((total / count).item(), abs=1e-6)


def test_a_student_that_is_its_teacher_learns_nothing() -> None:
    model = same_pair().student
    pair = make_pair(model, model)
    rollouts = rollouts_of(pair)
    for beta in (0.0, 0.3, 1.0):
        config = dataclasses.replace(CONFIG, beta=beta)
        assert gradient_of(pair, rollouts, all_chosen(rollouts), config).abs().max() < 1e-6
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.decoder.parameters()]
    step = take_step(
        pair, optimizer, PROMPTS, dataclasses.replace(CONFIG, where="reject"), number=1
    )
    assert step.metrics["trained_fraction"] == 0
    assert step.metrics["work_saved"] == 1
    assert step.metrics["reverse_kl_per_byte"] == pytest.approx(0, abs=1e-4)
    pairs = zip(before, model.decoder.parameters(), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)


def test_masks_count_only_what_is_compared() -> None:
    pair = cross_pair()
    optimizer = torch.optim.SGD(pair.student.decoder.parameters(), lr=0.0)
    config = dataclasses.replace(CONFIG, max_overhang=0.05)
    step = take_step(pair, optimizer, PROMPTS, config, number=1)
    over = sum(int((~r.starts_C | (r.overhang_C > 0.05)).sum()) for r in step.rollouts)
    chunks = step.metrics["chunks"]
    assert over > 0
    assert step.metrics["trained_fraction"] == pytest.approx(1 - over / chunks)
    for r in step.rollouts:
        assert r.overhang_C[0] == 0 or not len(r.overhang_C)


def test_the_student_overhang_is_that_of_the_token_before_the_chunk() -> None:
    for r in rollouts_of(cross_pair()):
        for k in range(1, len(r.chunks.s0)):
            inside = int(r.chunks.s1[k - 1] - r.chunks.s0[k - 1] > 1)
            ours = r.student_measures_S5[r.chunks.s0[k] - 1, inside]
            assert r.student_stay_C[k] == pytest.approx(0 if r.chunks.flaw[k - 1] else ours)


def test_the_row_before_a_chunk_says_where_its_token_began() -> None:
    pair, kinds = cross_pair(), set()
    for number in range(1, 25):
        for r in rollouts_of(pair, number=number):
            mask = np.ones(len(r.chunks.s0), dtype=bool)
            if len(mask) == 0:
                continue
            rows = pack(
                [r], [mask], student_starts=[3], teacher_starts=[5],
                teacher_end_id=pair.teacher.end_id,
            ).student  # fmt: skip
            table = list(zip(
                rows.chunk_N.tolist(), rows.ids_N.tolist(), rows.kind_N.tolist(), strict=True
            ))  # fmt: skip
            for _, _, kind in table:
                if kind in (BEFORE, INSIDE):
                    kinds.add(kind)
            for c, start in enumerate(r.chunks.s0.tolist()):
                before = [(i, kind) for k, i, kind in table if k == c and kind in (BEFORE, INSIDE)]
                assert len(before) == r.reach_C[c]
                for back, (token, kind) in enumerate(reversed(before), start=1):
                    assert token == r.answer.ids[start - back]
                    assert (kind == INSIDE) == (start - back not in r.chunks.s0)
    assert kinds == {BEFORE, INSIDE}


def test_needed_states_end_with_the_last_chosen_chunk() -> None:
    for r in rollouts_of(cross_pair()):
        n = len(r.chunks.s0)
        assert needed_states(r, np.zeros(n, dtype=bool)) == 0
        for k in range(n):
            mask = np.zeros(n, dtype=bool)
            mask[: k + 1] = True
            assert needed_states(r, mask) == r.last_C[: k + 1].max() + 1
            own = r.chunks.s1[k] if r.observed_C[k] else r.chunks.s0[k] + 1
            assert r.last_C[k] + 1 in ((own, own + 1) if r.chunks.flaw[k] == BROKEN else (own,))


def test_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    config = Config(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(n, config) for n in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0 == max(rates)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(1, Config(steps=5, warmup=0, lr=1.0)) <= 1.0


def test_every_prompt_once_an_epoch() -> None:
    config = Config(batch_size=4, steps=6)
    batches = batches_of(PROMPTS, config)
    drawn = [next(batches) for _ in range(6)]
    lines = [id(p) for batch in drawn for p in batch]
    for epoch in range(4):
        assert sorted(lines[6 * epoch : 6 * epoch + 6]) == sorted(id(p) for p in PROMPTS)
    assert lines[:6] != lines[6:12] or lines[:6] != lines[12:18]


def fresh_pair() -> tuple[LanguageModel, LanguageModel]:
    pair = cross_pair()
    student = dataclasses.replace(
        pair.student, decoder=new_decoder("gemma3_text", pair.student.n_tokens)
    )
    return student, pair.teacher


def test_training_is_deterministic_and_comes_nearer_to_the_teacher() -> None:
    config = dataclasses.replace(CONFIG, steps=40, lr=1e-2, where="sampled", batch_size=12)
    runs = []
    for last in (3, 3, 40):
        student, teacher = fresh_pair()
        done = itertools.count(1)
        history = distill(
            student, teacher, PROMPTS, config, stop=lambda done=done, last=last: next(done) == last
        )
        runs.append(([m["loss"] for m in history], student.decoder.state_dict()))
    assert len(runs[0][0]) == 3 and runs[0][0] == runs[1][0] == runs[2][0][:3]
    assert all(torch.equal(runs[0][1][k], runs[1][1][k]) for k in runs[0][1])
    losses = runs[2][0]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_lose_small_steps_are_warned_about(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = fresh_pair()
    student.decoder.to(dtype)
    distill(student, teacher, PROMPTS, dataclasses.replace(CONFIG, steps=1))
    told = "the trained weights are bfloat16, in which most steps of --lr"
    assert (told in caplog.text) == (dtype == torch.bfloat16)


def test_a_teacher_that_would_be_trained_is_refused() -> None:
    student, _ = fresh_pair()
    for teacher in (student, limited(student, 3)):
        with pytest.raises(
            ValueError, match="a teacher with weights of its own, got some of the student's"
        ):
            distill(
                student, teacher, PROMPTS, dataclasses.replace(CONFIG, events="prefix", steps=1)
            )


@pytest.mark.parametrize("given", [["a"], [{"prompt": "a"}], "a"])
def test_other_things_than_prompts_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"as data.read_prompts gives them, .*, got (str|dict)"):
        distill(*fresh_pair(), given, CONFIG)


def test_prompts_may_be_read_once_and_the_folder_a_string(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=2)
    student = tiny_folder(tmp_path / "student", "gemma3_text", sentencepiece_bpe(), end="</s>")
    history = distill(
        load(student), fresh_pair()[1], iter(PROMPTS), config, out=str(tmp_path / "run")
    )
    assert len(history) == 2 and (tmp_path / "run" / "final").is_dir()


@pytest.mark.parametrize(("lmbda", "told"), [(0.0, True), (0.5, True), (1.0, False)])
def test_prompts_without_a_fixed_answer_are_counted(
    lmbda: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [dataclasses.replace(PROMPTS[0], completion=" fox"), *PROMPTS[1:]]
    distill(*fresh_pair(), prompts, dataclasses.replace(CONFIG, steps=1, lmbda=lmbda))
    assert ("5 of 6 prompts have no `completion`" in caplog.text) == told


@pytest.mark.parametrize(("n", "stops", "told"), [(8, (), True), (7, (), False), (8, (5,), False)])
def test_answers_that_are_all_cut_are_warned_about(
    n: int, stops: tuple[int, ...], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    answer = SimpleNamespace(on_policy=True, finished=False, ids=[1, 2, 3])
    rollouts = [SimpleNamespace(answer=answer) for _ in range(n)]
    for i in stops:
        ended = SimpleNamespace(on_policy=True, finished=True, ids=[1])
        rollouts[i] = SimpleNamespace(answer=ended)
    _warn_of_cut(rollouts)
    assert (f"none of {n} answers ended by itself within 3 tokens" in caplog.text) == told


def test_the_teacher_stays_as_it_is() -> None:
    student, teacher = fresh_pair()
    before = [p.detach().clone() for p in teacher.decoder.parameters()]
    distill(student, teacher, PROMPTS, dataclasses.replace(CONFIG, steps=1, warmup=0))
    pairs = zip(before, teacher.decoder.parameters(), strict=True)
    assert all(torch.equal(old, new) and new.grad is None for old, new in pairs)


def test_weights_decay_by_their_share_of_the_rate() -> None:
    """AdamW's: without a gradient a weight loses lr * weight_decay of itself."""
    decoder = new_decoder("llama")
    before = [p.detach().clone() for p in decoder.parameters()]
    optimizer = adamw(decoder, dataclasses.replace(CONFIG, lr=0.1, weight_decay=0.2))
    for p in decoder.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, was in zip(decoder.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was * 0.98)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    student, teacher = fresh_pair()
    with torch.no_grad():
        student.decoder.model.norm.weight.fill_(1e38)
    before = student.decoder.model.embed_tokens.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="finite loss and gradient"):
        distill(student, teacher, PROMPTS, CONFIG)
    assert torch.equal(student.decoder.model.embed_tokens.weight, before)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "at least one prompt"),
        (PROMPTS, {"lmbda": 0.5}, "prompts with `completion` for --lmbda 0.5"),
        (
            [prompt_of("hello " * 300, line=7)],
            {},
            "line 7, student: expected at most 186 tokens",
        ),
        ([prompt_of("x")], {"student_plain": False}, "line 1, student: .*--student-plain"),
        ([prompt_of("x", teacher_prompt="")], {}, "line 1"),
        (PROMPTS, {"cuda_graphs": True}, "--cuda-graphs with --device cuda, got cpu"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    prompts: list[Prompt], changes: dict[str, Any], message: str
) -> None:
    pair = cross_pair()
    with pytest.raises(ValueError, match=message):
        distill(pair.student, pair.teacher, prompts, dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps at least 1, got 0"),
        ({"beta": 1.5}, "--beta from 0 to 1, got 1.5"),
        ({"lr": 0.0}, "--lr above 0"),
        ({"top_p": 0.0}, "--top-p above 0"),
        ({"clip": -1.0}, "--clip at least 0"),
        ({"lmbda": math.nan}, "--lmbda from 0 to 1"),
        ({"student_temperature": 0.0}, "--student-temperature above 0"),
        ({"teacher_temperature": math.inf}, "--teacher-temperature finite"),
        ({"events": "words"}, "--events one of prefix, strict, byte, chunk, got 'words'"),
        ({"where": "often"}, "--where one of all, weighted, sampled, .*, got 'often'"),
        (
            {"where": "random", "replay": "random"},
            "--replay one of all, weighted, sampled, reject, div",
        ),
        ({"threshold": 0.4}, "--threshold with the mask reject only, got 0.4"),
        ({"where": "random", "threshold": 0.4}, "--threshold with the mask reject only"),
        ({"where": "reject", "fraction": 0.1}, "--fraction with the masks divergence and soft-or"),
        ({"where": "all", "replay": "reject"}, "--replay with --where random only"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_metrics_are_numbers_of_json() -> None:
    pair = cross_pair()
    optimizer = torch.optim.SGD(pair.student.decoder.parameters(), lr=0.0)
    step = take_step(pair, optimizer, PROMPTS, CONFIG, number=1)
    for key, value in json.loads(json.dumps(step.metrics)).items():
        assert value is None or isinstance(value, (int, float, dict)), key
    m = step.metrics
    assert m["eos_rate"] + m["clipped_rate"] == 1
    apart = [np.nan_to_num(np.abs(r.teacher_logp_C - r.student_logp_C)) for r in step.rollouts]
    trained = sum(float(x[r.starts_C].sum()) for x, r in zip(apart, step.rollouts, strict=True))
    assert m["disagreement_share"] == pytest.approx(trained / sum(float(x.sum()) for x in apart))
    assert m["work_saved"] == pytest.approx(0, abs=0.1)
    parts = m["seconds_sample"] + m["seconds_teacher"] + m["seconds_train"]
    assert m["seconds"] == pytest.approx(parts)
