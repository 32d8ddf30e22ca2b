# SPDX-License-Identifier: Apache-2.0
"""Files of strangers: what lies, leaves its folder or eats up the machine is refused in words."""

import ast
import dataclasses
import hashlib
import json
import math
import os
import pickle
import pickletools
import random
import re
import signal
import struct
import subprocess
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fuzz_loaders
from fuzz_loaders import LOADERS, Arena, fuzz, guarded, judged
from hostile_inputs import changed, header_changed
from minigold import sandbox
from minigold.chat import render
from minigold.checkpoint import check_whole, open_run
from minigold.cli_models import find_model
from minigold.data import DEEPEST, LARGEST, own_file, read_object, read_prompts
from minigold.demo import DEMO, demo_models
from minigold.demo_task import prompts as demo_prompts
from minigold.load import load, read_tokenizer
from minigold.pair import make_pair
from minigold.report import write_report
from minigold.train import Config, adamw, distill
from minigold.weights import load_decoder, save_decoder
from tiny_folders import CHATML, edit_json, tiny_folder
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

PACKAGE = Path(__file__).parent.parent / "minigold"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUICK = 1000  # inputs of the fuzzer here; `make nightly` tries 100,000


# ------------------------------------------------------------------------------------ the fuzzer
@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(tmp_path_factory.mktemp("fuzz") / "arena")


@pytest.mark.parametrize("name", LOADERS)
def test_whatever_is_fed_to_a_loader_is_loaded_or_refused(arena: Arena, name: str) -> None:
    total = sum(weight for _, weight, _ in LOADERS.values())
    found: dict[str, list[str]] = {"loaded": [], "refused": [], "failed": []}
    with guarded():
        fuzz(name, range(math.ceil(QUICK * LOADERS[name][1] / total)), 0, arena,
             lambda verdict, number, why: found[verdict].append(f"{name} {number}: {why}"))  # fmt: skip
    assert found["failed"] == []
    assert found["loaded"]  # the changes are small enough to come through at times
    assert found["refused"] or name == "cache"  # what the cache cannot give is made anew


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda a: (a.outside / "new.txt").write_text("x"), "open of .*outside/new"),
        (lambda a: (a.outside / "secret.json").read_text(), "open of .*outside/secret"),
        (lambda a: (a.work / "x").symlink_to("y"), "loaded"),
        (lambda a: (a.outside / "x").mkdir(), "os.mkdir of .*outside/x"),
        (lambda a: list(a.outside.iterdir()), "os.(listdir|scandir) of .*outside"),
        (lambda _: subprocess.run(["true"], check=True), "subprocess.Popen"),
        (lambda _: pickle.loads(pickle.dumps(Path)), "pickle.find_class"),
        (lambda _: 1 / 0, "ZeroDivisionError"),
        (lambda _: (x for x in ()).throw(KeyboardInterrupt), "KeyboardInterrupt"),
        (lambda _: json.loads("x"), "message of .*JSONDecodeError"),
        (lambda _: torch.zeros(2**34), "RuntimeError"),
        (lambda _: warnings.warn("w", stacklevel=1), "UserWarning"),
    ],
)  # fmt: skip
def test_the_fuzzer_sees_what_it_looks_for(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, act: Callable[[Arena], Any], reason: str
) -> None:
    monkeypatch.setitem(LOADERS, "one", (lambda arena, _: lambda: act(arena), 1, "x"))
    before = arena.check_untouched()
    with guarded():
        verdict, why = judged("one", 0, 0, arena)
    assert verdict == ("loaded" if reason == "loaded" else "failed")
    assert reason == "loaded" or re.search(reason, why), why
    assert before == ""
    for name in ("new.txt", "x"):
        path = arena.outside / name
        if path.exists():
            assert arena.check_untouched() != ""
            path.rmdir() if path.is_dir() else path.unlink()


def stop(_arena: Arena, rng: random.Random) -> Callable[[], Any]:
    """Stopped from outside for longer than a hang may last."""
    if rng.random() < 0.5:
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    return lambda: None


