"""Stages that start from the weight, compared with peft's `init_lora_weights="pissa"` in fp32 and the formula in fp64.

peft refuses to decompose fp64 weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit import tiny
from tests.kit.compare import assert_same
from tests.kit.errors import raises
from tests.kit.models import SCALE, batches, branches, mlp, optimizer_of, train, trainable_parameters
from tests.kit.state import weight_states
from tests.peft.models import seeded, weights

RANK = 3
PLAIN: dict[str, Any] = {"rank": RANK, "lora_alpha": 4.5, "pace": 1.0}
Pair = tuple[torch.Tensor, torch.Tensor]


def split(matrix: torch.Tensor, rank: int = RANK, scale: float = SCALE) -> Pair:
    """Return (B_0, A_0) of a matrix [out, in] by the formula of the paper."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def adapted(model: nn.Module, x: torch.Tensor, start: str = "pissa", **options: Any) -> lx.Cascade:
    spec = lx.CascadeSpec(**{**PLAIN, "start": start, **options})
    return lx.adapt(model, (x,), spec=spec)


def pairs(cascade: lx.Cascade) -> dict[str, Pair]:
    return {
        name: (branch.lora_B.detach().clone(), branch.lora_A.detach().clone())
        for name, branch in branches(cascade).items()
    }


def delta(start: Pair, end: Pair) -> torch.Tensor:
    """`s (B A - B_0 A_0)`."""
    (b0, a0), (b, a) = start, end
    return SCALE * (b @ a - b0 @ a0)


def test_the_start_is_the_formula() -> None:
    model, (x,) = mlp(), batches(1, 4, 5)
    base, before = weights(model), model(x)
    cascade = adapted(model, x)
    for name, (b, a) in pairs(cascade).items():
        b0, a0 = split(base[name], min(RANK, *base[name].shape))
        count = b0.shape[1]
        torch.testing.assert_close(b[:, :count] @ a[:count], b0 @ a0, rtol=0, atol=1e-14)
        assert not b[:, count:].any()  # a rank that the matrix has not starts as in LoRA
        torch.testing.assert_close(a[:count].norm(dim=1), a0.norm(dim=1), rtol=0, atol=1e-14)
        residual = cascade.model.get_parameter(name)
        torch.testing.assert_close(residual, base[name] - SCALE * b0 @ a0, rtol=0, atol=1e-14)
    assert (cascade(x) - before).abs().max() < 1e-14


