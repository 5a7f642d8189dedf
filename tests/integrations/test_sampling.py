"""Trainers that sample from the model being trained: they sample with the weights that they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

import lorasc_fx as lx
from tests.integrations.kit import llama
from tests.integrations.test_trl import NOISY, adapted, callback_of, grpo_of
from tests.kit.errors import raises

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STAGED = lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=0.5, targets=NOISY.targets, noise=lx.Noise(0.3))


def test_transformers_samples_from_the_fast_weights(tmp_path: Path) -> None:
    cascade = adapted(STAGED, llama().float())
    calls, original = [], cascade.model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(cascade._run.placed)
        return original(*args, **kwargs)

    cascade.model.generate = generate
    grpo_of(cascade, tmp_path, callback_of(cascade, steps=3)).train()
    assert len(calls) >= 4
    assert set(calls) == {"fast"}


def test_trainers_that_would_sample_from_other_weights_are_refused(tmp_path: Path) -> None:
    cascade = adapted(STAGED)
    for name, value in (("use_vllm", True), ("vllm_server_base_url", "http://localhost:8000")):  # as for AsyncGRPO
        arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        setattr(arguments, name, value)
        with raises(lx.SpecError, "trainer-not-supported", "use_vllm=False"):
            Trainer(model=cascade, args=arguments, callbacks=[callback_of(cascade)])
