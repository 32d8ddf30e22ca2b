# SPDX-License-Identifier: Apache-2.0
"""`minigold train` on several GPUs: the student's weights, gradients and moments cut up by FSDP2.

    torchrun --nproc-per-node 8 examples/torchrun_fsdp2.py \
        --teacher T --student S --prompts P.jsonl --out RUN [options of minigold train]

Each process (rank) answers its share of a step's rows. Seeds, masks, counts and numbers are those of
the whole step, so that a run is that of one process but for rounding; RUN gets metrics.jsonl,
samples.jsonl and final/. The teacher is whole in each process, or a server.
Not here: checkpoints, evaluation, adapters, CUDA graphs, and the masks divergence and soft-or, which
pick within a micro-batch: other micro-batches would pick others. Numbers that are not finite end the run.
Needs torch 2.8 or later (`set_reshard_after_forward`); tried with 2.13 on CPUs, not on GPUs yet.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from minigold import metrics as measured
from minigold.batch import Rollout
from minigold.checkpoint import check_out
from minigold.cli import step_line
from minigold.cli_models import find_device, find_dtype
from minigold.cli_teacher import open_teacher, teacher_options
from minigold.config import Config, option_name
from minigold.data import Prompt, read_prompts
from minigold.load import load
from minigold.masked import (
    acceptance_of,
    choose_chunks,
    chunk_weight,
    micro_batches,
    train_pass,
    work_saved,
)
from minigold.model import Decoder
from minigold.pair import Pair, make_pair
from minigold.rollout import MASK, collect, precision, sample_answers, seeds_of
from minigold.score import check_kept
from minigold.tiers import check_tier
from minigold.train import (
    Step,
    adamw,
    batches_of,
    check_prompts,
    choose_trained,
    learning_rate,
    trained_weights,
)
from minigold.weights import save_decoder

ABSENT = ("lora_rank", "lora_alpha", "lora_targets", "cuda_graphs", "log_every", "eval_every",
          "best_by", "save_every", "keep", "patience")  # fmt: skip


def shard(decoder: Decoder, device: torch.device) -> None:
    """Each layer is a unit that is put together while it runs; the root holds table, norm and head.

    minigold's loss takes the head as a matrix, outside of any `forward`: so the root stays whole from
    its first use in a step until `reshard`, just before the optimizer.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=False)
    decoder.set_reshard_after_backward(False, recurse=False)


@contextmanager
def whole(decoder: Decoder) -> Iterator[None]:
    """All weights are on every rank: no forward pass waits for others, whose number may differ."""
    units = [one for one in decoder.modules() if isinstance(one, FSDPModule)]
    decoder.set_reshard_after_forward(False)
    for unit in units:
        unit.unshard()
    yield
    for layer in decoder.model.layers:
        layer.set_reshard_after_forward(True)
        layer.reshard()


