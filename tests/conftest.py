# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no hub, hypothesis profiles, and the dimension letters."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings

from shape_suffix import ShapeSuffixes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns after a fork

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=30, derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=5000, deadline=None)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)

WATCHED = 8  # cases of a parametrized test: watching takes as long as a short case itself
cases: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def shape_suffixes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every tensor of the package has the rank and sizes that its name says."""
    test = request.node.nodeid.partition("[")[0]
    cases[test] += 1
    if cases[test] > WATCHED and settings.get_current_profile_name() != "nightly":
        yield
        return
    with ShapeSuffixes("minigold") as watch:
        yield
    assert not watch.errors, "\n".join(dict.fromkeys(watch.errors))
