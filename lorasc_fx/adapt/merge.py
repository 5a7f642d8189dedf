"""Cascades that start from other runs, or from adapters of peft.

A sum of runs on the same base is `W0 + sum_i w_i S_i`, computed exactly. It has the experts of all runs, each
coefficient multiplied by the weight w_i of its run. Dense parts (collapsed deltas, parameters trained in full) are
summed in fp64 and rounded once. No rounded weight of a run is read. Related work: model soups (2203.05482), task
arithmetic (2212.04089).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike

import torch
from torch import nn

from lorasc_fx.adapt import adapt
from lorasc_fx.adapt.start import Setup, check_new
from lorasc_fx.capture import open_model
from lorasc_fx.cascade import run_of
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import install_slow
from lorasc_fx.checkpoint.reader import RunSource
from lorasc_fx.errors import CheckpointError, PassError, SpecError, named, path_of, warn
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.parameters import buffer_holders
from lorasc_fx.peft.adapter_reader import Adapter, read_adapter, spec_of
from lorasc_fx.plan import Plan, Site
from lorasc_fx.quantized import dense
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import BaseMemory, Expert, History, Part, SlowWeights, StageEnd, WeightState, summing
from lorasc_fx.util.decode import is_number
from lorasc_fx.util.fingerprint import fingerprints
from lorasc_fx.util.undo import AllOrNothing, Undo


def check_summable(call: str, plans: Mapping[str, Plan], advice: str) -> None:
    """Raise SpecError if a run scales rows (DoRA), because row scales cannot be summed. `plans` is by run name."""
    scaled = next((name for name, plan in plans.items() if plan.spec.method.magnitude), None)
    if scaled is not None:
        raise SpecError(
            f"{call}: {scaled}, has magnitudes (DoRA). Runs with magnitudes cannot be summed, because they scale rows "
            f"of the weights, and row scales do not add. {advice}",
            code="method-not-supported",
        )


def check_same_kind(call: str, run_name: str, state: WeightState, reference: WeightState) -> None:
    """Raise SpecError if a weight is a stack of matrices in one of the two states, and a single matrix in the other."""
    if state.stacked != reference.stacked and not (state.full or reference.full):
        raise SpecError(
            f"{call}: {run_name}, adapted {state.name} as another kind of matrix than the first run. Sum only runs of "
            "one model",
            code="sites-differ",
        )


def check_fits(after: SlowWeights, call: str) -> None:
    """Raise SpecError if a weight of a sum overflows its dtype."""
    if overflowing := [name for name, state in after.states.items() if not state.fits()]:
        raise SpecError(f"{call}: the sum overflows the dtype of {named(overflowing)}. Give the runs smaller numbers")


def weighted_sum(fresh: SlowWeights, parts: Sequence[Part], weights: Sequence[float], stage: int) -> SlowWeights:
    """Return `W0 + sum_i w_i S_i` for every weight of `fresh`. A run that did not adapt a weight has S = 0 there.

    Args:
        fresh: slow weights of a new cascade on the common base, with every weight of every run.
        parts: the runs.
        weights: one number w_i per run. They need not sum to 1.
        stage: number of the stage that ends with the sum.

    Raises:
        SpecError: a run has a weight that `fresh` does not have, or adapted one as another kind of matrix.
    """
    terms = list(zip(weights, parts, strict=True))
    for part in parts:
        foreign = sorted(part.slow.states.keys() - fresh.states.keys())
        if foreign:
            raise SpecError(
                f"merge: {part.name}, keeps noise in {foreign[0]}, which is not a site of the first run. Give a run "
                "with noise.where='all' first",
                code="sites-differ",
            )
    history = History((StageEnd(stage, 1.0),))
    return SlowWeights({name: _summed(state, terms, history) for name, state in fresh.states.items()}, history=history)


def _summed(fresh: WeightState, terms: Sequence[tuple[float, Part]], history: History) -> WeightState:
    """Return the sum of one weight over (weight of the run, run) pairs."""
    if fresh.full:  # there are no experts, so the values themselves are summed
        after = fresh.bare().holding(fresh.base.double() + _dense(fresh.name, fresh.base, terms))
        return replace(after, history=history, ends={history.last: after.dense["slow"]})
    experts: list[Expert] = []
    noises = []
    collapsed = False
    for weight, part in terms:
        state = part.slow.states.get(fresh.name)
        if state is None or weight == 0:
            continue
        check_same_kind("merge", part.name, state, fresh)
        for coefficient, expert in zip(state.coefficients("slow"), state.experts, strict=True):
            if coefficient != 0:
                summand = weight * coefficient
                experts.append(replace(expert, stage=0, origin=(summand, summand, summand)))
        noises += [replace(noise, amplitude=weight * noise.amplitude) for noise in state.noises]
        collapsed |= bool(state.dense)
    after = replace(fresh.bare(), experts=tuple(experts), history=history, noises=tuple(noises))
    if collapsed:  # a run whose experts were collapsed makes the sum partly dense
        delta = _dense(fresh.name, fresh.base, terms, factors=False).view(fresh.matrix).to(summing(fresh.base.dtype))
        after = replace(after, dense={"slow": delta})
    return after.compact()


def _dense(name: str, base: torch.Tensor, terms: Sequence[tuple[float, Part]], factors: bool = True) -> torch.Tensor:
    """Return the weighted sum of the deltas of one weight in fp64, in the shape of the weight.

    Without `factors` it has only the dense parts: collapsed deltas and parameters trained in full.
    """
    total = torch.zeros(base.shape, dtype=torch.float64)
    for weight, part in terms:
        state = part.slow.states.get(name)
        if weight == 0 or state is None:
            continue
        if factors or state.full:
            slow = replace(state, base=base).exact("slow", torch.float64, device=total.device)
            total += weight * (slow - dense(base).cpu().double())
        elif state.dense:
            total += weight * state.dense["slow"].cpu().double().view(base.shape)
    return total


def install_sum(run: Run, after: SlowWeights, parts: Sequence[Part], undo: Undo) -> None:
    """Start the first stage of a new cascade from a sum of runs, as part of a larger transaction.

    Buffers (running statistics) cannot be summed. A buffer that is equal in all runs is copied. All others keep the
    values of the base, with a warning.
    """
    check_fits(after, "merge")
    buffers = dict(run.model.named_buffers())
    shared = {name: parts[0].buffers[name] for name in buffers if agree(name, parts)}
    differing = [name for name, buffer in buffers.items() if name not in shared and buffer.is_floating_point()]
    install_slow(run, after, [*after.states], shared, undo)
    if differing:
        warn(
            f"merge: {len(differing)} buffers differ between the runs and keep the values of the base: "
            f"{named(differing)}. Estimate running statistics again by torch.optim.swa_utils.update_bn(batches, model)",
            "buffers-differ",
        )


def agree(name: str, parts: Sequence[Part]) -> bool:
    """Whether all runs have a buffer of this name, with the same dtype and equal values."""
    reference, *others = [part.buffers.get(name) for part in parts]
    return reference is not None and all(
        buffer is not None and buffer.dtype == reference.dtype and torch.equal(buffer.cpu(), reference.cpu())
        for buffer in others
    )


def merge(
    runs: Sequence[Cascade | str | PathLike[str]],
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: BaseMemory = "memory",
) -> Cascade:
    """Return a cascade for the weighted sum of several runs on one base model: `W = W0 + sum_i w_i S_i`.

    S_i is the sum of the experts of run i, with their coefficients. The experts of all runs are concatenated, their
    coefficients are multiplied by w_i, and the sum is rounded once. A stage that is running counts if it has trained,
    as in `release`. Runs may differ in ranks and sites: S_i = 0 for a weight that run i did not adapt. Parameters that
    were trained in full are summed too.

    Args:
        runs: checkpoint folders (the newest version of each), or cascades on copies of the base, which are left
            unchanged. The result has the spec of the first run, and its sites before additional sites of other runs.
        model, args, kwargs, base: as for `load`, which needs no inputs. The model must have the weights that every run
            adapted.
        weights: one finite number w_i for each run. By default all are equal and sum to 1. Weights with another sum are
            known as task arithmetic, and a negative weight subtracts a run.

    Returns:
        A cascade whose slow weights are the sum. It is at the start of a stage after the stages of all runs.

    Raises:
        SpecError: no runs, wrong weights, a sum that overflows the dtype of a weight, or runs that cannot be summed.
        CheckpointError: a folder has no complete checkpoint, or a run has another base. The message names the weights
            that differ.
        StateError: the model is already adapted, or a cascade was released.
        NonFiniteBranch: a running branch contains inf or nan.

        After every error, the model is unchanged.
    """
    if isinstance(runs, (str, PathLike, Cascade)) or not runs:
        raise SpecError("merge: pass a list of one or more checkpoint folders or cascades.")
    shares = _shares(weights, len(runs))
    sources = [run_of(run) if isinstance(run, Cascade) else run for run in runs]
    named_runs = [RunSource(run, f"run {number}", "merge") for number, run in enumerate(sources, start=1)]
    check_summable("merge", {run.name: run.plan for run in named_runs}, "Release the runs and sum their weights")
    opened = open_model(model)
    check_new(opened)
    with torch.inference_mode(False), AllOrNothing() as undo:
        spec_run = named_runs[0]
        start = Setup.of(opened, spec_run.plan, spec_run.frontend, (args, kwargs), base, undo, loads=True)
        # Read the runs, start a cascade with the sites of every run, and set its slow weights to the sum.
        parameters = dict(opened.named_parameters())
        digests = fingerprints(parameters)
        for run in named_runs:
            run.check_base(digests, "merge")
        parts = [run.part(parameters) for run in named_runs]
        plan = _plan(parts, named_weights(opened).names)
        try:
            cascade = replace(start, plan=plan).cascade(undo)
        except PassError as fault:
            raise SpecError(
                f"merge: the sites of these runs do not fit together: {fault}", code="sites-differ"
            ) from fault
        install_sum(run_of(cascade), weighted_sum(run_of(cascade).slow, parts, shares, plan.stage - 1), parts, undo)
        return cascade


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weight of each run.

    Raises:
        SpecError: the number of weights is wrong, or a weight is not a finite number.
    """
    if weights is None:
        return [1 / count] * count
    shares = list(weights)
    if len(shares) != count:
        raise SpecError(f"merge: {len(shares)} weights for {count} runs. Pass one weight for each run.")
    for weight in shares:
        if not is_number(weight):
            raise SpecError(f"merge: weights contains {weight!r}. Pass finite numbers.")
    return [float(weight) for weight in shares]


