"""The graph-break fallback as one variant: decide over all subgraphs, rewrite each, swap weights used in between."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from weakref import ref

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch, Decided
from lorasc_fx.capture import (
    OWNER,
    Difference,
    Disagreement,
    GraphBreakFallback,
    backward_of_projection,
    eager_trace,
    first_difference,
    isolation,
    one_line,
    quiet,
    requiring_grad,
    run_preflight,
    whole,
    without_gradients,
)
from lorasc_fx.compile.variants import Growable, Made, Variant
from lorasc_fx.errors import CaptureError, NoSites, SpecError, named
from lorasc_fx.graph import BRANCHES, Record, by_shape, named_weights, placements_of, record_of, set_record, survey
from lorasc_fx.passes import InsertBranches, MatchSites, Pipeline, ShareInputs
from lorasc_fx.passes.insert_branches import missing_branches, nothing_to_do
from lorasc_fx.plan import Plan, Refusal
from lorasc_fx.quantized import is_quantized
from lorasc_fx.util.undo import Block, Undo, isolated

log = logging.getLogger("lorasc_fx")

PROBE = 0.1
"""Size of the deltas with which the fallback is tried, over the size of their weights."""
SUSPECT = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Share of a delta's effect that may be missing before its weight is swapped, by the dtype of the outputs."""
WORTH_SHARING = 1 << 17
"""Entries of an input from which on one stacked product is cheaper than one for each branch that reads it."""
CERTAIN = 0.05
"""Share that is no rounding whatever the dtype."""
FLOOR = 1e-2
"""Share of the largest gradient that counts as the scale of a small one, whose sums cancel to it."""
COARSE_PROBE, COARSE, COARSE_PROBES = 0.5, 0.25, 4
"""The size of the deltas, the share of a gradient that may be missing, and how many different deltas are tried, where
numbers have few bits.

Rounding can flip the sign of an input of a ReLU, and so change a whole gradient. It does so for one delta, not for
all; a hidden use of a weight shows under each of them."""


