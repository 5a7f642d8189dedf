"""`AdapterBank`: several adapters on one base model, chosen for each call or for each row of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any, NoReturn

import torch
from torch import fx, nn

from lorasc_fx.adapt import check_new, serve, stop_serving
from lorasc_fx.bank.adapters import Adapters, Key, Stored, checked_factors
from lorasc_fx.bank.graph import BankGraph
from lorasc_fx.bank.hooked import hooked
from lorasc_fx.bank.rows import check_batch_norm, row_count, segments, tensors_in
from lorasc_fx.branch import Decided, Factors
from lorasc_fx.branch.lora import DOWN, UP
from lorasc_fx.branch.placements import GivenFactors
from lorasc_fx.capture import open_model
from lorasc_fx.check.observe import ARGUMENT
from lorasc_fx.compile import Call, Compiler, Variant, Variants
from lorasc_fx.errors import CaptureError, SpecError, StateError, named
from lorasc_fx.facade import Cascade
from lorasc_fx.passes import AdapterInputs
from lorasc_fx.peft.adapter_pairs import LowRankAdapter, low_rank_pairs
from lorasc_fx.plan import Plan, Site
from lorasc_fx.signature import Calls, bind_inputs, leaves, signature_of
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.decode import is_integer
from lorasc_fx.util.fingerprint import fingerprints
from lorasc_fx.util.undo import PROCESS

Source = Cascade | str | PathLike[str] | Mapping[str, Factors]
"""An adapter: a cascade, the folder of a checkpoint or of a LoRA adapter of peft, or factors by weight name."""


class AdapterBank:
    """Several adapters on one base model. Each call names one adapter, or one for each row of the batch.

    An adapter has factors `b` [out, r] and `a` [r, in] for each changed weight [out, in], and computes with
    `W0 + b @ a`. The model is captured once for each kind of call, as by `adapt`. The factors are inputs of the graph,
    so the weights are never written, and changing the adapter needs no new capture. Until `release`, the parameters of
    the model have requires_grad=False, and the model cannot be adapted.

        bank = lx.AdapterBank(model, {"a": "runs/a", "b": cascade}, args=(x,))
        bank(x, adapter="a")
        bank(x, adapter=["a", "b", None])  # of a batch of three rows

    Args:
        model: the base model, which is not adapted yet.
        adapters: adapters by name. Each is a cascade on the same base, the folder of a checkpoint or of a LoRA adapter
            of peft, or factors by weight name.
        args, kwargs: example inputs, as for `adapt`, with the rows of the batch on axis 0.
        max_rank: largest rank r of an adapter. The default is the largest rank in `adapters`, or 8 without any.
        targets: the weights that adapters may change, as in `CascadeSpec`. The default is all weights that `adapters`
            change.
        frontend: as for `adapt`.

    Raises:
        SpecError: low-rank factors cannot express an adapter, it has factors with inf or nan, or its rank is too large.
            Or there are no targets.
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
        targets: Sequence[str] | None = None,
        frontend: str = "auto",
    ) -> None:
        self.model = open_model(model)
        check_new(self.model, in_bank=True)
        if max_rank is not None and not is_integer(max_rank, 1):
            raise SpecError(f"bank: max_rank is {max_rank!r}; give an integer of 1 or more")
        if isinstance(targets, str):
            raise SpecError(f"bank: targets is {targets!r}; give a tuple: targets=({targets!r},)")
        # Step 1: read the adapters, which determine the defaults of the other arguments.
        initial = {name: self._read(name, source) for name, source in (adapters or {}).items()}
        changed = dict.fromkeys(weight for adapter in initial.values() for weight in adapter.pairs)
        if targets is None and not changed:
            raise SpecError(
                "bank: no adapter changes a weight. Give adapters, or targets=... with the weights of later adapters"
            )
        ranks = [pair.rank for adapter in initial.values() for pair in adapter.pairs.values()]
        self.max_rank = max_rank if max_rank is not None else max(ranks, default=8)
        # Step 2: capture the model for the example inputs, then store the adapters.
        self._compiler = Compiler(
            frontend, Calls(signature_of(self.model), one_key=isinstance(self.model, fx.GraphModule))
        )
        bound = bind_inputs(self.model, args, kwargs if kwargs is not None else {})
        patterns = tuple(targets if targets is not None else changed)
        # The branches of this spec give the graphs their structure. Their values are not used: factors are inputs.
        spec = CascadeSpec(targets=patterns, rank=self.max_rank, lora_alpha=self.max_rank, placement="beside")
        self._decided = Decided(Plan(spec), {}, (), ())
        self._variants = Variants()
        self._parameters = list(self.model.parameters())
        self._compile: dict[str, Any] | None = None
        serve(self._parameters, self)
        try:
            self._example, self._generates = self._compiler.calls.bind(*bound), False
            self._graph(self._example)
            with torch.inference_mode(False):
                self._adapters = Adapters(self.model, self._decided, self.max_rank)
                for name, adapter in initial.items():
                    self._adapters.add(name, adapter)
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
        """Add an adapter. Other threads may call the bank meanwhile. If this raises, the bank is unchanged.

        Args:
            name: name of the new adapter.
            source: as in the constructor.

        Raises:
            StateError: there is an adapter of this name.
            SpecError: as in the constructor, or the name is not a string.
            CheckpointError: as in the constructor.
        """
        adapter = self._read(name, source)  # without the lock, because reading a cascade takes its lock
        with PROCESS, torch.inference_mode(False):
            self._check_new(name)
            self._adapters.add(name, adapter)

    def start(self, name: str, *, rank: int | None = None, lora_alpha: float = 8.0, seed: int = 0) -> None:
        """Add a trainable LoRA adapter with initial values: random A [r, in] and zero B [out, r].

        A has the same values as in a cascade with this seed.

        Args:
            name: name of the new adapter.
            rank: rank r, at most `max_rank`. The default is `max_rank`.
            lora_alpha: numerator of the scale `lora_alpha / rank`.
            seed: random seed for A.

        Raises:
            StateError: there is an adapter of this name.
            SpecError: the name, the rank, `lora_alpha` or the seed is invalid.
        """
        with PROCESS, torch.inference_mode(False):
            self._check_new(name)
            self._adapters.start(name, self.max_rank if rank is None else rank, lora_alpha, seed)

    def remove(self, name: str) -> None:
        """Remove an adapter. Calls that have already started with it are completed with it.

        Raises:
            StateError: there is no adapter of this name.
        """
        with PROCESS:
            self._adapters.remove(name)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Return the factors of an adapter as trainable parameters, named `WEIGHT.lora_A` and `WEIGHT.lora_B`.

        Later calls compute with these parameters and give them gradients, so a frozen adapter becomes a trained one.
        With one optimizer per adapter, several runs train on one base at the same time.

        Raises:
            StateError: there is no adapter of this name.
        """
        with PROCESS, torch.inference_mode(False):
            return {".".join(key): value for key, value in self._adapters.parameters_of(name).items()}

    def pairs(self, name: str) -> dict[str, Factors]:
        """Return an adapter as factors by weight name, which `add` accepts.

        The factors are in fp64 on the CPU, and fit the stored layout of the weight. The scale is folded into `b`.

        Raises:
            StateError: there is no adapter of this name.
        """
        return self._adapters.pairs(name)

    # ---- calls

    def __call__(self, *args: object, adapter: str | Sequence[str | None] | None = None, **kwargs: object) -> Any:
        """Run the model with an adapter, or with one adapter for each row of the batch.

        A batch with several adapters runs in one pass, which is fastest if the rows are sorted by adapter. The rows
        must be on the first axis of the input of each adapted layer. Stacked matrices, weights that are read outside of
        a product, and sequence-first layers, such as `torch.nn.MultiheadAttention`, take one adapter per call.

        Args:
            args, kwargs: arguments of the model.
            adapter: the name of an adapter; a list with a name or None for each row of axis 0; or None for the base.

        Returns:
            The output of the model.

        Raises:
            StateError: a name is unknown, the list does not have one entry for each row, or the rows of this model
                cannot have several adapters.
            CaptureError: no front end can capture a new kind of call.
            Exception: whatever the model itself raises for these arguments.
        """
        chosen = self._adapters.chosen(adapter)
        call = self._compiler.calls.bind(tuple(args), kwargs)
        if isinstance(chosen, list):
            _check_count(chosen, row_count(call.leaves))
            if len(set(chosen)) < 2:  # one adapter, or a batch without rows
                chosen = chosen[0] if chosen else self._adapters.base
        if chosen is self._adapters.base and self._compile is None:
            return self.model(*args, **kwargs)
        graph = self._graph(call)
        if isinstance(chosen, list):
            check_batch_norm(self.model)
            graph.check_independent(call)
            if self._compile is None:  # a compiled graph always gets one pair per row: other shapes would compile again
                return graph(call, graph.tensors_from(*self._adapters.factors(segments(chosen))))
        return graph(call, graph.tensors_from(*self._adapters.factors(chosen)))

    def generate(self, *args: object, adapter: str | Sequence[str | None] | None = None, **kwargs: object) -> Any:
        """Run `generate` of a transformers model with an adapter, or with one adapter for each prompt.

        This runs the Python code of the model, with any cache. Hooks on a copy of the model add the adapters, so the
        model is not changed.

        Args:
            args, kwargs: arguments of the model's `generate`.
            adapter: as for a call.

        Raises:
            StateError: as for a call, or the model uses a weight in another way than by calling its module.
            AttributeError: the model has no `generate`.
        """
        model: Any = self.model
        chosen = self._adapters.chosen(adapter)
        if chosen is self._adapters.base:
            return model.generate(*args, **kwargs)
        self._check_generates()
        if isinstance(chosen, list):
            _check_count(chosen, row_count(leaves(args, kwargs)))
            if row_count(self._example.leaves) == 1:
                raise StateError(
                    "bank: generate with an adapter for each row must know where the rows are in the model. Build the "
                    "bank with example inputs of two or more rows",
                    code="not-available",
                )
            self._graph(self._example).check_independent(self._example)
        hooked_model: Any = self._hooked(
            *self._adapters.factors(segments(chosen) if isinstance(chosen, list) else chosen)
        )
        return hooked_model.generate(*args, **kwargs)

    def compile(self, **options: object) -> None:
        """Compile all graphs by torch.compile, also graphs that are captured later.

        A graph is compiled once for calls with one adapter, and once for calls with an adapter for each row. A change
        of adapters compiles nothing. Calls of another kind, such as another batch size or train mode, may compile.

        Args:
            options: options of torch.compile.
        """
        self._compile = options
        for graph in self._graphs:
            graph.compile(options)

    def release(self) -> nn.Module:
        """Restore the requires_grad flags of the parameters, and return the model. Do not use the bank afterwards.

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

    def _hooked(self, tensors: Mapping[Key, torch.Tensor], scale: object) -> nn.Module:
        """Return a copy of the model whose modules add these factors, a result of `Adapters.factors`."""
        factors = {}
        for weight, key in tensors:
            if key == UP:
                up = tensors[weight, UP]
                scales = torch.tensor(scale, dtype=up.dtype, device=up.device)
                factors[weight] = GivenFactors(tensors[weight, DOWN], up, scales)
        return hooked(self.model, self.sites, factors)

    def _check_generates(self) -> None:
        """Raise StateError if `generate` would not compute correctly with hooks.

        A hook has no effect if the model uses a weight without calling its module. So the hooked model is compared once
        with the graph, for the example inputs and a random adapter.
        """
        if self._generates or self.model.training:  # dropout makes outputs differ in train mode
            return
        call = self._example
        graph = self._graph(call)
        values = {key: both[0] for key, both in graph.random_factors().items()}
        with torch.no_grad():
            hooked_outputs = tensors_in(self._hooked(values, 1.0)(*call.args, **call.kwargs))
            plain_outputs = tensors_in(self.model(*call.args, **call.kwargs))
            graph_outputs = tensors_in(graph(call, graph.tensors_from(values, 1.0)))
        for output, reference, plain in zip(hooked_outputs, graph_outputs, plain_outputs, strict=True):
            # Rounding errors are small relative to the change that the adapter makes.
            tolerance = 1e-3 if output.dtype.itemsize > 2 else 0.1
            change = (reference.double() - plain.double()).norm()
            if (output.double() - reference.double()).norm() > tolerance * change:
                raise StateError(
                    "bank: generate adds adapters by hooks on modules, but with hooks this model computes something "
                    "else than its graph: a weight is used past its module. Generate tokens by calls of the bank",
                    code="not-available",
                )
        self._generates = True

    # ---- graphs

    @property
    def _graphs(self) -> list[BankGraph]:
        """All captured graphs."""
        return [variant.module for variant in self._variants.all if isinstance(variant.module, BankGraph)]

    def _graph(self, call: Call) -> BankGraph:
        """Return the graph of a call, and capture it if necessary."""
        variant = self._variants.find(call)
        if variant is None:
            grad = torch.is_grad_enabled()  # read before `inference_mode(False)`, which enables gradients
            with PROCESS, torch.inference_mode(False), torch.set_grad_enabled(grad):
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
        if not self._decided.plan.sites:  # the first graph fixes the sites, because adapters have their shapes
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

    def _check_new(self, name: object) -> None:
        """Raise an error if an adapter with this name cannot be added."""
        if not isinstance(name, str) or not name:
            hint = ". None is the base, which a bank always has" if name is None else ""
            raise SpecError(f"bank: the name of an adapter is {name!r}; give a string{hint}")
        if name in self.names:
            raise StateError(
                f"bank: there is an adapter {name!r} already. Call bank.remove({name!r}) first, or give another name",
                code="unknown-name",
            )

    def _read(self, name: str, source: Source) -> LowRankAdapter:
        """Read an adapter, and check that it was trained on this base.

        Raises:
            SpecError: the source is not an adapter with low-rank factors.
            CheckpointError: it was trained on another base, or cannot be read.
        """
        if isinstance(source, Mapping):
            pairs = {weight: checked_factors(name, weight, pair) for weight, pair in source.items()}
            return LowRankAdapter(repr(name), pairs, {})
        adapter = low_rank_pairs(source, self.model, name=repr(name), call="bank")
        if adapter.base:
            adapter.check_base(self._fingerprints, "bank")
        return adapter

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """{parameter name: fingerprint} of the base at the time when the first run was added."""
        return fingerprints(dict(self.model.named_parameters()))


def _check_count(chosen: Sequence[Stored], count: int | None) -> None:
    """Raise StateError if a list of adapters does not have one entry for each of `count` rows."""
    if len(chosen) != count:
        raise StateError(
            f"bank: adapter names {len(chosen)} rows, and the batch has {count} (axis 0 of its first tensor). Give a "
            "list with a name or None for each row",
            code="rows-differ",
        )
