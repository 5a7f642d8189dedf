"""Folded weights one at a time: those of a living cascade, or of a checkpoint alone, for which no model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorasc_fx.branch import Branch, branch_class, is_quantized
from lorasc_fx.errors import CheckpointError, NonFiniteBranch
from lorasc_fx.plan import Plan, Site
from lorasc_fx.runtime.checkpoint import way_back
from lorasc_fx.runtime.checkpoint_read import Checkpoint
from lorasc_fx.runtime.folding import check_which, ended, trained_value
from lorasc_fx.runtime.opening import told
from lorasc_fx.runtime.rigid import check_asked
from lorasc_fx.runtime.slow import SlowWeights, Trained
from lorasc_fx.runtime.transition import trained_moved
from lorasc_fx.runtime.unpacking import Taken, began, slow_state
from lorasc_fx.state import Began, SlowWeight, Which, check_finite, has_trained

if TYPE_CHECKING:
    from lorasc_fx.runtime.core import Core

__all__ = ["Change", "FoldedWeights", "of_checkpoint", "of_core"]

Change = Callable[[torch.Tensor], torch.Tensor]
"""From W0 to the folded weight of the same shape, dtype and device."""


@dataclass(frozen=True)
class FoldedWeights:
    """What a fold makes of a base.

    Args:
        where: whose they are, for messages.
        base: fingerprint of each base parameter, by its first name.
        changes: of each parameter that a fold changes, by its first name.
        buffers: the model's buffers as they are, by name.
        aliases: the names of a tied parameter, by each of them.
    """

    where: str
    base: Mapping[str, str]
    changes: Mapping[str, Change]
    buffers: Mapping[str, torch.Tensor]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def of_core(core: Core, call: str, which: Which = "slow") -> FoldedWeights:
    """Return the folded weights of a living cascade; a running stage that has trained counts as ended.

    Raises:
        StateError: a quantized weight has trained, and no file of the base's layout can hold it.
    """
    check_which(call, which, core.plan.spec)
    slow, parameters = ended(core, call), core.parameters_by_name()
    check_asked(call, slow, None)
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in core.model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    changes: dict[str, Change] = {
        name: partial(slow.value, name, which)
        for name, state in slow.states.items()
        if _moved(state) and not is_quantized(state.base)
    }
    for name in slow.trained:
        changes[name] = partial(_cast, trained_value(slow, name, which, parameters[name].detach()))
    aliases = {name: group for group in names.values() for name in group}
    buffers = {name: buffer.detach().cpu() for name, buffer in core.model_state().items()}
    return FoldedWeights(call, core.fingerprints(), changes, buffers, aliases)


def of_checkpoint(checkpoint: Checkpoint, which: Which = "slow") -> FoldedWeights:
    """Return the folded weights of a checkpoint; a running stage that has trained counts as ended.

    Raises:
        CheckpointError: it is not what a checkpoint of its plan holds.
        StateError: which is `averaged`, and its spec keeps no average.
        NonFiniteBranch: a running branch holds inf or nan.
    """
    check_which(f"fold {checkpoint.path}", which, checkpoint.plan.spec)
    try:
        return _of_checkpoint(checkpoint, which)
    except NonFiniteBranch:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as fault:
        what, way = f"{type(fault).__name__}: {told(str(fault))}", way_back(checkpoint.path)
        raise CheckpointError(
            f"{checkpoint.path}: is not what a checkpoint of this plan holds: {what}; {way}"
        ) from fault


def _of_checkpoint(checkpoint: Checkpoint, which: Which) -> FoldedWeights:
    plan, meta, tensors = checkpoint.plan, checkpoint.manifest, checkpoint.tensors
    parked, held = bool(meta["parked"]), Taken(tensors, str(checkpoint.path))
    branches = {site.weight: _branch(site, plan, held) for site in plan.sites}
    values = {name: nn.Parameter(tensors[f"trained/{name}/value"], False) for name in meta["trained"]}
    trained = {
        name: Trained(
            value,
            tensors[f"trained/{name}/slow"],
            tensors[f"trained/{name}/start"],
            average=tensors.get(f"trained/{name}/average"),
            rule=plan.spec.train_rules[meta["rules"][name]] if name in meta.get("rules", ()) else None,
        )
        for name, value in values.items()
    }
    averaged = meta.get("averaged", 0)
    slow = SlowWeights({}, trained, parked, averaged=averaged)
    starts = {name: began(branch, plan.spec, parked, held) for name, branch in branches.items()}
    moved = any(has_trained(branch, starts.get(name)) for name, branch in branches.items())
    begun = moved or trained_moved(slow, values)
    if begun:
        for branch in branches.values():
            check_finite(branch, plan.spec, plan.stage)
        slow = slow.after_stage(plan, {}, values)
    changes: dict[str, Change] = {}
    for name, state in meta["slow"].items():
        moved = state["stages"] or state["kept"] or state.get("turns") or f"rows/{name}" in tensors
        if begun or moved or f"dense/{name}/slow" in tensors:
            running = branches.get(name) if begun else None
            more = (running, starts.get(name), averaged, which)
            changes[name] = partial(_from_base, name, state, held, plan, parked, begun, *more)
    for name, value in values.items():
        changes[name] = partial(_cast, trained_value(slow, name, which, value))
    buffers = {name.removeprefix("buffer/"): value for name, value in tensors.items() if name.startswith("buffer/")}
    aliases = {name: group for site in plan.sites for group in [(site.weight, *site.aliases)] for name in group}
    return FoldedWeights(str(checkpoint.path), dict(meta["base"]), changes, buffers, aliases)


def _branch(site: Site, plan: Plan, held: Taken) -> Branch:
    """Return the running branch of a site, for its numbers: how it computes does not matter here."""
    found = {name: held.take(f"branch/{site.weight}/{name}", shape) for name, shape in site.parameter_shapes.items()}
    like = found["lora_A"].new_zeros(()).expand(site.shape)
    branch = branch_class(site)(site, plan.spec.seed, plan.stage, like)
    for name, value in found.items():
        setattr(branch, name, nn.Parameter(value, False))
    return branch


def _from_base(
    name: str,
    meta: Mapping[str, Any],
    held: Taken,
    plan: Plan,
    parked: bool,
    begun: bool,
    running: Branch | None,
    start: Began | None,
    averaged: int,
    which: Which,
    base: torch.Tensor,
) -> torch.Tensor:
    """Return the folded value of a weight, of its W0."""
    site = plan.site(name)
    stacked, turned = (site.experts is not None, site.layout == "in_out") if site is not None else (False, False)
    state = replace(slow_state(SlowWeight(name, base, stacked, turned=turned), meta, held), began=start)
    slow = SlowWeights({name: state}, {}, parked, averaged=averaged)
    if begun:
        slow = slow.after_stage(plan, {name: running} if running is not None else {}, {})
    return slow.value(name, which, base)


def _cast(value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return value.detach().to(device=base.device, dtype=base.dtype)


def _moved(state: SlowWeight) -> bool:
    return bool(state.experts or state.kept) or state.dense_slow is not None or state.scale() is not None
