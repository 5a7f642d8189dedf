"""Checkpoints of an earlier version load as they were saved, and are saved again bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorasc_fx as lx
from lorasc_fx.runtime.checkpoint_read import read
from lorasc_fx.runtime.folded import of_checkpoint
from lorasc_fx.runtime.format_1 import from_format_1
from tests.checkpoint.golden import FOLDER, FORMATS, SPECS, base, inputs
from tests.damage.mutations import MANIFEST, TENSORS, signed
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


@pytest.fixture(params=FORMATS, ids=["format 1", "format 2"])
def folder(request: pytest.FixtureRequest, name: str) -> Path:
    return Path(request.param) / name


def assert_weights(found: Any, wanted: dict[str, torch.Tensor]) -> None:
    found = dict(found)
    assert wanted.keys() <= found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_it_is_saved_again_bit_for_bit(name: str, folder: Path, tmp_path: Path) -> None:
    """In the newest format, whichever it had."""
    cascade = lx.load(folder, base(), args=(inputs(),))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    extra = cascade.resume(optimizer)
    again, tensors = files(lx.save(cascade, tmp_path, optimizer=optimizer, extra=extra))
    manifest, before = files(FORMATS[-1] / name / "version-00000001")
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
    if SPECS[name].use_dora:
        with raises(lx.SpecError, "dora-not-supported", "use_dora"):
            lx.merge([folder], base(), args=(inputs(),), weights=[1.0])
        return
    merged = lx.merge([folder], base(), args=(inputs(),), weights=[1.0])
    assert_weights(merged.folded_state_dict(), weights(name, "folded"))


FORGED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a stage that was not": (lambda entry: entry.update(turns=[[7, 0]]), ("conv.weight", "7")),
    "an expert that is not there": (lambda entry: entry.update(turns=[[1, 3]]), ("format 1", "IndexError")),
    "no number of experts": (lambda entry: entry.update(turns=[[1]]), ("format 1", "ValueError")),
    "a stage that is no number": (lambda entry: entry.update(turns=[["1", 0]]), ("format 1", "TypeError")),
    "no experts": (lambda entry: entry.pop("stages"), ("format 1", "stages")),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_manifest_of_format_1_that_is_none(case: str, tmp_path: Path) -> None:
    """Its names and row scales are translated before it is checked."""
    change, names = FORGED[case]
    version = shutil.copytree(FOLDER / "dora" / "version-00000001", tmp_path / "version-00000001")
    manifest = json.loads((version / MANIFEST).read_bytes())
    change(manifest["slow"]["conv.weight"])
    (version / MANIFEST).write_bytes(signed(manifest, (version / TENSORS).read_bytes()))
    with raises(lx.CheckpointError, "invalid-checkpoint", version, *names):
        lx.load(tmp_path, base())


def test_the_front_end_by_its_name_of_before(tmp_path: Path) -> None:
    version = shutil.copytree(FOLDER / "plain" / "version-00000001", tmp_path / "version-00000001")
    manifest = json.loads((version / MANIFEST).read_bytes())
    (version / MANIFEST).write_bytes(signed({**manifest, "frontend": "pieces"}, (version / TENSORS).read_bytes()))
    assert lx.load(tmp_path, base(), args=(inputs(),)).frontend == "graph-breaks"


def test_a_row_scale_of_format_1_without_factors_is_an_expert_of_its_stage() -> None:
    """By hand: stages 1 and 3 have factors, stages 1 and 2 scaled rows; views from stage 2 on take all of that."""
    views = {"slow": [0.5, 0.25], "start": [0.5, 0.25], "past": [[1, [0.5]], [2, [0.5]]]}
    manifest, name_of = from_format_1(
        {"slow": {"w": {"stages": [1, 3], "turns": [[1, 0], [2, 1]], "kept": [], **views}}}
    )
    entry = manifest["slow"]["w"]
    assert entry["experts"] == [
        {"stage": 1, "tensors": ["b", "a", "row_scale"]},
        {"stage": 2, "tensors": ["row_scale"]},
        {"stage": 3, "tensors": ["b", "a"]},
    ]
    assert entry["slow"] == entry["start"] == [0.5, 1.0, 0.25]
    assert entry["stage_ends"] == [[1, [0.5]], [2, [0.5, 1.0]]]
    renamed = {name: name_of(name) for name in ("turn/w/0", "turn/w/1", "expert/w/0/a", "expert/w/1/b")}
    assert [*renamed.values()] == [
        "expert/w/0/row_scale",
        "expert/w/1/row_scale",
        "expert/w/0/a",
        "expert/w/2/b",
    ]
