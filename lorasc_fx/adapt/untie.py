"""Ties: equal views of one memory become one parameter, and `CascadeSpec.untie` gives some places a separate copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorasc_fx.cascade.dropped import Joined
from lorasc_fx.errors import SpecError
from lorasc_fx.graph import matches
from lorasc_fx.graph.weights import Memory
from lorasc_fx.parameters import exchange, holders
from lorasc_fx.util.undo import Undo


def settle_ties(model: nn.Module, patterns: Sequence[str], undo: Undo, strict: bool = False) -> Joined:
    """Tie parameters that are equal views of one memory, and untie those that match a pattern.

    Two parameters on one memory (`b.weight.data = a.weight.data`) are one weight, which gets one branch and is written
    once. The first place keeps its object.

    Returns:
        The places that `lorasc_fx.cascade.dropped.DropGuard` restores at the end, with their parameters.

    Raises:
        SpecError: `strict`, and a pattern matches no tied parameter.
    """
    first: dict[Memory, nn.Parameter] = {}
    shared: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        memory = Memory.of(parameter)
        if memory is not None:
            shared[id(parameter)] = first.setdefault(memory, parameter)
    joined = exchange(model, lambda holder: shared.get(id(holder.value)), undo)
    ties = _ties(model) if patterns else []
    for pattern in patterns if strict else ():
        if not any(matches(pattern, names) for tie in ties for names in tie.places.values()):
            tied = "; tied here: " + ", ".join("=".join(names[0] for names in tie.places.values()) for tie in ties[:5])
            raise SpecError(
                f"untie: {pattern!r} means no parameter that is held in two places"
                f"{tied if ties else ', and none here is: leave untie out'}",
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
    """Give each place that matches a pattern a separate, equal parameter. Return the places that changed.

    The first place keeps the shared object. Places that match no pattern stay tied to each other.
    """
    new: dict[_Place, nn.Parameter] = {}
    for tie in ties:
        shared = tie.parameter
        untie = [key for key, names in tie.places.items() if any(matches(pattern, names) for pattern in patterns)]
        tied = [key for key in tie.places if key not in untie]
        for group in [tied, *([key] for key in untie)]:
            if next(iter(tie.places)) not in group:
                untied = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                new |= dict.fromkeys(group, untied)
    exchange(model, lambda holder: new.get((id(holder.module), holder.leaf)), undo)
    return set(new)


_Place = tuple[int, str]
"""Id of a module, and the name under which it holds a parameter."""


@dataclass(frozen=True)
class _Tie:
    """A parameter in several places, with all full names of each place."""

    parameter: nn.Parameter
    places: dict[_Place, tuple[str, ...]]


def _ties(model: nn.Module) -> list[_Tie]:
    """Return every parameter in more than one place."""
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
