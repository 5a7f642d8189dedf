"""Capture a call of a model as a graph, and compare the graph with the eager model.

The graph comes from torch.export, unless the model is a GraphModule already. If torch.export fails, or its graph
differs from the model, the model runs eagerly, and its modules read adapted weights (effective.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from lorasc_fx.capture.captured import (
    EAGER,
    EXPORT,
    OWNER,
    Axis,
    Captured,
    Conditions,
    FrontEnd,
    captured_graph,
    read_live,
)
from lorasc_fx.capture.least_sizes import least_sizes
from lorasc_fx.capture.torch_export import capture_export
from lorasc_fx.check.guards import Guards
from lorasc_fx.check.isolation import has_values, isolated_model, with_fake_tensors
from lorasc_fx.check.observe import one_line
from lorasc_fx.check.preflight import RECOMPUTES, Preflight, check_agrees, run_preflight
from lorasc_fx.check.projections import requiring_grad
from lorasc_fx.errors import CaptureError, nearest
from lorasc_fx.signature import copy_inputs, leaves, register_cache_pytrees, requires_grad
from lorasc_fx.util.environment import OUT_OF_MEMORY

__all__ = [
    "EAGER",
    "EXPORT",
    "FRONTENDS",
    "OWNER",
    "Axis",
    "Captured",
    "Conditions",
    "FrontEnd",
    "capture",
    "least_sizes",
    "not_captured",
    "open_model",
    "read_live",
]

log = logging.getLogger("lorasc_fx")

Rewrite = Callable[[fx.GraphModule], PassResult]

FRONTENDS = (EXPORT.name, EAGER.name)
"""Names of the front ends for models other than a GraphModule, in the order in which `auto` tries them."""


def capture(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    frontend: str = "auto",
    dynamic: Collection[Axis] = (),
    trained: Collection[str] | None = None,
    rewrites: Sequence[Rewrite] = (),
) -> Captured:
    """Trace one call of a model. The resulting graph holds no weights: it reads the model's parameters at each call.

    A graph is accepted only if it computes the same outputs and gradients as the eager model. If the model computes
    other outputs with gradients than without them, the graph is valid for the current gradient mode only.

    Args:
        model: the model. A GraphModule is not traced: its own graph is used. A sharded model runs on fake tensors.
        args, kwargs: example inputs in canonical form (`bind_inputs`).
        frontend: `export` for a graph of torch.export, `eager` for no graph, or `auto` for the first one that works.
        dynamic: axes to make dynamic. All other sizes are constants of the graph.
        trained: names of the parameters that training changes, directly or through a branch. None for all parameters.
        rewrites: passes that run on a traced graph before the graph is compared with the model.

    Raises:
        CaptureError: the model raises on the inputs, or torch.export fails and the model cannot run eagerly either.
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
        captured = captured_graph(model) if isinstance(model, fx.GraphModule) else example.captured(frontend)
    # Guard the Python state only now: a first call may fill caches in the model's attributes.
    state = Guards(model, preflight.assigned, preflight.written)
    return replace(
        captured,
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
    """The call to capture: the arguments of `capture`, and the observations of the preflight.

    Args:
        on_values: whether the model has real values. False if it is sharded and runs on fake tensors.
    """

    model: nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    dynamic: Collection[Axis]
    trained: Collection[str] | None
    rewrites: Sequence[Rewrite]
    preflight: Preflight
    on_values: bool

    def captured(self, frontend: str) -> Captured:
        """Return the graph of torch.export, or `module=None` if `frontend` asks for no graph or torch.export fails.

        Raises:
            CaptureError: there is no graph, and `frontend` is `export` or the tensors of the model have no values.
        """
        register_cache_pytrees(self.model)
        name, start, reasons, fault = type(self.model).__name__, time.monotonic(), dict[str, str](), None
        if frontend != EAGER.name:
            try:
                captured = self._exported()
                log.info("%s captured by %s, in %.2f s", name, captured.frontend.name, time.monotonic() - start)
                return captured
            except OUT_OF_MEMORY:
                raise
            except Exception as raised:  # tracers raise exceptions of any type
                reasons[EXPORT.name], fault = one_line(raised), raised
                seconds = time.monotonic() - start
                log.info("%s not captured by %s, in %.2f s: %s", name, EXPORT.name, seconds, one_line(raised))
        if frontend != EXPORT.name and self.on_values:
            log.info("%s runs eagerly", name)
            return Captured(None, EAGER, refused=tuple(reasons.items()))
        if frontend != EXPORT.name:
            reasons[EAGER.name] = "the model must run, and has no values here, because it is sharded"
        raise not_captured(self.model, reasons) from fault

    def _exported(self) -> Captured:
        """Trace the model by torch.export, in the gradient mode of later calls. Rewrite the graph, and compare it."""
        self.preflight.check()
        grad = self.preflight.grad is not False  # if the mode does not matter (None), trace with gradients
        with isolated_model(self.model), requiring_grad(self.model, self.trained), torch.set_grad_enabled(grad):
            module, conditions = capture_export(self.model, *copy_inputs(self.args, self.kwargs), self.dynamic)
            for rewrite in self.rewrites:
                module = rewrite(module).graph_module
        with requiring_grad(self.model, self.trained):
            check_agrees(module, self.preflight, self.model, self.args, self.kwargs)
        return Captured(module, EXPORT, conditions)


def not_captured(model: nn.Module, reasons: Mapping[str, str]) -> CaptureError:
    """Return the error for a model that cannot be captured. `reasons` is {name of a front end: why it failed}."""
    lines = "".join(f"\n  {tried}: {reason}" for tried, reason in reasons.items())
    return CaptureError(
        f"{type(model).__name__} cannot be captured. Change the code that the reasons below name, or adapt only a part "
        f"of the model:{lines}"
    )


def open_model(model: object) -> nn.Module:
    """Return the module to adapt: the model itself, or the graph module of an ExportedProgram.

    Raises:
        CaptureError: the model is neither an nn.Module nor an ExportedProgram, or it is TorchScript.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"model is a {type(model).__name__}. Pass an nn.Module without TorchScript, a GraphModule or an "
            "ExportedProgram. "
            "torch.export.load(path) returns the ExportedProgram of a .pt2 file. It unpickles: load only files that "
            "you trust.",
            code="not-a-model",
        )
    return model
