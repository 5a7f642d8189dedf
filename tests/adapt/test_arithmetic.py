"""`lx.merge` compared with fp64 sums of the deltas of the runs, computed from the factors by plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization as torchao
from torch import nn

import lorasc_fx as lx
from tests.errors.models import Net
from tests.errors.state import of, unchanged
from tests.kit.errors import raises, warns
from tests.kit.models import branches, mlp, optimizer_of, randomize, train
from tests.kit.seams import SEAMS
from tests.kit.state import weight_state

EXACT = {"rtol": 0, "atol": 1e-12}
Deltas = dict[str, torch.Tensor]


def base(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Weights [24, 20], [18, 24] and [3, 18]. They have more entries than the experts of these runs."""
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 18, bias=False), nn.Linear(18, 3)).to(dtype)


def call(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor]:
    return (torch.randn(5, 20, generator=torch.Generator().manual_seed(3)).to(dtype),)


def spec(**options: Any) -> lx.CascadeSpec:
    return lx.CascadeSpec(**{"targets": ("0.weight", "2.weight"), "rank": 2, "lora_alpha": 3.0, "pace": 0.5, **options})


@dataclass
class Run:
    """A run with random experts, and its slow delta computed in fp64 (restart="slow")."""

    cascade: lx.Cascade
    delta: Deltas = field(default_factory=dict)

    def train(self, seed: int) -> None:
        randomize(self.cascade, seed)
        pace = self.cascade.plan.spec.pace
        for name, branch in branches(self.cascade).items():
            learnt = pace * branch.scale * branch.lora_B.detach().double() @ branch.lora_A.detach().double()
            self.delta[name] = self.delta.get(name, 0) + learnt.view(branch.weight_shape)

    def saved(self, folder: Path) -> Path:
        lx.save(self.cascade, folder)
        return folder


def run(
    settings: lx.CascadeSpec,
    seeds: Sequence[int],
    build: Callable[[], nn.Module] = base,
    args: tuple[torch.Tensor] | None = None,
    ends: bool = False,
) -> Run:
    """A run whose last stage is still running, or has ended."""
    result = Run(lx.adapt(build(), args or call(), spec=settings))
    for seed in seeds:
        if result.delta:
            result.cascade.transition(None)
        result.train(seed)
    if ends:
        result.cascade.transition(None)
    return result


def expected(runs: Sequence[Run], weights: Sequence[float], model: nn.Module) -> Deltas:
    """W0 + sum_i w_i S_i in fp64."""
    total = {name: value.detach().double().clone() for name, value in model.named_parameters()}
    for weight, part in zip(weights, runs, strict=True):
        for name, delta in part.delta.items():
            total[name] += weight * delta
    return total


def assert_holds(model: nn.Module, values: Deltas, **close: Any) -> None:
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach().double(), values[name], **(close or EXACT), msg=f"{name} differs")


@pytest.mark.parametrize("weights", [None, (0.25, 0.5, 0.25), (1.0, -0.7, 2.0), (0.0, 1.0, 0.0)])
def test_folders_and_cascades_of_other_ranks(tmp_path: Path, weights: Sequence[float] | None) -> None:
    runs = [
        run(spec(), [1, 2]),
        run(spec(rank=1, lora_alpha=0.5, pace=1.0), [3]),
        run(spec(rank=3, restart_factors="B", noise=lx.Noise(0.2)), [4, 5, 6]),
    ]
    sources = [runs[0].saved(tmp_path / "one"), runs[1].cascade, str(runs[2].saved(tmp_path / "three"))]
    model = base()
    with unchanged(*(part.cascade for part in runs)):
        merged = lx.merge(sources, model, call(), weights=weights)
    values = expected(runs, weights or [1 / 3] * 3, base())
    assert [(site.weight, site.rank) for site in merged.sites] == [("0.weight", 2), ("2.weight", 2)]
    assert merged.stage == 4
    assert merged.plan.spec == runs[0].cascade.plan.spec
    for view in ({"view": "slow"}, {"stage": 3}):
        with merged.weights(**view):
            assert_holds(model, values)
    with merged.weights(stage=0):
        assert_holds(model, expected([], [], base()))
    folded = merged.folded_state_dict()
    assert merged.release() is model
    assert_holds(model, values)
    assert all(torch.equal(folded[name], value) for name, value in model.state_dict().items())


