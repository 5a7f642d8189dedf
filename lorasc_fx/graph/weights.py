"""The weights of a graph module by their own names: the live model's if a child owns them, else the module's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch
from lorasc_fx.graph.record import Record

__all__ = ["BRANCHES", "Weights", "held_branches", "named_weights"]

BRANCHES = "branches"
"""Name of the child that holds the branches; it is not the model's."""


@dataclass(frozen=True)
class Weights:
    """Parameters by name, each once, with all names of each.

    Args:
        parameters: by their first name.
        names: of each parameter, all its names, the first one first.
        canonical: the first name of every name.
    """

    parameters: dict[str, nn.Parameter]
    names: dict[str, tuple[str, ...]]
    canonical: dict[str, str]

    @property
    def matrices(self) -> dict[str, tuple[str, ...]]:
        """Names of the weight matrices: parameters of two axes or more."""
        return {name: names for name, names in self.names.items() if self.parameters[name].dim() > 1}


def named_weights(owner: nn.Module) -> Weights:
    """Return the parameters of a module, those of inserted branches left out."""
    first: dict[int, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    names: dict[str, list[str]] = {}
    canonical: dict[str, str] = {}
    ours = f"{BRANCHES}." if isinstance(owner, fx.GraphModule) and held_branches(owner) is not None else None
    for name, parameter in owner.named_parameters(remove_duplicate=False):
        if ours is not None and name.startswith(ours):
            continue
        own = first.setdefault(id(parameter), name)
        parameters.setdefault(own, parameter)
        names.setdefault(own, []).append(name)
        canonical[name] = own
    return Weights(parameters, {own: tuple(all_names) for own, all_names in names.items()}, canonical)


def held_branches(graph_module: nn.Module) -> dict[str, Branch] | None:
    """Return the branches that a graph module holds, by key; None if it has no child for them, or one of its own.

    A graph module that was made of another by its graph has a plain module in place of our dictionary.
    """
    holder = graph_module._modules.get(BRANCHES)
    if type(holder) not in (nn.ModuleDict, nn.Module) or holder is None or holder._parameters or holder._buffers:
        return None
    found = {key: each for key, each in holder._modules.items() if isinstance(each, Branch)}
    return found if len(found) == len(holder._modules) and (found or isinstance(holder, nn.ModuleDict)) else None


def owner_of(graph_module: fx.GraphModule, record: Record) -> nn.Module:
    """Return the module that owns the weights which the graph reads."""
    return graph_module.get_submodule(record.owner) if record.owner else graph_module


def module_at(root: nn.Module, target: str) -> nn.Module | None:
    """Return the module of this dotted name, or None."""
    found: nn.Module | None = root
    for part in target.split("."):
        found = found._modules.get(part) if found is not None else None
    return found


def tensor_at(root: nn.Module, target: str) -> torch.Tensor | None:
    """Return the tensor of this dotted name, or None."""
    holder, _, leaf = target.rpartition(".")
    module = module_at(root, holder) if holder else root
    value = getattr(module, leaf, None) if module is not None else None
    return value if isinstance(value, torch.Tensor) else None
