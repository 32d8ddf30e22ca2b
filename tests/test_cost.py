# SPDX-License-Identifier: Apache-2.0
"""What a run would cost: formulas against what torch counts, keeps and holds."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    mm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from minigold import cost, dry_run
from minigold.batch import head_rows
from minigold.config import Config
from minigold.cost import Rates, Sizes, Work
from minigold.data import Prompt
from minigold.families import model_config
from minigold.lora import Adapter, adapt, new_tensors
from minigold.masked import micro_batches, n_inputs, train_pass
from minigold.model import MATRICES, Decoder, ModelConfig
from minigold.pair import Pair, make_pair
from minigold.rollout import collect, sample_answers
from minigold.train import check_eval_prompts, check_prompts, choose_trained, trained_weights
from tiny_models import FAMILIES, raw_config, tiny_model
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

BENCH = Path(__file__).parent / "benchmarks" / "bench_growth.py"
SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    {
        "num_hidden_layers": 5,
        "head_dim": 10,
        "num_key_value_heads": 4,
        "layer_types": None,
        "no_rope_layers": None,
        "max_window_layers": 5,
    },
]


def sizes(**changes: Any) -> Sizes:
    """Small, all numbers different."""
    own, other = (model_config(raw_config("llama", v)) for v in (50, 70))
    one = Sizes(
        student=own, teacher=other, student_ids=50, teacher_ids=70, n_events=40, rows=6,
        micro_batch=6, prompt=9, completion=13, teacher_prompt=8, teacher_completion=12, chunks=60,
        head_rows=78,
    )  # fmt: skip
    return replace(one, **changes)


# --------------------------------------------------------------------------- parameters, what is kept
@pytest.mark.parametrize("changes", SHAPES, ids=["tied", "untied, biases", "other heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_decoder(family: str, changes: dict[str, Any]) -> None:
    config = model_config(raw_config(family, 41, **changes))
    with torch.device("meta"):
        decoder = Decoder(config)
    assert cost.parameters(config) == sum(p.numel() for p in decoder.parameters())
    linear = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    linear = [m for m in linear if m is not decoder.lm_head]
    assert cost.matrix_parameters(config) == sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize("changes", SHAPES, ids=["tied", "untied, biases", "other heads"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [3, 33])
def test_the_bytes_that_autograd_keeps(family: str, changes: dict[str, Any], length: int) -> None:
    config = model_config(raw_config(family, 41, **changes))
    decoder = Decoder(config)
    expected = cost.saved_bytes(config, 5, length) + norms_made_anew(config)
    assert bytes_kept(decoder, length) == pytest.approx(expected, abs=length**2 + 1)  # bools
    decoder.checkpointing = True
    expected = cost.saved_bytes(config, 5, length, checkpointing=True)
    assert bytes_kept(decoder, length) == pytest.approx(
        expected - turned(config, length), abs=length**2 + 99
    )


def bytes_kept(decoder: Decoder, length: int) -> int:
    """Of a pass over five rows; what the decoder gives is not counted."""
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden_BSD = decoder(torch.zeros(5, length, dtype=torch.int64))
    known = {*own, hidden_BSD.untyped_storage().data_ptr()}
    return sum(x.nbytes() for at, x in kept.items() if at not in known)


def turned(config: ModelConfig, length: int) -> int:
    """Bytes of rotations: checkpointing holds them too, but not by autograd."""
    kinds = {x for x, rotary in zip(config.sliding, config.rotary, strict=True) if rotary}
    return len(kinds) * 2 * 4 * length * config.head_width


def norms_made_anew(config: ModelConfig) -> int:
    """Bytes: Gemma's norms make `1 + weight` in each pass."""
    norms = config.n_layers * (4 * config.width + 2 * config.head_width) + config.width
    return config.is_gemma * 4 * norms


TARGETS = [MATRICES, ("v_proj",), ("q_proj", "o_proj"), ("o_proj", "gate_proj"), ("up_proj",),
           ("down_proj",)]  # fmt: skip


def adapted_decoder(config: ModelConfig, targets: tuple[str, ...], rank: int = 3) -> Decoder:
    decoder, adapter = Decoder(config), Adapter(rank, 4.0, targets)
    adapt(decoder, adapter, new_tensors(decoder, adapter, seed=0))
    return decoder


