"""The logger `lorasc_fx`: at INFO, it logs the time of each capture, variant and transition."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises


def test_a_move_to_the_same_device_keeps_the_graphs(caplog: pytest.LogCaptureFixture) -> None:
    """Also under the name `cpu:0`, for which torch makes copies, and inside `weights`. A cast drops the graphs."""
    x = torch.ones(2, 4)
    cascade = lx.adapt(nn.Sequential(nn.Linear(4, 3)), args=(x,), spec=lx.CascadeSpec(rank=2))
    parameters = list(cascade.parameters())
    caplog.set_level(logging.INFO, logger="lorasc_fx")
    cascade.to("cpu:0")
    with cascade.weights("slow"):
        cascade.to("cpu:0")
        with raises(lx.StateError, "inside-weights"):
            cascade.double()
    cascade(x)
    assert "captured" not in caplog.text
    assert all(value is before for value, before in zip(cascade.parameters(), parameters, strict=True))
    cascade.double()(x.double())
    assert "captured" in caplog.text
