"""Results of `compare`, one small file a method, seed and learning rate, so that a stopped comparison goes on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasc_fx.cli.run_folder import write_whole
from lorasc_fx.errors import CheckpointError

__all__ = ["Cell", "Result"]


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    method: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.method}-seed{self.seed}-lr{self.lr:g}"


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Args:
        method, seed, lr: its cell.
        steps: optimizer steps taken.
        seconds: of capture and training, without evaluation.
        parameters: trained entries.
        validation: accuracy that chooses the learning rate (0 where the run diverged).
        predicted: for `test` and each shift, the class predicted for each example.
        labels: the classes that they have.
        diverged: the loss became inf or nan; nothing else of the run counts.
    """

    method: str
    seed: int
    lr: float
    steps: int
    seconds: float
    parameters: int
    validation: float
    predicted: dict[str, list[int]]
    labels: dict[str, list[int]]
    diverged: bool = False

    def right(self, part: str) -> Tensor:
        """Return whether each prediction of a part was right, [examples] of bool."""
        return torch.tensor(self.predicted[part]) == torch.tensor(self.labels[part])

    def accuracy(self, part: str) -> float:
        """Return the share of right predictions of a part."""
        return self.right(part).double().mean().item()

    def write(self, folder: Path) -> None:
        """Write the file of this cell."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(_path(folder, Cell(self.method, self.seed, self.lr)), json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path, cell: Cell) -> Result | None:
        """Return the result of a cell, or None if it has not run.

        Raises:
            CheckpointError: its file is damaged.
        """
        path = _path(folder, cell)
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as fault:
            raise CheckpointError(f"{path} is damaged ({fault}); delete it, and this run is made again") from fault


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"
