"""Gradients reduced to a few random projections, so that the gradients of two runs can be compared without memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.quantized import can_require_grad
from lorasc_fx.util.undo import Block, isolated

PROJECTIONS = 8


@isolated
def requiring_grad(undo: Block, model: nn.Module, names: Collection[str] | None) -> None:
    """Let these parameters require gradients, and no others, as in training. None means all that can."""
    for name, parameter in model.named_parameters():
        undo(partial(parameter.requires_grad_, parameter.requires_grad))
        parameter.requires_grad_(can_require_grad(parameter) and (names is None or name in names))


def backward_nodes(outputs: Sequence[torch.Tensor]) -> set[Any]:
    """Return the nodes of the autograd graph behind some tensors."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    nodes = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting.append(node)
    return nodes


def projected_gradients(outputs: Sequence[torch.Tensor], leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return projections of the gradients of a random projection of outputs, for each leaf that has one.

    `.grad` of the leaves is left unchanged, and their hooks are not called. Raises what the backward pass raises.
    """
    roots = [
        output for output in outputs if output.requires_grad and output.layout is torch.strided and not output.is_nested
    ]
    projections: dict[str, torch.Tensor] = {}

    def take(name: str, leaf: torch.Tensor) -> None:
        if leaf.grad is not None:
            part = projected(leaf.grad)
            projections[name] = projections[name] + part if name in projections else part
            leaf.grad = None

    named = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and leaf.is_leaf}
    reached = [node.variable for node in backward_nodes(roots) if hasattr(node, "variable")]
    with without_gradients([*named.values(), *reached]):
        for name, leaf in named.items():
            leaf.register_post_accumulate_grad_hook(partial(take, name))
        backward_of_projection(roots)
    return projections


@isolated
def without_gradients(undo: Block, leaves: Sequence[torch.Tensor]) -> None:
    """Remove gradients and accumulation hooks of leaves inside the block."""

    def restore(leaf: Any, gradient: torch.Tensor | None, hooks: Any, ours: dict[int, Any]) -> None:
        ours.clear()  # if the leaf had no hooks, torch would keep calling ours
        leaf._post_accumulate_grad_hooks = hooks
        leaf.grad = gradient

    unique: list[Any] = list({id(leaf): leaf for leaf in leaves}.values())
    for leaf in unique:
        ours = OrderedDict[int, Any]()
        undo(partial(restore, leaf, leaf.grad, leaf._post_accumulate_grad_hooks, ours))
        leaf.grad, leaf._post_accumulate_grad_hooks = None, ours


def backward_of_projection(outputs: Sequence[torch.Tensor]) -> None:
    """Run backward from a random projection of the outputs, if there are any."""
    coefficients = []
    for index, output in enumerate(outputs):
        drawn = _normal(output.shape, index).to(output.device, output.dtype)
        # 0 for entries that are not finite: they would make every gradient nan.
        coefficients.append(torch.where(output.detach().isfinite(), drawn, torch.zeros_like(drawn)))
    if outputs:
        torch.autograd.backward(outputs, coefficients)


def projected(value: torch.Tensor) -> torch.Tensor:
    """Return some random projections of a tensor, which depend on its shape alone and are linear in the tensor."""
    value = value.detach()
    if value.layout is not torch.strided:
        value = value.to_dense()
    if value.is_complex():
        value = torch.view_as_real(value)
    matrix = value.reshape(value.shape[0] if value.dim() > 1 else 1, -1) if value.numel() else value.new_zeros(1, 1)
    matrix = matrix if matrix.dtype is torch.float64 else matrix.float()
    rows, columns = (_normal((PROJECTIONS, size), size).to(matrix) for size in matrix.shape)
    return ((rows @ matrix) * columns).sum(1).cpu().double()


def _normal(shape: Sequence[int], key: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(key)
    return torch.randn(tuple(shape), generator=generator)
