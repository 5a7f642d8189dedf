"""Checkpoints that were damaged or forged: each is refused in one sentence, or loads as exactly what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def outcomes(first: int, last: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.damage.runner", str(first), str(last)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    told = json.loads(done.stdout.splitlines()[-1])
    assert not told["faults"], "\n".join(told["faults"][:20])
    counts: dict[str, int] = told["outcomes"]
    assert sum(counts.values()) == last - first
    return counts


def check(counts: dict[str, int]) -> None:
    """All doors were tried: most forgeries are found at the first, and some are no forgeries at all."""
    assert counts.keys() == {"refused at read", "refused at load", "refused at resume", "loaded as it says"}
    assert counts["refused at read"] > sum(counts.values()) / 2


def test_mutations() -> None:
    check(outcomes(0, 200))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 2])
def test_thousands_of_mutations(chunk: int) -> None:
    check(outcomes(chunk * 2000, (chunk + 1) * 2000))
