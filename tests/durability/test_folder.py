"""The folder of a checkpoint: what is synced when, who may write, what killed writers left."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import lorasc_fx as lx
from tests.checkpoint.runs import Run
from tests.errors.models import inputs, mlp
from tests.kit.errors import raises
from tests.kit.seams import SEAMS, seam

SPEC = lx.CascadeSpec(targets=("conv", "body"), train=("head.*",), rank=1, noise=lx.Noise(0.2))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_thing_is_synced_before_the_next_one_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that loses its power keeps of each file what was synced; so names come after what they name."""
    training = Run(SPEC).started()
    training.step()
    events: list[Any] = []
    synced: dict[str, bytes] = {}
    fsync, rename = os.fsync, Path.rename

    def called(path: str | os.PathLike[str]) -> str:
        parts = Path(os.path.relpath(path, tmp_path)).parts
        return "/".join(part[:8] if part.startswith(".") else part for part in parts)

    def record_sync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append(called(path))
        if path.is_file():
            synced[path.name] = path.read_bytes()
        fsync(handle)

    def record_rename(path: Path, target: Path) -> Path:
        events.append((called(path), called(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    version = training.save(tmp_path / "deep" / "run")
    new = "deep/run/.writing"
    written = [f"{new}/state.safetensors", f"{new}/manifest.json", new]
    assert events == ["", "deep", *written, (new, "deep/run/version-00000001"), "deep/run"]
    assert synced == {path.name: path.read_bytes() for path in version.iterdir()}
    events.clear()
    training.save(tmp_path / "deep" / "run")
    leaves = ("deep/run/version-00000001", "deep/run/.leaving")
    assert events == [*written, (new, "deep/run/version-00000002"), "deep/run", leaves]


def test_what_killed_writers_left_goes_at_the_next_save(tmp_path: Path) -> None:
    training = Run(SPEC).started()
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("x")
    for name in (f".writing-{1:032x}", f".leaving-{2:032x}", ".mine"):
        (run / name).mkdir(parents=True)
        (run / name / "state.safetensors").write_text("half")
    (run / ".writing-link").symlink_to(elsewhere)
    (run / ".writing-file").write_text("x")
    training.save(run)
    assert names(run) == [".mine", ".writing-file", ".writing-link", "version-00000001"]
    assert names(elsewhere) == ["mine"]


class Slowly:
    """A writer that stands still in the middle of its tensors, in a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.training, self.inside, self.go_on = Run(SPEC).started(), threading.Event(), threading.Event()
        self.fault: lx.CheckpointError | None = None
        real = seam("write tensors")

        def waits(*args: Any) -> None:
            real(*args)
            if threading.current_thread() is self.thread:
                self.inside.set()
                assert self.go_on.wait(60)

        def write() -> None:
            try:
                self.training.save(folder)
            except lx.CheckpointError as fault:
                self.fault = fault

        monkeypatch.setattr(*SEAMS["write tensors"], waits)
        self.thread = threading.Thread(target=write)
        self.thread.start()
        assert self.inside.wait(60)

    def finish(self) -> lx.CheckpointError | None:
        self.go_on.set()
        self.thread.join()
        return self.fault


def test_two_writers_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    training = Run(SPEC).started()
    slowly = Slowly(monkeypatch, tmp_path)
    before = names(tmp_path)
    with raises(lx.CheckpointError, "concurrent-save", tmp_path, "another process"):
        training.save(tmp_path)
    assert names(tmp_path) == before
    assert [name[:9] for name in before] == [".lock", ".writing-"]
    assert slowly.finish() is None
    assert names(tmp_path) == ["version-00000001"]
    assert training.save(tmp_path).name == "version-00000002"
    assert names(tmp_path) == ["version-00000002"]


def test_a_lock_file_without_an_owner_is_taken_over(tmp_path: Path) -> None:
    training = Run(SPEC).started()
    for content in ("", "half", '{"host": 1}'):
        (tmp_path / ".lock").write_text(content)
        training.save(tmp_path)
        assert len(names(tmp_path)) == 1


def test_files_have_the_modes_that_the_umask_gives(tmp_path: Path) -> None:
    cascade = lx.adapt(mlp(), args=(inputs(2, 5),), spec=lx.CascadeSpec(rank=1))
    cascade.branches["0/weight"].lora_B.data.fill_(0.1)
    umask = 0o027
    before = os.umask(umask)
    try:
        lx.save(cascade, tmp_path / "deep" / "checkpoint")
        lx.export.peft(cascade, tmp_path / "adapter")
        lx.export.adapter(cascade, tmp_path / "adapter.safetensors", max_rank=1)
        lx.export.safetensors(cascade, tmp_path / "weights" / "folded.safetensors")
        lx.export.safetensors(cascade, tmp_path / "folder")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(modes) >= 9
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}


def test_a_version_that_cannot_be_dropped_stays_until_it_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    training, rename = Run(SPEC).started(), Path.rename

    def stuck(path: Path, target: Path) -> Path:
        if target.name.startswith(".leaving"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    training.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stuck)
        training.save(tmp_path)
    assert names(tmp_path) == ["version-00000001", "version-00000002"]
    training.save(tmp_path)
    assert names(tmp_path) == ["version-00000003"]
