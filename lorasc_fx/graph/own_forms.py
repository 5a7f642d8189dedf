"""Forms that a user has registered, in the order in which they came; `register` checks them and puts them in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch._ops import OpOverload

from lorasc_fx.graph.form import FunctionForm, ModuleForm, WeightForm

__all__ = ["OWN", "OwnForm", "own_form", "own_named", "targets_of"]

OwnForm = FunctionForm | ModuleForm | WeightForm

OWN: OrderedDict[int, OwnForm] = OrderedDict()
"""The registered rows by the number of their handle; torch's handles want a dictionary of this type."""


def own_form(target: Any) -> FunctionForm | WeightForm | None:
    """Return the registered row that names this target, or None."""
    for form in OWN.values() if OWN else ():
        if not isinstance(form, ModuleForm) and target in targets_of(form):
            return form
    return None


def own_named(name: str) -> OwnForm | None:
    """Return the registered row of this name, or None."""
    return next((form for form in OWN.values() if form.name == name), None)


def targets_of(form: FunctionForm | WeightForm) -> tuple[Any, ...]:
    """Return what a row's nodes may call: its targets, and the packet of an op whose default overload is one."""
    return (*form.targets, *_packets(form.targets))


def _packets(targets: tuple[Any, ...]) -> Iterator[Any]:
    for target in targets:
        if isinstance(target, OpOverload) and target._overloadname == "default":
            yield target.overloadpacket