@pytest.mark.parametrize("targets", TARGETS, ids=["all", *(",".join(t) for t in TARGETS[1:])])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_adapter_has_and_keeps(family: str, targets: tuple[str, ...]) -> None:
    """Exactly for the layers after the first, whose own inputs need no gradient."""
    config, longer = (
        model_config(
            raw_config(
                family,
                41,
                num_hidden_layers=n,
                layer_types=None,
                no_rope_layers=None,
                sliding_window=99,
                max_window_layers=9,
            )
        )
        for n in (2, 5)
    )
    decoder = adapted_decoder(config, targets)
    own = sum(p.numel() for p in trained_weights(decoder))
    assert cost.adapter_parameters(config, 3, targets) == own > 0
    kept, predicted = (
        (
            bytes_kept(adapted_decoder(one, targets), 9) - norms_made_anew(one)
            for one in (config, longer)
        ),
        (
            cost.saved_bytes(one, 5, 9, lora_rank=3, lora_targets=targets)
            for one in (config, longer)
        ),
    )
    (short, long), (short_told, long_told) = kept, predicted
    assert long - short == pytest.approx(long_told - short_told, abs=99)
    assert short <= short_told + 99
    for one in (config, longer):
        decoder = adapted_decoder(one, targets)
        decoder.checkpointing = True
        told = cost.saved_bytes(one, 5, 9, lora_rank=3, lora_targets=targets, checkpointing=True)
        assert bytes_kept(decoder, 9) == pytest.approx(told - turned(one, 9), abs=99)
    if set(targets) & {"q_proj", "k_proj", "v_proj"} == {"q_proj", "k_proj", "v_proj"}:
        assert short == pytest.approx(short_told, abs=99)


# ------------------------------------------------------------------------------------- operations
Shape = tuple[int, ...]


def forward(query: Shape, key: Shape, value: Shape, *_: Any, **_more: Any) -> int:
    heads = query[1]  # keys and values are those of a group
    return sdpa_flop_count(query, (key[0], heads, *key[2:]), (value[0], heads, *value[2:]))


def backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **_more: Any) -> int:
    heads = query[1]
    wide = [(one[0], heads, *one[2:]) for one in (key, value)]
    return sdpa_backward_flop_count(grad, query, *wide)


def product(_: Shape, left: Shape, right: Shape, **_more: Any) -> int:
    return mm_flop(left, right)


KERNELS = {  # torch's own counts, for what it has no entry: kernels of CPUs, a product in place
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    torch.ops.aten.addmm_: product,
}


def pair_and_config(family: str, **changes: Any) -> tuple[Pair, Config]:
    student = tiny_model(family, byte_bpe(), end="<|im_end|>")
    teacher = tiny_model("qwen3", sentencepiece_bpe(), end="</s>", seed=1)
    settings = {"student_plain": True, "teacher_plain": True, "where": "all", **changes}
    return make_pair(student, teacher), Config(**settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("micro_batch", "checkpointing"), [(2, False), (5, False), (2, True)])
