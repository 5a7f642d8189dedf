"""The content of a version besides branches and slow weights: runs that stop and resume with the same bytes."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorasc_fx as lx
from lorasc_fx.checkpoint.content import random_state, set_random_state, set_rank_random_state
from lorasc_fx.shards import ONE_PROCESS
from tests.checkpoint.runs import Run, X, adamw, interrupted, whole
from tests.errors.models import Net
from tests.errors.state import assert_same, of_optimizer, of_slow, raw, unchanged
from tests.kit.devices import pretend_accelerator
from tests.kit.errors import raises, warns
from tests.kit.models import loss_of, train

PLAIN = lx.CascadeSpec(targets=("conv", "body", "head"), rank=1, pace=0.4)
TRAIN = lx.CascadeSpec(targets=("conv", "body"), train=("head.*",), rank=1, pace=0.4, optimizer_state="kept")


# ---- optimizers and schedulers


def several(cascade: lx.Cascade) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Return SGD for the first group of parameters and AdamW for the rest, each with a scheduler."""
    groups = cascade.param_groups(lr=0.02)
    built = [torch.optim.SGD(groups[:1], momentum=0.9), torch.optim.AdamW(groups[1:], betas=(0.8, 0.99))]
    return built, [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in built]


def test_several_optimizers(tmp_path: Path) -> None:
    """They resume with the same bits, by `save` and `resume`, in the order in which they were saved."""

    def train(cascade: lx.Cascade, owners: tuple[list[torch.optim.Optimizer], list[Any]]) -> None:
        optimizers, schedulers = owners
        for event in ("step", "fold", "step"):
            if event == "fold":
                cascade.transition(optimizers)
                continue
            loss_of(cascade(X)).backward()
            for owner in (*optimizers, *schedulers):
                owner.step()
            cascade.zero_grad()

    cascade = lx.adapt(Net(), args=(X,), spec=TRAIN)
    owners = several(cascade)
    train(cascade, owners)
    lx.save(cascade, tmp_path, optimizer=owners[0], scheduler=owners[1])
    train(cascade, owners)
    again = lx.load(tmp_path, Net(), args=(X,))
    resumed = several(again)
    again.resume(*resumed)
    train(again, resumed)
    for optimizer, again_optimizer in zip(owners[0], resumed[0], strict=True):
        assert_same(of_optimizer(again_optimizer), of_optimizer(optimizer))
    assert_same(of_slow(again), of_slow(cascade))
    assert [owner.state_dict() for owner in resumed[1]] == [owner.state_dict() for owner in owners[1]]


@pytest.mark.parametrize("change", ["order", "fewer", "one", "schedulers", "twice"])
def test_other_optimizers_than_the_saved_ones(change: str, tmp_path: Path) -> None:
    cascade = lx.adapt(Net(), args=(X,), spec=TRAIN)
    optimizers, schedulers = several(cascade)
    lx.save(cascade, tmp_path, optimizer=optimizers, scheduler=schedulers)
    again = lx.load(tmp_path, Net(), args=(X,))
    optimizers, schedulers = several(again)
    resumes: dict[str, tuple[Any, Any, str, tuple[str, ...]]] = {
        "order": (optimizers[::-1], schedulers, "optimizer-differs", ("SGD, AdamW", "AdamW, SGD")),
        "fewer": (optimizers[:1], None, "optimizer-differs", ("SGD, AdamW",)),
        "one": (optimizers[1], None, "optimizer-differs", ("SGD, AdamW",)),
        "schedulers": (optimizers, schedulers[0], "optimizer-differs", ("StepLR, StepLR",)),
        "twice": ([optimizers[0], optimizers[0]], None, "conflicting-options", ("twice",)),
    }
    optimizer, scheduler, code, names = resumes[change]
    with unchanged(again, *optimizers), raises((lx.CheckpointError, lx.SpecError), code, *names):
        again.resume(optimizer, scheduler)


