"""The format of peft's LoRA adapters, read and written by what comes in and what goes out: files, keys of the
configuration, keys of tensors, and how the factors of each kind of layer are stored.

Source: peft 0.21, `tuners/lora/layer.py`, `tuners/lora/config.py`, `utils/other.py: get_pattern_key`. Ours are `b`
[rows, r] and `a` [r, columns] with `b @ a` the delta of the weight as it is stored (`Factors`); peft's are (A, B) with
`B @ A` the delta of a weight [out, in].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from lorasc_fx.state import Factors

__all__ = [
    "CONFIG",
    "FOREIGN",
    "IDLE",
    "LAYOUTS",
    "PREFIX",
    "RANKS",
    "TENSORS",
    "USED",
    "Conv",
    "Conv1d",
    "Layout",
    "Parameter",
    "Place",
    "by_pattern",
    "key_path",
    "layout_of",
    "wrap_counts",
]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter's folder."""

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank, but for 1."""

IDLE = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
"""Keys of an adapter's file that say nothing of the numbers, or what the names of the tensors say again."""

FOREIGN = {
    "alora_invocation_tokens": "an activated LoRA changes some tokens only",
    "arrow_config": "Arrow routes between adapters",
    "corda_config": "CorDA changes the base",
    "kasa_config": "KaSA changes the base",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "the factors have a bias, which is no part of a weight",
    "monteclora_config": "MonteCLoRA draws its factors",
    "trainable_token_indices": "single rows of an embedding were trained",
    "use_bdlora": "its factors are block-diagonal",
    "use_dora": "DoRA scales whole rows of the weight, which is no low-rank change",
    "use_qalora": "QA-LoRA pools the input",
    "velora_config": "VeLoRA is another layer",
}
"""Features that make an adapter something else than `W + s B A`, with the reason."""

USED = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "r", "rank_pattern",
    "target_parameters", "use_rslora",
}  # fmt: skip
"""Keys that the import reads, and a spec is made of."""

PREFIX = "base_model.model."
"""Of every key of an adapter file."""


