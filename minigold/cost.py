# SPDX-License-Identifier: Apache-2.0
"""The sizes of a run in, parameters, bytes, operations and a floor of time out: before it starts.

Formulas over two `ModelConfig`s and a few numbers; nothing is allocated or measured here, and no
weight is read. They count what the code of the other files does: each names the tensors that it
adds up. `docs/performance.md` shows how close they come.

Letters beside the common ones: M width of the MLP (`mlp_width`), Q width of all queries, K width of
all keys. Bytes are those of tensors: Python, tokenizers and torch itself come on top.
Not here: rows of fixed answers, which the student reads too (`--lmbda`); the answers that the teacher
reads once more for other paths, into a cache of a micro-batch's rows (2 L K numbers a token).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

from minigold.loss import BLOCK as LOSS_BLOCK
from minigold.model import MATRICES, ModelConfig
from minigold.packed import PACK_FROM, PACKS
from minigold.sample import AT_ONCE, LOOK
from minigold.teacher import BLOCK as READ_BLOCK

__all__ = [
    "Rates",
    "Sizes",
    "Work",
    "adapter_parameters",
    "floor_seconds",
    "layer_saved_bytes",
    "matrix_parameters",
    "memory",
    "parameters",
    "peak",
    "saved_bytes",
    "training_operations",
    "work",
]

WIDE = 4  # bytes of float32

Parts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a step is made of. Lengths are tokens of the longest row, all rows being that long.

    Args:
        student_ids, teacher_ids: ids that the heads give logits for; at most `vocab_size`.
        n_events: common events; at most the smaller of the two.
        rows: answers a step; `micro_batch` of them in one pass.
        prompt, completion, teacher_prompt, teacher_completion: tokens a row.
        chunks, head_rows: of all rows; chunks compared, and predictions of the student read for
            them (at most all tokens of its answers, and one more a chunk).
        lora_rank, lora_targets: of the student's adapter, if that is trained.
        checkpointing: its layers run again in the backward pass.
        nucleus: top-p is on.
        cuda: the student runs in bfloat16 with weights in float32, norms are one kernel.
        teacher_bytes: of one of its weights.
    """

    student: ModelConfig
    teacher: ModelConfig
    student_ids: int
    teacher_ids: int
    n_events: int
    rows: int
    micro_batch: int
    prompt: int
    completion: int
    teacher_prompt: int
    teacher_completion: int
    chunks: int
    head_rows: int
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    checkpointing: bool = False
    nucleus: bool = False
    cuda: bool = False
    teacher_bytes: int = WIDE

    @property
    def passes(self) -> int:
        """Micro-batches a step."""
        return ceil(self.rows / self.micro_batch)

    @property
    def pass_rows(self) -> int:
        """Rows of the first of them."""
        return min(self.rows, self.micro_batch)

    @property
    def narrow(self) -> int:
        """Bytes of what the student's matrices take and give."""
        return 2 if self.cuda else WIDE

    @property
    def adapter(self) -> int:
        """Parameters of the student's adapter, 0 without one."""
        return adapter_parameters(self.student, self.lora_rank, self.lora_targets)

    @property
    def trained(self) -> int:
        """Parameters that have gradients and moments."""
        return self.adapter or parameters(self.student)


class Work(NamedTuple):
    """Floating-point operations of matrix products (a product and a sum are two), bytes moved."""

    operations: int
    bytes: int


class Rates(NamedTuple):
    """Of a machine: operations a second in matrix products, bytes a second read from memory."""

    operations: float
    bytes: float


