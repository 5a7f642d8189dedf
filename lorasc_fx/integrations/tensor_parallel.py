"""Tensor parallel: linear weights sharded by columns or rows over the processes of a mesh, and their branches too.

Shards are torch's DTensors. A column-wise weight [out, in] is split along out, and so are its bias and lora_B, while
lora_A is replicated; a row-wise one is split along in, and so is lora_A, while lora_B is replicated (Megatron-LM,
1909.08053, section 3). The graph runs on DTensors, so that torch's own rules say which sums are exchanged, forward and
backward. The slow state is sharded as the weights are: a transition moves no weight between processes. Noise is a
function of the place in the weight, so that it is that of one process.

Products with sharded weights go as Megatron-LM has them, whatever torch would think cheapest: an input that column-wise
weights share is replicated, and its gradient is summed once; the output of a row-wise weight is summed at once. A plain
tensor that meets a DTensor (a constant, a mask, a frozen weight outside the plan) counts as replicated. Attention whose
heads are split goes head by head. An op that torch has no rule for is computed on replicated tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args
from weakref import ref

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.placement_types import Placement
from torch.utils import _pytree as pytree

from lorasc_fx.adapt import _ADAPTED
from lorasc_fx.branch import MatrixBranch, shared_down
from lorasc_fx.branch.products import PRODUCTS
from lorasc_fx.capture import isolation
from lorasc_fx.errors import LorascError, SpecError, StateError, nearest
from lorasc_fx.graph import BRANCHES, matches, named_weights
from lorasc_fx.integrations.fsdp import whole_only
from lorasc_fx.integrations.segments import SplitGraph
from lorasc_fx.parameters import exchange
from lorasc_fx.plan import Site
from lorasc_fx.quantized import is_quantized
from lorasc_fx.runtime import Cascade
from lorasc_fx.runtime.watches import check_attention
from lorasc_fx.shards import ProcessGroup, full_tensor, placed_gradient, shard_axis, shard_of
from lorasc_fx.state import Side, Tree
from lorasc_fx.undo import AllOrNothing, Undo, no_inference_mode, raise_of_handler

__all__ = ["Style", "gather", "parallelize"]


T = TypeVar("T", bound=Tree)

_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Share of the output's scale by which sums over shards may differ from those on one process: models round in between,
to fp32 whatever their dtype, and a fault is no rounding.
"""
_COARSE = 0.1
"""The same where the output is narrower."""


@dataclass(frozen=True)
class ParallelCall:
    """Computes the calls of a cascade whose weights are sharded.

    Args:
        mesh: of the processes.
        logged: ops without a rule, which the log has named.
    """

    mesh: DeviceMesh
    logged: set[str]

    def __call__(self, cascade: Cascade, args: Any, kwargs: Any) -> Any:
        """Return what the cascade computes, as plain tensors on every process."""
        check_attention()
        variant, call = cascade._variant_of(args, kwargs, "forward")
        late = [name for name, factor in cascade.branches.named_parameters() if not isinstance(factor, DTensor)]
        if late:
            raise StateError(
                f"forward: {late[0]} came with a graph that was made after parallelize, and is not sharded: call the "
                "cascade once in each mode and with each kind of arguments before parallelize",
                code="variant-after-sharding",
            )
        split = variant.module if isinstance(variant.module, SplitGraph) else None
        graph = _graph(variant.module if split is None else split.graph.module)
        interpreter = DTensorInterpreter(graph, self.mesh, cascade._run.placed is not None, self.logged)
        return interpreter.call(call.leaves, split)


