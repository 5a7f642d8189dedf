"""The rates of a machine: measured when first needed, and cached in a file for the next process.

The calibration runs the very operations of `lorasc_fx.branch` on a few sizes and fits a line to each. The operations
run in turn, so that other load on the machine meets all of them, and the minimum of an operation's seconds counts. The
cache file is a convenience: one that is damaged or cannot be written is reported, and the rates are measured again.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch import low_rank
from lorasc_fx.branch.functions import Beside, merge
from lorasc_fx.branch.products import product
from lorasc_fx.cost.model import OPS, Line, Rates, usual
from lorasc_fx.util.accelerator import name_of
from lorasc_fx.util.files import parse_json
from lorasc_fx.util.undo import AllOrNothing, Lock

BUDGET = 0.8
"""Seconds after which no other round is begun; at twice as many the machine is too busy."""
ROUNDS = 7
LEAST = 3
LOW, HIGH = 8, 64
"""Ranks between which the cost of a rank is read off."""
SLOW_START = 1e-3
"""Seconds that no operation takes to start on a machine that is free."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Point:
    """An operation on one size, with the seconds that it took."""

    entries: float
    rank: int
    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The least of the seconds."""
        return min(self.seconds)


@torch.no_grad()
def measured(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """Return the rates of a device, measured in about a second; None where it is too busy to be measured.

    Between two runs of an operation all others run, so that its operands have left the nearest cache, as in a training
    step most have.
    """
    runs = _runs(device, dtype)
    every = [(op, index, run) for op, sizes in runs.items() for index, (_, _, run) in enumerate(sizes)]
    clock = _clock(device)
    begin = time.perf_counter()
    for _, _, run in every:
        run()
        if device.type == "cpu" and time.perf_counter() - begin > BUDGET:
            return None
    seconds: dict[tuple[str, int], list[float]] = {(op, index): [] for op, index, _ in every}
    begin, rounds = time.perf_counter(), 0
    while rounds < ROUNDS and (rounds < LEAST or time.perf_counter() - begin < BUDGET):
        for op, index, run in every:
            start = clock()
            run()
            seconds[op, index].append(clock() - start)
            if time.perf_counter() - begin > 2 * BUDGET:
                return None
        rounds += 1
    points = {
        op: [Point(entries, rank, tuple(seconds[op, index])) for index, (entries, rank, _) in enumerate(sizes)]
        for op, sizes in runs.items()
    }
    if disturbed(points):
        return None
    return Rates({op: fitted(points[op]) for op in OPS})


def disturbed(points: Mapping[str, Sequence[Point]]) -> bool:
    """Whether other load on the machine dominates what was measured."""
    every = [point for sizes in points.values() for point in sizes]
    restless = sum(statistics.median(point.seconds) > 2 * point.best for point in every)
    reverse = sum(sizes[0].best >= sizes[1].best for sizes in points.values())
    slow = any(sizes[0].best > SLOW_START and 0 < sizes[0].entries < 1e5 for sizes in points.values())
    return restless * 3 > len(every) or reverse * 4 > len(points) or slow


def fitted(points: Sequence[Point]) -> Line:
    """Return the line through a small size, a large one, and if given the large one at a higher rank."""
    small, large = points[0], points[1]
    product = 0.0
    if len(points) > 2:
        product = max(0.0, (points[2].best - large.best) / (large.entries * (points[2].rank - large.rank)))
    slope = max(0.0, (large.best - small.best) / (large.entries - small.entries))
    product = min(product, slope / large.rank) if large.rank else 0.0
    start = max(0.0, small.best - small.entries * slope)
    return Line(start, slope - large.rank * product, product)


def _clock(device: torch.device) -> Callable[[], float]:
    """Return the clock: CPU time of the thread where there is one thread, which other load does not count into."""
    if device.type != "cpu":
        module = torch.get_device_module(device)

        def synchronized() -> float:
            module.synchronize(device)
            return time.perf_counter()

        return synchronized
    fine = time.get_clock_info("thread_time").resolution < 1e-6
    return time.thread_time if fine and torch.get_num_threads() == 1 else time.perf_counter


def _runs(device: torch.device, dtype: torch.dtype) -> dict[str, list[tuple[float, int, Run]]]:
    """Return of each operation the sizes on which it is measured: entries, rank, and the run."""

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    runs: dict[str, list[tuple[float, int, Run]]] = {op: [] for op in OPS}

    def put(op: str, entries: float, rank: int, run: Run) -> None:
        runs[op].append((entries, rank, run))

    for tokens, features, rank in ((256, 256, LOW), (1024, 768, LOW), (1024, 768, HIGH)):
        _rows(put, ones(tokens, features), ones(rank, features), ones(features, rank))
    for places, channels, rank in ((14, 64, LOW), (28, 256, LOW), (28, 256, HIGH)):
        _images(put, ones(4, channels, places, places), ones(rank, channels, 1, 1))
    for places, channels, rank in ((14, 32, LOW), (28, 64, LOW), (28, 64, HIGH)):
        _kernels(put, ones(4, channels, places, places), ones(rank, channels, 3, 3))
    for width in (64, 512):
        square = ones(width, width)
        put("dense", width**3, 0, partial(F.linear, square, square))
        put("frozen", width**3, 0, partial(product, "linear", square, square, None))
    for places, channels in ((7, 32), (28, 64)):
        x, space = ones(4, channels, places, places), 4 * places**2
        put("convolve", space * channels**2 * 9, 0, _both(x, ones(channels, channels, 3, 3), 1))
        put("depthwise", space * channels * 9, 0, _both(x, ones(channels, 1, 3, 3), channels))
    few = ones(2, 8)
    for count in (0, 1):
        put("call", count, 0, _step(few))
    return runs


Put = Callable[[str, float, int, Run], None]


def _rows(put: Put, rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    rank, entries = len(a), rows.numel()
    far = low_rank.folded(rows)
    low = low_rank.down(a, far)
    put("down", entries, rank, lambda: low_rank.down(a, far))
    put("up", entries, rank, lambda: low_rank.up(far, low, a, 2.0))
    put("raise", entries, rank, lambda: low_rank.up(None, low, a, 2.0))
    put("gradient", entries, rank, lambda: low_rank.factor_gradient(low, far, 2.0))
    put("merge", b.shape[0] * a.shape[1], rank, lambda: merge(weight, b, a, 2.0))
    weight, other = rows.new_ones(b.shape[0], a.shape[1]), rows.clone()
    if rank == LOW:
        put("add", entries, 0, lambda: other.add_(rows))


def _images(put: Put, x: torch.Tensor, a: torch.Tensor) -> None:
    rank, entries, b = len(a), x.numel(), a.flatten(1).t().contiguous()
    plain = low_rank.Grid((1, 1), (0, 0), (1, 1))
    low = low_rank.conv_down(a, x, plain)
    put("image_down", entries, rank, lambda: low_rank.conv_down(a, x, plain))
    put("image_up", entries, rank, lambda: low_rank.conv_up(x, low, b, 2.0))
    put("image_raise", entries, rank, lambda: low_rank.conv_input_gradient(low, x, a, plain, 2.0))
    put("image_gradient", entries, rank, lambda: low_rank.conv_factor_gradient(low, x, 2.0))


def _kernels(put: Put, x: torch.Tensor, a: torch.Tensor) -> None:
    rank, entries = len(a), x.numel() * 9
    padded = low_rank.Grid((1, 1), (1, 1), (1, 1))
    low = low_rank.conv_down(a, x, padded)
    put("kernel_down", entries, rank, lambda: low_rank.conv_down(a, x, padded))
    put("kernel_raise", entries, rank, lambda: low_rank.conv_input_gradient(low, x, a, padded, 2.0))
    put("kernel_gradient", entries, rank, lambda: low_rank.conv_kernel_gradient(low, x, a, padded, 2.0))


def _both(x: torch.Tensor, weight: torch.Tensor, groups: int) -> Run:
    padded = low_rank.Grid((1, 1), (1, 1), (1, 1), groups)
    return lambda: padded.gradients(padded.conv(x, weight), x, weight, (True, False, False))


def _step(few: torch.Tensor) -> Run:
    """Return forward and backward of a branch so small that nothing but the calls takes time."""
    x, a, b = (tensor.requires_grad_() for tensor in (few.clone(), few.clone(), few.t().contiguous()))
    base = few.clone()

    def run() -> object:
        with torch.enable_grad():
            output = low_rank.apply(Beside, base, x, a, b, 2.0, 0.0, None)
            return torch.autograd.grad(output, (x, a, b), base)

    return run


FORMAT = 2

log = logging.getLogger("lorasc_fx")

_KNOWN: dict[str, Rates] = {}
_LOCK = Lock()


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """Return the rates of a device for a dtype: those known, those of the cache file, or measured now."""
    key = key_of(device, dtype)
    with AllOrNothing(_LOCK):
        if key not in _KNOWN:
            path = cache_file()
            rates = Rates.from_json(_read(path).get(key))
            if rates is None:
                log.info("measuring the operations of branches on %s", key)
                rates = _measured(device, dtype)
                if rates is not None:
                    _write(path, key, rates)
            if rates is None:
                log.info("placements are chosen by the rates of a usual machine")
                rates = usual(torch.get_num_threads())
            _KNOWN[key] = rates
        return _KNOWN[key]


def _measured(device: torch.device, dtype: torch.dtype) -> Rates | None:
    try:
        rates = measured(device, dtype)
    except RuntimeError as fault:  # torch has not every operation for every device and dtype, or no memory is left
        log.warning("the operations of branches cannot be measured on %s in %s: %s", device, dtype, fault)
        return None
    if rates is None:
        log.info("the machine is too busy to be measured")
    return rates


def cache_file() -> Path:
    """Return the path of the cache file: `LORASC_FX_CACHE`, or lorasc_fx/rates.json in the user's cache folder."""
    if path := os.environ.get("LORASC_FX_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorasc_fx" / "rates.json"


def key_of(device: torch.device, dtype: torch.dtype) -> str:
    """Return what rates depend on: version of torch, device, number of threads, dtype."""
    on_cpu = device.type == "cpu"
    name = _cpu() if on_cpu else name_of(device)
    threads = f"{torch.get_num_threads()} threads" if on_cpu else "-"
    return " | ".join((f"torch {torch.__version__}", name, threads, str(dtype).removeprefix("torch.")))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no such file on this system
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, Any]:
    """Return what the file holds by key; nothing where there is none or it is damaged."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as fault:
        log.warning("%s cannot be read (%s): the rates are measured again", path, fault)
        return {}
    rates = content.get("rates") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(rates, dict):
        log.warning("%s holds no rates of this format: they are measured again", path)
        return {}
    return rates


def _write(path: Path, key: str, rates: Rates) -> None:
    """Add rates to the file, which is replaced whole."""
    text = json.dumps({"format": FORMAT, "rates": {**_read(path), key: rates.to_json()}}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            new.write_text(text, encoding="utf-8")
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    except OSError as fault:
        log.warning("%s cannot be written (%s): the rates are kept for this process only", path, fault)
