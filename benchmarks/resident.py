"""Memory of one rival in a process of its own: `python -m benchmarks.resident MODEL RIVAL THREADS [cuda]`.

The peak of a process is one number for all that it did, so each rival has a process, and the peak is set back after the
rival was built. What is reported is the whole process: interpreter and libraries, weights, W0, gradients, activations.
Large blocks have mappings of their own (`MALLOC_MMAP_THRESHOLD_`), so that a hole that is left in the heap is no part
of it: by glibc's moving threshold it is, and how many there are depends on the number of threads.
With one of STARTS as the rival it is what `adapt` adds at its peak to a process that holds the model. On
`cuda` it is what torch has allocated on the device at its peak (`torch.cuda.max_memory_allocated`).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lorasc_fx as lx

__all__ = ["STARTS", "can_measure", "resident", "resident_all", "started"]

RIVALS = ("frozen", "ours", "ours-file", "peft", "full")
"""`ours-file` is ours with W0 in the files that the model was saved to."""
STARTS = ("start", "start-noise", "start-file")
"""What keeps W0 while `adapt` is measured: memory, with noise a copy in it, or files that the model was saved to."""

_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def can_measure() -> bool:
    """Return whether this system tells the peak of a process, and lets it be set back (Linux)."""
    return _REFS.exists()


def _peak() -> int:
    """Return the largest resident size since the last `_set_back`, in bytes."""
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _set_back() -> None:
    _REFS.write_text("5", encoding="utf-8")


def resident(name: str, rival: str, threads: int, device: str = "cpu") -> dict[str, int]:
    """Return bytes: `built`, the peak while the rival is made, and `step`, the peak of three steps after that. Of ours
    these are steps of the second stage, as W0 is copied when the first one ends; and there are `first`, the peak of
    steps before, and `sites`, what W0 takes.
    """
    import torch
    from safetensors.torch import save_model

    import lorasc_fx as lx

    from .measure import pin
    from .models import works
    from .rivals import make

    pin(threads)
    work = works(device)[name]
    peak_of, set_back = (
        (_peak, _set_back) if device == "cpu" else (torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats)
    )
    model, batch = work.build(), work.batch()
    with tempfile.TemporaryDirectory() as folder:
        if rival == "ours-file":
            save_model(model, f"{folder}/model.safetensors")
            found = make("ours", work, model, batch, base=folder)
        else:
            found = make(rival, work, model, batch)
        built = peak_of()

        def peak_of_steps() -> int:
            set_back()
            for _ in range(3):
                found.prepare()
                found.step()
            return peak_of()

        peak, more = peak_of_steps(), dict[str, int]()
        if isinstance(found.model, lx.Cascade):
            more = {"first": peak, "sites": _of_sites(found.model)}
            found.model.zero_grad(set_to_none=True)
            found.model.transition(None)
            peak = peak_of_steps()
    return {"built": built, "step": peak, **more}


def started(name: str, rival: str, threads: int) -> dict[str, int]:
    """Return bytes: `weights` of the model, `sites` (W0), what a `forward` adds at its peak with its autograd graph,
    and what is `added` by `adapt` at its peak, for one of STARTS.

    The model has run before, and another was adapted, so that the memory of libraries is none of it.
    """
    from safetensors.torch import save_model

    import lorasc_fx as lx

    from .measure import pin
    from .models import STARTED, WORKS
    from .rivals import NOISE, RANK, adapted

    pin(threads)
    adapted(WORKS["tiny"], WORKS["tiny"].build(), WORKS["tiny"].batch()).release()
    work = (WORKS | STARTED)[name]
    model, batch = work.build(), work.batch()
    batch = {key: value[:2] for key, value in batch.items()}
    noise = lx.Noise(NOISE if rival == "start-noise" else 0.0)
    spec = lx.CascadeSpec(targets=work.targets, rank=RANK, noise=noise)
    with tempfile.TemporaryDirectory() as folder:
        if rival == "start-file":
            save_model(model, f"{folder}/model.safetensors")
        work.loss(model(**batch)).backward()
        model.zero_grad(set_to_none=True)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _set_back()
        before = _peak()
        model(**batch)
        forward = _peak()
        ctypes.CDLL(None).malloc_trim(0)
        _set_back()
        cascade = lx.adapt(model, kwargs=batch, spec=spec, base=folder if rival == "start-file" else "memory")
        after = _peak()
    weights = sum(value.nbytes for value in model.parameters())
    sites = _of_sites(cascade)
    return {"weights": weights, "sites": sites, "forward": forward - before, "added": after - before}


def _of_sites(cascade: lx.Cascade) -> int:
    """Return the bytes of the weights that have a branch."""
    return sum(cascade.model.get_parameter(site.weight).nbytes for site in cascade.sites)


def resident_all(
    name: str, threads: int, rivals: Sequence[str] = RIVALS, device: str = "cpu"
) -> dict[str, dict[str, int]]:
    """Return `resident` of each rival, or `started`, from children.

    As many at a time as there are cores, since none is timed; on a GPU, whose memory they would share, one at a time.
    """

    def ask(rival: str) -> dict[str, int]:
        asked = [name, rival, str(threads), *([] if device == "cpu" else [device])]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.resident", *asked]
        settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1], env=settings
        )
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor((os.cpu_count() or 1) if device == "cpu" else 1) as pool:
        return dict(zip(rivals, pool.map(ask, rivals), strict=True))


if __name__ == "__main__":
    ask = started if sys.argv[2] in STARTS else resident
    print(json.dumps(ask(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])))
