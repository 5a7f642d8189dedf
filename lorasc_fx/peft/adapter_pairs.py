"""Converts a run or an adapter of peft to one low-rank pair per weight, which a graph can take as inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from lorasc_fx.branch import Factors
from lorasc_fx.cascade import run_of
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint import Checkpoint, RunSource, check_digests
from lorasc_fx.errors import SpecError, named, path_of
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import named_weights
from lorasc_fx.peft.adapter_reader import read_adapter
from lorasc_fx.peft.change import KEEPS_NOISE, ON_GRID, Change, CutOff, compressed, padded, pair_of
from lorasc_fx.peft.mirror import CONFIG
from lorasc_fx.plan import Plan, Site
from lorasc_fx.state import Part
from lorasc_fx.util.fingerprint import fingerprint

_TRAINED_IN_FULL = "it was trained in full; adapt it with factors (targets=...), or remove it from train=..."
_SCALES_ROWS = "its rows are scaled (DoRA), which factors cannot express"
_BUFFER = "training has changed this buffer; train in eval mode, or give a base whose buffer has the trained values"


@dataclass(frozen=True)
class LowRankAdapter:
    """The total change of a model's weights relative to W0, as one pair of factors for each changed weight.

    Args:
        name: name of the source in messages.
        pairs: factors by weight name, in fp64 on the CPU. `b @ a` is added to the weight in its stored orientation. The
            scale is folded into `b`.
        base: {parameter name: fingerprint} of the base. Empty for an adapter of peft.
        written: names of tensors to skip in a comparison with the base: buffers, and parameters that forward writes.
        plan, dtypes: the plan of the run, and {weight name: dtype of its branch}. None and {} for an adapter of peft.
    """

    name: str
    pairs: Mapping[str, Factors]
    base: Mapping[str, str]
    written: Collection[str] = ()
    plan: Plan | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def tensors(self, site: Site, max_rank: int) -> tuple[dict[str, torch.Tensor], CutOff]:
        """Return {parameter name: fp64 tensor} of a LoRA branch with the change of a site, and the error of `max_rank`.

        The factors are padded with zeros to `max_rank`, and the scale is 1. A pair of a higher rank is replaced by the
        nearest pair of this rank. If the weight has not changed, all factors are zero.
        """
        pair = self.pairs.get(site.weight)
        if pair is None:
            a, b = replace(site, options=replace(site.options, rank=max_rank)).factor_shapes
            zeros = {"lora_A": torch.zeros(a).double(), "lora_B": torch.zeros(b).double()}
            return {**zeros, "scale": torch.ones(()).double()}, CutOff(0, 0, 0.0, 0.0)
        up, down = (pair.a.mT, pair.b.mT) if site.layout == "in_out" else (pair.b, pair.a)
        reduced, cut = compressed(Factors(up, down), max_rank)
        fitted = padded(reduced, max_rank)
        return {"lora_A": fitted.a, "lora_B": fitted.b, "scale": torch.ones(()).double()}, cut

    def check_base(self, digests: Mapping[str, str], call: str) -> None:
        """Raise CheckpointError if `digests` differ from `base`. An adapter of peft has no base to compare."""
        if self.base:
            advice = "give a run or an adapter of this base"
            check_digests(f"{call}: {self.name}, is of", self.base, digests, digests, self.written, advice)


def low_rank_pairs(
    source: Cascade | str | PathLike[str],
    model: nn.Module | None = None,
    *,
    name: str = "the run",
    call: str = "low_rank_pairs",
) -> LowRankAdapter:
    """Return the total change of a run relative to W0, as one pair of factors for each weight.

    A running stage that has trained counts as ended, as in `release`. The source and the model are not changed.

    Args:
        source: a cascade, a checkpoint folder, a run folder, or the folder of a LoRA adapter of peft.
        model: the base, not adapted. Required for an adapter of peft, and for a checkpoint in the middle of a stage. If
            it is given, buffers are compared with its buffers, and otherwise with the buffers of the run's own base.
        name, call: names of the source and of the user's call, for messages.

    Raises:
        SpecError: factors cannot express the change of some weights (DoRA, kept noise, parameters trained in full,
            buffers). The message names them all. Or the model is missing for an adapter of peft.
        StateError, CheckpointError, NonFiniteBranch: the source cannot be read, or is not for this model.
    """
    tensors = {} if model is None else {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if isinstance(source, (str, PathLike)) and (Path(source) / CONFIG).is_file():
        if model is None:
            raise SpecError(
                f"{call}: {name}, {source}, is an adapter of peft. Give the model that it was trained on too"
            )
        change = _change_of_peft(path_of(source), model)
        adapter = LowRankAdapter(f"{name}, {source}", change.pairs, {})
    else:
        source_run = RunSource(run_of(source) if isinstance(source, Cascade) else source, name, call)
        part = source_run.part(tensors)
        change = _change_of_run(source_run, part, tensors)
        dtypes = branch_dtypes(source_run.run)
        adapter = LowRankAdapter(
            source_run.name, change.pairs, source_run.base, source_run.written, source_run.plan, dtypes
        )
    if change.refused:
        by_reason: dict[str, list[str]] = {}
        for weight, reason in change.refused.items():
            by_reason.setdefault(reason, []).append(weight)
        lines = "".join(f"\n  {named(weights)}: {reason}" for reason, weights in by_reason.items())
        raise SpecError(
            f"{call}: {adapter.name}, has changes that factors cannot express:{lines}", code="method-not-supported"
        )
    return adapter


def branch_dtypes(run: Run | Checkpoint) -> dict[str, torch.dtype]:
    """Return {weight name: dtype of its branch}: fp64 for a weight in fp64, otherwise fp32."""
    if isinstance(run, Run):
        return {branch.weight_name: next(branch.parameters()).dtype for branch in run.by_key.values()}
    names = {site.weight: next(iter(site.parameter_shapes)) for site in run.plan.sites}
    return {weight: run.content.branch[weight][name].dtype for weight, name in names.items()}


def _change_of_run(source_run: RunSource, part: Part, tensors: Mapping[str, torch.Tensor]) -> Change:
    """Return the pairs of a run. Changes that a pair cannot express are in `refused`."""
    change = Change()
    for name, state in part.slow.states.items():
        if state.full:
            if fingerprint(state.dense["slow"].to(state.base.dtype)) != source_run.base.get(name):
                change.refused[name] = _TRAINED_IN_FULL
        elif state.noises or state.grid:
            change.refused[name] = ON_GRID if state.grid else KEEPS_NOISE
        elif state.scale() is not None:
            change.refused[name] = _SCALES_ROWS
        elif (pair := pair_of(state, "slow")) is not None:
            change.pairs[name] = pair
    for name, value in part.buffers.items():
        changed = name in source_run.changed_buffers
        if not torch.equal(value.cpu(), tensors[name].cpu()) if name in tensors else changed:
            change.refused[name] = _BUFFER
    return change


def _change_of_peft(folder: Path, model: nn.Module) -> Change:
    """Return the pairs of an adapter of peft. Changes that a pair cannot express are in `refused`."""
    adapter, change = read_adapter(folder, model), Change()
    canonical, tensors = named_weights(model).canonical, model.state_dict(keep_vars=True)
    for name, expert in adapter.by_weight(model).items():
        if expert.row_scale is not None:
            change.refused[canonical[name]] = _SCALES_ROWS
        else:
            change.pairs[canonical[name]] = Factors(expert.b.double().cpu(), expert.a.double().cpu())
    for name, value in adapter.full.items():
        if not torch.equal(value.to(tensors[name]), tensors[name]):
            change.refused[name] = _TRAINED_IN_FULL
    return change
