# SPDX-License-Identifier: Apache-2.0
"""The text of a chat template in, a function that fills it out: within bounds of time and size.

Templates are programs of strangers. jinja2's sandbox keeps them from what leads out of it; here they
are also kept from eating up time and memory. Every turn of a loop, call, filter and sum looks at the
clock, and what they give is weighed: characters, elements, and those of all that lies inside.
What makes a large thing of small ones at one blow is refused before it runs.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any

__all__ = ["compiled"]

LONGEST = 2**16  # characters of a template; real ones have up to 20,000; 4 s to compile the worst
LARGEST = 2**22  # size of any value: characters, and 16 for each element
MADE = 2**28  # size of all values that are made while it is filled
SECONDS = 5.0  # to compile it and fill it
BITS = 2**12  # of an integer: division takes the square of them
COMPARED = 2**30  # characters of one text times those of another
REFUSED_FILTERS = (  # templates of models do not use them; their work is the product of two sizes
    "batch", "center", "format", "indent", "pprint", "round", "slice", "sum", "urlize", "wordwrap",
    "xmlattr",
)  # fmt: skip
REFUSED_METHODS = (
    "center", "encode", "expandtabs", "format", "format_map", "ljust", "rjust", "to_bytes",
    "translate", "zfill",
)  # fmt: skip
CHECKED_FILTERS = ("join", "replace", "tojson", "trim")
WIDEST = 16  # characters of an indent or separator of tojson
PATTERN = 200  # characters of a date's pattern
ENDS = ("strip", "lstrip", "rstrip", "trim", "rfind", "rindex", "rsplit", "rpartition")


def compiled(template: str) -> Callable[..., str]:
    """Fills the template with the names that it is given, as `transformers` does.

    Raises:
        ValueError: the template is too long, or what it makes on the way is.
        TimeoutError: it takes too long.
        Exception: whatever else a program can raise.
    """
    import jinja2.ext
    import jinja2.sandbox
    import jinja2.visitor

    if len(template) > LONGEST:
        raise ValueError(f"a template of {len(template):,} characters, more than {LONGEST:,}")
    began = time.monotonic()
    sandbox = type(
        "Sandbox",
        (_Bounds, jinja2.sandbox.ImmutableSandboxedEnvironment),
        {"in_context": staticmethod(jinja2.pass_context)},
    )(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_tag(jinja2), jinja2.ext.loopcontrols],
    )
    sandbox.end = began + SECONDS
    filters = {**sandbox.filters, "tojson": sandbox.tojson}
    sandbox.filters = {
        name: sandbox.bounded(name, run)
        for name, run in filters.items()
        if name not in REFUSED_FILTERS
    } | {
        "turns": sandbox.turns,
        "weighed": sandbox.weighed,
        "concatenated": lambda values: sandbox.concat(map(str, values)),
    }
    del sandbox.globals["lipsum"]
    sandbox.globals |= {
        "dict": _new_dict,
        # one could hold another twice, and that one another twice
        "namespace": type(
            "Namespace", (jinja2.utils.Namespace,), {"__repr__": lambda _: "<Namespace>"}
        ),
        "raise_exception": _raiser(jinja2),
        "strftime_now": _strftime_now,
    }
    checks = type("Checks", (_Checks, jinja2.visitor.NodeTransformer), {"nodes": jinja2.nodes})()
    tree = checks.visit(sandbox.parse(template))
    tree.set_environment(sandbox)
    ready = sandbox.from_string(tree)
    sandbox.look_at_the_clock()
    spent = time.monotonic() - began

    def fill(**names: Any) -> str:
        sandbox.end, sandbox.made = time.monotonic() + SECONDS - spent, 0
        text = str(ready.render(**names))
        sandbox.look_at_the_clock()
        return text

    return fill


class _Bounds:
    """What stands before a sandbox of jinja2."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    in_context: Callable[..., Any]  # the mark of a filter that is given the context
    end = math.inf  # of the time
    made = 0

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        above: Any = super()
        return self.weighed(above.call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_size(_size((args, kwargs), LARGEST))
        text = getattr(function, "__self__", None)
        if isinstance(text, str):
            _check_texts(function.__name__, text, *args, *kwargs.values())
        above: Any = super()
        return self.weighed(above.call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        above: Any = super()
        return attr not in REFUSED_METHODS and bool(above.is_safe_attribute(obj, attr, value))

    def wrap_str_format(self, value: Any) -> None:
        """Gives no safe `format`: a width in it can be of any size."""

    def concat(self, pieces: Iterable[str]) -> str:
        return "".join(self.gathered(pieces))

    def gathered(self, values: Iterable[Any]) -> list[Any]:
        """A list of them, unless they are too many."""
        kept, size = [], 0
        for value in self.turns(values):
            kept.append(value)
            size += _size(value, LARGEST - size)
            _check_size(size)
        return kept

    def turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.look_at_the_clock()
            yield value

    def weighed(self, value: Any) -> Any:
        self.look_at_the_clock()
        size = _size(value, LARGEST)
        self.made += size
        _check_size(size)
        _check_size(self.made, MADE)
        return value

    def look_at_the_clock(self) -> None:
        if time.monotonic() > self.end:
            raise TimeoutError(f"nothing after {SECONDS:.0f} seconds")

    def bounded(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that checks what goes in and what comes out.

        It asks for the context, so that jinja2 does not run it while it compiles: what it makes
        of constants would be written into the code.
        """
        before = getattr(run, "jinja_pass_arg", None)  # what jinja2 would put before the value
        signature = inspect.signature(run) if name in CHECKED_FILTERS else None

        @self.in_context
        def checked(context: Any, *args: Any, **kwargs: Any) -> Any:
            if before:
                known = {"context": context, "eval_context": context.eval_ctx, "environment": self}
                args = (known[before.name], *args)
            if signature:
                _check_filter(name, signature.bind(*args, **kwargs).arguments)
            found = run(*args, **kwargs)
            return self.gathered(found) if isinstance(found, Iterator) else self.weighed(found)

        return checked

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As `transformers` does, piece by piece: indents can be far longer than the value."""
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return self.concat(encoder.iterencode(value))


class _Checks:
    """Puts filters around what jinja2 does without asking its environment."""

    nodes: Any
    generic_visit: Callable[[Any], Any]

    def visit_For(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.iter = self._through("turns", node.iter)
        return node

    def visit_Concat(self, node: Any) -> Any:
        node = self.generic_visit(node)
        return self._through("concatenated", self.nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: Any) -> Any:
        node = self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") == "store"
        return node if is_target else self._through("weighed", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Const(self, node: Any) -> Any:
        _size(node.value, LARGEST)  # an integer in hexadecimal can be huge
        return node

    def _through(self, name: str, node: Any) -> Any:
        return self.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# -- what is refused -----------------------------------------------------------------------------


def _size(value: Any, limit: int) -> int:
    """That of a value with all inside it; counting stops above the limit.

    An integer of more than `BITS` is refused.
    """
    size, left = 0, [value]
    while left and size <= limit:
        one = left.pop()
        if isinstance(one, str | bytes):
            size += len(one)
        elif isinstance(one, int):
            if one.bit_length() > BITS:
                raise ValueError(f"an integer of more than {BITS:,} bits")
            size += one.bit_length() // 8
        elif isinstance(one, list | tuple | AbstractSet | Mapping | ValuesView):
            size += 16 * len(one)
            if size <= limit:
                left.extend(one)
                left.extend(one.values() if isinstance(one, Mapping) else ())
    return size


def _check_size(size: int, limit: int = LARGEST) -> None:
    if size > limit:
        raise ValueError(f"values of more than {limit:,} characters")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "**" or (operator == "%" and isinstance(left, str)):
        raise ValueError(f"the operator {operator}, which makes large values of small ones")
    for one, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(one, str | list | tuple) and isinstance(times, int):
            _check_size(len(one) * times)


def _check_texts(name: str, text: str, *args: Any) -> None:
    """Of methods of texts: those whose work or result is the product of two sizes."""
    if name == "replace" and len(args) > 1:
        old, new = map(str, args[:2])
        _check_size(len(text) + text.count(old) * len(new))
    if name == "join" and args and hasattr(args[0], "__len__"):
        _check_size(len(text) * len(args[0]))
    if name in ENDS and args and len(text) * max(len(str(arg)) for arg in args) > COMPARED:
        raise ValueError(f"{name} of a text of {len(text):,} characters with as long a one")


def _check_filter(name: str, given: Mapping[str, Any]) -> None:
    """The same of filters, and more than `WIDEST` between values; by the arguments' names."""
    if name == "join":
        if given.get("attribute") is not None:
            raise ValueError("the filter join with an attribute; map(attribute=...) goes before it")
        if hasattr(given["value"], "__len__"):
            _check_texts(name, str(given.get("d", "")), given["value"])
    elif name == "replace":
        _check_texts(name, str(given["s"]), given["old"], given["new"])
    elif name == "trim":
        _check_texts(name, str(given["value"]), given.get("chars", ""))
    elif name == "tojson":
        indent = given.get("indent") or 0
        wide = [indent if isinstance(indent, int) else len(indent)]
        wide += map(len, given.get("separators") or ())
        if max(wide) > WIDEST:
            raise ValueError(f"the filter tojson with an indent or separators above {WIDEST}")


# -- what templates of models are given, as in `transformers` --------------------------------------


def _generation_tag(jinja2: Any) -> Any:
    """`{% generation %} … {% endgeneration %}`: marks answers for training; it writes nothing."""

    def parse(_self: Any, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)

    return type("Generation", (jinja2.ext.Extension,), {"tags": {"generation"}, "parse": parse})


def _raiser(jinja2: Any) -> Any:
    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    return raise_exception


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # the class itself would let templates change the messages


def _strftime_now(pattern: str) -> str:
    """The time; no pattern that is long, and no width in it, as in `%100000000d`."""
    if len(pattern) > PATTERN or re.search(r"%[-_+^#]*\d", pattern):
        raise ValueError(f"a pattern of a date with a width, or above {PATTERN} characters")
    return datetime.now().strftime(pattern)  # noqa: DTZ005 (local time, as `transformers` does)
