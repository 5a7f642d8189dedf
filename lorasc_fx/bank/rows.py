"""Finds where the rows of a batch are inside a graph, and runs a batch as one group of rows for each adapter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        determined: whether another batch cannot change `mixed`. False if too few entries of this batch differ.
    """

    places: Mapping[str, Rows]
    mixed: bool
    independent: bool
    determined: bool = True

    @property
    def contiguous(self) -> bool:
        """Whether consecutive rows of the batch are consecutive in the input of every branch."""
        return not any(rows.inner for rows in self.places.values())


def segments(adapters: Sequence[str | None]) -> Sequence[str | None]:
    """Return the adapter of each segment of the batch, where consecutive rows with one adapter share its factors.

    All segments have the same length, the greatest common divisor of the numbers of such rows: the adapters a, a, a, a,
    b, b have the segments a, a, b of two rows each.
    """
    return adapters[:: math.gcd(*(len(list(run)) for _, run in itertools.groupby(adapters)))]


def row_count(leaves: Sequence[Any]) -> int | None:
    """Return the number of rows of a call: the size of axis 0 of its first tensor."""
    return next((len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), None)


def layout_of(
    graph: fx.GraphModule, model: nn.Module, inputs: Sequence[Any], tensors: Sequence[torch.Tensor]
) -> Layout | None:
    """Find the rows in a graph: change some rows of the inputs, and observe which entries of tensors change.

    Each run replaces the rows that have the same value in one bit of their index. So 2 log2(rows) runs identify the
    row on which an entry depends, or show that it depends on several rows. A place must agree with all entries that
    have changed, and no other place may agree. A batch with few differences, such as short texts with padding, can
    agree with several places.

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
    sources = _sources(inputs, count)
    if sources is None:
        return None

    # Step 1: run the graph on the batch, then twice for each bit of the row indices.
    def run(replaced: Sequence[int]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None], dict[str, int]]:
        """Run the graph on copies of the inputs in which some rows are copies of another row."""
        order = [sources[row] if row in replaced else row for row in range(count)]
        values = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs]
        values = [
            value[torch.tensor(order, device=value.device)] if _has_rows(value, count) else value for value in values
        ]  # rows of the batch are always valid inputs
        recorder = _InputRecorder(graph)
        with isolated_model(model), torch.random.fork_rng():
            torch.manual_seed(0)  # all runs need the same dropout
            output = recorder.run(*values, *tensors, enable_io_processing=False)
        return tensors_in(output), recorder.inputs, recorder.axes

    with torch.inference_mode(False), torch.no_grad():
        outputs, site_inputs, axes = run([])
        output_changes = [_Changes(x, 1) for x in outputs if _has_rows(x, count)]
        changes = {name: _Changes(x, axes[name]) for name, x in site_inputs.items() if x is not None}
        for bit in range((count - 1).bit_length()):
            for value in (0, 1):
                changed_outputs, changed_inputs, _ = run([row for row in range(count) if row >> bit & 1 == value])
                with_rows = [x for x, y in zip(changed_outputs, outputs, strict=True) if _has_rows(y, count)]
                for change, x in zip(output_changes, with_rows, strict=True):
                    change.observe(x)
                for name, change in changes.items():
                    change.observe(changed_inputs[name])
    # Step 2: find the places that agree with all runs. An input that does not depend on the batch, such as positions,
    # has no rows in any batch. Other inputs without changes may have some in another batch.
    dependent = _dependent_nodes(graph, [_has_rows(leaf, count) for leaf in inputs])
    places: dict[str, Rows] = {}
    undetermined, refused = False, len(changes) < len(site_inputs)
    for name, change in changes.items():
        fitting = change.fitting(count)
        if name in dependent and (len(fitting) > 1 or (fitting and not fitting[0].proven)):
            undetermined = True
        elif len(fitting) == 1 and fitting[0].proven and fitting[0].rows is not None:
            places[name] = fitting[0].rows
        else:
            refused = True
    independent = all(change.fits(_row_map(change.shape, 0, 1, 1, count)) for change in output_changes)
    return Layout(
        places, mixed=len(places) == len(site_inputs), independent=independent, determined=refused or not undetermined
    )


def _sources(inputs: Sequence[Any], count: int) -> list[int] | None:
    """Return, for each row of the inputs, the index of a row that differs from it. None if all rows are equal."""
    differs = torch.zeros(count, dtype=torch.bool)  # from row 0
    for leaf in inputs:
        if _has_rows(leaf, count):
            differs |= (leaf != leaf[:1]).reshape(count, -1).any(1).cpu()
    if not differs.any():
        return None
    different = int(differs.nonzero()[0])
    return [0 if differs[row] else different for row in range(count)]


def _dependent_nodes(graph: fx.GraphModule, has_rows: Sequence[bool]) -> set[str]:
    """Return the names of the nodes that depend on an input that has the rows of the batch.

    Args:
        graph: the graph.
        has_rows: whether each placeholder of the model's inputs has the rows, in order.
    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    names = {node.name for node, rows in zip(placeholders, has_rows, strict=False) if rows}
    for node in graph.graph.nodes:
        if any(argument.name in names for argument in node.all_input_nodes):
            names.add(node.name)
    return names


