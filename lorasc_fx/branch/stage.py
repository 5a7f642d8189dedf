"""What the start and the end of a stage mean for one weight; runtime and passes both compute by these functions.

Source: algorithm.md, "One site".
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from lorasc_fx.branch.branch import Branch
from lorasc_fx.branch.noise import amplitude, draw
from lorasc_fx.branch.slow import Factors, KeptNoise, SlowWeight, arithmetic
from lorasc_fx.errors import NonFiniteBranch
from lorasc_fx.spec import CascadeSpec

__all__ = ["all_finite", "check_finite", "end_stage", "factors_of", "start_differs", "start_weight", "write_start"]


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
    start = torch.empty(
        state.base.shape, dtype=state.base.dtype, device=state.base.device if device is None else device
    )
    write_start(start, state, spec, stage, noisy)
    return start


def write_start(out: torch.Tensor, state: SlowWeight, spec: CascadeSpec, stage: int, noisy: bool = True) -> None:
    """Write what `start_weight` returns into `out`, in place: of extra memory there is the noise, and where `out` is
    narrower than the arithmetic the exact weight (without noise a block of it).
    """
    dtype = arithmetic(state.base.dtype)
    if state.base.dtype not in (out.dtype, dtype):  # a narrow weight that was cast since: still of its own dtype
        out.copy_(start_weight(state, spec, stage, noisy, out.device))
    elif not (noisy and spec.noise.strength):
        state.write(out, "fast", dtype)
    else:
        exact = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
        # Drawn before anything is written: where there is no memory for it, the weight is as it was.
        noise = draw(spec.noise, spec.seed, stage, state.name, exact.shape).to(exact) if not state.kept else None
        state.write(exact, "fast", dtype)
        if size := amplitude(spec.noise, exact):
            if noise is None:  # in the room that the kept noise had
                noise = draw(spec.noise, spec.seed, stage, state.name, exact.shape).to(exact)
            exact += noise.mul_(size)
        if exact is not out:
            out.copy_(exact)


def start_differs(state: SlowWeight) -> bool:
    """Whether a stage starts from other weights than the slow ones."""
    return state.start != state.slow or state.dense_start is not state.dense_slow


def all_finite(branches: Iterable[Branch]) -> bool:
    """Whether no entry of any factor is inf or nan: one pass over them, and one look at the device.

    A finite sum says so; one that is not may have overflowed, and every entry is looked at.
    """
    branches = list(branches)
    if not branches:
        return True
    with torch.no_grad():
        sums = [factor.sum() for branch in branches for factor in (branch.lora_A, branch.lora_B)]
        each = {place: [one for one in sums if one.device == place] for place in {one.device for one in sums}}
        if all(math.isfinite(torch.stack(found).sum().item()) for found in each.values()):
            return True
        return all(branch.finite() for branch in branches)


def check_finite(branch: Branch, spec: CascadeSpec, stage: int) -> None:
    """Raise NonFiniteBranch if the branch holds inf or nan and spec.on_nonfinite is "raise"."""
    if spec.on_nonfinite == "raise" and not branch.finite():
        raise NonFiniteBranch(
            f"the branch of {branch.weight_name} holds inf or nan at the end of stage {stage}; nothing was folded. "
            "Lower the learning rate or clip gradients, or set on_nonfinite='skip' to leave such branches out"
        )


def end_stage(
    state: SlowWeight, branch: Branch | None, spec: CascadeSpec, stage: int, noisy: bool = True, checked: bool = False
) -> SlowWeight:
    """Return the slow state after the stage: the slow update, and the stage's noise where it is kept.

    `noisy` says whether the stage ran with its noise; `branch` is None for a weight that only carried noise; `checked`
    says that its factors are known to be finite.

    Raises:
        NonFiniteBranch: the branch holds inf or nan, and spec.on_nonfinite is "raise".
    """
    live = None
    if branch is not None:
        if not checked:
            check_finite(branch, spec, stage)
        if checked or branch.finite():
            live = factors_of(branch, state.base.device)
    after = state.absorb(stage, live, spec.pace, spec.restart)
    if noisy and spec.noise.keep and spec.noise.strength:
        size = amplitude(spec.noise, state.exact("fast", arithmetic(state.base.dtype)))
        after = after.with_noise(KeptNoise(spec.noise, spec.seed, stage, size))
    return after
