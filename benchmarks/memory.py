"""Activation memory: what a forward keeps for its backward, counted in whole storages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lorasc_fx import Site

from .sites import Recorder

__all__ = ["activation_bytes", "allowed_bytes"]


def activation_bytes(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """Return the bytes of the distinct storages that autograd saves, without the model's parameters and buffers.

    Args:
        forward: runs the model, and returns what a backward starts from.
        model: all that is in it, branches too, is there anyway and does not count.
    """
    return sum(_saved(forward, model).values())


def allowed_bytes(forward: Callable[[], torch.Tensor], model: nn.Module, sites: Sequence[Site]) -> int:
    """Return what a frozen model saves together with the inputs of its sites, each storage once.

    A branch needs its input for the gradient of lora_A: this much, and `x A` beside it, is what adapters cannot avoid.

    Raises:
        RuntimeError: a site's input was not seen.
    """
    recorder = Recorder(model, sites)

    def recorded() -> torch.Tensor:
        with recorder:
            return forward()

    found = _saved(recorded, model)
    recorder.check_all_met()
    for meeting in recorder.meetings:
        storage = meeting.x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _saved(forward: Callable[[], torch.Tensor], model: nn.Module) -> dict[int, int]:
    """Return the bytes of each storage by its address; what is saved stays alive until the end, so none comes twice."""
    owned = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    @torch.compiler.disable  # under `graph-breaks` dynamo would capture this as well, anew for each length of the list
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor.detach()  # a node that keeps its own result would keep itself: the tensor holds the node

    # The graph holds `pack`, which holds the list: what holds the graph must not stand in it, or all of it stays.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return found
