# SPDX-License-Identifier: Apache-2.0
"""Two models without weights and prompts in, what a run would cost out: before it starts.

Where it stands: `cli.py` asks for it in place of `train.distill`. The same checks are made as there.
The formulas are in `cost.py`; here stand the sizes that they are given and the machine's rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch

from minigold import cost
from minigold.chat import prompt_ids
from minigold.config import Config
from minigold.cost import Rates, Sizes
from minigold.data import Message, Prompt
from minigold.load import LanguageModel
from minigold.model import Decoder, ModelConfig
from minigold.pair import Pair, make_pair
from minigold.train import check_adapter, check_eval_prompts, check_prompts

__all__ = ["estimate", "measure_rates", "sizes_of", "told"]

SECONDS = 0.3  # of measuring a rate
PARTS_SHOWN = 5


def estimate(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    eval_prompts: Sequence[Prompt] = (),
) -> dict[str, Any]:
    """Parameters, peak memory, operations and the floor of a step's time, as plain data.

    Args:
        student, teacher: their weights may be on the meta device.
        device, dtype: where the run would be, and the type of the teacher's weights.
        eval_prompts: checked only; evaluation holds no gradients, but its prompts may be longer.

    Raises:
        ValueError: as `train.distill`.
    """
    check_adapter(student, config)
    pair = make_pair(student, teacher, events=config.events)
    check_prompts(prompts, pair, config, device=device)
    check_eval_prompts(eval_prompts, pair, config, device=device)
    sizes = sizes_of(pair, prompts, config, device=device, dtype=dtype)
    own = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = {one: measure_rates(device, one) for one in {own, dtype}}
    stages, done = cost.memory(sizes), cost.work(sizes)
    fullest, parts = cost.peak(sizes)
    floor = {
        stage: cost.floor_seconds(one, rates[dtype if stage == "teacher" else own])
        for stage, one in done.items()
    }
    return {
        "student_parameters": cost.parameters(sizes.student),
        "trained_parameters": sizes.trained,
        "teacher_parameters": cost.parameters(sizes.teacher),
        "teacher_dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "prompts": len(prompts),
        "prompt_tokens": sum(
            len(prompt_ids(student, p.prompt, plain=config.student_plain)) for p in prompts
        ),
        "longest_prompt": sizes.prompt,
        "rows": sizes.rows,
        "student_tokens": sizes.rows * sizes.completion,
        "teacher_tokens": sizes.rows * sizes.teacher_completion,
        "peak_memory_gib": sum(parts.values()) / 2**30,
        "peak_stage": fullest,
        "peak_parts_gib": {name: n / 2**30 for name, n in parts.items()},
        "memory_gib": {stage: sum(some.values()) / 2**30 for stage, some in stages.items()},
        "operations": {stage: one.operations for stage, one in done.items()},
        "bytes": {stage: one.bytes for stage, one in done.items()},
        "operations_per_second": rates[own].operations,
        "bytes_per_second": rates[own].bytes,
        "floor_seconds": floor,
        "floor_seconds_step": sum(floor.values()),
    }


def _shape(model: LanguageModel) -> ModelConfig:
    if isinstance(model.decoder, Decoder):
        return model.decoder.config
    raise ValueError(
        f"expected models that minigold loads for a dry run, got {model.name}, a module of transformers"
    )


def sizes_of(
    pair: Pair, prompts: Sequence[Prompt], config: Config, *, device: torch.device,
    dtype: torch.dtype,
) -> Sizes:  # fmt: skip
    """The largest step: every row as long as the longest prompt and `max_new_tokens` make it.

    All chunks are compared (a mask may leave out most). How many teacher tokens the student's are
    is not known before; it is taken from the text of the prompts.
    """
    assert isinstance(pair.teacher, LanguageModel)
    plain = {"student": config.student_plain, "teacher": config.teacher_plain}
    read = [p.prompt if p.teacher_prompt is None else p.teacher_prompt for p in prompts]
    lengths = [len(prompt_ids(pair.student, p.prompt, plain=plain["student"])) for p in prompts]
    t_lengths = [len(prompt_ids(pair.teacher, one, plain=plain["teacher"])) for one in read]
    rows, new = config.batch_size * config.rollouts, config.max_new_tokens
    t_new = ceil(new * _teacher_tokens_a_token(pair, prompts))
    return Sizes(
        student=_shape(pair.student),
        teacher=_shape(pair.teacher),
        student_ids=pair.student.n_tokens,
        teacher_ids=pair.teacher.n_tokens,
        n_events=pair.events.n_events,
        rows=rows,
        micro_batch=config.micro_batch,
        prompt=max(lengths),
        completion=new,
        teacher_prompt=max(t_lengths),
        teacher_completion=t_new,
        chunks=rows * min(new, t_new),
        head_rows=rows * new,
        lora_rank=config.lora_rank,
        lora_targets=config.adapted,
        checkpointing=config.gradient_checkpointing,
        nucleus=config.top_p < 1,
        cuda=device.type == "cuda",
        teacher_bytes=dtype.itemsize,
    )


def _teacher_tokens_a_token(pair: Pair, prompts: Sequence[Prompt]) -> float:
    """How many tokens of the teacher one of the student's is, in the text of the prompts."""
    texts = [_text(p.prompt) + (p.completion or "") for p in prompts]
    own, other = (
        sum(len(one.ids) for one in model.tokenizer.encode_batch(texts, add_special_tokens=False))
        for model in (pair.student, pair.teacher)
    )
    return other / own if own and other else 1.0


