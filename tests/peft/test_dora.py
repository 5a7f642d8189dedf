"""DoRA (`adapter="dora"`): its places; peft's own in fp64, step by step and by stages; the slow rule by its formula,
`W <- (1 - p) W + p diag(m / |W + s B A|) (W + s B A)`, in dense tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import SCALE, Breaking, batches, branches, mlp, optimizer_of, randomize, train
from tests.kit.state import weight_states
from tests.peft.models import weights

RANK = 3
PLAIN: dict[str, Any] = {"rank": RANK, "lora_alpha": 4.5, "pace": 1.0, "adapter": "dora"}


def conv_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, (3, 2), stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Flatten(2),
        nn.Conv1d(6, 5, 3, padding=1),
        nn.Unflatten(2, (2, 2, -1)),
        nn.Conv3d(5, 2, (2, 1, 2)),
    ).double()


def wide() -> nn.Module:
    """No weight that four experts of rank 1 fill."""
    torch.manual_seed(6)
    convs = nn.Sequential(nn.Conv2d(3, 9, (3, 2), stride=2), nn.Tanh(), nn.Conv2d(9, 12, 3, padding=1, bias=False))
    return nn.Sequential(convs, nn.Tanh(), nn.Flatten(), nn.Linear(144, 11), nn.Tanh(), nn.Linear(11, 10)).double()


CASES = {
    "mlp": (mlp, lambda count: batches(count, 4, 5)),
    "conv": (conv_net, lambda count: batches(count, 3, 3, 8, 6)),
    "wide": (wide, lambda count: batches(count, 3, 3, 9, 7)),
}


def adapted(model: nn.Module, x: torch.Tensor, frontend: str = "auto", **options: Any) -> lx.Cascade:
    return lx.adapt(model, (x,), spec=lx.CascadeSpec(**{**PLAIN, **options}), frontend=frontend)


def norms(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1).norm(dim=1).view(-1, *(1 for _ in weight.shape[1:]))


def trained(cascade: lx.Cascade, name: str, weight: torch.Tensor, noise: torch.Tensor | float = 0.0) -> torch.Tensor:
    """`diag(m / |W + N + s B A|) (W + s B A)` with the branch's present numbers."""
    branch = branches(cascade)[name]
    delta = SCALE * (branch.lora_B @ branch.lora_A).detach().view_as(weight)
    magnitude = branch.lora_magnitude_vector.detach().view(-1, *(1 for _ in weight.shape[1:]))
    return magnitude / norms(weight + delta + noise) * (weight + delta)


def assert_weights(model: nn.Module, expected: dict[str, torch.Tensor], atol: float = 1e-12) -> None:
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize(("name", "rank"), [("mlp", RANK), ("conv", RANK), ("wide", 1)])
def test_slow_and_fast_weights_are_the_formula(name: str, rank: int, noise: float) -> None:
    """Check all steps and stage ends over four stages, with experts kept or summed into a dense delta."""
    build, inputs = CASES[name]
    model, calls, pace = build(), inputs(4), 0.4
    base = weights(model)
    cascade = adapted(
        model, calls[0], rank=rank, lora_alpha=SCALE * rank, pace=pace, noise=lx.Noise(noise), optimizer_state="kept"
    )
    optimizer = optimizer_of(cascade, "sgd")
    slow, ends = dict(base), [dict(base)]
    for _ in range(4):
        drawn = {name: value - slow[name] for name, value in weights(cascade.model).items()}
        assert noise or all(value.abs().max() < 1e-13 for value in drawn.values())
        train(cascade, optimizer, calls)
        fast = {name: trained(cascade, name, slow[name], drawn[name]) for name in base}
        assert all((fast[name] - slow[name]).abs().max() > 1e-5 for name in base)
        for view, expected in (("fast", fast), ("slow", slow), ("base", base)):
            with cascade.weights(view):
                assert_weights(cascade.model, expected)
        cascade.transition(optimizer)
        slow = {name: (1 - pace) * slow[name] + pace * fast[name] for name in base}
        if noise == 0:
            assert_weights(cascade.model, slow)
        ends.append(slow)
    states = weight_states(cascade).values()
    assert any(state.is_dense for state in states) == (rank == RANK)
    if rank == 1:
        for stage, expected in enumerate(ends):
            with cascade.weights(stage=stage):
                assert_weights(cascade.model, expected)
        cascade.rewind(2, optimizer)
        train(cascade, optimizer, calls)
        with cascade.weights("slow"):
            assert_weights(cascade.model, ends[2])


