"""`lorasc-fx fold`: from a checkpoint to plain weights, in the layout of the original model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import lorasc_fx as lx
from lorasc_fx.cli.opened import open_run
from lorasc_fx.cli.progress import bytes_told
from lorasc_fx.cli.run_folder import RunFolder, check_output
from lorasc_fx.errors import StateError
from lorasc_fx.export.original import fold_files
from lorasc_fx.runtime import list_versions, read
from lorasc_fx.runtime.folded import of_checkpoint

__all__ = ["FoldArguments", "run_fold"]


@dataclass(frozen=True)
class FoldArguments:
    """Write the slow weights of a run, or of any checkpoint, as safetensors in the layout of the original model."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or with --base a folder that `lorasc_fx.save` wrote to."""
    base: Path | None = None
    """Safetensors file or folder that the model came from: its files, names and dtypes are kept, what did not change is
    copied, and no model is built."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=("--out",))] = None
    """File or folder to write; RUN/folded.safetensors, or RUN/folded with a --base folder, if not given."""
    which: Literal["slow", "averaged"] = "slow"
    """The slow weights, or their average over stages, where the run's spec keeps one."""


def run_fold(arguments: FoldArguments) -> int:
    """Write the slow weights of the last checkpoint, and return the exit code.

    Raises:
        StateError: the folder holds no run, or no checkpoint yet.
        CheckpointError: the base is another one than was adapted.
    """
    folder = RunFolder(arguments.run)
    if arguments.base is None and not folder.config.is_file() and list_versions(arguments.run):
        raise StateError(f"{arguments.run} is a checkpoint, and no run; give --base, the files of its base model")
    if arguments.base is None:
        where = arguments.output or folder.folded
        folder.check_run()
        check_output(where, folder=where.suffix != ".safetensors")
        opened = open_run(arguments.run)
        with bytes_told(f"fold {arguments.run}") as told:
            lx.export.safetensors(opened.cascade, where, which=arguments.which, progress=told)
        print(f"{where}: {arguments.which} {opened.said}")
        return 0
    checkpoint = folder.checkpoint if folder.config.is_file() else arguments.run
    single = arguments.base.is_file() and arguments.base.suffix != ".json"
    where = arguments.output or (folder.folded if single else folder.folded.with_suffix(""))
    if arguments.output is None and not folder.config.is_file():
        raise StateError(f"{arguments.run} is no run folder; give --output, the place to write to")
    check_output(where, folder=not single)
    found = read(checkpoint)
    with bytes_told(f"fold {checkpoint}") as told:
        fold_files(of_checkpoint(found, arguments.which), arguments.base, where, told)
    print(f"{where}: {arguments.which} weights of {found.path}, in the layout of {arguments.base}")
    return 0
