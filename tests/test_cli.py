# SPDX-License-Identifier: Apache-2.0
"""The command line: one clear line for each mistake, and `train` from folders to a folder."""

import io
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import minigold
from minigold.cli import find_device, find_dtype, main, step_line
from minigold.config import Config, option_name
from minigold.dry_run import estimate
from minigold.load import LanguageModel, load
from tiny_folders import CHATML, edit_json, tiny_folder
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

METRICS = """step, loss, chunks, trained_fraction, disagreement_share, work_saved,
    one_to_one_fraction, unscorable, shared_mass_student, shared_mass_teacher, other_mass_student,
    other_mass_teacher, tail_mass_teacher, overhang_fraction, noncanonical_share, repetition, reverse_kl_per_byte,
    completion_tokens, completion_bytes, eos_rate, clipped_rate, off_policy_fraction, grad_norm, lr,
    seconds, seconds_sample, seconds_teacher, seconds_train, peak_memory_gib"""
DESIGN_OPTIONS = """--steps --batch-size --rollouts --micro-batch --max-new-tokens --temperature
    --top-p --top-k --events --beta --max-overhang --where --threshold --fraction --lmbda --lr
    --warmup --weight-decay --clip --plain-prompt --student-plain --teacher-plain --seed --device
    --dtype --log-every --eval-every --save-every --keep --patience --teacher --student --prompts
    --out --config --dry-run --resume"""
MORE_OPTIONS = """--eval-prompts --best-by --cuda-graphs --student-temperature --teacher-temperature
    --replay --lora-rank --lora-alpha --lora-targets --gradient-checkpointing --log-to --progress
    --teacher-tokenizer --teacher-top-k --teacher-model --teacher-timeout --teacher-patience
    --teacher-connections"""
VARYING = {"seconds", "seconds_sample", "seconds_teacher", "seconds_train", "peak_memory_gib"}
PROMPTS = [
    {"prompt": "hello", "id": 7},
    {"prompt": [{"role": "user", "content": "the fox 🙂"}], "teacher_prompt": "The answer is dog."},
    {"prompt": "def add", "completion": "(a, b):", "answer": "x"},
]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*args: str | Path) -> Result:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main([str(arg) for arg in args])
    return Result(code, out.getvalue(), err.getvalue())


