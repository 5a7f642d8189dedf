"""Front ends `export` and `dynamo`: torch.export, non-strict and strict, with dynamic dimensions (Dim.AUTO).

Every dimension is dynamic, but for the space of images and video (the third and later axes of a floating tensor of
four or more): there symbolic sizes make torch.export slow (padding computed from sizes: 30 s for an EfficientNet that
takes 2 s with sizes fixed), and most models see one size. They become dynamic, `wide`, when a second size comes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import config
from torch.utils import _pytree as pytree

from lorasc_fx.capture.captured import OWNER, Captured, Conditions, check_drew_nothing, read_live
from lorasc_fx.capture.reuse import keep, kept, state_of
from lorasc_fx.check.isolation import quiet
from lorasc_fx.graph import call_instead, drop_nodes
from lorasc_fx.parameters import substituted
from lorasc_fx.quantized import as_opaque_products, is_quantized
from lorasc_fx.signature import leaves, signature_of
from lorasc_fx.util.accelerator import generator_states
from lorasc_fx.util.undo import Block, isolated

_GUARDS = "_guards_fn"
_TAKEN = (set(dir(fx.GraphModule)) | {"_code", "_graph", "meta"}) - set(dir(nn.Module))


def capture_dynamo(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], wide: bool = False) -> Captured:
    """Return the model's ATen graph, traced by dynamo through the model's Python; raises what torch.export raises."""
    return capture_export(model, args, kwargs, wide, strict=True)


def capture_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], wide: bool = False, strict: bool = False
) -> Captured:
    """Return the model's ATen graph, one that is kept where the state is the same; raises what torch.export raises."""
    frontend = "dynamo" if strict else "export"
    state = state_of(model, args, kwargs, frontend, wide)
    if (before := kept(state)) is not None:
        return Captured(before.on(model, OWNER), frontend, Conditions(before.guards, before.sizes), reused=True)
    root = _wrapped(model)
    with quiet(grad=torch.is_grad_enabled()):
        drawn = generator_states()
        shapes = _dynamic(signature_of(model), args, kwargs, wide)
        with substituted(model, _stand_ins(model)), as_opaque_products(), _buffer_hooks_kept(), _no_stack_traces():
            program = torch.export.export(root, args, dict(kwargs), dynamic_shapes=shapes, strict=strict)
        check_drew_nothing(drawn)
        program._guards_code = _by_parameter(program._guards_code, inspect.signature(root.forward))
        exported: Any = program.module()
    guards = exported._modules.get(_GUARDS)
    _check_guards(guards, leaves(args, kwargs))
    graph = exported.graph
    drop_nodes(graph, lambda node: node.op == "call_module" and node.target == _GUARDS)
    sizes = tuple(_fixed(node.meta.get("val")) for node in graph.nodes if node.op == "placeholder")
    live = read_live(exported, graph, model, prefix="" if root is model else "inside.")
    quantized = {f"{OWNER}.{name}" for name in _stand_ins(model)}
    aten = torch.ops.aten.linear.default  # a quantized weight knows torch's function, and not always the op
    if quantized and call_instead(live.graph, aten, F.linear, lambda node: _weight(node) in quantized):
        live.recompile()
    conditions = Conditions(guards.forward if guards is not None else None, sizes)
    if not quantized:
        keep(state, live, OWNER, conditions.guards, sizes)
    return Captured(live, frontend, conditions)


def _by_parameter(guards: list[str], signature: inspect.Signature) -> list[str]:
    """Return guards by the names that their function knows: torch 2.9 leaves `L['args'][0]` as dynamo writes it, for a
    forward of `*args` and for a module whose call it wraps.
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


def _check_guards(guards: nn.Module | None, flat: list[Any]) -> None:
    """Raise RuntimeError for guards that do not take the call that they were made of."""
    try:
        if guards is not None:
            guards(*flat)
    except (AssertionError, NameError) as fault:
        raise RuntimeError(f"the guards of torch.export refuse its own example: {fault}") from fault


@isolated
def _buffer_hooks_kept(undo: Block) -> None:
    """Remove the hook on all buffers of the process that torch 2.9 leaves where an export fails."""
    hooks = nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)

    def remove() -> None:
        for key in hooks.keys() - before:
            if hooks[key].__module__.startswith("torch."):
                del hooks[key]

    undo(remove)


@isolated
def _no_stack_traces(undo: Block) -> None:
    """Let torch look up no source line for each node: nothing here reads them, and it takes a sixth of an export."""
    if hasattr(config, "do_not_emit_stack_traces"):  # torch 2.9 has not
        undo(partial(setattr, config, "do_not_emit_stack_traces", config.do_not_emit_stack_traces))
        config.do_not_emit_stack_traces = True


def _stand_ins(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return plain tensors to trace with in place of quantized weights, which torch.export would take apart."""
    return {
        name: nn.Parameter(torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape), False)
        for name, value in model.named_parameters()
        if is_quantized(value)
    }


def _weight(node: fx.Node) -> str:
    return str(node.args[1].target) if isinstance(node.args[1], fx.Node) else ""


class _Wrapper(nn.Module):
    """Holds a model whose children have names that torch's graph modules need for themselves (`code`, `graph`)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = model
        self.training = model.training


def _wrapped(model: nn.Module) -> nn.Module:
    """Return the model, wrapped where one of its names is taken."""
    if _TAKEN.isdisjoint({*model._modules, *model._parameters, *model._buffers}):
        return model

    def forward(self: _Wrapper, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)

    vars(forward)["__signature__"] = inspect.signature(type(model).forward)
    return cast("nn.Module", type("_Wrapper", (_Wrapper,), {"forward": forward})(model))


def _fixed(value: Any) -> tuple[int | None, ...] | None:
    """Return the sizes of a placeholder's tensor that are constants of the graph, None for each that may vary."""
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _dynamic(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], wide: bool) -> Any:
    given = signature.bind(*args, **kwargs).arguments
    if any(signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD for name in given):
        return None  # torch 2.13 finds no tree for them; such a graph is for its own sizes
    return {name: pytree.tree_map(lambda leaf: _dimensions(leaf, wide), value) for name, value in given.items()}


def _dimensions(leaf: Any, wide: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return None
    space = leaf.is_floating_point() and leaf.dim() > 3 and not wide
    return dict.fromkeys(range(2 if space else leaf.dim()), torch.export.Dim.AUTO)