def parallelize(cascade: Cascade, mesh: DeviceMesh, plan: Mapping[str, Style]) -> Cascade:
    """Shard weights of a cascade over the processes of a mesh, each of which calls this with the same cascade.

    Calls take and give plain tensors, the same on every process. Sharded weights, all branches and what is trained in
    full are DTensors from here on: build the optimizer after this. Transitions, `stages`, `rewind`, `weights(...)`,
    `lorasc_fx.save` and `resume` work on shards; for all else there is `gather`.

    A model on the meta device is sharded without numbers; then `lorasc_fx.materialize` reads the shards of each rank.
    Nothing has compared its graph with the eager model then.

    Args:
        cascade: between two steps, or on the meta device.
        mesh: of torch.distributed, of one axis.
        plan: `colwise` or `rowwise` by globs on names of weights or of their modules, the first match counts. A weight
            that none means is replicated.

    Returns:
        The cascade itself.

    Raises:
        SpecError: a pattern means no weight, a weight is none of a linear layer, or does not divide by the number of
            processes, or the spec asks for what shards cannot do (docs/devices.md has the table).
        StateError: the cascade is sharded already, has graph breaks, or does not compute the same on shards, or ranks
            have other weights, another spec or other code; nothing was changed.
    """
    run = cascade._run
    run.check_ready("parallelize", on_meta=True)
    _check_spec(cascade, mesh)
    places = places_of(cascade, mesh, plan)
    with no_inference_mode(), AllOrNothing() as undo:
        weights = run.fingerprints() if run.holds_numbers else {}  # of the whole weights, while they are here
        ProcessGroup.of(mesh.get_group()).check_alike("parallelize", run.facts(weights))
        before = _example(cascade) if run.holds_numbers else []
        _shard(cascade, mesh, places, undo)
        if not run.holds_numbers:
            return cascade
        try:
            after = _example(cascade)
        except Exception as fault:
            raise_of_handler(fault)
            raise StateError(
                f"parallelize: the model does not run on shards: {type(fault).__name__}: "
                f"{(str(fault).splitlines() or [''])[0]}; leave out the weights that this is about",
                code=fault.code if isinstance(fault, LorascError) else "parallel-run-failed",
            ) from fault
        _check_same(before, after)
    return cascade


def gather(cascade: Cascade) -> Cascade:
    """Put whole tensors back in the place of shards, on every process; the cascade is then as on one process.

    Build the optimizer anew after this.

    Args:
        cascade: sharded by `parallelize`, between two steps; every process calls this.

    Returns:
        The cascade itself.

    Raises:
        StateError: the cascade is not sharded.
    """
    run = cascade._run
    if run.parallel is None:
        raise StateError(
            "gather: the cascade is not sharded; call tensor_parallel.parallelize first", code="not-sharded"
        )
    if cascade._split is not None:
        raise StateError(
            "gather: FSDP2 holds the parts; lorasc_fx.integrations.fsdp.folded_state_dict gives whole weights",
            code="sharded",
        )
    run.check_ready("gather", sharded=True, parallel=True, ends_stage=True)
    with no_inference_mode(), AllOrNothing() as undo:
        layouts = {name: value for name, value in run.parameters_by_name().items() if isinstance(value, DTensor)}
        states = {
            name: _gathered(state, layouts[name], state.axis) if name in layouts else state
            for name, state in run.slow.states.items()
        }
        states = {name: replace(state, shard=None) for name, state in states.items()}
        trained = {
            name: _gathered(entry, layouts[name], partial(_axis_of, layouts[name]))
            for name, entry in run.slow.trained.items()
        }
        _exchange(cascade, lambda value: _again(value, full_tensor(value)), undo)
        _take(cascade, replace(run.slow, states=states, trained=trained, group=None), None, undo)
    return cascade


def _check_spec(cascade: Cascade, mesh: DeviceMesh) -> None:
    spec = cascade._run.plan.spec
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        given = f"of {mesh.ndim} axes" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise SpecError(
            f"parallelize: mesh is {given}; "
            "give a DeviceMesh of one axis (torch.distributed.device_mesh.init_device_mesh)",
            code="invalid-mesh",
        )
    for name, value, _, why in whole_only(spec, "parallelize"):
        raise SpecError(
            f"parallelize: the spec has {name}={value!r}: {why}; adapt without it",
            code="not-shardable",
        )
    for variant in cascade._variants.all:
        _graph(variant.module)


