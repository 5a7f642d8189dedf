"""Learning rates by factor and after a restart: by formula, and with schedulers of torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch.optim import lr_scheduler

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import PLAIN, batches, lora_of, mlp, train

X = batches(1, 4, 5)[0]
WARMUP = 3


def adapted(**options: Any) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    spec = lx.CascadeSpec(rank=2, targets=("0.weight", "2.weight"), train=("4.*",), lr_ratio=8.0, **options)
    cascade = lx.adapt(mlp(), (X,), spec=spec)
    return cascade, torch.optim.AdamW(cascade.param_groups(lr=0.1))


def stepped(
    cascade: lx.Cascade, optimizer: torch.optim.Optimizer, scheduler: Any, late: bool = False
) -> tuple[list[list[float]], list[float]]:
    """Run three stages of five steps. Return the rates of each step, and the losses."""
    seen, losses = [], []

    def look(stepping: torch.optim.Optimizer, *_: Any) -> None:
        seen.append([group["lr"] for group in stepping.param_groups])

    watch = optimizer.register_step_pre_hook(look)
    for number, call in enumerate(batches(15, 4, 5), start=1):
        losses += train(cascade, optimizer, [call]).tolist()
        if late and number % 5 == 0:
            cascade.transition(optimizer)
        scheduler.step()
        if late and number % 5 == 0:  # the rate of the next step is logged
            assert scheduler.get_last_lr()[0] <= 0.1 / (WARMUP + 1)
        if not late and number % 5 == 0:
            cascade.transition(optimizer)
    watch.remove()
    return seen, losses


@pytest.mark.parametrize("late", [False, True], ids=["scheduler first", "transition first"])
def test_the_rate_warms_up_in_each_stage(late: bool) -> None:
    cascade, optimizer = adapted()
    scheduler = lx.StageSchedule(optimizer, cascade, warmup=WARMUP)
    seen, _ = stepped(cascade, optimizer, scheduler, late)
    for step, rates in enumerate(seen):
        factor = min(1.0, (step % 5 + 1) / (WARMUP + 1))
        assert rates == pytest.approx([rate * factor for rate in (0.1, 0.8, 0.1)], rel=1e-12)
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_every_loop_over_stages_and_every_rewind_is_a_restart() -> None:
    cascade, optimizer = adapted()
    scheduler = lx.StageSchedule(optimizer, cascade, warmup=WARMUP)
    for _ in range(2):
        for _ in cascade.stages(2, optimizer):
            for step in range(5):
                train(cascade, optimizer, [X])
                assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * min(1, (step + 1) / 4))
                scheduler.step()
    cascade.rewind(0, optimizer)
    train(cascade, optimizer, [X])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)


def test_a_resumed_run_has_the_same_rates(tmp_path: Path) -> None:
    def schedule(optimizer: torch.optim.Optimizer, cascade: lx.Cascade) -> lx.StageSchedule:
        return lx.StageSchedule(optimizer, cascade, (5, 4), warmup=WARMUP)

    uninterrupted, steps = adapted()
    expected, losses = stepped(uninterrupted, steps, schedule(steps, uninterrupted))

    cascade, optimizer = adapted()
    scheduler = schedule(optimizer, cascade)
    calls = batches(15, 4, 5)
    resumed = []
    for number, call in enumerate(calls, start=1):
        resumed += train(cascade, optimizer, [call]).tolist()
        assert [group["lr"] for group in optimizer.param_groups] == expected[number - 1]
        scheduler.step()
        if number % 5 == 0:
            cascade.transition(optimizer)
        if number in (5, 7):
            lx.save(cascade, tmp_path, optimizer=optimizer, scheduler=scheduler)
            cascade = lx.load(tmp_path, mlp(), (X,))
            optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
            scheduler = schedule(optimizer, cascade)
            cascade.resume(optimizer, scheduler)
    assert resumed == losses


def test_a_group_that_comes_later_and_a_rate_that_is_a_tensor() -> None:
    cascade, _ = adapted()
    groups = cascade.param_groups(lr=0.1)
    optimizer = torch.optim.AdamW(
        [{**group, "lr": torch.tensor(group["lr"])} for group in groups[:2]], capturable=False
    )
    scheduler = lx.StageSchedule(optimizer, cascade, warmup=WARMUP)
    rate = optimizer.param_groups[0]["lr"]
    assert rate.item() == pytest.approx(0.1 / 4)
    optimizer.add_param_group({"params": groups[2]["params"], "lr": 0.3})
    train(cascade, optimizer, [X])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate  # compiled steps hold the tensor
    assert rate.item() == pytest.approx(0.2 / 4)
    assert optimizer.param_groups[2]["lr"] == pytest.approx(0.3 * 2 / 4)


REFUSED: tuple[tuple[str, Any], ...] = (
    *(("warmup", value) for value in (-1, True, 1.5)), *(("floor", value) for value in (1.1, True)),
    *(("steps", value) for value in (0, (5, 0), ())),
)  # fmt: skip


@pytest.mark.parametrize(("option", "value"), REFUSED)
def test_what_is_refused(option: str, value: Any) -> None:
    cascade, optimizer = adapted()
    shown = "empty" if value == () else value[-1] if isinstance(value, tuple) else value
    with raises(lx.SpecError, "invalid-value", "StageSchedule", option, shown):
        lx.StageSchedule(optimizer, cascade, **{option: value})


def cosine_rates(steps: int, floor: float) -> list[float]:
    """Return the rates of torch's cosine before each step, for a full rate of 0.1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, rates = lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=floor), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_the_rate_decays_within_each_stage(floor: float) -> None:
    """Compared with torch's scheduler, created again for each stage. Stages have 5, 3 and 3 steps."""
    cascade, optimizer = adapted()
    scheduler = lx.StageSchedule(optimizer, cascade, (5, 3), floor=floor)
    seen: list[float] = []
    for length, stage in zip((5, 3, 3), cascade.stages(3, optimizer), strict=True):
        for _ in range(length + (stage.number == 3)):  # one step more than it was told: the floor
            train(cascade, optimizer, [X])
            seen.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    expected = [rate for length in (5, 3, 3) for rate in cosine_rates(length, 0.1 * floor)] + [0.1 * floor]
    assert seen == pytest.approx(expected, rel=1e-9, abs=1e-15)


