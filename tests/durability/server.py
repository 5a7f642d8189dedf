"""Runs a function of `child` in a process of its own, which may be killed at any moment."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import dataclass
from typing import Any

from tests.durability import child
from tests.parallel.ranks import processes


@dataclass(frozen=True)
class Ended:
    """How a job ended: what it returned, or the signal that killed it; the seconds that it lived."""

    result: Any
    signal: int
    seconds: float


def run(job: str, *, kill_after: float | None = None, **arguments: Any) -> Ended:
    """Run a function of `child` in a process that gets a SIGKILL after `kill_after` seconds."""
    context, began = processes(child.train), time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, job, arguments))
    process.start()
    sender.close()
    process.join(kill_after)
    process.kill()
    process.join()
    seconds = time.monotonic() - began
    if process.exitcode < 0:
        return Ended(None, -process.exitcode, seconds)
    result, fault = receiver.recv()
    assert not fault, fault
    return Ended(result, 0, seconds)


def _run(sender: Any, job: str, arguments: dict[str, Any]) -> None:
    try:
        sender.send((getattr(child, job)(**arguments), ""))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    os._exit(0)
