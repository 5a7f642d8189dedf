"""A cascade that is garbage collected without release gives the model back, and says what was lost."""

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
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lorasc_fx as lx
from lorasc_fx.cascade import dropped
from tests.errors.test_warnings import NOISY, QUIET, X, adapted, net, step
from tests.kit.errors import lacking
from tests.kit.models import values

SPECS = {
    "quiet": QUIET,
    "noisy": NOISY,
    "noise everywhere": lx.CascadeSpec(rank=2, targets=("0",), noise=lx.Noise(0.1, where="all")),
    "pissa": lx.CascadeSpec(rank=2, start="pissa"),
    "cola": lx.CascadeSpec(rank=2, restart="fast"),
    "head": lx.CascadeSpec(rank=2, targets=("0",), train=("2.*",), noise=lx.Noise(0.1)),
}


def same(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in values(model).items())


@pytest.fixture(autouse=True)
def real_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests do without (tests/conftest.py)."""
    monkeypatch.setattr(dropped, "gc", gc)


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
def test_weights_and_flags_are_as_before_the_stage(name: str, stages: int, trained: bool) -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    flags = {key: value.requires_grad for key, value in model.named_parameters()}
    cascade, optimizer = adapted(SPECS[name], model)
    for _ in range(stages):
        step(cascade, optimizer)
        cascade.transition(optimizer)
    with cascade.weights("slow"):
        expected = values(model)
    if trained:
        step(cascade, optimizer)
    if name == "head":  # what trains in full is the user's own parameter
        expected |= {key: value for key, value in values(model).items() if key.startswith("2.")}
    with told(f"stage {stages + 1}", "lost", "release") if trained else told():
        del cascade
    assert same(model, expected)
    assert flags == {key: value.requires_grad for key, value in model.named_parameters()}
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
        cascade, optimizer = adapted(NOISY, model)
        step(cascade, optimizer)
        keep(cascade, tmp_path)
        if later:
            step(cascade, optimizer)
        with told("stage 1") if later or keep is looked_at else told():
            del cascade


def test_a_loaded_run(tmp_path: Path) -> None:
    cascade, optimizer = adapted(NOISY)
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
        assert same(model, values(net()))


def test_what_is_released_or_gone_with_its_model_is_silent() -> None:
    model = net()
    with told():
        cascade, optimizer = adapted(lx.CascadeSpec(rank=2, pace=1.0), model)
        step(cascade, optimizer)
        cascade.release()
        folded = values(model)
        del cascade
    assert same(model, folded)
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
        folded = values(model)
        del cascade, _
    assert same(model, folded)


def test_what_the_user_has_changed_meanwhile_stays() -> None:
    """A cascade in a reference cycle is collected late."""
    model = net()
    cascade, optimizer = adapted(NOISY, model)
    step(cascade, optimizer)
    cascade.cycle = [cascade]  # type: ignore[assignment]
    del cascade
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(7, 5))
    model.eval()
    model[2].requires_grad_(True)
    with told("0.weight, which was changed from outside", anywhere=True):
        with FakeTensorMode():  # as of a trace, which it waits for
            gc.collect()
        gc.collect()
    assert same(model, {**values(net()), "0.weight": torch.ones(7, 5)})
    assert not model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]


def test_while_a_program_is_traced() -> None:
    """It waits for the end of the trace."""

    def collects(x: torch.Tensor) -> torch.Tensor:
        gc.collect()
        return x * 2

    model = net()
    cascade, optimizer = adapted(NOISY, model)
    step(cascade, optimizer)
    cascade.cycle = [cascade]  # type: ignore[assignment]
    del cascade
    with told("stage 1", anywhere=True):
        traced = make_fx(collects, pre_dispatch=True)(X)  # as torch.export traces
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_function", "output"]
    assert same(model, values(net()))


def test_a_second_adapt_collects_the_first_cascade() -> None:
    model = net()
    before = values(model)
    cascade, _ = adapted(NOISY, model)
    cascade.cycle = [cascade]  # type: ignore[assignment]
    del cascade
    again, _ = adapted(QUIET, model)
    assert same(model, before)
    again.release()


def test_inside_a_backward() -> None:
    """The weights stay until the end of a backward, which has saved them."""
    model = net()
    before, inside = values(model), {}
    cascade, optimizer = adapted(NOISY, model)
    step(cascade, optimizer)
    held, output = [cascade], cascade(X)

    def drop(_: torch.Tensor) -> None:
        held.clear()
        inside.update(values(model))

    output.register_hook(drop)
    del cascade
    with told("stage 1"):
        output.sum().backward()
        assert same(model, before)
    assert not torch.equal(inside["0.weight"], before["0.weight"])


def test_copies() -> None:
    model = net()
    before = values(model)
    cascade, optimizer = adapted(NOISY, model)
    step(cascade, optimizer)
    noisy = values(model)
    deep, shallow, replica = copy.deepcopy(cascade), copy.copy(cascade), cascade._replicate_for_data_parallel()
    with told():
        del shallow, replica
    assert same(model, noisy)
    twin = deep.model
    with told("stage 1"):
        del deep
    assert same(twin, before)
    assert same(model, noisy)
    assert cascade(X).requires_grad


def test_ties_that_were_made() -> None:
    """Parameters that `adapt` has tied are two again."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight.data = model[0].weight.data
    names = list(values(model))
    cascade, _ = adapted(QUIET, model)
    del cascade
    assert list(values(model)) == names
