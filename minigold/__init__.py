# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation across tokenizers (GOLD), small enough to read in an evening.

Read the files in the order of the data; each imports only from files above it:

    offsets     token ids or text -> byte spans of each token
    align       two lists of spans -> chunks
    events      two vocabularies -> the events that both can express
    cache       keys and values of a pass -> those of all passes so far
    packed      matrices -> copies that a CPU reads faster while decoding
    replay      a step of decoding -> the same as a CUDA graph
    model       token ids -> hidden states, and the head that makes logits of them
    sample      prompts -> answers with log-probabilities
    carry       predictions -> what longer tokens say of the text after a boundary
    teacher     answers -> what the teacher thinks of them
    disagree    chunk log-probabilities of both sides -> which chunks to train
    loss        hidden states or logits at those chunks -> the loss
    config, config_file, data, sandbox, chat, rope, families, weights, lora, load    the edges of the loop
    hf          a module of transformers -> a student or teacher
    tiers, wire, http_teacher    how much a teacher says; one that another process serves
    pair, batch, rollout    both sides of an answer
    score       completions -> a file of what the teacher says, which is a teacher too
    masked      rollouts -> the chunks to train, and the gradient there
    metrics     what a step did, in numbers
    generate    prompts -> answers as text
    evaluate    a pair and prompts -> how near the student is to its teacher
    watch       those numbers -> what goes wrong
    checkpoint  the folder of a run: what goes in, and how a run comes out again
    train       everything -> steps, metrics, a trained student
    cost        the sizes of a run -> parameters, bytes, operations
    dry_run     two models without weights and prompts -> what a run would cost
    compare     two tokenizers and a text -> how their tokens line up
    picture, markup, page    the same, drawn for a terminal and for a browser
    history, chart, report    the folder of a run -> a page with its curves and samples
    log_to      the numbers of steps -> curves elsewhere
    demo, cli_align, cli_teacher, cli_models, stop, progress, cli    the demo and the command line

Tensors end in their dimension letters: `student_logits_NV` has rank 2, N first, V second.

    B  rows                          V  student vocabulary
    S  student tokens of a row       W  teacher vocabulary
    T  teacher tokens of a row       X  events that both can express
    N  scored student positions of   K  kept columns of a position
       all rows, end to end          D  width
    M  the same for the teacher      H  heads
    C  chunks                        E  width of a head
                                     L  layers

A digit is a dimension of that size. A name without letters is a Python scalar or plain data.

`import minigold` loads nothing but this file; modules and names are loaded where they are first
used:

>>> import minigold as mg
>>> mg.align.align([(0, 2), (2, 5)], [(0, 1), (1, 5)]).end.tolist()
[5]
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigold.load import LanguageModel

__all__ = ["Config", "distill", "load"]
__version__ = "0.1.0"

MODULES = (  # in reading order
    "offsets", "align", "events", "cache", "packed", "replay", "model", "sample", "carry", "teacher", "disagree", "loss",
    "config", "config_file", "data", "sandbox", "chat", "rope", "families", "weights", "lora", "load", "hf",
    "tiers", "wire", "http_teacher", "pair", "batch", "rollout", "score", "masked", "metrics", "generate", "evaluate", "watch",
    "checkpoint", "train", "cost", "dry_run", "compare", "picture", "markup", "page", "history", "chart", "report",
    "log_to", "demo_task", "demo", "cli_align", "cli_teacher", "cli_models", "stop", "progress", "cli",
)  # fmt: skip
NAMES = {"Config": "train", "distill": "train"}


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(importlib.import_module(f"minigold.{NAMES[name]}"), name)
    if name in MODULES:
        return importlib.import_module(f"minigold.{name}")
    raise AttributeError(
        f"expected one of {', '.join((*__all__, *MODULES))}, got minigold.{name}; "
        "names of a module are reached through it"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *MODULES})


class _Package(ModuleType):
    """Keeps `minigold.load` the function although a submodule has the same name."""

    @property
    def load(self) -> Callable[..., LanguageModel]:
        return importlib.import_module("minigold.load").load  # type: ignore[no-any-return,unused-ignore]

    @load.setter
    def load(self, value: object) -> None:
        # the import system sets the submodule here, which sys.modules has anyway
        if not isinstance(value, ModuleType):
            raise AttributeError(f"expected minigold.load to stay as it is, got {value!r} for it")


sys.modules[__name__].__class__ = _Package
