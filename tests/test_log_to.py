# SPDX-License-Identifier: Apache-2.0
"""Curves in TensorBoard, Weights & Biases and Trackio, and the bar: read back, also after a resume."""

import io
import json
import logging
import re
import sys
import types
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigold import cli
from minigold.log_to import LOGS, check_logs, log_to, numbers_of
from minigold.progress import progress_bar
from tiny_folders import tiny_folder
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    tiny_folder(work / "student", "llama", sentencepiece_bpe(), begin="<s>", end="</s>")
    tiny_folder(work / "teacher", "llama", byte_bpe(), end="<|im_end|>", seed=2)
    (work / "p.jsonl").write_text('{"prompt": "hello"}\n', "utf-8")
    return work


def command(work: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "--teacher", str(work / "teacher"), "--student", str(work / "student"), "--prompts",
        str(work / "p.jsonl"), "--out", str(out), "--steps", "4", "--batch-size", "2",
        "--max-new-tokens", "5", "--warmup", "0", "--plain-prompt", "--save-every", "2", *more,
    ]  # fmt: skip


def rows_of(out: Path) -> list[dict[str, Any]]:
    text = (out / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The process ends in a step, without a checkpoint of it."""

    def line(metrics: dict[str, Any], _steps: int) -> str:
        if metrics["step"] == number:
            raise KeyboardInterrupt
        return "a step"

    monkeypatch.setattr(cli, "step_line", line)


# --------------------------------------------------------------------------------------- numbers
names = st.text(min_size=1).filter(lambda name: name != "step")
values = st.one_of(st.none(), st.text(), st.integers(), st.floats(allow_nan=False))


@given(st.dictionaries(names, values), st.dictionaries(names, st.integers()))
def test_every_number_has_its_name(row: dict[str, Any], inner: dict[str, int]) -> None:
    found = numbers_of({**row, "step": 7, "unscorable": inner})
    flat = {f"unscorable/{name}": value for name, value in inner.items()}
    expected = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "unscorable"}
    assert found == {**expected, **flat}


# ----------------------------------------------------------------------------------- TensorBoard
def curves(out: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard"))
    read.Reload()
    found = {}
    for name in read.Tags()["scalars"]:
        points = read.Scalars(name)
        found[name] = {point.step: point.value for point in points}
        assert len(found[name]) == len(points)
    return found


def assert_shown(out: Path) -> None:
    shown, rows = curves(out), rows_of(out)
    named = [name for row in rows for name in numbers_of(row)]
    assert set(shown) == set(named) and len(shown) > 20
    for row in rows:
        for name, value in numbers_of(row).items():
            assert shown[name][row["step"]] == pytest.approx(value, rel=1e-6, abs=1e-30)
    assert sum(map(len, shown.values())) == len(named)


def test_tensorboard_has_every_number_of_every_step(work: Path, tmp_path: Path) -> None:
    assert cli.main(command(work, tmp_path / "run", "--log-to", "tensorboard")) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]
    assert_shown(tmp_path / "run")


@pytest.mark.parametrize("after", [1, 3])
def test_tensorboard_forgets_steps_that_come_again(
    work: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1: there is no checkpoint. Step 3: the last one is that of step 2."""
    args = command(work, tmp_path / "run", "--log-to", "tensorboard")
    stop_after(monkeypatch, after)
    assert cli.main(args) == 130
    first = curves(tmp_path / "run")
    assert set(first["loss"]) == set(range(1, after + 1))
    monkeypatch.undo()
    assert cli.main([*args, "--resume"]) == 0
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    assert_shown(tmp_path / "run")
    assert curves(tmp_path / "run")["seconds"][after] != first["seconds"][after]


# ------------------------------------------------------------------------ Weights & Biases, Trackio
class Wandb(types.ModuleType):
    """Takes calls as `wandb` 0.31 does: a step below the next one is not taken."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.ended: list[bool] = []

    def init(self, *, config: dict[str, Any], **settings: str) -> Any:
        assert set(settings) == {"project", "id", "name", "resume", "dir"}
        assert Path(settings.pop("dir")).is_dir() and not set(settings["id"]) & set("/\\#?%:")
        self.begun.append({**settings, "steps": config["steps"]})
        return WandbRun(self, self.runs.setdefault(settings["id"], {}))


class WandbRun:
    def __init__(self, module: Wandb, taken: dict[int, dict[str, float]]) -> None:
        self.module, self.taken = module, taken
        self.starting_step = max(taken, default=-1) + 1

    def finish(self, exit_code: int = 0) -> None:
        self.module.ended.append(exit_code == 0)

    def log(self, data: dict[str, float], *, step: int) -> None:
        assert step >= self.starting_step and step not in self.taken
        self.taken[step] = data


class Trackio(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("trackio")
        self.begun: list[dict[str, Any]] = []
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.current: str | None = None

    def init(self, project: str, name: str, resume: str, config: dict[str, Any]) -> None:
        print("* Trackio tells what it does")
        self.begun.append({"project": project, "name": name, "resume": resume,
                           "steps": config["steps"]})  # fmt: skip
        self.current = name
        self.runs.setdefault(name, [])

    def log(self, metrics: dict[str, float], step: int) -> None:
        assert self.current is not None
        self.runs[self.current].append((step, metrics))

    def finish(self) -> None:
        assert self.current is not None
        print("* finished")
        self.current = None


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Trackio:
    module = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return module


def test_wandb_and_trackio_go_on_with_the_same_run(
    work: Path, tmp_path: Path, wandb: Wandb, trackio: Trackio, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args = command(work, tmp_path / "run", "--log-to", "wandb,trackio")
    stop_after(monkeypatch, 3)
    assert cli.main(args) == 130
    assert trackio.current is None and wandb.ended == [False]
    monkeypatch.undo()
    for module in (wandb, trackio):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    capsys.readouterr()
    assert cli.main([*args, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 4 and "Trackio tells" in err
    identity = json.loads((tmp_path / "run" / "log_to.json").read_text("utf-8"))["id"]
    assert re.fullmatch(r"[0-9a-f]{8}", identity)
    common = {"project": "minigold", "resume": "allow", "steps": 4}
    assert wandb.begun == [{**common, "id": identity, "name": "run"}] * 2
    assert trackio.begun == [{**common, "name": f"run-{identity}"}] * 2
    assert wandb.ended == [False, True] and trackio.current is None
    rows = rows_of(tmp_path / "run")
    (taken,) = wandb.runs.values()
    assert list(taken) == [1, 2, 3, 4]
    (given,) = trackio.runs.values()
    assert [step for step, _ in given] == [1, 2, 3, 3, 4]
    seconds = {"seconds", "seconds_sample", "seconds_teacher", "seconds_train", "peak_memory_gib"}
    for row in rows:
        expected = {k: v for k, v in numbers_of(row).items() if k not in seconds}
        for found in (taken[row["step"]], dict(given)[row["step"]]):
            assert {k: v for k, v in found.items() if k not in seconds} == expected
            assert seconds <= found.keys()


def test_another_run_in_a_folder_of_that_name_is_another_run(
    work: Path, tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for place in ("a", "b"):
        assert cli.main(command(work, tmp_path / place / "run", "--log-to", "wandb")) == 0
    first, second = wandb.begun
    assert first["id"] != second["id"] and first["name"] == second["name"] == "run"
    assert first["project"] == second["project"] == "mine"
    assert all(list(taken) == [1, 2, 3, 4] for taken in wandb.runs.values())


def test_a_finished_run_opens_nothing(work: Path, tmp_path: Path, wandb: Wandb) -> None:
    args = command(work, tmp_path / "run", "--log-to", "wandb")
    assert cli.main(args) == 0
    assert cli.main([*args, "--resume"]) == 0
    assert len(wandb.begun) == 1


def test_a_log_that_cannot_be_opened_names_the_way_on(
    work: Path, tmp_path: Path, wandb: Wandb, trackio: Trackio, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(**_: Any) -> None:
        raise RuntimeError("no account\n")

    monkeypatch.setattr(wandb, "init", fail)
    assert cli.main(command(work, tmp_path / "run", "--log-to", "trackio,wandb")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("minigold: expected wandb to open a log, got no account; the run is in ")
    assert trackio.current is None
    assert cli.main([*command(work, tmp_path / "run"), "--resume"]) == 0


def test_an_error_of_the_run_is_told_as_it_is(tmp_path: Path, wandb: Wandb) -> None:
    (tmp_path / "config.json").write_text('{"steps": 3}', "utf-8")

    def fail() -> None:
        with log_to(("wandb",), tmp_path) as add:
            add({"step": 1, "loss": 0.5})
            raise FloatingPointError("not finite")

    with pytest.raises(FloatingPointError, match="not finite"):
        fail()
    assert wandb.ended == [False]


@pytest.mark.parametrize("name", LOGS)
def test_a_package_that_is_not_there_is_named_before_a_model_is_read(
    name: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    args = command(work, tmp_path / "run", "--log-to", name, "--student", "./absent")
    message = (
        f"minigold: expected the package {name} for --log-to {name}, found none; run: pip install"
    )
    for there in (None, types.ModuleType(module)):  # missing; a folder of that name
        monkeypatch.setitem(sys.modules, module, there)
        assert cli.main(args) == 2
        assert capsys.readouterr().err == f"{message} {name}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "mlflow", "wandb,", "wandb, trackio", "wandb,wandb", "Wandb"])
def test_other_logs_are_refused(text: str, wandb: Wandb, trackio: Trackio) -> None:
    with pytest.raises(
        ValueError, match="expected --log-to to be one of tensorboard, wandb, trackio,"
    ):
        check_logs(text)
    assert check_logs("trackio,wandb") == ("trackio", "wandb")


# -------------------------------------------------------------------------------------- the bar
def test_a_bar_in_place_of_lines(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = command(work, tmp_path / "run", "--progress", "bar")
    handlers = list(logging.getLogger("minigold").handlers)
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 4 and out.count("\n") == 1
    assert "step 1/4" not in err and "| 4/4 [" in err
    last = rows_of(tmp_path / "run")[-1]
    assert f"loss={last['loss']:.4f}, trained={last['trained_fraction']:.4f}]" in err
    assert "mass audit" in err
    assert logging.getLogger("minigold").handlers == handlers


def test_a_bar_goes_on_where_the_run_does() -> None:
    row = {"loss": 0.5, "trained_fraction": None}
    with redirect_stderr(io.StringIO()) as err, progress_bar(9) as show:
        assert err.getvalue() == ""
        show({**row, "step": 6})
        show({**row, "step": 9})  # two steps between failed
    told = re.findall(r"(\d+)/9 \[", err.getvalue())
    assert (told[0], told[-1]) == ("5", "9")
    assert "loss=0.5000]" in err.getvalue()


def test_what_is_said_stands_above_the_bar() -> None:
    log = logging.getLogger("minigold")
    with redirect_stderr(io.StringIO()) as err:
        handler = logging.StreamHandler(sys.stderr)
        log.addHandler(handler)
        try:
            with progress_bar(3) as show:
                show({"loss": 0.1, "trained_fraction": 0.5, "step": 1})
                log.warning("a warning")
                assert handler not in log.handlers
            assert handler in log.handlers
        finally:
            log.removeHandler(handler)
    assert re.search(r"(^|[\r\n])\s*a warning\n", err.getvalue())


def test_a_bar_without_its_package_or_with_lines_is_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = command(work, tmp_path / "run", "--progress", "bar", "--student", "./absent")
    assert cli.main([*args, "--log-every", "2"]) == 2
    assert "expected --log-every with --progress lines only" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.contrib.logging", None)
    assert cli.main(args) == 2
    line = "minigold: expected the package tqdm for --progress bar, found none; run: pip install tqdm\n"
    assert capsys.readouterr().err == line
