"""The command `lorasc-fx`: train, sites, fold, export, compare, report; `load` reads the folder of a run."""

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
    """Load the last checkpoint of a run of `lorasc-fx train`, as `lorasc_fx.load` does.

    The cascade has `preprocessing`: `args, kwargs = cascade.preprocessing(texts)`, or paths of images, as the run has
    read them, and the names of its `classes`.

    Args:
        run: the folder of the run.
        model: that was adapted; by default the base that the configuration of the run names is built.
        args, kwargs, base: as for `lorasc_fx.load`.

    Raises:
        SpecError: the base cannot be built, or is a function of yours, which is not called here.
        MissingExtra: what `lorasc-fx` needs is not installed.
        StateError, CheckpointError: the folder holds no run, or as of `lorasc_fx.load`.
    """
    require("cli", "rich", "tyro")
    from lorasc_fx.cli.preprocessing import Preprocessing

    preprocessing = Preprocessing(path_of(run))
    cascade = load_checkpoint(run, preprocessing.base() if model is None else model, args, kwargs, base=base)
    cascade.preprocessing = preprocessing
    return cascade
