"""A cascade in timm's training script: parameter groups, optimizers, gradient scaler and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

import lorasc_fx as lx
from tests.integrations.kit import adapted, net
from tests.integrations.loops import Timm
from tests.kit.compare import assert_same
from tests.kit.errors import raises


def test_rates_of_the_spec_are_kept() -> None:
    cascade = adapted(lx.CascadeSpec(rank=2, lr_ratio=4.0))
    with raises(lx.SpecError, "optimizer-differs", "0.01", "param_group_fn"):
        cascade.stages(2, create_optimizer_v2(cascade, "adamw", lr=1e-2))
    optimizer = create_optimizer_v2(cascade, "adamw", lr=1e-2, param_group_fn=lambda model: model.param_groups(lr=1e-2))
    cascade.stages(2, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 4e-2]


def test_an_average_of_slow_weights_is_saved_as_timm_does(tmp_path: Path) -> None:
    """Save in the middle of the last stage. The plain model loads it."""
    loop = Timm(lx.CascadeSpec(rank=2, noise=lx.Noise(0.1)))
    loop.go(0)
    with loop.cascade.weights("slow"):
        mean = ModelEmaV3(loop.cascade.model, decay=0.5)
        expected = {name: value.clone() for name, value in loop.cascade.model.state_dict().items()}
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    CheckpointSaver(loop.cascade, loop.optimizer, model_ema=mean, **folders).save_checkpoint(3, metric=1.0)
    model, last = net(), str(tmp_path / "last.pth.tar")
    load_checkpoint(model, last, use_ema=True)
    assert_same(dict(model.state_dict()), expected)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_checkpoint(model, last, use_ema=False)
