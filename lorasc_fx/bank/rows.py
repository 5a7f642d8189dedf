"""Finds where the rows of a batch are inside a graph, and runs a batch as one group of rows for each adapter.

The places of the rows are found by trying two random adapters. If each row of a batch has one of them, then its entries
in the input of every branch, and in the outputs, must equal those of a batch in which all rows have that adapter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch, Placement
from lorasc_fx.branch.placements import FIRST_AXIS, Rows
from lorasc_fx.check.isolation import isolated_model, isolation
from lorasc_fx.errors import StateError
from lorasc_fx.signature import is_opaque_leaf, leaves
from lorasc_fx.util.environment import kept_generators
from lorasc_fx.util.fingerprint import checksums

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Limit for rounding errors, by dtype, relative to the change that an adapter makes."""
_COARSE_TOLERANCE = 0.05
"""Tolerance for all other dtypes."""
_PREFERENCES = (FIRST_AXIS, Rows(1), Rows(0, inner=True), Rows(1, inner=True))
"""The places to try first for branches whose input does not show the place, because no adapter affects it."""


@dataclass(frozen=True)
class Layout:
    """How a graph treats the rows of a batch.

    Args:
        mixed: whether every branch can use separate factors for each row.
        places: where the rows are in the input of each branch node, by node name.
    """

    mixed: bool
    places: Mapping[str, Rows] = field(default_factory=dict)

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


def row_count(values: Sequence[object]) -> int | None:
    """Return the number of rows of a call: the size of axis 0 of its first tensor."""
    return next((len(leaf) for leaf in values if isinstance(leaf, torch.Tensor) and leaf.dim()), None)


def layout_of(
    graph: fx.GraphModule,
    model: nn.Module,
    inputs: Sequence[object],
    tensors: Callable[[int | Sequence[int]], list[torch.Tensor]],
) -> Layout:
    """Find the rows in a graph. The values and the Python state of the model are restored.

    One run for each bit of the row indices, with an adapter by this bit, identifies each row. A branch may have several
    places that agree with its input. Then only one of them may agree with everything that is computed from the branch.

    Args:
        graph: the graph after the pass `AdapterInputs`.
        model: the model that the graph reads.
        inputs: values of the placeholders for the model's inputs, in order.
        tensors: returns the values of the placeholders for the adapter: random adapter 0 or 1 for all rows, or one of
            them for each row.
    """
    count = row_count(inputs)
    assert count is not None
    if count == 1:
        return Layout(True)

    def run(adapter: int | Sequence[int], place_of: PlaceOf) -> list[_Projection]:
        """Run the graph, and return projections of the outputs that have the rows on axis 0."""
        values = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs]
        with isolated_model(model), kept_generators():
            torch.manual_seed(0)  # all runs need the same dropout
            output = _Trial(graph, place_of).run(*values, *tensors(adapter), enable_io_processing=False)
        return [_projected(leaf, max(1, leaf.dim() - 1)) for leaf in tensors_in(output) if _has_rows(leaf, count)]

    def tried(bit: int, known: Mapping[str, Rows], preferred: Rows = FIRST_AXIS) -> dict[str, list[Rows]] | None:
        """Run rows with two adapters. Return the places that agree with each branch, or None if a tensor has none."""
        chosen, fitting = [row >> bit & 1 for row in range(count)], dict[str, list[Rows]]()

        def find(name: str, x: _Projection | None) -> Rows:
            assert x is not None
            places = [known[name]] if name in known else _places(x.values.shape, count)
            fitting[name] = [place for place in places if alone[name].fits(x, place, chosen)]
            fitting[name].sort(key=lambda place: place != preferred)
            if not fitting[name]:
                raise _NoPlace
            return fitting[name][0]

        try:
            mixed = run(chosen, find)
        except _NoPlace:
            return None
        return fitting if all(map(lambda one, x: one.fits(x, FIRST_AXIS, chosen), outputs, mixed)) else None

    def agree(places: Mapping[str, Rows]) -> bool:
        return all(tried(bit, places) is not None for bit in range((count - 1).bit_length()))

    with torch.inference_mode(False), torch.no_grad():
        inputs_of: dict[str, list[_Projection | None]] = {}  # of each branch, with adapter 0 and with adapter 1

        def record(name: str, x: _Projection | None) -> None:
            inputs_of.setdefault(name, []).append(x)

        outputs = [_Alone(*each) for each in zip(run(0, record), run(1, record), strict=True)]
        alone = {name: _Alone(*each) for name, each in inputs_of.items() if None not in each}  # type: ignore[arg-type]
        if not outputs or len(alone) < len(inputs_of):
            return Layout(False)
        for preferred in _PREFERENCES:
            fitting = tried(0, {}, preferred)
            places = {name: rows[0] for name, rows in fitting.items()} if fitting is not None else {}
            if fitting is not None and agree(places):
                others = ({**places, name: place} for name, rows in fitting.items() for place in rows[1:])
                return Layout(False) if any(map(agree, others)) else Layout(True, places)
    return Layout(False)


