"""VeRA (2310.11454): `delta = diag(b) B diag(d) A`, with trained vectors b and d and frozen random factors A and B.

All sites with the same number of inputs share A, and all sites with the same number of outputs share B. b starts at
zero, and d at the option `d_initial`. Source: VeRA, equation 2; `VeraModel` of peft, which slices one large pair
instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from lorasc_fx.branch.lora import LowRankBranch
from lorasc_fx.branch.noise import generator
from lorasc_fx.plan import Site
from lorasc_fx.util.decode import Check


class VeraBranch(LowRankBranch):
    """VeRA.

    Attributes:
        vera_lambda_b: vector b [out].
        vera_lambda_d: vector d [rank].
        vera_A, vera_B: shared tensors A [rank, in] and B [out, rank].
    """

    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter
    kinds = frozenset({"linear", "conv", "embedding", "recurrent"})
    zeros: ClassVar[tuple[str, ...]] = ("vera_lambda_b",)
    defaults: ClassVar[Mapping[str, float]] = {"d_initial": 0.1}
    checks: ClassVar[Mapping[str, Check]] = {
        "d_initial": Check(
            lambda start: start != 0,
            "give a number other than 0: b starts at zero, so with d = 0 both gradients would be zero",
        )
    }

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        a, b = site.factor_shapes
        self.vera_A, self.vera_B = shared_tensor(seed, "vera_A", a), shared_tensor(seed, "vera_B", b)

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shapes of b and d."""
        return {"vera_lambda_b": (site.matrix_shape[0],), "vera_lambda_d": (site.rank,)}

    @classmethod
    def initial_values(cls, site: Site, seed: int, stage: int) -> dict[str, torch.Tensor]:
        """Return zeros for b, and `d_initial` for d."""
        start = cls.options_at(site)["d_initial"]
        return {**super().initial_values(site, seed, stage), "vera_lambda_d": torch.full((site.rank,), float(start))}

    @classmethod
    def trainable_names(cls, site: Site) -> Collection[str]:
        """Return the names of b and d."""
        return ("vera_lambda_b", "vera_lambda_d")

    @property
    def down(self) -> torch.Tensor:
        """`diag(d) A`."""
        return self.vera_lambda_d.unsqueeze(-1) * self.vera_A.like(self.vera_lambda_d)

    @property
    def up(self) -> torch.Tensor:
        """`diag(b) B`."""
        return self.vera_lambda_b.unsqueeze(-1) * self.vera_B.like(self.vera_lambda_b)

    def resize(self, site: Site) -> None:
        """Change the rank of the shared tensors too."""
        super().resize(site)
        seed = self.vera_A.key[0]
        a, b = site.factor_shapes
        self.vera_A, self.vera_B = shared_tensor(seed, "vera_A", a), shared_tensor(seed, "vera_B", b)


class SharedTensor:
    """A random tensor that is determined by its key. All branches with the same key refer to the same object.

    It is not a parameter: it is not trained and not saved in checkpoints, but drawn again when a run is loaded.

    Args:
        seed, purpose, shape: the key.
    """

    def __init__(self, seed: int, purpose: str, shape: tuple[int, ...]) -> None:
        self.key = seed, purpose, shape
        bound = (6 / max(1, shape[-1])) ** 0.5  # Kaiming uniform for ReLU, as in peft's VeRA
        draw = torch.rand(shape, generator=generator(seed, 0, purpose, ""), dtype=torch.float32)
        self._values = {(torch.device("cpu"), torch.float32): draw.mul_(2 * bound).sub_(bound)}

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values on the device and in the dtype of a tensor. The conversion is cached."""
        key = tensor.device, tensor.dtype
        if key not in self._values:
            self._values[key] = next(iter(self._values.values())).to(tensor.device, tensor.dtype)
        return self._values[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedTensor:
        """Return the same object, because its values never change."""
        return self

    def __reduce__(self) -> tuple[Callable[..., SharedTensor], tuple[Any, ...]]:
        """Pickle only the key."""
        return shared_tensor, self.key


_TENSORS: WeakValueDictionary[tuple[Any, ...], SharedTensor] = WeakValueDictionary()


def shared_tensor(seed: int, purpose: str, shape: tuple[int, ...]) -> SharedTensor:
    """Return the shared tensor for a key. It is freed when no branch refers to it."""
    key = seed, purpose, shape
    tensor = _TENSORS.get(key)
    if tensor is None:
        _TENSORS[key] = tensor = SharedTensor(*key)
    return tensor
