"""Options of the spec in runs of the command line: trained, stopped, resumed, and folded in both ways."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorasc_fx as lx
from lorasc_fx.cli import main
from lorasc_fx.cli.config import load_config
from tests.cli.conftest import CONFIG

StopAfter = Callable[[int], AbstractContextManager[None]]

OPTIONS = """
[[spec.train_rules]]
pattern = "7.bias"
lr = 0.002
slow = false

[spec.noise]
"""
ASKED = ("--spec.ranks", "3", "1", "--spec.pace", "1.0", "0.5", "--spec.average", "swa", "--spec.lr-ratio", "4")


@pytest.mark.slow
def test_a_run_with_options_is_resumed_and_folded(
    place: Path, stop_after: StopAfter, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "tiny.toml").write_text(CONFIG.replace("\nrank = 2", "").replace("[spec.noise]\n", OPTIONS.lstrip()))
    assert main(["train", "tiny.toml", "--output", "whole", *ASKED]) == 0
    spec = load_config(place / "whole" / "config.toml").spec
    assert (spec.ranks, spec.pace, spec.average, spec.lr_ratio) == ((3, 1), (1.0, 0.5), "swa", 4.0)
    assert spec.train_rules == (lx.TrainRule("7.bias", lr=0.002, slow=False),)
    with stop_after(6):
        assert main(["train", "tiny.toml", "--output", "parts", *ASKED]) == 130
    assert main(["train", "parts/config.toml", "--resume"]) == 0
    slow = load_file(place / "whole" / "folded.safetensors")
    again = load_file(place / "parts" / "folded.safetensors")
    assert all(torch.equal(slow[name], again[name]) for name in slow)
    for run in ("whole", "parts"):
        assert main(["fold", run, "--view", "averaged", "--output", f"{run}.safetensors"]) == 0
        assert "averaged weights at step 12 of 12\n" in capsys.readouterr().out
    mean = load_file(place / "whole.safetensors")
    assert all(torch.equal(mean[name], load_file(place / "parts.safetensors")[name]) for name in mean)
    assert not torch.equal(mean["0.weight"], slow["0.weight"])
    assert main(["export", "whole", "--to", "safetensors", "--out", "a.safetensors", "--view", "averaged"]) == 0
    assert all(torch.equal(mean[name], load_file(place / "a.safetensors")[name]) for name in mean)


def test_a_probe_has_one_rate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "ruled.toml").write_text(CONFIG.replace("\n[spec.noise]\n", OPTIONS))
    assert main(["compare", "ruled.toml"]) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert (
        "compare.methods has 'probe', which trains with a single learning rate (compare.rates), but spec.train_rules"
        in said
    )
    assert not (place / "runs").exists()
