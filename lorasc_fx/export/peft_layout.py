"""How peft keeps a pair of factors: the forms of its layers, and which of our tensors stands in which of its own.

Source: peft 0.21, `tuners/lora/layer.py`. Ours are `b` [rows, r] and `a` [r, columns] with `b @ a` the delta of the
weight as it is stored (`branch.Factors`); peft's are (A, B) with `B @ A` the delta of a weight [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorasc_fx.state import Factors

__all__ = [
    "PREFIX",
    "Place",
    "as_ours",
    "as_theirs",
    "form_of",
    "is_conv1d",
    "magnitude_as_theirs",
    "names_of",
    "shapes_of",
    "wrapped",
]

PREFIX = "base_model.model."
"""Of every key of an adapter file."""

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Place:
    """A parameter where peft adapts it.

    Args:
        path: of the module that holds it.
        leaf: its name there.
        form: `linear`, `conv1d` (transformers' Conv1D, [in, out]), `embedding`, `conv`; or `parameter`, peft's
            `target_parameters`, which replaces the parameter while its module runs.
        transposed: stacked experts are kept as [experts, in, out], by the module's own word.
    """

    path: str
    leaf: str
    form: str
    transposed: bool = False

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.path}.{self.leaf}"

    @property
    def pattern(self) -> str:
        """What peft matches rank_pattern and alpha_pattern against."""
        return self.name if self.form == "parameter" else self.path


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, which is a linear of weight [in, out]."""
    return any(
        each.__name__ == "Conv1D" and each.__module__.startswith("transformers.") for each in type(module).__mro__
    )


def form_of(module: nn.Module, leaf: str, axes: int) -> str | None:
    """Return the form in which peft adapts a weight of so many axes by its module's name; None where it has none.

    A grouped convolution has none: peft's delta of it mixes the groups.
    """
    if leaf != "weight":
        return None
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _CONVS):
        return "conv" if module.groups == 1 else None
    if isinstance(module, nn.Linear):
        return "linear"
    return "conv1d" if is_conv1d(module) and axes == 2 else None


def names_of(place: Place) -> tuple[str, str]:
    """Return the last parts of the keys of A and B."""
    if place.form == "embedding":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def wrapped(module: nn.Module, leaf: str, leaves: Sequence[str]) -> str:
    """Return the part of a key that says which of a module's own parameters it is about.

    peft wraps a module once for each of its `target_parameters`, the first one innermost.
    """
    order = [name for name, _ in module.named_parameters(recurse=False) if name in leaves]
    return "base_layer." * (len(order) - 1 - order.index(leaf))


def as_theirs(place: Place, pair: Factors, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A, B) as peft keeps them for a weight of this shape."""
    b, a = pair.b, pair.a
    rank = a.shape[-2]
    if place.form in ("conv1d", "embedding"):
        return b.t(), a.t()
    if place.form == "conv":
        return a.reshape(rank, *shape[1:]), b.reshape(shape[0], rank, *(1 for _ in shape[2:]))
    if len(shape) == 3:  # of all experts in one matrix: the ranks of A expert by expert, those of B rank by rank
        inner, outer = (b.mT, a.mT) if place.transposed else (a, b)
        return inner.flatten(0, 1), outer.permute(1, 2, 0).flatten(1)
    return a, b


def magnitude_as_theirs(place: Place, magnitude: torch.Tensor, axes: int) -> torch.Tensor:
    """Return magnitudes [out] as peft keeps them for a weight of so many axes: of a convolution [1, out, 1, ...]."""
    return magnitude.view(1, -1, *(1 for _ in range(axes - 2))) if place.form == "conv" else magnitude


def shapes_of(place: Place, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes that A and B have at this rank."""
    if place.form in ("conv1d", "embedding"):
        return (rank, shape[0]), (shape[1], rank)
    if place.form == "conv":
        return (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    if len(shape) == 3:
        experts, out, inner = (shape[0], shape[2], shape[1]) if place.transposed else shape
        return (experts * rank, inner), (out, rank * experts)
    return (rank, math.prod(shape[1:])), (shape[0], rank)


def as_ours(place: Place, lora_a: torch.Tensor, lora_b: torch.Tensor, shape: Sequence[int]) -> Factors:
    """Return the pair of factors of a weight of this shape: the inverse of `as_theirs`."""
    if place.form in ("conv1d", "embedding"):
        return Factors(lora_a.t().contiguous(), lora_b.t().contiguous())
    if place.form == "conv":
        return Factors(lora_b.flatten(1), lora_a.flatten(1))
    if len(shape) == 3:
        inner = lora_a.reshape(shape[0], -1, lora_a.shape[-1])
        outer = lora_b.reshape(lora_b.shape[0], -1, shape[0]).permute(2, 0, 1)
        b, a = (inner.mT, outer.mT) if place.transposed else (outer, inner)
        return Factors(b.contiguous(), a.contiguous())
    return Factors(lora_b, lora_a)
