"""Marks for torch's pipeline parallelism: where they stand, that they change nothing else, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import lorasc_fx as lx
from lorasc_fx.errors import PassError
from lorasc_fx.graph import text
from lorasc_fx.passes import FoldBranches, InsertBranches, MarkCuts, MatchSites, Pipeline
from tests.kit.errors import raises
from tests.passes.kit import fill, insert


class Net(nn.Module):
    """Calls modules, and computes with weights itself: one of them transposed, before anything reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(5, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        turned = self.last.weight.t()
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return x @ turned


def traced(front_end: str) -> fx.GraphModule:
    torch.manual_seed(0)
    model = Net().double()
    if front_end == "symbolic":
        return fx.symbolic_trace(model)
    return torch.export.export(model, (torch.ones(2, 5).double(),)).module()  # type: ignore[return-value]


def marked(graph_module: fx.GraphModule) -> list[str]:
    """What stands right after each mark."""
    cut = torch.ops.pippy._pipe_split.default
    return [node.next.name for node in graph_module.graph.nodes if node.target is cut]


AFTER = {"symbolic": ["blocks_0", "matmul"], "export": ["linear_1", "matmul"]}


@pytest.mark.parametrize("front_end", AFTER)
@pytest.mark.parametrize("inserted", [False, True])
def test_marks_stand_before_the_first_use(front_end: str, inserted: bool) -> None:
    graph_module = traced(front_end)
    graph_module = fill(insert(graph_module, lx.CascadeSpec(rank=2))) if inserted else graph_module
    x, before = torch.randn(3 if front_end == "symbolic" else 2, 5).double(), text(graph_module)
    result = MarkCuts(["last", "blocks.0"])(graph_module)
    assert result.modified
    assert text(graph_module) == before
    assert marked(result.graph_module) == AFTER[front_end]
    assert torch.equal(result.graph_module(x), graph_module(x))
    again = MarkCuts(("blocks.0", "last"))(result.graph_module)
    assert not again.modified
    assert again.graph_module is result.graph_module
    moved = MarkCuts(("last",))(result.graph_module)
    assert moved.modified
    assert marked(moved.graph_module) == ["matmul"]
    back = MarkCuts()(result.graph_module)
    assert back.modified
    assert text(back.graph_module) == before
    assert not MarkCuts()(graph_module).modified


def test_marks_stay_where_branches_come_and_go() -> None:
    spec = lx.CascadeSpec(rank=2)
    pipeline = Pipeline([MatchSites(spec), InsertBranches(), MarkCuts(("blocks.1",))])
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)
    found = pipeline(traced("symbolic")).graph_module
    assert marked(found) == ["blocks_1"]
    folded = FoldBranches()(found).graph_module
    assert marked(folded) == ["blocks_1"]
    assert text(MarkCuts()(folded).graph_module) == text(FoldBranches()(insert(traced("symbolic"), spec)).graph_module)


def test_cuts_that_cannot_be() -> None:
    graph_module = traced("symbolic")
    before = text(graph_module)
    with raises(PassError, "unknown-name", "mark-cuts", "'block.0'", "blocks.0"):
        MarkCuts(("block.0",))(graph_module)
    with raises(PassError, "invalid-value", "mark-cuts", "'first'", "no weight is read before"):
        MarkCuts(("first",))(graph_module)
    with raises(PassError, "invalid-value", "mark-cuts", "'blocks.0'", "'blocks'"):
        MarkCuts(("blocks", "blocks.0"))(graph_module)
    assert text(graph_module) == before
