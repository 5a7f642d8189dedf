"""Weights of earlier stages, and `rewind` to them, compared with sums of factors in fp64 (algorithm.md)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import batches, branches, mlp, optimizer_of, randomize, train, values
from tests.kit.seams import lower

EXACT = {"rtol": 0, "atol": 1e-12}
PACE = 0.4
X = batches(1, 6, 20)[0]


def wide() -> nn.Module:
    """Return a model whose weights have more entries than five experts of rank 1, with a head trained in full."""
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 18, bias=False), nn.Linear(18, 3)).double()


def cascade_of(restart: str = "slow", **options: object) -> lx.Cascade:
    spec = lx.CascadeSpec(exclude=("3.weight",), train=("3.*",), rank=1, lora_alpha=1.5, pace=PACE, restart=restart,
                          **options)  # type: ignore[arg-type]  # fmt: skip
    return lx.adapt(wide(), (X,), spec=spec)


def stage(cascade: lx.Cascade, seed: int) -> dict[str, torch.Tensor]:
    """Train a stage without an optimizer and end it. Return s B A of each site, and the value of the head."""
    randomize(cascade, seed)
    deltas = {
        name: (branch.scale * branch.lora_B @ branch.lora_A).detach().clone()
        for name, branch in branches(cascade).items()
    }
    with torch.no_grad():
        cascade.model[3].bias.add_(torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    deltas["3.bias"] = cascade.model[3].bias.detach().clone()
    cascade.transition(None)
    return deltas


def slow_by_hand(restart: str, trained: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Return W0 + S_0, W0 + S_1, ... by the recursion of algorithm.md, in dense fp64."""
    base = {name: value.detach().clone() for name, value in wide().named_parameters()}
    sites = [name for name in trained[0] if name != "3.bias"]
    slow = {name: torch.zeros_like(base[name]) for name in sites}
    start = dict(slow)
    bias = base["3.bias"]
    results = [dict(base)]
    for deltas in trained:
        for name in sites:
            fast = start[name] + deltas[name]
            slow[name] = slow[name] + PACE * (fast - slow[name])
            start[name] = slow[name] if restart == "slow" else fast
        bias = bias + PACE * (deltas["3.bias"] - bias)
        results.append(base | {name: base[name] + slow[name] for name in sites} | {"3.bias": bias})
    return results


def assert_holds(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name].detach(), value, **EXACT, msg=f"{name} differs")


@pytest.mark.parametrize("restart", ["slow", "fast"])
def test_each_stage_is_its_own_sum(restart: str, tmp_path: Path) -> None:
    cascade = cascade_of(restart, noise=lx.Noise(0.3))
    expected = slow_by_hand(restart, [stage(cascade, seed) for seed in range(4)])
    randomize(cascade, 9)  # a stage is running
    lx.save(cascade, tmp_path)
    for run in (cascade, lx.load(tmp_path, wide(), (X,))):
        for number in (3, 1, 0, 4, 2):
            with unchanged(run), run.weights(stage=number) as inside:
                assert inside is run
                assert_holds(run.model, expected[number])
                torch.testing.assert_close(run(X), run.model(X), rtol=0, atol=0)
        assert (expected[1]["0.weight"] - expected[2]["0.weight"]).abs().max() > 1e-3


def test_the_last_stage_is_the_slow_weights_bit_for_bit_and_kept_noise_is_in_it() -> None:
    cascade = cascade_of(noise=lx.Noise(0.3, keep=True))
    ends = []
    for seed in range(3):
        stage(cascade, seed)
        with cascade.weights("slow"):
            ends.append(values(cascade.model))
    for number, end in enumerate(ends, start=1):
        with cascade.weights(stage=number):
            assert all(torch.equal(value, end[name]) for name, value in cascade.model.named_parameters())
    assert not torch.equal(ends[0]["0.weight"], ends[1]["0.weight"])


def test_a_parameter_without_a_slow_copy_keeps_its_value_at_the_end_of_each_stage() -> None:
    cascade = cascade_of(slow_train=False)
    bias = stage(cascade, 1)["3.bias"]
    stage(cascade, 2)
    with cascade.weights(stage=1):
        assert torch.equal(cascade.model[3].bias, bias)


