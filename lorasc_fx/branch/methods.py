"""The adapter methods by name: one row for each."""

from __future__ import annotations

from collections.abc import Mapping

from lorasc_fx.branch.base import Branch
from lorasc_fx.branch.dora import DoraBranch
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.branch.lora_xs import LoraXsBranch
from lorasc_fx.options import ADAPTERS
from lorasc_fx.plan import Site

METHODS: Mapping[str, type[Branch]] = {"lora": LoraBranch, "dora": DoraBranch, "lora-xs": LoraXsBranch}
"""By the value of `CascadeSpec.adapter`."""

ADAPTERS.update(METHODS)


def branch_class(site: Site) -> type[Branch]:
    """Return the class of a site's branch."""
    cls: type[Branch] = site.options.method
    return cls
