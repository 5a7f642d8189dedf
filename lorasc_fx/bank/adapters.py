"""The adapters of a bank, by name: frozen ones in one block of memory each, and trained ones as parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lorasc_fx.branch import Decided, Factors
from lorasc_fx.branch.contract import pad_to
from lorasc_fx.branch.lora import DOWN, UP, random_factor
from lorasc_fx.errors import SpecError, StateError, named, nearest
from lorasc_fx.graph import named_weights
from lorasc_fx.peft.adapter_pairs import LowRankAdapter
from lorasc_fx.plan import Site
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.decode import is_integer

Key = tuple[str, str]
"""(name of a weight, name of a factor). The factors are `branch.lora.DOWN` (A) and `UP` (B)."""

_LOSSLESS = 1e-10
"""Relative error up to which the rank of an adapter is reduced. The factors of a run with many stages often have more
columns than the rank of their product."""


@dataclass(frozen=True, eq=False)
class Stored:
    """An adapter of a bank.

    Args:
        factors: the factors, padded with zeros to the rank of the bank. Parameters if the adapter is trained.
        scale: the factor on every delta `b @ a`.
        memory: the vectors that hold the factors, one for each device and dtype. Empty for a trained adapter.
    """

    factors: Mapping[Key, torch.Tensor]
    scale: float = 1.0
    memory: Sequence[torch.Tensor] = ()


class Adapters:
    """The adapters of a bank.

    Methods that add or remove must be called under a lock. Other methods may run at the same time in other threads,
    because `_by_name` is replaced by a new dict and never modified in place.

    Args:
        model: the base.
        decided: the sites of the bank, and why other weights are not adapted.
        max_rank: rank r to which all factors are padded.
    """

    def __init__(self, model: nn.Module, decided: Decided, max_rank: int) -> None:
        self.sites, self._decided, self._max_rank = decided.plan.sites, decided, max_rank
        self._weights = named_weights(model).parameters
        self._places: dict[Key, tuple[int, int, tuple[int, ...]]] = {}  # index of the vector, start in it, and shape
        self._sizes: dict[tuple[torch.device, torch.dtype], int] = {}  # of the vectors, in order
        for site in self.sites:
            weight = self._weights[site.weight]
            kind = weight.device, weight.dtype if weight.dtype.is_floating_point else torch.float32
            for name, shape in site.parameter_shapes.items():
                start = self._sizes.setdefault(kind, 0)
                self._places[site.weight, name] = [*self._sizes].index(kind), start, shape
                self._sizes[kind] = start + torch.Size(shape).numel()
        self.base = self._frozen({})
        self._by_name: dict[str, Stored] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return tuple(self._by_name)

    def __getitem__(self, name: str) -> Stored:
        """Return an adapter.

        Raises:
            StateError: there is no adapter of this name.
        """
        if name not in self._by_name:
            raise StateError(
                f"bank: there is no adapter {name!r}{nearest(str(name), self.names)}. The adapters are "
                f"{named(map(repr, self.names), 8) or 'none'}",
                code="unknown-name",
            )
        return self._by_name[name]

    def chosen(self, adapter: str | Sequence[str | None] | None) -> Stored | list[Stored]:
        """Return the adapter of a call, or the adapter of each row. None is the base.

        Raises:
            StateError: there is no adapter of this name.
        """
        if adapter is None or isinstance(adapter, str):
            return self.base if adapter is None else self[adapter]
        return [self.base if name is None else self[name] for name in adapter]

    def add(self, name: str, adapter: LowRankAdapter) -> None:
        """Add a frozen adapter.

        Raises:
            SpecError: the adapter changes a weight without a site, or its rank is too large. Or its factors have wrong
                shapes, inf or nan.
        """
        sites = {site.weight: site for site in self.sites}
        if foreign := [weight for weight in adapter.pairs if weight not in sites]:
            refused = {refusal.weight: str(refusal) for refusal in self._decided.refusals}
            reason = refused.get(foreign[0], f"{foreign[0]} is not one of its weights")
            raise SpecError(
                f"bank: {name!r} changes {named(foreign)}, which the bank does not adapt: {reason}. Give the bank "
                "targets=... that include it",
                code="sites-differ",
            )
        values: dict[Key, torch.Tensor] = {}
        for weight, pair in adapter.pairs.items():
            _check_shapes(name, sites[weight], pair)
            dtype = self.base.factors[weight, UP].dtype
            if not (pair.a.to(dtype).isfinite().all() and pair.b.to(dtype).isfinite().all()):
                raise SpecError(
                    f"bank: {name!r} has inf or nan in its factors for {weight}, as {dtype}. Give an adapter that was "
                    "saved before its training diverged",
                    code="non-finite",
                )
            tensors, cut = adapter.tensors(sites[weight], self._max_rank)
            if cut.error > _LOSSLESS * cut.norm:
                raise SpecError(
                    f"bank: {name!r} has rank {cut.before} at {weight}, and max_rank is {self._max_rank}. Cutting it "
                    f"to this rank would drop {cut.relative:.2%} of its change. Give the bank a larger max_rank",
                    code="rank-too-large",
                )
            values |= {(weight, key): tensors[key] for key in (DOWN, UP)}
        self._by_name = {**self._by_name, name: self._frozen(values)}

    def start(self, name: str, rank: int, lora_alpha: float, seed: int) -> None:
        """Add a trained adapter with LoRA's initial values; see `AdapterBank.start`.

        Raises:
            SpecError: the rank, `lora_alpha` or the seed is invalid.
        """
        if not is_integer(rank, 1) or rank > self._max_rank:
            raise SpecError(f"bank: the rank of {name!r} is {rank!r}; give one from 1 to {self._max_rank}")
        CascadeSpec(lora_alpha=lora_alpha, seed=seed)  # checks both
        values = {}
        for site in self.sites:
            a, b = replace(site, options=replace(site.options, rank=rank)).factor_shapes
            for key, value in ((DOWN, random_factor(seed, 1, DOWN, site.weight, a)), (UP, torch.zeros(b))):
                values[site.weight, key] = pad_to(value, site.parameter_shapes[key])
        self._by_name = {**self._by_name, name: Stored(self._parameters(values), lora_alpha / rank)}

    def remove(self, name: str) -> None:
        """Remove an adapter."""
        removed = self[name]
        self._by_name = {kept_name: stored for kept_name, stored in self._by_name.items() if stored is not removed}

    def parameters_of(self, name: str) -> dict[Key, nn.Parameter]:
        """Return the factors of an adapter as parameters. A frozen adapter becomes a trained one."""
        stored = self[name]
        parameters = self._parameters(stored.factors)
        if stored.memory:
            self._by_name = {**self._by_name, name: Stored(parameters)}
        return parameters

    def pairs(self, name: str) -> dict[str, Factors]:
        """Return an adapter as factors by weight name; see `AdapterBank.pairs`."""
        stored, pairs = self[name], {}
        for site in self.sites:
            a, b = (stored.factors[site.weight, key].detach().cpu().double() for key in (DOWN, UP))
            b, a = (a.mT, b.mT) if site.layout == "in_out" else (b, a.clone())
            pairs[site.weight] = Factors(b * stored.scale, a)
        return pairs

    def factors(self, chosen: Stored | Sequence[Stored]) -> tuple[Mapping[Key, torch.Tensor], float | list[float]]:
        """Return the factors and the scale of an adapter.

        For several adapters, the factors are stacked, [adapters, ...] each, and the scale is a list.
        """
        if isinstance(chosen, Stored):
            return chosen.factors, chosen.scale
        scales = [stored.scale for stored in chosen]
        if all(stored.memory for stored in chosen):  # one stack, not one for each factor
            memory = zip(*(stored.memory for stored in chosen), strict=True)
            return self._views([torch.stack(vectors) for vectors in memory]), scales
        return {key: torch.stack([stored.factors[key] for stored in chosen]) for key in self._places}, scales

    def _frozen(self, values: Mapping[Key, torch.Tensor]) -> Stored:
        """Return a frozen adapter with copies of these factors. Missing factors are zero."""
        memory = [torch.zeros(size, device=device, dtype=dtype) for (device, dtype), size in self._sizes.items()]
        factors = self._views(memory)
        for key, value in values.items():
            factors[key].copy_(value)
        return Stored(factors, memory=memory)

    def _views(self, memory: Sequence[torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Return the views of the factors in vectors [..., size]."""
        return {
            key: memory[index].narrow(-1, start, torch.Size(shape).numel()).unflatten(-1, shape)
            for key, (index, start, shape) in self._places.items()
        }

    def _parameters(self, values: Mapping[Key, torch.Tensor]) -> dict[Key, nn.Parameter]:
        """Return factors as parameters in fp32, or in fp64 for fp64 weights. A factor that is a Parameter is kept."""

        def parameter(weight: torch.Tensor, value: torch.Tensor) -> nn.Parameter:
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            return nn.Parameter(value.detach().to(weight.device, dtype, copy=True))

        return {
            key: value if isinstance(value, nn.Parameter) else parameter(self._weights[key[0]], value)
            for key, value in values.items()
        }


