"""`CascadeSpec.untie` replaces a tied parameter by separate ones. They are adapted separately, and stay untied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.graph import named_weights
from tests.kit.errors import raises
from tests.kit.models import Tied, branches, build, factors, optimizer_of, randomize, train

IDS = torch.tensor([[1, 4, 8, 2], [2, 3, 1, 0]])
OPTIONS: dict[str, Any] = {"rank": 2, "lora_alpha": 3.0, "pace": 0.4}
UNTIED = lx.CascadeSpec(untie=("head.weight",), **OPTIONS)
FRONTENDS = pytest.mark.parametrize("frontend", ["export", "eager"])


class Three(Tied):
    """The embedding is tied to two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 9)
        self.other.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.mix(self.table(ids)))
        return self.head(hidden) * self.other(hidden)


def by_formula(cascade: lx.Cascade, share: float = 1.0) -> dict[str, torch.Tensor]:
    """Return W0 + share * s B A for each site, in the first stage."""
    parameters = dict(cascade.model.named_parameters())
    return {
        name: parameters[name].detach() + share * 1.5 * (branch.lora_B @ branch.lora_A).detach()
        for name, branch in branches(cascade).items()
    }


def apart(kind: type[nn.Module], values: dict[str, torch.Tensor]) -> nn.Module:
    """Return a model without ties that has these values, by name."""
    model = build(kind)
    for name, value in values.items():
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, nn.Parameter(value.clone()))
    return model


def moved(cascade: lx.Cascade, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    train(cascade, optimizer, [IDS] * steps)


@FRONTENDS
def test_untied_parameters_train_separately_and_stay_untied(frontend: str) -> None:
    model = build(Tied)
    base, names = model.table.weight.detach().clone(), list(model.state_dict())
    output = model(IDS).detach()
    cascade = lx.adapt(model, (IDS,), spec=UNTIED, frontend=frontend)
    assert {site.weight: (site.kind, site.aliases) for site in cascade.sites} == {
        "table.weight": ("embedding", ()),
        "mix.weight": ("linear", ()),
        "head.weight": ("linear", ()),
    }
    assert model.head.weight is not model.table.weight
    assert torch.equal(model.head.weight, model.table.weight)
    assert torch.equal(cascade(IDS), output)

    moved(cascade, optimizer_of(cascade))
    fast = by_formula(cascade)
    torch.testing.assert_close(cascade(IDS), apart(Tied, fast)(IDS), rtol=0, atol=1e-12)
    assert (fast["head.weight"] - fast["table.weight"]).abs().max() > 1e-3
    assert all((fast[name] - base).abs().max() > 1e-3 for name in ("head.weight", "table.weight"))

    slow = by_formula(cascade, share=0.4)
    state = cascade.folded_state_dict()
    released = cascade.release()
    assert released is model
    assert list(released.state_dict()) == list(state) == names
    assert released.head.weight is not released.table.weight
    for name, value in slow.items():
        torch.testing.assert_close(released.get_parameter(name).detach(), value, rtol=0, atol=1e-14)
        assert torch.equal(state[name], released.get_parameter(name))
    torch.testing.assert_close(released(IDS), apart(Tied, slow)(IDS), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("untie", "groups"),
    [
        (("other.weight",), [("table", "head"), ("other",)]),
        (("head", "other"), [("table",), ("head",), ("other",)]),
        (("table.weight",), [("table",), ("head", "other")]),
        (("*.weight",), [("table",), ("head",), ("other",)]),
    ],
)
def test_places_without_a_matching_pattern_stay_tied(untie: tuple[str, ...], groups: list[tuple[str, ...]]) -> None:
    model = build(Three)
    shared = model.table.weight
    cascade = lx.adapt(model, (IDS,), spec=lx.CascadeSpec(untie=untie, **OPTIONS))
    tied = {site.weight: {site.weight, *site.aliases} for site in cascade.sites if site.weight != "mix.weight"}
    assert sorted(map(sorted, tied.values())) == sorted(sorted(f"{name}.weight" for name in group) for group in groups)
    for group in groups:
        assert len({id(model.get_submodule(name).weight) for name in group}) == 1
    assert model.table.weight is shared
    randomize(cascade)
    fast = by_formula(cascade)
    each_name = {name: fast[weight] for weight, names in tied.items() for name in names} | {
        "mix.weight": fast["mix.weight"]
    }
    torch.testing.assert_close(cascade(IDS), apart(Three, each_name)(IDS), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "untie", "error", "sentence"),
    [
        (Tied, "haed.weight", lx.UnknownTarget, ("unknown-target", "haed.weight", "head.weight")),
        (Tied, "mix.weight", lx.SpecError, ("unknown-target", "mix.weight", "table.weight=head.weight")),
    ],
)
def test_patterns_that_match_no_tied_parameter(kind: Any, untie: str, error: Any, sentence: tuple[str, ...]) -> None:
    model = build(kind)
    before = named_weights(model).names
    with raises(error, *sentence):
        lx.adapt(model, (IDS,), spec=lx.CascadeSpec(untie=("head.weight", untie)))
    assert named_weights(model).names == before


@pytest.mark.parametrize("tied", [True, False])
@FRONTENDS
def test_a_checkpoint_goes_on(frontend: str, tied: bool, tmp_path: Path) -> None:
    """The model into which it is loaded may be tied, like a new one, or already untied."""
    cascade = lx.adapt(build(Tied), (IDS,), spec=UNTIED, frontend=frontend)
    optimizer = optimizer_of(cascade)
    moved(cascade, optimizer)
    cascade.transition(optimizer)
    moved(cascade, optimizer)
    lx.save(cascade, tmp_path / "run", optimizer=optimizer)

    model = build(Tied)
    if not tied:
        model.head.weight = nn.Parameter(model.table.weight.detach().clone())
    again = lx.load(tmp_path / "run", model, (IDS,))
    theirs = optimizer_of(again)
    again.resume(theirs)
    assert again.plan == cascade.plan
    assert again.plan.spec.untie == ("head.weight",)
    assert model.head.weight is not model.table.weight
    assert torch.equal(again(IDS), cascade(IDS))
    for run, stepper in ((cascade, optimizer), (again, theirs)):
        moved(run, stepper)
        run.transition(stepper)
        moved(run, stepper)
    torch.testing.assert_close(again(IDS), cascade(IDS), rtol=0, atol=1e-12)
    for name, value in factors(cascade).items():
        torch.testing.assert_close(factors(again)[name], value, rtol=0, atol=1e-12)
