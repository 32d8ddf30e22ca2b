# SPDX-License-Identifier: Apache-2.0
"""Lines of metrics.jsonl in, curves in TensorBoard, Weights & Biases or Trackio out: `--log-to`.

Where it stands: `cli.py` hands it each step's numbers. Nothing of it is needed to train, and the packages
are imported where they are asked for. A run that goes on does so in the same place: TensorBoard drops what
it had of the steps that come again, the other two know a run by an id, which log_to.json in its folder
keeps.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from minigold.data import write_whole

__all__ = ["LOGS", "check_logs", "log_to", "numbers_of"]

IDENTITY = "log_to.json"
Row = Mapping[str, Any]
Add = Callable[[int, dict[str, float]], None]


def check_logs(text: str) -> tuple[str, ...]:
    """The names in a list with commas.

    Raises:
        ValueError: a name that is not known or there twice, or whose package is not installed.
    """
    names = tuple(text.split(","))
    if len(set(names)) < len(names) or not set(names) <= set(LOGS):
        raise ValueError(
            f"expected --log-to to be one of {', '.join(LOGS)}, or several with commas and without "
            f"spaces, got {text!r}"
        )
    for name in names:
        module, needed = MODULES[name]
        try:
            there = hasattr(importlib.import_module(module), needed)  # else a folder of that name
        except ImportError:
            there = False
        if not there:
            raise ValueError(
                f"expected the package {name} for --log-to {name}, found none; run: pip install {name}"
            )
    return names


@contextmanager
def log_to(names: tuple[str, ...], out: Path) -> Iterator[Callable[[Row], None]]:
    """Gives what takes a step's row; the logs are opened with the first one, and closed at the end.

    Args:
        out: the folder of the run, which is there at the first row.

    Raises:
        OSError: a log that cannot be opened.
    """
    adds: list[Add] = []
    with ExitStack() as stack:

        def log(row: Row) -> None:
            number = row["step"]
            if not adds:
                adds.extend(stack.enter_context(_opened(name, out, number)) for name in names)
            for add in adds:
                add(number, numbers_of(row))

        yield log


def numbers_of(row: Row) -> dict[str, float]:
    """Every number of a row but the step, by name; one in an object by both names.

    >>> numbers_of({"step": 3, "loss": 0.5, "eos_rate": None, "unscorable": {"cut": 2}})
    {'loss': 0.5, 'unscorable/cut': 2}
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": one for inner, one in numbers_of(value).items()}
        elif name != "step" and isinstance(value, int | float):
            found[name] = value
    return found


@contextmanager
def _opened(name: str, out: Path, first: int) -> Iterator[Add]:
    with ExitStack() as stack:
        try:
            add = stack.enter_context(LOGS[name](out, first))
        except Exception as error:  # of many kinds: no account, no network, no room
            reason = str(error).strip() or type(error).__name__
            raise OSError(
                f"expected {name} to open a log, got {reason}; the run is in {out}: give the same "
                "command with --resume, and another --log-to or none"
            ) from error
        yield add


@contextmanager
def _tensorboard(out: Path, first: int) -> Iterator[Add]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard"), purge_step=first) as writer:

        def add(number: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, number)
            writer.flush()

        yield add


@contextmanager
def _wandb(out: Path, first: int) -> Iterator[Add]:  # noqa: ARG001
    import wandb

    project = os.environ.get("WANDB_PROJECT", "minigold")
    run = wandb.init(
        project=project, id=_identity(out), name=out.resolve().name, resume="allow", dir=str(out),
        config=_settings(out),
    )  # fmt: skip

    def add(number: int, numbers: dict[str, float]) -> None:
        if number >= run.starting_step:  # it has those before, and takes none twice
            run.log(numbers, step=number)

    try:
        yield add
    except BaseException:
        run.finish(exit_code=1)  # as a context manager it would print the traceback
        raise
    run.finish()


@contextmanager
def _trackio(out: Path, first: int) -> Iterator[Add]:  # noqa: ARG001
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", "minigold")
    name = f"{out.resolve().name}-{_identity(out)}"
    with redirect_stdout(sys.stderr):  # it tells what it does
        trackio.init(project=project, name=name, resume="allow", config=_settings(out))

    def add(number: int, numbers: dict[str, float]) -> None:
        trackio.log(numbers, step=number)

    try:
        yield add
    finally:
        with redirect_stdout(sys.stderr):
            trackio.finish()


def _identity(out: Path) -> str:
    """The run's own id; a new one is kept in its folder."""
    path = out / IDENTITY
    if not path.is_file():
        write_whole(path, json.dumps({"id": secrets.token_hex(4)}).encode())
    return str(json.loads(path.read_bytes())["id"])


def _settings(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "config.json").read_bytes()))


Opener = Callable[[Path, int], AbstractContextManager[Add]]
LOGS: dict[str, Opener] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
MODULES = {  # where each package's first name is found
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init"),
    "trackio": ("trackio", "init"),
}  # fmt: skip
