"""Functions of other libraries that use a cascade as if it were a plain model, found on the call stack.

A library is recognized by the names of its modules and functions, and is never imported.
"""

from __future__ import annotations

import sys
from typing import Any

from lorasc_fx.cascade.usage import callers
from lorasc_fx.errors import StateError

__all__ = ["called_by"]

_CALLERS = {
    # An average of all parameters begins with a copy.
    "copy": (
        "torch.optim.swa_utils",
        "timm.utils.model_ema",
        "ultralytics.utils.torch_utils",
        "lightning.pytorch.callbacks.stochastic_weight_avg",
        "pytorch_lightning.callbacks.stochastic_weight_avg",
    ),
    # accelerate's FSDP plugins begin by asking a model for its blocks.
    "shard": ("accelerate.utils.dataclasses.set_auto_wrap_policy",),
    # They write the state dict of the model that they were given as its weights.
    "save": ("transformers.trainer._save", "accelerate.accelerator.save_model"),
    # They shard the parameters, or train copies of them.
    "train": (
        "deepspeed.runtime.engine.forward",
        "torch.distributed.fsdp.fully_sharded_data_parallel.forward",
    ),
    # A pipeline calls `generate` or the model itself, depending on its task. Both must see the same weights.
    "evaluate": ("transformers.pipelines.base.forward",),
}
"""Modules, or functions of modules, by the event of a cascade that they cause."""

_REFUSED = {
    "copy": "an average of parameters ({caller}) copies a cascade: it would average W_t with its noise, and B and A "
    "separately. Give it cascade.model, and update it from cascade.model inside "
    '`with cascade.weights("slow"):` or "fast". Or give the spec average="ema" or "swa"',
    "shard": "accelerator.prepare: accelerate's FSDP plugin would shard modules that the cascade's graphs never call, "
    "and parameters that a transition has to write. Make the Accelerator without fsdp_plugin, call "
    "lorasc_fx.parallel.fsdp.shard(cascade), then accelerator.prepare_model(cascade, evaluation_mode=True), which adds "
    "no wrapper, and accelerator.prepare(optimizer, loader)",
    "train": "forward: {caller} holds the cascade and has sharded or copied its parameters, so a transition could not "
    "write them. Call lorasc_fx.parallel.fsdp.shard(cascade) instead, in a training loop of your own (with accelerate: "
    "prepare the data, not the cascade), or wrap the cascade in DistributedDataParallel",
}
"""Messages, by event, where the caller would do something wrong."""


def called_by(event: str, cascade: Any) -> bool:
    """Return whether a function of the table causes this event.

    Raises:
        StateError: the function would do something wrong with the cascade.
    """
    caller = "fully_shard" if event == "train" and hasattr(type(cascade), "_get_fsdp_state") else ""
    known = any(name in sys.modules or name.rpartition(".")[0] in sys.modules for name in _CALLERS[event])
    for frame in callers() if known and not caller else ():
        module = frame.f_globals.get("__name__")
        if module in _CALLERS[event] or f"{module}.{frame.f_code.co_name}" in _CALLERS[event]:
            caller = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else str(module)
            break
    if caller and event in _REFUSED:
        raise StateError(_REFUSED[event].format(caller=caller), code="wrapper-not-supported")
    if caller and event == "save" and not cascade._run.released:
        cascade._run.warned.once(
            "unfolded-save",
            "a trainer saves an unfolded cascade as a model: only cascade.load_state_dict can read the file, the "
            "user's model cannot. In a Trainer of transformers or trl use "
            "lorasc_fx.integrations.transformers.CascadeCallback; elsewhere save cascade.release()",
        )
    return bool(caller)
