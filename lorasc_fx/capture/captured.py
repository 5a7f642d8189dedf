"""What a front end returns: a graph that reads the live model, whose weights are `model.NAME`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.check.guards import Guards
from lorasc_fx.graph import Record, copy_graph, graph_module_like, products_with_weights, retarget, set_record
from lorasc_fx.quantized import QuantizedLinear
from lorasc_fx.util.accelerator import generator_states

OWNER = "model"


@dataclass(frozen=True)
class Conditions:
    """The calls that a graph is for: what it holds as constants of inputs, gradient mode and Python state.

    Args:
        guards: raises AssertionError for inputs, given as their leaves, that the graph is not for; None for no more
            than the key of a call.
        sizes: of each leaf that is a tensor, the sizes that are constants of the graph, and None for each dynamic one;
            None for the other leaves.
        state: guards on the model's Python state.
        grad: gradient mode of the calls; None where the model computes the same in both.
        requires_grad: of each leaf, where the model asks tensors for it; None where it does not.
    """

    guards: Callable[..., Any] | None = None
    sizes: tuple[tuple[int | None, ...] | None, ...] = ()
    state: Guards | None = None
    grad: bool | None = None
    requires_grad: tuple[bool, ...] | None = None

    def accepts_gradients(self, leaves: list[Any]) -> bool:
        """Whether inputs require gradients as those of the graph did; plain enough for dynamo to trace."""
        if self.requires_grad is not None:
            for leaf, expected in zip(leaves, self.requires_grad, strict=True):
                if expected != (isinstance(leaf, torch.Tensor) and leaf.requires_grad):
                    return False
        return True

    def accepts_sizes(self, leaves: list[Any]) -> bool:
        """Whether inputs have the sizes that are constants of the graph, and 2 or more where it is dynamic.

        torch.export takes for granted that a dynamic size is neither 0 nor 1. It keeps no guard for what Python asks
        about these two, so they are captured on their own. Plain enough for dynamo to trace.
        """
        for leaf, sizes in zip(leaves, self.sizes, strict=False):
            if isinstance(leaf, torch.Tensor) and sizes is not None:
                for size, fixed in zip(leaf.shape, sizes, strict=True):
                    if size < 2 if fixed is None else size != fixed:
                        return False
        return True

    def accepts(self, leaves: list[Any]) -> bool:
        """Whether the graph is for inputs of these sizes and gradient flags."""
        if not (self.accepts_gradients(leaves) and self.accepts_sizes(leaves)):
            return False
        if self.guards is None:
            return True
        try:
            self.guards(*leaves)
        except AssertionError:
            return False
        return True

    def refuses_small_sizes(self, leaves: list[Any]) -> bool:
        """Whether inputs have other sizes than the graph, and these are 0 or 1 on one of the two sides."""
        pairs = [
            (size, 2 if fixed is None else fixed)
            for leaf, sizes in zip(leaves, self.sizes, strict=False)
            if isinstance(leaf, torch.Tensor) and sizes is not None
            for size, fixed in zip(leaf.shape, sizes, strict=True)
            if fixed is not None or size < 2
        ]
        other = [min(pair) for pair in pairs if pair[0] != pair[1]]
        return bool(other) and max(other) < 2

    def hold(self, traced: bool = False) -> bool:
        """Whether gradient mode and the model's Python state are those of the graph; `traced` by dynamo."""
        if self.grad is not None and self.grad != torch.is_grad_enabled():
            return False
        return self.state is None or (self.state.hold_traced() if traced else self.state.hold())


@dataclass(frozen=True)
class Captured:
    """What a front end returns.

    Args:
        module: graph module that reads the live model under `model.`; an empty one where there is a fallback.
        frontend: name of the front end that made it.
        conditions: the calls that the graph is for.
        refused: names and reasons of the front ends that were tried before.
        fallback: a `GraphBreakFallback`, from the front end that finds several graphs.
        functions: what only the model's own Python does, see `Preflight`.
        whole_elsewhere: whether a whole graph was refused for gradient checkpointing alone, which other modes may lack.
        reused: whether the graph was captured for another model, or another time.
    """

    module: fx.GraphModule
    frontend: str
    conditions: Conditions = field(default_factory=Conditions)
    refused: tuple[tuple[str, str], ...] = ()
    fallback: Any = None
    functions: tuple[str, ...] = ()
    whole_elsewhere: bool = False
    reused: bool = False


def read_live(holder: nn.Module, graph: fx.Graph, model: nn.Module, prefix: str = "") -> fx.GraphModule:
    """Return a graph module in which every name of the model is read from the model.

    Args:
        holder: module on which the graph's names resolve now; what is not the model's is taken from it.
        graph: is changed.
        model: the live model.
        prefix: that may stand before the model's names in the graph.
    """
    tensors = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    rest, foreign = nn.Module(), dict[str, str]()

    def rename(node: fx.Node) -> str:
        target = str(node.target)
        region = node.op == "get_attr" and hasattr(holder, target)  # a graph that a higher-order op runs
        name = target.removeprefix(prefix)
        if name in tensors or (name in modules and not region):
            return f"{OWNER}.{name}"
        if target not in foreign:
            flat = target.replace(".", "_")
            while flat == OWNER or flat in foreign.values():
                flat += "_"
            foreign[target] = flat
            _put(rest, flat, operator.attrgetter(target)(holder))
        return foreign[target]

    retarget(graph, rename)
    layers = {
        module.key: (f"{OWNER}.{name}", module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    products_with_weights(graph, layers)
    rest._modules[OWNER] = model
    rest.training = model.training
    live = graph_module_like(rest, graph)
    live.meta = {}
    set_record(live, Record(owner=OWNER))
    live.graph.lint()
    return live


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Give a module a child, parameter, buffer or plain attribute."""
    stores = ((nn.Module, module._modules), (nn.Parameter, module._parameters), (torch.Tensor, module._buffers))
    store: Any = next((store for kind, store in stores if isinstance(value, kind)), vars(module))
    store[name] = value


def check_drew_nothing(before: Mapping[str, torch.Tensor]) -> None:
    """Refuse a trace that has drawn random numbers of torch: no call of its graph would draw others.

    Args:
        before: states of the generators before the trace.

    Raises:
        RuntimeError: it has.
    """
    if any(not torch.equal(state, before.get(name, state)) for name, state in generator_states().items()):
        raise RuntimeError("the model draws random numbers in Python, which the graph would hold as constants")


def capture_graph(model: nn.Module, args: Any, kwargs: Any) -> Captured:
    """Return the module's graph, reading the module itself; one graph serves every signature."""
    assert isinstance(model, fx.GraphModule)
    return Captured(read_live(model, copy_graph(model.graph), model), "graph")
