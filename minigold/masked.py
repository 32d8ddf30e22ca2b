# SPDX-License-Identifier: Apache-2.0
"""A step's rollouts in, the chunks to train and the student's gradient there out.

A mask saves work in three ways: rows without a chosen chunk are left out, the others end after their
last one, and the head runs on the chosen states alone. The gradient is that of the whole computation
with the other chunks' losses left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigold.batch import Array, Rollout, head_rows, needed_states, pack
from minigold.config import Config
from minigold.disagree import (
    KNOWN_BEFORE,
    acceptance,
    agreement,
    budget,
    choose,
    largest,
    replayed,
    soft_or,
    weights,
)
from minigold.events import CHUNK, Events
from minigold.load import LanguageModel
from minigold.loss import gold_loss, look
from minigold.pair import Pair
from minigold.rollout import precision
from minigold.sample import completion_states, pad
from minigold.teacher import Listed, Score
from minigold.tiers import Teacher

__all__ = [
    "Pass",
    "acceptance_of",
    "choose_chunks",
    "chunk_weight",
    "chunk_weights",
    "kept_of",
    "micro_batches",
    "train_pass",
]

FLOOR_SHARE = 0.05  # a step's denominator is at least this share of its chunks


def acceptance_of(rollout: Rollout) -> Tensor:
    """Of each chunk, by the teacher: see `disagree.acceptance`."""
    r = rollout
    return acceptance(*map(torch.as_tensor, (r.student_logp_C, r.teacher_logp_C, r.scorable_C)))


def kept_of(rollout: Rollout, mask: str) -> Tensor:
    """What the mask compares with its random number, or threshold, 0 to 1 for each chunk.

    For `weighted` the agreement of both models; for others the acceptance, by the model that did not
    write the answer: a fixed one stands for the teacher's own, and the student accepts what it finds as likely.
    """
    r = rollout
    sides = (r.student_logp_C, r.teacher_logp_C)
    if mask == "weighted":
        return agreement(*map(torch.as_tensor, (*sides, r.scorable_C)))
    wrote, reads = sides if r.answer.on_policy else sides[::-1]
    return acceptance(*map(torch.as_tensor, (wrote, reads, r.scorable_C)))


def choose_chunks(
    rollouts: Sequence[Rollout], events: Events, config: Config, *, seed: int
) -> list[Array]:
    """The chunks to train; for `divergence` and `soft-or` those that `train_pass` picks from."""
    generator = torch.Generator().manual_seed(seed)
    comparable = [r.comparable_C(events, config.max_overhang) for r in rollouts]
    chosen = comparable
    if config.mask in KNOWN_BEFORE:
        test = partial(choose, where=config.mask, threshold=config.threshold, generator=generator)
        chosen = [
            test(kept_of(r, config.mask)).numpy() & can
            for r, can in zip(rollouts, comparable, strict=True)
        ]
    if config.where != "random":
        return chosen
    count = sum(n_trained(rollouts, chosen, config))
    drawn = replayed(count, torch.from_numpy(np.concatenate(comparable)), generator)
    return np.split(drawn.numpy(), np.cumsum([len(can) for can in comparable])[:-1])


def n_trained(rollouts: Sequence[Rollout], chosen: Sequence[Array], config: Config) -> list[int]:
    """How many chunks each micro-batch trains: those chosen, or the masks' fraction of them."""
    counts = [
        sum(int(chosen[i].sum()) for i in some)
        for some in micro_batches(rollouts, chosen, config.micro_batch)
    ]
    known = config.mask in KNOWN_BEFORE
    return counts if known else [budget(n, config.fraction) for n in counts]


def micro_batches(
    rollouts: Sequence[Rollout], chosen: Sequence[Array], size: int
) -> list[list[int]]:
    """Rollouts that have chosen chunks, longest first so that padding is small."""
    lengths = [n_inputs(r, mask) for r, mask in zip(rollouts, chosen, strict=True)]
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]