def checked_factors(name: str, weight: str, pair: object) -> Factors:
    """Return the user's factors of a weight in fp64 on the CPU. Raise SpecError if `pair` is not a `Factors`."""
    if not isinstance(pair, Factors):
        raise SpecError(f"bank: {name!r} has {pair!r:.60} for {weight}; give lorasc_fx.branch.Factors(b, a) of tensors")
    return Factors(pair.b.detach().cpu().double(), pair.a.detach().cpu().double())


def _check_shapes(name: str, site: Site, pair: Factors) -> None:
    """Raise SpecError unless the shapes of a pair fit its weight in the stored layout."""
    lead = 1 if site.stacked else 0
    stack, rows, columns = site.shape[:lead], site.shape[lead], torch.Size(site.shape[lead + 1 :]).numel()
    rank = pair.a.shape[-2] if pair.a.dim() > 1 else 0
    wanted = ((*stack, rows, rank), (*stack, rank, columns))
    if (tuple(pair.b.shape), tuple(pair.a.shape)) != wanted:
        raise SpecError(
            f"bank: {name!r} has b {tuple(pair.b.shape)} and a {tuple(pair.a.shape)} for {site.weight}, whose shape is "
            f"{tuple(site.shape)}. Give b {wanted[0]} and a {wanted[1]}",
            code="adapter-does-not-fit",
        )
