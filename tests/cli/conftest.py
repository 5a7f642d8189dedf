"""A tiny model and a configuration for it, on real data: every command runs in seconds."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorasc_fx.cli import training

MODEL = '''
"""The source of a user's model, for `python:tiny_model:build`."""
from torch import nn

def build(classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes),
    )
'''

CONFIG = """
[model]
name = "python:tiny_model:build"

[data]
name = "python:experiments.data:digits"
train = 64
validation = 32
test = 100
image_size = 12
shifts = ["python:experiments.data:blur", "python:experiments.data:mnist5k"]
shift_test = 50

[train]
steps = 12
stages = 3
batch_size = 8
warmup = 1
lr = 0.01
log_every = 2
threads = 1

[spec]
targets = ["conv"]
train = ["7.*"]
rank = 2

[spec.noise]
strength = 0.1

[compare]
seeds = [0, 1]
lrs = [0.01]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty working folder with `tiny_model.py` and `tiny.toml` in it."""
    (tmp_path / "tiny_model.py").write_text(MODEL)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")  # wide tables, so that a cell is one line
    sys.modules.pop("tiny_model", None)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("tiny_model", None)


@pytest.fixture
def tiny_model(place: Path) -> Callable[[], nn.Module]:
    """Return a function that builds the model in `tiny_model.py`, in eval mode."""

    def build() -> nn.Module:
        model: nn.Module = importlib.import_module("tiny_model").build()  # noqa: TID251
        return model.eval()

    return build


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], object]:
    """Return a context manager in which `train` gets a Ctrl-C after this many steps."""
    plain = training.train_steps

    @contextmanager
    def stopping(stop: int) -> Iterator[None]:
        def train_steps(*arguments: Any, **options: Any) -> Iterator[training.Step]:
            for step in plain(*arguments, **options):
                yield step
                if step.done == stop and not step.ends_stage:
                    os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patched:
            patched.setattr("lorasc_fx.cli.train.train_steps", train_steps)
            yield

    return stopping


@pytest.fixture
def command() -> list[str]:
    """Return the command that runs the command line in a new process."""
    return [sys.executable, "-m", "lorasc_fx"]


@pytest.fixture
def environment() -> dict[str, str]:
    """Return environment variables for a new process, so that this checkout is importable from any folder."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


@pytest.fixture
def run_alone(command: list[str], environment: dict[str, str]) -> object:
    """Return a function that runs the command line in a new process."""

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=100
        )

    return run
