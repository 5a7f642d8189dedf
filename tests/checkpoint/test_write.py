"""Writing a version: completely or not at all, the number of kept versions, and errors before anything is written."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorasc_fx as lx
from tests.checkpoint.runs import Run, Training, X
from tests.errors.models import Net
from tests.errors.state import assert_same, of_slow, unchanged
from tests.kit.errors import raises
from tests.kit.seams import SEAMS

SPEC = lx.CascadeSpec(targets=("conv", "body"), train=("head.*",), rank=1, noise=lx.Noise(0.2))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()}


def version(number: int) -> list[str]:
    folder = f"version-{number:08d}"
    return [folder, f"{folder}/manifest.json", f"{folder}/state.safetensors"]


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Training]:
    """Return a training with one version, in the folder `run`. At the end of the test this is still the only version,
    with the same bytes, and another one can be written.
    """
    training, folder = Run(SPEC).started(), tmp_path / "run"
    training.step()
    training.save(folder)
    before, slow = contents(folder), of_slow(training.cascade)
    yield training
    assert contents(folder) == before
    assert names(folder) == version(1)
    assert_same(of_slow(lx.load(folder, Net(), args=(X,))), slow)
    assert training.save(folder).name == "version-00000002"
    assert names(folder) == version(2)
    assert_same(of_slow(lx.load(folder, Net(), args=(X,))), of_slow(training.cascade))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep(keep: int, tmp_path: Path) -> None:
    training = Run(SPEC, keep=keep).started()
    slow = []
    for number in range(1, 6):
        training.step()
        assert training.save(tmp_path / "deep" / "run") == tmp_path / "deep" / "run" / f"version-{number:08d}"
        slow.append(training.result())
        last = range(max(1, number - keep + 1), number + 1)
        assert names(tmp_path / "deep" / "run") == [name for version_number in last for name in version(version_number)]
    assert_same(Run(SPEC).resumed(tmp_path / "deep" / "run").result(), slow[-1])


@pytest.mark.parametrize("keep", [0, -1, True, 1.5, None, "2"])
def test_a_wrong_number_of_versions(keep: Any, tmp_path: Path) -> None:
    training = Run(SPEC).started()
    with unchanged(training.cascade, training.optimizer), raises(lx.SpecError, "invalid-value", "keep", keep):
        lx.save(training.cascade, tmp_path / "run", keep=keep)
    assert not names(tmp_path)


@pytest.mark.parametrize("name", ["step-500", "step-00000500", "version-00000500", "version-5", "step-00000000"])
@pytest.mark.parametrize("file", ["shards/x.distcp", "manifest.json", "state.safetensors", ""])
def test_folders_of_other_programs_stay(name: str, file: str, tmp_path: Path) -> None:
    """Whatever their names and their files' names are: a folder without a manifest is never deleted."""
    foreign = tmp_path / name / file
    (foreign.parent if file else foreign).mkdir(parents=True)
    if file:
        foreign.write_text('{"weeks": 3}')
    training = Run(SPEC).started()
    written = [training.save(tmp_path).name for _ in range(3)]
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.name != name] == [written[-1]]
    assert foreign.is_dir() if not file else foreign.read_text() == '{"weeks": 3}'
    assert_same(of_slow(lx.load(tmp_path, Net(), args=(X,))), of_slow(training.cascade))


def test_versions_of_another_run_or_damaged_ones_stay(tmp_path: Path) -> None:
    foreign = Run(lx.CascadeSpec(targets=("conv",), rank=2)).started().save(tmp_path)
    training = Run(SPEC).started()
    damaged = training.save(tmp_path)
    (damaged / "manifest.json").write_text((damaged / "manifest.json").read_text()[:-9])
    last = [training.save(tmp_path) for _ in range(2)][-1]
    assert sorted(tmp_path.iterdir()) == [foreign, damaged, last]


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"x": torch.zeros(2).to_sparse()}, "extra/x is a Tensor of float32, torch.sparse_coo"),
        ({"x": [torch.zeros(2, dtype=torch.complex128)]}, "extra/x/0 is a Tensor of complex128"),
        ({"x": {1, 2}}, "Object of type set is not JSON serializable"),
        ({"x": b"bytes"}, "Object of type bytes is not JSON serializable"),
        ({"x": CIRCLE}, "recursion"),
        ({object: 1}, "Object of type type is not JSON serializable"),
    ],
)
def test_extra_that_json_cannot_hold(extra: Any, sentence: str, saved: Training, tmp_path: Path) -> None:
    with unchanged(saved.cascade, saved.optimizer), raises(lx.CheckpointError, "not-serializable", sentence):
        lx.save(saved.cascade, tmp_path / "run", optimizer=saved.optimizer, extra=extra)
    with pytest.raises(lx.CheckpointError):
        lx.save(saved.cascade, tmp_path / "new", extra=extra)
    assert not (tmp_path / "new").exists()


