"""What a cascade tells of itself: plan, sites, refusals, placements, and all of it as text."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorasc_fx.plan import Plan, Refusal, Site
from lorasc_fx.runtime.core import Core
from lorasc_fx.runtime.summary import summary
from lorasc_fx.runtime.variants import Variants

__all__ = ["Described"]


class Described(nn.Module):
    """The part of a cascade that only reads."""

    model: nn.Module
    core: Core
    _variants: Variants
    _refusals: tuple[Refusal, ...]
    _unreached: tuple[str, ...]
    _frontend: str
    _example: tuple[tuple[Any, ...], dict[str, Any]]
    _refused_frontends: tuple[tuple[str, str], ...]

    @property
    def plan(self) -> Plan:
        """What was decided."""
        return self.core.plan

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted weights, in the model's order."""
        return self.core.plan.sites

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The weight matrices that are not adapted, each with its reason."""
        return self._refusals

    @property
    def unreached(self) -> tuple[str, ...]:
        """The weight matrices that no captured graph has used yet."""
        return self._unreached

    @property
    def stage(self) -> int:
        """Number of the running stage, 1 is the first; after the last fold, of the one that would start next."""
        return self.core.plan.stage

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs of `adapt`: positional, and by name."""
        return self._example

    @property
    def frontend(self) -> str:
        """Name of the front end that took the model."""
        return self._frontend

    @property
    def refused_frontends(self) -> tuple[tuple[str, str], ...]:
        """Names and reasons of the front ends that `auto` tried before."""
        return self._refused_frontends

    @property
    def placements(self) -> dict[str, str]:
        """Where the branch of each weight computes in the first graph: `beside`, `merged` or `weight`."""
        return dict(first.placements) if (first := self._variants.oldest) is not None else {}

    @property
    def expected_step_ratio(self) -> float | None:
        """A training step over the frozen model's, by the cost model; None where it has no sizes, or small ones."""
        return first.expected if (first := self._variants.oldest) is not None else None

    def __str__(self) -> str:
        """Return sites, refusals, parameters and front end, for people."""
        return summary(self)
