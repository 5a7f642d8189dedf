"""The variant of a model with graph breaks: rewrite each subgraph, and swap the weights that Python in between uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from weakref import ref

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch, Decided
from lorasc_fx.capture import GRAPH_BREAKS, OWNER, GraphBreakFallback, eager_trace
from lorasc_fx.check.isolation import isolation
from lorasc_fx.check.observe import Difference, one_line
from lorasc_fx.check.preflight import Disagreement, first_difference, run_preflight
from lorasc_fx.check.process_state import quiet
from lorasc_fx.check.projections import backward_of_projection, requiring_grad, without_gradients
from lorasc_fx.compile.variants import Growable, Made, Variant
from lorasc_fx.errors import CaptureError, NoSites, SpecError, named
from lorasc_fx.graph import Record, named_weights, record_of, set_record
from lorasc_fx.graph.matching import survey
from lorasc_fx.graph.placement import placements_of
from lorasc_fx.graph.weights import BRANCHES
from lorasc_fx.passes import InsertBranches, MatchSites, Pipeline, ShareInputs
from lorasc_fx.passes.insert_branches import all_branches, no_sites_message
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import quantized_in, writable
from lorasc_fx.signature import is_opaque_leaf
from lorasc_fx.util.undo import Undo, isolated

log = logging.getLogger("lorasc_fx")

PROBE = 0.1
"""Norm of the deltas that the fallback is tried with, relative to their weights."""
SUSPECT = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Fraction of a delta's effect that may be missing before its weight is swapped, by dtype of the outputs."""
MIN_SHARED_ENTRIES = 1 << 17
"""Entries of an input from which on one stacked product is faster than one product for each branch that reads it."""
CERTAIN = 0.05
"""Fraction that is never rounding, whatever the dtype."""
FLOOR = 1e-2
"""A small gradient may be a sum that cancels. It is compared at this fraction of the largest gradient, at least."""
COARSE_PROBE, COARSE, COARSE_PROBES = 0.5, 0.25, 4
"""For weights with few bits: norm of the deltas, fraction of a gradient that may be missing, number of deltas tried.

Rounding can flip the sign of an input of a ReLU, and so change a whole gradient. It does so for one delta, not for
all; a hidden use of a weight shows with each of them."""


def insert(live: fx.GraphModule, decided: Decided) -> Made:
    """Match and insert in one graph that reads the live model, following what was decided so far."""
    plan = decided.plan
    if decided.branches:
        live._modules[BRANCHES] = nn.ModuleDict(dict(decided.branches))
    set_record(live, replace(record_of(live), plan=plan, refusals=decided.refusals))
    share = [ShareInputs(least=MIN_SHARED_ENTRIES)] if plan.spec.placement == "auto" else []
    adapted = Pipeline([MatchSites(plan.spec), InsertBranches(), *share])(live).graph_module
    record = record_of(adapted)
    assert record.plan is not None
    holder = adapted._modules[BRANCHES]
    assert isinstance(holder, nn.ModuleDict)
    branches = {key: branch for key, branch in holder.items() if isinstance(branch, Branch)}
    variant = Variant(adapted, GRAPH_BREAKS, placements=placements_of(adapted))
    return Made(record.plan, branches, record.refusals, record.unreached, variant)


