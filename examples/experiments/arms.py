# SPDX-License-Identifier: Apache-2.0
"""The arms of the screening: what each changes in the loop, and nothing else.

Where it stands: `screen.py` runs an arm through `minigold.distill`. An arm changes settings, or
replaces names of modules while it runs (`replaced`), or has another loss (`whole_pass`), or takes
another pair. Rivals' losses are those of `baselines.py`, on the same answers as ours unless their
arm says so. What has a loss of its own saves no work by a mask; `where` is `all` there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigold import batch, carry, masked, pair, train
from minigold.align import Chunks
from minigold.batch import Array, Rollout
from minigold.config import Config
from minigold.events import Events, Vocabulary, match
from minigold.masked import Pass, kept_of
from minigold.offsets import vocabulary
from minigold.pair import Pair
from minigold.sample import completion_states, pad

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from baselines import Answer, bpm, matched_by_string, prefixes, trl_gold, uld
from demo_controls import no_overhang, shifted, shuffled
from task import MAX_NEW_TOKENS

__all__ = ["ARMS", "BASE", "LR", "UNLIKELY", "Arm", "replaced", "whole_pass"]

BASE = Config(  # of every arm; the screening's `--lr` and `--steps` come on top
    steps=250,
    batch_size=64,
    micro_batch=64,
    max_new_tokens=MAX_NEW_TOKENS,
    lr=4e-3,  # the default's best
    warmup=50,
    student_plain=True,
)
LR = dict.fromkeys(  # of arms that do best with another, or no better, see docs/experiments.md
    ("fine-tuned", "off-policy", "uld", "trl-gold", "trl-gold-on", "trl-bayesian", "trl-beta-0",
     "bpm", "bpm-spaces", "strict", "strict-paper", "byte"), 2e-3,
)  # fmt: skip
UNLIKELY = 0.1  # probability under which the control `suppress` pushes a sampled token down

AnswerLoss = Callable[[Rollout, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Args:
        group: heading in the table.
        told: what it is, for a reader.
        changes: fields of `Config`.
        names: what is replaced while it runs: module, name, value.
        loss: makes, of a pair, a function of an answer and the logits of both models `[S + 1, V]`
            and `[T + 1, W]`; it gives the answer's loss, summed over tokens if `per_token`.
        per_token: the step's loss is the mean over its tokens, not over its answers.
        trains: False measures the student as it is.
        prompts: that are trained on, over and over; 0 is all.
        times: the task's steps; as many tokens are sampled if its batch is that much smaller.
        student, teacher: folders of `task.make`.
    """

    group: str
    told: str
    changes: dict[str, Any] = field(default_factory=dict)
    names: tuple[tuple[ModuleType, str, Any], ...] = ()
    loss: Callable[[Pair], AnswerLoss] | None = None
    per_token: bool = False
    trains: bool = True
    prompts: int = 0
    times: int = 1
    student: str = "student"
    teacher: str = "teacher"


@contextmanager
def replaced(arm: Arm) -> Iterator[None]:
    """The arm's names, and its loss, stand in the modules."""
    with ExitStack() as stack:
        for module, name, value in arm.names:
            stack.enter_context(patch.object(module, name, value))
        if arm.loss:
            stack.enter_context(patch.object(train, "train_pass", whole_pass(arm)))
        yield


def whole_pass(arm: Arm) -> Callable[..., Pass]:
    """In place of `masked.train_pass`: an arm's loss on whole answers, without a mask."""
    made: list[AnswerLoss] = []  # once a run: it may need tables of both vocabularies

    def one_pass(
        pair: Pair, rollouts: Sequence[Rollout], chosen: Sequence[Array], config: Config
    ) -> Pass:
        if not made:
            made.append(arm.loss(pair))
        loss_of, decoder, total = made[0], pair.student.decoder, 0.0
        count = sum(len(r.answer.ids) for r in rollouts) if arm.per_token else len(rollouts)
        for start in range(0, len(rollouts), config.micro_batch):
            rows = rollouts[start : start + config.micro_batch]
            ids = [[*r.answer.prompt_ids, *r.answer.ids] for r in rows]
            losses = []
            for hidden_SD, r in zip(decoder(pad(ids, decoder.device)), rows, strict=True):
                states = completion_states(hidden_SD, len(r.answer.prompt_ids), len(r.answer.ids))
                with torch.no_grad():
                    teacher_MW = pair.teacher.decoder.head.logits(r.score.hidden_MD)
                losses.append(loss_of(r, decoder.head.logits(states), teacher_MW))
            loss = torch.stack(losses).sum() / count
            loss.backward()
            total += float(loss.detach())
        return Pass(total, 0.0, list(chosen))

    return one_pass


