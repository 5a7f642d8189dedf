"""The layout of a checkpoint folder: versions, each a folder with a manifest and tensors.

W0 is not copied. A fingerprint of each base parameter refuses another base and names what differs. Loading runs no code
from a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasc_fx.runtime import generators

__all__ = ["FORMAT", "MANIFEST", "RNG", "TENSORS", "canonical", "is_our_file", "list_versions", "next_name", "way_back"]

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
RNG = generators.CPU

_NAME = re.compile(r"(?:version|step)-([0-9]{8,})")
"""A version is numbered by the count of saves. Earlier releases wrote `step-`, which other programs write as well."""
_FILE = re.compile(rf"{re.escape(MANIFEST)}|{re.escape(TENSORS)}|shard-\d{{5}}-model-\d{{5}}-of-\d{{5}}\.safetensors")


def is_our_file(name: str) -> bool:
    """Whether a version has a file of this name."""
    return _FILE.fullmatch(name) is not None


def canonical(manifest: Mapping[str, Any]) -> str:
    """Return the text of a manifest that its digest is computed from: everything except the digest."""
    return json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)


def list_versions(root: Path) -> list[Path]:
    """Return the versions in a folder, oldest first. A folder without any file of ours is none."""
    if not root.is_dir():
        return []
    numbered = [(_number(path), path) for path in root.iterdir() if _number(path) and _holds_files(path)]
    return [path for _, path in sorted(numbered)]


def next_name(root: Path) -> str:
    """Return the name of the next version in a folder; no entry of the folder has it or a later number."""
    return f"version-{max(map(_number, root.iterdir()), default=0) + 1:08d}"


def way_back(version: Path) -> str:
    """Return the sentence that says what to do about a version that cannot be loaded: use the one before it."""
    before = [path.name for path in list_versions(version.parent) if _number(path) < _number(version)]
    if not before:
        return "no version before it is here: start anew, and keep several (save(keep=N))"
    return f"take {version.name} away, and {before[-1]} is loaded"


def _number(path: Path) -> int:
    """Return the number in the name of a version; 0 for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match is not None else 0


def _holds_files(path: Path) -> bool:
    try:
        return not path.is_symlink() and any(is_our_file(entry.name) for entry in path.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # a file; or a writer has just deleted this version
        return False
