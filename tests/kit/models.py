"""Small models in fp64 without square weights, and the steps that every trajectory test repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from tests.kit import oracle
from tests.kit.compare import seed, tensors

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.05),
    "sgd": partial(torch.optim.SGD, lr=5e-2, momentum=0.9),
}

PLAIN = {"rank": 3, "lora_alpha": 4.5, "pace": 1.0}
"""Keywords of a spec that is plain LoRA; its scale is SCALE."""
SCALE = 1.5


def mlp() -> nn.Module:
    """Three linears, [7, 5], [6, 7] and [2, 6], the second without bias."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.GELU(), nn.Linear(6, 2)).double()


class TwoLayers(nn.Module):
    """[7, 5] and [3, 7]; a subclass computes between them, or replaces forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.between(torch.tanh(self.body(x))))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Tied(nn.Module):
    """An embedding, a linear layer, and a head that is tied to the embedding, as in language models."""

    def __init__(self, words: int = 9, width: int = 4) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(words, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.mix(self.table(ids)))
        return self.head(hidden)  # type: ignore[no-any-return]


class Breaking(nn.Module):
    """The values decide, which no whole graph can hold."""

    def __init__(self, inputs: int = 5, outputs: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x if x.sum().item() > 0 else -x)
        return y


def build(make: Callable[[], nn.Module]) -> Any:
    """A model in fp64, the same each time."""
    torch.manual_seed(3)
    return make().double()


def seeded(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, with all generators where they were for any other."""
    seed(7)
    return call(*args, **kwargs)


def batches(count: int, *shape: int, seed: int = 2) -> list[torch.Tensor]:
    """Inputs [*shape], the same for the same seed."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=source, dtype=torch.float64) for _ in range(count)]


def loss_of(output: Any) -> torch.Tensor:
    """A loss with a gradient at every output, in which outputs of one batch differ."""
    value = output if isinstance(output, torch.Tensor) else output[0]
    target = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    return (value - target).square().mean()


def train(model: Callable[..., Any], optimizer: torch.optim.Optimizer, calls: Iterable[Any]) -> torch.Tensor:
    """One step per call (positional inputs, or a dictionary of keywords); returns the losses."""
    losses = []
    for call in calls:
        loss = loss_of(model(**call) if isinstance(call, dict) else model(call))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def optimizer_of(cascade: lx.Cascade, name: str = "adamw") -> torch.optim.Optimizer:
    """One of OPTIMIZERS over the groups that the cascade offers."""
    make: Any = OPTIMIZERS[name]
    return make(cascade.param_groups(**make.keywords))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def branches(cascade: lx.Cascade) -> dict[str, Any]:
    """The branches by the names of their weights, in the order of the sites."""
    return {site.weight: cascade.branches[site.key] for site in cascade.sites}


def factors(cascade: lx.Cascade) -> dict[str, torch.Tensor]:
    """Copies of lora_A by weight name."""
    return {name: branch.lora_A.detach().clone() for name, branch in branches(cascade).items()}


def by_hand(model: nn.Module, cascade: lx.Cascade, **options: Any) -> oracle.Cascade:
    """The reference for an untouched copy of the cascade's model, from the same A."""
    return oracle.Cascade(model, factors(cascade), cascade.sites[0].scale, **options)


def merged(cascade: lx.Cascade, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """W + s B A of each site, for `torch.func.functional_call` on the model or on a twin of it."""
    parameters, values = dict((model or cascade.model).named_parameters()), {}
    for name, branch in branches(cascade).items():
        delta, weight = branch.lora_B @ branch.lora_A, parameters[name]
        values[name] = weight + branch.scale * (delta if len(delta) == len(weight) else delta.t()).view_as(weight)
    return values


def assert_merged(cascade: lx.Cascade, model: nn.Module, *args: Any, every: bool = True, **kwargs: Any) -> Any:
    """Compare output and gradients of the factors with autograd's through W + s B A of an eager twin; return both
    outputs.

    Args:
        every: whether each factor has to have a gradient, or some.
    """
    outputs = (
        seeded(cascade, *args, **kwargs),
        seeded(torch.func.functional_call, model, merged(cascade, model), args, kwargs),
    )
    assert type(outputs[0]) is type(outputs[1])
    output, expected = (next(tensors(value)) for value in outputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    parameters = list(cascade.branches.parameters())
    how = {"allow_unused": not every, "materialize_grads": not every, "retain_graph": True}  # of inputs with a graph
    ours, theirs = (torch.autograd.grad(loss_of(value), parameters, **how) for value in (output, expected))
    assert (all if every else any)(gradient.any() for gradient in theirs)
    for gradient, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-12)
    return outputs


def delta(site: lx.Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return s B A in the weight's shape and layout; of each expert.

    The scale is computed from the plan's rank and alpha, not read from the branch.
    """
    product = b @ a * (site.options.lora_alpha / site.rank ** (0.5 if site.options.use_rslora else 1))
    return (product if site.layout == "out_in" else product.mT).reshape(site.shape)


def lora_of(cascade: lx.Cascade, model: nn.Module, targets: Iterable[str], **config: Any) -> Any:
    """peft's LoRA of the same rank and alpha on a model, with the A that the branches have now."""
    import peft

    spec = cascade.plan.spec
    same = {"r": spec.rank, "lora_alpha": spec.lora_alpha, "lora_dropout": 0.0, "target_modules": list(targets)}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**{**same, **config}))
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(cascade.sites)
    take_start(cascade, theirs.base_model.model)
    return theirs


@torch.no_grad()
def take_start(cascade: lx.Cascade, theirs: nn.Module) -> None:
    """Give the layers of peft in a model the A that the branches have now."""
    for name, branch in branches(cascade).items():
        factor = theirs.get_submodule(name.removesuffix(".weight")).lora_A["default"].weight
        factor.copy_(branch.lora_A.view_as(factor))


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def randomize(cascade: lx.Cascade, seed: int = 5, size: float = 0.3) -> None:
    """Give every lora_B values, as training would."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for branch in branches(cascade).values():
            draw = torch.randn(branch.lora_B.shape, generator=source, dtype=torch.float64)
            branch.lora_B.copy_(draw * size)
