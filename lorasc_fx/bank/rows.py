"""Where the rows of a batch are in a graph, and batches that run as one group of rows for each adapter."""

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
"""Largest change of another row that counts as rounding, relative to that of the row that was changed, by dtype."""
_COARSE = 0.05
"""The same for other dtypes."""


@dataclass(frozen=True)
class Layout:
    """How a graph treats the rows of a batch.

    Args:
        places: where the rows are in the input of each branch node, by name.
        mixed: whether each branch can compute with other factors for each row.
        independent: whether the rows of outputs that have rows on axis 0 depend on no other row of the input.
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
    """Find the rows by changing row 0 of the inputs, and looking at what changes in the graph.

    Args:
        graph: lifted.
        model: whose values and Python state are restored.
        inputs: for the other placeholders, in order. A tensor has the rows if its axis 0 has their number.
        tensors: for the inputs of the adapter.

    Returns:
        None if row 0 has the same values as every other row, so that nothing changes.
    """
    count = row_count(inputs)
    assert count is not None
    if count == 1:
        return Layout({}, mixed=True, independent=True)
    other = next((row for row in range(1, count) if not _same_rows(inputs, count, row)), None)
    if other is None:
        return None

    def changed(leaf: Any) -> Any:
        if not _has_rows(leaf, count):
            return leaf
        return torch.cat([leaf.detach()[other : other + 1], leaf.detach()[1:]])

    runs = []
    for values in (inputs, [changed(leaf) for leaf in inputs]):
        with isolated_model(model), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)  # the same dropout
            seen = _Inputs(graph)
            runs.append((seen.run(*values, *tensors, enable_io_processing=False), seen.read))
    (output, before), (changed_output, after) = runs
    places = {name: _place_in(x, after[name], seen.axes[name], count) for name, x in before.items()}
    pairs = zip(tensors_in(output), tensors_in(changed_output), strict=True)
    independent = all(_only_row_0(one, two, Rows(0), count) for one, two in pairs if _has_rows(one, count))
    found = {name: place for name, place in places.items() if place is not None}
    return Layout(found, mixed=len(found) == len(places), independent=independent)


class _Inputs(fx.Interpreter):
    """Runs a lifted graph and keeps the input of each branch node; None for a branch on a weight.

    Stacked experts get the tokens sorted by expert, and have no rows either.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.read: dict[str, torch.Tensor | None] = {}
        self.axes: dict[str, int] = {}  # number of leading axes of the input that may hold the rows

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        if n.op == "call_module" and "tensors" in n.kwargs:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            branch = self.fetch_attr(str(n.target))
            assert isinstance(branch, Branch)
            beside = kwargs["at"] in ("beside", "at_lookup") or (
                kwargs["at"] == "in_place" and branch.kind != "experts"
            )
            x = args[0 if kwargs["at"] == "in_place" else 1] if beside else None
            if branch.kind == "conv" and x is not None and x.dim() != len(branch.weight_shape):
                x = None  # an image without a batch
            self.axes[n.name] = 1 if branch.kind == "conv" or x is None else x.dim() - (kwargs["at"] != "at_lookup")
            self.read[n.name] = x.detach().clone() if x is not None else None
        return super().run_node(n)


def _place_in(x: torch.Tensor | None, changed: torch.Tensor | None, axes: int, count: int) -> Rows | None:
    """Return where the rows are in a tensor, of which the second value has another row 0."""
    if x is None or changed is None:
        return None
    for axis in range(axes):
        for inner in (False, True):
            if x.shape[axis] % count == 0 and _only_row_0(x, changed, Rows(axis, inner), count, moved=True):
                return Rows(axis, inner)
    return None


def _only_row_0(x: torch.Tensor, changed: torch.Tensor, rows: Rows, count: int, moved: bool = False) -> bool:
    """Whether two tensors differ in row 0 and in no other, apart from rounding."""
    if not x.dim() or x.shape != changed.shape or x.shape[rows.axis] % count:
        return False
    change = rows.first((changed.double() - x.double()).abs(), count).flatten(1)
    change = torch.nan_to_num(change.amax(1) if change.shape[1] else change.new_zeros(count))
    first, others = change[0].item(), change[1:].amax().item()
    return others <= _TOLERANCE.get(x.dtype, _COARSE) * first and (first > 0 or not moved)


def _same_rows(inputs: Sequence[Any], count: int, row: int) -> bool:
    return all(torch.equal(leaf[0], leaf[row]) for leaf in inputs if _has_rows(leaf, count))


def _has_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == count


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Return the tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output, is_leaf=is_opaque_leaf) if isinstance(leaf, torch.Tensor)]


def check_splits(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int) -> None:
    """Raise StateError unless the model computes for all rows but the first what it computes for them in the batch."""

    def rest(leaf: Any) -> Any:
        return leaf[1:] if _has_rows(leaf, count) else leaf

    with isolated_model(model), torch.random.fork_rng(), torch.no_grad():
        try:
            whole_batch = tensors_in(model(*args, **kwargs))
            part = tensors_in(model(*pytree.tree_map(rest, args), **pytree.tree_map(rest, dict(kwargs))))
        except (AssertionError, RuntimeError, ValueError, IndexError) as fault:
            raise not_independent(f"the model refuses a part of the rows ({fault})") from fault
    for one, two in zip(whole_batch, part, strict=True):
        same = one.dim() > 0 and one[1:].shape == two.shape
        if (
            not same
            or (one[1:].double() - two.double()).norm() > _TOLERANCE.get(one.dtype, _COARSE) * two.double().norm()
        ):
            raise not_independent("the model computes something else for a part of the rows")


def by_group(
    compute: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
    adapters: Sequence[str | None],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Compute the rows of each adapter as a batch of their own, and return the outputs in the order of the rows.

    Args:
        compute: computes a call with one adapter, from (adapter, args, kwargs).
        adapters: of the rows.
        args, kwargs: of the call.

    Raises:
        StateError: an output does not have the rows on its axis 0.
    """
    count, order, parts = len(adapters), [], []
    for name in dict.fromkeys(adapters):
        rows = [row for row, each in enumerate(adapters) if each == name]
        order += rows

        def taken(leaf: Any, rows: list[int] = rows) -> Any:
            return leaf[torch.tensor(rows, device=leaf.device)] if _has_rows(leaf, count) else leaf

        group_args, group_kwargs = pytree.tree_map(taken, (args, dict(kwargs)), is_leaf=is_opaque_leaf)
        leaves, tree = pytree.tree_flatten(compute(name, group_args, group_kwargs), is_leaf=is_opaque_leaf)
        if not all(_has_rows(leaf, len(rows)) for leaf in leaves if isinstance(leaf, torch.Tensor)):
            raise not_independent("an output does not have the rows of the batch on axis 0")
        parts.append(leaves)
    back = [order.index(row) for row in range(count)]

    def joined(leaves: tuple[Any, ...]) -> Any:
        if not isinstance(leaves[0], torch.Tensor):
            return leaves[0]
        return torch.cat(leaves)[torch.tensor(back, device=leaves[0].device)]

    return pytree.tree_unflatten([joined(leaves) for leaves in zip(*parts, strict=True)], tree)


def not_independent(reason: str) -> StateError:
    """Return the error for a batch whose rows cannot have several adapters."""
    return StateError(
        f"bank: the rows of this batch cannot have several adapters: {reason}, and a branch cannot compute with other "
        "factors for each row here. Call the bank once for each adapter, with its rows; put layers that compute over "
        "the batch (BatchNorm) in eval mode",
        code="rows-not-independent",
    )
