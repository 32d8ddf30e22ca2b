# SPDX-License-Identifier: Apache-2.0
"""What a step did, in numbers: metrics, the samples file, and the mass audit.

Each key is explained in docs/metrics.md. Shares are 0 to 1; None stands where nothing was there
to measure.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minigold.batch import Array, Rollout
from minigold.config import Config
from minigold.data import Prompt
from minigold.events import Events
from minigold.offsets import FLAWS
from minigold.pair import Pair

if TYPE_CHECKING:
    from minigold.train import Step

__all__ = ["audit", "gap_and_bytes", "plain", "sample_rows", "step_metrics"]

log = logging.getLogger("minigold")
OTHER_LIMIT = 0.02
NONCANONICAL_LIMIT = 0.1
ANSWERS = 8  # of fewer nothing is said
OVERHANG_SHOWN = 0.2
RUN = 4  # tokens in a row that `repetition` looks for again


def step_metrics(
    rollouts: Sequence[Rollout],
    chosen: Sequence[Array],
    config: Config,
    *,
    loss: float,
    work_saved: float,
    clock: Sequence[float],
    device: torch.device,
) -> dict[str, Any]:
    """All keys of a line of metrics.jsonl but `step`, `grad_norm` and `lr`.

    Args:
        clock: seconds at the start, after sampling, after the teacher, after training.
        device: whose peak of memory is told.
    """
    chunks = [r.chunks for r in rollouts]
    n_chunks = sum(len(c.s0) for c in chunks)
    n_chosen = sum(int(mask.sum()) for mask in chosen)
    tokens = sum(len(r.answer.ids) for r in rollouts)
    sampled = [r for r in rollouts if r.answer.on_policy]
    finished = sum(r.answer.finished for r in sampled)
    return {
        "loss": loss,
        "chunks": n_chunks,
        "trained_fraction": _share(n_chosen, n_chunks),
        "disagreement_share": _disagreement(rollouts, chosen),
        "work_saved": work_saved,
        "one_to_one_fraction": _one_to_one(rollouts),
        "unscorable": _unscorable(rollouts),
        **_masses(rollouts),
        "tail_mass_teacher": _tail(rollouts),
        "overhang_fraction": _overhanging(rollouts),
        "noncanonical_share": _noncanonical(sampled),
        "repetition": _repetition(sampled),
        "reverse_kl_per_byte": _per_byte(sampled) if config.pure else None,
        "completion_tokens": tokens,
        "completion_bytes": sum(len(r.answer.text.encode("utf-8")) for r in rollouts),
        "eos_rate": _share(finished, len(sampled)),
        "clipped_rate": _share(len(sampled) - finished, len(sampled)),
        "off_policy_fraction": _share(len(rollouts) - len(sampled), len(rollouts)),
        "seconds": clock[3] - clock[0],
        "seconds_sample": clock[1] - clock[0],
        "seconds_teacher": clock[2] - clock[1],
        "seconds_train": clock[3] - clock[2],
        "peak_memory_gib": _peak_memory(device),
    }


def sample_rows(number: int, step: Step, pair: Pair) -> list[dict[str, Any]]:
    """Lines of samples.jsonl: every answer with its chunks, acceptance and what was trained."""
    return [
        {
            "step": number,
            "line": r.answer.prompt.line,
            "prompt": r.answer.prompt.prompt,
            "completion": r.answer.text,
            "finished": r.answer.finished,
            "on_policy": r.answer.on_policy,
            "student_ids": r.answer.ids,
            "student_spans": r.answer.spans,
            "teacher_ids": r.answer.teacher_ids,
            "chunks": np.stack(r.chunks, axis=1).tolist(),
            "acceptance": plain([round(float(a), 6) for a in accepted]),
            "trained": mask.tolist(),
            "teacher_best": plain(_best(r, pair)),
            **_given(r.answer.prompt),
        }
        for r, accepted, mask in zip(step.rollouts, step.acceptance, step.chosen, strict=True)
    ]


def _given(prompt: Prompt) -> dict[str, Any]:
    """The prompt's own columns but `prompt` and `completion`."""
    own = {"teacher_prompt": prompt.teacher_prompt, "answer": prompt.answer}
    return {key: value for key, value in own.items() if value is not None} | prompt.extra


def _best(rollout: Rollout, pair: Pair) -> list[list[str | float] | None]:
    """The teacher's most likely token at each chunk's start, and its probability (0-1), if known."""
    spelling, tokenizer = pair.events.teacher.spelling, pair.teacher.tokenizer
    places, score = torch.as_tensor(rollout.chunks.t0), rollout.score
    best = zip(score.best_id_M[places].tolist(), score.best_prob_M[places].tolist(), strict=True)
    return [
        [
            spelling[i].decode("utf-8", "replace") or tokenizer.id_to_token(i) or f"#{i}",
            round(prob, 4),
        ]
        if i >= 0
        else None
        for i, prob in best
    ]


