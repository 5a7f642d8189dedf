"""The run folder: resolved configuration, metrics, records, checkpoint, folded weights and environment.

`lorasc-fx report` reads two small records. `cascade.json` is written at the start, with the sites, refusals, placements
and classes. `experts.jsonl` gets the norm and the effective rank of each expert at the end of each stage, before the
fold.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorasc_fx as lx
from lorasc_fx.branch import Delta
from lorasc_fx.checkpoint.files import list_versions
from lorasc_fx.checkpoint.saved import write_tensors
from lorasc_fx.cli.config import Config, config_to_dict, load_config, with_paths, write_config
from lorasc_fx.cli.progress import FILE, append
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.state import delta_of, svd_of
from lorasc_fx.util.accelerator import name_of
from lorasc_fx.util.files import parse_json, replacing

SECTIONS = ("model", "data", "train", "spec")
"""Tables of the configuration that must stay the same in a resumed run."""

_PACKAGES = (
    "lorasc-fx", "torch", "safetensors", "tyro", "rich", "timm", "torchvision", "transformers", "numpy",
    "scipy", "datasets",
)  # fmt: skip

SITE = ("weight", "kind", "shape", "rank", "scale", "placement", "parameters")
REFUSAL = ("weight", "reason", "sentence")
"""Keys in the records of a site and of a refusal."""


class RunFolder:
    """The files of one run.

    Args:
        path: the folder, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"  # with defaults and command-line options
        self.environment = path / "environment.json"
        self.metrics = path / FILE
        self.cascade = path / "cascade.json"
        self.experts = path / "experts.jsonl"
        self.report = path / "report.html"
        self.checkpoint = path / "checkpoint"  # written by lorasc_fx.save
        self.folded = path / "folded.safetensors"  # slow weights in the layout of the original model
        self.tokenizer = path / "tokenizer"
        self.results = path / "results"  # results of `compare`, one file per run

    @property
    def saved(self) -> bool:
        """Whether there is a complete checkpoint."""
        return bool(list_versions(self.checkpoint))

    @property
    def started(self) -> bool:
        """Whether the folder has results of a run."""
        return self.metrics.exists() or self.saved or any(self.results.glob("*.json"))

    def check_run(self, *, checkpoint: bool = True) -> None:
        """Check that the folder has a run of `train`, and, with `checkpoint`, that the run has a checkpoint.

        Raises:
            StateError: it does not.
        """
        if not self.config.is_file():
            raise StateError(
                f"{self.path} is not a run folder: there is no {self.config.name} in it", code="no-checkpoint"
            )
        if self.results.exists():
            raise StateError(
                f"{self.path} has a comparison, but this command needs a run of lorasc-fx train. To print the tables "
                f"of the comparison, use lorasc-fx compare {self.config}",
                code="no-checkpoint",
            )
        if checkpoint and not self.saved:
            raise StateError(
                f"{self.path} has no checkpoint yet; a run writes its first one at the end of its first stage",
                code="no-checkpoint",
            )

    def check(self, config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
        """Check that a run may write into this folder. Nothing is changed.

        Args:
            config: the configuration of the run.
            resume: whether to continue the run in the folder.
            overwrite: whether `begin` will delete the run in the folder.

        Raises:
            SpecError: the folder cannot be written, or `resume` and `overwrite` are both given.
            StateError: the folder has a run but neither option is given, or the run to resume has another
                configuration.
        """
        if resume and overwrite:
            raise SpecError(
                "--resume continues a run and --overwrite deletes it; give only one of them",
                code="conflicting-options",
            )
        check_output(self.path, folder=True)
        if overwrite:
            return
        if self.started and not resume:
            raise StateError(
                f"{self.path} already has a run. Give --resume to continue it, --overwrite to delete it and start a "
                "new one, or --output FOLDER to write to another folder",
                code="path-in-the-way",
            )
        if self.started:
            self._check_same(config)
        elif resume and not self.config.exists():
            raise StateError(f"{self.path} has no run to resume; remove --resume to start one", code="no-checkpoint")

    def begin(self, config: Config, *, overwrite: bool = False) -> None:
        """Write the configuration and the environment into a folder that `check` has accepted."""
        if overwrite:
            self._delete_run()
        self.path.mkdir(parents=True, exist_ok=True)
        write_config(config, self.config)
        write_atomically(self.environment, json.dumps(_environment(), indent=1) + "\n")

    def log(self, **entry: Any) -> None:
        """Append one line to the metrics."""
        append(self.metrics, entry)

    def write_cascade(self, cascade: lx.Cascade, classes: Sequence[str]) -> None:
        """Write the record of the cascade: its sites, refusals and placements, and the names of the classes."""
        placements = cascade.placements
        sites = [
            {key: getattr(site, key) for key in SITE}
            | {"placement": placements.get(site.weight, site.placement), "shape": list(site.shape)}
            for site in cascade.sites
        ]
        refusals = [{key: getattr(refusal, key) for key in REFUSAL} for refusal in cascade.refusals]
        about = {
            "model": type(cascade.model).__name__,
            "classes": list(classes),
            "frontend": cascade.frontend,
            "parameters": sum(parameter.numel() for parameter in cascade.model.parameters()),
            "trainable": cascade._run.trained_entries,
            "sites": sites,
            "refusals": [refusal | {"reason": refusal["reason"].value} for refusal in refusals],
            "unreached": cascade.unreached,
            "refused_frontends": cascade.refused_frontends,
        }
        write_atomically(self.cascade, json.dumps(about, indent=1) + "\n")

    def write_experts(self, cascade: lx.Cascade, stage: int) -> None:
        """Append one record per site: norm and effective rank of the branch before the fold. Null if not finite."""
        run, plan = cascade._run, cascade.plan
        with torch.no_grad():
            for weight, branch in run.branches_by_weight().items():
                line: dict[str, Any] = {"stage": stage, "site": weight, "norm": None, "effective_rank": None}
                if branch.finite():
                    host = torch.device("cpu")
                    delta = delta_of(branch, run.slow.states[weight], plan.spec, plan.stage, not run.slow.idle, host)
                    values = singular_values(delta)
                    line |= {"norm": values.norm().item(), "effective_rank": effective_rank(values)}
                append(self.experts, line)

    def read_classes(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        classes = read_record(self.cascade).get("classes")
        if not classes:
            raise StateError(
                f"{self.path} has no names of classes: it is not a run of lorasc-fx train, or it is from an older "
                "version and must be run again",
                code="no-checkpoint",
            )
        return tuple(classes)

    def _delete_run(self) -> None:
        """Delete the files of a run. Other files in the folder stay."""
        for path in (self.metrics, self.cascade, self.experts, self.report, self.folded):
            path.unlink(missing_ok=True)
        for path in (self.checkpoint, self.results, self.tokenizer, self.path / "tensorboard"):
            if path.exists():
                shutil.rmtree(path)

    def _check_same(self, config: Config) -> None:
        absolute = (with_paths(item, os.path.abspath) for item in (load_config(self.config), config))
        old, new = (json.loads(json.dumps(config_to_dict(item))) for item in absolute)
        for section in SECTIONS:
            for key, value in new[section].items():
                old_value = old[section].get(key)
                if old_value != value:
                    raise StateError(
                        f"{self.path} has a run with {section}.{key} = {old_value!r}, but now it is {value!r}. Resume "
                        "with the same value, give --overwrite to delete the run, or give --output FOLDER to write to "
                        "another folder",
                        code="spec-differs",
                    )


def check_output(path: Path, *, folder: bool) -> None:
    """Check that an output file or folder can be written, before the long work starts.

    Raises:
        SpecError: there is a folder instead of a file or the reverse, a parent is a file, or it is not writable.
    """
    if path.exists() and path.is_dir() != folder:
        kind, expected = ("a file", "a folder") if folder else ("a folder", "a file")
        raise SpecError(f"{path} is {kind}, but the output is {expected}; give another path", code="path-in-the-way")
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not folder and existing == path.absolute():
        existing = existing.parent
    if not existing.is_dir():
        raise SpecError(
            f"{path} cannot be created, because {existing} is a file; give another path", code="path-in-the-way"
        )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as fault:
        raise SpecError(
            f"{path} cannot be written: {existing}: {fault.strerror}; give another path", code="write-failed"
        ) from fault


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors. Tied weights are written under all of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: if this fails, the old file stays."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records in a file of JSON lines. If there is no file, the list is empty.

    Raises:
        StateError: a line is damaged.
    """
    lines = enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1)
    return [_parsed(path, number, line) for number, line in lines if line.strip()]


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in a JSON file. If there is no file, it is empty.

    Raises:
        StateError: the file is damaged.
    """
    return _parsed(path, 1, path.read_bytes()) if path.is_file() else {}


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        record, problem = parse_json(text), "is not a JSON object"
    except ValueError as fault:
        record, problem = None, f"is not JSON ({fault})"
    if not isinstance(record, dict):
        raise StateError(
            f"{path}: line {number} {problem}. The file is damaged: restore it, or train again",
            code="invalid-checkpoint",
        )
    return record


def singular_values(delta: Delta) -> Tensor:
    """Return the singular values of a delta, or of each delta in a stack, in fp64, without multiplying its factors."""
    if delta.factors is None:
        assert delta.dense is not None
        dense: Tensor = torch.linalg.svdvals(delta.dense.detach().flatten(1).cpu().double())
        return dense
    return svd_of(delta.factors.map(lambda value, _: value.detach().cpu().double()))[1]


def effective_rank(values: Tensor) -> float:
    """Return the effective rank, exp(entropy) of the normalized singular values. For a stack, return the mean.

    It is 0 for a zero matrix, and k for k equal singular values. Source: O. Roy and M. Vetterli, "The effective rank: a
    measure of effective dimensionality", EUSIPCO 2007.
    """
    total = values.sum(-1, keepdim=True)
    share = torch.where(total > 0, values / total.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    ranks = torch.special.entr(share).sum(-1).exp().where(total.squeeze(-1) > 0, torch.zeros(()).to(values))
    return float(ranks.mean().item())


def _environment() -> dict[str, Any]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": name_of(accelerator) if accelerator is not None else None,
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
