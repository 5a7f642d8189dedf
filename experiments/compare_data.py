"""The data sets of `experiments.data` as `datasets.Dataset`, for `data.name` and `data.shifts` of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from experiments import data

__all__ = ["blur", "digits", "imdb", "mnist5k", "noise", "rotten_tomatoes"]


def mnist5k() -> Dataset:
    return _images(*data.mnist5k())


def digits() -> Dataset:
    return _images(*data.digits())


def rotten_tomatoes() -> Dataset:
    return _texts(*data.rotten_tomatoes())


def imdb() -> Dataset:
    return _texts(*data.imdb())


def noise(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"input": _pictures(data.noise(_pixels(rows)))}


def blur(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"input": _pictures(data.blur(_pixels(rows)))}


def _texts(texts: Sequence[str], labels: Sequence[str]) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "label": list(labels)})


def _images(pixels: Tensor, labels: Tensor) -> Dataset:
    return Dataset.from_dict({"image": _pictures(pixels), "label": labels.tolist()})


def _pictures(pixels: Tensor) -> list[Any]:
    return [to_pil_image(image) for image in pixels]


def _pixels(rows: dict[str, list[Any]]) -> Tensor:
    return torch.stack([pil_to_tensor(image) for image in rows["input"]])
