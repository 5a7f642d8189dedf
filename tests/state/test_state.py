"""`Tree.map` visits every tensor of the slow state, with the axis along which it is sharded."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from lorasc_fx.branch import Delta, Factors, InitialFactors, Side, Tree
from lorasc_fx.checkpoint.content import Content, Stored, decoded
from lorasc_fx.checkpoint.files import pack, unpack
from lorasc_fx.plan import Plan, Site
from lorasc_fx.shards import ShardSpec
from lorasc_fx.spec import CascadeSpec, Noise
from lorasc_fx.state import Expert, History, KeptNoise, SlowWeights, StageEnd, WeightState
from lorasc_fx.util.decode import decode


def trees(kind: type = Tree) -> list[type]:
    return [kind, *(inner for subclass in kind.__subclasses__() for inner in trees(subclass))]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(shape: tuple[int, ...], stacked: bool = False, transposed: bool = False) -> WeightState:
    """Return a state of three experts that uses every field. The second scales rows, unless the weight is stacked."""
    bare = WeightState("w", numbers(*shape), stacked, transposed)
    *stack, rows, columns = bare.matrix
    experts = []
    for seed, rank in enumerate((1, 3, 2)):
        scale = numbers(bare.out, seed=9).abs() if seed == 1 and not stacked else None
        factors = numbers(*stack, rows, rank, seed=seed), numbers(*stack, rank, columns, seed=seed + 5)
        experts.append(Expert(*factors, seed + 1, row_scale=scale))
    slow = numbers(*bare.matrix, seed=20)
    dense = {"slow": slow, "averaged": numbers(*bare.matrix, seed=21)}
    ends = tuple(StageEnd(stage, 0.5, "fast", 1 / stage) for stage in (1, 2, 3))
    scale = None if stacked else numbers(bare.out, seed=22).abs()
    kept = (KeptNoise(Noise(0.2, keep=True), 3, 1, 0.1),)
    initial = InitialFactors(Factors(numbers(*stack, rows, 2), numbers(*stack, 2, columns)), numbers(bare.out))
    return dataclasses.replace(
        bare,
        experts=tuple(experts),
        history=History(ends),
        dense=dense,
        ends={2: slow},
        row_scale=scale,
        noises=kept,
        initial=initial,
        gone=1,
    )


def tensors(value: Any) -> list[torch.Tensor]:
    """Return every tensor in a value, without using `map`."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [tensor for item in dataclasses.fields(value) for tensor in tensors(getattr(value, item.name))]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for item in inner for tensor in tensors(item)]


@pytest.mark.parametrize("kind", trees()[1:], ids=lambda kind: kind.__name__)
def test_a_field_with_tensors_says_how_they_are_sharded(kind: type) -> None:
    for item in dataclasses.fields(kind):
        assert ("Tensor" in str(item.type)) == (Side in item.metadata), item.name


def test_map_reaches_every_tensor_once() -> None:
    state, seen = full((6, 4)), []

    def double(value: torch.Tensor, side: Side) -> torch.Tensor:
        seen.append(value)
        return 2 * value

    after = state.map(double)
    assert len(seen) == len({id(value) for value in tensors(state)}) == len({id(value) for value in seen})
    for old, new in zip(tensors(state), tensors(after), strict=True):
        assert torch.equal(new, 2 * old)
    assert after.dense["slow"] is after.ends[2]


@pytest.mark.parametrize(
    ("shape", "stacked", "transposed", "axes"),
    [
        ((6, 4), False, False, (0, 1)),
        ((4, 6), False, True, (0, 1)),
        ((6, 4, 2, 2), False, False, (0,)),
        ((4, 6, 2), True, False, (0, 1, 2)),
    ],
)
@pytest.mark.parametrize("view", ["base", "slow", "fast", "averaged"])
def test_a_shard_of_the_state_is_the_state_of_the_shard(
    shape: tuple[int, ...], stacked: bool, transposed: bool, axes: tuple[int, ...], view: Any
) -> None:
    state = full(shape, stacked, transposed)
    weight = state.exact(view, torch.float64)
    for axis in axes:
        shard = ShardSpec(1, shape[axis] - 2, shape[axis], axis=axis)
        local = state.to_shard(shard).exact(view, torch.float64)
        assert local.shape == shard.take(weight).shape
        torch.testing.assert_close(local, shard.take(weight), rtol=1e-14, atol=1e-14)
    narrow = torch.empty(shape)
    state.write(narrow, view, torch.float64)
    assert torch.equal(narrow, weight.float())  # kept noise is added before the rounding


def through_a_file(plan: Plan, slow: SlowWeights, branch: Any, value: Any) -> WeightState:
    stored = {name: Stored.of(state) for name, state in slow.states.items()}
    content = Content({}, "", {}, {}, stored, branch, False, ({},), value, history=slow.history.ends)
    plain, tensors = pack(content)
    return decoded(decode(Content, unpack(json.loads(json.dumps(plain)), tensors)), plan).slow.states["w"]


