"""Train the attention of a UNet as in diffusers' LoRA scripts, with a cascade instead of `unet.add_adapter`.

Takes a few seconds: the UNet is tiny, and latents and texts are random. Needs diffusers (last run with 0.42.1) and
peft.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

import lorasc_fx as lx

LAYERS = ("to_k", "to_q", "to_v", "to_out.0")


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def batch(step: int, scheduler: DDPMScheduler) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return noisy latents [4, 4, 8, 8], time steps [4], texts [4, 5, 12], and the noise to predict."""
    source = torch.Generator().manual_seed(step)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=source)
    texts = torch.randn(4, 5, 12, generator=source)
    times = torch.randint(scheduler.config.num_train_timesteps, (4,), generator=source)
    return scheduler.add_noise(latents, noise, times), times, texts, noise


def save_lora(cascade: lx.Cascade, folder: Path) -> None:
    """Write the slow weights as `pytorch_lora_weights.safetensors`, which diffusers' pipelines load."""
    with tempfile.TemporaryDirectory() as adapter:
        lx.export.peft(cascade, adapter)
        config = json.loads((Path(adapter) / "adapter_config.json").read_text())
        tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)


def main(folder: str, steps: int = 10, stages: int = 2) -> float:
    unet, scheduler = tiny_unet(), DDPMScheduler()
    latents, times, texts, _ = batch(0, scheduler)
    # unet.requires_grad_(False)
    # unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    spec = lx.CascadeSpec(
        rank=4, lora_alpha=4, targets=tuple(f"*.{name}.weight" for name in LAYERS), noise=lx.Noise(0.05)
    )
    cascade = lx.adapt(unet, args=(latents, times, texts), spec=spec)
    print(cascade)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    for stage in cascade.stages(stages, optimizer):
        for step in range(steps):
            latents, times, texts, noise = batch(step, scheduler)
            loss = F.mse_loss(cascade(latents, times, texts).sample, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"stage {stage.index}: loss {loss.item():.3f}")
    save_lora(cascade, Path(folder))

    loaded = tiny_unet()  # loads the LoRA as pipe.load_lora_weights(folder) does
    loaded.load_lora_adapter(folder, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    with cascade.weights("slow"), torch.no_grad():
        difference = (loaded(latents, times, texts).sample - cascade(latents, times, texts).sample).abs().max().item()
    print(f"the UNet with the saved LoRA differs by {difference:.1e}")
    return difference


if __name__ == "__main__":
    main(*sys.argv[1:] or [tempfile.mkdtemp()])