def make_fallback(
    fallback: GraphBreakFallback,
    decided: Decided,
    args: Any,
    kwargs: Mapping[str, Any],
    swap_all: bool,
    universal: bool,
) -> Made:
    """Decide over all subgraphs at once, and insert. Weights that Python in between uses are swapped during a call.

    Args:
        fallback: the model's subgraphs.
        decided: the plan to follow, the branches that exist, and what was refused.
        args, kwargs: of the call.
        swap_all: swap every site, and run the model eagerly: its own backward may run code of the model again.
        universal: whether the variant serves all calls. It does so too if the model runs eagerly.

    Raises:
        NoSites: nothing is left to adapt.
        CaptureError: a branch does not compute what the eager model computes, forward or backward.
    """
    model, plan = fallback.model, decided.plan
    record = Record(owner=OWNER, plan=plan, refusals=decided.refusals)
    matching = survey(fallback.graphs, record, plan.spec, eager_trace(model, args, kwargs))
    if not matching.plan.sites:
        raise NoSites(no_sites_message(replace(record, refusals=matching.refusals, unreached=matching.unreached)))
    scaled = next((site.weight for site in matching.plan.sites if "weight" not in site.options.method.placements), None)
    if scaled is not None:
        raise SpecError(
            f"adapter is {plan.spec.adapter!r}, and {type(model).__name__} has graph breaks, where the branch of "
            f"{scaled} cannot replace its op; give another adapter, or a front end that takes the whole model",
            code="method-not-supported",
        )
    branches = all_branches(matching.plan, decided.branches, named_weights(model).parameters)
    growing = Growing(fallback, Decided(matching.plan, branches, matching.refusals, matching.unreached))
    growing.tried.add(growing.modes)
    located = fallback.located
    fallback.rewrite_by(growing.rewrite)
    comparison = growing.comparison(args, kwargs)
    plain = {branch.weight_name: branch.on_weight for branch in comparison.branches}
    fallback.swap({name: branch for name, branch in plain.items() if name not in located})
    if not (swap_all or fallback.eager):
        fallback.swap({**fallback.swapped, **{name: plain[name] for name in comparison.hidden(SUSPECT)}})
    growing.settle(args, kwargs, eager=swap_all)
    if fallback.swapped:
        hidden = comparison.hidden(dict.fromkeys(SUSPECT, CERTAIN))
        if hidden:
            raise CaptureError(
                f"{type(model).__name__}: {hidden[0]} is used where neither a graph nor the module shows it, "
                f"and its branch would not be seen; exclude it (exclude=({hidden[0]!r},))"
            )

    def attach(run: Growable) -> None:
        growing.run = ref(run)
        fallback.look = growing.look

    variant = Variant(
        fallback,
        GRAPH_BREAKS,
        universal=universal or fallback.eager,
        attach=attach,
        detach=fallback.detach,
        placements={**growing.placements, **dict.fromkeys(fallback.swapped, "weight")},
    )
    result = growing.decided  # the runs above may have added sites
    known = result.plan.by_weight.keys() | {refusal.weight for refusal in result.refusals}
    unreached = tuple(weight for weight in matching.unreached if weight not in known)
    return Made(result.plan, result.branches, result.refusals, unreached, variant)


