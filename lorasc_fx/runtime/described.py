"""What a cascade tells of itself: plan, sites, refusals, placements, and all of it as text."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lorasc_fx.errors import StateError
from lorasc_fx.plan import Plan, Refusal, Site
from lorasc_fx.runtime.core import Core
from lorasc_fx.runtime.summary import summary
from lorasc_fx.runtime.variants import VariantMaker, Variants

__all__ = ["Described"]


class Described(nn.Module):
    """The part of a cascade that only reads."""

    model: nn.Module
    core: Core
    _maker: VariantMaker
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

    def draw(self, file: str | PathLike[str], sites: Sequence[str] = (), radius: int = 2) -> Path:
        """Draw the rewritten graph around some sites: branches marked by placement, names, dtypes and shapes.

        Args:
            file: the .svg to write.
            sites: kinds or globs on weight names, as in a spec; the first three sites if not given.
            radius: arrows to follow from each branch, in both directions.

        Returns:
            The file.

        Raises:
            UnknownTarget: a pattern means no site.
            SpecError: the file is no .svg, its folder is not there, or radius is no count.
            StateError: after `release`, or none of these branches stands in a graph.
            MissingExtra: the extra `report` is not installed.
        """
        self.core.check_alive("draw")
        first = self._variants.oldest
        if first is None:
            raise StateError("draw: there is no graph since the cascade was moved or copied; call it once")
        return self._maker.draw(first, self.core.plan, file, sites, radius)

    def __str__(self) -> str:
        """Return sites, refusals, parameters and front end, for people."""
        return summary(self)
