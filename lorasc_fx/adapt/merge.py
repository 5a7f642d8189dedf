"""Cascades that start from other runs, or from adapters of peft.

A sum of runs on the same base is `W0 + sum_i w_i S_i`, computed exactly. It has the experts of all runs, each
coefficient multiplied by the weight w_i of its run. Dense parts (collapsed deltas, parameters trained in full) are
summed in fp64 and rounded once. No rounded weight of a run is read. Related work: model soups (2203.05482), task
arithmetic (2212.04089).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike

import torch
from torch import nn

from lorasc_fx.adapt import Setup, adapt, check_new
from lorasc_fx.capture import open_model
from lorasc_fx.cascade import run_of
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import install_slow
from lorasc_fx.checkpoint import RunSource
from lorasc_fx.errors import CheckpointError, SpecError, named, path_of, warn
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import named_weights
from lorasc_fx.parameters import buffer_holders
from lorasc_fx.peft.adapter_reader import Adapter, read_adapter
from lorasc_fx.peft.spec_from_peft import spec_of_mirror
from lorasc_fx.plan import Plan
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


def check_same_weights(parts: Sequence[Part]) -> None:
    """Raise SpecError if the runs adapted, or trained in full, other weights than the first run."""
    reference, *others = (
        {name: (state.stacked, state.full) for name, state in part.slow.states.items()} for part in parts
    )
    for part, kinds in zip(parts[1:], others, strict=True):
        if odd := sorted({name for name, _ in kinds.items() ^ reference.items()}):
            raise SpecError(
                f"merge: {part.name} and {parts[0].name} differ in what they do with {named(odd)}. Merge runs that "
                "adapt the same weights, train the same parameters in full, and keep noise in the same weights",
                code="sites-differ",
            )


def check_fits(after: SlowWeights, call: str) -> None:
    """Raise SpecError if a weight of a sum overflows its dtype."""
    if overflowing := [name for name, state in after.states.items() if not state.fits()]:
        raise SpecError(f"{call}: the sum overflows the dtype of {named(overflowing)}. Give smaller `weights`")


def weighted_sum(fresh: SlowWeights, parts: Sequence[Part], weights: Sequence[float], stage: int) -> SlowWeights:
    """Return `W0 + sum_i w_i S_i` for every weight of a new cascade. `stage` ends with the sum."""
    history = History((StageEnd(stage, 1.0),))
    states = {}
    for name, state in fresh.states.items():
        terms = [(weight, part.slow.states[name]) for weight, part in zip(weights, parts, strict=True) if weight != 0]
        states[name] = _summed(state, terms, history)
    return SlowWeights(states, history=history)


def _summed(fresh: WeightState, terms: Sequence[tuple[float, WeightState]], history: History) -> WeightState:
    """Return the sum of one weight over (weight of the run, state of the run) pairs."""
    if fresh.full:  # there are no experts, so the values themselves are summed
        delta = torch.zeros(fresh.base.shape, dtype=torch.float64)
        for weight, state in terms:
            slow = replace(state, base=fresh.base).exact("slow", torch.float64, device=delta.device)
            delta += weight * (slow - fresh.base.double())
        after = fresh.bare().holding(fresh.base.double() + delta)
        return replace(after, history=history, ends={history.last: after.dense["slow"]})
    experts: list[Expert] = []
    for weight, state in terms:
        for coefficient, expert in zip(state.coefficients("slow"), state.experts, strict=True):
            if coefficient != 0:
                summand = weight * coefficient
                experts.append(replace(expert, stage=0, origin=(summand, summand, summand)))
    noises = (replace(noise, amplitude=weight * noise.amplitude) for weight, state in terms for noise in state.noises)
    after = replace(fresh.bare(), experts=tuple(experts), history=history, noises=tuple(noises))
    # A run whose experts were collapsed makes the sum partly dense.
    dense = [weight * state.dense["slow"].cpu().double() for weight, state in terms if state.dense]
    if dense:
        after = replace(after, dense={"slow": sum(dense[1:], dense[0]).to(summing(fresh.base.dtype))})
    return after.compact()


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
    base_memory: BaseMemory = "memory",
) -> Cascade:
    """Return a cascade for the weighted sum of several runs on one base model: `W = W0 + sum_i w_i S_i`.

    S_i is the sum of the experts of run i, with their coefficients. The experts of all runs are concatenated, their
    coefficients are multiplied by w_i, and the sum is rounded once. A stage that is running counts if it has trained,
    as in `release`. The runs adapt the same weights, at any ranks. Parameters that were trained in full are summed too.

    Args:
        runs: checkpoint folders (the newest version of each), or cascades on copies of the base, which are left
            unchanged. The result has the spec and the ranks of the first run.
        model, args, kwargs, base_memory: as for `load`, which needs no inputs.
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
        start = Setup.of(opened, spec_run.plan, spec_run.frontend, (args, kwargs), base_memory, undo, loads=True)
        # Read the runs, start a cascade like the first one, and set its slow weights to the sum.
        parameters = dict(opened.named_parameters())
        digests = fingerprints(parameters)
        for run in named_runs:
            run.check_base(digests, "merge")
        parts = [run.part(parameters) for run in named_runs]
        check_same_weights(parts)
        plan = replace(parts[0].plan, stage=max(part.plan.stage for part in parts) + 1)
        cascade = replace(start, plan=plan).cascade(undo)
        install_sum(run_of(cascade), weighted_sum(run_of(cascade).slow, parts, shares, plan.stage - 1), parts, undo)
        return cascade


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weight of each run. Raise SpecError for a wrong number of weights, or an infinite one."""
    if weights is None:
        return [1 / count] * count
    shares = list(weights)
    if len(shares) != count:
        raise SpecError(f"merge: {len(shares)} weights for {count} runs. Pass one weight for each run.")
    for weight in shares:
        if not is_number(weight):
            raise SpecError(f"merge: weights contains {weight!r}. Pass finite numbers.")
    return [float(weight) for weight in shares]


def from_peft(
    folder: str | PathLike[str],
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    spec: CascadeSpec | None = None,
    frontend: str = "auto",
    base_memory: BaseMemory = "memory",
) -> Cascade:
    """Adapt a model that already has a LoRA adapter trained by peft. The adapter becomes the first expert.

    Supports LoRA, rsLoRA, DoRA, `rank_pattern` and `alpha_pattern`, linears, transformers' Conv1D, convolutions,
    embeddings, `target_parameters`, `modules_to_save` and biases. Reads only JSON and safetensors. Needs peft
    (`pip install 'lorasc-fx[peft]'`).

    Args:
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        model: the base model of the adapter, without the adapter.
        args, kwargs, frontend, base_memory: as for `adapt`.
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
    spec = spec if spec is not None else spec_of_mirror(adapter.mirror, opened)
    changes = adapter.by_weight(opened, spec.untie)
    cascade = adapt(opened, args, kwargs, spec=spec, frontend=frontend, base_memory=base_memory)
    try:
        _install(cascade, adapter, changes)
    except BaseException:
        cascade.release()
        raise
    return cascade


def _install(cascade: Cascade, adapter: Adapter, changes: Mapping[str, Expert]) -> None:
    """Make an adapter the first expert of a new cascade. Raise CheckpointError if the spec leaves out a part of it.

    `changes` has an expert for each weight, by name.
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
