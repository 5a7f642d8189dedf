"""The variant of a model with graph breaks.

Branches are inserted into each subgraph. A weight that Python code uses outside of the subgraphs is swapped: while the
model runs, every read of the weight returns the merged weight `W + delta`, computed by its branch.

It is not known in advance which weights Python code uses. So the model is compared with the eager model in which all
deltas are merged, on the example inputs:

1. If the delta of a weight has less effect on the outputs than when it is merged, the weight is swapped.
2. If the gradients of a branch are wrong, code of the model runs again in backward. Then the model runs eagerly, with
   all weights swapped, in forward and backward.
"""

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
from lorasc_fx.capture import GRAPH_BREAKS, OWNER, Captured, Conditions, GraphBreakFallback, eager_trace
from lorasc_fx.check.isolation import isolation
from lorasc_fx.check.observe import Difference, attempt, one_line
from lorasc_fx.check.preflight import Disagreement, first_difference, run_preflight
from lorasc_fx.check.process_state import quiet
from lorasc_fx.check.projections import backward_of_projection, requiring_grad, without_gradients
from lorasc_fx.compile.variants import Growable, NewVariant, Variant
from lorasc_fx.errors import CaptureError, NoSites, SpecError, named
from lorasc_fx.graph import Record, named_weights, record_of, set_record
from lorasc_fx.graph.matching import survey
from lorasc_fx.graph.placement import placements_of
from lorasc_fx.graph.weights import BRANCHES, branches_in
from lorasc_fx.passes import InsertBranches, MatchSites, Pipeline
from lorasc_fx.passes.insert_branches import all_branches, no_sites_message
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import quantized_in, writable
from lorasc_fx.signature import is_opaque_leaf
from lorasc_fx.util.undo import Undo, isolated

log = logging.getLogger("lorasc_fx")

PROBE = 0.1
"""Norm of the deltas used in comparisons, relative to the norms of their weights."""
SUSPECT = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Fraction of the effect of a delta that may be missing before its weight is swapped, by dtype of the outputs."""
CERTAIN = 0.05
"""Missing fraction that cannot be a rounding error, for any dtype."""
FLOOR = 1e-2
"""A small gradient may be a sum of terms that cancel. Its error is compared with at least this fraction of the largest
gradient."""
COARSE_PROBE, COARSE, COARSE_PROBES = 0.5, 0.25, 4
"""For weights of low precision: relative norm of the deltas, allowed relative error of a gradient, number of deltas.