class Worse(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """A scheduler that gets a growing loss and has inf in its state."""

    def step(self, *_: Any) -> None:
        super().step(float(self.last_epoch))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_plateau(tmp_path: Path) -> None:
    run = Run(TRAIN, scheduler=partial(Worse, factor=0.3, patience=1))
    events = ("step", "fold") * 5
    expected = whole(run, events)
    assert expected["scheduler"]["_last_lr"] != [0.02] * 3
    assert_same(interrupted(run, events, (0, 1, 3, 7), tmp_path), expected)


def test_a_run_that_was_rewound(tmp_path: Path) -> None:
    events = ("step", "fold", "step", "back", "step", "fold", "step")
    assert_same(interrupted(Run(PLAIN), events, (4, 6), tmp_path), whole(Run(PLAIN), events))


# ---- gradients that wait


def test_saved_between_backward_and_step(tmp_path: Path) -> None:
    """Stop after each of two accumulated backwards, and with a used gradient that was not zeroed yet."""
    once = ("backward", "backward", "update", "zero")
    events = (*once, "fold", *once, "backward", "update", "fold", *once)
    run = Run(TRAIN)
    assert_same(interrupted(run, events, range(1, len(events)), tmp_path), whole(run, events))


def test_a_gradient_that_waited_still_waits(tmp_path: Path) -> None:
    run = Run(TRAIN)
    training = run.started()
    training.backward()
    with unchanged(training.cascade, training.optimizer):
        training.save(tmp_path)
    again = run.resumed(tmp_path)
    with raises(lx.StateError, "gradients-pending"):
        again.fold()
    again.update()
    again.save(tmp_path)
    third = run.resumed(tmp_path)
    assert any(parameter.grad is not None for parameter in third.cascade.parameters())
    third.fold()
    alone = lx.load(tmp_path, Net(), args=(X,))
    alone.resume()
    assert all(parameter.grad is None for parameter in alone.parameters())


def test_a_gradient_that_no_file_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 5, sparse=True), nn.Linear(5, 4))
    x = torch.tensor([[0, 3], [5, 3]])
    spec = lx.CascadeSpec(targets=("1",), train=("0.*",), rank=1)
    cascade = lx.adapt(model, args=(x,), spec=spec)
    cascade(x).square().sum().backward()
    with raises(lx.CheckpointError, "not-serializable", "gradient/model.0.weight", "Tensor", "float32"):
        lx.save(cascade, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- buffers that no file holds


class WithHeads(nn.Module):
    """Has a sparse mask, like openai-whisper, which no forward reads."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("heads", torch.eye(3, dtype=torch.bool).to_sparse(), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_a_sparse_buffer_belongs_to_the_model_if_it_is_not_persistent(tmp_path: Path) -> None:
    x = torch.ones(2, 4)
    cascade = lx.adapt(WithHeads(), args=(x,), spec=lx.CascadeSpec(rank=1))
    optimizer = adamw(cascade)
    for _ in cascade.stages(2, optimizer):
        train(cascade, optimizer, [x])
    version, expected = lx.save(cascade, tmp_path, optimizer=optimizer), cascade(x)
    assert not [name for name in load_file(version / "state.safetensors") if "heads" in name]
    model = WithHeads()
    heads, again = model.heads, lx.load(tmp_path, model, args=(x,))
    again.resume(adamw(again))
    assert torch.equal(again(x), expected)
    again.load_state_dict(cascade.state_dict())
    assert again.model.heads is heads


def test_a_persistent_sparse_buffer_is_not_saved(tmp_path: Path) -> None:
    cascade = lx.adapt(WithHeads(persistent=True), args=(torch.ones(2, 4),), spec=lx.CascadeSpec(rank=1))
    with raises(lx.CheckpointError, "not-serializable", "buffer/heads", "torch.sparse_coo"):
        lx.save(cascade, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- generators


def test_numpys_generator(tmp_path: Path) -> None:
    run = Run(PLAIN)
    training = run.started()
    np.random.seed(3)
    np.random.standard_normal(3)  # it keeps one for later
    training.save(tmp_path)
    expected = [np.random.standard_normal(), np.random.rand(), np.random.randint(1 << 30)]
    np.random.seed(99)
    run.resumed(tmp_path)
    assert [np.random.standard_normal(), np.random.rand(), np.random.randint(1 << 30)] == expected


def test_random_states_for_another_number_of_ranks() -> None:
    """torch's generator depends on the first rank and the stage. The others continue like those of the first rank."""
    first, drawn = random_state(), []
    for stage in (3, 3, 4):
        set_rank_random_state([first, {}], ONE_PROCESS, stage)
        drawn.append((torch.rand(()).item(), random.random()))
    set_random_state(first)
    assert drawn[0] == drawn[1]
    assert drawn[0][1] == drawn[2][1] == random.random()
    assert len({torch.rand(()).item(), drawn[0][0], drawn[2][0]}) == 3


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_generators_of_available_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    saved = [torch.Generator().manual_seed(index) for index in range(2)]
    with monkeypatch.context() as patch:
        pretend_accelerator(patch, kind, saved)
        Run(PLAIN).started().save(tmp_path)
    cascade = lx.load(tmp_path, Net(), args=(X,))
    for count in (0, 1, 3):
        generators = [torch.Generator().manual_seed(99) for _ in range(count)]
        for available in ("xpu" if kind == "cuda" else "cuda", kind):
            with monkeypatch.context() as patch:
                pretend_accelerator(patch, available, generators)
                cascade.resume()
            seeds = [index if index < 2 and available == kind else 99 for index in range(count)]
            assert [generator.initial_seed() for generator in generators] == seeds


# ---- extra


def test_extra_comes_back_as_it_was(tmp_path: Path) -> None:
    """Numbers, types and keys that JSON lacks, and tensors of any layout that are shared."""
    shared, narrow = torch.arange(6.0).view(2, 3).t(), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    plain = {1: 2, "a": [{None: 1, (1, "b"): (2.5, -float("inf"))}], (): {"$dict": {}}, "none": None}
    cascade = Run(PLAIN).started().cascade
    lx.save(
        cascade,
        tmp_path,
        extra={**plain, "x": shared, "y/z": [shared, narrow, torch.zeros(0, 3)], "nan": [float("nan")]},
    )
    cascade = lx.load(tmp_path, Net(), args=(X,))
    extra = cascade.resume()
    tensors, nan = (extra.pop("x"), *extra.pop("y/z")), extra.pop("nan")
    assert extra == plain
    assert nan[0] != nan[0]
    assert tensors[1] is tensors[0]
    assert raw(tensors[1:]) == raw([shared, narrow, torch.zeros(0, 3)])
    tensors[0].zero_()
    assert raw(cascade.resume()["x"]) == raw(shared)
    manifest = next(tmp_path.glob("version-*/manifest.json")).read_text()
    json.loads(manifest, parse_constant=pytest.fail)


# ---- versions


def test_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(PLAIN)
    version = run.started().save(tmp_path)
    manifest = json.loads((version / "manifest.json").read_text())["content"]
    assert set(manifest["versions"]) == {"torch", "lorasc-fx", "python"}
    assert manifest["versions"]["torch"] == torch.__version__
    run.resumed(tmp_path)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    written = manifest["versions"]
    changes = f"torch {written['torch']} (now 9.9.0), python {written['python']} (now 3.99.0)"
    with warns("other-versions", version, changes):
        run.resumed(tmp_path)
