"""Each operation that runs inside adapt, transition, stages, weights, release and load is made to raise in turn.

Whatever raises, and wherever: model, flags, branches, slow state, plan, optimizer and gradients are as they were, bit
for bit; and afterwards the same call does what it does on a twin that nothing has disturbed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as leaves

import lorasc_fx as lx
from lorasc_fx.capture import capture
from lorasc_fx.passes import InsertBranches
from tests.errors.inject import FailAt, Interrupted, failing, in_turn
from tests.errors.models import Net, adapted, inputs, step
from tests.errors.state import assert_same, of, of_model, of_optimizer, of_slow, unchanged
from tests.kit.errors import raises
from tests.kit.seams import SEAMS, seam
from tests.kit.state import (
    SPARE,
    branches_of,
    is_idle,
    is_released,
    placed_weights,
    weight_state,
)

X = inputs(5, 3, 4, 4)
EVERY = 4000
"""More operations than any of the calls has."""

SPECS = {
    "noise, train": lx.CascadeSpec(
        targets=("conv", "body"), train=("head.*", "norm.*"), rank=2, pace=0.4, noise=lx.Noise(0.2)
    ),
    "fast, noise kept everywhere": lx.CascadeSpec(
        targets=("body", "mix"),
        rank=1,
        pace=0.4,
        restart="fast",
        noise=lx.Noise(0.2, keep=True, where="all"),
        optimizer_state=0.5,
        restart_A="kept",
    ),
    "pissa, dora": lx.CascadeSpec(
        targets=("conv", "linear"), rank=1, pace=0.4, start="pissa", adapter="dora", noise=lx.Noise(0.2)
    ),
    "olora, fast, by step": lx.CascadeSpec(
        targets=("conv", "linear"), rank=1, start="olora", restart="fast", noise=lx.Noise(0.2, redraw="step")
    ),
    "kept": lx.CascadeSpec(targets=("body", "head"), rank=1, pace=1.0, optimizer_state="kept"),
}


class Budget(TorchDispatchMode):
    """Memory that is short, and stays so while things are put back: new tensors have so many bytes together at most."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                size = leaf.untyped_storage().nbytes()
                if size > self.left:
                    raise MemoryError("no more")
                self.left -= size
                weakref.finalize(leaf.untyped_storage(), self.give_back, size)
        return result

    def give_back(self, size: int) -> None:
        self.left += size


FAULTS = {"memory": (MemoryError("no more"), False), "interrupt": (Interrupted(), True)}
KINDS, VIEWS = tuple(FAULTS), ("slow", "fast", "base")
LONG = {"pissa, dora": "memory", "olora, fast, by step": "interrupt"}
"""Specs whose calls have many operations: among the slow tests, by one kind of fault each."""


def marked(spec: str, *more: Any) -> Any:
    """A row of a table of tests, slow where its spec is."""
    return pytest.param(spec, *more, marks=pytest.mark.slow if spec in LONG else ())


CASES = [marked(spec, kind) for spec in SPECS for kind in KINDS if LONG.get(spec, kind) == kind]


def made(spec: lx.CascadeSpec, stages: int = 1) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    """A cascade that has ended some stages and trains the next one."""
    cascade = lx.adapt(Net(), args=(X,), spec=spec, frontend="symbolic")
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    torch.manual_seed(7)
    for _ in range(stages):
        step(cascade, optimizer, X)
        cascade.transition(optimizer)
    step(cascade, optimizer, X)
    return cascade, optimizer


def everywhere(kind: str, call: Callable[[], Any], *things: Any) -> int:
    """Let `call` fail at each of its operations, until one try goes through; returns the number of failures."""
    fault, after = FAULTS[kind]
    before = of(*things)
    for at in range(1, EVERY):
        mode = FailAt(at, failing(fault), after)
        try:
            with mode:
                call()
        except type(fault):
            assert_same(of(*things), before)
        else:
            assert mode.count < at
            return at - 1
    raise AssertionError("it never went through")


