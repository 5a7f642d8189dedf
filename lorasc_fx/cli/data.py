"""Loads, splits and batches the data set in the table `[data]`. Nothing is downloaded.

A data set consists of texts or images with one class each. It is a table, a folder of images, or the result of a user's
function. A shifted test set is another data set with the same classes, or a function that changes the test inputs.
"""

from __future__ import annotations

import csv
import inspect
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasc_fx.cli.config import DataConfig
from lorasc_fx.cli.models import Arguments, reading, user_code, user_function
from lorasc_fx.errors import SpecError, named, nearest
from lorasc_fx.util.extras import module_of

DATA = ("csv:FILE", "json:FILE", "parquet:FILE", "imagefolder:DIR", "python:package.module:function")
TABLES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Kind of a table by the ending of its file."""
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
"""Folder names that are splits of a data set and not classes."""

Inputs = Tensor | Sequence[str]
"""Images as uint8 [examples, 1 or 3, height, width], or texts."""
Encode = Callable[[Any], Arguments]


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of the model, and class indices [batch]."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on this device."""
        moved = {name: tensor.to(device) for name, tensor in self.kwargs.items()}
        return Batch(tuple(tensor.to(device) for tensor in self.args), moved, self.labels.to(device))


@dataclass(frozen=True)
class Examples:
    """Labelled inputs. They are converted to arguments of the model batch by batch.

    Args:
        inputs: images or texts.
        labels: class indices, [examples].
        classes: names of the classes.
        encode: function from inputs to positional and keyword arguments of the model.
    """

    inputs: Inputs
    labels: Tensor
    classes: tuple[str, ...]
    encode: Encode

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Examples:
        """Return the examples at these positions."""
        inputs = self.inputs[index] if isinstance(self.inputs, Tensor) else [self.inputs[i] for i in index.tolist()]
        return replace(self, inputs=inputs, labels=self.labels[index])

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at these positions as one batch."""
        part = self.take(index)
        return Batch(*self.encode(part.inputs), part.labels)

    def __getitems__(self, index: list[int]) -> Batch:
        """Return the examples at these positions as one batch, for a DataLoader."""
        return self.batch(torch.tensor(index))

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all examples in order. The last batch may be smaller."""
        for index in torch.arange(len(self)).split(size):
            yield self.batch(index)

    def by_length(self) -> Examples:
        """Return texts sorted by length, so that batches in order have little padding. Images are unchanged."""
        if isinstance(self.inputs, Tensor):
            return self
        return self.take(torch.tensor([len(text) for text in self.inputs]).argsort(stable=True))


@dataclass(frozen=True)
class Splits:
    """Disjoint splits of one data set, and its shifted test sets by name."""

    train: Examples
    validation: Examples
    test: Examples
    shifts: dict[str, Examples]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.train.classes

    @property
    def test_sets(self) -> dict[str, Examples]:
        """The test set and the shifted ones."""
        return {"test": self.test, **self.shifts}


def short_name(name: str) -> str:
    """Return the name of a data set for tables. For a function, it is the part after the last colon."""
    return name.rpartition(":")[2] if name.startswith("python:") else name


def load_data(config: DataConfig, tokenizer: Any = None) -> Splits:
    """Load and split a data set, and load or compute its shifted test sets.

    Args:
        config: the table `[data]`.
        tokenizer: the tokenizer of a text model. None for an image model.

    Raises:
        SpecError: the name is unknown, the data cannot be read, there are too few examples or only one class, or a
            shifted test set does not fit.
    """
    complete = _load(config.name, config, tokenizer)
    sizes = _sizes(config, len(complete))
    train, validation, test = (complete.take(index) for index in _shuffled(len(complete), config.seed, *sizes))
    for name, examples in ((config.name, complete), (f"the {len(train)} training examples", train)):
        (label, *further) = examples.labels.unique().tolist()
        if not further:
            raise SpecError(
                f"{name}: every label is {complete.classes[label]!r}; give examples of at least two classes",
                code="invalid-data",
            )
    shifts = {short_name(name): _shift(name, config, complete, test, tokenizer).by_length() for name in config.shifts}
    return Splits(train, validation.by_length(), test.by_length(), shifts)


