"""A process that has imported everything once and forks a process for each job, to be killed at any moment.

`python -m tests.durability.server` reads a job a line and answers it with a line. It has one thread and has
not run torch, so that a fork is like a new process, for a few milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a job ended: what it returned, or the signal that killed it; the seconds that it lived."""

    result: Any
    signal: int
    seconds: float


class Server:
    """The parent's end of the line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, job: str, *, kill_after: float | None = None, **arguments: Any) -> Ended:
        """Run a function of `child` in a separate process; `kill_after` some seconds it gets a SIGKILL."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"job": job, "kill_after": kill_after, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "fault" not in answer, answer["fault"]
        return Ended(answer.get("result"), answer["signal"], answer["seconds"])


@contextmanager
def serving() -> Iterator[Server]:
    command = [sys.executable, "-m", "tests.durability.server"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 0


def _fork(job: str, kill_after: float | None, arguments: dict[str, Any]) -> dict[str, Any]:
    from tests.durability import child

    readable, writable = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        try:
            answer = {"result": getattr(child, job)(**arguments)}
        except BaseException:
            answer = {"fault": traceback.format_exc()}
        with os.fdopen(writable, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writable)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # a child that has ended is still there until it is waited for
    with os.fdopen(readable) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    if code < 0:
        return {"signal": -code, "seconds": seconds}
    return {**json.loads(said), "signal": 0, "seconds": seconds}


def main() -> None:
    from torch import _dynamo  # an optimizer would import it in each process

    from tests.durability import child

    assert _dynamo
    assert child
    assert len(os.listdir("/proc/self/task")) == 1
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of a job is no answer
    for line in sys.stdin:
        print(json.dumps(_fork(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
