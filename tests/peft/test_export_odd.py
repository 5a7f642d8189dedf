"""Export of modules that peft's layers do not support: by parameter, or refused. peft decides which is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import randomize
from tests.peft.models import Gate, gap, normal, seeded, tokens


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att, self.lin = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin(self.att(x, x, x)[0])
        return out


class Outer(nn.Module):
    """A module with a parameter and a linear layer. peft wraps the module because of the parameter."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.rows, self.inner = nn.Parameter(torch.randn(6, 6) / 3), inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(F.linear(x, self.rows))
        return out


class Positions(nn.Embedding):
    """An embedding that shifts its indices, like OPT's positions."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.cumsum(1))


class Scaled(nn.Embedding):
    """An embedding that scales its output, like Gemma's."""

    embed_scale = 2.5

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


class Looks(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.lin = table, nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin(self.table(ids))
        return out


def images() -> tuple[torch.Tensor]:
    return (normal(3, 4, 6),)


def words() -> tuple[torch.Tensor]:
    return (tokens(3, 4, high=5),)


def normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3))


def wide() -> Conv1D:
    found = Conv1D(7, 6)
    nn.init.normal_(found.weight)
    return found


Build = Callable[[], nn.Module]
# fmt: off
CASES: dict[str, tuple[Build, Callable[[], Any], dict[str, Any], list[str]]] = {
    "packed projection": (Attention, images, {"exclude": ("att.out_proj",)}, ["att.in_proj_weight"]),
    "a linear below a parameter": (lambda: nn.Sequential(Outer(nn.Linear(6, 6)), nn.Linear(6, 3)), images,
        {"train": ("1.bias",)}, ["0.rows"]),
    "Conv1D, linear": (lambda: nn.Sequential(wide(), nn.Linear(7, 3)), images, {}, []),
    "Conv1D beside a parameter": (lambda: nn.Sequential(wide(), nn.Linear(7, 6), Gate()), images, {},
        ["0.weight", "2.rows"]),
    "weight norm": (normed, images, {}, ["0.weight_v"]),
    "an embedding of its own": (lambda: Looks(Positions(30, 6)), words, {}, ["table.weight"]),
    "a scaled embedding": (lambda: Looks(Scaled(11, 6)), words, {}, []),
    "a bag": (lambda: Looks(nn.EmbeddingBag(11, 6)), words, {}, ["table.weight"]),
    "an encoder that is never fused": (lambda: nn.TransformerEncoderLayer(6, 3, 8, 0.0, batch_first=True), images,
        {"targets": ("linear*",)}, []),
}
# fmt: on


TRACED = ("packed projection", "an encoder that is never fused", "weight norm", "a bag", "parametrized")
"""Cases whose weights symbolic tracing does not see."""
SLOW = pytest.mark.slow


def built(build: Build) -> nn.Module:
    torch.manual_seed(1)
    return build().double().eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # peft's, of a model that has both
@pytest.mark.parametrize("case", [pytest.param(each, marks=SLOW) if each in TRACED[:2] else each for each in CASES])
def test_adapted_modules_and_parameters(case: str, tmp_path: Path) -> None:
    build, inputs, spec, parameters = CASES[case]
    args, frontend = inputs(), "auto" if case in TRACED else "symbolic"
    cascade = lx.adapt(built(build), args, spec=lx.CascadeSpec(rank=2, pace=1.0, **spec), frontend=frontend)
    randomize(cascade)
    lx.export.peft(cascade, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert sorted(config.target_parameters or []) == parameters
    theirs = peft.PeftModel.from_pretrained(built(build), tmp_path).eval()
    with torch.no_grad():
        adapted = seeded(theirs, args)
        base = seeded(built(build), args)
        right = seeded(cascade.release(), args)
    assert gap(adapted, right) < 1e-10
    assert gap(right, base) > 1e-2


ODD: dict[str, tuple[Build, str, str]] = {
    "nested parameters": (
        lambda: nn.Sequential(Outer(Outer(nn.Linear(6, 6)))),
        "0.inner.rows",
        "peft wraps 0 for its own parameters, and then does not find 0.inner in it",
    ),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
        "0.parametrizations.weight.original1",
        "it is a parameter of a ParametrizationList, where peft's target_parameters have no effect",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_adapters_that_peft_could_not_load(case: str, tmp_path: Path) -> None:
    build, name, reason = ODD[case]
    frontend = "auto" if case in TRACED else "symbolic"
    cascade = lx.adapt(built(build), images(), spec=lx.CascadeSpec(rank=2), frontend=frontend)
    modules = dict(cascade.model.named_modules())
    randomize(cascade)
    with raises(lx.export.ExportError, "not-exportable", name, reason):
        lx.export.peft(cascade, tmp_path)
    assert dict(cascade.model.named_modules()) == modules


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")  # peft's, that it cannot merge
def test_a_quantized_base(tmp_path: Path) -> None:
    """A quantized weight cannot store a delta, so the run is exported as an adapter and imported again."""

    def base() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
        quantize_(model, Int8WeightOnlyConfig())
        return model

    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    cascade = lx.adapt(base(), (x,), spec=lx.CascadeSpec(rank=2, pace=1.0))
    for stage in range(2):
        randomize(cascade, seed=stage)
        cascade.transition(None)
    lx.export.peft(cascade, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    again = lx.from_peft(tmp_path, base(), (x,))
    with torch.no_grad():
        assert gap(theirs(x), cascade(x)) < 1e-5
        assert gap(again(x), theirs(x)) < 1e-5
        assert gap(theirs(x), base()(x)) > 0.1
