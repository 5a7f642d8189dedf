"""The state dict of a cascade as loops keep it: all that a resume needs, and no copy of W0.

torch's own gives the user's parameters, which hold W_t, and the branches; from these no cascade can be made again. A
loop calls `state_dict` and `load_state_dict` and writes what it gets where it likes, so the hooks that torch has for
these two give and take what `lorasc_fx.save` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lorasc_fx.runtime import Cascade
from lorasc_fx.runtime.checkpoint_read import Checkpoint
from lorasc_fx.runtime.state_dict import from_state_dict, take_over, to_state_dict

__all__ = ["keep_small"]

_KEPT: WeakKeyDictionary[Cascade, list[Any]] = WeakKeyDictionary()


def _nothing() -> dict[str, Any]:
    return {}


def _ignored(_found: Checkpoint) -> None:
    return None


def keep_small(
    cascade: Cascade,
    extra: Callable[[], Mapping[str, Any]] = _nothing,
    taken: Callable[[Checkpoint], object] = _ignored,
) -> None:
    """Let `cascade.state_dict()` be the small state from now on, and `load_state_dict` take it; also inside a wrapper.

    Args:
        cascade: whose state a loop saves. A second call replaces the first.
        extra: returns what the loop saves besides, of what JSON holds.
        taken: called with a checkpoint once its values are loaded; everything is undone if it raises.

    Raises:
        StateError: by the two calls, as `lorasc_fx.save` does.
        CheckpointError: by `load_state_dict`, for what is no such state, damaged, of another base or another spec. The
            cascade is as it was.
    """

    def give(module: Cascade, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        with module._run.exclusive("state_dict"):
            table = to_state_dict(module._run, extra())
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        state.update({prefix + name: tensor for name, tensor in table.items()})

    def take(module: Cascade, state: dict[str, torch.Tensor], prefix: str, *_rest: Any) -> None:
        names = [name for name in state if name.startswith(prefix)]
        table = {name.removeprefix(prefix): state.pop(name) for name in names}
        take_over(module, from_state_dict(table, "load_state_dict"), taken)

    def forget(module: Cascade, keys: Any) -> None:
        """Every parameter is reported as missing: they are not in the state, and none is."""
        known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
        keys.missing_keys[:] = [name for name in keys.missing_keys if not _is_one_of(known, name)]

    for handle in _KEPT.pop(cascade, ()):
        handle.remove()
    module: Any = cascade  # torch has no annotations for these
    _KEPT[cascade] = [
        module.register_state_dict_post_hook(give),
        module.register_load_state_dict_pre_hook(take),
        module.register_load_state_dict_post_hook(forget),
    ]


def _is_one_of(known: set[str], name: str) -> bool:
    """Whether a name is one of the cascade's, behind whatever prefix its wrappers have given it."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in known for start in range(len(parts)))
