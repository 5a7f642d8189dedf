"""A model in pieces as one variant: decide over all pieces, rewrite each, and swap the weights used in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakMethod

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch
from lorasc_fx.capture import OWNER, Pieces, copied, quiet, watch, whole
from lorasc_fx.errors import CaptureError, NoSites
from lorasc_fx.graph import BRANCHES, Record, named_weights, record_of, set_record, survey
from lorasc_fx.passes import InsertBranches, MatchSites, Pipeline
from lorasc_fx.passes.insert_branches import missing_branches, nothing_to_do
from lorasc_fx.plan import Plan, Refusal
from lorasc_fx.runtime import Made, Variant

__all__ = ["insert", "make_pieces"]

PROBE = 0.1
"""Size of the deltas with which the pieces are tried, over the size of their weights."""


@dataclass
class Growing:
    """What a piece is rewritten by: plan, branches and refusals, of the cascade once there is one.

    dynamo may bring a piece in any call, with weights that no piece before has used.
    """

    plan: Plan
    branches: dict[str, Branch]
    refusals: tuple[Refusal, ...]
    grow: WeakMethod[Callable[[Made], None]] | None = None

    def rewrite(self, live: fx.GraphModule) -> fx.GraphModule:
        """Return the piece with branches; tell the cascade of sites that came with it."""
        made = insert(live, self.plan, self.branches, self.refusals)
        assert isinstance(made.variant.module, fx.GraphModule)
        grow = self.grow() if self.grow is not None else None
        if grow is not None and set(made.branches) != set(self.branches):
            grow(made)
        self.plan, self.branches, self.refusals = made.plan, dict(made.branches), made.refusals
        return made.variant.module

    def look(self, pieces: Pieces, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Find weights that this call is the first to use, in a model that uses some in plain Python; swap them."""
        weights = named_weights(pieces.model)
        lost = weights.matrices.keys() - pieces.located - {each.weight for each in self.refusals}
        if not pieces.swapped or not lost:
            return
        kinds = {name: kind for name, kind in watch(pieces.model, args, kwargs).items() if name in lost}
        if not kinds:
            return
        record = Record(owner=OWNER, plan=self.plan, refusals=self.refusals)
        found = survey(pieces.graphs, record, self.plan.spec, kinds)
        held = missing_branches(found.plan, self.branches, weights.parameters)
        swapped = {branch.weight_name: branch for branch in held.values() if branch.weight_name in kinds}
        pieces.swap({**pieces.swapped, **swapped})
        grow = self.grow() if self.grow is not None else None
        if grow is not None and set(held) != set(self.branches):
            grow(Made(Variant(pieces, "pieces"), found.plan, held, found.refusals, found.unreached))
        self.plan, self.branches, self.refusals = found.plan, held, found.refusals


def insert(live: fx.GraphModule, plan: Plan, branches: Mapping[str, Branch], refusals: tuple[Refusal, ...]) -> Made:
    """Match and insert in one graph that reads the live model, by a plan."""
    if branches:
        live._modules[BRANCHES] = nn.ModuleDict(dict(branches))
    set_record(live, replace(record_of(live), plan=plan, refusals=refusals))
    adapted = Pipeline([MatchSites(plan.spec), InsertBranches()])(live).graph_module
    record = record_of(adapted)
    assert record.plan is not None
    holder = adapted._modules[BRANCHES]
    assert isinstance(holder, nn.ModuleDict)
    held = {key: branch for key, branch in holder.items() if isinstance(branch, Branch)}
    return Made(Variant(adapted, ""), record.plan, held, record.refusals, record.unreached)


