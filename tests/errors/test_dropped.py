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

import lorasc_fx as lx
from lorasc_fx.cascade import cascade as cascade_module
from tests.errors.test_warnings import NOISY, QUIET, X, adapted, net, step
from tests.kit.errors import lacking
from tests.kit.models import values

SPECS = {
    "quiet": QUIET,
    "noisy": NOISY,
    "pissa": lx.CascadeSpec(rank=2, start="pissa"),
    "head": lx.CascadeSpec(rank=2, targets=("0",), train=("2.*",)),
}
STAYS = {"noisy": ("Sequential keep the noise",), "pissa": ("Sequential lack the initial factors",)}
"""What the warning says about the weights of the model, also for a stage that has not trained."""


@pytest.fixture(autouse=True)
def real_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collect garbage, which tests/conftest.py switches off."""
    monkeypatch.setattr(cascade_module, "gc", gc)


@contextmanager
def warns(*names: str, anywhere: bool = False) -> Iterator[None]:
    """Expect one warning with these names at a line of this file, or none if there are no names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert len(caught) == (1 if names else 0), [str(warning.message) for warning in caught]
    for warning in caught:
        assert isinstance(warning.message, lx.errors.LorascWarning)
        assert not lacking(warning.message, "training-not-kept", names)
        assert anywhere or warning.filename == __file__


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("stages", [0, 1])
def test_lost_training_and_noise(name: str, stages: int, trained: bool) -> None:
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
    with warns(*lost, *STAYS.get(name, ())):
        del cascade
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())
    assert not model._state_dict_pre_hooks
    lx.adapt(model, (X,), spec=QUIET).release()


def copied_inside(cascade: lx.Cascade, _: Path) -> None:
    with cascade.weights("fast"):
        copy.deepcopy(cascade.model)


def saved_inside(cascade: lx.Cascade, _: Path) -> None:
    with cascade.weights("fast"):
        cascade.model.state_dict()


def called_inside(cascade: lx.Cascade, _: Path) -> None:
    """Keeps nothing."""
    with cascade.weights("fast"):
        cascade(X)


def state_dict(cascade: lx.Cascade, _: Path) -> None:
    cascade.state_dict()


def folded(cascade: lx.Cascade, _: Path) -> None:
    cascade.folded_graph((X,))


def folded_state_dict(cascade: lx.Cascade, _: Path) -> None:
    cascade.folded_state_dict()


def exported(cascade: lx.Cascade, folder: Path) -> None:
    lx.export.safetensors(cascade, folder / f"out{len(list(folder.iterdir()))}")


@pytest.mark.filterwarnings("ignore:.* only 0.5 of what it has trained is kept")
@pytest.mark.parametrize(
    "keep",
    [lx.save, state_dict, folded, folded_state_dict, exported, copied_inside, saved_inside, called_inside],
)
def test_what_was_kept_is_not_lost(keep: Callable[[lx.Cascade, Path], Any], tmp_path: Path) -> None:
    model = net()
    for later in (False, True):
        cascade, optimizer = adapted(QUIET, model)
        step(cascade, optimizer)
        keep(cascade, tmp_path)
        if later:
            step(cascade, optimizer)
        with warns("stage 1") if later or keep is called_inside else warns():
            del cascade


def test_what_is_released_or_gone_with_its_model_is_silent() -> None:
    model = net()
    with warns():
        cascade, optimizer = adapted(lx.CascadeSpec(rank=2, pace=1.0), model)
        step(cascade, optimizer)
        cascade.release()
        del cascade
    for cyclic in (False, True):
        with warns():
            cascade, optimizer = adapted(NOISY)
            step(cascade, optimizer)
            if cyclic:
                cascade.model.owner = [cascade]  # type: ignore[assignment]
            del cascade
    with warns():  # the last stage of a loop has ended
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
    with warns("stage 1", anywhere=True):
        again, _ = adapted(QUIET, model)
    again.release()
