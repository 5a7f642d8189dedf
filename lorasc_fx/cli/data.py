"""Loads, splits and batches the data that `[data]` names. Nothing is downloaded.

A data set is texts or images with a class each: a CSV file, a folder of images, a file or folder that the package
datasets reads, or what a function of the user's returns. A shifted test set is another data set of the same classes, or
a function that changes the test inputs.
"""

from __future__ import annotations

import csv
import inspect
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasc_fx.cli.config import DataConfig
from lorasc_fx.cli.models import Arguments, reading, user_function
from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.extras import module_of

TABLES = ("json", "parquet", "arrow", "webdataset")
"""Kinds of files that the package datasets reads."""
DATA = (
    "csv:FILE", "imagefolder:DIR", *(f"{kind}:FILE" for kind in TABLES), "folder:DIR", "disk:DIR",
    "python:package.module:function",
)  # fmt: skip
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
"""Names of folders that the package datasets takes as splits."""

Inputs = Tensor | Sequence[str]
"""Pixels as bytes, [examples, 1 or 3, height, width], or texts."""
Encode = Callable[[Any], Arguments]


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of the model, and the class numbers [batch]."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on this device."""
        moved = {name: tensor.to(device) for name, tensor in self.kwargs.items()}
        return Batch(tuple(tensor.to(device) for tensor in self.args), moved, self.labels.to(device))


@dataclass(frozen=True)
class Examples:
    """Labelled inputs, which become arguments of the model a batch at a time.

    Args:
        inputs: pixels or texts.
        labels: class numbers, [examples].
        classes: names of the classes.
        encode: from some of the inputs to positional and keyword arguments of the model.
    """

    inputs: Inputs
    labels: Tensor
    classes: tuple[str, ...]
    encode: Encode

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> bool:
        """Whether the inputs are pixels."""
        return isinstance(self.inputs, Tensor)

    def take(self, index: Tensor) -> Examples:
        """Return the examples at these positions."""
        return replace(self, inputs=self._inputs(index), labels=self.labels[index])

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at these positions as one batch."""
        return Batch(*self.encode(self._inputs(index)), self.labels[index])

    def __getitems__(self, index: list[int]) -> Batch:
        """Return the examples at these positions as one batch, for a DataLoader."""
        return self.batch(torch.tensor(index))

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all the examples in order; the last batch may be short."""
        for index in torch.arange(len(self)).split(size):
            yield self.batch(index)

    def by_length(self) -> Examples:
        """Return texts from short to long, so that batches in order have little padding; images as they are."""
        if isinstance(self.inputs, Tensor):
            return self
        return self.take(torch.tensor([len(text) for text in self.inputs]).argsort(stable=True))

    def _inputs(self, index: Tensor) -> Inputs:
        if isinstance(self.inputs, Tensor):
            return self.inputs[index]
        return [self.inputs[position] for position in index.tolist()]


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of one data set, and its shifted test sets by name."""

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
    """Return a data set's name for tables: of a function, the part after the last colon."""
    return name.rpartition(":")[2] if name.startswith("python:") else name


def load_data(config: DataConfig, tokenizer: Any = None) -> Splits:
    """Load, split and shift.

    Args:
        config: the table `[data]`.
        tokenizer: of a text model, as transformers makes it; None for a model that takes images.

    Raises:
        SpecError: an unknown name, data that cannot be read, too few examples, one class alone, or a shift that does
            not fit.
    """
    whole = _load(config.name, config, tokenizer)
    sizes = _sizes(config, len(whole))
    train, validation, test = (whole.take(index) for index in _shuffled(len(whole), config.seed, *sizes))
    for name, examples in ((config.name, whole), (f"the {len(train)} training examples", train)):
        (first, *others) = examples.labels.unique().tolist()
        if not others:
            raise SpecError(
                f"{name}: every label is {whole.classes[first]!r}; a classifier needs examples of two classes or more",
                code="too-few-classes",
            )
    shifts = {short_name(name): _shift(name, config, whole, test, tokenizer).by_length() for name in config.shifts}
    return Splits(train, validation.by_length(), test.by_length(), shifts)


