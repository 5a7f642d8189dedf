"""`AdapterBank`: several adapters on one base, chosen at each call, by row, without a write to the weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.adapt.start import check_new
from lorasc_fx.bank.hooked import hooked
from lorasc_fx.bank.pair import pair_plan
from lorasc_fx.bank.rows import Layout, by_group, check_splits, layout_of, not_independent, row_count, tensors_in
from lorasc_fx.bank.slots import Key, Slots
from lorasc_fx.branch import Decided, Factors
from lorasc_fx.branch.contract import pad_to
from lorasc_fx.branch.given import FIRST_AXIS, Pair
from lorasc_fx.branch.lora import DOWN, UP, random_factor
from lorasc_fx.capture import open_model
from lorasc_fx.compile import Call, Compiler, Variant, Variants
from lorasc_fx.errors import CaptureError, SpecError, StateError, named, nearest
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import GraphEditor, named_weights
from lorasc_fx.graph.function import as_function, takes_leaves
from lorasc_fx.passes import AdapterInputs, adapter_inputs
from lorasc_fx.passes.adapter_inputs import SCALE
from lorasc_fx.peft.low_rank import LowRankAdapter, low_rank_pairs
from lorasc_fx.plan import Site
from lorasc_fx.signature import Calls, bind_inputs, leaves, signature_of
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.fingerprint import fingerprints
from lorasc_fx.util.undo import PROCESS

Source = Cascade | str | PathLike[str] | Mapping[str, Factors]

_LOSSLESS = 1e-10
"""Share of a delta that a reduced rank may cost: a pair of many stages often has a smaller rank than its factors."""


class AdapterBank:
    """Several adapters on one base model. Each call names one, or one for each row of the batch.

    An adapter is a pair of factors for each weight, against the weights of the model. The model is captured once for
    each kind of call, as by `adapt`, and its weights are never written: another adapter is other inputs of the graph.
    While the bank is in use, the parameters of the model require no gradients; `release` restores the flags.

        bank = lx.AdapterBank(model, {"a": "runs/a", "b": cascade}, args=(x,))
        bank(x, adapter="a")
        bank(x, adapter=["a", "b", None])  # of a batch of three rows

    Args:
        model: the base, not adapted.
        adapters: by name. A cascade on the same base, a checkpoint folder, the folder of a LoRA adapter of peft, or
            factors by weight name.
        args, kwargs: example inputs, as for `adapt`, with the rows of the batch on axis 0.
        max_rank: largest rank of an adapter; by default that of the given ones, or 8 without any.
        capacity: number of adapters that there is memory for; by default 8, or as many as are given.
        targets: globs on the weights that adapters may change; by default those that the given ones change.
        frontend: as for `adapt`.

    Raises:
        SpecError: an adapter changes more than weights by factors, or has too large a rank; or there are no targets.
        CheckpointError: an adapter has another base, or cannot be read.
        CaptureError: the model has no whole graph.
        StateError: the model is adapted already.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Source] | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        max_rank: int | None = None,
        capacity: int | None = None,
        targets: Sequence[str] | None = None,
        frontend: str = "auto",
    ) -> None:
        self.model = open_model(model)
        check_new(self.model)
        for option, value in (("max_rank", max_rank), ("capacity", capacity)):
            if value is not None and not is_integer(value, 1):
                raise SpecError(f"bank: {option} is {value!r}; give an integer of 1 or more")
        found = {name: self._read(name, source) for name, source in (adapters or {}).items()}
        changed = dict.fromkeys(weight for each in found.values() for weight in each.pairs)
        if targets is None and not changed:
            raise SpecError("bank: no adapter changes a weight. Give adapters, or targets for those that you add later")
        ranks = [pair.rank for each in found.values() for pair in each.pairs.values()]
        self.max_rank = max_rank if max_rank is not None else max(ranks, default=8)
        self.capacity = capacity if capacity is not None else max(8, len(found))
        if len(found) > self.capacity:
            raise _full(self.capacity)
        self._compiler = Compiler(
            frontend, Calls(signature_of(self.model), one_key=isinstance(self.model, fx.GraphModule))
        )
        bound = bind_inputs(self.model, args, kwargs if kwargs is not None else {})
        plan = pair_plan(tuple(targets if targets is not None else changed), self.max_rank)
        self._decided = Decided(plan, {}, (), ())
        self._variants, self._lock = Variants(), threading.RLock()
        self._flags = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        self._compile: dict[str, Any] | None = None
        self._trained: dict[str | None, _Trained] = {}
        self._slots_by_name: dict[str | None, int] = {None: 0}
        for parameter in self._flags:
            parameter.requires_grad_(False)
        try:
            self._example, self._generates = self._compiler.calls.bind(*bound), False
            self._graph(self._example)
            self._slots = Slots(self.sites, named_weights(self.model).parameters, self.max_rank, self.capacity)
            for name, adapter in found.items():
                self._place(name, adapter)
        except BaseException:
            self.release()
            raise

    # ---- adapters

    @property
    def sites(self) -> tuple[Site, ...]:
        """The weights that adapters may change, in the model's order."""
        return self._decided.plan.sites

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return tuple(name for name in self._slots_by_name if name is not None)

    def add(self, name: str, source: Source) -> None:
        """Add an adapter, while the bank serves. If anything raises, nothing is changed.

        Args:
            name: a new one.
            source: as in the constructor.

        Raises:
            SpecError, CheckpointError: as of the constructor; or the name is taken, or there is no room.
        """
        self._check_new_name(name)
        adapter = self._read(name, source)  # without the lock: a cascade that is read has locks of its own
        with self._lock:
            self._check_new_name(name)
            self._place(name, adapter)

    def start(self, name: str, *, rank: int | None = None, lora_alpha: float = 16.0, seed: int = 0) -> None:
        """Add a trainable LoRA adapter at its start: A random as that of a cascade of this seed, and B zero.

        Args:
            name: a new one.
            rank: up to `max_rank`, which is the default.
            lora_alpha: numerator of the scale `lora_alpha / rank`.
            seed: of A.

        Raises:
            SpecError: the name is taken, there is no room, or the rank is no number up to `max_rank`.
        """
        rank = self.max_rank if rank is None else rank
        if not is_integer(rank, 1) or rank > self.max_rank:
            raise SpecError(f"bank: the rank of {name!r} is {rank!r}; give one from 1 to {self.max_rank}")
        with self._lock:
            self._check_new_name(name)
            values = {}
            for site in self.sites:
                a, b = replace(site, options=replace(site.options, rank=rank)).factor_shapes
                values[site.weight, DOWN] = _padded(random_factor(seed, 1, DOWN, site.weight, a), site, DOWN)
                values[site.weight, UP] = _padded(torch.zeros(b), site, UP)
            self._occupy(name, values)
            self._train(name, values, lora_alpha / rank)

    def remove(self, name: str) -> None:
        """Remove an adapter. Calls that have begun with it end with it.

        Raises:
            StateError: there is no such adapter.
        """
        with self._lock:
            self._check_names([name])
            slots = dict(self._slots_by_name)
            self._slots.free.append(slots.pop(name))
            self._slots_by_name = slots
            trained = self._trained.pop(name, None)
            if trained is not None:
                for graph in self._graphs:
                    graph.known.pop(trained, None)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Return the factors of an adapter as trainable parameters, by the names of weight and factor.

        A frozen adapter is trained from then on: calls compute with these parameters, and gradients flow into them. An
        optimizer for each name trains several runs on one base at once.

        Raises:
            StateError: there is no such adapter.
        """
        with self._lock:
            self._check_names([name])
            if name not in self._trained:
                self._train(name, self._slots.of(self._slots_by_name[name]), 1.0)
            return {".".join(key): value for key, value in self._trained[name].parameters.items()}

    def pairs(self, name: str) -> dict[str, Factors]:
        """Return an adapter as factors by weight name, in fp64 on the host, with the scale in `b`: a source for `add`.

        Raises:
            StateError: there is no such adapter.
        """
        self._check_names([name])
        values, scale = self._factors(name)
        pairs = {}
        for site in self.sites:
            a, b = (values[site.weight, key].detach().cpu().double() for key in (DOWN, UP))
            pairs[site.weight] = (
                Factors(a.mT * scale, b.mT) if site.layout == "in_out" else Factors(b * scale, a.clone())
            )
        return pairs

    # ---- calls

    def __call__(self, *args: Any, adapter: str | Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Compute what the model computes with an adapter, or with one for each row of axis 0 of the batch.

        Rows have their own factors in one pass of the batch. Where a branch cannot do that (on a weight, or in stacked
        experts), the rows of each adapter are computed as a batch of their own.

        Args:
            args, kwargs: of the model.
            adapter: a name; a name or None for each row; None for the base.

        Raises:
            StateError: an unknown name, another number of rows, or rows that depend on each other.
            CaptureError: no front end can capture a new kind of call.
            Exception: what the model itself raises for these arguments.
        """
        return self._computed(args, kwargs, adapter)

    def generate(self, *args: Any, adapter: str | Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Generate as a model of transformers does, with an adapter, or with one for each row of the prompts.

        The model's Python runs here, with any cache, and its modules compute with the adapters. The model is unchanged.

        Args:
            args, kwargs: of the model's `generate`.
            adapter: as for a call.

        Raises:
            StateError: as of a call; or a weight is used otherwise than by its module.
            AttributeError: the model has no `generate`.
        """
        self._check_adapter(adapter)
        model: Any = self.model
        if adapter is None:
            return model.generate(*args, **kwargs)
        self._check_generates(mixed=not isinstance(adapter, str))
        if not isinstance(adapter, str):
            self._check_rows(adapter, row_count(leaves(args, kwargs)))
        computing: Any = self._hooked(*self._factors(adapter))
        return computing.generate(*args, **kwargs)

    def compile(self, **options: Any) -> None:
        """Compile the graphs, now and later, by torch.compile. Other adapters and mixes need no compilation.

        Args:
            options: of torch.compile.
        """
        self._compile = options
        for graph in self._graphs:
            graph.compile(options)

    def release(self) -> nn.Module:
        """Restore the flags of the model's parameters, and return the model. The bank must not be called any more."""
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        return self.model

    def __repr__(self) -> str:
        """Show names, sites and ranks."""
        return (
            f"AdapterBank({type(self.model).__name__}, {len(self.sites)} sites, rank {self.max_rank}, "
            f"adapters {named(self.names, 8) or 'none'})"
        )

    def _computed(self, args: Any, kwargs: Mapping[str, Any], adapter: Any) -> Any:
        self._check_adapter(adapter)
        if adapter is None and self._compile is None:
            return self.model(*args, **kwargs)
        call = self._compiler.calls.bind(tuple(args), kwargs)
        if adapter is not None and not isinstance(adapter, str):
            self._check_rows(adapter, row_count(call.leaves))
            if len(set(adapter)) == 1:
                return self._computed(args, kwargs, adapter[0])
        graph = self._graph(call)
        if adapter is None or isinstance(adapter, str):
            return graph(call, graph.tensors_of(self, adapter))
        layout = graph.layout(call)
        if layout is not None and not layout.independent:
            raise not_independent("a row of the output depends on other rows")
        if layout is not None and layout.mixed:
            return graph(call, graph.inputs_from(*self._factors(adapter)))
        if not graph.splits and not self.model.training:
            check_splits(self.model, call.args, call.kwargs, len(adapter))
            graph.splits = True
        return by_group(lambda name, args, kwargs: self._computed(args, kwargs, name), adapter, call.args, call.kwargs)

    def _factors(self, adapter: str | Sequence[str | None] | None) -> tuple[Mapping[Key, torch.Tensor], Any]:
        """Return the factors and scale of an adapter, or of one for each row: stacked, and a list of scales."""
        if adapter is None or isinstance(adapter, str):
            trained = self._trained.get(adapter) if adapter is not None else None
            return (
                (trained.parameters, trained.scale) if trained else (self._slots.of(self._slots_by_name[adapter]), 1.0)
            )
        if not any(name in self._trained for name in adapter):
            return self._slots.gather([self._slots_by_name[name] for name in adapter]), [1.0] * len(adapter)
        each = {name: self._factors(name) for name in dict.fromkeys(adapter)}
        keys = next(iter(each.values()))[0]
        stacked = {key: torch.stack([each[name][0][key] for name in adapter]) for key in keys}
        return stacked, [each[name][1] for name in adapter]

    def _hooked(self, tensors: Mapping[Key, torch.Tensor], scale: Any) -> nn.Module:
        """Return a copy of the model whose modules compute with factors, or with those of each row."""

        def factors(weight: str) -> Pair:
            up = tensors[weight, UP]
            return Pair(tensors[weight, DOWN], up, torch.tensor(scale, dtype=up.dtype, device=up.device))

        return hooked(self.model, self.sites, factors)

    def _check_generates(self, mixed: bool) -> None:
        """Refuse a model whose modules compute something else than its graph, or several adapters if it mixes rows."""
        call = self._example
        graph = self._graph(call)
        if not self._generates and not self.model.training:  # dropout would differ
            generator = torch.Generator().manual_seed(0)
            values = {
                key: (0.1 * torch.randn(zero.shape, generator=generator) * zero.shape[-1] ** -0.5).to(zero)
                for key, zero in self._slots.of(0).items()
            }
            with torch.no_grad():
                outputs = [module(*call.args, **call.kwargs) for module in (self._hooked(values, 1.0), self.model)]
                got, base = map(tensors_in, outputs)
                wanted = tensors_in(graph(call, graph.inputs_from(values, 1.0)))
            for one, two, three in zip(got, wanted, base, strict=True):
                near = 1e-3 if one.dtype.itemsize > 2 else 0.1  # of the change by the adapter, which rounding may take
                if (one.double() - two.double()).norm() > near * (two.double() - three.double()).norm():
                    raise StateError(
                        "bank: generate runs modules, and those of this model do not compute what its graph does: a "
                        "weight is used past its module. Compute tokens by calls of the bank",
                        code="not-available",
                    )
            self._generates = True
        if not mixed:
            return
        layout = graph.layout(call) if row_count(call.leaves) != 1 else None
        if layout is None:
            raise StateError(
                "bank: generate with an adapter for each row needs to know where the rows are. Give the bank example "
                "inputs of two rows or more that differ",
                code="not-available",
            )
        if not layout.mixed or any(place != FIRST_AXIS for place in layout.places.values()):
            raise not_independent("its modules get rows of several prompts in another order")

    def _check_rows(self, adapter: Sequence[str | None], count: int | None) -> None:
        if len(adapter) != count:
            raise StateError(
                f"bank: adapter names {len(adapter)} rows, and the batch has {count} (axis 0 of its first tensor). "
                "Give a name or None for each row",
                code="rows-differ",
            )

    # ---- graphs

    @property
    def _graphs(self) -> list[_Graph]:
        return [variant.module for variant in self._variants.all if isinstance(variant.module, _Graph)]

    def _graph(self, call: Call) -> _Graph:
        """Return the graph of a call."""
        variant = self._variants.find(call)
        if variant is None:
            grad = torch.is_grad_enabled()
            with PROCESS, self._lock, torch.inference_mode(False), torch.set_grad_enabled(grad):
                variant = self._variants.find(call) or self._captured(call)
        assert isinstance(variant.module, _Graph)
        return variant.module

    def _captured(self, call: Call) -> Variant:
        axes = self._variants.varying(call)
        made = self._compiler.make(self.model, self._decided, call.args, call.kwargs, axes)
        if not isinstance(made.variant.module, fx.GraphModule):
            raise CaptureError(
                f"bank: {type(self.model).__name__} has graph breaks, and a bank needs one whole graph; "
                f"{made.variant.module.why_not_whole(call.args, call.kwargs)}",  # type: ignore[attr-defined]
                code="no-whole-graph",
            )
        if not self._decided.plan.sites:  # later graphs bring no new sites
            targets = tuple(site.weight for site in made.plan.sites)
            plan = replace(made.plan, spec=replace(made.plan.spec, targets=targets))
            self._decided = Decided(plan, made.branches, made.refusals, made.unreached)
        lifted = AdapterInputs(self.max_rank)(made.variant.module).graph_module
        graph = _Graph(lifted, self.model)
        if self._compile is not None:
            graph.compile(self._compile)
        variant = replace(made.variant, module=graph)
        self._variants.add(call, variant, self.model.training)
        return variant

    # ---- checks, before anything is changed

    def _read(self, name: Any, source: Any) -> LowRankAdapter:
        if not isinstance(name, str) or not name:
            raise SpecError(f"bank: the name of an adapter is {name!r}; give a string")
        if isinstance(source, LowRankAdapter):
            return source
        if isinstance(source, Mapping):
            for weight, pair in source.items():
                if not isinstance(pair, Factors) or not all(
                    isinstance(each, torch.Tensor) for each in (pair.a, pair.b)
                ):
                    raise SpecError(
                        f"bank: {name!r} has {pair!r:.60} for {weight}; give lorasc_fx.branch.Factors(b, a) of tensors"
                    )
            return LowRankAdapter(repr(name), dict(source), {})
        adapter = low_rank_pairs(source, self.model, name=repr(name), call="bank")
        if adapter.base:
            adapter.check_base(self._digests, "bank")
        return adapter

    @cached_property
    def _digests(self) -> dict[str, str]:
        return fingerprints(dict(self.model.named_parameters()))

    def _check_new_name(self, name: str) -> None:
        if name in self._slots_by_name:
            raise StateError(
                f"bank: there is an adapter {name!r} already; remove it before, or give another name",
                code="unknown-name",
            )

    def _place(self, name: str, adapter: LowRankAdapter) -> None:
        sites = {site.weight: site for site in self.sites}
        if foreign := [weight for weight in adapter.pairs if weight not in sites]:
            refused = {refusal.weight: str(refusal) for refusal in self._decided.refusals}
            why = refused.get(foreign[0], f"{foreign[0]} is not one of its weights")
            raise SpecError(
                f"bank: {name!r} changes {named(foreign)}, which the bank does not adapt: {why}. Give the bank targets "
                "that include it",
                code="sites-differ",
            )
        values: dict[Key, torch.Tensor] = {}
        for site in self.sites:
            if (pair := adapter.pairs.get(site.weight)) is not None:
                _check_shapes(name, site, pair)
            tensors, cut = adapter.tensors(site, self.max_rank)
            if cut.error > _LOSSLESS * cut.norm:
                raise SpecError(
                    f"bank: {name!r} has rank {cut.before} at {site.weight}, and max_rank is {self.max_rank}: without "
                    f"the rest {cut.relative:.2%} of its change would be missing. Give the bank a larger max_rank",
                    code="rank-too-large",
                )
            values |= {(site.weight, key): tensors[key] for key in (DOWN, UP)}
        self._occupy(name, values)

    def _occupy(self, name: str, values: Mapping[Key, torch.Tensor]) -> None:
        """Write an adapter into a free slot, and make its name known."""
        if not self._slots.free:
            raise _full(self.capacity)
        self._slots.write(self._slots.free[0], values)
        self._slots_by_name = {**self._slots_by_name, name: self._slots.free.pop(0)}

    def _train(self, name: str, values: Mapping[Key, torch.Tensor], scale: float) -> None:
        weights = named_weights(self.model).parameters
        parameters = {
            key: nn.Parameter(value.detach().to(weights[key[0]].device, _trained_dtype(weights[key[0]]), copy=True))
            for key, value in values.items()
        }
        self._trained[name] = _Trained(parameters, scale)

    def _check_adapter(self, adapter: Any) -> None:
        names = [adapter] if adapter is None or isinstance(adapter, str) else adapter
        if not isinstance(names, (list, tuple)):
            raise StateError(
                f"bank: adapter is a {type(adapter).__name__}; give a name, None, or a list with one for each row",
                code="unknown-name",
            )
        self._check_names(names)

    def _check_names(self, names: Sequence[Any]) -> None:
        for name in names:
            if name not in self._slots_by_name:
                known = self.names
                raise StateError(
                    f"bank: there is no adapter {name!r}{nearest(str(name), known)}; the adapters are "
                    f"{named(map(repr, known), 8) or 'none'}",
                    code="unknown-name",
                )


@dataclass(frozen=True, eq=False)
class _Trained:
    """The factors of an adapter that is trained, padded, and its scale."""

    parameters: Mapping[Key, nn.Parameter]
    scale: float


class _Graph:
    """A lifted graph, and how it is called."""

    def __init__(self, module: fx.GraphModule, model: nn.Module) -> None:
        self.module, self.model = module, model
        self.inputs = adapter_inputs(module)
        self.known: dict[int | _Trained, list[torch.Tensor]] = {}  # inputs by slot, or of a trained adapter
        self._layout: Layout | None = None
        self.splits = False  # whether parts of a batch were compared with it
        self._function = as_function(module)
        self._compiled: Callable[..., Any] | None = None
        self._options: Mapping[str, Any] = {}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._others = placeholders[: len(placeholders) - len(self.inputs)]
        self._flat = takes_leaves(module.graph)

    def compile(self, options: Mapping[str, Any]) -> None:
        """Compile the graph at its next call."""
        self._options, self._compiled = options, torch.compile(self.module, **options)

    def __call__(self, call: Call, tensors: Sequence[torch.Tensor]) -> Any:
        """Compute a call with the tensors of an adapter, in the order of the inputs."""
        if self._compiled is not None or (self._flat and len(call.leaves) != len(self._others)):
            names = [each.name for each in self.inputs]
            function = self._compiled if self._compiled is not None else self.module
            return function(*call.args, **call.kwargs, **dict(zip(names, tensors, strict=True)))
        return self._function(*self._values(call), *tensors)

    def _values(self, call: Call) -> list[Any]:
        """Return the values of the other placeholders, in order."""
        if self._flat:
            return list(call.leaves)
        given = [str(node.target) for node in self._others][: len(call.args)]
        values = {**dict(zip(given, call.args, strict=True)), **call.kwargs}
        return [values[str(node.target)] if node.target in values else node.args[0] for node in self._others]

    def layout(self, call: Call) -> Layout | None:
        """Return where the rows of a batch are, or None if this batch does not show it."""
        if self._layout is None and (count := row_count(call.leaves)) != 1:
            zeros = [
                torch.zeros(each.shape, dtype=each.dtype, device=self._device(each.weight)) for each in self.inputs
            ]
            assert count is not None
            found = layout_of(self.module, self.model, self._values(call), zeros)
            if found is None:
                return None
            self._layout = found
            editor = GraphEditor(self.module, "bank")
            for node in editor.nodes:
                if found.places.get(node.name, FIRST_AXIS) != FIRST_AXIS:
                    editor.set_arguments(node, node.args, {**node.kwargs, "rows": tuple(found.places[node.name])})
            if editor.modified:
                self.module = editor.finish()
                self._function = as_function(self.module)
                if self._compiled is not None:
                    self.compile(self._options)
        return self._layout

    def _device(self, weight: str) -> torch.device:
        return self.model.get_parameter(weight).device

    def tensors_of(self, bank: AdapterBank, name: str | None) -> list[torch.Tensor]:
        """Return the tensors of one adapter, in the order of the inputs."""
        key = bank._trained[name] if name in bank._trained else bank._slots_by_name[name]
        if key not in self.known:
            self.known[key] = self.inputs_from(*bank._factors(name))
        return self.known[key]

    def inputs_from(self, factors: Mapping[Key, torch.Tensor], scale: Any) -> list[torch.Tensor]:
        """Return factors and scales in the order of the inputs."""
        scales: dict[Any, torch.Tensor] = {}
        tensors = []
        for each in self.inputs:
            if each.tensor == SCALE:
                kind = each.dtype, self._device(each.weight)
                if kind not in scales:
                    scales[kind] = torch.tensor(scale, dtype=kind[0], device=kind[1])
                tensors.append(scales[kind])
            else:
                tensors.append(factors[each.weight, each.tensor])
        return tensors


def _full(capacity: int) -> SpecError:
    return SpecError(
        f"bank: there is room for {capacity} adapters. Remove one, or give the bank a larger capacity", code="bank-full"
    )


def _trained_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _padded(value: torch.Tensor, site: Site, name: str) -> torch.Tensor:
    """Return a factor padded with zeros to the rank of the bank."""
    return pad_to(value, site.parameter_shapes[name])


def _check_shapes(name: str, site: Site, pair: Factors) -> None:
    """Raise SpecError unless a pair fits its weight as stored."""
    lead = 1 if site.experts else 0
    stack, rows, columns = site.shape[:lead], site.shape[lead], torch.Size(site.shape[lead + 1 :]).numel()
    rank = pair.a.shape[-2] if pair.a.dim() > 1 else 0
    wanted = ((*stack, rows, rank), (*stack, rank, columns))
    if (tuple(pair.b.shape), tuple(pair.a.shape)) != wanted:
        raise SpecError(
            f"bank: {name!r} has b {tuple(pair.b.shape)} and a {tuple(pair.a.shape)} for {site.weight}, whose shape is "
            f"{tuple(site.shape)}; give b {wanted[0]} and a {wanted[1]}",
            code="adapter-does-not-fit",
        )
