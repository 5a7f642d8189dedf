"""`make coverage`: examine every model under lorasc-fx and peft, and write the table in docs/limits.md.

`python -m benchmarks.coverage NAME...` examines these models again, and rewrites their rows.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter, defaultdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.coverage.rival import look
from benchmarks.coverage.zoo import LIBRARIES, ZOO

STORE = Path(__file__).parents[2] / "build" / "coverage.json"
PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
START, END = "<!-- coverage -->\n", "<!-- /coverage -->\n"
ABOUT = """\
Each model is a small one, built from its library's configuration, in fp64. It is compared with its own eager code in
train and eval mode (`benchmarks/coverage/examine.py`). With B = 0 no bit of outputs and buffers changes. Branches
compute the merged weights and get the gradients of the formula. After two stages with noise, the released model holds
the slow weights of the formula, and its state dict loads strictly into a new model.

The columns count the weight matrices with a branch by kind, and the ones without by
[reason](adapt.md#what-can-be-adapted) (`no-form` if none is named). The column *peft* is LoRA of peft on every linear
and convolution: how many matrices it adapts, and its faults. *Groups*: peft raises because its rank is not a multiple
of a convolution's groups. *No merge*: peft cannot merge a convolution with groups. `eager` follows the name of a
model that runs [without a graph](adapt.md#with-and-without-a-graph)."""
KINDS = ("linear", "conv", "embedding", "stacked", "recurrent")
HEAD = f"|model|{'|'.join(KINDS)}|not adapted|peft|\n|{'---|' * (len(KINDS) + 3)}"
EVERYTHING = "Right in both, with every matrix"
BUT_EMBEDDINGS = "Right in both, in peft without embeddings"
MESSAGES = {
    "currently, support is limited to conv layers where the rank is div": (
        "groups",
        "*Groups*, in lorasc-fx right with every matrix",
    ),
    "merging is not supported for _convnd layers with groups": (
        "no merge",
        "*No merge*, in lorasc-fx right with every matrix",
    ),
}
"""Messages of peft that many models have: a word for the row, and a title for the list."""
WORKERS = int(os.environ.get("JOBS", "2"))


def main(names: list[str]) -> None:
    """Examine models, print a line for each, and write the page if all models are stored."""
    stored: dict[str, dict[str, Any]] = json.loads(STORE.read_text()) if names and STORE.is_file() else {}
    with get_context("spawn").Pool(WORKERS, maxtasksperchild=20) as pool:
        for model in pool.imap_unordered(look, names or list(ZOO)):
            stored[model["name"]] = model
            print(
                f"{model['name']:40s} {model['frontend']:8s} {model['seconds']:5.1f} s  {model['fault'] or 'ok'}",
                flush=True,
            )
    STORE.parent.mkdir(exist_ok=True)
    STORE.write_text(json.dumps(stored), encoding="utf-8")
    if stored.keys() >= ZOO.keys():
        libraries = {library: [stored[entry.name] for entry in entries] for library, entries in LIBRARIES.items()}
        PAGE.write_text(page(libraries), encoding="utf-8")
    wrong = [name for name, model in stored.items() if model["fault"]]
    sys.exit(f"{len(wrong)} of {len(stored)} models are not right: {', '.join(wrong)}" if wrong else 0)


def page(libraries: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page with the current part about coverage."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + coverage(libraries) + END + after.partition(END)[2]


def coverage(libraries: dict[str, list[dict[str, Any]]]) -> str:
    """Return the part of the page."""
    everything = [model for models in libraries.values() for model in models]
    right = sum(not model["fault"] for model in everything)
    clean = sum("," not in model["peft"] and "matrices" in model["peft"] for model in everything)
    fronts = Counter(model["frontend"] for model in everything)
    reasons = Counter(_reason(next(iter(model["refused"].values()))) for model in everything if model["refused"])
    summary = f"{right} of {len(everything)} models are right in lorasc-fx, and {clean} show no error in peft. "
    lines = [ABOUT, "", f"{summary}{fronts['export']} run as a graph, {fronts['eager']} eagerly, because", ""]
    lines += [f"- {reason}: {count} model{'s' if count > 1 else ''}" for reason, count in reasons.most_common()]
    for library, models in libraries.items():
        lists: dict[str, list[str]] = defaultdict(list)
        for model in models:
            title = _alike(model)
            lists[title].append(_name(model) if title else _row(model))
        rows = lists.pop("", [])
        lines += ["", f"### {library}", ""]
        lines += [line for title, names in lists.items() for line in (f"{title}: {', '.join(names)}.", "")]
        lines += [HEAD, *rows]
    return "\n".join(lines) + "\n"


def _reason(text: str) -> str:
    """Return why torch.export refused, without details that differ between models."""
    if text.startswith("GuardOnDataDependentSymNode"):
        return "a size or a branch depends on values"
    if text.startswith("Disagreement"):
        return "its graph computes something else"
    text = re.sub(r"autograd\.Function \w+,", "autograd.Function,", text)
    return _cell(text.removeprefix("RuntimeError: "))


def _alike(model: dict[str, Any]) -> str:
    """Return the title of the list that names this model, or an empty string if it gets a row."""
    if model["refusals"] or model["unreached"] or model["fault"]:
        return ""
    if counts := re.fullmatch(r"(\d+) of (\d+) matrices", model["peft"]):
        missed = int(counts[2]) - int(counts[1])
        if missed in (0, list(model["sites"].values()).count("embedding")):
            return BUT_EMBEDDINGS if missed else EVERYTHING
    return next((title for start, (_, title) in MESSAGES.items() if start in model["peft"].lower()), "")


def _name(model: dict[str, Any]) -> str:
    return model["name"] + (" (eager)" if model["frontend"] == "eager" else "")


def _row(model: dict[str, Any]) -> str:
    reasons = Counter(sentence.partition(": ")[2].partition(" (")[0] for sentence in model["refusals"].values())
    reasons["unreached"] = len(model["unreached"])
    named = [f"{count} {reason}" for reason, count in reasons.most_common() if count]
    refused = ", ".join(text.removesuffix(" no-form") for text in named)
    counts = Counter(model["sites"].values())
    sites = "|".join(str(counts[kind] or "") for kind in KINDS)
    fault = f"; NOT RIGHT: {_cell(model['fault'])}" if model["fault"] else ""
    short = re.sub(r"^(\w+Error): .*", r"\1", model["peft"]).replace(" matrices", "").replace(" of ", "/")
    peft = next((word for start, (word, _) in MESSAGES.items() if start in model["peft"].lower()), _cell(short)[:80])
    return f"|{_name(model)}|{sites}|{refused}{fault}|{peft}|"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "(").replace(">", ")")[:160]


if __name__ == "__main__":
    main(sys.argv[1:])
