"""The start and the end of a stage for one weight. The cascade and the passes both call these functions.

Source: docs/algorithm.md, "One site".

PiSSA (2404.02948) and OLoRA (2406.01775) subtract initial factors from the weight. During the stage the parameter holds
the residual `W_t - s B_0 A_0`, so that the branch changes nothing at the start. The delta of the stage is
`s (B A - B_0 A_0)`. It is kept as one pair of twice the rank, `[B - B_0, B_0] [A; A - A_0]`. Both of its terms are as
small as the change, and exactly zero before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from lorasc_fx.branch import (
    BUILT_IN,
    Branch,
    Delta,
    Factors,
    InitialFactors,
    Side,
    StartWeight,
    amplitude,
    check_registered,
    draw,
)
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.branch.noise import add_noise, noise_size
from lorasc_fx.errors import NonFiniteBranch, SpecError, warn
from lorasc_fx.plan import Site
from lorasc_fx.shards import full_tensor, local, shard_of
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state.factor_products import Scratch, arithmetic, cast, exact_products
from lorasc_fx.state.weight import History, KeptNoise, WeightState

Learner = Branch | torch.Tensor
"""The trained part of a weight in a stage: its branch, or the parameter itself if it is trained in full."""

_LOWER = "Lower the learning rate or clip gradients"


def start_weight(
    state: WeightState,
    spec: CascadeSpec,
    stage: int,
    noisy: bool = True,
    device: torch.device | None = None,
    step: int = 0,
) -> torch.Tensor:
    """Return the weight that a stage trains on, in the shape of the weight, rounded once to its dtype.

    This is `W_t = W0 + S_{t-1} + N_t`, or `W0 + F_{t-1} + N_t` under restart="fast", minus the initial factors of the
    branch (docs/algorithm.md, "start of stage t").

    Args:
        state: state of the weight.
        spec, stage: of the plan.
        noisy: whether to add the noise N_t if the spec has noise.
        device: device of the result, by default the device of W0.
        step: number of optimizer steps in the stage, if noise is drawn again after each.

    Raises:
        SpecError: as for `write_start`.
    """
    start = torch.empty(
        state.base.shape, dtype=state.base.dtype, device=state.base.device if device is None else device
    )
    write_start(start, state, spec, stage, noisy, step)
    return start


def write_start(
    out: torch.Tensor,
    state: WeightState,
    spec: CascadeSpec,
    stage: int,
    noisy: bool,
    step: int,
    scratch: Scratch | None = None,
) -> None:
    """Write the weight that `start_weight` returns into `out`.

    The noise depends on (seed, stage, step, weight name) and is drawn block by block. If `out` is narrower than the
    arithmetic, the exact weight is computed in `scratch`.

    Raises:
        SpecError: the standard deviation of the weight is not finite, or the noise exceeds the range of its dtype.
    """
    dtype = arithmetic(state.base.dtype)
    if state.base.dtype not in (out.dtype, dtype):  # the parameter was cast since: round to the dtype of W0 first
        out.copy_(start_weight(state, spec, stage, noisy, out.device, step))
        return
    if not noisy or not spec.noise.is_on or state.full:
        state.write(out, "fast", dtype, state.residual)
        return
    # Initial factors are subtracted last, because the noise depends on the standard deviation of the full weight.
    exact = out if out.dtype == dtype else (scratch or Scratch()).like(out, dtype)
    state.write(exact, "fast", dtype)
    size = noise_size(spec.noise, exact, state.stacked, state.transposed, state.shard)
    largest = size if isinstance(size, float) else float(size.max()) if size.numel() else 0.0
    if not math.isfinite(largest):
        raise SpecError(
            f"noise.strength is {spec.noise.strength}, and the standard deviation of {state.name} is not finite: it "
            "holds inf or nan, or numbers whose squares overflow. So its noise is undefined. "
            f"Give exclude=({state.name!r},) or noise.strength=0"
        )
    if state.initial is not None:
        state.write(exact, "fast", dtype, state.residual)
    if largest:
        address = (spec.noise, spec.seed, stage, state.name)
        add_noise(exact, draw(*address, exact.shape, step, state.shard, exact.device), size)
    if exact is not out:
        out.copy_(exact)
    # A check of all entries takes a pass over the weight, so it is skipped unless the noise could overflow the dtype.
    limits = torch.finfo(out.dtype)
    if largest > limits.max * limits.eps / 64 and not bool(torch.isfinite(out).all()):
        raise SpecError(
            f"noise.strength is {spec.noise.strength}: in stage {stage} the noise makes {state.name} overflow "
            f"{out.dtype}. Give a smaller strength, or exclude=({state.name!r},)"
        )


def start_weight_of(
    state: WeightState, spec: CascadeSpec, stage: int, noisy: bool, device: torch.device
) -> StartWeight:
    """Return the start weight of a stage as the object that branches expect. It computes values lazily."""
    return StartWeight(
        exact=lambda: state.whole(state.exact("fast", arithmetic(state.base.dtype), device=device), Side.WEIGHT),
        noisy=lambda: start_weight(state, spec, stage, noisy, device),
        shard=state.shard,
        cut=state.cut,
        gather=state.whole,
    )


def begin_stage(
    state: WeightState,
    branch: Branch,
    site: Site,
    spec: CascadeSpec,
    stage: int,
    keep: bool = True,
    noisy: bool = True,
    left_out: bool = False,
) -> tuple[WeightState, Branch]:
    """Start a stage: return its state, and a new branch with its initial values as plain tensors.

    If the weight is sharded, every rank must call this at the same point, because a decomposition gathers the weight.

    Args:
        state: state of the weight after the stage before.
        branch: branch of the stage before.
        site, spec, stage: of the plan of the new stage. The new branch has the rank of this site.
        keep: whether the new branch keeps the factors that the spec says (A, or both).
        noisy: whether the new stage runs. If it waits, its weight has no noise, and no factors are subtracted from it.
        left_out: whether the fold before left the weight out. Then its branch does not keep both factors.

    Raises:
        SpecError: the branch starts from a decomposition, and the weight holds inf or nan, or the branch is of a
            registered class and does not keep the contract of `Branch`.
    """
    parameter = next(branch.parameters()).detach()
    started = type(branch)(site, spec.seed, stage, parameter)
    initial = InitialFactors()
    with torch.no_grad():
        # The fold has added the kept factors to the weight, so they are subtracted from it like other initial factors.
        if keep and started.follow(branch, spec, pairs=noisy and not left_out):
            assert isinstance(started, LoraBranch)
            initial = InitialFactors(started.exact_factors().map(state.cut))
        if "factors" in started.starts_from(spec, noisy):
            assert isinstance(started, LoraBranch)
            exact = state.exact("fast", arithmetic(state.base.dtype), device=parameter.device)
            a, b = decomposed(state.whole(exact, Side.WEIGHT), started, spec)
            # Broadcast the factors, because a decomposition does not have the same bits on all machines.
            started.set_factors(state.shard.group.broadcast(b), state.shard.group.broadcast(a))
            initial = InitialFactors(started.exact_factors().map(state.cut))
        state = replace(state, initial=initial)
        initial = replace(
            initial, magnitude=started.start(start_weight_of(state, spec, stage, noisy, parameter.device))
        )
        if initial.factors is None and type(started) not in BUILT_IN:
            check_registered(started, site, lambda: state.exact("fast", arithmetic(state.base.dtype)))
    unchanged = initial.factors is None and initial.magnitude is None
    return replace(state, initial=None if unchanged else initial), started


def all_finite(branches: Iterable[Branch]) -> bool:
    """Whether no parameter of any branch holds inf or nan. Entries are checked only if a sum is not finite."""
    branches = list(branches)
    factors = [factor for branch in branches for factor in branch.parameters()]
    return sums_are_finite(factors) or all(branch.finite() for branch in branches)


def sums_are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the sum of each tensor is finite, with one synchronization per device.

    If so, all entries are finite. The reverse does not hold, because a sum of finite entries may overflow.
    """
    with torch.no_grad():
        sums = [local(tensor).sum() for tensor in tensors]
        devices = {total.device for total in sums}
        by_device = [torch.stack([total for total in sums if total.device == device]) for device in devices]
        return all(math.isfinite(totals.sum().item()) for totals in by_device)


