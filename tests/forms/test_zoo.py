"""A sample of the zoo is held against its own eager models; `make coverage` looks at every architecture."""

from __future__ import annotations

import pytest

from benchmarks.coverage.examine import examine
from benchmarks.coverage.zoo import LIBRARIES, QUICK, ZOO

SAMPLE = [name for entries in LIBRARIES.values() for name in [entry.name for entry in entries][::6]]
"""One architecture of six of each library."""
ROWS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLE if name not in QUICK)]


@pytest.mark.parametrize("name", ROWS)
def test_the_model_is_its_own_oracle(name: str) -> None:
    assert examine(ZOO[name]).faults == []


def test_the_zoo_is_large_and_told_once() -> None:
    """Enough architectures of each library, from as many source files; each name once."""
    least = {"timm": 60, "torchvision": 15, "transformers": 60}
    assert len(ZOO) == sum(map(len, LIBRARIES.values()))
    for library, entries in LIBRARIES.items():
        assert len({entry.source for entry in entries}) >= least[library]
