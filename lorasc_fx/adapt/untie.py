"""Tied parameters: make equal views of one memory one parameter, and give the places in `CascadeSpec.untie` a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorasc_fx.cascade.guards import Joined
from lorasc_fx.errors import SpecError
from lorasc_fx.graph import matches
from lorasc_fx.graph.weights import Memory
from lorasc_fx.parameters import exchange, holders
from lorasc_fx.util.undo import Undo


def settle_ties(model: nn.Module, patterns: Sequence[str], undo: Undo, strict: bool = False) -> Joined:
    """Tie parameters that are equal views of one memory, and untie the parameters that match a pattern.

    Two parameters with the same memory (`b.weight.data = a.weight.data`) are one weight: it gets one branch, and is
    written once. So both modules get the Parameter object of the first one.

    Args:
        model: the model to change.
        patterns: patterns of the places to untie.
        undo: restores the model.
        strict: whether each pattern must match a tied parameter.

    Returns:
        Module, attribute name and original parameter of each place that was tied. `release` restores them.

    Raises:
        SpecError: a pattern matches no tied parameter, and `strict` is set.
    """
    by_memory: dict[Memory, nn.Parameter] = {}
    shared: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        memory = Memory.of(parameter)
        if memory is not None:
            shared[id(parameter)] = by_memory.setdefault(memory, parameter)
    joined = exchange(model, lambda holder: shared.get(id(holder.value)), undo)
    ties = _ties(model) if patterns else []
    for pattern in patterns if strict else ():
        if not any(matches(pattern, names) for tie in ties for names in tie.places.values()):
            tied = ", ".join("=".join(names[0] for names in tie.places.values()) for tie in ties[:5])
            raise SpecError(
                f"untie: {pattern!r} matches no tied parameter. "
                f"{f'Tied are: {tied}' if ties else 'The model has no tied parameters: leave untie out'}",
                code="unknown-target",
            )
    untied = _untie(model, ties, patterns, undo)
    return tuple(
        (holder.module, holder.leaf, holder.value)
        for holder in joined
        if isinstance(holder.value, nn.Parameter) and holder.store is holder.module._parameters
        if (id(holder.module), holder.leaf) not in untied
    )


def _untie(model: nn.Module, ties: Sequence[_Tie], patterns: Sequence[str], undo: Undo) -> set[_Place]:
    """Give each place that matches a pattern a separate copy of the parameter. Return the places that changed.

    Places that match no pattern stay tied to each other. The first place keeps the original object.
    """
    new: dict[_Place, nn.Parameter] = {}
    for tie in ties:
        shared = tie.parameter
        untie = [key for key, names in tie.places.items() if any(matches(pattern, names) for pattern in patterns)]
        tied = [key for key in tie.places if key not in untie]
        for group in [tied, *([key] for key in untie)]:
            if next(iter(tie.places)) not in group:  # the group with the first place keeps the object
                untied = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                new |= dict.fromkeys(group, untied)
    exchange(model, lambda holder: new.get((id(holder.module), holder.leaf)), undo)
    return set(new)


_Place = tuple[int, str]
"""Id of a module, and the attribute name of its parameter."""


@dataclass(frozen=True)
class _Tie:
    """A parameter with several places in a model."""

    parameter: nn.Parameter
    places: dict[_Place, tuple[str, ...]]  # the full names of each place: several if its module is registered twice


def _ties(model: nn.Module) -> list[_Tie]:
    """Return the parameters that have several places."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    ties: dict[int, _Tie] = {}
    for holder in holders(model):
        if isinstance(holder.value, nn.Parameter) and holder.store is holder.module._parameters:
            names = tuple(f"{path}.{holder.leaf}".lstrip(".") for path in paths[id(holder.module)])
            tie = ties.setdefault(id(holder.value), _Tie(holder.value, {}))
            tie.places[id(holder.module), holder.leaf] = names
    return [tie for tie in ties.values() if len(tie.places) > 1]
