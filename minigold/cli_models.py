# SPDX-License-Identifier: Apache-2.0
"""`minigold generate`, `eval` and `score`: what is asked, read and written.

The answers are made in `generate.py`, the figures in `evaluate.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minigold.chat import prompt_ids
from minigold.cli_teacher import (
    open_teacher,
    score_completions,
    score_options,
    teacher_options,
)
from minigold.config import Config
from minigold.data import Prompt, own_file, read_prompts
from minigold.evaluate import evaluate, told
from minigold.events import CHUNK
from minigold.generate import Utterance, stream, write
from minigold.load import LanguageModel, load
from minigold.lora import SETTINGS
from minigold.pair import make_pair
from minigold.rollout import DRAW, seeds_of
from minigold.score import KeptTeacher
from minigold.tiers import described
from minigold.train import check_eval_prompts

__all__ = ["find_device", "find_dtype", "find_model", "options"]

log = logging.getLogger("minigold")
LONGEST = 256  # tokens of an answer, where nothing else is said
MODEL = (
    "Hugging Face folder, hub name, or the folder of a run: its final/, else its newest checkpoint"
)


def options(commands: Any) -> None:
    """Adds `generate`, `eval` and `score` to the commands of `minigold`."""
    _generate_options(commands)
    _eval_options(commands)
    score_options(commands, _device_options, _score)


def _generate_options(commands: Any) -> None:
    generate = commands.add_parser("generate", help="let a model answer")
    generate.add_argument("model", metavar="M", help=MODEL)
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help=(
        "what the model is asked (default: standard input, without its last line end)"))  # fmt: skip
    generate.add_argument("--prompts", type=Path, metavar="P.jsonl", help=(
        "JSON lines with `prompt`; each comes out with `completion` and `finished`, which makes a "
        "prompts file for train --lmbda 0 (default: none)"))  # fmt: skip
    generate.add_argument("--max-new-tokens", type=int, metavar="int", help=(
        "of an answer, the stop included "
        f"(default: {LONGEST}, or what the model's context leaves)"))  # fmt: skip
    generate.add_argument("--temperature", type=float, default=1.0, metavar="float",
                          help="of sampling; 0 takes the most likely token (default 1.0)")  # fmt: skip
    generate.add_argument("--top-p", type=float, default=1.0, metavar="float",
                          help="nucleus of sampling; 1 is off (default 1.0)")  # fmt: skip
    generate.add_argument("--top-k", type=int, default=0, metavar="int",
                          help="most likely tokens to sample from; 0 is off (default 0)")  # fmt: skip
    generate.add_argument("--seed", type=int, default=0, metavar="int",
                          help="of sampling (default 0)")  # fmt: skip
    generate.add_argument("--batch-size", type=int, metavar="int", help=(
        "prompts at a time, with --prompts; answers are the same but for rounding (default: 16)"))  # fmt: skip
    _device_options(generate, "of the model's weights")
    generate.add_argument("--plain-prompt", action="store_true", help=(
        "the prompt as it is, to be continued, as models without a chat template read it anyway "
        "(default False)"))  # fmt: skip
    generate.set_defaults(run=_generate)
    _prompt_after_options(generate)


def _prompt_after_options(generate: argparse.ArgumentParser) -> None:
    """PROMPT may come after options that follow M; older versions of `argparse` leave it over."""
    parse = generate.parse_known_args

    def parsed(args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, more = parse(args, namespace)
        if found.prompt is None and more and not more[0].startswith("-"):
            found.prompt = more.pop(0)
        return found, more

    generate.parse_known_args = parsed  # type: ignore[method-assign]


def _eval_options(commands: Any) -> None:
    one = commands.add_parser("eval", help="say how near a student is to its teacher")
    teacher_options(one, MODEL)
    one.add_argument("--student", required=True, help=f"{MODEL} (required)")
    one.add_argument("--prompts", required=True, type=Path, help=(
        "JSON lines with `prompt`; `completion` and `answer` are used where they are given "
        "(required)"))  # fmt: skip
    one.add_argument("--json", action="store_true",
                     help="write the line of JSON alone, without the table (default False)")  # fmt: skip
    one.add_argument("--limit", type=int, metavar="int",
                     help="evaluate on the first so many prompts (default: all)")  # fmt: skip
    for name, text in (
        ("max-new-tokens", "of an answer, the stop included"),
        ("batch-size", "prompts at a time; answers are the same but for rounding"),
        ("micro-batch", "rows in one forward pass"),
        ("seed", "of sampling and of the intervals"),
    ):
        default = getattr(Config, name.replace("-", "_"))
        one.add_argument(f"--{name}", type=int, default=default, metavar="int",
                         help=f"{text} (default {default})")  # fmt: skip
    _device_options(one, "of the teacher's weights")
    one.add_argument("--plain-prompt", action="store_true",
                     help="both sides without a template (default False)")  # fmt: skip
    for side in ("student", "teacher"):
        one.add_argument(f"--{side}-plain", action="store_true", help=(
            f"the {side} reads the prompt as it is, without a template (default False)"))  # fmt: skip
    one.set_defaults(run=_eval)


def _device_options(command: Any, whose: str) -> None:
    command.add_argument("--device", default="auto",
                         help="auto (cuda, else mps, else cpu) or one of them (default auto)")  # fmt: skip
    command.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                         help=f"{whose}; auto is bfloat16 on cuda, else float32 (default auto)")  # fmt: skip


# -- generate ------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    prompts = _asked(args)
    Config(  # for its checks
        max_new_tokens=LONGEST if args.max_new_tokens is None else args.max_new_tokens,
        batch_size=16 if args.batch_size is None else args.batch_size,
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed,
    )  # fmt: skip
    device = find_device(args.device)
    model = load(find_model(args.model), device=device, dtype=find_dtype(args.dtype, device))
    Utterance(model.tokenizer)  # refuses what cannot be told as text, before anything is read
    ids = [_ids_of(model, prompt, plain=args.plain_prompt) for prompt in prompts]
    drawing: dict[str, Any] = {
        "max_new_tokens": _limit(model, prompts, ids, args.max_new_tokens),
        "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
    }  # fmt: skip
    seeds = seeds_of(args.seed, 0, DRAW, len(prompts))
    if args.prompts is None:
        done = stream(model, ids[0], _say, **drawing, seed=seeds[0])
        _say("\n")
        if not done.finished:
            log.info("cut off at %d tokens; --max-new-tokens sets the limit", len(done.ids))
        return
    n_done = n_cut = 0
    size = args.batch_size or 16
    for rows in write(model, prompts, ids, seeds=seeds, batch_size=size, **drawing):
        for row in rows:
            _say(json.dumps(row, ensure_ascii=not _writes_utf8()) + "\n")
        n_done, n_cut = n_done + len(rows), n_cut + sum(not row["finished"] for row in rows)
        log.info("%d of %d answers, %d cut off", n_done, len(prompts), n_cut)


def _asked(args: argparse.Namespace) -> list[Prompt]:
    """The prompts, or the one prompt."""
    if args.prompts is None and args.batch_size is not None:
        raise ValueError("expected --batch-size with --prompts only; leave it out")
    if args.prompts is not None and args.prompt is not None:
        raise ValueError("expected one of PROMPT and --prompts, got both; leave one out")
    if args.prompts is not None:
        return read_prompts(args.prompts)
    if args.prompt is None:
        return [Prompt(_standard_input())]
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:  # Python keeps other bytes as lone surrogates
        raise ValueError(
            f"expected UTF-8 in PROMPT, got something else at character {error.start}; write it in UTF-8"
        ) from error
    return [Prompt(args.prompt)]


def _standard_input() -> str:
    """All of it, without the line end that a shell puts last."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError(
            "expected a prompt, got none; give PROMPT, --prompts FILE, or standard input"
        )
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8 in standard input, got byte 0x{data[error.start]:02x} at byte "
            f"{error.start}; save it as UTF-8"
        ) from error
    return re.sub(r"\r?\n\Z", "", text)


