"""A change of a foreign pass to a site between insertion and fold is kept, or refused with node and reason.

Each pass works on a graph with trained branches. Kept: the folded graph computes the same as the graph after the pass.
Refused: an error names the node, and nothing is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

import lorasc_fx as lx
from lorasc_fx.graph import branch_nodes, faults, text
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline, StageTransition
from tests.compose.models import calls, plainly, traced
from tests.kit.errors import raises
from tests.kit.state import weight_state
from tests.passes.kit import deltas, fill, insert

aten = torch.ops.aten


class Plain(nn.Module):
    """Linear layers after each other; one weight is used twice, on the same input and on another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        a = torch.relu(self.second(y))
        b = torch.relu(self.second(y))
        return a * self.third(y) + b


class Stored(nn.Module):
    """A branch on its weight: two slices of it are used apart. And a convolution with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(9, 4) / 2)
        self.conv, self.bn = nn.Conv1d(3, 4, 2, bias=False), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).transpose(1, 2)
        up, gate = F.linear(y, self.packed[:4]), F.linear(y, self.packed[4:8])
        return up * torch.sigmoid(gate) + self.packed[8]


class Tied(nn.Module):
    """A table and a head with one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Linear(5, 7, bias=False), nn.Linear(5, 7, bias=False)
        self.back = nn.Linear(7, 5)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.back(torch.tanh(self.table(x)))))


TIED = ("table", "head")
MODELS: dict[type[nn.Module], tuple[int, ...]] = {Plain: (3, 5), Stored: (3, 3, 6), Tied: (3, 5)}


def make(model: type[nn.Module], dialect: str, placement: str = "beside") -> tuple[fx.GraphModule, Tensor]:
    """A graph with trained branches, and an input."""
    torch.manual_seed(2)
    module = model().double()
    x = torch.randn(MODELS[model], dtype=torch.float64)
    module(x * 2 + 1)
    module.eval()
    plain = traced(module, dialect, x)
    spec = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=1.0, seed=5, placement=placement)  # type: ignore[arg-type]
    return fill(insert(plainly(plain) if dialect == "aten" else plain, spec)), x


@dataclass(frozen=True)
class Case:
    """A foreign pass, its graph, and the names in the error that refuses it. No names if it is kept."""

    change: Callable[[fx.GraphModule], Any]
    names: tuple[str, ...]
    model: type[nn.Module]
    dialect: str
    placement: str

    def __str__(self) -> str:
        return self.change.__name__


CASES: list[Case] = []


def case(
    *names: str, model: type[nn.Module] = Plain, dialect: str = "aten", placement: str = "beside"
) -> Callable[[Callable[[fx.GraphModule], Any]], Callable[[fx.GraphModule], Any]]:
    def register(change: Callable[[fx.GraphModule], Any]) -> Callable[[fx.GraphModule], Any]:
        CASES.append(Case(change, names, model, dialect, placement))
        return change

    return register


def at(module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in module.graph.nodes if node.name == name)


def base_of(node: fx.Node) -> fx.Node:
    base = node.args[0]
    assert isinstance(base, fx.Node)
    return base


# --- kept -----------------------------------------------------------------------------------------------------------


@case()
def base_and_branch_renamed(module: fx.GraphModule) -> None:
    at(module, "linear").name = "projection"
    at(module, "linear_lora").name = "projection_with_adapter"


@case(placement="merged")
def merged_branch_renamed(module: fx.GraphModule) -> None:
    at(module, "linear_lora").name = "projection_with_adapter"


@case()
def base_and_branch_cloned(module: fx.GraphModule) -> None:
    branch = at(module, "linear_lora")
    user = next(iter(branch.users))
    with module.graph.inserting_before(user):
        base = module.graph.node_copy(base_of(branch))
        twin = module.graph.node_copy(branch, lambda node: base if node is base_of(branch) else node)
        total = module.graph.call_function(torch.add, (branch, twin))
    user.replace_input_with(branch, total)


@case()
def nodes_reordered(module: fx.GraphModule) -> None:
    branch = at(module, "linear_3_lora")
    at(module, "tanh").append(base_of(branch))
    at(module, "relu_1").append(branch)


@case()
def bias_split_off_behind_the_branch(module: fx.GraphModule) -> None:
    branch = at(module, "linear_lora")
    base = base_of(branch)
    bias = base.args[2]
    base.args = base.args[:2]
    users = list(branch.users)
    with module.graph.inserting_after(branch):
        total = module.graph.call_function(aten.add.Tensor, (branch, bias))
    for user in users:
        user.replace_input_with(branch, total)


