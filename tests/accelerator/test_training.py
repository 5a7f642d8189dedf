"""Training on a device: which one, in which precision, at what cost, and from which random numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasc_fx as lx
from tests.accelerator.kit import (
    DEVICE,
    OTHER,
    SIMULATED,
    Mlp,
    Side,
    assert_same,
    at_each_allocation,
    build,
    compare,
    counted,
    loss_of,
    simulated_only,
    tensors,
    two_devices,
    without_fp64,
)
from tests.kit.state import weight_states

NOISY = lx.CascadeSpec(rank=2, noise=lx.Noise(0.1))


def run(side: Side) -> None:
    for _ in side.cascade.stages(2, side.optimizer):
        side.step(2)
        side.show("trained", tensors(side.cascade))
        with side.cascade.weights("fast"), torch.no_grad():
            side.show("fast weights", side.call())
    side.show("ended", tensors(side.cascade))


# ---- devices


@two_devices
@pytest.mark.parametrize("name", ["mlp", "conv", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    used = torch.accelerator.memory_allocated(DEVICE)
    compare(name, NOISY, run, device=OTHER)
    assert torch.accelerator.current_device_index() == 0
    # Keys of checksums, one set a process, are made on the current device.
    assert not SIMULATED or torch.accelerator.memory_allocated(DEVICE) - used < 10 << 20


class Split(Mlp):
    """A model on two devices: each layer takes its input to where it is."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = torch.relu(layer(x.to(layer.weight.device)))
        return self.head(x.to(self.head.weight.device))


@two_devices
def test_a_model_on_two_devices() -> None:
    shown = []
    for outer, inner in (("cpu", "cpu"), (DEVICE, OTHER), ("cpu", DEVICE)):
        torch.manual_seed(0)
        model, x, labels = Split(), torch.randn(4, 12), torch.randint(12, (4,))
        model.first.to(outer), model.second.to(inner), model.head.to(outer)
        cascade = lx.adapt(model, args=(x.to(outer),), spec=NOISY)
        assert {str(branch.lora_A.device.type) for branch in cascade.branches.values()} == {
            torch.device(outer).type,
            torch.device(inner).type,
        }
        optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2), eps=1e-3)
        for _ in cascade.stages(2, optimizer):
            loss_of(cascade(x.to(outer)), labels.to(outer)).backward()
            optimizer.step()
            optimizer.zero_grad()
        shown.append(tensors(cascade))
    assert_same(shown[0], shown[1])
    assert_same(shown[0], shown[2])


# ---- precision


def scaled(side: Side, dtype: torch.dtype) -> None:
    # The first losses overflow in fp16, and their steps are skipped.
    scaler = torch.amp.GradScaler(side.device.type, init_scale=2.0**20, growth_interval=2)
    for _ in side.cascade.stages(2, side.optimizer):
        for _ in range(3):
            with torch.autocast(side.device.type, dtype):
                loss = loss_of(side.call(), side.labels)
            scaler.scale(loss).backward()
            scaler.step(side.optimizer)
            scaler.update()
            side.optimizer.zero_grad()
        side.show("trained", tensors(side.cascade))
    side.show("scale", scaler.get_scale())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["mlp", pytest.param("llama", marks=pytest.mark.slow), "conv"])
def test_autocast_with_a_scaler(name: str, dtype: torch.dtype) -> None:
    scenario = partial(scaled, dtype=dtype)
    scenario.__name__ = f"scaled in {dtype}"  # type: ignore[attr-defined]
    compare(name, NOISY, scenario)


# ---- costs

FROZEN: dict[str, tuple[str, torch.dtype, lx.CascadeSpec]] = {
    "plain": ("mlp", torch.float32, lx.CascadeSpec(rank=2)),
    "dora": ("mlp", torch.float32, lx.CascadeSpec(rank=2, adapter="dora")),
    "grid": ("mlp", torch.float32, lx.CascadeSpec(rank=2, grid="bfloat16")),
    "dora on a grid": ("mlp", torch.float32, lx.CascadeSpec(rank=2, adapter="dora", grid="bfloat16")),
    "adapter dropout": ("mlp", torch.float32, lx.CascadeSpec(rank=2, dropout=0.1)),
    "Llama in bf16": ("llama", torch.bfloat16, lx.CascadeSpec(rank=2)),
    "BERT": ("bert", torch.float32, lx.CascadeSpec(rank=2)),
}


