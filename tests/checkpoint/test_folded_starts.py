"""Folding a checkpoint without a model equals a release, also for stages that start from the weight or scale rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorasc_fx as lx
from tests.checkpoint.runs import THREE_STAGES, Run
from tests.errors.models import Net
from tests.kit.state import folded_changes

SPECS = {
    "pissa": lx.CascadeSpec(rank=1, pace=0.4, start="pissa", noise=lx.Noise(0.2)),
    "olora": lx.CascadeSpec(rank=1, pace=0.4, start="olora", restart="fast"),
    "dora": lx.CascadeSpec(rank=1, pace=0.4, adapter="dora", noise=lx.Noise(0.2)),
    "dora, collapsed": lx.CascadeSpec(rank=4, pace=0.4, adapter="dora", start="pissa"),
    "by the step": lx.CascadeSpec(rank=1, pace=0.4, noise=lx.Noise(0.2, redraw="step")),
}


EVENTS = {"one": ("step", "step"), "four": THREE_STAGES, "idle": (*THREE_STAGES, "loop")}


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("spec", SPECS)
def test_the_fold_of_a_checkpoint(spec: str, events: str, tmp_path: Path) -> None:
    going = Run(SPECS[spec]).started()
    for event in EVENTS[events]:
        getattr(going, event)()
    going.save(tmp_path)
    changes, base = folded_changes(tmp_path), dict(Net().named_parameters())
    expected = going.cascade.release()
    assert {site.weight for site in going.cascade.sites} <= changes.keys()
    for name, value in expected.named_parameters():
        found = changes[name](base[name].detach()) if name in changes else base[name]
        assert torch.equal(found, value), name
        assert name not in changes or not torch.equal(value, base[name])