def _graph(module: Any) -> fx.GraphModule:
    """Return a variant's graph, if all of it can run on DTensors.

    Raises:
        StateError: it is none, or calls modules of the model whole.
    """
    if not isinstance(module, fx.GraphModule):
        raise StateError(
            "parallelize: the model has graph breaks, and shards need one whole graph; adapt a part of it",
            code="no-whole-graph",
        )
    for node in module.graph.nodes:
        if node.op == "call_method" or (node.op == "call_module" and not str(node.target).startswith(f"{BRANCHES}.")):
            raise StateError(
                f"parallelize: node {node.name} of the graph is a call of a module or method, and shards need torch's "
                "own ops; adapt with frontend='export'",
                code="graph-has-modules",
            )
    return module


# ---- exchanging whole tensors and shards


def _shard(cascade: Cascade, mesh: DeviceMesh, places: Mapping[str, Placement], undo: Undo) -> None:
    run = cascade._run
    names = {id(value): name for name, value in cascade.named_parameters()}

    def split(value: nn.Parameter) -> nn.Parameter:
        place = places.get(names[id(value)])
        return value if place is None else _again(value, _dtensor(value.detach(), mesh, place))

    _exchange(cascade, split, undo)
    specs = {name: shard_of(value) for name, value in run.parameters_by_name().items()}
    _take(cascade, run.slow.to_shard(specs, ProcessGroup.of(mesh.get_group())), ParallelCall(mesh, set()), undo)


def _axis_of(like: DTensor, _side: Side) -> int | None:
    return shard_axis(like)


def _gathered(state: T, like: DTensor, axis_of: Callable[[Side], int | None]) -> T:
    """Return a state of whole tensors, of one that is sharded as a parameter is."""

    def gathered(value: torch.Tensor, side: Side) -> torch.Tensor:
        axis = axis_of(side)
        if axis is None:
            return value
        own = value.to(like.to_local().device)
        return full_tensor(DTensor.from_local(own, like.device_mesh, [Shard(axis)], run_check=False)).to(value.device)

    return state.map(gathered)


def _dtensor(value: torch.Tensor, mesh: DeviceMesh, place: Placement) -> DTensor:
    own = value
    if isinstance(place, Shard):
        own = value.chunk(mesh.size(), place.dim)[mesh.get_local_rank()]
    own = own.contiguous().clone()
    return DTensor.from_local(own, mesh, [place], run_check=False, shape=value.shape, stride=value.stride())


