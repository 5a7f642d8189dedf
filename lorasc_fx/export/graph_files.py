"""Exports a cascade as one graph of ATen operations: an ExportedProgram, a `.pt2` file or an ONNX file."""

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
from lorasc_fx.cascade import example_or, fold_graph, graphs_of, run_of
from lorasc_fx.check.process_state import quiet
from lorasc_fx.checkpoint.files import replacing
from lorasc_fx.compile import Axis, Call, Variant
from lorasc_fx.errors import CaptureError, SpecError, named, path_of, warn
from lorasc_fx.export.adapter_files import checked_rank, inputs_of
from lorasc_fx.facade import Cascade
from lorasc_fx.graph.editor import assert_min_sizes
from lorasc_fx.peft.adapter_pairs import LowRankAdapter, branch_dtypes
from lorasc_fx.signature import bind, is_opaque_leaf, leaves, signature_of
from lorasc_fx.util.environment import module_of, require
from lorasc_fx.util.undo import Block, isolated


def pt2(
    cascade: Cascade,
    path: str | PathLike[str],
    args: Sequence[object] | None = None,
    kwargs: Mapping[str, object] | None = None,
    *,
    folded: bool = True,
    view: Literal["slow", "averaged"] = "slow",
    adapter_rank: int | None = None,
) -> Path:
    """Write the graph of eval mode as a .pt2 file, which `torch.export.load` reads without lorasc_fx.

    Dynamic sizes of the captured graph, such as the batch, stay dynamic. An axis of size 1 in the example is fixed. The
    example inputs in the file are zeros, not yours.

    Args:
        cascade: the cascade, which is not changed.
        path: a path that ends with `.pt2`.
        args, kwargs: inputs to capture the graph for. The default is the example of `adapt`.
        folded: True to write the folded weights without branches. False to write the running cascade, with branches and
            noise.
        view: the folded weights: `slow`, or their average over stages (`averaged`).
        adapter_rank: if given, write the base W0, and a graph that has the factors of an adapter of this rank as
            further inputs. `lorasc_fx.export.adapter` writes files with these inputs. If they are zero, the graph
            computes the base.

    Returns:
        The path.

    Raises:
        SpecError: the ending is invalid, or options cannot be combined.
        CaptureError: the model has no graph, or torch.export cannot export its graph.
        ExportError: the path cannot be written.
        StateError: the cascade was released, or the call is inside `with cascade.weights(...)` or inside a backward.
    """
    out = path_of(path)
    if out.suffix != ".pt2":
        raise SpecError(f"export.pt2: the path {out} must end with .pt2, which torch.export.load requires")
    exported, _, _ = _program(cascade, args, kwargs, folded, view, adapter_rank, "export.pt2")
    with replacing(out) as new:
        torch.export.save(exported, new)
    return out


