"""What a front end returns: a graph that reads the live model, whose weights are `model.NAME`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.capture.guards import Guards
from lorasc_fx.graph import Record, copy_graph, graph_module_like, retarget, set_record

__all__ = ["OWNER", "Captured", "capture_graph", "check_drew_nothing", "read_live"]


OWNER = "model"


@dataclass(frozen=True)
class Captured:
    """What a front end returns.

    Args:
        module: graph module that reads the live model under `model.`; an empty one where there are pieces.
        frontend: name of the front end that made it.
        guards: raises AssertionError for inputs that this graph is not for; None where it takes what its key takes.
        refused: names and reasons of the front ends that were tried before.
        sizes: of each placeholder that is a tensor, the sizes that are constants of the graph; None for the others.
        pieces: a `Pieces`, from the front end that finds several graphs.
        functions: names of the custom autograd Functions that the model uses.
        whole_elsewhere: whether a whole graph was refused for gradient checkpointing alone, which other modes may lack.
        state: guards on the model's Python state.
        grad: gradient mode of the calls that it is for; None where the model computes the same in both.
        requires_grad: of the leaves of the inputs, where the model asks tensors for it; None where it does not.
    """

    module: fx.GraphModule
    frontend: str
    guards: Callable[..., Any] | None = None
    refused: tuple[tuple[str, str], ...] = field(default=())
    sizes: tuple[tuple[int | None, ...] | None, ...] = ()
    pieces: Any = None
    functions: tuple[str, ...] = ()
    whole_elsewhere: bool = False
    state: Guards | None = None
    grad: bool | None = None
    requires_grad: tuple[bool, ...] | None = None


def read_live(holder: nn.Module, graph: fx.Graph, model: nn.Module, prefix: str = "") -> fx.GraphModule:
    """Return a graph module in which every name of the model is read from the model.

    Args:
        holder: module on which the graph's names resolve now; what is not the model's is taken from it.
        graph: is changed.
        model: the live model.
        prefix: that may stand before the model's names in the graph.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    rest, foreign = nn.Module(), dict[str, str]()

    def rename(node: fx.Node) -> str:
        target = str(node.target)
        region = node.op == "get_attr" and hasattr(holder, target)  # a graph that a higher-order op runs
        name = target.removeprefix(prefix)
        if name in own or (name in modules and not region):
            return f"{OWNER}.{name}"
        if target not in foreign:
            flat = target.replace(".", "_")
            while flat == OWNER or flat in foreign.values():
                flat += "_"
            foreign[target] = flat
            _put(rest, flat, operator.attrgetter(target)(holder))
        return foreign[target]

    retarget(graph, rename)
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


def check_drew_nothing(before: torch.Tensor) -> None:
    """Refuse a trace that has drawn random numbers of torch: no call of its graph would draw others.

    Args:
        before: state of the generator before the trace.

    Raises:
        RuntimeError: it has.
    """
    if not torch.equal(torch.get_rng_state(), before):
        raise RuntimeError("the model draws random numbers in Python, which the graph would hold as constants")


def capture_graph(model: nn.Module, args: Any, kwargs: Any) -> Captured:
    """Return the module's graph, reading the module itself; one graph serves every signature."""
    assert isinstance(model, fx.GraphModule)
    return Captured(read_live(model, copy_graph(model.graph), model), "graph")
