"""The contract of a branch: a trainable module that changes one weight for the duration of a stage.

Engine, optimizer groups, checkpoints, sharding, passes and exports call the methods of `Branch` and nothing else. An
adapter method is one subclass in one file, and one row in `methods.METHODS`.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lorasc_fx.branch.conv import ConvCall
from lorasc_fx.branch.factors import Factors, InitialFactors, Side
from lorasc_fx.branch.products import PRODUCTS
from lorasc_fx.errors import PassError
from lorasc_fx.parameters import shallow
from lorasc_fx.plan import Plan, Refusal, Site
from lorasc_fx.shards import UNSHARDED, ShardSpec, full_tensor, local, zeros_like
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.decode import Check


def unchanged(value: torch.Tensor, side: Side) -> torch.Tensor:
    """Return a value of an unsharded weight."""
    return value


@dataclass(frozen=True)
class StartWeight:
    """The weight of a branch at the start of a stage. It is computed only if one of the functions is called.

    Args:
        exact: returns the full weight, without noise, in the dtype of the arithmetic.
        noisy: returns this rank's slice of the weight, with noise, in the dtype of the weight.
        shard: the slice of the weight on this rank.
        cut: returns this rank's slice of a full tensor.
        whole: gathers a tensor from the slices on all ranks. Every rank must call it at the same point.
        agreed: returns the value of the first rank, because a decomposition may have other bits on another machine.
    """

    exact: Callable[[], torch.Tensor]
    noisy: Callable[[], torch.Tensor]
    shard: ShardSpec = UNSHARDED
    cut: Callable[[torch.Tensor, Side], torch.Tensor] = unchanged
    whole: Callable[[torch.Tensor, Side], torch.Tensor] = unchanged
    agreed: Callable[[torch.Tensor], torch.Tensor] = lambda value: value


class Branch(nn.Module, abc.ABC):
    """Trainable parameters of a site, with one method for each placement in a graph.

    With untrained parameters a branch adds nothing: every output keeps its bits.

    Args:
        site: description of the site.
        seed, stage: together with the name of the weight, the key of the random initial values.
        like: tensor with the device and dtype of the weight. Parameters of a weight narrower than fp32 are fp32.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "recurrent", "experts"})
    """Kinds of weights (`spec.KINDS`) that can have such a branch."""

    zeros: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that are zero at the start of a stage. The delta is zero while all these are zero."""

    placements: ClassVar[frozenset[str]] = frozenset({"merged", "weight"})
    """The possible placements (`spec.PLACEMENTS`)."""

    defaults: ClassVar[Mapping[str, float]] = {}
    """Default values of the method's own options (`CascadeSpec.adapter_options`)."""

    checks: ClassVar[Mapping[str, Check]] = {}
    """Conditions on the values of the method's own options."""

    options: ClassVar[frozenset[str]] = frozenset()
    """The options among `spec_checks.METHOD_OPTIONS` that the method supports."""

    scales_rows: ClassVar[bool] = False
    """Whether the method scales rows of the weight (`gain`), so that the slow weights are not only a sum of deltas."""

    beside_quantized: ClassVar[bool] = False
    """Whether the branch can compute beside a product with a quantized weight."""

    uses_weight: ClassVar[bool] = False
    """Whether the delta depends on the weight."""

    pads_with_zeros: ClassVar[bool] = False
    """Whether the delta stays the same if its parameters are padded with zeros to a larger rank."""

    slices: tuple[int, ...] = ()
    """Numbers of rows of the slices of a fused weight (q, k and v), each with separate factors."""

    slices_apart: ClassVar[bool] = False
    """Whether the slices of a fused weight have separate factors."""

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__()
        self.kind = site.kind
        self.weight_name = site.weight
        self.weight_shape = tuple(site.shape)
        self.scale = site.scale
        self.transposed = site.layout == "in_out"
        self.dropout = site.dropout
        self._trainable = frozenset(self.trainable_names(site))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        for name, value in self.initial_values(site, seed, stage).items():
            placed = value.to(device=like.device, dtype=dtype)
            setattr(self, name, nn.Parameter(placed, requires_grad=name in self._trainable))

    # ---- parameters

    @classmethod
    @abc.abstractmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters by name. A checkpoint stores all parameters."""

    @classmethod
    def initial_values(cls, site: Site, seed: int, stage: int) -> Mapping[str, torch.Tensor]:
        """Return the initial parameters of a stage in fp32 on the host, before `start` is called with the weight."""
        return {name: torch.zeros(shape) for name, shape in cls.shapes(site).items()}

    @classmethod
    def options_at(cls, site: Site) -> dict[str, float]:
        """Return the method's own options at a site."""
        return {**cls.defaults, **dict(site.options.adapter_options)}

    @classmethod
    def fault(cls, site: Site) -> str:
        """Return why the method has no meaning at a site, after the weight's name; "" if it has one."""
        return ""

    @classmethod
    def trainable_names(cls, site: Site) -> Collection[str]:
        """Return the names of the parameters that are trained."""
        return cls.shapes(site).keys()

    @classmethod
    def starts_from(cls, spec: CascadeSpec, running: bool) -> tuple[str, ...]:
        """Return the fields of `InitialFactors` that a running, or idle, stage computes from its weight.

        An empty tuple means that `start` does not use the weight.
        """
        return ()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that an optimizer trains, by name. The optimizer has a group for each name."""
        return {name: value for name, value in self.named_parameters() if name in self._trainable}

    def learning_rate(self, name: str, lr: float, spec: CascadeSpec) -> float:
        """Return the learning rate of a parameter (LoRA+ has two)."""
        return lr

    # ---- a stage

    def kept_entries(self, spec: CascadeSpec) -> Mapping[str, torch.Tensor]:
        """Return masks of the entries that are trained on after a transition, by parameter name (`restart_pairs`).

        An empty mapping means that the whole branch restarts.
        """
        return {}

    def follow(self, previous: Branch, spec: CascadeSpec, pairs: bool) -> bool:
        """Take over from the branch of the stage before what the spec keeps.

        Args:
            previous: the branch as the stage before has ended.
            spec: of the plan.
            pairs: whether pairs may be trained on.

        Returns:
            Whether the delta is not zero then. It is a part of the weight that the stage starts from.
        """
        return False

    def start(self, weight: StartWeight) -> torch.Tensor | None:
        """Initialize from the weight. Return the initial row norms in fp64 if the method trains them."""
        return None

    @abc.abstractmethod
    def delta(self, weight: torch.Tensor | None = None) -> Factors | torch.Tensor:
        """Return what the branch adds to its weight as stored, differentiable: factors, or a tensor of its shape.

        Args:
            weight: that the stage started from; None if `uses_weight` is False.
        """

    def gain(self, weight: StartWeight) -> torch.Tensor | None:
        """Return the factor of each row [out] of weight and delta, for the rows on this rank; None if it is 1."""
        return None

    def moved(
        self,
        initial: InitialFactors | None = None,
        cut: Callable[[torch.Tensor, Side], torch.Tensor] = unchanged,
    ) -> bool:
        """Whether training has changed the delta from zero, judged by the slice on this rank.

        Args:
            initial: the values that training started from, for the slice on this rank.
            cut: returns this rank's slice of a whole tensor.
        """
        return any(bool(local(self.get_parameter(name)).any()) for name in self.zeros)

    def set_unmerged(self, pair: Factors | None) -> None:
        """Take the delta of earlier stages, which a quantized weight cannot hold, if `beside_quantized`."""
        raise NotImplementedError(f"{type(self).__name__} does not adapt quantized weights")

    # ---- placements

    def forward(
        self,
        *args: Any,
        at: str,
        tensors: Mapping[str, torch.Tensor] | None = None,
        scale: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Compute at the placement that the graph node names.

        Args:
            args, options: of the placement.
            at: name of the placement.
            tensors, scale: computes with these instead of the parameters and the scale, see `computed_with`.
        """
        if tensors is not None:
            assert scale is not None
            return self.computed_with(tensors, scale, *args, at=at, **options)
        output: torch.Tensor = self.placement(at)(*args, **options)
        return output

    def placement(self, at: str) -> Callable[..., torch.Tensor]:
        """Return the method of a placement."""
        method: Callable[..., torch.Tensor] = getattr(self, at)
        return method

    def on_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted weight, as it is stored."""
        if not self.scale:  # other weights are in place, and the branch adds nothing
            return weight
        return weight + self.dense_delta(weight).to(weight.dtype)

    def in_place(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str, **options: Any
    ) -> torch.Tensor:
        """Return what the op of this name computes with the adapted weight; the options are those of a convolution
        (`ConvCall`).
        """
        return self.product_with(x, self.on_weight(weight), bias, op, **options)

    def product_with(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, op: str, **options: Any
    ) -> torch.Tensor:
        """Return what the op of this name computes with a weight."""
        if op != "conv":
            return PRODUCTS[op](x, weight, bias)
        call = ConvCall(**options)
        return call.conv(len(self.weight_shape) - 2, call.padded(x), weight, bias)

    # ---- tensors as inputs of the graph (passes.AdapterInputs)

    def padded(self, site: Site, rank: int) -> dict[str, torch.Tensor]:
        """Return the values of all parameters in the order of `shapes`, padded with zeros to a rank.

        Raises:
            PassError: the rank of the site is larger, or padding would change the delta of this method.
        """
        values = {name: full_tensor(self.get_parameter(name).detach()) for name in self.shapes(site)}
        wanted = self.shapes(replace(site, options=replace(site.options, rank=rank, ranks=())))
        if all(tuple(value.shape) == wanted.get(name) for name, value in values.items()):
            return values
        if site.rank > rank:
            raise PassError(
                f"{site.weight} has a branch of rank {site.rank}, and the inputs have rank {rank}. "
                f"Give max_rank={site.rank} or more",
                code="rank-too-large",
            )
        if not self.pads_with_zeros or values.keys() != wanted.keys():
            raise PassError(
                f"{site.weight} has a branch of rank {site.rank}, and {site.options.adapter} cannot be padded to rank "
                f"{rank} by zeros: its delta would change. Give max_rank={site.rank}, or leave it out (sites=...)",
                code="input-not-supported",
            )
        return {name: self.pad(name, value, wanted[name]) for name, value in values.items()}

    def pad(self, name: str, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the value of a parameter padded with zeros to a shape."""
        return pad_to(value, shape)

    def cut(self, name: str, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the value of a parameter without its padding, the inverse of `pad`."""
        return value[tuple(slice(size) for size in shape)]

    def without_values(self) -> Branch:
        """Return a copy that gets parameters and scale as arguments. Its own parameters are None, and its scale 1."""
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
        at: str,
        rows: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        """Compute a placement of a copy `without_values` by plain, differentiable operations.

        Args:
            tensors: values of the parameters by name, which may be padded.
            scale: factor of the delta, of shape [].
            args, at, options: of the placement.
            rows: where the rows of the batch are. Only low-rank branches compute with other tensors for each row.
        """
        adapted = {"at": "adapted", **({"expert": options.pop("expert")} if "expert" in options else {})}
        weight = args[0] if at == "on_weight" else args[1]
        changed: torch.Tensor = functional_call(self, dict(tensors), (weight, scale), adapted)
        if at == "on_weight":
            return changed
        return self.product_with(args[0], changed, args[2] if len(args) > 2 else None, **options)

    def adapted(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the weight with `scale` times the delta, for a branch whose own scale is 1."""
        return weight + (self.dense_delta(weight) * scale).to(weight.dtype)

    # ---- helpers

    def dense_delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the delta in the shape of the weight, differentiable."""
        delta = self.delta(weight if self.uses_weight else None)
        return (delta.b @ delta.a).view(self.weight_shape) if isinstance(delta, Factors) else delta

    def whole(self) -> Branch:
        """Return the branch itself, or a copy with plain tensors if it is sharded. Then every rank must call this."""
        if not any(hasattr(value, "to_local") for value in self.parameters()):
            return self
        parameters = {
            id(value): nn.Parameter(full_tensor(value.detach()), value.requires_grad) for value in self.parameters()
        }
        return copy.deepcopy(self, parameters)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight, or a delta, as a view [out, in], or [experts, out, in]."""
        lead = 1 if self.kind == "experts" else 0
        flat = weight.reshape(*weight.shape[: lead + 1], -1)
        return flat.mT if self.transposed else flat

    def resize(self, site: Site) -> None:
        """Take the rank and scale of a site, in the same Parameter objects, so that optimizers keep them.

        Parameters whose shape changes are zero and without a gradient then.
        """
        self.scale = site.scale
        for name, shape in self.shapes(site).items():
            parameter = self.get_parameter(name)
            if tuple(parameter.shape) != shape:
                fill(parameter, zeros_like(parameter.detach(), shape))

    def resized(self, site: Site) -> list[nn.Parameter]:
        """Return the parameters that have another shape at this site, as if the rank changes by stage."""
        shapes = self.shapes(site)
        return [value for name, value in self.named_parameters() if tuple(value.shape) != shapes[name]]

    def finite(self) -> bool:
        """Whether no entry of the parameters on this rank is inf or nan; True on the meta device."""
        return all(value.is_meta or bool(torch.isfinite(local(value)).all()) for value in self.parameters())

    def shard_axes(self, weight: torch.Tensor, parts: int, resized: bool) -> dict[str, int]:
        """Return the axis along which FSDP cuts a parameter, or the weight (`weight`), if it is not the first one.

        Args:
            weight: of the site.
            parts: number of ranks.
            resized: whether the rank changes by stage.
        """
        return {}

    def extra_repr(self) -> str:
        """Return what `print` shows of the branch."""
        entries = sum(math.prod(value.shape) for value in self.trainable().values())
        return f"{self.weight_name}, {entries} trained, scale={self.scale:g}"


def pad_to(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor padded with zeros at the end of each axis."""
    pairs = [(0, size - old) for size, old in zip(shape, value.shape, strict=True)]
    return F.pad(value, [count for pair in reversed(pairs) for count in pair])


def fill(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write a value into a Parameter. A value of another shape replaces its data and drops its gradient.

    The autograd node that accumulates the gradient remembers the shape, and lives as long as any earlier loss. torch
    releases it if the dtype changes, so the data has another dtype for a moment.
    """
    if parameter.shape == value.shape:
        with torch.no_grad():
            parameter.copy_(value)
        return
    parameter.grad = None
    target: Any = parameter
    data: Any
    for data in (value.detach().half(), value.detach()):
        target.data = data
        if hasattr(data, "to_local"):  # `.data` of a DTensor replaces the C++ tensor only
            target._local_tensor, target._spec = data._local_tensor, data._spec


@dataclass(frozen=True)
class Decided:
    """The decisions about all weights, over all graphs so far."""

    plan: Plan
    branches: Mapping[str, Branch]
    refusals: tuple[Refusal, ...]
    unreached: tuple[str, ...]
