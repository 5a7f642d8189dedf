"""The task of a run: its model, its data, and the conversion of inputs to arguments of the model."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasc_fx.cli.config import Config
from lorasc_fx.cli.data import INPUT, LABEL, load_splits
from lorasc_fx.cli.models import ModelSource, reading
from lorasc_fx.errors import SpecError
from lorasc_fx.util.environment import module_of

Batch = dict[str, Tensor]
MAX_LENGTH = 1024
"""Maximum number of tokens if the configuration gives none."""


class Task:
    """The model and the data of a configuration, and the conversion of inputs: `model(**task(inputs))`.

    Args:
        config: the configuration.
        record: what `write` has stored in a run folder. By default it comes from the data and the model.

    Attributes:
        classes: names of the classes, in the order of the logits. Empty for a language model.

    Raises:
        SpecError: the model is unknown or cannot be read.
    """

    def __init__(self, config: Config, record: Mapping[str, Any] | None = None) -> None:
        record = record or {}
        self.config, self.source = config, ModelSource(config.model)
        self.kind, self.processor = self.source.kind, self.source.processor
        self._classes, self._chat = record.get("classes"), record.get("chat")
        self._argument: str = record.get("argument", "pixel_values")

    @classmethod
    def read(cls, config: Config, path: Path) -> Task:
        """Return the task of a run, without its data."""
        with reading(str(path)):
            return cls(config, json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Store what later commands need of the data and the model."""
        record = {"classes": self.classes, "chat": self.chat, "argument": self._argument}
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")

    @cached_property
    def data(self) -> dict[str, Any]:
        """The splits by name (`load_splits`)."""
        return load_splits(self.config.data, self.kind)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        if self._classes is None:
            self._classes = () if self.kind == "language" else self.data["train"].features[LABEL].names
        return tuple(self._classes)

    @property
    def chat(self) -> bool:
        """Whether a language model learns from messages, which its chat template converts to a text."""
        if self._chat is None:
            self._chat = self.kind == "language" and isinstance(self.data["train"][0].get("prompt"), list)
            if self._chat and self.processor.chat_template is None and not self.config.train.get("chat_template_path"):
                raise SpecError(
                    f"{self.config.data.name} has messages, but the tokenizer of {self.config.model.name} has no chat "
                    "template; give train.chat_template_path, or a data set with columns prompt and completion",
                    code="invalid-data",
                )
        return bool(self._chat)

    def model(self) -> nn.Module:
        """Build the model, with a new head for the classes."""
        if self.source.library == "timm" and not self.config.model.weights:
            print(
                f"lorasc-fx: WARNING: {self.config.model.name} starts from RANDOM weights, because model.weights is "
                "empty and nothing is downloaded; give model.weights=FILE.safetensors",
                file=sys.stderr,
            )
        model = self.source.build(self.classes)
        if self.source.library != "hf":
            self._argument = next(iter(inspect.signature(model.forward).parameters))
        return model

    def __call__(self, inputs: Sequence[Any]) -> Batch:
        """Convert inputs to arguments of the model, as in training.

        Args:
            inputs: texts, images (of PIL, or paths of files), or prompts of a language model: texts or lists of
                messages, which are padded on the left for `generate`.

        Raises:
            SpecError: an image cannot be read, or `data.max_length` is more than the model's maximum.
        """
        if isinstance(inputs, (str, PathLike)) or not len(inputs):
            raise SpecError(f"inputs are {inputs!r}; give a list of texts, or of images")
        if self.kind == "language":
            return self._tokens([self._prompt(each) for each in inputs], side="left")
        return self._tokens(inputs) if self.kind == "text" else self._pixels(inputs)

    def collate(self, rows: Sequence[Mapping[str, object]]) -> Batch:
        """Return the arguments of the model for rows of the data, and `labels` of a classifier's rows."""
        if self.kind == "language":
            return self._tokens([self._complete(row) for row in rows])
        batch = self([row[INPUT] for row in rows])
        return batch | ({"labels": torch.tensor([row[LABEL] for row in rows])} if LABEL in rows[0] else {})

    def example(self) -> Batch:
        """Return arguments of the model for two inputs, without the data."""
        if self.kind != "image":
            return self(["an example", "another example"])
        transforms = module_of("vision", "torchvision.transforms.v2.functional")
        return self([transforms.to_pil_image(torch.zeros(3, *[self.config.data.image_size] * 2))] * 2)

    @property
    def max_length(self) -> int:
        """Maximum number of tokens."""
        limit: int = self.processor.model_max_length  # a huge number if the tokenizer does not know it
        if self.config.data.max_length > limit:
            raise SpecError(
                f"data.max_length is {self.config.data.max_length}, but the model takes at most {limit} tokens; give "
                f"{limit} or less"
            )
        return self.config.data.max_length or min(limit, MAX_LENGTH)

    def _tokens(self, texts: Sequence[str], side: str = "right") -> Batch:
        encoded = self.processor(
            list(texts), truncation=True, max_length=self.max_length, padding=True, padding_side=side,
            return_tensors="pt", add_special_tokens=not (self.kind == "language" and self.chat),
        )  # fmt: skip
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _prompt(self, prompt: object) -> str:
        """Return the text that a language model continues."""
        if not self.chat:
            if not isinstance(prompt, str):
                raise SpecError("the run has learned texts, but the prompt is a list of messages; give a text")
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def _complete(self, row: Mapping[str, Any]) -> str:
        """Return the text of an example of a language model, with its completion."""
        if not self.chat:
            return str(row["text"] if "text" in row else row["prompt"] + row["completion"])
        text: str = self.processor.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        return text

    def _pixels(self, images: Sequence[object]) -> Batch:
        """Return images as [batch, 3, height, width]: by the model's processor, or resized and mapped to -1..1."""
        opened = [_opened(image) for image in images]
        if self.processor is not None:
            return {"pixel_values": self.processor(opened, return_tensors="pt")["pixel_values"]}
        transforms = module_of("vision", "torchvision.transforms.v2.functional")
        size = [self.config.data.image_size] * 2
        pixels = [transforms.pil_to_tensor(transforms.resize(image, size)) for image in opened]
        return {self._argument: torch.stack(pixels) / 127.5 - 1}


def _opened(image: Any) -> Any:
    """Return an image of PIL in RGB."""
    if isinstance(image, (str, PathLike)):
        with reading(str(image)):
            return module_of("vision", "torchvision.datasets.folder").default_loader(str(image))
    return image.convert("RGB")
