"""The front end `graph-breaks`: the subgraphs of dynamo, with branches, compute the same as the eager model."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorasc_fx as lx
from tests.kit.errors import raises, warns
from tests.kit.models import (
    Breaking,
    TwoLayers,
    assert_merged,
    batches,
    branches,
    loss_of,
    optimizer_of,
    randomize,
)
from tests.kit.seams import SEAMS, lower

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Branchy(nn.Module):
    """Values decide which layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        return self.left(hidden) if x.sum() > 0 else self.right(hidden)


class Items(TwoLayers):
    """Computes with numpy, and with a number from item(), between layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        size = float(np.log1p(abs(x.detach().sum().item())))
        order = torch.from_numpy(np.argsort(x.detach().numpy().sum(1)))
        return self.head(hidden[order] * size)


class Experts(nn.Module):
    """A loop over the experts that a router has selected. Each expert is a separate module."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(4))
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).softmax(1)
        chosen = scores.argmax(1)
        output = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            rows = (chosen == index).nonzero()[:, 0]
            output = output.index_add(0, rows, self.experts[index](x[rows]) * scores[rows, index, None])
        return self.head(x + output)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        torch._dynamo.graph_break()
        return x + self.down(hidden)


class Stack(nn.Module):
    """Layers of one class, whose graphs dynamo shares."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return self.head(x)


class Drops(nn.Module):
    """LayerDrop and dropout: each layer is skipped at random in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(5, 5) for _ in range(4)), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not (self.training and torch.rand([]) < 0.4):
                x = x + F.dropout(torch.tanh(layer(x)), 0.2, self.training)
        return self.head(x)


class Plain(nn.Module):
    """One weight is used in Python code that dynamo does not trace, and another one both there and in a subgraph."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.between, self.both = nn.Linear(5, 7), nn.Linear(7, 6, bias=False), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    @torch._dynamo.disable
    def _hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.between.weight.t()) @ self.both.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.both(self._hidden(torch.tanh(self.body(x))))))


class Late(nn.Module):
    """Python code that dynamo does not trace uses one weight, for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.late, self.head = nn.Linear(5, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 3)

    @torch._dynamo.disable
    def _hidden(self, x: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
        return x if sign > 0 else x @ self.late.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self._hidden(torch.tanh(self.body(x)), x.sum()))


