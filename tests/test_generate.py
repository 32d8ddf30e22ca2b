# SPDX-License-Identifier: Apache-2.0
"""Text that comes while it is written, and answers that become a prompts file again."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from minigold import sample as sampling
from minigold.chat import prompt_ids
from minigold.cli import main
from minigold.config import Config
from minigold.data import Prompt, read_prompts
from minigold.generate import Utterance, completed, said, stream, text_of, write
from minigold.load import LanguageModel, load
from minigold.model import Decoder
from minigold.offsets import CUT, encode_continuation, text_of_ids, vocabulary
from minigold.pair import Pair, make_pair
from minigold.rollout import DRAW, collect, sample_answers, seeds_of
from minigold.sample import Completion, sample
from minigold.train import take_step
from strategies import texts
from tiny_folders import CHATML, tiny_folder
from tiny_models import new_decoder, tiny_model
from tokenizers_for_tests import FAMILIES, MORE_FAMILIES, byte_bpe, sentencepiece_bpe

ALL = {**FAMILIES, **MORE_FAMILIES}


# ------------------------------------------------------------------- text of ids, one by one
@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_the_parts_are_the_text_and_none_has_half_a_character(name: str, data: Any) -> None:
    tokenizer = ALL[name]()
    one_id = st.integers(0, tokenizer.get_vocab_size() - 1)
    pieces = st.one_of(
        texts(3).map(lambda text: encode_continuation(tokenizer, text)[0]),
        one_id.map(lambda i: [i]),
    )
    ids = [i for piece in data.draw(st.lists(pieces, max_size=8)) for i in piece]
    text, so_far, spelled = Utterance(tokenizer), "", b""
    whole = text_of_ids(tokenizer, ids)
    token_bytes = vocabulary(tokenizer).token_bytes
    for i in ids:
        so_far, spelled = so_far + text.add(i), spelled + token_bytes[i]
        assert whole.startswith(so_far)
        waiting = spelled.decode("utf-8", "replace").removeprefix(so_far)
        assert waiting in ("", "\ufffd", 2 * "\ufffd")  # the begin of one character at most
    assert so_far + text.close() == whole


def test_an_emoji_comes_whole_with_its_last_token() -> None:
    tokenizer = byte_bpe()
    ids = encode_continuation(tokenizer, "a🤖b")[0]
    text = Utterance(tokenizer)
    assert [text.add(i) for i in ids] == ["a", "", "", "🤖", "b"]
    assert text.close() == ""


def test_a_space_before_the_first_word_stays_and_markers_are_not_said() -> None:
    tokenizer = sentencepiece_bpe()
    fox = encode_continuation(tokenizer, " fox")[0]
    for ids in (fox, [tokenizer.token_to_id("<s>"), *fox, tokenizer.token_to_id("</s>")]):
        text = Utterance(tokenizer)
        assert "".join(text.add(i) for i in ids) == " fox"


def test_a_tokenizer_that_cannot_write_is_refused() -> None:
    reader = Tokenizer.from_str(byte_bpe().to_str())
    reader.decoder = decoders.CTC()
    with pytest.raises(ValueError, match="can read text"):
        Utterance(reader)


# ----------------------------------------------------------------------------- one answer
def model_of(tokenizer: Tokenizer = byte_bpe(), **more: Any) -> LanguageModel:  # noqa: B008
    return tiny_model("llama", tokenizer, end=more.pop("end", "<|im_end|>"), **more)


def with_stops(model: LanguageModel, stops: range) -> LanguageModel:
    """Every so many ids end an answer, so that answers end early."""
    return dataclasses.replace(model, eos_ids=tuple(stops), end_id=stops[0])


@pytest.mark.parametrize("look", [1, 16])
def test_what_is_said_is_the_text_of_the_answer(look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 is how a GPU is looked at: tokens behind the end of the answer come too."""
    monkeypatch.setitem(sampling.LOOK, "cpu", look)
    model = with_stops(model_of(), range(2, 500, 17))
    ends = set()
    for seed in range(12):
        parts: list[str] = []
        done = stream(model, [5, 6], parts.append, max_new_tokens=30, seed=seed)
        (want,) = sample(
            model.decoder, [[5, 6]], max_new_tokens=30, eos_ids=model.eos_ids, seed=seed
        )
        assert (done.ids, done.finished) == (want.ids, want.finished)
        assert "".join(parts) == text_of_ids(model.tokenizer, said(done))
        assert done.ids[-1] in model.eos_ids or len(said(done)) == 30
        ends.add(done.finished)
    assert ends == {True, False}


