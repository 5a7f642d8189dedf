"""Wires capture, passes and runtime: the only importer of passes."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any
from weakref import ref

import torch
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from lorasc_fx.branch import Branch
from lorasc_fx.capture import (
    OWNER,
    bind,
    capture,
    check_binds,
    check_runs,
    key_of,
    leaves,
    open_model,
    signature_of,
)
from lorasc_fx.errors import CheckpointError, PassError, SpecError, StateError
from lorasc_fx.graph import (
    BRANCHES,
    check_patterns,
    matches,
    named_weights,
    own_copy,
    record_of,
    set_record,
)
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline
from lorasc_fx.plan import Plan, Refusal
from lorasc_fx.runtime import Cascade, Flags, Made, Variant, check_base, read
from lorasc_fx.spec import CascadeSpec

__all__ = ["adapt", "load"]

_ADAPTED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameters that a living cascade has adapted, with a weak reference to it."""


@dataclass(frozen=True)
class Compiler:
    """Makes variants: capture, match, insert. The runtime holds one, and knows nothing of graphs.

    Args:
        frontend: a front end's name, or `auto`.
        signature: of the user's forward.
    """

    frontend: str
    signature: inspect.Signature

    def bind(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments in canonical shape."""
        return bind(self.signature, args, kwargs)

    def key(self, model: nn.Module, args: Any, kwargs: Any) -> Hashable:
        """Return the call's signature; a graph that was given has one for all."""
        return None if isinstance(model, fx.GraphModule) else key_of(model, args, kwargs)

    def leaves(self, args: Any, kwargs: Any) -> list[Any]:
        """Return the leaves of a call's arguments."""
        return leaves(args, kwargs)

    def make(
        self,
        model: nn.Module,
        plan: Plan,
        branches: Mapping[str, Branch],
        refusals: tuple[Refusal, ...],
        args: Any,
        kwargs: Any,
        wide: bool,
    ) -> Made:
        """Capture the call and insert the branches, into a graph module that nobody else holds yet."""
        captured = capture(model, args, kwargs, self.frontend, wide)
        graph_module = captured.module
        if branches:
            graph_module._modules[BRANCHES] = nn.ModuleDict(dict(branches))
        set_record(graph_module, replace(record_of(graph_module), plan=plan, refusals=refusals))
        adapted = Pipeline([MatchSites(plan.spec), InsertBranches()])(graph_module).graph_module
        record = record_of(adapted)
        assert record.plan is not None
        holder = adapted._modules[BRANCHES]
        assert isinstance(holder, nn.ModuleDict)
        held = {key: branch for key, branch in holder.items() if isinstance(branch, Branch)}
        variant = Variant(adapted, captured.frontend, captured.guards)
        return Made(variant, record.plan, held, record.refusals, record.unreached, captured.refused)

    def fold(self, variant: Variant, model: nn.Module, values: Mapping[str, Any]) -> fx.GraphModule:
        """Return the variant's captured graph with these values as constants of its own."""
        assert isinstance(variant.module, fx.GraphModule)
        folded = FoldBranches()(variant.module).graph_module
        return own_copy(folded, OWNER, values)


def adapt(
    model: nn.Module | torch.export.ExportedProgram | str | PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    spec: CascadeSpec | None = None,
    frontend: str = "auto",
) -> Cascade:
    """Adapt a model by cascaded low-rank branches, without touching its source.

    Args:
        model: an nn.Module, a GraphModule, an ExportedProgram, or the path of a .pt2 file.
        args, kwargs: example inputs; their sizes do not matter, their types do. The model runs once on them, without
            a trace, to see that it takes them.
        spec: what is asked, see `CascadeSpec`.
        frontend: `export`, `symbolic`, or `auto`, the first that takes the model.

    Returns:
        The cascade. The model's parameters now hold the start of stage 1 (with noise, if asked for) and need no
        gradient, but for those under `spec.train`; `cascade.release()` gives the model back.

    Raises:
        UnknownTarget: a pattern of the spec matches nothing.
        SpecError: the spec leaves no site at all, or is no CascadeSpec.
        StateError: the model is adapted already.
        CaptureError: the model refuses the inputs, or no front end takes the model.
    """
    return _adapt(model, args, kwargs, Plan(spec if spec is not None else CascadeSpec()), frontend)


def load(
    folder: str | PathLike[str],
    model: nn.Module | torch.export.ExportedProgram | str | PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Cascade:
    """Adapt a base model as the newest checkpoint in a folder has it, and go on with the same numbers.

    `cascade.resume(optimizer, scheduler)` then gives these two and the random generators their state.

    Args:
        folder: that `lorasc_fx.save` wrote to.
        model, args, kwargs: as for `adapt`; the model holds the weights that were adapted.

    Raises:
        CheckpointError: nothing to load, damage, or another base; the model is as it was.
    """
    found = read(folder)
    opened = open_model(model)
    _check_new(opened)
    check_base(found, dict(opened.named_parameters()))
    try:
        cascade = _adapt(opened, args, kwargs, found.plan, found.frontend)
    except (PassError, SpecError) as fault:
        raise CheckpointError(f"{found.path}: its plan does not fit this model: {fault}") from fault
    try:
        cascade.load(found)
    except BaseException:
        cascade.release()
        raise
    return cascade


def _adapt(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, plan: Plan, frontend: str) -> Cascade:
    """Adapt by a plan: an empty one that has only a spec, or one that was saved."""
    if not isinstance(plan.spec, CascadeSpec):
        raise SpecError(f"spec is {type(plan.spec).__name__}; give a lorasc_fx.CascadeSpec")
    opened = open_model(model)
    _check_new(opened)
    weights = named_weights(opened)
    check_patterns(plan.spec, weights.matrices, weights.names)
    bound = check_binds(opened, tuple(args), dict(kwargs or {}))
    check_runs(opened, *bound)
    maker = Compiler(frontend, signature_of(opened))
    trained = _trained(plan.spec, weights.parameters, weights.names)
    made = maker.make(opened, plan, {}, (), *bound, wide=False)
    flags = Flags.of(opened)
    cascade = Cascade(opened, maker, made, maker.key(opened, *bound), bound, flags)
    try:
        for name, parameter in weights.parameters.items():
            parameter.requires_grad_(name in trained)
        cascade.core.start(trained)
    except BaseException:
        flags.restore(opened)
        raise
    for parameter in weights.parameters.values():
        _ADAPTED[parameter] = ref(cascade)
    return cascade


def _trained(
    spec: CascadeSpec, parameters: Mapping[str, nn.Parameter], names: Mapping[str, tuple[str, ...]]
) -> dict[str, nn.Parameter]:
    """Return the parameters that the spec trains in full.

    Raises:
        SpecError: one of them holds numbers that cannot be trained.
    """
    trained = {}
    for name, parameter in parameters.items():
        pattern = next((each for each in spec.train if matches(each, names[name])), None)
        if pattern is None or any(matches(each, names[name]) for each in spec.exclude):
            continue
        if not parameter.is_floating_point() and not parameter.is_complex():
            raise SpecError(
                f"train: {pattern!r} means {name}, which holds {parameter.dtype} and has no gradient; exclude it"
            )
        trained[name] = parameter
    return trained


def _check_new(model: nn.Module) -> None:
    if any(isinstance(module, Cascade) for module in model.modules()):
        raise StateError(
            "this model is a cascade, or holds one: call release() on it, and adapt the model that it returns"
        )
    for name, parameter in model.named_parameters():
        found = _ADAPTED.get(parameter)
        cascade = found() if found is not None else None
        if cascade is not None and not cascade.core.released:
            raise StateError(
                f"this model is adapted already (its {name} belongs to a living cascade): "
                "call release() on that one first"
            )
