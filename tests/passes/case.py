"""What a case is: a small graph, and what a match has to find in it.

All in fp64, no weight square, no batch of one. A case is traced in one of three dialects: ATen by the project's own
`export` front end, functions and modules by its `symbolic` one (or by a tracer with leaves of its own).
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lorasc_fx import CascadeSpec
from lorasc_fx.capture import OWNER, capture
from lorasc_fx.graph import copy_graph, graph_module_like, retarget
from lorasc_fx.plan import Reason

Uses = dict[str, tuple[tuple[str, str], ...]]
Trace = Callable[[nn.Module, tuple[Any, ...]], fx.Graph]

# A scale that is no power of two, so that no product with it is exact by luck.
SPEC = CascadeSpec(rank=3, lora_alpha=5.0, pace=0.7, seed=11)


@dataclass(frozen=True)
class Case:
    """A model, its inputs, how it is traced, and what is found in it.

    Args:
        name: also that of its golden text.
        make: returns the model; called under a fixed seed.
        inputs: returns its positional inputs; called under a fixed seed.
        trace: the dialect.
        found: the sites, with their uses; see `sites_in`.
        refusals: by weight name.
        unreached: weight names.
        aliases: the other names of a tied site.
        slices: sites whose weight is used in slices, with the numbers of rows of each.
        exact: the graph computes the eager model's bits; else eager mode takes a fused path.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    trace: Trace
    found: str
    refusals: dict[str, Reason] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    spec: CascadeSpec = SPEC
    slices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    exact: bool = True

    @functools.cached_property
    def sites(self) -> Uses:
        """By weight name, the (node, form) of each use."""
        return {weight: uses for weight, (_, uses) in sites_in(self.found).items()}

    @property
    def transposed(self) -> tuple[str, ...]:
        """Sites whose weight is stored [in, out]."""
        return tuple(weight for weight, (told, _) in sites_in(self.found).items() if "in_out" in told)

    def kind(self, weight: str) -> str:
        """The kind of a site: told, or by the name of its form; without both, linear."""
        told, ((_, form), *_) = sites_in(self.found)[weight]
        kinds = [*(each for each in told if each != "in_out"), *(k for k in ("conv", "embedding") if k in form.lower())]
        return next(iter(kinds), "linear")

    def __str__(self) -> str:
        return self.name

    @property
    def model(self) -> nn.Module:
        """The eager model, the oracle of all numbers; the same object at each call, so it must not be changed."""
        return _model(self)

    @property
    def args(self) -> tuple[Any, ...]:
        """The inputs, new ones of the same values at each call."""
        return _seeded(self.inputs, 5)

    def own(self) -> fx.GraphModule:
        """A new graph module that owns its weights, all of the model's, those that its graph does not use as well."""
        graph, root = _graph(self), copy.deepcopy(self.model)
        for node in graph.nodes:
            if (
                node.op == "get_attr"
                and hasattr(graph.owning_module, str(node.target))
                and node.target not in dir(root)
            ):
                root.add_module(node.target, copy.deepcopy(getattr(graph.owning_module, node.target)))  # a region
        return graph_module_like(root, copy_graph(graph))

    def live(self) -> fx.GraphModule:
        """A new graph module that reads the weights of another module, its child `model`."""
        return capture(self.own(), self.args, {}).module

    def graph(self, mode: str) -> fx.GraphModule:
        """A new graph module, `own` or `live`."""
        return self.own() if mode == "own" else self.live()

    def __hash__(self) -> int:
        return hash(self.name)


def _seeded(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(()):
        torch.manual_seed(seed)
        return make()


@functools.cache
def _model(case: Case) -> nn.Module:
    return _seeded(case.make, 3).double().eval()


@functools.cache
def _graph(case: Case) -> fx.Graph:
    return case.trace(copy.deepcopy(case.model), case.args)


# --- dialects --------------------------------------------------------------------------------------------------------


def aten(model: nn.Module, args: tuple[Any, ...]) -> fx.Graph:
    """ATen: torch.export."""
    return _captured(model, args, "export")


def functions(model: nn.Module, args: tuple[Any, ...]) -> fx.Graph:
    """Functions and modules: torch.fx.symbolic_trace."""
    return _captured(model, args, "symbolic")


modules = functions


def _captured(model: nn.Module, args: tuple[Any, ...], frontend: str) -> fx.Graph:
    graph = capture(model, args, {}, frontend).module.graph
    retarget(graph, lambda node: str(node.target).removeprefix(f"{OWNER}."))
    return graph


def leaves(*names: str) -> Trace:
    """Modules, where those of these class names are called whole as well."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return type(m).__name__ in names or super().is_leaf_module(m, module_qualified_name)

    return lambda model, args: Tracer().trace(model)


def randn(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(*shape, dtype=torch.float64),)


class Functional(nn.Module):
    """A body over parameters of these shapes, `self.w0`, `self.w1`, ..., and one bias of `bias` entries."""

    def __init__(self, body: Callable[..., Any], *shapes: tuple[int, ...], bias: int = 1) -> None:
        super().__init__()
        self.body = body
        for index, shape in enumerate(shapes):
            setattr(self, f"w{index}", nn.Parameter(torch.randn(*shape) / 3))
        self.b = nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def seq(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def functional(body: Callable[..., Any], *shapes: tuple[int, ...], bias: int = 1) -> Callable[[], nn.Module]:
    return lambda: Functional(body, *shapes, bias=bias)


@functools.cache
def sites_in(text: str) -> dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]]:
    """Read a table of sites: `w0:in_out=mm,F.linear_1 fc.weight=nn.Linear w1:experts=*`.

    Behind a weight's name may stand its kind and its layout. Each of its uses is a form and the node's number: `mm_1`
    is a node of that name, of the form `aten.mm`; `F.linear_1` the same of `F.linear`. `nn.Linear` is the module that
    holds the weight, `*` a branch on the weight itself; `form@node` spells both out.
    """
    found = {}
    for site in text.split():
        (weight, *told), uses = site.partition("=")[0].split(":"), site.partition("=")[2]
        found[weight] = tuple(told), tuple(_use(weight, use) for use in uses.split(","))
    return found


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
