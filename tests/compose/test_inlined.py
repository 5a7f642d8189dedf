"""`InlineBranches` writes each branch as plain nodes. Later passes find them, or name the changed nodes."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lorasc_fx as lx
from lorasc_fx.graph import branch_nodes, record_of, text
from lorasc_fx.passes import (
    AdapterInputs,
    FoldBranches,
    InlineBranches,
    InsertBranches,
    MatchSites,
    Pipeline,
    StageTransition,
)
from tests.compose.models import traced
from tests.kit.compare import loss_of
from tests.kit.errors import raises
from tests.passes.cases import ADAPTABLE, BY_NAME, Case
from tests.passes.kit import assert_close, assert_differ, fill, insert, run

# of torch's own use of pytree, in 2.13
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


REFUSED = ("aten_grouped", "functional_grouped")
"""Cases with grouped products."""


def inlined(module: fx.GraphModule) -> fx.GraphModule:
    result = InlineBranches()(module)
    assert result.modified
    return result.graph_module


@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_an_operator(case: Case) -> None:
    inserted = fill(insert(case.own(), case.spec))
    before, adapted = text(inserted), run(inserted, case)
    if case.name in REFUSED:
        with raises(lx.PassError, "method-not-supported", "stacked matrices"):
            InlineBranches()(inserted)
        return
    plain = inlined(inserted)
    assert not branch_nodes(plain)
    assert_close(run(plain, case), adapted)
    assert text(FoldBranches()(plain).graph_module) == text(FoldBranches()(inserted).graph_module)
    assert_close(run(FoldBranches()(plain).graph_module, case), adapted)
    assert text(inserted) == before


class Net(nn.Module):
    """A table, a convolution and two linears, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.conv = nn.Embedding(9, 6, padding_idx=2), nn.Conv1d(6, 5, 2, padding=1)
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        y = torch.tanh(self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2))
        y = torch.relu(self.two(torch.tanh(self.one(y))))
        return self.two(y + 1)


IDS = torch.tensor([[1, 2, 8, 4], [0, 2, 3, 5], [7, 7, 6, 1]])
SPEC = lx.CascadeSpec(rank=2, seed=5, pace=0.5, targets=("linear", "conv", "embedding"))


def adapted(dialect: str = "aten", dtype: torch.dtype = torch.float64, **options: Any) -> fx.GraphModule:
    module = traced(Net().to(dtype).eval(), dialect, IDS)
    return fill(insert(module, lx.CascadeSpec(**{**vars(SPEC), **options})))


@pytest.mark.parametrize("dialect", ["modules", "aten"])
@pytest.mark.parametrize(
    "options", [{"placement": "merged"}, {"placement": "weight"}, {"noise": lx.Noise(0.2)}], ids=str
)
def test_outputs_gradients_and_folds_are_the_same(dialect: str, options: dict[str, Any]) -> None:
    inserted = adapted(dialect, **options)
    plain = inlined(inserted)
    outputs, gradients = [], []
    for module in (inserted, plain):
        outputs.append(module(IDS))
        parameters = [value for value in module.parameters() if value.requires_grad]
        gradients.append(torch.autograd.grad(loss_of(outputs[-1]), parameters))
    assert_close(outputs[1], outputs[0])
    assert_close(gradients[1], gradients[0])
    assert all(map(operator.is_, inserted.parameters(), plain.parameters()))
    assert dict(plain.state_dict()).keys() == dict(inserted.state_dict()).keys()
    for end in (FoldBranches(), FoldBranches("slow"), StageTransition()):
        expected = end(copy.deepcopy(inserted)).graph_module
        result = end(copy.deepcopy(plain)).graph_module
        assert text(result) == text(expected)
        assert torch.equal(result(IDS), expected(IDS))


@pytest.mark.parametrize("adapter", ["lora-xs", "delora", "hira", "miss", "shira"])
def test_a_method_with_a_plain_formula(adapter: str) -> None:
    inserted = adapted(adapter=adapter, targets=("linear",))
    plain = inlined(inserted)
    assert not branch_nodes(plain)
    assert_close(plain(IDS), inserted(IDS))
    assert torch.equal(FoldBranches()(plain).graph_module(IDS), FoldBranches()(inserted).graph_module(IDS))


@pytest.mark.parametrize(
    ("adapter", "dialect", "reason"),
    [
        ("dora", "aten", "DoraBranch"),
        ("vera", "aten", "VeraBranch"),
        ("oft", "aten", "OftBranch"),
        ("hira", "modules", "node one calls a module"),
    ],
)
def test_a_method_without_one_is_refused(adapter: str, dialect: str, reason: str) -> None:
    inserted = adapted(dialect, adapter=adapter, targets=("linear",))
    before = text(inserted)
    with raises(lx.PassError, "method-not-supported", reason, "exclude=('one.weight',)"):
        InlineBranches()(inserted)
    assert text(inserted) == before


