"""A cascade of diffusers' UNet: compared with `unet.add_adapter`, and exported to a file that diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

import lorasc_fx as lx
from tests.kit.models import take_start

pytest.importorskip("diffusers", reason="not in the extra `test`; docs/loops.md tells with which version this was run")

from diffusers import DDPMScheduler

from examples.diffusers_unet import LAYERS, batch, main, tiny_unet

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def losses(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        latents, times, texts, noise = batch(step, DDPMScheduler())
        loss = F.mse_loss(model(latents, times, encoder_hidden_states=texts, return_dict=False)[0], noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_losses_equal_an_adapters(checkpointing: bool) -> None:
    """One stage at pace 1, called as in diffusers' training scripts: by name and without an output class."""
    unet, theirs = tiny_unet(), tiny_unet()
    theirs.requires_grad_(False)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(LAYERS)))
    if checkpointing:
        unet.enable_gradient_checkpointing()
        theirs.enable_gradient_checkpointing()
    unet.train()
    theirs.train()
    latents, times, texts, _ = batch(0, DDPMScheduler())
    spec = lx.CascadeSpec(rank=4, lora_alpha=8, pace=1.0, targets=tuple(f"*.{name}.weight" for name in LAYERS))
    kwargs = {"encoder_hidden_states": texts, "return_dict": False}
    cascade = lx.adapt(unet, args=(latents, times), kwargs=kwargs, spec=spec)
    take_start(cascade, theirs)
    adapters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert len(adapters) == 2 * len(cascade.sites)
    expected = losses(theirs, torch.optim.AdamW(adapters, lr=0.02), 6)
    found = losses(cascade, torch.optim.AdamW(cascade.param_groups(lr=0.02)), 6)
    assert found == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        latents, times, texts, noise = batch(5, DDPMScheduler())
        untrained = F.mse_loss(tiny_unet()(latents, times, texts).sample, noise).item()
    assert abs(untrained - expected[-1]) > 1e-3


def test_the_example_writes_what_a_pipeline_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(tmp_path), steps=4) < 1e-5
    assert "stage 2: loss" in capsys.readouterr().out
    plain, trained = tiny_unet(), tiny_unet()
    trained.load_lora_adapter(str(tmp_path), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    latents, times, texts, _ = batch(0, DDPMScheduler())
    with torch.no_grad():
        difference = plain(latents, times, texts).sample - trained(latents, times, texts).sample
    assert difference.abs().max().item() > 1e-3
