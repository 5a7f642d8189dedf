"""The result of a front end: a graph that contains no weights, but reads them from the user's model.

The model itself is a child of the graph module, under the name `model`. So a node that reads a weight is
`get_attr[target=model.NAME]`, and always reads the current value.
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
"""An axis of an input, as (index of the input among the pytree leaves of the arguments, axis)."""


@dataclass(frozen=True)
class FrontEnd:
    """A way to run a model.

    Args:
        name: the spelling in the option `frontend` and in checkpoints.
        serves_all_calls: whether one capture computes every call, with any inputs.
    """

    name: str
    serves_all_calls: bool = False


EXPORT = FrontEnd("export")
"""Run the graph of torch.export."""
EAGER = FrontEnd("eager", serves_all_calls=True)
"""Run the model without a graph. Its modules read adapted weights."""
GRAPH_MODULE = FrontEnd("graph", serves_all_calls=True)
"""Run the graph of the user's model, which is a GraphModule."""


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a graph is valid for a call.

    Args:
        guards: function of the leaves of the arguments that raises AssertionError if a guard of torch.export fails.
        sizes: one item per leaf: the shape of a tensor, with None for each dynamic size, or None for any other leaf.
            Empty if the graph does not depend on sizes.
        requested: the axes that were requested to be dynamic. The tracer may have made some of them constant.
        state: guards on the model's Python state.
        grad: gradient mode of the calls. None if the model computes the same with and without gradients.
        requires_grad: expected `requires_grad` of each leaf. None if the model does not read these flags.
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

        torch.export assumes that a dynamic size is neither 0 nor 1, and adds no guard for that. So a call with a size
        of 0 or 1 gets a separate graph. Dynamo traces this method, so it uses simple loops only.
        """
        # Not strict: `sizes` is empty if the graph does not depend on sizes.
        for leaf, sizes in zip(leaves, self.sizes, strict=False):
            if isinstance(leaf, torch.Tensor) and sizes is not None:
                for size, fixed in zip(leaf.shape, sizes, strict=True):
                    if size < 2 if fixed is None else size != fixed:
                        return False
        return True

    def accepts(self, leaves: list[object]) -> bool:
        """Whether the graph is valid for these inputs, by their sizes, requires_grad flags and the export guards."""
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
        """Return the axes that are dynamic in this graph, or whose constant size differs from the size in these inputs.

        Axes of size 0 or 1 are left out, because a dynamic size does not cover these sizes.
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
            traced: whether dynamo traces this call. If so, only state that dynamo can compare is checked.
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
        refused: (("export", reason),) if torch.export was tried and failed, otherwise empty.
        only_recomputes: whether gradient checkpointing is the only reason against a graph. Then calls in eval mode may
            have a graph, because models often checkpoint in train mode only.
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
        holder: the module that has the attributes and modules to which the targets of the graph refer.
        graph: the graph, which is changed in place.
        model: the user's model.
        prefix: prefix of the targets that the names in the model do not have.
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
    # The tracer recorded the product of a quantized layer as an opaque op, with the key of the layer as an argument.
    # Replace the op by one that takes the weight, so that matching finds the weight.
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
    """Store a value in a module. Its type decides whether it is a child, parameter, buffer or plain attribute."""
    # A Parameter is a Tensor too, so it must come first.
    stores = ((nn.Module, module._modules), (nn.Parameter, module._parameters), (torch.Tensor, module._buffers))
    store: Any = next((store for kind, store in stores if isinstance(value, kind)), vars(module))
    store[name] = value


def check_no_random_draws(before: Mapping[str, torch.Tensor]) -> None:
    """Raise RuntimeError if a trace has drawn random numbers: the graph would repeat the same numbers in every call.

    Args:
        before: {name of a generator of torch: its state before the trace}.
    """
    if any(not torch.equal(state, before.get(name, state)) for name, state in generator_states().items()):
        raise RuntimeError("the model draws random numbers in Python, which the graph would hold as constants")


def captured_graph(model: fx.GraphModule) -> Captured:
    """Return the capture of a GraphModule: a copy of its graph, which reads the weights of the original."""
    return Captured(read_live(model, copy_graph(model.graph), model), GRAPH_MODULE)
