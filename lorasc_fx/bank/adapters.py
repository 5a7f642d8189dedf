"""The adapters of a bank, by name: frozen ones in slots, and trained ones as parameters."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorasc_fx.bank.slots import Key, Slot, Slots
from lorasc_fx.branch import Decided, Factors
from lorasc_fx.branch.contract import pad_to
from lorasc_fx.branch.lora import DOWN, UP, random_factor
from lorasc_fx.errors import SpecError, StateError, named, nearest
from lorasc_fx.graph import named_weights
from lorasc_fx.peft.adapter_pairs import LowRankAdapter
from lorasc_fx.plan import Site
from lorasc_fx.util.decode import is_integer, is_number

_LOSSLESS = 1e-10
"""Relative error up to which an adapter is reduced to a smaller rank. The factors of a run with many stages often have
more columns than the rank of their product."""
_MAX_ROUNDING = 0.05
"""Largest accepted error of an entry in the dtype of the bank, relative to the largest entry of its factor."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained adapter: its factors, padded with zeros to the rank of the bank, and its scale."""

    parameters: Mapping[Key, nn.Parameter]
    scale: float


@dataclass(frozen=True, eq=False)
class _Adapter:
    """An adapter: the slot of its frozen factors, and its trained factors, which are used instead if there are any."""

    slot: Slot
    trained: Trained | None = None


