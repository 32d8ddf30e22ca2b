# SPDX-License-Identifier: Apache-2.0
"""`minigold align`: its JSON, its picture in a terminal, its figures, and what it refuses."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigold.align import align
from minigold.cli import main
from minigold.compare import (
    Alignment,
    Chunk,
    Lexicon,
    Token,
    aligned,
    as_json,
    figures,
    kind,
    lexicon,
    shared_mass,
)
from minigold.data import write_whole
from minigold.load import load
from minigold.offsets import (
    BROKEN,
    CHANGED,
    EXACT,
    FLAWS,
    LOST,
    SPECIAL,
    UNKNOWN,
    spans_of_ids,
    spans_of_text,
)
from minigold.picture import KINDS, REASONS, SHORTEST, glyphs, legend, table, terminal
from real_models import real_folder
from strategies import bytes_pieces, id_lists, texts
from tiny_folders import tiny_folder
from tokenizers_for_tests import FAMILIES

DEMO = Path(__file__).parent.parent / "minigold" / "demo_data"
ESCAPE = re.compile(r"\x1b\[[\d;]*m")
NAMES = ("byte_bpe", "byte_bpe_lossy", "sentencepiece_bpe", "unigram", "wordpiece")
LEXICONS = {name: lexicon(name, FAMILIES[name]()) for name in NAMES}
pairs = st.sampled_from(list(product(NAMES, NAMES)))
GOLDEN_TEXT = "The quick fox's internals:\n\tcafé 🙂"
GOLDEN = """\
student │The │·┊qu│ic┊k│·fox│'│s│·internal┊s│:│⏎│
teacher │T┊he│·qu │ick │·fox│'│s│·internals │:│⏎│

student │→│ca│fé│·‹F0 9F›┊‹99›┊‹82›│
teacher │→│ca│fé│·🙂               │

│ both sides end a token   ┊ only this side does   · space
⏎ line end   → tab   ‹F0 9F› bytes of part of a character
"""


def columns(line: str) -> int:
    """Independent of the code: what wcwidth(3) says, by Unicode's own properties."""
    flat = [c for c in line if unicodedata.category(c) not in ("Mn", "Me", "Cf")]
    return sum(2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in flat)


def pair(names: tuple[str, str]) -> tuple[Lexicon, Lexicon]:
    return LEXICONS[names[0]], LEXICONS[names[1]]


def token(data: bytes, *, flaw: int = EXACT, name: str = "") -> Token:
    return Token(7, 0, len(data), flaw, data, name)


def drawn(data: bytes, **options: bool) -> str:
    return "".join(one.text for one in glyphs(token(data), **options))


# -------------------------------------------------------------------------------- the alignment
@given(pairs, texts())
def test_json_is_what_offsets_and_align_say(names: tuple[str, str], text: str) -> None:
    student, teacher = pair(names)
    row = json.loads(json.dumps(as_json(aligned(student, teacher, text))))
    spans = [spans_of_text(side.tokenizer, text) for side in (student, teacher)]
    chunks = align(*spans)
    assert list(row) == ["text", "student", "teacher", "chunks"]
    assert row["text"] == text
    assert row["student"] == spans[0][:, :2].tolist()
    assert row["teacher"] == spans[1][:, :2].tolist()
    assert [r[:6] for r in row["chunks"]] == np.stack(chunks[:6], axis=1).tolist()
    assert [r[6] for r in row["chunks"]] == (chunks.flaw == EXACT).tolist()


@given(pairs, st.data())
def test_ids_are_taken_as_they_are(names: tuple[str, str], data: st.DataObject) -> None:
    student, teacher = pair(names)
    ids = data.draw(id_lists(len(student.vocabulary.roles)))
    found = aligned(student, teacher, ids)
    assert [t.id for t in found.student] == ids
    assert [list(t[1:4]) for t in found.student] == spans_of_ids(student.tokenizer, ids).tolist()
    for side, first, stop in ((found.student, 0, 1), (found.teacher, 2, 3)):
        cut = [0, *(chunk[stop] for chunk in found.chunks)]
        assert cut == [*(chunk[first] for chunk in found.chunks), len(side)]
    flaws = {t.flaw for t in found.student} | {EXACT}
    assert {c.flaw for c in found.chunks} <= flaws | {LOST, CHANGED, UNKNOWN, SPECIAL}


