"""A cascade whose weights are sharded over processes, by torch's fully_shard (FSDP2).

`fully_shard` gathers a module's parameters while the module's forward runs, but a graph calls no modules. So the graph
is split into segments that read one block's weights each, and a segment runs in a module that holds the parameters and
branches of its block. Base and branches keep their dtypes. A transition works on shards: each rank computes its rows of
`S` from its rows of B and all of A, so no weight is gathered (algorithm.md, "One site").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from lorasc_fx.cascade import folding
from lorasc_fx.cascade.commit import Planned
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
from lorasc_fx.shards import ProcessGroup, ShardSpec, full_tensor, local
from lorasc_fx.signature import leaves
from lorasc_fx.util.undo import AllOrNothing, Block, Undo, isolated

__all__ = ["folded_state_dict", "shard"]


def shard(cascade: Cascade, mesh: DeviceMesh | None = None) -> Cascade:
    """Shard the weights, branches and slow state of a cascade over ranks, in place.

    Every rank must call this on the same cascade before it builds the optimizer. Then calls of the cascade, backward,
    `stages`, `transition`, `weights(...)`, `rewind`, `lorasc_fx.save` and `resume` work as on one process. Each rank
    gets a share of each batch, and gradients are averaged. Inside `weights(...)` call the cascade, not the model. A
    call in another mode, or with another kind of arguments, captures a graph from shapes. It must not adapt a new
    weight.

    A model on the meta device is sharded without values. Then `lorasc_fx.materialize` reads the shards of each rank.

    Args:
        cascade: its parameters are on the device of this process, or on the meta device.
        mesh: one axis over the ranks that hold the shards, by default all ranks. Or two axes, of replicas and of
            shards (HSDP).

    Returns:
        The cascade. Each parameter is now a DTensor.

    Raises:
        StateError: something cannot be sharded (with its name), or ranks have other weights, another spec or other
            code; nothing was changed. If anything else raises, Ctrl-C included, this process is unchanged, but other
            processes may have continued.
    """
    run = cascade._run
    with run.exclusive("shard", sharded=True, on_meta=True), AllOrNothing() as undo:
        ranks = ProcessGroup.of(mesh.get_group() if mesh is not None and mesh.ndim == 1 else None)
        with ranks.agreed("shard"):
            units = _units(cascade)
            graphs = _check(cascade, mesh, units)
            axes = _axes(cascade, mesh.size(mesh.ndim - 1) if mesh is not None else dist.get_world_size())
            weights = run.fingerprints() if run.meta is None else {}  # of the full weights, before they are sharded
        with ranks.agreed("shard"):
            ranks.check_equal("shard", run.facts(weights))
        if mesh is None:
            kind = next(iter(cascade.model.parameters())).device.type
            kind = torch.device(ProcessGroup.of().device).type if kind == "meta" else kind
            mesh = init_device_mesh(kind, (dist.get_world_size(),))
        ranks = replace(ranks, replicas=ranks.size // mesh.size(mesh.ndim - 1))
        undo(run.restorer())
        unit_names = {name: units[id(parameter)] for name, parameter in cascade.named_parameters()}
        shards = _fully_sharded(cascade, units, axes, mesh, undo)
        specs = {name: ShardSpec.of(parameter) for name, parameter in run.parameters_by_name().items()}
        run.take_shards(run.slow.to_shard(specs, ranks, run.base_file is not None))
        run.note_frozen()
        if run.meta is None:  # write them as a transition does: products of shards may round differently
            noisy, states = run.plan.spec.noise.is_on, run.slow.states
            moved = {
                name: parameter
                for name, parameter in run.weights_by_name().items()
                if noisy or states[name].changed or states[name].initial is not None
            }
            run.commit(Planned(run.plan, run.slow, moved), undo)

        def refit() -> None:
            if run.plan.spec.ranks:
                _refit(shards)

        def called() -> bool:
            refit()
            if torch.is_grad_enabled():  # FSDP sets gradients without the hooks that note them elsewhere
                for parameter in run.trainable().values():
                    run.pending.note(parameter)
            return run.placed is not None

        def split(variant: Variant) -> Variant:
            graph = graphs.pop(id(variant), None)
            if graph is None:
                graph = _late_graph(
                    variant, {id(value): unit_names[name] for name, value in cascade.named_parameters()}
                )
            return replace(variant, module=SplitGraph(shards, graph, leaves, called))

        @isolated
        def whole(undo: Block) -> None:
            refit()
            undo.enter(gathered(shards, cascade.model))

        cascade._graphs.split_by(split, whole, undo)
        return cascade  # inside the block: an interrupt before this rolls back


def _late_graph(variant: Variant, units: Mapping[int, str]) -> SegmentedGraph:
    """Split a graph that was captured after the weights were sharded.

    Raises:
        StateError: it cannot be split by these units.
    """
    graph = variant.module
    if not isinstance(graph, fx.GraphModule):
        raise StateError(
            "forward: the model has graph breaks in this call, and only a whole graph can be split into blocks. "
            "Adapt it with another front end",
            code="no-whole-graph",
        )
    if sets := inseparable(graph, units):
        names = named(sorted({units[number] or "the root" for number in sets[0]}))
        raise StateError(
            f"forward: in this call one operation reads weights of {names}, which FSDP gathers at different times. "
            "Make such a call before shard",
            code="sharded",
        )
    return segmented(graph, units)


def folded_state_dict(cascade: Cascade) -> dict[str, torch.Tensor]:
    """Return the model's full state dict with the slow weights, in host memory of rank 0; {} on other ranks.

    One weight is gathered at a time. Every rank must call this. A stage that has trained is folded in the result, as in
    `Cascade.folded_state_dict`, and keeps running.

    Raises:
        StateError: the cascade is not sharded, or not between two steps.
    """
    run = cascade._run
    if not run.is_sharded:
        raise StateError(
            "folded_state_dict: this cascade is not sharded. Call cascade.folded_state_dict()", code="not-available"
        )
    run.check_ready("folded_state_dict", sharded=True)
    is_first, state_dict = run.slow.group.rank == 0, {}
    for name, value, new in folding.folded_each(run, "folded_state_dict"):
        folded = new()
        if hasattr(value, "to_local") and not hasattr(folded, "to_local"):
            folded = ShardSpec.of(value).dtensor(folded, value)
        folded = full_tensor(folded)
        if is_first:
            state_dict[name] = folded.cpu()
    return state_dict


def _units(cascade: Cascade) -> dict[int, str]:
    """Return the unit of every parameter of model and branches, by id."""
    model = dict(cascade.model.named_parameters())
    units = {id(parameter): unit_of(name, parameter) for name, parameter in model.items()}
    for branch in cascade._run.by_key.values():
        units |= {id(factor): units[id(model[branch.weight_name])] for factor in branch.parameters()}
    for variant in cascade._graphs.variants.all:
        if isinstance(graph := variant.module, fx.GraphModule):
            while sets := inseparable(graph, units):
                units |= dict.fromkeys((number for read in sets for number in read), ROOT)
    for branch in cascade._run.by_key.values():  # a weight that had to move to the root moves its branch too
        units |= {id(factor): units[id(model[branch.weight_name])] for factor in branch.parameters()}
    return units


def _check(cascade: Cascade, mesh: DeviceMesh | None, units: Mapping[int, str]) -> dict[int, SegmentedGraph]:
    """Return the split graph of each variant, by id, or raise StateError if something cannot be sharded."""
    run = cascade._run
    if not dist.is_initialized():
        raise StateError(
            "shard: there is no process group. Start the processes by torchrun and call "
            "torch.distributed.init_process_group first",
            code="not-available",
        )
    if run.is_sharded:
        raise StateError("shard: this cascade is already sharded", code="sharded")
    if (
        mesh is not None
        and mesh.ndim > 1
        and (mesh.ndim > 2 or mesh.mesh.flatten().tolist() != list(range(dist.get_world_size())))
    ):
        raise StateError(
            f"shard: the mesh has {mesh.ndim} axes and {mesh.size()} ranks. Give one axis, mesh['name'], or two axes "
            "over all ranks in order, of replicas and of shards",
            code="invalid-value",
        )
    variants = cascade._graphs.variants.all
    if not variants:
        raise StateError(
            "shard: there is no graph yet, or none since the cascade was moved. Call it once before",
            code="not-available",
        )
    graphs = {id(variant): variant.module for variant in variants if isinstance(variant.module, fx.GraphModule)}
    if len(graphs) < len(variants):
        raise StateError(
            "shard: the model has graph breaks, and only a whole graph can be split into blocks. "
            "Adapt it with another front end",
            code="no-whole-graph",
        )
    if run.slow.quantized:
        raise StateError(
            f"shard: {run.slow.quantized[0]} is quantized, and FSDP cannot shard it. Exclude it",
            code="quantized-not-supported",
        )
    parameters = {f"model.{name}": parameter for name, parameter in run.parameters_by_name().items()}
    parameters |= {f"branches.{name}": factor for name, factor in run.branches.named_parameters()}
    for name, parameter in parameters.items():
        cut = hasattr(parameter, "to_local")
        if not parameter.dim() or not parameter.is_contiguous() or cut:
            what = "has no axis" if not parameter.dim() else "is not contiguous"
            what = "is a DTensor already" if cut else what
            raise StateError(f"shard: {name} {what}, but FSDP shards the first axis of plain tensors", code="sharded")
        if parameter.is_meta == (run.meta is None):
            raise StateError(
                f"shard: {name} has values, but other parameters are on the meta device. Build all of them there, or "
                "none",
                code="meta-model",
            )
        if parameter.grad is not None:
            raise StateError(
                f"shard: {name} has a gradient. Call optimizer.zero_grad() first, and build a new optimizer after",
                code="gradients-pending",
            )
    kinds: dict[str, dict[torch.dtype, str]] = {}
    for name, parameter in run.trainable().items():
        seen = kinds.setdefault(units[id(parameter)], {})
        seen.setdefault(parameter.dtype, name)
        if len(seen) > 1:
            odd = " and ".join(f"{first} {dtype}" for dtype, first in seen.items())
            raise StateError(
                f"shard: {odd} have gradients in one block, but FSDP reduces only one dtype per block. Cast them",
                code="sharded",
            )
    return {number: segmented(graph, units) for number, graph in graphs.items()}


def _fully_sharded(
    cascade: Cascade, units: Mapping[int, str], axes: Mapping[int, int], mesh: DeviceMesh, undo: Undo
) -> Shards:
    """Let FSDP shard the parameters of each unit, and all others as the root."""
    for module in cascade.modules():
        undo(partial(module._parameters.update, dict(module._parameters)))
        undo(partial(_unmark, module))
    holders: dict[str, list[nn.Module]] = {}
    originals = list(cascade.parameters())  # keep them alive, so that no other object gets one of their ids
    for root in (cascade.model, cascade.branches):
        for module in root.modules():
            held = [parameter for parameter in module._parameters.values() if parameter is not None]
            for name in dict.fromkeys(units[id(parameter)] for parameter in held):
                holders.setdefault(name, []).append(module)
    blocks = {name: Unit(modules) for name, modules in holders.items() if name != ROOT}
    shards = Shards(blocks, holders.get(ROOT, ()))
    for name, unit in (*blocks.items(), (ROOT, shards)):
        others = {
            parameter for parameter in cascade.parameters() if units.get(id(parameter)) != name
        }  # those of other units, sharded or not
        cut_up = fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=True,
            shard_placement_fn=lambda parameter: Shard(axes[id(parameter)]) if id(parameter) in axes else None,
            ignored_params=others,
        )
        if dist.get_backend(mesh.get_group(mesh.ndim - 1)) == "gloo":  # gloo has no mean
            cut_up.set_force_sum_reduction_for_comms(True)
    del originals
    for module in cascade.modules():
        _unmark(module)
    return shards


def _placement(old: Any, _: nn.Parameter) -> Shard:
    placement: Shard = old.fsdp_placement
    return placement


def _refit(shards: Shards) -> None:
    """Update FSDP's records of factors whose rank has changed (`ranks`), which still have the old shape.

    torch has no public way to do this: `fully_shard` would create new Parameters, which no optimizer holds.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    for unit in (shards, *shards.units):
        group = unit._get_fsdp_state()._fsdp_param_group
        for index, old in enumerate(group.fsdp_params if group is not None else ()):
            parameter = old.sharded_param
            if local(parameter).shape == old.sharded_size:
                continue
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            given = (old._module_info, old.mesh_info, old.post_forward_mesh_info, old.device)
            policies = (partial(_placement, old), old.mp_policy, OffloadPolicy())
            new = FSDPParam(nn.Parameter(whole, parameter.requires_grad), *given, *policies)
            old._post_load_hook_handle.remove()
            new._setattr_on_modules(parameter)  # the same Parameter: an optimizer holds it
            new.reset_sharded_param()
            new.init_dtype_attrs(old.mp_policy)
            new._param_fqn = old._param_fqn
            group.fsdp_params[index] = new


def _axes(cascade: Cascade, parts: int) -> dict[int, int]:
    """Return the sharded axis of the parameters, by id, for which it is not the first one.

    FSDP pads an axis that the number of ranks does not divide, so branches choose other axes (`Branch.shard_axes`).
    """
    axes: dict[int, int] = {}
    model, resized = cascade._run.parameters_by_name(), bool(cascade.plan.spec.ranks)
    for branch in cascade._run.by_key.values():
        weight = model[branch.weight_name]
        held = {"weight": weight, **dict(branch.named_parameters())}
        axes |= {id(held[name]): axis for name, axis in branch.shard_axes(weight, parts, resized).items()}
    return axes


def _unmark(module: nn.Module) -> None:
    """Remove the marks that FSDP sets for dynamo. Guards would take them for another setting of the model."""
    for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        vars(module).pop(mark, None)
