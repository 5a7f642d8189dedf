"""The placement that `by_shape` chooses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorasc_fx as lx

ENOUGH = 512  # a product of 512 x 512 with 512 rows has 2^27 multiply-adds


@pytest.mark.parametrize(
    ("model", "shape", "dtype", "placement"),
    [
        (nn.Linear(512, 512), (ENOUGH, 512), torch.float32, "merged"),  # 2 * 512 * 512 entries over 512 * 512: 2.0
        (nn.Linear(512, 512), (2, ENOUGH, 512), torch.float64, "merged"),
        (nn.Linear(512, 512), (380, 512), torch.float32, "beside"),  # 1.48
        (nn.Linear(512, 512), (390, 512), torch.float32, "merged"),  # 1.52
        (nn.Linear(512, 512), (ENOUGH, 512), torch.bfloat16, "beside"),  # W + s B A would be rounded
        (nn.Linear(64, 64), (ENOUGH, 64), torch.float32, "beside"),  # 2^21 multiply-adds
        (nn.Conv2d(32, 64, 3, padding=1), (4, 32, 32, 32), torch.float32, "merged"),
        (nn.Conv2d(512, 512, 3, padding=1), (2, 512, 4, 4), torch.float32, "beside"),  # 0.01
    ],
)
def test_placement_by_shape(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, placement: str) -> None:
    cascade = lx.adapt(nn.Sequential(model).to(dtype), (torch.randn(shape, dtype=dtype),), spec=lx.CascadeSpec(rank=2))
    assert cascade.placements == {"0.weight": placement}


def test_under_autocast_the_placement_is_beside() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cascade = lx.adapt(nn.Sequential(nn.Linear(512, 512)), (torch.randn(ENOUGH, 512),), spec=lx.CascadeSpec(rank=2))
    assert cascade.placements == {"0.weight": "beside"}