def _sizes(config: DataConfig, total: int) -> list[int]:
    """Return the number of training, validation and test examples."""
    sizes = []
    for name in ("train", "validation", "test"):
        size = getattr(config, name)
        sizes.append(size if isinstance(size, int) else int(size * total))
        if not sizes[-1]:
            raise SpecError(
                f"data.{name} is {size}, which selects none of the {total} examples of {config.name}; give a larger "
                "fraction, or a number of examples",
                code="invalid-data",
            )
    if sum(sizes) > total:
        raise SpecError(
            f"{config.name} has {total} examples, but data.train + data.validation + data.test are {sum(sizes)}; "
            "reduce one of them",
            code="invalid-data",
        )
    return sizes


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        SpecError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as fault:
        where = "" if path.is_absolute() or path.exists() else f" in {Path.cwd()}, the working directory"
        raise SpecError(f"{path}: cannot be read: {fault.strerror}{where}", code="unreadable-file") from fault
    except UnicodeDecodeError as fault:
        line = fault.object[: fault.start].count(b"\n") + 1
        raise SpecError(f"{path}:{line}: this is not UTF-8 text; save it as UTF-8", code="unreadable-file") from fault


Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Location of each row of a table, for messages, and its cells by column."""


def read_table(
    kind: str,
    path: Path,
    column: str,
    label: str | None = None,
    *,
    optional: bool = False,
    image_size: int | None = None,
) -> tuple[list[Any], list[Any]]:
    """Read the texts or images, and the classes, from a table.

    Args:
        kind: `csv`, `json` or `parquet`.
        path: path of the file. In a `.tsv` file, cells are separated by tabs.
        column: name of the column with texts or images.
        label: name of the column with classes. Without one, the list of classes is empty.
        optional: whether the column of classes may be missing, and its cells may be empty.
        image_size: if given, the column has images, which are returned as uint8 [3, image_size, image_size].

    Raises:
        SpecError: the file cannot be read, a column is missing, or a cell is empty or has the wrong type.
        MissingExtra: the package datasets, which reads json and parquet, is not installed.
    """
    if kind == "csv":
        columns, rows = _csv_rows(path)
    else:
        columns, rows = _dataset_rows(kind, path, column if image_size is not None else None)
    if optional and label not in columns:
        label = None
    for name in (column,) if label is None else (column, label):
        if name not in columns:
            raise SpecError(
                f"{path}: no column {name!r}{nearest(name, columns)}; it has {', '.join(columns) or 'no columns'}. "
                "Set data.text_column, data.image_column or data.label_column",
                code="unknown-name",
            )
    inputs, labels = [], []
    for where, row in rows:
        cell = _filled(where, column, row[column], image_size is None)
        inputs.append(str(cell) if image_size is None else _pixels(cell, image_size))
        if label is not None:
            name = "" if optional and row[label] in (None, "") else _filled(where, label, row[label])
            labels.append(name.strip() if isinstance(name, str) else name)
    return inputs, labels


def _csv_rows(path: Path) -> tuple[list[str], Rows]:
    """Return the columns and the rows of a CSV file with a header."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True, delimiter=delimiter)
    columns = list(reader.fieldnames or ())
    if len({*columns}) < len(columns):
        raise SpecError(
            f"{path}: two columns have the same name: {', '.join(columns)}; rename one", code="invalid-data"
        )

    def rows() -> Rows:
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise SpecError(
                        f"{where}: this row and the header ({', '.join(columns)}) have different numbers of cells. "
                        'Put a text that contains a separator into quotes ("..."), and fill missing cells',
                        code="invalid-data",
                    )
                yield where, row
        except csv.Error as fault:
            raise SpecError(
                f"{path}: the text after line {reader.line_num} is not valid CSV: {fault}. Close each quote, and write "
                'a quote inside a quoted cell as ""',
                code="invalid-data",
            ) from fault

    return columns, rows()


def _dataset_rows(kind: str, path: Path, image: str | None) -> tuple[list[str], Rows]:
    """Return the columns and the rows of a file, read by the package datasets. Class indices are replaced by names."""
    datasets = module_of("data", "datasets")
    datasets.disable_progress_bars()
    if not path.is_file():  # otherwise, datasets would search for it on the network
        raise SpecError(f"{path}: there is no such file", code="unreadable-file")
    with tempfile.TemporaryDirectory() as cache, reading(str(path), "datasets"):
        files = {"data_files": {"train": str(path)}, "split": "train"}
        table = datasets.load_dataset(kind, **files, cache_dir=cache, keep_in_memory=True)
        if image is not None and image in table.column_names:
            table = table.cast_column(image, datasets.Image())

    classes = {name: getattr(feature, "names", None) for name, feature in table.features.items()}

    def named(name: str, cell: Any) -> Any:
        names = classes[name]
        return cell if names is None else None if cell in (-1, None) else names[cell]  # -1 means an unknown class

    def rows() -> Rows:
        with reading(str(path), "datasets"):
            for number, row in enumerate(table, start=1):
                yield f"{path}: row {number}", {name: named(name, cell) for name, cell in row.items()}

    return table.column_names, rows()