Rounding may flip the sign of an input of a ReLU, and so change a gradient completely. That happens with some deltas
only, but a use of a weight without its branch shows with every delta. So a difference counts only if each delta shows
it."""


def insert(captured: Captured, decided: Decided) -> NewVariant:
    """Match sites and insert branches in one captured graph.

    Args:
        captured: the graph, which is changed.
        decided: the plan to follow, the existing branches, and the refusals so far.
    """
    module, plan = captured.module, decided.plan
    if decided.branches:
        module._modules[BRANCHES] = nn.ModuleDict(dict(decided.branches))
    set_record(module, replace(record_of(module), plan=plan, refusals=decided.refusals))
    adapted = Pipeline([MatchSites(plan.spec), InsertBranches()])(module).graph_module
    record = record_of(adapted)
    variant = Variant(adapted, captured.frontend, captured.conditions, placements=placements_of(adapted))
    return NewVariant(
        record.plan, branches_in(adapted) or {}, record.refusals, record.unreached, variant, captured.refused
    )


def with_sites(
    decided: Decided, graphs: Sequence[fx.GraphModule], model: nn.Module, outside: Mapping[str, str]
) -> Decided:
    """Add the weights that graphs of a model use, or Python code between them, to the plan. Each gets a branch.

    Args:
        decided: the plan, branches and refusals so far.
        graphs: the graphs, which read the model.
        model: the model.
        outside: kind of each weight that a run of the model used, see `survey`.
    """
    record = survey(graphs, Record(owner=OWNER, plan=decided.plan, refusals=decided.refusals), outside)
    branches = all_branches(record.plan, decided.branches, named_weights(model).parameters)
    return Decided(record.plan, branches, record.refusals, record.unreached)


def make_fallback(captured: Captured, decided: Decided, args: Any, kwargs: Mapping[str, Any]) -> NewVariant:
    """Insert branches into the subgraphs of a model, and swap the weights that its Python code uses.

    Args:
        captured: the subgraphs. A model with a custom backward, which may run its code again, runs eagerly with all
            weights swapped.
        decided: the plan to follow, the existing branches, and the refusals so far.
        args, kwargs: example inputs.

    Raises:
        NoSites: no weight can be adapted.
        CaptureError: with its branches, the model differs from the eager model with merged weights.
    """
    # Match sites over all subgraphs and the Python code at once, because a weight may be used in several of them.
    fallback, swap_all = captured.fallback, captured.own_backward
    model, spec = fallback.model, decided.plan.spec
    decided = with_sites(decided, fallback.graphs, model, eager_trace(model, args, kwargs))
    sites = decided.plan.sites
    if not sites:
        raise NoSites(no_sites_message(decided))
    scaled = next((site.weight for site in sites if "weight" not in site.options.method.placements), None)
    if scaled is not None:
        raise SpecError(
            f"adapter={spec.adapter!r} does not work for {type(model).__name__}, which has graph breaks: the "
            f"branch of {scaled} cannot replace its op there. Choose another adapter, or a front end that captures the "
            "full model.",
            code="method-not-supported",
        )
    growing = Growing(fallback, decided)
    growing.tried.add(growing.modes)
    # Swap each weight that no subgraph reads. Then swap each weight whose delta lacks some effect.
    reached = fallback.reached
    fallback.rewrite_with(growing.rewrite)
    comparison = growing.comparison(args, kwargs)
    plain = {branch.weight_name: branch.on_weight for branch in comparison.branches}
    fallback.swap({name: branch for name, branch in plain.items() if name not in reached})
    if not (swap_all or fallback.eager):
        fallback.swap({name: plain[name] for name in comparison.hidden(SUSPECT)})
    growing.settle(args, kwargs, eager=swap_all)
    # Check that swapping was enough. Forward may use an alias of a weight, such as a tensor in a closure.
    if fallback.swapped:
        hidden = comparison.hidden(dict.fromkeys(SUSPECT, CERTAIN))
        if hidden:
            raise CaptureError(
                f"{type(model).__name__} uses {hidden[0]} in a way that neither its graphs nor its modules show. The "
                f"branch would have no effect there. Exclude the weight (exclude=({hidden[0]!r},))."
            )

    def attach(run: Growable) -> None:
        growing.run = ref(run)
        fallback.before_call = growing.before_call

    # If only gradient checkpointing prevents a full graph, calls in eval mode should get a full graph.
    universal = fallback.eager or not captured.only_recomputes
    variant = Variant(
        fallback,
        GRAPH_BREAKS,
        Conditions(state=None if universal else captured.conditions.state),  # dynamo guards the inputs
        universal,
        attach=attach,
        detach=fallback.detach,
        placements={**growing.placements, **dict.fromkeys(fallback.swapped, "weight")},
    )
    result = growing.decided  # the runs above may have added sites
    reported = result.plan.by_weight.keys() | {refusal.weight for refusal in result.refusals}
    unreached = tuple(weight for weight in decided.unreached if weight not in reported)
    return NewVariant(result.plan, result.branches, result.refusals, unreached, variant, captured.refused)


@dataclass
class Growing:
    """The plan and the branches of a fallback. They grow, because any call may use weights that no earlier call used.

    Args:
        fallback: the model and its subgraphs.
        decided: plan, branches and refusals so far.
        run: returns the run of the cascade, or None before it starts.
        tried: modes of the model in which it was compared with the eager model.
        placements: placement of the branch in the subgraphs, by weight name.
    """

    fallback: GraphBreakFallback
    decided: Decided
    run: Callable[[], Growable | None] = lambda: None
    tried: set[Hashable] = field(default_factory=set)
    placements: dict[str, str] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The plan at the stage and step of the run. Its sites have the ranks of the current branches."""
        plan = self.decided.plan
        return plan if (run := self.run()) is None else replace(plan.at_stage(run.plan.stage), step=run.plan.step)

    @property
    def branches(self) -> Sequence[Branch]:
        """The branches so far."""
        return list(self.decided.branches.values())

    @property
    def modes(self) -> Hashable:
        """The boolean attributes of the model's modules, such as `training` and `gradient_checkpointing`."""
        return tuple(
            tuple(value for value in vars(module).values() if value is True or value is False)
            for module in self.fallback.model.modules()
        )

    def comparison(self, args: Any, kwargs: Mapping[str, Any]) -> Comparison:
        """Return a comparison with the eager model on one call."""
        quantized = self._quantized()
        plain = [branch for branch in self.branches if branch not in quantized]
        return Comparison(self.fallback, plain, quantized, args, kwargs)

    def _quantized(self) -> list[Branch]:
        """Return the branches of quantized weights."""
        model = self.fallback.model
        names = quantized_in({branch.weight_name: model.get_parameter(branch.weight_name) for branch in self.branches})
        return [branch for branch in self.branches if branch.weight_name in names]

    def rewrite(self, module: fx.GraphModule) -> fx.GraphModule:
        """Insert branches into a subgraph, and return it. New sites are added to the run."""
        new = insert(Captured(module, GRAPH_BREAKS), replace(self.decided, plan=self.plan))
        assert isinstance(new.variant.module, fx.GraphModule)
        self.placements |= new.variant.placements
        self._grow(Decided(new.plan, new.branches, new.refusals, new.unreached))
        return new.variant.module

    def _grow(self, decided: Decided) -> None:
        """Replace the plan and the branches, also in the run if there are new branches."""
        if (run := self.run()) is not None and set(decided.branches) != set(self.decided.branches):
            run.grow(decided)
        self.decided = decided

    def before_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Prepare for a call: check a new mode of the model, and swap weights that Python code uses for the first time.

        While there are weights that no call has used, each call costs an extra forward of the eager model.
        """
        fallback, model = self.fallback, self.fallback.model
        # In another mode, code of the model may run again in backward: gradient checkpointing may be on.
        if (modes := self.modes) not in self.tried:
            with torch.inference_mode(False):
                with requiring_grad(model, {branch.weight_name for branch in self.branches}):
                    own_backward = not fallback.eager and bool(run_preflight(model, args, kwargs).seen.functions)
                self.settle(args, kwargs, eager=own_backward)
            self.tried.add(modes)
        # Subgraphs of this call will be rewritten when dynamo compiles them. Find the weights that Python code uses.
        weights = named_weights(model)
        used = fallback.swapped.keys() if fallback.eager else fallback.reached
        unused = weights.matrices.keys() - used - {refusal.weight for refusal in self.decided.refusals}
        traced = eager_trace(model, args, kwargs) if unused else {}
        kinds = {name: kind for name, kind in traced.items() if kind and name in unused}
        if not kinds:
            return
        self._grow(with_sites(replace(self.decided, plan=self.plan), fallback.graphs, model, kinds))
        added = {branch.weight_name: branch.on_weight for branch in self.branches if branch.weight_name in kinds}
        fallback.swap(added)

    def settle(self, args: Any, kwargs: Mapping[str, Any], eager: bool) -> None:
        """Choose how the model runs: as subgraphs if their branches get the right gradients, otherwise eagerly.

        If it runs eagerly, all sites are swapped, in forward and in code that backward runs again.

        Args:
            args, kwargs: arguments of the call for which gradients are compared.
            eager: run the model eagerly without trying the subgraphs.

        Raises:
            CaptureError: the gradients are wrong in both cases.
        """
        fallback, model = self.fallback, self.fallback.model
        if not (eager or fallback.eager or self._wrong_gradients(args, kwargs)):
            return
        for branch in self._quantized():
            raise CaptureError(
                f"{branch.weight_name} is quantized, and {type(model).__name__} runs code again in backward. There, a "
                f"branch of a quantized weight would have no effect. Exclude it (exclude=({branch.weight_name!r},)).",
                code="quantized-not-supported",
            )
        fallback.swap({branch.weight_name: branch.on_weight for branch in self.branches})
        wrong: tuple[str, ...] = ()
        # First compute each merged weight at every read, which needs less memory.
        for once in (True,) if fallback.once else (False, True):
            fallback.run_eager(once)
            wrong = self._wrong_gradients(args, kwargs)
            if not wrong:
                return
        self.comparison(args, kwargs).check_repeats({})
        module = first_difference(Disagreement(fallback, Difference("", wrong), grad=True), model, args, kwargs)
        raise CaptureError(
            f"{type(model).__name__}: the branches of {named(wrong)} would get other gradients than in the eager "
            f"model. The first module that differs is {module}. Its Python code uses these weights in a way that no "
            "module shows. Exclude them, or adapt only a part of the model."
        )

    def _wrong_gradients(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the weights whose branches get wrong gradients on one call."""
        keys = set(self.decided.branches)
        try:
            return self.comparison(args, kwargs).wrong_gradients()
        finally:
            # If forward skips layers at random, this call may have added branches. The comparison has not replaced
            # their parameters by temporary ones, so remove the gradients.
            for key, branch in self.decided.branches.items():
                if key not in keys:
                    branch.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Comparison:
    """Compares the fallback, with its branches, to the eager model with merged weights, on one call.

    Args:
        fallback: the model and its subgraphs.
        branches: the branches to compare.
        quantized: the branches of quantized weights. They cannot be merged, and are not compared.
        args, kwargs: arguments of the call.
    """

    fallback: GraphBreakFallback
    branches: Sequence[Branch]
    quantized: Sequence[Branch]
    args: Any
    kwargs: Mapping[str, Any]

    @torch.no_grad()
    def hidden(self, share: Mapping[torch.dtype, float]) -> list[str]:
        """Return the weights whose delta has less effect on the outputs than the merged delta.

        It bisects the branches, because most models have no such weight. A group of branches that agrees is not
        divided.

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
                # Reset the deltas of all branches to zero. `_differ` sets the deltas of the group.
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
        """Return the weights whose branches get other gradients than in the merged model, with every delta tried.

        Weights without a gradient in the eager model are skipped.
        """
        wrong: tuple[str, ...] | None = None
        for probe in self._probes:
            names = self._wrong_gradients(probe)
            wrong = names if wrong is None else tuple(name for name in wrong if name in names)
            if not wrong:
                break
        return wrong or ()

    def _wrong_gradients(self, probe: int) -> tuple[str, ...]:
        """Return the weights with wrong gradients, for one delta of each branch."""
        model = self.model
        weights = {branch.weight_name: model.get_parameter(branch.weight_name) for branch in self.branches}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        temporary = _temporary_parameters([*self.branches, *self.quantized])
        leaves = [value for value in writable(dict(model.named_parameters())).values() if value.is_leaf]
        with quiet(), without_gradients(leaves), temporary:
            for branch in self.branches:
                self._probe(branch, probe)
            # Expected gradients: run the eager model with merged weights, and apply the chain rule to each delta.
            merged = _merged(model, self.branches)
            with requiring_grad(model, trained | weights.keys()):
                _, fault = attempt(self._run, merged, backward=True)
            if fault is not None:  # such as a model that calls autograd.grad, and frees its graph in eval mode
                self._check_not_frozen(fault, merged)
                log.info("The backward of the eager %s raises: %s", type(model).__name__, one_line(fault))
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
            # Computed gradients: run the fallback.
            _, fault = attempt(self._run, None, backward=True)
            if fault is not None:  # torch.utils.checkpoint raises if forward and recomputation differ
                log.info("The backward of %s with graph breaks raises: %s", type(model).__name__, one_line(fault))
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
        with requiring_grad(self.model, None):
            _, other_fault = attempt(self._run, merged, backward=True)
        if other_fault is not None:
            return
        name = type(self.model).__name__
        raise CaptureError(
            f"The backward pass of {name} raises {one_line(fault)}, because parameters without a branch are frozen. It "
            "asks for the gradients of all parameters of a region, as custom gradient checkpointing does. Turn that "
            "off, use torch.utils.checkpoint, or train these parameters in full (train=...)."
        ) from fault

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.fallback.model

    @cached_property
    def coarse(self) -> bool:
        """Whether a weight has a low precision (below fp32), or autocast is on."""
        weights = [self.model.get_parameter(branch.weight_name) for branch in self.branches]
        devices = {weight.device.type for weight in weights}
        casts = any(torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) for device in devices)
        return casts or any(weight.dtype not in SUSPECT for weight in weights)

    @property
    def _probes(self) -> range:
        """Indices of the deltas to try. A difference counts only if each delta shows it."""
        return range(COARSE_PROBES if self.coarse else 1)

    def _probe(self, branch: Branch, index: int) -> None:
        """Set the parameters of a branch so that it has a delta. Each index gives another one."""
        weight = self.model.get_parameter(branch.weight_name)

        def values(parameter: torch.Tensor) -> torch.Tensor:
            entries = torch.linspace(-1, 1, parameter.numel(), device=parameter.device, dtype=parameter.dtype)
            if index:
                order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(index))
                entries = entries[order.to(entries.device)]
            return entries.view_as(parameter).clone()

        # Scale the delta relative to its weight. The delta is linear in the parameters that start at zero.
        _change_zeros(branch, values)
        norm, share = branch.dense_delta(weight).norm(), COARSE_PROBE if self.coarse else PROBE
        if norm > 0:
            factor = share * weight.norm().to(norm.dtype).clamp_min(1e-3) / norm
            _change_zeros(branch, lambda parameter: parameter * factor)
        torch.clear_autocast_cache()  # it contains casts of the old values

    def _differ(
        self, branches: Sequence[Branch], trained: Collection[str], share: Mapping[torch.dtype, float], probe: int
    ) -> bool:
        """Whether the fallback with the deltas of these branches differs from the model with the deltas merged.

        Args:
            branches: the branches that get a delta. All others have a delta of zero.
            trained: names of the parameters that require gradients in training.
            share: fraction of the effect that may be missing, by dtype of the outputs.
            probe: index of the deltas.

        Raises:
            CaptureError: the outputs differ, but the model is not deterministic.
        """
        for branch in branches:
            self._probe(branch, probe)
        merged = _merged(self.model, branches)
        computed = self._run(None)
        with requiring_grad(self.model, trained):  # as in training, because forward may read `requires_grad`
            expected, base = (self._run(values) for values in (merged, {}))
            # Under autocast an output in fp32 may be computed from products in bf16, so its dtype does not count.
            allowed = max((share.get(output.dtype, CERTAIN) for output in expected if not self.coarse), default=CERTAIN)
            # The distance between the outputs with and without the deltas is their effect. False for nan.
            same = _distance(expected, computed) <= allowed**2 * _distance(expected, base) + 1e-30
            if not same:
                self.check_repeats(merged)
        return not same

    def check_repeats(self, values: Mapping[str, torch.Tensor]) -> None:
        """Raise CaptureError if two runs of the eager model with these weights, under one seed, differ."""
        if _distance(self._run(values), self._run(values)):
            raise CaptureError(
                f"Two runs of {type(self.model).__name__} under one seed differ, so its graphs cannot be compared with "
                "it. Its forward may seed a generator itself. Make the model deterministic, for example by setting "
                "dropout to 0."
            )

    def _run(self, values: Mapping[str, torch.Tensor] | None, backward: bool = False) -> list[torch.Tensor]:
        """Run the eager model or the fallback, and return the floating-point outputs.

        Every run starts from the same seed, and leaves the model unchanged.

        Args:
            values: weights of the eager model that differ from its parameters, by name. None to run the fallback.
            backward: whether to run backward, from a random projection of the outputs.
        """
        with isolation(self.model, self.args, self.kwargs, _with_values(self.model, values or {})) as (inputs, named):
            output = self.fallback.compute(inputs, named) if values is None else self.model(*inputs, **named)
            tensors = [
                leaf for leaf in pytree.tree_leaves(output, is_leaf=is_opaque_leaf) if isinstance(leaf, torch.Tensor)
            ]
            outputs = [leaf for leaf in tensors if leaf.is_floating_point()]
            if backward:
                backward_of_projection([output for output in outputs if output.requires_grad])
        return [output.detach() for output in outputs]


def _change_zeros(branch: Branch, values: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the parameters that are zero at the start of a stage. `values` maps the current value to the new one."""
    for name in branch.zeros:
        parameter = branch.get_parameter(name)
        parameter.data = values(parameter.data)


