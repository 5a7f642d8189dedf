"""The section of docs/costs.md, made from the results; and what the numbers depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .compiled import COMPILED, PAIRS
from .costs import ON_DEVICE, ROWS
from .placement_oracle import AGAIN
from .rivals import RANK
from .start import CALLS, LAYERS, STARTS, WIDTH
from .steps import DROPOUT

__all__ = [
    "BEGIN",
    "END",
    "MARKERS",
    "SECTIONS",
    "about",
    "call_table",
    "compiled_table",
    "cost_table",
    "cuda_section",
    "graph_breaks_table",
    "memory_table",
    "placement_table",
    "put",
    "section",
    "start_table",
    "step_table",
]

BEGIN = "<!-- `make bench` writes from here -->"
END = "<!-- to here -->"
MARKERS = {
    "cpu": (BEGIN, END),
    "cuda": ("<!-- `make bench DEVICE=cuda` writes from here -->", "<!-- to here, on cuda -->"),
}
"""By device: where its section of the page begins and ends."""

Rows = Mapping[str, Mapping[str, Any]]


def about(threads: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Return what the numbers depend on."""
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    packages = {name: version(name) for name in ("torch", "peft", "timm", "transformers")}
    return {
        "python": platform.python_version(),
        **packages,
        "cpu": f"{processor()}, {os.cpu_count()} cores",
        **gpu,
        "threads": threads,
        "rounds": rounds,
    }


def processor() -> str:
    """Return the processor's name, family and model. Virtual machines often hide the full name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor()
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def section(results: Mapping[str, Any]) -> str:
    """Return the text between the markers."""
    made = results["about"]
    return f"""\
`make bench` measures everything in this section and writes the text, `benchmarks/results.json` and the curves.
{made["cpu"]}; torch {made["torch"]}, peft {made["peft"]}; rank {RANK}, fp32, {made["threads"]} threads, \
{made["rounds"]} rounds. In a round the variants of a model take turns.

CPU seconds of a training step divided by the seconds of the frozen model (forward, and the gradient of the input):
ratio of the minima (median of the ratios within a round). *Folded* is the released model; its
deviation from 1.00 is measurement noise. *Floor* counts flops: the frozen step plus the low-rank products.

{step_table(results["steps"])}

{_compiled(results.get("compiled", {}))}
MiB that autograd keeps between forward and backward, without parameters and buffers. *Allowed* is the memory of the
frozen model plus the inputs of the branches. Two columns have adapter dropout of {DROPOUT:g}. *Resident* is the
peak of a process that trains only this model, including interpreter and libraries. lorasc-fx copies W0
when the first stage ends, so *ours* is measured in the second stage. *base=FOLDER* is lorasc-fx with W0 in files.
Mapped pages of files count here and below; the system drops them when memory is short.

{memory_table(results["steps"])}

CPU seconds, ours / peft's for the same task (listed in `benchmarks/costs.py`). A transition is compared with
`merge_and_unload`, `get_peft_model` and a new optimizer. *Streaming* is a plain copy of the bytes that a transition
reads and writes.

{cost_table(results["costs"])}
{_started(results.get("start", {}))}
[benchmarks/curves.svg](../benchmarks/curves.svg) and `benchmarks/curves.json` have curves: the step by rank, by number
of sites and by number of past transitions, and the size of the slow state."""


def cuda_section(results: Mapping[str, Any]) -> str:
    """Return the text between the markers of the section on a GPU."""
    made = results["about"]
    return f"""\
{made["gpu"]}, CUDA {made["cuda"]}; torch {made["torch"]}, peft {made["peft"]}; rank {RANK}, bf16, {made["rounds"]} \
rounds. In a round the variants of a model take turns.

Seconds of a training step between two CUDA events, divided by the seconds of the frozen model. The columns are the same
as in the table above.

{step_table(results["steps"])}

MiB, as above; *allocated* is `torch.cuda.max_memory_allocated` of a process that holds only this model, while it
trains.

{memory_table(results["steps"], "cuda")}

Wall seconds, ours / ours with base="device" / peft's (`benchmarks/costs.py`):

