"""A cascade as the model of transformers' pipelines, compared with plain models with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import lorasc_fx as lx
from tests.integrations.kit import llama, tokenizer, values_of, with_weights
from tests.kit import tiny
from tests.kit.models import randomize

SIZES = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {
    "input_ids": torch.tensor([[5, 9, 7, 0], [3, 8, 21, 4]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1] * 4]),
}
TEXTS = ["w1 w2 w3 w4", "w9 w30", "w7 w7 w21 w5 w4 w2"]


def bert(kind: str) -> Callable[[], nn.Module]:
    return lambda: tiny.bert(kind, pad_token_id=0)


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **SIZES))


def images() -> list[Any]:
    numbers = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in numbers]


def words() -> dict[str, Any]:
    return {"tokenizer": tokenizer()}


def pixels() -> dict[str, Any]:
    return {"image_processor": ViTImageProcessor(size={"height": 16, "width": 16})}


Case = tuple[
    Callable[[], Any], dict[str, Tensor], Callable[[], dict[str, Any]], Callable[[], list[Any]], dict[str, Any]
]

CASES: dict[str, Case] = {
    "text-classification": (bert("ForSequenceClassification"), IDS, words, lambda: TEXTS, {}),
    "feature-extraction": (bert("Model"), IDS, words, lambda: TEXTS, {}),
    "image-classification": (vit, {"pixel_values": torch.randn(2, 3, 16, 16)}, pixels, images, {}),
    "text-generation": (
        lambda: llama().float(), IDS, words, lambda: TEXTS, {"max_new_tokens": 5, "do_sample": False},
    ),
}  # fmt: skip


def numbers(found: Any) -> list[Any]:
    """Flatten the result of a pipeline to one row of labels and numbers."""
    if isinstance(found, dict):
        return [each for value in found.values() for each in numbers(value)]
    return [each for value in found for each in numbers(value)] if isinstance(found, list) else [found]


def same(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(
        one == pytest.approx(two, abs=2e-5) if isinstance(two, float) else one == two
        for one, two in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("task", CASES)
def test_a_pipeline_computes_without_noise(task: str) -> None:
    """In a stage it uses the fast weights, like `generate`; inside `weights` the placed ones; in a batch and lazily."""
    make, kwargs, tools, given, how = CASES[task]
    torch.manual_seed(0)
    spec = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(1.0), targets=("linear",))
    cascade = lx.adapt(make().eval(), kwargs=kwargs, spec=spec)
    for seed in (1, 2):
        randomize(cascade, seed)
        if seed == 1:
            cascade.transition(None)
    noisy = {name: value.detach().clone() for name, value in cascade.model.named_parameters()}
    weights = {"slow": values_of(cascade), "fast": values_of(cascade, "fast"), "noisy": {}}
    expected = {
        view: numbers(
            [pipeline(task, model=with_weights(cascade.model, each), **tools())(row, **how) for row in given()]
        )
        for view, each in weights.items()
    }
    assert not same(expected["noisy"], expected["fast"])
    assert not same(expected["slow"], expected["fast"])
    pipe = pipeline(task, model=cascade, **tools())
    assert same(numbers([pipe(row, **how) for row in given()]), expected["fast"])
    assert same(numbers(list(pipe((row for row in given()), **how))), expected["fast"])
    with cascade.weights("slow"):
        assert same(numbers([pipe(row, **how) for row in given()]), expected["slow"])
        assert same(numbers(pipe(given()[:1] * 2, batch_size=2, **how)), numbers([pipe(given()[0], **how)] * 2))
    cascade.train()
    cascade.model.eval()  # of which the dropout goes; the cascade's own mode does not count
    assert same(numbers([pipe(row, **how) for row in given()]), expected["fast"])
    assert all(torch.equal(value, noisy[name]) for name, value in cascade.model.named_parameters())
