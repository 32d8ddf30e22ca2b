# SPDX-License-Identifier: Apache-2.0
"""A whole training step beside TRL's GOLD trainer, and its parts beside `transformers`.

Parts (`--parts`, all of them by default):

- `sample`: tokens a second of SmolLM2-135M in float32 beside `generate`, at batch 1, 8 and 32. A
  step of decoding reads all weights once; the time that takes, by the bandwidth at which a tensor
  of their size is summed in the same run, is the floor, and the share of it that is reached is
  printed. The cache of keys and values is not counted. Beside it: the matrix products of the same
  steps alone, which no sampler on top of them can beat.
- `passes`: forward and backward of the same model, next-token cross entropy at all positions, and
  at a fifth of them, drawn at random: minigold then runs up to the last one and gives them alone to
  the head, `transformers` has no such choice and makes all logits.
- `pair`: the stages of a step of a real pair (Gemma-3-270M teaches SmolLM2-135M-Instruct), what
  alignment takes of it, and the share of chunks that the default mask trains.
- `step`: a whole step of minigold and of `GOLDTrainer`, SmolLM2-135M-Instruct as the student and,
  since TRL needs a byte-level teacher, random weights in the shape of Qwen3-0.6B with its tokenizer.

Alternatives take turns; figures are medians, ratios are medians of the turns' ratios; what runs
first does not count. The last line is JSON.

The whole step: each run is a process of its own. A step lasts from the end of the one before to its
own end; the first one does not count. Memory is the peak of the resident set in a second step less
what is resident after the first optimizer step, when weights, gradients, optimizer state and the
libraries are there (Linux). It has runs of its own, in which the allocator gives back what is freed
(slower, so their time is not used): else it keeps some hundred MiB, now more, now less. CPU seconds
stand beside: they tell how much of the difference was other programs. Equal on both sides:

- the models, in float32; prompts, the same every step: SmolLM2's chat template, filled, is a plain
  prompt for the student and for the teacher, as TRL gives it to its teacher;
- the answers: all of `--new` tokens, as no stop id ends one. Each side samples and is timed, then
  TRL's draw is replaced by minigold's of the same step (the learning rate is so small that all
  processes draw the same answers; what differs is counted);
- one batch of `--prompts` rows in one forward pass; sampling at temperature 1 without top-p and
  top-k; beta 0.5; AdamW without weight decay, the gradient clipped to norm 1.

Set on TRL's side: no bfloat16 (its default; minigold has float32 on a CPU), no gradient checkpointing
(its default; a second forward pass), no top-p (default 0.95: a sort each token), on-policy alone (lmbda 1), no logs, reports, files or progress bars, no dataloader workers,
one generation a prompt, tokenization of the dataset before the clock starts. Kept: the fused AdamW
of `transformers`, scaled dot product attention. The loss is the hybrid one, with
`use_uld_loss=True, uld_use_hybrid_loss=True`; both are off by default, and TRL asks for the first
where tokenizers differ. Not equal: the losses themselves, as each has its own; TRL's teacher reads
an end of turn after each answer, one token; TRL leaves out the last token of each answer.

`masked` is `--where sampled`. A random teacher would accept hardly any chunk, so nearly all would be
trained. Instead, each chunk is trained with the probability `--share`; without it, with the share
that `pair` finds in the same run, or 0.52, which it found before. TRL has no mask: it does the same
work in both ratios.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import minigold as mg  # noqa: E402
from minigold.batch import Rollout  # noqa: E402
from minigold.chat import render  # noqa: E402
from minigold.data import Prompt  # noqa: E402
from minigold.offsets import encode_continuation, spans_of_ids  # noqa: E402
from minigold.packed import Linear, pack, packed, product  # noqa: E402
from minigold.pair import make_pair  # noqa: E402
from minigold.sample import pad, sample  # noqa: E402

PROMPTS = TESTS.parent / "examples" / "prompts.jsonl"
PARTS = ("sample", "passes", "pair", "step")
SIDES = ("all", "masked", "trl")
STAGES = ("sampling", "teacher", "student forward", "loss", "backward", "optimizer", "rest")
REAL_SHARE = 0.52  # of chunks that `--where sampled` trains where Gemma teaches SmolLM2
LR = 1e-15  # all processes sample the same; far less is slow, as updates are subnormal then
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed, at once
Figures = dict[str, float]
Turns = dict[str, list[float]]


# -- clocks and memory -----------------------------------------------------------------------------


def in_turns(n: int, **runs: Callable[[], object]) -> Turns:
    """Seconds of each in each turn; the first turn is not among them."""

    def seconds(run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    turns = [{name: seconds(run) for name, run in runs.items()} for _ in range(n + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in runs}


def ratio(above: list[float], below: list[float]) -> float:
    """The median of what the turns give."""
    return median(a / b for a, b in zip(above, below, strict=True))


def status(key: str) -> float:
    """MiB, of this process: VmRSS is resident now, VmHWM was at most."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_mib(run: Callable[[], object]) -> float:
    """Peak of the resident set above what was there before."""
    forget_peak()
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


