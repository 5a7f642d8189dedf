"""A cascade in timm's training script: parameter groups, optimizers, gradient scaler and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch.nn.functional import cross_entropy

import lorasc_fx as lx
from tests.kit.errors import raises

X, LABELS = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def adapted(**fields: Any) -> Any:
    return lx.adapt(vit(), (X,), spec=lx.CascadeSpec(**{"rank": 2, "targets": ("linear", "conv"), **fields}))


def test_rates_of_the_spec_are_kept() -> None:
    cascade = adapted(lr_ratio=4.0)
    with raises(lx.SpecError, "optimizer-differs", "0.01", "param_group_fn"):
        cascade.stages(2, create_optimizer_v2(cascade, "adamw", lr=1e-2))
    optimizer = create_optimizer_v2(cascade, "adamw", lr=1e-2, param_group_fn=lambda each: each.param_groups(lr=1e-2))
    cascade.stages(2, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 4e-2]


class Loop:
    """timm's script with a stage of six steps."""

    def __init__(self, optimizer: str = "adamw", **fields: Any) -> None:
        self.cascade = adapted(noise=lx.Noise(0.1), **fields)
        self.optimizer = create_optimizer_v2(self.cascade, optimizer, lr=1e-2, weight_decay=0.05)
        self.schedule = CosineLRScheduler(self.optimizer, t_initial=24, t_in_epochs=False)
        self.scaler = NativeScaler(device="cpu")
        self.losses: list[float] = []

    def go(self, start: int, end: int) -> None:
        self.cascade.train()
        for step in range(start, end):
            loss = cross_entropy(self.cascade(X[step % 3 :]), LABELS[step % 3 :])
            self.scaler(loss, self.optimizer, clip_grad=1.0, parameters=self.cascade.parameters())
            self.optimizer.zero_grad()
            self.schedule.step_update(step + 1)
            self.losses.append(loss.item())
            if step % 6 == 5:
                self.cascade.transition(self.optimizer)


def test_an_average_of_slow_weights_is_saved_as_timm_does(tmp_path: Path) -> None:
    """Save in the middle of the second stage. The plain model loads it."""
    loop = Loop()
    loop.go(0, 8)
    with loop.cascade.weights("slow"):
        mean = ModelEmaV3(loop.cascade.model, decay=0.5)
        expected = {name: value.clone() for name, value in loop.cascade.model.state_dict().items()}
    where = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    CheckpointSaver(loop.cascade, loop.optimizer, model_ema=mean, **where).save_checkpoint(3, metric=1.0)
    model, last = vit(), str(tmp_path / "last.pth.tar")
    load_checkpoint(model, last, use_ema=True)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_checkpoint(model, last, use_ema=False)
