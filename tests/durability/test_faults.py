"""A full disk, a folder that may not be written, no memory: one clear error, and model and last checkpoint as before.

The system itself refuses, in a process of its own. Every place at which a call can fail is in `tests/errors` and
`tests/checkpoint`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests.durability.server import Server


def test_a_training_outlives_a_full_disk(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = server.run("train", folder=str(tmp_path / "a"))
    assert server.run("a_full_disk", folder=str(tmp_path / "b"), saves=3).result == expected.result
    assert len(list((tmp_path / "b" / "run").iterdir())) == 2


def test_a_folder_that_may_not_be_written(server: Server) -> None:
    """In /tmp itself, where a user without rights can look at it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        said, *left = server.run("a_read_only_folder", folder=folder).result
        assert said == f"{folder}: cannot be written: Permission denied; existing versions are unchanged"
        assert not left
        os.chmod(folder, 0o755)
