"""What a configuration file may say: frozen dataclasses, one a table, whose field names are the keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.spec import CascadeSpec

__all__ = ["METHODS", "CompareConfig", "Config", "DataConfig", "ModelConfig", "TrainConfig"]

METHODS = ("probe", "lora", "lora-summed", "cascade", "lorasc", "full")
"""What `compare` can set side by side, in the order in which its table shows them."""


@dataclass(frozen=True)
class ModelConfig:
    """The network that is adapted."""

    name: str = "timm:tf_efficientnet_lite0"
    """`timm:NAME`, `hf:FOLDER` (or `hf:package:minilm`), `python:package.module:function`, or a `.pt2` file."""
    weights: str = ""
    """Pretrained weights: `package:efficientnet-lite0`, a `.safetensors` file, or empty (as the model comes)."""
    seed: int = 0
    """Seed of what is not pretrained (a new head); a run adds its own seed."""

    def __post_init__(self) -> None:
        _check_seeds("model.seed", self.seed)


@dataclass(frozen=True)
class DataConfig:
    """The examples, how they are split, and the shifted test sets."""

    name: str = "mnist5k"
    """`mnist5k`, `digits`, `rotten-tomatoes`, `imdb`, `imagefolder:DIR` or `csv:FILE`."""
    train: int = 1500
    """Examples to train on."""
    validation: int = 500
    """Examples that choose the learning rate."""
    test: int = 3000
    """Examples that the tables report on."""
    shifts: tuple[str, ...] = ()
    """Shifted test sets: another data set's name, or for images `noise` and `blur`."""
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
    """From `probe`, `lora`, `lora-summed`, `cascade`, `lorasc`, `full`."""
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
                    raise SpecError(f"compare.{key} has {name!r}; give some of {known}{nearest(name, METHODS)}")
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