@dataclass
class Growing:
    """What is decided for a fallback. It grows, because any call may bring subgraphs with weights that none has used.

    Args:
        fallback: whose subgraphs are rewritten.
        decided: plan, branches and refusals so far.
        run: returns the state of the cascade's run, once there is one.
        tried: modes of the model that were compared with the eager model.
        placements: of the branches in the subgraphs.
    """

    fallback: GraphBreakFallback
    decided: Decided
    run: Callable[[], Growable | None] = lambda: None
    tried: set[Hashable] = field(default_factory=set)
    placements: dict[str, str] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The plan at the stage and step of the run, whose ranks the branches have."""
        plan = self.decided.plan
        return plan if (run := self.run()) is None else replace(plan.at_stage(run.plan.stage), step=run.plan.step)

    @property
    def branches(self) -> Sequence[Branch]:
        """The branches so far."""
        return list(self.decided.branches.values())

    @property
    def modes(self) -> Hashable:
        """The switches of the model's modules: train and eval, gradient checkpointing."""
        return tuple(
            tuple(value for value in vars(module).values() if value is True or value is False)
            for module in self.fallback.model.modules()
        )

    def comparison(self, args: Any, kwargs: Mapping[str, Any]) -> Comparison:
        """Return the comparison with the eager model on one call."""
        quantized = self._quantized()
        plain = [branch for branch in self.branches if branch not in quantized]
        return Comparison(self.fallback, plain, quantized, args, kwargs)

    def _quantized(self) -> list[Branch]:
        """Return the branches of quantized weights."""
        model = self.fallback.model
        names = quantized_in({branch.weight_name: model.get_parameter(branch.weight_name) for branch in self.branches})
        return [branch for branch in self.branches if branch.weight_name in names]

    def rewrite(self, live: fx.GraphModule) -> fx.GraphModule:
        """Return a subgraph with branches. The cascade's run gets new sites."""
        made = insert(live, replace(self.decided, plan=self.plan))
        assert isinstance(made.variant.module, fx.GraphModule)
        self.placements |= made.variant.placements
        self._grow(Decided(made.plan, made.branches, made.refusals, made.unreached))
        return made.variant.module

    def _grow(self, decided: Decided) -> None:
        if (run := self.run()) is not None and set(decided.branches) != set(self.decided.branches):
            run.grow(decided)
        self.decided = decided

    def look(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Prepare for a call: check a new mode, and swap weights that this call is the first to use.

        A new mode of the modules may bring code that runs again in backward. While some weights were used by no call,
        this costs a forward of the eager model, because plain Python may use them.
        """
        fallback, model = self.fallback, self.fallback.model
        if (modes := self.modes) not in self.tried:
            with torch.inference_mode(False):
                with requiring_grad(model, {branch.weight_name for branch in self.branches}):
                    own_backward = not fallback.eager and bool(run_preflight(model, args, kwargs).seen.functions)
                self.settle(args, kwargs, eager=own_backward)
            self.tried.add(modes)
        weights = named_weights(model)
        used = fallback.swapped.keys() if fallback.eager else fallback.located
        unused = weights.matrices.keys() - used - {refusal.weight for refusal in self.decided.refusals}
        traced = eager_trace(model, args, kwargs) if unused else {}
        kinds = {name: kind for name, kind in traced.items() if kind and name in unused}
        if not kinds:
            return
        plan = self.plan
        record = Record(owner=OWNER, plan=plan, refusals=self.decided.refusals)
        matching = survey(fallback.graphs, record, plan.spec, kinds)
        branches = all_branches(matching.plan, self.decided.branches, weights.parameters)
        self._grow(Decided(matching.plan, branches, matching.refusals, matching.unreached))
        added = {branch.weight_name: branch.on_weight for branch in branches.values() if branch.weight_name in kinds}
        fallback.swap({**fallback.swapped, **added})

    def settle(self, args: Any, kwargs: Mapping[str, Any], eager: bool) -> None:
        """Run the subgraphs if their branches get the gradients of the eager model. Otherwise run the model eagerly.

        Eagerly, every site is swapped, in forward and in what backward runs again. `eager` skips the first attempt.

        Raises:
            CaptureError: the gradients are wrong then, too.
        """
        fallback, model = self.fallback, self.fallback.model
        if not (eager or fallback.eager or self._wrong_gradients(args, kwargs)):
            return
        for branch in self._quantized():
            raise CaptureError(
                f"{branch.weight_name} is quantized, and {type(model).__name__} has code of its own for "
                "backward, which a branch beside the weight does not reach; exclude it "
                f"(exclude=({branch.weight_name!r},))",
                code="quantized-not-supported",
            )
        fallback.swap({branch.weight_name: branch.on_weight for branch in self.branches})
        wrong: tuple[str, ...] = ()
        for once in (True,) if fallback.once else (False, True):
            fallback.run_eager(once)
            wrong = self._wrong_gradients(args, kwargs)
            if not wrong:
                return
        self.comparison(args, kwargs).check_repeats({})
        first = first_difference(Disagreement(fallback, Difference("", wrong), grad=True), model, args, kwargs)
        raise CaptureError(
            f"{type(model).__name__}: {named(wrong)} would not get the gradients that the eager model gives; the "
            f"first module that differs is {first}. The model's Python computes with weights where no module shows it: "
            "exclude these, or adapt a part of the model"
        )

    def _wrong_gradients(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        known = set(self.decided.branches)
        try:
            return self.comparison(args, kwargs).wrong_gradients()
        finally:
            # A layer that is skipped at random may bring branches only now. They are not temporary as the others are.
            for key, branch in self.decided.branches.items():
                if key not in known:
                    branch.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Comparison:
    """Compares the fallback with its branches and the eager model with merged weights, on one call.

    Args:
        fallback: with its branches.
        branches: the branches to compare.
        quantized: the branches of quantized weights, which cannot be merged and are not compared.
        args, kwargs: of the call.
    """

    fallback: GraphBreakFallback
    branches: Sequence[Branch]
    quantized: Sequence[Branch]
    args: Any
    kwargs: Mapping[str, Any]

    @torch.no_grad()
    def hidden(self, share: Mapping[torch.dtype, float]) -> list[str]:
        """Return the weights whose delta has less effect in the fallback than in the merged model.

        Bisects the branches: a group that agrees is not divided.

        Args:
            share: fraction of the effect that may be missing, by dtype of the outputs.
        """
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        trained |= {branch.weight_name for branch in self.branches}
        hidden = []
        with _temporary_parameters(self.branches):
            groups = [list(self.branches)]
            while groups:
                group = groups.pop()
                for branch in self.branches:
                    _change_zeros(branch, torch.zeros_like)
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

        Weights without a gradient in the eager model are left out.
        """
        wrong: tuple[str, ...] | None = None
        for probe in self._probes:
            names = self._wrong_gradients(probe)
            wrong = names if wrong is None else tuple(name for name in wrong if name in names)
            if not wrong:
                break
        return wrong or ()

    def _wrong_gradients(self, probe: int) -> tuple[str, ...]:
        """Return those weights for one delta of each branch."""
        model = self.model
        weights = {branch.weight_name: model.get_parameter(branch.weight_name) for branch in self.branches}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        temporary = _temporary_parameters([*self.branches, *self.quantized])
        leaves = [value for value in writable(dict(model.named_parameters())).values() if value.is_leaf]
        with quiet(), without_gradients(leaves), temporary:
            for branch in self.branches:
                self._probe(branch, probe)
            merged = _merged(model, self.branches)
            try:
                with requiring_grad(model, trained | weights.keys()):
                    self._run(merged, backward=True)
            except MemoryError:
                raise
            except Exception as fault:  # such as a model that differentiates inside, and frees its graph in eval mode
                self._check_not_frozen(fault, merged)
                log.info("%s itself has no gradients: %s", type(model).__name__, one_line(fault))
                return ()
            expected = {}
            for branch in self.branches:
                gradient = weights[branch.weight_name].grad
                if gradient is not None:
                    delta, parameters = _delta(branch, model), list(branch.trainable().values())
                    expected[branch] = torch.autograd.grad(delta, parameters, gradient.to_dense())
            for leaf in leaves:
                leaf.grad = None
            if not expected:
                return ()
            try:
                self._run(None, backward=True)
            except MemoryError:
                raise
            except Exception as fault:  # torch.utils.checkpoint raises if forward and backward compute differently
                log.info("%s with graph breaks: backward raises %s", type(model).__name__, one_line(fault))
                return tuple(branch.weight_name for branch in expected)
            allowed = COARSE if self.coarse else max(SUSPECT[weight.dtype] for weight in weights.values())
            largest = max(_norm(gradient) for pair in expected.values() for gradient in pair)
            return tuple(
                branch.weight_name
                for branch, pair in expected.items()
                if any(
                    _norm(gradient if factor.grad is None else factor.grad - gradient)
                    > allowed * (_norm(gradient) + FLOOR * largest)
                    for factor, gradient in zip(branch.trainable().values(), pair, strict=True)
                )
            )

    def _check_not_frozen(self, fault: Exception, merged: Mapping[str, torch.Tensor]) -> None:
        """Raise CaptureError if the backward pass, which raised `fault`, works with all parameters trainable."""
        try:
            with requiring_grad(self.model, None):
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
        """The user's model."""
        return self.fallback.model

    @cached_property
    def coarse(self) -> bool:
        """Whether a weight has few bits, or autocast computes with few."""
        weights = [self.model.get_parameter(branch.weight_name) for branch in self.branches]
        devices = {weight.device.type for weight in weights}
        casts = any(torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) for device in devices)
        return casts or any(weight.dtype not in SUSPECT for weight in weights)

    @property
    def _probes(self) -> range:
        """Numbers of the deltas that are tried until one shows no difference."""
        return range(COARSE_PROBES if self.coarse else 1)

    def _probe(self, branch: Branch, number: int) -> None:
        """Give a branch a delta, relative to the norm of its weight; another one for each number."""
        weight = self.model.get_parameter(branch.weight_name)

        def values(parameter: torch.Tensor) -> torch.Tensor:
            numbers = torch.linspace(-1, 1, parameter.numel(), device=parameter.device, dtype=parameter.dtype)
            if number:
                order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(number))
                numbers = numbers[order.to(numbers.device)]
            return numbers.view_as(parameter).clone()

        _change_zeros(branch, values)
        size, share = branch.dense_delta(weight).norm(), COARSE_PROBE if self.coarse else PROBE
        if size > 0:
            factor = share * weight.norm().to(size.dtype).clamp_min(1e-3) / size
            _change_zeros(branch, lambda parameter: parameter * factor)
        torch.clear_autocast_cache()  # it has casts of the old values

    def _differ(
        self, branches: Sequence[Branch], trained: Collection[str], share: Mapping[torch.dtype, float], probe: int
    ) -> bool:
        """Whether the fallback with branches computes something else than the model with their deltas merged."""
        for branch in branches:
            self._probe(branch, probe)
        merged = _merged(self.model, branches)
        ours = self._run(None)
        with requiring_grad(self.model, trained):  # as in training, because forward may ask for it
            theirs, base = (self._run(values) for values in (merged, {}))
            # Under autocast the dtype of an output says little: fp32 may be computed from products in bf16.
            allowed = max((share.get(output.dtype, CERTAIN) for output in theirs if not self.coarse), default=CERTAIN)
            same = _distance(theirs, ours) <= allowed**2 * _distance(theirs, base) + 1e-30  # false for nan
            if not same:
                self.check_repeats(merged)
        return not same

    def check_repeats(self, values: Mapping[str, torch.Tensor]) -> None:
        """Raise CaptureError if two runs of the model with these weights and one seed differ."""
        if _distance(self._run(values), self._run(values)):
            raise CaptureError(
                f"{type(self.model).__name__} does not repeat its output under one seed (does its forward seed a "
                "generator by the clock, or by Generator.seed()?), so what its Python does with its weights cannot be "
                "checked; make it repeat itself, for example by dropouts of 0"
            )

    def _run(self, values: Mapping[str, torch.Tensor] | None, backward: bool = False) -> list[torch.Tensor]:
        """Run the model with these weights, or the fallback for None, and return the floating-point outputs.

        Every run starts from the same seed and leaves buffers unchanged. `backward` runs backward from a projection of
        the outputs.
        """
        with isolation(self.model, self.args, self.kwargs, _other_values(self.model, values or {})) as (inputs, named):
            output = self.fallback.compute(inputs, named) if values is None else self.model(*inputs, **named)
            tensors = [
                leaf for leaf in pytree.tree_leaves(output, is_leaf=is_opaque_leaf) if isinstance(leaf, torch.Tensor)
            ]
            outputs = [leaf for leaf in tensors if leaf.is_floating_point()]
            if backward:
                backward_of_projection([output for output in outputs if output.requires_grad])
        return [output.detach() for output in outputs]


