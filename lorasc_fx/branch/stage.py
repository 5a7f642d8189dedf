"""What the start and the end of a stage mean for one weight; runtime and passes both compute by these functions.

Source: algorithm.md, "One site".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch

from lorasc_fx.branch.branch import Branch
from lorasc_fx.branch.noise import amplitude, draw
from lorasc_fx.branch.quantized import is_quantized
from lorasc_fx.branch.rows import Rows, local, whole
from lorasc_fx.branch.slow import Factors, KeptNoise, SlowWeight, Which, arithmetic
from lorasc_fx.errors import NonFiniteBranch, SpecError
from lorasc_fx.spec import CascadeSpec

__all__ = [
    "all_finite",
    "check_finite",
    "end_stage",
    "factors_of",
    "fits",
    "start_differs",
    "start_weight",
    "write_start",
]

log = logging.getLogger("lorasc_fx")

_ADVICE = "Lower the learning rate or clip gradients, or set on_nonfinite='skip' to leave such branches out"


def factors_of(branch: Branch, device: torch.device, rows: Rows | None = None) -> Factors:
    """Return copies of the factors on a device, as the weight is stored, the scale folded in: `b @ a` is the delta.

    With rows `b @ a` is that of those: of a factor that is sharded as the weight is, its own rows are taken without a
    word to the other processes.
    """
    with torch.no_grad():
        left, right = branch.oriented()
        axis, stacked = rows.axis if rows is not None else None, right.dim() > 2
        left = _rows_of(left, rows) if rows is not None and axis == 0 else whole(left)
        right = _rows_of(right, rows) if rows is not None and (stacked or axis == 1) else whole(right)
        return Factors((left * branch.scale).to(device), right.clone().to(device))


def _rows_of(factor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return rows of a factor: its own shard where that is cut along them, else of all of it, which is small."""
    if any(each.is_shard(rows.axis) for each in getattr(factor, "placements", ())):
        return local(factor)
    return rows.of_whole(whole(factor))


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
        rows = state.rows
        noise = draw(spec.noise, spec.seed, stage, state.name, exact.shape, rows).to(exact) if not state.kept else None
        state.write(exact, "fast", dtype)
        size = amplitude(spec.noise, exact, rows)
        if not math.isfinite(size):
            raise SpecError(
                f"noise.strength is {spec.noise.strength}, and {state.name} holds inf or nan, or numbers too far apart"
                f": no noise has a size for it. Exclude it (exclude=({state.name!r},)), or give 0"
            )
        if size:
            if noise is None:  # in the room that the kept noise had
                noise = draw(spec.noise, spec.seed, stage, state.name, exact.shape, rows).to(exact)
            exact += noise.mul_(size)
        if exact is not out:
            out.copy_(exact)
        if size > torch.finfo(out.dtype).max * torch.finfo(out.dtype).eps / 64 and not bool(torch.isfinite(out).all()):
            raise SpecError(
                f"noise.strength is {spec.noise.strength}: in stage {stage} it takes {state.name} beyond {out.dtype}. "
                f"Give less, or exclude it (exclude=({state.name!r},))"
            )


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
        sums = [local(factor).sum() for branch in branches for factor in (branch.lora_A, branch.lora_B)]
        each = {place: [one for one in sums if one.device == place] for place in {one.device for one in sums}}
        if all(math.isfinite(torch.stack(found).sum().item()) for found in each.values()):
            return True
        return all(branch.finite() for branch in branches)


def check_finite(branch: Branch, spec: CascadeSpec, stage: int) -> None:
    """Raise NonFiniteBranch if the branch holds inf or nan and spec.on_nonfinite is "raise"."""
    if spec.on_nonfinite == "raise" and not branch.finite():
        raise NonFiniteBranch(
            f"the branch of {branch.weight_name} holds inf or nan at the end of stage {stage}; nothing was folded. "
            f"{_ADVICE}"
        )


def end_stage(
    state: SlowWeight,
    branch: Branch | None,
    spec: CascadeSpec,
    stage: int,
    noisy: bool = True,
    checked: bool = False,
    left_out: set[str] | None = None,
) -> SlowWeight:
    """Return the slow state after the stage: the slow update, and the stage's noise where it is kept.

    A branch that is not finite, or that would take an entry of the weight beyond its dtype, is not folded.

    Args:
        state: of the weight when the stage started.
        branch: None for a weight that only carried noise.
        spec, stage: of the plan.
        noisy: whether the stage ran with its noise.
        checked: whether the factors are known to be finite.
        left_out: gets the name of a weight whose branch was left out.

    Raises:
        NonFiniteBranch: the branch cannot be folded, and spec.on_nonfinite is "raise".
    """
    after = None
    if branch is not None:
        fault = "holds inf or nan"
        if checked or state.every(branch.finite()):
            factors = factors_of(branch, state.base.device, state.rows)
            folded = state.absorb(stage, factors, spec.pace, spec.restart)
            fault = "" if state.every(fits(folded)) else f"takes it beyond {state.base.dtype}"
            after = None if fault else folded
        if fault and spec.on_nonfinite == "raise":
            raise NonFiniteBranch(
                f"the branch of {branch.weight_name} {fault} at the end of stage {stage}; nothing was folded. {_ADVICE}"
            )
        if fault:
            log.warning("the branch of %s %s at the end of stage %d: it was left out", state.name, fault, stage)
            if left_out is not None:
                left_out.add(state.name)
    if after is None:
        after = state.absorb(stage, None, spec.pace, spec.restart)
    if noisy and spec.noise.keep and spec.noise.strength:
        size = amplitude(spec.noise, state.exact("fast", arithmetic(state.base.dtype)), state.rows)
        after = after.with_noise(KeptNoise(spec.noise, spec.seed, stage, size))
    return after


def fits(state: SlowWeight) -> bool:
    """Whether slow and start weights, rounded to the dtype of W0, are finite wherever W0 is.

    They are looked at only where a bound on what was added leaves it open: what is less than half the distance of the
    two largest numbers of a dtype makes no finite number infinite.
    """
    if is_quantized(state.base):
        return all(math.isfinite(expert.factors.bound) for expert in state.experts)
    limits = torch.finfo(state.base.dtype)
    room = limits.max * limits.eps / 8
    if state.reach("slow") < room and state.reach("start") < room:
        return True
    known = torch.isfinite(state.base)
    both: tuple[Which, ...] = ("slow", "fast") if start_differs(state) else ("slow",)
    for which in both:
        value = state.exact(which, arithmetic(state.base.dtype)).to(state.base.dtype)
        if not bool((torch.isfinite(value) | ~known).all()):
            return False
    return True
