# SPDX-License-Identifier: Apache-2.0
"""Holds every tensor and array of the package to the dimension letters that its name ends in.

    student_logits_NV   rank 2, first axis N, second V
    limit_B1            rank 2, second axis of size 1

Within one function call a letter has one size. The check looks at the local names of a function as
it returns; it costs nothing in production, since only the tests turn it on. It looks at the first
`EVENTS` calls and returns, of any package: looking on would double what long tests take.
"""

import dis
import re
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, Self

import numpy as np
from torch import Tensor

__all__ = ["ShapeSuffixes"]

SUFFIX = re.compile(r"[a-z0-9]_([A-Z][A-Z0-9]*)$")
EVENTS = 100_000
LEAVING = {"RETURN_VALUE", "RETURN_CONST", "YIELD_VALUE", "RETURN_GENERATOR"}


def _suffixed(code: CodeType) -> tuple[tuple[str, str], ...]:
    """(name, letters) of each local name with letters."""
    names = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
    found = ((name, SUFFIX.search(name)) for name in dict.fromkeys(names))
    return tuple((name, match[1]) for name, match in found if match)


def _raises(frame: FrameType) -> bool:
    """The function is being left by an exception: wrong shapes may be just what it refuses."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] not in LEAVING


def _mismatches(names: tuple[tuple[str, str], ...], values: dict[str, Any]) -> Iterator[str]:
    sizes: dict[str, tuple[int, str]] = {}
    for name, letters in names:
        value = values.get(name)
        if not isinstance(value, Tensor | np.ndarray):
            continue
        if value.ndim != len(letters):
            yield f"{name} has shape {tuple(value.shape)}"
            continue
        for letter, size in zip(letters, value.shape, strict=True):
            expected = (int(letter), "its name") if letter.isdigit() else (size, name)
            known, source = sizes.setdefault(letter, expected)
            if size != known:
                yield f"{name} has {letter}={size}, but {source} has {letter}={known}"


class ShapeSuffixes:
    """Context: collects in `errors` what the functions of `package` have called wrong."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.errors: list[str] = []
        self._names: dict[CodeType, tuple[tuple[str, str], ...]] = {}
        self._left = EVENTS

    def _on_event(self, frame: FrameType, event: str, arg: object) -> None:
        self._left -= 1
        if self._left < 0:
            sys.setprofile(self._outer)
        if event != "return":
            return
        code = frame.f_code
        names = self._names.get(code)
        if names is None:
            module = str(frame.f_globals.get("__name__", ""))
            ours = module == self.package or module.startswith(f"{self.package}.")
            names = self._names[code] = _suffixed(code) if ours else ()
        if names and not (arg is None and _raises(frame)):
            for error in _mismatches(names, frame.f_locals):
                self.errors.append(f"{code.co_qualname}: {error}")

    def __enter__(self) -> Self:
        self._outer = sys.getprofile()
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.setprofile(self._outer)
