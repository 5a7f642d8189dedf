"""Splits an adapted graph into segments that read the weights of one unit each, so FSDP gathers one unit at a time.

A unit is a set of parameters that FSDP gathers together, such as one block of a transformer. The graph is not changed.
Its nodes keep their order, and a new segment starts when a node reads the weights of another unit. Nodes that compute
only from weights (a transpose, a cast, a branch on a weight) run in the segments that use their values. Otherwise these
values would keep the weights of a unit alive after its segments.

`Unit` and `Shards` are the modules that `fully_shard` gets. `SplitGraph` runs a graph segment by segment through them.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch
from lorasc_fx.branch.products import apply
from lorasc_fx.errors import StateError
from lorasc_fx.graph.flow import is_impure
from lorasc_fx.shards import local
from lorasc_fx.signature import leaves
from lorasc_fx.util.torch_private import frame_callback
from lorasc_fx.util.undo import Block, isolated

ROOT = ""
"""The root unit: vectors, and weights that several units read. They stay gathered during the whole forward."""

_NUMBER = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def unit_of(name: str, parameter: nn.Parameter) -> str:
    """Return the unit of a parameter: the parameter's name up to the first number, such as `layers.3`.

    If the name has no number, the unit of a matrix is its module, such as `head`, and the unit of a vector is ROOT.
    """
    if (numbered := _NUMBER.match(name)) is not None:
        return numbered.group()
    return name.rpartition(".")[0] if parameter.dim() > 1 else ROOT


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes that read the weights of one unit.

    Args:
        unit: name of the unit, or ROOT.
        nodes: nodes in order, except nodes that compute only from weights.
        inputs: nodes of earlier segments whose values this segment reads.
        outputs: nodes of this segment whose values later segments read, and the output node.
    """

    unit: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    def compute(self, interpreter: fx.Interpreter, values: Iterable[object]) -> tuple[Any, ...]:
        """Return the values of `outputs`, given the values of `inputs`. The interpreter computes each node."""
        computed: dict[fx.Node, Any] = dict(zip(self.inputs, values, strict=True))

        def value_of(node: fx.Node) -> Any:
            if node not in computed:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
                computed[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
            return computed[node]

        for node in self.nodes:
            value_of(node)
        return tuple(computed[node] for node in self.outputs)


def inseparable(graph_module: fx.GraphModule, units: Mapping[int, str]) -> list[set[int]]:
    """Return a set of parameters (by id) for each node that reads parameters of several units."""
    reads = _reads(graph_module)
    together = [reads.of(node) for node in graph_module.graph.nodes if node not in reads.lazy]
    return [group for group in together if len({units[parameter] for parameter in group} - {ROOT}) > 1]


class SegmentedGraph:
    """A graph that is split into segments."""

    def __init__(self, module: fx.GraphModule, segments: tuple[Segment, ...]) -> None:
        self.module, self.segments = module, segments
        self.interpreter = fx.Interpreter(module)
        self.placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        needed = [set(segment.inputs) for segment in segments]
        self.later = [set().union(*needed[index + 1 :]) for index in range(len(segments))]


def segmented(graph_module: fx.GraphModule, units: Mapping[int, str]) -> SegmentedGraph:
    """Split a graph into segments. `units` is {id of a parameter: its unit}."""
    reads = _reads(graph_module)
    # Divide the nodes into groups of one unit. Nodes that read no weights, or only ROOT, continue the current group.
    groups: list[tuple[str, list[fx.Node]]] = [(ROOT, [])]
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or node in reads.lazy:
            continue
        node_units = {units[parameter] for parameter in reads.of(node)} - {ROOT}
        if node_units and node_units != {groups[-1][0]}:
            groups.append((node_units.pop(), []))
        groups[-1][1].append(node)
    groups = [(unit, nodes) for unit, nodes in groups if nodes]
    # Connect the segments: each returns the values that later ones read.
    needs = [_needs(nodes, reads.lazy) for _, nodes in groups]
    segments = []
    for index, (unit, nodes) in enumerate(groups):
        inside = set(nodes)
        inputs = tuple(node for node in needs[index] if node not in inside)
        later = {node for needed in needs[index + 1 :] for node in needed}
        outputs = tuple(node for node in nodes if node in later or node.op == "output")
        segments.append(Segment(unit, tuple(nodes), inputs, outputs))
    return SegmentedGraph(graph_module, tuple(segments))


@dataclass(frozen=True)
class _Reads:
    """Which parameters each node of a graph reads. Parameters are given by id."""

    lazy: frozenset[fx.Node]  # nodes that compute only from weights
    direct: Mapping[fx.Node, set[int]]  # the parameters that each node reads directly

    def of(self, node: fx.Node) -> set[int]:
        """Return the ids of the parameters that a node reads, directly or through nodes in `lazy`."""
        indirect = (self.of(source) for source in node.all_input_nodes if source in self.lazy)
        return set(self.direct.get(node, ())).union(*indirect)


def _reads(graph_module: fx.GraphModule) -> _Reads:
    lazy: set[fx.Node] = set()
    direct: dict[fx.Node, set[int]] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            attribute = operator.attrgetter(str(node.target))(graph_module)
            values = attribute.parameters() if isinstance(attribute, nn.Module) else [attribute]
            direct[node] = {id(value) for value in values if isinstance(value, nn.Parameter)}
        sources = node.all_input_nodes
        from_weights = bool(sources) and all(source in lazy for source in sources)
        if node.op == "get_attr" or (from_weights and node.op != "output" and not is_impure(node)):
            lazy.add(node)
    return _Reads(frozenset(lazy), direct)


def _needs(nodes: Iterable[fx.Node], lazy: frozenset[fx.Node]) -> dict[fx.Node, None]:
    """Return the inputs of these nodes, as the keys of a dict. Inputs in `lazy` are replaced by their own inputs."""
    needs: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in lazy:
                visit(source)
            else:
                needs[source] = None

    for node in nodes:
        visit(node)
    return needs


class Unit(nn.Module):
    """Module of one unit, for `fully_shard`. Its forward runs a segment that reads the parameters of the unit.

    `holders` are the modules of the user's model that hold these parameters. `fully_shard` replaces the parameters
    there, in place.
    """

    def __init__(self, holders: Iterable[nn.Module]) -> None:
        super().__init__()
        self.holders = nn.ModuleList(holders)

    def forward(self, segment: Segment, interpreter: fx.Interpreter, *values: object) -> tuple[Any, ...]:
        """Return the outputs of the segment, without views of weights, because FSDP frees these after the forward."""
        storages = {local(parameter).untyped_storage()._cdata for parameter in self.parameters()}
        outputs: tuple[Any, ...] = segment.compute(interpreter, values)
        outputs = pytree.tree_map_only(torch.Tensor, partial(_not_a_view, storages=storages), outputs)
        return outputs


class Shards(nn.Module):
    """Module that contains all units and the parameters of ROOT, for `fully_shard`. Its forward runs a graph."""

    def __init__(self, units: Mapping[str, Unit], root_holders: Iterable[nn.Module]) -> None:
        super().__init__()
        self.names = {name: index for index, name in enumerate(units)}
        self.units = nn.ModuleList(units.values())
        self.root_holders = nn.ModuleList(root_holders)

    def unit(self, name: str) -> Any:
        """Return the module of a unit, which FSDP has extended by `unshard` and `reshard`."""
        return self if name == ROOT else self.units[self.names[name]]

    def forward(self, graph: SegmentedGraph, interpreter: fx.Interpreter, *inputs: object) -> Any:
        """Run a graph and return its output. Missing inputs at the end get their defaults."""
        outputs: tuple[Any, ...] = ()
        arguments = [*inputs, *(node.args[0] for node in graph.placeholders[len(inputs) :])]
        values: dict[fx.Node, Any] = dict(zip(graph.placeholders, arguments, strict=True))
        for segment, later in zip(graph.segments, graph.later, strict=True):
            read = [values[node] for node in segment.inputs]
            if segment.unit == ROOT:
                outputs = segment.compute(interpreter, read)
            else:
                outputs = self.unit(segment.unit)(segment, interpreter, *read)
            # Free the values that no later segment reads.
            values |= zip(segment.outputs, outputs, strict=True)
            values = {node: value for node, value in values.items() if node in later}
        return outputs[-1]  # the last segment has the output node


class SplitGraph:
    """Replaces the graph module of a variant, and runs the same graph segment by segment through the units.

    `before_call` runs before each call. It returns whether the call is inside a `cascade.weights(...)` block, in which
    branches must add nothing.
    """

    def __init__(self, shards: Shards, graph: SegmentedGraph, before_call: Callable[[], bool]) -> None:
        self.shards, self.graph, self.before_call = shards, graph, before_call
        self.branches = [module for module in graph.module.modules() if isinstance(module, Branch)]

    @property
    def rewritten(self) -> list[fx.GraphModule]:
        """The graph module before the split, in a list."""
        return [self.graph.module]

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Return the output of the graph.

        Raises:
            StateError: the call is inside torch.compile.
        """
        if torch.compiler.is_compiling() or frame_callback():
            raise StateError(
                "torch.compile: a cascade with sharded weights cannot be compiled. Call it uncompiled", code="sharded"
            )
        return self.graph.module.graph.process_outputs(self.compute(self.graph.interpreter, *leaves(args, kwargs)))

    def compute(self, interpreter: fx.Interpreter, *inputs: object) -> Any:
        """Run the graph and return its output. `inputs` are the flattened arguments of the call."""
        with disabled(self.branches) if self.before_call() else contextlib.nullcontext():
            try:
                return self.shards(self.graph, interpreter, *inputs)
            except BaseException:
                self.shards.reset_iter_state()  # type: ignore[operator]
                raise


@isolated
def disabled(undo: Block, branches: list[Branch]) -> None:
    """Context manager: set the scale of branches to 0, so that they add nothing."""
    for branch in branches:
        undo(partial(setattr, branch, "scale", branch.scale))
        branch.scale = 0.0


@isolated
def gathered(undo: Block, shards: Shards, model: nn.Module) -> None:
    """Context manager: gather weights for methods of the user's model, such as `generate`, which call its modules.

    The weights of a numbered unit (`layers.3`) are gathered while one of its modules runs. All other weights are
    gathered until the end of the block. Every rank must call the same modules in the same order.
    """
    modules, depth = dict(model.named_modules()), Counter[str]()  # depth of nested calls for each unit

    def call(names: list[str], function: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        try:
            for name in names:
                depth[name] += 1
                with torch.inference_mode(False):  # FSDP creates buffers here, which must not be inference tensors
                    shards.unit(name).unshard()
            return function(*args, **kwargs)
        finally:
            for name in names:
                depth[name] -= 1
                if not depth[name]:
                    shards.unit(name).reshard()

    units = {id(parameter): name for name in shards.names for parameter in shards.unit(name).parameters()}
    numbered = {name for name in shards.names if _NUMBER.match(f"{name}.")}
    for name in numbered:
        for module in _called(modules[name]):
            ids = {id(parameter) for parameter in module.parameters()}
            if names := sorted({units[number] for number in ids if number in units} & numbered):
                # Wrap the call of the module. A hook would count as outside use of the model, see `UsageWatch`.
                table, slot = vars(module), "_compiled_call_impl"
                inner = module._compiled_call_impl
                undo(partial(table.pop, slot) if inner is None else partial(table.update, {slot: inner}))
                table[slot] = partial(call, names, inner or module._call_impl)
    for name in (ROOT, *(name for name in shards.names if name not in numbered)):
        undo(shards.unit(name).reshard)
        with torch.inference_mode(False):
            shards.unit(name).unshard()


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module if it has a forward. For a container, yield the modules in it that have one."""
    if type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield module
        return
    for child in module.children():
        yield from _called(child)


def _not_a_view(value: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """Return an output as a tensor that is not a view of a weight, and not a view for autograd.

    FSDP frees the memory of the weights, and registers hooks on the outputs.
    """
    if local(value).untyped_storage()._cdata in storages:  # not data_ptr(), which fake tensors do not have
        return value.clone()
    if value.requires_grad and value._base is not None:
        return apply(_NoView, value)
    return value


class _NoView(torch.autograd.Function):
    """Identity whose output shares the memory of x, but is not a view for autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return x, detached."""
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient unchanged."""
        return gradient
