"""The preprocessing of a run: how texts or images become arguments of the model, and what the classes are called.

`lorasc-fx predict` and `lorasc_fx.cli.load` use it. The data set is not read.
"""

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
    """Turns inputs into arguments of the model, as in the run: `args, kwargs = preprocessing(inputs)`.

    Args:
        folder: of the run.

    Attributes:
        classes: names of the classes, in the order of the logits.
        tokenizer: of a text model; None for images.

    Raises:
        StateError: the folder does not name its classes.
        SpecError: its configuration or its tokenizer cannot be read.
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
            inputs: texts, or paths of images.

        Raises:
            SpecError: inputs are one text, or empty, or an image cannot be read.
        """
        if isinstance(inputs, (str, PathLike)) or not len(inputs):
            raise SpecError(f"preprocessing: inputs are {inputs!r}; give a list of texts, or of paths of images")
        if self.tokenizer is not None:
            return self._encode(list(inputs))
        data = self.config.data
        size = None if data.name.startswith("python:") else data.image_size  # the run resizes files as it reads them
        images = [self._encode(read_image(Path(path), size)[None])[0][0] for path in inputs]
        return (torch.cat(images).contiguous(memory_format=torch.channels_last),), {}

    def base(self) -> nn.Module:
        """Return the model that the run has adapted, in eval mode. A user's function is not called.

        Raises:
            SpecError: the model or its weights come from a user's function, or cannot be built; see `build_model`.
        """
        model = self.config.model
        for key, name in (("model.name", model.name), ("model.weights", model.weights)):
            if name.startswith("python:"):
                raise SpecError(
                    f"{self._folder.path}: its {key} is {name}, a function that is not called here. Build the model as "
                    f"in the run, after torch.manual_seed({head_seed(model, self.config.train.seed)}), and call "
                    "lorasc_fx.cli.load(folder, model)",
                    code="no-base",
                )
        built = build_model(model, len(self.classes), self.config.train.seed)
        return set_mode(name_classes(built, self.classes), False)
