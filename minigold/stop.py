# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: the first one asks a run to stop after its step, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["StopRequest", "asked_to_stop"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Called, it says whether a signal came; `signal` is its number, 0 before."""

    signal = 0

    def __call__(self) -> bool:
        return bool(self.signal)


@contextmanager
def asked_to_stop() -> Iterator[StopRequest]:
    """Catches both signals inside the block; handlers are those of before after it.

    Only the main thread can catch signals: in another one this does nothing.

    Raises:
        KeyboardInterrupt: at the second signal, if it is SIGINT.
        SystemExit: with 143 at the second signal, if it is SIGTERM.
    """
    request = StopRequest()

    def catch(number: int, _frame: FrameType | None) -> None:
        if request.signal:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        request.signal = number
        # not by a logger: the signal may have come in the middle of one of its lines
        with suppress(OSError):  # nobody may be reading
            os.write(2, b"stopping after this step; once more to end at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, catch) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
