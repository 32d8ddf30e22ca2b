# SPDX-License-Identifier: Apache-2.0
"""How time grows with size: a ratio, so that a slow or busy machine judges as a fast one does."""

import time
from collections.abc import Callable

__all__ = ["assert_not_quadratic"]


def assert_not_quadratic(run: Callable[[int], object], size: int) -> None:
    """Four times the size take less than eight times as long."""
    seconds = []
    for n in (8, size // 4, size):  # the first makes tables, and whatever else is made once
        start = time.process_time()
        run(n)
        seconds.append(time.process_time() - start)
    assert seconds[2] < 8 * seconds[1] + 0.1, seconds
