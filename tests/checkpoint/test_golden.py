"""Checkpoints of an earlier version load as they were saved, and are saved again bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorasc_fx as lx
from lorasc_fx.checkpoint.folded import of_checkpoint
from lorasc_fx.checkpoint.reader import read
from tests.checkpoint.golden import FOLDER, SPECS, base, inputs
from tests.kit.errors import raises

ANEW = ("versions", "files", "digest", "rng")
"""Fields of a manifest that another process writes otherwise."""


def files(version: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    manifest = json.loads((version / "manifest.json").read_text())
    tensors = load_file(version / "state.safetensors")
    kept = {name: value for name, value in manifest.items() if name not in ANEW}
    return kept, {name: value for name, value in tensors.items() if not name.startswith("rng/")}


def weights(name: str, what: str) -> dict[str, torch.Tensor]:
    held = load_file(FOLDER / f"{name}.safetensors")
    return {key.partition("/")[2]: value for key, value in held.items() if key.startswith(f"{what}/")}


@pytest.fixture(params=SPECS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(name: str) -> Path:
    return FOLDER / name


def assert_weights(found: Any, wanted: dict[str, torch.Tensor]) -> None:
    found = dict(found)
    assert wanted.keys() <= found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_it_is_saved_again_bit_for_bit(name: str, folder: Path, tmp_path: Path) -> None:
    cascade = lx.load(folder, base(), args=(inputs(),))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    extra = cascade.resume(optimizer)
    again, tensors = files(lx.save(cascade, tmp_path, optimizer=optimizer, extra=extra))
    manifest, before = files(folder / "version-00000001")
    assert again == manifest
    assert {key: (value.dtype, value.shape) for key, value in tensors.items()} == {
        key: (value.dtype, value.shape) for key, value in before.items()
    }
    assert all(torch.equal(value, before[key]) for key, value in tensors.items())


def test_it_stands_for_the_weights_of_then(name: str, folder: Path) -> None:
    cascade = lx.load(folder, base(), args=(inputs(),))
    assert_weights(cascade.model.named_parameters(), weights(name, "now"))
    for which in ("slow", "fast", "averaged"):
        if wanted := weights(name, which):
            with cascade.weights(which):  # type: ignore[arg-type]
                assert_weights(cascade.model.named_parameters(), wanted)
    assert_weights(cascade.folded_state_dict(), weights(name, "folded"))


def test_a_fold_of_the_file_alone_gives_the_same(name: str, folder: Path) -> None:
    folded, model = of_checkpoint(read(folder)), base()
    found = {key: value.detach() for key, value in model.named_parameters()}
    found |= {key: change(found[key]) for key, change in folded.changes.items()}
    assert_weights({**found, **dict(folded.buffers)}, weights(name, "folded"))


def test_a_sum_of_one_run_is_the_run(name: str, folder: Path) -> None:
    if SPECS[name].adapter == "dora":
        with raises(lx.SpecError, "method-not-supported", "DoRA"):
            lx.merge([folder], base(), args=(inputs(),), weights=[1.0])
        return
    merged = lx.merge([folder], base(), args=(inputs(),), weights=[1.0])
    assert_weights(merged.folded_state_dict(), weights(name, "folded"))
