"""Ties: equal views of one memory become one parameter; `CascadeSpec.untie` gives some places a copy of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from lorasc_fx.errors import SpecError
from lorasc_fx.graph import Memory, matches
from lorasc_fx.runtime.cascade import Joined
from lorasc_fx.undo import Undo

__all__ = ["settle_ties"]


@dataclass(frozen=True)
class _Holder:
    """A module that holds a parameter under a leaf name, and the full names that lead there."""

    module: nn.Module
    leaf: str
    names: tuple[str, ...]


def settle_ties(model: nn.Module, patterns: Sequence[str], undo: Undo, strict: bool = False) -> Joined:
    """Make a tie of parameters that are equal views of one memory, and untie what the patterns mean.

    Two parameters on one memory (`b.weight.data = a.weight.data`) are one weight: it gets one branch, and is written
    once. The first place keeps its object.

    Returns:
        What `lorasc_fx.runtime.cascade.give_back` needs at the end.

    Raises:
        SpecError: `strict`, and a pattern means no tied parameter.
    """
    first: dict[Memory, nn.Parameter] = {}
    joined = []
    for module in model.modules():
        for leaf, value in list(module._parameters.items()):
            if value is None or (place := Memory.of(value)) is None:
                continue
            shared = first.setdefault(place, value)
            if shared is not value:
                undo(partial(setattr, module, leaf, value))
                setattr(module, leaf, shared)
                joined.append((module, leaf, value, shared))
    if strict:
        _check_untie(model, patterns)
    _untie(model, patterns, undo)
    return tuple((module, leaf, value) for module, leaf, value, own in joined if module._parameters[leaf] is own)


def _check_untie(model: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse a pattern that means no tied parameter.

    Raises:
        SpecError: the pattern, and what it means.
    """
    ties = _ties(model)
    for pattern in patterns:
        if not any(matches(pattern, holder.names) for tie in ties for holder in tie):
            told = "; tied here: " + ", ".join("=".join(holder.names[0] for holder in tie) for tie in ties[:5])
            raise SpecError(
                f"untie: {pattern!r} means no parameter that is held in two places"
                f"{told if ties else ', and none here is: leave untie out'}",
                code="not-tied",
            )


def _untie(model: nn.Module, patterns: Sequence[str], undo: Undo) -> None:
    """Give each place that a pattern means a parameter of its own, equal to the shared one.

    The first place keeps the shared object; places that no pattern means stay tied to each other.
    """
    for tie in _ties(model) if patterns else ():
        shared = tie[0].module._parameters[tie[0].leaf]
        assert shared is not None
        apart = [holder for holder in tie if any(matches(pattern, holder.names) for pattern in patterns)]
        rest = [holder for holder in tie if holder not in apart]
        for group in [rest, *([holder] for holder in apart)]:
            if not group or tie[0] in group:
                continue
            own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
            for holder in group:
                undo(partial(holder.module._parameters.__setitem__, holder.leaf, shared))
                holder.module._parameters[holder.leaf] = own


def _ties(model: nn.Module) -> list[list[_Holder]]:
    """Return the places of every parameter that is held in more than one."""
    names: dict[tuple[int, str], list[str]] = {}
    places: dict[int, dict[tuple[int, str], nn.Module]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault((id(module), leaf), []).append(f"{prefix}.{leaf}".lstrip("."))
                places.setdefault(id(parameter), {})[id(module), leaf] = module
    return [
        [_Holder(module, leaf, tuple(names[place, leaf])) for (place, leaf), module in held.items()]
        for held in places.values()
        if len(held) > 1
    ]
