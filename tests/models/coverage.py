"""`make coverage`: every model of the zoo under lorasc-fx and under peft, written to docs/coverage.md.

`python -m tests.models.coverage NAME...` looks at these models again, and rewrites their rows.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

STORE = Path(__file__).parents[2] / "build" / "coverage.json"
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
ABOUT = """\
Made by `make coverage`. Each model is built small from its library's own configuration, in fp64, and held
against its own eager code by `tests/models/examine.py`: in train and eval mode B = 0 changes no bit of outputs
and buffers, branches are the merged weights and get the gradients of the formula, and after two stages with
noise the released model holds the slow weights of the formula and loads strictly into a fresh one. *Sites*,
*refused* and *unreached* are together all weight matrices. *s* are seconds for all of that, on one core. The
last column is LoRA by peft on every linear and convolution of the same model: how many matrices it adapts, and
what goes wrong. "B = 0 changes no bit" holds against the frozen eager model with the fast path of
MultiheadAttention off; from the user's own trainable model TransformerEncoderLayer, CLIP, ESM2 and volo differ by
about 1e-7."""
HEAD = "| model | source | front end | sites | refused | unreached | s | lorasc-fx | peft |"
WORKERS = int(os.environ.get("JOBS", "2"))


def look(name: str) -> dict[str, Any]:
    """Return what both make of a model; runs in a process of its own."""
    import torch

    torch.set_num_threads(1)
    from tests.models.examine import Report, examine
    from tests.models.rival import peft_on
    from tests.models.zoo import ZOO

    entry = ZOO[name]
    try:
        report = examine(entry)
    except Exception as fault:  # one line of the page; the suite raises it
        report = Report(entry.name, entry.source, faults=[f"{type(fault).__name__}: {fault}".replace("\n", " ")[:300]])
    return {**asdict(report), "peft": peft_on(entry)}


def main(names: list[str]) -> None:
    """Look at the models, print a line for each, and write the page where all were looked at."""
    from tests.models.zoo import LIBRARIES, ZOO

    found: dict[str, dict[str, Any]] = json.loads(STORE.read_text()) if names and STORE.is_file() else {}
    looked = 0
    with get_context("spawn").Pool(WORKERS, maxtasksperchild=20) as pool:
        for each in pool.imap_unordered(look, names or list(ZOO)):
            found[each["name"]] = each
            looked += 1
            state = "; ".join(each["faults"]) or "ok"
            print(
                f"{looked:4d} {each['name']:40s} {each['frontend']:8s} {each['seconds']:5.1f} s  {state}",
                flush=True,
            )
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
    clean = sum(_clean(each["peft"]) for each in everything)
    fronts = Counter(each["frontend"] for each in everything)
    lines = [
        "# Coverage",
        "",
        *ABOUT.splitlines(),
        "",
        f"{right} of {len(everything)} models are right here; under peft {clean} are without remark. "
        + "Front ends: "
        + ", ".join(f"{name} {count}" for name, count in fronts.most_common())
        + ".",
    ]
    for library, found in libraries.items():
        lines += [
            "",
            f"## {library}",
            "",
            "| model | source | front end | sites | refused | unreached | s | lorasc-fx | peft |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [_row(each) for each in found]
    lines += ["", "## Weights that get no gradient, and why", ""]
    lines += [
        f"- {each['name']}: {', '.join(f'`{weight}`' for weight in each['idle'])}: {next(iter(each['idle'].values()))}"
        for each in everything
        if each["idle"]
    ] or ["None."]
    lines += ["", "## Why the earlier front ends refused", ""]
    lines += [
        f"- {each['name']}: " + "; ".join(f"{name}: {_cell(reason)}" for name, reason in each["refused"].items())
        for each in everything
        if each["refused"]
    ] or ["None did."]
    return "\n".join(lines) + "\n"


def _clean(told: str) -> bool:
    return "," not in told and "matrices" in told


def _row(each: dict[str, Any]) -> str:
    reasons = Counter(sentence.partition(": ")[2].partition(" (")[0] for sentence in each["refusals"].values())
    refused = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "0"
    kinds = Counter(each["sites"].values())
    sites = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "0"
    state = "; ".join(map(_cell, each["faults"])) or "right"
    cells = (each["name"], each["source"], each["frontend"], sites, refused, str(len(each["unreached"])))
    return "| " + " | ".join((*cells, f"{each['seconds']:.1f}", state, _cell(each["peft"]))) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "(").replace(">", ")")[:160]


if __name__ == "__main__":
    main(sys.argv[1:])
