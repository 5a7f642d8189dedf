"""Models of these tests, built from configurations: with numbers, or on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.kit import tiny

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def llama(tied: bool = False) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny.llama(**sizes, num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=tied)


def image_net() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=5)


class Mlp(nn.Module):
    """Names, shapes and no square matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.down = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how its files come to be.

    Args:
        build: makes it, with random numbers or on the meta device.
        kwargs: of a call.
        shards: most bytes of a file that transformers writes; empty for one file of ours.
        train: what is trained in full.
    """

    build: Callable[[], nn.Module]
    kwargs: dict[str, Tensor]
    shards: str = ""
    train: tuple[str, ...] = ("*norm*",)

    def loaded(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.uniform_(0.5, 1.5)
        return model

    def on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build().eval()

    def files(self, folder: Path) -> Path:
        """Write the files of the loaded model."""
        model: Any = self.loaded()
        if self.shards:
            model.save_pretrained(folder, max_shard_size=self.shards)
            return folder
        save_file(model.state_dict(), folder / "net.safetensors")
        return folder / "net.safetensors"

    def lost_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that no file keeps, of a model that was built with numbers."""
        model = self.loaded()
        kept = model.state_dict()
        return {name: value for name, value in model.named_buffers() if name not in kept}


CASES = {
    "llama in shards": Case(llama, {"input_ids": IDS}, "20KB"),
    "tied llama in one file": Case(lambda: llama(tied=True), {"input_ids": IDS}, "5GB"),
    "timm": Case(image_net, {"x": IMAGES}, train=("*.bn?.*",)),
}
