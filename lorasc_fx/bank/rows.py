"""Finds where the rows of a batch are inside a graph, and runs a batch as one group of rows for each adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch
from lorasc_fx.branch.given import Rows
from lorasc_fx.check.isolation import isolated_model
from lorasc_fx.errors import StateError
from lorasc_fx.signature import is_opaque_leaf

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Limit for rounding errors, by dtype: the change of other rows relative to the change of the row that is changed."""
_COARSE_TOLERANCE = 0.05
"""Tolerance for all other dtypes."""


@dataclass(frozen=True)
class Layout:
    """How a graph treats the rows of a batch.

    Args:
        places: where the rows are in the input of each branch node, by node name. Branches without rows are left out.
        mixed: whether every branch can use separate factors for each row.
        independent: whether each row of the output depends only on the same row of the input. Outputs without one row
            for each row of the batch on axis 0 are not considered.
    """

    places: Mapping[str, Rows]
    mixed: bool
    independent: bool


def row_count(leaves: Sequence[Any]) -> int | None:
    """Return the number of rows of a call: the size of axis 0 of its first tensor."""
    return next((len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), None)


def layout_of(
    graph: fx.GraphModule, model: nn.Module, inputs: Sequence[Any], tensors: Sequence[torch.Tensor]
) -> Layout | None:
    """Find the rows in a graph: change row 0 of the inputs, and observe which entries change.

    Args:
        graph: the graph after the pass `AdapterInputs`.
        model: the model that the graph reads. Its values and Python state are restored.
        inputs: values of the placeholders for the model's inputs, in order. A tensor has the rows of the batch if the
            size of its axis 0 is the number of rows.
        tensors: values of the placeholders for the adapter.

    Returns:
        The layout, or None if all rows have equal values, so that no change can be observed.
    """
    count = row_count(inputs)
    assert count is not None
    if count == 1:
        return Layout({}, mixed=True, independent=True)
    source = next((row for row in range(1, count) if not _same_rows(inputs, count, row)), None)
    if source is None:
        return None

    def changed(leaf: Any) -> Any:
        """Copy row `source` over row 0: values from the batch are always valid inputs."""
        if not _has_rows(leaf, count):
            return leaf
        return torch.cat([leaf.detach()[source : source + 1], leaf.detach()[1:]])

    runs = []
    for values in (inputs, [changed(leaf) for leaf in inputs]):
        with isolated_model(model), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)  # both runs need the same dropout
            recorder = _InputRecorder(graph)
            runs.append((recorder.run(*values, *tensors, enable_io_processing=False), recorder.inputs))
    (output, before), (changed_output, after) = runs
    places = {name: _rows_in(x, after[name], recorder.axes[name], count) for name, x in before.items()}
    pairs = zip(tensors_in(output), tensors_in(changed_output), strict=True)
    independent = all(_only_row_0(x, y, Rows(0), count) for x, y in pairs if _has_rows(x, count))
    with_rows = {name: rows for name, rows in places.items() if rows is not None}
    return Layout(with_rows, mixed=len(with_rows) == len(places), independent=independent)


class _InputRecorder(fx.Interpreter):
    """Runs a graph and records the input of each branch node.

    The input is None for branches without rows: branches on a weight, and stacked experts, whose tokens are sorted by
    expert.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.inputs: dict[str, torch.Tensor | None] = {}
        self.axes: dict[str, int] = {}  # number of leading axes of the input that may be the axis of rows

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and record its input if it is a branch."""
        if n.op == "call_module" and "tensors" in n.kwargs:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            branch = self.fetch_attr(str(n.target))
            assert isinstance(branch, Branch)
            beside = kwargs["at"] in ("beside", "at_lookup") or (
                kwargs["at"] == "in_place" and branch.kind != "experts"
            )
            x = args[0 if kwargs["at"] == "in_place" else 1] if beside else None
            if branch.kind == "conv" and x is not None and x.dim() != len(branch.weight_shape):
                x = None  # a single image without the axis of the batch
            self.axes[n.name] = 1 if branch.kind == "conv" or x is None else x.dim() - (kwargs["at"] != "at_lookup")
            self.inputs[n.name] = x.detach().clone() if x is not None else None
        return super().run_node(n)


def _rows_in(x: torch.Tensor | None, changed: torch.Tensor | None, axes: int, count: int) -> Rows | None:
    """Return where the rows are in a tensor. None if there is no such axis.

    Args:
        x: the tensor.
        changed: the same tensor in a run with another row 0.
        axes: number of leading axes to try.
        count: number of rows.
    """
    if x is None or changed is None:
        return None
    for axis in range(axes):
        for inner in (False, True):
            if x.shape[axis] % count == 0 and _only_row_0(x, changed, Rows(axis, inner), count, moved=True):
                return Rows(axis, inner)
    return None


