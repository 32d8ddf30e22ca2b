# SPDX-License-Identifier: Apache-2.0
"""Makes the two models of `minigold demo` from nothing: tokenizers, teacher, warmed-up student.

    python examples/train_demo_models.py --out minigold/demo_data

The teacher is a Llama with a byte-level BPE and a chat template. It learns the task of
`minigold/demo_task.py` with labels. The student is a Gemma 3 with a SentencePiece-style BPE, a BOS
and no template. It first reads lines of the right form whose answers are random numbers, then a
few right ones: it knows how an answer looks, and little of the operator. About five minutes on
two cores. What it simplifies: the weights are rounded to float16 for shipping, and
neither model knows anything but the task.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer

from minigold.chat import prompt_ids
from minigold.data import Prompt
from minigold.demo import accuracy
from minigold.demo_task import held_out, number_word, prompts, warm_up
from minigold.families import model_config
from minigold.load import LanguageModel, load
from minigold.model import Decoder
from minigold.offsets import encode_continuation
from minigold.sample import completion_states, pad
from minigold.weights import save_decoder

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WIDTHS: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}
TEACHER = WIDTHS | {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
                    "num_hidden_layers": 3, "head_dim": 24, "rms_norm_eps": 1e-5}  # fmt: skip
STUDENT = WIDTHS | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
                    "num_hidden_layers": 3, "head_dim": 32, "query_pre_attn_scalar": 32,
                    "sliding_window": 16, "rope_theta": 10000.0,
                    "layer_types": ["sliding_attention", "full_attention", "full_attention"]}  # fmt: skip


# ------------------------------------------------------------------- tokenizers
def teacher_tokenizer() -> Tokenizer:
    """Byte-level BPE on lines of the task: most number words are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=360,
        special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [f"{p.prompt}{p.answer}" for p in prompts()[:2000]]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def student_tokenizer() -> Tokenizer:
    """SentencePiece-style BPE on other text, without splits at hyphens: pieces such as `ty-t`."""
    words = [number_word(n) for n in range(100)]
    lines = [f"{a} {b}" for a in words for b in words]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(lines, BpeTrainer(vocab_size=110, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    first = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate([*first, *pieces])}
    merges = [(left, right) for left, right in trained["merges"]]
    tokenizer.model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in first[:4]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


# ------------------------------------------------------------------- training
def fine_tune(
    model: LanguageModel,
    batches: Iterator[Sequence[Prompt]],
    *,
    steps: int,
    lr: float,
    plain: bool,
    say: Callable[[str], None] = print,
) -> None:
    """Plain fine-tuning on prompts with answers: mean cross-entropy of the answers' tokens.

    Tokens that touch a byte range in the prompt's `extra["mistakes"]` are read, and not learned.
    """
    decoder = model.decoder.train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, weight_decay=0.01, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            )
        batch = next(batches)
        told = [prompt_ids(model, p.prompt, plain=plain) for p in batch]
        coded = [encode_continuation(model.tokenizer, p.answer or "") for p in batch]
        said = [[*ids, model.end_id] for ids, _ in coded]
        learned = [
            [*_learned(ids, spans, p.extra.get("mistakes", ())), model.end_id]
            for (ids, spans), p in zip(coded, batch, strict=True)
        ]
        hidden_BSD = decoder(
            pad([[*a, *b] for a, b in zip(told, said, strict=True)], decoder.device)
        )
        states = [
            completion_states(hidden_SD, len(a), len(b) - 1)
            for hidden_SD, a, b in zip(hidden_BSD, told, said, strict=True)
        ]
        target_N = torch.tensor([i for ids in learned for i in ids])
        loss = F.cross_entropy(decoder.head.logits(torch.cat(states)), target_N)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 199 or step == steps - 1:
            say(f"step {step + 1}/{steps}  loss {loss.item():.4f}")
    decoder.eval()


def _learned(
    ids: Sequence[int], spans: np.ndarray, mistakes: Sequence[tuple[int, int]]
) -> list[int]:
    """The ids, and -100, which cross-entropy leaves out, for tokens that touch a mistake."""
    return [
        -100 if any(start < stop and end > first for first, stop in mistakes) else i
        for i, (start, end) in zip(ids, spans[:, :2].tolist(), strict=True)
    ]


def drawn(rows: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Endless random batches."""
    rng = np.random.default_rng(seed)
    while True:
        yield [rows[i] for i in rng.integers(0, len(rows), size).tolist()]


def with_random_answers(rows: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The form of the task without its content."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, 100, (len(rows), 2)).tolist()
    return [
        Prompt(row.prompt, answer=f"{number_word(a)}, {number_word(b)}")
        for row, (a, b) in zip(rows, pairs, strict=True)
    ]


# ------------------------------------------------------------------- folders
def new_folder(
    folder: Path, config: dict[str, Any], tokenizer: Tokenizer, *, end: str, template: str | None
) -> LanguageModel:
    """A Hugging Face folder with random weights, loaded."""
    names = ("<pad>", "<bos>") if template is None else (end, None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": names[0],
    }
    if names[1]:
        settings["bos_token"] = names[1]
    ids = {
        "bos_token_id": tokenizer.token_to_id("<bos>"),
        "eos_token_id": tokenizer.token_to_id(end),
        "pad_token_id": tokenizer.token_to_id(names[0]),
    }
    shape = config | {"vocab_size": tokenizer.get_vocab_size()} | ids
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        for name, content in (
            ("config.json", shape), ("generation_config.json", ids), ("tokenizer_config.json", settings),
        ):  # fmt: skip
            (source / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(str(source / "tokenizer.json"))
        if template is not None:
            (source / "chat_template.jinja").write_text(template, encoding="utf-8")
        save_decoder(Decoder(model_config(shape)), folder, source=source)
    return load(folder)


def ship(model: LanguageModel) -> None:
    """Writes the weights, in float16, over those in the model's folder."""
    with tempfile.TemporaryDirectory() as temporary:
        save_decoder(model.decoder.half(), temporary, source=model.folder)
        weights = Path(temporary) / "model.safetensors"
        (model.folder / weights.name).write_bytes(weights.read_bytes())


def main(argv: Sequence[str] | None = None) -> int:
    """Trains both and writes them; the accuracies are those of the shipped float16 weights."""
    parser = argparse.ArgumentParser(description="Makes the models of `minigold demo`.")
    parser.add_argument("--out", type=Path, required=True, help="gets teacher/ and student/")
    parser.add_argument("--only", choices=["teacher", "student"])
    args = parser.parse_args(argv)
    start = time.perf_counter()
    torch.manual_seed(0)
    if args.only != "student":
        teacher = new_folder(
            args.out / "teacher", TEACHER, teacher_tokenizer(), end="<|end|>", template=TEMPLATE
        )
        fine_tune(teacher, drawn(prompts(), 128, seed=1), steps=800, lr=2e-3, plain=False)
        ship(teacher)
    if args.only != "teacher":
        student = new_folder(
            args.out / "student", STUDENT, student_tokenizer(), end="<eos>", template=None
        )
        form = with_random_answers(prompts(), seed=2)
        fine_tune(student, drawn(form, 64, seed=3), steps=400, lr=2e-3, plain=True)
        fine_tune(student, drawn(warm_up(), 32, seed=4), steps=200, lr=1e-3, plain=True)
        ship(student)
    for name, plain in (("teacher", False), ("student", True)):
        if (args.out / name).is_dir():
            model = load(args.out / name)
            print(f"{name}: {accuracy(model, held_out(), plain=plain):.3f} exact match, "
                  f"{sum(p.numel() for p in model.decoder.parameters())} parameters")  # fmt: skip
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
