# SPDX-License-Identifier: Apache-2.0
"""`examples/in_trl.py`: TRL's trainer takes our loss, and what TRL does alone."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigold.config import Config
from minigold.demo import FOLDER
from minigold.demo_task import prompts
from minigold.hf import wrap
from minigold.masked import choose_chunks, train_pass
from minigold.pair import make_pair
from minigold.rollout import MASK, collect, seeds_of
from real_models import example

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns when it is imported
in_trl = example("in_trl")
GOLDTrainer = in_trl.GOLDTrainer
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_cpu.*:FutureWarning"),
]
GEMMA, LLAMA = FOLDER / "student", FOLDER / "teacher"  # SentencePiece, and byte-level
BOTH = [(GEMMA, LLAMA), (LLAMA, GEMMA)]


def pieces(student: Path, teacher: Path, gold: Config) -> tuple[Any, dict[str, Any]]:
    """A pair, and what TRL's trainer is given."""
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (student, teacher)
    ]
    pair = make_pair(wrap(models[0], student), wrap(models[1], teacher))
    rows, texts = in_trl.data(pair, prompts()[:40], gold)
    given = {"model": models[0], "teacher_model": models[1], "train_dataset": rows,
             "processing_class": AutoTokenizer.from_pretrained(student)}  # fmt: skip
    return pair, texts, given


def sampled_batch(trainer: Any) -> dict[str, Any]:
    """TRL samples in train mode alone."""
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize(("student", "teacher"), BOTH)
@pytest.mark.parametrize("where", ["all", "sampled"])
def test_the_gradient_in_trl_is_that_of_our_own_loop(
    student: Path, teacher: Path, where: str, tmp_path: Path
) -> None:
    """On a batch that TRL's trainer has sampled, with temperatures of the loss."""
    gold = Config(
        student_plain=student == GEMMA,
        teacher_plain=teacher == GEMMA,
        where=where,
        micro_batch=3,
        student_temperature=1.5,
        teacher_temperature=0.8,
    )
    pair, texts, given = pieces(student, teacher, gold)
    settings = in_trl.settings(str(tmp_path), teacher, max_steps=1, per_device_train_batch_size=6)
    trainer = in_trl.Trainer(pair=pair, texts=texts, gold=gold, args=settings, **given)
    batch = sampled_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {name: x.grad.clone() for name, x in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    answers = trainer.answers(batch)
    assert all(answer.prompt in prompts() for answer in answers)
    rollouts = collect(pair, answers, [None] * len(answers), gold)
    seed = seeds_of(gold.seed, 0, MASK, 1)[0]
    chosen = choose_chunks(rollouts, pair.events, gold, seed=seed)
    wanted = train_pass(pair, rollouts, chosen, gold).loss
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    for name, x in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], x.grad, atol=1e-6, rtol=1e-4)


def test_answers_that_trl_sampled_are_read_as_they_are(tmp_path: Path) -> None:
    gold = Config(student_plain=True)
    pair, texts, given = pieces(GEMMA, LLAMA, gold)
    settings = in_trl.settings(str(tmp_path), LLAMA, max_steps=1, max_completion_length=3)
    trainer = in_trl.Trainer(pair=pair, texts=texts, gold=gold, args=settings, **given)
    batch = sampled_batch(trainer)
    answers = trainer.answers(batch)
    assert {one.finished for one in answers} == {True, False}
    for one, row, text in zip(
        answers, batch["input_ids"], batch["original_completion_text"], strict=True
    ):
        assert row.tolist()[-3:][: len(one.ids)] == one.ids
        assert len(one.ids) == 3 or one.finished
        if "\ufffd" not in text:  # transformers writes broken UTF-8 in another way
            assert text.removesuffix("<eos>") == one.text


def test_a_sentencepiece_teacher_trains_a_student_in_trl() -> None:
    before, after = in_trl.run(LLAMA, GEMMA, steps=10, n=40)
    assert after < before - 0.1


def test_masks_that_the_example_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a mask known before the pass, got soft-or"):
        in_trl.Trainer(pair=None, texts={}, gold=Config(where="soft-or"))


@pytest.mark.slow
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_trl.main([]) == 0
    lines = re.findall(
        r"(\w+) student: reverse KL ([\d.]+) -> ([\d.]+) nats", capsys.readouterr().out
    )
    assert [name for name, _, _ in lines] == ["SentencePiece", "level"]
    assert all(float(after) < float(before) - 0.1 for _, before, after in lines)


@pytest.mark.parametrize(("student", "teacher"), BOTH)
@pytest.mark.parametrize("hybrid", [True, False])
def test_trl_alone_refuses_a_sentencepiece_tokenizer_on_either_side(
    student: Path, teacher: Path, hybrid: bool, tmp_path: Path
) -> None:
    """The student's when the data set is prepared, the teacher's in the first step."""
    gold = Config(student_plain=student == GEMMA)
    _, _, given = pieces(student, teacher, gold)
    args = in_trl.settings(
        str(tmp_path), teacher, max_steps=1, use_extended_uld=True, uld_use_hybrid_loss=hybrid
    )
    refused = pytest.raises(NotImplementedError, match="only ByteLevel BPE tokenizers")
    if student == GEMMA:
        with refused:
            GOLDTrainer(args=args, **given)
        return
    trainer = GOLDTrainer(args=args, **given)
    with refused:
        trainer.train()


def test_trl_alone_trains_such_a_pair_by_position(tmp_path: Path) -> None:
    """What it does not refuse: sorted probabilities of the k-th token beside those of the k-th."""
    _, _, given = pieces(LLAMA, GEMMA, Config())
    args = in_trl.settings(str(tmp_path), GEMMA, max_steps=1, logging_steps=1)
    trainer = GOLDTrainer(args=args, **given)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
