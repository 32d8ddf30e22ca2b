# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: one frozen dataclass, from which the command line is derived."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import Any

from minigold.disagree import KNOWN_BEFORE, WHERE
from minigold.events import CHUNK, EVENTS
from minigold.model import MATRICES

__all__ = ["BEST_BY", "Config", "option_name"]

BEST_BY = {  # figures of an evaluation, and whether more of it is better
    "reverse_kl_per_byte": False, "forward_kl": False, "bits_per_byte_student": False,
    "exact_match": True,
}  # fmt: skip


def _opt(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of `distill`; the same names are the options of `minigold train`.

    Raises:
        ValueError: a value out of range, or one that this version does not have.
    """

    steps: int = _opt(200, "optimizer steps")
    batch_size: int = _opt(16, "prompts a step")
    rollouts: int = _opt(1, "answers sampled for each prompt")
    micro_batch: int = _opt(8, "rows in one forward pass")
    max_new_tokens: int = _opt(128, "student tokens an answer, the stop included")
    temperature: float = _opt(1.0, "of sampling; 1 with top-p 1 and top-k 0 is pure on-policy")
    top_p: float = _opt(1.0, "nucleus of sampling; 1 is off")
    top_k: int = _opt(0, "most likely tokens to sample from; 0 is off")
    events: str = _opt("prefix", "what is compared: " + ", ".join((*EVENTS, CHUNK)))
    beta: float = _opt(0.0, "0 is KL(teacher||student), 1 is KL(student||teacher), between: JSD")
    student_temperature: float = _opt(1.0, "of the student's distributions that are compared")
    teacher_temperature: float = _opt(1.0, "of the teacher's")
    max_overhang: float = _opt(1.0, "chunk starts with more are not compared (0 to 1)")
    where: str = _opt("weighted", "which chunks are trained: " + ", ".join(WHERE))
    threshold: float = _opt(0.5, "acceptance under which reject trains (0 to 1)")
    fraction: float = _opt(0.35, "of a micro-batch, that divergence and soft-or train (0 to 1)")
    replay: str = _opt("weighted", "the mask whose number of chunks a step --where random takes")
    lmbda: float = _opt(1.0, "share of rows that the student samples itself (0 to 1)")
    lr: float = _opt(2e-5, "peak learning rate of AdamW")
    warmup: int = _opt(10, "steps to the peak; after it a cosine to a tenth")
    weight_decay: float = _opt(0.0, "of AdamW")
    clip: float = _opt(1.0, "largest gradient norm; 0 is off")
    lora_rank: int = _opt(0, "of the adapter that is trained instead of the weights; 0 trains them")
    lora_alpha: float = _opt(16.0, "the adapter's scale is this divided by its rank")
    lora_targets: str = _opt("all", "layers with an adapter, or some of " + ",".join(MATRICES))
    gradient_checkpointing: bool = _opt(
        False,
        "training keeps each layer's input alone and runs layers twice: less memory, more time",
    )
    student_plain: bool = _opt(False, "the student reads the prompt as it is, without a template")
    teacher_plain: bool = _opt(False, "the teacher reads the prompt as it is, without a template")
    seed: int = _opt(0, "of data order, sampling and masks")
    cuda_graphs: bool = _opt(False, "sampling replays recorded steps; on cuda only")
    log_every: int = _opt(1, "steps between lines on the terminal")
    eval_every: int = _opt(
        50, "steps between evaluations on --eval-prompts; 0 leaves those before and after the run"
    )
    best_by: str = _opt(
        "reverse_kl_per_byte",
        "the figure by which an evaluation is the best, whose checkpoint stays: "
        + ", ".join(BEST_BY),
    )
    save_every: int = _opt(
        50,
        "steps between checkpoints; 0 makes one only when interrupted, or the best of --eval-prompts",
    )
    keep: int = _opt(2, "newest checkpoints that stay; the disk needs room for one more")
    patience: int = _opt(
        3, "failed steps in a row (loss or gradient not finite) that end the run; 1 is the first"
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            kind, value = type(f.default), getattr(self, f.name)
            fits = isinstance(value, (float, int) if kind is float else kind)
            fits = fits and isinstance(value, bool) == (kind is bool)
            self._require(f.name, fits, f"of type {kind.__name__}")
            most = 10**18 if f.name == "seed" else 10**9  # what is counted with takes no more
            self._require(f.name, kind is not int or value <= most, f"at most {most:,}")
        counts = ("steps", "batch_size", "rollouts", "micro_batch", "max_new_tokens", "log_every")
        for name in (*counts, "keep", "patience"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "top_k", "warmup", "weight_decay", "clip", "seed", "temperature", "save_every",
            "eval_every", "lora_rank",
        ):  # fmt: skip
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("beta", "max_overhang", "threshold", "fraction", "lmbda"):
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        for name in ("lr", "student_temperature", "teacher_temperature", "lora_alpha"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for f in fields(self):
            if isinstance(f.default, float):
                finite = abs(getattr(self, f.name)) <= sys.float_info.max  # of any int, too
                self._require(f.name, finite, "finite")
        masks = tuple(mask for mask in WHERE if mask != "random")
        for name, values in (
            ("events", (*EVENTS, CHUNK)),
            ("where", WHERE),
            ("replay", masks),
            ("best_by", (*BEST_BY,)),
        ):
            self._require(name, getattr(self, name) in values, "one of " + ", ".join(values))
        self._require(
            "where",
            not (self.picks and self.events == CHUNK),
            f"one of {', '.join((*KNOWN_BEFORE, 'random'))} with --events {CHUNK}, "
            "which has no distributions to rank by",
        )
        self._require_use("replay", self.where == "random", "--where random")
        self._require_use("threshold", self.mask == "reject", "the mask reject")
        self._require_use(
            "fraction", self.mask not in KNOWN_BEFORE, "the masks divergence and soft-or"
        )
        for name in ("lora_alpha", "lora_targets"):
            self._require_use(name, self.lora_rank > 0, "--lora-rank above 0")
        named = self.lora_targets.split(",")
        known = set(named) <= set(MATRICES) and len(set(named)) == len(named)
        expected = "all, or a list out of " + ",".join(MATRICES) + " without spaces"
        self._require("lora_targets", self.lora_targets == "all" or known, expected)

    def _require_use(self, name: str, used: bool, where: str) -> None:
        at_default = getattr(self, name) == getattr(type(self), name)
        self._require(name, at_default or used, f"with {where} only")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            got = getattr(self, name)
            raise ValueError(f"expected {option_name(name)} {expected}, got {got!r}")

    @property
    def mask(self) -> str:
        """The mask whose chunks, or number of chunks, are trained."""
        return self.replay if self.where == "random" else self.where

    @property
    def adapted(self) -> tuple[str, ...]:
        """The layers with an adapter, in the order of `MATRICES`; none without one."""
        named = MATRICES if self.lora_targets == "all" else self.lora_targets.split(",")
        return tuple(name for name in MATRICES if name in named and self.lora_rank)

    @property
    def picks(self) -> bool:
        """The training pass picks among all chunks, since the mask needs both distributions."""
        return self.where not in (*KNOWN_BEFORE, "random")

    @property
    def pure(self) -> bool:
        """Samples are drawn from the very distribution that is compared."""
        same = self.temperature == self.student_temperature
        return same and self.top_p == 1 and self.top_k == 0


def option_name(field_name: str) -> str:
    """The option of `minigold train` for a field."""
    return "--" + field_name.replace("_", "-")
