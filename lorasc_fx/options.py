"""Strategy objects for the options of `CascadeSpec`, and one table per option from its values to the objects.

Engine, passes and checkpoints call methods of these objects. To add a value, add a class and a row in the table of the
option (CONTRIBUTING.md, "Add an option"). docs/method.md lists the formulas.

Notation (docs/algorithm.md, "One site"): W0 is the pretrained weight, t = 1, 2, ... the stage, S_t the slow delta, and
F_t the fast delta. A branch has the scale s, the rank r, and the factors B [out, r] and A [r, in].
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch


class Start(abc.ABC):
    """Computes the initial factors of a branch at the start of a stage (`CascadeSpec.start`)."""

    from_weight: ClassVar[bool] = True
    """Whether the factors are computed from the weight. It then holds the residual `W - s B_0 A_0` during the stage."""

    @abc.abstractmethod
    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B_0 [..., out, k] and A_0 [..., k, in], with k at most `rank`.

        If k is smaller than the rank, the remaining rows of A are initialized as in LoRA, and the remaining columns of
        B are zero.

        Args:
            matrix: the weight [..., out, in]. Leading axes are independent matrices (stacked experts).
            rank: rank of the branch.
            scale: scale s of the branch. The branch adds `s B_0 A_0`.
        """


class LoraStart(Start):
    """LoRA (2106.09685): B = 0, and A as `CascadeSpec.restart_A` says. The weight is not changed."""

    from_weight: ClassVar[bool] = False

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors of rank 0, because nothing is computed from the weight."""
        return matrix[..., :0], matrix[..., :0, :]


class PissaStart(Start):
    """PiSSA (2404.02948): the r largest singular triplets, so `s B_0 A_0` is the nearest matrix of rank r."""

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `U_r sqrt(v_r / s)` and `sqrt(v_r / s) V_r^T`, with `W = U diag(v) V^T`."""
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        return split_evenly(u[..., :rank], values[..., :rank], vh[..., :rank, :], scale)


class MiloraStart(Start):
    """MiLoRA (2406.09044): the r smallest singular triplets, which are orthogonal to the principal ones."""

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors like `PissaStart`, from the last r columns of U, values v and rows of V^T."""
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        return split_evenly(u[..., -rank:], values[..., -rank:], vh[..., -rank:, :], scale)


class OloraStart(Start):
    """OLoRA (2406.01775): the first r columns of Q and rows of R of `W = Q R`."""

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `Q[:, :r]` and `R[:r]`. The scale is not divided out, as in peft."""
        q, r = torch.linalg.qr(matrix)
        return q[..., :rank], r[..., :rank, :]


def split_evenly(
    u: torch.Tensor, values: torch.Tensor, vh: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return b and a with `scale * b @ a = u diag(values) vh`. Each gets the square root of values / scale."""
    root = (values / scale).sqrt()
    return u * root.unsqueeze(-2), root.unsqueeze(-1) * vh


STARTS: Mapping[str, Start] = {
    "lora": LoraStart(),
    "pissa": PissaStart(),
    "olora": OloraStart(),
    "milora": MiloraStart(),
}
"""Strategies by the value of `CascadeSpec.start`."""


def scale_of(rank: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return the scale s of a branch: `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` as in rsLoRA (2312.03732)."""
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)


ADAPTERS: dict[str, type[Any]] = {}
"""Subclasses of `lorasc_fx.branch.Branch` by the value of `CascadeSpec.adapter`.

`lorasc_fx.branch.methods` fills this table, and `lorasc_fx.register_branch` adds to it. It is here because the spec
checks names before the branches, which need the spec, can be imported.
"""


class Distribution(abc.ABC):
    """Distribution of the noise before it is scaled (`Noise.distribution`)."""

    by_rows: ClassVar[bool] = False
    """Whether each row of the noise is scaled by the norm of its row of the weight.

    Otherwise all entries are scaled by the standard deviation of the weight.
    """

    @abc.abstractmethod
    def from_uniform(self, numbers: torch.Tensor) -> torch.Tensor:
        """Convert fp32 numbers that are uniform in [-1/2, 1/2] to unscaled noise, in place."""


class Uniform(Distribution):
    """U(-1/2, 1/2), as in NoisyTune (2202.12024)."""

    def from_uniform(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the numbers unchanged."""
        return numbers


class Normal(Distribution):
    """N(0, 1/12), which has the variance of the uniform distribution."""

    def from_uniform(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return normal numbers of variance 1/12."""
        return _normal(numbers).mul_(12**-0.5)


class Filter(Distribution):
    """N(0, 1), scaled by `|W_i| / sqrt(n)` in row i with n entries, as in Flat-LoRA (2409.14396)."""

    by_rows: ClassVar[bool] = True

    def from_uniform(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return normal numbers of variance 1."""
        return _normal(numbers)


def _normal(numbers: torch.Tensor) -> torch.Tensor:
    """Convert fp32 numbers that are uniform in [-1/2, 1/2] to standard normal numbers, in place."""
    # Slightly less than 2, because erfinv is infinite at -1 and 1.
    return numbers.mul_(2 - 2**-23).erfinv_().mul_(2**0.5)


DISTRIBUTIONS: Mapping[str, Distribution] = {"uniform": Uniform(), "normal": Normal(), "filter": Filter()}
"""Strategies by the value of `Noise.distribution`."""
