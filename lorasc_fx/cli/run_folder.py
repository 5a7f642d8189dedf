"""The run folder: its files, and checks that a run may write into it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from lorasc_fx.cli.config import Config, load_config, to_dict
from lorasc_fx.errors import SpecError, StateError

CONFIG, TASK, CASCADE = "config.toml", "task.json", "cascade"
"""Files of a run folder beside those of the Trainer: the model, `checkpoint-N`, and `all_results.json`."""
_SAME = ("model", "data", "stages", "train", "spec")
"""Tables of the configuration that a resumed run must not change."""


def check_output(path: Path, *, folder: bool) -> None:
    """Check that a file or folder can be written, before the long work starts.

    Raises:
        SpecError: there is a folder instead of a file or the reverse, a parent is a file, or it is not writable.
    """
    if path.exists() and path.is_dir() != folder:
        kind, expected = ("a file", "a folder") if folder else ("a folder", "a file")
        raise SpecError(f"{path} is {kind}, but the output is {expected}; give another path", code="path-in-the-way")
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    existing = existing if folder or existing != path.absolute() else existing.parent
    if not existing.is_dir():
        raise SpecError(
            f"{path} cannot be created, because {existing} is a file; give another path", code="path-in-the-way"
        )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as fault:
        raise SpecError(
            f"{path} cannot be written: {existing}: {fault.strerror}; give another path", code="write-failed"
        ) from fault


def check_folder(run: Path, config: Config, *, resume: bool) -> None:
    """Check that the run may start in the folder, or that it can be resumed there."""
    check_output(run, folder=True)
    saved = any(run.glob("checkpoint-*"))
    if resume and not saved:
        raise StateError(f"{run} has no checkpoint to resume; remove --resume", code="no-checkpoint")
    if not resume and (saved or (run / CASCADE).exists()):
        raise StateError(
            f"{run} already has a run. Give --resume to continue it, delete the folder, or give another output=FOLDER",
            code="path-in-the-way",
        )
    if resume:
        check_same(run, config)


def check_same(run: Path, config: Config) -> None:
    """Check that a folder has a run with the settings that are about to be trained.

    Raises:
        StateError: a setting differs.
    """
    old, new = to_dict(load_config(run / CONFIG)), to_dict(config)
    for table in _SAME:
        for key in {**old[table], **new[table]}:
            was, wanted = (json.loads(json.dumps(each[table].get(key))) for each in (old, new))
            if was != wanted:
                raise StateError(
                    f"{run} has a run with {table}.{key} = {was!r}, but now it is {wanted!r}. Resume with the same "
                    "value, delete the folder, or give another output=FOLDER",
                    code="spec-differs",
                )
