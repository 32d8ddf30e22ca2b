# SPDX-License-Identifier: Apache-2.0
"""Two models that write the same texts have nothing to learn from each other.

A model here is a list of texts and their probabilities, spelled by a tokenizer as it spells them. So a
student and a teacher of one list differ in nothing but their tokens, and every comparison has to be
near 0, at chunk starts and inside. What is above it is a fault of the comparison.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minigold.batch import answer_of, pack, rollout_of
from minigold.data import Prompt
from minigold.events import Events, match, measure
from minigold.loss import chunk_losses
from minigold.offsets import encode_continuation
from minigold.pair import matched
from minigold.sample import logp_of
from minigold.teacher import score
from real_tokenizers import real_tokenizer
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

START = "x = 1\n"  # all texts begin alike, and so the first token says little
TEXTS = tuple(
    START + text
    for text in (
        "y = 2\n",
        "    return y\n",
        "        return y\n",
        "\ndef f(a, b):\n    return a + b\n",
        "\ndef f(a, b):\n    if a > b:\n        return a\n    return b\n",
        "\n    found = read(path)\n    patience = 3  # steps\n",
        "\n    def g(self):\n        self.x = 1\n\n    def h(self):\n        pass\n",
        "\n        for i in range(10):\n            print(i)\n",
        "  - item one\n  - item two\n",
        "# Title\n\nSome text.  Two spaces, and a word repeated often.\n",
        "| name | glim |\n|---|---|\n| é | thirty-eight |\n",
        "| name | glim |\n|---|---|\n| ü | eighty-four |\n",
        "def façade():\n    return eighty-four\n",
        "def façade():\n    return eighty\n",
        "The quick brown fox jumps over the lazy dog.",
        "The quick brown fixture tokenizes reasoning.",
        "Le garçon mange une crème brûlée, naïve.",
        "日本語のテキスト",
        "Привет, мир",
        "Hello 🙂 world",
        "Bye 🙃 world",
        "if x:\n    y = 1\nelse:\n\n    y = 2\n",
    )
)
NEAR = (
    0.1  # nats; an observed chunk leaves a thousandth in its event (`loss.MOST`), which costs 0.035
)


class Head:
    """The states are the predictions."""

    @staticmethod
    def logits(prob: Tensor) -> Tensor:
        return prob.clamp(min=1e-30).log()


class TextModel:
    """Writes texts with fixed probabilities; off its own spellings it goes on as in the texts."""

    device = torch.device("cpu")
    head = Head()

    def __init__(
        self, tokenizer: Tokenizer, spelling: Sequence[bytes], end: int, prob_K: Sequence[float]
    ) -> None:
        self.tokenizer, self.spelling, self.end = tokenizer, spelling, end
        self.texts = [
            ((*encode_continuation(tokenizer, text)[0], end), text.encode(), p)
            for text, p in zip(TEXTS, prob_K, strict=True)
        ]

    def after(self, ids: tuple[int, ...]) -> Tensor:
        prob_V = torch.zeros(len(self.spelling))
        own = [(row[len(ids)], p) for row, _, p in self.texts if row[: len(ids)] == ids != row]
        for i, p in own or self.as_text(b"".join(self.spelling[i] for i in ids)):
            prob_V[i] += p
        return prob_V / prob_V.sum()

    def as_text(self, said: bytes) -> list[tuple[int, float]]:
        found = [(self.end, 1e-9)]
        for _, text, p in self.texts:
            left = text[len(said) :].decode("utf-8", "ignore")
            if text == said:
                found.append((self.end, p))
            elif text.startswith(said) and left.encode() == text[len(said) :]:
                found.append((encode_continuation(self.tokenizer, left)[0][0], p))
        return found

    def __call__(self, ids_BS: Tensor, cache: Any = None) -> Tensor:
        rows = ids_BS.tolist() if cache is None else cache.grown(ids_BS.tolist())
        n_new = ids_BS.shape[1]
        states = [
            [self.after(tuple(row[1 : n + 1])) for n in range(len(row) - n_new, len(row))]
            for row in rows
        ]
        return torch.stack([torch.stack(one) for one in states])

    def empty_cache(self, batch: int, length: int) -> Any:
        return Written([[] for _ in range(batch)], length)


@dataclasses.dataclass
class Written:
    """A cache: the ids of each row."""

    rows: list[list[int]]
    length: int

    def grown(self, more: list[list[int]]) -> list[list[int]]:
        self.rows = [old + new for old, new in zip(self.rows, more, strict=True)]
        assert max(map(len, self.rows)) <= self.length
        return self.rows

    def fill(self, rows_K: Tensor, other: Any, from_K: Tensor) -> None:
        for mine, theirs in zip(rows_K.tolist(), from_K.tolist(), strict=True):
            self.rows[mine] = [*other.rows[theirs]]

    def cut(self, length_B: Tensor) -> None:
        self.rows = [row[:n] for row, n in zip(self.rows, length_B.tolist(), strict=True)]


def losses_of(
    text: str, models: tuple[TextModel, TextModel], events: Events
) -> tuple[list[float], int]:
    """Every comparison of a text, and how many of them are inside chunks."""
    student, teacher = models
    ids = [*encode_continuation(student.tokenizer, text)[0], student.end]
    answer = answer_of(
        Prompt("?"), [0], ids, finished=True, on_policy=True, teacher_prompt_ids=[0],
        student_tokenizer=student.tokenizer, teacher_tokenizer=teacher.tokenizer,
        end_id=student.end, identical=False,
    )  # fmt: skip
    (read,) = score(
        teacher, [answer.reading(events)], end_ids=[teacher.end], side=events.teacher,
        other_paths=True,
    )  # fmt: skip
    prob_SV = torch.stack([student.after(tuple(ids[:n])) for n in range(len(ids))])
    ids_S, logits_SV = torch.tensor(ids), Head.logits(prob_SV)
    logp_S = logp_of(logits_SV, prob_SV, ids_S)
    measures_S5 = torch.stack(measure(prob_SV, logp_S, ids_S, events.student), dim=1)
    rollout = rollout_of(
        answer, read, student_logp_S=logp_S.numpy(),
        student_measures_S5=measures_S5.double().numpy(), events=events,
    )  # fmt: skip
    rows = pack(
        [rollout], [np.ones(len(answer.chunks.s0), dtype=bool)], student_starts=[0],
        teacher_starts=[0], teacher_end_id=teacher.end,
    )  # fmt: skip
    loss_C = chunk_losses(
        logits_SV, Head.logits(read.hidden_MD), rows=rows, events=events, beta=0.0
    )
    return loss_C.tolist(), int((rows.teacher_place_C < 0).sum())


def worst(student: Tokenizer, teacher: Tokenizer, ends: tuple[int, int]) -> tuple[list[float], int]:
    """The largest loss in each text; and how many comparisons were inside chunks."""
    sides = [
        (one, [end], one.get_vocab_size())
        for one, end in zip((student, teacher), ends, strict=True)
    ]
    events = match(*matched(*sides))
    prob_K = torch.rand(len(TEXTS), generator=torch.Generator().manual_seed(0)) + 0.2
    models = tuple(
        TextModel(one, side.spelling, end, (prob_K / prob_K.sum()).tolist())
        for (one, (end,), _), side in zip(sides, (events.student, events.teacher), strict=True)
    )
    found = [losses_of(text, models, events) for text in TEXTS]
    return [max(losses) for losses, _ in found], sum(n for _, n in found)


@pytest.mark.real
@pytest.mark.parametrize(
    ("student", "teacher", "ends"),
    [
        ("smollm2", "gemma3", (2, 1)), ("gemma3", "smollm2", (1, 2)),
        pytest.param("qwen3", "gemma3", (151645, 1), marks=pytest.mark.slow),
        pytest.param("llama3", "llama2", (128009, 2), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_same_texts_cost_nothing(student: str, teacher: str, ends: tuple[int, int]) -> None:
    losses, n_inside = worst(real_tokenizer(student), real_tokenizer(teacher), ends)
    assert n_inside > 5
    assert {text: x for text, x in zip(TEXTS, losses, strict=True) if x > NEAR} == {}


@pytest.mark.parametrize("swap", [False, True])
def test_the_same_texts_cost_little_with_small_vocabularies(swap: bool) -> None:
    """Most words are spelled in pieces here, and a piece does not always begin like the other's."""
    sides = (sentencepiece_bpe(), byte_bpe())
    losses, n_inside = worst(*(sides[::-1] if swap else sides), (0, 0))
    assert n_inside > 20
    assert {text: x for text, x in zip(TEXTS, losses, strict=True) if x > 2 * NEAR} == {}
