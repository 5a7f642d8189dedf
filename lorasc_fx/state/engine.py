"""What the start and the end of a stage mean for one weight. The cascade and the passes both call these functions.

Source: algorithm.md, "One site".

PiSSA (2404.02948) and OLoRA (2406.01775) take B_0 and A_0 out of the weight: while the stage trains, the parameter
holds the residual `W_t - s B_0 A_0`, so that nothing is changed at the start. What has trained is
`s (B A - B_0 A_0)`, kept as one pair of twice the rank, `[B - B_0, B_0] [A; A - A_0]`: both of its terms are as small
as the change, and exactly zero before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from lorasc_fx.branch import Branch, Delta, Factors, InitialFactors, Side, StartWeight, amplitude, draw
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.branch.noise import add_noise, noise_size
from lorasc_fx.errors import NonFiniteBranch, SpecError, warn
from lorasc_fx.plan import Site
from lorasc_fx.quantized import dense
from lorasc_fx.shards import full_tensor, local, shard_of
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state.products import Scratch, arithmetic, cast, exact_products
from lorasc_fx.state.weight import KeptNoise, SlowRule, WeightState

Learner = Branch | torch.Tensor
"""What trains a weight in a stage: its branch, or the parameter itself if it is trained in full."""

_LOWER = "Lower the learning rate or clip gradients"


def start_weight(
    state: WeightState,
    spec: CascadeSpec,
    stage: int,
    noisy: bool = True,
    device: torch.device | None = None,
    step: int = 0,
) -> torch.Tensor:
    """Return `W_t = W0 + S_{t-1} + N_t` (under restart = fast `W0 + F_{t-1} + N_t`), minus the branch's initial
    factors, rounded once to the weight's dtype.
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
    """Write what `start_weight` returns into `out`, in place.

    Noise is drawn by (seed, stage, step, weight), block by block. If `out` is narrower than the arithmetic, the exact
    weight needs a scratch buffer.

    Raises:
        SpecError: the weight has no finite size, or its noise exceeds its dtype.
    """
    dtype = arithmetic(state.base.dtype)
    if state.base.dtype not in (out.dtype, dtype):  # a narrow weight that was cast since
        out.copy_(start_weight(state, spec, stage, noisy, out.device, step))
        return
    if not noisy or not spec.noise.is_on or state.full:
        state.write(out, "fast", dtype, state.residual)
        return
    # The size of the noise is that of the full weight, before the initial factors are subtracted.
    exact = out if out.dtype == dtype else (scratch or Scratch()).like(out, dtype)
    state.write(exact, "fast", dtype)
    size = noise_size(spec.noise, exact, state.stacked, state.transposed, state.shard)
    largest = size if isinstance(size, float) else float(size.max()) if size.numel() else 0.0
    if not math.isfinite(largest):
        raise SpecError(
            f"noise.strength is {spec.noise.strength}, and {state.name} holds inf or nan, or numbers too far apart"
            f": no noise has a size for it. Exclude it (exclude=({state.name!r},)), or give 0"
        )
    if state.initial is not None:
        state.write(exact, "fast", dtype, state.residual)
    if largest:
        address = (spec.noise, spec.seed, stage, state.name)
        add_noise(exact, draw(*address, exact.shape, step, state.shard, exact.device), size)
    if exact is not out:
        out.copy_(exact)
    # Looking at all entries takes a pass, so only noise near the limit of the dtype is checked.
    limits = torch.finfo(out.dtype)
    if largest > limits.max * limits.eps / 64 and not bool(torch.isfinite(out).all()):
        raise SpecError(
            f"noise.strength is {spec.noise.strength}: in stage {stage} it takes {state.name} beyond {out.dtype}. "
            f"Give less, or exclude it (exclude=({state.name!r},))"
        )


