"""Versions of a small cascade, and helpers that edit their files and update the digests, as a forger would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

import lorasc_fx as lx
from tests.errors.models import inputs
from tests.kit.models import loss_of

MANIFEST, TENSORS = "manifest.json", "state.safetensors"
DEEP = "deep nesting"
"""A placeholder in a manifest that is written as 100,000 nested lists."""
X = inputs(3, 5)
SPEC = lx.CascadeSpec(train=("head.*",), rank=1, restart="fast", noise=lx.Noise(0.2, keep=True))


class Small(nn.Module):
    """A model with two sites (one keeps experts, one collapses), buffers, and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.mid, self.head = nn.Linear(4, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(self.norm(torch.tanh(self.body(x))))))


def optimizers(cascade: lx.Cascade) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


def written(folder: Path, stages: int, spec: lx.CascadeSpec = SPEC) -> dict[str, bytes]:
    """Return the files of a version after some stages, with a running stage."""
    cascade = lx.adapt(Small(), args=(X,), spec=spec, frontend="symbolic")
    optimizer, scheduler = optimizers(cascade)
    for stage in range(stages + 1):
        loss_of(cascade(X)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if stage < stages:
            cascade.transition(optimizer)
            scheduler.step()
    loss_of(cascade(X)).backward()  # gradients that wait
    extra = {"losses": [0.5, float("inf")], "epoch": 3, "name": "run", "order": torch.arange(3)}
    path = lx.save(cascade, folder, optimizer=optimizer, scheduler=scheduler, extra=extra)
    return {name: (path / name).read_bytes() for name in (MANIFEST, TENSORS)}


def put(path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (path / name).write_bytes(data)


def signed(manifest: Any, tensors: bytes) -> bytes:
    """Return the text of a manifest with correct digests of its tensors and of itself, as far as possible."""
    if isinstance(manifest, dict):
        if isinstance(manifest.get("files"), dict) and TENSORS in manifest["files"]:
            manifest["files"][TENSORS] = hashlib.sha256(tensors).hexdigest()
        if "digest" in manifest:
            rest = {key: value for key, value in manifest.items() if key != "digest"}
            manifest["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).encode()


def forge(version: Path, change: Callable[[Any], object]) -> None:
    """Edit the manifest of a version, and update its digests."""
    manifest = json.loads((version / MANIFEST).read_bytes())
    change(manifest)
    (version / MANIFEST).write_bytes(signed(manifest, (version / TENSORS).read_bytes()))


def forge_tensors(version: Path, change: Callable[[Any], object]) -> None:
    """Edit the tensors of a version, and update its digests."""
    tensors = load((version / TENSORS).read_bytes())
    change(tensors)
    (version / TENSORS).write_bytes(save(tensors))
    forge(version, lambda manifest: None)
