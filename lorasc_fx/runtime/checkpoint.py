"""What a checkpoint is, to `checkpoint_write` and `checkpoint_read`: a folder of versions, each of two files.

W0 is not copied. A fingerprint of each base parameter refuses another base and names what differs. Loading runs no code
from a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasc_fx.runtime import generators

__all__ = ["FORMAT", "MANIFEST", "RNG", "TENSORS"]

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
RNG = generators.CPU
_PREFIX = "step-"


def _canonical(manifest: Mapping[str, Any]) -> str:
    """Return the text of a manifest whose digest is kept in it: everything but that digest."""
    return json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)


def _versions(root: Path) -> list[tuple[int, Path]]:
    """Return the versions of a folder, oldest first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        number = path.name.removeprefix(_PREFIX)
        if path.name.startswith(_PREFIX) and number.isdecimal() and path.is_dir() and not path.is_symlink():
            found.append((int(number), path))
    return sorted(found)


def _way_back(version: Path) -> str:
    """Return what can be done about a version that no load takes: go back to the one before."""
    before = [path.name for _, path in _versions(version.parent) if path.name < version.name]
    if not before:
        return "no version before it is here: start anew, and keep several (save(keep=N))"
    return f"take {version.name} away, and {before[-1]} is loaded"
