"""Parameters that share memory: equal views are one tied weight, other overlaps are refused, neighbours are adapted.

The oracle is the same model with W0 + s B A in the memory, by plain formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.graph import shared_memory
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import batches, randomize
from tests.kit.state import trained_in_full, weight_states

X = batches(1, 4, 5)[0]
SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=1.0, targets=("linear",))


class Net(nn.Module):
    """[5, 5] twice with an activation in between, then [3, 5]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two, self.last = (nn.Linear(5, rows, bias=False).double() for rows in (5, 5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.two(torch.tanh(self.one(x)))))


def on_one_storage() -> Net:
    net = Net()
    net.two.weight.data = net.one.weight.data
    return net


def on_one_array() -> Net:
    """Two storages over one numpy array."""
    net = Net()
    array = net.one.weight.detach().numpy().copy()
    net.one.weight, net.two.weight = (nn.Parameter(torch.from_numpy(array)) for _ in range(2))
    return net


@pytest.mark.parametrize("make", [on_one_storage, on_one_array])
def test_equal_views_are_one_weight(make: Callable[[], Net]) -> None:
    net, original = make(), make()
    one, two = net.one.weight, net.two.weight
    cascade = lx.adapt(net, (X,), spec=SPEC)
    assert {site.weight: site.aliases for site in cascade.sites} == {"one.weight": ("two.weight",), "last.weight": ()}
    randomize(cascade)
    branch = cascade.branches["one/weight"]
    delta = 1.5 * branch.lora_B.detach() @ branch.lora_A.detach()
    assert delta.norm() > 0.1
    with torch.no_grad():
        original.one.weight.add_(delta)  # and so `two.weight`
        last = cascade.branches["last/weight"]
        original.last.weight.add_(1.5 * last.lora_B @ last.lora_A)
    torch.testing.assert_close(cascade(X), original(X))
    cascade.transition(None)
    torch.testing.assert_close(cascade(X), original(X))
    twin = copy.deepcopy(cascade)  # torch copies each Parameter separately
    released = cascade.release()
    assert released is net
    assert (net.one.weight, net.two.weight) == (one, two)
    assert net.one.weight.data_ptr() == net.two.weight.data_ptr()
    torch.testing.assert_close(net(X), original(X))
    torch.testing.assert_close(twin.release()(X), original(X))


def test_release_keeps_a_moved_tie() -> None:
    net = on_one_storage()
    cascade = lx.adapt(net, (X,), spec=SPEC).float()
    randomize(cascade)
    expected = cascade(X.float())
    cascade.release()
    assert net.two.weight is not net.one.weight
    assert net.two.weight.data_ptr() == net.one.weight.data_ptr()
    torch.testing.assert_close(net(X.float()), expected)


def test_a_checkpoint_of_equal_views_loads(tmp_path: Path) -> None:
    cascade = lx.adapt(on_one_storage(), (X,), spec=SPEC)
    randomize(cascade)
    cascade.transition(None)
    randomize(cascade, 2)
    lx.save(cascade, tmp_path)
    loaded = lx.load(tmp_path, on_one_storage(), (X,))
    torch.testing.assert_close(loaded(X), cascade(X))
    torch.testing.assert_close(loaded.release()(X), cascade.release()(X))


def test_equal_views_are_trained_in_full_as_one() -> None:
    net = on_one_storage()
    spec = lx.CascadeSpec(rank=2, targets=("last.*",), train=("two.weight",))
    cascade = lx.adapt(net, (X,), spec=spec)
    assert list(trained_in_full(cascade)) == ["one.weight"]
    cascade(X).sum().backward()
    plain = on_one_storage()
    plain.two.weight = plain.one.weight
    plain(X).sum().backward()
    torch.testing.assert_close(net.one.weight.grad, plain.one.weight.grad)


def flat(**layouts: tuple[int, tuple[int, ...], tuple[int, ...]]) -> Net:
    """Put the weights of layers into one buffer of memory, each at an offset with a shape and strides."""
    net, memory = Net(), torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, (offset, shape, stride) in layouts.items():
        net.get_parameter(f"{name}.weight").data = memory.as_strided(shape, stride, offset)
    return net


def with_buffer() -> Net:
    net = Net()
    net.last.register_buffer("seen", net.last.weight.data[1])
    return net


