"""Roundings and drift: what many merges leave in a weight, in peft and here.

The exact value is `W0 + sum s B A` in fp64. Both packages sum in fp32 before they round: an entry so near to the
middle between two numbers of the narrow type that fp32 cannot tell is left out (fewer than 1 in 100).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import peft
import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import branches, randomize
from tests.peft.kit import RANK, SCALE, config_of, peft_of

NAMES = ("0.weight", "2.weight")
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 9)).to(dtype)


def inputs(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).to(dtype)


def ours_of(model: nn.Module, rank: int = RANK) -> lx.Cascade:
    spec = lx.CascadeSpec(rank=rank, lora_alpha=SCALE * rank, pace=1.0, targets=("0", "2"))
    return lx.adapt(copy.deepcopy(model), (inputs(model[0].weight.dtype),), spec=spec)


def layers(theirs: peft.PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """peft's own factors (B, A) by weight name."""
    held = {name: theirs.base_model.model.get_submodule(name.removesuffix(".weight")) for name in NAMES}
    return {name: (each.lora_B["default"].weight, each.lora_A["default"].weight) for name, each in held.items()}


def take(adapter: peft.PeftModel | lx.Cascade) -> Pairs:
    """Copies of the factors (B, A) by weight name, in the dtype that the package keeps them in."""
    if isinstance(adapter, lx.Cascade):
        held = {name: (branch.lora_B, branch.lora_A) for name, branch in branches(adapter).items()}
    else:
        held = layers(adapter)
    return {name: (b.detach().clone(), a.detach().clone()) for name, (b, a) in held.items()}


def put(theirs: peft.PeftModel, pairs: Pairs) -> None:
    """Give peft's adapter these factors."""
    with torch.no_grad():
        for name, own in layers(theirs).items():
            for factor, value in zip(own, pairs[name], strict=True):
                factor.copy_(value)


def misrounded(found: nn.Module, start: nn.Module, pairs: list[Pairs]) -> float:
    """Share of entries that are not the exact value, rounded once."""
    wrong = total = 0
    for name in NAMES:
        base = start.get_parameter(name).detach()
        exact, size = base.double(), base.double().abs()
        for b, a in (pair[name] for pair in pairs):
            exact = exact + SCALE * b.double() @ a.double()
            size = size + SCALE * b.double().abs() @ a.double().abs()
        slack = 4 * 2.0**-24 * size
        settled = (exact + slack).to(base.dtype) == (exact - slack).to(base.dtype)
        assert settled.float().mean() > 0.99
        assert (exact.to(base.dtype) != base).float().mean() > 0.5  # there is something to round
        wrong += int((found.get_parameter(name).detach() != exact.to(base.dtype))[settled].sum())
        total += int(settled.sum())
    return wrong / total


NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW)
def test_one_merge(dtype: torch.dtype) -> None:
    """peft's plain merge of fp32 factors rounds once; its safe merge, and factors in the weight's dtype, twice."""
    model = net(dtype)
    plain = peft_of(model, ["0", "2"])
    pairs = take(plain)
    assert pairs["0.weight"][0].dtype == torch.float32
    assert misrounded(copy.deepcopy(plain).merge_and_unload(), model, [pairs]) == 0
    assert misrounded(plain.merge_and_unload(safe_merge=True), model, [pairs]) > 0.05

    torch.manual_seed(3)
    narrow = peft.get_peft_model(copy.deepcopy(model), config_of(["0", "2"]), autocast_adapter_dtype=False)
    put(narrow, pairs)
    rounded = take(narrow)
    assert rounded["0.weight"][0].dtype == dtype
    assert misrounded(narrow.merge_and_unload(), model, [rounded]) > 0.05

    cascade = ours_of(model)
    randomize(cascade)
    pairs = take(cascade)
    assert pairs["0.weight"][0].dtype == torch.float32
    for mode in (True, False):
        cascade.train(mode)
        with cascade.weights("fast"):
            assert misrounded(cascade.model, model, [pairs]) == 0
    assert misrounded(cascade.release(), model, [pairs]) == 0


@pytest.mark.parametrize("dtype", NARROW)
def test_twenty_merges(dtype: torch.dtype) -> None:
    """peft's chain of merge_and_unload and a new adapter rounds at each merge, even where one merge is right."""
    model = net(dtype)
    cascade, chain, pairs = ours_of(model, rank=1), copy.deepcopy(model), []
    for stage in range(20):
        randomize(cascade, seed=stage, size=0.02)
        pairs.append(take(cascade))
        adapter = peft.get_peft_model(chain, peft.LoraConfig(r=1, lora_alpha=SCALE, target_modules=["0", "2"]))
        put(adapter, pairs[-1])
        chain = adapter.merge_and_unload()
        cascade.transition(None)
    assert misrounded(chain, model, pairs) > 0.4
    assert misrounded(cascade.release(), model, pairs) == 0


def drift(found: nn.Module, start: Mapping[str, torch.Tensor]) -> float:
    """Largest difference from the start, in standard deviations of the weight."""
    values = {name: found.get_parameter(name).detach().double() for name in start}
    return max(((values[n] - w.double()).abs().max() / w.double().std()).item() for n, w in start.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merge_and_unmerge(dtype: torch.dtype) -> None:
    """peft subtracts what it added: no weight comes back as it was, and narrow ones walk away with each round."""
    model = net(dtype)
    theirs = peft_of(model, ["0", "2"])
    held = {f"{name.removesuffix('.weight')}.base_layer.weight": model.get_parameter(name).detach() for name in NAMES}
    drifts = []
    for count in (1, 9, 90):
        for _ in range(count):
            theirs.merge_adapter()
            theirs.unmerge_adapter()
        drifts.append(drift(theirs.base_model.model, held))
    assert drifts[0] > 0
    if dtype in NARROW:
        assert drifts[2] > 5 * drifts[1] > 10 * drifts[0]

    x = inputs(dtype)
    cascade = ours_of(model)
    randomize(cascade)
    start = {name: model.get_parameter(name).detach() for name in NAMES}
    outputs = {mode: cascade.train(mode)(x).detach() for mode in (True, False)}
    merged = None
    for _ in range(100):
        with cascade.weights("fast"):
            found = [cascade.model.get_parameter(name).detach().clone() for name in NAMES]
            assert merged is None or all(map(torch.equal, found, merged))
            assert drift(cascade.model, start) > 0.5
            merged = found
        for name, value in start.items():
            assert torch.equal(cascade.model.get_parameter(name), value)
    for mode, output in outputs.items():
        assert torch.equal(cascade.train(mode)(x), output)
    released = cascade.release()
    assert all(map(torch.equal, [released.get_parameter(name) for name in NAMES], merged))
