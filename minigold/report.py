# SPDX-License-Identifier: Apache-2.0
"""The folder of a run in, one HTML page out: what was run, its curves, and samples with every token.

It reads config.json, metrics.jsonl, samples.jsonl and, where it is there, eval.jsonl: no model, no
tokenizer. A run that is still going, or was cut, has a page too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from minigold import chart
from minigold.compare import Chunk, Token
from minigold.data import COLUMNS, RESERVED, write_whole
from minigold.markup import document, prose, spelled, token_html
from minigold.offsets import EXACT, FLAWS
from minigold.picture import REASONS

__all__ = ["write_report"]

PROMPTS = 6  # shown, each with its first and its last answer
TOKENS = 160  # shown of an answer
CHARACTERS = 1500  # shown of a prompt
LEVELS = 5  # shades of disagreement
STAGES = ("sample", "teacher", "train")

_STYLE = """
:root { --d0: #fff; --d1: #fdebd3; --d2: #f9cd98; --d3: #f0a452; --d4: #9c3d06; --d4-ink: #fff;
  --hatch: #cfcfcf; }
@media screen and (prefers-color-scheme: dark) {
  :root { --d0: #161616; --d1: #33230f; --d2: #5b3a10; --d3: #8a5310; --d4: #ffc57d;
    --d4-ink: #241300; --hatch: #454545; } }
.lead { font-size: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr));
  gap: .8rem; margin: 1.2rem 0; }
.tiles > div { border: 1px solid var(--grid); border-radius: .4rem; padding: .5rem .8rem; }
.tiles dt { color: var(--soft); font-size: .9rem; }
.tiles dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 1.4rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
h3 { font-size: 1rem; margin: .2rem 0; }
figcaption { font-size: .85rem; color: var(--soft); }
.key { display: inline-block; width: .8em; height: .8em; border: 1px solid var(--line); }
.key0 { background: var(--bar0); } .key1 { background: var(--bar1); }
.key2 { background: var(--bar2); }
details { margin: .8rem 0; } summary { cursor: pointer; }
.scroll { overflow-x: auto; }
.signs { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; padding: 0;
  list-style: none; font-size: .9rem; }
.signs .chunk { display: inline-block; cursor: auto; margin-right: .3rem; }
.signs .row { min-height: 0; }
.case { border-top: 1px solid var(--line); margin-top: 1.6rem; padding-top: .6rem; }
.prompt { white-space: pre-wrap; max-width: 60rem; margin: .2rem 0; }
.answers { display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.answers > section { min-width: 0; }
.chunks { margin: .5rem 0; row-gap: .5rem; }
.chunk { border-left: 1px solid var(--line); border-right: 1px solid var(--line);
  margin-right: -1px; }
.chunk::after { content: ""; display: block; height: 3px; background: var(--paper); }
.trained::after { background: var(--ink); }
.row > bdi { padding: .1rem .2rem; }
.row > bdi + bdi { border-left: 1px dotted currentColor; }
.row i { color: inherit; }
.d0 { background: var(--d0); } .d1 { background: var(--d1); } .d2 { background: var(--d2); }
.d3 { background: var(--d3); } .d4 { background: var(--d4); color: var(--d4-ink); }
.flawed { background: repeating-linear-gradient(135deg,
  var(--hatch) 0 3px, var(--paper) 3px 7px); }
.sheet { color: var(--ink); }
.sheet p { margin: 0 0 .2rem; max-width: none; }
@media print {
  * { print-color-adjust: exact; }
  main { padding: 0; }
  .case, figure, .tiles > div { break-inside: avoid; }
}
"""


def write_report(run: Path, target: Path | None = None) -> Path:
    """Writes the page of a run, by default to report.html in its folder; returns where it is.

    Args:
        run: a folder that `minigold train` or `distill` wrote, finished or not.

    Raises:
        ValueError: no such folder, a folder that is no run, a file in it that cannot be read.
        OSError: nothing can be written there.
    """
    target = run / "report.html" if target is None else target
    write_whole(target, _page(read_run(run)).encode("utf-8"))
    return target


# -- reading -------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """A line of a file: of which step, its number from 1, its place in bytes."""

    step: int
    number: int
    place: int


class Sample(NamedTuple):
    """An answer of samples.jsonl; C chunks."""

    step: int
    prompt: Any
    text: bytes
    finished: bool
    on_policy: bool
    ids: list[int]
    teacher_ids: list[int]
    spans: list[tuple[int, int]]
    chunks: list[Chunk]
    acceptance: list[float]
    trained: list[bool]
    best: list[tuple[str, float]]
    extra: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Args:
        config: the object of config.json.
        steps, rows: the numbers of the steps, increasing, and their metrics.
        evals: objects of eval.jsonl, by step.
        cases: for each prompt that is shown its answers, the first and the last of the run or one.
        n_samples: all answers in samples.jsonl.
    """

    config: dict[str, Any]
    steps: list[int]
    rows: list[dict[str, Any]]
    evals: dict[int, dict[str, Any]]
    cases: list[list[Sample]]
    n_samples: int


def read_run(run: Path) -> Run:
    """Reads the files of a run; raises as `write_report` does."""
    path = run / "config.json"
    if not path.is_file():
        what = "no config.json in it" if run.is_dir() else "no such folder"
        raise ValueError(
            f"expected the folder of a run, got {run}: {what}; give the --out of `minigold train`"
        )
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got {error}; restore the file") from error
    needed = {"student": str, "teacher": str, "steps": int}
    if type(config) is not dict or any(type(config.get(k)) is not v for k, v in needed.items()):
        raise ValueError(
            f"expected the config.json of a run, with student, teacher and steps, got {path} without "
            "them; give the --out of `minigold train`, not a model"
        )
    rows = {row["step"]: row for _, row in _objects(run / "metrics.jsonl")}
    evals = {row["step"]: row for _, row in _objects(run / "eval.jsonl")}
    cases, n_samples = _cases(run / "samples.jsonl")
    steps = sorted(rows)
    evals = {step: evals[step] for step in sorted(evals)}
    return Run(config, steps, [rows[step] for step in steps], evals, cases, n_samples)


def _objects(path: Path) -> Iterator[tuple[_Line, dict[str, Any]]]:
    """Objects with a step; none if there is no file.

    A last line that was cut off while it was written is left out.
    """
    if not path.is_file():
        return
    place = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                row = json.loads(raw)
            except ValueError as error:
                if not raw.endswith(b"\n"):
                    return
                raise ValueError(
                    f"expected JSON in line {number} of {path}, got {error}; restore the file"
                ) from error
            if type(row) is not dict or type(row.get("step")) is not int:
                raise ValueError(
                    f"expected an object with a step in line {number} of {path}, got "
                    f"{raw[:40].decode('utf-8', 'replace')}; restore the file"
                )
            yield _Line(row["step"], number, place), row
            place += len(raw)


def _cases(path: Path) -> tuple[list[list[Sample]], int]:
    """Prompts that came back, those furthest apart first; else answers of the first and last step."""
    seen: dict[str, list[_Line]] = {}  # the first and the last answer to each prompt
    n = 0
    for line, row in _objects(path):
        n += 1
        met = seen.setdefault(json.dumps([row.get("line"), row.get("prompt")]), [])
        if not met or line.step > met[-1].step:
            met[1:] = [line]
    back = sorted(
        (met for met in seen.values() if len(met) > 1), key=lambda met: met[0].step - met[1].step
    )
    once = sorted(seen.values())
    half = PROMPTS // 2
    chosen = back[:PROMPTS] or (once if len(once) <= PROMPTS else once[:half] + once[-half:])
    return [[_sample(path, line) for line in met] for met in chosen], n


def _sample(path: Path, line: _Line) -> Sample:
    with path.open("rb") as file:
        file.seek(line.place)
        row = json.loads(file.readline())
    unlike = f"expected an answer as docs/metrics.md says in line {line.number} of {path}, got "
    remedy = "; restore the file, or run again with this version"
    try:
        sample = Sample(
            line.step,
            row["prompt"],
            row["completion"].encode("utf-8", "replace"),
            row["finished"],
            row["on_policy"],
            row["student_ids"],
            row["teacher_ids"],
            [(int(a), int(b)) for a, b in row["student_spans"]],
            [Chunk(*map(int, chunk)) for chunk in row["chunks"]],
            [float(a) for a in row["acceptance"]],
            row["trained"],
            [(str(text), float(prob)) for text, prob in row["teacher_best"]],
            {k: v for k, v in row.items() if k not in (*COLUMNS, *RESERVED)},
        )
    except KeyError as error:
        raise ValueError(f"{unlike}no {error}{remedy}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{unlike}{error}{remedy}") from error
    columns = sample.chunks, sample.acceptance, sample.trained, sample.best
    strange = [chunk.flaw for chunk in sample.chunks if not 0 <= chunk.flaw < len(FLAWS)]
    if strange:
        raise ValueError(f"{unlike}a chunk with the flaw {strange[0]}{remedy}")
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{unlike}columns of {[len(c) for c in columns]} chunks{remedy}")
    return sample


# -- the page ------------------------------------------------------------------------------------


def _page(run: Run) -> str:
    student, teacher = (_name(run.config[side]) for side in ("student", "teacher"))
    return document(
        f"{teacher} teaches {student}",
        chart.STYLE + _STYLE,
        [
            f"<h1>{teacher} teaches {student}</h1>",
            f'<p class="lead">{_outcome(run)}</p>',
            f'<dl class="tiles">{_tiles(run)}</dl>',
            _settings(run.config),
            f"<h2>Curves</h2>\n{_curves(run)}",
            _evals(run),
            _table(run),
            f"<h2>Samples</h2>\n{_samples(run)}",
        ],
    )


def _name(name: str) -> str:
    """The last part of a path or hub name."""
    return spelled(PurePath(name).name or name)


def _numbers(run: Run, key: str) -> list[float | None]:
    return [_finite(row.get(key)) for row in run.rows]


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _ends(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Means of the first and of the last tenth of what was measured."""
    known = [v for v in values if v is not None]
    n = max(1, len(known) // 10)
    return (sum(known[:n]) / n, sum(known[-n:]) / n) if known else None


def _outcome(run: Run) -> str:
    """How far the run came, and what changed."""
    total, done = run.config["steps"], run.steps[-1] if run.steps else 0
    if not done:
        return f"None of {total:,} steps is done yet."
    seconds = sum(v or 0.0 for v in _numbers(run, "seconds"))
    told = f"{done:,} of {total:,} steps in {_duration(seconds)}"
    told += "." if done >= total else "; the run is still going, or was stopped."
    changes = [
        text.format(_moved(*ends))
        for key, text in (
            ("reverse_kl_per_byte", "the reverse KL divergence {} nats per byte"),
            ("loss", "the loss {} nats per trained chunk"),
        )
        if (ends := _ends(_numbers(run, key))) and done > 1
    ]
    if changes:
        told += f" From the first to the last tenth of them {' and '.join(changes)}."
    return told


def _moved(before: float, after: float) -> str:
    if abs(after - before) <= 0.05 * max(abs(before), abs(after)):
        return f"stayed at about {chart.number(after)}"
    word = "fell" if after < before else "rose"
    return f"{word} from {chart.number(before)} to {chart.number(after)}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{chart.number(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _tiles(run: Run) -> str:
    """The main numbers at the start and at the end."""
    tiles = [
        (name, [f"{100 * v:.0f} %" if share else chart.number(v) for v in ends])
        for key, name, share in (
            ("reverse_kl_per_byte", "Reverse KL, nats per byte", False),
            ("loss", "Loss, nats per trained chunk", False),
            ("trained_fraction", "Chunks that were trained", True),
            ("eos_rate", "Answers that ended by themselves", True),
        )
        if (ends := _ends(_numbers(run, key)))
    ]
    tiles += [
        (spelled(name), [chart.number(found[0][1]), chart.number(found[-1][1])])
        for name, found in list(_measured(run).items())[:4]
    ]
    return "".join(
        f"<div><dt>{name}</dt><dd>{' → '.join(dict.fromkeys(ends))}</dd></div>"
        for name, ends in tiles
    )


def _settings(config: Mapping[str, Any]) -> str:
    flat = {
        **{k: v for k, v in config.items() if not isinstance(v, dict)},
        **{f"{k}: {n}": v for k, d in config.items() if isinstance(d, dict) for n, v in d.items()},
    }
    main = (
        "where", "events", "beta", "lr", "batch_size", "rollouts", "max_new_tokens", "seed",
        "device", "versions: minigold", "versions: torch",
    )  # fmt: skip
    told = "; ".join(
        f"{key.removeprefix('versions: ')} {_value(flat[key])}" for key in main if key in flat
    )
    rows = "".join(
        f'<tr><th scope="row">{spelled(key)}<td>{_value(value)}' for key, value in flat.items()
    )
    return (
        f'<p class="soft">{told}.</p>\n'
        f'<details><summary>All settings</summary><div class="scroll"><table>{rows}</table></div>'
        "</details>"
    )


def _value(value: Any) -> str:
    told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return spelled(told[:300] + "…" * (len(told) > 300))


def _curves(run: Run) -> str:
    if not run.steps:
        return "<p>There is nothing to draw yet.</p>"
    answers = (_finite(run.config.get(key)) or 1.0 for key in ("batch_size", "rollouts"))
    each = math.prod(answers)
    lengths = [None if v is None else v / each for v in _numbers(run, "completion_tokens")]
    wanted: list[tuple[str, str, Sequence[float | None], float]] = [
        ("Loss", "nats per trained chunk", _numbers(run, "loss"), 0.0),
        ("Reverse KL per byte", "nats per byte", _numbers(run, "reverse_kl_per_byte"), 0.0),
        ("Trained chunks", "share of chunks", _numbers(run, "trained_fraction"), 0.0),
        ("Answers that ended by themselves", "share of answers", _numbers(run, "eos_rate"), 1.0),
        ("Length", "tokens an answer", lengths, 0.0),
    ]
    figures = []
    for name, unit, values, top in wanted:
        drawn, note = "", "Not measured in this run."
        if any(v is not None for v in values):
            drawn, note = chart.curve(run.steps, values, name=name, unit=unit, top=top)
        figures.append(_figure(name, drawn, note))
    layers = [[v or 0.0 for v in _numbers(run, f"seconds_{stage}")] for stage in STAGES]
    total = sum(map(sum, layers)) or 1.0
    keys = " ".join(
        f'<span class="key key{k}"></span> {stage} {100 * sum(layer) / total:.0f} %'
        for k, (stage, layer) in enumerate(zip(STAGES, layers, strict=True))
    )
    drawn, note = chart.bars(run.steps, layers, names=STAGES, unit="seconds a step")
    figures.append(_figure("Time by stage", drawn, f"{keys}. {note}"))
    thin = (
        "Thin: each step; thick: the mean of the steps around it. "
        if len(run.steps) >= chart.SMOOTHED_FROM
        else ""
    )
    return (
        f'<p class="soft">{thin}Point at a chart for its numbers.</p>\n'
        f'<div class="charts">{"".join(figures)}</div>'
    )


def _figure(name: str, drawn: str, note: str) -> str:
    return f"<figure><h3>{name}</h3>{drawn}<figcaption>{note}</figcaption></figure>\n"


def _measured(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Each number of eval.jsonl by step; the ends of intervals are not numbers of their own."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, row in run.evals.items():
        for key, value in row.items():
            is_end = any(key.endswith(e) and key.removesuffix(e) in row for e in ("_low", "_high"))
            number = _finite(value)
            if key != "step" and not is_end and number is not None:
                found.setdefault(key, []).append((step, number))
    return found


def _evals(run: Run) -> str:
    figures = []
    for name, found in _measured(run).items():
        steps, values = zip(*found, strict=True)
        lows, highs = (
            [_finite(run.evals[step].get(f"{name}_{end}")) for step in steps]
            for end in ("low", "high")
        )
        drawn = chart.points(steps, values, lows, highs, name=name)
        figures.append(_figure(spelled(name), drawn, ""))
    charts = f'<div class="charts">{"".join(figures)}</div>'
    return f"<h2>Evaluation</h2>\n{charts}" if figures else ""


def _table(run: Run) -> str:
    """Every metric at the start and at the end."""
    keys = dict.fromkeys(key for row in run.rows for key in row if key != "step")
    found = {key: _ends(_numbers(run, key)) for key in keys}
    body = "".join(
        f'<tr><th scope="row">{spelled(key)}<td>{chart.number(ends[0])}<td>{chart.number(ends[1])}'
        for key, ends in found.items()
        if ends is not None
    )
    head = '<tr><td><th scope="col">first tenth<th scope="col">last tenth'
    return (
        "<details><summary>All metrics, means of the first and the last tenth of the steps</summary>"
        f'<div class="scroll"><table>{head}{body}</table></div></details>'
    )


def _samples(run: Run) -> str:
    if not run.cases:
        return "<p>There are no samples yet.</p>"
    shown = sum(map(len, run.cases))
    back = any(len(case) > 1 for case in run.cases)
    told = "the first and the last answer to prompts that came back" if back else (
        "answers of the first and the last steps; no prompt came back"
    )  # fmt: skip
    return (
        f"<p>{shown} of {run.n_samples:,} answers: {told}. The shade says how much the teacher "
        "disagrees, that is how likely it would refuse the chunk as the test of speculative decoding "
        "does. Point at a chunk, tap it, or go to it with the tab key: what the teacher would have "
        f"written appears at the lower edge.</p>\n{_legend()}\n"
        + "\n".join(f'<div class="case">{_case(case)}</div>' for case in run.cases)
    )


def _legend() -> str:
    edges = [100 * k // LEVELS for k in range(LEVELS + 1)]
    shades = [_sign(f"d{k}", f"{edges[k]}–{edges[k + 1]} %") for k in range(LEVELS)]
    signs = [
        "refused:",
        *shades,
        _sign("flawed", "text") + "not scorable",
        _sign("d0 trained", "text") + "trained",
        "solid line: a chunk ends; dotted line: a token of the student ends inside it",
    ]
    return f'<ul class="signs">{"".join(f"<li>{sign}</li>" for sign in signs)}</ul>'


def _sign(classes: str, text: str) -> str:
    return f'<span class="chunk {classes}"><span class="row"><bdi>{text}</bdi></span></span>'


def _case(case: Sequence[Sample]) -> str:
    extra = "".join(
        f'<p class="soft">{spelled(key)}: {_value(value)}</p>'
        for key, value in case[0].extra.items()
    )
    answers = "".join(f"<section>{_answer(sample)}</section>" for sample in case)
    return f'{_prompt(case[0].prompt)}{extra}<div class="answers">{answers}</div>'


def _prompt(prompt: Any) -> str:
    """Text, or each message with its role."""
    parts = [("prompt", prompt)]
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        parts = [(message.get("role"), message.get("content")) for message in prompt]
    drawn = []
    for role, text in parts:
        told = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
        rest = len(told) - CHARACTERS
        more = f' <span class="soft">… {rest:,} characters more</span>' if rest > 0 else ""
        drawn.append(
            f'<p class="prompt" dir="auto"><span class="soft">{spelled(str(role))}:</span> '
            f"<bdi>{prose(told[:CHARACTERS])}</bdi>{more}</p>"
        )
    return "".join(drawn)


def _answer(sample: Sample) -> str:
    known = [a for a, c in zip(sample.acceptance, sample.chunks, strict=True) if c.flaw == EXACT]
    told = "" if sample.on_policy else ", a fixed completion"
    if known:
        told += f": the teacher accepts {100 * sum(known) / len(known):.0f} % of its chunks"
    shown = [k for k, chunk in enumerate(sample.chunks) if chunk.s0 < TOKENS]
    parts = []
    for k in shown:
        parts.append(f"<li>{_chunk(sample, k)}</li>")
        if sample.text[sample.chunks[k].start : sample.chunks[k].end].endswith(b"\n"):
            parts.append('<li class="end" aria-hidden="true"></li>')
    rest = len(sample.chunks) - len(shown)
    more = f'<p class="soft">… {rest:,} chunks more</p>' if rest else ""
    more += "" if sample.finished else '<p class="soft">Cut at the limit of tokens.</p>'
    return f'<h3>Step {sample.step:,}{told}</h3><ol class="chunks">{"".join(parts)}</ol>{more}'


def _chunk(sample: Sample, k: int) -> str:
    s0, s1, *_, flaw = sample.chunks[k]
    level = min(LEVELS - 1, int(LEVELS * (1 - sample.acceptance[k])))
    classes = "flawed" if flaw != EXACT else f"d{level}"
    classes += " trained" if sample.trained[k] else ""
    row = "".join(f"<bdi>{_token(sample, s)}</bdi>" for s in range(s0, s1))
    return (
        f'<div class="chunk {classes}" tabindex="0"><span class="row">{row}</span>'
        f'<div class="sheet">{_sheet(sample, k)}</div></div>'
    )


def _token(sample: Sample, s: int) -> str:
    if s >= len(sample.spans):
        return "<i>‹end›</i>"
    start, end = sample.spans[s]
    token = Token(sample.ids[s], start, end, EXACT, sample.text[start:end], f"‹id {sample.ids[s]}›")
    return token_html(token)


def _sheet(sample: Sample, k: int) -> str:
    """What the teacher says of a chunk, and what it is made of."""
    s0, s1, t0, t1, start, end, flaw = sample.chunks[k]
    best, prob = sample.best[k]
    wanted = token_html(Token(0, 0, 0, EXACT, best.encode("utf-8", "replace"), ""))
    verdict = (
        f"It would refuse the student's chunk in {100 * (1 - sample.acceptance[k]):.0f} % of cases"
    )
    if flaw != EXACT:
        verdict = f"The chunk cannot be scored, {FLAWS[flaw]}: {REASONS[flaw]}"
    ids = [
        f"{side} ids {', '.join(map(str, found))}"
        for side, found in (("student", sample.ids[s0:s1]), ("teacher", sample.teacher_ids[t0:t1]))
        if found
    ]
    return (
        f"<p>The student wrote <code>{''.join(_token(sample, s) for s in range(s0, s1))}</code>; the teacher would most likely "
        f"go on with <code>{wanted}</code> ({100 * prob:.0f} %).</p><p>{verdict}; "
        f"{'' if sample.trained[k] else 'not '}trained.</p>"
        f'<p class="soft">Bytes {start} to {end}; {"; ".join(ids)}.</p>'
    )
