"""Start a cascade: what `adapt`, `load`, `merge` and `materialize` have in common."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self
from weakref import ref

from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from lorasc_fx.adapt.untie import settle_ties
from lorasc_fx.branch import Decided
from lorasc_fx.cascade import Flags
from lorasc_fx.cascade.dropped import Joined
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.run_base import MetaModel
from lorasc_fx.check.isolation import is_on_meta, written_by
from lorasc_fx.checkpoint.base_file import MEMORIES, BaseFile, open_base
from lorasc_fx.checkpoint.deferred import check_attributes, groups_of
from lorasc_fx.checkpoint.reader import Checkpoint
from lorasc_fx.compile import Compiler
from lorasc_fx.errors import CaptureError, CheckpointError, PassError, SpecError, StateError, named
from lorasc_fx.facade import Cascade, cascade_class
from lorasc_fx.graph import matches, named_weights, shared_memory, trained_by
from lorasc_fx.graph.patterns import check_patterns, rules_of
from lorasc_fx.graph.weights import Weights
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import wrap_layers
from lorasc_fx.signature import Calls, bind_inputs, signature_of
from lorasc_fx.state import Memory
from lorasc_fx.util.finalizers import run_postponed
from lorasc_fx.util.undo import PROCESS, Undo

log = logging.getLogger("lorasc_fx")

_ADAPTED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameters that a living cascade has adapted, with a weak reference to it."""


@dataclass(frozen=True)
class Start:
    """What a cascade starts from.

    Args:
        model: the user's model. Its layers and ties are prepared.
        plan: an empty plan that has only a spec, or a saved plan.
        frontend: name of a front end, or `auto`.
        args, kwargs: example inputs.
        source: the file that keeps W0, or None to keep it in memory.
        memory: which memory, if no file does.
        joined: places whose parameters were tied, see `settle_ties`.
        loads: whether the values of a checkpoint or of a sum follow. Then inputs may be left out: the first call
            captures the graph.
        written: parameters that forward writes into, as a checkpoint says; used until a capture finds them.
        meta: what to remember until a model on the meta device gets its values.
    """

    model: nn.Module
    plan: Plan
    frontend: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] | None = None
    source: BaseFile | None = None
    memory: Memory = "memory"
    joined: Joined = ()
    loads: bool = False
    written: Collection[str] = ()
    meta: MetaModel | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        plan: Plan,
        frontend: str,
        inputs: tuple[Sequence[Any], Mapping[str, Any] | None],
        base: str | PathLike[str],
        undo: Undo,
        checkpoint: Checkpoint | None = None,
        loads: bool = False,
    ) -> Self:
        """Prepare layers, ties and W0 of a model that `check_new` has accepted.

        Args:
            model, plan, frontend, inputs, loads: as the fields.
            base: the argument of `adapt`.
            undo: restores the model.
            checkpoint: that is loaded, if one is.
        """
        meta = MetaModel(base, groups_of(model), checkpoint) if is_on_meta(model) else None
        if meta is not None:
            check_attributes(model)
        wrap_layers(model, undo)
        if not loads:
            weights = named_weights(model)
            check_patterns(plan.spec, weights.matrices, weights.names)
        source = open_base(base, model) if meta is None else None
        joined = settle_ties(model, plan.spec.untie, undo, strict=not loads)
        written = checkpoint.moved if checkpoint is not None else ()
        memory: Memory = next((each for each in MEMORIES if each == base), "memory")
        return cls(model, plan, frontend, *inputs, source, memory, joined, loads, written, meta)

    def cascade(self, undo: Undo, into: Cascade | None = None) -> Cascade:
        """Capture the example, start the run, and return its cascade.

        Args:
            undo: restores the model.
            into: a cascade to start again, instead of a new one.
        """
        model, plan, weights = self.model, self.plan, named_weights(self.model)
        waits = self.loads and not self.args and self.kwargs is None
        bound = bind_inputs(model, self.args, self.kwargs if self.kwargs is not None else {}) if not waits else None
        compiler = Compiler(self.frontend, Calls(signature_of(model), one_key=isinstance(model, fx.GraphModule)))
        trained = _trained(plan, weights)
        _check_memory(model, plan, trained, weights)
        flags = Flags.of(model)
        undo(partial(flags.restore, model))
        for name, parameter in weights.parameters.items():
            parameter.requires_grad_(name in trained)
        decided: Decided
        if bound is None:
            decided, example = compiler.decide(model, plan), None
        else:
            start = time.monotonic()
            with PROCESS:
                decided = made = compiler.make(model, Decided(plan, {}, (), ()), *bound)
            sites, seconds = len(made.plan.sites), time.monotonic() - start
            log.info("adapted: variant 1 by %s, %d sites, in %.2f s", made.variant.frontend.name, sites, seconds)
            example = (tuple(self.args), dict(self.kwargs or {}))
        written = partial(written_by, model, frozenset(self.written).intersection(weights.parameters))
        run = Run(
            model,
            decided,
            self.frontend,
            base_file=self.source,
            memory=self.memory,
            meta=self.meta,
            written=written,
        )
        if into is None:
            kind = cascade_class(model, compiler.calls.signature)
            cascade = kind(run, compiler, decided, example, flags, self.joined)
        else:
            undo(into._guard.arm)
            into._guard.disarm()  # of the run without values
            Cascade.__init__(cascade := into, run, compiler, decided, example, flags, self.joined)
        undo(cascade._usage.disarm)
        cascade._usage.arm(run, cascade)
        undo(cascade._guard.disarm)
        cascade._guard.arm()
        run.start(trained, undo, rules_of(plan.spec, trained, weights.names), self.loads)
        for parameter in weights.parameters.values():
            undo(partial(_ADAPTED.pop, parameter, None))
            _ADAPTED[parameter] = ref(cascade)
        return cascade


