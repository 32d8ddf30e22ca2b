# SPDX-License-Identifier: Apache-2.0
"""Two real models as Hugging Face folders, for tests marked `real`.

The conversion stands in `examples/real_pair.py`, where a reader sees it run; here it is imported
by its path, since examples are no package.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["example", "greedy_difference", "real_folder"]

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    """The module of `examples/<name>.py`."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a Python file examples/{name}.py, got none")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


real_folder = example("real_pair").real_folder
greedy_difference = example("real_pair").greedy_difference
