"""Builds the model in the table `[model]`. Nothing is downloaded: weights come from files and installed packages."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasc_fx.cli.config import ModelConfig
from lorasc_fx.errors import LorascError, SpecError, nearest, reason_of
from lorasc_fx.util.extras import module_of

MODELS = ("timm:NAME", "hf:FOLDER", "hf:package:NAME", "python:package.module:function")

_INSTALLED = re.compile(r"[/\\]lib[/\\]python3|<frozen|[/\\]lorasc_fx[/\\]")
Arguments = tuple[tuple[Tensor, ...], dict[str, Tensor]]
"""Positional and keyword arguments of a model."""


class MeanPooled(nn.Module):
    """A text classifier: an encoder, mean pooling over the unmasked tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits [batch, classes] for texts [batch, tokens]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits


def build_model(config: ModelConfig, classes: int | None, seed: int = 0) -> nn.Module:
    """Build the model with a new head for this many classes. If `classes` is None, the model keeps its head.

    Raises:
        SpecError: the kind or name is unknown, the weights do not fit, or the user's function cannot be called.
        MissingExtra: the package of the model is not installed.
    """
    check_name(config)
    kind, _, name = config.name.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head_seed(config, seed))
        return _BUILDERS[kind](config, name, classes)


def check_name(config: ModelConfig) -> None:
    """Raise SpecError if the kind of the model is unknown."""
    kind, _, name = config.name.partition(":")
    if kind in _BUILDERS and name:
        return
    kinds = f"; did you mean 'hf:{kind}' or 'timm:{kind}'" if kind and ":" not in config.name else ""
    hint = "; the name after the colon is missing" if kind in _BUILDERS else nearest(kind, _BUILDERS) or kinds
    raise SpecError(f"unknown model {config.name!r}{hint}; known: {', '.join(MODELS)}", code="unknown-name")


def head_seed(config: ModelConfig, seed: int) -> int:
    """Return the seed with which the model of a run is built."""
    return config.seed * 1_000_003 + seed


def tokenizer_of(config: ModelConfig, saved: Path | None = None) -> Any:
    """Return the tokenizer of a text model. None for an image model.

    Args:
        config: the configuration of the model.
        saved: a folder with a tokenizer, which is used instead of the model's if it exists.
    """
    if not config.name.startswith("hf:"):
        return None
    transformers = module_of("text", "transformers")
    folder = saved if saved is not None and saved.is_dir() else _hf_folder(config.name[3:])
    with reading(config.name, "transformers"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def set_mode(model: nn.Module, train: bool) -> nn.Module:
    """Put a model in train or eval mode and return it. An exported program has only one mode and keeps it."""
    return model if "train" in vars(model) else model.train(train)


def name_classes(model: nn.Module, classes: Sequence[str]) -> nn.Module:
    """Set the names of the classes in the configuration of a transformers classifier, and return the model."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "num_labels", None) == len(classes):
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
    return model


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output, which is a tensor or an object with a tensor `logits`."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise SpecError(
            f"the model returns a {type(output).__name__}; it must return logits as a tensor [batch, classes], or an "
            "object with `.logits`",
            code="wrong-function-result",
        )
    return logits


def example_inputs(config: ModelConfig, model: nn.Module, shape: tuple[int, ...] = ()) -> Arguments:
    """Return example arguments for the capture: floats with this shape, or inputs for this kind of model.

    Raises:
        SpecError: the shape is unknown or invalid.
    """
    if min(shape, default=0) < 0:
        raise SpecError(f"--input is {list(shape)}; give sizes of 0 or more")
    if shape:
        return (torch.rand(shape),), {}
    if config.name.startswith("hf:"):
        ids = torch.ones(2, 16, dtype=torch.long)
        return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    if size is None:
        raise SpecError(f"{config.name} does not specify the shape of its input; give it, such as --input 2 3 64 64")
    return (torch.rand(2, *size),), {}


def user_function(name: str) -> Callable[..., Any]:
    """Return the user's function with the name `python:package.module:function`.

    Raises:
        SpecError: there is no such module or function.
    """
    module_name, _, function_name = name.removeprefix("python:").partition(":")
    if not module_name or not function_name:
        raise SpecError(f"{name}: give python:package.module:function")
    if os.getcwd() not in sys.path:  # find modules in the working directory, like `python -m`
        sys.path.insert(0, os.getcwd())
    with user_code(name, code="wrong-function-result"):
        module = importlib.import_module(module_name)  # noqa: TID251 - the name that the user gave
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        public = [attribute for attribute in vars(module) if not attribute.startswith("_")]
        raise SpecError(
            f"{name}: {module_name} has no function {function_name!r}{nearest(function_name, public)}",
            code="unknown-name",
        )
    return function  # type: ignore[no-any-return]  # callable


@contextmanager
def user_code(name: str, code: str | None = None) -> Iterator[None]:
    """Convert errors of the user's code to SpecErrors that name the line."""
    try:
        yield
    except LorascError:
        raise
    except Exception as fault:
        # Find the innermost line outside of this package and all installed packages.
        lines = [line for line in traceback.extract_tb(fault.__traceback__) if not _INSTALLED.search(line.filename)]
        where = f" ({lines[-1].filename}:{lines[-1].lineno})" if lines and not isinstance(fault, SyntaxError) else ""
        raise SpecError(f"{name}: {type(fault).__name__}: {fault}{where}", code=code) from fault


def _timm(config: ModelConfig, name: str, classes: int | None) -> nn.Module:
    timm = module_of("vision", "timm")
    if not timm.is_model(name):
        raise SpecError(f"timm has no model {name!r}{nearest(name, timm.list_models())}", code="unknown-name")
    model: nn.Module = timm.create_model(name, **({} if classes is None else {"num_classes": classes}))
    head = getattr(model, "pretrained_cfg", {}).get("classifier", "")
    _load_weights(model, config, head if isinstance(head, str) else "")
    return model


def _hf(config: ModelConfig, name: str, classes: int | None) -> nn.Module:
    folder = _hf_folder(name)
    transformers = module_of("text", "transformers")
    transformers.utils.logging.disable_progress_bar()
    safe = {"local_files_only": True, "trust_remote_code": False}
    options = {**safe, "use_safetensors": True, "dtype": torch.float32}
    model: nn.Module
    with reading(config.name, "transformers"):
        settings = transformers.AutoConfig.from_pretrained(folder, **safe)
        if any(name.endswith("ForSequenceClassification") for name in settings.architectures or ()):
            head = {} if classes is None else {"num_labels": classes, "ignore_mismatched_sizes": True}
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **options, **head)
        else:
            encoder = transformers.AutoModel.from_pretrained(folder, **options)
            model = MeanPooled(encoder, settings.hidden_size, classes or 2)
    _load_weights(model, config)
    return model