@case(model=Tied)
def name_of_a_tied_weight_dropped_with_a_new_module(module: fx.GraphModule) -> fx.GraphModule:
    table, head = (next(node for node in module.graph.nodes if node.target == f"{name}.weight") for name in TIED)
    head.replace_all_uses_with(table)
    module.graph.erase_node(head)
    result = fx.GraphModule(module, copy.deepcopy(module.graph))
    assert not hasattr(result, "head")
    return result


@case(model=Stored)
def noise_of_a_quantizer_over_the_branch(module: fx.GraphModule) -> None:
    branch = at(module, "packed_lora")
    users = list(branch.users)
    with module.graph.inserting_after(branch):
        rounded = module.graph.call_function(torch.fake_quantize_per_tensor_affine, (branch, 0.01, 0, -128, 127))
    for user in users:
        user.replace_input_with(branch, rounded)


@case()
def dead_uses_dropped_whole(module: fx.GraphModule) -> None:
    """One of the two uses of a weight goes, with its branch; the other stays."""
    output = next(iter(reversed(module.graph.nodes)))
    total = output.args[0]
    assert isinstance(total, fx.Node)
    total.replace_all_uses_with(total.args[0])  # type: ignore[arg-type]
    module.graph.eliminate_dead_code()
    assert calls(module, "relu") == 1


# --- refused --------------------------------------------------------------------------------------------------------


@case("first.weight is used at node first_weight with 0 branches", "run fold-branches before a pass that changes")
def weight_under_a_quantizer(module: fx.GraphModule) -> None:
    base = at(module, "linear")
    with module.graph.inserting_before(base):
        rounded = module.graph.call_function(torch.fake_quantize_per_tensor_affine, (base.args[1], 0.01, 0, -128, 127))
    base.args = (base.args[0], rounded, *base.args[2:])


@case("conv.weight was changed after stage 1 started", model=Stored, dialect="modules")
def norm_folded_into_the_weights_below(module: fx.GraphModule) -> None:
    norm = at(module, "bn")
    module.conv = torch.nn.utils.fuse_conv_bn_eval(module.conv, module.bn)  # type: ignore[arg-type]
    norm.replace_all_uses_with(base_of(norm))
    module.graph.erase_node(norm)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_change_is_kept_or_refused(case: Case) -> None:
    inserted, x = make(case.model, case.dialect, case.placement)
    with torch.no_grad():
        adapted, before = inserted(x), text(inserted)
        if not case.names:
            result = Pipeline([case.change])(copy.deepcopy(inserted)).graph_module
            assert faults(result) == []
            folded = FoldBranches()(result).graph_module
            assert not branch_nodes(folded)
            torch.testing.assert_close(folded(x), result(x), rtol=0, atol=1e-10)
            original = copy.deepcopy(folded)  # the folded weights are W + s B A
            for weight, delta in deltas(inserted).items():
                original.get_parameter(weight).sub_(delta)
                torch.testing.assert_close(
                    original.get_parameter(weight), weight_state(result, weight).base, rtol=0, atol=1e-14
                )
            return
        with raises(lx.passes.VerifyError, "graph-not-verified", *case.names, f"after {case.change.__name__}"):
            Pipeline([case.change, FoldBranches()])(inserted)
        assert text(inserted) == before
        assert torch.equal(inserted(x), adapted)


def test_branches_in_a_module_are_refused() -> None:
    inserted, _ = make(Plain, "aten")
    parts = split_module(inserted, inserted, lambda node: 0)
    with raises(lx.PassError, "requirement-not-met", "fold-branches", "contains branches: other code moved them"):
        FoldBranches()(parts)


def test_weights_with_noise_are_unchanged_weights() -> None:
    """Weights with the noise of the stage have the values of its start, also in copies."""
    module = fx.symbolic_trace(Plain().double())
    spec = lx.CascadeSpec(rank=2, noise=lx.Noise(0.3, where="all"), pace=0.5, targets=("first.weight",))
    inserted = fill(Pipeline([MatchSites(spec), InsertBranches()])(module).graph_module)
    for stage in range(3):
        assert faults(copy.deepcopy(inserted)) == [], stage
        inserted = fill(StageTransition()(inserted).graph_module, seed=stage)
    changed = copy.deepcopy(inserted)
    with torch.no_grad():
        changed.get_parameter("third.weight")[0, 0] += 1e-9  # no site, but a fold removes its noise
    assert [fault.partition(";")[0] for fault in faults(changed)] == ["third.weight was changed after stage 4 started"]
