"""A call that fails at any place changes nothing, bit for bit: model, flags, branches, slow state, plan, optimizer,
gradients and process. Then the same call has the result that it has on an undisturbed twin.

A row of CALLS is a call. Operations of torch and lines of the package fail in it, one after the other.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as leaves

import lorasc_fx as lx
from tests.errors.inject import EVERY, FailAt, LineAt, failing, in_turn, sigint
from tests.errors.models import Late, Net, inputs, step
from tests.errors.state import assert_same, numbers, of, unchanged
from tests.kit.errors import raises
from tests.kit.models import Tied, build
from tests.kit.seams import SEAMS, seam
from tests.kit.state import MANIFEST, SPARE, TENSORS, branches_of, end_idle, variant_for, weight_state

Call = tuple[Callable[[], Any], tuple[Any, ...]]
"""The function that is called, and the objects that it may not change if it fails."""

X, SMALL = inputs(5, 3, 4, 4), inputs(2, 5)
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
        restart_factors="B",
    ),
    "pissa, dora": lx.CascadeSpec(
        targets=("conv", "linear"), rank=1, pace=0.4, start="pissa", adapter="dora", noise=lx.Noise(0.2)
    ),
    "pissa, fast, noise": lx.CascadeSpec(
        targets=("conv", "linear"), rank=1, start="pissa", restart="fast", noise=lx.Noise(0.2)
    ),
    "kept": lx.CascadeSpec(targets=("body", "head"), rank=1, pace=1.0, optimizer_state="kept"),
}
SPEC = SPECS["noise, train"]


def made(spec: lx.CascadeSpec = SPEC, stages: int = 1) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    """A cascade that has ended some stages and trains the next one."""
    cascade = lx.adapt(Net(), args=(X,), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    torch.manual_seed(7)
    for _ in range(stages):
        step(cascade, optimizer, X)
        cascade.transition(optimizer)
    step(cascade, optimizer, X)
    return cascade, optimizer


def prepared() -> nn.Module:
    """A model with changed flags and modes."""
    model = Net()
    model.mix.weight.requires_grad_(False)
    model.norm.eval()
    return model


# ---- calls


def transition(spec: lx.CascadeSpec, _: Path) -> Call:
    cascade, optimizer = made(spec)
    return lambda: cascade.transition(optimizer), (cascade, optimizer)


def stage_of_a_loop(spec: lx.CascadeSpec, _: Path) -> Call:
    cascade, optimizer = made(spec)
    list(cascade.stages(1, optimizer))
    return lambda: end_idle(cascade), (cascade, optimizer)


def rewind(spec: lx.CascadeSpec, _: Path) -> Call:
    cascade, optimizer = made(spec, 2)
    return lambda: cascade.rewind(0, optimizer), (cascade, optimizer)


def release(spec: lx.CascadeSpec, _: Path) -> Call:
    cascade, optimizer = made(spec)
    return cascade.release, (cascade, optimizer)


def release_of_a_first_stage(spec: lx.CascadeSpec, _: Path) -> Call:
    """Nothing was written to the weights before, and W0 is their own memory."""
    cascade, optimizer = made(spec, 0)
    return cascade.release, (cascade, optimizer)


def load_state_dict(spec: lx.CascadeSpec, _: Path) -> Call:
    state = made(spec, 2)[0].state_dict()
    cascade, optimizer = made(spec)
    return lambda: cascade.load_state_dict(state), (cascade, optimizer)


def half(spec: lx.CascadeSpec, _: Path) -> Call:
    """Biases and weights that are trained in full are rounded."""
    cascade, _ = made(spec)
    cascade(X).sum().backward()
    return cascade.half, (cascade,)


def adapt(spec: lx.CascadeSpec, _: Path) -> Call:
    model = prepared()
    return lambda: lx.adapt(model, args=(X,), spec=spec), (model,)


def adapt_eagerly(spec: lx.CascadeSpec, _: Path) -> Call:
    model = prepared()
    return lambda: lx.adapt(model, args=(X,), spec=spec, frontend="eager"), (model,)


def adapt_untied(_: lx.CascadeSpec, __: Path) -> Call:
    model, ids = build(Tied), torch.tensor([[1, 2, 3]])
    spec = lx.CascadeSpec(rank=2, untie=("head.weight",), noise=lx.Noise(0.1))
    return lambda: lx.adapt(model, args=(ids,), spec=spec), (model,)


def load(spec: lx.CascadeSpec, folder: Path) -> Call:
    saved, optimizer = made(spec)
    lx.save(saved, folder, optimizer=optimizer)
    model = prepared()
    return lambda: lx.load(folder, model, args=(X,)), (model,)


def from_peft(_: lx.CascadeSpec, folder: Path) -> Call:
    """An expert of each weight and a head come into the slow state of a new cascade, with noise."""
    spec = lx.CascadeSpec(targets=("conv.weight", "body"), train=("head.*",), pace=1.0, noise=lx.Noise(0.1))
    lx.export.peft(made(spec, 0)[0], folder)
    model = prepared()
    return lambda: lx.from_peft(folder, model, args=(X,), spec=spec), (model,)


def late_site(_: lx.CascadeSpec, __: Path) -> Call:
    """A call that brings a new graph with a new site, whose weight then gets noise."""
    cascade = lx.adapt(Late().eval(), args=(SMALL,), spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.1)))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    step(cascade, optimizer, SMALL)
    cascade.train()
    return lambda: variant_for(cascade, (SMALL,), {}), (cascade, optimizer)


# ---- calls that change nothing if they succeed


def weights(spec: lx.CascadeSpec, _: Path) -> Call:
    cascade, optimizer = made(spec)

    def call() -> None:
        for view in ("slow", "fast", "base"):
            with cascade.weights(view):  # type: ignore[arg-type]
                pass

    return call, (cascade, optimizer)


def folded(spec: lx.CascadeSpec, _: Path) -> Call:
    cascade, optimizer = made(spec)
    cascade.folded_graph()  # its graph of dynamic sizes; an op that fails inside torch.export aborts the process
    return lambda: (cascade.folded_state_dict(), cascade.folded_graph()), (cascade, optimizer)


def save(spec: lx.CascadeSpec, folder: Path) -> Call:
    """After a failure, the folder has at least one version, and all are complete."""
    cascade, optimizer = made(spec)
    lx.save(cascade, folder, optimizer=optimizer)

    def call() -> None:
        versions = [path for path in folder.iterdir() if not path.name.startswith(".")]
        assert versions
        assert all({file.name for file in path.iterdir()} == {MANIFEST, TENSORS} for path in versions)
        lx.save(cascade, folder, optimizer=optimizer)

    return call, (cascade, optimizer)


def weights_and_statistics(_: lx.CascadeSpec, __: Path) -> Call:
    model = Net()
    model.drop.p = 0.0  # the loop would draw random numbers, which are not restored
    cascade = lx.adapt(model, args=(X,), spec=lx.CascadeSpec(rank=2))
    step(cascade, torch.optim.SGD(cascade.param_groups(lr=0.02)), X)

    def call() -> None:
        with cascade.weights("slow"):
            torch.optim.swa_utils.update_bn([inputs(4, 3, 4, 4)], cascade)

    return call, (cascade,)


CALLS: dict[str, Callable[[lx.CascadeSpec, Path], Call]] = {
    function.__name__: function
    for function in (
        transition, stage_of_a_loop, rewind, release, release_of_a_first_stage, load_state_dict, half,
        adapt, adapt_eagerly, adapt_untied, load, from_peft, late_site, weights, folded, save, weights_and_statistics,
    )
}  # fmt: skip
LONG = {"load", "from_peft", "late_site", "adapt", "adapt_eagerly", "adapt_untied", "folded"}
"""Calls that take long: fewer places are tried."""
EXPORTS = {"adapt", "adapt_eagerly", "adapt_untied", "load", "from_peft", "late_site"}
"""Calls that capture a model. torch.export aborts the process if an op inside it fails."""
FAULTS: dict[str, Callable[[int], Any]] = {
    "memory": lambda at: FailAt(at, failing(MemoryError("no more"))),
    "after an operation": lambda at: FailAt(at, sigint, after=True),
    "line": lambda at: LineAt(at, sigint),
}
ROWS = [(name, "noise, train") for name in CALLS] + [("transition", spec) for spec in list(SPECS)[1:]]
ROWS += [(name, "fast, noise kept everywhere") for name in ("stage_of_a_loop", "release", "load", "rewind")]
ROWS += [("weights", "pissa, dora"), ("load_state_dict", "kept")]
TRIALS = [(*row, fault) for row in ROWS for fault in FAULTS if "line" in fault or row[0] not in EXPORTS]


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::lorasc_fx.errors.LorascWarning")
@pytest.mark.parametrize(("name", "spec", "fault"), TRIALS)
def test_a_call_that_fails(name: str, spec: str, fault: str, tmp_path: Path) -> None:
    """It fails at places at equal distances, and then succeeds, with the result that it has on a twin."""
    at_place, most = FAULTS[fault], 3 if name in LONG else 8
    twin, twins = CALLS[name](SPECS[spec], tmp_path / "twin")
    with at_place(EVERY) as counter:
        kept = [twin()]  # a cascade that is garbage collected releases its model
    call, things = CALLS[name](SPECS[spec], tmp_path / "run")
    step_size = max(1, counter.count // most)
    places = range(1 + zlib.crc32(name.encode()) % step_size, counter.count + 1, step_size)
    failures = in_turn(at_place, lambda: kept.append(call()), things, places)
    assert failures >= min(most, counter.count, 20) // 3  # a call that reuses an earlier graph has fewer places
    assert_same(numbers(*things), numbers(*twins))


# ---- other faults


class Budget(TorchDispatchMode):
    """Limits the bytes of all new tensors together, also while values are restored."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.remaining = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {leaf.untyped_storage()._cdata for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in inputs:
                size = leaf.untyped_storage().nbytes()
                if size > self.remaining:
                    raise MemoryError("no more")
                self.remaining -= size
                weakref.finalize(leaf.untyped_storage(), self.free, size)
        return result

    def free(self, size: int) -> None:
        self.remaining += size


