"""Copy graphs and graph modules. A copy shares the tensors of the original or has its own."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.graph.record import record_of, strip
from lorasc_fx.graph.weights import owner_of
from lorasc_fx.parameters import shallow


def unshared(module: nn.Module, memo: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a copy of a module tree that shares all tensors. `memo` is {module: copy} for the copies made so far."""
    if module not in memo:
        memo[module] = new = shallow(module)
        for name, child in module._modules.items():
            new._modules[name] = child if child is None else unshared(child, memo)
    return memo[module]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph with the same node names, metadata and calling convention.

    The tracer class is not copied. Unpickling a GraphModule would trace with it, and the tracers of the front ends do
    not support that.
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
    # Some graphs read plain attributes, such as a tensor that is neither a parameter nor a buffer.
    named = {str(node.target).partition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for name in named & set(vars(original)) - set(vars(new)):
        setattr(new, name, getattr(original, name))
    new.meta = dict(getattr(original, "meta", {}))
    new.training = original.training
    new.graph = graph
    return new


def standalone_copy(source: fx.GraphModule, values: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """Return a graph module that owns copies of the weights, under the names that they have in the model.

    Args:
        source: graph module that reads the weights of a live model, which is its child.
        values: {name of a parameter or buffer of the model: new value}. Others keep their current value.
    """
    record = record_of(source)
    graph, model = copy_graph(source.graph), owner_of(source, record)
    memo: dict[int, Any] = {}
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        value = values.get(name, tensor).detach().clone()
        copied = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        memo.setdefault(id(tensor), copied)
    # Copy every attribute and module that the graph reads. `memo` makes deepcopy use the new values.
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            attribute = operator.attrgetter(node.target)(source)
            node.target = node.target.removeprefix(record.prefix)
            attributes[node.target] = copy.deepcopy(attribute, memo)
    new = fx.GraphModule(attributes, graph, type(model).__name__)
    new.training = source.training
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._non_persistent_buffers_set:
            with contextlib.suppress(AttributeError):  # the graph may not use this module
                new.get_submodule(path)._non_persistent_buffers_set.add(name)
    strip(new)
    for node in new.graph.nodes:
        node.meta.pop("from_node", None)
    return new
