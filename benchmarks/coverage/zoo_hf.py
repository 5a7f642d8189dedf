"""Makes entries from model classes of transformers, and from settings that make the models small."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.coverage.entry import Entry
from tests.kit.compare import Call

Maker = Callable[[], Any]


def model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model with these settings of its configuration."""

    def build() -> nn.Module:
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**copy.deepcopy(settings)))

    return build


def hf(
    name: str,
    class_name: str,
    inputs: Callable[[bool], Call],
    *,
    source: str = "",
    unused: Mapping[str, str] | None = None,
    tolerance: float = 1e-12,
    **settings: Any,
) -> Entry:
    """Return the entry `hf_NAME`, whose modeling file is `modeling_NAME` unless `source` names another."""
    file = source or f"modeling_{name}"
    return Entry(f"hf_{name}", file, model(class_name, **settings), inputs, unused or {}, tolerance)


def real(*shape: int, scale: float = 1.0) -> Maker:
    """Return a maker of normally distributed numbers."""
    return lambda: scale * torch.randn(*shape, dtype=torch.float64)


def whole(high: int, *shape: int, low: int = 0) -> Maker:
    """Return a maker of whole numbers from `low` to `high` - 1."""
    return lambda: torch.randint(low, high, shape)


def fixed(value: Any) -> Maker:
    """Return a maker of a constant."""
    return lambda: torch.tensor(value) if isinstance(value, list) else value


def given(labels: dict[str, Maker] | None = None, **always: Maker) -> Callable[[bool], Call]:
    """Return a maker of calls with the keyword arguments `always`, and in train mode also `labels`."""

    def make(training: bool) -> Call:
        makers = always | (labels or {} if training else {})
        return (), {name: maker() for name, maker in makers.items()}

    return make


def boxes(count: int, images: int = 2, classes: int = 3) -> Maker:
    """Return a maker of labels for a detector: classes, and boxes as relative centers and sizes."""

    def make() -> list[dict[str, torch.Tensor]]:
        sizes = [0.2 + 0.3 * torch.rand(count, 4, dtype=torch.float64) for _ in range(images)]
        return [{"class_labels": torch.randint(0, classes, (count,)), "boxes": size} for size in sizes]

    return make


# ---- text

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, **IDS}
LENGTH, PADDING = 12, 4


def text(
    name: str,
    class_name: str,
    *,
    source: str = "",
    small: Mapping[str, Any] = SMALL,
    length: int = LENGTH,
    extra: Mapping[str, Any] | None = None,
    unused: Mapping[str, str] | None = None,
    tolerance: float = 1e-12,
    **settings: Any,
) -> Entry:
    """Return the entry of a text model, which trains with labels and runs without them in eval mode.

    Args:
        source: the modeling file, by default `modeling_NAME`.
        small: settings that most models share. `settings` override them.
        extra: {name: value} of further arguments of each call. The value None removes an argument.
    """

    def inputs(training: bool) -> Call:
        arguments = _tokens(length)
        if class_name.endswith(("ForConditionalGeneration", "MTModel")):
            arguments |= _targets(length, training)
        elif training:
            arguments |= _labels(class_name, arguments["input_ids"])
        arguments |= extra or {}
        return (), {name: value for name, value in arguments.items() if value is not None}

    build = model(class_name, **{**small, **settings})
    return Entry(name, source or f"modeling_{name}", build, inputs, unused or {}, tolerance)


def _tokens(length: int) -> dict[str, torch.Tensor]:
    """Return ids and mask of two sequences. The second one is padded at its end."""
    ids = torch.randint(3, 100, (2, length))
    mask = torch.ones_like(ids)
    mask[1, -PADDING:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _labels(class_name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    if class_name.endswith(("ForSequenceClassification", "ForMultipleChoice")):
        return {"labels": torch.tensor([0, 1])}
    if class_name.endswith("ForTokenClassification"):
        return {"labels": ids % 2}
    if class_name.endswith("ForQuestionAnswering"):
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 5])}
    return {"labels": ids.masked_fill(ids == 0, -100)}


def _targets(length: int, training: bool) -> dict[str, torch.Tensor]:
    """Return the labels, from which a model derives the inputs of its decoder, or in eval mode these inputs."""
    ids = torch.randint(3, 100, (2, length - 3))
    return {"labels": ids} if training else {"decoder_input_ids": ids}