@dataclass
class Growing:
    """Plan, branches and refusals by which subgraphs are rewritten, those of the cascade once there is one.

    Any call may make dynamo compile a new subgraph, with weights that no earlier subgraph has used.
    """

    plan: Plan
    branches: dict[str, Branch]
    refusals: tuple[Refusal, ...]
    run: Callable[[], Growable | None] = lambda: None
    tried: set[Hashable] = field(default_factory=set)
    placements: dict[str, str] = field(default_factory=dict)

    def go_on(self) -> None:
        """Take over the stage and step of the running plan, whose ranks the branches have."""
        if (run := self.run()) is not None:
            self.plan = replace(self.plan.at_stage(run.plan.stage), step=run.plan.step)

    def rewrite(self, live: fx.GraphModule) -> fx.GraphModule:
        """Return the subgraph with branches; report new sites to the cascade."""
        self.go_on()
        made = insert(live, self.plan, self.branches, self.refusals)
        assert isinstance(made.variant.module, fx.GraphModule)
        self.placements |= made.variant.placements
        if (run := self.run()) is not None and set(made.branches) != set(self.branches):
            run.grow(made)
        self.plan, self.branches, self.refusals = made.plan, dict(made.branches), made.refusals
        return made.variant.module

    def look(self, fallback: GraphBreakFallback, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Swap the weights that this call is the first to use: it may use them in plain Python.

        While there are weights that no call has used, this costs a forward of the eager model. Each new mode or setting
        of the modules, which may bring code that runs again in backward, is held against the eager model.
        """
        modes = _modes(fallback)
        if modes not in self.tried:
            with torch.inference_mode(False):
                with requiring_grad(fallback.model, {branch.weight_name for branch in self.branches.values()}):
                    functions = not fallback.eager and bool(run_preflight(fallback.model, args, kwargs).functions)
                settle(fallback, self, args, kwargs, eager=functions)
            self.tried.add(modes)
        weights = named_weights(fallback.model)
        found_by = fallback.swapped.keys() if fallback.eager else fallback.located
        lost = weights.matrices.keys() - found_by - {refusal.weight for refusal in self.refusals}
        if not lost:
            return
        kinds = {
            name: kind for name, kind in eager_trace(fallback.model, args, kwargs).items() if kind and name in lost
        }
        if not kinds:
            return
        self.go_on()
        record = Record(owner=OWNER, plan=self.plan, refusals=self.refusals)
        matching = survey(fallback.graphs, record, self.plan.spec, kinds, by_shape)
        held = missing_branches(matching.plan, self.branches, weights.parameters)
        swapped = {branch.weight_name: branch for branch in held.values() if branch.weight_name in kinds}
        if (run := self.run()) is not None and set(held) != set(self.branches):
            run.grow(Decided(matching.plan, held, matching.refusals, matching.unreached))
        fallback.swap({**fallback.swapped, **swapped})
        self.plan, self.branches, self.refusals = matching.plan, held, matching.refusals


def insert(live: fx.GraphModule, plan: Plan, branches: Mapping[str, Branch], refusals: tuple[Refusal, ...]) -> Made:
    """Match and insert in one graph that reads the live model, by a plan."""
    if branches:
        live._modules[BRANCHES] = nn.ModuleDict(dict(branches))
    set_record(live, replace(record_of(live), plan=plan, refusals=refusals))
    share = [ShareInputs(least=WORTH_SHARING)] if plan.spec.placement == "auto" else []
    adapted = Pipeline([MatchSites(plan.spec), InsertBranches(), *share], order="given")(live).graph_module
    record = record_of(adapted)
    assert record.plan is not None
    holder = adapted._modules[BRANCHES]
    assert isinstance(holder, nn.ModuleDict)
    held = {key: branch for key, branch in holder.items() if isinstance(branch, Branch)}
    variant = Variant(adapted, "", placements=placements_of(adapted))
    return Made(record.plan, held, record.refusals, record.unreached, variant)


def make_fallback(
    fallback: GraphBreakFallback,
    plan: Plan,
    branches: Mapping[str, Branch],
    refusals: tuple[Refusal, ...],
    args: Any,
    kwargs: Mapping[str, Any],
    swap_all: bool,
    universal: bool,
) -> Made:
    """Decide over all subgraphs at once, and insert; a weight that the Python in between uses is swapped in a call.

    With `swap_all` every site is, and the model runs as it is: a custom autograd.Function has a backward of its own,
    which may run code of the model again. Such a variant serves all calls, as one that is `universal` does.

    Raises:
        NoSites: nothing is left to adapt.
        CaptureError: a branch does not compute what the eager model computes, forward or backward.
    """
    parameters = named_weights(fallback.model).parameters
    record = Record(owner=OWNER, plan=plan, refusals=refusals)
    matching = survey(fallback.graphs, record, plan.spec, eager_trace(fallback.model, args, kwargs), by_shape)
    if not matching.plan.sites:
        raise NoSites(nothing_to_do(replace(record, refusals=matching.refusals, unreached=matching.unreached)))
    scaled = next((site.weight for site in matching.plan.sites if site.options.row_scale.trained), None)
    if scaled is not None:
        raise SpecError(
            f"use_dora is True, and {type(fallback.model).__name__} has graph breaks, where the branch of {scaled} "
            "cannot stand in place of its op; give use_dora=False, or a front end that takes the whole model",
            code="dora-not-supported",
        )
    held = missing_branches(matching.plan, branches, parameters)
    growing = Growing(matching.plan, held, matching.refusals, tried={_modes(fallback)})
    located = fallback.located
    fallback.rewrite_by(growing.rewrite)
    comparison = Comparison.of(fallback, held.values(), args, kwargs)
    plain = {branch.weight_name: branch for branch in comparison.branches}  # others stand beside
    fallback.swap({name: branch for name, branch in plain.items() if name not in located})
    if not (swap_all or fallback.eager):
        fallback.swap({**fallback.swapped, **{name: plain[name] for name in comparison.hidden(SUSPECT)}})
    settle(fallback, growing, args, kwargs, eager=swap_all)
    if fallback.swapped:
        left = comparison.hidden(dict.fromkeys(SUSPECT, CERTAIN))
        if left:
            raise CaptureError(
                f"{type(fallback.model).__name__}: {left[0]} is used where neither a graph nor the module shows it, "
                f"and its branch would not be seen; exclude it (exclude=({left[0]!r},))"
            )

    def attach(run: Growable) -> None:
        growing.run = ref(run)
        fallback.look_before_calls(lambda args, kwargs: growing.look(fallback, args, kwargs))

    variant = Variant(
        fallback,
        "graph-breaks",
        universal=universal or fallback.eager,
        attach=attach,
        detach=fallback.detach,
        placements={**growing.placements, **dict.fromkeys(fallback.swapped, "weight")},
    )
    # the probe may have brought more
    decided = growing.plan.by_weight.keys() | {refusal.weight for refusal in growing.refusals}
    unreached = tuple(weight for weight in matching.unreached if weight not in decided)
    return Made(growing.plan, growing.branches, growing.refusals, unreached, variant)


def _modes(fallback: GraphBreakFallback) -> Hashable:
    """Return what modules are switched by: train and eval, gradient checkpointing."""
    return tuple(
        tuple(value for value in vars(module).values() if value is True or value is False)
        for module in fallback.model.modules()
    )


def settle(fallback: GraphBreakFallback, growing: Growing, args: Any, kwargs: Mapping[str, Any], eager: bool) -> None:
    """Run as graphs where these give the branches the gradients of the eager model; else the model as it is.

    There every site is swapped, in forward and in what backward runs again. `eager` goes there at once.

    Raises:
        CaptureError: nor does that.
    """
    if fallback.eager:
        eager = True
    elif not eager:
        eager = bool(_wrong_gradients(fallback, growing, args, kwargs))
    if not eager:
        return
    _check_swappable(fallback, growing.branches.values())
    fallback.swap({branch.weight_name: branch for branch in growing.branches.values()})
    wrong: tuple[str, ...] = ()
    for once in (True,) if fallback.once else (False, True):
        fallback.run_eager(once)
        wrong = _wrong_gradients(fallback, growing, args, kwargs)
        if not wrong:
            return
    Comparison.of(fallback, growing.branches.values(), args, kwargs).check_repeats({})
    first = first_difference(Disagreement(fallback, Difference("", wrong), grad=True), fallback.model, args, kwargs)
    raise CaptureError(
        f"{type(fallback.model).__name__}: {named(wrong)} would not get the gradients that the eager model gives; the "
        f"first module that differs is {first}. The model's Python computes with weights where no module shows it: "
        "exclude these, or adapt a part of the model"
    )


def _check_swappable(fallback: GraphBreakFallback, branches: Iterable[Branch]) -> None:
    """Raise CaptureError for a quantized site, which has its branch beside it only."""
    for branch in branches:
        if is_quantized(fallback.model.get_parameter(branch.weight_name)):
            raise CaptureError(
                f"{branch.weight_name} is quantized, and {type(fallback.model).__name__} has code of its own for "
                "backward, which a branch beside the weight does not reach; exclude it "
                f"(exclude=({branch.weight_name!r},))",
                code="quantized-not-supported",
            )


def _wrong_gradients(
    fallback: GraphBreakFallback, growing: Growing, args: Any, kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    with _late_branches_untrained(growing):
        return Comparison.of(fallback, growing.branches.values(), args, kwargs).wrong_gradients()


@dataclass(frozen=True)
class Comparison:
    """The fallback with its branches against the eager model with merged weights, on one call: values and gradients.

    Args:
        fallback: with its branches.
        branches: those that are compared; a quantized weight is merged nowhere, and its branch is none of them.
        others: the branches of quantized weights.
        args, kwargs: of the call.
    """

    fallback: GraphBreakFallback
    branches: Sequence[Branch]
    others: Sequence[Branch]
    args: Any
    kwargs: Mapping[str, Any]

    @classmethod
    def of(
        cls, fallback: GraphBreakFallback, branches: Iterable[Branch], args: Any, kwargs: Mapping[str, Any]
    ) -> Comparison:
        """Return that of those branches whose weights are not quantized."""
        model, plain, others = fallback.model, list[Branch](), list[Branch]()
        for branch in branches:
            (others if is_quantized(model.get_parameter(branch.weight_name)) else plain).append(branch)
        return cls(fallback, plain, others, args, kwargs)

    @torch.no_grad()
    def hidden(self, share: Mapping[torch.dtype, float]) -> list[str]:
        """Return the weights whose delta does not come out of the fallback as it comes out of the merged model.

        Groups that agree are not looked into; `share` of the merged effect is what a group may be off by, by the dtype
        of the outputs.
        """
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        trained |= {branch.weight_name for branch in self.branches}
        hidden = []
        with _stand_ins(self.branches):
            groups = [list(self.branches)]
            while groups:
                group = groups.pop()
                for branch in self.branches:
                    branch.lora_B.data = torch.zeros_like(branch.lora_B)
                torch.clear_autocast_cache()
                if not all(self._differ(group, trained, share, probe) for probe in self._probes):
                    continue
                half = len(group) // 2
                if half:
                    groups += [group[half:], group[:half]]
                else:
                    hidden.append(group[0].weight_name)
        return hidden

    def wrong_gradients(self) -> tuple[str, ...]:
        """Return the weights whose branches get other gradients than the merged model gives them.

        Weights that get none in the eager model are left out.
        """
        wrong: tuple[str, ...] | None = None
        for probe in self._probes:
            found = self._wrong_gradients(probe)
            wrong = found if wrong is None else tuple(name for name in wrong if name in found)
            if not wrong:
                break
        return wrong or ()

    def _wrong_gradients(self, probe: int) -> tuple[str, ...]:
        """Return what `wrong_gradients` does, from one delta for each branch."""
        model = self.model
        weights = {branch.weight_name: model.get_parameter(branch.weight_name) for branch in self.branches}
        full = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        with quiet(), _trained(full), _stand_ins([*self.branches, *self.others]):  # with gradients
            for branch in self.branches:
                self._probe(branch, probe)
            merged = _merged(model, self.branches)
            with _trained(weights):
                try:
                    self._run(merged, backward=True)
                except MemoryError:
                    raise
                except Exception as fault:  # as of a model that differentiates inside, and frees its graph in eval mode
                    self._check_not_frozen(fault, merged)
                    log.info("%s itself has no gradients: %s", type(model).__name__, one_line(fault))
                    return ()
                given = {name: weight.grad.to_dense() for name, weight in weights.items() if weight.grad is not None}
            expected = {
                branch.weight_name: torch.autograd.grad(
                    _scaled(branch, model), _factors(branch), given[branch.weight_name]
                )
                for branch in self.branches
                if branch.weight_name in given
            }
            if not expected:
                return ()
            try:
                self._run(None, backward=True)
            except MemoryError:
                raise
            except Exception as fault:  # torch.utils.checkpoint raises where forward and backward compute differently
                log.info("%s with graph breaks: backward raises %s", type(model).__name__, one_line(fault))
                return tuple(expected)
            narrow = COARSE if self.coarse else max(SUSPECT[weight.dtype] for weight in weights.values())
            most = max(float(gradient.cpu().double().norm()) for pair in expected.values() for gradient in pair)
            wrong: dict[str, None] = {}
            for branch in self.branches:
                for factor, right in zip(_factors(branch), expected.get(branch.weight_name, ()), strict=False):
                    gradient = torch.zeros_like(right) if factor.grad is None else factor.grad
                    far = float((gradient - right).cpu().double().norm())
                    if far > narrow * (float(right.cpu().double().norm()) + FLOOR * most):
                        wrong[branch.weight_name] = None
        return tuple(wrong)

    def _check_not_frozen(self, fault: Exception, merged: Mapping[str, torch.Tensor]) -> None:
        """Raise CaptureError if the backward pass, which has raised, works with all parameters trainable."""
        parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.is_floating_point() and not is_quantized(parameter)
        }
        try:
            with _trained(parameters):
                self._run(merged, backward=True)
        except MemoryError:
            raise
        except Exception:
            return
        name = type(self.model).__name__
        raise CaptureError(
            f"the backward pass of {name} raises {one_line(fault)}, because parameters without a branch are frozen: it "
            "asks for the gradients of all parameters of a region (its own gradient checkpointing). Switch that off, "
            "use torch.utils.checkpoint, or train these parameters in full (train=...)"
        ) from fault

    @property
    def model(self) -> nn.Module:
        """The user's own."""
        return self.fallback.model

    @cached_property
    def coarse(self) -> bool:
        """Whether one of the weights has few bits, or autocast computes with few."""
        weights = [self.model.get_parameter(branch.weight_name) for branch in self.branches]
        devices = {weight.device.type for weight in weights}
        casts = any(torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) for device in devices)
        return casts or any(weight.dtype not in SUSPECT for weight in weights)

    @property
    def _probes(self) -> range:
        """Numbers of the deltas that are tried until one shows no difference."""
        return range(COARSE_PROBES if self.coarse else 1)

    def _probe(self, branch: Branch, number: int) -> None:
        """Give a branch a delta of a share of its weight's size, another one for each number."""
        weight = self.model.get_parameter(branch.weight_name)
        values = torch.linspace(-1, 1, branch.lora_B.numel(), device=weight.device, dtype=branch.lora_B.dtype)
        if number:
            order = torch.randperm(len(values), generator=torch.Generator().manual_seed(number))
            values = values[order.to(values.device)]
        branch.lora_B.data = values.view_as(branch.lora_B).clone()
        size, share = (branch.delta() * branch.scale).norm(), COARSE_PROBE if self.coarse else PROBE
        if size > 0:
            branch.lora_B.data = branch.lora_B.data * (share * weight.norm().to(size.dtype).clamp_min(1e-3) / size)
        torch.clear_autocast_cache()  # it has casts of what the factor held

    def _differ(
        self, branches: Sequence[Branch], trained: Collection[str], share: Mapping[torch.dtype, float], probe: int
    ) -> bool:
        """Whether the fallback with branches computes something else than the model with their deltas merged."""
        for branch in branches:
            self._probe(branch, probe)
        merged = _merged(self.model, branches)
        ours = self._run(None)
        with requiring_grad(self.model, trained):  # as in training, which forward may ask for
            theirs, base = (self._run(values) for values in (merged, {}))
            # Under autocast the dtype of an output says little: fp32 may be computed from products in bf16.
            narrow = max((share.get(output.dtype, CERTAIN) for output in theirs if not self.coarse), default=CERTAIN)
            same = _distance(theirs, ours) <= narrow**2 * _distance(theirs, base) + 1e-30  # NaN is not
            if not same:
                self.check_repeats(merged)
        return not same

    def check_repeats(self, values: Mapping[str, torch.Tensor]) -> None:
        """Raise CaptureError if two runs of the model with these weights differ, although they start from one seed."""
        if _distance(self._run(values), self._run(values)):
            raise CaptureError(
                f"{type(self.model).__name__} does not repeat its output under one seed (does its forward seed a "
                "generator by the clock, or by Generator.seed()?), so what its Python does with its weights cannot be "
                "checked; make it repeat itself, for example by dropouts of 0"
            )

    def _run(self, values: Mapping[str, torch.Tensor] | None, backward: bool = False) -> list[torch.Tensor]:
        """Run the model with these weights, or without any the fallback, once with one seed, leave buffers as they
        were, and return the floating outputs; `backward` from a projection of these.
        """
        with isolation(self.model, self.args, self.kwargs, _holding(self.model, values or {})) as (inputs, named):
            output = self.fallback.compute(inputs, named) if values is None else self.model(*inputs, **named)
            tensors = [leaf for leaf in pytree.tree_leaves(output, is_leaf=whole) if isinstance(leaf, torch.Tensor)]
            outputs = [leaf for leaf in tensors if leaf.is_floating_point()]
            if backward:
                backward_of_projection([output for output in outputs if output.requires_grad])
        return [output.detach() for output in outputs]


