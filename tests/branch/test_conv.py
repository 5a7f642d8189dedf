"""Every convolution: `y = conv(x, W + s (B A).view_as(W))` in fp64: value, gradients, unmerged, merged.

Oracle: torch's own convolution with that dense weight, differentiated as it stands (peft is wrong for groups,
dilation and padding modes).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorasc_fx as lx
from tests.kit.models import branches, randomize

MODES = ("zeros", "reflect", "replicate", "circular")
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KERNEL = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}
STRIDE = {1: (2,), 2: (1, 2), 3: (2, 1, 1)}
DILATION = {1: (2,), 2: (2, 1), 3: (1, 2, 1)}
PADDING = {1: (2,), 2: (2, 1), 3: (1, 2, 0)}
SPACE = {1: (11,), 2: (9, 8), 3: (5, 6, 4)}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "stride": {"stride": True},
    "dilation": {"dilation": True, "padding": True},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "padding": True},
    "same": {"padding": "same"},
    "same-dilation": {"padding": "same", "dilation": True},
    "valid": {"padding": "valid"},
    "pointwise": {"kernel": 1},
    "all": {"stride": True, "dilation": True, "padding": True, "groups": 2},
    "all-ungrouped": {"stride": True, "dilation": True, "padding": True},
}
CASES = [
    (dims, option, mode)
    for dims in CONV
    for option in OPTIONS
    for mode in MODES
    if mode == "zeros" or OPTIONS[option].get("padding") not in (None, "valid")
]


def conv(dims: int, option: str, mode: str) -> nn.Module:
    asked = OPTIONS[option]
    tables = {"stride": STRIDE, "dilation": DILATION, "padding": PADDING}
    given = {name: tables[name][dims] if asked[name] is True else asked[name] for name in tables if name in asked}
    rest = {"groups": asked.get("groups", 1), "bias": asked.get("bias", True), "padding_mode": mode}
    return CONV[dims](4, 8, asked.get("kernel", KERNEL[dims]), **given, **rest)


def net(dims: int, option: str, mode: str) -> nn.Sequential:
    """Two such convolutions would shrink too far: one, and a pointwise one behind it (several sites)."""
    torch.manual_seed(11)
    return nn.Sequential(conv(dims, option, mode), nn.Tanh(), CONV[dims](8, 3, 1)).double()


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize(("dims", "option", "mode"), CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's, of 'same'
def test_conv_is_the_formula(dims: int, option: str, mode: str, frontend: str) -> None:
    model = net(dims, option, mode)
    source = torch.Generator().manual_seed(12)
    x = torch.randn(3, 4, *SPACE[dims], generator=source, dtype=torch.float64)
    original = copy.deepcopy(model)
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=3, lora_alpha=4.5, pace=1.0), frontend=frontend)
    randomize(cascade)
    assert [site.weight for site in cascade.sites] == ["0.weight", "2.weight"]

    factors = {name: (b.lora_A.detach().clone(), b.lora_B.detach().clone()) for name, b in branches(cascade).items()}
    dense = {name: value.detach().clone() for name, value in original.named_parameters()}
    leaves = []
    for name, (a, b) in factors.items():
        leaves += [a.requires_grad_(), b.requires_grad_()]
        dense[name] = dense[name] + 1.5 * (b @ a).view_as(dense[name])
    theirs = x.clone().requires_grad_()
    expected = torch.func.functional_call(original, dense, (theirs,))
    weights = torch.randn(expected.shape, generator=source, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weights).sum(), [theirs, *leaves])

    own = x.clone().requires_grad_()
    out = cascade(own)
    held = [factor for branch in branches(cascade).values() for factor in (branch.lora_A, branch.lora_B)]
    found = torch.autograd.grad((out * weights).sum(), [own, *held])

    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out, expected, **close)
    for mine, right in zip(found, gradients, strict=True):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert (out - original(x)).abs().max() > 1e-2  # the branch says something
    with cascade.weights("fast"):
        torch.testing.assert_close(cascade(x), expected, **close)
        torch.testing.assert_close(model(x), expected, **close)
    torch.testing.assert_close(cascade.release()(x), expected, **close)


class Functional(nn.Module):
    """The functional spelling, with its arguments by position and by name."""

    def __init__(self, padding: int | str) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(8, 2, 3, 2))
        self.two = nn.Parameter(torch.randn(3, 8, 1, 3))
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, self.one, None, 1, self.padding, (2, 1), 2)
        return F.conv2d(torch.tanh(y), weight=self.two, padding=self.padding, dilation=(1, 2))


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_functional_convs(padding: int | str, frontend: str) -> None:
    torch.manual_seed(13)
    model = Functional(padding).double()
    x = torch.randn(3, 4, 9, 8).double()
    cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=3, lora_alpha=4.5), frontend=frontend)
    randomize(cascade)
    dense = {
        name: getattr(model, name) + 1.5 * (branch.lora_B @ branch.lora_A).view_as(getattr(model, name))
        for name, branch in branches(cascade).items()
    }
    assert list(dense) == ["one", "two"]
    y = F.conv2d(x, dense["one"], stride=1, padding=padding, dilation=(2, 1), groups=2)
    expected = F.conv2d(torch.tanh(y), dense["two"], padding=padding, dilation=(1, 2))
    torch.testing.assert_close(cascade(x), expected, rtol=1e-12, atol=1e-12)
