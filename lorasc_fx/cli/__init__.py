"""The command `lorasc-fx`, and `load`, which loads the cascade of a run folder in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from torch import nn

from lorasc_fx.adapt import load as load_checkpoint
from lorasc_fx.cli.app import main
from lorasc_fx.errors import path_of
from lorasc_fx.facade import Cascade
from lorasc_fx.util.extras import require

__all__ = ["load", "main"]


def load(
    run: str | PathLike[str],
    model: nn.Module | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    base: str | PathLike[str] = "memory",
) -> Cascade:
    """Load the last checkpoint of a run of `lorasc-fx train`.

    The cascade has an attribute `preprocessing`, which converts inputs in the same way as the run:
    `args, kwargs = cascade.preprocessing(texts)`, or paths of images instead of texts. Its `classes` are the names of
    the classes.

    Args:
        run: the run folder.
        model: the model that was adapted. By default, it is built from the configuration of the run.
        args, kwargs, base: as for `lorasc_fx.load`.

    Raises:
        SpecError: the model cannot be built, or the configuration builds it by a user's function, which is not called
            here.
        MissingExtra: the packages of the extra `cli` are not installed.
        StateError, CheckpointError: the folder has no run, or an error of `lorasc_fx.load`.
    """
    require("cli", "rich", "tyro")
    from lorasc_fx.cli.preprocessing import Preprocessing

    preprocessing = Preprocessing(path_of(run))
    cascade = load_checkpoint(run, preprocessing.base() if model is None else model, args, kwargs, base=base)
    cascade.preprocessing = preprocessing
    return cascade
