"""Cases in which peft's layers of an adapter method are wrong or missing (docs/peft.md), and the cascade's behavior.

A branch that has trained computes what the plain model computes with its merged weights. Of peft each row says by how
much its adapter differs from its own merge, or the error.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.branch import METHODS
from tests.kit.models import lora_of, loss_of, trainable_parameters
from tests.quantized.layers import LAYERS, is_missing
from tests.quantized.test_quantized import Net, inputs

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 8}),
    "vera": (peft.VeraConfig, {"r": 4}),
    "hira": (peft.HiraConfig, {"r": 4}),
    "shira": (peft.ShiraConfig, {"r": 4}),
    "miss": (peft.MissConfig, {"r": 4}),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 4, "use_cayley_neumann": True}),
    "lokr": (peft.LoKrConfig, {"r": 4, "alpha": 8}),
    "delora": (peft.DeloraConfig, {"r": 4}),
}


def conv(**options: Any) -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(8, 16, 3, **options), torch.randn(2, 8, 9, 9)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(16, 24), torch.randn(5, 16)),
    "conv": functools.partial(conv, padding=1),
    "dilation": functools.partial(conv, dilation=2),
    "reflect": functools.partial(conv, padding=1, padding_mode="reflect"),
    "grouped": functools.partial(conv, groups=4),
    "transposed": lambda: (nn.ConvTranspose2d(8, 16, 3), torch.randn(2, 8, 9, 9)),
    "embedding": lambda: (nn.Embedding(16, 8), torch.randint(16, (3, 4))),
}
NO_CONV = {
    "conv": TypeError,
    "dilation": TypeError,
    "reflect": TypeError,
    "grouped": TypeError,
    "transposed": TypeError,
}
NO_EMBEDDING = {"embedding": TypeError}
WRONG: dict[str, dict[str, Any]] = {
    "lora": {"dilation": RuntimeError, "reflect": 1.0, "grouped": NotImplementedError, "transposed": ValueError},
    "vera": dict.fromkeys([*NO_CONV, *NO_EMBEDDING], ValueError),
    "hira": {"reflect": 0.04, "grouped": NotImplementedError, "transposed": ValueError},
    "shira": NO_CONV | NO_EMBEDDING,
    "miss": NO_CONV | NO_EMBEDDING,
    "oft": {
        "conv": 4.0, "dilation": ValueError, "reflect": 4.0, "grouped": RuntimeError, "transposed": TypeError,
    },
    "lokr": {"reflect": 0.4, "transposed": TypeError, **NO_EMBEDDING},
    "delora": NO_CONV | NO_EMBEDDING,
}  # fmt: skip
"""The minimum difference between peft's adapter and its merge, or peft's error, by method and model."""


def made(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(2)
    module, x = MODELS[case]()
    return nn.Sequential(module).double(), x.double() if x.is_floating_point() else x


def move(model: nn.Module) -> None:
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd", "ignore:Sparse invariant checks")  # of peft, torch
@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_and_its_merge(method: str, case: str) -> None:
    model, x = made(case)
    kinds = {"linear": "linear", "embedding": "embedding"}
    if kinds.get(case, "conv") in METHODS[method].kinds:
        cascade = lx.adapt(copy.deepcopy(model), (x,), spec=lx.CascadeSpec(adapter=method, rank=4))
        move(cascade)
        found = cascade(x)
        assert (found - model(x)).abs().max() > 1e-3
        with cascade.weights("fast"):
            torch.testing.assert_close(found, cascade.model(x), rtol=0, atol=1e-12)

    config, options = CONFIGS[method]
    wrong = WRONG[method].get(case, 0.0)

    def apart() -> float:
        theirs = peft.get_peft_model(model, config(target_modules=["0"], **options)).eval()
        move(theirs)
        with torch.no_grad():
            return float((theirs(x) - theirs.merge_and_unload()(x)).abs().max())

    if isinstance(wrong, float):
        distance = apart()
        assert distance > wrong if wrong else distance < 1e-12
    else:
        with pytest.raises(wrong):
            apart()


ROUNDED_TWICE = {"lora": 0.2, "hira": 0.004, "delora": 0.1}
"""The minimum fraction of the entries of a bf16 weight that peft's `safe_merge=True` rounds differently, by method."""


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("method", CONFIGS)
def test_a_merge_in_bf16_is_rounded_once(method: str) -> None:
    """Compare with the same parameters in fp64. For some methods, peft rounds the delta before adding it."""
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(256, 256, bias=False)).bfloat16(), torch.randn(3, 256).bfloat16()
    cascade = lx.adapt(copy.deepcopy(model), (x,), spec=lx.CascadeSpec(adapter=method, rank=4, pace=1.0))
    move(cascade)
    branch: Any = copy.deepcopy(next(iter(cascade.branches.values()))).double()
    weight = model[0].weight.detach().double()
    exact = weight + branch.dense_delta(weight).detach()
    merged = cascade.release()[0].weight.detach()
    assert float((merged != exact.bfloat16()).double().mean()) < 0.002  # the sum is in fp32

    config, options = CONFIGS[method]
    both = model, copy.deepcopy(model).double()
    theirs = [peft.get_peft_model(each, config(target_modules=["0"], **options)) for each in both]
    move(theirs[0])
    others = {**dict(theirs[0].named_parameters()), **dict(theirs[0].named_buffers())}
    with torch.no_grad():
        for name, value in [*theirs[1].named_parameters(), *theirs[1].named_buffers()]:
            if value.is_floating_point():
                value.data = others[name].double()
    bf16, fp64 = (each.merge_and_unload(safe_merge=True)[0].weight for each in theirs)
    share = float((bf16 != fp64.bfloat16()).double().mean())
    assert share > ROUNDED_TWICE[method] if method in ROUNDED_TWICE else share < 0.002


