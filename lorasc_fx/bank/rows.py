"""Checks that each row of a batch can have its own adapter, by trying two random adapters.

The graph runs with one of the two adapters for each row, and with one adapter for all rows. If a row has the same
adapter in two runs, its entries in the input of every branch and in the outputs must be equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch, Placement
from lorasc_fx.check.isolation import isolated_model
from lorasc_fx.errors import StateError
from lorasc_fx.signature import is_opaque_leaf
from lorasc_fx.util.environment import kept_generators

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Limit for rounding errors, by dtype, relative to the change that an adapter makes."""
_COARSE_TOLERANCE = 0.05
"""Tolerance for all other dtypes."""

Adapter = TypeVar("Adapter", bound=Hashable)


def segments(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Split the rows of a batch into segments of equal length with one adapter each, and return these adapters.

    The length is the greatest common divisor of the numbers of consecutive rows with one adapter. For example, the rows
    a, a, a, a, b, b have the segments a, a, b of two rows each.
    """
    return adapters[:: math.gcd(*(len(list(run)) for _, run in itertools.groupby(adapters)))]


def row_count(values: Sequence[object]) -> int | None:
    """Return the number of rows of a call: the size of axis 0 of its first tensor."""
    return next((len(leaf) for leaf in values if isinstance(leaf, torch.Tensor) and leaf.dim()), None)


def check_independent(
    graph: fx.GraphModule,
    model: nn.Module,
    inputs: Sequence[object],
    tensors: Callable[[int | Sequence[int]], list[torch.Tensor]],
) -> None:
    """Raise StateError unless all branches of a graph have the rows of the batch on the first axis of their input.

    Other axes may be flattened into this axis after the rows, such as [batch * tokens, features]. The values and the
    Python state of the model are restored. The graph runs once for each bit of the row indices. In such a run, a row
    gets adapter 0 or 1 by its bit, so that all runs together identify each row. If no adapter affects the input of a
    branch, the input identifies no row. Then another order of adapters in this branch must change a later value.

    Args:
        graph: the graph after the pass `AdapterInputs`.
        model: the model that the graph reads.
        inputs: values of the placeholders for the model's inputs, in order.
        tensors: returns the values of the other placeholders for random adapter 0 or 1, or for a list of one per row.
    """
    count = row_count(inputs)
    assert count is not None

    def projected(adapter: int | Sequence[int], rolled: str = "") -> dict[str, _Projection]:
        """Run the graph, and return projections of the inputs of the branches, and of the outputs that have rows."""
        values = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs]
        trial = _Trial(graph, count, rolled)
        with isolated_model(model), kept_generators():
            torch.manual_seed(0)  # all executions need the same dropout
            output = trial.run(*values, *tensors(adapter), enable_io_processing=False)
        rows = [leaf for leaf in tensors_in(output) if leaf.dim() and len(leaf) == count]
        if not rows:
            raise not_independent("no output has the rows of the batch on axis 0")
        outputs = {f"output {index}": _projected(leaf, max(1, leaf.dim() - 1)) for index, leaf in enumerate(rows)}
        return {**trial.inputs, **outputs}

    def first_fault(mixed: dict[str, _Projection], chosen: Sequence[int]) -> str | None:
        """Return the name of the first value in which a row has other entries than with its adapter alone, or None."""
        return next((name for name in mixed if not mixed[name].is_mix(zero[name], one[name], chosen)), None)

    bits = [[row >> bit & 1 for row in range(count)] for bit in range((count - 1).bit_length())]
    with torch.inference_mode(False), torch.no_grad():
        zero, one = projected(0), projected(1)
        for chosen in bits:
            if fault := first_fault(projected(chosen), chosen):
                raise not_independent(f"{fault} does not have the rows of the batch, in their order, on its first axis")
        for name in zero:
            unaffected = torch.equal(zero[name].values, one[name].values)
            if unaffected and name in _branch_names(graph) and first_fault(projected(bits[0], name), bits[0]) is None:
                raise not_independent(f"{name} has no effect on this batch, so it does not show its rows")


def _branch_names(graph: fx.GraphModule) -> set[str]:
    """Return the names of the branch nodes whose tensors are inputs of the graph."""
    return {node.name for node in graph.graph.nodes if node.op == "call_module" and "tensors" in node.kwargs}


class _Projection(NamedTuple):
    """A random projection of a tensor along its last axes, to save memory, and the tolerance for comparing it."""

    values: torch.Tensor
    tolerance: float

    def is_mix(self, zero: _Projection, one: _Projection, chosen: Sequence[int]) -> bool:
        """Return whether each row equals the row in `zero` or `one`, by the adapter that `chosen` has for the row."""
        x = self.values
        if not x.shape == zero.values.shape == one.values.shape:
            return False
        is_one = torch.tensor(chosen, dtype=torch.bool, device=x.device).repeat_interleave(len(x) // len(chosen))
        expected = torch.where(is_one.view(-1, *[1] * (x.dim() - 1)), one.values, zero.values)
        return bool((x - expected).norm() <= self.tolerance * (one.values - zero.values).norm())


def _projected(x: torch.Tensor, axes: int) -> _Projection:
    """Return the projection of a tensor to its first axes."""
    width = torch.promote_types(x.dtype, torch.float32)
    values = torch.nan_to_num(x.detach().to(width), 0.0, 0.0, 0.0)
    if x.dim() > axes:
        values = values.flatten(axes)
        values = values @ torch.randn(values.shape[-1], generator=torch.Generator().manual_seed(0)).to(values)
    return _Projection(values, _TOLERANCE.get(x.dtype, _COARSE_TOLERANCE))


class _Trial(fx.Interpreter):
    """Runs a graph, and records projections of the inputs of its branches.

    In the branch node named `rolled`, each row gets the adapter of the row before it.
    """

    def __init__(self, graph: fx.GraphModule, count: int, rolled: str) -> None:
        super().__init__(graph)
        self.inputs: dict[str, _Projection] = {}
        self._count, self._rolled, self._branches = count, rolled, _branch_names(graph)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        if n.name in self._branches:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            branch = self.fetch_attr(str(n.target))
            assert isinstance(branch, Branch)
            x = self.inputs[n.name] = _branch_input(branch, args, kwargs["at"])
            if not x.values.dim() or not len(x.values) or len(x.values) % self._count:
                shape = tuple(x.values.shape)
                raise not_independent(f"{branch.weight_name} has an input {shape} without {self._count} rows")
            if n.name == self._rolled:
                tensors = {name: value.roll(1, 0) for name, value in kwargs["tensors"].items()}
                return self.call_module(str(n.target), args, {**kwargs, "tensors": tensors})
        return super().run_node(n)


def _branch_input(branch: Branch, args: Sequence[Any], at: Placement) -> _Projection:
    """Return the projection of a branch's input to the axes that may have the rows.

    Raise StateError for an input without rows of the batch: of a branch on a weight, of stacked matrices, whose input
    is sorted by matrix, or of a convolution of a single image.
    """
    if at in (Placement.BESIDE, Placement.LOOKUP, Placement.MERGED) and branch.kind != "stacked":
        x = args[0 if at is Placement.MERGED else 1]
        if branch.kind != "conv":
            return _projected(x, x.dim() - (at is not Placement.LOOKUP))
        if x.dim() == len(branch.weight_shape):
            return _projected(x, 1)
    raise not_independent(f"{branch.weight_name} is used by an operation that cannot have factors for each row")


def tensors_in(output: object) -> list[torch.Tensor]:
    """Return the tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output, is_leaf=is_opaque_leaf) if isinstance(leaf, torch.Tensor)]


def check_batch_norm(model: nn.Module) -> None:
    """Raise StateError if a batch norm of the model computes over the batch because it is in train mode."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise not_independent(f"{name} is a {type(module).__name__} in train mode, which mixes the rows")


def not_independent(reason: str) -> StateError:
    """Return the error for a batch whose rows cannot use different adapters."""
    return StateError(
        f"bank: the rows of this batch cannot use different adapters, because {reason}. Call the bank once for each "
        "adapter, with its rows, or put layers that compute over the batch (BatchNorm) into eval mode",
        code="rows-not-independent",
    )