def test_markers_alone_are_one_chunk_that_is_not_scorable() -> None:
    student, teacher = pair(("byte_bpe", "unigram"))
    end = student.tokenizer.token_to_id("<|im_end|>")
    row = as_json(aligned(student, teacher, [end, end]))
    assert row == {
        "text": "", "student": [[0, 0], [0, 0]], "teacher": [], "chunks": [[0, 2, 0, 0, 0, 0, False]],
    }  # fmt: skip
    empty = {"text": "", "student": [], "teacher": [], "chunks": []}
    assert as_json(aligned(student, teacher, "")) == as_json(aligned(student, teacher, [])) == empty


@pytest.mark.parametrize(
    ("sizes", "flaw", "expected"),
    [
        ((1, 1), EXACT, "one"),
        ((1, 2), EXACT, "teacher"),
        ((3, 1), EXACT, "student"),
        ((2, 3), EXACT, "both"),
        ((1, 1), CHANGED, "flawed"),
        ((1, 0), LOST, "flawed"),
    ],
)
def test_kinds_of_chunks(sizes: tuple[int, int], flaw: int, expected: str) -> None:
    assert kind(Chunk(0, sizes[0], 0, sizes[1], 0, 3, flaw)) == expected
    assert expected in KINDS


def test_every_reason_is_explained() -> None:
    assert [FLAWS[flaw] for flaw in sorted(REASONS)] == list(FLAWS[1:])


# -------------------------------------------------------------------------------------- glyphs
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"ab", "ab"),
        (b" a\n\t", "·a⏎→"),
        (b"\x00\x1b\r\x7f", "␀␛␍␡"),
        ("\x85\u2028\u00a0\u3000".encode(), "‹U+0085›‹U+2028›‹U+00A0›‹U+3000›"),
        (b"\xf0\x9f", "‹F0 9F›"),
        (b"a\xff\x80b", "a‹FF 80›b"),
        (b"\xff", "‹FF›"),
        ("e\u0301".encode(), "e\u0301"),
        ("\u0301x".encode(), "◌\u0301x"),
        (" \u0301".encode(), "·◌\u0301"),
        ("\u202e\u2066\u200f\u200b\ufeff\u00ad".encode(),
         "‹U+202E›‹U+2066›‹U+200F›‹U+200B›‹U+FEFF›‹U+00AD›"),
        ("👩\u200d👧".encode(), "👩‹U+200D›👧"),
        ("❤\ufe0f".encode(), "❤‹U+FE0F›"),
        ("👍🏽".encode(), "👍‹U+1F3FD›"),
        ("🇦🇿".encode(), "‹U+1F1E6›‹U+1F1FF›"),
        ("a\u20dd\u0301".encode(), "a\u20dd\u0301"),
        ("1\u20e3".encode(), "1‹U+20E3›"),
        ("\u1112\u1161".encode(), "\u1112‹U+1161›"),
        ("\ue000\U0010ffff\u0378".encode(), "‹U+E000›‹U+10FFFF›‹U+0378›"),
    ],
)  # fmt: skip
def test_bytes_are_shown_as_what_they_are(data: bytes, expected: str) -> None:
    assert drawn(data) == expected
    assert [columns(one.text) for one in glyphs(token(data))] == [
        one.width for one in glyphs(token(data))
    ]


def test_without_bytes_a_token_is_shown_by_its_name() -> None:
    shown = glyphs(token(b"", flaw=SPECIAL, name="<s>\x1b"))
    assert ("".join(one.text for one in shown), all(one.sign for one in shown)) == ("<s>␛", True)
    assert [one.text for one in glyphs(token(b""))] == ["∅"]


def test_a_space_that_a_tokenizer_implies_is_not_shown_where_the_text_has_none() -> None:
    found = aligned(*pair(("wordpiece", "wordpiece")), "the fox")
    assert ["".join(one.text for one in glyphs(t)) for t in found.student] == ["the", "·fox"]


def test_in_ascii_other_characters_are_numbers() -> None:
    assert (
        drawn("aé\x1b你\u0301 ".encode(), ascii_only=True) == "a‹U+00E9›‹U+001B›‹U+4F60›‹U+0301›·"
    )


@given(st.one_of(texts().map(str.encode), bytes_pieces().map(b"".join)))
def test_widths_are_those_of_a_terminal(data: bytes) -> None:
    for one in glyphs(token(data)):
        assert columns(one.text) == one.width >= 1
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in one.text)


@given(texts())
def test_nothing_of_a_text_is_left_out(text: str) -> None:
    """The signs can be read back, wherever the text has none of them itself."""
    text = re.sub("[·⏎→‹›◌\u2400-\u2421]", "", text)
    back = {"·": " ", "⏎": "\n", "→": "\t", "␡": "\x7f"} | {
        chr(0x2400 + i): chr(i) for i in range(32)
    }
    shown = re.sub("‹U\\+([0-9A-F]+)›", lambda m: chr(int(m[1], 16)), drawn(text.encode() or b" "))
    assert "".join(back.get(c, c) for c in shown.replace("◌", "")) == (text or " ")


