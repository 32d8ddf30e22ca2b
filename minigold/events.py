# SPDX-License-Identifier: Apache-2.0
"""Two vocabularies in, the events that both can express out.

At a boundary that both tokenizations share, both models predict what comes next after the same
bytes, over different vocabularies. A divergence needs one set of events: each side maps every
token to one event and adds up the probabilities (`Side.project`).

Three sets of events, see `match`. In the default one a token that only one side has goes to an
event that is shorter than itself. If the text then goes on from there, the rest of that token is a
prediction too: `Side.over` gives it at the next boundary. Here stand the maps, their use on a
distribution, and what they leave out (`measure`). This file does not compare the two sides;
`loss.py` does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["CHUNK", "EVENTS", "Events", "Measures", "Side", "Vocabulary", "match", "measure"]

EVENTS = ("prefix", "strict", "byte")  # of what comes next
KEPT = 2**15  # texts whose events, or those of their longer tokens, are kept
CHUNK = "chunk"  # no more than whether the observed chunk comes next

Ids = npt.NDArray[np.int64]  # of tokens, or of events; on the CPU


class Vocabulary(Protocol):
    """Plain data, as `offsets.vocabulary` makes it; the index is the token id."""

    @property
    def token_bytes(self) -> Sequence[bytes]: ...
    @property
    def roles(self) -> Sequence[str]: ...
    @property
    def first_pieces(self) -> Mapping[bytes, bytes]: ...


@dataclass(frozen=True)
class Side:
    """One side's map from token ids to events.

    Args:
        event_bytes: see `Events`.
        identity: the ids themselves are the events.
        end: the event of the end of turn.
        event_V: int64, the event of each id; `n_events` stands for *other*, that is no event.
        column_V: int64, the same as columns of `project`.
        shared_V: bool, ids that stand for their event by themselves (the end of turn included).
        kinds_V2: float32, 1 for shared ids; 1 for those without an event.
        spelling: the bytes of each id, b"" where it stands for no text.
        sorted_U: int64, the ids of text tokens in the order of their bytes.
        low_V, high_V: int64, the range in `sorted_U` whose bytes strictly extend those of an id.
        event_of: the event of any bytes.
        carries: see `Events.carries`.
        longest: bytes of the longest token.
        keys, order, event_of_id: the sorted spellings, their ids, and the event of each id, for `longer`.
        known: of texts, the events of what each longer token adds, as far as they were asked for.
    """

    event_bytes: tuple[bytes, ...] = field(repr=False)
    identity: bool
    end: int
    event_V: Tensor
    column_V: Tensor
    shared_V: Tensor
    kinds_V2: Tensor
    spelling: Sequence[bytes]
    sorted_U: Tensor
    low_V: Tensor
    high_V: Tensor
    event_of: Callable[[bytes], int]
    carries: bool
    longest: int
    keys: list[bytes] = field(repr=False)
    order: Ids = field(repr=False)
    event_of_id: Ids = field(repr=False)
    known: dict[bytes, Ids] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_events(self) -> int:
        return len(self.event_bytes)

    @property
    def end_ids(self) -> list[int]:
        """The ids that are the end of turn to the loss."""
        return (self.event_V == self.end).nonzero()[:, 0].tolist()

    def to(self, device: torch.device) -> Side:
        moved: dict[str, Any] = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)

    def project(self, prob_NV: Tensor, floor: float = 0.0) -> Tensor:
        """Adds up token probabilities by event.

        Args:
            prob_NV: float, rows that sum to 1; differentiable.
            floor: is added to each column.

        Returns:
            prob_NX: `n_events + 2` columns: the events, an empty column for the observed chunk,
            and *other*; rows sum to 1.

        Raises:
            ValueError: predictions over another number of ids.
        """
        n, v = prob_NV.shape
        if v != len(self.event_V):
            raise ValueError(
                f"expected predictions over {len(self.event_V)} ids, got {v}; leave out the embedding's "
                f"rows of padding, as in logits[..., :{len(self.event_V)}]"
            )
        if self.identity:
            return torch.nn.functional.pad(prob_NV, (0, 2)).add_(floor)
        floor_NX = prob_NV.new_full((n, self.n_events + 2), floor)
        return floor_NX.scatter_add_(1, self.column_V.expand(n, v), prob_NV)

    def spread(self, grad_NX: Tensor) -> Tensor:
        """What each token's event has, [N, V]: the derivative of `project`, transposed."""
        if self.identity:
            return grad_NX[:, :-2].clone()
        return grad_NX.index_select(1, self.column_V)

    def column(self, event_K: Tensor) -> Tensor:
        """Events as columns of `project`."""
        return event_K + (event_K == self.n_events)

    def longer(
        self, text: bytes, event: int | None, told: Sequence[tuple[int, int]] = (), spaces: int = 0
    ) -> tuple[Ids, Ids]:
        """Ids of the tokens that strictly extend `text`, and the event of what they add.

        With an `event` only tokens of this event: where a token of it was taken at a shared
        boundary, all others were told apart from it there.

        Args:
            told: the same for shared boundaries in the `text`: bytes from there to its end, and the
                event that was taken.
            spaces: tokens that add more spaces than this, and then anything, are left out; 0 for none.
        """
        low, high = _extensions(text, self.keys)
        if low == high:
            return self.order[:0], self.order[:0]
        ids, rests = self.order[low:high], self._rests(text, low, high)
        keep = np.ones(len(ids), dtype=bool) if event is None else self.event_of_id[ids] == event
        for size, taken in told:
            before = text[: len(text) - size]
            start, stop = _extensions(before, self.keys) if before else (0, len(self.keys))
            keep &= self._rests(before, start, stop)[low - start : high - start] == taken
        if spaces:
            more = text + b" " * (spaces + 1)
            keep[bisect_left(self.keys, more) - low : _extensions(more, self.keys)[1] - low] = False
        return ids[keep], rests[keep]

    def _rests(self, text: bytes, low: int, high: int) -> Ids:
        """The events of what is left of the keys from `low` to `high` after the `text`."""
        if text not in self.known:
            if len(self.known) >= KEPT:
                self.known.clear()
            rests = (self.event_of(key[len(text) :]) for key in self.keys[low:high])
            self.known[text] = np.fromiter(rests, np.int64, high - low)
        return self.known[text]

    def event_on(self, rest: bytes, more: bytes) -> int:
        """The event of a `rest` that goes on with a token `more`.

        Only a rest that ends in a space can be part of a longer event: three spaces and `return` go
        on with ` return` after the first two. Other words are cut alike, whatever follows them.
        """
        event = self.event_of(rest + more if rest.endswith(b" ") else rest)
        if event < self.n_events and len(self.event_bytes[event]) > len(rest):
            return event
        return self.event_of(rest)

    def goes_on(self, text: bytes) -> bool:
        """Whether a token strictly extends the text."""
        low, high = _extensions(text, self.keys)
        return low < high

    def fewest_spaces(self, text: bytes) -> int:
        """How many more spaces the shortest token has that is `text` and spaces; 0 if there is none."""
        low, high = _extensions(text, self.keys)
        high = bisect_right(self.keys, text + b" " * self.longest, lo=low, hi=high)
        spaced = (key for key in self.keys[low:high] if not key[len(text) :].strip(b" "))
        return min((len(key) - len(text) for key in spaced), default=0)

    def begins(self, text: bytes) -> list[int]:
        """Ids of the tokens that `text` begins with, itself among them."""
        found: list[int] = []
        for n in range(1, min(len(text), self.longest) + 1):
            low = bisect_left(self.keys, text[:n])
            high = bisect_right(self.keys, text[:n], lo=low)
            if low < high:
                found += self.order[low:high].tolist()
        return found

    def over(self, paths: Sequence[Sequence[tuple[int, bool]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that extend the taken ones: their mass is carried over the boundary after them.

        Args:
            paths: taken tokens up to the boundary, at least one; and whether each does not start at a
                shared boundary.

        Returns:
            path_J: int64, which of `paths` each extends as one token, non-decreasing.
            id_J: int64, the longer token.
            event_J: int64, the event of what it adds.
        """
        found = [self.longer(*self._taken(path)) for path in paths]
        path_J = np.repeat(np.arange(len(found)), [len(ids) for ids, _ in found])
        columns = (np.concatenate([self.order[:0], *(one[k] for one in found)]) for k in range(2))
        id_J, event_J = columns
        device = self.event_V.device
        return (
            torch.from_numpy(path_J).to(device), torch.from_numpy(id_J).to(device),
            torch.from_numpy(event_J).to(device),
        )  # fmt: skip

    def reaches_over(self, path: Sequence[tuple[int, bool]]) -> bool:
        """Whether `over` has tokens for one path."""
        return len(self.longer(*self._taken(path))[0]) > 0

    def _taken(
        self, path: Sequence[tuple[int, bool]]
    ) -> tuple[bytes, int | None, list[tuple[int, int]]]:
        """The text of some tokens, and what was told apart at their shared boundaries.

        None where one of them has no text, as an end of turn: no token is longer than that.
        """
        if not all(self.spelling[i] for i, _ in path):
            return b"", None, []
        text, told = b"", []
        for i, inside in reversed(path):
            text = self.spelling[i] + text
            if not inside:
                told.append((len(text), self.event_of(self.spelling[i])))
        event = told.pop()[1] if not path[0][1] else None
        return text, event, told


@dataclass(frozen=True)
class Events:
    """The common events: `event_bytes[e]` is the spelling of event e (b"" for the end of turn).

    `kind` is one of `EVENTS`, or `CHUNK`; `identical`: both sides have the same table of bytes, of which
    the teacher's may be longer by ids without a text.
    """

    event_bytes: tuple[bytes, ...]
    student: Side
    teacher: Side
    identical: bool
    kind: str

    @property
    def n_events(self) -> int:
        return len(self.event_bytes)

    @property
    def carries(self) -> bool:
        """What longer tokens say of the text after a boundary is part of the law there."""
        return self.student.carries

    @property
    def other_costs(self) -> bool:
        """The student pays for mass in no event; `strict` leaves it out of the comparison."""
        return self.kind != "strict"

    def to(self, device: torch.device) -> Events:
        return replace(self, student=self.student.to(device), teacher=self.teacher.to(device))


class Measures(NamedTuple):
    """What the events leave out, one number per position.

    `stay_N`, `inside_N`: nats, ln(1 - overhang), see `measure`. `shared_N`, `projected_N`,
    `other_N`: 0 to 1, probability mass in tokens that are events by themselves, in tokens that
    were sent to another event, and in no event.
    """

    stay_N: Tensor
    inside_N: Tensor
    shared_N: Tensor
    projected_N: Tensor
    other_N: Tensor


def match(
    student: Vocabulary, teacher: Vocabulary, *, kind: str = "prefix", stops: Collection[int] = ()
) -> Events:
    """The events of two vocabularies.

    `prefix`: the byte strings that are a text token in both, and the end of turn. Ids with the same
    bytes add up. A token that only one side has goes to the event of the first piece that the other
    tokenizer gives for its bytes (`first_pieces` of the *other* vocabulary), which is that piece if
    it is shared; without one to its longest prefix that is an event, else to *other*.

    Texts that differ in the number of spaces, or line breaks, at their end are one event: before a word,
    tokenizers with a space in it write one space less than those without, and mean the same.

    `strict`: the byte strings that are a text token in both, and the end of turn, but a token that only one side has goes to *other*.

    `byte`: the 256 bytes, and the end of turn. A text token goes to its first byte.

    `chunk`: at each chunk's start its bytes are one event and all else is the other, so that the
    log-probabilities of the tokens that were taken are enough. Nothing is carried. The maps here are
    those of `prefix`, for the audit.

    With the same table of bytes on both sides the events of `prefix` and `strict` are the ids
    themselves, so that the loss is exactly GKD's. (Ids that the teacher alone has rows for, none of
    them a text's, are *other*.) An end of the teacher's at which the student does not stop is none
    to learn: it goes to the student's end there too.

    Args:
        stops: ids at which the student stops, beside its ends of turn.

    Raises:
        ValueError: a side has no end-of-turn id, or the vocabularies share no text token, or an
            unknown kind.

    Source: longest-prefix projection is BPM's (2607.22334), `strict` is 2610.08448's. Differs: both
    sides are projected, first pieces come before longest prefixes, and ids with equal bytes are
    summed.
    """
    if kind not in (*EVENTS, CHUNK):
        raise ValueError(
            f"expected events to be one of {', '.join((*EVENTS, CHUNK))}, got {kind!r}"
        )
    for name, side in (("student", student), ("teacher", teacher)):
        if "end" not in side.roles:
            raise ValueError(
                f"expected an end-of-turn id in the {name}'s vocabulary, got none; "
                "pass `end_ids` to offsets.vocabulary"
            )
    identical = _same_table(student, teacher)
    if identical and kind != "byte":
        names, end = tuple(student.token_bytes), student.roles.index("end")
        known = {*stops, *(i for i, role in enumerate(student.roles) if role == "end")}
        ends = {i for i, role in enumerate(teacher.roles) if role == "end"} - known
        ours = _side(student, names, None, end=end)
        alike = not ends and len(teacher.token_bytes) == len(names)
        theirs = ours if alike else _side(teacher, names, None, end=end, also_ends=ends)
        return Events(names, ours, theirs, identical, kind)
    fold = _one_blank if kind in ("prefix", CHUNK) else bytes
    if kind == "byte":
        texts = {bytes([byte]): bytes([byte]) for byte in range(256)}
    else:
        texts = {fold(x): x for x in sorted(_texts(student) & _texts(teacher), reverse=True)}
    names = (*sorted(texts.values()), b"")  # the first of those that are one event
    if len(names) == 1:
        raise ValueError(
            "expected vocabularies that share text tokens, got none in common; "
            "check that both tokenizers were read with the right decoder"
        )
    index = {fold(text): event for event, text in enumerate(names[:-1])}
    pieces, spelled = (teacher.first_pieces, student.first_pieces), map(_texts, (student, teacher))
    maps = _events_of(index, fold, kind, pieces, list(spelled))
    ours, theirs = (
        _side(one, names, event_of, alone=not identical, carries=kind == "prefix")
        for one, event_of in zip((student, teacher), maps, strict=True)
    )
    return Events(names, ours, theirs, identical, kind)


def measure(prob_NV: Tensor, logp_N: Tensor, ids_N: Tensor, side: Side) -> Measures:
    """Mass audit of predictions, and the overhang of the boundary after each taken token.

    A boundary after token c says that no longer token was taken there. With m the mass of the
    tokens of `Side.over`, `overhang = m / (m + p(c))` is the share of what is known of the text
    after c that the prediction after c leaves out. It is given as `ln(1 - overhang)`, which keeps
    its digits for an improbable c; `inside_N` is the same where c does not start at a shared
    boundary. One range sum over the vocabulary sorted by bytes.

    Args:
        prob_NV: rows that sum to 1.
        logp_N: nats, of the token taken at each position.
        ids_N: int64, that token.
    """
    size_N = side.high_V[ids_N] - side.low_V[ids_N]
    row_K = torch.repeat_interleave(torch.arange(len(ids_N), device=ids_N.device), size_N)
    begin_N = side.low_V[ids_N] - (size_N.cumsum(0) - size_N)
    longer_K = side.sorted_U[torch.arange(len(row_K), device=ids_N.device) + begin_N[row_K]]
    mass_K = prob_NV[row_K, longer_K]
    event_K = side.event_V[longer_K]  # one without an event was told apart from c nowhere
    merged_K = (event_K == side.event_V[ids_N[row_K]]) | (event_K == side.n_events)
    masses_K2 = torch.stack([mass_K * merged_K, mass_K], dim=1)
    longer_N2 = prob_NV.new_zeros(len(ids_N), 2).index_add(0, row_K, masses_K2)
    stay_N2 = -torch.nn.functional.softplus(longer_N2.log() - logp_N[:, None])  # p(c) / (p(c) + m)
    with torch.autocast(prob_NV.device.type, enabled=False):  # bfloat16 has two digits and a half
        shared_N, other_N = (prob_NV @ side.kinds_V2.to(prob_NV.dtype)).unbind(1)
    projected_N = (1 - shared_N - other_N).clamp(min=0)
    stay_N, inside_N = stay_N2.unbind(1)
    return Measures(stay_N, inside_N, shared_N, projected_N, other_N)


def _same_table(student: Vocabulary, teacher: Vocabulary) -> bool:
    """Whether all ids of the student's are the teacher's, which may have more without a text."""
    n = len(student.token_bytes)
    return (
        tuple(student.token_bytes) == tuple(teacher.token_bytes[:n])
        and "text" not in teacher.roles[n:]
        and all(
            a == b or {a, b} == {"end", "special"}
            for a, b in zip(student.roles, teacher.roles, strict=False)
        )
    )


def _texts(vocabulary: Vocabulary) -> set[bytes]:
    pairs = zip(vocabulary.token_bytes, vocabulary.roles, strict=True)
    return {text for text, role in pairs if role == "text" and text}


def _one_blank(text: bytes) -> bytes:
    r"""The text with one space (or line break) at its end in place of any number of them.

    >>> _one_blank(b"\n    "), _one_blank(b"\n\n"), _one_blank(b" a")
    (b'\n ', b'\n', b' a')
    """
    end = text[-1:]
    return text.rstrip(end) + end if end in (b" ", b"\n") else text


def _events_of(
    index: Mapping[bytes, int], fold: Callable[[bytes], bytes], kind: str,
    pieces: Sequence[Mapping[bytes, bytes]], texts: Sequence[set[bytes]],
) -> list[Callable[[bytes], int]]:  # fmt: skip
    """Of each side, the event of any bytes; the number of events where there is none."""
    n_events = len(index) + 1  # the end of turn
    if kind not in ("prefix", CHUNK):
        size = 1 if kind == "byte" else None
        return [lambda text: index.get(text[:size], n_events)] * 2

    @lru_cache(KEPT)
    def by_prefix(side: int, text: bytes) -> int:
        """The text itself, else what it or its first piece is on the other side, else a prefix."""
        if fold(text) in index:
            return index[fold(text)]
        is_theirs = text in texts[1 - side]  # as what is left of a token can be
        piece = text if is_theirs else pieces[side].get(text, b"")
        found = by_prefix(1 - side, piece) if is_theirs or 0 < len(piece) < len(text) else n_events
        prefixes = (fold(text[:k]) for k in range(len(text) - 1, 0, -1) if found == n_events)
        return next((index[prefix] for prefix in prefixes if prefix in index), found)

    return [partial(by_prefix, 0), partial(by_prefix, 1)]


def _side(
    vocabulary: Vocabulary,
    names: Sequence[bytes],
    event_of: Callable[[bytes], int] | None,
    *,
    alone: bool = False,
    carries: bool = False,
    end: int | None = None,
    also_ends: Collection[int] = (),
) -> Side:
    """`event_of` None: ids are events, as far as there are `names`; `end` and `also_ends` end a turn.

    `alone`: the other side's boundaries are others.
    """
    pairs = zip(vocabulary.token_bytes, vocabulary.roles, strict=True)
    spelling = [text if role == "text" else b"" for text, role in pairs]
    n = len(names)
    end = n - 1 if end is None else end
    if event_of is None:
        event = [end if i in also_ends else min(i, n) for i in range(len(spelling))]
        shared = [e < n for e in event]
    else:
        is_end = [role == "end" for role in vocabulary.roles]
        event = [end if ends else event_of(x) for x, ends in zip(spelling, is_end, strict=True)]
        shared = [
            ends or (e < end and names[e] == x)
            for x, ends, e in zip(spelling, is_end, event, strict=True)
        ]
    ordered = sorted((text, i) for i, text in enumerate(spelling) if text and alone)
    keys = [text for text, _ in ordered]
    ranges = _ranges(keys)
    low_high_V2 = torch.tensor([ranges.get(text, (0, 0)) for text in spelling], dtype=torch.int64)
    event_V, shared_V = torch.tensor(event, dtype=torch.int64), torch.tensor(shared)
    return Side(
        event_bytes=tuple(names),
        identity=event_of is None and event == list(range(n)),
        end=end,
        event_V=event_V,
        column_V=event_V + (event_V == n),
        shared_V=shared_V,
        kinds_V2=torch.stack([shared_V, event_V == n], dim=1).float(),
        spelling=spelling,
        sorted_U=torch.tensor([i for _, i in ordered], dtype=torch.int64),
        low_V=low_high_V2[:, 0].contiguous(),
        high_V=low_high_V2[:, 1].contiguous(),
        event_of=event_of or (lambda _: len(names)),
        carries=carries,
        longest=max(map(len, keys), default=0),
        keys=keys,
        order=np.array([i for _, i in ordered], dtype=np.int64),
        event_of_id=np.array(event, dtype=np.int64),
    )


def _ranges(keys: list[bytes]) -> dict[bytes, tuple[int, int]]:
    """Of each of the sorted keys, `_extensions`: all at once, by the keys that are still open."""
    ranges: dict[bytes, tuple[int, int]] = {}
    opened: list[bytes] = []
    for at, key in enumerate([*keys, b""]):
        while opened and not key.startswith(opened[-1]):
            ranges[opened[-1]] = ranges[opened[-1]][0], at
            opened.pop()
        if not opened or opened[-1] != key:
            opened.append(key)
        ranges[key] = at + 1, at + 1
    ranges[b""] = 0, 0  # it closed the last ones, and is no spelling
    return ranges


def _extensions(text: bytes, keys: list[bytes]) -> tuple[int, int]:
    """The range of the sorted `keys` that start with `text` and are longer."""
    if not text:
        return 0, 0
    low = bisect_right(keys, text)
    stem = text.rstrip(b"\xff")
    if not stem:
        return low, len(keys)
    return low, bisect_left(keys, stem[:-1] + bytes([stem[-1] + 1]), lo=low)
