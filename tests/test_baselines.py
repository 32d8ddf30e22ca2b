# SPDX-License-Identifier: Apache-2.0
"""The losses of others in `examples/experiments/baselines.py` beside their originals.

ULD and GOLD: TRL's own `ULDLoss`, value and gradient, through its batch interface. BPM: paths of
tokens enumerated in dictionaries.
"""

import dataclasses
import doctest
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from minigold.align import Chunks, align
from minigold.offsets import encode_continuation, vocabulary
from real_models import example
from real_tokenizers import real_tokenizer
from shape_suffix import ShapeSuffixes
from tokenizers_for_tests import byte_bpe_nfc

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from trl.experimental.gold.gold_config import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

baselines = example("experiments/baselines")
Answer, uld, trl_gold = baselines.Answer, baselines.uld, baselines.trl_gold
bpm, bpm_target, prefixes = baselines.bpm, baselines.bpm_target, baselines.prefixes

MERGES = ("observed", "bayesian")
NEUTRAL = (1.0, 1.0)


@pytest.fixture(autouse=True)
def suffixes() -> Iterator[None]:
    """The dimension letters of the example, as conftest.py holds the package to them."""
    with ShapeSuffixes(baselines.__name__) as watch:
        yield
    assert not watch.errors, "\n".join(dict.fromkeys(watch.errors))


# ------------------------------------------------------------------------------- answers
class Given(NamedTuple):
    """One answer and the spans that TRL wants of it."""

    answer: Any
    student_spans: np.ndarray
    teacher_spans: np.ndarray


def logits_of(ids: Sequence[int], size: int, peak: float, g: torch.Generator) -> Tensor:
    """Rows of normal logits; `peak` is added to what each row predicts."""
    logits_NV = 2 * torch.randn(len(ids) + 1, size, generator=g, dtype=torch.float64)
    logits_NV[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.int64)] += peak
    return logits_NV


