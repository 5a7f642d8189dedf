"""`lorasc-fx predict`: predicts classes of images or texts with the folded weights of a run.

The original model is built with the run's folded weights. Nothing is captured, and the data set is not read. The
preprocessing is that of the run: its configuration, its tokenizer, and the names of the classes in its records.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from lorasc_fx.cli.config import Config, DataConfig
from lorasc_fx.cli.data import TABLES, read_table, read_text
from lorasc_fx.cli.models import build_model, logits_of, put_weights, read_weights, set_mode
from lorasc_fx.cli.preprocessing import Preprocessing
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.training import EVAL_BATCH, channels_last, check_device
from lorasc_fx.errors import SpecError, StateError, named
from lorasc_fx.util.extras import module_of

Inputs = tuple[list[str], list[str], list[str]]
"""Names, texts or paths, and classes. An unknown class is empty."""


@dataclass(frozen=True)
class Columns:
    """Columns of a table."""

    text_column: str | None = None
    """Column that holds the text; the run's, if not given."""
    label_column: str | None = None
    """Column that holds the class, which scores the predictions; the run's, if not given and there."""


@dataclass(frozen=True)
class PredictArguments:
    """Print a line for each image or text: its name, the predicted class and the probability, separated by tabs.

    If the true classes are known, the accuracy follows on standard error.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run that has ended, or whose slow weights `lorasc-fx fold` wrote there."""
    inputs: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE-OR-FOLDER")]
    """An image; a file of texts, one a line, or a table (.csv, .tsv, .json, .jsonl, .parquet) with a column of texts;
    or a folder of such files. A blank line of a file of texts gets a line without a class."""
    data: Columns = field(default_factory=Columns)


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
            f"{arguments.run} has no {folder.folded.name}: finish it with lorasc-fx train CONFIG.toml --resume, or "
            f"write the slow weights of its last checkpoint with lorasc-fx fold {arguments.run}",
            code="stage-not-ended",
        )
    device = config.train.device
    check_device(device)
    read = _images(arguments.inputs, classes) if images else _texts(arguments.inputs, config.data, arguments.data)
    model = _folded_model(config, folder.folded, len(classes), images=images)
    labels_seen: list[str] = []
    right = 0
    for names, inputs, labels in read:
        filled = [position for position, entry in enumerate(inputs) if entry.strip()]
        said = [("", "")] * len(inputs)
        if filled:
            args, kwargs = preprocessing([inputs[position] for position in filled])
            moved = {key: value.to(device) for key, value in kwargs.items()}
            with torch.no_grad():
                logits = logits_of(model(*(value.to(device) for value in args), **moved))
            for position, row in zip(filled, logits.float().softmax(-1), strict=True):
                said[position] = classes[int(row.argmax())], f"{row.max():.4f}"
        for name, label, (predicted, share) in zip(names, labels, said, strict=True):
            print(f"{name}\t{predicted}\t{share}")
            if label and predicted:
                labels_seen.append(label)
                right += label == predicted
    unknown = sorted({*labels_seen} - {*classes})
    if unknown:
        told = f"labels that are not a class of the run count as wrong: {named(unknown, 5)}"
        print(f"{told}; the run has {named(classes, 5)}", file=sys.stderr)
    if labels_seen:
        total = len(labels_seen)
        print(f"accuracy {right / total:.3f}: {right} of {total} labelled examples", file=sys.stderr)
    return 0


def _folded_model(config: Config, weights: Path, classes: int, *, images: bool) -> nn.Module:
    """Return the original model with folded weights in it, in eval mode."""
    model = build_model(replace(config.model, weights=""), classes).to(config.train.device)
    values = {name: value.to(config.train.device) for name, value in read_weights(weights).items()}
    put_weights(model, config.model, values, weights)
    tied = [name for name, value in model.state_dict().items() if not torch.equal(value, values[name])]
    if tied:
        raise SpecError(
            f"{weights} holds two values for {tied[0]}, which the run untied (spec.untie) and {config.model.name} ties",
            code="base-differs",
        )
    return set_mode(channels_last(model) if images else model, False)


def _files(path: Path, endings: Collection[str], content: str) -> list[Path]:
    """Return the file at a path, or the files in a folder whose names end like this, in order.

    Raises:
        SpecError: the folder holds none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in endings)
    if not files:
        raise SpecError(
            f"{path} holds no {content} ({', '.join(sorted(endings))}); give a file, or a folder of files",
            code="invalid-data",
        )
    return files


def _images(path: Path, classes: Sequence[str]) -> Iterator[Inputs]:
    """Yield the image at a path, or those in a folder. If each is in a folder named like a class, that is its class."""
    endings = module_of("vision", "torchvision.datasets.folder").IMG_EXTENSIONS
    files = _files(path, endings, "images")
    labelled = all(file.parent.name in classes for file in files)
    for file in files:
        yield [str(file)], [str(file)], [file.parent.name if labelled else ""]


def _texts(path: Path, config: DataConfig, columns: Columns) -> Iterator[Inputs]:
    """Yield the texts of a file, or of the files in a folder, with their numbers."""
    for file in _files(path, (".txt", *TABLES), "texts"):
        texts, labels = _read_texts(file, config, columns)
        numbers = [f"{file}:{number}" for number in range(1, len(texts) + 1)]
        for start in range(0, len(texts), EVAL_BATCH):
            part = slice(start, start + EVAL_BATCH)
            yield numbers[part], texts[part], labels[part]


def _read_texts(path: Path, config: DataConfig, columns: Columns) -> tuple[list[str], list[str]]:
    """Return the texts and classes of a table, or the lines of any other file. An unknown class is empty.

    Raises:
        SpecError: the file cannot be read, or holds no texts.
    """
    kind = TABLES.get(path.suffix.lower())
    text, label = columns.text_column or config.text_column, columns.label_column or config.label_column
    optional = columns.label_column is None
    labels: list[str] = []
    if kind is not None:
        texts, cells = read_table(kind, path, text, label, optional=optional)
        labels = [str(cell) for cell in cells]
    else:
        lines = read_text(path).split("\n")  # not splitlines: `paste` has no other line ends
        texts = lines if lines[-1] else lines[:-1]
    if not any(map(str.strip, texts)):
        raise SpecError(f"{path} holds no texts; give one per line", code="invalid-data")
    return texts, labels or [""] * len(texts)