def start_weight_of(
    state: WeightState, spec: CascadeSpec, stage: int, noisy: bool, device: torch.device
) -> StartWeight:
    """Return the weight of a state as its branch sees it in a stage."""
    return StartWeight(
        exact=lambda: state.whole(state.exact("fast", arithmetic(state.base.dtype), device=device), Side.WEIGHT),
        noisy=lambda: start_weight(state, spec, stage, noisy, device),
        shard=state.shard,
        cut=state.cut,
        whole=state.whole,
        agreed=state.shard.group.of_first,
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
    """Return the state of a stage that starts, and a new branch with plain tensors as it starts.

    If the weight is sharded, every rank must call this at the same point: the weight is gathered if it is decomposed.

    Args:
        state: that the stage starts from.
        branch: of the stage before.
        site, spec, stage: of the plan; the new branch has the rank of this site.
        keep: whether the new branch takes over what the spec keeps of the branch before.
        noisy: whether the stage runs; else its weight has no noise, and nothing is subtracted from it.
        left_out: whether the weight was left out of the fold before, so that no pair of its branch is kept.
    """
    parameter = next(branch.parameters()).detach()
    started = type(branch)(site, spec.seed, stage, parameter)
    initial = InitialFactors()
    with torch.no_grad():
        # Pairs that are kept are part of the weight that the stage starts from, so the weight must not have them twice.
        if keep and started.follow(branch, spec, pairs=noisy and not left_out):
            assert isinstance(started, LoraBranch)
            initial = InitialFactors(started.exact_factors().map(state.cut))
        if "factors" in started.starts_from(spec, noisy):
            assert isinstance(started, LoraBranch)
            exact = state.exact("fast", arithmetic(state.base.dtype), device=parameter.device)
            if spec.factor_start.of_delta:  # LoftQ: the factors approximate what quantization took from the weight
                exact = exact - dense(state.base).to(exact)
            a, b = factors_out_of(state.whole(exact, Side.WEIGHT), started, spec)
            # A decomposition does not have the same bits on all machines.
            started.set_factors(state.shard.group.of_first(b), state.shard.group.of_first(a))
            initial = InitialFactors(started.exact_factors().map(state.cut))
        state = replace(state, initial=initial)
        initial = replace(
            initial, magnitude=started.start(start_weight_of(state, spec, stage, noisy, parameter.device))
        )
    unchanged = initial.factors is None and initial.magnitude is None
    return replace(state, initial=None if unchanged else initial), started


def all_finite(branches: Iterable[Branch]) -> bool:
    """Whether no entry of any factor is inf or nan; every factor is looked at if a sum is not finite."""
    branches = list(branches)
    factors = [factor for branch in branches for factor in branch.parameters()]
    return sums_are_finite(factors) or all(branch.finite() for branch in branches)


def sums_are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the sums of these tensors are finite: one pass over them, and one look at each device.

    Then all their entries are finite. A sum that is not finite may have overflowed.
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
        f"{fault}; nothing was folded. {_LOWER}, or set on_nonfinite='skip' to go on from what the stage started from"
    )


