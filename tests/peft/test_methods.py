"""A branch that has trained computes what the plain model computes with its merged weights, also where peft does not
(docs/from-peft.md). On layers of bitsandbytes, the losses equal peft's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch import METHODS
from tests.kit.models import lora_of, train, trainable_parameters
from tests.quantized.layers import LAYERS, is_missing
from tests.quantized.test_quantized import Net, inputs

NAMES = [name for name in METHODS if name not in ("dora", "lora-xs")]
"""Methods that peft has too, except DoRA."""


def move(model: nn.Module) -> None:
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))


@pytest.mark.parametrize("method", NAMES)
def test_a_merge_in_bf16_is_rounded_once(method: str) -> None:
    """Compare with the same parameters in fp64."""
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(256, 256, bias=False)).bfloat16(), torch.randn(3, 256).bfloat16()
    cascade = lx.adapt(copy.deepcopy(model), (x,), spec=lx.CascadeSpec(adapter=method, rank=4, pace=1.0))
    move(cascade)
    branch: Any = copy.deepcopy(next(iter(cascade.branches.values()))).double()
    weight = model[0].weight.detach().double()
    exact = weight + branch.dense_delta(weight).detach()
    merged = cascade.release()[0].weight.detach()
    assert float((merged != exact.bfloat16()).double().mean()) < 0.002  # the sum is in fp32


NEEDS_BITSANDBYTES = pytest.mark.skipif(is_missing("bitsandbytes") != "", reason="bitsandbytes is missing")
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


@NEEDS_BITSANDBYTES
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@CASES
def test_losses_equal_qloras(case: str, tmp_path: Path) -> None:
    cascade = lx.adapt(net(case), (inputs(),), spec=SPEC)
    theirs = lora_of(cascade, net(case), ["up", "down"]).train()
    for site in cascade.sites:
        layer = theirs.get_submodule(f"base_model.model.{site.weight.removesuffix('.weight')}")
        assert type(layer).__module__ == "peft.tuners.lora.bnb"
    ours = torch.optim.AdamW(cascade.param_groups(lr=1e-2, weight_decay=0.0))
    theirs_optimizer = torch.optim.AdamW(trainable_parameters(theirs), lr=1e-2, weight_decay=0.0)
    losses, expected = train(cascade, ours, [inputs()] * 10), train(theirs, theirs_optimizer, [inputs()] * 10)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    assert losses[-1] < losses[0]
    lx.export.peft(cascade, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(net(case), tmp_path / "adapter").train()
    torch.testing.assert_close(loaded(inputs()), cascade(inputs()), rtol=0, atol=1e-6)
