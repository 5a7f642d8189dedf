"""With B = 0 and no noise, adapted image models compute the same bits as in eager mode, in fp32, train and eval.

Text models: tests/passes/test_attention_masks.py and tests/forms/test_forms.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils import _pytree as pytree

import lorasc_fx as lx
from tests.kit.models import branches

IMAGES = (3, 64, 64)


def images(size: int) -> dict[str, Any]:
    return {"args": (torch.randn(size, *IMAGES),), "kwargs": {}}


def timm_model(name: str, **size: Any) -> nn.Module:
    return timm.create_model(name, num_classes=5, **size)


VIT = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "drop_path_rate": 0.3, "proj_drop_rate": 0.2}
DROP = {"drop_rate": 0.3, "drop_path_rate": 0.3}
RESNET = torchvision.models.resnet


@dataclass(frozen=True)
class Case:
    """A model, its inputs for a batch size, the minimum number of sites, and its spec."""

    build: Callable[[], nn.Module]
    call: Callable[[int], dict[str, Any]]
    sites: int
    spec: lx.CascadeSpec = field(default_factory=lx.CascadeSpec)


CASES = {
    "timm-resnet": Case(lambda: timm_model("resnet10t", **DROP), images, 15),
    "timm-efficientnet-lite": Case(lambda: timm_model("tf_efficientnet_lite0", **DROP), images, 50),
    "timm-mobilenetv3": Case(lambda: timm_model("mobilenetv3_small_050", drop_rate=0.3), images, 54),
    "timm-vit": Case(lambda: timm_model("vit_tiny_patch16_224", **VIT), images, 10),
    "timm-convnext": Case(
        lambda: timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 12, 16, 20), **DROP), images, 18
    ),
    "torchvision-resnet": Case(lambda: RESNET.ResNet(RESNET.BasicBlock, [1, 1, 1, 1], num_classes=5), images, 13),
    "torchvision-mobilenet": Case(lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5), images, 53),
}
SLOW = {"timm-resnet", "timm-convnext", "timm-efficientnet-lite"}
"""Those of which another case has the library and the layers."""


def tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def run(model: nn.Module, call: dict[str, Any]) -> Any:
    torch.manual_seed(99)  # of dropout and stochastic depth
    return model(*call["args"], **call["kwargs"])


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in CASES]
)
def test_outputs_and_running_statistics_are_the_eager_models(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(31)
    model = case.build().train()
    eager = copy.deepcopy(model).requires_grad_(
        False
    )  # as in the cascade: torch selects attention kernels by this flag
    example = case.call(2)
    cascade = lx.adapt(model, **example, spec=case.spec)
    assert len(cascade.sites) >= case.sites
    assert not any(branch.lora_B.any() for branch in branches(cascade).values())
    for training, size in ((True, 2), (True, 3), (False, 2), (False, 5)):
        cascade.train(training)
        eager.train(training)
        call = case.call(size)
        computed, expected = run(cascade, call), run(eager, call)
        assert type(computed) is type(expected)
        pairs = list(zip(tensors(computed), tensors(expected), strict=True))
        assert pairs
        for mine, right in pairs:
            assert right.std() > 0
            assert mine.dtype == right.dtype
            assert torch.equal(mine, right), (training, size, (mine - right).abs().max())
        for (buffer, mine), right in zip(model.named_buffers(), eager.buffers(), strict=True):
            assert torch.equal(mine, right), buffer
    if "resnet" in name:
        counted = {int(value) for each, value in model.named_buffers() if each.endswith("num_batches_tracked")}
        assert counted == {2}


def test_train_mode_is_random_if_the_model_is() -> None:
    """This shows that the test above, which sets seeds, does compare dropout."""
    model, call = CASES["timm-vit"].build().train(), images(3)
    cascade = lx.adapt(model, **call)
    assert not torch.equal(cascade(*call["args"]), cascade(*call["args"]))
    cascade.eval()
    assert torch.equal(cascade(*call["args"]), cascade(*call["args"]))
