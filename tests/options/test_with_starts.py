"""Starts from the weight and magnitudes, with ranks by stage, LoRA-FA, LoRA+ and averages: the slow rule by its
formula, `W <- (1 - p) W + p diag(g) (W + s (B A - B_0 A_0))`, g of ones without magnitudes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorasc_fx as lx
from tests.kit.models import batches, branches, mlp, optimizer_of, train

CASES: dict[str, dict[str, Any]] = {
    "pissa, ranks": {"start": "pissa", "ranks": (1, 3, 2)},
    "olora, dora, ranks": {"start": "olora", "use_dora": True, "ranks": (1, 3, 2)},
    "dora, ranks": {"use_dora": True, "ranks": (1, 3, 2)},
    "pissa, LoRA-FA": {"start": "pissa", "train_A": False, "rank": 2},
    "dora, LoRA+": {"use_dora": True, "lr_ratio": 4.0, "rank": 2},
    "olora, average": {"start": "olora", "average": "ema", "rank": 1},
}
PACE = 0.5


def numbers(cascade: lx.Cascade) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {key: value.detach().clone() for key, value in branch.named_parameters()}
        for name, branch in branches(cascade).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_three_stages(case: str) -> None:
    calls, spec = batches(4, 4, 5), lx.CascadeSpec(**CASES[case], lora_alpha=3.0, pace=PACE)
    slow = {name: value.detach().clone() for name, value in mlp().named_parameters() if value.dim() > 1}
    cascade = lx.adapt(mlp(), (calls[0],), spec=spec)
    optimizer = optimizer_of(cascade, "sgd")
    for stage in range(3):
        first = numbers(cascade)
        train(cascade, optimizer, calls)
        last = numbers(cascade)
        for name, weight in slow.items():
            scale, (one, two) = branches(cascade)[name].scale, (first[name], last[name])
            assert one["lora_A"].shape[0] == (spec.ranks or (spec.rank,) * 3)[stage]
            assert torch.equal(one["lora_A"], two["lora_A"]) == (not spec.train_A)
            moved = weight + scale * (two["lora_B"] @ two["lora_A"] - one["lora_B"] @ one["lora_A"])
            if spec.use_dora:
                moved *= (two["lora_magnitude_vector"] / moved.norm(dim=1))[:, None]
            assert (moved - weight).abs().max() > 1e-3
            slow[name] = (1 - PACE) * weight + PACE * moved
        cascade.transition(optimizer)
        with cascade.weights("slow"):
            for name, weight in slow.items():
                torch.testing.assert_close(cascade.model.get_parameter(name).detach(), weight, rtol=0, atol=1e-13)
            expected = cascade(calls[0]).detach()
        torch.testing.assert_close(cascade(calls[0]), expected, rtol=0, atol=1e-14)
