"""`make coverage`: every model of the zoo under lorasc-fx and under peft, written to docs/coverage.md.

`python -m benchmarks.coverage NAME...` looks at these models again, and rewrites their rows.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

STORE = Path(__file__).parents[2] / "build" / "coverage.json"
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
ABOUT = """\
Made by `make coverage`. Each model is built small from its library's own configuration, in fp64, and held
against its own eager code by `benchmarks/coverage/examine.py`: in train and eval mode B = 0 changes no bit of outputs
and buffers, branches are the merged weights and get the gradients of the formula, and after two stages with
noise the released model holds the slow weights of the formula and loads strictly into a fresh one. *Sites*,
*refused* and *unreached* are together all weight matrices. *s* are seconds for all of that, on one core. The
last column is LoRA by peft on every linear and convolution of the same model: how many matrices it adapts, and
what goes wrong. "B = 0 changes no bit" holds against the frozen eager model with the fast path of
MultiheadAttention off; from the user's own trainable model TransformerEncoderLayer, CLIP, ESM2 and volo differ by
about 1e-7."""
HEAD = "| model | source | front end | sites | refused | unreached | s | lorasc-fx | peft |\n" + "|---" * 9 + "|"
WORKERS = int(os.environ.get("JOBS", "2"))


def look(name: str) -> dict[str, Any]:
    """Return what both make of a model; runs in a process of its own."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.coverage.examine import Report, examine
    from benchmarks.coverage.rival import peft_on
    from benchmarks.coverage.zoo import ZOO

    entry = ZOO[name]
    try:
        report = examine(entry)
    except Exception as fault:  # one line of the page; the suite raises it
        report = Report(entry.name, entry.source, faults=[f"{type(fault).__name__}: {fault}".replace("\n", " ")[:300]])
    return {**asdict(report), "peft": peft_on(entry)}


def main(names: list[str]) -> None:
    """Look at the models, print a line for each, and write the page if all were looked at."""
    from benchmarks.coverage.zoo import LIBRARIES, ZOO

    found: dict[str, dict[str, Any]] = json.loads(STORE.read_text()) if names and STORE.is_file() else {}
    with get_context("spawn").Pool(WORKERS, maxtasksperchild=20) as pool:
        for count, each in enumerate(pool.imap_unordered(look, names or list(ZOO)), 1):
            found[each["name"]] = each
            state = "; ".join(each["faults"]) or "ok"
            print(f"{count:4d} {each['name']:40s} {each['frontend']:8s} {each['seconds']:5.1f} s  {state}", flush=True)
    STORE.parent.mkdir(exist_ok=True)
    STORE.write_text(json.dumps(found), encoding="utf-8")
    if found.keys() >= ZOO.keys():
        libraries = {library: [found[entry.name] for entry in entries] for library, entries in LIBRARIES.items()}
        PAGE.write_text(page(libraries), encoding="utf-8")
    bad = [name for name, each in found.items() if each["faults"]]
    sys.exit(f"{len(bad)} of {len(found)} models are not right: {', '.join(bad)}" if bad else 0)


def page(libraries: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page."""
    everything = [each for found in libraries.values() for each in found]
    right = sum(not each["faults"] for each in everything)
    clean = sum("," not in each["peft"] and "matrices" in each["peft"] for each in everything)
    fronts = Counter(each["frontend"] for each in everything)
    counts = ", ".join(f"{name} {count}" for name, count in fronts.most_common())
    summary = f"{right} of {len(everything)} models are right here; under peft {clean} are without remark. "
    lines = ["# Coverage", "", ABOUT, "", f"{summary}Front ends: {counts}."]
    for library, found in libraries.items():
        lines += ["", f"## {library}", "", HEAD, *map(_row, found)]

    def section(title: str, key: str, text: Callable[[dict[str, str]], str], none: str) -> list[str]:
        return ["", f"## {title}", ""] + ([f"- {e['name']}: {text(e[key])}" for e in everything if e[key]] or [none])

    lines += section(
        "Weights that get no gradient, and why",
        "idle",
        lambda idle: f"{', '.join(f'`{weight}`' for weight in idle)}: {next(iter(idle.values()))}",
        "None.",
    )
    lines += section(
        "Why the earlier front ends refused",
        "refused",
        lambda refused: "; ".join(f"{name}: {_cell(reason)}" for name, reason in refused.items()),
        "None did.",
    )
    return "\n".join(lines) + "\n"


def _row(each: dict[str, Any]) -> str:
    reasons = Counter(sentence.partition(": ")[2].partition(" (")[0] for sentence in each["refusals"].values())
    refused = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "0"
    sites = ", ".join(f"{count} {kind}" for kind, count in Counter(each["sites"].values()).most_common()) or "0"
    state = "; ".join(map(_cell, each["faults"])) or "right"
    cells = (each["name"], each["source"], each["frontend"], sites, refused, str(len(each["unreached"])))
    return "| " + " | ".join((*cells, f"{each['seconds']:.1f}", state, _cell(each["peft"]))) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "(").replace(">", ")")[:160]
