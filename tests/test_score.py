# SPDX-License-Identifier: Apache-2.0
"""Scores kept in a file: training from it is training from the teacher, and nothing else fits."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minigold import score
from minigold.carry import Reading
from minigold.config import Config
from minigold.data import Prompt
from minigold.events import CHUNK
from minigold.http_teacher import open_server
from minigold.load import LanguageModel, load
from minigold.score import KeptTeacher, open_scores, score_file
from minigold.tiers import limited
from minigold.train import distill
from teacher_server import serving
from test_cli import run, write_rows
from test_http_teacher import FAST, student
from test_train import CONFIG, prompt_of
from tiny_folders import TURNS, edit_json, tiny_folder
from tiny_models import tiny_model
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

TEXTS = [
    ("hello", "there, the fox"), ("the fox", "is naïve 日本 🙂"), ("def add", "(a, b):\n  return a"),
    ("x", ""), ("hello", "again"), ("hello", "there, the fox"), ("2 + 2", "= 4"),
]  # fmt: skip
ROWS = [prompt_of(prompt, completion=text) for prompt, text in TEXTS]
ROWS += [prompt_of("cut", completion="in the mid", finished=False)]
OFF = dataclasses.replace(CONFIG, lmbda=0.0, steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("scored")
    return tiny_folder(work / "teacher", "llama", byte_bpe(), end="<|im_end|>", seed=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load(folder)


@pytest.fixture(scope="module")
def scores(folder: Path, model: LanguageModel) -> Path:
    path = folder.parent / "twelve.safetensors"
    assert score_file(limited(model, 12), ROWS, path, plain=True) == len(ROWS) - 1  # one twice
    return path


def twin() -> LanguageModel:
    """A student with the teacher's tokenizer."""
    return tiny_model("qwen3", byte_bpe(), end="<|im_end|>", seed=1)


# ----------------------------------------------------------------------------- the round trip
@pytest.mark.parametrize("k", [0, 12, 10**4])
@pytest.mark.parametrize("same", [False, True])
def test_training_from_the_file_is_training_from_the_teacher(
    model: LanguageModel, folder: Path, tmp_path: Path, k: int, same: bool
) -> None:
    """At the same tier; with all of the vocabulary, as from the dense teacher."""
    k = min(k, model.n_tokens)
    config = dataclasses.replace(OFF, events="prefix" if k else CHUNK)
    score_file(limited(model, k), ROWS, tmp_path / "f.safetensors", plain=True)
    kept = open_scores(tmp_path / "f.safetensors", folder)
    assert (kept.tier, kept.top_k, kept.name) == ("topk" if k else "tokens", k, model.name)
    new = twin if same else student
    histories, weights = [], []
    for teacher in (kept, limited(model, k), *([model] if k == model.n_tokens else [])):
        one = new()
        histories.append(distill(one, teacher, ROWS, config))
        weights.append(torch.cat([p.flatten() for p in one.decoder.parameters()]))
    for other in histories[1:]:
        for row, known in zip(histories[0], other, strict=True):
            assert row["loss"] == pytest.approx(known["loss"], rel=2e-4, abs=1e-7)
            assert row["grad_norm"] == pytest.approx(known["grad_norm"], rel=2e-3, abs=1e-6)
            assert row["chunks"] == known["chunks"]
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)


