"""Random projections of gradients, which are small enough to be stored for a comparison of two executions."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.quantized import can_require_grad
from lorasc_fx.util.undo import Block, isolated

PROJECTIONS = 8
"""Number of random projections of a tensor."""


@isolated
def requiring_grad(undo: Block, model: nn.Module, names: Collection[str] | None) -> None:
    """Context manager: let exactly these parameters require gradients, as in training.

    Args:
        undo: restores the flags at the end of the block.
        model: the model.
        names: names of the parameters. None for every parameter with a dtype that has gradients.
    """
    for name, parameter in model.named_parameters():
        undo(partial(parameter.requires_grad_, parameter.requires_grad))
        parameter.requires_grad_(can_require_grad(parameter) and (names is None or name in names))


def backward_nodes(outputs: Sequence[torch.Tensor]) -> set[Any]:
    """Return all nodes of the autograd graph that computed some tensors."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    nodes = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting.append(node)
    return nodes


_VIEWS = {f"{name}Backward0" for name in ("Alias", "Expand", "ReshapeAlias", "Slice", "UnsafeView", "View")}
"""Nodes of views. A traced graph may have more or fewer of them than the model, for example for `x[:]`."""


def autograd_edges(outputs: Sequence[torch.Tensor], leaves: Mapping[str, torch.Tensor]) -> Counter[Any]:
    """Count the edges of the autograd graph of some tensors. With equal values and edges, gradients are equal.

    An edge is (name of a node, name of the node or leaf that receives its gradient, index of the receiver's output).
    Nodes of views are skipped. Hooks are not shown.
    """
    names = {id(leaf): name for name, leaf in leaves.items()}

    def after(edges: Sequence[tuple[Any, int]]) -> Iterator[tuple[str, int]]:
        for edge in edges:
            node, index = edge
            while type(node).__name__ in _VIEWS:
                node, index = node.next_functions[0]
            if node is not None:
                leaf = getattr(node, "variable", None)
                yield type(node).__name__ if leaf is None else names.get(id(leaf), ""), index

    edges = Counter(("", *edge) for edge in after([(output.grad_fn, output.output_nr) for output in outputs]))
    for node in backward_nodes(outputs):
        if (name := type(node).__name__) not in _VIEWS:
            edges.update((name, *edge) for edge in after(node.next_functions))
    return edges


def projected_gradients(outputs: Sequence[torch.Tensor], leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run backward from a random projection of the outputs, and return {leaf name: projections of its gradient}.

    Leaves without a gradient are left out. `.grad` of the leaves is left unchanged, and their accumulation hooks are
    not called. Raises any exception of the backward pass.
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
    # Backward may reach other leaves than `leaves`. Their gradients must be left unchanged too.
    reached = [node.variable for node in backward_nodes(roots) if hasattr(node, "variable")]
    with without_gradients([*named.values(), *reached]):
        for name, leaf in named.items():
            leaf.register_post_accumulate_grad_hook(partial(take, name))
        backward_of_projection(roots)
    return projections


@isolated
def without_gradients(undo: Block, leaves: Sequence[torch.Tensor]) -> None:
    """Context manager: remove the gradients and accumulation hooks of leaves, and restore them at the end."""

    def restore(leaf: Any, gradient: torch.Tensor | None, hooks: Any, ours: dict[int, Any]) -> None:
        ours.clear()  # if the leaf had no hooks (None), torch would still call the hooks in this dict
        leaf._post_accumulate_grad_hooks = hooks
        leaf.grad = gradient

    unique: list[Any] = list({id(leaf): leaf for leaf in leaves}.values())
    for leaf in unique:
        ours = OrderedDict[int, Any]()
        undo(partial(restore, leaf, leaf.grad, leaf._post_accumulate_grad_hooks, ours))
        leaf.grad, leaf._post_accumulate_grad_hooks = None, ours


def backward_of_projection(outputs: Sequence[torch.Tensor]) -> None:
    """Run backward from a random projection of the outputs. A no-op if there are no outputs."""
    coefficients = []
    for index, output in enumerate(outputs):
        random = _normal(output.shape, index).to(output.device, output.dtype)
        # Entries that are inf or nan get the coefficient 0. Otherwise they would make every gradient nan.
        coefficients.append(torch.where(output.detach().isfinite(), random, torch.zeros_like(random)))
    if outputs:
        torch.autograd.backward(outputs, coefficients)


def projected(value: torch.Tensor) -> torch.Tensor:
    """Return PROJECTIONS random projections of a tensor, as fp64 on the CPU.

    A projection is linear in the tensor, and all tensors of one shape get the same random coefficients. A coefficient
    is the product of a random number for the row and one for the column. That saves a random matrix of full size.
    """
    value = value.detach()
    if value.layout is not torch.strided:
        value = value.to_dense()
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.numel():
        value = value.new_zeros(1)
    # Flatten the leading and the trailing axes so that rows + columns, the number of random numbers, is smallest.
    sizes = (math.prod(value.shape[:axis]) for axis in range(value.dim() + 1))
    matrix = value.reshape(min(sizes, key=lambda rows: rows + value.numel() // rows), -1)
    matrix = matrix if matrix.dtype is torch.float64 else matrix.float()
    left_vectors, right_vectors = (_normal((PROJECTIONS, size), size).to(matrix) for size in matrix.shape)
    return ((left_vectors @ matrix) * right_vectors).sum(1).cpu().double()


def _normal(shape: Sequence[int], key: int) -> torch.Tensor:
    """Return normally distributed numbers, always the same ones for a shape and a key."""
    generator = torch.Generator().manual_seed(key)
    return torch.randn(tuple(shape), generator=generator)