# ------------------------------------------------------------------- losses
def without_end(rollout: Rollout, student_NV: Tensor, teacher_MW: Tensor) -> Answer:
    """What the rivals read: the text, its end of turn left out."""
    answer = rollout.answer
    n, ended = len(answer.ids) - answer.finished, slice(None, -1 if answer.finished else None)
    chunks = Chunks(*(column[ended] for column in rollout.chunks))
    return Answer(student_NV[: n + 1], teacher_MW, answer.ids[:n], answer.teacher_ids, chunks)


def uld_loss(_pair: Pair) -> AnswerLoss:
    return lambda *read: uld(without_end(*read))


def published_uld_loss(pair: Pair) -> AnswerLoss:
    """Cross-entropy and 1.5 times ULD, token i beside token i, both as means over an answer.

    Source: 2402.12030; Nicolas-BZRD/llm-recipes, its defaults. Differs: the distance leaves the end
    of turn out, and a step's cross-entropy is the mean of answers, not of tokens.
    """
    labels = label_loss(pair)

    def of(*read: Any) -> Tensor:
        distance = uld(without_end(*read), extended=False)
        return labels(*read) / len(read[0].answer.ids) + 1.5 * distance

    return of


def trl_loss(merge: str, beta: float = 0.5) -> Callable[[Pair], AnswerLoss]:
    def of(pair: Pair) -> AnswerLoss:
        matched = matched_by_string(
            pair.student.tokenizer.get_vocab(), pair.teacher.tokenizer.get_vocab()
        )
        return lambda *read: trl_gold(without_end(*read), matched=matched, merge=merge, beta=beta)

    return of


def bpm_loss(pair: Pair, *, spaces: bool = False) -> AnswerLoss:
    student, teacher = pair.student, pair.teacher

    def spelled(side: Any) -> list[bytes]:
        found = vocabulary(side.tokenizer, end_ids=side.eos_ids, size=side.n_tokens)
        texts = zip(found.token_bytes, found.roles, strict=True)
        return [text if role == "text" else b"" for text, role in texts]

    table = prefixes(
        spelled(student), spelled(teacher),
        student_stop=student.end_id, teacher_stops=teacher.eos_ids,
    )  # fmt: skip

    def of(rollout: Rollout, student_NV: Tensor, teacher_MW: Tensor) -> Tensor:
        answer = without_end(rollout, student_NV, teacher_MW)
        mean = bpm(answer, table=table, stopped=rollout.answer.finished, spaces=spaces)
        return mean * len(rollout.answer.ids)

    return of


def gkd_loss(_pair: Pair) -> AnswerLoss:
    """Of a pair with one tokenizer: KL(teacher || student) token by token, GKD with beta 0."""

    def of(rollout: Rollout, student_NV: Tensor, teacher_MW: Tensor) -> Tensor:
        n = len(rollout.answer.ids)
        student, teacher = student_NV[:n].log_softmax(-1), teacher_MW[:n].log_softmax(-1)
        return F.kl_div(student, teacher, reduction="sum", log_target=True)

    return of


def label_loss(_pair: Pair) -> AnswerLoss:
    """Cross-entropy of the answer's tokens: plain fine-tuning where the teacher wrote it."""

    def of(rollout: Rollout, student_NV: Tensor, _teacher_MW: Tensor) -> Tensor:
        ids = torch.tensor(rollout.answer.ids)
        return F.cross_entropy(student_NV[: len(ids)], ids, reduction="sum")

    return of


def suppress_loss(_pair: Pair) -> AnswerLoss:
    """An advantage of -1 on each sampled token that the student found unlikely. No teacher."""

    def of(rollout: Rollout, student_NV: Tensor, _teacher_MW: Tensor) -> Tensor:
        ids = torch.tensor(rollout.answer.ids)
        logp_S = student_NV[: len(ids)].log_softmax(-1).gather(1, ids[:, None])[:, 0]
        return logp_S[logp_S.detach() < np.log(UNLIKELY)].sum()

    return of


