"""Builds text models of transformers from small configurations, and the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.models.entry import Call, Entry

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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
    because: str = "",
    **settings: Any,
) -> Entry:
    """Return an entry that trains with labels and runs without them in eval mode.

    Args:
        name: of the entry; the modeling file is `modeling_NAME` unless `source` names another.
        class_name: of the model, with its head.
        small: settings that most models share.
        length: of the sequences.
        extra: arguments that each call gets, beside ids, mask and labels; None takes away what it names.
        settings: of the configuration.
    """

    def build() -> nn.Module:
        import transformers

        model_class = getattr(transformers, class_name)
        return model_class(model_class.config_class(**{**small, **settings}))

    def inputs(training: bool) -> Call:
        arguments = _tokens(length)
        if class_name.endswith(("ForConditionalGeneration", "MTModel")):
            arguments |= _targets(length, training)
        elif training:
            arguments |= _labels(class_name, arguments["input_ids"])
        arguments |= extra or {}
        return (), {name: value for name, value in arguments.items() if value is not None}

    return Entry(name, source or f"modeling_{name}", build, inputs, unused or {}, tolerance, because)


def _tokens(length: int) -> dict[str, torch.Tensor]:
    """Return two sequences, the second of them padded at its end."""
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
    """Return what a decoder gets: labels, from which it makes its inputs, or the inputs."""
    ids = torch.randint(3, 100, (2, length - 3))
    return {"labels": ids} if training else {"decoder_input_ids": ids}
