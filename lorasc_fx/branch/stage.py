"""What the start and the end of a stage mean for one weight; runtime and passes both compute by these functions.

Source: algorithm.md, "One site".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from lorasc_fx.branch.began import began_of, factors_of, has_trained, leading
from lorasc_fx.branch.branch import Branch
from lorasc_fx.branch.dora import DoraBranch
from lorasc_fx.branch.kept import Began, KeptNoise
from lorasc_fx.branch.noise import amplitude, draw, row_sizes
from lorasc_fx.branch.quantized import is_quantized
from lorasc_fx.branch.rows import local
from lorasc_fx.branch.slow import SlowWeight, Which
from lorasc_fx.branch.sums import arithmetic
from lorasc_fx.errors import NonFiniteBranch, SpecError, warn
from lorasc_fx.plan import Site
from lorasc_fx.spec import CascadeSpec

__all__ = [
    "all_finite",
    "begin_stage",
    "check_finite",
    "end_stage",
    "fits",
    "gain_of",
    "start_differs",
    "start_weight",
    "write_start",
]

_LOWER = "Lower the learning rate or clip gradients"
_ADVICE = f"{_LOWER}, or set on_nonfinite='skip' to leave such branches out"


def start_weight(
    state: SlowWeight,
    spec: CascadeSpec,
    stage: int,
    noisy: bool = True,
    device: torch.device | None = None,
    step: int = 0,
) -> torch.Tensor:
    """Return `W_t = W0 + S_{t-1} + N_t` (under restart = fast `W0 + F_{t-1} + N_t`), less what the branch took out of
    it, rounded once to the weight's dtype.
    """
    start = torch.empty(
        state.base.shape, dtype=state.base.dtype, device=state.base.device if device is None else device
    )
    write_start(start, state, spec, stage, noisy, step)
    return start


def write_start(
    out: torch.Tensor, state: SlowWeight, spec: CascadeSpec, stage: int, noisy: bool = True, step: int = 0
) -> None:
    """Write what `start_weight` returns into `out`, in place: of extra memory there is the noise, and where `out` is
    narrower than the arithmetic the exact weight (without noise a block of it).
    """
    dtype = arithmetic(state.base.dtype)
    if state.base.dtype not in (out.dtype, dtype):  # a narrow weight that was cast since: still of its own dtype
        out.copy_(start_weight(state, spec, stage, noisy, out.device, step))
    elif not (noisy and spec.noise.strength):
        state.write(out, "fast", dtype, state.taken_out)
    else:
        exact = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
        # Drawn before anything is written: where there is no memory for it, the weight is as it was.
        key, part = (spec.noise, spec.seed, stage, state.name, exact.shape, step), state.part
        noise = draw(*key, part).to(exact) if not state.kept else None
        state.write(exact, "fast", dtype)
        by_rows = spec.noise.distribution == "filter" and exact.numel() > 0
        rows = row_sizes(spec.noise, exact, state.stacked, state.turned) if by_rows else None
        size = amplitude(spec.noise, exact, part) if rows is None else rows.max().item()
        if not math.isfinite(size):
            raise SpecError(
                f"noise.strength is {spec.noise.strength}, and {state.name} holds inf or nan, or numbers too far apart"
                f": no noise has a size for it. Exclude it (exclude=({state.name!r},)), or give 0"
            )
        if state.began is not None:
            state.write(exact, "fast", dtype, state.taken_out)
        if size:
            if noise is None:  # in the room that the kept noise had
                noise = draw(*key, part).to(exact)
            exact += noise.mul_(size if rows is None else rows)
        if exact is not out:
            out.copy_(exact)
        if size > torch.finfo(out.dtype).max * torch.finfo(out.dtype).eps / 64 and not bool(torch.isfinite(out).all()):
            raise SpecError(
                f"noise.strength is {spec.noise.strength}: in stage {stage} it takes {state.name} beyond {out.dtype}. "
                f"Give less, or exclude it (exclude=({state.name!r},))"
            )


def begin_stage(
    state: SlowWeight, branch: Branch, site: Site, spec: CascadeSpec, stage: int, a: torch.Tensor, noisy: bool = True
) -> tuple[SlowWeight, Branch]:
    """Return the state of a stage whose branch starts from the weight, and a copy of the branch as it starts: factors
    out of the weight (`spec.start`) where the stage runs, and magnitudes that leave the weight as it is.

    Args:
        state: that the stage starts from.
        branch: of the weight.
        site, spec, stage: of the plan; the copy has the rank of this site.
        a: lora_A as LoRA starts it.
        noisy: whether the stage runs; else its weight is without noise, and B = 0.
    """
    started = copy.deepcopy(branch)
    started.to_rank(site)
    with torch.no_grad():
        values = [a, torch.zeros_like(started.lora_B)]
        if spec.start != "lora" and noisy:
            exact = state.exact("fast", arithmetic(state.base.dtype), device=branch.lora_A.device)
            values = list(leading(spec.start, started, exact, a))
        for factor, value in zip((started.lora_A, started.lora_B), values, strict=True):
            factor.copy_(value)
        began = Began(began_of(started) if spec.start != "lora" and noisy else None)
        state = replace(state, began=began)
        if isinstance(started, DoraBranch):
            weight = start_weight(state, spec, stage, noisy, branch.lora_A.device)
            started.lora_magnitude_vector.copy_(started.norms(weight))
            magnitude = started.lora_magnitude_vector.double().cpu().clone()
            state = replace(state, began=replace(began, magnitude=magnitude))
    return state, started


def gain_of(
    branch: Branch, state: SlowWeight, spec: CascadeSpec, stage: int, noisy: bool = True
) -> torch.Tensor | None:
    """Return the row scale g [out] of a branch with magnitudes, in fp64 on the host: with the weight that it trained
    on, noise included. None for any other branch.
    """
    if not isinstance(branch, DoraBranch):
        return None
    with torch.no_grad():
        return branch.gain(start_weight(state, spec, stage, noisy, branch.lora_A.device)).double().cpu()


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
        sums = [local(factor).sum() for branch in branches for factor in branch.parameters()]
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
    share: float | None = None,
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
        share: of the new slow weights in their average over stages; None where none is kept.

    Raises:
        NonFiniteBranch: the branch cannot be folded, and spec.on_nonfinite is "raise".
    """
    after, pace = None, spec.pace_at(stage)
    if branch is not None:
        fault = "holds inf or nan"
        if checked or state.every(branch.finite()):
            moved = not state.every(not has_trained(branch, state.began))
            live = factors_of(branch, state.base.device, state.began, state.part) if moved else None
            gain = gain_of(branch, state, spec, stage, noisy) if moved else None
            folded = state.absorb(stage, live, pace, spec.restart, share, gain)
            fault = "" if state.every(fits(folded)) else f"takes it beyond {state.base.dtype}"
            after = None if fault else folded
        if fault and spec.on_nonfinite == "raise":
            raise NonFiniteBranch(
                f"the branch of {branch.weight_name} {fault} at the end of stage {stage}; nothing was folded. {_ADVICE}"
            )
        if fault:
            warn(f"the branch of {state.name} {fault} at the end of stage {stage}: it was left out. {_LOWER}")
            if left_out is not None:
                left_out.add(state.name)
    if after is None:
        after = state.absorb(stage, None, pace, spec.restart, share)
    if noisy and spec.noise.keep and spec.noise.strength:
        size = amplitude(spec.noise, state.exact("fast", arithmetic(state.base.dtype)), state.part)
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
