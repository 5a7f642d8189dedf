"""What the table of operators knows of a model: how to build it, how to call it, and which weights are adapted."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorasc_fx.plan import Reason
from tests.kit.compare import Call, seed

DIALECTS = ("aten", "functional", "module")
Uses = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """One small model. `tests/forms` runs it under every front end, `tests/passes` on a graph of each of its dialects.

    Args:
        name: of the row; "_DIALECT" comes before it in tests of passes.
        build: makes a new model with random weights from torch's generator; no weight is square.
        inputs: makes a call's positional arguments, or those and keywords as (tuple, dict), from torch's generator.
        sites: kind by weight name: what every front end must adapt.
        refused: reason by weight name: what no front end can adapt.
        has_graph: whether torch.export can trace the model.
        unreached: weights that no call of the row uses.
        shapes: of lora_A, where a case tells it.
        modes: in which the model is compared.
        close: of the outputs at B = 0, where eager mode has several kernels; 0 is bit for bit.
        tolerance: of a branch beside the formula; above 1e-12 only where the model computes in fp32 inside.
        graphs: the sites and their uses by dialect, as `sites_in` reads them.
        leaves: classes of modules that the trace of a dialect calls whole.
        mixed: weights that a symbolic trace refuses because a module and a function use them.
        exact: a graph computes the eager model's bits; else eager mode takes a fused path.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    sites: Mapping[str, str]
    refused: Mapping[str, Reason | tuple[Reason, ...]] = field(default_factory=dict)
    has_graph: bool = True
    unreached: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    modes: tuple[bool, ...] = (True, False)
    close: float = 0.0
    tolerance: float = 1e-12
    graphs: Mapping[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    exact: bool = True

    def call(self) -> Call:
        """Return the arguments of a call, the same values each time."""
        seed(5)
        inputs = self.inputs()
        if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[1], dict):
            return inputs
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}

    @property
    def taken_by(self) -> str:
        """The front end that auto uses."""
        return "export" if self.has_graph else "eager"

    def model(self) -> nn.Module:
        """Return the model in fp64, without the zeros and ones that biases and gains start with."""
        seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old hooks of torch.nn.utils are deprecated, and in use
            model = self.build().double()
        with torch.no_grad():
            for value in model.parameters():
                if value.is_floating_point() and (value.dim() < 2 or not value.any()):
                    value.add_(0.1 * torch.randn_like(value))
        return model


def row(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    sites: Mapping[str, str] | None = None,
    refused: Mapping[str, Reason | tuple[Reason, ...]] | None = None,
    *,
    aten: str = "",
    functional: str = "",
    module: str = "",
    **more: Any,
) -> Case:
    """Return a case. `aten`, `functional` and `module` are the sites in a graph of that dialect, with their kinds."""
    graphs = {key: text for key, text in zip(DIALECTS, (aten, functional, module), strict=True) if text}
    sites_of_graphs = {weight: kind_in(text, weight) for text in graphs.values() for weight in sites_in(text)}
    return Case(name, build, inputs, sites_of_graphs if sites is None else sites, refused or {}, graphs=graphs, **more)


@functools.cache
def sites_in(text: str) -> dict[str, tuple[tuple[str, ...], Uses]]:
    """Read a table of sites: `w0:in_out=mm,F.linear_1 fc.weight=nn.Linear w1:stacked=*`.

    A weight's name can be followed by its kind and its layout. Each of its uses is a form and the node's number: `mm_1`
    is a node of that name, of the form `aten.mm`; `F.linear_1` the same of `F.linear`. `nn.Linear` is the module that
    holds the weight, `*` a branch on the weight itself; `form@node` spells both out.
    """
    sites = {}
    for site in text.split():
        (weight, *kinds_told), uses = site.partition("=")[0].split(":"), site.partition("=")[2]
        sites[weight] = tuple(kinds_told), tuple(_use(weight, use) for use in uses.split(","))
    return sites


def kind_in(text: str, weight: str) -> str:
    """The kind of a site: told, or by the name of its form; without both, linear."""
    stated, ((_, form), *_) = sites_in(text)[weight]
    kinds = [*(word for word in stated if word != "in_out"), *(k for k in ("conv", "embedding") if k in form.lower())]
    return next(iter(kinds), "linear")


def _use(weight: str, use: str) -> tuple[str, str]:
    form, _, node = use.partition("@")
    if node:
        return node, form
    if use == "*":
        return _node(weight), "on-weight"
    if use.startswith("nn."):
        return _node(weight.rpartition(".")[0]), use
    form = re.sub(r"_\d+$", "", use)
    return use.rpartition(".")[2], form if "." in form else f"aten.{form}"


def _node(path: str) -> str:
    """The name of a node that calls or reads what lies under a path."""
    return f"{'_' * path[0].isdigit()}{path.replace('.', '_')}"


# --- makers of models and inputs -------------------------------------------------------------------------------------


def rand(*shapes: tuple[int, ...]) -> Callable[[], Any]:
    """Return a maker of one normal tensor per shape."""
    return lambda: tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)


def linear(*names: str) -> dict[str, str]:
    """Return sites of kind linear."""
    return dict.fromkeys(names, "linear")


class Of(nn.Module):
    """A function of an input and of parameters w0, w1, ... of these shapes."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.count = function, len(shapes)
        for index, shape in enumerate(shapes):
            setattr(self, f"w{index}", nn.Parameter(torch.randn(*shape) / 2))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *(getattr(self, f"w{index}") for index in range(self.count)))


def of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    """Return a maker of `Of`."""
    return lambda: Of(function, *shapes)


def seq(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a maker of a sequence."""
    return lambda: nn.Sequential(*(layer() for layer in layers))
