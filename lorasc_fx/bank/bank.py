"""`AdapterBank`: several adapters on one base model, chosen for each call or for each row of a batch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, NoReturn

import torch
from torch import fx, nn

from lorasc_fx.adapt.start import check_new, serve, stop_serving
from lorasc_fx.bank.adapters import Adapters, bank_full, check_name, checked_factors
from lorasc_fx.bank.graph import BankGraph
from lorasc_fx.bank.hooked import hooked
from lorasc_fx.bank.pair import pair_plan
from lorasc_fx.bank.rows import (
    by_group,
    check_batch_norm,
    check_splits,
    not_independent,
    row_count,
    segments,
    tensors_in,
)
from lorasc_fx.bank.slots import Key
from lorasc_fx.branch import Decided, Factors
from lorasc_fx.branch.lora import DOWN, UP
from lorasc_fx.branch.placements import FIRST_AXIS, GivenFactors
from lorasc_fx.capture import open_model
from lorasc_fx.check.observe import ARGUMENT
from lorasc_fx.compile import Call, Compiler, Variant, Variants
from lorasc_fx.errors import CaptureError, SpecError, StateError, named
from lorasc_fx.facade import Cascade
from lorasc_fx.passes import AdapterInputs
from lorasc_fx.peft.adapter_pairs import LowRankAdapter, low_rank_pairs
from lorasc_fx.plan import Site
from lorasc_fx.signature import Calls, bind_inputs, leaves, signature_of
from lorasc_fx.util.decode import is_integer
from lorasc_fx.util.fingerprint import checksums, fingerprints
from lorasc_fx.util.undo import PROCESS

Source = Cascade | str | PathLike[str] | Mapping[str, Factors]
"""An adapter: a cascade, the folder of a checkpoint or of a LoRA adapter of peft, or factors by weight name."""


class AdapterBank:
    """Several adapters on one base model. Each call names one adapter, or one for each row of the batch.

    An adapter has factors `b` [out, r] and `a` [r, in] for each changed weight [out, in], and computes with
    `W0 + b @ a`. The model is captured once for each kind of call, as by `adapt`. The factors are inputs of the graph,
    so the weights are never written, and changing the adapter needs no new capture. While the bank is in use, the
    parameters of the model do not require gradients, and the model cannot be adapted. `release` restores the flags.

        bank = lx.AdapterBank(model, {"a": "runs/a", "b": cascade}, args=(x,))
        bank(x, adapter="a")
        bank(x, adapter=["a", "b", None])  # of a batch of three rows

    Args:
        model: the base model, which is not adapted yet.
        adapters: adapters by name. Each is a cascade on the same base, the folder of a checkpoint or of a LoRA adapter
            of peft, or factors by weight name.
        args, kwargs: example inputs, as for `adapt`, with the rows of the batch on axis 0.
        max_rank: largest rank r of an adapter. The default is the largest rank in `adapters`, or 8 without any.
        capacity: number of adapters to allocate memory for. The default is 8, or the number of `adapters` if larger.
        targets: globs on the names of weights that adapters may change. The default is all weights that `adapters`
            change.
        frontend: as for `adapt`.

    Raises:
        SpecError: an adapter has changes other than low-rank factors, or its factors contain inf or nan, or its rank
            is too large, or there are no targets.
        CheckpointError: an adapter was trained on another base, or cannot be read.
        CaptureError: the model has no graph, or cannot be captured.
        StateError: the model is adapted already.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Source] | None = None,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
        *,
        max_rank: int | None = None,
        capacity: int | None = None,
        targets: Sequence[str] | None = None,
        frontend: str = "auto",
    ) -> None:
        self.model = open_model(model)
        check_new(self.model, in_bank=True)
        for option, value in (("max_rank", max_rank), ("capacity", capacity)):
            if value is not None and not is_integer(value, 1):
                raise SpecError(f"bank: {option} is {value!r}; give an integer of 1 or more")
        if isinstance(targets, str):
            raise SpecError(f"bank: targets is {targets!r}; give a tuple: targets=({targets!r},)")
        self._checksums: dict[str, int] = {}  # of the parameters when their fingerprints were computed
        self._digests: dict[str, str] = {}
        # Step 1: read the adapters, which determine the defaults of the other arguments.
        initial = {name: self._read(name, source) for name, source in (adapters or {}).items()}
        changed = dict.fromkeys(weight for adapter in initial.values() for weight in adapter.pairs)
        if targets is None and not changed:
            raise SpecError(
                "bank: no adapter changes a weight. Give adapters, or targets=... with the weights of later adapters"
            )
        ranks = [pair.rank for adapter in initial.values() for pair in adapter.pairs.values()]
        self.max_rank = max_rank if max_rank is not None else max(ranks, default=8)
        self.capacity = capacity if capacity is not None else max(8, len(initial))
        if len(initial) > self.capacity:
            raise bank_full(self.capacity)
        # Step 2: capture the model for the example inputs, then store the adapters.
        self._compiler = Compiler(
            frontend, Calls(signature_of(self.model), one_key=isinstance(self.model, fx.GraphModule))
        )
        bound = bind_inputs(self.model, args, kwargs if kwargs is not None else {})
        plan = pair_plan(tuple(targets if targets is not None else changed), self.max_rank)
        self._decided = Decided(plan, {}, (), ())
        self._variants, self._lock = Variants(), threading.RLock()
        self._parameters = list(self.model.parameters())
        self._compile: dict[str, Any] | None = None
        serve(self._parameters, self)
        try:
            self._example, self._generates = self._compiler.calls.bind(*bound), False
            self._graph(self._example)
            self._adapters = Adapters(self.model, self._decided, self.max_rank, self.capacity)
            with torch.inference_mode(False):
                for name, adapter in initial.items():
                    self._adapters.place(name, adapter)
        except BaseException:
            self.release()
            raise

    # ---- adapters

    @property
    def sites(self) -> tuple[Site, ...]:
        """The weights that adapters may change, in the order of the model's parameters."""
        return self._decided.plan.sites

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return self._adapters.names

    def add(self, name: str, source: Source) -> None:
        """Add an adapter. Other threads may call the bank meanwhile. If anything raises, nothing is changed.

        Args:
            name: name of the new adapter.
            source: as in the constructor.

        Raises:
            StateError: there is an adapter of this name.
            SpecError: as in the constructor, or the name is not a string, or the bank is full. A removed adapter counts
                until the end of the calls that use it.
            CheckpointError: as in the constructor.
        """
        self._adapters.check_new(name)
        adapter = self._read(name, source)  # without the lock, because reading a cascade takes its lock
        with self._lock, torch.inference_mode(False):
            self._adapters.check_new(name)
            self._adapters.place(name, adapter)

    def start(self, name: str, *, rank: int | None = None, lora_alpha: float = 16.0, seed: int = 0) -> None:
        """Add a trainable LoRA adapter with initial values: random A [r, in] and zero B [out, r].

        A has the same values as in a cascade with this seed.

        Args:
            name: name of the new adapter.
            rank: rank r, at most `max_rank`. The default is `max_rank`.
            lora_alpha: numerator of the scale `lora_alpha / rank`.
            seed: random seed for A.

        Raises:
            StateError: there is an adapter of this name.
            SpecError: the name, the rank, `lora_alpha` or the seed is invalid, or the bank is full.
        """
        with self._lock, torch.inference_mode(False):
            self._adapters.check_new(name)
            self._adapters.start(name, self.max_rank if rank is None else rank, lora_alpha, seed)

    def remove(self, name: str) -> None:
        """Remove an adapter. Calls that have already started with it are completed with it.

        The memory of the adapter can be used again after these calls.

        Raises:
            SpecError: the name is not a string.
            StateError: there is no adapter of this name.
        """
        with self._lock:
            check_name(name)
            self._adapters.check_names([name])
            trained = self._adapters.remove(name)
            if trained is not None:
                for graph in self._graphs:
                    graph.cached.pop(trained, None)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Return the factors of an adapter as trainable parameters, named `WEIGHT.lora_A` and `WEIGHT.lora_B`.

        Later calls compute with these parameters and give them gradients, so a frozen adapter becomes a trained one.
        With one optimizer per adapter, several runs train on one base at the same time.

        Raises:
            SpecError: the name is not a string.
            StateError: there is no adapter of this name.
        """
        with self._lock, torch.inference_mode(False):
            check_name(name)
            self._adapters.check_names([name])
            return {".".join(key): value for key, value in self._adapters.parameters_of(name).items()}

    def pairs(self, name: str) -> dict[str, Factors]:
        """Return an adapter as factors by weight name, which `add` accepts.

        They are in fp64 on the host, for the weight in its stored layout. The scale is folded into `b`.

        Raises:
            SpecError: the name is not a string.
            StateError: there is no adapter of this name.
        """
        check_name(name)
        self._adapters.check_names([name])
        return self._adapters.pairs(name)

    # ---- calls

    def __call__(self, *args: object, adapter: str | Sequence[str | None] | None = None, **kwargs: object) -> Any:
        """Run the model with an adapter, or with one adapter for each row of the batch.

        A batch with several adapters runs in one pass, which is fastest if the rows are sorted by adapter. If a branch
        does not support that (a branch on a weight, or stacked experts), the rows of each adapter run as a separate
        batch.

        Args:
            args, kwargs: arguments of the model.
            adapter: the name of an adapter; a list with a name or None for each row of axis 0; or None for the base.

        Returns:
            The output of the model.

        Raises:
            StateError: a name is unknown, the list does not have one entry for each row, or outputs depend on several
                rows.
            CaptureError: no front end can capture a new kind of call.
            Exception: whatever the model itself raises for these arguments.
        """
        with self._using(adapter) as adapters:
            return self._computed(args, kwargs, adapter, adapters)

    def generate(self, *args: object, adapter: str | Sequence[str | None] | None = None, **kwargs: object) -> Any:
        """Run `generate` of a transformers model with an adapter, or with one adapter for each prompt.

        This runs the Python code of the model, with any cache. Hooks on a copy of its modules add the adapters, and the
        model is not changed.

        Args:
            args, kwargs: arguments of the model's `generate`.
            adapter: as for a call.

        Raises:
            StateError: as for a call, or the model uses a weight in another way than by calling its module.
            AttributeError: the model has no `generate`.
        """
        model: Any = self.model
        if adapter is None:
            return model.generate(*args, **kwargs)
        with self._using(adapter) as adapters:
            self._check_generates(mixed=not isinstance(adapter, str))
            if not isinstance(adapter, str):
                self._check_rows(adapter, row_count(leaves(args, kwargs)))
                adapter = segments(adapter)
            hooked_model: Any = self._hooked(*adapters.factors(adapter))
            return hooked_model.generate(*args, **kwargs)

    def compile(self, **options: object) -> None:
        """Compile all graphs by torch.compile, the present ones and those captured later.

        A graph is compiled once for calls with one adapter, and once for calls with an adapter for each row. Other
        adapters do not compile again. Calls of another kind, such as another batch size or train mode, may.

        Args:
            options: options of torch.compile.
        """
        self._compile = options
        for graph in self._graphs:
            graph.compile(options)

    def release(self) -> nn.Module:
        """Restore the requires_grad flags of the model's parameters, and return the model. Do not use the bank then.

        If several banks use the model, the last `release` restores the flags.
        """
        stop_serving(self._parameters, self)
        return self.model

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickles.

        Raises:
            StateError: always.
        """
        raise StateError(
            "bank: a bank cannot be copied or pickled, because its graphs belong to this model. Build another bank for "
            "a copy of the model, from the same adapters",
            code="not-serializable",
        )

    def __repr__(self) -> str:
        """Return a summary: the model, the number of sites, the rank and the names of adapters."""
        return (
            f"AdapterBank({type(self.model).__name__}, {len(self.sites)} sites, rank {self.max_rank}, "
            f"adapters {named(self.names, 8) or 'none'})"
        )

    def _computed(self, args: Any, kwargs: Mapping[str, Any], adapter: Any, adapters: Adapters) -> Any:
        """Run a call with some of these adapters; see `__call__`."""
        if adapter is None and self._compile is None:
            return self.model(*args, **kwargs)
        call = self._compiler.calls.bind(tuple(args), kwargs)
        if adapter is not None and not isinstance(adapter, str):
            self._check_rows(adapter, row_count(call.leaves))
            if len(set(adapter)) < 2:  # one adapter, or a batch without rows
                return self._computed(args, kwargs, adapter[0] if adapter else None, adapters)
        graph = self._graph(call)
        if adapter is None or isinstance(adapter, str):
            return graph(call, graph.tensors_of(adapters, adapter))
        # Several adapters: run them in one pass if all branches support it, otherwise one batch for each adapter.
        check_batch_norm(self.model)
        layout = graph.layout(call)
        if layout.mixed:
            # A compiled graph has one shape of factors for all batches, so that other segments do not compile again.
            shared = layout.contiguous and self._compile is None
            return graph(call, graph.tensors_from(*adapters.factors(segments(adapter) if shared else adapter)))
        check_splits(self.model, call.args, call.kwargs, len(adapter), graph.splits)
        return by_group(partial(self._group, adapters), adapter, call.args, call.kwargs)

    def _group(self, adapters: Adapters, name: str | None, args: object, kwargs: Mapping[str, object]) -> Any:
        """Run the rows of one adapter in a batch with several adapters."""
        return self._computed(args, kwargs, name, adapters)

    def _hooked(self, tensors: Mapping[Key, torch.Tensor], scale: object) -> nn.Module:
        """Return a copy of the model whose modules add these factors, as returned by `Adapters.factors`."""

        def factors(weight: str) -> GivenFactors:
            up = tensors[weight, UP]
            return GivenFactors(tensors[weight, DOWN], up, torch.tensor(scale, dtype=up.dtype, device=up.device))

        return hooked(self.model, self.sites, factors)

    def _check_generates(self, mixed: bool) -> None:
        """Raise StateError if `generate` would not compute correctly with hooks.

        A hook misses a weight that the model uses without calling its module. So the hooked model is compared once with
        the graph, for the example inputs and a random adapter. For several adapters (`mixed`), the rows of the batch
        must be on axis 0 of the input of each module.
        """
        call = self._example
        graph = self._graph(call)
        if not self._generates and not self.model.training:  # in train mode dropout would make the outputs differ
            values = {key: both[0] for key, both in graph.random_factors().items()}
            with torch.no_grad():
                hooked_outputs = tensors_in(self._hooked(values, 1.0)(*call.args, **call.kwargs))
                base_outputs = tensors_in(self.model(*call.args, **call.kwargs))
                graph_outputs = tensors_in(graph(call, graph.tensors_from(values, 1.0)))
            for output, reference, base in zip(hooked_outputs, graph_outputs, base_outputs, strict=True):
                # Rounding errors are small relative to the change that the adapter makes.
                tolerance = 1e-3 if output.dtype.itemsize > 2 else 0.1
                change = (reference.double() - base.double()).norm()
                if (output.double() - reference.double()).norm() > tolerance * change:
                    raise StateError(
                        "bank: generate adds adapters by hooks on modules, but with hooks this model computes "
                        "something else than its graph: a weight is used past its module. Generate tokens by calls of "
                        "the bank",
                        code="not-available",
                    )
            self._generates = True
        if not mixed:
            return
        if row_count(call.leaves) == 1:
            raise StateError(
                "bank: generate with an adapter for each row must know where the rows are in the model. Build the bank "
                "with example inputs of two or more rows",
                code="not-available",
            )
        layout = graph.layout(call)
        if not layout.mixed or any(rows != FIRST_AXIS for rows in layout.places.values()):
            raise not_independent("its modules get rows of several prompts in another order")

    def _check_rows(self, adapter: Sequence[str | None], count: int | None) -> None:
        """Raise StateError if the list of adapters does not have one entry for each of `count` rows."""
        if len(adapter) != count:
            raise StateError(
                f"bank: adapter names {len(adapter)} rows, and the batch has {count} (axis 0 of its first tensor). "
                "Give a list with a name or None for each row",
                code="rows-differ",
            )

    # ---- graphs

    @property
    def _graphs(self) -> list[BankGraph]:
        """All captured graphs."""
        return [variant.module for variant in self._variants.all if isinstance(variant.module, BankGraph)]

    def _graph(self, call: Call) -> BankGraph:
        """Return the graph of a call, captured if necessary."""
        variant = self._variants.find(call)
        if variant is None:
            grad = torch.is_grad_enabled()  # read before `inference_mode(False)`, which enables gradients
            with PROCESS, self._lock, torch.inference_mode(False), torch.set_grad_enabled(grad):
                variant = self._variants.find(call) or self._captured(call)
        assert isinstance(variant.module, BankGraph)
        return variant.module

    def _captured(self, call: Call) -> Variant:
        """Capture the graph of a call and add it to the cache."""
        axes = self._variants.varying(call)
        result = self._compiler.make(self.model, self._decided, call.args, call.kwargs, axes)
        if not isinstance(result.variant.module, fx.GraphModule):
            reason = "".join(reason for _, reason in result.refused_frontends) or "it runs eagerly"
            cache = ". It writes into an argument, such as a cache. To decode with a cache, call bank.generate"
            raise CaptureError(
                f"bank: {type(self.model).__name__} has no graph, and a bank needs one: {reason}"
                f"{cache if ARGUMENT in reason else ''}",
                code="no-graph",
            )
        if not self._decided.plan.sites:  # the first graph fixes the sites, because the slots have their shapes
            targets = tuple(site.weight for site in result.plan.sites)
            plan = replace(result.plan, spec=replace(result.plan.spec, targets=targets))
            self._decided = Decided(plan, result.branches, result.refusals, result.unreached)
        lifted = AdapterInputs(self.max_rank)(result.variant.module).graph_module
        graph = BankGraph(lifted, self.model)
        if self._compile is not None:
            graph.compile(self._compile)
        variant = replace(result.variant, module=graph)
        self._variants.add(call, variant, self.model.training)
        return variant

    # ---- arguments

    def _read(self, name: Any, source: Any) -> LowRankAdapter:
        """Read an adapter, and check that it was trained on this base.

        Raises:
            SpecError: the name is not a string, or the source is not an adapter with low-rank factors.
            CheckpointError: it was trained on another base, or cannot be read.
        """
        check_name(name)
        if isinstance(source, LowRankAdapter):
            return source
        if isinstance(source, Mapping):
            pairs = {weight: checked_factors(name, weight, pair) for weight, pair in source.items()}
            return LowRankAdapter(repr(name), pairs, {})
        adapter = low_rank_pairs(source, self.model, name=repr(name), call="bank")
        if adapter.base:
            adapter.check_base(self._fingerprints(), "bank")
        return adapter

    def _fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of the base by parameter name.

        They are cached. Checksums, which are faster, show which parameters have been written since.
        """
        parameters = dict(self.model.named_parameters())
        current = checksums(parameters)
        changed = {name: value for name, value in parameters.items() if self._checksums.get(name) != current[name]}
        self._digests = {name: self._digests[name] for name in current.keys() - changed.keys()} | fingerprints(changed)
        self._checksums = current
        return self._digests

    def _using(self, adapter: object) -> AbstractContextManager[Adapters]:
        """Context manager: check the argument `adapter` of a call, and keep its adapters until the end of the call.

        Raises:
            StateError: it has another type or an unknown name, or the model was converted to another dtype.
        """
        names = [adapter] if adapter is None or isinstance(adapter, str) else adapter
        if not isinstance(names, (list, tuple)):
            raise StateError(
                f"bank: adapter is a {type(adapter).__name__}. Give a name, None, or a list with one of these for each "
                "row",
                code="unknown-name",
            )
        self._adapters.check_names(names)
        if adapter is not None:
            self._adapters.check_dtypes()
        return self._adapters.using(dict.fromkeys([None, *names]))
