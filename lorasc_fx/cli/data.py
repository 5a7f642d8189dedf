"""Reads and splits the data set that `[data]` of the configuration names, by the package datasets, from local files."""

from __future__ import annotations

import warnings
from pathlib import Path

import datasets
import pandas

from lorasc_fx.cli.classifier import reading
from lorasc_fx.cli.config import DataConfig
from lorasc_fx.errors import SpecError, nearest

INPUT, LABEL = "input", "label"
"""Columns of a classifier's examples: a text or an image, and the index of its class."""
_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""{suffix of a file: name of its loader in the package datasets}."""


def load_splits(config: DataConfig, kind: str) -> dict[str, datasets.Dataset]:
    """Return {name: data set} for the splits `train`, `validation` and `test`.

    The columns are `input` and `label` for a classifier; `prompt` and `completion`, or `text`, for a language model.
    """
    complete = read_dialogues(config) if kind == "language" else _labelled(config, kind)
    total, order = len(complete), complete.shuffle(seed=config.seed)
    parts: dict[str, datasets.Dataset] = {}
    start = 0
    for name in ("train", "validation", "test"):
        size = getattr(config, name)
        count = size if isinstance(size, int) else int(size * total)
        if count < 1 or start + count > total:
            raise SpecError(
                f"data.{name} is {size}, but {config.path} has {total} examples, of which {start} are in other splits; "
                "change data.train, data.validation or data.test",
                code="invalid-data",
            )
        parts[name] = order.select(range(start, start + count))
        start += count
    return parts


def read_table(path: str) -> datasets.Dataset:
    """Return a data set with the columns of its file. The cells of a `.csv` or `.tsv` file are texts."""
    datasets.disable_progress_bars()
    source = Path(path)
    if source.suffix.lower() in (".csv", ".tsv"):
        with reading(path), warnings.catch_warnings(action="error"):  # pandas only warns of a row with too many cells
            table = pandas.read_csv(
                path, sep="\t" if source.suffix.lower() == ".tsv" else ",", dtype=str, keep_default_na=False,
                index_col=False, encoding="utf-8-sig",
            )  # fmt: skip
        return datasets.Dataset.from_pandas(table, preserve_index=False)
    loader = "imagefolder" if source.is_dir() else _LOADERS.get(source.suffix.lower())
    if loader is None:
        raise SpecError(
            f"{path}: give a folder of images, or a file that ends with .csv, .tsv, {', '.join(_LOADERS)}",
            code="unreadable-file",
        )
    options = {"encoding": "utf-8-sig"} if loader == "text" else {}
    with reading(path):
        splits = datasets.load_dataset(loader, **{"data_dir" if source.is_dir() else "data_files": path}, **options)
    if [*splits] != ["train"]:
        raise SpecError(
            f"{path} has the splits {', '.join(splits)}; give the folder of one of them", code="invalid-data"
        )
    return splits["train"]


def read_inputs(config: DataConfig, kind: str, path: str, *others: str) -> datasets.Dataset:
    """Read a table. Keep the column with the texts or images, renamed to `input`, and the columns in `others`."""
    table = read_table(path)
    column = config.image_column if kind == "image" else "text" if path.endswith(".txt") else config.text_column
    for wanted in (column, *others):
        if wanted not in table.column_names:
            raise SpecError(
                f"{path}: no column {wanted!r}{nearest(wanted, table.column_names)}; it has "
                f"{', '.join(table.column_names)}. Set data.text_column, data.image_column or data.label_column",
                code="unknown-name",
            )
    table = table.select_columns([column, *others]).rename_columns({column: INPUT})
    if kind == "image":
        with reading(path):
            table = table.cast_column(INPUT, datasets.Image())
    return table


def _labelled(config: DataConfig, kind: str) -> datasets.Dataset:
    """Return the examples of a classifier."""
    table = read_inputs(config, kind, config.path, config.label_column).rename_columns({config.label_column: LABEL})
    for column in (INPUT, LABEL) if kind == "text" else (LABEL,):
        for number, cell in enumerate(table[column], start=1):
            # In a ClassLabel, -1 means that the class is unknown.
            if cell is None or (isinstance(cell, str) and not cell.strip()) or cell == -1:
                raise SpecError(
                    f"{config.path}: the {column} of example {number} is empty; fill it, or remove the row",
                    code="invalid-data",
                )
    if not isinstance(table.features[LABEL], datasets.ClassLabel):
        table = table.class_encode_column(LABEL)
    count = len(table.features[LABEL].names)
    if count < 2 or (count > 2 and 2 * count >= len(table)):  # most labels are unique, such as measurements
        raise SpecError(
            f"{config.path}: {len(table)} examples of {count} classes; a classifier needs at least two classes, and "
            "several examples of each. Set data.label_column to the column with the classes",
            code="invalid-data",
        )
    return table


def read_dialogues(config: DataConfig) -> datasets.Dataset:
    """Return the examples of a language model. The last message of a conversation is its completion."""
    table = read_table(config.path)
    columns = {*table.column_names}
    if "messages" in columns:
        for number, messages in enumerate(table["messages"], start=1):
            if not messages or messages[-1].get("role") != "assistant":
                raise SpecError(
                    f"{config.path}: example {number} does not end with a message of the role 'assistant', and the "
                    "model learns to write the last message; remove the example, or its last message",
                    code="invalid-data",
                )
        return table.map(
            lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns="messages"
        )
    if {"prompt", "completion"} <= columns:
        return table
    if config.text_column in columns:
        return table.select_columns(config.text_column).rename_columns({config.text_column: "text"})
    raise SpecError(
        f"{config.path}: the columns are {', '.join(table.column_names)}; a language model needs messages, or prompt "
        f"and completion, or {config.text_column} (data.text_column)",
        code="unknown-name",
    )
