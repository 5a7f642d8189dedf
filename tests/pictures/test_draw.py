"""`cascade.draw`: the SVG read back by an XML parser, against the fx graph walked by networkx."""

from __future__ import annotations

import random
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx, nn

import lorasc_fx as lx
from lorasc_fx.pictures import draw_steps, layout_of, scene
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.state import oldest_variant

SVG = "{http://www.w3.org/2000/svg}"
X = (torch.randn(3, 8, generator=torch.Generator().manual_seed(1)),)


class Attention(nn.Module):
    """Three linears that read one input, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(torch.tanh(self.q(x)) * self.k(x) + self.v(x))


def texts(file: Path) -> list[str]:
    return ["".join(each.itertext()) for each in ET.parse(file).getroot().iter(f"{SVG}text")]


def adapted(**options: Any) -> lx.Cascade:
    return lx.adapt(Attention(), X, spec=lx.CascadeSpec(rank=2, **options))


def near(graph: fx.GraphModule, keys: set[str], radius: int) -> set[str]:
    """Names of the nodes up to `radius` arrows from the branches of these keys."""
    plain: nx.Graph = nx.Graph()
    for node in graph.graph.nodes:
        plain.add_node(node.name)
        plain.add_edges_from((node.name, each.name) for each in node.all_input_nodes)
    seeds = [node.name for node in graph.graph.nodes if str(node.target).removeprefix("branches.") in keys]
    assert seeds
    return {name for seed in seeds for name in nx.ego_graph(plain, seed, radius)}


@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
@pytest.mark.parametrize("radius", [0, 1, 3])
def test_it_shows_the_branch_and_what_is_around_it(tmp_path: Path, placement: Any, radius: int) -> None:
    cascade = adapted(placement=placement)
    file = tmp_path / "graph.svg"
    with unchanged(cascade):
        assert cascade.draw(file, ["q.weight"], radius) == file
    shown = texts(file)
    where = {"beside": "beside the op", "merged": "merged into the op", "weight": "on the weight"}[placement]
    assert shown.count(f"branch, rank 2, {where}") == len([each for each in shown if each.startswith("branch, rank")])
    assert "q.weight" in shown
    module = oldest_variant(cascade).module
    expected = near(module, {"q/weight"}, radius)
    told = {
        node.name: str(node.target).removeprefix("model.").removeprefix("branches.").replace("/", ".")
        for node in module.graph.nodes
    }
    for weight in ("k.weight", "v.weight", "out.weight"):
        assert (weight in shown) == any(told[name] == weight for name in expected)
    names = {node.name for node in module.graph.nodes if node.op in ("call_function", "call_method")}
    assert {name for name in names if name in shown} == names & expected


def test_the_first_sites_are_shown_and_names_are_readable(tmp_path: Path) -> None:
    cascade = adapted(placement="beside")
    shown = texts(cascade.draw(tmp_path / "graph.svg"))
    assert {"q.weight", "k.weight", "v.weight"} <= set(shown)
    assert shown.count("branch, rank 2, beside the op") == 4  # that of `out` is near enough
    assert "aten.linear" in shown
    assert "input" in shown
    assert any(re.fullmatch(r"float32\[s?\d+, 6\]", each) for each in shown)
    assert "branch beside its op" in shown  # the legend


def test_other_kinds_of_pictures(tmp_path: Path) -> None:
    for name, start in {"graph.png": b"\x89PNG", "graph.pdf": b"%PDF"}.items():
        assert adapted().draw(tmp_path / name, ["linear"]).read_bytes().startswith(start)


def test_a_branch_that_is_no_low_rank_product(tmp_path: Path) -> None:
    shown = texts(adapted(adapter="hira").draw(tmp_path / "graph.svg", ["q.weight"]))
    assert "branch, rank 2, on the weight" in shown or "branch, rank 2, merged into the op" in shown


def test_a_model_without_a_graph_is_not_drawn(tmp_path: Path) -> None:
    cascade = lx.adapt(Attention(), X, spec=lx.CascadeSpec(rank=2), frontend="eager")
    with raises(lx.StateError, "no-graph", "runs eagerly"):
        cascade.draw(tmp_path / "graph.svg", ["q"], 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"file": "graph.txt"}, lx.SpecError, ("invalid-value", "graph.txt", ".svg, .png, .pdf")),
        ({"file": "absent/graph.svg"}, lx.SpecError, ("unreadable-file", "absent")),
        ({"sites": "q.weight"}, lx.SpecError, ("invalid-value", "sites", "q.weight")),
        ({"sites": ["q.wieght"]}, lx.UnknownTarget, ("unknown-target", "q.wieght", "q.weight")),
        ({"radius": -1}, lx.SpecError, ("invalid-value", "radius", "-1")),
    ],
)
def test_what_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, error: Any, message: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    cascade = adapted()
    with unchanged(cascade), raises(error, *message):
        cascade.draw(**{"file": "graph.svg", **arguments})
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw(tmp_path: Path) -> None:
    cascade = adapted()
    cascade.double()
    with raises(lx.StateError, "not-available"):
        cascade.draw(tmp_path / "graph.svg")


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = adapted()
    for name in [module for module in sys.modules if module.partition(".")[0] == "igraph"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "igraph", None)
    with unchanged(cascade), raises(lx.errors.MissingExtra, "missing-extra", "igraph", "lorasc-fx[report]"):
        cascade.draw(tmp_path / "graph.svg")


def test_without_a_file_a_notebook_shows_the_picture(tmp_path: Path) -> None:
    cascade = adapted()
    picture = cascade.draw(sites=["q"])
    assert picture._repr_svg_() == picture.svg == cascade.draw(tmp_path / "graph.svg", ["q"]).read_text()


class Whole(nn.Module):
    """A model whose names begin with `model`, as many of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def test_the_steps_of_a_rewrite_are_drawn_side_by_side(tmp_path: Path) -> None:
    cascade = lx.adapt(Whole(), X, spec=lx.CascadeSpec(rank=2, placement="beside"))
    steps = {"before": cascade.folded_graph(), "with branches": cascade.graph_module, "folded": cascade.folded_graph()}
    draw_steps(steps, cascade.plan, tmp_path / "steps.svg", ["*.q.weight"], 2)
    shown = texts(tmp_path / "steps.svg")
    assert {*steps} <= {*shown}
    assert shown.count("model.q.weight") == 4  # in each graph, and the branch
    assert shown.count("branch, rank 2, beside the op") == 1


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


