# SPDX-License-Identifier: Apache-2.0
"""A file of JSON lines in, prompts out.

Every line is checked before anything runs, and a wrong one is refused with its number: a run
never trains on half a file. Lines of white space hold nothing and are passed over. Nothing is
tokenized here.
"""

from __future__ import annotations

import json
import logging
import math
import os
import reprlib
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

__all__ = [
    "Message", "Prompt", "check_target", "locked", "own_file", "parse_object", "read_object", "read_prompts",
    "short", "write_whole",
]  # fmt: skip

log = logging.getLogger("minigold")
Message = dict[str, Any]
LARGEST = 2**24  # bytes of a JSON object
DEEPEST = 100  # levels of it
COLUMNS = ("prompt", "messages", "completion", "finished", "teacher_prompt", "answer")
RESERVED = (  # what samples.jsonl has beside the columns of the prompt
    "step", "line", "on_policy", "student_ids", "teacher_ids", "chunks", "acceptance", "trained",
    "student_spans", "teacher_best",
)  # fmt: skip
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file.

    Args:
        prompt: text, or messages whose last one is not the assistant's.
        completion: a fixed answer for off-policy training.
        teacher_prompt: what the teacher reads instead of `prompt`.
        answer: the right answer, for evaluation.
        extra: other columns, as they are.
        line: number in the file, from 1; 0 if it came from no file.
        finished: the completion ends where its text ends; False if it was cut off there.

    Raises:
        ValueError: an extra column that has the name of one of minigold's own.
    """

    prompt: str | list[Message]
    completion: str | None = None
    teacher_prompt: str | list[Message] | None = None
    answer: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    line: int = 0
    finished: bool = True

    def __post_init__(self) -> None:
        taken = [key for key in self.extra if key in (*COLUMNS, *RESERVED)]
        if taken:
            raise ValueError(
                "expected extra columns with names that samples.jsonl does not use itself, got "
                f"{short(taken[0])}; rename it"
            )


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a JSON lines file, in order.

    A line is an object with `prompt` (text or messages), or `messages`, whose last assistant turn
    is the completion; and optionally `completion`, `finished` (false for a completion that was cut
    off), `teacher_prompt` and `answer`. A column whose value is null is as good as absent.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not as above (with its number), or a file without prompts.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"expected a file of JSON lines, got the folder {path}; name the file")
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of JSON lines, found no {path}; check the path")
    prompts = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                try:
                    prompts.append(_prompt(parse_object(raw.removesuffix(b"\n")), number))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(
            f'expected prompts in {path}, got none; add lines such as {{"prompt": "…"}}'
        )
    return prompts


def parse_object(
    raw: bytes, *, like: str = '{"prompt": "…"}', remedy: str = "write one object a line"
) -> dict[str, Any]:
    """The JSON object in a line or file, strictly: no value in it is changed or lost.

    It has each key once, no NaN or infinity, no half of a surrogate pair, at most `LARGEST` bytes
    and `DEEPEST` levels.

    Args:
        like: an example for the message.
        remedy: what to do where it is no JSON.

    Raises:
        ValueError: it is no such object.
    """
    if len(raw) > LARGEST:
        raise ValueError(f"expected an object of at most {LARGEST:,} bytes, got more; shorten it")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise ValueError("expected JSON, got a byte order mark; save the file as UTF-8 without BOM")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant,
            parse_float=_float, parse_int=_whole,
        )  # fmt: skip
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8, got byte 0x{raw[error.start]:02x} at byte {error.start}; "
            "save the file as UTF-8"
        ) from error
    except UnicodeEncodeError as error:
        raise ValueError(
            "expected text, got half of a surrogate pair; write the character itself or both halves"
        ) from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(
            f"expected one JSON object, got {error.msg} at {line}column {error.colno}; {remedy}"
        ) from error
    except RecursionError as error:
        raise ValueError("expected one JSON object, got deep nesting; flatten it") from error
    if type(value) is not dict:
        raise ValueError(f"expected an object such as {like}, got {_kind(value)}")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [x for one in inner for x in one if isinstance(x, dict | list)]
    if level:
        raise ValueError(f"expected at most {DEEPEST} levels, got deep nesting; flatten it")
    return value


def read_object(path: Path, *, remedy: str = "download it again") -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: see `parse_object`; the file is named.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(LARGEST + 1)
    try:
        return parse_object(raw, like='{"key": "value"}', remedy=remedy)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def own_file(folder: Path, name: str) -> Path:
    """The path of what a folder has under a name, whether or not it is there.

    A link may lead to another file of the folder or, in the cache of `huggingface_hub`, to its
    blobs. Who gives us a folder must not have us read, copy or change what is ours.

    Raises:
        ValueError: it lies elsewhere.
    """
    try:
        home, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a character NUL
        raise ValueError(f"expected a file in {folder}, got {name[:80]!r} ({error})") from error
    cached = [one.parents for one in (home, *home.parents) if one.name == "snapshots"]
    homes = [home, *(root / "blobs" for roots in cached for root in roots[:2])]
    if not any(target.is_relative_to(one) for one in homes):
        raise ValueError(
            f"expected {name[:80]!r} to lie in {folder}, got {target}; put the file itself there"
        )
    return folder / name


def short(value: Any) -> str:
    """A value as a message shows it, cut in the middle of what is long."""
    return _SHORT.repr(value)


def check_target(path: Path) -> None:
    """Refuses what a file cannot be written to: folders, devices and pipes, absent folders.

    Renaming a file over a device would replace the device, for everything on the machine.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no file that can be replaced"
        raise ValueError(f"expected a file to write to, got {path}, {kind}; name another")
    if not path.parent.is_dir():
        raise ValueError(f"expected a folder for {path}, found none; make it first")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside its place and renames it, so that no reader sees half of it.

    Raises:
        ValueError: see `check_target`.
        OSError: nothing can be written there.
    """
    check_target(path)
    target = path.resolve()  # a link stays a link
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        part = Path(folder) / target.name
        part.write_bytes(data)
        part.replace(target)


def locked(folder: Path) -> int | None:
    """The open folder, locked until it is closed; None where system or disk know no such locks.

    Raises:
        ValueError: another process has locked it.
    """
    if sys.platform == "win32":
        return None
    found = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(found)
        if isinstance(error, BlockingIOError):
            raise ValueError(
                f"expected that no other process writes to {folder}, got one that does; wait for it, "
                "or end it"
            ) from error
        log.warning("%s cannot be locked (%s): let no other process write there", folder, error)
        return None
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"expected each key once, got {short(twice)} twice; remove one")
    return found


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # `json` makes that of 1e999
        raise ValueError(f"expected numbers below 1.8e308, got {text[:20]}…; write it as text")
    return value


def _whole(text: str) -> int:
    if len(text) > 300:
        _float(text)
    return int(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"expected JSON, got {name}, which JSON does not have; use null or a number")


def _prompt(row: Mapping[str, Any], number: int) -> Prompt:
    given = {key: row.get(key) for key in COLUMNS}
    if (given["prompt"] is None) == (given["messages"] is None):
        got = "neither" if given["prompt"] is None else "both"
        raise ValueError(f"expected one of prompt and messages, got {got}; keep one of them")
    completion = _text(given["completion"], "completion")
    if given["prompt"] is not None:
        prompt = _told(given["prompt"], "prompt")
    else:
        prompt, last = _split(_messages(given["messages"], "messages"))
        if last is not None and completion is not None:
            raise ValueError(
                "expected one completion, got completion and a last assistant turn; remove one"
            )
        completion = last if last is not None else completion
    teacher = given["teacher_prompt"]
    return Prompt(
        prompt,
        completion,
        None if teacher is None else _told(teacher, "teacher_prompt"),
        _text(given["answer"], "answer"),
        {key: value for key, value in row.items() if key not in COLUMNS},
        number,
        _finished(given["finished"], completion),
    )


def _finished(value: Any, completion: str | None) -> bool:
    if value is not None and type(value) is not bool:
        raise ValueError(f"expected finished to be true or false, got {_kind(value)}; correct it")
    if value is not None and completion is None:
        raise ValueError("expected a completion beside finished, got none; remove finished")
    return value is not False


def _told(value: Any, column: str) -> str | list[Message]:
    """Text, or messages that wait for the assistant."""
    if isinstance(value, str):
        return value
    messages = _messages(value, column)
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"expected {column} to end before the assistant's turn, got it as the last message; "
            "put that turn in completion, or name the column messages"
        )
    return messages


def _split(messages: list[Message]) -> tuple[list[Message], str | None]:
    if messages[-1]["role"] != "assistant":
        return messages, None
    last = _text(messages[-1].get("content"), "the last assistant turn's content")
    if last is None or len(messages) == 1:
        raise ValueError(
            "expected a message before the last assistant turn and text in it, "
            f"got {len(messages)} messages; complete them"
        )
    more = [k for k, v in messages[-1].items() if k not in ("role", "content") and v is not None]
    if more:
        raise ValueError(
            f"expected role and content alone in the last assistant turn, got {short(more[0])} too, which "
            "would be lost; put the whole answer into content"
        )
    return messages[:-1], last


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else _kind(value)
        raise ValueError(
            f"expected {column} to be {'text or ' * (column != 'messages')}a list of messages such "
            f'as {{"role": "user", "content": "…"}}, got {got}'
        )
    for i, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        if type(role) is not str:
            raise ValueError(
                f"expected {column}[{i}] to be an object with a role, got "
                f'{json.dumps(message, ensure_ascii=False)[:80]}; add "role"'
            )
        if type(message.get("content")) not in (str, list, type(None)):
            raise ValueError(
                f"expected {column}[{i}] to have text as content, got {_kind(message['content'])}; "
                "put it in quotes"
            )
    return value


def _text(value: Any, column: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"expected {column} to be text, got {_kind(value)}; put it in quotes")


def _kind(value: Any) -> str:
    """What a value is in JSON's own words, with the value where it is short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return json.dumps(value, ensure_ascii=False)[:80]
