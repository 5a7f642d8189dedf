"""Tensor parallel: linear weights in parts, by columns or rows, over the processes of a mesh, and their branches too.

The parts are torch's DTensors. A column-wise weight [out, in] is split along out, and so are its bias and lora_B, while
lora_A is a copy; a row-wise one is split along in, and so is lora_A, while lora_B is a copy (Megatron-LM, 1909.08053,
section 3). The graph runs on DTensors, so that torch's own rules say which sums are exchanged, forward and backward.
The slow state is in parts as the weights are: a transition moves no weight between processes. Noise is drawn whole, by
its address, and cut, so that it is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from lorasc_fx.adapt import _ADAPTED
from lorasc_fx.capture import isolation
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.graph import BRANCHES
from lorasc_fx.integrations._parts import PartsInterpreter, whole
from lorasc_fx.integrations._places import Style, places_of
from lorasc_fx.integrations.fsdp import whole_only
from lorasc_fx.parameters import exchange
from lorasc_fx.runtime import Cascade
from lorasc_fx.shards import Rows, Together
from lorasc_fx.state import Side, Tree
from lorasc_fx.undo import AllOrNothing, Undo, no_inference_mode, raise_of_handler

__all__ = ["gather", "parallelize"]

T = TypeVar("T", bound=Tree)

_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Share of the output's scale by which sums in parts may differ from those in one piece: models round in between, to
fp32 whatever their dtype, and a fault is no rounding.
"""
_COARSE = 0.1
"""The same where the output is narrower."""


@dataclass(frozen=True)
class Spread:
    """Computes the calls of a cascade whose weights lie in parts.

    Args:
        mesh: of the processes.
        told: ops that were said to be computed whole.
    """

    mesh: DeviceMesh
    told: set[str]

    def __call__(self, cascade: Cascade, args: Any, kwargs: Any) -> Any:
        """Return what the cascade computes, whole, on every process."""
        variant, call = cascade._variant_of(args, kwargs), cascade._compiler.calls.bind(args, kwargs)
        late = [name for name, factor in cascade.branches.named_parameters() if not isinstance(factor, DTensor)]
        if late:
            raise StateError(
                f"forward: {late[0]} came with a graph that was made after parallelize, and lies in no parts: call the "
                "cascade once in each mode and with each kind of arguments before parallelize",
                code="variant-after-sharding",
            )
        runner = PartsInterpreter(_graph(variant.module), self.mesh, cascade._run.placed is not None, self.told)
        return runner.call(call.leaves)


def parallelize(cascade: Cascade, mesh: DeviceMesh, plan: Mapping[str, Style]) -> Cascade:
    """Split weights of a cascade over the processes of a mesh, each of which calls this with the same cascade.

    Calls take and give whole tensors, the same on every process. Parameters of weights in parts, of all branches and of
    what is trained in full are DTensors from here on: build the optimizer after this. Transitions, `stages`, `rewind`
    and `weights(...)` work on the parts; for all else there is `gather`.

    Args:
        cascade: between two steps.
        mesh: of torch.distributed, of one axis.
        plan: `colwise` or `rowwise` by globs on names of weights or of their modules, the first match counts. A weight
            that none means stays whole on every process.

    Returns:
        The cascade itself.

    Raises:
        SpecError: a pattern means no weight, a weight is none of a linear layer, or does not divide by the number of
            processes, or the spec asks for what parts cannot do (dropout, restart_A="gradient", a share as
            optimizer_state).
        StateError: the cascade is in parts already, runs in pieces, or does not compute the same in parts; nothing was
            changed.
    """
    core = cascade._run
    core.check_ready("parallelize")
    _check_spec(cascade, mesh)
    places = places_of(cascade, mesh, plan)
    with no_inference_mode(), AllOrNothing() as undo:
        before = _example(cascade)
        _spread(cascade, mesh, places, undo)
        try:
            after = _example(cascade)
        except Exception as fault:
            raise_of_handler(fault)
            raise StateError(
                f"parallelize: the model does not run in parts: {type(fault).__name__}: "
                f"{(str(fault).splitlines() or [''])[0]}; leave out the weights that this is about",
                code="parallel-run-failed",
            ) from fault
        _check_same(before, after)
    return cascade


def gather(cascade: Cascade) -> Cascade:
    """Put whole tensors back in the place of parts, on every process; the cascade is then as on one process.

    Build the optimizer anew after this.

    Args:
        cascade: in parts, between two steps; every process calls this.

    Returns:
        The cascade itself.

    Raises:
        StateError: the cascade is not in parts.
    """
    core = cascade._run
    if core.spread is None:
        raise StateError(
            "gather: the cascade lies in no parts; call tensor_parallel.parallelize first", code="not-sharded"
        )
    core.check_ready("gather", parallel=True, ends_stage=True)
    with no_inference_mode(), AllOrNothing() as undo:
        layouts = {name: value for name, value in core.parameters_by_name().items() if isinstance(value, DTensor)}
        states = {
            name: _gathered(state, layouts[name], state.axis) if name in layouts else state
            for name, state in core.slow.states.items()
        }
        states = {name: replace(state, part=None) for name, state in states.items()}
        trained = {
            name: _gathered(kept, layouts[name], partial(_axis_of, layouts[name]))
            for name, kept in core.slow.trained.items()
        }
        _exchange(cascade, lambda value: _again(value, whole(value)), undo)
        _take(cascade, replace(core.slow, states=states, trained=trained, together=None), None, undo)
    return cascade