{cost_table(results.get("costs", {}), "cuda")}"""


SECTIONS = {"cpu": section, "cuda": cuda_section}
"""By device: the text between its markers."""


def put(page: str, text: str, device: str = "cpu") -> str:
    """Return the page with the text between the markers of a device.

    Raises:
        ValueError: the page has not each marker once, in order.
    """
    begin, end = MARKERS[device]
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page needs {begin!r} and {end!r}, once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    titles = list(head)
    return "\n".join(f"|{'|'.join(cells)}|" for cells in [titles, ["---"] * len(titles), *map(list, rows)])


def step_table(rows: Rows) -> str:
    """Return the table of steps, over the frozen model's."""
    columns = ("ours/frozen", "peft/frozen", "full/frozen", "folded/frozen", "ours/peft")

    def cells(row: Mapping[str, Any]) -> Iterable[str]:
        yield row["title"]
        for column in columns:
            ratio = row["ratios"][column]
            yield f"{ratio['minimum']:.2f} ({ratio['paired']:.2f})"
        yield f"{row['floor']:.3f}"

    head = ("model", *(column.replace("/", " / ") for column in columns), "floor")
    return table(head, map(cells, rows.values()))


def placement_table(rows: Rows) -> str:
    """Return the table of placements: as chosen over the others."""

    def cells(row: Mapping[str, Any]) -> Iterable[str]:
        ratios = row["ratios"]
        groups = [name for name in ratios if not name.startswith(("all ", AGAIN))]
        best = max(groups, key=lambda name: ratios[name]["paired"], default=None)
        yield row["title"]
        for name in (AGAIN, "all beside", "all merged", *([best] if best else [])):
            yield f"{ratios[name]['minimum']:.3f} ({ratios[name]['paired']:.3f})"
        yield f"{best}, {row['sites'][best]} sites" if best else "-"

    head = ("model", "again", "all beside", "all merged", "one group in its other placement", "which")
    return table(head, map(cells, rows.values()))


def _compiled(rows: Rows) -> str:
    """Return the table of `torch.compile`; nothing where it was not measured."""
    if not rows:
        return ""
    return f"""
`torch.compile` with inductor and empty caches (`benchmarks/compiled.py`). *First step* includes the compilation, in
seconds of wall time (and CPU time with the C++ compiler). Then each variant trains and ends a stage: ours by
`transition`, peft's by `merge_and_unload`, `get_peft_model` and another `torch.compile`. The next columns count
recompiled graphs and time the first step after it. The last columns compare steps as above.

{compiled_table(rows)}
"""


def compiled_table(rows: Rows) -> str:
    """Return the table of compiled models: the first step, the first after a transition, and a step."""

    def seconds(counted: Mapping[str, float]) -> str:
        return f"{counted['wall']:.2f} ({counted['cpu']:.2f})"

    def cells(row: Mapping[str, Any]) -> Iterable[str]:
        yield row["title"]
        yield from (seconds(row["first"][name]) for name in COMPILED)
        yield from (f"{row['transition'][name]['graphs']}" for name in ("ours", "peft"))
        yield from (seconds(row["transition"][name]) for name in ("ours", "peft"))
        for one, other in PAIRS:
            ratio = row["ratios"][f"{one}/{other}"]
            yield f"{ratio['minimum']:.2f} ({ratio['paired']:.2f})"

    after = (f"{what}: {name}" for what in ("recompiled graphs", "first step after it") for name in ("ours", "peft"))
    first, steps = (f"first step: {name}" for name in COMPILED), (f"step: {one} / {other}" for one, other in PAIRS)
    return table(("model", *first, *after, *steps), map(cells, rows.values()))


def memory_table(rows: Rows, device: str = "cpu") -> str:
    """Return the table of memory, in MiB: of a process, or on a GPU of what torch has allocated there."""
    peak, rivals = "resident" if device == "cpu" else "allocated", ("frozen", "full", "peft", "ours")

    def cells(row: Mapping[str, Any]) -> Iterable[str]:
        kept, dropped, resident = row["activation"], row["activation with dropout"], row.get("resident", {})
        yield row["title"]
        yield from (_mib(kept[name]) for name in ("frozen", "full", "peft", "ours"))
        yield f"{kept['ours'] / kept['allowed']:.2f}"
        yield from (_mib(dropped.get(name)) for name in ("peft", "ours"))
        yield from (_mib(resident.get(name, {}).get("step")) for name in rivals)
        yield _mib(resident.get("ours", {}).get("sites"))
        yield _mib(resident.get("ours", {}).get("first"))
        yield _mib(resident.get("ours-file", {}).get("step"))

    head = ("model", "frozen", "full", "peft", "ours", "ours / allowed", "peft, dropout", "ours, dropout")
    return table(
        (*head, *(f"{peak}: {name}" for name in (*rivals, "W0 in it", "ours, first stage", "base=FOLDER"))),
        map(cells, rows.values()),
    )


