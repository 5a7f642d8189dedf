"""The table of forms: every spelling of a node that uses a weight, one row each.

A row says which node it is, where its input and weight stand, and which of its arguments the branch must repeat.
Adding an operator is adding a row here and a case in tests/passes; no pass changes. Three dialects: ATen
(torch.export), functional (the builtins that F.linear and F.conv* trace to) and modules (`call_module`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lorasc_fx.branch import Branch, ConvBranch, LinearBranch

__all__ = ["BRANCH_OF", "FORMS", "Form", "FunctionForm", "ModuleForm", "Reading", "form_named", "form_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Reading:
    """What a form reads off its node: the input, and the arguments that the branch repeats."""

    x: fx.node.Argument
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Form(abc.ABC):
    """A row: `name` for people and plans, and the `kind` of its sites, which decides their branch."""

    name: str
    kind: str

    @abc.abstractmethod
    def reads(self, node: fx.Node, module: nn.Module | None) -> Reading:
        """Return the node's input and options."""


@dataclass(frozen=True)
class FunctionForm(Form):
    """A `call_function` with one of these targets and these parameters, `weight` among them."""

    targets: tuple[Callable[..., Any], ...]
    parameters: tuple[str, ...]
    dims: int

    def argument(self, node: fx.Node, name: str) -> Any:
        """Return the node's argument of this name, wherever it stands, or None."""
        position = self.parameters.index(name)
        return node.args[position] if position < len(node.args) else node.kwargs.get(name)

    def weight(self, node: fx.Node) -> Any:
        """Return the argument that is the weight."""
        return self.argument(node, "weight")

    def reads(self, node: fx.Node, module: nn.Module | None) -> Reading:
        """Return the input and, of stride, padding, dilation and groups, those that the node gives."""
        options = {}
        for name in self.parameters[3:]:
            value = self.argument(node, name)
            if value is not None:
                options[name] = value
        return Reading(self.argument(node, "input"), options)


@dataclass(frozen=True)
class ModuleForm(Form):
    """A `call_module` of a module whose forward is that of `module`, under whatever class name."""

    module: type[nn.Module]

    def fits(self, module: nn.Module) -> bool:
        """Whether the module computes as the row's class does; with its own forward, or with hooks, it does not."""
        own = type(module)
        if module._forward_pre_hooks or module._forward_hooks:
            return False
        if not isinstance(module, self.module) or own.forward is not self.module.forward or "forward" in vars(module):
            return False
        convolves = getattr(self.module, "_conv_forward", None)
        return convolves is None or getattr(own, "_conv_forward", None) is convolves

    def reads(self, node: fx.Node, module: nn.Module | None) -> Reading:
        """Return the input and the module's own stride, padding, dilation and groups."""
        x = node.args[0] if node.args else node.kwargs["input"]
        if not isinstance(module, nn.modules.conv._ConvNd):
            return Reading(x, {})
        options: dict[str, Any] = {"stride": module.stride, "padding": module.padding}
        options |= {"dilation": module.dilation, "groups": module.groups}
        if module.padding_mode != "zeros":
            pad = tuple(module._reversed_padding_repeated_twice)
            options |= {"padding": (0,) * len(module.stride), "pad": pad, "pad_mode": module.padding_mode}
        return Reading(x, options)


_LINEAR = ("input", "weight", "bias")
_CONV = (*_LINEAR, "stride", "padding", "dilation", "groups")


FORMS: tuple[FunctionForm | ModuleForm, ...] = (
    FunctionForm("aten.linear", "linear", (aten.linear.default,), _LINEAR, 2),
    FunctionForm("aten.conv1d", "conv", (aten.conv1d.default, aten.conv1d.padding), _CONV, 3),
    FunctionForm("aten.conv2d", "conv", (aten.conv2d.default, aten.conv2d.padding), _CONV, 4),
    FunctionForm("aten.conv3d", "conv", (aten.conv3d.default, aten.conv3d.padding), _CONV, 5),
    FunctionForm("F.linear", "linear", (F.linear,), _LINEAR, 2),
    FunctionForm("F.conv1d", "conv", (F.conv1d,), _CONV, 3),
    FunctionForm("F.conv2d", "conv", (F.conv2d,), _CONV, 4),
    FunctionForm("F.conv3d", "conv", (F.conv3d,), _CONV, 5),
    ModuleForm("nn.Linear", "linear", nn.Linear),
    ModuleForm("nn.Conv1d", "conv", nn.Conv1d),
    ModuleForm("nn.Conv2d", "conv", nn.Conv2d),
    ModuleForm("nn.Conv3d", "conv", nn.Conv3d),
)
"""Every known form, in the order in which they are tried."""

BRANCH_OF: dict[str, type[Branch]] = {"linear": LinearBranch, "conv": ConvBranch}
"""The branch of each kind of site."""

_BY_TARGET = {target: form for form in FORMS if isinstance(form, FunctionForm) for target in form.targets}
_BY_NAME = {form.name: form for form in FORMS}


def form_named(name: str) -> FunctionForm | ModuleForm:
    """Return the row of this name."""
    return _BY_NAME[name]


def form_of(node: fx.Node, module: nn.Module | None) -> FunctionForm | ModuleForm | None:
    """Return the row that fits a node; `module` is the one that a `call_module` calls."""
    if node.op == "call_function":
        return _BY_TARGET.get(node.target) if callable(node.target) else None
    if node.op == "call_module" and module is not None:
        return next((form for form in FORMS if isinstance(form, ModuleForm) and form.fits(module)), None)
    return None