# ------------------------------------------------------------------- masks of their own
def two_sided(rollout: Rollout, _mask: str) -> Tensor:
    """The test of `weighted`: low as well where the teacher finds a chunk likelier than the student."""
    return kept_of(rollout, "weighted")


# ------------------------------------------------------------------- parts left out
def longest_prefixes(student: Vocabulary, other: Vocabulary, **settings: Any) -> Events:
    """Tokens of one side alone go to their longest prefix, whatever the other side's first piece."""
    return match(replace(student, first_pieces={}), replace(other, first_pieces={}), **settings)


def every_chunk(_answer: Any, chunks: Any, _events: Any) -> Array:
    """No chunk is to become an event of its own."""
    return np.ones(len(chunks.s0), dtype=bool)


# ------------------------------------------------------------------- the arms
ALL = {"where": "all"}
TRL_SAMPLING = {"temperature": 0.9, "top_p": 0.95, "lmbda": 0.5}
FRACTIONS = (0.1, 0.2, 0.35, 0.5)
THRESHOLDS = (0.1, 0.5, 0.9)
SAME = {"student": "same"}
FEW = (50, 200)  # prompts, two sums in each, of 25


def _masks() -> dict[str, Arm]:
    """Every mask, and beside it the random one that trains as many chunks a step."""
    found = {"all": Arm("masks", "every chunk", ALL)}
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("sampled", "what speculative decoding would reject, each chunk counting the same",
         {"where": "sampled"}),
        *((f"reject-{x}", f"acceptance under {x}", {"where": "reject", "threshold": x})
          for x in THRESHOLDS),
        *((f"{kind}-{x}", f"the largest {x:.0%} by {kind}", {"where": kind, "fraction": x})
          for kind in ("divergence", "soft-or") for x in FRACTIONS),
    ]  # fmt: skip
    for name, told, changes in kinds:
        found[name] = Arm("masks", told, changes)
    found["two-sided"] = Arm("masks", "the chunks of weighted, each counting the same",
                             {"where": "sampled"}, ((masked, "kept_of", two_sided),))  # fmt: skip
    kinds.insert(0, ("weighted", "", {"where": "weighted"}))
    for name, _, changes in kinds:
        if not name.startswith("soft-or"):  # trains as many as divergence does
            mask = {"replay": changes["where"], **changes, "where": "random"}
            if mask["replay"] == Config.replay:
                del mask["replay"]
            found[f"random-{name}"] = Arm("random", f"as many chunks as {name}, at random", mask)
    return found


def _few() -> dict[str, Arm]:
    """The default where prompts are few, and what learns from the teacher's answers to them alone."""
    found = {}
    for n in FEW:
        found[f"gold-{n}"] = Arm("few prompts", f"minigold as it is, on {n} prompts", prompts=n)
        found[f"fine-tuned-{n}"] = Arm(
            "few prompts", f"cross-entropy on the teacher's answers to {n} prompts",
            {**ALL, "lmbda": 0.0}, loss=label_loss, per_token=True, prompts=n,
        )  # fmt: skip
        found[f"off-policy-{n}"] = Arm(
            "few prompts", "our loss on the same answers", {"lmbda": 0.0}, prompts=n
        )
    return found


