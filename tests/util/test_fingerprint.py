"""Checksums of weights as the formula of `device_sum`, for any split into blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from lorasc_fx.util import fingerprint
from lorasc_fx.util.fingerprint import MULTIPLIER, checksum, device_sum


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float64], ids=str)
def test_a_sum_on_the_device_is_the_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four words, and pieces of two blocks. The keys are the sums of unit vectors."""
    monkeypatch.setattr(fingerprint, "BLOCK", 16)
    monkeypatch.setattr(fingerprint, "PIECE", 32)
    keys = [device_sum(row) for row in torch.eye(4, dtype=torch.int32)]
    assert len({key for key in keys if key % 2}) == 4
    data = torch.randint(-(2**31), 2**31, (44,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    tensor = data.view(dtype)
    # A row is longer than a piece, so it is split separately. The last two have an odd offset and a stride.
    tensors = tensor.view(2, -1), tensor, torch.cat([tensor[:1], tensor])[1:], torch.stack([tensor, tensor], 1)[:, 0]
    for form in tensors:
        total = 0
        for block in (block for row in data.view(form.dim(), -1) for block in row.split(4)):
            total = (total * MULTIPLIER + sum(k * x for k, x in zip(keys, block.tolist(), strict=False))) % 2**64
        assert device_sum(form) == total
    assert device_sum(torch.tensor([3, 5], dtype=torch.uint8)) == (3 * keys[0] + 5 * keys[1]) % 2**64


def test_the_order_of_blocks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "HOST_BLOCK", 64)
    weight = torch.arange(32.0)  # two blocks
    assert checksum(weight) != checksum(weight.roll(16))


def test_the_order_of_tensors_in_a_tensor_counts() -> None:
    pair: Any = TwoTensor(torch.arange(6.0), torch.ones(6))
    assert 2**64 > checksum(pair) != checksum(TwoTensor(pair.b, pair.a))
