# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what each step did goes in, and after a stop the run comes out again.

    config.json                      settings, models, a hash of the prompts, versions
    metrics.jsonl, samples.jsonl     a line a step, a line an answer
    eval.jsonl                       a line an evaluation, if there are any
    checkpoints/step-N/              the student as a Hugging Face folder (its adapter alone, where
                                     that is trained), and beside it
        optimizer.safetensors        AdamW's moments and step counts, by the parameters' names
        checkpoint.json              the step, how long the logs were, size and hash of each file
    failed/step-N.json               a batch whose numbers were not finite
    final/                           the trained student; with it the run is finished

Files and folders are written beside their place as `.NAME.part`, flushed to the disk and renamed:
what stands under its own name is whole. One process at a time holds the folder. Random streams are counted by seed, stream and step, and so
is the order of the data: the number of the step stands for all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import minigold
from minigold import metrics as measured
from minigold.config import BEST_BY, Config, option_name
from minigold.data import Prompt, locked, own_file, parse_object, read_object
from minigold.evaluate import best_of
from minigold.hf import HFDecoder
from minigold.load import LanguageModel
from minigold.lora import SETTINGS, TENSORS, adapter_of, load_adapter, save_adapter
from minigold.pair import Pair
from minigold.tiers import DRIFT, drifted
from minigold.weights import copy_tokenizer, load_decoder, save_decoder

if TYPE_CHECKING:
    from minigold.train import Step

__all__ = ["Run", "check_out", "open_run", "read_evals"]

log = logging.getLogger("minigold")
LOGS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl")
MANIFEST, OPTIMIZER, PART = "checkpoint.json", "optimizer.safetensors", ".part"
FOLDERS = ("checkpoints", "failed", "final")
FORMAT = 1
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
READ = (
    {"config.json", "model.safetensors"},
    {SETTINGS, TENSORS},
)  # what a run goes on from, one of both
BACK = "put the file back as the run wrote it"
WATCHED = (  # numbers that a run goes on from
    "loss", "grad_norm", "repetition", "eos_rate", "completion_tokens", "shared_mass_student",
)  # fmt: skip
FREE = ("log_every", "save_every", "keep", "patience", "python")  # may differ on resume


@dataclass
class Run:
    """An open run folder, held against other processes until it is closed (by `with`).

    Args:
        keep, best_by: of the settings.
        history: metrics of the steps that are done.
        evals: evaluations that are done.
        last: the newest whole checkpoint.
        lock: the open folder, where locks are known.
    """

    out: Path
    pair: Pair
    optimizer: torch.optim.Optimizer
    keep: int
    best_by: str
    history: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    last: Path | None = None
    lock: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None

    def add(self, step: Step) -> None:
        """Appends the step's lines to both logs; a failed step's batch goes to failed/."""
        number = step.metrics["step"]
        rows = measured.sample_rows(number, step, self.pair)
        with self._writing():
            _append(self.out / LOGS[0], [step.metrics])
            _append(self.out / LOGS[1], rows)
            if step.wrong:
                _write(self.out / "failed" / f"step-{number}.json", _json(_failure(step, rows)))

    def add_evaluation(self, row: dict[str, Any]) -> None:
        """Appends a line to eval.jsonl."""
        self.evals.append(row)
        with self._writing():
            _append(self.out / LOGS[2], [row])

    def save(self, number: int) -> None:
        """Makes the checkpoint of step `number`; only then the oldest ones go."""
        folder = self.out / "checkpoints" / f"step-{number}"
        with self._writing():
            logs = [name for name in LOGS if (self.out / name).exists()]
            for name in logs:
                _flush(self.out / name)
            with _whole_folder(folder) as part:
                _save_student(self.pair.student, part)
                save_file(moments(self.pair.student.decoder, self.optimizer), part / OPTIMIZER)
                manifest = {
                    "format": FORMAT,
                    "step": number,
                    "logs": {name: (self.out / name).stat().st_size for name in logs},
                    "files": {path.name: _described(path) for path in sorted(part.iterdir())},
                }
                (part / MANIFEST).write_text(_json(manifest), encoding="utf-8")
            self.last = folder
            self.drop_oldest()

    def drop_oldest(self) -> None:
        """Removes all checkpoints but the newest `keep` and that of the best evaluation."""
        best = best_of(self.evals, self.best_by)
        for old in checkpoints_of(self.out)[self.keep :]:
            if best is None or _number(old) != best["step"]:
                _remove(old)

    def finish(self) -> None:
        """Writes final/, unless the run was finished before."""
        if not (self.out / "final").is_dir():
            with self._writing(), _whole_folder(self.out / "final") as part:
                _save_student(self.pair.student, part)

    def kept(self) -> str:
        """What there is to go on from, in words."""
        return f"the last checkpoint is {self.last}" if self.last else "there is no checkpoint yet"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"expected to write to {self.out}, got {error}; {self.kept()}; make room, then give "
                "the same command with --resume"
            ) from error


