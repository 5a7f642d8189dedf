"""A graph that computes something else than its model is refused; autograd graphs with equal edges need no backward."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import lorasc_fx as lx
from lorasc_fx.check.observe import difference_of, observe
from lorasc_fx.check.preflight import Disagreement, check_agrees, run_preflight
from lorasc_fx.check.projections import autograd_edges
from tests.kit.errors import raises
from tests.kit.models import TwoLayers, assert_merged, batches, branches, build, merged, randomize
from tests.kit.seams import SEAMS, seam
from tests.kit.state import variant_count

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0)
X = batches(3, 4, 5)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def refuse(make: Callable[[], nn.Module], frontend: str, sentence: str) -> None:
    model = build(make)
    with raises(lx.CaptureError, "not-captured", type(model).__name__, f"\n  {frontend}: {sentence}"):
        lx.adapt(model, (X[0],), spec=SPEC, frontend=frontend)


def assert_goes_as_eager(make: Callable[[], nn.Module], cascade: lx.Cascade) -> None:
    """Compare outputs and gradients of the branches, over several calls, with autograd through W + s B A."""
    randomize(cascade)
    twin = build(make).train(cascade.training).requires_grad_(False)
    for x in X:
        assert_merged(cascade, twin, x)


class Steep(torch.autograd.Function):
    """Rounds, with a custom backward that differs from the derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        return slope * (3.0 - ctx.saved_tensors[0].sin())


class Rounds(TwoLayers):
    """Rounds the activations between its layers."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return Steep.apply(x)


@pytest.mark.parametrize("frontend", ["export", "auto", "eager"])
def test_a_function_keeps_its_own_backward(frontend: str) -> None:
    reason = "RuntimeError: the model uses the autograd.Function Steep, whose backward a traced graph does not keep"
    if frontend == "export":
        refuse(Rounds, frontend, reason)
        return
    cascade = lx.adapt(build(Rounds), (X[0],), spec=SPEC, frontend=frontend)
    assert cascade.frontend == "eager"
    assert cascade.refused_frontends == ((("export", reason),) if frontend == "auto" else ())
    assert {site.weight for site in cascade.sites} == {"body.weight", "head.weight"}
    assert_goes_as_eager(Rounds, cascade)


class Counts(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = 0

    def between(self, x: torch.Tensor) -> torch.Tensor:
        self.kept += 1
        return x * self.kept


def test_state_in_python() -> None:
    reason = "RuntimeError: the model sets its attribute kept in each call, which a graph does not repeat"
    refuse(Counts, "export", reason)
    model = build(Counts)
    cascade = lx.adapt(model, (X[0],), spec=SPEC)
    assert (cascade.frontend, model.kept) == ("eager", 0)
    assert_goes_as_eager(Counts, cascade)


class Caches(TwoLayers):
    """Only the first call sets an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = None

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            self.scale = 1.0 + x.shape[-1]
        return x * self.scale


@pytest.mark.parametrize("frontend", ["auto", "export", "eager"])
def test_an_attribute_that_only_the_first_call_sets_is_not_state(frontend: str) -> None:
    model = build(Caches)
    cascade = lx.adapt(model, (X[0],), spec=SPEC, frontend=frontend)
    assert model.scale is None
    assert cascade.frontend == ("export" if frontend == "auto" else frontend)
    assert_goes_as_eager(Caches, cascade)


class Grows(TwoLayers):
    """Replaces a buffer by a larger one in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 7))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.seen.sum(0)
        self.seen = torch.cat([self.seen, x.detach()[:1]])
        return y


def test_a_buffer_of_another_shape() -> None:
    sentence = "Disagreement: its graph does something else than the model: it raises RuntimeError: output with shape"
    refuse(Grows, "export", sentence)
    model = build(Grows)
    buffer, value = model.seen, model.seen.clone()
    cascade = lx.adapt(model, (X[0],), spec=SPEC)
    assert cascade.frontend == "eager"
    assert model.seen is buffer
    assert torch.equal(model.seen, value)
    assert_goes_as_eager(Grows, cascade)
    assert model.seen.shape == (1 + len(X), 7)


class Modes(TwoLayers):
    """Computes one half in another mode of torch."""

    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.mode = mode

    def between(self, x: torch.Tensor) -> torch.Tensor:
        with self.mode():
            y = x.sin()
        return x + y.detach()


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", MODES)
def test_modes_that_forward_switches(name: str) -> None:
    def make() -> nn.Module:
        return Modes(MODES[name])

    assert_goes_as_eager(make, lx.adapt(build(make), (X[0],), spec=SPEC))


class Draws(TwoLayers):
    """Draws random numbers in Python."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1.0 + self.draw())