PlaceOf = Callable[[str, "_Projection | None"], Rows | None]
"""Gets the name of a branch node and the projection of its input, or None if the branch has no rows. Returns the place
of the rows that the branch must use, or None for one adapter."""


class _NoPlace(Exception):
    """The input of a branch agrees with no place of the rows."""


class _Projection(NamedTuple):
    """A random projection of a tensor to some of its axes, which needs little memory.

    Args:
        values: tensor with the leading axes of the original one.
        tolerance: limit for rounding errors, relative to the change that an adapter makes.
    """

    values: torch.Tensor
    tolerance: float


class _Alone(NamedTuple):
    """Projections of a tensor in batches in which all rows have adapter 0, or all have adapter 1."""

    zero: _Projection
    one: _Projection

    def fits(self, mixed: _Projection, place: Rows, chosen: Sequence[int]) -> bool:
        """Return whether a projection for a batch with both adapters has the entries of each row's own adapter."""
        x, zero, one = mixed.values, self.zero.values, self.one.values
        if not x.shape == zero.shape == one.shape:
            return False
        expected, mask = zero.clone(), torch.tensor(chosen, dtype=torch.bool, device=x.device)
        place.first(expected, len(chosen))[mask] = place.first(one, len(chosen))[mask]  # a view of `expected`
        return bool((x - expected).norm() <= mixed.tolerance * (one - zero).norm())


def _projected(x: torch.Tensor, axes: int) -> _Projection:
    """Return the projection of a tensor to its first axes."""
    width = torch.promote_types(x.dtype, torch.float32)
    values = torch.nan_to_num(x.detach().to(width), 0.0, 0.0, 0.0)
    if x.dim() > axes:
        values = values.flatten(axes)
        values = values @ torch.randn(values.shape[-1], generator=torch.Generator().manual_seed(0)).to(values)
    return _Projection(values, _TOLERANCE.get(x.dtype, _COARSE_TOLERANCE))


def _places(shape: Sequence[int], count: int) -> list[Rows]:
    """Return the places where a tensor with these leading axes can have `count` rows."""
    axes = [axis for axis, length in enumerate(shape) if length and length % count == 0]
    return [Rows(axis, inner) for inner in (False, True) for axis in axes if not inner or shape[axis] > count]


class _Trial(fx.Interpreter):
    """Runs a graph, and asks for the place of the rows before each branch."""

    def __init__(self, graph: fx.GraphModule, place_of: PlaceOf) -> None:
        super().__init__(graph)
        self._place_of = place_of

    def run_node(self, n: fx.Node) -> Any:
        """Run a node. A branch computes with the rows at their place."""
        if n.op != "call_module" or "tensors" not in n.kwargs:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        branch = self.fetch_attr(str(n.target))
        assert isinstance(branch, Branch)
        place = self._place_of(n.name, _branch_input(branch, args, kwargs["at"]))
        return self.call_module(str(n.target), args, kwargs if place is None else {**kwargs, "rows": tuple(place)})


