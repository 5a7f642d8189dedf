"""What the start and the end of a stage mean for one weight; runtime and passes both compute by these functions.

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
from functools import partial

import torch

from lorasc_fx.branch import Branch, amplitude, draw
from lorasc_fx.branch.noise import add_noise, noise_size
from lorasc_fx.errors import NonFiniteBranch, SpecError, warn
from lorasc_fx.plan import Site
from lorasc_fx.quantized import dense, is_quantized
from lorasc_fx.shards import full_tensor, local, shard_of
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state.products import Scratch, arithmetic, cast, exact_products
from lorasc_fx.state.weight import Factors, InitialFactors, KeptNoise, Side, WeightState, Which

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
    """Return `W_t = W0 + S_{t-1} + N_t` (under restart = fast `W0 + F_{t-1} + N_t`), less what the branch took out of
    it, rounded once to the weight's dtype.
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
    """Write what `start_weight` returns into `out`, in place: of extra memory there is a block of noise, and where
    `out` is narrower than the arithmetic `scratch` for the exact weight (without noise a block of it).
    """
    if state.base.dtype not in (out.dtype, arithmetic(state.base.dtype)):  # a narrow weight that was cast since
        out.copy_(start_weight(state, spec, stage, noisy, out.device, step))
    else:
        stage_noise(state, spec, noisy).write_start(out, state, spec, stage, step, scratch or Scratch())


class StageNoise:
    """The noise on a weight while a stage runs (`CascadeSpec.noise`): here there is none, as where no stage runs."""

    def write_start(
        self, out: torch.Tensor, state: WeightState, spec: CascadeSpec, stage: int, step: int, scratch: Scratch
    ) -> None:
        """Write the weight that the stage starts from, or has after a step, less what the branch took out of it."""
        state.write(out, "fast", arithmetic(state.base.dtype), state.taken_out)

    def kept(self, state: WeightState, spec: CascadeSpec, stage: int) -> tuple[KeptNoise, ...]:
        """Return what stays in the slow weights when the stage ends."""
        return ()


class DrawnNoise(StageNoise):
    """Noise of the key (seed, stage, step, weight), which is drawn again wherever it is needed."""

    def write_start(
        self, out: torch.Tensor, state: WeightState, spec: CascadeSpec, stage: int, step: int, scratch: Scratch
    ) -> None:
        """Write the weight with its noise, whose size is that of the weight before anything was taken out.

        Raises:
            SpecError: the weight has no finite size, or the noise takes it beyond its dtype.
        """
        dtype = arithmetic(state.base.dtype)
        exact = out if out.dtype == dtype else scratch.like(out, dtype)
        state.write(exact, "fast", dtype)
        size = noise_size(spec.noise, exact, state.stacked, state.transposed, state.shard)
        top = size if isinstance(size, float) else float(size.max()) if size.numel() else 0.0
        if not math.isfinite(top):
            raise SpecError(
                f"noise.strength is {spec.noise.strength}, and {state.name} holds inf or nan, or numbers too far apart"
                f": no noise has a size for it. Exclude it (exclude=({state.name!r},)), or give 0"
            )
        if state.initial is not None:
            state.write(exact, "fast", dtype, state.taken_out)
        if top:
            add_noise(exact, draw(spec.noise, spec.seed, stage, state.name, exact.shape, step, state.shard), size)
        if exact is not out:
            out.copy_(exact)
        if top > torch.finfo(out.dtype).max * torch.finfo(out.dtype).eps / 64 and not bool(torch.isfinite(out).all()):
            raise SpecError(
                f"noise.strength is {spec.noise.strength}: in stage {stage} it takes {state.name} beyond {out.dtype}. "
                f"Give less, or exclude it (exclude=({state.name!r},))"
            )

    def kept(self, state: WeightState, spec: CascadeSpec, stage: int) -> tuple[KeptNoise, ...]:
        """Return its key and amplitude, if the spec keeps noise."""
        if not spec.noise.keep:
            return ()
        size = amplitude(spec.noise, state.exact("fast", arithmetic(state.base.dtype)), state.shard)
        return (KeptNoise(spec.noise, spec.seed, stage, size),)


def stage_noise(state: WeightState, spec: CascadeSpec, noisy: bool) -> StageNoise:
    """Return the strategy of `noise`: no noise if no stage runs, or if the weight is trained in full."""
    return DrawnNoise() if noisy and spec.noise.is_on and not state.full else StageNoise()


