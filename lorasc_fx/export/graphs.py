"""A cascade as one graph of ATen operations: an ExportedProgram, or a `.pt2` or ONNX file made from it."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorasc_fx.capture import least_sizes
from lorasc_fx.check.process_state import quiet
from lorasc_fx.compile import Axis, Call, Variant
from lorasc_fx.errors import CaptureError, SpecError, path_of, warn
from lorasc_fx.export.adapters import check_rank, inputs_of
from lorasc_fx.export.axes import name_axes
from lorasc_fx.facade import Cascade
from lorasc_fx.graph.editor import assert_min_sizes
from lorasc_fx.peft.low_rank import LowRankAdapter, branch_dtypes
from lorasc_fx.signature import bind, is_opaque_leaf, leaves, signature_of
from lorasc_fx.util.extras import module_of, require
from lorasc_fx.util.files import replacing
from lorasc_fx.util.undo import Block, isolated


def pt2(
    cascade: Cascade,
    path: str | PathLike[str],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    folded: bool = True,
    view: Literal["slow", "averaged"] = "slow",
    adapters: Literal["inputs"] | None = None,
    max_rank: int | None = None,
) -> Path:
    """Write the graph of eval mode as a .pt2 file, which `torch.export.load` reads without lorasc_fx.

    Dynamic sizes of the captured graph stay dynamic, such as the batch. An axis of size 1 in the example is fixed. The
    file holds zeros instead of your example inputs.

    Args:
        cascade: is not changed.
        path: ends with `.pt2`.
        args, kwargs: inputs to capture the graph for; by default those of `adapt`.
        folded: write the slow weights and the captured nodes; otherwise the running cascade, with branches and noise.
        view: if folded: `slow` weights, or their average over stages.
        adapters: `inputs` to write the base W0, whose graph takes the adapter of each site as inputs. `adapter` writes
            files for them, by name. Zeros are no adapter: the graph computes the base then.
        max_rank: of the adapters, for adapters="inputs".

    Returns:
        The path.

    Raises:
        SpecError: another ending, or options that exclude each other.
        CaptureError: the model has graph breaks, or torch.export does not take its graph.
        ExportError: the path cannot be written.
        StateError: after `release`, inside `weights`, or inside a backward.
    """
    out = path_of(path)
    if out.suffix != ".pt2":
        raise SpecError(f"export.pt2: {out} does not end with .pt2, as torch.export.load wants it")
    rank = _rank_of(adapters, max_rank, folded, view, "export.pt2")
    exported, _, _ = _program(cascade, args, kwargs, folded, view, rank, "export.pt2")
    with replacing(out) as new:
        torch.export.save(exported, new)
    return out


def onnx(
    cascade: Cascade,
    path: str | PathLike[str],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    folded: bool = True,
    view: Literal["slow", "averaged"] = "slow",
    adapters: Literal["inputs"] | None = None,
    max_rank: int | None = None,
) -> Path:
    """Write the graph of eval mode as an ONNX file. Dynamic sizes of the captured graph stay dynamic.

    Dynamic axes are named after their place in an input: `batch`, `sequence`, or of images `height` and `width`.

    ONNX does not check sizes. If the model computes something else than the graph at a size of 0 or 1, this warns, and
    the metadata of the file has the smallest sizes: `least_sizes`, as JSON by input and axis.

    torch chooses the version of the operators. For another version, give `program(...)` to torch.onnx.export.

    Args:
        cascade: is not changed.
        path: ends with `.onnx`. Weights of about 2 GB and more are written to a second file, `PATH.data`.
        args, kwargs: inputs to capture the graph for; by default those of `adapt`.
        folded: write the slow weights and the captured nodes; otherwise the running cascade, with branches and noise.
        view: if folded: `slow` weights, or their average over stages.
        adapters: `inputs` to write the base W0, whose graph takes the adapter of each site as inputs. `adapter` writes
            files for them, by name. They are optional: without an adapter the graph computes the base.
        max_rank: of the adapters, for adapters="inputs".

    Returns:
        The path.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        SpecError: another ending, or options that exclude each other.
        CaptureError: the model has graph breaks, or has an operator that torch.onnx does not know.
        ExportError: the path cannot be written.
        StateError: after `release`, inside `weights`, or inside a backward.
    """
    out = path_of(path)
    if out.suffix != ".onnx":
        raise SpecError(f"export.onnx: {out} does not end with .onnx")
    require("onnx", "onnx", "onnxscript")
    rank = _rank_of(adapters, max_rank, folded, view, "export.onnx")
    exported, least, inputs = _program(cascade, args, kwargs, folded, view, rank, "export.onnx")
    try:
        with quiet():
            onnx_program = torch.onnx.export(exported, dynamo=True, verbose=False)
    except Exception as fault:  # torch.onnx may raise anything
        cause: BaseException = fault
        while cause.__cause__ is not None:  # outer errors say that something failed, but not what
            cause = cause.__cause__
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise CaptureError(
            f"export.onnx: torch.onnx cannot convert this graph: {reason[0]}; change the model there",
            code="not-exportable",
        ) from fault
    assert onnx_program is not None
    name_axes(onnx_program)
    graph = onnx_program.model.graph
    for value in graph.inputs:
        if value.name in inputs:  # an input with an initializer is optional
            value.const_value = module_of("onnx", "onnxscript.ir").tensor(inputs[value.name], name=value.name)
            graph.register_initializer(value)
    if least:
        sizes = json.dumps(least)
        onnx_program.model.metadata_props["least_sizes"] = sizes
        warn(
            f"export.onnx: the smallest sizes by input and axis are {sizes}. Below them the model computes something "
            "else than its graph, and ONNX cannot refuse them: check sizes before you run the file, or export the "
            "model with example inputs of a smaller size",
            "smaller-sizes-not-refused",
        )
    with replacing(out) as new, tempfile.TemporaryDirectory(prefix=new.name, dir=new.parent) as folder:
        file = Path(folder, out.name)
        onnx_program.save(file)
        for weights in Path(folder).glob("*.data"):
            with replacing(out.with_name(weights.name)) as new_weights:
                weights.rename(new_weights)
        file.rename(new)
    return out


def program(
    cascade: Cascade,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    folded: bool = True,
    view: Literal["slow", "averaged"] = "slow",
    adapters: Literal["inputs"] | None = None,
    max_rank: int | None = None,
) -> torch.export.ExportedProgram:
    """Return the graph of eval mode as an ExportedProgram of torch; see `pt2`.

    Raises:
        SpecError: options that exclude each other.
        CaptureError: the model has graph breaks, or torch.export does not take its graph.
        StateError: after `release`, inside `weights`, or inside a backward.
    """
    rank = _rank_of(adapters, max_rank, folded, view, "export.program")
    return _program(cascade, args, kwargs, folded, view, rank, "export.program")[0]


def _rank_of(adapters: Any, max_rank: int | None, folded: bool, view: str, call: str) -> int | None:
    """Return the rank of adapters that are inputs; None if they are not.

    Raises:
        SpecError: options that exclude each other, or an invalid rank.
    """
    if adapters not in (None, "inputs"):
        raise SpecError(f"{call}: adapters is {adapters!r}; give 'inputs', or leave it out")
    if adapters is None and max_rank is None:
        return None
    if adapters is None or not folded or view != "slow":
        raise SpecError(
            f"{call}: adapters='inputs' takes max_rank, and writes the base W0. Leave out `folded` and `view`",
            code="conflicting-options",
        )
    check_rank(max_rank, call)
    return max_rank


def _program(
    cascade: Cascade,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    folded: bool,
    view: Literal["slow", "averaged"],
    rank: int | None,
    call: str,
) -> tuple[torch.export.ExportedProgram, dict[str, dict[int, int]], dict[str, torch.Tensor]]:
    """Return the program, the smallest sizes that it checks, by input and axis, and the tensors of no adapter by input.

    Args:
        cascade, args, kwargs, folded, which: as for `pt2`.
        rank: of the adapters, if they are inputs. There are no tensors otherwise.
        call: for messages.
    """
    cascade._run.check_ready(call)
    cascade._run.check_buffers(call)
    inputs = cascade._inputs(args, kwargs)
    bound, named = bind(signature_of(cascade.model), *inputs)
    nothing: dict[str, torch.Tensor] = {}
    with _evaluating(cascade):
        variant, captured_call = cascade._graphs.variant_of(bound, named, dynamic=True)
        module: nn.Module = cascade
        if rank is not None:
            module, nothing, least = _lifted(cascade, variant, captured_call, rank, call)
        elif folded or variant.universal:  # of a model with graph breaks: raises, and says where they are
            module, least = cascade._folded(bound, named, None, view)
        else:
            _, least = cascade._graphs.fold(variant, captured_call, None)
        shapes = _shapes(module, variant, bound, named, nothing)
        bound, named = _as_given(signature_of(cascade.model), bound, named, inputs[1])
        named |= nothing
        try:
            with quiet():
                exported = torch.export.export(module, bound, named, dynamic_shapes=shapes, strict=False)
        except Exception as fault:  # a tracer may raise anything
            reason = str(fault).strip().splitlines() or [type(fault).__name__]
            raise CaptureError(
                f"{call}: torch.export cannot export this graph: {reason[0]}; change the model there",
                code="not-exportable",
            ) from fault
    if not variant.conditions.sizes:  # torch.export traced its checks of sizes just now
        least = least_sizes(exported.module(), module, bound, named)
    names = [str(name) for name in exported.graph_signature.user_inputs]
    assert_min_sizes(exported.graph, names, least)  # torch drops checks that it considers redundant
    exported.graph_module.recompile()
    exported.example_inputs = pytree.tree_map_only(torch.Tensor, torch.zeros_like, (bound, named))
    by_name: dict[str, dict[int, int]] = {}
    for (index, axis), size in least.items():
        by_name.setdefault(names[index], {})[axis] = size
    return exported, by_name, nothing


def _lifted(
    cascade: Cascade, variant: Variant, captured_call: Call, rank: int, call: str
) -> tuple[nn.Module, dict[str, torch.Tensor], dict[Axis, int]]:
    """Return a graph on W0 whose adapter is an input, the tensors of no adapter by input, and smallest sizes.

    Raises:
        CaptureError: the inputs are not those that `adapter` writes for this cascade.
    """
    run, plan = cascade._run, cascade.plan
    with run.exclusive(call):
        parameters = run.parameters_by_name()
        values = {name: run.slow.value(name, "base", parameters[name]) for name in run.slow.states}
    module, lifted, least = cascade._graphs.compiler.lift(
        variant, cascade.model, plan.stage, values, rank, captured_call.args, captured_call.kwargs
    )
    empty = LowRankAdapter("no adapter", {}, {})
    nothing, _ = inputs_of(empty, plan, rank, branch_dtypes(run))
    found = {each.name: (each.shape, each.dtype) for each in lifted}
    for name in nothing.keys() | found.keys():
        if name not in nothing or found.get(name) != (tuple(nothing[name].shape), nothing[name].dtype):
            raise CaptureError(
                f"{call}: the graph of these inputs takes {found.get(name)} as {name} of an adapter, which no file of "
                "this cascade has. Export a call that uses all sites, of a cascade with adapter='lora'",
                code="not-exportable",
            )
    return module, nothing, least


def _shapes(
    module: nn.Module,
    variant: Variant,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    static: Iterable[str],
) -> Any:
    """Return which sizes are dynamic, by the names of the module's arguments, for torch.export.

    These are all sizes except the constants of the captured graph, and those of the arguments in `static`.
    """
    flat = leaves(args, kwargs)
    sizes_of_inputs = variant.conditions.sizes or (None,) * len(flat)
    open_axes = [
        {axis: torch.export.Dim.AUTO for axis in range(leaf.dim()) if sizes is None or sizes[axis] is None}
        if isinstance(leaf, torch.Tensor)
        else None
        for leaf, sizes in zip(flat, sizes_of_inputs, strict=True)
    ]
    _, tree = pytree.tree_flatten((args, dict(kwargs)), is_leaf=is_opaque_leaf)
    positional, by_name = pytree.tree_unflatten(open_axes, tree)
    signature = inspect.signature(module.forward)
    named: dict[str, Any] = signature.bind(*positional, **by_name, **dict.fromkeys(static)).arguments
    if any(signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD for name in named):
        return None  # torch 2.13 does not support them
    return named


def _as_given(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], by_name: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a bound call with the same arguments by name as in the user's call, because a program accepts no other."""
    arguments = signature.bind(*args, **kwargs).arguments
    named = {name: arguments.pop(name) for name in list(arguments) if name in by_name}
    leading = list(signature.parameters)[: len(arguments)]
    plain = all(
        signature.parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in (*arguments, *named)
    )
    return (tuple(arguments.values()), named) if plain and list(arguments) == leading else (args, kwargs)


@isolated
def _evaluating(undo: Block, cascade: Cascade) -> None:
    """Put the model in eval mode inside the block, and restore the mode of each module after it."""
    for module in cascade.modules():
        undo(partial(setattr, module, "training", module.training))
    cascade.eval()
