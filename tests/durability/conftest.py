"""One server a worker, started by the first test that kills."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.durability.server import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running