def _plan(parts: Sequence[Part], names: Mapping[str, tuple[str, ...]]) -> Plan:
    """Return the plan of the first run with the sites of all runs added, at a stage after the stages of all runs.

    `names` has all names of each parameter of the model.
    """
    spec = parts[0].plan.spec
    # A parameter that any run trained in full is trained in full, and cannot be a site.
    trained = {name for part in parts for name in part.slow.trained}
    sites: dict[str, Site] = {}
    for part in parts:
        for site in part.plan.sites:
            if site.weight not in trained:
                sites.setdefault(site.weight, site)
    added = sorted(trained - parts[0].slow.trained.keys())
    if added:
        spec = replace(spec, train=(*spec.train, *added), exclude=tuple(_without(spec.exclude, added, names)))
    return Plan(spec, tuple(sites.values())).at_stage(max(part.plan.stage for part in parts) + 1)


def _without(patterns: Iterable[str], added: Sequence[str], names: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    """Yield patterns that match the same names except the added ones.

    A pattern that matches an added name is replaced by the list of the other names that it matches.
    """
    for pattern in patterns:
        matching = [name for name in names if matches(pattern, names[name])]
        if set(matching) & set(added):
            yield from (name for name in matching if name not in added)
        else:
            yield pattern


def from_peft(
    folder: str | PathLike[str],
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    spec: CascadeSpec | None = None,
    frontend: str = "auto",
    base: BaseMemory = "memory",
) -> Cascade:
    """Adapt a model that already has a LoRA adapter trained by peft. The adapter becomes the first expert.

    Supports LoRA, rsLoRA, DoRA, `rank_pattern` and `alpha_pattern`, linears, transformers' Conv1D, convolutions,
    embeddings, `target_parameters`, `modules_to_save` and biases. Reads only JSON and safetensors. Needs peft
    (`pip install 'lorasc-fx[peft]'`).

    Args:
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        model: the base model of the adapter, without the adapter.
        args, kwargs, frontend, base: as for `adapt`.
        spec: the spec of the training that follows. The default is `export.peft_spec(folder, model)`. It must adapt
            every weight that the adapter has factors for, and train in full every parameter that the adapter stores in
            full.

    Returns:
        The cascade at stage 1, with new branches. Its slow weights are exactly the base with the adapter merged.

    Raises:
        CheckpointError: the adapter is damaged, belongs to another model, or is not LoRA; or the spec leaves out a part
            of it. All errors of `adapt` are raised too. The model is left unchanged.
        MissingExtra: peft is not installed.
    """
    opened = open_model(model)
    adapter = read_adapter(path_of(folder), opened)
    spec = spec if spec is not None else spec_of(adapter, opened)
    changes = adapter.by_weight(opened, spec.untie)
    cascade = adapt(opened, args, kwargs, spec=spec, frontend=frontend, base=base)
    try:
        _install(cascade, adapter, changes)
    except BaseException:
        cascade.release()
        raise
    return cascade


def _install(cascade: Cascade, adapter: Adapter, changes: Mapping[str, Expert]) -> None:
    """Make an adapter the first expert of a new cascade. `changes` has an expert for each weight, by name.

    Raises:
        CheckpointError: the spec leaves out a part of the adapter.
    """
    run, canonical = run_of(cascade), named_weights(cascade.model).canonical
    reasons = {refusal.weight: f"{refusal.reason.value} ({refusal.sentence})" for refusal in cascade.refusals}
    states, installed, left_out = dict(run.slow.states), [], []
    for name, expert in changes.items():
        weight = canonical[name]
        site = run.plan.site(weight)
        if site is None:
            left_out.append(f"{weight} is not adapted: {reasons.get(weight, 'no call has used it yet')}")
        elif expert.row_scale is not None and not site.options.method.magnitude:
            left_out.append(f"{weight} has magnitudes of DoRA: set adapter='dora'")
        else:
            states[weight] = run.slow.states[weight].added(expert)
            installed.append(weight)
    # Values that the adapter stores in full: buffers of `modules_to_save`, and parameters.
    buffers, own_buffers = {}, buffer_holders(cascade.model)
    for name, value in adapter.full.items():
        weight = canonical.get(name, "")
        if name in own_buffers:
            buffers[name] = value
        elif weight in run.slow.trained:
            states[weight] = states[weight].holding(value)
            installed.append(weight)
        elif weight:  # otherwise it is another name of a buffer
            left_out.append(f"{name} was trained in full: add it to spec.train")
    if left_out:
        raise CheckpointError(
            f"{adapter.folder}: the spec leaves out parts of the adapter: {'; '.join(left_out)}",
            code="conflicting-options",
        )
    with run.exclusive("from_peft"):
        install_slow(run, replace(run.slow, states=states), installed, buffers)
