# SPDX-License-Identifier: Apache-2.0
"""What holds for the project as a whole: imports, dependencies, sizes, and nothing foreign."""

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import minigold
from minigold.config import Config
from mutants import MUTANTS
from shape_suffix import ShapeSuffixes

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minigold"
LEAVES = (
    "offsets", "align", "events", "cache", "packed", "replay", "model", "sample", "disagree", "loss", "rope",
)  # fmt: skip
BESIDE = {"replay": ("cache",), "model": ("cache", "packed", "replay")}  # what a leaf needs
DEPENDENCIES = {"torch", "tokenizers", "safetensors", "numpy"}
OPTIONAL = {
    "jinja2",
    "tqdm",
    "huggingface_hub",
    "wandb",
    "trackio",
}  # imported inside the functions that use them
SKIPPED = {".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv", "__pycache__",
           "build", "dist", "runs", "shared",
           *(path.parent.name for path in ROOT.glob("*/pyvenv.cfg"))}  # fmt: skip
SOURCES = sorted(PACKAGE.glob("*.py"))


def files(*suffixes: str) -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        foreign = SKIPPED.intersection(parts) or any(p.endswith(".egg-info") for p in parts)
        if (
            path.is_file()
            and path.name != ".coverage"
            and not foreign
            and (not suffixes or path.suffix in suffixes)
        ):
            yield path


def python(code: str, *args: str, cwd: Path | None = None) -> str:
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all imported modules, those for type checkers apart."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "expected absolute imports"
            module = str(node.module)
            yield from (
                f"{module}.{name.name}" if module == "minigold" else module for name in node.names
            )
        yield from imports(node)


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    told = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            told.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(map(str.strip, source.splitlines()), start=1)
    return {n for n, line in lines if line and not line.startswith("#") and n not in told}


# ------------------------------------------------------------------------- modules
def test_importing_the_package_loads_nothing_else() -> None:
    loaded = python(
        "import minigold, sys; print(*[m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    assert loaded.split() == []


def test_importing_all_of_it_costs_little_beyond_torch() -> None:
    code = (
        "import time; start = time.process_time(); import torch; torch_too = time.process_time(); "
        "import minigold.cli, minigold.demo; print((time.process_time() - torch_too) / (torch_too - start))"
    )
    shares = [float(python(code)) for _ in range(3)]  # of the processor's time for torch itself
    assert statistics.median(shares) <= 0.3, shares


def test_importing_changes_no_global_state() -> None:
    code = """
import importlib, json, locale, logging, os, random, signal, sys, warnings
import numpy, safetensors.torch, tokenizers, torch

def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, ("minigold", "transformers"))]
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": list(sys.path),
        "handlers": [[repr(h) for h in one.handlers] for one in loggers],
        "levels": [one.level for one in loggers], "warnings": [str(f) for f in warnings.filters],
        "random": str(random.getstate()), "numpy": str(numpy.random.get_state()),
        "numpy errors": numpy.geterr(), "torch": torch.get_rng_state().tolist(),
        "dtype": str(torch.get_default_dtype()), "grad": torch.is_grad_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "locale": locale.setlocale(locale.LC_ALL), "signal": str(signal.getsignal(signal.SIGINT)),
    }

import minigold
before = state()
for name in minigold.MODULES:
    importlib.import_module(f"minigold.{name}")
after = state()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""
    assert json.loads(python(code)) == []


def test_each_module_imports_only_from_those_above_it() -> None:
    order = {f"minigold.{name}": i for i, name in enumerate(minigold.MODULES)}
    for path in SOURCES:
        if path.stem.startswith("__"):
            continue
        for name in imports(ast.parse(path.read_text("utf-8"))):
            if name in order:
                assert order[name] < order[f"minigold.{path.stem}"], f"{path.name} imports {name}"


def test_the_reading_order_holds_every_module() -> None:
    found = {path.stem for path in SOURCES if not path.stem.startswith("__")}
    assert found == set(minigold.MODULES)
    first = (
        "offsets",
        "align",
        "events",
        "cache",
        "packed",
        "replay",
        "model",
        "sample",
        "carry",
        "teacher",
        "disagree",
        "loss",
    )
    assert minigold.MODULES[: len(first)] == first


def test_the_readme_has_a_line_for_each_module_in_reading_order() -> None:
    rows = re.findall(r"^\| `minigold/.*$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    named = [re.findall(r"minigold/(\w+)\.py", row) for row in rows]
    assert sorted(name for names in named for name in names) == sorted(minigold.MODULES)
    places = [min(minigold.MODULES.index(name) for name in names) for names in named]
    assert places == sorted(places)


def test_the_page_of_vendoring_names_each_leaf_and_what_it_needs() -> None:
    page = (ROOT / "docs" / "vendoring.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)\.py` \| (.*?)\| (.*?) \|", page, re.MULTILINE)
    assert {leaf: tuple(re.findall(r"(\w+)\.py", beside)) for leaf, beside, _ in rows} == {
        leaf: BESIDE.get(leaf, ()) for leaf in LEAVES
    }
    for leaf, _, needs in rows:
        tree = ast.parse((PACKAGE / f"{leaf}.py").read_text("utf-8"))
        found = {name.partition(".")[0] for name in imports(tree)} & DEPENDENCIES
        assert set(needs.split(", ")) == found, leaf


def test_the_lines_of_the_page_of_vendoring_make_a_package(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "vendoring.md").read_text("utf-8")
    (lines,) = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine").mkdir()
    shutil.copytree(PACKAGE, tmp_path / "minigold", ignore=shutil.ignore_patterns("demo_data"))
    subprocess.run(["bash", "-euc", lines], cwd=tmp_path, check=True)
    shutil.rmtree(tmp_path / "minigold")
    code = """
import sys
sys.modules["minigold"] = None
from mine.model import Decoder
print(Decoder.__module__)
"""
    assert python(code, cwd=tmp_path).strip() == "mine.model"


def test_leaves_work_when_copied_alone(tmp_path: Path) -> None:
    for leaf in LEAVES:
        (tmp_path / leaf).mkdir()
        beside = BESIDE.get(leaf, ())
        for name in (leaf, *beside):
            text = (PACKAGE / f"{name}.py").read_text("utf-8")
            for other in beside:
                text = text.replace(f"from minigold.{other} import", f"from {other} import")
            (tmp_path / leaf / f"{name}.py").write_text(text, "utf-8")
    code = """
import importlib, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "minigold":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Nothing())
sys.path.remove("")
for leaf in sys.argv[2:]:
    sys.path.insert(0, f"{sys.argv[1]}/{leaf}")
    module = importlib.import_module(leaf)
    assert module.__file__.startswith(sys.argv[1]), module.__file__
    assert "torch" not in sys.modules or leaf not in ("offsets", "align"), leaf
    del sys.path[0], sys.modules[leaf]