CHILDREN: dict[str, tuple[Callable[..., Callable[[], Any]], list[str]]] = {
    "ends itself": (lambda *_: lambda: os._exit(3), ["the process ended with 3"] * 2),
    "hangs": (lambda *_: lambda: time.sleep(9), ["the process ended with -9"] * 2),
    "is stopped": (stop, []),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has threads and forks
@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_of_the_fuzzer_fails_alone(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    act, reasons = CHILDREN[name]
    monkeypatch.setitem(LOADERS, "one", (act, 1, "x"))
    monkeypatch.setattr(fuzz_loaders, "HANGS", 0.4)
    counts, failures = fuzz_loaders._in_children("one", 2, 0, arena)
    assert [one.reason for one in failures] == reasons
    assert counts == {"loaded": 2 - len(reasons), "refused": 0, "failed": len(reasons)}


def test_inputs_of_the_fuzzer_depend_on_their_number_alone() -> None:
    def drawn(number: int) -> str:
        rng = random.Random(number)
        return json.dumps(changed({"a": [1, {"b": "c"}], "d": {}}, rng)) + repr(
            header_changed(save_file_bytes(), rng)
        )

    numbers = range(500)
    assert [*map(drawn, numbers)] == [*map(drawn, reversed(numbers))][::-1]


# ---------------------------------------------------------------------------------- model folders
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model", "llama", byte_bpe(), end="<|im_end|>", template=CHATML)


def header(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(
    folder: Path, change: Callable[[dict[str, Any]], Any], size: int | None = None
) -> None:
    found, body = header(folder)
    change(found)
    text = json.dumps(found).encode()
    (folder / WEIGHTS).write_bytes(
        struct.pack("<Q", len(text) if size is None else size) + text + body
    )


def index(folder: Path, shard: str) -> None:
    names = [name for name in header(folder)[0] if name != "__metadata__"]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)


NORM = "model.norm.weight"
LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard above": (lambda f: index(f, f"../{WEIGHTS}"), "expected shards that lie beside .*index.json"),
    "shard by its whole path": (lambda f: index(f, str(f.parent / WEIGHTS)), "expected shards that lie"),
    "shard that is a link": (
        lambda f: (index(f, "a.safetensors"), (f / "a.safetensors").symlink_to(f.parent / WEIGHTS)),
        r"expected 'a.safetensors' to lie in .*model, got .*; put the file itself there"),
    "shard that is a device": (
        lambda f: (index(f, "a.safetensors"), (f / "a.safetensors").symlink_to("/dev/zero")),
        "expected 'a.safetensors' to lie in .*, got /dev/zero"),
    "shard of another kind": (lambda f: index(f, "tokenizer.json"), "beside .*as .safetensors, got 'tok"),
    "shard with an endless name": (lambda f: index(f, "x" * 5000), "expected shards that lie beside"),
    "header of an exabyte": (lambda f: with_header(f, len, 2**60), "a header of at most 16,777,216 by"),
    "header beyond the file": (lambda f: with_header(f, len, 10**6), "expected a whole safetensors file"),
    "header of nothing": (lambda f: with_header(f, len, 0), "expected a whole safetensors file .*header"),
    "offsets beyond the file": (
        lambda f: with_header(f, lambda h: h[NORM].update(data_offsets=[0, 2**40])), "whole safetensors"),
    "offsets backwards": (
        lambda f: with_header(f, lambda h: h[NORM]["data_offsets"].reverse()), "whole safetensors file"),
    "two tensors in one place": (
        lambda f: with_header(f, lambda h: h[NORM].update(data_offsets=h["model.embed_tokens.weight"]["data_offsets"])),
        "expected a whole safetensors file"),
    "shape past 2**64": (
        lambda f: with_header(f, lambda h: h[NORM].update(shape=[2**40, 2**40])), "overflow computing buff"),
    "shape of nothing past 2**64": (
        lambda f: with_header(f, lambda h: h.update(x={"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]})),
        "expected .*model"),
    "type of another size": (
        lambda f: with_header(f, lambda h: h[NORM].update(dtype="F64")), "expected a whole safetensors file"),
    "layers without end": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=10**9),
        r"config.json: expected a positive whole number num_hidden_layers .*at most 1,024.*got 1000000000"),
    "absurd width": (lambda f: edit_json(f / "config.json", hidden_size=2**40), "hidden_size .*at most 16,"),
    "absurd heads": (
        lambda f: edit_json(f / "config.json", num_attention_heads=2**30), "num_attention_heads .*at most"),
    "not a number": (
        lambda f: edit_json(f / "config.json", rms_norm_eps=math.nan), "config.json: expected JSON, got NaN"),
    "a key twice": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "model_type": "qwen3"}'),
        "config.json: expected each key once, got 'model_type' twice"),
    "JSON bomb": (
        lambda f: (f / "config.json").write_text('{"a":' + "[" * 10**6 + "]" * 10**6 + "}"),
        "config.json: expected one JSON object, got deep nesting"),
    "deep JSON": (
        lambda f: (f / "config.json").write_text('{"a":' * 101 + "1" + "}" * 101),
        "config.json: expected at most 100 levels, got deep nesting"),
    "wide JSON": (
        lambda f: (f / "config.json").write_text('{"a": [' + "[]," * 2**23 + "1]}"),
        "config.json: expected an object of at most 16,777,216 bytes"),
    "long number": (
        lambda f: (f / "config.json").write_text('{"a": ' + "1" * 10**6 + "}"), "config.json: .*below 1.8e308"),
    "half of a surrogate pair": (
        lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}'),
        "tokenizer_config.json: expected text, got half of a surrogate pair"),
    "tokenizer of a gibibyte": (
        lambda f: os.truncate(f / "tokenizer.json", 2**30),
        "expected a tokenizer of at most 134,217,728 bytes in .*tokenizer.json, got 1,073,741,824"),
    "config that is a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), "expected config.json in"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_folders_that_lie_are_refused_by_name(folder: Path, lie: str) -> None:
    spoil, message = LIES[lie]
    load(folder, device="meta")
    spoil(folder)
    for device in ("cpu", "meta"):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load(folder, device=device)
        assert str(folder) in str(caught.value)
        assert len(str(caught.value)) < 1500


