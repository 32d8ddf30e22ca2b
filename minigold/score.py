# SPDX-License-Identifier: Apache-2.0
"""Completions in, a file of what the teacher says of them out; and that file as a teacher.

A file is read by a teacher once, and a student trains on it as often as one likes, without the
teacher. It is a safetensors file of N completions end to end, T tokens and M = T + N places in all:

    prompt_ids, prompt_ends    int32; int64 [N], where each prompt ends in it
    ids, ends                  int32 [T]; int64 [N]
    logp                       float32 [M], of each token and of the end of turn after it
    top_ids, top_logp          int32 and float32 [M, K], the listed tokens; -inf fills rows up
    lines                      uint8, what was scored, as JSON lines

Its metadata says whose it is, by which tokenizer, and a hash of all that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minigold.batch import Array
from minigold.carry import Reading
from minigold.chat import prompt_ids
from minigold.config import Config
from minigold.data import Prompt, short, write_whole
from minigold.load import load_speaker, resolve
from minigold.offsets import encode_continuation
from minigold.pair import Pair
from minigold.rollout import sample_answers
from minigold.teacher import Told
from minigold.tiers import Teller

__all__ = ["KeptTeacher", "check_kept", "open_scores", "score_file"]

FORMAT = "minigold scores 1"
AT_ONCE = 64  # completions between two lines of progress
Key = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class KeptTeacher(Teller):
    """What a teacher said once, of the completions in a file and of no others.

    Args:
        told: by the ids of prompt and completion.
        sha256: of the file's contents.
    """

    told: dict[Key, Told]
    sha256: str

    def tell(self, readings: Sequence[Reading], *, micro_batch: int) -> list[Told]:  # noqa: ARG002
        """What was said of them.

        Raises:
            ValueError: one of them is not in the file.
        """
        return [self._find(one) for one in readings]

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "teacher_scores_sha256": self.sha256}

    def _find(self, reading: Reading) -> Told:
        prompt, ids = tuple(reading.prompt_ids), tuple(reading.ids)
        found = self.told.get((prompt, ids))
        if found is None:
            text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
            raise ValueError(
                f"expected completions that are in the scores of {self.name}, got {text[:60]!r} after "
                f"a prompt of {len(prompt)} tokens, which was not scored; score the file that you "
                "train on, with the same prompts, templates and --teacher-plain"
            )
        return found


def score_file(
    teacher: Teller,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    plain: bool,
    micro_batch: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> int:
    """Lets the teacher read each completion, and keeps what it says.

    Args:
        plain: it reads prompts as they are, without a template.
        on_batch: is told how many completions are done.

    Returns:
        How many different ones there are.

    Raises:
        ValueError: no line, one without a completion, or one that the teacher cannot read.
        OSError: the file cannot be written, or a server does not come back.
    """
    if not prompts:
        raise ValueError("expected at least one completion to score, got none; add lines")
    readings: dict[Key, Reading] = {}
    for prompt in prompts:
        one = _reading(teacher, prompt, plain=plain)
        readings[tuple(one.prompt_ids), tuple(one.ids)] = one
    told: list[Told] = []
    every = list(readings.values())
    for start in range(0, len(every), AT_ONCE):
        some = every[start : start + AT_ONCE]
        teacher.check_lengths(some)
        told += teacher.tell(some, micro_batch=micro_batch)
        if on_batch is not None:
            on_batch(len(told))
    arrays = _arrays(every, told, prompts)
    metadata = {
        "format": FORMAT,
        "teacher": teacher.name,
        "end_id": str(teacher.end_id),
        "n_tokens": str(teacher.n_tokens),
        "top_k": str(teacher.top_k),
        "facts": json.dumps(teacher.facts),
        "plain": json.dumps(plain),
    }
    metadata["sha256"] = _digest(metadata, arrays)
    write_whole(out, save(arrays, metadata=metadata))
    return len(every)


def _reading(teacher: Teller, prompt: Prompt, *, plain: bool) -> Reading:
    if prompt.completion is None:
        raise ValueError(f"line {prompt.line}: expected a `completion` to score, got none; add it")
    read = prompt.prompt if prompt.teacher_prompt is None else prompt.teacher_prompt
    try:
        own = prompt_ids(teacher, read, plain=plain)
    except ValueError as error:
        raise ValueError(f"line {prompt.line}: {error}") from error
    return Reading(own, encode_continuation(teacher.tokenizer, prompt.completion)[0])


def _arrays(
    readings: Sequence[Reading], told: Sequence[Told], prompts: Sequence[Prompt]
) -> dict[str, Array]:
    most = max(one.id_MK.shape[1] for one in told)

    def filled(part: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(part, (0, most - part.shape[1]), value=value)

    lines = [
        json.dumps(
            {"prompt": p.prompt, "teacher_prompt": p.teacher_prompt, "completion": p.completion}
        )
        for p in prompts
    ]
    return {
        "prompt_ids": np.concatenate(
            [np.array(one.prompt_ids, dtype=np.int32) for one in readings]
        ),
        "prompt_ends": np.cumsum([len(one.prompt_ids) for one in readings], dtype=np.int64),
        "ids": np.concatenate([np.array(one.ids, dtype=np.int32) for one in readings]),
        "ends": np.cumsum([len(one.ids) for one in readings], dtype=np.int64),
        "logp": torch.cat([one.logp_M for one in told]).float().numpy(),
        "top_ids": torch.cat([filled(one.id_MK, 0) for one in told]).int().numpy(),
        "top_logp": torch.cat([filled(one.logp_MK, -math.inf) for one in told]).float().numpy(),
        "lines": np.frombuffer("\n".join(lines).encode(), dtype=np.uint8),
    }


def _digest(metadata: dict[str, str], arrays: dict[str, Array]) -> str:
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        one = arrays[name]
        found.update(f"{name} {one.dtype} {one.shape}".encode() + one.tobytes())
    return found.hexdigest()


def open_scores(path: Path, tokenizer: str | Path) -> KeptTeacher:
    """The teacher whose scores a file holds.

    Args:
        tokenizer: its folder or hub name; weights are not read.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file that is torn or no file of scores, or of another tokenizer.
    """
    metadata, arrays = _read(path)
    folder = resolve(tokenizer, weights=False)
    try:
        name, end_id = metadata["teacher"], int(metadata["end_id"])
        rows, top_k = int(metadata["n_tokens"]), int(metadata["top_k"])
        theirs = str(json.loads(metadata["facts"])["teacher_tokenizer_sha256"])
        told = dict(_told(arrays))
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected scores in {path}, got {short(error)}; score it again"
        ) from error
    speaker = load_speaker(name, folder, rows=rows, context=2**31)
    teacher = KeptTeacher(**vars(speaker), top_k=top_k, told=told, sha256=metadata["sha256"])
    ours = teacher.facts["teacher_tokenizer_sha256"]
    if ours != theirs or end_id != teacher.end_id:
        raise ValueError(
            f"expected the tokenizer and end of turn by which {path} was scored (sha256 "
            f"{theirs[:12]}, id {end_id}), got those of {folder} ({ours[:12]}, id "
            f"{teacher.end_id}); name the folder of the teacher that scored it (--teacher-tokenizer)"
        )
    return teacher


def _read(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of scores, found no {path}; check the path")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"expected a whole file of scores in {path}, got {short(str(error))}; score it again"
        ) from error
    sha256 = metadata.pop("sha256", "")
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"expected {FORMAT!r} in {path}, got {short(metadata.get('format'))}; give a file that "
            "minigold score wrote"
        )
    if _digest(metadata, arrays) != sha256:
        raise ValueError(f"expected {path} as it was written, got other contents; score it again")
    return {**metadata, "sha256": sha256}, arrays


def _told(arrays: dict[str, Array]) -> Iterator[tuple[Key, Told]]:
    ends = arrays["prompt_ends"].tolist(), arrays["ends"].tolist()
    starts = [[0, *one[:-1]] for one in ends]
    n_places = len(arrays["ids"]) + len(arrays["ends"])
    sizes = {name: len(arrays[name]) for name in ("logp", "top_ids", "top_logp")}
    if set(sizes.values()) != {n_places}:
        raise ValueError(f"rows {sizes} for {n_places} places")
    logp_M, top_logp_MK = (torch.from_numpy(arrays[x]).double() for x in ("logp", "top_logp"))
    top_id_MK = torch.from_numpy(arrays["top_ids"]).long()
    for n, (p0, p1, t0, t1) in enumerate(zip(starts[0], ends[0], starts[1], ends[1], strict=True)):
        key = tuple(arrays["prompt_ids"][p0:p1].tolist()), tuple(arrays["ids"][t0:t1].tolist())
        rows = slice(t0 + n, t1 + n + 1)
        yield key, Told(logp_M[rows], top_id_MK[rows], top_logp_MK[rows])


def check_kept(
    pair: Pair, prompts: Sequence[Prompt], config: Config, *, eval_prompts: Sequence[Prompt] = ()
) -> None:
    """Refuses a run that would need more than the file of scores has, if that is the teacher.

    Raises:
        ValueError: answers that the student would sample, or completions that were not scored.
    """
    if not isinstance(pair.teacher, KeptTeacher):
        return
    if config.lmbda > 0:
        raise ValueError(
            f"expected --lmbda 0 with scores as --teacher, got {config.lmbda}: what the student "
            "samples was not scored; give --lmbda 0, or the teacher itself"
        )
    if eval_prompts:
        raise ValueError(
            "expected no --eval-prompts with scores as --teacher, got some: evaluation reads samples "
            "of the student; evaluate checkpoints with minigold eval and the teacher itself"
        )
    once = replace(config, rollouts=1)
    for prompt in prompts:
        if prompt.completion is None:
            raise ValueError(
                f"prompt of line {prompt.line}: expected a `completion` with scores as --teacher, "
                "got none; leave the line out, or add what was scored"
            )
        (answer,), _ = sample_answers(pair, [prompt], once, number=0)
        try:
            pair.teacher.tell([answer.reading(pair.events)], micro_batch=1)
        except ValueError as error:
            raise ValueError(f"prompt of line {prompt.line}: {error}") from error
