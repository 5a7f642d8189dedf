"""A cascade that is garbage collected without release says what is lost, unless its model is garbage too."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.cascade import guards
from tests.errors.test_warnings import NOISY, QUIET, X, adapted, net, step
from tests.kit.errors import lacking
from tests.kit.models import values

SPECS = {
    "quiet": QUIET,
    "noisy": NOISY,
    "pissa": lx.CascadeSpec(rank=2, start="pissa"),
    "cola": lx.CascadeSpec(rank=2, restart="fast"),
    "dora": lx.CascadeSpec(rank=2, adapter="dora"),
    "head": lx.CascadeSpec(rank=2, targets=("0",), train=("2.*",)),
}
STAYS = {"noisy": ("Sequential keep the noise",), "pissa": ("Sequential lack the initial factors",)}
"""What the warning says about the weights that are left, also for a stage that has not trained."""


@pytest.fixture(autouse=True)
def real_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests do without (tests/conftest.py)."""
    monkeypatch.setattr(guards, "gc", gc)


@contextmanager
def told(*names: str, anywhere: bool = False) -> Iterator[None]:
    """One warning with these names at a line of this file; none where there are no names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert len(caught) == (1 if names else 0), [str(each.message) for each in caught]
    for each in caught:
        assert isinstance(each.message, lx.errors.LorascWarning)
        assert not lacking(each.message, "training-not-kept", names)
        assert anywhere or each.filename == __file__


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("stages", [0, 1])
def test_lost_training_and_noise_are_told(name: str, stages: int, trained: bool) -> None:
    """The weights are not touched, and the model can be adapted again."""
    model = net()
    cascade, optimizer = adapted(SPECS[name], model)
    for _ in range(stages):
        step(cascade, optimizer)
        cascade.transition(optimizer)
    if trained:
        step(cascade, optimizer)
    before = {key: value.clone() for key, value in values(model).items()}
    lost = (f"training of stage {stages + 1} is lost",) if trained else ()
    with told(*lost, *STAYS.get(name, ())):
        del cascade
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())
    assert not model._state_dict_pre_hooks
    lx.adapt(model, (X,), spec=QUIET).release()


KEEPS: dict[str, Callable[[lx.Cascade, Path], Any]] = {
    "save": lx.save,
    "state_dict": lambda cascade, _: cascade.state_dict(),
    "folded_state_dict": lambda cascade, _: cascade.folded_state_dict(),
    "export": lambda cascade, folder: lx.export.safetensors(cascade, folder / f"out{len(list(folder.iterdir()))}"),
}


def copied_inside(cascade: lx.Cascade, _: Path) -> None:
    with cascade.weights("fast"):
        copy.deepcopy(cascade.model)


def saved_inside(cascade: lx.Cascade, _: Path) -> None:
    with cascade.weights("fast"):
        cascade.model.state_dict()


def looked_at(cascade: lx.Cascade, _: Path) -> None:
    with cascade.weights("fast"):
        cascade(X)


@pytest.mark.filterwarnings("ignore:.* only 0.5 of what it has trained is kept")
@pytest.mark.parametrize("keep", [*KEEPS.values(), copied_inside, saved_inside, looked_at])
def test_what_was_kept_is_not_lost(keep: Callable[[lx.Cascade, Path], Any], tmp_path: Path) -> None:
    model = net()
    for later in (False, True):
        cascade, optimizer = adapted(QUIET, model)
        step(cascade, optimizer)
        keep(cascade, tmp_path)
        if later:
            step(cascade, optimizer)
        with told("stage 1") if later or keep is looked_at else told():
            del cascade


def test_a_loaded_run(tmp_path: Path) -> None:
    cascade, optimizer = adapted(QUIET)
    step(cascade, optimizer)
    lx.save(cascade, tmp_path)
    model = net()
    for trains in (False, True):
        loaded = lx.load(tmp_path, model, (X,))
        optimizer = torch.optim.SGD(loaded.param_groups(lr=0.1))
        if trains:
            step(loaded, optimizer)
        with told("stage 1") if trains else told():
            del loaded


def test_what_is_released_or_gone_with_its_model_is_silent() -> None:
    model = net()
    with told():
        cascade, optimizer = adapted(lx.CascadeSpec(rank=2, pace=1.0), model)
        step(cascade, optimizer)
        cascade.release()
        del cascade
    for cyclic in (False, True):
        with told():
            cascade, optimizer = adapted(NOISY)
            step(cascade, optimizer)
            if cyclic:
                cascade.model.owner = [cascade]  # type: ignore[assignment]
            del cascade
    with told():  # the last stage of a loop has ended
        cascade, optimizer = adapted(NOISY, model)
        for _ in cascade.stages(2, optimizer):
            step(cascade, optimizer)
        del cascade, _


def test_a_second_adapt_collects_the_first_cascade() -> None:
    model = net()
    cascade, optimizer = adapted(QUIET, model)
    step(cascade, optimizer)
    cascade.cycle = [cascade]  # type: ignore[assignment]
    del cascade
    with told("stage 1", anywhere=True):
        again, _ = adapted(QUIET, model)
    again.release()


def test_copies() -> None:
    cascade, optimizer = adapted(NOISY)
    step(cascade, optimizer)
    deep, shallow, replica = copy.deepcopy(cascade), copy.copy(cascade), cascade._replicate_for_data_parallel()
    with told():
        del shallow, replica
    twin = deep.model
    with told("stage 1", "keep the noise"):
        del deep
    assert isinstance(twin, nn.Module)
    assert cascade(X).requires_grad
