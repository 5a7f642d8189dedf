"""Compares one architecture with its own eager model, in fp64, in train and eval mode, through two stages.

The oracle is a twin: another instance of the class. It runs eagerly, with weights that plain formulas compute.
"""

from __future__ import annotations

import fnmatch
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from benchmarks.coverage.entry import Entry, built
from tests.forms.kit import by_formula, face, hooks
from tests.kit import compare
from tests.kit.compare import Call, assert_buffers, assert_same, loss_of, seed
from tests.kit.models import delta, randomize

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5, noise=lx.Noise(0.1), seed=3)
Tensors = dict[str, torch.Tensor]


@dataclass
class Report:
    """The weights of an architecture: adapted (with their kind), refused (with the reason), or not reached."""

    name: str
    frontend: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    seconds: float = 0.0
    fault: str = ""


def examine(entry: Entry) -> Report:
    """Adapt, compare, train two stages, release, and compare again. Raise AssertionError at the first difference."""
    start = time.perf_counter()
    model, twin = built(entry).train(), built(entry).requires_grad_(False)
    before, base = (face(model), hooks(model)), {name: value.detach().clone() for name, value in named(model).items()}
    args, kwargs = call(entry, True, start=1)
    cascade = lx.adapt(model, args, kwargs, spec=SPEC)
    moved: set[str] = set()
    for training in (True, False):
        same_at_first(entry, cascade, twin, training)
        moved |= same_as_formula(entry, cascade, twin, training)
    report = Report(
        entry.name, cascade.frontend, dict(cascade.refused_frontends),
        {site.weight: site.kind for site in cascade.sites},
        {refusal.weight: str(refusal) for refusal in cascade.refusals}, list(cascade.unreached),
    )  # fmt: skip
    reported = [*report.sites, *report.refusals, *report.unreached]
    assert sorted(reported) == sorted(name for name, value in named(model).items() if value.dim() > 1)
    idle = report.sites.keys() - moved
    unused = {weight for pattern in entry.unused for weight in fnmatch.filter(idle, pattern)}
    assert idle == unused, f"no gradient for {idle - unused}"
    for pattern in entry.unused:
        assert fnmatch.filter(idle, pattern), f"the entry says that {pattern} is unused, but it gets a gradient"
    slow = two_stages(entry, cascade, base)
    released(entry, cascade, twin, slow, before)
    report.seconds = time.perf_counter() - start
    return report


def named(model: nn.Module) -> Tensors:
    """Return {name: parameter}."""
    return dict(model.named_parameters())


def call(entry: Entry, training: bool, start: int = 5) -> Call:
    """Return random arguments of a call, drawn with the seed `start`."""
    seed(start)
    return entry.inputs(training)


def run(entry: Entry, model: Any, training: bool, start: int = 5, grad: bool = False) -> Any:
    """Call a model with seeded inputs and dropout, and with the kernels that a trainable model gets."""
    return compare.run(model, call(entry, training, start), grad, fused=False, start=start + 1)


def same_at_first(entry: Entry, cascade: lx.Cascade, twin: nn.Module, training: bool) -> None:
    """Check with B = 0 that outputs and buffers equal the eager model's bit for bit, with the same noise and seed."""
    run(entry, cascade.train(training), training)  # sites that only this mode reaches get their noise here
    twin.load_state_dict(cascade.model.state_dict())
    expected = run(entry, twin.train(training), training)
    assert_same(run(entry, cascade, training), expected)
    assert_buffers(cascade.model, twin)


def same_as_formula(entry: Entry, cascade: lx.Cascade, twin: nn.Module, training: bool) -> set[str]:
    """Check with B != 0 that outputs and gradients are those of W + s B A. Return the weights that get a gradient."""
    randomize(cascade, 4, size=0.05)
    twin.load_state_dict(cascade.model.state_dict())
    expected, factors = by_formula(cascade, twin.train(training), call(entry, training))
    output = run(entry, cascade.train(training), training, grad=True)
    assert_same(output, expected, entry.tolerance)
    loss_of(output).backward()
    loss_of(expected).backward()
    pairs = {
        site.weight: [
            tuple(torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in pair)
            for pair in zip((branch.lora_A, branch.lora_B), factors[site.weight], strict=True)
        ]
        for site in cascade.sites
        for branch in [cascade.branches[site.key]]
    }
    top = max(float(theirs.abs().max()) for pair in pairs.values() for _, theirs in pair)
    for name, pair in pairs.items():
        worst = max(float((ours - theirs).abs().max()) for ours, theirs in pair)
        assert worst <= max(1e-10, 100 * entry.tolerance) * top, f"the gradient of {name} is off by {worst / top:.1e}"
    cascade.zero_grad(set_to_none=True)
    randomize(cascade, size=0.0)
    return {name for name, pair in pairs.items() if all(float(ours.abs().max()) > 1e-13 * top for ours, _ in pair)}


def two_stages(entry: Entry, cascade: lx.Cascade, base: Tensors) -> Tensors:
    """Train two stages, and compute the slow weights by the formula: W0 plus the pace times s B A of each stage."""
    slow = dict(base)
    optimizer = torch.optim.AdamW(cascade.train().param_groups(lr=1e-2))
    for stage in cascade.stages(2, optimizer):
        loss_of(run(entry, cascade, True, start=8 + stage.number, grad=True)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for site in cascade.sites:
            branch = cascade.branches[site.key]
            slow[site.weight] = slow[site.weight] + SPEC.pace * delta(
                site, branch.lora_A.detach(), branch.lora_B.detach()
            )
    return slow


def released(entry: Entry, cascade: lx.Cascade, twin: nn.Module, slow: Tensors, before: Any) -> None:
    """Check that release returns the user's object with the slow weights, and that the twin loads its state dict."""
    with cascade.eval().weights("slow"):
        expected = run(entry, cascade, False, 11)
    model = cascade.model
    assert cascade.release() is model
    model.train()
    assert face(model) == before[0]
    assert hooks(model) in (before[1], hooks(twin))  # some models add hooks at their first eager call
    outputs = run(entry, model.eval(), False, 11)
    assert_same(outputs, expected, 1e-12)
    twin.load_state_dict(model.state_dict(), strict=True)
    for value, same in zip(model.parameters(), twin.parameters(), strict=True):
        same.requires_grad_(value.requires_grad)  # torch selects kernels by this flag
    assert_same(run(entry, twin.eval(), False, 11), outputs)
    for name, value in named(model).items():
        assert compare.difference(value, slow[name]) <= 1e-12, f"{name} is not the slow weight of the formula"