def with_part(folder: Path, **parts: Any) -> None:
    edit_json(folder / "tokenizer.json", **parts)


def with_model(folder: Path, **changes: Any) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    whole["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(whole))


CHARSMAP = "////f0FBQUE="  # a table of 2 GiB in eight bytes
TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "map of characters that lies": (
        lambda f: with_part(f, normalizer={"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
        "got precompiled_charsmap that is shorter than it says"),
    "the same, its name in escapes": (
        lambda f: (f / "tokenizer.json").write_text(json.dumps({**json.loads((f / "tokenizer.json").read_text()), "normalizer": {
            "type": "Precompiled", "charsmap": CHARSMAP}}).replace('"charsmap"', '"precompiled_\\u0063harsm\\u0061p"')),
        "got precompiled_charsmap that is shorter than it says"),
    "map that panics": (
        lambda f: with_part(f, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "Precompiled"),
    "prefix that merges do not have": (
        lambda f: with_model(f, continuing_subword_prefix="\x00"), "got continuing_subword_prefix '.x00' that"),
    "pieces of no characters": (
        lambda f: with_part(f, pre_tokenizer={"type": "FixedLength", "length": 0}), "chunk size must be non-zero"),
    "regex that does not end": (
        lambda f: with_part(f, pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}),
        "Oniguruma|unmatched"),
    "ids without end": (
        lambda f: with_model(f, vocab={**json.loads((f / "tokenizer.json").read_text())["model"]["vocab"], "zz": 2**32 - 1}),
        "expected ids below 2,097,152 in .*tokenizer.json, got 4,294,967,295"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_would_end_the_process_are_refused(folder: Path, name: str) -> None:
    spoil, message = TOKENIZERS[name]
    path = folder / "tokenizer.json"
    read_tokenizer(path)
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        read_tokenizer(path)
    assert str(path) in str(caught.value)


def test_panics_while_a_tokenizer_is_probed_name_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    for name, side in (("lost_text", "teacher"), ("check_student", "student")):
        panic = type("PanicException", (BaseException,), {})("index out of bounds")
        monkeypatch.setattr(f"minigold.pair.{name}", Raises(panic))
        with pytest.raises(
            ValueError, match=rf"a tokenizer in the {side} .*model, got index out of"
        ):
            make_pair(model, model)
        monkeypatch.setattr(f"minigold.pair.{name}", Raises(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            make_pair(model, model)


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_: Any) -> None:
        raise self.error


FILES = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
         "special_tokens_map.json", "tokenizer.model")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("relative", [True, False])
def test_files_that_are_links_out_of_their_folder_are_refused(
    folder: Path, name: str, relative: bool
) -> None:
    path = folder / name
    target = folder.parent / f"secret-{name}"
    if path.exists():
        path.rename(target)
    else:
        target.write_text("{}")
    path.symlink_to(Path("..") / target.name if relative else target)
    with pytest.raises(
        ValueError, match=rf"expected '{name}' to lie in .*model, got .*secret-{name}; put"
    ):
        load(folder)
    with pytest.raises(ValueError, match=f"expected '{name}'"):
        load_decoder(folder)


@pytest.mark.parametrize("shared", [False, True])
def test_the_cache_of_the_hub_is_read_through_its_links(
    folder: Path, tmp_path: Path, shared: bool
) -> None:
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    blobs = (tmp_path / "hub" if shared else repository) / "blobs"
    blobs.mkdir()
    for path in folder.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../" * (3 if shared else 2)) / "blobs" / blob.name)
    expected = load(snapshot)
    link = tmp_path / "link"
    link.symlink_to(snapshot)  # a folder may be named by a link: the user does that
    assert load(link).end_id == expected.end_id
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"expected 'config.json' to lie in .*, got /etc/hostname"):
        load(snapshot)


def test_links_to_files_of_the_same_folder_are_read(folder: Path) -> None:
    (folder / "tokenizer_config.json").rename(folder / "other.json")
    (folder / "tokenizer_config.json").symlink_to("other.json")
    assert load(folder).eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\x00b", "loop"])
def test_names_that_leave_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "loop").symlink_to("loop")
    if name == "loop" and own_of(home, name) is None:
        return
    with pytest.raises(ValueError, match=r"expected .* in .*home, got"):
        own_file(home, name)


def own_of(home: Path, name: str) -> Path | None:
    """Newer versions of Python resolve links in a circle to themselves."""
    try:
        return own_file(home, name) and None
    except ValueError:
        return home


def test_what_is_saved_holds_no_file_but_those_that_are_known(folder: Path, tmp_path: Path) -> None:
    bad = pickle.dumps({"a": 1})
    for name in (
        "tokenizer.pkl",
        "tokenizer.model",
        "tokenizer.json.bak",
        "tokenizer_x.py",
        "pytorch_model.bin",
    ):
        (folder / name).write_bytes(bad)
    (folder / "tokenizer_folder").mkdir()
    save_decoder(load_decoder(folder), tmp_path / "new", source=folder)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    }  # fmt: skip


@pytest.mark.parametrize("level", [DEEPEST - 1, DEEPEST, DEEPEST + 1])
def test_objects_have_at_most_so_many_levels(tmp_path: Path, level: int) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a":' + "[" * (level - 1) + "]" * (level - 1) + "}")
    if level <= DEEPEST:
        assert list(read_object(path)) == ["a"]
    else:
        with pytest.raises(ValueError, match=r"a\.json: expected at most 100 levels"):
            read_object(path)


