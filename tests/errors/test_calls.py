"""Calls at a wrong moment raise an error with a code, and change nothing, bit for bit."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251  # that a cascade is refused is what is tested
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorasc_fx as lx
from lorasc_fx.integrations.transformers import CascadeCallback
from tests.errors.models import SPEC, adapted, inputs, mlp, step
from tests.errors.state import of, unchanged
from tests.kit.errors import raises
from tests.kit.models import loss_of
from tests.kit.state import trainable, trained_in_full, variant_for

TRAINED = lx.CascadeSpec(rank=2, train=("3.*",), noise=lx.Noise(0.1))
X = inputs(4, 5, seed=3)


def test_a_cascade_is_not_pickled(tmp_path: Path) -> None:
    cascade, _ = adapted()
    for act in (pickle.dumps, ForkingPickler.dumps, lambda value: torch.save(value, tmp_path / "cascade.pt")):
        with unchanged(cascade), raises(lx.StateError, "not-serializable", "lorasc_fx.save", "release"):
            act(cascade)
    copied = copy.deepcopy(cascade)
    torch.testing.assert_close(copied(X), cascade(X), rtol=0, atol=0)
    assert type(copy.copy(cascade)) is type(cascade)
    released = cascade.release()
    torch.testing.assert_close(pickle.loads(pickle.dumps(released))(X), released(X))  # noqa: S301


# ---- after release


def slow_weights(cascade: lx.Cascade) -> None:
    """Enter and leave the block, so that no later test runs inside it."""
    with cascade.weights("slow"):
        pass


CALLS: dict[str, Callable[[lx.Cascade, Any, Path], Any]] = {
    "forward": lambda cascade, _, __: cascade(X),
    "variant": lambda cascade, _, __: variant_for(cascade, (X,), {}),
    "weights": lambda cascade, _, __: slow_weights(cascade),
    "folded_state_dict": lambda cascade, _, __: cascade.folded_state_dict(),
    "folded_graph": lambda cascade, _, __: cascade.folded_graph(),
    "release": lambda cascade, _, __: cascade.release(),
    "kept": lambda cascade, _, __: cascade.kept(),
    "param_groups": lambda cascade, _, __: cascade.param_groups(lr=1.0),
    "stages": lambda cascade, optimizer, __: cascade.stages(2, optimizer),
    "transition": lambda cascade, optimizer, __: cascade.transition(optimizer),
    "rewind": lambda cascade, optimizer, __: cascade.rewind(0, optimizer),
    "draw": lambda cascade, _, __: cascade.draw(),
    "resume": lambda cascade, optimizer, __: cascade.resume(optimizer),
    "save": lambda cascade, optimizer, path: lx.save(cascade, path / "run", optimizer=optimizer),
    "to": lambda cascade, _, __: cascade.double(),
    "train": lambda cascade, _, __: cascade.eval(),
    "state_dict": lambda cascade, _, __: cascade.state_dict(),
    "merge_and_unload": lambda cascade, _, __: cascade.merge_and_unload(),
    "disable_adapter": lambda cascade, _, __: cascade.disable_adapter().__enter__(),
    "print_trainable_parameters": lambda cascade, _, __: cascade.print_trainable_parameters(),
    "merge": lambda cascade, _, __: lx.merge([cascade], mlp(), (X,)),
    "export.peft": lambda cascade, _, path: lx.export.peft(cascade, path / "adapter"),
    "export.safetensors": lambda cascade, _, path: lx.export.safetensors(cascade, path / "weights"),
    "export.pt2": lambda cascade, _, path: lx.export.pt2(cascade, path / "model.pt2"),
    "CascadeCallback": lambda cascade, _, __: CascadeCallback(cascade),
}
OTHER_NAMES = {"merge_and_unload": "release", "disable_adapter": "weights"}


@pytest.fixture(scope="module")
def released() -> tuple[lx.Cascade, torch.optim.Optimizer, nn.Module]:
    cascade, optimizer = adapted()
    step(cascade, optimizer)
    return cascade, optimizer, cascade.release()


@pytest.mark.parametrize("call", CALLS)
def test_after_release(call: str, released: Any, tmp_path: Path) -> None:
    cascade, optimizer, model = released
    with unchanged(cascade, model, optimizer), raises(lx.StateError, "released", OTHER_NAMES.get(call, call)):
        CALLS[call](cascade, optimizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_public_call_is_tried_after_release() -> None:
    classes = [cls for cls in lx.Cascade.__mro__ if cls.__module__.startswith("lorasc_fx")]
    calls = [name for cls in classes for name, value in vars(cls).items() if callable(value)]
    public = {name for name in calls if not name.startswith("_")}
    assert public <= {*CALLS, "named_parameters"}  # which every module has, also after the release


def test_stages_that_were_asked_for_before_the_release() -> None:
    cascade, optimizer = adapted()
    for _ in cascade.stages(1, optimizer):
        step(cascade, optimizer)
    stages = cascade.stages(1, optimizer)
    model = cascade.release()
    with unchanged(model), raises(lx.StateError, "released"):
        next(stages)


# ---- inside a backward


@pytest.mark.parametrize("call", ["transition", "release", "weights", "rewind", "save", "folded_state_dict", "to"])
def test_inside_a_backward(call: str, tmp_path: Path) -> None:
    act = CALLS[call]
    cascade, optimizer = adapted()
    step(cascade, optimizer)
    output = cascade(X)
    seen = []

    def hook(_: torch.Tensor) -> None:
        before = of(cascade, optimizer)
        with raises(lx.StateError, "inside-backward", call):
            act(cascade, optimizer, tmp_path)
        seen.append(of(cascade, optimizer) == before)

    output.register_hook(hook)
    loss_of(output).backward()
    assert seen == [True]
    optimizer.step()
    optimizer.zero_grad()
    act(cascade, optimizer, tmp_path)  # and now it is right


# ---- gradients pending


@pytest.mark.parametrize("spec", [SPEC, TRAINED])
def test_gradients_that_no_step_has_used(spec: lx.CascadeSpec) -> None:
    cascade, optimizer = adapted(spec)
    step(cascade, optimizer)
    loss_of(cascade(X)).backward()
    pending = ("gradients-pending", "branches.0/weight.lora_A", "5 more")
    with unchanged(cascade, optimizer):
        with raises(lx.StateError, *pending, "transition"):
            cascade.transition(optimizer)
        with raises(lx.StateError, *pending, "release"):
            cascade.release()
        with cascade.weights("fast"):  # reads only
            cascade(X)
        cascade.folded_state_dict()
    optimizer.step()
    loss_of(cascade(X)).backward()  # accumulated on the gradients that the step has used
    with unchanged(cascade, optimizer), raises(lx.StateError, *pending, "transition"):
        cascade.transition(optimizer)
    optimizer.step()
    cascade.transition(optimizer)  # the gradients are used, but not zeroed


def test_one_gradient_is_enough() -> None:
    cascade, optimizer = adapted(TRAINED)
    loss_of(cascade(X)).backward()
    cascade.branches.zero_grad()
    cascade.model[3].bias.grad = None
    with unchanged(cascade, optimizer), raises(lx.StateError, "gradients-pending", "transition", "model.3.weight"):
        cascade.transition(optimizer)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("stepped", [True, False])
def test_gradients_that_were_used_or_dropped(to_none: bool, stepped: bool) -> None:
    cascade, optimizer = adapted(TRAINED)
    loss_of(cascade(X)).backward()
    if stepped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)
    cascade.transition(optimizer)
    assert cascade.stage == 2
    for parameter in trainable(cascade).values():
        assert parameter.grad is None


# ---- weights


@pytest.mark.parametrize("view", ["slow", "fast", "base"])
def test_inside_weights(view: Any, tmp_path: Path) -> None:
    cascade, optimizer = adapted(TRAINED)
    step(cascade, optimizer)
    calls = (
        "transition", "release", "stages", "weights", "folded_state_dict", "folded_graph", "rewind", "save",
        "export.peft", "resume", "state_dict", "to",
    )  # fmt: skip
    with unchanged(cascade, optimizer), cascade.weights(view), unchanged(cascade, optimizer):
        for call in calls:
            with raises(lx.StateError, "inside-weights", call, view):
                CALLS[call](cascade, optimizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stage_that_ends_inside_weights() -> None:
    cascade, optimizer = adapted()
    stages = cascade.stages(2, optimizer)
    next(stages)
    step(cascade, optimizer)
    with cascade.weights("slow"), unchanged(cascade, optimizer), raises(lx.StateError, "inside-weights", "slow"):
        next(stages)


@pytest.mark.parametrize(("view", "names"), [("slwo", ("'slwo'", "nearest: 'slow'")), (1, ("1", "slow, fast, base"))])
def test_weights_of_an_unknown_name(view: Any, names: tuple[str, ...]) -> None:
    cascade, optimizer = adapted()
    with unchanged(cascade, optimizer), raises(lx.StateError, "unknown-name", *names):
        cascade.weights(view).__enter__()


def test_an_error_inside_weights_restores_them() -> None:
    cascade, optimizer = adapted(TRAINED)
    step(cascade, optimizer)
    with unchanged(cascade, optimizer), pytest.raises(ZeroDivisionError), cascade.weights("base"):
        raise ZeroDivisionError


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_a_capture_inside_a_transform_of_torch_func(transform: str) -> None:
    """With a graph for the inner call, the transform works."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    cascade = lx.adapt(model, (torch.randn(4, 6),))
    inner, x = torch.randn(4, 3, 6), torch.randn(2, 4, 3, 6)

    def call() -> torch.Tensor:
        return torch.vmap(cascade)(x) if transform == "vmap" else torch.func.grad(lambda v: cascade(v).sum())(inner)

    with raises(lx.StateError, "not-captured", "outside", "vmap"):
        call()
    cascade(inner)
    assert call().shape == ((2, 4, 3, 2) if transform == "vmap" else inner.shape)


