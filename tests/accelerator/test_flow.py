"""Whole runs: adapt, stages with noise, weights, release."""

from __future__ import annotations

import pytest
import torch

import lorasc_fx as lx
from tests.accelerator.kit import Side, compare, tensors
from tests.accelerator.models import MODELS

NAMES = [name for name in MODELS if name != "dropout"]
LARGE = ("resnet", "bert", "gpt2", "llama")


def flow(side: Side) -> None:
    side.show("stage 1", tensors(side.cascade))
    for stage in side.cascade.stages(3, side.optimizer):
        side.step()
        side.show(f"stage {stage.number}", tensors(side.cascade))
        for view in ("slow", "fast", "base"):
            with side.cascade.weights(view), torch.no_grad():
                side.show(f"stage {stage.number}, {view} weights", side.call())
    side.show("released", tensors(side.cascade.release()))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NAMES]
)
def test_a_run(name: str) -> None:
    compare(name, lx.CascadeSpec(rank=2, noise=lx.Noise(0.1)), flow)
