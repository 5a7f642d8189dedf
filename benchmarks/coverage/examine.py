"""Compares one architecture with its own eager model, in fp64, in train and eval mode, through two stages.

The oracle is a twin: the same class built anew, which runs eagerly on weights that plain formulas give.
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
from tests.kit import compare
from tests.kit.compare import seed
from tests.kit.models import delta

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5, noise=lx.Noise(0.1), seed=3)


@dataclass
class Report:
    """What was found; `faults` is empty if all is well."""

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
    """Adapt, compare, train two stages, release, reload; report every difference from the eager model."""
    began = time.perf_counter()
    examined = _Examined(entry)
    for training in (True, False):
        examined.same_at_first(training)
        examined.same_when_merged(training)
    examined.covers()
    examined.released(examined.two_stages())
    examined.report.seconds = time.perf_counter() - began
    return examined.report


class _Examined:
    """An adapted model beside its eager twin."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.report = entry, Report(entry.name, entry.source)
        self.model, self.twin = built(entry).train(), built(entry).requires_grad_(False)
        self.report.parameters = sum(value.numel() for value in self.model.parameters())
        self.before, self.hooks = _face(self.model), _hooks(self.model)
        self.base = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.gradients: dict[str, bool] = {}
        seed(1)
        args, kwargs = entry.inputs(True)
        self.cascade = lx.adapt(self.model, args, kwargs, spec=SPEC)
        self.report.frontend, self.report.refused = self.cascade.frontend, dict(self.cascade.refused_frontends)

    def fault(self, text: str) -> None:
        self.report.faults.append(text)

    def delta(self, site: lx.Site) -> torch.Tensor:
        branch = self.cascade.branches[site.key]
        return delta(site, branch.lora_A.detach(), branch.lora_B.detach())

    def same_at_first(self, training: bool) -> None:
        """B = 0: outputs and buffers are the eager model's, bit for bit, under the same noise and seed."""
        mode = "train" if training else "eval"
        run(self.entry, self.cascade.train(training), training)  # sites that come with this mode get their noise
        self.twin.load_state_dict(self.model.state_dict())
        expected = run(self.entry, self.twin.train(training), training)
        found = run(self.entry, self.cascade, training)
        if type(found) is not type(expected):
            self.fault(f"{mode}: an output of {type(found).__name__}, not {type(expected).__name__}")
        if (gap := difference(found, expected)) != 0:
            self.fault(f"{mode}: B = 0 moves the output by {gap:.1e} of its scale")
        for (name, ours), (_, theirs) in zip(self.model.named_buffers(), self.twin.named_buffers(), strict=True):
            if not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
                self.fault(f"{mode}: buffer {name} is not the eager model's after a call")

    @torch.no_grad()
    def fill(self, std: float) -> None:
        seed(4)
        for branch in self.cascade.branches.values():
            branch.lora_B.normal_(std=std) if std else branch.lora_B.zero_()

    def same_when_merged(self, training: bool) -> None:
        """Branches are the weights W + s B A, and their gradients follow from the eager model's by the formula."""
        mode = "train" if training else "eval"
        self.fill(0.05)
        self.twin.load_state_dict(self.model.state_dict())
        merged = dict(self.twin.named_parameters())
        for site in self.cascade.sites:
            merged[site.weight].add_(self.delta(site))
        for site in self.cascade.sites:
            merged[site.weight].requires_grad_(True)
        expected = run(self.entry, self.twin.train(training), training, grad=True)
        found = run(self.entry, self.cascade.train(training), training, grad=True)
        if not (gap := difference(found, expected)) <= self.entry.tolerance:
            self.fault(f"{mode}: branches differ from merged weights by {gap:.1e} of the output's scale")
        if not _weigh(found) or not _weigh(expected):
            self.fault(f"{mode}: no output needs a gradient")
        else:
            self._compare_gradients(merged, mode)
        self.cascade.zero_grad(set_to_none=True)
        self.twin.zero_grad(set_to_none=True)
        self.twin.requires_grad_(False)
        self.fill(0.0)

    def _compare_gradients(self, merged: dict[str, nn.Parameter], mode: str) -> None:
        found, expected = [], []
        for site in self.cascade.sites:
            branch, weight = self.cascade.branches[site.key], merged[site.weight]
            factors = [factor.detach().clone().requires_grad_() for factor in (branch.lora_A, branch.lora_B)]
            full = torch.zeros_like(weight) if weight.grad is None else weight.grad
            slopes = torch.autograd.grad(delta(site, *factors), factors, full)
            expected.append(slopes)
            ours = [branch.lora_A.grad, branch.lora_B.grad]
            found.append([torch.zeros_like(s) if g is None else g for g, s in zip(ours, slopes, strict=True)])
        top = max((float(slope.abs().max()) for slopes in expected for slope in slopes if slope.numel()), default=0.0)
        for site, ours, theirs in zip(self.cascade.sites, found, expected, strict=True):
            gap = max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True)) / max(
                top, 1e-30
            )
            if not gap <= max(1e-10, 100 * self.entry.tolerance):
                self.fault(f"{mode}: the gradient of {site.weight} is off by {gap:.1e} of the largest one")
            moved = all(float(one.abs().max()) > 1e-13 * top for one in ours)
            self.gradients[site.weight] = self.gradients.get(site.weight, False) or moved

    def covers(self) -> None:
        """Sites, refusals and unreached are all weight matrices, each once; a missing gradient has a reason."""
        report, unused = self.report, self.entry.unused
        report.sites = {site.weight: site.kind for site in self.cascade.sites}
        report.refusals = {refusal.weight: str(refusal) for refusal in self.cascade.refusals}
        report.unreached = list(self.cascade.unreached)
        told = [*report.sites, *report.refusals, *report.unreached]
        matrices = [name for name, value in self.model.named_parameters() if value.dim() > 1]
        if sorted(told) != sorted(matrices):
            self.fault(f"not told, or told twice: {sorted(set(told) ^ set(matrices)) or sorted(told)}")
        for weight in (name for name, moved in self.gradients.items() if not moved):
            reason = next((text for glob, text in unused.items() if fnmatch.fnmatch(weight, glob)), None)
            if reason is None:
                self.fault(f"no gradient for {weight}")
            else:
                report.idle[weight] = reason
        for glob in unused:
            if not any(fnmatch.fnmatch(name, glob) for name in report.idle):
                self.fault(f"the zoo calls {glob} unused, and it gets a gradient")

    def two_stages(self) -> dict[str, torch.Tensor]:
        """Train two stages and return the slow weights by the formula: W0 + sum of pace * s * BA."""
        slow = dict(self.base)
        self.cascade.train()
        optimizer = torch.optim.AdamW(self.cascade.param_groups(lr=1e-2))
        for stage in self.cascade.stages(2, optimizer):
            seed(8 + stage.number)
            args, kwargs = self.entry.inputs(True)
            leaves = [leaf for leaf in _tensors(self.cascade(*args, **kwargs)) if leaf.requires_grad]
            torch.stack([(leaf * torch.randn_like(leaf)).mean() for leaf in leaves]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            for site in self.cascade.sites:
                slow[site.weight] = slow[site.weight] + SPEC.pace * self.delta(site)
        return slow

    def released(self, slow: dict[str, torch.Tensor]) -> None:
        """The released model is the user's, computes with the slow weights, and loads into a fresh one."""
        entry, twin = self.entry, self.twin
        self.cascade.eval()
        with self.cascade.weights("slow"):
            expected = run(entry, self.cascade, False, 11)
        released = self.cascade.release()
        released.train(self.before[0][""])
        if released is not self.model or _face(released) != self.before:
            self.fault("release changed modes, flags or names")
        if _hooks(released) not in (self.hooks, _hooks(twin)):
            self.fault("release leaves hooks that were not there, and that no eager call makes")
        released.eval()
        outputs = run(entry, released, False, 11)
        if (gap := difference(outputs, expected)) > 1e-12:
            self.fault(f"the released model differs from the slow weights by {gap:.1e}")
        twin.load_state_dict(released.state_dict(), strict=True)
        twin.eval()
        for (_, value), (_, same) in zip(released.named_parameters(), twin.named_parameters(), strict=True):
            same.requires_grad_(value.requires_grad)  # torch's matmul picks its kernel by this flag
        if (gap := difference(run(entry, twin, False, 11), outputs)) != 0:
            self.fault(f"a fresh model with the released state dict differs by {gap:.1e}")
        for name, value in released.named_parameters():
            scale = max(float(slow[name].abs().max()), 1e-30) if value.numel() else 1.0
            worst = float((value.detach() - slow[name]).abs().max()) / scale if value.numel() else 0.0
            if worst > 1e-12:
                self.fault(f"slow weights: {name} differs from the formula by {worst:.1e} of its scale")


def run(entry: Entry, model: Any, training: bool, start: int = 5, grad: bool = False) -> Any:
    """Call a model on inputs and draws of a seed, by the kernels that a trainable model runs."""
    seed(start)
    return compare.run(model, entry.inputs(training), grad, fused=False, start=start + 1)


def _weigh(output: Any) -> bool:
    """Go backward from a random sum of all outputs; whether any of them needs a gradient."""
    weighed = [leaf for leaf in _tensors(output) if leaf.requires_grad]
    seed(7)
    if weighed:
        torch.stack([(leaf * torch.randn_like(leaf)).sum().abs() for leaf in weighed]).sum().backward()
    return bool(weighed)


def _face(model: nn.Module) -> Any:
    """What release must leave as it was: modes, flags, names, identity."""
    modes = {name: module.training for name, module in model.named_modules()}
    flags = [(name, id(value), value.requires_grad) for name, value in model.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return modes, flags, buffers, list(model.state_dict())


def _hooks(model: nn.Module) -> Any:
    """How many hooks each module has: a model may add its own at its first call, so the twin's count is right too."""
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for name, module in model.named_modules()
    ]


def _tensors(output: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Return the floating tensors of an output, of whatever type; each object's attributes once."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() or output.is_complex() else []
    seen = set() if seen is None else seen
    if not isinstance(output, (dict, list, tuple)):
        if id(output) in seen or not hasattr(output, "__dict__"):
            return []
        seen.add(id(output))
        output = dict(vars(output))
    values = output.values() if isinstance(output, dict) else output
    return [leaf for value in values for leaf in _tensors(value, seen)]


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference over the scale of the outputs, or inf if shapes or types differ."""
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
