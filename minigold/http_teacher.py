# SPDX-License-Identifier: Apache-2.0
"""A server's address in, a teacher out: stock vLLM (`/v1/completions`) or SGLang (`/generate`).

The teacher's own tokens are sent as ids, so that nothing is cut twice; the log-probabilities of the
prompt come back. A folder with the same tokenizer says what the tokens are. Every answer is checked
before anything is trained on it, and so is, before each step, that the server still is the one that
it was at the start. This file knows the two formats; `wire.py` moves bytes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minigold.carry import Reading
from minigold.data import own_file, read_object
from minigold.load import Speaker, load_speaker, resolve
from minigold.teacher import Told
from minigold.tiers import DRIFT, Teller, drifted
from minigold.wire import ServerError, Wire, wire_to

__all__ = ["HTTPTeacher", "is_address", "open_server"]

log = logging.getLogger("minigold")
PROBE = "The fox's 12 internals:\n  x = [a, b];\tnaïve 你好 🙂"
SLACK = 1e-3  # by which rounding lifts a log-probability over 0, or a sum of probabilities over 1
STAND_IN = -9000.0  # below it stands what JSON cannot say: vLLM writes -9999 for -inf
ENTRY = 1024  # bytes of one token in an answer, at most
LONGEST = 10**6  # seconds of a time-out: a socket's ends after 2**31 ms
INFO = 2**22  # bytes of an answer that is no list of tokens

Place = dict[int, float]  # log-probabilities by id


@dataclass(frozen=True)
class HTTPTeacher(Teller):
    """A model that another process serves.

    Args:
        wire: the way to it.
        kind: a key of `KINDS`.
        known: what it said of the probe at the start.
    """

    wire: Wire
    kind: str
    known: tuple[float, ...] = ()

    def tell(self, readings: Sequence[Reading], *, micro_batch: int) -> list[Told]:  # noqa: ARG002
        """One request a completion, `wire.connections` at a time.

        Raises:
            ServerError: the server does not come back, or does not answer what was asked.
        """
        self.wire.stopped.clear()
        self._check_same()
        self.wire.troubled.clear()
        told = self.wire.together(
            [partial(self._ask, one.prompt_ids, [*one.ids, self.end_id]) for one in readings]
        )
        if self.wire.troubled.is_set():
            self._check_same()
        return told

    @property
    def facts(self) -> dict[str, Any]:
        said = [round(x, 4) for x in self.known]
        return {**super().facts, "teacher_server": self.kind, "teacher_probe": said}

    def places(
        self, prompt_ids: Sequence[int], ids: Sequence[int], *, patience: float | None = None
    ) -> list[Place]:
        """What the server lists in the place of each of `ids`, the token itself among it."""
        ask, read = KINDS[self.kind]
        whole = [*prompt_ids, *ids]
        path, body = ask(self.name, whole, len(prompt_ids) - 1, self.top_k)
        most = INFO + len(whole) * (self.top_k + 2) * ENTRY
        answer = self.wire.ask(path, body, most=most, patience=patience)
        try:
            found = read(answer, whole, len(prompt_ids) - 1, self.n_tokens - 1)
            return [_checked(place, i) for place, i in zip(found, ids, strict=True)]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = (
                str(error) if isinstance(error, _MisfitError) else f"{type(error).__name__} {error}"
            )
            raise ServerError(
                f"expected log-probabilities of {len(whole)} given tokens from {self.wire.url}{path}, "
                f"got {reason}; nothing was trained on it"
            ) from error

    def _ask(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Told:
        places = self.places(prompt_ids, ids)
        for n, (place, i) in enumerate(zip(places, ids, strict=True)):
            reason = _other_length(place, i, self.top_k)
            if reason:
                raise ServerError(
                    f"expected {self.top_k} listed tokens from {self.wire.url} in the place of each, "
                    f"got {reason} in that of token {n} of the answer; nothing was trained on it"
                )
        return told_of(places, ids, top_k=self.top_k)

    def probe(self, *, patience: float | None = None) -> tuple[list[int], list[Place]]:
        """The probe's ids, and what is listed in the place of each but the first."""
        ids = [i for i in _probe_ids(self) if i < self.n_tokens]
        return ids, self.places(ids[:1], ids[1:], patience=patience)

    def _check_same(self) -> None:
        """The server says of the probe what it said at the start."""
        ids, places = self.probe()
        now = [place[i] for place, i in zip(places, ids[1:], strict=True)]
        drift = drifted(self.known, now)
        if not drift <= DRIFT:
            raise ServerError(
                f"expected {self.wire.url} to serve the model that it served at the start, got "
                f"log-probabilities that are {drift:.3f} nats off a token; nothing was trained on "
                "it; serve the same model, and go on with --resume"
            )


