"""What the start and the end of a stage mean for one weight; runtime and passes both compute by these functions.

Source: algorithm.md, "One site".
"""

from __future__ import annotations

import torch

from lorasc_fx.branch.branch import Branch
from lorasc_fx.branch.noise import amplitude, draw
from lorasc_fx.branch.slow import Factors, KeptNoise, SlowWeight, arithmetic
from lorasc_fx.errors import NonFiniteBranch
from lorasc_fx.spec import CascadeSpec

__all__ = ["check_finite", "end_stage", "factors_of", "start_differs", "start_weight"]


def factors_of(branch: Branch, device: torch.device) -> Factors:
    """Return copies of the factors on a device, as the weight is stored, the scale folded in: `b @ a` is the delta."""
    with torch.no_grad():
        left, right = branch.oriented()
        return Factors((left * branch.scale).to(device), right.clone().to(device))


def start_weight(
    state: SlowWeight, spec: CascadeSpec, stage: int, noisy: bool = True, device: torch.device | None = None
) -> torch.Tensor:
    """Return `W_t = W0 + S_{t-1} + N_t` (under restart = fast `W0 + F_{t-1} + N_t`), rounded once to the weight's
    dtype.
    """
    exact = state.exact("fast", arithmetic(state.base.dtype), device=device)
    size = amplitude(spec.noise, exact) if noisy else 0.0
    if size:
        exact += draw(spec.noise, spec.seed, stage, state.name, exact.shape).to(exact) * size
    return exact.to(state.base.dtype)


def start_differs(state: SlowWeight) -> bool:
    """Whether a stage starts from other weights than the slow ones."""
    return state.start != state.slow or state.dense_start is not state.dense_slow


def check_finite(branch: Branch, spec: CascadeSpec, stage: int) -> None:
    """Raise NonFiniteBranch if the branch holds inf or nan and spec.on_nonfinite is "raise"."""
    if spec.on_nonfinite == "raise" and not branch.finite():
        raise NonFiniteBranch(
            f"the branch of {branch.weight_name} holds inf or nan at the end of stage {stage}; nothing was folded. "
            "Lower the learning rate or clip gradients, or set on_nonfinite='skip' to leave such branches out"
        )


def end_stage(
    state: SlowWeight, branch: Branch | None, spec: CascadeSpec, stage: int, noisy: bool = True
) -> SlowWeight:
    """Return the slow state after the stage: the slow update, and the stage's noise where it is kept.

    `noisy` says whether the stage ran with its noise; `branch` is None for a weight that only carried noise.

    Raises:
        NonFiniteBranch: the branch holds inf or nan, and spec.on_nonfinite is "raise".
    """
    live = factors_of(branch, state.base.device) if branch is not None else None
    if branch is not None and not branch.finite():
        check_finite(branch, spec, stage)
        live = None
    after = state.absorb(stage, live, spec.pace, spec.restart)
    if noisy and spec.noise.keep and spec.noise.strength:
        size = amplitude(spec.noise, state.exact("fast", arithmetic(state.base.dtype)))
        after = after.with_noise(KeptNoise(spec.noise, spec.seed, stage, size))
    return after
