# SPDX-License-Identifier: Apache-2.0
"""What a run needs of a teacher, and how much a teacher says: three tiers.

    tokens   the log-probability of each token that it is given
    topk     of the likeliest tokens in the place of each, too; the rest is a tail without names
    dense    everything: it is in this process

Where it stands: between the models and a run. A loss that needs more than the teacher says is
refused here, before anything starts.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from minigold.carry import Reading
from minigold.chat import Reader
from minigold.config import Config
from minigold.events import CHUNK, Side
from minigold.load import LanguageModel, Speaker
from minigold.sample import completion_states, pad
from minigold.teacher import Score, Told, score_of

__all__ = [
    "DRIFT",
    "TIERS",
    "Limited",
    "Teacher",
    "Teller",
    "check_tier",
    "described",
    "drifted",
    "limited",
]

DRIFT = 0.2  # nats a token, on a server's probe: more is another model, less is rounding

TIERS = {
    "tokens": "it says the log-probability of the tokens that it is given, and no more",
    "topk": "it says the likeliest tokens, and the rest is a tail without names",
    "dense": "it is in this process, and nothing is hidden",
}


class Teacher(Reader, Protocol):
    """`LanguageModel` is one that is dense; `Teller` makes one of anything that says less."""

    @property
    def folder(self) -> Path: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def end_id(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def tier(self) -> str: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    def read(
        self, readings: Sequence[Reading], *, side: Side, micro_batch: int, temperature: float
    ) -> list[Score]: ...


def drifted(then: Sequence[float], now: Sequence[float]) -> float:
    """Mean of the differences, in nats a token, of what a server said of its probe."""
    return sum(abs(a - b) for a, b in zip(then, now, strict=True)) / len(now)


@dataclass(frozen=True)
class Teller(Speaker):
    """A teacher that tells of each token instead of showing its states.

    Args:
        top_k: likeliest tokens that it lists in the place of each; 0: none.
    """

    top_k: int

    @abstractmethod
    def tell(self, readings: Sequence[Reading], *, micro_batch: int) -> list[Told]:
        """Of each completion and the `end_id` after it."""

    @property
    def tier(self) -> str:
        return "topk" if self.top_k else "tokens"

    @property
    def facts(self) -> dict[str, Any]:
        """What the numbers of a run follow from, beside the name."""
        text = self.tokenizer.to_str().encode()
        return {
            "teacher_tier": self.tier,
            "teacher_top_k": self.top_k,
            "teacher_tokenizer_sha256": hashlib.sha256(text).hexdigest(),
        }

    def read(
        self, readings: Sequence[Reading], *, side: Side, micro_batch: int, temperature: float
    ) -> list[Score]:
        """Scores of what was told; see `teacher.score`.

        Raises:
            ValueError: a temperature, or what `check_lengths` refuses.
        """
        if temperature != 1:
            raise ValueError(
                f"expected a teacher of the tier dense for a temperature of {temperature}, got one "
                f"of the tier {self.tier}; leave it at 1"
            )
        self.check_lengths(readings)
        told = self.tell(readings, micro_batch=micro_batch)
        return [
            score_of(one, reading, end_ids=side.end_ids, side=side)
            for one, reading in zip(told, readings, strict=True)
        ]

    def check_lengths(self, readings: Sequence[Reading]) -> None:
        """Refuses what is longer than the context.

        Raises:
            ValueError: such a completion.
        """
        for one in readings:
            size = len(one.prompt_ids) + len(one.ids) + 1
            if size > self.context:
                raise ValueError(
                    f"expected at most {self.context} tokens for the teacher {self.name}, its "
                    f"context, got {size} (the prompt, the answer in its tokens, and their end); "
                    "lower --max-new-tokens, shorten the prompts, or serve it with a longer context; "
                    "a run that has begun goes on with --resume only with the longer context, else "
                    "begin a new one (--out) from its last checkpoint (that folder as --student)"
                )


@dataclass(frozen=True)
class Limited(Teller):
    """A model in process that says no more than a lower tier: what a server of it would say."""

    model: LanguageModel

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, **self.model.facts}

    @torch.no_grad()
    def tell(self, readings: Sequence[Reading], *, micro_batch: int) -> list[Told]:
        decoder, told = self.model.decoder, []
        for start in range(0, len(readings), micro_batch):
            some = readings[start : start + micro_batch]
            rows = [[*one.prompt_ids, *one.ids] for one in some]
            for hidden_SD, one in zip(decoder(pad(rows, decoder.device)), some, strict=True):
                states_MD = completion_states(hidden_SD, len(one.prompt_ids), len(one.ids))
                told.append(self._told(decoder.head, states_MD, [*one.ids, self.end_id]))
        return told

    def _told(self, head: Any, states_MD: torch.Tensor, ids: Sequence[int]) -> Told:
        parts = []
        for states_ND, some in zip(states_MD.split(16), torch.tensor(ids).split(16), strict=True):
            logp_NV = head.logits(states_ND).log_softmax(-1).double().cpu()
            taken_N1 = logp_NV.gather(1, some[:, None])
            top_NK, id_NK = logp_NV.topk(min(self.top_k, logp_NV.shape[1]))
            top_NJ, id_NJ = top_NK[:, :0], id_NK[:, :0]
            if self.top_k:  # and the token itself, if it is none of them
                again_NK = id_NK == some[:, None]
                last_N1 = taken_N1.masked_fill(again_NK.any(1, keepdim=True), -torch.inf)
                top_NJ, id_NJ = (
                    torch.cat([top_NK, last_N1], 1),
                    torch.cat([id_NK, some[:, None]], 1),
                )
            parts.append((taken_N1[:, 0], id_NJ, top_NJ))
        return Told(*(torch.cat(one) for one in zip(*parts, strict=True)))


def limited(model: LanguageModel, top_k: int) -> Limited:
    """`model` as a teacher that lists its `top_k` likeliest tokens; 0: none."""
    own = {f.name: getattr(model, f.name) for f in fields(Speaker)}
    return Limited(**own, top_k=top_k, model=model)


def check_tier(teacher: Teacher, config: Config) -> None:
    """Refuses a loss that the teacher does not say enough for.

    Raises:
        ValueError: with the reason, and what to do.
    """
    tier = teacher.tier
    if tier == "dense":
        return
    needs = {}  # what cannot be served: the reason, and what to do
    if config.teacher_temperature != 1:
        needs["--teacher-temperature"] = (
            "another temperature needs all of a distribution",
            "leave it at 1",
        )
    if config.events == "byte":
        needs["--events byte"] = (
            "the next byte adds up all tokens that begin with it, those of the tail too",
            "use prefix" if tier == "topk" else f"use {CHUNK}",
        )
    elif tier == "tokens" and config.events != CHUNK:
        needs[f"--events {config.events}"] = (
            "it compares what the teacher would have said instead",
            f"use --events {CHUNK}, or a server that lists tokens (--teacher-top-k)",
        )
    if tier == "tokens" and config.max_overhang < 1:
        needs["--max-overhang"] = "the teacher's longer tokens are not known", "leave it at 1"
    if tier == "tokens" and config.picks:
        needs[f"--where {config.where}"] = "it ranks chunks by both distributions", "use weighted"
    for what, (reason, remedy) in needs.items():
        raise ValueError(
            f"expected a loss that a teacher of the tier {tier} can serve ({TIERS[tier]}), got "
            f"{what}: {reason}; {remedy}"
        )


def described(teacher: Teacher) -> str:
    """The teacher and its tier, in words."""
    k = getattr(teacher, "top_k", 0)
    listed = f" ({k} tokens a position)" if k else ""
    return f"teacher {teacher.name}: tier {teacher.tier}{listed}, {TIERS[teacher.tier]}"
