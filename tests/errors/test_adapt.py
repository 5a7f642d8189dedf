"""What `adapt` refuses: one sentence, and model, flags, modes, graph and random generators as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import fx, nn
from torch.nn.utils import prune

import lorasc_fx as lx
from tests.errors.models import Net, adapted, inputs, mlp
from tests.errors.state import unchanged
from tests.kit.errors import raises, warns
from tests.kit.seams import SEAMS

X = inputs(2, 5)


def parametrized(model: nn.Module) -> str:
    nn.utils.parametrizations.weight_norm(model[0])  # type: ignore[index]
    return "0.parametrizations.weight.original1"


def pruned(model: nn.Module) -> str:
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index, no-untyped-call]
    return "0.weight_orig"


def refuse(kind: Any, expected: tuple[str, ...], model: nn.Module, *args: Any, **options: Any) -> None:
    """`adapt` raises this code with these names, and leaves the model as it was."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))  # flags that adapt would change
    model.eval()
    next(model.children(), model).train()
    with unchanged(model), raises(kind, *expected):
        lx.adapt(model, args=args or (X,), **options)


class Odd(nn.Module):
    """One weight that is only added, one that no graph reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(inputs(5, 3))
        self.spare = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] + self.table[:2]


@pytest.mark.parametrize(
    ("frontend", "node"),
    [
        ("export", "torch.ops.aten.add.Tensor"),
        ("eager", ""),
    ],
)
def test_no_sites_by_the_model(frontend: str, node: str) -> None:
    names = ("table: no-form", f"node add (call_function {node})" if node else "the model uses it", "spare")
    refuse(lx.passes.NoSites, ("no-sites", *names), Odd(), frontend=frontend)


@pytest.mark.parametrize("frontend", ["export", "eager"])
def test_weights_that_are_multiplied_entry_by_entry_or_complex(frontend: str) -> None:
    """What is told of them is so: both multiply, and both have gradients."""

    class Multiplies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(2, 5))
            self.mix = nn.Parameter(torch.ones(5, 3, dtype=torch.complex64))
            self.last = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(((x * self.gate).to(torch.complex64) @ self.mix).real)

    cascade = lx.adapt(Multiplies(), (X,), spec=lx.CascadeSpec(rank=2), frontend=frontend)
    told = {refusal.weight: refusal.sentence for refusal in cascade.refusals}
    assert told.keys() == {"gate", "mix"}
    assert told["gate"].endswith(" uses it neither in a matrix product or convolution nor as an embedding table")
    assert told["mix"] == "its dtype is torch.complex64, but branches are real"


@pytest.mark.parametrize(
    ("args", "kwargs", "sentence"),
    [
        (X, None, ("invalid-value", "args", "Tensor")),
        ({"input": X}, None, ("invalid-value", "args")),
        ((), (X,), ("invalid-value", "kwargs")),
    ],
)
def test_inputs_that_are_no_sequence(args: Any, kwargs: Any, sentence: tuple[str, ...]) -> None:
    with unchanged(model := mlp()), raises(lx.CaptureError, *sentence):
        lx.adapt(model, args, kwargs)


def test_a_lazy_module() -> None:
    model = nn.Sequential(nn.LazyLinear(7), nn.Linear(7, 3))
    with raises(lx.CaptureError, "meta-model", "0.weight"):
        lx.adapt(model, (X,))
    model(X)
    assert len(lx.adapt(model, (X,)).sites) == 2


def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript() -> None:
    model = mlp()
    for given in (torch.jit.script(model), torch.jit.trace(model, (X,)), torch.jit.script(halved)):
        told = "neither torch.export nor torch.fx can trace TorchScript. Pass the nn.Module from which it was scripted"
        with raises(lx.CaptureError, "not-a-model", "model", told):
            lx.adapt(given, (X,))  # type: ignore[arg-type]


@pytest.mark.parametrize("frontend", ["auto", "export"])
def test_inputs_of_a_wrong_number(frontend: str) -> None:
    expected = ("invalid-value", "Sequential.forward", "too many positional arguments", "(input)")
    refuse(lx.CaptureError, expected, mlp(), X, X, frontend=frontend)
    with unchanged(model := mlp()), raises(lx.CaptureError, "invalid-value", "missing a required argument: 'input'"):
        lx.adapt(model, frontend=frontend)


@pytest.mark.parametrize("frontend", ["auto", "export"])
def test_kwargs_that_the_forward_does_not_take(frontend: str) -> None:
    expected = ("invalid-value", "Sequential.forward", "'mask'", "(input)")
    refuse(lx.CaptureError, expected, mlp(), kwargs={"mask": X}, frontend=frontend)


@pytest.mark.parametrize("frontend", ["auto", "export"])
@pytest.mark.parametrize(
    ("build", "value", "reason"),
    [
        (mlp, inputs(2, 6), "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x6 and 5x7)"),
        (mlp, torch.ones(2, 5, dtype=torch.int64), "RuntimeError: mat1 and mat2 must have the same dtype"),
        (mlp, torch.ones(2, 5, dtype=torch.float64), "RuntimeError: mat1 and mat2 must have the same dtype"),
        (mlp, "text", "TypeError: linear(): argument 'input'"),
        (
            Net,
            inputs(2, 4, 8, 8),
            "RuntimeError: Given groups=1, weight of size [6, 3, 3, 3], expected input[2, 4, 8, 8]",
        ),
    ],
    ids=["shape", "integers", "precision", "no tensor", "channels"],
)
def test_inputs_that_the_model_refuses(frontend: str, build: Any, value: Any, reason: str) -> None:
    model = build()
    expected = ("model-refuses-inputs", type(model).__name__, reason)
    refuse(lx.CaptureError, expected, model, value, frontend=frontend)


class Branchy(nn.Module):
    """Control flow that depends on data: no single graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(5, 3), nn.Linear(5, 3), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.one(x) if x.sum() > 0 else self.two(x)


