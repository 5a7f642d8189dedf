"""Holds one architecture against its own eager model, in fp64, in train and eval mode, through two stages.

The oracle is a twin: the same class built anew, which runs eagerly on weights that plain formulas give.
"""

from __future__ import annotations

import fnmatch
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.models.entry import Entry, built, seed
from tests.models.formula import SPEC, by_formula, delta


@dataclass
class Report:
    """What was found; `faults` is empty where all is well."""

    name: str
    source: str
    frontend: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    sites: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def examine(entry: Entry) -> Report:
    """Adapt, compare, train two stages, release, reload; tell what differs from the eager model."""
    began = time.perf_counter()
    report = Report(entry.name, entry.source)
    model = built(entry).train()
    twin = built(entry).requires_grad_(False)
    report.parameters = sum(value.numel() for value in model.parameters())
    before, hooks = _face(model), _hooks(model)
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    seed(1)
    args, kwargs = entry.inputs(True)
    cascade = lx.adapt(model, args, kwargs, spec=SPEC)
    report.frontend, report.refused = cascade.frontend, dict(cascade.refused_frontends)
    gradients: dict[str, bool] = {}
    for training in (True, False):
        _same_at_first(entry, cascade, model, twin, training, report)
        with torch.no_grad():
            seed(4)
            for branch in cascade.branches.values():
                branch.lora_B.normal_(std=0.05)
        _same_when_merged(entry, cascade, model, twin, training, gradients, report)
        with torch.no_grad():
            for branch in cascade.branches.values():
                branch.lora_B.zero_()
    _covers(entry, cascade, model, gradients, report)
    slow = _two_stages(entry, cascade, base)
    _released(entry, cascade, model, twin, slow, before, hooks, report)
    report.seconds = time.perf_counter() - began
    return report


def _same_at_first(
    entry: Entry, cascade: lx.Cascade, model: nn.Module, twin: nn.Module, training: bool, report: Report
) -> None:
    """B = 0: outputs and buffers are the eager model's, bit for bit, under the same noise and seed."""
    mode = "train" if training else "eval"
    run(entry, cascade.train(training), training)  # sites that come with this mode get their noise
    twin.load_state_dict(model.state_dict())
    expected = run(entry, twin.train(training), training)
    found = run(entry, cascade, training)
    if type(found) is not type(expected):
        report.faults.append(f"{mode}: an output of {type(found).__name__}, not {type(expected).__name__}")
    if (gap := difference(found, expected)) != 0:
        report.faults.append(f"{mode}: B = 0 moves the output by {gap:.1e} of its scale")
    for (name, ours), (_, theirs) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        if not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
            report.faults.append(f"{mode}: buffer {name} is not the eager model's after a call")


def _same_when_merged(
    entry: Entry,
    cascade: lx.Cascade,
    model: nn.Module,
    twin: nn.Module,
    training: bool,
    gradients: dict[str, bool],
    report: Report,
) -> None:
    """Branches are the weights W + sBA, and their gradients are s G A^T and s B^T G of the eager model's G."""
    mode = "train" if training else "eval"
    twin.load_state_dict(model.state_dict())
    merged = dict(twin.named_parameters())
    with torch.no_grad():
        for site in cascade.sites:
            merged[site.weight].add_(delta(site, cascade.branches[site.key]))
    for site in cascade.sites:
        merged[site.weight].requires_grad_(True)
    expected = run(entry, twin.train(training), training, grad=True)
    found = run(entry, cascade.train(training), training, grad=True)
    gap = difference(found, expected)
    if not gap <= entry.tolerance:
        report.faults.append(f"{mode}: branches differ from merged weights by {gap:.1e} of the output's scale")
    if not _weigh(found) or not _weigh(expected):
        report.faults.append(f"{mode}: no output needs a gradient")
    else:
        _compare_gradients(entry, cascade, merged, mode, gradients, report)
    cascade.zero_grad(set_to_none=True)
    twin.zero_grad(set_to_none=True)
    twin.requires_grad_(False)


def _weigh(output: Any) -> bool:
    """Go backward from a random sum of all outputs; whether any of them needs a gradient."""
    weighed = [leaf for leaf in _tensors(output) if leaf.requires_grad]
    seed(7)
    if weighed:
        torch.stack([(leaf * torch.randn_like(leaf)).sum().abs() for leaf in weighed]).sum().backward()
    return bool(weighed)


def _compare_gradients(
    entry: Entry,
    cascade: lx.Cascade,
    merged: dict[str, nn.Parameter],
    mode: str,
    gradients: dict[str, bool],
    report: Report,
) -> None:
    found, expected = [], []
    for site in cascade.sites:
        branch, full = cascade.branches[site.key], merged[site.weight].grad
        slopes = by_formula(site, branch, torch.zeros_like(merged[site.weight]) if full is None else full)
        expected.append(slopes)
        ours = [value.grad for value in (branch.lora_A, branch.lora_B)]
        found.append([torch.zeros_like(s) if g is None else g for g, s in zip(ours, slopes, strict=True)])
    top = max((float(slope.abs().max()) for slopes in expected for slope in slopes if slope.numel()), default=0.0)
    for site, ours, theirs in zip(cascade.sites, found, expected, strict=True):
        gap = max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True)) / max(top, 1e-30)
        if not gap <= max(1e-10, 100 * entry.tolerance):
            report.faults.append(f"{mode}: the gradient of {site.weight} is off by {gap:.1e} of the largest one")
        moved = all(float(one.abs().max()) > 1e-13 * top for one in ours)
        gradients[site.weight] = gradients.get(site.weight, False) or moved