def end_stage(
    state: WeightState,
    learner: Learner | None,
    spec: CascadeSpec,
    rule: SlowRule,
    noisy: bool,
    checked: bool,
) -> tuple[WeightState, bool]:
    """Return the slow state after the stage, with the stage's noise if it is kept, and whether the weight was left out.

    A weight is left out if what has trained is not finite, or would take an entry of the weight beyond its dtype.

    Args:
        state: of the weight when the stage started.
        learner: None for a weight that only has noise.
        spec: of the plan.
        rule: of the slow update in this stage.
        noisy: whether the stage ran with its noise.
        checked: whether the factors of branches are known to be finite.

    Raises:
        NonFiniteBranch: the weight would be left out, and spec.on_nonfinite is "raise".
    """
    stage, on_all = rule.stage, state.shard.group.all
    if not state.follows(spec):
        rule = replace(rule, pace=1.0, momentum=0.0)
    after, fault = None, ""
    if isinstance(learner, torch.Tensor):
        value = local(learner).detach().to("cpu", copy=True)
        if on_all(not state.broken(value)):
            after = state.absorb(value, rule)
        else:
            fault = f"{state.name}, which is trained in full, holds inf or nan"
    elif learner is not None and (checked or on_all(learner.finite())):
        # All ranks must agree, because adding an expert changes the number of experts on all of them.
        moved = not on_all(not has_trained(learner, state))
        delta = delta_of(learner, state, spec, stage, noisy, state.base.device) if moved else None
        after = state.absorb(delta, rule)
        if not on_all(after.fits()):
            after, fault = None, f"the branch of {state.name} takes it beyond {state.base.dtype}"
    elif learner is not None:
        fault = f"the branch of {state.name} holds inf or nan"
    if fault and spec.on_nonfinite == "raise":
        raise _not_folded(f"{fault} at the end of stage {stage}")
    if fault:
        warn(
            f"{fault} at the end of stage {stage}: it goes on from what the stage started from. {_LOWER}",
            "non-finite-left-out",
        )
    if after is None:
        after = state.absorb(None, rule)
    if noisy and spec.noise.is_on and spec.noise.keep and not state.full:
        size = amplitude(spec.noise, state.exact("fast", arithmetic(state.base.dtype)), state.shard)
        after = replace(after, noises=(*after.noises, KeptNoise(spec.noise, spec.seed, stage, size)))
    return after, bool(fault)


def factors_out_of(weight: torch.Tensor, branch: LoraBranch, spec: CascadeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B as `spec.start` finds them in a weight, in its dtype, on its device.

    A rank beyond the rank of the matrix starts as in LoRA.

    Args:
        weight: as it is stored; each slice of a fused weight, and each expert, is decomposed separately.
        branch: that starts, with A as LoRA starts it.
        spec: whose start is used.

    Raises:
        SpecError: the weight holds inf or nan.
    """
    if not bool(torch.isfinite(weight).all()):
        raise SpecError(
            f"start is {spec.start!r}, and {branch.weight_name} holds inf or nan, which has no decomposition. "
            f"Exclude it (exclude=({branch.weight_name!r},)), or give start='lora'",
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
            left, right = spec.factor_start.initial_factors(part, branch.rank, branch.scale)
            up[..., : left.shape[-1]] = left
            down[..., : right.shape[-2], :] = right
    return a, b


def has_trained(learner: Learner, state: WeightState) -> bool:
    """Whether a branch, or a parameter trained in full, has left the start of its stage. A cast is no training.

    The answer is for the slice on this rank. Every rank must call this at the same point.
    """
    if isinstance(learner, Branch):
        return learner.moved(state.initial, state.cut)
    assert state.start.dense is not None
    return not torch.equal(local(learner).detach().cpu(), state.start.dense.to(learner.dtype))


def delta_of(
    branch: Branch,
    state: WeightState,
    spec: CascadeSpec,
    stage: int,
    noisy: bool,
    device: torch.device,
) -> Delta:
    """Return what a branch has added to its weight since the stage started, on a device: copies, for this rank's slice.

    A branch that started from zero leaves its own factors; one that started from factors of the weight leaves
    `[B - B_0, B_0]` and `[A; A - A_0]`.
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
        source = branch if isinstance(branch, LoraBranch) else branch.whole()  # LoRA's factors are cut like the weight
        delta = source.delta(weight.exact() if branch.uses_weight else None)
        if isinstance(delta, torch.Tensor):
            return Delta(dense=state.cut(full_tensor(delta), Side.WEIGHT).to(device, copy=True), gain=gain)
        parts = []
        for factor, side in ((delta.b, Side.LEFT), (delta.a, Side.RIGHT)):
            if state.axis(side) is None:  # each rank needs all of it
                part = full_tensor(factor)
            elif shard_of(factor).axis == state.shard.axis:  # sharded like the weight
                part = local(factor)
            else:
                part = state.shard.take(full_tensor(factor))
            parts.append(part.to(device, copy=True))
        return Delta(Factors(*parts), gain=gain)
