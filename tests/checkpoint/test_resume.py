"""A run that was saved, loaded (with inputs or without) and resumed has the same bytes as an uninterrupted run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.checkpoint.runs import THREE_STAGES, Run, X, adamw, interrupted, whole
from tests.errors.models import Net, inputs
from tests.errors.state import assert_same, of_slow, raw, unchanged
from tests.kit.errors import raises
from tests.kit.models import loss_of, train
from tests.kit.seams import SEAMS, seam
from tests.kit.state import MANIFEST, variant_count

PLAIN = lx.CascadeSpec(targets=("conv", "body", "head"), rank=1, pace=0.4)
SPECS: dict[str, lx.CascadeSpec] = {
    "plain": PLAIN,
    "plain cascade": lx.CascadeSpec(rank=1, pace=1.0),
    "noise": lx.CascadeSpec(rank=1, pace=0.4, noise=lx.Noise(0.3)),
    "noise kept": lx.CascadeSpec(rank=1, pace=0.4, noise=lx.Noise(0.3, distribution="normal", keep=True)),
    "noise everywhere": lx.CascadeSpec(targets=("body",), rank=1, noise=lx.Noise(0.3, where="all")),
    "noise kept everywhere": lx.CascadeSpec(targets=("mix",), rank=1, noise=lx.Noise(0.3, where="all", keep=True)),
    "restart fast": lx.CascadeSpec(rank=1, pace=0.3, restart="fast", noise=lx.Noise(0.1)),
    "dense collapse": lx.CascadeSpec(rank=4, pace=0.3),
    "dense collapse, fast": lx.CascadeSpec(rank=4, pace=0.3, restart="fast"),
    "train": lx.CascadeSpec(
        targets=("conv", "body"), train=("head.*", "norm.*"), rank=1, pace=0.3, noise=lx.Noise(0.1)
    ),
    "train, fast": lx.CascadeSpec(targets=("conv",), train=("head.*",), rank=1, pace=0.3, restart="fast"),
    "train, not slow": lx.CascadeSpec(targets=("conv",), train=("head.*",), rank=1, pace=0.3, slow_train=False),
    "A kept": lx.CascadeSpec(rank=1, restart_factors="B", optimizer_state="kept"),
    "no restart": lx.CascadeSpec(rank=1, pace=0.5, restart_factors="none"),
    "pruned": lx.CascadeSpec(rank=2, optimizer_state=0.6),
    "pissa": lx.CascadeSpec(rank=1, pace=0.4, start="pissa", noise=lx.Noise(0.2)),
    "pissa, fast": lx.CascadeSpec(rank=1, pace=0.4, start="pissa", restart="fast"),
    "dora": lx.CascadeSpec(rank=1, pace=0.4, adapter="dora", noise=lx.Noise(0.2)),
    "dora, dense collapse": lx.CascadeSpec(rank=4, pace=0.4, adapter="dora", start="pissa"),
    "rules, rslora": lx.CascadeSpec(rank=1, lora_alpha=3.3, use_rslora=True, rules=(lx.Rule("head", 2, 0.7),), seed=5),
}
STOPS = (0, 1, 3, 4, 6, 8, 10)
"""Stops before the first step, in a stage, before a transition, right after one, and before the last step."""


def assert_resumes(run: Run, events: Any, stops: Any, folder: Path) -> None:
    expected = whole(run, events)
    assert len(set(expected["losses"])) == len(expected["losses"])
    assert_same(interrupted(run, events, stops, folder), expected)


@pytest.mark.parametrize(("spec", "waits"), [(spec, index % 2 == 1) for index, spec in enumerate(SPECS)])
def test_three_stages(spec: str, waits: bool, tmp_path: Path) -> None:
    """Load with inputs, or without."""
    assert_resumes(Run(SPECS[spec], waits=waits), THREE_STAGES, STOPS, tmp_path)


class Product(nn.Module):
    """A model with one weight of any shape and layout."""

    def __init__(self, kind: str, *shape: int) -> None:
        super().__init__()
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.3
        if kind == "channels_last":
            weight = weight.to(memory_format=torch.channels_last)
        self.kind, self.weight = kind, nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "linear":
            return nn.functional.linear(x, self.weight)
        return x @ self.weight if self.kind == "in_out" else nn.functional.conv2d(x, self.weight)


def product_input(kind: str, *shape: int) -> torch.Tensor:
    if kind == "linear":
        return inputs(4, shape[1])
    return inputs(*shape[:-2], 4, shape[-2]) if kind == "in_out" else inputs(2, shape[1], 5, 5)


@pytest.mark.parametrize("setting", ["float32", "bfloat16", "dora"])
@pytest.mark.parametrize(
    "kind",
    [
        ("in_out", 8, 8), ("in_out", 16, 8), ("in_out", 5, 7), ("in_out", 64, 32), ("in_out", 3, 8, 8),
        ("linear", 8, 8), ("linear", 7, 5), ("conv", 8, 4, 3, 3), ("channels_last", 8, 4, 3, 3),
    ],
    ids=str,
)  # fmt: skip
def test_bits_for_every_layout(kind: tuple[Any, ...], setting: str, tmp_path: Path) -> None:
    """A checkpoint does not store strides, but BLAS rounds the product of a transposed factor differently."""
    dtype = getattr(torch, setting, torch.float32)
    base, x = Product(*kind).to(dtype), product_input(*kind).to(dtype)
    for rank in (1, 3):
        model, spec = (
            deepcopy(base),
            lx.CascadeSpec(rank=rank, pace=0.4, adapter="dora" if setting == "dora" and len(kind) == 3 else "lora"),
        )
        cascade = lx.adapt(model, args=(x,), spec=spec)
        for stage in range(2):
            generator = torch.Generator().manual_seed(stage)
            for factor in cascade.branches.parameters():
                factor.data += torch.randn(factor.shape, generator=generator) * 0.3
            cascade.transition(None)
            lx.save(cascade, tmp_path / str(rank))
            again = deepcopy(base)
            lx.load(tmp_path / str(rank), again, args=(x,))
            assert torch.equal(again.weight, model.weight)


class Teacher(nn.Module):
    """A momentum teacher, as in BYOL: forward writes its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(self.student.weight, alpha=0.1)
        return self.student(x) - self.teacher(x)