def _text(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "".join(str(message.get("content") or "") for message in prompt)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Operations a second in products of matrices of this type, bytes a second read; the best seen.

    In less than a second, with 70 MB of memory, on a GPU 370.
    """
    side = 4096 if device.type == "cuda" else 768
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    long = torch.ones(
        2**24 if device.type == "cpu" else 2**26, device=device
    )  # zeros may share a page

    def best(run: Callable[[], Any]) -> float:
        stop, fastest = time.perf_counter() + SECONDS, float("inf")
        while time.perf_counter() < stop:
            started = time.perf_counter()
            run()
            fastest = min(fastest, time.perf_counter() - started)
        return fastest

    def product() -> float:
        return float((a @ b)[0, 0])  # a number, so that the device has finished

    return Rates(2 * side**3 / best(product), 4 * len(long) / best(lambda: float(long.sum())))


def told(figures: dict[str, Any]) -> str:
    """What `estimate` found, as lines for a person."""
    f, parts = figures, sorted(figures["peak_parts_gib"].items(), key=lambda item: -item[1])
    parts = [*parts[:PARTS_SHOWN], ("the rest", sum(size for _, size in parts[PARTS_SHOWN:]))]
    lines = [
        f"student      {f['student_parameters']:,} parameters, float32, {f['trained_parameters']:,} trained",
        f"teacher      {f['teacher_parameters']:,} parameters, {f['teacher_dtype']}",
        f"prompts      {f['prompts']:,}, {f['prompt_tokens']:,} tokens, the longest {f['longest_prompt']:,}",
        (
            f"a step       {f['rows']:,} answers, {f['student_tokens']:,} tokens if none ends by itself, "
            f"about {f['teacher_tokens']:,} of the teacher's"
        ),
        (
            f"peak memory  {f['peak_memory_gib']:.3f} GiB of tensors on {f['device']} (stage: "
            f"{f['peak_stage']}), of it"
        ),
    ]
    lines += [f"{size:12.3f} GiB {name}" for name, size in parts]
    lines.append(
        f"time         {f['floor_seconds_step']:.3g} s a step at least, with "
        f"{f['operations_per_second'] / 1e9:,.0f} billion operations and "
        f"{f['bytes_per_second'] / 1e9:,.0f} GB read a second as measured here, of it"
    )
    lines += [
        f"{seconds:12.3g} s   {stage}: {f['operations'][stage] / 1e9:,.4g} billion operations, "
        f"{f['bytes'][stage] / 1e9:,.4g} GB"
        for stage, seconds in f["floor_seconds"].items()
    ]
    return "\n".join(lines)
