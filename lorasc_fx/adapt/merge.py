"""`lorasc_fx.merge`: one cascade from several runs on one base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from lorasc_fx.adapt.start import Start, check_new
from lorasc_fx.capture import open_model
from lorasc_fx.cascade.sums import check_summable, install_sum, weighted_sum
from lorasc_fx.checkpoint.run_source import RunSource
from lorasc_fx.errors import PassError, SpecError
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.plan import Plan, Site
from lorasc_fx.state import Part
from lorasc_fx.util.checks import is_number
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
    """Adapt a base model by the weighted sum of several runs on it: `W0 + sum_i w_i S_i`.

    The experts are concatenated, with their coefficients multiplied, and the sum is rounded once. A running stage that
    has trained counts, as for `release`. Runs may differ in ranks and sites: a weight that a run did not adapt has
    S = 0 there. Parameters that a run trained in full are summed too.

    Args:
        runs: checkpoint folders (the newest version of each), or living cascades on copies of the base, which are only
            read. The result has the spec of the first one, and its branches where they exist.
        model, args, kwargs, base: as for `load`, which needs no inputs. The model holds the weights that every run
            adapted.
        weights: one finite number for each run; by default equal ones that sum to 1. Other sums are task arithmetic,
            and a negative weight subtracts a run.

    Returns:
        A cascade whose slow weights are the sum, at the start of a stage that no run had; it trains on or releases.

    Raises:
        SpecError: no runs, wrong weights, a sum beyond the dtype of a weight, or runs that cannot be summed.
        CheckpointError: a folder without a whole checkpoint, or a run on another base; names what differs.
        StateError: the model is adapted already, or a cascade was released.
        NonFiniteBranch: a running branch holds inf or nan. The model is left unchanged by every error.
    """
    if isinstance(runs, (str, PathLike, Cascade)) or not runs:
        raise SpecError("merge: give a list of checkpoint folders or cascades, one or more")
    shares = _shares(weights, len(runs))
    sources = [run._run if isinstance(run, Cascade) else run for run in runs]
    named_runs = [RunSource(run, f"run {number}", "merge") for number, run in enumerate(sources, start=1)]
    check_summable("merge", {run.name: run.plan for run in named_runs}, "Release the runs and sum their weights")
    opened = open_model(model)
    check_new(opened)
    with torch.inference_mode(False), AllOrNothing() as undo:
        first = named_runs[0]
        start = Start.of(opened, first.plan, first.frontend, (args, kwargs), base, undo, loads=True)
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
        install_sum(cascade._run, weighted_sum(cascade._run.slow, parts, shares, plan.stage - 1), parts, undo)
        return cascade


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    shares = list(weights)
    if len(shares) != count:
        raise SpecError(f"merge: {len(shares)} weights for {count} runs; give one a run")
    for weight in shares:
        if not is_number(weight):
            raise SpecError(f"merge: weights has {weight!r}; give finite numbers")
    return [float(weight) for weight in shares]


def _plan(parts: Sequence[Part], names: Mapping[str, tuple[str, ...]]) -> Plan:
    """Return the first run's plan, with the sites of all runs, at a stage after those of all runs."""
    first = parts[0].plan
    trained = {name for part in parts for name in part.slow.trained}
    sites: dict[str, Site] = {}
    for part in parts:
        for site in part.plan.sites:
            if site.weight not in trained:
                sites.setdefault(site.weight, site)
    added = sorted(trained - parts[0].slow.trained.keys())
    spec = first.spec
    if added:
        spec = replace(spec, train=(*spec.train, *added), exclude=tuple(_without(spec.exclude, added, names)))
    return Plan(spec, tuple(sites.values())).at_stage(max(part.plan.stage for part in parts) + 1)


def _without(patterns: Iterable[str], added: Sequence[str], names: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    """Yield the patterns. A pattern that matches an added name is replaced by the other names that it matches."""
    for pattern in patterns:
        meant = [name for name in names if matches(pattern, names[name])]
        if set(meant) & set(added):
            yield from (name for name in meant if name not in added)
        else:
            yield pattern