def check_out(out: Path, *, resume: bool = False) -> None:
    """Refuses a folder that a run cannot begin in or, with `resume`, go on in.

    Raises:
        ValueError: it holds something else, links for instance, or can be no folder.
    """
    begun = (out / "config.json").is_file()
    if out.exists() and not out.is_dir():
        raise ValueError(
            f"expected --out to be a new or empty folder, got {out}, which is a file; name another"
        )
    found = next((one for one in out.absolute().parents if one.exists()), out.parent)
    if not found.is_dir():
        raise ValueError(f"expected --out to be in a folder, got {out}, but {found.name} is a file")
    held = [path.name for path in out.iterdir()] if out.exists() else []
    if resume and not begun and any(not name.endswith(PART) for name in held):
        raise ValueError(
            f"expected --out to be a run's folder, or a new or empty one, got {out}, which has no "
            "config.json; name another"
        )
    own = chain(out.glob("*"), (p for part in FOLDERS for p in (out / part).rglob("*")))
    foreign = (
        p for p in own
        if p.is_symlink() or not (p.is_file() or (p.is_dir() and p.suffix in ("", PART)))
    )  # fmt: skip
    if resume and (one := next(foreign, None)):
        raise ValueError(
            f"expected --out to hold what a run writes, got {one}, which is no plain file or folder; put "
            "back what was there"
        )
    if held and not resume:
        remedy = "add --resume to go on with the run in it" if begun else "name another"
        raise ValueError(
            f"expected --out to be a new or empty folder, got {out}, which is not empty; {remedy}"
        )


def open_run(
    out: Path,
    pair: Pair,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    resume: bool,
    eval_prompts: Sequence[Prompt] = (),
) -> Run:
    """Begins a run in `out`, or goes on with the one there.

    Then student, optimizer and logs are set back to the last whole checkpoint, or to step 0 if
    there is none yet.

    Raises:
        ValueError: see `check_out`; settings, models, prompts or versions of another run; torn
            checkpoints alone; another process writes there.
    """
    check_out(out, resume=resume)
    if isinstance(pair.student.decoder, HFDecoder):
        pair.student.decoder.check_saving()
    settings = settings_of(pair, prompts, config, eval_prompts)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, pair, optimizer, config.keep, config.best_by, lock=locked(out))
    try:
        _set_back(run, settings, config)
    except BaseException:
        run.__exit__()
        raise
    return run


def _set_back(run: Run, settings: dict[str, Any], config: Config) -> None:
    """To the last whole checkpoint, if there is one; what a killed process left is removed."""
    path = run.out / "config.json"
    begun = path.is_file()
    if begun:
        _check_same(read_object(path, remedy=BACK), settings, run.out)
    for part in (*run.out.glob(f".*{PART}"), *run.out.glob(f"*/.*{PART}")):
        _remove(part)
    if begun:
        _restore(run, config.steps)
    _write(path, _json(settings))


