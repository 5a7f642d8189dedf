"""Models with quantized weights or layers: branches train beside them, and a fold needs to know how to treat them."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch import METHODS
from lorasc_fx.quantized import LIBRARIES, TENSORS, Library, QuantizedLinear, library_of
from tests.kit.errors import raises, warns
from tests.kit.models import loss_of, train
from tests.quantized.layers import LAYERS, WEIGHTS, Packed, is_missing

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5)


class Net(nn.Module):
    """Two layers to quantize, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.down(torch.tanh(self.up(x)))))


MISSING = {name: pytest.mark.skipif(is_missing(name) != "", reason=f"{is_missing(name)} is missing") for name in LAYERS}
WRAPPED_LAYERS = pytest.mark.parametrize("case", [pytest.param(name, marks=MISSING[name]) for name in LAYERS])
TENSOR_WEIGHTS = pytest.mark.parametrize("case", WEIGHTS)
ALL = pytest.mark.parametrize("case", [*WEIGHTS, *(pytest.param(name, marks=MISSING[name]) for name in LAYERS)])
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:.*register_constant"),
]


def quantize(model: nn.Module, case: str) -> None:
    for name in ("up", "down"):
        setattr(model, name, {**LAYERS, **WEIGHTS}[case](model.get_submodule(name)).eval())  # type: ignore[arg-type]


