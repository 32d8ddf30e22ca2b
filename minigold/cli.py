# SPDX-License-Identifier: Apache-2.0
"""The command line. Results go to standard output, progress and warnings to standard error."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from torch import OutOfMemoryError

import minigold
from minigold import cli_align, cli_models
from minigold.checkpoint import check_out, read_evals
from minigold.cli_models import find_device, find_dtype
from minigold.cli_teacher import check_options, open_teacher, teacher_options
from minigold.config import BEST_BY, Config, option_name
from minigold.config_file import KINDS, written_out
from minigold.data import read_prompts
from minigold.dry_run import estimate, told
from minigold.evaluate import best_of
from minigold.load import load
from minigold.log_to import LOGS, check_logs, log_to
from minigold.progress import SHOWN, check_bar, progress_bar
from minigold.report import write_report
from minigold.stop import asked_to_stop
from minigold.tiers import check_tier
from minigold.train import Step, distill

__all__ = ["main"]

log = logging.getLogger("minigold")
COMMANDS = ("train", "align", "generate", "eval", "score", "report", "demo")


class _Parser(argparse.ArgumentParser):
    """Without abbreviations, and with one line for a mistake."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


class _BothSides(argparse.Action):
    """`--plain-prompt` or its opposite: the words for both sides, in its place among all words."""

    def __call__(self, _parser: Any, namespace: Any, *_: Any) -> None:
        for name in (self.dest, "student_plain", "teacher_plain"):
            setattr(namespace, name, self.const)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 if it worked, 2 for a mistake in what was asked, told in one line."""
    args = list(sys.argv[1:] if argv is None else argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        chosen = _parser().parse_args(written_out(args))
        chosen.run(chosen)
        sys.stdout.flush()  # here, where a reader that has gone is expected
    except SystemExit as end:
        return int(end.code or 0)
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as a shell tells it
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"minigold: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OutOfMemoryError as error:
        print(
            f"minigold: expected enough memory on the device, got {' '.join(str(error).split())[:200]}; "
            "lower --micro-batch, --batch-size or --max-new-tokens, or use --gradient-checkpointing "
            "(--dry-run says what is needed); what a run in --out had saved is there",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("minigold: stopped", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minigold", description="On-policy distillation across tokenizers (GOLD)."
    )
    parser.add_argument("--version", action="version", version=f"minigold {minigold.__version__}")
    metavar = f"{{{','.join(COMMANDS)}}}"
    commands = parser.add_subparsers(required=True, metavar=metavar, parser_class=_Parser)
    _train_options(commands)
    cli_align.options(commands)
    cli_models.options(commands)
    _report_options(commands)
    demo = commands.add_parser("demo", help="the main job in two to seven minutes on one CPU core")
    demo.add_argument(
        "--out",
        type=Path,
        default=None,
        help="new or empty folder of the run (default: none is written)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of the run (default 0)")
    demo.set_defaults(run=_demo)
    return parser


def _train_options(commands: Any) -> None:
    train = commands.add_parser("train", help="distil a teacher into a student")
    teacher_options(train, "Hugging Face folder or hub name")
    train.add_argument(
        "--student", required=True, help="Hugging Face folder or hub name (required)"
    )
    train.add_argument("--prompts", required=True, type=Path,
                       help="JSON lines with `prompt` (required)")  # fmt: skip
    train.add_argument("--eval-prompts", type=Path, metavar="E.jsonl", help=(
        "held-out prompts, as in --prompts; what `minigold eval` measures is measured on them "
        "before, during and after the run (default: none)"))  # fmt: skip
    train.add_argument("--out", required=True, type=Path,
                       help="new or empty folder of the run (required)")  # fmt: skip
    train.add_argument("--config", metavar="RUN.toml", help=(
        "TOML file with any of these options, `lr = 1e-4` or `student_plain = true`; what stands on the "
        "command line wins, where `no-` before its name turns a switch off; paths are relative to the "
        "file (default: none)"))  # fmt: skip
    train.add_argument("--resume", action="store_true", help=(
        "go on with the run in --out from its last whole checkpoint, as if it had not stopped; a new "
        "or empty folder begins a run, a finished one stays as it is (default False)"))  # fmt: skip
    train.add_argument("--device", default="auto",
                       help="auto (cuda, else mps, else cpu) or one of them (default auto)")  # fmt: skip
    train.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                       help="of the teacher; auto is bfloat16 on cuda, else float32 (default auto)")  # fmt: skip
    train.add_argument("--dry-run", action="store_true", help=(
        "check all that is given, say what a step would need (parameters, memory, operations and "
        "time), and stop: no weight is read, nothing is written (default False)"))  # fmt: skip
    train.add_argument("--plain-prompt", action=_BothSides, nargs=0, const=True, default=False,
                       help="both sides without a template (default False)")  # fmt: skip
    train.add_argument("--log-to", metavar="LIST", help=(
        f"{', '.join(LOGS)}, or several with commas: curves of every number there, beside "
        "metrics.jsonl (default: none)"))  # fmt: skip
    train.add_argument("--progress", default="lines", choices=SHOWN,
                       help="on the terminal: a line a step, or a bar (default lines)")  # fmt: skip
    for f in fields(Config):
        kind: dict[str, Any] = {"type": type(f.default), "metavar": type(f.default).__name__}
        if isinstance(f.default, bool):
            kind = {"action": "store_true"}
        text = f"{f.metadata['help']} (default {f.default})".replace("%", "%%")
        train.add_argument(option_name(f.name), default=f.default, help=text, **kind)
    for name in (name for name, kind in KINDS.items() if kind is bool):
        kind = {"action": "store_false"}
        if name == "plain_prompt":
            kind = {"action": _BothSides, "nargs": 0, "const": False}
        train.add_argument(f"--no-{option_name(name)[2:]}", dest=name,
                           default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kind)  # fmt: skip
    train.set_defaults(run=_train)


def _report_options(commands: Any) -> None:
    report = commands.add_parser("report", help="draw a run as a page: curves, and every token")
    report.add_argument("folder", metavar="RUN", type=Path,
                        help="folder that train wrote, finished or not")  # fmt: skip
    report.add_argument("--html", type=Path, metavar="FILE",
                        help="where to write the page (default RUN/report.html)")  # fmt: skip
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    target = write_report(args.folder, args.html)
    print(json.dumps({"html": str(target)}))


def _train(args: argparse.Namespace) -> None:
    config = Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
    device = find_device(args.device)
    prompts = read_prompts(args.prompts)
    eval_prompts = read_prompts(args.eval_prompts) if args.eval_prompts else []
    check_out(args.out, resume=args.resume)
    dtype = find_dtype(args.dtype, device)
    logs = () if args.log_to is None else check_logs(args.log_to)
    shown = _progress(args.progress, config)
    if args.dry_run:
        if any(check_options(args)):
            raise ValueError(
                f"expected a folder or hub name as --teacher with --dry-run, got {args.teacher!r}: "
                "what it needs is not known here; give the model's own folder for the figures"
            )
        pair = load(args.student, device="meta"), load(args.teacher, device="meta", dtype=dtype)
        found = estimate(
            *pair, prompts, config, device=device, dtype=dtype, eval_prompts=eval_prompts
        )
        print(told(found), json.dumps(found), sep="\n")
        return
    teacher = open_teacher(args, device=device, dtype=dtype)
    check_tier(teacher, config)
    student = load(args.student, device=device)
    with asked_to_stop() as stop, log_to(logs, args.out) as add, shown as show:

        def on_step(step: Step) -> None:
            add(step.metrics)
            show(step.metrics)

        def on_eval(row: dict[str, Any]) -> None:
            add({"step": row["step"], "eval": row})
            log.info(eval_line(row))

        history = distill(
            student, teacher, prompts, config, eval_prompts=eval_prompts, out=args.out,
            resume=args.resume, on_step=on_step, on_eval=on_eval, stop=stop,
        )  # fmt: skip
    if len(history) < config.steps:
        log.warning(
            "stopped after step %d of %d, with a checkpoint; to go on, give the same command with "
            "--resume", len(history), config.steps,
        )  # fmt: skip
        raise SystemExit(128 + stop.signal)  # as a shell tells it
    write_report(args.out)
    best = best_of(read_evals(args.out), config.best_by)
    if best:
        log.info(
            "best by %s: step %d of %d, %s", config.best_by, best["step"], config.steps,
            f"kept in checkpoints/step-{best['step']}" if best["step"] else "the untrained student",
        )  # fmt: skip
    found = {"best_step": best["step"]} if best else {}
    print(json.dumps({"out": str(args.out), **found, **history[-1]}))


def _progress(
    kind: str, config: Config
) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
    """What shows each step."""
    if kind == "lines":
        return _lines(config)
    check_bar()
    if config.log_every != Config.log_every:
        raise ValueError("expected --log-every with --progress lines only; leave one of them out")
    return progress_bar(config.steps)


@contextmanager
def _lines(config: Config) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What says a line a step."""

    def show(metrics: dict[str, Any]) -> None:
        if metrics["step"] % config.log_every == 0:
            log.info(step_line(metrics, config.steps))

    yield show


def _demo(args: argparse.Namespace) -> None:
    from minigold.demo import run_demo  # loads its data, so only when asked for

    print(json.dumps(run_demo(out=args.out, seed=args.seed)))


def eval_line(row: dict[str, Any]) -> str:
    """One line an evaluation for the terminal: what could be measured of `BEST_BY`, and the stops."""
    keys = [key for key in (*BEST_BY, "eos_rate") if row[key] is not None]
    told = "  ".join(f"{key} {row[key]:.4f}" for key in keys)
    return f"evaluation after step {row['step']}  {told}  {row['seconds']:.1f} s"


def step_line(metrics: dict[str, Any], steps: int) -> str:
    """One line a step for the terminal."""
    per_byte, ended = metrics["reverse_kl_per_byte"], metrics["eos_rate"]
    return (
        f"step {metrics['step']}/{steps}  loss {metrics['loss']:.4f}  "
        f"trained {metrics['trained_fraction'] or 0:.2f} of {metrics['chunks']} chunks  "
        + (f"rKL/byte {per_byte:.4f}  " if per_byte is not None else "")
        + (f"ended {ended:.2f}  " if ended is not None else "")
        + f"{metrics['seconds']:.1f} s"
    )