def n_inputs(rollout: Rollout, chosen_C: Array) -> int:
    """Tokens that the student must read for the chosen chunks, the prompt included; 0 for none."""
    needed = needed_states(rollout, chosen_C)
    return len(rollout.answer.prompt_ids) + needed - 1 if needed else 0


@dataclass(frozen=True)
class Pass:
    """`loss` in nats, a mean over the trained chunks (of at least 5 % of all); `work_saved` in 0 to 1.

    `trained`: the chunks that were trained, a bool mask per rollout.
    """

    loss: float
    work_saved: float
    trained: list[Array]


def chunk_weights(
    rollouts: Sequence[Rollout], chosen: Sequence[Array], config: Config
) -> list[Array] | None:
    """Of `weighted`, what the loss of each chosen chunk counts; None where all count the same."""
    if config.where != "weighted":
        return None
    return [
        weights(kept_of(r, config.where)).numpy()[mask]
        for r, mask in zip(rollouts, chosen, strict=True)
    ]


def chunk_weight(rollouts: Sequence[Rollout], chosen: Sequence[Array], config: Config) -> float:
    """1 / the trained chunks, or the sum of their weights: one denominator for the whole step."""
    n_chunks = sum(len(mask) for mask in chosen)
    counted = chunk_weights(rollouts, chosen, config)
    if counted is None:  # `random` has as many as the mask that it replays would train
        cut = n_trained(rollouts, chosen, config) if config.picks else map(np.sum, chosen)
        n_chosen = float(sum(cut))
    else:
        n_chosen = float(sum(part.sum() for part in counted))
    return 1 / max(n_chosen, FLOOR_SHARE * n_chunks, 1)


def train_pass(
    pair: Pair,
    rollouts: Sequence[Rollout],
    chosen: Sequence[Array],
    config: Config,
    *,
    weight: float | None = None,
) -> Pass:
    """Adds the gradient of the mean loss over the trained chunks to the student's parameters.

    Rows run to the last state that a chosen chunk needs; rows without one are left out; the head
    runs on the needed states alone. `divergence` and `soft-or` train the largest `--fraction` of each
    micro-batch's chosen chunks.

    Args:
        weight: of each chunk's loss, where these rollouts are only some of a step's.
    """
    weight = chunk_weight(rollouts, chosen, config) if weight is None else weight
    device, total = pair.student.decoder.device, 0.0
    heads = {
        "student_head": tempered(pair.student, config.student_temperature),
        "teacher_head": critic(pair.teacher, config.teacher_temperature),
    }
    trained = [np.zeros_like(mask) for mask in chosen]
    for some in micro_batches(rollouts, chosen, config.micro_batch):
        rows, masks = [rollouts[i] for i in some], [chosen[i] for i in some]
        lengths = [n_inputs(r, mask) for r, mask in zip(rows, masks, strict=True)]
        inputs = [
            [*r.answer.prompt_ids, *r.answer.ids][:n] for r, n in zip(rows, lengths, strict=True)
        ]
        said = [r.score.to(device) for r in rows]
        with precision(pair.student):
            hidden_BSD = pair.student.decoder(pad(inputs, device))
            student = [
                completion_states(hidden_SD, len(r.answer.prompt_ids), n - len(r.answer.prompt_ids))
                for hidden_SD, r, n in zip(hidden_BSD, rows, lengths, strict=True)
            ]
            places: dict[str, Any] = {
                "student_starts": starts_of(student),
                "teacher_starts": starts_of([one.hidden_MD for one in said]),
                "teacher_end_id": pair.teacher.end_id,
                "device": device,
            }
            states = torch.cat(student), what_was_said(said, pair.events)
            settings: dict[str, Any] = {**heads, "events": pair.events, "beta": config.beta}
            if config.picks:
                values = look(
                    *states, rows=pack(rows, masks, **places, starts_only=True), **settings
                )
                masks = pick(*values, masks, config)
            packed = pack(rows, masks, weights=chunk_weights(rows, masks, config), **places)
            loss = gold_loss(*states, rows=packed, **settings, weight=weight).total
        loss.backward()
        total += float(loss.detach())
        for i, mask in zip(some, masks, strict=True):
            trained[i] = mask
    return Pass(total, work_saved(pair.student, rollouts, chosen, trained), trained)