ARMS: dict[str, Arm] = {
    "teacher": Arm("ends", "the teacher itself", trains=False, student="teacher"),
    "untouched": Arm("ends", "the student before", trains=False),
    "gold": Arm("default", "minigold as it is: prefix, beta 0, weighted, lambda 1"),
    "fine-tuned": Arm("rivals", "cross-entropy on what the teacher wrote", {**ALL, "lmbda": 0.0},
                      loss=label_loss, per_token=True),
    "off-policy": Arm("rivals", "lambda 0: our loss on what the teacher wrote", {"lmbda": 0.0}),
    "uld": Arm("rivals", "TRL's ULD: the distance alone, on chunks, on our samples", ALL,
               loss=uld_loss),
    "uld-paper": Arm("rivals", "ULD as published: beside cross-entropy, on what the teacher wrote",
                     {**ALL, "lmbda": 0.0}, loss=published_uld_loss),
    "trl-gold": Arm("rivals", "TRL's GOLD: hybrid loss, observed; sampling as it ships: temperature "
                    "0.9, top-p 0.95, lambda 0.5", {**ALL, **TRL_SAMPLING}, loss=trl_loss("observed")),
    "trl-gold-on": Arm("rivals", "the same loss on our samples", ALL, loss=trl_loss("observed")),
    "trl-bayesian": Arm("rivals", "TRL's GOLD, bayesian, on our samples", ALL,
                        loss=trl_loss("bayesian")),
    "trl-beta-0": Arm("rivals", "the same with beta 0, which is our default", ALL,
                      loss=trl_loss("bayesian", beta=0.0)),
    "bpm": Arm("rivals", "BPM; as its authors run it, tokens of spaces alone are left out", ALL,
               loss=bpm_loss, per_token=True),
    "bpm-spaces": Arm("rivals", "BPM with these tokens", ALL, loss=partial(bpm_loss, spaces=True),
                      per_token=True),
    "strict": Arm("rivals", "events strict, the rest as gold", {"events": "strict"}),
    "strict-paper": Arm("rivals", "strict as in 2610.08448: every one-to-one token, reverse KL, "
                        "top-p 0.95", {"events": "strict", "beta": 1.0, "top_p": 0.95, **ALL}),
    "byte": Arm("rivals", "events byte, the rest as gold", {"events": "byte"}),
    "no-observed": Arm("parts", "chunk starts alone: without the observed chunk, and nothing inside",
                       names=((batch, "_is_one_event", every_chunk),)),
    "no-carry": Arm("parts", "without what longer tokens say over a boundary, and inside chunks",
                    names=((carry, "_covers", lambda *_: []), (batch, "_stays", no_overhang))),
    "longest": Arm("parts", "longest prefixes instead of first pieces",
                   names=((pair, "match", longest_prefixes),)),
    "no-inside": Arm("parts", "nothing compared inside chunks",
                     names=((batch, "_inside", lambda *_: ()),)),
    "beta-0.1": Arm("parts", "JSD near KL(teacher||student), 0.1", {"beta": 0.1}),
    "beta-0.5": Arm("parts", "JSD", {"beta": 0.5}),
    "beta-1": Arm("parts", "KL(student||teacher)", {"beta": 1.0}),
    "lambda-0.5": Arm("parts", "half of the rows written by the teacher", {"lmbda": 0.5}),
    "temperature-0.7": Arm("settings", "sampled at temperature 0.7", {"temperature": 0.7}),
    "temperature-1.3": Arm("settings", "sampled at temperature 1.3", {"temperature": 1.3}),
    "softened-2": Arm("settings", "both distributions at temperature 2, sampled at 1",
                      {"student_temperature": 2.0, "teacher_temperature": 2.0}),
    "batch-16": Arm("settings", "a quarter of the batch, four times the steps",
                    {"batch_size": 16, "micro_batch": 16}, times=4),
    **_few(),
    **_masks(),
    "shifted": Arm("controls", "chunks beside their neighbour's teacher tokens",
                   names=((batch, "align", shifted),)),
    "shuffled": Arm("controls", "the teacher's events in a random order",
                    names=((pair, "match", shuffled),)),
    "untaught": Arm("controls", "the teacher before it was taught", teacher="untaught"),
    "suppress": Arm("controls", "no teacher: the student's own unlikely tokens pushed down", ALL,
                    loss=suppress_loss, per_token=True),
    "apart-untouched": Arm("apart", "a student that spells every space by itself, before",
                           trains=False, student="apart"),
    "apart-gold": Arm("apart", "minigold as it is", student="apart"),
    "apart-all": Arm("apart", "every chunk", ALL, student="apart"),
    "apart-bpm": Arm("apart", "BPM", ALL, loss=bpm_loss, per_token=True, student="apart"),
    "same-untouched": Arm("one tokenizer", "a student with the teacher's tokenizer, before",
                          trains=False, **SAME),
    "same-gold": Arm("one tokenizer", "minigold, every token", ALL, **SAME),
    "same-gkd": Arm("one tokenizer", "GKD by its own formula", ALL,
                    loss=gkd_loss, per_token=True, **SAME),
}  # fmt: skip