# ------------------------------------------------------------------------------------ the picture
def test_a_picture() -> None:
    student, teacher = pair(("byte_bpe", "sentencepiece_bpe"))
    assert terminal(aligned(student, teacher, GOLDEN_TEXT), width=60) == GOLDEN


@given(pairs, texts(), st.integers(0, 130), st.booleans(), st.booleans())
def test_no_line_is_wider_than_asked(
    names: tuple[str, str], text: str, width: int, colour: bool, ascii_only: bool
) -> None:
    found = aligned(*pair(names), text)
    picture = terminal(found, width=width, colour=colour, ascii_only=ascii_only)
    assert ("\x1b" in ESCAPE.sub("", picture)) is False
    assert colour or "\x1b" not in picture
    assert not ascii_only or picture.isascii()
    told = figures(found, *pair(names))
    for line in (*ESCAPE.sub("", picture).split("\n"), *table(told, width=width).split("\n")):
        assert columns(line) <= max(width, SHORTEST), line
    plain = terminal(found, width=width, ascii_only=ascii_only)
    kinds = "|".join(re.escape(f" {text} ") for text in KINDS.values())
    uncoloured = re.sub(rf"(?:\n|   )(?:{kinds})", "", ESCAPE.sub("", picture))
    assert uncoloured == plain


def rows_of(picture: str, label: str) -> str:
    """One side of a picture as one string, without the borders between lines."""
    lines = [line for line in picture.split("\n") if line.startswith(f"{label} ")]
    return "".join(line.removeprefix(f"{label} ") for line in lines)


@given(pairs, texts(), st.integers(SHORTEST, 130))
def test_all_tokens_stand_in_the_picture_in_order(
    names: tuple[str, str], text: str, width: int
) -> None:
    text = re.sub("[│┊…]", "", text)
    found = aligned(*pair(names), text)
    picture = terminal(found, width=width)
    for label, side, first, stop in (
        ("student", found.student, 0, 1),
        ("teacher", found.teacher, 2, 3),
    ):
        expected = [
            "┊".join("".join(g.text for g in glyphs(one)) for one in side[c[first] : c[stop]])
            or "∅"
            for c in found.chunks
        ]
        drawn = re.sub(" *…\n?…?", "", rows_of(picture, label)).replace("││", "│")
        drawn = re.sub("[\u2066\u2069]", "", drawn)
        cells = [cell.rstrip(" ") for cell in drawn.strip("│").split("│")] if found.chunks else []
        assert cells == expected


@given(pairs, texts())
def test_both_rows_have_their_borders_in_the_same_columns(
    names: tuple[str, str], text: str
) -> None:
    text = re.sub("[│┊…]", "", text)
    for block in terminal(aligned(*pair(names), text), width=60).split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("student "):
            places = [
                [columns(line[:i]) for i, c in enumerate(line) if c in "│…"] for line in lines[:2]
            ]
            assert places[0] == places[1]
            assert len(places[0]) >= 2


@given(texts())
def test_right_to_left_text_stays_in_its_cell(text: str) -> None:
    found = aligned(*pair(("byte_bpe", "unigram")), f"{text} שלום مرحبا {text}")
    digits = tuple(token(data.encode()) for data in ("٣", "a", " ٤"))
    numbers = Alignment("", digits, digits, (Chunk(0, 3, 0, 3, 0, 6, EXACT),))
    for line in (terminal(found) + terminal(numbers)).split("\n"):
        inside = 0
        for c in line:
            inside += (c == "\u2066") - (c == "\u2069")
            assert inside in (0, 1)
            assert inside or unicodedata.bidirectional(c) not in ("R", "AL", "AN")
        assert inside == 0


@pytest.mark.parametrize(
    ("names", "text", "lines"),
    [
        (("byte_bpe", "wordpiece"), "Dog", ["✗ changed", "not scorable (1): " + REASONS[CHANGED]]),
        (("byte_bpe", "unigram"), "ïx", ["✗ unknown", "<unk>"]),
        (("byte_bpe_lossy", "byte_bpe"), "é", ["✗ lost"]),
        (("byte_bpe", "byte_bpe"), "", ["no tokens: the text is empty"]),
        (("byte_bpe", "byte_bpe"), "a\u0301", ["a"]),
    ],
)
def test_what_is_not_scorable_is_marked_with_the_reason(
    names: tuple[str, str], text: str, lines: list[str]
) -> None:
    picture = terminal(aligned(*pair(names), text))
    for line in lines:
        assert line in picture.replace("\n", " ")


