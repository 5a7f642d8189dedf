"""Views of a run, and what is computed with them: gradients of earlier calls, statistics, and casts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import batches, branches, randomize


def cascade_of(x: torch.Tensor, norm: nn.Module | None = None, **options: Any) -> lx.Cascade:
    """Return a cascade with grouped and plain weights, one ended stage, and a branch that has moved."""
    torch.manual_seed(8)
    body = nn.Sequential(nn.Linear(20, 24), norm or nn.Identity(), nn.Tanh(), nn.Unflatten(1, (24, 1)))
    tail = nn.Sequential(nn.Conv1d(24, 18, 2, groups=2, padding=1), nn.Flatten(1), nn.Linear(36, 3))
    cascade = lx.adapt(nn.Sequential(*body, *tail).to(x.dtype), (x,), spec=lx.CascadeSpec(rank=2, **options))
    randomize(cascade, 1)
    cascade.transition(None)
    randomize(cascade, 2)
    return cascade


@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
def test_other_weights_between_a_forward_and_its_backward(placement: str) -> None:
    """A preference loss calls a reference model in between. The earlier graph stays valid, with the same gradients."""
    (x,) = batches(1, 4, 20)
    cascade = cascade_of(x, placement=placement, noise=lx.Noise(0.2), train=("0.bias",))
    trainable = [*cascade.branches.parameters(), cascade.model[0].bias]
    expected = torch.autograd.grad(cascade(x).square().mean(), trainable)
    output = cascade(x)
    with torch.no_grad(), cascade.disable_adapter():
        assert not torch.equal(cascade(x), output)
    gradients = torch.autograd.grad(output.square().mean(), trainable)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("view", ["slow", "fast", "base"])
def test_unchanged_statistics_stay_valid_for_a_backward(view: str) -> None:
    """In eval mode BatchNorm saves its statistics for the backward, so a block that keeps them does not write them."""
    (x,) = batches(1, 4, 20)
    cascade = cascade_of(x, nn.BatchNorm1d(24)).eval()
    parameters = list(cascade.branches.parameters())
    statistics = {name: buffer.clone() for name, buffer in cascade.model.named_buffers()}
    expected = torch.autograd.grad(cascade(x).square().mean(), parameters)
    output = cascade(x)
    with torch.no_grad(), cascade.weights(view):
        cascade(x)
    with torch.no_grad(), cascade.disable_adapter():
        cascade(x)
    gradients = torch.autograd.grad(output.square().mean(), parameters)
    assert all(map(torch.equal, gradients, expected))
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in cascade.model.named_buffers())


def test_the_backward_of_a_call_whose_weights_were_replaced_raises() -> None:
    (x,) = batches(1, 4, 20)
    cascade = cascade_of(x)
    x.requires_grad_()
    with cascade.weights("fast"):
        inside = cascade(x).sum()
    outside = cascade(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward(retain_graph=True)
    with cascade.weights("base"):
        for loss in (inside, outside):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward(retain_graph=True)
    outside.backward()


def test_statistics_that_are_estimated_inside_a_view_are_dropped() -> None:
    (x,) = batches(1, 4, 20)
    cascade = cascade_of(x, nn.BatchNorm1d(24))
    before = cascade.model[1].running_mean.clone()
    with unchanged(cascade), cascade.weights("slow"):
        torch.optim.swa_utils.update_bn([x + 1], cascade)
        assert not torch.equal(cascade.model[1].running_mean, before)


def test_slow_weights_after_a_cast_to_a_wider_dtype() -> None:
    """The weights of the stage were rounded to the dtype of W0, and slow weights are not."""
    cascade = cascade_of(batches(1, 4, 20)[0].bfloat16())
    for branch in branches(cascade).values():
        branch.lora_B.data.zero_()
    cascade.float()
    weight = cascade.model.get_parameter("0.weight")
    start = weight.clone()
    with cascade.weights("slow"):
        slow = weight.clone()
    assert torch.equal(slow.bfloat16().float(), start)
    assert not torch.equal(slow, start)
    assert torch.equal(slow, cascade.release().get_parameter("0.weight"))


class Broken(nn.Flatten):
    """A layer that cannot be moved."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise MemoryError("no more")


def test_a_move_that_raises_changes_nothing() -> None:
    """The layers before the one that raises have been cast already, with the gradient of the trained bias."""
    x, y = batches(2, 4, 20)
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(20, 6).double(), nn.BatchNorm1d(6).double(), Broken())
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, train=("0.bias",)))
    cascade(x).square().mean().backward()
    randomize(cascade, 1)
    pointers = [value.data_ptr() for value in (*cascade.parameters(), *cascade.buffers())]
    old = cascade(y)
    with unchanged(cascade), pytest.raises(MemoryError, match="no more"):
        cascade.float()
    assert [value.data_ptr() for value in (*cascade.parameters(), *cascade.buffers())] == pointers
    assert torch.equal(cascade(y), old)


def test_the_names_of_views() -> None:
    plain, averaged = (cascade_of(batches(1, 4, 20)[0], average=average) for average in (False, True))
    assert plain.views == ("slow", "fast", "base")
    assert averaged.views == ("slow", "fast", "base", "averaged")
    assert averaged.kept("averaged").keys() == averaged.kept().keys() == branches(averaged).keys()
    for view, code in (("averaged", "not-available"), ("fast", "unknown-name")):
        with raises(lx.StateError, code, "kept"):
            plain.kept(view)  # type: ignore[arg-type]  # what is tested


def test_a_summary_names_eight_refusals_and_eight_unreached_weights() -> None:
    (x,) = batches(1, 2, 4)
    model = nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(9))).double()
    model[0].unused = nn.ModuleList(nn.Linear(2, 3) for _ in range(9)).double()
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=1, pace=0.25, noise=lx.Noise(0.5), train=("0.bias",)))
    reason = "vector (its shape is (4, 1): only one axis is longer than 1)"
    assert str(cascade).splitlines() == [
        "Cascade of Sequential, captured by export",
        "  stage 1, pace 0.25, noise 0.5, restart slow",
        "  9 sites: 9 linear",
        "  76 trainable of 297 parameters (25.59 %)",
        "  placements: 9 weight",
        "  9 refusals:",
        *(f"    {index}.parametrizations.weight.original0: {reason}" for index in range(8)),
        "    and 1 more, see cascade.refusals",
        f"  9 unreached (in no graph yet): {', '.join(f'0.unused.{index}.weight' for index in range(8))}",
    ]
