"""restart_A = "gradient": lora_A of a stage starts on the leading right singular vectors of the weight's gradient.

The gradient is that of the first optimizer step of the stage, over all batches that the step accumulates. As B = 0
until then, the branch's own gradients under the new A are known exactly: dB = c s G A^T and dA = 0, where c is what
clipping or loss scaling made of dB. So the first step is the one that the new A would have made. Costs one full
gradient per site for that one step, kept apart from the weight: what clips by all gradients of a model, on one process
or on several, sees those of the trained parameters alone. Relative: LoRA-GA (2407.05000).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Branch
from lorasc_fx.runtime.watches import Fresh, Replicas, StepWatch
from lorasc_fx.shards import ProcessGroup, full_tensor, local, local_like


class GradientInitialization(Fresh):
    """Lets the sites' weights gather gradients until the next step of the optimizer that holds the branches, and starts
    lora_A from them.
    """

    def __init__(self) -> None:
        self._steps = StepWatch()
        self._weights: dict[str, nn.Parameter] = {}
        self._gathered: dict[str, torch.Tensor] = {}
        self._watches: list[Any] = []
        self._armed_by: tuple[Any, ...] = ()

    @property
    def armed(self) -> bool:
        """Whether the step is still to come."""
        return bool(self._armed_by)

    @property
    def gathering(self) -> Mapping[str, nn.Parameter]:
        """The weights whose gradients that step will look at, by name."""
        return self._weights

    @property
    def gathered(self) -> Mapping[str, torch.Tensor]:
        """Their gradients so far, by name."""
        return self._gathered

    def put(self, name: str, gradient: torch.Tensor) -> None:
        """Let the gradient of one of the weights be this one, as a checkpoint held it."""
        self._gathered[name] = gradient

    def arm(
        self,
        parameters: Mapping[str, nn.Parameter],
        branches: Mapping[str, Branch],
        replicas: Replicas,
    ) -> None:
        """Wait for the next step; the gradient is the mean over the processes that train together."""
        self.call_off()
        self._armed_by = (parameters, branches, replicas)
        self._weights = {name: parameters[name] for name in branches}
        self._steps.arm(self.before_step, before=True)
        for name, weight in self._weights.items():
            weight.requires_grad_(True)
            forget = _forgets_what_was_zeroed(self._gathered, name, branches[name])
            self._watches += [weight.register_hook(forget), branches[name].lora_B.register_hook(forget)]
            self._watches.append(weight.register_post_accumulate_grad_hook(_gathers(self._gathered, name)))

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Start lora_A, if the optimizer that is about to step holds the branches."""
        _, branches, replicas = self._armed_by
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(branch.lora_B) in held for branch in branches.values()):
            gathered = self.call_off()
            for name in [name for name in branches if name in gathered]:  # in the order of all ranks
                _initialize(branches[name], replicas.averaged(gathered[name]))

    def before_call(self, group: ProcessGroup) -> None:
        """Forget what was zeroed, before a forward on shards: gradients come past the hooks that see it elsewhere.

        Every rank must call this at the same point.
        """
        if self._gathered:
            _, branches, _ = self._armed_by
            gradients = [branches[name].lora_B.grad for name in self._gathered]
            some = [gradient is not None and bool(local(gradient).any()) for gradient in gradients]
            counts = group.sum_of(torch.tensor(some, dtype=torch.float64)).tolist()
            for name in [name for name, count in zip(self._gathered, counts, strict=True) if not count]:
                del self._gathered[name]

    def call_off(self) -> dict[str, torch.Tensor]:
        """Wait no longer; return the gradients gathered so far, by weight name."""
        gathered = self._gathered
        self._steps.disarm()
        for watch in self._watches:
            watch.remove()
        for weight in self._weights.values():
            weight.requires_grad_(False)
        self._weights, self._gathered, self._watches, self._armed_by = {}, {}, [], ()
        return gathered

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientInitialization:
        """Return one that waits for the same step, with the weights and branches of the copy: torch copies no hooks."""
        new = GradientInitialization()
        if self._armed_by:
            new.arm(*copy.deepcopy(self._armed_by, memo))
            new._gathered |= copy.deepcopy(self._gathered, memo)
        return new

    def restorer(self) -> Callable[[], None]:
        """Return what brings this state back, with the gradients gathered so far."""
        armed_by, gathered = self._armed_by, dict(self._gathered)

        def restore() -> None:
            self.call_off()
            if armed_by:
                self.arm(*armed_by)
            self._gathered |= gathered

        return restore


def _gathers(gathered: dict[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], None]:
    """Return a hook that moves a weight's gradient to those gathered."""

    def take(weight: torch.Tensor) -> None:
        if weight.grad is None:
            return
        new, weight.grad = weight.grad.detach(), None
        gathered[name] = gathered[name] + new if name in gathered else new

    return take


def _forgets_what_was_zeroed(
    gathered: dict[str, torch.Tensor], name: str, branch: Branch
) -> Callable[[torch.Tensor], None]:
    """Return a hook for both gradients: the weight's goes where the branch's was zeroed (a batch that was discarded, a
    step that a loss scaler skipped), as no optimizer holds the weight. It acts once a backward, before the first of
    the two gathers.
    """
    last = -1

    def forget(_gradient: torch.Tensor) -> None:
        nonlocal last
        task, last = last, torch._C._current_graph_task_id()
        if last != task and (branch.lora_B.grad is None or not branch.lora_B.grad.any()):
            gathered.pop(name, None)

    return forget


@torch.no_grad()
def _initialize(branch: Branch, gradient: torch.Tensor) -> None:
    """Start lora_A from the gradient of the weight, which is gathered where it lies in shards."""
    own_slope = branch.lora_B.grad
    if own_slope is None:
        return
    whole, gradient, slope = branch.whole(), full_tensor(gradient), full_tensor(own_slope).clone()
    left, right = whole.oriented()
    matrix = gradient.reshape(*left.shape[:-1], right.shape[-1]).to(whole.lora_A.dtype)
    matrix = matrix.transpose(-2, -1) if branch.transposed else matrix
    if not torch.isfinite(matrix).all():
        return
    slopes = slope.split(branch.slices) if branch.slices else (slope,)
    for (a, _, rows), b_grad in zip(whole.pairs(matrix), slopes, strict=True):
        old = branch.scale * rows @ a.transpose(-2, -1)
        weight = old.square().sum()
        share = (b_grad * old).sum() / weight if weight > 0 else torch.ones_like(weight)
        _, _, singular = torch.linalg.svd(rows, full_matrices=False)
        count = min(a.shape[-2], singular.shape[-2])
        a[..., :count, :] = singular[..., :count, :] * a.norm(dim=-1).mean()
        b_grad.copy_(share * branch.scale * rows @ a.transpose(-2, -1))
    local(branch.lora_A).copy_(local_like(whole.lora_A, branch.lora_A))
    local(own_slope).copy_(local_like(slope, own_slope))
    if branch.lora_A.grad is not None:
        branch.lora_A.grad.zero_()