def test_operations_of_the_training_pass(
    family: str, micro_batch: int, checkpointing: bool
) -> None:
    """As torch counts them, which takes attention to see all keys."""
    pair, config = pair_and_config(
        family, batch_size=5, max_new_tokens=12, micro_batch=micro_batch,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    pair.student.decoder.checkpointing = checkpointing
    prompts = [Prompt(prompt="the quick brown fox", line=i) for i in range(5)]
    answers, side = sample_answers(pair, prompts, config, number=1)
    rollouts = collect(pair, answers, side, config)
    chosen = [one.comparable_C(pair.events, 1.0) for one in rollouts]
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        train_pass(pair, rollouts, chosen, config)
    assert counter.get_total_flops() == expected_operations(pair, rollouts, chosen, config)


@pytest.mark.parametrize(
    ("targets", "checkpointing"),
    [*((targets, False) for targets in TARGETS), (MATRICES, True), (("v_proj",), True)],
)
def test_operations_of_training_an_adapter(targets: tuple[str, ...], checkpointing: bool) -> None:
    """What is frozen has no gradient of its own, and nothing flows to before the first adapter."""
    pair, config = pair_and_config(
        "qwen3", batch_size=5, max_new_tokens=12, micro_batch=2, lora_rank=3,
        lora_targets=",".join(targets), gradient_checkpointing=checkpointing,
    )  # fmt: skip
    pair.student.decoder.checkpointing = checkpointing
    choose_trained(pair.student, config)
    prompts = [Prompt(prompt="the quick brown fox", line=i) for i in range(5)]
    rollouts = collect(pair, *sample_answers(pair, prompts, config, number=1), config)
    chosen = [one.comparable_C(pair.events, 1.0) for one in rollouts]
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        train_pass(pair, rollouts, chosen, config)
    assert counter.get_total_flops() == expected_operations(pair, rollouts, chosen, config)


def expected_operations(pair: Pair, rollouts: Any, chosen: Any, config: Config) -> int:
    """`training_operations` of each micro-batch, whose rows are padded to its longest."""
    total = 0
    for some in micro_batches(rollouts, chosen, config.micro_batch):
        length = max(n_inputs(rollouts[i], chosen[i]) for i in some)
        one = Sizes(
            student=pair.student.decoder.config, teacher=pair.teacher.decoder.config,
            student_ids=pair.student.n_tokens, teacher_ids=pair.teacher.n_tokens,
            n_events=pair.events.n_events, rows=len(some), micro_batch=len(some), prompt=length,
            completion=1, teacher_prompt=1, teacher_completion=1,
            chunks=sum(int(chosen[i].sum()) for i in some),
            head_rows=sum(int(head_rows(rollouts[i])[chosen[i]].sum()) for i in some),
            lora_rank=config.lora_rank, lora_targets=config.adapted,
            checkpointing=config.gradient_checkpointing,
        )  # fmt: skip
        total += cost.training_operations(one, pairs=length**2)
    return total


def test_work_of_each_stage_by_hand() -> None:
    """One layer of width 2, one row: small enough to count."""
    raw = raw_config("llama", 5, hidden_size=2, intermediate_size=3, num_hidden_layers=1,
                     num_attention_heads=1, num_key_value_heads=1, head_dim=2)  # fmt: skip
    config = model_config(raw)
    one = sizes(
        student=config, teacher=config, student_ids=5, teacher_ids=4, rows=1, micro_batch=1,
        prompt=3, completion=2, teacher_prompt=2, teacher_completion=1, chunks=2, head_rows=2,
    )  # fmt: skip
    body = 4 * 2 * 2 + 3 * 2 * 3
    found = cost.work(one)
    # prompt: 3 tokens, 1 + 2 + 3 pairs; then one step that sees 3 and itself; twice the head
    assert found["sampling"].operations == (3 + 1) * 2 * body + 4 * 2 * (6 + 4) + 2 * 2 * 10
    assert found["sampling"].bytes == 4 * 2 * (body + 10) + 2 * 4 * 2 * 4
    # three tokens, two states in one block
    assert found["teacher"] == Work(3 * 2 * body + 4 * 2 * 6 + 2 * 2 * 8, 4 * (body + 8))
    assert found["training"].operations == 4 * 6 * body + 14 * 2 * 10 + 6 * 2 * 10 + 2 * 2 * 8
    assert found["training"].bytes == 12 * body + 16 * 10 + 4 * 8
    assert found["optimizer"] == Work(0, 40 * cost.parameters(config))


def test_the_floor_is_the_longer_of_computing_and_moving() -> None:
    assert cost.floor_seconds(Work(30, 8), Rates(10, 4)) == 3
    assert cost.floor_seconds(Work(30, 20), Rates(10, 4)) == 5


def test_rates_are_those_of_a_machine() -> None:
    rates = dry_run.measure_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.operations < 1e14
    assert 1e8 < rates.bytes < 1e13


# ----------------------------------------------------------------------------------------- memory
RUNS = {
    "head": {"vocabulary": 32_000, "width": 320, "new": 16, "layers": 3},
    "head, passes": {"vocabulary": 32_000, "width": 256, "new": 12, "layers": 2, "micro_batch": 3,
                     "padding": 64},
    "activations": {"vocabulary": 4_000, "width": 256, "new": 96, "layers": 6, "batch": 12,
                    "micro_batch": 12, "family": "gemma3_text"},
    "checkpointing": {"vocabulary": 4_000, "width": 256, "new": 96, "layers": 6, "batch": 12,
                      "micro_batch": 12, "gradient_checkpointing": True},
    "adapter": {"vocabulary": 8_000, "width": 384, "new": 64, "layers": 4, "micro_batch": 3,
                "lora_rank": 8},
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is read from /proc")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("head", "activations")))
        for name in RUNS
    ],
)
def test_memory_is_as_predicted_within_15_percent(name: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [sys.executable, str(BENCH), "--one", json.dumps(RUNS[name])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    measured, predicted = found["measured"], found["predicted"]
    assert max(predicted.values()) == pytest.approx(max(measured.values()), rel=0.15)
    for stage in measured:
        assert predicted[stage] == pytest.approx(measured[stage], rel=0.15), (stage, found["parts"])


def test_memory_grows_with_what_it_is_made_of() -> None:
    def of(stage: str, **changes: Any) -> dict[str, int]:
        return cost.memory(sizes(**changes))[stage]

    own = sizes().student
    kept = 2 * own.n_layers * 6 * (9 + 13) * own.n_kv_heads * own.head_width
    assert of("sampling")["KV cache"] == 4 * kept
    assert of("sampling", rows=12)["KV cache"] == 2 * of("sampling")["KV cache"]
    twice = of("sampling", prompt=18, completion=26)
    assert twice["KV cache"] == 2 * of("sampling")["KV cache"]
    assert of("sampling", nucleus=True)["logits of a sampling step"] == 6 * 50 * 44
    assert of("sampling")["logits of a sampling step"] == 6 * 50 * 16
    assert of("training")["gradients"] == 0
    assert of("training", micro_batch=3)["gradients"] == 4 * cost.parameters(sizes().student)
    half = of("training", teacher_bytes=2)
    assert 2 * half["teacher weights"] == of("training")["teacher weights"]
    assert 2 * half["teacher's states"] == of("training")["teacher's states"]
    assert "matrices in bfloat16" not in of("training")
    assert "matrices in bfloat16" in of("training", cuda=True)
    assert of("training", cuda=True)["activations"] < of("training")["activations"]
    assert 2 * of("sampling", cuda=True)["KV cache"] == of("sampling")["KV cache"]
    gemma = model_config(raw_config("gemma3_text", 50))
    more = [
        [cost.layer_saved_bytes(gemma, 3, n, sliding=True, cuda=x) for x in (True, False)]
        for n in (gemma.window, gemma.window + 1)
    ]
    groups = 2 * 3 * (gemma.window + 1) * gemma.head_width * (gemma.n_heads - gemma.n_kv_heads)
    fixed = (gemma.window + 1) / gemma.window
    assert more[1][0] - 4 * (gemma.window + 1) ** 2 - more[0][0] * fixed == 2 * groups > 0
    stage, parts = cost.peak(sizes())
    assert sum(parts.values()) == max(sum(p.values()) for p in cost.memory(sizes()).values())
    assert cost.memory(sizes())[stage] == parts


def test_with_checkpointing_one_layer_is_there_beside_the_inputs_of_all() -> None:
    whole, one = sizes(), sizes(checkpointing=True)
    own, tokens = whole.student, 6 * (9 + 13 - 1)
    before, after = (cost.memory(s)["training"] for s in (whole, one))
    layer = cost.layer_saved_bytes(own, 6, 21, sliding=False)
    less = own.n_layers * (layer - 4 * tokens * own.width)
    assert before["activations"] - after["activations"] == less > 0
    assert after["loss block"] == layer + 4 * tokens * (3 * own.mlp_width + 2 * own.width)
    assert {k: v for k, v in before.items() if k not in ("activations", "loss block")} == {
        k: v for k, v in after.items() if k not in ("activations", "loss block")
    }
    few, more = (cost.work(s)["training"] for s in (whole, one))
    assert more.bytes - few.bytes == 4 * cost.matrix_parameters(own)
    assert more.operations > few.operations


def test_an_adapter_has_gradients_and_moments_and_the_rest_has_none() -> None:
    whole, one = sizes(micro_batch=3), sizes(micro_batch=3, lora_rank=2, lora_targets=MATRICES)
    n = cost.adapter_parameters(one.student, 2, MATRICES)
    assert (whole.trained, one.trained) == (cost.parameters(whole.student), n)
    for stage, parts in cost.memory(one).items():
        assert parts["AdamW"] == 8 * n
        assert parts["student weights"] == 4 * (whole.trained + n)
        assert parts["teacher weights"] == cost.memory(whole)[stage]["teacher weights"]
    training = cost.memory(one)["training"]
    assert (training["gradients"], training["head's gradient"]) == (4 * n, 0)
    assert cost.memory(one)["optimizer"]["gradients"] == 4 * n
    few, all_ = cost.work(one), cost.work(whole)
    assert few["optimizer"] == Work(0, 40 * n)
    assert few["sampling"].operations > all_["sampling"].operations
    assert few["training"].operations < all_["training"].operations
    assert few["training"].bytes < all_["training"].bytes
    assert few["teacher"] == all_["teacher"]


@pytest.mark.parametrize(
    ("tied", "padding", "passes", "tables"),
    [
        (True, 0, 1, 1),
        (True, 0, 2, 2),
        (True, 1, 1, 2),
        (True, 1, 2, 3),
        (False, 0, 1, 0),
    ],
)
def test_gradients_of_the_tables_beside_those_of_all_weights(
    tied: bool, padding: int, passes: int, tables: int
) -> None:
    """Each use of a table has a gradient of its own until the two are added."""
    config = model_config(raw_config("llama", 9000, tie_word_embeddings=tied))
    one = sizes(
        student=config, student_ids=9000 - padding, rows=2, micro_batch=2 // passes, prompt=1,
        completion=1, chunks=2, head_rows=2, n_events=4,
    )  # fmt: skip
    found = cost.memory(one)["training"]
    assert found["tables' gradients"] == tables * 4 * 9000 * config.width
    assert found["gradients"] == 4 * cost.parameters(config)


# ------------------------------------------------------------------------------------- the estimate
def test_sizes_are_those_of_the_largest_step() -> None:
    pair, config = pair_and_config(
        "llama", batch_size=4, rollouts=3, max_new_tokens=10, micro_batch=5, top_p=0.9
    )
    prompts = [Prompt(prompt="a"), Prompt(prompt="the quick brown fox", teacher_prompt="the fox")]
    cuda, kind = torch.device("cuda"), torch.bfloat16
    found = dry_run.sizes_of(pair, prompts, config, device=cuda, dtype=kind)
    own, other = pair.student.tokenizer, pair.teacher.tokenizer
    assert (found.rows, found.passes, found.pass_rows) == (12, 3, 5)
    assert found.prompt == len(own.encode("the quick brown fox").ids)
    assert found.teacher_prompt == len(other.encode("the fox").ids)
    texts = [p.prompt for p in prompts]
    counts = [
        sum(len(t.encode(x, add_special_tokens=False).ids) for x in texts) for t in (own, other)
    ]
    assert found.completion == 10
    assert 10 * counts[1] / counts[0] <= found.teacher_completion < 10 * counts[1] / counts[0] + 1
    assert found.chunks == 12 * min(10, found.teacher_completion)
    assert (found.head_rows, found.nucleus, found.cuda, found.teacher_bytes) == (120, True, True, 2)
    assert found.student_ids == own.get_vocab_size() == found.student.vocab_size - 3


@pytest.mark.parametrize(("prompt", "completion"), [("", None), ([{"role": "user"}], None)])
def test_without_text_the_teacher_is_taken_to_need_as_many_tokens(
    prompt: Any, completion: str | None
) -> None:
    pair, _ = pair_and_config("llama")
    assert dry_run._teacher_tokens_a_token(pair, [Prompt("x")]) > 0
    empty = replace(Prompt("x"), prompt=prompt, completion=completion)
    assert dry_run._teacher_tokens_a_token(pair, [empty]) == 1.0


def test_the_device_that_is_asked_is_that_of_the_run() -> None:
    pair, config = pair_and_config("qwen2", cuda_graphs=True)
    models, prompts = (pair.student, pair.teacher), [Prompt(prompt="the fox")]
    given = {"device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(ValueError, match="expected --cuda-graphs with --device cuda, got cpu"):
        dry_run.estimate(*models, prompts, config, **given)
    pair.student.decoder.to("meta")
    for check in (check_prompts, check_eval_prompts):
        check(prompts, pair, config, device=torch.device("cuda"))
        with pytest.raises(ValueError, match="with --device cuda, got meta"):
            check(prompts, pair, config)


def test_what_is_told_holds_the_figures() -> None:
    pair, config = pair_and_config("qwen2", batch_size=3, max_new_tokens=7)
    cpu, prompts = torch.device("cpu"), [Prompt(prompt="the fox"), Prompt(prompt="a")]
    found = dry_run.estimate(
        pair.student, pair.teacher, prompts, config, device=cpu, dtype=torch.float32
    )
    text = dry_run.told(found)
    n = sum(p.numel() for p in pair.student.decoder.parameters())
    assert found["student_parameters"] == n
    assert f"{n:,} parameters" in text
    assert found["prompts"] == 2
    assert found["peak_memory_gib"] == pytest.approx(sum(found["peak_parts_gib"].values()))
    assert found["peak_memory_gib"] == max(found["memory_gib"].values())
    assert found["floor_seconds_step"] == pytest.approx(sum(found["floor_seconds"].values()))
    assert re.search(rf"peak memory +{found['peak_memory_gib']:.3f} GiB", text)
    shown = [float(x) for x in re.findall(r"^ +([\d.]+) GiB ", text, re.MULTILINE)]
    assert len(shown) == dry_run.PARTS_SHOWN + 1
    assert sum(shown) == pytest.approx(found["peak_memory_gib"], abs=0.004)


def test_the_lines_that_the_page_names_are_in_the_code() -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "performance.md").read_text("utf-8")
    code = " ".join((root / "minigold" / "cost.py").read_text("utf-8").split())
    rows = re.findall(r"^\| .* \| `(.+)` \|$", page, re.MULTILINE)
    assert len(rows) == 24
    assert [row for row in rows if " ".join(row.split()) not in code] == []
