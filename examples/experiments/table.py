# SPDX-License-Identifier: Apache-2.0
"""Files of `screen.py` in, tables, verdicts and plots of docs/experiments.md out.

    python examples/experiments/table.py --runs runs      new results, then the page
    python examples/experiments/table.py                  the page from docs/results alone

The runs of `runs/screen` go into `docs/results/screen.json`, one line a run, and so with each name in
`FOLDERS`; a run that is there already is replaced, and those of other sittings stay. From these files,
and nothing else, the parts of the page between markers and the plots are made. What was not run is
said so there. The rules of the verdicts stand in the page.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from minigold.data import write_whole

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import ARMS
from task import held_out, read_run

__all__ = ["Results", "main", "page", "plot", "table", "verdicts", "wilson"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDERS = ("screen", "tune", "equal-time", "confirm-skill", "confirm-behaviour")
SHARED = ("teacher", "untouched", "gold")  # of the screening, that other tables need
NOT_RUN = "not run yet"
DRAWS = 1000  # of the bootstrap
GAP, GAIN, SHARE, SLACK, CONTROL = 0.6, 0.95, 0.35, 0.02, 0.2  # of the rules in the page
LENGTH = 0.8  # of the teacher's, that answers have at least: an empty one stops as well
MASK_RULE = (
    f"at most {SHARE:.0%} of the chunks keep {GAIN:.0%} of the gain of all, beat the random mask, "
    "cost less"
)
RIVALS = ("fine-tuned", "off-policy", "uld", "uld-paper", "trl-gold", "trl-gold-on", "trl-bayesian",
          "trl-beta-0", "bpm", "bpm-spaces", "strict", "strict-paper", "byte")  # fmt: skip
FAR = ("uld", "trl-gold")  # whose intervals must not overlap ours
MASKS = ("gold", "reject-0.5", "reject-0.1", "soft-or-0.35", "divergence-0.35")  # in this order
CONTROLS = ("shifted", "shuffled", "untaught", "suppress")

Run = Mapping[str, Any]


# ------------------------------------------------------------------- statistics
def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share.

    Source: Wilson 1927; method 3 of Newcombe 1998, whose table it equals.

    Raises:
        ValueError: not 0 to n right of at least one.

    >>> [round(x, 4) for x in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"expected 0 to n right of n >= 1, got {right} of {n}")
    p, zz = right / n, z * z / n
    middle = (p + zz / 2) / (1 + zz)
    reach = z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return min(p, max(0.0, middle - reach)), max(p, min(1.0, middle + reach))


@dataclass(frozen=True)
class Results:
    """All runs of one folder, by arm."""

    runs: Mapping[str, Sequence[Run]]

    def of(self, *arms: str) -> bool:
        return all(self.runs.get(arm) for arm in arms)

    def count(self, arm: str, key: str = "right") -> tuple[int, int]:
        """Ones among the marks of all seeds, and how many marks there are."""
        marks = "".join(run[key] for run in self.runs[arm])
        return marks.count("1"), len(marks)

    def share(self, arm: str, key: str = "right") -> float:
        ones, n = self.count(arm, key)
        return ones / n

    def mean(self, arm: str, key: str) -> float | None:
        known = [run[key] for run in self.runs[arm] if run.get(key) is not None]
        return sum(known) / len(known) if known else None

    def machines(self) -> list[str]:
        """Where the runs were made, as JSON; the machine of most of the default's runs first."""
        told = [(json.dumps(run["machine"], sort_keys=True), name)
                for name, runs in self.runs.items() for run in runs]  # fmt: skip
        both = Counter(one for one, _ in told), Counter(one for one, name in told if name == "gold")
        return sorted(both[0], key=lambda one: (-both[1][one], -both[0][one], one))

    def seconds(self, arm: str) -> float | None:
        """Mean processor time of the runs on the first machine: of two it would be of neither."""
        here = [run for run in self.runs[arm] if run["machine"] == json.loads(self.machines()[0])]
        return Results({arm: here}).mean(arm, "cpu_seconds")

    @property
    def marked(self) -> bool:
        """Prompts have right answers; where they have none, reverse KL stands for exact match."""
        return any(run["right"] for runs in self.runs.values() for run in runs)

    def kl(self, arm: str) -> tuple[float, float, float]:
        """Reverse KL per byte, mean over the seeds, and its interval over prompts and seeds.

        Infinite where a run has none: its samples are empty, or none can be scored.
        """
        ends = [[run.get(f"reverse_kl_per_byte{end}") for run in self.runs[arm]]
                for end in ("", "_low", "_high")]  # fmt: skip
        if None in [x for found in ends for x in found]:
            return math.inf, math.inf, math.inf
        value, low, high = (float(np.mean(found)) for found in ends)
        seeds = 1.96 * float(np.std(ends[0])) / math.sqrt(len(ends[0]))
        return (
            value,
            value - math.hypot(value - low, seeds),
            value + math.hypot(high - value, seeds),
        )

    def seeds(self, arm: str) -> int:
        return len({run["seed"] for run in self.runs[arm]})

    def ends(self, arm: str) -> tuple[str, str]:
        """Start and teacher of its pair."""
        student = ARMS[arm].student
        return (
            "untouched" if student in ("student", "teacher") else f"{student}-untouched"
        ), "teacher"

    def gap(self, arm: str, share: float | None = None) -> float | None:
        """Gap recovered, (arm - start) / (teacher - start); of another share if one is given."""
        if not self.of(*self.ends(arm)):
            return None
        if not self.marked:  # the teacher's is 0
            start = self.kl(self.ends(arm)[0])[0]
            return 1 - (self.kl(arm)[0] if share is None else share) / start
        start, top = (self.share(end) for end in self.ends(arm))
        value = self.share(arm) if share is None else share
        return (value - start) / (top - start) if top > start else None

    def right_RP(self, arm: str) -> np.ndarray:
        """0 or 1, of each run and prompt."""
        return np.array([[int(mark) for mark in run["right"]] for run in self.runs[arm]])

    def pairs(self, *arms: str) -> str:
        """Letters of the pairs that the arms' runs are of: models made anew are others.

        A pair is known by its teacher's bits per byte on held-out text.
        """
        bits = {arm: [round(run.get("bits_per_byte_teacher", 0.0), 4) for run in runs]
                for arm, runs in self.runs.items()}  # fmt: skip
        known = dict.fromkeys(x for found in bits.values() for x in found)
        letters = dict(zip(known, ascii_uppercase, strict=False))
        return "".join(sorted({letters[x] for arm in arms for x in bits[arm]}))

    def above(self, arm: str, other: str) -> tuple[float, float, float]:
        """Difference in exact match, and its interval by a bootstrap over prompts and runs.

        In reverse KL, where it is how much lower the arm is, the interval is the widest that both
        arms' own allow.
        """
        if not self.marked:
            (a, a_low, a_high), (b, b_low, b_high) = self.kl(arm), self.kl(other)
            return b - a, b_low - a_high, b_high - a_low
        rng, both = np.random.default_rng(0), (self.right_RP(arm), self.right_RP(other))
        drawn = []
        for _ in range(DRAWS):
            prompt_P = rng.integers(both[0].shape[1], size=both[0].shape[1])
            a, b = (x_RP[rng.integers(len(x_RP), size=len(x_RP))][:, prompt_P] for x_RP in both)
            drawn.append(a.mean() - b.mean())
        low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
        return float(both[0].mean() - both[1].mean()), low, high