def _sizes(config: DataConfig, total: int) -> list[int]:
    """Return the number of examples of train, validation and test."""
    sizes = []
    for name in ("train", "validation", "test"):
        size = getattr(config, name)
        sizes.append(size if isinstance(size, int) else int(size * total))
        if not sizes[-1]:
            raise SpecError(
                f"data.{name} is {size}, which is none of the {total} examples of {config.name}; give a larger share",
                code="too-few-examples",
            )
    if sum(sizes) > total:
        raise SpecError(
            f"{config.name} has {total} examples; data.train + data.validation + data.test ask for {sum(sizes)}; "
            "ask for fewer",
            code="too-few-examples",
        )
    return sizes


def read_csv(path: Path, *wanted: str) -> tuple[list[str], ...]:
    """Return the cells of these columns of a CSV file with a header; in a `.tsv` tabs stand between cells.

    Raises:
        SpecError: the file cannot be read, lacks a column, or has a row with an empty or a missing cell.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as fault:
        raise SpecError(f"{path}: this file cannot be read: {fault.strerror}", code="unreadable-file") from fault
    except UnicodeDecodeError as fault:
        line = fault.object[: fault.start].count(b"\n") + 1
        raise SpecError(f"{path}:{line}: this is not UTF-8 text; save it as UTF-8", code="not-utf8") from fault
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    columns: tuple[list[str], ...] = tuple([] for _ in wanted)
    try:
        _check_columns(f"{path}:1", wanted, list(reader.fieldnames or ()))
        for row in reader:
            for name, cells in zip(wanted, columns, strict=True):
                cells.append(_filled(f"{path}:{reader.line_num}", name, row[name]))
    except csv.Error as fault:
        at_end = "end of data" in str(fault)  # else the line that is being read is not counted yet
        raise SpecError(
            f"{path}:{reader.line_num + (not at_end)}: this is not CSV: {fault}", code="invalid-csv"
        ) from fault
    return columns


def _check_columns(source: str, wanted: Sequence[str], columns: Sequence[str]) -> None:
    for name in wanted:
        if name not in columns:
            known = ", ".join(columns) or "no columns"
            raise SpecError(
                f"{source}: no column {name!r}{nearest(name, columns)}; it has {known}; "
                "data.text_column, data.image_column and data.label_column choose others",
                code="unknown-name",
            )


def _filled(source: str, name: str, cell: Any) -> Any:
    """Return a cell that is not empty."""
    if cell is None or cell == "":
        raise SpecError(f"{source}: the cell {name!r} is empty; fill it, or take the row out", code="empty-cell")
    return cell


def read_table(kind: str, path: str, *wanted: str, image_size: int | None = None) -> tuple[list[Any], ...]:
    """Return the cells of these columns of a file or folder that the package datasets reads.

    Args:
        kind: one of `TABLES`; `folder` for what `datasets.load_dataset` reads from a folder, `disk` for a folder of
            `Dataset.save_to_disk`. The last part of the path of either may be the name of a split.
        path: of the file or folder.
        wanted: names of columns; numbers of classes are returned as their names.
        image_size: if given, the first column holds images, returned as bytes [3, image_size, image_size].

    Raises:
        SpecError: the file cannot be read, lacks a column, or has an empty cell or one of another type; the folder
            names files of the network, or has several splits.
        MissingExtra: datasets is not installed.
    """
    datasets = module_of("data", "datasets")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache, reading(f"{kind}:{path}", "datasets", code="unreadable-file"):
        if kind == "disk":
            table = datasets.load_from_disk(path)
        elif kind == "folder":
            table = _read_folder(Path(path), cache)
        else:
            files = {"data_files": {"train": path}, "split": "train"}
            table = datasets.load_dataset(kind, **files, cache_dir=cache, keep_in_memory=True)
        if isinstance(table, datasets.DatasetDict):
            raise _several_splits(f"{kind}:{path}", list(table))
        _check_columns(f"{kind}:{path}", wanted, table.column_names)
        if image_size is not None:
            table = table.cast_column(wanted[0], datasets.Image())
        columns = []
        for name in wanted:
            is_image = image_size is not None and name == wanted[0]
            classes, cells = getattr(table.features[name], "names", None), []
            for row, entry in enumerate(table.select_columns([name]), start=1):
                known = None if classes and entry[name] == -1 else entry[name]  # -1 is a class that is not known
                cell = _filled(f"{kind}:{path}: row {row}", name, known)
                if not is_image and not isinstance(cell, (str, int, float)):
                    raise SpecError(
                        f"{kind}:{path}: row {row}: the cell {name!r} is {type(cell).__name__}; give a column of texts "
                        "or numbers"
                    )
                cells.append(_pixels(cell, image_size) if is_image else classes[cell] if classes else cell)
            columns.append(cells)
    return tuple(columns)


def _read_folder(path: Path, cache: str) -> Any:
    """Return the splits that the package datasets reads from a folder, or the one that the path ends with.

    Raises:
        SpecError: the folder names files of the network.
    """
    folder, split = (path, None) if path.is_dir() or not path.parent.is_dir() else (path.parent, path.name)
    card, settings = folder / "README.md", folder / ".huggingface.yaml"
    named = {}
    if card.is_file():
        named[card] = repr(module_of("data", "huggingface_hub").DatasetCard.load(card).data.to_dict().get("configs"))
    if settings.is_file():
        named[settings] = settings.read_text(encoding="utf-8")
    for file, text in named.items():
        _check_local(file, text)
    table = module_of("data", "datasets").load_dataset(str(folder), split=split, cache_dir=cache, keep_in_memory=True)
    return next(iter(table.values())) if split is None and len(table) == 1 else table


def _check_local(source: object, text: str) -> None:
    """Refuse names of files that are not on this machine."""
    if "://" in text:
        raise SpecError(
            f"{source} names files of the network, and nothing is downloaded; name files of this machine",
            code="data-not-local",
        )


def _several_splits(name: str, splits: Sequence[str]) -> SpecError:
    return SpecError(
        f"{name} holds the splits {', '.join(splits)}; give one of them, as {name}/{splits[0]}; another one can be a "
        f'further test set: data.shifts = ["{name}/{splits[-1]}"]'
    )


def _read_images(folder: Path, size: int) -> tuple[Tensor, list[str]]:
    """Return the images of a folder that has one folder a class, resized.

    Raises:
        SpecError: there is no such folder, its folders are splits, a class has no images, or an image cannot be read.
    """
    folders = {entry.name: entry for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else {}
    splits = [name for name in SPLITS if name in folders]
    if splits and len(splits) == len(folders) and all(any(map(Path.is_dir, it.iterdir())) for it in folders.values()):
        raise _several_splits(f"imagefolder:{folder}", splits)
    try:
        dataset = module_of("vision", "torchvision.datasets").ImageFolder(folder)
    except OSError as fault:
        raise SpecError(
            f"imagefolder:{folder}: expected one folder a class, with images in it: {fault}",
            code="invalid-image-folder",
        ) from fault
    pixels = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    for position, (path, _) in enumerate(dataset.samples):
        pixels[position] = read_image(path, size)
    return pixels, [dataset.classes[label] for label in dataset.targets]


def read_image(path: str | Path, size: int | None = None) -> Tensor:
    """Return an image as bytes [3, height, width], resized to a square of this size if one is given.

    Raises:
        SpecError: the file cannot be read as an image.
    """
    try:
        return _pixels(module_of("vision", "torchvision.datasets.folder").default_loader(str(path)), size)
    except (OSError, SyntaxError, ValueError) as fault:  # what PIL raises for damaged files
        raise SpecError(f"{path}: this image cannot be read: {fault}", code="unreadable-file") from fault


def _pixels(image: Any, size: int | None) -> Tensor:
    """Return an image of PIL as bytes [3, height, width]."""
    transforms = module_of("vision", "torchvision.transforms.v2")
    resized = image if size is None else transforms.Resize((size, size))(image)
    pixels: Tensor = transforms.PILToTensor()(resized.convert("RGB"))
    return pixels


def _encode_images(size: int) -> Encode:
    """Return a function that resizes pixels to [batch, 3, size, size], channels last, and maps 0..255 to -1..1."""

    def encode(pixels: Tensor) -> Arguments:
        images = pixels.float() / 255
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        images = (images - 0.5) / 0.5
        return (images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last),), {}

    return encode


def image_examples(pixels: Tensor, labels: Sequence[Any] | Tensor, size: int) -> Examples:
    """Return images that a model gets in this size; classes are the sorted labels."""
    return _labelled(pixels, list(labels), _encode_images(size))


def _encode_texts(tokenizer: Any, max_length: int) -> Encode:
    """Return a function from texts to `input_ids` and `attention_mask` [batch, tokens], padded to the longest."""
    options = {"truncation": True, "max_length": max_length, "padding": True, "pad_to_multiple_of": 8}

    def encode(texts: Sequence[str]) -> Arguments:
        encoded = tokenizer(list(texts), return_tensors="pt", **options)
        return (), {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    return encode


def encoder_of(config: DataConfig, tokenizer: Any) -> Encode:
    """Return the preprocessing of texts, or of images where there is no tokenizer."""
    return _encode_images(config.image_size) if tokenizer is None else _encode_texts(tokenizer, config.max_length)


def _labelled(inputs: Inputs, labels: list[Any], encode: Encode) -> Examples:
    labels = [label.item() if isinstance(label, Tensor) else label for label in labels]
    classes = sorted(set(labels))
    number = {label: index for index, label in enumerate(classes)}
    return Examples(inputs, torch.tensor([number[label] for label in labels]), tuple(map(str, classes)), encode)


def _load(name: str, config: DataConfig, tokenizer: Any) -> Examples:
    inputs: Inputs
    kind, _, rest = name.partition(":")
    kinds = [known.partition(":")[0] for known in DATA]
    if kind not in kinds or not rest:
        raise SpecError(
            f"no data set is called {name!r}{nearest(kind, kinds)}; known: {', '.join(DATA)}", code="unknown-name"
        )
    if kind != "python":
        _check_local(f"data set {name}", rest)
    if kind == "csv":
        inputs, labels = read_csv(Path(rest), config.text_column, config.label_column)
    elif kind == "imagefolder":
        inputs, labels = _read_images(Path(rest), config.image_size)
    elif kind in (*TABLES, "folder", "disk"):
        if tokenizer is None:
            inputs, labels = read_table(
                kind, rest, config.image_column, config.label_column, image_size=config.image_size
            )
            inputs = torch.stack(inputs) if inputs else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        else:
            inputs, labels = read_table(kind, rest, config.text_column, config.label_column)
    else:
        inputs, labels = _returned(name, user_function(name)())
    if not len(labels):
        raise SpecError(f"{name}: it holds no examples; give at least one of each class", code="too-few-examples")
    if isinstance(inputs, Tensor) and tokenizer is not None:
        raise SpecError(
            f"the model takes texts, and {name} holds images; give a data set of texts (csv:FILE), or another model",
            code="wrong-modality",
        )
    if not isinstance(inputs, Tensor) and tokenizer is None:
        raise SpecError(
            f"the model takes images, and {name} holds texts; texts need a model `hf:FOLDER`", code="wrong-modality"
        )
    return _labelled(inputs, list(labels), encoder_of(config, tokenizer))


def _returned(name: str, returned: Any) -> tuple[Inputs, list[Any]]:
    """Check the data set that a user function returned."""
    try:
        inputs, labels = returned
        if isinstance(inputs, Tensor):
            if inputs.dtype != torch.uint8 or inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
                raise ValueError(f"a tensor {list(inputs.shape)} of {inputs.dtype}")
        elif not all(isinstance(text, str) for text in inputs):
            raise TypeError("inputs that are neither a tensor nor texts")
        if len(labels) != len(inputs):
            raise ValueError(f"{len(inputs)} inputs and {len(labels)} labels")
    except (TypeError, ValueError) as fault:
        raise SpecError(
            f"{name}: the function has to return inputs and labels: a list of texts, or bytes [examples, 1 or 3, "
            f"height, width], and a class each ({fault})",
            code="invalid-data-function",
        ) from fault
    return inputs, list(labels)


def _shuffled(total: int, seed: int, *sizes: int) -> tuple[Tensor, ...]:
    """Return disjoint positions for parts of these sizes."""
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return torch.split(shuffled[: sum(sizes)], list(sizes))


def _shift(name: str, config: DataConfig, whole: Examples, test: Examples, tokenizer: Any) -> Examples:
    if name.startswith("python:"):
        change = user_function(name)
        if inspect.signature(change).parameters:
            some = test.take(torch.arange(min(len(test), config.shift_test)))
            changed = change(some.inputs)
            return replace(some, inputs=_returned(name, (changed, some.labels))[0])
    if name == config.name:
        raise SpecError(f"data.shifts has {name}, which is the data set itself; give others, or none")
    other = _load(name, config, tokenizer)
    if other.classes != whole.classes:
        raise SpecError(
            f"data.shifts: {name} has other classes than {config.name}; give a data set with the same ones",
            code="classes-differ",
        )
    return other.take(_shuffled(len(other), config.seed, min(len(other), config.shift_test))[0])