@pytest.mark.parametrize("more", [0, 1])
def test_a_line_of_prompts_has_at_most_so_many_bytes(tmp_path: Path, more: int) -> None:
    path = tmp_path / "p.jsonl"
    text = '{"prompt": "' + "a" * (LARGEST - 14 + more) + '"}'
    path.write_text('{"prompt": "b"}\n' + text + "\n")
    if more:
        with pytest.raises(
            ValueError, match=r"p\.jsonl, line 2: expected an object of at most 16,777,216 bytes"
        ):
            read_prompts(path)
    else:
        assert len(read_prompts(path)[1].prompt) == LARGEST - 14


# ---------------------------------------------------------------------------------- chat templates
TALK = [{"role": "user", "content": "Hi"}]
SET = "{% set ns = namespace(x='a', l=[1], n=3) %}"
GREEDY = [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "nothing after"),
    ("{% for a in range(99999) if messages in [messages] * 9999 %}{% endfor %}", "nothing after|more than"),
    ("{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}", "nothing after"),
    ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}", "nothing af"),
    (SET + "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "more than 4,194,304"),
    (SET + "{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "more than 4,194,304"),
    (SET + "{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}", "more than 4,194|nothing after"),
    (SET + "{% for i in range(99) %}{% set ns.l = ns.l, ns.l %}{% endfor %}", "more than 4,194|nothing after"),
    (SET + "{% for i in range(99) %}{% set ns.l = {1: ns.l, 2: ns.l} %}{% endfor %}", "more than 4,|nothing a"),
    (SET + "{% for i in range(99) %}{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}", "more than 4,|nothing"),
    (SET + "{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}", "nothing after|more than 4|Exceeds the limit"),
    ("{{ 10 ** (10 ** 10) }}", "the operator ..,"),
    ("{{ (-3) ** (10 ** 9) }}", "the operator ..,"),
    ("{{ 'a' * 1000000000 }}", "more than 4,194,304"),
    ("{{ 1000000000 * [1] }}", "more than 4,194,304"),
    ("{{ 'a'.ljust(1000000000) }}", "unsafe"),
    ("{{ 'a' | center(1000000000) }}", "No filter named 'center'"),
    ("{{ 'a'.zfill(1000000000) }}", "unsafe"),
    ("{{ (1).to_bytes(1000000000, 'big') }}", "unsafe"),
    ("{{ '%1000000000d' % 1 }}", "the operator %"),
    ("{{ '%*d' % (1000000000, 1) }}", "the operator %"),
    ("{{ '%1000000000d' | format(1) }}", "No filter named 'format'"),
    ("{{ '{:1000000000}'.format(1) }}", "attribute 'format' of 'str' object is unsafe"),
    ("{{ ('a' | safe).format(1) }}", "attribute 'format' of 'Markup' object is unsafe"),
    ("{{ ('a\n' * 1000000) | indent(1000000) }}", "No filter named 'indent'"),
    ("{{ ('a\n' * 1000000) | wordwrap(1) }}", "No filter named 'wordwrap'"),
    ("{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}", "more than 4,194,304"),
    ("{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}", "more than 4,194,304"),
    ("{{ ('a' * 1000000).join('b' * 1000000) }}", "more than 4,194,304"),
    ("{{ ('b' * 1000000) | join('a' * 1000000) }}", "more than 4,194,304"),
    ("{{ range(99999) | map('string') | map('replace', '1', 'b' * 100000) | join }}", "more than 4|nothing"),
    ("{{ messages | tojson(indent=1000000000) }}", "tojson with an indent"),
    ("{{ messages | tojson(separators=('a' * 1000000, ':')) }}", "tojson with an indent"),
    ("{{ messages | tojson(-1000000000, 1000000000) }}", "tojson with an indent"),
    ("{{ messages | tojson(indent=' ' * 1000000) }}", "tojson with an indent"),
    ("{{ ('a' * 1000000) | replace(new='b' * 1000000, old='a') }}", "more than 4,194,304"),
    ("{{ ('b' * 1000000) | join(d='a' * 1000000) }}", "more than 4,194,304"),
    ("{{ range(20000) | list | join(attribute='real', d='b' * 20000) }}", "join with an attribute"),
    ("{% set ns = namespace(x='a' * 999999) %}{{ ([ns] * 9999) | join(attribute='x') }}", "join with an at"),
    ("{% set d = {1: 'a' * 99999} %}{{ [d.values()] * 99999 }}", "more than 4,194,304"),
    ("{{ ('a' * 2000000).rsplit(maxsplit=1, sep='b' * 1000000 ~ 'a') }}", "rsplit of a text"),
    ("{{ ('a' * 2000000) | trim(chars='b' * 1000000 ~ 'a') }}", "trim of a text"),
    ("{% set x = ('f' * 400000) | int(base=16) %}{{ ((x * x) // x) is number }}", "more than 4,096 bits"),
    ("{{ 0x" + "f" * 40000 + " is divisibleby(0x" + "f" * 20000 + ") }}", "more than 4,096 bits"),
    (SET + "{% for i in range(9999) %}{% set ns.n = ns.n - (0 - ns.n) %}{% endfor %}", "more than 4,096 bits"),
    ("{{ strftime_now('%100000000d') }}", "a pattern of a date with a width"),
    ("{{ strftime_now('%E%_5d') }}", "a pattern of a date with a width"),
    ("{{ strftime_now('%c' * 101) }}", "above 200 characters"),
    ("{{ [1] | batch(1000000000, 'x') | list }}", "No filter named 'batch'"),
    ("{{ [1] | slice(1000000000) | list }}", "No filter named 'slice'"),
    ("{{ 1.5 | round(1000000000, 'ceil') }}", "No filter named 'round'"),
    ("{{ [[1]] | sum(start=[]) }}", "No filter named 'sum'"),
    ("{{ ('a' * 2000000).strip('b' * 1000000 ~ 'a') }}", "strip of a text"),
    ("{{ ('a' * 2000000) | trim('b' * 1000000 ~ 'a') }}", "trim of a text"),
    ("{{ ('a' * 2000000).rfind('b' ~ 'a' * 1000000) }}", "rfind of a text"),
    ("{{ lipsum(1000000) }}", "'lipsum' is undefined"),
    ("{% set x = 'a' * 4000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}", "more than 4,194,304"),
    ("{% set y %}{% for i in range(9999) %}{{ 'a' * 4000000 }}{% endfor %}{% endset %}", "more than 268,4"),
    ("{% set x = 'a' * 4000000 %}{% macro m() %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endmacro %}{{ m() }}",
     "more than 4,194,304"),
    ("{{ 'a' }}" * 2**15, "a template of 294,912 characters, more than 65,536"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "reason"), GREEDY, ids=lambda value: value[:40])
def test_templates_that_eat_up_time_or_memory_are_refused(template: str, reason: str) -> None:
    if " in range(" in template or "map(" in template:
        reason += "|nothing after"  # on a busy machine
    with guarded():
        sandbox.SECONDS = 1.0
        with pytest.raises(ValueError, match=rf"the chat template can render, got .*({reason})"):
            render(template, TALK, bos_token="<s>", eos_token="</s>")


def test_json_is_refused_before_all_of_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 100.0)  # tracing is slow
    fill, value = sandbox.compiled("{{ x | tojson(indent=16) }}"), list[Any](range(4000))
    for _ in range(300):
        value = [value]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"more than 4,194,304"):
            fill(x=value)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_filters_do_not_run_while_a_template_is_compiled() -> None:
    tracemalloc.start()
    try:
        fill = sandbox.compiled("{{ 'a'" + " | replace('a', 'aaaaaaaaaaaa')" * 6 + " }}")
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert fill() == "a" * 12**6