class _Changes:
    """Which entries of a tensor change when rows of the batch are replaced.

    Args:
        x: the tensor in the run with the original batch.
        axes: number of leading axes that may have the rows. Entries along the other axes are merged.
    """

    def __init__(self, x: torch.Tensor, axes: int) -> None:
        self.x, self.shape = x, x.shape[:axes]
        self.sizes: list[torch.Tensor | None] = []  # largest change for each index of the leading axes, by run

    def observe(self, changed: torch.Tensor | None) -> None:
        """Add a run with replaced rows. The order of runs is bit 0 with value 0, bit 0 with value 1, and so on."""
        if changed is None or changed.shape != self.x.shape:
            self.sizes.append(None)
            return
        size = torch.nan_to_num((changed.double() - self.x.double()).abs()).reshape(*self.shape, -1)
        self.sizes.append(size.amax(-1) if size.shape[-1] else size.new_zeros(self.shape))

    def fits(self, rows: torch.Tensor | None) -> bool:
        """Whether each entry that has changed depends on one row only, which is the row in `rows` (of `shape`)."""
        if rows is None or any(size is None for size in self.sizes):
            return False
        sizes = torch.stack([size for size in self.sizes if size is not None])
        # An entry changes by the same amount in each run that replaces its row. Smaller changes are rounding errors.
        largest = sizes.amax(0)
        hits = sizes > _TOLERANCE.get(self.x.dtype, _COARSE_TOLERANCE) * largest
        rows = rows.to(self.x.device)
        expected = torch.stack([rows >> run // 2 & 1 == run % 2 for run in range(len(sizes))])
        return bool(((hits == expected) | (largest == 0)).all())

    def fitting(self, count: int) -> list[_Place]:
        """Return all places of `count` rows that agree with the changes."""
        fitting = []
        for axis, length in enumerate(self.shape):
            if not length or length % count:
                continue
            size = length // count
            for inner in (divisor for divisor in range(1, size + 1) if size % divisor == 0):
                rows = _row_map(self.shape, axis, inner, size // inner, count)
                if rows is not None and self.fits(rows):
                    changed = torch.stack([size for size in self.sizes if size is not None]).amax(0).cpu() > 0
                    place = Rows(axis, inner=inner < size) if inner in (1, size) else None
                    fitting.append(_Place(place, proven=len(rows[changed].unique()) == count))
        return fitting


class _Place(NamedTuple):
    """A possible place of the rows in a tensor.

    Args:
        rows: the place, or None if `Rows` cannot express it: the rows are in the middle of a flattened axis.
        proven: whether an entry of each row has changed.
    """

    rows: Rows | None
    proven: bool


def _row_map(shape: Sequence[int], axis: int, inner: int, outer: int, count: int) -> torch.Tensor | None:
    """Return the row of each entry of a tensor whose axis is [outer, count, inner], flattened. None if sizes differ."""
    if not shape or shape[axis] != outer * count * inner:
        return None
    rows = torch.arange(shape[axis]) // inner % count
    return rows.view(-1, *[1] * (len(shape) - axis - 1)).expand(*shape)


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

    If a call writes into an argument, the rows of that argument are written, too.

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

        selected: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # an argument, indices, and its rows there

        def select(leaf: Any, rows: list[int] = rows, selected: list[Any] = selected) -> Any:
            if not _has_rows(leaf, count):
                return leaf
            indices = torch.tensor(rows, device=leaf.device)
            selected.append((leaf, indices, leaf[indices]))
            return selected[-1][2]

        group_args, group_kwargs = pytree.tree_map(select, (args, dict(kwargs)), is_leaf=is_opaque_leaf)
        leaves, tree = pytree.tree_flatten(compute(name, group_args, group_kwargs), is_leaf=is_opaque_leaf)
        if not all(_has_rows(leaf, len(rows)) for leaf in leaves if isinstance(leaf, torch.Tensor)):
            raise not_independent("an output does not have the rows of the batch on axis 0")
        parts.append(leaves)
        with torch.no_grad():
            for leaf, indices, part in selected:
                if not torch.equal(part, leaf[indices]):  # forward has written into the copy
                    leaf[indices] = part
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
