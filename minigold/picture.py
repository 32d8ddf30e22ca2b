# SPDX-License-Identifier: Apache-2.0
"""An alignment in, two rows of tokens for a terminal out.

Where it stands: after `compare.py`; `page.py` draws the same for a browser. What enters: an
`Alignment` and its figures. What leaves: text, no wider than asked. What it does not do: print.

What a terminal shows must be what is there: nothing of the text may move the cursor, change the
order of the cells or have a width that terminals disagree about. Such characters are written as
their number, a token that holds part of a character as its bytes.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

from minigold.compare import SIDES, Alignment, Chunk, Token, kind
from minigold.offsets import BROKEN, CHANGED, CUT, EXACT, FLAWS, LOST, SPECIAL, UNKNOWN

__all__ = [
    "BORDERS",
    "KINDS",
    "NOTHING",
    "REASONS",
    "SHORTEST",
    "Glyph",
    "glyphs",
    "legend",
    "note",
    "of_chunks",
    "summary",
    "table",
    "terminal",
    "visible",
]

SHORTEST = 40  # columns of the narrowest picture
REASONS = {
    BROKEN: "bytes that are not UTF-8; the text has U+FFFD for them",
    SPECIAL: "a special token inside the text",
    UNKNOWN: "text that one tokenizer does not know",
    LOST: "bytes that one tokenizer has no token for",
    CHANGED: "text that one tokenizer's normalizer rewrites",
    CUT: "the text may go on here",
}
KINDS = {
    "one": "one token on each side",
    "teacher": "the teacher has more tokens",
    "student": "the student has more tokens",
    "both": "both have several tokens",
    "flawed": "not scorable",
}

_LABELS = "student ", "teacher "
_MORE, _FLAWED, NOTHING, _CARRIER = "…✗∅◌"
_BORDER, _INNER = BORDERS = "│", "┊"
_ISOLATE, _END_ISOLATE = "\u2066", "\u2069"
_RIGHT_TO_LEFT = "R", "AL", "AN"
_ASCII = str.maketrans("│┊…✗∅◌·⏎→‹›", "|:~x0o_$><>", _ISOLATE + _END_ISOLATE)
_RESET = "\x1b[0m"
_STYLES = {  # black on pastel, white on red: legible whatever colours the terminal has
    "one": "",
    "teacher": "\x1b[38;5;16;48;5;153m",
    "student": "\x1b[38;5;16;48;5;223m",
    "both": "\x1b[38;5;16;48;5;183m",
    "flawed": "\x1b[1;38;5;231;48;5;124m",
}


# -- what a token looks like -----------------------------------------------------------------------


class Glyph(NamedTuple):
    """A character with its marks, or a sign that stands for something; width in columns."""

    text: str
    width: int
    sign: bool = False


_BETWEEN = Glyph(_INNER, 1, sign=True)
_LINE_END = Glyph("⏎", 1, sign=True)


def glyphs(token: Token, *, ascii_only: bool = False) -> list[Glyph]:
    """What is drawn for a token: its bytes as text where they are, its name if it has none."""
    if not token.data:
        named = [visible(c, ascii_only) for c in token.name or NOTHING]
        return [Glyph(one.text, one.width, sign=True) for one in named]
    drawn: list[Glyph] = []
    raw: list[int] = []
    for c in [*token.data.decode("utf-8", errors="surrogateescape"), ""]:
        if "\udc80" <= c <= "\udcff":  # a byte that is no character
            raw.append(ord(c) - 0xDC00)
            continue
        for i, byte in enumerate(raw):
            text = f"{' ' if i else '‹'}{byte:02X}{'›' if i == len(raw) - 1 else ''}"
            drawn.append(Glyph(text, len(text), sign=True))
        raw.clear()
        if c and _is_mark(c) and not (ascii_only or _escaped(c)):
            base = drawn.pop() if drawn and not drawn[-1].sign else Glyph(_CARRIER, 1)
            drawn.append(Glyph(base.text + c, base.width))
        elif c:
            drawn.append(visible(c, ascii_only))
    return drawn


def visible(c: str, ascii_only: bool = False) -> Glyph:
    """What is drawn for one character."""
    if c in " \n\t":
        return Glyph({" ": "·", "\n": "⏎", "\t": "→"}[c], 1, sign=True)
    if (c < " " or c == "\x7f") and not ascii_only:
        return Glyph(chr(0x2400 + ord(c)) if c < " " else "\u2421", 1, sign=True)
    if _escaped(c) or (ascii_only and not c.isascii()):
        return _number(c)
    if _is_mark(c):
        return Glyph(_CARRIER + c, 1)
    return Glyph(c, 2 if unicodedata.east_asian_width(c) in "WF" else 1)


def _number(c: str) -> Glyph:
    text = f"‹U+{ord(c):04X}›"
    return Glyph(text, len(text), sign=True)


def _is_mark(c: str) -> bool:
    """Whether it is drawn over the letter before it and takes no column."""
    return unicodedata.category(c) in ("Mn", "Me")


def _escaped(c: str) -> bool:
    """Whether it would be invisible, act on its neighbours, or have a width one cannot rely on.

    Controls, format characters (bidi controls and joiners among them), unassigned and private ones,
    spaces other than U+0020; variation selectors, skin tones, flags' letters, Hangul jamo that join.
    """
    code = ord(c)
    return (
        unicodedata.category(c) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")
        or 0xFE00 <= code <= 0xFE0F
        or 0xE0100 <= code <= 0xE01EF
        or 0x1F3FB <= code <= 0x1F3FF
        or 0x1F1E6 <= code <= 0x1F1FF
        or 0x115F <= code <= 0x11FF
        or 0xD7B0 <= code <= 0xD7FB
        or code in (0x20E3, 0x3164, 0xFFA0)
    )


# -- the picture -----------------------------------------------------------------------------------


class _Cell(NamedTuple):
    """A chunk, or as much of it as fits on a line."""

    kind: str
    rows: tuple[list[Glyph], list[Glyph]]  # student, teacher
    note: str
    width: int
    before: str  # the borders at its sides
    after: str
    ends_line: bool  # the text has a line end here


def terminal(
    alignment: Alignment, *, width: int = 80, colour: bool = False, ascii_only: bool = False
) -> str:
    """Both rows of tokens, chunk by chunk, and a legend of what occurs in them.

    Args:
        width: columns; at least 40 are used.
        colour: with escape sequences for 256 colours; without, there are none at all.
        ascii_only: for an output that has no other characters.
    """
    width = max(width, SHORTEST)
    room = width - len(_LABELS[0]) - 2
    cells = [c for chunk in alignment.chunks for c in _cells(alignment, chunk, room, ascii_only)]
    blocks = [_block(line, colour) for line in _lines(cells, room)]
    entries = [(f"{sign} {meaning}", "") for sign, meaning in legend(alignment)]
    if colour:
        kinds = {kind(chunk) for chunk in alignment.chunks} - {"one"}
        entries += [(f" {KINDS[k]} ", _STYLES[k]) for k in KINDS if k in kinds]
    text = "\n\n".join([*blocks, _packed(entries, width)]) + "\n"
    return text.translate(_ASCII) if ascii_only else text


def note(chunk: Chunk) -> str:
    """Why a chunk is not scorable, in two words that stand under it; "" if it is."""
    return "" if chunk.flaw == EXACT else f"{_FLAWED} {FLAWS[chunk.flaw].split()[0]}"


def legend(alignment: Alignment) -> list[tuple[str, str]]:
    """The signs that occur in the picture, and what they say."""
    if not alignment.chunks:
        return [(NOTHING, "no tokens: the text is empty")]
    tokens = (*alignment.student, *alignment.teacher)
    drawn = [g for token in tokens if token.data for g in glyphs(token)]
    signs = {g.text for g in drawn if g.sign}
    told = [
        (_BORDER, "both sides end a token", True),
        (_INNER, "only this side does", any(kind(c) != "one" for c in alignment.chunks)),
        ("·", "space", "·" in signs),
        ("⏎", "line end", "⏎" in signs),
        ("→", "tab", "→" in signs),
        (
            "‹F0 9F›",
            "bytes of part of a character",
            any(s[0] == "‹" and s[1] != "U" for s in signs),
        ),
        ("‹U+200D›", "a character by its number", any(s.startswith("‹U") for s in signs)),
        (_CARRIER, "holds a mark of the letter before", any(g.text[0] == _CARRIER for g in drawn)),
        (NOTHING, "no token", any(c.s0 == c.s1 or c.t0 == c.t1 for c in alignment.chunks)),
    ]
    flaws = Counter(c.flaw for c in alignment.chunks if c.flaw != EXACT)
    reasons = [
        (f"{_FLAWED} {FLAWS[flaw].split()[0]}", f"not scorable ({n}): {REASONS[flaw]}")
        for flaw, n in sorted(flaws.items())
    ]
    return [(sign, meaning) for sign, meaning, occurs in told if occurs] + reasons


def summary(told: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of a table of `figures`: what, student, teacher."""

    def row(label: str, key: str, pattern: str) -> tuple[str, str, str]:
        values = [told[side][key] for side in SIDES]
        student, teacher = ("-" if v is None else pattern.format(v) for v in values)
        return label, student, teacher

    rows = [
        ("", "student", "teacher"),
        row("", "name", "{}"),
        row("tokens", "tokens", "{:,}"),
        row("bytes a token", "bytes_per_token", "{:.2f}"),
        row("text ids", "text_ids", "{:,}"),
        row("ids both have", "shared_id_share", "{:.3f}"),
    ]
    if told["student"]["shared_mass"] is None and told["teacher"]["shared_mass"] is None:
        return rows
    return [*rows, row("mass on them", "shared_mass", "{:.3f}")]