def test_dropout_ends_with_the_train_mode() -> None:
    inserted = adapted(dropout=0.4, targets=("linear",))
    with raises(
        lx.PassError, "method-not-supported", "one.weight", "it has dropout in train mode, so call eval() first"
    ):
        InlineBranches()(inserted.train())
    plain, expected = inlined(inserted.eval()), inserted(IDS)
    assert_close(plain.train()(IDS), expected)
    assert text(FoldBranches()(plain).graph_module) == text(FoldBranches()(inserted).graph_module)


def test_a_narrow_dtype() -> None:
    inserted = adapted(dtype=torch.bfloat16)
    torch.testing.assert_close(inlined(inserted)(IDS), inserted(IDS), rtol=0.02, atol=0.02)


def rebuilt(module: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(module, copy.deepcopy(module.graph))


def renamed_and_copied(module: fx.GraphModule) -> fx.GraphModule:
    for index, node in enumerate(module.graph.nodes):
        node.name = f"value_{index}"
    return copy.deepcopy(module)


def one_constant_per_use(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        for user in list(node.users)[1:] if node.op == "get_attr" else ():
            with module.graph.inserting_before(user):
                user.replace_input_with(node, module.graph.get_attr(node.target))


@pytest.mark.parametrize("dialect", ["modules", "aten"])
@pytest.mark.parametrize("change", [rebuilt, fx.symbolic_trace, renamed_and_copied, one_constant_per_use])
def test_nodes_that_were_only_moved_are_found(change: Any, dialect: str) -> None:
    inserted = adapted(dialect)
    result = Pipeline([InlineBranches(), change])(inserted).graph_module
    before = inserted(IDS)
    assert_close(result(IDS), before)
    with torch.no_grad():  # a fold uses the current values
        result.get_parameter("branches.two/weight.lora_B").mul_(2)
    folded = FoldBranches()(result).graph_module
    assert not hasattr(folded, "branches")
    assert_close(folded(IDS), result(IDS))
    assert_differ(folded(IDS), before)
    again = fill(InsertBranches()(folded).graph_module, seed=2)
    assert record_of(again).plan.stage == 2


def node_of(module: fx.GraphModule, target: Any, last: bool = False) -> fx.Node:
    return [node for node in module.graph.nodes if node.target == target][-1 if last else 0]


def scale(module: fx.GraphModule) -> None:
    node = node_of(module, torch.ops.aten.mul.Tensor, last=True)
    node.args = (node.args[0], 3.0)


def observer(module: fx.GraphModule) -> None:
    node = node_of(module, "branches.two/weight.lora_A")
    users = list(node.users)
    with module.graph.inserting_after(node):
        rounded = module.graph.call_function(torch.fake_quantize_per_tensor_affine, (node, 0.01, 0, -128, 127))
    for user in users:
        user.replace_input_with(node, rounded)


def base(module: fx.GraphModule) -> None:
    node = node_of(module, torch.ops.aten.add.Tensor, last=True)
    with module.graph.inserting_before(node):
        node.args = (module.graph.call_function(torch.neg, (node.args[0],)), node.args[1])


def twice(module: fx.GraphModule) -> None:
    node = node_of(module, torch.ops.aten.add.Tensor, last=True)
    with module.graph.inserting_after(node):
        again = module.graph.call_function(torch.ops.aten.add.Tensor, (node, node.args[1]))
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


CHANGES: dict[Any, str] = {
    scale: "other arguments than in the branch",
    observer: "branches_two_weight_lora_a is read by fake_quantize_per_tensor_affine",
    twice: "two.weight: its branch reads add_tensor_3 and add",
    base: "two.weight: its branch reads neg",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_an_error_at_the_fold(change: Any) -> None:
    plain = inlined(adapted())
    result = Pipeline([change])(plain).graph_module  # allowed, because only a fold needs the nodes
    result.graph.lint()
    with raises(lx.passes.VerifyError, "graph-not-verified", "before fold-branches", CHANGES[change]):
        FoldBranches()(result)
    with raises(lx.passes.VerifyError, "graph-not-verified", "nodes of inlined branches were changed"):
        Pipeline([change, StageTransition()])(plain)


def test_other_passes_restore_the_branch_nodes_first() -> None:
    inserted = adapted()
    plain = inlined(inserted)
    assert not InlineBranches()(plain).modified
    assert not MatchSites(SPEC)(plain).modified
    lifted = AdapterInputs(4)(plain).graph_module
    assert len(branch_nodes(lifted)) == len(branch_nodes(inserted))
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        plain.get_parameter("two.weight").add_(1)
    with raises(lx.passes.VerifyError, "graph-not-verified", "two.weight was changed after stage 1 started"):
        FoldBranches()(plain)


def test_a_lost_record_is_an_error() -> None:
    with raises(lx.PassError, "requirement-not-met", "dropped the record of InlineBranches", "inside a Pipeline"):
        FoldBranches()(rebuilt(inlined(adapted())))


def test_a_live_model_is_refused() -> None:
    with raises(lx.PassError, "requirement-not-met", "reads a live model"):
        Pipeline([MatchSites(), InsertBranches(), InlineBranches()])(BY_NAME["aten_linear"].live())
