# SPDX-License-Identifier: Apache-2.0
"""A TOML file in, words of a command line out: `minigold train --config run.toml`.

A key is an option of `train` without the dashes in front, with dashes or underscores inside; a switch is
true or false. The words of the file stand before those of the command line, which has the last say; that
of both sides stands before those of one.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from minigold.config import Config, option_name

__all__ = ["KINDS", "words_of", "written_out"]

MODELS = ("teacher", "student", "teacher_tokenizer")
FILES = ("prompts", "eval_prompts", "out")
KINDS: dict[str, type] = {  # of the options of `train`, by the names of their fields
    **dict.fromkeys(
        (*MODELS, *FILES, "device", "dtype", "log_to", "progress", "teacher_model"), str
    ),
    **dict.fromkeys(("teacher_top_k", "teacher_connections"), int),
    **dict.fromkeys(("teacher_timeout", "teacher_patience"), float),
    **dict.fromkeys(("resume", "dry_run", "plain_prompt"), bool),
    **{f.name: type(f.default) for f in fields(Config)},
}


def written_out(args: Sequence[str]) -> list[str]:
    """The words of `minigold train`, with those of its `--config` file in its place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `words_of`; two files.
    """
    if list(args[:1]) != ["train"]:
        return list(args)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", type=Path, default=[])
    try:
        known, rest = parser.parse_known_args(args[1:])
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}; name the file") from error
    if len(known.config) > 1:
        raise ValueError(f"expected one --config, got {' and '.join(map(str, known.config))}")
    return ["train", *(word for path in known.config for word in words_of(path)), *rest]


def words_of(path: Path) -> list[str]:
    """The options that a file sets, as words.

    Paths are relative to the file's folder: `prompts`, `eval_prompts` and `out` always, a model if there is such a
    folder or file; else it is a name as on the command line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no TOML, a key that is no option, one that is there twice, or a value of another
            type than its option has.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a TOML file for --config, found no {path}; check the path"
        )
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected TOML in {path}, got an error: {error}; correct it") from error
    words: dict[str, str] = {}
    for key, value in read.items():
        name = key.replace("-", "_")
        kind = KINDS.get(name)
        if kind is None:
            raise ValueError(
                f"expected names of options of minigold train in {path}, got {key!r}; see minigold train "
                "--help"
            )
        if name in words:
            raise ValueError(f"expected {name} once in {path}, got it with dashes too; remove one")
        allowed = (int, float) if kind is float else (kind,)
        if type(value) not in allowed:
            raise ValueError(
                f"expected {key} of type {kind.__name__} in {path}, got {value!r} of type "
                f"{type(value).__name__}"
            )
        words[name] = _word(name, value, path.parent)
    return [words[name] for name in sorted(words, key=lambda name: name != "plain_prompt")]


def _word(name: str, value: Any, folder: Path) -> str:
    option = option_name(name)
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    if name in (*FILES, *MODELS):
        home = value.startswith("~/")
        place = ((Path.home() / value[2:]) if home else folder / value).resolve()
        value = value if name in MODELS and not place.exists() else place
    return f"{option}={value}"
