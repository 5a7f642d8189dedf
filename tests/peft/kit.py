"""What every comparison repeats: peft's adapter on a copy, its weights by formula, and the check that ours is right.

The formula is `W + s B A` in fp64, put into the plain eager model by torch.func; neither package computes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import nn

import lorasc_fx as lx
from tests.kit import oracle
from tests.kit.models import branches, loss_of, randomize

RANK, ALPHA, SCALE = 4, 6.0, 1.5

EXACT = 1e-14
"""fp64 sums of fewer than 100 products, summed in another order: outputs of size 5 have a last bit of 9e-16."""

TRAINED = 1e-13
"""The same after four optimizer steps, each of which carries the difference on."""


@dataclass(frozen=True)
class Case:
    """A model, its inputs, the modules or weights that both packages are given, and the weights that these mean."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    targets: tuple[str, ...]
    weights: tuple[str, ...]

    def model(self) -> nn.Module:
        """The model in fp64, the same for every call."""
        torch.manual_seed(1)
        return self.build().double()


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    """Inputs in fp64, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: Callable[..., Any], args: Sequence[Any]) -> torch.Tensor:
    """Call with the same dropout masks each time; of transformers' outputs the logits."""
    torch.manual_seed(7)
    output = model(*args)
    return getattr(output, "logits", output)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two outputs of one shape."""
    assert one.shape == other.shape
    return (one.double() - other.double()).abs().max().item()


# ---- peft


def config_of(targets: Sequence[str] | str, **more: Any) -> peft.LoraConfig:
    modules = targets if isinstance(targets, str) else list(targets)
    return peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "lora_dropout": 0.0, **more})


def peft_of(model: nn.Module, targets: Sequence[str] | str, **more: Any) -> peft.PeftModel:
    """Return peft's adapter on a copy of the model, in its mode, with values in the factors that start at 0."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(model), config_of(targets, **more)).train(model.training)
    source = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in factors_of(theirs):
            if not parameter.any():
                drawn = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                parameter.copy_(drawn * 0.3)
    return theirs


