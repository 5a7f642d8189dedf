"""A weight that something other than the cascade has written is an error at the next fold, however it was written.

Other code writes through `.data`, numpy, a state dict, an optimizer or an average of weights. torch's version counter
sees only half of these writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.models import Late
from tests.kit.errors import raises, warns
from tests.kit.models import batches, mlp, optimizer_of, randomize, train
from tests.kit.state import checksum, device_sum, resting_value

X = batches(1, 4, 5)[0]
REFUSED = ("weights-changed-outside", "2.weight")


def adapted(**options: object) -> lx.Cascade:
    spec = lx.CascadeSpec(**{"rank": 2, "pace": 1.0, "targets": ("linear",), **options})
    return lx.adapt(mlp(), (X,), spec=spec)


def ended(seed: int = 1) -> lx.Cascade:
    """Return a cascade with one ended stage and a trained branch."""
    cascade = adapted()
    randomize(cascade, seed)
    cascade.transition(None)
    randomize(cascade, seed + 1)
    return cascade


def with_weight_decay(model: nn.Module) -> None:
    weight = model.get_parameter("2.weight").requires_grad_(True)
    weight.grad = torch.zeros_like(weight)
    torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1).step()
    weight.requires_grad_(False).grad = None


def replaced(model: nn.Module) -> None:
    model[2] = nn.Linear(7, 6, bias=False).double()


def data(write: Callable[[torch.Tensor], object], model: nn.Module) -> None:
    write(model.get_parameter("2.weight").data)


def assigned(model: nn.Module) -> None:
    weight = model.get_parameter("2.weight")
    weight.data = weight.data + 1


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "clamp": partial(data, lambda weight: weight.clamp_(-0.05, 0.05)),
    "permuted": partial(data, lambda weight: weight.copy_(weight[torch.arange(6).flip(0)])),
    "one bit": partial(data, lambda weight: weight.view(torch.int64)[1, 2].bitwise_xor_(1)),
    "assigned": assigned,
    "numpy": partial(data, lambda weight: weight.numpy().fill(1)),
    "state dict": lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()} | {
        "0.weight": model.state_dict()["0.weight"], "4.weight": model.state_dict()["4.weight"]}),
    "weight decay": with_weight_decay,
    "replaced": replaced,
}  # fmt: skip

CALLS: dict[str, Callable[[lx.Cascade, Path], object]] = {
    "transition": lambda cascade, _: cascade.transition(None),
    "stages": lambda cascade, _: next(iter(cascade.stages(1, optimizer_of(cascade)))),
    "release": lambda cascade, _: cascade.release(),
    "folded_state_dict": lambda cascade, _: cascade.folded_state_dict(),
    "weights": lambda cascade, _: cascade.weights("slow").__enter__(),
    "rewind": lambda cascade, _: cascade.rewind(0, None),
    "to": lambda cascade, _: cascade.float(),
    "save": lx.save,
}


def call_of_a_new_kind(cascade: lx.Cascade) -> None:
    """Make a call that captures another graph. It must not record earlier outside writes as valid."""
    cascade.train(not cascade.training)
    cascade(X)


@pytest.mark.parametrize(
    ("write", "call"), [*((write, "release") for write in WRITES), *(("clamp", call) for call in CALLS)]
)
def test_a_write_from_outside_is_refused(write: str, call: str, tmp_path: Path) -> None:
    cascade = ended()
    WRITES[write](cascade.model)
    if call == "release":
        call_of_a_new_kind(cascade)
    before = {name: value.clone() for name, value in cascade.model.state_dict().items()}
    with raises(lx.StateError, *REFUSED):
        CALLS[call](cascade, tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in cascade.model.state_dict().items())


def assigned_by_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)


INSIDE = WRITES | {"cast": nn.Module.half, "assigned by state dict": assigned_by_state_dict}


@pytest.mark.parametrize("view", ["fast", "slow"])
@pytest.mark.parametrize("write", INSIDE)
def test_a_write_inside_weights_is_told_and_dropped(write: str, view: str) -> None:
    """The oracle is a cascade without such a write."""
    cascade, twin = ended(), ended()
    original = cascade.model.get_parameter("2.weight")
    memory = original.data_ptr()
    block = cascade.weights(view)
    block.__enter__()
    INSIDE[write](cascade.model)
    with raises(lx.StateError, "inside-weights"):
        block.__exit__(None, None, None)
    if write == "replaced":  # the module is the user's: it stays, and the next fold says so
        with raises(lx.StateError, *REFUSED):
            cascade.transition(None)
        return
    weight = cascade.model.get_parameter("2.weight")
    assert weight is original
    assert weight.data_ptr() == memory
    assert torch.equal(weight, twin.model.get_parameter("2.weight"))
    cascade.transition(None)
    twin.transition(None)
    assert torch.equal(cascade.release().get_parameter("2.weight"), twin.release().get_parameter("2.weight"))


def test_parameters_trained_in_full_are_watched_inside_weights_too() -> None:
    cascade = adapted(train=("0.bias",))
    bias = cascade.model.get_parameter("0.bias")
    with raises(lx.StateError, "inside-weights", "0.bias"), cascade.weights("slow"):
        bias.data.add_(1)

    def fails() -> None:
        with cascade.weights("slow"):
            bias.data.add_(1)
            raise ValueError("first")

    with pytest.raises(ValueError, match="first") as raised:
        fails()
    assert "0.bias was written inside" in raised.value.__notes__[0]
    with cascade.weights("slow"):
        cascade.model(X)


def test_a_frozen_parameter_that_changes_between_saves_is_part_of_the_base(tmp_path: Path) -> None:
    """No checkpoint contains it, so a later checkpoint loads only onto a model with the new values, in any dtype."""
    cascade, original = ended(), mlp()
    lx.save(cascade, tmp_path)
    lx.load(tmp_path, mlp(), (X,))
    cascade.model.get_parameter("0.bias").data.add_(1.0)
    with warns("frozen-parameter-changed", "0.bias"):
        lx.save(cascade, tmp_path)
    with raises(lx.CheckpointError, "base-differs", "0.bias"):
        lx.load(tmp_path, mlp(), (X,))
    original.get_parameter("0.bias").data.add_(1.0)
    assert torch.equal(lx.load(tmp_path, copy.deepcopy(original), (X,))(X), cascade(X))
    cascade.float()
    lx.save(cascade, tmp_path)  # a cast is none of the user's changes
    lx.load(tmp_path, original, (X,))


def test_the_same_numbers_written_again_are_no_change() -> None:
    cascade = ended()
    model = cascade.model
    expected = cascade(X)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    weight = model.get_parameter("2.weight")
    weight.data = weight.data.t().contiguous().t()  # another layout of the same numbers
    model[4].weight = nn.Parameter(model[4].weight.detach().clone(), requires_grad=False)
    weight.data.add_(1).sub_(1).copy_(resting_value(cascade, "2.weight"))
    call_of_a_new_kind(cascade)
    torch.testing.assert_close(cascade.release()(X), expected)


def test_a_late_site_is_watched_and_leaves_the_others_watched() -> None:
    """A graph for another mode adds a site. Its current weight becomes W0, and the checksums of other weights stay."""

    def late() -> lx.Cascade:
        cascade = lx.adapt(Late().double().eval(), (X,), spec=lx.CascadeSpec(rank=2))
        assert [site.weight for site in cascade.sites] == ["first.weight"]
        return cascade

    before, after = late(), late()
    before.model.first.weight.data.neg_()
    for cascade in (before, after):
        cascade.train()(X)
        assert len(cascade.sites) == 2
    after.model.second.weight.data.neg_()
    for cascade, name in ((before, "first"), (after, "second")):
        with raises(lx.StateError, "weights-changed-outside", name):
            cascade.release()


def test_a_tie_that_was_cut_is_refused() -> None:
    """A fold writes the parameter in the first place. The other place would keep its old value."""
    model = mlp()
    model.append(nn.Linear(2, 6, bias=False).double())
    model.append(nn.Linear(6, 2, bias=False).double())
    model[6].weight = model[4].weight
    cascade = lx.adapt(model, (X,), spec=lx.CascadeSpec(rank=2, pace=1.0))
    randomize(cascade)
    expected, shared = cascade(X), model[4].weight
    model[6].weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
    with raises(lx.StateError, "tied-weights-differ", "6.weight", "4.weight"):
        cascade.release()
    model[6].weight = shared
    torch.testing.assert_close(cascade.release()(X), expected)


@pytest.mark.parametrize("name", ["model", "branches"])
def test_another_model_in_a_cascade_is_refused(name: str) -> None:
    """Otherwise `release` would return a model that was never trained."""
    cascade = ended()
    child = getattr(cascade, name)
    with raises(lx.StateError, "weights-changed-outside", name):
        setattr(cascade, name, copy.deepcopy(child))
    setattr(cascade, name, child)
    assert getattr(cascade, name) is child
    copy.deepcopy(cascade).release()


def test_a_head_that_was_replaced_by_one_of_another_size_is_refused() -> None:
    """`reset_classifier` of timm does this. A new head of the same size is trained from then on."""
    cascade = adapted(targets=("0.weight",), train=("4.*",))
    cascade.model[4] = nn.Linear(6, 2).double()
    train(cascade, optimizer_of(cascade), batches(1, 4, 5))
    cascade.transition(None)
    cascade.model[4] = nn.Linear(6, 3).double()
    train(cascade, optimizer_of(cascade), batches(1, 4, 5))
    for call in (lambda: cascade.transition(None), cascade.release, cascade.state_dict):
        with raises(lx.StateError, "weights-changed-outside", "4.weight"):
            call()


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values in another memory layout, with an odd storage offset."""
    return torch.cat([tensor.flatten()[:1], tensor.t().flatten()])[1:].view(tensor.t().shape).t()


