"""Forms of your own: an operator that lorasc-fx does not know becomes one whose weight can be adapted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.hooks import RemovableHandle

from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.graph.form import FunctionForm, ModuleForm, WeightForm
from lorasc_fx.graph.forms import CONTRACTIONS, FORMS, built_in
from lorasc_fx.graph.own_forms import OWN, OwnForm, own_named, targets_of
from lorasc_fx.spec import KINDS

__all__ = ["forms_missing", "register_form"]

BESIDE = ("linear", "conv", "embedding")


def register_form(form: OwnForm) -> RemovableHandle:
    """Let an operator be known, until `remove()` is called on the handle, or the end of its `with` block.

    `WeightForm` is always right: the branch stands on the weight, before the op. `FunctionForm` and `ModuleForm` say
    that a branch may stand beside the op, `op(x, W + D) = op(x, W) + D x`, which needs less memory; nothing checks that
    but your own tests. What was captured before keeps its graph.

    Args:
        form: the row; its name shows in plans and messages, its `kind` is one of `lorasc_fx.spec.KINDS`.

    Returns:
        torch's own kind of handle, as for hooks.

    Raises:
        SpecError: the row is not whole, its name is taken, or it would stand before one that is built in.
    """
    form = _with_overloads(form)
    _check(form)
    handle = RemovableHandle(OWN)
    OWN[handle.id] = form
    return handle


def forms_missing(names: Iterable[str]) -> dict[str, str]:
    """Return of these names of registered forms those that are not registered now, each with a hint."""
    known = [form.name for form in OWN.values()]
    return {name: nearest(name, known) for name in names if name and own_named(name) is None}


def _with_overloads(form: OwnForm) -> OwnForm:
    """Return the row with the op of each `torch.library.custom_op` in its place, as graphs name it."""
    if not isinstance(form, (FunctionForm, WeightForm)):
        return form
    if not isinstance(form.targets, tuple) or not form.targets:
        raise SpecError(f"{form.name}: targets is {form.targets!r}; give a tuple of functions, ops or names of methods")
    targets = tuple(each._opoverload if isinstance(each, CustomOpDef) else each for each in form.targets)
    return replace(form, targets=targets)


def _check(form: OwnForm) -> None:
    if not isinstance(form, (FunctionForm, ModuleForm, WeightForm)):
        raise SpecError(f"form is {type(form).__name__}; give a FunctionForm, a ModuleForm or a WeightForm")
    if not isinstance(form.name, str) or not form.name:
        raise SpecError(f"the form's name is {form.name!r}; give one that people can read, such as 'my.linear'")
    if any(form.name == each.name for each in FORMS):
        raise SpecError(f"{form.name} is the name of a form that is built in; give yours another")
    if own_named(form.name) is not None:
        raise SpecError(f"{form.name} is registered already; call remove() on its handle before")
    kinds = KINDS if isinstance(form, WeightForm) else BESIDE
    if form.kind not in kinds:
        raise SpecError(
            f"{form.name}: kind is {form.kind!r}{nearest(str(form.kind), kinds)}; known: {', '.join(kinds)}"
        )
    if isinstance(form, ModuleForm):
        _check_module(form)
    else:
        _check_targets(form)


def _check_module(form: ModuleForm) -> None:
    for each in FORMS:
        if isinstance(each, ModuleForm) and form.module.forward is each.module.forward:
            raise SpecError(f"{form.name}: {form.module.__name__} computes as {each.name} does, which is built in")


def _check_targets(form: FunctionForm | WeightForm) -> None:
    named = [form.weight] + ([form.x] if isinstance(form, FunctionForm) else [])
    for name in named:
        if name not in form.parameters:
            hint = nearest(name, form.parameters)
            raise SpecError(f"{form.name}: {name!r} is none of its parameters{hint}; they are {form.parameters}")
    for target in targets_of(form):
        taken = built_in(target)
        other = next(
            (row for row in OWN.values() if not isinstance(row, ModuleForm) and target in targets_of(row)), None
        )
        if taken is not None or other is not None:
            rows = ((taken, "built in"), (other, "registered"))
            row = next(f"{each.name}, which is {how}" for each, how in rows if each is not None)
            raise SpecError(f"{form.name}: {_told(target)} is a form already: {row}")
        if _is_torchs(target) and _name(target) in CONTRACTIONS:
            raise SpecError(f"{form.name}: {_told(target)} is known already: its branch stands on the weight")
        schema = getattr(target, "_schema", None)
        arguments = tuple(each.name for each in schema.arguments) if schema is not None else form.parameters
        if arguments[: len(form.parameters)] != form.parameters:
            raise SpecError(f"{form.name}: parameters is {form.parameters}, but {_told(target)} takes {arguments}")


def _is_torchs(target: Any) -> bool:
    """Whether a target is torch's own, or a method's name."""
    if isinstance(target, OpOverload):
        return target.namespace in ("aten", "prims")
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name.startswith(("aten::", "prims::"))
    module = getattr(target, "__module__", None) or ""
    return isinstance(target, str) or module.split(".")[0] in ("torch", "_operator", "builtins", "")


def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", target)
    return packet if isinstance(packet, str) else getattr(packet, "__name__", "")


def _told(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