def with_attribute(value: Callable[[torch.Tensor], object]) -> Net:
    net = Net()
    net.last.seen = value(net.last.weight)
    return net


SQUARE = (5, 5)
ONE_AND_TWO = {"one.weight": "shares memory with two.weight", "two.weight": "shares memory with one.weight"}
ONE_AND_LAST = {"one.weight": "shares memory with last.weight", "last.weight": "shares memory with one.weight"}
LAST_AND_SEEN = {"last.weight": "shares memory with last.seen"}
OVERLAPS: dict[str, tuple[Callable[[], Net], dict[str, str]]] = {
    "shifted": (lambda: flat(one=(0, SQUARE, (5, 1)), two=(20, SQUARE, (5, 1))), ONE_AND_TWO),
    "transposed": (lambda: flat(one=(0, SQUARE, (5, 1)), two=(0, SQUARE, (1, 5))), ONE_AND_TWO),
    "a part": (lambda: flat(one=(0, SQUARE, (5, 1)), last=(5, (3, 5), (5, 1))), ONE_AND_LAST),
    # their addresses alternate, which is not examined
    "columns of one matrix": (lambda: flat(one=(0, SQUARE, (10, 1)), two=(5, SQUARE, (10, 1))), ONE_AND_TWO),
    "expanded": (lambda: flat(one=(0, SQUARE, (0, 1))), {"one.weight": "is expanded"}),
    "windows": (lambda: flat(one=(0, SQUARE, (2, 1))), {"one.weight": "is expanded"}),
    "a buffer": (with_buffer, LAST_AND_SEEN),
    "an attribute": (lambda: with_attribute(lambda weight: weight.data.t()), LAST_AND_SEEN),
    "in a list": (lambda: with_attribute(lambda weight: [weight.data[1], torch.zeros(2)]), LAST_AND_SEEN),
}
NEIGHBOURS: dict[str, Callable[[], Net]] = {
    "one after the other": lambda: flat(one=(0, SQUARE, (5, 1)), two=(25, SQUARE, (5, 1)), last=(50, (3, 5), (5, 1))),
    "the parameter itself in a list": lambda: with_attribute(lambda weight: [weight]),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_other_overlaps_are_refused(case: str) -> None:
    """They get no branch and no noise. The released model computes the same."""
    make, expected = OVERLAPS[case]
    spec = lx.CascadeSpec(rank=2, pace=1.0, noise=lx.Noise(0.1, where="all"), targets=("linear",))
    net = make()
    before = {name: net.get_parameter(name).detach().clone() for name in expected}
    cascade = lx.adapt(net, (X,), spec=spec)
    refusals = {
        refusal.weight: refusal for refusal in cascade.refusals if refusal.reason is lx.plan.Reason.SHARED_MEMORY
    }
    assert refusals.keys() == expected.keys()
    assert all(refusals[name].sentence.startswith(sentence) for name, sentence in expected.items())
    assert all(name not in expected for name in weight_states(cascade))
    randomize(cascade)
    cascade.transition(None)
    with cascade.weights("slow"):
        output = cascade(X)
    torch.testing.assert_close(cascade.release()(X), output)
    assert all(torch.equal(net.get_parameter(name), value) for name, value in before.items())


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlaps_are_not_trained_in_full(case: str) -> None:
    make, expected = OVERLAPS[case]
    name = next(iter(expected))
    target = next(weight for weight in ("one.weight", "two.weight", "last.weight") if weight not in expected)
    spec = lx.CascadeSpec(rank=2, targets=(target,), train=(name,))
    net = make()
    with unchanged(net), raises(lx.SpecError, "not-trainable", name, expected[name]):
        lx.adapt(net, (X,), spec=spec)


@pytest.mark.parametrize("case", NEIGHBOURS)
def test_neighbours_in_one_memory_are_sites(case: str) -> None:
    net = NEIGHBOURS[case]()
    normed = Net()
    nn.utils.spectral_norm(normed.last)
    assert shared_memory(net) == shared_memory(normed) == {}
    cascade = lx.adapt(net, (X,), spec=SPEC)
    assert [site.weight for site in cascade.sites] == ["one.weight", "two.weight", "last.weight"]
    randomize(cascade)
    cascade.transition(None)
    randomize(cascade, 2)
    output = cascade(X)
    torch.testing.assert_close(cascade.release()(X), output)