def _ids_of(model: LanguageModel, prompt: Prompt, *, plain: bool) -> list[int]:
    """By the template if the model has one, unless `plain`."""
    untold = model.template is None and isinstance(prompt.prompt, str)
    try:
        return prompt_ids(model, prompt.prompt, plain=plain or untold)
    except ValueError as error:
        if prompt.line == 0:
            raise
        raise ValueError(f"prompt of line {prompt.line}: {error}") from error


def _limit(
    model: LanguageModel, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], asked: int | None
) -> int:
    """Tokens of an answer: as asked, else `LONGEST` or what the longest prompt leaves of the context."""
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    n, line = len(ids[longest]), prompts[longest].line
    room = model.context - n
    if room < (asked or 1):
        where = f"prompt of line {line}: " if line else ""
        raise ValueError(
            f"{where}expected at most {model.context - (asked or 1)} tokens (the context of "
            f"{model.context} less {'--max-new-tokens' if asked else 'one'}), got {n}; shorten the "
            f"prompt{' or lower --max-new-tokens' if asked else ''}"
        )
    if asked is None and room < LONGEST:
        log.info("at most %d tokens an answer: the context of %d leaves no more",
                 room, model.context)  # fmt: skip
    return min(LONGEST, room) if asked is None else asked


def _say(text: str) -> None:
    """To standard output at once; what it cannot write is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _writes_utf8() -> bool:
    return (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"


# -- eval ----------------------------------------------------------------------------------------


def _eval(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.prompts)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"expected --limit at least 1, got {args.limit}")
    prompts = prompts[: args.limit]
    config = Config(
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        seed=args.seed,
        student_plain=args.student_plain or args.plain_prompt,
        teacher_plain=args.teacher_plain or args.plain_prompt,
    )
    device = find_device(args.device)
    dtype = find_dtype(args.dtype, device)
    teacher = open_teacher(args, device=device, dtype=dtype, find=find_model)
    if isinstance(teacher, KeptTeacher):
        raise ValueError(
            f"expected a teacher that reads what the student samples, got the scores {args.teacher}; "
            "give the teacher itself"
        )
    student = load(find_model(args.student), device=device)
    pair = make_pair(student, teacher, events=CHUNK if teacher.tier == "tokens" else "prefix")
    check_eval_prompts(prompts, pair, config, option="--prompts")
    if teacher.tier != "dense":
        log.info(described(teacher))  # some figures are left out
    figures = evaluate(
        pair, prompts, config, on_batch=lambda n: log.info("%d of %d prompts", n, len(prompts))
    )
    if not args.json:
        print(told(figures))
    print(json.dumps(figures))


def _score(args: argparse.Namespace) -> None:
    device = find_device(args.device)
    score_completions(args, device, find_dtype(args.dtype, device))


# -- models and devices --------------------------------------------------------------------------


def find_model(name: str) -> str | Path:
    """The name as it is, or the model in it if it is the folder of a run.

    Raises:
        FileNotFoundError: a run that has neither final/ nor a checkpoint.
    """
    run = Path(name).expanduser()
    parts = ("final", "checkpoints", "metrics.jsonl")
    if (run / "tokenizer.json").exists() or not any((run / part).exists() for part in parts):
        return name
    found = [path for path in run.glob("checkpoints/step-*") if path.name[5:].isdecimal()]
    newest = max(found, key=lambda path: int(path.name[5:]), default=None)
    files = (run / "final" / name for name in ("config.json", SETTINGS))
    chosen = run / "final" if any(path.is_file() for path in files) else newest
    if chosen is None:
        raise FileNotFoundError(
            f"expected final/ or a checkpoint in the run {run}, found neither; let it train on"
        )
    log.info("%s: the model is %s", run, chosen.relative_to(run))
    return own_file(run, str(chosen.relative_to(run)))


def find_device(name: str) -> torch.device:
    """`auto`: cuda, else mps, else cpu.

    Raises:
        ValueError: a name that torch does not know, or a device that is not there.
    """
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"expected --device auto, cuda, mps or cpu on this machine, got {name!r} "
            f"({str(error).splitlines()[0][:80]})"
        ) from error
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on cuda, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
