"""The version of this package, and a digest of its source code."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path


@cache
def version() -> str:
    """Return the version of this package."""
    try:
        return importlib.metadata.version("lorasc-fx")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


@cache
def source_digest() -> str:
    """Return the SHA-256 of the source code of this package, which differs between checkouts of the same version."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