def test_broken_bytes_and_markers_are_marked() -> None:
    student, teacher = pair(("byte_bpe", "sentencepiece_bpe"))
    ids = [student.tokenizer.token_to_id(c) for c in ("a", "ð", "<|im_end|>", "b")]
    picture = terminal(aligned(student, teacher, ids))
    assert "‹F0›" in picture
    assert "✗ broken" in picture
    assert "<|im_end|>" in picture
    assert REASONS[BROKEN] in picture.replace("\n", " ")


def test_a_chunk_wider_than_the_terminal_goes_on_below() -> None:
    spaces = Token(1, 0, 90, EXACT, b" " * 90, "")
    halves = tuple(Token(2, i, i + 45, EXACT, b" " * 45, "") for i in (0, 45))
    found = Alignment(" " * 90, (spaces,), halves, (Chunk(0, 1, 0, 2, 0, 90, EXACT),))
    first, second, _ = terminal(found, width=70).split("\n\n")
    assert first.split("\n") == [
        "student │" + "·" * 60 + "…",
        "teacher │" + "·" * 45 + "┊" + "·" * 14 + "…",
    ]
    assert second.split("\n") == ["student …" + "·" * 30 + " │", "teacher …" + "·" * 31 + "│"]


def test_colours_tell_the_kinds_apart() -> None:
    names = ("byte_bpe", "wordpiece")
    found = aligned(*pair(names), "hello Dog internals the café")
    picture = terminal(found, colour=True)
    styles = set(re.findall(r"\x1b\[((?!0m|2m)[\d;]+)m", picture))
    assert len(styles) == len({kind(chunk) for chunk in found.chunks} - {"one"})
    for chunk in found.chunks:
        assert kind(chunk) == "one" or f" {KINDS[kind(chunk)]} " in picture


def test_the_legend_has_what_occurs_and_no_more() -> None:
    found = aligned(*pair(("byte_bpe", "byte_bpe")), "the")
    assert [sign for sign, _ in legend(found)] == ["│"]
    parts = [b" \n\t", b"\xf0\x9f", b"\xe2\x80\x8b", b"\xcc\x81"]
    side = tuple(token(data) for data in parts)
    signs = ["│", "┊", "·", "⏎", "→", "‹F0 9F›", "‹U+200D›", "◌", "∅", "✗ lost"]
    found = Alignment("", side, (), (Chunk(0, 4, 0, 0, 0, 9, LOST),))
    assert [sign for sign, _ in legend(found)] == signs
    both = Alignment("", side[:1], side[:1], (Chunk(0, 1, 0, 1, 0, 3, EXACT),))
    assert [sign for sign, _ in legend(both)] == ["│", "·", "⏎", "→"]


# ------------------------------------------------------------------------------------ the figures
@given(pairs, texts())
def test_figures_are_counts_of_the_alignment(names: tuple[str, str], text: str) -> None:
    student, teacher = pair(names)
    found = aligned(student, teacher, text)
    told = figures(found, student, teacher)
    assert json.loads(json.dumps(told)) == told
    rows = as_json(found)["chunks"]
    assert told["bytes"] == len(text.encode())
    assert told["chunks"] == len(rows)
    assert told["one_to_one"] == sum(r[1] - r[0] == 1 and r[3] - r[2] == 1 for r in rows)
    assert sum(told["unscorable"].values()) == sum(not r[6] for r in rows)
    assert told["student"]["tokens"] == len(found.student)
    if rows:
        assert told["longest_chunk"]["bytes"] == max(r[5] - r[4] for r in rows)
        assert told["one_to_one_share"] == told["one_to_one"] / len(rows)
    for side, tokens in (("student", found.student), ("teacher", found.teacher)):
        rate = told[side]["bytes_per_token"]
        assert rate == (len(text.encode()) / len(tokens) if tokens else None)


def test_shared_ids_are_counted_by_their_bytes() -> None:
    student, teacher = pair(("byte_bpe", "sentencepiece_bpe"))
    told = figures(aligned(student, teacher, ""), student, teacher)
    for mine, other, side in ((student, teacher, "student"), (teacher, student, "teacher")):
        text_of = {i: b for i, (b, r) in enumerate(zip(mine.vocabulary.token_bytes, mine.vocabulary.roles, strict=True))
                   if r == "text"}  # fmt: skip
        known = {
            b
            for b, r in zip(other.vocabulary.token_bytes, other.vocabulary.roles, strict=True)
            if r == "text"
        }
        assert told[side]["text_ids"] == len(text_of)
        assert told[side]["shared_ids"] == sum(b in known for b in text_of.values())
        assert 0 < told[side]["shared_id_share"] < 1
    assert told["longest_chunk"] is None
    assert table(told).endswith("No chunks.\n")