class Frozen(nn.Module):
    """Runs, but not where gradients are recorded: nothing can train it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise ValueError("no gradients here")
        return self.one(x)


class Once(Frozen):
    """Runs once."""

    calls: ClassVar[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(1)
        if len(self.calls) > 1:
            raise ValueError("once is enough")
        return self.one(x)


def test_a_model_that_runs_without_gradients_only() -> None:
    refuse(lx.CaptureError, ("model-refuses-inputs", "Frozen", "ValueError: no gradients here"), Frozen())


def test_a_model_that_no_front_end_takes() -> None:
    Once.calls.clear()
    reasons = "\n  export: ValueError: once is enough\n  eager: ValueError: once is enough"
    refuse(lx.CaptureError, ("not-captured", "Once", reasons), Once())


def test_a_model_that_no_graph_holds_runs_eagerly() -> None:
    cascade = lx.adapt(Branchy(), args=(X,))
    assert cascade.frontend == "eager"
    refused = dict(cascade.refused_frontends)
    assert list(refused) == ["export"]
    assert refused["export"].startswith("GuardOnDataDependentSymNode: Could not guard on data-dependent")


class Uncopied(Branchy):
    """Holds a tensor with a history, which deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.one.weight * 2


def test_a_model_that_cannot_be_copied_still_gets_the_front_ends_reasons() -> None:
    with raises(lx.CaptureError, "not-captured", "Uncopied", "Guard"):
        lx.adapt(Uncopied(), args=(X,), frontend="export")
    assert lx.adapt(Uncopied(), args=(X,)).frontend == "eager"


@pytest.mark.parametrize("place", ["cpu", "disk", "two hooks"])
def test_a_model_whose_weights_accelerate_offloads(place: str, tmp_path: Path) -> None:
    model = mlp()
    if place == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    if place == "two hooks":
        for module in model.modules():
            add_hook_to_module(module, ModelHook(), append=True)
    output = model(X)
    before = {name: id(each) for name, each in model.named_parameters()}
    with raises(lx.CaptureError, "meta-model", "0, 2, 3", "device_map"):
        lx.adapt(model, (X,))
    assert {name: id(each) for name, each in model.named_parameters() if each.requires_grad} == before
    assert torch.equal(model(X), output)


