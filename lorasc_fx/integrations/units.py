"""Modules that torch's fully_shard takes for blocks, and a graph that runs through them, segment by segment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Branch
from lorasc_fx.branch.low_rank import apply
from lorasc_fx.errors import StateError
from lorasc_fx.integrations.segments import ROOT, Cut, Segment
from lorasc_fx.undo import Block, isolated

__all__ = ["Shards", "SplitGraph", "Unit"]


class Unit(nn.Module):
    """Holds the modules whose parameters are sharded together; its forward runs a segment that reads them.

    The modules stay where they are in the user's model: `fully_shard` changes their parameters in place.
    """

    def __init__(self, holders: Iterable[nn.Module]) -> None:
        super().__init__()
        self.holders = nn.ModuleList(holders)

    def forward(self, segment: Segment, graph: Cut, *values: Any) -> tuple[Any, ...]:
        """Return the segment's outputs; none shares memory with a weight, which is gone when this returns."""
        held = {each.untyped_storage().data_ptr() for each in self.parameters()}
        return tuple(_own(value, held) for value in segment.run(graph.module, values))


class Shards(nn.Module):
    """All units; its forward runs a graph, and `rest` holds what is in no unit."""

    def __init__(self, units: Mapping[str, Unit], rest: Iterable[nn.Module]) -> None:
        super().__init__()
        self.names = {name: index for index, name in enumerate(units)}
        self.units = nn.ModuleList(units.values())
        self.rest = nn.ModuleList(rest)

    def forward(self, graph: Cut, *inputs: Any) -> Any:
        """Return what the graph's output node has."""

        def turn(segment: Segment, values: list[Any]) -> tuple[Any, ...]:
            if segment.unit == ROOT:
                return segment.run(graph.module, values)
            found: tuple[Any, ...] = self.units[self.names[segment.unit]](segment, graph, *values)
            return found

        return graph.run(inputs, turn)


class SplitGraph:
    """Stands in a variant for its graph module: the same call, through the units.

    Args:
        shards: whose units hold the parameters.
        graph: that was cut along them.
        leaves: returns the leaves of a call's arguments, in the order of the placeholders.
        called: is told of each call; returns whether the branches rest, as other weights are in place.
    """

    def __init__(
        self,
        shards: Shards,
        graph: Cut,
        leaves: Callable[[Any, Any], list[Any]],
        called: Callable[[], bool],
    ) -> None:
        self.shards, self.graph, self.leaves, self.called = shards, graph, leaves, called
        self.branches = [each for each in graph.module.modules() if isinstance(each, Branch)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the graph computes.

        Raises:
            StateError: inside torch.compile.
        """
        if torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback():
            raise StateError(
                "torch.compile: a cascade whose weights are sharded runs as it is; call it uncompiled", code="sharded"
            )
        with resting(self.branches) if self.called() else contextlib.nullcontext():
            try:
                flat = self.shards(self.graph, *self.leaves(args, kwargs))
            except BaseException:
                self.shards.reset_iter_state()  # type: ignore[operator]
                raise
        return self.graph.module.graph.process_outputs(flat)


@isolated
def resting(undo: Block[Any], branches: list[Branch]) -> None:
    """Let branches add nothing: `base + 0 * term` is base."""
    for branch in branches:
        undo(partial(setattr, branch, "scale", branch.scale))
        branch.scale = 0.0


def _own(value: Any, held: set[int]) -> Any:
    """Return a value that is no view: FSDP's hooks hang on it, and a view of a weight would lose its memory."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_own(each, held) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.untyped_storage().data_ptr() in held:
        return value.clone()
    if value.requires_grad and value._base is not None:
        return apply(_NoView, value)
    return value


class _NoView(torch.autograd.Function):
    """`apply(x)`: the same memory, as nobody's view."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return it."""
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient as it is."""
        return gradient
