"""Every architecture of the zoo is held against its own eager model; the quick ones on each run."""

from __future__ import annotations

import pytest

from benchmarks.coverage.examine import examine
from benchmarks.coverage.zoo import LIBRARIES, QUICK, TWINS, ZOO

EXAMINED = [name for name in ZOO if name not in TWINS]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXAMINED]
)
def test_the_model_is_its_own_oracle(name: str) -> None:
    assert examine(ZOO[name]).faults == []


def test_the_zoo_is_large_and_told_once() -> None:
    """Enough architectures of each library, from as many source files; each name once."""
    least = {"timm": 60, "torchvision": 15, "transformers": 60}
    assert len(ZOO) == sum(map(len, LIBRARIES.values()))
    assert TWINS.keys() <= ZOO.keys() - QUICK
    assert set(TWINS.values()) <= set(EXAMINED)
    for library, entries in LIBRARIES.items():
        assert len({entry.source for entry in entries}) >= least[library]