def audit(rollouts: Sequence[Rollout], events: Events) -> str:
    """Mass audit on real samples, before any training: logged, with warnings, and returned."""
    mass = _masses(rollouts)
    lines = [
        f"mass audit: {events.n_events} events" + ", the ids themselves" * events.student.identity
    ]
    for name, side in (("student", events.student), ("teacher", events.teacher)):
        other = mass[f"other_mass_{name}"] or 0.0
        shared = mass[f"shared_mass_{name}"] or 0.0
        tail = (_tail(rollouts) or 0.0) if name == "teacher" else 0.0
        texts = [text for text in side.spelling if text]
        masses = (
            f"mass in shared tokens {shared:.4f}, projected "
            f"{max(0.0, 1 - shared - other - tail):.4f}, other {other:.4f}"
        ) + (f", not listed {tail:.4f}" if tail else "")
        lines.append(
            f"  {name}: {int(side.shared_V.sum())} of {len(side.spelling)} ids are events, "
            f"{len(texts) - len(set(texts))} repeat another's bytes; "
            + ("its masses are not told" if math.isnan(shared) else masses)
        )
        if other > OTHER_LIMIT:
            log.warning(
                "%s: %.1f %% of its mass is in tokens without an event; check both templates "
                "and end-of-turn ids", name, 100 * other,
            )  # fmt: skip
    one_to_one, over = _one_to_one(rollouts) or 0.0, _overhanging(rollouts) or 0.0
    lines.append(
        f"  chunks: {one_to_one:.4f} one to one, {over:.4f} start under longer tokens of one side"
    )
    sampled = [r for r in rollouts if r.answer.on_policy]
    _warn_of_cut(sampled)
    strange = _noncanonical(sampled) or 0.0
    if strange > NONCANONICAL_LIMIT:
        log.warning("%.0f %% of the sampled tokens are unusual spellings", 100 * strange)
    text = "\n".join(lines)
    log.info(text)
    return text


def _warn_of_cut(sampled: Sequence[Rollout]) -> None:
    if len(sampled) >= ANSWERS and not any(r.answer.finished for r in sampled):
        log.warning(
            "none of %d answers ended by itself within %d tokens: cut answers teach no end; raise "
            "--max-new-tokens, or check the student's template and end-of-turn ids",
            len(sampled), max(len(r.answer.ids) for r in sampled),
        )  # fmt: skip


def plain(value: Any) -> Any:
    """The same dicts and lists, with None for the numbers that JSON does not have.

    >>> plain({"loss": float("nan"), "logp": [-1.0, float("-inf")]})
    {'loss': None, 'logp': [-1.0, None]}
    """
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _one_to_one(rollouts: Sequence[Rollout]) -> float | None:
    chunks = [r.chunks for r in rollouts]
    single = sum(int(((c.s1 - c.s0 == 1) & (c.t1 - c.t0 == 1)).sum()) for c in chunks)
    return _share(single, sum(len(c.s0) for c in chunks))


def _overhanging(rollouts: Sequence[Rollout]) -> float | None:
    over = sum(int((r.overhang_C > OVERHANG_SHOWN).sum()) for r in rollouts)
    return _share(over, sum(len(r.chunks.s0) for r in rollouts))


def _noncanonical(sampled: Sequence[Rollout]) -> float | None:
    tokens = sum(len(r.answer.ids) for r in sampled)
    return _share(sum(r.answer.noncanonical for r in sampled), tokens)


def _repetition(sampled: Sequence[Rollout]) -> float | None:
    """Share of the runs of four tokens that stood before in the same answer."""
    n_runs = n_different = 0
    for r in sampled:
        ids = r.answer.ids
        runs = [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)]
        n_runs += len(runs)
        n_different += len(set(runs))
    return _share(n_runs - n_different, n_runs)


def _disagreement(rollouts: Sequence[Rollout], chosen: Sequence[Array]) -> float | None:
    """Share of the sum of |l_t - l_s| over scorable chunks that the chosen ones hold."""
    held = total = 0.0
    for r, mask in zip(rollouts, chosen, strict=True):
        gaps_C = np.abs(np.nan_to_num(r.teacher_logp_C - r.student_logp_C, posinf=0, neginf=0))
        total += float(gaps_C.sum())
        held += float(gaps_C[mask].sum())
    return _share(held, total)


def _unscorable(rollouts: Sequence[Rollout]) -> dict[str, int]:
    counts = np.zeros(len(FLAWS), dtype=np.int64)
    for r in rollouts:
        counts += np.bincount(r.chunks.flaw, minlength=len(FLAWS))
    return {name: int(n) for name, n in zip(FLAWS[1:], counts[1:], strict=True) if n}


def _masses(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Mean over all tokens of both sides."""
    student = np.concatenate([r.student_measures_S5 for r in rollouts])
    teacher = np.concatenate([r.teacher_measures_T5 for r in rollouts])
    return {
        f"{kind}_mass_{name}": float(found[:, column].mean()) if len(found) else None
        for kind, column in (("shared", 2), ("other", 4))
        for name, found in (("student", student), ("teacher", teacher))
    }


def _tail(rollouts: Sequence[Rollout]) -> float | None:
    """Mean over the teacher's tokens of what it did not list; None if it is not one that lists."""
    tails = [r.score.listed.tail_M[:-1] for r in rollouts if r.score.listed is not None]
    found = torch.cat(tails) if tails else torch.zeros(0)
    return float(found.mean()) if len(found) else None


def _per_byte(rollouts: Sequence[Rollout]) -> float | None:
    """Sum of l_s - l_t over the bytes of scorable text chunks, in nats per byte."""
    gaps, sizes = zip(*map(gap_and_bytes, rollouts), strict=True) if rollouts else ((), ())
    return _share(sum(gaps), sum(sizes))


def gap_and_bytes(rollout: Rollout) -> tuple[float, int]:
    """Sum of l_s - l_t over the scorable text chunks in nats, and their bytes.

    With identical tokenizers the tokens of one broken character are chunks that share its bytes.
    """
    r = rollout
    text_C = r.scorable_C & (r.chunks.end > r.chunks.start)
    gap_C = r.student_logp_C - r.teacher_logp_C
    before_C = np.maximum.accumulate(np.append(0, r.chunks.end)[:-1])
    bytes_C = (r.chunks.end - np.maximum(r.chunks.start, before_C)).clip(min=0)
    return float(gap_C[text_C].sum()), int(bytes_C[text_C].sum())


def _peak_memory(device: torch.device) -> float:
    """Of the device if it is CUDA, else of the process; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
