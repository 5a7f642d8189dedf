"""Rows of a batch with separate adapters equal models with these adapters folded in: operators and architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from benchmarks.coverage.entry import built
from benchmarks.coverage.zoo import ZOO
from lorasc_fx.bank.rows import row_count
from lorasc_fx.signature import leaves
from lorasc_fx.spec import KINDS
from tests.bank.test_bank import assert_rows, distance, folded, random_pairs
from tests.kit.operators import OPERATORS
from tests.kit.operators.case import Case

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

OPERATOR_ROWS = [
    case
    for case in OPERATORS
    if False in case.modes and case.has_graph
    if case.name != "encoder"  # eager mode writes zeros where the input is padding, and its graph does not
][::2]
QUICK = ("resnet18", "llama", "vit_tiny_patch16_224")
MORE = (
    *("gpt2", "mixtral", "convnext_atto", "mobilenetv3_small_050", "tv_fcn", "hf_patchtst", "bert", "t5"),
    *("deberta_v2", "mamba", "clip"),
)
NOT_EVERY_KIND = ("gpt2", "mixtral", "bert", "deberta_v2", "mamba", "t5")
"""Models with embeddings of positions, stacked matrices, or weights that are read outside of products."""
SLOW = [name for name in ZOO if name in MORE]


def check(
    build: Callable[[], nn.Module],
    args: Any,
    kwargs: Any,
    tolerance: float,
    targets: tuple[str, ...] = KINDS,
    rows: bool = True,
) -> bool:
    """Compare calls with one adapter, and calls with several, with models into which the adapter is folded.

    Return whether the rows can have several adapters. If `rows`, they must.
    """
    original, mixes = build().eval(), True
    bank = lx.AdapterBank(build().eval(), args=args, kwargs=kwargs, targets=targets, max_rank=4)
    pairs = {name: random_pairs(bank.sites, rank, seed) for seed, (name, rank) in enumerate({"a": 2, "b": 4}.items())}
    models: dict[str | None, nn.Module] = {None: original}
    for name, factors in pairs.items():
        bank.add(name, factors)
        models[name] = folded(build().eval(), factors)
    with torch.no_grad():
        expected = {name: model(*args, **kwargs) for name, model in models.items()}
        for name in pairs:
            assert distance(bank(*args, adapter=name, **kwargs), expected[name]) < tolerance
        count = row_count(leaves(args, kwargs))
        assert count is not None
        mix = [["a", None, "b"][row % 3] for row in range(count)]
        try:
            mixed = bank(*args, adapter=mix, **kwargs)
        except lx.StateError as fault:  # its rows are not on axis 0, or depend on each other
            if fault.code != "rows-not-independent" or rows:
                raise
            mixes = False
        else:
            assert_rows(mixed, mix, expected.__getitem__, tolerance)
        assert distance(bank(*args, adapter=None, **kwargs), expected[None]) < 1e-14
    return mixes


@pytest.mark.parametrize("case", OPERATOR_ROWS, ids=lambda case: case.name)
def test_operators(case: Case) -> None:
    args, kwargs = case.call()
    check(case.model, args, kwargs, max(case.tolerance, 1e-12), rows=False)


def test_a_graph_module() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 1)).double())

    check(build, (torch.randn(4, 3, 6, 6).double(),), {}, 1e-12)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_architectures(name: str) -> None:
    entry = ZOO[name]
    args, kwargs = entry.inputs(False)
    arguments = (lambda: built(entry), args, kwargs, 100 * entry.tolerance)
    if not check(*arguments, rows=name not in NOT_EVERY_KIND):
        # deberta's attention projects positions, too, and mamba reads the weight of dt_proj.
        check(*arguments, targets=("linear",), rows=name not in ("deberta_v2", "mamba"))