def test_mass_is_what_each_model_gives_to_shared_tokens() -> None:
    student, teacher = load(DEMO / "student"), load(DEMO / "teacher")
    sides = lexicon("s", student.tokenizer), lexicon("t", teacher.tokenizer)
    text = "seventy two plus three"
    masses = shared_mass(student, teacher, aligned(*sides, text))
    for model, mine, other, mass in zip(
        (student, teacher), sides, sides[::-1], masses, strict=True
    ):
        encoded = model.tokenizer.encode("a" + text)
        bos = encoded.ids[: encoded.special_tokens_mask.index(0)]
        side = aligned(*sides, text).student if mine is sides[0] else aligned(*sides, text).teacher
        ids = [*bos, *(one.id for one in side)]
        with torch.no_grad():
            logits = model.decoder.head.logits(model.decoder(torch.tensor([ids]))[0])
        known = {
            b
            for b, r in zip(other.vocabulary.token_bytes, other.vocabulary.roles, strict=True)
            if r == "text"
        }
        counted = [i for i, (b, r) in enumerate(zip(mine.vocabulary.token_bytes, mine.vocabulary.roles, strict=True))
                   if (r == "text" and b in known) or i in (model.eos_ids if model is teacher else [model.end_id])]  # fmt: skip
        expected = logits.softmax(-1)[max(1, len(bos)) - 1 : -1, counted].sum(-1).mean()
        assert mass == pytest.approx(float(expected), abs=1e-5)


def test_a_text_longer_than_a_model_has_no_mass() -> None:
    student, teacher = load(DEMO / "student"), load(DEMO / "teacher")
    sides = lexicon("s", student.tokenizer), lexicon("t", teacher.tokenizer)
    with pytest.raises(ValueError, match=r"expected at most \d+ tokens with ids below \d+ for"):
        shared_mass(student, teacher, aligned(*sides, "ab " * 300))
    assert shared_mass(student, teacher, aligned(*sides, "")) == (None, None)


# ------------------------------------------------------------------------------------ the command
@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers as files and folders, texts, and things that are none."""
    work = tmp_path_factory.mktemp("align")
    for name in NAMES:
        FAMILIES[name]().save(str(work / f"{name}.json"))
    (work / "folder").mkdir()
    FAMILIES["unigram"]().save(str(work / "folder" / "tokenizer.json"))
    (work / "empty").mkdir()
    (work / "broken.json").write_text("{}", "utf-8")
    (work / "text.txt").write_bytes("a\r\nthe 🙂\r".encode())
    (work / "latin.txt").write_bytes(b"caf\xe9")
    os.mkfifo(work / "pipe")  # stands for all that is no file: a test never offers a real device
    return work


class Done:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Done]


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`minigold align` in this process, in the folder of `work`."""

    def run(
        *args: str,
        stdin: bytes = b"",
        student: str = "byte_bpe.json",
        teacher: str = "unigram.json",
    ) -> Done:
        monkeypatch.chdir(work)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["align", "--student", student, "--teacher", teacher, *args])
        return Done(code, *capsys.readouterr())

    return run


def process(work: Path, *args: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "minigold", "align", "--student", "byte_bpe.json",
               "--teacher", "unigram.json", *args]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(command, cwd=work, env=environment, **options)


def expected(text: str | list[int], student: str = "byte_bpe", teacher: str = "unigram") -> Any:
    return as_json(aligned(LEXICONS[student], LEXICONS[teacher], text))


def test_a_text_as_json(run: Run) -> None:
    done = run("--json", "hello Ｔhe 🙂")
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    assert json.loads(done.out) == expected("hello Ｔhe 🙂")
    assert json.loads(run("--json", "").out) == expected("")


def test_a_text_from_a_file_or_standard_input_is_taken_byte_for_byte(run: Run, work: Path) -> None:
    text = (work / "text.txt").read_bytes()
    assert json.loads(run("--json", "--file", "text.txt").out) == expected(text.decode())
    assert json.loads(run("--json", stdin=text).out) == expected(text.decode())
    assert json.loads(run("--json", stdin=b"\xef\xbb\xbfa").out)["text"] == "\ufeffa"


def test_names_are_files_and_folders(run: Run, work: Path) -> None:
    (work / "other").mkdir(exist_ok=True)
    (work / "other" / "tokenizer.json").write_bytes((work / "byte_bpe.json").read_bytes())
    for student, name in (("byte_bpe.json", "byte_bpe.json"), ("other/tokenizer.json", "other")):
        told = json.loads(run("hello", student=student, teacher="folder").out.splitlines()[-1])
        assert (told["student"]["name"], told["teacher"]["name"]) == (name, "folder")
        assert told["student"]["shared_mass"] is None