def _norm(tensor: torch.Tensor) -> float:
    """Return the norm of a tensor, computed in fp64 on the host."""
    return float(tensor.cpu().double().norm())


def _delta(branch: Branch, model: nn.Module) -> torch.Tensor:
    """Return the delta of a branch in the dtype of its weight, differentiable in the parameters of the branch."""
    weight = model.get_parameter(branch.weight_name)
    return branch.dense_delta(weight.detach()).to(weight.dtype)


def _merged(model: nn.Module, branches: Sequence[Branch]) -> dict[str, torch.Tensor]:
    """Return `W + delta` for the weight of each branch, by name."""
    return {
        branch.weight_name: (model.get_parameter(branch.weight_name) + _delta(branch, model)).detach()
        for branch in branches
    }


@isolated
def _with_values(undo: Undo, model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Context manager: replace the values of parameters, without replacing the Parameter objects."""
    undo(torch.clear_autocast_cache)  # it contains casts of these values
    for name, value in values.items():
        parameter = model.get_parameter(name)
        undo(partial(setattr, parameter, "data", parameter.data))
        parameter.data = value
    torch.clear_autocast_cache()


@isolated
def _temporary_parameters(undo: Undo, branches: Sequence[Branch]) -> None:
    """Context manager: replace the parameters of branches by copies, and turn off dropout.

    Optimizers and hooks have no reference to the copies. Dropout is turned off because the merged model has none.
    """
    for branch in branches:
        undo(partial(branch._parameters.update, dict(branch._parameters)))
        undo(partial(setattr, branch, "training", branch.training))
        branch.training = False
        for name, parameter in dict(branch.named_parameters()).items():
            branch._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def _distance(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the squared distance of two lists of tensors, or inf if their shapes differ."""
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        return float("inf")
    return sum(float((one - two).cpu().double().square().sum()) for one, two in zip(outputs, expected, strict=True))
