# SPDX-License-Identifier: Apache-2.0
"""Every arm and seed on the tiny pair (the screening) or on a real one, one small JSON file each.

    python examples/experiments/screen.py --out runs/screen
    python examples/experiments/screen.py --arms gold,uld,bpm --seeds 0,1,2 --jobs 2 --out runs/screen
    python examples/experiments/screen.py --arms uld,bpm --equal-time runs/screen --out runs/equal-time
    python examples/experiments/screen.py --arms uld --on validation --lr 4e-3 --out runs/tune/4e-3
    python examples/experiments/screen.py --task skill --arms gold,all --out runs/confirm-skill

What is run, and what is decided by it: docs/experiments.md. A folder holds runs of one setting; a
run whose file is there is not run again, so that the same line goes on after a stop. One on a real
pair keeps checkpoints until it has its file, and goes on within itself. Every run is a process of its
own with one thread: its processor time is comparable whatever runs beside it, and its memory is its
own. `table.py` makes tables and plots of the files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

import minigold
from minigold.config import Config
from minigold.data import Prompt, read_object, write_whole
from minigold.evaluate import evaluate, exact_matches
from minigold.load import LanguageModel, load
from minigold.pair import make_pair
from minigold.rollout import EVAL, sample_answers, seeds_of
from minigold.stop import asked_to_stop
from minigold.train import Step, distill

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import ARMS, BASE, LR, Arm, replaced
from real_tasks import BEHAVIOUR, SKILL, make_behaviour, make_skill
from task import make, read_run, read_texts, well_indented

__all__ = ["TASKS", "Task", "main", "measure", "read_as", "run", "settings_of", "steps_for"]

N_VALIDATION = 200  # of the training prompts: not trained on, to choose learning rates by
EVERY = 50  # steps between looks at the held-out prompts; not in the time of a run
ON = ("held-out", "validation")
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit status, as a shell tells it


@dataclass(frozen=True)
class Task:
    """A pair with its prompts, and the settings that all arms start from.

    Args:
        make: fills a folder with `student`, `teacher`, `train.jsonl` and `held_out.jsonl`.
        lr: of arms that do best with another rate than `base` has, see docs/experiments.md.
        resumes: a run takes long, and goes on from its last checkpoint.
    """

    make: Callable[[Path], None]
    base: Config
    lr: Mapping[str, float] = field(default_factory=dict)
    resumes: bool = True


TASKS = {
    "tiny": Task(make, BASE, LR, resumes=False),
    "skill": Task(make_skill, SKILL),
    "behaviour": Task(make_behaviour, BEHAVIOUR, {"fine-tuned": 1e-5, "beta-0.1": 5e-5}),
}


def rows_of(models: Path, on: str) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that are trained on, and those that are measured on."""
    train = read_texts(models, "train")
    n = min(N_VALIDATION, len(train) // 4)
    return train[:-n], train[-n:] if on == "validation" else read_texts(models, "held_out")


def read_as(base: Config, arm: Arm) -> Config:
    """A task's settings, with a prompt that is given as the arm's student knows it."""
    plain = base.teacher_plain if arm.student in ("teacher", "same") else base.student_plain
    return replace(base, student_plain=plain)


def settings_of(
    name: str, seed: int, *, task: str, steps: int, lr: float, on: str
) -> dict[str, Any]:
    """What a file must hold to be the result of a run."""
    steps = steps if ARMS[name].trains else 0
    return {"task": task, "arm": name, "seed": seed, "steps": steps, "lr": lr, "on": on}


def config_of(settings: dict[str, Any]) -> Config:
    """All settings of a run; the warm-up is the task's share of its steps, however many these are."""
    arm, base = ARMS[settings["arm"]], TASKS[settings["task"]].base
    steps = max(1, settings["steps"])
    warmup = round(base.warmup * steps / base.steps)
    own = {**arm.changes, "seed": settings["seed"], "lr": settings["lr"]}
    return replace(read_as(base, arm), **own, steps=steps, warmup=warmup)


def told(config: Config) -> dict[str, Any]:
    """What is not the library's default."""
    return {key: x for key, x in vars(config).items() if x != getattr(Config, key)}


# ------------------------------------------------------------------- one run
def run(
    settings: dict[str, Any], models: Path, every: int = EVERY, going: Path | None = None
) -> dict[str, Any]:
    """Trains a student as the arm says, and measures it beside the taught teacher.

    Args:
        going: folder of the training while it goes, to go on in; None keeps nothing.

    Raises:
        SystemExit: it was asked to stop, and did after its step.
        ValueError: see `Done`.
    """
    arm = ARMS[settings["arm"]]
    base = replace(read_as(TASKS[settings["task"]].base, arm), seed=settings["seed"])
    config = config_of(settings)
    train, test = rows_of(models, settings["on"])
    train = train[: arm.prompts or None]
    student = load(models / arm.student)
    begun = {"weights": weights_of(models, arm), **code(), "config": told(config),
             "machine": machine()}  # fmt: skip
    trained: dict[str, Any] = {}
    if settings["steps"]:
        done = Done(going, begun)
        with replaced(arm):
            teacher = load(models / arm.teacher)
            trained = _trained(student, teacher, train, test, config, every * arm.times, done)
    measures = measure(student, load(models / "teacher"), test, base)
    return {**settings, **measures, **trained, **begun}


def _trained(
    student: LanguageModel, teacher: LanguageModel, train: Sequence[Prompt],
    test: Sequence[Prompt], config: Config, every: int, done: Done,
) -> dict[str, Any]:  # fmt: skip
    """Runs the loop; figures of its steps, and exact match on the way by steps, seconds, tokens."""
    mark = time.process_time()

    def on_step(step: Step) -> None:
        nonlocal mark
        spent, number = time.process_time() - mark, step.metrics["step"]
        look = number % every == 0 or number == config.steps
        right = _share(_right(student, test, config)) if look else None
        done.add({**step.metrics, "cpu_seconds": spent, "look": look, "exact_match": right})
        mark = time.process_time()

    failed, spent = "", 0.0
    with asked_to_stop() as stop:
        try:
            history = distill(
                student, teacher, train, config,
                out=done.folder, resume=done.folder is not None, on_step=on_step, stop=stop,
            )  # fmt: skip
        except FloatingPointError as error:  # the weights are those before, and are measured
            failed, spent = str(error), time.process_time() - mark
        else:
            if len(history) < config.steps:
                raise SystemExit(128 + stop.signal)
    student.decoder.eval()
    found = figures(done.rows, every)
    return {**found, "failed": failed, "cpu_seconds": found["cpu_seconds"] + spent}


class Done:
    """What is known of each step that did not fail; with a folder, of those of earlier sittings too.

    Args:
        folder: of the training, where there is a file of it beside the checkpoints.
        begun: models, code, settings and machine: those of all sittings of one run.

    Raises:
        ValueError: an earlier sitting had others, or its file is not there or not whole.
    """

    def __init__(self, folder: Path | None, begun: dict[str, Any]) -> None:
        self.folder, self.begun, self.rows = folder, begun, list[dict[str, Any]]()
        if not folder or not [*folder.glob("checkpoints/step-*"), *folder.glob("final")]:
            return  # there is nothing to go on from
        path, remedy = folder / "done.json", f"delete {folder} to begin that run anew"
        known = read_object(path, remedy=remedy) if path.is_file() else {}
        if known.get("begun") != begun:
            raise ValueError(
                f"{path}: expected a run that was begun with {begun}, got {known.get('begun')}; go on "
                f"with these, or {remedy}"
            )
        self.rows = known["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """A sitting that was killed may have done steps after its last checkpoint: they go."""
        self.rows = [*(old for old in self.rows if old["step"] < row["step"]), row]
        if self.folder:
            text = json.dumps({"begun": self.begun, "rows": self.rows})
            write_whole(self.folder / "done.json", text.encode())


def figures(rows: Sequence[dict[str, Any]], every: int) -> dict[str, Any]:
    """Of all steps together, and the curve of the looks on the way."""

    def mean(key: str) -> float | None:
        known = [row[key] for row in rows if row[key] is not None]
        return sum(known) / len(known) if known else None

    curve, spent, tokens = [], 0.0, 0
    for row in rows:
        spent, tokens = spent + row["cpu_seconds"], tokens + row["completion_tokens"]
        if row["look"]:
            curve.append({"step": row["step"], "cpu_seconds": round(spent, 2), "tokens": tokens,
                          "exact_match": row["exact_match"]})  # fmt: skip
    return {
        "cpu_seconds": spent,
        "seconds": sum(row["seconds"] for row in rows),
        "tokens": tokens,
        "trained_fraction": mean("trained_fraction"),
        "work_saved": mean("work_saved"),
        "one_to_one": mean("one_to_one_fraction"),
        "peak_memory_gib": rows[min(every, len(rows)) - 1]["peak_memory_gib"] if rows else None,
        "curve": curve,
    }


def _right(student: LanguageModel, rows: Sequence[Prompt], config: Config) -> str:
    """A 1 or 0 for each prompt: the greedy answer is right. Nothing where prompts have no answer."""
    if not rows[0].answer:
        return ""
    right = exact_matches(
        student, rows, plain=config.student_plain, max_new_tokens=config.max_new_tokens
    )
    return "".join("01"[yes] for yes in right)


def _share(marks: str) -> float | None:
    return marks.count("1") / len(marks) if marks else None


def measure(
    student: LanguageModel, teacher: LanguageModel, rows: Sequence[Prompt], config: Config
) -> dict[str, Any]:
    """All measures, against the real teacher and with the real events, whatever the arm was.

    Args:
        config: of the task, with the seed; an arm's changes do not belong here.

    `right`, `stopped`, `indented`: a 1 or 0 for each prompt, the last two of an answer sampled at
    temperature 1, the first of the greedy one. `right` and `indented` are empty where prompts have
    no answer. `evaluate` explains the others.
    """
    pair = make_pair(student, teacher)
    found = evaluate(pair, [replace(p, answer=None) for p in rows], config)
    with torch.no_grad():
        answers, _ = sample_answers(
            pair, list(rows), config, number=0, seeds=seeds_of(config.seed, 0, EVAL, len(rows))
        )
    keys = ("reverse_kl_per_byte", "forward_kl", "bits_per_byte_student", "bits_per_byte_teacher",
            "mean_tokens", "mean_bytes", "repetition")  # fmt: skip
    return {
        "right": _right(student, rows, config),
        "stopped": "".join("01"[a.finished] for a in answers),
        "indented": "".join("01"[well_indented(a.text)] for a in answers) if rows[0].answer else "",
        **{key: found[key] for key in keys},
        **{f"{key}_{end}": found[f"{key}_{end}"] for key in keys[:1] for end in ("low", "high")},
    }


def weights_of(models: Path, arm: Arm) -> str:
    """Eight digits that stand for the weights of student and teacher: made anew, they are others."""
    digest = hashlib.sha256()
    for name in (arm.student, arm.teacher):
        for path in sorted((models / name).glob("*.safetensors")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def code() -> dict[str, str]:
    """Eight digits each that stand for the code of minigold, and for that of the arms."""
    arms = [sys.modules[name].__file__ for name in ("arms", "baselines", "demo_controls")]
    files = {
        "library": sorted(Path(minigold.__file__).parent.glob("*.py")),
        "arms": map(Path, arms),
    }
    return {
        name: hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]
        for name, paths in files.items()
    }


def machine() -> dict[str, str]:
    """Where a run was made."""
    info, model = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "cpu": model, "vectors": torch.backends.cpu.get_cpu_capability(),  # a name may be of many
        "threads": str(torch.get_num_threads()), "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__, "tokenizers": tokenizers.__version__,
        "minigold": minigold.__version__,
    }  # fmt: skip


# ------------------------------------------------------------------- many runs
def steps_for(name: str, seed: int, folder: Path, *, like: str = "gold") -> int:
    """Steps that take the arm as long as `like` took there, by both runs' processor time a step.

    Raises:
        ValueError: a run that is not in the folder, or was not trained; runs of two machines.
    """
    per_step, whole, where = [], 0.0, []
    for one in (name, like):
        path = folder / f"{one}.seed{seed}.json"
        if not path.is_file():
            raise ValueError(f"--equal-time: expected the run {path}, found none; run it first")
        result = read_run(path)
        if not result["steps"]:
            raise ValueError(f"--equal-time: expected an arm that is trained, got {one!r}")
        whole = result["cpu_seconds"]
        per_step.append(whole / result["steps"])
        where.append(result["machine"])
    if where[0] != where[1]:
        raise ValueError(
            f"--equal-time: expected {name!r} and {like!r} from one machine, got {where[0]} and "
            f"{where[1]}; run both here"
        )
    return max(1, round(whole / per_step[0]))


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether the run's file is there.

    Raises:
        ValueError: it is that of another run.
    """
    if not path.is_file():
        return False
    found = read_run(path)
    other = {key: found.get(key) for key in settings if found.get(key) != settings[key]}
    if other:
        wanted = {key: settings[key] for key in other}
        raise ValueError(f"expected {wanted} in {path}, got {other}; name another --out")
    return True


def one_process(settings: dict[str, Any], path: Path, models: Path) -> str:
    """Runs one arm and seed in a process of its own; a line that says what came out."""
    begun = time.perf_counter()
    command = [sys.executable, __file__, "--one", json.dumps(settings), "--models", str(models),
               "--out", str(path.parent)]  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, env=os.environ | threads, capture_output=True, text=True, check=False
    )
    if done.returncode in STOPPED:
        return f"{path.stem:32} stopped; the same line goes on"
    if done.returncode:
        return f"{path.stem:32} failed:\n{done.stderr[-2000:]}"
    right = read_run(path)["right"]
    share = f"{_share(right):.3f} exact match" if right else "done"
    return f"{path.stem:32} {share}  ({time.perf_counter() - begun:.0f} s)"


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        message = f"expected whole numbers such as 0,1,2, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Runs arms and seeds of the screening.")
    found.add_argument("--arms", default=",".join(ARMS), help="default: all of " + ", ".join(ARMS))
    found.add_argument("--seeds", type=_seeds, default="0", help="for example 0,1,2")
    found.add_argument("--out", type=Path, required=True, help="folder of the results")
    found.add_argument("--task", choices=list(TASKS), default="tiny")
    found.add_argument("--models", type=Path, help="made if not there; default: runs/TASK")
    found.add_argument("--jobs", type=int, default=1, help="runs at a time")
    found.add_argument("--steps", type=int, help="default: the task's")
    found.add_argument("--lr", type=float, help="default: the task's, or what it has for the arm")
    found.add_argument("--on", choices=ON, default=ON[0], help="prompts that are measured on")
    found.add_argument("--equal-time", type=Path, help="results whose `gold` gives the time")
    found.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    return found


