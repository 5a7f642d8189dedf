"""What each part that is only there for speed saves: `python -m benchmarks.without` measures models with and without.

In a round two fresh processes run at the same time, each on one thread and one core: one with all parts, one without
some. The cores are exchanged from round to round. A ratio is `without / with`, the median over rounds of the ratio
within a round: above 1.00, the part saves time or memory.

- `adapt`: CPU seconds of `lorasc_fx.adapt`, the first one in the process.
- `step`: CPU seconds of forward and backward; `call`: of a forward without gradients, in training mode as the step.
- `memory`: peak resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from .measure import keep_freed, pin
from .models import WORKS, Work
from .rivals import Rival, adapted

__all__ = ["MEASURES", "PARTS", "measured", "without"]

MEASURES = ("adapt", "step", "call", "memory")
STEPS = 3
"""Steps, and calls, of which the median counts, after one that warms up."""
NOTHING = "nothing"


def _no_masks() -> Any:
    from lorasc_fx.compile import compiler

    captured = compiler.capture

    def capture(*args: Any, rewrites: Any = (), **options: Any) -> Any:
        return captured(*args, **options)

    return mock.patch.object(compiler, "capture", capture)


def _no_function() -> Any:
    from lorasc_fx.compile.variants import Variant

    def run(variant: Variant) -> Callable[[Any], Any]:
        return lambda call: variant.module(*call.args, **call.kwargs)

    return mock.patch.object(Variant, "run", property(run))


def _no_onednn() -> Any:
    from lorasc_fx.branch import products

    return mock.patch.object(products, "onednn_is_faster", return_value=False)


@contextmanager
def _no_grouped() -> Iterator[None]:
    from lorasc_fx.branch import products
    from lorasc_fx.branch.placements import MatrixOps

    def grouped(*args: Any, weight: Any = None, **options: Any) -> torch.Tensor:
        return with_frozen_weight(*args, **options)

    with_frozen_weight = MatrixOps.grouped
    table = {name: function for name, function in products._FROZEN.items() if "grouped" not in name}
    with mock.patch.object(products, "_FROZEN", table), mock.patch.object(MatrixOps, "grouped", staticmethod(grouped)):
        yield


PARTS: dict[str, Callable[[], Any]] = {
    "masks": _no_masks,
    "function": _no_function,
    "onednn": _no_onednn,
    "grouped": _no_grouped,
}
"""By name of a part: what takes it away, as a context manager."""


@contextmanager
def without(parts: str) -> Iterator[None]:
    """Leave out the parts of this name, several with `+` between them."""
    if parts == NOTHING:
        yield
        return
    first, _, rest = parts.partition("+")
    with PARTS[first](), without(rest or NOTHING):
        yield


def _clocked(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def measured(work: Work) -> dict[str, float]:
    """Return MEASURES of one model in this process: CPU seconds, and MiB."""
    model, batch = work.build(), work.batch()
    adapt, cascade = _clocked(partial(adapted, work, model, batch))
    rival = Rival(cascade, work, {name: value.detach() for name, value in batch.items()})
    steps, calls = [], []
    for _ in range(STEPS + 1):
        rival.prepare()
        steps.append(_clocked(rival.step)[0])
        with torch.no_grad():
            calls.append(_clocked(lambda: cascade(**rival.inputs))[0])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step, call = statistics.median(steps[1:]), statistics.median(calls[1:])
    return {"adapt": adapt, "step": step, "call": call, "memory": memory}


def _pair(name: str, choices: tuple[str, str]) -> list[dict[str, float]]:
    """Return what two processes measure at the same time."""
    begun = []
    for core, parts in zip(sorted(os.sched_getaffinity(0)), choices, strict=False):
        command = [sys.executable, "-m", "benchmarks.without", "--one", name, parts, "--core", str(core)]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    found = [process.communicate()[0] for process in begun]
    return [json.loads(text.splitlines()[-1]) for text in found]


def compared(name: str, parts: str, rounds: int) -> dict[str, float]:
    """Return the ratio of each of MEASURES, without these parts over with all."""
    ratios: dict[str, list[float]] = {what: [] for what in MEASURES}
    for index in range(rounds):
        choices = (parts, NOTHING) if index % 2 == 0 else (NOTHING, parts)
        found = dict(zip(choices, _pair(name, choices), strict=True))
        for what in MEASURES:
            ratios[what].append(found[parts][what] / found[NOTHING][what])
    return {what: statistics.median(each) for what, each in ratios.items()}


def main() -> None:
    """Print a table for each model, or with `--one MODEL PARTS` what this process measures, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[name for name in WORKS if name != "tiny"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help="parts to leave out; a+b: both at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "PARTS"))
    parser.add_argument("--core", type=int, default=0)
    given = parser.parse_args()
    if given.one:
        keep_freed()
        pin(1)
        os.sched_setaffinity(0, {given.core})
        name, parts = given.one
        with without(parts):
            print(json.dumps(measured(WORKS[name])))
        return
    print(f"{'model':12} {'without':16} " + " ".join(f"{what:>7}" for what in MEASURES), flush=True)
    for name in given.models:
        for parts in given.parts:
            ratios = compared(name, parts, given.rounds)
            print(f"{name:12} {parts:16} " + " ".join(f"{ratios[what]:7.2f}" for what in MEASURES), flush=True)


if __name__ == "__main__":
    main()
