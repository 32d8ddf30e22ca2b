# SPDX-License-Identifier: Apache-2.0
"""How far a run is, as a bar on standard error: `--progress bar`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SHOWN", "check_bar", "progress_bar"]

SHOWN = ("lines", "bar")


def check_bar() -> None:
    """Refuses a bar where it cannot be drawn.

    Raises:
        ValueError: tqdm is not installed.
    """
    try:
        import tqdm.contrib.logging  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "expected the package tqdm for --progress bar, found none; run: pip install tqdm"
        ) from error


@contextmanager
def progress_bar(steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what takes a step's metrics; the bar begins with the first one.

    What the logger `minigold` says on standard error stands above the bar.
    """
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bars: list[Any] = []

    def show(metrics: dict[str, Any]) -> None:
        if not bars:
            done = metrics["step"] - 1
            bars.append(tqdm(total=steps, initial=done, file=sys.stderr, unit="step"))
        notes = {"loss": metrics["loss"], "trained": metrics["trained_fraction"]}
        told = {name: f"{value:.4f}" for name, value in notes.items() if value is not None}
        bars[0].set_postfix(told, refresh=False)
        bars[0].update(metrics["step"] - bars[0].n)

    with logging_redirect_tqdm([logging.getLogger("minigold")]):
        try:
            yield show
        finally:
            for bar in bars:
                bar.close()