def check_finite(branch: Branch, spec: CascadeSpec, stage: int) -> None:
    """Raise NonFiniteBranch if the branch holds inf or nan and spec.on_nonfinite is "raise"."""
    if spec.on_nonfinite == "raise" and not branch.finite():
        raise _not_folded(f"the branch of {branch.weight_name} holds inf or nan at the end of stage {stage}")


def _not_folded(fault: str) -> NonFiniteBranch:
    return NonFiniteBranch(
        f"{fault}; nothing was folded. {_LOWER}, or set on_nonfinite='skip' to leave such weights out of the fold"
    )


def end_stage(
    state: WeightState,
    learner: Learner | None,
    spec: CascadeSpec,
    history: History,
    noisy: bool,
    checked: bool,
    keeps: bool = False,
) -> tuple[WeightState, bool]:
    """End a stage: return the slow state after it, and whether the weight was left out of the fold.

    A weight is left out if its trained values are not finite, or if the fold would make it overflow its dtype. Then it
    keeps the value that the stage started from. The noise of the stage is added to the state if `noise.keep` is set.

    Args:
        state: state of the weight in the stage.
        learner: the branch, or the parameter trained in full. None for a weight that only has noise.
        spec: of the plan.
        history: the history of the weight with this stage.
        noisy: whether the stage ran, so that its weight had noise.
        checked: whether the factors of branches are known to be finite.
        keeps: whether a parameter trained in full keeps its values at the ends of earlier stages.

    Raises:
        NonFiniteBranch: the weight would be left out, and spec.on_nonfinite is "raise".
    """
    stage, on_all = history.ends[-1].number, state.shard.group.all
    after, fault = None, ""
    if state.full:
        assert isinstance(learner, torch.Tensor)
        value = local(learner).detach().to("cpu", copy=True)
        finite = on_all(not state.broken(value))
        fault = "" if finite else f"{state.name}, which is trained in full, holds inf or nan"
        pace = history.ends[-1].pace if state.follows(spec) else 1.0
        after = state.absorb_value(value if finite else None, history, pace, keeps)
    elif isinstance(learner, Branch) and (checked or on_all(learner.finite())):
        # All ranks must agree, because each rank has the same number of experts.
        moved = not on_all(not has_trained(learner, state))
        delta = delta_of(learner, state, spec, stage, noisy, state.base.device) if moved else None
        after = state.absorb(delta, history, spec.carry_rank)
        if not on_all(after.fits()):
            after, fault = None, f"the branch of {state.name} makes the weight overflow {state.base.dtype}"
    elif learner is not None:
        fault = f"the branch of {state.name} holds inf or nan"
    if fault and spec.on_nonfinite == "raise":
        raise _not_folded(f"{fault} at the end of stage {stage}")
    if fault:
        warn(
            f"{fault} at the end of stage {stage}. The weight is reset to the start of the stage. {_LOWER}",
            "non-finite-left-out",
        )
    if after is None:
        after = state.absorb(None, history, spec.carry_rank)
    if noisy and spec.noise.is_on and spec.noise.keep and not state.full:
        size = amplitude(spec.noise, state.exact("fast", arithmetic(state.base.dtype)), state.shard)
        after = replace(after, noises=(*after.noises, KeptNoise(spec.noise, spec.seed, stage, size)))
    return after, bool(fault)