def net(case: str, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = Net().eval()
    quantize(model, case)
    return model


def dequantized(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the layers, dequantized by their library."""
    weights = {}
    for name in ("up", "down"):
        layer = model.get_submodule(name)
        row = library_of(layer)
        weight = row.dequantize(layer) if row is not None else layer.weight.dequantize()  # type: ignore[operator, union-attr]
        weights[f"{name}.weight"] = weight.detach()
    return weights


def dense(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of a dense model that computes the same."""
    biases = {f"{name}.bias": getattr(model, name).bias.detach() for name in ("up", "down")}
    others = {name: value for name, value in model.state_dict().items() if name.startswith(("norm.", "head."))}
    return {**others, **biases, **dequantized(model)}


def types(model: nn.Module) -> list[type]:
    return [type(child) for child in model.children()]


def inputs() -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(2))


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the model as dense tensors."""
    return {
        name: value.dequantize() if type(value) is not nn.Parameter else value.detach().clone()
        for name, value in model.named_parameters()
    }


def delta(cascade: lx.Cascade, site: lx.Site) -> torch.Tensor:
    branch = cascade.branches[site.key]
    return 1.5 * (branch.lora_B @ branch.lora_A).detach()


def trained(cascade: lx.Cascade, stages: int = 2) -> dict[str, torch.Tensor]:
    """Train, and return the slow weights by the formula."""
    slow = numbers(cascade.model)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    for _ in cascade.stages(stages, optimizer):
        train(cascade, optimizer, [inputs()] * 3)
        for site in cascade.sites:
            slow[site.weight] = slow[site.weight] + SPEC.pace * delta(cascade, site)
    return slow


def plain(values: dict[str, torch.Tensor]) -> nn.Module:
    model = Net().eval()
    model.load_state_dict(values)
    return model


@TENSOR_WEIGHTS
def test_a_cascade_is_moved_and_cast(case: str) -> None:
    """torch swaps such a parameter with the new one, and refuses this if a weak reference to either exists."""
    model = net(case)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    trained(cascade, 1)
    before, expected = dict(model.named_parameters()), cascade(inputs())
    with cascade.weights("slow"):
        assert type(model.up.weight) is nn.Parameter
    cascade.to("cpu")
    assert all(before[name] is value for name, value in model.named_parameters())
    plain, x = net(case).to(torch.bfloat16), inputs().bfloat16()
    cascade.to(torch.bfloat16)
    with raises(lx.StateError, "already-adapted"):
        lx.adapt(model, (x,), spec=SPEC)
    with cascade.weights("base"):
        for name, value in plain.named_parameters():
            assert torch.equal(value.dequantize(), model.get_parameter(name).dequantize())
    if case != "torchao fp8":  # torchao refuses its product in another dtype
        torch.testing.assert_close(cascade(x).float(), expected, rtol=0, atol=0.05)


@TENSOR_WEIGHTS
def test_an_export_dequantizes_only_if_asked(case: str, tmp_path: Path) -> None:
    model = net(case)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    file = tmp_path / "dense.safetensors"
    with raises(lx.StateError, "not-serializable", "up.weight", "quantized='dequantize'"):
        lx.export.safetensors(cascade, file)
    start = numbers(model)
    lx.export.safetensors(cascade, file, quantized="dequantize")
    torch.testing.assert_close(load_file(file), start, rtol=0, atol=0)  # without a training as well
    slow = trained(cascade)
    for base in (None, file):
        with raises(lx.StateError, "quantized-not-supported", "export.safetensors", "up.weight", "dequantize"):
            lx.export.safetensors(cascade, tmp_path / "other.safetensors", base=base)
    with raises(lx.SpecError, "conflicting-options", "base"):
        lx.export.safetensors(cascade, tmp_path / "other.safetensors", base=file, quantized="dequantize")
    with raises(lx.SpecError, "invalid-value", "requantize"):
        lx.export.safetensors(cascade, tmp_path / "other.safetensors", quantized="requantize")  # type: ignore[arg-type]
    lx.export.safetensors(cascade, tmp_path / "folder", quantized="dequantize")
    torch.testing.assert_close(load_file(tmp_path / "folder" / "model.safetensors"), slow, rtol=0, atol=1e-6)
    with raises(lx.SpecError, "invalid-value", "quantized", "round"):
        cascade.release(quantized="round")  # type: ignore[arg-type]


@TENSOR_WEIGHTS
def test_a_bank_serves_adapters_on_a_quantized_base(case: str, tmp_path: Path) -> None:
    expected = {None: net(case)(inputs())}
    bank = lx.AdapterBank(net(case), args=(inputs(),), targets=("linear",))
    before = numbers(bank.model)
    for seed in (1, 2):
        cascade = lx.adapt(net(case), (inputs(),), spec=replace(SPEC, seed=seed))
        slow = trained(cascade)
        lx.save(cascade, tmp_path / str(seed))
        bank.add(str(seed), tmp_path / str(seed))
        expected[str(seed)] = plain(slow)(inputs())
    names = ["1", None, "2", "2", None, "1"]
    with torch.no_grad():
        mixed = bank(inputs(), adapter=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], expected[name][row], rtol=0, atol=2e-5)
            torch.testing.assert_close(bank(inputs(), adapter=name), expected[name], rtol=0, atol=2e-5)
    assert all(torch.equal(value, before[name]) for name, value in numbers(bank.model).items())


@pytest.mark.parametrize(
    ("options", "names"),
    [({"start": "pissa"}, ("start", "pissa")), ({"noise": lx.Noise(0.1)}, ("noise.strength", "0.1"))],
)
def test_quantized_weights_refuse_starts_and_noise(options: dict[str, Any], names: tuple[str, ...]) -> None:
    model = net("torchao int8")
    before, flags = numbers(model), [value.requires_grad for value in model.parameters()]
    with raises(lx.SpecError, "quantized-not-supported", *names, "up.weight"):
        lx.adapt(model, (inputs(),), spec=lx.CascadeSpec(**options))
    assert all(torch.equal(value, before[name]) for name, value in numbers(model).items())
    assert [value.requires_grad for value in model.parameters()] == flags
    lx.adapt(model, (inputs(),), spec=lx.CascadeSpec(exclude=("up", "down"), **options)).release()


def ranks(cascade: lx.Cascade) -> dict[str, int]:
    pairs = {site.weight: cascade.branches[site.key].unmerged_A for site in cascade.sites}
    return {name: 0 if a is None else len(a) for name, a in pairs.items()}


@pytest.mark.parametrize("options", [{}, {"restart": "fast"}, {"average": True}], ids=str)
def test_ranks_beyond_the_matrix_are_dropped_without_loss(options: dict[str, Any]) -> None:
    model = net("torchao int8")
    spec = lx.CascadeSpec(rank=8, lora_alpha=12.0, pace=0.5, exclude=("head",), **options)
    cascade = lx.adapt(model, (inputs(),), spec=spec)
    fast = slow = start = numbers(model)
    ends = []
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    for _ in cascade.stages(5, optimizer):
        train(cascade, optimizer, [inputs()] * 2)
        moved = {site.weight: delta(cascade, site) for site in cascade.sites}
        fast = {name: value + moved.get(name, 0) for name, value in start.items()}
        slow = {name: slow[name] + 0.5 * (fast[name] - slow[name]) for name in slow}
        start = fast if options.get("restart") == "fast" else slow
        ends.append(slow)
    assert ranks(cascade)["down.weight"] == 16  # of 40
    assert ranks(cascade)["up.weight"] == 32
    with cascade.weights("slow"):
        torch.testing.assert_close(model(inputs()), plain(slow)(inputs()), rtol=0, atol=2e-5)
    if options.get("average"):
        mean = {name: torch.stack([end[name] for end in ends]).mean(0) for name in slow}
        with cascade.weights("averaged"):
            torch.testing.assert_close(model(inputs()), plain(mean)(inputs()), rtol=0, atol=2e-5)


@TENSOR_WEIGHTS
def test_kept_factors_beside_a_quantized_weight(case: str) -> None:
    """A stage without a restart changes neither the outputs nor the quantized weight."""
    spec = lx.CascadeSpec(rank=4, lora_alpha=6.0, pace=0.5, restart_factors="none", exclude=("head",))
    model = net(case)
    slow, cascade = numbers(model), lx.adapt(model, (inputs(),), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    for _ in range(3):
        torch.testing.assert_close(cascade(inputs()), plain(slow)(inputs()), rtol=0, atol=2e-5)
        residual = {site.weight: slow[site.weight] - delta(cascade, site) for site in cascade.sites}
        train(cascade, optimizer, [inputs()])
        for site in cascade.sites:
            fast = residual[site.weight] + delta(cascade, site)
            slow[site.weight] = slow[site.weight] + 0.5 * (fast - slow[site.weight])
        cascade.transition(optimizer)
        assert all(bool(branch.lora_B.any()) for branch in cascade.branches.values())


@pytest.mark.parametrize("adapter", [name for name in METHODS if name != "lora"])
def test_other_methods_beside_a_quantized_weight(adapter: str) -> None:
    model, spec = net("torchao int8"), lx.CascadeSpec(adapter=adapter, rank=2, pace=0.5)
    if not METHODS[adapter].beside_quantized:
        with raises(lx.SpecError, "method-not-supported", adapter, "up.weight", "quantized"):
            lx.adapt(model, (inputs(),), spec=spec)
        return
    slow, cascade = numbers(model), lx.adapt(model, (inputs(),), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    for _ in cascade.stages(2, optimizer):
        train(cascade, optimizer, [inputs()] * 3)
        for site in cascade.sites:
            branch: Any = cascade.branches[site.key]
            slow[site.weight] = slow[site.weight] + 0.5 * branch.dense_delta(slow[site.weight]).detach()
    expected = plain(slow)(inputs())
    torch.testing.assert_close(cascade.eval()(inputs()), expected, rtol=1e-4, atol=1e-5)


@ALL
@pytest.mark.parametrize("frontend", ["export", "eager"])
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
    start = dense(net(case))
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


@ALL
@pytest.mark.parametrize("quantized", ["dequantize", "requantize"])
def test_a_fold_is_dense_or_requantized(case: str, quantized: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The log says how far training and rounding moved each weight that was quantized again.

    For a weight of torchao, "requantize" keeps the old scales, so a function quantizes it like a new one.
    """
    model = net(case)
    before, kind = types(model), type(model.up.weight) if case in WEIGHTS else None  # type: ignore[union-attr]
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    slow = {**dense(net(case)), **trained(cascade)}
    for call in (cascade.release, cascade.folded_state_dict, cascade.folded_graph):
        with raises(lx.StateError, "quantized-not-supported", call.__name__, "up.weight", "requantize"):
            call()
    torch.testing.assert_close(cascade.folded_state_dict(quantized="dequantize"), slow, rtol=0, atol=1e-6)
    expected = plain(slow)(inputs())
    torch.testing.assert_close(cascade.folded_graph(quantized="dequantize")(inputs()), expected, rtol=0, atol=2e-5)
    rounds = quantized == "requantize" and case in ("torchao int4", "torchao nvfp4")
    expected_warning = warns("change-rounded-away", "weight") if rounds else contextlib.nullcontext()
    with caplog.at_level(logging.INFO, logger="lorasc_fx"), expected_warning:
        how = WEIGHTS.get(case, quantized) if quantized == "requantize" else quantized
        assert cascade.release(quantized=how) is model
    if quantized == "dequantize":
        assert types(model) == [nn.Linear, nn.Linear, nn.LayerNorm, nn.Linear]
        assert all(type(value) is nn.Parameter for value in model.parameters())
        torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=2e-5)
        return
    assert types(model) == before
    assert case not in WEIGHTS or type(model.up.weight) is kind  # type: ignore[union-attr]
    assert caplog.text.count("was quantized again") == 2
    again = Net()
    again.load_state_dict(slow)
    quantize(again, case)
    for name, value in dequantized(again).items():  # a number on the border of two steps may fall to either side
        assert ((value - dequantized(model)[name]).abs() > 1e-6).float().mean() < 0.01


