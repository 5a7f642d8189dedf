"""What a cast of a running cascade may not lose: found by the machine, and held here by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.models import inputs, loss_of, mlp

SPEC = lx.CascadeSpec(rank=2, train=("3",), restart="fast", pace=0.5)


def started(model: nn.Module | None = None) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    """A cascade in its second stage, in which nothing has trained."""
    model = mlp().double() if model is None else model
    x = inputs(4, 5).to(next(model.parameters()).dtype)
    cascade = lx.adapt(model, (x,), spec=SPEC, frontend="symbolic")
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    for _ in range(3):
        loss_of(cascade(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    cascade.transition(optimizer)
    return cascade, optimizer


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64), (torch.bfloat16, torch.float64)])
def test_a_stage_that_was_only_cast_has_not_trained(dtypes: tuple[torch.dtype, ...]) -> None:
    """Rounding moves what is trained in full, but that is no training: a release does not fold it."""
    expected, _ = started()
    cascade, _ = started()
    for dtype in dtypes:
        cascade.to(dtype)
    right = expected.release().state_dict()
    for name, value in cascade.release().state_dict().items():
        if name in ("0.weight", "2.weight", "3.weight", "3.bias"):
            torch.testing.assert_close(value, right[name].to(dtypes[-1]), rtol=1e-6, atol=1e-6)


def test_a_checkpoint_of_a_cast_cascade_goes_onto_the_base_that_was_adapted(tmp_path: Path) -> None:
    cascade, _ = started()
    cascade.to(torch.float32)
    lx.save(cascade, tmp_path)
    loaded = lx.load(tmp_path, mlp().double(), (inputs(4, 5).double(),))
    with cascade.weights("slow"), loaded.weights("slow"):
        for name, value in loaded.model.named_parameters():
            torch.testing.assert_close(value.float(), cascade.model.get_parameter(name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_narrow_weights_stay_wide(dtype: torch.dtype) -> None:
    """As `adapt` makes them for such weights, and with the numbers that they had."""
    cascade, optimizer = started(mlp())
    branch = cascade.branches["0/weight"]
    loss_of(cascade(inputs(4, 5))).backward()
    before, gradient = branch.lora_A.detach().clone(), branch.lora_B.grad.clone()
    cascade.to(dtype)
    assert cascade.model[0].weight.dtype == dtype
    assert branch.lora_A.dtype == branch.lora_B.dtype == torch.float32
    assert torch.equal(branch.lora_A, before)
    torch.testing.assert_close(branch.lora_B.grad, gradient.to(dtype).float(), rtol=1e-2, atol=1e-6)
    optimizer.zero_grad()
    loss_of(cascade(inputs(4, 5).to(dtype)).float()).backward()
    optimizer.step()
    assert branch.lora_B.any()
