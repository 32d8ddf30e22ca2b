# SPDX-License-Identifier: Apache-2.0
"""minigold's alignment and loss in TRL's `GOLDTrainer`, between the models of `minigold demo`.

    python -m pip install ".[test]"     # for trl and transformers
    python examples/in_trl.py           # under a minute on one CPU core

TRL samples the student's answers and keeps optimizer, schedule and logs; `compute_loss` is ours. The
demo's student, with a SentencePiece tokenizer, learns from its byte-level teacher; then the same two the
other way round. TRL's own loss refuses both: it needs byte-level tokenizers on both sides
(`NotImplementedError`). For one process and one device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from minigold.batch import Answer, answer_of, pack
from minigold.chat import prompt_ids
from minigold.config import Config
from minigold.data import Prompt
from minigold.demo import FOLDER
from minigold.demo_task import held_out, prompts
from minigold.evaluate import evaluate
from minigold.hf import wrap
from minigold.loss import gold_loss
from minigold.masked import (
    choose_chunks,
    chunk_weight,
    chunk_weights,
    starts_of,
    tempered,
)
from minigold.pair import Pair, make_pair
from minigold.rollout import MASK, collect, seeds_of
from minigold.sample import completion_states, pad


class Trainer(GOLDTrainer):
    """TRL's trainer with minigold's loss.

    Args:
        pair: its student wraps the very model that is trained.
        texts: prompts by the ids that the student reads.
        gold: minigold's settings of the loss; the others (steps, sampling, optimizer) are TRL's.
    """

    def __init__(
        self, *, pair: Pair, texts: dict[tuple[int, ...], Prompt], gold: Config, **given: Any
    ) -> None:
        if gold.picks:
            raise ValueError(
                f"expected a mask known before the pass, got {gold.where}; see train_pass"
            )
        self.pair, self.texts, self.gold = pair, texts, gold
        super().__init__(**given)
        if self.accelerator.num_processes > 1:
            raise ValueError(
                "expected one process, got several; start it without accelerate or torchrun"
            )
        pair.student.decoder.train()  # refuses dropout; checkpoints layers where TRL has asked for it

    def compute_loss(self, _: Any, inputs: dict[str, Any], *__: Any, **___: Any) -> torch.Tensor:
        """Mean loss over the chosen chunks of a batch, in nats."""
        pair, gold = self.pair, self.gold
        answers = self.answers(inputs)
        rollouts = collect(pair, answers, [None] * len(answers), gold)  # both sides read them
        seed = seeds_of(gold.seed, self.state.global_step, MASK, 1)[0]
        chosen = choose_chunks(rollouts, pair.events, gold, seed=seed)

        decoder = pair.student.decoder
        hidden_BSD = decoder(pad([[*a.prompt_ids, *a.ids] for a in answers], decoder.device))
        student = [
            completion_states(hidden_SD, len(a.prompt_ids), len(a.ids))
            for hidden_SD, a in zip(hidden_BSD, answers, strict=True)
        ]
        if not any(
            mask.any() for mask in chosen
        ):  # both models agree: nothing to learn, a gradient of zero
            return hidden_BSD.sum() * 0
        teacher = [one.score.hidden_MD for one in rollouts]
        rows = pack(
            rollouts, chosen, student_starts=starts_of(student), teacher_starts=starts_of(teacher),
            teacher_end_id=pair.teacher.end_id, weights=chunk_weights(rollouts, chosen, gold),
            device=decoder.device,
        )  # fmt: skip
        return gold_loss(
            torch.cat(student), torch.cat(teacher), rows=rows, events=pair.events, beta=gold.beta,
            student_head=tempered(pair.student, gold.student_temperature),
            teacher_head=tempered(pair.teacher, gold.teacher_temperature),
            weight=chunk_weight(rollouts, chosen, gold),
        ).total  # fmt: skip

    def answers(self, inputs: dict[str, Any]) -> list[Answer]:
        """The rows of a batch of TRL's: prompt where labels are -100, then the completion."""
        student, teacher, found = self.pair.student, self.pair.teacher, []
        for ids, label, real in zip(
            inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool(), strict=True
        ):
            taken = label != -100
            before, own = ids[real & ~taken].tolist(), ids[real & taken].tolist()
            prompt = self.texts[tuple(before)]
            found.append(
                answer_of(
                    prompt, before, own, finished=own[-1] in student.eos_ids, on_policy=True,
                    teacher_prompt_ids=prompt_ids(teacher, prompt.prompt, plain=self.gold.teacher_plain),
                    student_tokenizer=student.tokenizer, teacher_tokenizer=teacher.tokenizer,
                    end_id=student.end_id, identical=self.pair.events.identical,
                )
            )  # fmt: skip
        return found


def settings(out: str, teacher: Path, **changes: Any) -> GOLDConfig:
    """TRL's: pure on-policy, quiet, in float32 on the CPU."""
    return GOLDConfig(**{
        "output_dir": out, "teacher_tokenizer_name_or_path": str(teacher), "use_uld_loss": True,
        "use_extended_uld": False,  # no byte offsets: they are ours
        "lmbda": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_completion_length": 24,
        "per_device_train_batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 5,
        "bf16": False, "use_cpu": True, "save_strategy": "no",
        "report_to": "none", "logging_steps": 10, "disable_tqdm": True, **changes,
    })  # fmt: skip


def data(pair: Pair, some: Sequence[Prompt], gold: Config) -> tuple[Dataset, dict[Any, Prompt]]:
    """TRL's data set, and the prompts by the ids that it makes of them."""
    student, texts, rows = pair.student, dict[Any, Prompt](), list[dict[str, str]]()
    for prompt in some:
        ids = prompt_ids(student, prompt.prompt, plain=gold.student_plain)
        rows.append(
            {
                "prompt": student.tokenizer.decode(ids, skip_special_tokens=False),
                "completion": "?",  # never read with lmbda 1
            }
        )
        texts[tuple(ids)] = prompt
    return Dataset.from_list(rows), texts


def reverse_kl(pair: Pair, gold: Config, n: int) -> float:
    """KL(student || teacher) on the student's own answers to held-out prompts, nats per byte."""
    return float(evaluate(pair, held_out()[:n], gold)["reverse_kl_per_byte"] or 0)


def run(student: Path, teacher: Path, *, steps: int, n: int = 100) -> tuple[float, float]:
    """Trains in TRL; the reverse KL on `n` held-out prompts before and after."""
    torch.manual_seed(0)
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (student, teacher)
    ]
    pair = make_pair(wrap(models[0], student), wrap(models[1], teacher))
    plain = [one.template is None for one in (pair.student, pair.teacher)]
    gold = Config(max_new_tokens=24, batch_size=n, student_plain=plain[0], teacher_plain=plain[1])
    rows, texts = data(pair, prompts(), gold)
    before = reverse_kl(pair, gold, n)
    with tempfile.TemporaryDirectory() as out:
        Trainer(
            pair=pair, texts=texts, gold=gold, model=models[0], teacher_model=models[1],
            args=settings(out, teacher, max_steps=steps), train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(student),
        ).train()  # fmt: skip
    return before, reverse_kl(pair, gold, n)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args(arguments).steps
    gemma, llama = FOLDER / "student", FOLDER / "teacher"
    for words, student, teacher in (
        ("a byte-level teacher, a SentencePiece student", gemma, llama),
        ("a SentencePiece teacher, a byte-level student", llama, gemma),
    ):
        before, after = run(student, teacher, steps=steps)
        print(f"{words}: reverse KL {before:.2f} -> {after:.2f} nats per byte in {steps} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
