"""`lorasc-fx fold` and `export`: a run's last checkpoint as plain weights, or in other formats."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import lorasc_fx as lx
from lorasc_fx.checkpoint.folded import of_checkpoint
from lorasc_fx.checkpoint.layout import list_versions
from lorasc_fx.checkpoint.reader import read
from lorasc_fx.cli.config import load_config
from lorasc_fx.cli.progress import reporting
from lorasc_fx.cli.run_folder import RunFolder, check_output
from lorasc_fx.cli.training import Setup
from lorasc_fx.errors import SpecError, StateError, nearest, warn
from lorasc_fx.export.safetensors_files import fold_files
from lorasc_fx.plan import Plan

ViewName = Literal["slow", "averaged"]


def open_run(run: Path, output: Path, *, folder: bool) -> tuple[lx.Cascade, str]:
    """Build the run's model again and load its last checkpoint. Return the cascade and a description of its weights.

    Raises:
        StateError: the folder holds no run, or no checkpoint yet.
        SpecError: the output file, or folder, cannot be written.
    """
    files = RunFolder(run)
    files.check_run()
    check_output(output, folder=folder)
    setup = Setup.of(load_config(files.config))
    seed = setup.config.train.seed
    model, sample = setup.model(seed), setup.sample()
    cascade = lx.load(files.checkpoint, model, args=sample.args, kwargs=sample.kwargs)
    ends = list(itertools.accumulate(setup.stage_steps(setup.config.train.stages), initial=0))
    step = int(cascade.resume()["step"])
    if step not in ends:
        cascade._run.warned.accept("running-stage-folded")
        _warn_of_running(f"{run} at step {step} of {ends[-1]}", cascade.plan, cascade.stage)
    running = "" if step in ends else ", its running stage folded"
    return cascade, f"weights at step {step} of {ends[-1]}{running}"


def _warn_of_running(source: str, plan: Plan, stage: int) -> None:
    """Warn that a fold counts a running stage as ended."""
    if plan.spec.pace_rule.needs_loss:  # the fold raises
        return
    pace = plan.spec.pace_at(stage, {})
    warn(
        f"{source}: stage {stage} has trained and never ended. It is folded as it is, and {pace:g} "
        "of its change is kept, the pace of the spec. Continue the run (lorasc-fx train RUN/config.toml --resume, or "
        "cascade.transition) to fold a stage that has ended",
        "running-stage-folded",
    )


@dataclass(frozen=True)
class FoldArguments:
    """Write the slow weights of a run, or of any checkpoint, as safetensors in the layout of the original model."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or with --base a folder that `lorasc_fx.save` wrote to."""
    base: Path | None = None
    """Safetensors file or folder that the model came from. Its files, names and dtypes are kept, unchanged tensors are
    copied, and no model is built."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=("--out",))] = None
    """File or folder to write; RUN/folded.safetensors, or RUN/folded with a --base folder, if not given."""
    view: ViewName = "slow"
    """The slow weights, or their average over stages, if the run's spec keeps one."""


def run_fold(arguments: FoldArguments) -> int:
    """Write the slow weights of the last checkpoint, and return the exit code.

    Raises:
        StateError: the folder holds no run, or no checkpoint yet.
        CheckpointError: the base is another one than was adapted.
    """
    folder = RunFolder(arguments.run)
    if arguments.base is None and not folder.config.is_file() and list_versions(arguments.run):
        raise StateError(
            f"{arguments.run} is a checkpoint, not a run; give --base, the files of its base model",
            code="invalid-value",
        )
    if arguments.base is None:
        output = arguments.output or folder.folded
        cascade, weights = open_run(arguments.run, output, folder=output.suffix != ".safetensors")
        with reporting() as reporter:
            reporter.begin(f"fold {arguments.run}")
            lx.export.safetensors(cascade, output, view=arguments.view, progress=reporter.copied)
        print(f"{output}: {arguments.view} {weights}")
        return 0
    path = folder.checkpoint if folder.config.is_file() else arguments.run
    single = arguments.base.is_file() and arguments.base.suffix != ".json"
    output = arguments.output or (folder.folded if single else folder.folded.with_suffix(""))
    if arguments.output is None and not folder.config.is_file():
        raise StateError(
            f"{arguments.run} is not a run folder; give --output, the place to write to", code="invalid-value"
        )
    check_output(output, folder=not single)
    checkpoint = read(path)
    with reporting() as reporter:
        reporter.begin(f"fold {path}")
        folded = of_checkpoint(checkpoint, arguments.view)
        classes = folder.read_classes() if folder.cascade.is_file() else None
        fold_files(folded, arguments.base, output, reporter.copied, classes)
    if folded.running is not None:
        _warn_of_running(str(checkpoint.path), checkpoint.plan, folded.running)
    print(f"{output}: {arguments.view} weights of {checkpoint.path}, in the layout of {arguments.base}")
    return 0


FORMATS = ("pt2", "onnx", "peft", "safetensors")
"""Functions of `lorasc_fx.export`."""


@dataclass(frozen=True)
class ExportArguments:
    """Write a run's last checkpoint in another format."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    to: str
    """`pt2` or `onnx` (the folded graph of eval mode, a file), `safetensors` (folded weights, a file or folder),
    `peft` (one LoRA adapter, a folder)."""
    output: Annotated[Path, tyro.conf.arg(aliases=("--out",))]
    """File or folder to write."""
    max_rank: int | None = None
    """For `peft`: no weight gets a higher rank. The error is printed for each weight."""
    uniform_rank: bool = False
    """For `peft`: one rank for all weights, padded with zeros, for loaders that ignore patterns (vLLM)."""
    view: ViewName = "slow"
    """The slow weights, or their average over stages, if the run's spec keeps one."""


def run_export(arguments: ExportArguments) -> int:
    """Write the format and return the exit code.

    Raises:
        SpecError: unknown format, a file name with another ending, or ranks for a format that has none.
        StateError: the folder holds no run, or no checkpoint yet.
        MissingExtra: a package that writes the format is not installed.
    """
    if arguments.to not in FORMATS:
        raise SpecError(
            f"no format is called {arguments.to!r}{nearest(arguments.to, FORMATS)}; known: {', '.join(FORMATS)}",
            code="unknown-name",
        )
    adapter, ranks = arguments.to == "peft", (arguments.max_rank, arguments.uniform_rank)
    if not adapter and ranks != (None, False):
        raise SpecError(
            f"--max-rank and --uniform-rank are for adapters, not for {arguments.to}: drop them, or give --to peft",
            code="conflicting-options",
        )
    folder = adapter or (arguments.to == "safetensors" and arguments.output.suffix != ".safetensors")
    check_output(arguments.output, folder=folder)
    ending = {"pt2": ".pt2", "onnx": ".onnx"}.get(arguments.to, arguments.output.suffix)
    if arguments.output.suffix != ending:  # before the run is built, which takes long
        raise SpecError(
            f"--output is {arguments.output}, and a file of --to {arguments.to} ends with {ending}: give "
            f"{arguments.output.with_suffix(ending)}"
        )
    cascade, weights = open_run(arguments.run, arguments.output, folder=folder)
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
