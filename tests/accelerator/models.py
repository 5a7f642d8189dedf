"""Tiny models, and inputs for them. Dropout is off, because masks of the device and of the CPU differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kit import tiny
from tests.kit.models import Tied

Inputs = tuple[tuple[Tensor, ...], dict[str, Tensor]]
# So many classes that two experts of rank 2 do not outgrow a head, and no stage is gone.
CLASSES, VOCABULARY, BATCH = 12, 64, 4


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(F.relu(self.first(x)))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2, padding=1, padding_mode="circular")
        self.up, self.head = nn.ConvTranspose2d(16, 14, 2, stride=2), nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.norm(self.first(x)))))
        return self.head(self.up(x).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(12, 16), nn.Linear(16, CLASSES)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.head = nn.Linear(12, 20), nn.Dropout(0.3), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(F.relu(self.first(x))))


def bert() -> nn.Module:
    return tiny.bert(vocab_size=VOCABULARY, hidden_size=24, num_labels=CLASSES, **tiny.QUIET)


def llama() -> nn.Module:
    return tiny.llama(vocab_size=VOCABULARY, hidden_size=24)


def gpt2() -> nn.Module:
    return tiny.gpt2(vocab_size=VOCABULARY, n_embd=24)


def resnet() -> nn.Module:
    import timm

    return timm.create_model("test_resnet", num_classes=CLASSES, pretrained=False)


def _rows(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(BATCH, *shape),), {})


def _ids(**more: Any) -> Callable[[], Inputs]:
    return lambda: ((), {"input_ids": torch.randint(3, VOCABULARY, (BATCH, 6)), **more})


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "mlp": (Mlp, _rows(12)),
    "conv": (ConvNet, _rows(3, 8, 8)),
    "attention": (Attention, _rows(5, 12)),
    "tied": (lambda: Tied(VOCABULARY, 16), lambda: ((torch.randint(VOCABULARY, (BATCH, 6)),), {})),
    "bert": (bert, _ids()),
    "llama": (llama, _ids(use_cache=False)),
    "gpt2": (gpt2, _ids(use_cache=False)),
    "resnet": (resnet, _rows(3, 32, 32)),
    "dropout": (Dropout, _rows(12)),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Inputs, Tensor]:
    """Return a model, inputs and labels, on the host. The same name gives the same numbers."""
    torch.manual_seed(3)
    module, inputs = MODELS[name]
    model = module().to(dtype)
    args, kwargs = inputs()
    labels = torch.randint(CLASSES, (BATCH,))
    cast = tuple(value.to(dtype) if value.is_floating_point() else value for value in args)
    return model.train(), (cast, kwargs), labels


def loss_of(output: Any, labels: Tensor) -> Tensor:
    """The cross entropy of a model's output, of the last position of a sequence."""
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy((logits[:, -1] if logits.dim() == 3 else logits).float(), labels)
