"""Stages of torch's pipeline parallelism, each adapted by itself: the numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.devices import pipelined
from tests.devices.ranks import on_ranks


@pytest.mark.slow
def test_two_stages_are_one_process(tmp_path: Path) -> None:
    """Names are those of the whole model, and so are noise and initial factors; a transition asks nobody."""
    base = tmp_path / "base.safetensors"
    save_file(pipelined.net().state_dict(), base)
    before, expected = load_file(base), pipelined.alone()
    first, last = on_ranks(2, pipelined.staged, str(base), str(tmp_path), limit=300)
    for name in pipelined.CUTS:
        held = {key.removeprefix(f"{name}/"): value for key, value in (first | last).items() if key.startswith(name)}
        assert held.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(held[key], value, rtol=0, atol=1e-12)
            assert key == "losses" or value.dim() < 2 or (value - before[key]).abs().max() > 1e-3
        folded = load_file(tmp_path / f"{name} 1.safetensors")
        assert folded.keys() == before.keys()
        for key, value in folded.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-12)
