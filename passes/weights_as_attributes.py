"""Make weights attributes of a graph module with the model's names, if they are inputs or have other names.

    %p_fc_weight = placeholder
    %x = placeholder
    %linear = linear(%x, %p_fc_weight)

becomes

    %p_fc_weight = placeholder
    %x = placeholder
    %fc_weight = get_attr[fc.weight]
    %linear = linear(%x, %fc_weight)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import fx, nn

from lorasc_fx.errors import PassError
from lorasc_fx.graph import copy_graph, graph_module_like
from lorasc_fx.graph.editor import retarget, weights_from_inputs
from lorasc_fx.parameters import shallow


def weights_as_attributes(graph_module: fx.GraphModule, inputs: Sequence[Any], model: nn.Module) -> fx.GraphModule:
    """Return a copy of a graph module that reads the parameters of a model as attributes, under the model's names.

    Use this before `MatchSites` if the weights are inputs of the graph, as in `ExportedProgram.graph_module` and in
    graphs of `make_fx` over parameters, or if `make_fx(model)` has named them `_param_constant0` and so on.

    The signature stays the same: the inputs for parameters remain, but nothing reads them.

    Args:
        graph_module: the graph module. It is not changed, and its tensors are shared with the result.
        inputs: the value of each placeholder, in order. Empty if no placeholder is a parameter.
        model: the model that owns the parameters. `inputs` must contain the Parameters themselves, not copies.

    Raises:
        PassError: the number of inputs is wrong, or no input and no attribute is a parameter of the model.
    """
    return with_attributes(graph_module, inputs, {id(value): name for name, value in model.named_parameters()})


def with_attributes(graph_module: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> fx.GraphModule:
    """Do the same as `weights_as_attributes`. `names` is {id of a parameter: its name}."""
    new = graph_module_like(graph_module, copy_graph(graph_module.graph))
    placeholders = [node for node in new.graph.nodes if node.op == "placeholder"]
    if inputs and len(inputs) != len(placeholders):
        raise PassError(
            f"weights_as_attributes: {len(inputs)} inputs were given, but the graph has {len(placeholders)} "
            "placeholders. Give the value of each placeholder, in order, or () if none is a parameter",
            code="input-not-supported",
        )
    values = dict(zip(placeholders, inputs, strict=False))
    values |= {node: attrgetter(node.target)(graph_module) for node in new.graph.nodes if node.op == "get_attr"}
    known_weights = {node: (names[id(value)], value) for node, value in values.items() if id(value) in names}
    if not known_weights:
        raise PassError(
            "weights_as_attributes: no input and no attribute of the graph is a parameter of the model. Pass the "
            "Parameters with which the graph was traced, not copies of them",
            code="input-not-supported",
        )
    weights_from_inputs(new.graph, {node: name for node, (name, _) in known_weights.items() if node in placeholders})
    for node, (name, value) in known_weights.items():
        if node.op == "get_attr":
            new._parameters.pop(node.target, None)
        add_parameter(new, name, value)
    retarget(new.graph, lambda node: known_weights[node][0] if node in known_weights else str(node.target))
    new.recompile()
    return new


def add_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name. Modules on the path are copied, or created if they do not exist."""
    *path, leaf = name.split(".")
    for part in path:
        child = module._modules.get(part)
        module._modules[part] = nn.Module() if child is None else shallow(child)
        module = module._modules[part]  # type: ignore[assignment]
    module._parameters[leaf] = parameter
