# SPDX-License-Identifier: Apache-2.0
"""What is fed to loaders: JSON, bytes, headers, tokenizers and chat templates that went wrong.

All is drawn from the `random.Random` that is given.
"""

import base64
import copy
import json
import math
import random
import re
from typing import Any

__all__ = ["as_text", "changed", "header_changed", "spoiled", "template_of", "with_other_parts"]

# -- changes -------------------------------------------------------------------------------------

STRANGE: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 7, 255, 2**15, 2**24, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63,
    2**64, 10**30, 10**300, -(10**300), 0.5, -0.0, 1.5, 1e308, -1e308, 1e-300, 5e-324, 1 + 2e-16, math.nan,
    math.inf, -math.inf, "", " ", "a", "0", "true", "null", "\x00", "é", "\ud800", "\udc00x", "🙂", "x" * 10**5,
    "../outside/secret.json", "/etc/passwd", "/dev/zero", "..", ".", "~", "C:x", "file:///etc/passwd",
    [], {}, [[]], [None], {"": None}, [0] * 1000, [1, "a"], {"a": {"b": [1]}}, "step-3", "<|im_end|>",
    ["full_attention"], ["full_attention", "sliding_attention"], {"rope_type": "yarn"}, {"content": "</s>"},
]  # fmt: skip
LITERALS = (
    "1e999", "-1e999", "1" * 400, "-" + "9" * 5000, "1.0e+308", "0.1e-9999", "01", "+1", ".5", "0x10", "NaN",
    "-Infinity", "nul", "'a'", '"\\ud83d"', '"\\u0000"', '"\t"', "[1,]", "{1: 2}", "undefined", "",
)  # fmt: skip


def _place(value: Any, rng: random.Random) -> list[Any]:
    """The keys on the way to somewhere inside a value; none if it holds nothing."""
    way: list[Any] = []
    while isinstance(value, dict | list) and value and (not way or rng.random() < 0.7):
        way.append(
            rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        )
        value = value[way[-1]]
    return way


def _near(value: Any, rng: random.Random) -> Any:
    """What stands near a value."""
    if type(value) in (int, float):
        return rng.choice([value + 1, value - 1, value * 2, -value, 0.5, str(value), [value]])
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice(
            [value[:cut], value + value, value.upper(), [value], value[:cut] + "\u2028🙂"]
        )
    if isinstance(value, list):
        return rng.choice(
            [value[::-1], value[1:], value * 2, value[:1] * 50, [value], dict.fromkeys("ab", value)]
        )
    return copy.deepcopy(rng.choice(STRANGE))


