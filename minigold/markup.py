# SPDX-License-Identifier: Apache-2.0
"""What the pages of `page.py` and `report.py` share: the frame, the style, text made harmless.

A page is one file: no script, no font and nothing else is fetched. A chunk is a block that wraps
with the line; pointing at it, or reaching it with a tap or the tab key, shows a sheet at the lower
edge.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from html import escape

from minigold.compare import Token
from minigold.picture import glyphs, visible

__all__ = ["document", "prose", "spelled", "token_html"]

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --soft: #5c5c5c; --line: #767676;
  --one: #f3f3f3; --flawed: #a30d1a; --flawed-ink: #fff; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #161616; --ink: #ececec; --soft: #b0b0b0; --line: #8c8c8c;
    --one: #272727; --flawed: #ffb3b3; --flawed-ink: #3a0006; } }
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
.chunk:focus { position: relative; z-index: 1; } .chunk:hover { position: relative; z-index: 2; }
.chunk:hover, .chunk:focus { outline: 3px solid var(--ink); outline-offset: 1px; }
.row { display: flex; flex-wrap: wrap; min-height: 1.8rem; }
.row + .row { border-top: 1px solid var(--line); }
.row > bdi { direction: ltr; white-space: pre-wrap; padding: .1rem .3rem; }
.row > bdi + bdi { border-left: 2px dotted var(--ink); }
.told { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.row i { font-style: normal; color: var(--soft); }
.flawed { border-color: var(--flawed); background: repeating-linear-gradient(135deg,
  var(--one) 0 6px, var(--paper) 6px 12px); }
.note { display: block; padding: 0 .3rem; background: var(--flawed); color: var(--flawed-ink);
  font: .8rem/1.5 system-ui, sans-serif; }
.sheet { display: none; position: fixed; inset: auto 0 0 0; z-index: 1; max-height: 42vh;
  overflow: auto; padding: .6rem 1rem; background: var(--paper); border-top: 3px solid var(--ink);
  cursor: auto; font: .9rem/1.4 system-ui, sans-serif; }
.chunk:focus .sheet { display: block; }
.chunk:hover .sheet { display: block; }
table { border-collapse: collapse; margin: .3rem auto .3rem 0; }
th, td { text-align: left; vertical-align: top; padding: .15rem .8rem .15rem 0; font-weight: normal; }
th { color: var(--soft); }
td { font-variant-numeric: tabular-nums; }
code { font: .95em ui-monospace, monospace; white-space: pre-wrap; }
"""


def document(title: str, style: str, body: Sequence[str]) -> str:
    """A whole page; the title and the body's parts are HTML already."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>\n</body>\n</html>\n",
        ]
    )


def spelled(text: str) -> str:
    """Any text as HTML: escaped, with what would be invisible or turn it around by its number."""
    return escape("".join(c if c == " " else visible(c).text for c in text))


def prose(text: str) -> str:
    """Text to be read, as HTML: lines stay lines, accents and emoji stay whole.

    Controls, and what would turn the text around, are shown by their number.
    """
    return escape("".join(c if _is_harmless(c) else visible(c).text for c in text))


def _is_harmless(c: str) -> bool:
    if c in "\n\t\u200c\u200d":  # the joiners are part of emoji and of Indic and Persian words
        return True
    return unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def token_html(token: Token) -> str:
    """A token as HTML; what stands for something else, as `·` for a space, is in <i>."""
    parts = [
        f"<i>{escape(one.text)}</i>" if one.sign else escape(one.text) for one in glyphs(token)
    ]
    return "".join(parts).replace("</i><i>", "")
