"""Averages of the slow weights over stages, compared with torch's AveragedModel, which averages dense copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import batches, randomize, train
from tests.kit.state import weight_state, weight_states

X = batches(1, 6, 20)[0]
EXACT = {"rtol": 0, "atol": 1e-12}


def wide() -> nn.Module:
    """A model in which `0.weight` can store five experts of rank 1, and `2.weight` becomes dense at the third one."""
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 2, bias=False), nn.Linear(2, 3)).double()


def cascade_of(restart: str = "slow", **options: Any) -> lx.Cascade:
    usual = {"exclude": ("3.weight",), "train": ("3.*",), "rank": 1, "lora_alpha": 1.5, "pace": 0.4, "average": True}
    spec = lx.CascadeSpec(**{**usual, "restart": restart, **options})
    return lx.adapt(wide(), (X,), spec=spec)


def stage(cascade: lx.Cascade, seed: int) -> None:
    """Change the values of all trainable parameters, without ending the stage."""
    randomize(cascade, seed)
    with torch.no_grad():
        cascade.model[3].bias.add_(torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


class Averaged:
    """Return torch's average of the models with the slow weights of each stage."""

    def __init__(self) -> None:
        self.model = wide()
        self.mean = AveragedModel(self.model)

    def take(self, cascade: lx.Cascade) -> None:
        with cascade.weights("slow"):
            self.model.load_state_dict(cascade.model.state_dict())
        self.mean.update_parameters(self.model)

    @property
    def values(self) -> dict[str, torch.Tensor]:
        return dict(self.mean.module.named_parameters())


def assert_averaged(cascade: lx.Cascade, expected: Averaged) -> None:
    with unchanged(cascade), cascade.weights("averaged"):
        for name, value in cascade.model.named_parameters():
            torch.testing.assert_close(value.detach(), expected.values[name].detach(), **EXACT, msg=name)
        torch.testing.assert_close(cascade(X), expected.mean(X), **EXACT)


@pytest.mark.parametrize("slow_train", [True, False])
@pytest.mark.parametrize("restart", ["slow", "fast"])
def test_the_average_is_torchs(restart: str, slow_train: bool, tmp_path: Path) -> None:
    cascade, expected = cascade_of(restart, slow_train=slow_train, noise=lx.Noise(0.1)), Averaged()
    for seed in range(5):
        stage(cascade, seed)
        cascade.transition(None)
        if slow_train:
            expected.take(cascade)
            assert_averaged(cascade, expected)
        if seed == 2:
            lx.save(cascade, tmp_path)
            cascade = lx.load(tmp_path, wide(), (X,))
    assert weight_state(cascade, "0.weight").experts
    assert not weight_state(cascade, "2.weight").experts  # dense by now
    with cascade.weights("slow"):
        slow = {name: value.detach().clone() for name, value in cascade.model.named_parameters()}
    with cascade.weights("averaged"):
        assert all((slow[name] - dict(cascade.model.named_parameters())[name]).abs().max() > 1e-3
                   for name in ("0.weight", "2.weight", "3.bias"))  # fmt: skip


def test_folds_can_choose_it(tmp_path: Path) -> None:
    """A running stage that has trained counts as ended, as in every release."""
    cascade, expected = cascade_of(exclude=("3.weight", "2.weight")), Averaged()
    for seed in range(3):
        stage(cascade, seed)
        cascade.transition(None)
        expected.take(cascade)
    stage(cascade, 7)
    lx.save(cascade, tmp_path / "run")
    twin = copy.deepcopy(cascade)
    twin.transition(None)
    expected.take(twin)
    values = expected.values
    state = cascade.folded_state_dict(view="averaged")
    lx.export.safetensors(cascade, tmp_path / "a.safetensors", view="averaged")
    lx.export.pt2(cascade, tmp_path / "a.pt2", view="averaged")
    lx.export.peft(cascade, tmp_path / "adapter", view="averaged")
    theirs = peft.PeftModel.from_pretrained(wide(), tmp_path / "adapter")
    out = expected.mean(X)
    torch.testing.assert_close(theirs(X), out, **EXACT)
    torch.testing.assert_close(cascade.folded_graph(view="averaged")(X), out, **EXACT)
    torch.testing.assert_close(torch.export.load(tmp_path / "a.pt2").module()(X), out, **EXACT)
    written = load_file(tmp_path / "a.safetensors")
    loaded = lx.load(tmp_path / "run", wide(), (X,)).release(view="averaged").state_dict()
    model = cascade.release(view="averaged")
    for name, value in values.items():
        for folded in (state, written, loaded, dict(model.named_parameters())):
            torch.testing.assert_close(folded[name].detach(), value.detach(), **EXACT, msg=name)


def test_a_rewind_restarts_the_average() -> None:
    cascade, expected = cascade_of(exclude=("3.weight", "2.weight")), Averaged()
    for seed in range(3):
        stage(cascade, seed)
        cascade.transition(None)
        if seed == 0:
            expected.take(cascade)
    cascade.rewind(1, None)
    assert_averaged(cascade, expected)
    for seed in (5, 6):
        stage(cascade, seed)
        cascade.transition(None)
        expected.take(cascade)
    assert_averaged(cascade, expected)


def test_before_a_stage_has_ended_it_is_the_base() -> None:
    cascade = cascade_of()
    stage(cascade, 1)
    with cascade.weights("averaged"):
        for name, value in wide().named_parameters():
            assert torch.equal(dict(cascade.model.named_parameters())[name], value)


def test_no_average_by_default(tmp_path: Path) -> None:
    spec = lx.CascadeSpec(rank=1, lora_alpha=1.5)
    cascade = lx.adapt(wide(), (X,), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    train(cascade, optimizer, [X])
    cascade.transition(optimizer)
    assert all(state.average is None for state in weight_states(cascade).values())
    calls: dict[str, Any] = {
        "weights('averaged')": lambda: cascade.weights("averaged").__enter__(),
        "folded_state_dict": lambda: cascade.folded_state_dict(view="averaged"),
        "folded_graph": lambda: cascade.folded_graph(view="averaged"),
        "release": lambda: cascade.release(view="averaged"),
        "export.safetensors": lambda: lx.export.safetensors(cascade, tmp_path / "a.safetensors", view="averaged"),
        "export.peft": lambda: lx.export.peft(cascade, tmp_path / "a", view="averaged"),
    }
    for call, run in calls.items():
        with unchanged(cascade, optimizer), raises(lx.StateError, "not-available", call):
            run()
    assert not list(tmp_path.iterdir())
    for call in (cascade.release, cascade.folded_state_dict):
        with raises(lx.StateError, "unknown-name", call.__name__, "averaged"):
            call(view="fast")
