"""Registers the simulated accelerator, for the life of this process (`make test` starts a separate pytest for it)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.accelerator import device
from tests.accelerator.kit import SIMULATED


def pytest_configure(config: pytest.Config) -> None:
    # Build while the workers import what they need. They wait for this process, by a lock, if it is not done by then.
    if SIMULATED and not device.why_not() and not hasattr(config, "workerinput"):
        build = subprocess.Popen([sys.executable, "-m", device.__name__], stdout=subprocess.DEVNULL)
        config.add_cleanup(build.wait)


@pytest.fixture(scope="session", autouse=True)
def accelerator() -> None:
    """Register the device. Attention is computed by plain products, for which all devices have the same kernels."""
    if SIMULATED:
        if reason := device.why_not():
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        device.register()
    for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        enable(False)