class Counting(nn.Module):
    """Batch norm and a counter, with a graph break in between."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        hidden = self.norm(self.body(x))
        if hidden.sum().item() > 1e9:
            return hidden
        return self.head(torch.tanh(hidden))


class Zipped(TwoLayers):
    """Dynamo fails on this model because of a bug, and eager mode works."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape, dtype=torch.bool)
        mask[tuple(zip(*[(index[0], index[1]) for index in (x > 0).nonzero()], strict=True))] = True
        return self.head(torch.tanh(self.body(x * mask)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    each.__name__: each for each in (Branchy, Items, Experts, Stack, Drops, Plain, Late, Counting, Zipped)
}
ALL = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(17)
    return MODELS[name]().double()


def inputs(rows: int = 6, seed: int = 2) -> torch.Tensor:
    return batches(1, rows, 5, seed=seed)[0]


def adapted(model: nn.Module, spec: lx.CascadeSpec = SPEC, frontend: str = "graph-breaks") -> lx.Cascade:
    return lx.adapt(model, (inputs(),), spec=spec, frontend=frontend)


def run(model: Any, x: torch.Tensor, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    random.seed(seed)
    return model(x)


def reach_all(cascade: lx.Cascade) -> None:
    """Call the cascade with inputs that together run every layer."""
    for seed in range(8):
        for sign in (1, -1):
            cascade(sign * inputs(seed=seed))


@ALL
@pytest.mark.parametrize("training", [False, True])
def test_it_computes_the_eager_model_and_with_branches_the_merged_model(name: str, training: bool) -> None:
    """With B = 0 and no noise, it computes the bits of the eager model, including buffers and random numbers.

    With any B, outputs and gradients agree with the eager model with merged weights.
    """
    model = model_of(name).train(training)
    eager = copy.deepcopy(model)
    cascade = adapted(model)
    assert cascade.frontend == "graph-breaks"
    for rows, sign in ((6, 1), (4, -1), (9, 1), (6, -1)):
        x = sign * inputs(rows)
        assert torch.equal(run(cascade, x), run(eager, x))
    for own, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(own, theirs)
    reach_all(cascade)
    matrices = {key for key, value in model.named_parameters() if value.dim() > 1}
    assert {site.weight for site in cascade.sites} == matrices
    assert cascade.unreached == ()
    randomize(cascade)
    eager.load_state_dict(model.state_dict())
    for seed in (2, 3, 4):
        x = inputs(5, seed)
        assert_merged(cascade, eager, x, every=False)


@ALL
def test_two_stages_are_the_formula(name: str) -> None:
    """Training changes every branch. Transition, weights, folded state dict and release follow S = pace * s B A."""
    model = model_of(name).train()
    original = copy.deepcopy(model)
    cascade = adapted(model)
    reach_all(cascade)
    optimizer = optimizer_of(cascade, "sgd")
    for seed in range(20):
        loss_of(run(cascade, inputs(seed=seed) * (-1) ** seed, seed)).backward()
    assert all(branch.lora_B.grad.any() for branch in branches(cascade).values())
    optimizer.step()
    optimizer.zero_grad()
    names = list(branches(cascade))
    before = dict(original.named_parameters())
    slow = {key: torch.zeros_like(before[key]) for key in names}
    for stage in (1, 2):
        delta = {key: (each.lora_B @ each.lora_A).detach() * each.scale for key, each in branches(cascade).items()}
        slow = {key: slow[key] + 0.5 * delta[key] for key in names}
        cascade.transition(optimizer)
        with cascade.weights("slow"):
            for key in names:
                computed = model.get_parameter(key)
                torch.testing.assert_close(computed, before[key] + slow[key], rtol=0, atol=1e-12)
        if stage == 1:
            randomize(cascade, seed=9, size=0.1)
    cascade.eval()
    with cascade.weights("slow"):
        expected = run(cascade, inputs())
    state = cascade.folded_state_dict()
    fresh = model_of(name).eval()
    fresh.load_state_dict(state, strict=True)
    torch.testing.assert_close(run(fresh, inputs()), expected, rtol=0, atol=1e-12)
    released = cascade.release()
    assert released is model
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert torch.equal(run(model.eval(), inputs()), expected)


@pytest.mark.parametrize("name", ["Branchy", "Experts", "Drops", "Late"])
def test_a_weight_that_a_later_call_reaches_becomes_a_site(name: str) -> None:
    """The site gets noise immediately. Training with an optimizer without its parameters is an error."""
    model = model_of(name).train()
    original = copy.deepcopy(model)
    torch.manual_seed(0)
    x = torch.ones(1, 5, dtype=torch.float64)
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.2)), frontend="graph-breaks")
    missing = cascade.unreached
    assert missing
    assert all(torch.equal(model.get_parameter(key), original.get_parameter(key)) for key in missing)
    optimizer = optimizer_of(cascade)
    with warns("late-sites"):
        reach_all(cascade)
    assert cascade.unreached == ()
    for key in missing:
        assert not torch.equal(model.get_parameter(key), original.get_parameter(key))
    with cascade.weights("slow"):
        for key in missing:
            assert torch.equal(model.get_parameter(key), original.get_parameter(key))
    with raises(lx.StateError, "optimizer-lacks-parameters"):
        cascade.transition(optimizer)
    for key in missing:
        new = branches(cascade)[key]
        optimizer.add_param_group({"params": [new.lora_A, new.lora_B]})
    randomize(cascade)
    eager = copy.deepcopy(model)
    for seed in range(3):
        assert_merged(cascade, eager, inputs(seed=seed), every=False)
    cascade.transition(optimizer)


def test_no_graph_is_captured_again_because_a_branch_came_before_it() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second, third = self.layers
            x = torch.tanh(first(x))
            torch._dynamo.graph_break()
            x = torch.tanh(second(x))
            torch._dynamo.graph_break()
            return third(x)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cascade = lx.adapt(Broken(), (torch.randn(4, 5),), spec=lx.CascadeSpec(rank=2), frontend="graph-breaks")
    assert len(cascade.sites) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@ALL
