"""A backend for torch.compile that inserts branches into each graph that dynamo makes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.errors import NoSites, PassError, UnknownTarget, warn
from lorasc_fx.graph import Record, record_of, set_record
from lorasc_fx.graph.patterns import check_patterns
from lorasc_fx.graph.weights import BRANCHES, named_weights
from lorasc_fx.plan import Plan
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.torch_private import lookup_backend

from .fold_branches import FoldBranches
from .insert_branches import InsertBranches, no_sites_message
from .match_sites import MatchSites
from .weights_as_attributes import add_parameter, with_attributes

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Backend(nn.Module):
    """The branches of all graphs that dynamo makes of a model. The function `backend` creates this module.

    Its parameters and its state dict are those of the branches. Pass
    `[p for p in backend.parameters() if p.requires_grad]` to the optimizer after the first call of the compiled model.
    All graphs that use a weight share one branch.
    """

    def __init__(self, spec: CascadeSpec, inner: str | Compiler) -> None:
        super().__init__()
        self.branches = nn.ModuleDict()
        self._record, self._inner = Record(plan=Plan(spec)), inner
        self._weights: dict[str, nn.Parameter] = {}
        self._graphs: dict[str, fx.GraphModule] = {}

    def forward(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Insert branches into a graph of dynamo and compile it. torch.compile calls this."""
        names = _names(graph_module, inputs)
        for value, name in names.items():
            if self._weights.setdefault(name, value) is not value:
                raise PassError(
                    f"two parameters are called {name}. Compile each model with a separate backend",
                    code="unknown-name",
                )
        if names:
            graph_module = self._adapted(graph_module, inputs)
        if not isinstance(self._inner, str):
            return self._inner(graph_module, inputs)
        compiler: Compiler = lookup_backend(self._inner)
        return compiler(graph_module, inputs)

    def _adapted(self, graph_module: fx.GraphModule, inputs: Sequence[object]) -> fx.GraphModule:
        """Return the graph with branches. If no graph has a site yet, return the graph unchanged."""
        graph = with_attributes(graph_module, inputs, {id(value): name for name, value in self._weights.items()})
        # The plan has the sites of all graphs, so each graph gets all weights and branches.
        for name, value in self._weights.items():
            add_parameter(graph, name, value)
        if self.branches:
            graph._modules[BRANCHES] = nn.ModuleDict(dict(self.branches.items()))
        plan = self._record.plan
        set_record(graph, Record(plan=plan))
        matched = MatchSites(plan.spec, partial=True)(graph).graph_module
        self._record = record_of(matched)
        if not self._record.plan.sites:
            return graph_module
        adapted: fx.GraphModule = InsertBranches()(matched).graph_module
        self.branches.update(dict(adapted.get_submodule(BRANCHES).named_children()))
        self._graphs |= dict.fromkeys(record_of(adapted).branched, adapted)
        return adapted

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the names and parameters of the branches. Warn if a pattern of the spec has matched nothing so far.

        Raises:
            NoSites: there are no branches, because nothing was compiled yet or no compiled graph has a site.
        """
        if not self._weights:
            raise NoSites("there are no branches yet; call the compiled model before you read their parameters")
        if not self.branches:
            raise NoSites(no_sites_message(self._record))
        weights = nn.Module()
        for name, value in self._weights.items():
            add_parameter(weights, name, value)
        try:
            self.check(weights)
        except UnknownTarget as fault:
            warn(f"in the graphs compiled so far, {fault}", "unknown-target")
        return super().named_parameters(*args, **kwargs)

    def check(self, model: nn.Module) -> None:
        """Raise UnknownTarget if a pattern of the spec matches no weight of a model."""
        weights = named_weights(model)
        check_patterns(self._record.plan.spec, weights.matrices, weights.names)

    def fold(self, model: nn.Module) -> nn.Module:
        """Return an uncompiled copy of the model in which each branch is folded into its weight, in full.

        Args:
            model: the model that was compiled, or the result of torch.compile. It is not changed.

        Raises:
            UnknownTarget: a pattern of the spec matches no weight of the model.
            NonFiniteBranch: a branch holds inf or nan.
        """
        folded = copy.deepcopy(getattr(model, "_orig_mod", model))
        self.check(folded)
        for graph in dict.fromkeys(self._graphs.values()):
            result = FoldBranches()(graph).graph_module
            with torch.no_grad():
                for name in record_of(graph).branched:
                    folded.get_parameter(name).copy_(result.get_parameter(name))
        return folded


def backend(
    spec: CascadeSpec | None = None, inner: str | Compiler = "inductor", model: nn.Module | None = None
) -> Backend:
    """Return a backend for `torch.compile(model, backend=...)` that inserts branches into each graph.

    There is a graph on each side of a graph break, and a new graph after each recompilation. All graphs share the
    branches, which the first call creates. The compiled model does not train its own weights.

    Args:
        spec: selects the weights and their options. Default: `CascadeSpec()`.
        inner: compiles the graphs with branches: a name of `torch.compiler.list_backends()`, `eager`, or a function of
            a graph module and its inputs.
        model: the model that will be compiled. If it is given, the patterns of the spec are checked now. Otherwise
            `parameters()` warns of a pattern that has matched nothing, and `fold` raises.

    Raises:
        UnknownTarget: a pattern of the spec matches no weight of the model.

    Example:
        >>> lorasc = lx.backend(lx.CascadeSpec(rank=8))
        >>> compiled = torch.compile(model, backend=lorasc)
        >>> compiled(x)  # creates the branches
        >>> optimizer = torch.optim.AdamW([p for p in lorasc.parameters() if p.requires_grad])
        >>> folded = lorasc.fold(model)
    """
    compiler = Backend(CascadeSpec() if spec is None else spec, inner)
    if model is not None:
        compiler.check(model)
    return compiler


def _names(graph_module: fx.GraphModule, inputs: Sequence[object]) -> dict[nn.Parameter, str]:
    """Return {Parameter: name in the model} for the inputs. Read from the expression that dynamo uses."""
    names: dict[nn.Parameter, str] = {}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, nn.Parameter):
            name = getattr(node, "_dynamo_source").name  # noqa: B009 - not in torch's stubs
            expression = name() if callable(name) else name  # torch 2.9 has a method
            names[value] = ".".join(re.findall(r"_(?:modules|parameters)\['([^']+)'\]", expression)) or node.name
    return names