def _factors(branch: Branch) -> list[nn.Parameter]:
    return [factor for factor in (branch.lora_A, branch.lora_B) if factor.requires_grad]


def _scaled(branch: Branch, model: nn.Module) -> torch.Tensor:
    return (branch.delta() * branch.scale).to(model.get_parameter(branch.weight_name).dtype)


def _merged(model: nn.Module, branches: Sequence[Branch]) -> dict[str, torch.Tensor]:
    """Return the weights with the deltas of these branches in them."""
    return {
        branch.weight_name: (model.get_parameter(branch.weight_name) + _scaled(branch, model)).detach()
        for branch in branches
    }


@isolated
def _holding(undo: Undo, model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Let parameters hold other numbers, for whoever holds the parameters; autocast keeps casts of what they held."""
    undo(torch.clear_autocast_cache)
    for name, value in values.items():
        parameter = model.get_parameter(name)
        undo(partial(setattr, parameter, "data", parameter.data))
        parameter.data = value
    torch.clear_autocast_cache()


@isolated
def _trained(undo: Block, weights: Mapping[str, nn.Parameter]) -> None:
    """Train the weights inside the block; their gradients, flags and hooks are restored afterwards."""
    undo.enter(without_gradients(list(weights.values())))
    for weight in weights.values():
        undo(partial(weight.requires_grad_, weight.requires_grad))
        weight.requires_grad_(True)


@isolated
def _stand_ins(undo: Undo, branches: Sequence[Branch]) -> None:
    """Give branches temporary factors, unknown to optimizers and hooks, and no dropout: the model has none."""
    for branch in branches:
        undo(partial(branch._parameters.update, dict(branch._parameters)))
        undo(partial(setattr, branch, "training", branch.training))
        branch.training = False
        for name in ("lora_A", "lora_B"):
            factor = branch._parameters[name]
            assert factor is not None
            branch._parameters[name] = nn.Parameter(factor.detach().clone(), factor.requires_grad)


@isolated
def _late_branches_untrained(undo: Undo, growing: Growing) -> None:
    """Clear the gradients of branches that come inside the block, as where a layer is skipped at random."""
    known = set(growing.branches)

    def clear() -> None:
        for key in growing.branches.keys() - known:
            growing.branches[key].zero_grad(set_to_none=True)

    undo(clear)


def _distance(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Return the squared distance of outputs; infinite where values decided over their shapes."""
    if [output.shape for output in some] != [output.shape for output in others]:
        return float("inf")
    return sum(float((one - other).cpu().double().square().sum()) for one, other in zip(some, others, strict=True))