def result(cascade: lx.Cascade, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Values to compare with a twin's: no objects."""
    values = {name: value for name, value in of_model(cascade).items() if name.startswith(("parameter", "buffer"))}
    plain = {name: value[1:] for name, value in values.items()}
    return plain | of_slow(cascade) | of_optimizer(optimizer)


@pytest.mark.parametrize(("spec", "kind"), CASES)
def test_transition(spec: str, kind: str) -> None:
    cascade, optimizer = made(SPECS[spec])
    twin, others = made(SPECS[spec])
    assert_same(result(cascade, optimizer), result(twin, others))
    failures = everywhere(kind, lambda: cascade.transition(optimizer), cascade, optimizer)
    assert failures > 50
    twin.transition(others)
    assert_same(result(cascade, optimizer), result(twin, others))
    for pair in ((cascade, optimizer), (twin, others)):
        torch.manual_seed(9)
        step(*pair, X)
    assert_same(result(cascade, optimizer), result(twin, others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [False, True])
def test_transition_in_a_memory_that_stays_full(keep: bool, dtype: torch.dtype) -> None:
    """What is put back needs memory too; the weights grow, so that earlier ones are written when a later one fails."""
    layers = nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 9, bias=False), nn.Linear(9, 11)
    spec = lx.CascadeSpec(rank=1, noise=lx.Noise(0.2, keep=keep))
    x = inputs(4, 5).to(dtype)
    cascade = lx.adapt(nn.Sequential(*layers).to(dtype), args=(x,), spec=spec, frontend="symbolic")
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    for _ in range(2):
        step(cascade, optimizer, x)
        cascade.transition(optimizer)
    step(cascade, optimizer, x)
    before, written = of(cascade, optimizer), 0
    for most in range(SPARE, 10 * SPARE, 20):
        versions = [weight._version for weight in cascade.model.parameters()]
        try:
            with Budget(most):
                cascade.transition(optimizer)
        except MemoryError:
            assert_same(of(cascade, optimizer), before)
            written += versions != [weight._version for weight in cascade.model.parameters()]
        else:
            break
    assert cascade.stage == 4
    assert written > 3


@pytest.mark.parametrize(("spec", "kind"), CASES)
def test_the_first_stage_of_a_new_loop(spec: str, kind: str) -> None:
    cascade, optimizer = made(SPECS[spec])
    list(cascade.stages(1, optimizer))

    def start() -> None:
        next(cascade.stages(1, optimizer))

    failures = everywhere(kind, start, cascade, optimizer)
    assert failures > 5
    assert not is_idle(cascade)


@pytest.mark.parametrize(
    ("spec", "which", "kind"),
    [marked(spec, view, KINDS[(i + j) % 2]) for i, spec in enumerate(SPECS) for j, view in enumerate(VIEWS)],
)
def test_entering_weights(spec: str, which: Any, kind: str) -> None:
    cascade, optimizer = made(SPECS[spec])
    held = cascade.weights(which)

    def enter() -> None:
        nonlocal held
        held = cascade.weights(which)
        held.__enter__()

    before = of(cascade, optimizer)
    assert everywhere(kind, enter, cascade, optimizer) >= 2  # a copy for each weight
    assert placed_weights(cascade) == which
    held.__exit__(None, None, None)
    assert_same(of(cascade, optimizer), before)


@pytest.mark.parametrize(("spec", "kind"), CASES)
def test_release(spec: str, kind: str) -> None:
    cascade, optimizer = made(SPECS[spec])
    twin, _ = made(SPECS[spec])
    expected = twin.folded_state_dict()
    assert everywhere(kind, cascade.release, cascade, optimizer) > 20
    state = cascade.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert is_released(cascade)


@pytest.mark.parametrize("kind", FAULTS)
def test_release_of_a_first_stage(kind: str) -> None:
    """Nothing was written to the weights before, and W0 is their own memory."""
    cascade, optimizer = adapted(lx.CascadeSpec(rank=1))
    step(cascade, optimizer)
    expected = cascade.folded_state_dict()
    assert everywhere(kind, cascade.release, cascade, optimizer) > 10
    state = cascade.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("call", ["folded_state_dict", "folded_graph"])
def test_folded_copies(call: str, kind: str) -> None:
    cascade, optimizer = made(SPECS["noise, train"])
    before = of(cascade, optimizer)
    assert everywhere(kind, getattr(cascade, call), cascade, optimizer) > 20
    assert_same(of(cascade, optimizer), before)


@pytest.mark.parametrize("kind", FAULTS)
def test_save(kind: str, tmp_path: Path) -> None:
    cascade, optimizer = made(SPECS["noise, train"])
    lx.save(cascade, tmp_path, optimizer=optimizer)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    step(cascade, optimizer, X)

    def save() -> None:
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
        lx.save(cascade, tmp_path, optimizer=optimizer)

    assert everywhere(kind, save, cascade, optimizer) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["version-00000002"]


def every_write(
    monkeypatch: pytest.MonkeyPatch, kind: str, model: nn.Module, call: Callable[[], lx.Cascade]
) -> tuple[lx.Cascade, int]:
    """Let `call` fail at each operation before and after its capture, which is made once, until one try goes through;
    returns the number of failures.
    """
    real, made = seam("capture"), list[Any]()

    def keep(*args: Any, **kwargs: Any) -> Any:
        made.append(real(*args, **kwargs))
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(*SEAMS["capture"], keep)
        with pytest.raises(Interrupted):
            call()
    fault, after = FAULTS[kind]
    before, codes = of(model), set[str]()
    with monkeypatch.context() as patch:
        patch.setattr(*SEAMS["capture"], lambda *_, **__: made[0])
        for at in range(1, EVERY):
            mode = FailAt(at, failing(fault), after)
            try:
                with mode:
                    cascade = call()
            except (type(fault), lx.CheckpointError) as raised:  # of the reader of files
                codes.add(getattr(raised, "code", "out-of-memory"))
                assert_same(of(model), before)
            else:
                assert codes == {"out-of-memory"}
                assert mode.count < at
                return cascade, at - 1
    raise AssertionError("it never went through")


def prepared() -> nn.Module:
    """A model with flags and modes of its own."""
    model = Net()
    model.mix.weight.requires_grad_(False)
    model.norm.eval()
    return model


@pytest.mark.parametrize("kind", FAULTS)
def test_an_operation_of_a_capture(kind: str) -> None:
    """Each sixth one: captures depend on no spec, and `test_interrupts` has their lines."""
    model, (fault, after) = prepared(), FAULTS[kind]

    def at_operation(at: int) -> FailAt:
        return FailAt(at, failing(fault), after)

    def captured() -> None:
        capture(model, (X,), {}, "symbolic")

    assert in_turn(at_operation, captured, (model,), (type(fault),), 6) > 30


@pytest.mark.slow  # test_interrupts has some of the places
@pytest.mark.parametrize(("spec", "kind"), [(spec, KINDS[i % 2]) for i, spec in enumerate(SPECS)])
def test_adapt(spec: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = prepared(), prepared()

    def adapt(which: nn.Module = model) -> lx.Cascade:
        return lx.adapt(which, args=(X,), spec=SPECS[spec], frontend="symbolic")

    cascade, failures = every_write(monkeypatch, kind, model, adapt)
    assert failures > 2
    other = adapt(twin)
    assert_same(of_slow(cascade), of_slow(other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    cascade.release()
    original = prepared()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert not model.mix.weight.requires_grad
    assert not model.norm.training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "idle", "kind"),
    [
        ("noise, train", False, "memory"),
        ("noise, train", True, "interrupt"),
        ("fast, noise kept everywhere", False, "interrupt"),
    ],
)
def test_load(spec: str, idle: bool, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved, optimizer = made(SPECS[spec])
    if idle:
        list(saved.stages(1, optimizer))
    lx.save(saved, tmp_path, optimizer=optimizer)
    model = Net()
    model.norm.eval()
    cascade, failures = every_write(monkeypatch, kind, model, lambda: lx.load(tmp_path, model, args=(X,)))
    assert failures > 20
    assert_same(of_slow(cascade), of_slow(saved))
    pairs = zip(cascade.parameters(), saved.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("spec", ["noise, train", pytest.param("kept", marks=pytest.mark.slow)])
def test_load_state_dict(spec: str, kind: str) -> None:
    saved, _ = made(SPECS[spec], 2)
    state = saved.state_dict()
    cascade, optimizer = made(SPECS[spec])

    def load() -> None:
        try:
            cascade.load_state_dict(state)
        except RuntimeError as raised:  # torch collects what its own copies raise
            if "no more" in str(raised):
                raise MemoryError("no more") from raised
            raise

    assert everywhere(kind, load, cascade, optimizer) > 20
    assert cascade.stage == 3
    assert_same(of_slow(cascade), of_slow(saved))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_pass_that_raises_inside_adapt(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, _ = FAULTS[kind]
    model = prepared()

    def broken(*_: Any) -> None:
        raise fault

    with monkeypatch.context() as patch, unchanged(model):
        patch.setattr(InsertBranches, "rewrite", broken)
        with pytest.raises(type(fault)):
            lx.adapt(model, args=(X,), spec=SPECS["noise, train"], frontend="symbolic")
    assert lx.adapt(model, args=(X,), frontend="symbolic").sites


@pytest.mark.parametrize("kind", FAULTS)
def test_a_new_variant(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, _ = FAULTS[kind]
    cascade, optimizer = made(SPECS["noise, train"])
    cascade.eval()

    def broken(*_: Any) -> None:
        raise fault

    with monkeypatch.context() as patch, unchanged(cascade, optimizer):
        patch.setattr(InsertBranches, "rewrite", broken)
        with pytest.raises(type(fault)):
            cascade(X)
    with unchanged(cascade.model):
        assert cascade(X).shape == (5, 4)


@pytest.mark.parametrize("what", ["lora_A", "lora_B", "expert"])
def test_load_holds_the_graph_against_its_plan(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier runs on what was loaded: numbers that are not finite are told by name, and nothing is changed."""
    saved, _ = made(SPECS["kept"])
    lx.save(saved, tmp_path)
    model, load = prepared(), seam("load into a cascade")

    def spoiled(cascade: lx.Cascade, *found: Any) -> None:  # after the reader, which tells it of its file, has looked
        load(cascade, *found)
        branch, state = branches_of(cascade)["body.weight"], weight_state(cascade, "body.weight")
        with torch.no_grad():
            (state.experts[0].b if what == "expert" else getattr(branch, what))[0, 0] = float("nan")

    told = "slow state of body.weight" if what == "expert" else "branch of body.weight"
    monkeypatch.setattr(*SEAMS["load into a cascade"], spoiled)
    with unchanged(model), raises(lx.CheckpointError, "sites-differ", told):
        lx.load(tmp_path, model, args=(X,))
    assert lx.adapt(model, args=(X,), frontend="symbolic").sites