def _branch_input(branch: Branch, args: Sequence[Any], at: Placement) -> _Projection | None:
    """Return the projection of a branch's input to the axes that may have the rows.

    None for branches without rows: on a weight, for stacked experts, whose tokens are sorted by expert, and for a
    convolution of a single image.
    """
    placements = (Placement.BESIDE, Placement.LOOKUP, Placement.MERGED)
    if at not in placements or (at is Placement.MERGED and branch.kind == "experts"):
        return None
    x = args[0 if at is Placement.MERGED else 1]
    if branch.kind == "conv":
        return _projected(x, 1) if x.dim() == len(branch.weight_shape) else None
    return _projected(x, x.dim() - (at is not Placement.LOOKUP))


def _has_rows(leaf: object, count: int) -> bool:
    """Whether a value is a tensor with `count` rows on axis 0."""
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == count


def tensors_in(output: object) -> list[torch.Tensor]:
    """Return the tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output, is_leaf=is_opaque_leaf) if isinstance(leaf, torch.Tensor)]


def check_batch_norm(model: nn.Module) -> None:
    """Raise StateError if a batch norm of the model computes over the batch because it is in train mode."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise not_independent(f"{name} is a {type(module).__name__} in train mode, which mixes the rows")


def check_splits(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int, accepted: set[tuple[int, ...]]
) -> None:
    """Raise StateError if the model computes something else for a part of the rows than for the full batch.

    Args:
        model: the model.
        args, kwargs: arguments of a call.
        count: number of rows.
        accepted: the arguments that were cut into parts in calls that passed this check. Calls that cut the same
            arguments are not checked again, unless the rows of such an argument were all equal.
    """
    tensors = {index: leaf for index, leaf in enumerate(leaves(args, kwargs)) if _has_rows(leaf, count)}
    if tuple(tensors) in accepted:
        return
    order = [*range(1, count)] if count > 2 else [1, 1, 1]  # a part of one row could be broadcast

    def part_of(leaf: Any) -> Any:
        return leaf[torch.tensor(order, device=leaf.device)] if _has_rows(leaf, count) else leaf

    def run(args: object, kwargs: Mapping[str, object], *, evaluate: bool) -> tuple[list[torch.Tensor], list[str]]:
        """Return the outputs, and the names of the buffers that forward writes."""
        with isolation(model, args, kwargs, grad=False) as (inputs, named):
            if evaluate:
                model.eval()  # dropout would draw other numbers for a part
            before = checksums(dict(model.named_buffers()))
            outputs = tensors_in(model(*inputs, **named))
            after = checksums(dict(model.named_buffers()))
        return outputs, [name for name in after if after[name] != before.get(name)]

    if written := run(args, kwargs, evaluate=False)[1]:
        raise not_independent(f"forward writes into the buffer {written[0]}, once for each adapter")
    full_outputs, _ = run(args, kwargs, evaluate=True)
    part_args, part_kwargs = pytree.tree_map(part_of, (args, dict(kwargs)), is_leaf=is_opaque_leaf)
    try:
        part_outputs, _ = run(part_args, part_kwargs, evaluate=True)
    except (AssertionError, RuntimeError, ValueError, IndexError) as fault:
        raise not_independent(f"the model cannot compute a part of the rows ({fault})") from fault
    for full, part in zip(full_outputs, part_outputs, strict=True):
        tolerance = _TOLERANCE.get(full.dtype, _COARSE_TOLERANCE)
        alike = _has_rows(full, count) and full[order].shape == part.shape
        if not alike or (full[order].double() - part.double()).norm() > tolerance * part.double().norm():
            raise not_independent("the model computes something else for a part of the rows")
    if all(bool((leaf != leaf[:1]).any()) for leaf in tensors.values()):
        accepted.add(tuple(tensors))


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
            if any(leaf != leaves[0] for leaf in leaves):
                raise not_independent(f"an output is {leaves[0]!r} for one part of the rows, and differs for another")
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
