"""`lorasc-fx sites`: lists the weights that would be adapted, and the reasons for weights that would not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

import lorasc_fx as lx
from lorasc_fx.cli.config import ModelConfig
from lorasc_fx.cli.models import build_model, example_inputs, set_mode
from lorasc_fx.cli.progress import console
from lorasc_fx.spec import KINDS, CascadeSpec


@dataclass(frozen=True)
class SitesArguments:
    """List every weight matrix of a model: adapted, refused (with the reason), or not reached by the captured graph."""

    model: Annotated[str, tyro.conf.Positional]
    """The model: `timm:NAME`, `hf:FOLDER`, `hf:package:NAME`, or `python:package.module:function`."""
    targets: tuple[str, ...] = KINDS
    """Kinds of weights (`linear`, `conv`, ...) or globs on weight names."""
    exclude: tuple[str, ...] = ()
    """Globs on names of weights that are never changed."""
    train: tuple[str, ...] = ()
    """Globs on names of parameters that are trained in full."""
    rank: int = 8
    """Rank of the branches."""
    input: tuple[int, ...] = ()
    """Shape of the input, such as `--input 2 3 64 64`. Required if the model does not specify it."""
    frontend: str = "auto"
    """Front end that captures the graph: `auto`, `export` or `eager`"""
    training: bool = False
    """Capture the graph in train mode."""


def run_sites(arguments: SitesArguments) -> int:
    """Print the table and return the exit code."""
    from rich.table import Table

    config = ModelConfig(name=arguments.model)
    model = set_mode(build_model(config, None), arguments.training)
    args, kwargs = example_inputs(config, model, arguments.input)
    spec = CascadeSpec(targets=arguments.targets, exclude=arguments.exclude, train=arguments.train, rank=arguments.rank)
    total = sum(parameter.numel() for parameter in model.parameters())
    cascade = lx.adapt(model, args=args, kwargs=kwargs, spec=spec, frontend=arguments.frontend)
    screen = console()
    sites = Table(title=f"{len(cascade.sites)} sites of {arguments.model}")
    for column in ("weight", "kind", "shape", "rank", "branch"):
        sites.add_column(column, justify="left" if column in ("weight", "kind") else "right", overflow="fold")
    for site in cascade.sites:
        shape = " × ".join(str(size) for size in site.shape)
        sites.add_row(site.weight, site.kind, shape, str(site.rank), f"{site.parameters:,}")
    screen.print(sites)
    if cascade.refusals:
        refusals = Table(title=f"{len(cascade.refusals)} weights that are not adapted")
        for column in ("weight", "reason", "explanation"):
            refusals.add_column(column, overflow="fold")
        for refusal in cascade.refusals:
            refusals.add_row(refusal.weight, refusal.reason.value, refusal.sentence)
        screen.print(refusals)
    for name in cascade.unreached:
        screen.print(f"not reached by this graph: {name}", soft_wrap=True)
    added = sum(site.parameters for site in cascade.sites)
    screen.print(
        f"{added:,} trainable parameters in branches, {added / total:.2%} of the model's {total:,}", markup=False
    )
    return 0
