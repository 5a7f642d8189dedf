"""Adapters for the tests: cascades with experts, and adapters that peft has trained and saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.models import loss_of, randomize
from tests.kit.state import trained_in_full
from tests.peft.models import BUILD, INPUTS, made, seeded


def frontend_of(name: str) -> str:
    """Return the fastest front end that can capture a model."""
    return "auto" if name in ("llama", "gpt2", "bert") else "symbolic"


def cascade_of(name: str, stages: int = 2, running: bool = True, **spec: Any) -> lx.Cascade:
    """A cascade with an expert per stage, made by values in lora_B; `running`: the last stage is not folded yet.

    What is trained in full has moved.
    """
    given = {"rank": 2, "lora_alpha": 3.0, "pace": 0.5, **spec}
    cascade = lx.adapt(made(BUILD[name]), INPUTS[name](), spec=lx.CascadeSpec(**given), frontend=frontend_of(name))
    for stage in range(stages):
        randomize(cascade, seed=10 + stage)
        with torch.no_grad():
            for index, parameter in enumerate(trained_in_full(cascade).values()):
                parameter.add_(torch.linspace(-0.3, 0.4, parameter.numel()).view(parameter.shape) * (1 + index % 3))
        if stage < stages - 1 or not running:
            cascade.transition(None)
    return cascade


def loaded(name: str, folder: Path) -> nn.Module:
    """Return the same base with the adapter, loaded by peft."""
    return peft.PeftModel.from_pretrained(made(BUILD[name]), folder).eval()


def folded(cascade: lx.Cascade, name: str) -> nn.Module:
    """Return the same base with the slow weights."""
    model = made(BUILD[name])
    model.load_state_dict(cascade.folded_state_dict())
    return model


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Assert that the outputs are equal to 1e-10, and that the change is not zero."""
    assert one.dtype == other.dtype == torch.float64
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert float(one.std()) > 1e-3


def trained_by_peft(name: str, folder: Path, **config: Any) -> peft.PeftModel:
    """Train an adapter with peft for a few steps, and save it."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(made(BUILD[name]), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **config}))
    optimizer = torch.optim.AdamW([parameter for parameter in theirs.parameters() if parameter.requires_grad], lr=0.05)
    args = INPUTS[name]()
    for _ in range(4):
        loss_of(seeded(theirs, args)).backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(folder)
    return theirs.eval()


def merged(theirs: peft.PeftModel) -> nn.Module:
    """Return the base with the adapter, merged by peft."""
    return copy.deepcopy(theirs).merge_and_unload()
