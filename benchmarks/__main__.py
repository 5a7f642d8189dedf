"""Measure the tables of docs/costs.md: `python -m benchmarks [TABLE ...] [--models NAME ...] [--rounds N] [--write]`.

Every model of a table runs in a process of its own. `--write` stores the rows in benchmarks/results/ and puts the table
into the page; rows of models that were not measured now stay. `--device cuda` measures on a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from configurations; peft would look for theirs

import torch

from .measure import keep_freed, pin
from .models import CUDA, by_name
from .tables import TABLES, Row, can_compile

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "costs.md"


def machine(device: str, threads: int, rounds: int) -> str:
    """Return what the numbers depend on."""
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; bf16"
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
        family = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
        name = f"{facts.get('model name', platform.processor())}{family}, {os.cpu_count()} cores; {threads} threads"
    return f"{name}; torch {version('torch')}, peft {version('peft')}; {rounds} rounds"


def markdown(found: Mapping[str, Any]) -> str:
    """Return a stored table as text: its paragraph, the machine, and its rows with the columns of all of them."""
    rows: Sequence[Row] = list(found["rows"].values())
    rows = [row for group in rows for row in group]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "-") for name in columns] for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{found['text']}\n\n{found['machine']}:\n\n{table}"


def put(page: str, name: str, text: str) -> str:
    """Return the page with the text between the markers of a table.

    Raises:
        ValueError: the page does not have both markers once, in order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"docs/costs.md needs {begin!r} and {end!r}, once each and in this order")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def write(name: str, found: Mapping[str, Any], results: Path = RESULTS, page: Path = PAGE) -> None:
    """Store a table and put it into the page; rows of other models stay if they are from the same machine."""
    path = results / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}, "machine": None}
    kept = before["rows"] if before["machine"] == found["machine"] else {}
    stored = {**found, "rows": {**kept, **found["rows"]}}
    text = put(page.read_text(encoding="utf-8"), name, markdown(stored))
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    page.write_text(text, encoding="utf-8")


def measured(name: str, model: str, rounds: int) -> list[Row]:
    """Return the rows of a model, measured in this process."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("lorasc_fx").setLevel(logging.ERROR)
    pin(TABLES[name].threads)
    keep_freed()
    return list(TABLES[name].measure(by_name(model), rounds))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all of them by default")
    parser.add_argument("--models", nargs="+", help="instead of those of the table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="store the rows, and put them into docs/costs.md")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)  # one table and model, in this process
    options = parser.parse_args(arguments)
    options.tables = options.tables or [name for name, table in TABLES.items() if options.device in table.devices]
    for name in options.tables:
        if name not in TABLES or options.device not in TABLES[name].devices:
            known = ", ".join(key for key, table in TABLES.items() if options.device in table.devices)
            parser.error(f"there is no table {name!r} for {options.device}; there are {known}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU here: use a machine with one, or --device cpu")
    if "compiled" in options.tables and not can_compile():
        parser.error("torch.compile needs a C++ compiler: install g++, or name the other tables")
    for model in options.models or ():
        try:
            by_name(model)
        except KeyError:
            parser.error(f"there is no model {model!r}; see benchmarks/models.py")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and store."""
    options = _options(arguments)
    if options.json:
        print(json.dumps(measured(options.tables[0], options.models[0], options.rounds)))
        return
    for name in options.tables:
        table = TABLES[name]
        models = options.models or (table.models if options.device == "cpu" else tuple(CUDA))
        rows: dict[str, list[Row]] = {}
        for model in models:
            command = [sys.executable, "-m", "benchmarks", name, "--models", model, "--rounds", str(options.rounds)]
            command += ["--device", options.device, "--json"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=PAGE.parents[1])
            rows[model] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {model} is measured", file=sys.stderr, flush=True)
        key = name if options.device == "cpu" else f"{name}-cuda"
        about = machine(options.device, table.threads, options.rounds)
        found = {"text": table.text, "machine": about, "rows": rows}
        print(f"{markdown(found)}\n", flush=True)
        if options.write:
            write(key, found)


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    main()
