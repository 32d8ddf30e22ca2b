# SPDX-License-Identifier: Apache-2.0
"""Two models in, the events between them out: their tokenizers probed, matched, and remembered.

Where it stands: at the start of a run, before `rollout.py`. A student whose tokens do not say what
the text was is refused here; what a teacher's tokenizer loses is named. Large vocabularies are
matched once, and what that took is kept in `MINIGOLD_CACHE` or `~/.cache/minigold`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tokenizers import Tokenizer

from minigold import offsets
from minigold.data import write_whole
from minigold.events import Events, match
from minigold.load import LanguageModel, no_panic
from minigold.offsets import (
    EXACT,
    UNKNOWN,
    Vocabulary,
    encode_continuation,
    first_pieces,
    spans_of_text,
    text_of_ids,
    vocabulary,
)
from minigold.tiers import Teacher

__all__ = ["Pair", "cache_folder", "check_student", "lost_text", "make_pair", "matched"]

log = logging.getLogger("minigold")

PLAIN = {  # a student must write these as they are, as far as it has tokens for them
    "letters": "abcDEF",
    "digits": "0123456789",
    "punctuation": "it's(a),b.c;[d]={e}",
    "spaces": "a b c",
    "runs of spaces": "a  b    c",
    "line breaks": "a\nb\n\n  c",
    "tabs": "a\tb",
}
OTHER = {
    "accents": "é Å ñ ü ç",
    "combining accents": "e\u0301 n\u0303",
    "compatibility characters": "ﬁ ½ Ｔ ²",
    "other alphabets": "Привет Ελλάς שלום سلام नमस्ते สวัสดี",
    "Chinese, Japanese, Korean": "你好 かな カナ 한국",
    "emoji": "🙂 👍🏽 👩‍👩‍👧",
    "control characters": "a\x00b\x1bc",
}
ROLES = ("text", "special", "unknown", "end", "none")
UNREADABLE = (  # the last two where numpy has no such type: bfloat16, float8
    OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError,
)  # fmt: skip
KEEP_FROM = 50_000  # ids of both sides together; fewer are matched in a blink


@dataclass(frozen=True)
class Pair:
    """Both models, and the events between their vocabularies (on the student's device)."""

    student: LanguageModel
    teacher: Teacher
    events: Events


def make_pair(student: LanguageModel, teacher: Teacher, *, events: str = "prefix") -> Pair:
    """Probes both tokenizers and matches their vocabularies; `events` is a kind of `events.match`.

    Raises:
        ValueError: see `check_student` and `events.match`.
    """
    with no_panic(f"the student {student.name}"):
        check_student(student.tokenizer)
    with no_panic(f"the teacher {teacher.name}"):
        lost = lost_text(teacher.tokenizer)
    if lost:
        log.info("chunks with text that the teacher cannot read exactly are not scored: %s",
                 ", ".join(lost))  # fmt: skip
    sides = (student.tokenizer, [student.end_id], student.n_tokens), (
        teacher.tokenizer, teacher.eos_ids, teacher.n_tokens,
    )  # fmt: skip
    found = match(*matched(*sides), kind=events, stops=student.eos_ids)
    return Pair(student, teacher, found.to(student.decoder.device))


# -- probes --------------------------------------------------------------------------------------


def check_student(tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer whose ids do not say what the text was, so that it cannot be a student.

    The probe is plain text: letters of both cases, digits, punctuation, spaces, line breaks, tabs.
    Characters without a token may be missing (a student never writes them), but what has one must
    come back as it was. Lowercase, spaces run together or put around punctuation do not.

    Raises:
        ValueError: it writes another text or none of it, or its decoder is not supported.
    """
    tokens = set(vocabulary(tokenizer).token_bytes)

    def written(text: str) -> str:
        return text_of_ids(tokenizer, encode_continuation(tokenizer, text)[0])

    if not any(map(written, PLAIN.values())):
        raise ValueError(
            "expected a student that can write plain text, got a tokenizer that knows no word of "
            f"{list(PLAIN.values())}; it can only be the teacher's"
        )
    for kind, text in PLAIN.items():
        known = "".join(c for c in text if c.encode() in tokens or written(c))
        is_unknown = {UNKNOWN} == set(spans_of_text(tokenizer, text)[:, 2].tolist())
        if written(text) not in (text, known) and not is_unknown:
            raise ValueError(
                f"expected a student whose tokens say what the text was, got a tokenizer that "
                f"writes {text!r} as {written(text)!r} ({kind}): the teacher would read another "
                "text than the student meant; such a tokenizer can only be the teacher's"
            )


def lost_text(tokenizer: Tokenizer) -> list[str]:
    """Kinds of text (keys of `PLAIN` and `OTHER`) that the tokenizer does not read exactly."""

    def is_exact(text: str) -> bool:
        start, end, flaw = spans_of_text(tokenizer, text).T
        bounds = [0, *end.tolist()]
        return bool((flaw == EXACT).all()) and bounds == [*start.tolist(), len(text.encode())]

    return [kind for kind, text in {**PLAIN, **OTHER}.items() if not is_exact(text)]


# -- vocabularies --------------------------------------------------------------------------------

Side = tuple[Tokenizer, Sequence[int], int]  # tokenizer, ids that end a turn, number of ids
Arrays = dict[str, npt.NDArray[Any]]


def matched(student: Side, teacher: Side) -> tuple[Vocabulary, Vocabulary]:
    """Both vocabularies with the first pieces of each for the strings of the other, and for their rests.

    Large ones are read from the cache if the same two were matched before with these versions.
    """
    if student[2] + teacher[2] < KEEP_FROM:
        return _matched(student, teacher)
    key = _key(student, teacher)
    try:
        path = cache_folder() / f"vocabularies-{key}.safetensors"
    except RuntimeError as error:  # no home folder
        log.warning("the matched vocabularies are not kept: %s; set MINIGOLD_CACHE", error)
        return _matched(student, teacher)
    try:
        return _restored(_read(path, key))
    except FileNotFoundError:
        pass
    except UNREADABLE as error:
        log.warning("expected two vocabularies in %s, got %s; they are matched anew", path, error)
    both = _matched(student, teacher)
    try:
        _save(path, key, both)
    except (OSError, ValueError) as error:
        log.warning("the matched vocabularies are not kept: %s; set MINIGOLD_CACHE", error)
    return both


def cache_folder() -> Path:
    """`MINIGOLD_CACHE`, else `~/.cache/minigold`."""
    return Path(os.environ.get("MINIGOLD_CACHE") or Path.home() / ".cache" / "minigold")


def _matched(student: Side, teacher: Side) -> tuple[Vocabulary, Vocabulary]:
    ours, theirs = (vocabulary(t, end_ids=ends, size=n) for t, ends, n in (student, teacher))
    spelled = set(ours.token_bytes), set(theirs.token_bytes)

    def pieces(tokenizer: Tokenizer, own: set[bytes], other: set[bytes]) -> dict[bytes, bytes]:
        """Of the other's tokens, also without a space, and of what a first piece leaves, and so on."""
        found: dict[bytes, bytes] = {}
        words = {text.removeprefix(b" ") for text in other}  # behind a space that stands by itself
        asked, wanted = own | {b""}, (other | words) - own - {b""}
        while wanted:
            new = first_pieces(tokenizer, wanted)
            new = {
                text: first for text, first in new.items() if first in own
            }  # else it ends a turn
            asked |= wanted
            found |= new
            wanted = {text[len(first) :] for text, first in new.items()} - asked
        return found

    return (
        replace(ours, first_pieces=pieces(student[0], *spelled)),
        replace(theirs, first_pieces=pieces(teacher[0], *spelled[::-1])),
    )


def _key(student: Side, teacher: Side) -> str:
    """Of all that the result depends on, the code that reads tokenizers included."""
    found = hashlib.sha256(tokenizers.__version__.encode())
    for file in (offsets.__file__, __file__):
        found.update(Path(file).read_bytes())
    for tokenizer, end_ids, size in (student, teacher):
        found.update(json.dumps([list(end_ids), size]).encode())
        found.update(hashlib.sha256(tokenizer.to_str().encode()).digest())
    return found.hexdigest()[:32]


def _digest(key: str, arrays: Arrays) -> str:
    found = hashlib.sha256(key.encode())
    for name in sorted(arrays):
        one = arrays[name]
        found.update(f"{name} {one.dtype} {one.shape}".encode() + one.tobytes())
    return found.hexdigest()


def _read(path: Path, key: str) -> Arrays:
    """The arrays of a file, if they are what was saved under this key."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (file.metadata() or {}).get("sha256") != _digest(key, arrays):
            raise ValueError("other contents than were saved")
    return arrays


def _save(path: Path, key: str, both: tuple[Vocabulary, Vocabulary]) -> None:
    arrays: Arrays = {}
    for name, one in zip(("student", "teacher"), both, strict=True):
        own_id = {text: i for i, text in enumerate(one.token_bytes)}
        arrays |= {
            **_joined(f"{name}.tokens", one.token_bytes),
            **_joined(f"{name}.texts", list(one.first_pieces)),
            f"{name}.firsts": np.array(
                [own_id[first] for first in one.first_pieces.values()], dtype=np.int64
            ),
            f"{name}.roles": np.array([ROLES.index(role) for role in one.roles], dtype=np.uint8),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(arrays, metadata={"sha256": _digest(key, arrays)}))


def _joined(name: str, texts: Sequence[bytes]) -> Arrays:
    return {
        f"{name}.bytes": np.frombuffer(b"".join(texts), dtype=np.uint8),
        f"{name}.ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
    }


def _split(name: str, arrays: Arrays) -> tuple[bytes, ...]:
    joined, ends = arrays[f"{name}.bytes"].tobytes(), arrays[f"{name}.ends"].tolist()
    return tuple(joined[i:j] for i, j in zip([0, *ends], ends, strict=False))


def _restored(arrays: Arrays) -> tuple[Vocabulary, Vocabulary]:
    def one(name: str) -> Vocabulary:
        spelled, texts = _split(f"{name}.tokens", arrays), _split(f"{name}.texts", arrays)
        firsts = [spelled[i] for i in arrays[f"{name}.firsts"].tolist()]
        roles = tuple(ROLES[role] for role in arrays[f"{name}.roles"].tolist())
        return Vocabulary(spelled, roles, dict(zip(texts, firsts, strict=True)))

    return one("student"), one("teacher")