class Moving(nn.Module):
    """Forward replaces buffers: with the input's shape, another dtype, in place of None, and shared ones."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.inner, self.other = nn.Linear(5, 5), nn.Module(), nn.Module()
        self.register_buffer("memory", torch.zeros(0))
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("first", torch.ones(3))
        self.inner.register_buffer("mask", torch.zeros(2))
        self.other.register_buffer("mask", self.inner.mask)
        self.inner.register_buffer("steps", torch.zeros(1))
        self.other.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.memory.shape != x.shape:
            self.memory = torch.zeros_like(x)
        self.memory = (self.memory * 0.9 + self.body(x)).detach()
        if self.cache is None:
            self.cache = torch.arange(5)
        if self.first is not None:
            self.first = None
        if not hasattr(self, "seen"):
            self.register_buffer("seen", x.detach().clone())
        self.inner.mask = self.inner.mask + 1
        self.inner.steps = self.other.steps = self.other.steps + 1
        return self.body(x) * self.cache + self.memory + self.seen + self.inner.mask[0] - self.other.mask[0]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return shape and dtype of all parameters and buffers under all names, and which names share a tensor."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    values = {name: raw(value) for name, value in tensors}
    return values | {f"same {name}": [alias for alias, tensor in tensors if tensor is value] for name, value in tensors}


@pytest.mark.parametrize("build", [Teacher, Moving])
def test_tensors_that_forward_writes_are_saved(
    build: type[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = inputs(4, 5)
    torch.manual_seed(1)
    base = build()
    model = deepcopy(base)
    cascade = lx.adapt(model, args=(x,), spec=lx.CascadeSpec(rank=1), frontend="eager")
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    for _ in range(2):
        train(cascade, optimizer, [x])
        cascade.transition(optimizer)
    lx.save(cascade, tmp_path)
    again = deepcopy(base)
    with monkeypatch.context() as patch:
        commit, calls = seam("commit"), iter([True, False])

        def spoiled(*args: Any) -> None:  # the values of the checkpoint, which are the second that are written
            commit(*args)
            assert next(calls) or 1 / 0

        patch.setattr(*SEAMS["commit"], spoiled)
        with raises(lx.CheckpointError, "invalid-checkpoint", "ZeroDivisionError"):
            lx.load(tmp_path, again, args=(x,))
    assert state_of(again) == state_of(base)
    loaded = lx.load(tmp_path, again, args=(x,))
    assert state_of(again) == state_of(model)
    for _ in range(2):
        assert torch.equal(loaded(x), cascade(x))
    assert state_of(again) == state_of(model)
    lx.save(loaded, tmp_path)
    lx.load(tmp_path, again := deepcopy(base), args=(x,))
    assert state_of(again) == state_of(model)
    if build is Teacher:  # a sum leaves buffers of other layouts as the base has them, with a warning
        assert lx.merge([tmp_path], deepcopy(base), args=(x,))(x).shape == (4, 5)
    with torch.no_grad():
        next(iter(base.parameters())).add_(1)
    with raises(lx.CheckpointError, "base-differs"):
        lx.load(tmp_path, base, args=(x,))


@pytest.mark.parametrize(("frontend", "waits"), [("export", False), ("export", True), ("eager", True)])
def test_other_front_ends(frontend: str, waits: bool, tmp_path: Path) -> None:
    assert_resumes(Run(SPECS["train"], frontend=frontend, waits=waits), THREE_STAGES, (1, 4), tmp_path)


@pytest.mark.parametrize("spec", ["noise kept", "restart fast", "train, fast"])
@pytest.mark.parametrize(
    "events", [("loop", "loop"), ("loop", "step", "fold", "step"), ("step", "loop", "fold", "loop")]
)
def test_after_stages_have_ended(spec: str, events: tuple[str, ...], tmp_path: Path) -> None:
    run = Run(SPECS[spec])
    assert_resumes(run, events, range(len(events)), tmp_path)


class Bfgs(torch.optim.LBFGS):
    """Steps parameters with gradients. Its state is lists of tensors, stored for the first parameter."""

    def __init__(self, cascade: lx.Cascade) -> None:
        every = [parameter for group in cascade.param_groups(lr=0.1) for parameter in group["params"]]
        super().__init__(every, lr=0.1, max_iter=1, history_size=3)

    def step(self, closure: Any = None) -> Any:
        return super().step(lambda: torch.ones(()))


class Narrow(torch.optim.SGD):
    """Keeps a list of tensors in int8 and fp64 for each parameter."""

    def step(self, closure: Any = None) -> Any:
        for parameter in [parameter for group in self.param_groups for parameter in group["params"]]:
            kept = self.state[parameter].setdefault("kept", [])
            kept += [torch.ones(3, dtype=torch.int8), torch.tensor(1 / 3, dtype=torch.float64)]
        return super().step(closure)


def over(make: Any, **options: Any) -> Callable[[lx.Cascade], torch.optim.Optimizer]:
    """An optimizer over the groups of a cascade."""
    return lambda cascade: make(cascade.param_groups(**options), **options)


OPTIMIZERS: dict[str, Any] = {
    "a list": over(Narrow, lr=0.05),
    "adamw, fused": over(torch.optim.AdamW, lr=0.02, fused=True),
    "adamw, lr a tensor": over(torch.optim.AdamW, lr=torch.tensor(0.02)),
    "lbfgs": Bfgs,
    "inf and None in a group": lambda cascade: torch.optim.SGD(
        [{**group, "ceiling": float("inf"), "note": None} for group in cascade.param_groups(lr=0.05)]
    ),
    "sgd": over(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": over(torch.optim.Adagrad, lr=0.05, lr_decay=0.01, initial_accumulator_value=0.1),
}


@pytest.mark.parametrize(
    ("name", "how"), [(name, ("reset", "kept", 0.5)[index % 3]) for index, name in enumerate(OPTIMIZERS)]
)
def test_optimizers(name: str, how: Any, tmp_path: Path) -> None:
    spec = lx.CascadeSpec(targets=("conv", "body"), train=("head.*",), rank=1, pace=0.4, optimizer_state=how)
    run = Run(spec, optimizer=OPTIMIZERS[name])
    assert_resumes(run, THREE_STAGES, (2, 4, 9), tmp_path)


@pytest.mark.filterwarnings("ignore:.*the rounding of mix.weight keeps:lorasc_fx.errors.LorascWarning")  # in bf16
@pytest.mark.parametrize(("make", "dtype"), [(torch.optim.NAdam, torch.float64), (torch.optim.ASGD, torch.bfloat16)])
def test_states_of_another_dtype_than_their_parameter(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """torch's load_state_dict would convert them to the dtype of the parameter."""
    x = inputs(5, 3, 4, 4).to(dtype)
    run = Run(SPECS["train"], lambda: Net().to(dtype), x, optimizer=lambda c: make(c.param_groups(lr=0.02), lr=0.02))
    assert_resumes(run, THREE_STAGES[:6], (2,), tmp_path)