def run_process(cwd: Path, *args: str | Path) -> Result:
    command = [sys.executable, "-m", "minigold", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def files_of(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


SPOILT: dict[str, Callable[[Path], object]] = {
    "unknown": lambda folder: edit_json(folder / "config.json", model_type="mamba"),
    "no_tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no_config": lambda folder: (folder / "config.json").unlink(),
    "broken": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
    "no_end": lambda folder: edit_json(folder / "generation_config.json", eos_token_id="x"),
    "strict": lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ raise_exception('one\ntwo') }}", "utf-8"
    ),
}
PROMPT_FILES = {
    "empty": b"",
    "blank": b"\n\n",
    "malformed": b'{"prompt": "a"}\n{"prompt": \n',
    "binary": b"\x89PNG\r\n\x1a\n\x00",
    "keys": b'{"prompt": "a"}\n\n{"question": "b"}\n',
    "long": b'{"prompt": "a"}\n{"prompt": "' + b"hello " * 200 + b'"}\n',
    "marker": b'{"prompt": "<think>"}\n',
    "silent": b'{"prompt": ""}\n',
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of different families and tokenizers, with templates; prompts; and bad ones."""
    work = tmp_path_factory.mktemp("work")
    template = CHATML.replace("<|im_start|>", "{{ bos_token }}").replace("<|im_end|>", "</s>")
    tiny_folder(
        work / "student",
        "gemma3_text",
        sentencepiece_bpe(),
        begin="<s>",
        end="</s>",
        template=template,
    )
    tiny_folder(work / "teacher", "llama", byte_bpe(), end="<|im_end|>", template=CHATML, seed=2)
    tiny_folder(work / "base", "qwen3", byte_bpe(), end="<|im_end|>", seed=3)
    tiny_folder(work / "small", "qwen2", byte_bpe(), end="<|im_end|>", rows=500)
    for name, spoil in SPOILT.items():
        shutil.copytree(work / "student", work / name)
        spoil(work / name)
    for name, lines in PROMPT_FILES.items():
        (work / f"{name}.jsonl").write_bytes(lines)
    write_rows(work / "prompts.jsonl", PROMPTS)
    (work / "full").mkdir()
    (work / "full" / "notes.txt").write_text("mine", "utf-8")
    return work


def command(work: Path, *more: str, **changes: str | Path | None) -> list[str | Path]:
    """`minigold train` with all that it needs; changes by name, None for an option alone."""
    given = {
        "teacher": work / "teacher",
        "student": work / "student",
        "prompts": work / "prompts.jsonl",
        "out": work / "run",
        "steps": "1",
        "max_new_tokens": "4",
        **changes,
    }
    words = [(option_name(key), value) for key, value in given.items()]
    return ["train", *(word for pair in words for word in pair if word is not None), *more]


def refused(work: Path, args: list[str | Path], message: str) -> None:
    before = files_of(work)
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(rf"minigold.*: .*{message}", err), err
    assert "Traceback" not in err
    assert files_of(work) == before


# ------------------------------------------------------------------------------ bad input
PLAIN: dict[str, Any] = {"plain_prompt": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "./absent"}, "expected a model folder, found no folder absent; check the path"),
        ({"teacher": "/absent"}, "expected a model folder, found no folder /absent; check the path"),
        ({"teacher": "owner/absent"}, "found no folder owner/absent, and the hub did not give it"),
        ({"student": "student/config.json"}, "got the file student/config.json; give the folder it"),
        ({"student": "full"}, "expected config.json in full, found none; give a Hugging Face model"),
        ({"student": "no_tokenizer"}, "expected tokenizer.json in no_tokenizer, found none; convert"),
        ({"teacher": "unknown"}, "expected model_type to be one of llama, .* got 'mamba'; this arch"),
        ({"teacher": "no_weights"}, "expected model.safetensors or .* in no_weights, found neither; "),
        ({"student": "no_config"}, "expected config.json in no_config, found none; give a"),
        ({"student": "broken"}, "expected a whole safetensors file .*broken.* download it again"),
        ({"student": "no_end"}, "expected eos_token_id in no_end to be a token id or a list of them"),
        ({"teacher": "strict"}, "line 1, teacher: .* got 'one two' from it; change the messages"),
        ({"teacher": "base"}, "line 1, teacher: expected a chat template for base, got none; use --p"),
        ({"prompts": "absent.jsonl"}, "expected a file of JSON lines, found no absent.jsonl; check"),
        ({"prompts": "full"}, "expected a file of JSON lines, got the folder full; name the file"),
        ({"prompts": "empty.jsonl"}, "expected prompts in empty.jsonl, got none; add lines such as"),
        ({"prompts": "blank.jsonl"}, "expected prompts in blank.jsonl, got none"),
        ({"prompts": "malformed.jsonl"}, "malformed.jsonl, line 2: expected one JSON object, got E"),
        ({"prompts": "binary.jsonl"}, "binary.jsonl, line 1: expected UTF-8, got byte 0x89 at byte 0"),
        ({"prompts": "keys.jsonl"}, "keys.jsonl, line 3: expected one of prompt and messages, got n"),
        ({"prompts": "malformed.jsonl", "student": "./absent"}, "malformed.jsonl, line 2: "),
        ({"prompts": "long.jsonl"}, "line 2, student: expected at most 196 tokens .* shorten the"),
        ({"prompts": "silent.jsonl", "lmbda": "0.5"}, "`completion` for --lmbda 0.5, got none; add"),
        ({"max_new_tokens": "200"}, "line 1, student: expected at most 0 tokens"),
        ({"prompts": "silent.jsonl", **PLAIN}, "line 1, teacher: expected a prompt of at least one"),
        (PLAIN, "line 2, student: expected text for .*student with --plain-prompt, got 1 messages"),
        ({"out": "full"}, "expected --out to be a new or empty folder, got full, which is not empty"),
        ({"out": "prompts.jsonl"}, "a new or empty folder, got prompts.jsonl, which is a file"),
        ({"out": "prompts.jsonl/run"}, "to be in a folder, got prompts.jsonl/run, but prompts.jsonl is"),
        ({"device": "abacus"}, "expected --device auto, cuda, mps or cpu on this machine, got 'abac"),
        ({"device": "meta"}, "expected --device auto, cuda, mps or cpu on this machine, got 'meta'"),
        ({"device": "cuda:99"}, "on this machine, got 'cuda:99'"),
        ({"dtype": "float16"}, "argument --dtype: invalid choice: 'float16'"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_bad_input_is_told_in_one_line_and_nothing_is_written(
    work: Path,
    changes: dict[str, str],
    message: str,
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(work)
    refused(work, command(work, *more, **changes), message)


def test_ids_beyond_the_embedding_are_warned_about_first(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    before = files_of(work)
    code, out, err = run(*command(work, teacher="small", prompts="marker.jsonl", **PLAIN))
    warning, error = err.splitlines()
    assert (code, out) == (2, "")
    assert warning.startswith(
        "small: the tokenizer has 501 ids, the embedding 500 rows; ids from 500"
    )
    message = (
        r"minigold: prompt of line 1, teacher: expected ids below 500 .* got 500 \('<think>'\)"
    )
    assert re.match(message, error)
    assert files_of(work) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [],
            r"the following arguments are required: \{train,align,generate,eval,score,report,demo\}; see minigold --help",
        ),
        (["train"], "required: --teacher, --student, --prompts, --out; see minigold train --help"),
        (["teach"], "invalid choice: 'teach'"),
        (["tra"], "invalid choice: 'tra'"),
        (["demo", "extra"], "unrecognized arguments: extra"),
        (["demo", "--steps", "3"], "unrecognized arguments: --steps 3"),
        (["demo", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--unknown\nline", "demo"], "unrecognized arguments: --unknown line; see"),
        (["--vers"], "required"),
    ],
)
def test_wrong_commands_are_refused(work: Path, args: list[str | Path], message: str) -> None:
    refused(work, args, message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--step", "3"], "unrecognized arguments: --step 3; see minigold --help"),
        (["--batch=3"], "unrecognized arguments: --batch=3"),
        (["--student-pl"], "unrecognized arguments: --student-pl"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["more"], "unrecognized arguments: more"),
        (["--steps", "two"], "argument --steps: invalid int value: 'two'"),
        (["--steps", "2.5"], "argument --steps: invalid int value: '2.5'"),
        (["--lr", "a\nb"], "argument --lr: invalid float value"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--student-plain=yes"], "argument --student-plain: ignored explicit argument 'yes'"),
        (["--steps", "0"], "expected --steps at least 1, got 0"),
        (["--seed", "-1"], "expected --seed at least 0, got -1"),
        (["--warmup", "1000000001"], "expected --warmup at most 1,000,000,000, got 1000000001"),
        (["--lr", "nan"], "expected --lr above 0, got nan"),
        (["--lr", "inf"], "expected --lr finite, got inf"),
        (["--temperature", "inf"], "expected --temperature finite, got inf"),
        (["--beta", "1.01"], "expected --beta from 0 to 1, got 1.01"),
        (["--where", "often"], "expected --where one of all, weighted, sampled, .* random, got 'often'"),
        (["--replay", "reject"], "expected --replay with --where random only, got 'reject'"),
        (["--fraction", "0.5"], "expected --fraction with the masks divergence and soft-or only"),
        (["--events", ""], "expected --events one of prefix, strict, byte, chunk, got ''"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_options_are_refused(work: Path, more: list[str], message: str) -> None:
    refused(work, command(work, *more), message)


def test_every_option_and_command_of_the_design_is_there_or_refused() -> None:
    listed = re.findall(r"--[\w-]+", run("train", "--help").out)
    assert {*listed} == {"--help", *DESIGN_OPTIONS.split(), *MORE_OPTIONS.split()}
    commands = re.search(r"\{(.*?)\}", run("--help").out)
    assert commands is not None
    assert set(commands[1].split(",")) == {
        "train",
        "align",
        "generate",
        "eval",
        "score",
        "report",
        "demo",
    }


@pytest.mark.parametrize("name", ["train", "align", "generate", "eval", "score", "report", "demo"])
def test_help_lists_each_option_once_with_its_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    parts = re.split(r"^  (--[\w-]+)", out, flags=re.MULTILINE)
    help_of = dict(zip(parts[1::2], map(str.split, parts[2::2]), strict=True))
    assert len(help_of) == len(parts) // 2 >= 1
    for option, words in help_of.items():
        assert re.search(r"\((default:? .+|required)\)$", " ".join(words)), option
    if name == "train":
        for f in fields(Config):
            text = " ".join(help_of[option_name(f.name)])
            assert text.endswith(f"{f.metadata['help']} (default {f.default})")


# ------------------------------------------------------------------- train, from end to end
@pytest.fixture(scope="module")
def trained(work: Path) -> Result:
    settings = {
        "steps": "2",
        "batch_size": "3",
        "rollouts": "2",
        "max_new_tokens": "12",
        "lr": "0.01",
    }
    chosen = {"warmup": "0", "where": "all", "max_overhang": "0.2", "lmbda": "0.7", "seed": "5"}
    return run(*command(work, out=work.parent / "out" / "run", **settings, **chosen))


@pytest.fixture
def out(work: Path, trained: Result) -> Path:
    return work.parent / "out" / "run"


def test_train_ends_with_a_line_of_json(trained: Result, out: Path) -> None:
    assert trained.code == 0, trained.err
    lines = trained.out.splitlines()
    assert len(lines) == 1
    last = json.loads(lines[-1])
    assert last == {"out": str(out), **rows_of(out / "metrics.jsonl")[-1]}
    assert re.search(
        r"^step 1/2  loss \d+\.\d{4}  trained [01]\.\d\d of \d+ chunks", trained.err, re.MULTILINE
    )
    assert re.search(r"^mass audit: \d+ events\n  student: ", trained.err, re.MULTILINE)
    assert "Traceback" not in trained.err


def test_a_run_leaves_its_settings_metrics_samples_and_student(out: Path, trained: Result) -> None:
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "final",
        "report.html",
    }
    assert not [p for p in out.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pickle")]
    config = json.loads((out / "config.json").read_text("utf-8"))
    names = {f.name for f in fields(Config)}
    models = {"student", "teacher", "student_dtype", "teacher_dtype", "device"}
    models.add("teacher_weights_sha256")
    assert set(config) == {*names, *models, "prompts_sha256", "eval_prompts_sha256", "versions"}
    assert (config["steps"], config["lr"], config["seed"], config["lmbda"]) == (2, 0.01, 5, 0.7)
    assert config["versions"]["minigold"] == minigold.__version__


def test_metrics_have_exactly_the_keys_of_the_design(out: Path, trained: Result) -> None:
    rows = rows_of(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) == set(METRICS.replace(",", " ").split())
        numbers = [x for x in row.values() if isinstance(x, float)]
        assert len(numbers) > 15
        assert all(map(math.isfinite, numbers))
        compared = 1 - row["overhang_fraction"]  # and those that broke no character
        assert compared - 0.1 < row["trained_fraction"] < compared + 1e-6
        assert row["lr"] in (0.01, pytest.approx(0.001), pytest.approx(0.0055))


def test_samples_keep_the_prompts_and_the_extra_columns(out: Path, trained: Result) -> None:
    rows = rows_of(out / "samples.jsonl")
    assert len(rows) == 2 * 3 * 2
    for row in rows:
        prompt = PROMPTS[row["line"] - 1]
        assert row["prompt"] == prompt["prompt"]
        for column in ("id", "answer", "teacher_prompt"):
            assert row.get(column) == prompt.get(column)
        n = len(row["chunks"])
        assert n == len(row["acceptance"]) == len(row["trained"]) == len(row["teacher_best"])
        assert len(row["student_spans"]) == len(row["student_ids"]) - row["finished"]
    fixed = [row for row in rows if not row["on_policy"]]
    assert {row["completion"] for row in fixed} <= {"(a, b):"}


def test_transformers_loads_the_student_that_was_trained(
    work: Path, out: Path, trained: Result
) -> None:
    ours, before = load(out / "final"), load(work / "student")
    theirs = AutoModelForCausalLM.from_pretrained(out / "final", dtype=torch.float32)
    ids = torch.tensor([ours.tokenizer.encode("the quick brown fox").ids])
    with torch.no_grad():
        expected = theirs(ids).logits[..., : ours.n_tokens]
        torch.testing.assert_close(ours.decoder.head.logits(ours.decoder(ids)), expected)
        moved = ours.decoder(ids) - before.decoder(ids)
    assert moved.abs().max() > 1e-3
    assert (ours.template, ours.eos_ids, ours.end_id) == (
        before.template,
        before.eos_ids,
        before.end_id,
    )
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert tokenizer("the fox")["input_ids"] == ours.tokenizer.encode("the fox").ids


def test_a_second_run_into_the_same_folder_changes_nothing(
    work: Path, out: Path, trained: Result
) -> None:
    message = f"expected --out to be a new or empty folder, got {re.escape(str(out))}, which is not"
    refused(out, command(work, out=out), message)


def test_a_process_gives_the_same_numbers_for_the_same_seed(
    work: Path, out: Path, trained: Result
) -> None:
    config = json.loads((out / "config.json").read_text("utf-8"))
    names = [f.name for f in fields(Config) if config[f.name] != f.default]
    done = run_process(work, *command(
        work, out="again", teacher="teacher", student="student", prompts="prompts.jsonl",
        **{name: str(config[name]) for name in names},
    ))  # fmt: skip
    shutil.rmtree(work / "again")
    assert done.code == 0, done.err
    first, second = (json.loads(text.splitlines()[-1]) for text in (trained.out, done.out))
    assert second.pop("out") == "again"
    assert {k: second[k] for k in second if k not in VARYING} == {
        k: first[k] for k in first if k not in {*VARYING, "out"}
    }


def test_a_process_tells_a_mistake_in_one_line(work: Path) -> None:
    before = files_of(work)
    done = run_process(work, *command(work, student="./absent"))
    line = "minigold: expected a model folder, found no folder absent; check the path\n"
    assert done == Result(2, "", line)
    assert files_of(work) == before


def test_plain_prompt_means_both_sides(work: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [{"prompt": "hello"}])
    args = command(
        work,
        "--plain-prompt",
        "--log-every",
        "2",
        out=tmp_path / "new",
        prompts=tmp_path / "p.jsonl",
    )
    done = run(*args)
    assert done.code == 0, done.err
    assert "step 1/1" not in done.err
    config = json.loads((tmp_path / "new" / "config.json").read_text("utf-8"))
    assert config["student_plain"] is config["teacher_plain"] is True


def test_an_empty_folder_will_do(work: Path, tmp_path: Path) -> None:
    assert run(*command(work, out=tmp_path, teacher=work / "student")).code == 0
    assert (tmp_path / "final" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------ the dry run
def test_a_dry_run_tells_what_a_step_needs_and_writes_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(work)
    monkeypatch.setattr("minigold.cli.distill", partial(raises, AssertionError("trained")))
    more = ("--dry-run", "--batch-size", "3", "--rollouts", "2")
    code, out, err = run(*command(work, *more, out=work / "new" / "run"))
    assert (code, err) == (0, "")
    *lines, last = out.splitlines()
    found = json.loads(last)
    for name in ("student", "teacher"):
        n = sum(p.numel() for p in load(work / name).decoder.parameters())
        assert found[f"{name}_parameters"] == n
        assert any(line.startswith(name) and f"{n:,} parameters" in line for line in lines)
    assert (found["prompts"], found["rows"], found["student_tokens"]) == (3, 6, 24)
    assert found["prompt_tokens"] > found["longest_prompt"] > 0
    assert found["peak_memory_gib"] == max(found["memory_gib"].values()) > 0
    assert min(found["floor_seconds"].values()) > 0
    assert files_of(work) == before


def test_a_dry_run_reads_no_weights(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def looked(student: LanguageModel, teacher: LanguageModel, *args: Any, **more: Any) -> Any:
        seen.extend(p.is_meta for one in (student, teacher) for p in one.decoder.parameters())
        return estimate(student, teacher, *args, **more)

    monkeypatch.setattr("minigold.cli.estimate", looked)
    assert run(*command(work, "--dry-run")).code == 0
    assert len(seen) > 20
    assert all(seen)


# --------------------------------------------------------------------------------- the rest
def raises(error: BaseException, *_args: object, **_more: object) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "minigold: stopped\n"),
        (FloatingPointError("step 3: not\n finite"), 2, "minigold: step 3: not finite\n"),
        (OSError("no space"), 2, "minigold: no space\n"),
        (ValueError("expected a"), 2, "minigold: expected a\n"),
    ],
)
def test_what_ends_a_run_is_told_in_one_line(
    work: Path, error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigold.cli.distill", partial(raises, error))
    assert run(*command(work)) == Result(code, "", line)


@pytest.mark.parametrize("told", ["", "CUDA out of memory.\n Tried to allocate 2 GiB"])
def test_too_little_memory_is_told_in_one_line(
    work: Path, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigold.cli.distill", partial(raises, torch.OutOfMemoryError(told)))
    code, out, err = run(*command(work))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert " ".join(told.split()) in err and "lower --micro-batch" in err


def test_an_error_of_our_own_is_not_hidden(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigold.cli.distill", partial(raises, AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        run(*command(work))


def test_logging_is_as_before_when_a_command_ends(work: Path) -> None:
    log = logging.getLogger("minigold")
    before = (list(log.handlers), log.level)
    run(*command(work, student="./absent"))
    run("--version")
    assert (log.handlers, log.level) == before


def test_demo_prints_its_figures_last(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def run_demo(**options: Any) -> dict[str, Any]:
        asked.append(options)
        return {"student_after": 0.9}

    monkeypatch.setattr("minigold.demo.run_demo", run_demo)
    assert run("demo", "--out", "somewhere", "--seed", "3") == Result(
        0, '{"student_after": 0.9}\n', ""
    )
    assert run("demo").code == 0
    assert asked == [{"out": Path("somewhere"), "seed": 3}, {"out": None, "seed": 0}]


def test_main_reads_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minigold", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"minigold {minigold.__version__}\n"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "trained 0.50 of 12 chunks  rKL/byte -0.0123  ended 1.00  1.5 s"),
        ({"reverse_kl_per_byte": None}, "trained 0.50 of 12 chunks  ended 1.00  1.5 s"),
        (
            {"trained_fraction": None},
            "trained 0.00 of 12 chunks  rKL/byte -0.0123  ended 1.00  1.5 s",
        ),
        ({"eos_rate": None}, "trained 0.50 of 12 chunks  rKL/byte -0.0123  1.5 s"),
    ],
)
def test_a_step_is_one_line(changes: dict[str, Any], line: str) -> None:
    metrics = {"step": 3, "loss": 0.25, "trained_fraction": 0.5, "chunks": 12, "seconds": 1.52}
    metrics |= {"reverse_kl_per_byte": -0.0123, "eos_rate": 1.0, **changes}
    assert step_line(metrics, 9) == f"step 3/9  loss 0.2500  {line}"


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_best_device(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["abacus", "", "meta", "cuda:99", "hpu", "CPU", "cpu\nx", "-1"])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match="expected --device auto, cuda, mps or cpu on this machine, got"
    ):
        find_device(name)


def test_numbers_of_the_teacher_follow_the_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert find_device("cpu") == cpu
    assert [find_dtype("auto", d) for d in (cpu, cuda)] == [torch.float32, torch.bfloat16]
    assert [find_dtype("bfloat16", d) for d in (cpu, cuda)] == [torch.bfloat16] * 2
    assert [find_dtype("float32", d) for d in (cpu, cuda)] == [torch.float32] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 2.5}, "expected --steps of type int, got 2.5"),
        ({"steps": True}, "expected --steps of type int, got True"),
        ({"lr": "1e-3"}, "expected --lr of type float, got '1e-3'"),
        ({"student_plain": "no"}, "expected --student-plain of type bool, got 'no'"),
        ({"where": None}, "expected --where of type str, got None"),
        ({"clip": math.inf}, "expected --clip finite, got inf"),
        ({"clip": 10**400}, "expected --clip finite, got 1000"),
        ({"warmup": -1}, "expected --warmup at least 0, got -1"),
        ({"warmup": 10**400}, "expected --warmup at most 1,000,000,000, got 1000"),
        ({"steps": 10**9 + 1}, "expected --steps at most 1,000,000,000, got 1000000001"),
        ({"seed": 10**18 + 1}, "expected --seed at most 1,000,000,000,000,000,000, got 1000"),
        ({"top_p": 0}, "expected --top-p above 0 and at most 1, got 0"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**values)


def test_sampling_is_pure_at_temperature_one_without_filters() -> None:
    assert Config(temperature=1).pure
    assert not any(
        Config(**{k: v}).pure for k, v in (("temperature", 0.9), ("top_p", 0.9), ("top_k", 5))
    )
