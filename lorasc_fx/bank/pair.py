"""The adapter method of a bank: one pair of factors for each weight, whatever method an adapter was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from lorasc_fx.branch import Declared
from lorasc_fx.branch.lora import DOWN, UP, LoraBranch
from lorasc_fx.plan import Plan, Site, SiteOptions
from lorasc_fx.spec import CascadeSpec, Rule


class PairBranch(LoraBranch):
    """A pair of factors A [r, in] and B [out, r], initially zero."""

    @classmethod
    def table(cls, site: Site) -> Mapping[str, Declared]:
        """Return both factors, which are zero."""
        return {name: Declared(shape) for name, shape in zip((DOWN, UP), site.factor_shapes, strict=True)}


class PairOptions(SiteOptions):
    """The options of a site in a bank. The method is not in the table of adapters, so that no spec can name it."""

    @property
    def method(self) -> type[PairBranch]:
        """The branch class."""
        return PairBranch


class PairSpec(CascadeSpec):
    """The spec of a bank, whose sites have `PairOptions`."""

    def site_options(self, rule: Rule | None = None) -> PairOptions:
        """Return the options of a site."""
        options = super().site_options(rule)
        return PairOptions(**{option.name: getattr(options, option.name) for option in fields(options)})

    @property
    def method(self) -> type[PairBranch]:
        """The branch class."""
        return PairBranch


def pair_plan(targets: tuple[str, ...], max_rank: int) -> Plan:
    """Return a plan without sites whose branches are pairs of rank `max_rank` with scale 1, placed beside their ops."""
    return Plan(PairSpec(targets=targets, rank=max_rank, lora_alpha=max_rank, placement="beside"))