def decomposed(weight: torch.Tensor, branch: LoraBranch, spec: CascadeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Decompose a weight into initial factors by `spec.start` (PiSSA, OLoRA and others).

    If the branch has a larger rank than the matrix, the remaining rows of A keep LoRA's values. The remaining columns
    of B are zero.

    Args:
        weight: the full weight in its stored layout. Slices of a fused weight, and experts, are decomposed separately.
        branch: the new branch, with LoRA's initial A.
        spec: its `start` chooses the decomposition.

    Returns:
        A [r, in] and B [out, r], in the dtype and on the device of the weight. Stacked experts have one more axis, and
        slices have their factors one after another.

    Raises:
        SpecError: the weight holds inf or nan.
    """
    if not bool(torch.isfinite(weight).all()):
        raise SpecError(
            f"start is {spec.start!r}, which decomposes the weight, but {branch.weight_name} holds inf or nan. "
            f"Give exclude=({branch.weight_name!r},) or start='lora'",
            code="non-finite",
        )
    a, b = branch.down.to(weight, copy=True), branch.up.new_zeros(branch.up.shape).to(weight)
    out, columns, stack = b.shape[-2], a.shape[-1], tuple(b.shape[:-2])
    matrix = weight.reshape(*stack, columns, out).mT if branch.transposed else weight.reshape(*stack, out, columns)
    matrices = matrix.split(branch.slices) if branch.slices else (matrix,)
    ups = b.split(branch.slices) if branch.slices else (b,)
    downs = a.split(branch.rank) if branch.slices else (a,)
    with exact_products(matrix):
        for part, up, down in zip(matrices, ups, downs, strict=True):
            initial_b, initial_a = spec.factor_start.initial_factors(part, branch.rank, branch.scale)
            up[..., : initial_b.shape[-1]] = initial_b
            down[..., : initial_a.shape[-2], :] = initial_a
    return a, b


def has_trained(learner: Learner, state: WeightState) -> bool:
    """Whether a branch, or a parameter trained in full, has changed since the start of its stage.

    A cast does not count as a change. The answer is for the slice on this rank. Every rank must call this at the same
    point.
    """
    if isinstance(learner, Branch):
        return learner.moved(state.initial, state.cut)
    start = state.dense_in("fast")
    assert start is not None
    return not torch.equal(local(learner).detach().cpu(), start.to(learner.dtype))


def delta_of(
    branch: Branch,
    state: WeightState,
    spec: CascadeSpec,
    stage: int,
    noisy: bool,
    device: torch.device,
) -> Delta:
    """Return the delta that a branch has added to its weight since the start of the stage, as copies on a device.

    It is the delta of this rank's slice of the weight. A branch that started at zero contributes its factors. A branch
    that started from factors of the weight contributes `[B - B_0, B_0]` and `[A; A - A_0]` (see the module docstring).
    """
    parameter = next(branch.parameters())
    weight = start_weight_of(state, spec, stage, noisy, parameter.device)
    with torch.no_grad():
        gain = branch.gain(weight)
        if state.initial is not None and state.initial.factors is not None:
            assert isinstance(branch, LoraBranch)
            current, start = branch.exact_factors().map(state.cut), state.initial.factors
            # s (B A - B_0 A_0) as one pair: both terms are as small as the change.
            b = torch.cat([current.b - start.b, start.b], dim=-1)
            a = torch.cat([current.a, current.a - start.a], dim=-2)
            return Delta(Factors(cast(b, parameter.dtype, device), cast(a, parameter.dtype, device)), gain=gain)
        source = (
            branch if isinstance(branch, LoraBranch) else branch.whole()
        )  # LoRA's factors are sharded like the weight
        delta = source.delta(weight.exact() if branch.uses_weight else None)
        if isinstance(delta, torch.Tensor):
            return Delta(dense=state.cut(full_tensor(delta), Side.WEIGHT).to(device, copy=True), gain=gain)
        parts = []
        for factor, side in ((delta.b, Side.LEFT), (delta.a, Side.RIGHT)):
            if state.axis(side) is None:  # each rank needs the full factor
                part = full_tensor(factor)
            elif shard_of(factor).axis == state.shard.axis:  # sharded like the weight
                part = local(factor)
            else:
                part = state.shard.take(full_tensor(factor))
            parts.append(part.to(device, copy=True))
        return Delta(Factors(*parts), gain=gain)
