"""Requirements for every training loop: a resumed run has the same bits, and one stage equals peft in the same loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import GradientState
from safetensors.torch import load_file

import lorasc_fx as lx
from tests.integrations.kit import net
from tests.integrations.loops import END, LOOPS, SPECS, STOPS, Accelerated, AcceleratedHalf, Steps, data
from tests.kit.models import lora_of, trainable_parameters

QUICK = [("plain", "noise, A kept"), ("accelerate, bf16", "fast")]
QUICK += [("timm", "noise"), ("trainer, epochs", "noise")]
SLOW = [("trainer, bf16", "fast")]
SLOW += [("plain", spec) for spec in SPECS if ("plain", spec) not in QUICK] + [("trainer", "pairs")]
SLOW += [(loop, "noise") for loop in LOOPS if (loop, "noise") not in QUICK + SLOW]


@pytest.fixture(autouse=True)
def of_no_other_loop() -> None:
    """Reset accelerate's process-wide state."""
    GradientState._reset_state()


@pytest.mark.parametrize(("loop", "fields"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)])
def test_a_resumed_run_has_the_same_bits(loop: str, fields: str, tmp_path: Path) -> None:
    """Stop in a stage, in a step, and right after a transition, with dropout and shuffled data."""
    spec = lx.CascadeSpec(**{"rank": 2, **SPECS[fields]})
    losses, uninterrupted = LOOPS[loop](spec, tmp_path, 0)
    assert uninterrupted.stage > 2
    for at in STOPS:
        torch.manual_seed(99)  # a new process
        remaining, resumed = LOOPS[loop](spec, tmp_path, at)
        assert remaining
        assert remaining == losses[at:]
        assert resumed.stage == uninterrupted.stage
        for view in ("slow", "fast"):
            with uninterrupted.weights(view), resumed.weights(view):  # type: ignore[arg-type]
                ours, theirs = resumed.model.state_dict(), uninterrupted.model.state_dict()
                assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("loop", ["accelerate", "trainer"])
def test_a_checkpoint_does_not_contain_the_base(loop: str, tmp_path: Path) -> None:
    _, cascade = LOOPS[loop](lx.CascadeSpec(rank=1), tmp_path, 0)
    tensors = load_file(tmp_path / ("6" if loop == "accelerate" else "checkpoint-6") / "model.safetensors")
    shapes = {tuple(parameter.shape) for parameter in cascade.model.parameters()}
    assert {name for name, value in tensors.items() if tuple(value.shape) in shapes} == set()
    assert any("first.weight/experts" in name for name in tensors), list(tensors)


@pytest.mark.parametrize("kind", [Steps, Accelerated, AcceleratedHalf])
def test_one_stage_equals_peft(kind: type[Steps], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the same loop with peft's LoRA."""
    monkeypatch.setattr(kind, "dropout", 0.0)
    ours = kind(lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=1.0), stage=END + 1)
    lora = lora_of(ours.cascade, net(0.0), ["first", "head"])
    ours.go(0)
    trained, expected = trainable_parameters(lora), []
    plain = torch.optim.AdamW(trained, lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(plain, 1.0, 0.1, 8)
    for number in range(END):
        x, labels = data(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind.precision == "bf16"):
            loss = lora(x, labels)["loss"]
        (loss / 2).backward()
        expected.append(loss.item())
        if number % 2:
            torch.nn.utils.clip_grad_norm_(trained, 0.1)
            plain.step()
            schedule.step()
            plain.zero_grad()
    assert sum(ours.losses[-4:]) < sum(ours.losses[:4]) - 0.1
    assert ours.losses == pytest.approx(expected, abs=1e-5 if kind.precision == "no" else 2e-2, rel=0)