def cost_table(rows: Rows, device: str = "cpu") -> str:
    """Return the table of what is paid once, or once a stage."""

    clock = "cpu" if device == "cpu" else "wall"
    rivals = ("ours", "peft") if device == "cpu" else ("ours", ON_DEVICE, "peft")
    measured = [name for name in ROWS if any(name in row["ours"] for row in rows.values())]

    def cells(row: Mapping[str, Any]) -> Iterable[str]:
        yield row["title"]
        for name in measured:
            yield " / ".join(f"{row[each][name][clock]:.2f}" if name in row[each] else "-" for each in rivals)
        yield f"{row['streaming'][clock]:.2f}"

    return table(("model", *measured, "streaming"), map(cells, rows.values()))


def _started(rows: Rows) -> str:
    """Return the tables of what comes before the first step; nothing where it was not measured."""
    if not rows:
        return ""
    seconds = rows["once"]["import"]
    return f"""
`import lorasc_fx` takes {seconds["lorasc_fx"]:.2f} CPU seconds after `import torch` ({seconds["torch"]:.2f}).

CPU seconds on one thread, with one process per model and two examples as inputs. *Forward*, *backward* and *export*
(`torch.export.export`) are for comparison. `adapt` runs three forwards to compare the graph with the model, and two
backwards if their autograd graphs differ. *Again* is `adapt` of another model in the same state, *with noise* the same
with noise, for which W0 is copied. *Load* has no inputs, and *first call* captures the graph after it. *MiB added* is
the peak memory that `adapt` adds to a process: alone, with noise, and with W0 in files. *Of a forward* is
the memory that one forward adds, with its autograd graph.

{start_table({name: row for name, row in rows.items() if name != "once"})}

CPU milliseconds of calls that spend most of their time in Python: a BERT of {LAYERS} layers and width {WIDTH}, and one
token that a Llama of 8 layers and the same width generates with its cache. *Eager* is the model without branches:

{call_table(rows["once"])}
"""


def start_table(rows: Rows) -> str:
    """Return the table of what comes before the first step."""

    def cells(row: Mapping[str, Any]) -> Iterable[str]:
        yield row["title"]
        yield from (f"{row[name]:.2f}" for name in STARTS)
        yield f"{row['adapt'] / (1.5 * row['export'] + 3 * row['forward'] + row['backward']):.2f}"
        memory = row.get("memory", {})
        kept = memory.get("start", {})
        yield from (_mib(kept.get(what)) for what in ("weights", "sites", "forward", "added"))
        yield from (_mib(memory.get(name, {}).get("added")) for name in ("start-noise", "start-file"))

    bound = "adapt / (1.5 export + 3 forward + backward)"
    added = ("MiB added", "added, noise", "added, base=FOLDER")
    head = ("model", *STARTS, bound, "MiB of weights", "of sites", "of a forward", *added)
    return table(head, map(cells, rows.values()))


def graph_breaks_table(once: Mapping[str, Any]) -> str:
    """Return the table of `adapt` where the capture has graph breaks."""

    keys = ("dynamo", "dynamo, trained")

    def cells(name: str) -> Iterable[str]:
        found = once["graph breaks"][name]
        yield name
        yield from (f"{found[key]:.2f}" for key in (*keys, "adapt"))
        yield from (f"{found['adapt'] / found[key]:.2f}" for key in keys)

    return table(("model", *keys, "adapt", *(f"adapt / {key}" for key in keys)), map(cells, once["graph breaks"]))


def call_table(once: Mapping[str, Any]) -> str:
    """Return the table of calls of a narrow model."""

    def cells(name: str) -> Iterable[str]:
        found = once["call"][name]
        yield name
        yield from (f"{1e3 * found['seconds'][rival]:.2f}" for rival in ("eager", "peft", "ours"))
        for pair in ("ours/eager", "ours/peft"):
            yield f"{found['ratios'][pair]['minimum']:.2f} ({found['ratios'][pair]['paired']:.2f})"

    return table(("call", "eager", "peft", "ours", "ours / eager", "ours / peft"), map(cells, CALLS))


def _mib(value: float | None) -> str:
    return _optional(None if value is None else value / 2**20, ".0f")


def _optional(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
