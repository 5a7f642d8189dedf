"""What a front end returns: a graph that reads the live model, whose weights are `model.NAME`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.check.guards import Guards
from lorasc_fx.graph import Record, copy_graph, graph_module_like, set_record
from lorasc_fx.graph.editor import products_with_weights, retarget
from lorasc_fx.quantized import QuantizedLinear
from lorasc_fx.util.accelerator import generator_states

OWNER = "model"
"""Name of the child of a graph module that is the live model."""

Axis = tuple[int, int]
"""Index of an input among the leaves of the arguments, and one of its axes."""


@dataclass(frozen=True)
class FrontEnd:
    """One way to get graphs of a model.

    Args:
        name: as the option `frontend` and checkpoints spell it.
        trace: returns the graph of a call (model, args, kwargs, dynamic). It may raise anything.
        whole: whether it returns one graph of the whole model, to be compared with the model. Otherwise it returns a
            `GraphBreakFallback`: several graphs with Python in between.
        sees_inside: whether it traces into modules of torch.nn. If not, a weight in one of them may stay hidden.
        serves_all_calls: whether one graph serves every call, whatever its inputs.
    """

    name: str
    trace: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Collection[Axis]], Captured]
    whole: bool = True
    sees_inside: bool = True
    serves_all_calls: bool = False


@dataclass(frozen=True)
class Conditions:
    """The calls that a graph is valid for: what it holds as constants, the gradient mode, and the Python state.

    Args:
        guards: takes the leaves of the arguments and raises AssertionError if the graph is not valid for them.
        sizes: for each tensor leaf its sizes, with None for a dynamic one; None for a leaf that is no tensor. Empty if
            the graph holds no sizes.
        asked: the axes that were asked to be dynamic. Some may be constant all the same.
        state: guards on the model's Python state.
        grad: gradient mode of the calls; None if the model computes the same in both.
        requires_grad: the flag of each leaf, if the model asks tensors for it.
    """

    guards: Callable[..., Any] | None = None
    sizes: tuple[tuple[int | None, ...] | None, ...] = ()
    asked: frozenset[Axis] = frozenset()
    state: Guards | None = None
    grad: bool | None = None
    requires_grad: tuple[bool, ...] | None = None

    def accepts_gradients(self, leaves: list[Any]) -> bool:
        """Whether the inputs require gradients as those of the capture did. Simple enough for dynamo to trace."""
        if self.requires_grad is not None:
            for leaf, expected in zip(leaves, self.requires_grad, strict=True):
                if expected != (isinstance(leaf, torch.Tensor) and leaf.requires_grad):
                    return False
        return True

    def accepts_sizes(self, leaves: list[Any]) -> bool:
        """Whether the inputs have the constant sizes of the graph, and 2 or more where it is dynamic.

        torch.export assumes that a dynamic size is neither 0 nor 1, and keeps no guard for it. Such calls are captured
        on their own. Simple enough for dynamo to trace.
        """
        # Not strict: `sizes` is empty if the graph holds no sizes.
        for leaf, sizes in zip(leaves, self.sizes, strict=False):
            if isinstance(leaf, torch.Tensor) and sizes is not None:
                for size, fixed in zip(leaf.shape, sizes, strict=True):
                    if size < 2 if fixed is None else size != fixed:
                        return False
        return True

    def assert_sizes(self, proxies: list[Any]) -> None:
        """Let a graph that torch.fx traces raise AssertionError for inputs of other sizes than this one holds."""
        for proxy, sizes in zip(proxies, self.sizes, strict=False):
            for axis, fixed in enumerate(sizes or ()):
                if fixed is not None and isinstance(proxy, fx.Proxy):
                    message = f"the graph was traced for size {fixed} of axis {axis} of {proxy}"
                    size: Any = proxy.size(axis)
                    torch._assert(size == fixed, message)

    def accepts(self, leaves: list[Any]) -> bool:
        """Whether the graph is valid for inputs of these sizes and gradient flags."""
        if not (self.accepts_gradients(leaves) and self.accepts_sizes(leaves)):
            return False
        if self.guards is None:
            return True
        try:
            self.guards(*leaves)
        except AssertionError:
            return False
        return True

    def other_axes(self, leaves: list[Any]) -> set[Axis]:
        """Return the axes that are dynamic here, or have another size in these inputs, both sizes being 2 or more."""
        return {
            (index, axis)
            for index, (leaf, sizes) in enumerate(zip(leaves, self.sizes, strict=False))
            if isinstance(leaf, torch.Tensor) and sizes is not None
            for axis, (size, fixed) in enumerate(zip(leaf.shape, sizes, strict=True))
            if size > 1 and (fixed is None or (fixed > 1 and size != fixed))
        }

    def hold(self, traced: bool = False) -> bool:
        """Whether gradient mode and Python state are as at the capture; `traced` while dynamo traces this."""
        if self.grad is not None and self.grad != torch.is_grad_enabled():
            return False
        return self.state is None or (self.state.hold_traced() if traced else self.state.hold())


@dataclass(frozen=True)
class Captured:
    """What a front end returns, completed by `capture`.

    Args:
        module: graph module that reads the live model under `model.`. An empty one if there is a fallback.
        frontend: the front end that made it.
        conditions: the calls that the graph is valid for.
        refused: names and reasons of the front ends that failed before.
        fallback: a `GraphBreakFallback`, if the front end finds several graphs.
        own_backward: whether the model has backward code of its own, such as a custom autograd.Function.
        whole_elsewhere: whether only gradient checkpointing ruled out a whole graph. In another mode it may be off.
        drop_cached: drops the graph from the cache that it was taken from; None for a new graph.
        known: what the cache holds of a new graph.
    """

    module: fx.GraphModule
    frontend: FrontEnd
    conditions: Conditions = field(default_factory=Conditions)
    refused: tuple[tuple[str, str], ...] = ()
    fallback: Any = None
    own_backward: bool = False
    whole_elsewhere: bool = False
    drop_cached: Callable[[], None] | None = None
    known: Any = None


def read_live(holder: nn.Module, graph: fx.Graph, model: nn.Module, prefix: str = "") -> fx.GraphModule:
    """Return a graph module that reads everything that belongs to the model from the live model.

    Args:
        holder: module in which the graph's names resolve now. What does not belong to the model is taken from it.
        graph: is changed in place.
        model: the live model.
        prefix: of the model's names in the graph, if they have one.
    """
    tensors = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    new, foreign = nn.Module(), dict[str, str]()

    def rename(node: fx.Node) -> str:
        target = str(node.target)
        region = node.op == "get_attr" and hasattr(holder, target)  # the body of a higher-order op
        name = target.removeprefix(prefix)
        if name in tensors or (name in modules and not region):
            return f"{OWNER}.{name}"
        if target not in foreign:
            flat = target.replace(".", "_")  # a holder of constants has no children
            while flat == OWNER or flat in foreign.values():
                flat += "_"
            foreign[target] = flat
            _put(new, flat, operator.attrgetter(target)(holder))
        return foreign[target]

    retarget(graph, rename)
    # A tracer recorded the product of a quantized layer as an opaque op with the key of its module. Read the weight.
    layers = {
        module.key: (f"{OWNER}.{name}", module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    products_with_weights(graph, layers)
    live = with_owner(new, graph, model)
    live.graph.lint()
    return live


def with_owner(holder: nn.Module, graph: fx.Graph, model: nn.Module) -> fx.GraphModule:
    """Return a graph module with the tensors and modules of a holder, and the live model as its owner."""
    holder._modules[OWNER] = model
    holder.training = model.training
    live = graph_module_like(holder, graph)
    live.meta = {}
    set_record(live, Record(owner=OWNER))
    return live


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Give a module a child, parameter, buffer or plain attribute."""
    # The order matters: a Parameter is a Tensor.
    stores = ((nn.Module, module._modules), (nn.Parameter, module._parameters), (torch.Tensor, module._buffers))
    store: Any = next((store for kind, store in stores if isinstance(value, kind)), vars(module))
    store[name] = value


def check_drew_nothing(before: Mapping[str, torch.Tensor]) -> None:
    """Raise RuntimeError if a trace has drawn random numbers: every call of its graph would repeat them.

    Args:
        before: states of torch's generators before the trace.
    """
    if any(not torch.equal(state, before.get(name, state)) for name, state in generator_states().items()):
        raise RuntimeError("the model draws random numbers in Python, which the graph would hold as constants")


def _capture_graph(model: nn.Module, args: Any, kwargs: Any, dynamic: Collection[Axis]) -> Captured:
    """Return the graph of a graph module, reading the module itself."""
    assert isinstance(model, fx.GraphModule)
    return Captured(read_live(model, copy_graph(model.graph), model), GRAPH_MODULE)


GRAPH_MODULE = FrontEnd("graph", _capture_graph, serves_all_calls=True)
"""For a model that is a graph already."""
