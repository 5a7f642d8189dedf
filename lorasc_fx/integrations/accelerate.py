"""A cascade in a loop of accelerate's: prepare, accumulate and clip work as they do; `keep` is for its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasc_fx.errors import StateError
from lorasc_fx.extras import require
from lorasc_fx.integrations.small_state import keep_small
from lorasc_fx.runtime import Cascade
from lorasc_fx.runtime.checkpoint_read import Checkpoint

require("loops", "accelerate")

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["keep"]

_OTHERWISE = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Kinds of distribution under which accelerate writes models by other means than their state dicts."""


def keep(accelerator: Accelerator, cascade: Cascade) -> None:
    """Have `accelerator.save_state` write all that a resume needs, without W0, and `load_state` take it over.

    Call it once, before or after `prepare`. To resume, adapt the same weights by the same spec, prepare, and call
    `load_state`: stage, experts, coefficients and branches are those of the checkpoint, and so are gradients that wait
    for a step. Transitions stay yours: `cascade.transition(optimizer)` after a step, with the prepared optimizer.

    Args:
        accelerator: that saves and loads.
        cascade: as `lorasc_fx.adapt` returned it.

    Raises:
        StateError: the accelerator shards models, and writes them by other means.
        CheckpointError: by `load_state`, for a state that is damaged, of another base or another spec.
    """
    kind = accelerator.distributed_type.value
    if kind in _OTHERWISE:
        raise StateError(
            f"keep: accelerate under {kind} writes models shard by shard, and not by their state dicts; "
            "use lorasc_fx.save and lorasc_fx.load for the cascade",
            code="sharded",
        )

    def arm(checkpoint: Checkpoint) -> None:
        """A stage whose first step looks at the gradient (restart_A) waits for that step again."""
        if not checkpoint.manifest["turning"]:
            return
        run, first = cascade._run, next(iter(cascade._run.trainable().values()))
        for optimizer in accelerator._optimizers:
            if any(first is parameter for group in optimizer.param_groups for parameter in group["params"]):
                run.wait_for_gradient(optimizer)

    keep_small(cascade, taken=arm)