def test_the_picture_ends_with_its_figures(run: Run) -> None:
    done = run("the fox 🙂")
    found = aligned(LEXICONS["byte_bpe"], LEXICONS["unigram"], "the fox 🙂")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(terminal(found, width=80))
    told = json.loads(done.out.splitlines()[-1])
    names = {"student": "byte_bpe.json", "teacher": "unigram.json"}
    sides = [lexicon(names[side], LEXICONS[key].tokenizer)
             for side, key in (("student", "byte_bpe"), ("teacher", "unigram"))]  # fmt: skip
    assert told == figures(found, *sides)
    assert table(told) in done.out


def test_jsonl_answers_each_line_in_order(run: Run) -> None:
    given: list[str | list[int]] = ["hello", "", [5, 6, 300, 1], "a\u2028b\x85c", []]
    lines = [{"text": one} if isinstance(one, str) else {"student_ids": one} for one in given]
    raw = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    for stdin in (raw, raw + b"\n\n", b"\n \n" + raw.replace(b"\n", b"\r\n\r\n")):
        done = run("--jsonl", stdin=stdin)
        assert (done.code, done.err) == (0, "")
        assert [json.loads(line) for line in done.out.splitlines()] == list(map(expected, given))
    assert run("--jsonl", "--json", stdin=raw).out == run("--jsonl", stdin=raw).out
    assert (run("--jsonl").code, run("--jsonl").out) == (0, "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "expected one JSON object, got Expecting property name"),
        (b"\xff", "expected UTF-8, got byte 0xff at byte 0"),
        (b"[" * 100_000, "expected one JSON object, got deep nesting"),
        (b'{"text": "a", "text": "b"}', "expected each key once, got 'text' twice"),
        (b'"text"', 'expected an object such as {"text": "…"}, got "text"'),
        (b"[[5]]", 'expected an object such as {"text": "…"}, got a list of 1'),
        (b"{}", "alone, got the keys none; keep one"),
        (
            b'{"text": "a", "student_ids": [5]}',
            "alone, got the keys 'text', 'student_ids'; keep one",
        ),
        (b'{"text": "a", "id": 5}', "alone, got the keys 'text', 'id'; keep one"),
        (b'{"teacher_ids": [5]}', "alone, got the keys 'teacher_ids'; keep one"),
        (b'{"text": 5}', "expected text to be text, got 5; correct it"),
        (b'{"text": null}', "expected text to be text, got null; correct it"),
        (b'{"student_ids": "ab"}', 'student_ids to be a list of whole numbers, got "ab"; correct'),
        (b'{"student_ids": [5.0]}', r"a list of whole numbers, got \[5.0\]; correct it"),
        (b'{"student_ids": [true]}', r"a list of whole numbers, got \[true\]; correct it"),
        (b'{"student_ids": [[5]]}', r"a list of whole numbers, got \[\[5\]\]; correct it"),
        (b'{"student_ids": [-1]}', r"expected ids in 0\.\.\d+, got -1"),
        (b'{"student_ids": [5, 100000]}', r"expected ids in 0\.\.\d+, got 5 to 100000"),
        (b'{"student_ids": [99999999999999999999999]}', "expected "),
        (b'{"text": "a\\ud800"}', "expected text, got half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(run: Run, line: bytes, message: str) -> None:
    done = run(
        "--jsonl", stdin=b'{"text": "a"}\n{"student_ids": [5]}\n' + line + b'\n{"text": "z"}\n'
    )
    assert done.code == 2
    assert [json.loads(one) for one in done.out.splitlines()] == [expected("a"), expected([5])]
    assert done.err.count("\n") == 1
    assert re.match(rf"minigold: line 3 of standard input: .*{message}", done.err), done.err


def test_a_tokenizer_that_can_only_teach_is_told(run: Run) -> None:
    for name, other in (("wordpiece.json", "byte_bpe.json"), ("byte_bpe.json", "wordpiece.json")):
        done = run("The fox", student=name, teacher=other)
        assert done.code == 0
        told = "such a tokenizer can only be the teacher's" in done.err
        assert told == (name == "wordpiece.json")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--jsonl", "text"], "expected --jsonl to read standard input alone, got TEXT too"),
        (["--jsonl", "--file", "text.txt"], "alone, got --file too; leave it out"),
        (["--jsonl", "--html", "p.html"], "alone, got --html too; leave it out"),
        (["--jsonl", ""], "alone, got TEXT too; leave it out"),
        (["text", "--file", "text.txt"], "expected one of TEXT and --file, got both"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--file", "absent.txt"], "expected a file of text, found no absent.txt; check"),
        (["--file", "folder"], "expected a file of text, found the folder folder; check"),
        (["--file", "latin.txt"], "expected UTF-8 in latin.txt, got byte 0xe9 at byte 3; save"),
        (["a\udcff"], "lone surrogate at character 1"),
        (["a", "--html", "folder"], "expected a file to write to, got folder, a folder; name"),
        (["a", "--html", "pipe"], "expected a file to write to, got pipe, no file that can be"),
        (
            ["a", "--html", "absent/p.html"],
            "expected a folder for absent/p.html, found none",
        ),
    ],
)
def test_what_contradicts_itself_or_is_not_there_is_refused(
    run: Run, work: Path, args: list[str], message: str
) -> None:
    before = sorted(work.rglob("*"))
    done = run(*args)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert re.match(rf"minigold.*: .*{message}", done.err), done.err
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/folder/x", "expected a model folder, found no folder absent/folder/x"),
        ("empty", "expected tokenizer.json in empty, found none; convert"),
        ("broken.json", "expected a tokenizer in broken.json, got .*; download it again"),
        ("text.txt", "expected a tokenizer in text.txt, got .*; download it again"),
    ],
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_no_tokenizer_is_refused(run: Run, side: str, name: str, message: str) -> None:
    done = run("a", **{side: name})
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert re.match(rf"minigold: {message}", done.err), done.err