def test_copies_capture_their_own_graphs(name: str) -> None:
    """A copy has its own branches, also for swapped weights. Training it does not change the original."""
    cascade = adapted(model_of(name))
    reach_all(cascade)
    randomize(cascade)
    expected = run(cascade, inputs())
    copied = copy.deepcopy(cascade)
    kept = {key: value.clone() for key, value in copied.state_dict().items()}
    torch.testing.assert_close(run(copied, inputs()), expected, rtol=0, atol=1e-12)
    assert all(torch.equal(value, kept[key]) for key, value in copied.state_dict().items() if "/lora" in key)
    randomize(copied, seed=8)
    assert not torch.allclose(run(copied, inputs()), expected, atol=1e-3)
    assert_merged(copied, copied.model, inputs(), every=False)
    assert torch.equal(run(cascade, inputs()), expected)


def test_a_folded_graph_names_the_first_break() -> None:
    cascade = adapted(model_of("Branchy"))
    line = next(
        number
        for number, text in enumerate(Path(__file__).read_text(encoding="utf-8").splitlines(), 1)
        if "if x.sum() > 0 else" in text
    )
    with raises(lx.CaptureError, "no-whole-graph", "Branchy", f"{__file__}:{line}"):
        cascade.folded_graph()
    cascade(inputs())


def test_the_recompile_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo does not fall back to eager code, which would run without branches."""

    class Numbers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, text: str = "a") -> torch.Tensor:
            if x.sum().item() > 1e9:
                return x
            return self.body(x) * len(text)

    lower(monkeypatch, "captures of the fallback", 4)
    cascade = lx.adapt(Numbers().double(), (inputs(),), spec=SPEC, frontend="graph-breaks")
    randomize(cascade)
    x, right = inputs(), 0

    def call_all() -> None:
        nonlocal right
        for length in range(1, 12):
            assert_merged(cascade, cascade.model, x, "a" * length)
            right += 1

    with raises(lx.CaptureError, "not-captured", "Numbers", "4"):
        call_all()
    assert right >= 3


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def block(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=False)


def test_any_number_of_models_of_a_class_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits count each model separately. Code compiled by the user stays, and code of freed models is removed."""
    compiled, theirs, x = [], Recomputed(), torch.randn(4, 5)

    def backend(graph: Any, example_inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    own = torch.compile(theirs, backend=backend)
    expected, count = own(x), len(compiled)
    lower(monkeypatch, "captures of the fallback", 3)
    cascades, models = [], []
    for _ in range(5):  # while all models are alive
        cascades.append(lx.adapt(Recomputed(), (x,), spec=lx.CascadeSpec(rank=1), frontend="graph-breaks"))
        cascades[-1](x).sum().backward()
        models.append(ref(cascades[-1].model))
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list
    assert sum(entry.code is not None for entry in entries(Recomputed.forward.__code__)) == 1 + 5
    cascades.clear()
    gc.collect()
    assert not any(model() for model in models)
    assert sum(entry.code is not None for entry in entries(Recomputed.forward.__code__)) == 1
    assert torch.equal(own(x), expected)
    assert len(compiled) == count
    del own
    torch._C._dynamo.eval_frame.reset_code(Recomputed.forward.__code__)
    for _ in range(3):  # one model at a time
        cascade = lx.adapt(Recomputed(), (x,), spec=lx.CascadeSpec(rank=1), frontend="graph-breaks")
        assert len(entries(Recomputed.forward.__code__)) == 1
        del cascade
        gc.collect()


def test_a_weight_that_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is known that hides a weight so well: the check is told that it saw one."""
    monkeypatch.setattr(*SEAMS["outside use"], lambda *_: ["body.weight"])
    with raises(lx.CaptureError, "not-captured", "Branchy", "body.weight"):
        adapted(model_of("Branchy"))


def test_beside_fabric() -> None:
    """Lightning Fabric wraps torch.compile, and copies keyword arguments onto the model. It must not copy ours."""
    fabric = pytest.importorskip("lightning_fabric")
    assert hasattr(torch.compile, "__wrapped__"), fabric
    model = Breaking(4)
    cascade = lx.adapt(model, args=(torch.ones(2, 4),), spec=lx.CascadeSpec(rank=2))
    assert cascade.frontend == "graph-breaks"
    assert "_compile_kwargs" not in vars(model)
    assert torch.equal(cascade(-torch.ones(2, 4)), model.linear(torch.ones(2, 4)))