@pytest.mark.parametrize(("keep", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_transition_in_a_memory_that_stays_full(keep: bool, dtype: torch.dtype) -> None:
    """Restoring values needs memory too. The weights grow, so that a later one fails after earlier ones are written."""
    layers = nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 9, bias=False), nn.Linear(9, 11)
    spec = lx.CascadeSpec(rank=1, noise=lx.Noise(0.2, keep=keep))
    x = inputs(4, 5).to(dtype)
    cascade = lx.adapt(nn.Sequential(*layers).to(dtype), args=(x,), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    for _ in range(2):
        step(cascade, optimizer, x)
        cascade.transition(optimizer)
    step(cascade, optimizer, x)
    before, written = of(cascade, optimizer), 0
    for most in range(SPARE, 10 * SPARE, 50):
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


@pytest.mark.parametrize("tensor", ["lora_A", "lora_B", "expert"])
def test_a_load_checks_the_values(tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Non-finite values that appear after the reader has checked its file are an error, and nothing is changed."""
    saved, _ = made(SPECS["kept"])
    lx.save(saved, tmp_path)
    model, load = prepared(), seam("load into a cascade")

    def spoiled(cascade: lx.Cascade, *content: Any) -> None:
        load(cascade, *content)
        branch, state = branches_of(cascade)["body.weight"], weight_state(cascade, "body.weight")
        with torch.no_grad():
            (state.experts[0].b if tensor == "expert" else getattr(branch, tensor))[0, 0] = float("nan")

    name = "slow state of body.weight" if tensor == "expert" else "branch of body.weight"
    monkeypatch.setattr(*SEAMS["load into a cascade"], spoiled)
    with unchanged(model), raises(lx.CheckpointError, "sites-differ", name):
        lx.load(tmp_path, model, args=(X,))
    assert lx.adapt(model, args=(X,)).sites


def test_a_scheduler_that_raises_undoes_the_transition() -> None:
    cascade, optimizer = made()

    class Broken:
        def step(self) -> None:
            raise ZeroDivisionError

    stages = cascade.stages(2, optimizer, Broken())
    next(stages)
    step(cascade, optimizer, X)
    with unchanged(cascade, optimizer), pytest.raises(ZeroDivisionError):
        next(stages)
    cascade.transition(optimizer)
    assert cascade.stage == 3
