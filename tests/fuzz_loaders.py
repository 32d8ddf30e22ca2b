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
import base64
import hashlib
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from minigold import checkpoint, pair, sandbox, weights
from minigold.chat import prompt_ids, render
from minigold.checkpoint import open_run
from minigold.cli_models import find_model
from minigold.config import Config
from minigold.data import read_prompts
from minigold.load import LanguageModel, load, no_panic, read_tokenizer
from minigold.pair import check_student, lost_text, make_pair, matched
from minigold.report import write_report
from minigold.train import adamw, distill
from minigold.watch import collapses, failed_in_a_row
from minigold.weights import load_decoder
from tiny_folders import CHATML, TURNS, tiny_folder
from tiny_models import SCALINGS, raw_config
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe, unigram, wordpiece

__all__ = ["LOADERS", "Arena", "Failure", "fuzz", "main"]

ROOT = Path(__file__).parent.parent
SECONDS = 10.0  # of an input; a template is given 0.2
MEMORY = 4 * 2**30  # bytes beyond what the process has at the start
HANGS = 60  # seconds without an input, in native code, before the child is ended
LONGEST = 3000  # characters of a message
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
QUIET = {"student_plain": True, "teacher_plain": True}
SETTINGS = Config(steps=4, batch_size=2, max_new_tokens=6, lr=0.01, save_every=2, **QUIET)


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
    return bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


WATCH = Watch()


def _watched(read: Callable[..., Any]) -> Callable[..., Any]:
    """A reader in native code, which the interpreter does not tell us about."""

    def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
        if WATCH.on:
            WATCH.check(path)
        return read(path, *args, **kwargs)

    return watched


# -- changes -------------------------------------------------------------------------------------