print("ok")
"""
    assert python(code, str(tmp_path), *LEAVES, cwd=tmp_path).strip() == "ok"


# ------------------------------------------------------------------------- dependencies
def test_dependencies_are_the_four() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]} == DEPENDENCIES
    assert all(">=" in line for line in project["dependencies"])
    assert project["version"] == minigold.__version__


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_package_imports_only_the_four(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    own = {*sys.stdlib_module_names, "minigold", *DEPENDENCIES}
    everywhere = {name.partition(".")[0] for name in imports(tree)}
    assert everywhere - own <= OPTIONAL
    outside = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    assert {name.partition(".")[0] for name in imports(outside)} <= own


def test_every_tool_of_the_tests_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*extras["dependencies"], *extras["optional-dependencies"]["test"]]
    lines = (ROOT / "tests" / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} <= pinned


# ------------------------------------------------------------------------------ the tree
def test_no_path_of_a_machine_in_the_tree() -> None:
    home = re.escape(str(Path.home()) + "/") if len(Path.home().parts) > 2 else r"/home/\w"
    own = re.escape(str(ROOT)) if len(ROOT.parts) > 2 else r"(?!)"
    bad = re.compile(rf"{own}|{home}|/(?:home|Users|root|work|workspace)/\w|[A-Z]:\\\\")
    for path in files(".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".yaml", ".jinja", ""):
        if path.stat().st_size < 2**20 and path != Path(__file__):
            found = bad.search(path.read_text("utf-8"))
            assert found is None, f"{path.relative_to(ROOT)}: {found[0] if found else ''}"


def test_no_pickle_in_the_package() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text("utf-8"))
        assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & set(imports(tree))
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        bad = {"torch.save", "torch.load", "np.load", "np.save", "eval", "exec"}
        assert not bad & set(calls), path.name


def test_modules_can_be_read_in_one_sitting() -> None:
    """At most 450 lines of code: without blank lines, comments and docstrings."""
    sizes = {path.name: len(code_lines(path.read_text("utf-8"))) for path in SOURCES}
    assert {name: n for name, n in sizes.items() if n > 450} == {}


def test_every_source_names_its_licence() -> None:
    for path in files(".py"):
        assert path.read_text("utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n"), path


def test_the_readme_has_the_line_that_continuous_integration_runs() -> None:
    after = (ROOT / "README.md").read_text("utf-8").partition("<!-- ci:test -->")[2]
    assert re.match(r"\s*```\w*\npython -m pip install [^\n]*pytest\n```", after)


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert minigold.__version__ in text
    assert "### Numerics" in text


# ------------------------------------------------------------------------------ the package
def test_load_stays_the_function_beside_its_module() -> None:
    from minigold.load import load, resolve

    assert minigold.load is load
    assert callable(resolve)
    with pytest.raises(AttributeError, match=r"expected minigold\.load to stay"):
        minigold.load = print
    assert minigold.load is load


def test_names_are_found_and_others_refused() -> None:
    for name in (*minigold.__all__, *minigold.MODULES):
        assert getattr(minigold, name) is not None
        assert name in dir(minigold)
    with pytest.raises(AttributeError, match=r"expected one of .*, got minigold\.aline"):
        minigold.aline  # noqa: B018


def test_public_names_exist() -> None:
    for name in minigold.MODULES:
        module = sys.modules.get(f"minigold.{name}") or __import__(
            f"minigold.{name}", fromlist=["x"]
        )
        assert module.__all__, name
        for public in module.__all__:
            assert hasattr(module, public), f"{name}.{public}"


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "minigold", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["minigold", minigold.__version__])


# ------------------------------------------------------------------------ the test helpers
@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("a_NV = torch.zeros(3)", r"f: a_NV has shape \(3,\)"),
        ("a_NV, b_N = torch.zeros(3, 5), torch.zeros(5)", "f: b_N has N=5, but a_NV has N=3"),
        ("a_N1 = torch.zeros(3, 2)", "f: a_N1 has 1=2, but its name has 1=1"),
        ("a_C, b_C = np.zeros(3), np.zeros(4)", "f: b_C has C=4, but a_C has C=3"),
        ("a_NV, b_VN = torch.zeros(3, 5), torch.zeros(5, 3)", None),
        ("a_NV, SHARE_X, b_N = None, np.zeros(()), [1]", None),
        ("a_NV = torch.zeros(3); raise ValueError", None),
    ],
)
def test_dimension_letters_are_checked(statement: str, message: str | None) -> None:
    scope = {"torch": torch, "np": np, "__name__": "some_package.module"}
    exec(f"def f():\n    {statement}", scope)
    with ShapeSuffixes("some_package") as watch, suppress(ValueError):
        scope["f"]()
    if message is None:
        assert watch.errors == []
    else:
        assert len(watch.errors) == 1
        assert re.fullmatch(message, watch.errors[0])


def test_other_packages_are_not_checked() -> None:
    scope = {"torch": torch, "__name__": "some_package_2"}
    exec("def f():\n    a_NV = torch.zeros(3)", scope)
    with ShapeSuffixes("some_package") as watch:
        scope["f"]()
    assert watch.errors == []


def test_the_first_calls_alone_are_looked_at() -> None:
    outer, scope = sys.getprofile(), {"torch": torch, "__name__": "some_package"}
    exec("def f(n):\n    a_NV = torch.zeros(n)\n    return n", scope)
    with ShapeSuffixes("some_package") as watch:
        watch._left = 50
        scope["f"](3)
        for _ in range(50):
            len("")
        assert sys.getprofile() == outer
        scope["f"](4)
    assert watch.errors == ["f: a_NV has shape (3,)"]


def test_each_edit_of_the_mutants_finds_its_place() -> None:
    for mutant in MUTANTS:
        found = (ROOT / mutant.file).read_text("utf-8").count(mutant.old)
        assert found == 1, f"{mutant.file}: {mutant.old!r} found {found} times, expected once"
        assert (ROOT / mutant.tests).is_file()


def test_the_pages_name_the_defaults_that_there_are() -> None:
    own = Config()
    losses, recipe = (
        (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("losses", "recipe")
    )
    assert (
        f"| {own.beta:g}, the default |" in losses and f"| `{own.events}`, the default |" in losses
    )
    assert f"| `--beta` | {own.beta:g}, the default |" in recipe
    assert f"| `--where` | `{own.where}`, the default |" in recipe


def test_the_lines_that_the_page_of_losses_names_are_in_the_code() -> None:
    page = (ROOT / "docs" / "losses.md").read_text("utf-8")
    table = page.partition("| formula | line |")[2].partition("\n\n")[0]
    code = "".join(
        (ROOT / "minigold" / name).read_text("utf-8") for name in ("loss.py", "events.py")
    )
    found = [
        span
        for line in table.splitlines()[2:]
        for span in re.findall("`([^`]+)`", line.split(" | ")[-1])
    ]
    lines = [span for span in found if span != "events.py"]
    assert len(lines) >= 12
    squeezed = " ".join(code.split())
    assert [span for span in lines if " ".join(span.split()) not in squeezed] == []