def _check_spec(cascade: Cascade, mesh: DeviceMesh) -> None:
    spec = cascade._run.plan.spec
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        told = f"of {mesh.ndim} axes" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise SpecError(
            f"parallelize: mesh is {told}; "
            "give a DeviceMesh of one axis (torch.distributed.device_mesh.init_device_mesh)",
            code="invalid-mesh",
        )
    asked = [(name, value) for name, value, _ in whole_only(spec)] + [("dropout", spec.dropout)] * (spec.dropout > 0)
    for name, value in asked:
        raise SpecError(
            f"parallelize: the spec has {name}={value!r}, which parts of a weight cannot do; adapt without it",
            code="not-shardable",
        )
    for variants in cascade._variants.held.values():
        for variant in variants:
            _graph(variant.module)


def _graph(module: Any) -> fx.GraphModule:
    """Return a variant's graph, if all of it can run on parts.

    Raises:
        StateError: it is none, or calls modules of the model whole.
    """
    if not isinstance(module, fx.GraphModule):
        raise StateError(
            "parallelize: the model runs in pieces, and parts need one whole graph; adapt a part of it",
            code="no-whole-graph",
        )
    for node in module.graph.nodes:
        if node.op == "call_method" or (node.op == "call_module" and not str(node.target).startswith(f"{BRANCHES}.")):
            raise StateError(
                f"parallelize: node {node.name} of the graph is a call of a module or method, and parts need torch's "
                "own ops; adapt with frontend='export'",
                code="graph-has-modules",
            )
    return module


# ---- exchanging whole tensors and parts


def _spread(cascade: Cascade, mesh: DeviceMesh, places: Mapping[str, Placement], undo: Undo) -> None:
    core = cascade._run
    names = {id(value): name for name, value in cascade.named_parameters()}

    def split(value: nn.Parameter) -> nn.Parameter:
        place = places.get(names[id(value)])
        return value if place is None else _again(value, _dtensor(value.detach(), mesh, place))

    _exchange(cascade, split, undo)
    rows = {
        name: Rows.of(value) if isinstance(value, DTensor) and value.placements[0].is_shard() else None
        for name, value in core.parameters_by_name().items()
    }
    together = Together(mesh.get_group(), next(iter(core.by_key.values())).lora_A.device)
    _take(cascade, core.slow.cut(rows, together), Spread(mesh, set()), undo)


def _axis_of(like: DTensor, _side: Side) -> int | None:
    (place,) = like.placements
    return place.dim if isinstance(place, Shard) else None


def _gathered(state: T, like: DTensor, axis_of: Callable[[Side], int | None]) -> T:
    """Return a state of whole tensors, of one whose parts lie over the processes as a parameter does."""

    def gathered(value: torch.Tensor, side: Side) -> torch.Tensor:
        axis = axis_of(side)
        if axis is None:
            return value
        own = value.to(like.to_local().device)
        return whole(DTensor.from_local(own, like.device_mesh, [Shard(axis)], run_check=False)).to(value.device)

    return state.map(gathered)


def _dtensor(value: torch.Tensor, mesh: DeviceMesh, place: Placement) -> DTensor:
    own = value
    if isinstance(place, Shard):
        own = value.chunk(mesh.size(), place.dim)[mesh.get_local_rank()]
    own = own.contiguous().clone()
    return DTensor.from_local(own, mesh, [place], run_check=False, shape=value.shape, stride=value.stride())


def _again(old: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    """Return a parameter with another tensor in it; gradients of a DTensor come to lie as it lies itself."""
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    if isinstance(value, DTensor) and old.requires_grad:
        new.register_hook(partial(_as_it_lies, value.placements))
    return new


def _as_it_lies(placements: tuple[Placement, ...], gradient: torch.Tensor) -> torch.Tensor:
    return gradient.redistribute(placements=placements) if isinstance(gradient, DTensor) else gradient


def _exchange(cascade: Cascade, make: Callable[[nn.Parameter], nn.Parameter], undo: Undo) -> None:
    """Put another parameter in the place of each of model and branches, wherever it is held."""
    undo(cascade._run.pending.restorer(cascade._run.trainable()))
    new = {id(value): make(value) for value in cascade.parameters()}
    for holder in exchange(cascade, lambda holder: new.get(id(holder.value)), undo):
        if holder.value in _ADAPTED:
            _ADAPTED[new[id(holder.value)]] = ref(cascade)


def _take(cascade: Cascade, slow: Any, spread: Spread | None, undo: Undo) -> None:
    core = cascade._run
    undo(core.restorer())
    core.take_shards(slow, spread)


# ---- the same numbers as before


def _example(cascade: Cascade) -> list[torch.Tensor]:
    with isolation(cascade.model, *cascade.example, grad=False) as (args, kwargs):
        output = cascade(*args, **kwargs)
    found = [each for each in torch.utils._pytree.tree_leaves(output) if isinstance(each, torch.Tensor)]
    return [each.detach() for each in found if each.is_floating_point()]


def _check_same(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    for one, other in zip(before, after, strict=True):
        gap, scale = float((one - other).abs().max()), float(one.abs().max())
        if not gap <= _ROUNDING.get(one.dtype, _COARSE) * scale and bool(torch.isfinite(one).all()):
            raise StateError(
                f"parallelize: in parts the model computes something else, off by {gap / scale:.1e} of the output; do "
                "all processes hold the same weights, and is it in eval mode or without dropout? Nothing was changed",
                code="outputs-differ",
            )
