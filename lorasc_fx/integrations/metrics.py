"""Numbers of a run in its folder: one JSON object a line, and the same as scalars for TensorBoard where it is there."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["FILE", "Metrics", "append"]

FILE = "metrics.jsonl"
_EVENTS = "tensorboard"


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add one line to a file of metrics; JSON has no inf and no nan, and they become null."""
    plain = {name: None if _strange(value) else value for name, value in entry.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")


class Metrics:
    """Writes `metrics.jsonl` into a folder, and `tensorboard/` beside it if the package tensorboard is installed.

    Args:
        folder: is made if it is not there; lines are added to those of a run that goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._step = folder, 0
        self._writer: Any = None

    def log(self, **entry: Any) -> None:
        """Add one line. Its numbers are scalars by their names, at `step`, or at the last one that was given."""
        self._folder.mkdir(parents=True, exist_ok=True)
        append(self._folder / FILE, entry)
        self._step = entry.get("step", self._step)
        writer = self._opened()
        if writer is None:
            return
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                writer.add_scalar(name, value, self._step)

    def close(self) -> None:
        """Write what TensorBoard's files still lack."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _opened(self) -> Any:
        if self._writer is None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder / _EVENTS))
        return self._writer

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _strange(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
