"""Errors and warnings of this package as tests hold them: the type, the code, and the names that the message has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from lorasc_fx.errors import LorascError, LorascWarning

AnyError = TypeVar("AnyError", bound=LorascError)


def lacking(problem: LorascError | LorascWarning, code: str, names: tuple[object, ...]) -> str:
    """Say what an error or a warning has not, of a code and of names; an empty string where it has all."""
    if problem.code != code:
        return f"its code is {problem.code!r}, not {code!r}: {problem}"
    absent = [str(name) for name in names if str(name) not in str(problem)]
    return f"it does not name {absent}: {problem}" if absent else ""


@contextmanager
def raises(
    kind: type[AnyError] | tuple[type[AnyError], ...], code: str, *names: object
) -> Iterator[pytest.ExceptionInfo[AnyError]]:
    """Expect an error of this type and code, whose message has each of the names."""
    with pytest.raises(kind) as caught:
        yield caught
    assert not (lack := lacking(caught.value, code, names)), lack


@contextmanager
def warns(code: str, *names: object) -> Iterator[pytest.WarningsRecorder]:
    """Expect a warning of this code, whose message has each of the names; all others are given again."""
    with pytest.warns(LorascWarning) as caught:
        yield caught
    lacks = []
    for warning in caught:
        if isinstance(warning.message, LorascWarning):
            lacks.append(lacking(warning.message, code, names))
            if lacks[-1]:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    assert "" in lacks, lacks
