# SPDX-License-Identifier: Apache-2.0
"""Feeds every loader with spoiled input: each is loaded, or refused in words; nothing else happens.

    python tests/fuzz_loaders.py [--inputs 100000] [--seed 0] [--loader NAME] [--only NUMBER]

An input begins as whole files of small models and runs; values, bytes, headers, paths and lines of
them are changed, files become links, pipes and folders. A failure is: another exception than
ValueError or OSError; a message that does not say what was expected and where; a read outside the
folder in use, any write, process or socket; more than `SECONDS`, more than `MEMORY`. Inputs depend
on seed, loader and number alone, so that `--only` repeats one. Children run the inputs, so that a
crash or an endless loop of native code is a failure as well. The last line is JSON.
"""

import argparse
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from hostile_inputs import (
    as_text,
    changed,
    header_changed,
    spoiled,
    template_of,
    with_other_parts,
)
from minigold import checkpoint, pair, sandbox, score, weights
from minigold.chat import prompt_ids, render
from minigold.checkpoint import open_run
from minigold.cli_models import find_model
from minigold.config import Config
from minigold.data import Prompt, read_prompts
from minigold.load import LanguageModel, load, no_panic, read_tokenizer
from minigold.pair import check_student, lost_text, make_pair, matched
from minigold.report import write_report
from minigold.score import open_scores, score_file
from minigold.tiers import limited
from minigold.train import adamw, distill
from minigold.watch import collapses, failed_in_a_row
from minigold.weights import load_decoder
from tiny_folders import CHATML, TURNS, tiny_folder
from tiny_models import SCALINGS, raw_config
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe, unigram, wordpiece

__all__ = ["LOADERS", "Arena", "Failure", "fuzz", "main"]

ROOT = Path(__file__).parent.parent
SECONDS = 10.0  # of the processor, for an input; a template is given 0.2
MEMORY = 4 * 2**30  # bytes beyond what the process has at the start
HANGS = 60  # seconds without an input before the child is ended
LONGEST = 3000  # characters of a message
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
QUIET = {"student_plain": True, "teacher_plain": True}
SETTINGS = Config(
    steps=4, batch_size=2, max_new_tokens=6, lr=0.01, save_every=2, eval_every=2, **QUIET
)


class Failure(NamedTuple):
    loader: str
    number: int
    reason: str


class TooSlowError(BaseException):
    """Not an Exception, so that no loader takes it for its own."""


# -- what may be touched -------------------------------------------------------------------------

FILES = ("open", "os.listdir", "os.scandir", "os.chdir")
CHANGES = (
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
    "os.truncate", "os.utime", "os.mkfifo", "os.mknod", "os.setxattr", "shutil.rmtree", "shutil.move",
)  # fmt: skip
NEVER = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.kill",
    "os.putenv", "pty.spawn", "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo",
    "socket.sendto", "urllib.Request", "webbrowser.open", "ftplib.connect", "smtplib.connect",
)  # fmt: skip


