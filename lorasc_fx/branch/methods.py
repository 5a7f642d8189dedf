"""Table of the adapter methods, and the registration of user-defined ones."""

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
"""Branch classes by the value of `CascadeSpec.adapter`.

`tokens` is missing here, because only a rule that names rows can select it, and not a spec.
"""

ADAPTERS.update(METHODS, tokens=TokensBranch)


def register_branch(name: str, cls: type[Branch]) -> None:
    """Register an adapter method, so that `CascadeSpec(adapter=name)` accepts it.

    A process that loads a checkpoint of such a run must register the class first. See examples/own_branch.py.

    Args:
        name: name of the method.
        cls: a subclass of `lorasc_fx.branch.Branch`, or of `LowRankBranch` if the delta is a low-rank product.

    Raises:
        SpecError: the name belongs to another class, or the class is abstract or has an empty `zeros`.
    """
    if not isinstance(name, str) or not name:
        raise SpecError(f"register_branch: name is {name!r}; give a string such as 'my-adapter'")
    if not (isinstance(cls, type) and issubclass(cls, Branch)) or cls.__abstractmethods__ or not cls.zeros:
        raise SpecError(
            f"register_branch: {cls!r} is not a complete branch. Give a subclass of lorasc_fx.branch.Branch that "
            "defines shapes, delta (or down and up of a LowRankBranch) and zeros"
        )
    if ADAPTERS.get(name, cls) is not cls:
        raise SpecError(
            f"register_branch: the name {name!r} belongs to the adapter {ADAPTERS[name].__name__}; give another name"
        )
    ADAPTERS[name] = cls
