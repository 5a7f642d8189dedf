"""A cascade as an ONNX file, through torch.onnx of torch's own ExportedProgram."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from lorasc_fx.capture import quiet
from lorasc_fx.errors import CaptureError, CheckpointError, SpecError, path_of
from lorasc_fx.export.graphs import program
from lorasc_fx.extras import require
from lorasc_fx.runtime import Cascade
from lorasc_fx.undo import raise_of_handler

__all__ = ["onnx"]


def onnx(
    cascade: Cascade,
    path: str | PathLike[str],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    folded: bool = True,
    which: Literal["slow", "averaged"] = "slow",
    opset: int | None = None,
) -> Path:
    """Write the graph of eval mode as an ONNX file, with the sizes open that the captured graph leaves open.

    Args:
        cascade: goes on as it was.
        path: ends with `.onnx`. Weights of about 2 GB and more lie in a file beside it, `PATH.data`.
        args, kwargs: inputs whose graph is wanted; without, those of `adapt`.
        folded: the slow weights and the captured nodes; otherwise the running cascade, branches and noise included.
        which: of a folded one: `slow` weights, or their average over stages.
        opset: version of the operators; torch's own choice if not given.

    Returns:
        The path.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        SpecError: another ending.
        CaptureError: the model runs in pieces, or has an operator that torch.onnx does not know.
        CheckpointError: the path cannot be written.
        StateError: after `release`, inside `weights`, or inside a backward.
    """
    out = path_of(path)
    if out.suffix != ".onnx":
        raise SpecError(f"export.onnx: {out} does not end with .onnx", code="wrong-file-ending")
    require("onnx", "onnx", "onnxscript")
    made = program(cascade, args, kwargs, folded=folded, which=which, call="export.onnx")
    try:
        with quiet():
            found = torch.onnx.export(made, dynamo=True, opset_version=opset, verbose=False)
    except Exception as fault:  # torch.onnx raises what its parts raise
        raise_of_handler(fault)
        first: BaseException = fault
        while first.__cause__ is not None:  # the outer ones say that something failed, not what
            first = first.__cause__
        reason = str(first).strip().splitlines() or [type(first).__name__]
        raise CaptureError(
            f"export.onnx: torch.onnx does not take this graph: {reason[0]}; change the model there",
            code="export-refused",
        ) from fault
    assert found is not None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent) as room:
            found.save(Path(room, out.name))
            for written in sorted(Path(room).iterdir(), reverse=True):  # the numbers first, then the graph
                os.replace(written, out.parent / written.name)
    except OSError as fault:
        raise CheckpointError(
            f"{out}: was not written: {fault.strerror or fault}; what was there stays", code="write-failed"
        ) from fault
    return out
