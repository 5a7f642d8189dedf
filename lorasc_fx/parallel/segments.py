"""Splits an adapted graph into segments that read the weights of one unit each, so FSDP gathers one unit at a time.

The graph itself is not changed. A node that computes only from weights (a transpose, a cast, a branch on a weight) is
computed where it is used, so no tensor keeps a unit's weights alive after its segments. The other nodes keep their
order, and a new segment begins when a node reads the weights of another unit. `Unit` and `Shards` are the modules that
torch's fully_shard gets as blocks. `SplitGraph` runs a graph through them, segment by segment.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch
from lorasc_fx.branch.low_rank import apply
from lorasc_fx.errors import StateError
from lorasc_fx.graph.flow import is_impure
from lorasc_fx.shards import local
from lorasc_fx.util.undo import Block, isolated

__all__ = [
    "ROOT",
    "Segment",
    "SegmentedGraph",
    "Shards",
    "SplitGraph",
    "Unit",
    "gathered",
    "inseparable",
    "segmented",
    "unit_of",
]


ROOT = ""
"""The unit whose weights stay gathered for the whole forward: those read in several units, and small ones."""

_NUMBER = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def unit_of(name: str, parameter: nn.Parameter) -> str:
    """Return the unit of a parameter by its name: the name up to its first number (`layers.3`).

    Without a number it is the module that holds a matrix (`head`), and the root unit for a vector.
    """
    if (numbered := _NUMBER.match(name)) is not None:
        return numbered.group()
    return name.rpartition(".")[0] if parameter.dim() > 1 else ROOT


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes that read the weights of one unit.

    Args:
        unit: the unit, or ROOT.
        nodes: in order, without those that compute only from weights.
        inputs: nodes of earlier segments whose values are needed.
        outputs: nodes of this segment whose values are needed later.
        last: by node, the values that are not needed after it.
    """

    unit: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    last: Mapping[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)

    def run(self, interpreter: fx.Interpreter, values: Iterable[Any]) -> tuple[Any, ...]:
        """Return the values of the outputs for those of the inputs. The interpreter computes each node."""
        held: dict[fx.Node, Any] = dict(zip(self.inputs, values, strict=True))

        def value_of(node: fx.Node) -> Any:
            if node not in held:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
                held[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
            return held[node]

        for node in self.nodes:
            value_of(node)
            for done in self.last.get(node, ()):
                held.pop(done, None)
        return tuple(held[node] for node in self.outputs)


def inseparable(graph_module: fx.GraphModule, units: Mapping[int, str]) -> list[set[int]]:
    """Return the sets of parameters (by id) that one node reads together although they belong to several units."""
    reads = _reads(graph_module)
    together = [reads.of(node) for node in graph_module.graph.nodes if node not in reads.lazy]
    return [group for group in together if len({units[parameter] for parameter in group} - {ROOT}) > 1]


class SegmentedGraph:
    """A graph in segments, with the values that are still needed after each of them.

    Args:
        module: the graph module.
        segments: in order.
    """

    def __init__(self, module: fx.GraphModule, segments: tuple[Segment, ...]) -> None:
        self.module, self.segments = module, segments
        self.interpreter = fx.Interpreter(module)
        self.placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        needed = [set(segment.inputs) for segment in segments]
        self.later = [set().union(*needed[index + 1 :]) for index in range(len(segments))]

    def run(self, inputs: tuple[Any, ...], run_segment: Callable[[Segment, list[Any]], tuple[Any, ...]]) -> Any:
        """Return the value of the output node. `run_segment` runs a segment on the values of its inputs.

        Missing arguments get their defaults.
        """
        arguments = [*inputs, *(node.args[0] for node in self.placeholders[len(inputs) :])]
        values: dict[fx.Node, Any] = dict(zip(self.placeholders, arguments, strict=True))
        for segment, later in zip(self.segments, self.later, strict=True):
            outputs = run_segment(segment, [values[node] for node in segment.inputs])
            if segment is self.segments[-1]:
                return outputs[-1]
            values = {**values, **dict(zip(segment.outputs, outputs, strict=True))}
            values = {node: value for node, value in values.items() if node in later}
        raise AssertionError("a graph has an output node")


def segmented(graph_module: fx.GraphModule, units: Mapping[int, str]) -> SegmentedGraph:
    """Split a graph into segments.

    Args:
        graph_module: reads the parameters of its children.
        units: the unit of every parameter, by the parameter's id.
    """
    reads = _reads(graph_module)
    runs: list[tuple[str, list[fx.Node]]] = [(ROOT, [])]
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or node in reads.lazy:
            continue
        wanted = {units[parameter] for parameter in reads.of(node)} - {ROOT}
        if wanted and wanted != {runs[-1][0]}:
            runs.append((wanted.pop(), []))
        runs[-1][1].append(node)
    runs = [(unit, nodes) for unit, nodes in runs if nodes]
    needs = [_needs(nodes, reads.lazy) for _, nodes in runs]
    segments = []
    for index, (unit, nodes) in enumerate(runs):
        inside = set(nodes)
        inputs = tuple(node for node in needs[index] if node not in inside)
        later = {node for other in needs[index + 1 :] for node in other}
        outputs = tuple(node for node in nodes if node in later or node.op == "output")
        last = _last(nodes, set(outputs), reads.lazy)
        segments.append(Segment(unit, tuple(nodes), inputs, outputs, last))
    return SegmentedGraph(graph_module, tuple(segments))


@dataclass(frozen=True)
class _Reads:
    """The nodes that compute only from weights, and the parameters that each node reads directly, by id."""

    lazy: frozenset[fx.Node]
    own: Mapping[fx.Node, set[int]]

    def of(self, node: fx.Node) -> set[int]:
        """Return the parameters that a node reads, directly or through nodes that compute only from weights."""
        through = (self.of(source) for source in node.all_input_nodes if source in self.lazy)
        return set(self.own.get(node, ())).union(*through)


def _reads(graph_module: fx.GraphModule) -> _Reads:
    lazy: set[fx.Node] = set()
    own: dict[fx.Node, set[int]] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            attribute = operator.attrgetter(str(node.target))(graph_module)
            inside = attribute.parameters() if isinstance(attribute, nn.Module) else [attribute]
            own[node] = {id(value) for value in inside if isinstance(value, nn.Parameter)}
        sources = node.all_input_nodes
        computed = bool(sources) and all(source in lazy for source in sources)
        if node.op == "get_attr" or (computed and node.op != "output" and not is_impure(node)):
            lazy.add(node)
    return _Reads(frozenset(lazy), own)


def _needs(nodes: Iterable[fx.Node], lazy: frozenset[fx.Node]) -> dict[fx.Node, None]:
    """Return the inputs of these nodes in order, looking through nodes that compute only from weights."""
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


def _last(nodes: list[fx.Node], needed: set[fx.Node], lazy: frozenset[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return by node the values that none of these nodes reads after it, except outputs."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in _needs([node], lazy):
            last[source] = node
        last.setdefault(node, node)
    done: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for value, node in last.items():
        if value not in needed:
            done[node] = (*done.get(node, ()), value)
    return done


class Unit(nn.Module):
    """Holds the modules whose parameters are sharded together. Its forward runs a segment that reads them.

    The modules stay in the user's model: `fully_shard` changes their parameters in place.
    """

    def __init__(self, holders: Iterable[nn.Module]) -> None:
        super().__init__()
        self.holders = nn.ModuleList(holders)

    def forward(self, segment: Segment, interpreter: fx.Interpreter, *values: Any) -> tuple[Any, ...]:
        """Return the segment's outputs. None shares memory with a weight, which is freed when this returns."""
        storages = {local(parameter).untyped_storage()._cdata for parameter in self.parameters()}
        outputs: tuple[Any, ...] = segment.run(interpreter, values)
        outputs = pytree.tree_map_only(torch.Tensor, partial(_own, storages=storages), outputs)
        return outputs


class Shards(nn.Module):
    """All units. Its forward runs a graph, and `rest` holds the modules of the root unit."""

    def __init__(self, units: Mapping[str, Unit], rest: Iterable[nn.Module]) -> None:
        super().__init__()
        self.names = {name: index for index, name in enumerate(units)}
        self.units = nn.ModuleList(units.values())
        self.rest = nn.ModuleList(rest)

    def unit(self, name: str) -> Any:
        """Return the module of a unit, for FSDP."""
        return self if name == ROOT else self.units[self.names[name]]

    def forward(self, graph: SegmentedGraph, interpreter: fx.Interpreter, *inputs: Any) -> Any:
        """Return the value of the graph's output node."""

        def run_segment(segment: Segment, values: list[Any]) -> tuple[Any, ...]:
            if segment.unit == ROOT:
                return segment.run(interpreter, values)
            outputs: tuple[Any, ...] = self.unit(segment.unit)(segment, interpreter, *values)
            return outputs

        return graph.run(inputs, run_segment)


class SplitGraph:
    """Replaces the graph module of a variant: the same call, through the units.

    Args:
        shards: the units that hold the parameters.
        graph: in segments of these units.
        leaves: returns the leaves of a call's arguments, in the order of the placeholders.
        called: called before each run; returns whether other weights are in place, so that branches must add nothing.
    """

    def __init__(
        self,
        shards: Shards,
        graph: SegmentedGraph,
        leaves: Callable[[Any, Any], list[Any]],
        called: Callable[[], bool],
    ) -> None:
        self.shards, self.graph, self.leaves, self.called = shards, graph, leaves, called
        self.branches = [module for module in graph.module.modules() if isinstance(module, Branch)]

    @property
    def rewritten(self) -> list[fx.GraphModule]:
        """The graph before it was split."""
        return [self.graph.module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the graph computes.

        Raises:
            StateError: inside torch.compile.
        """
        if torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback():
            raise StateError(
                "torch.compile: a cascade with sharded weights cannot be compiled. Call it uncompiled", code="sharded"
            )
        return self.graph.module.graph.process_outputs(self.run(self.graph.interpreter, *self.leaves(args, kwargs)))

    def run(self, interpreter: fx.Interpreter, *inputs: Any) -> Any:
        """Return the value of the graph's output node for the leaves of a call's arguments."""
        with resting(self.branches) if self.called() else contextlib.nullcontext():
            try:
                return self.shards(self.graph, interpreter, *inputs)
            except BaseException:
                self.shards.reset_iter_state()  # type: ignore[operator]
                raise


@isolated
def resting(undo: Block, branches: list[Branch]) -> None:
    """Let branches add nothing, by a scale of 0."""
    for branch in branches:
        undo(partial(setattr, branch, "scale", branch.scale))
        branch.scale = 0.0


@isolated
def gathered(undo: Block, shards: Shards, model: nn.Module) -> None:
    """Let methods of the user's model run: they call its modules, not a graph.

    The weights of a block (`layers.3`) are gathered while one of its modules runs, and all others until the end. Every
    rank must call the same modules in the same order.
    """
    modules, depth = dict(model.named_modules()), Counter[str]()  # of nested calls that read a unit

    def call(names: list[str], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            for name in names:
                depth[name] += 1
                with torch.inference_mode(False):  # otherwise FSDP would create its buffers in inference mode
                    shards.unit(name).unshard()
            return function(*args, **kwargs)
        finally:
            for name in names:
                depth[name] -= 1
                if not depth[name]:
                    shards.unit(name).reshard()

    units = {id(held): name for name in shards.names for held in shards.unit(name).parameters()}
    numbered = {name for name in shards.names if _NUMBER.match(f"{name}.")}
    for name in numbered:
        for module in _called(modules[name]):
            if names := sorted({units[id(held)] for held in module.parameters() if id(held) in units} & numbered):
                table, slot = vars(module), "_compiled_call_impl"  # not a hook, see cascade/usage.py
                inner = module._compiled_call_impl
                undo(partial(table.pop, slot) if inner is None else partial(table.update, {slot: inner}))
                table[slot] = partial(call, names, inner or module._call_impl)
    for name in (ROOT, *(name for name in shards.names if name not in numbered)):
        undo(shards.unit(name).reshard)
        with torch.inference_mode(False):
            shards.unit(name).unshard()


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module, or its children if it is only a container."""
    if type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield module
        return
    for child in module.children():
        yield from _called(child)


def _own(value: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """Return a value that is not a view. FSDP puts hooks on it, and the memory of a weight is freed."""
    if local(value).untyped_storage()._cdata in storages:  # a fake tensor has no address
        return value.clone()
    if value.requires_grad and value._base is not None:
        return apply(_NoView, value)
    return value


class _NoView(torch.autograd.Function):
    """`apply(x)`: the same memory, but not a view."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return x, detached."""
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient unchanged."""
        return gradient
