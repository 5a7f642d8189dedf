"""Comparison with peft's QLoRA: the same bitsandbytes layers, A, optimizer and data give the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import save_file
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import lora_of, loss_of, trainable_parameters
from tests.quantized.layers import LAYERS, is_missing
from tests.quantized.test_quantized import Net, inputs

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
def test_losses_equal_qloras(case: str, tmp_path: Path) -> None:
    cascade = lx.adapt(net(case), (inputs(),), spec=SPEC)
    theirs = lora_of(cascade, net(case), ["up", "down"]).train()
    for site in cascade.sites:
        layer = theirs.get_submodule(f"base_model.model.{site.weight.removesuffix('.weight')}")
        assert type(layer).__module__ == "peft.tuners.lora.bnb"
    ours = torch.optim.AdamW(cascade.param_groups(lr=1e-2, weight_decay=0.0))
    other = torch.optim.AdamW(trainable_parameters(theirs), lr=1e-2, weight_decay=0.0)
    losses = [(step(cascade, ours), step(theirs, other)) for _ in range(10)]
    for mine, its in losses:
        assert mine == pytest.approx(its, rel=1e-6)
    assert losses[-1][0] < losses[0][0]
    lx.export.peft(cascade, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(net(case), tmp_path / "adapter").train()
    torch.testing.assert_close(loaded(inputs()), cascade(inputs()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2])
def test_loftq_starts_from_the_pair_of_peft(iterations: int, tmp_path: Path) -> None:
    """peft's loftq_init itself needs a GPU. Its second iteration quantizes another weight than the first one."""
    torch.manual_seed(3)
    full = Net()
    save_file(full.state_dict(), tmp_path / "model.safetensors")
    config: Any = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["up", "down"], init_lora_weights="loftq",
        loftq_config={"loftq_bits": 4, "loftq_iter": iterations},
    )  # fmt: skip
    model = net("bitsandbytes nf4")
    if iterations == 2:
        with raises(lx.SpecError, "adapter-not-supported", "loftq_iter", "one iteration"):
            lx.adapt(model, (inputs(),), spec=config, base=tmp_path)
        return
    cascade = lx.adapt(model, (inputs(),), spec=config, base=tmp_path)
    assert {site.weight for site in cascade.sites} == {"up.weight", "down.weight"}
    for site in cascade.sites:
        quantized = model.get_parameter(site.weight).dequantize()
        pair = _low_rank_decomposition(full.get_parameter(site.weight).detach() - quantized, reduced_rank=4)
        branch = cascade.branches[site.key]
        torch.testing.assert_close(branch.lora_B @ branch.lora_A, pair["L"] @ pair["R"], rtol=0, atol=1e-5)
        assert pair["L"].abs().max() > 1e-2