def test_a_stage_that_trains_only_magnitudes() -> None:
    """B = 0, but m has changed: a stage without an expert, whose rows are scaled nevertheless."""
    model, (x,) = mlp(), batches(1, 4, 5)
    base = weights(model)
    cascade = adapted(model, x, pace=0.5)
    with torch.no_grad():
        for branch in branches(cascade).values():
            branch.lora_magnitude_vector.mul_(torch.linspace(-1, 2, len(branch.lora_magnitude_vector)).double())
    scales = {name: torch.linspace(-1, 2, len(value)).double()[:, None] for name, value in base.items()}
    before = cascade(x).detach()
    with cascade.weights("fast"):
        torch.testing.assert_close(cascade(x), before, rtol=0, atol=1e-14)
    cascade.transition(None)
    expected = {name: (0.5 + 0.5 * scales[name]) * value for name, value in base.items()}
    assert_weights(cascade.release(), expected, atol=1e-14)


def test_with_a_start_from_the_weight() -> None:
    """PiSSA and DoRA: `diag(m / |W_r + s B A|) (W_r + s B A)` of the residual W_r that the parameter holds."""
    model, calls = mlp(), batches(5, 4, 5)
    base, before = weights(model), model(calls[0])
    cascade = adapted(model, calls[0], start="pissa", pace=0.5, targets=("0", "2"))
    residual = weights(cascade.model)
    torch.testing.assert_close(cascade(calls[0]), before, rtol=0, atol=1e-13)
    train(cascade, optimizer_of(cascade, "sgd"), calls)
    names = ("0.weight", "2.weight")
    fast = {name: trained(cascade, name, residual[name]) for name in names}
    with cascade.weights("fast"):
        for name in names:
            torch.testing.assert_close(weights(cascade.model)[name], fast[name], rtol=0, atol=1e-13)
    released = cascade.release()
    for name in names:
        assert (fast[name] - base[name]).abs().max() > 1e-3
        torch.testing.assert_close(weights(released)[name], (base[name] + fast[name]) / 2, rtol=0, atol=1e-13)


def test_weights_without_a_place_for_magnitudes() -> None:
    """The error names them before anything is changed."""
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 3)).double()
    before = weights(model)
    ids = torch.tensor([[1, 2, 3]])
    with raises(lx.SpecError, "method-not-supported", "dora", "0.weight", "embedding"):
        lx.adapt(model, (ids,), spec=lx.CascadeSpec(adapter="dora"))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert all(value.requires_grad for value in model.parameters())
    assert len(lx.adapt(model, (ids,), spec=lx.CascadeSpec(adapter="dora", exclude=("0.weight",))).sites) == 1


def test_sums_are_refused() -> None:
    x = batches(1, 4, 5)[0]
    cascade = adapted(mlp(), x)
    randomize(cascade)
    with raises(lx.SpecError, "method-not-supported", "1"):
        lx.merge([cascade], mlp(), (x,))


class TwoWays(nn.Module):
    """A model that uses its weight in eval mode in a way that magnitudes do not support."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) if self.training else x @ torch.tanh(self.lin.weight).t()


def test_a_later_use_without_a_place_for_magnitudes() -> None:
    x = batches(1, 4, 5)[0]
    cascade = adapted(TwoWays().double(), x)
    before = cascade(x).detach()
    cascade.eval()
    with raises(lx.PassError, "method-not-supported", "lin.weight"):
        cascade(x)
    cascade.train()
    assert torch.equal(cascade(x), before)


def test_a_model_without_a_graph_is_refused() -> None:
    model, x = Breaking().double(), batches(1, 4, 5)[0]
    with raises(lx.SpecError, "method-not-supported", "dora", "Breaking", "linear.weight"):
        adapted(model, x, "eager")
    assert all(value.requires_grad for value in model.parameters())


def test_a_row_scaled_to_zero_cannot_be_exported(tmp_path: Path) -> None:
    cascade = adapted(mlp(), batches(1, 4, 5)[0])
    randomize(cascade)
    with torch.no_grad():
        branches(cascade)["2.weight"].lora_magnitude_vector[1] = 0
    with raises(lx.SpecError, "method-not-supported", "max_rank", "2"):
        lx.export.peft(cascade, tmp_path / "cut", max_rank=2)
    with raises(lx.export.ExportError, "not-exportable", "2.weight", "0"):
        lx.export.peft(cascade, tmp_path / "adapter")
