# SPDX-License-Identifier: Apache-2.0
"""Three losses of others for one answer, as they are, flaws included: ULD, TRL's GOLD, BPM.

Where it stands: beside `minigold.loss`, for experiments that compare. What enters: an `Answer` (the
logits of both models, the ids, the chunks of `minigold.align`). What leaves: a scalar with a
gradient to the student's logits. What it does not do: fix anything, average over answers.

Every line here is written anew. `tests/test_baselines.py` holds `uld` and `trl_gold` to TRL 1.16
itself in value and gradient, and `bpm` to loops over dictionaries. Letters are minigold's: C chunks,
V and W ids of the student and the teacher, X pieces that both have.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigold.align import Chunks

__all__ = [
    "Answer", "Prefixes", "bpm", "bpm_target", "matched_by_string", "prefixes", "trl_gold", "uld",
]  # fmt: skip

FLOOR = 1e-8  # of probabilities, in TRL
LEAST = 1e-9  # mass of the tokens that begin with given bytes, below which BPM leaves a row out
LEAST_OTHER = 1e-12  # mass of the student tokens without a target, in BPM


@dataclass(frozen=True)
class Answer:
    """S student and T teacher tokens of one text, and what both models predict there.

    The logits have N = S + 1 and M = T + 1 rows: row i predicts token i, the last row what follows
    the answer. An end-of-turn token is in neither list of ids.

    Raises:
        ValueError: rows that are not one more than ids; ids outside the columns; chunks of more
            tokens.
    """

    student_logits_NV: Tensor
    teacher_logits_MW: Tensor
    student_ids: Sequence[int]
    teacher_ids: Sequence[int]
    chunks: Chunks

    def __post_init__(self) -> None:
        sides = (
            ("student", self.student_logits_NV, self.student_ids, self.chunks.s1),
            ("teacher", self.teacher_logits_MW, self.teacher_ids, self.chunks.t1),
        )
        for side, logits_NV, ids, stop_C in sides:
            if logits_NV.ndim != 2 or len(logits_NV) != len(ids) + 1:
                raise ValueError(
                    f"{side}_logits: expected {len(ids) + 1} rows, one for each of {len(ids)} ids "
                    f"and one for what follows, got shape {tuple(logits_NV.shape)}; cut them from "
                    "the row that predicts the first id"
                )
            _check_ids(f"{side}_ids", ids, logits_NV.shape[1])
            if stop_C.max(initial=0) > len(ids):
                raise ValueError(
                    f"chunks: expected ranges of {len(ids)} {side} tokens, got one that ends at "
                    f"{stop_C.max()}; align the spans of these ids"
                )


def _check_ids(name: str, ids: Sequence[int], size: int) -> None:
    if len(ids) and not 0 <= min(ids) <= max(ids) < size:
        raise ValueError(
            f"{name}: expected ids in 0..{size - 1}, got {min(ids)} to {max(ids)}; are ids and "
            "logits of one model?"
        )


# -- ULD and TRL's GOLD --------------------------------------------------------------------------


def uld(
    answer: Answer,
    *,
    extended: bool = True,
    merge: str = "observed",
    temperatures: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Mean distance of sorted probabilities, 0 to 2 per group.

        1/C sum_c sum_k | sort(p_c)_k - sort(q_c)_k |      the shorter vocabulary padded with 0

    p_c, q_c: what the student and the teacher say of group c, see `_merged`.

    Flaws: sorting forgets which token a probability belongs to, so a student that is as sure as
    the teacher, of another word, has no loss. TRL then takes the mean over answers, however long.

    Args:
        extended: groups are the chunks (TRL's byte groups); their `flaw` is not looked at, and
            those with an empty side are left out. False: the original ULD, token i beside token i,
            the longer answer cut.
        merge: "observed" (TRL's default) or "bayesian".
        temperatures: of the student and of the teacher.

    Returns:
        A scalar; 0 where there is nothing to compare.

    Raises:
        ValueError: an unknown merge; a temperature that is not positive.

    Source: Boizard et al., 2402.12030; TRL 1.16, `ULDLoss`, end tokens skipped.
    """
    student_CV, teacher_CW = _grouped(answer, extended, merge, temperatures)
    if len(student_CV) == 0:
        return answer.student_logits_NV.sum() * 0.0
    return _sorted_distance(student_CV, teacher_CW)


