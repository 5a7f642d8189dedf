"""Compares a small model with an eager twin, under one front end, in fp64.

The oracle is a new twin that runs eagerly. With branches it runs on W + s B A, and autograd differentiates the formula.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.compare import Call, assert_buffers, assert_same, loss_of, quietly, run, seed
from tests.kit.models import branches, delta, randomize
from tests.kit.operators.case import Case

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5, seed=3)


class Pair(NamedTuple):
    output: torch.Tensor
    extra: torch.Tensor | None


@dataclass
class Result:
    logits: torch.Tensor
    hidden: list[torch.Tensor]
    scale: float = 1.0


def check(case: Case, frontend: str, modes: tuple[bool, ...] | None = None) -> lx.Cascade:
    """Compare a case with its twin. Raises AssertionError if they differ, CaptureError if the case is refused."""
    torch._dynamo.reset()
    modes = case.modes if modes is None else modes
    model, twin = case.model(), case.model().requires_grad_(False)
    before, base = (face(model), hooks(model)), state(model)
    model.train(modes[0])
    args, kwargs = case.call()
    fast = torch.backends.mha.get_fastpath_enabled()
    cascade = lx.adapt(model, args, kwargs, spec=SPEC, frontend=frontend)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    untouched(model, base)
    for training in modes:
        same_at_first(case, cascade, twin, training)
        same_as_formula(case, cascade, twin, training)
    covered(case, cascade, model)
    released(case, cascade, twin, base, before)
    torch._dynamo.reset()
    return cascade


def state(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return parameters and buffers by name, each with a copy of its values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (value, value.detach().clone()) for name, value in tensors.items()}


def untouched(model: nn.Module, base: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """`adapt` does not write to the model: the tensors and their values are the same."""
    for name, (current, _) in state(model).items():
        before, value = base[name]
        assert current is before or not isinstance(before, nn.Parameter), f"{name} is another tensor"
        assert torch.equal(current.nan_to_num(), value.nan_to_num()), f"{name} holds other values"


def same_at_first(case: Case, cascade: lx.Cascade, twin: nn.Module, training: bool) -> None:
    """B = 0: outputs and buffers equal the frozen eager model, under the same seed."""
    follow(twin, cascade.model)
    expected = run(twin.train(training), case.call(), fused=False)
    assert_same(run(cascade.train(training), case.call()), expected, case.close)
    assert_buffers(cascade.model, twin, case.close)


def same_as_formula(case: Case, cascade: lx.Cascade, twin: nn.Module, training: bool) -> None:
    """B != 0: outputs and gradients of A and B equal autograd through W + s B A."""
    randomize(cascade, 4, size=0.1)
    follow(twin, cascade.model)
    expected, factors = by_formula(cascade, twin.train(training), case.call())
    output = run(cascade.train(training), case.call(), grad=True)
    assert_same(output, expected, case.tolerance)
    assert_buffers(cascade.model, twin, case.tolerance)
    loss_of(output).backward()
    loss_of(expected).backward()
    for site in cascade.sites:
        branch = cascade.branches[site.key]
        for factor, value in zip((branch.lora_A, branch.lora_B), factors[site.weight], strict=True):
            assert factor.grad is not None, f"no gradient for {site.weight}"
            assert value.grad is not None, f"the formula gives {site.weight} no gradient"
            assert value.grad.any(), f"{site.weight} moves nothing"
            scale = float(value.grad.abs().max())
            worst = float((factor.grad - value.grad).abs().max())
            assert worst <= 100 * case.tolerance * scale, (
                f"gradient of {site.weight} differs by {worst / scale:.1e} of its scale"
            )
    cascade.zero_grad(set_to_none=True)
    with torch.no_grad():
        for branch in cascade.branches.values():
            branch.lora_B.zero_()


def covered(case: Case, cascade: lx.Cascade, model: nn.Module) -> None:
    """Each matrix is once a site, refused or unreached, as the case says."""
    sites = {site.weight: site.kind for site in cascade.sites}
    refused = {refusal.weight: refusal.reason for refusal in cascade.refusals}
    matrices = sorted(name for name, value in model.named_parameters() if value.dim() > 1)
    assert sorted([*sites, *refused, *cascade.unreached]) == matrices
    assert cascade.unreached == case.unreached
    assert sites == dict(case.sites), [str(refusal) for refusal in cascade.refusals]
    assert refused.keys() == case.refused.keys()
    for name, reason in case.refused.items():
        assert refused[name] in (reason if isinstance(reason, tuple) else (reason,)), str(cascade.refusals)
    for name, shape in case.shapes.items():
        assert tuple(branches(cascade)[name].lora_A.shape) == shape


def released(case: Case, cascade: lx.Cascade, twin: nn.Module, base: Any, before: Any) -> None:
    """The release is the user's object with W0 + pace s B A, and computes as a fresh model with those weights."""
    randomize(cascade, 4, size=0.1)
    sites = {site.weight for site in cascade.sites}
    parameters = dict(cascade.model.named_parameters())
    slow = {name: base[name][1] if name in sites else value.detach().clone() for name, value in parameters.items()}
    with torch.no_grad():
        for site in cascade.sites:
            branch = cascade.branches[site.key]
            slow[site.weight] = slow[site.weight] + SPEC.pace * delta(site, branch.lora_A, branch.lora_B)
    model = cascade.model
    assert cascade.release() is model
    model.train(before[0][0][""])
    assert (face(model), hooks(model)) == before
    for name, value in model.named_parameters():
        scale = float(slow[name].abs().max())
        assert float((value.detach() - slow[name]).abs().max()) <= 1e-12 * scale, f"{name} is not folded"
    follow(twin, model)
    for value, (_, _, flag) in zip(
        (parameter for _, parameter in twin.named_parameters(remove_duplicate=False)), before[0][1], strict=True
    ):
        value.requires_grad_(flag)  # torch chooses kernels by it
    training = case.modes[-1]
    expected = run(twin.train(training), case.call(), fused=False)
    assert_same(run(model.train(training), case.call(), fused=False), expected)


