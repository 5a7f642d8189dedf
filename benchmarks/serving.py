"""A bank of adapters beside peft and beside a folded model: `python -m benchmarks.serving [MODEL ...] [--rounds N]`.

Prints the table, and with `--write` writes it to benchmarks/serving.json and into docs/costs.md. All rivals take turns
in one process, over the same weights, adapters and batch of 8 rows; without gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from configurations; peft would look for theirs

import torch
from torch import nn

import lorasc_fx as lx

from . import report
from .measure import Turn, Turns, alternate, keep_freed, pin, ratio
from .models import WORKS, Work
from .rivals import RANK

HERE = Path(__file__).parent
BEGIN, END = "<!-- `python -m benchmarks.serving` writes from here -->", "<!-- to here, serving -->"
MODELS = ("vit-s", "bert-base", "gpt2")
ROWS, COUNT, MIXES = 8, 32, (1, 2, 8)
NAMES = [f"adapter{index}" for index in range(max(MIXES))]
"""Adapters that are loaded. The bank has memory for COUNT; that of peft is counted by adapter."""
SWITCHES = 200


def wrapped(work: Work, model: nn.Module) -> Any:
    """Return the model with adapters of peft, whose B is random."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, **work.peft)
    theirs = peft.get_peft_model(model, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        theirs.add_adapter(name, config)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=source)
    return theirs.requires_grad_(False).eval()


def rows_of(count: int) -> list[str]:
    """Return the adapter of each row, of so many adapters in turn."""
    return [NAMES[row % count] for row in range(ROWS)]


def folded_by(bank: lx.AdapterBank, model: nn.Module, name: str) -> nn.Module:
    """Return the model with an adapter in its weights."""
    with torch.no_grad():
        for weight, pair in bank.pairs(name).items():
            parameter = model.get_parameter(weight)
            parameter.add_((pair.b @ pair.a).view(parameter.shape).to(parameter.dtype))
    return model.eval()


def logits(output: Any) -> torch.Tensor:
    """Return the first tensor of an output."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return found


def switch_seconds(switch: Callable[[str], Any]) -> float:
    """Return the shortest time of one switch between two adapters."""
    names, found = cycle(NAMES[:2]), []
    for _ in range(SWITCHES):
        name, start = next(names), time.perf_counter()
        switch(name)
        found.append(time.perf_counter() - start)
    return min(found)


def megabytes(tensors: Any) -> float:
    """Return the size of tensors."""
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def measured(work: Work, rounds: int) -> dict[str, Any]:
    """Return ratios of forwards, and the costs of switches and of memory.

    Raises:
        RuntimeError: ours and peft do not compute the same.
    """
    model = work.build().eval()
    batch = {name: value.reshape(ROWS, -1, *value.shape[2:]) for name, value in work.batch().items()}
    theirs = wrapped(work, copy.deepcopy(model))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        adapters = {name: Path(folder, name) for name in NAMES}
        bank = lx.AdapterBank(copy.deepcopy(model), adapters, kwargs=batch, max_rank=RANK, capacity=COUNT)
    folded = folded_by(bank, model, NAMES[0])

    def ours(adapter: str | list[str]) -> Turn:
        return Turn(lambda: None, lambda: bank(**batch, adapter=adapter))

    def mixed_by_peft(names: list[str]) -> Turn:
        return Turn(lambda: None, lambda: theirs(**batch, adapter_names=names))

    turns = {
        "folded": Turn(lambda: None, lambda: folded(**batch)),
        "one, ours": ours(NAMES[0]),
        "one, peft": Turn(lambda: theirs.set_adapter(NAMES[0]), lambda: theirs(**batch)),
    }
    for count in MIXES:
        turns[f"{count}, ours"], turns[f"{count}, peft"] = ours(rows_of(count)), mixed_by_peft(rows_of(count))
    with torch.no_grad():
        for names in (rows_of(count) for count in MIXES):
            one, other = logits(bank(**batch, adapter=names)), logits(theirs(**batch, adapter_names=names))
            if (gap := float((one - other).abs().max() / other.abs().max())) > 1e-4:
                raise RuntimeError(f"{work.title}: ours and peft differ by {gap:.1e} of the output, with {names}")
        times = alternate(turns, rounds)
        graph = bank._graph(bank._compiler.calls.bind((), batch))
        switches = {
            "ours": switch_seconds(lambda name: graph.tensors_of(bank._adapters, name)),
            "peft": switch_seconds(theirs.set_adapter),
        }
    factors = [value for name, value in theirs.named_parameters() if "lora_" in name]
    memory = {"ours": megabytes(bank._adapters.slots._storages), "peft": megabytes(factors) * COUNT / len(NAMES)}
    return {"folded": min(times["folded"].busy), "ratios": ratios(times), "switch": switches, "memory": memory}


def ratios(times: Mapping[str, Turns]) -> dict[str, dict[str, float]]:
    """Return the ratios of the table."""
    pairs = {f"one, {who}": (f"one, {who}", "folded") for who in ("ours", "peft")}
    pairs |= {f"{count}, folded": (f"{count}, ours", "folded") for count in MIXES}
    pairs |= {f"{count}, peft": (f"{count}, ours", f"{count}, peft") for count in MIXES}
    return {name: ratio(times[one], times[other]) for name, (one, other) in pairs.items()}


def table(found: Mapping[str, Any]) -> str:
    """Return the rows as Markdown."""
    made = found["about"]
    head = (
        f"{made['cpu']}; torch {made['torch']}, peft {made['peft']}; rank {RANK}, fp32, {made['threads']} threads, "
        f"{made['rounds']} rounds in which the rivals take turns:"
    )
    cells = ["model", "one, ours / folded", "one, peft / folded"]
    cells += [f"{count} in {ROWS} rows, ours / folded" for count in MIXES]
    cells += [f"{count} in {ROWS} rows, ours / peft" for count in MIXES]
    cells += ["switch, ms, ours / peft", f"MiB of {COUNT} adapters, ours / peft"]
    lines = [head, "", f"| {' | '.join(cells)} |", f"|{'---|' * len(cells)}"]
    for name, row in found["rows"].items():
        keys = ["one, ours", "one, peft", *(f"{each}, {who}" for who in ("folded", "peft") for each in MIXES)]
        shown = [f"{row['ratios'][key]['minimum']:.2f} ({row['ratios'][key]['paired']:.2f})" for key in keys]
        switch, memory = row["switch"], row["memory"]
        shown.append(f"{1e3 * switch['ours']:.4f} / {1e3 * switch['peft']:.2f}")
        shown.append(f"{memory['ours']:.0f} / {memory['peft']:.0f}")
        lines.append(f"| {WORKS[name].title.replace('2 x 256', '8 x 64')} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="names", default=list(MODELS), help=f"of {', '.join(WORKS)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the table into docs/costs.md")
    options = parser.parse_args(arguments)
    pin(options.threads)
    keep_freed()
    found: dict[str, Any] = {"about": report.about(options.threads, options.rounds), "rows": {}}
    for name in options.names:
        found["rows"][name] = measured(WORKS[name], options.rounds)
        print(table({**found, "rows": {name: found["rows"][name]}}), flush=True)
    if options.write:
        file = HERE / "serving.json"
        if file.exists():  # the other models stay
            before = json.loads(file.read_text(encoding="utf-8"))["rows"]
            found["rows"] = {name: found["rows"].get(name, before.get(name)) for name in {**before, **found["rows"]}}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        page = HERE.parent / "docs" / "costs.md"
        head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        page.write_text(f"{head}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
