"""Write the checkpoints that are missing, and the weights that each of them stands for."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import save_file

import lorasc_fx as lx

from . import FOLDER, SPECS, Net, base, inputs


def write(name: str) -> None:
    """Train two stages and a part of a third, and save."""
    torch.manual_seed(0)
    cascade = lx.adapt(base(), args=(inputs(),), spec=SPECS[name])
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    for step in range(5):
        if step in (2, 4):
            cascade.transition(optimizer)
        optimizer.zero_grad()
        (cascade(inputs()) - torch.eye(5, 3)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    version = lx.save(cascade, FOLDER / "new", optimizer=optimizer, extra={"case": name})
    held = {f"now/{key}": value.detach().clone() for key, value in cascade.model.named_parameters()}
    for which in ("slow", "fast", *(("averaged",) if SPECS[name].average != "off" else ())):
        with cascade.weights(which):
            held |= {f"{which}/{key}": value.detach().clone() for key, value in cascade.model.named_parameters()}
    held |= {f"folded/{key}": value.clone() for key, value in cascade.folded_state_dict().items()}
    (FOLDER / name).mkdir()
    shutil.move(version, FOLDER / name / "version-00000001")
    shutil.rmtree(FOLDER / "new")
    save_file(held, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    if not (FOLDER / "base.safetensors").exists():
        torch.manual_seed(7)
        save_file(Net().state_dict(), FOLDER / "base.safetensors")
    for each in SPECS:
        if not (FOLDER / each).exists():
            write(each)
