"""Configuration files: the tables as frozen dataclasses, reading TOML with errors that name the line, and writing it.

`tomllib` reads only, and forgets on which line a key stands: `key_lines` scans for headers and `key =`. Keys inside a
multi-line array or an inline table have the line of the key that holds them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lorasc_fx.cli.methods import METHODS
from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.spec import CascadeSpec, Noise, Rule, TrainRule

__all__ = [
    "CompareConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "TrainConfig",
    "config_to_dict",
    "key_lines",
    "line_of",
    "load_config",
    "to_toml",
    "write_config",
]


@dataclass(frozen=True)
class ModelConfig:
    """The network that is adapted."""

    name: str = ""
    """`timm:NAME`, `hf:FOLDER` (`hf:package:NAME` is the one inside an installed package),
    `python:package.module:function`, or a `.pt2` file."""
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
    """`csv:FILE`, `imagefolder:DIR`, or `python:package.module:function`, which returns inputs (a list of texts, or
    bytes [examples, 1 or 3, height, width]) and a class each."""
    train: int = 1500
    """Examples to train on."""
    validation: int = 500
    """Examples that choose the learning rate."""
    test: int = 3000
    """Examples that the tables report on."""
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
    """Column of a CSV file that holds the text."""
    label_column: str = "label"
    """Column of a CSV file that holds the class."""

    def __post_init__(self) -> None:
        if len(set(self.shifts)) < len(self.shifts):
            raise SpecError(f"data.shifts is {list(self.shifts)}; give each entry once")
        for name in ("train", "validation", "test", "shift_test", "image_size", "max_length"):
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
    warmup: int = 10
    """Steps of linear warm-up, at the start and after each restart."""
    decay: bool = True
    """Let the learning rate fall linearly to 0 over the whole run."""
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
        for name in ("steps", "warmup", "threads", "checkpoint_every", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SpecError(f"train.{name} is {getattr(self, name)}; give 0 or more")
        if self.threads > 1024:
            raise SpecError(f"train.threads is {self.threads}; give 1024 or fewer")
        if self.steps == 0 and not 0 < self.epochs < math.inf:
            raise SpecError(f"train.epochs is {self.epochs}; give a number above 0, or train.steps")
        if not 0 < self.lr < math.inf:
            raise SpecError(f"train.lr is {self.lr}; give a number above 0")
        _check_seeds("train.seed", self.seed)


@dataclass(frozen=True)
class CompareConfig:
    """What `compare` sets side by side."""

    methods: tuple[str, ...] = ("probe", "lora", "cascade", "lorasc")
    """From `probe`, `lora`, `lora-summed`, `cascade`, `lorasc`, `full`; see `lorasc_fx.cli.methods`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each method and learning rate a seed."""
    lrs: tuple[float, ...] = (1e-3,)
    """Learning rates tried for each method; validation accuracy chooses."""
    probe_lrs: tuple[float, ...] = ()
    """Learning rates of `probe`, where they differ from `lrs`."""
    full_lrs: tuple[float, ...] = ()
    """Learning rates of `full`, where they differ from `lrs`."""
    reference: str = "lora"
    """The method that the paired differences are taken to."""
    keep_weights: tuple[str, ...] = ()
    """Methods whose trained weights are written, folded, beside their results."""

    def __post_init__(self) -> None:
        for key in ("methods", "keep_weights", "reference"):
            value = getattr(self, key)
            for name in (value,) if isinstance(value, str) else value:
                if name not in METHODS:
                    known = ", ".join(METHODS)
                    raise SpecError(
                        f"compare.{key} has {name!r}; give some of {known}{nearest(name, METHODS)}", code="unknown-name"
                    )
        for key in ("methods", "seeds", "lrs", "probe_lrs", "full_lrs"):
            value = getattr(self, key)
            if len(set(value)) < len(value):
                raise SpecError(f"compare.{key} is {list(value)}; give each entry once")
        if not self.methods or not self.seeds or not self.lrs:
            raise SpecError("compare.methods, compare.seeds and compare.lrs each need one entry or more")
        for key in ("lrs", "probe_lrs", "full_lrs"):
            if not all(0 < rate < math.inf for rate in getattr(self, key)):
                raise SpecError(f"compare.{key} is {list(getattr(self, key))}; learning rates are above 0")
        _check_seeds("compare.seeds", *self.seeds)

    def rates(self, method: str) -> tuple[float, ...]:
        """Return the learning rates to try for this method."""
        own = {"probe": self.probe_lrs, "full": self.full_lrs}.get(method, ())
        return own or self.lrs


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


_SPEC_TABLES: dict[str, type[Any]] = {"noise": Noise, "rules": Rule, "train_rules": TrainRule}


def load_config(path: Path) -> Config:
    """Read a configuration.

    Raises:
        SpecError: the file cannot be read, is not TOML, has a key that no table knows, or a value that a key refuses.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise SpecError(f"{path}: the configuration cannot be read: {reason}", code="unreadable-file") from fault
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise SpecError(f"{path}: this is not TOML: {fault}", code="invalid-toml") from fault
    reader = _Reader(path, key_lines(text))
    config = reader.table(Config, data, ())
    assert isinstance(config, Config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain tables."""
    data = dataclasses.asdict(dataclasses.replace(config, spec=CascadeSpec()))
    data["spec"] = config.spec.to_dict()
    return data


def write_config(config: Config, path: Path) -> None:
    """Write the configuration as TOML that `load_config` reads back to an equal one."""
    path.write_text(to_toml(config_to_dict(config)), encoding="utf-8")


@dataclass(frozen=True)
class _Reader:
    path: Path
    lines: Mapping[KeyPath, int]

    def fail(self, at: KeyPath, message: str, code: str | None = None) -> SpecError:
        return SpecError(f"{self.path}:{line_of(self.lines, at)}: {message}", code=code)

    def known(self, cls: type[Any], data: Mapping[str, Any], at: KeyPath) -> None:
        names = [each.name for each in dataclasses.fields(cls)]
        for key in data:
            if key not in names:
                where = ".".join((*at, key))
                known = [".".join((*at, name)) for name in names]
                raise self.fail((*at, key), f"unknown key {where!r}{nearest(where, known, 1)}", "unknown-name")

    def table(self, cls: type[Any], data: Any, at: KeyPath) -> Any:
        if not isinstance(data, Mapping):
            raise self.fail(at, f"{'.'.join(at)!r} is {data!r}; it is a table: write [{'.'.join(at)}]")
        self.known(cls, data, at)
        if cls is CascadeSpec:
            return self.spec(data, at)
        hints = get_type_hints(cls)
        values = {key: self.value(hints[key], value, (*at, key)) for key, value in data.items()}
        try:
            return cls(**values)
        except SpecError as fault:
            raise self.fail(self.blame(data, at, str(fault)), str(fault), fault.code) from fault

    def spec(self, data: Mapping[str, Any], at: KeyPath) -> CascadeSpec:
        for name, cls in _SPEC_TABLES.items():
            entries = data.get(name, [])
            for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
                if isinstance(entry, Mapping):
                    self.known(cls, entry, (*at, name, *([str(index)] if isinstance(entries, list) else [])))
        try:
            return CascadeSpec.from_dict(data)
        except (SpecError, TypeError) as fault:
            code = fault.code if isinstance(fault, SpecError) else None
            raise self.fail(self.blame(data, at, str(fault)), str(fault), code) from fault

    def blame(self, data: Mapping[str, Any], at: KeyPath, message: str) -> KeyPath:
        """Find the key that a message of `__post_init__` speaks of: its first word, `rank` or `noise.strength`."""
        words = tuple(message.partition(" ")[0].rstrip(":").split("."))
        words = words[1:] if words[:1] == at[-1:] else words
        name = words[0].partition("[")[0] if words else ""
        return (*at, name, *words[1:]) if name in data else at

    def value(self, hint: Any, value: Any, at: KeyPath) -> Any:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.table(hint, value, at)
        if get_origin(hint) is tuple:
            if not isinstance(value, list):
                raise self.fail(at, f"{'.'.join(at)} is {value!r}; give a list")
            return tuple(self.value(get_args(hint)[0], entry, at) for entry in value)
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if type(value) is not hint:
            kinds = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
            raise self.fail(at, f"{'.'.join(at)} is {value!r}; give {kinds[hint]}")
        return value


KeyPath = tuple[str, ...]

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


def to_toml(data: Mapping[str, Any]) -> str:
    """Return nested dictionaries, lists, strings, numbers and flags as TOML text; a None is left out."""
    return "\n".join(_table(data, ())).lstrip("\n") + "\n"


def _parts(dotted: str) -> KeyPath:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


def _table(data: Mapping[str, Any], path: KeyPath) -> list[str]:
    plain = {key: value for key, value in data.items() if value is not None and not _is_table(value)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in data.items():
        here = (*path, key)
        name = ".".join(_key(part) for part in here)
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]", *_table(value, here)]
        elif _is_table(value):
            for entry in value:
                lines += ["", f"[[{name}]]", *_table(entry, here)]
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
    )


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)  # inf and nan are spelled so in TOML too
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    raise TypeError(f"TOML has no form for {type(value).__name__}")