def by_formula(cascade: lx.Cascade, twin: nn.Module, call: Call) -> tuple[Any, dict[str, tuple[torch.Tensor, ...]]]:
    """Return the twin's output with W + s B A as weights, and the A and B that get gradients."""
    weights = dict(twin.named_parameters())
    values, factors = {}, {}
    for site in cascade.sites:
        branch = cascade.branches[site.key]
        a, b = (factor.detach().clone().requires_grad_() for factor in (branch.lora_A, branch.lora_B))
        values[site.weight] = weights[site.weight] + delta(site, a, b)
        factors[site.weight] = (a, b)
    seed(6)
    with quietly(), substituted(twin, values):
        return twin(*call[0], **call[1]), factors


@contextlib.contextmanager
def substituted(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace parameters by other tensors in all modules that have them.

    `torch.func.functional_call` does not restore a module that has two names.
    """
    parameters = dict(model.named_parameters())
    swapped = {id(parameters[name]): value for name, value in values.items()}
    entries = [
        (module._parameters, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if id(parameter) in swapped
    ]
    try:
        for holder, leaf, parameter in entries:
            holder[leaf] = swapped[id(parameter)]
        yield
    finally:
        for holder, leaf, parameter in entries:
            holder[leaf] = parameter


def follow(twin: nn.Module, model: nn.Module) -> None:
    """Copy parameters and buffers of the model to the twin."""
    with torch.no_grad():
        for mine, theirs in ((twin.parameters(), model.parameters()), (twin.buffers(), model.buffers())):
            for target, source in zip(mine, theirs, strict=True):
                target.copy_(source)


def face(model: nn.Module) -> Any:
    """Return what release must restore: modes, flags, names and identity."""
    modes = {name: module.training for name, module in model.named_modules()}
    flags = [(name, id(value), value.requires_grad) for name, value in model.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return modes, flags, buffers, list(model.state_dict())


def hooks(model: nn.Module) -> list[tuple[int, ...]]:
    """Return how many hooks each module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [tuple(len(getattr(module, kind)) for kind in kinds) for module in model.modules()]