@simulated_only
@pytest.mark.parametrize("case", FROZEN)
def test_a_step_neither_copies_nor_waits(case: str) -> None:
    name, dtype, spec = FROZEN[case]
    side = Side(name, DEVICE, spec, dtype)
    side.transition()
    side.step()
    with counted() as counts:
        side.step(2)
    assert counts["kernels"] > 10
    assert not {"to_device", "to_host", "across", "waits"} & counts.keys(), counts


# ---- random numbers


def states() -> list[Tensor]:
    module = torch.get_device_module(DEVICE)
    return [torch.get_rng_state(), *(module.get_rng_state(index) for index in range(module.device_count()))]


def test_adapt_leaves_all_generators_unchanged() -> None:
    model, (args, kwargs), _ = build("dropout")
    model.to(DEVICE)
    torch.manual_seed(5)
    before = states()
    lx.adapt(model, tuple(arg.to(DEVICE) for arg in args), kwargs, spec=NOISY)
    assert all(map(torch.equal, states(), before))


def test_a_graph_with_dropout_draws_what_the_model_draws() -> None:
    model, (args, _), _ = build("dropout")
    x = args[0].to(DEVICE)
    model.to(DEVICE)
    torch.manual_seed(1)
    expected = model(x)
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2))
    torch.manual_seed(1)
    assert torch.equal(cascade(x), expected)


def test_a_resumed_run_draws_the_same_masks(tmp_path: Path) -> None:
    side = Side("dropout", DEVICE, NOISY)
    torch.manual_seed(7)
    side.transition()
    side.step()
    lx.save(side.cascade, tmp_path, optimizer=side.optimizer)
    side.step(2)
    torch.manual_seed(8)
    twin = side.twin()
    twin.adopt(lx.load(tmp_path, *twin.inputs)).resume(twin.optimizer)
    twin.step(2)
    assert_same(tensors(twin.cascade), tensors(side.cascade))


NOISE: dict[str, Any] = {"noise": lx.Noise(0.1)}


def entered(name: str) -> Callable[[Side], None]:
    def inside(side: Side) -> None:
        with side.cascade.weights(name):
            pass

    return inside


ACTIONS: dict[str, Callable[[Side], object]] = {
    "transition": lambda side: side.cascade.transition(side.optimizer),
    "slow weights": entered("slow"),
    "fast weights": entered("fast"),
    "step": lambda side: side.step(),
}


def traffic(spec: dict[str, Any], base: str, action: str, dtype: torch.dtype) -> tuple[dict[str, int], int, int, int]:
    """What an action of a stage copies; the bytes of W0 and of the factors, and the number of sites."""
    side = Side("llama", DEVICE, lx.CascadeSpec(rank=2, **spec), dtype, adapted=False)
    side.adopt(lx.adapt(*side.inputs, spec=side.spec, base_memory=base))
    for _ in range(2):
        side.transition()
    side.step()
    weights = [state.base.nbytes for state in weight_states(side.cascade).values()]
    factors = sum(factor.nbytes for branch in side.cascade.branches.values() for factor in branch.parameters())
    with counted() as counts:
        ACTIONS[action](side)
    return dict(counts), sum(weights), factors, len(weights)


SMALL = 64
"""Bytes a site: seeds of blocks, sizes of the noise, sums of factors."""


