"""Front ends `export` and `dynamo`: torch.export, non-strict and strict.

Symbolic sizes make torch.export two to seven times as slow, so only the axes that the caller names are dynamic.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import config
from torch.utils import _pytree as pytree

from lorasc_fx.capture.captured import OWNER, Axis, Captured, Conditions, FrontEnd, check_drew_nothing, read_live
from lorasc_fx.capture.reuse import Trace, derive, forget, store
from lorasc_fx.check.process_state import quiet
from lorasc_fx.graph.editor import call_instead, drop_nodes
from lorasc_fx.parameters import substituted
from lorasc_fx.quantized import as_opaque_products, quantized_in
from lorasc_fx.signature import argument_names, leaves, signature_of
from lorasc_fx.util.accelerator import generator_states
from lorasc_fx.util.undo import Block, isolated

_GUARDS = "_guards_fn"
_RESERVED = (set(dir(fx.GraphModule)) | {"_code", "_graph", "meta"}) - set(dir(nn.Module))


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Collection[Axis] = (),
    *,
    strict: bool,
) -> Captured:
    """Return the model's ATen graph. Raises what torch.export raises.

    Args:
        model, args, kwargs, dynamic: of the call.
        strict: whether dynamo traces the model's Python. Otherwise Python runs on fake tensors.
    """
    frontend = DYNAMO if strict else EXPORT
    names = argument_names(signature_of(model), args, kwargs)
    # An earlier call with the same trace has a graph to copy. Strict mode traces more than such a trace shows.
    trace = None if strict else Trace.of(model, args, kwargs, names)
    if (derived := derive(model, args, kwargs, names, trace)) is not None:
        graph, conditions = derived
        return Captured(graph, frontend, conditions, drop_cached=forget)
    root = _wrapped(model)
    with quiet(grad=torch.is_grad_enabled()):
        drawn = generator_states()
        shapes = _dynamic_shapes(signature_of(model), args, kwargs, dynamic)
        with substituted(model, _stand_ins(model)), as_opaque_products(), _export_settings():
            program = torch.export.export(root, args, dict(kwargs), dynamic_shapes=shapes, strict=strict)
        check_drew_nothing(drawn)
        program._guards_code = _by_parameter(program._guards_code, inspect.signature(root.forward))
        exported: Any = program.module()
    # The guards are kept apart from the graph, to be evaluated before a call rather than in it.
    guards = exported._modules.get(_GUARDS)
    try:
        if guards is not None:
            guards(*leaves(args, kwargs))
    except (AssertionError, NameError) as fault:
        raise RuntimeError(f"the guards of torch.export refuse its own example: {fault}") from fault
    graph = exported.graph
    drop_nodes(graph, lambda node: node.op == "call_module" and node.target == _GUARDS)
    inputs = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    sizes = tuple(
        tuple(size if isinstance(size, int) else None for size in value.shape)
        if isinstance(value, torch.Tensor)
        else None
        for value in inputs
    )
    live = read_live(exported, graph, model, prefix="" if root is model else "inside.")
    # A quantized weight implements F.linear, and not always the ATen op.
    quantized = {f"{OWNER}.{name}" for name in _stand_ins(model)}
    aten = torch.ops.aten.linear.default
    if quantized and call_instead(live.graph, aten, F.linear, lambda node: _weight(node) in quantized):
        live.recompile()
    conditions = Conditions(guards.forward if guards is not None else None, sizes, frozenset(dynamic))
    known = store(trace, names, model, live, conditions) if not quantized else None
    return Captured(live, frontend, conditions, known=known)


def _by_parameter(guards: list[str], signature: inspect.Signature) -> list[str]:
    """Return the guards with arguments called by name.

    torch 2.9 leaves dynamo's `L['args'][0]` in them, for a forward with `*args` and for a module whose call it wraps.
    """
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    for name, kind in kinds.items():
        if kind is inspect.Parameter.VAR_POSITIONAL:
            guards = [re.sub(rf"L\['{name}'\]\[(\d+)\]", rf"L['{name}_\1']", guard) for guard in guards]
    if "args" not in kinds:
        for index, name in enumerate(kinds):
            guards = [guard.replace(f"L['args'][{index}]", f"L['{name}']") for guard in guards]
    if kinds.get("kwargs") in (None, inspect.Parameter.VAR_KEYWORD):
        for name in kinds:
            guards = [guard.replace(f"L['kwargs']['{name}']", f"L['{name}']") for guard in guards]
    return guards


capture_export, capture_dynamo = partial(_export, strict=False), partial(_export, strict=True)
EXPORT, DYNAMO = FrontEnd("export", capture_export), FrontEnd("dynamo", capture_dynamo)


@isolated
def _export_settings(undo: Block) -> None:
    """Remove global hooks that an export leaves behind, and switch off what takes time and is not needed."""
    hooks = nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)

    def remove() -> None:  # torch 2.9 leaves a hook behind if an export fails
        for key in hooks.keys() - before:
            if hooks[key].__module__.startswith("torch."):
                del hooks[key]

    undo(remove)
    # Nothing reads the stack trace of a node, and recording them takes a sixth of the time of an export.
    if hasattr(config, "do_not_emit_stack_traces"):  # not in torch 2.9
        undo(partial(setattr, config, "do_not_emit_stack_traces", config.do_not_emit_stack_traces))
        config.do_not_emit_stack_traces = True


def _stand_ins(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return plain tensors to trace with instead of the quantized weights, which torch.export would decompose."""
    return {
        name: nn.Parameter(torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape), False)
        for name, value in quantized_in(dict(model.named_parameters())).items()
    }


def _weight(node: fx.Node) -> str:
    return str(node.args[1].target) if isinstance(node.args[1], fx.Node) else ""


class _Wrapper(nn.Module):
    """Holds a model that has children with names reserved by torch's graph modules, such as `code` and `graph`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = model
        self.training = model.training


def _wrapped(model: nn.Module) -> nn.Module:
    """Return the model, wrapped if one of its names is reserved."""
    if _RESERVED.isdisjoint({*model._modules, *model._parameters, *model._buffers}):
        return model

    def forward(self: _Wrapper, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)

    vars(forward)["__signature__"] = inspect.signature(type(model).forward)
    return cast("nn.Module", type("_Wrapper", (_Wrapper,), {"forward": forward})(model))


def _dynamic_shapes(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Collection[Axis]
) -> Any:
    """Return the `dynamic_shapes` of an export; None makes every size constant."""
    given = signature.bind(*args, **kwargs).arguments
    if not dynamic or any(signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD for name in given):
        return None  # torch 2.13 cannot match a tree of shapes with **kwargs
    numbers = itertools.count()

    def dimensions(leaf: Any) -> Any:
        index = next(numbers)
        if not isinstance(leaf, torch.Tensor):
            return None
        return {axis: torch.export.Dim.AUTO for axis in range(leaf.dim()) if (index, axis) in dynamic}

    return {name: pytree.tree_map(dimensions, value) for name, value in given.items()}
