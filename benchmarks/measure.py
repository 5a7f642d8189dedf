"""Clocks and memory counters. Variants take turns, so that a change of the machine's speed affects all of them."""

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
    """Return the seconds between two events on the stream, including waits for kernel launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


CLOCKS = {"cpu": _cpu_seconds, "cuda": _cuda_seconds}
"""{device: function that times a run}. On a CPU, the seconds of all threads are added."""


def alternate(turns: Mapping[str, Turn], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Return {variant: seconds of each round}. A round runs each variant once. The order alternates between rounds.

    Every variant first runs once untimed. Garbage is collected between rounds, never within one.
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
    """Return {"one / reference": text} with the ratio of the minima (median of the ratios within a round)."""
    cells = {}
    for one, reference in pairs:
        if {one, reference} <= seconds.keys():
            ours, theirs = seconds[one], seconds[reference]
            paired = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            cells[f"{one} / {reference}"] = f"{min(ours) / min(theirs):.2f} ({paired:.2f})"
    return cells


def least(into: dict[str, float], name: str, run: Callable[[], Any], wall: bool = False) -> Any:
    """Time a run without garbage collection, and return its result. `into` keeps {name: smallest seconds}.

    These are CPU seconds. With `wall` they are wall seconds, and the accelerator's work is included.
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
    """Return the result of a function in a new process with additional environment variables."""
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def keep_freed() -> None:
    """Let glibc keep freed memory in the process, so that no variant waits for pages that another variant freed."""
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
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()  # alive, so that no address is reused
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in owned)


def reset_peak_memory() -> None:
    """Return free memory to the system, and reset the peak to the current size (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory() -> int:
    """Return the largest resident size of this process since `reset_peak_memory`, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