@simulated_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, NOISE], ids=["plain", "noise"])
@pytest.mark.parametrize("action", ["transition", "slow weights", "fast weights"])
def test_weights_travel_once_in_their_own_dtype(action: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """W0 to the device, and noise is made there. Slow weights without noise are there already.

    A transition writes each weight once. The block of `weights` writes it, and restores it at the end.
    """
    counts, weights, factors, sites = traffic(options, "memory", action, dtype)
    ways = 1 if action == "transition" else 2 if action == "fast weights" or options else 0
    stages = 4  # the factors of two stages that ended, of the running one, and of the next
    assert counts.get("to_device_bytes", 0) <= ways * (weights + stages * factors + SMALL * sites), counts
    assert counts.get("to_device", 0) <= ways * sites * (2 + 2 * stages), counts
    assert counts.get("to_host_bytes", 0) <= 2 * factors + SMALL * sites, counts


@simulated_only
@pytest.mark.parametrize("options", [{}, NOISE], ids=["plain", "noise"])
@pytest.mark.parametrize("action", ACTIONS)
def test_with_the_base_on_the_device_nothing_travels(action: str, options: dict[str, Any]) -> None:
    counts, _, factors, sites = traffic(options, "device", action, torch.bfloat16)
    new = factors if action == "transition" else 0  # the host draws the next ones, and compares the old ones
    assert counts.get("to_device_bytes", 0) <= new + SMALL * sites, counts
    assert counts.get("to_host_bytes", 0) <= new + SMALL * sites, counts


@simulated_only
def test_where_the_base_is_changes_no_bit() -> None:
    shown = []
    for base in ("memory", "device"):
        side = Side("llama", DEVICE, lx.CascadeSpec(rank=2, **NOISE), torch.bfloat16, adapted=False)
        side.adopt(lx.adapt(*side.inputs, spec=side.spec, base_memory=base))
        side.transition()
        side.step()
        assert {state.base.device.type for state in weight_states(side.cascade).values()} == {
            "cpu" if base == "memory" else DEVICE
        }
        with side.cascade.weights("fast"):
            side.show("fast", dict(side.cascade.model.state_dict()))
        side.transition()
        side.show("state", dict(side.cascade.model.state_dict()))
        side.show("released", side.cascade.release().state_dict())
        shown.append(side.shown)
    for (label, tree), (_, expected) in zip(*shown, strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in tree.items()), label


def stages(side: Side) -> None:
    for _ in range(3):
        side.transition()
        side.step()
        with side.cascade.weights("fast"), torch.no_grad():
            side.show("fast weights", side.call())
    side.show("state", tensors(side.cascade))
    side.show("folded", side.cascade.folded_state_dict())


def collapsed(side: Side) -> None:
    stages(side)
    assert all(state.is_dense for state in weight_states(side.cascade).values())


@simulated_only
@pytest.mark.parametrize("start", ["lora", "dora", "pissa", "grid"])
def test_without_fp64(start: str) -> None:
    options: dict[str, dict[str, Any]] = {"dora": {"adapter": "dora"}, "grid": {"grid": "bfloat16"}}
    more = options.get(start, {"start": start})
    with without_fp64():
        # Experts of such a rank outgrow a weight at once, and are summed in fp64.
        compare("mlp", lx.CascadeSpec(rank=8, **more), collapsed if start == "lora" else stages)


MEMORY: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "fp32": ({}, torch.float32),
    "bf16": ({}, torch.bfloat16),
    "noise fp32": (NOISE, torch.float32),
    "noise bf16": (NOISE, torch.bfloat16),
    "dora bf16": ({"adapter": "dora"}, torch.bfloat16),
    "pissa fp32": ({"start": "pissa"}, torch.float32),
}


@simulated_only
@pytest.mark.parametrize("case", MEMORY)
@pytest.mark.parametrize("action", ["transition", "slow", "fast"])
def test_out_of_memory_changes_nothing(case: str, action: str) -> None:
    more, dtype = MEMORY[case]
    spec = lx.CascadeSpec(rank=2, **more)
    side, spared = Side("mlp", DEVICE, spec, dtype), Side("mlp", DEVICE, spec, dtype)
    for cascade_side in (side, spared):
        cascade_side.transition()
        cascade_side.step()
    before = tensors(side.cascade)

    def call() -> None:
        if action == "transition":
            side.cascade.transition(side.optimizer)
        else:
            with side.cascade.weights(action), torch.no_grad():
                side.call()

    def check() -> None:
        after = tensors(side.cascade)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert side.cascade.stage == 2

    assert at_each_allocation(call, check) > 1
    if action != "transition":
        side.transition()
        spared.transition()
    else:
        spared.cascade.transition(spared.optimizer)
    side.step(), spared.step()
    after, expected = tensors(side.cascade), tensors(spared.cascade)
    assert all(torch.equal(after[name], expected[name]) for name in after)
