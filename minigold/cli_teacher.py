# SPDX-License-Identifier: Apache-2.0
"""The options that say what a teacher is: a folder, or a server and its tokenizer's folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minigold.http_teacher import is_address, open_server
from minigold.load import load
from minigold.tiers import Teacher

__all__ = ["open_teacher", "teacher_options"]

OPTIONS: dict[str, tuple[type, Any, str]] = {  # of a server: type, default, help
    "teacher-tokenizer": (str, None, "folder or hub name of the model that a server serves"),
    "teacher-top-k": (int, 20, "tokens that a server lists in the place of each; 0 is none"),
    "teacher-model": (str, "", "the name that a server serves the model by, if it serves several"),
    "teacher-timeout": (float, 300.0, "seconds for one request to a server"),
    "teacher-patience": (float, 600.0, "seconds to wait for a server that does not answer"),
    "teacher-connections": (int, 8, "requests to a server at a time"),
}


def teacher_options(command: Any, what: str) -> None:
    """Adds `--teacher` and all that a server needs."""
    command.add_argument("--teacher", required=True, help=(
        f"{what}; or a server of vLLM or SGLang, as http://host:port (required)"))  # fmt: skip
    for name, (kind, default, text) in OPTIONS.items():
        told = default if default not in (None, "") else "none"
        command.add_argument(f"--{name}", type=kind, default=default, metavar=kind.__name__,
                             help=f"{text} (default {told})")  # fmt: skip


def open_teacher(
    args: argparse.Namespace,
    *,
    device: torch.device,
    dtype: torch.dtype,
    find: Callable[[str], str | Path] = str,
) -> Teacher:
    """The teacher that was asked for.

    Args:
        find: the model that a name stands for.

    Raises:
        ValueError: options of a server without one, or a server without a tokenizer.
    """
    given = {name: getattr(args, name.replace("-", "_")) for name in OPTIONS}
    if is_address(args.teacher):
        tokenizer = given.pop("teacher-tokenizer")
        if tokenizer is None:
            raise ValueError(
                f"expected --teacher-tokenizer with the server {args.teacher}, got none; name the "
                "folder of the model that it serves (its weights are not read)"
            )
        settings = {name.removeprefix("teacher-").replace("-", "_"): x for name, x in given.items()}
        return open_server(args.teacher, tokenizer, **settings)
    for name, value in given.items():
        if value != OPTIONS[name][1]:
            raise ValueError(
                f"expected --{name} with a server as --teacher (http://host:port), got "
                f"{args.teacher!r}; leave it out"
            )
    return load(find(args.teacher), device=device, dtype=dtype)