def test_what_a_server_says_is_kept_too(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with serving(model) as server:
        teacher = open_server(server.url, folder, top_k=12, **FAST)
        score_file(teacher, ROWS, tmp_path / "f.safetensors", plain=True)
    kept = open_scores(tmp_path / "f.safetensors", folder)
    own = distill(student(), limited(model, 12), ROWS, OFF)
    for row, known in zip(distill(student(), kept, ROWS, OFF), own, strict=True):
        assert row["loss"] == pytest.approx(known["loss"], rel=1e-3)
    assert kept.name == "tiny"


@given(st.lists(st.tuples(st.text(max_size=6), st.text(max_size=12)), min_size=1, max_size=5),
       st.integers(0, 9))  # fmt: skip
def test_what_is_kept_comes_back(
    model: LanguageModel, folder: Path, texts: list[tuple[str, str]], k: int
) -> None:
    teacher = limited(model, k)
    rows = [prompt_of("p" + prompt, completion=text) for prompt, text in texts]
    with tempfile.TemporaryDirectory() as name:
        score_file(teacher, rows, Path(name) / "f.safetensors", plain=True)
        kept = open_scores(Path(name) / "f.safetensors", folder)
    for (prompt, ids), told in kept.told.items():
        (known,) = teacher.tell([Reading(prompt, ids)], micro_batch=1)
        torch.testing.assert_close(told.logp_M, known.logp_M, atol=1e-4, rtol=0)
        torch.testing.assert_close(told.logp_MK.exp(), known.logp_MK.exp(), atol=1e-4, rtol=0)
        assert told.id_MK.shape == known.id_MK.shape
    assert len(kept.told) == len({(p.prompt, p.completion) for p in rows})


def test_a_file_says_what_it_holds(scores: Path, folder: Path) -> None:
    kept = open_scores(scores, folder)
    assert kept.facts["teacher_top_k"] == 12
    assert len(kept.facts["teacher_scores_sha256"]) == 64
    lines = load_file(scores)["lines"].tobytes().decode().splitlines()
    assert [json.loads(line)["completion"] for line in lines] == [p.completion for p in ROWS]


# ------------------------------------------------------------------------------ what does not fit
@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([prompt_of("hello", completion="other")], {}, "line 1: .* got 'other' after a prompt of "),
        (
            [prompt_of("another", completion="again")],
            {},
            "which was not scored; score the file that",
        ),
        (
            [*ROWS, prompt_of("hello")],
            {},
            "line 1: expected a `completion` with scores as --teacher",
        ),
        (ROWS, {"lmbda": 0.5}, r"expected --lmbda 0 with scores as --teacher, got 0\.5"),
        (ROWS, {"events": "byte"}, "tier topk can serve .* got --events byte"),
        (ROWS, {"teacher_temperature": 2.0}, "got --teacher-temperature"),
    ],
)
def test_what_was_not_scored_is_refused_before_anything_starts(
    scores: Path,
    folder: Path,
    tmp_path: Path,
    rows: list[Prompt],
    settings: dict[str, Any],
    message: str,
) -> None:
    config = dataclasses.replace(OFF, **settings)
    with pytest.raises(ValueError, match=message):
        distill(student(), open_scores(scores, folder), rows, config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluation_needs_the_teacher_itself(scores: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="expected no --eval-prompts with scores as --teacher"):
        distill(student(), open_scores(scores, folder), ROWS, OFF, eval_prompts=ROWS)


def test_text_that_the_student_loses_is_refused(
    model: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    """The teacher would read what the student's tokens say, which was not scored."""
    from tokenizers_for_tests import byte_bpe_lossy

    rows = [prompt_of("hello", completion="zöe ß ÿ")]
    score_file(limited(model, 3), rows, tmp_path / "f.safetensors", plain=True)
    lossy = tiny_model("qwen3", byte_bpe_lossy(), end="<|im_end|>", seed=1)
    with pytest.raises(
        ValueError, match="prompt of line 1: expected completions that are in the sc"
    ):
        distill(lossy, open_scores(tmp_path / "f.safetensors", folder), rows, OFF)


def test_a_torn_or_edited_file_is_refused(scores: Path, folder: Path, tmp_path: Path) -> None:
    whole = scores.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"expected a whole file of scores in .*; score it again"
        ):
            open_scores(bad, folder)
    for place in (len(whole) - 1, len(whole) // 2):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            ValueError, match=r"as it was written, got other contents; score it again"
        ):
            open_scores(bad, folder)
    save_file({"x": load_file(scores)["ends"]}, bad)
    with pytest.raises(ValueError, match=r"expected .minigold scores 1. in .*, got None"):
        open_scores(bad, folder)
    with pytest.raises(FileNotFoundError, match="expected a file of scores, found no"):
        open_scores(tmp_path / "absent.safetensors", folder)


def test_a_file_that_is_no_scores_in_a_right_envelope_is_refused(
    scores: Path, folder: Path, tmp_path: Path
) -> None:
    with safe_open(scores, framework="numpy") as file:
        metadata = dict(file.metadata())
    del metadata["sha256"]
    bad, arrays = tmp_path / "bad.safetensors", load_file(scores)

    def refused(metadata: dict[str, str], arrays: dict[str, Any]) -> None:
        save_file(arrays, bad, {**metadata, "sha256": score._digest(metadata, arrays)})
        with pytest.raises(ValueError, match=r"expected scores in .*; score it again"):
            open_scores(bad, folder)

    for name in {*arrays} - {"lines"}:
        refused(metadata, {k: v for k, v in arrays.items() if k != name})
        refused(metadata, {**arrays, name: np.zeros((), arrays[name].dtype)})
    for name in ("logp", "top_ids", "top_logp", "ids", "ends"):
        refused(metadata, {**arrays, name: arrays[name][:-1]})
    for key in {*metadata} - {"format", "plain"}:
        refused({k: v for k, v in metadata.items() if k != key}, arrays)
    refused(metadata | {"facts": "[]"}, arrays)
    refused(metadata | {"top_k": "many"}, arrays)
    for dtype, size in (("F8_E4M3", 1), ("BF16", 2)):  # types that numpy does not have
        one = f'{{"x":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,{size}]}}}}'
        bad.write_bytes(len(one).to_bytes(8, "little") + one.encode() + b"x" * size)
        with pytest.raises(ValueError, match=r"expected a whole file of scores in .*, got "):
            open_scores(bad, folder)


def test_a_file_of_another_tokenizer_or_end_is_refused(
    scores: Path, folder: Path, tmp_path: Path
) -> None:
    other = tiny_folder(tmp_path / "other", "gemma3_text", sentencepiece_bpe(), end="</s>")
    with pytest.raises(
        ValueError, match=r"expected the tokenizer and end of turn by which .* was scor"
    ):
        open_scores(scores, other)
    ends = tiny_folder(tmp_path / "ends", "llama", byte_bpe(), end="<|endoftext|>")
    edit_json(ends / "tokenizer_config.json", eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match=r"expected the tokenizer and end of turn .*--teacher-tok"):
        open_scores(scores, ends)


def test_another_template_is_another_prompt(model: LanguageModel, tmp_path: Path) -> None:
    folder = tiny_folder(
        tmp_path / "t", "llama", byte_bpe(), end="<|im_end|>", seed=2, template=TURNS
    )
    config = dataclasses.replace(OFF, teacher_plain=False)
    score_file(limited(load(folder), 3), ROWS, tmp_path / "f.safetensors", plain=False)
    kept = open_scores(tmp_path / "f.safetensors", folder)
    assert len(distill(student(), kept, ROWS, config)) == 2
    with pytest.raises(ValueError, match=r"which was not scored; .* --teacher-plain"):
        distill(student(), kept, ROWS, OFF)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (prompt_of("a"), "line 1: expected a `completion` to score, got none; add it"),
        (prompt_of("", completion="a"), "line 1: expected a prompt of at least one"),
        (prompt_of("zq" * 60, completion="qz" * 60), "at most 200 tokens for the teacher .*, got"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: LanguageModel, tmp_path: Path, row: Prompt, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_file(limited(model, 3), [row], tmp_path / "f.safetensors", plain=True)
    with pytest.raises(ValueError, match="expected at least one completion to score, got none"):
        score_file(limited(model, 3), [], tmp_path / "f.safetensors", plain=True)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- the command line
def test_score_then_train_without_the_teacher(
    folder: Path, model: LanguageModel, tmp_path: Path
) -> None:
    tiny_folder(tmp_path / "student", "gemma3_text", sentencepiece_bpe(), begin="<s>", end="</s>")
    rows = [{"prompt": p, "completion": c} for p, c in TEXTS]
    write_rows(tmp_path / "c.jsonl", rows)
    out = tmp_path / "f.safetensors"
    code, told, err = run("score", "--teacher", folder, "--completions", tmp_path / "c.jsonl", "--out", out,
                          "--teacher-top-k", "7", "--teacher-plain")  # fmt: skip
    assert code == 0, err
    assert "tier topk (7 tokens a position)" in err
    assert json.loads(told) == {
        "out": str(out), "completions": 6, "bytes": out.stat().st_size, "tier": "topk", "top_k": 7,
    }  # fmt: skip
    code, _, err = run(
        "score", "--teacher", folder, "--completions", tmp_path / "c.jsonl", "--out", out
    )
    assert (code, "expected --out to be a new file that ends in .safetensors" in err) == (2, True)
    with serving(model) as server:
        code, _, err = run(
            "score", "--teacher", server.url, "--teacher-tokenizer", folder, "--completions",
            tmp_path / "c.jsonl", "--out", tmp_path / "g.safetensors", "--teacher-top-k", "7",
            "--teacher-plain",
        )  # fmt: skip
        assert code == 0, err
    for name in ("f", "g"):
        train = [
            "train", "--teacher", tmp_path / f"{name}.safetensors", "--student", tmp_path / "student",
            "--prompts", tmp_path / "c.jsonl", "--out", tmp_path / f"run-{name}", "--steps", "2",
            "--max-new-tokens", "6", "--plain-prompt",
        ]  # fmt: skip
        code, _, err = run(*train, "--lmbda", "0")
        assert (code, "expected --teacher-tokenizer with" in err) == (2, True)
        code, _, err = run(*train, "--teacher-tokenizer", folder)
        assert (code, "expected --lmbda 0 with scores as --teacher" in err) == (2, True)
        code, _, err = run(
            *train, "--teacher-tokenizer", folder, "--lmbda", "0", "--teacher-top-k", "3"
        )
        assert (code, "expected --teacher-top-k with a server" in err) == (2, True)
        code, _, err = run(*train, "--teacher-tokenizer", folder, "--lmbda", "0")
        assert code == 0, err
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("f", "g")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    config = json.loads((tmp_path / "run-f" / "config.json").read_text())
    assert config["teacher_scores_sha256"] == open_scores(out, folder).sha256
    code, _, err = run("eval", "--teacher", out, "--teacher-tokenizer", folder, "--student",
                       tmp_path / "student", "--prompts", tmp_path / "c.jsonl")  # fmt: skip
    assert (code, "expected a teacher that reads what the student samples" in err) == (2, True)
    code, _, err = run("score", "--teacher", out, "--teacher-tokenizer", folder, "--completions",
                       tmp_path / "c.jsonl", "--out", tmp_path / "h.safetensors")  # fmt: skip
    assert (code, (tmp_path / "h.safetensors").exists()) == (2, False)
    assert isinstance(open_scores(out, folder), KeptTeacher)
    assert Config().lmbda == 1