def test_an_unknown_front_end() -> None:
    refuse(lx.CaptureError, ("unknown-name", "frontend", "exprot", "export"), mlp(), frontend="exprot")
    graph_module = fx.symbolic_trace(mlp())
    with unchanged(graph_module), raises(lx.CaptureError, "unknown-name", "frontend", "exprot", "export"):
        lx.adapt(graph_module, args=(X,), frontend="exprot")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"rank": 8}, ("invalid-value", "spec", "dict")),
        (lx.CascadeSpec, ("invalid-value", "spec", "type")),
        (lx.Noise(0.1), ("invalid-value", "spec", "Noise")),
    ],
)
def test_a_spec_that_is_none(spec: Any, sentence: tuple[str, ...]) -> None:
    refuse(lx.SpecError, sentence, mlp(), spec=spec)


def test_a_model_that_is_none() -> None:
    for model, name in ((mlp, "function"), (None, "NoneType"), (fx.symbolic_trace(mlp()).graph, "Graph")):
        with raises(lx.CaptureError, "not-a-model", name):
            lx.adapt(model, args=(X,))


def twice(model: nn.Module, name: str) -> None:
    with unchanged(model), raises(lx.StateError, "already-adapted", name):
        lx.adapt(model, args=(X,))


def test_adapting_twice() -> None:
    model = mlp()
    cascade, _ = adapted(model=model)
    twice(model, "0.weight")
    twice(model[3], "weight")  # a part
    twice(nn.Sequential(nn.Identity(), model), "1.0.weight")  # a whole
    shared = nn.Linear(6, 2)
    shared.bias = model[3].bias  # a parameter without a branch is the cascade's too
    twice(shared, "bias")
    for holder, held in ((cascade, "This model"), (nn.Sequential(cascade), "This model")):
        with unchanged(cascade), raises(lx.StateError, "already-adapted", held):
            lx.adapt(holder, args=(X,))


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        ("register_hook", lambda model: "0.weight"),
        ("register_post_accumulate_grad_hook", lambda model: "0.weight"),
        ("register_hook", parametrized),
        ("register_hook", pruned),
    ],
)
def test_hooks_on_a_parameter(kind: str, wrap: Callable[[nn.Module], str]) -> None:
    """What is adapted gets no gradient, so that its hooks are never called; what trains in full calls them."""
    called: list[str] = []
    model = mlp()
    name = wrap(model)
    hooked = {key: model.get_parameter(key) for key in (name, "3.weight")}
    handles = [getattr(value, kind)(lambda _, key=key: called.append(key)) for key, value in hooked.items()]
    spec = lx.CascadeSpec(rank=2, train=("3.weight",))
    with warns("hook-not-called", f"{name}: a hook"):
        cascade = lx.adapt(model, args=(X,), spec=spec)
    called.clear()  # the first run of the model has gradients too
    cascade(X).sum().backward()
    assert called == ["3.weight"]
    cascade.zero_grad()
    model = cascade.release()
    handles[0].remove()
    lx.adapt(model, args=(X,), spec=spec)  # silent


@pytest.mark.parametrize("fault", [RecursionError("too deep"), lx.passes.VerifyError("too deep")], ids=repr)
def test_a_fault_after_the_capture_is_a_capture_error(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise fault

    monkeypatch.setattr(*SEAMS["insert"], fail)
    refuse(lx.CaptureError, ("not-captured", "Sequential was captured", "too deep"), mlp())


def test_integers_cannot_be_trained_in_full() -> None:
    model = mlp()
    model.register_parameter("count", nn.Parameter(torch.tensor([3]), requires_grad=False))
    refuse_flags = lx.CascadeSpec(train=("count",))
    with unchanged(model), raises(lx.SpecError, "not-trainable", "count", "torch.int64"):
        lx.adapt(model, args=(X,), spec=refuse_flags)
