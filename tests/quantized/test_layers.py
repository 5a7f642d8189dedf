"""Models with layers or weights quantized by a library: the product is unchanged, and the branch trains beside it."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorasc_fx as lx
from lorasc_fx.quantized import LIBRARIES, Library, QuantizedLinear, library_of
from tests.kit.errors import raises, warns
from tests.kit.models import loss_of
from tests.quantized.layers import FIXED, LAYERS, WEIGHTS, Packed, is_missing
from tests.quantized.test_quantized import SPEC, Net, delta, inputs, plain, trained

MISSING = {name: pytest.mark.skipif(is_missing(name) != "", reason=f"{is_missing(name)} is missing") for name in LAYERS}
CASES = pytest.mark.parametrize("case", [pytest.param(name, marks=MISSING[name]) for name in LAYERS])
ALL = pytest.mark.parametrize("case", [*WEIGHTS, *(pytest.param(name, marks=MISSING[name]) for name in LAYERS)])
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:.*register_constant"),
]


def net(case: str, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = Net().eval()
    for name in ("up", "down"):
        setattr(model, name, {**LAYERS, **WEIGHTS}[case](model.get_submodule(name)).eval())  # type: ignore[arg-type]
    return model


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the layers, dequantized by their library."""
    found = {}
    for name in ("up", "down"):
        layer = model.get_submodule(name)
        row = library_of(layer)
        weight = row.dequantize(layer) if row is not None else layer.weight.dequantize()  # type: ignore[operator, union-attr]
        found[f"{name}.weight"] = weight.detach()
    return found