def gathered(own: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts of all ranks in the order of the rows, without the teacher's states."""
    bare = [replace(r, score=replace(r.score, hidden_MD=r.score.hidden_MD[:0].cpu())) for r in own]
    parts: list[list[Rollout]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, bare)
    return [r for part in parts for r in part]


def empty_pass(pair: Pair) -> None:
    """What a rank does while others still have micro-batches: the same collectives, gradients of 0."""
    decoder = pair.student.decoder
    with precision(pair.student):
        hidden_BSD = decoder(torch.zeros(1, 1, dtype=torch.int64, device=decoder.device))
        nothing = 0 * (hidden_BSD.sum() + decoder.head.weight_VD.sum())
    nothing.backward()


def take_step(
    pair: Pair,
    optimizer: torch.optim.Optimizer,
    batch: list[Prompt],
    config: Config,
    *,
    number: int,
) -> Step:
    """`minigold.train.take_step`, on this rank's share of the rows."""
    decoder, n, world = pair.student.decoder, len(batch) * config.rollouts, dist.get_world_size()
    parts = [slice(n * rank // world, n * (rank + 1) // world) for rank in range(world)]
    mine, clock = parts[dist.get_rank()], [time.perf_counter()]
    with whole(decoder):
        answers, student_side = sample_answers(pair, batch, config, number=number, part=mine)
        clock.append(time.perf_counter())
        own = collect(pair, answers, student_side, config)
    rollouts = gathered(own)
    seed = seeds_of(config.seed, number, MASK, 1)[0]
    chosen = choose_chunks(rollouts, pair.events, config, seed=seed)
    clock.append(time.perf_counter())
    weight = world * chunk_weight(rollouts, chosen, config)  # FSDP2 divides the sum by the ranks
    result = train_pass(pair, own, chosen[mine], config, weight=weight)
    passes = [
        len(micro_batches(rollouts[part], chosen[part], config.micro_batch)) for part in parts
    ]
    for _ in range(max(passes) - passes[dist.get_rank()]):
        empty_pass(pair)
    saved = work_saved(pair.student, rollouts, chosen, chosen)
    decoder.reshard()  # else the optimizer's new weights would not be seen
    total = torch.tensor(result.loss / world, dtype=torch.float64, device=decoder.device)
    dist.all_reduce(total)
    loss, norm = float(total), 0.0
    if max(passes):
        parameters = trained_weights(decoder)
        norm = float(
            torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf).full_tensor()
        )
        if not math.isfinite(norm + loss):
            raise FloatingPointError(
                f"step {number}: expected a finite loss and gradient, got a loss of {loss} and a gradient "
                f"norm of {norm}; begin again with a lower --lr"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    clock.append(time.perf_counter())
    numbers = measured.step_metrics(
        rollouts,
        chosen,
        config,
        loss=loss,
        work_saved=saved,
        clock=clock,
        device=pair.student.decoder.device,
    )
    extra = {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "ranks": world}
    row = measured.plain({"step": number, **numbers, **extra})
    accepted = [acceptance_of(r).numpy() for r in rollouts]
    return Step(row, rollouts, accepted, chosen)


def save(pair: Pair, folder: Path) -> None:
    """A folder that `transformers` and minigold load; put together on the CPU of rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(pair.student.decoder, options=options)
    if dist.get_rank() == 0:
        with torch.device("meta"):
            decoder = Decoder(pair.student.decoder.config)
        decoder.load_state_dict(weights, assign=True)
        base = (pair.student.base or ("", None))[1]
        save_decoder(decoder, folder, source=pair.student.folder, base=base)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    teacher_options(parser, "Hugging Face folder or hub name")
    parser.add_argument("--student", required=True)
    parser.add_argument("--prompts", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, help="new or empty folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    for f in fields(Config):
        if f.name not in ABSENT:
            kind = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
            parser.add_argument(
                option_name(f.name), default=f.default, help=f.metadata["help"], **kind
            )
    return parser


def distill(args: argparse.Namespace, device: torch.device) -> None:
    """`minigold.distill` over all ranks."""
    config = Config(
        **{f.name: getattr(args, f.name) for f in fields(Config) if f.name not in ABSENT}
    )
    rows = config.batch_size * config.rollouts
    if config.picks or rows < dist.get_world_size():
        raise ValueError(
            f"expected a mask other than divergence and soft-or, and at least one row a step for each of "
            f"{dist.get_world_size()} ranks, got {config.where} and {rows} rows; use --where weighted or "
            "a larger --batch-size"
        )
    prompts, first = read_prompts(args.prompts), dist.get_rank() == 0
    teacher = open_teacher(args, device=device, dtype=find_dtype(args.dtype, device))
    check_tier(teacher, config)
    pair = make_pair(load(args.student, device=device), teacher, events=config.events)
    check_prompts(prompts, pair, config)
    check_kept(pair, prompts, config)
    decoder = pair.student.decoder
    decoder.checkpointing = config.gradient_checkpointing
    choose_trained(pair.student, config)
    shard(decoder.train(), device)
    optimizer = adamw(decoder, config)
    for number, batch in enumerate(islice(batches_of(prompts, config), config.steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, config)
        step = take_step(pair, optimizer, batch, config, number=number)
        if first:
            args.out.mkdir(parents=True, exist_ok=True)
            for name, lines in (
                ("metrics", [step.metrics]),
                ("samples", measured.sample_rows(number, step, pair)),
            ):
                with (args.out / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
            print(step_line(step.metrics, config.steps), flush=True)
    save(pair, args.out / "final")


def main(argv: Sequence[str] | None = None) -> int:
    args = options().parse_args(argv)
    check_out(args.out)
    cuda = args.device == "cuda"
    device = find_device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        distill(args, device)
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