@pytest.mark.parametrize(
    ("compiling", "comparing", "kept"),
    [(4, 0.5, True), (4, 2, False), (0, 6, False), (6, 0, False)],
)
def test_the_time_to_compile_counts_and_so_does_the_last_step(
    monkeypatch: pytest.MonkeyPatch, compiling: float, comparing: float, kept: bool
) -> None:
    now = [0.0]

    class Slow:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            now[0] += comparing
            return False

    def slow(self: Any, source: Any) -> Any:
        now[0] += compiling
        return from_string(self, source)

    from_string = jinja2.Environment.from_string
    monkeypatch.setattr(jinja2.Environment, "from_string", slow)
    monkeypatch.setattr(sandbox, "time", SimpleNamespace(monotonic=lambda: now[0]))
    template = "done{% if x == 1 %}{% endif %}"
    if kept:
        assert sandbox.compiled(template)(x=Slow()) == "done"
    else:
        with pytest.raises(TimeoutError, match="nothing after 5 seconds"):
            sandbox.compiled(template)(x=Slow())


def test_bounds_are_far_from_what_templates_of_models_need() -> None:
    """A conversation of 400 turns and half a million characters."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 260} for i in range(400)]
    template = (
        "{% for m in messages %}{% set c = m.content | trim %}{% if '</think>' in c %}{% set c = "
        "c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|' + m.role + '|>' + c ~ eos_token }}{% endfor %}"
    )
    text = render(template, turns, bos_token="", eos_token="</s>")
    assert len(text) > 500_000
    assert text.count("</s>") == 400


# ------------------------------------------------------------------------------------- run folders
SETTINGS = Config(
    steps=2, batch_size=2, max_new_tokens=4, save_every=1, student_plain=True, teacher_plain=True
)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    """A run that was stopped after step 1, and how it goes on."""
    tiny_folder(tmp_path / "student", "llama", byte_bpe(), end="<|im_end|>")
    tiny_folder(tmp_path / "teacher", "gemma3_text", sentencepiece_bpe(), begin="<s>", end="</s>")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    prompts, out = read_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run"

    def models() -> tuple[Any, Any]:
        return load(tmp_path / "student"), load(tmp_path / "teacher")

    distill(*models(), prompts, SETTINGS, out=out, stop=lambda: True)

    def resumed() -> Any:
        pair = make_pair(*models())
        optimizer = adamw(pair.student.decoder, SETTINGS)
        with open_run(out, pair, optimizer, prompts, SETTINGS, resume=True) as opened:
            return opened

    return out, resumed


def sign(step: Path) -> None:
    manifest = json.loads((step / "checkpoint.json").read_text())
    for name in manifest["files"]:
        data = (step / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (step / "checkpoint.json").write_text(json.dumps(manifest))


def in_manifest(key: str, name: str, value: Any) -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        path = out / "checkpoints" / "step-1" / "checkpoint.json"
        manifest = json.loads(path.read_text())
        manifest[key][name] = value
        path.write_text(json.dumps(manifest))

    return spoil


MANIFESTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a log elsewhere": (in_manifest("logs", "../secret.jsonl", 0), "expected checkpoint.json to name each file"),
    "a log by its whole path": (in_manifest("logs", "/etc/hostname", 0), "expected checkpoint.json to name each"),
    "a log of less than nothing": (in_manifest("logs", "metrics.jsonl", -1), "metrics.jsonl ends before"),
    "a log of a truth": (in_manifest("logs", "metrics.jsonl", True), "metrics.jsonl ends before this step"),
    "a file elsewhere": (in_manifest("files", "../../../secret.jsonl", {}), "secret.jsonl is missing"),
    "a file by its whole path": (in_manifest("files", "/etc/hostname", {}), "/etc/hostname is missing"),
    "weights that nobody looked at": (
        lambda out: edit_json(out / "checkpoints" / "step-1" / "checkpoint.json", files={}), "to name each file"),
    "another format": (
        lambda out: edit_json(out / "checkpoints" / "step-1" / "checkpoint.json", format=True), "expected format 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_checkpoints_that_name_other_files_are_torn(run: Any, name: str) -> None:
    out, resumed = run
    secret = out.parent / "secret.jsonl"
    secret.write_text("mine\n")
    check_whole(out / "checkpoints" / "step-1")
    spoil, message = MANIFESTS[name]
    spoil(out)
    with pytest.raises(ValueError, match=message):
        check_whole(out / "checkpoints" / "step-1")
    with pytest.raises(
        ValueError, match=r"expected a whole checkpoint in .*checkpoints, got torn ones"
    ):
        resumed()
    assert secret.read_text() == "mine\n"


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "config.json",
        "checkpoints",
        "checkpoints/step-1",
        "checkpoints/step-1/config.json",
    ],
)
def test_a_run_with_links_is_not_gone_on_with(run: Any, name: str) -> None:
    out, resumed = run
    moved = out.parent / "moved"
    (out / name).rename(moved)
    (out / name).symlink_to(moved)
    kept = {p: p.read_bytes() for p in moved.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match=rf"expected --out to hold what a run writes, got .*{name}, which"
    ):
        resumed()
    assert all(path.read_bytes() == data for path, data in kept.items())


@pytest.mark.parametrize("name", ["final", "checkpoints/step-1", "checkpoints"])
def test_a_model_of_a_run_that_is_a_link_out_of_it_is_not_read(run: Any, name: str) -> None:
    out, _ = run
    if name == "final":
        (out / "checkpoints" / "step-1").rename(out / "final")
    (out / name).rename(out.parent / "moved")
    (out / name).symlink_to(out.parent / "moved")
    with pytest.raises(
        ValueError, match=r"expected '(final|checkpoints.step-1)' to lie in .*run, got"
    ):
        find_model(str(out))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "samples.jsonl", "eval.jsonl"])
def test_a_report_reads_no_link_out_of_the_run(run: Any, name: str) -> None:
    out, _ = run
    write_report(out)
    target = out.parent / name
    (out / name).rename(target) if (out / name).exists() else target.write_text("")
    (out / name).symlink_to(target)
    with pytest.raises(ValueError, match=rf"expected '{name}' to lie in .*run, got"):
        write_report(out)


MOMENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "of another shape": (
        lambda m: m.update({"exp_avg.model.norm.weight": torch.zeros(3)}), r"got exp_avg.model.norm.weight of shape \[3\]"),
    "of another model": (lambda m: m.update({"exp_avg.x": torch.zeros(1)}), r"got exp_avg.x of shape \[1\]"),
    "of another kind": (lambda m: m.update({"x.model.norm.weight": torch.zeros(20)}), "got x.model.norm.weight"),
    "in part": (lambda m: m.pop("exp_avg_sq.model.norm.weight"), "model.norm.weight in optimizer.*, got some"),
}  # fmt: skip


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_that_do_not_fit_are_refused(run: Any, name: str) -> None:
    out, resumed = run
    step = out / "checkpoints" / "step-1"
    with safe_open(step / "optimizer.safetensors", framework="pt") as file:
        moments = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    resumed()
    change, message = MOMENTS[name]
    change(moments)
    save_file(moments, step / "optimizer.safetensors")
    sign(step)
    with pytest.raises(
        ValueError, match=rf"step-1: expected step, exp_avg, exp_avg_sq of .*{message}"
    ):
        resumed()


def test_an_optimizer_that_is_no_safetensors_is_refused(run: Any) -> None:
    out, resumed = run
    step = out / "checkpoints" / "step-1"
    (step / "optimizer.safetensors").write_bytes(pickle.dumps({"state": {}}))
    sign(step)
    with pytest.raises(ValueError, match=r"expected tensors in .*optimizer\.safetensors, got"):
        resumed()


def test_moments_of_a_type_that_torch_does_not_have_are_refused(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, resumed = run
    step = out / "checkpoints" / "step-1"
    save_file({"a": torch.zeros(2, dtype=torch.float8_e5m2)}, step / "optimizer.safetensors")
    sign(step)
    monkeypatch.delattr(torch, "float8_e5m2")  # as newer types are missing in older versions
    with pytest.raises(ValueError, match=r"expected tensors in .*got .*no attribute 'float8_e5m2'"):
        resumed()


def test_a_checkpoint_of_another_shape_is_refused(run: Any) -> None:
    out, resumed = run
    step = out / "checkpoints" / "step-1"
    edit_json(step / "config.json", rope_theta=5.0)
    sign(step)
    with pytest.raises(ValueError, match=r"expected the student's shape in .*step-1, got another"):
        resumed()


@pytest.mark.parametrize("value", [..., "1", 1e300, [1], True])
def test_a_history_of_no_numbers_is_refused(run: Any, value: Any) -> None:
    out, resumed = run
    row = json.loads((out / "metrics.jsonl").read_text())
    row = (
        {**row, "loss": value}
        if value is not ...
        else {k: v for k, v in row.items() if k != "loss"}
    )
    text = json.dumps(row)
    (out / "metrics.jsonl").write_text(
        text.ljust((out / "metrics.jsonl").stat().st_size + 9) + "\n"
    )
    manifest = out / "checkpoints" / "step-1" / "checkpoint.json"
    logs = json.loads(manifest.read_text())["logs"]
    edit_json(manifest, logs={**logs, "metrics.jsonl": (out / "metrics.jsonl").stat().st_size})
    with pytest.raises(ValueError, match=r"expected the lines of steps 1 to 1 in .*metrics\.jsonl"):
        resumed()


# --------------------------------------------------------------------------------------- no pickles
def is_pickle(data: bytes) -> bool:
    """Whether all of it is a pickle, or it is an archive, which torch.save makes."""
    if data.startswith((b"\x80", b"PK")):
        return True
    try:
        return bool(list(pickletools.genops(data)))
    except Exception:  # noqa: BLE001 (it raises many kinds)
        return False


def test_pickles_are_known_when_they_are_met(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert is_pickle(pickle.dumps({"a": [1, "b"]}, protocol))
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    assert is_pickle((tmp_path / "a.pt").read_bytes())
    assert not is_pickle(b'{"a": 1}\n')


def test_a_run_folder_holds_json_safetensors_and_text_alone(tmp_path: Path) -> None:
    config = dataclasses.replace(DEMO, steps=2, batch_size=4, micro_batch=4, save_every=1)
    distill(*demo_models(), list(demo_prompts())[:16], config, out=tmp_path / "run")
    write_report(tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if not path.is_dir()]
    assert len(files) > 20
    kinds = {path.suffix for path in files}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".html", ".jinja", ".txt"}
    assert kinds >= {".json", ".jsonl", ".safetensors", ".html"}
    for path in files:
        assert path.is_file() and not path.is_symlink()
        assert not is_pickle(path.read_bytes()), path
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        if path.suffix == ".jsonl":
            for line in path.read_text("utf-8").splitlines():
                json.loads(line)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())


def test_no_module_can_read_or_write_a_pickle() -> None:
    forbidden = {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
        "copyreg",
        "jsonpickle",
    }
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {name.name.partition(".")[0] for name in node.names}, (
                    path.name
                )
            elif isinstance(node, ast.ImportFrom):
                module = str(node.module)
                assert module.partition(".")[0] not in forbidden, path.name
                names = {name.name for name in node.names}
                if module.partition(".")[0] in ("torch", "numpy"):
                    assert not {"load", "save", "jit", "hub", "package", "serialization"} & names, (
                        path.name
                    )
            elif isinstance(node, ast.Attribute):
                text = ast.unparse(node)
                bad = ("torch.load", "torch.save", "torch.jit.load", "torch.hub", "torch.serialization", "np.load", "np.save",
                       "np.savez", "np.fromfile", "numpy.load", "allow_pickle")  # fmt: skip
                assert not text.startswith(bad), f"{path.name}: {text}"


def test_headers_that_the_fuzzer_changes_are_others() -> None:
    data = save_file_bytes()
    others = {header_changed(data, random.Random(i)) for i in range(50)}
    assert len(others) > 40


def save_file_bytes() -> bytes:
    from safetensors.torch import save

    return save({"a": torch.zeros(2, 3), "b": torch.ones(5)})