SCHEDULERS: dict[str, Any] = {
    "one cycle": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=8),
    "warm-up, then cosine": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=1),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        ],
        milestones=[1],
    ),
}
FOLDS = ("step", "fold") * 4 + ("step",)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch's own, after any resume before a step
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tmp_path: Path) -> None:
    run = Run(SPECS["train"], scheduler=SCHEDULERS[name])
    assert_resumes(run, FOLDS, (1, 2, 5, 6), tmp_path)


def test_a_scheduler_gets_the_saved_settings(tmp_path: Path) -> None:
    make = torch.optim.lr_scheduler.MultiStepLR
    run = Run(PLAIN, scheduler=lambda optimizer: make(optimizer, milestones=[2, 4], gamma=0.5))
    training = run.started()
    training.save(tmp_path)
    resumed = Run(PLAIN, scheduler=lambda optimizer: make(optimizer, milestones=[7], gamma=0.1)).resumed(tmp_path)
    assert resumed.scheduler.state_dict() == training.scheduler.state_dict()
    assert type(resumed.scheduler.milestones) is type(training.scheduler.milestones)


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [(torch.bfloat16, "dense collapse, fast"), (torch.float16, "noise"), (torch.float64, "train")],
)
def test_dtypes(dtype: torch.dtype, spec: str, tmp_path: Path) -> None:
    run = Run(SPECS[spec], build=lambda: Net().to(dtype), x=inputs(5, 3, 4, 4).to(dtype))
    assert_resumes(run, THREE_STAGES, (2, 4, 9), tmp_path)