def test_stages_equal_a_chain_of_pefts_models() -> None:
    """For each stage, call `merge_and_unload` and a new `get_peft_model` with peft's start, in fp32."""
    model, calls = mlp().float(), [call.float() for call in batches(6, 4, 5)]
    cascade = adapted(copy.deepcopy(model), calls[0], targets=("0", "2"))
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.05))
    for stage in range(3):
        config = peft.LoraConfig(r=RANK, lora_alpha=4.5, target_modules=["0", "2"], init_lora_weights="pissa")
        theirs = peft.get_peft_model(model, config)
        expected = train(theirs, torch.optim.SGD(trainable_parameters(theirs), lr=0.05), calls)
        torch.testing.assert_close(train(cascade, optimizer, calls), expected, rtol=0, atol=2e-6, msg=f"stage {stage}")
        model = theirs.merge_and_unload()
        cascade.transition(optimizer)
    ours = cascade.release()
    torch.testing.assert_close(ours.state_dict(), model.state_dict(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("restart", ["slow", "fast"])
def test_slow_and_fast_weights_are_the_formula(restart: str) -> None:
    """`S_t = S_{t-1} + pace (F_t - S_{t-1})`, `F_t = start + s (B A - B_0 A_0)`; noise in between leaves nothing."""
    model, calls, pace = mlp(), batches(4, 4, 5), 0.4
    base = weights(model)
    options = {"pace": pace, "restart": restart, "noise": lx.Noise(0.2)}
    cascade = adapted(model, calls[0], **options)
    optimizer = optimizer_of(cascade, "sgd")
    slow = {name: torch.zeros_like(value) for name, value in base.items()}
    begin = dict(slow)
    for _ in range(3):
        initial = pairs(cascade)
        for name, (b, a) in initial.items():
            count = min(RANK, *base[name].shape)
            b0, a0 = split(base[name] + begin[name], count)
            torch.testing.assert_close(b[:, :count] @ a[:count], b0 @ a0, rtol=0, atol=1e-13)
        train(cascade, optimizer, calls)
        fast = {name: begin[name] + delta(initial[name], pair) for name, pair in pairs(cascade).items()}
        assert all((fast[name] - begin[name]).abs().max() > 1e-3 for name in base)
        for view, expected in (("fast", fast), ("slow", slow), ("base", dict.fromkeys(base, 0.0))):
            with cascade.weights(view):
                for name, value in weights(cascade.model).items():
                    torch.testing.assert_close(value, base[name] + expected[name], rtol=0, atol=1e-13)
        cascade.transition(optimizer)
        slow = {name: slow[name] + pace * (fast[name] - slow[name]) for name in base}
        begin = slow if restart == "slow" else fast
    with cascade.weights(stage=3):
        for name, value in weights(cascade.model).items():
            torch.testing.assert_close(value, base[name] + slow[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("start", "adapter", "noise"), [("pissa", "lora", 0.0), ("lora", "dora", 0.0), ("lora", "dora", 0.3)]
)
def test_an_untrained_stage_changes_nothing(start: str, adapter: str, noise: float, dtype: torch.dtype) -> None:
    """Bit for bit, even after two untrained stages. While a stage runs, outputs are equal up to rounding."""
    model, x = mlp().to(dtype), batches(1, 4, 5)[0].to(dtype)
    base, before = weights(model), model(x).double()
    cascade = adapted(model, x, start, adapter=adapter, pace=0.3, noise=lx.Noise(noise))
    if adapter == "dora":
        for branch in branches(cascade).values():
            assert branch.lora_magnitude_vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    else:
        assert any(not torch.equal(value, base[name]) for name, value in weights(cascade.model).items())
    if not noise:
        assert (cascade(x).double() - before).abs().max() < 20 * torch.finfo(dtype).eps
    with cascade.weights("fast"):
        assert_same(weights(cascade.model), base)
    cascade.transition(None)
    cascade.transition(None)
    assert not any(state.experts for state in weight_states(cascade).values())
    assert_same(weights(cascade.release()), base)


def test_noise_lies_on_the_residual() -> None:
    """The noise equals the noise of a cascade with LoRA's start. Its scale comes from the whole weight."""
    x = batches(1, 4, 5)[0]
    cascade, plain = (adapted(mlp(), x, start, noise=lx.Noise(0.3)) for start in ("pissa", "lora"))
    expected = weights(plain.model)
    for name, (b, a) in pairs(cascade).items():
        residual = expected[name] - SCALE * b @ a
        torch.testing.assert_close(weights(cascade.model)[name], residual, rtol=0, atol=1e-14)
    assert (cascade(x) - plain(x)).abs().max() < 1e-14


class Odd(nn.Module):
    """A packed weight, a table, a stack of matrices, a transposed convolution, and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 5, 6))
        self.up = nn.ConvTranspose1d(6, 4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x, _ = self.lstm(x + self.attention(x, x, x, need_weights=False)[0])
        x = torch.einsum("bti,eio->bto", x, self.experts)
        return self.up(x.transpose(1, 2))


def gpt2() -> nn.Module:
    return tiny.gpt2(use_cache=False).double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("build", [lambda: Odd().double(), gpt2], ids=["odd", "gpt2"])
def test_every_kind_of_site(build: Callable[[], nn.Module]) -> None:
    """Slices, tables, stacks, weights stored as [in, out]: outputs stay, each matrix loses its leading part, and a
    trained branch is folded."""
    torch.manual_seed(4)
    model, ids = build(), torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
    base = weights(model)
    with torch.no_grad():
        before = seeded(model, (ids,))
    cascade = lx.adapt(model, (ids,), spec=lx.CascadeSpec(**PLAIN, start="pissa"))
    assert {site.kind for site in cascade.sites} >= {"embedding", "linear"}
    with torch.no_grad():
        after = seeded(cascade, (ids,))
    assert (after - before).abs().max() < 1e-12
    for site in cascade.sites:
        value, residual = base[site.weight], cascade.model.get_parameter(site.weight).detach()
        matrices = (
            list(zip(value, residual, strict=True)) if site.stacked else [(value.flatten(1), residual.flatten(1))]
        )
        for pair in matrices:
            weight, remaining = (matrix.mT if site.layout == "in_out" else matrix for matrix in pair)
            b, a = split(weight, min(RANK, *weight.shape))
            torch.testing.assert_close(remaining, weight - SCALE * b @ a, rtol=0, atol=1e-12, msg=site.weight)
    optimizer = optimizer_of(cascade, "sgd")
    train(cascade, optimizer, [ids] * 2)
    with torch.no_grad():
        trained, released = seeded(cascade, (ids,)), seeded(cascade.release(), (ids,))
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(released, trained, rtol=0, atol=1e-12)


def test_an_import_starts_from_the_sum(tmp_path: Path) -> None:
    """Export with twice the rank, for the original base, and start from the sum."""
    model, calls = mlp(), batches(5, 4, 5)
    base = copy.deepcopy(model)
    cascade = adapted(model, calls[0], targets=("0", "2"), pace=0.5, rank=1, lora_alpha=SCALE)
    train(cascade, optimizer_of(cascade), calls)
    assert set(lx.export.peft(cascade, tmp_path).ranks.values()) == {2}
    ours = copy.deepcopy(base)
    ours.load_state_dict(cascade.folded_state_dict())
    spec = lx.CascadeSpec(targets=("0", "2"), rank=1, lora_alpha=SCALE, start="pissa")
    again = lx.from_peft(tmp_path, copy.deepcopy(base), args=(calls[0],), spec=spec)
    torch.testing.assert_close(again(calls[0]), ours(calls[0]), rtol=0, atol=1e-12)
    for path in ("0", "2"):
        total = ours.get_submodule(path).weight.detach()
        b0, a0 = split(total, 1)  # out of the sum, not out of the base
        torch.testing.assert_close(again.model.get_submodule(path).weight, total - SCALE * b0 @ a0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("more", [{"start": "pissa"}, {"adapter": "dora"}], ids=str)
def test_a_second_loop_continues(more: dict[str, Any]) -> None:
    """Between two loops no stage runs and nothing counts as trained, so together they equal one loop."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for loops in ((2,), (1, 1)):
        torch.manual_seed(0)
        cascade = lx.adapt(nn.Linear(6, 5).double(), (x,), spec=lx.CascadeSpec(rank=2, pace=0.7, **more))
        before = cascade.model.weight.detach().clone()
        optimizer = torch.optim.SGD(cascade.param_groups(lr=0.05))
        for count in loops:
            for _ in cascade.stages(count, optimizer):
                train(cascade, optimizer, [x])
            assert torch.equal(cascade.model.weight, cascade.folded_state_dict()["weight"])
        results.append(cascade.release().weight.detach())
        assert (results[-1] - before).abs().max() > 1e-3
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"start": "pissa", "lora_alpha": RANK * 1.3}, {"adapter": "dora"}], ids=str)
def test_casts_and_copies(options: dict[str, Any]) -> None:
    """A cast keeps an untrained running stage untrained. A copy trains independently."""
    x = batches(1, 4, 5)[0]
    base, cascade = weights(mlp().float()), adapted(mlp(), x, **{"start": "lora", **options})
    cascade.float()
    assert (cascade(x.float()) - mlp().float()(x.float())).abs().max() < 2e-6
    with cascade.weights("fast"):
        assert_same(weights(cascade.model), base)
    twin = copy.deepcopy(cascade)
    train(twin, torch.optim.SGD(twin.param_groups(lr=0.1)), [x.float()])
    assert_same(weights(cascade.release()), base)
    assert not any(torch.equal(value, base[name]) for name, value in weights(twin.release()).items())


