# SPDX-License-Identifier: Apache-2.0
"""`minigold align`: what is asked, read and written; the alignment itself is in `compare.py`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, BinaryIO

from minigold.compare import (
    Alignment,
    Lexicon,
    aligned,
    as_json,
    asked,
    figures,
    lexicon,
    shared_mass,
)
from minigold.data import check_target, write_whole
from minigold.load import load, read_tokenizer, resolve
from minigold.page import page
from minigold.pair import check_student
from minigold.picture import table, terminal

__all__ = ["options"]

log = logging.getLogger("minigold")


def options(commands: Any) -> None:
    """Adds `align` to the commands of `minigold`."""
    align = commands.add_parser("align", help="show how two tokenizers cut a text")
    model = (
        "folder with tokenizer.json, or that file, or hub name; if both are folders with weights, "
        "these are read too, for what each model gives to shared tokens, unless you name "
        "tokenizer.json itself (required)"
    )
    align.add_argument("--teacher", required=True, help=model)
    align.add_argument("--student", required=True, help=model)
    align.add_argument("text", nargs="?", metavar="TEXT",
                       help="the text (default: standard input)")  # fmt: skip
    align.add_argument("--file", type=Path,
                       help="file of the text, UTF-8, taken byte for byte (default: none)")  # fmt: skip
    align.add_argument("--jsonl", action="store_true", help=(
        'read {"text": "..."} or {"student_ids": [...]} from standard input, one a line, and write '
        "the object of --json for each (default False)"))  # fmt: skip
    align.add_argument("--json", action="store_true", help=(
        "write one object in place of the picture: text, student and teacher spans and chunks, in "
        "bytes of UTF-8 (default False)"))  # fmt: skip
    align.add_argument("--html", type=Path, metavar="FILE",
                       help="write the picture as a page too (default: none)")  # fmt: skip
    align.set_defaults(run=_align)


def _align(args: argparse.Namespace) -> None:
    _check_align(args)
    if args.jsonl:
        student, teacher = _lexicon(args.student), _lexicon(args.teacher)
        for number, line in enumerate(_input("lines"), start=1):
            if not line.strip():
                continue  # as in a file of prompts
            try:
                row = as_json(aligned(student, teacher, asked(line)))
            except ValueError as error:
                raise ValueError(f"line {number} of standard input: {error}") from error
            print(json.dumps(row), flush=True)
        return
    text = _text(args)
    student, teacher = _lexicon(args.student), _lexicon(args.teacher)
    try:
        check_student(student.tokenizer)
    except ValueError as error:
        log.warning("this student would be refused in training: %s", error)
    alignment = aligned(student, teacher, text)
    if args.json:
        print(json.dumps(as_json(alignment)))
    if args.json and args.html is None:
        return
    told = figures(alignment, student, teacher, mass=_mass(args, alignment))
    if not args.json:
        width = shutil.get_terminal_size().columns
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        colour = sys.stdout.isatty() and not plain
        drawn = terminal(alignment, width=width, colour=colour, ascii_only=_ascii_only())
        print(drawn, table(told, width=width), json.dumps(told), sep="\n")
    if args.html is not None:
        write_whole(args.html, page(alignment, told).encode("utf-8"))
        log.info("written to %s", args.html)


def _check_align(args: argparse.Namespace) -> None:
    """Refuses what contradicts itself, before anything is read."""
    given = {"TEXT": args.text, "--file": args.file, "--html": args.html}
    given = {name: value for name, value in given.items() if value is not None}
    if args.jsonl and given:
        raise ValueError(
            f"expected --jsonl to read standard input alone, got {' and '.join(given)} too; "
            "leave it out"
        )
    if args.text is not None and args.file is not None:
        raise ValueError("expected one of TEXT and --file, got both; leave one out")
    if args.html is not None:
        check_target(args.html)


def _input(what: str) -> BinaryIO:
    """Standard input, as bytes."""
    if sys.stdin is None or (sys.stdin.isatty() and what == "text"):
        raise ValueError("expected a text, got none; give TEXT, --file FILE, or standard input")
    return sys.stdin.buffer


def _text(args: argparse.Namespace) -> str:
    """The text to align; no line end is changed."""
    if args.text is not None:
        return str(args.text)
    if args.file is not None and (args.file.is_dir() or not args.file.exists()):
        kind = "the folder" if args.file.is_dir() else "no"
        raise ValueError(f"expected a file of text, found {kind} {args.file}; check the path")
    data = _input("text").read() if args.file is None else args.file.read_bytes()
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8 in {args.file or 'standard input'}, got byte 0x{data[error.start]:02x} "
            f"at byte {error.start}; save it as UTF-8"
        ) from error


def _lexicon(name: str) -> Lexicon:
    """A tokenizer: of a folder, a file, or a hub name."""
    path = Path(name).expanduser()
    label = path.absolute().name if path.exists() else name
    if path.is_file():
        label = path.absolute().parent.name if path.name == "tokenizer.json" else label
    else:
        path = resolve(name, weights=False) / "tokenizer.json"
    return lexicon(label, read_tokenizer(path))


def _mass(args: argparse.Namespace, alignment: Alignment) -> tuple[float | None, float | None]:
    """What the models give to shared tokens, if both names are folders with weights."""
    folders = [Path(name).expanduser() for name in (args.student, args.teacher)]
    if not all(any(folder.glob("model.safetensors*")) for folder in folders):
        return None, None
    log.info("reading both models for the mass of shared tokens; name tokenizer.json to do without")
    try:
        return shared_mass(load(args.student), load(args.teacher), alignment)
    except (ValueError, OSError) as error:
        log.warning("the mass of shared tokens is left out: %s", " ".join(str(error).split()))
        return None, None


def _ascii_only() -> bool:
    """Whether standard output cannot write the signs of the picture."""
    try:
        "│┊…✗∅◌⏎‹你🙂".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return True
    return False