def test_a_stage_that_moves_magnitudes_alone_survives_a_file() -> None:
    """It scales rows and adds no factors. A checkpoint has the scale, and no factors."""
    spec = CascadeSpec(adapter="dora", rank=1)
    plan = Plan(spec, (Site("w", "linear", (6, 4), spec.site_options()),), 5)
    pair = Factors(numbers(6, 1), numbers(1, 4))
    zero = Factors(torch.zeros(6, 1, dtype=torch.float64), pair.a)
    state, gains = WeightState("w", numbers(6, 4)), [numbers(6, seed=seed).abs() for seed in range(4)]
    for stage, factors in enumerate((zero, pair, zero, zero), start=1):
        history = History((*state.history.ends, StageEnd(stage, 0.5)))
        state = state.absorb(Delta(factors, gain=gains[stage - 1]), history)
    expected = state.base * torch.stack([0.5 + 0.5 * gain for gain in gains]).prod(0)[:, None]
    late = torch.stack([0.5 + 0.5 * gain for gain in gains[2:]]).prod(0) * 0.5 * gains[1]
    expected = expected + late[:, None] * (pair.b @ pair.a)
    torch.testing.assert_close(state.exact("slow", torch.float64), expected, rtol=1e-14, atol=1e-14)
    branch = {"lora_A": numbers(1, 4), "lora_B": numbers(6, 1), "lora_magnitude_vector": numbers(6)}
    initial = InitialFactors(magnitude=numbers(6))
    slow_state = SlowWeights({"w": dataclasses.replace(state, initial=initial)}, history=state.history)
    loaded = through_a_file(plan, slow_state, {"w": branch}, {})
    again = dataclasses.replace(loaded, base=state.base)
    for stage in (1, 2, 3, 4):
        before, after = state.at(stage), again.at(stage)
        assert before is not None
        assert after is not None
        assert torch.equal(before.exact("slow", torch.float64), after.exact("slow", torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("restart", ["slow", "fast"])
def test_a_parameter_trained_in_full_keeps_its_values_through_stages_and_a_file(
    dtype: torch.dtype, restart: str
) -> None:
    """The second value is so small relative to W0 that a difference from W0 could not represent it.

    For a pace of one half, lerp is the oracle.
    """
    base = torch.tensor([1.0, -2.0, float("inf")]).to(dtype)
    values = [torch.tensor([1e-20, 3.0, 5.0]).to(dtype), torch.tensor([-7.0, 0.1, 2.0]).to(dtype)]
    exact_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    fast = WeightState("w", base, full=True).bare()
    for stage, value in enumerate(values, start=1):
        fast = fast.absorb_value(value, History((*fast.history.ends, StageEnd(stage, 1.0, restart))), 1.0, keeps=True)
        assert torch.equal(fast.exact("slow", exact_dtype), value.to(exact_dtype))
        assert torch.equal(fast.exact("fast", dtype), value)
    value, half = values[0].to(exact_dtype), fast.at(1)
    assert half is not None
    half = half.absorb_value(values[1], History((*half.history.ends, StageEnd(2, 0.5, restart))), 0.5, keeps=True)
    slow = torch.lerp(value, values[1].to(exact_dtype), 0.5)
    assert torch.equal(half.exact("slow", exact_dtype), slow)
    assert torch.equal(half.exact("fast", dtype), slow.to(dtype) if restart == "slow" else values[1])
    last = fast.absorb_value(base, History((*fast.history.ends, StageEnd(3, 1.0, restart))), 1.0)
    assert last.at(2) is None  # without `keeps`, the last end alone
    assert not half.faults()
    plan = Plan(CascadeSpec(restart=restart), (), 3)
    loaded = through_a_file(plan, SlowWeights({"w": half}, history=half.history), {}, {"w": values[1]})
    for stage in (0, 1, 2):
        before, after = half.at(stage), loaded.at(stage)
        assert before is not None
        assert after is not None
        assert torch.equal(before.exact("slow", exact_dtype), after.exact("slow", exact_dtype))
    assert torch.equal(loaded.exact("fast", dtype), half.exact("fast", dtype))


def test_faults_of_a_state_name_the_wrong_tensor() -> None:
    state = full((6, 4))
    first = state.experts[0]
    factors = "has factors of shapes {} and {}, which do not fit a matrix of (6, 4)"
    dtype = "has a tensor of the wrong dtype, torch."
    cases: tuple[tuple[dict[str, Any], list[str]], ...] = (
        ({"experts": (dataclasses.replace(first, stage=0),)}, []),
        ({"experts": (dataclasses.replace(first, stage=4),)}, ["has an expert of stage 4, which has not ended"]),
        ({"experts": (Expert(numbers(6, 2), numbers(1, 4), 1),)}, [factors.format((6, 2), (1, 4))]),
        ({"experts": (Expert(numbers(6), numbers(4), 1),)}, [factors.format((6,), (4,))]),
        ({"initial": InitialFactors(Factors(numbers(6, 2), numbers(2, 3)))}, [factors.format((6, 2), (2, 3))]),
        ({"ends": {2: numbers(6)}}, ["has a dense delta of shape (6,), but its matrix is (6, 4)"]),
        ({"initial": InitialFactors(magnitude=numbers(7))}, ["has row scales of shape (7,), but 6 rows"]),
        ({"row_scale": torch.ones(6, dtype=torch.int64)}, [dtype + "int64"]),
        ({"dense": {"slow": numbers(6, 4).to(torch.complex64)}}, [dtype + "complex64"]),
        ({"dense": {"slow": numbers(6, 4) / 0}}, ["holds inf or nan"]),
        ({"row_scale": numbers(6) / 0}, ["holds inf or nan"]),
        ({"experts": (dataclasses.replace(first, origin=(1.0, float("nan"), 1.0)),)}, ["holds inf or nan"]),
    )
    for changes, sentences in cases:
        assert dataclasses.replace(state, **changes).faults() == sentences
    trained = WeightState("w", numbers(3), full=True, history=state.history)
    assert trained.faults() == ["lacks a value at the end of a stage"]
