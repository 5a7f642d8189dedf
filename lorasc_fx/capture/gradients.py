"""The gradients of a run, each reduced to a few random projections as soon as it is there.

A graph with the right values may have wrong gradients: it holds no tensor hook, and a branch of Python on
`requires_grad` as it was at the capture. Projections are linear, so that a weight whose gradient comes in several parts
(reentrant checkpoints) is handled as well, and no gradient is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import is_quantized
from lorasc_fx.undo import Block, isolated

__all__ = ["PROJECTIONS", "backward_nodes", "projected", "projected_gradients", "requiring_grad"]

PROJECTIONS = 8


@isolated
def requiring_grad(undo: Block[Any], model: nn.Module, names: Collection[str] | None) -> None:
    """Let these parameters require gradients, and no others: the state of training, in which branches move them.

    Args:
        undo: gives the flags back.
        model: whose parameters these are.
        names: of parameters; None for all that can.
    """
    for name, parameter in model.named_parameters():
        undo(partial(parameter.requires_grad_, parameter.requires_grad))
        possible = (parameter.is_floating_point() or parameter.is_complex()) and not is_quantized(parameter)
        parameter.requires_grad_(possible and (names is None or name in names))


def backward_nodes(outputs: Sequence[torch.Tensor]) -> set[Any]:
    """Return the nodes of the autograd graph behind some tensors."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for after, _ in waiting.pop().next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return seen


def projected_gradients(outputs: Sequence[torch.Tensor], leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return projections of the gradients of a random projection of outputs, by name of a leaf that has one.

    What is accumulated in `.grad` by then stays there, and hooks after accumulation are not called. Raises what the
    backward pass raises.
    """
    roots = [each for each in outputs if each.requires_grad and each.layout is torch.strided and not each.is_nested]
    found: dict[str, torch.Tensor] = {}

    def take(name: str, leaf: torch.Tensor) -> None:
        if leaf.grad is not None:
            part = projected(leaf.grad)
            found[name] = found[name] + part if name in found else part
            leaf.grad = None

    named = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and leaf.is_leaf}
    reached = [node.variable for node in backward_nodes(roots) if hasattr(node, "variable")]
    with _fresh([*named.values(), *reached]):
        for name, leaf in named.items():
            leaf.register_post_accumulate_grad_hook(partial(take, name))
        if roots:
            torch.autograd.backward(roots, [_weights_of(root, index) for index, root in enumerate(roots)])
    return found


@isolated
def _fresh(undo: Block[Any], leaves: Sequence[torch.Tensor]) -> None:
    """Let leaves have no gradient, and no hooks after accumulation, for the time of a block."""

    def give_back(leaf: Any, gradient: torch.Tensor | None, hooks: Any, ours: dict[int, Any]) -> None:
        ours.clear()  # torch goes on calling them where there were none before
        leaf._post_accumulate_grad_hooks = hooks
        leaf.grad = gradient

    unique: list[Any] = list({id(leaf): leaf for leaf in leaves}.values())
    for leaf in unique:
        ours = OrderedDict[int, Any]()
        undo(partial(give_back, leaf, leaf.grad, leaf._post_accumulate_grad_hooks, ours))
        leaf.grad, leaf._post_accumulate_grad_hooks = None, ours


def _weights_of(output: torch.Tensor, key: int) -> torch.Tensor:
    """Return the coefficients of an output's entries in the projection; 0 where it is not finite."""
    drawn = _normal(output.shape, key).to(output.device, output.dtype)
    return torch.where(output.detach().isfinite(), drawn, torch.zeros_like(drawn))


def projected(value: torch.Tensor) -> torch.Tensor:
    """Return some bilinear forms of a tensor, with vectors that depend on its shape alone; linear in the tensor."""
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