def told_of(places: Sequence[Place], ids: Sequence[int], *, top_k: int) -> Told:
    """Plain data of what a server listed."""
    logp_M = torch.tensor([min(place[i], 0.0) for place, i in zip(places, ids, strict=True)])
    if not top_k:
        return Told(logp_M.double(), torch.zeros(len(ids), 0).long(), torch.zeros(len(ids), 0))
    most = max(map(len, places))
    rows = [sorted(place.items(), key=lambda one: -one[1]) for place in places]
    filled = [row + [(0, -math.inf)] * (most - len(row)) for row in rows]
    id_MK = torch.tensor([[i for i, _ in row] for row in filled])
    logp_MK = torch.tensor([[min(x, 0.0) for _, x in row] for row in filled], dtype=torch.float64)
    return Told(logp_M.double(), id_MK, logp_MK)


def is_address(name: str) -> bool:
    """Whether a teacher's name is the address of a server."""
    return name.startswith(("http://", "https://"))


def open_server(
    url: str,
    tokenizer: str | Path,
    *,
    top_k: int = 20,
    model: str = "",
    timeout: float = 300.0,
    patience: float = 600.0,
    connections: int = 8,
) -> HTTPTeacher:
    """Finds out what the server is, and how much it says.

    Args:
        url: `http://host:port`; with `/v1` it is taken for vLLM, with `/generate` for SGLang.
        tokenizer: folder or hub name of the model that is served; its weights are not read.
        top_k: tokens to list, 0 for none.
        model: by which name it is served, where there are several.
        timeout, patience, connections: see `wire.Wire`.

    Raises:
        ValueError: an address that is none, a folder that does not fit, or a setting out of range.
        ServerError: no server there, or none that can be a teacher.
    """
    for name, value, least in (
        ("--teacher-top-k", top_k, 0), ("--teacher-connections", connections, 1),
        ("--teacher-patience", patience, 0), ("--teacher-timeout", timeout, 1),
    ):  # fmt: skip
        if not least <= value < math.inf:
            raise ValueError(f"expected {name} at least {least}, got {value}")
    if timeout > LONGEST:
        raise ValueError(f"expected --teacher-timeout at most {LONGEST:,}, got {timeout}")
    wire, kind = _wire_and_kind(url, timeout, patience, connections)
    if not kind:
        kind = _kind_of(wire)
    name, context = _model_of(wire, model)
    folder = resolve(tokenizer, weights=False)
    own, rows = _config_of(folder)
    speaker = load_speaker(name, folder, rows=rows, context=min(context, own))
    # both need room for the end of turn; vLLM writes a token after it
    room = replace(speaker, context=speaker.context - 1)
    teacher = HTTPTeacher(**vars(room), top_k=top_k, wire=wire, kind=kind)
    _check_tokenizer(teacher)
    ids, places = teacher.probe(patience=0)
    known = tuple(place[i] for place, i in zip(places, ids[1:], strict=True))
    return replace(teacher, top_k=_listed(teacher, ids[1:], places), known=known)


# -- what the server is --------------------------------------------------------------------------


def _wire_and_kind(url: str, timeout: float, patience: float, connections: int) -> tuple[Wire, str]:
    """With the kind that the path names, if it names one."""
    key = os.environ.get("MINIGOLD_TEACHER_KEY", "")
    wire = wire_to(url, timeout=timeout, patience=patience, connections=connections, key=key)
    for end, kind in (("/v1/completions", "vllm"), ("/v1", "vllm"), ("/generate", "sglang")):
        if wire.prefix.endswith(end):
            return replace(wire, prefix=wire.prefix.removesuffix(end)), kind
    return wire, ""


def _models(wire: Wire) -> list[dict[str, Any]]:
    answer = wire.ask("/v1/models", most=INFO, patience=0)
    found = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(x, dict) for x in found):
        raise ServerError(
            f"expected a list of models at {wire.url}/v1/models, got {str(answer)[:100]}; check that "
            "it is a server of vLLM or SGLang"
        )
    return found


