"""Helpers for tests of passes: insert branches, fill and run them, compare outputs, and snapshot a graph module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lorasc_fx import CascadeSpec, Site
from lorasc_fx.graph import named_weights, record_of
from lorasc_fx.graph.matching import uses_in
from lorasc_fx.graph.weights import owner_of
from lorasc_fx.passes import InsertBranches, MatchSites, Pipeline
from tests.errors.state import assert_same, of_model
from tests.kit.compare import loss_of
from tests.kit.models import delta
from tests.kit.state import branches_of
from tests.passes.cases import Case

# fp64 sums of at most a few hundred terms of size one, through at most nine layers.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
# One product and one sum in another order.
NEAR = {"rtol": 1e-14, "atol": 1e-15}


def insert(graph_module: fx.GraphModule, spec: CascadeSpec) -> fx.GraphModule:
    """Run MatchSites and InsertBranches."""
    result = Pipeline([MatchSites(spec), InsertBranches()])(graph_module)
    assert result.modified
    return result.graph_module


def sites_of(graph_module: fx.GraphModule) -> dict[str, Site]:
    """The planned sites by weight name."""
    plan = record_of(graph_module).plan
    return dict(plan.by_weight)


def fill(graph_module: fx.GraphModule, seed: int = 1) -> fx.GraphModule:
    """Set the parameters of every branch to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for branch in branches_of(graph_module).values():
            for factor in branch.parameters():
                factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) * 0.3)
    return graph_module


def deltas(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """By weight name `s * (B @ A)` in the shape of W, with s from the plan and the formula, not from the branch."""
    branches = branches_of(graph_module)
    return {
        weight: delta(site, branches[weight].lora_A.detach(), branches[weight].lora_B.detach())
        for weight, site in sites_of(graph_module).items()
    }


def run_eager(case: Case, added: Mapping[str, Tensor]) -> Any:
    """Run the eager model with `W + added` instead of W."""
    model = copy.deepcopy(case.model)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in added.items():
            weights[name].add_(value)
    return run(model, case)


def run(module: nn.Module, case: Case) -> Any:
    """The module's output."""
    with torch.no_grad():
        return module(*case.args)


def run_in_training(module: nn.Module, case: Case, trained: Callable[[str], bool] = lambda name: True) -> Any:
    """Return the detached output of a call in which the parameters that `trained` accepts need gradients.

    torch chooses kernels, and so the order of sums, by `requires_grad`: matmul of a three-dimensional input, lstm and
    attention. A graph with branches has a frozen base, so both sides of a comparison have to be called like this.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained(name) and (parameter.is_floating_point() or parameter.is_complex()))
        return pytree.tree_map_only(Tensor, Tensor.detach, module(*case.args))
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def assert_close(got: Any, expected: Any, **tolerance: float) -> None:
    """Equal trees, tensors within a tolerance, and not all zero."""
    torch.testing.assert_close(got, expected, **(tolerance or CLOSE))
    assert any(bool(leaf.any()) for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor))


def assert_gradients(inserted: fx.GraphModule, case: Case) -> None:
    """The gradients of factors and inputs equal the gradients of the eager model with `W + s B A` instead of W."""
    mine, theirs = case.args, case.args
    floating = [index for index, value in enumerate(mine) if value.is_floating_point()]
    for index in floating:
        mine[index].requires_grad_()
        theirs[index].requires_grad_()
    loss_of(inserted(*mine)).backward()
    branches, sites = branches_of(inserted), sites_of(inserted)
    a = {weight: branch.lora_A.detach().clone().requires_grad_() for weight, branch in branches.items()}
    b = {weight: branch.lora_B.detach().clone().requires_grad_() for weight, branch in branches.items()}
    model = copy.deepcopy(case.model)
    weights = dict(model.named_parameters())
    changed = {weight: weights[weight].detach() + delta(site, a[weight], b[weight]) for weight, site in sites.items()}
    loss_of(functional_call(model, changed, theirs, tie_weights=True)).backward()
    for weight, branch in branches.items():
        assert_close(branch.lora_A.grad, a[weight].grad)
        assert_close(branch.lora_B.grad, b[weight].grad)
    for index in floating:
        assert_close(mine[index].grad, theirs[index].grad)


def assert_differ(got: Any, expected: Any) -> None:
    """The outputs differ by far more than the tolerances, so that the test would detect a missing branch."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True)
    assert any(bool((a - b).abs().max() > 1e-3) for a, b in pairs if isinstance(a, Tensor))


def same_bits(got: Any, expected: Any) -> bool:
    """Whether two trees hold the same types, shapes and bits: -0.0 is not 0.0, and nan is nan."""
    got_leaves, got_tree = pytree.tree_flatten(got)
    expected_leaves, expected_tree = pytree.tree_flatten(expected)
    return got_tree == expected_tree and all(_same(a, b) for a, b in zip(got_leaves, expected_leaves, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.detach().contiguous().numpy().tobytes() == b.detach().contiguous().numpy().tobytes()


def weights_of(graph_module: fx.GraphModule) -> dict[str, nn.Parameter]:
    """The parameters of the owner by name."""
    return named_weights(owner_of(graph_module, record_of(graph_module))).parameters


def uses_of(graph_module: fx.GraphModule) -> dict[str, tuple[tuple[str, str], ...]]:
    """By weight, the (node, form) of each use."""
    uses: dict[str, tuple[tuple[str, str], ...]] = {}
    for node, use in uses_in(graph_module, record_of(graph_module)).items():
        uses[use.weight] = (*uses.get(use.weight, ()), (node.name, use.form))
    return uses


class Snapshot:
    """A snapshot of everything in a graph module that a pass could change, including object identities."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.module, self.before = graph_module, of_model(graph_module)

    def assert_unchanged(self, but: str = "\0") -> None:
        """Assert that nodes, objects and values are unchanged. Parameters that start with `but` may have new values."""
        before, after = ({**state} for state in (self.before, of_model(self.module)))
        for state in (before, after):
            for key in [key for key in state if key.startswith(f"parameter {but}")]:
                identity, _, flag, _ = state[key]
                state[key] = identity, flag
        assert_same(after, before)
