"""Each warning is given at the line of the user, once per cascade, and never in a correct program."""

from __future__ import annotations

import copy
import gc
import pickle  # noqa: TID251  # that a watched model pickles is what is tested
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import lacking
from tests.kit.models import Breaking, train
from tests.kit.state import forget_warnings

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
NOISY = lx.CascadeSpec(rank=2, noise=lx.Noise(0.1))
QUIET = lx.CascadeSpec(rank=2)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def adapted(spec: lx.CascadeSpec = QUIET, model: nn.Module | None = None) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    cascade = lx.adapt(model if model is not None else net(), (X,), spec=spec)
    return cascade, torch.optim.SGD(cascade.param_groups(lr=0.1))


def step(cascade: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    train(cascade, optimizer, [X])


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def warns(code: str, *names: str) -> Iterator[None]:
    """One warning of our category, with this code and these names, at a line of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [warning.category for warning in caught] == [lx.errors.LorascWarning]
    warning = caught[0].message
    assert isinstance(warning, lx.errors.LorascWarning)
    assert not lacking(warning, code, names)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("spec", [QUIET, NOISY])
def test_a_program_as_the_documentation_has_it(spec: lx.CascadeSpec, tmp_path: Path) -> None:
    with silent():
        cascade, optimizer = adapted(spec)
        for stage in cascade.stages(2, optimizer):
            step(cascade, optimizer)
            lx.save(cascade, tmp_path, optimizer=optimizer, extra={"stage": stage.index})
            for view in ("slow", "fast"):
                with cascade.weights(view):  # type: ignore[arg-type]
                    cascade.eval()(X)
                    cascade.model(X)
                    cascade.model.state_dict()
                    cascade.train()
            cascade.state_dict()
            cascade.folded_state_dict()
        cascade.model.eval()(X)
        cascade.eval()(X)
        resumed = lx.load(tmp_path, net(), (X,))
        optimizer = torch.optim.SGD(resumed.param_groups(lr=0.1))
        resumed.resume(optimizer)
        for _ in resumed.stages(1, optimizer):
            step(resumed, optimizer)
        model = cascade.release()
        model(X)
        model.state_dict()


def test_a_stage_whose_loop_called_the_model() -> None:
    model = net()
    cascade, optimizer = adapted(lx.CascadeSpec(rank=2, targets=("0",), train=("2.*",)), model)
    with warns("no-branch-moved", "stage 1"):
        for _ in cascade.stages(2, optimizer):
            step(model, optimizer)


def test_a_transition_without_a_step() -> None:
    """A stage without an optimizer was meant to train nothing."""
    cascade, optimizer = adapted()
    with silent():
        cascade.transition(None)
    with warns("no-branch-moved", "stage 2"):
        cascade.transition(optimizer)


OUT: dict[str, Callable[[lx.Cascade, Path], Any]] = {
    "release": lambda cascade, _: cascade.release(),
    "folded_state_dict": lambda cascade, _: cascade.folded_state_dict(),
    "folded_graph": lambda cascade, _: cascade.folded_graph(),
    "export.safetensors": lambda cascade, folder: lx.export.safetensors(
        cascade, folder / f"out {cascade.plan.spec.pace}"
    ),
    "export.peft": lambda cascade, folder: lx.export.peft(cascade, folder / f"out {cascade.plan.spec.pace}"),
}


@pytest.mark.parametrize("call", OUT)
def test_a_first_stage_that_is_folded_without_a_loop_over_stages(call: str, tmp_path: Path) -> None:
    for spec in (QUIET, lx.CascadeSpec(rank=2, pace=1.0)):
        cascade, optimizer = adapted(spec)
        step(cascade, optimizer)
        with warns("running-stage-folded", call, "stage 1", "0.5") if spec is QUIET else silent():
            OUT[call](cascade, tmp_path)


def test_a_loop_that_ends_early_folds_without_a_warning() -> None:
    with silent():
        cascade, optimizer = adapted()
        for _ in cascade.stages(3, optimizer):
            step(cascade, optimizer)
            break
        cascade.release()


def test_evaluation_with_noise() -> None:
    cascade, optimizer = adapted(NOISY)
    for _ in cascade.stages(1, optimizer):
        step(cascade, optimizer)
        with warns("evaluated-with-noise", "stage 1"), torch.no_grad():
            cascade.eval()(X)
        with silent():
            cascade(X)
            cascade.train()
    with silent(), torch.no_grad():
        cascade.eval()(X)


def test_training_in_eval_mode_is_no_evaluation() -> None:
    """With frozen batch norms the model is always in eval mode. An evaluation needs no gradients."""
    cascade, _ = adapted(NOISY, net().eval())
    with silent():
        cascade(X).sum().backward()
    with torch.no_grad(), warns("evaluated-with-noise", "stage 1"):
        cascade(X)


@pytest.mark.parametrize("spec", [QUIET, NOISY])
@pytest.mark.parametrize("code", ["model-called-inside-stage", "model-saved-inside-stage"])
def test_the_model_of_a_running_stage(spec: lx.CascadeSpec, code: str) -> None:
    model = net()
    outer = nn.ModuleDict({"body": model})
    cascade, optimizer = adapted(spec, model)
    act = (lambda: outer["body"](X)) if code == "model-called-inside-stage" else outer.state_dict
    if spec is QUIET:
        with silent():  # before the first step cascade and model are the same
            act()
    for _ in cascade.stages(1, optimizer):
        step(cascade, optimizer)
        with silent():
            cascade.state_dict()
            torch.func.functional_call(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()}, (X,))
        with warns(code, "stage 1"):
            act()
        with silent():
            act()


def test_a_cascade_without_a_graph_calls_its_model_itself() -> None:
    with silent():
        cascade = lx.adapt(Breaking(), (X,), spec=NOISY, frontend="eager")
        optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
        for _ in cascade.stages(2, optimizer):
            step(cascade, optimizer)
            cascade(-X)


def test_nothing_stays_on_the_model() -> None:
    model = net()

    def attributes() -> Any:
        return {name: sorted(vars(module)) for name, module in model.named_modules()}, len(model._state_dict_pre_hooks)

    before = attributes()
    cascade, _ = adapted(model=model)
    cascade.release()
    assert attributes() == before
    cascade, _ = adapted(model=model)
    del cascade
    gc.collect()
    assert attributes() == before
    with pytest.raises(lx.LorascError):
        adapted(lx.CascadeSpec(targets=("none",)), model)
    assert attributes() == before


def test_copies_pickles_and_tracers_of_the_model() -> None:
    """Each computes what the model computes."""
    model = net()
    cascade, optimizer = adapted(NOISY, model)
    step(cascade, optimizer)
    with warns("model-called-inside-stage", "stage 1"):
        expected = model(X)
    with warns("model-saved-inside-stage", "stage 1", "with noise"):
        copy.copy(model).state_dict()
    with silent():
        copied = copy.deepcopy(cascade)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copied.model):  # noqa: S301
            twin.state_dict()
            assert torch.equal(twin(X), expected)
        replica = model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._modules = {}
        assert replica(X) is X
    forget_warnings(cascade)
    with silent():
        assert torch.equal(torch.fx.symbolic_trace(model)(X), expected)
        assert torch.equal(torch.export.export(model, (X,)).module()(X), expected)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), expected)


class Detector(nn.Module):
    """Like the head of YOLO: a convolution with the constant weight 0, 1, 2, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(5, 6), nn.Linear(6, 24)
        self.bins = nn.Conv2d(8, 1, 1, bias=False).requires_grad_(False)
        self.bins.weight.data = torch.arange(8.0).view(1, 8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bins(self.body(self.stem(x)).view(-1, 8, 3, 1).softmax(1)).flatten(1)


def test_a_frozen_site_among_trainable_ones() -> None:
    with warns("constant-adapted", "bins.weight"):
        cascade = lx.adapt(Detector(), (X,), spec=QUIET)
    assert len(cascade.sites) == 3
    with silent():
        lx.adapt(Detector(), (X,), spec=lx.CascadeSpec(rank=2, exclude=("bins.weight",)))
        lx.adapt(Detector(), (X,), spec=lx.CascadeSpec(rank=2, targets=("linear", "bins.weight")))
        lx.adapt(Detector().requires_grad_(False), (X,), spec=QUIET)
        backbone = net()
        backbone[0].requires_grad_(False)
        lx.adapt(backbone, (X,), spec=QUIET)
