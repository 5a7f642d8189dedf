"""Holds one small model against its own eager twin, under one front end, in fp64.

The oracle is a twin that is built anew and runs eagerly; with branches it runs on W + s B A, a plain formula of A and B
under torch.func.functional_call, and autograd goes through that formula.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.compare import Call, assert_buffers, assert_same, loss_of, quietly, run, seed
from tests.kit.models import branches, delta, randomize
from tests.kit.operators.case import Case

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5, seed=3)


def check(case: Case, frontend: str, modes: tuple[bool, ...] | None = None) -> lx.Cascade:
    """Hold a case against its twin; raises AssertionError for what differs, CaptureError where it is refused."""
    torch._dynamo.reset()
    modes = case.modes if modes is None else modes
    model, twin = case.model(), case.model().requires_grad_(False)
    before, base = face(model), state(model)
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
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (value, value.detach().clone()) for name, value in held.items()}


def untouched(model: nn.Module, base: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Nothing but a call of the cascade writes to the model: same tensors, same values."""
    for name, (now, _) in state(model).items():
        then, value = base[name]
        assert now is then or not isinstance(then, nn.Parameter), f"{name} is another tensor"
        assert torch.equal(now.nan_to_num(), value.nan_to_num()), f"{name} holds other values"


def same_at_first(case: Case, cascade: lx.Cascade, twin: nn.Module, training: bool) -> None:
    """B = 0: outputs and buffers are those of the frozen eager model, under the same seed."""
    follow(twin, cascade.model)
    expected = run(twin.train(training), case.call(), fused=False)
    found = run(cascade.train(training), case.call())
    assert_same(found, expected, case.close)
    assert_buffers(cascade.model, twin, case.close)


def same_as_formula(case: Case, cascade: lx.Cascade, twin: nn.Module, training: bool) -> None:
    """B != 0: outputs are those of W + s B A, and the gradients of A and B those of autograd through the formula."""
    randomize(cascade, 4, size=0.1)
    follow(twin, cascade.model)
    expected, factors = by_formula(cascade, twin.train(training), case.call())
    found = run(cascade.train(training), case.call(), grad=True)
    assert_same(found, expected, case.tolerance)
    assert_buffers(cascade.model, twin, case.tolerance)
    loss_of(found).backward()
    loss_of(expected).backward()
    for site in cascade.sites:
        branch = cascade.branches[site.key]
        for own, value in zip((branch.lora_A, branch.lora_B), factors[site.weight], strict=True):
            assert own.grad is not None, f"no gradient for {site.weight}"
            assert value.grad is not None, f"the formula gives {site.weight} no gradient"
            assert value.grad.any(), f"{site.weight} moves nothing"
            scale = float(value.grad.abs().max())
            worst = float((own.grad - value.grad).abs().max())
            assert worst <= 100 * case.tolerance * scale, (
                f"gradient of {site.weight} differs by {worst / scale:.1e} of its scale"
            )
    cascade.zero_grad(set_to_none=True)
    with torch.no_grad():
        for branch in cascade.branches.values():
            branch.lora_B.zero_()


def covered(case: Case, cascade: lx.Cascade, model: nn.Module) -> None:
    """Sites, refusals and unreached are all matrices, each once; the case's sites are sites, of its kinds."""
    found = {site.weight: site.kind for site in cascade.sites}
    refused = {refusal.weight: refusal.reason for refusal in cascade.refusals}
    told = [*found, *refused, *cascade.unreached]
    assert sorted(told) == sorted(name for name, value in model.named_parameters() if value.dim() > 1)
    assert cascade.unreached == case.unreached
    assert found == dict(case.sites), [str(refusal) for refusal in cascade.refusals]
    assert refused.keys() == case.refused.keys()
    for name, reason in case.refused.items():
        assert refused[name] in (reason if isinstance(reason, tuple) else (reason,)), str(cascade.refusals)
    for name, shape in case.shapes.items():
        assert tuple(branches(cascade)[name].lora_A.shape) == shape


def released(case: Case, cascade: lx.Cascade, twin: nn.Module, base: Any, before: Any) -> None:
    """The release is the user's object with W0 + pace s B A, and computes as a fresh model with those weights."""
    randomize(cascade, 4, size=0.1)
    sites = {site.weight for site in cascade.sites}
    held = dict(cascade.model.named_parameters())
    slow = {name: base[name][1] if name in sites else value.detach().clone() for name, value in held.items()}
    with torch.no_grad():
        for site in cascade.sites:
            branch = cascade.branches[site.key]
            slow[site.weight] = slow[site.weight] + SPEC.pace * delta(site, branch.lora_A, branch.lora_B)
    model = cascade.model
    assert cascade.release() is model
    model.train(before[0][""])
    assert face(model) == before
    for name, value in model.named_parameters():
        scale = float(slow[name].abs().max())
        assert float((value.detach() - slow[name]).abs().max()) <= 1e-12 * scale, f"{name} is not folded"
    follow(twin, model)
    for value, (_, _, flag) in zip(
        (parameter for _, parameter in twin.named_parameters(remove_duplicate=False)), before[1], strict=True
    ):
        value.requires_grad_(flag)  # torch picks kernels by it
    training = case.modes[-1]
    expected = run(twin.train(training), case.call(), fused=False)
    assert_same(run(model.train(training), case.call(), fused=False), expected)


def by_formula(cascade: lx.Cascade, twin: nn.Module, call: Call) -> tuple[Any, dict[str, tuple[torch.Tensor, ...]]]:
    """Return the twin's output with W + s B A as weights, and the A and B that autograd goes back to."""
    held = dict(twin.named_parameters())
    values, factors = {}, {}
    for site in cascade.sites:
        branch = cascade.branches[site.key]
        a, b = (factor.detach().clone().requires_grad_() for factor in (branch.lora_A, branch.lora_B))
        values[site.weight] = held[site.weight] + delta(site, a, b)
        factors[site.weight] = (a, b)
    seed(6)
    with quietly(), substituted(twin, values):
        return twin(*call[0], **call[1]), factors


@contextlib.contextmanager
def substituted(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put other tensors in the place of parameters, at all their places.

    torch.func.functional_call would not do: it leaves them there in a module that has two names.
    """
    parameters = dict(model.named_parameters())
    swapped = {id(parameters[name]): value for name, value in values.items()}
    places = [
        (module._parameters, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if id(parameter) in swapped
    ]
    try:
        for holder, leaf, parameter in places:
            holder[leaf] = swapped[id(parameter)]
        yield
    finally:
        for holder, leaf, parameter in places:
            holder[leaf] = parameter


def follow(twin: nn.Module, model: nn.Module) -> None:
    """Give the twin the model's parameters and buffers."""
    with torch.no_grad():
        for own, theirs in ((twin.parameters(), model.parameters()), (twin.buffers(), model.buffers())):
            for mine, other in zip(own, theirs, strict=True):
                mine.copy_(other)


def face(model: nn.Module) -> Any:
    """Return what release must leave as it was: modes, flags, names, identity, hooks."""
    modes = {name: module.training for name, module in model.named_modules()}
    flags = [(name, id(value), value.requires_grad) for name, value in model.named_parameters(remove_duplicate=False)]
    hooks = [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks))
        for name, module in model.named_modules()
    ]
    return modes, flags, hooks, list(model.state_dict())