def test_a_weight_of_a_class_without_a_row_is_not_requantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TENSORS, "torchao.quantization.Int8Tensor")
    model = net("torchao int8")
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    trained(cascade)
    before = cascade(inputs())
    for refused in ("requantize", lambda module: None):
        with raises(lx.StateError, "quantized-not-supported", "Linear"):
            cascade.release(quantized=refused)
        assert torch.equal(cascade(inputs()), before)


@ALL
def test_a_run_goes_on(case: str, tmp_path: Path) -> None:
    cascade = lx.adapt(net(case), (inputs(),), spec=SPEC)
    trained(cascade)
    lx.save(cascade, tmp_path)
    again = lx.load(tmp_path, net(case), (inputs(),))
    assert torch.equal(again(inputs()), cascade(inputs()))
    different = net(case, seed=4)
    before = types(different)
    with raises(lx.CheckpointError, "base-differs", "up"):
        lx.load(tmp_path, different, (inputs(),))
    assert types(different) == before


@WRAPPED_LAYERS
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


def test_a_failed_requantization_restores_earlier_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{Packed.__module__}.{Packed.__qualname__}"
    row, calls = LIBRARIES[name], list[torch.Tensor]()

    def fails(layer: Packed, weight: torch.Tensor) -> nn.Module:
        calls.append(weight)
        if len(calls) > 1:
            raise ValueError("no memory")
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
            assert re.search(rf"^\|{re.escape(case)}\|\d[^|]*\|(0\.\d+\|){{2}}\de-0\d\|", page, re.MULTILINE), case


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


@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer])
def test_a_wrapped_layer_is_loaded_cast_and_moved(kind: Any) -> None:
    layer, other, x = Packed(nn.Linear(8, 6)), Packed(nn.Linear(8, 6)), torch.randn(3, 8)
    del layer.bias
    layer.bias = kind(torch.zeros(6))
    wrapper = QuantizedLinear(layer)
    wrapper.load_state_dict(other.state_dict())
    assert torch.equal(wrapper(x), other(x))
    weight = wrapper.weight
    assert wrapper.to("cpu").weight is weight
    assert torch.equal(wrapper.bfloat16()(x.bfloat16()), other.bfloat16()(x.bfloat16()))
    assert wrapper.weight.dtype == torch.bfloat16
    assert wrapper.to("meta").weight.is_meta
    assert wrapper.bias is layer.bias
    assert wrapper.bias.is_meta


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
