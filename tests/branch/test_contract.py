"""The contract of `lorasc_fx.branch.Branch`: each adapter method with each kind of weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorasc_fx as lx
from lorasc_fx.branch import METHODS, Branch, Declared, LowRankBranch, StartWeight
from lorasc_fx.branch.lora import random_factor
from tests.kit.models import Tied, branches

SEED = 5


class Recurrent(nn.Module):
    """An LSTM. One op reads all its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)[0]
        return output


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(7, 10)


KINDS: dict[str, Any] = {
    "linear": linear,
    "transposed": lambda: (Conv1D(20, 24), torch.randn(7, 24)),  # a weight [in, out], smaller than two experts
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 1)),
        torch.randn(2, 4, 5, 5),
    ),
    "dilated": lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2, padding=2, padding_mode="reflect"), nn.Tanh()),
        torch.randn(2, 4, 5, 5),
    ),
    "upsampling": lambda: (nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.Tanh()), torch.randn(2, 4, 5, 5)),
    "grouped": lambda: (nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Tanh()), torch.randn(2, 4, 9)),
    "embedding": lambda: (Tied(9, 6), torch.randint(0, 9, (3, 4))),
    "recurrent": lambda: (Recurrent(), torch.randn(2, 5, 6)),
}
DENSE = ("linear", "transposed", "conv", "dilated", "grouped")
FITS = {"lokr": (*DENSE, "upsampling"), "dora": DENSE}
ROWS = [(name, kind) for name in METHODS for kind in KINDS if kind in FITS.get(name, KINDS)]


def adapted(name: str, kind: str, **more: Any) -> tuple[nn.Module, lx.Cascade, Tensor]:
    torch.manual_seed(SEED)
    model, x = KINDS[kind]()
    model, x = model.double(), x.double() if x.is_floating_point() else x
    spec = lx.CascadeSpec(**{"adapter": name, "rank": 2} | more)
    return copy.deepcopy(model), lx.adapt(model, (x,), spec=spec), x


def train(cascade: lx.Cascade, scale: float = 0.2) -> None:
    """Change every trained parameter, like an optimizer step."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in cascade.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def merged(model: nn.Module, cascade: lx.Cascade, share: float = 1.0) -> nn.Module:
    """Return the eager model with a share of each delta merged into its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight, branch in branches(cascade).items():
            parameter = model.get_parameter(weight)
            total = branch.dense_delta(parameter)
            if METHODS["dora"] is type(branch):
                inner = (0,) if branch.transposed else tuple(range(1, parameter.dim()))
                norms = torch.linalg.vector_norm(parameter + total, dim=inner, keepdim=True)
                gain = branch.get_parameter("lora_magnitude_vector").view_as(norms) / norms
                total = gain * (parameter + total) - parameter
            parameter.add_(share * total)
    return model


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_stages_follow_the_formula_and_a_resumed_run_has_the_same_bits(name: str, kind: str, tmp_path: Path) -> None:
    """A call computes with W + F_t, and `S_t = S_{t-1} + pace (F_t - S_{t-1})`; saved in stage 2."""
    model, cascade, x = adapted(name, kind, pace=0.5)
    original = copy.deepcopy(model)
    for _ in range(2):
        train(cascade)
        expected = merged(model, cascade)(x)
        torch.testing.assert_close(cascade(x), expected, rtol=1e-11, atol=1e-11)
        with cascade.weights("fast"):
            torch.testing.assert_close(cascade.model(x), expected, rtol=1e-11, atol=1e-11)
        assert not torch.allclose(expected, model(x))
        model = merged(model, cascade, 0.5)
        lx.save(cascade, tmp_path / "run")
        cascade.transition(None)
    loaded = lx.load(tmp_path / "run", original, (x,))
    loaded.transition(None)
    with cascade.weights("slow"):
        torch.testing.assert_close(cascade.model.state_dict(), model.state_dict(), rtol=1e-11, atol=1e-11)
    for run in (cascade, loaded):
        train(run)
    assert torch.equal(cascade(x), loaded(x))
    resumed = loaded.release().state_dict().values()
    assert all(map(torch.equal, cascade.release().state_dict().values(), resumed))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
def test_every_placement_computes_the_same(name: str, placement: Any) -> None:
    if placement not in METHODS[name].placements:
        with pytest.raises(lx.SpecError, match="placement"):
            lx.CascadeSpec(adapter=name, placement=placement)
        return
    model, cascade, x = adapted(name, "linear", placement=placement)
    assert set(cascade.placements.values()) == {placement}
    train(cascade)
    torch.testing.assert_close(cascade(x), merged(model, cascade)(x), rtol=1e-11, atol=1e-11)


def test_vera_shares_its_frozen_pair() -> None:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    cascade = lx.adapt(model, (torch.randn(3, 6),), spec=lx.CascadeSpec(adapter="vera", rank=2))
    adapters: list[Any] = list(branches(cascade).values())
    assert adapters[0].vera_A is adapters[1].vera_A is adapters[2].vera_A
    assert adapters[0].vera_B is adapters[1].vera_B is not adapters[2].vera_B
    assert sum(parameter.numel() for parameter in cascade.branches.parameters()) == 6 + 6 + 4 + 3 * 2