STRANGE: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 7, 255, 2**15, 2**24, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63,
    2**64, 10**30, 10**300, -(10**300), 0.5, -0.0, 1.5, 1e308, -1e308, 1e-300, 5e-324, 1 + 2e-16, math.nan,
    math.inf, -math.inf, "", " ", "a", "0", "true", "null", "\x00", "é", "\ud800", "\udc00x", "🙂", "x" * 10**5,
    "../outside/secret.json", "/etc/passwd", "/dev/zero", "..", ".", "~", "C:\\x", "file:///etc/passwd",
    [], {}, [[]], [None], {"": None}, [0] * 1000, [1, "a"], {"a": {"b": [1]}}, "step-3", "<|im_end|>",
    ["full_attention"], ["full_attention", "sliding_attention"], {"rope_type": "yarn"}, {"content": "</s>"},
]  # fmt: skip
LITERALS = (
    "1e999", "-1e999", "1" * 400, "-" + "9" * 5000, "1.0e+308", "0.1e-9999", "01", "+1", ".5", "0x10", "NaN",
    "-Infinity", "nul", "'a'", '"\\ud83d"', '"\\u0000"', '"\t"', "[1,]", "{1: 2}", "undefined", "",
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _near(value: Any, rng: random.Random) -> Any:
    """What stands near a value."""
    if type(value) in (int, float):
        return rng.choice([value + 1, value - 1, value * 2, -value, float(value), str(value), [value]])
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice([value[:cut], value + value, value.upper(), [value], value[:cut] + "\u2028🙂"])
    if isinstance(value, list):
        return rng.choice([value[::-1], value[1:], value * 2, value[:1] * 50, [value], dict.fromkeys("ab", value)])
    return rng.choice(STRANGE)


def changed(value: Any, rng: random.Random) -> Any:
    """A copy with one to four places changed, taken away, moved or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        places = list(_places(value))
        if not places:
            return rng.choice(STRANGE)
        path = rng.choice(places)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, kind = path[-1], rng.randrange(10)
        if kind < 4:
            holder[key] = rng.choice(STRANGE)
        elif kind < 6:
            holder[key] = _near(holder[key], rng)
        elif kind == 6:
            del holder[key]
        elif kind == 7 and isinstance(holder, dict):
            holder[rng.choice([key + "x", "", "__class__", "prompt", "step", "x" * 300])] = holder.pop(key)
        elif kind == 8:
            other = value
            for part in rng.choice(places):
                try:
                    other = other[part]
                except (KeyError, IndexError, TypeError):
                    break
            holder[key] = json.loads(json.dumps(other))
        else:
            inner = holder[key]
            for _ in range(rng.choice([1, 3, 97, 98, 99, 100, 101, 300])):
                inner = [inner] if rng.random() < 0.5 else {"a": inner}
            holder[key] = inner
    return value


def as_text(value: Any, rng: random.Random) -> bytes:
    """JSON, or nearly: keys twice, other literals, deep nesting, a byte order mark, other encodings."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7, indent=rng.choice([None, None, 2]))
    kind = rng.randrange(24)
    if kind == 0:
        at = [m.end() for m in re.finditer(r"\{", text)]
        keys = re.findall(r'"(\w+)":', text)
        if at and keys:
            i = rng.choice(at)
            text = f'{text[:i]}"{rng.choice(keys)}": 1, {text[i:]}'
    elif kind in (1, 2):
        at = list(re.finditer(r": (\d[\d.]*|null|true|\"\w*\")", text))
        if at:
            m = rng.choice(at)
            n = rng.choice([90, 101, 1000, 100_000])
            new = rng.choice([*LITERALS, "[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, "[" * n])
            text = text[: m.start(1)] + new + text[m.end(1) :]
    elif kind == 3:
        return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b""]) + text.encode("utf-8", "surrogatepass")
    elif kind == 4:
        return text.encode(rng.choice(["utf-16", "utf-32", "utf-7"]), "surrogatepass" if rng.random() < 0 else "replace")
    return text.encode("utf-8", "surrogatepass")


def spoiled(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Bytes torn, flipped, cut out, repeated, or joined with others."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(8)
        if kind == 0:
            data = data[:i]
        elif kind in (1, 2) and data:
            flipped = bytearray(data)
            for _ in range(rng.choice([1, 1, 4, 32])):
                flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            data = bytes(flipped)
        elif kind == 3:
            data = data[:i] + data[min(j, i + 64) :]
        elif kind == 4:
            data = data[:j] + data[i:j] + data[j:]
        elif kind == 5:
            data = data[:i] + rng.randbytes(rng.choice([1, 8, 64])) + data[i:]
        elif kind == 6:
            data = data[:i] + other[len(other) // 2 :]
        else:
            data = data[:i] + bytes(min(j - i, 4096)) + data[j:]
    return data


DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "f32", "", "X", None, 3)
SIZES = (0, 1, 2, 3, 5, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5, None, "1", True, [1])


def header_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.choice([1, 1, 2, 4])):
        name = rng.choice(list(header))
        entry, kind = header[name], rng.randrange(9)
        if not isinstance(entry, dict) or "shape" not in entry or kind == 0:
            header[rng.choice([name + "x", "__metadata__", "", "a" * 10**5])] = header.pop(name)
        elif kind == 1:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind in (2, 3):
            shape = entry["shape"]
            if shape and isinstance(shape, list):
                shape[rng.randrange(len(shape))] = rng.choice(SIZES)
            if rng.random() < 0.4:
                entry["shape"] = rng.choice([[], [0], [0, 2**62, 2**62], [2**32, 2**32], [1], {}])
        elif kind in (4, 5) and "data_offsets" in entry:
            entry["data_offsets"][rng.randrange(2)] = rng.choice([*SIZES, len(body), len(body) + 1])
        elif kind == 6:
            twin = rng.choice(list(header))
            header[name], header[twin] = header[twin], entry
        elif kind == 7:
            header[name] = rng.choice(STRANGE)
        else:
            del header[name]
            if not header:
                break
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = as_text(header, rng)
    sizes = [len(text)] * 12 + [0, 1, 7, len(text) - 1, len(text) + 1, 2**24, 2**24 + 1, 2**31, 2**63, 2**64 - 1]
    body = body if rng.random() < 0.9 else body[: rng.randrange(len(body) + 1)]
    return struct.pack("<Q", rng.choice(sizes)) + text + body


def replaced(path: Path, rng: random.Random, outside: Path) -> None:
    """In place of a file: nothing, a link, a pipe, a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    suffix = path.suffix if path.suffix in (".json", ".safetensors", ".jsonl") else ".json"
    kind, siblings = rng.randrange(10), [p for p in path.parent.iterdir() if p != path]
    if kind < 4:
        path.symlink_to(rng.choice([outside / f"secret{suffix}", "/etc/passwd", "/dev/zero", outside]))
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


# -- tokenizers ----------------------------------------------------------------------------------

PATTERNS = (
    {"String": ""}, {"String": " "}, {"String": "a"}, {"Regex": ""}, {"Regex": "(a+)+$"}, {"Regex": "(.*)*b"}, {"Regex": "["},
    {"Regex": "\\p{L}+"}, {"Regex": "(?<=a)"}, {"Regex": "(?:a|a)*c"}, {"Regex": "\\b"}, {"Regex": "(" * 5000}, {"Regex": "a{99999}"},
    {"Regex": "."}, {"Regex": "^"}, {"Regex": "(a)\\1"}, {"Regex": "\\x{110000}"}, {"Regex": "(?i)ß"}, {}, None,
)  # fmt: skip
TEXTS = ("", " ", "a", "▁", "▁▁", "<unk>", "</s>", "##", "é", "e\u0301", "🙂", "\x00", "x" * 1000, "<0x41>", "Ġ")
NUMBERS = (0, 1, 2, 7, 255, 10**4, 2**24 - 1, 2**24, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, -1, 1.5, None)


def _part(kind: str, rng: random.Random) -> Any:
    """A normalizer, pre-tokenizer, post-processor or decoder, by the schema of tokenizer.json."""
    text, pattern, number = rng.choice(TEXTS), rng.choice(PATTERNS), rng.choice(NUMBERS)
    flag, behavior = rng.random() < 0.5, rng.choice(["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"])
    metaspace = {"type": "Metaspace", "replacement": rng.choice(["▁", "", "ab", " "]), "prepend_scheme": rng.choice(["always", "never", "first"]), "split": flag}
    level = {"type": "ByteLevel", "add_prefix_space": flag, "trim_offsets": not flag, "use_regex": flag}
    charsmap = base64.b64encode(rng.randbytes(rng.choice([0, 3, 4, 64, 4096]))).decode()
    piece = rng.choice([{"Sequence": {"id": rng.choice("ABC"), "type_id": number}}, {"SpecialToken": {"id": text, "type_id": 0}}])
    special = {text: {"id": rng.choice([text, "x"]), "ids": [number], "tokens": [rng.choice(TEXTS)]}}
    parts: dict[str, list[Any]] = {
        "normalizer": [
            {"type": "Replace", "pattern": pattern, "content": text}, {"type": "Prepend", "prepend": text}, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Nmt"},
            {"type": "Precompiled", "precompiled_charsmap": charsmap}, {"type": "Strip", "strip_left": flag, "strip_right": True}, {"type": "StripAccents"}, level,
            {"type": "BertNormalizer", "clean_text": flag, "handle_chinese_chars": True, "strip_accents": None, "lowercase": flag}],
        "pre_tokenizer": [
            {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": flag}, metaspace, level, {"type": "Digits", "individual_digits": flag},
            {"type": "Punctuation", "behavior": behavior}, {"type": "WhitespaceSplit"}, {"type": "CharDelimiterSplit", "delimiter": rng.choice(["a", "", "ab"])},
            {"type": "UnicodeScripts"}, {"type": "FixedLength", "length": number}, {"type": "BertPreTokenizer"}],
        "post_processor": [
            {"type": "TemplateProcessing", "single": [piece], "pair": [piece, piece], "special_tokens": special}, level,
            {"type": "BertProcessing", "sep": [text, number], "cls": [text, 0]}, {"type": "RobertaProcessing", "sep": [text, 1], "cls": [text, number], "trim_offsets": flag, "add_prefix_space": flag}],
        "decoder": [
            level, metaspace, {"type": "Replace", "pattern": pattern, "content": text}, {"type": "WordPiece", "prefix": text, "cleanup": flag}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": rng.choice(["a", "", " "]), "start": number, "stop": rng.choice(NUMBERS)}, {"type": "CTC", "pad_token": text, "word_delimiter_token": "|", "cleanup": flag},
            {"type": "BPEDecoder", "suffix": text}],
    }  # fmt: skip
    one = rng.choice([*parts[kind], None])
    name = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors", "decoder": "decoders"}[kind]
    return one if rng.random() < 0.7 else {"type": "Sequence", name: [one, rng.choice(parts[kind])]}


def with_other_parts(whole: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A tokenizer that may even be one: other parts, ids, added tokens, limits."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.randrange(8)
        model = whole["model"]
        if kind < 4:
            part = rng.choice(["normalizer", "pre_tokenizer", "post_processor", "decoder"])
            whole[part] = _part(part, rng)
        elif kind == 4:
            flags = {key: rng.random() < 0.5 for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            token = {"id": rng.choice([*NUMBERS, 3, 500, 501]), "content": rng.choice(TEXTS), **flags}
            whole["added_tokens"].insert(rng.randrange(len(whole["added_tokens"]) + 1), token)
        elif kind == 5:
            vocab = model["vocab"]
            if isinstance(vocab, dict):
                vocab[rng.choice([*vocab, *TEXTS])] = rng.choice(NUMBERS)
            elif isinstance(vocab, list):
                vocab[rng.randrange(len(vocab))] = [rng.choice(TEXTS), rng.choice([*NUMBERS, -1e308, 1e308])]
        elif kind == 6:
            key = rng.choice([*model, "unk_token", "unk_id", "byte_fallback", "dropout", "ignore_merges", "type", "continuing_subword_prefix", "end_of_word_suffix"])
            if key not in ("vocab", "merges"):
                model[key] = rng.choice([*TEXTS, *NUMBERS, True, "BPE", "Unigram", "WordPiece", "WordLevel", 0.5])
        else:
            number = rng.choice(NUMBERS)
            whole[rng.choice(["truncation", "padding"])] = rng.choice([
                {"direction": "Right", "max_length": number, "strategy": "LongestFirst", "stride": rng.choice(NUMBERS)},
                {"strategy": {"Fixed": number}, "direction": "Left", "pad_to_multiple_of": number, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}])  # fmt: skip
    return whole


# -- chat templates ------------------------------------------------------------------------------

ATOMS = (
    "''", "'a'", "'<|im_end|>'", "1", "0", "-1", "2.5", "10**9", "10**6", "99999", "[]", "[1]", "{}", "()", "none", "true",
    "messages", "messages[0]", "messages[0].content", "bos_token", "eos_token", "tools", "self", "loop", "x", "ns", "ns.x", "m",
    "range(10**9)", "range(99999)", "range(-5)", "namespace()", "dict(a=1)", "cycler(1)", "joiner()", "lipsum", "raise_exception",
    "strftime_now", "strftime_now('%Y')", "('a' * 10**6)", "('a' * 10**9)", "(range(99999) | list)", "raise_exception('x')",
    "config", "request", "__import__", "open", "varargs", "caller", "super()", "undefined_name", "'{0.__class__}'",
    "'%s'", "'%999999999d'", "'{:>99999999}'", "'{a.__init__.__globals__}'", "messages.__class__",
)  # fmt: skip
DUNDERS = (
    "__class__", "__mro__", "__base__", "__bases__", "__subclasses__()", "__globals__", "__init__", "__builtins__", "__dict__",
    "__code__", "__func__", "__self__", "__reduce__()", "__getattribute__", "__format__", "gi_frame", "f_globals", "cr_frame",
    "func_globals", "mro()", "_Namespace__attrs", "environment", "__call__", "tb_frame", "__module__", "__loader__",
)  # fmt: skip
METHODS = (
    "upper()", "split('a')", "rsplit(x)", "strip(x)", "join(x)", "join(messages)", "replace('', x)", "replace('a', x)", "format(x)",
    "format(1, w=10**9)", "format_map(x)", "ljust(10**9)", "center(99999)", "zfill(10**9)", "encode()", "expandtabs(10**9)",
    "translate({97: 'b'})", "to_bytes(10**9, 'big')", "items()", "keys()", "get('a')", "append(1)", "pop()", "clear()", "update(a=1)",
    "index(1)", "count('a')", "startswith(x)", "next", "reset()", "cycle(1, 2)", "unescape()", "__html__()", "copy()", "fromkeys(x)",
)  # fmt: skip
FILTERS = (
    "list", "length", "tojson", "tojson(indent=10**9)", "tojson(separators=(x, x))", "join(x)", "replace('a', x)", "replace('', x)", "indent(10**6)",
    "indent(x)", "center(10**9)", "batch(10**9, 'x')", "slice(10**9)", "sum", "sum(start=[])", "map('upper')", "map(attribute='__class__')",
    "map('attr', '__class__')", "attr('__class__')", "attr('upper')", "format(1)", "round(10**9, 'ceil')", "round(2)", "default(x)", "sort", "unique",
    "groupby('role')", "first", "last", "int", "int(base=99)", "float", "string", "safe", "e", "urlize", "wordwrap(1, wrapstring=x)", "xmlattr", "dictsort",
    "pprint", "striptags", "reverse", "selectattr('role')", "select('eq', x)", "reject('in', x)", "random", "trim(x)", "truncate(10**9)", "items",
    "filesizeformat", "wordcount", "urlencode", "min", "max", "title", "turns", "weighed", "concatenated", "nothing", "abs", "d",
)  # fmt: skip
OPERATORS = ("+", "-", "*", "**", "/", "//", "%", "~", "in", "not in", "==", "<", "and", "or", "is", "if x else")
HARD = (
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% for i in range(99) %}{% set ns.x = (ns.x, ns.x) + (ns.x,) %}{% endfor %}{{ ns.x | tojson }}",
    "{% for i in range(99) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
    "{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{% set y %}{% for i in range(99999) %}{{ 'a' * 4000000 }}{% endfor %}{% endset %}{{ y }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{% include '/etc/passwd' %}", "{% extends x %}", "{% import 'os' as os %}{{ os.system('id') }}",
    "{% from 'os' import system %}", "{% do messages.append(1) %}", "{% set messages = [] %}{{ messages }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "not " * 9000 + "1 }}", "{{ 1" + "+1" * 9000 + " }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200, "{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "{{ 'a'" + "~'a'" * 2000 + " }}",
)  # fmt: skip


def _expression(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(8)
    if depth > 3 or kind < 2:
        return rng.choice(ATOMS)
    inner = _expression(rng, depth + 1)
    if kind == 2:
        return f"({inner}).{rng.choice(DUNDERS)}"
    if kind == 3:
        name = rng.choice(DUNDERS).removesuffix("()")
        return rng.choice([f"({inner})['{name}']", f"({inner} | attr('{name}'))", f"({inner})['{name[:4]}' ~ '{name[4:]}']"])
    if kind == 4:
        return f"({inner}).{rng.choice(METHODS)}"
    if kind in (5, 6):
        return f"({inner} | {rng.choice(FILTERS)})"
    return f"({inner} {rng.choice(OPERATORS)} {_expression(rng, depth + 1)})"


def template_of(rng: random.Random) -> str:
    """A program of attempts."""
    parts = ["{% set ns = namespace(x=['a'], n=3) %}{% set x = " + rng.choice(["'a'", "'a' * 10**6", "messages", "7"]) + " %}"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        one, kind = _expression(rng), rng.randrange(9)
        if kind < 4:
            parts.append("{{ " + one + " }}")
        elif kind == 4:
            parts.append("{% for m in " + one + " %}{{ " + _expression(rng) + " }}{% endfor %}")
        elif kind == 5:
            parts.append("{% set ns.x = " + one + " %}{{ ns.x }}")
        elif kind == 6:
            parts.append("{% macro m(x) %}{{ " + one + " }}{% endmacro %}{{ m(" + _expression(rng) + ") }}")
        elif kind == 7:
            parts.append("{% filter " + rng.choice(FILTERS) + " %}{{ " + one + " }}{% endfilter %}")
        else:
            parts.append(rng.choice(HARD))
    text = "".join(parts)
    return text if rng.random() < 0.9 else spoiled(text.encode(), rng).decode("utf-8", "replace")


# -- the arena: whole files, and the folder that is spoiled ----------------------------------------


class Arena:
    """Small models and a run, and a folder beside them that nothing may touch."""

    def __init__(self, root: Path) -> None:
        self.root, self.base, self.work, self.outside = root, root / "base", root / "work", root / "outside"
        self.outside.mkdir(parents=True)
        self.work.mkdir()
        tokenizers = {"llama": byte_bpe(), "gemma3": sentencepiece_bpe(), "qwen3": wordpiece(), "smollm3": unigram()}
        for family, tokenizer in tokenizers.items():
            end = {"gemma3": "</s>", "qwen3": "[SEP]", "llama": "<|im_end|>"}.get(family, "</s>")
            template = CHATML if family == "llama" else TURNS
            folder = tiny_folder(self.base / family, family, tokenizer, end=end, template=template)
            (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": end}}))
        self.models = [self.base / family for family in tokenizers]
        self._shard(self.base / "llama", self.base / "sharded")
        for name in ("secret.json", "secret.jsonl", "chat_template.jinja"):
            (self.outside / name).write_text('{"prompt": "a", "step": 1}\n', "utf-8")
        shutil.copyfile(self.base / "llama" / "model.safetensors", self.outside / "secret.safetensors")
        rows = [{"prompt": text, "completion": " fox", "answer": "b", "id": i, "messages": None}
                for i, text in enumerate(["hello", "the fox 🙂"])]  # fmt: skip
        rows[1] = {"messages": [*TALK[:1], {"role": "assistant", "content": "x"}], "teacher_prompt": TALK[:1]}
        self.rows = rows
        (self.base / "prompts.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "the fox"}\n', "utf-8")
        self.prompts = read_prompts(self.base / "prompts.jsonl")
        self.pair_of = {name: load(self.base / name) for name in ("llama", "gemma3")}
        distill(*self.fresh(), self.prompts, SETTINGS, out=self.base / "run")
        (self.base / "run" / "eval.jsonl").write_text('{"step": 2, "accuracy": 0.5, "accuracy_low": 0.4}\n')
        shutil.copytree(self.base / "run", self.base / "stopped")
        shutil.rmtree(self.base / "stopped" / "final")
        shutil.rmtree(self.base / "stopped" / "checkpoints" / "step-4")
        (self.base / "stopped" / "eval.jsonl").unlink()
        self.sides = [(m.tokenizer, [m.end_id], m.n_tokens) for m in self.pair_of.values()]
        self.matched = matched(*self.sides)
        os.environ["MINIGOLD_CACHE"] = str(self.base / "cache")
        pair.KEEP_FROM = 0
        matched(*self.sides)
        pair.KEEP_FROM = 10**9
        self.untouched = self._look()

    def fresh(self) -> tuple[LanguageModel, LanguageModel]:
        return load(self.base / "llama"), self.pair_of["gemma3"]

    @staticmethod
    def _shard(source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
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
    except (ValueError, RecursionError, struct.error, IndexError):
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
            lines[i : i + rng.choice([0, 1, 1, 1])] = [as_text(changed(row, rng), rng).replace(b"\n", b" ")]
        path.write_bytes(b"\n".join(lines) + rng.choice([b"", b"\n", b"\n", b"\r\n\n"]))
    else:
        path.write_text(template_of(rng), "utf-8")


Loader = Callable[[Arena, random.Random], Callable[[], Any]]  # spoils files, then loads them


def of_config(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    folder = arena.copy(rng.choice(arena.models).name)
    path = folder / "config.json"
    if rng.random() < 0.5:
        family = rng.choice(["llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma3_text", "gemma3"])
        scaling = rng.choice(["", "", *(f" {name}" for name in SCALINGS)]) if family != "gemma3" else ""
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
        (folder / "link.safetensors").symlink_to(rng.choice([arena.outside / "secret.safetensors", "/dev/zero", "/etc/passwd"]))
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
        name = rng.choice(["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"])
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
        _spoil(run / rng.choice(["config.json", "metrics.jsonl", "samples.jsonl", "samples.jsonl", "eval.jsonl"]), rng, arena)
    return lambda: write_report(run)


def of_checkpoint(arena: Arena, rng: random.Random) -> Callable[[], Any]:
    run = arena.copy(rng.choice(["stopped", "stopped", "stopped", "run"]))
    step = next((run / "checkpoints").iterdir())
    files = ["checkpoint.json"] * 4 + ["optimizer.safetensors", "config.json", "model.safetensors", "tokenizer.json"]
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.choice([step / rng.choice(files), step / rng.choice(files), run / "metrics.jsonl", run / "config.json", run / "samples.jsonl"])
        manifest = step / "checkpoint.json"
        if rng.random() < 0.15:
            try:
                named = {} if manifest.is_symlink() else json.loads(manifest.read_bytes())
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
            whole.symlink_to(rng.choice([arena.outside, Path("/tmp"), Path("step-9"), arena.base / "run" / "final"]))
            break
        elif place.exists() and not place.is_dir():
            _spoil(place, rng, arena)
    _sign(step, rng)

    student, teacher = arena.fresh()

    def run_it() -> None:
        both = make_pair(student, teacher)
        student.decoder.requires_grad_(True)
        optimizer = adamw(student.decoder, SETTINGS)
        opened = open_run(run, both, optimizer, arena.prompts, SETTINGS, resume=True)
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
        named = json.loads(manifest.read_bytes()) if manifest.is_file() and rng.random() < 0.5 else None
        for name in named["files"] if named else ():
            data = (step / name).read_bytes()
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


LOADERS: dict[str, tuple[Loader, int, str]] = {  # weight, what a message names
    "config": (of_config, 20, r"config\.json|/work/"),
    "index": (of_index, 10, "/work/"),
    "weights": (of_weights, 10, "/work/"),
    "tokenizer": (of_tokenizer, 14, "/work/|student"),
    "folder": (of_folder, 10, "/work/|chat template|prompt"),
    "template": (of_template, 12, "chat template|messages"),
    "prompts": (of_prompts, 14, "/work/"),
    "report": (of_report, 5, "/work/"),
    "checkpoint": (of_checkpoint, 3, "/work/|/outside|--out"),
    "cache": (of_cache, 2, "/work/"),
}


# -- the judge -----------------------------------------------------------------------------------


def _slow(_number: int, _frame: Any) -> None:
    raise TooSlowError


def judged(name: str, number: int, seed: int, arena: Arena) -> tuple[str, str]:
    """`loaded`, `refused` or `failed`, and why."""
    make, _, names = LOADERS[name]
    run = make(arena, random.Random(f"{seed} {name} {number}"))
    home = os.getcwd()
    os.chdir(arena.work)
    try:
        with WATCH.over(arena.work), warnings.catch_warnings():
            warnings.simplefilter("error")
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                run()
                verdict, why = "loaded", ""
            except (ValueError, OSError) as error:
                verdict, why = "refused", str(error)
                if "expected" not in why or not re.search(names, why) or len(why) > LONGEST:
                    verdict, why = "failed", f"message of {len(why)}: {type(error).__name__}: {why[:300]}"
            except BaseException as error:  # noqa: BLE001 (that none of them comes out is the test)
                verdict, why = "failed", f"{type(error).__name__}: {str(error)[:300]}"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
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
    memory, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, _slow)
    cache = os.environ.get("MINIGOLD_CACHE")
    for module, name in native:
        setattr(module, name, _watched(getattr(module, name)))
    sandbox.SECONDS = 0.2
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else None
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, memory[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, handler)
        logging.disable(logging.NOTSET)
        for module, name, value in kept:
            setattr(module, name, value)
        os.environ.pop("MINIGOLD_CACHE", None)
        if cache is not None:
            os.environ["MINIGOLD_CACHE"] = cache


def fuzz(name: str, numbers: range, seed: int, arena: Arena, note: Callable[[str, int, str], None]) -> None:
    """Judges the inputs of one loader; what lies beside the folder in use is looked at now and then."""
    for number in numbers:
        verdict, why = judged(name, number, seed, arena)
        if (number + 1) % 500 == 0 or number == numbers[-1]:
            touched = arena.check_untouched()
            if touched:
                verdict, why = "failed", f"changed since the last look: {touched[:300]}"
        note(verdict, number, why)


def _in_children(name: str, count: int, seed: int, arena: Arena) -> tuple[dict[str, int], list[Failure]]:
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
        size, since, status = 0, time.monotonic(), None
        while status is None:
            ended, code = os.waitpid(child, os.WNOHANG)
            status = code if ended else None
            now = progress.stat().st_size
            size, since = (now, time.monotonic()) if now != size else (size, since)
            if status is None and time.monotonic() - since > HANGS:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.05)
        for line in progress.read_text().splitlines():
            verdict, number, why = json.loads(line)
            counts[verdict] += 1
            done = number + 1
            if verdict == "failed":
                failures.append(Failure(name, number, why))
        if status != 0 and done < count:
            counts["failed"] += 1
            failures.append(Failure(name, done, f"the process ended with {os.waitstatus_to_exitcode(status)}"))
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
            counts, failures = _in_children(name, math.ceil(args.inputs * LOADERS[name][1] / total), args.seed, arena)
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
