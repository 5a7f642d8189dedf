"""Copies of graphs and graph modules, which share tensors with the original or have their own constants."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.graph.record import strip
from lorasc_fx.parameters import shallow


def unshared(module: nn.Module, memo: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a shallow copy of a module and of all its submodules. A shared submodule stays shared."""
    if module not in memo:
        memo[module] = new = shallow(module)
        for name, child in module._modules.items():
            new._modules[name] = child if child is None else unshared(child, memo)
    return memo[module]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph, with names, metadata and calling convention.

    The tracer's class is not copied: unpickling would trace with it, and the tracer of a front end cannot do that.
    """
    new = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = new.graph_copy(graph, copied, return_output_node=True)
    if isinstance(result, tuple):
        value, old = result
        new.output(value, type_expr=old.type).meta = copy.copy(old.meta)
    new._codegen = graph._codegen
    return new


def graph_module_like(original: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a graph module of this graph that shares the original's children, tensors and attributes."""
    new = fx.GraphModule(nn.Module(), fx.Graph())
    for store in ("_modules", "_parameters", "_buffers"):
        getattr(new, store).update(getattr(original, store))
    new._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
    named = {str(node.target).partition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for name in named & set(vars(original)) - set(vars(new)):
        setattr(new, name, getattr(original, name))
    new.meta = dict(getattr(original, "meta", {}))
    new.training = original.training
    new.graph = graph
    return new


def own_copy(live: fx.GraphModule, owner: str, values: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """Return a plain graph module with the model's names and copies of all tensors.

    Args:
        live: reads its weights from the child `owner`.
        owner: name of that child.
        values: other values of the owner's parameters and buffers, by name.
    """
    graph, model = copy_graph(live.graph), live.get_submodule(owner)
    memo: dict[int, Any] = {}
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        value = values.get(name, tensor).detach().clone()
        copied = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        memo.setdefault(id(tensor), copied)
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            attribute = operator.attrgetter(node.target)(live)
            node.target = node.target.removeprefix(f"{owner}.")
            attributes[node.target] = copy.deepcopy(attribute, memo)
    folded = fx.GraphModule(attributes, graph, type(model).__name__)
    folded.training = live.training
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._non_persistent_buffers_set:
            with contextlib.suppress(AttributeError):  # the graph may not read it
                folded.get_submodule(path)._non_persistent_buffers_set.add(name)
    strip(folded)
    for node in folded.graph.nodes:
        node.meta.pop("from_node", None)
    return folded