def test_bad_bytes_on_standard_input_are_refused(run: Run) -> None:
    done = run(stdin=b"ab\xff")
    assert (done.code, done.out) == (2, "")
    assert "expected UTF-8 in standard input, got byte 0xff at byte 2; save it" in done.err


def test_without_any_text_a_terminal_is_not_waited_for(work: Path) -> None:
    leader, follower = pty.openpty()
    running = process(work, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = running.communicate(timeout=60)
    os.close(leader)
    os.close(follower)
    message = "expected a text, got none; give TEXT, --file FILE, or standard input"
    assert (running.returncode, out, err.decode()) == (2, b"", f"minigold: {message}\n")


def test_closed_standard_input_is_no_text(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    folder = str(work / "folder")
    assert main(["align", "--student", folder, "--teacher", folder]) == 2
    assert "expected a text, got none" in capsys.readouterr().err


def test_the_page_is_written_whole_and_told(run: Run, work: Path) -> None:
    target = work / "page.html"
    target.write_text("before", "utf-8")
    target.chmod(0o640)
    (work / "link.html").symlink_to("page.html")
    before = sorted(work.iterdir())
    picture = run("the fox")
    done = run("the fox", "--html", "link.html")
    assert (done.code, done.out) == (0, picture.out)
    assert done.err == "written to link.html\n"
    assert target.read_text("utf-8").startswith("<!doctype html>")
    assert (work / "link.html").is_symlink()
    assert sorted(work.iterdir()) == before
    target.unlink()
    (work / "link.html").unlink()
    both = run("the fox", "--html", "page.html", "--json")
    assert json.loads(both.out) == expected("the fox")
    assert target.is_file()


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"expected a file to write to, got .*pipe, no file"):
        write_whole(tmp_path / "pipe", b"page")
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _data: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    (tmp_path / "p.html").write_text("before", "utf-8")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "p.html", b"after")
    assert [(p.name, p.read_text("utf-8")) for p in tmp_path.iterdir()] == [("p.html", "before")]


def test_weights_of_two_folders_are_read_for_the_mass(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"student": str(DEMO / "student"), "teacher": str(DEMO / "teacher")}
    done = run("seventy two", **names)
    told = json.loads(done.out.splitlines()[-1])
    assert done.err.startswith(
        "reading both models for the mass of shared tokens; name tokenizer.json"
    )
    assert 0.5 < told["student"]["shared_mass"] < 1
    assert re.search(r"^mass on them +0\.\d{3} +0\.\d{3}$", done.out, re.MULTILINE)
    files = {side: f"{name}/tokenizer.json" for side, name in names.items()}
    for more in (
        files,
        {**names, "teacher": files["teacher"]},
        {**files, "teacher": names["teacher"]},
    ):
        quiet = run("seventy two", **more)
        assert quiet.err == ""
        assert json.loads(quiet.out.splitlines()[-1])["teacher"]["shared_mass"] is None
    assert run("seventy two", "--json", **names).err == ""


