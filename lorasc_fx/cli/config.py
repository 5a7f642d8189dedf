"""Configuration files: the tables as frozen dataclasses, read from TOML with errors that name the line.

`tomllib` keeps no line numbers: `key_lines` scans for headers and `key =`. Keys inside a
multi-line array or an inline table have the line of the key that holds them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lorasc_fx.cli.methods import METHODS
from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.extras import module_of
from lorasc_fx.util.files import replacing

Decay = Literal["cosine", "linear"]
Select = Literal["loss", "accuracy"]
KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class ModelConfig:
    """The network that is adapted."""

    name: str = ""
    """`timm:NAME`, `hf:FOLDER` (`hf:package:NAME` is the one inside an installed package),
    or `python:package.module:function`."""
    weights: str = ""
    """Pretrained weights: a `.safetensors` file, `python:package.module:function` (is called with the model, and
    returns them by name), or empty (as the model comes)."""
    seed: int = 0
    """Seed of what is not pretrained (a new head); a run adds its own seed."""

    def __post_init__(self) -> None:
        _check_seeds("model.seed", self.seed)


@dataclass(frozen=True)
class DataConfig:
    """The examples, how they are split, and the shifted test sets."""

    name: str = ""
    """`csv:FILE`, `imagefolder:DIR`, `json:FILE`, `parquet:FILE`, `arrow:FILE`, `webdataset:FILE`, `folder:DIR`,
    `disk:DIR` (of datasets), or `python:package.module:function`, which returns inputs (a list of texts, or bytes
    [examples, 1 or 3, height, width]) and a class each."""
    train: int | float = 0.7
    """Examples to train on: a number of them, or a share of all, below 1."""
    validation: int | float = 0.1
    """Examples that choose the learning rate; a number or a share."""
    test: int | float = 0.2
    """Examples that the tables report on; a number or a share."""
    shifts: tuple[str, ...] = ()
    """Shifted test sets: another data set's name, or a function `python:...` from the test inputs to changed ones."""
    shift_test: int = 1500
    """Examples of each shifted test set, at most."""
    seed: int = 0
    """Seed of the split."""
    image_size: int = 64
    """Height and width that images are resized to."""
    max_length: int = 64
    """Tokens of a text, at most."""
    text_column: str = "text"
    """Column of a table that holds the text."""
    image_column: str = "image"
    """Column of a table that holds the image: its bytes, or the path of a file."""
    label_column: str = "label"
    """Column of a table that holds the class."""

    def __post_init__(self) -> None:
        if len(set(self.shifts)) < len(self.shifts):
            raise SpecError(f"data.shifts is {list(self.shifts)}; give each entry once")
        for name in ("train", "validation", "test"):
            size = getattr(self, name)
            if not (0 < size < 1 if isinstance(size, float) else size >= 1):
                raise SpecError(f"data.{name} is {size}; give a whole number of examples, or a share between 0 and 1")
        for name in ("shift_test", "image_size", "max_length"):
            if getattr(self, name) < 1:
                raise SpecError(f"data.{name} is {getattr(self, name)}; give 1 or more")
        _check_seeds("data.seed", self.seed)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train."""

    epochs: float = 4.0
    """Passes over the training examples."""
    steps: int = 0
    """Optimizer steps; 0 takes them from `epochs`."""
    stages: int = 3
    """Stages of a cascade: the steps are divided among them evenly."""
    batch_size: int = 16
    """Examples in a step."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, taken over all trained parameters; 0 leaves them as they are."""
    warmup: int = 10
    """Steps of linear warm-up, at the start of each stage."""
    decay: Decay = "cosine"
    """How the learning rate falls within each stage."""
    floor: float = 0.0
    """Share of the learning rate at the end of each stage, from 0 to 1; 1 is no decay."""
    frozen_norm: bool = True
    """Train a model that has batch norm in eval mode: its statistics stay the pretrained ones, and dropout is off."""
    seed: int = 0
    """Seed of the order of examples, dropout, and a new head."""
    device: str = "cpu"
    """`cpu`, `cuda`, ..."""
    threads: int = 0
    """Threads for the arithmetic; 0 leaves torch's own choice."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 writes one at each end of a stage."""

    def __post_init__(self) -> None:
        for name in ("stages", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise SpecError(f"train.{name} is {getattr(self, name)}; give 1 or more")
        for name in ("steps", "warmup", "threads", "checkpoint_every", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SpecError(f"train.{name} is {getattr(self, name)}; give 0 or more")
        if self.threads > 1024:
            raise SpecError(f"train.threads is {self.threads}; give 1024 or fewer")
        if self.steps == 0 and not 0 < self.epochs < math.inf:
            raise SpecError(f"train.epochs is {self.epochs}; give a number above 0, or train.steps")
        _check_choice("train.decay", self.decay, Decay)
        if not 0 <= self.floor <= 1:
            raise SpecError(f"train.floor is {self.floor}; give a share of the learning rate, from 0 to 1")
        if not 0 < self.lr < math.inf:
            raise SpecError(f"train.lr is {self.lr}; give a number above 0")
        _check_seeds("train.seed", self.seed)


@dataclass(frozen=True)
class CompareConfig:
    """What `compare` sets side by side."""

    methods: tuple[str, ...] = ("probe", "lora", "cascade", "lorasc")
    """From `probe`, `lora`, `lora-average`, `lora-cycles`, `lora-summed`, `cascade`, `lorasc`, `full`; see
    `lorasc_fx.cli.methods`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each method and learning rate a seed."""
    lrs: tuple[float, ...] = (1e-3,)
    """Learning rates tried for each method."""
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Learning rates of a method where they differ from `lrs`, by its name."""
    select: Select = "loss"
    """What chooses among learning rates, on the validation examples."""
    reference: str = "lora"
    """The method that the paired differences are taken to."""
    keep_weights: tuple[str, ...] = ()
    """Methods whose trained weights are written, folded, beside their results."""

    def __post_init__(self) -> None:
        named = {"methods": self.methods, "keep_weights": self.keep_weights, "reference": (self.reference,)}
        for key, names in (named | {"rates": tuple(self.rates)}).items():
            for name in names:
                if name not in METHODS:
                    known = ", ".join(METHODS)
                    raise SpecError(
                        f"compare.{key} has {name!r}; give some of {known}{nearest(name, METHODS)}", code="unknown-name"
                    )
        lists = {"lrs": self.lrs} | {f"rates.{method}": rates for method, rates in self.rates.items()}
        for key, values in {"methods": self.methods, "seeds": self.seeds, **lists}.items():
            if len(set(values)) < len(values):
                raise SpecError(f"compare.{key} is {list(values)}; give each entry once")
            if not values:
                raise SpecError(f"compare.{key} is empty; give one entry or more")
        for key, rates in lists.items():
            if not all(0 < rate < math.inf for rate in rates):
                raise SpecError(f"compare.{key} is {list(rates)}; learning rates are above 0")
        _check_choice("compare.select", self.select, Select)
        _check_seeds("compare.seeds", *self.seeds)

    def rates_of(self, method: str) -> tuple[float, ...]:
        """Return the learning rates to try for this method."""
        return self.rates.get(method, self.lrs)


@dataclass(frozen=True)
class Config:
    """A whole run: model, data, training, cascade and comparison."""

    output: str = "runs/run"
    """Folder that the run writes to."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    spec: CascadeSpec = field(default_factory=CascadeSpec)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        if not self.output:
            raise SpecError("output is empty; give the folder that the run writes to")


def _check_seeds(name: str, *seeds: int) -> None:
    for seed in seeds:
        if not 0 <= seed < 2**31:
            raise SpecError(f"{name} is {seed}; a seed is 0 or more, and less than 2147483648")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise SpecError(f"{name} is {value!r}; give {' or '.join(map(repr, get_args(choices)))}")


def load_config(path: Path) -> Config:
    """Read a configuration.

    Raises:
        SpecError: the file cannot be read, is not TOML, has an unknown key, or an invalid value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise SpecError(f"{path}: the configuration cannot be read: {reason}", code="unreadable-file") from fault
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise SpecError(f"{path}: this is not TOML: {fault}", code="unreadable-file") from fault
    try:
        config = _table(Config, data, ())
    except _WrongKey as fault:
        line = line_of(key_lines(text), fault.at)
        raise SpecError(f"{path}:{line}: {fault}", code=fault.code) from fault
    assert isinstance(config, Config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain tables."""
    data = dataclasses.asdict(dataclasses.replace(config, spec=CascadeSpec()))
    return data | {"spec": {key: value for key, value in config.spec.to_dict().items() if value is not None}}


def write_config(config: Config, path: Path) -> None:
    """Write the configuration as TOML that `load_config` reads back to an equal one."""
    tomli_w = module_of("cli", "tomli_w")
    with replacing(path) as new:
        new.write_text(tomli_w.dumps(config_to_dict(config)), encoding="utf-8")


class _WrongKey(SpecError):
    """What is wrong with the key at a path."""

    def __init__(self, at: KeyPath, message: str, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.at = at


def _table(cls: type[Any], data: Any, at: KeyPath) -> Any:
    """Build a dataclass, those inside included, from a TOML table."""
    if not isinstance(data, Mapping):
        raise _WrongKey(at, f"{'.'.join(at)!r} is {data!r}; it is a table: write [{'.'.join(at)}]")
    known = [".".join((*at, field.name)) for field in dataclasses.fields(cls)]
    for key in data:
        name = ".".join((*at, key))
        if name not in known:
            raise _WrongKey((*at, key), f"unknown key {name!r}{nearest(name, known, 1)}", "unknown-name")
    hints = get_type_hints(cls)
    values = {key: _value(hints[key], value, (*at, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except _WrongKey:
        raise
    except (SpecError, TypeError) as fault:
        code = fault.code if isinstance(fault, SpecError) else None
        raise _WrongKey(_named(data, at, str(fault)), str(fault), code) from fault


_PLAIN = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _value(hint: Any, value: Any, at: KeyPath) -> Any:
    """Return a TOML value as a field of this type has it; unions are left to the class to check."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _table(hint, value, at)
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise _WrongKey(at, f"{'.'.join(at)} is {value!r}; it is a table: write [{'.'.join(at)}]")
        return {key: _value(get_args(hint)[1], entry, (*at, key)) for key, entry in value.items()}
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise _WrongKey(at, f"{'.'.join(at)} is {value!r}; give a list")
        return tuple(_value(get_args(hint)[0], entry, (*at, str(index))) for index, entry in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if all(kind in _PLAIN for kind in kinds) and type(value) not in kinds:
        raise _WrongKey(at, f"{'.'.join(at)} is {value!r}; give {' or '.join(_PLAIN[kind] for kind in kinds)}")
    return tuple(value) if isinstance(value, list) else value


def _named(data: Mapping[str, Any], at: KeyPath, message: str) -> KeyPath:
    """Return the path of the key that a message names by its first word, as `rank` or `noise.strength`."""
    words = tuple(message.partition(" ")[0].rstrip(":").split("."))
    words = words[1:] if words[:1] == at[-1:] else words
    name = words[0].partition("[")[0] if words else ""
    return (*at, name, *words[1:]) if name in data else at


_HEADER = re.compile(r"^\s*(\[{1,2})\s*([^\[\]]+?)\s*\]{1,2}\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line (1 is the first) on which each key and each table header of a TOML text stands.

    Entries of an array of tables are counted: the second `[[spec.rules]]` is `("spec", "rules", "1")`.
    """
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    counts: dict[KeyPath, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _parts(header[2])
            lines.setdefault(table, number)
            if header[1] == "[[":
                index = counts.get(table, 0)
                counts[table] = index + 1
                table = (*table, str(index))
                lines[table] = number
        elif key := _KEY.match(line):
            path = (*table, *_parts(key[1]))
            for length in range(len(table) + 1, len(path) + 1):
                lines.setdefault(path[:length], number)
    return lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """Return the line of a key, or of the nearest table or key around it."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1


def _parts(dotted: str) -> KeyPath:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))