# ---- optimizers and stages


def test_an_optimizer_without_the_branches() -> None:
    cascade, _ = adapted(TRAINED)
    branches, trained = list(cascade.branches.parameters()), list(trained_in_full(cascade).values())
    names = "branches.0/weight.lora_A, branches.0/weight.lora_B, branches.2/weight.lora_A"
    for parameters, missing in (
        ([nn.Parameter(torch.zeros(1))], f"{names} and 3 more"),
        (trained, f"{names} and 1 more"),
        (branches[1:] + trained, "branches.0/weight.lora_A"),
        (branches, "model.3.weight, model.3.bias"),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        with unchanged(cascade, optimizer):
            with raises(lx.StateError, "optimizer-lacks-parameters", missing):
                cascade.transition(optimizer)
            with raises(lx.StateError, "optimizer-lacks-parameters", missing):
                cascade.stages(2, optimizer)


@pytest.mark.parametrize("count", [0, True, 2.0])
def test_a_wrong_number_of_stages(count: Any) -> None:
    cascade, optimizer = adapted()
    with unchanged(cascade, optimizer), raises(lx.SpecError, "invalid-value", count):
        cascade.stages(count, optimizer)


@pytest.mark.parametrize("spec", [SPEC, TRAINED])
def test_training_on_after_the_last_stage(spec: lx.CascadeSpec) -> None:
    cascade, optimizer = adapted(spec)
    for _ in cascade.stages(2, optimizer):
        step(cascade, optimizer)
    if spec is SPEC:
        step(cascade, optimizer)
    else:  # what is trained in full counts, too
        with torch.no_grad():
            cascade.model[3].bias += 1
    stages = cascade.stages(1, optimizer)
    with unchanged(cascade, optimizer), raises(lx.StateError, "stage-not-ended"):
        next(stages)
    cascade.transition(optimizer)
    assert next(cascade.stages(1, optimizer)).number == 4


def test_resume_of_a_cascade_that_was_not_loaded() -> None:
    cascade, optimizer = adapted()
    with unchanged(cascade, optimizer), raises(lx.StateError, "not-available"):
        cascade.resume(optimizer)


# ---- non-finite branches


@pytest.mark.parametrize(("factor", "value"), [("lora_A", float("nan")), ("lora_B", float("-inf"))])
def test_a_non_finite_branch(factor: str, value: float, tmp_path: Path) -> None:
    cascade, optimizer = adapted(TRAINED)
    step(cascade, optimizer)
    cascade.transition(optimizer)
    step(cascade, optimizer)
    with torch.no_grad():
        getattr(cascade.branches["2/weight"], factor)[0, 0] = value
    calls: tuple[Callable[[], Any], ...] = (
        lambda: cascade.transition(optimizer),
        cascade.folded_state_dict,
        cascade.folded_graph,
        cascade.release,
    )
    for call in calls:
        with unchanged(cascade, optimizer), raises(lx.NonFiniteBranch, "non-finite", "2.weight", "2"):
            call()
    stages = cascade.stages(1, optimizer)
    next(stages)
    with unchanged(cascade, optimizer), raises(lx.NonFiniteBranch, "non-finite", "2.weight", "2"):
        next(stages)
    with cascade.weights("slow"):  # the slow weights are still finite
        assert all(bool(value.isfinite().all()) for value in cascade.model.state_dict().values())


# ---- a weight that another mode uses in an unknown form


class Written(nn.Module):
    """A linear in train mode; in eval mode the weight is written to as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.other = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.weight.detach().mul_(1.0)
        return self.other(F.linear(x, self.weight))


def test_a_planned_weight_that_another_mode_writes_to() -> None:
    model = Written()
    cascade = lx.adapt(model, args=(X,), spec=SPEC)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    step(cascade, optimizer)
    expected = cascade(X)
    cascade.eval()
    with (
        unchanged(cascade, optimizer),
        raises(lx.PassError, "method-not-supported", "node mul_", "exclude=('weight',)"),
    ):
        cascade(X)
    cascade.train()
    assert torch.equal(cascade(X), expected)
    step(cascade, optimizer)
    cascade.transition(optimizer)
    assert cascade.release() is model


# ---- paths


def test_a_path_with_a_nul_byte() -> None:
    cascade, optimizer = adapted()
    with unchanged(cascade, optimizer), raises(lx.SpecError, "invalid-value"):
        lx.save(cascade, "run\0s/here")


def test_a_model_that_deepspeed_has_sharded() -> None:
    model = mlp()
    model[0].weight.ds_id = 0
    with raises(lx.StateError, "sharded", "0.weight", "parallel.fsdp.shard"):
        lx.adapt(model, args=(inputs(2, 5),), spec=lx.CascadeSpec(rank=1))
