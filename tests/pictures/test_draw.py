"""`cascade.draw`: boxes and arrows read back from the text, against the fx graph walked by networkx."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.state import oldest_variant

X = (torch.randn(3, 8, generator=torch.Generator().manual_seed(1)),)
PLACEMENTS = {"beside": "beside the op", "merged": "merged into the op", "weight": "on the weight"}


class Attention(nn.Module):
    """Three linears that read one input, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(torch.tanh(self.q(x)) * self.k(x) + self.v(x))


def adapted(model: nn.Module | None = None, **options: Any) -> lx.Cascade:
    return lx.adapt(model or Attention(), X, spec=lx.CascadeSpec(rank=2, **options))


def boxes(text: str) -> dict[str, list[str]]:
    """The lines of each box by node name."""
    assert text.startswith("digraph {\n")
    assert text.endswith("}\n")
    matches = re.findall(r'^  ("[^"]*") \[label=("(?:[^"\\]|\\.)*")', text, re.MULTILINE)
    return {json.loads(name): json.loads(label).split("\n") for name, label in matches}


def arrows(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r'^  "([^"]*)" -> "([^"]*)"$', text, re.MULTILINE))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("radius", [0, 1, 3])
def test_it_shows_the_branch_and_what_is_around_it(placement: Any, radius: int) -> None:
    """Also of a model whose parameter names begin with `model`, as in many models of transformers."""
    cascade = adapted(nn.Sequential(OrderedDict(model=Attention())), placement=placement)
    with unchanged(cascade):
        text = cascade.draw(["model.q.weight"], radius)
    graph: nx.DiGraph = nx.DiGraph()
    for node in oldest_variant(cascade).module.graph.nodes:
        graph.add_node(node.name, target=str(node.target))
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    seeds = [name for name, data in graph.nodes.items() if data["target"] == "branches.model/q/weight"]
    assert seeds
    expected = {name for seed in seeds for name in nx.ego_graph(graph.to_undirected(), seed, radius)}
    shown = boxes(text)
    assert {*shown} == expected
    assert arrows(text) == {*graph.subgraph(expected).edges}
    for seed in seeds:
        assert shown[seed][:2] == ["model.q.weight", f"branch, rank 2, {PLACEMENTS[placement]}"]
    weights = {f"model.{name}.weight" for name in ("q", "k", "v", "out")}
    read = {graph.nodes[name]["target"].removeprefix("model.") for name in expected} & weights
    assert {lines[0] for lines in shown.values() if lines[1:2] == ["weight"]} == read
    complete = {name for name in expected if {*nx.all_neighbors(graph, name)} <= expected}
    dashed = {name for name in shown if re.search(rf'^  "{name}" \[.*dashed', text, re.MULTILINE)}
    assert dashed == expected - complete


def test_the_first_sites_are_shown_with_ops_and_shapes() -> None:
    lines = [line for box in boxes(adapted(placement="beside").draw()).values() for line in box]
    assert {"q.weight", "k.weight", "v.weight", "aten.linear", "input"} <= {*lines}
    assert lines.count("branch, rank 2, beside the op") == 4  # the branch of `out` is near enough
    assert any(re.fullmatch(r"float32\[s?\d+, 6\]", line) for line in lines)


def test_drawings_that_are_errors() -> None:
    cascade = adapted()
    with unchanged(cascade), raises(lx.UnknownTarget, "unknown-target", "q.wieght", "q.weight"):
        cascade.draw(["q.wieght"])
    cascade.double()  # no graph was captured in this dtype
    with raises(lx.StateError, "not-available"):
        cascade.draw()
    eager = lx.adapt(Attention(), X, spec=lx.CascadeSpec(rank=2), frontend="eager")
    with raises(lx.StateError, "no-graph"):
        eager.draw(["q"], 0)


def test_the_graph_of_a_cascade_is_an_attribute() -> None:
    cascade = adapted()
    assert cascade.graph_module is oldest_variant(cascade).module
    assert torch.equal(cascade.graph_module(*X), cascade(*X))
    cascade.double()
    with raises(lx.StateError, "not-available", "graph_module"):
        _ = cascade.graph_module
    broken = lx.adapt(Attention(), X, spec=lx.CascadeSpec(rank=2), frontend="eager")
    with raises(lx.StateError, "no-graph", "graph_module"):
        _ = broken.graph_module