NEEDS_BITSANDBYTES = pytest.mark.skipif(is_missing("bitsandbytes") != "", reason="bitsandbytes is missing")
CASES = pytest.mark.parametrize("case", [name for name in LAYERS if name.startswith("bitsandbytes")])
SPEC = lx.CascadeSpec(rank=4, lora_alpha=8.0, pace=1.0, targets=("up", "down"))


def net(case: str) -> nn.Module:
    torch.manual_seed(3)
    model = Net().train()
    for name in ("up", "down"):
        setattr(model, name, LAYERS[case](model.get_submodule(name)))  # type: ignore[arg-type]
    flag: Any = "is_loaded_in_8bit" if "int8" in case else "is_loaded_in_4bit"
    setattr(model, flag, True)  # as transformers marks a model; peft asks for it
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = loss_of(model(inputs()))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@NEEDS_BITSANDBYTES
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@CASES
def test_losses_equal_qloras(case: str, tmp_path: Path) -> None:
    cascade = lx.adapt(net(case), (inputs(),), spec=SPEC)
    theirs = lora_of(cascade, net(case), ["up", "down"]).train()
    for site in cascade.sites:
        layer = theirs.get_submodule(f"base_model.model.{site.weight.removesuffix('.weight')}")
        assert type(layer).__module__ == "peft.tuners.lora.bnb"
    ours = torch.optim.AdamW(cascade.param_groups(lr=1e-2, weight_decay=0.0))
    other = torch.optim.AdamW(trainable_parameters(theirs), lr=1e-2, weight_decay=0.0)
    losses = [(step(cascade, ours), step(theirs, other)) for _ in range(10)]
    for mine, its in losses:
        assert mine == pytest.approx(its, rel=1e-6)
    assert losses[-1][0] < losses[0][0]
    lx.export.peft(cascade, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(net(case), tmp_path / "adapter").train()
    torch.testing.assert_close(loaded(inputs()), cascade(inputs()), rtol=0, atol=1e-6)
