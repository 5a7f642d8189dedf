"""Builds the model in the table `[model]`: from a folder, by timm, or by a user function. Nothing is downloaded."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lorasc_fx.cli.config import ModelConfig
from lorasc_fx.errors import LorascError, SpecError, nearest
from lorasc_fx.util.environment import module_of

MODELS = ("hf:FOLDER", "timm:NAME", "python:package.module:function")
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every `from_pretrained`: nothing is downloaded, and no code of a folder runs."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Convert any error of other libraries, or of a user's function, to a SpecError that names what was read."""
    try:
        yield
    except LorascError:
        raise
    except Exception as fault:
        cause = fault.__cause__ or fault
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise SpecError(f"{what}: {type(cause).__name__}: {reason}", code="unreadable-file") from fault


def split_name(name: str, known: Sequence[str], what: str) -> tuple[str, str]:
    """Return the kind and the place of a name such as `csv:FILE`.

    Raises:
        SpecError: the kind is unknown, or the place is missing.
    """
    kind, _, place = name.partition(":")
    kinds = [each.partition(":")[0] for each in known]
    if kind not in kinds or not place:
        raise SpecError(
            f"unknown {what} {name!r}{nearest(kind, kinds)}; known: {', '.join(known)}", code="unknown-name"
        )
    return kind, place


def user_function(name: str) -> Callable[..., Any]:
    """Return the user's function `python:package.module:function`, also from a module in the working directory."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, function = name.removeprefix("python:").partition(":")
    with reading(name):
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)  # noqa: TID251 - the user's name
    return found


class ModelSource:
    """Where a model comes from, and what it reads.

    Args:
        config: the table `[model]`.

    Attributes:
        kind: `language` (a causal language model), `text` or `image` (classifiers).
        processor: tokenizer or image processor of transformers. None for other models, which take images.

    Raises:
        SpecError: the name is unknown, the folder cannot be read, or weights are given for a model that has its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.library, self.place = split_name(config.name, MODELS, "model")
        self.kind = "image"
        self.processor: Any = None
        if config.weights and self.library != "timm":
            raise SpecError("model.weights is for models of timm; give the weights in the folder or by the function")
        if self.library != "hf":
            return
        if not Path(self.place, "config.json").is_file():
            raise SpecError(
                f"{config.name}: there is no such folder with a config.json, and nothing is downloaded",
                code="unreadable-file",
            )
        with reading(config.name):
            self._settings = transformers.AutoConfig.from_pretrained(self.place, **_LOCAL)
            self.kind = _kind_of(self._settings, config.task)
            auto: Any = transformers.AutoImageProcessor if self.kind == "image" else transformers.AutoTokenizer
            self.processor = auto.from_pretrained(self.place, **_LOCAL)
        if self.kind != "image" and self.processor.pad_token is None:
            self.processor.pad_token = self.processor.eos_token

    def build(self, classes: Sequence[str] = ()) -> nn.Module:
        """Build the model, with a new head for these classes. Without classes it keeps the head that it has.

        Raises:
            SpecError: the model cannot be built, or the weights do not fit.
        """
        name, weights = self.config.name, self.config.weights
        with reading(name):
            if self.library == "hf":
                model = self._from_transformers(classes)
            elif self.library == "timm":
                options: dict[str, Any] = {"num_classes": len(classes)} if classes else {}
                if weights:
                    options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
                model = module_of("vision", "timm").create_model(self.place, **options)
            else:
                function = user_function(name)
                takes_classes = classes and inspect.signature(function).parameters
                model = function(len(classes)) if takes_classes else function()
        if not isinstance(model, nn.Module):
            raise SpecError(
                f"{name}: the function returned a {type(model).__name__}; it must return an nn.Module",
                code="wrong-function-result",
            )
        _freeze_batch_norms(model)
        return model

    def _from_transformers(self, classes: Sequence[str]) -> nn.Module:
        dtype = self.config.dtype if self.config.dtype == "auto" else getattr(torch, self.config.dtype)
        options: dict[str, Any] = {**_LOCAL, "use_safetensors": True, "dtype": dtype}
        if self.kind == "language":
            model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(self.place, **options)
            return model
        if classes:
            options |= {"id2label": dict(enumerate(classes)), "ignore_mismatched_sizes": True}
            options["label2id"] = {name: number for number, name in enumerate(classes)}
        if self.kind == "image":
            model = transformers.AutoModelForImageClassification.from_pretrained(self.place, **options)
        elif _is_encoder(self._settings):
            labels = {key: options.pop(key) for key in ("id2label", "label2id") if key in options}
            self._settings.update(labels)
            model = mean_pooled(self._settings).from_pretrained(self.place, config=self._settings, **options)
        else:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(self.place, **options)
            config: Any = model.config
            if config.pad_token_id is None:  # a causal model classifies the last token that is no padding
                config.pad_token_id = self.processor.pad_token_id
        return model


def mean_pooled(settings: Any) -> Any:
    """Return the class of a text classifier: an encoder, the mean over its unmasked tokens, and a linear head.

    Its state dict has the encoder under the prefix of the library's own classes, so that `AutoModel.from_pretrained`
    opens a saved classifier.

    Args:
        settings: the encoder's configuration in transformers.
    """

    class MeanPooled(transformers.PreTrainedModel):  # type: ignore[misc]
        """A text classifier with mean pooling."""

        config_class = type(settings)
        base_model_prefix = transformers.MODEL_MAPPING[type(settings)].base_model_prefix

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, transformers.AutoModel.from_config(config))
            self.head = nn.Linear(config.hidden_size, config.num_labels)
            self.post_init()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            """Return the logits [batch, classes] of texts [batch, tokens]."""
            encoder = getattr(self, self.base_model_prefix)
            hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
            return logits

    return MeanPooled


def _kind_of(settings: Any, task: str) -> str:
    """Return what a model of transformers reads and predicts."""
    language = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if task == "language" or (task == "auto" and {*(settings.architectures or ())} & {*language}):
        return "language"
    return "image" if type(settings) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING else "text"


def _is_encoder(settings: Any) -> bool:
    """Whether the folder of a text model has no classifier, and the model does not read texts from left to right."""
    names = settings.architectures or ()
    classifies = any(name.endswith("ForSequenceClassification") for name in names)
    return not classifies and _kind_of(settings, "auto") != "language"


def _freeze_batch_norms(model: nn.Module) -> None:
    """Keep batch norms in eval mode, also when the Trainer sets the model to train mode at each step."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            vars(module)["train"] = partial(_unchanged, module)


def _unchanged(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
