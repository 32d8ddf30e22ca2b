# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of a step's stages as it grows, beside what `minigold.cost` says (Linux).

Random models; batch, completion length, vocabulary and width vary one at a time. A run is a process of
its own; its second step counts. Memory is the resident set's peak less what was there before the models,
with an allocator that gives freed memory back at once (`--keep-heap`: as it comes). The teacher is twice
as wide as the student; both have four layers. `--plot F.svg` draws it. The last line is JSON.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]

import torch  # noqa: E402
from bench_step import status  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

import minigold as mg  # noqa: E402
from minigold import cost, train  # noqa: E402
from minigold.batch import Rollout, head_rows  # noqa: E402
from minigold.data import Prompt  # noqa: E402
from minigold.dry_run import measure_rates  # noqa: E402
from minigold.events import match  # noqa: E402
from minigold.families import model_config  # noqa: E402
from minigold.load import LanguageModel  # noqa: E402
from minigold.model import Decoder, ModelConfig  # noqa: E402
from minigold.pair import Pair, matched  # noqa: E402
from tiny_models import raw_config  # noqa: E402

BASE = {"batch": 4, "new": 128, "vocabulary": 16_000, "width": 256}
AXES = {
    "batch": [2, 4, 8, 16, 32],
    "new": [64, 128, 512, 1024, 2048],
    "vocabulary": [8_000, 16_000, 32_000, 64_000, 128_000],
    "width": [128, 256, 512, 768],
}
NAMES = {"batch": "rows", "new": "new tokens a row", "vocabulary": "ids of each side",
         "width": "student's width"}  # fmt: skip
STAGES = ("sampling", "teacher", "training", "optimizer")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Figures = dict[str, Any]


def tokenizer_of(size: int, letters: str) -> Tokenizer:
    """Bytes, and pieces of two, three and four letters in the order of `letters`, up to `size`."""
    pieces, merges, stems = sorted(pre_tokenizers.ByteLevel.alphabet()), [], list(letters)
    while len(pieces) < size - 1:
        added = [(stem, letter) for stem in stems for letter in letters][: size - 1 - len(pieces)]
        merges += added
        stems = ["".join(pair) for pair in added]
        pieces += stems
    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def config_of(family: str, vocabulary: int, width: int, layers: int) -> ModelConfig:
    raw = raw_config(
        family,
        vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192 if width % 192 == 0 else 1),
        head_dim=64,
        max_position_embeddings=4096,
        **({"layer_types": None, "sliding_window": 512} if family == "gemma3_text" else {}),
    )
    return model_config(raw)


def model_of(config: ModelConfig, tokenizer: Tokenizer, name: str) -> LanguageModel:
    n, end = tokenizer.get_vocab_size(), tokenizer.token_to_id("<end>")
    decoder = Decoder(config).eval()
    decoder.n_tokens = n
    return LanguageModel(
        name=name, folder=Path(name), decoder=decoder, tokenizer=tokenizer, template=None,
        bos_token="", eos_token="<end>", eos_ids=(end,), end_id=end, context=4096, n_tokens=n,
    )  # fmt: skip


