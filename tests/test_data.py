# SPDX-License-Identifier: Apache-2.0
"""Prompts files: every line is read as it stands, or refused with its number."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigold.data import COLUMNS, RESERVED, Prompt, read_prompts
from strategies import texts

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
GOOD = b'{"prompt": "a"}'


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written over by each test, and by each example of hypothesis."""
    return tmp_path_factory.mktemp("prompts") / "prompts.jsonl"


def read(file: Path, *lines: bytes) -> list[Prompt]:
    file.write_bytes(b"\n".join(lines))
    return read_prompts(file)


def line_of(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8")


# ---------------------------------------------------------------------------- good lines
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, {"prompt": "a"}),
        ({"prompt": ""}, {"prompt": ""}),
        ({"prompt": "🙂 é \u2028\n\t\x7f"}, {"prompt": "🙂 é \u2028\n\t\x7f"}),
        ({"prompt": [USER]}, {"prompt": [USER]}),
        ({"prompt": [{"role": "x"}]}, {"prompt": [{"role": "x"}]}),
        ({"prompt": [ASSISTANT, {"role": "user", "content": []}]},
         {"prompt": [ASSISTANT, {"role": "user", "content": []}]}),
        ({"messages": [USER]}, {"prompt": [USER]}),
        ({"messages": [USER, ASSISTANT]}, {"prompt": [USER], "completion": "Hello"}),
        ({"messages": [USER, {**ASSISTANT, "content": ""}]}, {"prompt": [USER], "completion": ""}),
        ({"messages": [USER, {**ASSISTANT, "name": None}]}, {"prompt": [USER], "completion": "Hello"}),
        ({"messages": [USER, ASSISTANT, USER]}, {"prompt": [USER, ASSISTANT, USER]}),
        ({"messages": [USER], "completion": "b"}, {"prompt": [USER], "completion": "b"}),
        ({"prompt": "a", "completion": ""}, {"prompt": "a", "completion": ""}),
        ({"prompt": "a", "completion": None, "messages": None, "answer": None}, {"prompt": "a"}),
        ({"prompt": "a", "completion": "b", "finished": True}, {"prompt": "a", "completion": "b"}),
        ({"prompt": "a", "completion": "", "finished": False},
         {"prompt": "a", "completion": "", "finished": False}),
        ({"messages": [USER, ASSISTANT], "finished": False},
         {"prompt": [USER], "completion": "Hello", "finished": False}),
        ({"prompt": "a", "finished": None}, {"prompt": "a"}),
        ({"prompt": "a", "teacher_prompt": "b", "answer": "c"},
         {"prompt": "a", "teacher_prompt": "b", "answer": "c"}),
        ({"prompt": "a", "teacher_prompt": [USER]}, {"prompt": "a", "teacher_prompt": [USER]}),
        ({"prompt": "a", "id": 7, "tags": [1.5, {"x": None}], "Ünï": True},
         {"prompt": "a", "extra": {"id": 7, "tags": [1.5, {"x": None}], "Ünï": True}}),
        ({"prompt": "a", "n": -(10**300), "x": 1e308, "y": -0.0},
         {"prompt": "a", "extra": {"n": -(10**300), "x": 1e308, "y": -0.0}}),
    ],
)  # fmt: skip
def test_good_lines_are_read_as_they_stand(
    file: Path, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    (prompt,) = read(file, line_of(row))
    assert prompt == Prompt(**expected, line=1)


def test_ends_of_lines_and_empty_lines_do_not_matter(file: Path) -> None:
    prompts = read(file, GOOD, b"", b" \t\r", b'  {"prompt": "b\\u2028"}  \r', GOOD + b"\r", b"")
    assert [(p.prompt, p.line) for p in prompts] == [("a", 1), ("b\u2028", 4), ("a", 5)]


def test_all_lines_of_a_long_file_are_kept_in_order(file: Path) -> None:
    rows = [{"prompt": str(i), "i": i} for i in range(1000)]
    prompts = read(file, *map(line_of, rows))
    assert [p.extra["i"] for p in prompts] == list(range(1000))
    assert [p.line for p in prompts] == list(range(1, 1001))


# ----------------------------------------------------------------------------- bad lines
BAD = [
    (b"hello", "expected one JSON object, got Expecting value at column 1; write one object a line"),
    (b'{"prompt": "a"', "expected one JSON object, got Expecting ',' delimiter at column 15"),
    (b'{"prompt": "a"} {"prompt": "b"}', "got Extra data at column 17"),
    (b'{"prompt": "a"}\r{"prompt": "b"}', "got Extra data"),
    (b'{"prompt": "a"}\x00', "got Extra data"),
    (b'{"prompt": "a\tb"}', "got Invalid control character"),
    (b"{'prompt': 'a'}", "got Expecting property name"),
    (b"null", 'expected an object such as {"prompt": "…"}, got null'),
    (b'"hello"', 'expected an object such as {"prompt": "…"}, got "hello"'),
    (b"[]", "got a list of 0"),
    (b"3.5", "got 3.5"),
    (b"\xef\xbb\xbf" + GOOD, "expected JSON, got a byte order mark; save the file as UTF-8 without"),
    (GOOD.decode().encode("utf-16"), "expected UTF-8, got byte 0xff at byte 0; save the file as UTF-8"),
    (b'{"prompt": "caf\xe9"}', "expected UTF-8, got byte 0xe9 at byte 15"),
    (b'{"prompt": "\\ud800"}', "got half of a surrogate pair; write the character itself or both"),
    (b'{"prompt": "a", "\\udc00": 1}', "got half of a surrogate pair"),
    (b'{"prompt": "a", "x": ["\\ud83d\\ud83d"]}', "got half of a surrogate pair"),
    (b'{"prompt": NaN}', "got NaN, which JSON does not have; use null or a number"),
    (b'{"prompt": "a", "x": [-Infinity]}', "got -Infinity, which JSON does not have"),
    (b'{"prompt": "a", "x": 1e999}', "expected numbers below 1.8e308, got 1e999…; write it as text"),
    (b'{"prompt": "a", "x": -1' + b"0" * 5000 + b"}", "below 1.8e308, got -1000000000000000000…"),
    (b'{"prompt": "a", "prompt": "b"}', "expected each key once, got 'prompt' twice; remove one"),
    (b'{"prompt": "a", "x": {"y": 1, "y": 1}}', "expected each key once, got 'y' twice"),
    (b'{"prompt": "a", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "got deep nesting; flatten it"),
    (b"{}", "expected one of prompt and messages, got neither; keep one of them"),
    (b'{"prompt": null, "messages": null}', "got neither"),
    (b'{"text": "a"}', "got neither"),
    ({"prompt": "a", "messages": [USER]}, "expected one of prompt and messages, got both"),
    ({"prompt": 5}, "expected prompt to be text or a list of messages such as"),
    ({"prompt": []}, "a list of messages such as {\"role\": \"user\", \"content\": \"…\"}, got an empty"),
    ({"prompt": {"role": "user"}}, "got an object"),
    ({"messages": "a"}, 'expected messages to be a list of messages such as {"role"'),
    ({"messages": []}, "expected messages to be a list of messages"),
    ({"prompt": ["Hi"]}, 'expected prompt[0] to be an object with a role, got "Hi"; add "role"'),
    ({"prompt": [USER, {"content": "x"}]}, 'expected prompt[1] to be an object with a role, got {"con'),
    ({"prompt": [{"role": 1, "content": "x"}]}, "expected prompt[0] to be an object with a role"),
    ({"prompt": [{"role": "user", "content": 5}]}, "expected prompt[0] to have text as content, got 5"),
    ({"prompt": [{"role": "user", "content": {}}]}, "to have text as content, got an object; put it"),
    ({"prompt": [USER, ASSISTANT]}, "expected prompt to end before the assistant's turn"),
    ({"prompt": "a", "teacher_prompt": [ASSISTANT]}, "expected teacher_prompt to end before"),
    ({"prompt": "a", "teacher_prompt": 1}, "expected teacher_prompt to be text or a list of messages"),
    ({"prompt": "a", "completion": 1}, "expected completion to be text, got 1; put it in quotes"),
    ({"prompt": "a", "answer": 42}, "expected answer to be text, got 42; put it in quotes"),
    ({"prompt": "a", "answer": ["42"]}, "expected answer to be text, got a list of 1"),
    ({"messages": [USER, ASSISTANT], "completion": "b"}, "expected one completion, got completion and"),
    ({"messages": [ASSISTANT]}, "expected a message before the last assistant turn"),
    ({"messages": [USER, {"role": "assistant"}]}, "and text in it, got 2 messages; complete them"),
    ({"messages": [USER, {**ASSISTANT, "content": [1]}]},
     "expected the last assistant turn's content to be text, got a list of 1"),
    ({"messages": [USER, {**ASSISTANT, "reasoning_content": "hm"}]},
     "expected role and content alone in the last assistant turn, got 'reasoning_content' too"),
    ({"prompt": "a", "completion": "b", "finished": 0}, "expected finished to be true or false, got 0"),
    ({"prompt": "a", "completion": "b", "finished": "no"}, 'finished to be true or false, got "no"; cor'),
    ({"prompt": "a", "finished": False}, "expected a completion beside finished, got none; remove fin"),
    ({"prompt": "a", "step": 1}, "expected extra columns with names that samples.jsonl does not use"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_lines_are_refused_with_their_number(file: Path, line: Any, message: str) -> None:
    raw = line if isinstance(line, bytes) else line_of(line)
    with pytest.raises(
        ValueError, match=re.escape(f"{file}, line 3: ") + ".*" + re.escape(message)
    ):
        read(file, GOOD, b"", raw, GOOD, b"{}")


def test_files_that_hold_no_prompts_are_refused(file: Path) -> None:
    for nothing in (b"", b"\n \r\n\n"):
        with pytest.raises(
            ValueError, match=r'expected prompts in .*, got none; add lines such as \{"'
        ):
            read(file, nothing)
    with pytest.raises(ValueError, match=r"got the folder .*; name the file"):
        read_prompts(file.parent)
    with pytest.raises(FileNotFoundError, match=r"found no .*absent\.jsonl; check the path"):
        read_prompts(str(file.with_name("absent.jsonl")))


@pytest.mark.parametrize("name", [*COLUMNS, *RESERVED])
def test_extra_columns_cannot_stand_for_those_of_minigold(name: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{name}'; rename it"):
        Prompt("a", extra={"id": 1, name: 2})


# ---------------------------------------------------------------------------- properties
NUMBERS = st.one_of(
    st.integers(-(10**40), 10**40), st.floats(allow_nan=False, allow_infinity=False)
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, texts(3))
WORDS = st.sampled_from([*COLUMNS, "role", "content", "id"])
VALUES = st.recursive(
    st.one_of(SCALARS, st.just(USER), st.just(ASSISTANT), st.just([USER, ASSISTANT])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)


def outcome(file: Path, *lines: bytes) -> list[Prompt] | str:
    """The prompts, or the message of the one error that may be raised."""
    try:
        return read(file, *lines)
    except ValueError as error:
        return str(error)


@given(value=st.one_of(VALUES, st.dictionaries(WORDS, VALUES)))
def test_any_value_is_read_or_refused_with_its_number(file: Path, value: Any) -> None:
    found = outcome(file, GOOD, line_of(value))
    if isinstance(found, str):
        assert re.fullmatch(rf"{re.escape(str(file))}, line 2: expected .*", found)
    else:
        assert found[1].extra == {key: x for key, x in value.items() if key not in COLUMNS}
        assert found[1].line == 2


@given(st.binary())
def test_any_bytes_are_read_or_refused(file: Path, data: bytes) -> None:
    found = outcome(file, data)
    if isinstance(found, str):
        refused = rf"{re.escape(str(file))}, line \d+: expected |expected prompts in "
        assert re.match(refused, found)


@given(
    prompt=texts(),
    completion=st.none() | texts(),
    answer=st.none() | texts(),
    extra=st.dictionaries(texts(2).map("x".__add__), SCALARS),
    ascii_only=st.booleans(),
)
def test_what_is_written_as_json_is_read_back(
    file: Path, prompt: str, completion: Any, answer: Any, extra: Any, ascii_only: bool
) -> None:
    row = {**extra, "prompt": prompt, "completion": completion, "answer": answer}
    file.write_text(json.dumps(row, ensure_ascii=ascii_only), "utf-8")
    (read_back,) = read_prompts(file)
    assert read_back == Prompt(prompt, completion, None, answer, extra, 1)
