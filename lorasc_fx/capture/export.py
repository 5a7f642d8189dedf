"""Front ends `export` and `dynamo`: torch.export, non-strict and strict, with dynamic dimensions (Dim.AUTO).

Every dimension is dynamic, but for the space of images and video (the third and later axes of a floating tensor of
four or more): there symbolic sizes make torch.export slow (padding computed from sizes: 30 s for an EfficientNet that
takes 2 s with sizes fixed), and most models see one size. They become dynamic, `wide`, when a second size comes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorasc_fx.capture.live import Captured, read_live, traced
from lorasc_fx.capture.signature import signature_of
from lorasc_fx.graph import drop_nodes

__all__ = ["capture_dynamo", "capture_export"]

_GUARDS = "_guards_fn"


def capture_dynamo(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], wide: bool = False) -> Captured:
    """Return the model's ATen graph, traced by dynamo through the model's Python; raises what torch.export raises."""
    return capture_export(model, args, kwargs, wide, strict=True)


def capture_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], wide: bool = False, strict: bool = False
) -> Captured:
    """Return the model's ATen graph; raises what torch.export raises."""
    with traced():
        shapes = _dynamic(signature_of(model), args, kwargs, wide)
        program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes, strict=strict)
        exported = program.module()
    guards = exported._modules.get(_GUARDS)
    graph = exported.graph
    drop_nodes(graph, lambda node: node.op == "call_module" and node.target == _GUARDS)
    sizes = tuple(_fixed(node.meta.get("val")) for node in graph.nodes if node.op == "placeholder")
    return Captured(read_live(exported, graph, model), "dynamo" if strict else "export", guards, sizes=sizes)


def _fixed(value: Any) -> tuple[int | None, ...] | None:
    """Return the sizes of a placeholder's tensor that are constants of the graph, None for each that may vary."""
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _dynamic(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], wide: bool) -> Any:
    shapes: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        spec = pytree.tree_map(lambda leaf: _dimensions(leaf, wide), value)
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            shapes |= spec
        else:
            shapes[name] = spec
    return shapes


def _dimensions(leaf: Any, wide: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return None
    space = leaf.is_floating_point() and leaf.dim() > 3 and not wide
    return dict.fromkeys(range(2 if space else leaf.dim()), torch.export.Dim.AUTO)
