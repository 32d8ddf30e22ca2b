# SPDX-License-Identifier: Apache-2.0
"""One step of decoding, recorded as a CUDA graph and played again: no kernel waits for Python.

A graph holds shapes and addresses. So a pass sees a fixed number of the cache's columns, the last
of them still empty, and the column that it writes stands in a tensor. When these columns are full,
or rows have left, one step runs as it is, and the next one is recorded anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from minigold.cache import Cache

__all__ = ["Replay"]

log = logging.getLogger("minigold")
COLUMNS = 128  # a pass sees a multiple of this


class Replay:
    """`model(ids_B1, cache)[:, 0]`, as a graph where that can be recorded; else as it is."""

    def __init__(self, model: Callable[[Tensor, Cache], Tensor], cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.shape: tuple[int, int] | None = None
        self.play: Callable[[], None] | None = None
        self.works = True

    def __call__(self, ids_B1: Tensor) -> Tensor:
        """state_BD after one more token in each row."""
        shape = len(ids_B1), self.cache.fix(COLUMNS)
        if not self.works or shape != self.shape:  # the first step of a shape warms up
            self.shape, self.play = shape, None
            return self.model(ids_B1, self.cache)[:, 0]
        if self.play is None:
            self.ids_B1 = ids_B1.clone()
            try:
                self.play, self.state_BD = record(lambda: self.model(self.ids_B1, self.cache)[:, 0])
            except RuntimeError as error:
                log.warning("decoding goes on without CUDA graphs: %s", error)
                self.works = False
                return self.model(ids_B1, self.cache)[:, 0]
        self.ids_B1.copy_(ids_B1)
        self.play()
        return self.state_BD.clone()


def record(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What runs the step again, and the tensor in which its result then stands. Nothing runs here.

    Raises:
        RuntimeError: something in the step cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = step()
    return graph.replay, state