# -- parameters ----------------------------------------------------------------------------------


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of all linear layers, the head and the embedding left out.

    L (2 D Q + 2 D K + 3 D M): queries and output, keys and values, the MLP.
    """
    d, m = config.width, config.mlp_width
    return config.n_layers * (2 * d * _queries(config) + 2 * d * _keys(config) + 3 * d * m)


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """What goes into and out of each linear layer; the sizes of `MATRICES`."""
    d, m, q, k = config.width, config.mlp_width, _queries(config), _keys(config)
    sizes = (d, q), (d, k), (d, k), (q, d), (d, m), (d, m), (m, d)
    return dict(zip(MATRICES, sizes, strict=True))


def adapter_parameters(config: ModelConfig, rank: int, targets: Collection[str]) -> int:
    """L rank (in + out) of each layer that has an adapter."""
    sizes = (size for name, size in _matrices(config).items() if name in targets)
    return config.n_layers * rank * sum(map(sum, sizes))


def parameters(config: ModelConfig) -> int:
    """All of a decoder: matrices, embedding, head where it is its own, norms and biases."""
    d, m, q, k = config.width, config.mlp_width, _queries(config), _keys(config)
    norms = (4 if config.is_gemma else 2) * d + 2 * config.head_width * _norms_heads(config)
    biases = config.qkv_bias * (q + 2 * k) + config.output_bias * d + config.mlp_bias * (2 * m + d)
    tables = config.vocab_size * d * (1 if config.tied else 2)
    return tables + matrix_parameters(config) + config.n_layers * (norms + biases) + d


def _queries(config: ModelConfig) -> int:
    return config.n_heads * config.head_width


def _keys(config: ModelConfig) -> int:
    return config.n_kv_heads * config.head_width


def _norms_heads(config: ModelConfig) -> bool:
    return config.family in ("qwen3", "gemma3_text")


# -- bytes ---------------------------------------------------------------------------------------


def saved_bytes(
    config: ModelConfig,
    rows: int,
    length: int,
    *,
    cuda: bool = False,
    lora_rank: int = 0,
    lora_targets: Collection[str] = (),
    checkpointing: bool = False,
) -> int:
    """Bytes that autograd keeps of a forward pass over `rows` rows of `length` tokens.

    Of the layers see `layer_saved_bytes`; with checkpointing a layer's input alone. Once a pass: the
    last norm (beside an adapter the first norm keeps nothing), ids, rotations, and the mask of sliding
    layers whose window is shorter than the row.
    """
    d, kept = config.width, 1 if cuda or lora_rank else 2
    last = WIDE * (kept * d + 1)
    once = rows * length * (0 if lora_rank else last + 8)  # the last norm, and the id
    if checkpointing:
        layers = config.n_layers * rows * length * WIDE * d
        once += rows * length * last * (lora_rank > 0)
    else:
        layers = sum(
            layer_saved_bytes(
                config, rows, length,
                sliding=sliding, cuda=cuda, lora_rank=lora_rank, lora_targets=lora_targets,
            )
            for sliding in config.sliding
        )  # fmt: skip
    kinds = len({x for x, rotary in zip(config.sliding, config.rotary, strict=True) if rotary})
    once += kinds * 2 * length * config.head_width * WIDE
    if any(config.sliding) and length > config.window:
        once += length**2
    return layers + once


def layer_saved_bytes(
    config: ModelConfig,
    rows: int,
    length: int,
    *,
    sliding: bool,
    cuda: bool = False,
    lora_rank: int = 0,
    lora_targets: Collection[str] = (),
) -> int:
    """Of one layer, its input included.

    A token: a norm keeps its input and, unless it is one kernel, the scaled input, and the root; the
    matrices keep the norms' outputs; attention its queries, keys, values, output and the logarithm of
    its sums, but no table of scores; the MLP four tensors of width M (what the gate gave, before and
    after the activation; what `up_proj` gave; their product). Norms of heads and Gemma's norms after
    the blocks keep their inputs alike. A window that is shorter than the row needs its mask, in
    float32, and on CUDA keys and values for each query's head beside it. With an adapter a frozen norm
    keeps its input and the root, and of what goes into the matrices stays what goes into adapters too,
    beside what is between their two matrices.
    """
    d, m, q, k = config.width, config.mlp_width, _queries(config), _keys(config)
    h, g = config.n_heads, config.n_kv_heads
    kept = 1 if cuda or lora_rank else 2  # of a norm's width
    wide = (4 if config.is_gemma else 2) * (kept * d + 1) + h
    if _norms_heads(config):
        wide += kept * (q + k) + h + g
    narrow = 2 * d + 2 * q + 2 * k + 4 * m
    masked = sliding and length > config.window
    narrow += 2 * (q - k) * (cuda and masked)
    if lora_rank:
        for some, size in ((MATRICES[:3], d), (MATRICES[4:6], d), (MATRICES[6:], m)):
            narrow -= size * set(some).isdisjoint(lora_targets)
        narrow += lora_rank * len(lora_targets)
    mask = WIDE * length**2 if masked else 0
    return rows * length * (WIDE * wide + (2 if cuda else WIDE) * narrow) + mask


def _layer_bytes(config: ModelConfig, tokens: int, size: int) -> int:
    """Bytes of a layer that passes without gradients, at its fullest.

    The MLP: the residual three times, what the norm gave, and three of width M. Attention: queries
    being rotated are there four times, beside keys and values.
    """
    d, q, k = config.width, _queries(config), _keys(config)
    return size * tokens * max(4 * d + 3 * config.mlp_width, 2 * d + 4 * q + 2 * k)


def _kept_states(s: Sizes) -> int:
    """The teacher's states of all answers of a step: rows (T + 1) D."""
    return s.rows * (s.teacher_completion + 1) * s.teacher.width * s.teacher_bytes


