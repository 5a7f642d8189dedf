"""The benchmark: `python -m benchmarks [names] [--only PART] [--rounds N] [--quick] [--write]`.

A run of everything writes results.json, curves.json and curves.svg in this folder, and the section of docs/costs.md. A
part of it prints what it found, and writes it only with --write, in place of what the files hold of it. With --device
cuda it measures steps and memory on a GPU, and writes cuda.json and a section of its own.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from configurations; peft would look for theirs

import torch

from . import curves, report, start
from .compiled import can_compile, compiled
from .costs import costs
from .files import write
from .measure import keep_freed, pin
from .models import COMPILED, STARTED, WORKS, works
from .placement_oracle import oracle
from .resident import STARTS, can_measure, resident_all
from .steps import measured

HERE = Path(__file__).parent
PARTS = ("table", "placement", "costs", "start", "curves", "compiled")
PARTS_OF = {"cpu": PARTS, "cuda": ("table", "costs")}
"""Parts that are measured on a device."""


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for, print it, and write it."""
    options = _options(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("lorasc_fx").setLevel(logging.ERROR)
    whole = not options.names and options.only is None and not options.quick
    names = options.names or [name for name in works(options.device) if name != "tiny"]
    parts = [part for part in PARTS_OF[options.device] if options.only in (None, part)]
    if options.names and options.only is None:
        parts = [part for part in parts if part != "curves"]  # they have models of their own
    pin(options.threads)
    keep_freed()
    measured_now: dict[str, Any] = {"about": report.about(options.threads, options.rounds, options.device)}
    if "table" in parts:
        measured_now["steps"] = {name: _steps(name, options) for name in names}
    if "placement" in parts:
        measured_now["placement"] = {name: _placement(name, options.rounds) for name in names}
    if "costs" in parts:
        costs(WORKS["tiny"], 1)  # imports, and what is done once in a process
        measured_now["costs"] = {name: _costs(name, options) for name in names}
    if "start" in parts:
        more = [] if options.names or options.quick else list(STARTED)
        measured_now["start"] = _start([*names, *more], options)
    if "curves" in parts:
        measured_now["curves"] = _curves(options.rounds, options.quick)
    if "compiled" in parts:
        compiled(WORKS["tiny"], 1)  # imports, and what is done once in a process
        measured_now["compiled"] = {name: _compiled(name, options.rounds) for name in options.names or COMPILED}
    if whole or options.write:
        write(measured_now, HERE, HERE.parent / "docs" / "costs.md", whole, options.device)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="names",
        help=f"models, of {', '.join(WORKS)}; all of them by default. With --only start also {', '.join(STARTED)}; "
        f"with --only compiled also {', '.join(COMPILED.keys() - WORKS.keys())}, by default {', '.join(COMPILED)}",
    )
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument(
        "--device",
        choices=PARTS_OF,
        default="cpu",
        help="cuda: steps, memory, transitions and the like on a GPU, in bf16",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="fresh models for the costs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--placement", action="append", default=[], help="force it in one more rival; may be repeated")
    parser.add_argument("--quick", action="store_true", help="one round of each, to see that it runs")
    parser.add_argument("--write", action="store_true", help="write a part into the files as well")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device cuda: torch {torch.__version__} finds no GPU here; use a machine with one, or --device cpu"
        )
    if options.only not in (None, *PARTS_OF[options.device]):
        parser.error(f"--only {options.only} is not measured on {options.device}; leave it out")
    known = list(works(options.device) | {"start": STARTED, "compiled": COMPILED}.get(options.only, {}))
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(known)}")
    if options.device == "cpu" and options.only in (None, "compiled") and not can_compile():
        parser.error("torch.compile needs a C++ compiler: install g++, or measure one other part with --only")
    if options.quick:
        options.rounds, options.repeats = 1, 1
    return options


def _steps(name: str, options: argparse.Namespace) -> dict[str, Any]:
    forced = {each: {"placement": each} for each in options.placement}
    row = measured(works(options.device)[name], options.rounds, forced, options.device)
    gc.collect()
    torch.cuda.empty_cache()  # for the processes that follow
    can = options.device == "cuda" or can_measure()
    row["resident"] = resident_all(name, options.threads, device=options.device) if can else {}
    print(f"\n{report.step_table({name: row})}\n\n{report.memory_table({name: row}, options.device)}", flush=True)
    for each in options.placement:
        ratio = row["ratios"][f"ours/{each}"]
        print(f"\nours / {each} forced: {ratio['minimum']:.2f} ({ratio['paired']:.2f})", flush=True)
    return row


def _placement(name: str, rounds: int) -> dict[str, Any]:
    row = oracle(WORKS[name], rounds)
    gc.collect()
    print(f"\n{report.placement_table({name: row})}", flush=True)
    return row


def _compiled(name: str, rounds: int) -> dict[str, Any]:
    row = compiled((WORKS | COMPILED)[name], rounds)
    gc.collect()
    print(f"\n{report.compiled_table({name: row})}", flush=True)
    return row


def _costs(name: str, options: argparse.Namespace) -> dict[str, Any]:
    row = costs(works(options.device)[name], options.repeats, device=options.device)
    gc.collect()
    print(f"\n{report.cost_table({name: row}, options.device)}", flush=True)
    return row


def _start(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure what comes before the first step; what needs no model of the table stands under `once`."""
    pin(1)
    imports, calls = start.import_seconds(max(options.repeats, 2)), start.call(options.rounds)
    found: dict[str, Any] = {"once": {"import": imports, "call": calls}}
    print(f"\n{report.call_table(found['once'])}", flush=True)
    found["once"]["graph breaks"] = {name: start.graph_breaks(name, options.repeats) for name in start.BROKEN}
    print(f"\n{report.graph_breaks_table(found['once'])}", flush=True)
    for name in names:
        found[name] = start.apart(name, options.repeats)
        found[name]["memory"] = resident_all(name, options.threads, STARTS) if can_measure() else {}
        print(f"\n{report.start_table({name: found[name]})}", flush=True)
    pin(options.threads)
    return found


def _curves(rounds: int, quick: bool) -> dict[str, Any]:
    rounds = min(rounds, 5)
    found = {
        "rank": curves.by_rank(rounds, curves.RANKS[3::4] if quick else curves.RANKS),
        "sites": curves.by_sites(rounds, curves.topmost(curves.BLOCKS[::4], WORKS["vit-s"]) if quick else None),
        "stages": curves.by_stages(rounds, 1 if quick else 6),
        "state": curves.state_size(2 if quick else 14),
    }
    for name, rows in found.items():
        print(f"\n{name}")
        for row in rows:
            print("  " + ", ".join(f"{key} {value:.6g}" for key, value in row.items()), flush=True)
    return {"rounds": rounds, **found}


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    main()
