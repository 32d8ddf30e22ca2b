# SPDX-License-Identifier: Apache-2.0
"""The page of `minigold align`: what stands in it, and, marked `browser`, how Chromium shows it."""

import re
import time
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

import browser as browsers
from browser import Tab, browser
from minigold.compare import SIDES, Alignment, Chunk, Lexicon, Token, aligned, figures, lexicon
from minigold.offsets import BROKEN, EXACT, FLAWS, UNKNOWN
from minigold.page import page
from minigold.picture import REASONS, glyphs
from strategies import texts
from tokenizers_for_tests import FAMILIES

STUDENT = lexicon('a <b> "c" \u202e\x00', FAMILIES["byte_bpe"]())
TEACHER = lexicon("teacher", FAMILIES["unigram"]())
VOID = {"meta", "br"}
OPTIONAL = {"th", "td", "tr"}  # whose ends may be left out
HARD = (
    "The quick fox's internals\n\tcafé\n<script>alert(1)</script> \"q\" 'q' &amp; \x00\x1b\u2028\u202e"
    "مرحبا שלום 🙂 👩‍👩‍👧 你好 " + " " * 120 + "a" * 200 + "日"
)


def drawn(found: Alignment, *, student: Lexicon = STUDENT, teacher: Lexicon = TEACHER) -> str:
    return page(found, figures(found, student, teacher, mass=(0.5, None)))


class Reader(HTMLParser):
    """Rows of tokens and all text of a page; complains where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)
        if dict(attrs).get("class") == "row":
            self.rows.append([])
        if tag == "bdi":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "bdi" in self.open:
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.text += data


# ---------------------------------------------------------------------------------- what stands in it
@given(texts())
def test_all_tokens_stand_in_it_as_text(text: str) -> None:
    found = aligned(STUDENT, TEACHER, text)
    html = drawn(found)
    reader = Reader(html)
    expected = [
        ["".join(g.text for g in glyphs(one)) for one in tokens] or ["∅"]
        for c in found.chunks
        for tokens in (found.student[c.s0 : c.s1], found.teacher[c.t0 : c.t1])
    ]
    assert reader.rows == expected
    assert {tag for tag, _ in reader.tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "b", "ol", "li",
        "div", "span", "bdi", "i", "table", "tr", "th", "td", "code", "dl", "dt", "dd",
    }  # fmt: skip
    for _, attributes in reader.tags:
        assert set(attributes) <= {"lang", "charset", "name", "content", "class", "tabindex",
                                   "aria-hidden", "scope"}  # fmt: skip
    tags = "|".join({tag for tag, _ in reader.tags})
    assert re.findall(rf"<(?!/?(?:{tags})[ >]|!doctype html>)", html) == []
    assert re.findall(r"&(?!(?:lt|gt|amp|quot|#x27);)", html) == []
    bad = [c for c in html if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\n"]
    assert bad == []


def test_the_frame_of_a_page() -> None:
    html = drawn(aligned(STUDENT, TEACHER, "the fox"))
    assert html.startswith('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    title = re.search("<title>(.*)</title>", html)
    assert title is not None
    assert title[1] == ("Alignment of a &lt;b&gt; &quot;c&quot; ‹U+202E›␀ and teacher")
    assert re.findall(r"https?:|url\(|@import|<script|<link|src=|href=|\bon\w+=", html) == []


def test_figures_and_reasons_stand_in_it() -> None:
    found = aligned(STUDENT, TEACHER, "the ï 日")
    reader = Reader(drawn(found))
    text = " ".join(reader.text.split())
    told = figures(found, STUDENT, TEACHER, mass=(0.5, None))
    for side in SIDES:
        assert f"{told[side]['text_ids']:,}" in text
        assert f"{told[side]['shared_id_share']:.3f}" in text
    assert "mass on them0.500-" in text
    assert f"{len(found.chunks)} chunks" in text
    assert "✗ unknown" in text
    assert f"not scorable, {FLAWS[UNKNOWN]}: {REASONS[UNKNOWN]}." in text
    assert [f"Bytes {c.start} to {c.end} " in text for c in found.chunks] == [True] * len(
        found.chunks
    )
    for one in (*found.student, *found.teacher):
        assert str(one.id) in text


def test_an_empty_text_has_a_page_too() -> None:
    text = Reader(drawn(aligned(STUDENT, TEACHER, ""))).text
    assert "no tokens: the text is empty" in text
    assert "No chunks." in text


def test_a_side_without_tokens_has_a_sign() -> None:
    end = STUDENT.tokenizer.token_to_id("<|im_end|>")
    assert Reader(drawn(aligned(STUDENT, TEACHER, [end]))).rows == [["<|im_end|>"], ["∅"]]


# ------------------------------------------------------------------------------------ in a browser
def test_without_chromium_the_tests_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsers.shutil, "which", lambda _name: None)
    with pytest.raises(FileNotFoundError, match="install the Debian package chromium"), browser():
        pass


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of chunk."""
    student, ids = STUDENT, STUDENT.tokenizer.encode(HARD).ids
    broken = student.tokenizer.token_to_id("ð")
    found = aligned(student, TEACHER, [*ids[:8], broken, *ids[8:]])
    assert {BROKEN, UNKNOWN} <= {c.flaw for c in found.chunks}
    n, m, end = len(found.student), len(found.teacher), len(found.text.encode())
    long = Token(1, end, end + 300, EXACT, b"long" * 75, "long" * 75)
    found = Alignment(
        found.text + "long" * 75,
        (*found.student, long),
        (*found.teacher, *[Token(2, end, end + 4, EXACT, b"long", "long")] * 75),
        (*found.chunks, Chunk(n, n + 1, m, m + 75, end, end + 300, EXACT)),
    )
    path = tmp_path_factory.mktemp("page") / "hard.html"
    student = Lexicon("name" * 50, student.tokenizer, student.vocabulary)
    path.write_text(drawn(found, student=student), "utf-8")
    return path


