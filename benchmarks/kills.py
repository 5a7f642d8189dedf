"""Kill a rank at drawn moments and go on: `python -m benchmarks.kills [--write] [--kills 50]`.

Two to four ranks train a small network on FSDP2 shards in fp64, and save after each step (`tests.parallel.elastic`).
One of them is killed (SIGKILL) at a function call drawn evenly from those that a step, a transition or a save makes;
all are then started anew and go on from the last checkpoint, as torchrun has it with `--max-restarts`, but forked from
a process that has imported torch. A run has `PER_RUN` kills, and must end with the bytes of a run on as many ranks that
nobody killed. --write notes each run in benchmarks/kills.json, of which `python -m benchmarks.scale --write` makes a
table; what is noted is not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parallel.elastic import CALLS, PARTS, train
from tests.parallel.ranks import RankFailed, on_ranks

__all__ = ["RESULTS", "reference", "run", "table"]

RESULTS = Path(__file__).with_name("kills.json")
NAME, PER_RUN = "fresh", 5
"""Specification of `tests.parallel.sharding`, and kills of a run."""
RANKS = (2, 2, 2, 2, 2, 3, 4, 2, 3, 2)
"""Ranks of a run, by its seed, again from the first after the last."""


@functools.cache
def reference(ranks: int) -> tuple[dict[str, Tensor], list[str]]:
    """Return the numbers of a run that nobody kills, and what it notes of the calls that its parts make."""
    with tempfile.TemporaryDirectory() as folder:
        found, *_ = on_ranks(ranks, train, folder, NAME, limit=600, timeout=100)
        return found, [Path(folder, CALLS.format(rank)).read_text(encoding="utf-8") for rank in range(ranks)]


def run(part: str, seed: int, kills: int) -> dict[str, Any]:
    """Return what came of a run whose ranks were killed: how often, and what differs from the reference at its end."""
    ranks = RANKS[seed % len(RANKS)]
    wanted, calls = reference(ranks)
    with tempfile.TemporaryDirectory() as folder:
        for rank, text in enumerate(calls):
            Path(folder, CALLS.format(rank)).write_text(text, encoding="utf-8")
        for life in range(kills + 1):
            dies = part if life < kills else ""
            try:
                found, *_ = on_ranks(ranks, train, folder, NAME, dies, 1000 * seed + life, limit=600, timeout=100)
            except RankFailed as failed:
                if failed.codes.count(-signal.SIGKILL) != 1:
                    raise
                continue
            break  # all ended before the call that was drawn, or none was
        journal = Path(folder, "journal")
        counted = Counter(journal.read_text(encoding="utf-8").split() if journal.exists() else ())
        left = sorted(
            path.name for path in Path(folder, "run").iterdir() if path.name.startswith((".writing", ".leav"))
        )
    odd = [name for name, value in wanted.items() if not torch.equal(value, found[name])]
    return {"part": part, "seed": seed, "ranks": ranks, "kills": counted[part], "differ": odd, "left": left}


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Return the table of benchmarks/scale.md."""
    lines = [
        "## Ranks that are killed",
        "",
        "`python -m benchmarks.kills --write`: FSDP2 shards in fp64 by gloo. One rank gets SIGKILL at a function call,",
        "Python's or a builtin, drawn evenly from those that the part makes; all start anew from the last checkpoint,",
        "which each step writes. A run must end with the bytes of one on as many ranks that nobody killed, and leave",
        "no temporary folder.",
        "`pytest -m slow tests/parallel -k killed` has a few kills under torchrun.",
        "",
        "| killed in | ranks | kills | runs | that end with the same bytes |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for part in PARTS:
        for ranks in sorted(set(RANKS)):
            own = [each for each in runs if (each["part"], each["ranks"]) == (part, ranks)]
            same = sum(not each["differ"] and not each["left"] for each in own)
            lines.append(f"| a {part} | {ranks} | {sum(each['kills'] for each in own)} | {len(own)} | {same} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Make the runs that are missing, print the table, and note each run if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--kills", type=int, default=50, help="in each part")
    options = parser.parse_args(arguments)
    runs = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    for seed in range(-(-options.kills // PER_RUN)):
        for part in PARTS:
            if any((each["part"], each["seed"]) == (part, seed) for each in runs):
                continue
            runs.append(run(part, seed, PER_RUN))
            print(runs[-1], flush=True)
            if options.write:
                RESULTS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
