"""Measure the tables of docs/costs.md: `python -m benchmarks [TABLE ...] [--models NAME ...] [--rounds N] [--write]`.

Every model of a table is measured in a new process. `--write` stores the rows in benchmarks/results/ and puts the table
into the page; rows of other models stay. `--device cuda` measures on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peft would look up the models, which have random weights

import torch

from .measure import in_child
from .models import CUDA, MODELS
from .tables import TABLES, Row, measure

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "costs.md"


def machine(device: str, threads: int, rounds: int) -> str:
    """Describe the processor or GPU, the versions and the rounds of a measurement."""
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; bf16"
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
        family = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
        name = f"{facts.get('model name', platform.processor())}{family}, {os.cpu_count()} cores; {threads} threads"
    return f"{name}; torch {version('torch')}, peft {version('peft')}; {rounds} rounds"


def markdown(stored: Mapping[str, Any]) -> str:
    """Return a stored table in Markdown: its paragraph, the machine, and the rows of all models."""
    rows: list[Row] = [row for model in stored["rows"].values() for row in model]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row, name) for name in columns] for row in rows)]
    table = "\n".join(f"|{'|'.join(cells)}|" for cells in lines)
    return f"{stored['text']}\n\n{stored['machine']}:\n\n{table}"


def _cell(row: Row, column: str) -> str:
    """Return the text of a cell: a model's title up to the comma, a ratio without the median in parentheses."""
    text = row.get(column, "-")
    return text.partition(",")[0] if column == "model" else text.partition(" (")[0].replace(" / ", "/")


def put(page: str, name: str, text: str) -> str:
    """Return the page with the text between the markers of a table. Raise ValueError unless it has both, in order."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"docs/costs.md needs {begin!r} and {end!r}, once each and in this order")
    return f"{page.partition(begin)[0]}{begin}\n{text}\n{end}{page.partition(end)[2]}"


def write(name: str, measured: Mapping[str, Any], results: Path = RESULTS, page: Path = PAGE) -> None:
    """Store a table and put it into the page. Keep the rows of other models if they are from the same machine."""
    path = results / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}, "machine": None}
    kept = before["rows"] if before["machine"] == measured["machine"] else {}
    stored = {**measured, "rows": {**kept, **measured["rows"]}}
    text = put(page.read_text(encoding="utf-8"), name, markdown(stored))
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    page.write_text(text, encoding="utf-8")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; all by default")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="instead of the models of the table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="store the rows, and put them into docs/costs.md")
    options = parser.parse_args(arguments)
    tables = [name for name, table in TABLES.items() if options.device in table.devices]
    if unknown := set(options.tables) - set(tables):
        parser.error(f"no table {', '.join(sorted(unknown))} for {options.device}; there are {', '.join(tables)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU here: use a machine with one, or --device cpu")
    options.tables = options.tables or tables
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure the chosen tables and print them, and store them with `--write`."""
    options = _options(arguments)
    for name in options.tables:
        table = TABLES[name]
        rows: dict[str, list[Row]] = {}
        for model in options.models or (table.models if options.device == "cpu" else CUDA):
            rows[model] = in_child(measure, name, model, options.rounds)
            print(f"{name}: {model} is measured", file=sys.stderr, flush=True)
        about = machine(options.device, table.threads, options.rounds)
        measured = {"text": table.text, "machine": about, "rows": rows}
        print(f"{markdown(measured)}\n", flush=True)
        if options.write:
            write(name if options.device == "cpu" else f"{name}-cuda", measured)


if __name__ == "__main__":
    main()