def of_chunks(told: Mapping[str, Any]) -> str:
    """The rest of `figures` in a sentence."""
    longest, unscorable = told["longest_chunk"], sum(told["unscorable"].values())
    if not longest:
        return "No chunks."
    return (
        f"{told['chunks']:,} chunks, {told['one_to_one']:,} of them one token on each side "
        f"({told['one_to_one_share']:.3f}), {unscorable:,} not scorable. The longest has "
        f"{longest['bytes']:,} bytes: {longest['student_tokens']:,} student and "
        f"{longest['teacher_tokens']:,} teacher tokens."
    )


def table(told: Mapping[str, Any], *, width: int = 80) -> str:
    """The figures as lines for a person, none wider than `width` (at least 40) columns."""
    width = max(width, SHORTEST)
    rows = summary(told)
    column = min(max(10, *(len(v) + 2 for row in rows for v in row[1:])), (width - 16) // 2)
    lines = [
        f"{label:<16}" + "".join(f"{_short(v, column - 1):>{column}}" for v in values)
        for label, *values in rows
    ]
    return "\n".join([*lines, "", *textwrap.wrap(of_chunks(told), width)]) + "\n"


def _short(name: str, room: int) -> str:
    """A name of any characters in so many columns."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in name)
    return plain if len(plain) <= room else plain[: room - 2] + ".."


def _cells(alignment: Alignment, chunk: Chunk, room: int, ascii_only: bool) -> Iterator[_Cell]:
    """One cell, or several where the chunk is wider than a line."""
    rows = [
        _row(side[first:stop], ascii_only)
        for side, first, stop in (
            (alignment.student, chunk.s0, chunk.s1),
            (alignment.teacher, chunk.t0, chunk.t1),
        )
    ]
    parts = list(zip_longest(*(_pieces(row, room) for row in rows), fillvalue=[]))
    ends_line = any(row[-1] == _LINE_END for row in rows)
    for i, (student, teacher) in enumerate(parts):
        last = i == len(parts) - 1
        told = note(chunk) if i == 0 else ""
        yield _Cell(
            kind(chunk),
            (student, teacher),
            told,
            max(_width(student), _width(teacher), len(told)),
            _MORE if i else _BORDER,
            _BORDER if last else _MORE,
            last and ends_line,
        )


def _row(tokens: Sequence[Token], ascii_only: bool) -> list[Glyph]:
    drawn = [g for token in tokens for g in (_BETWEEN, *glyphs(token, ascii_only=ascii_only))]
    return drawn[1:] or [Glyph(NOTHING, 1, sign=True)]


def _pieces(row: Sequence[Glyph], room: int) -> list[list[Glyph]]:
    pieces: list[list[Glyph]] = [[]]
    for glyph in row:
        if _width(pieces[-1]) + glyph.width > room:
            pieces.append([])
        pieces[-1].append(glyph)
    return pieces


def _width(row: Sequence[Glyph]) -> int:
    return sum(glyph.width for glyph in row)


def _lines(cells: Sequence[_Cell], room: int) -> list[list[_Cell]]:
    lines: list[list[_Cell]] = []
    used, full = 0, True
    for cell in cells:
        if full or used + 1 + cell.width > room:
            lines.append([])
            used = -1
        lines[-1].append(cell)
        used += 1 + cell.width
        full = cell.ends_line
    return lines


def _block(line: Sequence[_Cell], colour: bool) -> str:
    rows = []
    for side, label in enumerate(_LABELS):
        drawn = [_painted(cell, cell.rows[side], colour) + cell.after for cell in line]
        rows.append(label + line[0].before + "".join(drawn))
    if any(cell.note for cell in line):
        notes = "".join(f" {cell.note:<{cell.width}}" for cell in line)
        rows.append((" " * len(_LABELS[0]) + notes).rstrip())
    return "\n".join(rows)


def _painted(cell: _Cell, row: Sequence[Glyph], colour: bool) -> str:
    """A side's part of a cell, as wide as the cell."""
    text = ""
    for between, group in groupby(row, lambda glyph: glyph is _BETWEEN):
        token = list(group)
        drawn = "".join(_dim(g) if colour and cell.kind == "one" else g.text for g in token)
        turned = any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for g in token for c in g.text)
        text += _ISOLATE + drawn + _END_ISOLATE if turned and not between else drawn
    text += " " * (cell.width - _width(row))
    style = _STYLES[cell.kind] if colour else ""
    return style + text + _RESET if style else text


def _dim(glyph: Glyph) -> str:
    return f"\x1b[2m{glyph.text}{_RESET}" if glyph.sign else glyph.text


def _packed(entries: Sequence[tuple[str, str]], width: int) -> str:
    """Entries (text, style) side by side as far as they fit, longer ones wrapped."""
    lines: list[str] = []
    used = width
    for text, style in entries:
        parts = [text] if len(text) <= width else textwrap.wrap(text, width)
        drawn = [style + part + _RESET if style else part for part in parts]
        if used + 3 + len(text) <= width:
            lines[-1] += "   " + drawn[0]
            used += 3 + len(text)
        else:
            lines.extend(drawn)
            used = len(parts[-1])
    return "\n".join(lines)
