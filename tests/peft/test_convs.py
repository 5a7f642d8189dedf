"""Convolutions in peft and here: dilation, padding modes, groups, transposed ones, kernels that peft takes for 1x1."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

from tests.peft.kit import (
    EXACT,
    RANK,
    Case,
    assert_ours_is_right,
    eager,
    formula_of,
    gap,
    normal,
    peft_gaps,
    peft_of,
    seeded,
)

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TURNED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KERNEL = {1: (3,), 2: (3, 5), 3: (3, 1, 3)}
SPACE = {1: (11,), 2: (9, 8), 3: (5, 6, 7)}


def case(dims: int, kind: Any = None, kernel: Any = None, **options: Any) -> Case:
    """Two such convolutions, [8, 4] and [4, 8] in channels, with a batch norm and a dropout between."""
    conv = kind or CONV[dims]
    kernel = kernel or KERNEL[dims]

    def build() -> nn.Module:
        middle = (NORM[dims](8), nn.Tanh(), nn.Dropout(0.2))
        return nn.Sequential(conv(4, 8, kernel, **options), *middle, conv(8, 4, kernel, **options))

    return Case(build, lambda: (normal(3, 4, *SPACE[dims]),), ("0", "4"), ("0.weight", "4.weight"))


@pytest.mark.parametrize("dims", CONV)
@pytest.mark.parametrize("training", [True, False])
def test_peft_is_right_on_a_plain_conv(dims: int, training: bool) -> None:
    """The control: the formula is peft's own where peft supports the convolution."""
    assert max(peft_gaps(case(dims, padding="same"), training)) < EXACT


SILENT = {
    "dilation": {"dilation": 2, "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": "same", "padding_mode": "circular"},
}


@pytest.mark.parametrize("dims", CONV)
@pytest.mark.parametrize("option", SILENT)
def test_adapter_and_merge_differ(option: str, dims: int) -> None:
    """peft's lora_A is a convolution without dilation and with zeros for padding: it trains what it does not merge."""
    given = case(dims, **SILENT[option])
    for training in (True, False):
        adapter, merged = peft_gaps(given, training)
        assert adapter > 0.1
        assert merged < EXACT
    for frontend in ("export", "symbolic"):  # an op of its own for the padding, and the module's
        assert_ours_is_right(given, frontend)


@pytest.mark.parametrize("dims", CONV)
def test_dilation_that_changes_the_size(dims: int) -> None:
    given = case(dims, kernel=3, dilation=2, padding=2)
    theirs = peft_of(given.model(), given.targets)
    with pytest.raises(RuntimeError, match=r"The size of tensor a \(\d+\) must match the size of tensor b \(\d+\)"):
        theirs(*given.inputs())
    assert_ours_is_right(given)


@pytest.mark.parametrize("groups", [2, 4], ids=["grouped", "depthwise"])
@pytest.mark.parametrize(("dims", "frontend"), [(1, "export"), (2, "export"), (2, "symbolic"), (3, "symbolic")])
def test_groups(dims: int, groups: int, frontend: str) -> None:
    """peft's delta is a dense convolution, which a grouped weight cannot hold: no merge, and channels leak."""
    given = case(dims, groups=groups, padding=1)
    model, (x,) = given.model().eval(), given.inputs()
    with pytest.warns(UserWarning, match="groups > 1. Merging is not supported"):
        theirs = peft_of(model[0:1], ["0"])
    other = x.clone()
    other[:, 4 // groups :] += 1  # nothing that the first group reads
    own = slice(0, 8 // groups)
    assert gap(model[0](x)[:, own], model[0](other)[:, own]) == 0
    assert gap(theirs(x)[:, own], theirs(other)[:, own]) > 0.1
    with pytest.raises(NotImplementedError, match="Merging is not supported for _ConvNd layers with groups > 1!"):
        theirs.merge_and_unload()
    assert_ours_is_right(given, frontend)


def test_a_rank_that_groups_do_not_divide() -> None:
    given = case(2, groups=4, padding=1)
    with (
        pytest.warns(UserWarning, match="groups > 1"),
        pytest.raises(ValueError, match="support is limited to conv layers where the rank is divisible by groups"),
    ):
        peft_of(given.model(), given.targets, r=RANK - 1)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", TURNED)
def test_transposed(dims: int, groups: int) -> None:
    given = case(dims, TURNED[dims], groups=groups, stride=2, padding=1)
    with pytest.raises(ValueError, match=rf"Target module ConvTranspose{dims}d\(.*\) is not supported"):
        peft_of(given.model(), given.targets)
    assert_ours_is_right(given)


def test_a_kernel_that_begins_with_ones() -> None:
    """peft takes a 3d kernel (1, 1, k) for a 1x1 one: the adapter is right, the merge an error of shapes."""
    given = case(3, kernel=(1, 1, 3))
    model, args = given.model().eval(), given.inputs()
    theirs = peft_of(model, given.targets)
    assert gap(seeded(theirs, args), eager(model, formula_of(theirs, model), args)) < EXACT
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        copy.deepcopy(theirs).merge_and_unload()
    assert_ours_is_right(given)
