"""What a form is: a spelling of a node beside which a branch can stand, or which a branch can be merged into.

The rows are in `forms`; a user's own are added by `register_form`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx, nn

__all__ = ["AnyNode", "Form", "FunctionForm", "ModuleForm", "Reading", "WeightForm"]


class AnyNode(Protocol):
    """A node, or the spelling of one that a branch stands in place of."""

    @property
    def op(self) -> str:
        """Kind of node."""

    @property
    def target(self) -> Any:
        """What it calls."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Its positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Its keyword arguments."""


@dataclass(frozen=True)
class Reading:
    """What a form reads off its node: the input, and the arguments that the branch repeats; with the weight and bias,
    nodes or, of a module's, their names.
    """

    x: fx.node.Argument
    options: Mapping[str, Any]
    weight: fx.Node | str | None = None
    bias: fx.Node | str | None = None


@dataclass(frozen=True)
class Form(abc.ABC):
    """A row: `name` for people, the `kind` of its sites, and the layout in which the op reads the weight."""

    name: str
    kind: str

    @abc.abstractmethod
    def reads(self, node: AnyNode, module: nn.Module | None) -> Reading:
        """Return the node's input and options."""

    @property
    def product(self) -> str:
        """The op that a branch may be merged into, as `lorasc_fx.branch` names it; "" where it may not."""
        return {"linear": self.name.rpartition(".")[2].lower(), "conv": "conv"}.get(self.kind, "")


@dataclass(frozen=True)
class FunctionForm(Form):
    """A call of one of these targets with these parameters: functions, names of methods, or `space::name` of ops that
    another library defines.
    """

    targets: tuple[Callable[..., Any] | str, ...]
    parameters: tuple[str, ...]
    dims: int
    weight: str = "weight"
    x: str = "input"
    repeats: tuple[str, ...] = ()
    plain: tuple[tuple[str, Any], ...] = ()
    counted: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    needs: tuple[str, ...] = ()
    layout: str = "out_in"

    def argument(self, node: AnyNode, name: str) -> Any:
        """Return the node's argument of this name, wherever it stands, or None."""
        return _argument(self.parameters, node, name)

    def fits(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether the node reads `source` as its weight and nowhere else, has no argument that the row cannot repeat,
        and those that it needs.
        """
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), found.append)
        plain = all(self.argument(node, name) in (None, value) for name, value in self.plain)
        plain = plain and all((self.argument(node, name) or 0) >= 0 for name in self.counted)
        plain = plain and all(self.argument(node, name) is not None for name in self.needs)
        return plain and self.argument(node, self.weight) is source and found.count(source) == 1

    def reads(self, node: AnyNode, module: nn.Module | None) -> Reading:
        """Return the input and those of the arguments to repeat that the node gives."""
        given = {name: self.argument(node, name) for name in self.repeats}
        options = {name: value for name, value in given.items() if value is not None}
        bias = self.argument(node, "bias") if "bias" in self.parameters else None
        return Reading(
            self.argument(node, self.x), {**dict(self.options), **options}, self.argument(node, self.weight), bias
        )


@dataclass(frozen=True)
class WeightForm:
    """A call of one of these targets that computes with its weight in any way: the branch stands on the weight, before
    it. The op may do what it likes with `W + s B A`; the weight's whole gradient is made.

    Args:
        name: for people, in plans and in messages.
        kind: of the sites, one of `lorasc_fx.spec.KINDS`; a spec's targets may name it.
        targets: functions, torch ops, or names of methods.
        parameters: names of the target's arguments, in order.
        weight: which of them is the weight.
    """

    name: str
    kind: str
    targets: tuple[Callable[..., Any] | str, ...]
    parameters: tuple[str, ...]
    weight: str = "weight"

    def argument(self, node: AnyNode, name: str) -> Any:
        """Return the node's argument of this name, wherever it stands, or None."""
        return _argument(self.parameters, node, name)


def _argument(parameters: tuple[str, ...], node: AnyNode, name: str) -> Any:
    position = parameters.index(name) if name in parameters else len(node.args)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


@dataclass(frozen=True)
class ModuleForm(Form):
    """A `call_module` of a module whose forward is that of `module`, under whatever class name."""

    module: type[nn.Module]
    layout: str = "out_in"

    def fits(self, module: nn.Module) -> bool:
        """Whether the module computes as the row's class does; with its own forward, or with hooks, it does not."""
        own = type(module)
        if module._forward_pre_hooks or module._forward_hooks:
            return False
        if not isinstance(module, self.module) or own.forward is not self.module.forward or "forward" in vars(module):
            return False
        convolves = getattr(self.module, "_conv_forward", None)
        same = convolves is None or getattr(own, "_conv_forward", None) is convolves
        plain = not any(getattr(module, option, None) for option in ("max_norm", "scale_grad_by_freq"))
        return same and plain

    def reads(self, node: AnyNode, module: nn.Module | None) -> Reading:
        """Return the input and the module's own stride, padding, dilation and groups, or padding_idx."""
        x = node.args[0] if node.args else node.kwargs["input"]
        bias = f"{node.target}.bias" if getattr(module, "bias", None) is not None else None
        weights = (f"{node.target}.weight", bias)
        if isinstance(module, nn.Embedding):
            return Reading(x, {"lookup": True, "padding_idx": -1 if module.padding_idx is None else module.padding_idx})
        if not isinstance(module, nn.modules.conv._ConvNd):
            return Reading(x, {}, *weights)
        options: dict[str, Any] = {"stride": module.stride, "padding": module.padding}
        options |= {"dilation": module.dilation, "groups": module.groups}
        if module.padding_mode != "zeros":
            pad = tuple(module._reversed_padding_repeated_twice)
            options |= {"padding": (0,) * len(module.stride), "pad": pad, "pad_mode": module.padding_mode}
        return Reading(x, options, *weights)