# ------------------------------------------------------------------- the rules
def _span(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _gap(r: Results, arm: str) -> str:
    ends = wilson(*r.count(arm)) if r.marked else (r.kl(arm)[2], r.kl(arm)[1])
    low, high = (r.gap(arm, end) or 0.0 for end in ends)
    return _span(r.gap(arm) or 0.0, low, high)


def _recovers(r: Results) -> tuple[bool, str]:
    return (r.gap("gold") or 0.0) >= GAP, f"gap recovered {_gap(r, 'gold')}"


def _beats(rival: str) -> Callable[[Results], tuple[bool, str]]:
    def rule(r: Results) -> tuple[bool, str]:
        value, low, high = r.above("gold", rival)
        holds = low > 0
        if rival in FAR and r.marked:
            holds = holds and wilson(*r.count("gold"))[0] > wilson(*r.count(rival))[1]
        what = "exact match higher" if r.marked else "reverse KL lower"
        return holds, f"{what} by {_span(value, low, high)}"

    return rule


def _mask_keeps(r: Results) -> tuple[bool | None, str]:
    for mask in MASKS:
        share = r.mean(mask, "trained_fraction") if r.of(mask) else None
        if share is not None and share <= SHARE:
            break
    else:
        return False, f"no mask of {', '.join(MASKS)} trained at most {SHARE:.0%}"
    random = f"random-{'weighted' if mask == 'gold' else mask.replace('soft-or', 'divergence')}"
    if not r.of(random):
        return None, f"{mask}: {share:.0%} of the chunks; {random} is wanted"
    kept = (r.gap(mask) or 0.0) / max(r.gap("all") or 0.0, 1e-9)
    _, low, _ = r.above(mask, random)
    time, whole_time = r.seconds(mask), r.seconds("all")
    if time is None or whole_time is None:
        return None, f"{mask} and all on one machine are wanted"
    memory, whole_memory = (r.mean(arm, "peak_memory_gib") for arm in (mask, "all"))
    cheaper = time < whole_time and memory < whole_memory
    words = (
        f"{mask}: {share:.0%} of the chunks keep {kept:.0%} of the gain; "
        f"{'above' if low > 0 else 'not above'} {random}; "
        f"{'less' if cheaper else 'not less'} time and memory"
    )
    return kept >= GAIN and low > 0 and cheaper, words


def _indents(r: Results) -> tuple[bool, str]:
    own, theirs = r.share("gold", "indented"), r.share("teacher", "indented")
    return own >= theirs - SLACK, f"{own:.3f}, teacher {theirs:.3f}"


def _stops(r: Results) -> tuple[bool, str]:
    own, theirs = r.share("gold", "stopped"), r.share("teacher", "stopped")
    length, whole = (r.mean(arm, "mean_bytes") or 0.0 for arm in ("gold", "teacher"))
    words = f"{own:.3f}, teacher {theirs:.3f}; {length:.0f} bytes an answer, teacher {whole:.0f}"
    return own >= theirs - SLACK and length >= LENGTH * whole, words


def _fails(control: str) -> Callable[[Results], tuple[bool, str]]:
    def rule(r: Results) -> tuple[bool, str]:
        high = r.gap(control, wilson(*r.count(control))[1]) or 0.0
        return high <= CONTROL, f"gap recovered {_gap(r, control)}"

    return rule


def _above_random(random: str) -> Callable[[Results], tuple[bool, str]]:
    mask = random.removeprefix("random-")

    def rule(r: Results) -> tuple[bool, str]:
        value, low, high = r.above("gold" if mask == "weighted" else mask, random)
        return low > 0, f"the mask is higher by {_span(value, low, high)}"

    return rule


def _same(r: Results) -> tuple[bool, str]:
    value, low, high = r.above("same-gold", "same-gkd")
    return low <= 0 <= high and abs(value) <= 0.05, f"differs by {_span(value, low, high)}"


def _may_be_default(r: Results) -> tuple[bool, str]:
    value, low, high = r.above("beta-0.1", "gold")
    what = "exact match higher" if r.marked else "reverse KL lower"
    return (high >= 0 if r.marked else low > 0), f"{what} by {_span(value, low, high)}"


Rule = tuple[str, str, Sequence[str], Callable[[Results], tuple[bool | None, str]]]


def rules() -> list[Rule]:
    """Key of the rule, what it says, the arms that it needs, and how it is decided."""
    ends = ("teacher", "untouched", "gold")
    return [
        ("a", f"the default recovers at least {GAP:.0%} of the gap", ends, _recovers),
        *(("a", f"more than `{x}`" + (", without overlap" if x in FAR else ""), (*ends, x),
           _beats(x)) for x in RIVALS),
        ("b", MASK_RULE, (*ends, "all", "random-weighted"), _mask_keeps),
        ("c", f"the student stops as often as the teacher, in answers of {LENGTH:.0%} of its length or more",
         ends, _stops),
        ("d", "code is as well indented as the teacher's", ends, _indents),
        *(("control", f"`{x}` fails", (*ends, x), _fails(x)) for x in CONTROLS),
        *(("mask", f"beats `{x}`", (x, "gold" if x == "random-weighted" else x[7:]),
           _above_random(x)) for x in ARMS if x.startswith("random-")),
        ("beta", "beta 0.1 may be the default: not below it in exact match, better in reverse KL",
         ("gold", "beta-0.1"), _may_be_default),
        ("positive", "with one tokenizer, minigold is GKD", ("same-gold", "same-gkd"), _same),
    ]  # fmt: skip


def verdicts(r: Results, keys: Sequence[str] = ()) -> list[tuple[str, str, str, str]]:
    """Key, rule, verdict, figures.

    Args:
        keys: those that are of interest, where their arms were run; none is all of them.
    """
    rows = []
    for key, told, needs, decide in rules():
        shown = not keys or (key in keys and r.of(*needs))
        if not shown or (key == "d" and not r.marked):
            continue
        if not r.of(*needs):
            rows.append((key, told, NOT_RUN, ""))
            continue
        holds, words = decide(r)
        n = min(r.seeds(arm) for arm in needs if ARMS[arm].trains)
        pairs = r.pairs(*needs)
        notes = [f"{n} seed{'s' * (n > 1)}"] * (n < 3) + [f"pairs {pairs}"] * (len(pairs) > 1)
        if holds is None:
            notes = []
        mark = {True: "holds", False: "**fails**", None: NOT_RUN}[holds]
        rows.append((key, told, mark + (f" ({', '.join(notes)})" if notes else ""), words))
    return rows


# ------------------------------------------------------------------- the page
HEADS = ("arm", "seeds", "exact match (95 %)", "gap", "rKL/byte", "bits/byte", "stops", "tokens",
         "repeats", "indented", "trained", "cpu s", "GiB", "pair")  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _exact(r: Results, name: str) -> str:
    if not r.marked:
        return "–"
    low, high = wilson(*r.count(name))
    return f"{r.share(name):.3f} ({low:.3f}–{high:.3f})"


def table(r: Results, *, every: bool = True) -> str:
    """Markdown: one row an arm, in the order of `ARMS`, under its group.

    Args:
        every: arms that were not run have a row, too.
    """
    lines = ["| " + " | ".join(HEADS) + " |", "|---|" + "--:|" * (len(HEADS) - 1)]
    group = ""
    for name, arm in ARMS.items():
        if not (every or r.of(name)):
            continue
        if arm.group != group:
            group = arm.group
            lines.append(f"| *{group}* |" + " |" * (len(HEADS) - 1))
        if not r.of(name):
            lines.append(f"| {name} | 0 | {NOT_RUN} |" + " |" * (len(HEADS) - 3))
            continue
        failed = any(run.get("failed") for run in r.runs[name])
        cells = [
            name + (" †" if failed else ""), str(r.seeds(name)),
            _exact(r, name), _number(r.gap(name), ".2f"),
            _number(r.kl(name)[0], "z.4f"),
            _number(r.mean(name, "bits_per_byte_student"), ".3f"),
            f"{r.share(name, 'stopped'):.3f}", _number(r.mean(name, "mean_tokens"), ".1f"),
            _number(r.mean(name, "repetition"), ".3f"),
            f"{r.share(name, 'indented'):.3f}" if r.marked else "–",
            _number(r.mean(name, "trained_fraction"), ".2f"),
            _number(r.seconds(name), ".0f"),
            _number(r.mean(name, "peak_memory_gib"), ".2f"), r.pairs(name),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lost_sums(run: Run) -> int:
    """Sums of the tiny task of which no held-out prompt was answered right."""
    marks: dict[str, str] = {}
    for prompt, mark in zip(held_out(), run["right"], strict=True):
        for one in str(prompt.prompt).strip().partition(": ")[2].split(", "):
            marks[one] = marks.get(one, "") + mark
    return sum("1" not in found for found in marks.values())


def sums(r: Results) -> str:
    """A line on the arms that have learned a part of the task."""
    parts = [f"`{arm}` {', '.join(str(lost_sums(run)) for run in runs)}"
             for arm, runs in r.runs.items() if 0 < r.share(arm) < 1]  # fmt: skip
    return f"Of 25 sums, those with no right answer, seed by seed: {'; '.join(parts) or 'none'}."


def _rules_table(rows: Sequence[tuple[str, str, str, str]]) -> str:
    if not rows:
        return f"Rules: {NOT_RUN}."
    lines = ["| | rule | verdict | figures |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def tuning(r: Results) -> str:
    """Markdown: exact match on the validation prompts by arm and learning rate."""
    rates = sorted({run["lr"] for runs in r.runs.values() for run in runs})
    lines = ["| arm | " + " | ".join(f"{lr:g}" for lr in rates) + " |"]
    lines.append("|---|" + "--:|" * len(rates))
    for arm, runs in r.runs.items():
        of = {lr: [run for run in runs if run["lr"] == lr] for lr in rates}
        cells = [f"{Results({arm: some}).share(arm):.3f}" if some else "–" for some in of.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machines(r: Results) -> str:
    """Where the runs were made, and how long they were."""
    steps = {run["steps"] for runs in r.runs.values() for run in runs if run["steps"]}
    told = [", ".join(f"{key} {x}" for key, x in json.loads(one).items()) for one in r.machines()]
    n = sum(map(len, r.runs.values()))
    few = ", ".join(map(str, sorted(steps))) if len(steps) < 4 else f"{min(steps)} to {max(steps)}"
    return f"{n} runs{few and f' of {few} steps'}. Made with: {'; '.join(told)}."


PLOTTED = {True: "exact match", False: "gap recovered"}


def _drawn(r: Results, name: str) -> tuple[float, float, float]:
    """What `plot` shows of an arm, from 0 to 1."""
    if r.marked:
        return r.share(name), *wilson(*r.count(name))
    value, low, high = (min(1.0, max(0.0, r.gap(name, kl) or 0.0)) for kl in r.kl(name))
    return value, high, low


def plot(r: Results) -> str:
    """SVG: exact match of each arm with its interval; gap recovered where there are no answers.

    A gap below 0 stands at 0, with its figure.
    """
    names = [name for name in ARMS if r.of(name)]
    left, width, row = 150, 420, 16
    height = row * len(names) + 34

    def x(share: float) -> float:
        return left + share * width

    parts = []
    for mark in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path stroke="#ccc" d="M{x(mark):.0f} 8V{height - 24}"/>')
        parts.append(
            f'<text x="{x(mark):.0f}" y="{height - 8}" text-anchor="middle">{mark:g}</text>'
        )
    for i, name in enumerate(names):
        middle, low, high = _drawn(r, name)
        y, colour = (
            18 + row * i,
            "#b3402a" if ARMS[name].group in ("controls", "random") else "#0b5fa5",
        )
        gap = r.gap(name)
        below = f" ({gap:.2f})" if gap is not None and gap < 0 else ""
        parts.append(
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{name}{below}</text>'
            f'<path stroke="{colour}" d="M{x(low):.1f} {y}H{x(high):.1f}"/>'
            f'<circle fill="{colour}" cx="{x(middle):.1f}" cy="{y}" r="3.5"/>'
        )
    style = '<style>text{font:11px sans-serif;fill:#333}path{stroke-width:1.5}</style><rect width="100%" height="100%" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 24} {height}" '
        f'role="img" aria-label="{PLOTTED[r.marked]} by arm">{style}\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def part(name: str, r: Results) -> str:
    """What stands between the markers of a folder."""
    if not r.runs:
        return f"{NOT_RUN}."
    if name == "tune":
        return f"{machines(r)}\n\n{tuning(r)}"
    every = name == "screen"
    shown = () if every else ("a",) if name == "equal-time" else ("a", "b", "c", "d", "beta")
    picture = f"![{PLOTTED[r.marked]} by arm](results/{name}.svg)"
    parts = [machines(r), table(r, every=every), picture, _rules_table(verdicts(r, shown))]
    if name in ("screen", "equal-time"):
        parts.insert(2, sums(r))
    return "\n\n".join(parts)


def page(text: str, parts: Mapping[str, str]) -> str:
    """The page with its parts put between `<!-- name -->` and `<!-- end -->`.

    Raises:
        ValueError: a part without its markers.
    """
    for name, new in parts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, n = pattern.subn(lambda found, new=new: f"{found[1]}{new}\n{found[2]}", text)
        if n != 1:
            raise ValueError(f"expected one <!-- {name} --> … <!-- end --> in the page, got {n}")
    return text


# ------------------------------------------------------------------- files
def collect(folder: Path, known: Sequence[Run] = (), *, by_rate: bool = False) -> list[Run]:
    """The runs of a folder, and those of `known` that it does not have, by arm and seed.

    Args:
        by_rate: runs of several learning rates stand side by side.

    Raises:
        ValueError: a run of no arm; a file that is not whole.
    """
    found = [read_run(path) for path in folder.rglob("*.seed*.json")]
    order, runs = {arm: place for place, arm in enumerate(ARMS)}, {}
    for run in [*known, *found]:
        if run.get("arm") not in order:
            raise ValueError(
                f"expected runs of the arms in arms.py in {folder} and docs/results, got one of "
                f"{run.get('arm')!r}; take it out, or name it as the arm is named now"
            )
        runs[order[run["arm"]], run["seed"], run["lr"] if by_rate else 0.0] = run
    return [runs[key] for key in sorted(runs)]


def _runs(path: Path) -> list[Run]:
    """Those of a file of docs/results; none if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def read(folder: Path, name: str) -> Results:
    """Results of docs/results."""
    runs: dict[str, list[Run]] = {}
    for run in _runs(folder / f"{name}.json"):
        runs.setdefault(run["arm"], []).append(run)
    if runs and name == "equal-time":
        others = read(folder, "screen").runs
        runs = {arm: others[arm] for arm in SHARED if arm in others} | runs
    return Results(runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes docs/results and docs/experiments.md."""
    parser = argparse.ArgumentParser(description="Tables, verdicts and plots of the experiments.")
    parser.add_argument("--runs", type=Path, help="folder with " + ", ".join(FOLDERS))
    parser.add_argument("--docs", type=Path, default=DOCS, help="has experiments.md")
    args = parser.parse_args(argv)
    if args.runs and not any((args.runs / name).is_dir() for name in FOLDERS):
        parser.error(f"expected one of {', '.join(FOLDERS)} in --runs, found none in {args.runs}")
    results = args.docs / "results"
    results.mkdir(exist_ok=True)
    parts = {}
    for name in FOLDERS:
        if args.runs and (args.runs / name).is_dir():
            path = results / f"{name}.json"
            runs = collect(args.runs / name, _runs(path), by_rate=name == "tune")
            lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
            write_whole(path, f"[\n{lines}\n]\n".encode())
        found = read(results, name)
        parts[name] = part(name, found)
        if found.runs and name != "tune":
            write_whole(results / f"{name}.svg", plot(found).encode())
    path = args.docs / "experiments.md"
    write_whole(path, page(path.read_text(encoding="utf-8"), parts).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
