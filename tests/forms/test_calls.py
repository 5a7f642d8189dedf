"""Kinds of models (modules, graph modules of each dialect, programs), wrappers, and types of outputs."""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers.modeling_outputs import BaseModelOutput

import lorasc_fx as lx
from tests.forms.kit import SPEC, Pair, Result, by_formula
from tests.kit.compare import assert_same, loss_of, run, seed
from tests.kit.models import branches, randomize

# torch warns if an exported graph is copied
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


class Net(nn.Module):
    """A convolution, a norm, linears, a table, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.table, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        seen = F.relu(self.norm(self.conv(image))).mean((2, 3))
        hidden = torch.tanh(self.body(self.table(ids) + seen.unsqueeze(1)))
        return self.head(hidden), seen


SITES = {"conv.weight", "table.weight", "body.weight"}


def net() -> Net:
    seed(0)
    return Net().double().eval()


def inputs(batch: int = 2, size: int = 7, length: int = 5) -> tuple[Tensor, Tensor]:
    seed(1)
    return torch.randn(batch, 3, size, size, dtype=torch.float64), torch.randint(0, 9, (batch, length))


class Leafless(fx.Tracer):
    """Only the norm is a leaf module. Linears and convolutions are functions."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d)


def functional(model: nn.Module) -> fx.GraphModule:
    tracer = Leafless()
    return fx.GraphModule(model, tracer.trace(model))


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {"image": {0: batch}, "ids": {0: batch, 1: length}}
    return torch.export.export(model, inputs(), dynamic_shapes=shapes)


def simplified(model: nn.Module) -> fx.GraphModule:
    """A graph after another pass: the batch norm is folded into the convolution, a node is added, dead code removed."""
    model.conv, model.norm = fuse_conv_bn_eval(model.conv, model.norm), nn.Identity()
    fused = fx.symbolic_trace(model)
    for node in fused.graph.find_nodes(op="call_function", target=torch.tanh):
        with fused.graph.inserting_after(node):
            clamped = fused.graph.call_function(torch.clamp, (node, -0.9, 0.9))
        node.replace_all_uses_with(clamped, delete_user_cb=lambda user, new=clamped: user is not new)
    fused.graph.eliminate_dead_code()
    fused.recompile()
    return fused


def proxied(model: nn.Module) -> fx.GraphModule:
    """A graph as in compilers of torch: ATen ops, with numbered constants as weights."""
    return make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs())


KINDS: dict[str, tuple[Callable[[nn.Module], Any], set[str]]] = {
    "module": (lambda model: model, SITES),
    "symbolic": (fx.symbolic_trace, SITES),
    "functional": (functional, SITES),
    "export": (lambda model: exported(model).module(), SITES),
    "unflattened": (lambda model: torch.export.unflatten(exported(model)), SITES),
    "program": (exported, SITES),
    "make_fx": (proxied, {"_param_constant0", "_param_constant3", "_param_constant4"}),
    "fused": (simplified, SITES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models(kind: str) -> None:
    """Each kind of the same model has the same sites and outputs, and the folded weights after the release."""
    make, sites = KINDS[kind]
    eager = net().requires_grad_(False)
    cascade = lx.adapt(make(net()), inputs(), spec=SPEC)
    assert {site.weight for site in cascade.sites} == sites
    assert not cascade.refusals
    assert cascade.unreached == ()
    exact = kind not in ("fused", "make_fx")
    calls = [inputs(), inputs(3), inputs(2, length=8)]
    for call in calls:
        expected = run(eager, (call, {}))
        if kind == "fused":
            expected = run(simplified(net()), (call, {}))
        assert_same(tuple(run(cascade, (call, {}))), expected, 0.0 if exact else 1e-14)
    randomize(cascade, size=0.1)
    by_kind = {site.kind: site for site in cascade.sites}
    twin = simplified(net()) if kind == "fused" else net()
    with torch.no_grad():
        for site_kind, layer in (("conv", twin.conv), ("embedding", twin.table), ("linear", twin.body)):
            branch = branches(cascade)[by_kind[site_kind].weight]
            layer.weight += (branch.lora_B @ branch.lora_A * branch.scale).view_as(layer.weight)
    for call in calls:
        assert_same(tuple(run(cascade, (call, {}))), run(twin, (call, {})), 1e-12)
    loss_of(tuple(cascade(*calls[0]))).backward()
    assert all(value.grad is not None and value.grad.any() for value in cascade.branches.parameters())
    cascade.zero_grad(set_to_none=True)
    with cascade.weights("slow"):
        expected = run(cascade.model, (calls[0], {}))
    cascade.transition(None)
    with cascade.weights("slow"):
        after = run(cascade.model, (calls[0], {}))
    assert float((after[0] - expected[0]).abs().max()) > 1e-3
    assert_same(run(cascade.release(), (calls[0], {})), after, 1e-13)


@pytest.mark.parametrize("wrap", ["compile", "compile_in_place", "wrapped"])
def test_wrapped_models(wrap: str) -> None:
    """The wrapper of torch.compile, and other wrappers, are modules."""
    model, call = net(), inputs()
    expected = run(net(), (call, {}))
    if wrap == "compile":
        model = torch.compile(model, backend="eager")
    elif wrap == "compile_in_place":
        model.compile(backend="eager")
    else:
        model = nn.DataParallel(model)
    cascade = lx.adapt(model, call, spec=SPEC)
    assert len(cascade.sites) == 3
    assert_same(run(cascade, (call, {})), expected)
    randomize(cascade, size=0.1)
    loss_of(cascade(*call)).backward()
    assert all(value.grad.any() for value in cascade.branches.parameters())


RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x, None, 2 * x),
    "list": lambda x: [x, [2 * x]],
    "dict": lambda x: {"a": x, "b": {"c": 2 * x}},
    "defaultdict": lambda x: collections.defaultdict(list, {"a": [x]}),
    "named": lambda x: Pair(x, None),
    "dataclass": lambda x: Result(x, [2 * x]),
    "model_output": lambda x: BaseModelOutput(last_hidden_state=x, hidden_states=(x, 2 * x)),
    "numbers": lambda x: (x, 3, "text", 2.5, True),
    "list_of_dicts": lambda x: [{"boxes": x, "labels": x.argmax(-1)}, {"boxes": 2 * x, "labels": x.argmin(-1)}],
}


class Returns(nn.Module):
    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.result = nn.Linear(5, 3), result

    def forward(self, x: Tensor) -> Any:
        return self.result(torch.tanh(self.body(x)))


def shown(output: Any) -> str:
    """Containers, keys, order and values of an output, as text without the names of autograd's functions."""
    return re.sub(r",\s+grad_fn=<\w+>", "", repr(output))


@pytest.mark.parametrize("frontend", ["auto", "eager"])
@pytest.mark.parametrize("name", RESULTS)
def test_outputs_have_the_types_of_the_model(name: str, frontend: str) -> None:
    seed(0)
    model = Returns(RESULTS[name]).double()
    eager, x = copy.deepcopy(model), torch.randn(4, 5, dtype=torch.float64)
    cascade = lx.adapt(model, (x,), spec=SPEC, frontend=frontend)
    for batch in (x, x[:1]):
        output, expected = cascade(batch), eager(batch)
        assert_same(output, expected)
        assert shown(output) == shown(expected)
    randomize(cascade, size=0.1)
    expected, _ = by_formula(cascade, eager, ((x,), {}))
    assert_same(cascade(x), expected, 1e-12)
