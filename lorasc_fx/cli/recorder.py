"""What a run records of its cascade beside the metrics: small tables from which `lorasc-fx report` is made.

`cascade.json` at the start: sites, refusals, placements, cost. `experts.jsonl` at the end of each stage, before its
fold: the spectrum of each expert. `spectrum.json` at the end: the spectrum of each slow delta. All of it comes from
factors; no delta is formed.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import lorasc_fx as lx
from lorasc_fx.branch import dense, effective_rank, factors_of, norm_of, singular_values, slow_spectrum
from lorasc_fx.cli.run_folder import RunFolder, write_whole

__all__ = ["MOST", "record_cascade", "record_experts", "record_spectrum"]

MOST = 64
"""Singular values of a slow delta that are kept, the largest ones."""


def record_cascade(folder: RunFolder, cascade: lx.Cascade) -> None:
    """Write what was decided and what it is expected to cost."""
    total = sum(parameter.numel() for parameter in cascade.model.parameters())
    placements = cascade.placements
    about = {
        "model": type(cascade.model).__name__,
        "frontend": cascade.frontend,
        "parameters": total,
        "trainable": sum(parameter.numel() for parameter in cascade.core.trainable().values()),
        "expected_step_ratio": cascade.expected_step_ratio,
        "sites": [
            {
                "weight": site.weight,
                "kind": site.kind,
                "shape": list(site.shape),
                "rank": site.rank,
                "scale": site.scale,
                "placement": placements.get(site.weight, site.placement),
                "parameters": site.parameters,
            }
            for site in cascade.sites
        ],
        "refusals": [
            {"weight": each.weight, "node": each.node, "reason": each.reason.value, "sentence": each.sentence}
            for each in cascade.refusals
        ],
        "unreached": list(cascade.unreached),
        "refused_frontends": [list(each) for each in cascade.refused_frontends],
    }
    write_whole(folder.cascade, json.dumps(about, indent=1) + "\n")


def record_experts(folder: RunFolder, cascade: lx.Cascade, stage: int) -> None:
    """Add a line a site: norm and effective rank of the running branch, before it is folded; null where not finite."""
    with torch.no_grad(), folder.experts.open("a", encoding="utf-8") as file:
        for weight, branch in cascade.core.branches_by_weight().items():
            line: dict[str, Any] = {"stage": stage, "site": weight, "norm": None, "effective_rank": None}
            if branch.finite():
                began = cascade.core.slow.states[weight].began
                values = singular_values(factors_of(branch, torch.device("cpu"), began))
                line |= {"norm": norm_of(values), "effective_rank": effective_rank(values)}
            file.write(json.dumps(line) + "\n")


def record_spectrum(folder: RunFolder, cascade: lx.Cascade) -> None:
    """Write the largest singular values of each slow delta, its norm beside that of W0, and its effective rank."""
    found: dict[str, Any] = {}
    with torch.no_grad():
        for weight in cascade.plan.by_weight:
            state = cascade.core.slow.states[weight]
            values = slow_spectrum(state)
            base = dense(state.base).double().norm().item()
            flat = values.flatten().sort(descending=True).values
            found[weight] = {
                "values": flat[:MOST].tolist(),
                "norm": norm_of(values),
                "base_norm": base,
                "effective_rank": effective_rank(values) if values.shape[-1] else 0.0,
            }
    write_whole(folder.spectrum, json.dumps(found) + "\n")
