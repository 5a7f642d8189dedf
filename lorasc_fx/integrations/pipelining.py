"""The adapted graph of a cascade, cut into the stages of torch's pipeline parallelism (torch.distributed.pipelining).

The pass `MarkCuts` marks where the graph is cut, and torch splits it. The stages hold the cascade's own Parameters, of
which each process trains those of its stage: a transition of the cascade writes into them as it does elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.distributed.pipelining import Pipe, pipeline

from lorasc_fx.errors import StateError
from lorasc_fx.passes import MarkCuts
from lorasc_fx.runtime import Cascade

__all__ = ["split"]


def split(
    cascade: Cascade, before: Sequence[str], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Pipe:
    """Split the adapted graph of a call before the first use of each of these modules.

    `split(cascade, ["layers.8"], args=(microbatch,)).build_stage(rank, device)` is the stage of a process for torch's
    schedules. Every process adapts the whole model, and trains, ends and saves by its own cascade: an optimizer of
    `cascade.param_groups` finds gradients for its stage alone, and a transition leaves what did not train as it was.
    `lorasc_fx.merge` of the runs that the processes have saved, each with weight 1, is the run of the whole model.

    Args:
        cascade: on one process each; in the mode (train or eval) whose graph is split.
        before: names of modules, as in `named_modules` of the user's model; one less than there are stages.
        args, kwargs: a microbatch, as a call of the cascade takes it.

    Returns:
        torch's `Pipe`, whose stages have the parameters of the cascade.

    Raises:
        PassError: no weight of such a module is read, or a stage would have no weights.
        StateError: the model has graph breaks in this call, is sharded, on the meta device or released, or the spec has
            an option that follows the steps or gradients of the whole model.
    """
    run = cascade._run
    run.check_ready("split")
    spec = run.plan.spec
    for name, value, follows in (
        ("noise.redraw", spec.noise.redraw, spec.noise.follows_steps),
        ("restart_A", spec.restart_A, spec.next_a.needs_gradient),
        ("nearest_full_gradient", spec.nearest_full_gradient, bool(spec.nearest_full_gradient)),
    ):
        if follows:
            raise StateError(
                f"split: {name} is {value!r}, and a stage is called without the cascade, which follows steps and "
                "gradients; leave it at its default",
                code="not-shardable",
            )
    variant, call = cascade._variant_of(tuple(args), dict(kwargs or {}), "split")
    if not isinstance(variant.module, fx.GraphModule):
        raise StateError(
            "split: the model has graph breaks in this call, and only a whole graph can be cut; adapt it by another "
            "front end",
            code="no-whole-graph",
        )
    marked = MarkCuts(tuple(before))(variant.module).graph_module
    return pipeline(marked, call.args, call.kwargs)