def _standing(s: Sizes) -> Parts:
    """What is there in every stage from the second step on; the last step's rollouts too."""
    return {
        "student weights": WIDE * (parameters(s.student) + s.adapter),
        "AdamW": 2 * WIDE * s.trained,
        "teacher weights": s.teacher_bytes * parameters(s.teacher),
        "teacher's states of the step before": _kept_states(s),
        "maps to events": 49 * (s.student_ids + s.teacher_ids),  # six tables, see `events.Side`
    }


def _copies(s: Sizes) -> Parts:
    """The student's matrices in bfloat16, which autocast makes of them and keeps."""
    head = s.student_ids * s.student.width
    return {"matrices in bfloat16": 2 * (matrix_parameters(s.student) + head)} if s.cuda else {}


def _packed(s: Sizes) -> Parts:
    """The student's matrices once more, in the layout for decoding on a CPU."""
    used = PACKS and not s.cuda and s.completion >= PACK_FROM
    head = s.student_ids * s.student.width
    return {"packed matrices": WIDE * (matrix_parameters(s.student) + head)} if used else {}


def _sampling(s: Sizes) -> Parts:
    c, length = s.student, s.prompt + s.completion
    cached = 2 * c.n_layers * _keys(c) * s.narrow  # a token
    # a step's logits and probabilities, and both again for the measures of some steps; top-p sorts
    look = LOOK["cuda" if s.cuda else "cpu"]
    logits = s.rows * s.student_ids * max(8 + 8 * look, 44 * s.nucleus)
    reading = min(s.rows * s.prompt, max(AT_ONCE, s.prompt))  # in a cache of their own
    return {
        "KV cache": cached * s.rows * length,
        **_copies(s),
        **_packed(s),
        "logits of a sampling step": logits,
        "prompts in passing": max(
            0, _layer_bytes(c, reading, s.narrow) + cached * reading - logits
        ),
    }


def _reading(s: Sizes) -> Parts:
    c, length = s.teacher, s.teacher_prompt + s.teacher_completion
    tokens = s.pass_rows * length
    passing = _layer_bytes(c, tokens, s.teacher_bytes) + tokens * c.width * s.teacher_bytes
    block = READ_BLOCK * s.teacher_ids * WIDE * (2 if c.softcap is None else 4)
    return {
        "teacher's states": _kept_states(s),
        "logits of a block": block,
        "a layer in passing": max(0, passing - block),
    }


def _loss_block(s: Sizes) -> int:
    """Logits, laws and their gradients of `LOSS_BLOCK` chunks at their fullest.

    Forward: the student's logits and probabilities, the teacher's two, three laws over the events.
    Backward: the student's two, their gradient, and that of the chunks' first rows before it is
    padded; five laws.
    """
    of_pass = ceil(s.chunks * s.pass_rows / s.rows)
    chunks = min(LOSS_BLOCK, of_pass)
    rows = ceil(chunks * s.head_rows / max(1, s.chunks))
    own, first, laws = rows * s.student_ids, chunks * s.student_ids, chunks * (s.n_events + 2)
    return WIDE * max(2 * own + 2 * chunks * s.teacher_ids + 3 * laws, 3 * own + first + 5 * laws)


