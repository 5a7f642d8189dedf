"""What every comparison repeats: a model with seeded inputs, our cascade on a copy, and the weights by formula.

The formula is `W + s B A` in fp64, put into the plain eager model by torch.func; the package does not compute it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.kit import oracle
from tests.kit.models import branches, randomize

RANK, ALPHA, SCALE = 4, 6.0, 1.5

EXACT = 1e-14
"""fp64 sums of fewer than 100 products, summed in another order: outputs of size 5 have a last bit of 9e-16."""


@dataclass(frozen=True)
class Case:
    """A model, its inputs, the modules or weights that are targets, and the weights that these mean."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    targets: tuple[str, ...]
    weights: tuple[str, ...]

    def model(self) -> nn.Module:
        """The model in fp64, the same for every call."""
        torch.manual_seed(1)
        return self.build().double()


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    """Inputs in fp64, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: Callable[..., Any], args: Sequence[Any]) -> torch.Tensor:
    """Call with the same dropout masks each time; of transformers' outputs the logits."""
    torch.manual_seed(7)
    output = model(*args)
    return getattr(output, "logits", output)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two outputs of one shape."""
    assert one.shape == other.shape
    return (one.double() - other.double()).abs().max().item()


def eager(model: nn.Module, weights: dict[str, torch.Tensor], args: Sequence[Any]) -> torch.Tensor:
    """The plain model with these weights in place of its own."""
    with torch.no_grad():
        return seeded(lambda *given: torch.func.functional_call(copy.deepcopy(model), weights, given), args)


# ---- ours


def ours_of(model: nn.Module, args: Sequence[Any], targets: Iterable[str], frontend: str = "auto") -> lx.Cascade:
    """Return the cascade of a copy of the model, with B not 0."""
    spec = lx.CascadeSpec(targets=tuple(targets), rank=RANK, lora_alpha=ALPHA, pace=1.0)
    cascade = lx.adapt(copy.deepcopy(model), tuple(args), spec=spec, frontend=frontend)
    randomize(cascade)
    return cascade


def pairs_of(cascade: lx.Cascade) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors (b, a) by weight name, with `b @ a` as the weight is stored: [in, out] has the pair transposed."""
    pairs = {}
    for site in cascade.sites:
        branch = branches(cascade)[site.weight]
        a, b = branch.lora_A.detach(), branch.lora_B.detach()
        pairs[site.weight] = (a.mT, b.mT) if site.layout == "in_out" else (b, a)
    return pairs


def by_formula(model: nn.Module, cascade: lx.Cascade) -> oracle.Cascade:
    """Return the reference, `model(W + s B A)` differentiated as it stands, with copies of the cascade's factors."""
    pairs = pairs_of(cascade)
    reference = oracle.Cascade(model, {name: a for name, (_, a) in pairs.items()}, SCALE)
    for name, (b, _) in pairs.items():
        reference.branches[name].b = b.clone().requires_grad_()
    return reference


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the model's buffers."""
    return {name: value.clone() for name, value in model.named_buffers()}