def _filled(where: str, name: str, cell: Any, plain: bool = True) -> Any:
    """Return a cell after checking that it has a value, and, with `plain`, that it is a text or a number."""
    if cell is None or cell != cell or (isinstance(cell, str) and not cell.strip()):  # nan differs from itself
        raise SpecError(f"{where}: the cell {name!r} is empty; fill it, or remove the row", code="invalid-data")
    if plain and not isinstance(cell, (str, int, float)):
        raise SpecError(f"{where}: the cell {name!r} is a {type(cell).__name__}; give a column of texts or numbers")
    return cell


def _read_images(folder: Path, size: int) -> tuple[Tensor, list[str]]:
    """Read and resize the images in a folder with one subfolder per class, which must not be a split."""
    folders = {entry.name: entry for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else {}
    splits = [name for name in SPLITS if name in folders]
    if splits and len(splits) == len(folders) and all(any(map(Path.is_dir, it.iterdir())) for it in folders.values()):
        name = f"imagefolder:{folder}"
        raise SpecError(
            f"{name} has the splits {', '.join(splits)} and not classes; give one of them, such as {name}/{splits[0]}. "
            f'Another one can be a further test set: data.shifts = ["{name}/{splits[-1]}"]'
        )
    try:
        dataset = module_of("vision", "torchvision.datasets").ImageFolder(folder)
    except OSError as fault:
        raise SpecError(
            f"imagefolder:{folder}: expected one folder per class, with images in it: {fault}",
            code="invalid-data",
        ) from fault
    pixels = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    for position, (path, _) in enumerate(dataset.samples):
        pixels[position] = read_image(path, size)
    return pixels, [dataset.classes[label] for label in dataset.targets]


def read_image(path: str | Path, size: int | None) -> Tensor:
    """Read an image as uint8 [3, height, width]. If a size is given, resize it to a square.

    Raises:
        SpecError: the file cannot be read as an image.
    """
    try:
        return _pixels(module_of("vision", "torchvision.datasets.folder").default_loader(str(path)), size)
    except (OSError, SyntaxError, ValueError) as fault:  # PIL raises these for damaged files
        raise SpecError(f"{path}: this image cannot be read: {fault}", code="unreadable-file") from fault


def _pixels(image: Any, size: int | None) -> Tensor:
    """Return a PIL image as uint8 [3, height, width]."""
    transforms = module_of("vision", "torchvision.transforms.v2")
    resized = image if size is None else transforms.Resize((size, size))(image)
    pixels: Tensor = transforms.PILToTensor()(resized.convert("RGB"))
    return pixels


def _encode_images(size: int) -> Encode:
    """Return a function that resizes images to [batch, 3, size, size], channels last, and maps 0..255 to -1..1."""

    def encode(pixels: Tensor) -> Arguments:
        images = pixels.float() / 255
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        images = (images - 0.5) / 0.5
        return (images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last),), {}

    return encode


def image_examples(pixels: Tensor, labels: Sequence[Any] | Tensor, size: int) -> Examples:
    """Return labelled images that are resized to this size in a batch. The classes are the sorted labels."""
    return _labelled(pixels, list(labels), _encode_images(size))


