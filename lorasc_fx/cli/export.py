"""`lorasc-fx export` and `lorasc-fx fold`: write the cascade of a run in other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

import lorasc_fx as lx
from lorasc_fx.checkpoint import folded_checkpoint, read
from lorasc_fx.cli.train import TASK, check_output, open_run
from lorasc_fx.errors import SpecError, warn
from lorasc_fx.export.safetensors_files import fold_files

View = Literal["slow", "averaged"]


def export(
    run: Positional[Path],
    /,
    to: Literal["pt2", "onnx", "safetensors", "peft"],
    output: Path,
    max_rank: int | None = None,
    uniform_rank: bool = False,
    view: View = "slow",
) -> int:
    """Write the cascade of a run in another format.

    Args:
        run: the run folder.
        to: the format.
        output: file or folder to write.
        max_rank: for peft: largest rank of a weight. The error of each reduced weight is printed.
        uniform_rank: for peft: pad all weights with zeros to the same rank, for loaders that ignore rank patterns.
        view: the slow weights, or their average over stages (needs spec.average).
    """
    if to != "peft" and (max_rank is not None or uniform_rank):
        raise SpecError(f"--max-rank and --uniform-rank are for --to peft, not for {to}", code="conflicting-options")
    check_output(output, folder=to == "peft" or (to == "safetensors" and output.suffix != ".safetensors"))
    cascade, task = open_run(run)
    options: dict[str, Any] = {"view": view}
    if to == "peft":
        options |= {"max_rank": max_rank, "uniform_rank": uniform_rank}
    if to != "safetensors":
        options["kwargs"] = task.example()
    print(getattr(lx.export, to)(cascade, output, **options))
    return 0


def fold(checkpoint: Positional[Path], /, base: Path, output: Path, view: View = "slow") -> int:
    """Write the slow weights of a run or a checkpoint in the layout of the base's files. The model is not built.

    Args:
        checkpoint: a run folder, or a checkpoint folder of `lorasc_fx.save`.
        base: safetensors file or folder that the model was loaded from.
        output: file or folder to write.
        view: the slow weights, or their average over stages (needs spec.average).
    """
    check_output(output, folder=base.is_dir() or base.suffix == ".json")
    content = read(checkpoint)
    folded, record = folded_checkpoint(content, view), checkpoint / TASK
    classes = json.loads(record.read_text(encoding="utf-8"))["classes"] if record.is_file() else None
    fold_files(folded, base, output, classes or None)
    if folded.running is not None:
        warn(f"{content.path}: stage {folded.running} has not ended, and is folded as it is", "running-stage-folded")
    print(f"{output}: {view} weights of {content.path}, in the layout of {base}")
    return 0