def onnx(
    cascade: Cascade,
    path: str | PathLike[str],
    args: Sequence[object] | None = None,
    kwargs: Mapping[str, object] | None = None,
    *,
    folded: bool = True,
    view: Literal["slow", "averaged"] = "slow",
    adapter_rank: int | None = None,
) -> Path:
    """Write the graph of eval mode as an ONNX file. Dynamic sizes of the captured graph stay dynamic.

    ONNX does not check sizes. If the graph is wrong for a size of 0 or 1, there is a warning. The metadata of the file
    then has an entry `least_sizes` with the smallest valid sizes, as JSON: {input: {axis: size}}.

    torch chooses the opset version. For another version, pass the result of `program(...)` to torch.onnx.export.

    Args:
        path: a path that ends with `.onnx`. Weights of about 2 GB or more are written to a second file, `PATH.data`.
        adapter_rank: as for `pt2`, but the further inputs are optional. Without them, the graph computes the base.
        cascade, args, kwargs, folded, view: as for `pt2`.

    Returns:
        The path.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        SpecError: the ending is invalid, or options cannot be combined.
        CaptureError: the model has no graph, or an operator that torch.onnx cannot convert.
        ExportError: the path cannot be written.
        StateError: the cascade was released, or the call is inside `with cascade.weights(...)` or inside a backward.
    """
    out = path_of(path)
    if out.suffix != ".onnx":
        raise SpecError(f"export.onnx: the path {out} must end with .onnx")
    require("onnx", "onnx", "onnxscript")
    exported, least, inputs = _program(cascade, args, kwargs, folded, view, adapter_rank, "export.onnx")
    # Convert the program, and mark its optional inputs.
    try:
        with quiet():
            onnx_program = torch.onnx.export(exported, dynamo=True, verbose=False)
    except Exception as fault:  # torch.onnx may raise anything
        cause: BaseException = fault
        while cause.__cause__ is not None:  # only the innermost error has the reason
            cause = cause.__cause__
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise CaptureError(
            f"export.onnx: torch.onnx cannot convert this graph: {reason[0]}; replace this operation in the model",
            code="not-exportable",
        ) from fault
    assert onnx_program is not None
    graph = onnx_program.model.graph
    for value in graph.inputs:
        if value.name in inputs:  # give it an initializer, which makes an input optional in ONNX
            value.const_value = module_of("onnx", "onnxscript.ir").tensor(inputs[value.name], name=value.name)
            graph.register_initializer(value)
    if least:
        sizes = json.dumps(least)
        onnx_program.model.metadata_props["least_sizes"] = sizes
        warn(
            f"export.onnx: the smallest valid sizes by input and axis are {sizes}. Below them, the graph computes "
            "something else than the model, and ONNX cannot check sizes. Check them before you run the file, or export "
            "with smaller example inputs",
            "smaller-sizes-not-refused",
        )
    # Write into a temporary folder first, because torch chooses the names of the files with large weights.
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
    args: Sequence[object] | None = None,
    kwargs: Mapping[str, object] | None = None,
    *,
    folded: bool = True,
    view: Literal["slow", "averaged"] = "slow",
    adapter_rank: int | None = None,
) -> torch.export.ExportedProgram:
    """Return the graph of eval mode as a `torch.export.ExportedProgram`. The arguments are described at `pt2`.

    Raises:
        SpecError: options cannot be combined.
        CaptureError: the model has no graph, or torch.export cannot export its graph.
        StateError: the cascade was released, or the call is inside `with cascade.weights(...)` or inside a backward.
    """
    return _program(cascade, args, kwargs, folded, view, adapter_rank, "export.program")[0]


def _program(
    cascade: Cascade,
    args: Sequence[object] | None,
    kwargs: Mapping[str, object] | None,
    folded: bool,
    view: Literal["slow", "averaged"],
    rank: int | None,
    call: str,
) -> tuple[torch.export.ExportedProgram, dict[str, dict[int, int]], dict[str, torch.Tensor]]:
    """Return the program, its smallest sizes {input: {axis: size}}, and a zero adapter {input: tensor}, if any."""
    if rank is not None:
        checked_rank(rank, call, "adapter_rank")
        if not folded or view != "slow":
            raise SpecError(
                f"{call}: adapter_rank cannot be combined with `folded` and `view`, because the weights are the base "
                "W0. Remove them",
                code="conflicting-options",
            )
    with run_of(cascade).exclusive(call, keeps=True):  # only the checks
        pass
    inputs = example_or(cascade, args, kwargs)
    bound, named = bind(signature_of(cascade.model), *inputs)
    zeros: dict[str, torch.Tensor] = {}
    with _evaluating(cascade):
        # Choose the graph: with adapters as inputs, folded, or the running cascade.
        variant, captured_call = graphs_of(cascade).variant_of(bound, named, dynamic=True)
        module: nn.Module = cascade
        if rank is not None:
            module, zeros, least = _lifted(cascade, variant, captured_call, rank, call)
        elif folded or variant.universal:  # raises if the model has no graph
            module, least = fold_graph(cascade, bound, named, None, view)
        else:
            fold, model = graphs_of(cascade).compiler.fold, cascade.model
            _, least = fold(variant, model, cascade.stage, None, captured_call.args, captured_call.kwargs)
        # Export it with the dynamic sizes of the captured graph, and with the keyword arguments of the user's call.
        shapes = _dynamic_shapes(module, variant, bound, named, zeros)
        bound, named = _with_user_keywords(signature_of(cascade.model), bound, named, inputs[1])
        named |= zeros
        try:
            with quiet():
                exported = torch.export.export(module, bound, named, dynamic_shapes=shapes, strict=False)
        except Exception as fault:  # a tracer may raise anything
            reason = str(fault).strip().splitlines() or [type(fault).__name__]
            raise CaptureError(
                f"{call}: torch.export cannot export this graph: {reason[0]}; replace this operation in the model",
                code="not-exportable",
            ) from fault
    if not variant.conditions.sizes:  # the front end does not know the smallest sizes
        least = least_sizes(exported.module(), module, bound, named)
    names = [str(name) for name in exported.graph_signature.user_inputs]
    assert_min_sizes(exported.graph, names, least)  # torch.export drops checks that it considers redundant
    exported.graph_module.recompile()
    exported.example_inputs = pytree.tree_map_only(torch.Tensor, torch.zeros_like, (bound, named))
    by_name: dict[str, dict[int, int]] = {}
    for (index, axis), size in least.items():
        by_name.setdefault(names[index], {})[axis] = size
    return exported, by_name, zeros


