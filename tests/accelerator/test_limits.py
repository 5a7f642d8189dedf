"""Devices that lack something: fp64, memory, or a part of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorasc_fx as lx
from tests.accelerator.kit import DEVICE, Side, at_each_allocation, compare, simulated_only, tensors, without_fp64
from tests.accelerator.models import build
from tests.kit.errors import raises
from tests.kit.state import weight_states


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
@pytest.mark.parametrize("start", ["lora", "dora", "pissa", "milora", "olora"])
def test_without_fp64(start: str) -> None:
    more: dict[str, Any] = {"adapter": "dora"} if start == "dora" else {"start": start}
    with without_fp64():
        # Experts of such a rank outgrow a weight at once, and are summed in fp64.
        compare("mlp", lx.CascadeSpec(rank=8, **more), collapsed if start == "lora" else stages)


NOISY: dict[str, Any] = {"noise": lx.Noise(0.1)}
MEMORY: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "fp32": ({}, torch.float32),
    "bf16": ({}, torch.bfloat16),
    "noise fp32": (NOISY, torch.float32),
    "noise bf16": (NOISY, torch.bfloat16),
    "noise of filters bf16": ({"noise": lx.Noise(0.1, distribution="filter")}, torch.bfloat16),
    "dora bf16": ({"adapter": "dora"}, torch.bfloat16),
    "pissa fp32": ({"start": "pissa"}, torch.float32),
}


@simulated_only
@pytest.mark.parametrize("case", MEMORY)
@pytest.mark.parametrize("what", ["transition", "slow", "fast"])
def test_out_of_memory_changes_nothing(case: str, what: str) -> None:
    more, dtype = MEMORY[case]
    spec = lx.CascadeSpec(rank=2, **more)
    side, spared = Side("mlp", DEVICE, spec, dtype), Side("mlp", DEVICE, spec, dtype)
    for each in (side, spared):
        each.transition()
        each.step()
    before = tensors(side.cascade)

    def call() -> None:
        if what == "transition":
            side.cascade.transition(side.optimizer)
        else:
            with side.cascade.weights(what), torch.no_grad():
                side.call()

    def check() -> None:
        after = tensors(side.cascade)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert side.cascade.stage == 2

    assert at_each_allocation(call, check) > 1
    if what != "transition":
        side.transition()
        spared.transition()
    else:
        spared.cascade.transition(spared.optimizer)
    side.step(), spared.step()
    after, expected = tensors(side.cascade), tensors(spared.cascade)
    assert all(torch.equal(after[name], expected[name]) for name in after)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_an_offloaded_model_is_refused(how: str, tmp_path: Any) -> None:
    import accelerate

    model, (args, _), _ = build("mlp")
    more = {"offload_dir": tmp_path} if how == "disk_offload" else {}
    getattr(accelerate, how)(model, execution_device=torch.device(DEVICE), **more)
    with raises(lx.CaptureError, "meta-model", "accelerate has offloaded the weights of first, second, head"):
        lx.adapt(model, (args[0].to(DEVICE),), spec=lx.CascadeSpec(rank=2))
