"""A step of every adapter method beside the same method of peft: `python -m benchmarks.methods [MODEL] [ROUNDS]`.

Prints the table, and writes it to benchmarks/methods.json and into docs/costs.md. The clock and the models are those of
`python -m benchmarks`: all rivals take turns in one process, over the same weights and batch.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from configurations; peft would look for theirs

import lorasc_fx as lx
from lorasc_fx.branch import METHODS

from . import report
from .measure import Turn, alternate, keep_freed, pin, ratio
from .models import WORKS, Work
from .rivals import RANK, Rival, entries

HERE = Path(__file__).parent
BEGIN, END = "<!-- `python -m benchmarks.methods` writes from here -->", "<!-- to here, the methods -->"

CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("LoraConfig", {"r": RANK, "lora_alpha": RANK}),
    "dora": ("LoraConfig", {"r": RANK, "lora_alpha": RANK, "use_dora": True}),
    "vera": ("VeraConfig", {"r": RANK}),
    "hira": ("HiraConfig", {"r": RANK}),
    "shira": ("ShiraConfig", {"r": RANK}),
    "miss": ("MissConfig", {"r": RANK}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": RANK}),
    "lokr": ("LoKrConfig", {"r": RANK, "alpha": RANK}),
    "delora": ("DeloraConfig", {"r": RANK}),
}
"""peft's configuration of each method; it has no LoRA-XS."""


def rivals_of(work: Work) -> dict[str, Rival]:
    """Return the frozen model, and each method by us and by peft, by name (`NAME`, `NAME by peft`).

    Raises:
        RuntimeError: ours and peft train different numbers of entries.
    """
    import peft

    model, batch = work.build(), work.batch()

    def rival(adapted: Any) -> Rival:
        return Rival(adapted, work, {name: value.clone().requires_grad_(True) for name, value in batch.items()})

    found = {"frozen": rival(copy.deepcopy(model).requires_grad_(False))}
    for name in METHODS:
        alpha = {"lora_alpha": float(RANK)} if "lora_alpha" in METHODS[name].options else {}
        spec = lx.CascadeSpec(adapter=name, targets=work.targets, rank=RANK, **alpha)
        found[name] = rival(lx.adapt(copy.deepcopy(model), kwargs=dict(batch), spec=spec))
        if name in CONFIGS:
            config, options = CONFIGS[name]
            theirs = peft.get_peft_model(copy.deepcopy(model), getattr(peft, config)(**work.peft, **options))
            found[f"{name} by peft"] = rival(theirs)
            if entries(found[name].model) != entries(theirs):
                raise RuntimeError(f"{name}: ours trains {entries(found[name].model)} entries, peft {entries(theirs)}")
    return found


def measured(work: Work, rounds: int) -> dict[str, Any]:
    """Return by method the trained entries, and the ratios of minima (medians of the ratios within a round)."""
    rivals = rivals_of(work)
    times = alternate({name: Turn(rival.prepare, rival.step) for name, rival in rivals.items()}, rounds)
    rows: dict[str, Any] = {}
    for name in METHODS:
        theirs = f"{name} by peft"
        pairs = {"ours/frozen": (name, "frozen")}
        if theirs in times:
            pairs |= {"peft/frozen": (theirs, "frozen"), "ours/peft": (name, theirs)}
        ratios = {key: ratio(times[one], times[other]) for key, (one, other) in pairs.items()}
        rows[name] = {"entries": entries(rivals[name].model), "ratios": ratios}
    return rows


def table(found: Mapping[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = ["| adapter | trained entries | ours / frozen | peft / frozen | ours / peft |", "|---|---|---|---|---|"]
    for name, row in found["rows"].items():
        cells = []
        for key in ("ours/frozen", "peft/frozen", "ours/peft"):
            pair = row["ratios"].get(key)
            cells.append("" if pair is None else f"{pair['minimum']:.2f} ({pair['paired']:.2f})")
        lines.append(f"| `{name}` | {row['entries']:,} | {' | '.join(cells)} |")
    made = found["about"]
    packages = f"torch {made['torch']}, peft {made['peft']}"
    head = f"{found['title']}; {made['cpu']}; {packages}; rank {RANK}, {made['rounds']} rounds:"
    return "\n".join([head, "", *lines])


def main(arguments: list[str]) -> None:
    """Measure, print, and write."""
    name, rounds = arguments[0] if arguments else "bert-base", int(arguments[1]) if len(arguments) > 1 else 5
    pin(2)
    keep_freed()
    found = {"about": report.about(2, rounds), "title": WORKS[name].title, "rows": measured(WORKS[name], rounds)}
    print(table(found))
    (HERE / "methods.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = HERE.parent / "docs" / "costs.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
