# SPDX-License-Identifier: Apache-2.0
"""What a teacher is on the command line: a folder, a server, or scores; and `minigold score`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minigold.config import Config
from minigold.data import read_prompts
from minigold.http_teacher import is_address, open_server
from minigold.load import LanguageModel, load
from minigold.score import open_scores, score_file
from minigold.tiers import Teacher, Teller, described, limited

__all__ = ["check_options", "open_teacher", "score_completions", "score_options", "teacher_options"]

log = logging.getLogger("minigold")
TOKENIZER, TOP_K = "teacher-tokenizer", "teacher-top-k"
OPTIONS: dict[str, tuple[type, Any, str]] = {  # of a server: type, default, help
    TOKENIZER: (str, None, "folder or hub name of the model that a server serves, or that scored"),
    TOP_K: (int, 20, "tokens that a server lists in the place of each; 0 is none"),
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


def score_options(
    commands: Any, add_device: Callable[[Any, str], None], run: Callable[[argparse.Namespace], None]
) -> None:
    """Adds `score` to the commands of `minigold`."""
    one = commands.add_parser("score", help="keep what a teacher says of completions, in a file")
    teacher_options(one, "Hugging Face folder or hub name")
    one.add_argument("--completions", required=True, type=Path, metavar="C.jsonl", help=(
        "JSON lines with `prompt` and `completion`, as for train --lmbda 0 (required)"))  # fmt: skip
    one.add_argument("--out", required=True, type=Path, metavar="F.safetensors",
                     help="the file to write; there is none yet (required)")  # fmt: skip
    one.add_argument("--micro-batch", type=int, default=Config.micro_batch, metavar="int",
                     help=f"rows in one forward pass (default {Config.micro_batch})")  # fmt: skip
    add_device(one, "of the teacher's weights")
    one.add_argument("--teacher-plain", action="store_true", help=(
        "the teacher reads the prompt as it is, without a template (default False)"))  # fmt: skip
    one.set_defaults(run=run)


def score_completions(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """`minigold score`, its device found."""
    Config(micro_batch=args.micro_batch)  # for its checks
    prompts = read_prompts(args.completions)
    if args.out.exists() or args.out.suffix != ".safetensors":
        raise ValueError(
            f"expected --out to be a new file that ends in .safetensors, got {args.out}; name another"
        )
    if not args.out.parent.is_dir():
        raise ValueError(f"expected --out to be in a folder, found no {args.out.parent}; make it")
    teacher = open_teacher(args, device=device, dtype=dtype, lists=True)
    if not isinstance(teacher, Teller):
        raise ValueError(f"expected a teacher that reads, got the scores {args.teacher}")
    log.info(described(teacher))
    n = score_file(
        teacher, prompts, args.out, plain=args.teacher_plain, micro_batch=args.micro_batch,
        on_batch=lambda n: log.info("%d completions", n),
    )  # fmt: skip
    found = {"out": str(args.out), "completions": n, "bytes": args.out.stat().st_size}
    print(json.dumps({**found, "tier": teacher.tier, "top_k": teacher.top_k}))


def check_options(args: argparse.Namespace, *, lists: bool = False) -> tuple[bool, bool]:
    """Whether the teacher is a server, and whether it is scores; `lists` as in `open_teacher`.

    Raises:
        ValueError: options that this teacher does not take.
    """
    served, scored = is_address(args.teacher), args.teacher.endswith(".safetensors")
    takes = {TOP_K} if lists else set()
    takes = set(OPTIONS) if served else {TOKENIZER} if scored else takes
    for name, (_, default, _) in OPTIONS.items():
        if name not in takes and getattr(args, name.replace("-", "_")) != default:
            raise ValueError(
                f"expected --{name} with a server as --teacher (http://host:port), got "
                f"{args.teacher!r}; leave it out"
            )
    return served, scored


def open_teacher(
    args: argparse.Namespace,
    *,
    device: torch.device,
    dtype: torch.dtype,
    find: Callable[[str], str | Path] = str,
    lists: bool = False,
) -> Teacher:
    """The teacher that was asked for.

    Args:
        find: the model that a name stands for.
        lists: a folder lists `--teacher-top-k` tokens, as a server does.

    Raises:
        ValueError: options that this teacher does not take, or a server without a tokenizer.
    """
    given = {name: getattr(args, name.replace("-", "_")) for name in OPTIONS}
    served, scored = check_options(args, lists=lists)
    if not (served or scored):
        model = load(find(args.teacher), device=device, dtype=dtype)
        return _listing(model, given[TOP_K]) if lists else model
    tokenizer = given.pop(TOKENIZER)
    if tokenizer is None:
        raise ValueError(
            f"expected --{TOKENIZER} with {args.teacher}, got none; name the folder of the model that "
            "says that (its weights are not read)"
        )
    if scored:
        return open_scores(Path(args.teacher), tokenizer)
    settings = {name.removeprefix("teacher-").replace("-", "_"): x for name, x in given.items()}
    return open_server(args.teacher, tokenizer, **settings)


def _listing(model: LanguageModel, top_k: int) -> Teller:
    if top_k < 0:
        raise ValueError(f"expected --{TOP_K} at least 0, got {top_k}")
    return limited(model, top_k)
