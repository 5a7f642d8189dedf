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
from tests.bank.test_bank import distance, folded, random_pairs
from tests.kit.operators import OPERATORS
from tests.kit.operators.case import Case

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

OPERATOR_ROWS = [
    case
    for case in OPERATORS
    if False in case.modes and case.has_graph
    if case.name != "encoder"  # eager mode writes zeros where the input is padding, and its graph does not
]
QUICK = ("resnet18", "gpt2", "llama", "mixtral", "vit_tiny_patch16_224")
MORE = (
    *("swin_tiny_patch4_window7_224", "convnext_atto", "mobilenetv3_small_050", "tv_fcn", "hf_patchtst", "bert", "t5"),
    *("distilbert", "roberta", "albert", "deberta_v2", "mamba", "qwen2", "gemma", "falcon", "opt", "clip"),
)
SLOW = [name for name in ZOO if name in MORE]


def check(
    build: Callable[[], nn.Module], args: Any, kwargs: Any, tolerance: float, frontend: str = "auto", rows: bool = True
) -> lx.AdapterBank:
    """Compare calls with one adapter, and calls with several, with models into which the adapter is folded."""
    original = build().eval()
    bank = lx.AdapterBank(build().eval(), args=args, kwargs=kwargs, targets=KINDS, max_rank=4, frontend=frontend)
    pairs = {name: random_pairs(bank.sites, rank, seed) for seed, (name, rank) in enumerate({"a": 2, "b": 4}.items())}
    models: dict[str | None, nn.Module] = {None: original}
    for name, each in pairs.items():
        bank.add(name, each)
        models[name] = folded(build().eval(), each)
    with torch.no_grad():
        expected = {name: each(*args, **kwargs) for name, each in models.items()}
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
        else:
            for row, name in enumerate(mix):
                assert distance(mixed, expected[name], row, count) < tolerance
        assert distance(bank(*args, adapter=None, **kwargs), expected[None]) < 1e-14
    return bank


@pytest.mark.parametrize("case", OPERATOR_ROWS, ids=[case.name for case in OPERATOR_ROWS])
def test_operators(case: Case) -> None:
    args, kwargs = case.call()
    check(case.model, args, kwargs, max(case.tolerance, 1e-12), rows=False)


def test_front_ends() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()

    bank = check(build, (torch.randn(4, 6).double(),), {}, 1e-12)
    assert [site.weight for site in bank.sites] == ["0.weight", "2.weight"]


def test_a_graph_module() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 1)).double())

    check(build, (torch.randn(4, 3, 6, 6).double(),), {}, 1e-12)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_architectures(name: str) -> None:
    entry = ZOO[name]
    args, kwargs = entry.inputs(False)
    check(lambda: built(entry), args, kwargs, 100 * entry.tolerance)
