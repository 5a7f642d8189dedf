"""Where a step's seconds go, by kind of operation: `python -m benchmarks.profile [names] [--rounds N]`.

torch's profiler runs over the same steps as the benchmark, rivals in turn. Seconds are of the thread that calls an
operation, its children taken out, so the kinds add up to the step. A product counts as low-rank where one of its sizes
is the rank (or that of a few stacked branches); its bytes are what it has to read and write at least.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable

from torch.profiler import ProfilerActivity, profile

from .measure import pin
from .models import WORKS
from .report import table
from .rivals import RANK, Rival, make_all

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn_convolution", "convolution_backward")
MOVES = ("add", "add_", "mul", "mul_", "copy_", "fill_", "zero_", "sum", "cat", "div", "neg", "sub")
KINDS = ("base products", "low-rank products", "sums and copies", "the rest")
STACKED = 4
"""Branches of one shared input are at most this many."""
PROFILED = ("frozen", "ours", "peft")


def kind_of(name: str, shapes: Iterable[Iterable[int]]) -> str:
    """Return the kind of one operation, by its name and the shapes of its inputs."""
    short = name.removeprefix("aten::")
    if short in PRODUCTS:
        ranks = {RANK * count for count in range(1, STACKED + 1)}
        return KINDS[1] if any(size in ranks for shape in shapes if len(shape) > 1 for size in shape[-2:]) else KINDS[0]
    return KINDS[2] if short in MOVES else KINDS[3]


def _kind(name: str, shapes: list[list[int]]) -> str:
    if "conv" in name:  # sizes of channels, not of images
        return kind_of(name, [shape[:2] for shape in shapes if len(shape) == 4][-1:])
    return kind_of(name, shapes)


def seconds(rival: Rival, found: Counter[str]) -> int:
    """Add the seconds of one step by kind; return the bytes of its low-rank products."""
    rival.prepare()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        rival.step()
    moved = 0
    for event in recorded.key_averages(group_by_input_shape=True):
        shapes = [shape for shape in event.input_shapes if shape]
        kind = _kind(event.key, shapes)
        found[kind] += event.self_cpu_time_total / 1e6
        if kind == KINDS[1]:
            moved += event.count * 4 * sum(math.prod(shape) for shape in shapes)
    return moved


def profiled(name: str, rounds: int) -> str:
    """Return the table of one model, in milliseconds of the mean step."""
    rivals = make_all(WORKS[name])
    found: dict[str, Counter[str]] = {each: Counter() for each in PROFILED}
    moved = dict.fromkeys(PROFILED, 0)
    for each in PROFILED:
        seconds(rivals[each], Counter())  # warm
    for _ in range(rounds):
        for each in PROFILED:
            moved[each] = seconds(rivals[each], found[each])

    def cells(each: str) -> Iterable[str]:
        yield each
        yield from (f"{1e3 * found[each][kind] / rounds:.1f}" for kind in KINDS)
        yield f"{1e3 * found[each].total() / rounds:.1f}"
        low = found[each][KINDS[1]] / rounds
        yield f"{moved[each] / 2**20:.0f}"
        yield f"{moved[each] / low / 1e9:.1f}" if low else "-"

    head = (WORKS[name].title, *KINDS, "step", "low-rank: MiB", "GB/s")
    return table(head, map(cells, PROFILED))


def main() -> None:
    """Print a table for each model asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"models, of {', '.join(WORKS)}; gpt2 and resnet-50 by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    pin(options.threads)
    for name in options.names or ("gpt2", "resnet-50"):
        if name not in WORKS:
            parser.error(f"no model {name!r}; there are {', '.join(WORKS)}")
        print(profiled(name, options.rounds), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
