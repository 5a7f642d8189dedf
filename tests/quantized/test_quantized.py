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
import torchao.quantization as torchao
from safetensors.torch import load_file
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch import METHODS
from lorasc_fx.quantized import LIBRARIES, TENSORS, Library, QuantizedLinear, library_of
from tests.kit.errors import raises, warns
from tests.kit.models import loss_of, train
from tests.quantized.layers import CONFIGS, LAYERS, WEIGHTS, Packed, is_missing

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5)
BOTH = pytest.mark.parametrize("width", CONFIGS)


class Net(nn.Module):
    """Two quantized layers, and a norm and a head that are not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.down(torch.tanh(self.up(x)))))


def quantize(module: nn.Module, width: str) -> None:
    torchao.quantize_(module, CONFIGS[width](), filter_fn=lambda each, name: type(each) is nn.Linear and name != "head")


def net(width: str) -> nn.Module:
    torch.manual_seed(3)
    model = Net().eval()
    quantize(model, width)
    return model


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


@BOTH
def test_a_cascade_is_moved_and_cast(width: str) -> None:
    """torch swaps such a parameter with the new one, and refuses this if a weak reference to either exists."""
    model = net(width)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    trained(cascade, 1)
    before, expected = dict(model.named_parameters()), cascade(inputs())
    with cascade.weights("slow"):
        assert type(model.up.weight) is nn.Parameter
    cascade.to("cpu")
    assert all(before[name] is value for name, value in model.named_parameters())
    plain, x = net(width).to(torch.bfloat16), inputs().bfloat16()
    cascade.to(torch.bfloat16)
    with raises(lx.StateError, "already-adapted"):
        lx.adapt(model, (x,), spec=SPEC)
    with cascade.weights("base"):
        for name, value in plain.named_parameters():
            assert torch.equal(value.dequantize(), model.get_parameter(name).dequantize())
    if width != "fp8":  # whose numbers torchao does not cast with the model: its product is refused, without us as well
        torch.testing.assert_close(cascade(x).float(), expected, rtol=0, atol=0.05)


@BOTH
def test_a_fold_refuses_unless_asked(width: str, tmp_path: Path) -> None:
    model = net(width)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    file = tmp_path / "dense.safetensors"
    with raises(lx.StateError, "not-serializable", "up.weight", "quantized='dequantize'"):
        lx.export.safetensors(cascade, file)
    start = numbers(model)
    lx.export.safetensors(cascade, file, quantized="dequantize")
    for name, value in load_file(file).items():
        assert torch.equal(value, start[name])  # without a training as well
    slow = trained(cascade)
    for base in (None, file):
        with raises(lx.StateError, "quantized-not-supported", "export.safetensors", "up.weight", "dequantize"):
            lx.export.safetensors(cascade, tmp_path / "other.safetensors", base=base)
    with raises(lx.SpecError, "conflicting-options", "base"):
        lx.export.safetensors(cascade, tmp_path / "other.safetensors", base=file, quantized="dequantize")
    with raises(lx.SpecError, "invalid-value", "requantize"):
        lx.export.safetensors(cascade, tmp_path / "other.safetensors", quantized="requantize")  # type: ignore[arg-type]
    lx.export.safetensors(cascade, tmp_path / "folder", quantized="dequantize")
    held = load_file(tmp_path / "folder" / "model.safetensors")
    assert {name: value.dtype for name, value in held.items()} == dict.fromkeys(slow, torch.float32)
    for name, value in held.items():
        torch.testing.assert_close(value, slow[name], rtol=0, atol=1e-6)
    for call in (cascade.release, cascade.folded_state_dict, cascade.folded_graph):
        with raises(lx.StateError, "quantized-not-supported", call.__name__, "up.weight"):
            call()
    with raises(lx.SpecError, "invalid-value", "quantized", "round"):
        cascade.release(quantized="round")  # type: ignore[arg-type]
    expected = plain(slow)(inputs())
    state = cascade.folded_state_dict(quantized="dequantize")
    for name, value in state.items():
        torch.testing.assert_close(value, slow[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(cascade.folded_graph(quantized="dequantize")(inputs()), expected, rtol=0, atol=2e-5)
    released = cascade.release(quantized="dequantize")
    assert released is model
    assert all(type(value) is nn.Parameter for value in model.parameters())
    torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=2e-5)


@BOTH
def test_requantize_on_request(width: str, caplog: pytest.LogCaptureFixture) -> None:
    """The log says how far training and rounding moved each weight, and the result is a weight of the library."""
    model = net(width)
    kind = type(model.up.weight)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    slow = trained(cascade)
    with raises(lx.StateError, "quantized-not-supported", "Linear"):
        cascade.release(quantized=lambda module: None)
    assert type(model.up.weight) is kind
    told = warns("change-rounded-away", "weight") if width in ("int4", "nvfp4") else contextlib.nullcontext()
    with caplog.at_level(logging.INFO, logger="lorasc_fx"), told:
        cascade.release(quantized=lambda module: quantize(module, width))
    assert caplog.text.count("was quantized again") == 2
    assert type(model.up.weight) is type(model.down.weight) is kind
    again = plain(slow)
    quantize(again, width)
    for name, value in numbers(model).items():  # a number on the border of two steps may fall to either side
        off = (value - numbers(again)[name]).abs() > 1e-6
        assert off.float().mean() < 0.01


@BOTH
def test_a_bank_serves_adapters_on_a_quantized_base(width: str, tmp_path: Path) -> None:
    expected = {None: net(width)(inputs())}
    bank = lx.AdapterBank(net(width), args=(inputs(),), targets=("linear",))
    before = numbers(bank.model)
    for seed in (1, 2):
        cascade = lx.adapt(net(width), (inputs(),), spec=replace(SPEC, seed=seed))
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


def test_release_of_an_untrained_cascade_keeps_the_weights() -> None:
    model = net("int8")
    before = dict(model.named_parameters())
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    cascade.release()
    assert all(value is before[name] for name, value in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "names"),
    [({"start": "pissa"}, ("start", "pissa")), ({"noise": lx.Noise(0.1)}, ("noise.strength", "0.1"))],
)
def test_quantized_weights_refuse_starts_and_noise(options: dict[str, Any], names: tuple[str, ...]) -> None:
    model = net("int8")
    held, flags = numbers(model), [value.requires_grad for value in model.parameters()]
    with raises(lx.SpecError, "quantized-not-supported", *names, "up.weight"):
        lx.adapt(model, (inputs(),), spec=lx.CascadeSpec(**options))
    assert all(torch.equal(value, held[name]) for name, value in numbers(model).items())
    assert [value.requires_grad for value in model.parameters()] == flags
    lx.adapt(model, (inputs(),), spec=lx.CascadeSpec(exclude=("up", "down"), **options)).release()


def ranks(cascade: lx.Cascade) -> dict[str, int]:
    pairs = {site.weight: cascade.branches[site.key].unmerged_A for site in cascade.sites}
    return {name: 0 if a is None else len(a) for name, a in pairs.items()}


@pytest.mark.parametrize("options", [{}, {"restart": "fast"}, {"average": True}], ids=str)
def test_ranks_beyond_the_matrix_are_dropped_without_loss(options: dict[str, Any]) -> None:
    model = net("int8")
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


@BOTH
def test_kept_factors_beside_a_quantized_weight(width: str) -> None:
    """A stage without a restart changes neither the outputs nor the quantized weight."""
    model, spec = (
        net(width),
        lx.CascadeSpec(rank=4, lora_alpha=6.0, pace=0.5, restart_factors="none", exclude=("head",)),
    )
    slow, cascade = numbers(model), lx.adapt(model, (inputs(),), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    for _ in range(3):
        torch.testing.assert_close(cascade(inputs()), plain(slow)(inputs()), rtol=0, atol=2e-5)
        held = {site.weight: slow[site.weight] - delta(cascade, site) for site in cascade.sites}
        train(cascade, optimizer, [inputs()])
        for site in cascade.sites:
            fast = held[site.weight] + delta(cascade, site)
            slow[site.weight] = slow[site.weight] + 0.5 * (fast - slow[site.weight])
        cascade.transition(optimizer)
        assert all(bool(branch.lora_B.any()) for branch in cascade.branches.values())


@pytest.mark.parametrize("adapter", [name for name in METHODS if name != "lora"])
def test_other_methods_beside_a_quantized_weight(adapter: str) -> None:
    model, spec = net("int8"), lx.CascadeSpec(adapter=adapter, rank=2, pace=0.5)
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


MISSING = {name: pytest.mark.skipif(is_missing(name) != "", reason=f"{is_missing(name)} is missing") for name in LAYERS}
CASES = pytest.mark.parametrize("case", [pytest.param(name, marks=MISSING[name]) for name in LAYERS])
ALL = pytest.mark.parametrize("case", [*WEIGHTS, *(pytest.param(name, marks=MISSING[name]) for name in LAYERS)])
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:.*register_constant"),
]


def layered_net(case: str, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = Net().eval()
    for name in ("up", "down"):
        setattr(model, name, {**LAYERS, **WEIGHTS}[case](model.get_submodule(name)).eval())  # type: ignore[arg-type]
    return model


def dequantized(model: nn.Module) -> dict[str, torch.Tensor]:
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
    model = layered_net(case)
    biases = {f"{name}.bias": getattr(model, name).bias.detach() for name in ("up", "down")}
    others = {name: value for name, value in model.state_dict().items() if name.startswith(("norm.", "head."))}
    return {**others, **biases, **dequantized(model)}


def types(model: nn.Module) -> list[type]:
    return [type(child) for child in model.children()]


@ALL
@pytest.mark.parametrize("frontend", ["export", "eager"])
def test_branches_train_beside_layers(case: str, frontend: str) -> None:
    model, eager = layered_net(case).train(), layered_net(case).train()
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
    model = layered_net(case)
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
    assert caplog.text.count("was quantized again") == 2
    again = Net()
    again.load_state_dict(slow)
    for name in ("up", "down"):
        setattr(again, name, LAYERS[case](again.get_submodule(name)).eval())  # type: ignore[arg-type]
    for name, value in dequantized(again).items():  # a number on the border of two steps may fall to either side
        assert ((value - dequantized(model)[name]).abs() > 1e-6).float().mean() < 0.01


@ALL
def test_a_dense_release_has_linear_layers(case: str) -> None:
    model = layered_net(case)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    slow = {**dense(case), **trained(cascade)}
    cascade.release(quantized="dequantize")
    assert types(model) == [nn.Linear, nn.Linear, nn.LayerNorm, nn.Linear]
    torch.testing.assert_close(model(inputs()), plain(slow)(inputs()), rtol=0, atol=2e-5)
    plain(dict(model.state_dict()))


@ALL
def test_a_run_goes_on(case: str, tmp_path: Path) -> None:
    cascade = lx.adapt(layered_net(case), (inputs(),), spec=SPEC)
    trained(cascade)
    lx.save(cascade, tmp_path)
    again = lx.load(tmp_path, layered_net(case), (inputs(),))
    assert torch.equal(again(inputs()), cascade(inputs()))
    other = layered_net(case, seed=4)
    before = types(other)
    with raises(lx.CheckpointError, "base-differs", "up"):
        lx.load(tmp_path, other, (inputs(),))
    assert types(other) == before


@CASES
def test_the_model_saves_what_the_layers_save(case: str) -> None:
    model, twin = layered_net(case), layered_net(case)
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    saved, expected = model.state_dict(), twin.state_dict()
    assert list(saved) == list(expected)
    assert all(torch.equal(saved[name], value) for name, value in expected.items() if isinstance(value, torch.Tensor))
    assert list(cascade.folded_state_dict()) == list(expected)  # nothing has trained


def test_training_mode_of_a_wrapped_layer() -> None:
    model = layered_net("packed")
    cascade = lx.adapt(model, (inputs(),), spec=SPEC)
    for mode in (True, False):
        cascade.train(mode)
        assert torch.equal(cascade(inputs()), layered_net("packed").train(mode)(inputs()))
    assert not torch.equal(layered_net("packed").train()(inputs()), layered_net("packed").eval()(inputs()))
    layer = model.up.layer  # type: ignore[union-attr]
    cascade.release()
    assert model.up is layer
    assert not layer.training


def test_a_weight_of_a_class_without_a_row_is_not_requantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TENSORS, "torchao.quantization.Int8Tensor")
    cascade = lx.adapt(net("int8"), (inputs(),), spec=SPEC)
    trained(cascade)
    before = cascade(inputs())
    with raises(lx.StateError, "quantized-not-supported", "Linear"):
        cascade.release(quantized="requantize")
    assert torch.equal(cascade(inputs()), before)
    cascade.release(quantized="dequantize")


def test_a_failed_requantization_restores_earlier_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{Packed.__module__}.{Packed.__qualname__}"
    row, calls = LIBRARIES[name], list[torch.Tensor]()

    def fails(layer: Packed, weight: torch.Tensor) -> nn.Module:
        calls.append(weight)
        if len(calls) > 1:
            raise ValueError("no memory")
        return row.requantize(layer, weight)

    monkeypatch.setitem(LIBRARIES, name, Library(row.holds, row.dequantize, fails))
    cascade = lx.adapt(layered_net("packed"), (inputs(),), spec=SPEC)
    trained(cascade)
    before = cascade(inputs())
    with pytest.raises(ValueError, match="no memory"):
        cascade.release(quantized="requantize")
    assert torch.equal(cascade(inputs()), before)
    with cascade.weights("base"):
        assert torch.equal(cascade.model(inputs()), layered_net("packed")(inputs()))


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
    model = layered_net("packed")
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
