"""Reads and splits the data set in the table `[data]`, by the package datasets. Nothing is downloaded."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from lorasc_fx.cli.config import DataConfig
from lorasc_fx.cli.models import reading, split_name, user_function
from lorasc_fx.errors import SpecError, nearest

DATA = ("json:FILE", "csv:FILE", "parquet:FILE", "text:FILE", "imagefolder:DIR", "python:package.module:function")
INPUT, LABEL = "input", "label"
"""Columns of a classifier's examples: a text or an image, and the index of a class."""


def load_splits(config: DataConfig, kind: str) -> dict[str, datasets.Dataset]:
    """Return the splits by name: `train`, `validation` and `test`.

    Args:
        config: the table `[data]`.
        kind: what the model reads (`ModelSource.kind`).

    Raises:
        SpecError: the data cannot be read, or do not suit the model.
    """
    complete = read_examples(config, kind, config.name)
    total, order = len(complete), complete.shuffle(seed=config.seed)
    parts: dict[str, datasets.Dataset] = {}
    start = 0
    for name in ("train", "validation", "test"):
        size = getattr(config, name)
        count = size if isinstance(size, int) else int(size * total)
        if not count or start + count > total:
            raise SpecError(
                f"data.{name} is {size}, but {config.name} has {total} examples, of which {start} are used already; "
                "change data.train, data.validation or data.test",
                code="invalid-data",
            )
        parts[name] = order.select(range(start, start + count))
        start += count
    return parts


def read_examples(config: DataConfig, kind: str, name: str, *, labelled: bool = True) -> datasets.Dataset:
    """Return a data set in the form that the model's trainer takes.

    For a classifier, the columns are `input` and, if `labelled` or if the table has it, `label`. For a language model,
    they are `prompt` and `completion` (texts, or lists of messages), or `text`.
    """
    table = read_table(name)
    return _dialogues(config, name, table) if kind == "language" else _examples(config, kind, name, table, labelled)


def read_table(name: str) -> datasets.Dataset:
    """Return a data set with its own columns.

    Raises:
        SpecError: the name is unknown, or the data cannot be read.
    """
    datasets.disable_progress_bars()
    kind, place = split_name(name, DATA, "data set")
    if kind == "python":
        with reading(name):
            table = user_function(name)()
        if not isinstance(table, datasets.Dataset):
            raise SpecError(
                f"{name}: the function returned a {type(table).__name__}; it must return a datasets.Dataset",
                code="wrong-function-result",
            )
        return table
    if not Path(place).exists():
        raise SpecError(f"{name}: there is no such file or folder, and nothing is downloaded", code="unreadable-file")
    options: dict[str, Any] = {"data_files": place}
    if kind == "imagefolder":
        options = {"data_dir": place}
    elif kind == "csv":
        options |= _csv_options(Path(place))
    elif kind == "text":
        options["encoding"] = "utf-8-sig"
    with reading(name):
        splits = datasets.load_dataset(kind, **options)
    if [*splits] != ["train"]:
        raise SpecError(
            f"{name} has the splits {', '.join(splits)}; give the folder of one of them", code="invalid-data"
        )
    return splits["train"]


def _csv_options(path: Path) -> dict[str, Any]:
    """Return the options to read a table as texts. A row that is longer than the header is an error."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with reading(f"csv:{path}"), path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, delimiter=separator)
        header, first = next(rows, []), next(rows, [])
    if len(first) != len(header):  # pandas would take the first column for the names of the rows
        raise SpecError(
            f"csv:{path}: the header has {len(header)} cells ({', '.join(header)}), and the next row {len(first)}. Put "
            'a text that contains a separator into quotes ("...")',
            code="invalid-data",
        )
    texts = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": separator, "features": texts, "keep_default_na": False, "encoding": "utf-8-sig"}


def _examples(config: DataConfig, kind: str, name: str, table: datasets.Dataset, labelled: bool) -> datasets.Dataset:
    """Return the examples of a classifier."""
    column = config.image_column if kind == "image" else "text" if name.startswith("text:") else config.text_column
    for wanted in (column, config.label_column) if labelled else (column,):
        if wanted not in table.column_names:
            raise SpecError(
                f"{name}: no column {wanted!r}{nearest(wanted, table.column_names)}; it has "
                f"{', '.join(table.column_names)}. Set data.text_column, data.image_column or data.label_column",
                code="unknown-name",
            )
    names = {column: INPUT} | ({config.label_column: LABEL} if config.label_column in table.column_names else {})
    table = table.select_columns(list(names)).rename_columns(names)
    if kind == "image":
        with reading(name):
            table = table.cast_column(INPUT, datasets.Image())
    if not labelled:
        return table
    if kind == "text":
        _check_filled(name, table, INPUT)
    _check_filled(name, table, LABEL)
    if not isinstance(table.features[LABEL], datasets.ClassLabel):
        table = table.class_encode_column(LABEL)
    count = len(table.features[LABEL].names)
    if count < 2 or (count > 2 and 2 * count >= len(table)):  # most labels are unique, such as measurements
        raise SpecError(
            f"{name}: {len(table)} examples of {count} classes; a classifier needs at least two classes, and several "
            "examples of each. Set data.label_column to the column with the classes",
            code="invalid-data",
        )
    return table


def _check_filled(name: str, table: datasets.Dataset, column: str) -> None:
    """Raise SpecError if a cell is empty. The class -1 of a ClassLabel is an unknown one."""
    unknown = (None, -1) if isinstance(table.features[column], datasets.ClassLabel) else (None,)
    for number, cell in enumerate(table[column], start=1):
        if cell in unknown or (isinstance(cell, str) and not cell.strip()):
            raise SpecError(
                f"{name}: the {column} of example {number} is empty; fill it, or remove the row", code="invalid-data"
            )


def _dialogues(config: DataConfig, name: str, table: datasets.Dataset) -> datasets.Dataset:
    """Return the examples of a language model. The last message of a conversation is its completion."""
    columns = {*table.column_names}
    if "messages" in columns:
        for number, messages in enumerate(table["messages"], start=1):
            if not messages or messages[-1].get("role") != "assistant":
                raise SpecError(
                    f"{name}: example {number} does not end with a message of the role 'assistant', which would be "
                    "learned; remove the example, or its last message",
                    code="invalid-data",
                )
        return table.map(_split_messages, remove_columns="messages")
    if {"prompt", "completion"} <= columns:
        return table
    column = "text" if name.startswith("text:") else config.text_column
    if column in columns:
        return table.select_columns(column).rename_columns({column: "text"})
    raise SpecError(
        f"{name}: the columns are {', '.join(table.column_names)}; a language model needs messages, or prompt and "
        f"completion, or {config.text_column} (data.text_column)",
        code="unknown-name",
    )


def _split_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
