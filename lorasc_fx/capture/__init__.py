"""The door to the front ends: which are tried, in what order, and why the earlier ones refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.capture.export import capture_dynamo, capture_export
from lorasc_fx.capture.gradients import requiring_grad
from lorasc_fx.capture.graph import capture_graph
from lorasc_fx.capture.guards import Guards
from lorasc_fx.capture.hollow import device_of, faked, has_numbers, is_hollow
from lorasc_fx.capture.live import OWNER, Captured, quiet
from lorasc_fx.capture.pieces import Pieces, capture_pieces
from lorasc_fx.capture.pt2 import inert
from lorasc_fx.capture.signature import Call, Calls, bind, check_binds, copied, leaves, requires_grad, signature_of
from lorasc_fx.capture.symbolic import capture_symbolic
from lorasc_fx.capture.trees import know_trees, whole
from lorasc_fx.capture.trial import Disagreement, Trial, check_agrees, first_difference, one_line, seed, try_model
from lorasc_fx.capture.untouched import substituted, untouched, written_by
from lorasc_fx.capture.watch import watch
from lorasc_fx.errors import CaptureError, nearest, path_of
from lorasc_fx.undo import grad_mode, raise_of_handler

__all__ = [
    "FRONTENDS",
    "OWNER",
    "Call",
    "Calls",
    "Captured",
    "Guards",
    "Pieces",
    "bind",
    "capture",
    "check_binds",
    "copied",
    "device_of",
    "is_hollow",
    "leaves",
    "one_line",
    "open_model",
    "quiet",
    "requiring_grad",
    "seed",
    "signature_of",
    "substituted",
    "try_model",
    "untouched",
    "watch",
    "whole",
    "written_by",
]

log = logging.getLogger("lorasc_fx")

FrontEnd = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], bool], Captured]

FRONTENDS: dict[str, FrontEnd] = {
    "export": capture_export,
    "dynamo": capture_dynamo,
    "symbolic": capture_symbolic,
    "pieces": capture_pieces,
}
"""Front ends for eager models, in the order in which `auto` tries them."""


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    frontend: str = "auto",
    wide: bool = False,
    trained: Collection[str] | None = None,
) -> Captured:
    """Turn a call of the model into a graph that reads the live model; a graph is taken if its values and gradients are
    those of the eager model.

    Where the model computes something else without gradients, the graph is for the gradient mode that is on.

    Args:
        model: a graph module needs no front end. One on the meta device, or in parts, is captured without values.
        args, kwargs: example inputs in canonical shape (`check_binds`).
        frontend: a name in FRONTENDS, or `auto`: the first that takes the model.
        wide: sizes that a first capture fixes are dynamic as well (asked for when a second size has come).
        trained: names of the parameters that require gradients in training, by themselves or by a branch; all, if None.

    Raises:
        CaptureError: the model refuses the inputs, or no front end takes the model; each one's reason is told.
    """
    if frontend != "auto" and frontend not in FRONTENDS:
        known = ("auto", *FRONTENDS)
        raise CaptureError(
            f"frontend is {frontend!r}{nearest(frontend, known)}; known: {', '.join(known)}", code="unknown-name"
        )
    hollow = not has_numbers(model)
    with faked(model, args, kwargs) as (inputs, named):
        captured, trial = _captured(model, inputs, named, frontend, wide, hollow, trained)
    return replace(
        captured,
        functions=trial.functions,
        whole_elsewhere=trial.only_recomputes,
        state=Guards(model, trial.assigned, trial.written),
        grad=trial.grad,
        requires_grad=requires_grad(leaves(args, kwargs)) if trial.asks else None,
    )


def _captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    frontend: str,
    wide: bool,
    hollow: bool,
    trained: Collection[str] | None,
) -> tuple[Captured, Trial]:
    with requiring_grad(model, trained):
        trial = try_model(model, args, kwargs, torch.is_grad_enabled())
    if isinstance(model, fx.GraphModule):
        return capture_graph(model, args, kwargs), trial
    know_trees(model)
    refused: list[tuple[str, str]] = []
    faults: list[Exception] = []
    for name in FRONTENDS if frontend == "auto" else (frontend,):
        begun = time.monotonic()
        try:
            if name == "pieces":
                if hollow:
                    raise RuntimeError(
                        "is tried by values, and the model is on the meta device, or in parts: "
                        "give it its weights first"
                    )
                with untouched(model):  # its parameters as they are in every call, which dynamo guards
                    captured = capture_pieces(model, *copied(args, kwargs), wide)
            else:
                trial.check()
                captured = _checked(FRONTENDS[name], trial, model, args, kwargs, wide, trained)
            log.info("%s captured by %s, in %.2f s", type(model).__name__, name, time.monotonic() - begun)
            return replace(captured, refused=tuple(refused)), trial
        except MemoryError:  # says nothing of the front end
            raise
        except Exception as fault:  # a tracer may raise anything; each reason is told when none takes the model
            raise_of_handler(fault)
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
    for (name, reason), told in zip(refused, faults, strict=True):
        reasons += f"\n  {name}: {reason}"
        if isinstance(told, Disagreement) and not hollow:
            with requiring_grad(model, trained):
                reasons += f"; the first module that differs is {first_difference(told, model, args, kwargs)}"
    raise CaptureError(
        f"no front end takes {type(model).__name__}. Change what is told here, or adapt a part of it:{reasons}"
    ) from faults[0]


def _checked(
    front_end: FrontEnd,
    trial: Trial,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wide: bool,
    trained: Collection[str] | None,
) -> Captured:
    """Return a whole graph that does what the model does, captured in the gradient state of its calls."""
    with untouched(model), requiring_grad(model, trained), grad_mode(trial.grad is not False):
        captured = front_end(model, *copied(args, kwargs), wide)
    with requiring_grad(model, trained):
        check_agrees(captured.module, trial, model, args, kwargs)
    return captured


def open_model(model: Any) -> nn.Module:
    """Return the module to adapt: a module as it is, a program's graph module, or that of a .pt2 file.

    Nothing from the file is run: one with pickled parts, or more in its texts than names and arithmetic, is refused.

    Raises:
        CaptureError: it is none of these, or the file cannot be read, or holds what would be run.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(model, (str, PathLike)):
        path = path_of(model)
        if not path.is_file():
            raise CaptureError(f"{path} is not a file; give a .pt2 that torch.export.save wrote", code="file-not-found")
        try:
            with quiet(torch.is_grad_enabled()):  # torch 2.9 warns of its own buffers
                return torch.export.load(inert(path)).module()
        except CaptureError:
            raise
        except Exception as fault:
            raise_of_handler(fault)
            raise CaptureError(
                f"{path} cannot be read as a .pt2, write it anew by torch.export.save: {one_line(fault)}",
                code="unreadable-file",
            ) from fault
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise CaptureError(
            f"model is a {type(model).__name__} of TorchScript, whose code neither torch.export nor torch.fx reads; "
            "give the nn.Module that it was made of",
            code="torchscript-model",
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model is {type(model).__name__}; give an nn.Module, a GraphModule, an ExportedProgram, or a .pt2 path",
            code="not-a-model",
        )
    return model
