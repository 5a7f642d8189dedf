"""Sums of experts as one pair, and the nearest pair of a smaller rank, compared with the SVD of the delta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lorasc_fx.peft.change import compressed, factored, padded
from lorasc_fx.state import sum_of
from tests.kit.state import Factors


def pair(*shape: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Factors:
    source = torch.Generator().manual_seed(seed)
    *stack, rows, columns = shape
    b, a = (
        torch.randn(each, generator=source, dtype=dtype) for each in ((*stack, rows, rank), (*stack, rank, columns))
    )
    return Factors(b, a)


def delta(of: Factors) -> torch.Tensor:
    return of.b.double() @ of.a.double()


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)])
def test_a_sum_of_experts(shape: tuple[int, ...]) -> None:
    one, two, three = (pair(*shape, rank=rank, seed=rank, dtype=torch.float32) for rank in (1, 2, 3))
    found = sum_of([(0.5, one), (0.25, two), (-2.0, three)], torch.float64, torch.device("cpu"))
    assert found.a.shape[-2] == found.b.shape[-1] == 6
    expected = 0.5 * delta(one) + 0.25 * delta(two) - 2 * delta(three)
    torch.testing.assert_close(delta(found), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 7, 5)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_nearest_pair(shape: tuple[int, ...], rank: int) -> None:
    whole = pair(*shape, rank=9)
    found, cut = compressed(whole, rank)
    left, values, right = torch.linalg.svd(delta(whole), full_matrices=False)
    nearest = left[..., :rank] * values[..., None, :rank] @ right[..., :rank, :]
    torch.testing.assert_close(delta(found), nearest, rtol=0, atol=1e-12)
    assert (cut.before, cut.after, found.a.shape[-2]) == (9, rank, rank)
    assert cut.norm == pytest.approx(float(delta(whole).norm()), rel=1e-12)
    assert cut.error == pytest.approx(float((delta(whole) - delta(found)).norm()), rel=1e-9, abs=1e-12)
    assert cut.relative == pytest.approx(cut.error / cut.norm)


def test_a_sufficient_rank_changes_nothing() -> None:
    whole = pair(7, 5, rank=3)
    found, cut = compressed(whole, 3)
    assert found is whole
    assert (cut.before, cut.after, cut.error, cut.relative) == (3, 3, 0.0, 0.0)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is created."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return output


def test_the_delta_is_never_formed() -> None:
    whole = pair(300, 400, rank=6)
    with Largest() as largest:
        compressed(whole, 2)
    assert largest.entries <= 400 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 6), (2, 6, 9)])
def test_a_dense_delta_at_its_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    dense = delta(pair(*shape, rank=3)).to(dtype)
    found = factored(dense)
    assert found.a.shape[-2] == 3
    torch.testing.assert_close(delta(found), dense.double(), rtol=0, atol=20 * torch.finfo(dtype).eps)
    assert factored(torch.randn(4, 3, dtype=dtype)).a.shape[-2] == 3
    assert factored(torch.zeros(4, 3, dtype=dtype)).a.shape[-2] == 1


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)])
def test_zeros_up_to_a_rank(shape: tuple[int, ...]) -> None:
    whole = pair(*shape, rank=3)
    found = padded(whole, 8)
    assert found.a.shape[-2] == found.b.shape[-1] == 8
    assert torch.equal(found.a[..., :3, :], whole.a)
    assert torch.equal(found.b[..., :3], whole.b)
    assert not found.a[..., 3:, :].any()
    assert not found.b[..., 3:].any()