def test_a_sum_trains_on_saves_and_rewinds(tmp_path: Path) -> None:
    runs = [run(spec(), [1]), run(spec(rank=1), [2])]
    merged = lx.merge([part.cascade for part in runs], base(), call())
    values = expected(runs, [0.5, 0.5], base())
    lx.save(merged, tmp_path)
    again = lx.load(tmp_path, base(), call())
    losses = []
    for cascade in (merged, again):
        optimizer = optimizer_of(cascade)
        assert_holds(cascade.model, values)
        losses.append(train(cascade, optimizer, call()[:1] * 3))
        learnt = {
            name: 0.5 * branch.scale * (branch.lora_B @ branch.lora_A).detach()
            for name, branch in branches(cascade).items()
        }
        cascade.transition(optimizer)
        with cascade.weights("slow"):
            assert_holds(cascade.model, values | {name: values[name] + delta for name, delta in learnt.items()})
        cascade.rewind(1, optimizer)
        assert_holds(cascade.model, values)
    assert torch.equal(*losses)
    assert losses[0][2] < losses[0][0]


def test_what_was_trained_in_full_is_summed(tmp_path: Path) -> None:
    runs, values = [run(spec(train=("3.*",)), [seed]) for seed in (1, 2)], {}
    for seed, part in enumerate(runs):
        for name in ("3.weight", "3.bias"):
            parameter = part.cascade.model.get_parameter(name)
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            with torch.no_grad():
                parameter.add_(draw)
            part.delta[name] = 0.5 * draw  # the slow rule, with pace 0.5
        part.cascade.transition(None)
    values = expected(runs, [0.75, 0.5], base())
    merged = lx.merge([runs[0].saved(tmp_path), runs[1].cascade], base(), call(), weights=[0.75, 0.5])
    assert [site.weight for site in merged.sites] == ["0.weight", "2.weight"]
    lx.save(merged, tmp_path / "sum")
    assert_holds(merged.release(), values)
    assert_holds(lx.load(tmp_path / "sum", base(), call()).release(), values)


def test_collapsed_deltas_are_summed_exactly() -> None:
    """Weights of 35 and 42 entries, which are fewer than the entries of the experts of two stages."""
    x = (torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)
    settings = lx.CascadeSpec(rank=2, lora_alpha=2.0, targets=("0.weight", "2.weight"), pace=0.5)
    runs = [run(settings, seeds, mlp, x, ends=True) for seeds in ((1, 2, 3), (4,))]
    dense = [weight_state(part.cascade, "0.weight").is_dense for part in runs]
    assert dense == [True, False]
    merged = lx.merge([part.cascade for part in runs], mlp(), x, weights=[0.3, 0.7])
    assert_holds(merged.release(), expected(runs, [0.3, 0.7], mlp()))


def test_kept_noise_is_summed_with_the_weight_of_its_run() -> None:
    runs = [run(spec(noise=lx.Noise(0.4, keep=True), seed=seed), [seed], ends=True) for seed in (1, 2)]
    released = []
    for part in runs:
        with part.cascade.weights("slow"):
            released.append({name: value.detach().clone() for name, value in part.cascade.model.named_parameters()})
    merged = lx.merge([part.cascade for part in runs], base(), call(), weights=[0.25, -1.5])
    with merged.weights("slow"):
        values = {name: value.detach().clone() for name, value in merged.model.named_parameters()}
    for name, value in base().named_parameters():
        deltas = [part[name] - value.detach() for part in released]
        torch.testing.assert_close(values[name] - value.detach(), 0.25 * deltas[0] - 1.5 * deltas[1], rtol=0, atol=1e-6)
    exact = expected(runs, [0.25, -1.5], base())
    assert (values["0.weight"] - exact["0.weight"]).std() > 0.01  # includes the noise


def test_a_quantized_base_carries_the_sum(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16)).eval()
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    x = (torch.randn(6, 32, generator=torch.Generator().manual_seed(2)),)
    settings = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5)
    runs = [run(settings, [seed], build, x, ends=True) for seed in (1, 2)]
    merged = lx.merge([runs[0].saved(tmp_path), runs[1].cascade], build(), x, weights=[0.5, 2.0])
    plain = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16)).double()
    with torch.no_grad():
        for index in (0, 2):
            weight = build()[index].weight.dequantize().double()
            name = f"{index}.weight"
            plain[index].weight.copy_(weight + 0.5 * runs[0].delta[name] + 2.0 * runs[1].delta[name])
            plain[index].bias.copy_(build()[index].bias)
        torch.testing.assert_close(merged(*x).double(), plain(x[0].double()), rtol=0, atol=2e-5)
        torch.testing.assert_close(
            merged.release(quantized="dequantize")(*x).double(), plain(x[0].double()), rtol=0, atol=2e-5
        )


