"""The logger `lorasc_fx`: silent by default; at INFO, it logs the time of each capture, variant and transition."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import Breaking

ROOT = Path(__file__).parents[2]

ENDS = """
import torch, lorasc_fx as lx
model, x = torch.nn.Linear(5, 3), torch.ones(2, 5)
cascade = lx.adapt(model, args=(x,), spec=lx.CascadeSpec(rank=2))
optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
for stage in cascade.stages(2, optimizer):
    if {trains}:
        cascade(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False])
def test_only_warnings_are_printed_by_default(trains: bool) -> None:
    script = ENDS.replace("{trains}", str(trains))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    told = "<string>:6: LorascWarning: stage 1 ended, and no branch has moved"  # line 6 is that of the loop
    assert [line[: len(told)] for line in done.stderr.splitlines()] == ([] if trains else [told])


def test_a_failing_front_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lorasc_fx")
    lx.adapt(Breaking(4), args=(torch.ones(2, 4),), spec=lx.CascadeSpec(rank=2))
    assert re.search(r"Breaking not captured by export, in \d+\.\d\d s: .+", caplog.text)
    assert "Breaking runs eagerly" in caplog.text


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
    assert all(one is other for one, other in zip(parameters, cascade.parameters(), strict=True))
    cascade.double()(x.double())
    assert "captured" in caplog.text
