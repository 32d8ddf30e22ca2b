# SPDX-License-Identifier: Apache-2.0
"""Options from a TOML file: the same as on the command line, which wins."""

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigold import cli
from minigold.config import Config, option_name
from minigold.config_file import KINDS, words_of, written_out

CHOICES = {
    "device": ["auto"], "dtype": ["auto", "float32", "bfloat16"], "progress": ["lines", "bar"],
}  # fmt: skip
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00~"), min_size=1)
VALUES = {
    bool: st.booleans(),
    int: st.integers(-(2**60), 2**60),
    float: st.one_of(st.floats(allow_nan=False), st.integers(-999, 999)),
}


def value_of(name: str) -> st.SearchStrategy[Any]:
    if name in CHOICES:
        return st.sampled_from(CHOICES[name])
    return VALUES.get(KINDS[name], texts)


settings = st.sets(st.sampled_from(sorted(KINDS))).flatmap(
    lambda names: st.fixed_dictionaries({name: value_of(name) for name in names})
)


def toml(values: dict[str, Any]) -> str:
    """JSON's numbers, switches and escapes are TOML's, but for infinity and DEL."""
    lines = []
    for key, value in values.items():
        text = json.dumps(value, ensure_ascii=False).replace("Infinity", "inf")
        lines.append(f"{key} = {text}\n".replace("\x7f", "\\u007f"))
    return "".join(lines)


PARSER = cli._parser()
SIDES = ("student_plain", "teacher_plain")


def parsed(words: list[str]) -> dict[str, Any]:
    """What the parser of `train` makes of words; options that are required have some value."""
    needed = [f"--{name}=x" for name in ("teacher", "student", "prompts", "out")]
    found = vars(PARSER.parse_args(["train", *needed, *words]))
    return {k: v for k, v in found.items() if k not in ("run", "config")}


@given(settings, st.booleans())
def test_a_file_says_what_the_words_would(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], dashes: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "run.toml"
    keys = {name: name.replace("_", "-") if dashes else name for name in values}
    path.write_text(toml({keys[name]: value for name, value in values.items()}), "utf-8")
    if "plain_prompt" in values:  # stands for both sides, where they are not named themselves
        values = dict.fromkeys(SIDES, values["plain_prompt"]) | values
    found, without = parsed(words_of(path)), parsed([])
    assert found.keys() == without.keys() == KINDS.keys()
    for name, value in found.items():
        place = (folder / str(values.get(name))).resolve()
        if name not in values:
            assert value == without[name]
        elif name in ("prompts", "eval_prompts", "out"):
            assert value == place
        elif name in ("teacher", "student", "teacher_tokenizer"):
            assert value == (str(place) if place.exists() else values[name])
        else:
            assert value == values[name] and type(value) is KINDS[name]


def test_the_kinds_are_those_of_the_parser() -> None:
    (commands,) = (x for x in PARSER._actions if isinstance(x, argparse._SubParsersAction))
    shown = [x for x in commands.choices["train"]._actions if x.help != argparse.SUPPRESS]
    found = {x.dest: bool if x.nargs == 0 else x.type for x in shown}
    del found["help"], found["config"]
    assert {
        name: kind if kind in (int, float, bool) else str for name, kind in found.items()
    } == KINDS
    assert {f.name for f in fields(Config)} < set(KINDS)
    hidden = [x for x in commands.choices["train"]._actions if x.help == argparse.SUPPRESS]
    assert {x.dest for x in hidden} == {name for name, kind in KINDS.items() if kind is bool}


@pytest.mark.parametrize("place", [0, 4])
def test_the_command_line_wins(tmp_path: Path, place: int) -> None:
    path = tmp_path / "run.toml"
    path.write_text("steps = 7\nlr = 1\nplain_prompt = true\ndry-run = true\nseed = 3\n", "utf-8")
    line = ["--steps", "9", "--no-plain-prompt", "--lr=0.5"]
    words = written_out(["train", *line[:place], "--config", str(path), *line[place:]])
    found = parsed(words[1:])
    assert (found["steps"], found["lr"], found["seed"]) == (9, 0.5, 3)
    assert (found["plain_prompt"], found["dry_run"], found["resume"]) == (False, True, False)
    assert written_out(["train", *line, f"--config={path}"]) == written_out(
        ["train", "--config", str(path), *line]
    )


