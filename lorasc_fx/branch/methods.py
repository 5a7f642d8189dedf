"""The adapter methods by name: one row for each."""

from __future__ import annotations

from lorasc_fx.branch.contract import Branch
from lorasc_fx.branch.delora import DeloraBranch
from lorasc_fx.branch.dora import DoraBranch
from lorasc_fx.branch.hira import HiraBranch
from lorasc_fx.branch.lokr import LokrBranch
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.branch.lora_xs import LoraXsBranch
from lorasc_fx.branch.miss import MissBranch
from lorasc_fx.branch.oft import OftBranch
from lorasc_fx.branch.shira import ShiraBranch
from lorasc_fx.branch.tokens import TokensBranch
from lorasc_fx.branch.vera import VeraBranch
from lorasc_fx.errors import SpecError
from lorasc_fx.options import ADAPTERS
from lorasc_fx.plan import Site

METHODS: dict[str, type[Branch]] = {
    "lora": LoraBranch,
    "dora": DoraBranch,
    "lora-xs": LoraXsBranch,
    "vera": VeraBranch,
    "hira": HiraBranch,
    "shira": ShiraBranch,
    "miss": MissBranch,
    "oft": OftBranch,
    "lokr": LokrBranch,
    "delora": DeloraBranch,
}
"""By the value of `CascadeSpec.adapter`. `tokens` is the method of rules that name rows, and not one of a spec."""

ADAPTERS.update(METHODS, tokens=TokensBranch)


def register_branch(name: str, cls: type[Branch]) -> None:
    """Let `CascadeSpec(adapter=name)` make branches of a class.

    A process that loads a checkpoint of such a run has to register the class first.

    Args:
        name: of the method.
        cls: a subclass of `lorasc_fx.branch.Branch`, or of `LowRankBranch` if the delta is a low-rank product. See
            examples/own_branch.py.

    Raises:
        SpecError: the name is taken by another class, or the class is not a complete branch.
    """
    if not isinstance(name, str) or not name:
        raise SpecError(f"register_branch: name is {name!r}; give a string such as 'my-adapter'")
    if not (isinstance(cls, type) and issubclass(cls, Branch)) or cls.__abstractmethods__ or not cls.zeros:
        raise SpecError(
            f"register_branch: {cls!r} is not a complete branch. Give a subclass of lorasc_fx.branch.Branch that "
            "defines shapes, delta (or down and up of a LowRankBranch) and zeros"
        )
    if ADAPTERS.get(name, cls) is not cls:
        raise SpecError(f"register_branch: {name!r} is the adapter {ADAPTERS[name].__name__}; give another name")
    ADAPTERS[name] = cls


def branch_class(site: Site) -> type[Branch]:
    """Return the class of a site's branch."""
    cls: type[Branch] = site.options.method
    return cls
