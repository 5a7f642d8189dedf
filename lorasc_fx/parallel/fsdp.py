"""Sharded cascades with torch's fully_shard (FSDP2).

`fully_shard` gathers the parameters of a module while its forward runs, but an adapted graph does not call modules. So
the graph is split into segments, and each segment reads the weights of one block. A segment runs in the forward of a
module that contains the parameters and branches of its block (see `segments`). Dtypes are not changed.

A transition works on shards. Each rank computes its rows of the slow delta S from its rows of B and all of A. So no
weight is gathered (see `lorasc_fx.shards`), except one at a time if the spec's `start` decomposes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from lorasc_fx.cascade import graphs_of, run_of
from lorasc_fx.cascade.run import Planned
from lorasc_fx.cascade.weights import folded_each
from lorasc_fx.compile import Variant
from lorasc_fx.errors import StateError, named
from lorasc_fx.facade import Cascade
from lorasc_fx.parallel.segments import (
    ROOT,
    SegmentedGraph,
    Shards,
    SplitGraph,
    Unit,
    gathered,
    inseparable,
    segmented,
    unit_of,
)
from lorasc_fx.shards import ProcessGroup, ShardSpec, full_tensor
from lorasc_fx.util.undo import AllOrNothing, Block, Undo, isolated

__all__ = ["folded_state_dict", "shard"]


def shard(cascade: Cascade) -> Cascade:
    """Shard the weights, branches and slow state of a cascade over all ranks, in place.

    Every rank must call this on the same cascade, before it creates the optimizer. Afterwards calls of the cascade,
    backward, `stages`, `transition`, `weights(...)`, `rewind`, `lorasc_fx.save` and `resume` work as on one process.
    Pass each rank its part of the batch; gradients are averaged. Inside `weights(...)` blocks, call the cascade, not
    the model. A call with a new input signature captures another graph, which cannot adapt further weights.

    Args:
        cascade: the cascade. Its parameters are on the device of this process.

    Returns:
        The cascade. Each parameter is now a DTensor.

    Raises:
        StateError: a parameter or graph cannot be sharded, or ranks have different weights, specs or code. Nothing was
            changed on any rank. After any other exception, including KeyboardInterrupt, this process is unchanged,
            but other processes may have continued.
    """
    run = run_of(cascade)
    with run.exclusive("shard", sharded=True), AllOrNothing() as undo:
        ranks = ProcessGroup.of()
        with ranks.agreed("shard"):
            units = _units(cascade)
            graphs = _check(cascade, units)
            axes = _axes(cascade, ranks.size)
            weights = run.fingerprints()  # needs the full weights
        with ranks.agreed("shard"):
            ranks.check_equal("shard", run.facts(weights))
        mesh = init_device_mesh(next(iter(cascade.model.parameters())).device.type, (ranks.size,))
        undo(run.restorer())
        unit_names = {name: units[id(parameter)] for name, parameter in cascade.named_parameters()}
        shards = _fully_sharded(cascade, units, axes, mesh, undo)
        specs = {name: ShardSpec.of(parameter) for name, parameter in run.parameters_by_name().items()}
        run.take_shards(run.slow.to_shard(specs, ranks))
        run.note_frozen()
        # Write weights that differ from W0 again, as a transition does, because products of shards round differently.
        noisy, states = run.plan.spec.noise.strength > 0, run.slow.states
        moved = {
            name: parameter
            for name, parameter in run.weights_by_name().items()
            if noisy or states[name].changed or states[name].initial is not None
        }
        run.commit(Planned(run.plan, run.slow, moved), undo)

        def before_call() -> bool:
            if torch.is_grad_enabled():  # FSDP does not trigger the hooks that would record gradients
                for parameter in run.trainable().values():
                    run.pending.note(parameter)
            return run.placed is not None

        def split(variant: Variant) -> Variant:
            graph = graphs.pop(id(variant), None)
            if graph is None:
                graph = _late_graph(
                    variant, {id(value): unit_names[name] for name, value in cascade.named_parameters()}
                )
            return replace(variant, module=SplitGraph(shards, graph, before_call))

        @isolated
        def gather_model(undo: Block) -> None:
            undo.enter(gathered(shards, cascade.model))

        graphs_of(cascade).split_by(split, gather_model, undo)
        return cascade  # inside the block, so that an interrupt before this line rolls back


def _late_graph(variant: Variant, units: Mapping[int, str]) -> SegmentedGraph:
    """Split a graph that was captured after the weights were sharded.

    Raises:
        StateError: the graph cannot be split into segments of these units.
    """
    graph = _single_graph(variant, "forward")
    if sets := inseparable(graph, units):
        names = named(sorted({units[number] or "the root" for number in sets[0]}))
        raise StateError(
            f"forward: in this call one operation reads weights of {names}, which FSDP gathers at different times. "
            "Run this call once before shard",
            code="sharded",
        )
    return segmented(graph, units)


def _single_graph(variant: Variant, call: str) -> fx.GraphModule:
    """Return the graph of a variant. Raise StateError if the model runs eagerly."""
    if not isinstance(variant.module, fx.GraphModule):
        raise StateError(
            f"{call}: the model has no graph that can be split into blocks, because it runs eagerly "
            "(cascade.refused_frontends says why). Change what prevents a graph, or adapt only a part of the model",
            code="no-graph",
        )
    return variant.module


def folded_state_dict(cascade: Cascade) -> dict[str, torch.Tensor]:
    """Return the full state dict of the model with the slow weights, in host memory of rank 0. Other ranks get {}.

    Weights are gathered one at a time. Every rank must call this. If the running stage has trained, the result includes
    it, as in `Cascade.folded_state_dict`. The stage continues.

    Raises:
        StateError: the cascade is not sharded, or the call is not between two optimizer steps.
    """
    run = run_of(cascade)
    if not run.is_sharded:
        raise StateError(
            "folded_state_dict: this cascade is not sharded. Call cascade.folded_state_dict()", code="not-available"
        )
    run.check_ready("folded_state_dict", sharded=True, keeps=True)
    is_first, state_dict = run.slow.group.rank == 0, {}
    for name, value, new in folded_each(run, "folded_state_dict"):
        folded = new()
        if hasattr(value, "to_local") and not hasattr(folded, "to_local"):
            folded = ShardSpec.of(value).dtensor(folded, value)
        folded = full_tensor(folded)
        if is_first:
            state_dict[name] = folded.cpu()
    return state_dict


def _units(cascade: Cascade) -> dict[int, str]:
    """Return {id of a parameter: its unit} for the parameters of the model and of the branches."""
    model = dict(cascade.model.named_parameters())
    units = {id(parameter): unit_of(name, parameter) for name, parameter in model.items()}
    for branch in run_of(cascade).by_key.values():
        units |= {id(factor): units[id(model[branch.weight_name])] for factor in branch.parameters()}
    for variant in graphs_of(cascade).variants.all:
        if isinstance(graph := variant.module, fx.GraphModule):
            # Weights that one node reads together must be gathered together: move them to the root unit.
            while sets := inseparable(graph, units):
                units |= dict.fromkeys((parameter for ids in sets for parameter in ids), ROOT)
    for branch in run_of(cascade).by_key.values():  # a branch stays in the unit of its weight
        units |= {id(factor): units[id(model[branch.weight_name])] for factor in branch.parameters()}
    return units


def _check(cascade: Cascade, units: Mapping[int, str]) -> dict[int, SegmentedGraph]:
    """Return {id of a variant: its split graph}. Raise StateError if the cascade cannot be sharded."""
    run = run_of(cascade)
    if not dist.is_initialized():
        raise StateError(
            "shard: there is no process group. Start the processes with torchrun, and call "
            "torch.distributed.init_process_group first",
            code="not-available",
        )
    if run.is_sharded:
        raise StateError("shard: this cascade is already sharded", code="sharded")
    variants = graphs_of(cascade).variants.all
    if not variants:
        raise StateError(
            "shard: the cascade has no graph yet, or none since it was moved to a device. Call the cascade once before",
            code="not-available",
        )
    graphs = {id(variant): _single_graph(variant, "shard") for variant in variants}
    if run.slow.quantized:
        raise StateError(
            f"shard: {run.slow.quantized[0]} is quantized, but FSDP cannot shard quantized weights. Exclude the weight",
            code="quantized-not-supported",
        )
    if on_grid := [name for name, state in run.slow.states.items() if state.grid]:
        raise StateError(
            f"shard: {named(on_grid, 1)} trains on a grid, and rounding needs the full weight. Give grid=None, or "
            "train with DistributedDataParallel",
            code="not-available",
        )
    parameters = {f"model.{name}": parameter for name, parameter in run.parameters_by_name().items()}
    parameters |= {f"branches.{name}": factor for name, factor in run.branches.named_parameters()}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            raise StateError(
                f"shard: {name} has a gradient. Call optimizer.zero_grad() before, and create a new optimizer after",
                code="gradients-pending",
            )
    return {number: segmented(graph, units) for number, graph in graphs.items()}


def _fully_sharded(
    cascade: Cascade, units: Mapping[int, str], axes: Mapping[int, int], mesh: DeviceMesh, undo: Undo
) -> Shards:
    """Shard the parameters of every unit with `fully_shard`, and then all remaining ones with the root unit.

    `units` and `axes` are the results of `_units` and `_axes`. `undo` receives the steps that restore the parameters.
    """
    for module in cascade.modules():
        undo(partial(module._parameters.update, dict(module._parameters)))
        undo(partial(_unmark, module))
    holders: dict[str, list[nn.Module]] = {}
    originals = list(cascade.parameters())  # keep them alive, because a freed id could be used again
    for root in (cascade.model, cascade.branches):
        for module in root.modules():
            parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
            for name in dict.fromkeys(units[id(parameter)] for parameter in parameters):
                holders.setdefault(name, []).append(module)
    blocks = {name: Unit(modules) for name, modules in holders.items() if name != ROOT}
    shards = Shards(blocks, holders.get(ROOT, ()))
    for name, unit in (*blocks.items(), (ROOT, shards)):
        # A module may hold parameters of several units, so exclude the parameters of other units.
        ignored = {parameter for parameter in cascade.parameters() if units.get(id(parameter)) != name}
        sharded = fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=True,
            shard_placement_fn=lambda parameter: Shard(axes[id(parameter)]) if id(parameter) in axes else None,
            ignored_params=ignored,
        )
        if dist.get_backend() == "gloo":  # gloo cannot average
            sharded.set_force_sum_reduction_for_comms(True)
    del originals
    for module in cascade.modules():
        _unmark(module)
    return shards


def _axes(cascade: Cascade, parts: int) -> dict[int, int]:
    """Return {id of a parameter: axis} for parameters that are sharded along another axis than 0.

    FSDP pads an axis whose length is not a multiple of the number of ranks, so a branch may choose another axis
    (`Branch.shard_axes`).
    """
    axes: dict[int, int] = {}
    model = run_of(cascade).parameters_by_name()
    for branch in run_of(cascade).by_key.values():
        weight = model[branch.weight_name]
        tensors = {"weight": weight, **dict(branch.named_parameters())}
        axes |= {id(tensors[name]): axis for name, axis in branch.shard_axes(weight, parts).items()}
    return axes


def _unmark(module: nn.Module) -> None:
    """Remove the attributes that FSDP sets for dynamo, because our guards would report a changed model setting."""
    for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        vars(module).pop(mark, None)