@pytest.mark.parametrize(
    ("content", "line", "student", "teacher"),
    [
        ("plain_prompt = true", "", True, True),
        ("plain_prompt = true", "--no-teacher-plain", True, False),
        ("plain_prompt = true", "--no-student-plain", False, True),
        ("plain_prompt = true", "--no-plain-prompt", False, False),
        ("plain_prompt = true", "--no-plain-prompt --student-plain", True, False),
        ("plain_prompt = true\nteacher_plain = false", "", True, False),
        ("teacher_plain = false\nplain_prompt = true", "", True, False),
        ("teacher_plain = true\nplain_prompt = false", "", False, True),
        ("teacher_plain = false", "--plain-prompt", True, True),
        ("teacher_plain = true", "--no-plain-prompt", False, False),
        ("", "--plain-prompt --no-student-plain", False, True),
        ("", "--no-student-plain --plain-prompt", True, True),
        ("", "--student-plain", True, False),
    ],
)
def test_the_later_word_on_a_side_wins(
    tmp_path: Path, content: str, line: str, student: bool, teacher: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Over that for both sides; those of a file are earlier, and have no order among them."""
    found: list[Config] = []

    def made(**values: Any) -> None:
        found.append(Config(**values))
        raise ValueError("enough")

    monkeypatch.setattr(cli, "Config", made)
    monkeypatch.setattr(cli, "fields", lambda _: fields(Config))
    path = tmp_path / "run.toml"
    path.write_text(content, "utf-8")
    words = ["--teacher", "t", "--student", "s", "--prompts", "p", "--out", "o"]
    assert cli.main(["train", *words, "--config", str(path), *line.split()]) == 2
    assert [(one.student_plain, one.teacher_plain) for one in found] == [(student, teacher)]


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "models" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "run.toml").write_text(
        'teacher = "models/mine"\nstudent = "owner/name"\nprompts = "../p.jsonl"\nout = "/x/out"\n',
        "utf-8",
    )
    expected = {
        f"--teacher={tmp_path}/runs/models/mine", "--student=owner/name",
        f"--prompts={tmp_path}/p.jsonl", "--out=/x/out",
    }  # fmt: skip
    for place, name in ((tmp_path, "runs/run.toml"), (tmp_path / "runs", "run.toml")):
        monkeypatch.chdir(place)
        assert set(words_of(Path(name))) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('teacher = "~/runs"\nout = "~/out"\n', "utf-8")
    words = [f"--teacher={tmp_path}/runs", f"--out={tmp_path}/out"]
    assert words_of(tmp_path / "run.toml") == words
    (tmp_path / "s.safetensors").touch()
    (tmp_path / "run.toml").write_text('teacher = "s.safetensors"\nteacher_tokenizer = "o/n"\n')
    words = [f"--teacher={tmp_path}/s.safetensors", "--teacher-tokenizer=o/n"]
    assert words_of(tmp_path / "run.toml") == words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steeps = 3", "expected names of options of minigold train in run.toml, got 'steeps'; see "),
        ("[train]\nsteps = 3", "expected names of options of minigold train in run.toml, got 'train'"),
        ("config = 'x'", "names of options .*got 'config'"),
        ("no-resume = true", "names of options .*got 'no-resume'"),
        ('"--steps" = 3', "names of options .*got '--steps'"),
        ("Steps = 3", "names of options .*got 'Steps'"),
        ("steps = '3'", "expected steps of type int in run.toml, got '3' of type str"),
        ("steps = 3.0", "expected steps of type int in run.toml, got 3.0 of type float"),
        ("steps = true", "expected steps of type int in run.toml, got True of type bool"),
        ("lr = '1e-3'", "expected lr of type float in run.toml, got '1e-3' of type str"),
        ("lr = true", "expected lr of type float in run.toml, got True of type bool"),
        ("student-plain = 1", "expected student-plain of type bool in run.toml, got 1 of type int"),
        ("resume = 'no'", "expected resume of type bool in run.toml, got 'no' of type str"),
        ("teacher = 3", "expected teacher of type str in run.toml, got 3 of type int"),
        ("out = ['a']", r"expected out of type str in run.toml, got \['a'\] of type list"),
        ("steps = {a = 1}", "expected steps of type int in run.toml, got {'a': 1} of type dict"),
        ("seed = 2020-01-01", "expected seed of type int in run.toml, got datetime"),
        ("batch-size = 3\nbatch_size = 3", "expected batch_size once in run.toml, got it with dashes too"),
        ("batch_size = 3\nbatch-size = 4", "expected batch_size once in run.toml, got it with dashes too"),
        ("steps = 3\nsteps = 4", "expected TOML in run.toml, got an error: Cannot overwrite a value"),
        ("steps = ", "expected TOML in run.toml, got an error: Invalid value"),
        ("steps = " + "[" * 10**5, "expected TOML in run.toml, got an error: .*recursion"),
        ("\ud800", "expected TOML in run.toml, got an error: 'utf-8' codec"),
        ("steps = 0", "expected --steps at least 1, got 0"),
        ("lr = nan", "expected --lr above 0, got nan"),
        ("dtype = 'float16'", "argument --dtype: invalid choice: 'float16'"),
    ],
    ids=lambda value: value[:30],
)  # fmt: skip
def test_a_file_that_is_not_right_is_told_in_one_line(
    tmp_path: Path, content: str, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "run.toml").write_bytes(content.encode("utf-8", "surrogatepass"))
    monkeypatch.chdir(tmp_path)
    words = ["--teacher", "t", "--student", "s", "--prompts", "p", "--out", "o"]
    assert cli.main(["train", *words, "--config", "run.toml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.search(rf"^minigold.*: .*{message}", err), err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "absent.toml"], "expected a TOML file for --config, found no absent.toml; check"),
        (["--config", "."], "expected a TOML file for --config, found no .; check the path"),
        (["--config=a.toml", "--config", "b.toml"], "expected one --config, got a.toml and b.toml"),
        (["--steps", "3", "--config"], "argument --config: expected one argument; name the file"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_there_is_named(
    tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words]) == 2
    assert capsys.readouterr().err.startswith(f"minigold: {message}")


def test_what_is_nowhere_is_still_required(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text('teacher = "t"\nprompts = "p"\n', "utf-8")
    assert cli.main(["train", "--config", str(tmp_path / "run.toml")]) == 2
    assert "arguments are required: --student, --out; see" in capsys.readouterr().err


def test_other_commands_have_no_such_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert written_out(["demo", "--config", "x"]) == ["demo", "--config", "x"]
    assert written_out([]) == []
    assert cli.main(["demo", "--config", "x"]) == 2
    assert "unrecognized arguments: --config x" in capsys.readouterr().err


def test_a_run_of_a_file_is_the_run_of_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(cli, "_train", asked.append)
    (tmp_path / "run.toml").write_text(
        'teacher = "./t"\nstudent = "s"\nprompts = "p.jsonl"\nout = "out"\nlr = 1e-4\n'
        "where = 'all'\nstudent_plain = true\n", "utf-8",
    )  # fmt: skip
    assert cli.main(["train", "--config", str(tmp_path / "run.toml"), "--seed", "4"]) == 0
    words = ["--teacher", "./t", "--student", "s", "--prompts", str(tmp_path / "p.jsonl"), "--out",
             str(tmp_path / "out"), "--lr", "1e-4", "--where", "all", "--student-plain", "--seed", "4"]  # fmt: skip
    assert cli.main(["train", *words]) == 0
    first, second = ({**vars(one), "config": None} for one in asked)
    assert first == second
    assert option_name("student_plain") in words