def trl_gold(
    answer: Answer,
    *,
    matched: tuple[Tensor, Tensor],
    beta: float = 0.5,
    weights: tuple[float, float] | None = None,
    extended: bool = True,
    merge: str = "observed",
    temperatures: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """TRL's hybrid: a divergence in nats and a sorted distance per group, weighted and added.

        w_matched D_beta(q[matched], p[matched]) + w_unmatched ULD(p[the rest], q[the rest])
        D_beta = beta KL(q||m) + (1 - beta) KL(p||m),  m = beta q + (1 - beta) p
        D_0 = KL(q||p), D_1 = KL(p||q)

    Flaws, beside those of `uld`: the matched parts are not renormalized, so D_0 and D_1 can be
    negative, and every student token without a match is pushed down by the teacher's matched mass.
    D_beta is not divided by beta (1 - beta): it tends to 0 where D_0 and D_1 are not 0. Pieces
    match by their raw strings, see `matched_by_string`. The floor of 1e-8 is a mass of its own,
    X times. The rest has no loss where one side has none. Adaptive weights count ids, not mass.

    Args:
        matched: ids `[X]` of the student and, beside them, of the teacher.
        beta: 0 to 1. Towards 0 the mixture is the student's.
        weights: of the matched and of the unmatched part; None: X / W and the rest of 1.
        extended, merge, temperatures: as in `uld`.

    Raises:
        ValueError: as `uld`; a beta outside 0 to 1; matched ids that are not pairs or not in the
            vocabularies.

    Source: TRL 1.16, `ULDLoss` with `uld_use_hybrid_loss` and `GOLDTrainer.generalized_jsd_loss`.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected 0 to 1, got {beta}; 0 is KL(teacher || student)")
    student_CV, teacher_CW = _grouped(answer, extended, merge, temperatures)
    student_X, teacher_X = matched
    if len(student_X) != len(teacher_X):
        raise ValueError(
            f"matched: expected as many student ids as teacher ids, got {len(student_X)} and "
            f"{len(teacher_X)}; make them with matched_by_string"
        )
    _check_ids("matched student ids", student_X.tolist(), student_CV.shape[1])
    _check_ids("matched teacher ids", teacher_X.tolist(), teacher_CW.shape[1])
    if len(student_CV) == 0:
        return answer.student_logits_NV.sum() * 0.0
    matched_loss = _floored_divergence(student_CV[:, student_X], teacher_CW[:, teacher_X], beta)
    student_rest, teacher_rest = _without(student_CV, student_X), _without(teacher_CW, teacher_X)
    has_rest = student_rest.shape[1] > 0 and teacher_rest.shape[1] > 0
    rest_loss = _sorted_distance(student_rest, teacher_rest) if has_rest else 0.0
    share = len(teacher_X) / teacher_CW.shape[1]
    matched_weight, rest_weight = weights or (share, 1 - share)
    return matched_weight * matched_loss + rest_weight * rest_loss


def matched_by_string(
    student_vocab: Mapping[str, int], teacher_vocab: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Ids `[X]` of both sides with the same string in `get_vocab()`, in the teacher's order.

    Flaw: strings are not bytes. `▁the` and `Ġthe` are the same text and do not match; SmolLM2
    shares 30 % of its ids with Gemma 3 by string and 94 % by bytes.

    Raises:
        ValueError: no string in common (TRL stops there as well).

    >>> matched_by_string({"a": 0, "b": 1, "c": 2}, {"c": 0, "x": 1, "a": 2})
    (tensor([2, 0]), tensor([0, 2]))
    """
    student_of = {
        i: student_vocab[text] for text, i in teacher_vocab.items() if text in student_vocab
    }
    if not student_of:
        raise ValueError(
            f"vocabularies: expected strings in common, got none among {len(student_vocab)} and "
            f"{len(teacher_vocab)}; give get_vocab() of both tokenizers"
        )
    teacher_ids = sorted(student_of)
    return torch.tensor([student_of[i] for i in teacher_ids]), torch.tensor(teacher_ids)


def _grouped(
    answer: Answer, extended: bool, merge: str, temperatures: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Probabilities `[C, V]` and `[C, W]` of the groups.

    Flaw of "observed": its rows are one late. What it takes for token i predicts token i + 1.
    """
    if merge not in ("observed", "bayesian"):
        raise ValueError(f"merge: expected 'observed' (TRL's default) or 'bayesian', got {merge!r}")
    if min(temperatures) <= 0:
        raise ValueError(f"temperatures: expected more than 0, got {temperatures}; 1 is neutral")
    rows = slice(1, None) if merge == "observed" else slice(None, -1)
    student_SV = (answer.student_logits_NV[rows] / temperatures[0]).softmax(-1)
    teacher_TW = (answer.teacher_logits_MW[rows] / temperatures[1]).softmax(-1)
    if not extended:
        shorter = min(len(student_SV), len(teacher_TW))
        return student_SV[:shorter], teacher_TW[:shorter]
    s0, s1, t0, t1 = answer.chunks[:4]
    both = (s1 > s0) & (t1 > t0)
    return (
        _merged(student_SV, answer.student_ids, s0[both], s1[both], merge),
        _merged(teacher_TW, answer.teacher_ids, t0[both], t1[both], merge),
    )


def _merged(
    prob_SV: Tensor, ids: Sequence[int], start_C: np.ndarray, stop_C: np.ndarray, merge: str
) -> Tensor:
    """One row `[C, V]` for each group: a token's row times the others' observed probabilities.

        observed    row of the first token * prod of p(later tokens)
        bayesian    row of the last token * prod of p(earlier tokens)

    Flaws: rows do not sum to 1, so a group of many tokens has little weight. "bayesian" is, at the
    observed last token, the chance of the group's text, and at others that of texts which begin
    alike. "observed" means the same at the observed first token; at others it multiplies by what
    follows another token. With its late rows (`_grouped`) it is right at none.
    """
    base_C = start_C if merge == "observed" else stop_C - 1
    inside = np.concatenate([np.arange(a, b) for a, b in zip(start_C, stop_C, strict=True)] or [[]])
    others = inside[~np.isin(inside, base_C)].astype(np.int64)
    group = torch.from_numpy(np.searchsorted(start_C, others, side="right") - 1)
    ids_S = torch.as_tensor(ids, dtype=torch.int64)
    logp = prob_SV[others, ids_S[others].to(prob_SV.device)].clamp(min=FLOOR).log()
    zeros_C = prob_SV.new_zeros(len(base_C))
    return prob_SV[base_C] * zeros_C.index_add(0, group.to(prob_SV.device), logp).exp()[:, None]


def _sorted_distance(student_CV: Tensor, teacher_CW: Tensor) -> Tensor:
    """Mean over groups of the L1 distance between the sorted rows, the shorter padded with 0."""
    width = max(student_CV.shape[1], teacher_CW.shape[1])
    student, teacher = (
        F.pad(prob.sort(dim=-1, descending=True).values, (0, width - prob.shape[1]))
        for prob in (student_CV, teacher_CW)
    )
    return (student - teacher).abs().sum() / len(student_CV)


def _floored_divergence(student_CX: Tensor, teacher_CX: Tensor, beta: float) -> Tensor:
    """Mean over groups of D_beta of `trl_gold` between two lists of masses."""
    student, teacher = (prob.clamp(min=FLOOR).log() for prob in (student_CX, teacher_CX))
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + np.log(beta), student + np.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(logp_CX: Tensor, other_CX: Tensor) -> Tensor:
    return (logp_CX.exp() * (logp_CX - other_CX)).sum() / len(logp_CX)


def _without(prob_CV: Tensor, ids_X: Tensor) -> Tensor:
    """The columns that are not among the ids."""
    rest_V = torch.ones(prob_CV.shape[1], dtype=torch.bool, device=prob_CV.device)
    rest_V[ids_X] = False
    return prob_CV[:, rest_V]


# -- BPM -----------------------------------------------------------------------------------------


class Prefixes(NamedTuple):
    """Two vocabularies prepared once for `bpm`; make it with `prefixes`."""

    student_bytes: Sequence[bytes]  # of each id
    teacher_bytes: Sequence[bytes]
    student_id: Mapping[bytes, int]
    longest: int  # student token, in bytes
    texts: list[bytes]  # of the teacher's tokens with text, sorted
    text_ids: np.ndarray  # int64, the ids beside them
    first_W: Tensor  # int64, phi of each teacher token: a student token, or -1
    student_stop: int | None
    teacher_stops: list[int]

    def first(self, text: bytes) -> int:
        """phi(text): the longest student token that the text begins with, -1 for none."""
        for size in range(min(len(text), self.longest), 0, -1):
            if (token := self.student_id.get(text[:size])) is not None:
                return token
        return -1

    def starting(self, text: bytes, *, exactly: bool = False) -> np.ndarray:
        """Teacher ids whose bytes begin with the text, or are the text."""
        size = len(text) + exactly  # one byte more tells longer tokens apart
        low = bisect_left(self.texts, text)
        return self.text_ids[low : bisect_right(self.texts, text, low, key=lambda t: t[:size])]


def prefixes(
    student_bytes: Sequence[bytes],
    teacher_bytes: Sequence[bytes],
    *,
    student_stop: int | None = None,
    teacher_stops: Sequence[int] = (),
) -> Prefixes:
    """phi(w) = the longest student token that teacher token w begins with, for all w.

    Args:
        student_bytes, teacher_bytes: of every column of the logits, b"" where an id is no text
            (`minigold.offsets.vocabulary(...).token_bytes`). Of student ids with equal bytes the
            first stands for all.
        student_stop: the end-of-turn id that the teacher's stops belong to; None: they are
            residual.
        teacher_stops: the teacher's end-of-turn ids.

    Raises:
        ValueError: no student token with text; stop ids outside the vocabulary.

    >>> table = prefixes([b"hel", b"lo"], [b"hello", b"hel", b"xyz"])
    >>> table.first_W.tolist(), table.first(b"love"), table.starting(b"hel").tolist()
    ([0, 0, -1], 1, [1, 0])
    """
    student_id = {text: i for i, text in reversed(list(enumerate(student_bytes))) if text}
    if not student_id:
        raise ValueError("student_bytes: expected tokens with text, got none; give bytes of ids")
    own_stops = [] if student_stop is None else [student_stop]
    _check_ids("student_stop", own_stops, len(student_bytes))
    _check_ids("teacher_stops", teacher_stops, len(teacher_bytes))
    ordered = sorted((text, i) for i, text in enumerate(teacher_bytes) if text)
    table = Prefixes(
        student_bytes, teacher_bytes, student_id, max(map(len, student_id)),
        [text for text, _i in ordered], np.array([i for _text, i in ordered], dtype=np.int64),
        torch.full((len(teacher_bytes),), -1), student_stop, list(teacher_stops),
    )  # fmt: skip
    firsts = [table.first(text) for text in teacher_bytes]
    for stop in teacher_stops:
        firsts[stop] = -1 if student_stop is None else student_stop
    return table._replace(first_W=torch.tensor(firsts))


def bpm(answer: Answer, *, table: Prefixes, stopped: bool = False, spaces: bool = False) -> Tensor:
    """KL(target || student) of byte-prefix marginalization, in nats per token of the answer.

        1/S sum_n [ sum_u t(u) ln(t(u) / p(u)) + r ln(r / p(tokens with t = 0)) ]

    t and the residual r: `bpm_target`, without a gradient. Rows that it leaves out count as 0; with
    `stopped` the end of turn is one more token of the answer.

    Flaws: the residual, whatever text it is, raises all student tokens that have no target,
    together; their mass is floored at 1e-12.

    Raises:
        ValueError: as `bpm_target`.

    Source: Wang et al., 2607.22334; its code, K1XE/BPM, as the launchers of the paper's pairs set
    it: forward KL, chain mode "scatter", stop bridge, rows of blanks masked, temperature 1.
    Differs: the target's entropy is subtracted (same gradient); they stop the chain rule at eight
    candidates a row, and sum over a step's answers before they divide by its tokens.

    The student has `hel`, `lo`, `x` and an id without text, each at 1/4; the teacher `hello` .6,
    `help` .3, `y` .1. The answer is `hello`. Before it: t(hel) = .9, r = .1. After `hel`: 2/3 for
    `hello`, 1/3 for `help`, so t(lo) = 2/3, and r = 1/3, as no student token begins `p`:

    >>> from minigold.align import align
    >>> table = prefixes([b"hel", b"lo", b"x", b""], [b"hello", b"help", b"y"])
    >>> teacher_logits_MW = torch.tensor([[0.6, 0.3, 0.1]] * 2).log()
    >>> chunks = align([(0, 3), (3, 5)], [(0, 5)])
    >>> answer = Answer(torch.zeros(3, 4), teacher_logits_MW, [0, 1], [0], chunks)
    >>> before = 0.9 * np.log(0.9 / 0.25) + 0.1 * np.log(0.1 / 0.75)
    >>> after = 2 / 3 * np.log(2 / 3 / 0.25) + 1 / 3 * np.log(1 / 3 / 0.75)
    >>> print(f"{bpm(answer, table=table):.4f} {(before + after) / 2:.4f}")
    0.6675 0.6675
    """
    target_NV, residual_N = bpm_target(answer, table=table, stopped=stopped, spaces=spaces)
    logp_NV = answer.student_logits_NV.log_softmax(-1)
    other_N = torch.where(target_NV > 0, 0.0, logp_NV.exp()).sum(-1).clamp(min=LEAST_OTHER)
    on_tokens = F.kl_div(logp_NV, target_NV, reduction="sum")
    on_residual = F.kl_div(other_N.log(), residual_N, reduction="sum")
    return (on_tokens + on_residual) / max(len(answer.student_ids) + stopped, 1)


@torch.no_grad()
def bpm_target(
    answer: Answer, *, table: Prefixes, stopped: bool = False, spaces: bool = False
) -> tuple[Tensor, Tensor]:
    """The teacher's prediction told in student tokens `[N, V]`, and its residual `[N]`.

    Where the student's token n begins with teacher token k, t(u) = sum of q_k(w) over phi(w) = u.
    Where it begins inside token k, after the bytes c: the same of the rests of all tokens that
    begin with c, over their mass pi(c). What has no phi is residual. A student token longer than
    the rest of token k takes its part from phi of that rest by the chain rule (`_chained`).

    Decided as the original's code does, flaws included: inside a token, a rest goes to no student
    token longer than the rest of token k, and the token that is c itself is residual. A row inside
    a token is left out where its own token ends before token k and token k ends inside a student
    token, and where pi(c) is below 1e-9. The teacher's stops before a token belong to the student's
    stop. The row of the stop, if the answer `stopped`, has t(stop) = the teacher's mass of stops,
    all else residual. Rows of tokens of blanks and tabs are left out unless `spaces`.
    Differs: they leave out an answer whose bytes differ, here only its chunks with a flaw, where
    the chain rule ends. Ids that are no text, special ones too, are residual.

    Raises:
        ValueError: logits whose columns are not those of the table; a chunk without a flaw whose
            tokens spell two texts; `stopped` without a student stop.
    """
    _check_table(answer, table, stopped=stopped)
    prob_MW = answer.teacher_logits_MW.softmax(-1)
    heads_MV, rests_M = _told(prob_MW, table.first_W, answer.student_logits_NV.shape[1])
    target_NV = torch.zeros_like(answer.student_logits_NV)
    residual_N = target_NV.new_zeros(len(target_NV))
    for row in _rows(answer, table):
        beyond = len(row.own) > len(row.rest)
        kept = not row.begun or beyond or row.ends_together
        if not kept or not (spaces or row.own.strip(b" \t")):
            continue
        target_V, residual, mass = heads_MV[row.k], rests_M[row.k], 1.0
        if row.begun:
            ids = table.starting(row.begun)
            mass = float(prob_MW[row.k, ids].sum())
            if mass <= LEAST:
                continue
            rests = (table.teacher_bytes[i][len(row.begun) :][: len(row.rest)] for i in ids)
            firsts = torch.tensor([table.first(rest) for rest in rests])
            told_1V, rest_1 = _told(prob_MW[row.k, ids][None] / mass, firsts, len(target_V))
            target_V, residual = told_1V[0], rest_1[0]
        target_NV[row.n], residual_N[row.n] = target_V, residual
        if beyond or not row.begun:
            for token, change in _chained(row, prob_MW, table):
                place = residual_N[row.n] if token < 0 else target_NV[row.n, token]
                place.add_(change / mass).clamp_(min=0)
    stop_mass = prob_MW[-1, table.teacher_stops].sum()
    if stopped and stop_mass > 0:
        target_NV[-1, table.student_stop], residual_N[-1] = stop_mass, 1 - stop_mass
    return target_NV, residual_N


def _check_table(answer: Answer, table: Prefixes, *, stopped: bool) -> None:
    sizes = len(table.student_bytes), len(table.teacher_bytes)
    columns = answer.student_logits_NV.shape[1], answer.teacher_logits_MW.shape[1]
    if sizes != columns:
        raise ValueError(
            f"table: expected bytes of {columns[0]} student and {columns[1]} teacher ids, got "
            f"{sizes[0]} and {sizes[1]}; give prefixes one entry for each column of the logits"
        )
    if stopped and table.student_stop is None:
        raise ValueError("stopped: expected a table with a student_stop, got None; name it there")


class _Row(NamedTuple):
    """The student's token n, its bytes `own`, and teacher token k = begun + rest, where it begins.

    `ahead`: the answer's bytes from there on; `pieces`: the teacher's tokens from k on, both up to
    the next flaw. `ends_together`: a student token ends where token k ends.
    """

    n: int
    k: int
    own: bytes
    begun: bytes
    rest: bytes
    ahead: bytes
    pieces: list[bytes]
    ends_together: bool


def _rows(answer: Answer, table: Prefixes) -> Iterator[_Row]:
    """The rows of the student's tokens in chunks without a flaw, run by run of such chunks."""
    chunks = answer.chunks
    edges = np.flatnonzero(np.diff(np.concatenate(([1], chunks.flaw != 0, [1]))))
    for first, last in zip(edges[::2], edges[1::2] - 1, strict=True):
        s0, t0 = int(chunks.s0[first]), int(chunks.t0[first])
        own = [table.student_bytes[i] for i in answer.student_ids[s0 : chunks.s1[last]]]
        pieces = [table.teacher_bytes[i] for i in answer.teacher_ids[t0 : chunks.t1[last]]]
        text, other = b"".join(own), b"".join(pieces)
        if text != other:
            raise ValueError(
                f"chunks {first} to {last}: expected tokens that spell one text, got {text!r} "
                f"(student) and {other!r} (teacher); BPM compares exact bytes only"
            )
        starts, ends = ([0, *np.cumsum([len(p) for p in side]).tolist()] for side in (own, pieces))
        for n, at in enumerate(starts[:-1]):
            k = bisect_right(ends, at) - 1
            piece, inside = pieces[k], at - ends[k]
            yield _Row(
                s0 + n, t0 + k, own[n], piece[:inside], piece[inside:], text[at:], pieces[k:],
                ends[k + 1] in starts,
            )  # fmt: skip


def _told(prob_MW: Tensor, first_W: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sums `[M, V]` of the probabilities over columns of equal phi, and `[M]` over those of -1."""
    first_W = first_W.to(prob_MW.device)
    has = first_W >= 0
    told_MV = prob_MW.new_zeros(len(prob_MW), size).index_add(1, first_W[has], prob_MW[:, has])
    return told_MV, prob_MW[:, ~has].sum(-1)


def _chained(row: _Row, prob_MW: Tensor, table: Prefixes) -> Iterator[tuple[int, float]]:
    """What student tokens longer than the rest of token k take, as (student token, change).

    c_1, c_2, ...: those that the answer's own bytes begin with; P_1 >= P_2 >= ...: their masses by
    the chain rule over the observed tokens. c_i gets P_i - P_(i+1), and phi of the rest loses P_1.
    A lower bound: spellings of c_i with a token over an end of the observed tokens do not count.
    """
    sizes = range(len(row.rest) + 1, min(table.longest, len(row.ahead)) + 1)
    longer = [row.ahead[:size] for size in sizes if row.ahead[:size] in table.student_id]
    if not longer:
        return
    masses = [_path_mass(row, row.begun + text, prob_MW, table) for text in longer]
    yield table.first(row.rest), -masses[0]
    for text, mass, deeper in zip(longer, masses, [*masses[1:], 0.0], strict=True):
        yield table.student_id[text], mass - deeper


def _path_mass(row: _Row, text: bytes, prob_MW: Tensor, table: Prefixes) -> float:
    """q of the observed tokens k, k + 1, ... that the text holds, times that of what is left."""
    mass = 1.0
    for k, piece in enumerate(row.pieces, start=row.k):
        if len(text) <= len(piece):
            break
        mass *= float(prob_MW[k, table.starting(piece, exactly=True)].sum())
        text = text[len(piece) :]
    return mass * float(prob_MW[k, table.starting(text)].sum())
