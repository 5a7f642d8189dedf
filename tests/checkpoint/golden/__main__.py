"""Write the golden checkpoints that are missing, each with the weights that it stands for."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from safetensors.torch import save_file

import lorasc_fx as lx

from . import FOLDER, SPECS, base, inputs


def write(name: str) -> None:
    """Train two stages and two steps of a third, save, and keep the weights in every view."""
    cascade = lx.adapt(base(), args=(inputs(),), spec=SPECS[name])
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    for step in range(8):
        cascade(inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (2, 5):
            cascade.transition(optimizer)
    version = lx.save(cascade, FOLDER / "new", optimizer=optimizer, extra={"steps": 8})
    (FOLDER / name).mkdir()
    shutil.move(version, FOLDER / name / version.name)
    shutil.rmtree(FOLDER / "new")
    save_file(weights_of(cascade), FOLDER / f"{name}.safetensors")


def weights_of(cascade: lx.Cascade) -> dict[str, torch.Tensor]:
    """Return the weights as they are now, in every view, and folded, by `view/name`."""
    found = {f"now/{name}": value.detach().clone() for name, value in cascade.model.named_parameters()}
    views: tuple[Any, ...] = ("slow", "fast", *(("averaged",) if cascade.plan.spec.keeps_average else ()))
    for view in views:
        with cascade.weights(view):
            found |= {f"{view}/{name}": value.detach().clone() for name, value in cascade.model.named_parameters()}
    return found | {f"folded/{name}": value.clone() for name, value in cascade.folded_state_dict().items()}


if __name__ == "__main__":
    for each in SPECS:
        if not (FOLDER / each).exists():
            write(each)
