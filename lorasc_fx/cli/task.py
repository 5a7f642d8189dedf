"""The task of a run: its model, its data, and the conversion of inputs to arguments of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.image_utils import load_image
from transformers.models.auto import modeling_auto

from lorasc_fx.cli.classifier import freeze_batch_norms, mean_pooled, reading
from lorasc_fx.cli.config import Config
from lorasc_fx.cli.data import INPUT, LABEL, load_splits
from lorasc_fx.errors import SpecError

Batch = dict[str, Tensor]
MAX_LENGTH = 1024
"""Maximum number of tokens if the configuration gives none."""
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every `from_pretrained`: nothing is downloaded, and no code in a model's folder runs."""


class Task:
    """The model and the data of a configuration, and the conversion of inputs: `model(**task(inputs))`.

    Args:
        config: the configuration.
        record: the content of the file that `write` has written. By default, it is derived from the data.

    Attributes:
        kind: `language` (a causal language model), `text` or `image` (classifiers).
        processor: the tokenizer or image processor.

    Raises:
        SpecError: the folder of the model cannot be read.
    """

    def __init__(self, config: Config, record: Mapping[str, Any] | None = None) -> None:
        record = record or {}
        self.config, self.folder = config, config.model.path
        self._classes, self._chat = record.get("classes"), record.get("chat")
        if not Path(self.folder, "config.json").is_file():
            raise SpecError(
                f"model.path is {self.folder!r}: there is no such folder with a config.json, and nothing is downloaded",
                code="unreadable-file",
            )
        with reading(self.folder):
            self._settings = transformers.AutoConfig.from_pretrained(self.folder, **_LOCAL)
            self.kind = _kind_of(self._settings)
            auto: Any = transformers.AutoImageProcessor if self.kind == "image" else transformers.AutoTokenizer
            self.processor: Any = auto.from_pretrained(self.folder, **_LOCAL)
        if self.kind != "image" and self.processor.pad_token is None:
            self.processor.pad_token = self.processor.eos_token

    @classmethod
    def read(cls, config: Config, path: Path) -> Task:
        """Return the task of a run, without its data."""
        with reading(str(path)):
            return cls(config, json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Store the facts about the data that later commands need."""
        path.write_text(json.dumps({"classes": self.classes, "chat": self.chat}) + "\n", encoding="utf-8")

    @cached_property
    def data(self) -> dict[str, Any]:
        """The splits of `load_splits`: {name: data set}."""
        return load_splits(self.config.data, self.kind)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits. Empty for a language model."""
        if self._classes is None:
            self._classes = () if self.kind == "language" else self.data["train"].features[LABEL].names
        return tuple(self._classes)

    @property
    def chat(self) -> bool:
        """Whether a language model learns from messages, which its chat template converts to text."""
        if self._chat is None:
            self._chat = self.kind == "language" and isinstance(self.data["train"][0].get("prompt"), list)
        return bool(self._chat)

    def model(self) -> nn.Module:
        """Build the model. The head of a classifier is new, unless the folder has one with as many classes."""
        autos: dict[str, Any] = {
            "language": transformers.AutoModelForCausalLM,
            "text": transformers.AutoModelForSequenceClassification,
            "image": transformers.AutoModelForImageClassification,
        }
        auto, dtype = autos[self.kind], self.config.model.dtype
        if self.classes:
            labels = dict(enumerate(self.classes))
            self._settings.update({"id2label": labels, "label2id": {name: number for number, name in labels.items()}})
        if self.kind == "text" and not _classifies(self._settings):
            auto = mean_pooled(self._settings)
        with reading(self.folder):
            model: Any = auto.from_pretrained(
                self.folder, config=self._settings, dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True, ignore_mismatched_sizes=self.kind != "language", **_LOCAL,
            )  # fmt: skip
        if self.kind == "text" and model.config.pad_token_id is None:  # causal models classify the last token
            model.config.pad_token_id = self.processor.pad_token_id
        freeze_batch_norms(model)
        return model  # type: ignore[no-any-return]  # transformers has no types

    def __call__(self, inputs: Sequence[Any]) -> Batch:
        """Convert inputs to arguments of the model, as in training.

        Args:
            inputs: texts for a text classifier; PIL images or paths of image files for an image classifier; texts or
                lists of messages for a language model. Prompts are padded on the left, as `generate` requires.

        Raises:
            SpecError: `inputs` is empty or not a list, or one of them cannot be read.
        """
        if isinstance(inputs, (str, PathLike)) or not len(inputs):
            raise SpecError(f"inputs is {inputs!r}; give a list of texts or images")
        if self.kind == "image":
            with reading("image"):
                return self._pixels([load_image(str(item) if isinstance(item, PathLike) else item) for item in inputs])
        return self._tokens([self._prompt(item) for item in inputs] if self.kind == "language" else list(inputs))

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Convert rows of the data to arguments of a classifier, and add the classes as `labels` [rows]."""
        return self([row[INPUT] for row in rows]) | {"labels": torch.tensor([row[LABEL] for row in rows])}

    def example(self) -> Batch:
        """Return arguments of the model for two made-up inputs. This does not read the data."""
        if self.kind == "image":
            return self._pixels([torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()] * 2)
        return self._tokens(["an example", "another example"])

    @property
    def max_length(self) -> int:
        """Maximum number of tokens."""
        limit: int = self.processor.model_max_length  # a huge number if the tokenizer has no limit
        return min(limit, self.config.data.max_length or MAX_LENGTH)

    def _tokens(self, texts: list[str]) -> Batch:
        is_language = self.kind == "language"
        encoded = self.processor(
            texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt",
            padding_side="left" if is_language else "right", add_special_tokens=not (is_language and self.chat),
        )  # fmt: skip
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _pixels(self, images: list[object]) -> Batch:
        return {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}

    def _prompt(self, prompt: object) -> str:
        """Return the text that a language model continues."""
        if not self.chat:
            if not isinstance(prompt, str):
                raise SpecError("the run was trained on texts, but the prompt is a list of messages; give a text")
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _kind_of(settings: Any) -> str:
    """Return the kind of a model of transformers: `language`, `image` or `text`."""
    if {*(settings.architectures or ())} & {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        return "language"
    return "image" if type(settings) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING else "text"


def _classifies(settings: Any) -> bool:
    """Whether the folder of a text model has a classifier, and not only an encoder."""
    return any(name.endswith("ForSequenceClassification") for name in settings.architectures or ())