def _lifted(
    cascade: Cascade, variant: Variant, captured_call: Call, rank: int, call: str
) -> tuple[nn.Module, dict[str, torch.Tensor], dict[Axis, int]]:
    """Return a graph on W0 whose adapters are inputs, a zero adapter {input: tensor}, and the smallest sizes."""
    run, plan = run_of(cascade), cascade.plan
    if plan.spec.adapter != "lora":
        raise SpecError(
            f"{call}: adapter={plan.spec.adapter!r} cannot be an input of the graph, because adapter files have "
            "low-rank factors. Adapt the base with adapter='lora'",
            code="not-exportable",
        )
    if changed := run.changed_buffers():
        raise SpecError(
            f"{call}: the training has changed {named(changed)}, so the graph would not be of the base. Train in eval "
            "mode, or export the folded run without adapter_rank",
            code="not-exportable",
        )
    zeros, _ = inputs_of(LowRankAdapter("no adapter", {}, {}), plan, rank, branch_dtypes(run))
    with run.exclusive(call):
        parameters = run.parameters_by_name()
        values = {name: run.slow.value(name, "base", parameters[name]) for name in run.slow.states}
    module, lifted, least = graphs_of(cascade).compiler.lift(
        variant, cascade.model, plan.stage, values, rank, captured_call.args, captured_call.kwargs
    )
    graph_inputs = {item.name: (item.shape, item.dtype) for item in lifted}
    for name in zeros.keys() | graph_inputs.keys():
        if name not in zeros or graph_inputs.get(name) != (tuple(zeros[name].shape), zeros[name].dtype):
            raise CaptureError(
                f"{call}: the graph has the adapter input {name} as {graph_inputs.get(name)}, which differs from the "
                "adapter files of this cascade. Export a call that uses all sites",
                code="not-exportable",
            )
    return module, zeros, least


def _dynamic_shapes(
    module: nn.Module,
    variant: Variant,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    static: Iterable[str],
) -> Any:
    """Return the `dynamic_shapes` of torch.export: {name of an argument of the module: its dynamic axes}.

    All axes are dynamic, except axes with a constant size in the captured graph, and axes of arguments in `static`.
    """
    flat = leaves(args, kwargs)
    sizes_of_inputs = variant.conditions.sizes or (None,) * len(flat)
    dynamic_axes = [
        {axis: torch.export.Dim.AUTO for axis in range(leaf.dim()) if sizes is None or sizes[axis] is None}
        if isinstance(leaf, torch.Tensor)
        else None
        for leaf, sizes in zip(flat, sizes_of_inputs, strict=True)
    ]
    _, tree = pytree.tree_flatten((args, dict(kwargs)), is_leaf=is_opaque_leaf)
    positional, by_name = pytree.tree_unflatten(dynamic_axes, tree)
    signature = inspect.signature(module.forward)
    named: dict[str, Any] = signature.bind(*positional, **by_name, **dict.fromkeys(static)).arguments
    if any(signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD for name in named):
        return None  # torch 2.13 does not support dynamic shapes for **kwargs
    return named


def _with_user_keywords(
    signature: inspect.Signature, args: tuple[object, ...], kwargs: dict[str, object], by_name: Mapping[str, object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of a call with the arguments in `by_name` as keywords, as in the user's call.

    An ExportedProgram accepts an argument only in the way in which it was exported: by position or by keyword.
    """
    arguments = signature.bind(*args, **kwargs).arguments
    named = {name: arguments.pop(name) for name in list(arguments) if name in by_name}
    leading = list(signature.parameters)[: len(arguments)]
    plain = all(
        signature.parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in (*arguments, *named)
    )
    return (tuple(arguments.values()), named) if plain and list(arguments) == leading else (args, kwargs)


@isolated
def _evaluating(undo: Block, cascade: Cascade) -> None:
    """Context manager: switch the model to eval mode, and restore the mode of each module afterwards."""
    for module in cascade.modules():
        undo(partial(setattr, module, "training", module.training))
    cascade.eval()