def check_loaded(cascade: Cascade, path: Path) -> None:
    """Raise CheckpointError if the loaded values or graphs do not agree with the plan, or are not finite."""
    disagreements = cascade._run.faults()
    variant = cascade._graphs.variants.oldest
    if variant is not None:
        disagreements += cascade._graphs.compiler.faults(variant)
    if disagreements:
        raise CheckpointError(
            f"{path}: what it holds does not agree with its plan:\n  " + "\n  ".join(dict.fromkeys(disagreements)),
            code="sites-differ",
        )


def _is_adapted(parameter: nn.Parameter) -> bool:
    """Whether a living cascade has adapted the model of a parameter."""
    reference = _ADAPTED.get(parameter)
    cascade = reference() if reference is not None else None
    return cascade is not None and not cascade._run.released


def _trained(plan: Plan, weights: Weights) -> dict[str, nn.Parameter]:
    """Return the parameters that the spec trains in full.

    Raises:
        SpecError: one of them has a dtype without gradients.
    """
    trained = {name: weights.parameters[name] for name in trained_by(plan.spec, weights.names)}
    for name, parameter in trained.items():
        if not parameter.is_floating_point() and not parameter.is_complex():
            raise SpecError(
                f"train: {_pattern_of(plan, weights, name)!r} means {name}, which holds {parameter.dtype} and has no "
                "gradient; exclude it",
                code="not-trainable",
            )
    return trained


def _pattern_of(plan: Plan, weights: Weights, name: str) -> str:
    """Return the pattern of `train` that a parameter matches."""
    return next(pattern for pattern in plan.spec.train if matches(pattern, weights.names[name]))


def _check_memory(model: nn.Module, plan: Plan, trained: Iterable[str], weights: Weights) -> None:
    """Refuse to write into a parameter that shares memory with another tensor, except as the same view (a tie).

    Raises:
        SpecError: the spec trains it in full.
        PassError: it is a site of a saved plan.
    """
    shared = shared_memory(model)
    for name in (weight for weight in trained if weight in shared):
        raise SpecError(
            f"train: {_pattern_of(plan, weights, name)!r} means {name}, which {shared[name]}; exclude it, or give it "
            "memory of its own (parameter.data = parameter.data.clone())",
            code="not-trainable",
        )
    for name in (weight for weight in plan.by_weight if weight in shared):
        raise PassError(
            f"{name} is a site of the plan, and {shared[name]}; give it memory of its own", code="not-trainable"
        )


def check_new(model: nn.Module, on_meta: bool = False) -> None:
    """Refuse a model that cannot be adapted as it is: adapted already, sharded, offloaded, or without values.

    Args:
        model: to be adapted.
        on_meta: whether it may be on the meta device.

    Raises:
        CaptureError: a tensor has no values, or cannot be trained.
        StateError: the model is sharded, a cascade or adapted already.
    """
    run_postponed()  # an earlier cascade of the model may have been dropped inside a trace
    # accelerate keeps the weights of a module with such a hook on the meta device between calls.
    hooks = {name: getattr(module, "_hf_hook", None) for name, module in model.named_modules()}
    offloaded = [
        name
        for name, hook in hooks.items()
        if any(getattr(each, "offload", False) is True for each in (hook, *getattr(hook, "hooks", ())))
    ]
    if offloaded:
        raise CaptureError(
            f"accelerate offloads the weights of {named(offloaded)} to the host or to disk, and puts them on the "
            "device for a call only: a branch cannot train beside them. Load the model without offloading: leave "
            "'cpu' and 'disk' out of device_map, or put the whole model on the host with device_map={'': 'cpu'}",
            code="meta-model",
        )
    for name, held in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(held):
            raise CaptureError(
                f"{name} has no shape yet (a lazy module): call the model once on the inputs, and adapt it then",
                code="meta-model",
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not on_meta:
            raise CaptureError(
                f"{name} is on the meta device, without numbers: give the model its weights first", code="meta-model"
            )
        if hasattr(parameter, "to_local") or hasattr(parameter, "ds_id"):
            raise StateError(
                f"{name} is cut over processes already (FSDP, tensor parallelism, DeepSpeed's ZeRO-3): adapt the whole "
                "model, perhaps on the meta device, and then cut the cascade by lorasc_fx.parallel.fsdp.shard",
                code="sharded",
            )
        if parameter.is_inference():
            raise CaptureError(
                f"{name} was made in torch.inference_mode, and nothing can train it: make it outside",
                code="not-trainable",
            )
    for name, module in model.named_modules():
        bases = [(base.__module__.partition(".")[0], base.__name__) for base in type(module).__mro__]
        if ("peft", "BaseTunerLayer") in bases:  # without importing peft
            raise StateError(
                f"{name} is a layer of peft ({type(module).__name__}), whose own factors would be adapted. "
                "Give the base model: after peft's merge_and_unload() or unload() (delete_adapter for an adapter of "
                "load_adapter), or a fresh one. To go on from the adapter, save it by save_pretrained and call "
                "lorasc_fx.from_peft(folder, base_model)",
                code="already-adapted",
            )
    if any(isinstance(module, Cascade) for module in model.modules()):
        raise StateError(
            "this model is a cascade, or holds one: call release() on it, and adapt the model that it returns",
            code="already-adapted",
        )
    if any(_is_adapted(parameter) for parameter in model.parameters()):
        gc.collect()  # a dropped cascade may be part of a reference cycle
    for name, parameter in model.named_parameters():
        if _is_adapted(parameter):
            raise StateError(
                f"this model is adapted already (its {name} belongs to a living cascade): "
                "call release() on that one first",
                code="already-adapted",
            )
