"""What our own passes cost: beside the capture, on models of the zoo, and by the size of a graph.

`python -m benchmarks.passes` writes benchmarks/passes.json and benchmarks/passes.svg. CPU seconds of one process, the
minimum of three runs for the curve; captures are timed once each.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import fx, nn

import lorasc_fx as lx
from benchmarks.coverage.entry import built, seed
from benchmarks.coverage.examine import SPEC
from benchmarks.coverage.zoo import ZOO
from lorasc_fx.compile import compiler
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline

mpl.use("svg")

HERE = Path(__file__).parent
SIZES = (500, 1000, 2000, 5000, 10000, 20000)


def chain(nodes: int) -> fx.GraphModule:
    """Return a graph of that many nodes: linear layers with an activation between them."""
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    for index in range(nodes // 4):
        root.add_module(f"l{index}", nn.Linear(8, 8))
        weight, bias = graph.get_attr(f"l{index}.weight"), graph.get_attr(f"l{index}.bias")
        x = graph.call_function(torch.ops.aten.linear.default, (x, weight, bias))
        x = graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.output(x)
    return fx.GraphModule(root, graph)


def curve() -> list[dict[str, float]]:
    """Return the seconds of insertion and fold by the number of nodes."""
    rows = []
    for nodes in SIZES:
        graph = chain(nodes)
        pipeline = Pipeline([MatchSites(lx.CascadeSpec(rank=2)), InsertBranches()])
        insert, fold = [], []
        for _ in range(3):
            gc.collect()
            start = time.process_time()
            adapted = pipeline(graph).graph_module
            middle = time.process_time()
            FoldBranches()(adapted)
            insert.append(middle - start)
            fold.append(time.process_time() - middle)
        rows.append({"nodes": nodes, "insert": min(insert), "fold": min(fold)})
        print(f"{nodes:6d} nodes: insert {min(insert):.2f} s, fold {min(fold):.2f} s", flush=True)
    return rows


def shares(names: list[str]) -> list[dict[str, Any]]:
    """Return, for each model, the seconds of its capture and of our passes over it."""
    rows = []
    spent: dict[str, float] = {}
    originals = {name: getattr(compiler, name) for name in ("capture", "insert")}

    def timed(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return originals[name](*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - start

        return call

    for name in originals:
        setattr(compiler, name, timed(name))
    try:
        for name in names:
            spent.clear()
            model = built(ZOO[name])
            seed(1)
            args, kwargs = ZOO[name].inputs(True)
            gc.collect()
            gc.disable()  # else one of the two pays for the garbage of the models before
            cascade = lx.adapt(model, args, kwargs, spec=SPEC)
            gc.enable()
            if cascade.frontend == "graph-breaks":  # no whole graph, and no passes of ours over one
                continue
            share = spent["insert"] / spent["capture"]
            rows.append({"model": name, "capture": spent["capture"], "passes": spent["insert"], "share": share})
            print(f"{name:40s} capture {spent['capture']:6.2f} s, passes {100 * share:4.1f} %", flush=True)
    finally:
        for name, original in originals.items():
            setattr(compiler, name, original)
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Draw the curve."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for what in ("insert", "fold"):
        axes.plot([row["nodes"] for row in rows], [row[what] for row in rows], marker="o", label=what)
    axes.set(xlabel="nodes of the graph", ylabel="CPU seconds", title="Cost of the passes")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main(names: list[str]) -> None:
    """Measure, print, and write."""
    torch.set_num_threads(1)
    rows, models = curve(), shares(names or list(ZOO))
    worst = max(models, key=lambda each: each["share"])
    print(f"largest share of {len(models)} models: {100 * worst['share']:.1f} % ({worst['model']})")
    found = {"torch": str(torch.__version__), "curve": rows, "models": models}
    (HERE / "passes.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(rows, HERE / "passes.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