def seeded_draw() -> float:
    random.seed(3)
    return random.random()


def test_a_model_that_seeds_itself_has_a_graph() -> None:
    assert_goes_as_eager(
        lambda: Draws(seeded_draw), lx.adapt(build(lambda: Draws(seeded_draw)), (X[0],), spec=SPEC, frontend="export")
    )


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_draws_in_python(draw: Callable[[], float]) -> None:
    refuse(lambda: Draws(draw), "export", "RuntimeError: the model draws random numbers in Python, which the graph")
    before = random.getstate(), str(np.random.get_state())
    cascade = lx.adapt(build(lambda: Draws(draw)), (X[0],), spec=SPEC)
    assert (random.getstate(), str(np.random.get_state())) == before
    assert cascade.frontend == "eager"
    assert_goes_as_eager(lambda: Draws(draw), cascade)


@pytest.mark.filterwarnings("ignore:`?torch.nn.utils")
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "called"])
@pytest.mark.parametrize(
    ("norm", "parameter"),
    [
        (nn.utils.weight_norm, "weight_v"),
        (nn.utils.spectral_norm, "weight_orig"),
        (lambda module: prune.l1_unstructured(module, "weight", 3), "weight_orig"),
    ],
    ids=["weight", "spectral", "pruned"],
)
def test_weights_that_old_hooks_compute_are_one_graph(
    norm: Callable[[nn.Module], nn.Module], parameter: str, fresh: bool, tmp_path: Path
) -> None:
    """The result is the same before and after a first call. Before it, the attribute may alias its parameter."""

    def make() -> nn.Module:
        model = nn.Sequential(norm(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 3)).eval()
        if not fresh:
            model(torch.ones(2, 5))
        return model

    cascade = lx.adapt(build(make), (X[0],), spec=SPEC)
    assert cascade.frontend == "export"
    assert {site.weight for site in cascade.sites} == {f"0.{parameter}", "2.weight"}
    lx.save(cascade, tmp_path)
    assert len(lx.load(tmp_path, build(make)).sites) == 2
    assert_goes_as_eager(make, cascade)


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_that_keeps_outputs_runs_at_each_call(before: bool) -> None:
    model, kept = build(TwoLayers), dict[str, torch.Tensor]()

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        kept["body"] = output

    if before:
        model.get_submodule("body").register_forward_hook(keep)
    cascade = lx.adapt(model, (X[0],), spec=SPEC)
    assert not kept
    randomize(cascade)
    if not before:
        model.get_submodule("body").register_forward_hook(keep)
    (branch,) = [item for name, item in branches(cascade).items() if name == "body.weight"]
    body = build(TwoLayers).get_submodule("body")
    for x in X[1:]:
        cascade(x)
        torch.testing.assert_close(
            kept["body"], body(x) + 1.5 * x @ branch.lora_A.T @ branch.lora_B.T, rtol=0, atol=1e-12
        )
        kept["body"].square().sum().backward()
        assert branch.lora_B.grad is not None
    refuse(lambda: copy.deepcopy(model), "export", "RuntimeError: body has a forward hook that returns None")


class Turns(TwoLayers):
    """Negates gradients by a hook on an autograd node, which no tracer sees."""

    def between(self, x: Tensor) -> Tensor:
        node = torch.autograd.graph.get_gradient_edge(x).node if x.requires_grad else None
        if node is not None:
            node.register_prehook(lambda gradients: (-gradients[0],))
        return x


class Reverses(TwoLayers):
    """Negates gradients by a tensor hook, optionally in train mode only."""

    def __init__(self, always: bool = True, breaks: bool = False) -> None:
        super().__init__()
        self.always, self.breaks = always, breaks

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.breaks and float(x.detach().abs().sum()) < 0:
            return x
        if x.requires_grad and (self.always or self.training):
            x.register_hook(lambda gradient: -gradient)
        return x


@pytest.mark.parametrize("make", [Reverses, Turns])
def test_a_hook_on_a_tensor_or_its_node_is_kept(make: type[nn.Module]) -> None:
    with raises(lx.CaptureError, "not-captured", "export: ", "the gradient of body.weight is off by 2.0e+00"):
        lx.adapt(build(make), (X[0],), spec=SPEC, frontend="export")
    cascade = lx.adapt(build(make), (X[0],), spec=SPEC)
    assert cascade.frontend == "eager"
    assert_goes_as_eager(make, cascade)