ACROSS, DOWN = 100.0, 50.0


def check(names: Sequence[str], arrows: Sequence[tuple[str, str]]) -> None:
    found = layout_of(names, arrows, ACROSS, DOWN)
    assert list(found.centres) == list(names)
    for a, b in combinations(names, 2):
        (xa, ya), (xb, yb) = found.centres[a], found.centres[b]
        assert abs(xa - xb) > ACROSS - 1e-6 or abs(ya - yb) > DOWN - 1e-6
    for (a, b), path in zip(arrows, found.arrows, strict=True):
        assert (path[0], path[-1]) == (found.centres[a], found.centres[b])
        assert all(below[1] - above[1] == pytest.approx(DOWN) for above, below in pairwise(path))


@pytest.mark.parametrize("seed", range(25))
def test_boxes_stand_apart_and_arrows_go_down(seed: int) -> None:
    source = random.Random(seed)
    names = [f"n{number}" for number in range(source.randint(2, 24))]
    check(names, [(a, b) for a, b in combinations(names, 2) if source.random() < 0.15])


@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
def test_a_real_graph(placement: Any) -> None:
    """Of branches beside their op, which igraph alone lets overlap."""
    cascade = adapted(placement=placement)
    shown = scene([oldest_variant(cascade).module], cascade.plan, cascade.sites[:3], 2)
    check(list(shown.boxes), shown.arrows)


def test_boxes_without_arrows_stand_side_by_side() -> None:
    found = layout_of(["a", "b", "c"], [], ACROSS, DOWN)
    assert sorted(x for x, _ in found.centres.values()) == pytest.approx([0, ACROSS, 2 * ACROSS])
