"""The adapter method of a bank: one pair of factors for each weight, whatever method an adapter was trained with."""

from __future__ import annotations

import torch

from lorasc_fx.branch import register_branch
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.plan import Plan, Site
from lorasc_fx.spec import CascadeSpec

ADAPTER = "pair"
"""Name of this method in a plan."""


class PairBranch(LoraBranch):
    """A pair of factors A [r, in] and B [out, r], initially zero. The slices of a fused weight share one pair."""

    slices_apart = False

    @classmethod
    def initial_values(cls, site: Site, seed: int, stage: int) -> dict[str, torch.Tensor]:
        """Return zeros for both factors."""
        return dict(super(LoraBranch, cls).initial_values(site, seed, stage))


register_branch(ADAPTER, PairBranch)


def pair_plan(targets: tuple[str, ...], max_rank: int) -> Plan:
    """Return a plan without sites whose branches are pairs of rank `max_rank` with scale 1, placed beside their ops."""
    return Plan(CascadeSpec(targets=targets, adapter=ADAPTER, rank=max_rank, lora_alpha=max_rank, placement="beside"))