def _change_zeros(branch: Branch, values: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the parameters that are zero at the start of a stage; `values` maps a current value to a new one."""
    for name in branch.zeros:
        parameter = branch.get_parameter(name)
        parameter.data = values(parameter.data)


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.cpu().double().norm())


def _delta(branch: Branch, model: nn.Module) -> torch.Tensor:
    weight = model.get_parameter(branch.weight_name)
    return branch.dense_delta(weight.detach()).to(weight.dtype)


def _merged(model: nn.Module, branches: Sequence[Branch]) -> dict[str, torch.Tensor]:
    """Return the weights with the deltas of these branches merged."""
    return {
        branch.weight_name: (model.get_parameter(branch.weight_name) + _delta(branch, model)).detach()
        for branch in branches
    }


@isolated
def _other_values(undo: Undo, model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give parameters other values inside the block, wherever they are held."""
    undo(torch.clear_autocast_cache)  # it has casts of the other values
    for name, value in values.items():
        parameter = model.get_parameter(name)
        undo(partial(setattr, parameter, "data", parameter.data))
        parameter.data = value
    torch.clear_autocast_cache()


@isolated
def _temporary_parameters(undo: Undo, branches: Sequence[Branch]) -> None:
    """Give branches parameters that optimizers and hooks do not know, and no dropout, which the merged model lacks."""
    for branch in branches:
        undo(partial(branch._parameters.update, dict(branch._parameters)))
        undo(partial(setattr, branch, "training", branch.training))
        branch.training = False
        for name, parameter in dict(branch.named_parameters()).items():
            branch._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def _distance(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Return the squared distance of outputs; infinite if their shapes differ."""
    if [output.shape for output in some] != [output.shape for output in others]:
        return float("inf")
    return sum(float((one - other).cpu().double().square().sum()) for one, other in zip(some, others, strict=True))
