"""A training that is killed with -9, or refused a write, goes on with the same bytes, and every version loads."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests.durability.child import MOMENTS
from tests.durability.server import run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """The digest of a run that nobody killed and that never saved, and the seconds of one that saved."""
    (folder := tmp_path_factory.mktemp("run") / "1").mkdir()
    without = run("train", folder=str(folder), saves=False)
    assert not list(folder.iterdir())
    saving = run("train", folder=str(folder))
    assert saving.result == without.result
    return str(without.result), saving.seconds


def only_versions(folder: Path, keep: int = 2) -> None:
    names = sorted(path.name for path in (folder / "run").iterdir())
    assert len(names) == keep
    assert all(name.startswith("version-") for name in names)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_killed_at_chosen_moments(every: int, undisturbed: tuple[str, float], tmp_path: Path) -> None:
    """One run, killed at each moment, or each seventh; each new process looks at what it finds."""
    moments = list(MOMENTS)[::every]
    for count, moment in enumerate(moments):
        ended = run("train", folder=str(tmp_path), die=moment, after=2 if count % 3 == 0 else 0)
        assert ended.signal == signal.SIGKILL, moment
    assert run("train", folder=str(tmp_path)).result == undisturbed[0]
    only_versions(tmp_path)


@pytest.mark.slow
def test_killed_at_random(undisturbed: tuple[str, float], tmp_path: Path) -> None:
    """Thirty kills at times that are drawn, over as many runs as it takes."""
    expected, seconds = undisturbed
    draw, kills, runs = random.Random(0), 0, 0
    while kills < 30:
        # A process that resumes first looks at all versions.
        ended = run("train", folder=str(tmp_path), kill_after=draw.uniform(0, 2 * seconds))
        if ended.signal:
            assert ended.signal == signal.SIGKILL
            kills += 1
            continue
        assert ended.result == expected
        only_versions(tmp_path)
        runs += 1
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "journal").unlink()
    assert run("train", folder=str(tmp_path)).result == expected
    assert runs > 1


def test_a_training_outlives_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = run("train", folder=str(tmp_path / "a"))
    assert run("a_full_disk", folder=str(tmp_path / "b"), saves=3).result == expected.result
    assert len(list((tmp_path / "b" / "run").iterdir())) == 2


def test_a_folder_that_may_not_be_written() -> None:
    """In /tmp itself, where a user without rights can look at it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        said, *names = run("a_read_only_folder", folder=folder).result
        assert said == f"{folder}: cannot be written: Permission denied; existing versions are unchanged"
        assert not names
        os.chmod(folder, 0o755)