def _again(old: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    """Return a parameter with another tensor in it; gradients of a DTensor get its placements."""
    return placed_gradient(nn.Parameter(value, requires_grad=old.requires_grad))


def _exchange(cascade: Cascade, make: Callable[[nn.Parameter], nn.Parameter], undo: Undo) -> None:
    """Put another parameter in the place of each of model and branches, wherever it is held."""
    new = {id(value): make(value) for value in cascade.parameters()}
    for holder in exchange(cascade, lambda holder: new.get(id(holder.value)), undo):
        if holder.value in _ADAPTED:
            _ADAPTED[new[id(holder.value)]] = ref(cascade)


def _take(cascade: Cascade, slow: Any, parallel: ParallelCall | None, undo: Undo) -> None:
    run = cascade._run
    undo(run.restorer())
    run.take_shards(slow, parallel)
    run.note_frozen()


# ---- the same numbers as before


def _example(cascade: Cascade) -> list[torch.Tensor]:
    with isolation(cascade.model, *cascade.example, grad=False) as (args, kwargs):
        output = cascade(*args, **kwargs)
    found = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return [leaf.detach() for leaf in found if leaf.is_floating_point()]


def _check_same(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    for one, other in zip(before, after, strict=True):
        gap, scale = float((one - other).abs().max()), float(one.abs().max())
        if not gap <= _ROUNDING.get(one.dtype, _COARSE) * scale and bool(torch.isfinite(one).all()):
            raise StateError(
                f"parallelize: on shards the model computes something else, off by {gap / scale:.1e} of the output; is "
                "it in eval mode or without dropout? Nothing was changed",
                code="outputs-differ",
            )


Style = Literal["colwise", "rowwise"]


def places_of(cascade: Cascade, mesh: DeviceMesh, plan: Mapping[str, Style]) -> dict[str, Placement]:
    """Return the placement of each parameter of the model and of the branches that is to become a DTensor."""
    weights, sites = named_weights(cascade.model), cascade._run.plan.by_weight
    count, used = mesh.size(), set[str]()
    found: dict[str, Placement] = {name: Replicate() for name in cascade._run.trainable()}
    for name in weights.matrices:
        pattern = next((key for key in plan if matches(key, weights.names[name])), None)
        if pattern is None:
            continue
        used.add(pattern)
        style, site, parameter = plan[pattern], sites.get(name), weights.parameters[name]
        if style not in get_args(Style):
            raise SpecError(f"parallelize: {pattern!r} is {style!r}; give 'colwise' or 'rowwise'")
        _check_weight(cascade.model, weights.names[name], parameter, site)
        transposed = site is not None and site.layout == "in_out"
        axis = int((style == "rowwise") != transposed)
        if parameter.shape[axis] % count:
            raise SpecError(
                f"parallelize: {name} is {list(parameter.shape)}, and {parameter.shape[axis]} does not divide by "
                f"{count} processes; leave it out, or take another number",
                code="not-divisible",
            )
        found[f"model.{name}"] = Shard(axis)
        bias = f"{name.rpartition('.')[0]}.bias".lstrip(".")
        if bias in weights.parameters:
            found[f"model.{bias}"] = Shard(0) if style == "colwise" else Replicate()
        if site is not None:
            split, shard = ("lora_B", Shard(0)) if style == "colwise" else ("lora_A", Shard(1))
            found[f"branches.{site.key}.{split}"] = shard
    unused = [key for key in plan if key not in used]
    if unused:
        known = [*weights.matrices, *(name.rpartition(".")[0] for name in weights.matrices)]
        raise SpecError(
            f"parallelize: {unused[0]!r} means no weight matrix{nearest(unused[0], known)}", code="unknown-target"
        )
    return found


def _check_weight(model: nn.Module, names: tuple[str, ...], parameter: torch.Tensor, site: Site | None) -> None:
    """Raise SpecError for a weight that is not that of a linear layer, used whole."""
    name, *tied = names
    holder = model.get_submodule(name.rpartition(".")[0])
    fault = ""
    if is_quantized(parameter):
        fault = "is quantized"
    elif tied:
        fault = f"is tied to {tied[0]}"
    elif site is not None and site.kind != "linear":
        fault = f"is of kind {site.kind}"
    elif site is not None and site.slices:
        fault = "is used in slices, which would be cut across"
    elif parameter.dim() != 2 or (site is None and not isinstance(holder, nn.Linear)):
        fault = "is no weight of a linear layer"
    if fault:
        raise SpecError(
            f"parallelize: {name} {fault}; only linear layers go by columns or rows", code="not-a-linear-layer"
        )


log = logging.getLogger("lorasc_fx")


class _Product(NamedTuple):
    """A product: its name in `branch.products.PRODUCTS`, where its op has input, weight and bias, and the axis of the
    weight that is that of the outputs.
    """

    name: str
    x: int
    weight: int
    bias: int | None
    out: int


_PRODUCTS = {
    torch.ops.aten.linear.default: _Product("linear", 0, 1, 2, 0),
    torch.ops.aten.addmm.default: _Product("addmm", 1, 2, 0, 1),
    torch.ops.aten.mm.default: _Product("mm", 0, 1, None, 1),
    torch.ops.aten.matmul.default: _Product("matmul", 0, 1, None, 1),
}
_OUT = {product.name: product.out for product in _PRODUCTS.values()}
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_CAT = torch.ops.aten.cat.default
_ASSERTS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async")
_HEADS = 1


def replicated(value: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return a plain tensor, equal on every process, as a DTensor; one that is a DTensor stays itself."""
    if isinstance(value, DTensor):
        return value
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def plain(value: torch.Tensor) -> torch.Tensor:
    """Return a DTensor as a plain tensor, the same on every process, with its gradient; a plain one stays itself."""
    return value.full_tensor() if isinstance(value, DTensor) else value


class DTensorInterpreter(fx.Interpreter):
    """Runs a graph node by node on DTensors.

    Args:
        module: an adapted graph.
        mesh: of the processes.
        resting: whether branches add nothing: other weights are in place.
        logged: ops without a rule, which the log has named.
    """

    def __init__(self, module: fx.GraphModule, mesh: DeviceMesh, resting: bool, logged: set[str]) -> None:
        super().__init__(module)
        self.outputs = module.graph.process_outputs
        self.mesh, self.resting, self.logged = mesh, resting, logged
        self._last: dict[bool, tuple[DTensor, DTensor]] = {}  # inputs of products, as they were and as they are read

    def call(self, leaves: list[Any], split: SplitGraph | None = None) -> Any:
        """Compute the graph for the leaves of a call's arguments, and return what the model returns; a graph that FSDP
        has split, in its segments.
        """
        with implicit_replication():
            inputs = self._replicated(leaves)
            output = split.run(self, *inputs) if split else self.run(*inputs, enable_io_processing=False)
        return self.outputs(pytree.tree_map_only(torch.Tensor, plain, output))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a branch, or leave it out."""
        assert str(target).startswith(f"{BRANCHES}.")
        args, kwargs = self._replicated((args, dict(kwargs)))
        branch = self.fetch_attr(str(target))
        if "op" in kwargs:
            x, weight, *bias = args
            base = self._product(kwargs["op"], x, weight, bias[0] if bias else None)
            return base if self.resting else self._beside(branch, base, x, False)
        if self.resting:
            return args[0]
        if type(branch) is MatrixBranch and len(args) == 2 and not branch.slices and not kwargs.keys() - {"shared"}:
            return self._beside(branch, *args, **kwargs)
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute an op on DTensors, or on plain ones where these have no rule for it."""
        held = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, DTensor)]
        if getattr(target, "__name__", "").partition(".")[0] in _ASSERTS:
            return None  # they hold for all calls of this graph
        if not held:
            return super().call_function(target, args, kwargs)
        args, kwargs = self._replicated((args, dict(kwargs)))
        self._check_random(target, args, kwargs)
        if target is _ATTENTION:
            found = self._by_heads(args, kwargs)
            return found if found is not None else self._whole(target, args, kwargs)
        if (product := _PRODUCTS.get(target)) is not None and not kwargs:
            bias = args[product.bias] if product.bias is not None and product.bias < len(args) else None
            return self._product(product.name, args[product.x], args[product.weight], bias)
        if target is shared_down:
            return shared_down(self._read(args[0], False), args[1])
        if target is _CAT:  # a cache begins with an empty tensor of one axis, which DTensor does not leave out
            args = ([tensor for tensor in args[0] if tensor.dim() > 1 or tensor.numel()] or args[0], *args[1:])
        try:
            return super().call_function(target, args, kwargs)
        except (NotImplementedError, RuntimeError) as fault:
            # DTensor says in these ways that it has no rule for an op; a fault of the op itself comes again below.
            log.debug("%s: %s", target, fault)
            return self._whole(target, args, kwargs)

    def _replicated(self, values: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda value: replicated(value, self.mesh), values)

    def _product(self, name: str, x: DTensor, weight: DTensor, bias: DTensor | None) -> Any:
        """Return a product: of a column-wise weight it stays sharded, of a row-wise one it is summed."""
        (placement,) = weight.placements
        if not isinstance(placement, Shard) or weight.dim() != 2:
            return PRODUCTS[name](x, weight, bias)
        if placement.dim == _OUT[name]:
            return PRODUCTS[name](self._read(x, False), weight, bias)
        x = self._read(x, True)
        made = F.linear(x, weight) if name == "linear" else torch.matmul(x, weight)
        made = made.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
        return made if bias is None else made + bias

    def _beside(self, branch: MatrixBranch, base: DTensor, x: DTensor, shared: bool = False) -> Any:
        """Return what `MatrixBranch` computes beside a product, with one sum over [tokens, rank]."""
        a, b = branch.lora_A.to(x.dtype), branch.lora_B.to(x.dtype)
        by_rows = a.placements == (Shard(1),)  # type: ignore[attr-defined]
        low = x if shared else F.linear(self._read(x, by_rows), a)
        low = low.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
        return base + F.linear(low, b) * branch.scale

    def _read(self, x: DTensor, by_rows: bool) -> DTensor:
        """Return a product's input, replicated or sharded along its last axis; the same one for all that read it."""
        last = self._last.get(by_rows)
        if last is None or last[0] is not x:
            place = Shard(x.dim() - 1) if by_rows else Replicate()
            last = self._last[by_rows] = (x, x.redistribute(placements=[place]))
        return last[1]

    def _check_random(self, target: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        schema = getattr(target, "_schema", None)
        if schema is None:
            return
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
        share = given.get("p", 0.0) if "dropout" in target.__name__ and given.get("train", True) else 0.0
        if share or given.get("dropout_p", 0.0):
            raise StateError(
                f"{target}: each process would draw another mask for its shard; set dropout to 0, or call eval()",
                code="dropout-not-supported",
            )

    def _by_heads(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return attention of the heads that are here; None where heads are not split alike."""
        query, key, value, *rest = args
        (placement,) = query.placements
        if query.dim() != 4 or not (placement.is_replicate() or placement.is_shard(_HEADS)):
            return None
        if key.placements != query.placements and all(
            placement.is_replicate() for placement in (*key.placements, *value.placements)
        ):
            key, value = (self._heads_of(query, tensor) for tensor in (key, value))
        if not key.placements == value.placements == query.placements:
            return None
        mask = rest[0] if rest else kwargs.get("attn_mask")
        if mask is not None and mask.dim() > 3 and mask.shape[_HEADS] != 1:
            return None
        own = [tensor.to_local() for tensor in (query, key, value)]
        if rest and mask is not None:
            rest[0] = self._copy(mask)
        elif mask is not None:
            kwargs = {**kwargs, "attn_mask": self._copy(mask)}
        made = _ATTENTION(*own, *rest, **kwargs)
        return DTensor.from_local(made, self.mesh, query.placements, run_check=False)

    def _heads_of(self, query: DTensor, few: DTensor) -> DTensor:
        """Return replicated keys or values, few heads for many of the query, sharded as the query's heads are."""
        times = query.shape[_HEADS] // few.shape[_HEADS]
        many = few.to_local().repeat_interleave(times, _HEADS)
        return DTensor.from_local(many, self.mesh, few.placements, run_check=False).redistribute(
            placements=query.placements
        )

    def _copy(self, value: Any) -> torch.Tensor:
        found: torch.Tensor = value.redistribute(placements=[Replicate()] * self.mesh.ndim).to_local()
        return found

    def _whole(self, target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Compute an op on replicated tensors, on every process."""
        if str(target) not in self.logged:
            self.logged.add(str(target))
            log.info("tensor parallel: %s is computed whole, on every process", target)
        args, named = pytree.tree_map_only(DTensor, self._copy, (args, dict(kwargs)))
        made = super().call_function(target, args, named)
        return self._replicated(made)
