"""The base class of branches: trainable modules that add a delta to one weight during a stage.

The rest of the package uses only the methods of `Branch`. So an adapter method is one subclass, and one row of
`methods.METHODS` (CONTRIBUTING.md, "Add an adapter method").
"""

from __future__ import annotations

import abc
import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

from lorasc_fx.branch.deltas import (
    Factors,
    InitialFactors,
    Side,
    Through,
    arithmetic,
    rounded,
    step,
    step_on_grid,
)
from lorasc_fx.branch.placements import ConvCall, Placement
from lorasc_fx.branch.products import PRODUCTS, with_strides
from lorasc_fx.errors import PassError, SpecError
from lorasc_fx.parameters import shallow
from lorasc_fx.plan import Plan, Refusal, Site
from lorasc_fx.quantized import dense, is_quantized
from lorasc_fx.shards import UNSHARDED, ShardSpec, full_tensor, local
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.decode import Check
from lorasc_fx.util.torch_private import disable_dynamo

Reshard = Callable[[torch.Tensor, Side], torch.Tensor]
"""A function of (tensor, side) that slices a full tensor for this rank, or gathers the full tensor from the slices."""


class StartWeight(Protocol):
    """The weight at the start of a stage, from which some methods compute their first parameters (a protocol)."""

    @property
    def shard(self) -> ShardSpec:
        """The slice of the weight that this rank holds."""

    def exact(self) -> torch.Tensor:
        """Return the full weight without noise, in fp32, or in fp64 for an fp64 weight."""

    def noisy(self) -> torch.Tensor:
        """Return this rank's slice of the weight with noise, in the dtype of the weight."""

    def cut(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Return this rank's slice of a full tensor."""

    def whole(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        """Gather the full tensor from the slices on all ranks. Every rank must call it at the same point."""


@dataclass(frozen=True)
class _InPlace:
    """`StartWeight` for a whole weight that a graph reads in its forward."""

    weight: torch.Tensor
    shard: ShardSpec

    def exact(self) -> torch.Tensor:
        return self.weight.to(arithmetic(self.weight.dtype))

    def noisy(self) -> torch.Tensor:
        return self.weight

    def cut(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        return value

    def whole(self, value: torch.Tensor, side: Side) -> torch.Tensor:
        return value


def generator(seed: int, stage: int, purpose: str, weight: str) -> torch.Generator:
    """Return a new CPU generator whose random stream depends only on the four arguments.

    Other weights, the number of processes and earlier draws do not change the numbers. Global generators are not used.
    See docs/algorithm.md, "Facts that hold exactly".
    """
    digest = hashlib.sha256(f"{seed}\0{stage}\0{purpose}\0{weight}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True)
class Declared:
    """Declares one parameter of a branch, as a value of `Branch.table`.

    Args:
        shape: shape of the parameter.
        initial: a number for all entries at the start of a stage. Or a function of (seed, stage, parameter name, weight
            name, shape) that returns a tensor in fp32, such as `lora.random_factor`.
        trained: whether the parameter is trained. A frozen one keeps its initial values (or `values_from`).
    """

    shape: tuple[int, ...]
    initial: float | Callable[[int, int, str, str, tuple[int, ...]], torch.Tensor] = 0.0
    trained: bool = True


class Branch(nn.Module, abc.ABC):
    """The trainable parameters of a site, with one method for each placement.

    A branch with its initial parameters does not change any output, bit for bit.

    Args:
        site: the site, from the plan.
        seed, stage: together with the name of the weight, the key of the random initial values.
        like: tensor with the device and dtype of the weight. Parameters are fp64 for an fp64 weight, otherwise fp32.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "recurrent", "stacked"})
    """Kinds of weights (`spec.KINDS`) that the method can adapt."""

    zeros: tuple[str, ...]
    """Names of the trained parameters that start at zero. The delta is zero while all of these are zero."""

    placements: ClassVar[frozenset[str]] = frozenset({"merged", "weight"})
    """Placements (`spec.PLACEMENTS`) that the method supports."""

    defaults: ClassVar[Mapping[str, float]] = {}
    """Default values of the options of this method (`CascadeSpec.adapter_options`)."""

    checks: ClassVar[Mapping[str, Check]] = {}
    """Checks of the values of these options."""

    options: ClassVar[frozenset[str]] = frozenset()
    """Fields of CascadeSpec in `spec.METHOD_OPTIONS` that the method supports."""

    magnitude: ClassVar[str] = ""
    """Name of the parameter with a trained norm for each row of the weight (see `gain`), or "".

    With such a parameter, the slow weights are not a sum of deltas, because rows are scaled.
    """

    beside_quantized: ClassVar[bool] = False
    """Whether the method can adapt quantized weights, by computing beside the product."""

    uses_weight: ClassVar[bool] = False
    """Whether the delta depends on the weight, so that `delta` needs it as an argument."""

    pads_with_zeros: ClassVar[bool] = False
    """Whether padding the parameters with zeros to a larger rank does not change the delta."""

    kept: Any = None
    """What a graph module that owns its weights loses if other code rebuilds it, a `graph.branch_calls.Kept`."""

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__()
        self.kind = site.kind
        self.weight_name = site.weight
        self.weight_shape = tuple(site.shape)
        self.rank = site.rank
        self.scale = site.scale
        self.transposed = site.layout == "in_out"
        self.dropout = site.dropout
        self.grid, self.quantized = site.options.grid_of(like), is_quantized(like)
        trained = {name: row for name, row in self.table(site).items() if row.trained}
        self._trainable = frozenset(trained)
        self.zeros = tuple(name for name, row in trained.items() if row.initial == 0)
        for name, value in self.values_like(like, site, seed, stage).items():
            if hasattr(self, name):
                raise SpecError(
                    f"{type(self).__name__} declares a parameter {name!r}, but Branch has an attribute of this name. "
                    "Give another name"
                )
            setattr(self, name, nn.Parameter(value, requires_grad=name in self._trainable))
        filled = not like.is_meta and any(like.stride())  # a checkpoint passes one zero, expanded to the shape
        if self.grid and filled and not rounded(self.grid, dense(like), like, self.kind == "stacked").isfinite().all():
            raise SpecError(
                f"grid={self.grid!r} makes {site.weight} inf or nan. Exclude it (exclude=({site.weight!r},)), or give "
                "another grid",
                code="non-finite",
            )

    # ---- Parameters

    @classmethod
    @abc.abstractmethod
    def table(cls, site: Site) -> Mapping[str, Declared]:
        """Return {parameter name: declaration} for a branch at a site."""

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return {parameter name: shape}. Checkpoints store every parameter."""
        return {name: row.shape for name, row in cls.table(site).items()}

    @classmethod
    def values_like(cls, like: torch.Tensor, site: Site, seed: int, stage: int) -> dict[str, torch.Tensor]:
        """Return {parameter name: initial value in a stage} on the device of `like`, in fp32 or (like `like`) fp64.

        Values are drawn in fp32 in host memory. `values_from` replaces the values that depend on the weight.
        """
        dtype, values = torch.float64 if like.dtype == torch.float64 else torch.float32, {}
        for name, row in cls.table(site).items():
            if callable(row.initial):
                value = row.initial(seed, stage, name, site.weight, row.shape)
            else:
                value = torch.full(row.shape, float(row.initial))
            values[name] = value.to(device=like.device, dtype=dtype)
        return values

    @classmethod
    def options_at(cls, site: Site) -> dict[str, float]:
        """Return {option of this method: value} at a site, with defaults for missing options."""
        return {**cls.defaults, **dict(site.options.adapter_options)}

    @classmethod
    def fault(cls, site: Site) -> str:
        """Return why the method cannot adapt a site, as a phrase that follows the name of the weight. "" if it can."""
        return ""

    @classmethod
    def starts_from(cls, spec: CascadeSpec, running: bool) -> tuple[str, ...]:
        """Return which fields of `InitialFactors` a stage computes from its weight. "weight" means other values.

        An empty tuple means that no initial value depends on the weight. `running` is False for an idle stage.
        """
        return () if cls.values_from is Branch.values_from else ("weight",)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name. `param_groups` has one group for each name."""
        parameters = dict(self.named_parameters())
        for name in parameters.keys() - self._trainable:
            del parameters[name]
        return parameters

    def learning_rate(self, name: str, lr: float, spec: CascadeSpec) -> float:
        """Return the learning rate of a parameter. `lr` is the general rate, which LoRA+ multiplies for B."""
        return lr

    # ---- Stages

    def restarts(self, spec: CascadeSpec) -> bool:
        """Whether the trained parameters get new initial values at a transition (`restart_factors`)."""
        return True

    def kept_values(
        self, values: Mapping[str, torch.Tensor], spec: CascadeSpec, pairs: bool
    ) -> Mapping[str, torch.Tensor]:
        """Return {name: full value} of the parameters that do not restart at a transition (`restart_factors`).

        `values` are the initial values of the next stage. `pairs` says whether both factors are kept. The slow weights
        already include the delta of a kept pair, so the caller subtracts it.
        """
        return {}

    def values_from(
        self, site: Site, values: Mapping[str, torch.Tensor], weight: StartWeight
    ) -> Mapping[str, torch.Tensor]:
        """Return {name: full value} of the parameters that depend on the weight of the next stage.

        `site` and `values` are the site and the other values of that stage.
        """
        return {}

    @abc.abstractmethod
    def delta(self, weight: torch.Tensor | None = None) -> Factors | torch.Tensor:
        """Return the differentiable delta in the layout of the weight: factors, or a tensor in the shape of the weight.

        Args:
            weight: the weight at the start of the stage. None if `uses_weight` is False.
        """

    def gain(self, weight: StartWeight) -> torch.Tensor | None:
        """Return the factor of each row of weight plus delta, [out] for the rows on this rank, or None for 1."""
        return None

    @property
    def earlier(self) -> Sequence[Factors]:
        """The deltas of earlier stages that the branch of a quantized weight computes, one per stage."""
        return ()

    def moved(self, initial: InitialFactors | None, cut: Reshard) -> bool:
        """Whether training has changed the slice of the delta on this rank since the start of the stage.

        `initial` has the initial factors and magnitudes of this slice. `cut` returns this rank's slice of a tensor.
        """
        return any(bool(local(self.get_parameter(name)).any()) for name in self.zeros)

    def set_unmerged(self, pair: Factors | None, ranks: Sequence[int]) -> None:
        """Set the delta of earlier stages, which cannot be merged into a quantized weight. None removes it.

        `ranks` has the rank of each stage in the pair, in order. The branch adds this delta to the output too. Only for
        methods with `beside_quantized`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not adapt quantized weights")

    # ---- Placements

    def forward(
        self,
        *args: object,
        at: Placement,
        tensors: Mapping[str, torch.Tensor] | None = None,
        scale: torch.Tensor | None = None,
        **options: object,
    ) -> torch.Tensor:
        """Compute one placement. Graph nodes call this.

        If `tensors` is given, it replaces the parameters, and `scale` the scale of the branch (see `computed_with`).
        """
        first_input: Any = args[0] if args else None
        if isinstance(first_input, fx.Proxy):  # symbolic_trace keeps a branch as one node
            adapter_inputs = {"tensors": tensors, "scale": scale} if tensors is not None else {}
            path, tracer = first_input.tracer.path_of_module(self), first_input.tracer  # type: ignore[attr-defined]
            return tracer.create_proxy(  # type: ignore[return-value]
                "call_module", path, args, {"at": at, **options, **adapter_inputs}
            )
        if tensors is not None:
            assert scale is not None
            return self.computed_with(tensors, scale, *args, at=at, **options)
        output: torch.Tensor = self.function_at(at)(*args, **options)
        return output

    def function_at(self, at: Placement, entries: float = math.inf) -> Callable[..., Any]:
        """Return the function for a placement. `entries` is the size of the larger one of input and output."""
        if self.grid:
            return self.on_grid if at is Placement.WEIGHT else partial(Branch.merged, self)
        functions: dict[Placement, Callable[..., Any]] = {
            Placement.MERGED: self.merged,
            Placement.WEIGHT: self.on_weight,
            Placement.ADAPTED: self.adapted,
        }
        return functions[at]

    def on_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return weight plus delta, in the layout and dtype of the weight."""
        if not self.scale:  # inside `cascade.weights(...)`, branches add nothing
            return weight
        return with_strides(weight + self.dense_delta(weight).to(weight.dtype), weight)

    def on_grid(self, weight: torch.Tensor) -> torch.Tensor:
        """Return weight plus delta on the grid of the site, in the layout and dtype of the weight.

        For a quantized weight, this includes the deltas of earlier stages.
        """
        if not self.scale:  # inside `cascade.weights(...)`, branches add nothing
            return weight
        return self._quantized_on_grid(weight) if self.quantized else self._on_grid(weight)

    @disable_dynamo  # dynamo treats a quantized weight as a plain tensor
    def _quantized_on_grid(self, weight: torch.Tensor) -> torch.Tensor:
        return self._on_grid(weight)

    def _on_grid(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            value = dense(weight)
            delta = self.delta(value.to(arithmetic(value.dtype)) if self.uses_weight else None)
            with torch.no_grad():
                for pair in self.earlier:
                    value = step(value, (pair.b, pair.a))
                gain = self.gain(_InPlace(value, UNSHARDED)) if self.magnitude else None
                if isinstance(delta, torch.Tensor):
                    factors, change = None, delta
                else:
                    scaled = delta if gain is None else delta.with_rows(gain, self.transposed)
                    factors, change = (scaled.b, scaled.a), None
                stacked = self.kind == "stacked"
                value = step_on_grid(value, factors, change, gain, self.transposed, self.grid, weight, stacked)
            if gain is not None:
                source = self.adapted(weight, gain.new_full((), self.scale))
            else:
                source = delta if isinstance(delta, torch.Tensor) else delta.b @ delta.a
            on_grid: torch.Tensor = Through.apply(source.to(value.dtype).reshape(value.shape), value)  # type: ignore[no-untyped-call]
            return on_grid

    def merged(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str, **options: object
    ) -> torch.Tensor:
        """Return the output of the op, computed with the adapted weight and with the bias of the op.

        `op` is a key of `products.PRODUCTS`, or `conv` with the fields of a `ConvCall` as options.
        """
        adapted = self.on_grid(weight) if self.grid else self.on_weight(weight)
        return self.product_with(x, adapted, bias, op, **options)

    def product_with(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, op: str, **options: Any
    ) -> torch.Tensor:
        """Return the output of an op, computed with `weight`. The arguments are as in `merged`."""
        if op != "conv":
            return PRODUCTS[op](x, weight, bias)
        call = ConvCall(**options)
        return call.conv(len(self.weight_shape) - 2, call.padded(x), weight, bias)

    # ---- Parameters that are inputs of the graph (passes.AdapterInputs)

    def padded(self, site: Site, rank: int) -> dict[str, torch.Tensor]:
        """Return {parameter name: value padded with zeros to a rank}, in the order of `shapes`.

        Raises:
            PassError: the rank of the site is larger, padding would change the delta, or the site has a grid.
        """
        if self.grid:
            raise PassError(
                f"{site.weight} trains on grid={self.grid!r}, and the sum of a weight and a branch that is an input of "
                "the graph is not rounded. Exclude the site, or release the run",
                code="input-not-supported",
            )
        values = {name: full_tensor(self.get_parameter(name).detach()) for name in self.shapes(site)}
        padded_shapes = self.shapes(replace(site, options=replace(site.options, rank=rank)))
        if all(tuple(value.shape) == padded_shapes.get(name) for name, value in values.items()):
            return values
        if site.rank > rank:
            raise PassError(
                f"{site.weight} has a branch of rank {site.rank}, but the inputs of the graph have rank {rank}. "
                f"Give max_rank={site.rank} or more",
                code="rank-too-large",
            )
        if not self.pads_with_zeros or values.keys() != padded_shapes.keys():
            raise PassError(
                f"{site.weight} has a branch of rank {site.rank}, but {site.options.adapter} cannot be padded to rank "
                f"{rank} with zeros, because its delta would change. Give max_rank={site.rank}, or exclude the "
                "site",
                code="input-not-supported",
            )
        return {name: pad_to(value, padded_shapes[name]) for name, value in values.items()}

    def without_values(self) -> Branch:
        """Return a copy without parameters. Its calls get parameters and scale as arguments."""
        empty = shallow(self)
        assert isinstance(empty, Branch)
        empty._parameters = dict.fromkeys(self._parameters)
        empty.scale = 1.0
        return empty

    def computed_with(
        self,
        tensors: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        *args: Any,
        at: Placement,
        **options: Any,
    ) -> torch.Tensor:
        """Compute a placement with given parameters, in plain operations. Called on a copy from `without_values`.

        Args:
            tensors: values of the parameters by name. They may be padded with zeros.
            scale: scale of the delta, a scalar tensor.
            args, at, options: as for `forward`.
        """
        weight = args[0] if at is Placement.WEIGHT else args[1]
        changed: torch.Tensor = functional_call(self, dict(tensors), (weight, scale), {"at": Placement.ADAPTED})
        if at is Placement.WEIGHT:
            return changed
        return self.product_with(args[0], changed, args[2] if len(args) > 2 else None, **options)

    def adapted(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return `weight + scale * delta`. Called on a copy from `without_values`, whose own scale is 1."""
        return weight + (self.dense_delta(weight) * scale).to(weight.dtype)

    # ---- Helpers

    def dense_delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the delta in the shape of the weight, differentiable."""
        delta = self.delta(weight if self.uses_weight else None)
        return (delta.b @ delta.a).view(self.weight_shape) if isinstance(delta, Factors) else delta

    def whole(self) -> Branch:
        """Return the branch. If it is sharded, return a copy with full tensors, for which every rank must call this."""
        if not any(hasattr(value, "to_local") for value in self.parameters()):
            return self
        parameters = {
            id(value): nn.Parameter(full_tensor(value.detach()), value.requires_grad) for value in self.parameters()
        }
        return copy.deepcopy(self, parameters)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a view of a weight or a delta as the matrix [out, in], or [matrices, out, in]."""
        lead = 1 if self.kind == "stacked" else 0
        flat = weight.reshape(*weight.shape[: lead + 1], -1)
        return flat.mT if self.transposed else flat

    def with_values(self, values: Mapping[str, torch.Tensor]) -> Branch:
        """Return a copy with these full values of its parameters."""
        started = copy.deepcopy(self.whole())
        for name, value in values.items():
            fill(started.get_parameter(name), value)
        return started

    def finite(self) -> bool:
        """Whether no entry of the parameters on this rank is inf or nan."""
        return all(bool(torch.isfinite(local(value)).all()) for value in self.parameters())

    def shard_axes(self, weight: torch.Tensor, parts: int) -> dict[str, int]:
        """Return {name: axis} for parameters that FSDP shards over `parts` ranks along another axis than 0.

        The key "weight" is the adapted weight itself.
        """
        return {}

    def extra_repr(self) -> str:
        """Return the text for `print`."""
        entries = sum(math.prod(value.shape) for value in self.trainable().values())
        return f"{self.weight_name}, rank={self.rank}, {entries} trained, scale={self.scale:g}"


def pad_to(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor padded with zeros at the end of each axis."""
    pairs = [(0, size - old) for size, old in zip(shape, value.shape, strict=True)]
    return F.pad(value, [count for pair in reversed(pairs) for count in pair])


def fill(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write a value into a Parameter."""
    with torch.no_grad():
        parameter.copy_(value)


@dataclass(frozen=True)
class Decided:
    """Plan, branches and refusals of all graphs captured so far.

    Args:
        plan: the plan.
        branches: {`Site.key`: branch}.
        refusals: weights without a branch, with reasons.
        unreached: names of weights that no graph has used so far.
    """

    plan: Plan
    branches: Mapping[str, Branch]
    refusals: tuple[Refusal, ...]
    unreached: tuple[str, ...]
