"""What `train`, `fold` and `compare` all do first: threads, data, model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lorasc_fx.cli.batches import Batch, Order
from lorasc_fx.cli.data import Splits, load_data
from lorasc_fx.cli.images import ImageExamples
from lorasc_fx.cli.learners import has_batch_norm
from lorasc_fx.cli.models import build_model, tokenizer_of
from lorasc_fx.cli.schedule import Schedule
from lorasc_fx.cli.schema import Config
from lorasc_fx.errors import SpecError

__all__ = ["Setup", "channels_last"]


@dataclass(frozen=True)
class Setup:
    """A configuration with its data loaded; models are built from it as often as they are needed."""

    config: Config
    splits: Splits

    @classmethod
    def of(cls, config: Config) -> Setup:
        """Load the data, and take the threads and the device that are asked for."""
        train = config.train
        if train.threads:
            torch.set_num_threads(train.threads)
        _check_device(train.device)
        return cls(config, load_data(config.data, tokenizer_of(config.model, config.data.max_length)))

    def model(self, seed: int) -> nn.Module:
        """Return a fresh model with a new head from this seed; for images in channels-last order, which is faster."""
        model = build_model(self.config.model, len(self.splits.classes), seed).to(self.config.train.device)
        if isinstance(self.splits.train, ImageExamples):
            channels_last(model)
        return model

    def trains(self, model: nn.Module) -> bool:
        """Return whether the model is in train mode while it trains; see `TrainConfig.frozen_norm`."""
        return not (self.config.train.frozen_norm and has_batch_norm(model))

    def order(self, seed: int) -> Order:
        """Return the order of examples of this seed."""
        return Order(len(self.splits.train), min(self.config.train.batch_size, len(self.splits.train)), seed)

    def schedule(self, stages: int) -> Schedule:
        """Return the schedule for so many stages."""
        return Schedule.of(self.config.train, self.order(0).steps_per_epoch, stages)

    def sample(self, seed: int) -> Batch:
        """Return the batch that a model is captured with: the first one that it will see."""
        return self.splits.train.batch(self.order(seed).index(0)).to(self.config.train.device)


def _check_device(device: str) -> None:
    known = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        known += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        given = torch.empty(0, device=device).device
        reason = "this device holds no numbers" if given.type == "meta" else ""
    except (RuntimeError, AssertionError) as fault:
        reason = str(fault).partition(". ")[0].splitlines()[0]
    if reason:
        raise SpecError(f"train.device is {device!r}: {reason}; this machine has {', '.join(known)}")


def channels_last(model: nn.Module) -> nn.Module:
    """Put the weights of 2d convs in channels-last order, which is faster, and return the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.contiguous(memory_format=torch.channels_last)
    return model
