"""A graph module with branches can be saved, copied and traced again, and then folded and adapted."""

from __future__ import annotations

import copy
import io
import pickle  # noqa: TID251 - what users of torch.fx do with their own files
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import lorasc_fx as lx
from lorasc_fx.graph import branch_nodes, faults, record_of
from lorasc_fx.passes import FoldBranches, InsertBranches, Pipeline, StageTransition
from tests.compose.models import traced
from tests.kit.errors import raises
from tests.passes.kit import branches_of, fill, insert

# of torch's own use of pytree, in 2.13
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two linears that read one input, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q, self.k, self.out = nn.Linear(5, 7), nn.Linear(5, 7, bias=False), nn.Linear(7, 7)

    def forward(self, x):  # type: ignore[no-untyped-def] # torch.fx pickles no annotation that is a string
        y = torch.tanh(self.q(x)) * self.k(x)
        return torch.relu(self.out(y)) + self.out(y * 2)


def adapted(dialect: str, placement: Any) -> fx.GraphModule:
    spec = lx.CascadeSpec(rank=2, lora_alpha=3.0, seed=5, placement=placement)
    return fill(insert(traced(Net().double(), dialect, X), spec))


def saved(module: fx.GraphModule) -> fx.GraphModule:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # noqa: TID251


WAYS: dict[str, Callable[[fx.GraphModule], fx.GraphModule]] = {
    "torch.save": saved,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),  # noqa: S301
    "deepcopy": copy.deepcopy,
    "symbolic_trace": fx.symbolic_trace,
    "GraphModule": lambda module: fx.GraphModule(module, copy.deepcopy(module.graph)),
    "twice": lambda module: saved(fx.symbolic_trace(module)),
}


@pytest.mark.parametrize("dialect", ["modules", "aten"])
@pytest.mark.parametrize("way", WAYS)
def test_a_rebuilt_graph_is_folded(way: str, dialect: str) -> None:
    module = adapted(dialect, "beside")
    expected, before = module(X), FoldBranches()(module).graph_module
    rebuilt = WAYS[way](module)
    assert torch.equal(rebuilt(X), expected)
    folded = FoldBranches()(rebuilt).graph_module
    assert not branch_nodes(folded)
    assert len(folded.graph.nodes) == len(before.graph.nodes)
    torch.testing.assert_close(folded(X), expected, rtol=1e-12, atol=1e-12)
    assert record_of(folded).plan.stage == 2
    assert all(parameter.requires_grad for parameter in folded.parameters())
    again = fill(InsertBranches()(folded).graph_module, seed=2)
    torch.testing.assert_close(FoldBranches()(again).graph_module(X), again(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_merged_branches_and_the_next_stage(way: str) -> None:
    module = adapted("aten", "merged")
    expected = StageTransition()(copy.deepcopy(module)).graph_module
    folded = FoldBranches()(WAYS[way](module)).graph_module
    assert [node.target for node in folded.graph.nodes].count(torch.ops.aten.linear.default) == 4
    torch.testing.assert_close(folded(X), module(X), rtol=1e-12, atol=1e-12)
    after = Pipeline([StageTransition()])(WAYS[way](module)).graph_module
    assert record_of(after).plan.stage == 2
    assert torch.equal(after(X), expected(X))
    assert faults(after) == []


def test_damage_in_a_rebuilt_graph_is_an_error() -> None:
    module = fx.symbolic_trace(adapted("modules", "beside"))
    node = next(node for node in module.graph.nodes if node.name.startswith("branches_q"))
    node.replace_all_uses_with(node.args[0])
    module.graph.erase_node(node)
    module.recompile()
    with raises(lx.passes.VerifyError, "graph-not-verified", "q.weight", "with 0 branches instead of one"):
        FoldBranches()(module)


def test_a_copy_of_a_branch_shares_its_kept_tensors() -> None:
    branch = branches_of(adapted("modules", "beside"))["q.weight"]
    assert copy.deepcopy(branch).kept is branch.kept is not None