def make_pieces(
    pieces: Pieces,
    plan: Plan,
    branches: Mapping[str, Branch],
    refusals: tuple[Refusal, ...],
    args: Any,
    kwargs: Mapping[str, Any],
) -> Made:
    """Decide over all pieces at once, and insert; a weight that the Python in between uses is swapped while the model
    runs.

    Raises:
        NoSites: nothing is left to adapt.
    """
    parameters = named_weights(pieces.model).parameters
    record = Record(owner=OWNER, plan=plan, refusals=refusals)
    found = survey(pieces.graphs, record, plan.spec, watch(pieces.model, args, kwargs))
    if not found.plan.sites:
        raise NoSites(nothing_to_do(replace(record, refusals=found.refusals, unreached=found.unreached)))
    held = missing_branches(found.plan, branches, parameters)
    growing = Growing(found.plan, held, found.refusals)
    pieces.rewrite_by(growing.rewrite)
    eager = _used_outside(pieces, list(held.values()), args, kwargs)
    if eager:
        pieces.swap({branch.weight_name: branch for branch in held.values() if branch.weight_name in eager})
        left = _used_outside(pieces, list(held.values()), args, kwargs)
        if left:
            raise CaptureError(
                f"{type(pieces.model).__name__}: {left[0]} is used where neither a graph nor the module shows it, "
                f"and its branch would not be seen; exclude it (exclude=({left[0]!r},))"
            )

    def attach(grow: Callable[[Made], None]) -> None:
        growing.grow = WeakMethod(grow)
        pieces.look_before_calls(lambda args, kwargs: growing.look(pieces, args, kwargs))

    variant = Variant(pieces, "pieces", universal=True, attach=attach)
    return Made(variant, growing.plan, growing.branches, growing.refusals, found.unreached)


@torch.no_grad()
def _used_outside(pieces: Pieces, branches: Sequence[Branch], args: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """Return the weights whose delta does not come out of the pieces as it comes out of the merged eager model."""
    kept = [branch.lora_B.data for branch in branches]
    try:
        for branch in branches:
            _probe(branch, pieces.model)
        if not _differs(pieces, branches, args, kwargs):
            return []
        guilty = []
        for branch in branches:
            for other in branches:
                other.lora_B.data = torch.zeros_like(other.lora_B)
            _probe(branch, pieces.model)
            if _differs(pieces, [branch], args, kwargs):
                guilty.append(branch.weight_name)
        return guilty
    finally:
        for branch, value in zip(branches, kept, strict=True):
            branch.lora_B.data = value


def _probe(branch: Branch, model: nn.Module) -> None:
    weight = model.get_parameter(branch.weight_name)
    # as data: an optimizer and a backward see no write
    values = torch.linspace(-1, 1, branch.lora_B.numel(), device=weight.device, dtype=branch.lora_B.dtype)
    branch.lora_B.data = values.view_as(branch.lora_B).clone()
    size = (branch.delta() * branch.scale).norm()
    if size > 0:
        branch.lora_B.data = branch.lora_B.data * (PROBE * weight.norm().to(size.dtype).clamp_min(1e-3) / size)


def _differs(pieces: Pieces, branches: Sequence[Branch], args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the pieces with branches compute something else than the eager model with merged weights."""
    model = pieces.model
    merged = {
        branch.weight_name: (
            model.get_parameter(branch.weight_name) + (branch.delta() * branch.scale).to(branch_dtype(model, branch))
        )
        for branch in branches
    }
    ours, theirs, base = (_outputs(model, call, args, kwargs) for call in (pieces, merged, {}))
    far = sum(float((one - other).double().square().sum()) for one, other in zip(ours, theirs, strict=True))
    effect = sum(float((one - other).double().square().sum()) for one, other in zip(theirs, base, strict=True))
    return far > 0.05**2 * effect + 1e-30


def branch_dtype(model: nn.Module, branch: Branch) -> torch.dtype:
    """Return the dtype of the branch's weight."""
    return model.get_parameter(branch.weight_name).dtype


def _outputs(model: nn.Module, call: Any, args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Run once with one seed, leave buffers as they were, and return the floating outputs."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inputs, named = copied(args, kwargs)
    try:
        with quiet():
            _seed()
            output = call(*inputs, **named) if callable(call) else _merged(model, call, inputs, named)
    finally:
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
    found = [leaf for leaf in pytree.tree_leaves(output, is_leaf=whole) if isinstance(leaf, torch.Tensor)]
    return [leaf.detach() for leaf in found if leaf.is_floating_point()]


def _seed() -> None:
    """Seed the generators that `quiet` gives back; torch.manual_seed would reach those of an idle accelerator too."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def _merged(model: nn.Module, values: Mapping[str, torch.Tensor], args: Any, kwargs: Mapping[str, Any]) -> Any:
    return torch.func.functional_call(model, dict(values), args, dict(kwargs), tie_weights=True)
