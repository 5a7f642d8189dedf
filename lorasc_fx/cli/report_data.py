"""What `lorasc-fx report` knows of a run: the files of its folder, read and brought into order."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorasc_fx.cli.configure import load_config
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.schema import Config
from lorasc_fx.errors import StateError

__all__ = ["RunRecord"]


@dataclass(frozen=True)
class RunRecord:
    """The records of one run.

    Args:
        name: of its folder.
        config: that it had.
        lines: of its metrics, in the order in which they were written.
        about: what the run wrote of its cascade at the start.
        experts: a line a stage and site.
        spectrum: by site; empty before the end.
        environment: packages and machine.
    """

    name: str
    config: Config
    lines: list[dict[str, Any]]
    about: dict[str, Any]
    experts: list[dict[str, Any]]
    spectrum: dict[str, Any]
    environment: dict[str, Any]

    @classmethod
    def read(cls, run: Path) -> RunRecord:
        """Read a run folder.

        Raises:
            StateError: the folder holds no run of `train`, or nothing that could be shown yet; or a file is damaged.
        """
        folder = RunFolder(run)
        folder.check_run(checkpoint=False)
        if folder.cells.exists():
            raise StateError(f"{run} holds a comparison; a report shows one run, of lorasc-fx train")
        if not folder.cascade.is_file() or not folder.metrics.is_file():
            raise StateError(
                f"{run} has nothing to show yet: {folder.cascade.name} or {folder.metrics.name} is not there. A run "
                "writes them in its first steps; one by an older version has to be made again"
            )
        environment = folder.path / "environment.json"
        return cls(
            run.resolve().name,
            load_config(folder.config),
            _lines(folder.metrics),
            _cascade(folder.cascade),
            _lines(folder.experts, _EXPERT) if folder.experts.is_file() else [],
            _spectrum(folder.spectrum) if folder.spectrum.is_file() else {},
            _whole(environment) if environment.is_file() else {},
        )

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """Steps with their losses; of a step that was made twice (a stopped run that went on) the later one."""
        return sorted({line["step"]: line["loss"] for line in self.lines if "loss" in line}.items())

    @cached_property
    def transitions(self) -> list[int]:
        """Steps at which a stage ended."""
        return sorted({line["step"] for line in self.lines if "validation" in line})

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """A row a stage that ended: `stage`, `step`, and the measures of slow and fast weights."""
        rows: dict[int, dict[str, Any]] = {}
        for line in self.lines:
            if "validation" in line or "validation_fast" in line:
                rows.setdefault(line["stage"], {}).update(line)
        return [rows[stage] for stage in sorted(rows) if "validation" in rows[stage]]

    @cached_property
    def result(self) -> dict[str, float]:
        """Accuracy on the test set and its shifts; empty before the end."""
        found = [line for line in self.lines if line.get("event") == "result"]
        return {name: value for name, value in found[-1].items() if name != "event"} if found else {}

    @cached_property
    def seconds_a_step(self) -> float | None:
        """Median over the logged stretches in which no stage ended; None where there is none."""
        timed = [line for line in self.lines if "seconds" in line]
        ends = set(self.transitions)
        rates = [
            (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
            for before, after in pairwise(timed)
            if after["step"] > before["step"] and after["seconds"] > before["seconds"] and before["step"] not in ends
        ]
        return statistics.median(rates) if rates else None

    @cached_property
    def seconds(self) -> float:
        """Time in steps, stages' ends included, over all the parts in which the run was made."""
        total, last = 0.0, 0.0
        for line in self.lines:
            if "seconds" in line:
                if line["seconds"] < last:
                    total += last
                last = line["seconds"]
        return total + last

    @cached_property
    def expert_rows(self) -> list[dict[str, Any]]:
        """A row a site: its number and name, and by stage norm and effective rank of its expert."""
        latest = {(line["stage"], line["site"]): line for line in self.experts}
        return [
            {
                "number": number,
                "site": site["weight"],
                "by_stage": {stage: latest.get((stage, site["weight"]), {}) for stage in self.expert_stages},
            }
            for number, site in enumerate(self.about["sites"], start=1)
        ]

    @cached_property
    def expert_stages(self) -> list[int]:
        """Stages of which there are experts."""
        return sorted({line["stage"] for line in self.experts})


_CASCADE = ("model", "frontend", "parameters", "trainable", "expected_step_ratio", "sites", "refusals", "unreached",
            "refused_frontends")  # fmt: skip
_SITE = ("weight", "kind", "shape", "rank", "scale", "placement", "parameters")
_REFUSAL = ("weight", "reason", "sentence")
_EXPERT = ("stage", "site", "norm", "effective_rank")
_DELTA = ("values", "norm", "base_norm", "effective_rank")


def _lines(path: Path, keys: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    return [_parsed(path, line, number, keys) for number, line in lines if line.strip()]


def _whole(path: Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    return _parsed(path, path.read_bytes(), 1, keys)


def _cascade(path: Path) -> dict[str, Any]:
    found = _whole(path, _CASCADE)
    for entries, keys in ((found["sites"], _SITE), (found["refusals"], _REFUSAL)):
        for entry in entries:
            _check(path, 1, entry, keys)
    return found


def _spectrum(path: Path) -> dict[str, Any]:
    found = _whole(path)
    for entry in found.values():
        _check(path, 1, entry, _DELTA)
    return found


def _parsed(path: Path, text: bytes, number: int, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as fault:
        raise StateError(
            f"{path}: line {number} is no JSON ({fault}); the file is damaged: restore it, or train anew"
        ) from fault
    _check(path, number, found, keys)
    return dict(found)


def _check(path: Path, number: int, found: Any, keys: tuple[str, ...]) -> None:
    """Check that a value is a JSON object with these keys."""
    if not isinstance(found, dict):
        raise StateError(f"{path}: line {number} is no JSON object; the file is damaged: restore it, or train anew")
    missing = [key for key in keys if key not in found]
    if missing:
        raise StateError(
            f"{path}: line {number} has no key {missing[0]!r}; the file is damaged: restore it, or train anew"
        )