def test_each_token_is_said_before_the_next_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, seen = [0], []
    forward = Decoder.forward

    def counted(self: Decoder, *args: Any) -> Any:
        passes[0] += 1
        return forward(self, *args)

    monkeypatch.setattr(Decoder, "forward", counted)
    stream(model_of(), [5], lambda _text: seen.append(passes[0]), max_new_tokens=9)
    assert seen[:9] == list(range(1, 10))


def test_sampling_settings_reach_the_sampler() -> None:
    model = model_of()
    for settings in ({"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.05}, {"seed": 4}, {}):
        done = stream(model, [5], lambda _text: None, max_new_tokens=12, **settings)
        want = sample(model.decoder, [[5]], max_new_tokens=12, eos_ids=model.eos_ids, **settings)
        assert done.ids == want[0].ids


# ------------------------------------------------------------------------------- many answers
ROWS = [
    Prompt("hello", line=1, extra={"id": 7, "tags": ["é"]}),
    Prompt([{"role": "user", "content": "🙂"}], completion="old", answer="x", line=2),
    Prompt("def add", teacher_prompt="hint", completion="cut", finished=False, line=3),
    Prompt("Paris is", line=4),
    Prompt("x", line=5),
]


def written(model: LanguageModel, **more: Any) -> list[list[dict[str, Any]]]:
    ids = [[5, 6], [7], [8, 9, 10], [5, 6], [11]]
    settings = {"seeds": [3, 1, 4, 1, 5], "batch_size": 2, "max_new_tokens": 12, **more}
    return list(write(model, ROWS, ids, **settings))


def test_the_batch_size_changes_no_answer() -> None:
    model = with_stops(model_of(), range(2, 500, 9))
    want = [row for rows in written(model) for row in rows]
    assert [len(rows) for rows in written(model)] == [2, 2, 1]
    assert {row["finished"] for row in want} == {True, False}
    assert len({row["completion"] for row in want}) == 5
    for size in (1, 3, 9):
        assert [row for rows in written(model, batch_size=size) for row in rows] == want


def test_each_line_keeps_its_columns_and_can_be_read_again(tmp_path: Path) -> None:
    rows = [row for some in written(model_of()) for row in some]
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for before, row, after in zip(ROWS, rows, read_prompts(path), strict=True):
        want = {"completion": row["completion"], "finished": row["finished"]}
        assert after == dataclasses.replace(before, **want)
    assert list(rows[0]) == ["prompt", "completion", "finished", "id", "tags"]
    assert completed(ROWS[2], "", finished=True) == {
        "prompt": "def add", "completion": "", "finished": True, "teacher_prompt": "hint",
    }  # fmt: skip


def test_a_character_that_was_cut_is_left_out_and_a_broken_one_is_not() -> None:
    tokenizer = byte_bpe()
    ids = encode_continuation(tokenizer, "a🤖")[0]

    def text(ids: list[int], *, finished: bool) -> str:
        return text_of(tokenizer, Completion(ids, torch.zeros(len(ids)), finished, None))

    assert text(ids, finished=False) == "a🤖"
    assert text(ids[:-1], finished=False) == "a"
    assert text([*ids[:-1], tokenizer.token_to_id("<|im_end|>")], finished=True) == "a\ufffd"
    assert text([*ids[:-1], ids[0]], finished=False) == "a\ufffda"


# --------------------------------------------------- answers of one model, training of another
SETTINGS = Config(
    batch_size=6, micro_batch=4, max_new_tokens=10, where="all", student_plain=True,
    teacher_plain=True,
)  # fmt: skip


def pair_of() -> Pair:
    student = tiny_model("gemma3_text", sentencepiece_bpe(), end="</s>", seed=1)
    return make_pair(student, with_stops(model_of(seed=2), range(2, 500, 29)))


def taught(pair: Pair, n: int = 6) -> list[Prompt]:
    """Prompts that the teacher has answered."""
    asked = [Prompt(text, line=i) for i, text in enumerate(("hello", "fox", "def", "Paris") * n)][
        :n
    ]
    ids = [prompt_ids(pair.teacher, p.prompt, plain=True) for p in asked]
    seeds = list(range(n))
    rows = write(pair.teacher, asked, ids, seeds=seeds, batch_size=4, max_new_tokens=10)
    return [
        dataclasses.replace(p, completion=row["completion"], finished=row["finished"])
        for p, row in zip(asked, (row for some in rows for row in some), strict=True)
    ]


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_lmbda_is_the_share_of_rows_that_the_student_samples(lmbda: float) -> None:
    pair = pair_of()
    prompts = taught(pair, 40)
    config = dataclasses.replace(SETTINGS, lmbda=lmbda, rollouts=2, max_new_tokens=3)
    answers, side = sample_answers(pair, prompts, config, number=3)
    assert [a.prompt.line for a in answers] == [i for i in range(40) for _ in range(2)]
    share = sum(a.on_policy for a in answers) / len(answers)
    assert share == lmbda if lmbda != 0.5 else 0.35 < share < 0.65
    for answer, known in zip(answers, side, strict=True):
        assert (known is not None) == answer.on_policy
        if not answer.on_policy:
            assert answer.text == answer.prompt.completion
            assert answer.finished == answer.prompt.finished
    again = sample_answers(pair, prompts, config, number=4)[0]
    same = [a.on_policy == b.on_policy for a, b in zip(answers, again, strict=True)]
    assert all(same) == (lmbda != 0.5)  # other coins in another step


def test_prompts_without_completion_are_sampled_whatever_lmbda_is() -> None:
    prompts = [Prompt("hello", completion=" fox"), Prompt("hello")] * 3
    config = dataclasses.replace(SETTINGS, lmbda=0.0)
    answers, _ = sample_answers(pair_of(), prompts, config, number=1)
    assert [a.on_policy for a in answers] == [False, True] * 3


@pytest.mark.parametrize("same_tokenizer", [False, True])
def test_a_completion_that_was_cut_off_is_not_taught_to_end_there(same_tokenizer: bool) -> None:
    pair = pair_of()
    if same_tokenizer:
        pair = make_pair(pair.student, dataclasses.replace(pair.student))
    config = dataclasses.replace(SETTINGS, lmbda=0.0)
    prompts = [Prompt("x", completion=" the fox", finished=yes) for yes in (True, False)]
    (ended, cut), side = sample_answers(pair, prompts, config, number=1)
    assert ended.ids == [*cut.ids, pair.student.end_id]
    assert (ended.finished, cut.finished) == (True, False)
    assert cut.text == ended.text == " the fox"
    assert len(ended.chunks.s0) == len(cut.chunks.s0) + 1
    assert cut.chunks.end[-1] == len(" the fox") and cut.chunks.end[-1] > cut.chunks.start[-1]
    assert cut.chunks.flaw[-1] == (0 if same_tokenizer else CUT)
    r_ended, r_cut = collect(pair, [ended, cut], side, config)
    np.testing.assert_allclose(r_ended.student_logp_C[:-2], r_cut.student_logp_C[:-1], atol=1e-4)
    assert np.isnan(r_cut.teacher_logp_C[-1]) != same_tokenizer


@pytest.mark.parametrize("finished", [True, False])
def test_a_step_takes_completions_without_text(finished: bool) -> None:
    pair = pair_of()
    student = dataclasses.replace(
        pair.student, decoder=new_decoder("gemma3_text", pair.student.n_tokens)
    )
    pair = dataclasses.replace(pair, student=student)
    optimizer = torch.optim.SGD(student.decoder.parameters(), lr=0.0)
    config = dataclasses.replace(SETTINGS, lmbda=0.0)
    empty = [Prompt("hello", completion="", finished=finished)] * 2
    step = take_step(pair, optimizer, empty, config, number=2)
    assert step.metrics["chunks"] == 2 * finished
    assert step.metrics["trained_fraction"] == (1.0 if finished else None)
    step = take_step(
        pair, optimizer, [*empty, Prompt("hello", completion=" the fox")], config, number=2
    )
    assert step.metrics["trained_fraction"] == 1


# ------------------------------------------------------------------------------ command line
class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*args: str | Path) -> Result:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main([str(arg) for arg in args])
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher with a template, and prompts."""
    work = tmp_path_factory.mktemp("generate")
    tiny_folder(work / "base", "gemma3_text", sentencepiece_bpe(), begin="<s>", end="</s>")
    tiny_folder(work / "chat", "llama", byte_bpe(), end="<|im_end|>", template=CHATML, seed=2)
    rows = [
        {"prompt": "hello", "id": 7},
        {
            "messages": [
                {"role": "user", "content": "the 🙂"},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"prompt": "Paris", "answer": "x"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (work / "prompts.jsonl").write_text(text, "utf-8")
    (work / "texts.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "fox"}\n' * 3, "utf-8")
    return work


def answer_to(folder: Path, prompt: str, *, plain: bool, seed: int = 0, **more: Any) -> str:
    model = load(folder)
    settings = {"max_new_tokens": 9, "eos_ids": model.eos_ids, **more}
    ids = prompt_ids(model, prompt, plain=plain)
    (one,) = sample(model.decoder, [ids], seed=seeds_of(seed, 0, DRAW, 1), **settings)
    return text_of_ids(model.tokenizer, said(one))


def test_one_prompt_gives_text_alone(work: Path) -> None:
    done = run("generate", work / "chat", "hello", "--max-new-tokens", "9")
    assert done.out == answer_to(work / "chat", "hello", plain=False) + "\n"
    assert (done.code, done.err) == (0, "cut off at 9 tokens; --max-new-tokens sets the limit\n")
    plain = run("generate", work / "chat", "hello", "--plain-prompt", "--max-new-tokens", "9")
    assert plain.out == answer_to(work / "chat", "hello", plain=True) + "\n" != done.out
    other = run("generate", work / "chat", "hello", "--max-new-tokens", "9", "--seed", "1")
    assert other.out == answer_to(work / "chat", "hello", plain=False, seed=1) + "\n" != done.out


@pytest.mark.parametrize(
    ("more", "settings"),
    [
        (["--temperature", "0"], {"temperature": 0.0}),
        (["--top-k", "2"], {"top_k": 2}),
        (["--top-p", "0.05"], {"top_p": 0.05}),
    ],
)
def test_options_of_sampling_are_used_wherever_the_prompt_stands(
    work: Path, more: list[str], settings: dict[str, float]
) -> None:
    done = run("generate", work / "chat", "hello", "--max-new-tokens", "9", *more)
    assert done.out == answer_to(work / "chat", "hello", plain=False, **settings) + "\n"
    assert done.out != answer_to(work / "chat", "hello", plain=False) + "\n"
    assert run("generate", *more, work / "chat", "--max-new-tokens", "9", "hello") == done


def test_a_model_without_a_template_continues_the_text(work: Path) -> None:
    done = run("generate", work / "base", "the fox", "--max-new-tokens", "9")
    assert done.out == answer_to(work / "base", "the fox", plain=True) + "\n"
    message = "expected a chat template for .*base, got none"
    code, out, err = run("generate", work / "base", "--prompts", work / "prompts.jsonl")
    assert (code, out) == (2, "")
    assert re.match(f"minigold: prompt of line 2: {message}", err)


def test_the_weights_have_the_type_that_was_asked_for(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def watched(model: LanguageModel, *args: Any, **more: Any) -> Any:
        seen.append(model.decoder.dtype)
        return stream(model, *args, **more)

    monkeypatch.setattr("minigold.cli_models.stream", watched)
    for name in ("auto", "bfloat16"):
        args = ("--dtype", name, "--device", "cpu", "--max-new-tokens", "2")
        assert run("generate", work / "chat", "hello", *args).code == 0
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("given", "prompt"),
    [(b"hello", "hello"), (b"hello\n", "hello"), (b"hello\r\n", "hello"), (b"a\n\n", "a\n"),
     ("é🙂\r".encode(), "é🙂\r")],
)  # fmt: skip
def test_the_prompt_can_come_from_standard_input(
    work: Path, given: bytes, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    done = run("generate", work / "chat", "--max-new-tokens", "9")
    assert done.out == answer_to(work / "chat", prompt, plain=False) + "\n"


def test_lines_come_out_in_order_with_what_they_had(work: Path) -> None:
    args = ("generate", work / "chat", "--prompts", work / "prompts.jsonl", "--max-new-tokens", "9")
    done = run(*args)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [set(row) - {"prompt", "completion", "finished"} for row in rows] == [
        {"id"}, set(), {"answer"},
    ]  # fmt: skip
    assert rows[1]["prompt"] == [{"role": "user", "content": "the 🙂"}]
    alone = answer_to(work / "chat", "hello", plain=False)
    assert rows[0]["completion"] == alone.removesuffix("\ufffd")  # a character that was cut
    cut = sum(not row["finished"] for row in rows)
    assert done.err == f"3 of 3 answers, {cut} cut off\n"
    small = run(*args, "--batch-size", "2")
    assert small.out == done.out
    assert small.err.count("\n") == 2


def test_the_default_limit_is_what_the_context_leaves(work: Path) -> None:
    done = run("generate", work / "chat", "hello")
    n = len(prompt_ids(load(work / "chat"), "hello", plain=False))
    assert done.code == 0
    assert done.err.startswith(f"at most {200 - n} tokens an answer: the context of 200 leaves no")


BAD: list[tuple[list[str], str]] = [
    (["./absent", "x"], "expected a model folder, found no folder absent"),
    (["chat", "x", "--prompts", "prompts.jsonl"], "expected one of PROMPT and --prompts, got both"),
    (["chat", "x", "--batch-size", "2"], "expected --batch-size with --prompts only; leave it out"),
    (["chat", "--prompts", "prompts.jsonl", "--batch-size", "0"], "expected --batch-size at least 1"),
    (["chat", "x", "--max-new-tokens", "0"], "expected --max-new-tokens at least 1, got 0"),
    (["chat", "x", "--temperature", "-1"], "expected --temperature at least 0, got -1.0"),
    (["chat", "x", "--top-p", "0"], "expected --top-p above 0 and at most 1, got 0"),
    (["chat", "x", "--top-k", "-1"], "expected --top-k at least 0, got -1"),
    (["chat", "x", "--seed", "-1"], "expected --seed at least 0, got -1"),
    (["chat", "x", "--device", "abacus"], "expected --device auto, cuda, mps or cpu"),
    (["chat", "x", "--max-new-tokens", "190"],
     r"at most 10 tokens \(the context of 200 less --max-new-tokens\), got \d+; shorten the prompt or lo"),
    (["chat", "--prompts", "texts.jsonl", "--max-new-tokens", "200"],
     "prompt of line [1246]: expected at most 0 tokens"),
    (["chat", "caf\udce9"], "expected UTF-8 in PROMPT, got something else at character 3; write it"),
    (["chat", "x", "--top-k", "1" + "0" * 400], "expected --top-k at most 1,000,000,000, got 1000"),
    (["chat", "hello " * 200],
     r"expected at most 199 tokens \(the context of 200 less one\), got \d+; shorten the prompt$"),
    (["chat", "--prompts", "absent.jsonl"], "expected a file of JSON lines, found no absent.jsonl"),
    (["chat", "--prompts", "prompts.jsonl", "--plain-prompt"],
     "prompt of line 2: expected text for chat with --plain-prompt, got 1 messages"),
    ([], "the following arguments are required: M"),
    (["chat", "--seed", "1", "x", "y"], "unrecognized arguments: y"),
    (["chat", "--seed", "1", "--unknown"], "unrecognized arguments: --unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_cannot_be_done_is_told_in_one_line(
    work: Path, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    code, out, err = run("generate", *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err.removesuffix("\n")), err


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (None, "expected a prompt, got none; give PROMPT, --prompts FILE, or standard input"),
        (SimpleNamespace(isatty=lambda: True), "expected a prompt, got none; give PROMPT"),
        (io.TextIOWrapper(io.BytesIO(b"caf\xe9")), "expected UTF-8 in standard input, got byte 0xe9"),
    ],
    ids=["none", "terminal", "other encoding"],
)  # fmt: skip
def test_a_terminal_and_other_encodings_are_refused(
    work: Path, stdin: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = run("generate", work / "chat")
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_other_encodings_of_standard_output_lose_nothing(work: Path, encoding: str) -> None:
    """JSON escapes what they cannot write; plain text is escaped as Python does it."""
    args = ("generate", work / "base", "--max-new-tokens", "40")

    def written_by(*more: str | Path) -> bytes:
        out = io.BytesIO()
        with redirect_stdout(io.TextIOWrapper(out, encoding=encoding)) as stream:
            assert main([*map(str, args), *map(str, more)]) == 0
            stream.detach()
        return out.getvalue()

    lines = written_by("--prompts", work / "texts.jsonl").decode(encoding).splitlines()
    want = run(*args, "--prompts", work / "texts.jsonl").out.splitlines()
    assert list(map(json.loads, lines)) == list(map(json.loads, want))
    assert any(not line.isascii() for line in want)
    assert (lines == want) == (encoding == "utf-8")
    text = run(*args, "hello").out
    assert not text.isascii()
    assert written_by("hello") == text.encode(encoding, "backslashreplace")


def test_text_is_there_before_the_process_ends(work: Path) -> None:
    code = """
import sys, time
from minigold import cli, model

forward = model.Decoder.forward

def slow(*args):
    time.sleep(0.05)
    return forward(*args)

model.Decoder.forward = slow
sys.exit(cli.main(sys.argv[1:]))
"""
    args = ("generate", work / "chat", "hello", "--max-new-tokens", "30")
    command = [sys.executable, "-c", code, *map(str, args)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    ) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1000)
        assert process.poll() is None
        rest = process.stdout.read()
    assert process.returncode == 0
    assert len(first) < len(rest)
    assert (first + rest).decode("utf-8") == run(*args).out


# ------------------------------------------------------------------- the folder of a run
@pytest.fixture
def trained(work: Path, tmp_path: Path) -> Path:
    """A run that has no final/ yet, with two checkpoints."""
    folder = tmp_path / "run"
    for name, seed in (("step-9", 9), ("step-10", 10)):
        tiny_folder(folder / "checkpoints" / name, "llama", byte_bpe(), end="<|im_end|>", seed=seed)
    (folder / "checkpoints" / "step-11.part").mkdir()
    (folder / "config.json").write_text("{}", "utf-8")
    (folder / "metrics.jsonl").write_text("", "utf-8")
    return folder


def test_a_run_gives_its_final_model_else_its_newest_checkpoint(trained: Path) -> None:
    args = ("x", "--temperature", "0", "--max-new-tokens", "9")
    newest = run("generate", trained, *args)
    assert newest.err.startswith(f"{trained}: the model is checkpoints/step-10\n")
    assert newest.out == run("generate", trained / "checkpoints" / "step-10", *args).out
    tiny_folder(trained / "final", "llama", byte_bpe(), end="<|im_end|>", seed=11)
    final = run("generate", trained, *args)
    assert final.err.startswith(f"{trained}: the model is final\n")
    assert final.out == run("generate", trained / "final", *args).out != newest.out
    assert "the model is" not in run("generate", trained / "final", *args).err


def test_a_run_without_a_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("", "utf-8")
    code, out, err = run("generate", tmp_path, "x")
    assert (code, out) == (2, "")
    assert "expected final/ or a checkpoint in the run" in err


# ------------------------------------------------------------- the whole way round
@pytest.mark.parametrize("limit", ["3", "60"])
def test_a_student_is_trained_on_what_its_teacher_wrote(
    work: Path, tmp_path: Path, limit: str
) -> None:
    file, out = tmp_path / "answers.jsonl", tmp_path / "run"
    done = run(
        "generate", work / "chat", "--prompts", work / "texts.jsonl", "--max-new-tokens", limit
    )
    file.write_text(done.out, "utf-8")
    rows = read_prompts(file)
    trained = run(
        "train", "--teacher", work / "chat", "--student", work / "base", "--student-plain",
        "--prompts", file, "--lmbda", "0", "--steps", "1", "--batch-size", "6", "--out", out,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    end_id = load(work / "base").end_id
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert not any(sample["on_policy"] for sample in samples)
    assert sorted((s["line"], s["completion"], s["finished"]) for s in samples) == [
        (row.line, row.completion, row.finished) for row in rows
    ]
    for one in samples:
        assert (one["student_ids"][-1] == end_id) == one["finished"]
    metrics = json.loads((out / "metrics.jsonl").read_text())
    assert metrics["off_policy_fraction"] == 1
    assert metrics["eos_rate"] is None
