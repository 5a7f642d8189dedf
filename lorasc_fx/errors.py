"""What can go wrong: a few types under one root, each error with a stable code.

Each message says what happened, where (weight name, node, file) and what to do; its wording may change. The `code`
(kebab-case) names the situation and does not change: it is what a program, or a test, compares. Each class has a
default; docs/errors.md lists every code. `nearest` is the one place that suggests names.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ExportError",
    "LorascError",
    "LorascWarning",
    "MissingExtra",
    "NoSites",
    "NonFiniteBranch",
    "PassError",
    "PassOrderError",
    "SpecError",
    "StateError",
    "UnknownTarget",
    "VerifyError",
    "listed",
    "named",
    "nearest",
    "path_of",
    "warn",
]

_PACKAGE = os.path.dirname(__file__) + os.sep


class LorascError(Exception):
    """Root of every error that this package raises on purpose."""

    code = "failed"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class LorascWarning(UserWarning):
    """What the user has to act on although nothing failed; the category of every warning of this package."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class SpecError(LorascError, ValueError):
    """A value in the spec, or in a configuration, that cannot be meant."""

    code = "invalid-value"


class UnknownTarget(SpecError):
    """A target, rule or train pattern that matches no weight of the model."""

    code = "unknown-target"


class CaptureError(LorascError):
    """No front end could turn the model into a graph, or the model refused the example inputs."""

    code = "not-captured"


class PassError(LorascError):
    """A pass whose requirement is not met, or a graph that a pass cannot work on."""

    code = "pass-failed"


class NoSites(PassError, SpecError):
    """A spec that leaves nothing to adapt; the message tells why each candidate was refused."""

    code = "no-sites"


class PassOrderError(PassError):
    """Passes that cannot stand in any order, or not in the one given."""

    code = "pass-order"


class VerifyError(PassError):
    """A graph that does not agree with its plan; the message lists each fault with its node."""

    code = "graph-not-verified"


class StateError(LorascError, RuntimeError):
    """A call that is right, at a moment when it is not: after release, inside a backward, with the wrong optimizer."""

    code = "invalid-state"


class NonFiniteBranch(StateError):
    """A branch that holds inf or nan at a fold."""

    code = "non-finite-branch"


class CheckpointError(LorascError):
    """A checkpoint that is damaged, of another base, or cannot be written or read."""

    code = "invalid-checkpoint"


class ExportError(LorascError):
    """A cascade that another format cannot express, or a place where it cannot be written; names each weight."""

    code = "not-exportable"


class MissingExtra(LorascError, ImportError):
    """An optional package is not installed; the message holds the pip command."""

    code = "missing-extra"


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return "; nearest: 'a', 'b'" for the known names most like `name`, or an empty string if none is near."""
    found = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return "; nearest: " + ", ".join(repr(each) for each in found) if found else ""


def listed(known: Iterable[str], count: int = 5) -> str:
    """Return "; known: 'a', 'b' and 7 more" with the first known names: the answer where none is near."""
    names = list(known)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return "; known: " + ", ".join(map(repr, names[:count])) + more if names else ""


def named(names: Iterable[str], count: int = 3) -> str:
    """Return "a, b, c and 4 more" with the first names."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def path_of(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave.

    Raises:
        SpecError: it holds a NUL byte, for which some calls of Python raise a bare ValueError and others find no file.
    """
    if "\0" in os.fspath(path):
        raise SpecError(f"the path {os.fspath(path)!r} holds a NUL byte, which no file system takes; give another")
    return Path(path)


def warn(message: str, code: str) -> None:
    """Warn at the line of the user's program: the first frame that is neither of this package nor of torch."""
    skipped = (_PACKAGE, os.path.dirname(sys.modules["torch"].__file__ or "") + os.sep, contextlib.__file__)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        frame, level = frame.f_back, level + 1
    warnings.warn(LorascWarning(message, code=code), stacklevel=level)
