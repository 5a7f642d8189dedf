"""`lorasc_fx.merge`: one cascade from the weighted sum of several runs on the same base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from lorasc_fx.adapt.start import Start, check_new
from lorasc_fx.capture import open_model
from lorasc_fx.cascade import run_of
from lorasc_fx.cascade.sums import check_summable, install_sum, weighted_sum
from lorasc_fx.checkpoint.reader import RunSource
from lorasc_fx.errors import PassError, SpecError
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.plan import Plan, Site
from lorasc_fx.state import Part
from lorasc_fx.util.decode import is_number
from lorasc_fx.util.fingerprint import fingerprints
from lorasc_fx.util.undo import AllOrNothing


def merge(
    runs: Sequence[Cascade | str | PathLike[str]],
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: str | PathLike[str] = "memory",
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
        start = Start.of(opened, spec_run.plan, spec_run.frontend, (args, kwargs), base, undo, loads=True)
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
