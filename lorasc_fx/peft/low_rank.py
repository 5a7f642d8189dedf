"""A run, or an adapter of peft, as one low-rank pair for each weight: what a graph takes as inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from lorasc_fx.branch import Factors
from lorasc_fx.checkpoint.given_run import GivenRun
from lorasc_fx.checkpoint.reader import check_digests
from lorasc_fx.errors import SpecError, named, path_of
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import named_weights
from lorasc_fx.peft.factors import KEEPS_NOISE, Change, CutOff, pair_of
from lorasc_fx.peft.format import CONFIG
from lorasc_fx.peft.reader import read_adapter
from lorasc_fx.util.fingerprint import fingerprint

_IN_FULL = "trained in full, not as factors; adapt it by a branch (targets=...), or leave it out of train"
_SCALES_ROWS = "its rows are scaled (DoRA), which factors cannot express"
_BUFFER = "a buffer with other values than in the model; run the training in eval mode, or give the trained model"


@dataclass(frozen=True)
class LowRankAdapter:
    """The total change of a model's weights against W0, as one pair of factors for each weight that has changed.

    Args:
        name: what it is and where it comes from, for messages.
        pairs: factors by weight name, in fp64 on the host: `b @ a` is added to the weight as stored, and the scale is
            folded into `b`.
        cut: what `max_rank` cost each weight that had a higher rank.
        base: fingerprints of the base by parameter name. An adapter of peft has none.
        moved: names of what is not part of the base: buffers, and parameters that forward writes.
    """

    name: str
    pairs: Mapping[str, Factors]
    cut: Mapping[str, CutOff]
    base: Mapping[str, str]
    moved: Collection[str] = ()

    @property
    def rank(self) -> int:
        """The highest rank."""
        return max((pair.rank for pair in self.pairs.values()), default=0)

    def check_base(self, digests: Mapping[str, str], call: str) -> None:
        """Refuse a model with other weights than the base of this adapter. An adapter of peft is not compared.

        Args:
            digests: fingerprints of the model's parameters by name (`util.fingerprint.fingerprints`).
            call: for the message.

        Raises:
            CheckpointError: names the parameters that differ.
        """
        if self.base:
            advice = "give a run, or an adapter, of this base"
            check_digests(f"{call}: {self.name}, is of", self.base, digests, digests, self.moved, advice)


def low_rank_pairs(
    source: Cascade | str | PathLike[str],
    model: nn.Module | None = None,
    *,
    name: str = "the run",
    max_rank: int | None = None,
    call: str = "low_rank_pairs",
) -> LowRankAdapter:
    """Return the total change of a run against W0 as one pair of factors for each weight.

    All stages become one pair; a running stage that has trained counts as ended, as in `release`. The source and the
    model are only read.

    Args:
        source: a cascade, a checkpoint folder (also that of a run of the command line), or the folder of a LoRA
            adapter of peft.
        model: the base, not adapted. Needed for an adapter of peft, and for a checkpoint in the middle of a stage.
            With it, buffers are compared too.
        name: of the source, for messages.
        max_rank: reduce higher ranks to this one; `cut` has the exact error.
        call: for messages.

    Raises:
        SpecError: factors cannot express the change of some weights (DoRA, kept noise, parameters trained in full);
            names all of them. Or an adapter of peft came without a model.
        StateError: a checkpoint in the middle of a stage came without a model.
        CheckpointError: there is no checkpoint, it is damaged, or the adapter is not for this model.
        NonFiniteBranch: a running branch holds inf or nan.
    """
    tensors = {} if model is None else {**dict(model.named_parameters()), **dict(model.named_buffers())}
    base: Mapping[str, str] = {}
    moved: Collection[str] = ()
    if not isinstance(source, Cascade) and isinstance(source, (str, PathLike)) and (Path(source) / CONFIG).is_file():
        if model is None:
            raise SpecError(f"{call}: {name}, {source}, is an adapter of peft, which fits a model; give the model too")
        title, change = f"{name}, {source}", _change_of_peft(path_of(source), model)
    else:
        given = GivenRun(source._run if isinstance(source, Cascade) else source, name, call)
        title, base, moved, change = given.name, given.base, given.moved, _change_of_run(given, tensors)
    if change.refused:
        by_reason: dict[str, list[str]] = {}
        for weight, reason in change.refused.items():
            by_reason.setdefault(reason, []).append(weight)
        lines = "".join(f"\n  {named(weights)}: {reason}" for reason, weights in by_reason.items())
        raise SpecError(f"{call}: {title}, is more than factors:{lines}", code="method-not-supported")
    if max_rank is not None:
        change.at_most(max_rank)
    return LowRankAdapter(title, change.pairs, change.cut, base, moved)


def _change_of_run(given: GivenRun, tensors: Mapping[str, torch.Tensor]) -> Change:
    """Return the pairs of a run, and what is more than a pair as `refused`."""
    part, change = given.part(tensors), Change()
    for name, state in part.slow.states.items():
        if state.full:
            value = state.slow.dense
            assert value is not None
            if fingerprint(value.to(state.base.dtype)) != given.base.get(name):
                change.refused[name] = _IN_FULL
        elif state.noises:
            change.refused[name] = KEEPS_NOISE
        elif state.scale() is not None:
            change.refused[name] = _SCALES_ROWS
        elif (pair := pair_of(state, "slow")) is not None:
            change.pairs[name] = pair
    for name, value in part.buffers.items():
        if name in tensors and not torch.equal(value.cpu(), tensors[name].cpu()):
            change.refused[name] = _BUFFER
    return change


def _change_of_peft(folder: Path, model: nn.Module) -> Change:
    """Return the pairs of an adapter of peft, and what is more than a pair as `refused`."""
    adapter, change = read_adapter(folder, model), Change()
    canonical, tensors = named_weights(model).canonical, model.state_dict(keep_vars=True)
    for name, pair in adapter.by_weight(model).items():
        if pair.expert.row_scale is not None:
            change.refused[canonical[name]] = _SCALES_ROWS
        else:
            change.pairs[canonical[name]] = Factors(pair.expert.b.double().cpu(), pair.expert.a.double().cpu())
    for name, value in adapter.whole.items():
        if not torch.equal(value.to(tensors[name]), tensors[name]):
            change.refused[name] = _IN_FULL
    return change
