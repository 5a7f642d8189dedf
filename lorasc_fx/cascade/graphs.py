"""The graphs of a cascade. There is one graph per kind of call, captured at the first such call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Decided
from lorasc_fx.cascade.run import Run
from lorasc_fx.compile import Axis, Call, Compiler, NewVariant, Variant, Variants
from lorasc_fx.errors import CaptureError, CheckpointError, PassError, SpecError, StateError, named
from lorasc_fx.util.torch_private import functorch_is_active
from lorasc_fx.util.undo import PROCESS, Undo, commit

log = logging.getLogger("lorasc_fx")

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call, as (args, kwargs)."""


class Graphs:
    """The cached graphs of a cascade: finds the graph of a call, or captures it.

    Args:
        run: the run whose model and branches the graphs read.
        compiler: captures and rewrites graphs.
        decided: plan and branches. Also the first graph, unless the cascade was loaded without inputs.
        example: the inputs of the first graph.
    """

    def __init__(self, run: Run, compiler: Compiler, decided: Decided, example: Example | None) -> None:
        self.run, self.compiler, self.example = run, compiler, example
        self.variants = Variants()
        self.frontend = ""
        self.refused_frontends: tuple[tuple[str, str], ...] = ()
        self.gathered: Callable[[], AbstractContextManager[None]] = (
            nullcontext  # gathers shards to run the model itself
        )
        self.origin = ""  # path of the checkpoint whose plan the first graph must fit
        self.split: Callable[[Variant], Variant] | None = None  # splits a graph into segments that gather shards
        if isinstance(decided, NewVariant) and example is not None:
            self._add(compiler.calls.bind(*example), decided)

    def variant_of(
        self, args: Sequence[object], kwargs: Mapping[str, object], name: str = "variant", dynamic: bool = False
    ) -> tuple[Variant, Call]:
        """Return the graph for these arguments, captured if necessary, and the bound call.

        Args:
            dynamic: whether to return a graph with dynamic sizes, if the model allows it. Height, width and depth of
                images and video only if they have varied, because padding computed from dynamic sizes makes
                torch.export slow.
        """
        self.run.check_alive(name)
        call = self.compiler.calls.bind(tuple(args), kwargs)
        axes = _axes_of(call) | self.variants.varying(call) if dynamic else frozenset[Axis]()
        return self.variants.find(call, axes) or self.capture(call, axes), call

    def split_by(
        self, split: Callable[[Variant], Variant], gathered: Callable[[], AbstractContextManager[None]], undo: Undo
    ) -> None:
        """Split all current graphs, and all graphs that are captured later."""
        undo(self.variants.restorer())
        undo(partial(vars(self).update, split=self.split, gathered=self.gathered))
        self.variants.exchange(split)
        self.split, self.gathered = split, gathered

    def drop(self, undo: Undo) -> None:
        """Detach and drop all graphs. The next call captures new ones."""
        undo(partial(setattr, self, "variants", self.variants))
        self.variants.detach()
        self.variants = Variants()

    def unbroken_graph(self) -> fx.GraphModule:
        """Return the first graph as one GraphModule."""
        module = self.first("graph_module").module
        if not isinstance(module, fx.GraphModule):
            raise StateError(
                "graph_module: this cascade has no single graph, because the model runs eagerly or shards divide it. "
                "cascade.refused_frontends says why a model runs eagerly, and cascade.draw() shows the parts of a "
                "sharded one",
                code="no-graph",
            )
        return module

    def first(self, name: str) -> Variant:
        """Return the first graph. Raise StateError if there is none; `name` is the caller."""
        if (oldest := self.variants.oldest) is None:
            raise StateError(
                f"{name}: no graph has been captured yet, or none since the cascade was moved or copied. Call the "
                "cascade once",
                code="not-available",
            )
        return oldest

    def capture(self, call: Call, dynamic: Collection[Axis] = ()) -> Variant:
        """Return the graph of a call: capture it, unless another thread has captured it meanwhile."""
        grad = torch.is_grad_enabled()  # read before `inference_mode(False)`, which enables gradients
        # Tracers patch the whole process, so only one thread captures at a time.
        with PROCESS, torch.inference_mode(False), torch.set_grad_enabled(grad):
            while (variant := self.variants.find(call, dynamic) or self._make(call, dynamic)) is None:
                pass
            return variant

    def _make(self, call: Call, dynamic: Collection[Axis]) -> Variant | None:
        """Capture a graph, add it and return it. None if another thread has changed the plan meanwhile."""
        self._check_capture()
        run, start_time = self.run, time.monotonic()
        plan, axes = run.plan, self.variants.varying(call).union(dynamic)
        decided = Decided(plan, run.by_key, run.refusals, ())
        if not dynamic and (earlier := self.variants.reusable(call)) is not None:
            reused = self.compiler.reuse(run.model, decided, call, earlier)
            if reused is not None:
                log.info("the graph of another mode serves this call, in %.2f s", time.monotonic() - start_time)
                with run.lock:
                    if run.plan is plan:
                        self.variants.add(call, reused, run.branches.training)
                    return reused if run.plan is plan else None
        # Step 1: capture. The first graph of a loaded cascade is compared with the plan of the checkpoint.
        try:
            result = self.compiler.make(run.model, decided, call.args, call.kwargs, axes, self.variants.all)
            disagreements = self.compiler.faults(result.variant) if not self.frontend else []
        except (PassError, SpecError) as fault:
            if self.frontend:
                raise
            raise self._does_not_fit([str(fault)]) from fault
        except CaptureError as fault:
            cause = fault.__cause__ if fault.code == "model-refuses-inputs" else None
            # Errors of torch.fx are about fake tensors, not about the user's inputs.
            if cause is None or type(cause).__module__.startswith(("torch.fx.", "torch._subclasses.")):
                raise
            raise cause from None  # a call of the cascade raises the same error as a call of the model
        if disagreements:
            raise self._does_not_fit(disagreements)
        # Step 2: split the graph if the weights are sharded.
        if self.split is not None:
            late = [branch.weight_name for name, branch in result.branches.items() if name not in run.branches]
            if late:
                raise StateError(
                    f"forward: this call adapts {named(late)}, which no graph used before the weights were sharded, so "
                    "its branch is not sharded. Make such a call before you call shard, or exclude the weight",
                    code="sharded",
                )
            result = replace(result, variant=self.split(result.variant))
        number, sizes, seconds = (
            len(self.variants) + 1,
            ", dynamic sizes" if axes else "",
            time.monotonic() - start_time,
        )
        log.info("variant %d by %s%s, in %.2f s", number, result.variant.frontend.name, sizes, seconds)
        # Step 3: add the graph, unless the plan of the run has changed during the capture.
        with run.lock, commit() as undo:
            if run.plan is not plan:
                return None
            undo(self.variants.restorer())
            run.grow(result, undo)
            self._add(call, result)
            return result.variant

    def _check_capture(self) -> None:
        """Raise StateError if no graph can be captured now."""
        if functorch_is_active():
            raise StateError(
                "forward: this call needs a new graph, which cannot be captured inside torch.func (vmap, grad, jvp). "
                "Call the cascade once outside, with inputs of the number of dimensions and the sizes that it gets "
                "inside",
                code="not-captured",
            )

    def _does_not_fit(self, disagreements: list[str]) -> CheckpointError:
        """Return the error for a first graph that does not fit the plan of a loaded checkpoint."""
        where = f"{self.origin}: " if self.origin else ""
        sentences = "\n  ".join(dict.fromkeys(disagreements))
        return CheckpointError(f"{where}its plan does not fit this call's graph:\n  {sentences}", code="sites-differ")

    def _add(self, call: Call, result: NewVariant) -> None:
        """Add a graph to the cache. The first one sets `frontend`, and `example` if the cascade has none."""
        self.variants.add(call, result.variant, self.run.branches.training)
        if result.variant.attach is not None:
            result.variant.attach(self.run)
        if not self.frontend:
            self.frontend, self.refused_frontends = result.variant.frontend.name, result.refused_frontends
        if self.example is None:  # the cascade was loaded without inputs
            self.example = pytree.tree_map_only(
                torch.Tensor,
                lambda tensor: tensor if tensor.is_leaf else tensor.detach().requires_grad_(),  # drop autograd graphs
                (call.args, call.kwargs),
            )


def _axes_of(call: Call) -> frozenset[Axis]:
    """Return the axes of input tensors with a size of 2 or more, except spatial axes of images and video.

    Sizes 0 and 1 are never dynamic, because torch.export specializes them.
    """
    axes = set[Axis]()
    for index, leaf in enumerate(call.leaves):
        if isinstance(leaf, torch.Tensor):
            is_image = leaf.is_floating_point() and leaf.dim() > 3
            axes |= {(index, axis) for axis in range(2 if is_image else leaf.dim()) if leaf.shape[axis] > 1}
    return frozenset(axes)