@dataclass(frozen=True)
class Layout:
    """How a kind of layer stores A and B; this one, of `nn.Linear`, stores them as we do."""

    @property
    def keys(self) -> tuple[str, str]:
        """Last parts of the keys of A and B in an adapter file."""
        return "lora_A.weight", "lora_B.weight"

    def fits(self, module: nn.Module, axes: int) -> bool:
        """Whether peft adapts the `weight` of this module, which has so many axes, in this layout."""
        return isinstance(module, nn.Linear)

    def to_peft(self, pair: Factors, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (A, B) of a weight of this shape."""
        return pair.a, pair.b

    def from_peft(self, lora_a: torch.Tensor, lora_b: torch.Tensor, shape: Sequence[int]) -> Factors:
        """Return our factors of a weight of this shape: the inverse of `to_peft`."""
        return Factors(lora_b, lora_a)

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B at this rank."""
        return (rank, math.prod(shape[1:])), (shape[0], rank)

    def magnitude(self, magnitude: torch.Tensor, axes: int) -> torch.Tensor:
        """Return DoRA's magnitudes [out] as peft stores them for a weight of so many axes."""
        return magnitude


@dataclass(frozen=True)
class Transposed(Layout):
    """Layers whose weight is [in, out]."""

    def to_peft(self, pair: Factors, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Layout`."""
        return pair.b.t(), pair.a.t()

    def from_peft(self, lora_a: torch.Tensor, lora_b: torch.Tensor, shape: Sequence[int]) -> Factors:
        """See `Layout`."""
        return Factors(lora_a.t().contiguous(), lora_b.t().contiguous())

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `Layout`."""
        return (rank, shape[0]), (shape[1], rank)


@dataclass(frozen=True)
class Conv1d(Transposed):
    """transformers' Conv1D, which is a linear layer."""

    def fits(self, module: nn.Module, axes: int) -> bool:
        """See `Layout`."""
        classes = type(module).__mro__
        return axes == 2 and any(
            kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in classes
        )


@dataclass(frozen=True)
class Embedding(Transposed):
    """`nn.Embedding`, whose factors are parameters and no layers."""

    @property
    def keys(self) -> tuple[str, str]:
        """See `Layout`."""
        return "lora_embedding_A", "lora_embedding_B"

    def fits(self, module: nn.Module, axes: int) -> bool:
        """See `Layout`."""
        return isinstance(module, nn.Embedding)


@dataclass(frozen=True)
class Conv(Layout):
    """Convolutions without groups: A is a convolution of the same kernel, B one of kernel 1."""

    def fits(self, module: nn.Module, axes: int) -> bool:
        """See `Layout`; peft's delta of a grouped convolution mixes the groups."""
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1

    def to_peft(self, pair: Factors, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Layout`."""
        shape_a, shape_b = self.shapes(shape, pair.a.shape[-2])
        return pair.a.reshape(shape_a), pair.b.reshape(shape_b)

    def from_peft(self, lora_a: torch.Tensor, lora_b: torch.Tensor, shape: Sequence[int]) -> Factors:
        """See `Layout`."""
        return Factors(lora_b.flatten(1), lora_a.flatten(1))

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `Layout`."""
        return (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))

    def magnitude(self, magnitude: torch.Tensor, axes: int) -> torch.Tensor:
        """See `Layout`."""
        return magnitude.view(1, -1, *(1 for _ in range(axes - 2)))


@dataclass(frozen=True)
class Parameter(Layout):
    """peft's `target_parameters`: any parameter, replaced while its module runs; a stack of experts in one pair.

    The ranks of A are ordered by expert, those of B by rank.

    Args:
        transposed: experts are stored as [experts, in, out], as the module's `is_transposed` says.
    """

    transposed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Parameter:
        """Return the layout of a module's own parameters."""
        return cls(bool(getattr(module, "is_transposed", False)))

    def fits(self, module: nn.Module, axes: int) -> bool:
        """See `Layout`; it is asked for by name only."""
        return False

    def to_peft(self, pair: Factors, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Layout`."""
        if len(shape) != 3:
            return super().to_peft(pair, shape)
        inner, outer = (pair.b.mT, pair.a.mT) if self.transposed else (pair.a, pair.b)
        return inner.flatten(0, 1), outer.permute(1, 2, 0).flatten(1)

    def from_peft(self, lora_a: torch.Tensor, lora_b: torch.Tensor, shape: Sequence[int]) -> Factors:
        """See `Layout`."""
        if len(shape) != 3:
            return super().from_peft(lora_a, lora_b, shape)
        inner = lora_a.reshape(shape[0], -1, lora_a.shape[-1])
        outer = lora_b.reshape(lora_b.shape[0], -1, shape[0]).permute(2, 0, 1)
        b, a = (inner.mT, outer.mT) if self.transposed else (outer, inner)
        return Factors(b.contiguous(), a.contiguous())

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `Layout`."""
        if len(shape) != 3:
            return super().shapes(shape, rank)
        experts, out, inner = (shape[0], shape[2], shape[1]) if self.transposed else shape
        return (experts * rank, inner), (out, rank * experts)


LAYOUTS = (Embedding(), Conv(), Layout(), Conv1d())
"""Of the layers that peft adapts by the module's name."""


def layout_of(module: nn.Module, leaf: str, axes: int) -> Layout | None:
    """Return the layout in which peft adapts a weight of so many axes by its module's name; None where it does not."""
    if leaf != "weight":
        return None
    return next((layout for layout in LAYOUTS if layout.fits(module, axes)), None)


@dataclass(frozen=True)
class Place:
    """A parameter that peft adapts.

    Args:
        path: of the module that holds it.
        leaf: its name there.
        layout: of its factors.
    """

    path: str
    leaf: str
    layout: Layout

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.path}.{self.leaf}"

    @property
    def is_parameter(self) -> bool:
        """Whether it is one of peft's `target_parameters`, and not the weight of a module that peft replaces."""
        return isinstance(self.layout, Parameter)

    @property
    def pattern(self) -> str:
        """What peft matches rank_pattern and alpha_pattern against."""
        return self.name if self.is_parameter else self.path

    def keys(self, model: nn.Module, places: Sequence[Place]) -> tuple[str, str, str]:
        """Return the keys of A, B and DoRA's magnitudes in an adapter of all these places.

        peft wraps a module once for each of its `target_parameters`, the first one innermost.
        """
        depth = 0
        if self.is_parameter:
            leaves = {place.leaf for place in places if place.path == self.path and place.is_parameter}
            module = model.get_submodule(self.path)
            order = [name for name, _ in module.named_parameters(recurse=False) if name in leaves]
            depth = len(order) - 1 - order.index(self.leaf)
        stem = f"{PREFIX}{key_path(self.path, wrap_counts(places))}.{'base_layer.' * depth}"
        a, b = self.layout.keys
        return f"{stem}{a}", f"{stem}{b}", f"{stem}lora_magnitude_vector"


def wrap_counts(places: Iterable[Place]) -> dict[str, int]:
    """Return how often peft wraps each module for parameters of its own, by path."""
    counts: dict[str, int] = {}
    for place in places:
        if place.is_parameter:
            counts[place.path] = counts.get(place.path, 0) + 1
    return counts


def key_path(path: str, wraps: Mapping[str, int]) -> str:
    """Return a module's path once peft has wrapped modules above it: `wraps` says which, and how often each."""
    parts: list[str] = []
    names = path.split(".")
    for count, name in enumerate(names, start=1):
        parts.append(name)
        if count < len(names):
            parts += ["base_layer"] * wraps.get(".".join(names[:count]), 0)
    return ".".join(parts)


Value = TypeVar("Value")


def by_pattern(patterns: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """Return the value of the first pattern that means a module, or parameter, of this name."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, otherwise)