def settings_of(
    pair: Pair, prompts: Sequence[Prompt], config: Config, eval_prompts: Sequence[Prompt] = ()
) -> dict[str, Any]:
    """What config.json holds: all that the numbers of a run follow from."""
    return {
        **asdict(config),
        "student": pair.student.name,
        "teacher": pair.teacher.name,
        "student_dtype": str(pair.student.decoder.dtype).removeprefix("torch."),
        **pair.teacher.facts,
        "device": str(pair.student.decoder.device),
        "prompts_sha256": _hash(prompts),
        "eval_prompts_sha256": _hash(eval_prompts) if eval_prompts else None,
        "versions": {
            "minigold": minigold.__version__,
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _hash(prompts: Sequence[Prompt]) -> str:
    text = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def moments(decoder: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's `step`, `exp_avg` and `exp_avg_sq` of each parameter that has had a gradient."""
    return {
        f"{key}.{name}": value.detach().contiguous()
        for name, parameter in decoder.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def set_moments(
    decoder: torch.nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]
) -> None:
    """Puts back what `moments` gave."""
    by_name: dict[str, dict[str, Tensor]] = {}
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    for known, value in stored.items():
        key, _, name = known.partition(".")
        shape = torch.Size() if key == "step" else shapes.get(name)
        if key not in MOMENTS or name not in shapes or value.shape != shape:
            raise ValueError(
                f"expected {', '.join(MOMENTS)} of each parameter in {OPTIMIZER}, got {known[:200]} "
                f"of shape {list(value.shape)}; {BACK}"
            )
        by_name.setdefault(name, {})[key] = value.clone()
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: by_name.get(names[p]) for i, p in enumerate(parameters)}
    partly = [names[parameters[i]] for i, own in state.items() if own and len(own) < len(MOMENTS)]
    if partly:
        raise ValueError(
            f"expected {', '.join(MOMENTS)} of {partly[0]} in {OPTIMIZER}, got some; {BACK}"
        )
    whole = optimizer.state_dict() | {"state": {i: own for i, own in state.items() if own}}
    optimizer.load_state_dict(whole)  # it moves each value to where this optimizer wants it


def checkpoints_of(out: Path) -> list[Path]:
    """The folders of a run's checkpoints, the newest first."""
    folders = [p for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdecimal()]
    return sorted(folders, key=_number, reverse=True)


def check_whole(folder: Path) -> dict[str, Any]:
    """The object in a checkpoint's checkpoint.json.

    Raises:
        ValueError: a file is missing or not what was written, or a log is shorter than it was.
    """
    try:
        manifest = read_object(own_file(folder, MANIFEST), remedy=BACK)
        known = manifest["format"], manifest["step"]
        if bool in map(type, known) or known != (FORMAT, _number(folder)):
            raise ValueError(
                f"expected format {FORMAT} of {folder.name} in {MANIFEST}, got another"
            )
        files, logs = manifest["files"].items(), manifest["logs"].items()
        kept = {*manifest["logs"]}
        whole = any({OPTIMIZER, *some}.issubset(manifest["files"]) for some in READ)
        if not whole or not {*LOGS[:2]} <= kept <= {*LOGS}:
            raise ValueError(f"expected {MANIFEST} to name each file, got others")
        for name, written in files:
            if Path(name).name != name or not own_file(folder, name).is_file():
                raise ValueError(f"{name[:200]} is missing")
            if _described(folder / name) != written:
                raise ValueError(f"{name} is not what was written")
        for name, size in logs:
            log_file = folder.parent.parent / name
            if type(size) is not int or not 0 <= size <= log_file.stat().st_size:
                raise ValueError(f"{name} ends before this step")
    except FileNotFoundError as error:
        raise ValueError(f"{Path(error.filename).name} is missing") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a checkpoint's {MANIFEST}, got another object") from error
    return manifest


def _restore(run: Run, steps: int) -> None:
    if (run.out / "final").is_dir():
        run.history = _read_history(run.out, steps=steps)
        run.evals = read_evals(run.out)
        _load_student(run.pair.student, run.out / "final")
        log.info("%s is finished after %d steps; nothing is left to do", run.out, steps)
        return
    manifest = _newest_whole(run)
    done = manifest["step"] if manifest else 0
    sizes = dict.fromkeys(LOGS, 0) | (manifest["logs"] if manifest else {})
    run.history = _read_history(run.out, steps=done, n_bytes=sizes[LOGS[0]])
    run.evals = read_evals(run.out, n_bytes=sizes[LOGS[2]])
    if run.last:
        _load_student(run.pair.student, run.last)
        try:
            stored = load_file(run.last / OPTIMIZER)
            set_moments(run.pair.student.decoder, run.optimizer, stored)
        except ValueError as error:
            raise ValueError(f"{run.last}: {error}") from error
        except (SafetensorError, RuntimeError, AttributeError) as error:  # no such type in torch
            raise ValueError(f"expected tensors in {run.last / OPTIMIZER}, got {error}") from error
    for name, size in sizes.items():
        if (run.out / name).exists():
            os.truncate(run.out / name, size)
    found = [*checkpoints_of(run.out), *(run.out / "failed").glob("step-*.json")]
    for path in (path for path in found if _number(path) > done):
        _remove(path)
    run.drop_oldest()
    log.info("%s goes on after step %d of %d", run.out, done, steps)


def _newest_whole(run: Run) -> dict[str, Any] | None:
    """Sets `run.last`; None where no checkpoint was made yet."""
    folders = checkpoints_of(run.out)
    for folder in folders:
        try:
            manifest = check_whole(folder)
        except ValueError as error:
            log.warning("%s is passed over: %s", folder, error)
        else:
            run.last = folder
            return manifest
    if folders:
        raise ValueError(
            f"expected a whole checkpoint in {run.out / 'checkpoints'}, got torn ones alone; put one "
            "back from a copy, or remove that folder to start from step 0"
        )
    return None


def _check_same(was: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Refuses to go on with other settings, each one named."""
    if "prompts_sha256" not in was or type(was.get("versions")) is not dict:
        raise ValueError(
            f"expected --out to be a run's folder, got {out}, whose config.json is not that of a run "
            "which can go on; name another"
        )
    flat = [{**one, **one["versions"]} for one in (was, now)]
    for one in flat:
        one["device"] = str(one.get("device")).partition(":")[0]  # which of several does not matter
    probes = [one.pop("teacher_probe", None) for one in flat]
    files = ("student", "teacher", "device", "prompts_sha256", "eval_prompts_sha256")
    options = {*(f.name for f in fields(Config)), *files}
    other = []
    for name in {**flat[0], **flat[1]}:
        old, new = (one.get(name) for one in flat)
        if old != new and name not in ("versions", *FREE):
            told = option_name(name.removesuffix("_sha256")) if name in options else name
            other.append(f"{told[:80]} ({str(old)[:200]} then, {str(new)[:200]} now)")
    drift = _drift(*probes)  # another server of one model rounds otherwise
    if not drift <= DRIFT:
        other.append(f"model behind --teacher ({drift:.3f} nats a token off on the probe)")
    if other:
        raise ValueError(
            f"expected the settings that the run in {out} began with, got another "
            f"{', '.join(other[:20])}; give the old ones, or start a new run in another --out (with a "
            "checkpoint's folder as --student to keep its weights)"
        )


def _drift(then: Any, now: Any) -> float:
    """As `drifted`; infinite if the two are not of one probe."""
    try:
        return 0.0 if then == now else drifted(then, now)
    except (TypeError, ValueError, ArithmeticError):
        return math.inf


def _read_history(out: Path, *, steps: int, n_bytes: int | None = None) -> list[dict[str, Any]]:
    path = out / LOGS[0]
    rows = _rows(path, n_bytes)
    strange = not _plain(rows, WATCHED)
    if strange or [row.get("step") for row in rows] != list(range(1, steps + 1)):
        raise ValueError(
            f"expected the lines of steps 1 to {steps} in {path}, got {len(rows)} others; put the "
            "file back as the run wrote it"
        )
    return rows


def read_evals(out: Path, *, n_bytes: int | None = None) -> list[dict[str, Any]]:
    """The evaluations of a run, in order.

    Raises:
        ValueError: a line of eval.jsonl that is no evaluation.
    """
    path = out / LOGS[2]
    rows = _rows(path, n_bytes)
    if not _plain(rows, BEST_BY) or any(type(row.get("step")) is not int for row in rows):
        raise ValueError(f"expected evaluations in {path}, got other objects; {BACK}")
    return rows


def _plain(rows: Sequence[dict[str, Any]], keys: Iterable[str]) -> bool:
    """Whether all rows have numbers under the keys, or null, and none that is absurd."""
    values = [row.get(key, "none") for row in rows for key in keys]
    return all(type(x) in (int, float, type(None)) and abs(x or 0) <= 1e30 for x in values)


def _rows(path: Path, n_bytes: int | None) -> list[dict[str, Any]]:
    lines = path.read_bytes()[:n_bytes].split(b"\n") if path.exists() else []
    return [_object(line, path) for line in lines if line]


def _save_student(student: LanguageModel, folder: Path) -> None:
    """As a model or, where an adapter is trained, as that alone."""
    decoder, source = student.decoder, student.folder
    name, place = student.base or (student.name, student.folder)
    if isinstance(decoder, HFDecoder):
        copy_tokenizer(source, folder)
        decoder.save(folder)
    elif adapter_of(decoder):
        save_adapter(decoder, folder, source=source, base=name, base_folder=place)
    else:
        save_decoder(decoder, folder, source=source, base=place)


def _load_student(student: LanguageModel, folder: Path) -> None:
    decoder = student.decoder
    if isinstance(decoder, HFDecoder):
        decoder.restore(folder)
        return
    if adapter_of(decoder):
        load_adapter(decoder, folder)
        return
    stored = load_decoder(folder, device=decoder.device, dtype=decoder.dtype)
    if stored.config != decoder.config:
        raise ValueError(f"expected the student's shape in {folder}, got another; {BACK}")
    decoder.load_state_dict(stored.state_dict())


def _failure(step: Step, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a failed step's file holds; null is a number that was not finite."""
    answers = [
        row
        | {
            "prompt_ids": r.answer.prompt_ids,
            "teacher_prompt_ids": r.answer.teacher_prompt_ids,
            "student_logp": r.student_logp_C.tolist(),
            "teacher_logp": r.teacher_logp_C.tolist(),
        }
        for row, r in zip(rows, step.rollouts, strict=True)
    ]
    return {"wrong": step.wrong, "metrics": step.metrics, "answers": measured.plain(answers)}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _object(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        return parse_object(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(".json"))


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}{PART}")
    try:
        part.write_text(text, encoding="utf-8")
        _flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block is done."""
    part = target.with_name(f".{target.name}{PART}")
    part.mkdir(parents=True)
    try:
        yield part
        for path in (*part.iterdir(), part):
            _flush(path)
        part.replace(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for folder in (target.parent, target.parent.parent):
        _flush(folder)


def _remove(path: Path) -> None:
    """A folder loses its name first, so that no half of it is taken for a checkpoint."""
    if path.is_dir():
        part = path if path.name.endswith(PART) else path.with_name(f".{path.name}{PART}")
        path.replace(part)
        shutil.rmtree(part)
    else:
        path.unlink()
