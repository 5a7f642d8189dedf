"""torch.compile of a cascade gives one graph without a break, which trains like the eager cascade in every stage."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import train

STAGES, STEPS = 3, 2
TOKENS = torch.randint(0, 11, (6, 4), generator=torch.Generator().manual_seed(7))
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Mixed(nn.Module):
    """An embedding, linears that share an input, a grouped and a plain convolution, and stacked matrices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.table = nn.Embedding(11, 10)
        self.left, self.right = nn.Linear(10, 8), nn.Linear(10, 8)
        self.grouped = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.plain = nn.Conv1d(12, 8, 1)
        self.experts = nn.Parameter(torch.randn(2, 5, 8) * 0.3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        y = torch.tanh(self.left(x)) * self.right(x)
        y = self.plain(torch.relu(self.grouped(y.transpose(1, 2)))).mean(-1)
        return torch.bmm(y.expand(2, -1, -1), self.experts.transpose(1, 2)).sum(0)


def trajectory(placement: str, compiled: dict[str, Any] | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of all steps, and the slow weights at the end."""
    spec = lx.CascadeSpec(
        rank=2, lora_alpha=4.0, pace=0.5, noise=lx.Noise(0.1), placement=placement, train=("plain.bias",)
    )
    cascade = lx.adapt(Mixed().double(), (TOKENS,), spec=spec)
    assert len(cascade.sites) == 6
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    call = cascade if compiled is None else torch.compile(cascade, fullgraph=True, **compiled)
    losses = []
    for _ in cascade.stages(STAGES, optimizer):
        losses += train(call, optimizer, [TOKENS] * STEPS).tolist()
    return losses, cascade.folded_state_dict()


def checked(graph: fx.GraphModule, _: Any) -> Any:
    """A backend that rejects `alpha` in adds, because inductor drops it if it fuses a product into the add."""
    assert not any("alpha" in node.kwargs for node in graph.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    return make_boxed_func(graph.forward)


def holds(placement: str, backend: Any) -> None:
    expected, weights = trajectory(placement, None)
    losses, compiled = trajectory(placement, {"backend": backend})
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert len(set(expected)) == STAGES * STEPS
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(compiled, weights, rtol=1e-8, atol=1e-8)  # AdamW divides by small numbers
    assert not torch.equal(weights["left.weight"], Mixed().double().left.weight)


@pytest.mark.parametrize("placement", [pytest.param("beside", marks=pytest.mark.slow), "weight"])
def test_a_compiled_cascade_trains_as_the_eager_one(placement: str) -> None:
    holds(placement, aot_autograd(fw_compiler=checked))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's imports
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("placement", ["beside", "merged"])
def test_inductor_trains_as_eager_does(placement: str) -> None:
    holds(placement, "inductor")


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.settings = nn.Linear(5, 3), {"tau": 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / self.settings["tau"]


def test_a_compiled_cascade_sees_changed_state() -> None:
    """Dynamo guards the Python state of the model. After a change, the call raises because there is no graph for it."""
    model, x = Tempered(), torch.randn(4, 5)
    cascade = lx.adapt(model, (x,))
    compiled = torch.compile(cascade, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x))
    changes: list[Any] = [
        lambda: model.settings.update(tau=0.5),
        lambda: model.layer.register_forward_hook(lambda module, args, output: output + 1),
    ]
    for change in changes:
        change()
        with pytest.raises(Exception, match="with the same settings of the model"):
            compiled(x)
        assert torch.allclose(cascade(x), model(x))
        assert torch.allclose(compiled(x), model(x))


@pytest.mark.parametrize("options", [{}, {"adapter": "dora", "exclude": ("experts", "table")}, {"train_A": False}])
def test_a_traced_cascade_trains_as_the_cascade(options: dict[str, Any]) -> None:
    cascade = lx.adapt(Mixed(), (TOKENS,), spec=lx.CascadeSpec(rank=2, **options))
    factors = {name: parameter for name, parameter in cascade.named_parameters() if ".lora_" in name}
    assert len(factors) == len(cascade.sites) * (3 if "adapter" in options else 2)
    with torch.no_grad():
        for factor in factors.values():
            factor.add_(torch.randn_like(factor), alpha=0.1)
    traced = torch.export.export(cascade, (TOKENS,)).module()
    theirs = dict(traced.named_parameters())
    trainable = {name: factor for name, factor in factors.items() if factor.requires_grad}
    outputs = cascade(TOKENS), traced(TOKENS)
    expected = (outputs[0], *torch.autograd.grad(outputs[0].square().sum(), trainable.values()))
    computed = (outputs[1], *torch.autograd.grad(outputs[1].square().sum(), [theirs[name] for name in trainable]))
    for actual, right in zip(computed, expected, strict=True):
        assert (actual - right).norm() <= 1e-5 * right.norm()


def test_torch_fx_cannot_trace_a_cascade() -> None:
    cascade = lx.adapt(nn.Linear(3, 2), (torch.randn(2, 3),))
    with raises(lx.CaptureError, "not-available", "folded_graph"):
        fx.symbolic_trace(cascade)
    assert isinstance(fx.symbolic_trace(cascade.folded_graph()), fx.GraphModule)