def begin_stage(
    state: WeightState, branch: Branch, site: Site, spec: CascadeSpec, stage: int, a: torch.Tensor, noisy: bool = True
) -> tuple[WeightState, Branch]:
    """Return the state of a stage that starts, and a copy of the branch, whole, as it starts: factors out of the weight
    (`spec.start`) where the stage runs, and magnitudes that leave the weight as it is.

    Of a shard the weight is gathered where it is decomposed, and the rest is computed from what is here. Every rank
    must call this at the same point.

    Args:
        state: that the stage starts from.
        branch: of the weight.
        site, spec, stage: of the plan; the copy has the rank of this site.
        a: lora_A as LoRA starts it.
        noisy: whether the stage runs; else its weight is without noise, and B = 0.
    """
    started = branch.whole()
    started.to_rank(site)
    taken, lengths = None, None
    with torch.no_grad():
        a, b = full_tensor(a), torch.zeros_like(started.lora_B)
        if noisy and spec.factor_start.from_weight:
            exact = state.exact("fast", arithmetic(state.base.dtype), device=branch.lora_A.device)
            if spec.factor_start.of_delta:
                exact = exact - dense(state.base).to(exact)
            a, b = factors_out_of(state.whole(exact, Side.WEIGHT), started, spec, a)
            # A decomposition is not the same bits on all machines.
            a, b = state.shard.group.of_first(a), state.shard.group.of_first(b)
        started.lora_A.copy_(a)
        started.lora_B.copy_(b)
        if noisy and spec.factor_start.from_weight:
            taken = initial_factors(started).map(state.cut)
        state = replace(state, initial=InitialFactors(taken))
        if started.magnitude is not None:
            weight = start_weight(state, spec, stage, noisy, branch.lora_A.device)
            norms = started.norms(weight, state.shard)
            started.magnitude.copy_(state.whole(norms, Side.OUT))
            lengths = norms.cpu().double().clone()
    initial = None if taken is None and lengths is None else InitialFactors(taken, lengths)
    return replace(state, initial=initial), started


def gain_of(branch: Branch, state: WeightState, spec: CascadeSpec, stage: int, noisy: bool) -> torch.Tensor | None:
    """Return the row scale g [out] of a branch with magnitudes, in fp64 on the host: with the weight that it trained
    on, noise included; of a shard that of the rows that are here. None for any other branch.
    """
    if branch.magnitude is None:
        return None
    with torch.no_grad():
        weight = start_weight(state, spec, stage, noisy, branch.lora_A.device)
        magnitude = state.cut(full_tensor(branch.magnitude), Side.OUT)
        return (magnitude / branch.norms(weight, state.shard)).cpu().double()


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
    stage: int,
    noisy: bool,
    checked: bool,
    left_out: set[str],
    share: float | None,
    keeps: bool,
) -> WeightState:
    """Return the slow state after the stage: the slow update, and the stage's noise where it is kept.

    What is not finite, or would take an entry of the weight beyond its dtype, is not folded.

    Args:
        state: of the weight when the stage started.
        learner: None for a weight that only has noise.
        spec, stage: of the plan.
        noisy: whether the stage ran with its noise.
        checked: whether the factors of branches are known to be finite.
        left_out: gets the name of the weight if it was left out.
        share: of the new slow weights in their average over stages; None where none is kept.
        keeps: whether a parameter trained in full keeps its values at the ends of earlier stages.

    Raises:
        NonFiniteBranch: the stage cannot be folded, and spec.on_nonfinite is "raise".
    """
    pace = spec.pace_at(stage) if state.follows(spec) else 1.0
    absorb = partial(
        state.absorb, stage, pace=pace, restart=spec.restart, share=share, carry_rank=spec.carry_rank, keeps=keeps
    )
    after, fault = None, ""
    if isinstance(learner, torch.Tensor):
        value = local(learner).detach().to("cpu", copy=True)
        if state.every(not state.broken(value)):
            after = absorb(value)
        else:
            fault = f"{state.name}, which is trained in full, holds inf or nan"
    elif learner is not None and (checked or state.every(learner.finite())):
        moved = not state.every(not has_trained(learner, state))
        live = factors_of(learner, state.base.device, state) if moved else None
        after = absorb(live, gain=gain_of(learner, state, spec, stage, noisy) if moved else None)
        if not state.every(fits(after)):
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
        left_out.add(state.name)
    if after is None:
        after = absorb(None)
    return replace(after, noises=(*after.noises, *stage_noise(state, spec, noisy).kept(state, spec, stage)))


def fits(state: WeightState) -> bool:
    """Whether slow and start weights, rounded to the dtype of W0, are finite wherever W0 is.

    They are looked at only where a bound on what was added leaves it open: what is less than half the distance of the
    two largest numbers of a dtype makes no finite number infinite.
    """
    if is_quantized(state.base):
        return all(math.isfinite(expert.bound) for expert in state.experts)
    limits = torch.finfo(state.base.dtype)
    room = limits.max * limits.eps / 8
    if not state.full and state.reach(state.slow) < room and state.reach(state.start) < room:
        return True
    both: tuple[Which, ...] = ("slow", "fast") if state.start_differs else ("slow",)
    return not any(
        state.broken(state.exact(which, arithmetic(state.base.dtype)).to(state.base.dtype)) for which in both
    )