class Meter:
    """Seconds of each step and of its stages, and the memory beyond what is held at rest.

    `cpu` are seconds of all cores together: what other programs take of them counts less there.
    """

    def __init__(self) -> None:
        self.steps: list[Figures] = []
        self.stages: Counter[str] = Counter()
        self.rest = 0.0
        self.running = False
        self.started: tuple[float, float] | None = None  # clock, CPU

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Counts a function's seconds, unless it runs inside another one that is counted."""
        run = getattr(owner, name)

        @functools.wraps(run)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return run(*args, **kwargs)
            self.running, started = True, time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self.running = False
                self.stages[stage] += time.perf_counter() - started

        setattr(owner, name, timed)

    def at_rest(self) -> None:
        """Weights, gradients and optimizer state are held now; only the first call counts."""
        if self.rest:
            return
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps is no use of memory
        self.rest = status("VmRSS")
        forget_peak()

    def end_step(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self.started is not None:
            seconds, cpu = (a - b for a, b in zip(now, self.started, strict=True))
            stages = dict(self.stages) | {"rest": seconds - sum(self.stages.values())}
            self.steps.append({**stages, "step": seconds, "cpu": cpu})
        self.stages.clear()
        self.started = now

    def figures(self) -> Figures:
        found = {name: median(s[name] for s in self.steps) for name in (*STAGES, "step", "cpu")}
        return found | {"peak MiB": status("VmHWM"), "beyond MiB": status("VmHWM") - self.rest}


# -- the whole step, one side a process ------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the processes of a whole step share."""

    prompts: int
    new: int
    share: float


def teacher_folder(folder: Path) -> Path:
    """Random weights in the shape of Qwen3-0.6B, and its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from real_tokenizers import FILES, tokenizer_folder

    torch.manual_seed(0)
    end = 151_645  # <|im_end|>
    shape = Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=40_960, rope_theta=1e6, eos_token_id=end, pad_token_id=151_643,
    )  # fmt: skip
    Qwen3ForCausalLM(shape).float().save_pretrained(folder)
    for file in FILES:
        (folder / file).write_bytes((tokenizer_folder("qwen3") / file).read_bytes())
    return folder


def prompts_of(student: Any, n: int) -> list[Prompt]:
    """With the chat template filled; the first sixteen are left out, as their answers are short."""
    texts = [p.prompt for p in mg.data.read_prompts(PROMPTS)[16 : 16 + n]]
    ends = {"bos_token": student.bos_token, "eos_token": student.eos_token}
    talks = [[{"role": "user", "content": text}] for text in texts]
    return [
        Prompt(render(student.template, talk, **ends), line=i) for i, talk in enumerate(talks, 1)
    ]


def minigold_side(work: Path, settings: Settings, steps: int, *, where: str) -> Figures:
    """Also keeps the answers of each step, by the ids of their prompts."""
    from minigold import masked
    from real_models import real_folder

    loaded, teacher = mg.load(real_folder("smollm2")), mg.load(work / "teacher")
    student = replace(loaded, eos_ids=())  # nothing ends an answer
    meter, answers, trained = Meter(), [], []
    meter.wrap(masked, "gold_loss", "loss")
    meter.wrap(Tensor, "backward", "backward")
    meter.wrap(torch.nn.utils, "clip_grad_norm_", "optimizer")
    meter.wrap(torch.optim.AdamW, "step", "optimizer")
    if where == "sampled":
        masked.kept_of = lambda r, _mask: torch.full(
            (len(r.chunks.s0),), 1 - settings.share, dtype=torch.float64
        )

    def on_step(step: Any) -> None:
        answers.append({str(r.answer.prompt_ids): r.answer.ids for r in step.rollouts})
        trained.append(step.metrics["trained_fraction"])
        training = step.metrics["seconds_train"] - sum(meter.stages.values())
        meter.stages["student forward"] = training
        meter.stages["sampling"] = step.metrics["seconds_sample"]
        meter.stages["teacher"] = step.metrics["seconds_teacher"]
        meter.at_rest()
        meter.end_step()

    n = settings.prompts
    config = mg.Config(
        steps=steps + 1, batch_size=n, micro_batch=n, max_new_tokens=settings.new, lr=LR,
        beta=0.5, where=where, student_plain=True, teacher_plain=True,
    )  # fmt: skip
    mg.distill(student, teacher, prompts_of(student, n), config, on_step=on_step)
    (work / f"answers-{where}.json").write_text(json.dumps(answers), "utf-8")
    return meter.figures() | {"trained share": median(trained)}


def trl_side(work: Path, settings: Settings, steps: int) -> Figures:
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    from real_models import real_folder

    disable_progress_bars()
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (real_folder("smollm2"), work / "teacher")
    )
    n, meter = settings.prompts, Meter()
    texts = [p.prompt for p in prompts_of(mg.load(real_folder("smollm2")), n)]
    config = GOLDConfig(
        output_dir=str(work / "trl"), max_steps=steps + 1, per_device_train_batch_size=n,
        max_completion_length=settings.new, learning_rate=LR, lmbda=1.0, beta=0.5,
        temperature=1.0, top_p=1.0, top_k=0, use_uld_loss=True, uld_use_hybrid_loss=True,
        teacher_tokenizer_name_or_path=str(work / "teacher"), bf16=False, use_cpu=True,
        gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(real_folder("smollm2")),
        train_dataset=Dataset.from_list([{"prompt": t, "completion": "Yes"} for t in texts]),
    )
    replay(student, json.loads((work / "answers-all.json").read_text("utf-8")))
    meter.wrap(trainer, "_fill_buffer", "sampling")
    meter.wrap(teacher, "forward", "teacher")
    meter.wrap(student, "forward", "student forward")
    meter.wrap(trainer.uld_loss_fn, "_compute_distillation_loss", "loss")
    meter.wrap(trainer.accelerator, "backward", "backward")
    meter.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
    meter.wrap(torch.optim.AdamW, "step", "optimizer")

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            for generation in (student.generation_config, trainer.generation_config):
                generation.eos_token_id = None  # nothing ends an answer

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            meter.at_rest()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end_step()

    trainer.add_callback(Watch())
    trainer.train()
    return meter.figures()


def replay(student: Any, answers: list[dict[str, list[int]]]) -> None:
    """Puts the answers of each step in the place of what `generate` drew."""
    generate, steps = student.generate, iter(answers)

    def replayed(*args: Any, **kwargs: Any) -> Any:
        drawn, step = generate(*args, **kwargs), next(steps)
        width = kwargs["input_ids"].shape[1]
        for row, ids, mask in zip(
            drawn.sequences, kwargs["input_ids"], kwargs["attention_mask"], strict=True
        ):
            row[width:] = torch.tensor(step[str(ids[mask.bool()].tolist())])
        return drawn

    student.generate = replayed


def one_side(side: str, work: Path, steps: int) -> Figures:
    settings = Settings(**json.loads((work / "settings.json").read_text("utf-8")))
    if side == "trl":
        return trl_side(work, settings, steps)
    return minigold_side(work, settings, steps, where="all" if side == "all" else "sampled")


def in_process(side: str, work: Path, steps: int, **environment: str) -> Figures:
    line = [sys.executable, __file__, "--one", side, str(work), str(steps)]
    env = os.environ | environment
    done = subprocess.run(line, check=False, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"expected figures of {side}, got:\n{done.stderr}")
    print(f"{side} {environment}: {done.stdout.splitlines()[-1]}", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def of_whole_steps(settings: Settings, n_turns: int, steps: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        work = Path(folder)
        teacher_folder(work / "teacher")
        (work / "settings.json").write_text(json.dumps(asdict(settings)), "utf-8")
        turns = [{side: in_process(side, work, steps) for side in SIDES} for _ in range(n_turns)]
        first, second = (
            json.loads((work / f"answers-{where}.json").read_text("utf-8"))
            for where in ("all", "sampled")
        )
        memory = {side: in_process(side, work, 1, **GIVES_BACK) for side in SIDES}
    pairs = zip(first, second, strict=True)
    differ = sum(step[key] != other[key] for step, other in pairs for key in step)
    figures: Figures = {"step answers that differ between all and masked": differ}
    columns = {
        side: {name: [turn[side][name] for turn in turns] for name in turns[0][side]}
        for side in SIDES
    }
    for side in SIDES:
        figures |= {f"step {side} {name}": median(xs) for name, xs in columns[side].items()}
        figures[f"step {side} beyond MiB"] = memory[side]["beyond MiB"]
    for side, end in (("all", ""), ("masked", "_masked")):
        for name, key in (("step", "time"), ("cpu", "cpu")):
            found = ratio(columns["trl"][name], columns[side][name])
            figures[f"step_{key}_ratio_trl_over_minigold{end}"] = found
        beyond = memory[side]["beyond MiB"] / memory["trl"]["beyond MiB"]
        figures[f"step_memory_ratio_minigold_over_trl{end}"] = beyond
    return figures


# -- its parts beside transformers -----------------------------------------------------------------


def both_models() -> tuple[Any, Any]:
    """SmolLM2 of minigold and of `transformers`."""
    from transformers import AutoModelForCausalLM

    from real_models import real_folder

    folder = real_folder("smollm2")
    return mg.load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def of_sampling(new: int, turns: int) -> Figures:
    """Tokens a second of rows that do not end, and the share of the floor that is reached."""
    model, theirs = both_models()
    theirs.eval().generation_config.eos_token_id = None
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": new}
    n_weights = sum(p.numel() for p in model.decoder.parameters())
    weights = torch.ones(n_weights)
    read = median(in_turns(7, read=weights.sum)["read"])
    figures: Figures = {"sample read GB/s": 4e-9 * n_weights / read, "sample floor s/step": read}
    ratios = {}
    for batch in (1, 8, 32):
        generator = torch.Generator().manual_seed(0)
        ids_BS = torch.randint(1000, 40_000, (batch, 16), generator=generator)

        def ours(ids_BS: Tensor) -> None:
            found = sample(model.decoder, ids_BS.tolist(), max_new_tokens=new, eos_ids=())
            assert all(len(row.ids) == new for row in found)

        def generate(ids_BS: Tensor) -> None:
            found = theirs.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), **settings)
            assert found.shape == (len(ids_BS), 16 + new)

        def products(ids_BS: Tensor) -> None:
            """The matrix products of the steps in minigold, and nothing between them."""
            head = model.decoder.head.weight_VD
            with torch.no_grad(), packed(model.decoder.model):
                layers = [x for x in model.decoder.model.modules() if isinstance(x, Linear)]
                copy = pack(head)
                inputs = {n: torch.rand(len(ids_BS), 1, n) for n in {x.in_features for x in layers}}
                for _ in range(new):
                    for layer in layers:
                        layer(inputs[layer.in_features])
                    product(inputs[head.shape[1]], head, None, copy)

        runs = {"minigold": ours, "transformers": generate, "products": products}
        seconds = in_turns(turns, **{k: functools.partial(run, ids_BS) for k, run in runs.items()})
        for name, xs in seconds.items():
            figures[f"sample {batch} {name} tokens/s"] = batch * new / median(xs)
            figures[f"sample {batch} {name} share of floor"] = new * read / median(xs)
        ratios[batch] = ratio(seconds["transformers"], seconds["minigold"])
        figures[f"sample {batch} ratio"] = ratios[batch]
        figures[f"sample {batch} ratio if all but products took no time"] = ratio(
            seconds["transformers"], seconds["products"]
        )
    name = "sample_tokens_per_second_ratio_minigold_over_transformers"
    return figures | {name: min(ratios[8], ratios[32]), f"{name}_batch_1": ratios[1]}


def of_passes(rows: int, length: int, turns: int) -> Figures:
    """Forward and backward, at all positions and at a fifth of them; values must agree."""
    model, theirs = both_models()
    student = model.decoder.train()
    theirs.train()
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(1000, 40_000, (rows, length), generator=generator)
    next_BP = ids_BS[:, 1:]
    fifth_BP = torch.rand(next_BP.shape, generator=generator) < 0.2
    values: dict[str, float] = {}

    def ours(mask_BP: Tensor) -> Tensor:
        stops = [int(mask_P.nonzero().max()) + 1 if mask_P.any() else 0 for mask_P in mask_BP]
        inputs = [ids_S[:stop].tolist() for ids_S, stop in zip(ids_BS, stops, strict=True)]
        hidden_BSD = student(pad(inputs, student.device))
        states_ND = hidden_BSD[mask_BP[:, : hidden_BSD.shape[1]]]
        return F.cross_entropy(student.head.logits(states_ND), next_BP[mask_BP])

    def dense(mask_BP: Tensor) -> Tensor:
        logits_BPV = theirs(input_ids=ids_BS, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits_BPV[mask_BP], next_BP[mask_BP])

    def run(name: str, loss: Callable[[Tensor], Tensor], mask_BP: Tensor) -> None:
        value = loss(mask_BP)
        value.backward()
        values[name] = value.item()
        for module in (student, theirs):
            module.zero_grad(set_to_none=True)

    every_BP = torch.ones_like(fifth_BP)
    cases = {
        "minigold": (ours, every_BP), "transformers": (dense, every_BP),
        "minigold masked": (ours, fifth_BP), "transformers masked": (dense, fifth_BP),
    }  # fmt: skip
    seconds = in_turns(turns, **{k: functools.partial(run, k, *case) for k, case in cases.items()})
    for end in ("", " masked"):
        assert np.isclose(values["minigold" + end], values["transformers" + end], rtol=1e-4)
    figures = {f"passes {name} s": median(xs) for name, xs in seconds.items()}
    for end in ("", " masked"):
        name = f"pass_time_ratio_transformers_over_minigold{end.replace(' ', '_')}"
        figures[name] = ratio(seconds["transformers" + end], seconds["minigold" + end])
    return figures


# -- the real pair ---------------------------------------------------------------------------------


def of_pair(new: int, n_steps: int) -> Figures:
    """Medians over the steps, the first left out, and what alignment takes of one."""
    from real_models import real_folder

    student, teacher = (mg.load(real_folder(name)) for name in ("smollm2", "gemma"))
    started = time.perf_counter()
    make_pair(student, teacher)
    figures = {"pair match vocabularies s": time.perf_counter() - started}
    config = mg.Config(
        steps=n_steps + 1, batch_size=8, max_new_tokens=new, lr=LR, teacher_plain=True
    )
    steps: list[Any] = []
    mg.distill(student, teacher, mg.data.read_prompts(PROMPTS), config, on_step=steps.append)
    keys = ("completion_tokens", "trained_fraction", "work_saved", "seconds", "seconds_sample",
            "seconds_teacher", "seconds_train")  # fmt: skip
    figures |= {f"pair {key}": median(step.metrics[key] for step in steps[1:]) for key in keys}
    rollouts: list[Rollout] = steps[-1].rollouts

    def align() -> None:
        for answer in (r.answer for r in rollouts):
            spans = spans_of_ids(student.tokenizer, answer.ids)
            mg.align.align(spans, encode_continuation(teacher.tokenizer, answer.text)[1])

    seconds = median(in_turns(20, align=align)["align"])
    figures["pair align us/token"] = 1e6 * seconds / sum(len(r.answer.ids) for r in rollouts)
    figures["pair align share of step"] = seconds / figures["pair seconds"]
    return figures


# -- what is printed -------------------------------------------------------------------------------


def stage_table(figures: Figures) -> str:
    """Where the time of a whole step goes, on both sides."""
    lines = [f"{'seconds of a step':17}" + "".join(f"{side:>9}" for side in SIDES)]
    for name in (*STAGES, "step", "cpu", "beyond MiB"):
        cells = (figures[f"step {side} {name}"] for side in SIDES)
        lines.append(f"{name:17}" + "".join(f"{x:9.0f}" if x > 99 else f"{x:9.2f}" for x in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a step and its parts.")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--turns", type=int, default=3, help="of each alternative")
    parser.add_argument("--steps", type=int, default=2, help="that count, in each process")
    parser.add_argument("--prompts", type=int, default=8, help="of a whole step")
    parser.add_argument("--new", type=int, default=64, help="tokens sampled a row in a step")
    parser.add_argument("--sampled", type=int, default=128, help="tokens a row beside generate")
    parser.add_argument("--share", type=float, help="of chunks that the mask trains")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_side(args.one[0], Path(args.one[1]), int(args.one[2]))))
        return
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"expected --parts of {', '.join(PARTS)}, got {args.parts}")
    figures: Figures = {}
    if "sample" in parts:
        figures |= of_sampling(args.sampled, args.turns)
    if "passes" in parts:
        figures |= of_passes(8, 128, args.turns)
    if "pair" in parts:
        figures |= of_pair(args.new, args.turns)
    if "step" in parts:
        share = args.share or figures.get("pair trained_fraction", REAL_SHARE)
        settings = Settings(args.prompts, args.new, share)
        figures |= of_whole_steps(settings, args.turns, args.steps)
    print("\n".join(f"{name:70} {value:12.4g}" for name, value in figures.items()))
    if "step" in parts:
        print(stage_table(figures))
    cpu = Path("/proc/cpuinfo").read_text("utf-8").partition("model name\t: ")[2].split("\n")[0]
    packages = ("minigold", "torch", "transformers", "tokenizers", *["trl"] * ("step" in parts))
    machine = {"threads": torch.get_num_threads(), "processor": cpu or platform.processor()}
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    print(json.dumps({"machine": machine, "versions": versions, **figures}))


if __name__ == "__main__":
    main()