def changed(value: Any, rng: random.Random) -> Any:
    """A copy with one to four places changed, taken away, moved, renamed or wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        way = _place(value, rng)
        if not way:
            return copy.deepcopy(rng.choice(STRANGE))
        *way, key = way
        holder, kind = _at(value, way), rng.randrange(10)
        if kind < 4:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))
        elif kind < 6:
            holder[key] = _near(holder[key], rng)
        elif kind == 6:
            del holder[key]
        elif kind == 7 and isinstance(holder, dict):
            names = [key + "x", "", "__class__", "prompt", "step", "x" * 300]
            holder[rng.choice(names)] = holder.pop(key)
        elif kind == 8:
            holder[key] = json.loads(json.dumps(_at(value, _place(value, rng))))
        else:
            for _ in range(rng.choice([1, 3, 97, 98, 99, 100, 101, 300])):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    return value


def _at(value: Any, way: Any) -> Any:
    for key in way:
        value = value[key]
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
        return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b""]) + text.encode(
            "utf-8", "surrogatepass"
        )
    elif kind == 4:
        return text.encode(
            rng.choice(["utf-16", "utf-32", "utf-7"]),
            "surrogatepass" if rng.random() < 0 else "replace",
        )
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


DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "f32", "", "X", None, 3)  # fmt: skip
SIZES = (0, 1, 2, 3, 5, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5, None, "1", True, [1])  # fmt: skip


def header_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.choice([1, 1, 2, 4])):
        if header:
            _change_entry(header, len(body), rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = as_text(header, rng)
    n = len(text)
    size = rng.choice([*[n] * 12, 0, 1, 7, n - 1, n + 1, 2**24, 2**24 + 1, 2**31, 2**63, 2**64 - 1])
    body = body if rng.random() < 0.9 else body[: rng.randrange(len(body) + 1)]
    return size.to_bytes(8, "little") + text + body


def _change_entry(header: dict[str, Any], size: int, rng: random.Random) -> None:
    name, kind = rng.choice(list(header)), rng.randrange(9)
    entry = header[name]
    if not isinstance(entry, dict) or not {"shape", "data_offsets"} <= {*entry} or kind == 0:
        header[rng.choice([name + "x", "__metadata__", "", "a" * 10**5])] = header.pop(name)
    elif kind == 1:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 2 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(SIZES)
    elif kind <= 3:
        entry["shape"] = rng.choice([[], [0], [0, 2**62, 2**62], [2**32, 2**32], [1], [None]])
    elif kind <= 5:
        entry["data_offsets"][rng.randrange(2)] = rng.choice([*SIZES, size, size + 1])
    elif kind == 6:
        twin = rng.choice(list(header))
        header[name], header[twin] = header[twin], entry
    elif kind == 7:
        header[name] = copy.deepcopy(rng.choice(STRANGE))
    else:
        del header[name]


# -- tokenizers ----------------------------------------------------------------------------------

PATTERNS = (
    {"String": ""}, {"String": " "}, {"String": "a"}, {"Regex": ""}, {"Regex": "(a+)+$"}, {"Regex": "(.*)*b"}, {"Regex": "["},
    {"Regex": "\\p{L}+"}, {"Regex": "(?<=a)"}, {"Regex": "(?:a|a)*c"}, {"Regex": "\\b"}, {"Regex": "(" * 5000}, {"Regex": "a{99999}"},
    {"Regex": "."}, {"Regex": "^"}, {"Regex": "(a)\\1"}, {"Regex": "\\x{110000}"}, {"Regex": "(?i)ß"}, {}, None,
)  # fmt: skip
TEXTS = ("", " ", "a", "▁", "▁▁", "<unk>", "</s>", "##", "é", "e\u0301", "🙂", "\x00", "x" * 1000, "<0x41>", "Ġ")  # fmt: skip
NUMBERS = (0, 1, 2, 7, 255, 10**4, 2**24 - 1, 2**24, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, -1, 1.5, None)  # fmt: skip


def _part(kind: str, rng: random.Random) -> Any:
    """A normalizer, pre-tokenizer, post-processor or decoder, by the schema of tokenizer.json."""
    text, pattern, number = rng.choice(TEXTS), rng.choice(PATTERNS), rng.choice(NUMBERS)
    flag, behavior = (
        rng.random() < 0.5,
        rng.choice(["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]),
    )
    metaspace = {
        "type": "Metaspace",
        "replacement": rng.choice(["▁", "", "ab", " "]),
        "prepend_scheme": rng.choice(["always", "never", "first"]),
        "split": flag,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": flag,
        "trim_offsets": not flag,
        "use_regex": flag,
    }
    charsmap = base64.b64encode(rng.randbytes(rng.choice([0, 3, 4, 64, 4096]))).decode()
    piece = rng.choice(
        [
            {"Sequence": {"id": rng.choice("ABC"), "type_id": number}},
            {"SpecialToken": {"id": text, "type_id": 0}},
        ]
    )
    special = {
        text: {"id": rng.choice([text, "x"]), "ids": [number], "tokens": [rng.choice(TEXTS)]}
    }
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
    name = {
        "normalizer": "normalizers",
        "pre_tokenizer": "pretokenizers",
        "post_processor": "processors",
        "decoder": "decoders",
    }[kind]
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
            flags = {
                key: rng.random() < 0.5
                for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            token = {
                "id": rng.choice([*NUMBERS, 3, 500, 501]),
                "content": rng.choice(TEXTS),
                **flags,
            }
            whole["added_tokens"].insert(rng.randrange(len(whole["added_tokens"]) + 1), token)
        elif kind == 5:
            vocab = model["vocab"]
            if isinstance(vocab, dict):
                vocab[rng.choice([*vocab, *TEXTS])] = rng.choice(NUMBERS)
            elif isinstance(vocab, list):
                vocab[rng.randrange(len(vocab))] = [
                    rng.choice(TEXTS),
                    rng.choice([*NUMBERS, -1e308, 1e308]),
                ]
        elif kind == 6:
            key = rng.choice(
                [
                    *model,
                    "unk_token",
                    "unk_id",
                    "byte_fallback",
                    "dropout",
                    "ignore_merges",
                    "type",
                    "continuing_subword_prefix",
                    "end_of_word_suffix",
                ]
            )
            if key not in ("vocab", "merges"):
                model[key] = rng.choice(
                    [*TEXTS, *NUMBERS, True, "BPE", "Unigram", "WordPiece", "WordLevel", 0.5]
                )
        else:
            number = rng.choice(NUMBERS)
            whole[rng.choice(["truncation", "padding"])] = rng.choice([
                {"direction": "Right", "max_length": number, "strategy": "LongestFirst", "stride": rng.choice(NUMBERS)},
                {"strategy": {"Fixed": number}, "direction": "Left", "pad_to_multiple_of": number, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}])  # fmt: skip
    return whole


# -- chat templates ------------------------------------------------------------------------------

ATOMS = (
    "''", "'a'", "'<|im_end|>'", "1", "0", "-1", "2.5", "1000000000", "1000000", "10**9", "2**(2**30)", "99999", "[]", "[1]", "{}", "()", "none", "true",
    "messages", "messages[0]", "messages[0].content", "bos_token", "eos_token", "tools", "self", "loop", "x", "ns", "ns.x", "m",
    "range(1000000000)", "range(99999)", "range(-5)", "namespace()", "dict(a=1)", "cycler(1)", "joiner()", "lipsum", "raise_exception",
    "strftime_now", "strftime_now('%Y')", "('a' * 1000000)", "('a' * 1000000000)", "(range(99999) | list)", "raise_exception('x')",
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
    "format(1, w=1000000000)", "format_map(x)", "ljust(1000000000)", "center(99999)", "zfill(1000000000)", "encode()", "expandtabs(1000000000)",
    "translate({97: 'b'})", "to_bytes(1000000000, 'big')", "items()", "keys()", "get('a')", "append(1)", "pop()", "clear()", "update(a=1)",
    "index(1)", "count('a')", "startswith(x)", "next", "reset()", "cycle(1, 2)", "unescape()", "__html__()", "copy()", "fromkeys(x)",
)  # fmt: skip
FILTERS = (
    "list", "length", "tojson", "tojson(indent=1000000000)", "tojson(separators=(x, x))", "join(x)", "replace('a', x)", "replace('', x)", "indent(1000000)",
    "indent(x)", "center(1000000000)", "batch(1000000000, 'x')", "slice(1000000000)", "sum", "sum(start=[])", "map('upper')", "map(attribute='__class__')",
    "map('attr', '__class__')", "attr('__class__')", "attr('upper')", "format(1)", "round(1000000000, 'ceil')", "round(2)", "default(x)", "sort", "unique",
    "groupby('role')", "first", "last", "int", "int(base=99)", "float", "string", "safe", "e", "urlize", "wordwrap(1, wrapstring=x)", "xmlattr", "dictsort",
    "pprint", "striptags", "reverse", "selectattr('role')", "select('eq', x)", "reject('in', x)", "random", "trim(x)", "truncate(1000000000)", "items",
    "filesizeformat", "wordcount", "urlencode", "min", "max", "title", "turns", "weighed", "concatenated", "nothing", "abs", "d",
)  # fmt: skip
OPERATORS = (
    "+",
    "-",
    "*",
    "**",
    "/",
    "//",
    "%",
    "~",
    "in",
    "not in",
    "==",
    "<",
    "and",
    "or",
    "is",
    "if x else",
)
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
        return rng.choice(
            [
                f"({inner})['{name}']",
                f"({inner} | attr('{name}'))",
                f"({inner})['{name[:4]}' ~ '{name[4:]}']",
            ]
        )
    if kind == 4:
        return f"({inner}).{rng.choice(METHODS)}"
    if kind in (5, 6):
        return f"({inner} | {rng.choice(FILTERS)})"
    return f"({inner} {rng.choice(OPERATORS)} {_expression(rng, depth + 1)})"


def template_of(rng: random.Random) -> str:
    """A program of attempts."""
    parts = [
        "{% set ns = namespace(x=['a'], n=3) %}{% set x = "
        + rng.choice(["'a'", "'a' * 1000000", "messages", "7"])
        + " %}"
    ]
    for _ in range(rng.choice([1, 1, 2, 3])):
        one, kind = _expression(rng), rng.randrange(9)
        if kind < 4:
            parts.append("{{ " + one + " }}")
        elif kind == 4:
            parts.append("{% for m in " + one + " %}{{ " + _expression(rng) + " }}{% endfor %}")
        elif kind == 5:
            parts.append("{% set ns.x = " + one + " %}{{ ns.x }}")
        elif kind == 6:
            parts.append(
                "{% macro m(x) %}{{ " + one + " }}{% endmacro %}{{ m(" + _expression(rng) + ") }}"
            )
        elif kind == 7:
            parts.append("{% filter " + rng.choice(FILTERS) + " %}{{ " + one + " }}{% endfilter %}")
        else:
            parts.append(rng.choice(HARD))
    text = "".join(parts)
    return text if rng.random() < 0.9 else spoiled(text.encode(), rng).decode("utf-8", "replace")
