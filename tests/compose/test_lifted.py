"""Graphs that take weights as inputs, and graphs of torch.compile, get branches as any other graph."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import lorasc_fx as lx
from lorasc_fx.graph import record_of, text
from lorasc_fx.passes import (
    FoldBranches,
    InlineBranches,
    InsertBranches,
    MatchSites,
    NoSites,
    Pipeline,
    weights_as_attributes,
)
from tests.compose.kinds import WITH_NAMES, WITHOUT_NAMES, X, lifted, model
from tests.compose.page import shapes
from tests.kit.errors import raises
from tests.kit.models import train, trainable_parameters
from tests.passes.kit import deltas, fill

# of dynamo itself, for the output of the first graph
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, seed=5)
INSERT = Pipeline([MatchSites(SPEC), InsertBranches()])


def tensor_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


@pytest.mark.parametrize("kind", WITH_NAMES | WITHOUT_NAMES)
def test_a_kind_of_graph(kind: str) -> None:
    module = model()
    graph, inputs = (WITH_NAMES | WITHOUT_NAMES)[kind](module)
    shapes(graph, inputs)
    before, named = text(graph), graph
    if kind in WITHOUT_NAMES:
        named = weights_as_attributes(graph, inputs if len(inputs) > 1 else (), module)
    assert text(graph) == before
    assert torch.equal(tensor_of(named(*inputs)), module(X))
    inserted = fill(INSERT(named).graph_module)
    added = deltas(inserted)
    assert set(added) == {"0.weight", "2.weight"}
    expected = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in added.items():
            expected.get_parameter(name).add_(value)
    for passes in ([], [InlineBranches()]):
        between = Pipeline([*passes, lambda module: shapes(module, inputs)])(inserted).graph_module
        torch.testing.assert_close(tensor_of(between(*inputs)), expected(X), rtol=1e-12, atol=1e-12)
        folded = FoldBranches()(between).graph_module
        shapes(folded, inputs)
        assert text(folded) == text(named)
        torch.testing.assert_close(tensor_of(folded(*inputs)), expected(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["ExportedProgram.graph_module", "make_fx(function)(parameters, x)"])
def test_the_error_names_the_cause(kind: str) -> None:
    graph, _ = WITHOUT_NAMES[kind](model())
    with raises(NoSites, "no-sites", "weights_as_attributes", "inputs of the graph"):
        INSERT(graph)


def test_wrong_inputs_are_errors() -> None:
    module = model()
    graph, inputs = lifted(module)
    with raises(lx.PassError, "input-not-supported", "4 inputs", "5 placeholders"):
        weights_as_attributes(graph, inputs[1:], module)
    with raises(lx.PassError, "input-not-supported", "no input and no attribute"):
        weights_as_attributes(graph, inputs, model())


def test_tied_and_existing_modules_keep_the_graph_module_unchanged() -> None:
    module = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    module[1].weight = module[0].weight
    traced = make_fx(module)(X)
    inserted = INSERT(weights_as_attributes(traced, (), module)).graph_module
    assert [site.weight for site in record_of(inserted).plan.sites] == ["0.weight"]
    assert not [name for name in dict(traced.named_parameters()) if name.startswith("0")]


class Broken(nn.Module):
    """A graph break between two linears, and a number in Python that a graph depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 4)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.tanh(self.first(x)))
        torch._dynamo.graph_break()
        return self.second(y) * self.factor


@pytest.fixture
def compiled() -> Any:
    torch._dynamo.reset()
    torch.manual_seed(4)
    module = Broken().double()
    backend = lx.backend(SPEC, inner="eager")
    yield module, backend, torch.compile(module, backend=backend)
    torch._dynamo.reset()


def trained(backend: Any, call: Any) -> Tensor:
    return train(call, torch.optim.Adam(trainable_parameters(backend), 0.02), [X] * 20)


def test_branches_train_on_both_sides_of_a_break(compiled: Any) -> None:
    module, backend, call = compiled
    before = copy.deepcopy(module)
    assert torch.equal(call(X), module(X))
    losses = trained(backend, call)
    assert losses[-1] < 0.7 * losses[0]
    assert sorted(backend.branches) == ["first/weight", "second/weight"]
    assert all(branch.lora_B.abs().max() > 0 for branch in backend.branches.values())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in module.parameters())
    folded = backend.fold(call)
    assert type(folded) is Broken
    torch.testing.assert_close(folded(X), call(X), rtol=1e-12, atol=1e-12)


def test_another_compilation_shares_the_branches(compiled: Any) -> None:
    module, backend, call = compiled
    call(X)
    trained(backend, call)
    parameters, output = list(backend.parameters()), call(X)
    module.factor = 2.0
    torch.testing.assert_close(call(X), 2 * output)
    with torch.no_grad():
        call(torch.cat([X, X]))
    assert list(map(id, backend.parameters())) == list(map(id, parameters))
    state = {name: value.clone() for name, value in backend.state_dict().items()}
    backend.branches["second/weight"].lora_B.data.zero_()
    assert not torch.allclose(call(X), 2 * output)
    backend.load_state_dict(state)
    torch.testing.assert_close(call(X), 2 * output)


def test_a_pattern_may_match_in_one_graph_only_but_not_in_none() -> None:
    torch._dynamo.reset()
    module = Broken().double()
    backend = lx.backend(lx.CascadeSpec(rank=2, targets=("second",)), inner="eager", model=module)
    torch.compile(module, backend=backend)(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(backend.branches) == ["second/weight"]
        assert len(list(backend.parameters())) == 2
    backend.fold(module)
    spec = lx.CascadeSpec(rank=2, targets=("first", "secnd"))
    with pytest.raises(lx.UnknownTarget, match="'secnd' matches no weight; nearest: 'second'"):
        lx.backend(spec, inner="eager", model=module)
    backend = lx.backend(spec, inner="eager")
    with raises(NoSites, "no-sites", "call the compiled model"):
        list(backend.parameters())
    torch.compile(module, backend=backend)(X)
    with pytest.warns(UserWarning, match="in the graphs compiled so far, targets: 'secnd' matches no weight"):
        assert len(list(backend.parameters())) == 2
    with pytest.raises(lx.UnknownTarget, match="secnd"):
        backend.fold(module)


def test_no_site_at_all_is_an_error() -> None:
    torch._dynamo.reset()
    backend = lx.backend(lx.CascadeSpec(rank=2, targets=("missing",)), inner="eager")
    torch.compile(Broken().double(), backend=backend)(X)
    with raises(NoSites, "no-sites", "the spec leaves no site to adapt", "missing"):
        torch.optim.SGD(backend.parameters(), 0.1)


def test_two_parameters_of_one_name_are_an_error(compiled: Any) -> None:
    _, backend, call = compiled
    call(X)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"two parameters are called first\.weight"):
        torch.compile(Broken().double(), backend=backend)(X)


@pytest.mark.slow
def test_inductor() -> None:
    torch._dynamo.reset()
    module = Broken().double()
    backend = lx.backend(SPEC)
    call = torch.compile(module, backend=backend)
    torch.testing.assert_close(call(X), module(X), rtol=1e-12, atol=1e-12)
    losses = trained(backend, call)
    assert losses[-1] < 0.7 * losses[0]
    torch.testing.assert_close(backend.fold(module)(X), call(X), rtol=1e-12, atol=1e-12)
