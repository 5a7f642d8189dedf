"""The clock: rivals take turns, round by round, so that what the machine does meets all of them."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Turn", "Turns", "alternate", "keep_freed", "pin", "ratio"]

WARM = 1
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(frozen=True)
class Turn:
    """What a rival does in a round: `prepare` is not timed, `run` is."""

    prepare: Callable[[], None]
    run: Callable[[], None]


@dataclass(frozen=True)
class Turns:
    """Seconds of one rival, by round: those that are compared, and of wall time.

    Args:
        busy: of the CPU (all threads together), or of the device.
        wall: wall time, with the wait for the device.
        clock: of CLOCKS, by which `busy` was measured.
    """

    busy: tuple[float, ...]
    wall: tuple[float, ...]
    clock: str = "cpu"

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return minimum and median of both."""
        return {
            clock: {"minimum": min(seconds), "median": statistics.median(seconds)}
            for clock, seconds in ((self.clock, self.busy), ("wall", self.wall))
        }


def _cpu_seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _cuda_seconds(run: Callable[[], None]) -> float:
    """Return the seconds between two events on the stream, where the device waits for launches too."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


CLOCKS = {"cpu": _cpu_seconds, "cuda": _cuda_seconds}
"""By device: seconds of a run."""


def alternate(turns: Mapping[str, Turn], rounds: int, device: str = "cpu") -> dict[str, Turns]:
    """Return the seconds of each rival over rounds that run every one once, in turning order.

    Args:
        turns: by rival. Each runs `WARM` times before.
        rounds: 1 or more. Garbage is collected between them, never within.
        device: whose clock is read.
    """
    busy: dict[str, list[float]] = {name: [] for name in turns}
    wall: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        for _ in range(WARM):
            turn.prepare()
            turn.run()
    names = list(turns)
    for index in range(rounds):
        gc.collect()
        gc.disable()
        try:
            for name in names if index % 2 == 0 else reversed(names):
                turns[name].prepare()
                wall_start = time.perf_counter()
                busy[name].append(CLOCKS[device](turns[name].run))
                wall[name].append(time.perf_counter() - wall_start)
        finally:
            gc.enable()
    return {name: Turns(tuple(busy[name]), tuple(wall[name]), device) for name in turns}


def ratio(one: Turns, other: Turns) -> dict[str, float]:
    """Return `one / other` in the seconds of `busy`: of the minima, of the medians, and `paired`, the median over
    rounds of the ratio within a round, which a machine that drifts leaves alone; and `wall`, paired as well.
    """
    return {
        "minimum": min(one.busy) / min(other.busy),
        "median": statistics.median(one.busy) / statistics.median(other.busy),
        "paired": statistics.median(a / b for a, b in zip(one.busy, other.busy, strict=True)),
        "wall": statistics.median(a / b for a, b in zip(one.wall, other.wall, strict=True)),
    }


def pin(threads: int) -> None:
    """Use so many threads, and the same random numbers every time."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def keep_freed() -> None:
    """Keep freed memory in the process (glibc), for every rival alike.

    By default it goes back to the system where it lies at the end of the heap, and the next step pays for new pages.
    Which rival's does depends on what the others hold, as all are in one process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
