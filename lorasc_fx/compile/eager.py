"""Run a model that has no graph: the model itself runs, and its modules read adapted weights (capture/effective.py).

The model's own Python code handles sizes, modes, hooks, caches and recomputation, so no guard is needed. But a branch
works only if every use of its weight is such a read. So in each new mode of the model, the gradients of all branches
are compared with those of the unchanged model with merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch, Decided
from lorasc_fx.capture import EAGER, OWNER, Captured, Conditions, not_captured, read_live
from lorasc_fx.capture.effective import EffectiveWeights
from lorasc_fx.capture.uses import Uses, uses_in_a_call
from lorasc_fx.check.isolation import isolation
from lorasc_fx.check.observe import attempt, one_line
from lorasc_fx.check.process_state import quiet
from lorasc_fx.check.projections import backward_of_projection, requiring_grad, without_gradients
from lorasc_fx.compile.variants import Growable, NewVariant, Variant
from lorasc_fx.errors import CaptureError, NoSites, SpecError, named
from lorasc_fx.graph import Record, named_weights
from lorasc_fx.graph.matching import survey
from lorasc_fx.passes.insert_branches import all_branches, no_sites_message
from lorasc_fx.quantized import is_quantized, writable
from lorasc_fx.signature import is_opaque_leaf
from lorasc_fx.util.torch_private import disable_dynamo
from lorasc_fx.util.undo import Undo, isolated

PROBE, PROBES = 0.5, 4
"""Norm of a delta relative to its weight in a comparison of gradients, and number of deltas that are tried.

Rounding may flip the sign of an input of a ReLU, and so change a gradient. Only some deltas cause that. If a weight is
used without its branch, every delta changes the gradient. So a difference counts only if it occurs with each delta."""
ALLOWED = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Allowed relative error of a gradient, by dtype of the weights."""
COARSE = 0.25
"""Allowed relative error of a gradient in any other dtype."""
FLOOR = 1e-2
"""A small gradient may be a sum of terms that cancel. So errors are relative to the norm of the gradient plus this
fraction of the largest norm."""


def with_uses(decided: Decided, model: nn.Module, uses: Uses | None) -> Decided:
    """Add the weights that a call used to the plan, and make their branches. `uses=None` adds no weight."""
    graph = read_live(nn.Module(), fx.Graph(), model) if uses is None else uses.graph
    record = Record(owner=OWNER, plan=decided.plan, refusals=decided.refusals)
    record = survey([graph], record, {} if uses is None else uses.kinds)
    branches = all_branches(record.plan, decided.branches, named_weights(model).parameters)
    return Decided(record.plan, branches, record.refusals, record.unreached)


def make_eager(
    captured: Captured,
    model: nn.Module,
    decided: Decided,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    earlier: EagerModel | None = None,
) -> NewVariant:
    """Adapt a model without a graph.

    Args:
        captured: the result of the capture, with the reason why there is no graph.
        model: the model. It is left unchanged until the variant is called.
        decided: the plan to follow, the existing branches, and the refusals so far.
        args, kwargs: example inputs.
        earlier: the eager model of an earlier variant, which the new variant uses too. A model has only one
            `EffectiveWeights`, because that must know the autograd nodes of all calls whose backward may still run.

    Raises:
        NoSites: no weight can be adapted.
        CaptureError: the model raises, or its branches get other gradients than in a model with merged weights.
    """
    spec = decided.plan.spec
    uses, fault = attempt(uses_in_a_call, model, args, kwargs)
    if uses is None:
        assert fault is not None
        raise not_captured(model, {**dict(captured.refused), EAGER.name: one_line(fault)}) from fault
    decided = with_uses(decided, model, uses)
    if not decided.plan.sites:
        raise NoSites(no_sites_message(decided))
    reason = "".join(reason for _, reason in captured.refused)
    for site in decided.plan.sites:
        if "weight" not in site.options.method.placements:
            raise SpecError(
                f"adapter={spec.adapter!r} does not work for {type(model).__name__}, which has no graph: the branch of "
                f"{site.weight} cannot replace its op there. Choose another adapter, or remove what prevents a graph: "
                f"{reason}",
                code="method-not-supported",
            )
    if earlier is None:
        eager = EagerModel(model, decided, uses.beside, reason)
    else:
        eager = earlier
        eager.update(decided, uses.beside)
    eager.prepare(args, kwargs)

    def attach(run: Growable) -> None:
        eager.run = ref(run)

    # If only gradient checkpointing prevents a graph, calls in eval mode should get one.
    universal = not captured.only_recomputes
    conditions = Conditions(state=None if universal else captured.conditions.state)
    variant = Variant(eager, EAGER, conditions, universal, attach, eager.weights.close, eager.placements)
    result = eager.decided
    return NewVariant(result.plan, result.branches, result.refusals, result.unreached, variant, captured.refused)