def test_a_registered_class() -> None:
    class Scale(Branch):
        uses_weight = True

        @classmethod
        def table(cls, site: lx.Site) -> dict[str, Declared]:
            return {"change": Declared((1,))}

        def delta(self, weight: Tensor | None = None) -> Tensor:
            assert weight is not None
            return self.get_parameter("change") * weight

    lx.register_branch("scale-test", Scale)
    lx.register_branch("scale-test", Scale)
    model, cascade, x = adapted("scale-test", "linear")
    train(cascade)
    torch.testing.assert_close(cascade(x), merged(model, cascade)(x), rtol=1e-11, atol=1e-11)
    with pytest.raises(lx.SpecError, match="the name 'lora' belongs to the adapter LoraBranch"):
        lx.register_branch("lora", Scale)
    for incomplete in (nn.Linear, LowRankBranch):
        with pytest.raises(lx.SpecError, match="not a complete branch"):
            lx.register_branch("other", incomplete)  # type: ignore[arg-type]
    with pytest.raises(lx.SpecError, match="nearest: 'dora'"):
        lx.CascadeSpec(adapter="doar")


class Pair(LowRankBranch):
    """A correct branch of a user: LoRA with factors under other names."""

    @classmethod
    def table(cls, site: lx.Site) -> dict[str, Declared]:
        a, b = site.factor_shapes
        return {"own_A": Declared(a, random_factor), "own_B": Declared(b)}

    @property
    def down(self) -> Tensor:
        return self.get_parameter("own_A")

    @property
    def up(self) -> Tensor:
        return self.get_parameter("own_B")


class MovesAtTheStart(Pair):
    @property
    def up(self) -> Tensor:
        return self.get_parameter("own_B") + 0.1


class MovesWithA(Pair):
    """Its delta is zero before training, but not while B is zero."""

    @property
    def up(self) -> Tensor:
        moved = self.get_parameter("own_A").mean() - self.get_parameter("own_c")
        return self.get_parameter("own_B") + moved

    @classmethod
    def table(cls, site: lx.Site) -> dict[str, Declared]:
        a, b = site.factor_shapes
        return {"own_A": Declared(a, 1.0), "own_B": Declared(b), "own_c": Declared((1,), 1.0, trained=False)}


class MovesFromItsWeight(Pair):
    """It is correct until `values_from`, in which a method may read the weight."""

    def values_from(self, site: lx.Site, values: Mapping[str, Tensor], weight: StartWeight) -> dict[str, Tensor]:
        return {"own_B": torch.full_like(values["own_B"], float(weight.exact().std()))}


class Narrow(Pair):
    @property
    def up(self) -> Tensor:
        return self.get_parameter("own_B")[:1]


class Undeclared(Pair):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.extra = nn.Parameter(torch.ones(1))


class NothingAtZero(Pair):
    @classmethod
    def table(cls, site: lx.Site) -> dict[str, Declared]:
        return {name: Declared(shape, 1.0) for name, shape in zip(("own_A", "own_B"), site.factor_shapes, strict=True)}


class TakenName(Pair):
    @classmethod
    def table(cls, site: lx.Site) -> dict[str, Declared]:
        return {**super().table(site), "rank": Declared((1,))}


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (
            MovesAtTheStart,
            r"branch of 0\.weight \(adapter='own-MovesAtTheStart', class MovesAtTheStart\) changes the weight before "
            r"training, by up to 0\.\d+\. The delta must be zero while own_B",
        ),
        (MovesWithA, "changes the weight before training, by up to"),
        (MovesFromItsWeight, "changes the weight before training, by up to"),
        (Narrow, r"delta of shape \(\(1, 2\), \(2, 10\)\), but the weight needs \(\(6, 2\), \(2, 10\)\)"),
        (Undeclared, r"has the parameter extra of shape \(1,\), but declares None"),
        (TakenName, "declares a parameter 'rank', but Branch has an attribute of this name"),
        (NothingAtZero, "no trained parameter that starts at zero"),
    ],
)
def test_a_registered_class_that_breaks_the_contract_is_refused(cls: type[Branch], message: str) -> None:
    lx.register_branch(f"own-{cls.__name__}", cls)
    model, x = linear()
    before = copy.deepcopy(model)
    with pytest.raises(lx.SpecError, match=message):
        lx.adapt(model, (x,), spec=lx.CascadeSpec(adapter=f"own-{cls.__name__}", rank=2))
    assert torch.equal(model(x), before(x))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_registered_class_with_every_kind_of_weight(kind: str) -> None:
    lx.register_branch("own-pair", Pair)
    model, cascade, x = adapted("own-pair", kind, pace=1.0)
    with torch.no_grad():
        assert torch.equal(cascade(x), model(x))
    for _ in range(2):
        train(cascade)
        model = merged(model, cascade)
        cascade.transition(None)
    torch.testing.assert_close(cascade.release()(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["lora", "hira"])
def test_an_average_counts_a_stage_that_trained_nothing(name: str) -> None:
    """The first stage has no delta, so the mean over two stages is half of the second."""
    model, cascade, _ = adapted(name, "linear", pace=1.0, average=True)
    with pytest.warns(lx.errors.LorascWarning, match="no branch has moved"):
        cascade.transition(torch.optim.SGD(cascade.param_groups(lr=0.1)))
    train(cascade)
    expected = merged(model, cascade, 0.5)
    cascade.transition(None)
    with cascade.weights("averaged"):
        for weight, value in expected.named_parameters():
            torch.testing.assert_close(cascade.model.get_parameter(weight), value, rtol=1e-12, atol=1e-12)


def test_lora_xs_refuses_a_weight_without_a_decomposition() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(lx.SpecError, match="weight contains inf or nan"):
        lx.adapt(model, (torch.randn(2, 4),), spec=lx.CascadeSpec(adapter="lora-xs", rank=2))
    assert model.weight.requires_grad