@pytest.mark.parametrize("sum_of", [checksum, device_sum])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 257), (2, 2_100_001)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.complex64], ids=str
)
def test_checksums_are_of_the_bits_in_order(
    dtype: torch.dtype, shape: tuple[int, int], sum_of: Callable[[torch.Tensor], int]
) -> None:
    """A checksum changes with one bit, with the signs of two entries and with a swap, but not with the memory layout.

    This is tested on the host, and for the code for other devices without having such a device.
    """
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(9).to(dtype)
    reference = sum_of(tensor)
    assert sum_of(tensor.clone()) == reference
    if dtype.itemsize <= 4:
        assert sum_of(strided(tensor)) == reference
    entries = tensor.view(torch.uint8).flatten()
    edits = [(0, 1), (0, 128), (len(entries) - 1, 128)]
    for entry, mask in edits:
        changed = tensor.clone()
        changed.view(torch.uint8).flatten()[entry] ^= mask
        assert sum_of(changed) != reference
    if tensor.numel() > 1:
        top = dtype.itemsize - 1
        changed = tensor.clone()
        changed.view(torch.uint8).flatten()[[top, top + 2 * dtype.itemsize]] ^= 128
        assert sum_of(changed) != reference
        swapped = tensor.flatten().roll(1).view(shape)
        assert sum_of(swapped) != reference