class Watch:
    """Seconds and peak bytes of each stage of the last step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.before = status("VmRSS")

    def over(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak so far is forgotten
            started = time.perf_counter()
            result = run(*args, **kwargs)
            self.seconds[name] = time.perf_counter() - started
            self.bytes[name] = 2**20 * (status("VmHWM") - self.before)
            return result

        return watched


def warm_up(tokenizers: Any, events: Any, config: mg.Config, prompts: list[Prompt]) -> None:
    """A step of tiny models: code and work space of the libraries are no part of a model."""
    few = replace(config, max_new_tokens=4)
    models = [
        model_of(config_of("llama", t.get_vocab_size(), 64, 1), t, "tiny") for t in tokenizers
    ]
    optimizer = train.adamw(models[0].decoder, few)
    train.take_step(Pair(*models, events), optimizer, prompts, few, number=1)


def one_run(batch: int, new: int, vocabulary: int, width: int, family: str = "llama", layers: int = 4,
            micro_batch: int = 8, padding: int = 0, where: str = "all", **settings: Any) -> Figures:  # fmt: skip
    torch.manual_seed(0)
    tokenizers = tokenizer_of(vocabulary, LETTERS), tokenizer_of(vocabulary, LETTERS[::-1])
    sides = [(t, [t.token_to_id("<end>")], vocabulary) for t in tokenizers]
    events = match(*matched(*sides))
    config = mg.Config(
        steps=2, batch_size=batch, micro_batch=micro_batch, max_new_tokens=new, where=where,
        student_plain=True, teacher_plain=True, **settings,
    )  # fmt: skip
    prompts = [Prompt(prompt="the quick brown fox", line=i) for i in range(batch)]
    warm_up(tokenizers, events, config, prompts)
    watch = Watch()
    own = config_of(family, vocabulary + padding, width, layers)
    other = config_of(family, vocabulary + padding, width * 2, layers)
    student, teacher = model_of(own, tokenizers[0], "s"), model_of(other, tokenizers[1], "t")
    steps: list[train.Step] = []
    for name, stage in (
        ("sample_answers", "sampling"),
        ("collect", "teacher"),
        ("train_pass", "training"),
    ):
        setattr(train, name, watch.over(stage, getattr(train, name)))
    student.decoder.checkpointing = config.gradient_checkpointing
    train.choose_trained(student, config)
    optimizer = train.adamw(student.decoder, config)
    optimizer.step = watch.over("optimizer", optimizer.step)
    for number in (1, 2):
        steps[:] = [
            train.take_step(
                Pair(student, teacher, events), optimizer, prompts, config, number=number
            )
        ]
    sizes = sizes_of(
        own, other, vocabulary, steps[0].rollouts, steps[0].chosen, config, events.n_events
    )
    parts = cost.memory(sizes)
    return {
        "seconds": watch.seconds,
        "measured": watch.bytes,
        "predicted": {stage: sum(p.values()) for stage, p in parts.items()},
        "parts": parts,
        "parameters": [cost.parameters(own), cost.parameters(other)],
        "chunks": [sizes.chunks, sizes.head_rows],
        "rates": measure_rates(torch.device("cpu"), torch.float32),
        "work": cost.work(sizes),
    }


def sizes_of(
    own: ModelConfig, other: ModelConfig, ids: int, rollouts: list[Rollout], chosen: list[Any],
    config: mg.Config, n_events: int,
) -> cost.Sizes:  # fmt: skip
    """What this step really was."""
    answers = [r.answer for r in rollouts]
    return cost.Sizes(
        student=own, teacher=other, student_ids=ids, teacher_ids=ids, n_events=n_events,
        rows=len(rollouts), micro_batch=config.micro_batch,
        prompt=max(len(a.prompt_ids) for a in answers),
        completion=max(len(a.ids) for a in answers),
        teacher_prompt=max(len(a.teacher_prompt_ids) for a in answers),
        teacher_completion=max(len(a.teacher_ids) for a in answers),
        chunks=sum(int(mask.sum()) for mask in chosen),
        head_rows=sum(int(head_rows(r)[mask].sum()) for r, mask in zip(rollouts, chosen, strict=True)),
        lora_rank=config.lora_rank, lora_targets=config.adapted,
        checkpointing=config.gradient_checkpointing,
    )  # fmt: skip


def in_process(run: dict[str, Any], *, keep: bool) -> Figures:
    """One run. Freed memory goes back to the system at once, unless the heap may `keep` it."""
    environment = os.environ | ({} if keep else {"MALLOC_MMAP_THRESHOLD_": str(2**18)})
    command = [sys.executable, __file__, "--one", json.dumps(run)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    rates = cost.Rates(*found["rates"])
    found["floor"] = {
        stage: cost.floor_seconds(cost.Work(*one), rates) for stage, one in found["work"].items()
    }
    return found


def line(axis: str, value: int, found: Figures) -> str:
    measured, predicted = (max(found[k].values()) / 2**20 for k in ("measured", "predicted"))
    times = [found["seconds"][stage] for stage in STAGES]
    share = sum(found["floor"].values()) / sum(times)
    seconds = "".join(f"{x:8.2f}" for x in times)
    return (
        f"{axis:10} {value:8,} {measured:9.0f} {predicted:9.0f} {100 * (predicted / measured - 1):+6.1f} %"
        f"{seconds} {sum(times):8.2f} {share:7.2f}"
    )


def plot(path: Path, rows: dict[str, dict[int, Figures]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "minigold", "font.size": 8})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(rows), figsize=(3 * len(rows), 5), squeeze=False)
    for column, (axis, found) in enumerate(rows.items()):
        x, (above, below) = list(found), axes[:, column]
        for key, style in (("measured", "o"), ("predicted", "-")):
            above.plot(
                x, [max(one[key].values()) / 2**20 for one in found.values()], style, label=key
            )
        for key, style in (("seconds", "o-"), ("floor", "--")):
            y = [sum(one[key].values()) for one in found.values()]
            below.plot(x, y, style, label={"seconds": "measured"}.get(key, key))
        above.set(xscale="log", ylim=(0, None))
        below.set(xscale="log", yscale="log")
        for one in (above, below):
            one.minorticks_off()
            one.set_xticks(x, [f"{value:,}" for value in x], rotation=30)
        below.set_xlabel(NAMES[axis])
    axes[0, 0].set_ylabel("peak memory, MiB")
    axes[1, 0].set_ylabel("seconds a step")
    axes[0, 0].legend()
    axes[1, 0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how a step grows.")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="what varies")
    parser.add_argument("--keep-heap", action="store_true", help="with the allocator as it comes")
    parser.add_argument("--plot", type=Path, help="draw it (needs the extra `plot`)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_run(**{**BASE, **json.loads(args.one)})))
        return
    heads = "".join(f"{stage[:7]:>8}" for stage in STAGES)
    print(
        f"{'':19} {'MiB':>9} {'model':>9} {'off by':>8}{heads} {'step s':>8} {'floor/':>7}",
        flush=True,
    )
    rows: dict[str, dict[int, Figures]] = {}
    base: Figures = {}
    for axis in args.axes:
        for value in AXES[axis]:
            is_base = value == BASE[axis]
            found = base if is_base and base else in_process({axis: value}, keep=args.keep_heap)
            base = found if is_base else base
            rows.setdefault(axis, {})[value] = found
            print(line(axis, value, found), flush=True)
    if args.plot:
        plot(args.plot, rows)
    keys = ("measured", "predicted", "seconds", "floor", "parameters", "chunks")
    runs = {a: {v: {k: one[k] for k in keys} for v, one in r.items()} for a, r in rows.items()}
    print(json.dumps({"base": BASE, "torch": torch.__version__, "runs": runs}))


if __name__ == "__main__":
    main()
