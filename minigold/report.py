# SPDX-License-Identifier: Apache-2.0
"""The folder of a run in, one HTML page out: what was run, its curves, and samples with every token.

It needs no model and no tokenizer: `history.py` reads the files, `chart.py` draws the curves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from minigold import chart
from minigold.compare import Token
from minigold.data import write_whole
from minigold.history import Run, Sample, read_run
from minigold.markup import document, prose, spelled, token_html
from minigold.offsets import EXACT, FLAWS
from minigold.picture import REASONS

__all__ = ["write_report"]

TOKENS = 160  # shown of an answer
MOST = 40  # tokens shown of a chunk
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
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(9.5rem, 100%), 1fr));
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
        ValueError: see `read_run`.
        OSError: nothing can be written there.
    """
    target = run / "report.html" if target is None else target
    write_whole(target, _page(read_run(run)).encode("utf-8"))
    return target


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
            _evals(run),
            f"<h2>Curves</h2>\n{_curves(run)}",
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
    return float(value) if is_number and abs(value) < 1e300 else None


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
    measured = [f"{spelled(name)} {_moved(*ends)}" for name, ends in _changed(run)]
    return f"{told} In evaluation {' and '.join(measured[:2])}." if measured else told


def _changed(run: Run) -> list[tuple[str, tuple[float, float]]]:
    """What evaluation gave first and last, where these differ."""
    found = [(name, (values[0][1], values[-1][1])) for name, values in _measured(run).items()]
    return [(name, ends) for name, ends in found if ends[0] != ends[1]]


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
        (f"{spelled(name)} in evaluation", [chart.number(v) for v in ends])
        for name, ends in _changed(run)[:4]
    ]
    tiles += [
        (name, [f"{100 * v:.0f} %" if share else chart.number(v) for v in ends])
        for key, name, share in (
            ("reverse_kl_per_byte", "Reverse KL, nats per byte", False),
            ("loss", "Loss, nats per trained chunk", False),
            ("trained_fraction", "Chunks that were trained", True),
            ("eos_rate", "Answers that ended by themselves", True),
        )
        if (ends := _ends(_numbers(run, key)))
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
    return prose(told[:300] + "…" * (len(told) > 300))


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
    drawn, room, rest = [], CHARACTERS, 0
    for role, text in parts:
        told = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
        if room > 0:
            drawn.append(
                f'<p class="prompt" dir="auto"><span class="soft">{spelled(str(role)[:40])}:</span> '
                f"<bdi>{prose(told[:room])}</bdi></p>"
            )
        rest += max(0, len(told) - room)
        room = max(0, room - len(told))
    more = f'<p class="soft">… {rest:,} characters more</p>' if rest else ""
    return "".join(drawn) + more


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
    row = "".join(f"<bdi>{token}</bdi>" for token in _tokens(sample, s0, s1))
    return (
        f'<div class="chunk {classes}" tabindex="0"><span class="row">{row}</span>'
        f'<div class="sheet">{_sheet(sample, k)}</div></div>'
    )


def _tokens(sample: Sample, s0: int, s1: int) -> list[str]:
    """Tokens of a chunk; of a very long one, as many as can be read."""
    shown = [_token(sample, s) for s in range(s0, min(s1, s0 + MOST))]
    return [*shown, f"<i>… {s1 - s0 - MOST:,} tokens more</i>"] if s1 - s0 > MOST else shown


def _token(sample: Sample, s: int) -> str:
    if s >= len(sample.spans):
        return "<i>‹end›</i>"
    start, end = sample.spans[s]
    token = Token(sample.ids[s], start, end, EXACT, sample.text[start:end], f"‹id {sample.ids[s]}›")
    return token_html(token)


def _sheet(sample: Sample, k: int) -> str:
    """What the teacher says of a chunk, and what it is made of."""
    s0, s1, t0, t1, start, end, flaw = sample.chunks[k]
    said = ""
    if best := sample.best[k]:
        wanted = token_html(Token(0, 0, 0, EXACT, best[0].encode("utf-8", "replace"), ""))
        said = f"; the teacher would most likely go on with <code>{wanted}</code> ({100 * best[1]:.0f} %)"
    verdict = (
        f"It would refuse the student's chunk in {100 * (1 - sample.acceptance[k]):.0f} % of cases"
    )
    if flaw != EXACT:
        verdict = f"The chunk cannot be scored, {FLAWS[flaw]}: {REASONS[flaw]}"
    ids = [
        f"{side} ids {', '.join(map(str, found[:MOST]))}" + "…" * (len(found) > MOST)
        for side, found in (("student", sample.ids[s0:s1]), ("teacher", sample.teacher_ids[t0:t1]))
        if found
    ]
    return (
        f"<p>The student wrote <code>{''.join(_tokens(sample, s0, s1))}</code>{said}.</p><p>{verdict}; "
        f"{'' if sample.trained[k] else 'not '}trained.</p>"
        f'<p class="soft">Bytes {start} to {end}; {"; ".join(ids)}.</p>'
    )
