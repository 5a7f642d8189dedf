"""`make coverage`: every model of the zoo under lorasc-fx and under peft, written to docs/limits.md.

`python -m benchmarks.coverage NAME...` looks at these models again, and rewrites their rows.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

STORE = Path(__file__).parents[2] / "build" / "coverage.json"
PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
START, END = "<!-- coverage -->\n", "<!-- /coverage -->\n"
ABOUT = """\
Each model is a small one, built from its library's configuration, in fp64. It is compared with its own eager code in
train and eval mode (`benchmarks/coverage/examine.py`). With B = 0 no bit of outputs and buffers changes, compared with
the frozen eager model. Branches compute the merged weights and get the gradients of the formula. After two stages with
noise, the released model holds the slow weights of the formula, and its state dict loads strictly into a
new model.

The columns count the weight matrices with a branch by kind, and the ones without by
[reason](adapt.md#what-can-be-adapted). The column *peft* is LoRA of peft on every linear and convolution of the same
model: how many matrices it adapts, and its faults. *Groups*: peft raises because the groups of a convolution do not
divide the rank. *No merge*: peft cannot merge a convolution with groups. A model runs as a graph unless `eager` follows
its name ([what that means](adapt.md#with-and-without-a-graph))."""
KINDS = ("linear", "conv", "embedding", "experts", "recurrent")
HEAD = f"| model | {' | '.join(KINDS)} | not adapted | peft |\n|{'---|' * (len(KINDS) + 3)}"
EVERYTHING = "Both adapt every weight matrix, and peft's result is right"
BUT_EMBEDDINGS = "lorasc-fx adapts every weight matrix, peft all except embeddings, and peft's result is right"
SHORT = (
    (
        "currently, support is limited to conv layers where the rank is div",
        "lorasc-fx adapts every weight matrix; peft raises, because groups do not divide the rank",
    ),
    (
        "merging is not supported for _convnd layers with groups",
        "lorasc-fx adapts every weight matrix; peft cannot merge a convolution with groups",
    ),
)
"""Messages of peft that many models have, and what they mean."""
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
    """Return the page with the current part about coverage."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + coverage(libraries) + END + rest.partition(END)[2]


def coverage(libraries: dict[str, list[dict[str, Any]]]) -> str:
    """Return the part of the page."""
    everything = [each for found in libraries.values() for each in found]
    right = sum(not each["faults"] for each in everything)
    clean = sum("," not in each["peft"] and "matrices" in each["peft"] for each in everything)
    fronts = Counter(each["frontend"] for each in everything)
    reasons = Counter(_reason(next(iter(each["refused"].values()))) for each in everything if each["refused"])
    summary = f"{right} of {len(everything)} models are right in lorasc-fx, and {clean} show no error in peft. "
    lines = [ABOUT, "", f"{summary}{fronts['export']} run as a graph, {fronts['eager']} eagerly, because", ""]
    lines += [*(f"- {reason}: {count} models" for reason, count in reasons.most_common())]
    for library, found in libraries.items():
        lists: dict[str, list[str]] = {}
        rows = []
        for each in found:
            alike = _alike(each)
            if alike:
                lists.setdefault(alike, []).append(f"{each['name']}{_front_end(each)}")
            else:
                rows.append(_row(each))
        lines += ["", f"### {library}", ""]
        lines += [line for title, names in lists.items() for line in (f"{title}: {', '.join(names)}.", "")]
        lines += [HEAD, *rows]
    return "\n".join(lines) + "\n"


def _reason(text: str) -> str:
    """Return why torch.export refused, without what differs between models."""
    if text.startswith("GuardOnDataDependentSymNode"):
        return "a size or a branch depends on values"
    if text.startswith("Disagreement"):
        return "its graph computes something else"
    text = re.sub(r"autograd\.Function \w+,", "autograd.Function,", text)
    return _cell(text.removeprefix("RuntimeError: "))


def _alike(each: dict[str, Any]) -> str:
    """Return what is to be said of this model if it is the same for many, else nothing."""
    if each["refusals"] or each["unreached"] or each["faults"]:
        return ""
    if found := re.fullmatch(r"(\d+) of (\d+) matrices", each["peft"]):
        missed = int(found[2]) - int(found[1])
        if missed in (0, list(each["sites"].values()).count("embedding")):
            return BUT_EMBEDDINGS if missed else EVERYTHING
    return next((meaning for start, meaning in SHORT if start in each["peft"].lower()), "")


def _front_end(each: dict[str, Any]) -> str:
    return "" if each["frontend"] == "export" else f" ({each['frontend']})"


def _row(each: dict[str, Any]) -> str:
    reasons = Counter(sentence.partition(": ")[2].partition(" (")[0] for sentence in each["refusals"].values())
    reasons["unreached"] = len(each["unreached"])
    refused = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common() if count)
    counts = Counter(each["sites"].values())
    sites = "|".join(str(counts[kind] or "") for kind in KINDS)
    state = "; ".join(map(_cell, each["faults"]))
    peft = each["peft"]
    if SHORT[0][0] in peft.lower():
        peft = "groups"
    elif SHORT[1][0] in peft.lower():
        peft = "no merge"
    peft = _cell(
        re.sub(r"^(\w+Error): .*", r"\1", peft)
        .replace(" matrices", "")
        .replace(" of ", "/")
        .replace("merged differs by", "merge off by")
        .replace("adapters without a gradient", "without gradient")
    )[:80]
    return f"|{each['name']}{_front_end(each)}|{sites}|{refused}{state and f'; NOT RIGHT: {state}'}|{peft}|"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "(").replace(">", ")")[:160]