def what_was_said(scores: Sequence[Score], events: Events) -> Tensor | Listed | None:
    """What the loss compares with: the teacher's states, or what it lists, or chunks alone."""
    if events.kind == CHUNK:
        return None
    listed = [one.listed for one in scores if one.listed is not None]
    return Listed.join(listed) if listed else torch.cat([one.hidden_MD for one in scores])


def tempered(model: LanguageModel | Teacher, temperature: float) -> Any:
    """The model's head, its logits divided by a temperature; None if it is not in this process."""
    if not isinstance(model, LanguageModel):
        return None
    head = model.decoder.head
    return head if temperature == 1 else head._replace(temperature=temperature)


@dataclass(frozen=True)
class Critic:
    """The teacher's head in the teacher's own precision, whatever autocast the student is under."""

    head: Any

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            found: Tensor = self.head.logits(hidden)
        return found


def critic(teacher: Teacher, temperature: float) -> Any:
    """As `tempered`, for the loss."""
    head = tempered(teacher, temperature)
    return None if head is None else Critic(head)


def starts_of(parts: Sequence[Tensor]) -> list[int]:
    """Where each part starts when all are put end to end."""
    return [0, *np.cumsum([len(part) for part in parts])[:-1].tolist()]


def pick(loss_C: Tensor, entropy_C: Tensor, chosen: Sequence[Array], config: Config) -> list[Array]:
    """Of a micro-batch's chosen chunks (C of them) the largest `--fraction`, as masks per rollout.

    A loss that is not finite comes first: the step is to fail by it.
    """
    scores_C = loss_C if config.where == "divergence" else soft_or(entropy_C, loss_C)
    scores_C = torch.where(loss_C.isfinite(), scores_C.nan_to_num(), torch.inf)
    kept, picked = largest(scores_C, config.fraction).cpu().numpy(), []
    for mask in chosen:
        one = np.zeros_like(mask)
        one[mask], kept = kept[: mask.sum()], kept[mask.sum() :]
        picked.append(one)
    return picked


def work_saved(
    student: LanguageModel,
    rollouts: Sequence[Rollout],
    chosen: Sequence[Array],
    trained: Sequence[Array],
) -> float:
    """Share of the training pass's matrix products that the mask leaves out (attention aside).

    A backward pass is twice a forward pass, as much where a weight is frozen, and a forward pass more
    with checkpointing. Where fewer chunks are trained than were chosen, all chosen ones went through
    the head once before. Tokens are looked up in the embedding, which is no product.
    """
    decoder = student.decoder
    weight_VD, again = decoder.head.weight_VD, decoder.checkpointing
    head, head_pass = weight_VD.numel(), (2 + weight_VD.requires_grad) * weight_VD.numel()
    ends = {weight_VD.data_ptr(), decoder.embedding.weight.data_ptr()}
    layers = [p for p in decoder.parameters() if p.data_ptr() not in ends]
    body = sum((2 + again + p.requires_grad) * p.numel() for p in layers)
    spent = full = 0
    for r, looked, mask in zip(rollouts, chosen, trained, strict=True):
        every, heads = np.ones(len(mask), dtype=bool), head_rows(r)
        seen = 0 if np.array_equal(looked, mask) else int(heads[looked].sum())
        spent += body * n_inputs(r, looked) + head_pass * int(heads[mask].sum()) + head * seen
        full += body * n_inputs(r, every) + head_pass * int(heads.sum())
    return 1 - spent / full if full else 0.0
