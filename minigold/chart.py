# SPDX-License-Identifier: Apache-2.0
"""Numbers by step in, one chart as inline SVG out: curves, stacked bars, points with intervals.

Drawn by hand, without a library: axes with round numbers, a faint line for each step and a firm one
for the mean of the steps around it. Pointing at a place shows its numbers above the frame; the style
sheet does that, no script. Colours are the page's: `STYLE` names them for both schemes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from minigold.markup import prose

__all__ = ["SMOOTHED_FROM", "STYLE", "bars", "curve", "number", "points", "smooth", "ticks"]

Values = Sequence[float | None]

STYLE = """
:root { --curve: #0b5fa5; --grid: #e2e2e2; --bar0: #17406d; --bar1: #e08a1e; --bar2: #b7d3ea; }
@media screen and (prefers-color-scheme: dark) {
  :root { --curve: #6db6f2; --grid: #333; --bar0: #2b69a6; --bar1: #f0a64a; --bar2: #d9e8f5; } }
.chart { display: block; width: 100%; height: auto; color: var(--ink);
  font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.chart text { fill: currentColor; }
.chart .soft { color: var(--soft); }
.chart .grid { stroke: var(--grid); }
.chart .zero { stroke: var(--line); }
.chart .raw, .chart .line { fill: none; stroke: var(--curve); stroke-linejoin: round;
  stroke-linecap: round; }
.chart .raw { stroke-width: 1; opacity: .45; }
.chart .line { stroke-width: 2.2; }
.chart .dot { fill: var(--curve); }
.chart .bar0 { fill: var(--bar0); } .chart .bar1 { fill: var(--bar1); }
.chart .bar2 { fill: var(--bar2); }
.at rect { fill: transparent; }
.at g { visibility: hidden; }
.at:hover g { visibility: visible; }
.at path { stroke: var(--ink); stroke-dasharray: 2 2; }
"""

WIDTH, HEIGHT = 340, 200  # of the drawing, in CSS pixels where there is room
LEFT, RIGHT, TOP, BOTTOM = 46, 322, 24, 166  # edges of the frame in it
SMOOTHED_FROM = 40  # steps
MOST, MOST_READ = 150, 60  # places of a line, and to point at; more steps share one


@dataclass(frozen=True)
class _Frame:
    """The ranges of both axes."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)


# -- charts --------------------------------------------------------------------------------------


def curve(
    steps: Sequence[int], values: Values, *, name: str, unit: str, top: float = 0.0
) -> tuple[str, str]:
    """A line for each step, and one for the mean around it.

    A few values far from all others are left outside of the frame, since the others would lie flat.

    Args:
        steps: increasing, at least one.
        values: finite, None where nothing was measured; at least one is a number.
        top: the axis reaches at least from 0 to there.

    Returns:
        The SVG, and what a reader must know of it: "" or how many values lie outside.
    """
    known = [v for v in values if v is not None]
    frame = _frame(steps, *_usual([*known, top]))
    means = smooth(values)
    parts = [_axes(frame, unit)]
    if means != list(values):
        parts.append(_line("raw", frame, _extremes(steps, values)))
    parts.append(_line("line", frame, [(steps[i], means[i]) for i in _middles(len(steps), MOST)]))
    if len(known) == 1:
        parts.append(_dot(frame, *next((s, v) for s, v in _pairs(steps, values) if v is not None)))

    def told(i: int) -> str:
        value, mean = values[i], means[i]
        text = "nothing" if value is None else number(value)
        return text if mean in (None, value) else f"{text}, mean {number(mean or 0.0)}"

    parts.append(_readings(frame, steps, told))
    ends = [number(v) for v in (means[0], means[-1]) if v is not None]
    return _svg(parts, f"{name}, {unit}: {' to '.join(ends)}"), _outside(frame, known)


def bars(
    steps: Sequence[int], layers: Sequence[Sequence[float]], *, names: Sequence[str], unit: str
) -> tuple[str, str]:
    """Up to three series stacked; a bar is the mean of the steps that share its place.

    Args:
        steps: increasing, at least one.
        layers: each as long as `steps`, from 0 upwards.

    Returns:
        As `curve`.
    """
    cuts = [*_starts(len(steps), MOST_READ), len(steps)]
    means = [[sum(row[a:b]) / (b - a) for a, b in pairwise(cuts)] for row in layers]
    tops = list(accumulate(means, lambda low, row: [a + b for a, b in zip(low, row, strict=True)]))
    frame = _frame(steps, *_usual(tops[-1], tail=0.05))
    width = (RIGHT - LEFT) / (len(cuts) - 1)
    parts = [_axes(frame, unit)]
    for k in reversed(range(len(tops))):  # the tallest first, the lower ones before it
        path = "".join(
            f"M{LEFT + j * width:.1f} {BOTTOM}V{frame.y(top):.1f}h{width:.1f}V{BOTTOM}z"
            for j, top in enumerate(tops[k])
        )
        parts.append(f'<path class="bar{k}" d="{path}"/>')
    rows = list(zip(*means, strict=True))

    def told(i: int) -> str:
        j = next(j for j, (a, b) in enumerate(pairwise(cuts)) if a <= i < b)
        return " + ".join(map(number, rows[j]))

    parts.append(_readings(frame, steps, told))
    return _svg(parts, f"{', '.join(names)}, {unit}, stacked"), _outside(frame, tops[-1])


def points(
    steps: Sequence[int], values: Sequence[float], lows: Values, highs: Values, *, name: str
) -> str:
    """A few measured values, each with its interval where it is known.

    Args:
        steps: increasing, at least one.
        values: finite.
        lows, highs: ends of the intervals, None where there is none.
    """
    ends = [v for v in (*values, *lows, *highs) if v is not None]
    share = min(ends) >= 0 and max(ends) <= 1
    frame = _frame(steps, min(ends), 1.0 if share else max(ends))
    parts = [_axes(frame, ""), _line("line", frame, list(_pairs(steps, values)))]
    for step, value, low, high in zip(steps, values, lows, highs, strict=True):
        if low is not None and high is not None:
            x = frame.x(step)
            drawn = f"M{x - 3:.1f} {frame.y(low):.1f}h6m-3 0V{frame.y(high):.1f}m-3 0h6"
            parts.append(f'<path class="line" d="{drawn}"/>')
        parts.append(_dot(frame, step, value))

    def told(i: int) -> str:
        low, high = lows[i], highs[i]
        between = "" if low is None or high is None else f" ({number(low)} to {number(high)})"
        return number(values[i]) + between

    parts.append(_readings(frame, steps, told))
    return _svg(parts, f"{name}: {number(values[0])} to {number(values[-1])}")


# -- numbers -------------------------------------------------------------------------------------


def smooth(values: Values) -> list[float | None]:
    """The mean of the known values around each, over about a twentieth of all; None where none is.

    >>> smooth([1.0, None, 3.0])
    [1.0, None, 3.0]
    """
    reach = len(values) // SMOOTHED_FROM
    sums = [0.0, *accumulate(v or 0.0 for v in values)]
    counts = [0, *accumulate(v is not None for v in values)]
    found: list[float | None] = []
    for i, value in enumerate(values):
        a, b = max(0, i - reach), min(len(values), i + reach + 1)
        n = counts[b] - counts[a]
        found.append(value if not reach else (sums[b] - sums[a]) / n if n else None)
    return found


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers a step of 1, 2 or 5 apart, the first and last at or beyond the ends.

    >>> ticks(0.1, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    a, b = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, places) + 0.0 for k in range(a, b + 1)]


def number(value: float) -> str:
    """Three digits, for a person.

    >>> number(0.01234), number(12345.6), number(-0.0)
    ('0.0123', '12,346', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"


def _usual(known: Sequence[float], tail: float = 0.01) -> tuple[float, float]:
    """The range of 0 and all values, or of all but the utmost ones if these make it thrice as wide.

    Args:
        tail: share of the values at each end that may be left out.
    """
    ordered = sorted(known)
    cut = math.ceil(tail * len(ordered)) if len(ordered) >= 20 else 0
    low, high = min(ordered[cut], 0.0), max(ordered[-1 - cut], 0.0)
    whole = min(ordered[0], 0.0), max(ordered[-1], 0.0)
    return (low, high) if 3 * (high - low) < whole[1] - whole[0] and high > low else whole


def _outside(frame: _Frame, known: Sequence[float]) -> str:
    found = [v for v in known if not frame.low <= v <= frame.high]
    low, high = (number(end(found, default=0.0)) for end in (min, max))
    between = f"at {low}" if low == high else f"from {low} to {high}"
    return f"{len(found)} outside the frame, {between}" if found else ""


def _starts(n: int, most: int) -> list[int]:
    """Where up to `most` even parts of `n` places start."""
    parts = min(n, most)
    return [i * n // parts for i in range(parts)]


def _middles(n: int, most: int) -> list[int]:
    """A place of each of up to `most` even parts, the very first and the very last among them."""
    inner = [(a + b) // 2 for a, b in pairwise([*_starts(n, most), n])]
    return list(dict.fromkeys([0, *inner, n - 1]))


def _pairs(steps: Sequence[int], values: Values) -> zip[tuple[int, float | None]]:
    return zip(steps, values, strict=True)


def _extremes(steps: Sequence[int], values: Values) -> list[tuple[int, float | None]]:
    """The least and the largest value of each of up to `MOST` parts, so that no spike is lost."""
    found: list[tuple[int, float | None]] = []
    for a, b in pairwise([*_starts(len(steps), MOST), len(steps)]):
        known = sorted((v, i) for i, v in enumerate(values[a:b], a) if v is not None)
        if not known:
            found.append((steps[a], None))
        for v, i in sorted({known[0], known[-1]} if known else (), key=lambda one: one[1]):
            found.append((steps[i], v))
    return found


# -- drawing -------------------------------------------------------------------------------------


def _frame(steps: Sequence[int], low: float, high: float) -> _Frame:
    """Zero is always in it."""
    low, high = min(low, 0.0), max(high, 0.0)
    marks = ticks(low, high if high > low else 1.0)
    first, last = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)
    return _Frame(first, last, marks[0], marks[-1])


def _axes(frame: _Frame, unit: str) -> str:
    marks = ticks(frame.low, frame.high)
    rungs = [
        f'<path class="{"grid" if mark else "zero"}" d="M{LEFT} {frame.y(mark):.1f}H{RIGHT}"/>'
        f'<text class="soft" x="{LEFT - 6}" y="{frame.y(mark) + 4:.1f}" text-anchor="end">'
        f"{_short(mark)}</text>"
        for mark in marks
    ]
    stops = [
        f'<text class="soft" x="{frame.x(mark):.1f}" y="{BOTTOM + 16}" text-anchor="middle">'
        f"{_short(mark)}</text>"
        for mark in ticks(frame.first, frame.last, whole=True)
        if frame.first <= mark <= frame.last
    ]
    named = f'<text class="soft" x="{(LEFT + RIGHT) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">step</text>'
    return f'<text class="soft" y="12">{prose(unit)}</text>' + "".join([*rungs, *stops, named])


def _short(mark: float) -> str:
    """A round number in a few characters.

    >>> _short(0.002), _short(-0.00012), _short(0.05), _short(2500.0), _short(12000.0)
    ('2e-3', '-1.2e-4', '0.05', '2500', '12k')
    """
    if 0 < abs(mark) < 0.01:
        return f"{mark:.1e}".replace(".0e", "e").replace("e-0", "e-")
    if abs(mark) >= 1e6:
        return f"{mark / 1e6:g}M"
    return f"{mark / 1e3:g}k" if abs(mark) >= 1e4 else f"{mark:g}"


def _line(kind: str, frame: _Frame, places: Sequence[tuple[int, float | None]]) -> str:
    """Broken where there is no value."""
    drawn, pen = [], "M"
    for step, value in places:
        if value is None:
            pen = "M"
            continue
        drawn.append(f"{pen}{frame.x(step):.1f} {frame.y(value):.1f}")
        pen = "L" if pen == "M" else " "
    return f'<path class="{kind}" d="{"".join(drawn)}"/>'


def _dot(frame: _Frame, step: float, value: float) -> str:
    return f'<circle class="dot" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="3.5"/>'


def _readings(frame: _Frame, steps: Sequence[int], told: Callable[[int], str]) -> str:
    """Strips to point at; each shows what `told` says of its step."""
    shown = _middles(len(steps), MOST_READ)
    middles = [(frame.x(steps[a]) + frame.x(steps[b])) / 2 for a, b in pairwise(shown)]
    strips = pairwise([LEFT, *middles, RIGHT])
    return "".join(
        f'<g class="at"><rect x="{a:.1f}" y="0" width="{b - a:.1f}" height="{HEIGHT}"/>'
        f'<g><path d="M{frame.x(steps[i]):.1f} {TOP}V{BOTTOM}"/>'
        f'<text x="{RIGHT}" y="12" text-anchor="end">step {steps[i]:,}: {told(i)}</text></g></g>'
        for i, (a, b) in zip(shown, strips, strict=True)
    )


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{prose(label)}">{"".join(parts)}</svg>'
    )
