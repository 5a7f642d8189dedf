"""What is paid once, or once a stage, beside what peft does for the same.

| ours | peft |
|---|---|
| `adapt` | `get_peft_model` |
| `transition` | `merge_and_unload`, `get_peft_model`, a new optimizer |
| `folded_state_dict` | `merge_adapter`, copies of the state dict, `unmerge_adapter` |
| `release` | `merge_and_unload` |
| `save` | `save_pretrained` |
| `load` | `PeftModel.from_pretrained` |
| `weights`: into `weights("slow")` and back | `merge_adapter`, `unmerge_adapter` |
| `generate`: eight tokens, in a stage | `generate`, unmerged |

On an accelerator ours is measured with W0 on the device (`base="device"`) as well.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.capture import forget

from .models import Work
from .rivals import adapted, check_same_work, wrapped
from .transitions import Seconds, streaming_seconds, timed, train, transition_seconds

__all__ = ["ON_DEVICE", "ROWS", "clocked", "costs"]

ROWS = ("adapt", "transition", "fold", "release", "save", "load", "weights", "generate")
ON_DEVICE = "ours, base=device"

Found = dict[str, list[Seconds]]


def costs(work: Work, repeats: int, stages: int = 3, device: str = "cpu") -> dict[str, Any]:
    """Return the least seconds of each row over some repeats, in which the two take turns, as plain data.

    Args:
        work: the model.
        repeats: fresh models of each.
        stages: transitions of each model.
        device: of the work.
    """
    model, batch = work.build(), work.batch()
    names = ("ours", "peft") if device == "cpu" else ("ours", ON_DEVICE, "peft")
    found: dict[str, Found] = {name: {row: [] for row in ROWS} for name in names}
    streaming: list[Seconds] = []
    for _ in range(repeats):
        if ON_DEVICE in found:
            beside = _ours(work, model, batch, found[ON_DEVICE], stages, [], "device")
            clocked(found[ON_DEVICE]["release"], beside.release)
        cascade = _ours(work, model, batch, found["ours"], stages, streaming)
        wrapper = _theirs(work, model, batch, found["peft"], stages)
        check_same_work(work, cascade, wrapper)
        clocked(found["ours"]["release"], cascade.release)
        clocked(found["peft"]["release"], wrapper.merge_and_unload)
    least = {name: {row: _least(rows[row]) for row in ROWS if rows[row]} for name, rows in found.items()}
    return {"title": work.title, **least, "streaming": _least(streaming)}


def _ours(
    work: Work,
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    found: Found,
    stages: int,
    streaming: list[Seconds],
    memory: str = "memory",
) -> lx.Cascade:
    base = copy.deepcopy(model)
    forget()
    cascade = clocked(found["adapt"], lambda: adapted(work, base, batch, base=memory))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    for _ in range(stages):
        train(cascade, optimizer)
        found["transition"].append(transition_seconds(cascade, optimizer))
        streaming.append(streaming_seconds(cascade))
    train(cascade, optimizer)
    clocked(found["fold"], cascade.folded_state_dict)

    def visit() -> None:
        with cascade.weights("slow"):
            pass

    clocked(found["weights"], visit)
    if hasattr(model, "generate"):
        clocked(found["generate"], lambda: cascade.generate(**_prompt(batch)))
    with tempfile.TemporaryDirectory() as folder:
        clocked(found["save"], lambda: lx.save(cascade, Path(folder)))
        again = copy.deepcopy(model)
        forget()
        clocked(found["load"], lambda: lx.load(folder, again, kwargs=dict(batch))).release()
    return cascade


def _prompt(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of `generate` for a batch of ids, or of embeddings, of which a few positions are used."""
    begun = {name: value[:, :8] for name, value in batch.items()}
    return {**begun, "min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def _theirs(work: Work, model: nn.Module, batch: Mapping[str, torch.Tensor], found: Found, stages: int) -> Any:
    import peft

    base = copy.deepcopy(model)
    wrapper: Any = clocked(found["adapt"], lambda: wrapped(work, base))
    optimizer = _optimizer(wrapper)

    def turn() -> tuple[Any, torch.optim.Optimizer]:
        after = wrapped(work, wrapper.merge_and_unload())
        return after, _optimizer(after)

    for _ in range(stages):
        _train(wrapper, optimizer)
        wrapper, optimizer = clocked(found["transition"], turn)
    _train(wrapper, optimizer)

    def fold() -> dict[str, torch.Tensor]:
        wrapper.merge_adapter()
        state = {name: value.clone() for name, value in wrapper.state_dict().items()}
        wrapper.unmerge_adapter()
        return state

    clocked(found["fold"], fold)
    clocked(found["weights"], lambda: (wrapper.merge_adapter(), wrapper.unmerge_adapter()))
    if hasattr(model, "generate"):
        clocked(found["generate"], lambda: wrapper.generate(**_prompt(batch)))
    with tempfile.TemporaryDirectory() as folder:
        clocked(found["save"], lambda: wrapper.save_pretrained(folder))
        again = copy.deepcopy(model)
        forget()
        clocked(found["load"], lambda: peft.PeftModel.from_pretrained(again, folder, is_trainable=True))
    return wrapper


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    train(model, optimizer)  # type: ignore[arg-type]


def clocked(into: list[Seconds], run: Callable[[], Any]) -> Any:
    """Run once, note the seconds, and return what came out."""
    out: list[Any] = []
    into.append(timed(lambda: out.append(run())))
    return out[0]


def _least(seconds: list[Seconds]) -> dict[str, float]:
    return {"cpu": min(second.cpu for second in seconds), "wall": min(second.wall for second in seconds)}