def _kind_of(wire: Wire) -> str:
    owner = str(_models(wire)[0].get("owned_by"))
    if owner not in KINDS:
        raise ServerError(
            f"expected a server of vLLM or SGLang at {wire.url}, got one whose models are owned by "
            f"{owner!r}; if it speaks as one of them, say which: {wire.url}/v1 or {wire.url}/generate"
        )
    return owner


def _model_of(wire: Wire, asked: str) -> tuple[str, int]:
    """The name that it is served by, and its context."""
    found = {str(one.get("id")): one for one in _models(wire)}
    roots = [name for name, one in found.items() if not one.get("parent")]  # others are adapters
    if asked not in found if asked else len(roots) != 1:
        raise ValueError(
            f"expected --teacher-model to be one of {', '.join(found)}, got {asked or 'none'}; "
            "name the one that is the teacher"
        )
    name = asked or roots[0]
    context = found[name].get("max_model_len")
    return name, context if isinstance(context, int) and context > 1 else 2**31


def _config_of(folder: Path) -> tuple[int, int]:
    """The context and the embedding's rows that config.json names, if it does."""
    path = own_file(folder, "config.json")
    config = read_object(path) if path.is_file() else {}
    inner = config.get("text_config")
    config |= inner if isinstance(inner, dict) else {}
    context, rows = config.get("max_position_embeddings"), config.get("vocab_size")
    found = [x if isinstance(x, int) and x > 0 else 2**31 for x in (context, rows)]
    return found[0], found[1]


def _probe_ids(speaker: Speaker) -> list[int]:
    ids: list[int] = speaker.tokenizer.encode(PROBE, add_special_tokens=False).ids
    return ids


def _check_tokenizer(teacher: HTTPTeacher) -> None:
    """The server cuts the probe's text as the local tokenizer does."""
    ask, _ = KINDS[teacher.kind]
    path, body = ask(teacher.name, PROBE, 0, 0)
    answer = teacher.wire.ask(path, body, most=INFO, patience=0)
    try:
        theirs = list(map(int, _echoed(answer)))
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ServerError(
            f"expected {teacher.wire.url}{path} to say log-probabilities of a prompt, got "
            f"{type(error).__name__} {error} in {str(answer)[:200]}; it cannot be a teacher"
        ) from error
    ours = _probe_ids(teacher)
    same = theirs in (ours, ours[1:]) or theirs[1:] == ours  # a BOS may stand before them
    if not same:
        raise ServerError(
            f"expected {teacher.wire.url} to cut text into the tokens of {teacher.folder}, got "
            f"{theirs} for {ours}; name the folder of the model that is served (--teacher-tokenizer)"
        )


def _echoed(answer: Any) -> list[Any]:
    """The ids of a prompt that was sent as text; vLLM's first one may be missing."""
    if "meta_info" in answer:
        return [triple[1] for triple in answer["meta_info"]["input_token_logprobs"]]
    places = answer["choices"][0]["prompt_logprobs"]
    return [next(iter(place)) for place in places[1:]]


def _listed(teacher: HTTPTeacher, ids: Sequence[int], places: Sequence[Place]) -> int:
    """How many tokens the server lists in each place, of those that were asked for."""
    sizes = {len(place) for place in places}
    if teacher.top_k and sizes == {1}:
        log.warning(
            "%s lists no tokens, although --teacher-top-k is %d", teacher.wire.url, teacher.top_k
        )
        return 0
    size = min(sizes)
    if len(sizes) == 1 and teacher.n_tokens <= size < teacher.top_k:
        return size  # all that there are
    for place, i in zip(places, ids, strict=True):
        reason = _other_length(place, i, teacher.top_k)
        if reason:
            raise ServerError(
                f"expected {teacher.top_k} listed tokens from {teacher.wire.url} in the place of "
                f"each, got {reason}; lower --teacher-top-k"
            )
    return teacher.top_k


# -- what it answers -----------------------------------------------------------------------------


class _MisfitError(ValueError):
    """An answer to something else."""


