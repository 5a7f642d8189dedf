"""A checkpoint of a stage that starts from the weight, or scales rows, folded without a model: as a release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import lorasc_fx as lx
from tests.checkpoint.runs import THREE_STAGES, Run
from tests.damage.mutations import put, signed
from tests.errors.models import Net
from tests.kit.state import MANIFEST, TENSORS, branches_of, folded_changes, read

SPECS = {
    "pissa": lx.CascadeSpec(rank=1, pace=0.4, start="pissa", noise=lx.Noise(0.2)),
    "olora": lx.CascadeSpec(rank=1, pace=0.4, start="olora", restart="fast"),
    "dora": lx.CascadeSpec(rank=1, pace=0.4, use_dora=True, noise=lx.Noise(0.2)),
    "dora, collapsed": lx.CascadeSpec(rank=4, pace=0.4, use_dora=True, start="pissa"),
    "by the step": lx.CascadeSpec(rank=1, pace=0.4, noise=lx.Noise(0.2, redraw="step")),
}


EVENTS = {"one": ("step", "step"), "four": THREE_STAGES, "parked": (*THREE_STAGES, "loop")}


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


@pytest.mark.parametrize(
    ("spec", "name", "sentence"),
    [
        ("pissa", "began/body.weight/b", r"has no tensor 'began/body\.weight/b'"),
        ("dora", "began/body.weight/m", r"has no tensor 'began/body\.weight/m'"),
        ("dora", "turn/body.weight/0", r"has no tensor 'turn/body\.weight/0'"),
        (
            "dora",
            "branch/body.weight/lora_magnitude_vector",
            r"has no tensor 'branch/body\.weight/lora_magnitude_vector'",
        ),
    ],
)
def test_a_checkpoint_that_lacks_one(spec: str, name: str, sentence: str, tmp_path: Path) -> None:
    """Signed anew, as a forger would: the missing tensor is named, and the model is as it was."""
    going = Run(SPECS[spec]).started()
    for event in ("step", "fold", "step"):
        getattr(going, event)()
    version = going.save(tmp_path)
    tensors = load_file(version / TENSORS)
    del tensors[name]
    data = save(tensors)
    manifest = signed(json.loads((version / MANIFEST).read_text()), data)
    put(version, {TENSORS: data, MANIFEST: manifest})
    model = Net()
    held = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lx.CheckpointError, match=sentence):
        lx.load(tmp_path, model, args=(going.run.x,))
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())


def test_rows_that_were_scaled_in_no_stage(tmp_path: Path) -> None:
    going = Run(SPECS["dora"]).started()
    for event in ("step", "fold", "step"):
        getattr(going, event)()
    version = going.save(tmp_path)
    for turns in ([[7, 0]], [[1, 3]], [[1]], [["1", 0]]):
        manifest = json.loads((version / MANIFEST).read_text())
        manifest["slow"]["body.weight"]["turns"] = turns
        put(version, {MANIFEST: signed(manifest, (version / TENSORS).read_bytes())})
        with pytest.raises(lx.CheckpointError, match=r"'slow': body\.weight scaled its rows in stages that were not"):
            read(tmp_path)


def test_magnitudes_that_moved_without_an_expert(tmp_path: Path) -> None:
    """B = 0 all along: no expert, and yet another weight, in a file and in a checkpoint."""
    from safetensors.torch import load_file as load

    going = Run(lx.CascadeSpec(targets=("body", "head"), pace=0.5, rank=1, use_dora=True)).started()
    with torch.no_grad():
        for branch in branches_of(going.cascade).values():
            branch.lora_magnitude_vector.mul_(3)
    going.fold()
    going.save(tmp_path / "run")
    lx.export.safetensors(going.cascade, tmp_path / "folded.safetensors")
    found, base = load(tmp_path / "folded.safetensors"), dict(Net().named_parameters())
    changes = folded_changes(tmp_path / "run")
    for name in ("body.weight", "head.weight"):
        torch.testing.assert_close(found[name], 2 * base[name].detach(), rtol=1e-6, atol=0)
        assert torch.equal(changes[name](base[name].detach()), found[name])
