"""Capture a model as a graph: try the front ends in order, and compare each graph with the eager model.

A front end is one way to trace a model: torch.export, or dynamo with graph breaks. If both fail, the error lists their
reasons.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from lorasc_fx.capture.captured import GRAPH_MODULE, OWNER, Axis, Captured, Conditions, FrontEnd, read_live
from lorasc_fx.capture.graph_breaks import GRAPH_BREAKS, GraphBreakFallback, eager_trace
from lorasc_fx.capture.least_sizes import least_sizes
from lorasc_fx.capture.torch_export import EXPORT
from lorasc_fx.check.guards import Guards
from lorasc_fx.check.isolation import has_values, isolated_model, with_fake_tensors
from lorasc_fx.check.observe import one_line
from lorasc_fx.check.preflight import RECOMPUTES, Disagreement, Preflight, check_agrees, first_difference, run_preflight
from lorasc_fx.check.projections import requiring_grad
from lorasc_fx.errors import CaptureError, nearest
from lorasc_fx.signature import copy_inputs, leaves, register_cache_pytrees, requires_grad
from lorasc_fx.util.accelerator import OUT_OF_MEMORY

__all__ = [
    "FRONTENDS",
    "GRAPH_BREAKS",
    "OWNER",
    "Axis",
    "Captured",
    "Conditions",
    "FrontEnd",
    "GraphBreakFallback",
    "capture",
    "eager_trace",
    "least_sizes",
    "open_model",
    "read_live",
]

log = logging.getLogger("lorasc_fx")

Rewrite = Callable[[fx.GraphModule], PassResult]

FRONTENDS: dict[str, FrontEnd] = {row.name: row for row in (EXPORT, GRAPH_BREAKS)}
"""The front ends for eager models, in the order in which `auto` tries them."""


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    frontend: str = "auto",
    dynamic: Collection[Axis] = (),
    trained: Collection[str] | None = None,
    rewrites: Sequence[Rewrite] = (),
) -> Captured:
    """Trace one call of a model. The resulting graph holds no weights: it reads the model's parameters at each call.

    A graph is accepted only if it computes the same outputs and gradients as the eager model. If the model computes
    something else in the other gradient mode, the graph is valid for the current mode only.

    Args:
        model: a GraphModule needs no front end. A model on the meta device, or sharded, is captured on fake tensors.
        args, kwargs: example inputs in canonical form (`bind_inputs`).
        frontend: a name in FRONTENDS, or `auto` for the first front end that works.
        dynamic: axes to make dynamic. All other sizes are constants of the graph.
        trained: names of the parameters that require gradients in training, directly or through a branch. None for all.
        rewrites: passes that run on a full graph before it is compared with the model.

    Raises:
        CaptureError: the model raises on the inputs, or no front end works. The message lists the reason of each.
    """
    if frontend != "auto" and frontend not in FRONTENDS:
        names = ("auto", *FRONTENDS)
        raise CaptureError(
            f"frontend={frontend!r} does not exist{nearest(frontend, names)}. Use one of {', '.join(names)}.",
            code="unknown-name",
        )
    on_values = has_values(model)
    with with_fake_tensors(model, args, kwargs) as (inputs, named):
        # Run the eager model before any tracer does: each graph is compared with the results of this run.
        with requiring_grad(model, trained):
            preflight = run_preflight(model, inputs, named, torch.is_grad_enabled())
        example = _Example(model, inputs, named, dynamic, trained, rewrites, preflight, on_values)
        if isinstance(model, fx.GraphModule):
            captured = GRAPH_MODULE.trace(model, inputs, named, dynamic)
        else:
            tried = FRONTENDS.values() if frontend == "auto" else (FRONTENDS[frontend],)
            captured = example.first_that_agrees(tuple(tried))
    # Guard the Python state only now: a first run may fill caches in the model's attributes.
    state = Guards(model, preflight.assigned, preflight.written)
    return replace(
        captured,
        own_backward=bool(preflight.seen.functions),
        only_recomputes=preflight.obstacles == [RECOMPUTES],
        conditions=replace(
            captured.conditions,
            state=state,
            grad=preflight.grad,
            requires_grad=requires_grad(leaves(args, kwargs)) if preflight.seen.reads_grad_state else None,
        ),
    )


@dataclass(frozen=True)
class _Example:
    """The call to capture: the arguments of `capture`, and the observations of the preflight run.

    Args:
        on_values: False if the model runs on fake tensors, because it is on the meta device or sharded.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic: Collection[Axis]
    trained: Collection[str] | None
    rewrites: Sequence[Rewrite]
    preflight: Preflight
    on_values: bool

    def first_that_agrees(self, front_ends: Sequence[FrontEnd]) -> Captured:
        """Return the graph of the first front end that works.

        Raises:
            CaptureError: every front end fails. The message lists their reasons.
        """
        register_cache_pytrees(self.model)
        name = type(self.model).__name__
        failures: list[tuple[str, str, Exception]] = []
        for front_end in front_ends:
            start = time.monotonic()
            try:
                captured = self._captured(front_end)
                log.info("%s captured by %s, in %.2f s", name, front_end.name, time.monotonic() - start)
                return replace(captured, refused=tuple((failed, reason) for failed, reason, _ in failures))
            except OUT_OF_MEMORY:  # the next front end would not need less memory
                raise
            except Exception as fault:  # tracers raise exceptions of any type
                failures.append((front_end.name, one_line(fault), fault))
                seconds = time.monotonic() - start
                log.info("%s not captured by %s, in %.2f s: %s", name, front_end.name, seconds, one_line(fault))
        reasons = "".join(f"\n  {failed}: {reason}{self._where(fault)}" for failed, reason, fault in failures)
        raise CaptureError(
            f"No front end can capture {name}. Change the code that the reasons below name, or adapt only a part of "
            f"the model:{reasons}"
        ) from failures[0][2]

    def _captured(self, front_end: FrontEnd) -> Captured:
        """Return the result of one front end. A full graph is compared with the model first."""
        if not front_end.full_graph:
            if not self.on_values:
                raise RuntimeError(
                    "this front end must run the model, which has no values here (it is on the meta device, or "
                    "sharded). Load its weights before adapt"
                )
            # Not under `requiring_grad`: dynamo guards on requires_grad, so the flags must be as in later calls.
            with isolated_model(self.model):
                return front_end.trace(self.model, self.args, self.kwargs, self.dynamic)
        self.preflight.check()
        captured = self._traced(front_end)
        with requiring_grad(self.model, self.trained):
            check_agrees(captured.module, self.preflight, self.model, self.args, self.kwargs)
        return captured

    def _traced(self, front_end: FrontEnd) -> Captured:
        """Return the full graph after the rewrites, traced in the gradient mode in which it will be called."""
        grad = self.preflight.grad is not False  # if the mode does not matter (None), trace with gradients
        with isolated_model(self.model), requiring_grad(self.model, self.trained), torch.set_grad_enabled(grad):
            captured = front_end.trace(self.model, *copy_inputs(self.args, self.kwargs), self.dynamic)
            for rewrite in self.rewrites:
                captured = replace(captured, module=rewrite(captured.module).graph_module)
            return captured

    def _where(self, fault: Exception) -> str:
        """Return the first module in which a graph differs from the model, as the end of a sentence, or ""."""
        if not isinstance(fault, Disagreement) or not self.on_values:
            return ""
        with requiring_grad(self.model, self.trained):
            module = first_difference(fault, self.model, self.args, self.kwargs)
        return f"; the first module that differs is {module}"


def open_model(model: Any) -> nn.Module:
    """Return the module to adapt: the model itself, or the graph module of an ExportedProgram.

    Raises:
        CaptureError: the model is neither an nn.Module nor an ExportedProgram.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise CaptureError(
            f"model is a {type(model).__name__}, and neither torch.export nor torch.fx can trace TorchScript. Pass the "
            "nn.Module from which it was scripted or traced.",
            code="not-a-model",
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model is a {type(model).__name__}. Pass an nn.Module, a GraphModule or an ExportedProgram. "
            "torch.export.load(path) returns the ExportedProgram of a .pt2 file. It unpickles: load only files that "
            "you trust.",
            code="not-a-model",
        )
    return model