def _checked(place: Place, i: int) -> Place:
    """Log-probabilities that are some, of the likeliest tokens and of token `i`."""
    if i not in place:
        raise _MisfitError(f"no log-probability of the given token {i}, but of {sorted(place)[:5]}")
    bad = [x for x in place.values() if type(x) not in (float, int) or not -1e9 < x <= SLACK]
    if bad:
        raise _MisfitError(f"a log-probability of {str(bad[0])[:40]}")
    if place[i] < STAND_IN:
        raise _MisfitError(f"a log-probability of {place[i]}, which stands for -inf or NaN")
    total = sum(map(math.exp, place.values()))
    if total > 1 + SLACK:
        raise _MisfitError(f"probabilities that add up to {total:.4f}")
    if any(j < 0 for j in place):
        raise _MisfitError(f"a token {min(place)}")
    return place


def _other_length(place: Place, i: int, top_k: int) -> str:
    """What is wrong with the number of listed tokens; "" if nothing is.

    There are `top_k`, and one more where the given token is none of them: then it is the least.
    """
    n = len(place)
    if n == max(top_k, 1):
        return ""
    if not top_k or n != top_k + 1:
        return f"{n} tokens"
    least = min(x for j, x in place.items() if j != i)
    return "" if place[i] <= least + SLACK else f"{n} tokens, the given one not the least of them"


def _ask_vllm(name: str, prompt: Any, start: int, top_k: int) -> tuple[str, dict[str, Any]]:  # noqa: ARG001
    return "/v1/completions", {
        "model": name, "prompt": prompt, "prompt_logprobs": top_k, "max_tokens": 1,
        "add_special_tokens": False, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "stream": False,
    }  # fmt: skip


def _read_vllm(answer: Any, ids: Sequence[int], start: int, last: int) -> list[Place]:  # noqa: ARG001
    (choice,) = answer["choices"]
    places = choice["prompt_logprobs"]
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != list(ids):
        raise _MisfitError("other tokens than were given")
    if not isinstance(places, list) or len(places) != len(ids) or places[0] is not None:
        raise _MisfitError(f"{_size(places)} places for {len(ids)} tokens, the first of them empty")
    found = []
    for place, i in zip(places[1:], ids[1:], strict=True):
        if str(i) not in place:
            raise _MisfitError(f"no log-probability of the given token {i}, but of {[*place][:5]}")
        found.append(place)
    return [{int(key): value["logprob"] for key, value in place.items()} for place in found[start:]]


def _ask_sglang(name: str, prompt: Any, start: int, top_k: int) -> tuple[str, dict[str, Any]]:  # noqa: ARG001
    return "/generate", {
        "text" if isinstance(prompt, str) else "input_ids": prompt,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True, "logprob_start_len": start, "top_logprobs_num": top_k,
        "stream": False,
    }  # fmt: skip


def _read_sglang(answer: Any, ids: Sequence[int], start: int, last: int) -> list[Place]:
    meta = answer["meta_info"]
    given, tops = meta["input_token_logprobs"], meta.get("input_top_logprobs")
    wanted = list(ids[start:])
    if _size(given) != len(wanted):
        raise _MisfitError(f"{_size(given)} places for {len(wanted)} tokens")
    # it writes 0 for the last id of a vocabulary
    pairs = zip(wanted, (one[1] for one in given), strict=True)
    if any(i != echoed and not (echoed == 0 and i == last) for i, echoed in pairs):
        raise _MisfitError("other tokens than were given")
    places = [{i: one[0]} for i, one in zip(wanted[1:], given[1:], strict=True)]
    if tops:
        if _size(tops) != len(wanted):
            raise _MisfitError(f"{_size(tops)} lists for {len(wanted)} tokens")
        for place, listed in zip(places, tops[1:], strict=True):
            top = {int(one[1]): one[0] for one in listed}
            if not len(top) == len(listed) == len(tops[1]):
                raise _MisfitError("a list with a token twice, or of another length")
            if any(_differ(top.get(i, x), x) for i, x in place.items()):
                raise _MisfitError("two log-probabilities of one token")
            place |= {**top, **place}
    return places


def _differ(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and abs(a - b) > SLACK


def _size(value: Any) -> int:
    return len(value) if isinstance(value, list) else -1


KINDS: dict[str, tuple[Callable[..., tuple[str, dict[str, Any]]], Callable[..., list[Place]]]] = {
    "vllm": (_ask_vllm, _read_vllm),
    "sglang": (_ask_sglang, _read_sglang),
}