class EagerModel:
    """Runs a model whose modules read adapted weights. A call takes the arguments of the model.

    Args:
        model: the model.
        decided: plan, branches and refusals so far. Later calls may use weights that no earlier call used.
        beside: names of the weights whose branch can be added to the output of each op.
        reason: why the model has no graph. "" if no capture was tried.

    Attributes:
        run: function that returns the run of the cascade, or None before the run starts.
        placements: {weight name: placement of its branch}.
    """

    def __init__(self, model: nn.Module, decided: Decided, beside: frozenset[str], reason: str) -> None:
        self.model, self.decided, self.reason = model, decided, reason or "it runs eagerly (frontend='eager')"
        self.weights, self.placements = EffectiveWeights(model), dict[str, str]()
        self.run: Callable[[], Growable | None] = lambda: None
        if decided.plan.spec.placement == "weight" or decided.plan.spec.grid:
            self.weights.merges = True
        self._modules, self._compared = list(model.modules()), set[Hashable]()
        self.update(decided, beside)

    @disable_dynamo  # dynamo would trace the model without branches
    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Prepare for the call (see `prepare`), then run the model."""
        self.prepare(args, kwargs)
        return self.weights(*args, **kwargs)

    def prepare(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Adapt weights that no earlier call used. If the model is in a new mode, compare the gradients.

        As long as some weight has not been used by any call, each call costs an extra forward of the model.
        """
        if self._unused:
            uses = uses_in_a_call(self.model, args, kwargs)
            if any(kind and name in self._unused for name, kind in uses.kinds.items()):
                self._grow(uses)
        # In another mode the model may use weights in another way, for example by gradient checkpointing.
        mode = tuple(
            [value for module in self._modules for value in vars(module).values() if value is True or value is False]
        )
        if mode not in self._compared:
            with torch.inference_mode(False):
                self._check_gradients(args, kwargs)
            self._compared.add(mode)

    def update(self, decided: Decided, beside: frozenset[str]) -> None:
        """Make reads use the branches of a new plan. The arguments are those of the class."""
        self.decided = decided
        branches = {branch.weight_name: branch for branch in self.decided.branches.values()}
        self.weights.read_with(branches)
        refused = {refusal.weight for refusal in self.decided.refusals}
        self._unused = named_weights(self.model).matrices.keys() - branches.keys() - refused
        for name in branches:
            is_beside = name in beside and not self.weights.merges
            self.placements.setdefault(name, "beside" if is_beside else "weight")

    def _grow(self, uses: Uses) -> None:
        """Add the weights of a call to the plan, and to the run of the cascade."""
        run = self.run()
        decided = self.decided if run is None else Decided(run.plan, run.by_key, run.refusals, ())
        grown = with_uses(decided, self.model, uses)
        if run is not None and set(grown.branches) != set(decided.branches):
            run.grow(grown)
        self.update(grown, uses.beside)

    def _check_gradients(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Let a read of a weight return the merged weight if branches with the placement `beside` get wrong gradients.

        Raises:
            CaptureError: branches get wrong gradients with merged weights too.
        """
        wrong = self._wrong_gradients(args, kwargs) if not self.weights.merges else tuple(self.weights.branches)
        if wrong:
            self.weights.merges = True
            self._check_not_quantized()
            self.placements.update(dict.fromkeys(self.placements, "weight"))
            wrong = self._wrong_gradients(args, kwargs)
        if not wrong:
            return
        with requiring_grad(self.model, None), without_gradients(self._leaves):
            once, again = (self._computed(args, kwargs, {}) for _ in range(2))
        if not all(map(torch.equal, once, again)):
            raise CaptureError(
                f"Two calls of {type(self.model).__name__} under one seed differ, so a call with branches cannot be "
                "compared with them. Forward may seed a generator itself. Make the model deterministic, for example "
                "by setting dropout to 0."
            )
        raise CaptureError(
            f"{type(self.model).__name__}: the branches of {named(wrong)} would get other gradients than in the eager "
            "model: its Python code uses a weight in a way that no module shows. Exclude them, or adapt only a part of "
            "the model."
        )

    def _check_not_quantized(self) -> None:
        for name, weight in self.weights.parameters.items():
            if is_quantized(weight):
                raise CaptureError(
                    f"{name} is quantized, and {type(self.model).__name__} uses weights in a way that needs merged "
                    f"weights. Merging is not supported for a quantized weight. Exclude it (exclude=({name!r},)).",
                    code="quantized-not-supported",
                )

    # ---- Comparison with the eager model with merged weights

    @property
    def _leaves(self) -> list[nn.Parameter]:
        """The parameters of the model that may get gradients."""
        return [value for value in writable(dict(self.model.named_parameters())).values() if value.is_leaf]

    def _wrong_gradients(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[str, ...]:
        """Return the names of the weights whose branches get other gradients than in the model with merged weights."""
        weights = {name: value for name, value in self.weights.parameters.items() if not is_quantized(value)}
        dtypes = {weight.dtype for weight in weights.values()}
        kinds = {weight.device.type for weight in weights.values()}
        autocast = any(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) for kind in kinds)
        coarse = autocast or not dtypes <= ALLOWED.keys()
        allowed = COARSE if coarse else max((ALLOWED[dtype] for dtype in dtypes), default=COARSE)
        wrong = set(weights)
        for probe in range(PROBES):
            if wrong:
                wrong &= self._differing(args, kwargs, weights, probe, allowed)
        return tuple(sorted(wrong))

    def _differing(
        self, args: object, kwargs: object, weights: Mapping[str, nn.Parameter], probe: int, allowed: float
    ) -> set[str]:
        """Like `_wrong_gradients`, for one choice of the deltas: `probe` is its number."""
        model, branches = self.model, {name: self.weights.branches[name] for name in weights}
        trained = {name for name, value in model.named_parameters() if value.requires_grad} | weights.keys()
        with quiet(), without_gradients(self._leaves), _temporary_values(self.weights.branches.values()):
            for name, branch in branches.items():
                _probe(branch, weights[name], probe)
            deltas = {name: branch.dense_delta(weights[name].detach()) for name, branch in branches.items()}
            merged = {
                name: (weights[name] + delta).to(weights[name].dtype).detach()
                if not branches[name].grid
                else branches[name].on_grid(weights[name]).detach()
                for name, delta in deltas.items()
            }
            # Run the unchanged model with merged weights. Their gradients determine those of the branches.
            with requiring_grad(model, trained):
                outputs, fault = attempt(self._computed, args, kwargs, merged)
            if fault is not None:
                return set()  # the unchanged model raises too, for example because it has no gradients
            slopes = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
            expected = {
                name: torch.autograd.grad(deltas[name], list(branches[name].trainable().values()), slope.to_dense())
                for name, slope in slopes.items()
            }
            for leaf in self._leaves:
                leaf.grad = None
            # Run the model with adapted weights.
            adapted_outputs, fault = attempt(self._computed, args, kwargs, None)
            if fault is not None:  # for example, gradient checkpointing raises if forward and recomputation differ
                return set(weights)
            if not expected:
                pairs = list(zip(outputs or (), adapted_outputs or (), strict=True))
                gap = sum(_gap(adapted, output) for output, adapted in pairs)
                return set() if gap <= allowed * sum(_norm(output) for output, _ in pairs) else set(weights)
            floor = FLOOR * max(_norm(slope) for slopes in expected.values() for slope in slopes)
            return {
                name
                for name, slopes in expected.items()
                for factor, slope in zip(branches[name].trainable().values(), slopes, strict=True)
                if not _gap(factor.grad, slope) <= allowed * (_norm(slope) + floor)
            }

    def _computed(self, args: Any, kwargs: Any, merged: Mapping[str, torch.Tensor] | None) -> list[torch.Tensor]:
        """Run forward and backward, and return the floating-point outputs. `merged=None` means adapted weights."""
        with isolation(self.model, args, kwargs, _with_values(self.model, merged or {})) as (inputs, by_name):
            output = self.weights(*inputs, **by_name) if merged is None else self.model(*inputs, **by_name)
            leaves = pytree.tree_leaves(output, is_leaf=is_opaque_leaf)
            outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
            backward_of_projection([leaf for leaf in outputs if leaf.requires_grad])
        return [leaf.detach() for leaf in outputs]


def _norm(tensor: torch.Tensor) -> float:
    """Return the norm of a tensor. Entries that are inf or nan count as 0."""
    return float(tensor.cpu().double().nan_to_num(0.0, 0.0, 0.0).norm())


def _gap(gradient: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Return the norm of the difference, or nan if an entry is nan in one of them only. `None` counts as zeros."""
    if gradient is None:
        return _norm(expected)
    same = (gradient == expected) | (gradient.isnan() & expected.isnan())
    return float((gradient - expected).masked_fill(same, 0.0).cpu().double().norm())


def _probe(branch: Branch, weight: torch.Tensor, index: int) -> None:
    """Give a branch a delta of norm PROBE relative to its weight. Each `index` gives another delta."""
    parameters = [branch.get_parameter(name) for name in branch.zeros]
    for parameter in parameters:
        entries = torch.linspace(-1, 1, parameter.numel(), device=parameter.device, dtype=parameter.dtype)
        order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(index)) if index else slice(None)
        parameter.data = entries[order].view_as(parameter)
    with torch.no_grad():
        norm = branch.dense_delta(weight).norm()
        if norm > 0:
            factor = PROBE * weight.norm().to(norm.dtype).clamp_min(1e-3) / norm
            for parameter in parameters:
                parameter.data = parameter.data * factor
    torch.clear_autocast_cache()


@isolated
def _with_values(undo: Undo, model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Context manager: replace the values of parameters, without replacing the Parameter objects."""
    undo(torch.clear_autocast_cache)  # the cache contains casts of these values
    for name, value in values.items():
        parameter = model.get_parameter(name)
        undo(partial(setattr, parameter, "data", parameter.data))
        parameter.data = value
    torch.clear_autocast_cache()


@isolated
def _temporary_values(undo: Undo, branches: Any) -> None:
    """Context manager: replace the parameters of branches by copies, and turn off dropout."""
    for branch in branches:
        undo(partial(branch._parameters.update, dict(branch._parameters)))
        undo(partial(setattr, branch, "training", branch.training))
        branch.training = False
        for name, parameter in dict(branch.named_parameters()).items():
            branch._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
