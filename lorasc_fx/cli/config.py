"""Configuration files: a TOML file, `key=value` overrides, and frozen dataclasses whose errors name the key."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from lorasc_fx.errors import SpecError
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.decode import Check, choice, decode
from lorasc_fx.util.environment import module_of

METHODS = ("lora", "cascade", "lorasc")
"""The methods of `lorasc-fx compare`: one stage without noise; several stages with pace 1 and without noise, similar to
ReLoRA; and several stages with the pace and noise of `[spec]`."""

Method = Annotated[str, choice(METHODS)]
Rates = tuple[float, ...]


@dataclass(frozen=True)
class ModelConfig:
    """The model that is adapted."""

    path: str = ""
    """The folder of a model of transformers. Nothing is downloaded."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Dtype of the weights. `auto` keeps the dtype of the model's files."""


@dataclass(frozen=True)
class DataConfig:
    """The data set, and how it is split."""

    path: str = ""
    """A `.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.txt` file (one text per line), or a folder with a folder of
    images per class."""
    train: int | float = 0.7
    """Training examples: a number, or a share of the data set."""
    validation: int | float = 0.1
    """Validation examples, which are evaluated at the end of each stage: a number or a share."""
    test: int | float = 0.2
    """Test examples: a number or a share."""
    seed: int = 0
    """Seed of the split."""
    max_length: int = 0
    """Maximum number of tokens, limited by the model's own maximum. Longer texts are truncated. 0 means 1024."""
    text_column: str = "text"
    """Name of the column with the text."""
    image_column: str = "image"
    """Name of the column with the image."""
    label_column: str = "label"
    """Name of the column with the class."""


@dataclass(frozen=True)
class StagesConfig:
    """The stages, and the learning rate within each of them."""

    count: int = 3
    """Number of stages. The optimizer steps of the training are divided evenly among them."""
    warmup: int = 10
    """Steps of linear warm-up at the start of each stage."""
    floor: float = 0.0
    """Learning rate at the end of each stage, as a share of the full learning rate. 1 means no decay."""


@dataclass(frozen=True)
class CompareConfig:
    """The methods, seeds and learning rates of `lorasc-fx compare`."""

    methods: tuple[Method, ...] = METHODS
    """The methods to compare. Each is compared with the first one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds. Every method is trained with every learning rate once per seed."""
    lrs: Rates = (1e-3,)
    """Learning rates to try for each method."""
    rates: dict[Method, Rates] = field(default_factory=dict)
    """{method: learning rates to try instead of `lrs`}."""
    text: str = ""
    """For a language model: a `.txt` file with one text per line, or a table with a column `text`. The rise of its loss
    is printed as forgetting."""


@dataclass(frozen=True)
class Config:
    """A run. `train` has the keys of transformers' TrainingArguments, or of TRL's SFTConfig for a language model."""

    output: Annotated[str, Check(bool, "give the folder that the run writes to")] = "runs/run"
    """The run folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    train: dict[str, Any] = field(default_factory=dict)
    spec: CascadeSpec = field(default_factory=CascadeSpec)
    compare: CompareConfig = field(default_factory=CompareConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, and apply overrides such as `spec.rank=16`.

    Paths in the file are relative to its folder. `output`, and paths in overrides, are relative to the working
    directory. In the result, all paths are relative to the working directory.

    Raises:
        SpecError: the file cannot be read, or a key or value is invalid.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        table.setdefault("output", f"runs/{path.stem}")
        config: Config = decode(Config, table)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise SpecError(f"{path}: the configuration cannot be read: {fault}", code="unreadable-file") from fault
    except SpecError as fault:
        raise SpecError(f"{path}: {fault}", code=fault.code) from fault
    table = to_dict(_with_paths(config, lambda target: os.path.normpath(path.parent / target)))
    for override in overrides:
        _override(table, override)
    return decode(Config, table)  # type: ignore[no-any-return]  # decode returns an instance of its first argument


def _override(table: dict[str, Any], override: str) -> None:
    """Set a key of nested dicts to the TOML literal after the equals sign, or to the text if it is not TOML."""
    key, equals, text = override.partition("=")
    if not equals:
        raise SpecError(f"{override!r} is not an override; give key=value, such as spec.rank=16")
    *parents, name = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    try:
        table[name] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = text


def write_config(config: Config, path: Path) -> None:
    """Write the configuration as TOML. `load_config` reads an equal configuration from it."""
    tomli_w = module_of("cli", "tomli_w")
    path.parent.mkdir(parents=True, exist_ok=True)
    config = _with_paths(config, lambda target: os.path.relpath(target, path.parent))
    path.write_text(tomli_w.dumps(to_dict(config)), encoding="utf-8")


def _with_paths(config: Config, change: Callable[[str], str]) -> Config:
    """Apply `change` to the relative paths of the model, the data and the general text."""
    for table, key in (("model", "path"), ("data", "path"), ("compare", "text")):
        part = getattr(config, table)
        if (path := getattr(part, key)) and not os.path.isabs(path):
            config = dataclasses.replace(config, **{table: dataclasses.replace(part, **{key: change(path)})})
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dicts of plain values."""
    table = dataclasses.asdict(dataclasses.replace(config, spec=CascadeSpec()))
    return table | {"spec": {key: value for key, value in config.spec.to_dict().items() if value is not None}}