class Adapters:
    """The adapters of a bank. The name None is the base, an adapter whose factors are zero.

    Methods that add or remove must be called under the lock of the bank. Other methods may run at the same time in
    other threads, because `_by_name` is replaced by a new dict and never modified in place.

    Args:
        model: the base.
        decided: the sites of the bank, and why other weights are not adapted.
        max_rank: rank r of the factors of every adapter.
        capacity: number of adapters to allocate memory for.
    """

    def __init__(self, model: nn.Module, decided: Decided, max_rank: int, capacity: int) -> None:
        self.model, self.decided, self.max_rank, self.capacity = model, decided, max_rank, capacity
        self.sites = decided.plan.sites
        parameters = named_weights(model).parameters
        self.slots = Slots(self.sites, parameters, capacity)
        weights = [(site.weight, parameters[site.weight]) for site in self.sites]
        self._dtypes = [(name, weight, weight.dtype) for name, weight in weights]
        self._by_name: dict[str | None, _Adapter] = {None: _Adapter(self.slots.base)}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return tuple(name for name in self._by_name if name is not None)

    def check_names(self, names: Sequence[object]) -> None:
        """Raise StateError if one of these is neither the name of an adapter nor None."""
        for name in names:
            if name not in self._by_name:
                raise StateError(
                    f"bank: there is no adapter {name!r}{nearest(str(name), self.names)}. The adapters are "
                    f"{named(map(repr, self.names), 8) or 'none'}",
                    code="unknown-name",
                )

    @contextmanager
    def using(self, names: Collection[str | None]) -> Iterator[Adapters]:
        """Context manager: keep adapters for a call, which computes with them even if they are removed meanwhile.

        Args:
            names: names of the adapters that the call uses.

        Returns:
            These adapters.

        Raises:
            StateError: one of these is neither the name of an adapter nor None.
        """
        kept = copy.copy(self)
        kept.check_names(list(names))
        kept._by_name = {name: kept._by_name[name] for name in names}
        try:
            yield kept
        finally:
            kept._by_name = {}  # the traceback of an error must not keep the slots in use

    def check_new(self, name: object) -> None:
        """Raise an error if an adapter with this name cannot be added.

        Raises:
            SpecError: the name is not a string.
            StateError: there is an adapter of this name.
        """
        check_name(name)
        if name in self._by_name:
            raise StateError(
                f"bank: there is an adapter {name!r} already. Call bank.remove({name!r}) first, or give another name",
                code="unknown-name",
            )

    def check_dtypes(self) -> None:
        """Raise StateError if the model was converted to another dtype after the bank was built.

        The factors keep their dtype, so the result would be less precise than the new weights.
        """
        for name, weight, dtype in self._dtypes:
            if weight.dtype != dtype:
                raise StateError(
                    f"bank: {name} was {dtype} when the bank was built, and is {weight.dtype} now, but the adapters "
                    "have the old dtype. Convert the model back, or build a new bank on the converted model",
                    code="weights-changed-outside",
                )

    def place(self, name: str, adapter: LowRankAdapter) -> None:
        """Add a frozen adapter.

        Raises:
            SpecError: it changes a weight that is not a site, its factors have other shapes or contain inf or nan, its
                rank is too large, or the bank is full.
        """
        sites = {site.weight: site for site in self.sites}
        if foreign := [weight for weight in adapter.pairs if weight not in sites]:
            refused = {refusal.weight: str(refusal) for refusal in self.decided.refusals}
            reason = refused.get(foreign[0], f"{foreign[0]} is not one of its weights")
            raise SpecError(
                f"bank: {name!r} changes {named(foreign)}, which the bank does not adapt: {reason}. Give the bank "
                "targets=... that include it",
                code="sites-differ",
            )
        values: dict[Key, torch.Tensor] = {}
        for site in self.sites:
            if (pair := adapter.pairs.get(site.weight)) is not None:
                _check_shapes(name, site, pair)
                if not (pair.a.isfinite().all() and pair.b.isfinite().all()):
                    raise SpecError(
                        f"bank: {name!r} has inf or nan in its factors for {site.weight}. Give an adapter that was "
                        "saved before its training diverged",
                        code="non-finite",
                    )
            tensors, cut = adapter.tensors(site, self.max_rank)
            if cut.error > _LOSSLESS * cut.norm:
                raise SpecError(
                    f"bank: {name!r} has rank {cut.before} at {site.weight}, and max_rank is {self.max_rank}. Cutting "
                    f"it to this rank would drop {cut.relative:.2%} of its change. Give the bank a larger max_rank",
                    code="rank-too-large",
                )
            values |= {(site.weight, key): tensors[key] for key in (DOWN, UP)}
        self._check_fits_dtypes(name, values)
        self._occupy(name, values)

    def start(self, name: str, rank: int, lora_alpha: float, seed: int) -> None:
        """Add a trained adapter with LoRA's initial values; see `AdapterBank.start`.

        Raises:
            SpecError: the rank, `lora_alpha` or the seed is invalid, or the bank is full.
        """
        if not is_integer(rank, 1) or rank > self.max_rank:
            raise SpecError(f"bank: the rank of {name!r} is {rank!r}; give one from 1 to {self.max_rank}")
        if not is_number(lora_alpha) or lora_alpha <= 0:
            raise SpecError(f"bank: lora_alpha of {name!r} is {lora_alpha!r}; give a number above 0")
        if not is_integer(seed, 0) or seed >= 2**63:
            raise SpecError(f"bank: the seed of {name!r} is {seed!r}; give an integer from 0 to 2**63 - 1")
        values = {}
        for site in self.sites:
            a, b = replace(site, options=replace(site.options, rank=rank)).factor_shapes
            values[site.weight, DOWN] = _padded(random_factor(seed, 1, DOWN, site.weight, a), site, DOWN)
            values[site.weight, UP] = _padded(torch.zeros(b), site, UP)
        self._occupy(name, values, self._trained_from(values, lora_alpha / rank))

    def remove(self, name: str) -> Trained | None:
        """Remove an adapter. Return its factors if it was trained, so that callers can drop what they cache of it."""
        remaining = dict(self._by_name)
        removed = remaining.pop(name)
        self._by_name = remaining
        return removed.trained

    def parameters_of(self, name: str) -> Mapping[Key, nn.Parameter]:
        """Return the factors of an adapter as parameters. A frozen adapter becomes a trained one."""
        adapter = self._by_name[name]
        if adapter.trained is None:
            trained = self._trained_from(self.slots.of(adapter.slot.index), 1.0)
            adapter = _Adapter(adapter.slot, trained)
            self._by_name = {**self._by_name, name: adapter}
        assert adapter.trained is not None
        return adapter.trained.parameters

    def pairs(self, name: str) -> dict[str, Factors]:
        """Return an adapter as factors by weight name; see `AdapterBank.pairs`."""
        values, scale = self.factors(name)
        pairs = {}
        for site in self.sites:
            a, b = (values[site.weight, key].detach().cpu().double() for key in (DOWN, UP))
            pairs[site.weight] = (
                Factors(a.mT * scale, b.mT) if site.layout == "in_out" else Factors(b * scale, a.clone())
            )
        return pairs

    def cache_key(self, name: str | None) -> int | Trained:
        """Return a key for tensors that are computed from an adapter: its slot, or its trained factors."""
        adapter = self._by_name[name]
        return adapter.slot.index if adapter.trained is None else adapter.trained

    def factors(self, adapter: str | Sequence[str | None] | None) -> tuple[Mapping[Key, torch.Tensor], Any]:
        """Return the factors and the scale of an adapter.

        For a sequence with one name for each row of a batch, the factors are stacked, [rows, ...] each, and the scale
        is a list.
        """
        if adapter is None or isinstance(adapter, str):
            if (trained := self._by_name[adapter].trained) is not None:
                return trained.parameters, trained.scale
            return self.slots.of(self._by_name[adapter].slot.index), 1.0
        if all(self._by_name[name].trained is None for name in adapter):  # one gather, not a stack for each tensor
            return self.slots.gather([self._by_name[name].slot.index for name in adapter]), [1.0] * len(adapter)
        by_name = {name: self.factors(name) for name in dict.fromkeys(adapter)}
        keys = next(iter(by_name.values()))[0]
        stacked = {key: torch.stack([by_name[name][0][key] for name in adapter]) for key in keys}
        return stacked, [by_name[name][1] for name in adapter]

    def _occupy(self, name: str, values: Mapping[Key, torch.Tensor], trained: Trained | None = None) -> None:
        """Write an adapter into a free slot, then register its name, so that calls find a complete adapter."""
        slot = self.slots.take()
        if slot is None:
            raise bank_full(self.capacity, self.capacity - len(self.names))
        self.slots.write(slot.index, values)
        self._by_name = {**self._by_name, name: _Adapter(slot, trained)}

    def _check_fits_dtypes(self, name: str, values: Mapping[Key, torch.Tensor]) -> None:
        """Raise SpecError if factors overflow or vanish in the dtype of the bank."""
        dtypes = {key: view.dtype for key, view in self.slots.of(0).items()}
        for (weight, factor), value in values.items():
            dtype = dtypes[weight, factor]
            if (value.to(dtype).double() - value).abs().amax() > _MAX_ROUNDING * value.abs().amax():
                raise SpecError(
                    f"bank: {name!r} has values in {factor} of {weight} that {dtype} cannot hold; the largest is "
                    f"{value.abs().max():.3g}. Multiply one factor by a number and divide the other one by it, or give "
                    "a base with a wider dtype",
                    code="non-finite",
                )

    def _trained_from(self, values: Mapping[Key, torch.Tensor], scale: float) -> Trained:
        """Return trainable copies of these factors, in fp32, or in fp64 for fp64 weights."""
        weights = named_weights(self.model).parameters
        parameters = {
            key: nn.Parameter(value.detach().to(weights[key[0]].device, _trained_dtype(weights[key[0]]), copy=True))
            for key, value in values.items()
        }
        return Trained(parameters, scale)