def factors_of(theirs: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapter's factors, by names without the wrappers'."""
    held = [(name, parameter) for name, parameter in theirs.named_parameters() if "lora_" in name]
    return [(name.removeprefix("base_model.model.").replace(".base_layer", ""), value) for name, value in held]


def without_gradient(theirs: nn.Module, args: Sequence[Any]) -> set[str]:
    """Run one backward, and return the adapted modules of which no factor has a gradient."""
    loss = loss_of(seeded(theirs, args))
    if loss.requires_grad:
        loss.backward()
    held = factors_of(theirs)
    alive = {name.split(".lora_")[0] for name, value in held if value.grad is not None and value.grad.any()}
    return {name.split(".lora_")[0] for name, _ in held} - alive


def formula_of(theirs: peft.PeftModel, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return `W + s B A` for all that peft has adapted, by the weight's name in the model."""
    weights = {}
    for path, module in list(theirs.base_model.model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        name = path.replace(".base_layer", "")
        last = "in_proj_weight" if isinstance(module, MultiheadAttention) else "weight"
        name = f"{name}.{module.parameter_name if isinstance(module, ParamWrapper) else last}"
        base = model.get_parameter(name).detach()
        if module.lora_embedding_A:
            delta = (module.lora_embedding_B["default"] @ module.lora_embedding_A["default"]).t()
        else:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            if base.dim() == 3 and isinstance(module, ParamWrapper):  # peft keeps the pairs of all experts in one
                a, b = a.view(len(base), RANK, -1), b.view(-1, RANK, len(base)).permute(2, 0, 1)
            else:
                a, b = a.flatten(1), b.flatten(1)
            delta = b @ a
        weights[name] = (base + SCALE * delta.view_as(base)).detach()
    return weights


def eager(model: nn.Module, weights: dict[str, torch.Tensor], args: Sequence[Any]) -> torch.Tensor:
    """The plain model with these weights in place of its own."""
    with torch.no_grad():
        return seeded(lambda *given: torch.func.functional_call(copy.deepcopy(model), weights, given), args)


# ---- ours


def ours_of(model: nn.Module, args: Sequence[Any], targets: Iterable[str], frontend: str = "auto") -> lx.Cascade:
    """Return the cascade of a copy of the model, as peft's adapter: same targets, rank and alpha, B not 0."""
    spec = lx.CascadeSpec(targets=tuple(targets), rank=RANK, lora_alpha=ALPHA, pace=1.0)
    cascade = lx.adapt(copy.deepcopy(model), tuple(args), spec=spec, frontend=frontend)
    randomize(cascade)
    return cascade


def pairs_of(cascade: lx.Cascade) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors (b, a) by weight name, with `b @ a` as the weight is stored: [in, out] has the pair transposed."""
    pairs = {}
    for site in cascade.sites:
        branch = branches(cascade)[site.weight]
        a, b = branch.lora_A.detach(), branch.lora_B.detach()
        pairs[site.weight] = (a.mT, b.mT) if site.layout == "in_out" else (b, a)
    return pairs


def by_formula(model: nn.Module, cascade: lx.Cascade) -> oracle.Cascade:
    """Return the reference, `model(W + s B A)` differentiated as it stands, with copies of the cascade's factors."""
    pairs = pairs_of(cascade)
    reference = oracle.Cascade(model, {name: a for name, (_, a) in pairs.items()}, SCALE)
    for name, (b, _) in pairs.items():
        reference.branches[name].b = b.clone().requires_grad_()
    return reference


def assert_ours_is_right(case: Case, frontend: str = "auto") -> None:
    """Train two steps in each mode beside the formula; then compare the cascade in both modes, and what it releases.

    Losses, every factor, outputs, the released weights; all else in the model stays bit for bit.
    """
    model, args = case.model(), case.inputs()
    cascade = ours_of(model, args, case.targets, frontend)
    assert tuple(site.weight for site in cascade.sites) == case.weights
    reference = by_formula(model, cascade)
    optimizers = [torch.optim.SGD(cascade.param_groups(lr=0.05)), torch.optim.SGD(reference.parameters(), lr=0.05)]
    for mode in (True, True, False, False):
        cascade.train(mode)
        reference.model.train(mode)
        losses = [loss_of(seeded(each, args)) for each in (cascade, reference)]
        torch.testing.assert_close(*losses, rtol=0, atol=TRAINED)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, pair in pairs_of(cascade).items():
            expected = (reference.branches[name].b.detach(), reference.branches[name].a.detach())
            torch.testing.assert_close(pair, expected, rtol=0, atol=TRAINED, msg=name)

    outputs = {}
    for mode in (True, False):
        cascade.train(mode)
        reference.model.train(mode)
        start = buffers_of(reference.model)  # a batch norm in train mode moves on
        for name, buffer in buffers_of(cascade.model).items():
            torch.testing.assert_close(buffer, start[name], rtol=0, atol=TRAINED, msg=name)
        with torch.no_grad():
            plain = seeded(copy.deepcopy(reference.model), args)
            outputs[mode] = start, seeded(reference, args)
            torch.testing.assert_close(seeded(cascade, args), outputs[mode][1], rtol=0, atol=TRAINED)
        assert gap(outputs[mode][1], plain) > 1e-2  # the branches say something

    released = cascade.release()
    assert type(released) is type(model)
    before, values = model.state_dict(), reference.weights("fast")
    assert released.state_dict().keys() == before.keys()
    for name, value in dict(released.named_parameters()).items():
        if name in values:
            torch.testing.assert_close(value.detach(), values[name], rtol=0, atol=TRAINED, msg=name)
            assert gap(value, before[name]) > 1e-2
        else:
            assert torch.equal(value, before[name]), name
    for mode, (start, output) in outputs.items():
        released.load_state_dict(start, strict=False)
        torch.testing.assert_close(seeded(released.train(mode), args), output, rtol=0, atol=TRAINED)


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the model's buffers."""
    return {name: value.clone() for name, value in model.named_buffers()}