def test_models_that_cannot_be_used_leave_the_mass_out_and_say_so(run: Run) -> None:
    long = run("ab " * 500, student=str(DEMO / "student"), teacher=str(DEMO / "teacher"))
    assert long.code == 0
    assert "the mass of shared tokens is left out: expected at most" in long.err
    assert json.loads(long.out.splitlines()[-1])["student"]["shared_mass"] is None


def test_models_of_unknown_kind_leave_the_mass_out(run: Run, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama", FAMILIES["byte_bpe"](), end="<|im_end|>")
    (folder / "config.json").write_text('{"model_type": "mamba"}', "utf-8")
    done = run("hello", student=str(folder), teacher=str(folder))
    assert done.code == 0
    assert re.search("the mass of shared tokens is left out: .*mamba", done.err)


# ------------------------------------------------------------------------------ in a real process
def in_terminal(work: Path, *args: str, env: dict[str, str], columns: int = 50) -> str:
    """What the command writes to a terminal of that width."""
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {"COLUMNS": "", "LINES": "", "NO_COLOR": "", "TERM": "xterm-256color", **env}
    running = process(work, *args, stdout=follower, stderr=follower, stdin=follower, env=clean)
    os.close(follower)
    written = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and select.select([leader], [], [], 120)[0]:
        try:
            more = os.read(leader, 1 << 16)
        except OSError:  # the other side is closed
            break
        written += more
    os.close(leader)
    assert running.wait(60) == 0, written
    return written.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_at_its_own_width(work: Path) -> None:
    text = "hello internals Ｔhe 🙂 amused"
    found = aligned(LEXICONS["byte_bpe"], LEXICONS["unigram"], text)
    written = in_terminal(work, text, env={})
    assert written.startswith(terminal(found, width=50, colour=True))
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert in_terminal(work, text, env=env).startswith(terminal(found, width=50))


def test_no_escape_sequence_of_a_text_reaches_the_output(work: Path) -> None:
    running = process(work, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                      env={"COLUMNS": ""})  # fmt: skip
    out, err = running.communicate(b"\x1b[31mred\x07\xc2\x9b2J\r\x00 \xe2\x80\xaeabc")
    assert (running.returncode, err) == (0, b"")
    assert not [c for c in out.decode() if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_an_output_of_another_encoding_gets_what_it_can_show(work: Path, encoding: str) -> None:
    running = process(work, "café → 你好 │ 🙂\x1b", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                      env={"PYTHONIOENCODING": encoding, "COLUMNS": "70"})  # fmt: skip
    out, err = running.communicate()
    assert running.returncode == 0, err
    picture = out.decode(encoding)
    assert picture.isascii() == (encoding != "utf-16")
    assert json.loads(picture.splitlines()[-1])["bytes"] == 26
    assert ("student |" if encoding != "utf-16" else "student │") in picture


def test_lines_are_answered_as_they_come(work: Path) -> None:
    running = process(work, "--jsonl", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                      env={"PYTHONUNBUFFERED": ""})  # fmt: skip
    assert running.stdin is not None
    assert running.stdout is not None
    for text in ("hello", "the fox"):
        running.stdin.write(json.dumps({"text": text}).encode() + b"\n")
        running.stdin.flush()
        assert select.select([running.stdout], [], [], 30)[0], "no answer before the input ends"
        assert json.loads(running.stdout.readline()) == expected(text)
    running.stdin.close()
    assert running.wait(60) == 0
    running.stdout.close()


@pytest.mark.parametrize("args", [["--jsonl"], ["--json"], []])
def test_a_reader_that_leaves_is_no_error(work: Path, args: list[str]) -> None:
    running = process(work, *args, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                      stderr=subprocess.PIPE, env={"PYTHONUNBUFFERED": ""})  # fmt: skip
    assert running.stdout is not None
    running.stdout.close()  # before anything is written
    assert running.stdin is not None
    running.stdin.write(b'{"text": "hello"}\n' * 3)
    running.stdin.close()
    assert running.stderr is not None
    assert running.stderr.read() == b""
    running.stderr.close()
    assert running.wait(60) == 141


# -------------------------------------------------------------------------------- with real models
@pytest.mark.real
def test_the_picture_in_the_readme(run: Run) -> None:
    readme = (DEMO.parent.parent / "README.md").read_text("utf-8")
    found = re.search(
        r'^minigold align .* "(.*)"\n```\n\n```\n((?:student|teacher) .*?)```',
        readme,
        re.MULTILINE | re.DOTALL,
    )
    assert found is not None
    student, teacher = (str(real_folder(name) / "tokenizer.json") for name in ("smollm2", "gemma"))
    done = run(found[1], student=student, teacher=teacher)
    assert done.out.startswith(found[2])