def check_name(name: object) -> None:
    """Raise SpecError unless this can be the name of an adapter."""
    if not isinstance(name, str) or not name:
        hint = ". None is the base, which a bank always has" if name is None else ""
        raise SpecError(f"bank: the name of an adapter is {name!r}; give a string{hint}")


def checked_factors(name: str, weight: str, pair: Any) -> Factors:
    """Return the factors of a user in fp64 on the CPU. Raise SpecError unless they are dense real matrices."""
    if not (isinstance(pair, Factors) and isinstance(pair.b, torch.Tensor) and isinstance(pair.a, torch.Tensor)):
        raise SpecError(f"bank: {name!r} has {pair!r:.60} for {weight}; give lorasc_fx.branch.Factors(b, a) of tensors")
    for factor in (pair.b, pair.a):
        has_values = factor.layout is torch.strided and not factor.is_meta
        if not (has_values and factor.is_floating_point() and factor.dim() > 1):
            raise SpecError(
                f"bank: {name!r} has a factor for {weight} with {factor.dim()} axes, of {factor.dtype}, "
                f"{factor.layout}, on {factor.device}. Give dense matrices of floating-point numbers, not on meta"
            )
    return Factors(pair.b.detach().cpu().double(), pair.a.detach().cpu().double())


def bank_full(capacity: int, in_use: int = 0) -> SpecError:
    """Return the error for an adapter without a free slot.

    Args:
        capacity: number of slots.
        in_use: number of slots whose adapters were removed during calls that are still running.
    """
    running = f"{in_use} of them were removed, but calls that use them are still running. " if in_use else ""
    advice = "Wait for these calls" if in_use else "Remove one by bank.remove(name)"
    return SpecError(
        f"bank: there is room for {capacity} adapters. {running}{advice}, or give the bank a larger capacity",
        code="bank-full",
    )


def _trained_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _padded(value: torch.Tensor, site: Site, name: str) -> torch.Tensor:
    """Return a factor padded with zeros to the rank of the bank."""
    return pad_to(value, site.parameter_shapes[name])


def _check_shapes(name: str, site: Site, pair: Factors) -> None:
    """Raise SpecError unless a pair has the shapes for its weight in its stored layout."""
    lead = 1 if site.experts else 0
    stack, rows, columns = site.shape[:lead], site.shape[lead], torch.Size(site.shape[lead + 1 :]).numel()
    rank = pair.a.shape[-2] if pair.a.dim() > 1 else 0
    wanted = ((*stack, rows, rank), (*stack, rank, columns))
    if (tuple(pair.b.shape), tuple(pair.a.shape)) != wanted:
        raise SpecError(
            f"bank: {name!r} has b {tuple(pair.b.shape)} and a {tuple(pair.a.shape)} for {site.weight}, whose shape is "
            f"{tuple(site.shape)}. Give b {wanted[0]} and a {wanted[1]}",
            code="adapter-does-not-fit",
        )