def _only_row_0(x: torch.Tensor, changed: torch.Tensor, rows: Rows, count: int, moved: bool = False) -> bool:
    """Whether two tensors are equal in all rows but row 0, up to rounding. If `moved`, row 0 must differ."""
    if not x.dim() or x.shape != changed.shape or x.shape[rows.axis] % count:
        return False
    change = rows.first((changed.double() - x.double()).abs(), count).flatten(1)
    change = torch.nan_to_num(change.amax(1) if change.shape[1] else change.new_zeros(count))
    in_row_0, in_others = change[0].item(), change[1:].amax().item()
    return in_others <= _TOLERANCE.get(x.dtype, _COARSE_TOLERANCE) * in_row_0 and (in_row_0 > 0 or not moved)


def _same_rows(inputs: Sequence[Any], count: int, row: int) -> bool:
    """Whether a row of the inputs equals row 0."""
    return all(torch.equal(leaf[0], leaf[row]) for leaf in inputs if _has_rows(leaf, count))


def _has_rows(leaf: Any, count: int) -> bool:
    """Whether a value is a tensor with `count` rows on axis 0."""
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == count


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Return the tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output, is_leaf=is_opaque_leaf) if isinstance(leaf, torch.Tensor)]


def check_splits(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int) -> None:
    """Raise StateError if the model computes something else for a part of the batch than for the full batch.

    The part is the batch without row 0.
    """

    def without_row_0(leaf: Any) -> Any:
        return leaf[1:] if _has_rows(leaf, count) else leaf

    part_args, part_kwargs = pytree.tree_map(without_row_0, (args, dict(kwargs)))
    with isolated_model(model), torch.random.fork_rng(), torch.no_grad():
        try:
            full_outputs = tensors_in(model(*args, **kwargs))
            part_outputs = tensors_in(model(*part_args, **part_kwargs))
        except (AssertionError, RuntimeError, ValueError, IndexError) as fault:
            raise not_independent(f"the model cannot compute a part of the rows ({fault})") from fault
    for full, part in zip(full_outputs, part_outputs, strict=True):
        tolerance = _TOLERANCE.get(full.dtype, _COARSE_TOLERANCE)
        alike = full.dim() > 0 and full[1:].shape == part.shape
        if not alike or (full[1:].double() - part.double()).norm() > tolerance * part.double().norm():
            raise not_independent("the model computes something else for a part of the rows")


def by_group(
    compute: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
    adapters: Sequence[str | None],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run the rows of each adapter as a separate batch, and return the outputs in the original order of the rows.

    Args:
        compute: runs a call with one adapter, from (adapter, args, kwargs).
        adapters: the adapter of each row.
        args, kwargs: arguments of the call.

    Raises:
        StateError: an output does not have the rows on its axis 0.
    """
    count, order, parts = len(adapters), [], []
    for name in dict.fromkeys(adapters):
        rows = [row for row, adapter in enumerate(adapters) if adapter == name]
        order += rows

        def select(leaf: Any, rows: list[int] = rows) -> Any:
            return leaf[torch.tensor(rows, device=leaf.device)] if _has_rows(leaf, count) else leaf

        group_args, group_kwargs = pytree.tree_map(select, (args, dict(kwargs)), is_leaf=is_opaque_leaf)
        leaves, tree = pytree.tree_flatten(compute(name, group_args, group_kwargs), is_leaf=is_opaque_leaf)
        if not all(_has_rows(leaf, len(rows)) for leaf in leaves if isinstance(leaf, torch.Tensor)):
            raise not_independent("an output does not have the rows of the batch on axis 0")
        parts.append(leaves)
    positions = [order.index(row) for row in range(count)]  # the inverse of the permutation `order`

    def joined(leaves: tuple[Any, ...]) -> Any:
        if not isinstance(leaves[0], torch.Tensor):
            return leaves[0]
        return torch.cat(leaves)[torch.tensor(positions, device=leaves[0].device)]

    return pytree.tree_unflatten([joined(leaves) for leaves in zip(*parts, strict=True)], tree)


def not_independent(reason: str) -> StateError:
    """Return the error for a batch whose rows cannot have several adapters."""
    return StateError(
        f"bank: the rows of this batch cannot have several adapters, because {reason}. Call the bank once for each "
        "adapter, with its rows, or put layers that compute over the batch (BatchNorm) into eval mode",
        code="rows-not-independent",
    )