def factors_out_of(
    weight: torch.Tensor, branch: Branch, spec: CascadeSpec, a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lora_A and lora_B as `spec.start` takes them out of a weight, in its dtype, on its device.

    A rank beyond the matrix's own starts as in LoRA.

    Args:
        weight: as it is stored; each slice of a fused one, and each of stacked experts, is decomposed by itself.
        branch: whose shapes, scale and slices count; its values do not.
        spec: whose start is meant.
        a: lora_A as LoRA starts it.

    Raises:
        SpecError: the weight holds inf or nan.
    """
    if not bool(torch.isfinite(weight).all()):
        raise SpecError(
            f"start is {spec.start!r}, and {branch.weight_name} holds inf or nan, which has no decomposition. "
            f"Exclude it (exclude=({branch.weight_name!r},)), or give start='lora'",
            code="non-finite",
        )
    out, columns = branch.lora_B.shape[-2], branch.lora_A.shape[-1]
    stack = tuple(branch.lora_B.shape[:-2])
    full = weight.reshape(*stack, columns, out).mT if branch.transposed else weight.reshape(*stack, out, columns)
    a = a.to(full, copy=True)
    b = torch.zeros(branch.lora_B.shape, dtype=a.dtype, device=a.device)
    matrices = full.split(branch.slices) if branch.slices else (full,)
    ups = b.split(branch.slices) if branch.slices else (b,)
    downs = a.split(branch.rank) if branch.slices else (a,)
    with exact_products(full):
        for matrix, up, down in zip(matrices, ups, downs, strict=True):
            left, right = spec.factor_start.initial_factors(matrix, branch.rank, branch.scale)
            up[..., : left.shape[-1]] = left
            down[..., : right.shape[-2], :] = right
    return a, b


def initial_factors(branch: Branch) -> Factors:
    """Return the factors as they are, whole, in fp64 with the scale folded in, on the host: where a stage begins."""
    with torch.no_grad():
        left, right = map(full_tensor, branch.oriented())
        return Factors(left.cpu().double() * branch.scale, right.cpu().double().clone())


def has_trained(branch: Learner, state: WeightState) -> bool:
    """Whether a branch has left its start: B = 0, or the factors and magnitudes that it began with; or a parameter
    trained in full the value that its stage started from. A cast is no training. Of a shard the answer is for the part
    that is here. Every rank must call this at the same point.
    """
    if isinstance(branch, torch.Tensor):
        assert state.start.dense is not None
        return not torch.equal(local(branch).detach().cpu(), state.start.dense.to(branch.dtype))
    initial = state.initial if state.initial is not None else InitialFactors()
    moved = False
    if initial.magnitude is not None and branch.magnitude is not None:
        now_long = state.cut(full_tensor(branch.magnitude.detach()), Side.OUT).cpu()
        moved = not torch.equal(now_long, initial.magnitude.to(now_long.dtype))
    if initial.factors is None:
        return moved or bool(local(branch.lora_B).any())
    now, first = initial_factors(branch).map(state.cut), initial.factors
    if moved or (torch.equal(now.b, first.b) and torch.equal(now.a, first.a)):
        return moved
    dtype = branch.lora_A.dtype
    return not (
        torch.equal((now.b / branch.scale).to(dtype), (first.b / branch.scale).to(dtype))
        and torch.equal(now.a.to(dtype), first.a.to(dtype))
    )


def factors_of(branch: Branch, device: torch.device, state: WeightState) -> Factors:
    """Return what the branch has added since its start as factors on a device, as the weight is stored, the scale
    folded in: copies of its own where it started from B = 0, else `[B - B_0, B_0]` and `[A; A - A_0]`.

    Of a shard `b @ a` is that of the shard: where a factor is cut as the weight is, its own shard is taken, without
    communication.
    """
    with torch.no_grad():
        initial = state.initial
        if initial is not None and initial.factors is not None:
            now, first, dtype = initial_factors(branch).map(state.cut), initial.factors, branch.lora_A.dtype
            b = torch.cat([now.b - first.b, first.b], dim=-1)
            a = torch.cat([now.a, now.a - first.a], dim=-2)
            return Factors(cast(b, dtype, device), cast(a, dtype, device))
        left, right = branch.oriented()
        left, right = _part_of(left, state, Side.LEFT), _part_of(right, state, Side.RIGHT)
        return Factors((left * branch.scale).to(device), right.clone().to(device))


def _part_of(factor: torch.Tensor, state: WeightState, side: Side) -> torch.Tensor:
    """Return the part of a factor that this rank needs: its own shard if the factor is cut like the weight."""
    if state.axis(side) is None:
        return full_tensor(factor)
    return local(factor) if shard_of(factor).axis == state.shard.axis else state.shard.take(full_tensor(factor))
