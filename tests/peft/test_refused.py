"""Export errors: one error names all weights whose change peft's adapters cannot express, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorasc_fx as lx
from lorasc_fx.export import ExportError
from tests.kit.errors import raises
from tests.kit.models import randomize
from tests.peft.adapters import cascade_of
from tests.peft.models import Suffixes, made, normal


class Net(nn.Module):
    """A linear layer and another module."""

    def __init__(
        self, other: nn.Module, call: Callable[[nn.Module, torch.Tensor], Any] = lambda other, x: other(x)
    ) -> None:
        super().__init__()
        self.lin, self.other, self.call = nn.Linear(6, 6), other, call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.other, torch.tanh(self.lin(x)))


class Shared(nn.Module):
    """A model with one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.two(torch.tanh(self.one(x)))
        return out


class Own(nn.Module):
    """A model with a parameter in the top module."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.lin = nn.Parameter(torch.randn(6, 6) / 3), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.lin(x), self.rows)


def encoder(batch_first: bool = True) -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=batch_first)


def attend(other: nn.Module, x: torch.Tensor) -> Any:
    return other(x, x, x)[0]


def image(other: nn.Module, x: torch.Tensor) -> Any:
    return other(x.unflatten(2, (2, 3)))


READ = "reads it without calling the module that holds it, so that an adapter of peft has no effect"
FUSED = "in eval mode, torch's fused TransformerEncoderLayer does not call the modules that peft adapts"
OTHER = (
    r"peft's adapter of this {} does not compute the same as the merged weight "
    r"\(relative error of the change: [\d.e-]+\)"
)

# fmt: off
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "grouped": (lambda: Net(nn.Conv2d(4, 6, 2, groups=2), image),
        {"other.weight": "peft's adapter of a grouped convolution mixes the groups"}),
    "transposed": (lambda: Net(nn.ConvTranspose2d(4, 3, 2), image),
        {"other.weight": "peft adapts no ConvTranspose2d with a weight of 4 axes"}),
    "dilated": (lambda: Net(nn.Conv2d(4, 3, 2, dilation=2, padding="same"), image),
        {"other.weight": OTHER.format("Conv2d")}),
    "padding mode": (lambda: Net(nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), image),
        {"other.weight": OTHER.format("Conv2d")}),
    "attention": (lambda: Net(nn.MultiheadAttention(6, 2), attend),
        {"other.out_proj.weight": f"MultiheadAttention {READ}"}),
    "encoder": (lambda: Net(encoder()), {"other.linear1.weight": FUSED, "other.linear2.weight": FUSED,
        "other.self_attn.in_proj_weight": FUSED, "other.self_attn.out_proj.weight": f"MultiheadAttention {READ}"}),
    "read by another": (lambda: Net(nn.Linear(6, 4), lambda other, x: F.linear(x, other.weight, other.bias)),
        {"other.weight": f"Net {READ}"}),
    "read by another, transposed": (lambda: Net(nn.Linear(6, 4), lambda other, x: x @ other.weight.T),
        {"other.weight": f"Net {READ}"}),
    "called and read": (lambda: Net(nn.Linear(6, 6), lambda other, x: F.linear(other(x), other.weight)),
        {"other.weight": f"Net {READ}"}),
    "recurrent": (lambda: Net(nn.GRU(6, 4, batch_first=True), lambda other, x: other(x)[0]),
        {"other.weight_hh_l0": "it is a parameter of a GRU, where peft's target_parameters have no effect",
        "other.weight_ih_l0": "it is a parameter of a GRU, where peft's target_parameters have no effect"}),
    "shared module": (Shared, {"one.weight": "its module has the paths one and two, and peft adapts only one of them"}),
    "top module": (Own, {"rows": "it is a parameter of the top module, which peft cannot wrap"}),
}
# fmt: on


TRACED = ("attention", "encoder", "recurrent", "transposed")
"""Cases whose weights symbolic tracing does not see."""


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=pytest.mark.slow) if each == "encoder" else each for each in CASES]
)
def test_changes_that_no_adapter_expresses(case: str, tmp_path: Path) -> None:
    build, reasons = CASES[case]
    args = (normal(2, 4, 6),)
    frontend = "auto" if case in TRACED else "symbolic"
    cascade = lx.adapt(made(build), args, spec=lx.CascadeSpec(rank=2), frontend=frontend)
    randomize(cascade)
    with pytest.raises(ExportError) as caught:
        lx.export.peft(cascade, tmp_path / "adapter")
    summary, *lines = str(caught.value).splitlines()
    assert summary.startswith("export.peft: an adapter of peft cannot express the change of these weights; nothing was")
    assert len(lines) == len(reasons), lines
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert re.fullmatch(rf"  {re.escape(name)}: {reason}", line), line
    assert not list(tmp_path.iterdir())
    cascade.transition(None)


def test_kept_noise(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", noise=lx.Noise(0.1, keep=True), targets=("lin",))
    with raises(ExportError, "not-exportable", "lin.weight", "noise.keep"):
        lx.export.peft(cascade, tmp_path)


def test_a_parameter_trained_in_full_in_the_top_module(tmp_path: Path) -> None:
    cascade = lx.adapt(made(Own), (normal(2, 4, 6),), spec=lx.CascadeSpec(targets=("lin",), train=("rows",)))
    randomize(cascade)
    with raises(ExportError, "not-exportable", "\n  rows: "):
        lx.export.peft(cascade, tmp_path)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.lin = nn.Parameter(torch.ones(6)), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin(x) * self.scale
        return out


def test_a_module_that_contains_an_adapted_one(tmp_path: Path) -> None:
    spec = lx.CascadeSpec(train=("other.scale",))
    cascade = lx.adapt(made(lambda: Net(Block())), (normal(2, 4, 6),), spec=spec)
    randomize(cascade)
    with raises(ExportError, "not-exportable", "other.scale", "other.lin"):
        lx.export.peft(cascade, tmp_path)


def test_a_module_whose_path_is_a_suffix_of_an_adapted_one(tmp_path: Path) -> None:
    """peft saves every module with this suffix: 1.lin also matches 11.lin."""
    cascade = lx.adapt(
        made(Suffixes), (normal(3, 4, 6),), spec=lx.CascadeSpec(exclude=("1.lin.weight",), train=("1.lin.bias",))
    )
    randomize(cascade)
    with raises(ExportError, "not-exportable", "1.lin.bias", "1.lin", "11.lin"):
        lx.export.peft(cascade, tmp_path)


def test_a_rank_above_the_largest_uniform_rank(tmp_path: Path) -> None:
    cascade = lx.adapt(
        made(lambda: nn.Sequential(nn.Linear(1100, 1100))), (normal(2, 1100),), spec=lx.CascadeSpec(rank=520)
    )
    randomize(cascade)
    with raises(ExportError, "not-exportable", "0.weight", "520", "512"):
        lx.export.peft(cascade, tmp_path, uniform_rank=True)


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({"view": "base"}, lx.StateError, ("unknown-name", "slow", "fast", "averaged")),
        ({"max_rank": 0}, lx.SpecError, ("invalid-value", "max_rank", "0")),
        ({"dtype": torch.int8}, lx.SpecError, ("invalid-value", "dtype", "torch.int8")),
    ],
)
def test_invalid_arguments(
    given: dict[str, Any], kind: type[lx.LorascError], sentence: tuple[str, ...], tmp_path: Path
) -> None:
    cascade = cascade_of("suffixes", stages=1)
    with raises(kind, *sentence):
        lx.export.peft(cascade, tmp_path, **given)


def test_a_cascade_that_has_not_trained(tmp_path: Path) -> None:
    cascade = lx.adapt(made(Suffixes), (normal(3, 4, 6),), spec=lx.CascadeSpec(rank=2))
    with raises(lx.StateError, "not-available"):
        lx.export.peft(cascade, tmp_path)


def test_folders_with_other_files(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", stages=1)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with raises(ExportError, "path-in-the-way", "file"):
        lx.export.peft(cascade, tmp_path / "file")
    with raises(ExportError, "path-in-the-way", "adapter_config.json"):
        lx.export.peft(cascade, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
