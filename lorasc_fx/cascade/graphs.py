"""The graphs of a cascade, one per kind of call, captured at the first such call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Decided
from lorasc_fx.cascade.inputs import describe
from lorasc_fx.cascade.run import Run
from lorasc_fx.compile import Axis, Call, Compiler, Made, Picture, Variant, Variants
from lorasc_fx.errors import CaptureError, CheckpointError, PassError, SpecError, StateError, named
from lorasc_fx.util.undo import PROCESS, Undo, commit

log = logging.getLogger("lorasc_fx")

Example = tuple[tuple[Any, ...], dict[str, Any]]


class Graphs:
    """Finds or captures the graph of a call.

    Args:
        run: the run whose model and branches the graphs read.
        compiler: makes graphs.
        decided: plan, branches and, if there is one, the first graph.
        example: the inputs of that graph.
    """

    def __init__(self, run: Run, compiler: Compiler, decided: Decided, example: Example | None) -> None:
        self.run, self.compiler, self.example = run, compiler, example
        if example is not None:
            run.inputs = describe(*example)
        self.variants = Variants()
        self.frontend = ""
        self.refused_frontends: tuple[tuple[str, str], ...] = ()
        self.gathered: Callable[[], AbstractContextManager[None]] = nullcontext  # to run the model itself
        self.origin = ""  # path of the checkpoint whose plan the first graph must fit
        self.split: Callable[[Variant], Variant] | None = None  # splits each graph, so that it can gather shards
        if isinstance(decided, Made) and example is not None:
            self._add(compiler.calls.bind(*example), decided)

    def variant_of(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str = "variant", dynamic: bool = False
    ) -> tuple[Variant, Call]:
        """Return the graph for these arguments, and the call.

        Args:
            args, kwargs: of the call.
            name: of the caller, for messages.
            dynamic: return a graph whose sizes are dynamic, as far as the model allows. The space of images and video
                is only if it has varied: padding is computed from it, which makes torch.export slow.
        """
        self.run.check_alive(name)
        self.run.replicas.check(self.run.trainable)
        call = self.compiler.calls.bind(tuple(args), kwargs)
        axes = _axes_of(call) | self.variants.varying(call) if dynamic else frozenset[Axis]()
        return self.variants.find(call, axes) or self.capture(call, axes), call

    def split_by(
        self, split: Callable[[Variant], Variant], gathered: Callable[[], AbstractContextManager[None]], undo: Undo
    ) -> None:
        """Replace each graph, now and later, by the result of `split`. Modules of the model run inside `gathered`."""
        undo(self.variants.restorer())
        undo(partial(vars(self).update, split=self.split, gathered=self.gathered))
        self.variants.exchange(split)
        self.split, self.gathered = split, gathered

    def drop(self, undo: Undo) -> None:
        """Detach and drop all graphs. The next call captures new ones."""
        undo(partial(setattr, self, "variants", self.variants))
        self.variants.detach()
        self.variants = Variants()

    def draw(self, file: str | PathLike[str] | None, sites: Sequence[str], radius: int) -> Path | Picture:
        """Draw the first graph around some sites."""
        return self.compiler.draw(self._first("draw"), self.run.plan, file, sites, radius)

    def unbroken_graph(self) -> fx.GraphModule:
        """Return the first graph, if the model has no graph breaks."""
        module = self._first("graph_module").module
        if not isinstance(module, fx.GraphModule):
            raise StateError(
                "graph_module: graph breaks, or shards, divide the graph of this cascade. `draw` shows its parts",
                code="no-whole-graph",
            )
        return module

    def _first(self, name: str) -> Variant:
        if (first := self.variants.oldest) is None:
            raise StateError(
                f"{name}: there is no graph yet, or none since the cascade was moved or copied. Call it once",
                code="not-available",
            )
        return first

    def fold(
        self, variant: Variant, call: Call, values: Mapping[str, torch.Tensor] | None
    ) -> tuple[nn.Module, dict[Axis, int]]:
        """Return the captured graph of a call without branches, and the smallest sizes of axes that have one.

        `values` become constants of the graph. None to read the live model.
        """
        return self.compiler.fold(variant, self.run.model, self.run.plan.stage, values, call.args, call.kwargs)

    def capture(self, call: Call, dynamic: Collection[Axis] = ()) -> Variant:
        """Return the graph of a call, which another thread may have captured meanwhile.

        Args:
            call: that it is for.
            dynamic: axes to make dynamic, besides those whose sizes have varied.
        """
        grad = torch.is_grad_enabled()  # which leaving the inference mode would set
        with PROCESS, torch.inference_mode(False), torch.set_grad_enabled(grad):  # tracers work on the whole process
            while (variant := self.variants.find(call, dynamic) or self._make(call, dynamic)) is None:
                pass
            return variant

    def _make(self, call: Call, dynamic: Collection[Axis]) -> Variant | None:
        """Capture a graph and add it. None if another thread has started another stage meanwhile."""
        run, begun = self.run, time.monotonic()
        plan, axes = run.plan, self.variants.varying(call).union(dynamic)
        self.variants.count_changes(call)
        try:
            made = self.compiler.make(
                run.model, Decided(plan, run.by_key, run.refusals, ()), call.args, call.kwargs, axes, bool(dynamic)
            )
            disagreements = self.compiler.faults(made.variant) if not self.frontend else []
        except (PassError, SpecError) as fault:
            if self.frontend:
                raise
            raise self._does_not_fit([str(fault)]) from fault
        except CaptureError as fault:
            own = fault.__cause__ if fault.code == "model-refuses-inputs" else None
            if own is None or type(own).__module__.startswith(("torch.fx.", "torch._subclasses.")):  # of fake tensors
                raise
            raise own from None  # a call raises what the model raises
        if disagreements:
            raise self._does_not_fit(disagreements)
        if self.split is not None:
            late = [branch.weight_name for name, branch in made.branches.items() if name not in run.branches]
            if late:
                raise StateError(
                    f"forward: this call adapts {named(late)}, which no graph had used when the weights were sharded, "
                    "so their branches are on no rank. Make such a call before shard, or exclude the weight",
                    code="sharded",
                )
            made = replace(made, variant=self.split(made.variant))
        number, sizes, seconds = len(self.variants) + 1, ", dynamic sizes" if axes else "", time.monotonic() - begun
        log.info("variant %d by %s%s, in %.2f s", number, made.variant.frontend.name, sizes, seconds)
        with run.lock, commit() as undo:
            if run.plan is not plan:
                return None
            undo(self.variants.restorer())
            run.grow(made, undo)
            self._add(call, made)
            return made.variant

    def _does_not_fit(self, disagreements: list[str]) -> CheckpointError:
        """Return the error for a first graph that does not fit the loaded plan."""
        where = f"{self.origin}: " if self.origin else ""
        sentences = "\n  ".join(dict.fromkeys(disagreements))
        return CheckpointError(f"{where}its plan does not fit this call's graph:\n  {sentences}", code="sites-differ")

    def _add(self, call: Call, made: Made) -> None:
        """Add a graph. The first one determines `frontend`."""
        self.variants.add(call, made.variant, self.run.branches.training)
        if made.variant.attach is not None:
            made.variant.attach(self.run)
        if not self.frontend:
            self.frontend, self.refused_frontends = made.variant.frontend.name, made.refused_frontends
        if self.example is None:  # loaded without inputs
            self.example = pytree.tree_map_only(
                torch.Tensor,
                lambda tensor: tensor if tensor.is_leaf else tensor.detach().requires_grad_(),  # drop autograd graphs
                (call.args, call.kwargs),
            )
            self.run.inputs = describe(*self.example)


def _axes_of(call: Call) -> frozenset[Axis]:
    """Return all axes of the inputs of 2 or more, except the space of images and video."""
    axes = set[Axis]()
    for index, leaf in enumerate(call.leaves):
        if isinstance(leaf, torch.Tensor):
            is_image = leaf.is_floating_point() and leaf.dim() > 3
            axes |= {(index, axis) for axis in range(2 if is_image else leaf.dim()) if leaf.shape[axis] > 1}
    return frozenset(axes)
