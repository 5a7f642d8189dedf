"""Trace a model by torch.export, in non-strict mode.

Only the axes that the caller names are dynamic, because symbolic sizes make torch.export two to seven times slower.
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

from lorasc_fx.capture.captured import OWNER, Axis, Conditions, check_no_random_draws, read_live
from lorasc_fx.check.process_state import quiet
from lorasc_fx.graph.editor import call_directly, drop_nodes
from lorasc_fx.parameters import substituted
from lorasc_fx.quantized import as_opaque_products, quantized_in
from lorasc_fx.signature import leaves, signature_of
from lorasc_fx.util.environment import generator_states
from lorasc_fx.util.undo import Block, isolated

_GUARDS = "_guards_fn"
"""Name of the child module that checks the guards of torch.export on the inputs."""
_RESERVED = (set(dir(fx.GraphModule)) | {"_code", "_graph", "meta"}) - set(dir(nn.Module))
"""Attributes of a GraphModule. No child, parameter or buffer of the exported model may have one of these names."""


def capture_export(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    dynamic: Collection[Axis] = (),
) -> tuple[fx.GraphModule, Conditions]:
    """Return the model's ATen graph, and the conditions for its calls. Raises any exception of torch.export."""
    signature = _explicit(signature_of(model), kwargs) if dynamic else signature_of(model)
    root = _wrapped(model, signature)
    with quiet(grad=torch.is_grad_enabled()):
        generators = generator_states()
        shapes = _dynamic_shapes(signature, args, kwargs, dynamic)
        # Quantized weights are traced as plain tensors, and quantized layers as opaque ops.
        with substituted(model, _plain_weights(model)), as_opaque_products(), _export_settings():
            program = torch.export.export(root, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
        check_no_random_draws(generators)
        program._guards_code = _name_arguments(program._guards_code, inspect.signature(root.forward))
        exported: Any = program.module()
    # Take the guards out of the graph: the cascade checks them before it calls the graph.
    guards = exported._modules.get(_GUARDS)
    try:
        if guards is not None:
            guards(*leaves(args, kwargs))
    except (AssertionError, NameError) as fault:
        raise RuntimeError(f"the guards of torch.export reject the example inputs: {fault}") from fault
    graph = exported.graph
    drop_nodes(graph, lambda node: node.op == "call_module" and node.target == _GUARDS)
    inputs = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    sizes = tuple(
        tuple(size if isinstance(size, int) else None for size in value.shape)
        if isinstance(value, torch.Tensor)
        else None
        for value in inputs
    )
    module = read_live(exported, graph, model, prefix="" if root is model else "inside.")
    # Tensor subclasses of quantized weights implement F.linear, but not always the ATen op that export recorded.
    quantized = {f"{OWNER}.{name}" for name in _plain_weights(model)}
    if quantized:
        linears = {
            node
            for node in module.graph.nodes
            if node.target is torch.ops.aten.linear.default and getattr(node.args[1], "target", None) in quantized
        }
        call_directly(module.graph, lambda node: F.linear if node in linears else None)
        module.recompile()
    return module, Conditions(guards.forward if guards is not None else None, sizes, frozenset(dynamic))


def _name_arguments(guards: list[str], signature: inspect.Signature) -> list[str]:
    """Return the code of guards, in which each argument is read by name instead of by position.

    torch 2.9 leaves dynamo's `L['args'][0]` in the code if forward has `*args` or the module is wrapped.
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


@isolated
def _export_settings(undo: Block) -> None:
    """Context manager: remove global hooks that a failed export leaves behind, and do not record stack traces."""
    hooks = nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)

    def remove() -> None:  # needed for torch 2.9
        for key in hooks.keys() - before:
            if hooks[key].__module__.startswith("torch."):
                del hooks[key]

    undo(remove)
    # This package does not use the stack traces of nodes, and recording them takes a sixth of the time of an export.
    if hasattr(config, "do_not_emit_stack_traces"):  # not in torch 2.9
        undo(partial(setattr, config, "do_not_emit_stack_traces", config.do_not_emit_stack_traces))
        config.do_not_emit_stack_traces = True


def _plain_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {name of a quantized weight: plain tensor of its shape, to trace with}.

    torch.export would split the tensor subclass of the weight into its parts. The plain tensor is an expanded scalar.
    """
    return {
        name: nn.Parameter(torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape), False)
        for name, value in quantized_in(dict(model.named_parameters())).items()
    }


class _Wrapper(nn.Module):
    """Wraps a model whose attribute names or signature torch.export refuses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = model
        self.training = model.training


def _explicit(signature: inspect.Signature, kwargs: Mapping[str, object]) -> inspect.Signature:
    """Replace `**kwargs` of a signature by one keyword-only parameter for each argument that a call passes in it.

    torch 2.13 cannot match `dynamic_shapes` with `**kwargs`.
    """
    named = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in named]
    return signature.replace(parameters=[*named.values(), *added]) if added else signature


def _wrapped(model: nn.Module, signature: inspect.Signature) -> nn.Module:
    """Return the model, wrapped if it has a reserved name or if its forward has another signature than `signature`."""
    reserved = not _RESERVED.isdisjoint({*model._modules, *model._parameters, *model._buffers})
    if not reserved and signature == signature_of(model):
        return model

    def forward(self: _Wrapper, *args: object, **kwargs: object) -> Any:
        return self.inside(*args, **kwargs)

    # torch.export names the inputs by the signature of forward.
    of_self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    vars(forward)["__signature__"] = signature.replace(parameters=[of_self, *signature.parameters.values()])
    return cast("nn.Module", type("_Wrapper", (_Wrapper,), {"forward": forward})(model))


def _dynamic_shapes(
    signature: inspect.Signature, args: tuple[object, ...], kwargs: Mapping[str, object], dynamic: Collection[Axis]
) -> Any:
    """Return the argument `dynamic_shapes` of torch.export.export. None makes every size constant."""
    if not dynamic:
        return None
    arguments = signature.bind(*args, **kwargs).arguments
    indices = itertools.count()  # tree_map visits the leaves in order

    def dimensions(leaf: object) -> Any:
        index = next(indices)
        if not isinstance(leaf, torch.Tensor):
            return None
        return {axis: torch.export.Dim.AUTO for axis in range(leaf.dim()) if (index, axis) in dynamic}

    return {name: pytree.tree_map(dimensions, value) for name, value in arguments.items()}
