"""`lorasc-fx fold` and `lorasc-fx export`: write the last checkpoint of a run as plain weights or in other formats."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import lorasc_fx as lx
from lorasc_fx.checkpoint.files import list_versions
from lorasc_fx.checkpoint.reader import folded_checkpoint, read
from lorasc_fx.cli.config import load_config
from lorasc_fx.cli.progress import reporting
from lorasc_fx.cli.run_folder import RunFolder, check_output
from lorasc_fx.cli.training import Setup
from lorasc_fx.errors import SpecError, StateError, warn
from lorasc_fx.export.safetensors_files import fold_files
from lorasc_fx.plan import Plan

ViewName = Literal["slow", "averaged"]


def open_run(run: Path) -> tuple[lx.Cascade, str]:
    """Build the model of a run again and load its last checkpoint.

    Returns:
        The cascade, and a description of its weights for a message.

    Raises:
        StateError: the folder has no run, or no checkpoint yet.
    """
    files = RunFolder(run)
    files.check_run()
    setup = Setup.of(load_config(files.config))
    cascade = lx.load(files.checkpoint, **setup.call(setup.config.train.seed))
    ends = list(itertools.accumulate(setup.stage_steps(setup.config.train.stages), initial=0))
    step = int(cascade.resume()["step"])
    if step not in ends:
        cascade._run.warned.accept("running-stage-folded")
        _warn_of_running(f"{run} at step {step} of {ends[-1]}", cascade.plan, cascade.stage)
    running = "" if step in ends else ", its running stage folded"
    return cascade, f"weights at step {step} of {ends[-1]}{running}"


def _warn_of_running(source: str, plan: Plan, stage: int) -> None:
    """Warn that a fold counts a running stage as ended."""
    pace = plan.spec.pace_at(stage, stage - 1)
    warn(
        f"{source}: stage {stage} has not ended. It is folded in its current state, and {pace:g} of its change is "
        "kept (the pace of the spec). To end the stage first, continue the run (lorasc-fx train RUN/config.toml "
        "--resume), or call cascade.transition",
        "running-stage-folded",
    )


@dataclass(frozen=True)
class FoldArguments:
    """Write the slow weights of a run or of a checkpoint as safetensors, in the layout of the original model."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder. With --base also a checkpoint folder of `lorasc_fx.save`."""
    base: Path | None = None
    """Safetensors file or folder that the model was loaded from. The output has its files, names and dtypes. Unchanged
    tensors are copied, and the model is not built."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=("--out",))] = None
    """File or folder to write. The default is RUN/folded.safetensors, or RUN/folded if --base is a folder."""
    view: ViewName = "slow"
    """The weights to write: the slow weights, or their average over stages (needs spec.average)."""


def run_fold(arguments: FoldArguments) -> int:
    """Write the slow weights of the last checkpoint, and return the exit code."""
    folder = RunFolder(arguments.run)
    if arguments.base is None and not folder.config.is_file() and list_versions(arguments.run):
        raise StateError(
            f"{arguments.run} is a checkpoint and not a run folder; give the files of its base model with --base",
            code="invalid-value",
        )
    if arguments.base is None:
        output = arguments.output or folder.folded
        return run_export(ExportArguments(arguments.run, "safetensors", output, view=arguments.view))
    path = folder.checkpoint if folder.config.is_file() else arguments.run
    single = arguments.base.is_file() and arguments.base.suffix != ".json"
    output = arguments.output or (folder.folded if single else folder.folded.with_suffix(""))
    if arguments.output is None and not folder.config.is_file():
        raise StateError(
            f"{arguments.run} is not a run folder; give the file or folder to write with --output",
            code="invalid-value",
        )
    check_output(output, folder=not single)
    checkpoint = read(path)
    with reporting() as reporter:
        reporter.begin(f"fold {path}")
        folded = folded_checkpoint(checkpoint, arguments.view)
        classes = folder.read_classes() if folder.cascade.is_file() else None
        fold_files(folded, arguments.base, output, reporter.copied, classes)
    if folded.running is not None:
        _warn_of_running(str(checkpoint.path), checkpoint.plan, folded.running)
    print(f"{output}: {arguments.view} weights of {checkpoint.path}, in the layout of {arguments.base}")
    return 0


Format = Literal["pt2", "onnx", "peft", "safetensors"]
"""Names of functions in `lorasc_fx.export`."""


@dataclass(frozen=True)
class ExportArguments:
    """Write the last checkpoint of a run in another format."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    to: Format
    """The format: `pt2` or `onnx` (a file with the folded graph in eval mode), `safetensors` (a file or folder with the
    folded weights), or `peft` (a folder with one LoRA adapter)."""
    output: Annotated[Path, tyro.conf.arg(aliases=("--out",))]
    """File or folder to write."""
    max_rank: int | None = None
    """For `peft`: largest rank of a weight. The error of each reduced weight is printed."""
    uniform_rank: bool = False
    """For `peft`: pad all weights with zeros to the same rank, for loaders that ignore rank patterns (vLLM)."""
    view: ViewName = "slow"
    """The weights to write: the slow weights, or their average over stages (needs spec.average)."""


def run_export(arguments: ExportArguments) -> int:
    """Write the format and return the exit code."""
    adapter, ranks = arguments.to == "peft", (arguments.max_rank, arguments.uniform_rank)
    if not adapter and ranks != (None, False):
        raise SpecError(
            f"--max-rank and --uniform-rank apply to adapters, not to {arguments.to}: remove them, or give --to peft",
            code="conflicting-options",
        )
    folder = adapter or (arguments.to == "safetensors" and arguments.output.suffix != ".safetensors")
    check_output(arguments.output, folder=folder)
    ending = {"pt2": ".pt2", "onnx": ".onnx"}.get(arguments.to, arguments.output.suffix)
    if arguments.output.suffix != ending:  # check this before the model is built, which takes long
        raise SpecError(
            f"--output is {arguments.output}, but with --to {arguments.to} it must end with {ending}: give "
            f"{arguments.output.with_suffix(ending)}"
        )
    cascade, weights = open_run(arguments.run)
    options: dict[str, Any] = {"view": arguments.view}
    with reporting() as reporter:
        reporter.begin(f"write {arguments.output}")
        if adapter:
            options |= {"max_rank": arguments.max_rank, "uniform_rank": arguments.uniform_rank}
        elif arguments.to == "safetensors":
            options["progress"] = reporter.copied
        written = getattr(lx.export, arguments.to)(cascade, arguments.output, **options)
    if adapter:
        print(written)
    print(f"{arguments.output}: {arguments.view} {weights}")
    return 0
