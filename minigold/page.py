# SPDX-License-Identifier: Apache-2.0
"""An alignment in, one self-contained HTML page out: `picture.py` for a browser.

No script, no font and nothing else is fetched. A chunk is a block that wraps with the line; pointing
at it, or reaching it with a tap or the tab key, shows its tokens in a sheet at the lower edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from minigold.compare import SIDES, Alignment, Chunk, Token, kind
from minigold.offsets import EXACT, FLAWS
from minigold.picture import (
    BORDERS,
    KINDS,
    NOTHING,
    REASONS,
    glyphs,
    legend,
    note,
    of_chunks,
    summary,
    visible,
)

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --soft: #5c5c5c; --line: #767676;
  --one: #f3f3f3; --teacher: #cfe4ff; --student: #ffe0b8; --both: #e6d3ff; --flawed: #a30d1a;
  --flawed-ink: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161616; --ink: #ececec; --soft: #b0b0b0; --line: #8c8c8c;
    --one: #272727; --teacher: #173f68; --student: #5c3a0c; --both: #47296b; --flawed: #ffb3b3;
    --flawed-ink: #3a0006; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 72rem; margin: auto; padding: 1rem 1rem 45vh; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft { color: var(--soft); }
.chunks { list-style: none; margin: 1rem 0; padding: 0; display: flex; flex-wrap: wrap;
  row-gap: .8rem; direction: ltr; font: 1rem/1.4 ui-monospace, monospace; }
.chunks > li { max-width: 100%; min-width: 0; }
.chunks > .end { flex-basis: 100%; height: 0; }
.chunk { display: block; background: var(--one); border-left: 2px solid var(--ink);
  border-right: 2px solid var(--ink); margin-right: -2px; cursor: help; }
.chunk:hover, .chunk:focus { outline: 3px solid var(--ink); outline-offset: 1px; }
.row { display: flex; flex-wrap: wrap; min-height: 1.8rem; }
.row + .row { border-top: 1px solid var(--line); }
.row > bdi { direction: ltr; white-space: pre-wrap; padding: .1rem .3rem; }
.row > bdi + bdi { border-left: 2px dotted var(--ink); }
.told { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.row i { font-style: normal; color: var(--soft); }
.teacher { background: var(--teacher); } .student { background: var(--student); }
.both { background: var(--both); }
.teacher i, .student i, .both i { color: inherit; }
.flawed { border-color: var(--flawed); background: repeating-linear-gradient(135deg,
  var(--one) 0 6px, var(--paper) 6px 12px); }
.note { display: block; padding: 0 .3rem; background: var(--flawed); color: var(--flawed-ink);
  font: .8rem/1.5 system-ui, sans-serif; }
.sheet { display: none; position: fixed; inset: auto 0 0 0; z-index: 1; max-height: 42vh;
  overflow: auto; padding: .6rem 1rem; background: var(--paper); border-top: 3px solid var(--ink);
  cursor: auto; font: .9rem/1.4 system-ui, sans-serif; }
.chunk:focus .sheet { display: block; }
.chunk:hover .sheet { display: block; z-index: 2; }
table { border-collapse: collapse; margin: .3rem auto .3rem 0; }
th, td { text-align: left; vertical-align: top; padding: .15rem .8rem .15rem 0; font-weight: normal; }
th { color: var(--soft); }
td { font-variant-numeric: tabular-nums; }
code { font: .95em ui-monospace, monospace; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem .8rem; margin: .5rem 0; }
dt { font-family: ui-monospace, monospace; } dd { margin: 0; }
dt > span { display: inline-block; width: 2.5rem; height: 1.2rem; vertical-align: middle;
  border: 1px solid var(--line); background: var(--one); }
dt > .teacher { background: var(--teacher); } dt > .student { background: var(--student); }
dt > .both { background: var(--both); }
"""


def page(alignment: Alignment, told: Mapping[str, Any]) -> str:
    """The page of an alignment and of its `picture.figures`; all text in it is escaped."""
    names = [_text(told[side]["name"]) for side in SIDES]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Alignment of {names[0]} and {names[1]}</title>",
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
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
            "</main>\n</body>\n</html>\n",
        ]
    )


def _text(text: str) -> str:
    """Any text as HTML: escaped, with what would be invisible or turn it around by its number."""
    return escape("".join(c if c == " " else visible(c).text for c in text))


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
    return "".join(f"<bdi>{_token(token)}</bdi>" for token in tokens)


def _token(token: Token) -> str:
    parts = [
        f"<i>{escape(one.text)}</i>" if one.sign else escape(one.text) for one in glyphs(token)
    ]
    return "".join(parts).replace("</i><i>", "")


def _sheet(chunk: Chunk, sides: tuple[Sequence[Token], Sequence[Token]]) -> str:
    """What a chunk is made of."""
    told = f"Bytes {chunk.start} to {chunk.end} ({chunk.end - chunk.start}): {KINDS[kind(chunk)]}"
    if chunk.flaw != EXACT:
        told += f", {FLAWS[chunk.flaw]}: {REASONS[chunk.flaw]}"
    rows = [
        f"<tr><th>{label if i == 0 else ''}<td>{token.id}<td><code>{_token(token)}</code>"
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
    (_, *heads), *rows = ([_text(cell) for cell in row] for row in summary(told))
    head = "".join(f'<th scope="col">{cell}' for cell in heads)
    body = "".join(f'<tr><th scope="row">{row[0]}<td>{row[1]}<td>{row[2]}' for row in rows)
    return f"<table><tr><td>{head}{body}</table>\n<p>{of_chunks(told)}</p>"