@pytest.mark.parametrize("breaks", [False, True], ids=["whole", "eager"])
def test_a_tensor_hook_of_a_later_mode_is_kept(breaks: bool) -> None:
    def make() -> nn.Module:
        return Reverses(always=False, breaks=breaks)

    cascade = lx.adapt(build(make).eval(), (X[0],), spec=SPEC)
    assert cascade.frontend == ("eager" if breaks else "export")
    assert_goes_as_eager(make, cascade)
    assert_goes_as_eager(make, cascade.train())


class Asks(TwoLayers):
    """Computes something else if no gradient is required."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.requires_grad else x


class AsksMode(TwoLayers):
    """Computes something else without gradients."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if torch.is_grad_enabled() else x


@pytest.mark.parametrize("make", [Asks, AsksMode])
@pytest.mark.parametrize("frontend", ["export", "eager"])
def test_forward_reads_the_state_of_gradients_as_in_training(make: type[TwoLayers], frontend: str) -> None:
    cascade = lx.adapt(build(make), (X[0],), spec=SPEC, frontend=frontend)
    assert_goes_as_eager(make, cascade)
    twin = build(make)
    with torch.no_grad():
        expected = torch.func.functional_call(twin, merged(cascade, twin), (X[0],))
        torch.testing.assert_close(cascade(X[0]), expected, rtol=0, atol=1e-12)
    assert_goes_as_eager(make, cascade)
    assert variant_count(cascade) == (2 if frontend == "export" else 1)


class Forces(TwoLayers):
    """Computes the gradient of an energy in forward."""

    def __init__(self, switches: bool = False) -> None:
        super().__init__()
        self.switches = switches

    def forward(self, x: torch.Tensor) -> Any:
        with torch.set_grad_enabled(self.switches or torch.is_grad_enabled()):
            x = x.detach().requires_grad_()
            energy = super().forward(x).sum()
            return -torch.autograd.grad(energy, x, create_graph=True)[0]


