"""The door to the front ends: which are tried, in what order, and why the earlier ones refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from lorasc_fx.capture.captured import OWNER, Captured, Conditions, capture_graph, read_live
from lorasc_fx.capture.export import capture_dynamo, capture_export
from lorasc_fx.capture.graph_breaks import GraphBreakFallback, capture_fallback, eager_trace
from lorasc_fx.capture.least_sizes import Axis, least_sizes
from lorasc_fx.capture.reuse import forget
from lorasc_fx.capture.symbolic import capture_symbolic
from lorasc_fx.check.guards import Guards
from lorasc_fx.check.isolation import (
    call_recorder,
    device_of,
    first_checksums,
    has_values,
    is_on_meta,
    isolated_model,
    isolation,
    quiet,
    with_fake_tensors,
    written_by,
)
from lorasc_fx.check.preflight import (
    Difference,
    Disagreement,
    Preflight,
    backward_of_projection,
    check_agrees,
    first_difference,
    one_line,
    requiring_grad,
    run_preflight,
    without_gradients,
)
from lorasc_fx.errors import CaptureError, nearest
from lorasc_fx.signature import (
    Call,
    Calls,
    bind,
    check_binds,
    copied,
    know_trees,
    leaves,
    requires_grad,
    signature_of,
    whole,
)

__all__ = [
    "FRONTENDS",
    "OWNER",
    "Axis",
    "Call",
    "Calls",
    "Captured",
    "Conditions",
    "Difference",
    "Disagreement",
    "GraphBreakFallback",
    "Guards",
    "backward_of_projection",
    "bind",
    "call_recorder",
    "capture",
    "check_binds",
    "copied",
    "device_of",
    "eager_trace",
    "first_checksums",
    "first_difference",
    "forget",
    "is_on_meta",
    "isolation",
    "least_sizes",
    "leaves",
    "one_line",
    "open_model",
    "quiet",
    "read_live",
    "requiring_grad",
    "run_preflight",
    "signature_of",
    "whole",
    "without_gradients",
    "written_by",
]

log = logging.getLogger("lorasc_fx")

Rewrite = Callable[[fx.GraphModule], PassResult]
FrontEnd = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], bool], Captured]

FRONTENDS: dict[str, FrontEnd] = {
    "export": capture_export,
    "dynamo": capture_dynamo,
    "symbolic": capture_symbolic,
    "graph-breaks": capture_fallback,
}
"""Front ends for eager models, in the order in which `auto` tries them."""


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    frontend: str = "auto",
    wide: bool = False,
    trained: Collection[str] | None = None,
    rewrites: Sequence[Rewrite] = (),
) -> Captured:
    """Turn a call of the model into a graph that reads the live model; a graph is taken if its values and gradients are
    those of the eager model.

    Where the model computes something else without gradients, the graph is for the gradient mode that is on.

    Args:
        model: a graph module needs no front end. One on the meta device, or sharded, is captured without values.
        args, kwargs: example inputs in canonical shape (`check_binds`).
        frontend: a name in FRONTENDS, or `auto`: the first that takes the model.
        wide: sizes that a first capture fixes are dynamic as well (asked for when a second size has come).
        trained: names of the parameters that require gradients in training, by themselves or by a branch; all, if None.
        rewrites: passes that run on a whole graph before it is compared with the model.

    Raises:
        CaptureError: the model refuses the inputs, or no front end takes the model; the message has the reason of each.
    """
    if frontend != "auto" and frontend not in FRONTENDS:
        known = ("auto", *FRONTENDS)
        raise CaptureError(
            f"frontend is {frontend!r}{nearest(frontend, known)}; known: {', '.join(known)}", code="unknown-name"
        )
    without_values = not has_values(model)
    with with_fake_tensors(model, args, kwargs) as (inputs, named):
        captured, preflight = _captured(model, inputs, named, frontend, wide, without_values, trained, rewrites)
    return replace(
        captured,
        functions=preflight.functions,
        whole_elsewhere=preflight.only_recomputes,
        conditions=replace(
            captured.conditions,
            state=Guards(model, preflight.assigned, preflight.written),
            grad=preflight.grad,
            requires_grad=requires_grad(leaves(args, kwargs)) if preflight.asks else None,
        ),
    )


def _captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    frontend: str,
    wide: bool,
    without_values: bool,
    trained: Collection[str] | None,
    rewrites: Sequence[Rewrite],
) -> tuple[Captured, Preflight]:
    with requiring_grad(model, trained):
        preflight = run_preflight(model, args, kwargs, torch.is_grad_enabled())
    if isinstance(model, fx.GraphModule):
        return capture_graph(model, args, kwargs), preflight
    know_trees(model)
    refused: list[tuple[str, str]] = []
    faults: list[Exception] = []
    for name in FRONTENDS if frontend == "auto" else (frontend,):
        begun = time.monotonic()
        try:
            if name == "graph-breaks":
                if without_values:
                    raise RuntimeError(
                        "is tried by values, and the model is on the meta device, or sharded: give it its weights first"
                    )
                # torch.compile leaves attributes; parameters require gradients as in every call, which dynamo guards
                with isolated_model(model):
                    captured = capture_fallback(model, args, kwargs, wide)
            else:
                preflight.check()
                captured = _checked(FRONTENDS[name], preflight, model, args, kwargs, wide, trained, rewrites)
            log.info("%s captured by %s, in %.2f s", type(model).__name__, name, time.monotonic() - begun)
            return replace(captured, refused=tuple(refused)), preflight
        except MemoryError:  # says nothing of the front end
            raise
        except Exception as fault:  # a tracer may raise anything; the error has the reasons if none takes the model
            refused.append((name, one_line(fault)))
            log.info(
                "%s not captured by %s, in %.2f s: %s",
                type(model).__name__,
                name,
                time.monotonic() - begun,
                refused[-1][1],
            )
            faults.append(fault)
    reasons = ""
    for (name, reason), raised in zip(refused, faults, strict=True):
        reasons += f"\n  {name}: {reason}"
        if isinstance(raised, Disagreement) and not without_values:
            with requiring_grad(model, trained):
                reasons += f"; the first module that differs is {first_difference(raised, model, args, kwargs)}"
    raise CaptureError(
        f"no front end takes {type(model).__name__}. Change what the reasons name, or adapt a part of it:{reasons}"
    ) from faults[0]


def _checked(
    front_end: FrontEnd,
    preflight: Preflight,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wide: bool,
    trained: Collection[str] | None,
    rewrites: Sequence[Rewrite],
) -> Captured:
    """Return a whole graph that does what the model does, captured in the gradient state of its calls."""
    with isolated_model(model), requiring_grad(model, trained), torch.set_grad_enabled(preflight.grad is not False):
        captured = front_end(model, *copied(args, kwargs), wide)
        for rewrite in rewrites:
            captured = replace(captured, module=rewrite(captured.module).graph_module)
    try:
        with requiring_grad(model, trained):
            check_agrees(captured.module, preflight, model, args, kwargs)
    except Disagreement:
        if not captured.reused:
            raise
        forget()  # something has changed that no state tells
        return _checked(front_end, preflight, model, args, kwargs, wide, trained, rewrites)
    return captured


def open_model(model: Any) -> nn.Module:
    """Return the module to adapt: a module as it is, or the graph module of an exported program.

    Raises:
        CaptureError: it is neither.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise CaptureError(
            f"model is a {type(model).__name__} of TorchScript, whose code neither torch.export nor torch.fx reads; "
            "give the nn.Module that it was made of",
            code="not-a-model",
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model is {type(model).__name__}; give an nn.Module, a GraphModule, or an ExportedProgram. "
            "torch.export.load(path) reads one from a .pt2 file; it unpickles, so use it for files that you trust",
            code="not-a-model",
        )
    return model
