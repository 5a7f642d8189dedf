"""`lorasc-fx predict`: classes of images or texts, by the folded weights of a run.

The original model is built and gets the run's folded weights; nothing is captured and the data set is not read. The
preprocessing is that of the run: its configuration, its tokenizer, and the names of the classes in its records.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors.torch import load_file
from torch import nn

from lorasc_fx.cli.config import Config
from lorasc_fx.cli.data import TABLES, read_csv, read_table
from lorasc_fx.cli.models import build_model, logits_of, put_weights, set_mode
from lorasc_fx.cli.preprocessing import Preprocessing
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.training import EVAL_BATCH, channels_last
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.extras import module_of


@dataclass(frozen=True)
class PredictArguments:
    """Print a line for each image or text: its name, the predicted class and the probability, separated by tabs."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run that has ended, or whose slow weights `lorasc-fx fold` wrote there."""
    inputs: Annotated[Path, tyro.conf.Positional]
    """An image; a file of texts, one a line, or a table (.csv, .tsv, .json, .jsonl, .parquet, .arrow) with the run's
    text column; or a folder of such files."""


def run_predict(arguments: PredictArguments) -> int:
    """Print the predictions and return the exit code.

    Raises:
        StateError: the folder holds no run, or no folded weights.
        SpecError: the model cannot hold the weights; an input cannot be read, or there is none.
    """
    folder = RunFolder(arguments.run)
    folder.check_run(checkpoint=False)
    preprocessing = Preprocessing(folder.path)
    config, classes, images = preprocessing.config, preprocessing.classes, preprocessing.tokenizer is None
    if not folder.folded.is_file():
        raise StateError(
            f"{arguments.run} has no {folder.folded.name}: end the run with lorasc-fx train CONFIG.toml --resume, or "
            f"write the slow weights of its last checkpoint with lorasc-fx fold {arguments.run}",
            code="run-not-ended",
        )
    model = _folded_model(config, folder.folded, len(classes), images=images)
    for names, inputs in _images(arguments.inputs) if images else _texts(arguments.inputs, config):
        args, kwargs = preprocessing(inputs)
        device = config.train.device
        with torch.no_grad():
            logits = logits_of(model(*(x.to(device) for x in args), **{key: x.to(device) for key, x in kwargs.items()}))
        for name, row in zip(names, logits.float().softmax(-1), strict=True):
            print(f"{name}\t{classes[int(row.argmax())]}\t{row.max():.4f}")
    return 0


def _folded_model(config: Config, weights: Path, classes: int, *, images: bool) -> nn.Module:
    """Return the original model with folded weights in it, in eval mode."""
    model = build_model(replace(config.model, weights=""), classes).to(config.train.device)
    values = load_file(weights, device=config.train.device)
    put_weights(model, config.model, values, weights)
    tied = [name for name, value in model.state_dict().items() if not torch.equal(value, values[name])]
    if tied:
        raise SpecError(
            f"{weights} holds two values for {tied[0]}, which the run untied (spec.untie) and {config.model.name} ties",
            code="weights-do-not-fit",
        )
    return set_mode(channels_last(model) if images else model, False)


def _files(path: Path, endings: Collection[str], what: str) -> list[Path]:
    """Return the file at a path, or those in a folder whose names end so, in order.

    Raises:
        SpecError: the folder holds none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in endings)
    if not files:
        raise SpecError(
            f"{path} holds no files of {what} ({', '.join(sorted(endings))}); give one, or a folder of them",
            code="too-few-examples",
        )
    return files


def _images(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the image at a path, or those in a folder, by name."""
    endings = module_of("vision", "torchvision.datasets.folder").IMG_EXTENSIONS
    for file in _files(path, endings, "images"):
        yield [str(file)], [str(file)]


def _texts(path: Path, config: Config) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the texts of a file, or of the files in a folder, with their numbers."""
    for file in _files(path, (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"), "texts"):
        texts = _read_texts(file, config)
        for first in range(0, len(texts), EVAL_BATCH):
            batch = texts[first : first + EVAL_BATCH]
            yield [f"{file}:{number}" for number in range(first + 1, first + len(batch) + 1)], batch


def _read_texts(path: Path, config: Config) -> list[str]:
    """Return the texts of a table, or the lines of another file.

    Raises:
        SpecError: the file cannot be read, or holds none.
    """
    kind = path.suffix.removeprefix(".").replace("jsonl", "json")
    if kind in ("csv", "tsv"):
        texts = read_csv(path, config.data.text_column)[0]
    elif kind in TABLES:
        texts = read_table(kind, str(path), config.data.text_column)[0]
    else:
        try:
            texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as fault:
            reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
            raise SpecError(f"{path}: these texts cannot be read: {reason}", code="unreadable-file") from fault
    if not texts:
        raise SpecError(f"{path} holds no texts; give one a line", code="too-few-examples")
    return texts