@contextmanager
def reading(name: str, package: str) -> Iterator[None]:
    """Convert any error of a package that reads damaged files to a SpecError."""
    try:
        yield
    except SpecError:
        raise
    except Exception as fault:
        cause = fault.__cause__ or fault
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise SpecError(f"{name}: {package} cannot read it: {reason}", code="unreadable-file") from fault


def _hf_folder(name: str) -> Path:
    """Return the folder of a transformers model. `package:NAME` is a folder inside an installed package."""
    kind, _, package = name.partition(":")
    if kind == "package" and package:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or spec.origin is None:
            raise SpecError(
                f"hf:{name}: the package {package!r} is not installed, and nothing is downloaded", code="missing-extra"
            )
        configs = sorted(Path(spec.origin).parent.rglob("config.json"), key=lambda path: len(path.parts))
        if not configs:
            raise SpecError(f"hf:{name}: no folder of this package has a config.json", code="unreadable-file")
        return configs[0].parent
    if not (Path(name) / "config.json").is_file():
        raise SpecError(
            f"hf:{name}: there is no such folder with a config.json, and nothing is downloaded", code="unreadable-file"
        )
    return Path(name)


def _python(config: ModelConfig, name: str, classes: int | None) -> nn.Module:
    function = user_function(config.name)
    with user_code(config.name):
        parameters = inspect.signature(function).parameters.values()
    if classes is None and any(parameter.default is parameter.empty for parameter in parameters):
        raise SpecError(
            f"python:{name}: this command calls the function without arguments; give each parameter a default",
            code="wrong-function-result",
        )
    with user_code(config.name):
        model = function(classes) if parameters and classes is not None else function()
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"python:{name}: the function returned a {type(model).__name__}; it must return an nn.Module",
            code="wrong-function-result",
        )
    _load_weights(model, config)
    return model


_BUILDERS: dict[str, Callable[[ModelConfig, str, int | None], nn.Module]] = {
    "timm": _timm, "hf": _hf, "python": _python,
}  # fmt: skip


def _load_weights(model: nn.Module, config: ModelConfig, head: str = "") -> None:
    """Load the pretrained weights of a configuration, if it has any.

    The head with the path `head` keeps its new values if their shapes differ from the pretrained ones.
    """
    source = config.weights
    if not source:
        return
    if source.startswith("python:"):
        function = user_function(source)
        with user_code(source):
            weights = dict(function(model))
    elif source.endswith(".safetensors"):
        weights = dict(read_weights(source))
    else:
        raise SpecError(f"model.weights is {source!r}; give a .safetensors file or python:package.module:function")
    for name, value in model.state_dict().items():
        if head and name.startswith(f"{head}.") and name in weights and weights[name].shape != value.shape:
            weights[name] = value
    put_weights(model, config, weights, source)


def put_weights(model: nn.Module, config: ModelConfig, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load weights into a model that was built from a configuration.

    Raises:
        SpecError: the weights do not fit the model.
    """
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as fault:
        reason = textwrap.shorten(str(fault).splitlines()[1], 200, placeholder=" ...")  # the first of several reasons
        raise SpecError(
            f"the weights in {source} do not fit the model {config.name}: {reason} Give weights of this model",
            code="base-differs",
        ) from fault


def read_weights(source: str | Path) -> Mapping[str, Tensor]:
    """Return the tensors in a safetensors file.

    Raises:
        SpecError: the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(source)
    except (OSError, SafetensorError) as fault:
        raise SpecError(
            f"{source}: these weights cannot be read: {reason_of(fault)}", code="unreadable-file"
        ) from fault