def _training(s: Sizes) -> Parts:
    c, n = s.student, s.trained
    length, whole = s.prompt + s.completion - 1, not s.adapter
    table, head = whole * WIDE * c.vocab_size * c.width, whole * WIDE * s.student_ids * c.width
    padded = table if s.student_ids < c.vocab_size else 0  # the slice's gradient is a whole table
    share = s.pass_rows / s.rows
    own = ceil(WIDE * share * s.head_rows * c.width)  # states that the loss reads, their gradient
    kept: dict[str, Any] = {
        "cuda": s.cuda, "lora_rank": s.lora_rank, "lora_targets": s.lora_targets,
    }  # fmt: skip
    activations = saved_bytes(c, s.pass_rows, length, **kept, checkpointing=s.checkpointing)
    activations += WIDE * s.pass_rows * length * c.width  # what the decoder gave
    before = WIDE * n if s.passes > 1 else 0  # gradients of earlier micro-batches
    backward = s.narrow * s.pass_rows * length * (3 * c.mlp_width + 2 * c.width)
    if s.checkpointing:  # a layer is there once more
        backward += layer_saved_bytes(c, s.pass_rows, length, sliding=any(c.sliding), **kept)
    first = {
        "gradients": before,
        "activations": activations,
        **_copies(s),
        "states at the loss": 2 * own + ceil(share * _kept_states(s)),
        "head's gradient": head,
        "loss block": max(_loss_block(s), padded, backward),
    }
    # at the end of the backward pass: the table's gradient of each use, and that of earlier passes
    tables = bool(before) + c.tied * (1 + bool(padded))
    last = {"gradients": WIDE * n, "tables' gradients": tables * table}
    return max(first, last, key=lambda parts: sum(parts.values()))


def _stepping(s: Sizes) -> Parts:
    return {"gradients": WIDE * s.trained}  # AdamW is one kernel


def memory(s: Sizes) -> dict[str, Parts]:
    """Bytes by kind at the fullest moment of each stage of a step, the second one or a later."""
    standing, states = _standing(s), {"teacher's states": _kept_states(s)}
    return {
        "sampling": {**standing, **_sampling(s)},
        "teacher": {**standing, **_reading(s)},
        "training": {**standing, **states, **_training(s)},
        "optimizer": {**standing, **states, **_stepping(s)},
    }


def peak(s: Sizes) -> tuple[str, Parts]:
    """The stage that needs most, and its parts."""
    return max(memory(s).items(), key=lambda item: sum(item[1].values()))


# -- operations and bytes moved ------------------------------------------------------------------


def _pairs(length: int) -> int:
    """Queries times the keys that they see: of the others the kernel leaves whole blocks out."""
    return length * (length + 1) // 2


def _forward_operations(config: ModelConfig, rows: int, length: int, *, pairs: int) -> int:
    """Of the layers: 2 a weight and token, and 4 Q a layer and pair (scores, and what they mix)."""
    layers = 2 * matrix_parameters(config) * rows * length
    return layers + 4 * _queries(config) * config.n_layers * rows * pairs


def training_operations(s: Sizes, *, pairs: int | None = None) -> int:
    """A backward pass is twice a forward pass (attention: 2.5 times, the scores are made again).

    The student's head does 6 V D a prediction, the teacher's 2 W D a chunk. What is frozen has no
    gradient of its own, 4 in place of 6; beside an adapter the first layer hands none on. With
    checkpointing the layers' forward pass is there twice, but for its last product.
    """
    c, length = s.student, s.prompt + s.completion - 1
    pairs = _pairs(length) if pairs is None else pairs
    layers = 3 * 2 * matrix_parameters(c) * s.rows * length
    layers += 14 * _queries(c) * c.n_layers * s.rows * pairs
    heads = 6 * s.head_rows * s.student_ids * c.width
    if s.adapter:
        layers += (6 * s.adapter - 2 * matrix_parameters(c)) * s.rows * length
        layers -= s.rows * _not_handed_on(s, length, pairs)
        heads -= 2 * s.head_rows * s.student_ids * c.width
    if s.checkpointing:
        again = 2 * (matrix_parameters(c) + s.adapter - c.n_layers * _last_product(s))
        layers += again * s.rows * length + 4 * _queries(c) * c.n_layers * s.rows * pairs
    return layers + heads + 2 * s.chunks * s.teacher_ids * s.teacher.width