class Watch:
    """Notes what the process does to files outside a folder, while it is on."""

    def __init__(self) -> None:
        self.on, self.folder, self.seen = False, "", list[str]()
        code = {sys.prefix, sys.base_prefix, str(ROOT), *filter(None, sys.path)}
        self.code = tuple(os.path.realpath(path) + os.sep for path in code)
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in NEVER:
            self.seen.append(f"{event} {args[:2]!r}"[:200])
        elif event in FILES or event in CHANGES:
            changes = event in CHANGES or (event == "open" and _writes(*args[1:3]))
            paths = args[:2] if event in ("os.rename", "os.link", "shutil.move") else args[:1]
            for path in paths:
                if isinstance(path, str | bytes | os.PathLike):
                    self.check(path, changes=changes, event=event)

    def check(self, path: Any, *, changes: bool = False, event: str = "native read") -> None:
        real = os.path.realpath(os.fsdecode(path))
        allowed = (self.folder,) if changes else (self.folder, *self.code)
        if not (real + os.sep).startswith(allowed):
            self.seen.append(f"{event} of {real}"[:300])

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Nothing but this folder may be read or changed."""
        self.folder, self.seen = os.path.realpath(folder) + os.sep, []
        self.on = True
        try:
            yield
        finally:
            self.on = False


def _writes(mode: Any, flags: Any) -> bool:
    """Of `open`: whether it can change a file. Both kinds of `open` give the flags."""
    return bool(
        isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    )


WATCH = Watch()


def _watched(read: Callable[..., Any]) -> Callable[..., Any]:
    """A reader in native code, which the interpreter does not tell us about."""

    def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
        if WATCH.on:
            WATCH.check(path)
        return read(path, *args, **kwargs)

    return watched


# -- whole files, and the folder that is spoiled ---------------------------------------------------


def replaced(path: Path, rng: random.Random, outside: Path) -> None:
    """In place of a file: nothing, a link, a pipe, a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    suffix = path.suffix if path.suffix in (".json", ".safetensors", ".jsonl") else ".json"
    kind, siblings = rng.randrange(10), [p for p in path.parent.iterdir() if p != path]
    if kind < 4:
        path.symlink_to(
            rng.choice([outside / f"secret{suffix}", "/etc/passwd", "/dev/zero", outside])
        )
    elif kind == 4:
        path.symlink_to(Path("..") / ".." / "outside" / f"secret{suffix}")
    elif kind == 5:
        path.symlink_to(path.name)
    elif kind == 6:
        os.mkfifo(path)
    elif kind == 7:
        path.mkdir()
    elif kind == 8 and siblings:
        path.symlink_to(rng.choice(siblings).name)


