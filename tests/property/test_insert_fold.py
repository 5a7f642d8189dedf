"""Random small graphs under random specs: B = 0 changes no bit, a fold gives the text back, the rest is the formula."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from lorasc_fx import CascadeSpec, Noise, Rule
from lorasc_fx.capture import OWNER, capture
from lorasc_fx.graph import copy_graph, faults, graph_module_like, record_of, retarget, text
from lorasc_fx.passes import FoldBranches, InsertBranches, StageTransition
from tests.kit.trained import with_all_gradients
from tests.passes.kit import NEAR, branches_of, deltas, fill, insert, same_bits, weights_of

CONV = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}
MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Layer:
    """A linear or a convolution; `ways` are how its first and its second use compute, where functions do."""

    kind: str
    seed: int
    out: int
    options: tuple[tuple[str, Any], ...] = ()
    again: bool = False
    tied: bool = False
    stored: str = "out_in"
    ways: tuple[str, str] = ("plain", "plain")


class Net(nn.Module):
    """Layers after each other. One that is used `again` follows itself through a mixer that brings the width back."""

    def __init__(self, width: int, dims: int, layers: tuple[Layer, ...], functional: bool) -> None:
        super().__init__()
        self.layers, self.dims, self.functional = layers, dims, functional
        self.mods, self.mix = nn.ModuleList(), nn.ModuleList()
        for layer in layers:
            options = dict(layer.options)
            turned = functional and layer.stored == "in_out" and layer.kind == "linear"
            sizes = (layer.out, width) if turned else (width, layer.out)
            make = nn.Linear if layer.kind == "linear" else CONV[dims][0]
            made, twin = make(*sizes, **options), make(*sizes, **options)
            self.mods.append(made)
            if layer.tied:
                twin.weight = made.weight
            self.mix.append(nn.ModuleList([nn.Linear(layer.out, width), made if not layer.tied else twin]))
            width = layer.out

    def forward(self, x: Tensor) -> Tensor:
        for layer, made, (back, other) in zip(self.layers, self.mods, self.mix, strict=True):
            y = self.call(layer, made, x, layer.ways[0])
            if layer.again or layer.tied:
                y = self.call(layer, other, torch.tanh(back(y.movedim(1, -1)).movedim(-1, 1)), layer.ways[1])
            x = torch.tanh(y)
        return x

    def call(self, layer: Layer, made: Any, x: Tensor, way: str) -> Tensor:
        if not self.functional or getattr(made, "padding_mode", "zeros") != "zeros":
            return made(x.movedim(1, -1)).movedim(-1, 1) if layer.kind == "linear" else made(x)
        weight = made.weight - made.weight.mean(0, keepdim=True) if way == "computed" else made.weight
        if layer.kind == "linear":
            moved = x.movedim(1, -1)
            if layer.stored == "in_out":
                y = F.linear(moved, weight.t()) if way == "turned" else moved @ weight
            else:
                y = moved @ weight.t() + made.bias if way == "turned" else F.linear(moved, weight, made.bias)
            return y.movedim(-1, 1)
        conv = CONV[self.dims][1]
        return conv(x, weight, made.bias, made.stride, made.padding, made.dilation, groups=made.groups)


@st.composite
def nets(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A model in fp64 and its input; channels are multiples of six, so that groups fit."""
    dims, width = draw(st.integers(1, 3)), draw(st.sampled_from([6, 12]))
    size, layers, now = 9, [], width
    for index in range(draw(st.integers(2, 4))):
        kind = draw(st.sampled_from(["linear", "conv"]))
        out = draw(st.sampled_from([other for other in (6, 12, 18) if other != now]))
        options: dict[str, Any] = {"bias": draw(st.booleans())}
        if kind == "conv":
            kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
            mode = draw(st.sampled_from(MODES))
            stride = draw(st.integers(1, 2)) if size > 6 else 1
            span = (kernel - 1) * dilation
            options |= {"kernel_size": kernel, "dilation": dilation, "padding_mode": mode, "stride": stride}
            options["groups"] = draw(st.sampled_from([1, 2, 3, 6]))
            choices = [(span + 1) // 2, (span + 1) // 2 + 1]
            if stride == 1 and span % 2 == 0:
                choices = [*choices, "same"]
            options["padding"] = draw(st.sampled_from(choices))
            pad = span // 2 if options["padding"] == "same" else options["padding"]
            size = (size + 2 * pad - span - 1) // stride + 1
        again, tied = draw(st.booleans()), draw(st.booleans())
        fits = kind == "linear" or (options["stride"] == 1)
        way = st.sampled_from(["plain", "turned", "computed"])
        ways = (draw(way), draw(way))
        if kind == "linear" and "turned" in ways:
            options["bias"] = True
        stored = draw(st.sampled_from(["out_in", "in_out"]))
        layers.append(Layer(kind, index, out, tuple(options.items()), again and fits, tied and fits, stored, ways))
        if kind == "conv" and fits and (again or tied):
            size = size + 2 * pad - span
        now = out
    functional = draw(st.booleans())
    with torch.random.fork_rng(()):
        torch.manual_seed(draw(st.integers(0, 2**16)))
        model = Net(width, dims, tuple(layers), functional).double().eval()
        x = torch.randn(2, width, *(9 - axis for axis in range(dims)), dtype=torch.float64)
    return model, x


@st.composite
def specs(draw: st.DrawFn) -> CascadeSpec:
    rank = st.integers(1, 4)
    return CascadeSpec(
        targets=draw(
            st.sampled_from([("linear", "conv"), ("linear", "conv"), ("mods.0", "mix.*"), ("mods", "linear")])
        ),
        exclude=draw(st.sampled_from([(), (), ("mix.1",), ("mods.1",)])),
        rules=draw(st.sampled_from([(), (Rule("mods.0", rank=5), Rule("linear", 2, 3.0))])),
        rank=draw(rank),
        lora_alpha=draw(st.floats(0.5, 8)),
        use_rslora=draw(st.booleans()),
        pace=draw(st.sampled_from([0.25, 0.5, 0.9, 1.0])),
        restart=draw(st.sampled_from(["slow", "fast"])),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


def own(model: nn.Module, x: Tensor, frontend: str) -> fx.GraphModule:
    """The captured graph over a copy of the model."""
    graph = copy_graph(capture(model, (x,), {}, frontend).module.graph)
    retarget(graph, lambda node: str(node.target).removeprefix(f"{OWNER}."))
    return graph_module_like(copy.deepcopy(model), graph)


def run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def by_hand(model: nn.Module, added: dict[str, Tensor], x: Tensor) -> Tensor:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in added.items():
            changed.get_parameter(name).add_(value)
    return run(changed, x)


def check(model: nn.Module, x: Tensor, spec: CascadeSpec, frontend: str) -> None:
    graph_module = own(model, x, frontend)
    captured, output = text(graph_module), run(graph_module, x)
    assert same_bits(output, run(model, x))

    inserted = insert(graph_module, spec)
    assert same_bits(with_all_gradients(inserted, x), with_all_gradients(graph_module, x))  # B = 0 changes no bit
    assert same_bits(run(graph_module, x), output)
    assert faults(inserted) == []
    assert text(FoldBranches()(inserted).graph_module) == captured
    unfolded = weights_of(FoldBranches()(inserted).graph_module)
    assert all(same_bits(value, model.get_parameter(name)) for name, value in unfolded.items())

    fill(inserted)
    added = deltas(inserted)
    formula = by_hand(model, added, x)
    torch.testing.assert_close(run(inserted, x), formula, rtol=1e-11, atol=1e-11)  # the formula
    assert not torch.allclose(formula, output, rtol=1e-6, atol=1e-6)

    folded = FoldBranches()(inserted).graph_module
    assert text(folded) == captured  # the inverse, node for node
    slow = {name: spec.pace * value for name, value in added.items()}
    for name, value in weights_of(folded).items():
        expected = model.get_parameter(name).detach() + slow.get(name, 0)
        torch.testing.assert_close(value.detach(), expected, **NEAR)
    torch.testing.assert_close(run(folded, x), by_hand(model, slow, x), rtol=1e-11, atol=1e-11)
    again = InsertBranches()(folded).graph_module
    assert text(again) == text(inserted)

    moved = StageTransition()(inserted).graph_module  # the transition is fold, then insert
    assert text(moved) == text(again)
    theirs = dict(again.named_parameters())
    assert all(same_bits(value, theirs[name]) for name, value in moved.named_parameters())
    assert record_of(moved).plan == record_of(again).plan


@pytest.mark.slow
@settings(max_examples=60)
@given(net=nets(), spec=specs())
def test_modules_and_functions(net: tuple[nn.Module, Tensor], spec: CascadeSpec) -> None:
    check(*net, spec, "symbolic")


@pytest.mark.slow
@settings(max_examples=12)
@given(net=nets(), spec=specs())
def test_aten(net: tuple[nn.Module, Tensor], spec: CascadeSpec) -> None:
    check(*net, spec, "export")


@settings(max_examples=30)
@given(
    net=nets(),
    spec=specs(),
    strength=st.floats(0.01, 2),
    distribution=st.sampled_from(["uniform", "normal"]),
    where=st.sampled_from(["sites", "all"]),
)
def test_noise_leaves_nothing_behind(
    net: tuple[nn.Module, Tensor], spec: CascadeSpec, strength: float, distribution: Any, where: Any
) -> None:
    model, x = net
    noisy = replace(spec, noise=Noise(strength, distribution, where=where))
    graph_module = own(model, x, "symbolic")
    here, there = insert(graph_module, noisy), insert(graph_module, spec)
    assert not same_bits(run(here, x), run(there, x))
    for stage in range(2):
        here, there = (
            StageTransition()(fill(here, stage)).graph_module,
            StageTransition()(fill(there, stage)).graph_module,
        )
        assert branches_of(here).keys() == branches_of(there).keys()
    left, right = weights_of(FoldBranches()(here).graph_module), weights_of(FoldBranches()(there).graph_module)
    assert all(same_bits(value, right[name]) for name, value in left.items())
