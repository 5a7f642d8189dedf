"""`state_dict` and `load_state_dict` of a cascade, called directly and through wrappers and containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from tests.errors.state import of_cascade, unchanged
from tests.integrations.kit import adapted, rows
from tests.integrations.loops import SPECS, Steps
from tests.kit.errors import raises
from tests.kit.seams import SEAMS
from tests.kit.state import replace_plan

X = torch.stack([row["x"] for row in rows(6)])
LABELS = torch.stack([row["labels"] for row in rows(6)])


def noisy(stage: int = 8) -> Steps:
    """A loop of 14 batches, of which so many make a stage."""
    return Steps(lx.CascadeSpec(**{"rank": 2, **SPECS["noise"]}), stage)


class Holder(nn.Module):
    """A module like a LightningModule: the cascade is a child, next to other modules."""

    def __init__(self, cascade: nn.Module) -> None:
        super().__init__()
        self.metric = nn.Linear(2, 2)
        self.cascade = cascade


def test_the_state_has_neither_weights_of_the_base_nor_noise() -> None:
    loop = noisy()
    loop.go(0)
    before = of_cascade(loop.cascade)
    state = loop.cascade.state_dict()
    assert of_cascade(loop.cascade) == before
    large = {tuple(value.shape) for name, value in loop.cascade.model.named_parameters() if value.dim() > 1}
    assert {name for name, value in state.items() if tuple(value.shape) in large} == set()
    assert {name.split("/")[0] for name in state} == {"branch", "slow", "value", "rng", "lorasc_fx.manifest"}
    memory = {value.data_ptr() for value in loop.cascade.parameters()}
    assert not any(value.data_ptr() in memory for value in state.values())


def test_a_module_that_contains_a_cascade() -> None:
    loop = noisy()
    loop.go(0)
    trained = nn.ModuleList([Holder(loop.cascade)])
    state = trained.state_dict()
    names = {f"0.cascade.{name}" for name in loop.cascade.state_dict()}
    assert set(state) == names | {"0.metric.weight", "0.metric.bias"}
    destination: dict[str, Tensor] = {}
    trained.state_dict(destination=destination, prefix="model.")
    assert set(destination) == {f"model.{name}" for name in state}

    fresh = nn.ModuleList([Holder(noisy().cascade)])
    parameters = dict(fresh.named_parameters())
    assert not any(fresh.load_state_dict(state, strict=True, assign=True))
    assert fresh[0].cascade.stage == 2  # type: ignore[union-attr]
    for name, parameter in fresh[0].cascade.named_parameters():  # type: ignore[union-attr]
        assert parameter is parameters[f"0.cascade.{name}"]
        assert torch.equal(parameter, loop.cascade.get_parameter(name)), name

    remaining = {name: value for name, value in state.items() if "cascade" not in name}
    with unchanged(fresh[0].cascade):  # type: ignore[union-attr]
        with pytest.raises(
            RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\.cascade\.lorasc_fx\.manifest\"\. $"
        ):
            fresh.load_state_dict(remaining)
        missing = fresh.load_state_dict(remaining, strict=False)
        assert missing.missing_keys == ["0.cascade.lorasc_fx.manifest"]
        del remaining["0.metric.bias"]  # found before the cascade, and still told
        missing = fresh.load_state_dict(remaining, strict=False)
        assert missing.missing_keys == ["0.metric.bias", "0.cascade.lorasc_fx.manifest"]
        with pytest.raises(RuntimeError, match="Unexpected key"):
            fresh.load_state_dict({**state, "1.weight": X})


EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    "missing": (lambda state: state.pop("branch/first.weight/lora_A"), ("invalid-checkpoint", "digest")),
    "foreign": (lambda state: state.update({"model.first.weight": X}), ("invalid-checkpoint", "model.first.weight")),
    "changed": (lambda state: state["branch/first.weight/lora_A"].add_(1), ("invalid-checkpoint",)),
    "no manifest": (lambda state: state.pop("lorasc_fx.manifest"), ("invalid-checkpoint", "lorasc_fx.manifest")),
    "manifest": (lambda state: state["lorasc_fx.manifest"].add_(1), ("unreadable-file",)),
    "empty": (lambda state: state.clear(), ("invalid-checkpoint",)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_incomplete_state_is_refused(edit: str) -> None:
    """With strict=False too, because a cascade cannot be restored partially."""
    loop, target = noisy(), noisy()
    loop.go(0)
    state = loop.cascade.state_dict()
    change, (code, *names) = EDITS[edit]
    change(state)
    for strict in (True, False):
        with unchanged(target.cascade), raises(lx.CheckpointError, code, "load_state_dict", *names):
            target.cascade.load_state_dict(state, strict=strict)


def test_a_state_of_another_cascade() -> None:
    """The state of another spec, base or target sites, and folded weights, which are not a state."""
    loop = noisy()
    loop.go(0)
    state, spec = loop.cascade.state_dict(), loop.cascade.plan.spec
    model = adapted(spec, 0.0).release()
    with torch.no_grad():
        model.first.weight[0, 0] += 1  # type: ignore[union-attr, index, operator]
    moved = lx.adapt(model, (X,), {"labels": LABELS}, spec=spec)
    fewer = adapted(spec, 0.0)
    replace_plan(fewer, fewer.plan.__class__(spec, fewer.plan.sites[:1], 1))
    for target, code, name, tensors in (
        (adapted(lx.CascadeSpec(rank=3)), "spec-differs", "head.bias", state),
        (moved, "base-differs", "first.weight", state),
        (fewer, "sites-differ", "head.weight", state),
        (loop.cascade, "invalid-checkpoint", "first.weight", loop.cascade.folded_state_dict()),
    ):
        with raises(lx.CheckpointError, code, "load_state_dict", name):
            target.load_state_dict(tensors)


def test_a_state_is_loaded_through_a_wrapper_in_one_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel and similar wrappers add a prefix to each key. If loading raises, nothing is changed."""
    loop, target = noisy(4), noisy()
    loop.go(0)
    state, holder = nn.ModuleDict({"module": loop.cascade}).state_dict(), nn.ModuleDict({"module": target.cascade})
    assert all(name.startswith("module.") for name in state)

    def refuse(*_: Any) -> None:
        raise MemoryError("in the middle")

    for _ in range(2):
        target.cascade(X, LABELS)["loss"].backward()  # gradients that wait
        with monkeypatch.context() as patch:
            patch.setattr(*SEAMS["unpack gradients"], refuse)  # the last values to be decoded
            with unchanged(target.cascade, target.optimizer), pytest.raises(MemoryError, match=r"^in the middle$"):
                holder.load_state_dict(state)
        target.optimizer.step()
        target.optimizer.zero_grad()
        target.cascade.transition(target.optimizer)
    assert not any(holder.load_state_dict(state, strict=True))
    assert target.cascade.stage == loop.cascade.stage == 4
    for name, value in target.cascade.model.state_dict().items():  # noise included
        assert torch.equal(value, loop.cascade.model.state_dict()[name])


def test_calls_without_a_state() -> None:
    loop = noisy()
    state = loop.cascade.state_dict()
    with loop.cascade.weights("slow"), raises(lx.StateError, "inside-weights", "load_state_dict"):
        loop.cascade.load_state_dict(state)
    loop.cascade.release()
    with raises(lx.StateError, "released", "load_state_dict"):
        loop.cascade.load_state_dict(state)


def test_hooks_for_state_dicts_run() -> None:
    cascade, seen = adapted(lx.CascadeSpec(rank=2)), []
    hooked: Any = cascade
    hooked.register_state_dict_pre_hook(lambda *_: seen.append("before"))
    hooked.register_state_dict_post_hook(lambda _module, state, prefix, _: state.update({f"{prefix}more": X}))
    hooked.register_load_state_dict_pre_hook(lambda _module, state, prefix, *_: state.pop(f"{prefix}more"))
    hooked.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    state = nn.ModuleDict({"c": cascade}).state_dict()
    assert "c.more" in state
    assert not any(nn.ModuleDict({"c": cascade}).load_state_dict(state))
    assert seen == ["before", "loaded"]