def _problem(args: argparse.Namespace, names: Sequence[str], steps: int) -> str | None:
    """What is wrong with the command line, before any model is made."""
    for name in names:
        if name not in ARMS:
            return f"expected --arms out of {', '.join(ARMS)}, got {name!r}"
        needs = {ARMS[name].student, ARMS[name].teacher} - {"student", "teacher"}
        if needs and args.task != "tiny":
            return (
                f"--arms {name} needs the model {needs.pop()!r}, which --task {args.task} does not "
                "have; leave it out, or take --task tiny"
            )
    base = TASKS[args.task].base
    try:
        replace(base, steps=steps, lr=base.lr if args.lr is None else args.lr)
    except ValueError as error:
        return str(error)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every run has its file."""
    args = parser().parse_args(argv)
    task, models = TASKS[args.task], args.models or Path("runs") / args.task
    torch.set_num_threads(1)
    if args.one:
        logging.basicConfig(level=logging.WARNING)
        path = _path(args.out, args.one)
        going = path.with_suffix("") if TASKS[args.one["task"]].resumes else None
        text = json.dumps(run(args.one, models, going=going), ensure_ascii=False, indent=1)
        write_whole(path, text.encode())
        if going and going.is_dir():
            shutil.rmtree(going)
        return 0
    names = args.arms.split(",")
    steps = task.base.steps if args.steps is None else args.steps
    if problem := _problem(args, names, steps):
        parser().error(problem)
    task.make(models)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = []
    for seed in args.seeds:  # a whole table of one seed first
        for name in names:
            own = steps * ARMS[name].times
            if args.equal_time:
                own = steps_for(name, seed, args.equal_time)
            lr = task.lr.get(name, task.base.lr) if args.lr is None else args.lr
            settings = settings_of(name, seed, task=args.task, steps=own, lr=lr, on=args.on)
            if not is_done(_path(args.out, settings), settings):
                wanted.append(settings)
    with ThreadPoolExecutor(args.jobs) as pool:
        work = [pool.submit(one_process, one, _path(args.out, one), models) for one in wanted]
        try:
            for one in work:
                print(one.result(), flush=True)
        except KeyboardInterrupt:  # the runs have it too, and stop after their step
            pool.shutdown(cancel_futures=True)
            print("stopped; the same line goes on", file=sys.stderr)
            return STOPPED[0]
    missing = [one for one in wanted if not _path(args.out, one).is_file()]
    return 1 if missing else 0


def _path(out: Path, settings: dict[str, Any]) -> Path:
    return out / f"{settings['arm']}.seed{settings['seed']}.json"


if __name__ == "__main__":
    raise SystemExit(main())