def dense(case: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a dense model that computes the same as the model of the case."""
    model = net(case)
    biases = {f"{name}.bias": getattr(model, name).bias.detach() for name in ("up", "down")}
    others = {name: value for name, value in model.state_dict().items() if name.startswith(("norm.", "head."))}
    return {**others, **biases, **numbers(model)}


def types(model: nn.Module) -> list[type]:
    return [type(child) for child in model.children()]


@ALL
@pytest.mark.parametrize("frontend", ["export", "dynamo", "symbolic", "graph-breaks"])
def test_branches_train_beside_layers(case: str, frontend: str) -> None:
    model, eager = net(case).train(), net(case).train()
    layers = list(model.children())
    cascade = lx.adapt(model, (inputs(),), spec=SPEC, frontend=frontend)
    assert {site.weight for site in cascade.sites} == {"up.weight", "down.weight", "head.weight"}
    assert not cascade.refusals
    assert all(factor.grad is None for factor in cascade.branches.parameters())
    assert torch.equal(cascade(inputs()), eager(inputs()))
    with torch.no_grad():
        for branch in cascade.branches.values():
            branch.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    start = dense(case)
    merged = plain({**start, **{site.weight: start[site.weight] + delta(cascade, site) for site in cascade.sites}})
    torch.testing.assert_close(cascade(inputs()), merged(inputs()), rtol=0, atol=2e-5)
    loss_of(cascade(inputs())).backward()
    loss_of(merged(inputs())).backward()
    for site in cascade.sites:  # dL/dB = s dL/dW A^T, through the products of the layers behind it
        branch = cascade.branches[site.key]
        gradient = merged.get_parameter(site.weight).grad
        assert gradient is not None
        torch.testing.assert_close(branch.lora_B.grad, 1.5 * gradient @ branch.lora_A.t(), rtol=1e-4, atol=1e-6)
    cascade.zero_grad()
    with torch.no_grad():
        for branch in cascade.branches.values():
            branch.lora_B.zero_()
    slow = plain({**start, **trained(cascade)}).train()(inputs())
    torch.testing.assert_close(cascade(inputs()), slow, rtol=0, atol=2e-5)
    with cascade.weights("slow"):
        torch.testing.assert_close(model(inputs()), slow, rtol=0, atol=2e-5)
    with cascade.weights("base"):
        assert torch.equal(model(inputs()), eager(inputs()))
    again = lx.adapt(eager, (inputs(),), spec=SPEC, frontend=frontend)
    again.release()
    assert types(eager) == [type(layer) for layer in layers]


@CASES
def test_a_fold_is_dense_or_requantized(case: str, caplog: pytest.LogCaptureFixture) -> None:
    model = net(case)
    before = types(model)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    slow = {**dense(case), **trained(cascade)}
    for call in (cascade.release, cascade.folded_state_dict, cascade.folded_graph):
        with raises(lx.StateError, "quantized-not-supported", call.__name__, "up.weight", "requantize"):
            call()
    state = cascade.folded_state_dict(quantized="dequantize")
    for name, value in slow.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6)
    expected = plain(state)(inputs())  # strict: no entry of the layer is left
    torch.testing.assert_close(cascade.folded_graph(quantized="dequantize")(inputs()), expected, rtol=0, atol=2e-5)
    with caplog.at_level(logging.INFO, logger="lorasc_fx"):
        assert cascade.release(quantized="requantize") is model
    assert types(model) == before
    assert caplog.text.count(f"of {before[0].__name__} was quantized again as {before[0].__name__}") == 2
    again = Net()
    again.load_state_dict(slow)
    for name in ("up", "down"):
        setattr(again, name, LAYERS[case](again.get_submodule(name)).eval())  # type: ignore[arg-type]
    for name, value in numbers(again).items():  # a number on the border of two steps may fall to either side
        assert ((value - numbers(model)[name]).abs() > 1e-6).float().mean() < 0.01


@ALL
def test_a_dense_release_has_linear_layers(case: str) -> None:
    model = net(case)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    slow = {**dense(case), **trained(cascade)}
    cascade.release(quantized="dequantize")
    assert types(model) == [nn.Linear, nn.Linear, nn.LayerNorm, nn.Linear]
    torch.testing.assert_close(model(inputs()), plain(slow)(inputs()), rtol=0, atol=2e-5)
    plain(dict(model.state_dict()))


@ALL
def test_a_run_goes_on(case: str, tmp_path: Path) -> None:
    cascade = lx.adapt(net(case), (inputs(),), spec=SPEC)
    trained(cascade)
    lx.save(cascade, tmp_path)
    again = lx.load(tmp_path, net(case), (inputs(),))
    assert torch.equal(again(inputs()), cascade(inputs()))
    other = net(case, seed=4)
    before = types(other)
    with raises(lx.CheckpointError, "base-differs", "up"):
        lx.load(tmp_path, other, (inputs(),))
    assert types(other) == before


@CASES
def test_the_model_saves_what_the_layers_save(case: str) -> None:
    model, twin = net(case), net(case)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    saved, expected = model.state_dict(), twin.state_dict()
    assert list(saved) == list(expected)
    assert all(torch.equal(saved[name], value) for name, value in expected.items() if isinstance(value, torch.Tensor))
    assert list(cascade.folded_state_dict()) == list(expected)  # nothing has trained


def test_training_mode_of_a_wrapped_layer() -> None:
    model = net("packed")
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    for mode in (True, False):
        cascade.train(mode)
        assert torch.equal(cascade(inputs()), net("packed").train(mode)(inputs()))
    assert not torch.equal(net("packed").train()(inputs()), net("packed").eval()(inputs()))
    layer = model.up.layer  # type: ignore[union-attr]
    cascade.release()
    assert model.up is layer
    assert not layer.training


def test_errors_leave_the_layers_in_the_model() -> None:
    model = net("packed")
    layers = list(model.children())
    with pytest.raises(lx.LorascError):
        lx.adapt(model, (torch.randn(2, 7),), spec=SPEC)
    assert list(model.children()) == layers
    with raises(lx.SpecError, "quantized-not-supported", "pissa", "up.weight"):
        lx.adapt(model, (inputs(),), spec=lx.CascadeSpec(start="pissa"))
    assert list(model.children()) == layers


def test_an_unknown_layer_is_not_requantized(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{Packed.__module__}.{Packed.__qualname__}"
    row = LIBRARIES[name]
    monkeypatch.setitem(LIBRARIES, name, Library(row.holds, row.dequantize))
    model = net("packed")
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    trained(cascade)
    before = cascade(inputs())
    with raises(lx.StateError, "quantized-not-supported", "Packed"):
        cascade.release(quantized="requantize")
    assert torch.equal(cascade(inputs()), before)
    assert isinstance(model.up, QuantizedLinear)
    assert model.up.holds_layer
    cascade.release(quantized="dequantize")


def test_a_failed_requantization_restores_earlier_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{Packed.__module__}.{Packed.__qualname__}"
    row, calls = LIBRARIES[name], list[torch.Tensor]()

    def fails(layer: Packed, weight: torch.Tensor) -> nn.Module:
        calls.append(weight)
        if len(calls) > 1:
            raise ValueError("no memory")
        assert row.requantize is not None
        return row.requantize(layer, weight)

    monkeypatch.setitem(LIBRARIES, name, Library(row.holds, row.dequantize, fails))
    cascade = lx.adapt(net("packed"), (inputs(),), spec=SPEC)
    trained(cascade)
    before = cascade(inputs())
    with pytest.raises(ValueError, match="no memory"):
        cascade.release(quantized="requantize")
    assert torch.equal(cascade(inputs()), before)
    with cascade.weights("base"):
        assert torch.equal(cascade.model(inputs()), net("packed")(inputs()))


def test_one_layer_at_two_places_is_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = Packed(nn.Linear(8, 8))
            self.second, self.head = self.first, nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    x, model = torch.randn(4, 8), Twice()
    layer = model.first
    cascade = lx.adapt(model, (x,), spec=SPEC)
    assert [site.weight for site in cascade.sites] == ["first.weight", "head.weight"]
    assert torch.equal(cascade(x), Twice()(x))
    loss_of(cascade(x)).backward()
    cascade.zero_grad()
    cascade.release()
    assert model.first is model.second is layer


def test_the_page_has_a_row_of_each_case() -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantized.md").read_text()
    for case in [*LAYERS, *WEIGHTS]:
        if case != "packed":
            assert re.search(rf"^\| {re.escape(case)} \| \d\S* \| (0\.\d+ \| ){{2}}\de-0\d \|", page, re.MULTILINE), (
                case
            )


class Foreign(nn.Module):
    """A layer of an unknown library, with packed values in a buffer, like the layers of GPTQ and AWQ."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = Packed(linear)
        self.bias, self.scales = linear.bias, packed.scale
        self.qweight = nn.Buffer(packed.numbers.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.qweight.to(x.dtype) * self.scales, self.bias)


def test_quantized_weights_without_branches_are_named() -> None:
    model = net("packed")
    model.up = Foreign(Net().up)
    with warns("quantized-left-out", "up.qweight", "Foreign", "Linear4bit"):
        lx.adapt(model, (inputs(),), spec=SPEC).release()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lx.adapt(model, (inputs(),), spec=lx.CascadeSpec(rank=2, exclude=("up",))).release()


def test_a_quantized_weight_that_is_read_in_another_way_is_named() -> None:
    class Looked(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.up.weight[0, :1].float()

    torch.manual_seed(3)
    model = Looked().eval()
    model.up = Packed(model.up)  # type: ignore[assignment]
    with warns("quantized-left-out", "up.weight"):
        cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    assert {site.weight for site in cascade.sites} == {"down.weight", "head.weight"}
    assert [(refusal.weight, refusal.reason) for refusal in cascade.refusals] == [
        ("up.weight", lx.plan.Reason.QUANTIZED)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dense_weight_of_another_dtype_computes_as_the_layer_does(dtype: torch.dtype) -> None:
    """Layers cast their input to their dtype and their output back. So does the dense weight that replaces theirs."""
    linear = nn.Linear(8, 6).to(dtype)
    placed, x = QuantizedLinear(Packed(linear)), torch.randn(3, 8)
    placed._parameters["weight"] = nn.Parameter(placed.weight.dequantize())
    assert placed.weight.dtype == dtype
    assert placed(x).dtype == x.dtype
    expected = F.linear(x.to(dtype), placed.weight, linear.bias).to(x.dtype)
    assert torch.equal(placed(x), expected)


@pytest.mark.parametrize("case", FIXED)
def test_layers_that_cannot_be_requantized(case: str) -> None:
    """For GPTQ and AWQ, the branch trains beside the product of the layer, and the folded weight is dense."""
    if is_missing(case):
        pytest.skip(f"{is_missing(case)} is missing")
    torch.manual_seed(3)
    dtype, close = (torch.float16, 2e-3) if case.startswith("awq") else (torch.float32, 2e-5)
    plain = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 5)).to(dtype)
    x = torch.randn(6, 64).to(dtype)
    model = copy.deepcopy(plain)
    model[0] = FIXED[case](model[0])  # type: ignore[arg-type]
    row = library_of(model[0])
    assert row is not None
    start, slow = model(x), row.dequantize(model[0]).detach().float()
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(targets=("0.weight",), rank=2, lora_alpha=3.0, pace=1.0))
    assert torch.equal(cascade(x), start)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    for _ in cascade.stages(2, optimizer):
        for _ in range(3):
            loss_of(cascade(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
        branch = cascade.branches[cascade.sites[0].key]
        slow = slow + 1.5 * (branch.lora_B @ branch.lora_A).detach()
    with raises(lx.StateError, "quantized-not-supported", type(model.get_submodule("0").layer).__name__):
        cascade.release(quantized="requantize")
    with torch.no_grad():
        plain[0].weight.copy_(slow)
    torch.testing.assert_close(cascade(x), plain(x), rtol=0, atol=close)
    cascade.release(quantized="dequantize")
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=close)
    assert type(model[0]) is nn.Linear