def _last_product(s: Sizes) -> int:
    """Weights of a layer's last product, if nothing after it keeps what it gives."""
    if s.student.is_gemma:
        return 0
    n_in, n_out = _matrices(s.student)["down_proj"]
    return s.lora_rank * n_out if "down_proj" in s.lora_targets else n_in * n_out


def _not_handed_on(s: Sizes, length: int, pairs: int) -> int:
    """Operations a row that are not done in the first layer: nothing before its adapters is trained."""
    c, sizes = s.student, _matrices(s.student)
    groups = MATRICES[:3], MATRICES[3:4], MATRICES[4:6], MATRICES[6:]  # in the order of their use
    first = next(i for i, some in enumerate(groups) if not set(some).isdisjoint(s.lora_targets))
    upto = sum(sizes[x][0] * sizes[x][1] for some in groups[: first + 1] for x in some)
    own = sum(s.lora_rank * sizes[x][0] for x in groups[first] if x in s.lora_targets)
    return 2 * (upto + own) * length + 10 * _queries(c) * pairs * (first > 0)


def work(s: Sizes) -> dict[str, Work]:
    """Of each stage of a step.

    Bytes are the weights each time that they are read, and the KV cache; those of activations are
    left out: they make time longer than the floor. The head's weights are read for each block.
    """
    own, other, whole = s.student, s.teacher, not s.adapter
    head, t_head = s.student_ids * own.width, s.teacher_ids * other.width
    body, t_body = matrix_parameters(own) + s.adapter, matrix_parameters(other)
    steps, t_length = s.completion - 1, s.teacher_prompt + s.teacher_completion
    seen = steps * s.prompt + steps * (steps + 1) // 2  # keys of all steps of a row
    decoding = s.rows * (2 * body * steps + 4 * _queries(own) * own.n_layers * seen)
    prefill = _forward_operations(own, s.rows, s.prompt, pairs=_pairs(s.prompt))
    prefill += 2 * s.adapter * s.rows * s.prompt
    cached = 2 * s.narrow * _keys(own) * own.n_layers * s.rows * seen
    reading = _forward_operations(other, s.rows, t_length, pairs=_pairs(t_length))
    t_states = s.rows * (s.teacher_completion + 1)
    t_blocks = s.rows * ceil((s.teacher_completion + 1) / READ_BLOCK)
    blocks = s.passes * ceil(s.chunks / s.passes / LOSS_BLOCK)
    return {
        "sampling": Work(
            prefill + decoding + 2 * s.rows * s.completion * head,
            s.narrow * (body * s.completion + head * s.completion) + cached,
        ),
        "teacher": Work(
            reading + 2 * t_states * t_head,
            s.teacher_bytes * (t_body * s.passes + t_head * t_blocks),
        ),
        # matrices: read twice (checkpointing: thrice), their gradient written unless they are frozen;
        # heads: for each block
        "training": Work(
            training_operations(s),
            ((2 + s.checkpointing) * s.narrow * body + WIDE * (s.adapter or body)) * s.passes
            + (2 * s.narrow + 2 * WIDE * whole) * head * blocks
            + s.teacher_bytes * t_head * blocks,
        ),
        # norm and clipping: 3; weight, gradient and moments are read, all but the gradient written
        "optimizer": Work(0, 10 * WIDE * s.trained),
    }


def floor_seconds(one: Work, rates: Rates) -> float:
    """No machine with these rates does it in less: the longer of computing and moving."""
    return max(one.operations / rates.operations, one.bytes / rates.bytes)