def test_a_branch_with_inf_or_nan_is_not_saved(saved: Training, tmp_path: Path) -> None:
    """A load would reject it, so the previous version is before."""
    saved.step()
    branch = saved.cascade.branches["body/weight"]
    for factor, value in ((branch.lora_A, float("inf")), (branch.lora_B, float("nan"))):
        before = factor.detach().clone()
        with torch.no_grad():
            factor[0, 0] = value
        for name in ("run", "new"):
            with unchanged(saved.cascade, saved.optimizer), raises(lx.NonFiniteBranch, "non-finite", "body"):
                saved.save(tmp_path / name)
        with torch.no_grad():
            factor.copy_(before)


def test_moments_with_inf_or_nan_are_not_saved(saved: Training, tmp_path: Path) -> None:
    state = saved.optimizer.state[saved.cascade.branches["body/weight"].lora_A]
    for name in ("exp_avg", "exp_avg_sq"):
        before = state[name].clone()
        state[name][0, 0] = float("nan")
        with unchanged(saved.cascade, saved.optimizer), raises(lx.CheckpointError, "non-finite", name, "holds NaN"):
            saved.save(tmp_path / "run")
        state[name].copy_(before)
    saved.optimizer.param_groups[0]["lr"] = float("nan")
    with raises(lx.CheckpointError, "non-finite", "optimizer.param_groups[0].lr"):
        saved.save(tmp_path / "run")
    saved.optimizer.param_groups[0]["lr"] = 0.1
    state["exp_avg_sq"][0, 0] = float("inf")  # overflowed: the parameter stands still
    saved.save(tmp_path / "new")
    Run(SPEC).resumed(tmp_path / "new")


def fail(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int = 1) -> None:
    """Make one call of a function fail like a full or read-only disk."""
    real, calls = getattr(owner, name), itertools.count(1)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "making the folder": lambda patch: fail(patch, os, "mkdir", 2),
    "the tensors": lambda patch: fail(patch, *SEAMS["write tensors"], 1),
    "syncing the tensors": lambda patch: fail(patch, os, "fsync", 1),
    "the digest": lambda patch: fail(patch, *SEAMS["digest"], 1),
    "the manifest": lambda patch: fail(patch, Path, "write_text", 1),
    "syncing the manifest": lambda patch: fail(patch, os, "fsync", 2),
    "syncing the version": lambda patch: fail(patch, os, "fsync", 3),
    "the rename": lambda patch: fail(patch, Path, "rename", 1),
    "syncing the folder": lambda patch: fail(patch, os, "fsync", 4),
    "opening to lock": lambda patch: fail(patch, os, "open", 1),
    "opening to sync": lambda patch: fail(patch, os, "open", 2),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_write_that_fails(where: str, monkeypatch: pytest.MonkeyPatch, saved: Training, tmp_path: Path) -> None:
    saved.step()
    saved.fold()
    with monkeypatch.context() as patch, unchanged(saved.cascade, saved.optimizer):
        FAILURES[where](patch)
        with raises(lx.CheckpointError, "write-failed", tmp_path / "run", "No space left on device"):
            saved.save(tmp_path / "run")


def test_the_content_of_a_version(tmp_path: Path) -> None:
    training = Run(SPEC).started()
    for event in ("step", "fold", "step"):
        getattr(training, event)()
    folder = training.save(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 2
    manifest = manifest["content"]
    assert manifest["plan"]["stage"] == 2
    assert manifest["extra"] == {"losses": training.losses}
    assert set(manifest["base"]) == {name for name, _ in training.cascade.model.named_parameters()}
    tensors = load_file(folder / "state.safetensors")
    assert not [name for name in tensors if name.endswith(("conv.weight", "body.weight"))]  # W0 is not copied
