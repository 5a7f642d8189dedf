"""`lorasc-fx export`: a run's folded model in other people's formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import lorasc_fx as lx
from lorasc_fx.cli.opened import open_run
from lorasc_fx.cli.progress import bytes_told
from lorasc_fx.cli.run_folder import RunFolder, check_output
from lorasc_fx.errors import SpecError, nearest

__all__ = ["FORMATS", "ExportArguments", "run_export"]


Which = Literal["slow", "averaged"]


def _pt2(cascade: lx.Cascade, path: Path, which: Which) -> object:
    return lx.export.pt2(cascade, path, which=which)


def _onnx(cascade: lx.Cascade, path: Path, which: Which) -> object:
    return lx.export.onnx(cascade, path, which=which)


def _safetensors(cascade: lx.Cascade, path: Path, which: Which) -> object:
    with bytes_told(f"write {path}") as told:
        return lx.export.safetensors(cascade, path, which=which, progress=told)


def _peft(cascade: lx.Cascade, path: Path, which: Which, max_rank: int | None, uniform_rank: bool) -> object:
    written = lx.export.peft(cascade, path, which=which, max_rank=max_rank, uniform_rank=uniform_rank)
    print(written)
    return written


FORMATS: dict[str, Callable[..., object]] = {
    "pt2": _pt2,
    "onnx": _onnx,
    "peft": _peft,
    "safetensors": _safetensors,
}
"""What writes a cascade to a path, by the name of the format; `peft` takes the ranks as well."""


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
    """Of `peft`: no weight gets a higher rank; what is cut off is printed, weight by weight."""
    uniform_rank: bool = False
    """Of `peft`: one rank for all weights, by zeros, for loaders that ignore patterns (vLLM)."""
    which: Which = "slow"
    """The slow weights, or their average over stages, where the run's spec keeps one."""


def run_export(arguments: ExportArguments) -> int:
    """Write the format and return the exit code.

    Raises:
        SpecError: no format is called so, or it has no ranks to be told.
        StateError: the folder holds no run, or no checkpoint yet.
        MissingExtra: a package that writes the format is not installed.
    """
    if arguments.to not in FORMATS:
        raise SpecError(
            f"no format is called {arguments.to!r}{nearest(arguments.to, FORMATS)}; known: {', '.join(FORMATS)}"
        )
    ranks = {"max_rank": arguments.max_rank, "uniform_rank": arguments.uniform_rank} if arguments.to == "peft" else {}
    if not ranks and (arguments.max_rank is not None or arguments.uniform_rank):
        raise SpecError(
            f"--max-rank and --uniform-rank are of an adapter, {arguments.to} has none: drop them, or --to peft"
        )
    folder = arguments.to == "peft" or (arguments.to == "safetensors" and arguments.output.suffix != ".safetensors")
    RunFolder(arguments.run).check_run()
    check_output(arguments.output, folder=folder)
    opened = open_run(arguments.run)
    FORMATS[arguments.to](opened.cascade, arguments.output, arguments.which, **ranks)
    print(f"{arguments.output}: {arguments.which} {opened.said}")
    return 0
