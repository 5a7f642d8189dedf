"""Resident memory of one rival in a process of its own: `python -m benchmarks.resident MODEL RIVAL THREADS`.

The peak of a process is one number for all that it did, so each rival has a process, and the peak is set back after the
rival was built. What is reported is the whole process: interpreter and libraries, weights, W0, gradients, activations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["can_measure", "resident", "resident_all"]

RIVALS = ("frozen", "ours", "peft", "full")

_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def can_measure() -> bool:
    """Return whether this system tells the peak of a process, and lets it be set back (Linux)."""
    return _REFS.exists()


def _peak() -> int:
    """Return the largest resident size since the last `_set_back`, in bytes."""
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _set_back() -> None:
    _REFS.write_text("5", encoding="utf-8")


def resident(name: str, rival: str, threads: int) -> dict[str, int]:
    """Return bytes: `built`, the peak while the rival is made, and `step`, the peak of three steps after that."""
    from .measure import pin
    from .models import WORKS
    from .rivals import make

    pin(threads)
    work = WORKS[name]
    found = make(rival, work, work.build(), work.batch())
    built = _peak()
    _set_back()
    for _ in range(3):
        found.prepare()
        found.step()
    return {"built": built, "step": _peak()}


def resident_all(name: str, threads: int, rivals: Sequence[str] = RIVALS) -> dict[str, dict[str, int]]:
    """Return `resident` of each rival, from children; as many at a time as there are cores, since none is timed."""

    def ask(rival: str) -> dict[str, int]:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.resident", name, rival, str(threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(rivals, pool.map(ask, rivals), strict=True))


if __name__ == "__main__":
    print(json.dumps(resident(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
