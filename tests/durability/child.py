"""What the killed processes do: a training as a person would write it, and the moments at which it may die."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

import lorasc_fx as lx
from tests.errors.models import Net, inputs
from tests.errors.state import of, of_optimizer, of_slow, raw
from tests.kit.compare import Watch, seed
from tests.kit.data import batches_from
from tests.kit.models import loss_of
from tests.kit.seams import SEAMS, seam

SPEC = lx.CascadeSpec(
    targets=("conv", "body"), train=("head.*", "norm.*"), rank=1, pace=0.4, noise=lx.Noise(0.2), restart="fast"
)
STAGES, BATCHES, EVERY = 3, 10, 3
"""Stages; batches of a stage, two to an optimizer step; a save after each third batch: gradients may wait."""


def data() -> TensorDataset:
    """27 examples, six batches of four to an epoch: it ends inside of stages."""
    return TensorDataset(inputs(27, 3, 4, 4))


def started(folder: Path) -> tuple[lx.Cascade, torch.optim.Optimizer, Any, int]:
    """Begin, or go on from the folder: the cascade, its optimizer and scheduler, and the number of batches done."""
    seed(random.SystemRandom().getrandbits(31))  # whatever generators a process begins with
    on = any(folder.glob("version-*"))
    if on:
        cascade = lx.load(folder, Net(), args=(inputs(4, 3, 4, 4),))
    else:
        cascade = lx.adapt(Net(), args=(inputs(4, 3, 4, 4),), spec=SPEC)
        seed(7)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    done = cascade.resume(optimizer, scheduler)["done"] if on else 0
    return cascade, optimizer, scheduler, done


def train(folder: str, die: str = "", after: int = 0, keep: int = 2, saves: bool = True) -> str:
    """Train to the end, and return a digest of all bytes there are. Refuses a folder in which something is lost.

    Args:
        folder: of the run: `run` in it is the checkpoint, `journal` tells of each save that returned.
        die: the moment, of `MOMENTS`.
        after: how many of these moments pass before.
        keep: number of versions.
        saves: whether to save at all.
    """
    where, journal = Path(folder) / "run", Path(folder) / "journal"
    check_versions(where, journal)
    if die:
        MOMENTS[die](after)
    cascade, optimizer, scheduler, done = started(where)

    def save() -> None:
        if saves:
            lx.save(cascade, where, optimizer=optimizer, scheduler=scheduler, extra={"done": done}, keep=keep)
            with journal.open("a") as file:
                file.write(f"{cascade.stage} {done}\n")

    batches = batches_from(done, data(), 4)
    stages = STAGES + 1 - cascade.stage
    for stage in cascade.stages(stages, optimizer, scheduler) if stages else ():
        save()
        while done < stage.number * BATCHES:
            (x,) = next(batches)
            loss_of(cascade(x + random.random() + float(np.random.rand()))).backward()
            done += 1
            if done % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
            if done % EVERY == 0:
                save()
    save()
    return digest(cascade, optimizer, scheduler)


def digest(cascade: lx.Cascade, optimizer: torch.optim.Optimizer, scheduler: Any) -> str:
    values = {name: raw(value) for name, value in cascade.state_dict().items()}
    values |= {f"folded {name}": raw(value) for name, value in cascade.folded_state_dict().items()}
    values |= of_slow(cascade) | of_optimizer(optimizer) | {"scheduler": scheduler.state_dict()}
    values |= {"torch": raw(torch.get_rng_state()), "python": random.getstate(), "numpy": np.random.rand()}
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()


def check_versions(where: Path, journal: Path) -> None:
    """Every version loads by itself, and the newest one is no older than the last save that returned."""
    states = []
    for version in sorted(where.glob("version-*")):
        with tempfile.TemporaryDirectory(dir=where.parent) as alone:
            shutil.copytree(version, Path(alone) / version.name)
            cascade = lx.load(alone, Net(), args=(inputs(4, 3, 4, 4),))
            optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
            states.append((cascade.stage, cascade.resume(optimizer)["done"]))
    assert states == sorted(states)
    if journal.exists():
        stage, done = journal.read_text().split()[-2:]
        assert states[-1] >= (int(stage), int(done))


# ---- moments


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def called(real: Any, *args: Any, **kwargs: Any) -> None:
    real(*args, **kwargs)


def around(
    owner: Any, name: str, passing: int, counts: Callable[..., bool], before: bool = False, instead: Any = called
) -> None:
    """Die at a call of a function, when so many that `counts` accepts have passed: before it, in it, or after it."""
    real, calls = getattr(owner, name), itertools.count()

    def patched(*args: Any, **kwargs: Any) -> Any:
        if not counts(*args, **kwargs) or next(calls) < passing:
            return real(*args, **kwargs)
        if not before:
            instead(real, *args, **kwargs)
        die()

    setattr(owner, name, patched)


def half_a_file(real: Any, tensors: Any, path: Path, metadata: Any) -> None:
    real(tensors, path, metadata)
    os.truncate(path, path.stat().st_size // 2)


def half_a_text(real: Any, path: Path, text: str, encoding: str) -> None:
    real(path, text[: len(text) // 2], encoding=encoding)


def half_a_folder(real: Any, path: Path) -> None:
    (path / "state.safetensors").unlink(missing_ok=True)  # a process that died here before has done so


def within(at: int) -> Any:
    def run(real: Any, *args: Any, **kwargs: Any) -> None:
        count = itertools.count(1)
        with Watch(lambda *_: die() if next(count) == at else None):
            real(*args, **kwargs)
        raise AssertionError(f"{real} has fewer than {at} operations")

    return run


def always(*_: Any, **__: Any) -> bool:
    return True


def _named(start: str) -> Callable[..., bool]:
    return lambda path, *_, **__: path.name.startswith(start)


def _becomes(start: str) -> Callable[..., bool]:
    return lambda path, target: target.name.startswith(start)


MOMENTS: dict[str, Callable[[int], None]] = {
    "inside the tensors": lambda n: around(*SEAMS["write tensors"], n, always, instead=half_a_file),
    "before the tensors are synced": lambda n: around(*SEAMS["sync"], n, _named("state"), before=True),
    "inside the manifest": lambda n: around(Path, "write_text", n, _named("manifest"), instead=half_a_text),
    "before the version is synced": lambda n: around(*SEAMS["sync"], n, _named(".writing"), before=True),
    "before the rename": lambda n: around(Path, "rename", n, _becomes("version-"), before=True),
    "after the rename": lambda n: around(Path, "rename", n, _becomes("version-")),
    "after the folder is synced": lambda n: around(*SEAMS["sync"], n, _named("run")),
    "before an old version loses its name": lambda n: around(Path, "rename", n, _becomes(".leaving"), before=True),
    "after an old version lost its name": lambda n: around(Path, "rename", n, _becomes(".leaving")),
    "inside the removal": lambda n: around(*SEAMS["remove a folder"], n, _named(".leaving"), instead=half_a_folder),
    "early in a transition": lambda n: around(*SEAMS["transition"], n, always, instead=within(20)),
    "late in a transition": lambda n: around(*SEAMS["transition"], n, always, instead=within(100)),
    "inside a step": lambda n: around(torch.optim.AdamW, "step", n, always, instead=within(7)),
    "inside a load": lambda n: around(*SEAMS["unpack"], n, always, instead=within(9)),
}


# ---- faults


def a_full_disk(folder: str, saves: int) -> str:
    """Train to the end on a disk that is full during some saves, which must raise; return the digest."""
    real, calls = seam("write tensors"), itertools.count(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000 if 2 < next(calls) <= 2 + saves else soft, hard))
        try:
            real(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    save, refused = lx.save, []

    def forgiving(*args: Any, **kwargs: Any) -> None:
        before = sorted(Path(folder, "run").glob("version-*"))
        try:
            save(*args, **kwargs)
        except lx.CheckpointError as fault:
            refused.append(str(fault))
            assert sorted(Path(folder, "run").iterdir()) == before

    setattr(*SEAMS["write tensors"], limited)
    lx.save = forgiving
    result = train(folder)
    assert len(refused) == saves
    assert all("File too large" in text and text.endswith("existing versions are unchanged") for text in refused)
    return result


def a_read_only_folder(folder: str) -> list[str]:
    """Save where this user may not write, then where it may: what was said, and the names of the versions."""
    cascade, *_ = started(Path(folder))
    if os.geteuid() == 0:  # to whom nothing is forbidden
        os.setgid(65534)
        os.setuid(65534)
    before = of(cascade)
    try:
        lx.save(cascade, folder)
    except lx.CheckpointError as fault:
        assert of(cascade) == before
        return [str(fault), *sorted(path.name for path in Path(folder).iterdir())]
    raise AssertionError("it was written")
