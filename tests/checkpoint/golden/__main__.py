"""Write the checkpoints of format 2 that are missing: those of format 1 as they are saved again."""

from __future__ import annotations

import shutil

import torch

import lorasc_fx as lx

from . import FORMATS, SPECS, base, inputs


def write(name: str) -> None:
    """Load one of format 1, and save it with all that it holds."""
    first, second = FORMATS
    cascade = lx.load(first / name, base(), args=(inputs(),))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    extra = cascade.resume(optimizer)
    version = lx.save(cascade, second / "new", optimizer=optimizer, extra=extra)
    (second / name).mkdir()
    shutil.move(version, second / name / version.name)
    shutil.rmtree(second / "new")


if __name__ == "__main__":
    for each in SPECS:
        if not (FORMATS[1] / each).exists():
            write(each)