class Ends(nn.Module):
    """A model with one head per mode, an unused head, a tied pair, and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Linear(5, 7)
        self.trained, self.judged, self.spare = nn.Linear(7, 3), nn.Linear(7, 3), nn.Linear(7, 4)
        self.again = nn.Linear(5, 7)
        self.again.weight = self.body.weight
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        head = self.trained if self.training else self.judged
        return head(torch.tanh(self.body(x)) + self.again(x))


def one_group_each(cascade: lx.Cascade) -> torch.optim.Optimizer:
    """An AdamW with one group for each branch, in the order in which a run gets them."""
    names = sorted(cascade.branches, key=lambda name: name == "judged/weight")
    return torch.optim.AdamW([{"params": list(cascade.branches[name].parameters())} for name in names], lr=0.02)


@pytest.mark.filterwarnings("ignore")
def test_sites_of_a_second_variant(tmp_path: Path) -> None:
    spec = lx.CascadeSpec(rank=1, noise=lx.Noise(0.2))
    run = Run(spec, build=Ends, x=inputs(4, 5), optimizer=one_group_each, frontend="export")
    training = run.started()
    assert training.cascade.unreached == ("judged.weight", "spare.weight")
    training.judge()
    assert training.cascade.unreached == ("spare.weight",)
    events = ("step", "judge", "step", "fold", "step", "train", "step", "fold", "step")
    assert_resumes(run, events, (1, 2, 3, 4, 5, 7, 8), tmp_path)


class Refusing(torch.optim.lr_scheduler.StepLR):
    """A scheduler that rejects the first state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not vars(self).pop("_lenient", False):
            self._lenient = True
            raise ValueError("not this one")
        super().load_state_dict(state_dict)