@pytest.mark.parametrize("restart", ["slow", "fast"])
def test_a_cascade_goes_on_from_an_earlier_stage(restart: str) -> None:
    cascade = cascade_of(restart)
    trained = [stage(cascade, seed) for seed in range(3)]
    optimizer = optimizer_of(cascade)
    train(cascade, optimizer, [X, X])
    assert cascade.stage == 4
    cascade.rewind(1, optimizer)
    assert cascade.stage == 5
    assert not optimizer.state
    back = slow_by_hand(restart, trained[:1])[1]
    assert_holds(cascade.model, back)
    randomize(cascade, 6)
    site = branches(cascade)["0.weight"]
    expected = back["0.weight"] + PACE * (site.scale * site.lora_B @ site.lora_A).detach()
    cascade.transition(optimizer)
    with cascade.weights(stage=5):
        torch.testing.assert_close(cascade.model[0].weight.detach(), expected, **EXACT)
    for gone in (2, 3, 4):
        with raises(lx.StateError, "unknown-stage", gone, "1", "5"), cascade.weights(stage=gone):
            pass
    torch.testing.assert_close(cascade.release()[0].weight.detach(), expected, **EXACT)


def test_a_rewind_is_a_fresh_stage_whose_noise_and_factors_are_new() -> None:
    """The noise depends on the number of a stage, so no number is used twice, and none is skipped after a loop."""
    noisy = cascade_of(noise=lx.Noise(0.2))
    optimizer = optimizer_of(noisy)
    starts = []
    for _ in noisy.stages(2, optimizer):
        starts.append(noisy.model[0].weight.detach().clone())
        train(noisy, optimizer, [X])
    noisy.rewind(0, optimizer)
    assert noisy.stage == 3  # idle: no stage 3 has run
    third = noisy.model[0].weight.detach().clone()
    noisy.rewind(0, optimizer)
    assert noisy.stage == 4
    again = noisy.model[0].weight.detach().clone()
    starts = [starts[0], third, again]
    assert not any(itertools.starmap(torch.equal, itertools.combinations(starts, 2)))
    assert [stage.number for stage in noisy.stages(2, optimizer)] == [4, 5]
    with noisy.weights(stage=0):
        assert_holds(noisy.model, dict(wide().named_parameters()))


def test_stages_before_a_dense_collapse_are_gone_and_said_to_be(tmp_path: Path) -> None:
    model = mlp()
    cascade = lx.adapt(model, batches(1, 4, 5), spec=lx.CascadeSpec(rank=1, targets=("0.weight", "2.weight")))
    for seed in range(4):  # [7, 5] holds two experts of rank 1, [6, 7] three
        randomize(cascade, seed)
        cascade.transition(None)
    with cascade.weights("slow"):
        slow = values(model)
    lx.save(cascade, tmp_path)
    for run in (cascade, lx.load(tmp_path, mlp(), batches(1, 4, 5))):
        with run.weights(stage=4):
            assert all(torch.equal(value, slow[name]) for name, value in run.model.named_parameters())
        with unchanged(run), raises(lx.StateError, "unknown-stage") as caught:
            run.rewind(2, None)
        assert "rewind: stage 2 is no longer available for 0.weight" in str(caught.value)
        assert "Available: 0, 4. To keep all stages, save a checkpoint per stage" in str(caught.value)
        run.rewind(4, None)
        assert run.stage == 6
    cascade.transition(None)  # a stage that trained nothing moves no weight, so stage 4 is still there
    with cascade.weights(stage=4):
        assert all(torch.equal(value, slow[name]) for name, value in model.named_parameters())


def test_large_parameters_trained_in_full_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lower(monkeypatch, "entries kept of each stage", 2)
    cascade = lx.adapt(wide(), (X,), spec=lx.CascadeSpec(targets=("2.weight",), train=("0.*",), rank=1))
    for seed in range(2):
        randomize(cascade, seed)
        cascade.transition(None)
    with raises(lx.StateError, "unknown-stage", "1", "0.weight", "0.bias") as caught, cascade.weights(stage=1):
        pass
    assert "Available: 0, 2. To keep all" in str(caught.value)
    with cascade.weights(stage=0):
        assert_holds(cascade.model, dict(wide().named_parameters()))


@pytest.mark.parametrize("number", [-1, 2, 1.0, True, "1"])
def test_a_stage_that_is_none(number: object) -> None:
    cascade = cascade_of()
    stage(cascade, 1)
    with unchanged(cascade), raises(lx.StateError, "unknown-stage", number, "1"):
        cascade.weights(stage=number).__enter__()  # type: ignore[arg-type]  # what is tested


def test_which_or_a_stage_and_not_inside_another() -> None:
    cascade = cascade_of()
    both = cascade.weights("slow", stage=0)
    with unchanged(cascade), raises(lx.StateError, "conflicting-options", "slow", "stage=0"), both:
        pass
    with cascade.weights(stage=0), raises(lx.StateError, "inside-weights", "stage=0"):
        cascade.rewind(0, None)