def test_sums_of_runs_start_from_the_sum() -> None:
    """After `merge`, the next stage takes its initial factors out of the sum."""
    x = batches(1, 4, 5)[0]
    runs = []
    for seed in (1, 2):
        cascade = adapted(mlp(), x, targets=("0", "2"), seed=seed)
        train(cascade, optimizer_of(cascade), batches(5, 4, 5, seed=seed))
        runs.append(cascade)
    total = mlp()
    expected = {
        name: value + sum(run.folded_state_dict()[name] - value for run in runs) / 2
        for name, value in weights(total).items()
    }
    total.load_state_dict({**total.state_dict(), **expected})
    merged = lx.merge(runs, mlp(), (x,))
    torch.testing.assert_close(merged(x), total(x), rtol=0, atol=1e-12)
    for path in ("0", "2"):
        b0, a0 = split(expected[f"{path}.weight"])
        residual = expected[f"{path}.weight"] - SCALE * b0 @ a0
        torch.testing.assert_close(merged.model.get_submodule(path).weight, residual, rtol=0, atol=1e-12)


def test_weights_without_a_decomposition_are_refused() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 2] = float("inf")
    with unchanged(model), raises(lx.SpecError, "non-finite", "start", "pissa", "2.weight"):
        adapted(model, batches(1, 4, 5)[0])