def test_a_failed_resume_keeps_gradients_and_their_state(tmp_path: Path) -> None:
    """Gradients that a step has used do not count as unused afterwards."""
    run = Run(lx.CascadeSpec(targets=("body", "head"), rank=1), scheduler=partial(Refusing, step_size=1))
    training = run.started()
    training.step()
    loss_of(training.cascade(run.x)).backward()
    lx.save(training.cascade, tmp_path, optimizer=training.optimizer, scheduler=training.scheduler)
    cascade = lx.load(tmp_path, Net(), args=(run.x,))
    optimizer = adamw(cascade)
    loss_of(cascade(run.x)).backward()
    optimizer.step()
    cascade.transition(optimizer)
    loss_of(cascade(run.x)).backward()
    gradients = [raw(parameter.grad) for parameter in cascade.branches.parameters()]
    with raises(lx.CheckpointError, "optimizer-differs"):
        cascade.resume(optimizer, Refusing(optimizer, 1))
    assert [raw(parameter.grad) for parameter in cascade.branches.parameters()] == gradients
    optimizer.step()
    with raises(lx.CheckpointError, "optimizer-differs"):
        cascade.resume(optimizer, Refusing(optimizer, 1))
    cascade.transition(optimizer)


@pytest.mark.parametrize("idle", [True, False])
def test_a_run_in_another_dtype_than_the_model_has_not_trained(idle: bool, tmp_path: Path) -> None:
    """A parameter trained in full keeps its slow value in fp64, and the next loop starts."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    x, spec = torch.randn(4, 6, dtype=torch.float64), lx.CascadeSpec(rank=2, pace=0.3, train=("1.bias",))
    cascade = lx.adapt(deepcopy(model), (x,), spec=spec)
    optimizer = adamw(cascade)
    for _ in cascade.stages(1, optimizer):
        train(cascade, optimizer, [x])
    if not idle:
        next(iter(cascade.stages(2, optimizer)))
    cascade.to(torch.float32)
    lx.save(cascade, tmp_path)
    loaded = lx.load(tmp_path, deepcopy(model), (x,))
    assert loaded.model[1].bias.dtype == torch.float64
    assert not torch.equal(loaded.model[1].bias, loaded.model[1].bias.float().double())
    if idle:
        assert [stage.number for stage in loaded.stages(1, adamw(loaded))] == [2]


def with_head(seed: int) -> Net:
    """A base with a newly drawn head, as in a script without a seed."""
    model = Net()
    torch.manual_seed(seed)
    model.head.reset_parameters()
    return model


@pytest.mark.parametrize("waits", [False, True])
def test_a_newly_drawn_head_is_replaced_by_the_checkpoints(waits: bool, tmp_path: Path) -> None:
    seeds = iter((1, 1, 2, 3))  # of the whole run, of the one that is interrupted, and of the two that go on
    run = Run(SPECS["train, fast"], build=lambda: with_head(next(seeds)), waits=waits)
    assert_resumes(run, THREE_STAGES[:7], (2, 5), tmp_path)
    assert not list(seeds)


def test_a_state_dict_contains_its_head(tmp_path: Path) -> None:
    cascade, target = (lx.adapt(with_head(seed), (X,), spec=SPECS["train"]) for seed in (1, 2))
    versions = [lx.save(cascade, tmp_path / "a"), lx.save(target, tmp_path / "b")]
    target.load_state_dict(cascade.state_dict())
    assert_same(of_slow(target), of_slow(cascade))
    with target.weights("base"):
        assert torch.equal(target.model.head.weight, with_head(1).head.weight)
    versions.append(lx.save(target, tmp_path / "c"))
    source, before, after = (json.loads((path / MANIFEST).read_text())["content"]["base"] for path in versions)
    assert after == source != before
    grown = with_head(3)
    grown.head = nn.Linear(7, 5)
    with unchanged(grown), raises(lx.CheckpointError, "base-differs", "differs in head.weight, head.bias"):
        lx.load(tmp_path / "a", grown, args=(X,))


def saved(folder: Path, spec: lx.CascadeSpec = PLAIN) -> lx.Cascade:
    training = Run(spec).started()
    for event in THREE_STAGES[:6]:
        getattr(training, event)()
    training.save(folder)
    return training.cascade


def test_what_needs_no_graph_works_before_the_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = saved(tmp_path)
    monkeypatch.setattr(*SEAMS["capture"], None)  # which nothing here calls
    cascade = lx.load(tmp_path, Net())
    assert cascade.sites == trained.sites
    assert cascade.frontend == "" == "".join(cascade.placements)
    assert "captured at its first call" in str(cascade)
    assert {refusal.weight for refusal in trained.refusals} <= {
        *cascade.unreached,
        *(r.weight for r in cascade.refusals),
    }
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    assert cascade.resume(optimizer)["losses"]
    with cascade.weights("slow"), trained.weights("slow"), torch.no_grad():
        assert torch.equal(cascade.eval()(X), trained.eval()(X))
    cascade.train()
    lx.save(cascade, tmp_path / "again", optimizer=optimizer)
    folded, expected = lx.load(tmp_path / "again", Net()).folded_state_dict(), trained.folded_state_dict()
    assert all(torch.equal(folded[name], expected[name]) for name in expected)
    released = cascade.release()
    assert all(torch.equal(value, expected[name]) for name, value in released.state_dict().items())


def test_what_needs_a_graph_says_so_until_the_first_call(tmp_path: Path) -> None:
    trained = saved(tmp_path)
    cascade = lx.load(tmp_path, Net())
    calls: list[Any] = [
        lambda: cascade.example,
        cascade.draw,
        cascade.folded_graph,
        lambda: lx.export.pt2(cascade, tmp_path / "graph.pt2"),
    ]
    for call in calls:
        with unchanged(cascade), raises(lx.StateError, "not-available"):
            call()
    graph = cascade.eval().folded_graph((X,))
    assert torch.equal(graph(X), trained.eval().folded_graph((X,))(X))
    assert variant_count(cascade) == 1
    assert cascade.frontend == trained.frontend
    assert cascade.placements == trained.placements
    assert cascade.unreached == trained.unreached
    assert cascade.refusals == trained.refusals
    assert torch.equal(cascade.example[0][0], X)


def test_an_export_to_peft_needs_inputs(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))

    x = torch.ones(3, 4)
    cascade = lx.adapt(build(), (x,), spec=lx.CascadeSpec(rank=2))
    with torch.no_grad():
        for branch in cascade.branches.values():
            branch.lora_B.fill_(1)
    lx.save(cascade, tmp_path / "run")
    loaded = lx.load(tmp_path / "run", build())
    with raises(lx.StateError, "not-available", "without example inputs"):
        lx.export.peft(loaded, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    lx.export.peft(cascade, tmp_path / "one")
    with unchanged(loaded):
        lx.export.peft(loaded, tmp_path / "other", (x,))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_first_call_that_cannot_be_captured_leaves_the_cascade_as_it_was(tmp_path: Path) -> None:
    trained = saved(tmp_path)
    cascade = lx.load(tmp_path, Net())
    with unchanged(cascade), pytest.raises(RuntimeError, match="channels"):
        cascade(inputs(5, 2, 4, 4))
    hidden = X.clone().requires_grad_() * 2
    copy_of = copy.deepcopy(trained)
    torch.manual_seed(0)
    output = cascade(hidden)
    torch.manual_seed(0)
    assert torch.equal(output, copy_of(hidden))
    assert cascade.example[0][0].grad_fn is None  # or the graph of the caller would live on
