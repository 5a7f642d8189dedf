"""`release` returns the user's own model. The folded state dict and the folded graph have the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import batches, branches, randomize

X = batches(1, 2, 3, 5, 4)[0]
SPEC = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2))


class Stated(nn.Module):
    """A norm with statistics, a frozen part, a part in eval mode, a hook, a persistent and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, groups=1, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.register_buffer("shift", torch.linspace(0, 1, 3))
        self.register_buffer("passing", torch.linspace(1, 2, 3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.stem(x))).mean((2, 3))
        return (self.head(self.drop(hidden)) + self.shift) * self.passing


def stated() -> Stated:
    torch.manual_seed(51)
    model = Stated().double().train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    return model


def trained_cascade(model: nn.Module) -> lx.Cascade:
    """Return a cascade after two stages: one folded, and one that is running and has trained."""
    cascade = lx.adapt(model, (X,), spec=SPEC)
    randomize(cascade, 1)
    cascade.transition(None)
    randomize(cascade, 2)
    return cascade


def expected_state(state: dict[str, torch.Tensor], seeds: tuple[int, ...], make: Any) -> dict[str, torch.Tensor]:
    """Return W0 + pace * sum of the deltas, whose factors are read from another cascade with the same spec."""
    twin = lx.adapt(make(), (X,), spec=SPEC)
    expected = {name: value.clone() for name, value in state.items()}
    for seed in seeds:
        randomize(twin, seed)
        for name, branch in branches(twin).items():
            expected[name] += 0.5 * branch.scale * (branch.lora_B @ branch.lora_A).detach().view_as(expected[name])
        twin.transition(None)
    return expected


def test_release_is_the_users_object() -> None:
    model = stated()
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []
    model.drop.register_forward_hook(lambda _, args, output: calls.append(1) or output)
    objects = dict(model.named_parameters()) | dict(model.named_buffers())
    modules = dict(model.named_modules())
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    cascade = trained_cascade(model)
    cascade.eval()
    released = cascade.release()

    assert released is model
    assert dict(model.named_modules()) == modules
    current = dict(model.named_parameters()) | dict(model.named_buffers())
    assert current.keys() == objects.keys()
    assert all(current[name] is value for name, value in objects.items())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert len(set(flags.values())) == len(set(modes.values())) == 2
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(value.grad is None for value in model.parameters())
    assert not any(value._backward_hooks or value._post_accumulate_grad_hooks for value in model.parameters())
    calls.clear()
    model(X)
    assert calls == [1]
    state, expected = model.state_dict(), expected_state(before, (1, 2), stated)
    assert state.keys() == before.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-13, msg=name)
    assert torch.equal(state["norm.running_mean"], before["norm.running_mean"])
    assert not torch.equal(state["stem.weight"], before["stem.weight"])


def test_a_released_model_is_free() -> None:
    """It can be trained and adapted again, with its new weights as W0."""
    cascade = trained_cascade(model := stated())
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    cascade.release()
    weight = model.head.weight.detach().clone()
    model(X).sum().backward()
    assert model.head.weight.grad is not None
    optimizer.step()  # holds branches of the past only
    assert torch.equal(model.head.weight, weight)
    assert model.head.weight.requires_grad
    again = lx.adapt(model, (X,), spec=lx.CascadeSpec(rank=2))
    with again.weights("base"):
        assert torch.equal(model.head.weight, weight)


# torch's own, of a copy of any exported graph
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_folded_state_dict_and_graph_are_the_release() -> None:
    cascade = trained_cascade(model := stated())
    running = {name: value.clone() for name, value in model.state_dict().items()}
    state = cascade.folded_state_dict()
    cascade.eval()
    graph = cascade.folded_graph()
    assert not any("lora" in name or "branch" in name for name in [*graph.state_dict(), *dict(graph.named_modules())])
    for name, value in model.state_dict().items():  # nothing moved, nothing is shared
        assert torch.equal(value, running[name])
        assert state[name].data_ptr() != value.data_ptr()
    theirs = {value.data_ptr() for value in [*model.parameters(), *model.buffers()]}
    assert not any(value.data_ptr() in theirs for value in [*graph.parameters(), *graph.buffers()])

    copied = copy.deepcopy(graph)
    released = cascade.release().eval()
    assert list(state) == list(released.state_dict())
    for name, value in released.state_dict().items():
        assert torch.equal(state[name], value), name
    for size in (2, 5):
        y = batches(1, size, 3, 5, 4)[0]
        expected = released(y)
        assert expected.std() > 0.1
        assert torch.equal(graph(y), expected)
        assert torch.equal(copied(y), expected)
    with torch.no_grad():
        for value in graph.parameters():
            value.zero_()
    assert torch.equal(copied(X), released(X))
    assert not torch.equal(graph(X), released(X))
    fresh = stated()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.eval()(X), released(X))


def test_folded_graph_for_other_inputs() -> None:
    """The graph of another mode and of other arguments has the same weights."""
    cascade = trained_cascade(model := stated()).eval()
    graph = cascade.folded_graph((X,))
    by_name = cascade.folded_graph(kwargs={"x": X})
    cascade.train()
    training = cascade.folded_graph((X,))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    trained_output = training(X)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    released = cascade.release().eval()
    assert torch.equal(graph(X), released(X))
    assert torch.equal(by_name(X), released(X))
    torch.manual_seed(1)
    assert torch.equal(trained_output, released.train()(X))
