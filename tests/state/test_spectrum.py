"""Spectra from factors against numpy's SVD of the dense delta, and effective ranks known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lorasc_fx.branch import Delta
from lorasc_fx.state import effective_rank, norm_of, singular_values, slow_spectrum
from tests.kit.state import Expert, Factors, made_weight


def factors(rows: int, columns: int, rank: int, *stack: int, seed: int = 1) -> Factors:
    source = torch.Generator().manual_seed(seed)
    b, a = torch.randn(*stack, rows, rank, generator=source), torch.randn(*stack, rank, columns, generator=source)
    return Factors(b, a)


@pytest.mark.parametrize("shape", [(40, 30, 3), (5, 30, 7), (30, 4, 9), (6, 7, 1)])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_singular_values_are_those_of_the_product(shape: tuple[int, int, int], stack: tuple[int, ...]) -> None:
    pair = factors(*shape, *stack)
    dense = pair.b.double().numpy() @ pair.a.double().numpy()
    expected = np.linalg.svd(dense, compute_uv=False)
    values = singular_values(Delta(pair))
    assert values.shape == (*stack, min(shape))
    np.testing.assert_allclose(values.numpy(), expected[..., : min(shape)], rtol=1e-10, atol=1e-12)
    assert norm_of(values) == pytest.approx(np.linalg.norm(dense), rel=1e-10)


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]).double()) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0]).double()) == pytest.approx(1)
    assert effective_rank(torch.zeros(4).double()) == 0
    values = torch.tensor([3.0, 1.0]).double()
    assert effective_rank(values) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert effective_rank(torch.stack([values, torch.tensor([1.0, 1.0]).double()])) == pytest.approx(
        (effective_rank(values) + 2) / 2
    )


def test_the_slow_delta_with_its_coefficients_and_after_a_collapse() -> None:
    first, second = factors(12, 9, 2), factors(12, 9, 1, seed=2)
    experts = (Expert(1, first.b, first.a), Expert(2, second.b, second.a))
    state = made_weight(torch.zeros(12, 9), experts, (0.5, 0.25))
    dense = 0.5 * first.b.double() @ first.a.double() + 0.25 * second.b.double() @ second.a.double()
    expected = np.linalg.svd(dense.numpy(), compute_uv=False)
    np.testing.assert_allclose(slow_spectrum(state).numpy(), expected[:3], rtol=1e-6)
    np.testing.assert_allclose(slow_spectrum(state.collapsed()).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert slow_spectrum(made_weight(torch.zeros(12, 9))).shape == (0,)
