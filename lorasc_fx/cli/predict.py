"""`lorasc-fx predict`: classifies images or texts with the folded weights of a run.

The original model is built with the folded weights of the run. No graph is captured, and the data set is not read. The
preprocessing is the same as in the run: its configuration, its tokenizer and its names of the classes.
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
"""Names, inputs (texts or paths of images), and classes. An unknown class is empty."""


@dataclass(frozen=True)
class Columns:
    """Columns of a table with texts."""

    text_column: str | None = None
    """Name of the column with the text. The default is the run's data.text_column."""
    label_column: str | None = None
    """Name of the column with the true class, for the accuracy. The default is the run's data.label_column, if the
    table has it."""


@dataclass(frozen=True)
class PredictArguments:
    """Print one line per image or text: its name, the predicted class and the probability, separated by tabs.

    If the true classes are known, the accuracy is printed to standard error.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run that has ended, or that has folded weights from `lorasc-fx fold RUN`."""
    inputs: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE-OR-FOLDER")]
    """An image, a text file with one text per line, a table (.csv, .tsv, .json, .jsonl, .parquet) with a column of
    texts, or a folder of such files. For a blank line, a line without a class is printed."""
    data: Columns = field(default_factory=Columns)


def run_predict(arguments: PredictArguments) -> int:
    """Print the predictions and return the exit code."""
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
    batches = _images(arguments.inputs, classes) if images else _texts(arguments.inputs, config.data, arguments.data)
    model = _folded_model(config, folder.folded, len(classes))
    labels_seen: list[str] = []
    correct = 0
    for names, inputs, labels in batches:
        # Predict all inputs except blank lines, which keep an empty prediction.
        filled = [position for position, entry in enumerate(inputs) if entry.strip()]
        predictions = [("", "")] * len(inputs)
        if filled:
            args, kwargs = preprocessing([inputs[position] for position in filled])
            kwargs = {key: value.to(device) for key, value in kwargs.items()}
            with torch.no_grad():
                logits = logits_of(model(*(value.to(device) for value in args), **kwargs))
            for position, row in zip(filled, logits.float().softmax(-1), strict=True):
                predictions[position] = classes[int(row.argmax())], f"{row.max():.4f}"
        for name, label, (predicted, probability) in zip(names, labels, predictions, strict=True):
            print(f"{name}\t{predicted}\t{probability}")
            if label and predicted:
                labels_seen.append(label)
                correct += label == predicted
    unknown = sorted({*labels_seen} - {*classes})
    if unknown:
        print(
            f"{named(unknown, 5)}: these labels are unknown to the run and count as wrong. The run has the classes "
            f"{named(classes, 5)}",
            file=sys.stderr,
        )
    if labels_seen:
        total = len(labels_seen)
        print(f"accuracy {correct / total:.3f}: {correct} of {total} labelled examples", file=sys.stderr)
    return 0


def _folded_model(config: Config, weights: Path, classes: int) -> nn.Module:
    """Return the original model with the folded weights, in eval mode."""
    model = build_model(replace(config.model, weights=""), classes).to(config.train.device)
    values = {name: value.to(config.train.device) for name, value in read_weights(weights).items()}
    put_weights(model, config.model, values, weights)
    tied = [name for name, value in model.state_dict().items() if not torch.equal(value, values[name])]
    if tied:
        raise SpecError(
            f"{weights} has two values for {tied[0]}, because the run has untied it (spec.untie), but "
            f"{config.model.name} ties it. Untie it in the model, or train without spec.untie",
            code="base-differs",
        )
    return set_mode(channels_last(model), False)


def _files(path: Path, endings: Collection[str], content: str) -> list[Path]:
    """Return the file at a path, or the sorted files with these endings in a folder. There must be one."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in endings)
    if not files:
        raise SpecError(
            f"{path} contains no {content} ({', '.join(sorted(endings))}); give a file, or a folder of files",
            code="invalid-data",
        )
    return files


def _images(path: Path, classes: Sequence[str]) -> Iterator[Inputs]:
    """Yield the image at a path, or the images in a folder. If every image is in a folder named like a class, that
    class is its label.
    """
    endings = module_of("vision", "torchvision.datasets.folder").IMG_EXTENSIONS
    files = _files(path, endings, "images")
    labelled = all(file.parent.name in classes for file in files)
    for file in files:
        yield [str(file)], [str(file)], [file.parent.name if labelled else ""]


def _texts(path: Path, config: DataConfig, columns: Columns) -> Iterator[Inputs]:
    """Yield batches of the texts in a file, or in the files of a folder. The names have the line or row number."""
    for file in _files(path, (".txt", *TABLES), "texts"):
        texts, labels = _read_texts(file, config, columns)
        numbers = [f"{file}:{number}" for number in range(1, len(texts) + 1)]
        for start in range(0, len(texts), EVAL_BATCH):
            part = slice(start, start + EVAL_BATCH)
            yield numbers[part], texts[part], labels[part]


def _read_texts(path: Path, config: DataConfig, columns: Columns) -> tuple[list[str], list[str]]:
    """Return the texts and classes in a table, or the lines of any other file. An unknown class is empty."""
    kind = TABLES.get(path.suffix.lower())
    text, label = columns.text_column or config.text_column, columns.label_column or config.label_column
    optional = columns.label_column is None
    labels: list[str] = []
    if kind is not None:
        texts, cells = read_table(kind, path, text, label, optional=optional)
        labels = [str(cell) for cell in cells]
    else:
        # Not splitlines, which also splits at other characters than tools such as `paste` do.
        lines = read_text(path).split("\n")
        texts = lines if lines[-1] else lines[:-1]
    if not any(map(str.strip, texts)):
        raise SpecError(f"{path} contains no texts; give one per line", code="invalid-data")
    return texts, labels or [""] * len(texts)
