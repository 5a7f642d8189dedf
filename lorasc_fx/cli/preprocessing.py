"""Converts texts or images to arguments of the model in the same way as a run. The data set of the run is not read."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasc_fx.cli.config import Config, load_config
from lorasc_fx.cli.data import encoder_of, read_image
from lorasc_fx.cli.models import Arguments, build_model, head_seed, name_classes, set_mode, tokenizer_of
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.errors import SpecError


class Preprocessing:
    """Converts inputs to arguments of the model in the same way as a run: `args, kwargs = preprocessing(inputs)`.

    Args:
        folder: the run folder.

    Attributes:
        config: the configuration of the run.
        classes: names of the classes, in the order of the logits.
        tokenizer: the tokenizer of a text model. None for images.

    Raises:
        StateError: the folder has no names of classes.
        SpecError: the configuration or the tokenizer cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)
        self.config: Config = load_config(self._folder.config)
        self.classes: tuple[str, ...] = self._folder.read_classes()
        self.tokenizer: Any = tokenizer_of(self.config.model, self._folder.tokenizer)
        self._encode = encoder_of(self.config.data, self.tokenizer)

    def __call__(self, inputs: Sequence[str | PathLike[str]]) -> Arguments:
        """Return positional and keyword arguments for a batch.

        Args:
            inputs: a list of texts, or of paths of images.

        Raises:
            SpecError: the inputs are not a list or are empty, or an image cannot be read.
        """
        if isinstance(inputs, (str, PathLike)) or not len(inputs):
            raise SpecError(f"preprocessing: inputs are {inputs!r}; give a list of texts, or of paths of images")
        if self.tokenizer is not None:
            return self._encode(list(inputs))
        data = self.config.data
        # The run has resized images from files while reading, but not images from a function.
        size = None if data.name.startswith("python:") else data.image_size
        images = [self._encode(read_image(Path(path), size)[None])[0][0] for path in inputs]
        return (torch.cat(images).contiguous(memory_format=torch.channels_last),), {}

    def base(self) -> nn.Module:
        """Return the model that the run has adapted, in eval mode. A user's function is not called.

        Raises:
            SpecError: the model or its weights come from a user's function, or the model cannot be built.
        """
        model = self.config.model
        for key, name in (("model.name", model.name), ("model.weights", model.weights)):
            if name.startswith("python:"):
                raise SpecError(
                    f"{self._folder.path}: {key} is {name}. For safety, this function is not called here. Build the "
                    f"model like the run, after torch.manual_seed({head_seed(model, self.config.train.seed)}), and "
                    "call lorasc_fx.cli.load(folder, model)",
                    code="no-base",
                )
        built = build_model(model, len(self.classes), self.config.train.seed)
        return set_mode(name_classes(built, self.classes), False)