CONTRASTS = """(() => {
  const rgb = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const light = c => { const [r, g, b] = c.map(v => { v /= 255;
    return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b; };
  const worst = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim()) continue;
    const paper = [];
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      const found = (style.backgroundImage.match(/rgba?\\([^)]*\\)/g) || [style.backgroundColor])
        .map(rgb).filter(c => c[3]);
      if (found.length) { paper.push(...found); break; }
    }
    const ink = light(rgb(getComputedStyle(element).color));
    for (const c of paper) {
      const [a, b] = [ink, light(c)].sort((x, y) => y - x);
      const key = element.tagName + '.' + element.className;
      worst[key] = Math.min(worst[key] ?? 99, (a + .05) / (b + .05));
    }
  }
  return worst; })()"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 360, 800, 1600])
def test_the_page_never_scrolls_sideways(tab: Tab, hard: Path, width: int) -> None:
    tab.open(hard, width=width)
    size = tab.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert size == [width, width]
    right = tab.value("Math.max(...[...document.querySelectorAll('.chunks *')].filter("
                      "e => e.className != 'told').map(e => e.getBoundingClientRect().right))")  # fmt: skip
    assert right <= width


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_has_enough_contrast(tab: Tab, hard: Path, dark: bool) -> None:
    tab.open(hard, dark=dark)
    paper = tab.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(22, 22, 22)" if dark else "rgb(255, 255, 255)")
    worst = tab.value(CONTRASTS)
    assert len(worst) >= 8
    assert {key: ratio for key, ratio in worst.items() if ratio < 4.5} == {}


def sheets(tab: Tab) -> list[int]:
    """The chunks whose sheet is to be seen."""
    found: list[int] = tab.value(
        "[...document.querySelectorAll('.sheet')].map((e, i) => e.checkVisibility() ? i : -1)"
        ".filter(i => i >= 0)"
    )
    return found


def middle(tab: Tab, chunk: int) -> dict[str, float]:
    x, y = tab.value(
        f"(() => {{ const r = document.querySelectorAll('.chunk .row')[{2 * chunk}]"
        ".getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()"
    )
    return {"x": x, "y": y}


@pytest.mark.browser
def test_a_chunk_tells_more_when_pointed_at(tab: Tab, hard: Path) -> None:
    tab.open(hard)
    assert sheets(tab) == []
    for chunk in (3, 1):
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", **middle(tab, chunk))
        assert sheets(tab) == [chunk]
    box: dict[str, Any] = tab.value(
        "document.querySelectorAll('.sheet')[1].getBoundingClientRect().toJSON()"
    )
    assert (box["left"], box["right"], box["bottom"]) == (0, 1000, 800)
    assert box["height"] < 400
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=900, y=10)
    assert sheets(tab) == []


@pytest.mark.browser
def test_a_chunk_tells_more_when_tapped(tab: Tab, hard: Path) -> None:
    tab.open(hard, width=360)
    for chunk in (0, 2):
        point = middle(tab, chunk)
        tab.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        tab.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        for _ in range(100):  # a tap is told from a gesture after a moment
            if sheets(tab) == [chunk]:
                break
            time.sleep(0.05)
        assert sheets(tab) == [chunk]


@pytest.mark.browser
def test_the_tab_key_goes_through_the_chunks(tab: Tab, hard: Path) -> None:
    tab.open(hard)
    for chunk in range(3):
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab",
                     windowsVirtualKeyCode=9)  # fmt: skip
        assert sheets(tab) == [chunk]
        outline = tab.value("getComputedStyle(document.activeElement).outlineWidth")
        assert outline == "3px"


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
def test_both_rows_of_a_chunk_are_as_wide_and_hebrew_stays_inside(tab: Tab, hard: Path) -> None:
    tab.open(hard, width=1600)
    uneven = tab.value(
        "[...document.querySelectorAll('.chunk')].filter(e => { const [a, b] = "
        "[...e.querySelectorAll('.row')].map(r => r.getBoundingClientRect()); "
        "return Math.abs(a.width - b.width) > .1 || Math.abs(a.left - b.left) > .1 }).length"
    )
    assert uneven == 0
    backwards = tab.value(
        "(() => { const all = [...document.querySelectorAll('.chunk')].map("
        "e => e.getBoundingClientRect()); return all.filter((r, i) => i && "
        "Math.abs(r.top - all[i - 1].top) < 1 && r.left < all[i - 1].left).length })()"
    )
    assert backwards == 0
