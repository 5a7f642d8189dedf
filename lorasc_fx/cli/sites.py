"""`lorasc-fx sites`: lists the weights that would be adapted, and the reasons for weights that would not."""

from __future__ import annotations

from tyro.conf import Positional

import lorasc_fx as lx
from lorasc_fx.cli.config import Config, ModelConfig
from lorasc_fx.cli.task import Task
from lorasc_fx.spec import KINDS, CascadeSpec

Names = tuple[str, ...]


def sites(
    model: Positional[str], /, targets: Names = KINDS, exclude: Names = (), train: Names = (), rank: int = 8
) -> int:
    """List every weight matrix of a model: adapted, refused (with the reason), or not reached by the graph.

    Args:
        model: folder of a model of transformers.
        targets: kinds of weights (linear, conv, ...) or globs on weight names.
        exclude: globs on names of weights to leave unchanged.
        train: globs on names of parameters that are trained in full.
        rank: rank of the branches.
    """
    spec = CascadeSpec(targets=targets, exclude=exclude, train=train, rank=rank)
    task = Task(Config(model=ModelConfig(model)), {"classes": (), "chat": False})
    built = task.model().eval()
    cascade = lx.adapt(built, kwargs=task.example(), spec=spec)
    for site in cascade.sites:
        print(f"{site.weight}\t{site.kind}\t{' × '.join(map(str, site.shape))}\trank {site.rank}\t{site.parameters:,}")
    for refusal in cascade.refusals:
        print(f"{refusal.weight}\t{refusal.reason.value}\t{refusal.sentence}")
    for unreached in cascade.unreached:
        print(f"not reached by this graph: {unreached}")
    added, total = sum(site.parameters for site in cascade.sites), sum(value.numel() for value in built.parameters())
    print(f"{len(cascade.sites)} sites of {model}: {added:,} parameters in branches, {added / total:.2%} of {total:,}")
    return 0
