"""Against peft's QLoRA: the same layers of bitsandbytes, A, optimizer and data give the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.unit.cases import loss_of
from tests.unit.quantized_layers import LAYERS, is_missing
from tests.unit.test_quantized import Net, inputs

pytestmark = [
    pytest.mark.skipif(is_missing("bitsandbytes") != "", reason="bitsandbytes is missing"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
CASES = pytest.mark.parametrize("case", [name for name in LAYERS if name.startswith("bitsandbytes")])
SPEC = lx.CascadeSpec(rank=4, lora_alpha=8.0, pace=1.0, targets=("up", "down"))


def net(case: str) -> nn.Module:
    torch.manual_seed(3)
    model = Net().train()
    for name in ("up", "down"):
        setattr(model, name, LAYERS[case](model.get_submodule(name)))  # type: ignore[arg-type]
    flag: Any = "is_loaded_in_8bit" if "int8" in case else "is_loaded_in_4bit"
    setattr(model, flag, True)  # as transformers marks a model; peft asks for it
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = loss_of(model(inputs()))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@CASES
def test_losses_are_those_of_qlora(case: str, tmp_path: Path) -> None:
    cascade = lx.adapt(net(case), (inputs(),), spec=SPEC)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"])
    theirs = peft.get_peft_model(net(case), config).train()  # type: ignore[arg-type]
    for site in cascade.sites:
        layer: Any = theirs.get_submodule(f"base_model.model.{site.weight.removesuffix('.weight')}")
        assert type(layer).__module__ == "peft.tuners.lora.bnb"
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(cascade.branches[site.key].lora_A)
    ours = torch.optim.AdamW(cascade.param_groups(lr=1e-2, weight_decay=0.0))
    other = torch.optim.AdamW(
        [parameter for parameter in theirs.parameters() if parameter.requires_grad], lr=1e-2, weight_decay=0.0
    )
    losses = [(step(cascade, ours), step(theirs, other)) for _ in range(10)]
    for mine, its in losses:
        assert mine == pytest.approx(its, rel=1e-6)
    assert losses[-1][0] < losses[0][0]
    lx.export.peft(cascade, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(net(case), tmp_path / "adapter").train()
    torch.testing.assert_close(loaded(inputs()), cascade(inputs()), rtol=0, atol=1e-6)