def test_buffers_that_differ_keep_the_values_of_the_base_with_a_warning() -> None:
    x = (torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1)),)
    runs = []
    for seed in (1, 2):
        cascade = lx.adapt(Net(), x, spec=lx.CascadeSpec(targets=("body",), rank=1))
        randomize(cascade, seed)
        cascade(torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed)))
        runs.append(cascade)
    assert not torch.equal(runs[0].model.norm.running_mean, runs[1].model.norm.running_mean)
    with warns("buffers-differ", "2", "norm.running_mean"):
        merged = lx.merge(runs, Net(), x)
    assert torch.equal(merged.model.norm.running_mean, Net().norm.running_mean)
    same = lx.merge([runs[0], runs[0]], Net(), x)
    assert torch.equal(same.model.norm.running_mean, runs[0].model.norm.running_mean)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5], ("invalid-value", "1", "2")),
        ([0.5, math.nan], ("invalid-value", "weights")),
        ([math.inf, 1.0], ("invalid-value", "weights")),
        ([True, 1.0], ("invalid-value", "weights", "True")),
        (["1", 1.0], ("invalid-value", "weights", "1")),
    ],
)
def test_invalid_weights_of_runs(weights: list[Any], message: tuple[str, ...]) -> None:
    runs, model = [run(spec(), [seed]).cascade for seed in (1, 2)], base()
    with unchanged(model, *runs), raises(lx.SpecError, *message):
        lx.merge(runs, model, call(), weights=weights)


def test_runs_that_cannot_be_summed_are_refused_without_changes(tmp_path: Path) -> None:
    run_a = run(spec(), [1]).cascade
    model = base()

    def refuse(error: type[lx.LorascError], expected: tuple[str, ...], runs: Any, onto: Any = model) -> None:
        with unchanged(model, run_a), raises(error, *expected):
            lx.merge(runs, onto, call())

    refuse(lx.SpecError, ("invalid-value", "merge"), [])
    refuse(lx.SpecError, ("invalid-value", "merge"), str(tmp_path))
    refuse(lx.SpecError, ("invalid-value", "run 2", "int"), [run_a, 3])
    refuse(lx.CheckpointError, ("no-checkpoint", str(tmp_path)), [run_a, tmp_path])
    refuse(lx.StateError, ("already-adapted",), [run_a], run_a.model)

    other_base = base()
    with torch.no_grad():
        other_base[2].weight[0, 0] += 1
    foreign = lx.adapt(other_base, call(), spec=spec())
    refuse(lx.CheckpointError, ("base-differs", "run 2", "2.weight"), [run_a, foreign])
    shorter = lx.adapt(nn.Sequential(*copy.deepcopy(base())[:3]), call(), spec=spec())
    refuse(lx.CheckpointError, ("base-differs", "3.weight", "3.bias"), [shorter, run_a])
    for options in ({"noise": lx.Noise(0.1, where="all")}, {"train": ("3.*",)}, {"targets": ("*.weight",)}):
        misfit = lx.adapt(base(), call(), spec=spec(**options))
        randomize(misfit)
        refuse(lx.SpecError, ("sites-differ", "run 1", "run 2", "3.weight"), [run_a, misfit])
    broken = run(spec(), [1]).cascade
    with torch.no_grad():
        broken.branches["0/weight"].lora_B[0, 0] = math.nan
    refuse(lx.NonFiniteBranch, ("non-finite", "0.weight"), [run_a, broken])


def test_a_sum_beyond_the_dtype_of_a_weight_is_refused() -> None:
    single, runs = torch.float32, []
    for seed in (1, 2):
        cascade = run(spec(train=("3.*",)), [seed], lambda: base(single), call(single)).cascade
        with torch.no_grad():
            cascade.model.get_parameter("3.weight").add_(0.1)
        cascade.transition(None)
        runs.append(cascade)
    with unchanged(model := base(single)), raises(lx.SpecError, "invalid-value", "overflows the dtype", "3.weight"):
        lx.merge(runs, model, call(single), weights=[9e39, 3e39])


def test_a_sum_that_fails_late_restores_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, model = [run(spec(noise=lx.Noise(0.2)), [seed]).cascade for seed in (1, 2)], base()
    before = of(model)

    def broken(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(*SEAMS["sum of runs"], broken)
    with pytest.raises(MemoryError):
        lx.merge(runs, model, call())
    after = of(model)
    hooks = [key for key in before if "hooks" in key]
    assert {key: value for key, value in after.items() if key not in hooks and "rng" not in key} == {
        key: value for key, value in before.items() if key not in hooks and "rng" not in key
    }
    monkeypatch.undo()
    lx.merge(runs, model, call()).release()


def test_without_inputs_the_first_call_makes_the_graph() -> None:
    runs = [run(spec(), (1, 2)).cascade, run(spec(rank=3), (3,)).cascade]
    at_once, later = lx.merge(runs, base(), call()), lx.merge(runs, base())
    assert (later.frontend, later.plan) == ("", at_once.plan)
    losses = [train(merged, optimizer_of(merged), call() * 2) for merged in (later, at_once)]
    assert torch.equal(*losses)
    same = [merged.release().state_dict().values() for merged in (later, at_once)]
    assert all(map(torch.equal, *same))
