"""The result of a front end: a graph without weights, which reads them from the user's model.

The model itself is a child of the graph module, under the name `model`. So a node that reads a weight is
`get_attr[target=model.NAME]`, and always sees the current value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.check.guards import Guards
from lorasc_fx.graph import Record, copy_graph, graph_module_like, set_record
from lorasc_fx.graph.editor import products_with_weights, retarget
from lorasc_fx.quantized import QuantizedLinear
from lorasc_fx.util.environment import generator_states

OWNER = "model"
"""Name under which a graph module holds the user's model as a child."""

Axis = tuple[int, int]
"""An axis of an input: the input's index among the pytree leaves of the arguments, and the axis."""


@dataclass(frozen=True)
class FrontEnd:
    """A way to run a model.

    Args:
        name: the spelling in the option `frontend` and in checkpoints.
        serves_all_calls: whether it computes every call, whatever its inputs.
    """

    name: str
    serves_all_calls: bool = False


EXPORT = FrontEnd("export")
"""As a graph of torch.export."""
EAGER = FrontEnd("eager", serves_all_calls=True)
"""Eagerly, without a graph. Its modules read adapted weights."""
GRAPH_MODULE = FrontEnd("graph", serves_all_calls=True)
"""As the graph that the user brings, if the model is a GraphModule."""


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a graph is valid for a call.

    Args:
        guards: the guards of torch.export. Takes the leaves of the arguments, and raises AssertionError if they fail.
        sizes: the shape of each tensor leaf, with None for a dynamic size, and None for any other leaf. Empty if the
            graph does not depend on sizes.
        requested: the axes that the capture was to make dynamic. The tracer may have made some of them constant.
        state: guards on the model's Python state.
        grad: gradient mode of the calls; None if the model computes the same in both.
        requires_grad: expected flag of each leaf; None if the model does not read these flags.
    """

    guards: Callable[..., Any] | None = None
    sizes: tuple[tuple[int | None, ...] | None, ...] = ()
    requested: frozenset[Axis] = frozenset()
    state: Guards | None = None
    grad: bool | None = None
    requires_grad: tuple[bool, ...] | None = None

    def accepts_gradients(self, leaves: list[object]) -> bool:
        """Whether the inputs have the same requires_grad flags as at the capture.

        Dynamo traces this method, so it uses simple loops only.
        """
        if self.requires_grad is not None:
            for leaf, expected in zip(leaves, self.requires_grad, strict=True):
                if expected != (isinstance(leaf, torch.Tensor) and leaf.requires_grad):
                    return False
        return True

    def accepts_sizes(self, leaves: list[object]) -> bool:
        """Whether the inputs have the constant sizes of the graph, and at least 2 for each dynamic size.

        torch.export assumes that a dynamic size is neither 0 nor 1, and adds no guard for that. A call with such a size
        therefore gets a separate graph. Dynamo traces this method, so it uses simple loops only.
        """
        # Not strict: `sizes` is empty if the graph does not depend on sizes.
        for leaf, sizes in zip(leaves, self.sizes, strict=False):
            if isinstance(leaf, torch.Tensor) and sizes is not None:
                for size, fixed in zip(leaf.shape, sizes, strict=True):
                    if size < 2 if fixed is None else size != fixed:
                        return False
        return True

    def accepts(self, leaves: list[object]) -> bool:
        """Whether the graph is valid for these inputs: their sizes, requires_grad flags and the export guards."""
        if not (self.accepts_gradients(leaves) and self.accepts_sizes(leaves)):
            return False
        if self.guards is None:
            return True
        try:
            self.guards(*leaves)
        except AssertionError:
            return False
        return True

    def varying_axes(self, leaves: list[object]) -> set[Axis]:
        """Return the axes that are dynamic in this graph, or whose constant size differs from these inputs.

        Sizes of 0 and 1 do not count, because a dynamic size does not cover them.
        """
        return {
            (index, axis)
            for index, (leaf, sizes) in enumerate(zip(leaves, self.sizes, strict=False))
            if isinstance(leaf, torch.Tensor) and sizes is not None
            for axis, (size, fixed) in enumerate(zip(leaf.shape, sizes, strict=True))
            if size > 1 and (fixed is None or (fixed > 1 and size != fixed))
        }

    def hold(self, traced: bool = False) -> bool:
        """Whether gradient mode and Python state are the same as at the capture.

        Args:
            traced: whether dynamo traces this call. Then only state that dynamo can compare is checked.
        """
        if self.grad is not None and self.grad != torch.is_grad_enabled():
            return False
        return self.state is None or (self.state.hold_traced() if traced else self.state.hold())


@dataclass(frozen=True)
class Captured:
    """The result of a capture.

    Args:
        module: graph module that reads the weights as `model.NAME`. None if the model runs eagerly.
        frontend: how the model runs.
        conditions: the calls that the graph is valid for.
        refused: ("export", reason) if torch.export was tried and failed.
        only_recomputes: whether gradient checkpointing alone ruled out a graph. In eval mode it may be off, and a graph
            possible.
    """

    module: fx.GraphModule | None
    frontend: FrontEnd
    conditions: Conditions = field(default_factory=Conditions)
    refused: tuple[tuple[str, str], ...] = ()
    only_recomputes: bool = False


def read_live(holder: nn.Module, graph: fx.Graph, model: nn.Module, prefix: str = "") -> fx.GraphModule:
    """Return a graph module that reads parameters, buffers and submodules from the model, as `model.NAME`.

    For example, `get_attr[target=fc.weight]` becomes `get_attr[target=model.fc.weight]`. Constants that the tracer
    added are moved to the new graph module.

    Args:
        holder: the module in which the targets of the graph resolve.
        graph: is changed in place.
        model: the user's model.
        prefix: removed from the targets to get the names in the model.
    """
    tensors = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    constants, names_of_constants = nn.Module(), dict[str, str]()

    def rename(node: fx.Node) -> str:
        target = str(node.target)
        # A higher-order op (torch.cond) reads its body as an attribute. The body may be called like a module.
        is_body = node.op == "get_attr" and hasattr(holder, target)
        name = target.removeprefix(prefix)
        if name in tensors or (name in modules and not is_body):
            return f"{OWNER}.{name}"
        if target not in names_of_constants:
            flat = target.replace(".", "_")  # constants are stored without submodules
            while flat == OWNER or flat in names_of_constants.values():
                flat += "_"
            names_of_constants[target] = flat
            _put(constants, flat, operator.attrgetter(target)(holder))
        return names_of_constants[target]

    retarget(graph, rename)
    # The tracer recorded the product of a quantized layer as an opaque op that has the key of the layer. Replace it by
    # an op that takes the weight, so that branches can be matched with it.
    layers = {
        module.key: (f"{OWNER}.{name}", module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    products_with_weights(graph, layers)
    module = with_owner(constants, graph, model)
    module.graph.lint()
    return module


def with_owner(holder: nn.Module, graph: fx.Graph, model: nn.Module) -> fx.GraphModule:
    """Return a graph module that has the tensors and modules of `holder`, and the model as its child `model`."""
    holder._modules[OWNER] = model
    holder.training = model.training
    module = graph_module_like(holder, graph)
    set_record(module, Record(owner=OWNER))
    return module


def _put(module: nn.Module, name: str, value: object) -> None:
    """Store a value in a module as a child, parameter, buffer or plain attribute, by its type."""
    # A Parameter is a Tensor too, so it must come first.
    stores = ((nn.Module, module._modules), (nn.Parameter, module._parameters), (torch.Tensor, module._buffers))
    store: Any = next((store for kind, store in stores if isinstance(value, kind)), vars(module))
    store[name] = value


def check_no_random_draws(before: Mapping[str, torch.Tensor]) -> None:
    """Raise RuntimeError if a trace has drawn random numbers: the graph would repeat the same numbers in every call.

    Args:
        before: states of torch's generators before the trace.
    """
    if any(not torch.equal(state, before.get(name, state)) for name, state in generator_states().items()):
        raise RuntimeError("the model draws random numbers in Python, which the graph would hold as constants")


def captured_graph(model: fx.GraphModule) -> Captured:
    """Return a copy of the graph of a GraphModule, which reads the weights of that GraphModule."""
    return Captured(read_live(model, copy_graph(model.graph), model), GRAPH_MODULE)