def columns(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def given_text(
    text: str, student: Tokenizer, teacher: Tokenizer, *, seed: int = 0, peak: float = 6.0,
    sizes: tuple[int, int] | None = None, dtype: torch.dtype = torch.float64,
) -> Given:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    sizes = sizes or (columns(student), columns(teacher))
    ids, spans = zip(*(encode_continuation(t, text) for t in (student, teacher)), strict=True)
    student_NV, teacher_MW = (
        logits_of(one, size, peak, g).to(dtype) for one, size in zip(ids, sizes, strict=True)
    )
    chunks = align(*spans)
    assert not chunks.flaw.any()
    return Given(Answer(student_NV.requires_grad_(), teacher_MW, *ids, chunks), *spans)


@lru_cache(maxsize=1)
def small_pair() -> tuple[Tokenizer, Tokenizer]:
    """Byte-level, trained on different words, so that each has pieces that the other lacks."""
    teacher = Tokenizer(models.BPE())
    teacher.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    teacher.decoder = decoders.ByteLevel()
    words = "def area(r): return r, lping help lp turnip orange Ärger aça 世界世 12 12 99 # 123"
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    teacher.train_from_iterator([words] * 3, trainer)
    return byte_bpe_nfc(), teacher


TEXTS = (
    "def helping(a, b): return internals  # 你好，世界 🙂 façade 1234 orange turnip",
    "The helper returned.",
    "turnip",
)


# ------------------------------------------------------------------------------- TRL's own
def trl_config(**changes: Any) -> Any:
    """The fields of TRL's configuration, without what `transformers` does when it makes one."""
    fields = {field.name: field.default for field in dataclasses.fields(GOLDConfig)}
    assert changes.keys() <= fields.keys()
    return SimpleNamespace(**fields | changes)


def padded(rows: Sequence[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def trl_side(
    logits: Tensor, ids: Sequence[int], spans: np.ndarray, prompt: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, ids and byte offsets of one sequence: prompt, answer, end of text.

    TRL's row j predicts token j + 1, so the row for the answer's first token is the prompt's last.
    """
    n, other = len(ids), torch.full((prompt - 1, logits.shape[1]), 0.5, dtype=logits.dtype)
    end = int(spans[-1, 1]) if n else 0
    answer, last = torch.tensor([*ids, 0], dtype=torch.int64), torch.full_like(logits[:1], -0.5)
    offsets = [[0, 0]] * prompt + spans[:, :2].tolist() + [[end, end]]
    return (
        torch.cat([other, logits, last]),
        torch.cat([torch.full((prompt,), -100), answer]),
        torch.cat([torch.ones(prompt, dtype=torch.int64), answer]),
        torch.tensor(offsets),
    )


def trl_loss(
    givens: Sequence[Given], student: Any, teacher: Any, config: Any, prompts: Sequence[int] = (3,)
) -> Tensor:
    """TRL's loss of a batch of answers after prompts of these lengths."""
    batch: list[list[Tensor]] = []
    for one, prompt in zip(givens, prompts, strict=True):
        answer = one.answer
        student_side = trl_side(
            answer.student_logits_NV, answer.student_ids, one.student_spans, prompt
        )
        teacher_side = trl_side(
            answer.teacher_logits_MW, answer.teacher_ids, one.teacher_spans, prompt + 2
        )
        batch.append([x for pair in zip(student_side, teacher_side, strict=True) for x in pair])
    fills = (0.0, 0.0, -100, -100, 0, 0, 0, 0)
    tensors = [
        padded(rows, fill) for rows, fill in zip(zip(*batch, strict=True), fills, strict=True)
    ]
    return ULDLoss(config, student, teacher)(*tensors)


def assert_same(
    ours: Tensor, theirs: Tensor, leaves: Sequence[Tensor], *, value: float, grad: float
) -> tuple[float, float]:
    """Value relative (or absolute, below 1), gradient relative to its largest entry."""
    worst_value = abs(ours.item() - theirs.item()) / max(1.0, abs(theirs.item()))
    assert worst_value <= value, (ours.item(), theirs.item())
    worst_grad = 0.0
    our_grads = torch.autograd.grad(ours, leaves, retain_graph=True)
    their_grads = torch.autograd.grad(theirs, leaves, retain_graph=True)
    for mine, other in zip(our_grads, their_grads, strict=True):
        largest = other.abs().max().item()
        assert largest > 1e-9, "no gradient to compare"
        worst = (mine - other).abs().max().item()
        assert worst <= grad, worst
        worst_grad = max(worst_grad, worst / largest)
    assert worst_grad <= grad, worst_grad
    return worst_value, worst_grad


def test_the_answers_have_groups_of_every_shape() -> None:
    chunks = given_text(TEXTS[0], *small_pair()).answer.chunks
    shapes = Counter(zip(np.minimum(chunks.s1 - chunks.s0, 2).tolist(),
                         np.minimum(chunks.t1 - chunks.t0, 2).tolist(), strict=True))  # fmt: skip
    assert set(shapes) == {(1, 1), (1, 2), (2, 1), (2, 2)}, shapes
    student_X, _teacher_X = baselines.matched_by_string(*(t.get_vocab() for t in small_pair()))
    assert all(len(student_X) < len(t.get_vocab()) for t in small_pair())


def test_our_chunks_are_the_groups_of_trl() -> None:
    for text in TEXTS:
        one = given_text(text, *small_pair())
        sides = [spans[:, :2].tolist() for spans in one[1:]]
        groups = zip(*ULDLoss._align_by_byte_offsets(*sides), strict=True)
        theirs = [(s[0], s[-1] + 1, t[0], t[-1] + 1) for s, t in groups]
        assert list(zip(*(c.tolist() for c in one.answer.chunks[:4]), strict=True)) == theirs


@pytest.mark.parametrize("temperatures", [NEUTRAL, (0.7, 1.6)])
@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("swapped", [False, True])
def test_uld_is_trl(
    merge: str, extended: bool, temperatures: tuple[float, float], swapped: bool
) -> None:
    student, teacher = reversed(small_pair()) if swapped else small_pair()
    one = given_text(TEXTS[0], student, teacher)
    config = trl_config(
        uld_token_merge_strategy=merge, use_extended_uld=extended,
        uld_student_temperature=temperatures[0], uld_teacher_temperature=temperatures[1],
    )  # fmt: skip
    theirs = trl_loss([one], student, teacher, config)
    ours = uld(one.answer, extended=extended, merge=merge, temperatures=temperatures)
    assert_same(ours, theirs, [one.answer.student_logits_NV], value=1e-12, grad=1e-11)


@pytest.mark.parametrize("weights", [None, (0.6, 0.3)])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("swapped", [False, True])
def test_trl_gold_is_trl(
    merge: str, extended: bool, beta: float, weights: tuple[float, float] | None, swapped: bool
) -> None:
    student, teacher = reversed(small_pair()) if swapped else small_pair()
    temperatures = NEUTRAL if weights else (1.3, 0.8)
    one = given_text(TEXTS[0], student, teacher, seed=1)
    config = trl_config(
        uld_use_hybrid_loss=True, beta=beta, uld_token_merge_strategy=merge,
        use_extended_uld=extended, uld_student_temperature=temperatures[0],
        uld_teacher_temperature=temperatures[1],
        uld_hybrid_matched_weight=weights and weights[0],
        uld_hybrid_unmatched_weight=weights and weights[1],
    )  # fmt: skip
    theirs = trl_loss([one], student, teacher, config)
    matched = baselines.matched_by_string(student.get_vocab(), teacher.get_vocab())
    ours = trl_gold(
        one.answer, matched=matched, beta=beta, weights=weights, extended=extended, merge=merge,
        temperatures=temperatures,
    )  # fmt: skip
    assert_same(ours, theirs, [one.answer.student_logits_NV], value=1e-12, grad=1e-11)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("merge", MERGES)
def test_a_batch_of_trl_is_the_mean_of_answers(merge: str, hybrid: bool) -> None:
    """Prompts and answers of several lengths, padded, in float32."""
    student, teacher = small_pair()
    givens = [
        given_text(text, student, teacher, seed=i, dtype=torch.float32)
        for i, text in enumerate(TEXTS)
    ]
    config = trl_config(uld_use_hybrid_loss=hybrid, uld_token_merge_strategy=merge)
    theirs = trl_loss(givens, student, teacher, config, prompts=(2, 5, 1))
    matched = baselines.matched_by_string(student.get_vocab(), teacher.get_vocab())
    losses = [
        trl_gold(one.answer, matched=matched, merge=merge)
        if hybrid
        else uld(one.answer, merge=merge)
        for one in givens
    ]
    leaves = [one.answer.student_logits_NV for one in givens]
    assert_same(torch.stack(losses).mean(), theirs, leaves, value=1e-6, grad=1e-5)


class Words:
    """A vocabulary alone: all that ULDLoss asks of a tokenizer."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> Mapping[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def given_spans(student: Words, teacher: Words, seed: int = 0) -> Given:
    """Two student tokens beside three of the teacher's, then one beside one."""
    g = torch.Generator().manual_seed(seed)
    student_spans = np.array([[0, 3], [3, 6], [6, 7]])
    teacher_spans = np.array([[0, 1], [1, 5], [5, 6], [6, 7]])
    sizes, ids = (len(student.words), len(teacher.words)), ([1, 0, 1], [0, 2, 1, 2])
    logits = [logits_of(one, n, 1.0, g) for one, n in zip(ids, sizes, strict=True)]
    chunks = align(student_spans, teacher_spans)
    answer = Answer(logits[0].requires_grad_(), logits[1], *ids, chunks)
    return Given(answer, student_spans, teacher_spans)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (Words("a", "b", "c"), Words("c", "a", "x", "b", "y")),  # all of the student's match
        (Words("c", "a", "x", "b", "y"), Words("a", "b", "c")),  # all of the teacher's match
        (Words("a", "b", "c", "d", "e"), Words("x", "y", "e")),  # one matches
        (Words("b", "c", "a"), Words("a", "b", "c")),  # nothing is left
    ],
)
def test_trl_gold_is_trl_where_a_side_has_no_rest(
    student: Words, teacher: Words, merge: str
) -> None:
    one = given_spans(student, teacher)
    config = trl_config(uld_use_hybrid_loss=True, uld_token_merge_strategy=merge)
    theirs = trl_loss([one], student, teacher, config)
    matched = baselines.matched_by_string(student.get_vocab(), teacher.get_vocab())
    ours = trl_gold(one.answer, matched=matched, merge=merge)
    assert_same(ours, theirs, [one.answer.student_logits_NV], value=1e-12, grad=1e-11)


def test_probabilities_below_the_floor_are_as_in_trl() -> None:
    """Logits 20 apart, so that most of the matched masses and some merged ones are below 1e-8."""
    student, teacher = Words("a", "b", "c", "d"), Words("a", "b", "x", "d", "y")
    one = given_spans(student, teacher)
    answer = dataclasses.replace(
        one.answer,
        student_logits_NV=(7 * one.answer.student_logits_NV).detach().requires_grad_(),
        teacher_logits_MW=7 * one.answer.teacher_logits_MW,
    )
    assert (answer.student_logits_NV.softmax(-1) < 1e-8).sum() > 4
    matched = baselines.matched_by_string(student.get_vocab(), teacher.get_vocab())
    for merge in MERGES:
        for beta in (0.0, 0.5, 1.0):
            config = trl_config(uld_use_hybrid_loss=True, uld_token_merge_strategy=merge, beta=beta)
            theirs = trl_loss([one._replace(answer=answer)], student, teacher, config)
            ours = trl_gold(answer, matched=matched, merge=merge, beta=beta)
            assert_same(ours, theirs, [answer.student_logits_NV], value=1e-12, grad=1e-11)


@pytest.mark.parametrize("extended", [True, False])
def test_an_answer_without_tokens_has_no_loss(extended: bool) -> None:
    logits_NV = torch.randn(1, 4, requires_grad=True)
    none = np.zeros((0, 2), dtype=np.int64)
    for ids, spans in (([], none), ([2], [(0, 3)])):  # the teacher has a token or not
        teacher_MW = torch.randn(len(ids) + 1, 5)
        answer = Answer(logits_NV, teacher_MW, [], ids, align(none, spans))
        matched = (torch.tensor([1]), torch.tensor([3]))
        for loss in (
            uld(answer, extended=extended),
            trl_gold(answer, matched=matched, extended=extended),
        ):
            (grad,) = torch.autograd.grad(loss, logits_NV)
            assert loss.item() == 0 and grad.abs().max() == 0


# ------------------------------------------------------------------------------- TRL's flaws
def one_to_one(student: Tensor, teacher: Tensor, ids: Sequence[int] = ()) -> Any:
    """An answer whose tokens stand side by side."""
    n = len(student) - 1
    spans = [(i, i + 1) for i in range(n)]
    return Answer(student, teacher, ids or [0] * n, ids or [0] * n, align(spans, spans))


def test_observed_rows_are_one_late() -> None:
    g = torch.Generator().manual_seed(0)
    student_NV, teacher_MW = torch.randn(4, 5, generator=g), torch.randn(4, 5, generator=g)
    late = uld(one_to_one(student_NV, teacher_MW))
    late_by_hand = uld(one_to_one(student_NV.roll(-1, 0), teacher_MW.roll(-1, 0)), merge="bayesian")
    assert late.item() == pytest.approx(late_by_hand.item(), abs=1e-6)
    changed_NV = student_NV.clone()
    changed_NV[0] = 9.0  # what predicts the first token has no part in it
    changed_NV[0, 0] = -9.0
    assert uld(one_to_one(changed_NV, teacher_MW)).item() == late.item()


def test_sorting_forgets_the_token() -> None:
    student_NV = torch.tensor([[5.0, 0.0, -1.0]] * 3)
    teacher_MW = student_NV.flip(1)
    assert uld(one_to_one(student_NV, teacher_MW)).item() == pytest.approx(0, abs=1e-7)


def test_the_divergence_is_negative_and_jumps() -> None:
    student_NV = torch.tensor([[0.6, 0.2, 0.2]] * 2).log()
    teacher_MW = torch.tensor([[0.3, 0.2, 0.5]] * 2).log()
    matched = (torch.tensor([0, 1]), torch.tensor([0, 1]))

    def at(beta: float) -> float:
        answer = one_to_one(student_NV, teacher_MW)
        return trl_gold(answer, matched=matched, beta=beta, weights=(1.0, 0.0)).item()

    assert at(0.0) == pytest.approx(0.3 * math.log(0.3 / 0.6), abs=1e-6)
    assert at(0.0) < -0.2
    assert abs(at(1e-3)) < 1e-3


def test_merged_rows_by_hand() -> None:
    """Two tokens beside one: .5 and .25 of ids 1 and 2, and what each merge makes of them."""
    student_NV = torch.tensor([[0.3, 0.5, 0.2], [0.6, 0.15, 0.25], [0.1, 0.2, 0.7]]).log()
    teacher_MW = torch.tensor([[1.0, 1e-30], [1.0, 1e-30]]).log()
    answer = Answer(student_NV, teacher_MW, [1, 2], [0], align([(0, 1), (1, 2)], [(0, 2)]))
    bayesian = torch.tensor([0.6, 0.15, 0.25]) * 0.5
    observed = torch.tensor([0.6, 0.15, 0.25]) * 0.7  # both rows one late
    for merge, row in (("bayesian", bayesian), ("observed", observed)):
        expected = 1 - row.max() + row.sum() - row.max()
        assert uld(answer, merge=merge).item() == pytest.approx(expected.item(), abs=1e-6)


# ------------------------------------------------------------------------------- BPM, slowly
Target = tuple[dict[int, float], float]


class Slow:
    """One answer's targets: every path of teacher tokens, one by one.

    A path goes on to the next position only behind observed tokens, whose next prediction is known.
    """

    def __init__(
        self, student: Sequence[bytes], teacher: Sequence[bytes], prob: Sequence[Sequence[float]],
        stop: int | None, stops: Sequence[int],
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.prob = student, teacher, prob
        self.stop, self.stops = stop, stops
        self.ids: dict[bytes, int] = {}
        for i, token in enumerate(student):
            if token:
                self.ids.setdefault(token, i)

    def longest_start(self, text: bytes, at_least: int = 1) -> int:
        while len(text) >= at_least:
            if text in self.ids:
                return self.ids[text]
            text = text[:-1]
        return -1

    def rows(
        self, student_ids: Sequence[int], teacher_ids: Sequence[int], chunks: Chunks, *,
        spaces: bool, only: Sequence[int] | None = None,
    ) -> dict[int, Target]:  # fmt: skip
        found: dict[int, Target] = {}
        table = list(zip(*(column.tolist() for column in chunks), strict=True))
        while table:
            run = []
            while table and table[0][6] == 0:
                run.append(table.pop(0))
            table = table[1:]
            if run:
                (s0, s1), (t0, t1) = (run[0][0], run[-1][1]), (run[0][2], run[-1][3])
                self.run(list(student_ids), list(teacher_ids), s0, s1, t0, t1, spaces, only, found)
        return found

    def run(
        self, student_ids: list[int], teacher_ids: list[int], s0: int, s1: int, t0: int, t1: int,
        spaces: bool, only: Sequence[int] | None, found: dict[int, Target],
    ) -> None:  # fmt: skip
        text = b"".join(self.student[i] for i in student_ids[s0:s1])
        ends = {sum(len(self.student[i]) for i in student_ids[s0:n]) for n in range(s0, s1 + 1)}
        for n in range(s0, s1):
            at = sum(len(self.student[i]) for i in student_ids[s0:n])
            own, k, k_at = self.student[student_ids[n]], t0, 0
            while k_at + len(self.teacher[teacher_ids[k]]) <= at:
                k_at += len(self.teacher[teacher_ids[k]])
                k += 1
            piece = self.teacher[teacher_ids[k]]
            begun, rest = piece[: at - k_at], piece[at - k_at :]
            if set(own) <= set(b" \t") and not spaces:
                continue
            if begun and len(own) < len(rest) and k_at + len(piece) not in ends:
                continue
            if only is None or n in only:
                pieces = [self.teacher[i] for i in teacher_ids[k:t1]]
                self.target, self.residual = {}, 0.0
                if self.row(k, begun, rest, own, text[at:], pieces):
                    found[n] = (self.target, self.residual)

    def row(
        self, k: int, begun: bytes, rest: bytes, own: bytes, ahead: bytes, pieces: list[bytes]
    ) -> bool:
        chain = not begun or len(own) > len(rest)
        possible = [
            i
            for i, word in enumerate(self.teacher)
            if not begun or (word and word.startswith(begun))
        ]
        total = sum(self.prob[k][i] for i in possible) if begun else 1.0
        if total <= 1e-9:
            return False
        for i in possible:
            mass, word = self.prob[k][i] / total, self.teacher[i][len(begun) :]
            if i in self.stops:
                self.add(-1 if self.stop is None else self.stop, mass)
            elif chain and self.teacher[i] == pieces[0]:
                self.follow(rest, k + 1, pieces[1:], mass, rest, ahead)
            else:
                self.add(self.longest_start(word[: len(rest)] if begun else word), mass)
        return True

    def follow(
        self, path: bytes, k: int, pieces: list[bytes], mass: float, rest: bytes, ahead: bytes
    ) -> None:
        """Observed tokens spell `path` so far; position k is next, where `pieces[0]` is observed.

        A token there that reaches over the end of `pieces[0]` counts for nothing beyond: the bound.
        """
        longer = any(token.startswith(path) and token != path for token in self.ids)
        if not pieces or not longer:
            self.arrive(path, mass, rest, ahead)
            return
        end = len(path) + len(pieces[0])
        for i, word in enumerate(self.teacher):
            share = mass * self.prob[k][i]
            if word == pieces[0]:
                self.follow(path + word, k + 1, pieces[1:], share, rest, ahead)
            else:
                self.arrive((path + word)[:end], share, rest, ahead)

    def arrive(self, path: bytes, mass: float, rest: bytes, ahead: bytes) -> None:
        while not ahead.startswith(path):
            path = path[:-1]
        beyond = self.longest_start(path, len(rest) + 1)
        self.add(beyond if beyond >= 0 else self.longest_start(rest), mass)

    def add(self, token: int, mass: float) -> None:
        if token < 0:
            self.residual += mass
        else:
            self.target[token] = self.target.get(token, 0.0) + mass


def slow_kl(target: Target, logits: Sequence[float]) -> float:
    norm = math.log(sum(math.exp(z) for z in logits))
    total = sum(t * (math.log(t) - logits[u] + norm) for u, t in target[0].items() if t > 0)
    if target[1] > 0:
        left = sum(math.exp(z - norm) for u, z in enumerate(logits) if target[0].get(u, 0) <= 0)
        total += target[1] * math.log(target[1] / max(left, 1e-12))
    return total


def spelled(tokens: Sequence[bytes], ids: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum([0, *(len(tokens[i]) for i in ids)]).tolist()
    return list(pairwise(ends))


@st.composite
def bpm_cases(draw: st.DrawFn) -> tuple[Any, Any, list[bytes], list[bytes]]:
    """A text that each side cuts in its own way; parts of it and other words in both vocabularies.

    Ids without text, equal bytes and chunks with a flaw among them.
    """
    text = draw(st.text(alphabet="ab ", min_size=1, max_size=8))
    places = st.integers(0, len(text))
    part = st.tuples(places, places).map(lambda at: text[min(at) : max(at)])
    sides = []
    for unique in (True, False):
        at = sorted({0, len(text), *draw(st.lists(places, max_size=5))})
        pieces = [text[i:j] for i, j in pairwise(at)]
        others = draw(st.lists(part | st.text(alphabet="ab ", max_size=4), max_size=8))
        words = [*pieces, *others]
        words = draw(st.permutations(list(dict.fromkeys(words)) if unique else words))
        tokens = [b"", *(word.encode() for word in words if word), b""]
        sides.append((tokens, [tokens.index(piece.encode()) for piece in pieces]))
    (student, student_ids), (teacher, teacher_ids) = sides
    chunks = align(spelled(student, student_ids), spelled(teacher, teacher_ids))
    n = len(chunks.s0)
    flaw = draw(st.lists(st.sampled_from([0, 2, 0]), min_size=n, max_size=n))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    answer = Answer(
        logits_of(student_ids, len(student), 1.0, g).requires_grad_(),
        logits_of(teacher_ids, len(teacher), 1.0, g),
        student_ids, teacher_ids, chunks._replace(flaw=np.array(flaw, dtype=np.int64)),
    )  # fmt: skip
    stop = draw(st.sampled_from([None, len(student) - 1]))
    stops = draw(st.sampled_from([[], [len(teacher) - 1], [0, len(teacher) - 1]]))
    table = prefixes(student, teacher, student_stop=stop, teacher_stops=stops)
    return answer, table, student, teacher


@given(bpm_cases(), st.booleans(), st.booleans())
def test_bpm_is_the_slow_version(
    case: tuple[Any, Any, list[bytes], list[bytes]], spaces: bool, ends: bool
) -> None:
    answer, table, student, teacher = case
    stopped = ends and table.student_stop is not None
    prob = answer.teacher_logits_MW.softmax(-1).tolist()
    slow = Slow(student, teacher, prob, table.student_stop, table.teacher_stops)
    rows = slow.rows(answer.student_ids, answer.teacher_ids, answer.chunks, spaces=spaces)
    stop_mass = sum(prob[-1][i] for i in table.teacher_stops)
    if stopped and stop_mass > 0:
        rows[len(answer.student_ids)] = {table.student_stop: stop_mass}, 1 - stop_mass
    options = {"table": table, "stopped": stopped, "spaces": spaces}
    target_NV, residual_N = bpm_target(answer, **options)
    for n in range(len(target_NV)):
        target, residual = rows.get(n, ({}, 0.0))
        expected = [target.get(u, 0.0) for u in range(len(student))]
        assert target_NV[n].tolist() == pytest.approx(expected, abs=1e-12)
        assert residual_N[n].item() == pytest.approx(residual, abs=1e-12)
        assert sum(target.values()) + residual == pytest.approx(float(n in rows), abs=1e-9)
    loss = bpm(answer, **options)
    logits = answer.student_logits_NV.tolist()
    total = sum(slow_kl(row, logits[n]) for n, row in rows.items())
    assert loss.item() == pytest.approx(total / (len(logits) - 1 + stopped), abs=1e-9)
    assert loss.item() >= -1e-12
    loss.backward()
    for n, row in enumerate(answer.student_logits_NV.grad):
        assert n in rows or row.abs().max() == 0


def bpm_by_hand(
    student: Sequence[bytes], teacher: Sequence[bytes], ids: tuple[list[int], list[int]],
    prob: Sequence[Sequence[float]], **options: Any,
) -> tuple[list[list[float]], list[float]]:  # fmt: skip
    """Target and residual for a student that is the same everywhere."""
    chunks = align(spelled(student, ids[0]), spelled(teacher, ids[1]))
    logits = torch.zeros(len(ids[0]) + 1, len(student)), torch.tensor(prob).log()
    answer = Answer(*logits, *ids, chunks)
    table = prefixes(student, teacher, **options.pop("stops", {}))
    target_NV, residual_N = bpm_target(answer, table=table, **options)
    return target_NV.tolist(), residual_N.tolist()


def test_a_student_token_over_two_teacher_tokens_takes_by_the_chain_rule() -> None:
    """Before `hello`: hel .5, then lo .4 or l .1 (hell, by prefix) or p; and hello .3 alone."""
    student, teacher = (
        [b"hel", b"hello", b"hell", b"x"],
        [b"hel", b"lo", b"l", b"p", b"hello", b"x"],
    )
    prob = [[0.5, 0, 0, 0, 0.3, 0.2], [0, 0.4, 0.1, 0.5, 0, 0], [1, 0, 0, 0, 0, 0]]
    target, residual = bpm_by_hand(student, teacher, ([1], [0, 1]), prob)
    assert target[0] == pytest.approx([0.5 * 0.5, 0.3 + 0.5 * 0.4, 0.5 * 0.1, 0.2], abs=1e-6)
    assert residual[0] == pytest.approx(0, abs=1e-6)
    assert target[1] == [0, 0, 0, 0] and residual[1] == 0  # the answer did not stop


def test_inside_a_token_the_bytes_so_far_are_given() -> None:
    """After `he`: hello .4 and help .1 go on; he .1 itself is residual, hey has no phi for y."""
    student, teacher = [b"he", b"llo", b"l", b"lp"], [b"hello", b"help", b"he", b"hey", b"x"]
    prob = [[0.4, 0.1, 0.1, 0.2, 0.2], [0.2] * 5]
    target, residual = bpm_by_hand(student, teacher, ([0, 1], [0]), prob)
    assert target[0] == pytest.approx([0.8, 0, 0, 0], abs=1e-6)
    assert residual[0] == pytest.approx(0.2, abs=1e-6)
    assert target[1] == pytest.approx([0, 0.5, 0, 0.125], abs=1e-6)
    assert residual[1] == pytest.approx(0.375, abs=1e-6)


def test_inside_a_token_a_rest_reaches_no_further_than_the_observed_one() -> None:
    """After `a`, of `ab` and `abcd`: `bcd` counts as `b`, though the student has `bcd`."""
    student, teacher = [b"a", b"b", b"bcd"], [b"ab", b"abcd"]
    target, _residual = bpm_by_hand(student, teacher, ([0, 1], [0]), [[0.5, 0.5], [0.5, 0.5]])
    assert target[1] == pytest.approx([0, 1, 0], abs=1e-6)


def test_inside_one_token_and_over_its_end_both_rules_hold() -> None:
    """After `a` of `ab`, then `c`: ab .4, abc .1 and a .1 go on; of c .5, cd .2, y .3."""
    student, teacher = [b"a", b"b", b"bc", b"c"], [b"ab", b"abc", b"a", b"x", b"c", b"cd", b"y"]
    prob = [[0.4, 0.1, 0.1, 0.4, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.2, 0.3], [1, 0, 0, 0, 0, 0, 0]]
    over = 0.4 * 0.7
    target, residual = bpm_by_hand(student, teacher, ([0, 2], [0, 4]), prob)
    assert target[1] == pytest.approx([0, (0.5 - over) / 0.6, over / 0.6, 0], abs=1e-6)
    assert residual[1] == pytest.approx(0.1 / 0.6, abs=1e-6)
    target, residual = bpm_by_hand(student, teacher, ([0, 1, 3], [0, 4]), prob)
    assert target[1] == pytest.approx([0, 0.5 / 0.6, 0, 0], abs=1e-6)  # its own token ends with ab
    assert residual[1] == pytest.approx(0.1 / 0.6, abs=1e-6)


def test_a_row_inside_two_tokens_is_left_out() -> None:
    """`b` begins and ends inside `abc`, which ends inside the student's `cd`."""
    student, teacher = [b"a", b"b", b"cd"], [b"abc", b"d"]
    prob = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    target, residual = bpm_by_hand(student, teacher, ([0, 1, 2], [0, 1]), prob)
    assert target[1] == [0, 0, 0] and residual[1] == 0
    assert sum(target[2]) + residual[2] == pytest.approx(1, abs=1e-6)


def test_what_the_teacher_does_not_see_coming_leaves_the_row_out() -> None:
    student, teacher = [b"a", b"b"], [b"ab", b"x"]
    target, residual = bpm_by_hand(student, teacher, ([0, 1], [0]), [[1e-12, 1.0], [0.5, 0.5]])
    assert target[1] == [0, 0] and residual[1] == 0


def test_a_chunk_with_a_flaw_is_left_out_and_ends_the_chain() -> None:
    """`ab`, which the answer goes on with behind `a`, takes nothing of the flawed chunk's row."""
    tokens, ids = [b"a", b"b", b"ab"], [0, 1]
    spans = spelled(tokens, ids)
    logits = torch.tensor([[0.5, 0.3, 0.2]] * 3).log()
    for flaw, expected in (([0, 0], [[0.35, 0.3, 0.35], [0.5, 0.3, 0.2]]),
                           ([0, 2], [[0.5, 0.3, 0.2], [0, 0, 0]]),
                           ([2, 0], [[0, 0, 0], [0.5, 0.3, 0.2]])):  # fmt: skip
        chunks = align(spans, spans)._replace(flaw=np.array(flaw))
        answer = Answer(torch.zeros(3, 3), logits, ids, ids, chunks)
        target_NV, _residual_N = bpm_target(answer, table=prefixes(tokens, tokens))
        for row, wanted in zip(target_NV.tolist(), [*expected, [0, 0, 0]], strict=True):
            assert row == pytest.approx(wanted, abs=1e-6)


def test_stops_and_spaces() -> None:
    student, teacher = [b"a", b" \t", b""], [b"a", b" ", b"\t", b"", b""]
    prob = [[0.6, 0.1, 0, 0.2, 0.1], [0, 1.0, 0, 0, 0], [0, 0, 1.0, 0, 0], [0.3, 0, 0, 0.2, 0.5]]
    ids, stops = ([0, 1], [0, 1, 2]), {"student_stop": 2, "teacher_stops": [3, 4]}
    target, residual = bpm_by_hand(student, teacher, ids, prob, stops=stops, stopped=True)
    assert target[0] == pytest.approx([0.6, 0, 0.3], abs=1e-6)
    assert residual[0] == pytest.approx(0.1, abs=1e-6)
    assert target[1] == [0, 0, 0]  # blanks and tabs
    assert target[2] == pytest.approx([0, 0, 0.7], abs=1e-6)
    assert residual[2] == pytest.approx(0.3, abs=1e-6)
    target, residual = bpm_by_hand(student, teacher, ids, prob, spaces=True)
    assert target[1] == pytest.approx([0, 1, 0], abs=1e-6)
    assert residual[0] == pytest.approx(0.4, abs=1e-6)  # no stop is named


def test_line_breaks_are_trained_and_the_first_of_equal_ids_stands_for_all() -> None:
    target, _residual = bpm_by_hand(
        [b"\n", b"a", b"a"], [b"\n", b"a"], ([0], [0]), [[0.3, 0.7]] * 2
    )
    assert target[0] == pytest.approx([0.3, 0.7, 0], abs=1e-6)


def test_one_tokenizer_is_forward_kl() -> None:
    g = torch.Generator().manual_seed(3)
    tokens = [b"a", b"b", b"ab", b"ba"]
    student_NV = torch.randn(4, 4, generator=g)
    teacher_MW = torch.randn(4, 4, generator=g)
    table = prefixes(tokens, tokens)
    for ids in ([3, 2, 3], [3, 3, 2]):  # no token continues as a longer one
        spans = spelled(tokens, ids)
        answer = Answer(student_NV, teacher_MW, ids, ids, align(spans, spans))
        logp, logq = student_NV[:3].log_softmax(-1), teacher_MW[:3].log_softmax(-1)
        expected = (logq.exp() * (logq - logp)).sum() / 3
        assert bpm(answer, table=table).item() == pytest.approx(expected.item(), abs=1e-6)


def test_bpm_of_an_answer_without_tokens() -> None:
    none = np.zeros((0, 2), dtype=np.int64)
    answer = Answer(
        torch.randn(1, 2, requires_grad=True), torch.randn(1, 3), [], [], align(none, none)
    )
    table = prefixes([b"a", b""], [b"a", b"b", b""], student_stop=1, teacher_stops=[2])
    assert bpm(answer, table=table).item() == 0
    q = answer.teacher_logits_MW.softmax(-1)[0, 2]
    p = answer.student_logits_NV.softmax(-1)[0, 1]
    expected = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    assert bpm(answer, table=table, stopped=True).item() == pytest.approx(expected.item(), abs=1e-6)


# ------------------------------------------------------------------------------- real tokenizers
REAL_TEXT = (
    "The distillation of cross-tokenizer models: café, naïve façade — Größenordnung 2024!\n"
    "    return internals_of(x) # Привет, 世界 🙂🎉 antidisestablishmentarianism"
)
REAL_SIZES = {"smollm2": 49_152, "qwen3": 151_936}  # columns of the models' logits


@lru_cache(maxsize=2)
def real_given(student: str, teacher: str) -> Given:
    one = given_text(
        REAL_TEXT, real_tokenizer(student), real_tokenizer(teacher), seed=5, peak=14.0,
        sizes=(REAL_SIZES[student], REAL_SIZES[teacher]), dtype=torch.float32,
    )  # fmt: skip
    answer = one.answer
    sizes = zip(
        answer.chunks.s1 - answer.chunks.s0, answer.chunks.t1 - answer.chunks.t0, strict=True
    )
    assert {(1, 2), (2, 1), (2, 2)} <= {(int(s), int(t)) for s, t in sizes}
    observed = answer.student_logits_NV.softmax(-1)[
        range(len(answer.student_ids)), answer.student_ids
    ]
    assert 0.3 < observed.median() < 0.999
    return one


@pytest.mark.real
@pytest.mark.parametrize(("student", "teacher"), [("smollm2", "qwen3"), ("qwen3", "smollm2")])
@pytest.mark.parametrize("merge", MERGES)
def test_uld_is_trl_with_real_vocabularies(student: str, teacher: str, merge: str) -> None:
    one = real_given(student, teacher)
    tokenizers = real_tokenizer(student), real_tokenizer(teacher)
    temperatures = (0.9, 1.1)
    config = trl_config(
        uld_token_merge_strategy=merge, uld_student_temperature=0.9, uld_teacher_temperature=1.1
    )
    theirs = trl_loss([one], *tokenizers, config)
    ours = uld(one.answer, merge=merge, temperatures=temperatures)
    worst = assert_same(ours, theirs, [one.answer.student_logits_NV], value=1e-5, grad=1e-4)
    print(student, merge, "uld", *worst)


@pytest.mark.real
@pytest.mark.parametrize(
    ("student", "teacher", "merge", "beta", "weights"),
    [
        ("smollm2", "qwen3", "observed", 0.5, None),
        ("smollm2", "qwen3", "bayesian", 0.0, (0.6, 0.4)),
        ("smollm2", "qwen3", "bayesian", 1.0, None),
        ("qwen3", "smollm2", "observed", 0.0, None),
        ("qwen3", "smollm2", "bayesian", 0.5, (0.6, 0.4)),
    ],
)
def test_trl_gold_is_trl_with_real_vocabularies(
    student: str, teacher: str, merge: str, beta: float, weights: tuple[float, float] | None
) -> None:
    one = real_given(student, teacher)
    tokenizers = real_tokenizer(student), real_tokenizer(teacher)
    config = trl_config(
        uld_use_hybrid_loss=True, beta=beta, uld_token_merge_strategy=merge,
        uld_hybrid_matched_weight=weights and weights[0],
        uld_hybrid_unmatched_weight=weights and weights[1],
    )  # fmt: skip
    theirs = trl_loss([one], *tokenizers, config)
    matched = baselines.matched_by_string(*(t.get_vocab() for t in tokenizers))
    ours = trl_gold(one.answer, matched=matched, beta=beta, weights=weights, merge=merge)
    worst = assert_same(ours, theirs, [one.answer.student_logits_NV], value=1e-5, grad=1e-4)
    print(student, merge, beta, "gold", *worst)


@pytest.mark.real
def test_raw_strings_hide_most_of_gemma() -> None:
    """The docstring of `matched_by_string`."""
    student, teacher = (real_tokenizer(name) for name in ("smollm2", "gemma3"))
    shared = len(baselines.matched_by_string(student.get_vocab(), teacher.get_vocab())[0])
    assert shared / student.get_vocab_size() == pytest.approx(0.30, abs=0.005)
    texts = [{one for one in vocabulary(t).token_bytes if one} for t in (student, teacher)]
    assert len(texts[0] & texts[1]) / student.get_vocab_size() == pytest.approx(0.94, abs=0.005)


@pytest.mark.real
def test_bpm_is_the_slow_version_with_real_vocabularies() -> None:
    """Every row's mass, and in full: the first row, one inside a token, two over several tokens."""
    one = real_given("smollm2", "qwen3").answer
    answer = dataclasses.replace(
        one,
        student_logits_NV=one.student_logits_NV.detach().double(),
        teacher_logits_MW=one.teacher_logits_MW.double(),
    )
    student, teacher = (
        vocabulary(real_tokenizer(name), size=size).token_bytes for name, size in REAL_SIZES.items()
    )
    table = prefixes(student, teacher)
    target_NV, residual_N = bpm_target(answer, table=table)
    chunks = answer.chunks
    n_student, n_teacher = chunks.s1 - chunks.s0, chunks.t1 - chunks.t0
    some = {0}
    for begins, kind in (
        (1, (n_student > 1) & (n_teacher == 1)),  # inside a token
        (0, (n_student == 1) & (n_teacher > 1)),  # over several
        (1, (n_student == 2) & (n_teacher == 2)),  # inside one and over its end
    ):
        some.add(int(chunks.s0[np.flatnonzero(kind)[-1]]) + begins)
    assert len(some) == 4
    prob = answer.teacher_logits_MW.softmax(-1).tolist()
    rows = Slow(student, teacher, prob, None, []).rows(
        answer.student_ids, answer.teacher_ids, chunks, spaces=False, only=sorted(some)
    )
    assert rows.keys() == some
    for n, (target, residual) in rows.items():
        expected_V = torch.zeros_like(target_NV[n])
        expected_V[list(target)] = torch.tensor(list(target.values()), dtype=torch.float64)
        torch.testing.assert_close(target_NV[n], expected_V, atol=1e-12, rtol=1e-9)
        assert residual_N[n].item() == pytest.approx(residual, abs=1e-9)
    total_N = target_NV.sum(-1) + residual_N
    assert (((total_N - 1).abs() < 1e-9) | (total_N == 0)).all()
    assert (total_N > 0).sum() >= len(answer.student_ids) - 6
    in_float32 = bpm(one, table=table)
    assert in_float32.item() == pytest.approx(bpm(answer, table=table).item(), rel=1e-4)


# ------------------------------------------------------------------------------- refusals, examples
def small_answer(**changes: Any) -> Any:
    parts = {
        "student_logits_NV": torch.zeros(2, 3), "teacher_logits_MW": torch.zeros(2, 4),
        "student_ids": [0], "teacher_ids": [0], "chunks": align([(0, 1)], [(0, 1)]),
    }  # fmt: skip
    return Answer(**parts | changes)


PAIR = (torch.tensor([0]), torch.tensor([0]))
TABLE = prefixes([b"a", b"b", b""], [b"a", b"c", b"d", b""])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small_answer(student_logits_NV=torch.zeros(1, 3)),
         r"student_logits: expected 2 rows, one for each of 1 ids .*\(1, 3\); cut them"),
        (lambda: small_answer(teacher_logits_MW=torch.zeros(2, 1, 4)),
         r"teacher_logits: expected 2 rows, .* got shape \(2, 1, 4\)"),
        (lambda: small_answer(student_ids=[3]), r"student_ids: expected ids in 0\.\.2, got 3 to 3"),
        (lambda: small_answer(teacher_ids=[-1]), r"teacher_ids: expected ids in 0\.\.3, got -1 to"),
        (lambda: small_answer(chunks=align([(0, 1)], [(0, 1), (1, 2)])),
         "chunks: expected ranges of 1 teacher tokens, got one that ends at 2; align"),
        (lambda: uld(small_answer(), merge="mean"),
         r"merge: expected 'observed' \(TRL's default\) or 'bayesian', got 'mean'"),
        (lambda: uld(small_answer(), temperatures=(1.0, 0.0)),
         r"temperatures: expected more than 0, got \(1\.0, 0\.0\); 1 is neutral"),
        (lambda: trl_gold(small_answer(), matched=PAIR, beta=1.5),
         r"beta: expected 0 to 1, got 1\.5; 0 is KL\(teacher \|\| student\)"),
        (lambda: trl_gold(small_answer(), matched=(PAIR[0], torch.tensor([0, 1]))),
         "matched: expected as many student ids as teacher ids, got 1 and 2; make them"),
        (lambda: trl_gold(small_answer(), matched=(torch.tensor([3]), PAIR[1])),
         r"matched student ids: expected ids in 0\.\.2, got 3 to 3"),
        (lambda: trl_gold(small_answer(), matched=(PAIR[0], torch.tensor([4]))),
         r"matched teacher ids: expected ids in 0\.\.3, got 4 to 4"),
        (lambda: baselines.matched_by_string({"a": 0}, {"b": 0}),
         r"vocabularies: expected strings in common, got none among 1 and 1; give get_vocab\(\)"),
        (lambda: prefixes([b""], [b"a"]), "student_bytes: expected tokens with text, got none"),
        (lambda: prefixes([b"a"], [b"a"], student_stop=1), r"student_stop: expected ids in 0\.\.0"),
        (lambda: prefixes([b"a"], [b"a"], teacher_stops=[0, 2]), r"teacher_stops: .* got 0 to 2"),
        (lambda: bpm(small_answer(), table=prefixes([b"a"], [b"a"])),
         "table: expected bytes of 3 student and 4 teacher ids, got 1 and 1; give prefixes"),
        (lambda: bpm(small_answer(), table=TABLE, stopped=True),
         "stopped: expected a table with a student_stop, got None; name it there"),
        (lambda: bpm(small_answer(teacher_ids=[1]), table=TABLE),
         r"chunks 0 to 0: expected tokens that spell one text, got b'a' \(student\) and b'c'"),
    ],
)  # fmt: skip
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_trl_refuses_vocabularies_without_a_common_string_too() -> None:
    with pytest.raises(ValueError, match="empty"):
        ULDLoss(trl_config(uld_use_hybrid_loss=True), Words("a"), Words("b"))


def test_examples_in_docstrings() -> None:
    failed, tried = doctest.testmod(baselines)
    assert failed == 0 and tried >= 8
