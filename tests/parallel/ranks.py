"""Run a function on N processes with the gloo backend and a time limit, and show the errors of all processes."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from lorasc_fx.errors import LorascWarning
from tests.conftest import DROPPED, USAGE

Work = Callable[..., dict[str, torch.Tensor] | None]


class RankFailed(AssertionError):
    """A process raised, died, or exceeded the time limit. The message contains the tracebacks."""

    def __init__(self, message: str, codes: list[int | None], texts: list[str]) -> None:
        super().__init__(message)
        self.codes, self.texts = codes, texts


def on_ranks(
    count: int, work: Work, *args: Any, limit: float = 150.0, timeout: float = 60.0, group: bool = True
) -> list[dict[str, torch.Tensor]]:
    """Return what `work(rank, count, *args)` returns on each of `count` processes, by rank.

    Args:
        count: number of processes.
        work: a function of a module (it is sent by name); returns tensors by name, or nothing.
        limit: seconds after which all are killed.
        timeout: seconds that a collective waits for the others.
        group: whether they talk at all.

    Raises:
        RankFailed: one of them has failed.
    """
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.close()
        context = processes(work)
        started = [
            context.Process(target=_run, args=(rank, count, port, folder, timeout if group else 0.0, work, args))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        end, grace = time.monotonic() + limit, timeout + 3  # the others have a separate time limit
        while (time_now := time.monotonic()) < end and any(process.is_alive() for process in started):
            if any(process.exitcode for process in started):
                end = min(end, time_now + grace)
                grace = limit
            time.sleep(0.05)
        late = [process.is_alive() for process in started]
        for process in started:
            process.kill()
            process.join()
        codes = [None if alive else process.exitcode for alive, process in zip(late, started, strict=True)]
        texts = [_read(Path(folder, f"{rank}.txt")) for rank in range(count)]
        if any(codes) or any(late):
            states = ["still ran" if code is None else f"ended with {code}" for code in codes]
            parts = [
                f"rank {rank} {state}\n{text}" for rank, (state, text) in enumerate(zip(states, texts, strict=True))
            ]
            raise RankFailed("\n".join(parts), codes, texts)
        return [load_file(Path(folder, f"{rank}.safetensors")) for rank in range(count)]


def processes(work: Callable[..., Any]) -> Any:
    """The context that starts processes: forks of a server that has imported torch, this package and the Trainer.

    The module of the work comes along, if it is the first one: the server lives until the test run ends.
    """
    context = mp.get_context("forkserver")
    modules = ["torch._dynamo", "torch.distributed.tensor", "lorasc_fx", "transformers.trainer", work.__module__]
    context.set_forkserver_preload(modules)
    return context


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _run(rank: int, count: int, port: int, folder: str, timeout: float, work: Work, args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    warnings.simplefilter("error")
    usage = USAGE if work.__module__.startswith("tests.parallel") else ()
    for message in (*usage, DROPPED):  # as in tests/conftest.py
        warnings.filterwarnings("ignore", message, LorascWarning)
    torch.set_num_threads(1)
    try:
        if timeout:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        tensors = work(rank, count, *args) or {}
        save_file(
            {name: value.detach().contiguous() for name, value in tensors.items()}, f"{folder}/{rank}.safetensors"
        )
        code = 0
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        code = 1
    os._exit(code)  # to take the group down could wait for the others, or abort where they are gone