def _covers(entry: Entry, cascade: lx.Cascade, model: nn.Module, gradients: dict[str, bool], report: Report) -> None:
    """Sites, refusals and unreached are all weight matrices, each once; what gets no gradient is explained."""
    report.sites = {site.weight: site.kind for site in cascade.sites}
    report.refusals = {refusal.weight: str(refusal) for refusal in cascade.refusals}
    report.unreached = list(cascade.unreached)
    told = [*report.sites, *report.refusals, *report.unreached]
    matrices = [name for name, value in model.named_parameters() if value.dim() > 1]
    if sorted(told) != sorted(matrices):
        report.faults.append(f"not told, or told twice: {sorted(set(told) ^ set(matrices)) or sorted(told)}")
    for weight in (name for name, moved in gradients.items() if not moved):
        reason = next((text for glob, text in entry.unused.items() if fnmatch.fnmatch(weight, glob)), None)
        if reason is None:
            report.faults.append(f"no gradient for {weight}")
        else:
            report.idle[weight] = reason
    for glob in entry.unused:
        if not any(fnmatch.fnmatch(name, glob) for name in report.idle):
            report.faults.append(f"the zoo calls {glob} unused, and it gets a gradient")


def _two_stages(entry: Entry, cascade: lx.Cascade, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Train two stages and return the slow weights by the formula: W0 + sum of pace * s * BA."""
    slow = dict(base)
    cascade.train()
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    for stage in cascade.stages(2, optimizer):
        seed(8 + stage.number)
        args, kwargs = entry.inputs(True)
        leaves = [leaf for leaf in _tensors(cascade(*args, **kwargs)) if leaf.requires_grad]
        torch.stack([(leaf * torch.randn_like(leaf)).mean() for leaf in leaves]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for site in cascade.sites:
                slow[site.weight] = slow[site.weight] + SPEC.pace * delta(site, cascade.branches[site.key])
    return slow


def _released(
    entry: Entry,
    cascade: lx.Cascade,
    model: nn.Module,
    twin: nn.Module,
    slow: dict[str, torch.Tensor],
    before: Any,
    hooks: Any,
    report: Report,
) -> None:
    """The released model is the user's, computes with the slow weights, and loads into a fresh one."""

    cascade.eval()
    with cascade.weights("slow"):
        expected = run(entry, cascade, False, 11)
    released = cascade.release()
    released.train(before[0][""])
    if released is not model or _face(released) != before:
        report.faults.append("release changed modes, flags or names")
    if _hooks(released) not in (hooks, _hooks(twin)):
        report.faults.append("release leaves hooks that were not there, and that no eager call makes")
    released.eval()
    outputs = run(entry, released, False, 11)
    if (gap := difference(outputs, expected)) > 1e-12:
        report.faults.append(f"the released model differs from the slow weights by {gap:.1e}")
    twin.load_state_dict(released.state_dict(), strict=True)
    twin.eval()
    for (_, value), (_, same) in zip(released.named_parameters(), twin.named_parameters(), strict=True):
        same.requires_grad_(value.requires_grad)  # torch's matmul picks its kernel by this flag
    if (gap := difference(run(entry, twin, False, 11), outputs)) != 0:
        report.faults.append(f"a fresh model with the released state dict differs by {gap:.1e}")
    for name, value in released.named_parameters():
        scale = max(float(slow[name].abs().max()), 1e-30) if value.numel() else 1.0
        worst = float((value.detach() - slow[name]).abs().max()) / scale if value.numel() else 0.0
        if worst > 1e-12:
            report.faults.append(f"slow weights: {name} differs from the formula by {worst:.1e} of its scale")


def run(entry: Entry, what: Any, training: bool, start: int = 5, grad: bool = False) -> Any:
    """Call on inputs and draws of a seed.

    In eval mode torch's transformer layers run a fused kernel that has no backward, so no trainable model runs it.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.set_grad_enabled(grad):
            warnings.simplefilter("ignore")
            seed(start)
            args, kwargs = entry.inputs(training)
            seed(start + 1)
            return what(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _face(model: nn.Module) -> Any:
    """What release must leave as it was: modes, flags, names, identity."""
    modes = {name: module.training for name, module in model.named_modules()}
    flags = [(name, id(value), value.requires_grad) for name, value in model.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return modes, flags, buffers, list(model.state_dict())


def _hooks(model: nn.Module) -> Any:
    """How many hooks each module has: a model may add its own at its first call, so they are held against the twin."""
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for name, module in model.named_modules()
    ]


def _tensors(output: Any) -> list[torch.Tensor]:
    """Return the floating tensors of an output, of whatever type."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() or value.is_complex():
                found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__") and id(value) not in seen:
            seen.add(id(value))
            visit(dict(vars(value)))

    visit(output)
    return found


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference over the scale of the outputs, or inf where they have other shapes or types."""
    left, right = _tensors(found), _tensors(expected)
    if [(each.shape, each.dtype) for each in left] != [(each.shape, each.dtype) for each in right]:
        return float("inf")
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        ours, theirs = one.detach(), other.detach()
        if ours.numel() == 0 or torch.equal(ours, theirs):
            continue
        finite = ours.isfinite() & theirs.isfinite()
        if not finite.any() or not torch.equal(ours[~finite].nan_to_num(), theirs[~finite].nan_to_num()):
            return float("inf")
        scale = float(theirs[finite].abs().max())
        worst = max(worst, float((ours - theirs)[finite].abs().max()) / max(scale, 1e-30))
    return worst