@pytest.mark.parametrize("switches", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_differentiates_in_forward(switches: bool, training: bool) -> None:
    def make() -> nn.Module:
        return Forces(switches)

    cascade = lx.adapt(build(make).train(training), (X[0],), spec=SPEC)
    assert {site.weight for site in cascade.sites} == {"body.weight", "head.weight"}
    assert_goes_as_eager(make, cascade)
    with torch.no_grad():
        if switches:
            torch.testing.assert_close(cascade(X[0]), cascade(X[0]).detach(), rtol=0, atol=1e-12)
            return
        with pytest.raises(RuntimeError, match="does not require grad"):
            cascade(X[0])


class AsksInput(TwoLayers):
    """Computes something else for inputs that require gradients, as in an adversarial attack."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x * 2 if x.requires_grad else x)


@pytest.mark.parametrize("tracked_first", [False, True])
def test_inputs_that_require_gradients_get_a_separate_graph_if_the_model_reads_the_flag(
    tracked_first: bool,
) -> None:
    plain, tracked = X[0], X[0].clone().requires_grad_()
    cascade = lx.adapt(build(AsksInput), (tracked if tracked_first else plain,), spec=SPEC, frontend="export")
    randomize(cascade)
    twin = build(AsksInput)
    compiled = torch.compile(cascade, backend="eager")
    for x in (plain, tracked, plain, tracked):
        expected = torch.func.functional_call(twin, merged(cascade, twin), (x,))
        torch.testing.assert_close(cascade(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-12)
    assert variant_count(cascade) == 2
    never = lx.adapt(build(TwoLayers), (plain,), spec=SPEC)
    never(tracked)
    assert variant_count(never) == 1


def written(x: Tensor) -> Tensor:
    return x.mul_(3) / 3


DIFFERENCES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "an output has other types, Tensor instead of ('list', ('Tensor',))": (lambda x: x, lambda x: [x]),
    "an output has 2 tensors instead of 1": (
        lambda x: SimpleNamespace(a=x, b=x * 2),
        lambda x: SimpleNamespace(a=x, b=x),
    ),
    "an output is torch.float64 (2, 2) instead of torch.float64 (4,)": (lambda x: x.view(2, 2) * 1, lambda x: x * 1),
    "an output is torch.float32 (4,) instead of torch.float64 (4,)": (lambda x: x.float(), lambda x: x * 1),
    "an output is different": (lambda x: x > 1, lambda x: x > 2),
    "an output is not finite in the same places": (lambda x: 1 / (x - 1), lambda x: 1 / (x - 2)),
    "an output is off by 1.0e-01 of its largest entry": (lambda x: 1.1 / (x - 1), lambda x: 1 / (x - 1)),
    "an output is off by 2.5e-01 of its largest entry": (lambda x: [x * 1, x + 1], lambda x: [x * 1, x * 1]),
    "an argument after the call is off by 6.7e-01 of its largest entry": (lambda x: x * 1, written),
}


@pytest.mark.parametrize("phrase", DIFFERENCES)
def test_differences_of_two_executions(phrase: str) -> None:
    graph, model = DIFFERENCES[phrase]
    trials = [observe(call, nn.Module(), (torch.arange(1.0, 5.0).double(),), {}) for call in (graph, model, model)]
    assert difference_of(trials[0], trials[1]) == phrase
    assert difference_of(trials[1], trials[2]) is None


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e4 * 2**-52), (torch.float32, 1e4 * 2**-23), (torch.bfloat16, 0.1)]
)
def test_a_difference_up_to_rounding_of_the_dtype_is_none(dtype: torch.dtype, allowed: float) -> None:
    x = torch.ones(2, dtype=dtype)
    trials = [observe(lambda x, by=by: x * (1 + by * allowed), nn.Module(), (x,), {}) for by in (0, 0.9, 1.1)]
    assert [difference_of(trial, trials[0]) is None for trial in trials] == [True, True, False]


@pytest.mark.parametrize(("by", "other"), [(0.5, 0), (0.5, 0.25), (2e-3, 0), (1e-3, 0)])
def test_differences_of_gradients(by: float, other: float) -> None:
    """The values agree. A part of one or two gradients is missing in the graph."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5, bias=False))

    def graph(x: Tensor) -> Tensor:
        first, second = (
            (1 - cut) * weight + cut * weight.detach() for weight, cut in zip(weights, (by, other), strict=True)
        )
        return F.linear(F.linear(x, first, model[0].bias), second)

    weights = [model[0].weight, model[1].weight]
    call = (X[0].float(),), {}
    preflight = run_preflight(model, *call)
    computed, expected = (observe(run, model, *call, backward=True) for run in (graph, model))
    more = ", and 1 more gradients differ" if other else ""
    assert difference_of(computed, expected, gradients=False) is None
    if by == 1e-3:  # below ROUNDING * eps
        assert difference_of(computed, expected) is None
        check_agrees(graph, preflight, model, *call)
        return
    phrase = f"the gradient of 0.weight is off by {by:.1e} of its norm{more}"
    assert difference_of(computed, expected) == phrase
    with pytest.raises(Disagreement, match=phrase):
        check_agrees(graph, preflight, model, *call)
    check_agrees(model, preflight, model, *call)


Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_edges(run: Run) -> tuple[Any, Tensor, list[Tensor]]:
    """Return the edges of the autograd graph of a run, its output, and its gradients."""
    v, w = (torch.ones(4, requires_grad=True) for _ in range(2))
    x = torch.tensor([[2.0, -4.0, 8.0, 1.0], [4.0, 2.0, -2.0, 2.0], [1.0, 1.0, 4.0, -8.0]], requires_grad=True)
    output = run(v, w, x)
    gradients = torch.autograd.grad(output.sum(), (v, w, x), allow_unused=True, materialize_grads=True)
    return autograd_edges([output], {"v": v, "w": w, "x": x}), output, list(gradients)


DIFFERENT: dict[str, tuple[Run, Run]] = {
    "another weight of the same values": (lambda v, w, x: x * v, lambda v, w, x: x * w),
    "a part without gradient": (lambda v, w, x: x * v, lambda v, w, x: 0.5 * x * v + (0.5 * x * v).detach()),
    "a factor without gradient": (lambda v, w, x: x * v * w, lambda v, w, x: x * v * w.detach()),
    "a weight without gradient in one of two uses": (
        lambda v, w, x: x * v + v,
        lambda v, w, x: x * v + v.detach(),
    ),
    "a sum of weights instead of one": (lambda v, w, x: x * v + x * v, lambda v, w, x: x * v + x * w),
    "one output of several": (lambda v, w, x: (v * w).unbind()[0], lambda v, w, x: (v * w).unbind()[1]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_gradients_of_equal_values_are_other_edges(name: str) -> None:
    results = map(run_edges, DIFFERENT[name])
    edges, outputs, gradients = zip(*results, strict=True)
    assert torch.equal(*outputs)
    assert edges[0] != edges[1]
    assert not all(map(torch.equal, *gradients))


class Slices(TwoLayers):
    """A slice of all rows has a different autograd node in Python than in a graph."""

    def between(self, x: Tensor) -> Tensor:
        return x[:, :]


@pytest.mark.parametrize("make", [TwoLayers, Slices])
def test_no_backward_runs_where_graphs_are_the_same(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    before = seam("backward")
    monkeypatch.setattr(*SEAMS["backward"], lambda *args: called.append(1) or before(*args))
    lx.adapt(build(make), (batches(1, 4, 5)[0],), spec=SPEC, frontend="export")
    assert not called