def _encode_texts(tokenizer: Any, max_length: int) -> Encode:
    """Return a function from texts to `input_ids` and `attention_mask` [batch, tokens].

    Tokens are padded to the length of the longest text, rounded up to a multiple of 8, but at most to `max_length`.
    """

    def encode(texts: Sequence[str]) -> Arguments:
        encoded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        # `pad_to_multiple_of` cannot be used, because it requires that max_length is a multiple too.
        missing = min(max_length, -(-ids.shape[1] // 8) * 8) - ids.shape[1]
        if missing > 0:
            sides = (missing, 0) if tokenizer.padding_side == "left" else (0, missing)
            ids, mask = F.pad(ids, sides, value=tokenizer.pad_token_id), F.pad(mask, sides)
        return (), {"input_ids": ids, "attention_mask": mask}

    return encode


def encoder_of(config: DataConfig, tokenizer: Any) -> Encode:
    """Return the function that converts texts, or images if there is no tokenizer, to arguments of the model.

    Raises:
        SpecError: data.max_length is larger than the maximum of the model.
    """
    maximum = getattr(tokenizer, "model_max_length", math.inf)  # a huge number if the tokenizer does not know it
    if config.max_length > maximum:
        raise SpecError(
            f"data.max_length is {config.max_length}, but the model takes at most {maximum} tokens; give {maximum} or "
            "less"
        )
    return _encode_images(config.image_size) if tokenizer is None else _encode_texts(tokenizer, config.max_length)


def _labelled(inputs: Inputs, labels: list[Any], encode: Encode) -> Examples:
    labels = [label.item() if isinstance(label, Tensor) else label for label in labels]
    classes = sorted(set(labels))
    number = {label: index for index, label in enumerate(classes)}
    return Examples(inputs, torch.tensor([number[label] for label in labels]), tuple(map(str, classes)), encode)


def _load(name: str, config: DataConfig, tokenizer: Any) -> Examples:
    inputs: Inputs
    kind, _, location = name.partition(":")
    kinds = [choice.partition(":")[0] for choice in DATA]
    if kind not in kinds or not location:
        prefix = "imagefolder" if Path(name).is_dir() else TABLES.get(Path(name).suffix.lower())
        hint = nearest(kind, kinds) if location or not prefix else f"; did you mean '{prefix}:{name}'"
        raise SpecError(f"unknown data set {name!r}{hint}; known: {', '.join(DATA)}", code="unknown-name")
    if kind == "imagefolder":
        inputs, labels = _read_images(Path(location), config.image_size)
    elif kind != "python" and (tokenizer is not None or kind == "csv"):
        inputs, labels = read_table(kind, Path(location), config.text_column, config.label_column)
    elif kind != "python":
        size = config.image_size
        pixels, labels = read_table(kind, Path(location), config.image_column, config.label_column, image_size=size)
        inputs = torch.stack(pixels) if pixels else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    else:
        function = user_function(name)
        with user_code(name):
            returned = function()
        inputs, labels = _returned(name, returned)
    if not len(labels):
        raise SpecError(f"{name}: there are no examples; give at least one of each class", code="invalid-data")
    if isinstance(inputs, Tensor) and tokenizer is not None:
        raise SpecError(
            f"the model takes texts, but {name} has images; give a data set of texts (csv:FILE), or another model",
            code="invalid-data",
        )
    if not isinstance(inputs, Tensor) and tokenizer is None:
        raise SpecError(
            f"the model takes images, but {name} has texts; give a text model (hf:FOLDER), or a data set of images",
            code="invalid-data",
        )
    examples = _labelled(inputs, list(labels), encoder_of(config, tokenizer))
    _check_classes(name, examples)
    return examples


def _check_classes(name: str, examples: Examples) -> None:
    """Raise SpecError if most labels are unique, such as measurements or names of examples."""
    classes, total = examples.classes, len(examples)
    if len(classes) > 2 and 2 * len(classes) >= total:
        raise SpecError(
            f"{name}: the {total} examples have {len(classes)} classes ({named(classes)}), but a classifier needs "
            "several examples of each class. Set data.label_column to the column with the classes. Regression is not "
            "supported: sort measurements into a few classes, such as low and high",
            code="invalid-data",
        )


def _returned(name: str, returned: Any) -> tuple[Inputs, list[Any]]:
    """Check and return the data set that a user's function has returned."""
    try:
        inputs, labels = returned
        if isinstance(inputs, Tensor):
            if inputs.dtype != torch.uint8 or inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
                raise ValueError(f"a tensor {list(inputs.shape)} of {inputs.dtype}")
        elif not all(isinstance(text, str) for text in inputs):
            raise TypeError("inputs that are neither a tensor nor texts")
        if len(labels) != len(inputs):
            raise ValueError(f"{len(inputs)} inputs and {len(labels)} labels")
        sorted({label.item() if isinstance(label, Tensor) else label for label in labels})
    except (TypeError, ValueError) as fault:
        raise SpecError(
            f"{name}: the function must return inputs and labels. Inputs are a list of texts, or a uint8 tensor "
            f"[examples, 1 or 3, height, width]. Labels are one class per example. It returned {fault}",
            code="wrong-function-result",
        ) from fault
    return inputs, list(labels)


def _shuffled(total: int, seed: int, *sizes: int) -> tuple[Tensor, ...]:
    """Return random disjoint indices for parts of these sizes."""
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return torch.split(shuffled[: sum(sizes)], list(sizes))


def _shift(name: str, config: DataConfig, complete: Examples, test: Examples, tokenizer: Any) -> Examples:
    if name.startswith("python:"):
        change = user_function(name)
        with user_code(name):
            parameters = inspect.signature(change).parameters
        if parameters:
            subset = test.take(torch.arange(min(len(test), config.shift_test)))
            with user_code(name):
                changed = change(subset.inputs)
            return replace(subset, inputs=_returned(name, (changed, subset.labels))[0])
    if name == config.name:
        raise SpecError(f"data.shifts has {name}, which is the data set itself; give another one, or remove it")
    shifted = _load(name, config, tokenizer)
    if shifted.classes != complete.classes:
        raise SpecError(
            f"data.shifts: {name} has other classes than {config.name}; give a data set with the same classes",
            code="invalid-data",
        )
    return shifted.take(_shuffled(len(shifted), config.seed, min(len(shifted), config.shift_test))[0])
