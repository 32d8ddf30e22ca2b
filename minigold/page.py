# SPDX-License-Identifier: Apache-2.0
"""An alignment in, one self-contained HTML page out: `picture.py` for a browser.

Each chunk is a block with the tokens of both sides; its sheet (see `markup.py`) has their bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from minigold.compare import SIDES, Alignment, Chunk, Token, kind
from minigold.markup import document, spelled, token_html
from minigold.offsets import EXACT, FLAWS
from minigold.picture import (
    BORDERS,
    KINDS,
    NOTHING,
    REASONS,
    legend,
    note,
    of_chunks,
    summary,
)

__all__ = ["page"]

_STYLE = """
:root { --teacher: #cfe4ff; --student: #ffe0b8; --both: #e6d3ff; }
@media screen and (prefers-color-scheme: dark) {
  :root { --teacher: #173f68; --student: #5c3a0c; --both: #47296b; } }
.teacher { background: var(--teacher); } .student { background: var(--student); }
.both { background: var(--both); }
.teacher i, .student i, .both i { color: inherit; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem .8rem; margin: .5rem 0; }
dt { font-family: ui-monospace, monospace; } dd { margin: 0; }
dt > span { display: inline-block; width: 2.5rem; height: 1.2rem; vertical-align: middle;
  border: 1px solid var(--line); background: var(--one); }
dt > .teacher { background: var(--teacher); } dt > .student { background: var(--student); }
dt > .both { background: var(--both); }
"""


def page(alignment: Alignment, told: Mapping[str, Any]) -> str:
    """The page of an alignment and of its `picture.figures`; all text in it is escaped."""
    names = [spelled(told[side]["name"]) for side in SIDES]
    return document(
        f"Alignment of {names[0]} and {names[1]}",
        _STYLE,
        [
            "<h1>One text, two tokenizations</h1>",
            (
                f"<p>Above <b>{names[0]}</b>, the student; below <b>{names[1]}</b>, the teacher. A solid "
                "line is a place where both end a token; what lies between two such lines is a chunk. A "
                "dotted line is the end of a token on one side alone.</p>"
            ),
            (
                '<p class="soft">Point at a chunk, tap it, or go to it with the tab key: its bytes and '
                "ids appear at the lower edge.</p>"
            ),
            f'<ol class="chunks">\n{_chunks(alignment)}</ol>',
            f"<h2>Signs</h2>\n<dl>{_signs(alignment)}</dl>",
            f"<h2>Figures</h2>\n{_figures(told)}",
        ],
    )


def _chunks(alignment: Alignment) -> str:
    if not alignment.chunks:
        return f"<li>{NOTHING} no tokens: the text is empty</li>\n"
    parts = []
    for chunk in alignment.chunks:
        sides = alignment.student[chunk.s0 : chunk.s1], alignment.teacher[chunk.t0 : chunk.t1]
        rows = "".join(
            f'<span class="row"><span class="told">{side}: </span>{_row(tokens)}</span>'
            for side, tokens in zip(SIDES, sides, strict=True)
        )
        why = f'<span class="note">{note(chunk)}</span>' if chunk.flaw != EXACT else ""
        parts.append(
            f'<li><div class="chunk {kind(chunk)}" tabindex="0">{rows}{why}'
            f'<div class="sheet">{_sheet(chunk, sides)}</div></div></li>\n'
        )
        if any(tokens and tokens[-1].data.endswith(b"\n") for tokens in sides):
            parts.append('<li class="end" aria-hidden="true"></li>\n')
    return "".join(parts)


def _row(tokens: Sequence[Token]) -> str:
    if not tokens:
        return f"<bdi><i>{NOTHING}</i></bdi>"
    return "".join(f"<bdi>{token_html(token)}</bdi>" for token in tokens)


def _sheet(chunk: Chunk, sides: tuple[Sequence[Token], Sequence[Token]]) -> str:
    """What a chunk is made of."""
    told = f"Bytes {chunk.start} to {chunk.end} ({chunk.end - chunk.start}): {KINDS[kind(chunk)]}"
    if chunk.flaw != EXACT:
        told += f", {FLAWS[chunk.flaw]}: {REASONS[chunk.flaw]}"
    rows = [
        f"<tr><th>{label if i == 0 else ''}<td>{token.id}<td><code>{token_html(token)}</code>"
        f"<td><code>{token.data.hex(' ') or NOTHING}</code>"
        for label, tokens in zip(SIDES, sides, strict=True)
        for i, token in enumerate(tokens)
    ]
    head = "<tr><th>side<th>id<th>token<th>bytes"
    return f"{told}.<table>{head}{''.join(rows)}</table>"


def _signs(alignment: Alignment) -> str:
    kinds = {kind(chunk) for chunk in alignment.chunks} - {"flawed"}
    coloured = [
        f'<dt><span class="{k}"></span></dt><dd>{text}</dd>'
        for k, text in KINDS.items()
        if k in kinds
    ]
    signs = [
        f"<dt>{escape(sign)}</dt><dd>{escape(text)}</dd>"
        for sign, text in legend(alignment)
        if sign not in BORDERS  # drawn as lines here
    ]
    return "".join(coloured + signs)


def _figures(told: Mapping[str, Any]) -> str:
    (_, *heads), *rows = ([spelled(cell) for cell in row] for row in summary(told))
    head = "".join(f'<th scope="col">{cell}' for cell in heads)
    body = "".join(f'<tr><th scope="row">{row[0]}<td>{row[1]}<td>{row[2]}' for row in rows)
    return f"<table><tr><td>{head}{body}</table>\n<p>{of_chunks(told)}</p>"
