"""Clocks and memory counters. Compared variants take turns, so that a change of the machine's speed affects all."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn

Result = TypeVar("Result")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(frozen=True)
class Turn:
    """The work of a variant in a round. Only `run` is timed."""

    prepare: Callable[[], object]
    run: Callable[[], object]


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _cuda_seconds(run: Callable[[], object]) -> float:
    """Return the seconds between two events on the stream; waiting for kernel launches counts."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


CLOCKS = {"cpu": _cpu_seconds, "cuda": _cuda_seconds}
"""The seconds of a run, by device. On a CPU the seconds of all threads are added."""


def alternate(turns: Mapping[str, Turn], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Return the seconds of each variant, by round. Every round runs each variant, in alternating order.

    Args:
        turns: by variant. Each runs once before the first round.
        rounds: 1 or more. Garbage is collected between rounds, never within one.
        device: whose clock is read.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn.prepare()
        turn.run()
    names = list(turns)
    for index in range(rounds):
        gc.collect()
        gc.disable()
        try:
            for name in names if index % 2 == 0 else reversed(names):
                turns[name].prepare()
                seconds[name].append(CLOCKS[device](turns[name].run))
        finally:
            gc.enable()
    return seconds


def ratios(seconds: Mapping[str, list[float]], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return a cell for each pair of variants: ratio of the minima (median of the ratios within a round)."""

    cells = {}
    for one, reference in pairs:
        if {one, reference} <= seconds.keys():
            ours, theirs = seconds[one], seconds[reference]
            paired = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            cells[f"{one} / {reference}"] = f"{min(ours) / min(theirs):.2f} ({paired:.2f})"
    return cells


def least(into: dict[str, float], name: str, run: Callable[[], Any], wall: bool = False) -> Any:
    """Run once, keep the smallest seconds under this name, and return the result.

    Args:
        into: seconds by name. CPU seconds, or wall seconds with `wall`.
        name: of the run.
        run: what is timed. No garbage is collected within it.
        wall: measure wall time, and wait for the accelerator.
    """
    gc.collect()
    gc.disable()
    clock = time.perf_counter if wall else time.process_time
    try:
        _synchronize(wall)
        start = clock()
        result = run()
        _synchronize(wall)
        into[name] = min(clock() - start, into.get(name, float("inf")))
    finally:
        gc.enable()
    return result


def _synchronize(wall: bool) -> None:
    if wall and torch.accelerator.is_available():
        torch.accelerator.synchronize()


def in_child(function: Callable[..., Result], *arguments: object, **environment: str) -> Result:
    """Return the result of a function in a new process, with more environment variables."""
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def keep_freed() -> None:
    """Keep freed memory in the process (glibc), so that no variant pays for the pages that another one freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def saved_bytes(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """Return the bytes of the distinct storages that autograd saves, without the model's parameters and buffers."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    @torch.compiler.disable
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()  # kept alive, so that no address is used twice
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in owned)


def reset_peak_memory() -> None:
    """Return free memory to the system, and let `peak_memory` start from the present size (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory() -> int:
    """Return the largest resident size of this process since the last reset, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
