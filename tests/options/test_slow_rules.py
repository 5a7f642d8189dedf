"""Rules of the slow update, and combinations with other options, each compared with its formula in fp64 or with torch.

Nesterov's momentum over stages (SNOO, 2510.15830), and the mean of the ends of stages weighted by their losses
(2504.18580).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import batches, branches, train
from tests.kit.state import stage_losses

PACE, MOMENTUM, STAGES = 0.4, 0.6, 4
LOSSES = (2.0, 0.5, 1.25, 0.75)
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EXACT = {"rtol": 1e-11, "atol": 1e-11}
Values = dict[str, Tensor]


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def adapted(**fields: Any) -> lx.Cascade:
    return lx.adapt(net(), (X,), spec=lx.CascadeSpec(**{"rank": 2, **fields}))


def placed(cascade: lx.Cascade, view: Any) -> Values:
    with cascade.weights(view):
        return {name: value.detach().clone() for name, value in cascade.model.named_parameters()}


def move(cascade: lx.Cascade, stage: int) -> Values:
    """Change all trainable parameters, and return the fast weights."""
    generator = torch.Generator().manual_seed(stage)
    with torch.no_grad():
        for parameter in cascade.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return placed(cascade, "fast")


def nesterov() -> Callable[[Values], Values]:
    """Use `S - F` as the gradient of SGD."""
    reference = {name: nn.Parameter(value.detach().clone()) for name, value in net().named_parameters()}
    optimizer = torch.optim.SGD(reference.values(), lr=PACE, momentum=MOMENTUM, nesterov=True)

    def after(fast: Values) -> Values:
        for name, parameter in reference.items():
            parameter.grad = parameter.detach() - fast[name]
        optimizer.step()
        return {name: parameter.detach() for name, parameter in reference.items()}

    return after


def weighted(penalty: float) -> Callable[[Values], Values]:
    ends: list[Values] = []

    def after(fast: Values) -> Values:
        ends.append(fast)
        weights = [loss**-penalty for loss in LOSSES[: len(ends)]]
        terms = list(zip(weights, ends, strict=True))
        return {name: sum(weight * end[name] for weight, end in terms) / sum(weights) for name in fast}  # type: ignore[misc]

    return after


SNOO = {"pace": PACE, "momentum": MOMENTUM}
MWA = {"pace": "loss", "loss_penalty": 1.5}
RULES: list[tuple[dict[str, Any], Callable[[], Callable[[Values], Values]]]] = [
    *((SNOO | more, nesterov) for more in ({}, {"rank": 5}, {"adapter": "hira"})),
    *((MWA | more, lambda: weighted(1.5)) for more in ({}, {"rank": 5}, {"adapter": "hira"}, {"adapter": "dora"})),
    *(
        (rule | more, oracle)
        for rule, oracle in ((SNOO, nesterov), (MWA, lambda: weighted(1.5)))
        for more in ({"restart": "fast"}, {"noise": lx.Noise(0.1)}, {"train": ("*.bias",)}, {"average": "swa"})
    ),
    ({"pace": "loss", "restart": "fast"}, lambda: weighted(1.0)),
    ({"pace": "loss", "loss_penalty": 0.0}, lambda: weighted(0.0)),
    ({"pace": "mean"}, lambda: weighted(0.0)),
]


@pytest.mark.parametrize(("fields", "oracle"), RULES, ids=[str(fields) for fields, _ in RULES])
def test_the_slow_weights(fields: dict[str, Any], oracle: Any, tmp_path: Path) -> None:
    """The run is resumed from a checkpoint halfway."""
    cascade, expected = adapted(**fields), oracle()
    for stage in range(STAGES):
        wanted = expected(move(cascade, stage))
        cascade.transition(None, loss=torch.tensor(LOSSES[stage]) if stage % 2 else LOSSES[stage])
        slow = placed(cascade, "slow")
        for name, value in wanted.items():
            torch.testing.assert_close(slow[name], value, **EXACT)
        if stage == 1:
            lx.save(cascade, tmp_path / "run")
            cascade = lx.load(tmp_path / "run", net(), (X,))
            assert all(torch.equal(value, slow[name]) for name, value in placed(cascade, "slow").items())


@pytest.mark.parametrize(("fields", "share"), [(SNOO, PACE * (1 + MOMENTUM)), (MWA, 4**-1.5 / (4**-1.5 + 2**-1.5))])
def test_a_rewound_run_forgets_what_came_later(fields: dict[str, Any], share: float) -> None:
    """A rewind restores the velocity and the losses."""
    cascade = adapted(rank=1, **fields)
    for stage in range(2):
        move(cascade, stage)
        cascade.transition(None, loss=LOSSES[stage])
    cascade.rewind(1, None)
    before, fast = placed(cascade, "slow"), move(cascade, 7)
    cascade.transition(None, loss=4.0)
    after = placed(cascade, "slow")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value + share * (fast[name] - value), **EXACT)


def test_extreme_losses() -> None:
    """No power overflows, and a large penalty selects the best stage."""
    cascade = adapted(pace="loss", loss_penalty=1e6, restart="fast")
    ends = []
    for stage, loss in enumerate((1e-300, 1e-308, 1e308)):
        ends.append(move(cascade, stage))
        cascade.transition(None, loss=loss)
    for name, value in placed(cascade, "slow").items():
        torch.testing.assert_close(value, ends[1][name], **EXACT)


BAD = [None, math.nan, math.inf, 0.0, -1.0, "low", torch.ones(2), torch.tensor(math.nan)]


@pytest.mark.parametrize("loss", BAD, ids=str)
def test_a_loss_that_weights_nothing(loss: Any) -> None:
    cascade = adapted(pace="loss")
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    move(cascade, 0)
    told = "missing" if loss is None else repr(loss)
    with (
        unchanged(cascade, optimizer),
        raises(lx.SpecError, "invalid-value", "stage 1", told, "pace='loss'", "loss=..."),
    ):
        cascade.transition(optimizer, loss=loss)
    loop = cascade.stages(1, optimizer)
    next(loop).loss = loss
    with unchanged(cascade, optimizer), raises(lx.SpecError, "invalid-value", "stage 1", told, "stage.loss"):
        next(loop)


def test_a_running_stage_without_a_loss_is_not_folded(tmp_path: Path) -> None:
    cascade = adapted(pace="loss")
    move(cascade, 0)
    lx.save(cascade, tmp_path)
    for call in (cascade.release, cascade.folded_state_dict, lambda: lx.merge([tmp_path], net(), (X,))):
        with unchanged(cascade), raises(lx.SpecError, "invalid-value", "loss of stage 1 is missing"):
            call()
    cascade.transition(None, loss=3.0)
    assert stage_losses(cascade) == {1: 3.0}
    cascade.release()


def test_stages_of_a_loop_have_losses() -> None:
    cascade = adapted(pace="loss")
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    for stage in cascade.stages(2, optimizer):
        move(cascade, stage.number)
        stage.loss = LOSSES[stage.index]
    assert stage_losses(cascade) == {1: LOSSES[1], 2: LOSSES[2]}
    assert "pace loss" in str(cascade)


EYE = torch.eye(12, dtype=torch.float64)
INPUT = batches(1, 6, 12)[0]
PACES = (1.0, 0.5)
SPECS: dict[str, dict[str, Any]] = {
    "ranks, pissa": {"ranks": (3, 2), "start": "pissa"},
    "ranks, olora": {"ranks": (3, 2), "start": "olora"},
    "ranks, dora": {"ranks": (3, 2), "adapter": "dora"},
    "ranks, fixed": {"ranks": (3, 2), "train_A": False, "nearest_full_gradient": True},
    "ranks, plus": {"ranks": (3, 2), "lr_ratio": 4.0},
    "ranks, redrawn": {"ranks": (3, 2), "noise": lx.Noise(0.1, redraw="step")},
    "fixed, pissa": {"rank": 2, "train_A": False, "start": "pissa"},
    "fixed, dora": {"rank": 2, "train_A": False, "adapter": "dora"},
    "average, pissa": {"rank": 2, "average": "swa", "start": "pissa"},
    "plus, dora": {"rank": 2, "lr_ratio": 4.0, "adapter": "dora"},
    "olora, dora, ranks": {"ranks": (1, 3), "start": "olora", "adapter": "dora"},
    "olora, average": {"rank": 2, "start": "olora", "average": "ema"},
    "all": {"ranks": (3, 2), "average": "ema", "train_A": False, "start": "olora", "noise": lx.Noise(0.1)},
}


def made(options: dict[str, Any]) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    spec = lx.CascadeSpec(**{"lora_alpha": 3.0, "pace": PACES} | options)
    cascade = lx.adapt(model, (INPUT,), spec=spec)
    return cascade, torch.optim.AdamW(cascade.param_groups(lr=3e-2))


def computed(cascade: lx.Cascade) -> torch.Tensor:
    """Return the weight that the cascade computes with now, from its outputs without the bias."""
    with torch.no_grad():
        return (cascade(EYE) - cascade(0 * EYE)).t()


@pytest.mark.parametrize("name", SPECS)
def test_stages_are_the_recursion(name: str, tmp_path: Path) -> None:
    options = SPECS[name]
    cascade, optimizer = made(options)
    slow = cascade.model[0].weight.new_zeros(9, 12)
    with cascade.weights("base"):
        slow = cascade.model[0].weight.detach().clone()
    ends = []
    for number in (1, 2, 3):
        rank = options.get("ranks", (2, 2))[min(number, 2) - 1]
        assert branches(cascade)["0.weight"].rank == rank
        a = branches(cascade)["0.weight"].lora_A.detach().clone()
        train(cascade, optimizer, batches(3, 6, 12, seed=number))
        assert torch.equal(branches(cascade)["0.weight"].lora_A, a) == (not options.get("train_A", True))
        with cascade.weights("fast"):
            fast = computed(cascade)
        if "noise" not in options:
            torch.testing.assert_close(computed(cascade), fast, rtol=0, atol=1e-12)
        assert (fast - slow).abs().max() > 1e-3
        slow = slow + PACES[min(number, 2) - 1] * (fast - slow)
        cascade.transition(optimizer)
        ends.append(slow)
        with cascade.weights("slow"):
            torch.testing.assert_close(cascade.model[0].weight.detach(), slow, rtol=0, atol=1e-11)
        if number == 2:
            lx.save(cascade, tmp_path, optimizer=optimizer)
            torch.manual_seed(3)
            cascade = lx.load(tmp_path, nn.Sequential(nn.Linear(12, 9)).double(), (INPUT,))
            optimizer = torch.optim.AdamW(cascade.param_groups(lr=3e-2))
            cascade.resume(optimizer)
    if options.get("average", "off") != "off":
        first, second, third = ends
        expected = (first + second + third) / 3 if options["average"] == "swa" else None
        if expected is None:
            expected = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third
        with cascade.weights("averaged"):
            torch.testing.assert_close(cascade.model[0].weight.detach(), expected, rtol=0, atol=1e-11)
    model = cascade.release()
    torch.testing.assert_close(model[0].weight.detach(), slow, rtol=0, atol=1e-11)