LR = 3e-3
LINEARS = ("0", "2", "4")


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_lora_plus_is_pefts(optimizer: Any) -> None:
    original = copy.deepcopy(mlp())
    cascade = lx.adapt(mlp(), (X,), spec=lx.CascadeSpec(**PLAIN, lr_ratio=16.0))
    theirs = lora_of(cascade, original, LINEARS)
    plain = lx.adapt(mlp(), (X,), spec=lx.CascadeSpec(**PLAIN))
    calls = batches(20, 4, 5)
    ours = train(cascade, optimizer(cascade.param_groups(lr=LR), weight_decay=0.0), calls)
    loraplus = create_loraplus_optimizer(theirs, optimizer, lr=LR, loraplus_lr_ratio=16.0)
    expected = train(theirs, loraplus, calls)
    without = train(plain, optimizer(plain.param_groups(lr=LR), weight_decay=0.0), calls)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert (ours - without).abs().max() > 1e-4  # the ratio is felt


def test_rates_of_groups() -> None:
    spec = lx.CascadeSpec(targets=("0.weight",), train=("4.*", "0.bias"), lr_ratio=4.0)
    cascade = lx.adapt(mlp(), (X,), spec=spec)
    groups = cascade.param_groups(lr=0.1, betas=(0.8, 0.9))
    settings = [(group["name"], group["lr"], group["betas"]) for group in groups]
    assert settings == [("lora_A", 0.1, (0.8, 0.9)), ("lora_B", 0.4, (0.8, 0.9)), ("train", 0.1, (0.8, 0.9))]
    named = dict(cascade.model.named_parameters())
    trained = {id(parameter) for parameter in groups[2]["params"]}
    assert trained == {id(named[name]) for name in ("4.weight", "4.bias", "0.bias")}
    assert [group["name"] for group in lx.adapt(mlp(), (X,)).param_groups(lr=0.1)] == ["lora_A", "lora_B"]
