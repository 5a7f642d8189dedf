"""The models of the benchmark, built from configurations, with a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Work:
    """A model and a step's input.

    Args:
        build: returns the model in train mode, dropout off.
        batch: returns keyword arguments of its forward.
        targets: peft's target_modules, and our targets.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]
    peft_targets: Any
    targets: tuple[str, ...]


def loss_of(output: Any) -> torch.Tensor:
    """Return a scalar that depends on the whole output."""
    tensor = output if isinstance(output, torch.Tensor) else output[0]
    return F.cross_entropy(tensor.flatten(0, -2), torch.zeros(tensor.flatten(0, -2).shape[0], dtype=torch.long))


def _vit() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224", num_classes=100).train()


def _bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config).train()


def _gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    return transformers.GPT2LMHeadModel(config).train()


def _resnet() -> nn.Module:
    import timm

    return timm.create_model("resnet50", num_classes=100).train()


def _images(count: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"x": torch.randn(count, 3, 224, 224)}


def _words(*shape: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"input_ids": torch.randint(1000, 20000, shape)}


_BERT = ("*.attention.*", "*.intermediate.*", "*.layer.*.output.dense.weight")

WORKS = {
    "vit-s": Work("ViT-S, batch 8, linears", _vit, _images(8), r".*(qkv|proj|fc1|fc2)", ("*.qkv", "*.proj", "*.fc*")),
    "bert-base": Work("BERT-base, 8 x 128", _bert, _words(8, 128), r".*layer\.\d+\..*(query|key|value|dense)", _BERT),
    "resnet-50": Work("ResNet-50, convs, batch 4", _resnet, _images(4), r".*conv\d", ("conv1", "*.conv?")),
}