class Arena:
    """Small models and a run, and a folder beside them that nothing may touch."""

    def __init__(self, root: Path) -> None:
        self.root, self.base, self.work, self.outside = (
            root,
            root / "base",
            root / "work",
            root / "outside",
        )
        self.outside.mkdir(parents=True)
        self.work.mkdir()
        tokenizers = {
            "llama": byte_bpe(),
            "gemma3": sentencepiece_bpe(),
            "qwen3": wordpiece(),
            "smollm3": unigram(),
        }
        for family, tokenizer in tokenizers.items():
            end = {"gemma3": "</s>", "qwen3": "[SEP]", "llama": "<|im_end|>"}.get(family, "</s>")
            template = CHATML if family == "llama" else TURNS
            folder = tiny_folder(self.base / family, family, tokenizer, end=end, template=template)
            (folder / "special_tokens_map.json").write_text(
                json.dumps({"eos_token": {"content": end}})
            )
        self.models = [self.base / family for family in tokenizers]
        self._shard(self.base / "llama", self.base / "sharded")
        for name in ("secret.json", "secret.jsonl", "chat_template.jinja"):
            (self.outside / name).write_text('{"prompt": "a", "step": 1}\n', "utf-8")
        shutil.copyfile(
            self.base / "llama" / "model.safetensors", self.outside / "secret.safetensors"
        )
        rows = [{"prompt": text, "completion": " fox", "answer": "b", "id": i, "messages": None}
                for i, text in enumerate(["hello", "the fox 🙂"])]  # fmt: skip
        rows[1] = {
            "messages": [*TALK[:1], {"role": "assistant", "content": "x"}],
            "teacher_prompt": TALK[:1],
        }
        self.rows = rows
        (self.base / "prompts.jsonl").write_text(
            '{"prompt": "hello"}\n{"prompt": "the fox"}\n', "utf-8"
        )
        self.prompts = read_prompts(self.base / "prompts.jsonl")
        self.pair_of = {name: load(self.base / name) for name in ("llama", "gemma3")}
        clock = patch("time.perf_counter", itertools.count(step=0.25).__next__)
        with (
            clock,
            patch("minigold.metrics._peak_memory", lambda _device: 0.5),
        ):  # always the same bytes
            distill(
                *self.fresh(),
                self.prompts,
                SETTINGS,
                eval_prompts=self.prompts,
                out=self.base / "run",
            )
        shutil.copytree(self.base / "run", self.base / "stopped")
        shutil.rmtree(self.base / "stopped" / "final")
        shutil.rmtree(self.base / "stopped" / "checkpoints" / "step-4")
        answers = [Prompt("hello", completion=" fox", line=1), Prompt("a", completion="", line=2)]
        score_file(
            limited(self.pair_of["gemma3"], 3),
            answers,
            self.base / "scores.safetensors",
            plain=True,
        )
        self.sides = [(m.tokenizer, [m.end_id], m.n_tokens) for m in self.pair_of.values()]
        self.matched = matched(*self.sides)
        with guarded():
            os.environ["MINIGOLD_CACHE"], pair.KEEP_FROM = str(self.base / "cache"), 0
            matched(*self.sides)
        self.untouched = self._look()

    def fresh(self) -> tuple[LanguageModel, LanguageModel]:
        return load(self.base / "llama"), self.pair_of["gemma3"]

    @staticmethod
    def _shard(source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {
            name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)
        }
        for file in set(places.values()):
            save_file({n: x for n, x in tensors.items() if places[n] == file}, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def _look(self) -> dict[str, Any]:
        """What lies beside the folder in use."""
        found = {}
        for path in sorted([*self.outside.rglob("*"), *self.base.rglob("*"), *self.root.iterdir()]):
            data = path.read_bytes() if path.is_file() else b""
            found[str(path)] = (path.lstat().st_mode, hashlib.sha256(data).hexdigest())
        return found

    def check_untouched(self) -> str:
        now = self._look()
        return "; ".join(p for p in {*now, *self.untouched} if now.get(p) != self.untouched.get(p))

    def copy(self, name: str) -> Path:
        """A new copy of a folder of `base`."""
        target = self.work / name
        for old in self.work.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        shutil.copytree(self.base / name, target)
        return target


def _spoil(path: Path, rng: random.Random, arena: Arena) -> None:
    """Changes a file in the way that suits it, or as bytes where it was spoiled before."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return
    data = path.read_bytes() if path.is_file() else b""
    try:
        _spoil_whole(path, data, rng, arena)
    except (ValueError, RecursionError, LookupError):
        path.write_bytes(spoiled(data, rng))


def _spoil_whole(path: Path, data: bytes, rng: random.Random, arena: Arena) -> None:
    chance = rng.random()
    if chance < 0.08:
        replaced(path, rng, arena.outside)
    elif chance < 0.2:
        path.write_bytes(spoiled(data, rng, (arena.outside / "secret.safetensors").read_bytes()))
    elif path.suffix == ".safetensors":
        path.write_bytes(header_changed(data, rng))
    elif path.suffix == ".json":
        path.write_bytes(as_text(changed(json.loads(data), rng), rng))
    elif path.suffix == ".jsonl":
        lines = [line for line in data.split(b"\n") if line]
        for _ in range(rng.choice([1, 1, 2])):
            i = rng.randrange(len(lines)) if lines else 0
            try:
                row = json.loads(lines[i])
            except (ValueError, IndexError, RecursionError):
                row = {}
            lines[i : i + rng.choice([0, 1, 1, 1])] = [
                as_text(changed(row, rng), rng).replace(b"\n", b" ")
            ]
        path.write_bytes(b"\n".join(lines) + rng.choice([b"", b"\n", b"\n", b"\r\n\n"]))
    else:
        path.write_text(template_of(rng), "utf-8")


Loader = Callable[[Arena, random.Random], Callable[[], Any]]  # spoils files, then loads them


def of_config(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    folder = arena.copy(rng.choice(arena.models).name)
    path = folder / "config.json"
    if rng.random() < 0.5:
        family = rng.choice(
            ["llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma3_text", "gemma3"]
        )
        scaling = (
            rng.choice(["", "", *(f" {name}" for name in SCALINGS)]) if family != "gemma3" else ""
        )
        path.write_text(json.dumps(raw_config(family + scaling)))
    _spoil(path, rng, arena)
    return lambda: load_decoder(folder, device="meta")


def of_index(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    folder = arena.copy("sharded")
    path = folder / "model.safetensors.index.json"
    if rng.random() < 0.5:
        index = json.loads(path.read_text())
        for _ in range(rng.choice([1, 2, 30])):
            name = rng.choice(list(index["weight_map"]))
            index["weight_map"][name] = rng.choice([
                "../outside/secret.safetensors", "../../outside/secret.safetensors", "/etc/passwd", "/dev/zero", "", ".", "..",
                str(arena.outside / "secret.safetensors"), "config.json", "tokenizer.json", "a/../model-00001-of-00002.safetensors",
                "./model-00001-of-00002.safetensors", "x" * 300 + ".safetensors", "a\x00.safetensors", "..\\x.safetensors", "link.safetensors",
                "model-00001-of-00002.safetensors", "é.safetensors", "CON.safetensors", "~/x.safetensors", "model-00001-of-00002.safetensors/",
            ])  # fmt: skip
        (folder / "link.safetensors").symlink_to(
            rng.choice([arena.outside / "secret.safetensors", "/dev/zero", "/etc/passwd"])
        )
        path.write_text(json.dumps(index))
    else:
        _spoil(rng.choice([path, path, folder / "model-00001-of-00002.safetensors"]), rng, arena)
    return lambda: load_decoder(folder, device=rng.choice(["meta", "cpu"]))


def of_weights(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    folder = arena.copy(rng.choice(arena.models).name)
    _spoil(folder / "model.safetensors", rng, arena)
    dtype = rng.choice([torch.float32, torch.bfloat16])
    return lambda: load_decoder(folder, device=rng.choice(["meta", "cpu", "cpu"]), dtype=dtype)


def of_tokenizer(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    folder = arena.copy(rng.choice(arena.models).name)
    path = folder / "tokenizer.json"
    if rng.random() < 0.6:  # not the thousands of entries of the vocabulary
        whole = json.loads(path.read_text("utf-8"))
        model = whole.pop("model")
        lists = {key: model.pop(key) for key in ("vocab", "merges") if key in model}
        if rng.random() < 0.3:
            whole = changed({**whole, "model": model}, rng)
            if isinstance(whole, dict) and isinstance(whole.get("model"), dict):
                whole["model"] |= lists
        else:
            whole = with_other_parts({**whole, "model": {**model, **lists}}, rng)
        path.write_bytes(as_text(whole, rng) if rng.random() < 0.3 else json.dumps(whole).encode())
    else:
        _spoil(path, rng, arena)

    def run() -> None:
        tokenizer = read_tokenizer(path)
        with no_panic(path):
            check_student(tokenizer)
            lost_text(tokenizer)

    return run


def of_folder(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    folder = arena.copy(rng.choice(arena.models).name)
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(
            [
                "tokenizer_config.json",
                "special_tokens_map.json",
                "generation_config.json",
                "chat_template.jinja",
            ]
        )
        settings = folder / "tokenizer_config.json"
        if rng.random() < 0.3 and settings.is_file() and not settings.is_symlink():
            settings.write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": rng.choice(
                [TURNS, [{"name": "default", "template": TURNS}], template_of(rng)])}))  # fmt: skip
        _spoil(folder / name, rng, arena)

    def run() -> None:
        model = load(folder, device="meta")
        prompt_ids(model, "Hi", plain=model.template is None)

    return run


def of_template(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    text, talk = template_of(rng), TALK if rng.random() < 0.7 else changed(TALK, rng)
    if not isinstance(talk, list):
        talk = TALK
    return lambda: render(text, talk, bos_token="<s>", eos_token=rng.choice(["", "</s>"]))


def of_prompts(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    arena.copy("cache")
    path = arena.work / "prompts.jsonl"
    path.write_text("".join(json.dumps(rng.choice(arena.rows)) + "\n" for _ in range(3)))
    _spoil(path, rng, arena)
    if path.is_symlink():  # the user names this file, wherever it leads
        path.unlink()
    return lambda: read_prompts(path)


def of_report(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    run = arena.copy("run")
    for _ in range(rng.choice([1, 1, 2])):
        _spoil(
            run
            / rng.choice(
                ["config.json", "metrics.jsonl", "samples.jsonl", "samples.jsonl", "eval.jsonl"]
            ),
            rng,
            arena,
        )
    return lambda: write_report(run)


def of_checkpoint(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    run = arena.copy(rng.choice(["stopped", "stopped", "stopped", "run"]))
    step = next((run / "checkpoints").iterdir())
    files = ["checkpoint.json"] * 4 + [
        "optimizer.safetensors",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.choice(
            [
                step / rng.choice(files),
                step / rng.choice(files),
                run / "metrics.jsonl",
                run / "config.json",
                run / "samples.jsonl",
                run / "eval.jsonl",
            ]
        )
        manifest = step / "checkpoint.json"
        if rng.random() < 0.15:
            try:
                plain = manifest.is_file() and not manifest.is_symlink()
                named = json.loads(manifest.read_bytes()) if plain else {}
            except (OSError, ValueError, RecursionError):
                named = {}
            part = named.get(rng.choice(["files", "logs"])) if isinstance(named, dict) else None
            if isinstance(part, dict):
                part[rng.choice(["../../../../outside/secret.json", "../config.json", str(arena.outside / "secret.json"), "/etc/passwd", "a\x00"])] = rng.choice(
                    [0, 5, {"bytes": 27, "sha256": "0"}, None])  # fmt: skip
                manifest.write_text(json.dumps(named))
        elif rng.random() < 0.1:
            whole = rng.choice([run / "checkpoints", step, run / "final", run / "failed"])
            if whole.exists():
                shutil.rmtree(whole)
            whole.symlink_to(
                rng.choice(
                    [arena.outside, Path("/tmp"), Path("step-9"), arena.base / "run" / "final"]
                )
            )
            break
        elif place.exists() and not place.is_dir():
            _spoil(place, rng, arena)
    _sign(step, rng)

    student, teacher = arena.fresh()

    def run_it() -> None:
        both = make_pair(student, teacher)
        student.decoder.requires_grad_(True)
        optimizer = adamw(student.decoder, SETTINGS)
        with open_run(run, both, optimizer, arena.prompts, SETTINGS, resume=True,
                      eval_prompts=arena.prompts) as opened:  # fmt: skip
            failed_in_a_row(opened.history)
            collapses(opened.history * 20, answers=2)
        for parameter in student.decoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        load_decoder(find_model(str(run)), device="meta")

    return run_it


def _sign(step: Path, rng: random.Random) -> None:
    """In half of the cases checkpoint.json says what the files now are."""
    manifest = step / "checkpoint.json"
    try:
        named = (
            json.loads(manifest.read_bytes()) if manifest.is_file() and rng.random() < 0.5 else None
        )
        for name in named["files"] if named else ():
            data = (step / name).read_bytes() if (step / name).is_file() else b""
            named["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if named:
            manifest.write_text(json.dumps(named))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return


def of_cache(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    folder = arena.copy("cache")
    path = next(folder.iterdir())
    _spoil(path, rng, arena)
    if path.is_symlink():
        path.unlink()

    os.environ["MINIGOLD_CACHE"], pair.KEEP_FROM = str(folder), 0

    def run() -> None:
        assert matched(*arena.sides) == arena.matched

    return run


def of_scores(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    folder, path = arena.copy("gemma3"), arena.work / "scores.safetensors"
    shutil.copyfile(arena.base / "scores.safetensors", path)
    if rng.random() < 0.5:
        _spoil(path, rng, arena)
    else:  # what is wrong has the right hash
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata())
        arrays = load_arrays(path)
        del metadata["sha256"]
        if rng.random() < 0.5:
            metadata = {str(k): as_str(v) for k, v in as_dict(changed(metadata, rng)).items()}
        else:
            _change_array(arrays, rng)
        try:
            save_arrays(arrays, path, {**metadata, "sha256": score._digest(metadata, arrays)})
        except UnicodeError:  # half a surrogate pair
            path.write_bytes(b"")
    return lambda: open_scores(path, folder)


def as_dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {"format": value}


def as_str(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _change_array(arrays: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice([*arrays])
    one, kind = arrays[name], rng.randrange(5)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = one[: rng.randrange(len(one) + 1)]
    elif kind == 2:
        dtype = rng.choice(["int8", "uint16", "int64", "float16", "float64", "bool"])
        with np.errstate(all="ignore"):
            arrays[name] = one.astype(dtype)
    elif kind == 3:
        arrays[name] = one.reshape(rng.choice([(-1,), (1, -1), (-1, 1), (*one.shape, 1)]))
    else:
        values = [-1, 0, 7, 127, 10**6, 2**31 - 1]
        arrays[name] = one.copy()
        with np.errstate(all="ignore"):
            arrays[name].flat[rng.randrange(one.size)] = np.array(rng.choice(values)).astype(
                one.dtype
            )


LOADERS: dict[str, tuple[Loader, int, str]] = {  # weight, what a message names
    "config": (of_config, 18, r"config\.json|/work/"),
    "index": (of_index, 10, "/work/"),
    "weights": (of_weights, 10, "/work/"),
    "tokenizer": (of_tokenizer, 14, "/work/|student"),
    "folder": (of_folder, 10, "/work/|chat template|prompt"),
    "template": (of_template, 12, "chat template|messages"),
    "prompts": (of_prompts, 14, "/work/"),
    "report": (of_report, 5, "/work/"),
    "checkpoint": (of_checkpoint, 3, "/work/|/outside|--out"),
    "cache": (of_cache, 2, "/work/"),
    "scores": (of_scores, 2, "/work/"),
}


# -- the judge -----------------------------------------------------------------------------------


def _slow(_number: int, _frame: Any) -> None:
    raise TooSlowError


def judged(name: str, number: int, seed: int, arena: Arena) -> tuple[str, str]:
    """`loaded`, `refused` or `failed`, and why."""
    make, _, names = LOADERS[name]
    pair.KEEP_FROM = 10**9  # only the loader of the cache reads it
    run = make(arena, random.Random(f"{seed} {name} {number}"))
    home = Path.cwd()
    os.chdir(arena.work)
    try:
        with WATCH.over(arena.work), warnings.catch_warnings():
            warnings.simplefilter("error")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                run()
                verdict, why = "loaded", ""
            except (ValueError, OSError) as error:
                verdict, why = "refused", str(error)
                if "expected" not in why or not re.search(names, why) or len(why) > LONGEST:
                    verdict, why = (
                        "failed",
                        f"message of {len(why)}: {type(error).__name__}: {why[:300]}",
                    )
            except BaseException as error:  # noqa: BLE001 (that none of them comes out is the test)
                verdict, why = "failed", f"{type(error).__name__}: {str(error)[:300]}"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        os.chdir(home)
    if WATCH.seen:
        verdict, why = "failed", f"touched: {'; '.join(dict.fromkeys(WATCH.seen))[:500]}"
    return verdict, why


@contextmanager
def guarded() -> Iterator[None]:
    """Limits and watched readers, put back afterwards."""
    native = [(weights, "safe_open"), (pair, "safe_open"), (checkpoint, "load_file")]
    kept = [(module, name, getattr(module, name)) for module, name in native]
    kept += [(sandbox, "SECONDS", sandbox.SECONDS), (pair, "KEEP_FROM", pair.KEEP_FROM)]
    logging.disable(logging.CRITICAL)
    memory, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, _slow)
    cache = os.environ.get("MINIGOLD_CACHE")
    for module, name in native:
        setattr(module, name, _watched(getattr(module, name)))
    sandbox.SECONDS = 0.2
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if Path("/proc/self/statm").exists()
        else None
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, memory[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGPROF, handler)
        logging.disable(logging.NOTSET)
        for module, name, value in kept:
            setattr(module, name, value)
        os.environ.pop("MINIGOLD_CACHE", None)
        if cache is not None:
            os.environ["MINIGOLD_CACHE"] = cache


def fuzz(
    name: str, numbers: range, seed: int, arena: Arena, note: Callable[[str, int, str], None]
) -> None:
    """Judges the inputs of one loader; what lies beside the folder in use is looked at now and then."""
    for number in numbers:
        verdict, why = judged(name, number, seed, arena)
        if (number + 1) % 500 == 0 or number == numbers[-1]:
            touched = arena.check_untouched()
            if touched:
                verdict, why = "failed", f"changed since the last look: {touched[:300]}"
        note(verdict, number, why)


def _end_of(child: int, progress: Path) -> int:
    """The status it ends with; it is killed if it writes nothing to `progress` while it runs.

    Counted in polls, since both processes may be stopped, and not while the child alone is.
    """
    size, polls, runs = 0, 0, True
    while True:
        ended, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if ended and not os.WIFSTOPPED(status) and not os.WIFCONTINUED(status):
            return status
        runs = os.WIFCONTINUED(status) if ended else runs
        now = progress.stat().st_size
        size, polls = (now, 0) if now != size else (size, polls + runs)
        if polls > HANGS * 20:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)


def _in_children(
    name: str, count: int, seed: int, arena: Arena
) -> tuple[dict[str, int], list[Failure]]:
    """Counts of the verdicts. A child that dies or hangs is one failure, and another goes on."""
    counts, failures, done = dict.fromkeys(("loaded", "refused", "failed"), 0), list[Failure](), 0
    progress = arena.root.parent / f"{arena.root.name}-progress"
    while done < count:
        progress.write_text("")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with progress.open("a", buffering=1) as file, guarded():
                    fuzz(name, range(done, count), seed, arena,
                         lambda verdict, number, why: print(json.dumps([verdict, number, why]), file=file))  # fmt: skip
                code = 0
            except BaseException:  # noqa: BLE001 (a child never goes on as if it were the parent)
                traceback.print_exc()
            os._exit(code)
        status = _end_of(child, progress)
        for line in progress.read_text().splitlines():
            verdict, number, why = json.loads(line)
            counts[verdict] += 1
            done = number + 1
            if verdict == "failed":
                failures.append(Failure(name, number, why))
        if status != 0 and done < count:
            counts["failed"] += 1
            failures.append(
                Failure(name, done, f"the process ended with {os.waitstatus_to_exitcode(status)}")
            )
            done += 1
    progress.unlink(missing_ok=True)
    return counts, failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loader", choices=LOADERS, help="this one alone")
    parser.add_argument("--only", type=int, help="this input of --loader alone, in this process")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = [args.loader] if args.loader else list(LOADERS)
    total = sum(LOADERS[name][1] for name in names)
    with tempfile.TemporaryDirectory() as temporary:
        arena = Arena(Path(temporary) / "arena")
        if args.only is not None:
            with guarded():
                print(*judged(args.loader, args.only, args.seed, arena), sep="\n")
            return 0
        whole: dict[str, Any] = {"inputs": 0, "failed": 0, "loaders": {}}
        for name in names:
            begun = time.perf_counter()
            counts, failures = _in_children(
                name, math.ceil(args.inputs * LOADERS[name][1] / total), args.seed, arena
            )
            for one in failures[:20]:
                print(f"  {one.loader} {one.number}: {one.reason}")
            print(f"{name:10} {counts['loaded']:6} loaded {counts['refused']:6} refused {counts['failed']:4} failed "
                  f"{time.perf_counter() - begun:6.0f} s", flush=True)  # fmt: skip
            whole["loaders"][name] = counts
            whole["inputs"] += sum(counts.values())
            whole["failed"] += counts["failed"]
    print(json.dumps({**whole, "seed": args.seed}))
    return 1 if whole["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
