# SPDX-License-Identifier: Apache-2.0
"""The page of a run: what stands in it, and, marked `browser`, how Chromium shows it."""

import itertools
import json
import math
import re
import time
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from browser import Tab, browser
from growth import assert_not_quadratic
from minigold import chart
from minigold.cli import main
from minigold.compare import Token
from minigold.config import Config
from minigold.data import Prompt
from minigold.history import PROMPTS
from minigold.load import load
from minigold.offsets import EXACT, FLAWS, UNKNOWN, spans_of_ids
from minigold.pair import Pair, make_pair
from minigold.picture import REASONS, glyphs
from minigold.report import CHARACTERS, MOST, TOKENS, write_report
from minigold.train import distill
from test_page import CONTRASTS
from tiny_folders import tiny_folder
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

EVIL = '"><script>alert(1)</script>\' onload="x" &amp; \u202eab\u2066 \x00\x1b\u2028 مرحبا 👩‍👩‍👧 e\u0301'
VOID = {"meta", "path", "rect", "circle"}
OPTIONAL = {"th", "td", "tr"}  # whose ends may be left out


class Reader(HTMLParser):
    """Tags, chunks and all text of a page; complains where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.chunks: list[tuple[str, list[str], str]] = []  # class, tokens, sheet
        self.text, self.depth = "", 0
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        kind = found.get("class") or ""
        if tag == "div" and kind.startswith("chunk "):
            self.chunks.append((kind, [], ""))
        if tag == "bdi" and "ol" in self.open:
            self.chunks[-1][1].append("")
        if kind == "sheet":
            self.depth = len(self.open)
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPTIONAL:
            assert self.open.pop() == tag
        if self.depth and len(self.open) <= self.depth:
            self.depth = 0

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.depth:
            kind, tokens, sheet = self.chunks[-1]
            self.chunks[-1] = kind, tokens, sheet + data
        elif "bdi" in self.open and "ol" in self.open:
            self.chunks[-1][1][-1] += data

    @property
    def squeezed(self) -> str:
        return " ".join(self.text.split())


# ------------------------------------------------------------------------------ runs made by hand
def metrics_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step, "loss": 2.0 / step, "trained_fraction": 0.5, "eos_rate": 0.9,
        "reverse_kl_per_byte": 1.0, "completion_tokens": 40, "unscorable": {"cut": 1},
        "seconds": 1.5, "seconds_sample": 0.5, "seconds_teacher": 0.25, "seconds_train": 0.75,
    }  # fmt: skip
    return {**row, **changes}


def sample_row(step: int, line: int = 1, **changes: Any) -> dict[str, Any]:
    """`hello you` as two chunks and the end; the second one has two tokens of the student."""
    row = {
        "step": step, "line": line, "prompt": f"prompt {line}", "completion": "hello you",
        "finished": True, "on_policy": True, "student_ids": [5, 6, 7, 2],
        "student_spans": [[0, 5], [5, 7], [7, 9]], "teacher_ids": [8, 9],
        "chunks": [[0, 1, 0, 1, 0, 5, 0], [1, 3, 1, 2, 5, 9, 0], [3, 4, 2, 3, 9, 9, 0]],
        "acceptance": [1.0, 0.25, 0.5], "trained": [False, True, False],
        "teacher_best": [["hello", 0.9], [" there", 0.75], ["<|im_end|>", 0.5]],
    }  # fmt: skip
    return {**row, **changes}


def run_of(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    metrics: list[Any] | None = None,
    samples: list[Any] | None = None,
    evals: list[Any] | None = None,
) -> Path:
    """A run folder; rows that are text are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"steps": 4, "batch_size": 2, "rollouts": 2, "where": "sampled", "student": "a/small",
                "teacher": "b/large", "versions": {"torch": "2.99"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**settings, **(config or {})}), "utf-8")
    files = {"metrics": metrics, "samples": samples, "eval": evals}
    for name, rows in files.items():
        if rows is not None:
            lines = [row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows]
            (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return folder


def read(run: Path) -> Reader:
    return Reader(write_report(run).read_text("utf-8"))


def figure_of(run: Path, name: str) -> str:
    html = write_report(run).read_text("utf-8")
    (found,) = re.findall(rf"<figure><h3>{re.escape(name)}</h3>.*?</figure>", html)
    return str(found)


# ------------------------------------------------------------------------------- a run of minigold
@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Random models, so that all kinds of chunks come up; the student can break characters."""
    folder = tmp_path_factory.mktemp("models")
    student = tiny_folder(folder / "small", "llama", byte_bpe(), end="<|im_end|>", seed=1)
    teacher = tiny_folder(folder / "large", "gemma3", sentencepiece_bpe(), end="</s>", seed=2)
    return make_pair(load(student), load(teacher))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    texts = ("hello", EVIL, "def add", "Paris is")
    prompts = [Prompt(text, extra={"topic": EVIL}, line=n) for n, text in enumerate(texts, start=1)]
    config = Config(steps=4, batch_size=4, max_new_tokens=40, student_plain=True,
                    teacher_plain=True, warmup=0, lr=1e-3)  # fmt: skip
    distill(pair.student, pair.teacher, prompts, config, out=run)
    write_report(run)
    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_samples_have_the_spans_of_the_ids_and_what_the_teacher_would_write(
    real: Path, pair: Pair
) -> None:
    tokenizer, teacher = pair.student.tokenizer, pair.teacher
    for row in rows_of(real / "samples.jsonl"):
        ids = row["student_ids"][: len(row["student_ids"]) - row["finished"]]
        assert row["student_spans"] == spans_of_ids(tokenizer, ids)[:, :2].tolist()
        prompt = teacher.tokenizer.encode(row["prompt"]).ids
        with torch.no_grad():
            hidden = teacher.decoder(torch.tensor([[*prompt, *row["teacher_ids"]]]))[0]
            prob = teacher.decoder.head.logits(hidden[len(prompt) - 1 :]).softmax(-1)
        for chunk, (text, p) in zip(row["chunks"], row["teacher_best"], strict=True):
            likely = int(prob[chunk[2]].argmax())
            own = pair.events.teacher.spelling[likely].decode("utf-8", "replace")
            assert text == (own or teacher.tokenizer.id_to_token(likely))
            assert p == pytest.approx(float(prob[chunk[2], likely]), abs=1e-3)


def test_every_token_of_the_first_and_last_answers_stands_in_the_page(real: Path) -> None:
    reader = Reader((real / "report.html").read_text("utf-8"))
    rows = {(row["step"], row["line"]): row for row in rows_of(real / "samples.jsonl")}
    shown = [rows[step, line] for line in rows_lines(rows) for step in (1, 4)]
    assert len(shown) == 8
    told = iter(reader.chunks)
    kinds = set()
    for row in shown:
        data = row["completion"].encode()
        for chunk, accepted, trained, best in zip(
            row["chunks"], row["acceptance"], row["trained"], row["teacher_best"], strict=True
        ):
            classes, tokens, sheet = next(told)
            wanted = []
            for s in range(chunk[0], chunk[1]):
                if s == len(row["student_spans"]):
                    wanted.append("‹end›")
                    continue
                a, b = row["student_spans"][s]
                token = Token(0, a, b, EXACT, data[a:b], f"‹id {row['student_ids'][s]}›")
                wanted.append("".join(g.text for g in glyphs(token)))
            assert tokens == wanted
            kinds.add(chunk[6])
            level = "flawed" if chunk[6] else f"d{min(4, int(5 * (1 - accepted)))}"
            assert classes == f"chunk {level}" + " trained" * trained
            drawn = "".join(g.text for g in glyphs(Token(0, 0, 0, EXACT, best[0].encode(), "")))
            assert f"go on with {drawn} ({100 * best[1]:.0f} %)" in sheet
            reason = f"{FLAWS[chunk[6]]}: {REASONS[chunk[6]]}" if chunk[6] else "It would refuse"
            assert reason in sheet
            assert ("; trained." in sheet, "; not trained." in sheet) == (trained, not trained)
    assert next(told, None) is None
    assert len(kinds) >= 3


def rows_lines(rows: dict[tuple[int, int], Any]) -> list[int]:
    """Lines of the prompts in the order of their first answers."""
    return [line for step, line in rows if step == 1]


def test_the_page_is_whole_and_holds_nothing_foreign(real: Path) -> None:
    html = (real / "report.html").read_text("utf-8")
    check_harmless(html)
    assert html.startswith('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    text = Reader(html).squeezed
    assert text.startswith("large teaches small")
    assert "4 of 4 steps in" in text
    assert "8 of 16 answers: the first and the last answer to prompts that came back" in text


def check_harmless(html: str) -> None:
    reader = Reader(html)
    assert {tag for tag, _ in reader.tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "ol", "ul",
        "li", "div", "span", "bdi", "i", "table", "tr", "th", "td", "code", "dl", "dt", "dd", "details",
        "summary", "section", "figure", "figcaption", "svg", "g", "path", "rect", "circle", "text",
    }  # fmt: skip
    for tag, attributes in reader.tags:
        assert set(attributes) <= {
            "lang", "charset", "name", "content", "class", "tabindex", "aria-hidden", "scope", "dir",
            "viewbox", "role", "aria-label", "d", "x", "y", "cx", "cy", "r", "width", "height",
            "text-anchor",
        }, tag  # fmt: skip
    assert re.findall(r"https?:|url\(|@import|<script|<link|src=|href=", html) == []
    assert re.findall(r"&(?!(?:lt|gt|amp|quot|#x27);)", html) == []
    kept = "\n\t\u200c\u200d"  # line ends of prompts, joiners of emoji
    bad = [c for c in html if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in kept]
    assert bad == []


def test_whatever_stands_in_the_files_is_text(tmp_path: Path) -> None:
    """Names, settings, keys, prompts, roles, columns, tokens and evaluations."""
    message = [{"role": EVIL, "content": EVIL}, {"role": "user", "content": [EVIL]}]
    data = EVIL.encode()
    row = {
        "completion": EVIL, "student_ids": [1, 2], "student_spans": [[0, len(data)]],
        "chunks": [[0, 1, 0, 1, 0, len(data), 0], [1, 2, 1, 2, len(data), len(data), UNKNOWN]],
        "acceptance": [0.5, 0.0], "trained": [True, True], "teacher_best": [[EVIL, 0.5], ["\ufffd", 0.1]],
        EVIL: {EVIL: EVIL},
    }  # fmt: skip
    run = run_of(
        tmp_path / "run",
        config={"student": EVIL, "teacher": "b\ufffd", EVIL: EVIL, "versions": {EVIL: EVIL}},
        metrics=[metrics_row(1, **{EVIL: 3})],
        samples=[sample_row(1, prompt=EVIL, **row), sample_row(1, 2, prompt=message, **row)],
        evals=[{"step": 1, EVIL: 0.5}],
    )
    html = write_report(run).read_text("utf-8")
    check_harmless(html)
    text = Reader(html).text
    assert text.count("<script>alert(1)</script>") >= 12
    assert "e\u0301" in text
    assert "👩‍👩‍👧" in text


def test_a_prompt_can_be_of_anything(tmp_path: Path) -> None:
    samples = [sample_row(1, n, prompt=p) for n, p in enumerate([None, 3, {"a": 1}, []], start=1)]
    text = read(run_of(tmp_path, metrics=[metrics_row(1)], samples=samples)).squeezed
    assert "prompt: null" in text
    assert 'prompt: {"a": 1}' in text


# ------------------------------------------------------------------------------ what is not whole
def test_the_folder_must_be_of_a_run(tmp_path: Path, pair: Pair) -> None:
    with pytest.raises(
        ValueError, match=r"expected the folder of a run, got .*none: no such folder"
    ):
        write_report(tmp_path / "none")
    with pytest.raises(ValueError, match=r"got .*: no config\.json in it; give the --out of"):
        write_report(tmp_path)
    with pytest.raises(
        ValueError, match=r"with student, teacher and steps, got .* without them; g"
    ):
        write_report(pair.student.folder)
    assert not (tmp_path / "report.html").exists()
    assert not (pair.student.folder / "report.html").exists()
    for text, message in (
        ("{", "config.json: expected one JSON object"),
        ("[1]", "got a list of 1"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path)


@pytest.mark.parametrize("name", ["metrics", "samples", "eval"])
def test_a_line_that_is_being_written_is_left_out(tmp_path: Path, name: str) -> None:
    rows = {"metrics": [metrics_row(1)], "samples": [sample_row(1)],
            "evals": [{"step": 1, "accuracy": 0.5}]}  # fmt: skip
    whole = write_report(run_of(tmp_path, **rows)).read_text("utf-8")
    path = tmp_path / f"{name}.jsonl"
    text = path.read_text("utf-8")
    for end in range(1, len(text) - 1, 7):
        path.write_text(text + text[:end], "utf-8")
        assert write_report(tmp_path).read_text("utf-8") == whole
    path.write_text(text[:-1], "utf-8")  # whole, but for the line end
    assert write_report(tmp_path).read_text("utf-8") == whole
    for line, message in (
        ("{\n", r"line 2 of .*: expected one JSON object, got Expecting"),
        ("[3]\n", r"line 2 of .*: expected an object such as .*, got a list of 1"),
        ('{"step": "1"}\n', "expected an object with a step in line 2"),
        ("[" * 100_000 + "\n", "line 2 of .*got deep nesting"),
    ):
        path.write_text(text + line + text, "utf-8")
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_spans": ...}, "in line 2 of .*, got no 'student_spans'; .*run again with this"),
        ({"acceptance": [1.0]}, r"got columns of \[3, 1, 3, 3\] chunks"),
        ({"chunks": [[0, 1]] * 3}, "got .*missing 5 required"),
        ({"chunks": [[0, 1, 0, 1, 0, 5, 9]] * 3}, "got a chunk with the flaw 9"),
        ({"completion": None}, "got 'NoneType' object has no attribute 'encode'"),
    ],
)
def test_a_sample_of_another_shape_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    row = {k: v for k, v in sample_row(2, 2, **changes).items() if v is not ...}
    with pytest.raises(ValueError, match=f"expected an answer as docs/metrics.md says .*{message}"):
        write_report(run_of(tmp_path, metrics=[metrics_row(1)], samples=[sample_row(1), row]))


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    for metrics in (None, []):
        text = read(run_of(tmp_path, metrics=metrics, samples=metrics)).squeezed
        assert "None of 4 steps is done yet." in text
        assert "There is nothing to draw yet." in text
        assert "There are no samples yet." in text


def test_a_run_of_one_step(tmp_path: Path) -> None:
    run = run_of(tmp_path, config={"steps": 1}, metrics=[metrics_row(1)], samples=[sample_row(1)])
    reader = read(run)
    assert "1 of 1 steps in 1.5 s." in reader.squeezed
    assert "fell" not in reader.squeezed
    assert "1 of 1 answers: answers of the first and the last steps; no prompt" in reader.squeezed
    assert sum(tag == "circle" for tag, _ in reader.tags) == 5  # a curve of one step is a dot
    assert "step 1: 2<" in figure_of(run, "Loss")
    assert "step 1: 10<" in figure_of(run, "Length")


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    rows = [
        metrics_row(n, reverse_kl_per_byte=None, eos_rate=None if n < 3 else 1.0, loss=None)
        for n in range(1, 5)
    ]
    run = run_of(tmp_path, metrics=rows)
    for name in ("Reverse KL per byte", "Loss"):
        assert figure_of(run, name).endswith(
            f"<h3>{name}</h3><figcaption>Not measured in this run.</figcaption></figure>"
        )
    drawn = figure_of(run, "Answers that ended by themselves")
    assert "step 2: nothing<" in drawn
    assert "step 3: 1<" in drawn
    line = re.search(r'class="line" d="([^"]*)"', drawn)
    assert line is not None
    assert len(numbers(line[1])) == 4  # two points
    assert "None" not in read(run).text.replace("None of", "")
    assert "nan" not in read(run).text


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ([2.0, 1.0], "the loss fell from 2 to 1 nats per trained chunk."),
        ([1.0, 2.0], "the loss rose from 1 to 2 nats per trained chunk."),
        ([2.0, 1.95], "the loss stayed at about 1.95 nats per trained chunk."),
        ([0.0, 0.0], "the loss stayed at about 0 nats per trained chunk."),
    ],
)
def test_the_outcome_is_told_in_words(tmp_path: Path, losses: list[float], text: str) -> None:
    rows = [metrics_row(n, loss=losses[n > 20], seconds=90.0) for n in range(1, 41)]
    told = read(run_of(tmp_path, config={"steps": 40}, metrics=rows)).squeezed
    assert "40 of 40 steps in 1 h 0 min." in told
    assert text in told
    told = read(run_of(tmp_path, config={"steps": 41}, metrics=rows)).squeezed
    assert "40 of 41 steps in 1 h 0 min; the run is still going, or was stopped." in told


def test_a_step_that_was_run_again_counts_once(tmp_path: Path) -> None:
    rows = [metrics_row(1), metrics_row(2, loss=9.0), metrics_row(2, loss=0.5), metrics_row(3)]
    drawn = figure_of(run_of(tmp_path, metrics=rows), "Loss")
    assert re.findall(r"step (\d): ([\d.]+)", drawn) == [("1", "2"), ("2", "0.5"), ("3", "0.667")]


# ----------------------------------------------------------------------------- which samples it has
def test_prompts_that_came_back_are_shown_before_and_after(tmp_path: Path) -> None:
    """Those furthest apart first; of several answers in a step the first."""
    samples = [sample_row(step, line, completion=f"hello {step:02}{line:02}", topic=f"t{line}")
               for step in range(1, 13) for line in (step % 9, step % 9, 20 + step)]  # fmt: skip
    samples.insert(1, sample_row(1, 1, completion="hello no "))
    reader = read(run_of(tmp_path, metrics=[metrics_row(1)], samples=samples))
    headings = re.findall(r"Step (\d+): the teacher accepts (\d+) %", reader.text)
    pairs = [
        tuple(int(step) for step, _ in headings[i : i + 2]) for i in range(0, len(headings), 2)
    ]
    assert pairs == [(1, 10), (2, 11), (3, 12)]
    assert {share for _, share in headings} == {"58"}
    assert (
        f"6 of {len(samples)} answers: the first and the last answer to prompts" in reader.squeezed
    )
    assert "no·" not in reader.text
    assert [f"topic: t{n}" in reader.squeezed for n in (1, 2, 3, 4, 21)] == [True] * 3 + [False] * 2


def test_else_the_first_and_the_last_answers(tmp_path: Path) -> None:
    samples = [sample_row(step, step) for step in range(1, 31)]
    reader = read(run_of(tmp_path, metrics=[metrics_row(1)], samples=samples))
    assert re.findall(r"Step (\d+):", reader.text) == ["1", "2", "3", "28", "29", "30"]
    assert "6 of 30 answers: answers of the first and the last steps; no" in reader.squeezed


def test_no_more_than_some_prompts_are_shown(tmp_path: Path) -> None:
    samples = [sample_row(step, line) for step in (1, 2) for line in range(50)]
    reader = read(run_of(tmp_path, metrics=[metrics_row(1)], samples=samples))
    assert len(re.findall(r"Step \d+:", reader.text)) == 2 * PROMPTS


def test_long_answers_and_prompts_are_cut_and_say_so(tmp_path: Path) -> None:
    n = TOKENS + 50
    spans = [[i, i + 1] for i in range(n)]
    long = {
        "completion": "x" * n, "student_ids": [1] * n, "student_spans": spans, "teacher_ids": [1] * n,
        "chunks": [[i, i + 1, i, i + 1, i, i + 1, 0] for i in range(n)], "finished": False,
        "acceptance": [0.5] * n, "trained": [True] * n, "teacher_best": [["x", 0.5]] * n,
        "prompt": "p" * (CHARACTERS + 1234), "on_policy": False,
    }  # fmt: skip
    samples = [sample_row(step, line, **long) for step in (1, 2) for line in range(20)]
    run = run_of(tmp_path, metrics=[metrics_row(1)], samples=samples)
    reader = read(run)
    assert len(reader.chunks) == 2 * PROMPTS * TOKENS
    assert reader.text.count("… 50 chunks more") == 2 * PROMPTS
    assert reader.text.count("… 1,234 characters more") == PROMPTS
    assert reader.text.count("Cut at the limit of tokens.") == 2 * PROMPTS
    assert "Step 1, a fixed completion: the teacher accepts 50 %" in reader.text
    assert (run / "report.html").stat().st_size < 1_500_000


def test_a_very_long_chunk_and_conversation_are_cut_too(tmp_path: Path) -> None:
    n = 3_000
    row = sample_row(
        1, completion="x" * n, student_ids=[7] * n, student_spans=[[i, i + 1] for i in range(n)],
        teacher_ids=[8] * n, chunks=[[0, n, 0, n, 0, n, 0]], acceptance=[0.5], trained=[True],
        teacher_best=[["x", 0.5]], finished=False,
        prompt=[{"role": "user", "content": "w" * 1_000}] * 3,
    )  # fmt: skip
    run = run_of(tmp_path, metrics=[metrics_row(1)], samples=[row])
    reader = read(run)
    ((_, tokens, sheet),) = reader.chunks
    assert tokens == ["x"] * MOST + [f"… {n - MOST:,} tokens more"]
    assert f"teacher ids {', '.join(['8'] * MOST)}…." in sheet
    assert reader.text.count("user:") == 2
    assert [len(found) for found in re.findall("w{9,}", reader.text)] == [1_000, CHARACTERS - 1_000]
    assert f"… {3_000 - CHARACTERS:,} characters more" in reader.text


def test_a_line_end_ends_the_line(tmp_path: Path) -> None:
    row = sample_row(1, completion="hello\nyou", student_spans=[[0, 6], [6, 8], [8, 9]])
    row["chunks"][0][5] = row["chunks"][1][4] = 6
    html = write_report(run_of(tmp_path, metrics=[metrics_row(1)], samples=[row])).read_text(
        "utf-8"
    )
    assert html.count('<li class="end" aria-hidden="true"></li>') == 1


# ------------------------------------------------------------------------------------------- charts
def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?[\d.]+", text)]


def test_a_long_run_is_a_small_page_and_loses_no_spike(tmp_path: Path) -> None:
    rows = [metrics_row(n, loss=1 + 0.1 * (n % 7)) for n in range(1, 10_001)]
    for n in (3_333, 7_777):
        rows[n]["loss"] = 1.9
    run = run_of(tmp_path, config={"steps": 10_000}, metrics=rows)
    assert write_report(run).stat().st_size < 500_000
    raw = re.search(r'class="raw" d="([^"]*)"', figure_of(run, "Loss"))
    assert raw is not None
    places = list(zip(numbers(raw[1])[::2], numbers(raw[1])[1::2], strict=True))
    assert len(places) <= 2 * chart.MOST
    top = sorted(places, key=lambda place: place[1])[:2]
    assert [x for x, _ in sorted(top)] == pytest.approx(
        [chart.LEFT + n / 9_999 * (chart.RIGHT - chart.LEFT) for n in (3_333, 7_777)], abs=0.1
    )


def test_a_page_of_a_long_run_takes_no_quadratic_time(tmp_path: Path) -> None:
    rows = [metrics_row(n) for n in range(1, 10_001)]
    runs = {n: run_of(tmp_path / str(n), metrics=rows[:n]) for n in (8, 2_500, 10_000)}
    assert_not_quadratic(lambda n: write_report(runs[n]), 10_000)


def test_evaluations_have_charts_of_their_own(tmp_path: Path) -> None:
    evals = [
        {"step": 1, "accuracy": 0.25, "accuracy_low": 0.2, "accuracy_high": 0.3, "n": 40, "by": "me"},
        {"step": 4, "accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.9, "n": 40,
         "nothing": None, "yes": True, "floor_low": 3.0, "huge": 10**301},
    ]  # fmt: skip
    run = run_of(tmp_path, metrics=[metrics_row(1)], evals=evals)
    html = write_report(run).read_text("utf-8")
    part = html.partition("<h2>Evaluation</h2>")[2].partition("<h2>")[0]
    assert re.findall("<h3>(.*?)</h3>", part) == ["accuracy", "n", "floor_low"]
    drawn = figure_of(run, "accuracy")
    assert re.findall(r"step (\d): ([^<]*)<", drawn) == [
        ("1", "0.25 (0.2 to 0.3)"),
        ("4", "0.75 (0.7 to 0.9)"),
    ]
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    frame = chart.BOTTOM - chart.TOP
    assert heights == [
        pytest.approx(chart.BOTTOM - share * frame, abs=0.1) for share in (0.25, 0.75)
    ]
    first = re.search(r'class="line" d="M[\d.]+ ([\d.]+)h6m-3 0V([\d.]+)m-3 0h6"', drawn)
    assert first is not None
    assert [float(y) for y in first.groups()] == [
        pytest.approx(chart.BOTTOM - share * frame, abs=0.1) for share in (0.2, 0.3)
    ]
    assert "accuracy in evaluation0.25 → 0.75" in Reader(html).text
    assert "In evaluation accuracy rose from 0.25 to 0.75." in Reader(html).text
    assert "<h2>Evaluation</h2>" not in write_report(run_of(tmp_path / "b")).read_text("utf-8")


def test_stages_are_stacked_and_their_shares_told(tmp_path: Path) -> None:
    run = run_of(tmp_path, metrics=[metrics_row(1), metrics_row(2)])
    drawn = figure_of(run, "Time by stage")
    tops = [
        min(numbers(" ".join(re.findall(r"V([\d.]+)h", path))))
        for path in re.findall(r'class="bar\d" d="([^"]*)"', drawn)
    ]
    scale = (chart.BOTTOM - chart.TOP) / 1.5  # the tallest bar is the axis's last round number
    assert tops == [
        pytest.approx(chart.BOTTOM - seconds * scale, abs=0.1) for seconds in (1.5, 0.75, 0.5)
    ]
    text = Reader(drawn).squeezed
    assert "sample 33 % teacher 17 % train 50 %" in text
    assert "step 1: 0.5 + 0.25 + 0.75" in text


def test_values_far_from_all_others_do_not_flatten_them() -> None:
    values = [1.0] * 99 + [50.0]
    drawn, note = chart.curve(range(1, 101), values, name="loss", unit="nats")
    assert note == "1 outside the frame, at 50"
    assert max(numbers(" ".join(re.findall(r'text-anchor="end">([\d.]+)<', drawn)))) <= 2
    assert chart.curve(range(1, 101), [1.0] * 99 + [2.5], name="loss", unit="nats")[1] == ""
    assert chart.curve([1, 2], [1.0, 50.0], name="loss", unit="nats")[1] == ""
    both = chart.curve(range(1, 201), [1.0, -60.0, *[1.0] * 197, 50.0], name="", unit="")[1]
    assert both == "2 outside the frame, from -60 to 50"


FINITE = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-6 else x)


@given(FINITE, FINITE)
def test_ticks_are_round_and_reach_over_both_ends(a: float, b: float) -> None:
    low, high = sorted((a, b))
    if high - low < 1e-6 * max(abs(low), abs(high)) or low == high:
        return
    found = chart.ticks(low, high)
    assert 3 <= len(found) <= 8
    gap = (found[-1] - found[0]) / (len(found) - 1)
    assert found[0] <= low + 1e-6 * gap
    assert found[-1] >= high - 1e-6 * gap
    assert found[1] > low
    assert found[-2] < high
    assert f"{gap:.0e}"[0] in "125"
    assert math.isclose(float(f"{gap:.0e}"), gap, rel_tol=1e-6)
    for mark in found:
        assert abs(mark / gap - round(mark / gap)) < 1e-6


@given(st.sampled_from([1, 39, 40, 100, 200]).flatmap(
    lambda n: st.lists(st.none() | FINITE, min_size=n, max_size=n)))  # fmt: skip
def test_smoothing_is_the_mean_around(values: list[float | None]) -> None:
    reach = len(values) // 40
    for i, mean in enumerate(chart.smooth(values)):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if v is not None]
        if not near:
            assert mean is None
        else:
            assert mean == pytest.approx(sum(near) / len(near), abs=1e-3)


@given(st.lists(st.none() | FINITE, min_size=1, max_size=300).filter(lambda v: v != [None] * len(v)),
       st.integers(1, 50))  # fmt: skip
def test_all_of_a_curve_lies_inside_its_drawing(values: list[float | None], stride: int) -> None:
    steps = [1 + i * stride for i in range(len(values))]
    drawn, _ = chart.curve(steps, values, name="loss", unit="nats")
    for path in re.findall(r'class="(?:raw|line)" d="([^"]*)"', drawn):
        places = numbers(path)
        assert all(chart.LEFT <= x <= chart.RIGHT for x in places[::2])
        assert all(chart.TOP <= y <= chart.BOTTOM for y in places[1::2])
    strips = re.findall(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', drawn)
    assert len(strips) <= chart.MOST_READ + 2
    assert sum(float(width) for _, width in strips) == pytest.approx(
        chart.RIGHT - chart.LEFT, abs=0.1 * len(strips)
    )


# ------------------------------------------------------------------------------------- command line
def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", metrics=[metrics_row(1)], samples=[sample_row(1)])
    assert main(["report", str(run)]) == 0
    assert json.loads(capsys.readouterr().out) == {"html": str(run / "report.html")}
    elsewhere = tmp_path / "page.html"
    assert main(["report", str(run), "--html", str(elsewhere)]) == 0
    assert json.loads(capsys.readouterr().out) == {"html": str(elsewhere)}
    assert elsewhere.read_bytes() == (run / "report.html").read_bytes()
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("minigold: expected the folder of a run, got ")
    assert main(["report", str(run), "--html", str(tmp_path)]) == 2
    assert "expected a file to write to" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ in a browser
@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory, real: Path) -> Path:
    """Every kind of chunk, every shade, long names, a long run, an evaluation."""
    rows = [metrics_row(n, loss=2 + math.sin(n)) for n in range(1, 301)]
    share = [[0, 1, 0, 1, 0, 5, 0], [1, 3, 1, 2, 5, 9, 0]] * 3
    shades = sample_row(
        1, 77, chunks=share, acceptance=[0.95, 0.7, 0.5, 0.3, 0.1, 0.0], trained=[True, False] * 3,
        teacher_best=[["hello", 0.9], [" there", 0.75]] * 3, prompt="w" * 300 + EVIL, key="v" * 300,
    )  # fmt: skip
    found = [row for row in rows_of(real / "samples.jsonl") if row["step"] < 3]
    run = run_of(
        tmp_path_factory.mktemp("hard"),
        config={"student": "name" * 50, "steps": 300},
        metrics=rows,
        samples=[shades, *found, {**shades, "step": 2}],
        evals=[
            {"step": n, "accuracy": 0.3, "accuracy_low": 0.2, "accuracy_high": 0.4}
            for n in (1, 300)
        ],
    )
    return write_report(run)


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 360, 800, 1600])
def test_the_page_never_scrolls_sideways(tab: Tab, hard: Path, width: int) -> None:
    tab.open(hard, width=width)
    tab.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    size = tab.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert size == [width, width]
    right = tab.value("Math.max(...[...document.querySelectorAll('.case *, .chart, .tiles *')].map("
                      "e => e.getBoundingClientRect().right))")  # fmt: skip
    assert right <= width


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_has_enough_contrast(tab: Tab, hard: Path, dark: bool) -> None:
    tab.open(hard, dark=dark)
    paper = tab.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(22, 22, 22)" if dark else "rgb(255, 255, 255)")
    tab.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    worst = tab.value(CONTRASTS)
    assert len(worst) >= 12
    assert {key: ratio for key, ratio in worst.items() if ratio < 4.5} == {}


SHADES = """[0, 1, 2, 3, 4].map(k => {
  const c = getComputedStyle(document.querySelector('.case .d' + k)).backgroundColor;
  const [r, g, b] = c.match(/[\\d.]+/g).map(v => { v /= 255;
    return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
  return .2126 * r + .7152 * g + .0722 * b; })"""


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_shades_differ_without_colour(tab: Tab, hard: Path, dark: bool) -> None:
    """In grey, as in print or for those who see no colours, they are a scale; 1.15 is easily seen."""
    tab.open(hard, dark=dark)
    light = tab.value(SHADES)
    ratios = [(a + 0.05) / (b + 0.05) for a, b in itertools.pairwise(light)]
    assert all(ratio < 1 / 1.15 if dark else ratio > 1.15 for ratio in ratios), ratios


def sheets(tab: Tab) -> list[str]:
    """What is to be seen at the lower edge."""
    found: list[str] = tab.value(
        "[...document.querySelectorAll('.sheet')].filter(e => e.checkVisibility()).map(e => e.innerText)"
    )
    return found


def middle(tab: Tab, selector: str, k: int = 0) -> dict[str, float]:
    """A point in the middle of an element, scrolled to the upper part of the window."""
    x, y = tab.value(
        f"(() => {{ const e = document.querySelectorAll('{selector}')[{k}]; e.scrollIntoView(); "
        "scrollBy(0, -60); const r = e.getBoundingClientRect(); "
        "return [r.x + r.width / 2, r.y + r.height / 2] })()"
    )
    return {"x": x, "y": y}


@pytest.mark.browser
def test_a_chunk_shows_what_the_teacher_would_have_written(tab: Tab, hard: Path) -> None:
    tab.open(hard)
    assert sheets(tab) == []
    for k, wanted, sure in ((1, "·there", 75), (2, "hello", 90)):
        place = middle(tab, ".case .chunk .row", k)
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        (sheet,) = sheets(tab)
        assert f"the teacher would most likely go on with {wanted} ({sure} %)." in sheet
    box = tab.value("[...document.querySelectorAll('.sheet')].find(e => e.checkVisibility())"
                    ".getBoundingClientRect().toJSON()")  # fmt: skip
    assert (box["left"], box["right"], box["bottom"]) == (0, 1000, 800)
    assert box["height"] < 400
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert sheets(tab) == []


@pytest.mark.browser
def test_a_tap_shows_it_too(tab: Tab, hard: Path) -> None:
    tab.open(hard, width=360)
    for k, wanted in ((1, "·there"), (2, "hello")):
        point = middle(tab, ".case .chunk .row", k)
        tab.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        tab.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        for _ in range(100):  # a tap is told from a gesture after a moment
            if any(f"go on with {wanted} (" in sheet for sheet in sheets(tab)):
                break
            time.sleep(0.05)
        (sheet,) = sheets(tab)
        assert f"go on with {wanted} (" in sheet


@pytest.mark.browser
def test_the_tab_key_goes_through_the_chunks(tab: Tab, hard: Path) -> None:
    tab.open(hard)
    tab.value("document.querySelectorAll('summary')[1].focus()")
    for wanted in ("hello", "·there", "hello"):
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab",
                     windowsVirtualKeyCode=9)  # fmt: skip
        (sheet,) = sheets(tab)
        assert f"go on with {wanted} (" in sheet


@pytest.mark.browser
def test_a_chart_shows_its_numbers(tab: Tab, hard: Path) -> None:
    tab.open(hard)
    shown = (
        "[...document.querySelectorAll('.at text')].filter("
        "e => getComputedStyle(e).visibility == 'visible').map(e => e.textContent)"
    )
    assert tab.value(shown) == []
    strips = ".chart .at rect"  # two evaluations, then the losses
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", **middle(tab, strips, 0))
    assert tab.value(shown) == ["step 1: 0.3 (0.2 to 0.4)"]
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", **middle(tab, strips, 2))
    (text,) = tab.value(shown)
    assert re.fullmatch(r"step 1: 2\.84, mean [\d.]+", text)
    cut_off = tab.value(
        "[...document.querySelectorAll('.chart text')].filter(e => { const b = e.getBBox(); "
        "return b.x < 0 || b.x + b.width > 340 }).map(e => e.textContent)"
    )
    assert cut_off == []


@pytest.mark.browser
def test_nothing_is_fetched_run_or_complained_about(tab: Tab, hard: Path) -> None:
    tab.open(hard)
    asked = [e["params"]["request"]["url"] for e in tab.events
             if e.get("method") == "Network.requestWillBeSent"]  # fmt: skip
    assert asked == [hard.as_uri()]
    told = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown",
            "Page.javascriptDialogOpening")  # fmt: skip
    assert [e for e in tab.events if e.get("method") in told] == []
    assert tab.value("document.compatMode") == "CSS1Compat"
    assert tab.value("document.scripts.length") == 0


@pytest.mark.browser
def test_print_keeps_the_shades_on_white(tab: Tab, hard: Path) -> None:
    tab.open(hard, dark=True)
    tab.call(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    try:
        found = tab.value("['body', '.case .d4'].map(e => { const s = getComputedStyle("
                          "document.querySelector(e)); return [s.backgroundColor, s.printColorAdjust] })")  # fmt: skip
    finally:
        tab.call("Emulation.setEmulatedMedia", media="", features=[])
    assert found == [["rgb(255, 255, 255)", "exact"], ["rgb(156, 61, 6)", "exact"]]
