"""Kinds of graphs of one model, and their lines in docs/passes.md."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.compose.models import traced

X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Make = Callable[[nn.Module], tuple[Any, list[Any]]]
"""Returns a graph module of a model, and the value of each placeholder."""


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double().eval()


def lifted(module: nn.Module) -> tuple[Any, list[Any]]:
    return torch.export.export(module, (X,)).graph_module, [*module.parameters(), X]


def decomposed(module: nn.Module) -> tuple[Any, list[Any]]:
    with warnings.catch_warnings():  # of torch's own use of pytree, in 2.13
        warnings.simplefilter("ignore", FutureWarning)
        return torch.export.export(module, (X,)).run_decompositions().module(check_guards=False), [X]


def functional(module: nn.Module) -> tuple[Any, list[Any]]:
    weights = dict(module.named_parameters())
    traced = make_fx(lambda weights, x: torch.func.functional_call(module, weights, (x,)))(weights, X)
    traced.graph.set_codegen(fx.graph.CodeGen())  # flat inputs
    traced.recompile()
    return traced, [*weights.values(), X]


WITH_NAMES: dict[str, Make] = {
    "torch.fx.symbolic_trace(model)": lambda module: (fx.symbolic_trace(module), [X]),
    "torch.export.export(...).module()": lambda module: (traced(module, "aten", X), [X]),
    "torch.export.export(...).run_decompositions().module()": decomposed,
}
"""Graphs that read the parameters as attributes, under the model's names."""
WITHOUT_NAMES: dict[str, Make] = {
    "ExportedProgram.graph_module": lifted,
    "make_fx(function)(parameters, x)": functional,
    "make_fx(model)(x)": lambda module: (make_fx(module)(X), [X]),
}
"""Graphs that need `weights_as_attributes` first."""


def rows() -> list[str]:
    """Return the lines of the page. Each kind is a test in tests/compose/test_lifted.py."""
    names = {"as they are": WITH_NAMES, "after `weights_as_attributes`": WITHOUT_NAMES}
    return [f"- {when}: {', '.join(f'`{name}`' for name in kinds)}" for when, kinds in names.items()]
